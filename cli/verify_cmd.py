"""`moec verify`, `moec bisect`, `moec diff`: does it compute what the model computes, and if not, since which pass?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moec.cli.memory import MemoryMb
from moec.cli.status import CHECK_FAILED
from moec.cli.trust import Trust

if TYPE_CHECKING:
    from moec.analysis.verify.diff import Difference
    from moec.analysis.verify.report import Report

EACH = "each"
_MAX_TEXT = 256 << 20  # bytes of a text to measure on


def register(app: typer.Typer) -> None:
    app.command("verify")(verify)
    app.command("bisect")(bisect)
    app.command("diff")(diff)


def verify(
    path: Annotated[Path, typer.Argument(metavar="ARTIFACT|SPEC", help="A folder that was compiled, or a YAML spec.")],
    checkpoint: Annotated[Path | None, typer.Option(help="The weights, if they were moved after compiling.")] = None,
    after: Annotated[
        str | None, typer.Option(help="For a spec: `each` checks every pass, a name only that one. Default: each.")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="For a spec with several targets: the one whose passes to check.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="For an artifact: compare it with these targets and artifact folders, separated by commas."),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report here; - is stdout.")] = None,
    junit_file: Annotated[Path | None, typer.Option("--junit", help="Write JUnit XML here, for CI.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens to compare; more take longer.")] = None,
    text: Annotated[Path | None, typer.Option(help="Compare on this text file instead of the shipped prompts.")] = None,
    reference: Annotated[
        Path | None, typer.Option(help="A checkpoint of the float model, if the artifact's own holds codes.")
    ] = None,
    quality_tokens: Annotated[
        int | None, typer.Option(min=0, help="Tokens to measure the cost of quantization on (default 1536); 0: do not.")
    ] = None,
    max_kld: Annotated[
        float | None, typer.Option(min=0, help="Fail if the mean KL divergence from the float model exceeds this.")
    ] = None,
    memory_mb: MemoryMb = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
    trust: Trust = False,
) -> None:
    """Compare an artifact with the eager model that holds the same codes, or each pass of a spec with its input.

    For an artifact it also measures what quantization cost: KL divergence from the float model, agreement of the
    likeliest token, and perplexity, on held-out text or on --text.

    With --against, it compares artifacts of other targets for the same spec and weights (compiled here, or folders that
    exist) and the eager model pairwise: a target that is wrong disagrees with the others and is named.

    With --memory-mb, the artifact runs within that budget, in a process of its own, and its logits must also be those
    of the artifact in memory, bit for bit.

    Exit status 1 if a tolerance is missed; the report names the check, the place, and by how much.

    Examples: [bold]moec verify build/s --json report.json[/bold], [bold]moec verify build/s --max-kld 0.1[/bold],
    [bold]moec verify build/tiny --against onnx,mlir,metal[/bold]
    """
    from moec.cli.output import check_apart, check_writable
    from moec.compiler.errors import UserError
    from moec.compiler.progress import Progress

    check_writable(json_file, junit_file)
    check_apart(json_file, junit_file)
    given = {
        "--reference": reference,
        "--quality-tokens": quality_tokens,
        "--max-kld": max_kld,
        "--memory-mb": memory_mb,
    }
    measured = [name for name, value in given.items() if value is not None]
    if measured and (against is not None or path.is_file()):
        raise UserError(f"{measured[0]} is for one artifact", place=str(path), remedy="name a compiled folder alone")
    progress = Progress(quiet=quiet)
    if path.is_file():
        from moec.compiler.spec import load_spec

        spec = load_spec(path)
        if against is not None:
            raise UserError("--against is for artifacts", place=str(path), remedy="compile the spec first")
        from moec.analysis.verify.spec import DEFAULT_TOKENS, verify_spec

        report = verify_spec(
            spec,
            checkpoint=checkpoint,
            target=target,
            after=None if after in (None, EACH) else after,
            tokens=tokens or DEFAULT_TOKENS,
            text=read_text(text),
            progress=progress,
        )
    else:
        if after is not None or target is not None:
            option = "--after" if after is not None else "--target"
            raise UserError(f"{option} is for specs", place=str(path), remedy="name the YAML spec instead")
        if against is not None:
            others = [name.strip() for name in against.split(",") if name.strip()]
            if not others:
                raise UserError("--against names no target", remedy="write --against onnx,mlir or a folder")
            from moec.analysis.verify import agreement

            found = agreement.verify_agreement(
                path,
                others,
                checkpoint=checkpoint,
                tokens=tokens or agreement.DEFAULT_TOKENS,
                text=read_text(text),
                progress=progress,
            )
            return _show(found, json_file, junit_file)
        from moec.analysis.verify.artifact import DEFAULT_TOKENS, QUALITY_TOKENS, verify_artifact

        report = verify_artifact(
            path,
            checkpoint=checkpoint,
            tokens=tokens or DEFAULT_TOKENS,
            text=read_text(text),
            reference=reference,
            quality_tokens=QUALITY_TOKENS if quality_tokens is None else quality_tokens,
            max_kld=max_kld,
            memory_mb=memory_mb,
            progress=progress,
        )
    _show(report, json_file, junit_file)


def bisect(
    spec: Annotated[Path, typer.Argument(metavar="SPEC", help="The YAML spec.")],
    checkpoint: Annotated[
        Path | None, typer.Option(help="Weights to run with. Default: the spec's, else random.")
    ] = None,
    target: Annotated[str | None, typer.Option(help="One of the spec's targets; needed when it names several.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens to compare.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the finding as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
    trust: Trust = False,
) -> None:
    """Name the first rewrite that changes what the model computes: pass, layer and node. Exit status 1 if there is one.

    Example: [bold]moec bisect specs/models/mobilemoe-tiny.yaml[/bold]
    """
    from moec.cli.output import emit_json, say
    from moec.compiler.progress import Progress
    from moec.compiler.spec import load_spec

    loaded = load_spec(spec)
    from moec.analysis.verify.spec import DEFAULT_TOKENS, bisect_spec

    found = bisect_spec(
        loaded, checkpoint=checkpoint, target=target, tokens=tokens or DEFAULT_TOKENS, progress=Progress(quiet=quiet)
    )
    if as_json:
        emit_json(found.to_json())
    else:
        say(found.text())
    if found.culprit is not None:
        raise typer.Exit(CHECK_FAILED)


def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="An artifact, a spec, or a dumped graph (*.txt).")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another one of the same kind.")],
    stage: Annotated[str, typer.Option(help="For specs: compare the graphs at this stage.")] = "fused",
    tokens: Annotated[int, typer.Option(min=1, help="For artifacts: tokens whose logits are compared.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print the differences as JSON.")] = False,
    trust: Trust = False,
) -> None:
    """Show what differs between two artifacts (manifest and logits) or two graphs (text). Exit status 1 if anything
    does.

    Example: [bold]moec diff build/before build/after[/bold]
    """
    from moec.analysis.verify.spec import diff_paths
    from moec.cli.output import emit_json

    found = diff_paths(a, b, stage=stage, tokens=tokens)
    if as_json:
        emit_json(found.to_json())
    else:
        _print_difference(found)
    if not found.same:
        raise typer.Exit(CHECK_FAILED)


def read_text(text: Path | None) -> str | None:
    """The text of a file to measure on; UserError if the file is no text, or empty."""
    from moec.compiler import files
    from moec.compiler.errors import UserError

    if text is None:
        return None
    read = files.read_text(text, limit=_MAX_TEXT, remedy="name a text file in UTF-8")
    if not read.strip():
        raise UserError("there is no token in the text to verify with", place=str(text), remedy="give a longer text")
    return read


def _show(report: Report, json_file: Path | None, junit_file: Path | None) -> None:
    from moec.cli.output import json_text, say, write_text

    document = json_text(report.to_json())
    if junit_file is not None:
        write_text(junit_file, report.junit())
    if json_file is not None and str(json_file) != "-":
        write_text(json_file, document + "\n")
    say(document if str(json_file) == "-" else report.text())
    if not report.passed:
        raise typer.Exit(report.exit_status)


def _print_difference(found: Difference) -> None:
    from moec.cli.output import say, table

    if found.entries:
        table(f"{found.a} and {found.b}", ["what", "A", "B"], found.entries)
    for line in found.lines:
        say(line)
    for name, value in found.figures.items():
        say(f"{name}: {value:.8g}")
    if found.same:
        print("no difference")
