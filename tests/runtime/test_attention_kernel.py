"""Attention, norm and RoPE kernels against the operators' definitions, on every instruction set of this machine.

T tokens, H query heads, KV key/value heads, d head size, e value size, S cache positions.
tests/runtime/native/attention_check.cpp compares the instruction sets with each other, threads, and bad arguments.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from moec.compiler.ops import CachedAttention
from moec.compiler.quant import quantize_rows
from moec.runtime import kernel_api, native
from moec.targets.xnnpack import cpu_ops  # noqa: F401  (cpu_ops registers moec::*)
from tests.runtime.kernel_cases import instruction_sets

# Both sides sum the same fp32 products in other orders: d <= 128 products of order 1 give scores an error of about
# 1e-6, the softmax turns it into the same relative error of the weights, and values are of order 3.
ATOL = 2e-5
# Over INT8 caches both sides round queries and weights to 16 bits. Where a number is near a half, its last bit decides
# which code it gets: a difference of 1 / 32512 of the largest weight, times a value of order 3.
ATOL_CODES = 1e-4

_SIZES = ("tokens", "heads", "kv_heads", "head_dim", "value_dim", "capacity", "start_pos", "window")


class _Buffer(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("bytes", ctypes.c_uint64))


class _Arguments(ctypes.Structure):
    """moec_attention_args of kernels/attention.h."""

    _fields_ = (
        *((n, ctypes.c_int64) for n in _SIZES),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        *((n, _Buffer) for n in ["q", "k", "v", "k_cache", "v_cache", "k_scale", "v_scale", "out", "sinks"]),
    )


@pytest.fixture(params=instruction_sets())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    kernel_api.set_isa(request.param)
    yield request.param
    kernel_api.set_isa("auto")


def _buffer(array: np.ndarray | None) -> _Buffer:
    return _Buffer(None, 0) if array is None else _Buffer(array.ctypes.data, array.nbytes)


def _attend(  # type: ignore[no-untyped-def]
    q, k, v, k_cache, v_cache, k_scale, v_scale, start, scale, window, sinks=None, softcap=0.0
):
    t, heads, d = q.shape
    kv, e = v.shape[1:]
    out = np.full((t, heads, e), np.nan, np.float32)
    arguments = _Arguments(t, heads, kv, d, e, k_cache.shape[0], start, window, scale, softcap)
    pairs = {"q": q, "k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache, "k_scale": k_scale, "v_scale": v_scale}
    for name, value in {**pairs, "out": out, "sinks": sinks}.items():
        setattr(arguments, name, _buffer(value))
    status = kernel_api.library().moec_cached_attention(ctypes.byref(arguments))
    assert status == 0, kernel_api.library().moec_last_error()
    return out


def _batch(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.copy())[None]


def test_a_window_beyond_the_cache_sees_everything(isa: str) -> None:
    """Also the largest integer: a sum with it must not wrap, which once made the scratch too small."""
    rng = np.random.default_rng(3)
    q, k, v = (rng.standard_normal((5, 2, 8), dtype=np.float32) for _ in range(3))
    k_cache, v_cache = (rng.standard_normal((3005, 2, 8), dtype=np.float32) for _ in range(2))
    found = [
        _attend(q, k, v, k_cache, v_cache, None, None, 3000, 0.3, window) for window in (0, 3005, 1 << 20, 2**63 - 1)
    ]
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])


@pytest.mark.parametrize("quantized", [False, True], ids=["f32", "int8"])
@pytest.mark.parametrize("seed", range(12))
def test_cached_attention_is_its_definition(isa: str, seed: int, quantized: bool) -> None:
    rng = np.random.default_rng(seed)
    kv, per = int(rng.integers(1, 5)), int(rng.integers(1, 6))
    d = int(rng.choice([8, 16, 20, 64, 128]))
    e = d if seed % 3 else int(rng.choice([5, 32, 64]))
    t = 1 if seed % 2 else int(rng.integers(2, 70))
    start = int(rng.integers(0, 400)) if seed % 4 else 0
    s, window = start + t + int(rng.integers(0, 9)), int(rng.integers(1, 90)) if seed % 5 == 0 else 0
    q, k, v = (rng.standard_normal((t, h, w), dtype=np.float32) for h, w in ((kv * per, d), (kv, d), (kv, e)))
    before_k, before_v = (torch.from_numpy(rng.standard_normal((s, kv, w), dtype=np.float32)) for w in (d, e))
    if quantized:
        (k_codes, k_scales), (v_codes, v_scales) = quantize_rows(before_k), quantize_rows(before_v)
        caches = [k_codes.to(torch.int8).numpy(), v_codes.to(torch.int8).numpy()]
        scales = [k_scales.squeeze(-1).numpy().copy(), v_scales.squeeze(-1).numpy().copy()]
    else:
        caches, scales = [before_k.numpy(), before_v.numpy()], [None, None]
    expected_caches, expected_scales = [_batch(c) for c in caches], [_batch(c) for c in scales if c is not None]
    # of the scores' size, and far below and above them
    sinks = None if seed % 3 == 1 else np.concatenate((rng.standard_normal(kv * per - 1), [30.0, -1e4]))[-kv * per :]
    sinks = None if sinks is None else sinks.astype(np.float32)
    softcap = (0.0, 0.0, 5.0, 0.3)[seed % 4]  # not, of the scores' size, and far below them
    expected = CachedAttention(
        _batch(q), _batch(k), _batch(v), *expected_caches, torch.tensor([start]), d**-0.5, window,
        *(expected_scales or [None, None]), None if sinks is None else torch.from_numpy(sinks), softcap,
    ).in_integers()  # fmt: skip
    got = _attend(q, k, v, *caches, *scales, start, d**-0.5, window, sinks, softcap)
    np.testing.assert_allclose(got.reshape(t, -1), expected[0].numpy(), atol=ATOL_CODES if quantized else ATOL, rtol=0)
    found = caches + [c for c in scales if c is not None]
    for ours, theirs in zip(found, expected_caches + expected_scales, strict=True):  # what was written: the same bits
        np.testing.assert_array_equal(ours, theirs[0].numpy())


@pytest.mark.parametrize("quantized", [False, True], ids=["f32", "int8"])
def test_chunks_and_steps_extend_one_sequence(isa: str, quantized: bool) -> None:
    """A prompt at once, in chunks, and token by token: the same bits (attention_check.cpp: over random shapes)."""
    rng = np.random.default_rng(1)
    t, heads, kv, d, s = 50, 6, 2, 32, 64
    q, k, v = (rng.standard_normal((t, h, d), dtype=np.float32) for h in (heads, kv, kv))
    sinks = rng.standard_normal(heads, dtype=np.float32)

    def run(cuts: list[int]) -> np.ndarray:
        dtype = np.int8 if quantized else np.float32
        caches = [np.zeros((s, kv, d), dtype) for _ in "kv"]
        scales = [np.zeros((s, kv), np.float32) if quantized else None for _ in "kv"]
        parts = []
        for begin, end in zip([0, *cuts], [*cuts, t], strict=True):
            part = slice(begin, end)
            parts.append(_attend(q[part], k[part], v[part], *caches, *scales, begin, d**-0.5, 0, sinks, 2.0))
        return np.concatenate(parts)

    whole = run([])
    np.testing.assert_array_equal(run([7, 8, 33]), whole)
    np.testing.assert_array_equal(run(list(range(1, t))), whole)


@pytest.mark.parametrize("rows", [0, 1, 7, 200])
@pytest.mark.parametrize("width", [1, 16, 33, 768])
def test_rms_norm_is_its_definition(isa: str, rows: int, width: int) -> None:
    rng = np.random.default_rng(rows + width)
    x, w = rng.standard_normal((rows, width), dtype=np.float32) * 3, rng.standard_normal(width, dtype=np.float32)
    for weight in (None, w):
        y = np.full_like(x, np.nan)
        eps = ctypes.c_float(1e-5)
        sizes = ctypes.c_int64(rows), ctypes.c_int64(width)
        call = kernel_api.library().moec_rms_norm
        assert call(*sizes, eps, _buffer(x), _buffer(weight), _buffer(y)) == 0
        expected = torch.ops.moec.rms_norm(
            torch.from_numpy(x), None if weight is None else torch.from_numpy(weight), 1e-5
        )
        # at most 768 squares in another order, one square root: a few units in the last place
        np.testing.assert_allclose(y, expected.numpy(), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("d", [2, 6, 32, 64, 130])
def test_rope_is_its_definition(isa: str, d: int, interleaved: bool) -> None:
    rng = np.random.default_rng(d)
    t, heads = 70, 5
    x = rng.standard_normal((t, heads, d), dtype=np.float32)
    angle = rng.standard_normal((t, d // 2), dtype=np.float32)
    cos, sin, y = np.cos(angle), np.sin(angle), np.full_like(x, np.nan)
    sizes = ctypes.c_int64(t), ctypes.c_int64(heads), ctypes.c_int64(d), ctypes.c_int32(interleaved)
    assert kernel_api.library().moec_rope(*sizes, _buffer(x), _buffer(cos), _buffer(sin), _buffer(y)) == 0
    expected = torch.ops.moec.rope(_batch(x), torch.from_numpy(cos), torch.from_numpy(sin), interleaved)
    # two products and a sum, one of them fused here
    np.testing.assert_allclose(y, expected[0].numpy(), rtol=1e-6, atol=1e-6)


@pytest.mark.slow  # builds the kernels once more; the tests of this folder call those that are built
def test_native_checks_hold_here() -> None:
    """Random shapes, threads and bad arguments, against the scalar reference."""
    for program in native.build_checks():
        done = subprocess.run([str(program), "20"], capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, f"{program.name}: {done.stdout[-1000:]}{done.stderr[-3000:]}"


@pytest.mark.first
def test_kernels_hold_on_aarch64() -> None:
    """NEON and its matrix instructions, emulated: the kernels' own checks, over a few shapes."""
    _hold_on_aarch64(["attention", "latent", "moe"], cases=1)


@pytest.mark.slow
def test_native_checks_hold_on_aarch64() -> None:
    """Every check, over long contexts too."""
    _hold_on_aarch64([], cases=2)


def _hold_on_aarch64(names: list[str], cases: int) -> None:
    compiler = shutil.which("aarch64-linux-gnu-g++")
    # Debian's qemu-user has the first name, qemu-user-static the second
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if compiler is None or emulator is None:
        pytest.skip("needs aarch64-linux-gnu-g++ and qemu-aarch64 (Debian: g++-aarch64-linux-gnu, qemu-user)")
    said = ""
    for program in native.build_checks(names, cross_compiler=compiler, processor="aarch64"):
        command = [emulator, "-cpu", "max", "-L", "/usr/aarch64-linux-gnu", str(program), str(cases)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, f"{program.name}: {done.stdout[-1000:]}{done.stderr[-3000:]}"
        said += done.stdout
    assert said.count("i8mm,neon,scalar") >= 3, said
