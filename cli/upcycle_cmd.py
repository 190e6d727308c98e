"""`moec upcycle`: a mixture of experts from a pretrained dense model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def register(app: typer.Typer) -> None:
    app.command("upcycle")(upcycle_dense)


def upcycle_dense(
    spec: Annotated[Path, typer.Argument(metavar="SPEC", help="The YAML spec of the mixture.")],
    dense: Annotated[Path, typer.Option("--from", help="Folder of the dense checkpoint, moec's or transformers'.")],
    out: Annotated[Path, typer.Option(help="Checkpoint folder to write, with spec.yaml and upcycle.json.")],
    text: Annotated[
        Path | None, typer.Option(help="Text file or .jsonl that the dense model reads. Default: the shipped prompts.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="A corpus of `moec data build` to read instead, its domains alike.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, max=1 << 24, help="Tokens of text to read, at most.")] = 32768,
    refit: Annotated[
        bool, typer.Option(help="Fit second products to the chosen experts by least squares, where it pays.")
    ] = True,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the clusters.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
) -> None:
    """Make the mixture of experts that SPEC describes of a pretrained dense model, by splitting its feed-forward blocks
    or copying them; the widths in the spec decide which.

    Split (shared_width + experts * expert_width = the block's neurons): the most used neurons become the shared
    expert, the others experts by co-activation, and a token uses fewer neurons than before. Copy (expert_width = the
    block's neurons, shared_width 0): every expert begins as the block, and the mixture computes what the dense model
    computes until it is trained. Routers are fitted to the blocks' inputs on text.

    Example: [bold]moec upcycle specs/upcycling/smollm2-split.yaml --from smollm2 --out mixture[/bold]

    Then heal and compile: [bold]moec train SPEC --data corpus --init mixture --teacher smollm2 --out run[/bold],
    [bold]moec compile mixture/spec.yaml --out artifact[/bold]
    """
    from moec.compiler.errors import UserError
    from moec.compiler.progress import Progress
    from moec.compiler.spec import load_spec

    if text is not None and data is not None:
        raise UserError("--text and --data are given", remedy="choose one: both say what the dense model reads")
    loaded = load_spec(spec)
    from moec.training.upcycle.upcycle import upcycle  # torch: seconds, which a fault in the spec need not wait for

    found = upcycle(
        loaded,
        dense,
        out,
        text=text,
        data=data,
        tokens=tokens,
        refit=refit,
        seed=seed,
        progress=Progress(quiet=quiet),
    )
    if as_json:
        from moec.cli.output import emit_json

        emit_json({"out": out, **found.report})
        return
    _show(out, found.report)


def _show(out: Path, report: dict[str, Any]) -> None:
    from moec.cli.output import table

    parameters, spread = report["parameters"], report["tokens_per_expert"]
    rows = [
        (n, f"{layer['error']:.4f}", min(layer["tokens_per_expert"]), max(layer["tokens_per_expert"]))
        for n, layer in enumerate(report["layers"])
    ]
    columns = ("layer", "error", "tokens of the least used expert", "of the most used")
    table(f"{out}: {report['recipe']}", columns, rows, right=range(4))
    print(f"\nneurons that a token uses: {report['neurons_active']:.0%} of the dense block's")
    print(
        f"parameters: {parameters['dense'] / 1e6:.1f} M dense, {parameters['total'] / 1e6:.1f} M now, "
        f"{parameters['active'] / 1e6:.1f} M active"
    )
    print(f"text: {report['text']['tokens']:,} tokens; an even share is {spread['even']:,.0f} for each expert")
    print(f"\n{out}: `moec compile {out / 'spec.yaml'} --out ARTIFACT`")
