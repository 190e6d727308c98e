"""Whether the kernels became slower: libraries of two revisions in one process, in turn, or by count of instructions.

    make kernel-revisions BASE=REV                         # time here over time at REV, interleaved
    python bench/kernel_revisions.py --base REV --count    # instructions here over those at REV, by callgrind

Each library is built from the sources of its revision without ExecuTorch, and does the same calls on the same packed
weights with one thread. Times are medians over rounds in which the libraries take turns; a busy machine spoils them.
Counts of instructions are exact on any machine, but of AVX2 kernels (valgrind knows no later set), and say nothing of
memory.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moec.compiler.ops.attributes import Experts, Routing
from moec.runtime import kernel_api, native
from moec.runtime.machine import ATTENTION_BUFFERS, AttentionArgs
from moec.runtime.moe_config import Kind, MoeConfig, WeightFormat

ROOT = Path(__file__).resolve().parent.parent
PLACES = ("runtime/kernels", "targets/xnnpack/kernel")  # where a revision's kernels lie
D, F, EXPERTS, TOP_K, SHARED, GROUP = 768, 384, 16, 4, 768, 32
Call = Callable[[], object]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="a revision of this repository")
    parser.add_argument("--count", action="store_true", help="count instructions instead of time (needs valgrind)")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each library")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bench", help="folder for builds")
    given = parser.parse_args()
    libraries = {name: build(name, given.base, given.work) for name in ("base", "head")}
    found = counted(libraries, given.work) if given.count else timed(libraries, given.rounds)
    unit = "instructions" if given.count else "us"
    print(f"{'':<34}{'base, ' + unit:>20}{'head, ' + unit:>20}{'head / base':>14}")
    for name, (before, after) in found.items():
        print(f"{name:<34}{before:>20,.0f}{after:>20,.0f}{after / before:>14.4f}")
    return 0


def build(name: str, base: str, work: Path) -> Path:
    """The library of the base, or of this checkout; built once a revision, anew for this checkout if it changed."""
    sources = ROOT / PLACES[0]
    folder = work / f"kernels-{name}"
    if name == "base":
        commit = subprocess.run(
            ["git", "rev-parse", "--verify", f"{base}^{{commit}}"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
        folder = work / f"kernels-{commit[:12]}"
        sources = next((p for place in PLACES if (p := folder / "tree" / place).is_dir()), checkout(commit, folder))
    project = (
        f"cmake_minimum_required(VERSION 3.28)\nproject(kernels LANGUAGES CXX)\nadd_subdirectory({sources} kernel)\n"
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "CMakeLists.txt").write_text(project)
    common = ["-DMOEC_EXECUTORCH=OFF", "-DCMAKE_BUILD_TYPE=Release", "-Wno-dev"]
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # cmake of the environment first
    cmake = shutil.which("cmake", path=tools)
    if cmake is None:
        raise SystemExit("error: no cmake; `make setup` installs one")
    subprocess.run([cmake, "-S", str(folder), "-B", str(folder / "build"), *common], check=True, stdout=sys.stderr)
    subprocess.run([cmake, "--build", str(folder / "build"), "-j2"], check=True, stdout=sys.stderr)
    (library,) = (folder / "build").rglob("libmoec_kernels.*")
    return library


def checkout(commit: str, folder: Path) -> Path:
    """The kernels' sources of a revision."""
    for place in PLACES:
        with tempfile.TemporaryFile() as packed:
            done = subprocess.run(["git", "archive", commit, place], cwd=ROOT, stdout=packed, stderr=subprocess.DEVNULL)
            if done.returncode:
                continue
            packed.seek(0)
            with tarfile.open(fileobj=packed) as archive:
                # Pythons before 3.11.4 have no filters
                filtered: dict[str, Any] = {"filter": "tar"} if hasattr(tarfile, "tar_filter") else {}
                archive.extractall(folder / "tree", **filtered)
        return folder / "tree" / place
    raise SystemExit(f"{commit} has no kernels in {' or '.join(PLACES)}")


# ------------------------------------------------------------------------------------------------------------ the calls


@dataclass
class Case:
    """A call of the library that `kernel_api` has loaded, and what it takes, as kernel_calls.cpp reads it."""

    name: str
    call: Call
    arrays: Sequence[np.ndarray]

    def write(self, file: Path) -> None:
        with file.open("wb") as stream:
            for array in self.arrays:
                stream.write(np.int64(array.nbytes).tobytes() + array.tobytes())


