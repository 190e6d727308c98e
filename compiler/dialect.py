"""What is legal at each stage, as data, checked after every pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moec.compiler.program import Program


def check_dialect(program: Program, *, after: str) -> None:
    """Raise CompileError naming the first node that is illegal at the program's stage."""
