"""What is legal at each stage, as data, checked after every pass.

From FUSED on no expert weight is read by anything but a fused MoE node (a block that stayed unmatched would gather
[tokens, k, 2F, D] of weights at run time), no topk is left, no rows are picked by value, and the
router of every such node is FP32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from moec.compiler.errors import CompileError
from moec.compiler.ops.moe_call import MoeCall

if TYPE_CHECKING:
    from torch.fx import Node

    from moec.compiler.program import Program


def check_dialect(program: Program, *, after: str) -> None:
    """Raise CompileError naming the first node that is illegal at the program's stage."""
    from moec.compiler.program import Stage

    if program.stage < Stage.FUSED:
        return
    for node in program.graph.nodes:
        if node.op == "placeholder":
            _check_expert_weight(program, node, after)
        elif (moe := MoeCall[Any].find(node)) is not None:
            _check_router(node, moe, after)
        elif _operator(node) == "aten::topk":
            _refuse_topk(node, after)
        elif picks_rows(node):
            _refuse_rows(node, after)


def _operator(node: Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return schema.name if schema is not None else ""


def _check_expert_weight(program: Program, node: Node, after: str) -> None:
    from moec.compiler.program import Role, module_path

    name = program.weight_of(node)
    if name is None:
        return
    stacked = program.roles.get(name) is Role.EXPERT
    for user in node.users:
        # a weight [E, ., .] that is no filter of a convolution belongs to experts, whatever its role says
        cube = len(program.weights[name].shape) == 3 and program.roles.get(name) not in (Role.CACHE, Role.CONSTANT)
        unfused = cube and user.op == "call_function" and "conv" not in _operator(user)
        if (stacked or unfused) and MoeCall.find(user) is None:
            raise CompileError(
                f"after {after} the experts {name} are read by {user.name} ({user.target}): "
                "this MoE block was not fused",
                place=module_path(user) or user.name,
                remedy="see what was tried with `moec explain`",
            )


def _refuse_topk(node: Node, after: str) -> None:
    """A choice of experts that is still spelled out: its block was not fused, however its experts are stored."""
    from moec.compiler.program import module_path

    raise CompileError(
        f"after {after} {node.name} ({node.target}) still selects: this MoE block was not fused",
        place=module_path(node) or node.name,
        remedy="see what was tried with `moec explain`",
    )


def picks_rows(node: Node) -> bool:
    """Whether the size of a result depends on values: rows of the tokens that chose an expert."""
    name = _operator(node)
    return name in ("aten::nonzero", "aten::nonzero_numpy") or (name == "aten::where" and len(node.args) == 1)


def _refuse_rows(node: Node, after: str) -> None:
    """A dispatch that is still spelled out: no target computes as many rows as a value says."""
    from moec.compiler.program import module_path

    raise CompileError(
        f"after {after} {node.name} ({node.target}) still picks rows by value: this MoE block was not fused",
        place=module_path(node) or node.name,
        remedy="see what was tried with `moec explain`",
    )


def _check_router(node: Node, moe: MoeCall[Any], after: str) -> None:
    from moec.compiler.program import module_path

    for operand in (moe.router_input, moe.router_weight):
        if operand.meta["val"].dtype != torch.float32:
            raise CompileError(
                f"after {after} the router operand {operand.name} is not float32",
                place=module_path(node) or node.name,
                remedy="keep the router in float32",
            )
