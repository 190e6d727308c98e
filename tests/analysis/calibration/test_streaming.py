"""A model run stretch by stretch is the model: same logits, same inputs of every linear, whatever the cuts."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Node

from moec.analysis.calibration.streaming import LayerStream
from moec.analysis.verify.interpret import GraphRunner
from moec.compiler.ops import fused_moe
from moec.compiler.program import LazyWeight, Program
from tests.analysis.calibration.models import TEXTS, float_program


@pytest.fixture(scope="module")
def program() -> Program:
    return float_program()


def in_one_piece(program: Program, observe: Any = None) -> list[Tensor]:
    """Logits of each text, in the calls that the program allows."""
    runner, found = GraphRunner(program), []
    longest = program.info.max_tokens
    for ids in TEXTS:
        runner.reset()
        calls = [runner(ids[s : s + longest], s, observe) for s in range(0, len(ids), longest)]
        found.append(torch.cat(calls))
    return found


def test_logits(program: Program) -> None:
    """atol 1e-5, rtol 1e-4: the experts' tokens of all texts are multiplied together, fp32 sums in another order."""
    stream = LayerStream(program, TEXTS, result=True)
    for stretch in stream:
        if stream.joint(stretch) is None:
            stream.run(stretch, lambda node, args: None)
        else:
            stream.run_joint(stretch)
    torch.testing.assert_close(
        torch.cat(list(stream.results())), torch.cat(in_one_piece(program)), atol=1e-5, rtol=1e-4
    )


def test_inputs_of_every_linear(program: Program) -> None:
    linears = [n for n in program.graph.nodes if n.target is torch.ops.aten.linear.default]
    fused = [n for n in program.graph.nodes if n.target is fused_moe]
    assert len(linears) >= 9
    wanted: dict[Node, list[Tensor]] = {n: [] for n in linears}
    in_one_piece(program, lambda n, args, value: wanted[n].append(args[0].flatten(0, -2)) if n in wanted else None)
    seen: dict[Node, list[Tensor]] = {n: [] for n in linears}
    stream = LayerStream(program, TEXTS, [*linears, *fused])
    for stretch in stream:
        if stream.joint(stretch) is None:
            stream.run(stretch, lambda n, args: seen[n].append(args[0].flatten(0, -2)) if n in seen else None)
        else:
            stream.run_joint(stretch)
    for node in linears:
        torch.testing.assert_close(torch.cat(seen[node]), torch.cat(wanted[node]), atol=1e-5, rtol=1e-4)
    assert stream.tokens == sum(map(len, TEXTS))


def test_a_layer_is_in_memory_not_all(program: Program) -> None:
    """Every weight is read once, by one stretch, however many texts there are."""
    loads: dict[str, int] = {}
    owner: dict[str, set[int]] = {}
    now = [0]

    def counted(name: str, weight: LazyWeight) -> LazyWeight:
        def load() -> Tensor:
            loads[name] = loads.get(name, 0) + 1
            owner.setdefault(name, set()).add(now[0])
            return weight.load()

        return LazyWeight(weight.shape, weight.dtype, load)

    watched = replace(program, weights={n: counted(n, w) for n, w in program.weights.items()})
    stream = LayerStream(watched, TEXTS, result=True)
    assert len(stream.stretches) > 2 * len(program.info.moe_layers)
    for number, stretch in enumerate(stream):
        now[0] = number
        if stream.joint(stretch) is None:
            stream.run(stretch, lambda node, args: None)
        else:
            stream.run_joint(stretch)
    matrices = {
        n for n in loads if len(program.weights[n].shape) > 1 and program.roles[n].value not in ("cache", "constant")
    }
    assert all(loads[n] == len(owner[n]) for n in matrices), "once for each stretch"
    assert all(len(owner[n]) == 1 for n in matrices if "embed" not in n)


def test_values_are_freed_without_a_collection(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a call computed is gone with it, but for what later stretches read: no cycle of references keeps it."""
    seen: list[weakref.ref[Tensor]] = []
    compute = LayerStream._value

    def watched(*args: Any) -> Any:
        value = compute(*args)
        if isinstance(value, Tensor):
            seen.append(weakref.ref(value))
        return value

    monkeypatch.setattr(LayerStream, "_value", watched)
    stream = LayerStream(program, TEXTS, result=True)
    gc.disable()
    try:
        for stretch in stream:
            if stream.joint(stretch) is None:
                stream.run(stretch, lambda node, args: None)
            else:
                stream.run_joint(stretch)
            kept = {v.untyped_storage().data_ptr() for call in stream.calls for v in call.values.values()}
            alive = [v for ref in seen if (v := ref()) is not None and v.untyped_storage().data_ptr() not in kept]
            assert not alive, [tuple(v.shape) for v in alive]
    finally:
        gc.enable()
    assert len(seen) > 20 * len(TEXTS)
