"""`moec eval`: lm-evaluation-harness on checkpoints and artifacts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moec.cli.trust import Trust
from moec.compiler.errors import UserError


def register(app: typer.Typer) -> None:
    app.command("eval")(evaluate_model)


def evaluate_model(
    model: Annotated[Path, typer.Argument(metavar="ARTIFACT|CHECKPOINT", help="A folder of either kind.")],
    tasks: Annotated[str | None, typer.Option(help="Task names, comma-separated. Without it: list the tasks.")] = None,
    include: Annotated[
        list[Path] | None, typer.Option(help="A corpus, or a folder of YAML tasks. May be given several times.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FOLDER: the files of a task of the harness, such as arc_easy. May be repeated."),
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option(help="A checkpoint or artifact to compare with, on the same questions.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use this many questions of each task.")] = None,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="Evaluate a checkpoint with the rounding of its artifact.")
    ] = False,
    tokenizer: Annotated[Path | None, typer.Option(help="A tokenizer.json; default: the folder's.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
    trust: Trust = False,
) -> None:
    """Evaluate a model with lm-evaluation-harness, offline.

    Every corpus brings tasks made of its held-out documents; `shipped_text` needs no corpus; tasks of the harness, such
    as arc_easy, take their data from --data or from the cache of the datasets library.

    Examples:

      [bold]moec eval run/sft --include corpus --tasks instructions_choice,heldout_web --limit 100[/bold]

      [bold]moec eval build/s --baseline MobileMoE-S --tasks arc_easy --data arc_easy=ai2_arc[/bold]
    """
    from moec.cli.output import emit_json, say
    from moec.compiler.progress import Progress
    from moec.training.evaluate import evaluate, list_tasks

    if tasks is None:
        names = list_tasks(include or ())
        if as_json:
            emit_json({"tasks": names})
        else:
            say("\n".join(names))
        return
    wanted = [name.strip() for name in tasks.split(",") if name.strip()]
    places = dict(_place(argument) for argument in data or ())

    def run(folder: Path, *, rounded: bool) -> dict[str, Any]:
        return evaluate(
            folder,
            wanted,
            include=include or (),
            data=places,
            limit=limit,
            simulate=rounded,
            tokenizer=tokenizer,
            progress=Progress(quiet=quiet),
        )

    result = run(model, rounded=simulate)
    if baseline is not None:
        result["baseline"] = run(baseline, rounded=False)
    if as_json:
        emit_json(result)
    else:
        _show(result)


def _place(argument: str) -> tuple[str, Path]:
    name, equals, folder = argument.partition("=")
    if not equals or not name or not folder:
        raise UserError(f"--data {argument!r} is not NAME=FOLDER", remedy="write --data arc_easy=FOLDER")
    return name, Path(folder)


def _show(result: dict[str, Any]) -> None:
    """A row for each metric; beside a baseline, its value and the difference."""
    from moec.cli.output import table

    other = result.get("baseline")
    rows = []
    for task, values in result["results"].items():
        for metric, value in values.items():
            if "stderr" in metric:
                continue
            error = values.get(f"{metric}_stderr")
            row = [task, result["questions"].get(task, ""), metric, f"{value:.4f}"]
            row.append("" if error is None else f"{error:.4f}")
            if other is not None:
                before = other["results"].get(task, {}).get(metric)
                row += ["", ""] if before is None else [f"{before:.4f}", f"{value - before:+.4f}"]
            rows.append(row)
    columns = ["task", "questions", "metric", "value", "± standard error"]
    title = f"{result['model']} ({result['form']})"
    if other is not None:
        columns += ["baseline", "difference"]
        title += f" against {other['model']} ({other['form']})"
    table(title, columns, rows, right=(1, 3, 4, 5, 6))
