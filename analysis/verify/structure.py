"""Structural checks of a rewrite, without computing numbers: digest, weights, roles."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import numpy as np
import torch

from moec.compiler import ops
from moec.compiler.program import Program, Role

_OURS = frozenset(op for op in vars(ops).values() if isinstance(op, torch._ops.OpOverload))


def structure_faults(before: Program, after: Program, changed: int, folded: Collection[str] = ()) -> list[str]:
    """Structural faults of a rewrite, one line each. `folded`: see `PassResult`."""
    faults = []
    if changed and before.text() == after.text():
        faults.append(f"it reports {changed} changes, but the graph is the same")
    if not changed and _body(before) != _body(after):
        faults.append("it reports no change, but the graph differs")
    faults += _weight_faults(after)
    faults += _lost_weights(before, after, folded)
    return faults


def _body(program: Program) -> str:
    """The graph's text without its first line, which names the stage: a pass may lift the stage and change nothing."""
    return program.text().partition("\n")[2]


def has_target_operators(program: Program) -> bool:
    """Whether the graph holds operators that are neither torch's own nor those of `compiler/ops`: a target's."""
    return any(
        isinstance(node.target, torch._ops.OpOverload)
        and node.target.namespace not in ("aten", "prims")
        and node.target not in _OURS
        for node in program.graph.nodes
    )


def _weight_faults(program: Program) -> Iterable[str]:
    readers: dict[str, int] = {}
    for node in program.graph.nodes:
        name = program.weight_of(node) if node.op == "placeholder" else None
        if name is None:
            continue
        readers[name] = readers.get(name, 0) + len(node.users)
        if name not in program.weights:
            yield f"the graph reads {name}, which the program does not hold"
    for name in program.weights:
        if not readers.get(name):
            yield f"the program holds {name}, which no node reads"
        elif program.roles.get(name) in (Role.EXPERT, Role.ROUTER, Role.SHARED) and readers[name] != 1:
            yield f"{name} is read by {readers[name]} nodes, not by one"


def logical_elements(program: Program, folded: Collection[str] = ()) -> dict[Role, int]:
    """Elements of the weights that are read, by role: codes count as what they stand for; scales and caches do not.

    Weights that nobody reads (a vision tower of which the text part was exported) and `folded` ones do not count.
    """
    counts: dict[Role, int] = {}
    read = {program.weight_of(n) for n in program.graph.nodes if n.op == "placeholder" and n.users}
    scales = {name for held in program.quantized.values() for name in held.tensors[1:]}
    for name, weight in program.weights.items():
        role = program.roles.get(name, Role.OTHER)
        if name in scales or name in folded or name not in read or role in (Role.CACHE, Role.CONSTANT):
            continue
        packed = 2 if weight.dtype == torch.uint8 else 1
        counts[role] = counts.get(role, 0) + packed * int(np.prod(weight.shape))
    return counts


# what a rule that recognises a block may learn of a weight; the roles it had before were by its use, or none
_GENERAL = (Role.OTHER, Role.FFN)


def _lost_weights(before: Program, after: Program, folded: Collection[str]) -> Iterable[str]:
    """Weights may be joined, quantized and recognised, but every element stays. Packed weights no longer show it."""
    if has_target_operators(after):
        return
    a, b = logical_elements(before, folded), logical_elements(after)
    learnt = sum(a.get(r, 0) - b.get(r, 0) for r in _GENERAL)
    found = sum(b.get(r, 0) - a.get(r, 0) for r in {*a, *b} - {*_GENERAL})
    for role in sorted({*a, *b} - {*_GENERAL}):
        if a.get(role, 0) > b.get(role, 0) or (a.get(role, 0) < b.get(role, 0) and learnt < found):
            yield f"{role.value} weights: {a.get(role, 0)} elements before, {b.get(role, 0)} after"
    if learnt > found:
        yield f"{learnt - found} elements of weights are read no more"
