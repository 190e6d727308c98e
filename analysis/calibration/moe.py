"""One fused MoE layer on all calibration tokens at once: what each expert sees, and what the layer gives.

Tokens go where the router sends them. An expert that fewer than a minimum of tokens reach is shown more, those that its
router scores highest among the others; they count for its statistics only, never for the layer's output.

T tokens, D width, E experts, K experts per token, F expert width, S shared width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moec.compiler.ops.attributes import Experts, Routing
from moec.compiler.ops.moe_math import activate, choices, combine_weights, router_logits


@dataclass(frozen=True)
class Seen:
    """Rows of inputs: those that the router sent here, and those that were added."""

    routed: Tensor
    forced: Tensor


@dataclass(frozen=True)
class ExpertInputs:
    """What one expert's two products read, [n, D] and [n, F]."""

    expert: int
    up: Seen
    down: Seen


class MoeLayer:
    """A fused node with its float weights loaded, by the names of its operator's arguments."""

    def __init__(self, given: dict[str, Any]) -> None:
        self._given = given
        self.routing, self.experts = Routing.parse(given["routing"]), Experts.parse(given["experts"])
        self.count = int(given["router_weight"].shape[0])

    def run(self, x_TD: Tensor, router_input_TD: Tensor, least: int, y_TD: Tensor) -> Iterator[ExpertInputs]:
        """Each expert's inputs, one expert at a time; the layer's output is added up in `y_TD`, which starts as zeros.

        least: tokens that every expert is to see, if there are so many.
        """
        given = self._given
        logits_TE = router_logits(router_input_TD, given["router_weight"], given["router_bias"])
        choice_TE, scores_TE = choices(logits_TE, given["selection_bias"], self.routing)
        indices_TK = choice_TE.topk(given["top_k"], -1).indices
        weights_TK = combine_weights(scores_TE, indices_TK, self.routing)
        for expert in range(self.count):
            token, rank = (indices_TK == expert).nonzero(as_tuple=True)
            x, weight = x_TD[token], weights_TK[token, rank].unsqueeze(-1)
            more = self._more(choice_TE[:, expert], token, least)
            x_more = x_TD[more]
            if self.routing.apply == "input":
                x = x * weight
                x_more = x_more * self._weight_if_chosen(scores_TE[more], indices_TK[more], expert)
            hidden, hidden_more = self._hidden(expert, x), self._hidden(expert, x_more)
            out = self._product("w2", "b2", expert, hidden)
            y_TD.index_add_(0, token, out * weight if self.routing.apply == "output" else out)
            yield ExpertInputs(expert, Seen(x, x_more), Seen(hidden, hidden_more))

    def shared(self, x_TD: Tensor, y_TD: Tensor) -> Tensor | None:
        """The input [T, S] of the shared expert's second product, its output added to `y_TD`; None without one."""
        given = self._given
        if given.get("shared_w13") is None:
            return None
        halves = Experts(**{**vars(self.experts), "layout": "out_in", "interleaved": False})
        hidden = activate(functional.linear(x_TD, given["shared_w13"].to(torch.float32)), halves)
        out = functional.linear(hidden, given["shared_w2"].to(torch.float32))
        if given.get("shared_gate") is not None:
            out = out * torch.sigmoid(functional.linear(x_TD, given["shared_gate"].to(torch.float32)))
        y_TD += out
        return hidden

    def _more(self, choice_T: Tensor, token: Tensor, least: int) -> Tensor:
        """Tokens to add for an expert that `token` alone reaches: the highest scores among the others."""
        missing = min(least, len(choice_T)) - len(token)
        if missing <= 0:
            return token[:0]
        others = choice_T.clone()
        others[token] = -torch.inf
        return others.topk(missing).indices

    def _weight_if_chosen(self, scores: Tensor, indices: Tensor, expert: int) -> Tensor:
        """The combine weight [n, 1] that `expert` would have in the place of each token's last choice."""
        chosen = indices.clone()
        chosen[:, -1] = expert
        return combine_weights(scores, chosen, self.routing)[:, -1:]

    def _hidden(self, expert: int, x: Tensor) -> Tensor:
        return activate(self._product("w13", "b13", expert, x), self.experts)

    def _product(self, name: str, bias: str, expert: int, x: Tensor) -> Tensor:
        w = self._given[name][expert].to(torch.float32)
        y = functional.linear(x, w if self.experts.layout == "out_in" else w.t())
        b = self._given.get(bias)
        return y if b is None else y + b[expert].to(torch.float32)
