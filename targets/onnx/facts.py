"""What an ONNX artifact's manifest records, and the tables that `moec inspect` makes of it."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from moec.compiler.target import Facts, Table
from moec.compiler.units import size

PAST, PRESENT = "past_key_values", "present"  # the caches of a model's inputs and outputs begin so
_Size = Annotated[int, Field(ge=1, lt=1 << 31)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class CacheFacts(_Record):
    """Shapes of one layer's caches without their positions: [batch, heads, head width]."""

    key: tuple[_Size, _Size, _Size]
    value: tuple[_Size, _Size, _Size]


class Tap(_Record):
    """Names of the values of one MoE layer that a trace reads."""

    x: str
    indices: str
    weights: str
    y: str


class GraphFacts(_Record):
    """What the file holds: interface, nodes by operator, functions, external data."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: dict[str, int]
    functions: dict[str, dict[str, int]]
    initializers: int
    external_bytes: int


class OnnxFacts(Facts):
    """flavour: as the target's option. kv_cache: int8 or fp32. opsets: operator set -> version."""

    flavour: str = "standard"
    kv_cache: str = "fp32"
    caches: tuple[CacheFacts, ...] = ()
    moe_taps: tuple[Tap, ...] = ()
    opsets: dict[str, int] = Field(default_factory=dict)
    ir_version: int = 0
    versions: dict[str, str] = Field(default_factory=dict)
    graph: GraphFacts | None = None


def tables(facts: OnnxFacts) -> list[Table]:
    """Interface and operators of the graph and of its functions."""
    graph = facts.graph
    if graph is None:
        return []
    opsets = ", ".join(f"{name} {number}" for name, number in facts.opsets.items())
    rows = (
        ("flavour", facts.flavour),
        ("KV cache", facts.kv_cache),
        ("operator sets", f"{opsets}; IR version {facts.ir_version}"),
        ("inputs", _patterns(graph.inputs)),
        ("outputs", _patterns(graph.outputs)),
        ("external data", f"{graph.initializers} tensors, {size(graph.external_bytes)}"),
    )
    bodies: list[tuple[str, dict[str, int]]] = [("graph", graph.nodes), *graph.functions.items()]
    counted = tuple((name, domain, count) for name, nodes in bodies for domain, count in _by_domain(nodes))
    return [
        Table("ONNX", ("", ""), rows),
        Table("Nodes by operator set", ("of", "operator set", "nodes"), counted, right=(2,)),
        *(Table(f"Operators of {n}", ("operator", "nodes"), tuple(nodes.items()), right=(1,)) for n, nodes in bodies),
    ]


def _patterns(names: tuple[str, ...]) -> str:
    """Names that differ in a layer's number only, once: `present.0..3.key`."""
    numbers: dict[str, list[int]] = {}
    for name in names:
        found: Any = re.search(r"\.(\d+)\.", name)
        pattern = name if found is None else name.replace(found[0], ".{}.")
        numbers.setdefault(pattern, []).append(-1 if found is None else int(found[1]))
    return ", ".join(pattern.replace("{}", f"{min(ns)}..{max(ns)}") for pattern, ns in numbers.items())


def _by_domain(nodes: dict[str, int]) -> list[tuple[str, int]]:
    domains: dict[str, int] = {}
    for name, count in nodes.items():
        domain = name.rpartition("::")[0] or "ai.onnx"
        domains[domain] = domains.get(domain, 0) + count
    return sorted(domains.items())
