"""`moec run`: talk to an artifact."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from moec.assistant.stops import StopStrings
from moec.cli.sampling import (
    LogitBias,
    MinP,
    PresencePenalty,
    RepeatPenalty,
    Seed,
    Stop,
    Temperature,
    TopK,
    TopP,
    sampling_of,
)
from moec.cli.trust import Trust
from moec.compiler.errors import RunError, UserError
from moec.compiler.units import printable


def register(app: typer.Typer) -> None:
    app.command("run")(run_artifact)


def run_artifact(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="A folder that `moec compile` wrote.")],
    prompt: Annotated[str | None, typer.Option(help="The text to continue; - reads it from stdin.")] = None,
    ids: Annotated[str | None, typer.Option(help="The prompt as token ids, such as 1,2,3; prints ids.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=0, help="Stop after this many tokens.")] = 128,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repeat_penalty: RepeatPenalty = None,
    presence_penalty: PresencePenalty = None,
    logit_bias: LogitBias = None,
    seed: Seed = None,
    stop: Stop = None,
    logprobs: Annotated[
        int | None,
        typer.Option(min=0, max=100, help="With --json: log-probabilities, and of so many likeliest tokens."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, max=256, help="Default: what the spec says, else one per fast core.")
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="A tokenizer.json; default: the artifact's.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print ids, text and rates as JSON at the end.")] = False,
    trust: Trust = False,
) -> None:
    """Continue a prompt; the text streams to stdout, tokens per second go to stderr.

    Example: [bold]moec run build/s --prompt "The capital of France is" --max-new-tokens 32[/bold]
    """
    from moec.assistant.generate import Generation, Text
    from moec.cli.output import emit_json
    from moec.compiler.artifact import Artifact
    from moec.compiler.tokenizer import encode_prompt, load_tokenizer

    if (prompt is None) == (ids is None):
        raise UserError("give either --prompt TEXT or --ids 1,2,3")
    if ids is not None and stop:
        raise UserError("--stop is for text", remedy="give --prompt instead of --ids")
    prompt_ids = [] if ids is None else _parse_ids(ids)
    sampling = sampling_of(
        artifact,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repeat_penalty=repeat_penalty,
        presence_penalty=presence_penalty,
        logit_bias=logit_bias,
        seed=seed,
    )
    stops = [] if stop is None else stop
    StopStrings(stops)
    opened = Artifact.open(artifact)
    opened = opened if threads is None else opened.with_threads(threads)
    words = None
    if ids is None:
        words = load_tokenizer(tokenizer or opened.folder / "tokenizer.json")
        text = sys.stdin.read() if prompt == "-" else prompt
        assert text is not None
        prompt_ids = encode_prompt(words, text)
    from moec.compiler import build  # torch: seconds, which a fault above need not wait for

    session = build.load(opened)
    try:
        generation = Generation(
            session,
            prompt_ids,
            max_new_tokens,
            sampling,
            frozenset(opened.manifest.model.eos_ids),
            place=str(opened.folder),
            top_scores=logprobs,
        )
        pieces = _id_pieces(generation) if words is None else Text(generation, words.decode, stops)
        whole = "".join(_shown(pieces, show=not as_json))
        new_ids = pieces.ids if isinstance(pieces, Text) else [int(i) for i in whole.split(",") if i]
    finally:
        session.close()
    stats = generation.stats
    if as_json:
        found = {"prompt_ids": prompt_ids, "ids": new_ids, "text": None if words is None else whole, **vars(stats)}
        emit_json(found if logprobs is None else {**found, "logprobs": [vars(s) for s in generation.scores]})
    print(
        f"prefill {stats.prompt_tokens} tokens, {stats.prefill_rate:.1f} tok/s; "
        f"decode {stats.new_tokens} tokens, {stats.decode_rate:.1f} tok/s; {sampling.words()}; "
        f"stopped by {stats.stopped}",
        file=sys.stderr,
    )


def _id_pieces(generation: Iterable[int]) -> Iterator[str]:
    for index, token in enumerate(generation):
        yield f"{',' if index else ''}{token}"


def _shown(pieces: Iterable[str], *, show: bool) -> Iterator[str]:
    """The pieces, written to stdout as they come."""
    for piece in pieces:
        yield piece
        if show and piece:
            # a terminal that cannot show a character gets a replacement, not a traceback
            encoding = sys.stdout.encoding or "utf-8"
            seen = printable(piece) if sys.stdout.isatty() else piece  # a model may have learned escape sequences
            print(seen.encode(encoding, "replace").decode(encoding), end="", flush=True)
    if show:
        print(flush=True)


def _parse_ids(text: str) -> list[int]:
    try:
        ids = [int(part) for part in text.split(",")]
    except ValueError:
        raise RunError(f"--ids {text[:40]!r} is not a list of token ids", remedy="write them as 1,2,3") from None
    if any(abs(i) >= 1 << 63 for i in ids):
        raise RunError("a token id is out of range", remedy="ids are below the vocabulary size")
    return ids
