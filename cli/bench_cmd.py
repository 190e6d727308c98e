"""`moec bench`: how fast an artifact is on this machine, and how much memory it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moec.cli.memory import CacheAware, MemoryMb, warn_of_preference
from moec.compiler.errors import UserError


def register(app: typer.Typer) -> None:
    app.command("bench")(bench_artifact)


def bench_artifact(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="A folder that `moec compile` wrote.")],
    prefill: Annotated[int | None, typer.Option(min=1, help="Tokens of the prompt; default 512, or what fits.")] = None,
    decode: Annotated[int | None, typer.Option(min=1, help="Tokens to generate; default 64, or what fits.")] = None,
    context: Annotated[
        str | None, typer.Option(help="Positions to decode at, such as 256,1024,8000; default: after the prompt.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, max=256, help="Default: one per fast core.")] = None,
    memory_mb: MemoryMb = None,
    cache_aware: CacheAware = None,
    repeats: Annotated[int, typer.Option(min=1, help="Rates are medians over this many runs.")] = 3,
    tokens: Annotated[
        Path | None, typer.Option(help="A file of token ids as the prompt; default: ids spread over the vocabulary.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the measurements as JSON.")] = False,
) -> None:
    """Time prefill, decoding by context length, and loading, in a process of its own (without Python for xnnpack).

    Example: [bold]moec bench build/s --prefill 512 --context 512,4096,8000[/bold]
    """
    from moec.cli.output import emit_json
    from moec.compiler.artifact import Artifact
    from moec.compiler.progress import Progress
    from moec.compiler.target import target_of
    from moec.compiler.timing import BenchPlan

    opened = Artifact.open(artifact).within(memory_mb, cache_aware)
    warn_of_preference(opened)
    room = opened.manifest.model.context
    starts = _contexts(context, room)
    ids = None if tokens is None else _token_ids(tokens)
    # defaults are reduced for a short context; numbers that the user gave are not
    steps = decode if decode is not None else max(1, min(64, room // 4))
    latest = min(starts) if starts else room - steps
    length = len(ids) if ids is not None else prefill if prefill is not None else max(1, min(512, latest))
    plan = BenchPlan(length, steps, starts, threads, repeats, ids)
    report = target_of(opened).bench(opened, plan, Progress())
    report = {"artifact": str(artifact), "name": opened.manifest.name, **report}
    if as_json:
        emit_json(report)
        return
    _print(report)


def _contexts(text: str | None, room: int) -> tuple[int, ...]:
    if text is None:
        return ()
    parts = [part.strip() for part in text.split(",")]
    wrong = [part for part in parts if not part.isdecimal() or not 1 <= int(part) < room]
    if wrong:
        raise UserError(
            f"--context: {wrong[0] or 'an empty entry'} is not a position of this model",
            remedy=f"give positions from 1 to {room - 1}, separated by commas",
        )
    return tuple(int(part) for part in parts)


def _token_ids(file: Path) -> tuple[int, ...]:
    try:
        text = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        fault = f"cannot be read: {error.strerror}" if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(fault, place=str(file), remedy="give a file of token ids") from None
    words = text.replace(",", " ").replace("[", " ").replace("]", " ").split()
    wrong = [word for word in words if not word.isdecimal()]
    if wrong or not words:
        raise UserError(
            f"{wrong[0][:20]!r} is not a token id" if wrong else "there are no token ids",
            place=str(file),
            remedy="separate ids by spaces, commas or newlines",
        )
    return tuple(map(int, words))


def _print(report: dict[str, Any]) -> None:
    from moec.cli.output import size, table

    title = (
        f"{report['name']}: {size(report['file_bytes'])}, loads in {report['load_s']:.2f} s; "
        f"{report['threads']} threads, {report['isa']}; medians of {report['repeats']}"
    )
    rows = [("prefill", report["prefill_tokens"], "", f"{report['prefill_tokens_per_s']:.1f}", "")]
    for at in report["contexts"]:
        rows.append(
            (
                "decode",
                report["decode_tokens"],
                at["context"],
                f"{at['decode_tokens_per_s']:.1f}",
                f"{at['peak_rss_mb']:.0f}",
            )
        )
    table(title, ("", "tokens", "from position", "tokens/s", "peak RSS, MB"), rows, right=(1, 2, 3, 4))
    for at in report["contexts"]:
        # of decoding where there is some: a prompt reads most experts, which says nothing of the tokens behind it
        decoded = "decode_experts" in at
        experts = at["decode_experts"] if decoded else at.get("experts")
        if experts is None:
            continue
        asked = experts["hits"] + experts["misses"]
        print(
            f"within {experts['budget_mb']:.0f} MB: {experts['slots']} of {experts['experts']} experts fit; "
            f"{'decoding' if decoded else 'prompt'} from position {at['context'] if decoded else 0}: "
            f"{experts['hits'] / max(asked, 1):.0%} of the selected experts were in memory, "
            f"{size(experts['bytes_read'])} read"
        )
