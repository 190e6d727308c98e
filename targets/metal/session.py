"""A Metal artifact with its KV cache, executed by MLX from the file's own instructions. The `Session` protocol.

T tokens, V vocabulary, D width, K experts of a token. One session runs one sequence.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moec.compiler.errors import ArtifactError, RunError
from moec.compiler.session import SessionBase
from moec.compiler.target import MoeTrace
from moec.targets.metal.facts import MetalFacts, MethodFacts, Tap
from moec.targets.metal.payload import PteFile
from moec.targets.metal.replay import Machine, Store

_TAP_FIELDS = ("x", "indices", "weights", "y")


class MetalSession(SessionBase):
    """`wide`: the float32 twin of an artifact of 16-bit activations (see `replay`)."""

    def __init__(
        self,
        model: Path,
        *,
        vocab_size: int,
        context: int,
        max_tokens: int,
        facts: MetalFacts,
        wide: bool = False,
    ) -> None:
        """`facts` are the manifest's: digests of the payloads and where each MoE layer's values lie."""
        super().__init__(str(model), vocab_size=vocab_size, context=context, max_tokens=max_tokens)
        self._file: PteFile | None = PteFile(model)
        self._methods = facts.methods
        self._store: Store | None = Store(self._file, wide=wide)
        self._machines: dict[str, Machine] = {}
        _check_payloads(self._file, self._methods)
        for name in ("forward", "forward_all"):
            self._file.method(name)  # a damaged method fails now, not in the middle of a conversation

    @property
    def closed(self) -> bool:
        return self._store is None

    def close(self) -> None:
        """Release the model. Calls after this raise RunError; closing twice is fine."""
        self._machines.clear()
        self._store = self._file = None

    def _forward(self, tokens: np.ndarray, start: int, rows: np.ndarray | None, every: bool) -> list[MoeTrace]:
        machine = self._machine("forward_all" if every else "forward")
        seen: list[MoeTrace] = []
        watch = self._watch(machine, seen) if self._tracing else None
        result = machine(tokens[None, :], np.array([start], np.int64), watch=watch)[0]
        if rows is not None:
            rows[:] = np.array(result).reshape(-1, self.vocab_size)
        return seen

    def _machine(self, name: str) -> Machine:
        if self._store is None:
            raise RunError("the session is closed", place=self._place, remedy="load the artifact again")
        if name not in self._machines:
            self._machines[name] = Machine(self._store, name)
        return self._machines[name]

    def _watch(self, machine: Machine, seen: list[MoeTrace]) -> dict[int, Callable[[], None]]:
        def reader(tap: Tap) -> Callable[[], None]:
            def read() -> None:
                values = (np.array(machine.tensor(getattr(tap, f)).astype(_type(machine, f))) for f in _TAP_FIELDS)
                seen.append(MoeTrace(tap.layer, *values))

            return read

        method = self._methods.get(machine.method)
        return {} if method is None else {tap.after: reader(tap) for tap in method.moe_taps}


def _check_payloads(file: PteFile, methods: Mapping[str, MethodFacts]) -> None:
    """The instructions are what the manifest says they are: a flatbuffer has no checksum of its own."""
    for name, payload in file.payloads.items():
        wanted = methods[name].payload_sha256 if name in methods else None
        if wanted is not None and hashlib.sha256(payload).hexdigest() != wanted:
            raise ArtifactError(
                f"method {name} is damaged: its instructions differ from the manifest's digest",
                place=str(file.path),
                remedy="compile it again with `moec compile`",
            )


def _type(machine: Machine, field: str) -> Any:
    return machine.mx.int32 if field == "indices" else machine.mx.float32
