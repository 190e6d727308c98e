"""Expand complex arithmetic into real tensors: no phone's runtime has kernels of complex numbers.

A complex z [...] is two real tensors re, im [...]:

    polar(r, t)         ->  r*cos(t), r*sin(t)                complex(a, b)  ->  a, b
    view_as_complex(x)  ->  x[..., 0], x[..., 1]              conj(z)        ->  re, -im
    view_as_real(z)     ->  stack((re, im), -1)               real, imag     ->  re;  im
    z * w               ->  re*re' - im*im', re*im' + im*re'  z * real       ->  re*w, im*w
    z + w, z - w, -z, views, slices, broadcasts, index_select, casts  ->  the same of re and of im

If any other operator reads a complex value, its computation is not rewritten, and the refusal names that operator: half
a rewrite would compute everything twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from moec.compiler.matching.read import rank
from moec.compiler.pipeline import Pass, PassResult, Refusal
from moec.compiler.program import Editor, Program, Stage

aten = torch.ops.aten
RULE = "expand_complex"
Parts = tuple[Node, Node]

# operators that treat every element alike: applied to both parts. Their dimensions are those of the complex tensor.
ALIKE = {
    aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.view.default, aten.reshape.default,
    aten.expand.default, aten.slice.Tensor, aten.select.int, aten.index_select.default, aten.transpose.int,
    aten.permute.default, aten.clone.default, aten.contiguous.default, aten.neg.default, aten.flatten.using_ints,
    aten.alias.default, aten.detach.default,
}  # fmt: skip
CASTS = {aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default}
ENTERS = {aten.polar.default, aten.complex.default, aten.view_as_complex.default, aten.view_as_complex_copy.default}
LEAVES = {aten.view_as_real.default, aten.view_as_real_copy.default, aten.real.default, aten.imag.default}
CONJUGATES = {aten.conj.default, aten._conj.default, aten._conj_physical.default, aten.conj_physical.default}
SUMS = {aten.add.Tensor, aten.sub.Tensor}


def expand_complex() -> Pass:
    return Pass(RULE, _run, needs=Stage.CANONICAL, gives=Stage.CANONICAL)


def _run(program: Program) -> PassResult:
    complex_nodes = [n for n in program.graph.nodes if _is_complex(n) or _reads_complex(n)]
    if not complex_nodes:
        return PassResult(program, 0)
    refusals = tuple(_refusal(n) for n in complex_nodes if not _understood(n))
    if refusals:
        return PassResult(program, 0, refusals)
    edit = program.edit()
    parts: dict[Node, Parts] = {}
    for node in [n for n in edit.graph.nodes if _is_complex(n) or _reads_complex(n)]:
        with edit.graph.inserting_before(node):
            if _is_complex(node):
                parts[node] = _expanded(edit, node, parts)
            else:
                node.replace_all_uses_with(_left(edit, node, parts))
    return PassResult(edit.done(), len(complex_nodes))


def _is_complex(node: Any) -> bool:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return isinstance(value, torch.Tensor) and value.is_complex()


def _reads_complex(node: Node) -> bool:
    return any(_is_complex(a) for a in node.all_input_nodes)


def _understood(node: Node) -> bool:
    if node.op != "call_function":
        return False
    target = node.target
    if not _is_complex(node):
        return target in LEAVES
    if target in ENTERS:
        return True
    if target in CASTS:  # complex to complex; the parts stay float32 where both are complex64
        return _is_complex(node.args[0]) and node.meta["val"].dtype == node.args[0].meta["val"].dtype  # type: ignore[union-attr]
    if target in SUMS:
        return len(node.args) == 2 and not node.kwargs and all(_is_complex(a) for a in node.args)
    if target is aten.mul.Tensor:
        return not any(isinstance(a, complex) for a in node.args)
    return (target in ALIKE or target in CONJUGATES) and _is_complex(node.args[0])


def _refusal(node: Node) -> Refusal:
    return Refusal.at(
        RULE,
        node,
        f"{node.target} computes with complex numbers in a way that was not recognised",
        "write it with real tensors",
    )


def _expanded(edit: Editor, node: Node, parts: dict[Node, Parts]) -> Parts:
    """The real and the imaginary part of `node`, whose operands have theirs in `parts`."""

    def call(target: Any, *args: Any, **kwargs: Any) -> Node:
        return edit.call(target, *args, like=node, **kwargs)

    target: Any = node.target
    args: Any = node.args
    if target is aten.polar.default:
        return tuple(call(aten.mul.Tensor, args[0], call(f, args[1])) for f in (aten.cos.default, aten.sin.default))  # type: ignore[return-value]
    if target is aten.complex.default:
        return args[0], args[1]
    if target in ENTERS:
        last = rank(args[0]) - 1
        return call(aten.select.int, args[0], last, 0), call(aten.select.int, args[0], last, 1)
    if target is aten.mul.Tensor:
        return _product(call, args[0], args[1], parts)
    if target in SUMS:
        left, right = parts[args[0]], parts[args[1]]
        return call(target, left[0], right[0]), call(target, left[1], right[1])
    source = parts[args[0]]
    if target in CASTS:
        return source
    if target in CONJUGATES:
        return source[0], call(aten.neg.default, source[1])
    return tuple(call(target, part, *args[1:], **node.kwargs) for part in source)  # type: ignore[return-value]


def _product(call: Any, a: Any, b: Any, parts: dict[Node, Parts]) -> Parts:
    if not _is_complex(a):
        a, b = b, a
    re, im = parts[a]
    if not _is_complex(b):
        return call(aten.mul.Tensor, re, b), call(aten.mul.Tensor, im, b)
    cos, sin = parts[b]
    first = call(aten.sub.Tensor, call(aten.mul.Tensor, re, cos), call(aten.mul.Tensor, im, sin))
    second = call(aten.add.Tensor, call(aten.mul.Tensor, re, sin), call(aten.mul.Tensor, im, cos))
    return first, second


def _left(edit: Editor, node: Node, parts: dict[Node, Parts]) -> Node:
    """The real tensor that `node` makes of a complex one."""
    re, im = parts[node.args[0]]  # type: ignore[index]
    if node.target is aten.real.default:
        return re
    if node.target is aten.imag.default:
        return im
    return edit.call(aten.stack.default, [re, im], -1, like=node)
