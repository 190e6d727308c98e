"""The kernel library's C API in numpy terms: for packing at compile time, for tests and for benchmarks.

T tokens, N output features, K input features, E experts, D model width. Every fault that the library reports becomes a
`KernelError`. The library is the one that `native.py` builds; MOEC_KERNELS_LIBRARY names another file.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moec.compiler.errors import UserError
from moec.runtime.moe_config import Kind, MoeConfig, WeightFormat

ABI_VERSION = 5
F32 = NDArray[np.float32]
_TRANSPOSE = 1 << 4  # MOEC_AXIS_OUT on an f32 format, in moec_pack only


class KernelError(Exception):
    """A call that the kernel library refused. `code` as in moec_kernel.h."""

    def __init__(self, code: int, message: str) -> None:
        self.code = code
        super().__init__(message)


class _Buffer(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("bytes", ctypes.c_uint64))


_MOE_BUFFERS = (
    "x",
    "router_input",
    "router_weight",
    "router_bias",
    "selection_bias",
    "w13",
    "b13",
    "w2",
    "b2",
    "shared_w13",
    "shared_w2",
    "shared_gate",
    "y",
    "indices",
    "weights",
)


class _MoeArgs(ctypes.Structure):
    _fields_ = (
        ("tokens", ctypes.c_int64),
        ("config", ctypes.c_void_p),
        ("config_length", ctypes.c_uint64),
        ("params", ctypes.c_void_p),
        ("params_length", ctypes.c_uint64),
        *((name, _Buffer) for name in _MOE_BUFFERS),
    )


_TRACE = ctypes.CFUNCTYPE(
    None,
    ctypes.c_void_p,
    ctypes.c_int64,
    ctypes.c_int64,
    ctypes.c_int64,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_void_p,
)

_i32, _i64 = ctypes.c_int32, ctypes.c_int64
_SIGNATURES: dict[str, tuple[object, tuple[object, ...]]] = {
    "moec_last_error": (ctypes.c_char_p, ()),
    "moec_abi_version": (_i32, ()),
    "moec_packed_bytes": (_i32, (_i64, _i64, _i32, ctypes.POINTER(ctypes.c_uint64))),
    "moec_pack": (_i32, (_i64, _i64, _i64, _i32, _Buffer, _Buffer, _Buffer)),
    "moec_unpack": (_i32, (_i64, _i64, _i64, _i32, _Buffer, _Buffer, _Buffer)),
    "moec_linear": (_i32, (_i64, _i64, _i64, _i32, _Buffer, _Buffer, _Buffer, _Buffer)),
    "moec_gated_linear": (_i32, (_i64, _i64, _i64, _i32, _i32, _Buffer, _Buffer, _Buffer)),
    "moec_embedding": (_i32, (_i64, _i64, _i64, _i32, _Buffer, _Buffer, _Buffer)),
    "moec_moe": (_i32, (ctypes.POINTER(_MoeArgs),)),
    "moec_select_experts": (_i32, (_i64, ctypes.c_void_p, ctypes.c_uint64, *(_Buffer,) * 5)),
    "moec_set_trace": (None, (_TRACE, ctypes.c_void_p)),
    "moec_set_isa": (_i32, (ctypes.c_char_p,)),
    "moec_get_isa": (ctypes.c_char_p, ()),
    "moec_available_isas": (ctypes.c_char_p, ()),
    "moec_set_float_activations": (None, (_i32,)),
    "moec_set_threads": (_i32, (_i32,)),
    "moec_get_threads": (_i32, ()),
    "moec_fast_cores": (_i32, ()),
    "moec_set_parallel": (None, (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)),
    "moec_release_scratch": (None, ()),
}


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The loaded library with its signatures declared. UserError when it cannot be built or MOEC_ISA asks too much."""
    override = os.environ.get("MOEC_KERNELS_LIBRARY")
    if override:
        path = Path(override)
    else:
        from moec.runtime.native import kernels_library

        path = kernels_library()
    loaded = ctypes.CDLL(str(path))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    found = loaded.moec_abi_version()
    if found != ABI_VERSION:
        raise KernelError(0, f"{path} has ABI version {found}, this package needs {ABI_VERSION}")
    # ExecuTorch's pool, the library's default, writes to stderr when it starts; a session chooses again when it opens
    loaded.moec_set_parallel(None, None, None)
    loaded.moec_set_threads(loaded.moec_fast_cores())
    if not loaded.moec_get_isa():  # every operator would refuse
        offered = loaded.moec_available_isas().decode()
        raise UserError(
            f"no instruction set {os.environ['MOEC_ISA']!r} here",
            place="MOEC_ISA",
            remedy=f"choose one of {offered}, or auto",
        )
    return loaded


