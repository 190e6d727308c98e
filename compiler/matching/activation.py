"""Read the activation of an expert backwards: what lies between its up projection and its down projection.

Factors are ordered by meaning, not by position: the one under the activation is the gate. F expert width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Node

from moec.compiler.matching.read import (
    Stuck,
    advises,
    arg,
    aten,
    binary,
    is_op,
    piece,
    rank,
    scalar,
    shape,
    static,
    unview,
    with_scalar,
)
from moec.compiler.ops.attributes import Experts

MULTIPLY = (aten.mul.Tensor,)
ADD = (aten.add.Tensor, aten.add.Scalar)
CLAMPS = (aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default, aten.hardtanh.default)


@dataclass(frozen=True)
class Activation:
    """`up` is None when gate and up are one projection `gate` of width 2F (or the expert has no gate at all)."""

    gate: Node
    up: Node | None
    experts: Experts


@advises("write the expert as down(act(gate) * up) or down(act(up)), act one of silu, gelu, relu, relu squared")
def read_activation(hidden: Node) -> Activation:
    """hidden = act(clamp(gate)) * (clamp(up) + offset), or act(clamp(x)) without a gate."""
    pair = binary(hidden, *MULTIPLY)
    if pair is not None and isinstance(pair[0], Node) and isinstance(pair[1], Node):
        for acted, other in (pair, pair[::-1]):
            found = activation_of(acted)
            if found is not None and not (found[0] == "silu" and _is_own_gate(found, other)):
                return _gated(hidden, found, other)
    ungated = activation_of(hidden)
    if ungated is None:
        raise Stuck(hidden, "it is neither act(gate) * up nor an activation that the operator has")
    name, alpha, source = ungated
    source, low, high = _clamped(source)
    return Activation(source, None, Experts(activation=name, alpha=alpha, gated=False, gate_min=low, gate_max=high))


def _is_own_gate(found: tuple[str, float, Node], other: Node) -> bool:
    """x * silu(x) is not a gated product of two projections."""
    return found[2] is other


def _gated(hidden: Node, found: tuple[str, float, Node], other: Node) -> Activation:
    name, alpha, gate = found
    gate, gate_min, gate_max = _clamped(gate)
    shifted = with_scalar(other, *ADD)
    offset = 0.0
    if shifted is not None:
        other, offset = shifted
    up, up_min, up_max = _clamped(other)
    experts = Experts(
        activation=name,
        alpha=alpha,
        gate_min=gate_min,
        gate_max=gate_max,
        up_min=up_min,
        up_max=up_max,
        up_offset=offset,
    )
    first, second = piece(gate), piece(up)
    if first is None and second is None:
        return Activation(gate, up, experts)
    if first is None or second is None or unview(first[0]) is not unview(second[0]):
        raise Stuck(hidden, "gate and up are not two parts of one projection")
    source, last = first[0], rank(first[0]) - 1
    size = static(shape(source)[-1])
    if size is None or size % 2 or shape(second[0])[-1] != size:
        raise Stuck(gate, "gate and up are not halves of the last dimension")
    half = size // 2
    if (first[1:], second[1:]) == ((last, 0, half, 1), (last, half, size, 1)):
        return Activation(source, None, experts)
    if (first[1:], second[1:]) == ((last, 0, size, 2), (last, 1, size, 2)):
        return Activation(source, None, replace(experts, interleaved=True))
    raise Stuck(gate, "the activation is not applied to the first half (or the even elements) of the up projection")


def activation_of(node: Any) -> tuple[str, float, Node] | None:
    """(name, alpha, argument) of an activation of one argument."""
    if is_op(node, aten.silu.default):
        return "silu", 1.0, node.args[0]
    if is_op(node, aten.gelu.default):
        return ("gelu_tanh" if arg(node, 1, "approximate", "none") == "tanh" else "gelu"), 1.0, node.args[0]
    if is_op(node, aten.relu.default):
        return "relu", 1.0, node.args[0]
    squared = node.args[0] if is_op(node, aten.square.default) else None
    if is_op(node, aten.pow.Tensor_Scalar) and node.args[1] == 2:
        squared = node.args[0]
    if squared is not None and is_op(squared, aten.relu.default):
        return "relu2", 1.0, squared.args[0]
    pair = binary(node, *MULTIPLY)
    if pair is None:
        return None
    for x, gate in (pair, pair[::-1]):
        if not is_op(gate, aten.sigmoid.default):
            continue
        inner = gate.args[0]
        if inner is x:
            return "silu", 1.0, x
        scaled = with_scalar(inner, aten.mul.Tensor, aten.mul.Scalar)
        if scaled is not None and scaled[0] is x:
            return "silu", scaled[1], x
    return None


def _clamped(node: Node) -> tuple[Node, float, float]:
    """(source, lowest, highest) through clamps."""
    low, high = -math.inf, math.inf
    while is_op(node, *CLAMPS):
        a, b = arg(node, 1, "min"), arg(node, 2, "max")
        if node.target is aten.clamp_max.default:
            a, b = None, arg(node, 1, "max")
        if (a is not None and scalar(a) is None) or (b is not None and scalar(b) is None):
            raise Stuck(node, "the bounds of this clamp are not numbers")
        # an outer clamp bounds what the inner one gives: only nested intervals are one clamp
        new_low, new_high = -math.inf if a is None else float(a), math.inf if b is None else float(b)
        if max(low, new_low) > min(high, new_high):
            raise Stuck(node, "these clamps contradict each other")
        low, high = max(low, new_low), min(high, new_high)
        node = node.args[0]
    return node, low, high
