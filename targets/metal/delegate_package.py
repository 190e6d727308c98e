"""The MLX delegate's Python, made importable.

The executorch wheel ships the delegate's schema (`schema.fbs`) and its code generator, not the generated modules, so
`import executorch.backends.mlx` fails. The generator's Python part is run once into a cache folder (keyed by a digest
of its sources and the wheel's version), and a finder on `sys.meta_path` supplies what is missing. Nothing in the wheel
is changed, and a build of executorch that has the modules is used as it is.

`activate()` is for lowering, which needs the delegate's builder. `bindings()` is for reading a file: flatbuffer classes
alone, in a package of their own, so that running an artifact does not wait for executorch to be imported.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import io
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

from moec.compiler.errors import CompileError, MissingExtra

PACKAGE = "executorch.backends.mlx"
BINDINGS = "moec_delegate_bindings"
_LAYOUT = "2"  # of the cache folder; part of its name
_GENERATED = ("serialization/mlx_graph_schema.py", "serialization/_generated_serializers.py", "_generated_inspector.py")


def require_mlx() -> Any:
    """`mlx.core`, or MissingExtra with the line that installs it. The device is MOEC_MLX_DEVICE (cpu unless set)."""
    try:
        import mlx.core as mx
    except ImportError as e:
        raise MissingExtra(
            "executing a Metal artifact needs the mlx package", remedy="pip install 'moec[metal]'"
        ) from e
    wanted = os.environ.get("MOEC_MLX_DEVICE", "cpu")
    if wanted not in ("cpu", "gpu"):
        raise MissingExtra(f"MOEC_MLX_DEVICE is {wanted!r}", remedy="set it to cpu or gpu")
    if wanted == "gpu" and not mx.metal.is_available():
        raise MissingExtra("MOEC_MLX_DEVICE=gpu, but MLX finds no Metal device", remedy="unset it to use the CPU")
    mx.set_default_device(mx.gpu if wanted == "gpu" else mx.cpu)
    return mx


@cache
def activate() -> None:
    """Make `executorch.backends.mlx` importable in this process, and import it. Cheap after the first call."""
    home = _wheel_folder()
    if not (home / "serialization" / "mlx_graph_schema.py").exists():
        folder = generated_folder(home)
        sys.meta_path.insert(0, _Finder(home, folder))
    # its dependencies warn, on every import, about optional libraries of other devices
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        importlib.import_module(PACKAGE)
    finally:
        logging.disable(disabled)


@cache
def bindings(module: str) -> Any:
    """A module of flatbuffer classes: `mlx_delegate.X`, `executorch_flatbuffer.X`, or `fields`."""
    if BINDINGS not in sys.modules:
        here = generated_folder() / "bindings"
        spec = importlib.util.spec_from_file_location(
            BINDINGS, here / "__init__.py", submodule_search_locations=[str(here)]
        )
        assert spec is not None
        assert spec.loader is not None
        sys.modules[BINDINGS] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[BINDINGS])
    return importlib.import_module(f"{BINDINGS}.{module}")


def generated_folder(home: Path | None = None) -> Path:
    """The cache folder with the generated modules, generated when it is not there yet."""
    home = home or _wheel_folder()
    folder = _cache_root() / f"mlx-delegate-{_digest(home)}"
    if not folder.exists():
        _generate(home, folder)
    return folder


def _wheel_folder() -> Path:
    spec = importlib.util.find_spec("executorch")
    roots = list(spec.submodule_search_locations or ()) if spec else []
    for root in roots:
        home = Path(root) / "backends" / "mlx"
        if (home / "serialization" / "schema.fbs").exists():
            return home
    raise CompileError("this executorch has no MLX backend", remedy="pip install executorch==1.5.1")


def _cache_root() -> Path:
    base = os.environ.get("MOEC_CACHE_DIR")
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moec"


def _digest(home: Path) -> str:
    sha = hashlib.sha256(f"{_LAYOUT} {version('executorch')}".encode())
    for name in ("schema.fbs", "generate.py"):
        sha.update((home / "serialization" / name).read_bytes())
    return sha.hexdigest()[:12]


def _generate(home: Path, folder: Path) -> None:
    """Run the generator on a copy, then rename the result into place: another process sees all of it or nothing."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix="mlx-delegate-", dir=folder.parent))
    except OSError as e:
        raise CompileError(f"cannot write: {e.strerror}", place=str(folder.parent), remedy="set MOEC_CACHE_DIR") from e
    try:
        target = work / "serialization"
        target.mkdir()
        for name in ("schema.fbs", "generate.py"):
            shutil.copy(home / "serialization" / name, target / name)
        generator = _load(target / "generate.py")
        schema = generator.parse_fbs(target / "schema.fbs")
        _run_flatc(target / "schema.fbs", target / "_generated")
        with contextlib.redirect_stdout(io.StringIO()):
            generator._fixup_flatc_imports()
        makers = (generator.generate_python_schema, generator.generate_python_serializers, generator.generate_inspector)
        for name, make in zip(_GENERATED, makers, strict=True):
            (work / name).write_text(make(schema))
        names = sorted(t.name for group in (schema.tables, schema.enums, schema.structs, schema.unions) for t in group)
        bindings = f"{PACKAGE}.serialization._generated.mlx_delegate"
        (target / "_generated" / "__init__.py").write_text("".join(f"from {bindings}.{n} import {n}\n" for n in names))
        _write_bindings(home, work / "bindings", generator.generate_inspector(schema))
        (target / "__init__.py").write_text('"""Generated modules of the MLX delegate."""\n')
        try:
            os.rename(work, folder)
        except OSError:
            if not folder.exists():  # another process may have renamed the same content first
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write_bindings(home: Path, out: Path, fields: str) -> None:
    """The classes of the delegate's schema and of the program's, importing each other within our package."""
    schemas = {
        "mlx_delegate": home / "serialization" / "schema.fbs",
        "executorch_flatbuffer": home.parents[1] / "exir" / "_serialize" / "program.fbs",
    }
    for namespace, schema in schemas.items():
        _run_flatc(schema, out)
        for file in (out / namespace).glob("*.py"):
            text = file.read_text()
            file.write_text(text.replace(f"from {namespace}.", f"from {BINDINGS}.{namespace}."))
    (out / "fields.py").write_text(fields)
    (out / "__init__.py").write_text('"""Flatbuffer classes of ExecuTorch programs and MLX delegates."""\n')


