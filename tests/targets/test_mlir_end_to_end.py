"""MLIR artifacts from specs: compiled, executed by MLIR's engine and by IREE, compared with the eager program.

The eager program is the same graph at the same stage run by torch, with the same codes: what differs is fp32 summation
order. 1e-5 of the row's largest logit for float weights, 1e-4 for codes (their scales multiply before or after a sum).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moec.checkpoints import synthesize
from moec.cli.main import run
from moec.compiler import build
from moec.compiler.artifact import Artifact, record_file, write_manifest
from moec.compiler.errors import ArtifactError, CompileError, RunError
from moec.compiler.spec import Spec
from moec.targets.mlir import toolchain
from moec.targets.mlir.functional import exported, signature_of
from moec.targets.mlir.session import MlirSession
from tests.interpreter import Interpreter
from tests.variants import quick

pytest.importorskip("torch_mlir", reason="needs the mlir extra: pip install 'moec[mlir]'")
pytestmark = pytest.mark.usefixtures("trusted")  # programs that were compiled here
slow = pytest.mark.slow

MOE = {
    "architecture": "mobilemoe", "layers": 1, "d_model": 32, "heads": 2, "kv_heads": 1, "head_dim": 16,
    "vocab_size": 150, "context": 40, "qk_norm": True, "rope": {"theta": 10000.0, "interleaved": True},
    "moe": {"experts": 5, "top_k": 2, "expert_width": 32, "shared_width": 64, "scale": 2.5},
}  # fmt: skip
DENSE = {
    **{k: v for k, v in MOE.items() if k != "moe"},
    "architecture": "mobilellm", "layers": 2, "ffn_width": 96, "attention_window": {"size": 9, "every_nth_global": 2},
}  # fmt: skip
FLOAT = {"activations": "fp32", "kv_cache": "fp32"}
INT4 = {"weights": "int4", "group_size": 32, **FLOAT}
ROUNDED = {**INT4, "activations": "int8", "kv_cache": "int8"}
OUT = {"expert_group_axis": "out"}
IDS = [7, 149, 0, 33, 33, 12, 90, 5, 5, 101, 64]


def make(folder: Path, model: Any, quantization: Any, **options: Any) -> tuple[Artifact, Spec]:
    spec = Spec.model_validate(
        {"name": "m", "model": model, "quantization": quantization, "targets": {"mlir": {"max_tokens": 6, **options}}}
    )
    synthesize(spec, folder / "checkpoint", seed=5)
    return build.compile(spec, checkpoint=folder / "checkpoint", out=folder / "artifact"), spec


def eager(spec: Spec, checkpoint: Path, calls: list[list[int]]) -> np.ndarray:
    """Logits [T, V] of the calls, one after the other, by torch from the same program."""
    store = build.open_checkpoint(spec, checkpoint)
    program, passes = build.program_and_passes(spec, store, "mlir")
    interpreter = Interpreter(build.run_all(program, passes))
    rows, start = [], 0
    for ids in calls:
        rows.append(interpreter(torch.tensor([ids]), torch.tensor([start]))[0].numpy())
        start += len(ids)
    return np.concatenate(rows)


def worst(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference of a row over its largest logit."""
    return float((np.abs(a - b).max(-1) / np.abs(b).max(-1)).max())


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Spec, Path]:
    folder = tmp_path_factory.mktemp("mlir")
    return *make(folder, MOE, {**INT4, **OUT}), folder


@pytest.fixture(scope="module")
def session(small: tuple[Artifact, Spec, Path]) -> Any:
    opened = build.load(small[0])
    yield opened
    opened.close()


def test_prefill_and_decode_equal_eager(small: tuple[Artifact, Spec, Path], session: Any) -> None:
    _, spec, folder = small
    session.reset()
    got = [session.prefill(IDS[:8], logits="all"), *(session.decode(t)[None] for t in IDS[8:])]
    wanted = eager(spec, folder / "checkpoint", [IDS[:6], IDS[6:8], *([t] for t in IDS[8:])])
    assert worst(np.concatenate(got), wanted) < 1e-4
    assert (np.concatenate(got).argmax(-1) == wanted.argmax(-1)).all()
    session.reset()
    assert worst(session.prefill(IDS), wanted[-1:]) < 1e-4


