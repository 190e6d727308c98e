"""What `moec run`, `moec chat` and `moec serve` share: options about format and template, and text on a terminal."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moec.compiler.errors import UserError
from moec.compiler.files import read_text
from moec.compiler.units import printable

if TYPE_CHECKING:
    from moec.assistant.answer import ContextFull
    from moec.assistant.generate import Stats
    from moec.assistant.prefixes import PrefixCache
    from moec.assistant.structured import Format
    from moec.compiler.artifact import Artifact

MAX_FORMAT_BYTES = 1 << 20
MAX_TOOLS_BYTES = 4 << 20

JsonSchema = Annotated[Path | None, typer.Option(metavar="FILE", help="A JSON Schema that the answer must satisfy.")]
Regex = Annotated[str | None, typer.Option(help="A regular expression that the whole answer must match.")]
Grammar = Annotated[
    Path | None, typer.Option(metavar="FILE", help="A grammar (Lark, or llama.cpp's GBNF) for the answer.")
]
ChatTemplateFile = Annotated[
    Path | None, typer.Option("--chat-template", metavar="FILE", help="A jinja template; default: the artifact's.")
]
Draft = Annotated[
    Path | None,
    typer.Option(metavar="ARTIFACT", help="A smaller model with the same tokenizer drafts tokens; same text, sooner."),
]
PrefixFolder = Annotated[
    Path | None,
    typer.Option(
        "--prefix-cache",
        metavar="DIR",
        help="Keep system prompts (run: prompts) computed in this folder, and begin with what is there.",
    ),
]
PrefixName = Annotated[
    str | None,
    typer.Option(
        "--prefix",
        metavar="NAME",
        help="With --prefix-cache: keep the system prompt with its tools (run: the prompt) under this name, until "
        "another one has it or `moec prefixes DIR --remove NAME`.",
    ),
]
ContextFullOption = Annotated[
    str,
    typer.Option(
        "--context-full",
        metavar="error|drop-oldest",
        help="When the context is full: an error (an answer ends there), or drop the oldest and go on.",
    ),
]
KeepFirst = Annotated[
    int | None,
    typer.Option(
        "--keep-first",
        min=0,
        metavar="N",
        help="With --context-full drop-oldest: never drop the first N tokens. Default: a conversation's system prompt "
        "and tools, nothing of a text.",
    ),
]
Threads = Annotated[
    int | None, typer.Option(min=1, max=256, help="Default: what the spec says, else one per fast core.")
]


def format_of(json_schema: Path | None, regex: str | None, grammar: Path | None) -> Format | None:
    """What the answer must be; UserError for a file that cannot be read or is no JSON, and for several formats."""
    from moec.assistant.structured import Format

    def content(file: Path | None) -> str | None:
        return None if file is None else read_text(file, limit=MAX_FORMAT_BYTES)

    try:
        found = Format.of(json_schema=content(json_schema), regex=regex, grammar=content(grammar))
    except UserError as error:
        place = str(json_schema) if error.place == "json_schema" else error.place
        raise UserError(error.message, place=place, remedy=error.remedy) from None
    file = json_schema or grammar
    return found if found is None or file is None else replace(found, place=str(file))


def context_full_of(given: str, keep_first: int | None = None) -> ContextFull:
    """The policy for a full context; UserError for another word, and for tokens to keep where none are dropped."""
    policies: dict[str, ContextFull] = {"error": "error", "drop-oldest": "drop_oldest"}
    if given not in policies:
        raise UserError(f"--context-full {given[:40]!r}", remedy="use error or drop-oldest")
    if keep_first is not None and given == "error":
        raise UserError("--keep-first is for a context that drops tokens", remedy="add --context-full drop-oldest")
    return policies[given]


def told_of_dropping(stats: Stats) -> str | None:
    """What was dropped since the context was full; None if nothing was."""
    if not stats.dropped_tokens:
        return None
    return f"the context was full: the oldest {stats.dropped_tokens} tokens were dropped"


def prefixes_in(folder: Path | None, artifact: Artifact, name: str | None = None) -> PrefixCache | None:
    """The prefixes of an artifact in a folder; UserError where it cannot be used, sessions cannot be saved, or a name
    is none or has no folder."""
    from moec.assistant.load import prefixes_of
    from moec.assistant.prefixes import checked_name

    if name is not None:
        checked_name(name, "--prefix")
        if folder is None:
            raise UserError("--prefix is the name of a prefix in a folder", remedy="add --prefix-cache DIR")
    return prefixes_of(folder, artifact, "--prefix-cache")


def tools_in(file: Path) -> Any:
    """The JSON of a file with tools; UserError."""
    try:
        found = json.loads(read_text(file, limit=MAX_TOOLS_BYTES))
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON: {str(error).splitlines()[0]}", place=str(file)) from None
    if not isinstance(found, list):
        raise UserError("holds no list of tools", place=str(file), remedy="write definitions as OpenAI does, in a list")
    return found


def show(text: str, stream: Any = None) -> None:
    """Write text as it comes.

    Escape sequences that a model may have learned never reach a terminal; a character that the stream cannot encode is
    replaced.
    """
    stream = stream or sys.stdout
    encoding = stream.encoding or "utf-8"
    text = printable(text) if stream.isatty() else text
    print(text.encode(encoding, "replace").decode(encoding), end="", flush=True, file=stream)
