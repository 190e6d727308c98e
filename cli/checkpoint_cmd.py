"""`moec checkpoint`: synthesize a checkpoint, inspect one, write its spec, or write it for transformers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moec.cli.status import CHECK_FAILED
from moec.compiler.errors import UserError

if TYPE_CHECKING:
    from moec.compiler.spec import Spec
    from moec.sources.inspection import Inspection

_commands = typer.Typer(no_args_is_help=True, help="Make, look into, describe and convert checkpoint folders.")


def register(app: typer.Typer) -> None:
    app.add_typer(_commands, name="checkpoint")


@_commands.command("synthesize")
def synthesize(
    spec: Annotated[Path, typer.Argument(metavar="SPEC", help="The YAML spec of the model that needs weights.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same bytes.")] = 0,
    qat: Annotated[bool, typer.Option("--qat", help="Packed INT4, as QAT checkpoints are released.")] = False,
    router: Annotated[
        str, typer.Option(help="clustered: experts prefer random kinds of tokens; structured: topics of real text.")
    ] = "clustered",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
) -> None:
    """Write a random checkpoint in the released layout, for CI and for machines without access to the gated weights.

    Example: [bold]moec checkpoint synthesize specs/models/mobilemoe-tiny.yaml --out build/tiny --seed 1 --qat[/bold]
    """
    if router not in ("clustered", "structured"):
        raise UserError(f"--router {router[:40]!r} is not known", remedy="use clustered or structured")
    from moec import checkpoints
    from moec.compiler.progress import Progress
    from moec.compiler.spec import load_spec

    checkpoints.synthesize(
        load_spec(spec),
        out,
        seed=seed,
        qat=qat,
        router="structured" if router == "structured" else "clustered",
        progress=Progress(quiet=quiet),
    )
    print(out)


@_commands.command("inspect")
def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint folder, or a GGUF file.")],
    spec: Annotated[Path | None, typer.Option(help="Also say what does not fit this spec.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Say what a checkpoint holds. Exit status 1 if it does not fit the spec given.

    Example: [bold]moec checkpoint inspect MobileMoE-S-QAT --spec specs/models/mobilemoe-s.yaml[/bold]
    """
    from moec.compiler.spec import load_spec

    inspect_checkpoint(folder, spec=load_spec(spec) if spec else None, as_json=as_json)


def inspect_checkpoint(folder: Path, *, spec: Spec | None, as_json: bool) -> None:
    """Print the findings about `folder`; typer.Exit(1) if it is damaged or contradicts `spec`."""
    from moec.cli.output import emit_json, say
    from moec.sources.inspection import inspect as look_into

    found = look_into(folder, spec)
    if as_json:
        emit_json(found)
    else:
        _show(found)
    for problem in found.problems:
        say(problem, stream=sys.stderr)
    if found.problems:
        raise typer.Exit(CHECK_FAILED)


def _show(found: Inspection) -> None:
    from moec.cli.output import size, table, words

    tokenizer = found.tokenizer
    rows = [
        ("architecture", found.architecture or "unknown"),
        ("layout", found.layout),
        ("files", words(found.files)),
        ("tensors", f"{found.tensors}, {size(found.bytes)}"),
        ("types", ", ".join(f"{dtype} {size(count)}" for dtype, count in found.dtypes.items())),
        *[(f"{kind} parameters", f"{count:,}") for kind, count in found.parameters.items()],
        ("tokenizer", "none" if tokenizer is None else f"{tokenizer.vocab_size or 'unreadable'} tokens"),
    ]
    table(found.folder, ["", ""], rows)
    roles = [(r.role, r.tensors, f"{r.parameters:,}", size(r.bytes)) for r in found.roles]
    if roles:
        table("\nWeights by role", ["role", "tensors", "parameters", "size"], roles, right=[1, 2, 3])


@_commands.command("spec")
def write_spec(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint folder, or a GGUF file.")],
    dequantize: Annotated[
        str | None,
        typer.Option(metavar="TYPES", help="Codes to quantize anew: Q4_K,Q6_K of a GGUF file, FP8 of a folder, ..."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the spec to this file instead of stdout.")] = None,
) -> None:
    """Write the spec that a checkpoint's config.json implies, or the metadata of a GGUF file.

    Example: [bold]moec checkpoint spec MobileMoE-S-QAT --out my-model.yaml[/bold]

    Example: [bold]moec checkpoint spec Qwen3-0.6B-Q4_K_M.gguf --dequantize Q4_K,Q6_K --out qwen3.yaml[/bold]
    """
    from moec.cli.given import text_implied
    from moec.cli.output import write_text

    text = text_implied(folder, dequantize)
    if out is None:
        print(text, end="")
    else:
        write_text(out, text)
        print(out)


@_commands.command("export")
def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint of a mixture, trained or upcycled here.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No notes on stderr.")] = False,
) -> None:
    """Write a mixture as transformers reads it: a folder of Glm4MoeForCausalLM that computes the same logits.

    Example: [bold]moec checkpoint export run/midtrain --out mixture-hf[/bold]

    It is compiled again like any model of transformers: [bold]moec checkpoint spec mixture-hf --out mixture.yaml[/bold]
    """
    from moec.checkpoints.transformers_form import export_transformers_form
    from moec.cli.output import say

    found = export_transformers_form(folder, out)
    if not quiet:
        for note in found.notes:
            say(f"note: {note}", stream=sys.stderr)
    print(found.out)
