"""From what a user asks for to the streams and requests that are run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moec.analysis.profile.prompts import (
    DUMMY,
    REAL,
    Stream,
    dummy_stream,
    joined_streams,
    mixed_stream,
    read_prompts,
    real_streams,
)
from moec.compiler.artifact import Artifact
from moec.compiler.errors import RunError, UserError
from moec.compiler.profile_request import Request
from moec.compiler.texts import shipped_prompts
from moec.compiler.tokenizer import load_tokenizer

_CONTEXTS = (256, 1024)  # measured unless others are asked for
_DUMMY_TEXT = " the"


@dataclass(frozen=True)
class Settings:
    """What to profile. `prompts` is "real", "dummy" or a file; `contexts` empty: by the prompts' kind.

    mixed: one stream that takes turns between the domains, instead of one for each.
    """

    prompts: str = REAL
    contexts: tuple[int, ...] = ()
    decode: int = 32
    repeats: int = 3
    threads: int | None = None
    warm: int = 1
    mixed: bool = False


def parse_contexts(text: str | None) -> tuple[int, ...]:
    """ "256,1024" as ascending numbers; UserError if it is something else."""
    if text is None:
        return ()
    parts = [part.strip() for part in text.split(",")]
    wrong = [part for part in parts if not part.isdecimal() or not 1 <= int(part) < 1 << 31]
    if wrong:
        raise UserError(
            f"--context: {wrong[0][:20] or 'an empty entry'} is no number of tokens",
            remedy="give lengths such as 256,1024,4096",
        )
    return tuple(sorted({int(part) for part in parts}))


def plan_runs(artifact: Artifact, settings: Settings) -> list[tuple[Stream, Request]]:
    """The streams to run, real ones before the dummy, each with its request.

    UserError for a file that is missing, empty or no prompts, a context that the model or the prompts do not fill, a
    missing tokenizer.
    """
    model = artifact.manifest.model
    room = model.context - settings.decode
    if room < 1:
        raise RunError(
            f"{settings.decode} decoded tokens leave no room in a context of {model.context}",
            remedy="give a smaller --decode",
        )
    if settings.contexts and settings.contexts[-1] > room:
        raise RunError(
            f"a context of {settings.contexts[-1]} and {settings.decode} decoded tokens exceed the model's context of "
            f"{model.context}",
            remedy=f"give contexts up to {room}",
        )
    # a text's name decides before a file of that name: `real` and `dummy` are words of the command
    if settings.prompts == DUMMY:
        contexts = settings.contexts or _default_contexts(room)
        return [_dummy(artifact, contexts, settings)]
    streams = _real(artifact, settings, room)
    runs = [(stream, _request(stream, _points(stream, settings, room), settings)) for stream in streams]
    lengths = tuple(sorted({point for _, request in runs for point in request.points}))
    return [*runs, _dummy(artifact, lengths, settings)]


def _default_contexts(room: int) -> tuple[int, ...]:
    return tuple(c for c in _CONTEXTS if c <= room) or (room,)


def _real(artifact: Artifact, settings: Settings, room: int) -> list[Stream]:
    model = artifact.manifest.model
    shipped = settings.prompts == REAL
    # the prompts first: a fault in them is found before the tokenizer is loaded
    prompts = shipped_prompts() if shipped else read_prompts(Path(settings.prompts))
    tokenizer = load_tokenizer(artifact.folder / "tokenizer.json")
    join = joined_streams if shipped else real_streams
    streams = join(prompts, tokenizer.encode, room=model.context if shipped else room)
    wrong = next((i for stream in streams for i in stream.ids if not 0 <= i < model.vocab_size), None)
    if wrong is not None:
        raise RunError(
            f"its tokenizer gives token {wrong}, the model has {model.vocab_size}",
            place=str(artifact.folder),
            remedy="put the model's own tokenizer.json into the folder",
        )
    return [mixed_stream(streams)] if settings.mixed and len(streams) > 1 else streams


def _points(stream: Stream, settings: Settings, room: int) -> tuple[int, ...]:
    length = len(stream.ids)
    if settings.contexts:
        if settings.contexts[-1] > length:
            raise UserError(
                f"a context of {settings.contexts[-1]} asks for more than the {length} tokens of domain {stream.name}",
                place=settings.prompts,
                remedy="give longer prompts or a smaller --context",
            )
        return settings.contexts
    if settings.prompts == REAL:
        return tuple(c for c in _default_contexts(room) if c <= length) or (min(length, room),)
    return (min(length, room),)


def _request(stream: Stream, points: tuple[int, ...], settings: Settings) -> Request:
    needed = points[-1] + settings.decode
    return Request(
        ids=stream.ids[:needed],
        points=points,
        decode=settings.decode,
        warm=settings.warm,
        follow=len(stream.ids) >= needed,
        threads=settings.threads,
    )


def _dummy(artifact: Artifact, points: tuple[int, ...], settings: Settings) -> tuple[Stream, Request]:
    stream = dummy_stream(_dummy_token(artifact), points[-1] + settings.decode)
    return stream, _request(stream, points, settings)


def _dummy_token(artifact: Artifact) -> int:
    """The token of a frequent word; without a tokenizer, one from the middle of the vocabulary."""
    model = artifact.manifest.model
    file = artifact.folder / "tokenizer.json"
    if not file.is_file():
        return model.vocab_size // 2
    ids = load_tokenizer(file).encode(_DUMMY_TEXT, special_tokens=False)
    return int(ids[-1]) if ids and ids[-1] < model.vocab_size else model.vocab_size // 2
