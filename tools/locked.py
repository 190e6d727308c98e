"""The lock: `requirements.lock` has every package's exact version and the SHA-256 of each file that it may come as.

    python tools/locked.py select NAME ...   the lines of these extras of moec and of all that they need, for pip
    python tools/locked.py only NAME ...     the lines of these packages, without what they need; torch+cpu is the wheel
                                             of the locked torch with the local version "cpu"
    python tools/locked.py write             requirements.lock anew, from the versions that this environment holds

What is selected is complete, so that pip is told to resolve nothing (`--no-deps --require-hashes`): a package or a file
that the lock does not name cannot be installed. Needs nothing but Python; `write` runs uv (the extra `lock`).
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
LOCK = ROOT / "requirements.lock"
HEADER = """\
# Every package that moec and its extras need, on Linux and macOS and Python 3.11 to 3.13: exact versions, and the
# SHA-256 of each file that a version may come as. `make setup` installs these and nothing else (tools/locked.py);
# `make lock` writes this file anew, with the versions of the environment that the tests passed in.
"""
BUILD = "setuptools"  # builds moec itself and the few packages that come as source: part of the lock like all others


@dataclass(frozen=True)
class Locked:
    """One package of the lock. `lines` are for pip; `needed_by` names the packages that require it."""

    name: str
    version: str
    lines: tuple[str, ...]
    needed_by: frozenset[str]


def plain(name: str) -> str:
    """A package's name as the packaging standard compares them."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read(text: str) -> dict[str, Locked]:
    """The packages of a lock by plain name. ValueError for a line that is none of what `write` writes."""
    found: dict[str, Locked] = {}
    block: list[str] = []
    for line in text.splitlines():
        if line.startswith("#") or not line:
            continue
        if not line.startswith("    # via "):
            block.append(line)
            continue
        head = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.!]+)( ; [^\\]+)? \\", block[0]) if block else None
        if head is None or not all(re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}( \\)?", x) for x in block[1:]):
            raise ValueError(f"the lock is damaged at {block[:1]}")
        parents = frozenset(plain(p.strip()) for p in line.removeprefix("    # via ").split(","))
        found[plain(head[1])] = Locked(plain(head[1]), head[2], tuple(block), parents)
        block = []
    if block:
        raise ValueError(f"the lock is damaged at {block[0]}")
    return found


def required(project: Mapping[str, Any], extras: Sequence[str]) -> set[str]:
    """Plain names of what pyproject.toml asks for: the dependencies and those of `extras`. KeyError: no such extra."""
    optional = project["optional-dependencies"]
    if unknown := [extra for extra in extras if extra not in optional]:
        raise KeyError(f"pyproject.toml has no extra {', '.join(unknown)}")
    wanted = [*project["dependencies"], *(line for extra in extras for line in optional[extra])]
    return {plain(re.split(r"[\[<>=!;~ ]", line)[0]) for line in wanted}


def one(lock: Mapping[str, Locked], name: str) -> Locked:
    """The package NAME, or of NAME+LOCAL the files of that local version. KeyError if it is not locked."""
    name, _, local = name.partition("+")
    if plain(name) not in lock:
        raise KeyError(f"not in requirements.lock: {name}; run `make lock`")
    package = lock[plain(name)]
    if not local:
        return package
    version = f"{package.version}+{local}"
    head = package.lines[0].replace(f"=={package.version}", f"=={version}", 1)
    return replace(package, version=version, lines=(head, *package.lines[1:]))


def selected(
    lock: Mapping[str, Locked], roots: Iterable[str], unneeded: Iterable[tuple[str, str]] = ()
) -> list[Locked]:
    """`roots` and everything that they need, in the lock's order. KeyError for a root that is not locked.

    unneeded: pairs (package, what it does not need here after all).
    """
    reached, dropped = set(roots), set(unneeded)
    if missing := reached - set(lock):
        raise KeyError(f"not in requirements.lock: {', '.join(sorted(missing))}; run `make lock`")
    while True:
        needed = {p.name for p in lock.values() if any((n, p.name) not in dropped for n in p.needed_by & reached)}
        if needed <= reached:
            return [p for p in lock.values() if p.name in reached]
        reached |= needed


def unneeded_by_torch(lock: Mapping[str, Locked]) -> set[tuple[str, str]]:
    """("torch", NAME) for what the installed torch does not require: wheels for the CPU need no CUDA libraries."""
    try:
        lines = metadata.requires("torch") or []
    except metadata.PackageNotFoundError:
        return set()
    needs = {plain(re.split(r"[\[<>=!;~ (]", line)[0]) for line in lines if "extra ==" not in line}
    return {("torch", p.name) for p in lock.values() if "torch" in p.needed_by and p.name not in needs}


def write(project: Mapping[str, Any], also: Mapping[str, list[str]]) -> str:
    """The lock's text: versions of this environment, else of the old lock; uv adds what they need, and the digests.

    also: digests of more files by `NAME==VERSION`. ValueError if a version is no longer the one that is locked.
    """
    old = {p.name: p.version for p in read(LOCK.read_text("utf-8")).values()} if LOCK.exists() else {}
    here = {plain(d.metadata["Name"]): d.version.split("+")[0] for d in metadata.distributions()}
    here.pop(plain(project["name"]), None)
    with tempfile.TemporaryDirectory() as folder:
        pins, out = Path(folder) / "pins.txt", Path(folder) / "lock.txt"
        pins.write_text("".join(f"{name}=={version}\n" for name, version in {**old, **here}.items()))
        options = ["--all-extras", "--universal", "--python-version", "3.11", "--generate-hashes", "--no-header"]
        command = ["pip", "compile", str(ROOT / "pyproject.toml"), "-", *options, "--annotation-style", "line"]
        command += ["--no-emit-index-url", "--no-emit-find-links", "--quiet", "-c", str(pins), "-o", str(out)]
        uv = Path(sys.executable).parent / "uv"
        subprocess.run([uv, *command], input=f"{BUILD}\n", text=True, check=True, cwd=ROOT)
        text = out.read_text("utf-8")
    lines = []
    for line in text.splitlines():
        if line.startswith("    # via "):
            parents = [p for p in line.removeprefix("    # via ").split(", ") if not p.startswith("-")]
            line = "    # via " + ", ".join(parents or ["moec (tools/locked.py)"])
        lines.append(line)
        if (version := line.split(" ")[0]) in also:
            lines += [f"    --hash=sha256:{digest} \\" for digest in also[version]]
    if stale := set(also) - {line.split(" ")[0] for line in lines}:
        raise ValueError(f"pyproject.toml: [tool.moec.lock] names {', '.join(stale)}, which is not what is locked")
    return HEADER + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("select", "only", "write"))
    parser.add_argument("names", nargs="*")
    given = parser.parse_args()
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    try:
        if given.what == "write":
            LOCK.write_text(write(settings["project"], settings["tool"]["moec"]["lock"]), "utf-8")
            return
        lock = read(LOCK.read_text("utf-8"))
        if given.what == "only":
            chosen = [one(lock, name) for name in given.names]
        else:
            extras = [extra for names in given.names for extra in names.split(",")]
            roots = required(settings["project"], extras) | {BUILD}
            chosen = selected(lock, roots, unneeded_by_torch(lock))
    except (KeyError, ValueError) as error:
        sys.exit(f"tools/locked.py: {error.args[0]}")
    for package in chosen:
        print("\n".join(package.lines))


if __name__ == "__main__":
    main()
