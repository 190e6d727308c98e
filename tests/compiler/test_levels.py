"""Grids of codes: the nearest value, and codes that number the levels of a table."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.compiler.artifact import CodesEntry
from moec.compiler.errors import CompileError
from moec.compiler.levels import LEVELS, Grid
from moec.compiler.quant import QuantizedTensor, packed_codes, quantize_weight, unpacked_codes, widened
from moec.compiler.quantizer import find_quantizer
from moec.compiler.spec.quantization import WeightScheme
from moec.compiler.weights import CodeFormat

GRIDS = [Grid(4, name) for name in LEVELS] + [Grid(bits) for bits in (4, 8)]


def values_of(grid: Grid) -> torch.Tensor:
    levels = LEVELS[grid.levels] if grid.levels else range(grid.low, grid.high + 1)
    return torch.tensor(sorted(set(levels)), dtype=torch.float32)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31 - 1), st.sampled_from(GRIDS), st.sampled_from([0.1, 1.0, 60.0]))
def test_nearest(seed: int, grid: Grid, size: float) -> None:
    """No value of the grid is nearer, for numbers within it and beyond; the argument is changed in place."""
    x = size * torch.randn(300, generator=torch.Generator().manual_seed(seed))
    x[:4] = torch.tensor([grid.low, grid.high, 3.0 * grid.low, 3.0 * grid.high])
    found = grid.nearest_(y := x.clone())
    assert found is y
    values = values_of(grid)
    assert set(found.unique().tolist()) <= set(values.tolist())
    torch.testing.assert_close((found - x).abs(), (x.unsqueeze(-1) - values).abs().amin(-1), rtol=0, atol=1e-5)
    assert torch.equal(grid.nearest_(found.clone()), found)


def test_a_strided_tensor_is_changed_as_a_contiguous_one() -> None:
    for grid in GRIDS:
        x = 50 * torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
        assert torch.equal(grid.nearest_(x.clone().t()).t(), grid.nearest_(x.clone()))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_value_has_a_code(grid: Grid) -> None:
    values = values_of(grid).to(torch.int8)
    values = torch.cat([values, values[: len(values) % 2]]).view(2, -1)
    values = torch.cat([values, values], -1)  # an even row
    codes = packed_codes(values, grid)
    assert codes.shape[-1] == values.shape[-1] // (2 if grid.bits == 4 else 1)
    assert torch.equal(unpacked_codes(codes, grid), values)


@pytest.mark.parametrize("name", LEVELS)
def test_a_code_numbers_its_level(name: str) -> None:
    """Element 2i in the low nibble; FP4's two zeros both mean 0."""
    codes = torch.tensor([[low | high << 4 for low, high in zip(range(16), range(15, -1, -1), strict=True)]])
    tensor = QuantizedTensor(codes.to(torch.uint8), torch.ones(1, 1), 4, 32, levels=name)
    assert tensor.shape == (1, 32)
    levels = LEVELS[name]  # those of 8 are numbered by three bits
    wanted = [levels[n % len(levels)] for pair in zip(range(16), range(15, -1, -1), strict=True) for n in pair]
    assert tensor.unpacked().tolist() == [wanted]
    assert tensor.dequantize().tolist() == [[float(v) for v in wanted]]
    wide = widened(tensor, Grid(8), 32)
    assert (wide.bits, wide.levels, wide.codes.dtype) == (8, "", torch.int8)
    assert torch.equal(wide.dequantize(), tensor.dequantize())


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_largest_magnitude_is_within_reach(name: str, sign: float) -> None:
    """By the largest magnitude: it has the largest level, or the last of the other sign; scales are 2^-11 off."""
    w = 0.1 * torch.randn(4, 64, generator=torch.Generator().manual_seed(2))
    w[:, 5] = w[:, 40] = sign
    error = (quantize_weight(w, bits=4, group_size=32, levels=name).dequantize() - w).abs()
    grid = Grid(4, name)
    widest = float((values_of(grid).diff()).max()) / -grid.low
    assert float(error.max()) <= max(widest / 2, 1 + grid.high / grid.low) + 2**-10


@pytest.mark.parametrize(("bits", "levels"), [(8, "fp4"), (4, "nf4"), (3, "iq4_nl")])
def test_what_is_no_grid(bits: int, levels: str) -> None:
    with pytest.raises(ValueError, match="no levels"):
        Grid(bits, levels)


def test_which_format_holds_which() -> None:
    """INT8 has every level; whole numbers of four bits and the tables do not hold each other."""
    int4, int8, nl, fp4, nl3 = (
        CodeFormat(4, 32),
        CodeFormat(8, 32),
        CodeFormat(4, 64, levels="iq4_nl"),
        CodeFormat(4, 32, levels="fp4"),
        CodeFormat(4, 32, levels="nl3"),
    )
    assert int8.holds(int4)
    assert int8.holds(nl)
    assert int8.holds(fp4)
    for one in (int4, nl, fp4, nl3):
        assert one.holds(one)
        assert not any(one.holds(other) for other in (int4, int8, nl, fp4, nl3) if other is not one)
    assert CodeFormat(4, 32, levels="iq4_nl").holds(nl)
    assert not nl.holds(CodeFormat(4, 32, levels="iq4_nl"))
    assert str(nl) == "IQ4_NL codes in groups of 64"


@pytest.mark.parametrize("method", ["rtn", "signed", "search"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_weights_whose_scales_vanish_are_refused(method: str, grid: Grid) -> None:
    """float16 scales below 3e-8 are zero: most of the weight would be."""
    w = 1e-7 / -grid.low * torch.randn(4, 64, generator=torch.Generator().manual_seed(3))
    with pytest.raises(CompileError, match="8 of 8 groups would become zero"):
        find_quantizer(method).quantize(w, WeightScheme(grid.bits, 32, "in", grid.levels), None)


def test_a_manifest_has_levels_only_where_there_are_some() -> None:
    """Earlier versions read manifests without."""
    given = {"role": "expert", "weights": 2, "bits": 4, "group_size": 32, "group_axis": "in", "origin": "computed: rtn"}
    plain, nl = CodesEntry.model_validate(given), CodesEntry.model_validate({**given, "levels": "iq4_nl"})
    assert "levels" not in plain.model_dump()
    assert "levels" not in plain.model_dump_json()
    assert CodesEntry.model_validate_json(nl.model_dump_json()) == nl
    assert nl.model_dump()["levels"] == "iq4_nl"
