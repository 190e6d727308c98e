"""`moec quantize`: choose the bits of each part of a model for an artifact of a given size or divergence."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moec.cli.status import CHECK_FAILED
from moec.compiler.errors import UserError

if TYPE_CHECKING:
    from moec.analysis.bits.choose import Chosen, Costs, Sizes
    from moec.analysis.verify.quality.divergence import Divergence
    from moec.compiler.progress import Progress
    from moec.compiler.source import Checkpoint
    from moec.compiler.spec import Spec

_MOST_MB = 1e7
_TRIES = 4  # at a mixture within --max-kld, each with a smaller expected divergence than the one before
_SAFETY = 0.95


def register(app: typer.Typer) -> None:
    app.command("quantize")(quantize)


def quantize(
    spec: Annotated[Path, typer.Argument(metavar="SPEC", help="The YAML spec, or a checkpoint folder.")],
    out: Annotated[
        Path, typer.Option(help="Write the spec with the chosen bits here; {size} in its name stands for the MB.")
    ],
    target_size: Annotated[
        str | None,
        typer.Option(metavar="MB", help="The whole artifact in MB (10^6 bytes), at most; several: 92,87,84."),
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

    Each part's own divergence is measured on calibration text, the best mixture of NL3, INT4, IQ4_NL and INT8 in
    groups of 32 to 256 is computed from that, and the result is measured on held-out text. The output is a plain spec
    for `moec compile`, with exceptions by name under `quantization: tensors:`. Measurements are cached: another size
    is quick. Several sizes are chosen from one measurement, each with a spec of its own.

    With --max-kld the exit status is 1, and nothing is written, if the result diverges more.

    Example: [bold]moec quantize my.yaml --target-size 92 --method awq_gptq --out my-92.yaml[/bold]

    Example: [bold]moec quantize my.yaml --target-size 92,87,84 --out my-{size}.yaml[/bold]

    Example: [bold]moec quantize SmolLM2-135M-Instruct --max-kld 0.3 --out small.yaml[/bold]
    """
    from moec.cli.compile_cmd import with_method
    from moec.cli.given import spec_given
    from moec.cli.output import check_writable, emit_json
    from moec.compiler.progress import Progress

    sizes_mb = _sizes(target_size)
    _check(sizes_mb, device, max_kld)
    outs = _outs(out, sizes_mb)
    for file in outs:
        check_writable(file)
    loaded = with_method(spec_given(spec, quiet=quiet), method, calibration)
    from moec.analysis.bits.choose import measured, sizes
    from moec.analysis.plan.devices import load_device
    from moec.compiler import build

    progress = Progress(quiet=quiet)
    name, _ = build.chosen_target(loaded, target)
    chosen_device = None if device is None else load_device(device)
    if checkpoint is not None:
        loaded = loaded.model_copy(update={"checkpoint": checkpoint.absolute()})
    store = build.open_checkpoint(loaded, checkpoint)
    costs = measured(loaded, store, name, progress)
    job = _Job(loaded, store, name, costs, tokens, progress)
    found = []
    wanted: list[float | None] = [*sizes_mb] or [None]
    for file, size_mb in zip(outs, wanted, strict=True):
        most = None if size_mb is None else round(size_mb * 1e6)
        given = sizes(loaded, store, name, costs, most=most, device=chosen_device)
        found.append(_chosen(job, given, max_kld, file))
        if not as_json:
            _show(found[-1], _within(found[-1], max_kld), file)
    if as_json:
        documents = [
            _facts(one, file if _within(one, max_kld) else None) for one, file in zip(found, outs, strict=True)
        ]
        emit_json(documents[0] if len(documents) == 1 else {"sizes": documents})
    missed = [one for one in found if not _within(one, max_kld)]
    for one in missed:
        import sys

        print(f"KL divergence {one.measured.kld:.4f} is more than {max_kld:g}: nothing was written", file=sys.stderr)
    if missed:
        raise typer.Exit(CHECK_FAILED)


@dataclass(frozen=True)
class _Job:
    """What all sizes share. tokens: of held-out text."""

    spec: Spec
    store: Checkpoint
    target: str
    costs: Costs
    tokens: int
    progress: Progress


