"""Legalizing for the CPU kernels: every pass keeps what the graph computes, and the graph has the shape intended."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from moec.checkpoints import open_store, synthesize
from moec.compiler import build
from moec.compiler.pipeline import run_passes
from moec.compiler.program import Program, Role, Stage
from moec.compiler.spec import Spec
from moec.passes.pipelines import pipeline
from moec.targets.xnnpack.legalize import legalize_passes
from moec.targets.xnnpack.legalize_linear import pack_linears
from moec.targets.xnnpack.options import Kernels, Options
from tests.harness import VOCABULARY, check_equal, export_toy
from tests.interpreter import Interpreter
from tests.variants import quick

ROPE = {"theta": 10000.0, "interleaved": True}
COMMON = {"layers": 2, "d_model": 64, "heads": 4, "kv_heads": 2, "head_dim": 32, "vocab_size": 300, "context": 40}
MOE = {
    "architecture": "mobilemoe", **COMMON, "rope": ROPE,
    "moe": {"experts": 5, "top_k": 2, "expert_width": 32, "shared_width": 32},
}  # fmt: skip
DENSE = {"architecture": "mobilellm", **COMMON, "rope": ROPE, "ffn_width": 96, "tied_embeddings": False}
INT4 = {"weights": "int4", "group_size": 32}
TOKENS = 11


def fused(model: dict, quantization: object, folder: Path) -> Program:
    spec = Spec.model_validate({"name": "s", "model": model, "quantization": quantization})
    store = open_store(synthesize(spec, folder / "c", seed=2), spec.model)
    program, _ = build.program_and_passes(spec, store)
    return run_passes(program, pipeline(spec.quantization))


def operators(program: Program) -> Counter[str]:
    return Counter(str(n.target) for n in program.graph.nodes if n.op == "call_function")


def logits(program: Program) -> np.ndarray:
    ids = torch.randint(0, 300, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    return Interpreter(program)(ids, torch.zeros(1, dtype=torch.long)).numpy()


def kernels(**roles: str) -> Options:
    return Options(kernels=Kernels(**roles))


MODELS = {"moe": MOE, "dense": DENSE}
CASES = [(f"{kind} {m}", MODELS[m], q) for m in MODELS for kind, q in (("float", "none"), ("int4", INT4))]


@pytest.mark.parametrize(
    ("name", "model", "quantization"), quick(CASES, ("float dense", "int4 moe")), ids=[c[0] for c in CASES]
)
def test_every_pass_keeps_what_is_computed(name: str, model: dict, quantization: object, tmp_path: Path) -> None:
    program = fused(model, quantization, tmp_path)
    before = logits(program)
    for step in legalize_passes(kernels(attention="moec", ffn="moec")):
        program = run_passes(program, [step])
        after = logits(program)
        cosine = (after * before).sum(-1) / np.linalg.norm(after, axis=-1) / np.linalg.norm(before, axis=-1)
        # fp32 sums in another order; quantized, that may tip the INT8 rounding of an activation
        assert np.median(cosine) > (0.999999 if quantization == "none" else 0.9999), step.name
    assert program.stage is Stage.LEGAL
    found = operators(program)
    assert not any("_q." in op or "aten.linear" in op or "fused_moe.default" in op for op in found)
    assert found["moec.embedding_packed.default"] == 1


def test_linears_of_one_input_become_one(tmp_path: Path) -> None:
    program = fused(DENSE, INT4, tmp_path)
    legal = run_passes(program, legalize_passes(Options()))
    # a layer: q+k+v, o, down; and the head
    assert operators(legal)["moec.linear_packed.default"] == 2 * 3 + 1
    assert operators(legal)["moec.gated_linear_packed.default"] == 2, "gate+up"
    assert operators(legal)["aten.silu.default"] == operators(legal)["aten.mul.Tensor"] == 0
    assert "model.layers.0.self_attn.q_proj+k_proj+v_proj.packed" in legal.weights
    assert not any("qweight" in name for name in legal.weights), "what was packed is not kept beside it"


class Viewed(torch.nn.Module):
    """Two linears of one input whose results are viewed so that tokens and heads become one dimension (Qwen3.5)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.a, self.b = (torch.nn.Parameter(torch.empty(n, 32)) for n in (VOCABULARY, 64, 32))

    def forward(self, tokens: torch.Tensor, start_pos: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.embedding(tokens, self.embed)
        a = torch.nn.functional.linear(x, self.a).view(1, -1, 4, 16)
        b = torch.nn.functional.linear(x, self.b).view(1, -1, 2, 16)
        first, second = a.split(2, 2)
        merged = torch.tanh(first.reshape(-1, 16)) * b.view(-1, 16) + a.view(-1, 64)[:, :16].repeat_interleave(2, 0)
        return merged.view(1, -1, 32) + second.reshape(1, -1, 32)


def test_views_of_joined_linears_may_merge_tokens_and_heads() -> None:
    program = export_toy(Viewed, {"embed": Role.EMBEDDING, "a": Role.ATTENTION, "b": Role.ATTENTION})
    after = pack_linears(kernels(attention="moec")).run(program).program
    assert operators(after)["moec.linear_packed.default"] == 1
    check_equal(program, after)


def test_a_tied_table_is_one_blob(tmp_path: Path) -> None:
    legal = run_passes(fused(MOE, INT4, tmp_path), legalize_passes(Options()))
    readers = [
        [str(u.target) for u in n.users] for n in legal.graph.nodes if legal.weight_of(n) == "model.embed_tokens.packed"
    ]
    assert readers == [["moec.embedding_packed.default", "moec.linear_packed.default"]]


def test_float_linears_are_left_to_xnnpack_by_default(tmp_path: Path) -> None:
    legal = run_passes(fused(DENSE, "none", tmp_path), legalize_passes(Options()))
    found = operators(legal)
    assert found["aten.linear.default"] == 2 * 7
    assert found["moec.linear_packed.default"] == 1, "the head"


def test_delegated_int4_linears_follow_torchaos_pattern(tmp_path: Path) -> None:
    legal = run_passes(fused(DENSE, INT4, tmp_path), legalize_passes(kernels(attention="xnnpack")))
    found = operators(legal)
    assert found["torchao.choose_qparams_affine.default"] == found["aten.linear.default"] == 2 * 4
    assert found["torchao.dequantize_affine.default"] == 2 * 4 * 2


@pytest.mark.parametrize("head", ["moec", "xnnpack"])
def test_the_last_token_alone_reaches_the_head(head: str, tmp_path: Path) -> None:
    program = run_passes(fused(DENSE, INT4, tmp_path), legalize_passes(kernels(head=head)))
    last = program.last_token
    assert last is not None
    # the same operators on one row: equal but for the order of sums in torch's own linear
    np.testing.assert_allclose(logits(last), logits(program)[:, -1], atol=1e-5, rtol=1e-5)
    head_node = [n for n in last.graph.nodes if "linear" in str(n.target)][-1]
    assert tuple(head_node.meta["val"].shape) == (1, 1, 300)
    assert operators(last)["aten.slice.Tensor"] == operators(program)["aten.slice.Tensor"] + 1
