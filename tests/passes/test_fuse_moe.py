"""fuse_moe: what must be fused, and, because a wrong match is the worst fault, what must be left alone and why."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.fx import Node

from moec.compiler.errors import CompileError
from moec.compiler.ops import FusedMoe, fused_moe
from moec.compiler.pipeline import PassResult, run_passes
from moec.compiler.program import Program, Role, module_path
from moec.passes.check_router import check_router
from moec.passes.fuse_moe import fuse_moe
from tests.harness import check_equal, check_golden, check_refused, check_rule, run
from tests.passes.moe_zoo import FF, Block, program, zoo

# ------------------------------------------------------------------------------------------------------ what must match


def _softmax(self: Block, logits: torch.Tensor) -> torch.Tensor:
    return logits.softmax(-1)


def _plain(self: Block, scores: torch.Tensor) -> torch.Tensor:
    return scores


def _gathered(self: Block, scores: torch.Tensor, choice: Any, values: Any, indices: torch.Tensor) -> torch.Tensor:
    return scores.gather(-1, indices)


def _values(self: Block, scores: Any, choice: Any, values: torch.Tensor, indices: Any) -> torch.Tensor:
    return values


def _values_normalized(self: Block, scores: Any, choice: Any, values: torch.Tensor, indices: Any) -> torch.Tensor:
    return values / (values.sum(-1, keepdim=True) + 1e-3)


def _clamped_sum(self: Block, scores: torch.Tensor, choice: Any, values: Any, indices: torch.Tensor) -> torch.Tensor:
    weights = scores.gather(-1, indices)
    return weights / weights.sum(-1, keepdim=True).clamp(min=1.5)


def _softmax_after(self: Block, scores: Any, choice: Any, values: torch.Tensor, indices: Any) -> torch.Tensor:
    return values.softmax(-1)


def _sigmoid_after(self: Block, scores: torch.Tensor, choice: Any, values: Any, indices: torch.Tensor) -> torch.Tensor:
    return 0.5 * scores.gather(-1, indices).sigmoid()


def _logits(self: Block, logits: torch.Tensor) -> torch.Tensor:
    return logits


def _biased_linear(self: Block, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, self.router, self.router_bias)


def _sliced(self: Block, joined: torch.Tensor) -> torch.Tensor:
    return joined[..., FF:] * F.gelu(joined[..., :FF], approximate="tanh")


def _spelled_silu(self: Block, joined: torch.Tensor) -> torch.Tensor:
    gate, up = joined.split(FF, -1)
    return gate * gate.sigmoid() * up


def _weights_first(self: Block, x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    return torch.einsum("abcd,ac->abd", self.w13[indices], x)


def _unsorted(self: Block, choice: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values, indices = torch.topk(choice, self.top_k, dim=1, largest=True, sorted=False)
    return values, indices


def _other_input(self: Block, x: torch.Tensor) -> torch.Tensor:
    return F.linear(torch.tanh(x), self.router)


def _gated_shared(self: Block, y: torch.Tensor, shared: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return y + self.shared_gate(x).sigmoid() * self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


MATCHES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no_shared": ({"shared": False}, ["None, None, None, 2, score=sigmoid,normalize=sum,scale=2.5"]),
    "no_bias": ({"choice": _plain}, ["@router, None, None, @w13"]),
    "not_normalized": ({"weigh": _gathered}, ["2, score=sigmoid, layout=in_out"]),
    "softmax": ({"scores": _softmax, "choice": _plain, "weigh": _gathered}, ["2, , layout=in_out"]),
    "values": ({"scores": _softmax, "choice": _plain, "weigh": _values}, ["2, , layout=in_out"]),
    "eps": ({"scores": _softmax, "choice": _plain, "weigh": _values_normalized}, ["normalize=sum,eps=0.001"]),
    "clamp_min": ({"weigh": _clamped_sum}, ["normalize=sum,clamp_min=1.5"]),
    "topk_first": ({"scores": _logits, "choice": _plain, "weigh": _softmax_after}, ["after_topk=true"]),
    "sigmoid_after": ({"scores": _logits, "weigh": _sigmoid_after}, ["score=sigmoid,after_topk=true,scale=0.5"]),
    "router_bias": ({"logits": _biased_linear}, ["@router, @router_bias, @bias"]),
    "gelu": ({"activate": _sliced, "shared": False}, ["activation=gelu_tanh"]),
    "spelled_silu": ({"activate": _spelled_silu}, ["gate_up_proj"]),
    "weights_first": ({"up": _weights_first}, ["@router"]),
    "unsorted": ({"select": _unsorted}, ["@router"]),
    "one_expert": ({"top_k": 1}, ["@router"]),
    "all_experts": ({"top_k": 5}, ["@router"]),
    "the_only_expert": ({"experts": 1, "top_k": 1}, ["@router, None, @bias"]),
    "other_router_input": ({"logits": _other_input}, ["@router"]),
    "shared_gate": ({"join": _gated_shared}, ["@shared_gate.weight"]),
}


@pytest.fixture(scope="module")
def fused() -> Program:
    """All of MATCHES in one program, fused, and checked as a whole."""
    return check_rule(
        fuse_moe(), zoo({f"is_{name}": options for name, (options, _) in MATCHES.items()}), count=len(MATCHES)
    )


@pytest.mark.parametrize("name", MATCHES)
def test_fused(fused: Program, name: str) -> None:
    assert "aten.topk" not in fused.text()
    assert "aten.index.Tensor" not in fused.text()
    node = next(n for n in fused.graph.nodes if n.target is fused_moe and f".is_{name}." in f"{module_path(n)}.")
    operands = [fused.weight_of(a) if isinstance(a, Node) else a for a in node.args]
    text = ", ".join(str(a).replace(f"blocks.is_{name}.", "@") for a in operands)
    for part in MATCHES[name][1]:
        assert part in text, f"{part!r} is not in {text}"


def test_golden_and_roles() -> None:
    after = check_rule(fuse_moe(), program(), count=1, golden="fuse_moe")
    assert after.roles["blocks.moe.router"] is Role.ROUTER
    assert after.roles["blocks.moe.bias"] is Role.ROUTER
    assert after.roles["blocks.moe.gate_up_proj.weight"] is Role.SHARED
    assert {after.roles[n] for n in ("blocks.moe.w13", "blocks.moe.w2")} == {Role.EXPERT}
    before = program()
    stacked = torch.cat([before.weights[f"blocks.moe.{n}_proj.weight"].load() for n in ("gate", "up")])
    assert torch.equal(after.weights["blocks.moe.gate_up_proj.weight"].load(), stacked), "gate rows come first"


def test_residual_is_not_swallowed() -> None:
    """y + x is not a shared expert: the sum stays outside."""

    def join(self: Block, y: torch.Tensor, shared: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return y + x

    after = check_rule(fuse_moe(), program(join=join), count=1)
    assert after.text().count("aten.add.Tensor") == 2


# A second value that looks like a shared expert and is not: the routed part is fused, the rest stays as it is.


def _shared_of_other(self: Block, y: torch.Tensor, shared: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    z = torch.tanh(x)
    return y + self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(z))


def _shared_gelu(self: Block, y: torch.Tensor, shared: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return y + self.down_proj(F.gelu(self.gate_proj(x)) * self.up_proj(x))


def _shared_twice(self: Block, y: torch.Tensor, shared: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.add(y, shared, alpha=2)


def _gate_with_bias(self: Block, y: torch.Tensor, shared: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    gate = F.linear(x, self.shared_gate.weight, self.bias[:1]).sigmoid()
    return y + gate * self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def _tanh_gate(self: Block, y: torch.Tensor, shared: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return y + self.shared_gate(x).tanh() * self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def _subtracted(self: Block, y: torch.Tensor, shared: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return y - shared


NOT_SHARED = [_shared_of_other, _shared_gelu, _shared_twice, _gate_with_bias, _tanh_gate, _subtracted]


@pytest.fixture(scope="module")
def routed_only() -> Program:
    return check_rule(fuse_moe(), zoo({f.__name__: {"join": f} for f in NOT_SHARED}), count=len(NOT_SHARED))


@pytest.mark.parametrize("join", NOT_SHARED, ids=lambda f: f.__name__.strip("_"))
def test_not_a_shared_expert(routed_only: Program, join: Callable[..., torch.Tensor]) -> None:
    node = next(n for n in routed_only.graph.nodes if n.target is fused_moe and join.__name__ in module_path(n))
    moe = FusedMoe.of(node)
    assert moe.shared_w13 is moe.shared_w2 is moe.shared_gate is None
    assert f"blocks.{join.__name__}.down_proj.weight" in routed_only.weights


def test_shared_gelu_with_routed_gelu_is_one() -> None:
    def activate(self: Block, joined: torch.Tensor) -> torch.Tensor:
        gate, up = joined.chunk(2, -1)
        return F.gelu(gate) * up

    after = check_rule(fuse_moe(), program(activate=activate, join=_shared_gelu), count=1)
    assert "gate_up_proj" in after.text()


# ------------------------------------------------------------------------------------------------- what must be refused


def _swapped_halves(self: Block, joined: torch.Tensor) -> torch.Tensor:
    up, gate = joined.chunk(2, -1)
    return F.silu(gate) * up


def _same_half(self: Block, joined: torch.Tensor) -> torch.Tensor:
    gate, _ = joined.chunk(2, -1)
    return F.silu(gate) * gate


def _uneven_parts(self: Block, joined: torch.Tensor) -> torch.Tensor:
    return F.silu(joined[..., :FF]) * joined[..., FF - 1 : 2 * FF - 1]


def _tanh_gated(self: Block, joined: torch.Tensor) -> torch.Tensor:
    gate, up = joined.chunk(2, -1)
    return torch.tanh(gate) * up


def _clamped(self: Block, joined: torch.Tensor) -> torch.Tensor:
    gate, up = joined.chunk(2, -1)
    return F.silu(gate).clamp(max=0.4) * up


def _clamped_before(self: Block, joined: torch.Tensor) -> torch.Tensor:
    gate, up = joined.chunk(2, -1)
    return F.silu(gate.clamp(max=0.4)) * up.clamp(-0.3, 0.3)


def _scaled_hidden(self: Block, joined: torch.Tensor) -> torch.Tensor:
    gate, up = joined.chunk(2, -1)
    return F.silu(gate) * up * 0.5


def _added(self: Block, joined: torch.Tensor) -> torch.Tensor:
    gate, up = joined.chunk(2, -1)
    return F.silu(gate) + up


def _sum_over_features(self: Block, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (y * weights.unsqueeze(-1)).sum(2).sum(1, keepdim=True).expand(-1, y.shape[2])


def _mean(self: Block, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (y * weights.unsqueeze(-1)).mean(1)


def _unweighted(self: Block, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return y.sum(1) * weights.sum(-1, keepdim=True)


def _squared_weights(self: Block, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (y * (weights * weights).unsqueeze(-1)).sum(1)


def _weights_reversed(self: Block, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (y * weights.flip(-1).unsqueeze(-1)).sum(1)


def _scaled_after(self: Block, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (y * weights.unsqueeze(-1)).sum(1) * 0.25


def _biased_weights(self: Block, scores: Any, choice: torch.Tensor, values: Any, indices: torch.Tensor) -> torch.Tensor:
    return choice.gather(-1, indices)


def _biased_values(self: Block, scores: Any, choice: Any, values: torch.Tensor, indices: Any) -> torch.Tensor:
    return values


def _total_of_all(self: Block, scores: torch.Tensor, choice: Any, values: Any, indices: torch.Tensor) -> torch.Tensor:
    return scores.gather(-1, indices) / scores.sum(-1, keepdim=True)


def _total_over_tokens(
    self: Block, scores: torch.Tensor, choice: Any, values: Any, indices: torch.Tensor
) -> torch.Tensor:
    weights = scores.gather(-1, indices)
    return weights / weights.sum(0, keepdim=True)


def _other_gather(self: Block, scores: torch.Tensor, choice: Any, values: Any, indices: torch.Tensor) -> torch.Tensor:
    return scores.gather(-1, self.count - 1 - indices)


def _scale_inside(self: Block, scores: torch.Tensor, choice: Any, values: Any, indices: torch.Tensor) -> torch.Tensor:
    weights = scores.gather(-1, indices) * 3.0
    return weights / (weights.sum(-1, keepdim=True) + 1.0)


def _max_clamp(self: Block, scores: torch.Tensor, choice: Any, values: Any, indices: torch.Tensor) -> torch.Tensor:
    weights = scores.gather(-1, indices)
    return weights / weights.sum(-1, keepdim=True).clamp(min=0.1, max=0.9)


def _softmax_over_tokens(self: Block, logits: torch.Tensor) -> torch.Tensor:
    return logits.softmax(0)


def _tempered(self: Block, logits: torch.Tensor) -> torch.Tensor:
    return (logits / 2.0).sigmoid()


def _tanh_scores(self: Block, logits: torch.Tensor) -> torch.Tensor:
    return logits.tanh()


def _bias_per_token(self: Block, scores: torch.Tensor) -> torch.Tensor:
    return scores + self.bias[:1]


def _bias_scaled(self: Block, scores: torch.Tensor) -> torch.Tensor:
    return torch.add(scores, self.bias, alpha=2.0)


def _bias_times(self: Block, scores: torch.Tensor) -> torch.Tensor:
    return scores * self.bias


def _bias_negated(self: Block, scores: torch.Tensor) -> torch.Tensor:
    return scores - self.bias


def _smallest(self: Block, choice: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values, indices = choice.topk(self.top_k, dim=-1, largest=False)
    return values, indices


def _shifted_indices(self: Block, choice: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values, indices = choice.topk(self.top_k, dim=-1)
    return values, (indices + 1) % self.count


def _other_down_index(self: Block, hidden: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    return torch.einsum("tkf,tkfd->tkd", hidden, self.w2[self.count - 1 - indices])


def _reversed_down(self: Block, hidden: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    return torch.einsum("tkf,tkfd->tkd", hidden, self.w2[indices].flip(1))


def _transposed_down(self: Block, hidden: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    return torch.einsum("tkf,tkdf->tkd", hidden, self.w2.transpose(1, 2)[indices])


def _mixed_ranks(self: Block, hidden: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    return torch.einsum("tjf,tkfd->tkd", hidden, self.w2[indices])


def _scaled_x(self: Block, x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    return 0.5 * torch.einsum("td,tkdf->tkf", x, self.w13[indices])


def _reads(name: str) -> Callable[..., torch.Tensor]:
    def extra(self: Block, h: torch.Tensor, seen: dict[str, torch.Tensor]) -> torch.Tensor:
        return h + seen[name].to(torch.float32).mean()

    extra.__name__ = f"_reads_{name}"
    return extra


MUTANTS: list[tuple[str, Callable[..., Any], str]] = [
    ("activate", _swapped_halves, "activation is (not )?applied to the (second|first) half"),
    ("activate", _same_half, "halves|act.gate"),
    ("activate", _uneven_parts, "half|halves"),
    ("activate", _tanh_gated, "activation"),
    ("activate", _clamped, "activation"),
    ("activate", _clamped_before, ""),
    ("activate", _scaled_hidden, ""),
    ("activate", _added, r"act\(gate\) \* up"),
    ("combine", _sum_over_features, "rank dimension|not summed over"),
    ("combine", _mean, "no sum over|not summed over"),
    ("combine", _unweighted, "combine weights|not summed over"),
    ("combine", _squared_weights, "not one that the operator has"),
    ("combine", _weights_reversed, "not one that the operator has"),
    ("combine", _scaled_after, ""),
    ("weigh", _biased_weights, "sigmoid"),
    ("weigh", _biased_values, "sigmoid"),
    ("weigh", _total_of_all, "their own sum"),
    ("weigh", _total_over_tokens, "their own sum"),
    ("weigh", _other_gather, "experts' indices"),
    ("weigh", _scale_inside, ""),
    ("weigh", _max_clamp, "their own sum"),
    ("scores", _softmax_over_tokens, "score is not"),
    ("scores", _tempered, "linear"),
    ("scores", _tanh_scores, "score is not"),
    ("choice", _bias_per_token, "bias per expert"),
    ("choice", _bias_scaled, "bias per expert"),
    ("choice", _bias_times, "bias per expert"),
    ("choice", _bias_negated, "bias per expert"),
    ("select", _smallest, "largest"),
    ("select", _shifted_indices, "indices"),
    ("down", _other_down_index, "different expert indices"),
    ("down", _reversed_down, "gathered by index"),
    ("down", _transposed_down, "gathered by index|stored"),
    ("down", _mixed_ranks, "einsum"),
    ("up", _scaled_x, ""),
    ("extra", _reads("logits"), "inside the block|other readers"),
    ("extra", _reads("scores"), "inside the block|other readers"),
    ("extra", _reads("indices"), "inside the block|other readers"),
    ("extra", _reads("weights"), "inside the block|other readers"),
]


@pytest.fixture(scope="module")
def mutants() -> PassResult:
    """All mutants in one program. What was fused of it computes the same, whatever it was."""
    before = zoo({f.__name__: {step: f} for step, f, _ in MUTANTS if step != "extra"})
    result = run(fuse_moe(), before)
    check_equal(before, result.program)
    return result


@pytest.mark.parametrize(
    ("step", "mutant", "reason"), MUTANTS, ids=[f"{s}:{f.__name__.strip('_')}" for s, f, _ in MUTANTS]
)
def test_mutants_are_refused_or_equal(mutants: PassResult, step: str, mutant: Callable[..., Any], reason: str) -> None:
    """An empty reason: being fused with the right attributes is as good, and is proven equal by the fixture."""
    if step == "extra":  # the reader is outside of the block's module: one program each
        check_refused(fuse_moe(), program(extra=mutant), reason)
        return
    name = f"blocks.{mutant.__name__}"
    inside = [n for n in mutants.program.graph.nodes if f"{name}." in f"{module_path(n)}."]
    reasons = [r.reason for r in mutants.refusals if f"{name}." in f"{r.where}."]
    fused = sum(n.target is fused_moe for n in inside)
    if reason:
        assert not fused
        assert any(re.search(reason, text) for text in reasons), (reasons, [r.where for r in mutants.refusals])
    else:
        assert fused or reasons


def test_there_are_forty_mutants() -> None:
    assert len(MUTANTS) + len(NOT_SHARED) >= 40


def test_routed_output_read_twice_ends_the_block_before_the_shared_expert() -> None:
    after = check_rule(fuse_moe(), program(extra=_reads("y")), count=1)
    fused = next(n for n in after.graph.nodes if n.target is fused_moe)
    assert not FusedMoe.of(fused).has_shared, "its routed output is read elsewhere"


def test_reason_reaches_the_user() -> None:
    """The dialect refuses the program, with the reason of the rule that could not fuse."""
    with pytest.raises(CompileError, match=r"was not fused.*(first|second) half"):
        run_passes(program(activate=_swapped_halves), [fuse_moe(), check_router()])


def test_bfloat16_router_is_refused_by_name() -> None:
    """Wherever the rounding is: in the product, or in the weight that is widened for it."""

    def rounded(self: Block, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.to(torch.bfloat16), self.router.to(torch.bfloat16)).to(torch.float32)

    def widened(self: Block, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.to(torch.bfloat16).to(torch.float32), self.router)

    for logits in (rounded, widened):
        before = program(logits=logits)
        result = run(fuse_moe(), before)
        if result.changed:
            check_equal(before, result.program)
            continue
        with pytest.raises(CompileError, match=r"bfloat16|linear|computed"):
            run_passes(before, [fuse_moe(), check_router()])


def test_shared_weights_of_two_blocks() -> None:
    """Two blocks that read one set of weights are two fused nodes over one set of weights."""

    def experts_twice(self: Block, y: torch.Tensor, shared: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        z = y + shared
        again = self.combine(self.experts(z, self.select(self.choice(self.scores(self.logits(z))))[1]), _again(self, z))
        return z + again

    def _again(self: Block, z: torch.Tensor) -> torch.Tensor:
        scores = self.scores(self.logits(z))
        values, indices = self.select(self.choice(scores))
        return self.weigh(scores, scores, values, indices)

    before = program(join=experts_twice)
    result = run(fuse_moe(), before)
    # the second block computes its indices twice: two topk are not one, so it must be refused, the first fused
    assert result.changed == 1
    assert any("indices" in r.reason for r in result.refusals)
    check_equal(before, result.program)
    check_golden("fuse_moe_two_blocks", result.program.text())
