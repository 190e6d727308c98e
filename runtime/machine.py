"""Measures a device file's figures on this machine: its peaks, and the rates of our kernels (`moec device measure`).

Weights are random codes; time does not depend on their values. Each rate is measured in rounds of about a tenth of a
second; the figure is the best round, since whatever else ran can only slow a round down, and the spread is all rounds.
T tokens, D model width, F expert width, E experts.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from moec.compiler.cores import usable_cores
from moec.compiler.errors import UserError
from moec.compiler.instruction_sets import instruction_sets
from moec.compiler.ops.attributes import Experts, Routing
from moec.compiler.progress import Progress
from moec.runtime import kernel_api, native
from moec.runtime.moe_config import Kind, MoeConfig, WeightFormat

Rounds = list[float]
_GROUP = 32
_DENSE = WeightFormat(Kind.INT4, _GROUP, int8_activations=True)


def build_roofline(isa: str, folder: Path) -> Path:
    """Compile probe/roofline.cpp for an instruction set; the path of the program. UserError without a compiler."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / f"roofline-{isa}"
    source = Path(__file__).resolve().parent / "probe" / "roofline.cpp"
    if program.exists() and program.stat().st_mtime >= source.stat().st_mtime:
        return program
    flags = next(s.flags for s in instruction_sets() if s.name == isa)
    command = [native.find_compiler(), "-O3", "-std=c++17", "-pthread", *flags, str(source), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        raise UserError(
            f"the probe does not compile: {lines[0][:300]}", remedy="set CXX to g++ 11 or clang 14 or newer"
        )
    return program


def peaks(isa: str, threads: int, rounds: int) -> dict[str, Rounds]:
    """`dram` in bytes/s of all threads, `int8` in operations/s of one thread; one entry a round."""
    program = build_roofline(isa, native.cache_folder() / "probe")
    found: dict[str, Rounds] = {"dram": [], "int8": []}
    for _ in range(rounds):
        all_threads, one = (_roofline(program, n) for n in (threads, 1))
        found["dram"].append(max(all_threads["read_gb_per_s"], one["read_gb_per_s"]) * 1e9)
        found["int8"].append(one["int8_gop_per_s"] * 1e9)
    return found


def _roofline(program: Path, threads: int) -> dict[str, float]:
    command = [str(program), str(threads), "512", "0.15"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def last_cache_bytes() -> int:
    """The largest cache of CPU 0; 0 when the system does not say."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}[text[-1]] if text[-1] in "KM" else int(text))
    return max(sizes, default=0)


def memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def storage_rate(file: Path, block: int, readers: int = 2, seconds: float = 1.0) -> float:
    """Bytes a second of reads of `block` bytes at random places of a file, by as many threads as the runtime has.

    They go past the page cache where the file system allows it (O_DIRECT); OSError where it does not.
    """
    places = file.stat().st_size // block
    begin = time.monotonic()
    until = begin + seconds

    def read_on(seed: int) -> int:
        chosen = random.Random(seed)
        return _read_until(file, block, lambda: chosen.randrange(places), until)

    with ThreadPoolExecutor(readers) as pool:
        done = sum(pool.map(read_on, range(readers)))
    return done / (time.monotonic() - begin)


def sequential_storage_rate(file: Path, block: int = 8 << 20, seconds: float = 1.0) -> float:
    """Bytes a second of reads of `block` bytes one after the other, from the beginning again at the file's end.

    Past the page cache; OSError as `storage_rate`.
    """
    order = cycle(range(file.stat().st_size // block))
    started = time.monotonic()
    done = _read_until(file, block, lambda: next(order), started + seconds)
    return done / (time.monotonic() - started)


def _read_until(file: Path, block: int, place: Callable[[], int], until: float) -> int:
    """Bytes that were read, a block at each `place`, until time.monotonic() is `until`."""
    done = 0
    handle = os.open(file, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    try:
        with mmap.mmap(-1, block) as memory:
            while time.monotonic() < until:
                done += os.preadv(handle, [memory], place() * block)
    finally:
        os.close(handle)
    return done


def cores() -> tuple[int, int]:
    """Usable cores, (big, little): big ones are those that sessions use unless told otherwise (moec_fast_cores)."""
    usable = usable_cores()
    big = min(int(kernel_api.library().moec_fast_cores()), usable)
    return big, usable - big


def kernel_rates(threads: int, rounds: int, progress: Progress) -> dict[str, Rounds]:
    """Rates of our kernels by the names of `KernelRates`, in bytes/s and operations/s, one entry a round."""
    kernel_api.use_own_pool()
    kernel_api.set_threads(threads)
    cases = {name: make() for name, make in _cases()}
    found: dict[str, Rounds] = {name: [] for name in cases}
    # each round visits every case, so that a slow moment of the machine does not hit one case only
    with progress.stage("measure kernels", rounds) as step:
        for _ in range(rounds):
            for name, (work, runs) in cases.items():
                found[name].append(work / _seconds(runs))
            step("")
    return found


Case = Callable[[], tuple[float, list[Callable[[], object]]]]


def _cases() -> Iterator[tuple[str, Case]]:
    """(name, function that gives the work of one call and the calls to take in turn)."""
    beyond_cache = max(192 << 20, 3 * last_cache_bytes())
    yield "dense_stream", lambda: _linears(1, 2048, 1024, beyond_cache)
    yield "dense_cached", lambda: _linears(1, 1024, 512, 1 << 20)
    yield "dense_prefill", lambda: _linears(128, 2048, 1024, 8 << 20)
    for axis in ("in", "out"):
        out = axis == "out"
        yield f"experts_{axis}_stream", lambda out=out: _blocks(1, 768, 384, 60, out, beyond_cache)  # type: ignore[misc]
        yield f"experts_{axis}_cached", lambda out=out: _blocks(1, 256, 128, 8, out, 0)  # type: ignore[misc]
        yield f"experts_{axis}_prefill", lambda out=out: _blocks(128, 768, 384, 60, out, 0)  # type: ignore[misc]
    yield "attention_decode", lambda: _attention(1, beyond_cache // 2)
    yield "attention_cached", lambda: _attention(1, 0)
    yield "attention_narrow", lambda: _attention(1, 0, heads=8, d=32)
    yield "attention_prefill", lambda: _attention(128, 0)
    yield "state_decode", lambda: _recurrence(1, beyond_cache)
    yield "state_prefill", lambda: _recurrence(128, 0)


def _seconds(runs: list[Callable[[], object]], budget: float = 0.1) -> float:
    """Seconds of one call, averaged over about `budget` seconds of calls in turn."""
    turn = cycle(runs)
    next(turn)()
    count, begin, spent = 0, time.perf_counter(), 0.0
    while spent < budget:
        next(turn)()
        count += 1
        spent = time.perf_counter() - begin
    return spent / count


def _packed(rng: np.random.Generator, count: int, n: int, k: int, fmt: WeightFormat) -> np.ndarray:
    """Random packed matrices: codes are any bytes, scales must be finite."""
    codes = rng.integers(0, 256, size=(count, k, n // 2) if fmt.axis_out else (count, n, k // 2), dtype=np.uint8)
    groups = (count, k, n // _GROUP) if fmt.axis_out else (count, n, k // _GROUP)
    scales = np.full(groups, 0.01, np.float16)
    return kernel_api.pack(codes, scales, n, k, fmt, count=count)


def _linears(t: int, n: int, k: int, total: int) -> tuple[float, list[Callable[[], object]]]:
    """INT4 linears that hold `total` bytes together. Work: packed bytes at one token, else operations."""
    rng = np.random.default_rng(1)
    size = kernel_api.packed_bytes(n, k, _DENSE)
    one = _packed(rng, 1, n, k, _DENSE)
    weights = [one.copy() for _ in range(max(1, total // size))]
    x, y = rng.standard_normal((t, k), dtype=np.float32), np.empty((t, n), np.float32)
    function, none = kernel_api.library().moec_linear, kernel_api._buffer(None)
    fmt = _DENSE.encode()
    held = kernel_api._buffer(x), kernel_api._buffer(y)

    def call(w: np.ndarray) -> Callable[[], object]:
        packed = kernel_api._buffer(w)

        def run(keep: tuple[Any, ...] = (w, x, y)) -> object:
            return function(t, n, k, fmt, held[0], packed, none, held[1])

        return run

    return (float(size) if t == 1 else 2.0 * t * n * k), [call(w) for w in weights]


def _blocks(
    t: int, d: int, f: int, experts: int, axis_out: bool, total: int
) -> tuple[float, list[Callable[[], object]]]:
    """Routed blocks, top 4, that hold `total` bytes together. Work: bytes read at one token, else operations."""
    rng = np.random.default_rng(2)
    fmt = WeightFormat(Kind.INT4, _GROUP, axis_out=axis_out, int8_activations=True)
    router = rng.standard_normal((experts, d), dtype=np.float32)
    w13, w2 = _packed(rng, experts, 2 * f, d, fmt), _packed(rng, experts, d, f, fmt)
    per_expert = (w13.nbytes + w2.nbytes) // experts
    config = MoeConfig(experts, d, f, 4, Routing(score="sigmoid", normalize="sum"), Experts(), fmt, fmt)
    runs: list[Callable[[], object]] = []
    for _ in range(max(1, total // (w13.nbytes + w2.nbytes))):
        tensors = kernel_api.MoeTensors(router_weight=router.copy(), w13=w13.copy(), w2=w2.copy())
        block = kernel_api.PreparedMoe(config, tensors)
        for _ in range(8):  # other tokens reach other experts
            runs.append(_bound(block, rng.standard_normal((t, d), dtype=np.float32)))
    operations = 2.0 * t * (4 * 3 * d * f + experts * d)
    order = np.random.default_rng(3).permutation(len(runs))
    return (4.0 * per_expert + 4 * experts * d if t == 1 else operations), [runs[i] for i in order]


def _bound(block: kernel_api.PreparedMoe, x: np.ndarray) -> Callable[[], object]:
    y = np.empty_like(x)
    run = block.bind(x, y)

    def call(keep: tuple[object, ...] = (block, x, y)) -> object:
        return run()

    return call


ATTENTION_BUFFERS = ("q", "k", "v", "k_cache", "v_cache", "k_scale", "v_scale", "out")


class AttentionArgs(ctypes.Structure):
    """moec_attention_args of kernels/attention.h."""

    _fields_ = (
        *((n, ctypes.c_int64) for n in ("t", "heads", "kv_heads", "d", "e", "capacity", "start", "window")),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        *((n, kernel_api._Buffer) for n in (*ATTENTION_BUFFERS, "sinks")),
    )


def _attention(t: int, total: int, heads: int = 16, d: int = 64) -> tuple[float, list[Callable[[], object]]]:
    """`heads` over 4 INT8 key/value heads of `d`, 2048 positions. Work: operations."""
    rng = np.random.default_rng(4)
    kv, positions = 4, 2048
    per_cache = positions * kv * (2 * d + 8)
    q, k, out = (rng.standard_normal((t, h, d), dtype=np.float32) for h in (heads, kv, heads))
    runs: list[Callable[[], object]] = []
    function = kernel_api.library().moec_cached_attention

    def call(codes: np.ndarray, scales: np.ndarray) -> Callable[[], object]:
        arrays = (q, k, k, codes[0], codes[1], scales[0], scales[1], out)
        args = AttentionArgs(t, heads, kv, d, d, positions, positions - t, 0, d**-0.5)
        for name, array in zip(ATTENTION_BUFFERS, arrays, strict=True):
            setattr(args, name, kernel_api._buffer(array))
        pointer = ctypes.pointer(args)

        def run(keep: tuple[Any, ...] = arrays) -> object:
            return function(pointer)

        return run

    for _ in range(max(1, total // per_cache)):
        codes = rng.integers(-127, 128, size=(2, positions, kv, d), dtype=np.int8)
        runs.append(call(codes, np.full((2, positions, kv), 0.01, np.float32)))
    seen = sum(range(positions - t + 1, positions + 1))
    return 2.0 * 2 * heads * d * seen, runs


DELTA_BUFFERS = ("q", "k", "v", "decay", "beta", "state", "out")


class DeltaArgs(ctypes.Structure):
    """moec_gated_delta_args of kernels/recurrent.h."""

    _fields_ = (
        *((n, ctypes.c_int64) for n in ("tokens", "key_heads", "heads", "key_dim", "value_dim", "start_pos")),
        ("scale", ctypes.c_float),
        ("eps", ctypes.c_float),
        *((n, kernel_api._Buffer) for n in DELTA_BUFFERS),
    )


def _recurrence(t: int, total: int, heads: int = 32, d: int = 128) -> tuple[float, list[Callable[[], object]]]:
    """The gated delta rule of `heads` states of d x d that hold `total` bytes together. Work: operations, three
    multiply-accumulates of an element and token."""
    rng = np.random.default_rng(5)
    q, k, v, out = (rng.standard_normal((t, heads, d), dtype=np.float32) for _ in range(4))
    decay, beta = np.full((t, heads), -0.1, np.float32), np.full((t, heads), 0.5, np.float32)
    function = kernel_api.library().moec_gated_delta

    def call(state: np.ndarray) -> Callable[[], object]:
        arrays = (q, k, v, decay, beta, state, out)
        args = DeltaArgs(t, heads, heads, d, d, 1, d**-0.5, 1e-6)
        for name, array in zip(DELTA_BUFFERS, arrays, strict=True):
            setattr(args, name, kernel_api._buffer(array))
        pointer = ctypes.pointer(args)

        def run(keep: tuple[Any, ...] = arrays) -> object:
            return function(pointer)

        return run

    states = max(1, total // (4 * heads * d * d))
    return 6.0 * heads * d * d * t, [call(np.full((heads, d, d), 0.01, np.float32)) for _ in range(states)]


def run_model(
    model: Path, *, prompt: int, decode: int, threads: int, repeats: int, ids: Sequence[int] | None = None
) -> dict[str, Any]:
    """One process of the runner over a `.pte`: its JSON report. UserError when it refuses.

    `ids`: prompt + decode of them, whose last are decoded; default: ids spread over the vocabulary, behind which the
    model's own choices are decoded.
    """
    command = [str(native.runner_binary()), str(model), "--json", "--decode", str(decode)]
    command += ["--threads", str(threads), "--repeats", str(repeats)]
    if ids is None:
        command += ["--prompt-length", str(prompt)]
    else:
        assert len(ids) == prompt + decode, "ids of the prompt, and those that follow it"
        command += ["--tokens", "-", "--follow"]
    given = None if ids is None else " ".join(map(str, ids))
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, input=given)
    if done.returncode:
        raise UserError(f"the runner failed: {done.stderr.strip()[:300]}", place=str(model))
    return dict(json.loads(done.stdout))
