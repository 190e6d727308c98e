"""fuse_moe on experts that are spelled out one by one: what matches, what is honoured, what must be refused and why."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from moec.compiler.ops import FusedMoe, fused_moe
from moec.compiler.program import Program, Role, module_path
from moec.passes.fuse_moe import fuse_moe
from tests.harness import check_equal, check_rule, run
from tests.passes import loop_zoo as zoo
from tests.passes.loop_zoo import FF, D, Loop

# ------------------------------------------------------------------------------------------------------ what must match


def _biased(self: Loop, expert: int, x: Tensor) -> Tensor:
    e: Any = self.experts[expert]
    gate = F.linear(x, e.gate_proj.weight, e.gate_bias)
    return F.linear(F.silu(gate) * F.linear(x, e.up_proj.weight, e.up_bias), e.down_proj.weight, e.down_bias)


def _added_bias(self: Loop, expert: int, x: Tensor) -> Tensor:
    e: Any = self.experts[expert]
    gate, up = e.gate_proj(x) + e.gate_bias, e.up_bias + e.up_proj(x)
    return e.down_proj(F.silu(gate) * up) + e.down_bias


def _one_matrix(self: Loop, expert: int, x: Tensor) -> Tensor:
    """Stacked weights [E, in, out], one expert at a time."""
    gate, up = (x @ self.w13[expert]).chunk(2, -1)
    return (F.silu(gate) * up) @ self.w2[expert]


def _unbound(self: Loop, expert: int, x: Tensor) -> Tensor:
    gate, up = F.linear(x, self.w13.unbind(0)[expert].t()).split(FF, -1)
    return F.linear(F.gelu(gate) * up, self.w2.unbind(0)[expert].t())


def _ungated(self: Loop, expert: int, x: Tensor) -> Tensor:
    e: Any = self.experts[expert]
    return e.down_proj(F.relu(e.up_proj(x)).square())


def _clamped(self: Loop, expert: int, gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate.clamp(max=0.4)) * up.clamp(-0.3, 0.5)


def _permuted(self: Loop, expert: int, x: Tensor) -> Tensor:
    """The router's row e means another module: honoured by the order in which they are stacked."""
    e: Any = self.experts[(expert + 1) % self.count]
    return e.down_proj(F.silu(e.gate_proj(x)) * e.up_proj(x))


def _permuted_stack(self: Loop, expert: int, x: Tensor) -> Tensor:
    gate, up = (x @ self.w13[self.count - 1 - expert]).chunk(2, -1)
    return (F.silu(gate) * up) @ self.w2[self.count - 1 - expert]


def _swapped_roles(self: Loop, expert: int, x: Tensor) -> Tensor:
    """What is called up is the gate: only the computation decides."""
    e: Any = self.experts[expert]
    return e.down_proj(F.silu(e.up_proj(x)) * e.gate_proj(x))


def _swapped_in_one(self: Loop, expert: int, x: Tensor) -> Tensor:
    e: Any = self.experts[expert]
    if expert == 1:
        return e.down_proj(F.silu(e.up_proj(x)) * e.gate_proj(x))
    return e.down_proj(F.silu(e.gate_proj(x)) * e.up_proj(x))


def _reversed(self: Loop) -> list[int]:
    return list(reversed(range(self.count)))


def _shifted_mask(self: Loop, expert: int, indices: Tensor) -> Tensor:
    """Module e serves the tokens that select e - 1: a permutation, honoured."""
    return indices == (expert - 1) % self.count


MATCHES: dict[str, dict[str, Any]] = {
    "masked": {},
    "mixtral": {"dispatch": zoo.mixtral},
    "written": {"dispatch": zoo.written},
    "dense": {"dispatch": zoo.dense},
    "dense_sum": {"dispatch": zoo.dense_sum},
    "dense_one_hot": {"dispatch": zoo.dense_one_hot},
    "any_of": {"dispatch": zoo.any_of},
    "stacked": {"dispatch": zoo.stacked},
    "gathered": {"dispatch": zoo.gathered},
    "as_wide_as_experts": {"experts": D, "top_k": 4, "dispatch": zoo.dense},
    "as_wide_masked": {"experts": D, "top_k": 1},
    "biased": {"mlp": _biased},
    "added_bias": {"mlp": _added_bias, "dispatch": zoo.dense},
    "one_matrix": {"mlp": _one_matrix},
    "unbound": {"mlp": _unbound, "dispatch": zoo.dense_sum},
    "ungated": {"mlp": _ungated, "dispatch": zoo.mixtral},
    "clamped": {"activate": _clamped},
    "permuted": {"mlp": _permuted},
    "permuted_stack": {"mlp": _permuted_stack, "dispatch": zoo.dense},
    "swapped_roles": {"mlp": _swapped_roles},
    "swapped_in_one": {"mlp": _swapped_in_one, "dispatch": zoo.gathered},
    "reversed": {"order": _reversed},
    "reversed_dense": {"order": _reversed, "dispatch": zoo.dense},
    "shifted_mask": {"selects": _shifted_mask},
}


