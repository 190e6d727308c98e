"""One layer of a model as a picture, before and after the passes: nodes coloured by the role of the weights they use.

The layout is layered: a node stands one row below the lowest of its inputs, and in its row where its inputs stand on
average. Rows are few tens, so nothing cleverer is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

from torch.fx import Node

from moec.compiler import build
from moec.compiler.program import Program, Role, module_path
from moec.compiler.spec import Spec
from moec.compiler.spec.quantization import Quantization
from moec.compiler.spec.sources import source_of

COLOURS = {
    "expert": "#4c78a8",
    "shared": "#72b7b2",
    "ffn": "#4c78a8",
    "router": "#e45756",
    "attention": "#f58518",
    "cache": "#eeca3b",
    "embedding": "#54a24b",
    "head": "#b279a2",
    "norm": "#b79a84",
    "constant": "#d0ccc8",
    "other": "#d0ccc8",
}
ENGINE = "#8a8f98"  # of what a target stores in a form of its engine's, which has no role
_HEIGHT, _GAP_X, _GAP_Y = 17, 6, 9
_CHARACTER = 5.4  # average width of the labels' font, a little more than it is
# no arithmetic of their own: edges run through them
_SILENT = ("getitem", "sym_size", "_assert_tensor_metadata", "alias", "detach")


@dataclass(frozen=True)
class Box:
    """One node: what it does, the roles of the weights it uses, and the boxes it reads."""

    name: str
    label: str
    roles: tuple[str, ...]
    inputs: tuple[str, ...]


@dataclass(frozen=True)
class Pictures:
    """Both sides of one layer as SVG, how many operators each has, and the roles whose colours they show."""

    before: str
    after: str
    before_count: int
    after_count: int
    roles: tuple[str, ...]


def layer_pictures(spec: Spec, target: str) -> Pictures | str:
    """One layer of the spec's model before and after all passes for `target`; or why there is no picture.

    The model is exported with a single layer (all layers of a decoder are alike), which takes seconds.
    """
    single = source_of(spec.model).single_layer(spec.model)
    if single is None:
        return "pictures are drawn for models of our own architectures, whose layers are alike"
    one = spec.model_copy(update={"model": single, "quantization": _by_role(spec.quantization)})
    program, passes = build.program_and_passes(one, None, target)
    before = boxes(program)
    after = boxes(build.run_all(program, passes))
    if not before or not after:
        return "the exported graph does not say which nodes are the layer's"
    seen = {role for box in (*before, *after) for role in box.roles or ("other",)}
    return Pictures(draw(before), draw(after), len(before), len(after), tuple(r for r in COLOURS if r in seen))


def _by_role(quantization: Quantization | None) -> Quantization | None:
    """Without the exceptions for weights of layers that a single one lacks."""
    return None if quantization is None else quantization.model_copy(update={"tensors": {}})


def boxes(program: Program) -> list[Box]:
    """The operators of the first decoder layer, in order. Edges skip nodes that compute nothing."""
    inside = {n for n in program.graph.nodes if n.op == "call_function" and "layers.0" in module_path(n)}
    shown = [n for n in inside if not _silent(n)]
    order = {n: i for i, n in enumerate(program.graph.nodes)}
    shown.sort(key=order.__getitem__)
    roles: dict[Node, tuple[str, ...]] = {}
    found = []
    for node in shown:
        direct = _direct_roles(program, node)
        reads = sorted({n for a in node.all_input_nodes for n in _sources(a, set(shown))}, key=order.__getitem__)
        # without weights of its own a node belongs to what it reads last: a sigmoid to the router before it
        # (not to a cache, which only hands on what attention keeps there)
        behind = [role for n in reversed(reads) for role in roles[n][-1:]]
        inherited = tuple([role for role in behind if role != Role.CACHE.value] or behind)[:1]
        roles[node] = direct or inherited
        found.append(Box(node.name, _label(node), roles[node], tuple(n.name for n in reads)))
    return found


def _silent(node: Node) -> bool:
    return any(word in str(node.target) for word in _SILENT)


def _sources(node: Node, shown: set[Node]) -> set[Node]:
    """The shown nodes that `node` stands for: itself, or those behind it."""
    if node in shown:
        return {node}
    if node.op != "call_function" or not _silent(node):
        return set()
    return {n for a in node.all_input_nodes for n in _sources(a, shown)}


def _direct_roles(program: Program, node: Node) -> tuple[str, ...]:
    names = [program.weight_of(a) for a in node.all_input_nodes]
    found = dict.fromkeys(program.roles.get(name, Role.OTHER).value for name in names if name)
    tables = (Role.CONSTANT.value, Role.OTHER.value)  # rotary tables and the like
    return tuple(role for role in found if role not in tables)


def _label(node: Node) -> str:
    parts = str(node.target).split(".")
    name = parts[1] if len(parts) > 1 else parts[0]
    return {"scaled_dot_product_attention": "sdpa"}.get(name, name)


def draw(found: list[Box]) -> str:
    """The boxes as a compact SVG."""
    depth: dict[str, int] = {}
    for box in found:
        depth[box.name] = 1 + max((depth[i] for i in box.inputs), default=-1)
    rows: list[list[Box]] = [[] for _ in range(max(depth.values()) + 1)]
    for box in found:
        rows[depth[box.name]].append(box)
    widest = max(len(row) for row in rows)
    size = max(len(_short(box.label)) for box in found) * _CHARACTER + 10
    width = round(widest * (size + _GAP_X) + _GAP_X)
    height = len(rows) * (_HEIGHT + _GAP_Y) + _GAP_Y
    place: dict[str, tuple[float, float]] = {}
    for index, row in enumerate(rows):
        wanted = {b.name: sum(place[i][0] for i in b.inputs) / len(b.inputs) if b.inputs else width / 2 for b in row}
        row.sort(key=lambda b: wanted[b.name])
        for x, box in zip(_spread([wanted[b.name] for b in row], size, width), row, strict=True):
            place[box.name] = (x, _GAP_Y + index * (_HEIGHT + _GAP_Y))
    edges = "".join(_edge(place[i], place[b.name]) for b in found for i in b.inputs)
    bodies = "".join(_body(b, *place[b.name], size) for b in found)
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" class="graph">'
        f"{edges}{bodies}</svg>"
    )


def _spread(wanted: list[float], size: float, width: float) -> list[float]:
    """Centres as near as possible to those wanted (ascending), without overlap, inside the picture."""
    step = size + _GAP_X
    low = _GAP_X + size / 2
    centres: list[float] = []
    for x in wanted:
        low = max(low, x)
        centres.append(low)
        low += step
    high = width - _GAP_X - size / 2
    for i in reversed(range(len(centres))):
        centres[i] = min(centres[i], high)
        high = centres[i] - step
    return centres


def _edge(a: tuple[float, float], b: tuple[float, float]) -> str:
    x1, y1, x2, y2 = a[0], a[1] + _HEIGHT, b[0], b[1]
    bend = (y2 - y1) / 2
    return f'<path d="M{x1:.0f} {y1:.0f}C{x1:.0f} {y1 + bend:.0f} {x2:.0f} {y2 - bend:.0f} {x2:.0f} {y2:.0f}"/>'


def _body(box: Box, x: float, y: float, size: float) -> str:
    roles = box.roles or ("other",)
    left, part = x - size / 2, size / len(roles)
    stripes = "".join(
        f'<rect x="{left + i * part:.1f}" y="{y:.0f}" width="{part:.1f}" height="{_HEIGHT}" '
        f'fill="{COLOURS.get(role, COLOURS["other"])}"/>'
        for i, role in enumerate(roles)
    )
    return (
        f"<g><title>{escape(box.name)} ({escape(', '.join(roles))})</title>{stripes}"
        f'<text x="{x:.0f}" y="{y + 12:.0f}">{escape(_short(box.label))}</text></g>'
    )


def _short(label: str) -> str:
    return label if len(label) <= 17 else label[:16] + "…"
