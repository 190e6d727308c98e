"""A Metal artifact with its KV cache, executed by MLX from the file's own instructions. The `Session` protocol.

T tokens, V vocabulary, D width, K experts of a token. One session runs one sequence.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moec.compiler.errors import ArtifactError, RunError
from moec.compiler.session import checked_ids, joined_layer
from moec.compiler.target import MoeTrace
from moec.targets.metal.payload import PteFile
from moec.targets.metal.replay import Machine, Store

_TAP_FIELDS = ("x", "indices", "weights", "y")


class MetalSession:
    """`wide`: the float32 twin of an artifact of 16-bit activations (see `replay`)."""

    def __init__(
        self,
        model: Path,
        *,
        vocab_size: int,
        context: int,
        max_tokens: int,
        details: Mapping[str, Any],
        wide: bool = False,
    ) -> None:
        """`details` are the manifest's: digests of the payloads and where each MoE layer's values lie."""
        self.vocab_size, self.context, self.max_tokens = vocab_size, context, max_tokens
        self.position = 0
        self._path = model
        self._file: PteFile | None = PteFile(model)
        self._methods: dict[str, Any] = dict(details.get("methods", {}))
        self._store: Store | None = Store(self._file, wide=wide)
        self._machines: dict[str, Machine] = {}
        self._tracing = False
        self._traces: list[MoeTrace] = []
        _check_payloads(self._file, self._methods)
        for name in ("forward", "forward_all"):
            self._file.method(name)  # a damaged method is told now, not in the middle of a conversation

    def prefill(self, ids: Sequence[int] | np.ndarray, logits: str = "last") -> np.ndarray:
        """Append tokens. Returns float32 [T, V] for logits="all", [1, V] for "last".

        RunError: no tokens, an id that is not in the vocabulary, or more tokens than the context has room for. Nothing
        has been appended then.
        """
        if logits not in ("all", "last"):
            raise RunError(f'logits="{logits}"', remedy='ask for "all" or "last"')
        tokens = checked_ids(self, ids, closed=self._store is None, place=str(self._path))
        machine = self._machine("forward_all" if logits == "all" else "forward")
        rows: list[np.ndarray] = []
        layers: list[list[MoeTrace]] = []
        for begin in range(0, len(tokens), self.max_tokens):
            chunk = tokens[begin : begin + self.max_tokens]
            seen: list[MoeTrace] = []
            result = machine(
                chunk[None, :],
                np.array([self.position + begin], np.int64),
                watch=self._watch(machine, seen) if self._tracing else None,
            )[0]
            rows.append(np.array(result).reshape(-1, self.vocab_size))
            layers.append(seen)
        self.position += len(tokens)
        self._traces += [joined_layer(parts) for parts in zip(*layers, strict=True)]
        return np.concatenate(rows) if logits == "all" else rows[-1]

    def decode(self, token: int) -> np.ndarray:
        """Append one token; its logits, float32 [V]. RunError as `prefill`."""
        return self.prefill([token])[0]

    def reset(self) -> None:
        """Forget the sequence: attention ends at the current position, so what a cache holds is not seen again."""
        self.position = 0
        self._traces.clear()

    def trace(self, enabled: bool) -> None:
        """Record every MoE layer of the calls that follow; `take_traces` collects them."""
        self._tracing = enabled
        if not enabled:
            self._traces.clear()

    def take_traces(self) -> list[MoeTrace]:
        """The traces since the last call of this, in order of execution."""
        taken, self._traces = self._traces, []
        return taken

    def close(self) -> None:
        """Release the model. Calls after this raise RunError; closing twice is fine."""
        self._machines.clear()
        self._store = self._file = None

    def __enter__(self) -> MetalSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _machine(self, name: str) -> Machine:
        if self._store is None:
            raise RunError("the session is closed", place=str(self._path), remedy="load the artifact again")
        if name not in self._machines:
            self._machines[name] = Machine(self._store, name)
        return self._machines[name]

    def _watch(self, machine: Machine, seen: list[MoeTrace]) -> dict[int, Callable[[], None]]:
        def reader(tap: Mapping[str, int]) -> Callable[[], None]:
            def read() -> None:
                values = (np.array(machine.tensor(tap[f]).astype(_type(machine, f))) for f in _TAP_FIELDS)
                seen.append(MoeTrace(tap["layer"], *values))

            return read

        taps = self._methods.get(machine.method, {}).get("moe_taps", [])
        try:
            return {int(tap["after"]): reader({k: int(tap[k]) for k in ("layer", *_TAP_FIELDS)}) for tap in taps}
        except (KeyError, TypeError, ValueError) as e:
            raise ArtifactError(
                "damaged: details.methods.moe_taps",
                place=str(self._path.parent / "manifest.json"),
                remedy="compile it again with `moec compile`",
            ) from e


def _check_payloads(file: PteFile, methods: Mapping[str, Any]) -> None:
    """The instructions are what the manifest says they are: a flatbuffer has no checksum of its own."""
    for name, payload in file.payloads.items():
        wanted = methods.get(name, {}).get("payload_sha256")
        if wanted is not None and hashlib.sha256(payload).hexdigest() != wanted:
            raise ArtifactError(
                f"method {name} is damaged: its instructions differ from the manifest's digest",
                place=str(file.path),
                remedy="compile it again with `moec compile`",
            )


def _type(machine: Machine, field: str) -> Any:
    return machine.mx.int32 if field == "indices" else machine.mx.float32
