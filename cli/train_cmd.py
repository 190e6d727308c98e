"""`moec train`: the stages of a spec, from text to checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    app.command("train")(train_spec)


def train_spec(
    spec: Annotated[Path, typer.Argument(metavar="SPEC", help="The YAML spec, with a `training:` section.")],
    data: Annotated[Path, typer.Option(help="Corpus folder that `moec data build` wrote.")],
    out: Annotated[Path, typer.Option(help="Folder of the run: a checkpoint for every stage, metrics, state.")],
    stage: Annotated[
        str | None, typer.Option(help="Only this stage, from the checkpoint of the one before it (or --init).")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue what is in --out, to the same numbers.")] = False,
    init: Annotated[Path | None, typer.Option(help="Checkpoint folder to start from.")] = None,
    teacher: Annotated[
        Path | None, typer.Option(help="Dense checkpoint that stages with `distillation:` learn from.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed; default: the spec's.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, max=256, help="Default: one per core.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.")] = None,
    backend: Annotated[
        str,
        typer.Option(help="Whose training loop: torch, or torchtitan (extra titan; verified on CPUs, not on GPUs)."),
    ] = "torch",
    as_json: Annotated[bool, typer.Option("--json", help="Print what was trained as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
) -> None:
    """Train the stages of a spec: pre-training, mid-training, SFT and quantization-aware training.

    Every stage ends with a checkpoint that `moec compile --checkpoint OUT/STAGE` takes. Ctrl-C saves the state.

    Example: [bold]moec train specs/models/mobilemoe-nano.yaml --data corpus --out run[/bold]

    After a stop: [bold]moec train specs/models/mobilemoe-nano.yaml --data corpus --out run --resume[/bold]

    Healing an upcycled mixture: [bold]moec train SPEC --data corpus --init mixture --teacher dense --out run[/bold]

    In 4 processes: [bold]python -m torch.distributed.run --nproc-per-node 4 -m moec train SPEC[/bold]
    """
    from moec.cli.output import emit_json, table
    from moec.compiler.errors import UserError
    from moec.compiler.progress import Progress
    from moec.compiler.spec import load_spec

    if device not in (None, "cpu", "cuda"):
        raise UserError(f"--device {device!r} is not known", remedy="use cpu or cuda")
    loaded = load_spec(spec)
    import torch  # seconds, which a fault in the spec need not wait for

    from moec.training.memory import keep_freed_memory
    from moec.training.run import BACKENDS, train

    chosen = next((name for name in BACKENDS if name == backend), None)
    if chosen is None:
        raise UserError(f"--backend {backend!r} is not known", remedy=f"use {' or '.join(BACKENDS)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no CUDA that torch can use", remedy="use --device cpu")
    keep_freed_memory()
    result = train(
        loaded,
        data=data,
        out=out,
        stage=stage,
        resume=resume,
        init=init,
        seed=seed,
        threads=threads,
        device=device,
        backend=chosen,
        teacher=teacher,
        progress=Progress(quiet=quiet),
    )
    if not result.main:
        return
    if as_json:
        emit_json({"out": result.out, "stages": [vars(stage) for stage in result.stages]})
        return
    rows = [
        (r.name, f"{r.steps:,}", f"{r.tokens:,}", f"{r.seconds:.0f}", _losses(r.heldout), result.out / r.checkpoint)
        for r in result.stages
    ]
    columns = ("stage", "steps", "tokens", "seconds", "held-out loss", "checkpoint")
    table(f"{loaded.name}: trained", columns, rows, right=(1, 2, 3))


def _losses(heldout: dict[str, float]) -> str:
    return ", ".join(f"{domain} {loss:.3f}" for domain, loss in heldout.items())
