"""What commands print: data to stdout (`--json` for machines), everything else to stderr."""

from __future__ import annotations

import json
import math
import os
import stat
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

from moec.compiler.errors import UserError
from moec.compiler.units import CONTROL, printable
from moec.compiler.units import size as size  # commands take it from here with the rest of what they print with


def plain(value: Any) -> Any:
    """`value` as JSON holds it: paths as text, tuples as lists, a non-finite number as null (JSON has none)."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int, bool)):
        return value
    if hasattr(value, "model_dump"):
        return plain(value.model_dump(mode="json"))
    return str(value)


def json_text(value: Any) -> str:
    text = json.dumps(plain(value), indent=2, ensure_ascii=False)
    # JSON itself escapes the control characters below 32
    return CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def say(text: str, *, stream: TextIO | None = None) -> None:
    """A line, or several, that names what a file holds: nothing in it commands the terminal. stream: default stdout."""
    print(printable(text), file=stream or sys.stdout)


def emit_json(value: Any) -> None:
    print(json_text(value))


def check_writable(*files: Path | None) -> None:
    """UserError naming the first file that could not be written, before work is spent on it. Skips None and `-`."""
    for file in files:
        if file is None or str(file) == "-":
            continue
        if file.is_dir():
            raise UserError("is a folder", place=str(file), remedy="choose another file")
        if _belongs(file):
            raise UserError(
                "belongs to the artifact, checkpoint, run or corpus in its folder",
                place=str(file),
                remedy="choose another file",
            )
        above = next(folder for folder in file.absolute().parents if folder.exists())
        if not above.is_dir():
            raise UserError(f"cannot be written: {above} is no folder", place=str(file), remedy="choose another file")
        if not os.access(file if file.exists() else above, os.W_OK):
            raise UserError("cannot be written: no permission", place=str(file), remedy="choose another file")


def check_apart(a: Path | None, b: Path | None) -> None:
    """UserError if two options name one file."""
    if a is not None and b is not None and str(a) != "-" and a.resolve() == b.resolve():
        raise UserError("two outputs go to this file", place=str(a), remedy="choose another file for one of them")


#: Files that make a folder an artifact, a checkpoint, a run or a corpus. No report may replace a file of such a folder.
_MARKERS = ("manifest.json", "config.json", "run.json", "corpus.json")
_PARTS = (*_MARKERS, "tokenizer.json", "tokenizer_config.json", "metrics.jsonl", "model.safetensors.index.json")
_PART_SUFFIXES = (".pte", ".onnx", ".data", ".mlir", ".vmfb", ".safetensors", ".tokens", ".docs", ".mask")


def _belongs(file: Path) -> bool:
    file = file.resolve()
    if not file.exists() or not any((file.parent / marker).exists() for marker in _MARKERS):
        return False
    return file.name in _PARTS or file.suffix in _PART_SUFFIXES


def write_text(file: Path, text: str) -> None:
    """Write `text` completely, or leave the old file as it is. UserError naming the file when it cannot be written."""
    check_writable(file)
    part: Path | None = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists() and not stat.S_ISREG(file.stat().st_mode):  # a pipe or a device is written to, not replaced
            file.write_text(text, "utf-8")
            return
        whole = file.resolve()
        part = whole.with_name(f".{whole.name}.part{os.getpid()}")
        part.write_text(text, "utf-8")
        part.replace(whole)
    except OSError as error:
        if part is not None:
            part.unlink(missing_ok=True)
        raise UserError(f"cannot be written: {error.strerror}", place=str(file), remedy="choose another file") from None


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], *, right: Sequence[int] = ()) -> None:
    """A table on stdout; plain text where stdout is no terminal. `right` lists the columns of numbers."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shape = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        shape.add_column(column, justify="right" if index in right else "left", overflow="fold")
    for row in rows:
        shape.add_row(*[Text(printable(str(cell))) for cell in row])
    # no wrapping where a program reads: a width that no row reaches, and no padding at the end of a line
    console = Console(width=None if sys.stdout.isatty() else 10_000, highlight=False)
    with console.capture() as captured:
        # not the table's own title, which wraps where columns are narrow
        console.print(Text(printable(title), style="italic"))
        console.print(shape)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def words(value: Any) -> str:
    """A value for people: `{"a": 1, "b": {"c": true}}` becomes `a 1, b (c true)`."""
    if isinstance(value, dict):
        return ", ".join(f"{k} ({words(v)})" if isinstance(v, dict) else f"{k} {words(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(words(item) for item in value) or "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:g}" if isinstance(value, float) else str(value)
