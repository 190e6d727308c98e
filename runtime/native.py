"""Finds the native part (kernels, runtime, runner), and builds it against the executorch wheel where there is none.

A wheel for this platform brings it (shipped.py). Elsewhere, in a checkout, and where what came does not fit, the three
files live in one folder of a cache, named by a digest of the sources, the executorch wheel and the flags. A build
happens at first use, or by `python -m moec.runtime.native build`; it is done in a work tree and renamed into place,
under a lock, so that concurrent processes and a Ctrl-C leave no half-built library behind.

Environment: MOEC_NATIVE_DIR (the cache folder, default ~/.cache/moec/native; if set, what a wheel brought is not used),
CXX (the compiler), MOEC_SANITIZE (-fsanitize= value; an own build beside the usual one).
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from moec.compiler.errors import UserError
from moec.compiler.progress import Progress
from moec.runtime import shipped

_HERE = Path(__file__).resolve().parent
MAX_THREADS = 256  # kMostThreads of kernels/core/parallel.cpp
_SUFFIXES = {".h", ".cpp", ".inl", ".txt", ".cmake"}
_LIBRARY_SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"


@dataclass(frozen=True)
class NativeFiles:
    """Paths of one build. `digest` names its sources, versions and flags; artifacts record it."""

    folder: Path
    digest: str

    @property
    def kernels(self) -> Path:
        return self.folder / f"libmoec_kernels{_LIBRARY_SUFFIX}"

    @property
    def runtime(self) -> Path:
        return self.folder / f"libmoec_runtime{_LIBRARY_SUFFIX}"

    @property
    def runner(self) -> Path:
        return self.folder / "moec_runner"

    @property
    def all(self) -> tuple[Path, Path, Path]:
        return self.kernels, self.runtime, self.runner

    @property
    def sums(self) -> Path:
        return self.folder / "SHA256SUMS"

    def built(self) -> bool:
        return all(p.is_file() for p in self.all)

    def intact(self) -> bool:
        """Whether all files are there as they were built."""
        if not self.built() or not self.sums.is_file():
            return False
        return self.sums.read_text("utf-8", errors="replace") == self.text_of_sums()

    def complete(self) -> bool:
        """Whether a folder of the cache is intact. UserError for files that somebody else can change.

        A damaged file, as a full disk or a lost machine leaves it, is no build: it is made again.
        """
        if not self.built() or not self.sums.is_file():
            return False
        for place in (self.folder.parent, self.folder, self.sums, *self.all):
            _check_owner(place)
        return self.intact()

    def text_of_sums(self) -> str:
        """As `sha256sum` writes it."""
        return "".join(f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}\n" for p in self.all)


_built: NativeFiles | None = None


def native_files(*, progress: Progress | None = None) -> NativeFiles:
    """The files that the wheel brought or that were built, building them first if needed.

    UserError when that is impossible (no compiler, no executorch).
    """
    global _built
    if _built is None:
        _built = _find_or_build(progress or Progress())
    return _built


def kernels_library() -> Path:
    """The kernel library; where no wheel brought it, built on first use."""
    return native_files().kernels


def runtime_library() -> Path:
    """The runtime library; where no wheel brought it, built on first use."""
    return native_files().runtime


def runner_binary() -> Path:
    """The command-line runner; where no wheel brought it, built on first use."""
    return native_files().runner


def cache_folder() -> Path:
    """Where built libraries are kept: MOEC_NATIVE_DIR, or moec/native in the user's cache folder."""
    override = os.environ.get("MOEC_NATIVE_DIR")
    if override:
        return Path(override).expanduser().resolve()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "moec" / "native"


def executorch_folder() -> Path:
    """The installed wheel's package folder (headers, libraries, CMake package)."""
    try:
        import executorch
    except ImportError as error:
        raise UserError("the executorch package is not installed", remedy="pip install executorch==1.5.1") from error
    for base in list(executorch.__path__):
        if (Path(base) / "share/cmake/executorch-config.cmake").is_file():
            return Path(base)
    raise UserError(
        "the installed executorch has no C++ headers and CMake package", remedy="pip install executorch==1.5.1"
    )


def obstacle() -> str | None:
    """Why there are no kernels and none can be built, in one line; None if there are or can be."""
    try:
        sources = _read_sources()
        digest = _digest(sources, os.environ.get("MOEC_SANITIZE", ""))
        if _shipped(sources)[0] is None and not NativeFiles(cache_folder() / digest, digest).complete():
            find_compiler()
    except UserError as error:
        return str(error)
    return None


def build(*, progress: Progress | None = None) -> NativeFiles:
    """Build unless the cache has this build already."""
    return native_files(progress=progress)


