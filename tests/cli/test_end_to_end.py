"""Everything through the command line: compile, inspect, verify, run; and every kind of bad input on the way.

Whatever is wrong: exit status 2, one line on stderr that names the file, nothing on stdout, and a good artifact that
stood at --out still stands.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moec.cli import main as cli
from tests.conftest import Moec, refused
from tests.tiny import TinyModels, tiny_text

SPECS = Path(__file__).parents[2] / "specs" / "models"
PROMPT = "The quick brown fox"
CONTEXT = 96


@pytest.fixture(scope="module")
def line(tiny: TinyModels) -> Path:
    """A folder with spec.yaml, a QAT checkpoint and the artifact compiled from both."""
    return tiny(tiny_text(context=CONTEXT), named=True)


def digest(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_inspect(moec: Moec, line: Path) -> None:
    status, out, err = moec("inspect", line / "artifact")
    assert (status, err) == (0, "")
    assert "mobilemoe-tiny for xnnpack" in out
    assert "expert" in out
    methods = re.search(r"^forward +\d+ +0 +[\d.]+ kB +[\d.]+ kB$", out, re.MULTILINE)
    assert methods, "instructions, delegate calls, activations and caches of a method"
    assert re.search(r"^moec::fused_moe_packed\.out +\d+$", out, re.MULTILINE)
    manifest = json.loads(moec("inspect", line / "artifact", "--json")[1])
    assert manifest["target"] == "xnnpack"
    assert manifest["model"]["context"] == CONTEXT
    assert {f["name"] for f in manifest["files"]} >= {"model.pte", "tokenizer.json"}
    assert manifest["sizes_by_role"]["expert"] > manifest["sizes_by_role"]["router"] > 0


def test_run_streams_the_same_text_twice(moec: Moec, line: Path) -> None:
    command = ("run", line / "artifact", "--prompt", PROMPT, "--max-new-tokens", 12)
    status, out, err = moec(*command)
    assert status == 0, err
    assert "tok/s" in err
    assert moec(*command)[1] == out
    found = json.loads(moec(*command, "--json")[1])
    assert found["new_tokens"] == len(found["ids"]) <= 12
    assert found["text"] + "\n" == out
    sampled = (*command, "--temperature", 1.5, "--top-p", 0.9, "--json", "--seed")
    first, again, other = (json.loads(moec(*sampled, seed)[1])["ids"] for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_run_with_ids(moec: Moec, line: Path) -> None:
    status, out, err = moec("run", line / "artifact", "--ids", "5,6,7", "--max-new-tokens", 4)
    assert status == 0, err
    assert 1 <= len(out.strip().split(",")) <= 4


def test_run_stops_at_the_context(moec: Moec, line: Path) -> None:
    ids = ",".join(["9"] * (CONTEXT - 3))
    found = json.loads(moec("run", line / "artifact", "--ids", ids, "--max-new-tokens", 50, "--json")[1])
    assert found["stopped"] in ("context", "stop token")
    assert found["new_tokens"] <= 4  # the last of them is never fed back


def test_verify(moec: Moec, line: Path, tmp_path: Path) -> None:
    status, out, err = moec("verify", line / "artifact", "--json", tmp_path / "report.json", "--quiet")
    assert status == 0, out + err
    assert json.loads((tmp_path / "report.json").read_text())["passed"] is True


def test_compile_prints_json(moec: Moec, line: Path, tmp_path: Path) -> None:
    status, out, err = moec("compile", line / "spec.yaml", "--out", tmp_path / "again", "--json", "--quiet")
    assert status == 0, err
    found = json.loads(out)
    assert Path(found["artifact"]) == tmp_path / "again"
    assert found["bytes"] == sum(f["bytes"] for f in found["manifest"]["files"])
    # the same input gives the same program, whenever and wherever it is compiled
    assert digest(tmp_path / "again")["model.pte"] == digest(line / "artifact")["model.pte"]


# Requests that an artifact cannot serve.
@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--ids", "5,4096"], ["4096", "token"]),
        (["--ids", "-1"], ["-1", "token"]),
        (["--ids", str(1 << 40)], [str(1 << 40), "token"]),
        (["--ids", ",".join(["5"] * (CONTEXT + 1))], [str(CONTEXT), "context"]),
        (["--prompt", "word " * 500], [str(CONTEXT), "context"]),
        (["--prompt", "x", "--tokenizer", "nowhere.json"], ["nowhere.json", "tokenizer"]),
    ],
    ids=["above", "below", "far above", "long ids", "long text", "tokenizer"],
)
def test_bad_requests(moec: Moec, line: Path, options: list[str], parts: list[str]) -> None:
    refused(moec("run", line / "artifact", *options), *parts)


# Artifacts that are damaged.
def _cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def _scribble(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.seek(16)
        stream.write(b"\xff" * 64)


def _edit_manifest(**changes: object) -> Callable[[Path], None]:
    def edit(file: Path) -> None:
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return edit


DAMAGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "program cut": ("model.pte", _cut),
    "program scribbled": ("model.pte", _scribble),
    "program missing": ("model.pte", Path.unlink),
    "program empty": ("model.pte", lambda file: file.write_bytes(b"") and None),
    "manifest cut": ("manifest.json", _cut),
    "manifest missing": ("manifest.json", Path.unlink),
    "manifest is a list": ("manifest.json", lambda file: file.write_text("[]") and None),
    "manifest of the future": ("manifest.json", _edit_manifest(format=99)),
    "manifest without model": ("manifest.json", _edit_manifest(model=None)),
    "manifest points elsewhere": (
        "manifest.json",
        _edit_manifest(files=[{"name": "../x", "bytes": 1, "sha256": "", "head_sha256": ""}]),
    ),
    "manifest of an unknown target": ("manifest.json", _edit_manifest(target="abacus")),
    "tokenizer damaged": ("tokenizer.json", lambda file: file.write_text("{}") and None),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_artifacts(moec: Moec, line: Path, tmp_path: Path, damage: str) -> None:
    shutil.copytree(line / "artifact", tmp_path / "artifact")
    name, harm = DAMAGES[damage]
    harm(tmp_path / "artifact" / name)
    refused(moec("run", tmp_path / "artifact", "--prompt", PROMPT), str(tmp_path / "artifact"))


# Checkpoints that are damaged or contradict the spec.
GATE_UP = "model.layers.1.feed_forward.experts.gate_up_qweight"
ROUTER = "model.layers.0.feed_forward.router.weight"


def _tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return harm


def _config(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return harm


HARMS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "tensor missing": (_tensors(lambda t: t.pop(GATE_UP)), [GATE_UP]),
    "tensor of wrong shape": (_tensors(lambda t: t.update({GATE_UP: t[GATE_UP][1:].clone()})), [GATE_UP]),
    "tensor of wrong type": (_tensors(lambda t: t.update({GATE_UP: t[GATE_UP].to(torch.int32)})), [GATE_UP]),
    "router of wrong type": (_tensors(lambda t: t.update({ROUTER: t[ROUTER].to(torch.int64)})), [ROUTER]),
    "file cut": (lambda folder: _cut(folder / "model.safetensors"), ["model.safetensors"]),
    "file empty": (lambda folder: (folder / "model.safetensors").write_bytes(b""), ["model.safetensors"]),
    "file missing": (lambda folder: (folder / "model.safetensors").unlink(), []),
    "config missing": (lambda folder: (folder / "config.json").unlink(), ["config.json"]),
    "config damaged": (lambda folder: _cut(folder / "config.json"), ["config.json"]),
    "unknown format": (_config(lambda c: c["quantization"].update(format="other-int3")), ["other-int3"]),
    "other layers": (_config(lambda c: c.update(num_hidden_layers=3, no_rope_layers=[1] * 3)), ["layers", "3"]),
    "other experts": (_config(lambda c: c.update(num_local_experts=8)), ["experts", "8"]),
    "other scale": (_config(lambda c: c.update(routed_scaling_factor=1.0)), ["scal"]),
}


@pytest.mark.parametrize("harm", HARMS)
def test_bad_checkpoints(moec: Moec, line: Path, tmp_path: Path, harm: str) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(line / "checkpoint", folder)
    shutil.copytree(line / "artifact", tmp_path / "good")
    HARMS[harm][0](folder)
    command = ("compile", line / "spec.yaml", "--checkpoint", folder, "--out", tmp_path / "good", "--quiet")
    refused(moec(*command), str(folder), *HARMS[harm][1])
    assert digest(tmp_path / "good") == digest(line / "artifact")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", "good"]


def test_no_checkpoint(moec: Moec, line: Path, tmp_path: Path) -> None:
    refused(moec("compile", SPECS / "mobilemoe-tiny.yaml", "--out", tmp_path / "a", "--quiet"), "checkpoint")
    missing = tmp_path / "nowhere"
    refused(
        moec("compile", line / "spec.yaml", "--checkpoint", missing, "--out", tmp_path / "a", "--quiet"), str(missing)
    )
    assert list(tmp_path.iterdir()) == []


def test_targets(moec: Moec, line: Path, tmp_path: Path) -> None:
    refused(
        moec("compile", line / "spec.yaml", "--target", "xnnpak", "--out", tmp_path / "a", "--quiet"),
        "xnnpak",
        "xnnpack",
    )


def test_bad_output_folders(moec: Moec, line: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    for out in ("file", "full", "file/below"):
        refused(moec("compile", line / "spec.yaml", "--out", tmp_path / out, "--quiet"), str(tmp_path / out))
    refused(moec("compile", line / "spec.yaml", "--out", "/proc/moec-artifact", "--quiet"), "/proc/moec-artifact")
    assert (tmp_path / "file").read_text() == "mine"
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "full", "thesis.txt"]


def _program(line: Path, out: Path) -> list[str]:
    module = [sys.executable, "-m", "moec"]
    return [*module, "compile", str(line / "spec.yaml"), "--out", str(out), "--quiet"]


def test_a_disk_that_fills_up(line: Path, tmp_path: Path) -> None:
    """A limit on file sizes stands in for the full disk: writing fails half way in the same manner."""
    shutil.copytree(line / "artifact", tmp_path / "good")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    done = subprocess.run(
        _program(line, tmp_path / "good"), preexec_fn=limit, capture_output=True, text=True, check=False
    )
    refused((done.returncode, done.stdout, done.stderr), str(tmp_path))
    assert digest(tmp_path / "good") == digest(line / "artifact")
    assert [p.name for p in tmp_path.iterdir()] == ["good"]


@pytest.mark.parametrize("sent", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL])
def test_interrupted(line: Path, tmp_path: Path, sent: signal.Signals) -> None:
    """Stopped while it writes beside a good artifact: that one stands, and the next compile clears what is left."""
    shutil.copytree(line / "artifact", tmp_path / "good")
    # a shell starts its background jobs with SIGINT ignored, and children inherit that
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(_program(line, tmp_path / "good"), stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.iterdir())) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(sent)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0, "it finished before the signal came"
    assert "Traceback" not in err
    assert digest(tmp_path / "good") == digest(line / "artifact")
    if sent == signal.SIGKILL:
        assert cli.run(_program(line, tmp_path / "good")[3:]) == 0
        (tmp_path / "good.build.json").unlink()
    assert [p.name for p in tmp_path.iterdir()] == ["good"]