def _check(code: int) -> None:
    if code:
        raise KernelError(code, library().moec_last_error().decode(errors="replace"))


def _buffer(array: np.ndarray | None) -> _Buffer:
    if array is None:
        return _Buffer(None, 0)
    if not array.flags.c_contiguous:
        raise ValueError("the kernel takes contiguous arrays")
    return _Buffer(array.ctypes.data, array.nbytes)


def _floats(array: np.ndarray | None) -> F32 | None:
    return None if array is None else np.ascontiguousarray(array, dtype=np.float32)


def packed_bytes(n: int, k: int, fmt: WeightFormat) -> int:
    """Bytes of one packed matrix of n outputs and k inputs."""
    size = ctypes.c_uint64()
    _check(library().moec_packed_bytes(n, k, fmt.encode(), ctypes.byref(size)))
    return size.value


def pack(
    codes: np.ndarray,
    scales: np.ndarray | None,
    n: int,
    k: int,
    fmt: WeightFormat,
    *,
    count: int = 1,
    transposed: bool = False,
) -> NDArray[np.uint8]:
    """uint8 [count * packed_bytes] of `count` stacked matrices, codes and scales as moec_kernel.h (moec_pack) has them.
    `transposed`: f32 weights lie as [count, K, N]."""
    out = np.empty(count * packed_bytes(n, k, fmt), np.uint8)
    pack_into(out, codes, scales, n, k, fmt, count=count, transposed=transposed)
    return out


def pack_into(
    out: NDArray[np.uint8],
    codes: np.ndarray,
    scales: np.ndarray | None,
    n: int,
    k: int,
    fmt: WeightFormat,
    *,
    count: int = 1,
    transposed: bool = False,
) -> None:
    """`pack` into memory of the caller's, e.g. one expert of a stack."""
    if transposed and fmt.kind != Kind.F32:
        raise ValueError("only f32 weights are transposed while packing; quantized ones carry their group axis")
    encoded = fmt.encode() | (_TRANSPOSE if transposed else 0)
    _check(library().moec_pack(count, n, k, encoded, _buffer(codes), _buffer(scales), _buffer(out)))