def _find_or_build(progress: Progress) -> NativeFiles:
    sources = _read_sources()
    sanitize = os.environ.get("MOEC_SANITIZE", "")
    brought, unfit = _shipped(sources)
    if brought is not None:
        return brought
    # A cache that was built elsewhere with the same sources serves a machine without a compiler: look it up by sources
    # and versions first, the compiler only decides when something has to be built.
    digest = _digest(sources, sanitize)
    cache = cache_folder()
    files = NativeFiles(cache / digest, digest)
    if files.complete():
        return files
    if unfit:
        progress.write(f"the kernels that came with moec are not used, and are built here: {unfit}")
    compiler = find_compiler()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / "lock", progress):
            if not files.complete():
                _build_into(
                    files,
                    cache / ("tree-" + (re.sub(r"\W", "-", sanitize) or "plain")),
                    sources,
                    compiler,
                    sanitize,
                    progress,
                )
                _forget_old_builds(cache, keep=files.folder)
    except OSError as error:
        raise UserError(
            f"cannot build the kernels: {error.strerror or error}",
            place=str(error.filename or cache),
            remedy="free some space or set MOEC_NATIVE_DIR to a writable folder",
        ) from error
    return files


def _shipped(sources: dict[str, bytes]) -> tuple[NativeFiles | None, str | None]:
    """What the wheel brought, if it fits; else None and the reason, which is None where another build was asked for."""
    own_build = os.environ.get("MOEC_NATIVE_DIR") or os.environ.get("MOEC_SANITIZE")
    if own_build or not shipped.FOLDER.is_dir():
        return None, None
    digest = _digest_of(sources)
    wheel = executorch_folder()
    unfit = shipped.mismatch(shipped.FOLDER, sources=digest, executorch=_executorch_version(), executorch_folder=wheel)
    files = NativeFiles(shipped.FOLDER, digest)
    if unfit is None and not files.intact():
        unfit = f"a file in {shipped.FOLDER} is missing or damaged"
    return (files, None) if unfit is None else (None, unfit)


def _read_sources() -> dict[str, bytes]:
    """Relative path -> bytes of everything that is compiled: a snapshot, in case a file changes while building."""
    sources = {"CMakeLists.txt": (_HERE / "CMakeLists.txt").read_bytes()}
    for folder in ("kernels", "probe", "runner", "app", "include", "portable"):
        for path in sorted((_HERE / folder).rglob("*")):
            if path.is_file() and path.suffix in _SUFFIXES and "bench" not in path.relative_to(_HERE).parts[1:-1]:
                sources[str(path.relative_to(_HERE))] = path.read_bytes()
    return sources


def _executorch_version() -> str:
    try:
        return version("executorch")
    except PackageNotFoundError:
        return "none"


def _digest(sources: dict[str, bytes], sanitize: str) -> str:
    h = hashlib.sha256()
    # the wheel's folder is in the libraries' run path: another environment needs its own build
    for part in (
        _executorch_version(),
        str(executorch_folder()),
        platform.machine(),
        sys.platform,
        sanitize,
        os.environ.get("CXX", ""),
    ):
        h.update(part.encode() + b"\0")
    for name, data in sources.items():
        h.update(name.encode() + b"\0" + hashlib.sha256(data).digest())
    return h.hexdigest()[:16]


def source_digest() -> str:
    """Digest of the kernel's sources alone (no paths, no compiler): equal on every machine with the same checkout."""
    return _digest_of(_read_sources())


def _digest_of(sources: dict[str, bytes]) -> str:
    h = hashlib.sha256()
    for name, data in sources.items():
        h.update(name.encode() + b"\0" + hashlib.sha256(data).digest())
    return h.hexdigest()[:16]


def find_compiler(asked: str | None = None) -> str:
    """The path of a C++ compiler: the one that is asked for, that of CXX, or the first of the usual names."""
    asked = asked or os.environ.get("CXX")
    candidates = [asked] if asked else ["c++", "g++", "clang++"]
    for name in candidates:
        found = shutil.which(name)
        if found:
            return found
    raise UserError(
        f"no C++ compiler found (tried {', '.join(candidates)})",
        remedy="install g++ 11 or clang 14 or newer (Debian: apt-get install g++), or set CXX",
    )


def _tool(name: str) -> str:
    """cmake or ninja: the interpreter's own environment first (installed by pip), then PATH."""
    own = Path(sys.executable).parent / name
    if own.is_file():
        return str(own)
    found = shutil.which(name)
    if found:
        return found
    raise UserError(f"{name} is not installed", remedy="pip install 'moec[build]'")


@contextmanager
def _locked(path: Path, progress: Progress) -> Iterator[None]:
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.write("waiting for another process that builds the kernels")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield  # closing the file releases the lock


