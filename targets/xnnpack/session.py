"""A loaded `.pte` with its KV cache, through the native runtime (`runner/moec_runtime.h`).

T tokens, V vocabulary, D model width, K experts per token. One session runs one sequence: `position` tokens are in the
cache. Nothing here needs torch.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from moec.compiler.artifact import file_digest
from moec.compiler.errors import ArtifactError, RunError
from moec.compiler.session import SessionBase
from moec.compiler.target import MoeTrace
from moec.runtime.native import MAX_THREADS, runtime_library
from moec.targets.xnnpack.memory import (
    EVICTIONS,
    MAX_MEMORY_MB,
    ExpertCacheOptions,
    ExpertStats,
    LayerExpertStats,
)
from moec.targets.xnnpack.refusals import call_error, opening_error, session_file_error

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
    rewinds: int
    exact: int

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            *("vocab_size", "context", "max_tokens", "bos_id", "has_all", "file_bytes", "arena_bytes", "threads"),
            *("rewinds", "exact"),
        )
    ]


class _ExpertStats(ctypes.Structure):
    """moec_expert_stats of moec_runtime.h."""

    budget: int
    _fields_: ClassVar = [(f.name, ctypes.c_int64) for f in fields(ExpertStats)]


class _LayerExpertStats(ctypes.Structure):
    """moec_expert_layer_stats of moec_runtime.h."""

    _fields_: ClassVar = [(f.name, ctypes.c_int64) for f in fields(LayerExpertStats)]


class _Calls(threading.local):
    """Of one thread: how many native calls run, and native sessions that are to be closed when they have ended."""

    def __init__(self) -> None:
        self.running = 0
        self.closing: list[int] = []


_calls = _Calls()


@cache
def _runtime() -> ctypes.CDLL:
    library = ctypes.CDLL(str(runtime_library()))
    i64, i32, handle = ctypes.c_int64, ctypes.c_int32, ctypes.c_void_p
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "moec_model_open": (handle, [ctypes.c_char_p, i32]),
        "moec_model_close": (None, [handle]),
        "moec_model_error": (ctypes.c_char_p, [handle]),
        "moec_model_get_info": (i32, [handle, ctypes.POINTER(_Info)]),
        "moec_model_limit_memory": (i32, [handle, i64, i32, i32]),
        "moec_model_read_nothing_ahead": (i32, [handle]),
        "moec_model_prefer_resident": (i32, [handle, ctypes.c_float]),
        "moec_session_expert_stats": (i32, [handle, ctypes.POINTER(_ExpertStats)]),
        "moec_session_expert_layer_stats": (i64, [handle, ctypes.POINTER(_LayerExpertStats), i64]),
        "moec_model_eos_ids": (i64, [handle, _INT64S, i64]),
        "moec_model_forward": (i32, [handle, _INT64S, i64, i64, i32, _FLOATS, i64]),
        "moec_session_open": (handle, [handle]),
        "moec_session_close": (None, [handle]),
        "moec_session_error": (ctypes.c_char_p, [handle]),
        "moec_session_tokens": (i64, [handle, _INT64S, i64]),
        "moec_session_forward": (i32, [handle, _INT64S, i64, i64, i32, _FLOATS, i64]),
        "moec_session_rewind": (i32, [handle, i64]),
        "moec_session_fork": (handle, [handle]),
        "moec_session_save": (i32, [handle, ctypes.c_char_p, ctypes.c_char_p]),
        "moec_session_restore": (i32, [handle, ctypes.c_char_p, ctypes.c_char_p]),
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
    """The `Session` protocol over a `.pte`. Faults of the caller are RunError, a bad file is ArtifactError.

    Sessions that were forked from each other share weights and activations; calls of them run one after another.
    """

    def __init__(
        self,
        model: Path,
        *,
        threads: int | None = None,
        float_activations: bool = False,
        artifact: str | None = None,
        memory_mb: int | None = None,
        experts: ExpertCacheOptions | None = None,
        exact_calls: bool = False,
    ) -> None:
        """Open `model`. `threads` None: one per core this process may use, without the slow ones where cores differ.
        The thread pool is the process's: the session opened last decides its size, except that it stays while a session
        is open whose program XNNPACK computes in part; `self.threads` is what there is. `float_activations`: compute in
        fp32 on the same codes, where the program would round activations to INT8; a delegate's linears still round.
        `memory_mb`: routed experts are read as tokens choose them, so that this process stays within so many megabytes
        (10^6 bytes); RunError, with the least that works, for less than one token needs. `experts`: how (memory.py).
        `exact_calls`: the program holds nothing whose sums depend on how many tokens a call has.
        `artifact`: SHA-256 that names the artifact in saved sessions; None: that of `model`, read when it is needed."""
        self._handle: int | None = None
        self._busy = threading.RLock()
        self._model = Path(model)
        self._artifact = artifact
        if not self._model.is_file():
            raise ArtifactError("the file does not exist", place=str(model), remedy="compile the artifact again")
        if threads is not None and not 1 <= threads <= MAX_THREADS:
            raise RunError(f"{threads} threads asked for", remedy=f"give a number from 1 to {MAX_THREADS}")
        runtime = _runtime()
        opened = runtime.moec_model_open(os.fsencode(self._model), threads or 0)
        try:
            self._check_model(runtime.moec_model_error(opened).decode(errors="replace"))
            runtime.moec_model_float_activations(opened, int(float_activations))
            if memory_mb is not None:
                self._limit_memory(opened, memory_mb, experts or ExpertCacheOptions())
            info = _Info()
            runtime.moec_model_get_info(opened, ctypes.byref(info))
            eos_ids = _eos_ids(opened)
            self._hold(runtime.moec_session_open(opened))
        finally:
            runtime.moec_model_close(opened)  # the session keeps it
        super().__init__(
            str(model), vocab_size=int(info.vocab_size), context=int(info.context), max_tokens=int(info.max_tokens)
        )
        self.threads = int(info.threads)
        self.bos_id = None if info.bos_id < 0 else int(info.bos_id)
        self.eos_ids = eos_ids
        self.rewinds = bool(info.rewinds)
        self.memory_mb = memory_mb
        self._has_all = bool(info.has_all)
        cache_aware = memory_mb is not None and experts is not None and experts.cache_aware > 0
        self.exact_calls = exact_calls and self._has_all and not cache_aware
        self._prepare_traces()

    def _limit_memory(self, model: int, memory_mb: int, options: ExpertCacheOptions) -> None:
        if not 1 <= memory_mb <= MAX_MEMORY_MB:
            raise RunError(f"a memory budget of {memory_mb} MB", remedy=f"give a number from 1 to {MAX_MEMORY_MB}")
        policy = EVICTIONS.index(options.eviction)
        if _runtime().moec_model_limit_memory(model, memory_mb * 1_000_000, policy, options.readers):
            self._check_model(_runtime().moec_model_error(model).decode(errors="replace"))
        if not options.read_ahead:
            _runtime().moec_model_read_nothing_ahead(model)
        if options.cache_aware and _runtime().moec_model_prefer_resident(model, options.cache_aware):
            self._check_model(_runtime().moec_model_error(model).decode(errors="replace"))

    def expert_stats(self) -> ExpertStats | None:
        """What the cache of routed experts did so far, for all sessions of this model; None without a memory budget."""
        with self._busy:
            self._check_open()
            stats = _ExpertStats()
            _runtime().moec_session_expert_stats(self._handle, ctypes.byref(stats))
        return ExpertStats(*(getattr(stats, f.name) for f in fields(ExpertStats))) if stats.budget else None

    def layer_expert_stats(self) -> list[LayerExpertStats]:
        """As `expert_stats`, of each layer with routed experts, in the order of the manifest's `model.moe_layers`
        (layers whose experts are equal count as one); empty without a memory budget."""
        with self._busy:
            self._check_open()
            count = _runtime().moec_session_expert_layer_stats(self._handle, None, 0)
            layers = (_LayerExpertStats * max(count, 1))()
            count = _runtime().moec_session_expert_layer_stats(self._handle, layers, count)
        names = [f.name for f in fields(LayerExpertStats)]
        return [LayerExpertStats(*(getattr(layer, name) for name in names)) for layer in layers[: max(count, 0)]]

    def _prepare_traces(self) -> None:
        # a session that nobody has any more is closed at once, which a reference to itself would delay: its caches may
        # be room that another waits for
        method = weakref.WeakMethod(self._on_moe)

        def on_moe(*arguments: Any) -> None:
            if (found := method()) is not None:
                found(*arguments)

        self._callback = _TRACE(on_moe)
        self._call: list[MoeTrace] = []  # the layers of the native call that is running
        self._trace_fault: BaseException | None = None

    def _hold(self, handle: int | None) -> None:
        """Take a native session as this one's, or free it and raise what is wrong with it."""
        error = _runtime().moec_session_error(handle).decode(errors="replace")
        self._handle = handle
        if error:
            self.close()
            self._check_model(error)

    def _check_model(self, error: str) -> None:
        if error:
            raise opening_error(error, self._model)

    def fork(self) -> CpuSession:
        """Another session with the same tokens over the same weights; pages of the caches are copied when one of them
        writes there, where the system can (docs/sessions.md). RunError when closed."""
        with self._busy:
            self._check_open()
            fork = copy(self)
            fork._handle, fork._busy = None, threading.RLock()
            fork._ids, fork._traces, fork._tracing = list(self._ids), [], False
            fork._prepare_traces()
            try:
                fork._hold(_runtime().moec_session_fork(self._handle))
            except RunError:
                self._follow()
                raise
        return fork

    def rewind(self, position: int) -> None:
        with self._busy:
            super().rewind(position)
            self._done(_runtime().moec_session_rewind(self._handle, position))

    def reset(self) -> None:
        with self._busy:
            super().reset()
            if self._handle is not None:
                self._done(_runtime().moec_session_rewind(self._handle, 0))

    def save(self, path: str | Path) -> None:
        with self._busy:
            status = _runtime().moec_session_save(self._handle, *self._file(path))
            if status:
                self._follow()
            self._done(status, Path(path))

    def restore(self, path: str | Path) -> None:
        with self._busy:
            self._done(_runtime().moec_session_restore(self._handle, *self._file(path)), Path(path))
            count = _runtime().moec_session_tokens(self._handle, None, 0)
            ids = (ctypes.c_int64 * max(count, 1))()
            _runtime().moec_session_tokens(self._handle, ids, count)
            self._ids, self.position = ids[:count], count
            self._traces.clear()

    def _file(self, path: str | Path) -> tuple[bytes, bytes]:
        """Path and artifact as the native calls take them."""
        self._check_open()
        name = os.fsencode(path)
        if b"\0" in name:
            raise RunError("a null byte in the file's name", remedy="name another file")
        if self._artifact is None:
            self._artifact = file_digest(self._model)
        return name, self._artifact.encode()

    def _done(self, status: int, file: Path | None = None) -> None:
        """Raise what the last native call says if it failed. `file`: a session's, whose fault it then is."""
        if not status:
            return
        error = _runtime().moec_session_error(self._handle).decode(errors="replace")
        raise call_error(error, self._place) if file is None else session_file_error(error, file)

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
                _close(handle)

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
        _calls.running += 1
        try:
            status = runtime.moec_session_forward(
                self._handle,
                tokens.ctypes.data_as(_INT64S),
                len(tokens),
                start,
                int(every),
                out.ctypes.data_as(_FLOATS) if out is not None else None,
                out.size if out is not None else 0,
            )
        finally:
            _calls.running -= 1
            while _calls.closing and not _calls.running:
                runtime.moec_session_close(_calls.closing.pop())
            if self._tracing:
                runtime.moec_model_trace(_TRACE(), None)
        fault, self._trace_fault = self._trace_fault, None
        if status:
            self._follow()
        if fault is not None:
            raise fault
        self._done(status)

    def _follow(self) -> None:
        """Forget the tokens that the native session lost in a call that failed: states that cannot go back may have
        gone on, or the file whose pages it uses was changed."""
        held = _runtime().moec_session_tokens(self._handle, None, 0)
        self.position = min(self.position, held)
        del self._ids[self.position :]

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


def _close(session: int) -> None:
    """Close a native session. A trace's callback may come to collect one while its model is locked by the call."""
    if _calls.running:
        _calls.closing.append(session)
    else:
        _runtime().moec_session_close(session)


def _eos_ids(model: int) -> tuple[int, ...]:
    runtime = _runtime()
    count = runtime.moec_model_eos_ids(model, None, 0)
    ids = (ctypes.c_int64 * max(count, 1))()
    runtime.moec_model_eos_ids(model, ids, count)
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
