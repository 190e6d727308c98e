"""Families whose layers carry a state: what is fused, and logits equal to transformers' own however a text is cut."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moec.compiler import build
from moec.compiler.dialect import RECURRENT_OPERATORS, operator_name
from moec.compiler.errors import CompileError
from moec.compiler.ops import fused_moe
from moec.compiler.pipeline import run_passes
from moec.compiler.program import Program
from moec.compiler.spec import Spec
from moec.passes.pipelines import fusion
from moec.sources.random_checkpoint import save_random
from moec.sources.transformers_config import auto_model, read_config
from moec.sources.transformers_model import TransformersStore, export_transformers
from tests.interpreter import Interpreter
from tests.variants import quick

transformers = pytest.importorskip(
    "transformers", reason="needs the transformers extra: pip install 'moec[transformers]'"
)

# of the largest logit: fp32 sums in another order, a chunked form against a recurrence; 1e-5 is the most that was seen
TOLERANCE = 1e-4
CONTEXT = 48
COMMON: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96,
    "max_position_embeddings": CONTEXT, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip
MIXED = {"layer_types": ["conv", "conv", "full_attention", "conv"], "intermediate_size": 80}
LINEAR = {
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"], "head_dim": 32,
    "intermediate_size": 80, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 16, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_value_head_dim": 24,
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 6, "num_experts_per_tok": 3}
SHARED = {"shared_expert_intermediate_size": 32}
MAMBA = {
    "mamba_d_state": 12, "mamba_d_head": 16, "mamba_n_heads": 8, "mamba_n_groups": 2, "mamba_expand": 2,
    "mamba_d_conv": 4,
}  # fmt: skip
# family: (config, how often each operator is there, MoE layers)
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, int], int]] = {
    "lfm2": ({**MIXED, "block_auto_adjust_ff_dim": False, "conv_L_cache": 3}, {"short_conv": 3}, 0),
    "lfm2_moe": (
        {**MIXED, **EXPERTS, "num_dense_layers": 1, "conv_L_cache": 4, "conv_bias": True, "use_expert_bias": True},
        {"short_conv": 3},
        3,
    ),
    "qwen3_next": ({**LINEAR, **EXPERTS, **SHARED}, {"short_conv": 3, "gated_delta": 3}, 4),
    "qwen3_5_text": (LINEAR, {"short_conv": 3, "gated_delta": 3}, 0),
    "qwen3_5_moe_text": ({**LINEAR, **EXPERTS, **SHARED}, {"short_conv": 3, "gated_delta": 3}, 4),
    "granitemoehybrid": (
        {
            **MAMBA, "layer_types": ["mamba", "mamba", "attention", "mamba"], "intermediate_size": 32,
            "num_local_experts": 6, "num_experts_per_tok": 2, "shared_intermediate_size": 32,
            "residual_multiplier": 0.5, "position_embedding_type": "nope",
        },
        {"short_conv": 3, "selective_scan": 3},
        4,
    ),
    "nemotron_h": (
        {
            "layers_block_type": ["mamba", "moe", "attention", "moe"], "mamba_num_heads": 8, "mamba_head_dim": 16,
            "ssm_state_size": 12, "n_groups": 2, "head_dim": 16, "intermediate_size": 32, "n_routed_experts": 6,
            "num_experts_per_tok": 2, "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32,
            "n_group": 1, "topk_group": 1, "norm_topk_prob": True,
        },
        {"short_conv": 1, "selective_scan": 1},
        2,
    ),
}  # fmt: skip

# the others hold the layers of these behind other projections
FAST = ("lfm2", "nemotron_h", "qwen3_next")


def _saved(name: str, folder: Path, **changes: Any) -> Path:
    transformers.AutoConfig.for_model(name, **{**COMMON, **FAMILIES[name][0], **changes}).save_pretrained(
        folder / "config"
    )
    return save_random(folder / "config", folder / "model", seed=3)


def _program(folder: Path) -> Program:
    return run_passes(export_transformers(folder, "tiny", weights=TransformersStore(folder), max_tokens=16), fusion())


def _expected(folder: Path, ids: torch.Tensor) -> np.ndarray:
    model = auto_model(read_config(folder)).from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(ids[None], use_cache=False).logits[0].numpy()  # type: ignore[no-any-return]


def _ids(count: int = CONTEXT) -> torch.Tensor:
    return torch.randint(0, 96, (count,), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", quick(FAMILIES, FAST))
def test_fused_and_equal(name: str, tmp_path: Path) -> None:
    folder = _saved(name, tmp_path)
    program = _program(folder)
    found = Counter(
        operator_name(n).partition("::")[2] for n in program.graph.nodes if operator_name(n) in RECURRENT_OPERATORS
    )
    assert found == FAMILIES[name][1]
    assert sum(n.target is fused_moe for n in program.graph.nodes) == FAMILIES[name][2]
    assert all(state.layer for state in program.states.values())
    ids = _ids(23)
    run = Interpreter(program)
    run(ids[None, :4], torch.tensor([0]))  # another text before: position 0 begins anew
    parts = [run(ids[None, a:b], torch.tensor([a])) for a, b in itertools.pairwise([0, 9, 10, 11, 23])]
    expected = _expected(folder, ids)
    assert np.abs(torch.cat(parts, 1)[0].numpy() - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_artifact(name: str, tmp_path: Path) -> None:
    """Prefill, single steps, chunks of five, after a reset, all to the end of the context."""
    folder = _saved(name, tmp_path)
    raw = {"name": "tiny", "model": {"transformers": str(folder)}, "quantization": "none"}
    artifact = build.compile(
        Spec.model_validate({**raw, "targets": {"xnnpack": {"max_tokens": 16}}}), out=tmp_path / "a"
    )
    ids = _ids()
    expected = _expected(folder, ids)
    session = build.load(artifact)
    runs = [session.prefill(ids.tolist(), logits="all")]
    session.reset()
    runs.append(np.stack([session.decode(token) for token in ids.tolist()]))
    session.reset()
    runs.append(np.concatenate([session.prefill(ids[i : i + 5].tolist(), logits="all") for i in range(0, CONTEXT, 5)]))
    session.reset()
    session.prefill(ids[:7].tolist())
    session.reset()
    runs.append(session.prefill(ids.tolist(), logits="all"))
    session.close()
    for found in runs:
        assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()
    states = json.loads((tmp_path / "a" / "manifest.json").read_text())["states"]
    assert any(s["update"] == "shifted along 1" for s in states)


@pytest.mark.parametrize("target", quick(["metal", "onnx", "mlir"], ("onnx",)))
def test_a_target_without_the_operator_names_the_layer(target: str, tmp_path: Path) -> None:
    folder = _saved("lfm2", tmp_path)
    raw = {"name": "tiny", "model": {"transformers": str(folder)}, "quantization": "none", "targets": {target: {}}}
    with pytest.raises(CompileError, match=r"short_conv") as caught:
        build.compile(Spec.model_validate(raw), out=tmp_path / "a")
    assert "layers.0.conv" in str(caught.value.place)
    assert "layers with a recurrent state" in str(caught.value.remedy)
    assert not (tmp_path / "a").exists()
