"""Gradients of a loss through a program, a stretch at a time: the weights of one layer are in memory, not all.

The forward pass keeps what lies between stretches (the residual stream). The backward pass runs each stretch again,
from the last to the first, under autograd. Products are in bfloat16 on processors that multiply matrices of it.

Shape suffixes: T tokens of a call, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional

from moec.analysis.calibration.streaming import Call, LayerStream, Stretch
from moec.compiler.errors import CompileError
from moec.compiler.matching.read import aten
from moec.compiler.ops.call import find_call

Values = dict[str, Tensor]


def product_dtype() -> torch.dtype:
    """The type that products are computed in here: bfloat16 where the processor has tiles of it, else float32."""
    return torch.bfloat16 if torch.cpu._is_amx_tile_supported() else torch.float32


class Gradients:
    """Forward and backward passes of `stream`, whose program computes logits (`result=True`).

    Each call stands alone: it begins with an empty cache. CompileError for a model whose layers share a cache.
    """

    def __init__(self, stream: LayerStream) -> None:
        self._stream, self.stretches = stream, list(stream)
        self._compute: dict[Any, Callable[..., Any]] = {
            aten.linear.default: _linear,
            aten.embedding.default: _embedding,
        }
        for node in stream.program.graph.nodes:
            if (call := find_call(node)) is not None:
                self._compute[node.target] = _differentiable(type(call))
        if (shared := stream.shared_state()) is not None:
            raise CompileError(
                "a cache that several layers share has no gradient here", place=shared, remedy="use another method"
            )

    def names(self, stretch: Stretch) -> list[str]:
        """The weights that a stretch reads, without caches."""
        return self._stream.weights_of(stretch)

    def alone(self) -> list[Call]:
        """Every call of the stream's texts, from position 0 of an empty cache."""
        return [Call(i, 0, call.ids) for i, call in enumerate(self._stream.calls)]

    @torch.no_grad()
    def before_head(self, calls: Sequence[Call], weights: Callable[[Stretch], Values]) -> list[Call]:
        """`calls` with what the last stretch reads."""
        for stretch in self.stretches[:-1]:
            values = weights(stretch)
            calls = [self._run(stretch, call, values) for call in calls]
        return list(calls)

    @torch.no_grad()
    def logits(self, call: Call, values: Values) -> Tensor:
        """Logits [T, V] of a call that `before_head` gave, float32."""
        return self._result(self._run(self.stretches[-1], call, values))

    def backward(
        self,
        calls: Sequence[Call],
        weights: Callable[[Stretch], Values],
        loss: Callable[[int, Tensor], Tensor],
        collect: Callable[[Stretch, Values], None],
        observe: Callable[[int, Node, tuple[Any, ...]], None] | None = None,
    ) -> float:
        """The sum over calls of `loss(number of the call, logits [T, V])`, and its gradients.

        weights: values of those that a stretch reads; it is called twice for each. collect: gets the same values after
        the backward pass of the stretch, with `grad` where they require it. observe(number, node, args): before each
        node of the stream's `wanted`, as autograd runs it.
        """
        kept: list[list[Call]] = [list(calls)]
        with torch.no_grad():
            for stretch in self.stretches[:-1]:
                values = weights(stretch)
                kept.append([self._run(stretch, call, values) for call in kept[-1]])
        total = 0.0
        after: list[dict[Node, Tensor]] = [{} for _ in calls]
        for stretch in reversed(self.stretches):
            values = weights(stretch)
            for number, call in enumerate(kept.pop()):
                inputs = {n: _leaf(v) for n, v in call.values.items()}

                def seen(node: Node, args: tuple[Any, ...], number: int = number) -> None:
                    if observe is not None:
                        observe(number, node, args)

                with torch.enable_grad():
                    done = self._run(stretch, Call(call.text, call.start, call.ids, inputs), values, seen)
                    if stretch is self.stretches[-1]:
                        value = loss(number, self._result(done))
                        total += float(value.detach())
                        torch.autograd.backward([value])
                    else:
                        _pull(done.values, after[number])
                after[number] = {n: v.grad for n, v in inputs.items() if isinstance(v, Tensor) and v.grad is not None}
            collect(stretch, values)
        return total

    def _run(
        self,
        stretch: Stretch,
        call: Call,
        values: Values,
        observe: Callable[[Node, tuple[Any, ...]], None] | None = None,
    ) -> Call:
        own = Call(call.text, call.start, call.ids, dict(call.values))
        self._stream.run_call(stretch, own, values, {}, observe or (lambda node, args: None), self._compute)
        return own

    def _result(self, call: Call) -> Tensor:
        return next(self._stream.results([call]))


def _leaf(value: Any) -> Any:
    is_float = isinstance(value, Tensor) and value.is_floating_point()
    return value.detach().requires_grad_() if is_float else value


def _pull(values: dict[Node, Any], gradients: dict[Node, Tensor]) -> None:
    """Backward from values whose gradients are known; a value that only passes through is its own leaf."""
    pairs = [(values[n], g) for n, g in gradients.items() if values[n].requires_grad]
    if pairs:
        torch.autograd.backward([v for v, _ in pairs], [g for _, g in pairs])


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y = functional.linear(x.to(weight.dtype), weight).to(torch.float32)
    return y if bias is None else y + bias


def _embedding(weight: Tensor, ids: Tensor, *_: Any) -> Tensor:
    return functional.embedding(ids, weight).to(torch.float32)


def _differentiable(call: Any) -> Callable[..., Any]:
    """An operator of ours by its reference, which autograd follows; the operator itself has no gradient."""
    return lambda *args, **kwargs: call(*args, **kwargs).eager()
