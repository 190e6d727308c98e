"""Models of transformers with latent attention: every layer caches latents, and logits are transformers' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moec.compiler import build
from moec.compiler.ops import CachedAttention, LatentAttention
from moec.compiler.pipeline import PipelineLog, run_passes
from moec.compiler.spec import load_spec
from moec.passes.absorb_latents import absorb_latents
from moec.passes.pipelines import fusion
from moec.sources.transformers_model import TransformersStore, export_transformers
from tests.sources.test_other_families import EIGHT, LATENT, WIDTHS, check_logits, saved
from tests.variants import quick

# model type: config, attention layers
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "deepseek_v2": ({**WIDTHS, **EIGHT, **LATENT, "first_k_dense_replace": 1, "q_lora_rank": None}, 2),
    "deepseek_v3": ({**WIDTHS, **EIGHT, **LATENT, "first_k_dense_replace": 1}, 2),
    "glm4_moe_lite": ({**WIDTHS, **EIGHT, **LATENT, "first_k_dense_replace": 1}, 2),
    "minicpm3": ({**LATENT, "intermediate_size": 48}, 2),
    # transformers fills the padding token's row of a tied table with zeros when it loads one
    "youtu": ({**LATENT, "intermediate_size": 48, "tie_word_embeddings": False}, 2),
}  # fmt: skip


@pytest.mark.parametrize("kind", quick(list(MODELS), ("deepseek_v2", "deepseek_v3")))
def test_latents_are_cached(kind: str, tmp_path: Path) -> None:
    changes, layers = MODELS[kind]
    folder = saved(kind, changes, tmp_path)
    exported = export_transformers(folder, "latent", weights=TransformersStore(folder), max_tokens=16)
    program = run_passes(exported, [*fusion(), absorb_latents()])
    nodes = list(program.graph.nodes)
    assert not [n for n in nodes if CachedAttention.find(n) is not None]
    assert sum(LatentAttention.find(n) is not None for n in nodes) == layers
    rank, rotated = LATENT["kv_lora_rank"], LATENT["qk_rope_head_dim"]
    assert sorted(s.shape[2:] for s in program.states.values()) == sorted([(1, rank), (1, rotated)] * layers)
    check_logits(program, folder)


def test_what_is_not_cached_as_latents_is_said(tmp_path: Path) -> None:
    """A rank of 24 fills no whole registers: keys and values of all heads are cached, and a note says so."""
    folder = saved("deepseek_v3", {**MODELS["deepseek_v3"][0], "kv_lora_rank": 24}, tmp_path)
    text = f"name: odd\nmodel: {{transformers: {folder}, context: 32}}\nquantization: none\n"
    (tmp_path / "odd.yaml").write_text(text + "targets: {xnnpack: {max_tokens: 16}}\n")
    spec = load_spec(tmp_path / "odd.yaml")
    log = PipelineLog()
    program, passes = build.program_and_passes(spec, None, "xnnpack")
    done = build.run_all(program, passes, log=log)
    (note,) = build.expanded_latents(log)
    assert "2 layers, of which the first is" in note
    assert "multiples of 16" in note
    assert [s.shape[2:] for s in done.states.values()] == [(4, 32), (4, 16)] * 2
