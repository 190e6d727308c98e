"""`moec verify --against`: targets and the eager model compared, and the one that is wrong named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.analysis.verify import agreement
from moec.analysis.verify.agreement import odd_ones_out, row_distance, verify_agreement
from moec.checkpoints import synthesize
from moec.cli.main import run
from moec.compiler import build
from moec.compiler.artifact import Artifact, record_file, write_manifest
from moec.compiler.errors import ArtifactError, MissingExtra, RunError, UserError
from moec.compiler.spec import Spec

MODEL = {
    "architecture": "mobilemoe", "layers": 2, "d_model": 64, "heads": 4, "kv_heads": 2, "head_dim": 32,
    "vocab_size": 400, "context": 64, "qk_norm": True, "rope": {"theta": 10000.0, "interleaved": True},
    "moe": {"experts": 8, "top_k": 2, "expert_width": 32, "shared_width": 64, "scale": 2.5},
}  # fmt: skip
FLOAT = {"weights": "int4", "group_size": 32, "activations": "fp32", "kv_cache": "fp32"}
ROUNDED = {**FLOAT, "activations": "int8", "kv_cache": "int8", "expert_group_axis": "out"}
TARGETS: dict[str, Any] = {"xnnpack": {}, "metal": {"dtype": "float32"}, "onnx": {}, "mlir": {"max_tokens": 32}}
TOKENS = 64


def prepare(folder: Path, quantization: Any, *targets: str) -> dict[str, Path]:
    spec = Spec.model_validate({"name": "a", "model": MODEL, "quantization": quantization, "targets": TARGETS})
    synthesize(spec, folder / "checkpoint", seed=6)
    return {t: build.compile(spec, target=t, checkpoint=folder / "checkpoint", out=folder / t).folder for t in targets}


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Artifacts whose activations are float."""
    pytest.importorskip("mlx.core", reason="needs the metal extra: pip install 'moec[metal]'")
    pytest.importorskip("onnxruntime", reason="needs the onnx extra: pip install 'moec[onnx]'")
    return prepare(tmp_path_factory.mktemp("exact"), FLOAT, "xnnpack", "metal", "onnx")


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    pytest.importorskip("mlx.core", reason="needs the metal extra: pip install 'moec[metal]'")
    return prepare(tmp_path_factory.mktemp("rounded"), ROUNDED, "xnnpack", "metal")


class Tampered:
    """A session whose logits or selections are altered on the way out."""

    def __init__(self, session: Any, logits: Callable[[np.ndarray], np.ndarray]) -> None:
        self._session, self._logits = session, logits

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def prefill(self, ids: Any, logits: str = "last") -> np.ndarray:
        return self._logits(np.array(self._session.prefill(ids, logits)))

    def decode(self, token: int) -> np.ndarray:
        return self._logits(np.array(self._session.decode(token)))


def tamper(monkeypatch: pytest.MonkeyPatch, target: str, how: Callable[[Any], Any]) -> None:
    load = build.load_exact
    monkeypatch.setattr(build, "load_exact", lambda a: how(load(a)) if a.manifest.target == target else load(a))


def others(artifacts: dict[str, Path], *names: str) -> list[str]:
    return [str(artifacts[n]) for n in names]


# --- what agrees ----------------------------------------------------------------------------------------------------


def test_float_targets_agree_to_fp32_rounding(exact: dict[str, Path]) -> None:
    report = verify_agreement(exact["xnnpack"], others(exact, "metal", "onnx"), tokens=TOKENS)
    assert report.passed, report.text()
    assert report.odd == ()
    pairs = {frozenset((row.a, row.b)): row for row in report.rows}
    assert set(pairs) == {frozenset(p) for p in combinations(("xnnpack", "metal", "onnx", "eager"), 2)}
    for row in report.rows:
        assert not row.rounded
        assert row.relative_error < 1e-5, row  # the limit is 1e-4; two layers of these widths stay well within
        assert row.top1 == 1.0
        assert row.expert_sets is None or row.expert_sets == 1.0
    assert pairs[frozenset(("xnnpack", "eager"))].expert_sets == 1.0


