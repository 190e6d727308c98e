"""docs/kernels.md, followed: an instruction set is two files and one line, and serves the operators bit for bit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

RUNTIME = Path(__file__).parents[2] / "runtime"
# one that every machine has: generic code over scalar lanes, and the integer products of the reference
KERNELS = """
#include <cstring>

#include "isa/simd_scalar.h"
//
#include "isa/generic_kernels.h"

namespace moec {

const Kernels& scalar_kernels();

const Kernels& twin_kernels() {
  static const Kernels table = [] {
    Kernels t = generic_table(0);
    std::memcpy(t.gemm_int8, scalar_kernels().gemm_int8, sizeof t.gemm_int8);
    return t;
  }();
  return table;
}

}  // namespace moec
"""
LINE = "moec_instruction_set(twin PROCESSOR any ATTENTION scalar FLAGS -O2)\n"
USE = """
import numpy as np
from moec.runtime import kernel_api
from moec.runtime.moe_config import Kind, WeightFormat

assert kernel_api.available_isas()[0] == "twin", kernel_api.available_isas()
rng = np.random.default_rng(0)
for axis_out in (False, True):
    form = WeightFormat(Kind.INT4, 32, axis_out=axis_out, int8_activations=True)
    rows, columns = (96, 64) if axis_out else (64, 96)
    codes = rng.integers(0, 256, (1, rows, columns // 2), dtype=np.uint8)
    scales = rng.uniform(0.01, 0.1, (1, rows, columns // 32)).astype(np.float16)
    w = kernel_api.pack(codes, scales, 64, 96, form)
    x = rng.standard_normal((7, 96), dtype=np.float32)
    found = []
    for isa in kernel_api.available_isas():
        kernel_api.set_isa(isa)
        found.append(kernel_api.linear(x, w, 64, form))
    assert all(np.array_equal(y, found[0]) for y in found)
print(len(found), "sets agree")
"""


@pytest.mark.slow
def test_two_files_and_one_line(tmp_path: Path) -> None:
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert cmake is not None, "make setup installs it"
    kernels = shutil.copytree(RUNTIME, tmp_path / "runtime") / "kernels"
    (kernels / "isa" / "kernels_twin.cpp").write_text(KERNELS)
    listed = kernels / "instruction_sets.cmake"
    head, mark, tail = listed.read_text("utf-8").partition("moec_instruction_set(")
    listed.write_text(head + LINE + mark + tail, "utf-8")
    build = tmp_path / "build"
    options = ["-DMOEC_EXECUTORCH=OFF", "-DCMAKE_BUILD_TYPE=Release"]
    for step in (["-S", str(tmp_path / "runtime"), "-B", str(build), *options], ["--build", str(build), "-j2"]):
        done = subprocess.run([cmake, *step], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (library,) = build.rglob("libmoec_kernels.*")
    environment = {**os.environ, "MOEC_KERNELS_LIBRARY": str(library)}
    done = subprocess.run([sys.executable, "-c", USE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) >= 2
