"""Layers that read the cache of another one (Gemma 3n, Gemma 4): fused, and logits equal to transformers' own."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from moec.compiler.ops import CachedAttention
from moec.compiler.pipeline import run_passes
from moec.passes.pipelines import fusion
from moec.sources.random_checkpoint import save_random
from moec.sources.transformers_config import auto_model, read_config
from moec.sources.transformers_model import TransformersStore, export_transformers
from tests.interpreter import Interpreter

transformers = pytest.importorskip(
    "transformers", reason="needs the transformers extra: pip install 'moec[transformers]'"
)

TOLERANCE = 1e-4  # of the largest logit: fp32 sums in another order, amplified by the many norms of these models
COMMON: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16,
    "vocab_size": 96, "vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 16, "intermediate_size": 96,
    "max_position_embeddings": 48, "sliding_window": 8, "num_kv_shared_layers": 2, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0, "final_logit_softcapping": 30.0,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma4_text": {"global_head_dim": 32, "use_double_wide_mlp": True},
    "gemma3n_text": {"laurel_rank": 8, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0]},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAMILIES)
def test_equal_however_a_text_is_cut(kind: str, tmp_path: Path) -> None:
    transformers.AutoConfig.for_model(kind, **{**COMMON, **FAMILIES[kind]}).save_pretrained(tmp_path / "config")
    folder = save_random(tmp_path / "config", tmp_path / "model", seed=3)
    exported = export_transformers(folder, "sharing", weights=TransformersStore(folder), max_tokens=16)
    program = run_passes(exported, fusion())
    calls = [c for n in program.graph.nodes if (c := CachedAttention.find(n)) is not None]
    assert [c.window for c in calls] == [8, 0, 8, 0]
    assert [c.k_cache for c in calls[2:]] == [c.k_cache for c in calls[:2]]
    assert len(program.states) == 4, "keys and values of two layers"
    model = auto_model(read_config(folder)).from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(3, 96, (1, 23), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        wanted = model(ids, use_cache=False).logits
    run = Interpreter(program)
    for ends in ([0, 9, 10, 11, 23], [0, 5, 10, 15, 20, 23]):  # the second begins anew over what the first left
        got = torch.cat([run(ids[:, a:b], torch.tensor([a])) for a, b in itertools.pairwise(ends)], 1)
        torch.testing.assert_close(got, wanted, atol=TOLERANCE * float(wanted.abs().max()), rtol=0)
