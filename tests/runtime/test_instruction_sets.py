"""The list of instruction sets: who reads it, what follows from a line, and what MOEC_ISA may say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moec.compiler.instruction_sets import compiled_here, instruction_sets
from moec.compiler.spec import device
from moec.runtime import kernel_api, native

RUNTIME = Path(kernel_api.__file__).resolve().parent


def test_the_list_is_what_the_library_was_compiled_from() -> None:
    names = [s.name for s in instruction_sets()]
    assert names[-1] == "scalar", "the reference is there on every machine, and is the last choice"
    assert len(set(names)) == len(names)
    available = kernel_api.available_isas()
    assert [n for n in compiled_here() if n in available] == available


@pytest.mark.parametrize("name", [s.name for s in instruction_sets()])
def test_a_line_has_its_file_and_a_device_may_name_it(name: str) -> None:
    assert (RUNTIME / "kernels" / "isa" / f"kernels_{name}.cpp").is_file()
    assert name in device.isa_names()


def test_no_kernel_file_is_left_out_of_the_list() -> None:
    files = {p.stem.removeprefix("kernels_") for p in (RUNTIME / "kernels" / "isa").glob("kernels_*.cpp")}
    assert files == {s.name for s in instruction_sets()}


# Calls the library itself, as an application in C++ does: kernel_api would refuse before.
OPERATOR = """
import ctypes, sys
lib = ctypes.CDLL(sys.argv[1])
lib.moec_last_error.restype = lib.moec_get_isa.restype = ctypes.c_char_p
class B(ctypes.Structure): _fields_ = [("data", ctypes.c_void_p), ("bytes", ctypes.c_uint64)]
x, y = (ctypes.c_float * 4)(3, 4, 0, 0), (ctypes.c_float * 4)()
b = lambda a: B(ctypes.addressof(a), 16)
code = lib.moec_rms_norm(ctypes.c_int64(1), ctypes.c_int64(4), ctypes.c_float(0), b(x), B(None, 0), b(y))
print(code, lib.moec_get_isa().decode() or "none", lib.moec_last_error().decode(), y[0])
"""


def run(code: str, isa: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "MOEC_ISA": isa}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("isa", ["AVX2", "neon,i8mm"])
def test_an_unknown_name_in_the_environment_is_an_error_that_names_the_valid_ones(isa: str) -> None:
    offered = ",".join(kernel_api.available_isas())
    said = run(OPERATOR, isa, str(native.kernels_library())).stdout
    assert said.startswith(f"4 none MOEC_ISA={isa}: ")
    assert f"this machine offers {offered}" in said
    python = run("from moec.runtime import kernel_api; kernel_api.library()", isa)
    assert f"UserError: MOEC_ISA: no instruction set '{isa}' here; choose one of {offered}" in python.stderr


@pytest.mark.parametrize("isa", ["", "auto", "scalar"])
def test_a_known_name_in_the_environment_is_used(isa: str) -> None:
    said = run(OPERATOR, isa, str(native.kernels_library())).stdout
    assert said.split()[:2] == ["0", isa if isa == "scalar" else kernel_api.available_isas()[0]]


@pytest.mark.slow
def test_the_native_part_builds_without_python_and_without_executorch(tmp_path: Path) -> None:
    cmake = native._tool("cmake")
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={native._tool('ninja')}"]
    bare = {"PATH": "/usr/bin:/bin"}
    command = [cmake, "-S", str(RUNTIME), "-B", str(tmp_path), *generator]
    subprocess.run(command, check=True, env=bare, capture_output=True)
    best = kernel_api.available_isas()[0]
    targets = ["--target", "moec_kernels", f"roofline_{best}"]
    subprocess.run([cmake, "--build", str(tmp_path), *targets], check=True, env=bare, capture_output=True)
    library = next(p for p in (tmp_path / "out").iterdir() if p.name.startswith("libmoec_kernels."))
    assert run(OPERATOR, "scalar", str(library)).stdout.startswith("0 scalar")
    assert (tmp_path / "out" / f"roofline_{best}").is_file()
