"""fuse_moe reads a product in every spelling alike: linear, matmul, bmm, einsum, operands transposed or exchanged.

Both lists are one program each: what matches is fused and computes the same, what does not is refused or computes the
same, since a product that is read wrongly is the worst fault.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moec.compiler.ops import FusedMoe
from moec.compiler.pipeline import PassResult
from moec.compiler.program import Program, module_path
from moec.passes.fuse_moe import fuse_moe
from tests.harness import check_equal, check_rule, run
from tests.passes.moe_zoo import zoo

Step = Callable[..., Any]


def _flat(indices: Tensor) -> Tensor:
    return indices.reshape(-1)


def _pairs(x: Tensor, top_k: int) -> Tensor:
    return x.unsqueeze(1).expand(-1, top_k, -1).reshape(-1, 1, x.shape[-1])


MATCHES: dict[str, tuple[str, Step]] = {
    "router_matmul": ("logits", lambda self, x: x @ self.router.t()),
    "router_mm_T": ("logits", lambda self, x: torch.mm(x, self.router.T)),
    "router_einsum": ("logits", lambda self, x: torch.einsum("td,ed->te", x, self.router)),
    "router_weight_first": ("logits", lambda self, x: torch.einsum("ed,td->te", self.router, x)),
    "router_addmm": ("logits", lambda self, x: torch.addmm(self.router_bias, x, self.router.t())),
    "up_matmul": ("up", lambda self, x, i: (x[:, None, None] @ self.w13[i]).squeeze(2)),
    "up_bmm_rows": (
        "up",
        lambda self, x, i: torch.bmm(_pairs(x, self.top_k), self.w13[_flat(i)]).view(-1, self.top_k, 14),
    ),
    "up_bmm_columns": (
        "up",
        lambda self, x, i: torch.bmm(
            self.w13[_flat(i)].transpose(1, 2), _pairs(x, self.top_k).transpose(1, 2)
        ).view(-1, self.top_k, 14),
    ),
    "up_einsum_transposed": (
        "up", lambda self, x, i: torch.einsum("td,tkfd->tkf", x, self.w13[i].transpose(2, 3))
    ),
    "down_matmul": ("down", lambda self, h, i: (h.unsqueeze(2) @ self.w2[i]).squeeze(2)),
    "combine_einsum": ("combine", lambda self, y, w: torch.einsum("tkd,tk->td", y, w)),
    "combine_weights_first": ("combine", lambda self, y, w: torch.einsum("tk,tkd->td", w, y)),
    "combine_bmm": ("combine", lambda self, y, w: torch.bmm(w.unsqueeze(1), y).squeeze(1)),
    "combine_matmul": ("combine", lambda self, y, w: (w.unsqueeze(1) @ y).squeeze(1)),
    "combine_columns": ("combine", lambda self, y, w: torch.bmm(y.transpose(1, 2), w.unsqueeze(-1)).squeeze(-1)),
    "shared_matmul": (
        "join",
        lambda self, y, s, x: y
        + (F.silu(x @ self.gate_proj.weight.t()) * self.up_proj(x)) @ self.down_proj.weight.T,
    ),
    "shared_einsum": (
        "join",
        lambda self, y, s, x: y
        + self.down_proj(
            F.silu(torch.einsum("td,sd->ts", x, self.gate_proj.weight))
            * torch.einsum("sd,td->ts", self.up_proj.weight, x)
        ),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def fused() -> Program:
    blocks = {f"is_{name}": {step: function} for name, (step, function) in MATCHES.items()}
    return check_rule(fuse_moe(), zoo(blocks), count=len(MATCHES))


@pytest.mark.parametrize("name", MATCHES)
def test_fused(fused: Program, name: str) -> None:
    calls = [
        call
        for node in fused.graph.nodes
        if f".is_{name}." in f"{module_path(node)}." and (call := FusedMoe.find(node)) is not None
    ]
    assert len(calls) == 1
    assert calls[0].has_shared
    assert (calls[0].router_bias is not None) == (name == "router_addmm")


MISSES: dict[str, tuple[str, Step, str]] = {
    "router_of_scaled": ("logits", lambda self, x: torch.addmm(self.router_bias, x, self.router.t(), beta=2), "linear"),
    "router_over_tokens": (
        "logits", lambda self, x: torch.einsum("td,ed->te", x, self.router.flip(1)), "computed"
    ),
    "up_bmm_other_pairs": (
        "up",
        lambda self, x, i: torch.bmm(
            _pairs(x, self.top_k), self.w13[_flat(i.flip(1))]
        ).view(-1, self.top_k, 14),
        ".",
    ),
    "down_summed_over_rank": ("down", lambda self, h, i: torch.einsum("tjf,tkfd->tkd", h, self.w2[i]), "."),
    "combine_other_rank": ("combine", lambda self, y, w: torch.bmm(w.flip(1).unsqueeze(1), y).squeeze(1), "."),
    "combine_squared": ("combine", lambda self, y, w: torch.bmm((w * w).unsqueeze(1), y).squeeze(1), "."),
    "combine_features": (
        "combine", lambda self, y, w: torch.bmm(w.unsqueeze(1), y.roll(1, 2)).squeeze(1), "."
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def tried() -> PassResult:
    before = zoo({name: {step: function} for name, (step, function, _) in MISSES.items()})
    result = run(fuse_moe(), before)
    check_equal(before, result.program)
    return result


@pytest.mark.parametrize("name", MISSES)
def test_refused(tried: PassResult, name: str) -> None:
    """With a reason; equality of the whole is the fixture's."""
    inside = [n for n in tried.program.graph.nodes if f"blocks.{name}." in f"{module_path(n)}."]
    assert not any(FusedMoe.find(node) for node in inside)
    reasons = [r.reason for r in tried.refusals if f"blocks.{name}." in f"{r.where}."]
    assert any(re.search(MISSES[name][2], reason) for reason in reasons), reasons