@pytest.fixture(scope="module")
def fused() -> Program:
    blocks = {f"is_{name}": options for name, options in MATCHES.items()}
    return check_rule(fuse_moe(), zoo.zoo(blocks), count=len(MATCHES))


def _node(program: Program, name: str) -> Node:
    return next(n for n in program.graph.nodes if n.target is fused_moe and f".{name}." in f"{module_path(n)}.")


@pytest.mark.parametrize("name", MATCHES)
def test_fused(fused: Program, name: str) -> None:
    moe = FusedMoe.of(_node(fused, f"is_{name}"))
    names = [str(fused.weight_of(weight)) for weight in (moe.w13, moe.w2)]
    w13, w2 = (fused.weights[n] for n in names)
    count = MATCHES[name].get("experts", 3)
    assert w13.shape[0] == w2.shape[0] == count
    assert all(fused.roles[n] is Role.EXPERT for n in names)
    assert (moe.b13 is not None) == (moe.b2 is not None) == ("bias" in name)
    what = moe.mlp
    assert what.layout == ("in_out" if name in ("one_matrix", "unbound", "permuted_stack") else "out_in")
    assert what.gated == (name != "ungated")


def test_stacked_weights_are_used_as_they_are(fused: Program) -> None:
    assert fused.weight_of(FusedMoe.of(_node(fused, "is_one_matrix")).w13) == "blocks.is_one_matrix.w13"
    assert fused.weight_of(FusedMoe.of(_node(fused, "is_permuted_stack")).w13) != "blocks.is_permuted_stack.w13"


def test_modules_are_stacked_in_the_order_of_the_router(fused: Program) -> None:
    before = zoo.zoo({"is_permuted": MATCHES["permuted"]})
    moe = FusedMoe.of(_node(fused, "is_permuted"))
    stack = fused.weights[str(fused.weight_of(moe.w13))].load()
    for expert in range(3):
        parts = [
            before.weights[f"blocks.is_permuted.experts.{(expert + 1) % 3}.{p}_proj.weight"] for p in ("gate", "up")
        ]
        assert torch.equal(stack[expert], torch.cat([p.load() for p in parts]))
    assert not any("experts.0.gate_proj" in name for name in fused.weights), "the pieces are weights no longer"


def test_golden() -> None:
    check_rule(fuse_moe(), zoo.zoo({"moe": {"experts": 2, "top_k": 1}}), count=1, golden="fuse_moe_loop")


# ------------------------------------------------------------------------------------------------- what must be refused


def _in_one(change: Callable[[Tensor], Tensor], which: int = 1) -> Any:
    def mlp(self: Loop, expert: int, x: Tensor) -> Tensor:
        y = Loop.mlp(self, expert, x)
        return change(y) if expert == which else y

    return mlp


def _other_activation(self: Loop, expert: int, gate: Tensor, up: Tensor) -> Tensor:
    return (F.gelu(gate) if expert == 2 else F.silu(gate)) * up


def _clamp_after(self: Loop, expert: int, gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate).clamp(max=0.4) * up


def _clamp_in_one(self: Loop, expert: int, gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate.clamp(max=0.4) if expert == 0 else gate) * up


def _bias_dropped(self: Loop, expert: int, x: Tensor) -> Tensor:
    return Loop.mlp(self, expert, x) if expert == 1 else _biased(self, expert, x)


def _down_bias_dropped(self: Loop, expert: int, x: Tensor) -> Tensor:
    e: Any = self.experts[expert]
    hidden = F.silu(F.linear(x, e.gate_proj.weight, e.gate_bias)) * F.linear(x, e.up_proj.weight, e.up_bias)
    return F.linear(hidden, e.down_proj.weight, e.down_bias if expert else None)


def _gate_bias_only(self: Loop, expert: int, x: Tensor) -> Tensor:
    e: Any = self.experts[expert]
    return e.down_proj(F.silu(F.linear(x, e.gate_proj.weight, e.gate_bias)) * e.up_proj(x))


def _used_twice(self: Loop, expert: int, x: Tensor) -> Tensor:
    e, first = self.experts[expert], self.experts[0]
    up = first.up_proj if expert == 1 else e.up_proj  # type: ignore[union-attr]
    return e.down_proj(F.silu(e.gate_proj(x)) * up(x))  # type: ignore[operator]


