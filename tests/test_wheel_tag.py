"""A wheel's tag is what its files were measured to need (tools/elf_needs.py), and its bytes are what RECORD says."""

from __future__ import annotations

import base64
import csv
import hashlib
import platform
import stat
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from moec.compiler.progress import Progress
from moec.runtime import native, shipped

TOOLS = Path(__file__).parent.parent / "tools"


def load(name: str) -> ModuleType:
    """tools/NAME.py, which imports its neighbours by their bare names as a script does."""
    sys.path.insert(0, str(TOOLS))
    try:
        return __import__(name)
    finally:
        sys.path.remove(str(TOOLS))


elf_needs, wheel = load("elf_needs"), load("wheel")


def needs(
    *versions: tuple[str, str], machine: str = "x86_64", library: str = "libc.so.6", search: str = "$ORIGIN"
) -> object:
    asked = [(family, elf_needs.dotted(number)) for family, number in versions]
    symbols = frozenset(("f", *each) for each in asked)
    return elf_needs.Needs("lib.so", machine, frozenset([library]), (search,), frozenset(asked), symbols)


@pytest.mark.parametrize(
    ("versions", "minor"),
    [
        ([], 28),
        ([("GLIBC", "2.2.5"), ("GLIBCXX", "3.4.24"), ("CXXABI", "1.3.11"), ("GCC", "3.0")], 28),
        ([("GLIBC", "2.28")], 28),
        ([("GLIBC", "2.29")], 31),
        ([("GLIBC", "2.17"), ("GLIBCXX", "3.4.25")], 31),
        ([("GLIBC", "2.34")], 34),
        ([("GLIBC", "2.17"), ("GLIBCXX", "3.4.30")], 35),
        ([("CXXABI", "1.3.14")], 39),
    ],
)
def test_the_oldest_system_that_has_everything(versions: list[tuple[str, str]], minor: int) -> None:
    assert elf_needs.tag([needs(), needs(*versions)]) == f"manylinux_2_{minor}_x86_64"
    assert elf_needs.tag([needs(*versions, machine="aarch64")]) == f"manylinux_2_{minor}_aarch64"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ([needs(("GLIBC", "2.99"))], r"newer than any system listed: lib.so: f@GLIBC_2.99"),
        ([needs(("GOMP", "1.0"))], r"newer than any system listed: lib.so: f@GOMP_1.0"),
        ([needs(library="libgomp.so.1")], r"needs libgomp.so.1, which not every system has"),
        ([needs(library="libtorch.so")], r"needs libtorch.so"),
        ([needs(search="/opt/lib")], r"looks for libraries in /opt/lib"),
        ([needs(), needs(machine="aarch64")], r"not of one machine"),
    ],
)
def test_what_no_tag_fits(wrong: list[object], said: str) -> None:
    with pytest.raises(elf_needs.NotPortable, match=said):
        elf_needs.tag(wrong)


def test_what_a_file_needs_is_read(tmp_path: Path) -> None:
    """A program that asks for one symbol by an old version and for another by the version of this system."""
    if sys.platform != "linux" or platform.machine() not in elf_needs.MACHINES.values():
        # other systems have no versions of symbols that could be read
        pytest.skip("symbol versions are those of glibc on x86-64 and aarch64")
    oldest = {"x86_64": "2.2.5", "aarch64": "2.17"}[platform.machine()]
    source = f"""
    #include <cmath>
    #include <pthread.h>
    __asm__(".symver pthread_once,pthread_once@GLIBC_{oldest}");
    extern "C" int both(pthread_once_t* once, void (*f)(), double* x) {{
      *x = std::exp(*x);
      return pthread_once(once, f);
    }}
    """
    (tmp_path / "both.cpp").write_text(source)
    command = [native.find_compiler(), "-O1", "-shared", "-fPIC", "-Wl,-rpath,$ORIGIN:/here", "both.cpp", "-lm"]
    subprocess.run([*command, "-o", "both.so"], cwd=tmp_path, check=True)
    found = elf_needs.read(tmp_path / "both.so")
    assert found.machine == platform.machine()
    assert found.search == ("$ORIGIN", "/here")
    assert {"libc.so.6", "libm.so.6"} <= found.libraries
    asked = {symbol: (family, version) for symbol, family, version in found.symbols}
    assert asked["pthread_once"] == ("GLIBC", elf_needs.dotted(oldest))
    assert asked["exp"][0] == "GLIBC"
    assert found.newest("GLIBC") >= asked["exp"][1]
    assert set(asked.values()) <= found.versions
    (tmp_path / "text").write_text("no library")
    with pytest.raises(elf_needs.NotPortable, match="text: no ELF file"):
        elf_needs.read(tmp_path / "text")


