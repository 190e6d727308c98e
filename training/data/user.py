"""A user's own text as a domain: `NAME=PATH`, a text file, a folder of them, or JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from moec.training.data.document import Document
from moec.training.data.shards import DataError, check_domain_name

_TEXTS = {".txt", ".md", ".rst", ".py", ".tex", ".text"}
_LINES = {".jsonl", ".ndjson"}
_FORMS = 'each line is {"text": ...} or {"prompt": ..., "response": ...}'


def parse_addition(argument: str) -> tuple[str, Path]:
    """`NAME=PATH` of the command line; DataError when it has another form or nothing is there."""
    name, equals, path = argument.partition("=")
    if not equals or not name or not path:
        raise DataError(f"--add {argument!r} has the wrong form", remedy="write it as NAME=PATH")
    check_domain_name(name)
    if not Path(path).exists():
        raise DataError("no such file or folder", place=path)
    return name, Path(path)


def user_documents(path: Path) -> Iterator[Document]:
    """The documents of a file or a folder, in the order of the file names; empty ones are left out.

    DataError naming file and line for what cannot be read, and when a folder has no file of a known kind.
    """
    if path.is_file():
        yield from _file(path)
        return
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix.lower() in _TEXTS | _LINES)
    if not files:
        kinds = " ".join(sorted(_TEXTS | _LINES))
        raise DataError("no file of text in this folder", place=str(path), remedy=f"it reads {kinds}")
    for file in files:
        yield from _file(file)


def _file(file: Path) -> Iterator[Document]:
    if file.suffix.lower() in _LINES:
        yield from _lines(file)
        return
    try:
        text = file.read_text("utf-8").strip()
    except UnicodeDecodeError as error:
        raise DataError(f"is not UTF-8 at byte {error.start}", place=str(file), remedy="convert it to UTF-8") from None
    if text:
        yield Document(text)


def _lines(file: Path) -> Iterator[Document]:
    with file.open("rb") as stream:
        for number, raw in enumerate(stream, 1):
            place = f"{file}:{number}"
            try:
                line = raw.decode("utf-8")
                row = json.loads(line) if line.strip() else None
            except (UnicodeDecodeError, ValueError) as error:
                raise DataError(f"not JSON: {str(error).splitlines()[0]}", place=place, remedy=_FORMS) from None
            except RecursionError:
                raise DataError("nested too deeply", place=place, remedy=_FORMS) from None
            if row is None:
                continue
            document = _row(row, place)
            if document.body.strip():
                yield document


def _row(row: object, place: str) -> Document:
    if not isinstance(row, dict):
        raise DataError("not an object", place=place, remedy=_FORMS)
    keys = ("prompt", "response") if "prompt" in row else ("text",)
    for key in keys:
        if not isinstance(row.get(key), str):
            raise DataError(f"no text under {key!r}", place=place, remedy=_FORMS)
        try:
            row[key].encode("utf-8")
        except UnicodeEncodeError:  # JSON can write half of a surrogate pair, which is no character
            raise DataError(f"{key!r} holds half a character", place=place, remedy="write valid Unicode") from None
    if "text" in keys:
        return Document(row["text"].strip())
    if not row["prompt"].strip() or not row["response"].strip():
        raise DataError("an empty prompt or response", place=place, remedy=_FORMS)
    return Document(prompt=row["prompt"].strip(), response=row["response"].strip(), group=row["prompt"].strip())
