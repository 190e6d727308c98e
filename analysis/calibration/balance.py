"""Channels scaled where that changes nothing but rounding (AWQ, arXiv 2306.00978).

    norm -> linears, MoE        gain / s,       columns * s      of everything that reads the norm, the router too
    v -> attention -> o         rows of v / s,  columns of o * s one factor for a channel of a KV head
    up -> (* act(gate)) -> down rows of up / s, columns of down * s

A pair is found in the graph by what its operators compute, and only where no other node reads the value between. The
factors are s = rms(x)^a, a from 0 to 1 by the least error of the products that follow, tr(dW H dW^T) with the second
moments H of what they read. Codes that a checkpoint stores are never scaled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from moec.compiler.matching.read import aten, is_op
from moec.compiler.ops import CachedAttention, FusedMoe, cached_attention, fused_moe, rms_norm
from moec.compiler.program import Program
from moec.compiler.quantizer import Moments
from moec.compiler.spec.quantization import WeightScheme

_STEPS = 10  # exponents are tenths
_COARSE = 2  # every second is tried, then the neighbours of the best
_ROWS = 192  # rows of a matrix that stand for all when an exponent is judged
_VIEWS = (aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim, aten.flatten.using_ints)


@dataclass(frozen=True)
class Link:
    """Weights whose outputs are divided by factors, and the nodes whose inputs are multiplied by them.

    outs: names (a norm's gain, a linear's weight and bias), scaled along their first dimension. heads: (query heads,
    KV heads) where a factor of a KV head's channel serves several heads of the input.
    """

    kind: str
    outs: tuple[str, ...]
    readers: tuple[Node, ...]
    heads: tuple[int, int] | None = None


def links_of(program: Program) -> list[Link]:
    """Every pair of the graph that can be scaled exactly."""
    found = []
    for node in program.graph.nodes:
        if node.target is rms_norm:
            link = _of_norm(program, node)
        elif node.target is cached_attention:
            link = _of_attention(program, node)
        elif is_op(node, aten.mul.Tensor):
            link = _of_gated(program, node)
        else:
            continue
        if link is None:
            continue
        touched = (*link.outs, *_read_by(program, link))
        if not any(program.weights[name].stored for name in touched):
            found.append(link)
    return found


def stacks_in_out(program: Program) -> frozenset[str]:
    """The experts' weights that lie as [E, K, N], whether a spec leaves them in float or not."""
    calls: list[FusedMoe[Node]] = [FusedMoe.of(node) for node in program.graph.nodes if node.target is fused_moe]
    names = (program.weight_of(w) for call in calls if call.mlp.layout == "in_out" for w in (call.w13, call.w2))
    return frozenset(name for name in names if name is not None)


def _read_by(program: Program, link: Link) -> list[str]:
    """The weights of the nodes that a link scales the columns of."""
    names = (program.weight_of(a) for node in link.readers for a in node.all_input_nodes)
    return [name for name in names if name is not None]


def _through_views(node: Node) -> list[Node]:
    """Who reads a value, behind reshapes that leave its last dimension."""
    readers = []
    for user in node.users:
        if user.target in _VIEWS:
            same = node.meta["val"].shape[-1] == user.meta["val"].shape[-1]
            readers += _through_views(user) if same else [user]
        else:
            readers.append(user)
    return readers


def _source(node: Node) -> Node:
    """What a value is a reshape of, through any reshapes, as long as nothing else reads it."""
    while node.target in _VIEWS and len(node.users) == 1:
        node = node.args[0]
    return node


def _own_weight(program: Program, node: object) -> str | None:
    """The name of a weight that one node reads."""
    if not isinstance(node, Node) or len(node.users) != 1:
        return None
    return program.weight_of(node)


def _linear_outs(program: Program, node: Node) -> tuple[str, ...] | None:
    """Weight and bias of a linear that is read once; None if its rows cannot be scaled."""
    if not is_op(node, aten.linear.default) or len(node.users) != 1:
        return None
    names = [_own_weight(program, a) for a in node.args[1:] if a is not None]
    return None if None in names else tuple(n for n in names if n is not None)


def _of_norm(program: Program, node: Node) -> Link | None:
    gain = _own_weight(program, node.args[1])
    readers = tuple(dict.fromkeys(_through_views(node)))
    if gain is None or not readers:
        return None
    for reader in readers:
        if reader.target is fused_moe:
            # the experts' input and the router's, both of this norm
            call: FusedMoe[Node] = FusedMoe.of(reader)
            if not _leads_to(node, call.x) or not _leads_to(node, call.router_input):
                return None
            names = [call.router_weight, call.w13, call.shared_w13, call.shared_gate]
            if any(n is not None and _own_weight(program, n) is None for n in names):
                return None
        elif not is_op(reader, aten.linear.default) or _own_weight(program, reader.args[1]) is None:
            return None
    return Link("norm", (gain,), readers)


def _leads_to(node: Node, value: Node) -> bool:
    while value is not node and value.target in _VIEWS:
        value = value.args[0]
    return value is node


