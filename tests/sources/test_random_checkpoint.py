"""Random checkpoints that are written module by module: every tensor of the model, none left as memory held it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moec.checkpoints.mxfp4 import NAME as MXFP4
from moec.compiler.errors import UserError
from moec.compiler.spec import load_spec
from moec.sources.random_checkpoint import save_random, stream_random
from moec.sources.transformers_config import build_model, read_config
from moec.sources.transformers_model import TransformersStore
from moec.sources.transformers_source import TransformersModel

pytest.importorskip("transformers", reason="needs the transformers extra: pip install 'moec[transformers]'")
FAMILIES = sorted((Path(__file__).parents[2] / "specs" / "families").glob("*.yaml"))


def _config(file: Path) -> Path:
    source = load_spec(file).model
    assert isinstance(source, TransformersModel)
    return source.transformers


@pytest.mark.parametrize("file", FAMILIES, ids=lambda f: f.stem)
def test_every_tensor_is_drawn(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.nn.Module.to_empty

    def damaged(module: torch.nn.Module, *, device: str, recurse: bool = True) -> torch.nn.Module:
        """Memory that was never written holds anything."""
        found = empty(module, device=device, recurse=recurse)
        for value in (*module._parameters.values(), *module._buffers.values()):
            if value is not None and value.is_floating_point():
                with torch.no_grad():
                    value.fill_(torch.nan)
        return found

    monkeypatch.setattr(torch.nn.Module, "to_empty", damaged)
    stream_random(_config(file), tmp_path, seed=1)
    monkeypatch.undo()
    store = TransformersStore(tmp_path)
    store.check(tmp_path)
    assert not store.notes
    with torch.device("meta"):
        model = build_model(read_config(tmp_path), tmp_path)
    spread = model.config.initializer_range
    for name, value in model.state_dict().items():
        found = store.reader(name, tuple(value.shape))()  # which refuses NaN and infinity
        if found.dim() > 1 and "bias" not in name:
            # of at least 64 numbers: within 20% and a half of it for this seed
            assert 0.8 * spread < found.std() < 1.2 * spread, name
            assert abs(found.mean()) < 0.5 * spread, name


def test_spreads_of_tables_and_of_selection(tmp_path: Path) -> None:
    """Each by its own; norms have weights around one, and biases around zero."""
    config = _config(FAMILIES[0].with_name("deepseek-v3.yaml"))
    save_random(config, tmp_path / "one", seed=1, spread=0.1, table_spread=1.0, selection_spread=0.01)
    store = TransformersStore(tmp_path / "one")

    def drawn(name: str, *shape: int) -> torch.Tensor:
        return store.reader(name, shape)()

    assert 0.9 < drawn("model.embed_tokens.weight", 96, 64).std() < 1.1
    assert 0.09 < drawn("lm_head.weight", 96, 64).std() < 0.11
    assert 0 < drawn("model.layers.1.mlp.gate.e_score_correction_bias", 8).abs().max() < 0.05
    save_random(_config(FAMILIES[0].with_name("phi-moe.yaml")), tmp_path / "two", seed=1, spread=0.1)
    store = TransformersStore(tmp_path / "two")
    assert abs(drawn("model.norm.weight", 64).mean() - 1) < 0.1
    assert abs(drawn("model.norm.bias", 64).mean()) < 0.1


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    config = _config(FAMILIES[0].with_name("lfm2-moe.yaml"))
    files = [stream_random(config, tmp_path / name, seed=seed) for name, seed in (("a", 3), ("b", 3), ("c", 4))]
    first, same, other = (Path(folder / "model.safetensors").read_bytes() for folder in files)
    assert first == same != other
    assert (tmp_path / "a" / "config.json").read_bytes() == (config / "config.json").read_bytes()


def test_experts_of_a_config_in_mxfp4_are_codes(tmp_path: Path) -> None:
    """As gpt-oss is released."""
    config = json.loads((_config(FAMILIES[0].with_name("gpt-oss.yaml")) / "config.json").read_text())
    (tmp_path / "shape").mkdir()
    coded = config | {"quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "shape" / "config.json").write_text(json.dumps(coded))
    stream_random(tmp_path / "shape", tmp_path / "out")
    store = TransformersStore(tmp_path / "out")
    store.check(tmp_path / "out")
    layers = config["num_hidden_layers"]
    assert store.notes == (f"{MXFP4} tensors carried bit for bit: {2 * layers}",)
    inputs = config["hidden_size"]
    name = "model.layers.1.mlp.experts.gate_up_proj"
    gate = store.reader(name, (config["num_local_experts"], inputs, 2 * config["intermediate_size"]))()
    assert 0.02 < gate.std() < 0.026
    assert abs(gate.mean()) < 0.002  # of 24,576 numbers


@pytest.mark.parametrize("write", [save_random, stream_random])
def test_a_key_that_the_config_does_not_have(write: object, tmp_path: Path) -> None:
    assert callable(write)
    with pytest.raises(UserError, match="no key num_expert "):
        write(_config(FAMILIES[0].with_name("mixtral.yaml")), tmp_path / "out", changes={"num_expert ": 3})
    assert not (tmp_path / "out").exists()