def test_every_layer_is_traced(session: Any) -> None:
    session.reset()
    session.trace(True)
    session.prefill(IDS[:6])
    (trace,) = session.take_traces()
    session.trace(False)
    assert trace.layer == 0
    assert trace.x_TD.shape == trace.y_TD.shape == (6, 32)
    assert trace.indices_TK.dtype == np.int32
    assert trace.indices_TK.shape == trace.weights_TK.shape == (6, 2)
    assert trace.weights_TK.sum(-1) == pytest.approx(2.5, abs=1e-5)
    assert not session.take_traces()


def test_requests_that_cannot_be_served(session: Any) -> None:
    session.reset()
    for ids, said in (([], "empty"), ([150], "not in the vocabulary"), ([-1], "not in the vocabulary"),
                      (list(range(41)), "do not fit"), ([[1]], "dimensions")):  # fmt: skip
        with pytest.raises(RunError, match=said):
            session.prefill(ids)
    assert session.position == 0
    session.prefill(list(range(40)))
    with pytest.raises(RunError, match="do not fit"):
        session.decode(1)


def test_the_texts_say_what_they_hold(small: tuple[Artifact, Spec, Path]) -> None:
    artifact = small[0]
    fused, torch_text, linalg = (
        artifact.path(name).read_text()
        for name in ("fused.torch.mlir", "reference.torch.mlir", "reference.linalg.mlir")
    )
    for operator in ("fused_moe_q", "linear_q", "embedding_q", "rms_norm", "rope", "cached_attention_functional"):
        assert f'torch.operator "torch.moec.{operator}"' in fused
        assert f"moec.{operator}" not in torch_text
    assert "linalg.generic" in linalg
    assert "torch.aten" not in linalg
    # codes are arguments of eight bits; no weight is a constant in any text
    assert "!torch.vtensor<[5,32,32],ui8>" in fused
    assert "tensor<5x32x32xi8>" in linalg
    assert "dense_resource" not in fused + torch_text + linalg
    assert "// %arg0  weight" in linalg
    assert "1x?xi64" in linalg
    arguments = artifact.manifest.details["arguments"]
    assert [a["kind"] for a in arguments[-2:]] == ["tokens", "start_pos"]
    kinds = [a["kind"] for a in arguments]
    assert kinds == sorted(kinds, key=["weight", "cache", "tokens", "start_pos"].index)


def test_the_codes_are_the_checkpoints(small: tuple[Artifact, Spec, Path]) -> None:
    from safetensors.torch import load_file

    artifact, spec, folder = small
    store = build.open_checkpoint(spec, folder / "checkpoint")
    program, passes = build.program_and_passes(spec, store, "mlir")
    program = build.run_all(program, passes)
    written = load_file(artifact.path("weights.safetensors"))
    assert set(written) == set(signature_of(program).weights)
    for name, value in written.items():
        assert torch.equal(value, program.weights[name].load()), name


