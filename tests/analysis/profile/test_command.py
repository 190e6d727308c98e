"""`moec profile`: what it prints and writes, what it refuses, and adb by way of a stand-in."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from moec.runtime import native
from tests.conftest import Moec, refused


@pytest.fixture(scope="module")
def found(line: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """A profile of all domains at two contexts, two runs each."""
    from moec.cli import main as cli

    file = tmp_path_factory.mktemp("profile") / "deep" / "profile.json"
    arguments = ["--context", "64,256", "--repeat", "2", "--decode", "8", "--threads", "1", "--quiet"]
    assert cli.run(["profile", str(line / "artifact"), "--json", str(file), *arguments]) == 0
    return dict(json.loads(file.read_text()))


def test_every_stream_at_every_context(found: dict) -> None:
    assert [(r["stream"], r["kind"]) for r in found["runs"]] == [
        ("code", "real"),
        ("knowledge", "real"),
        ("math", "real"),
        ("dummy", "dummy"),
    ]
    for run in found["runs"]:
        assert [p["context"] for p in run["points"]] == [64, 256]
        assert len(run["peak_bytes"]["values"]) == len(run["load_s"]["values"]) == 2
        assert run["decodes"].startswith("the ids that follow")
        for point in run["points"]:
            spread = point["prefill_tokens_per_s"]
            assert spread["min"] <= spread["median"] <= spread["max"]
            assert point["first_token_cold_s"]["min"] > 0
            parts = dict(point["memory"])
            assert parts.pop("resident") == sum(parts.values())
            assert all(count >= 0 for count in parts.values())
    assert found["runs"][-1]["unique_tokens"] == 1


def test_experts_of_each_domain(found: dict) -> None:
    experts = found["experts"]
    assert (experts["layers"], experts["experts"]) == (2, 16)
    for name, domain in experts["domains"].items():
        # 256 tokens in prefill and 8 decoded at each of two points, top 4
        assert domain["selections"] == 2 * 4 * (256 + 2 * 8)
        assert domain["experts_used"] == sum(c > 0 for row in domain["counts"] for c in row)
        assert name in ("code", "knowledge", "math", "dummy")
    assert experts["domains"]["dummy"]["experts_used"] < experts["domains"]["code"]["experts_used"]
    assert [r["context"] for r in found["ratios"]] == [64, 256]
    assert any("touched" in note for note in found["notes"])


def test_structured_routers_tell_domains_apart(found: dict, line: Path, moec: Moec, tmp_path: Path) -> None:
    """With topics the domains' selections differ by more than with clusters drawn by lot."""
    ordinary = tmp_path / "ordinary"
    spec = line / "spec.yaml"
    assert moec("checkpoint", "synthesize", spec, "--out", ordinary, "--seed", 1, "--qat", "-q")[0] == 0
    assert moec("compile", spec, "--checkpoint", ordinary, "--out", tmp_path / "artifact", "-q")[0] == 0
    status, out, err = moec(
        "profile",
        tmp_path / "artifact",
        "--context",
        256,
        "--repeat",
        1,
        "--decode",
        8,
        "--warm",
        0,
        "--json",
        "-",
        "-q",
    )
    assert status == 0, err
    by_lot = json.loads(out)["experts"]["divergence_bits"]
    assert all(found["experts"]["divergence_bits"][pair] > 1.5 * value for pair, value in by_lot.items())


def test_router_option_is_checked(moec: Moec, line: Path, tmp_path: Path) -> None:
    result = moec("checkpoint", "synthesize", line / "spec.yaml", "--out", tmp_path / "x", "--router", "trained")
    refused(result, "--router 'trained' is not known", "clustered or structured")
    assert not (tmp_path / "x").exists()


def test_prints_tables(moec: Moec, line: Path) -> None:
    arguments = ("--prompts", "dummy", "--context", 32, "--repeat", 1, "--decode", 2, "-q")
    status, out, err = moec("profile", line / "artifact", *arguments)
    assert (status, err) == (0, "")
    for part in ("weights touched", "KV cache", "steady RSS", "peak RSS", "first token cold", "Experts reached, of 32"):
        assert part in out
    assert "real over dummy" not in out


def test_own_prompts(moec: Moec, line: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    prompts = [("law", "The parties agree as follows."), ("law", "This clause survives."), ("food", "Boil the rice.")]
    file.write_text("\n".join(json.dumps({"domain": d, "text": t}) for d, t in prompts))
    arguments = ("--prompts", file, "--repeat", 1, "--decode", 3, "--json", "-", "-q")
    status, out, err = moec("profile", line / "artifact", *arguments)
    assert status == 0, err
    found = json.loads(out)
    lengths = {r["stream"]: r["points"][0]["context"] for r in found["runs"]}
    assert lengths["law"] > lengths["food"] > 3
    # the whole prompt is measured, so decoding is the model's own; the dummy has both lengths
    assert {r["decodes"] for r in found["runs"] if r["kind"] == "real"} == {"the model's own choice"}
    dummy = next(r for r in found["runs"] if r["kind"] == "dummy")
    assert {p["context"] for p in dummy["points"]} == {lengths["law"], lengths["food"]}


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--prompts", "/nonexistent/x.jsonl"], ["/nonexistent/x.jsonl: cannot be read"]),
        (["--prompts", "/dev/null"], ["the prompt is empty"]),
        (["--context", "64,"], ["an empty entry is no number of tokens"]),
        (["--context", "100000"], ["exceed the model's context of 512", "give contexts up to 480"]),
        (["--decode", "512"], ["leave no room in a context of 512"]),
        (["--dry-run"], ["add --adb"]),
        (["--runner", "."], ["add --adb"]),
        (["--adb", "--runner", "/nonexistent", "--dry-run"], ["/nonexistent: holds no moec_runner"]),
        (["--repeat", "0"], ["--repeat"]),
    ],
)
def test_refuses(moec: Moec, line: Path, arguments: list[str], parts: list[str]) -> None:
    refused(moec("profile", line / "artifact", *arguments), *parts)


