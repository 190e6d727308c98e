"""Cycles of executed code on LLVM's model of a core: counts of instructions, runs of equal counts, llvm-mca.

A profile maps addresses of a program to how often each instruction ran. Within a function, instructions that ran
equally often are one run: a loop's body is the path that was taken through it. llvm-mca gives a run's cycles when
it repeats; a function's cycles are the sum over its runs, the program's the sum over its functions.

What such a model knows: ports, latencies, dispatch width. What it cannot know: caches, memory, prefetch, branches (they
are left out) and mispredictions, the clock under load, and where the real core differs from LLVM's tables. It lets
consecutive repetitions of a run overlap, and runs of different counts not at all.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

REPETITIONS = 100
SMALL = 0.002  # of a profile's instructions: a run with less is not analysed but counted at the others' average
_INSTRUCTION = re.compile(r"^\s*([0-9a-f]+):\t(\S.*)$")
_FUNCTION = re.compile(r"^([0-9a-f]+) <(.*)>:$")
_BRANCH = re.compile(r"^(b|bl|br|blr|ret|cbn?z|tbn?z|b\.\w+|j\w+|call\w*|ret\w*|notrack|bnd)\b")


@dataclass(frozen=True)
class Core:
    """A core as llvm-mca knows it. `product`: the instruction whose rate is the peak, MACs of one."""

    triple: str
    cpu: str
    features: str = ""

    def cycles(self, lines: tuple[str, ...]) -> float:
        """Of one repetition of these instructions."""
        return _analysed(self, lines)

    def peak(self, product: str) -> float:
        """How many independent products a cycle takes."""
        registers = range(16)
        lines = tuple(product.format(to=r, a=16 + r % 8, b=24 + r % 8) for r in registers)
        return len(lines) / self.cycles(lines)


def find_mca() -> str:
    """The newest llvm-mca. SystemExit with what to install where there is none that knows the cores."""
    for name in (*(f"llvm-mca-{v}" for v in range(25, 17, -1)), "llvm-mca"):
        found = shutil.which(name)
        if found is None:
            continue
        text = subprocess.run([found, "--version"], capture_output=True, text=True, check=True).stdout
        version = re.search(r"LLVM version (\d+)", text)
        if version and int(version[1]) >= 18:
            return found
    raise SystemExit("error: no llvm-mca of LLVM 18 or newer; install one (Debian: apt-get install llvm-19)")


@lru_cache(maxsize=4096)
def _analysed(core: Core, lines: tuple[str, ...]) -> float:
    command = [find_mca(), f"-mtriple={core.triple}", f"-mcpu={core.cpu}", f"-iterations={REPETITIONS}"]
    command += [f"-mattr={core.features}"] if core.features else []
    command += ["-resource-pressure=0", "-instruction-info=0", "-skip-unsupported-instructions=any"]
    done = subprocess.run(command, input="\n".join(lines) + "\n", capture_output=True, text=True, check=False)
    total = re.search(r"Total Cycles:\s+(\d+)", done.stdout)
    if total is None:
        raise SystemExit(f"error: llvm-mca -mcpu={core.cpu} failed: {done.stderr.strip().splitlines()[:1]}")
    return int(total[1]) / REPETITIONS


# ------------------------------------------------------------------------------------------------------------- profiles


@dataclass
class Run:
    """Instructions of a function that ran `count` times, in the order of their addresses; `lines` without branches."""

    count: int
    instructions: int = 0
    lines: list[str] = field(default_factory=list)


@dataclass
class Function:
    name: str
    runs: list[Run]

    @property
    def executed(self) -> int:
        return sum(r.count * r.instructions for r in self.runs)

    def cycles(self, core: Core, least: float) -> float:
        """Runs of fewer than `least` executed instructions are counted at the average of the others (or at 1 each)."""
        analysed = [r for r in self.runs if r.count * r.instructions >= least and r.lines]
        cycles = sum(r.count * core.cycles(tuple(r.lines)) for r in analysed)
        executed = sum(r.count * r.instructions for r in analysed)
        return cycles + (self.executed - executed) * (cycles / executed if executed else 1.0)


@dataclass
class Profile:
    """What one call executed."""

    functions: list[Function]

    @property
    def executed(self) -> int:
        return sum(f.executed for f in self.functions)

    def cycles(self, core: Core, pattern: str = "") -> float:
        """Of the functions whose names match."""
        least = SMALL * self.executed
        return sum(f.cycles(core, least) for f in self.functions if re.search(pattern, f.name))

    def loop_cycles(self, core: Core, pattern: str) -> float:
        """The same without what surrounds the loops: only runs that ran at least an eighth as often as the function's
        most frequent one, so that a loop over four units and the end of each group are both in."""
        found = 0.0
        for function in (f for f in self.functions if re.search(pattern, f.name)):
            most = max(r.count for r in function.runs)
            runs = [r for r in function.runs if 8 * r.count >= most]
            found += Function(function.name, runs).cycles(core, SMALL * self.executed)
        return found


def read_profile(counts: Path, program: Path, objdump: str) -> Profile:
    """`counts`: lines "address instructions runs" of blocks; in a block of several each instruction is four bytes."""
    at: dict[int, int] = {}
    for line in counts.read_text().splitlines():
        address, instructions, runs = (int(word, base) for word, base in zip(line.split(), (16, 10, 10), strict=True))
        for i in range(instructions):
            at[address + 4 * i] = at.get(address + 4 * i, 0) + runs
    if not at:
        raise SystemExit(f"error: nothing was counted in {program}")
    functions = []
    for name, lines in _disassembled(program, objdump):
        executed = [(at[address], text) for address, text in lines if address in at]
        if executed:
            functions.append(Function(name, list(_runs(executed))))
    return Profile(functions)


def _runs(executed: list[tuple[int, str]]) -> Iterator[Run]:
    """One for each count: a loop's body is in several places where the compiler moved a branch of it out of line."""
    runs: dict[int, Run] = {}
    for count, text in executed:
        run = runs.setdefault(count, Run(count))
        run.instructions += 1
        if not _BRANCH.match(text):
            run.lines.append(text)
    yield from runs.values()


def _disassembled(program: Path, objdump: str) -> Iterator[tuple[str, list[tuple[int, str]]]]:
    command = [objdump, "-d", "-C", "--no-show-raw-insn", "-j", ".text", str(program)]
    name, lines = "", []
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        if head := _FUNCTION.match(line):
            if lines:
                yield name, lines
            name, lines = head[2], []
        elif found := _INSTRUCTION.match(line):
            text = re.sub(r"\s*(//|#\s|<).*$", "", found[2].replace("\t", " "))
            lines.append((int(found[1], 16), text))
    if lines:
        yield name, lines


def symbol(program: Path, name: str, nm: str) -> int:
    """The address of a function."""
    text = subprocess.run([nm, str(program)], capture_output=True, text=True, check=True).stdout
    return next(int(line.split()[0], 16) for line in text.splitlines() if line.endswith(f" {name}"))
