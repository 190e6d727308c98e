"""The C API of runtime/kernels/recurrent.h by ctypes: the operators' calls on arrays."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moec.compiler.ops import GatedDelta, SelectiveScan, ShortConv
from moec.runtime import kernel_api


class _Buffer(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("bytes", ctypes.c_uint64))


def _structure(sizes: str, numbers: list[tuple[str, Any]], buffers: str) -> type[ctypes.Structure]:
    fields = [*((n, ctypes.c_int64) for n in sizes.split()), *numbers, *((n, _Buffer) for n in buffers.split())]
    return type("Arguments", (ctypes.Structure,), {"_fields_": fields})


CONV = _structure("tokens channels taps start_pos", [("silu", ctypes.c_int32)], "x weight bias state out")
DELTA = _structure(
    "tokens key_heads heads key_dim value_dim start_pos",
    [("scale", ctypes.c_float), ("eps", ctypes.c_float)],
    "q k v decay beta state out",
)
SCAN = _structure("tokens heads groups head_dim state_dim a_columns start_pos", [], "x dt a b c d state out")


def arguments(call: Any, out: np.ndarray) -> tuple[str, Any, list[Any]]:
    """(function, its argument, what must outlive it). The state is written in place."""
    start = int(call.start_pos)
    if isinstance(call, ShortConv):
        name, args = (
            "moec_short_conv",
            CONV(call.x.shape[1], call.x.shape[2], call.weight.shape[0], start, int(call.silu)),
        )
    elif isinstance(call, GatedDelta):
        _, t, h, e = call.v.shape
        name, args = "moec_gated_delta", DELTA(t, call.k.shape[2], h, call.k.shape[3], e, start, call.scale, call.eps)
    else:
        assert isinstance(call, SelectiveScan)
        _, t, h, p = call.x.shape
        name, args = "moec_selective_scan", SCAN(t, h, call.b.shape[2], p, call.b.shape[3], call.a.shape[1], start)
    kept: list[Any] = []
    for field, kind in args._fields_:
        value = out if field == "out" else getattr(call, field, None) if kind is _Buffer else None
        if isinstance(value, Tensor):
            assert field != "state" or value.is_contiguous()
            value = value.contiguous().numpy()
        if value is not None:
            kept.append(value)
            setattr(args, field, _Buffer(value.ctypes.data, value.nbytes))
    return name, args, kept


def run(call: Any) -> Tensor:
    """The kernel's result; as the reference, it writes the state."""
    shape = call.fake().shape
    out = np.full(tuple(shape), np.nan, np.float32)
    name, args, kept = arguments(call, out)
    status = getattr(kernel_api.library(), name)(ctypes.byref(args))
    assert status == 0, kernel_api.library().moec_last_error()
    del kept
    return torch.from_numpy(out)


def fault(name: str, args: Any) -> str:
    """The message of a call that must fail."""
    assert getattr(kernel_api.library(), name)(ctypes.byref(args)) != 0, "the call was taken"
    return kernel_api.library().moec_last_error().decode()
