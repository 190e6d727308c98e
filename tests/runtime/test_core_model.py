"""bench/core_model.py: which instructions make a run, and that llvm-mca's peak is the core's."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import core_model

DISASSEMBLED = """
0000000000400000 <gemm_strip<1, 6>(task const&)>:
  400000:\tmov\tx9, x0
  400004:\tldr\tq0, [x1]
  400008:\tcbz\tw8, 400014 <gemm_strip+0x14>
  40000c:\tldr\tq1, [x2]
  400010:\tb\t400018 <gemm_strip+0x18>
  400014:\tsmmla\tv0.4s, v1.16b, v2.16b\t// a comment
  400018:\tret

0000000000400020 <main>:
  400020:\tret
"""


def test_a_run_is_what_ran_equally_often(tmp_path: Path) -> None:
    text, counts, objdump = tmp_path / "text", tmp_path / "counts", tmp_path / "objdump"
    text.write_text(DISASSEMBLED)
    objdump.write_text(f"#!/bin/sh\ncat {text}\n")
    objdump.chmod(0o755)
    counts.write_text("400000 1 1\n400004 2 8\n400014 1 5\n400014 1 3\n")  # a block may have been translated twice
    (function,) = core_model.read_profile(counts, text, str(objdump)).functions
    assert function.name == "gemm_strip<1, 6>(task const&)"
    assert [(r.count, r.instructions, r.lines) for r in function.runs] == [
        (1, 1, ["mov x9, x0"]),
        (8, 3, ["ldr q0, [x1]", "smmla v0.4s, v1.16b, v2.16b"]),  # the branch counts and is not analysed
    ]
    assert function.executed == 25


def test_the_peak_is_that_of_the_core() -> None:
    try:
        core_model.find_mca()
    except SystemExit as missing:
        pytest.skip(str(missing))  # older LLVM does not know these cores; the message names the package
    product = "smmla v{to}.4s, v{a}.16b, v{b}.16b"
    peaks = {cpu: core_model.Core("aarch64", cpu, "+i8mm").peak(product) for cpu in ("neoverse-v2", "neoverse-n2")}
    # four and two vector pipes; a few cycles of the simulation fill and drain them
    assert peaks["neoverse-v2"] == pytest.approx(4, rel=0.03)
    assert peaks["neoverse-n2"] == pytest.approx(2, rel=0.03)