def _build_into(
    files: NativeFiles, tree: Path, sources: dict[str, bytes], compiler: str, sanitize: str, progress: Progress
) -> None:
    _sync(tree / "src", sources)
    out = _compile(tree, compiler, executorch_folder(), [f"-DMOEC_SANITIZE={sanitize}"], progress)
    built = NativeFiles(out, files.digest)
    staging = files.folder.with_name(f"{files.folder.name}.new-{os.getpid()}")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(mode=0o755)
        staged = _copied(built, staging)
        for path in (*staged.all, staged.sums, staging):  # on the disk before the name that says so
            _flush(path)
        shutil.rmtree(files.folder, ignore_errors=True)  # an incomplete one: a complete one would have been used
        staging.rename(files.folder)
        _flush(files.folder.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _compile(tree: Path, compiler: str, executorch: Path, options: list[str], progress: Progress) -> Path:
    """Build the sources in `tree`/src against the package folder `executorch`; the folder with the three files."""
    cmake, ninja, work = _tool("cmake"), _tool("ninja"), tree / "build"
    _drop_stale_tree(work, cmake, compiler, executorch)
    configure = [cmake, "-S", str(tree / "src"), "-B", str(work), "-G", "Ninja"]
    configure += [f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DCMAKE_CXX_COMPILER={compiler}", "-DCMAKE_BUILD_TYPE=Release"]
    configure += ["-DMOEC_EXECUTORCH=ON", f"-Dexecutorch_DIR={executorch / 'share/cmake'}", *options]
    with progress.stage("build kernels", total=None) as step:
        _run(configure, step)
        _run([cmake, "--build", str(work)], step)
    if not NativeFiles(work / "out", "").built():
        raise AssertionError(f"the build left {work / 'out'} incomplete")
    return work / "out"


def _copied(built: NativeFiles, folder: Path) -> NativeFiles:
    """The three files in `folder`, with their sums."""
    copy = NativeFiles(folder, built.digest)
    for path in built.all:
        shutil.copy2(path, folder / path.name)
        (folder / path.name).chmod(0o755)
    copy.sums.write_text(copy.text_of_sums(), "utf-8")
    copy.sums.chmod(0o644)
    return copy


def build_portable(
    into: Path, *, executorch: Path, version: str, processor: str, cross_compiler: str | None, progress: Progress
) -> NativeFiles:
    """Build what a wheel for Linux brings, with its record (shipped.py), into the empty folder `into`.

    executorch: the package folder of a wheel for `processor` ("x86_64", "aarch64"), of version `version`.
    UserError when it cannot be built.
    """
    sources = _read_sources()
    compiler = find_compiler(cross_compiler)
    options = ["-DMOEC_PORTABLE=ON"]
    if cross_compiler:
        options += ["-DCMAKE_SYSTEM_NAME=Linux", f"-DCMAKE_SYSTEM_PROCESSOR={processor}"]
    tree = cache_folder() / f"tree-portable-{processor}"
    tree.mkdir(parents=True, exist_ok=True)
    with _locked(tree / "lock", progress):
        _sync(tree / "src", sources)
        out = _compile(tree, compiler, executorch, options, progress)
        files = _copied(NativeFiles(out, _digest_of(sources)), into)
    shipped.Record(files.digest, version, processor, "linux").write(into)
    return files


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _check_owner(path: Path) -> None:
    """UserError for what another user owns or may write: its code would run in this process."""
    status = path.stat()
    foreign = status.st_uid not in (os.geteuid(), 0)
    open_to_others = status.st_mode & 0o002 or (status.st_mode & 0o020 and status.st_gid != os.getegid())
    if foreign or open_to_others:
        what = f"belongs to user {status.st_uid}" if foreign else "can be written by other users"
        raise UserError(
            f"built kernels are not loaded from here: it {what}",
            place=str(path),
            remedy="remove it, or set MOEC_NATIVE_DIR to a folder of your own",
        )


def _sync(folder: Path, sources: dict[str, bytes]) -> None:
    """Make `folder` hold exactly `sources`; unchanged files keep their time stamps, so ninja rebuilds only the rest."""
    for path in [p for p in folder.rglob("*") if p.is_file()] if folder.is_dir() else []:
        if str(path.relative_to(folder)) not in sources:
            path.unlink()
    for name, data in sources.items():
        path = folder / name
        if path.is_file() and path.read_bytes() == data:
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _drop_stale_tree(work: Path, cmake: str, compiler: str, wheel: Path) -> None:
    """CMake caches absolute paths of tools and of the project: a tree of another environment, or of a version whose
    sources lay elsewhere, is started afresh."""
    stamp = work / "moec-tools.txt"
    wanted = "\n".join(
        (cmake, compiler, str(wheel), version("executorch"), str(Path(compiler).resolve().stat().st_mtime))
    )
    same = stamp.is_file() and stamp.read_text() == wanted and _is_of(work, work.parent / "src")
    if work.is_dir() and not same:
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    stamp.write_text(wanted)


def _is_of(work: Path, sources: Path) -> bool:
    """Whether a build folder was configured for the project in `sources`."""
    cache = work / "CMakeCache.txt"
    lines = cache.read_text("utf-8", "replace").splitlines() if cache.is_file() else ()
    found = next((line.partition("=")[2] for line in lines if line.startswith("CMAKE_HOME_DIRECTORY:")), str(sources))
    return Path(found).resolve() == sources.resolve()


def _run(command: list[str], step: object) -> None:
    """Run a build command; its output is shown only when it fails."""
    lines: list[str] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip())
            if re.match(r"\[\d+/\d+\]", line):
                step(line.strip().split(" ")[0])  # type: ignore[operator]
    if process.returncode:
        errors = [line for line in lines if "error" in line.lower()] or lines
        sys.stderr.write("\n".join(lines[-60:]) + "\n")
        raise UserError(
            f"building the kernels failed: {errors[0].strip() if errors else 'no output'}",
            remedy="the compiler's output is above; g++ 11 or clang 14 or newer is needed",
        )


def _forget_old_builds(cache: Path, *, keep: Path, most: int = 6) -> None:
    """Old digests pile up while developing. A library that is mapped by a live process survives its unlinking."""
    builds = [p for p in cache.iterdir() if re.fullmatch(r"[0-9a-f]{16}", p.name) and p != keep]
    builds.sort(key=lambda p: p.stat().st_mtime, reverse=True)
    for old in builds[most - 1 :]:
        shutil.rmtree(old, ignore_errors=True)


# ---- checks of the kernel core, for people who work on it

SANITIZERS = ("address,undefined", "thread")


def checks_folder() -> Path:
    """The C++ check programs of the checkout. UserError from an installed wheel, which has none."""
    folder = _HERE.parent / "tests" / "runtime" / "native"
    if not folder.is_dir():
        raise UserError("the native checks are not installed", remedy="run this in a checkout of the repository")
    return folder


def build_checks(
    names: Sequence[str] = (),
    *,
    sanitize: str = "",
    cross_compiler: str | None = None,
    processor: str = "",
    progress: Progress | None = None,
) -> list[Path]:
    """Build tests/runtime/native/*_check.cpp with the kernel core, for another `processor` with `cross_compiler`.

    `names`: which, as `attention` (default: all). Returns the programs.
    """
    progress = progress or Progress()
    sources = checks_folder()
    programs = sorted(f"{name}_check" for name in names) or sorted(path.stem for path in sources.glob("*_check.cpp"))
    variant = re.sub(r"\W", "-", "-".join(filter(None, (processor, sanitize)))) or "plain"
    compiler = cross_compiler or find_compiler()
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / f"checks-{variant}.lock", progress):
        work = cache / f"checks-{variant}"
        _drop_stale_tree(work, _tool("cmake"), compiler, _HERE)
        configure = [_tool("cmake"), "-S", str(sources), "-B", str(work), "-G", "Ninja"]
        configure += [f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}", f"-DCMAKE_CXX_COMPILER={compiler}"]
        configure += [f"-DMOEC_KERNEL_DIR={_HERE / 'kernels'}", f"-DMOEC_SANITIZE={sanitize}"]
        configure += ["-DCMAKE_BUILD_TYPE=Release"]
        if cross_compiler:
            configure += ["-DCMAKE_SYSTEM_NAME=Linux", f"-DCMAKE_SYSTEM_PROCESSOR={processor}"]
        with progress.stage(f"build native checks ({variant})") as step:
            _run(configure, step)
            _run([_tool("cmake"), "--build", str(work), "--target", *programs], step)
    return [work / name for name in programs]


def run_sanitized() -> int:
    """Run every check under ASan with UBSan, and under TSan. 0 when all are clean."""
    failed = 0
    for sanitizer in SANITIZERS:
        for program in build_checks(sanitize=sanitizer):
            status = subprocess.run([str(program)], check=False).returncode
            print(
                f"{program.name} ({sanitizer}): {'clean' if status == 0 else f'failed with status {status}'}",
                flush=True,
            )
            failed += status != 0
    return 1 if failed else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m moec.runtime.native", description=__doc__)
    parser.add_argument("action", choices=["build", "path", "sanitize", "clean"])
    action = parser.parse_args(arguments).action
    try:
        if action == "clean":
            shutil.rmtree(cache_folder(), ignore_errors=True)
            return 0
        if action == "sanitize":
            return run_sanitized()
        print(native_files().folder)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
