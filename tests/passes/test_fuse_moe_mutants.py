"""Random mutants of graphs that fuse: each is refused, or computes what it computed before. None is miscompiled.

MOEC_MUTANTS=N tries N edits of every graph (default 16); the seeds are fixed, so a failure comes back.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from moec.compiler.program import Program, module_path
from moec.passes.flatten_tokens import flatten_tokens
from moec.passes.fuse_moe import fuse_moe
from moec.passes.narrow_routing import narrow_routing
from tests.harness import CALLS, run
from tests.interpreter import Interpreter
from tests.passes import hand_zoo, loop_zoo, moe_zoo
from tests.passes.moe_zoo import Block
from tests.passes.mutate import mutant
from tests.variants import quick

COUNT = int(os.environ.get("MOEC_MUTANTS", "16"))
# weights times this much: what a clamp or a mask hides at one size shows at another
SIZES = (1.0, 4.0)
# as tests/harness.py, relative to the largest value: the larger weights square and cube it
TOLERANCE = 1e-4


def _softmax(self: Block, logits: Tensor) -> Tensor:
    return logits.softmax(-1)


def _plain(self: Block, scores: Tensor) -> Tensor:
    return scores


def _values(self: Block, scores: Any, choice: Any, values: Tensor, indices: Any) -> Tensor:
    return values / values.sum(-1, keepdim=True)


def _bmm_up(self: Block, x: Tensor, indices: Tensor) -> Tensor:
    return torch.bmm(x.repeat_interleave(self.top_k, 0).unsqueeze(1), self.w13[indices.reshape(-1)]).squeeze(1)


def _bmm_down(self: Block, hidden: Tensor, indices: Tensor) -> Tensor:
    return torch.bmm(hidden.unsqueeze(1), self.w2[indices.reshape(-1)]).view(-1, self.top_k, moe_zoo.D)


def _grouped(self: Block, choice: Tensor) -> tuple[Tensor, Tensor]:
    scores = choice.view(-1, 3, 2).topk(2, -1).values.sum(-1)
    kept = torch.zeros_like(scores).scatter(1, scores.topk(2, -1).indices, 1.0)
    mask = kept.unsqueeze(-1).expand(-1, 3, 2).reshape(-1, 6)
    values, indices = choice.masked_fill(~mask.bool(), -torch.inf).topk(self.top_k, -1)
    return values, indices


def _after_topk(self: Block, scores: Any, choice: Any, values: Tensor, indices: Any) -> Tensor:
    return values.softmax(-1)


def _clamped(self: Block, joined: Tensor) -> Tensor:
    gate, up = joined[..., ::2].clamp(max=0.7), joined[..., 1::2].clamp(-0.7, 0.7)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.7))


def _gated_shared(self: Block, y: Tensor, shared: Tensor, x: Tensor) -> Tensor:
    return y + F.sigmoid(self.shared_gate(x)) * shared


BLOCKS: dict[str, Mapping[str, Any]] = {
    "einsum": {},
    "gated_shared": {"join": _gated_shared},
    "bmm": {"scores": _softmax, "choice": _plain, "weigh": _values, "up": _bmm_up, "down": _bmm_down},
    "groups": {"experts": 6, "top_k": 3, "select": _grouped},
    "interleaved": {"scores": _plain, "choice": _plain, "weigh": _after_topk, "activate": _clamped, "shared": False},
}
LOOPS = ["mixtral", "written", "dense", "dense_one_hot", "any_of", "stacked", "gathered"]
HAND = [
    "router_einsum", "router_plus_bias", "sorted_scores", "normalized_by_norm", "scale_of_experts", "scores_times_mask",
    "masked_logits", "scattered_logits", "switch_by_max", "switch_by_argmax", "switch_by_topk", "batched_dense",
    "batched_places", "batched_masks", "all_einsum", "all_einsum_combined", "all_bmm_biased", "all_matmul",
    "all_then_gathered", "weighted_before", "matmul_of_gathered",
]  # fmt: skip
# one of each way to select, to serve and to add up; the others are between two of these
FAST = (
    "einsum", "bmm", "groups", "mixtral", "dense_one_hot", "stacked", "router_einsum", "sorted_scores", "masked_logits",
    "switch_by_topk", "all_einsum", "all_matmul", "weighted_before",
)  # fmt: skip
GRAPHS: dict[str, Callable[[], Program]] = {
    **{name: lambda options=options: moe_zoo.program(**options) for name, options in BLOCKS.items()},
    **{name: lambda name=name: loop_zoo.zoo({"moe": {"dispatch": getattr(loop_zoo, name)}}) for name in LOOPS},
    **{name: lambda name=name: hand_zoo.zoo({name: hand_zoo.FUSED[name]}) for name in HAND},
}


def _of_the_block(node: Node) -> bool:
    return "blocks." in module_path(node)


def _fused(program: Program) -> Program | None:
    """The program after the rules of a MoE block; None when it was refused."""
    for rule in (flatten_tokens(), narrow_routing()):
        program = run(rule, program).program
    result = run(fuse_moe(), program)
    return result.program if result.changed else None


def _outputs(program: Program, size: float) -> list[Tensor] | None:
    """Results of every call of `CALLS`; None when an index is out of range or a value is not finite."""
    interpreter, generator = Interpreter(program), torch.Generator().manual_seed(1)
    for name, value in interpreter.state.items():
        if value.is_floating_point() and value.dim() > 1:
            interpreter.state[name] = value * size
    results = []
    for tokens, start in CALLS:
        ids = torch.randint(0, program.info.vocab_size, (1, tokens), generator=generator)
        try:
            results.append(interpreter(ids, torch.tensor([start])))
        except (IndexError, RuntimeError):
            return None
    return results if all(torch.isfinite(r).all() for r in results) else None


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    """An edit that is not well formed is reported by torch, at length."""
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", quick(GRAPHS, FAST))
def test_no_mutant_is_miscompiled(name: str) -> None:
    no_mutant_is_miscompiled(GRAPHS[name]())


def no_mutant_is_miscompiled(program: Program) -> None:
    """COUNT random edits of a graph that fuses."""
    assert _fused(program) is not None
    tried = 0
    for seed in range(COUNT):
        found = mutant(program, seed, _of_the_block, edits=1 + seed % 2)
        if found is None:
            continue
        tried += 1
        changed, what = found
        fused = _fused(changed)
        if fused is None:
            continue
        for size in SIZES:
            wanted = _outputs(changed, size)
            if wanted is None:
                continue
            got = _outputs(fused, size)
            assert got is not None, f"seed {seed}: {what}: it does not run any more"
            for a, b in zip(wanted, got, strict=True):
                near = TOLERANCE * (1 + float(a.abs().max()))
                torch.testing.assert_close(b, a, atol=near, rtol=0, msg=lambda t, w=what, s=seed: f"seed {s}: {w}: {t}")
    assert tried >= COUNT // 8, "hardly an edit was well formed: this proves nothing"