@dataclass(frozen=True)
class _Found:
    chosen: Chosen
    measured: Divergence


def _within(found: _Found, max_kld: float | None) -> bool:
    """Whether the divergence that was measured is allowed."""
    return max_kld is None or found.measured.kld <= max_kld


def _chosen(job: _Job, given: Sizes, max_kld: float | None, file: Path) -> _Found:
    """The best mixture, measured; its spec is written unless it diverges more than is allowed."""
    from moec.analysis.bits.choose import choose
    from moec.analysis.bits.report import divergence, spec_text
    from moec.cli.output import write_text

    expected, tries = max_kld, _TRIES if given.room is None else 1
    while True:
        chosen = choose(job.spec, job.costs, given, max_kld=expected)
        found = _Found(chosen, divergence(chosen.spec, job.store, job.target, job.tokens, job.progress))
        tries -= 1
        if _within(found, max_kld) or not tries:
            break
        assert max_kld is not None
        assert expected is not None
        # together, parts cost more than the sum of each alone, and activations are rounded too
        expected *= _SAFETY * max_kld / found.measured.kld
    if _within(found, max_kld):
        size = f"{chosen.bytes / 1e6:.1f} MB for {job.target}"
        said = f"moec quantize: {size}, KL divergence {found.measured.kld:.4f} on {found.measured.tokens} tokens"
        write_text(file, spec_text(chosen, said))
    return found


def _sizes(given: str | None) -> list[float]:
    """The sizes in MB; none without the option."""
    sizes = []
    for word in [] if given is None else given.split(","):
        try:
            size = float(word)
        except ValueError:
            size = 0.0
        if not 0 < size < _MOST_MB:
            remedy = "give one above 0, or several: 92,87,84"
            raise UserError(f"--target-size {given}: {word.strip()!r} is not a size in MB", remedy=remedy)
        sizes.append(size)
    return sizes


def _outs(out: Path, sizes: list[float]) -> list[Path]:
    """A file for each size."""
    if len(sizes) > 1 and "{size}" not in out.name:
        remedy = f"put {{size}} into its name: {out.with_stem(out.stem + '-{size}').name}"
        raise UserError(f"--out is one file for {len(sizes)} sizes", place=str(out), remedy=remedy)
    files = [out.with_name(out.name.replace("{size}", f"{size:g}")) for size in sizes] or [out]
    if len(set(files)) < len(files):
        raise UserError("--target-size gives a size twice", remedy="give each once")
    return files


def _check(sizes: list[float], device: str | None, max_kld: float | None) -> None:
    if not sizes and device is None and max_kld is None:
        raise UserError("no size, device or divergence is given", remedy="give --target-size, --device or --max-kld")
    if max_kld is not None and not 0 < max_kld < 1e6:
        raise UserError(f"--max-kld {max_kld:g} is not a divergence in nats", remedy="give one above 0")


def _facts(found: _Found, out: Path | None) -> dict[str, Any]:
    chosen = found.chosen
    parts = [
        {
            "weights": names,
            "type": c.weights,
            "bits": 8 if c.weights == "int8" else 4,
            "group_size": c.group_size,
            "bytes": c.bytes,
            "kld": c.kld,
        }
        for names, c in zip(chosen.costs.names, chosen.choices, strict=True)
    ]
    about = {"spec": out, "bytes": chosen.bytes, "expected_kld": chosen.kld}
    return {**about, "measured": found.measured.to_json(), "parts": parts}


def _show(found: _Found, written: bool, file: Path) -> None:
    from moec.analysis.bits.report import by_kind
    from moec.cli.output import size, table

    chosen, measured = found.chosen, found.measured
    table(
        "Chosen",
        ["weights", "stored as", "size", "expected divergence"],
        [(kind, formats, size(count), f"{kld:.4f}") for kind, formats, count, kld in by_kind(chosen)],
        right=(2, 3),
    )
    print(f"\nthe whole artifact: {size(chosen.bytes)}")
    expected = f"{chosen.kld:.4f} expected of the weights"
    print(f"KL divergence: {expected}; {measured.kld:.4f} measured on {measured.tokens} tokens")
    if written:
        print(f"\n{file}: `moec compile {file}`")
