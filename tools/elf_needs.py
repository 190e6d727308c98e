"""What ELF files need of the system they run on, and the tag of a wheel that this allows.

    python tools/elf_needs.py FILE ...    the needs of these files together, and the tag

A tag manylinux_2_N says: runs wherever glibc is 2.N or newer. What else such a system has, above all which libstdc++,
is in `SYSTEMS`: the versions that auditwheel's policies give for them. Read with readelf of binutils, which every
compiler for Linux comes with.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

Version = tuple[int, ...]

#: minor version of glibc -> the newest versions of symbols that a system with it has. The oldest first; none older than
#: what the wheels of torch and executorch need.
SYSTEMS: dict[int, dict[str, Version]] = {
    28: {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)},
    31: {"GLIBC": (2, 31), "GLIBCXX": (3, 4, 28), "CXXABI": (1, 3, 12), "GCC": (7, 0, 0)},
    34: {"GLIBC": (2, 34), "GLIBCXX": (3, 4, 29), "CXXABI": (1, 3, 13), "GCC": (7, 0, 0)},
    35: {"GLIBC": (2, 35), "GLIBCXX": (3, 4, 30), "CXXABI": (1, 3, 13), "GCC": (7, 0, 0)},
    39: {"GLIBC": (2, 39), "GLIBCXX": (3, 4, 33), "CXXABI": (1, 3, 15), "GCC": (14, 0, 0)},
}
MACHINES = {"Advanced Micro Devices X86-64": "x86_64", "AArch64": "aarch64"}
#: what every such system has, and what is installed with moec or is part of it
LIBRARIES = re.compile(
    r"lib(c|m|gcc_s|stdc\+\+|pthread)\.so\.\d|ld-linux-(x86-64\.so\.2|aarch64\.so\.1)|lib(executorch|moec)_?\w*\.so"
)


class NotPortable(Exception):
    """A file that no tag fits; says which and why."""


@dataclass(frozen=True)
class Needs:
    """Of one file. `versions`: (family, version) of every versioned symbol; `symbols`: which symbols ask for which."""

    file: str
    machine: str
    libraries: frozenset[str]
    search: tuple[str, ...]
    versions: frozenset[tuple[str, Version]]
    symbols: frozenset[tuple[str, str, Version]]

    def newest(self, family: str) -> Version:
        return max((version for name, version in self.versions if name == family), default=())


def dotted(text: str) -> Version:
    return tuple(int(part) for part in text.split("."))


def read(path: Path) -> Needs:
    """Raises NotPortable for what is no ELF file of a known machine."""
    command = ["readelf", "--wide", "--file-header", "--dynamic", "--version-info", "--dyn-syms", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C"})
    machine = re.search(r"^  Machine:\s+(.+)$", done.stdout, re.M)
    if done.returncode or machine is None or machine[1] not in MACHINES:
        raise NotPortable(f"{path.name}: no ELF file for {' or '.join(MACHINES.values())}")
    text = done.stdout
    versions = re.findall(r"^  0x\w+:\s+Name: ([A-Z]+)_([\d.]+)\s+Flags:", text, re.M)
    symbols = re.findall(r" UND (\S+?)@([A-Z]+)_([\d.]+) \(\d+\)$", text, re.M)
    search = re.findall(r"\((?:RUNPATH|RPATH)\)\s+Library r\w+: \[(.*)\]", text)
    return Needs(
        file=path.name,
        machine=MACHINES[machine[1]],
        libraries=frozenset(re.findall(r"\(NEEDED\)\s+Shared library: \[(.*)\]", text)),
        search=tuple(folder for found in search for folder in found.split(":")),
        versions=frozenset((family, dotted(number)) for family, number in versions),
        symbols=frozenset((symbol, family, dotted(number)) for symbol, family, number in symbols),
    )


def fits(needs: Needs, system: int) -> bool:
    """Whether a system with glibc 2.`system` has all the symbols. A family that no system lists fits none."""
    return all(version <= SYSTEMS[system].get(family, ()) for family, version in needs.versions)


def tag(files: Iterable[Needs]) -> str:
    """The oldest platform tag that is true of all files together. NotPortable if there is none."""
    listed = list(files)
    if len({needs.machine for needs in listed}) != 1:
        raise NotPortable(f"not of one machine: {', '.join(f'{n.file} ({n.machine})' for n in listed)}")
    for needs in listed:
        if strange := sorted(name for name in needs.libraries if not LIBRARIES.fullmatch(name)):
            raise NotPortable(f"{needs.file}: needs {', '.join(strange)}, which not every system has")
        if fixed := [folder for folder in needs.search if not folder.startswith("$ORIGIN")]:
            raise NotPortable(f"{needs.file}: looks for libraries in {', '.join(fixed)}, which is of this machine")
    for system in SYSTEMS:
        if all(fits(needs, system) for needs in listed):
            return f"manylinux_2_{system}_{listed[0].machine}"
    raise NotPortable(f"newer than any system listed: {'; '.join(newer(listed, max(SYSTEMS)))}")


def newer(files: Iterable[Needs], system: int) -> list[str]:
    """The symbols that a system with glibc 2.`system` has not, as `file: symbol@version`."""
    lines = [
        f"{needs.file}: {symbol}@{family}_{'.'.join(map(str, version))}"
        for needs in files
        for symbol, family, version in needs.symbols
        if version > SYSTEMS[system].get(family, ())
    ]
    return sorted(lines)


def floor(files: Sequence[Needs]) -> str:
    """The newest version of each family that the files need, in words."""
    families = sorted({family for needs in files for family, _ in needs.versions})
    found = ((family, max(needs.newest(family) for needs in files)) for family in families)
    return ", ".join(f"{family} {'.'.join(map(str, version))}" for family, version in found)


def main() -> int:
    try:
        files = [read(Path(name)) for name in sys.argv[1:]]
        print(f"{floor(files)}\n{tag(files)}")
    except NotPortable as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
