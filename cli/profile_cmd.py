"""`moec profile`: what an artifact costs on real prompts, here or on an Android device."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moec.cli.memory import CacheAware, MemoryMb, warn_of_preference
from moec.compiler.errors import UserError

if TYPE_CHECKING:
    from moec.compiler.profile_request import Request


def register(app: typer.Typer) -> None:
    app.command("profile")(profile)


def profile(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="A folder that `moec compile` wrote.")],
    prompts: Annotated[
        str, typer.Option(help="`real` (shipped: code, knowledge, math), `dummy`, or a file: text, or JSON lines.")
    ] = "real",
    context: Annotated[
        str | None, typer.Option(help="Prompt lengths to measure at, such as 256,1024,4096.", show_default="256,1024")
    ] = None,
    decode: Annotated[int, typer.Option(min=1, help="Tokens to decode at each length.")] = 32,
    repeat: Annotated[int, typer.Option(min=1, max=1000, help="Cold processes for each prompt.")] = 3,
    threads: Annotated[int | None, typer.Option(min=1, max=256, help="Default: one per fast core.")] = None,
    memory_mb: MemoryMb = None,
    cache_aware: CacheAware = None,
    mixed: Annotated[bool, typer.Option("--mixed", help="One prompt that changes domain every 256 tokens.")] = False,
    warm: Annotated[int, typer.Option(min=0, help="Warm passes after each cold one; rates are of the last.")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the profile here; - is stdout.")] = None,
    adb: Annotated[bool, typer.Option("--adb", help="Run on an Android device.")] = False,
    serial: Annotated[str | None, typer.Option(help="Which device, as `adb devices` lists it; implies --adb.")] = None,
    runner: Annotated[
        Path | None, typer.Option(help="Folder of a runner built for the device; default: the one on it.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="With --adb: print the commands, run none.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
) -> None:
    """Measure time to first token, rates, memory by part, and the experts that each kind of text selects.

    Every run is a new process without Python; weights are mapped lazily and are not in the page cache when it starts.
    Within a memory budget, also what the cache of experts did: hits, misses, bytes read a token, time stalled, and the
    share of reading that computing hid, in all and by layer.

    Examples:

      [bold]moec profile build/s --context 256,1024,4096 --json build/s.profile.json[/bold]

      [bold]moec profile build/s --prompts my-prompts.jsonl --repeat 5[/bold]

      [bold]moec profile build/s --adb --runner build/android --dry-run[/bold]
    """
    from moec.analysis.profile.measure import measure, report
    from moec.analysis.profile.settings import Settings, parse_contexts, plan_runs
    from moec.cli.output import check_writable
    from moec.compiler.artifact import Artifact
    from moec.compiler.progress import Progress
    from moec.compiler.target import target_of

    on_device = adb or serial is not None
    if (dry_run or runner is not None) and not on_device:
        raise UserError(f"{'--dry-run' if dry_run else '--runner'} is for devices", remedy="add --adb")
    check_writable(json_file)
    settings = Settings(prompts, parse_contexts(context), decode, repeat, threads, warm, mixed)
    opened = Artifact.open(artifact).within(memory_mb, cache_aware)
    warn_of_preference(opened)
    target = target_of(opened)
    target.check_profiles(opened)
    runs = plan_runs(opened, settings)
    machine = None
    if on_device:
        device = target.device(opened, serial, runner, print if dry_run else _to_stderr, dry_run=dry_run)
        name = opened.manifest.name
        device.push(opened.path("model.pte"), name)
        if dry_run:
            for _, request in runs * settings.repeats:
                device.run(request, name)
            return
        machine = f"Android device {serial or 'on adb'}"

    def run(request: Request) -> dict[str, Any]:
        if on_device:
            return dict(device.run(request, opened.manifest.name))
        return target.profile(opened, request)

    measured = measure(runs, run, repeats=settings.repeats, progress=Progress(quiet=quiet))
    found = report(opened.manifest, measured, artifact=str(artifact), machine=machine, repeats=settings.repeats)
    _show(found, json_file)


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _show(found: dict[str, Any], json_file: Path | None) -> None:
    from moec.cli.output import emit_json, json_text, write_text

    if str(json_file) == "-":
        emit_json(found)
        return
    if json_file is not None:
        write_text(json_file, json_text(found) + "\n")
    _print(found)


def _print(found: dict[str, Any]) -> None:
    from moec.cli.output import say, size, table

    title = (
        f"{found['name']}: {size(found['file_bytes'])}; {found['threads']} threads, {found['isa']}; medians of "
        f"{found['repeats']} cold processes (smallest to largest)"
    )
    rows = [
        (
            run["stream"],
            point["context"],
            _seconds(point["first_token_cold_s"]),
            _seconds(point["first_token_s"]),
            _rate(point["prefill_tokens_per_s"]),
            _rate(point["decode_tokens_per_s"]),
            size(point["resident_bytes"]["median"]),
        )
        for run in found["runs"]
        for point in run["points"]
    ]
    columns = ("prompt", "context", "first token cold, s", "warm, s", "prefill, tok/s", "decode, tok/s", "RSS")
    table(title, columns, rows, right=range(1, 7))
    print()
    parts = ("weights", "kv_cache", "activations", "program", "runtime")
    rows = [
        (
            run["stream"],
            run["points"][-1]["context"],
            *[size(run["points"][-1]["memory"][part]) for part in parts],
            size(run["points"][-1]["memory"]["resident"]),
            size(run["peak_bytes"]["median"]),
            f"{run['load_s']['median'] * 1e3:.0f} ms",
        )
        for run in found["runs"]
    ]
    labels = ("weights touched", "KV cache", "activations", "program", "runtime", "steady RSS", "peak RSS", "load")
    table("Memory at the last context", ("prompt", "context", *labels), rows, right=range(1, 10))
    for ratio in found["ratios"]:
        by = ", ".join(f"{name} {value:.2f}" for name, value in ratio["by_stream"].items())
        print(
            f"\nreal over dummy at {ratio['context']} tokens: RSS {ratio['resident']:.2f} ({by}), weights "
            f"{ratio['weights']:.2f}",
            end="",
        )
    print("\n" if found["ratios"] else "")
    if found["experts"]:
        _print_experts(found["experts"])
    streamed = {run["stream"]: run["expert_cache"] for run in found["runs"] if "expert_cache" in run}
    if streamed:
        _print_cache(streamed)
    for note in found["notes"]:
        say(f"note: {note}")


def _print_experts(experts: dict[str, Any]) -> None:
    from moec.cli.output import table

    rows = [
        (name, f"{d['selections']:,}", f"{d['experts_used']} ({d['experts_used_share']:.1%})", f"{d['entropy']:.3f}")
        for name, d in experts["domains"].items()
    ]
    total = experts["layers"] * experts["experts"]
    table(
        f"Experts reached, of {total} ({experts['layers']} layers of {experts['experts']})",
        ("prompt", "selections", "experts", "entropy"),
        rows,
        right=(1, 2, 3),
    )
    apart = ", ".join(f"{pair} {value:.3f}" for pair, value in experts["divergence_bits"].items())
    if apart:
        print(f"Jensen-Shannon divergence, bits (0 the same, 1 disjoint): {apart}")
    print()


_CACHE_COLUMNS = (
    *("tokens", "hits", "misses", "found", "read ahead", "used"),
    *("read a token", "stalled a token, ms", "reading overlapped"),
)


def _print_cache(streamed: dict[str, dict[str, Any]]) -> None:
    """Tables of what the cache of routed experts did: by prompt and phase, then by layer while decoding."""
    from moec.analysis.profile.expert_cache import PHASES, together
    from moec.cli.output import size, table

    first = next(iter(streamed.values()))
    rows = [
        (name, "prompt" if phase == "prefill" else "decode", *_cache_cells(facts[phase], facts[phase]["tokens"]))
        for name, facts in streamed.items()
        for phase in PHASES
    ]
    title = f"Experts within {size(first['budget'])}: {first['slots']} of {first['experts']} in memory"
    table(title, ("prompt", "", *_CACHE_COLUMNS), rows, right=range(2, 11))
    decode = together(list(streamed.values()), "decode")
    rows = [(layer["name"], *_cache_cells(layer, decode["tokens"])) for layer in decode["layers"]]
    rows.append(("all", *_cache_cells(decode, decode["tokens"])))
    table("\nDecoding by layer, all prompts", ("layer", *_CACHE_COLUMNS), rows, right=range(1, 10))
    print()


def _cache_cells(facts: dict[str, Any], tokens: int) -> tuple[Any, ...]:
    from moec.cli.output import size

    share = "" if facts["overlapped"] is None else f"{facts['overlapped']:.0%}"
    found = "" if facts["hit_rate"] is None else f"{facts['hit_rate']:.1%}"
    stalled = facts["waiting_s"] / max(tokens, 1) * 1e3
    counts = (f"{tokens:,}", f"{facts['hits']:,}", f"{facts['misses']:,}")
    ahead = (f"{facts['ahead']:,}", f"{facts['ahead_used']:,}")
    return (*counts, found, *ahead, size(facts["bytes_per_token"]), f"{stalled:.2f}", share)


def _seconds(spread: dict[str, Any]) -> str:
    return f"{spread['median']:.3f} ({spread['min']:.3f} to {spread['max']:.3f})"


def _rate(spread: dict[str, Any] | None) -> str:
    return "" if spread is None else f"{spread['median']:.1f} ({spread['min']:.1f} to {spread['max']:.1f})"
