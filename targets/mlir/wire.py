"""Messages between a session and its worker process: a JSON line, then the bytes of the arrays it announces.

    {"arrays": [["float32", [1, 7, 211]], ...], ...}\\n  raw bytes of each array, one after the other

Nothing but the standard library and numpy: a worker starts in a tenth of a second.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import IO, Any

import numpy as np


def send(stream: IO[bytes], message: dict[str, Any], arrays: Sequence[np.ndarray] = ()) -> None:
    """Write one message; OSError when the other side is gone."""
    header = {**message, "arrays": [[a.dtype.name, list(a.shape)] for a in arrays]}
    stream.write(json.dumps(header).encode() + b"\n")
    for array in arrays:
        stream.write(np.ascontiguousarray(array).tobytes())
    stream.flush()


def receive(stream: IO[bytes]) -> tuple[dict[str, Any], list[np.ndarray]]:
    """The next message; EOFError when the other side is gone or speaks something else."""
    line = stream.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    try:
        message = json.loads(line)
        kinds = [(np.dtype(name), tuple(shape)) for name, shape in message.pop("arrays")]
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise EOFError(f"not a message: {line[:80]!r}") from e
    arrays = []
    for dtype, shape in kinds:
        size = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        data = stream.read(size)
        if len(data) != size:
            raise EOFError
        arrays.append(np.frombuffer(data, dtype).reshape(shape))
    return message, arrays
