"""Post-dominators of a graph: the node that everything computed from another one passes through."""

from __future__ import annotations

from torch.fx import Graph, Node


class PostDominators:
    """`of(node)`: the first node on every path from `node` to the graph's output; None when only the output is."""

    def __init__(self, graph: Graph) -> None:
        self._next: dict[Node, Node | None] = {}
        self._depth: dict[Node, int] = {}
        for node in reversed(graph.nodes):
            users = [u for u in node.users if u in self._depth]
            if node.op == "output" or not users:
                self._next[node], self._depth[node] = None, 0
                continue
            meet: Node | None = users[0]
            for user in users[1:]:
                meet = self._meet(meet, user)
            self._next[node] = meet
            self._depth[node] = 0 if meet is None else self._depth[meet] + 1

    def of(self, node: Node) -> Node | None:
        return self._next[node]

    def _meet(self, a: Node | None, b: Node | None) -> Node | None:
        while a is not b:
            if a is None or b is None:
                return None
            if self._depth[a] >= self._depth[b]:
                a = self._next[a]
            else:
                b = self._next[b]
        return a
