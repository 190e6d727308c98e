"""Fuse RMS norm: x * rsqrt(mean(x^2, -1) + eps) [* w]  ->  moec::rms_norm(x, w, eps).

The root may be a power of -0.5. Also `aten.rms_norm` over the last dimension. w must be a one-dimensional weight;
without one the norm is scaleless.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from moec.compiler.matching.read import arg, binary, dim_of, is_op, only_user, rank, shape, with_scalar
from moec.compiler.ops import RmsNorm
from moec.compiler.pipeline import Pass, PassResult, Refusal
from moec.compiler.program import Editor, Program, Role, Stage

aten = torch.ops.aten
RULE = "fuse_rms_norm"
REMEDY = "the norm stays as it is, which runs slower; normalise over the last dimension only"


def fuse_rms_norm() -> Pass:
    return Pass(RULE, _run, needs=Stage.CANONICAL, gives=Stage.CANONICAL)


def _run(program: Program) -> PassResult:
    edit = program.edit()
    refusals: list[Refusal] = []
    changed = 0
    for node in list(edit.graph.nodes):
        if is_op(node, aten.rms_norm.default):
            if len(node.args[1]) != 1:
                refusals.append(Refusal.at(RULE, node, "the norm spans more than the last dimension", REMEDY))
                continue
            weight, eps = arg(node, 2, "weight"), arg(node, 3, "eps")
            _replace(edit, node, node.args[0], weight, torch.finfo(torch.float32).eps if eps is None else eps)
            changed += 1
        elif is_op(node, aten.rsqrt.default) or (is_op(node, aten.pow.Tensor_Scalar) and node.args[1] == -0.5):
            changed += _spelled_out(edit, node)
    return PassResult(edit.done(), changed, tuple(refusals)) if changed else PassResult(program, 0, tuple(refusals))


def _spelled_out(edit: Editor, root: Node) -> int:
    """rsqrt(mean(pow(x, 2), [-1], keepdim) + eps), whose only use is a product with x."""
    shifted = with_scalar(root.args[0], aten.add.Tensor, aten.add.Scalar)
    if shifted is None or not is_op(shifted[0], aten.mean.dim):
        return 0
    mean, eps = shifted
    if dim_of(mean, 1, "dim", rank(mean)) != rank(mean) - 1 or not arg(mean, 2, "keepdim", False):
        return 0
    x = _squared(mean.args[0])
    product = only_user(root)
    if x is None or product is None or binary(product, aten.mul.Tensor) is None or x not in product.args:
        return 0
    norm, weight = product, None
    scaled = only_user(product)
    pair = binary(scaled, aten.mul.Tensor)
    if scaled is not None and pair is not None:
        other = pair[0] if pair[1] is product else pair[1]
        if isinstance(other, Node) and edit.weight_of(other) and shape(other) == (shape(x)[-1],):
            norm, weight = scaled, other
    _replace(edit, norm, x, weight, eps)
    return 1


def _squared(node: object) -> Node | None:
    if is_op(node, aten.pow.Tensor_Scalar) and node.args[1] == 2:  # type: ignore[attr-defined]
        return node.args[0]  # type: ignore[attr-defined]
    if is_op(node, aten.square.default):
        return node.args[0]  # type: ignore[attr-defined]
    pair = binary(node, aten.mul.Tensor)
    return pair[0] if pair is not None and pair[0] is pair[1] else None


def _replace(edit: Editor, node: Node, x: Node, weight: Node | None, eps: float) -> None:
    with edit.graph.inserting_before(node):
        fused = edit.emit(RmsNorm(x=x, weight=weight, eps=float(eps)), like=node)
    node.replace_all_uses_with(fused)
    edit.graph.erase_node(node)
    name = edit.weight_of(weight) if weight is not None else None
    if name is not None and edit.roles[name] is Role.OTHER:
        edit.roles[name] = Role.NORM
