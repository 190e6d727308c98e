"""levels_to_int8: codes that number the levels of a table become INT8 codes of the same values.

For targets whose arithmetic knows whole numbers only. The levels are INT8 values (`compiler/levels.py`), so nothing is
rounded, and such weights take twice the bytes: `note` says so.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import Node

from moec.compiler.levels import Grid
from moec.compiler.ops import EmbeddingQ, FusedMoeQ, LinearQ
from moec.compiler.ops.moe_call import WEIGHTS
from moec.compiler.pipeline import Pass, PassResult
from moec.compiler.program import Editor, LazyWeight, Program, Stage
from moec.compiler.quant import unpacked_codes

_SUFFIX = ".int8"  # names the codes of a weight, one to a byte
_CODES = ("codes", *(f"{name}_codes" for name in WEIGHTS))  # operands of the three operators that hold codes


def levels_to_int8() -> Pass:
    """Quantized operators with `levels` -> the same with 8 bits and none; the weights' entries keep their format."""
    return Pass("levels_to_int8", _run, needs=Stage.FUSED, gives=Stage.FUSED)


def _run(program: Program) -> PassResult:
    edit = program.edit()
    changed = 0
    for node in edit.graph.nodes:
        call: LinearQ[Node] | EmbeddingQ[Node] | FusedMoeQ[Node] | None
        call = LinearQ[Node].find(node) or EmbeddingQ[Node].find(node) or FusedMoeQ[Node].find(node)
        if call is None or not call.levels:
            continue
        grid = Grid(call.bits, call.levels)
        given = {name: getattr(call, name, None) for name in _CODES}
        wide = {name: _expanded(edit, codes, grid) for name, codes in given.items() if codes is not None}
        node.args = replace(call, **wide, bits=8, levels="").arguments()  # type: ignore[arg-type]
        changed += 1
    return PassResult(edit.done(), changed) if changed else PassResult(program, 0)


def _expanded(edit: Editor, codes: Node, grid: Grid) -> Node:
    """The placeholder of the values of codes [..., L/2], int8 [..., L]; one for all that read the codes."""
    name = edit.weight_of(codes)
    assert name is not None, "a quantized operator's codes are weights"
    existing = edit.placeholder_of(name + _SUFFIX)
    if existing is not None:
        return existing
    stored = edit.weights[name]

    def load() -> Tensor:
        return unpacked_codes(stored.load(), grid)

    *lead, half = stored.shape
    weight = LazyWeight((*lead, 2 * half), torch.int8, load, origins=stored.origins)
    return edit.add_weight(name + _SUFFIX, weight, edit.roles[name])


def note(program: Program) -> tuple[str, ...]:
    """A line if weights of `program` have levels, for a target that runs this pass."""
    held = [w for w in program.quantized.values() if w.format.levels]
    if not held:
        return ()
    kinds = " and ".join(sorted({str(w.format.grid).upper() for w in held}))
    return (f"{len(held)} weights in {kinds} are INT8 codes of the same values here: twice the bytes of their codes",)