def _of_attention(program: Program, node: Node) -> Link | None:
    call: CachedAttention[Node] = CachedAttention.of(node)
    q, v = call.q, call.v
    outs = _linear_outs(program, _source(v))
    readers = _through_views(node)
    if outs is None or len(readers) != 1 or not is_op(readers[0], aten.linear.default):
        return None
    if _own_weight(program, readers[0].args[1]) is None:
        return None
    return Link("v", outs, (readers[0],), (int(q.meta["val"].shape[2]), int(v.meta["val"].shape[2])))


def _of_gated(program: Program, node: Node) -> Link | None:
    readers = _through_views(node)
    if len(readers) != 1 or not is_op(readers[0], aten.linear.default):
        return None
    if _own_weight(program, readers[0].args[1]) is None or len(node.args) < 2:
        return None
    a, b = node.args[:2]
    if not isinstance(a, Node) or not isinstance(b, Node) or a is b:
        return None
    for value in (b, a):
        outs = _linear_outs(program, _source(value))
        if outs is not None and value.meta["val"].shape[-1] == node.meta["val"].shape[-1]:
            return Link("up", outs, (readers[0],))
    return None


@dataclass(frozen=True)
class Product:
    """A matrix [N, K] that reads the scaled channels, how it is coded, and the moments of its inputs."""

    w_NK: Tensor
    scheme: WeightScheme
    inputs: Moments


def best_factors(products: Sequence[Product], heads: tuple[int, int] | None = None) -> Tensor | None:
    """The factors of the columns, float32 [K]; None where scaling does not help. All products have one K.

    Only products in groups along their inputs are judged: a group along the outputs has one column, and scaling it
    scales its scale.
    """
    judged = [_sample(p) for p in products if p.scheme.axis == "in" and p.inputs.tokens]
    if not judged:
        return None
    energy = torch.stack([p.inputs.energy_K / p.inputs.tokens for p in judged]).mean(0).to(torch.float32)
    if heads is not None:
        energy = _shared(energy, heads)
    rms = energy.clamp(min=float(energy.mean()) * 1e-4).sqrt()
    if not float(rms.min()) > 0:
        return None
    found: dict[int, tuple[float, Tensor]] = {}

    def error(step: int) -> float:
        if step not in found:
            factors = rms ** (step / _STEPS)
            factors = factors / (factors.max() * factors.min()).sqrt()
            found[step] = sum(_error(p, factors) for p in judged), factors
        return found[step][0]

    best = min(range(0, _STEPS + 1, _COARSE), key=error)
    best = min((s for s in (best - 1, best, best + 1) if 0 <= s <= _STEPS), key=error)
    return found[best][1] if best else None


def _shared(energy_K: Tensor, heads: tuple[int, int]) -> Tensor:
    """The energy of each channel of a KV head, the mean of the query heads that read it, for all of them."""
    queries, keys = heads
    by_head = energy_K.unflatten(0, (keys, queries // keys, -1))
    return by_head.mean(1, keepdim=True).expand_as(by_head).flatten()


def of_outputs(factors_K: Tensor, heads: tuple[int, int] | None) -> Tensor:
    """The factors of the rows that give these channels."""
    if heads is None:
        return factors_K
    queries, keys = heads
    return factors_K.unflatten(0, (keys, queries // keys, -1))[:, 0].flatten()


def _sample(product: Product) -> Product:
    step = max(1, -(-product.w_NK.shape[0] // _ROWS))
    return Product(product.w_NK[::step].to(torch.float32), product.scheme, product.inputs)


def _error(product: Product, factors: Tensor) -> float:
    """tr(dW H dW^T) of plain rounding with the whole range of codes, columns scaled by `factors`."""
    scheme, grid = product.scheme, product.scheme.grid
    grouped = (product.w_NK * factors).unflatten(-1, (-1, scheme.group_size))
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    scale = torch.where(high > -low, high, low) / grid.low
    scale = torch.where(scale == 0, 1.0, scale)
    rounded = grid.nearest_(grouped / scale).mul_(scale)
    delta = rounded.flatten(-2).div_(factors).sub_(product.w_NK)
    return float(((delta @ product.inputs.moments_KK) * delta).sum()) / product.inputs.tokens


def with_factors(w: Tensor, rows: Tensor | None, columns: Tensor | None, *, in_out: bool) -> Tensor:
    """A weight [N, K] or [N], or experts [E, N, K] ([E, K, N] where `in_out`) or [E, N], times factors.

    rows [N] or [E, N]; columns [K] or [E, K].
    """
    if rows is not None and columns is None and w.dim() == rows.dim():
        return w * rows
    if rows is not None:
        w = w * (rows.unsqueeze(-2) if in_out else rows.unsqueeze(-1))
    if columns is not None:
        w = w * (columns.unsqueeze(-1) if in_out else columns.unsqueeze(-2) if columns.dim() == 2 else columns)
    return w
