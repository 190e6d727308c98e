"""Numbers of a config.json that no model has are refused by their key, at once; those of published models are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moec.compiler.errors import CheckpointError
from moec.sources.config_limits import check_config
from moec.sources.transformers_config import read_config
from tests.conftest import Moec, refused
from tests.sources import field_checkpoints as field

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"rms_norm_eps": NAN}, "rms_norm_eps: nan"),
        ({"rope_theta": INF}, "rope_theta: inf"),
        ({"time_step_limit": [0.0, NAN]}, "time_step_limit: nan"),
        ({"time_step_limit": [-INF, 1.0]}, "time_step_limit: -inf"),
        ({"text_config": {"rope_parameters": {"full": {"factor": -INF}}}}, "text_config.rope_parameters.full.factor"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: 1000000000 is more than any model has"),
        ({"text_config": {"n_layer": 10**9}}, "text_config.n_layer"),
        ({"num_experts": 1 << 20}, "num_experts"),
        ({"vocab_size": 10**12}, "vocab_size"),
        ({"max_position_embeddings": 1 << 40}, "max_position_embeddings"),
        ({"rope_theta": 10**400}, "rope_theta: 1000"),
        ({"text_config": {"attention_multiplier": -(10**39)}}, "text_config.attention_multiplier: -1000"),
        ({"mlp_sizes": 1, "intermediate_size": [96, 10**100]}, "intermediate_size"),
    ],
)
def test_refused_by_name(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        check_config(keys, "config.json")
    assert f"config.json: {says}" in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "keys",
    [
        {"time_step_limit": [0.0, INF]},  # Granite-4-H, Zamba2
        {"max_position_embeddings": 10_485_760, "vocab_size": 262_400, "num_hidden_layers": 126, "n_layer": 1000},
        {"sliding_window": -1, "pad_token_id": -1, "head_dim": None, "attention_dropout": 0.0, "use_cache": True},
        {"layer_types": ["full_attention"] * 62, "eos_token_id": [1, 106]},
    ],
)
def test_published_ones_pass(keys: dict[str, Any]) -> None:
    check_config(keys, "config.json")


def test_a_config_in_another_file_is_not_read_instead(tmp_path: Path) -> None:
    """transformers takes the one of the newest version that it has reached, wherever it lies."""
    field.healthy(tmp_path / "m", field.DENSE)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.4.0.0.json").write_text(json.dumps({**config, "rope_theta": 5.0, "hidden_act": "relu"}))
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "configuration_files": ["config.4.0.0.json"]}))
    with pytest.raises(CheckpointError, match="names other files as its configuration"):
        read_config(tmp_path / "m")


@pytest.mark.parametrize("change", [{"rms_norm_eps": NAN}, {"num_hidden_layers": 10**9}, {"vocab_size": 10**12}])
@pytest.mark.parametrize("command", ["compile", "inspect"])
def test_one_line_before_anything_is_built(change: dict[str, Any], command: str, tmp_path: Path, moec: Moec) -> None:
    folder = tmp_path / "m"
    field.healthy(folder, field.MOE)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    (key,) = change
    if command == "compile":
        refused(moec("compile", folder, "--out", tmp_path / "out", "-q"), str(folder), key)
        assert not (tmp_path / "out").exists()
    else:
        status, out, err = moec("checkpoint", "inspect", folder)
        assert (status, key in out + err, "Traceback" in err) == (1, True, False), err
