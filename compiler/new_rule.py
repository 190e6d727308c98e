"""`make new-rule NAME=fuse_x`: a rule and its test that pass lint and run, to be filled with meaning.

    python -m moec.compiler.new_rule NAME [--root DIR]

Writes passes/NAME.py and tests/passes/test_NAME.py, and refuses to overwrite either. The rule starts as
x + x -> 2 * x, complete with a case that must match and one that must not: edit both. docs/write-a-rule.md goes on
from there.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from moec.compiler.errors import UserError

RULE = '''"""TITLE: say what is rewritten, as an equation, and where it comes from.

x + x  ->  2 * x
"""

from __future__ import annotations

import torch

from moec.compiler.matching.read import binary
from moec.compiler.pipeline import Pass, PassResult, Refusal
from moec.compiler.program import Program, Stage

aten = torch.ops.aten
RULE = "NAME"
REMEDY = "add a value to itself, not two values"


def NAME() -> Pass:
    return Pass(RULE, _run, needs=Stage.CANONICAL, gives=Stage.CANONICAL)


def _run(program: Program) -> PassResult:
    edit = program.edit()
    changed, refusals = 0, []
    for node in list(edit.graph.nodes):
        pair = binary(node, aten.add.Tensor)
        if pair is None:
            continue  # not a candidate
        x, y = pair
        if x is not y:  # a candidate that is left alone says why
            refusals.append(Refusal.at(RULE, node, "it adds two values", REMEDY))
            continue
        with edit.graph.inserting_before(node):
            doubled = edit.call(aten.mul.Tensor, x, 2.0, like=node)
        node.replace_all_uses_with(doubled)
        edit.graph.erase_node(node)
        changed += 1
    return PassResult(edit.done() if changed else program, changed, tuple(refusals))
'''

TEST = '''"""NAME: what it rewrites, and what it must leave alone."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from moec.compiler.program import Program
from moec.passes.NAME import NAME
from tests.harness import VOCABULARY, check_refused, check_rule, export_toy
from tests.passes.moe_zoo import parameter

D = 6


class Toy(nn.Module):
    def __init__(self, step: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.embed, self.step = parameter(VOCABULARY, D), step

    def forward(self, tokens: Tensor, start_pos: Tensor) -> Tensor:
        return self.step(F.embedding(tokens, self.embed))


def program(step: Callable[[Tensor], Tensor]) -> Program:
    return export_toy(lambda: Toy(step))


def test_rewrites() -> None:
    check_rule(NAME(), program(lambda x: (x + x).tanh()), count=1, contains=["aten.mul.Tensor"])


def test_must_not_match() -> None:
    check_refused(NAME(), program(lambda x: x + x.tanh()), "two values")
'''


def new_rule(name: str, root: Path) -> tuple[Path, Path]:
    """Write the two files; UserError for a name that is taken or is no verb_what."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)+", name):
        raise UserError(f"{name!r} does not name a rule", remedy="use verb_what in small letters: fuse_norms")
    files = (root / "passes" / f"{name}.py", root / "tests" / "passes" / f"test_{name}.py")
    for file in files:
        if file.exists():
            raise UserError("there is such a file already", place=str(file), remedy="choose another NAME")
        if not file.parent.is_dir():
            raise UserError("there is no such folder", place=str(file.parent), remedy="run it in a checkout of moec")
    title = name.replace("_", " ").capitalize()
    for file, text in zip(files, (RULE, TEST), strict=True):
        file.write_text(text.replace("NAME", name).replace("TITLE", title))
    return files


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A new rule and its test.")
    parser.add_argument("name", metavar="NAME", help="verb_what, e.g. fuse_norms")
    parser.add_argument("--root", type=Path, default=Path.cwd(), help="the checkout (default: here)")
    given = parser.parse_args(arguments)
    try:
        rule, test = new_rule(given.name, given.root)
    except UserError as error:
        parser.exit(2, f"{error.line()}\n")
    print(f"{rule}\n{test}\nnow: python -m pytest {test}, then docs/write-a-rule.md")


if __name__ == "__main__":
    main()
