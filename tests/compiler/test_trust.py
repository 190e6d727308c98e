"""What an artifact, a manifest or a spec names is never run unless the user says so, and is run when they do."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moec.compiler import build
from moec.compiler.artifact import MANIFEST, Artifact
from moec.compiler.errors import TrustError
from moec.compiler.spec import Spec
from moec.compiler.trust import require_trust, trust, trusting
from tests.conftest import Moec, refused

MODEL = {
    "architecture": "mobilemoe", "layers": 1, "d_model": 32, "heads": 2, "kv_heads": 1, "head_dim": 16,
    "vocab_size": 300, "context": 32, "qk_norm": True, "rope": {"theta": 10000.0, "interleaved": True},
    "moe": {"experts": 4, "top_k": 2, "expert_width": 32, "shared_width": 32, "scale": 1.0},
}  # fmt: skip


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from moec.checkpoints.synthesize import synthesize

    folder = tmp_path_factory.mktemp("trust")
    spec = Spec.model_validate({"name": "t", "model": MODEL, "quantization": "none", "targets": {"xnnpack": {}}})
    synthesize(spec, folder / "checkpoint", seed=1)
    return build.compile(spec, checkpoint=folder / "checkpoint", out=folder / "artifact").folder


class _Planted:
    """Unpickling it leaves a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def planted(tmp_path: Path) -> tuple[Path, Callable[[], bool]]:
    """A folder with a python module and a .pt2 that leave a mark when they are run, and whether one did."""
    mark, folder = tmp_path / "it-ran", tmp_path / "planted"
    folder.mkdir()
    code = f"import pathlib\npathlib.Path({str(mark)!r}).touch()\nraise SystemExit(0)\n"
    (folder / "planted_module.py").write_text(code)
    with zipfile.ZipFile(folder / "planted.pt2", "w") as archive:
        for name in ("version", "serialized_exported_program.json"):
            archive.writestr(f"planted/{name}", "1")
        archive.writestr("planted/serialized_state_dict.pt", pickle.dumps(_Planted(mark)))
    return folder, mark.exists


def renamed_model(artifact: Path, out: Path, model: dict[str, str], checkpoint: Path) -> Path:
    """A copy of an artifact whose manifest says that its model is code."""
    import shutil

    shutil.copytree(artifact, out)
    raw = json.loads((out / MANIFEST).read_text())
    raw["spec"]["model"] = model
    (out / MANIFEST).write_text(json.dumps(raw))
    return out


CODE = [
    pytest.param({"python": "planted_module:build"}, id="python"),
    pytest.param({"exported_program": "{folder}/planted.pt2"}, id="pt2"),
]


@pytest.mark.parametrize("model", CODE)
def test_an_artifact_that_names_code_runs_none_of_it(
    model: dict[str, str], artifact: Path, tmp_path: Path, moec: Moec, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, it_ran = planted(tmp_path)
    monkeypatch.chdir(folder)
    named = {key: value.format(folder=folder) for key, value in model.items()}
    place = folder / "planted.pt2" if "exported_program" in model else folder
    hostile = renamed_model(artifact, tmp_path / "hostile", named, place)
    refused(moec("verify", hostile, "--checkpoint", place, "-q"), "--trust", "planted")
    refused(moec("verify", hostile, "--against", "metal", "--checkpoint", place, "-q"), "--trust", "planted")
    status, _, err = moec("report", hostile, "--out", tmp_path / "page.html", "-q")
    assert status == 0, err
    assert not it_ran()
    page = (tmp_path / "page.html").read_text()
    assert "passed" not in page.partition("verification")[2][:40]


@pytest.mark.parametrize("model", CODE)
@pytest.mark.parametrize("command", ["compile", "explain", "verify", "bisect"])
def test_a_spec_that_names_code_runs_none_of_it(
    model: dict[str, str], command: str, tmp_path: Path, moec: Moec, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, it_ran = planted(tmp_path)
    monkeypatch.chdir(folder)
    ((key, value),) = model.items()
    named = value.format(folder=folder)
    text = f"name: own\nmodel: {{{key}: '{named}'}}\nquantization: none\ntargets: {{xnnpack: {{}}}}\n"
    (tmp_path / "spec.yaml").write_text(text)
    refused(moec(command, tmp_path / "spec.yaml"), "--trust", "planted")
    assert not it_ran()
    with pytest.raises(TrustError, match="trust=True"):
        build.compile(tmp_path / "spec.yaml", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_with_trust_it_is_run(tmp_path: Path, moec: Moec, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = tmp_path / "it-ran"
    code = f"import pathlib\nfrom tests.sources.own_models import cached\npathlib.Path({str(mark)!r}).touch()\n"
    (tmp_path / "trusted_module.py").write_text(code)
    spec = tmp_path / "spec.yaml"
    spec.write_text("name: own\nmodel: {python: 'trusted_module:cached'}\nquantization: none\ntargets: {xnnpack: {}}\n")
    monkeypatch.chdir(tmp_path)
    status, _, err = moec("explain", spec, "--trust")
    assert status == 0, err
    assert mark.exists()
    refused(moec("explain", spec), "--trust")  # one command's trust is not the next one's


def test_an_mlir_artifact_is_not_run(artifact: Path, tmp_path: Path, moec: Moec) -> None:
    """The target is the manifest's to name: an artifact that was said to be harmless may be one of another target."""
    import shutil

    hostile = tmp_path / "hostile"
    shutil.copytree(artifact, hostile)
    raw = json.loads((hostile / MANIFEST).read_text())
    raw["target"] = "mlir"
    (hostile / MANIFEST).write_text(json.dumps(raw))
    refused(moec("run", hostile, "--ids", "1,2"), "--trust", "MLIR", str(hostile))
    with pytest.raises(TrustError):
        build.load(hostile)
    with pytest.raises(TrustError):
        build.load_exact(Artifact.open(hostile))


def test_trust_ends_where_it_was_given() -> None:
    with pytest.raises(TrustError):
        require_trust("it runs code", place="x")
    with trusting():
        require_trust("it runs code", place="x")
        with trusting(False):  # adds nothing, and takes nothing away
            require_trust("it runs code", place="x")
    with pytest.raises(TrustError, match=r"^x: it runs code; .*--trust"):
        require_trust("it runs code", place="x")
    import contextvars

    def inside() -> None:
        trust()
        require_trust("it runs code", place="x")

    contextvars.copy_context().run(inside)
    with pytest.raises(TrustError):
        require_trust("it runs code", place="x")


def test_the_planted_program_is_what_torch_would_run(tmp_path: Path) -> None:
    """The test above can fail: torch's reader does unpickle what such a file holds."""
    folder, it_ran = planted(tmp_path)
    with zipfile.ZipFile(folder / "planted.pt2") as archive:
        state = archive.read("planted/serialized_state_dict.pt")
    pickle.loads(state)
    assert it_ran()
    assert torch.__version__
