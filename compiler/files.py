"""Reading files from outside: regular files only, no device or pipe, and never more than a limit."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from moec.compiler.errors import UserError


def open_regular(file: Path, *, fault: type[UserError] = UserError, remedy: str | None = None) -> BinaryIO:
    """A regular file, opened for reading; `fault` with the place if it is missing, unreadable, or anything else.

    A pipe that nobody writes does not block.
    """
    try:
        # without O_NONBLOCK opening a pipe waits for its writer; a regular file does not know the flag
        handle = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise fault(f"cannot be read: {error.strerror}", place=str(file), remedy=remedy) from None
    except ValueError:
        raise fault("cannot be read: a null byte in its name", place=str(file), remedy=remedy) from None
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        found = "is a folder, not a file" if stat.S_ISDIR(mode) else "is not a regular file"
        raise fault(found, place=str(file), remedy=remedy)
    return open(handle, "rb")


def read_bytes(file: Path, *, limit: int, fault: type[UserError] = UserError, remedy: str | None = None) -> bytes:
    """The bytes of a regular file of at most `limit` bytes; `fault` as `open_regular`, and for a longer one.

    A file that grows meanwhile is not followed.
    """
    with open_regular(file, fault=fault, remedy=remedy) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > limit:
            raise fault(f"is {size} bytes long; at most {limit} are read", place=str(file), remedy=remedy)
        data = stream.read(limit + 1)
    if len(data) > limit:  # /proc and the like say 0 and give more
        raise fault(f"is longer than {limit} bytes", place=str(file), remedy=remedy)
    return data


def read_text(file: Path, *, limit: int, fault: type[UserError] = UserError, remedy: str | None = None) -> str:
    """`read_bytes` as UTF-8; `fault` where it is none."""
    try:
        return read_bytes(file, limit=limit, fault=fault, remedy=remedy).decode("utf-8")
    except UnicodeDecodeError as error:
        raise fault(f"not UTF-8 text: byte {error.start}", place=str(file), remedy=remedy) from None
