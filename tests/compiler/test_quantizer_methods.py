"""Our methods against what defines them: least errors, a plain form of GPTQ, and each other."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moec.compiler.error_feedback import damped, descended, inverse_factor, refitted, with_feedback
from moec.compiler.levels import LEVELS, Grid
from moec.compiler.quant import QuantizedTensor
from moec.compiler.quantizer import Inputs, Moments, find_quantizer
from moec.compiler.spec.methods import own_methods
from moec.compiler.spec.quantization import Axis, WeightScheme

quick = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**31 - 1)
METHODS = own_methods()
INT4 = Grid(4)
GRIDS = [INT4, Grid(8), Grid(4, "iq4_nl"), Grid(4, "fp4"), Grid(4, "nl3")]


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated(seed: int, tokens: int, width: int) -> Tensor:
    """Inputs of few directions and of unequal size, as those of a trained model are."""
    mixed = random(seed, tokens, width // 4) @ random(seed + 1, width // 4, width)
    order = torch.randperm(width, generator=torch.Generator().manual_seed(seed + 3))
    return (mixed + 0.3 * random(seed + 2, tokens, width)) * torch.logspace(-1, 1, width)[order]


def moments(x_TK: Tensor) -> Moments:
    seen = Moments(x_TK.shape[1])
    seen.add(x_TK)
    return seen


def quantized(method: str, w_NK: Tensor, x_TK: Tensor | None, grid: Grid = INT4, axis: Axis = "in") -> QuantizedTensor:
    inputs = None if x_TK is None else moments(x_TK)
    scheme = WeightScheme(grid.bits, 32, axis, grid.levels)
    return find_quantizer(method).quantize(w_NK if axis == "in" else w_NK.t(), scheme, inputs)


def steps(grid: Grid) -> list[int]:
    """The values of a grid in order."""
    return sorted(set(LEVELS[grid.levels])) if grid.levels else list(range(grid.low, grid.high + 1))


def value(tensor: QuantizedTensor, axis: Axis = "in") -> Tensor:
    return tensor.dequantize() if axis == "in" else tensor.dequantize().t()


def product_error(w_NK: Tensor, tensor: QuantizedTensor, x_TK: Tensor, axis: Axis = "in") -> float:
    return float(((value(tensor, axis) - w_NK) @ x_TK.t()).square().mean())


@quick
@given(
    seeds, st.sampled_from(METHODS), st.sampled_from([*GRIDS, *map(Grid, (2, 3, 5, 6))]), st.sampled_from(["in", "out"])
)
def test_every_method_gives_codes_of_the_format(seed: int, method: str, grid: Grid, axis: Axis) -> None:
    """In range, of the shapes that `QuantizedTensor` says, and no further from the weight than a step of rtn."""
    w_NK, x_TK = random(seed, 64, 96), random(seed + 1, 200, 96)
    w_NK[:32, :32] = 0.0
    tensor = quantized(method, w_NK, x_TK, grid, axis)
    q = tensor.unpacked()
    assert tensor.shape == ((64, 96) if axis == "in" else (96, 64))
    assert tensor.grid == grid
    assert set(q.unique().tolist()) <= set(steps(grid))
    assert tensor.scales.dtype == torch.float16
    assert torch.isfinite(tensor.scales).all()
    assert not value(tensor, axis)[:32, :32].any(), "groups of zeros stay zero"
    # feedback moves a code by some steps where inputs go together; these inputs are independent
    assert float((value(tensor, axis) - w_NK).abs().mean()) < float(w_NK.abs().max()) * 2.0 ** (1 - grid.bits)


@quick
@given(seeds, st.sampled_from([*GRIDS, Grid(3)]))
def test_signed_uses_the_whole_range(seed: int, grid: Grid) -> None:
    """The largest element of each group has the least value, and is off by the rounding of its scale (2^-11) only."""
    w = random(seed, 5, 64)
    tensor = quantized("signed", w, None, grid)
    grouped, q = w.unflatten(-1, (-1, 32)), tensor.unpacked().unflatten(-1, (-1, 32))
    at = grouped.abs().argmax(-1, keepdim=True)
    assert (q.gather(-1, at) == grid.low).all()
    torch.testing.assert_close(
        value(tensor).unflatten(-1, (-1, 32)).gather(-1, at), grouped.gather(-1, at), rtol=2**-11, atol=0
    )


@quick
@given(seeds, st.sampled_from([g for g in GRIDS if g.bits == 4]))
def test_search_has_the_least_squared_error(seed: int, grid: Grid) -> None:
    """No more than 2% above what a fine grid of scales finds: candidates are 4% apart, and refined once."""
    w = random(seed, 24, 32)
    found = (value(quantized("search", w, None, grid)) - w).square().sum(-1)
    values = torch.tensor(steps(grid), dtype=torch.float32)
    best = torch.full((24,), torch.inf)
    for s in torch.linspace(0.4, 1.4, 401):
        for sign in (1.0, -1.0):
            scale = (sign * s * w.abs().amax(-1, keepdim=True) / grid.low).half().float()
            nearest = values[(w / scale).unsqueeze(-1).sub(values).abs().argmin(-1)]
            best = torch.minimum(best, (nearest * scale - w).square().sum(-1))
    assert float(found.sum()) <= 1.02 * float(best.sum())
    for other in ("rtn", "signed"):
        # scales are rounded to float16 after the search: 2^-11 of the values
        assert (found <= (value(quantized(other, w, None, grid)) - w).square().sum(-1) * 1.01).all()


@quick
@given(seeds)
def test_errors_fall_from_method_to_method(seed: int) -> None:
    """On inputs of few directions, each method's product is nearer than that of the one before."""
    torch.manual_seed(seed)
    w, x = random(seed, 48, 96), correlated(seed, 400, 96)
    errors = [product_error(w, quantized(m, w, x), x) for m in ("rtn", "weighted", "gptq")]
    assert errors[1] < errors[0]
    assert errors[2] < 0.7 * errors[1]


