"""docs/add-a-target.md, executed: a target of another distribution compiles, benches and says what it lacks."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHAPTER = ROOT / "docs" / "add-a-target.md"
BLOCK = re.compile(r"^```python (\S+)\n(.*?)^```$", re.M | re.S)
FILES = dict(BLOCK.findall(CHAPTER.read_text("utf-8")))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder on the import path that holds the chapter's package, its entry point, and a tiny checkpoint."""
    folder = tmp_path_factory.mktemp("site")
    assert set(FILES) == {f"their_target/{name}.py" for name in ("options", "footprint", "target")}
    for name, body in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(body)
    (folder / "their_target" / "__init__.py").write_text("")
    info = folder / "their_target-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-target\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[moec.targets]\nlisting = their_target\n")
    text = (ROOT / "specs/models/mobilemoe-tiny.yaml").read_text("utf-8").split("training:")[0]
    text = re.sub(r"^targets:.*?(?=^\S|\Z)", "", text, flags=re.M | re.S).replace("layers: 4", "layers: 1")
    (folder / "a.yaml").write_text(text + "\ntargets: {listing: {weights: true}}\n")
    done = moec(folder, "checkpoint", "synthesize", "a.yaml", "--out", "weights", "--qat", "--quiet")
    assert done.returncode == 0, done.stderr
    done = moec(folder, "compile", "a.yaml", "--checkpoint", "weights", "--out", "artifact", "--quiet")
    assert done.returncode == 0, done.stderr
    return folder


def moec(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT / "src"), str(folder)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "moec", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_it_compiles_with_its_own_options(site: Path) -> None:
    text = (site / "artifact" / "graph.txt").read_text("utf-8")
    assert "moec.fused_moe_q" in text
    assert "model.layers.0.feed_forward" in text.splitlines()[-1] or "model.norm" in text


def test_inspect_shows_its_table(site: Path) -> None:
    done = moec(site, "inspect", "artifact")
    assert done.returncode == 0, done.stderr
    assert "Listing" in done.stdout


def test_damaged_facts_are_refused_by_the_field(site: Path, tmp_path: Path) -> None:
    manifest = json.loads((site / "artifact" / "manifest.json").read_text("utf-8"))
    manifest["details"]["nodes"] = "many"
    copy = tmp_path / "artifact"
    copy.mkdir()
    (copy / "manifest.json").write_text(json.dumps(manifest))
    for file in (site / "artifact").iterdir():
        if file.name != "manifest.json":
            (copy / file.name).symlink_to(file)
    done = moec(site, "inspect", str(copy))
    assert done.returncode == 2
    assert "damaged: details.nodes" in done.stderr
    assert done.stderr.count("\n") == 1


def test_it_benches(site: Path) -> None:
    done = moec(site, "bench", "artifact", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["isa"] == "text"


@pytest.mark.parametrize(
    ("command", "said"),
    [("profile", "cannot be profiled from here"), ("run", "a listing cannot be run")],
)
def test_what_it_does_not_bring_is_one_line(site: Path, command: str, said: str) -> None:
    words = ["--prompt", "a"] if command == "run" else []
    done = moec(site, command, "artifact", *words)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_it_is_planned_for(site: Path) -> None:
    device = (ROOT / "specs/devices/galaxy-s25.yaml").read_text("utf-8")
    (site / "mine.yaml").write_text(device.replace("backend: xnnpack", "backend: listing"))
    done = moec(site, "plan", "a.yaml", "--device", "./mine.yaml", "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["target"] == "listing"
    assert plan["sizes_checked_with"] == "nothing: a listing is never run"
    assert plan["rates"] is None
    assert plan["decode"][0]["expected_s"] is None
    assert plan["decode"][0]["roofline_s"] > 0
    routed = next(role for role in plan["roles"] if role["role"] == "expert")
    assert routed["bytes"] == routed["parameters"] // 2 + 4 * routed["parameters"] // 32
    shown = moec(site, "plan", "a.yaml", "--device", "./mine.yaml")
    assert "expected: nothing, this backend has not been timed" in shown.stdout


def test_a_device_of_a_target_that_is_not_installed_is_one_line(site: Path, tmp_path: Path) -> None:
    device = (ROOT / "specs/devices/galaxy-s25.yaml").read_text("utf-8")
    (tmp_path / "mine.yaml").write_text(device.replace("backend: xnnpack", "backend: listin"))
    done = moec(site, "plan", "a.yaml", "--device", str(tmp_path / "mine.yaml"))
    assert done.returncode == 2
    assert "unknown target 'listin'; did you mean 'listing'?" in done.stderr
    assert done.stderr.count("\n") == 1
