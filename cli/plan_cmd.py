"""`moec plan`: what a spec needs on a device, before it is compiled."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from moec.analysis.plan.memory import Memory
    from moec.analysis.plan.planner import Plan
    from moec.analysis.plan.roofline import Step


def register(app: typer.Typer) -> None:
    app.command("plan")(plan)


def plan(
    spec: Annotated[Path, typer.Argument(metavar="SPEC", help="The YAML spec.")],
    device: Annotated[
        str | None, typer.Option(help="A device's name (`moec device list`) or file; default: the spec's `device:`.")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Default: the device's backend, or the spec's only target.")
    ] = None,
    context: Annotated[int | None, typer.Option(help="Positions in use; default: all the model has.")] = None,
    memory_mb: Annotated[
        int | None,
        typer.Option(
            "--memory-mb",
            min=1,
            metavar="N",
            help="Plan for N million bytes, experts read when tokens select them; default: what the spec says.",
        ),
    ] = None,
    hits: Annotated[
        float | None,
        typer.Option(
            min=0.0, max=1.0, help="Within a memory budget: the cache's hit rate; default: that of uniform routing."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Say what a model needs: parameters, memory by role and context, operations and bytes per token, tokens per
    second.

    When it does not fit the device: the longest context that does, and what each change would save. Nothing is compiled
    and no checkpoint is read.

    Example: [bold]moec plan specs/models/mobilemoe-s.yaml --device galaxy-s25 --context 4096[/bold]

    Example: [bold]moec plan specs/models/mobilemoe-l.yaml --device galaxy-s25 --context 4096 --memory-mb 1500[/bold]
    """
    from moec.analysis.plan.devices import load_device
    from moec.analysis.plan.planner import plan_spec
    from moec.cli.output import emit_json
    from moec.compiler.spec import load_spec

    loaded = load_spec(spec)
    named = device if device is not None else loaded.device
    made = plan_spec(
        loaded,
        None if named is None else load_device(named),
        target=target,
        context=context,
        memory_mb=memory_mb,
        hits=hits,
    )
    if as_json:
        emit_json(plan_facts(made))
        return
    _show(made)


def plan_facts(p: Plan) -> dict[str, Any]:
    """The plan for machines: bytes, seconds, tokens per second."""
    a = p.model.architecture
    s = p.streamed
    rates = {} if s is None else {"tokens_per_s": s.tokens_per_s, "bound_per_s": s.bound_per_s}
    streamed = {} if s is None else {"streamed": {**vars(s), **rates}}
    facts: dict[str, Any] = {
        **streamed,
        "name": a.name,
        "target": p.target,
        "context": p.context,
        "parameters": {"total": a.total_parameters, "active": a.active_parameters},
        "weight_bytes": p.weight_bytes,
        "file_bytes": p.file_bytes,
        "roles": [
            {"role": r.role, "parameters": r.parameters, "format": r.format, "bytes": r.bytes, "per_token": r.per_token}
            for r in p.roles
        ],
        "memory": _memory_facts(p.peak),
        "memory_of_mapped_file": p.mapped,
        "memory_by_context": [_memory_facts(m) for m in p.by_context],
        "expert_bytes_touched_by_512_uniform_tokens": p.touched_512,
        "sizes_checked_with": p.model.footprint.checked,
    }
    if p.device is None:
        return facts
    assert p.prefill is not None
    return {
        **facts,
        "device": p.device.name,
        "budget_bytes": p.device.budget,
        "needs_bytes": p.needs,
        "fits": p.fits,
        "longest_context": p.longest,
        "rates": None if p.rates is None else p.rates.basis,
        "decode": [{"context": m.context, **_step_facts(s)} for m, s in zip(p.by_context, p.decode, strict=True)],
        "prefill": _step_facts(p.prefill),
        "advice": [vars(a) for a in p.advice],
    }


def _memory_facts(m: Memory) -> dict[str, int]:
    return {**vars(m), "peak": m.peak}


def _step_facts(s: Step) -> dict[str, Any]:
    return {
        **{k: v for k, v in vars(s).items() if k != "position"},
        "roofline_tokens_per_s": s.roofline_tokens_per_s,
        "expected_tokens_per_s": s.expected_tokens_per_s,
    }


