"""Quantization arithmetic: packing, Eq. 6 and its edges, codes carried bit for bit, activation rounding."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.compiler.errors import CompileError
from moec.compiler.program import LazyWeight
from moec.compiler.quant import (
    QuantizedTensor,
    asymmetric_rows,
    fake_quantize_rows,
    fake_quantize_rows_asymmetric,
    pack_int4,
    quantize_rows,
    quantize_weight,
    quotient,
    unpack_int4,
)
from moec.compiler.quantizer import check_width, codes_of
from moec.compiler.spec.quantization import WeightScheme
from moec.compiler.weights import CodeFormat, Orientation, StoredCodes

quick = settings(max_examples=60, deadline=None)
seeds = st.integers(0, 2**31 - 1)
magnitudes = st.sampled_from([1e-9, 3e-7, 1e-5, 1e-2, 1.0, 300.0, 4e5])


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def held(stored: QuantizedTensor) -> StoredCodes:
    return StoredCodes(CodeFormat(stored.bits, stored.group_size), lambda: stored)


def lazy(w: torch.Tensor, stored: QuantizedTensor | None = None) -> LazyWeight:
    return LazyWeight(tuple(w.shape), torch.float32, lambda: w, held(stored) if stored else None)


def same(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    return (
        torch.equal(a.codes, b.codes)
        and torch.equal(a.scales, b.scales)
        and (a.bits, a.group_size)
        == (
            b.bits,
            b.group_size,
        )
    )


@quick
@given(seeds, st.integers(1, 5), st.integers(1, 40))
def test_packing_is_inverse(seed: int, rows: int, pairs: int) -> None:
    q = torch.randint(-8, 8, (rows, 2 * pairs), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    packed = pack_int4(q)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, pairs)
    assert torch.equal(unpack_int4(packed), q)
    assert int(packed[0, 0]) == (int(q[0, 0]) & 15) | (int(q[0, 1]) & 15) << 4  # the released order of nibbles


def test_every_byte_survives() -> None:
    every = torch.arange(256, dtype=torch.int16).to(torch.uint8)
    assert torch.equal(pack_int4(unpack_int4(every)), every)


@quick
@given(seeds, magnitudes, st.sampled_from([4, 8]), st.sampled_from([32, 64]), st.integers(1, 3))
def test_equation_6(seed: int, magnitude: float, bits: int, group: int, groups: int) -> None:
    w = random(seed, 5, groups * group) * magnitude
    quantized = quantize_weight(w, bits=bits, group_size=group, scale_dtype=torch.float32)
    per_group = w.view(5, groups, group)
    expected = 2 * per_group.abs().amax(-1) / (2**bits - 1)
    assert torch.equal(quantized.scales, expected)
    q = quantized.unpacked().view(5, groups, group)
    assert int(q.min()) >= -(2 ** (bits - 1))
    assert int(q.max()) <= 2 ** (bits - 1) - 1
    # half a step, and a rounding error of the quotient (values up to 2^(bits-1), relative 2^-24)
    error = (per_group - quantized.dequantize().view_as(per_group)).abs()
    assert bool((error <= expected.unsqueeze(-1) * (0.5 + 2 ** (bits - 22))).all())


@quick
@given(seeds, magnitudes)
def test_half_precision_scales(seed: int, magnitude: float) -> None:
    """Codes are rounded against the scale as stored; a scale that float16 flushes to 0 costs at most 2.3e-7.

    A weight most of whose groups would be flushed is refused: its model would compute zeros.
    """
    w = random(seed, 3, 64).clamp(-1, 1) * magnitude
    largest = w.unflatten(-1, (-1, 32)).abs().amax(-1)
    flushed = (largest * 2 / 15).to(torch.float16) == 0
    if 2 * int((flushed & (largest > 0)).sum()) > int((largest > 0).sum()):
        with pytest.raises(CompileError, match="most of which is too small"):
            quantize_weight(w, bits=4, group_size=32)
        return
    quantized = quantize_weight(w, bits=4, group_size=32)
    assert quantized.scales.dtype == torch.float16
    scale = quantized.scales.float().repeat_interleave(32, -1)
    q = quantized.unpacked().float()
    assert torch.equal(q[scale == 0], torch.zeros_like(q[scale == 0]))
    error = (w - quantized.dequantize()).abs()
    assert bool((error[scale == 0] <= 2.3e-7).all())
    normal = scale > 6.2e-5  # above, a float16 is exact to 2^-11, so |w/s| <= 7.5 * (1 + 2^-11)
    assert bool((error <= scale * (0.5 + 7.5 * 2**-11) + 1e-12)[normal].all())


def test_zero_groups_and_faults() -> None:
    w = torch.zeros(2, 64)
    w[1, 40] = 1.0
    quantized = quantize_weight(w, bits=4, group_size=32)
    assert torch.equal(quantized.dequantize()[0], torch.zeros(64))
    assert float(quantized.dequantize()[1, 40]) == pytest.approx(1.0, rel=0.07)  # clamped at 7 of 7.5 steps
    for bad in (float("nan"), float("inf")):
        w[0, 3] = bad
        with pytest.raises(CompileError, match="not finite"):
            quantize_weight(w, bits=4, group_size=32)
    w[0, 3] = 1e6
    with pytest.raises(CompileError, match=r"magnitude 1e\+06.*float16"):
        quantize_weight(w, bits=4, group_size=32)
    with pytest.raises(ValueError, match="multiple"):
        quantize_weight(torch.zeros(2, 33), bits=4, group_size=32)


def test_pieces_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    w = random(0, 3, 5, 64)
    whole = quantize_weight(w, bits=4, group_size=32)
    dense = whole.dequantize()
    monkeypatch.setattr("moec.compiler.quant._CHUNK", 64)
    assert same(quantize_weight(w, bits=4, group_size=32), whole)
    assert torch.equal(whole.dequantize(), dense)


@quick
@given(seeds, st.sampled_from(["in_out", "out_in"]), st.sampled_from([4, 8]))
def test_stored_codes_are_carried(seed: int, layout: str, bits: int) -> None:
    stored = quantize_weight(random(seed, 3, 64, 96), bits=bits, group_size=32)
    axis = "out" if layout == "in_out" else "in"

    def never() -> torch.Tensor:
        raise AssertionError("stored codes must not be dequantized")

    weight = LazyWeight((3, 64, 96), torch.float32, never, held(stored))
    result = codes_of(weight, WeightScheme(bits, 32, axis), orientation=layout)
    assert result.codes.data_ptr() == stored.codes.data_ptr()
    assert result.scales.data_ptr() == stored.scales.data_ptr()


@pytest.mark.parametrize(
    "scheme", [WeightScheme(8, 32, "out"), WeightScheme(4, 64, "out"), WeightScheme(4, 32, "in")], ids=str
)
def test_another_scheme_is_refused(scheme: WeightScheme) -> None:
    w = random(0, 3, 64, 64)
    weight = lazy(w, quantize_weight(w, bits=4, group_size=32))
    with pytest.raises(CompileError, match=r"^experts: the checkpoint holds INT4 codes in groups of 32 along out"):
        codes_of(weight, scheme, orientation="in_out", name="experts")


@quick
@given(seeds, st.sampled_from([4, 8]))
def test_both_axes_of_float_experts(seed: int, bits: int) -> None:
    w_EKN = random(seed, 2, 64, 96)
    along_out = codes_of(lazy(w_EKN), WeightScheme(bits, 32, "out"), orientation="in_out")
    along_in = codes_of(lazy(w_EKN), WeightScheme(bits, 32, "in"), orientation="in_out")
    assert along_out.shape == (2, 64, 96)
    assert along_in.shape == (2, 96, 64)
    assert along_in.scales.shape == (2, 96, 2)
    step = 2 * w_EKN.abs().amax() / (2**bits - 1)
    bound = float(step) * (0.5 + 2 ** (bits - 1 - 11))  # half a step; the float16 scale is off by up to 2^-11 of |w|
    for dense in (along_out.dequantize(), along_in.dequantize().transpose(1, 2)):
        assert float((dense - w_EKN).abs().max()) <= bound
    linear = codes_of(lazy(w_EKN), WeightScheme(bits, 32, "in"))
    assert same(linear, along_out)


def test_group_size_must_divide() -> None:
    with pytest.raises(CompileError, match=r"w1: 48 features along in are not a multiple of the group size 32"):
        codes_of(lazy(torch.zeros(4, 48)), WeightScheme(4, 32), name="w1")
    with pytest.raises(CompileError, match=r"w1: cannot quantize"):
        codes_of(lazy(torch.full((4, 32), float("nan"))), WeightScheme(4, 32), name="w1")


@quick
@given(seeds, st.sampled_from([1e-30, 1e-3, 1.0, 1e6]))
def test_activation_rows(seed: int, magnitude: float) -> None:
    x = random(seed, 4, 33) * magnitude
    x[2] = 0
    q, scale = quantize_rows(x)
    assert torch.equal(q, q.round())
    assert float(q.abs().max()) == 127
    assert torch.equal(scale[..., 0], x.abs().amax(-1) / 127)
    assert torch.equal(q[2], torch.zeros(33))
    # half a step; the reciprocal form may be off by a rounding at a tie
    assert bool(((fake_quantize_rows(x) - x).abs() <= 0.5001 * scale).all())


@quick
@given(seeds, st.sampled_from([1e-3, 1.0, 1e4]), st.sampled_from([-5.0, 0.0, 0.7, 20.0]))
def test_asymmetric_activation_rows(seed: int, magnitude: float, shift: float) -> None:
    """Zero is exact, codes are INT8, and no value is off by more than one step (half from rounding, half from zero)."""
    x = (random(seed, 4, 33) + shift) * magnitude
    x[1] = 0
    q, scale, zero = asymmetric_rows(x)
    assert torch.equal(q, q.round().clamp(-128, 127))
    assert torch.equal(zero, zero.round().clamp(-128, 127))
    y = fake_quantize_rows_asymmetric(x)
    assert torch.equal(y[1], x[1])
    assert bool(((y - x).abs() <= 1.0001 * scale).all())
    assert torch.equal(fake_quantize_rows_asymmetric(torch.zeros(1, 4)), torch.zeros(1, 4))


@pytest.mark.parametrize(
    ("shape", "orientation", "group_size", "axis", "remedy"),
    [
        ((64, 96), "out_in", 64, "in", "set group_size 32"),
        ((64, 192), "out_in", 128, "in", "set group_size 64"),
        ((64, 48), "out_in", 32, "in", "this role to fp32"),
        ((4, 64, 48), "out_in", 32, "in", "expert_group_axis: out"),
        ((4, 48, 64), "out_in", 32, "out", "expert_group_axis: in"),
        ((4, 48, 80), "out_in", 32, "in", "no group size divides it"),
    ],
)
def test_a_width_that_groups_do_not_divide_names_what_would(
    shape: tuple[int, ...], orientation: Orientation, group_size: int, axis: Literal["in", "out"], remedy: str
) -> None:
    with pytest.raises(CompileError, match="are not a multiple of the group size") as caught:
        check_width(shape, WeightScheme(4, group_size, axis), orientation, "w")
    assert remedy in caught.value.line()
    assert "choose another" not in caught.value.line()


@pytest.mark.parametrize("width", [1, 31, 32, 33, 95, 256])
def test_blocks_of_activations_are_rows_of_their_own(width: int) -> None:
    x = torch.randn(3, 5, width, generator=torch.Generator().manual_seed(width))
    parts = [fake_quantize_rows(part) for part in x.split(32, -1)]
    assert torch.equal(fake_quantize_rows(x, 32), torch.cat(parts, -1))


@quick
@given(seeds, st.sampled_from([1.0, 127.0, 255.0, 32512.0]), magnitudes)
def test_a_quotient_is_rounded_once(seed: int, number: float, size: float) -> None:
    """As in C; `number / tensor` would be number * (1 / tensor), an ulp off for one value in four."""
    x = size * random(seed, 400).abs() + 1e-12
    assert np.array_equal(quotient(number, x).numpy(), np.float32(number) / x.numpy())


def test_a_value_in_the_middle_of_two_codes_is_rounded_as_kernels_round_it() -> None:
    """A row of a test that failed by chance: 127 / max is an ulp larger than 127 * (1 / max), and 40.5 even then."""
    largest = 0.006844958756119013
    inverse = np.float32(127) / np.float32(largest)
    assert inverse != np.float32(127) * (np.float32(1) / np.float32(largest))
    x = np.random.default_rng(0).uniform(-largest, largest, 100_000).astype(np.float32)
    x[0] = largest
    q, _ = quantize_rows(torch.from_numpy(x))
    assert np.array_equal(q.numpy(), np.rint(x * inverse))
