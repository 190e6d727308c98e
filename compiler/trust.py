"""Code that comes with a model runs only if the user said so: `--trust`, or `trust=True` in Python.

Everything moec reads is data, except a python module (`model: {python: ...}`), a `.pt2` (whose reader unpickles), the
program of an MLIR artifact and the functions of an lm-eval task. Before each of these runs, `require_trust` is called;
nothing is trusted by default. See docs/security.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from moec.compiler.errors import TrustError

_trusted: ContextVar[bool] = ContextVar("moec_trust", default=False)


def trust() -> None:
    """Trust code for the rest of this context: what `--trust` does for one command."""
    _trusted.set(True)


@contextmanager
def trusting(allowed: bool = True) -> Iterator[None]:
    """Trust code inside the block. With `allowed` False nothing changes: what is trusted around it stays so."""
    token = _trusted.set(allowed or _trusted.get())
    try:
        yield
    finally:
        _trusted.reset(token)


def require_trust(what: str, *, place: str) -> None:
    """TrustError unless the user trusts code. `what` says what would run, as in "importing it runs its code"."""
    if not _trusted.get():
        remedy = "if you trust whoever made it, say so with --trust (trust=True in Python)"
        raise TrustError(what, place=place, remedy=remedy)
