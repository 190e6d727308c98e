"""Optional dependencies: what is missing, in one line, with the command that installs it.

A target says what it needs beyond the core as a class attribute `needs`; `moec targets` prints it, and code that is
about to import such a module calls `require` first. Checking whether a module is installed does not import it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from moec.compiler.errors import MissingExtra


@dataclass(frozen=True)
class Need:
    """`module` comes with the extra `extra` and is needed to compile for a target or to run its artifacts here.

    when: the option that asks for it, for people; without that option the target does without.
    """

    module: str
    extra: str
    to: Literal["compile", "run"]
    when: str = ""


def installed(module: str) -> bool:
    """Whether `module` could be imported. Its parent packages are imported, itself it is not."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # a parent is missing, or is no package
        return False


def install_command(extra: str) -> str:
    """What a user types to get an extra."""
    return f"pip install 'moec[{extra}]'"


def require(module: str, extra: str, what: str) -> None:
    """MissingExtra when `module` is not installed. what: what needs it, such as `running an ONNX artifact`."""
    if not installed(module):
        raise MissingExtra(f"{what} needs {module}, which is not installed", remedy=f"run: {install_command(extra)}")


def missing(needs: Iterable[Need], to: Literal["compile", "run"]) -> str | None:
    """Why a target cannot be used here, or None. Needs of options do not count."""
    lacking = [n for n in needs if n.to == to and not n.when and not installed(n.module)]
    if not lacking:
        return None
    extras = ",".join(dict.fromkeys(n.extra for n in lacking))
    return f"{', '.join(n.module for n in lacking)} not installed; {install_command(extras)}"
