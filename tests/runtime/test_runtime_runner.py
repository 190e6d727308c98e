"""The runner binary: what it computes, what it reports, and what it refuses."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from moec.runtime import native
from moec.targets.xnnpack.session import CpuSession
from tests.runtime import runtime_model as m


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runtime") / "model.pte"
    m.write_pte(path)
    return path


def _run(*arguments: object, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [str(native.runner_binary()), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, input=stdin)


def test_generates_what_a_session_generates(model: Path, tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, m.V, 21).tolist()
    (tmp_path / "prompt.json").write_text(json.dumps(ids))
    done = _run(model, "--tokens", tmp_path / "prompt.json", "--decode", 12, "--threads", 2, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    expected = []
    with CpuSession(model, threads=2) as session:
        logits = session.prefill(ids)[0]
        for _ in range(12):
            expected.append(int(logits.argmax()))
            logits = session.decode(expected[-1])
    assert report["generated"] == expected
    text = _run(model, "--tokens", "-", "--decode", 12, stdin=" ".join(map(str, ids)))
    assert [int(t) for t in text.stdout.splitlines()[0].split()] == expected
    assert "tokens/s" in text.stdout


def test_report(model: Path) -> None:
    done = _run(model, "--prompt-length", 50, "--decode", 5, "--context", 100, "--repeats", 3, "--threads", 1, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["threads"] == 1
    assert report["prefill_tokens"] == 50
    assert report["decode_start"] == 100
    assert report["decode_tokens"] == 5
    assert len(report["prefill_s"]) == len(report["decode_s"]) == report["repeats"] == 3
    assert report["prefill_tokens_per_s"] == pytest.approx(50 / sorted(report["prefill_s"])[1], rel=1e-3)
    assert report["decode_tokens_per_s"] == pytest.approx(5 / sorted(report["decode_s"])[1], rel=1e-3)
    assert report["file_bytes"] == model.stat().st_size
    assert 1 < report["peak_rss_mb"] < 1000
    assert 0 < report["load_s"] < 60


def test_it_decodes_the_ids_that_follow(model: Path) -> None:
    ids = np.random.default_rng(1).integers(0, m.V, 21).tolist()
    text = " ".join(map(str, ids))
    done = _run(model, "--tokens", "-", "--decode", 6, "--follow", "--repeats", 2, "--json", stdin=text)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["generated"] == ids[15:]
    assert (report["prefill_tokens"], report["decode_start"], report["decode_tokens"]) == (15, 15, 6)
    for few in ("1 2 3", "1 2 3 4 5 6"):
        refused = _run(model, "--tokens", "-", "--decode", 6, "--follow", stdin=few)
        assert refused.returncode == 2
        assert "no ids before those to be decoded" in refused.stderr


def test_stop_tokens_end_generation(model: Path) -> None:
    """Runs until a stop token comes or 100 tokens are out; one that came is the last."""
    for seed in range(6):
        arguments = (model, "--prompt-length", 8, "--seed", seed, "--decode", 100, "--json")
        free = json.loads(_run(*arguments).stdout)["generated"]
        stopped = json.loads(_run(*arguments, "--stop").stdout)["generated"]
        ends = [i for i, token in enumerate(free) if token in m.EOS_IDS]
        assert stopped == free[: ends[0] + 1 if ends else None]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no model given"),
        (["MODEL"], "give one of --tokens and --prompt-length"),
        (["MODEL", "--prompt-length", "0"], "not a number from 1 up: 0"),
        (["MODEL", "--prompt-length", "12x"], "not a number from 1 up: 12x"),
        (["MODEL", "--prompt-length", "99999999999999999999"], "not a number"),
        (["MODEL", "--prompt-length"], "not a number from 1 up: nothing"),
        (["MODEL", "--prompt-length", "4", "--colour"], "unknown argument --colour"),
        (["MODEL", "--prompt-length", "4", "--threads", "1000"], "1000 threads: at most 256"),
        (["MODEL", "--prompt-length", str(m.S + 1)], f"exceeds the model's context of {m.S}"),
        (["MODEL", "--prompt-length", "4", "--decode", str(m.S)], f"exceed the model's context of {m.S}"),
        (["MODEL", "--prompt-length", "2000000000"], f"exceeds the model's context of {m.S}"),
        (["MODEL", "--prompt-length", "4", "--follow"], "--follow needs --tokens, and no --context"),
        (["MODEL", "--tokens", "-", "--follow", "--context", "9"], "--follow needs --tokens, and no --context"),
        (["MODEL", "--tokens", "/nonexistent/ids"], "/nonexistent/ids: No such file"),
        (["MODEL", "--tokens", "/"], "/: Is a directory"),
        (["/nonexistent/model.pte", "--prompt-length", "4"], "/nonexistent/model.pte: No such file"),
    ],
)
def test_refuses(model: Path, arguments: list[str], message: str) -> None:
    done = _run(*[str(model) if a == "MODEL" else a for a in arguments])
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 2 x", "not a token id: x"),
        ("", "the prompt is empty"),
        ("-1", "token -1 is not in"),
        ("97", "token 97 is not"),
        ("1 2 3\0 4 5", "not a token id: 3"),
        ("1-2", "not a token id: 1-2"),
    ],
)
def test_refuses_tokens(model: Path, text: str, message: str) -> None:
    done = _run(model, "--tokens", "-", stdin=text)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_help_is_no_error() -> None:
    for option in ("--help", "-h"):
        done = _run(option)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("usage: moec_runner MODEL.pte")


def test_output_that_cannot_be_written_is_an_error(model: Path) -> None:
    with Path("/dev/full").open("w") as full:
        command = [str(native.runner_binary()), str(model), "--prompt-length", "4", "--json"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "could not be written: No space left" in done.stderr
