"""`moec bench` over an artifact of a one-layer model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moec.compiler import artifact
from tests.conftest import Moec
from tests.runtime import runtime_model as m


def _write_artifact(folder: Path, target: str) -> Path:
    folder.mkdir()
    m.write_pte(folder / "model.pte")
    model = artifact.ModelRecord(
        name="one-layer",
        vocab_size=m.V,
        context=m.S,
        max_tokens=m.MAX_TOKENS,
        bos_id=1,
        eos_ids=m.EOS_IDS,
        moe_layers=(),
    )
    manifest = artifact.Manifest(
        format=artifact.FORMAT, moec="0", name="one-layer", target=target, spec={}, quantization=None,
        model=model, digests=artifact.Digests(spec="", checkpoint="", graph=""), passes=(),
        files=(artifact.record_file(folder / "model.pte"),), sizes_by_role={}, details={}, versions={},
    )  # fmt: skip
    artifact.write_manifest(folder, manifest)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write_artifact(tmp_path_factory.mktemp("bench") / "artifact", "xnnpack")


def test_json_has_the_keys_that_scripts_read(moec: Moec, folder: Path) -> None:
    status, out, err = moec(
        "bench", folder, "--prefill", 40, "--decode", 6, "--context", "64,128,200", "--threads", 1, "--json"
    )
    assert status == 0, err
    report = json.loads(out)
    assert report["threads"] == 1
    assert report["prefill_tokens"] == 40
    assert report["decode_tokens"] == 6
    assert [c["context"] for c in report["contexts"]] == [64, 128, 200]
    assert report["decode_tokens_per_s"] == report["contexts"][0]["decode_tokens_per_s"]
    for key in ("prefill_tokens_per_s", "decode_tokens_per_s", "load_s", "peak_rss_mb"):
        assert report[key] > 0


def test_table_and_defaults_fit_a_short_context(moec: Moec, folder: Path) -> None:
    status, out, err = moec("bench", folder, "--repeats", 1)
    assert status == 0, err
    assert "one-layer" in out
    assert "prefill" in out
    # 64 tokens are decoded, so the default prompt of 512 shrinks to what the context of 256 leaves
    assert " 192 " in out


def test_tokens_from_a_file(moec: Moec, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "ids").write_text("[1, 2, 3]")
    status, out, err = moec("bench", folder, "--tokens", tmp_path / "ids", "--decode", 2, "--json")
    assert status == 0, err
    assert json.loads(out)["prefill_tokens"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--context", "64,x"], "--context: x is not a position of this model"),
        (["--context", "64,"], "--context: an empty entry is not a position"),
        (["--context", str(m.S)], f"give positions from 1 to {m.S - 1}"),
        (["--prefill", str(m.S + 1)], f"a prompt of {m.S + 1} tokens exceeds the model's context of {m.S}"),
        (["--decode", str(m.S)], f"exceed the model's context of {m.S}"),
        (["--tokens", "/nonexistent"], "/nonexistent: cannot be read"),
    ],
)
def test_refuses(moec: Moec, folder: Path, arguments: list[str], message: str) -> None:
    status, out, err = moec("bench", folder, *arguments)
    assert (status, out) == (2, "")
    assert message in err.splitlines()[-1]


@pytest.mark.parametrize(("text", "message"), [("1 x", "'x' is not a token id"), ("", "there are no token ids")])
def test_refuses_a_file_of_something_else(moec: Moec, folder: Path, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "ids").write_text(text)
    status, _, err = moec("bench", folder, "--tokens", tmp_path / "ids")
    assert status == 2
    assert message in err


def test_a_target_that_does_not_run_here(moec: Moec, tmp_path: Path) -> None:
    status, _, err = moec("bench", _write_artifact(tmp_path / "artifact", "metal"))
    assert status == 2
    assert "an artifact for metal cannot be timed on this machine" in err


def test_a_target_that_is_not_installed(moec: Moec, tmp_path: Path) -> None:
    status, _, err = moec("bench", _write_artifact(tmp_path / "artifact", "elsewhere"))
    assert status == 2
    assert "is for target 'elsewhere', which is not installed" in err
