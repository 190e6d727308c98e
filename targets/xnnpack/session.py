"""A loaded `.pte` with its KV cache, through the native runtime (`runner/moec_runtime.h`).

T tokens, V vocabulary, D model width, K experts per token. One session runs one sequence: `position` tokens are in the
cache. Nothing here needs torch.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from moec.compiler.errors import ArtifactError, RunError
from moec.compiler.session import SessionBase
from moec.compiler.target import MoeTrace
from moec.runtime.kernel_api import MAX_THREADS
from moec.runtime.native import runtime_library

_FLOATS = ctypes.POINTER(ctypes.c_float)
_INT32S = ctypes.POINTER(ctypes.c_int32)
_INT64S = ctypes.POINTER(ctypes.c_int64)
_TRACE = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, _FLOATS, _INT32S, _FLOATS, _FLOATS
)


class _Info(ctypes.Structure):
    """moec_model_info."""

    vocab_size: int
    context: int
    max_tokens: int
    bos_id: int
    has_all: int
    file_bytes: int
    arena_bytes: int
    threads: int

    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("vocab_size", "context", "max_tokens", "bos_id", "has_all", "file_bytes", "arena_bytes", "threads")
    ]


@cache
def _runtime() -> ctypes.CDLL:
    library = ctypes.CDLL(str(runtime_library()))
    i64, i32, handle = ctypes.c_int64, ctypes.c_int32, ctypes.c_void_p
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "moec_model_open": (handle, [ctypes.c_char_p, i32]),
        "moec_model_close": (None, [handle]),
        "moec_model_error": (ctypes.c_char_p, [handle]),
        "moec_model_get_info": (i32, [handle, ctypes.POINTER(_Info)]),
        "moec_model_eos_ids": (i64, [handle, _INT64S, i64]),
        "moec_model_forward": (i32, [handle, _INT64S, i64, i64, i32, _FLOATS, i64]),
        "moec_model_trace": (None, [_TRACE, ctypes.c_void_p]),
        "moec_model_set_isa": (i32, [ctypes.c_char_p]),
        "moec_model_isa": (ctypes.c_char_p, []),
        "moec_model_float_activations": (None, [handle, i32]),
        "moec_check_program": (i32, [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t]),
        "moec_has_operator": (i32, [ctypes.c_char_p]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


class CpuSession(SessionBase):
    """The `Session` protocol over a `.pte`. Faults of the caller are RunError, a bad file is ArtifactError."""

    def __init__(self, model: Path, *, threads: int | None = None, float_activations: bool = False) -> None:
        """Open `model`. `threads` None: one per core this process may use, without the slow ones where cores differ.
        The thread pool is the process's: the session opened last decides its size, except that it stays while a session
        is open whose program XNNPACK computes in part; `self.threads` is what there is. `float_activations`: compute in
        fp32 on the same codes, where the program would round activations to INT8; a delegate's linears still round."""
        self._handle: int | None = None
        self._busy = threading.RLock()
        path = Path(model)
        if not path.is_file():
            raise ArtifactError("the file does not exist", place=str(path), remedy="compile the artifact again")
        if threads is not None and not 1 <= threads <= MAX_THREADS:
            raise RunError(f"{threads} threads asked for", remedy=f"give a number from 1 to {MAX_THREADS}")
        runtime = _runtime()
        self._handle = runtime.moec_model_open(os.fsencode(path), threads or 0)
        error = runtime.moec_model_error(self._handle).decode(errors="replace")
        if error:
            self.close()
            if any(words in error for words in ("no address space", "out of memory", "Cannot allocate memory")):
                raise MemoryError(f"{path}: {error}")
            raise ArtifactError(error, place=str(path), remedy="compile the artifact again")
        runtime.moec_model_float_activations(self._handle, int(float_activations))
        info = _Info()
        runtime.moec_model_get_info(self._handle, ctypes.byref(info))
        super().__init__(
            str(path), vocab_size=int(info.vocab_size), context=int(info.context), max_tokens=int(info.max_tokens)
        )
        self.threads = int(info.threads)
        self.bos_id = None if info.bos_id < 0 else int(info.bos_id)
        self.eos_ids = self._eos_ids()
        self._has_all = bool(info.has_all)
        self._callback = _TRACE(self._on_moe)
        self._call: list[MoeTrace] = []  # the layers of the native call that is running
        self._trace_fault: BaseException | None = None

    @property
    def closed(self) -> bool:
        return self._handle is None

    def prefill(self, ids: Sequence[int] | np.ndarray, logits: str = "last") -> np.ndarray:
        """As `SessionBase.prefill`; RunError too for logits="all" of an artifact that gives the last row only."""
        if logits == "all" and not self._has_all:
            what = "the artifact gives the logits of the last token only"
            raise RunError(what, place=self._place, remedy='use logits="last"')
        return super().prefill(ids, logits)

    def trace(self, enabled: bool) -> None:
        """Record every MoE layer of the calls that follow; `take_traces` collects them.

        The kernels have one trace for the process: while one session records, do not run another in a second thread.
        """
        super().trace(enabled)

    def close(self) -> None:
        """Release the model. Calls after this raise RunError; closing twice is fine."""
        with self._busy:  # a call on another thread ends first
            handle, self._handle = self._handle, None
            if handle is not None:
                _runtime().moec_model_close(handle)

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            self.close()

    def _forward(self, tokens: np.ndarray, start: int, rows: np.ndarray | None, every: bool) -> list[MoeTrace]:
        with self._busy:
            if self._handle is None:
                raise RunError("the session was closed during the call", place=self._place)
            self._locked_forward(tokens, start, rows, every)
            return self._call

    def _locked_forward(self, tokens: np.ndarray, start: int, out: np.ndarray | None, every: bool) -> None:
        runtime = _runtime()
        self._call = []
        if self._tracing:
            runtime.moec_model_trace(self._callback, None)
        try:
            status = runtime.moec_model_forward(
                self._handle,
                tokens.ctypes.data_as(_INT64S),
                len(tokens),
                start,
                int(every),
                out.ctypes.data_as(_FLOATS) if out is not None else None,
                out.size if out is not None else 0,
            )
        finally:
            if self._tracing:
                runtime.moec_model_trace(_TRACE(), None)
        fault, self._trace_fault = self._trace_fault, None
        if fault is not None:
            raise fault
        if status:
            raise RunError(runtime.moec_model_error(self._handle).decode(errors="replace"), place=self._place)

    def _on_moe(self, user: Any, t: int, d: int, k: int, x: Any, indices: Any, weights: Any, y: Any) -> None:
        try:
            self._call.append(
                MoeTrace(
                    layer=len(self._call),
                    x_TD=_copied(x, t, d, np.float32),
                    indices_TK=_copied(indices, t, k, np.int32),
                    weights_TK=_copied(weights, t, k, np.float32),
                    y_TD=_copied(y, t, d, np.float32),
                )
            )
        except BaseException as error:  # ctypes would print it and go on
            self._trace_fault = error

    def _eos_ids(self) -> tuple[int, ...]:
        runtime = _runtime()
        count = runtime.moec_model_eos_ids(self._handle, None, 0)
        ids = (ctypes.c_int64 * max(count, 1))()
        runtime.moec_model_eos_ids(self._handle, ids, count)
        return tuple(ids[:count])


def program_fault(file: Path) -> str:
    """Why the runtime would not open `file`, in one line; empty if it would. Nothing is loaded or run."""
    reason = ctypes.create_string_buffer(1024)
    _runtime().moec_check_program(os.fsencode(file), reason, len(reason))
    return reason.value.decode(errors="replace")


def missing_operators(names: Iterable[str]) -> list[str]:
    """Those of `names` ("aten::add.out") that the runtime has no kernel for."""
    return [name for name in names if not _runtime().moec_has_operator(name.encode())]


def set_isa(name: str | None) -> None:
    """Choose the kernels' instruction set for this process; None: the best. RunError if the machine lacks it."""
    if _runtime().moec_model_set_isa(name.encode() if name else None):
        raise RunError(f"this machine cannot run the instruction set {name}")


def isa() -> str:
    """The kernels' instruction set in use."""
    return str(_runtime().moec_model_isa().decode())


def _copied(pointer: Any, rows: int, columns: int, dtype: type) -> np.ndarray:
    if rows == 0 or columns == 0:
        return np.empty((rows, columns), dtype)
    return np.ctypeslib.as_array(pointer, (rows, columns)).copy()