def test_run_and_inspect(small: tuple[Artifact, Spec, Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(small[0].folder)
    assert run(["inspect", folder]) == 0
    assert "reference.linalg.mlir" in capsys.readouterr().out
    assert run(["run", folder, "--ids", "1,2,3", "--max-new-tokens", "3"]) == 0
    assert len(capsys.readouterr().out.split(",")) <= 3


# --- faults ---------------------------------------------------------------------------------------------------------


def damaged(artifact: Artifact, folder: Path, file: str, text: str | None = None, **details: Any) -> Artifact:
    """A copy whose manifest is in order, with another text in `file` or other details."""
    folder.mkdir()
    for record in artifact.manifest.files:
        (folder / record.name).write_bytes((artifact.folder / record.name).read_bytes())
    if text is not None:
        (folder / file).write_text(text)
    manifest = artifact.manifest.model_copy(update={
        "files": tuple(record_file(folder / r.name) for r in artifact.manifest.files),
        "details": {**artifact.manifest.details, **details},
    })  # fmt: skip
    write_manifest(folder, manifest)
    return Artifact.open(folder)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param("module {", "cannot be executed", id="not-mlir"),
        pytest.param("module {}\n", "ended", id="no-function"),
        pytest.param(
            "func.func @forward(%a: tensor<2xf32>) -> tensor<2xf32> "
            '{ %0 = "no.such"(%a) : (tensor<2xf32>) -> tensor<2xf32>\n return %0 : tensor<2xf32> }',
            "cannot be executed",
            id="unknown-dialect",
        ),
    ],
)
def test_a_damaged_text_is_one_line(small: tuple[Artifact, Spec, Path], tmp_path: Path, text: str, said: str) -> None:
    artifact = damaged(small[0], tmp_path / "bad", "reference.linalg.mlir", text)
    with pytest.raises((ArtifactError, RunError), match=said) as caught:
        build.load(artifact)
    assert "\n" not in str(caught.value)


def test_native_code_that_aborts_ends_its_own_process(small: tuple[Artifact, Spec, Path], tmp_path: Path) -> None:
    """A failed assertion of compiled code calls abort(): the session says so, Python goes on."""
    text = small[0].path("reference.linalg.mlir").read_text()
    mark = text.index("{\n", text.index("func.func @forward")) + 2
    broken = text[:mark] + '    %no = arith.constant false\n    cf.assert %no, "on purpose"\n' + text[mark:]
    opened = build.load(damaged(small[0], tmp_path / "abort", "reference.linalg.mlir", broken))
    with pytest.raises(RunError, match="the compiled program ended: killed by signal 6") as caught:
        opened.prefill([1, 2])
    assert "\n" not in str(caught.value)
    with pytest.raises(RunError, match="closed"):
        opened.prefill([1])
    opened.close()


def test_a_manifest_without_arguments(small: tuple[Artifact, Spec, Path], tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"details\.arguments\.0\."):
        build.load(damaged(small[0], tmp_path / "bad", "", arguments=[{"kind": "weight"}]))


def test_an_operator_without_a_lowering_is_named(tmp_path: Path) -> None:
    text = (
        "func.func @forward(%a: !torch.vtensor<[2],f32>) -> !torch.vtensor<[2],f32> {\n"
        '  %0 = torch.operator "torch.moec.rms_norm"(%a) : (!torch.vtensor<[2],f32>) -> !torch.vtensor<[2],f32>\n'
        "  return %0 : !torch.vtensor<[2],f32>\n}\n"
    )
    (tmp_path / "in.mlir").write_text(text)
    with pytest.raises(CompileError, match=r"^m: .*moec\.rms_norm") as caught:
        toolchain.lower_text("linalg", tmp_path / "in.mlir", tmp_path / "out.mlir", model="m")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.mlir").exists()


def test_a_compiler_that_dies_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    code = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    monkeypatch.setattr(toolchain, "worker_command", lambda *a: [sys.executable, "-c", code])
    with pytest.raises(CompileError, match="stopped while lowering to linalg: killed by signal 11"):
        toolchain.lower_text("linalg", tmp_path / "in", tmp_path / "out", model="m")


def test_a_session_is_closed_once(small: tuple[Artifact, Spec, Path]) -> None:
    with build.load(small[0]) as opened:  # type: ignore[attr-defined]
        assert isinstance(opened, MlirSession)
    opened.close()
    with pytest.raises(RunError, match="closed"):
        opened.decode(1)


# --- the text alone, for every form of spec -------------------------------------------------------------------------

