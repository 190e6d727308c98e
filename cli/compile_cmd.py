"""`moec compile`: a spec becomes an artifact."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moec.cli.trust import Trust

if TYPE_CHECKING:
    from moec.compiler.spec import Spec


def register(app: typer.Typer) -> None:
    app.command("compile")(compile_spec)


def compile_spec(
    spec: Annotated[Path, typer.Argument(metavar="SPEC", help="The YAML spec, a checkpoint folder, or a GGUF file.")],
    target: Annotated[
        str | None, typer.Option(help="One of `moec targets`; default: the spec's, if it names one.")
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Folder with the weights; overrides the spec's.")] = None,
    out: Annotated[Path | None, typer.Option(help="Artifact folder to write. Default: NAME-TARGET here.")] = None,
    method: Annotated[
        str | None, typer.Option(help="How codes are computed: rtn, gptq, awq_gptq, ... or auto; overrides the spec's.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Text or JSON lines to calibrate such a method on; overrides the spec's.")
    ] = None,
    dequantize: Annotated[
        str | None,
        typer.Option(metavar="TYPES", help="Codes to quantize anew: Q4_K,Q6_K of a GGUF file, FP8 of a folder, ..."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Compile even what does not fit the spec's device.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was built as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
    trust: Trust = False,
) -> None:
    """Compile a spec into an artifact folder that `moec run` and ExecuTorch apps load.

    A checkpoint folder in place of a spec is compiled by the spec that its config.json implies (INT4 in groups of 32,
    or the codes that it holds), which is printed; a GGUF file by one that keeps its codes (Q4_0, Q8_0, Q5_0, IQ4_NL,
    MXFP4). Codes of other types are quantized anew if --dequantize names them.

    An artifact that exists at --out is replaced only when the new one is complete.

    Example: [bold]moec compile specs/models/mobilemoe-s.yaml --checkpoint MobileMoE-S-QAT --out build/s[/bold]

    Example: [bold]moec compile SmolLM2-135M-Instruct --out build/smollm2[/bold]

    Example: [bold]moec compile Qwen3-0.6B-Q8_0.gguf --out build/qwen3[/bold]

    Example: [bold]moec compile my.yaml --method awq_gptq --calibration chats.jsonl --out build/my[/bold]
    """
    from moec.cli.given import spec_given
    from moec.cli.output import emit_json, say, size
    from moec.compiler.progress import Progress

    loaded = with_method(spec_given(spec, dequantize=dequantize, quiet=quiet), method, calibration)
    from moec.compiler import build  # torch: seconds, which a fault in the spec need not wait for

    progress = Progress(quiet=quiet)
    artifact = build.compile(loaded, target=target, checkpoint=checkpoint, out=out, progress=progress, force=force)
    manifest = artifact.manifest
    if as_json:
        emit_json({"artifact": artifact.folder, "bytes": artifact.bytes, "manifest": manifest})
        return
    say(f"{artifact.folder}: {manifest.name} for {manifest.target}, {size(artifact.bytes)}")
    if manifest.calibration is not None:
        print(calibrated(manifest.calibration))
    for note in manifest.notes:
        say(f"note: {note}")


def with_method(spec: Spec, method: str | None, file: Path | None) -> Spec:
    """The spec with another method of quantization, or other text to calibrate it on."""
    from moec.compiler.errors import UserError
    from moec.compiler.spec.methods import AUTO, method_names
    from moec.compiler.spec.quantization import Calibration

    if method is None and file is None:
        return spec
    if spec.quantization is None:
        raise UserError("the spec quantizes nothing", place=spec.name, remedy="leave --method and --calibration out")
    changes: dict[str, Any] = {}
    if method is not None:
        if method not in (AUTO, *method_names()):
            known = ", ".join((*method_names(), AUTO))
            raise UserError(f"there is no quantization method {method!r}", remedy=f"known here: {known}")
        changes["method"] = method
    if file is not None:
        given = spec.quantization.calibration or Calibration()
        lines = file.suffix.lower() in (".jsonl", ".ndjson")
        text = {"text": None if lines else file.absolute(), "jsonl": file.absolute() if lines else None}
        changes["calibration"] = given.model_copy(update={**text, "domains": None})
    return spec.model_copy(update={"quantization": spec.quantization.model_copy(update=changes)})


def calibrated(report: Mapping[str, Any]) -> str:
    """One line about a calibration: method, tokens, and the experts that saw fewest tokens."""
    text = f"calibrated by {report['method']} on {report['tokens']:,} tokens"
    experts = [e for layer in report["moe"] for e in layer["experts"]]
    if experts:
        least = min(e["tokens"] + e["forced"] for e in experts)
        shown = sum(e["forced"] > 0 for e in experts)
        text += f"; {len(experts)} experts saw at least {least}, {shown} of them more than the router sends them"
    if "measured" in report:
        text += "; KLD " + ", ".join(f"{name} {value:.3f}" for name, value in report["measured"].items())
    return text
