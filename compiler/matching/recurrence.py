"""Recognises the recurrence of a scan over tokens: compares its body, a graph of one token, with our operators' steps.

The body is evaluated once on random values in float64; a recurrence is recognised when its own step gives the same
state and the same result for one assignment of the body's inputs to its operands. Numbers are read off the body: an
epsilon is one of its constants, the scale of queries is the ratio of its result to ours.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from moec.compiler.matching.identity import agree, body_values, constants
from moec.compiler.matching.read import Stuck
from moec.compiler.ops.gated_delta import delta_step
from moec.compiler.ops.selective_scan import scan_step

Shape = tuple[int, ...]
_NEAR = ("", "neither state nor result is its", "the state is its, the result is not")  # how far a reading came


@dataclass(frozen=True)
class Recurrence:
    """`kind`: the operator. `operands`: for each of its operands, which input of the body it is, the state apart."""

    kind: str
    operands: Mapping[str, int]
    numbers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Sample:
    """The body's inputs, the first of them the state, and what it made of them."""

    inputs: Sequence[Tensor]
    state: Tensor
    result: Tensor
    constants: Sequence[float]


def read_body(body: GraphModule, node: Node) -> Recurrence:
    """Which recurrence `body` is a step of. Stuck at `node`, or at an operator that no recurrence has."""
    places = [n for n in body.graph.nodes if n.op == "placeholder"]
    shapes = [tuple(int(s) for s in n.meta["val"].shape) for n in places]
    if any(n.meta["val"].dtype != torch.float32 for n in places):
        raise Stuck(node, "its tokens and state are not all float32")
    generator = torch.Generator().manual_seed(11)
    inputs = [torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes]
    try:
        results = body_values(body, inputs)
    except Stuck as stuck:
        raise Stuck(node, f"in the step of one token, {stuck.reason}", stuck.remedy) from None
    if len(results) != 2:
        raise Stuck(node, f"a step gives {len(results)} values, not a state and a result")
    sample = _Sample(inputs, results[0], results[1], constants(body.graph.nodes))
    reasons = []
    for name, read in (("the gated delta rule", _gated_delta), ("a selective scan", _selective_scan)):
        found = read(sample, [i for i, n in enumerate(places) if n.users and i])
        if isinstance(found, Recurrence):
            return found
        reasons.append(f"{name}: {found}")
    raise Stuck(node, f"its step is not that of a known recurrence ({'; '.join(reasons)})")


def _assignments(
    sample: _Sample, given: Sequence[int], roles: Mapping[str, Callable[[Shape], bool]]
) -> Iterator[dict[str, int]]:
    """Every way to take the body's inputs for operands of fitting shapes, each input once."""
    names = list(roles)
    fitting = [[i for i in given if roles[n](tuple(sample.inputs[i].shape))] for n in names]
    for chosen in itertools.product(*fitting):
        if len(set(chosen)) == len(given) == len(names):
            yield dict(zip(names, chosen, strict=True))


def _gated_delta(sample: _Sample, given: Sequence[int]) -> Recurrence | str:
    state = sample.inputs[0]
    if state.dim() != 4 or state.shape[0] != 1:
        return "the state is not [1, heads, keys, values]"
    _, heads, d, e = state.shape

    def is_key(s: Shape) -> bool:
        return len(s) == 3 and s[0] == 1 and s[2] == d and heads % s[1] == 0

    roles: dict[str, Callable[[Shape], bool]] = {
        "q": is_key,
        "k": is_key,
        "v": lambda s: s == (1, heads, e),
        "decay": lambda s: s == (1, heads),
        "beta": lambda s: s == (1, heads),
    }
    near = 0
    for chosen in _assignments(sample, given, roles):
        value = {n: sample.inputs[i] for n, i in chosen.items()}
        if value["q"].shape != value["k"].shape:
            continue
        near = max(near, 1)
        for eps in (-1.0, *(c for c in sample.constants if 0.0 < c < 0.1)):
            q, k = (_keys(value[n], eps, heads) for n in ("q", "k"))
            new, y = delta_step(state, q, k, value["v"], value["decay"], value["beta"])
            if not agree(new, sample.state):
                continue
            near = 2
            if y.shape == sample.result.shape:
                scale = float((y * sample.result).sum() / y.square().sum())
                if agree(y * scale, sample.result):
                    return Recurrence("gated_delta", chosen, {"scale": scale, "eps": eps})
    return _NEAR[near] or "no five inputs of a token are query, key, value, decay and rate"


def _keys(x: Tensor, eps: float, heads: int) -> Tensor:
    if eps >= 0:
        x = x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)
    return x.repeat_interleave(heads // x.shape[1], 1)


def _selective_scan(sample: _Sample, given: Sequence[int]) -> Recurrence | str:
    state = sample.inputs[0]
    if state.dim() != 4 or state.shape[0] != 1:
        return "the state is not [1, heads, width, n]"
    _, heads, p, n = state.shape

    def is_group(s: Shape) -> bool:
        return len(s) == 3 and s[0] == 1 and s[2] == n and heads % s[1] == 0

    roles: dict[str, Callable[[Shape], bool]] = {
        "x": lambda s: s == (1, heads, p),
        "dt": lambda s: s == (1, heads),
        "b": is_group,
        "c": is_group,
        "a": lambda s: s in ((heads,), (heads, 1), (heads, n)),
    }
    near = 0
    for more in ({}, {"d": lambda s: s == (heads,)}):
        for chosen in _assignments(sample, given, {**roles, **more}):
            value = {name: sample.inputs[i] for name, i in chosen.items()}
            if value["b"].shape != value["c"].shape:
                continue
            near = max(near, 1)
            a = value["a"].reshape(heads, -1)
            b, c = (value[name].repeat_interleave(heads // value[name].shape[1], 1) for name in ("b", "c"))
            new, y = scan_step(state, value["x"], value["dt"], a, b, c)
            if not agree(new, sample.state):
                continue
            near = 2
            if "d" in value:
                y = y + value["d"][:, None] * value["x"]
            if agree(y, sample.result):
                return Recurrence("selective_scan", chosen)
    return _NEAR[near] or "no inputs of a token are x, dt, B, C and A"
