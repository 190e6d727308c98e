"""Random mutants of layers with a state and of attention spelled out: none is miscompiled.

Each is refused, or computes what it computed before.

A mutant has one or two edits in the graph around the state, or inside the step of a fold. MOEC_MUTANTS=N tries N edits
of every graph (default 16); the seeds are fixed, so a failure comes back.
"""

from __future__ import annotations

import copy
import logging
import os
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Node

from moec.compiler.program import Editor, Program, fake_mode_of
from moec.passes.fuse_attention import fuse_attention
from moec.passes.fuse_recurrence import fuse_recurrence
from moec.passes.fuse_short_conv import fuse_short_conv
from tests.harness import CALLS, run
from tests.interpreter import Interpreter
from tests.passes.mutate import EDITS, _reader, _recompute, mutant
from tests.passes.state_zoo import Conv, Delta, Selective, zoo
from tests.passes.test_fuse_attention import spelled

COUNT = int(os.environ.get("MOEC_MUTANTS", "16"))
TOLERANCE = 1e-4  # of the largest value, as tests/harness.py has it
GRAPHS: dict[str, Callable[[], Program]] = {k.__name__: lambda k=k: zoo(k) for k in (Conv, Delta, Selective)}
GRAPHS["Sinks"] = spelled
RULES = {
    "Conv": fuse_short_conv, "Delta": fuse_recurrence, "Selective": fuse_recurrence, "Sinks": fuse_attention
}  # fmt: skip


class _Step:
    """The graph of a fold's step, as far as an edit uses an Editor."""

    call = Editor.call

    def __init__(self, graph: torch.fx.Graph) -> None:
        self.graph, self.fake_mode = graph, fake_mode_of(graph)


def _step_mutant(program: Program, seed: int) -> tuple[Program, str] | None:
    rng = random.Random(seed)
    edit = program.edit()
    name = next(str(n.target) for n in edit.graph.nodes if n.op == "get_attr")
    body = copy.deepcopy(getattr(edit.module, name))
    step, done = _Step(body.graph), []
    wanted = [str(n.meta["val"].shape) for n in body.graph.output_node().all_input_nodes]
    for _ in range(1 + seed % 2):
        nodes = [n for n in body.graph.nodes if n.op == "call_function"]
        try:
            changed = rng.choice([e for e in EDITS if e is not _reader])(step, rng.choice(nodes), rng)  # type: ignore[arg-type]
            if changed is None:
                return None
            _recompute(step, changed[0])  # type: ignore[arg-type]
        except (AssertionError, RuntimeError, TypeError, ValueError, IndexError, NotImplementedError, KeyError):
            return None
        done.append(changed[1])
    results = [n.meta["val"] for n in body.graph.output_node().all_input_nodes]
    if [str(v.shape) for v in results] != wanted or any(v.dtype != torch.float32 for v in results):
        return None
    body.recompile()
    setattr(edit.module, name, body)
    try:
        return edit.done(), "; ".join(done)
    except Exception:  # the verifier of exported programs does not take it
        return None


def _near_state(node: Node) -> bool:
    """Between the buffer and what becomes of it: all but the embedding and the head of the toy."""
    return isinstance(node.meta.get("val"), Tensor)


def _outputs(program: Program) -> list[Tensor] | None:
    interpreter, generator = Interpreter(program), torch.Generator().manual_seed(1)
    results = []
    for tokens, start in CALLS:
        ids = torch.randint(0, program.info.vocab_size, (1, tokens), generator=generator)
        try:
            results.append(interpreter(ids, torch.tensor([start])))
        except (IndexError, RuntimeError):
            return None
    return results if all(torch.isfinite(r).all() for r in results) else None


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("Conv", "graph"),
        ("Selective", "graph"),
        ("Sinks", "graph"),
        ("Delta", "step"),
        pytest.param("Delta", "graph", marks=pytest.mark.slow),
        pytest.param("Selective", "step", marks=pytest.mark.slow),
    ],
)
def test_no_mutant_is_miscompiled(name: str, where: str) -> None:
    program, rule = GRAPHS[name](), RULES[name]()
    assert run(rule, program).changed == 1
    tried = 0
    for seed in range(2 * COUNT):
        found = mutant(program, seed, _near_state, 1 + seed % 2) if where == "graph" else _step_mutant(program, seed)
        if found is None:
            continue
        tried += 1
        changed, what = found
        result = run(rule, changed)
        if not result.changed:
            continue
        wanted = _outputs(changed)
        if wanted is None:
            continue
        got = _outputs(result.program)
        assert got is not None, f"seed {seed}: {what}: it does not run any more"
        for a, b in zip(wanted, got, strict=True):
            near = TOLERANCE * (1 + float(a.abs().max()))
            torch.testing.assert_close(b, a, atol=near, rtol=0, msg=lambda t, w=what, s=seed: f"seed {s}: {w}: {t}")
    assert tried >= COUNT // 2, "hardly an edit was well formed: this proves nothing"