def unpack(
    packed: NDArray[np.uint8], n: int, k: int, fmt: WeightFormat, *, count: int = 1
) -> tuple[np.ndarray, np.ndarray | None]:
    """(codes, scales) as they were given to `pack`."""
    rows, columns = (k, n) if fmt.axis_out else (n, k)
    codes: np.ndarray
    if fmt.kind == Kind.F32:
        codes, scales = np.empty((count, n, k), np.float32), None
    else:
        codes = (
            np.empty((count, rows, columns // 2), np.uint8)
            if fmt.kind.nibbles
            else np.empty((count, rows, columns), np.int8)
        )
        scales = np.empty((count, rows, columns // fmt.group_size), np.float32 if fmt.f32_scales else np.float16)
    _check(library().moec_unpack(count, n, k, fmt.encode(), _buffer(packed), _buffer(codes), _buffer(scales)))
    return codes, scales


def linear(
    x: F32, w: NDArray[np.uint8], n: int, fmt: WeightFormat, bias: F32 | None = None, out: F32 | None = None
) -> F32:
    """float32 [T, N] from x [T, K]."""
    t, k = x.shape
    y = np.empty((t, n), np.float32) if out is None else out
    bias = _floats(bias)  # a copy of it must outlive the call
    _check(library().moec_linear(t, n, k, fmt.encode(), _buffer(x), _buffer(w), _buffer(bias), _buffer(y)))
    return y


def head_linear(x: F32, w: NDArray[np.uint8], n: int, fmt: WeightFormat) -> F32:
    """float32 [T, H, N] from x [T, H, K]: each head times its own packed matrix of w."""
    t, heads, k = x.shape
    y = np.empty((t, heads, n), np.float32)
    _check(library().moec_head_linear(t, heads, n, k, fmt.encode(), _buffer(x), _buffer(w), _buffer(y)))
    return y


def gated_linear(x: F32, w: NDArray[np.uint8], f: int, fmt: WeightFormat, activation: int) -> F32:
    """float32 [T, F]: activation(gate) * up, where [gate, up] = x [T, K] times the packed matrix [2F, K]."""
    t, k = x.shape
    y = np.empty((t, f), np.float32)
    _check(library().moec_gated_linear(t, f, k, fmt.encode(), activation, _buffer(x), _buffer(w), _buffer(y)))
    return y


def embedding(ids: NDArray[np.int64], w: NDArray[np.uint8], n: int, k: int, fmt: WeightFormat) -> F32:
    """float32 [T, K]: rows of the packed table [N, K]."""
    ids = np.ascontiguousarray(ids, dtype=np.int64)
    y = np.empty((ids.size, k), np.float32)
    _check(library().moec_embedding(ids.size, n, k, fmt.encode(), _buffer(ids), _buffer(w), _buffer(y)))
    return y


@dataclass
class MoeTensors:
    """Everything of a block but its activations, as moec_moe_args names it."""

    router_weight: F32
    w13: NDArray[np.uint8]
    w2: NDArray[np.uint8]
    router_bias: F32 | None = None
    selection_bias: F32 | None = None
    b13: F32 | None = None
    b2: F32 | None = None
    shared_w13: NDArray[np.uint8] | None = None
    shared_w2: NDArray[np.uint8] | None = None
    shared_gate: F32 | None = None


@dataclass
class PreparedMoe:
    """A block whose arguments have been encoded once: calling it costs one foreign call."""

    config: MoeConfig
    tensors: MoeTensors
    _kept: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self) -> None:
        config, params = self.config.encode()
        self._config = np.array(config, np.int64)
        self._params = np.array(params, np.float64)
        self._args = _MoeArgs()
        self._args.config, self._args.config_length = self._config.ctypes.data, self._config.size
        self._args.params, self._args.params_length = self._params.ctypes.data, self._params.size
        for name, value in vars(self.tensors).items():
            array = value if value is None or value.dtype == np.uint8 else _floats(value)
            if array is not None:
                self._kept.append(array)
            setattr(self._args, name, _buffer(array))

    def __call__(
        self, x: F32, router_input: F32 | None = None, y: F32 | None = None
    ) -> tuple[F32, NDArray[np.int32], F32]:
        """(y [T, D], indices int32 [T, top_k], weights float32 [T, top_k])."""
        y = np.empty_like(x) if y is None else y
        shape = (x.shape[0], self.config.top_k)
        indices, weights = np.empty(shape, np.int32), np.empty(shape, np.float32)
        self.run(x, x if router_input is None else router_input, y, indices, weights)
        return y, indices, weights

    def select(self, router_input: F32) -> NDArray[np.int32]:
        """The experts that the router selects, int32 [T, top_k], best first; nothing else is computed."""
        tensors, rows = self.tensors, len(router_input)
        indices = np.empty((rows, self.config.top_k), np.int32)
        given = [router_input, tensors.router_weight, tensors.router_bias, tensors.selection_bias]
        parts = [None if part is None else _floats(part) for part in given]
        buffers, config = [_buffer(part) for part in parts], self._config
        _check(library().moec_select_experts(rows, config.ctypes.data, config.size, *buffers, _buffer(indices)))
        return indices

    def bind(self, x: F32, y: F32) -> Callable[[], int]:
        """A function of no arguments that runs the block on these arrays: nothing but the foreign call, for timing. It
        returns the error code. The block, x and y must outlive it."""
        args = _MoeArgs.from_buffer_copy(self._args)
        args.tokens = x.shape[0]
        args.x = args.router_input = _buffer(x)
        args.y = _buffer(y)
        args.indices = args.weights = _Buffer(None, 0)
        function, pointer = library().moec_moe, ctypes.pointer(args)
        return lambda: function(pointer)

    def run(
        self, x: F32, router_input: F32, y: F32, indices: NDArray[np.int32] | None = None, weights: F32 | None = None
    ) -> None:
        args = self._args
        args.tokens = x.shape[0]
        args.x, args.router_input, args.y = _buffer(x), _buffer(router_input), _buffer(y)
        args.indices, args.weights = _buffer(indices), _buffer(weights)
        _check(library().moec_moe(ctypes.byref(args)))


def moe(config: Sequence[int], params: Sequence[float], tensors: MoeTensors, x: F32, router_input: F32) -> F32:
    """y [..., D] of one block whose configuration is encoded already, as a graph holds it."""
    x, y = np.ascontiguousarray(x), np.empty(x.shape, np.float32)
    router_input = np.ascontiguousarray(router_input)
    encoded, numbers = np.array(config, np.int64), np.array(params, np.float64)
    args = _MoeArgs(x.size // x.shape[-1], encoded.ctypes.data, encoded.size, numbers.ctypes.data, numbers.size)
    for name, value in (*vars(tensors).items(), ("x", x), ("router_input", router_input), ("y", y)):
        setattr(args, name, _buffer(value))
    _check(library().moec_moe(ctypes.byref(args)))
    return y


def set_isa(name: str) -> None:
    """Use the kernels of one instruction set, by a name of `available_isas`; KernelError where it is not available."""
    _check(library().moec_set_isa(name.encode()))


def get_isa() -> str:
    """The instruction set in use."""
    return library().moec_get_isa().decode()


def available_isas() -> list[str]:
    """Best first."""
    return library().moec_available_isas().decode().split(",")


def set_float_activations(on: bool) -> None:
    """Whether the calling thread's operators compute in fp32 where their formats ask for INT8 activations."""
    library().moec_set_float_activations(int(on))


def set_threads(n: int) -> None:
    """Threads of the library's own pool (it serves when no other pool has been installed)."""
    _check(library().moec_set_threads(n))


def use_own_pool() -> None:
    """Leave the pool that the ExecuTorch registration installed."""
    library().moec_set_parallel(None, None, None)


TraceCallback = Callable[[F32, NDArray[np.int32], F32, F32], None]
_installed: list[object] = []  # keeps the foreign callback alive


def set_trace(callback: TraceCallback | None) -> None:
    """callback(x [T, D], indices [T, k], weights [T, k], y [T, D]) after every MoE block, with copies. None: off."""
    if callback is None:
        library().moec_set_trace(_TRACE(), None)
        _installed.clear()
        return

    def forward(_user: int, t: int, d: int, k: int, x: int, indices: int, weights: int, y: int) -> None:
        def view(address: int, dtype: type[np.generic], shape: tuple[int, int]) -> np.ndarray:
            if not shape[0]:
                return np.empty(shape, dtype)
            raw = bytearray((ctypes.c_char * (shape[0] * shape[1] * 4)).from_address(address))
            return np.frombuffer(raw, dtype).reshape(shape)

        callback(
            view(x, np.float32, (t, d)),
            view(indices, np.int32, (t, k)),
            view(weights, np.float32, (t, k)),
            view(y, np.float32, (t, d)),
        )

    function = _TRACE(forward)
    library().moec_set_trace(function, None)
    _installed[:] = [function]