def test_refuses_long_prompts_and_what_is_no_artifact(moec: Moec, line: Path, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("word and another one, " * 400)
    refused(moec("profile", line / "artifact", "--prompts", tmp_path / "long.txt"), "long.txt", "room for 480")
    (tmp_path / "short.txt").write_text("a few words")
    asked = ("profile", line / "artifact", "--prompts", tmp_path / "short.txt", "--context", 200)
    refused(moec(*asked), "a context of 200 asks for more than the", "domain short")
    refused(moec("profile", line), "no manifest.json in this folder")
    refused(moec("profile", line / "spec.yaml"), "is a file, not an artifact folder")


def test_an_artifact_of_another_target(moec: Moec, line: Path, tmp_path: Path) -> None:
    copy = tmp_path / "metal"
    shutil.copytree(line / "artifact", copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "target": "metal"}))
    refused(moec("profile", copy), "an artifact for metal cannot be profiled from here", "`moec inspect` gives")


def test_adb_is_named_when_it_is_absent(
    moec: Moec, line: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    refused(moec("profile", line / "artifact", "--adb"), "adb is not installed", "--dry-run")


def test_dry_run_prints_the_commands(moec: Moec, line: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    runner = native.runner_binary().parent
    arguments = ("--serial", "R5 CX", "--runner", runner, "--dry-run", "--context", 64, "--repeat", 1)
    status, out, err = moec("profile", line / "artifact", *arguments)
    assert (status, err) == (0, "")
    commands = out.splitlines()
    assert all(command.startswith("adb -s 'R5 CX' ") for command in commands)
    verbs = [command.removeprefix("adb -s 'R5 CX' ").split()[0] for command in commands]
    assert verbs[:5] == ["get-state", "shell", "push", "shell", "push"]
    assert verbs[5:] == ["push", "shell", "pull"] * 4  # three domains and the dummy
    assert "--drop-cache" in commands[6]
    assert "--points 64" in commands[6]
    status, out, _ = moec("profile", line / "artifact", *arguments, "--memory-mb", 4000, "--cache-aware", 0.1)
    assert status == 0
    assert "--memory-mb 4000 --eviction lrfu --cache-aware 0.1 > result.json" in out.splitlines()[6]


# Runs what adb would run, with the device's folder moved to one of this machine.
_ADB = """#!{python}
import os, shutil, subprocess, sys
device, log = {device!r}, {log!r}
arguments = sys.argv[1:]
open(log, "a").write(" ".join(arguments[:1]) + "\\n")
here = lambda text: text.replace("/data/local/tmp", device)
verb, *rest = arguments
if verb == "get-state":
    print("device")
elif verb == "shell":
    sys.exit(subprocess.run(here(rest[0]), shell=True).returncode)
elif verb == "push" and rest[0].endswith("/."):
    shutil.copytree(rest[0], here(rest[1]), dirs_exist_ok=True)
elif verb == "push":
    shutil.copyfile(rest[0], here(rest[1]))
elif verb == "pull":
    shutil.copyfile(here(rest[0]), rest[1])
"""


def test_over_adb(moec: Moec, line: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    device, log, tools = tmp_path / "device", tmp_path / "log", tmp_path / "bin"
    device.mkdir()
    tools.mkdir()
    (tools / "adb").write_text(_ADB.format(python=sys.executable, device=str(device), log=str(log)))
    (tools / "adb").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    arguments = ("--adb", "--runner", native.runner_binary().parent, "--prompts", "dummy", "--context", 64)
    arguments += ("--repeat", 2, "--decode", 4, "--json", "-", "-q")
    status, out, err = moec("profile", line / "artifact", *arguments)
    assert status == 0, err
    found = json.loads(out)
    assert found["machine"].startswith("Android device")
    assert found["experts"]["domains"]["dummy"]["selections"] == 2 * 4 * 68
    assert log.read_text().split().count("pull") == 2
    # the model is there now, with the same length: it is not pushed again
    pushed = log.read_text().split().count("push")
    assert moec("profile", line / "artifact", *arguments)[0] == 0
    assert log.read_text().split().count("push") == 2 * pushed - 1
    refusal = moec("profile", line / "artifact", *arguments, "--memory-mb", 1)  # the runner's words
    assert refusal[0] == 2
    said = refusal[2].splitlines()[-1]
    assert said.startswith("adb shell: ")
    assert "a memory budget of 1 MB is less than" in said
    assert said.endswith("; give a larger --memory-mb")


def test_adb_reports_what_the_device_says(
    moec: Moec, line: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "adb").write_text("#!/bin/sh\necho \"error: device 'X' not found\" >&2\nexit 1\n")
    (tmp_path / "adb").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    status, out, err = moec("profile", line / "artifact", "--serial", "X", "--prompts", "dummy", "-q")
    assert (status, out) == (2, "")
    assert "adb get-state: device 'X' not found" in err.splitlines()[-1]
