"""A user's own text as a domain: `NAME=PATH`, a text file, a folder of them, or JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from moec.compiler.files import open_regular, read_text
from moec.training.data.document import ASSISTANT, ROLES, SYSTEM, USER, Document, Turns
from moec.training.data.shards import DataError, check_domain_name

_TEXTS = {".txt", ".md", ".rst", ".py", ".tex", ".text"}
_LINES = {".jsonl", ".ndjson"}
_MAX_FILE = 1 << 30  # bytes of a text file, which is one document
_MAX_LINE = 64 << 20  # bytes of a document in JSON lines
_TEXT_REMEDY = "convert it to UTF-8, or cut a long one into documents"
_FORMS = 'each line is {"text": ...}, {"prompt": ..., "response": ...} or {"messages": [{"role": ..., "content": ...}]}'


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
    text = read_text(file, limit=_MAX_FILE, fault=DataError, remedy=_TEXT_REMEDY).strip()
    if text:
        yield Document(text)


def _lines(file: Path) -> Iterator[Document]:
    with open_regular(file, fault=DataError) as stream:
        lines = iter(lambda: stream.readline(_MAX_LINE + 1), b"")
        for number, raw in enumerate(lines, 1):
            place = f"{file}:{number}"
            if len(raw) > _MAX_LINE:
                raise DataError(f"a line of more than {_MAX_LINE} bytes", place=place, remedy=_FORMS)
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
    if "messages" in row:
        return Document.of_conversation(_turns(row["messages"], place))
    if "prompt" not in row:
        return Document(_text(row, "text", place).strip())
    answer = "completion" if "completion" in row and "response" not in row else "response"
    prompt, response = (_text(row, key, place).strip() for key in ("prompt", answer))
    if not prompt or not response:
        raise DataError("an empty prompt or response", place=place, remedy=_FORMS)
    return Document.of_conversation(((USER, prompt), (ASSISTANT, response)))


def _turns(messages: object, place: str) -> Turns:
    """The turns of a chat: perhaps one of the system, then user and assistant in turns, the assistant's the last."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise DataError("messages is no list of objects", place=place, remedy=_FORMS)
    turns = tuple((_text(message, "role", place), _text(message, "content", place).strip()) for message in messages)
    roles = [role for role, _ in turns]
    unknown = next((role for role in roles if role not in ROLES), None)
    if unknown is not None:
        raise DataError(f"a message of role {unknown!r}", place=place, remedy=f"roles are {', '.join(ROLES)}")
    spoken = roles[1:] if roles[:1] == [SYSTEM] else roles
    if not spoken or len(spoken) % 2 or spoken != [USER, ASSISTANT] * (len(spoken) // 2):
        remedy = "after a system message, if any, user and assistant alternate, and the assistant has the last word"
        raise DataError(f"messages of {', '.join(roles) or 'nobody'}", place=place, remedy=remedy)
    if not all(text for _, text in turns):
        raise DataError("an empty message", place=place, remedy="leave the line out")
    return turns


def _text(row: dict[str, object], key: str, place: str) -> str:
    text = row.get(key)
    if not isinstance(text, str):
        raise DataError(f"no text under {key!r}", place=place, remedy=_FORMS)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # JSON can write half of a surrogate pair, which is no character
        raise DataError(f"{key!r} holds half a character", place=place, remedy="write valid Unicode") from None
    return text