def _show(p: Plan) -> None:
    from moec.cli.output import say, size, table

    a = p.model.architecture
    where = f" on {p.device.title}" if p.device is not None else ""
    say(f"{a.name} for {p.target}{where}")
    print(f"{a.total_parameters:,} parameters, {a.active_parameters:,} active; file about {size(p.file_bytes)}\n")
    rows = [(r.role, f"{r.parameters:,}", r.format, size(r.bytes), size(r.per_token)) for r in p.roles]
    rows.append(("all", f"{a.total_parameters:,}", "", size(p.weight_bytes), size(sum(r.per_token for r in p.roles))))
    table("Weights", ["role", "parameters", "stored as", "size", "read a token"], rows, right=[1, 3, 4])
    _show_memory(p)
    _show_streamed(p)
    if p.device is None:
        print("\nName a --device for its budget and its speed.")
        return
    _show_speed(p)
    _show_verdict(p)


def _show_memory(p: Plan) -> None:
    from moec.cli.output import size, table

    columns = ["context", "weights", "copies", "tables, graph", "KV cache", "activations", "runtime", "peak"]
    rows = [
        (m.context, *(size(n) for n in (m.weights, m.copies, m.tables, m.cache, m.activations, m.runtime, m.peak)))
        for m in p.by_context
    ]
    table("\nMemory in use, every expert touched", columns, rows, right=range(8))
    if p.model.architecture.experts is not None:
        stored = sum(r.bytes for r in p.roles if r.role == "expert")
        print(f"512 tokens of uniform routing touch {size(p.touched_512)} of {size(stored)} of experts")
    print(f"compared with: {p.model.footprint.checked}")


def _show_streamed(p: Plan) -> None:
    from moec.cli.output import size

    s = p.streamed
    if s is None:
        return
    how = "measured" if s.measured else "uniform routing; trained routers find more"
    print(
        f"\nwithin {size(s.budget)}: {s.held} of {s.experts} experts of {size(s.expert_bytes)} in memory; "
        f"{s.hits:.0%} found ({how}), {size(s.read)} read a token"
    )
    if s.reading_s is None or s.computing_s is None or s.tokens_per_s is None:
        print("how fast: not known without a device whose file has storage_gb_per_s")
        return
    print(
        f"{s.tokens_per_s:.1f} tokens/s expected, with a core that is free for reading; {s.bound_per_s:.1f} if reading "
        f"were hidden whole: {s.reading_s * 1e3:.1f} ms of it beside {s.computing_s * 1e3:.1f} ms of computing a token"
    )


def _show_speed(p: Plan) -> None:
    from moec.cli.output import size, table

    assert p.prefill is not None
    rows = [("prefill", p.prefill.tokens, *_speed_cells(p.prefill))]
    rows += [("decode", m.context, *_speed_cells(s)) for m, s in zip(p.by_context, p.decode, strict=True)]
    columns = ["", "context", "GFLOP a token", "bytes a token", "bound by", "roofline, tokens/s", "expected, tokens/s"]
    table(
        "\nSpeed", columns, [[c if i != 3 else size(c) for i, c in enumerate(r)] for r in rows], right=[1, 2, 3, 5, 6]
    )
    print(f"expected: {p.rates.basis}" if p.rates else "expected: nothing, this backend has not been timed")


def _speed_cells(s: Step) -> tuple[Any, ...]:
    expected = s.expected_tokens_per_s
    return (
        f"{s.flops / s.tokens / 1e9:.3f}",
        s.bytes / s.tokens,
        s.bound,
        f"{s.roofline_tokens_per_s:,.1f}",
        "" if expected is None else f"{expected:,.1f}",
    )


def _show_verdict(p: Plan) -> None:
    from moec.cli.output import size, table

    assert p.device is not None
    budget = size(p.device.budget)
    mapped = p.mapped
    if mapped and p.needs == p.peak.peak:
        print(
            f"\nof {size(p.peak.peak)}, {size(mapped)} are pages of the file, which the system can drop and read again "
            f"when memory is short; {size(p.peak.peak - mapped)} are not"
        )
    needs = size(p.needs) if p.needs == p.peak.peak else f"the memory budget of {size(p.needs)},"
    if p.fits:
        print(f"\nfits: {needs} of the {budget} that {p.device.name} gives an app")
        return
    longest = f"the longest context that fits is {p.longest}" if p.longest else "no context fits"
    print(f"\ndoes not fit: {needs.rstrip(',')}, {p.device.name} gives an app {budget}; {longest}")
    rows = [(a.change, size(a.saves), size(a.peak), "yes" if a.fits else "no", a.weights) for a in p.advice]
    table("\nWhat to change", ["change", "saves", "peak", "fits", "weights"], rows, right=[1, 2])
    if not any(a.fits for a in p.advice):
        print(f"\nno single change is enough: `moec search --device {p.device.name}` finds shapes that fit")
