"""The instruction sets that our CPU kernels are written for, as `runtime/kernels/instruction_sets.cmake` lists them.

CMake compiles from that file; device files, the probe and the tests read it through this module, so that each set is
listed only once.
"""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

_FILE = Path(__file__).resolve().parent.parent / "runtime" / "kernels" / "instruction_sets.cmake"
_CALL = re.compile(r"^moec_instruction_set\(([^)]*)\)", re.MULTILINE)
_KEYS = ("PROCESSOR", "NEEDS", "ATTENTION", "FLAGS")
_PROCESSORS = {"amd64": "x86_64", "arm64": "aarch64"}  # other systems' names


@dataclass(frozen=True)
class InstructionSet:
    """One line of the list. `processor`: x86_64, aarch64 or any; `flags`: the C++ compiler's."""

    name: str
    processor: str
    flags: tuple[str, ...]


@lru_cache(maxsize=1)
def instruction_sets() -> tuple[InstructionSet, ...]:
    """All of them, better ones first: the first that a machine supports is the best for it."""
    found = []
    for name, *words in (call.split() for call in _CALL.findall(_FILE.read_text("utf-8"))):
        given: dict[str, list[str]] = {}
        for word in words:
            if word in _KEYS:
                key = word
                given[key] = []
            else:
                given[key].append(word)
        found.append(InstructionSet(name, given["PROCESSOR"][0], tuple(given.get("FLAGS", ()))))
    return tuple(found)


def compiled_here() -> tuple[str, ...]:
    """Names of the sets that a build on this processor contains, whether it can run them or not."""
    machine = platform.machine().lower()
    machine = _PROCESSORS.get(machine, machine)
    return tuple(s.name for s in instruction_sets() if s.processor in (machine, "any"))
