"""The shapes of a sweep at equal active parameters, its options, and the arithmetic of its intervals."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from scipy import stats

from moec.compiler.errors import UserError
from moec.compiler.roles import Role
from moec.compiler.spec import load_spec
from moec.sources.decoder.config import DecoderConfig
from moec.sources.decoder.layout import weight_layout
from moec.training.sweep.asking import budget_of, grid_of
from moec.training.sweep.effects import Blocks, Observation, effects
from moec.training.sweep.grid import Grid, Point, of_spec, points, scaled
from tests.training.small import DENSE, MOE, PRETRAIN, config_of, spec_of

WIDE: dict[str, Any] = MOE | {  # E = 4, g = 4, shared
    "moe": {"experts": 14, "top_k": 2, "expert_width": 64, "shared_width": 128, "scale": 1.5}
}


def grid(**changes: Any) -> Grid:
    return Grid(
        **{"experts": (1, 2, 8), "granularity": (2, 4, 8), "shared": (False, True), "d_model": (64,), "tokens": (1000,)}
        | changes
    )


def active(config: DecoderConfig) -> float:
    """Parameters of one token outside of the tables, from the table of weights."""
    total = 0.0
    for info in weight_layout(config).values():
        if info.role in (Role.EMBEDDING, Role.HEAD) or not info.counted:
            continue
        share = config.moe.top_k / config.moe.experts if info.role is Role.EXPERT and config.moe else 1.0
        total += info.numel * share
    return total


def test_active_parameters_are_equal() -> None:
    """Within the tolerance, by another count, at random shapes; widths are multiples; the router is in the count."""
    source = random.Random(3)
    for _ in range(30):
        model = config_of(
            WIDE | {"d_model": 32 * source.randint(1, 6), "layers": source.randint(1, 5)},
            moe=WIDE["moe"] | {"expert_width": 16 * source.randint(2, 20), "shared_width": 16 * source.randint(2, 40)},
        )
        tolerance, multiple = source.choice((0.005, 0.02, 0.1)), source.choice((1, 2, 8))
        asked = grid(d_model=(model.d_model,), experts=(1, 2, 3, 8, 16), granularity=(2, 4, 6))
        found, left = points(model, asked, tolerance=tolerance, multiple=multiple)
        assert found
        assert len(found) + len(left) == 1 + 4 * 6
        for point in found:
            assert abs(active(point.config) / active(model) - 1) <= tolerance
            assert point.deviation == pytest.approx(active(point.config) / active(model) - 1)
            assert point.body == round(active(point.config))
            if (moe := point.config.moe) is None:
                assert point.config.ffn_width is not None
                assert point.config.ffn_width % multiple == 0
                continue
            slots = point.granularity // 2 if point.shared else point.granularity
            assert (moe.top_k, moe.experts) == (slots, (point.experts - 1) * point.granularity + slots)
            assert moe.expert_width % multiple == 0 == moe.shared_width % multiple
            assert (moe.shared_width > 0) == point.shared
            assert point.router == model.layers * model.d_model * moe.experts
            assert moe.scale / moe.top_k == pytest.approx(1.5 / 2)  # each chosen expert weighs what it does in the spec
            assert of_spec(point.config)[0] == pytest.approx(point.experts, rel=0.5)


def test_what_is_left_out_says_why() -> None:
    def reasons(model: dict[str, Any], **changes: Any) -> dict[tuple[int, int, bool], str]:
        _, left = points(config_of(model), grid(**changes), multiple=8)
        return {(out.experts, out.granularity, out.shared): out.reason for out in left}

    found = reasons(WIDE, granularity=(1, 2, 3, 4), experts=(1, 2))
    assert "would learn nothing" in found[2, 1, False]
    assert "would learn nothing" in found[2, 2, True]
    assert "half of the chosen slots, and their number is odd" in found[2, 1, True]
    assert "odd" in found[2, 3, True]
    assert (2, 4, False) not in found
    # an unnormalised weight tells the router something
    free = WIDE | {"moe": WIDE["moe"] | {"normalize": False}}
    assert (2, 1, False) not in reasons(free, granularity=(1, 4), experts=(2,))
    fine = reasons(WIDE, granularity=(4, 64), experts=(2, 100))
    assert "wide, widths are multiples of 8" in fine[2, 64, False]
    assert "at most 4096" in fine[100, 64, False]
    assert "the tolerance is 2.0%" in reasons(WIDE, granularity=(4, 8), experts=(2, 32))[32, 8, False]
    with pytest.raises(UserError, match="none of 1 shapes can be had; d_model 64: E=2, g=1"):
        points(config_of(WIDE), grid(experts=(2,), granularity=(1,), shared=(False,)))


def test_sizes_keep_the_spec_s_proportions() -> None:
    model = config_of(WIDE)
    half = scaled(model, 32)
    assert (half.heads, half.kv_heads, half.layers) == (2, 1, 2)
    assert half.moe is not None
    assert (half.moe.expert_width, half.moe.shared_width, half.moe.experts) == (32, 64, 14)
    with pytest.raises(UserError, match=r"have 3 heads and 1\.5 KV heads .*; choose multiples of 32"):
        scaled(model, 48)
    dense = config_of(DENSE, d_model=64)
    assert scaled(dense, 32).ffn_width == 48
    found, _ = points(dense, grid(experts=(1, 4), granularity=(4,), shared=(False,)), multiple=1)
    assert [p.block for p in found] == ["dense", "E=4, g=4"]
    assert found[1].config.moe is not None
    assert found[1].config.moe.scale == 4  # each of the four as the dense block's neurons: with weight 1


def test_the_shipped_spec_has_the_shapes_of_the_page() -> None:
    spec = load_spec("specs/sweeps/small.yaml")
    assert isinstance(spec.model, DecoderConfig)
    assert of_spec(spec.model) == (4.0, 8.0, True)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("2M", (2_000_000, None)),
        ("500k,55min", (500_000, 3300.0)),
        ("1.5h, 2e6", (2_000_000, 5400.0)),
        ("90s", (None, 90.0)),
        (None, (None, None)),
    ],
)
def test_budgets(text: str | None, found: tuple[int | None, float | None]) -> None:
    assert budget_of(text) == found


@pytest.mark.parametrize("text", ["2m", "", "2M,3M", "5min,6min", "-1", "1e99", "0s", "0", "M", "2 M", "٣M", "nan"])
def test_no_budgets(text: str) -> None:
    with pytest.raises(UserError, match="--budget"):
        budget_of(text)


def asked(vary: str, tokens: int | None = 1000, model: dict[str, Any] = WIDE, **values: str) -> Grid:
    return grid_of(spec_of(PRETRAIN, model=model), vary, values, tokens)


def test_grids() -> None:
    own = asked("shared")
    assert (own.experts, own.granularity, own.shared, own.d_model, own.tokens) == (
        (4,), (4,), (False, True), (64,), (1000,)
    )  # fmt: skip
    many = grid_of(
        spec_of(PRETRAIN, model=WIDE),
        "experts, d-model,tokens",
        {"experts": "1,16", "d_model": "32,64", "tokens": "1k,2.5k"},
        None,
    )
    assert (many.experts, many.d_model, many.tokens, many.shared) == ((1, 16), (32, 64), (1000, 2500), (True,))


@pytest.mark.parametrize(
    ("vary", "values", "message"),
    [
        ("expert", {}, "--vary: 'expert' is no factor; did you mean 'experts'"),
        ("", {}, "--vary: '' is no factor"),
        ("experts", {"experts": "4"}, "--experts: experts varies and has 1 values"),
        ("experts", {"experts": "4,4"}, "--experts: names a value twice"),
        ("experts", {"experts": "4,0"}, "--experts: '0' is no number from 1 up"),
        ("experts", {"experts": "4,99999999"}, "no number from 1 up"),
        ("experts", {"granularity": "2,4"}, "--granularity: 2 values, and --vary does not name granularity"),
        ("shared", {"shared": "yes"}, "--shared: 'yes' is neither on nor off"),
        ("tokens", {}, "--tokens: tokens varies and has 1 values"),
        ("d_model", {}, "--d-model: d_model varies and has 1 values"),
        ("shared", {"tokens": "2M"}, "--tokens and tokens in --budget are given"),
        ("experts", {"experts": ",".join(map(str, range(1, 80)))}, "79 values, at most 64"),
    ],
)
def test_wrong_factors(vary: str, values: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message) as fault:
        grid_of(spec_of(PRETRAIN, model=WIDE), vary, values, 1000)
    assert "\n" not in str(fault.value)


def test_a_spec_between_whole_numbers_needs_them() -> None:
    with pytest.raises(UserError, match=r"own model has experts 4.5, which is no whole number; give --experts NUMBER"):
        asked("shared", model=WIDE | {"moe": WIDE["moe"] | {"experts": 16}})


# --- intervals --------------------------------------------------------------------------------------------------------


def shapes(**changes: Any) -> list[Point]:
    found, _ = points(config_of(WIDE), grid(**changes), tolerance=0.2, multiple=1)
    return list(found)


def losses(found: list[Point], seeds: int, random_: np.random.Generator, **shift: float) -> list[Observation]:
    """Noise of 0.01 beside differences between seeds of 0.3; `shift` is added to points with a shared expert."""
    of_seed = random_.normal(0, 0.3, seeds)
    return [
        Observation(
            p.name, s, f"{p.cell}-s{s}", 3 + of_seed[s] + random_.normal(0, 0.01) + p.shared * shift.get("shared", 0)
        )
        for s in range(seeds)
        for p in found
    ]


def test_two_points_are_the_paired_t_test() -> None:
    found = shapes(experts=(4,), granularity=(4,))
    seen = losses(found, 5, np.random.default_rng(1))
    (effect,) = effects(found, seen)
    with_it, without = ([o.loss for o in seen if o.point == p.name] for p in reversed(found))
    paired = stats.ttest_rel(with_it, without)
    expected = paired.confidence_interval(0.95)
    assert (effect.before, effect.after) == (False, True)
    assert effect.difference == pytest.approx(np.mean(with_it) - np.mean(without))
    assert (effect.low, effect.high) == (pytest.approx(expected.low), pytest.approx(expected.high))
    assert effect.separable == (paired.pvalue < 0.05)
    assert (effect.low_alone, effect.high_alone) == (pytest.approx(expected.low), pytest.approx(expected.high))


def test_many_points_are_the_randomised_block_design() -> None:
    """Balanced: the textbook's sums of squares, and Bonferroni over the three pairs of E."""
    found = shapes(experts=(2, 4, 8), granularity=(4, 8))
    seen = losses(found, 4, np.random.default_rng(2))
    table = np.array([[o.loss for o in seen if o.point == p.name] for p in found])
    residual = table - table.mean(1, keepdims=True) - table.mean(0, keepdims=True) + table.mean()
    degrees = (len(found) - 1) * 3
    deviation = (np.square(residual).sum() / degrees) ** 0.5
    fitted = Blocks(seen)
    assert (fitted.degrees, fitted.deviation) == (degrees, pytest.approx(deviation))
    by_factor = {(e.factor, e.before, e.after): e for e in effects(found, seen)}
    assert len(by_factor) == 3 + 1 + 1
    effect = by_factor["experts", 2, 8]
    rows = {value: [i for i, p in enumerate(found) if p.experts == value] for value in (2, 8)}
    assert effect.pairs == 4
    assert effect.difference == pytest.approx(table[rows[8]].mean() - table[rows[2]].mean())
    reach = stats.t.ppf(1 - 0.05 / 2 / 3, degrees) * deviation * (2 / (4 * 4)) ** 0.5
    assert effect.high == pytest.approx(effect.difference + reach)
    assert effect.low == pytest.approx(effect.difference - reach)
    alone = stats.ttest_1samp(table[rows[8]].mean(0) - table[rows[2]].mean(0), 0).confidence_interval(1 - 0.05 / 3)
    assert (effect.low_alone, effect.high_alone) == (pytest.approx(alone.low), pytest.approx(alone.high))


