"""The planner's counts against the model's own layout, published figures, and what must always hold."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.analysis.plan.memory import Model, expert_bytes_touched, longest_context, memory, roles, weight_bytes
from moec.compiler.architecture import Architecture, Weight
from moec.compiler.spec import Quantization, load_spec
from moec.compiler.spec.targets import options_class
from moec.compiler.target import find_target
from moec.sources.decoder.architecture import architecture_of
from moec.sources.decoder.config import AttentionWindow, DecoderConfig, MoeConfig, RopeConfig
from moec.sources.decoder.layout import parameter_counts

SPECS = Path(__file__).parents[3] / "specs"
#: total, active: the released shapes of the paper's models, and MobileLLM-Pro's card
PUBLISHED = {
    "mobilemoe-s": (1_263_373_056, 272_468_736),
    "mobilemoe-m": (2_818_388_992, 528_299_008),
    "mobilemoe-l": (5_325_702_400, 921_683_200),
    "mobilellm-pro": (1_084_453_120, 1_084_453_120),
}


def shipped(name: str) -> Architecture:
    config = load_spec(SPECS / "models" / f"{name}.yaml").model
    assert isinstance(config, DecoderConfig)
    return architecture_of(config, name)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts(name: str) -> None:
    a = shipped(name)
    assert (a.total_parameters, a.active_parameters) == PUBLISHED[name]


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [("mobilemoe-s", 1.3, 272), ("mobilemoe-m", 2.8, 528), ("mobilemoe-l", 5.3, 922)],
)
def test_published_counts_as_printed(name: str, total: float, active: int) -> None:
    a = shipped(name)
    assert round(a.total_parameters / 1e9, 1) == total
    assert round(a.active_parameters / 1e6) == active


@pytest.mark.parametrize("name", [f.stem for f in sorted((SPECS / "models").glob("*.yaml"))])
def test_account_is_the_layout(name: str) -> None:
    """Elements by role equal those of the weights that the model really has."""
    from moec.sources.decoder.layout import weight_layout

    config = load_spec(SPECS / "models" / f"{name}.yaml").model
    assert isinstance(config, DecoderConfig)
    wanted: dict[str, int] = {}
    for info in weight_layout(config).values():
        wanted[info.role.value] = wanted.get(info.role.value, 0) + info.numel
    found: dict[str, int] = {}
    for weight in architecture_of(config, name).weights:
        found[weight.role] = found.get(weight.role, 0) + weight.numel
    assert found == wanted


def test_flops_of_a_decoded_token() -> None:
    """2 N_act, as the paper has it (F_inf), but for the norms; attention comes on top and grows with the position."""
    a = shipped("mobilemoe-s")
    norms = 41 * 768
    assert a.flops(0) - 2 * a.attention_macs(0) == 2 * (a.active_parameters - norms)
    assert a.attention_macs(0) == 20 * 12 * 64 * 2
    assert a.attention_macs(99) == 100 * a.attention_macs(0)


def test_windows_bound_attention() -> None:
    a = shipped("mobilellm-pro")
    near, far = a.attention_macs(511), a.attention_macs(8191)
    # 7 of 30 layers see all 8192 positions, the other 23 the last 512
    assert far == near / 30 * 23 + near / 30 * 7 * 16


@st.composite
def configs(draw: st.DrawFn) -> DecoderConfig:
    kv = draw(st.integers(1, 4))
    common = {
        "layers": draw(st.integers(1, 12)),
        "d_model": 32 * draw(st.integers(1, 16)),
        "heads": kv * draw(st.integers(1, 5)),
        "kv_heads": kv,
        "head_dim": 32 * draw(st.integers(1, 3)),
        "vocab_size": draw(st.integers(2, 5000)),
        "context": draw(st.integers(1, 3000)),
        "tied_embeddings": draw(st.booleans()),
        "rope": RopeConfig(theta=1e4, interleaved=True),
        "attention_window": draw(
            st.none() | st.builds(AttentionWindow, size=st.integers(1, 600), every_nth_global=st.integers(1, 5))
        ),
    }
    if draw(st.booleans()):
        return DecoderConfig(architecture="mobilellm", ffn_width=32 * draw(st.integers(1, 40)), **common)
    experts = draw(st.integers(1, 40))
    moe = MoeConfig(
        experts=experts,
        top_k=draw(st.integers(1, experts)),
        expert_width=32 * draw(st.integers(1, 12)),
        shared_width=32 * draw(st.integers(0, 8)),
        selection_bias=draw(st.booleans()),
    )
    return DecoderConfig(architecture="mobilemoe", moe=moe, **common)


schemes = st.none() | st.builds(
    Quantization,
    weights=st.sampled_from(["int4", "int8", "fp32"]),
    kv_cache=st.sampled_from(["int8", "fp32"]),
    expert_group_axis=st.sampled_from(["in", "out"]),
)


def model_of(config: DecoderConfig, quantization: Quantization | None, target: str) -> Model:
    return Model(
        architecture_of(config, "random"), quantization, find_target(target).footprint(), options_class(target)()
    )


@settings(max_examples=80, deadline=None)
@given(configs(), schemes, st.sampled_from(["xnnpack", "metal"]), st.data())
def test_what_always_holds(
    config: DecoderConfig, quantization: Quantization | None, target: str, data: st.DataObject
) -> None:
    a, counts = architecture_of(config, "random"), parameter_counts(config)
    assert (a.total_parameters, a.active_parameters) == (counts["total"], counts["active"])
    model = model_of(config, quantization, target)
    # more context never needs less memory, nor fewer operations
    low, high = sorted((data.draw(st.integers(1, config.context)), data.draw(st.integers(1, config.context))))
    assert memory(model, low).peak <= memory(model, high).peak
    assert a.flops(low - 1) <= a.flops(high - 1)
    # the longest context is the last that fits
    budget = data.draw(st.integers(0, 2 * memory(model, config.context).peak))
    longest = longest_context(model, budget)
    assert longest == 0 or memory(model, longest).peak <= budget
    assert longest == config.context or memory(model, longest + 1).peak > budget
    # no token reads more than is stored, and the roles are all there is
    assert sum(r.bytes for r in roles(model)) == weight_bytes(model)
    assert all(0 <= r.per_token <= r.bytes for r in roles(model))
    assert 0 <= expert_bytes_touched(model, 1) <= expert_bytes_touched(model, 100) <= weight_bytes(model)


@settings(max_examples=40, deadline=None)
@given(configs(), schemes, st.sampled_from(["xnnpack", "metal"]))
def test_bytes_are_linear_in_layers(config: DecoderConfig, quantization: Quantization | None, target: str) -> None:
    def bytes_of(layers: int) -> int:
        return weight_bytes(model_of(config.model_copy(update={"layers": layers}), quantization, target))

    steps = {bytes_of(n + 1) - bytes_of(n) for n in range(1, 5)}
    assert len(steps) == 1
    assert steps.pop() > 0


@settings(max_examples=60, deadline=None)
@given(configs(), st.sampled_from(["xnnpack", "metal"]))
def test_fewer_bits_never_take_more(config: DecoderConfig, target: str) -> None:
    """Float weights are stored unpadded, a matrix of few rows may be smaller so: only integers are compared."""
    sizes = [weight_bytes(model_of(config, Quantization(weights=kind), target)) for kind in ("int4", "int8")]
    assert sizes == sorted(sizes)
    caches = [
        model_of(config, Quantization(weights="int4", kv_cache=k), target).cache_bytes(64) for k in ("int8", "fp32")
    ]
    assert caches == sorted(caches)


def test_touched_experts() -> None:
    moe = shipped("mobilemoe-s").experts
    assert moe is not None
    assert moe.touched(1) == pytest.approx(4)
    assert 59.99 < moe.touched(512) <= 60
    assert moe.touched(8) < 8 * 4


def test_a_vector_takes_no_products() -> None:
    assert Weight("norm", "norms", 3, 128, 1).macs == 0
    assert Weight("expert", "down", 10, 4, 8, used=2).macs == 64


def test_layers_that_are_alike_are_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search plans ten thousands of shapes of up to eighty layers."""
    a = shipped("mobilellm-pro")
    options = options_class("xnnpack")()
    model = Model(a, Quantization(weights="int4"), find_target("xnnpack").footprint(), options)
    kinds = len(set(a.caches))
    assert 1 < kinds < len(a.caches)
    wanted = sum(model.footprint.cache_bytes(c, model.cache_codes, 100) for c in a.caches)
    asked = []
    real = type(model.footprint).cache_bytes
    monkeypatch.setattr(type(model.footprint), "cache_bytes", lambda *given: asked.append(given) or real(*given))
    assert model.cache_bytes(100) == wanted
    assert len(asked) == kinds
