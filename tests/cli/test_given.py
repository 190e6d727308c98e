"""A checkpoint folder where a spec is expected, and `moec checkpoint inspect` of what compiles."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from moec.checkpoints.spec_from_config import CONTEXT, spec_from_config
from moec.compiler.errors import CheckpointError
from moec.compiler.spec.loader import parse_spec
from tests.conftest import Moec, refused
from tests.sources import field_checkpoints as field

pytest.importorskip("transformers", reason="needs the transformers extra: pip install 'moec[transformers]'")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("given") / "Tiny-Qwen3"
    field.healthy(found, {**field.MOE, "tie_word_embeddings": True})
    return found


def test_a_folder_stands_for_a_spec(folder: Path, moec: Moec, tmp_path: Path) -> None:
    status, _, err = moec("compile", folder, "--out", tmp_path / "art")
    assert status == 0, err
    printed = yaml.safe_load(err[err.index("# From config.json") :].split("\n\n")[0])
    assert printed["model"] == {"transformers": str(folder)}
    assert printed["quantization"]["weights"] == "int4"
    manifest = json.loads((tmp_path / "art" / "manifest.json").read_text())
    assert manifest["name"] == "Tiny-Qwen3"
    assert manifest["spec"]["quantization"]["group_size"] == 32


def test_the_printed_spec_is_a_spec(folder: Path, moec: Moec, tmp_path: Path) -> None:
    text = spec_from_config(folder)
    assert parse_spec(text).name == "Tiny-Qwen3"
    status, out, _ = moec("checkpoint", "spec", folder)
    assert (status, out) == (0, text)
    longer = tmp_path / "long"
    longer.mkdir()
    (longer / "config.json").write_text(json.dumps({**field.DENSE, "max_position_embeddings": 131072}))
    assert yaml.safe_load(spec_from_config(longer))["model"]["context"] == CONTEXT


def test_what_no_spec_follows_from(moec: Moec, tmp_path: Path) -> None:
    refused(moec("compile", tmp_path, "--out", tmp_path / "art"), "config.json")
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    refused(moec("compile", gguf, "--out", tmp_path / "art"), "GGUF")
    with pytest.raises(CheckpointError, match="GGUF"):
        spec_from_config(tmp_path)


def test_inspect_agrees_with_compile(folder: Path, moec: Moec, tmp_path: Path) -> None:
    """Status 0 and the parameters, the tied table once; what compile refuses is the same line and status 1."""
    import transformers

    status, out, err = moec("checkpoint", "inspect", folder, "--json")
    assert status == 0, err
    found = json.loads(out)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert found["parameters"] == {"total": sum(p.numel() for p in model.parameters())}
    assert "qwen3_moe" in found["architecture"]
    broken = tmp_path / "broken"
    tensors = field.healthy(broken, field.DENSE)
    field.save(broken, {n: t for n, t in tensors.items() if n != "model.norm.weight"})
    status, _, err = moec("checkpoint", "inspect", broken)
    assert status == 1
    assert "model.norm.weight" in err
    refused(moec("compile", broken, "--out", tmp_path / "art", "-q"), err.strip())