def _same_expert_twice(self: Loop, expert: int, x: Tensor) -> Tensor:
    return Loop.mlp(self, min(expert, 1), x)


def _gate_is_up(self: Loop, expert: int, x: Tensor) -> Tensor:
    e: Any = self.experts[expert]
    return e.down_proj(F.silu(e.gate_proj(x)) * e.gate_proj(x))


def _missing(self: Loop) -> list[int]:
    return [0, 2]


def _last_missing(self: Loop) -> list[int]:
    return [0, 1]


def _repeated_expert(self: Loop) -> list[int]:
    return [0, 1, 2, 1]


def _reader_of_indices(self: Loop, y: Tensor, indices: Tensor) -> Tensor:
    return y + indices.sum().float()


def _from_ones(self: Loop, x: Tensor) -> Tensor:
    return torch.ones_like(x)


def _from_x(self: Loop, x: Tensor) -> Tensor:
    return x.clone()


def _other_rank(self: Loop, expert: int, y: Tensor, weights: Tensor, tokens: Tensor, ranks: Tensor) -> Tensor:
    return y * weights[tokens, torch.zeros_like(ranks), None]


def _unweighted(self: Loop, expert: int, y: Tensor, weights: Tensor, tokens: Tensor, ranks: Tensor) -> Tensor:
    return y


def _one_doubled(self: Loop, expert: int, y: Tensor, weights: Tensor, tokens: Tensor, ranks: Tensor) -> Tensor:
    return y * ((2 * weights) if expert == 1 else weights)[tokens, ranks, None]


def _ranks_for_tokens(self: Loop, expert: int, y: Tensor, weights: Tensor, tokens: Tensor, ranks: Tensor) -> Tensor:
    return y * weights[ranks, ranks, None]


def _backwards(self: Loop, expert: int, x: Tensor, tokens: Tensor) -> Tensor:
    return x[tokens.flip(0)]


def _other_rows(self: Loop, expert: int, x: Tensor, tokens: Tensor) -> Tensor:
    return torch.tanh(x)[tokens] if expert == 0 else x[tokens]


def _subtracted(self: Loop, expert: int, y: Tensor, tokens: Tensor, rows: Tensor) -> Tensor:
    return y.index_add(0, tokens, rows, alpha=-1)


def _overwritten(self: Loop, expert: int, y: Tensor, tokens: Tensor, rows: Tensor) -> Tensor:
    return y.index_put((tokens,), rows)


def _elsewhere(self: Loop, expert: int, y: Tensor, tokens: Tensor, rows: Tensor) -> Tensor:
    return y.index_add(0, tokens.flip(0), rows)


def _of_others(self: Loop, expert: int, indices: Tensor) -> Tensor:
    return indices != expert


def _from_one_on(self: Loop, expert: int, indices: Tensor) -> Tensor:
    return indices >= expert


def _moved_indices(self: Loop, expert: int, indices: Tensor) -> Tensor:
    return indices.flip(0) == expert


