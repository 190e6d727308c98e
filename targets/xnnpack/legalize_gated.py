"""Dense gated feed-forward blocks: the activation is applied while gate and up are still in cache.

    y = linear_packed(x, w);  act(y[..., :F]) * y[..., F:]   ->  gated_linear_packed(x, w, F, act)

Without it gate and up go to memory and back four times, on one thread: a quarter of the prefill of a dense 1 B model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from moec.compiler.pipeline import Pass, PassResult
from moec.compiler.program import Program, Stage
from moec.runtime.moe_config import ACTIVATION, WeightFormat
from moec.targets.xnnpack.cpu_ops import GatedLinearPacked, LinearPacked

aten = torch.ops.aten
_BLOCK = 16  # kernels/core/format.h: kBlockRows


def fuse_gated_linears() -> Pass:
    """Linears side by side whose halves meet in `act(gate) * up` -> `gated_linear_packed`."""
    return Pass("fuse_gated_linears", _run, needs=Stage.FUSED, gives=Stage.FUSED)


def _run(program: Program) -> PassResult:
    edit = program.edit()
    fused = 0
    for node in list(edit.graph.nodes):
        found = _gated(node)
        if found is None:
            continue
        halves, act, product, activation = found
        linear = LinearPacked[Node].of(node)
        gated = GatedLinearPacked(
            x=linear.x, w=linear.w, f=linear.n // 2, k=linear.k, format=linear.format, activation=activation
        )
        with edit.graph.inserting_before(product):
            y = edit.emit(gated, like=product)
        product.replace_all_uses_with(y)
        for dead in (product, act, *halves, node):
            edit.graph.erase_node(dead)
        fused += 1
    return PassResult(edit.done(), fused) if fused else PassResult(program, 0)


def _gated(node: Node) -> tuple[tuple[Node, Node], Node, Node, int] | None:
    """((gate, up), activation, product, number of the activation) of a packed linear, if that is all it is for."""
    linear = LinearPacked[Node].find(node)
    if linear is None or linear.bias is not None:
        return None
    n, fmt, users = linear.n, WeightFormat.decode(linear.format), list(node.users)
    if len(users) != 2 or n % 2 or not _whole_blocks(n // 2, fmt):
        return None
    gate, up = sorted(users, key=lambda user: user.args[2:3] != (0,))
    last = node.meta["val"].dim() - 1
    if not _is_slice(gate, last, 0, n // 2) or not _is_slice(up, last, n // 2, n):
        return None
    act, product = _only_user(gate), _only_user(up)
    if act is None or product is None or _only_user(act) is not product:
        return None
    activation = _activation(act)
    if activation is None or product.target is not aten.mul.Tensor or set(product.args) != {act, up} or product.kwargs:
        return None
    return (gate, up), act, product, activation


def _whole_blocks(width: int, fmt: WeightFormat) -> bool:
    """Whether gate and up end where a block of rows does, and with groups along the output a group."""
    return width % (max(_BLOCK, fmt.group_size) if fmt.axis_out else _BLOCK) == 0


def _is_slice(node: Node, last: int, start: int, end: int) -> bool:
    if node.target is not aten.slice.Tensor or node.kwargs or len(node.args) != 4:
        return False
    return node.args[1] in (-1, last) and node.args[2:] == (start, end)


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _activation(node: Node) -> int | None:
    """Its number (`ACTIVATION`), None for anything that the kernel does not compute."""
    target: Any = node.target
    if target is aten.gelu.default:
        approximate = node.kwargs.get("approximate", node.args[1] if len(node.args) > 1 else "none")
        return ACTIVATION.index("gelu_tanh" if approximate == "tanh" else "gelu")
    name = {aten.silu.default: "silu", aten.relu.default: "relu"}.get(target)
    return None if name is None else ACTIVATION.index(name)
