"""`moec search`: which model shape to train for a device."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moec.compiler.errors import UserError

if TYPE_CHECKING:
    from moec.analysis.plan.search import Candidate, Found


def register(app: typer.Typer) -> None:
    app.command("search")(search)


def search(
    device: Annotated[str, typer.Option(help="A device's name (`moec device list`) or file.")],
    train_tokens: Annotated[float, typer.Option(help="Training tokens, such as 500e9.")] = 500e9,
    train_flops: Annotated[
        float | None, typer.Option(help="Training operations at most (6 N D): larger models see fewer tokens.")
    ] = None,
    max_memory_mb: Annotated[float | None, typer.Option(help="Peak memory; default: the device's budget.")] = None,
    max_active: Annotated[float | None, typer.Option(help="Active parameters at most, such as 0.3e9.")] = None,
    min_decode: Annotated[float | None, typer.Option(help="Expected tokens/s at least, mid-context.")] = None,
    context: Annotated[int, typer.Option(help="Positions that must fit.")] = 8192,
    law: Annotated[Path | None, typer.Option(help="A law of `moec fit --out`; default: the published one.")] = None,
    extrapolate: Annotated[bool, typer.Option("--extrapolate", help="Also shapes outside the fitted range.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the shape found as a spec.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the front into this .png, .svg or .pdf.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the search as JSON.")] = False,
) -> None:
    """Find the shape (E, granularity, shared expert, depth, width) of least predicted loss that a device can run.

    The loss is that of MobileMoE's on-device scaling law, which knows active parameters, tokens and E; granularity,
    shared expert and depth follow the paper's choices. Outside the range it was fitted to, it warns.

    Example: [bold]moec search --device galaxy-s25 --max-active 0.273e9 --out mine.yaml[/bold]
    """
    import sys

    from moec.analysis.plan.devices import check_runs, load_device
    from moec.analysis.plan.planner import footprint_of
    from moec.analysis.plan.scaling_law import PUBLISHED, load_law
    from moec.analysis.plan.search import Limits
    from moec.analysis.plan.search import search as run
    from moec.analysis.plan.searched import check_plot, spec_text
    from moec.analysis.plan.searched import plot as draw
    from moec.cli.output import check_writable, emit_json, write_text
    from moec.compiler.spec.targets import options_class

    check_writable(out)
    _check_positive(
        {
            "--train-tokens": train_tokens,
            "--train-flops": train_flops,
            "--max-memory-mb": max_memory_mb,
            "--max-active": max_active,
            "--min-decode": min_decode,
        }
    )
    if not 1 <= context <= 1 << 20:
        raise UserError(f"--context {context} is not a number of positions", remedy="use 1 to 1048576")
    chosen = load_device(device)
    target = chosen.backend
    check_runs(chosen, target)
    fitted = PUBLISHED if law is None else load_law(law)
    if plot is not None:
        check_plot(plot)
    limits = Limits(
        memory=chosen.budget if max_memory_mb is None else max_memory_mb * 1e6,
        context=context,
        tokens=train_tokens,
        train_flops=train_flops,
        active=max_active,
        decode=min_decode,
    )
    options = options_class(target)()
    found = run(chosen, footprint_of(target), options, limits, law=fitted, extrapolate=extrapolate)
    for warning in found.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if out is not None:
        write_text(out, spec_text(found.best, _name(out), _device_word(device), target, fitted.source))
    if plot is not None:
        budget = f", at most {train_flops:g} operations" if train_flops is not None else ""
        draw(found, plot, f"{chosen.name}, {train_tokens / 1e9:g} B training tokens{budget}")
    if as_json:
        emit_json(_facts(found, chosen.name, fitted.source))
        return
    _show(found, fitted.rmse)
    if out is not None:
        print(f"\n{out}: `moec plan {out}`, `moec compile {out} --checkpoint DIR`")


def _check_positive(options: dict[str, float | None]) -> None:
    for name, value in options.items():
        if value is not None and not 0 < value < 1e30:
            raise UserError(f"{name} {value:g} is not a positive number", remedy="give one above 0")


def _name(out: Path) -> str:
    """A spec's name from its file's: letters, digits, '.', '_' and '-'."""
    word = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in out.stem).strip("._-")
    return word or "searched"


def _device_word(device: str) -> str:
    """How the spec names the device: a shipped name as it is, a file by its absolute path."""
    from moec.compiler.spec.device import is_device_file

    return str(Path(device).absolute()) if is_device_file(device) else device


def _candidate_facts(c: Candidate) -> dict[str, Any]:
    facts = {k: v for k, v in vars(c).items() if k not in ("config", "backbone")}
    return {**facts, "label": c.label, "model": c.config}


def _facts(found: Found, device: str, law: str) -> dict[str, Any]:
    def facts(c: Candidate | None) -> dict[str, Any] | None:
        return None if c is None else _candidate_facts(c)

    return {
        "device": device,
        "law": law,
        "warnings": found.warnings,
        "considered": found.considered,
        "best": facts(found.best),
        "experts_within_error": found.within_error,
        "front": [facts(c) for c in found.front],
        "by_weights": [{"weights": b, "dense": facts(d), "moe": facts(m)} for b, d, m in found.by_weights],
        "rates": None if found.rates is None else found.rates.basis,
    }


def _show(found: Found, rmse: float) -> None:
    from moec.cli.output import size, table

    columns = ["shape", "total", "active", "weights", "peak", "tokens/s", "loss"]
    rows = [_row(c) for c in _thinned(found.front)]
    print(f"{found.considered} shapes\n")
    table("Front of memory against loss", columns, rows, right=range(1, 7))
    cells = [(size(b), *_short(dense), *_short(mixed), _ahead(dense, mixed)) for b, dense, mixed in found.by_weights]
    table("\nDense and mixture by weight memory", ["weights", "dense", "loss", "mixture", "loss", "ahead"], cells)
    table("\nBest", columns, [_row(found.best)], right=range(1, 7))
    if len(found.within_error) > 1:
        close = ", ".join(map(str, found.within_error))
        print(f"within the law's error ({rmse:.4f}) at this depth and width: E = {close}")
    print("granularity, shared expert and depth follow the paper's choices, not the law")
    basis = "roofline, nothing was timed" if found.rates is None else found.rates.basis
    print(f"tokens/s: {basis}")


def _row(c: Candidate) -> tuple[Any, ...]:
    from moec.cli.output import size

    mark = " (extrapolated)" if c.outside else ""
    return (
        c.label,
        f"{c.total / 1e9:.3f} B",
        f"{c.active / 1e9:.3f} B",
        size(c.weights),
        size(c.peak),
        f"{c.decode_tokens_per_s:,.0f}",
        f"{c.loss:.4f}{mark}",
    )


def _short(c: Candidate | None) -> tuple[str, str]:
    return ("", "") if c is None else (c.label, f"{c.loss:.4f}")


def _ahead(dense: Candidate | None, mixed: Candidate | None) -> str:
    if dense is None or mixed is None:
        return ""
    return "mixture" if mixed.loss < dense.loss else "dense"


def _thinned(front: tuple[Candidate, ...], most: int = 16) -> list[Candidate]:
    """At most `most` of the front, evenly spread, its ends included."""
    if len(front) <= most:
        return list(front)
    return [front[round(i * (len(front) - 1) / (most - 1))] for i in range(most)]
