"""Sizes computed by the planner against the kernel's packing and against compiled artifacts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moec.analysis.plan.memory import file_bytes, memory, roles
from moec.analysis.plan.planner import model_of
from moec.checkpoints import synthesize
from moec.compiler import build
from moec.compiler.architecture import Weight
from moec.compiler.spec import Spec, load_spec, parse_spec
from moec.compiler.spec.quantization import WeightScheme, scheme_of_type
from moec.compiler.spec.targets import target_packages
from moec.compiler.target import find_target

TINY = Path(__file__).parents[3] / "specs" / "models" / "mobilemoe-tiny.yaml"
DENSE = """
name: dense
model:
  architecture: mobilellm
  layers: 3
  d_model: 96
  heads: 6
  kv_heads: 2
  head_dim: 16
  vocab_size: 515
  context: 320
  tied_embeddings: false
  ffn_width: 224
  rope: {theta: 10000.0, interleaved: true}
quantization: {weights: int8, head: {weights: int4, group_size: 32}, kv_cache: fp32}
"""


@pytest.mark.parametrize("seed", range(20))
def test_packed_sizes_are_the_kernels(seed: int) -> None:
    from moec.runtime import kernel_api
    from moec.runtime.moe_config import Kind, WeightFormat

    rng = np.random.default_rng(seed)
    kind, group = rng.choice(["nl3", "int4", "iq4_nl", "fp4", "int8"]), int(rng.choice([32, 64, 128]))
    axis_out = bool(rng.integers(2))
    free, grouped = int(rng.integers(1, 300)), group * int(rng.integers(1, 6))
    n, k = (grouped, free) if axis_out else (free, grouped)
    fmt = WeightFormat(Kind[kind.upper()], group, axis_out=axis_out)
    scheme = scheme_of_type(kind, group, "out" if axis_out else "in")
    found = find_target("xnnpack").footprint().weight_bytes(Weight("expert", "w", 3, n, k), scheme, None)
    assert found == 3 * kernel_api.packed_bytes(n, k, fmt)


def test_the_delegate_reads_no_levels() -> None:
    """XNNPACK's own linears know whole numbers only; every other kernel of the target reads levels."""
    footprint = find_target("xnnpack").footprint()
    options = parse_spec(DENSE + "targets: {xnnpack: {kernels: {attention: xnnpack}}}\n").targets["xnnpack"]
    weight = {role: Weight(role, "w", 1, 64, 64) for role in ("attention", "ffn", "expert", "embedding")}
    for role, one in weight.items():
        assert footprint.holds(one, WeightScheme(4, 32), options)
        assert footprint.holds(one, WeightScheme(4, 32, levels="iq4_nl"), options) == (role != "attention")


@pytest.fixture(scope="module", params=["tiny", pytest.param("dense", marks=pytest.mark.slow), "tiny-metal"])
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Spec, str, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    target = "metal" if request.param.endswith("metal") else "xnnpack"
    if target == "metal":
        pytest.importorskip("mlx.core", reason="needs the metal extra: pip install 'moec[metal]'")
    spec = parse_spec(DENSE) if request.param == "dense" else load_spec(TINY)
    synthesize(spec, folder / "checkpoint", seed=1, qat=request.param != "dense")
    build.compile(spec, target, folder / "checkpoint", folder / "artifact")
    return spec, target, folder / "artifact"


def test_stored_sizes_are_the_artifacts(compiled: tuple[Spec, str, Path]) -> None:
    """Weights by role exactly; the file within 1%, since a graph's size is estimated from its instructions."""
    spec, target, folder = compiled
    manifest = json.loads((folder / "manifest.json").read_text())
    model = model_of(spec, target, spec.targets.get(target) or build.chosen_target(spec, target)[1])
    stored = {role: size for role, size in manifest["sizes_by_role"].items() if role not in ("constant", "program")}
    assert {r.role: r.bytes for r in roles(model)} == stored
    # small artifacts: the graph is up to a tenth of the file, and known to a tenth
    assert file_bytes(model) == pytest.approx((folder / "model.pte").stat().st_size, rel=0.01)


def test_cache_and_arena_are_the_artifacts(compiled: tuple[Spec, str, Path]) -> None:
    """The cache exactly. The arena's planner packs greedily: never more than 5% off for our decoders."""
    spec, target, folder = compiled
    if target != "xnnpack":
        pytest.skip("an MLX delegate plans its own memory")
    method = json.loads((folder / "manifest.json").read_text())["details"]["methods"]["forward"]
    model = model_of(spec, target, spec.targets[target])
    assert model.cache_bytes(model.architecture.context) == method["arena_bytes"][1]
    assert model.footprint.instructions(model.architecture) == method["instructions"]
    a, chunk = model.architecture, model.footprint.chunk(None)
    scratch = model.footprint._scratch(a, chunk, 4)
    arena = model.footprint.activation_bytes(a, chunk, None) - scratch - 4 * a.vocab_size
    assert arena == pytest.approx(method["arena_bytes"][0], rel=0.05)


def test_peak_memory_is_the_measured_one(tmp_path: Path) -> None:
    """Within 10% of the runner's own peak, for a model of 30 MB.

    How much of the runtime's own code counts as resident depends on the machine: the system maps up to 64 KB of a
    file around each page that is touched. That is 1 MB between the machines this runs on: a tenth of a tiny model's
    peak, so that such a model would judge the machine and not the plan.
    """
    from moec.runtime import machine

    sizes = {"layers": 6, "d_model": 512, "head_dim": 64, "heads": 8, "vocab_size": 8192, "ffn_width": 1536}
    spec = parse_spec(DENSE)
    spec = spec.model_copy(update={"model": spec.model.model_copy(update=sizes)})
    synthesize(spec, tmp_path / "checkpoint", seed=1, qat=False)
    build.compile(spec, "xnnpack", tmp_path / "checkpoint", tmp_path / "artifact")
    prompt, decode = 128, 16
    report = machine.run_model(tmp_path / "artifact/model.pte", prompt=prompt, decode=decode, threads=1, repeats=1)
    options = spec.targets["xnnpack"].model_copy(update={"threads": 1})
    planned = memory(model_of(spec, "xnnpack", options), prompt + decode).peak
    assert planned == pytest.approx(report["peak_rss_mb"] * 1e6, rel=0.10)


def test_targets_that_have_sizes() -> None:
    known = {name for name in target_packages() if find_target(name).footprint() is not None}
    assert {"xnnpack", "metal"} <= known
    assert all(find_target(name).footprint().target == name for name in known)
