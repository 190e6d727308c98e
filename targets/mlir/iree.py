"""Compiles the torch text with IREE for this machine's CPU, and calls it (in a worker process only)."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moec.compiler.errors import CompileError
from moec.targets.mlir.pipelines import operator_in
from moec.targets.mlir.toolchain import ended, last_line

# the CPU of this machine: an artifact that runs elsewhere is compiled there, from the text beside it
FLAGS = (
    "--iree-input-type=torch",
    "--iree-hal-target-device=local",
    "--iree-hal-local-target-device-backends=llvm-cpu",
    "--iree-llvmcpu-target-cpu=host",
)


def compile_text(source: Path, out: Path, *, model: str) -> None:
    """Write `out` (.vmfb). `iree-compile` is a process of its own. CompileError naming what it could not compile."""
    from iree.compiler.tools.binaries import find_tool

    done = subprocess.run(
        [str(find_tool("iree-compile")), *FLAGS, str(source), "-o", str(out)], capture_output=True, text=True
    )
    if done.returncode == 0:
        return
    operator = operator_in(done.stderr)
    what = next((line for line in done.stderr.splitlines() if "error:" in line), "")
    what = re.sub(r"^.*?error: ", "", what)[:200] or f"{ended(done.returncode)}{last_line(done.stderr)}"
    about = f"IREE cannot compile {operator}: " if operator else "IREE stopped: "
    raise CompileError(about + what, place=model)


class Loaded:
    """`loaded(rest) -> arrays`: the weights, given once, are held by the device."""

    def __init__(self, program: Path, entry: str, weights: Sequence[np.ndarray]) -> None:
        from iree import runtime

        config = runtime.Config("local-sync")  # one thread, in order
        module = runtime.VmModule.mmap(config.vm_instance, str(program))
        context = runtime.SystemContext(config=config)
        context.add_vm_module(module)
        self._runtime, self._device = runtime, config.device
        self._function = context.modules[module.name][entry]
        self._weights = [runtime.asdevicearray(config.device, np.ascontiguousarray(w)) for w in weights]

    def __call__(self, rest: Sequence[np.ndarray]) -> list[np.ndarray]:
        results = self._function(*self._weights, *rest)
        return [np.array(r.to_host()) for r in results]
