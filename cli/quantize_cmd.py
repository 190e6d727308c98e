"""`moec quantize`: choose the bits of each part of a model for an artifact of a given size or divergence."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moec.cli.status import CHECK_FAILED
from moec.compiler.errors import UserError

if TYPE_CHECKING:
    from moec.analysis.bits.choose import Chosen
    from moec.analysis.verify.quality.divergence import Divergence

_MOST_MB = 1e7
_TRIES = 4  # at a mixture within --max-kld, each with a smaller expected divergence than the one before
_SAFETY = 0.95


def register(app: typer.Typer) -> None:
    app.command("quantize")(quantize)


def quantize(
    spec: Annotated[Path, typer.Argument(metavar="SPEC", help="The YAML spec, or a checkpoint folder.")],
    out: Annotated[Path, typer.Option(help="Write the spec with the chosen bits here.")],
    target_size: Annotated[
        float | None, typer.Option(metavar="MB", help="The whole artifact in MB (10^6 bytes), at most.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Use the memory budget of a device: its name (`moec device list`) or file.")
    ] = None,
    max_kld: Annotated[
        float | None,
        typer.Option(
            help="KL divergence from the float model in nats, at most; given alone: the fewest bytes within it."
        ),
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="One of `moec targets`; default: the spec's, if it names one.")
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Folder with the weights; overrides the spec's.")] = None,
    method: Annotated[
        str | None, typer.Option(help="How codes are computed: awq_gptq, ...; overrides the spec's.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Text or JSON lines to calibrate such a method on; overrides the spec's.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of held-out text that the result is measured on.")] = 1536,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
) -> None:
    """Choose bits and group size of every part of a model so that its artifact fits a size and diverges least.

    Each part's own divergence is measured on calibration text, the best mixture of INT4 and INT8 in groups of 32 to 256
    is computed from that, and the result is measured on held-out text. The output is a plain spec for `moec compile`,
    with exceptions by name under `quantization: tensors:`. Measurements are cached: another size is quick.

    With --max-kld the exit status is 1, and nothing is written, if the result diverges more.

    Example: [bold]moec quantize my.yaml --target-size 92 --method awq_gptq --out my-92.yaml[/bold]

    Example: [bold]moec quantize SmolLM2-135M-Instruct --max-kld 0.3 --out small.yaml[/bold]
    """
    from moec.cli.compile_cmd import with_method
    from moec.cli.given import spec_given
    from moec.cli.output import check_writable, emit_json, write_text
    from moec.compiler.progress import Progress

    _check(target_size, device, max_kld)
    check_writable(out)
    loaded = with_method(spec_given(spec, quiet=quiet), method, calibration)
    from moec.analysis.bits.choose import choose, measured, sizes
    from moec.analysis.bits.report import divergence, spec_text
    from moec.analysis.plan.devices import load_device
    from moec.compiler import build

    progress = Progress(quiet=quiet)
    name, _ = build.chosen_target(loaded, target)
    chosen_device = None if device is None else load_device(device)
    if checkpoint is not None:
        loaded = loaded.model_copy(update={"checkpoint": checkpoint.absolute()})
    store = build.open_checkpoint(loaded, checkpoint)
    costs = measured(loaded, store, name, progress)
    most = None if target_size is None else round(target_size * 1e6)
    given = sizes(loaded, store, name, costs, most=most, device=chosen_device)
    expected, tries = max_kld, _TRIES if given.room is None else 1
    while True:
        chosen = choose(loaded, costs, given, max_kld=expected)
        found = divergence(chosen.spec, store, name, tokens, progress)
        within = max_kld is None or found.kld <= max_kld
        tries -= 1
        if within or not tries:
            break
        assert max_kld is not None
        assert expected is not None
        expected *= (
            _SAFETY * max_kld / found.kld
        )  # together, parts cost more than the sum of each alone, and activations are rounded too
    if within:
        size = f"{chosen.bytes / 1e6:.1f} MB for {name}"
        said = f"moec quantize: {size}, KL divergence {found.kld:.4f} on {found.tokens} tokens"
        write_text(out, spec_text(chosen, said))
    if as_json:
        emit_json(_facts(chosen, found, out if within else None))
    else:
        _show(chosen, found)
        if within:
            print(f"\n{out}: `moec compile {out}`")
    if not within:
        import sys

        print(f"KL divergence {found.kld:.4f} is more than {max_kld:g}: nothing was written", file=sys.stderr)
        raise typer.Exit(CHECK_FAILED)


def _check(target_size: float | None, device: str | None, max_kld: float | None) -> None:
    if target_size is None and device is None and max_kld is None:
        raise UserError("no size, device or divergence is given", remedy="give --target-size, --device or --max-kld")
    if target_size is not None and not 0 < target_size < _MOST_MB:
        raise UserError(f"--target-size {target_size:g} is not a size in MB", remedy="give one above 0")
    if max_kld is not None and not 0 < max_kld < 1e6:
        raise UserError(f"--max-kld {max_kld:g} is not a divergence in nats", remedy="give one above 0")


def _facts(chosen: Chosen, found: Divergence, out: Path | None) -> dict[str, Any]:
    parts = [
        {"weights": names, "bits": c.bits, "group_size": c.group_size, "bytes": c.bytes, "kld": c.kld}
        for names, c in zip(chosen.costs.names, chosen.choices, strict=True)
    ]
    about = {"spec": out, "bytes": chosen.bytes, "expected_kld": chosen.kld}
    return {**about, "measured": found.to_json(), "parts": parts}


def _show(chosen: Chosen, found: Divergence) -> None:
    from moec.analysis.bits.report import by_kind
    from moec.cli.output import size, table

    table(
        "Chosen",
        ["weights", "stored as", "size", "expected divergence"],
        [(kind, formats, size(count), f"{kld:.4f}") for kind, formats, count, kld in by_kind(chosen)],
        right=(2, 3),
    )
    print(f"\nthe whole artifact: {size(chosen.bytes)}")
    print(f"KL divergence: {chosen.kld:.4f} expected of the weights; {found.kld:.4f} measured on {found.tokens} tokens")
