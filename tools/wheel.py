"""The wheel for Linux, with the built kernels, runtime and runner; and the source distribution that it is made from.

    python tools/wheel.py [--out dist]                                   for this machine
    python tools/wheel.py --cross-compiler aarch64-linux-gnu-g++ --executorch FOLDER
                                                                         for another: FOLDER holds its executorch wheel,
                                                                         unpacked

The source distribution is made from a copy of the checkout, a wheel without native files from the source distribution,
and that wheel gets the build (runtime/shipped.py) and a tag by what its files were measured to need (elf_needs.py). The
same files give the same wheel, byte for byte, if the compiler gives the same. Prints the paths.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import elf_needs

from moec.compiler.errors import UserError
from moec.compiler.progress import Progress
from moec.runtime import native

ROOT = Path(__file__).resolve().parent.parent
FOLDER = "moec/runtime/shipped"
PROCESSORS = tuple(elf_needs.MACHINES.values())
OLDEST = min(elf_needs.SYSTEMS)
_BACKEND = "from setuptools import build_meta as backend; import sys; print(backend.{}(sys.argv[1]))"


def copied(folder: Path) -> Path:
    """The checkout's files in `folder`, as a clone has them, with what is not committed yet."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        raise UserError("not a git checkout: nothing says which files belong to a distribution", place=str(ROOT))
    folder.mkdir()
    for name in listed.stdout.split("\0")[:-1]:
        if os.path.lexists(ROOT / name):  # one that was removed is listed until that is committed
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    return folder


def backend(step: str, source: Path, out: Path) -> Path:
    """Run `build_sdist` or `build_wheel` of setuptools in `source`; the file in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _BACKEND.format(step), str(out)],
        cwd=source,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise UserError(f"{step} failed: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
    return out / done.stdout.strip().splitlines()[-1]


def distributions(work: Path) -> tuple[Path, Path]:
    """The source distribution of the checkout, and the wheel without native files that it builds."""
    sdist = backend("build_sdist", copied(work / "checkout"), work / "out")
    with tarfile.open(sdist) as archive:
        # Pythons before 3.11.4 have no filters
        filtered: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        archive.extractall(work / "unpacked", **filtered)
    (source,) = (work / "unpacked").iterdir()
    return sdist, backend("build_wheel", source, work / "out")


def executorch_version(folder: Path) -> str:
    """Of the wheel that is unpacked or installed in `folder`."""
    found = next(iter(metadata.distributions(name="executorch", path=[str(folder)])), None)
    if found is None:
        raise UserError("no executorch wheel is unpacked there", place=str(folder), remedy="unzip one into it")
    return found.version


def record_line(name: str, data: bytes) -> str:
    """A line of a wheel's RECORD."""
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
    return f"{name},sha256={digest},{len(data)}\n"


def packed(pure: Path, build: Path, tag: str, out: Path) -> Path:
    """The wheel `pure` with the files of `build`, tagged py3-none-`tag`: no file depends on a version of Python."""
    with zipfile.ZipFile(pure) as archive:
        names = [entry.filename for entry in archive.infolist() if not entry.is_dir()]
        files = {name: archive.read(name) for name in names}
    info = next(name for name in files if name.endswith(".dist-info/WHEEL")).removesuffix("WHEEL")
    files |= {f"{FOLDER}/{path.name}": path.read_bytes() for path in sorted(build.iterdir())}
    head = [
        line for line in files[f"{info}WHEEL"].decode().splitlines() if line and not line.startswith(("Tag:", "Root"))
    ]
    files[f"{info}WHEEL"] = "\n".join([*head, "Root-Is-Purelib: false", f"Tag: py3-none-{tag}", ""]).encode()
    del files[f"{info}RECORD"]
    lines = "".join(record_line(name, data) for name, data in files.items())
    files[f"{info}RECORD"] = f"{lines}{info}RECORD,,\n".encode()
    out.mkdir(parents=True, exist_ok=True)
    wheel = out / pure.name.replace("-py3-none-any.whl", f"-py3-none-{tag}.whl")
    partial = wheel.with_suffix(".partial")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, data in files.items():
            entry = zipfile.ZipInfo(name)  # of 1980, whenever it is made
            runs = name.startswith(FOLDER) and data[:4] == b"\x7fELF"
            entry.external_attr = (0o100755 if runs else 0o100644) << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, data)
    partial.rename(wheel)
    return wheel


def make(
    out: Path, processor: str, cross_compiler: str | None, executorch: Path, progress: Progress
) -> tuple[Path, Path]:
    """The source distribution and the wheel, in `out`."""
    version = executorch_version(executorch.parent)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        sdist, pure = distributions(work)
        build = work / "build"
        build.mkdir()
        built = native.build_portable(
            build,
            executorch=executorch,
            version=version,
            processor=processor,
            cross_compiler=cross_compiler,
            progress=progress,
        )
        needs = [elf_needs.read(path) for path in built.all]
        tag = elf_needs.tag(needs)
        progress.write(f"needs {elf_needs.floor(needs)}: {tag}")
        for line in elf_needs.newer(needs, OLDEST):
            progress.write(f"not in manylinux_2_{OLDEST}: {line} (runtime/portable/pins.h)")
        wheel = packed(pure, build, tag, out)
        shutil.copy2(sdist, out / sdist.name)
    return out / sdist.name, wheel


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--cross-compiler", help="a C++ compiler for the other machine, named after it")
    parser.add_argument("--executorch", type=Path, help="a folder with the other machine's executorch wheel, unpacked")
    given = parser.parse_args()
    if (given.cross_compiler is None) != (given.executorch is None):
        parser.error("--cross-compiler and --executorch go together")
    processor = Path(given.cross_compiler or platform.machine()).name.split("-")[0]
    try:
        if processor not in PROCESSORS or sys.platform != "linux":
            raise UserError(f"wheels with a build are made for Linux on {' and '.join(PROCESSORS)}, not {processor}")
        folder = given.executorch / "executorch" if given.executorch else native.executorch_folder()
        made = make(given.out.resolve(), processor, given.cross_compiler, folder.resolve(), Progress())
    except (UserError, elf_needs.NotPortable) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in made:
        print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
