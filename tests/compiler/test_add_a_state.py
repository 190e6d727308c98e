"""docs/add-a-state.md, executed: the model of the page, and what it asserts of its states."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from moec.analysis.verify.interpret import GraphRunner
from moec.compiler.dialect import check_dialect

PAGE = (Path(__file__).parents[2] / "docs" / "add-a-state.md").read_text("utf-8")


def test_the_page_holds() -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
    found: dict = {}
    torch.manual_seed(0)
    exec(compile(code, "docs/add-a-state.md", "exec"), found)
    program, real = found["program"], found["real"]
    check_dialect(program, after="export")
    # the state is carried: a sequence in pieces is the sequence at once
    ids, runner = (3, 1, 4, 1, 5, 9, 2), GraphRunner(program)
    whole = runner(ids, 0)
    runner.reset()
    pieces = torch.cat([runner(ids[a:b], a) for a, b in ((0, 3), (3, 4), (4, 7))])
    # the same products over the same rows; only torch's matrix product may sum in another order
    torch.testing.assert_close(pieces, whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(whole, real(torch.tensor([ids]), torch.tensor([0]))[0].detach(), atol=1e-5, rtol=1e-5)
