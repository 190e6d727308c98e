"""The prompts of `moec profile`, as token streams: real text by domain (shipped or the user's), or one repeated token.

A stream is the prompts of a domain one after the other, each beginning with the model's BOS. Its first c tokens are the
prompt at context c.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moec.compiler.errors import RunError, UserError
from moec.compiler.texts import DUMMY, Prompt, parse_lines
from moec.compiler.tokenizer import check_unicode

REAL = "real"
_SUFFIXES = (".jsonl", ".json", ".ndjson")


@dataclass(frozen=True)
class Stream:
    """Token ids to run from the first on. `kind` is "real" or "dummy"."""

    name: str
    kind: str
    ids: tuple[int, ...]

    @property
    def unique(self) -> int:
        """How many different tokens it holds."""
        return len(set(self.ids))


def read_prompts(file: Path) -> list[Prompt]:
    """The prompts of a file; UserError when it is missing, empty, or not what its name says.

    `.jsonl` (also `.json`, `.ndjson`): an object a line with `text` and, optionally, `domain`. Any other file is one
    prompt, its domain the file's name without suffix.
    """
    try:
        text = file.read_text("utf-8")
    except UnicodeDecodeError:
        raise UserError("not UTF-8 text", place=str(file), remedy="give a text file or JSON lines") from None
    except OSError as error:
        raise UserError(
            f"cannot be read: {error.strerror}", place=str(file), remedy="give a file of prompts, `real` or `dummy`"
        ) from None
    if file.suffix.lower() not in _SUFFIXES:
        prompts = [Prompt(file.stem or "text", text, str(file))]
    else:
        prompts = parse_lines(text, str(file))
    if not prompts:
        raise UserError(
            "holds no prompt", place=str(file), remedy='write lines such as {"domain": "code", "text": "..."}'
        )
    for prompt in prompts:
        if not prompt.text.strip():
            raise UserError("the prompt is empty", place=prompt.place, remedy="give it some text, or remove it")
    return prompts


def real_streams(prompts: Iterable[Prompt], encode: Callable[[str], Sequence[int]], *, room: int) -> list[Stream]:
    """A stream for each domain, in the order of their first prompts, of at most `room` tokens.

    RunError if a single prompt is longer than that, or has no tokens. A domain's prompts are joined as long as they
    fit whole; of the shipped ones (see `joined`) the last may be cut.
    """
    by_domain: dict[str, list[int]] = {}
    for prompt in prompts:
        ids = _encoded(prompt, encode)
        if len(ids) > room:
            raise RunError(
                f"the prompt has {len(ids)} tokens, the model's context leaves room for {room}",
                place=prompt.place,
                remedy="shorten it, or decode fewer tokens",
            )
        stream = by_domain.setdefault(prompt.domain, [])
        if len(stream) + len(ids) <= room:
            stream += ids
    return [Stream(name, REAL, tuple(ids)) for name, ids in by_domain.items()]


def joined_streams(prompts: Iterable[Prompt], encode: Callable[[str], Sequence[int]], *, room: int) -> list[Stream]:
    """As `real_streams`, for texts that may be cut anywhere: each domain's stream has `room` tokens if its texts do."""
    by_domain: dict[str, list[int]] = {}
    for prompt in prompts:
        by_domain.setdefault(prompt.domain, []).extend(_encoded(prompt, encode))
    return [Stream(name, REAL, tuple(ids[:room])) for name, ids in by_domain.items()]


def mixed_stream(streams: Sequence[Stream], *, every: int = 256) -> Stream:
    """One stream that changes between the given ones every so many tokens, up to the length of the shortest times n."""
    shortest = min(len(stream.ids) for stream in streams)
    ids: list[int] = []
    for start in range(0, shortest, every):
        for stream in streams:
            ids += stream.ids[start : min(start + every, shortest)]
    return Stream("mixed", REAL, tuple(ids))


def dummy_stream(token: int, length: int) -> Stream:
    """The same token over and over: what synthetic benchmarks feed."""
    return Stream(DUMMY, DUMMY, (token,) * length)


def _encoded(prompt: Prompt, encode: Callable[[str], Sequence[int]]) -> list[int]:
    check_unicode(prompt.text, prompt.place)
    ids = list(encode(prompt.text))
    if not ids:
        raise RunError("the tokenizer makes no tokens of it", place=prompt.place, remedy="give it some text")
    return ids