def _run_flatc(schema: Path, out: Path) -> None:
    home = importlib.util.find_spec("executorch")
    for root in (home.submodule_search_locations or ()) if home else ():
        flatc = Path(root) / "data" / "bin" / "flatc"
        if flatc.exists():
            break
    else:
        raise CompileError("the executorch wheel has no flatc", remedy="reinstall executorch==1.5.1")
    out.mkdir(exist_ok=True)
    done = subprocess.run(
        [str(flatc), "--python", "-o", str(out), str(schema)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise CompileError(f"flatc failed on {schema.name}: {done.stderr.strip()}")


def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("moec_mlx_delegate_generator", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    return module


class _Finder(importlib.abc.MetaPathFinder):
    """Supplies `serialization` (with the wheel's folder behind the generated one) and `_generated_inspector`."""

    def __init__(self, home: Path, folder: Path) -> None:
        self._home, self._folder = home, folder

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname == f"{PACKAGE}._generated_inspector":
            return importlib.util.spec_from_file_location(fullname, self._folder / "_generated_inspector.py")
        if fullname == f"{PACKAGE}.serialization":
            here = self._folder / "serialization"
            return importlib.util.spec_from_file_location(
                fullname,
                here / "__init__.py",
                submodule_search_locations=[str(here), str(self._home / "serialization")],
            )
        return None