def cases() -> Iterator[Case]:
    """Everything that is measured."""
    rng = np.random.default_rng(0)
    kernel_api.set_threads(1)
    for axis_out in (False, True):
        block = moe(rng, axis_out=axis_out)
        for tokens in (1, 16, 128):
            x = rng.standard_normal((tokens, D), dtype=np.float32)
            config, params = block.config.encode()
            tables = [np.array([tokens]), np.array(config, np.int64), np.array(params, np.float64)]
            weights = [block.tensors.router_weight, block.tensors.w13, block.tensors.w2]
            shared = [w for w in (block.tensors.shared_w13, block.tensors.shared_w2) if w is not None]
            name = f"MoE, groups along {'out' if axis_out else 'in'}, {tokens} tokens"
            yield Case(name, block.bind(x, np.empty_like(x)), [*tables, *weights, *shared, x])
    for kind in (Kind.INT4, Kind.INT8):
        fmt = WeightFormat(kind, GROUP, int8_activations=True)
        w = packed(rng, 1, D, D, fmt)
        for tokens in (1, 64):
            x = rng.standard_normal((tokens, D), dtype=np.float32)
            call = linear(x, w, fmt, np.empty((tokens, D), np.float32))
            name = f"linear, {kind.name}, {tokens} tokens"
            yield Case(name, call, [np.array([tokens, D, D, fmt.encode()]), x, w])

    for tokens, positions in ((1, 4096), (256, 256), (256, 4096), (256, 8192)):
        yield attention(rng, tokens, positions)


def attention(rng: np.random.Generator, tokens: int, positions: int) -> Case:
    """12 heads over 4 INT8 key/value heads of 64, as MobileMoE-S has them, the last token at `positions` - 1."""
    heads, kv, width = 12, 4, 64
    q, k, v, out = (rng.standard_normal((tokens, n, width), dtype=np.float32) for n in (heads, kv, kv, heads))
    codes = [rng.integers(-127, 128, (positions, kv, width), dtype=np.int8) for _ in "kv"]
    scales = [rng.uniform(0.01, 0.03, (positions, kv)).astype(np.float32) for _ in "kv"]
    arrays = (q, k, v, codes[0], codes[1], scales[0], scales[1], out)
    args = AttentionArgs(tokens, heads, kv, width, width, positions, positions - tokens, 0, width**-0.5)
    for name, array in zip(ATTENTION_BUFFERS, arrays, strict=True):
        setattr(args, name, kernel_api._buffer(array))

    def run(keep: Sequence[np.ndarray] = arrays) -> object:
        return kernel_api.library().moec_cached_attention(ctypes.byref(args))

    sizes = np.array([tokens, heads, kv, width, positions])
    name = f"attention, {tokens} tokens to {positions}"
    return Case(name, run, [sizes, q, k, v, codes[0], scales[0], codes[1], scales[1]])


def linear(x: kernel_api.F32, w: np.ndarray, fmt: WeightFormat, out: kernel_api.F32) -> Call:
    return lambda: kernel_api.linear(x, w, D, fmt, out=out)


def moe(rng: np.random.Generator, *, axis_out: bool) -> kernel_api.PreparedMoe:
    routed = WeightFormat(Kind.INT4, GROUP, axis_out=axis_out, int8_activations=True)
    shared = WeightFormat(Kind.INT4, GROUP, int8_activations=True)
    tensors = kernel_api.MoeTensors(
        router_weight=rng.standard_normal((EXPERTS, D), dtype=np.float32) * np.float32(D**-0.5),
        w13=packed(rng, EXPERTS, 2 * F, D, routed),
        w2=packed(rng, EXPERTS, D, F, routed),
        shared_w13=packed(rng, 1, 2 * SHARED, D, shared),
        shared_w2=packed(rng, 1, D, SHARED, shared),
    )
    config = MoeConfig(
        experts=EXPERTS,
        d_model=D,
        expert_width=F,
        top_k=TOP_K,
        how=Routing(score="sigmoid", normalize="sum", scale=2.5),
        what=Experts(),
        w13=routed,
        w2=routed,
        shared_width=SHARED,
        shared_w13=shared,
        shared_w2=shared,
    )
    return kernel_api.PreparedMoe(config, tensors)


