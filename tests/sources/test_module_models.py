"""`model: {python: ...}` and `model: {exported_program: ...}`: compiled, run, and refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moec.analysis.verify.artifact import verify_artifact
from moec.analysis.verify.structure import structure_faults
from moec.compiler import build
from moec.compiler.errors import CheckpointError, CompileError
from moec.compiler.ops import fused_moe
from moec.compiler.pipeline import run_passes
from moec.compiler.program import Role
from moec.compiler.spec import Spec
from moec.passes.canonicalize import canonicalize
from moec.passes.pipelines import fusion
from moec.sources.module_model import ModuleStore, export_module_model, open_exported, open_python
from tests.sources import own_models
from tests.variants import quick

pytestmark = pytest.mark.usefixtures("trusted")
HERE = "tests.sources.own_models"
IDS = torch.randint(0, own_models.V, (1, 20), generator=torch.Generator().manual_seed(2))


def spec(model: dict[str, str], quantization: Any = "none") -> Spec:
    targets = {"xnnpack": {"max_tokens": 8}}
    return Spec.model_validate({"name": "own", "model": model, "quantization": quantization, "targets": targets})


def expected() -> np.ndarray:
    with torch.no_grad():
        return own_models.stateless()(IDS)[0].numpy()  # the cached one has the same weights


def logits(wanted: Spec, out: Path) -> np.ndarray:
    """A prompt in chunks, then single steps."""
    session = build.load(build.compile(wanted, out=out))
    ids = IDS[0].tolist()
    first = session.prefill(ids[:14], logits="all")
    steps = np.stack([session.decode(token) for token in ids[14:]])
    session.close()
    return np.concatenate([first, steps])


def saved(module: torch.nn.Module, file: Path, low: int = 1, high: int = 8) -> Path:
    start = (torch.zeros(1, dtype=torch.long),) if isinstance(module, own_models.Cached) else ()
    dynamic = ({1: torch.export.Dim("T", min=low, max=high)}, *(None for _ in start))
    exported = torch.export.export(module.eval(), (IDS[:, :7], *start), dynamic_shapes=dynamic, strict=False)
    torch.export.save(exported, file)
    return file


def sources(tmp_path: Path) -> dict[str, dict[str, str]]:
    return {
        "python": {"python": f"{HERE}:cached"},
        "uncounted": {"python": f"{HERE}:uncounted"},
        "stateless": {"python": f"{HERE}:stateless"},
        "exported": {"exported_program": str(saved(own_models.cached(), tmp_path / "own.pt2"))},
        "exported_stateless": {
            "exported_program": str(saved(own_models.stateless(), tmp_path / "stateless.pt2", 2, own_models.S))
        },
    }


@pytest.mark.parametrize("kind", quick(["python", "stateless", "exported"], ("exported",)))
def test_float_artifact_equals_the_module(kind: str, tmp_path: Path) -> None:
    # the order of fp32 sums, on logits of order one
    np.testing.assert_allclose(logits(spec(sources(tmp_path)[kind]), tmp_path / "a"), expected(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", quick(["python", "exported"], ("python",)))
def test_its_artifact_is_verified_against_it(kind: str, tmp_path: Path) -> None:
    wanted = spec(sources(tmp_path)[kind], {"weights": "int4", "group_size": 32, "expert_group_axis": "in"})
    artifact = build.compile(wanted, out=tmp_path / "a").folder
    report = verify_artifact(artifact, tokens=40)
    assert report.exit_status == 0, [c.line() for c in report.failures]
    with pytest.raises((CheckpointError, CompileError), match=r"no such file|is not there|cannot import"):
        verify_artifact(artifact, checkpoint=tmp_path / "nowhere", tokens=40)


@pytest.mark.slow
def test_int4(tmp_path: Path) -> None:
    scheme = {"weights": "int4", "group_size": 32, "expert_group_axis": "in"}
    found, wanted = logits(spec(sources(tmp_path)["python"], scheme), tmp_path / "a"), expected()
    cosine = (found * wanted).sum(-1) / np.linalg.norm(found, axis=-1) / np.linalg.norm(wanted, axis=-1)
    assert np.median(cosine) > 0.9  # INT4 of random weights against float ones: this is what the codes cost


@pytest.mark.parametrize(
    "kind", quick(["python", "uncounted", "exported", "exported_stateless"], ("python", "exported_stateless"))
)
def test_program(kind: str, tmp_path: Path) -> None:
    program, _ = build.program_and_passes(spec(sources(tmp_path)[kind]), None)
    assert program.info.vocab_size == own_models.V
    done = run_passes(program, fusion())
    assert sum(n.target is fused_moe for n in done.graph.nodes) == 1
    prefix = "module." if kind == "exported_stateless" else ""
    assert done.roles[f"{prefix}embed.weight"] is Role.EMBEDDING
    assert done.roles[f"{prefix}head.weight"] is Role.HEAD
    assert {done.roles[f"{prefix}attention.{n}.weight"] for n in ("qkv", "out")} == {Role.ATTENTION}
    assert done.roles[f"{prefix}moe.gate.weight"] is Role.ROUTER
    if kind != "exported_stateless":
        assert program.info.context == own_models.S, "as many positions as the cache has rows"
        assert program.info.max_tokens <= own_models.S
    if kind == "python":
        assert (program.info.context, program.info.bos_id, program.info.eos_ids) == (own_models.S, 1, (2,))
        assert "moec.cached_attention" in done.text()


FAULTS = {
    "tests.nowhere:cached": "cannot import it",
    f"{HERE}:absent": "cannot import it",
    f"{HERE}:fails": "the function failed: no weights here",
    f"{HERE}:returns_a_number": "returned int",
    f"{HERE}:endless": "how many positions",
    f"{HERE}:wrong": "its result is int64",
}


@pytest.mark.parametrize("reference", FAULTS)
def test_faults_of_a_function(reference: str) -> None:
    with pytest.raises(CompileError, match=FAULTS[reference]) as caught:
        export_module_model(open_python(reference), "own")
    assert "\n" not in str(caught.value)


def test_faults_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        open_exported(tmp_path / "none.pt2")
    (tmp_path / "bad.pt2").write_bytes(b"PK\x03\x04 not a program")
    with pytest.raises(CheckpointError, match="does not read it"):
        open_exported(tmp_path / "bad.pt2")
    with pytest.raises(CompileError, match="at least 2 tokens"):
        export_module_model(open_exported(saved(own_models.cached(), tmp_path / "two.pt2", 2, 8)), "own")
    fixed = torch.export.export(own_models.cached(), (IDS[:, :7], torch.zeros(1, dtype=torch.long)), strict=False)
    torch.export.save(fixed, tmp_path / "fixed.pt2")
    with pytest.raises(CompileError, match="fixed at 7"):
        export_module_model(open_exported(tmp_path / "fixed.pt2"), "own")


def test_a_checkpoint_beside_a_module_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="bring their own weights"):
        build.open_checkpoint(spec({"python": f"{HERE}:cached"}), tmp_path)


def test_a_weight_that_nobody_reads_is_no_loss() -> None:
    module = own_models.cached()
    module.unused = torch.nn.Linear(5, 3)
    program = export_module_model(ModuleStore(module, "own", Path()), "own")
    result = canonicalize().run(program)
    assert any("unused" in name for name in program.weights)
    assert not any("unused" in name for name in result.program.weights)
    assert structure_faults(program, result.program, result.changed) == []


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("python", float("nan")),
        ("exported", float("inf")),
        pytest.param("python", float("inf"), marks=pytest.mark.slow),
        pytest.param("exported", float("nan"), marks=pytest.mark.slow),
    ],
)
def test_values_that_are_not_finite(kind: str, value: float, tmp_path: Path) -> None:
    """A parameter of them is refused by name; a mask of -inf is not, and NaN is nothing anywhere."""
    module = own_models.cached()
    with torch.no_grad():
        module.norm.weight[3] = value
    module.register_buffer("mask", torch.tensor([0.0, -float("inf")]))
    module.register_buffer("broken", torch.tensor([0.0, float("nan")]))
    module.forward = lambda tokens, start_pos: (
        module.body(tokens, start_pos) + 0 * module.mask[0] + 0 * module.broken[0]
    )
    store = ModuleStore(module, "own", Path()) if kind == "python" else open_exported(saved(module, tmp_path / "m.pt2"))
    weights = export_module_model(store, "own").weights
    refused = {}
    for name, weight in weights.items():
        try:
            weight.load()
        except CheckpointError as error:
            refused[name] = error.line()
    assert sorted(refused) == ["broken", "norm.weight"]
    assert all("not finite" in line and name in line for name, line in refused.items())
