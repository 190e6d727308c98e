"""Artifacts of models with shared experts against the exported model that holds the same codes; wrong decode steps.

The shared expert's gate and up are joined by the passes, so the exported model has neither weight of the joined one.
Before each part of a join was traced to its origin, the reference kept those weights in float, and right INT4 artifacts
failed (cosine 0.985 where the same codes give 0.999).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from moec.analysis.verify.artifact import verify_artifact
from moec.analysis.verify.foreign import before_target, run_chunks
from moec.analysis.verify.interpret import GraphRunner
from moec.analysis.verify.rounding import unrounded_operators, untraced, with_weights_of
from moec.compiler import build
from moec.compiler.program import Program
from moec.compiler.spec import Spec
from moec.sources.random_checkpoint import save_random
from moec.targets.xnnpack.session import CpuSession
from tests.variants import quick

transformers = pytest.importorskip(
    "transformers", reason="needs the transformers extra: pip install 'moec[transformers]'"
)
INT4 = {
    "weights": "int4", "group_size": 32, "activations": "int8", "kv_cache": "int8", "expert_group_axis": "in",
}  # fmt: skip
COMMON = {
    "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 157, "bos_token_id": 1,
    "max_position_embeddings": 128, "eos_token_id": 2, "pad_token_id": 0, "moe_intermediate_size": 64,
}  # fmt: skip
# name: (model type, config): sigmoid scores with a selection bias; softmax and a gated shared expert, biases
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "solar_open": (
        "solar_open",
        {"intermediate_size": 96, "num_hidden_layers": 2, "n_routed_experts": 8, "num_experts_per_tok": 3,
         "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "head_dim": 16},
    ),
    "qwen2_moe": (
        "qwen2_moe",
        {"intermediate_size": 128, "num_hidden_layers": 3, "num_experts": 12, "num_experts_per_tok": 4,
         "shared_expert_intermediate_size": 128, "norm_topk_prob": False, "decoder_sparse_step": 1,
         "num_key_value_heads": 4, "vocab_size": 153, "eos_token_id": 1, "rope_theta": 1e6, "sliding_window": 8},
    ),
    # every expert a module of its own, and a scale for each: stacked and scaled
    "jamba": (
        "jamba",
        {"intermediate_size": 32, "num_hidden_layers": 2, "num_experts": 6, "num_experts_per_tok": 2,
         "attn_layer_period": 1, "attn_layer_offset": 0, "expert_layer_period": 1, "expert_layer_offset": 0,
         "use_mamba_kernels": False},
    ),
}  # fmt: skip


def _spec(name: str, folder: Path) -> Spec:
    kind, config = MODELS[name]
    transformers.AutoConfig.for_model(kind, **{**COMMON, **config}).save_pretrained(folder / "config")
    save_random(folder / "config", folder / "model", seed=5)
    raw = {"name": name, "model": {"transformers": str(folder / "model")}, "quantization": INT4}
    return Spec.model_validate(raw)


def _programs(spec: Spec) -> tuple[Program, Program]:
    exported, passes = build.program_and_passes(spec, build.open_checkpoint(spec, None), "xnnpack")
    return exported, before_target(exported, passes)


Programs = Callable[[str], tuple[Program, Program]]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    """As exported, and before the target: of each model once, for a Program is never changed."""
    return cache(lambda name: _programs(_spec(name, tmp_path_factory.mktemp(name))))


@pytest.fixture(scope="module", params=["solar_open", pytest.param("qwen2_moe", marks=pytest.mark.slow)])
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    return build.compile(_spec(request.param, folder), out=folder / "artifact").folder


@pytest.mark.parametrize("name", quick(MODELS, ("solar_open", "jamba")))
def test_the_exported_model_gets_every_code(name: str, programs: Programs) -> None:
    exported, last = programs(name)
    assert untraced(exported, last) == []
    ids = list(range(1, 20))
    reference = run_chunks(GraphRunner(with_weights_of(exported, last)), ids, 512)
    passes = run_chunks(GraphRunner(last, overrides=unrounded_operators()), ids, 512)
    # fp32 sums in another order; a weight left in float differs by 1e-2 and more
    np.testing.assert_allclose(passes, reference, atol=1e-5, rtol=1e-4)
    plain = run_chunks(GraphRunner(exported), ids, 512)
    assert np.abs(plain - reference).max() > 1e-2


def test_codes_that_nobody_can_trace_are_named(programs: Programs) -> None:
    exported, last = programs("solar_open")
    joined = [n for n, held in last.quantized.items() if held.origins]
    assert joined, "the shared experts' gate and up were joined"
    forgotten = {n: replace(held, origins=()) for n, held in last.quantized.items()}
    assert untraced(exported, replace(last, quantized=forgotten)) == sorted(joined)


def test_a_right_artifact_passes(artifact: Path) -> None:
    """All tokens that `moec verify` takes: in qwen2_moe, a flip in the KV cache moves a selection whose ranks are close
    (1e-4), and the logits of that token by an eighth of the largest."""
    report = verify_artifact(artifact, quality_tokens=0)
    assert report.exit_status == 0, [c.line() for c in report.failures]
    names = {c.name for c in report.checks}
    assert "exported model: every element of the passes' graph" in names
    for phase in ("prefill", "odd chunks", "decode steps"):
        assert f"float activations, routed alike: {phase}, elements of the worst row" in names
    # what INT8 activations cost this model, as the codes alone do: far from the 0.985 of a mixture
    assert report.figures["against the exported model: median cosine"] > 0.995


Forward = Callable[[CpuSession, np.ndarray, int, np.ndarray | None, bool], Any]


def _one_position_behind(true: Forward) -> Forward:
    return lambda self, tokens, start, rows, every: true(self, tokens, start - (len(tokens) == 1 < start), rows, every)


def _newest_key_lost(true: Forward) -> Forward:
    def forward(self: CpuSession, tokens: np.ndarray, start: int, rows: np.ndarray | None, every: bool) -> Any:
        if len(tokens) == 1 and start > 1:
            tracing, self._tracing = self._tracing, False
            true(self, np.zeros(1, np.int64), start - 1, None, False)
            self._tracing = tracing
        return true(self, tokens, start, rows, every)

    return forward


def _one_logit_of_one_step(true: Forward) -> Forward:
    def forward(self: CpuSession, tokens: np.ndarray, start: int, rows: np.ndarray | None, every: bool) -> Any:
        traces = true(self, tokens, start, rows, every)
        if len(tokens) == 1 and start % 8 == 5 and rows is not None:
            rows[0, 7] += 0.1 * np.abs(rows[0]).max()
        return traces

    return forward


@pytest.mark.parametrize(
    "wrong", [_one_position_behind, pytest.param(_newest_key_lost, marks=pytest.mark.slow), _one_logit_of_one_step]
)
def test_wrong_decode_steps_fail(artifact: Path, wrong: Callable[[Forward], Forward], monkeypatch) -> None:
    monkeypatch.setattr(CpuSession, "_forward", wrong(CpuSession._forward))
    report = verify_artifact(artifact, tokens=200, quality_tokens=0)
    failed = {c.name for c in report.failures}
    assert report.exit_status == 1
    assert any("decode steps, elements" in name for name in failed), failed
    assert not any("prefill" in name or "exported" in name or name.startswith("block") for name in failed), failed


def _one_code(tensors: dict[str, Any]) -> None:
    weight = tensors["model.layers.1.mlp.experts.5.down_proj.weight"][7]
    at = weight.abs().argmax()
    weight[at] = -weight[at]  # its group's largest: the other groups and the scale stay


def _two_experts(tensors: dict[str, Any]) -> None:
    names = [f"model.layers.0.mlp.experts.{e}.down_proj.weight" for e in (1, 2)]
    tensors[names[0]], tensors[names[1]] = (tensors[name] for name in reversed(names))


def _shared_gate_and_up(tensors: dict[str, Any]) -> None:
    shared = "model.layers.1.mlp.shared_experts.{}_proj.weight".format
    tensors[shared("gate")], tensors[shared("up")] = tensors[shared("up")], tensors[shared("gate")]


@pytest.mark.parametrize(
    "wrong", [_one_code, *(pytest.param(w, marks=pytest.mark.slow) for w in (_two_experts, _shared_gate_and_up))]
)
def test_wrong_codes_fail(wrong: Callable[[dict[str, Any]], None], tmp_path: Path) -> None:
    spec = _spec("solar_open", tmp_path)
    shutil.copytree(tmp_path / "model", tmp_path / "true")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    wrong(tensors)
    save_file(tensors, file, {"format": "pt"})
    folder = build.compile(spec, out=tmp_path / "artifact").folder
    report = verify_artifact(folder, checkpoint=tmp_path / "true", tokens=200, quality_tokens=0)
    failed = {c.name for c in report.failures}
    assert any(name.startswith("block outputs") for name in failed), failed
    assert any("prefill, elements" in name for name in failed), failed


@pytest.mark.slow
@pytest.mark.parametrize("name", ["solar_open", "qwen2_moe"])
def test_without_rounding_decode_steps_are_judged_against_the_exported_model(name, tmp_path, monkeypatch) -> None:
    spec = _spec(name, tmp_path)
    raw = spec.model_dump(mode="json")
    raw["quantization"] |= {"activations": "fp32", "kv_cache": "fp32"}
    folder = build.compile(Spec.model_validate(raw), out=tmp_path / "artifact").folder
    assert verify_artifact(folder, tokens=200, quality_tokens=0).exit_status == 0
    monkeypatch.setattr(CpuSession, "_forward", _one_logit_of_one_step(CpuSession._forward))
    failed = {c.name for c in verify_artifact(folder, tokens=200, quality_tokens=0).failures}
    assert "exported model: decode steps, every element" in failed
    assert "exported model: every element" not in failed
