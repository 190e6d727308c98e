"""`moec report`: what is on the page, what is refused, and the page in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import pytest
import yaml

from moec.compiler.artifact import Artifact
from tests.conftest import Moec

pytest.importorskip("matplotlib", reason="the report's plots need matplotlib (extra: report)")
pytest.importorskip("jinja2", reason="the report's page needs jinja2 (extra: report)")

# of HTML and SVG, those whose value a browser fetches
_LOADING = {"src", "href", "xlink:href", "srcset", "data", "poster", "action", "background"}


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.loads: list[str] = []
        self.attributes: set[str] = set()
        self.scripts = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag in ("script", "iframe", "link", "object", "embed")
        if tag == "section":
            self.ids.append(dict(attrs).get("id") or "")
        self.attributes |= {name for name, _ in attrs}
        self.loads += [value or "" for name, value in attrs if name in _LOADING]


@pytest.fixture(scope="module")
def page(line: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with everything: profile beside the artifact, verification done on the spot, a device."""
    from moec.cli import main as cli

    profile = line / "artifact.profile.json"
    arguments = ["--context", "64,256", "--repeat", "1", "--decode", "8", "--quiet", "--json", str(profile)]
    assert cli.run(["profile", str(line / "artifact"), *arguments]) == 0
    out = tmp_path_factory.mktemp("page") / "page.html"
    assert cli.run(["report", str(line / "artifact"), "--out", str(out), "--device", "galaxy-s25", "--quiet"]) == 0
    profile.rename(line / "kept.json")  # other tests begin without
    return out


def test_page_has_every_section_and_loads_nothing(page: Path) -> None:
    text = page.read_text("utf-8")
    read = Page(text)
    assert read.ids == ["size", "graph", "passes", "verification", "device", "profile", "experts", "origin"]
    assert read.scripts == 0
    assert all(value.startswith(("#", "data:image/png;base64,")) for value in read.loads)
    assert "url(" not in re.sub(r"url\(#[^)]*\)", "", text)
    assert "Not shown" not in text
    for part in (
        "fused_moe_packed",
        "fuse_moe",
        "verified for this page",
        "What quantization cost",
        "Galaxy S25",
        "Real over dummy",
        "sha256",
    ):
        assert part in text
    # every pass, checked on the spot as the artifact is small
    assert "each was checked against its input for this page" in text
    assert text.count('<span class="ok">equal</span>') >= 8
    assert "DIFFERS" not in text
    assert "of it are pages of the file" in text


def test_the_key_names_every_colour_of_the_graphs(page: Path) -> None:
    text = page.read_text("utf-8")
    graphs = text[text.index('<section id="graph">') : text.index('<section id="passes">')]
    key = set(re.findall(r'<i style="background:(#\w+)">', graphs))
    assert key == set(re.findall(r'fill="(#\w+)"', graphs))


def test_both_graphs_are_drawn(page: Path) -> None:
    found = re.search(r"(\d+) operators as exported, (\d+) in the artifact", page.read_text("utf-8"))
    assert found
    assert int(found[1]) > 3 * int(found[2]) > 0


def test_what_is_missing_is_said(moec: Moec, line: Path, tmp_path: Path) -> None:
    """A lone artifact whose checkpoint is gone: the page says what it lacks and how to get it."""
    copy = tmp_path / "lone"
    shutil.copytree(line / "artifact", copy)
    status, out, err = moec("report", copy, "-q")
    assert status == 0, err
    text = Path(out.strip()).read_text("utf-8")
    assert Path(out.strip()) == tmp_path / "lone.report.html"
    assert "no verify.json beside the artifact" in text
    assert "no profile.json beside the artifact" in text
    assert "no device was named" in text


