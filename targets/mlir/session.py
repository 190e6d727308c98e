"""An MLIR artifact with its KV cache, executed in a worker process. The `Session` protocol.

T tokens, V vocabulary, D width, K experts of a token. One session runs one sequence.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moec.compiler.errors import ArtifactError, RunError
from moec.compiler.session import SessionBase
from moec.compiler.target import MoeTrace
from moec.targets.mlir.facts import MlirFacts
from moec.targets.mlir.functional import TAPS
from moec.targets.mlir.toolchain import ended, environment, last_line, worker_command
from moec.targets.mlir.wire import receive, send

_REMEDY = "compile it again with `moec compile`"


class MlirSession(SessionBase):
    """`facts` are the manifest's; `program` is the text (`jit`) or the compiled module (`iree`)."""

    def __init__(
        self,
        program: Path,
        weights: Path,
        *,
        vocab_size: int,
        context: int,
        max_tokens: int,
        moe_layers: int,
        facts: MlirFacts,
    ) -> None:
        super().__init__(str(program.parent), vocab_size=vocab_size, context=context, max_tokens=max_tokens)
        self._moe_layers = moe_layers
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the session)
        self._worker: subprocess.Popen[bytes] | None = subprocess.Popen(
            worker_command("serve"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=environment(),
        )
        try:
            self._ask(_setup(program, weights, facts))
        except BaseException:
            self.close()
            raise

    @property
    def closed(self) -> bool:
        return self._worker is None

    def close(self) -> None:
        """End the worker. Calls after this raise RunError; closing twice is fine."""
        worker, self._worker = self._worker, None
        if worker is None:
            return
        for stream in (worker.stdin, worker.stdout):
            if stream is not None:
                try:
                    stream.close()
                except OSError:
                    continue  # it died with a request half written
        try:
            worker.wait(timeout=5)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
        self._stderr.close()

    def _forward(self, tokens: np.ndarray, start: int, rows: np.ndarray | None, every: bool) -> list[MoeTrace]:
        call = {"start_pos": start, "last": not every, "taps": self._tracing}
        logits_1TV, *taps = self._ask(call, [tokens[None, :]])
        if rows is not None:
            rows[:] = logits_1TV[0]
        return self._traces_of(taps) if self._tracing else []

    def _ask(self, message: dict[str, Any], arrays: Sequence[np.ndarray] = ()) -> list[np.ndarray]:
        worker = self._worker
        assert worker is not None
        assert worker.stdin is not None
        assert worker.stdout is not None
        try:
            send(worker.stdin, message, arrays)
            reply, found = receive(worker.stdout)
        except (EOFError, OSError):
            status = worker.wait()
            self._stderr.seek(0)
            said = last_line(self._stderr.read().decode("utf-8", "replace"))
            self.close()
            raise RunError(f"the compiled program ended: {ended(status)}{said}", place=self._place) from None
        if "fault" in reply:
            self.close()
            raise ArtifactError(f"its program cannot be executed: {reply['fault']}", place=self._place, remedy=_REMEDY)
        return found

    def _traces_of(self, taps: Sequence[np.ndarray]) -> list[MoeTrace]:
        width = len(TAPS)
        if len(taps) != width * self._moe_layers:
            raise ArtifactError(
                f"{len(taps)} traced values for {self._moe_layers} MoE layers", place=self._place, remedy=_REMEDY
            )
        return [
            MoeTrace(layer, x, indices.astype(np.int32), weights, y)
            for layer, (x, indices, weights, y) in enumerate(
                taps[width * n : width * (n + 1)] for n in range(self._moe_layers)
            )
        ]


def _setup(program: Path, weights: Path, facts: MlirFacts) -> dict[str, Any]:
    """The worker's first message."""
    return {
        "engine": facts.engine,
        "program": str(program),
        "entry": facts.entry,
        "weights": str(weights),
        "arguments": [a.tensor for a in facts.arguments if a.kind == "weight"],
        "caches": [(a.dtype, list(a.shape)) for a in facts.arguments if a.kind == "cache"],
    }
