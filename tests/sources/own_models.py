"""Models that a user of `model: {python: ...}` might write. D model width, E experts, F expert width, S positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

V, D, E, FF, S, HEADS = 48, 32, 4, 32, 24, 2


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3, self.w2 = (nn.Linear(*s, bias=False) for s in ((D, FF), (D, FF), (FF, D)))

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Moe(nn.Module):
    """A list of experts and a masked loop, as most people write it."""

    def __init__(self, top_k: int) -> None:
        super().__init__()
        self.gate, self.top_k = nn.Linear(D, E, bias=False), top_k
        self.experts = nn.ModuleList(Expert() for _ in range(E))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        weights, chosen = self.gate(flat).topk(self.top_k, -1)
        weights, y = weights.softmax(-1), torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, nth = torch.where(chosen == number)
            y = y.index_add(0, token, weights[token, nth, None] * expert(flat[token]))
        return y.view_as(x)


class Attention(nn.Module):
    def __init__(self, cached: bool) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        if cached:
            for name in ("keys", "values"):
                self.register_buffer(name, torch.zeros(1, HEADS, S, D // HEADS))

    def forward(self, x: Tensor, start_pos: Tensor | None = None) -> Tensor:
        q, k, v = (p.unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in self.qkv(x).chunk(3, -1))
        if start_pos is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            rows = start_pos + torch.arange(x.shape[1])
            self.keys.index_copy_(2, rows, k)
            self.values.index_copy_(2, rows, v)
            mask = torch.arange(S)[None, :] <= rows[:, None]
            y = F.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2))


class Layers(nn.Module):
    def __init__(self, cached: bool, top_k: int = 2) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed, self.head = nn.Embedding(V, D), nn.Linear(D, V, bias=False)
        self.attention, self.moe = Attention(cached), Moe(top_k)
        self.norm = nn.RMSNorm(D)
        self.context = S

    def body(self, tokens: Tensor, start_pos: Tensor | None) -> Tensor:
        h = self.embed(tokens)
        h = h + self.attention(h, start_pos)
        return self.head(h + self.moe(self.norm(h)))


class Cached(Layers):
    def __init__(self) -> None:
        super().__init__(cached=True)
        self.bos_id, self.eos_ids = 1, (2,)

    def forward(self, tokens: Tensor, start_pos: Tensor) -> Tensor:
        return self.body(tokens, start_pos)


class Stateless(Layers):
    def __init__(self) -> None:
        super().__init__(cached=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.body(tokens, None)


def cached() -> nn.Module:
    return Cached()


def uncounted() -> nn.Module:
    """One that does not say how many positions it has; its cache does."""
    model = Cached()
    del model.context
    return model


def stateless() -> nn.Module:
    return Stateless()


def endless() -> nn.Module:
    """A stateless module that does not say how many positions it has."""
    model = Stateless()
    del model.context
    return model


def fails() -> nn.Module:
    raise ValueError("no weights here")


def returns_a_number() -> int:
    return 3


class Wrong(nn.Module):
    def forward(self, tokens: Tensor, start_pos: Tensor) -> Tensor:
        return tokens + start_pos


def wrong() -> nn.Module:
    return Wrong()
