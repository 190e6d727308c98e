"""What the runtime and the runner refuse: the error's class, and a remedy that helps."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

import pytest

from moec.compiler.errors import ArtifactError, LostFileError, NoRoomError, RunError, SessionFileError
from moec.targets.xnnpack.refusals import (
    call_error,
    opening_error,
    reason_in,
    remedy_for,
    runner_error,
    session_file_error,
)
from moec.targets.xnnpack.session import CpuSession

MODEL = Path("a/model.pte")
LEAVE_OUT = "run it without --memory-mb, or compile it without memory_mb if the artifact brings it"


@pytest.mark.parametrize(
    ("reason", "kind", "remedy"),
    [
        (
            "a memory budget needs routed experts, and the model has none that can be read one by one",
            RunError,
            LEAVE_OUT,
        ),
        ("cache-aware selection needs a memory budget", RunError, "add --memory-mb N"),
        ("a memory budget of 1 MB is less than 20 MB: 18 for all but", RunError, "give a larger --memory-mb"),
        (
            "the memory budget of 20 MB has no room for the caches of another session, 4 MB",
            NoRoomError,
            "give a larger --memory-mb",
        ),
        ("this system does not report how much memory a process uses", RunError, "run it without a memory budget"),
        (
            "the system does not allow 2 threads that read experts",
            RunError,
            "allow the process more threads, or run it without a memory budget",
        ),
        ("the system does not allow 64 threads", RunError, "give fewer --threads"),
        (os.strerror(errno.EMFILE), RunError, "let the process open more files, or close some"),
        (os.strerror(errno.EACCES), RunError, "let this user read the file"),
        ("damaged: a layer selects more experts than it has", ArtifactError, "compile the artifact again"),
        ("not an ExecuTorch program", ArtifactError, "compile the artifact again"),
    ],
)
def test_a_model_that_is_not_opened(reason: str, kind: type[Exception], remedy: str) -> None:
    error = opening_error(reason, MODEL)
    assert type(error) is kind
    assert str(error) == f"{MODEL}: {reason}; {remedy}"


@pytest.mark.parametrize("reason", ["no address space to map the file", "out of memory", os.strerror(errno.ENOMEM)])
def test_what_is_out_of_memory(reason: str) -> None:
    assert isinstance(opening_error(reason, MODEL), MemoryError)


@pytest.mark.parametrize(
    ("reason", "kind", "remedy"),
    [
        (
            "the memory budget leaves no room for experts beside the activations of so many tokens at once",
            NoRoomError,
            "give a larger --memory-mb, or fewer tokens at once",
        ),
        ("truncated while it is in use", LostFileError, "load the artifact again when its file is whole"),
        (
            "an expert cannot be read: Input/output error",
            LostFileError,
            "load the artifact again when its file is whole",
        ),
        ("position 3: the session holds 2 tokens", RunError, None),
    ],
)
def test_a_call_that_fails(reason: str, kind: type[Exception], remedy: str | None) -> None:
    error = call_error(reason, "a")
    assert type(error) is kind
    assert error.remedy == remedy


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("the memory budget has no room for the file's caches beside those of the session", NoRoomError),
        (f"cannot be read: {os.strerror(errno.EMFILE)}", RunError),
        ("no address space for the caches", RunError),
        (f"cannot be written: {os.strerror(errno.ENOSPC)}", RunError),
        ("exists and is not a session that moec saved", RunError),
        ("damaged: its contents differ from its digest", SessionFileError),
        ("truncated while it was read", SessionFileError),
        ("was saved with another artifact", SessionFileError),
    ],
)
def test_a_saved_session(reason: str, kind: type[Exception]) -> None:
    """Only what is wrong with the file itself is a fault of it, for which it may be removed."""
    assert type(session_file_error(reason, MODEL)) is kind


def test_the_reason_in_what_a_process_wrote() -> None:
    """A fault of the arguments has their list behind it; adb writes of its server before it."""
    usage = "error: unknown argument --eviction\nusage: moec_runner MODEL [options]\n  --help\n"
    assert reason_in(usage) == "unknown argument --eviction"
    assert reason_in("* daemon not running\nerror: no devices/emulators found\n") == "no devices/emulators found"
    assert reason_in("adb: not permitted\n") == "adb: not permitted"
    assert reason_in("") == ""
    assert runner_error(3, "").message == "the runner ended with status 3"
    assert runner_error(2, usage).remedy == "ask for fewer tokens, or compile the artifact again if its file is damaged"
    assert remedy_for("unknown argument --eviction") is None


def test_a_file_that_cannot_be_opened_is_not_damaged(tmp_path: Path) -> None:
    model = tmp_path / "model.pte"
    model.write_bytes(b"never read")
    with pytest.raises(ArtifactError, match="not an ExecuTorch program; compile the artifact again"):
        CpuSession(model, threads=1)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with model.open() as file:
        least = file.fileno()
    resource.setrlimit(resource.RLIMIT_NOFILE, (least, before[1]))
    try:
        with pytest.raises(RunError, match=f"{os.strerror(errno.EMFILE)}; let the process open more files"):
            CpuSession(model, threads=1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