def test_text_of_an_artifact_cannot_become_markup(moec: Moec, line: Path, tmp_path: Path) -> None:
    copy = tmp_path / "artifact"
    shutil.copytree(line / "artifact", copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["notes"] = ["<script>alert(1)</script>"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    record = json.loads((line / "artifact.build.json").read_text())
    record |= {"checkpoint": "<img src=x>", "machine": "<img src=y>"}
    (tmp_path / "artifact.build.json").write_text(json.dumps(record))
    status, _, err = moec("report", copy, "-q", "--out", tmp_path / "page.html")
    assert status == 0, err
    read = Page((tmp_path / "page.html").read_text("utf-8"))
    assert read.scripts == 0
    assert not {"x", "y"} & set(read.loads)


def test_the_title_of_a_device_cannot_become_markup(moec: Moec, line: Path, tmp_path: Path) -> None:
    title = 'x" onload="alert(1)"><script>alert(2)</script><svg a="$\\frac'
    shipped = yaml.safe_load((files("moec") / "specs" / "devices" / "galaxy-s25.yaml").read_text("utf-8"))
    (tmp_path / "device.yaml").write_text(yaml.safe_dump(shipped | {"title": title}))
    status, _, err = moec(
        "report", line / "artifact", "-q", "--device", tmp_path / "device.yaml", "--out", tmp_path / "page.html"
    )
    assert status == 0, err
    read = Page((tmp_path / "page.html").read_text("utf-8"))
    assert read.scripts == 0
    assert "onload" not in read.attributes


def test_evidence_of_another_artifact_is_not_shown(moec: Moec, line: Path, page: Path, tmp_path: Path) -> None:
    profile = json.loads((line / "kept.json").read_text())
    assert profile["contents"] == Artifact.open(line / "artifact").manifest.contents
    profile["contents"] = "0" * 64  # of another artifact of the same spec: its other digests are the same
    other = tmp_path / "other.json"
    other.write_text(json.dumps(profile))
    status, out, err = moec("report", line / "artifact", "--profile", other, "-q", "--out", tmp_path / "x.html")
    assert (status, out) == (2, "")
    assert "other.json: about another artifact (its contents differ)" in err
    assert not (tmp_path / "x.html").exists()


@pytest.mark.parametrize(
    ("option", "content", "message"),
    [
        ("--profile", "{}", "not a profile"),
        ("--profile", "[", "not JSON"),
        ("--profile", "[" * 100_000, "not JSON"),
        ("--verify", '{"kind": "passes", "checks": []}', "not a verification of an artifact"),
        ("--passes", '{"kind": "passes", "checks": [], "about": {"graphs": []}}', "about another spec"),
        ("--passes", '{"kind": "passes", "checks": [], "about": []}', "about another spec"),
        ("--verify", '{"kind": "artifact", "checks": [], "about": 5}', "about another artifact"),
    ],
)
def test_refuses_other_files(moec: Moec, line: Path, tmp_path: Path, option: str, content: str, message: str) -> None:
    (tmp_path / "given.json").write_text(content)
    status, out, err = moec("report", line / "artifact", option, tmp_path / "given.json", "-q")
    assert (status, out) == (2, "")
    assert len(err.strip().splitlines()) == 1
    assert message in err


def test_refuses(moec: Moec, line: Path, tmp_path: Path) -> None:
    for arguments, message in (
        ((line,), "no manifest.json in this folder"),
        ((line / "artifact", "--device", "toaster"), "toaster"),
        ((line / "artifact", "--profile", "/nonexistent"), "/nonexistent: cannot be read"),
        ((line / "artifact", "--out", tmp_path), "is a folder"),
    ):
        status, out, err = moec("report", *arguments)
        assert (status, out, err.count("\n")) == (2, "", 1)  # before any work: no progress is shown
        assert message in err


def test_a_training_run_goes_to_its_own_report(moec: Moec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    written = types.ModuleType("moec.training.report")
    written.write_report = lambda run, page: Path(page).write_text(f"about {Path(run).name}")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "moec.training.report", written)
    status, out, err = moec("report", tmp_path / "run")
    assert (status, err) == (0, "")
    assert Path(out.strip()).read_text() == "about run"
    status, _, err = moec("report", tmp_path / "run", "--device", "x")
    assert status == 2
    assert "--device is for artifacts" in err


# ------------------------------------------------------------------------------------------------------- a real browser

_BROWSER = next((b for b in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if b), None)


def browse(file: Path, folder: Path) -> tuple[list[str], list[str], bytes]:
    """Open a page without a window: (console messages, addresses that the page asked for, screenshot)."""
    assert _BROWSER
    log, picture = folder / "net.json", folder / "page.png"
    command = [
        _BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder / 'user'}", f"--log-net-log={log}",
        "--enable-logging=stderr", "--window-size=1100,4000", f"--screenshot={picture}", file.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=120, check=True)
    console = [text for text in done.stderr.splitlines() if ":CONSOLE" in text]
    text = log.read_text("utf-8", errors="replace")
    try:
        events = json.loads(text)["events"]
    except ValueError:  # the browser ended before it closed the list
        events = json.loads(text.rstrip().rstrip(",") + "]}")["events"]
    asked = []
    for event in events:
        parameters = event.get("params") if isinstance(event.get("params"), dict) else {}
        # what the browser itself wants of its maker has no page as its initiator
        if "url" in parameters and parameters.get("initiator", "not an origin") != "not an origin":
            asked.append(parameters["url"])
    return console, [url for url in asked if not url.startswith(("file:", "data:"))], picture.read_bytes()


@pytest.mark.skipif(_BROWSER is None, reason="no chromium on this machine (Debian: apt-get install chromium)")
def test_in_a_browser(page: Path, tmp_path: Path) -> None:
    console, asked, picture = browse(page, tmp_path)
    assert console == []
    assert asked == []
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 100_000  # an empty page of this size has a few kB


@pytest.mark.skipif(_BROWSER is None, reason="no chromium on this machine (Debian: apt-get install chromium)")
def test_the_browser_would_have_noticed(tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text('<!doctype html><img src="http://127.0.0.1:9/x.png"><script>console.error("oh")</script>')
    console, asked, _ = browse(bad, tmp_path)
    assert any("oh" in text for text in console)
    assert asked
