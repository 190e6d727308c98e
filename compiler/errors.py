"""Errors that the user can correct. Every other exception is a bug of moec and keeps its traceback.

A `UserError` has a place (file, tensor, key), what is wrong with it, and a remedy; the command line prints it as one
line and exits with status 2.
"""

from __future__ import annotations


class UserError(Exception):
    """A fault in the input, with its place and remedy. `str()` is one line (or one line per fault for `SpecError`)."""

    def __init__(self, message: str, *, place: str | None = None, remedy: str | None = None) -> None:
        self.message = message
        self.place = place
        self.remedy = remedy
        super().__init__(self.line())

    def line(self) -> str:
        text = f"{self.place}: {self.message}" if self.place else self.message
        return f"{text}; {self.remedy}" if self.remedy else text


class SpecError(UserError):
    """The YAML spec is wrong: all faults at once, one `file:line:column: path: message` line each."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, or contradicts the spec."""


class CompileError(UserError):
    """A model cannot be compiled as asked: an unmatched block, an illegal router, a scheme the target cannot hold."""


class ArtifactError(UserError):
    """An artifact folder is missing, damaged or of another version."""


class RunError(UserError):
    """A request that an artifact cannot serve: a token out of range, a prompt longer than the context."""


class LostFileError(RunError):
    """An artifact's file was cut, or cannot be read any more, while it is in use: no fault of the request."""


class NoRoomError(RunError):
    """A memory budget has no room for what was asked: no fault of a file or of the request."""


class SessionFileError(RunError):
    """A file is no saved session that can be restored: damaged, of another artifact or version, or something else."""


class MissingExtra(UserError):
    """An optional dependency is not installed; the remedy names the extra."""


class TrustError(UserError):
    """Something would run code that came from outside, and the user did not say that it is trusted."""
