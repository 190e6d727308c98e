"""Packing, linear and embedding of the kernel library, on every instruction set of this machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from moec.compiler.quant import quantize_rows
from moec.compiler.reference import FLOAT_NOISE
from moec.runtime import kernel_api
from moec.runtime.moe_config import ACTIVATION, Kind, WeightFormat
from moec.targets.xnnpack import packing
from tests.runtime.kernel_cases import LEVELS, Weight, random_weight
from tests.variants import crossed

FORMATS = [
    WeightFormat(kind, group, axis_out, int8, f32_scales)
    for kind in (Kind.INT4, Kind.INT8, Kind.IQ4_NL, Kind.FP4, Kind.NL3)
    for group in (32, 64, 128)
    for axis_out in (False, True)
    for int8 in (True, False)
    for f32_scales in (False, True)
] + [WeightFormat()]
BY_BLOCK = [replace(fmt, block_activations=True) for fmt in FORMATS if fmt.int8_activations]
FORMATS += BY_BLOCK


@pytest.fixture(autouse=True)
def _best_isa_afterwards() -> Iterator[None]:
    yield
    kernel_api.set_isa("auto")
    kernel_api.set_threads(1)


def _random(rng: np.random.Generator, fmt: WeightFormat) -> Weight:
    """Odd sizes wherever the format allows them."""
    if fmt.kind == Kind.F32:
        return random_weight(rng, fmt, int(rng.integers(1, 70)), int(rng.integers(1, 150)))
    groups = fmt.group_size * int(rng.integers(1, 4))
    free = int(rng.integers(1, 90))
    return random_weight(rng, fmt, *((groups, free) if fmt.axis_out else (free, groups)))


def _seen(rows: torch.Tensor, fmt: WeightFormat) -> torch.Tensor:
    """Activations as the integer kernels see them, in float64: code times scale, exactly."""
    if not fmt.block_activations:
        q, scale = quantize_rows(rows)
        return q.double() * scale.double()
    parts = []
    for begin in range(0, rows.shape[1], 32):
        q, scale = quantize_rows(rows[:, begin : begin + 32])
        parts.append(q.double() * scale.double())
    return torch.cat(parts, 1)


def _exact(w: Weight, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(y, bound): the product in float64 with the activations rounded as the definition says, and sum |terms|."""
    rows = torch.from_numpy(x)
    if not w.format.int8_activations:
        m = w.matrix()
        return (rows.double() @ m.t()).numpy(), (rows.double().abs() @ m.abs().t()).numpy()
    assert w.quantized is not None
    if not w.format.axis_out:
        seen, m = _seen(rows, w.format), w.matrix()
        return (seen @ m.t()).numpy(), (seen.abs() @ m.abs().t()).numpy()
    codes = w.quantized.unpacked()[0].double().unflatten(-1, (-1, w.format.group_size))  # [k, G, g]
    scales = w.quantized.scales[0].to(torch.float32)
    outputs, bounds = [], []
    for g in range(scales.shape[1]):
        seen = _seen(rows * scales[:, g], w.format)
        outputs.append(seen @ codes[:, g])
        bounds.append(seen.abs() @ codes[:, g].abs())
    return torch.cat(outputs, 1).numpy(), torch.cat(bounds, 1).numpy()


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_linear_against_float64_and_bit_equal_everywhere(fmt: WeightFormat) -> None:
    rng = np.random.default_rng(fmt.encode())
    for tokens in (1, 2, 3, 5, 13, 50):
        w = _random(rng, fmt)
        x = rng.standard_normal((tokens, w.k), dtype=np.float32) * np.float32(10 ** rng.uniform(-3, 3))
        bias = rng.standard_normal(w.n, dtype=np.float32)
        exact, bound = _exact(w, x)
        results = []
        for isa in kernel_api.available_isas():
            kernel_api.set_isa(isa)
            for threads in (1, 2):
                kernel_api.set_threads(threads)
                results.append(kernel_api.linear(x, w.packed, w.n, fmt, bias))
        # Integer sums are exact; what remains is fp32 rounding of at most one product and one sum per group (per input
        # for float activations): terms + 4 roundings of 2^-24 relative to the sum of magnitudes.
        terms = w.k if not fmt.int8_activations else w.k // fmt.group_size if not fmt.axis_out else 1
        if fmt.block_activations:  # a product with each of the two scales, and a sum, for each block
            terms = 2 * -(-w.k // 32)
        tolerance = (terms + 4) * 2.0**-24 * (bound + np.abs(bias)) + 1e-30
        assert (np.abs(results[0] - (exact + bias)) <= tolerance).all()
        for other in results[1:]:
            assert np.array_equal(other, results[0])


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_pack_carries_codes_and_scales_and_rows_can_be_read_back(fmt: WeightFormat) -> None:
    rng = np.random.default_rng(1 + fmt.encode())
    w = _random(rng, fmt)
    assert kernel_api.packed_bytes(w.n, w.k, fmt) == packing.packed_bytes(w.n, w.k, fmt) == w.packed.size
    codes, scales = packing.unpack(torch.from_numpy(w.packed), fmt, 1, w.n, w.k)
    if w.quantized is None:
        assert w.dense is not None
        assert torch.equal(codes, w.dense)
    else:
        assert w.codes is not None
        assert torch.equal(codes, w.codes)
        assert scales is not None
        assert torch.equal(scales, w.quantized.scales)
    ids = rng.integers(0, w.n, size=9)
    # a code times an f16 scale is exact in fp32; times an f32 scale it is rounded once
    expected = w.matrix()[torch.from_numpy(ids)].to(torch.float32).numpy()
    assert np.array_equal(kernel_api.embedding(ids, w.packed, w.n, w.k, fmt), expected)


def test_float_weights_can_be_transposed_while_packing() -> None:
    rng = np.random.default_rng(5)
    stored = rng.standard_normal((3, 37, 50), dtype=np.float32)  # [count, K, N]
    packed = packing.pack(torch.from_numpy(stored), None, WeightFormat(), 3, 50, 37, transposed=True)
    codes, _ = packing.unpack(packed, WeightFormat(), 3, 50, 37)
    assert np.array_equal(codes.numpy(), stored.transpose(0, 2, 1))


@pytest.mark.parametrize("kind", [Kind.INT4, Kind.IQ4_NL, Kind.FP4, Kind.NL3])
def test_a_scale_for_32_codes_is_half_a_bit(kind: Kind) -> None:
    bits = 3.5 if kind == Kind.NL3 else 4.5
    for n, k, fmt in ((768, 768, WeightFormat(kind, 32)), (768, 384, WeightFormat(kind, 32, axis_out=True))):
        assert packing.packed_bytes(n, k, fmt) * 8 == bits * n * k
        assert kernel_api.packed_bytes(n, k, fmt) * 8 == bits * n * k


@pytest.mark.parametrize("fmt", [f for f in FORMATS if f.group_size in (0, 32) and not f.f32_scales], ids=str)
def test_rows_that_are_not_finite_stay_visible_and_do_not_spread(fmt: WeightFormat) -> None:
    rng = np.random.default_rng(7)
    w = random_weight(rng, fmt, 64, 64)
    x = rng.standard_normal((6, 64), dtype=np.float32)
    clean = [0, 3, 5]
    x[1, 5], x[2, 63], x[4, 0] = np.nan, np.inf, -np.inf
    for isa in kernel_api.available_isas():
        kernel_api.set_isa(isa)
        y = kernel_api.linear(x, w.packed, w.n, fmt)
        assert np.isfinite(y[clean]).all()
        assert not np.isfinite(y[[1, 2, 4]]).any()
        assert np.array_equal(y[clean], kernel_api.linear(x[clean], w.packed, w.n, fmt))


@pytest.mark.parametrize("axis_out", [False, True])
def test_a_block_that_is_large_or_not_finite_leaves_the_others_their_precision(axis_out: bool) -> None:
    """What blocks are for: one outlier takes the precision of its 31 neighbours, not of the token."""
    fmt = WeightFormat(Kind.INT4, 32, axis_out, int8_activations=True, block_activations=True)
    w = random_weight(np.random.default_rng(5), fmt, 32, 96)
    x = np.random.default_rng(6).standard_normal((1, 96), dtype=np.float32)
    x[0, 40] = 1e4
    alone = x.copy()
    alone[0, 32:64] = 0
    for isa in kernel_api.available_isas():
        kernel_api.set_isa(isa)
        whole, without = (kernel_api.linear(v, w.packed, w.n, fmt) for v in (x, alone))
        middle = kernel_api.linear(x - alone, w.packed, w.n, fmt)
        # three blocks: exact but for the fp32 rounding of sums as large as the outlier's
        assert np.abs(whole - (without + middle)).max() <= 8 * 2.0**-24 * np.abs(middle).max()
        exact = x[:, :32].astype(np.float64) @ w.matrix().numpy()[:, :32].T + x[:, 64:] @ w.matrix().numpy()[:, 64:].T
        assert np.abs(without - exact).max() < 0.02 * np.abs(exact).max()
        token = kernel_api.linear(x, w.packed, w.n, replace(fmt, block_activations=False)) - middle
        assert np.abs(token - exact).max() > 0.5 * np.abs(exact).max()


def test_extremes_of_codes_and_activations_do_not_overflow() -> None:
    """The worst case of the 16-bit sums of AVX2: every code at an end of its range, every activation at +-127."""
    ends = ((Kind.INT4, -8), (Kind.INT4, 7), (Kind.INT8, -128), (Kind.INT8, 127))
    levels = tuple((kind, code) for kind in LEVELS for code in range(len(LEVELS[kind])))
    for kind, q in ends + levels:
        for axis_out in (False, True):
            for by_block in (False, True):
                fmt = WeightFormat(kind, 128, axis_out, int8_activations=True, block_activations=by_block)
                pair = np.full((128, 64), (q & 15) * 0x11, np.uint8)
                codes = np.full((128, 128), q, np.int8) if kind == Kind.INT8 else pair
                code = LEVELS[kind][q] if kind in LEVELS else q
                packed = kernel_api.pack(codes, np.ones((128, 1), np.float16), 128, 128, fmt)
                for sign in (1, -1):
                    x = np.full((1, 128), sign * 127.0, np.float32)
                    for isa in kernel_api.available_isas():
                        kernel_api.set_isa(isa)
                        assert (kernel_api.linear(x, packed, 128, fmt) == code * sign * 127 * 128).all()


@pytest.mark.parametrize("by_block", [False, True])
def test_rows_of_zeros_and_tiny_rows(by_block: bool) -> None:
    fmt = WeightFormat(Kind.INT4, 32, int8_activations=True, block_activations=by_block)
    w = random_weight(np.random.default_rng(3), fmt, 20, 64)
    x = np.zeros((3, 64), np.float32)
    x[1, 7] = 1e-44  # 127 / max overflows: the row rounds to zero
    x[2, 7] = 1e-30
    y = kernel_api.linear(x, w.packed, w.n, fmt)
    assert (y[:2] == 0).all()
    assert np.isfinite(y[2]).all()
    assert (y[2] != 0).any()


def test_packed_bytes_may_lie_anywhere() -> None:
    rng = np.random.default_rng(4)
    for fmt in (f for f in FORMATS if f.kind != Kind.F32):
        w = _random(rng, fmt)
        x = rng.standard_normal((3, w.k), dtype=np.float32)
        expected = kernel_api.linear(x, w.packed, w.n, fmt)
        moved = np.empty(w.packed.size + 1, np.uint8)[1:]
        moved[:] = w.packed
        for isa in kernel_api.available_isas():
            kernel_api.set_isa(isa)
            assert np.array_equal(kernel_api.linear(x, moved, w.n, fmt), expected)


def test_no_tokens() -> None:
    fmt = WeightFormat(Kind.INT4, 32, int8_activations=True)
    w = random_weight(np.random.default_rng(3), fmt, 20, 64)
    assert kernel_api.linear(np.empty((0, 64), np.float32), w.packed, w.n, fmt).shape == (0, 20)
    assert kernel_api.embedding(np.empty(0, np.int64), w.packed, w.n, w.k, fmt).shape == (0, 64)


def test_wrong_sizes_are_refused_with_the_argument_named() -> None:
    fmt = WeightFormat(Kind.INT4, 32, int8_activations=True)
    w = random_weight(np.random.default_rng(3), fmt, 20, 64)
    x = np.zeros((2, 64), np.float32)
    with pytest.raises(kernel_api.KernelError, match=r"w: .* needed"):
        kernel_api.linear(x, w.packed[:-1], w.n, fmt)
    with pytest.raises(kernel_api.KernelError, match="bias"):
        kernel_api.linear(x, w.packed, w.n, fmt, np.zeros(19, np.float32))
    with pytest.raises(kernel_api.KernelError, match="y: "):
        kernel_api.linear(x, w.packed, w.n, fmt, out=np.zeros((2, 19), np.float32))
    with pytest.raises(kernel_api.KernelError, match="groups of 32 along 65"):
        kernel_api.linear(np.zeros((2, 65), np.float32), w.packed, w.n, fmt)
    with pytest.raises(kernel_api.KernelError, match=r"ids\[1\] = 20"):
        kernel_api.embedding(np.array([0, 20]), w.packed, w.n, w.k, fmt)
    with pytest.raises(kernel_api.KernelError, match=r"ids\[0\] = -1"):
        kernel_api.embedding(np.array([-1]), w.packed, w.n, w.k, fmt)
    with pytest.raises(kernel_api.KernelError, match="this machine offers"):
        kernel_api.set_isa("sse9")
    crooked = np.empty(2 * 64 * 4 + 1, np.uint8)[1:].view(np.float32).reshape(2, 64)
    with pytest.raises(kernel_api.KernelError, match="not aligned"):
        kernel_api.linear(crooked, w.packed, w.n, fmt)


ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "silu": lambda v: v / (1 + np.exp(-v)),
    "gelu": lambda v: 0.5 * v * (1 + np.vectorize(math.erf)(v / math.sqrt(2))),
    "gelu_tanh": lambda v: 0.5 * v * (1 + np.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
    "relu": lambda v: np.maximum(v, 0),
    "relu2": lambda v: np.maximum(v, 0) ** 2,
}


@pytest.mark.parametrize(("fmt", "activation"), crossed([f for f in FORMATS if not f.f32_scales], tuple(ACTIVATION)))
def test_gated_linear_is_a_linear_and_an_activation(fmt: WeightFormat, activation: str) -> None:
    rng = np.random.default_rng(11 + fmt.encode())
    for tokens in (1, 3, 50, 101):
        unit = max(16, fmt.group_size) if fmt.axis_out else 16
        width = unit * int(rng.integers(1, 40 if unit == 16 else 5))
        k = (
            int(rng.integers(1, 90))
            if fmt.kind == Kind.F32 or fmt.axis_out
            else fmt.group_size * int(rng.integers(1, 3))
        )
        w = random_weight(rng, fmt, 2 * width, k)
        x = rng.standard_normal((tokens, k), dtype=np.float32)
        results = []
        for isa in kernel_api.available_isas():
            kernel_api.set_isa(isa)
            for threads in (1, 2):
                kernel_api.set_threads(threads)
                results.append(kernel_api.gated_linear(x, w.packed, width, fmt, ACTIVATION.index(activation)))
        both = kernel_api.linear(x, w.packed, 2 * width, fmt).astype(np.float64)
        gate, up = both[:, :width], both[:, width:]
        # the kernel's exp and erf are good to 5e-7 of the gate (generic_kernels.h); three roundings of 6e-8 besides
        tolerance = 1e-6 * np.abs(gate) * np.abs(up) * np.maximum(1, np.abs(gate)) + 1e-30
        assert (np.abs(results[0] - ACTIVATIONS[activation](gate) * up) <= tolerance).all()
        for other in results[1:]:
            assert np.array_equal(other, results[0])


def test_a_gated_linear_keeps_what_is_not_finite_in_its_row() -> None:
    fmt = WeightFormat(Kind.INT4, 32, int8_activations=True)
    w = random_weight(np.random.default_rng(3), fmt, 64, 64)
    x = np.ones((3, 64), np.float32)
    x[1, 5] = np.nan
    y = kernel_api.gated_linear(x, w.packed, 32, fmt, 0)
    assert np.isnan(y[1]).all()
    assert np.isfinite(y[[0, 2]]).all()
    assert kernel_api.gated_linear(x[:0], w.packed, 32, fmt, 0).shape == (0, 32)


def test_a_gated_linear_refuses_what_it_cannot_compute() -> None:
    fmt = WeightFormat(Kind.INT4, 32, int8_activations=True)
    out = WeightFormat(Kind.INT4, 32, axis_out=True, int8_activations=True)
    x = np.zeros((2, 64), np.float32)
    w, grouped = (random_weight(np.random.default_rng(3), f, n, 64).packed for f, n in ((fmt, 40), (out, 96)))
    with pytest.raises(kernel_api.KernelError, match="width of 20 does not divide into blocks of 16"):
        kernel_api.gated_linear(x, w, 20, fmt, 0)
    with pytest.raises(kernel_api.KernelError, match="width of 48 does not divide into blocks of 32"):
        kernel_api.gated_linear(x, grouped, 48, out, 0)
    with pytest.raises(kernel_api.KernelError, match=r"w: .* needed"):
        kernel_api.gated_linear(x, w, 16, fmt, 0)
    whole = random_weight(np.random.default_rng(3), fmt, 32, 64).packed
    for wrong in (-1, 5):
        with pytest.raises(kernel_api.KernelError, match=f"activation {wrong} is not known"):
            kernel_api.gated_linear(x, whole, 16, fmt, wrong)
    for width in (-16, 1 << 62):
        with pytest.raises(kernel_api.KernelError):
            # the binding would allocate the output: the border itself is asked
            kernel_api._check(
                kernel_api.library().moec_gated_linear(
                    2, width, 64, fmt.encode(), 0, *(kernel_api._buffer(b) for b in (x, whole, x))
                )
            )


@pytest.mark.parametrize(
    ("kind", "most"),
    [(Kind.INT8, 1 << 17), (Kind.INT4, 1 << 20), (Kind.IQ4_NL, 1 << 17), (Kind.FP4, 1 << 20), (Kind.NL3, 1 << 20)],
)
def test_sums_that_could_leave_32_bits_are_refused(kind: Kind, most: int) -> None:
    group = WeightFormat(kind, 2 * most, int8_activations=True)
    out = WeightFormat(kind, 32, axis_out=True, int8_activations=True)
    for n, k, fmt in ((16, 2 * most, group), (32, most + 8, out)):
        with pytest.raises(kernel_api.KernelError, match=f"int8 activations the limit is {most}"):
            kernel_api.packed_bytes(n, k, fmt)
    # the longest sum of the largest products is exact
    byte, worst = {
        Kind.INT8: (-128, -128),
        Kind.INT4: (0x88, -8),
        Kind.IQ4_NL: (0, -127),
        Kind.FP4: (0xFF, -12),
        Kind.NL3: (0, -16),
    }[kind]
    codes = np.full((most, 16 if kind.nibbles else 32), byte, np.uint8 if kind.nibbles else np.int8)
    packed = kernel_api.pack(codes, np.ones((most, 1), np.float16), 32, most, out)
    for isa in kernel_api.available_isas():
        kernel_api.set_isa(isa)
        y = kernel_api.linear(np.full((1, most), 127.0, np.float32), packed, 32, out)
        assert (y == np.float32(worst * 127 * most)).all()


def test_a_bias_of_another_dtype_outlives_the_call() -> None:
    fmt = WeightFormat(Kind.INT4, 32, int8_activations=True)
    w = random_weight(np.random.default_rng(3), fmt, 4096, 32)
    bias = np.random.default_rng(4).standard_normal(4096)
    x = np.zeros((1, 32), np.float32)
    for _ in range(20):
        assert np.array_equal(kernel_api.linear(x, w.packed, 4096, fmt, bias)[0], bias.astype(np.float32))


@pytest.mark.parametrize("axis_out", [False, True], ids=["in", "out"])
def test_float_activations_take_the_rounding_away_on_one_thread_only(axis_out: bool) -> None:
    rng = np.random.default_rng(5)
    rounding = WeightFormat(Kind.INT4, 32, axis_out, int8_activations=True)
    w = random_weight(rng, rounding, 64, 96)
    x = rng.standard_normal((7, w.k), dtype=np.float32)
    plain = kernel_api.linear(x, w.packed, w.n, WeightFormat(Kind.INT4, 32, axis_out, int8_activations=False))
    rounded = kernel_api.linear(x, w.packed, w.n, rounding)
    assert not np.array_equal(plain, rounded)
    kernel_api.set_float_activations(True)
    try:
        np.testing.assert_array_equal(kernel_api.linear(x, w.packed, w.n, rounding), plain)
        with ThreadPoolExecutor(1) as other:
            elsewhere = other.submit(kernel_api.linear, x, w.packed, w.n, rounding).result()
        np.testing.assert_array_equal(elsewhere, rounded)
    finally:
        kernel_api.set_float_activations(False)
    np.testing.assert_array_equal(kernel_api.linear(x, w.packed, w.n, rounding), rounded)


@pytest.mark.parametrize("axis_out", [False, True], ids=["in", "out"])
@pytest.mark.parametrize("k", [384, 1536])
def test_float_products_err_by_what_verification_allows_them(k: int, axis_out: bool) -> None:
    """FLOAT_NOISE is this error: if the kernels err more `moec verify` is too strict, if far less too mild."""
    rng = np.random.default_rng(k)
    fmt = WeightFormat(Kind.INT4, 32, axis_out, int8_activations=False)
    w = random_weight(rng, fmt, 256, k)
    x = rng.standard_normal((64, k), dtype=np.float32)
    exact = x.astype(np.float64) @ w.matrix().numpy().T
    error = kernel_api.linear(x, w.packed, w.n, fmt) - exact
    relative = float(np.sqrt(np.mean(error**2) / np.mean(exact**2)))
    assert FLOAT_NOISE / 10 < relative < FLOAT_NOISE
