"""Errors of what the native runtime or the runner refuses, told apart by the words of their reasons (runtime/)."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from moec.compiler.errors import ArtifactError, LostFileError, NoRoomError, RunError, SessionFileError

# words of a reason, and what then helps; the first that fits
_REMEDIES = (
    ("memory budget needs", "run it without --memory-mb, or compile it without memory_mb if the artifact brings it"),
    ("needs a memory budget", "add --memory-mb N"),
    ("--cache-aware needs", "add --memory-mb N"),
    ("does not report how much memory", "run it without a memory budget"),
    ("so many tokens at once", "give a larger --memory-mb, or fewer tokens at once"),
    ("memory budget", "give a larger --memory-mb"),
    ("threads that read experts", "allow the process more threads, or run it without a memory budget"),
    ("the system does not allow", "give fewer --threads"),
)
_NO_ROOM = ("has no room", "leaves no room")
_OUT_OF_MEMORY = ("no address space", "out of memory", os.strerror(errno.ENOMEM))
# what became of a file that is in use, and what helps
_LOST = {
    "truncated while it is in use": "load the artifact again when its file is whole",
    "an expert cannot be read": "load the artifact again when its file is whole",
    "was restored from was changed": "prefill its tokens again",
}
# reasons of the system for which a file cannot be opened or read, and what helps
_SYSTEM = {
    os.strerror(errno.EACCES): "let this user read the file",
    os.strerror(errno.EPERM): "let this user read the file",
    os.strerror(errno.EMFILE): "let the process open more files, or close some",
    os.strerror(errno.ENFILE): "close files that other processes have open",
    os.strerror(errno.EIO): "see that the disk can be read",
}


def remedy_for(reason: str) -> str | None:
    """What a user can do about a refusal that is no fault of the artifact; None for any other."""
    known = next((remedy for words, remedy in _REMEDIES if words in reason), None)
    return known or next((remedy for system, remedy in _SYSTEM.items() if reason.endswith(system)), None)


def opening_error(reason: str, model: Path) -> Exception:
    """Of a model that was not opened, a budget that was not set, or a session that was not opened or forked."""
    if lost := _lost(reason, str(model)):
        return lost
    if any(words in reason for words in _OUT_OF_MEMORY):
        return MemoryError(f"{model}: {reason}")
    remedy = remedy_for(reason)
    if remedy is None:
        return ArtifactError(reason, place=str(model), remedy="compile the artifact again")
    return _kind(reason)(reason, place=str(model), remedy=remedy)


def call_error(reason: str, place: str) -> RunError:
    """Of a call of an open session."""
    if lost := _lost(reason, place):
        return lost
    return _kind(reason)(reason, place=place, remedy=remedy_for(reason))


def session_file_error(reason: str, file: Path) -> RunError:
    """Of saving or restoring a session."""
    if lost := _lost(reason, str(file)):
        return lost
    if "exists and" in reason or "cannot be written" in reason:
        return RunError(reason, place=str(file), remedy="name another file")
    if any(words in reason for words in _NO_ROOM):  # the reason says what helps
        return NoRoomError(reason, place=str(file))
    ours = any(words in reason for words in _OUT_OF_MEMORY) or remedy_for(reason) is not None
    return (RunError if ours else SessionFileError)(reason, place=str(file), remedy="prefill its tokens again")


def runner_error(status: int, err: str) -> RunError:
    """Of the runner's process, from its exit status and what it wrote to stderr."""
    reason = reason_in(err) or f"the runner ended with status {status}"
    other = "ask for fewer tokens, or compile the artifact again if its file is damaged"
    return _kind(reason)(reason, remedy=remedy_for(reason) or other)


def reason_in(text: str) -> str:
    """The reason in what the runner or adb wrote: its first line that begins with "error: ", else the last."""
    lines = text.strip().splitlines() or [""]
    return next((line for line in lines if line.startswith("error: ")), lines[-1]).removeprefix("error: ")


def _lost(reason: str, place: str) -> LostFileError | None:
    """Of a file that was cut, changed or cannot be read any more while it is in use; None for another reason."""
    remedy = next((remedy for words, remedy in _LOST.items() if words in reason), None)
    return None if remedy is None else LostFileError(reason, place=place, remedy=remedy)


def _kind(reason: str) -> type[RunError]:
    return NoRoomError if any(words in reason for words in _NO_ROOM) else RunError
