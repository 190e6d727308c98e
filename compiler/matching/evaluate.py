"""Evaluate the part of a graph that depends on positions only: masks and cache indices, read by what they compute.

A mask is recognised by its values over sampled (token count, start position) pairs, edges included, not by its
spelling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from moec.compiler.matching.read import Stuck
from moec.compiler.program import Editor, Role

MAX_NODES = 400  # a mask of any model seen takes under fifty nodes; a larger cone is not a mask
# Of a sampled mask [T, size]: 64 MB as bool, 256 MB as float32. A call of 128 tokens fits it up to 524,288 positions.
MAX_ELEMENTS = 1 << 26


@dataclass(frozen=True)
class Call:
    """One sampled call: `tokens` new tokens from `start` on."""

    tokens: int
    start: int


Values = Callable[[list[Call]], Iterator[Tensor]]  # of one node


class PositionEvaluator:
    """Values of nodes for given calls. Only the token count, start_pos and constants may be read."""

    def __init__(self, edit: Editor) -> None:
        self._edit = edit
        inputs = [n for n in edit.graph.nodes if n.op == "placeholder" and edit.weight_of(n) is None]
        self._tokens = next((n for n in inputs if n.meta["val"].dim() == 2), None)
        self._start = next((n for n in inputs if n.meta["val"].dim() == 1), None)
        self._order = {n: i for i, n in enumerate(edit.graph.nodes)}
        self._constants: dict[str, Tensor] = {}

    def cone(self, root: Node) -> list[Node]:
        """The ancestors of `root` in order. Stuck at one that is not a function of the positions."""
        seen: set[Node] = set()
        pending = [root]
        while pending:
            node = pending.pop()
            if node in seen:
                continue
            seen.add(node)
            if len(seen) > MAX_NODES:
                raise Stuck(root, "it depends on too much of the graph to be a function of positions")
            if node.op == "placeholder":
                self._check_input(node)
            elif node.op != "call_function":
                raise Stuck(node, f"{node.op} is not a function of positions")
            elif (
                node is not self._tokens and self._tokens in node.all_input_nodes and "sym_size" not in str(node.target)
            ):
                raise Stuck(node, "it reads the token ids")
            pending.extend(node.all_input_nodes)
        return sorted(seen, key=lambda n: self._order[n])

    def _check_input(self, node: Node) -> None:
        name = self._edit.weight_of(node)
        if name is not None and self._edit.roles[name] is not Role.CONSTANT:
            raise Stuck(node, f"it depends on the {self._edit.roles[name].value} tensor {name}")

    def values(self, root: Node, calls: Iterable[Call]) -> Iterator[Tensor]:
        """The value of `root` in each call, computed when it is taken: one at a time is in memory."""
        cone = self.cone(root)
        last_read = {source: node for node in cone for source in node.all_input_nodes}
        for call in calls:
            yield self._run(cone, last_read, call)

    def _run(self, cone: list[Node], last_read: Mapping[Node, Node], call: Call) -> Any:
        """The value of the cone's last node; every other is dropped behind the node that reads it last."""
        env: dict[Node, Any] = {}
        for node in cone:
            if node is self._tokens:
                env[node] = torch.zeros(1, call.tokens, dtype=torch.long)
            elif node is self._start:
                env[node] = torch.tensor([call.start])
            elif node.op == "placeholder":
                name = str(self._edit.weight_of(node))
                if name not in self._constants:
                    self._constants[name] = self._edit.weights[name].load()
                env[node] = self._constants[name]
            else:
                args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: env[n])
                env[node] = node.target(*args, **kwargs)
            for source in node.all_input_nodes:
                if last_read[source] is node:
                    del env[source]
        return env[cone[-1]]


def sample_calls(size: int, max_tokens: int, marks: Iterable[int] = ()) -> list[Call]:
    """Calls that fit a cache of `size`: short and long ones, at both ends, and around every position of `marks`."""
    calls = set()
    starts = {0, 1, 2, size // 3, size - 1, *(m + d for m in marks for d in (-2, -1, 0, 1, 2))}
    for tokens in {1, 2, 3, max(1, max_tokens // 2), max_tokens}:
        for start in {*starts, size - tokens}:
            if start >= 0 and start + tokens <= size:
                calls.add(Call(tokens, start))
    return sorted(calls, key=lambda c: (c.tokens, c.start))


def is_positions(values: Values, calls: list[Call]) -> bool:
    """Whether the index of a cache write is start, start+1, ... in every call."""
    return all(
        torch.equal(v.flatten().to(torch.long), torch.arange(c.start, c.start + c.tokens))
        for v, c in zip(values(calls), calls, strict=True)
    )


def window_of_mask(values: Values, size: int, max_tokens: int) -> int | None:
    """0 for a causal mask, w for a causal mask over the last w positions, None for anything else.

    A mask is bool (True attends) or additive (0 attends, at most half the lowest float32 does not); [..., T, size].
    The longest call that is sampled has `max_tokens`, or as many as MAX_ELEMENTS leaves rows of this size.
    """
    last = _attends(next(values([Call(1, size - 1)])), size)
    if last is None:
        return None
    seen = int(last.sum())
    window = 0 if seen == size else seen
    if seen == 0:
        return None
    calls = sample_calls(size, min(max_tokens, max(3, MAX_ELEMENTS // size)), (window,))
    keys = torch.arange(size, dtype=torch.int32)[None, :]
    for call, value in zip(calls, values(calls), strict=True):
        mask = _attends(value, size)
        rows = torch.arange(call.start, call.start + call.tokens, dtype=torch.int32)[:, None]
        wanted = keys <= rows
        if window:
            wanted &= keys > rows - window
        if mask is None or mask.shape != wanted.shape or not torch.equal(mask, wanted):
            return None
    return window


def _attends(mask: Tensor, size: int) -> Tensor | None:
    """bool [T, size] of a mask in either form, None when it is neither or differs between heads."""
    if mask.dim() < 2 or mask.shape[-1] != size or any(s != 1 for s in mask.shape[:-2]):
        return None
    mask = mask.reshape(mask.shape[-2:])
    if mask.dtype == torch.bool:
        return mask
    if not mask.dtype.is_floating_point:
        return None
    attends = mask == 0
    hidden = mask <= torch.finfo(torch.float32).min / 2
    return attends if bool((attends | hidden).all()) else None
