"""fuse_rms_norm and fuse_rope: every spelling that means the operator, and near misses that do not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from moec.compiler.ops import RmsNorm, Rope
from moec.compiler.program import Program, Role
from moec.passes.fuse_rms_norm import fuse_rms_norm
from moec.passes.fuse_rope import fuse_rope
from tests.harness import CONTEXT, VOCABULARY, check_equal, check_rule, export_toy, run
from tests.passes.moe_zoo import parameter

H, d = 3, 8
D = H * d
EPS = 1e-3


class Norms(nn.Module):
    def __init__(self, step: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.embed, self.weight = parameter(VOCABULARY, D), parameter(D)
        self.step = step

    def forward(self, tokens: Tensor, start_pos: Tensor) -> Tensor:
        return self.step(F.embedding(tokens, self.embed), self.weight)


def norm_program(step: Callable[[Tensor, Tensor], Tensor]) -> Program:
    return export_toy(lambda: Norms(step))


def _rsqrt(x: Tensor) -> Tensor:
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


# the step, and of the norm that it becomes: whether it has a weight, and its eps
NORMS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[bool, float]]] = {
    "operator": (lambda x, w: F.rms_norm(x, (D,), w, EPS), (True, EPS)),
    "without_weight": (lambda x, w: F.rms_norm(x, (D,), None, EPS) * 2, (False, EPS)),
    "default_eps": (lambda x, w: F.rms_norm(x, (D,), w), (True, 2.0**-23)),
    "spelled_out": (lambda x, w: w * (x * _rsqrt(x)), (True, EPS)),
    "power": (lambda x, w: x * torch.pow(x.pow(2).mean(-1, keepdim=True) + EPS, -0.5) * w, (True, EPS)),
    "spelled_other_order": (lambda x, w: _rsqrt(x) * x * w, (True, EPS)),
    "product_square": (lambda x, w: x * torch.rsqrt(EPS + (x * x).mean(-1, True)), (False, EPS)),
    "one_plus_weight": (lambda x, w: x * _rsqrt(x) * (1 + w), (False, EPS)),
    "read_before_weight": (lambda x, w: (y := x * _rsqrt(x)) * w + y, (False, EPS)),
}
NOT_NORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean_over_tokens": lambda x, w: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + EPS),
    "cubed": lambda x, w: x * torch.rsqrt(x.abs().pow(3).mean(-1, keepdim=True) + EPS),
    "other_input": lambda x, w: w * _rsqrt(x),
    "scale_read_twice": lambda x, w: x * _rsqrt(x) + _rsqrt(x).sum(),
    "divided": lambda x, w: x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt(),
    "sum_of_squares": lambda x, w: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + EPS),
    "product_of_two": lambda x, w: x * torch.rsqrt((x * w).mean(-1, keepdim=True).abs() + EPS),
}


@pytest.mark.parametrize("name", NORMS)
def test_norm(name: str) -> None:
    step, (weighted, eps) = NORMS[name]
    after = check_rule(fuse_rms_norm(), norm_program(step), count=1)
    norm = next(call for n in after.graph.nodes if (call := RmsNorm[Node].find(n)) is not None)
    assert norm.eps == eps
    assert (norm.weight is not None) == weighted
    if norm.weight is not None:
        assert after.weight_of(norm.weight) == "weight"
        assert after.roles["weight"] is Role.NORM


@pytest.mark.parametrize("name", NOT_NORMS)
def test_not_a_norm_or_still_equal(name: str) -> None:
    before = norm_program(NOT_NORMS[name])
    result = run(fuse_rms_norm(), before)
    if name != "scale_read_twice":  # exported as two computations: the first is a norm of its own
        assert result.changed == 0
    check_equal(before, result.program)


class Ropes(nn.Module):
    cos: Tensor
    sin: Tensor

    def __init__(self, step: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.embed = parameter(VOCABULARY, D)
        angles = torch.arange(CONTEXT)[:, None] * torch.tensor([1.0, 0.4, 0.15, 0.03])[None]
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        self.step = step

    def forward(self, tokens: Tensor, start_pos: Tensor) -> Tensor:
        positions = start_pos + torch.arange(tokens.shape[1])
        x = F.embedding(tokens, self.embed).unflatten(-1, (H, d))
        return self.step(x, self.cos.index_select(0, positions), self.sin.index_select(0, positions)).flatten(-2)


def rope_program(step: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Program:
    return export_toy(lambda: Ropes(step))


def _pairs(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    c, s = c.unsqueeze(1), s.unsqueeze(1)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * c - b * s, a * s + b * c), -1).flatten(-2)


def _strided_pairs(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    c, s = c[None, :, None, :], s[None, :, None, :]
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((c * a - s * b, c * b + s * a), -1).flatten(-2)


def _halves(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    c, s = c.unsqueeze(1), s.unsqueeze(1)
    a, b = x.chunk(2, -1)
    return torch.cat((a * c - b * s, a * s + b * c), -1)


def _halves_of_heads(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    """As gpt-oss spells it: tables [1, T, d/2] times an attention factor, then unsqueezed over heads."""
    c, s = ((t[None] * 1.25).unsqueeze(1) for t in (c, s))
    a, b = x.transpose(1, 2).chunk(2, -1)
    return torch.cat((a * c - b * s, b * c + a * s), -1).transpose(1, 2).contiguous()


def _halves_of_heads_squeezed(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    """Tables that were computed as [T, 1, d/2]."""
    c, s = ((t.unsqueeze(1) * 1.25).transpose(0, 1)[None] for t in (c, s))
    a, b = x.transpose(1, 2).chunk(2, -1)
    return torch.cat((a * c - b * s, b * c + a * s), -1).transpose(1, 2).contiguous()


def _turned(x: Tensor) -> Tensor:
    a, b = x[..., : d // 2], x[..., d // 2 :]
    return torch.cat((-b, a), -1)


def _rotate_half(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    cos, sin = (torch.cat((t, t), -1).unsqueeze(0).unsqueeze(0) for t in (c, s))
    x = x.transpose(1, 2)
    return (x * cos + _turned(x) * sin).transpose(1, 2)


def _rotate_half_scaled(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    """As transformers spells it: tables [1, T, d] times an attention factor, then unsqueezed over heads."""
    cos, sin = ((torch.cat((t, t), -1)[None] * 1.25).unsqueeze(1) for t in (c, s))
    x = x.transpose(1, 2)
    return (x * cos + _turned(x) * sin).transpose(1, 2)


ROPES = {
    "pairs": (_pairs, True),
    "strided_pairs": (_strided_pairs, True),
    "halves": (_halves, False),
    "halves_of_heads": (_halves_of_heads, False),
    "halves_of_heads_squeezed": (_halves_of_heads_squeezed, False),
    "rotate_half": (_rotate_half, False),
    "rotate_half_scaled": (_rotate_half_scaled, False),
}


@pytest.mark.parametrize("name", ROPES)
def test_rope(name: str) -> None:
    step, interleaved = ROPES[name]
    after = check_rule(fuse_rope(), rope_program(step), count=1)
    rope = next(call for n in after.graph.nodes if (call := Rope.find(n)) is not None)
    assert rope.interleaved == interleaved


def _both_minus(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    c, s = c.unsqueeze(1), s.unsqueeze(1)
    a, b = x.chunk(2, -1)
    return torch.cat((a * c - b * s, a * s - b * c), -1)


def _backwards(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    """The inverse rotation."""
    c, s = c.unsqueeze(1), s.unsqueeze(1)
    a, b = x.chunk(2, -1)
    return torch.cat((a * c + b * s, b * c - a * s), -1)


def _swapped_parts(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    """(b, a) rotated: not the operator of x."""
    c, s = c.unsqueeze(1), s.unsqueeze(1)
    b, a = x.chunk(2, -1)
    return torch.cat((a * c - b * s, a * s + b * c), -1)


def _mixed_layout(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    """Pairs are taken interleaved and put back as halves."""
    c, s = c.unsqueeze(1), s.unsqueeze(1)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.cat((a * c - b * s, a * s + b * c), -1)


def _sign_of_the_wrong_half(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    cos, sin = (torch.cat((t, t), -1).unsqueeze(0).unsqueeze(0) for t in (c, s))
    x = x.transpose(1, 2)
    a, b = x[..., : d // 2], x[..., d // 2 :]
    return (x * cos + torch.cat((b, -a), -1) * sin).transpose(1, 2)


def _different_halves(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    cos, sin = (torch.cat((t, t * 0.5), -1).unsqueeze(0).unsqueeze(0) for t in (c, s))
    x = x.transpose(1, 2)
    return (x * cos + _turned(x) * sin).transpose(1, 2)


def _other_half_turned(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    cos, sin = (torch.cat((t, t), -1).unsqueeze(0).unsqueeze(0) for t in (c, s))
    x = x.transpose(1, 2)
    return (x * cos + _turned(x.tanh()) * sin).transpose(1, 2)


def _tables_of_heads(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    """Angles by head instead of by token."""
    c, s = c[:1].expand(H, -1), s[:1].expand(H, -1)
    a, b = x.chunk(2, -1)
    return torch.cat((a * c - b * s, a * s + b * c), -1)


@pytest.mark.parametrize(
    "step",
    [
        _both_minus,
        _backwards,
        _swapped_parts,
        _mixed_layout,
        _sign_of_the_wrong_half,
        _different_halves,
        _other_half_turned,
        _tables_of_heads,
    ],
    ids=lambda f: f.__name__.strip("_"),
)
def test_not_a_rope(step: Callable[..., Tensor]) -> None:
    before = rope_program(step)
    result = run(fuse_rope(), before)
    assert result.changed == 0
    assert result.program is before
