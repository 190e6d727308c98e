"""The law's check values, the published choices that a search must reproduce, and what it warns of."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moec.analysis.plan.devices import load_device
from moec.analysis.plan.scaling_law import PUBLISHED, Law, effective_experts, law_text, load_law, training_flops
from moec.analysis.plan.search import EXPERTS, Costs, Found, Limits, choose, costs, search, shape, shapes
from moec.analysis.plan.searched import spec_text
from moec.compiler.errors import UserError
from moec.compiler.footprint import Footprint
from moec.compiler.spec import load_spec, parse_spec
from moec.compiler.spec.device import Device
from moec.compiler.spec.targets import options_class
from moec.compiler.target import find_target
from moec.sources.decoder.config import DecoderConfig
from moec.sources.decoder.layout import parameter_counts
from tests.conftest import Moec

SPECS = Path(__file__).parents[3] / "specs"

# N (B), D (B), and the loss for E = 1, 2, 4, 8, 16, 32: the check values of the published coefficients, as printed.
CHECKS = [
    (0.272, 500.0, (2.400, 2.364, 2.3535, 2.3534, 2.357, 2.362), (3, 3, 4, 4, 3, 3)),
    (0.922, 500.0, (2.299, 2.269, 2.263, 2.269, 2.278, 2.287), (3, 3, 3, 3, 3, 3)),
]


def on(device: str) -> tuple[Device, Footprint, Any]:
    chosen = load_device(device)
    footprint = find_target(chosen.backend).footprint()
    assert footprint is not None
    return chosen, footprint, options_class(chosen.backend)()


@cache
def costs_on(device: str) -> Costs:
    """Of every shape: seconds of work, which no limit but the context changes."""
    return costs(*on(device), 8192)


def limits_of(device: str, limits: dict[str, float]) -> Limits:
    return Limits(**{"memory": load_device(device).budget, "context": 8192, **limits})  # type: ignore[arg-type]


def found(device: str = "galaxy-s25", *, law: Law = PUBLISHED, extrapolate: bool = False, **limits: float) -> Found:
    return choose(costs_on(device), limits_of(device, limits), law=law, extrapolate=extrapolate)


@pytest.mark.parametrize(("n", "d", "losses", "digits"), CHECKS)
def test_check_values(n: float, d: float, losses: tuple[float, ...], digits: tuple[int, ...]) -> None:
    assert tuple(round(PUBLISHED.loss(n, d, e), k) for e, k in zip(EXPERTS, digits, strict=True)) == losses


def test_effective_experts() -> None:
    assert effective_experts(1) == pytest.approx(1.0)
    assert [effective_experts(e) < effective_experts(2 * e) < 32 for e in (1, 2, 8, 1000)] == [True] * 4
    with pytest.raises(ValueError, match="experts"):
        effective_experts(0.5)


@given(st.floats(0.28, 0.9), st.floats(100, 400), st.sampled_from(EXPERTS))
def test_more_parameters_and_tokens_help_within_the_range(n: float, d: float, e: int) -> None:
    assert PUBLISHED.loss(n * 1.02, d, e) < PUBLISHED.loss(n, d, e)
    assert PUBLISHED.loss(n, d * 1.2, e) < PUBLISHED.loss(n, d, e)


def test_eight_experts_at_three_tenths_of_a_billion() -> None:
    """The published choice for S: E = 8 at N = 0.272 B (nominally 0.3)."""
    assert min(EXPERTS, key=lambda e: PUBLISHED.loss(0.272, 500, e)) == 8
    assert min(EXPERTS, key=lambda e: PUBLISHED.loss(0.3, 300, e)) == 8


def test_the_search_finds_mobilemoe_s() -> None:
    """Bounded to 0.273 B active parameters it comes to the very shape of MobileMoE-S."""
    result = search(*on("galaxy-s25"), limits_of("galaxy-s25", {"active": 0.273e9}))
    assert result == found(active=0.273e9), "costs that are known already change nothing"
    best = result.best
    published = load_spec(SPECS / "models" / "mobilemoe-s.yaml").model
    assert isinstance(published, DecoderConfig)
    assert (best.experts, best.granularity, best.shared) == (8, 8, True)
    same = ("layers", "d_model", "heads", "kv_heads", "head_dim", "vocab_size", "tied_embeddings")
    assert all(getattr(best.config, key) == getattr(published, key) for key in same)
    assert best.config.moe == published.moe
    assert (best.total, best.active) == (1_263_373_056, 272_468_736)


def test_the_search_finds_mobilemoe_l_under_training_compute() -> None:
    """With the training operations of 0.3 B parameters over 500 B tokens, the largest size of the law wants E = 8."""
    best = found(train_flops=training_flops(0.3e9, 500e9), tokens=1e13).best
    assert (best.total, best.active) == (5_325_702_400, 921_683_200)


def test_mixtures_lead_above_a_quarter_gigabyte() -> None:
    """At equal training compute, of shapes in the fitted range: a mixture from 0.25 GB of weights up, dense below."""
    rows = found(train_flops=training_flops(0.3e9, 500e9), tokens=1e13).by_weights
    above = [(dense, mixed) for budget, dense, mixed in rows if budget >= 2.5e8]
    assert len(above) >= 6
    for dense, mixed in above:
        assert mixed is not None
        assert dense is None or mixed.loss < dense.loss
    below = [mixed for budget, _, mixed in rows if budget < 2.5e8]
    assert below
    assert all(mixed is None for mixed in below)


def test_every_shape_is_one_of_ours_and_as_active_as_its_dense_like() -> None:
    """Fine experts and a shared one exchange slots for slots: up to the router, only E changes a count."""
    counts: dict[tuple[int, int, int], set[tuple[int, int]]] = {}
    for config, experts, granularity, _shared in shapes(256):
        router = 0 if config.moe is None else config.layers * config.moe.experts * config.d_model
        total, active = parameter_counts(config).values()
        counts.setdefault((config.layers, config.d_model, experts), set()).add((total - router, active - router))
        assert granularity >= 1
    assert len(counts) > 100
    assert all(len(values) == 1 for values in counts.values())
    for (layers, width, experts), values in counts.items():
        (_, dense_active) = next(iter(counts[layers, width, 1]))
        (total, active) = next(iter(values))
        assert active == dense_active
        assert total - active == (experts - 1) * layers * 12 * width * width


def test_no_half_slots() -> None:
    with pytest.raises(ValueError, match="must be even"):
        shape(768, 20, 8, 1, True, 256)


def test_limits_are_kept() -> None:
    result = found(memory=6e8, decode=50.0)
    for c in (result.best, *result.front):
        assert c.peak <= 6e8
        assert c.decode_tokens_per_s >= 50
        assert not c.outside
    assert [c.peak for c in result.front] == sorted(c.peak for c in result.front)
    losses = [c.loss for c in result.front]
    assert losses == sorted(losses, reverse=True)
    assert result.best.loss == pytest.approx(min(losses), abs=1e-9)


def test_it_warns_outside_the_fitted_range() -> None:
    assert not any("tokens" in w for w in found(active=0.3e9).warnings)
    long = found(tokens=6e12)
    assert any(
        "6000 B training tokens: the law was fitted up to 500 B; shapes are compared at 500" in w for w in long.warnings
    )
    # beyond the range the fit prefers two experts: what a planner must not pass on in silence
    wild = found(tokens=6e12, extrapolate=True, active=0.273e9)
    assert wild.best.experts == 2
    assert any("extrapolated, and misleading" in w for w in wild.warnings)
    assert any("every loss here is an extrapolation" in w for w in wild.warnings)
    some = found(extrapolate=True)
    assert any("lie outside the fitted range: their losses are extrapolated" in w for w in some.warnings)
    short = found(tokens=1e10)
    assert any("fitted from 100 B" in w for w in short.warnings)
    small = found("wearable", memory=1.5e8)
    assert any("every loss here is an extrapolation" in w for w in small.warnings)
    assert small.best.outside


def test_nothing_fits() -> None:
    """The limit that excludes most, and how near any shape comes to that limit."""
    with pytest.raises(UserError, match=r"none of \d+ shapes .* limits; memory excludes .*smallest shape needs \d+ MB"):
        found(memory=1e6)
    with pytest.raises(UserError, match=r"decoding rate excludes .*the fastest shape decodes [\d,.]+ tokens/s"):
        found(decode=1e9)
    with pytest.raises(UserError, match=r"active parameters excludes .*the smallest shape has 0\.\d+ B"):
        found(active=1e6)
    with pytest.raises(UserError, match=r"training operations excludes .*they leave the smallest shape \d+ tokens"):
        found(train_flops=1e10)


def test_metal_devices_are_searched_by_their_roofline() -> None:
    result = found("iphone-17", active=0.3e9)
    assert result.rates is None
    assert result.best.decode_tokens_per_s > 0


@pytest.mark.parametrize("device", ["galaxy-s25", "iphone-16-pro"])
@pytest.mark.parametrize("experts", [1, 4])
def test_the_spec_written_is_the_shape_found(device: str, experts: int) -> None:
    result = found(device, memory=1.5e9)
    chosen = next(c for c in result.front if c.experts == experts) if experts == 1 else result.best
    spec = parse_spec(spec_text(chosen, "mine", device, "xnnpack", "law"))
    assert spec.model == chosen.config
    assert spec.device == device


def test_search_command(moec: Moec, tmp_path: Path) -> None:
    out, picture = tmp_path / "mine.yaml", tmp_path / "front.svg"
    pytest.importorskip("matplotlib", reason="needs the plan extra: pip install 'moec[plan]'")
    arguments = ("search", "--device", "galaxy-s25", "--max-memory-mb", 600, "--out", out, "--plot", picture)
    status, text, err = moec(*arguments)
    assert status == 0
    assert "warning: " in err
    assert "Front of memory against loss" in text
    assert "<svg" in picture.read_text()
    assert load_spec(out).device == "galaxy-s25"
    assert moec("plan", out, "--json")[0] == 0
    status, text, _ = moec(*arguments[:5], "--json")
    facts = json.loads(text)
    assert facts["best"]["peak"] <= 6e8
    assert facts["warnings"]
    assert facts["law"] == PUBLISHED.source


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "galaxy-s2"], "unknown device 'galaxy-s2'; did you mean 'galaxy-s25'?"),
        (["--device", "wearable", "--max-memory-mb", "-3"], "--max-memory-mb -3 is not a positive number"),
        (["--device", "wearable", "--train-tokens", "0"], "--train-tokens 0 is not a positive number"),
        (["--device", "wearable", "--train-tokens", "nan"], "--train-tokens nan is not a positive number"),
        (["--device", "wearable", "--min-decode", "inf"], "--min-decode inf is not a positive number"),
        (["--device", "wearable", "--context", "0"], "--context 0 is not a number of positions"),
        (["--device", "wearable", "--max-memory-mb", "10"], "none of"),
        (["--device", "wearable", "--law", "nowhere.json"], "nowhere.json: cannot be read"),
        (["--device", "wearable", "--plot", "x.txt"], "x.txt: .txt is no picture"),
        ([], "Missing option '--device'"),
    ],
    ids=lambda v: " ".join(v[-2:]) if isinstance(v, list) else "",
)
def test_faults_of_search(moec: Moec, arguments: list[str], message: str) -> None:
    status, out, err = moec("search", *arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_laws_go_through_files(tmp_path: Path) -> None:
    file = tmp_path / "law.json"
    mine = replace(PUBLISHED, c=1.5, source="mine")
    file.write_text(law_text(mine))
    assert load_law(file) == mine
    assert found(law=load_law(file), active=0.273e9).best.loss < 2.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("[]", "is no scaling law"),
        ('{"A": 1}', "is no scaling law: 'delta'"),
        (law_text(PUBLISHED).replace("0.2388", "NaN"), "A is nan"),
        (law_text(PUBLISHED).replace("0.2388", '"x"'), "A is 'x'"),
        (law_text(PUBLISHED).replace('"low": 100.0', '"low": 900.0'), "a range from 900.0 to 500.0"),
    ],
)
def test_files_that_are_no_law(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "law.json"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        load_law(file)
