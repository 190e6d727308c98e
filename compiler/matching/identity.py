"""Whether a part of a graph is a known function: both are computed in float64 on random values and compared.

The part may hold only operators that are real-analytic in their operands (sums, products, exponentials, reshapes), in
any spelling. Two such functions that agree at random points are the same function with probability one, and a constant
that differs in its seventh digit shows in float64. Sampling could miss a case of
an operator with cases (a clamp, a comparison), which is therefore refused by name.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from moec.compiler.matching.read import Stuck, aten

# float64 sums of a few hundred terms, once more rounded where a part goes through another order: 1e-13 is what was seen
RTOL = 1e-9
VIEWS = {
    "view", "reshape", "_unsafe_view", "unsqueeze", "squeeze", "flatten", "unflatten", "transpose", "permute", "t",
    "expand", "slice", "select", "split", "split_with_sizes", "chunk", "unbind", "cat", "stack", "clone", "contiguous",
    "alias", "detach", "repeat", "repeat_interleave", "_to_copy", "to", "lift_fresh_copy", "slice_scatter",
    "select_scatter", "copy", "movedim", "zeros", "zeros_like", "full", "ones", "ones_like", "empty", "pad",
    "constant_pad_nd",
}  # fmt: skip
ANALYTIC = VIEWS | {
    "add", "sub", "rsub", "mul", "div", "neg", "exp", "sigmoid", "silu", "softplus", "tanh", "pow", "square", "sqrt",
    "rsqrt", "reciprocal", "sum", "mean", "matmul", "mm", "bmm", "mv", "dot", "linear", "einsum", "conv1d",
    "convolution", "addmm", "baddbmm", "sym_size",
}  # fmt: skip
_SIZES = {operator.add, operator.sub, operator.mul, operator.neg, operator.floordiv, operator.getitem}


def is_analytic(node: Node) -> bool:
    """Whether `node` computes a function without cases, of its operands or of sizes."""
    if node.op != "call_function":
        return False
    return node.target in _SIZES or _name(node) in ANALYTIC


def _name(node: Node) -> str:
    schema = getattr(node.target, "_schema", None)
    namespace, _, name = (schema.name if schema is not None else "").partition("::")
    return name.rstrip("_") if namespace == "aten" and not name.startswith("_unsafe") else name


def evaluated(root: Node, leaves: Mapping[Node, Tensor], tokens: int) -> Tensor:
    """The value of `root` in float64 with those of `leaves` given, in a call of so many tokens.

    Stuck at an operator with cases, and at a value that is neither made here nor among the leaves.
    """
    value = _Evaluation(leaves, tokens).of(root)
    if not isinstance(value, Tensor):
        raise Stuck(root, "its result is no tensor")
    return value


def body_values(body: GraphModule, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The results of a graph of its own, in float64. Stuck as `evaluated`."""
    places = [n for n in body.graph.nodes if n.op == "placeholder"]
    evaluation = _Evaluation(dict(zip(places, inputs, strict=True)), 0)
    (results,) = next(reversed(body.graph.nodes)).args
    return [evaluation.of(r) for r in results]  # type: ignore[union-attr]


def constants(nodes: Iterable[Node]) -> list[float]:
    """The numbers that nodes are given, in order, each once: an epsilon is among them."""
    found = [a for n in nodes for a in (*n.args, *n.kwargs.values()) if isinstance(a, float)]
    return list(dict.fromkeys(found))


def agree(left: Tensor, right: Tensor) -> bool:
    """Equal up to the rounding of float64."""
    if left.shape != right.shape or not bool(torch.isfinite(left).all() and torch.isfinite(right).all()):
        return False
    return bool((left - right).abs().max() <= RTOL * right.abs().max().clamp_min(1e-30)) if left.numel() else True


class _Evaluation:
    def __init__(self, leaves: Mapping[Node, Tensor], tokens: int) -> None:
        self._values: dict[Node, Any] = dict(leaves)
        self._tokens = tokens

    def of(self, root: Node) -> Any:
        pending = [root]
        while pending:
            node = pending[-1]
            if node in self._values:
                pending.pop()
                continue
            size = self._size(node)
            if size is not None:
                self._values[node] = size
                continue
            if not is_analytic(node):
                what = f"it reads {node.name}" if node.op != "call_function" else f"{node.target} is no arithmetic"
                raise Stuck(node, f"{what} of a known recurrence")
            left = [n for n in node.all_input_nodes if n not in self._values]
            if left:
                pending += left
                continue
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: self._values[n])
            try:
                self._values[node] = _wide(_call(node, args, dict(kwargs)))
            except (RuntimeError, TypeError, IndexError) as error:
                raise Stuck(node, f"it cannot be computed: {str(error).splitlines()[0][:200]}") from None
        return self._values[root]

    def _size(self, node: Node) -> int | None:
        """What a size is in a call of so many tokens: the one number that is not fixed is their count."""
        value = node.meta.get("val")
        if not isinstance(value, torch.SymInt):
            return None
        expression = value.node.expr
        return int(expression.subs(dict.fromkeys(expression.free_symbols, self._tokens)))


def _call(node: Node, args: Any, kwargs: dict[str, Any]) -> Any:
    if _name(node) in ("_to_copy", "to"):
        return args[0]  # between floats: everything is float64 here
    if isinstance(kwargs.get("dtype"), torch.dtype) and kwargs["dtype"].is_floating_point:
        kwargs["dtype"] = torch.float64
    if node.target in (aten.view.default, aten._unsafe_view.default):
        return args[0].reshape(args[1])  # operands lie as they are made here
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _wide(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    return type(value)(_wide(v) for v in value) if isinstance(value, (list, tuple)) else value