def test_runs_that_are_missing() -> None:
    """A point without one seed: the normal equations of coded variables say the same as the pseudo-inverse."""
    found = shapes(experts=(1, 4), granularity=(4, 8))
    seen = losses(found, 3, np.random.default_rng(3))
    del seen[4]
    names, blocks = [p.name for p in found], sorted({o.block for o in seen})
    design = np.array([[o.point == n for n in names] + [o.block == b for b in blocks[1:]] for o in seen], np.float64)
    inverse = np.linalg.inv(design.T @ design)
    means = inverse @ design.T @ np.array([o.loss for o in seen])
    squares = float(np.square(np.array([o.loss for o in seen]) - design @ means).sum())
    degrees = len(seen) - design.shape[1]
    weights = np.array([-1.0, *([1 / (len(found) - 1)] * (len(found) - 1)), *([0.0] * (len(blocks) - 1))])
    error = (squares / degrees * weights @ inverse @ weights) ** 0.5
    effect = next(e for e in effects(found, seen) if e.factor == "experts")
    assert effect.difference == pytest.approx(weights @ means)
    assert effect.high is not None
    assert effect.high - effect.difference == pytest.approx(stats.t.ppf(0.975, degrees) * error)
    assert len(effect.by_seed) == 2  # the seed that lacks a point has no difference of all pairs


