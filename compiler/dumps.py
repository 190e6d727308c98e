"""The graph after every pass, as numbered files: `MOEC_DUMP=DIR moec compile ...` (or explain, or verify).

    000_exported.txt, 001_canonicalize.txt, ..., 004_fuse_moe.txt     the graph as text, after each pass
    004_fuse_moe.before.svg, 004_fuse_moe.after.svg                   what the pass replaced, and by what

Pictures need pygraphviz (the extra `pictures`); without it there are none. Each shows the first rewritten regions only.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch.fx import Node

from moec.compiler.errors import UserError
from moec.compiler.pipeline import Pass, PassResult
from moec.compiler.program import Program, module_path

VARIABLE = "MOEC_DUMP"
PICTURED = 60  # nodes of one picture, a block or two; thousands take minutes to lay out and are unreadable


class Dumps:
    """`after(pass, result)` for `run_passes`; does nothing without a folder."""

    def __init__(self, program: Program, folder: Path | None = None) -> None:
        given = os.environ.get(VARIABLE)
        self._folder = folder or (Path(given) if given else None)
        self._before, self._count = program, 0
        if self._folder is not None:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"{VARIABLE}: {error.strerror}", place=str(self._folder)) from error
            self._write("exported", program)

    def after(self, p: Pass, result: PassResult) -> None:
        if self._folder is None:
            return
        self._count += 1
        self._write(p.name, result.program)
        if result.changed:
            self._draw(p.name, result.program)
        self._before = result.program

    def _path(self, name: str, suffix: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{self._count:03}_{name}{suffix}"

    def _write(self, name: str, program: Program) -> None:
        self._path(name, ".txt").write_text(program.text(), "utf-8")

    def _draw(self, name: str, after: Program) -> None:
        old, new = rewritten(self._before, after)
        for nodes, program, suffix in ((old, self._before, ".before.svg"), (new, after, ".after.svg")):
            picture = drawn(program, nodes[:PICTURED])
            if picture is not None and nodes:
                self._path(name, suffix).write_bytes(picture)


def rewritten(before: Program, after: Program) -> tuple[list[Node], list[Node]]:
    """(nodes that are gone, nodes that are new): those of the same name and operator in both graphs stayed."""

    def calls(program: Program) -> dict[tuple[str, Any], Node]:
        return {(n.name, n.target): n for n in program.graph.nodes if n.op == "call_function"}

    a, b = calls(before), calls(after)
    return [n for key, n in a.items() if key not in b], [n for key, n in b.items() if key not in a]


def drawn(program: Program, nodes: Iterable[Node]) -> bytes | None:
    """An SVG of `nodes`, what they read and who reads them; None without pygraphviz."""
    try:
        import pygraphviz
    except ImportError:
        return None
    graph = pygraphviz.AGraph(directed=True, rankdir="TB")
    graph.node_attr.update(shape="box", style="filled", fontname="sans-serif", fontsize="10", fillcolor="white")
    inner = set(nodes)
    for node in inner:
        graph.add_node(node.name, label=_label(node), fillcolor="#fdf0d5", tooltip=module_path(node) or node.name)
    for node in inner:
        for source in node.all_input_nodes:
            if source not in inner:
                weight = program.weight_of(source)
                graph.add_node(source.name, label=weight or _label(source), fillcolor="#e8eef7" if weight else "white")
            graph.add_edge(source.name, node.name)
        for user in node.users:
            if user not in inner:
                graph.add_node(user.name, label=_label(user))
                graph.add_edge(node.name, user.name)
    graph.layout(prog="dot")
    picture = graph.draw(format="svg")
    return picture if isinstance(picture, bytes) else picture.encode()


def _label(node: Node) -> str:
    name = getattr(node.target, "__name__", str(node.target))
    shape = getattr(node.meta.get("val"), "shape", None)
    return f"{name}\\n[{', '.join(map(str, shape))}]" if shape is not None else name


def in_turn(*observers: Callable[[Pass, PassResult], None]) -> Callable[[Pass, PassResult], None]:
    """One observer that calls several."""

    def after(p: Pass, result: PassResult) -> None:
        for observer in observers:
            observer(p, result)

    return after