def pure_wheel(folder: Path) -> Path:
    path = folder / "moec-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("moec/__init__.py", "")
        archive.writestr("moec-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: moec\nVersion: 1.0\n")
        archive.writestr(
            "moec-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n\n"
        )
        archive.writestr("moec-1.0.dist-info/RECORD", "stale,,\n")
    return path


def test_the_wheel_has_the_build_and_a_record_of_every_byte(tmp_path: Path) -> None:
    build = tmp_path / "build"
    build.mkdir()
    (build / "moec_runner").write_bytes(b"\x7fELF...")
    shipped.Record("0" * 16, "1.5.1", "aarch64", "linux").write(build)
    made = wheel.packed(pure_wheel(tmp_path), build, "manylinux_2_28_aarch64", tmp_path / "out")
    assert made.name == "moec-1.0-py3-none-manylinux_2_28_aarch64.whl"
    assert [path.name for path in made.parent.iterdir()] == [made.name]
    with zipfile.ZipFile(made) as archive:
        head = archive.read("moec-1.0.dist-info/WHEEL").decode().splitlines()
        assert head.count("Tag: py3-none-manylinux_2_28_aarch64") == 1
        assert "Root-Is-Purelib: false" in head
        assert not {"Tag: py3-none-any", "Root-Is-Purelib: true"} & set(head)
        rows = list(csv.reader(archive.read("moec-1.0.dist-info/RECORD").decode().splitlines()))
        assert [name for name, *_ in rows] == archive.namelist()
        for name, digest, size in rows[:-1]:
            data = archive.read(name)
            code = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            assert (digest, size) == (f"sha256={code}", str(len(data)))
        modes = {entry.filename: entry.external_attr >> 16 for entry in archive.infolist()}
        assert modes["moec/runtime/shipped/moec_runner"] & stat.S_IXUSR
        assert not modes["moec/runtime/shipped/build.json"] & stat.S_IXUSR
    first = made.read_bytes()
    again = wheel.packed(pure_wheel(tmp_path), build, "manylinux_2_28_aarch64", tmp_path / "out")
    assert again.read_bytes() == first


def test_pip_takes_the_wheel(tmp_path: Path) -> None:
    """Its parts lie where pip puts them, the programs among them executable."""
    build = tmp_path / "build"
    build.mkdir()
    (build / "moec_runner").write_bytes(b"\x7fELF...")
    made = wheel.packed(pure_wheel(tmp_path), build, f"manylinux_2_28_{platform.machine()}", tmp_path / "out")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", str(tmp_path / "site")]
    if platform.libc_ver()[0] != "glibc":
        # pip elsewhere refuses the tag, as it should: nothing is left to install
        pytest.skip("pip takes manylinux wheels on Linux with glibc alone")
    done = subprocess.run([*pip, str(made)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    runner = tmp_path / "site" / "moec" / "runtime" / "shipped" / "moec_runner"
    assert runner.read_bytes() == b"\x7fELF..."
    assert runner.stat().st_mode & stat.S_IXUSR


@pytest.mark.slow
def test_a_portable_build_needs_nothing_newer_than_its_tag(tmp_path: Path) -> None:
    """The kernels, the runtime and the runner as `make wheel` builds them, and that the loader finds what they need."""
    processor = platform.machine()
    if sys.platform != "linux" or processor not in elf_needs.MACHINES.values():
        # tools/wheel.py refuses other platforms in one line
        pytest.skip("wheels with a build are made for Linux on x86-64 and aarch64")
    made = wheel.make(tmp_path / "dist", processor, None, native.executorch_folder().resolve(), Progress())[1]
    with zipfile.ZipFile(made) as archive:
        archive.extractall(tmp_path / "site")
    folder = tmp_path / "site" / "moec" / "runtime" / "shipped"
    files = [elf_needs.read(folder / path.name) for path in native.native_files().all]
    assert made.name.endswith(f"-py3-none-{elf_needs.tag(files)}.whl")
    record = shipped.read_record(folder)
    assert record is not None
    assert record.sources == native.source_digest()
    assert native.NativeFiles(folder, "").intact()
    (tmp_path / "site" / "executorch").symlink_to(native.executorch_folder())
    runner = folder / "moec_runner"
    runner.chmod(0o755)
    said = subprocess.run([runner, "--help"], capture_output=True, text=True, env={}, check=False)
    assert "usage" in (said.stdout + said.stderr).lower()
