"""The role of each weight, derived from how the exported graph uses it, never from its name.

    embedding      the table that the token ids index
    head           the linear whose result is the program's
    attention      a linear whose result reaches softmax over [.., T, S] (or sdpa) before another linear, or reads it,
                   or feeds nothing but such linears (latent projections)
    ffn            every other linear

Routers and experts get their roles from the rules that recognise them.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from moec.compiler.program import Role, weight_names

aten = torch.ops.aten
LINEARS = {aten.linear.default, aten.matmul.default, aten.mm.default, aten.addmm.default}
SDPA = aten.scaled_dot_product_attention.default
SOFTMAX = {aten.softmax.int, aten._softmax.default}
REACH = 400  # nodes between two linears; an attention has under a hundred


def roles_by_use(exported: ExportedProgram) -> dict[str, Role]:
    """Roles of embedding tables and of the matrices that linears read; a tied table is an embedding."""
    names = weight_names(exported)
    roles: dict[str, Role] = {}
    linears: dict[Node, str] = {}
    for node in exported.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is aten.embedding.default and _name(node.args[0], names):
            roles[names[node.args[0].name]] = Role.EMBEDDING
        elif node.target is aten.linear.default and _name(node.args[1], names):
            linears[node] = names[node.args[1].name]
    output = next(reversed(exported.graph.nodes))
    results = {_source(n) for n in output.all_input_nodes}
    nexts = {node: _next_products(node) for node in linears}
    attention = {n for n in linears if _reaches_core(nexts[n]) or _is_core(_source(n.args[0]))}
    while True:
        more = {n for n in linears if n not in attention and nexts[n] and all(m in attention for m in nexts[n])}
        if not more:
            break
        attention |= more
    for node, name in linears.items():
        if name not in roles:
            roles[name] = Role.HEAD if node in results else Role.ATTENTION if node in attention else Role.FFN
    return roles


def _name(node: object, names: dict[str, str]) -> bool:
    return isinstance(node, Node) and node.op == "placeholder" and node.name in names


def _source(node: object) -> Node | None:
    """Below operators of one operand that is computed: reshapes, casts, scaling, the second product of attention."""
    while isinstance(node, Node) and node.op == "call_function" and node.target not in LINEARS and not _is_core(node):
        inputs = [n for n in node.all_input_nodes if n.op == "call_function" and _is_float(n)]
        if len(inputs) != 1:
            break
        node = inputs[0]
    return node if isinstance(node, Node) else None


def _is_float(node: Node) -> bool:
    result = node.meta.get("val")
    return isinstance(result, torch.Tensor) and result.is_floating_point()


def _is_core(node: Node | None) -> bool:
    """sdpa, or a product of four dimensions that reads a softmax: attention spelled out."""
    if node is None or node.op != "call_function":
        return False
    if node.target is SDPA:
        return True
    if node.target in SOFTMAX:
        return _rank(node) == 4
    return node.target is aten.matmul.default and _rank(node) == 4


def _rank(node: Node) -> int:
    result = node.meta.get("val")
    return result.dim() if isinstance(result, torch.Tensor) else 0


def _next_products(node: Node) -> list[Node]:
    """The attention cores and linears that the result of `node` reaches before any other; empty when too far."""
    found: list[Node] = []
    seen, queue = {node}, [node]
    while queue:
        if len(seen) > REACH:
            return []
        for user in queue.pop().users:
            if user in seen:
                continue
            seen.add(user)
            if _is_core(user) or user.target is aten.linear.default:
                found.append(user)
            else:
                queue.append(user)
    return found


def _reaches_core(products: Iterable[Node]) -> bool:
    listed = list(products)
    return bool(listed) and all(_is_core(p) for p in listed)
