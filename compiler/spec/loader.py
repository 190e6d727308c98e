"""From a YAML file to a `Spec` (or a `Device`): every fault at once, each as `file:line:column: path: message`."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from moec.compiler.errors import SpecError
from moec.compiler.spec.device import Device, is_device_file
from moec.compiler.spec.model import Spec
from moec.compiler.spec.strict import Section
from moec.compiler.spec.yaml_tree import MAX_BYTES, MAX_DEPTH, Mark, Tree, YamlError, read_tree

Path_ = tuple[str | int, ...]
S = TypeVar("S", bound=Section)


def load_spec(file: str | Path) -> Spec:
    """Read and check a spec. Relative paths in it are resolved against its folder.

    Errors: SpecError with one line per fault.
    """
    file = Path(file)
    return parse_spec(_read(file), file=str(file), folder=file.parent)


def parse_spec(text: str, *, file: str = "<spec>", folder: Path | None = None) -> Spec:
    """A spec from text; `file` is the name in messages, `folder` the base of relative paths (default: as written)."""
    spec = parse_section(Spec, text, file=file, noun="a spec")
    return spec if folder is None else _resolved(spec, folder)


def as_spec(given: Spec | Mapping[str, Any] | str | Path) -> Spec:
    """A `Spec` as it is, a mapping of a spec's keys checked, or the file of that path read.

    Relative paths of a mapping stay relative to the working directory. Errors: SpecError with one line per fault.
    """
    if isinstance(given, Spec):
        return given
    if not isinstance(given, Mapping):
        return load_spec(given)
    values = _plain(given)
    try:
        return Spec.model_validate(values)
    except ValidationError as error:
        name = values.get("name")
        place = name if isinstance(name, str) and name.isprintable() else "spec"
        faults = {path_text(tuple(d["loc"])): d["msg"].removeprefix("Value error, ") for d in error.errors()}
        raise SpecError("\n".join(f"{place}: {path}: {what}" for path, what in faults.items())) from None


def _plain(value: Any, depth: int = 0) -> Any:
    """Mappings of any kind as dictionaries, all the way down: what the sections of a spec take.

    SpecError for one that contains itself, or is nested as deeply as no spec is.
    """
    if depth > MAX_DEPTH:
        raise SpecError(f"spec: nested more than {MAX_DEPTH} levels deep, or contains itself")
    if isinstance(value, Mapping):
        return {key: _plain(inner, depth + 1) for key, inner in value.items()}
    return [_plain(inner, depth + 1) for inner in value] if isinstance(value, (list, tuple)) else value


def load_device_file(file: str | Path) -> Device:
    """Read and check a device file. SpecError with one line per fault."""
    return parse_section(Device, _read(Path(file), "device"), file=str(file), noun="a device")


def parse_section(kind: type[S], text: str, *, file: str, noun: str) -> S:
    """A document of class `kind` from text; SpecError with one line per fault."""
    try:
        tree, yaml_faults = read_tree(text)
    except YamlError as error:
        raise SpecError(f"{file}:{error.mark.line}:{error.mark.column}: {error.message}") from None
    if not isinstance(tree.data, dict):
        raise SpecError(f"{file}:{tree.mark.line}:{tree.mark.column}: {noun} is a mapping that starts with `name:`")
    found = {fault.path: (fault.mark, fault.message) for fault in reversed(yaml_faults)}
    value: S | None = None
    try:
        value = kind.model_validate(tree.data)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            path, mark = locate(tree, tuple(detail["loc"]), is_key=detail["type"] == "unknown_key")
            found.setdefault(path, (mark, detail["msg"].removeprefix("Value error, ")))
    if found:
        lines = sorted((mark, path_text(path), message) for path, (mark, message) in found.items())
        raise SpecError(
            "\n".join(f"{file}:{mark.line}:{mark.column}: {path + ': ' if path else ''}{m}" for mark, path, m in lines)
        )
    assert value is not None
    return value


def _read(file: Path, noun: str = "spec") -> str:
    try:
        if file.is_dir():
            raise SpecError(f"is a folder, expected a YAML {noun}", place=str(file))
        with file.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise SpecError(f"no such {noun}", place=str(file)) from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise SpecError(f"cannot be read: {getattr(error, 'strerror', None) or error}", place=str(file)) from None
    if len(content) > MAX_BYTES:
        raise SpecError(f"larger than {MAX_BYTES // 1024} KiB, expected a YAML {noun}", place=str(file))
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise SpecError(f"not UTF-8 text, expected a YAML {noun}", place=f"{file}:{line}:1") from None


def locate(tree: Tree, loc: Path_, *, is_key: bool = False) -> tuple[Path_, Mark]:
    """The path and place of a fault. A missing key is placed at the section that lacks it."""
    mark = tree.mark
    path: list[str | int] = []
    for element in loc:
        step = _step(tree, element)
        path.append(element)
        if step is None:
            break
        key_mark, tree = step
        is_last = len(path) == len(loc)
        mark = key_mark if (is_key and is_last) or isinstance(tree.data, (dict, list)) else tree.mark
    return tuple(path) if len(path) == len(loc) else loc, mark


def _step(tree: Tree, element: str | int) -> tuple[Mark, Tree] | None:
    if element in tree.values:
        return tree.keys[element], tree.values[element]
    if not isinstance(tree.data, list):
        return None
    # a list of targets is read as a mapping: find the item of that name
    for item in tree.values.values():
        if item.data == element:
            return item.mark, item
        if isinstance(item.data, dict) and element in item.values:
            return item.keys[element], item.values[element]
    return None


def path_text(path: Path_) -> str:
    """`("training", "stages", 0, "name")` -> `training.stages[0].name`."""
    text = ""
    for element in path:
        text += f"[{element}]" if isinstance(element, int) else f".{element}" if text else str(element)
    return text.encode("utf-8", "replace").decode().replace("\n", "\\n")


def _resolved(spec: Spec, folder: Path) -> Spec:
    changes: dict[str, Any] = {}
    if spec.checkpoint is not None:
        changes["checkpoint"] = _absolute(spec.checkpoint, folder)
    paths: dict[str, Any] = {name: _absolute(value, folder) for name, value in spec.model if isinstance(value, Path)}
    for name, value in spec.model:
        if isinstance(value, tuple) and any(isinstance(path, Path) for path in value):
            paths[name] = tuple(_absolute(path, folder) if isinstance(path, Path) else path for path in value)
    if paths:
        changes["model"] = spec.model.model_copy(update=paths)
    given = None if spec.quantization is None else spec.quantization.calibration
    if spec.quantization is not None and given is not None:
        found = {n: _absolute(path, folder) for n in ("text", "jsonl") if (path := getattr(given, n)) is not None}
        resolved = given.model_copy(update=found)
        changes["quantization"] = spec.quantization.model_copy(update={"calibration": resolved})
    if spec.device is not None and is_device_file(spec.device):
        changes["device"] = str(_absolute(Path(spec.device), folder))
    return spec.model_copy(update=changes) if changes else spec


def _absolute(path: Path, folder: Path) -> Path:
    with contextlib.suppress(RuntimeError):  # an unknown user: whoever opens the path will say that it is missing
        path = path.expanduser()
    return path if path.is_absolute() else (folder / path).absolute()