def packed(rng: np.random.Generator, count: int, n: int, k: int, fmt: WeightFormat) -> np.ndarray:
    rows, columns = (k, n) if fmt.axis_out else (n, k)
    bits = 8 if fmt.kind is Kind.INT8 else 4
    width, dtype = (columns // 2, np.uint8) if bits == 4 else (columns, np.int8)
    info = np.iinfo(dtype)
    codes = rng.integers(info.min, info.max, (count, rows, width), dtype=dtype, endpoint=True)
    if fmt.kind is Kind.NL3:
        codes &= 0x77  # two codes of three bits
    scales = rng.uniform(0.01, 0.03, (count, rows, columns // GROUP)).astype(np.float16)
    return kernel_api.pack(codes, scales, n, k, fmt, count=count)


# --------------------------------------------------------------------------------------------------------- measurements


def timed(libraries: dict[str, Path], rounds: int) -> dict[str, tuple[float, float]]:
    """Medians in microseconds. Both libraries are loaded; the calls of one case alternate between them."""
    calls: dict[str, list[tuple[str, Call]]] = {}
    for name, library in libraries.items():
        use(library)
        calls[name] = [(case.name, bound_to(kernel_api.library(), case.call)) for case in cases()]
    found: dict[str, tuple[float, float]] = {}
    for (case, before), (_, after) in zip(calls["base"], calls["head"], strict=True):
        samples: tuple[list[float], list[float]] = ([], [])
        for call in (before, after):
            call()
        for turn in range(rounds):
            for side in (0, 1) if turn % 2 else (1, 0):
                begin = time.perf_counter()
                (before, after)[side]()
                samples[side].append(1e6 * (time.perf_counter() - begin))
        found[case] = (statistics.median(samples[0]), statistics.median(samples[1]))
    return found


def use(library: Path) -> None:
    os.environ["MOEC_KERNELS_LIBRARY"] = str(library)
    kernel_api.library.cache_clear()
    kernel_api.library()


def bound_to(library: ctypes.CDLL, call: Call) -> Call:
    """The call with its own library, whichever was loaded last."""

    def run() -> object:
        original = kernel_api.library
        kernel_api.library = lambda: library  # type: ignore[assignment]
        try:
            return call()
        finally:
            kernel_api.library = original

    return run


def counted(libraries: dict[str, Path], work: Path) -> dict[str, tuple[float, float]]:
    """Instructions inside the library of each call."""
    use(libraries["head"])
    program, calls = work / "kernel_calls", work / "calls"
    source = Path(__file__).with_suffix("").with_name("kernel_calls.cpp")
    includes = ["-I", str(ROOT / "runtime" / "kernels")]
    compiler = native.find_compiler()
    subprocess.run([compiler, "-O2", "-std=c++17", *includes, str(source), "-o", str(program), "-ldl"], check=True)
    calls.mkdir(exist_ok=True)
    found = {}
    for index, case in enumerate(cases()):
        file = calls / str(index)
        case.write(file)
        before, after = (instructions_of(program, library, file, work) for library in libraries.values())
        found[case.name] = (before, after)
    return found


def instructions_of(program: Path, library: Path, call: Path, work: Path) -> int:
    out = work / "callgrind"
    command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={out}", str(program), str(library), str(call)]
    subprocess.run(command, env={**os.environ, "MOEC_ISA": "avx2"}, check=True, capture_output=True)
    return own_instructions(out.read_text(), library)


def own_instructions(profile: str, library: Path) -> int:
    """The instructions of one object in a callgrind profile: its lines of cost, without those of what it calls."""
    names: dict[str, str] = {}
    total, inside, skip = 0, False, False
    for line in profile.splitlines():
        if line.startswith("ob="):
            key, _, name = line[3:].partition(" ")
            names[key] = name or names[key]
            inside = Path(names[key]).name.startswith("libmoec_kernels")
        elif line.startswith("cob="):
            key, _, name = line[4:].partition(" ")
            names[key] = name or names[key]
        elif line.startswith("calls="):
            skip = True  # the next line is the cost of the callee
        elif line[:1].isdigit() or line[:1] in "+-*":
            numbers = line.split()
            total += int(numbers[1]) if inside and not skip and len(numbers) == 2 else 0
            skip = False
    assert total, f"nothing of {library} was counted"
    return total


if __name__ == "__main__":
    sys.exit(main())
