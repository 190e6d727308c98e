"""A process that runs native compilers and compiled code for a session: whatever they do, the session's own survives.

    python -m moec.targets.mlir.worker lower torch|linalg IN OUT     texts from text; a fault is one JSON line on stdout
    python -m moec.targets.mlir.worker serve                         messages (see `wire`) on stdin and stdout

The first message of `serve` names the program, its engine and its arguments; each later one is a call.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from moec.targets.mlir import pipelines
from moec.targets.mlir.wire import receive, send


def lower(kind: str, source: Path, out: Path) -> int:
    """The torch text (`torch`) of a raw text, or the linalg text (`linalg`) of a torch text."""
    try:
        module = pipelines.parse(source.read_text("utf-8"))
        passes = pipelines.TO_TORCH if kind == "torch" else pipelines.TO_LINALG
        pipelines.run(module, (passes,), f"lowering to {kind}")
    except pipelines.LoweringFault as fault:
        print(json.dumps({"operator": fault.operator, "what": fault.what}))
        return 1
    out.write_text(str(module), "utf-8")
    return 0


class Weights:
    """The tensors of a safetensors file, mapped: bytes are read when touched."""

    def __init__(self, file: Path) -> None:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            self._header: dict[str, Any] = json.loads(stream.read(length))
            self._begin = 8 + length
            self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self._header[name]
        begin, end = entry["data_offsets"]
        # a byte of codes is a signless i8 in the text
        dtype = {"F32": "float32", "F16": "float16", "U8": "int8", "I8": "int8", "I32": "int32", "I64": "int64",
                 "F64": "float64", "BOOL": "bool"}[entry["dtype"]]  # fmt: skip
        raw = np.frombuffer(self._map, np.uint8, end - begin, self._begin + begin)
        return raw.view(dtype).reshape(entry["shape"])


class Server:
    """One loaded program with the caches of one sequence."""

    def __init__(self, setup: dict[str, Any]) -> None:
        weights = Weights(Path(setup["weights"]))
        arguments = [weights[name] for name in setup["arguments"]]
        self._kinds = [(np.dtype(dtype), tuple(shape)) for dtype, shape in setup["caches"]]
        self._caches: list[np.ndarray] = []
        self._engine: Any
        if setup["engine"] == "jit":
            from moec.targets.mlir.jit import Compiled

            compiled = Compiled(Path(setup["program"]).read_text("utf-8"), setup["entry"])
            self._call = lambda rest: compiled([*arguments, *rest])
        else:
            from moec.targets.mlir.iree import Loaded

            loaded = Loaded(Path(setup["program"]), setup["entry"], arguments)
            self._call = loaded

    def call(self, message: dict[str, Any], tokens_1T: np.ndarray) -> list[np.ndarray]:
        start = np.array([message["start_pos"]], np.int64)
        if not message["start_pos"]:  # a new sequence
            self._caches = [np.zeros(shape, dtype) for dtype, shape in self._kinds]
        logits, *rest = self._call([*self._caches, tokens_1T, start])
        count = len(self._caches)
        self._caches = [np.asarray(c) for c in rest[:count]]
        return [logits[:, -1:] if message["last"] else logits, *(rest[count:] if message["taps"] else [])]


def serve(requests: BinaryIO, replies: BinaryIO) -> int:
    try:
        setup, _ = receive(requests)
        server = Server(setup)
        send(replies, {"ready": True})
        while True:
            message, arrays = receive(requests)
            send(replies, {}, server.call(message, arrays[0]))
    except pipelines.LoweringFault as fault:
        send(replies, {"fault": str(fault), "operator": fault.operator})
        return 1
    except (EOFError, BrokenPipeError):
        return 0  # the session is closed


def main(arguments: list[str]) -> int:
    if arguments[0] == "lower":
        return lower(arguments[1], Path(arguments[2]), Path(arguments[3]))
    # native code that prints must not be taken for a reply
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return serve(sys.stdin.buffer, replies)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