def test_targets_that_round_differently_agree(rounded: dict[str, Path]) -> None:
    report = verify_agreement(rounded["xnnpack"], others(rounded, "metal"), tokens=TOKENS)
    assert report.passed, report.text()
    assert all(row.rounded for row in report.rows)


def test_siblings_are_compiled_here(exact: dict[str, Path], tmp_path: Path) -> None:
    before = {p.name for p in exact["xnnpack"].parent.iterdir()}
    report = verify_agreement(exact["xnnpack"], ["metal", "xnnpack", "metal"], tokens=12)
    assert report.passed, report.text()
    assert {row.a for row in report.rows} | {row.b for row in report.rows} == {"xnnpack", "metal", "eager"}
    assert {p.name for p in exact["xnnpack"].parent.iterdir()} == before


@pytest.mark.slow
def test_all_four_toolchains(exact: dict[str, Path], rounded: dict[str, Path]) -> None:
    pytest.importorskip("torch_mlir", reason="needs the mlir extra: pip install 'moec[mlir]'")
    for artifacts in (exact, rounded):
        report = verify_agreement(artifacts["xnnpack"], ["onnx", "mlir", "metal"], tokens=TOKENS)
        assert report.passed, report.text()
        assert len(report.rows) == 10
        assert not report.unavailable


# --- what does not --------------------------------------------------------------------------------------------------


def of_other_weights(artifact: Path, folder: Path) -> Path:
    """A Metal artifact made as if one expert of the second layer had been stored half as large again."""
    from moec.checkpoints.safetensors_file import read_header

    shutil.copytree(artifact.parent / "checkpoint", folder / "checkpoint")
    file = folder / "checkpoint" / "model.safetensors"
    entries = read_header(file)
    entry = entries[next(n for n in entries if "layers.1" in n and "experts" in n and "down" in n)]
    stack = entry.tensor().clone()
    stack[3] *= 1.5
    with file.open("r+b") as stream:
        stream.seek(entry.begin)
        stream.write(stack.view(torch.uint8).numpy().tobytes())
    spec = Spec.model_validate(Artifact.open(artifact).manifest.spec)
    return build.compile(spec, target="metal", checkpoint=folder / "checkpoint", out=folder / "metal").folder


def mlir_fault(artifact: Path, folder: Path) -> Path:
    """A copy of an MLIR artifact whose linalg text shifts the high nibbles of all codes by one bit too few."""
    shutil.copytree(artifact, folder)
    text = (folder / "reference.linalg.mlir").read_text()
    broken = text.replace("arith.constant 4 : i64", "arith.constant 3 : i64")
    if broken == text:
        broken = text.replace("arith.constant 4 : i32", "arith.constant 3 : i32")
    assert broken != text
    (folder / "reference.linalg.mlir").write_text(broken)
    manifest = Artifact.open(artifact).manifest
    files = tuple(record_file(folder / r.name) for r in manifest.files)
    write_manifest(folder, manifest.model_copy(update={"files": files}))
    return folder


