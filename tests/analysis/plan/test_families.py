"""The middle shapes of the families (bench/plan_families.py): the planner's counts against the graphs they become."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from moec.analysis.plan.devices import reference
from moec.analysis.plan.memory import roles, weight_bytes
from moec.analysis.plan.planner import model_of
from moec.analysis.plan.roofline import decode, prefill
from moec.compiler import build
from moec.compiler.architecture import Architecture, Mixer
from moec.compiler.pipeline import run_passes
from moec.compiler.program import Program
from moec.compiler.spec import Spec, load_spec
from tests.variants import quick

pytest.importorskip("transformers", reason="needs the transformers extra: pip install 'moec[transformers]'")

ROOT = Path(__file__).parents[3]
FAMILIES = sorted(file.stem for file in (ROOT / "specs" / "families").glob("*.yaml"))
BESIDE = ("cache", "constant")  # roles of a graph that are no weights


@cache
def families() -> ModuleType:
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        import plan_families
    finally:
        sys.path.remove(str(ROOT / "bench"))
    return plan_families


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shapes")


def shaped(family: str, folder: Path, *, middle: bool = True) -> Spec:
    """The family's spec with the config of its middle shape, or of its tiny one, alone: no weights."""
    from moec.sources.transformers_config import read_config

    config: Any = read_config(load_spec(ROOT / "specs" / "families" / f"{family}.yaml").model.transformers)  # type: ignore[union-attr]
    for key, value in families().changes(family).items() if middle else ():
        setattr(config, key, value)
    out = folder / f"{family}-{middle}"
    config.save_pretrained(out)
    found: Spec = families().spec_of(family, out)
    return found


def counted(spec: Spec) -> Architecture:
    return model_of(spec, "xnnpack", spec.targets["xnnpack"]).architecture


def test_every_family_has_a_middle_shape() -> None:
    assert sorted(families().SHAPES) == FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_a_middle_shape_weighs_enough_and_has_every_kind_of_layer(family: str, folder: Path) -> None:
    spec, tiny = shaped(family, folder), shaped(family, folder, middle=False)
    a, small = counted(spec), counted(tiny)
    assert a.layers >= 4
    assert a.context == families().CONTEXT
    # fixed costs of a runtime, some 10 MB, weigh little beside it
    assert 150e6 <= weight_bytes(model_of(spec, "xnnpack", spec.targets["xnnpack"])) <= 400e6

    def kinds(of: Architecture) -> set[object]:
        recurrent = {f"{s.name.rsplit('_', 1)[0]} of {len(s.shape)} axes" for s in of.fixed}
        windows = {f"a window: {c.window > 0}" for c in of.caches} if family == "gpt-oss" else set()
        # a tied head is the table
        return {w.role for w in of.weights} - {"head"} | recurrent | windows | {bool(of.caches)}

    assert kinds(small) <= kinds(a)


@pytest.mark.parametrize("family", quick(FAMILIES, ("qwen2-moe", "lfm2-moe", "nemotron-h")))
def test_weights_are_those_of_the_graph(family: str, folder: Path) -> None:
    """Byte for byte: what the target packs, and what stays in float. The graph is made without weights."""
    spec = shaped(family, folder)
    program = run_passes(*build.program_and_passes(spec, None))
    model = model_of(spec, "xnnpack", spec.targets["xnnpack"])
    stored = stored_bytes(program)
    assert weight_bytes(model) == sum(size for role, size in stored.items() if role not in BESIDE)
    planned = {r.role: r.bytes for r in roles(model)}
    # a graph calls linears of gated attention, and a shared expert beside the block, those of a feed-forward block
    for alike in (("embedding",), ("head",), ("shared", "attention", "ffn")):
        assert sum(planned.get(r, 0) for r in alike) == sum(stored.get(r, 0) for r in alike), alike
    assert model.cache_bytes(model.architecture.context) == stored["cache"]


@pytest.mark.parametrize(
    ("family", "mixers", "ffn_width", "shared_width"),
    [
        ("lfm2-moe", [Mixer("short_conv", 3 * 1024, 1024)] * 4, 3584, 0),
        ("qwen3-next", [Mixer("gated_delta", 6144 + 32, 4096)] * 3, 0, 256),
        ("qwen3-5-moe", [Mixer("gated_delta", 6144 + 32, 4096)] * 3, 0, 256),
        ("granite-4-h", [Mixer("selective_scan", 2 * 3072 + 2 * 128 + 48, 3072 + 2 * 128)] * 3, 2048, 0),
        ("nemotron-h", [Mixer("selective_scan", 2 * 1536 + 2 * 3 * 128 + 24, 1536 + 2 * 3 * 128)] * 3, 0, 1408),
        ("qwen2-moe", [], 2816, 2816),
    ],
)
def test_mixers_and_widths(family: str, mixers: list[Mixer], ffn_width: int, shared_width: int, folder: Path) -> None:
    """What the sizes of activations rest on; by hand, from the equations of the families."""
    a = counted(shaped(family, folder))
    assert list(a.mixers) == mixers
    assert a.ffn_width == ffn_width
    assert a.experts is not None
    assert a.experts.shared_width == shared_width


def test_states_take_their_own_time(folder: Path) -> None:
    """At one token from DRAM, or through the last cache if they stay there; in a prompt by operations alone."""
    spec = shaped("qwen3-next", folder)
    model, device = model_of(spec, "xnnpack", spec.targets["xnnpack"]), reference()
    assert device is not None
    assert device.kernels is not None
    rates = model.footprint.rates(device, None)
    assert rates is not None
    elements = 3 * (16 * 128 * 128 + 3 * 4096)  # of three layers: states, and the last inputs of convolutions
    operations = 6 * elements
    assert model.architecture.fixed_bytes == 4 * elements
    moved = 2 * 4 * elements / rates.cached["dense"]
    kept = decode(model, device, rates, 100).parts["states"]
    assert kept == pytest.approx(operations / rates.state_prefill + moved)
    small = replace(rates, last_cache=1e6)
    assert decode(model, device, small, 100).parts["states"] == pytest.approx(operations / rates.state_decode)
    prompt = prefill(model, device, rates, 300).parts["states"]
    assert prompt == pytest.approx(300 * operations / rates.state_prefill)

    figure = device.kernels.attention_prefill_gop_per_s
    timed = {"state_decode_gop_per_s": figure, "state_prefill_gop_per_s": figure}
    measured = device.model_copy(update={"kernels": device.kernels.model_copy(update=timed)})
    own = model.footprint.rates(measured, None)
    assert own is not None
    assert own.state_decode == own.state_prefill == own.attention_prefill != rates.state_prefill


def stored_bytes(program: Program) -> dict[str, int]:
    """Bytes by role of what a graph reads."""
    found: dict[str, int] = {}
    for node in program.graph.nodes:
        name = program.weight_of(node) if node.op == "placeholder" and node.users else None
        if name is not None:
            weight, role = program.weights[name], program.roles[name].value
            found[role] = found.get(role, 0) + math.prod(weight.shape) * weight.dtype.itemsize
    return found
