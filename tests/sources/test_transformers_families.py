"""Families of transformers models that attend: one fused node per MoE layer, logits equal to transformers' own."""

from __future__ import annotations

import itertools
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from moec.compiler.errors import CompileError
from moec.compiler.matching.read import aten, is_op
from moec.compiler.ops import CachedAttention, Experts, FusedMoe, Routing, fused_moe, fused_moe_q
from moec.compiler.pipeline import run_passes
from moec.compiler.program import Program
from moec.compiler.spec.quantization import Quantization
from moec.passes.fuse_moe import fuse_moe
from moec.passes.pipelines import fusion, pipeline
from tests.interpreter import Interpreter
from tests.variants import quick

transformers = pytest.importorskip(
    "transformers", reason="needs the transformers extra: pip install 'moec[transformers]'"
)

# fp32 sums in another order: at most 5e-6 was seen on logits up to 5; a wrong formula gives differences above 1e-2
ATOL, RTOL = 1e-5, 1e-4
COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 48,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
GROUPED = Routing(score="sigmoid", groups=4, keep=2, group_score="top2sum", normalize="sum", eps=1e-20, scale=2.5)
CLAMPED = Experts("in_out", interleaved=True, alpha=1.702, gate_max=7.0, up_min=-7.0, up_max=7.0, up_offset=1.0)
# family: (config, MoE layers, routing, experts, whether a shared expert is part of the node)
FAMILIES: dict[str, tuple[dict[str, Any], int, Routing, Experts, bool]] = {
    "olmoe": ({"intermediate_size": 32, "num_experts": 6, "num_experts_per_tok": 2}, 2, Routing(), Experts(), False),
    "qwen2_moe": (
        {
            "intermediate_size": 48,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 64,
            "num_experts": 6,
            "num_experts_per_tok": 2,
        },
        2,
        Routing(),
        Experts(),
        True,
    ),
    "qwen3_moe": (
        {
            "intermediate_size": 48,
            "moe_intermediate_size": 32,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "head_dim": 16,
            "norm_topk_prob": True,
        },
        2,
        Routing(normalize="sum"),
        Experts(),
        False,
    ),
    "mixtral": (
        {"intermediate_size": 32, "num_local_experts": 6, "num_experts_per_tok": 2},
        2,
        Routing(normalize="sum"),
        Experts(),
        False,
    ),
    "deepseek_v3": (
        {
            "intermediate_size": 64,
            "moe_intermediate_size": 32,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "n_group": 4,
            "topk_group": 2,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "num_key_value_heads": 4,
        },
        1,
        GROUPED,
        Experts(),
        True,
    ),
    "gpt_oss": (
        {
            "intermediate_size": 32,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "head_dim": 16,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        2,
        Routing(after_topk=True),
        CLAMPED,
        False,
    ),
    "granitemoe": (
        {
            "intermediate_size": 32,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
        },
        2,
        Routing(after_topk=True),
        Experts(),
        False,
    ),
    "phimoe": (
        {
            "intermediate_size": 32,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "attention_bias": True,
            "lm_head_bias": True,
            "sliding_window": 8,
            "router_jitter_noise": 0.2,
        },
        2,
        Routing(score="sparsemixer", threshold=0.4),
        Experts(),
        False,
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: _saved(name, tmp_path_factory.mktemp(name)) for name in FAMILIES}


def _saved(name: str, folder: Path) -> Path:
    """A tiny random model of the family: weights large enough for clamps and groups to act, nonzero biases."""
    config = transformers.AutoConfig.for_model(name, **{**COMMON, **FAMILIES[name][0]})
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for key, p in model.named_parameters():
            is_norm = "norm" in key and p.dim() == 1
            p.copy_(torch.randn_like(p) * 0.15 + (1.0 if is_norm else 0.0))
        for key, b in model.named_buffers():
            if "e_score_correction" in key:
                b.copy_(torch.randn_like(b) * 0.2)
    model.save_pretrained(folder)
    return folder


@cache
def _program(folder: Path, experts: str) -> Program:
    """At stage CANONICAL; exported once for all tests, for a Program is never changed."""
    from moec.sources.transformers_model import TransformersStore, export_transformers

    store = TransformersStore(folder)
    exported = export_transformers(folder, "tiny", weights=store, max_tokens=16, experts=experts)
    return run_passes(exported, fusion()[:1])


def _chunked(program: Program, ids: torch.Tensor) -> torch.Tensor:
    """A prompt, two single steps and a chunk."""
    run = Interpreter(program)
    ends = [0, 9, 10, 11, ids.shape[1]]
    return torch.cat([run(ids[:, a:b], torch.tensor([a])) for a, b in itertools.pairwise(ends)], 1)


@pytest.mark.parametrize(
    ("name", "experts"),
    [(name, "batched_mm") for name in FAMILIES]
    # the other form of the experts' products does not depend on the family
    + [pytest.param(f, "grouped_mm", marks=() if f == "gpt_oss" else pytest.mark.slow) for f in FAMILIES],
)
def test_family(folders: dict[str, Path], name: str, experts: str) -> None:
    _, layers, routing, attributes, shared = FAMILIES[name]
    program = run_passes(_program(folders[name], experts), fusion()[1:])
    nodes = [n for n in program.graph.nodes if n.op == "call_function" and n.target is fused_moe]
    assert len(nodes) == layers
    assert not any(is_op(n, aten.topk.default) for n in program.graph.nodes)
    for node in nodes:
        moe = FusedMoe.of(node)
        assert moe.selection == routing
        assert moe.mlp == attributes
        assert moe.has_shared == shared
        assert (moe.shared_gate is not None) == (name == "qwen2_moe")
    attention = [c for n in program.graph.nodes if (c := CachedAttention.find(n)) is not None]
    assert len(attention) == 2
    assert [c.window for c in attention if c.sinks is not None] == ([8, 0] if name == "gpt_oss" else [])
    model = transformers.AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float32).eval()
    ids = torch.randint(0, 96, (1, 23), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = model(ids).logits
    torch.testing.assert_close(_chunked(program, ids), expected, atol=ATOL, rtol=RTOL)


@pytest.mark.parametrize("name", quick(FAMILIES, ("mixtral", "deepseek_v3", "gpt_oss")))
def test_int4(folders: dict[str, Path], name: str) -> None:
    """Every expert is quantized, none left in float (the dialect checks), and the program runs."""
    scheme = Quantization(weights="int4", group_size=32, activations="fp32", kv_cache="fp32", expert_group_axis="in")
    program = run_passes(_program(folders[name], "batched_mm"), pipeline(scheme)[1:])
    nodes = [n for n in program.graph.nodes if n.op == "call_function" and n.target is fused_moe_q]
    assert len(nodes) == FAMILIES[name][1]
    ids = torch.randint(0, 96, (1, 12), generator=torch.Generator().manual_seed(5))
    assert torch.isfinite(Interpreter(program)(ids, torch.tensor([0]))).all()


def _mutate(program: Program, change: Any) -> Program:
    edit = program.edit()
    assert change(edit), "the mutation found nothing to change"
    return edit.done()


def _first(edit: Any, *targets: Any) -> Any:
    return next(n for n in edit.graph.nodes if is_op(n, *targets))


def _named(edit: Any, name: str) -> Any:
    found = [n for n in edit.graph.nodes if n.op == "call_function" and name in str(n.target)]
    return found[0]


def _set(node: Any, index: int, value: Any) -> bool:
    args = list(node.args)
    while len(args) <= index:
        args.append(None)
    args[index] = value
    node.args = tuple(args)
    return True


def _histc_bins(edit: Any) -> bool:
    node = _first(edit, aten.histc.default)
    return _set(node, 3, node.args[3] + 1)


def _division(edit: Any) -> bool:
    node = _first(edit, aten.floor_divide.default)
    return _set(node, 1, node.args[1] + 1)


def _weights_unsorted(edit: Any) -> bool:
    node = _first(edit, aten.floor_divide.default)
    order = node.args[0]
    weights = next(
        n for n in edit.graph.nodes if is_op(n, aten.index.Tensor) and list(n.args[1]) == [order] and n is not node
    )
    weights.replace_all_uses_with(weights.args[0])
    return True


def _not_brought_back(edit: Any) -> bool:
    back = _first(edit, aten.index_put.default)
    row = next(iter(back.users))
    row.replace_all_uses_with(row.args[0])
    return True


def _descending(edit: Any) -> bool:
    """Sorting the other way leaves the counts in the wrong order."""
    return _set(_set_and(_first(edit, aten.sort.default), 1, -1), 2, True)


def _set_and(node: Any, index: int, value: Any) -> Any:
    _set(node, index, value)
    return node


def _repeat_other(edit: Any) -> bool:
    node = _first(edit, aten.repeat_interleave.self_int)
    with edit.graph.inserting_before(node):
        other = edit.call(aten.mul.Tensor, node.args[0], 2.0, like=node)
    node.args = (other, *node.args[1:])
    return True


def _other_indices(edit: Any) -> bool:
    gathers = [n for n in edit.graph.nodes if is_op(n, aten.index.Tensor) and n.args[0].op == "placeholder"]
    node = gathers[1]
    with edit.graph.inserting_before(node):
        other = edit.call(aten.flip.default, node.args[1][0], [0], like=node)
    return _set(node, 1, [other])


def _swap_halves(edit: Any) -> bool:
    import operator

    gates = [n.args[0] for n in edit.graph.nodes if is_op(n, aten.silu.default)]
    gate = next(g for g in gates if g.target is operator.getitem)
    up = next(n for n in edit.graph.nodes if n.target is operator.getitem and n.args == (gate.args[0], 1))
    gate.args, up.args = up.args, gate.args
    return True


def _user_of_indices(edit: Any) -> bool:
    import operator

    topk = [n for n in edit.graph.nodes if is_op(n, aten.topk.default)][-1]
    indices = next(u for u in topk.users if u.target is operator.getitem and u.args[1] == 1)
    output = next(reversed(edit.graph.nodes))
    logits = output.args[0][-1]
    with edit.graph.inserting_before(output):
        extra = edit.call(aten.add.Tensor, logits, edit.call(aten.sum.default, indices, like=topk), like=topk)
    logits.replace_all_uses_with(extra, delete_user_cb=lambda u: u is output)
    return True


def _fill(value: float) -> Any:
    return lambda edit: _set(_first(edit, aten.masked_fill.Scalar), 2, value)


def _mask_inverted(edit: Any) -> bool:
    node = _first(edit, aten.bitwise_not.default)
    node.replace_all_uses_with(node.args[0])
    return True


def _group_topk(edit: Any) -> bool:
    first = next(n for n in edit.graph.nodes if is_op(n, aten.topk.default))
    return _set(first, 1, 1)


def _biased_gather(edit: Any) -> bool:
    gather = _first(edit, aten.gather.default)
    choice = next(n for n in edit.graph.nodes if is_op(n, aten.masked_fill.Scalar)).args[0]
    return _set(gather, 0, choice)


def _bias_dropped(edit: Any) -> bool:
    """The groups are still scored with the bias: the two must not be taken for one."""
    fill = _first(edit, aten.masked_fill.Scalar)
    gather = _first(edit, aten.gather.default)
    return _set(fill, 0, gather.args[0])


def _clamp_after(edit: Any) -> bool:
    gates = [n for n in edit.graph.nodes if is_op(n, aten.sigmoid.default)]
    product = next(iter(gates[0].users))
    with edit.graph.inserting_after(product):
        clamp = edit.call(aten.clamp.default, product, None, 7.0, like=product)
    product.replace_all_uses_with(clamp, delete_user_cb=lambda u: u is not clamp)
    return True


def _offset_before_clamp(edit: Any) -> bool:
    clamp = [n for n in edit.graph.nodes if is_op(n, aten.clamp.default)][1]
    with edit.graph.inserting_before(clamp):
        shifted = edit.call(aten.add.Tensor, clamp.args[0], 1, like=clamp)
    return _set(clamp, 0, shifted)


def _alpha(edit: Any) -> bool:
    """Another alpha is expressible: fused with it, and equal."""
    sigmoid = _first(edit, aten.sigmoid.default)
    return _set(sigmoid.args[0], 1, 1.5)


def _down_bias_of_up(edit: Any) -> bool:
    biases = [n for n in edit.graph.nodes if is_op(n, aten.index.Tensor) and n.args[0].meta["val"].dim() == 2]
    down = next(n for n in biases if "down_proj_bias" in str(edit.weight_of(n.args[0])))
    with edit.graph.inserting_before(down):
        other = edit.call(aten.flip.default, down.args[1][0], [0], like=down)
    return _set(down, 1, [other])


MUTANTS: list[tuple[str, str, Any]] = [
    ("mixtral", "grouped_mm", _histc_bins),
    ("mixtral", "grouped_mm", _division),
    ("mixtral", "grouped_mm", _weights_unsorted),
    ("mixtral", "grouped_mm", _not_brought_back),
    ("mixtral", "grouped_mm", _descending),
    ("mixtral", "grouped_mm", _swap_halves),
    ("mixtral", "grouped_mm", _user_of_indices),
    ("mixtral", "batched_mm", _repeat_other),
    ("mixtral", "batched_mm", _other_indices),
    ("mixtral", "batched_mm", _swap_halves),
    ("mixtral", "batched_mm", _user_of_indices),
    ("qwen2_moe", "batched_mm", _swap_halves),
    ("deepseek_v3", "batched_mm", _fill(0.0)),
    ("deepseek_v3", "batched_mm", _fill(-1.0)),
    ("deepseek_v3", "batched_mm", _mask_inverted),
    ("deepseek_v3", "batched_mm", _group_topk),
    ("deepseek_v3", "batched_mm", _biased_gather),
    ("deepseek_v3", "batched_mm", _bias_dropped),
    ("gpt_oss", "batched_mm", _clamp_after),
    ("gpt_oss", "batched_mm", _offset_before_clamp),
    ("gpt_oss", "batched_mm", _alpha),
    ("gpt_oss", "batched_mm", _down_bias_of_up),
    ("gpt_oss", "grouped_mm", _clamp_after),
    ("gpt_oss", "grouped_mm", _histc_bins),
    ("gpt_oss", "grouped_mm", _not_brought_back),
]


@pytest.mark.parametrize(
    ("name", "experts", "change"), MUTANTS, ids=[f"{n}-{e}-{i}" for i, (n, e, _) in enumerate(MUTANTS)]
)
def test_mutant_is_refused_or_equal(folders: dict[str, Path], name: str, experts: str, change: Any) -> None:
    mutant = _mutate(_program(folders[name], experts), change)
    result = fuse_moe().run(mutant)
    if result.changed < FAMILIES[name][1]:  # refused with the node and the reason, and a CompileError of the pipeline
        assert all(r.reason and r.node for r in result.refusals)
        assert result.refusals
        with pytest.raises(CompileError):
            run_passes(mutant, fusion()[1:])
        return
    ids = torch.randint(0, 96, (1, 11), generator=torch.Generator().manual_seed(9))
    expected = Interpreter(mutant)(ids, torch.tensor([0]))
    actual = Interpreter(result.program)(ids, torch.tensor([0]))
    torch.testing.assert_close(actual, expected, atol=ATOL, rtol=RTOL)
