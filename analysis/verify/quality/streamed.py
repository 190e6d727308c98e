"""A program run on many chunks of text a part of its weights at a time: so a model larger than memory can be judged.

The graph is cut between layers, where little is alive. All chunks pass through one piece before the next begins, so
each weight is read once; the last piece, from the output head on, runs chunk by chunk as logits are taken, since those
of all chunks may be larger than the model.

T tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch.export.graph_signature import OutputKind
from torch.fx import Node

from moec.analysis.verify.interpret import GraphRunner, WeightCache
from moec.compiler.program import LazyWeight, Program

_PIECE_BYTES = 1 << 30  # of float32 weights, before the next cut is looked for
_CACHE_BYTES = 3 << 30


def stream_logits(program: Program, chunks: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
    """Logits float32 [T, V] of each chunk, read from position 0 by its own empty KV cache, in order.

    Chunks have at most the program's `max_tokens` tokens.
    """
    cache = WeightCache(_CACHE_BYTES)
    runs = [_Run(program, cache, ids) for ids in chunks]
    *inner, last = pieces(program, max(map(len, chunks)), _PIECE_BYTES)
    with torch.no_grad():
        for nodes in inner:
            for run in runs:
                run.through(nodes)
    for run in runs:
        with torch.no_grad():
            run.through(last)
        yield run.logits()


class _Run(GraphRunner):
    """One chunk on its way through the graph."""

    def __init__(self, program: Program, cache: WeightCache, ids: Sequence[int]) -> None:
        super().__init__(program, cache=cache)
        self._inputs = [torch.tensor([list(ids)], dtype=torch.int64), torch.tensor([0], dtype=torch.int64)]
        self._values: dict[Node, Any] = {}
        self._dead_after = _dead_after(program)
        self._carried = frozenset(name for name in program.weights if self._is_state(name))
        self._idle_after = _idle_after(program, self._carried)

    def reset(self) -> None:
        self.state = {}

    def value_of(self, node: Node, inputs: Sequence[torch.Tensor] = ()) -> Any:
        """As the runner's, with a cache made when its layer first asks for it."""
        kind, key = self._sources[node.name]
        if kind == "weight" and key in self._carried and key not in self.state:
            self.state[key] = self.program.weights[key].load().clone()
        return super().value_of(node, inputs)

    def through(self, nodes: Sequence[Node]) -> None:
        """Compute `nodes`, and forget what none after them reads."""
        for node in nodes:
            self._call(node, self._values, self._inputs, None)
            for dead in self._dead_after.get(node, ()):
                self._values.pop(dead, None)
            for name in self._idle_after.get(node, ()):
                self.state.pop(name, None)

    def logits(self) -> np.ndarray:
        """Taken once, after the last piece."""
        value = self._values.pop(_logits_node(self.program))
        self._values.clear()
        return np.asarray(value.flatten(0, -2).to(torch.float32).numpy())


def _logits_node(program: Program) -> Node:
    output = next(n for n in program.graph.nodes if n.op == "output")
    results = output.args[0]
    assert isinstance(results, (tuple, list))
    for spec, result in zip(program.exported.graph_signature.output_specs, results, strict=True):
        if spec.kind == OutputKind.USER_OUTPUT and isinstance(result, Node):
            return result
    raise AssertionError("a graph without logits")


def _last_reader(program: Program) -> dict[Node, Node]:
    """Value -> the last node that reads it; the output counts for logits only: caches are of no use afterwards."""
    last: dict[Node, Node] = {}
    for node in program.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        last.setdefault(node, node)
        last.update((used, node) for used in node.all_input_nodes if used.op != "placeholder")
    last.pop(_logits_node(program), None)
    return last


def _dead_after(program: Program) -> dict[Node, list[Node]]:
    dead: dict[Node, list[Node]] = {}
    for node, reader in _last_reader(program).items():
        dead.setdefault(reader, []).append(node)
    return dead


def _idle_after(program: Program, states: Collection[str]) -> dict[Node, list[str]]:
    """For each node, the caches that no node after it reads or writes."""
    last: dict[str, Node] = {}
    for node in program.graph.nodes:
        names = [program.weight_of(used) for used in node.all_input_nodes] if node.op == "call_function" else []
        last.update((name, node) for name in names if name is not None and name in states)
    idle: dict[Node, list[str]] = {}
    for name, node in last.items():
        idle.setdefault(node, []).append(name)
    return idle


def pieces(program: Program, tokens: int, weight_bytes: int) -> list[list[Node]]:
    """The nodes in order, cut where the fewest bytes are alive once a piece has read `weight_bytes` of weights.

    The last piece begins with the first value that is as wide as the vocabulary.
    """
    nodes = [n for n in program.graph.nodes if n.op not in ("placeholder", "output")]
    head = next((i for i, n in enumerate(nodes) if _is_wide(n, program.info.vocab_size)), len(nodes) - 1)
    ends: dict[Node, int] = {}
    for node, reader in _last_reader(program).items():
        ends[reader] = ends.get(reader, 0) + _bytes(node, tokens)
    alive = list(accumulate(_bytes(node, tokens) - ends.get(node, 0) for node in nodes))
    cuts, start, read, held = [0], 0, 0, set[str]()
    for i, node in enumerate(nodes[:head]):
        read += sum(_weight_bytes(program, used, held) for used in node.all_input_nodes)
        if read < weight_bytes:
            continue
        best = min(range((start + i) // 2, i), key=lambda j: (alive[j], -j), default=i)
        cuts.append(best + 1)
        start, read, held = best + 1, 0, set()
    cuts += [head] if head > cuts[-1] else []
    return [nodes[a:b] for a, b in zip(cuts, [*cuts[1:], len(nodes)], strict=True)]


def _weight_bytes(program: Program, node: Node, held: set[str]) -> int:
    name = program.weight_of(node) if node.op == "placeholder" else None
    weight: LazyWeight | None = program.weights.get(name) if name is not None else None
    if weight is None or name is None or name in held:
        return 0
    held.add(name)
    return int(np.prod(weight.shape, dtype=np.int64)) * 4


def _shape(node: Node, tokens: int) -> tuple[int, ...]:
    value = node.meta.get("val")
    return tuple(d if isinstance(d, int) else tokens for d in value.shape) if isinstance(value, torch.Tensor) else ()


def _bytes(node: Node, tokens: int) -> int:
    return int(np.prod(_shape(node, tokens), dtype=np.int64)) * 4


def _is_wide(node: Node, vocabulary: int) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape[-1] == vocabulary
