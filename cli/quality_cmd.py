"""`moec quality`: what quantization cost, of one or several artifacts and checkpoints on the same text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moec.cli.status import CHECK_FAILED


def register(app: typer.Typer) -> None:
    app.command("quality")(quality)


def quality(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="PATH...", help="Artifacts, and checkpoints of float models of the same kind."),
    ],
    reference: Annotated[
        Path | None, typer.Option(help="The float model. Default: the checkpoint that the first artifact names.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Measure on this text file instead of the shipped text.")] = None,
    tokens: Annotated[int | None, typer.Option(min=2, help="Tokens to measure on (default 9216).")] = None,
    max_kld: Annotated[
        float | None, typer.Option(min=0, help="Exit status 1 if a mean KL divergence exceeds this.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write divergence against bytes here, as SVG.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
) -> None:
    """Compare what models predict with what the float model predicts: mean and tail of the KL divergence in nats, how
    often the likeliest token is the same, and perplexity.

    Artifacts run as they ship, with their rounding of activations and cache. All get the same tokens; a model whose
    tokenizer makes others of the text is refused.

    Example: [bold]moec quality build/int4 build/int8 --plot build/quality.svg[/bold]
    """
    from moec.cli.output import check_writable, emit_json, size, table
    from moec.cli.verify_cmd import read_text
    from moec.compiler.errors import UserError
    from moec.compiler.progress import Progress

    check_writable(plot)
    from moec.analysis.verify.quality.compared import compare_quality
    from moec.analysis.verify.quality.texts import ALL_TOKENS

    rows = compare_quality(
        paths, reference=reference, tokens=tokens or ALL_TOKENS, text=read_text(text), progress=Progress(quiet=quiet)
    )
    if plot is not None:
        from moec.analysis.verify.quality.plot import write_plot

        try:
            write_plot(plot, rows)
        except OSError as error:
            raise UserError(f"cannot be written: {error.strerror}", place=str(plot), remedy="choose another") from error
    if as_json:
        emit_json({"models": [row.to_json() for row in rows]})
    else:
        table(
            f"against {rows[0].reference} on {rows[0].found.tokens:,} tokens",
            ["model", "size", "KL divergence", "±", "median", "99%", "top-1", "perplexity", "of the float model"],
            [
                (
                    row.name, size(row.bytes), f"{f.kld:.4f}", f"{f.error:.4f}", f"{f.median:.4f}", f"{f.p99:.3f}",
                    f"{f.top1:.1%}", f"{f.perplexity:.2f}", f"{f.reference_perplexity:.2f}",
                )
                for row, f in ((row, row.found) for row in rows)
            ],
            right=range(1, 9),
        )  # fmt: skip
    if max_kld is not None and not all(row.found.kld <= max_kld for row in rows):
        raise typer.Exit(CHECK_FAILED)