def _not_from_zero(self: Loop, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    by_expert = torch.full((x.shape[0], self.count), 0.1).scatter(1, indices, weights)
    return sum(self.mlp(e, x) * by_expert[:, e : e + 1] for e in range(self.count))  # type: ignore[return-value]


def _wrong_column(self: Loop, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    by_expert = zoo.scattered(self, x, weights, indices)
    return sum(self.mlp(e, x) * by_expert[:, min(e, 1) : min(e, 1) + 1] for e in range(self.count))  # type: ignore[return-value]


def _with_residual(self: Loop, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    by_expert, y = zoo.scattered(self, x, weights, indices), x
    for e in range(self.count):
        y = y + self.mlp(e, x) * by_expert[:, e : e + 1]
    return y


def _scaled_sum(self: Loop, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    by_expert, y = zoo.scattered(self, x, weights, indices), torch.zeros_like(x)
    for e in range(self.count):
        y = torch.add(y, self.mlp(e, x) * by_expert[:, e : e + 1], alpha=2)
    return y


def _stack_of_rows(self: Loop, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    outputs = torch.stack([self.mlp(e, x * (e + 1)) for e in range(self.count)], 1)
    return (outputs * zoo.scattered(self, x, weights, indices).unsqueeze(-1)).sum(1)


def _ranks_of_stack(self: Loop, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    outputs = torch.stack([self.mlp(e, x) for e in range(self.count)], 1)
    picked = outputs.gather(1, indices.flip(1).unsqueeze(-1).expand(-1, -1, D))
    return (picked * weights.unsqueeze(-1)).sum(1)


def _narrow(self: Loop, expert: int, x: Tensor) -> Tensor:
    """An expert that uses a part of its projections."""
    e: Any = self.experts[expert]
    if expert != 1:
        return Loop.mlp(self, expert, x)
    return F.linear((F.silu(e.gate_proj(x)) * e.up_proj(x))[:, :3], e.down_proj.weight[:, :3])


MUTANTS: dict[str, tuple[dict[str, Any], str]] = {
    "other_activation": ({"activate": _other_activation}, "expert 2 computes"),
    "clamp_after": ({"activate": _clamp_after}, "neither act"),
    "clamp_in_one": ({"activate": _clamp_in_one, "dispatch": zoo.dense}, "computes"),
    "bias_dropped": ({"mlp": _bias_dropped}, "same biases"),
    "down_bias_dropped": ({"mlp": _down_bias_dropped, "dispatch": zoo.mixtral}, "same biases"),
    "gate_bias_only": ({"mlp": _gate_bias_only}, "only one of gate and up"),
    "used_twice": ({"mlp": _used_twice}, "another projection reads already"),
    "same_expert_twice": ({"mlp": _same_expert_twice, "dispatch": zoo.dense}, "another projection reads already"),
    "gate_is_up": ({"mlp": _gate_is_up, "dispatch": zoo.stacked}, "reads already|neither act"),
    "missing": ({"order": _missing}, "expert 1 is not among"),
    "last_missing": ({"order": _last_missing, "dispatch": zoo.dense}, "router scores 3 experts, 2 are added"),
    "repeated": ({"order": _repeated_expert}, "added twice"),
    "reader_of_indices": ({"extra": _reader_of_indices}, "inside the block|other readers|not combined|is added to"),
    "from_ones": ({"start": _from_ones}, "not one expert times its weight"),
    "from_x": ({"start": _from_x}, "not one expert times its weight|not combined"),
    "other_rank": ({"weigh": _other_rank}, "weight that selected them"),
    "unweighted": ({"weigh": _unweighted}, "weight that selected them"),
    "one_doubled": ({"weigh": _one_doubled}, "not weighted like the others"),
    "ranks_for_tokens": ({"weigh": _ranks_for_tokens}, "weight that selected them"),
    "backwards": ({"rows": _backwards}, "does not read the tokens that select it"),
    "other_rows": ({"rows": _other_rows}, "the others"),
    "subtracted": ({"add": _subtracted}, "no rule reads"),
    "overwritten": ({"add": _overwritten}, "overwritten"),
    "elsewhere": ({"add": _elsewhere}, "not those which select one expert"),
    "of_others": ({"selects": _of_others}, "not those which select one expert"),
    "from_one_on": ({"selects": _from_one_on}, "not those which select one expert"),
    "moved_indices": ({"selects": _moved_indices}, "do not come from topk|weighted like the others"),
    "not_from_zero": ({"dispatch": _not_from_zero}, "not one expert times its weight|not summed"),
    "wrong_column": ({"dispatch": _wrong_column}, "added twice"),
    "with_residual": ({"dispatch": _with_residual}, "not one expert times its weight"),
    "scaled_sum": ({"dispatch": _scaled_sum}, "not one expert|not summed|alpha"),
    "stack_of_rows": ({"dispatch": _stack_of_rows}, "the others"),
    "ranks_of_stack": ({"dispatch": _ranks_of_stack}, "do not come from topk"),
    "narrow": ({"mlp": _narrow}, "own weight|neither act"),
    "one_negated": ({"mlp": _in_one(torch.neg)}, "own weight"),
    "one_squashed": ({"mlp": _in_one(torch.tanh), "dispatch": zoo.mixtral}, "own weight"),
    "one_shifted": ({"mlp": _in_one(lambda y: y + 1.0), "dispatch": zoo.dense}, "own weight"),
}


@pytest.fixture(scope="module")
def mutants() -> tuple[Program, Any]:
    program = zoo.zoo({f"is_{name}": options for name, (options, _) in MUTANTS.items()})
    result = run(fuse_moe(), program)
    if result.changed:
        check_equal(program, result.program)
    return program, result


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_refused(mutants: tuple[Program, Any], name: str) -> None:
    _, result = mutants
    fused = [module_path(n) for n in result.program.graph.nodes if n.target is fused_moe]
    assert not any(f".is_{name}." in f"{path}." for path in fused), "a changed block was fused"
    refused = [r for r in result.refusals if f".is_{name}." in f"{r.where}."]
    reasons = [r.reason for r in refused]
    assert all(r.remedy and "(" in r.node for r in refused), "a refusal names node, operator and remedy"
    assert any(re.search(MUTANTS[name][1], reason) for reason in reasons), reasons or result.refusals