@pytest.mark.parametrize("wrong", ["metal", "onnx", "xnnpack"])
def test_a_wrong_target_is_named(exact: dict[str, Path], wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three thousandths of the logits of one target: thirty times the limit, and too little to change its text."""
    tamper(monkeypatch, wrong, lambda session: Tampered(session, lambda x: x * np.float32(1.003)))
    report = verify_agreement(exact["xnnpack"], others(exact, "metal", "onnx"), tokens=TOKENS)
    assert report.exit_status == 1
    assert report.odd == (wrong,)
    assert not report.undecided
    assert report.verdict() == f"odd one out: {wrong}"
    assert {frozenset((r.a, r.b)) for r in report.rows if not r.passed} == {
        frozenset((wrong, name)) for name in ("xnnpack", "metal", "onnx", "eager") if name != wrong
    }


def test_a_wrong_target_among_rounded_ones_is_named(rounded: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits that belong to the neighbours of their tokens."""
    tamper(monkeypatch, "metal", lambda session: Tampered(session, lambda x: np.roll(x, 1, -1)))
    report = verify_agreement(rounded["xnnpack"], others(rounded, "metal"), tokens=TOKENS)
    assert report.odd == ("metal",)
    assert report.exit_status == 1


def test_one_expert_with_other_weights_is_noticed(exact: dict[str, Path], tmp_path: Path) -> None:
    wrong = of_other_weights(exact["metal"], tmp_path / "other")
    report = verify_agreement(exact["xnnpack"], [str(wrong), str(exact["onnx"])], tokens=TOKENS)
    assert report.odd == ("metal",)


@pytest.mark.slow
def test_a_miscompiled_mlir_artifact_is_named(exact: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("torch_mlir", reason="needs the mlir extra: pip install 'moec[mlir]'")
    spec = Spec.model_validate(Artifact.open(exact["xnnpack"]).manifest.spec)
    right = build.compile(
        spec, target="mlir", checkpoint=exact["xnnpack"].parent / "checkpoint", out=tmp_path / "mlir"
    ).folder
    wrong, checkpoint = mlir_fault(right, tmp_path / "wrong"), exact["xnnpack"].parent / "checkpoint"
    report = verify_agreement(wrong, [str(exact["metal"]), str(exact["xnnpack"])], checkpoint=checkpoint, tokens=32)
    assert report.odd == ("mlir",)
    assert verify_agreement(right, [str(exact["metal"])], tokens=32).passed


def test_a_selection_of_other_experts_is_named(exact: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits agree, the experts that are said to have made them do not."""

    class Other(Tampered):
        def take_traces(self) -> Any:
            from dataclasses import replace

            return [replace(t, indices_TK=(t.indices_TK + 1) % 8) for t in self._session.take_traces()]

    tamper(monkeypatch, "metal", lambda session: Other(session, lambda x: x))
    report = verify_agreement(exact["xnnpack"], others(exact, "metal", "onnx"), tokens=TOKENS)
    assert report.odd == ("metal",)
    assert all(c.name.endswith(": experts") for c in report.failures)


def test_two_that_disagree_name_nobody(exact: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    tamper(monkeypatch, "xnnpack", lambda session: Tampered(session, lambda x: x + np.float32(0.1)))
    report = verify_agreement(exact["xnnpack"], ["xnnpack"], tokens=12)
    assert report.exit_status == 1
    assert report.undecided
    assert "xnnpack and eager disagree" in report.verdict()


def test_values_that_are_not_finite_agree_with_nobody(exact: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(logits: np.ndarray) -> np.ndarray:
        logits.reshape(-1)[3] = np.nan
        return logits

    tamper(monkeypatch, "onnx", lambda session: Tampered(session, spoil))
    report = verify_agreement(exact["xnnpack"], others(exact, "metal", "onnx"), tokens=12)
    assert report.odd == ("onnx",)
    json.dumps(report.to_json(), allow_nan=False)


def test_a_target_that_breaks_off_is_named(exact: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def die(_: Any) -> Any:
        raise RunError("the compiled program ended: killed by signal 6")

    tamper(monkeypatch, "metal", lambda session: Tampered(session, die))
    report = verify_agreement(exact["xnnpack"], others(exact, "metal", "onnx"), tokens=12)
    assert report.exit_status == 1
    assert report.odd == ("metal",)
    assert "killed by signal 6" in report.text()


# --- who cannot take part -------------------------------------------------------------------------------------------


def test_a_target_without_its_extra_is_listed(exact: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(session: Any) -> Any:
        session.close()
        raise MissingExtra("executing a Metal artifact needs mlx", remedy="pip install 'moec[metal]'")

    tamper(monkeypatch, "metal", refuse)
    report = verify_agreement(exact["xnnpack"], others(exact, "metal", "onnx"), tokens=12)
    assert report.passed
    assert "pip install 'moec[metal]'" in report.unavailable["metal"]
    assert "not available: metal: " in report.text()
    assert {row.a for row in report.rows} | {row.b for row in report.rows} == {"xnnpack", "onnx", "eager"}


def test_names_and_folders_are_checked_before_anything_runs(
    exact: dict[str, Path], rounded: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "load_exact", lambda a: pytest.fail("ran"))
    with pytest.raises(UserError, match="'metl' is neither a target nor an artifact folder"):
        verify_agreement(exact["xnnpack"], ["metl"])
    other = prepare_other(tmp_path)
    with pytest.raises(ArtifactError, match="is not of the model and checkpoint"):
        verify_agreement(exact["xnnpack"], [str(other)])


def prepare_other(folder: Path) -> Path:
    """An artifact's manifest of another checkpoint: enough to be refused."""
    spec = Spec.model_validate({"name": "b", "model": {**MODEL, "vocab_size": 401}, "quantization": FLOAT,
                                "targets": TARGETS})  # fmt: skip
    synthesize(spec, folder / "checkpoint", seed=6)
    return build.compile(spec, target="metal", checkpoint=folder / "checkpoint", out=folder / "metal").folder


def test_the_command(exact: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    against = f"{exact['metal']}, {exact['onnx']}"
    line = ["verify", str(exact["xnnpack"]), "--against", against, "--tokens", "24", "-q"]
    assert run([*line, "--json", str(tmp_path / "r.json"), "--junit", str(tmp_path / "r.xml")]) == 0
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith("agreed: xnnpack, metal, onnx, eager")
    document = json.loads((tmp_path / "r.json").read_text())
    assert document["kind"] == "agreement"
    assert document["odd_one_out"] == []
    assert len(document["pairs"]) == 6
    assert document["unavailable"] == {}
    suite = ElementTree.parse(tmp_path / "r.xml").getroot().find("testsuite")
    assert suite is not None
    assert suite.get("failures") == "0"
    assert len(suite) == len(document["checks"]) >= 12
    for wrong, said in ((["--against", " , "], "names no target"), (["--against", "nobody"], "neither a target")):
        assert run(["verify", str(exact["xnnpack"]), *wrong]) == 2
        err = capsys.readouterr().err
        assert said in err
        assert len(err.splitlines()) == 1


# --- arithmetic of the verdict --------------------------------------------------------------------------------------

NAMES = ("a", "b", "c", "d", "e")


@given(st.sets(st.sampled_from(NAMES), max_size=1))
def test_one_that_disagrees_with_all_is_the_odd_one(odd: set[str]) -> None:
    pairs = [(x, y) for x, y in combinations(NAMES, 2) if odd & {x, y}]
    assert odd_ones_out(pairs) == (sorted(odd), False)


@settings(max_examples=300)
@given(st.sets(st.sampled_from(list(combinations(NAMES, 2)))))
def test_no_disagreement_goes_unexplained(pairs: set[tuple[str, str]]) -> None:
    """Either those named account for every disagreement, or the verdict says that it is undecided."""
    odd, undecided = odd_ones_out(sorted(pairs))
    left = [p for p in pairs if not set(p) & set(odd)]
    assert undecided == bool(left)
    assert len(odd) == len(set(odd)) < len(NAMES)


def test_a_row_after_a_tie_is_left_out_and_counted() -> None:
    x = np.ones((4, 3), np.float32)
    y = x.copy()
    y[2:] += 0.5
    tied = {"p": np.array([False, True, False, False])}
    runs = [agreement.Run({"p": v}, None) for v in (x, y)]
    assert row_distance(*runs, tied) == (0.0, 2)
    worst, left_out = row_distance(*runs, {"p": np.zeros(4, bool)})
    assert (worst, left_out) == (pytest.approx(0.5 / 1.5), 0)
    y[3] = np.inf
    assert row_distance(*runs, tied) == (np.inf, 1)