def test_weighted_without_inputs_is_search() -> None:
    w = random(0, 8, 64)
    plain = quantized("search", w, None)
    for method in ("weighted", "gptq", "awq", "awq_gptq"):
        tensor = quantized(method, w, None)
        assert torch.equal(tensor.codes, plain.codes)
        assert torch.equal(tensor.scales, plain.scales)


@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_gptq_against_its_plain_form(axis: Axis, grid: Grid) -> None:
    """One column after the other, the inverse of what is left computed anew (float64): GPTQ without any algebra.

    Another order of sums may turn a code where a value lies between two: under 1 in 200 of them.
    """
    w, x = random(3, 32, 160), correlated(3, 500, 160)
    first = quantized("search", w, None, grid, axis)
    scales = first.scales.float().repeat_interleave(32, -1)
    s_NK = (scales if axis == "in" else scales.t()).double()
    h = (x.t() @ x).double() / len(x)
    h.diagonal().add_((0.01 + 0.1 * 160 / 500) * h.diagonal().mean())
    left, codes = w.double().clone(), torch.empty(w.shape)
    values = torch.tensor(steps(grid), dtype=torch.float64)
    for k in range(160):
        q = values[(left[:, k] / s_NK[:, k]).unsqueeze(-1).sub(values).abs().argmin(-1)]
        codes[:, k] = q
        inverse = torch.linalg.inv(h[k:, k:])
        error = (left[:, k] - q * s_NK[:, k]) / inverse[0, 0]
        left[:, k:] -= error.unsqueeze(-1) * inverse[0]
    ours = with_feedback(w, s_NK.float(), grid, inverse_factor(moments(x)))
    assert float((ours != codes).float().mean()) < 0.005
    tensor = quantized("gptq", w, x, grid, axis)
    plain = quantized("search", w, None, grid, axis)
    assert product_error(w, tensor, x, axis) < 0.7 * product_error(w, plain, x, axis)


def h_error(w: Tensor, q: Tensor, s_NK: Tensor, h: Tensor) -> float:
    delta = (w - q.float() * s_NK).double()
    return float(((delta @ h.double()) * delta).sum())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_codes_and_scales_are_the_best_beside_all_others(grid: Grid) -> None:
    """After enough descents no single code can be moved for less error, and no scale; each step is no worse.

    float32 decides between two values that are alike to 1e-5: so much may the error differ.
    """
    w, x = random(5, 24, 96), correlated(5, 700, 96)
    h = damped(moments(x))
    scales = quantized("search", w, None, grid).scales.float()
    values = torch.tensor(steps(grid), dtype=torch.int8)
    spread = scales.repeat_interleave(32, -1)
    q = with_feedback(w, spread, grid, inverse_factor(moments(x)))
    errors = [h_error(w, q, spread, h)]
    for _ in range(20):
        q = descended(w, q, spread, grid, h)
        errors.append(h_error(w, q, spread, h))
    assert all(b <= a * (1 + 1e-5) for a, b in pairwise(errors))
    assert errors[1] < 0.97 * errors[0]
    for k in range(96):
        for step in (-1, 1):
            moved = q.clone()
            place = torch.searchsorted(values, moved[:, k].contiguous()) + step
            moved[:, k] = values[place.clamp(0, len(values) - 1)]
            assert h_error(w, moved, spread, h) >= errors[-1] * (1 - 1e-5)
    fitted = refitted(w, q, scales, h)
    best = h_error(w, q, fitted.repeat_interleave(32, -1), h)
    assert best < errors[-1]
    for group in range(3):
        for factor in (0.999, 1.001):
            other = fitted.clone()
            other[:, group] *= factor
            assert h_error(w, q, other.repeat_interleave(32, -1), h) > best * (1 - 1e-6)


def test_a_group_without_codes_keeps_its_scale() -> None:
    w, x = random(6, 4, 64), correlated(6, 300, 64)
    scales = quantized("search", w, None).scales.float()
    q = torch.randint(-8, 8, (4, 64), generator=torch.Generator().manual_seed(1)).to(torch.int8)
    q[2, 32:] = 0
    fitted = refitted(w, q, scales, damped(moments(x)))
    assert fitted[2, 1] == scales[2, 1]
    assert torch.isfinite(fitted).all()


@pytest.mark.parametrize("tokens", [1, 2, 31])
def test_gptq_with_fewer_tokens_than_inputs(tokens: int) -> None:
    """H has no full rank then; the diagonal that is added keeps codes in range and the weight near."""
    w, x = random(0, 16, 64), correlated(0, tokens, 64)
    tensor = quantized("gptq", w, x)
    assert float((value(tensor) - w).square().mean()) < 4 * float(
        (value(quantized("rtn", w, None)) - w).square().mean()
    )


def test_an_expert_that_sees_zeros_is_searched() -> None:
    w = random(0, 4, 32)
    assert torch.equal(quantized("gptq", w, torch.zeros(5, 32)).codes, quantized("search", w, None).codes)


def test_what_was_seen_of_divided_inputs() -> None:
    x, factors = random(1, 50, 32), torch.rand(32) + 0.5
    for kind in (Inputs, Moments):
        seen, direct = kind(32), kind(32)
        seen.add(x)
        direct.add(x / factors)
        divided = seen.divided(factors)
        torch.testing.assert_close(divided.energy_K, direct.energy_K)
        assert divided.tokens == 50
        if isinstance(divided, Moments) and isinstance(direct, Moments):
            torch.testing.assert_close(divided.moments_KK, direct.moments_KK, rtol=1e-4, atol=1e-4)