FORMS = [
    pytest.param(MOE, "none", 1e-5, id="float"),
    pytest.param(MOE, INT4, 1e-4, id="int4-in"),
    pytest.param(MOE, {**INT4, **OUT}, 1e-4, id="int4-out"),
    pytest.param(MOE, {**INT4, "weights": "int8", "embedding": "int8"}, 1e-4, id="int8"),
    pytest.param(DENSE, INT4, 1e-4, id="dense"),
    pytest.param(DENSE, "none", 1e-5, id="dense-float"),
    # one flipped step of INT8 is 1/127 of a row: the same integers are seen unless a sum lies on the middle of two
    pytest.param(MOE, {**ROUNDED, **OUT}, 1e-4, id="rounded-out"),
    pytest.param(MOE, ROUNDED, 1e-4, id="rounded-in"),
]


@pytest.mark.parametrize(
    ("model", "quantization", "limit"), quick(FORMS, ("int4-out", "int8", "dense-float", "rounded-out"))
)
def test_the_function_equals_the_program(model: Any, quantization: Any, limit: float, tmp_path: Path) -> None:
    """What is given to torch-mlir, run by torch with real weights: prefill and single steps over functional caches."""
    spec = Spec.model_validate(
        {"name": "m", "model": model, "quantization": quantization, "targets": {"mlir": {"max_tokens": 8}}}
    )
    synthesize(spec, tmp_path / "checkpoint", seed=5)
    store = build.open_checkpoint(spec, tmp_path / "checkpoint")
    program, passes = build.program_and_passes(spec, store, "mlir")
    program = build.run_all(program, passes)
    signature = signature_of(program)
    weights = [program.weights[n].load() for n in signature.weights]
    calls = [IDS[:7], [IDS[7]], IDS[8:10], [IDS[10]]]
    wanted = eager(spec, tmp_path / "checkpoint", calls)
    for expand in (True, False):
        function = exported(program, signature, expand=expand).module()
        caches = [program.weights[n].load() for n in signature.caches]
        rows, start = [], 0
        for ids in calls:
            with torch.no_grad():
                logits, *rest = function(*weights, *caches, torch.tensor([ids]), torch.tensor([start]))
            caches = rest[: len(caches)]
            assert len(rest) == len(caches) + (4 * signature.moe_layers if expand else 0)
            rows.append(logits[0].numpy())
            start += len(ids)
        assert worst(np.concatenate(rows), wanted) < limit


@slow
@pytest.mark.parametrize("engine", ["jit", "iree"])
@pytest.mark.parametrize(("model", "quantization", "limit"), FORMS)
def test_every_form_is_executed_and_verified(
    model: Any, quantization: Any, limit: float, engine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if engine == "iree":
        pytest.importorskip("iree.compiler", reason="needs the iree extra: pip install 'moec[iree]'")
        pytest.importorskip("iree.runtime", reason="needs the iree extra: pip install 'moec[iree]'")
    artifact, spec = make(tmp_path, model, quantization, engine=engine)
    opened = build.load(artifact)
    got = [opened.prefill(IDS[:8], logits="all"), *(opened.decode(t)[None] for t in IDS[8:])]
    opened.close()
    wanted = eager(spec, tmp_path / "checkpoint", [IDS[:6], IDS[6:8], *([t] for t in IDS[8:])])
    # IREE multiplies in tiles: where activations are rounded, the other order of its sums may flip a step
    tight = engine == "jit" or quantization == "none" or quantization.get("activations") == "fp32"
    assert worst(np.concatenate(got), wanted) < (limit if tight else 5e-2)
    assert run(["verify", str(artifact.folder), "--tokens", "96", "-q"]) == 0, capsys.readouterr().out


@slow
def test_text_alone(tmp_path: Path) -> None:
    artifact, _ = make(tmp_path, MOE, INT4, linalg=False)
    assert {f.name for f in artifact.manifest.files} >= {"fused.torch.mlir", "reference.torch.mlir"}
    with pytest.raises(ArtifactError, match="no linalg text"):
        build.load(artifact)
