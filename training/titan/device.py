"""Imports torchtitan for the device of a run. All workarounds that let it run on a CPU are here.

torchtitan 0.3 chooses its device when it is imported: an accelerator if torch finds one, else CUDA. Three things
prevent it from running on a CPU; gloo, FSDP2 and DTensor work there. A fourth fails on every device.

*The choice.* `torchtitan.tools.utils` holds it in two names, `device_type` and `device_module`, that its other modules
copy as they are imported. So that module is imported first and the names are set before any other one reads them.
*The interface of torch.cpu.* It has no name and no memory counters.
*Triton.* A torch for CPUs comes without it, and torchtitan imports kernels of an all-to-all for GPUs that moec does not
use: in their place stands a module whose functions refuse to be called.
*A newer torch.* After the first step torchtitan shortens the timeout of collectives with
`torch.distributed.set_timeout`, which torch 2.13 does not have. Here the timeout stays as it is.
"""

from __future__ import annotations

import gc
import importlib
import logging
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import ModuleType
from typing import Any

import torch

from moec.compiler.errors import UserError
from moec.compiler.extras import installed, require

PACKAGE, EXTRA = "torchtitan", "titan"
_CHOICE = "torchtitan.tools.utils"
_TIMEOUTS = "torchtitan.distributed.utils"
_GPU_KERNELS = "torchtitan.distributed.minimal_async_ep.kernels"


def load(device: torch.device) -> None:
    """Import torchtitan for `device`; once in a process it stays with its device.

    MissingExtra without the package, UserError if it was imported for another device before.
    """
    require(PACKAGE, EXTRA, "--backend torchtitan")
    fresh = f"{PACKAGE}.trainer" not in sys.modules
    with _quiet():
        utils: Any = importlib.import_module(_CHOICE)
        if fresh and device.type == "cpu":
            utils.device_type, utils.device_module = "cpu", _Cpu()
        if utils.device_type != device.type:
            raise UserError(
                f"torchtitan was imported for {utils.device_type} and cannot run on {device.type}",
                remedy="start a new process",
            )
        if fresh and not installed("triton"):
            sys.modules.setdefault(_GPU_KERNELS, _NoKernels(_GPU_KERNELS))
        importlib.import_module(f"{PACKAGE}.trainer")
        distributed: Any = importlib.import_module(_TIMEOUTS)
        distributed.set_pg_timeouts = _timeouts_stay


def _timeouts_stay(timeout: timedelta, parallel_dims: Any) -> None:
    """In the place of `set_pg_timeouts`: a checkpoint that one process writes may take longer than a step."""


class _NoKernels(ModuleType):
    """A module in which every name is a function that refuses to be called."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def refused(*_: Any, **__: Any) -> Any:
            raise RuntimeError(f"{name} of torchtitan is a kernel in Triton, which is not installed")

        return refused


@dataclass(frozen=True)
class _Properties:
    """total_memory: bytes."""

    total_memory: int


class _Cpu:
    """`torch.cpu` with the rest of what torchtitan asks of a device's module."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    def get_device_name(self, _device: Any = None) -> str:
        return platform.processor() or "cpu"

    def get_device_properties(self, _device: Any = None) -> _Properties:
        return _Properties(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))

    def memory_stats(self, _device: Any = None) -> dict[str, int]:
        """Nothing is counted: torchtitan then reports -1."""
        return {}

    def reset_peak_memory_stats(self) -> None:
        """There are no peaks to reset."""

    def empty_cache(self) -> None:
        """The CPU's allocator keeps no cache of torch's."""


@contextmanager
def running() -> Iterator[None]:
    """What a trainer of torchtitan changes in the process, or wants to find: as it was when the trainer is done.

    It needs LOCAL_RANK, which only a launcher sets, and sets PYTHONHASHSEED; it turns Python's garbage collector off,
    to collect between steps; it logs to the root logger, where moec's own lines say the same.
    """
    before = {name: os.environ.get(name) for name in ("LOCAL_RANK", "PYTHONHASHSEED")}
    collecting = gc.isenabled()
    os.environ.setdefault("LOCAL_RANK", "0")
    try:
        with _quiet(), warnings.catch_warnings():
            # it asks torch's schedulers for a rate outside of a step, where a state is loaded
            warnings.filterwarnings("ignore", message="To get the last learning rate")
            yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        if collecting:
            gc.enable()


@contextmanager
def _quiet() -> Iterator[None]:
    """Errors only, of torchtitan and of what it imports; other loggers are left alone."""
    root = logging.getLogger()
    named = [logging.getLogger(name) for name in (PACKAGE, "torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in named]

    def passes(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or f"{os.sep}{PACKAGE}{os.sep}" not in record.pathname

    root.addFilter(passes)
    for logger in named:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.removeFilter(passes)
        for logger, level in zip(named, levels, strict=True):
            logger.setLevel(level)