def test_intervals_hold_what_they_promise() -> None:
    """Where nothing differs, one factor in twenty is called separable: 300 sweeps, within four standard errors."""
    random_, found = np.random.default_rng(4), shapes(experts=(2, 4, 8), granularity=(4,))
    wrong = sum(
        any(e.separable for e in effects(found, losses(found, 3, random_)) if e.factor == "experts") for _ in range(300)
    )
    assert wrong <= 300 * 0.05 + 4 * (300 * 0.05 * 0.95) ** 0.5
    assert wrong > 0  # an interval that never excludes zero would say nothing
    seen = losses(found, 3, random_, shared=-0.05)
    by_factor = {e.factor: e for e in effects(found, seen)}
    assert by_factor["shared"].separable
    assert by_factor["shared"].high is not None
    assert by_factor["shared"].high < 0


def test_what_cannot_be_said() -> None:
    found = shapes(experts=(4,), granularity=(4,))
    (one,) = effects(found, losses(found, 1, np.random.default_rng(5)))
    assert (one.low, one.high, one.separable) == (None, None, False)
    # other seeds at each point: no block connects them
    apart = [Observation(p.name, i, f"{p.cell}-s{i}", 3.0) for i, p in enumerate(found)]
    assert effects(found, apart) == ()
    # sizes are not compared with each other, and the dense point has no granularity
    sizes = shapes(experts=(1, 4), granularity=(4, 8), shared=(False,), d_model=(64, 128))
    compared = effects(sizes, losses(sizes, 2, np.random.default_rng(6)))
    assert [(e.factor, e.before, e.after, e.pairs) for e in compared] == [
        ("experts", 1, 4, 4), ("granularity", 4, 8, 2)
    ]  # fmt: skip
