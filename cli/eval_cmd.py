"""`moec eval`: lm-evaluation-harness on checkpoints and artifacts alike."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    app.command("eval")(evaluate_model)


def evaluate_model(
    model: Annotated[Path, typer.Argument(metavar="ARTIFACT|CHECKPOINT", help="A folder of either kind.")],
    tasks: Annotated[str | None, typer.Option(help="Names, comma-separated. Without it: list what there is.")] = None,
    include: Annotated[
        list[Path] | None, typer.Option(help="A corpus, or a folder of YAML tasks. May be given several times.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of each task.")] = None,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="Compute a checkpoint with the rounding of the artifact made of it.")
    ] = False,
    tokenizer: Annotated[Path | None, typer.Option(help="A tokenizer.json; default: the folder's.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
) -> None:
    """Evaluate with the field's own harness, offline, on tasks that are files.

    Every corpus brings tasks made of its held-out documents; `shipped_text` needs no corpus.

    Example: [bold]moec eval run/sft --include corpus --tasks instructions_choice,heldout_web --limit 100[/bold]
    """
    from moec.cli.output import emit_json, table
    from moec.compiler.progress import Progress
    from moec.training.evaluate import evaluate, list_tasks

    if tasks is None:
        names = list_tasks(include or ())
        if as_json:
            emit_json({"tasks": names})
        else:
            print("\n".join(names))
        return
    result = evaluate(
        model,
        [name.strip() for name in tasks.split(",") if name.strip()],
        include=include or (),
        limit=limit,
        simulate=simulate,
        tokenizer=tokenizer,
        progress=Progress(quiet=quiet),
    )
    if as_json:
        emit_json(result)
        return
    rows = []
    for task, values in result["results"].items():
        for metric, value in values.items():
            if "stderr" not in metric:
                error = values.get(f"{metric}_stderr")
                rows.append(
                    (
                        task,
                        result["questions"].get(task, ""),
                        metric,
                        f"{value:.4f}",
                        "" if error is None else f"{error:.4f}",
                    )
                )
    columns = ("task", "questions", "metric", "value", "± standard error")
    table(f"{model} ({result['form']})", columns, rows, right=(1, 3, 4))
