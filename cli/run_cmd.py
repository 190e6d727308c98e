"""`moec run`: talk to an artifact."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moec.cli.trust import Trust
from moec.compiler.errors import RunError, UserError
from moec.compiler.units import printable

if TYPE_CHECKING:
    from moec.compiler.generate import Generation, TextStream


def register(app: typer.Typer) -> None:
    app.command("run")(run_artifact)


def run_artifact(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="A folder that `moec compile` wrote.")],
    prompt: Annotated[str | None, typer.Option(help="The text to continue; - reads it from stdin.")] = None,
    ids: Annotated[str | None, typer.Option(help="The prompt as token ids, such as 1,2,3; prints ids.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=0, help="Stop after this many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens that sum to this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
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
    from moec.cli.output import emit_json
    from moec.compiler.artifact import Artifact
    from moec.compiler.generate import Generation, Sampling, TextStream
    from moec.compiler.tokenizer import encode_prompt, load_tokenizer

    if (prompt is None) == (ids is None):
        raise UserError("give either --prompt TEXT or --ids 1,2,3")
    sampling = Sampling(temperature, top_p, seed)
    prompt_ids = [] if ids is None else _parse_ids(ids)
    opened = Artifact.open(artifact)
    opened = opened if threads is None else opened.with_threads(threads)
    model = opened.manifest.model
    stream = None
    if ids is None:
        words = load_tokenizer(tokenizer or opened.folder / "tokenizer.json")
        text = sys.stdin.read() if prompt == "-" else prompt
        assert text is not None
        prompt_ids = encode_prompt(words, text)
        stream = TextStream(lambda tokens: words.decode(tokens))
    from moec.compiler import build  # torch: seconds, which a fault above need not wait for

    session = build.load(opened)
    try:
        stops = frozenset(model.eos_ids)
        generation = Generation(session, prompt_ids, max_new_tokens, sampling, stops, place=str(opened.folder))
        new_ids, new_text = _stream(generation, stream, show=not as_json)
    finally:
        session.close()
    stats = generation.stats
    if as_json:
        emit_json({"prompt_ids": prompt_ids, "ids": new_ids, "text": new_text, **vars(stats)})
    print(
        f"prefill {stats.prompt_tokens} tokens, {stats.prefill_rate:.1f} tok/s; "
        f"decode {stats.new_tokens} tokens, {stats.decode_rate:.1f} tok/s; stopped by {stats.stopped}",
        file=sys.stderr,
    )


def _stream(generation: Generation, stream: TextStream | None, *, show: bool) -> tuple[list[int], str | None]:
    ids: list[int] = []
    pieces: list[str] = []

    def add(piece: str) -> None:
        pieces.append(piece)
        if show and piece:
            # a terminal that cannot show a character gets a replacement, not a traceback
            encoding = sys.stdout.encoding or "utf-8"
            piece = printable(piece) if sys.stdout.isatty() else piece  # a model may have learned escape sequences
            print(piece.encode(encoding, "replace").decode(encoding), end="", flush=True)

    for token in generation:
        add(stream.push(token) if stream else f"{'' if not ids else ','}{token}")
        ids.append(token)
    if stream:
        add(stream.finish())
    if show:
        print(flush=True)
    return ids, "".join(pieces) if stream else None


def _parse_ids(text: str) -> list[int]:
    try:
        ids = [int(part) for part in text.split(",")]
    except ValueError:
        raise RunError(f"--ids {text[:40]!r} is not a list of token ids", remedy="write them as 1,2,3") from None
    if any(abs(i) >= 1 << 63 for i in ids):
        raise RunError("a token id is out of range", remedy="ids are below the vocabulary size")
    return ids
