"""`moec inspect`: what a spec, an artifact or a checkpoint holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moec.compiler.errors import UserError

if TYPE_CHECKING:
    from moec.compiler.artifact import Artifact
    from moec.compiler.spec import Spec


def register(app: typer.Typer) -> None:
    app.command("inspect")(inspect)


def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="An artifact folder, a checkpoint folder, or a spec.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Say what an artifact, a checkpoint or a spec holds.

    Example: [bold]moec inspect build/s --json | jq .sizes_by_role[/bold]
    """
    from moec.cli.output import emit_json

    if not path.exists():
        raise UserError("no such file or folder", place=str(path))
    if path.is_file():
        from moec.compiler.spec import load_spec

        spec = load_spec(path)
        return emit_json(_spec_facts(spec)) if as_json else _show_spec(spec)
    if not (path / "manifest.json").exists() and (path / "config.json").exists():
        from moec.cli.checkpoint_cmd import inspect_checkpoint

        return inspect_checkpoint(path, spec=None, as_json=as_json)
    from moec.compiler.artifact import Artifact

    artifact = Artifact.open(path)
    return emit_json(artifact.manifest) if as_json else _show_artifact(artifact)


def _show_artifact(artifact: Artifact) -> None:
    from moec.cli.output import size, table
    from moec.compiler.build_record import read_build_record

    manifest, record = artifact.manifest, read_build_record(artifact)
    model = manifest.model
    table(
        f"{manifest.name} for {manifest.target}",
        ["", ""],
        [
            ("size", size(artifact.bytes)),
            ("model", f"{model.name}, vocabulary {model.vocab_size}, context {model.context}"),
            ("MoE layers", len(model.moe_layers)),
            ("checkpoint", record.checkpoint if record is not None else "not known here (no build record)"),
            ("quantization", _quantization_text(manifest.quantization)),
            ("versions", ", ".join(f"{name} {version}" for name, version in manifest.versions.items())),
            ("digests", ", ".join(f"{k} {v}" for k, v in manifest.digests.model_dump().items() if v)),
            *[("note", note) for note in manifest.notes],
        ],
    )
    table("\nFiles", ["file", "size", "sha256"], [(f.name, size(f.bytes), f.sha256) for f in manifest.files], right=[1])
    if manifest.sizes_by_role:
        total = sum(manifest.sizes_by_role.values()) or 1
        rows = sorted(manifest.sizes_by_role.items(), key=lambda item: -item[1])
        shares = [(role, size(count), f"{count / total:.1%}") for role, count in rows]
        table("\nWeights by role", ["role", "size", "share"], shares, right=[1, 2])
    from moec.compiler.target import target_of

    for made in target_of(artifact).describe(artifact):
        table(f"\n{made.title}", made.columns, made.rows, right=made.right)
    passes = [(p.name, p.changed, len(p.refusals), p.digest) for p in manifest.passes]
    table("\nPasses", ["pass", "changed", "refused", "graph"], passes, right=[1, 2])


def _quantization_text(quantization: Any) -> str:
    if not isinstance(quantization, dict):
        return str(quantization or "none")
    return ", ".join(f"{k} {_override_text(v)}" for k, v in quantization.items() if v is not None)


def _override_text(value: Any) -> str:
    return str(value.get("weights")) if isinstance(value, dict) else str(value)


def _spec_facts(spec: Spec) -> dict[str, Any]:
    from moec.compiler.spec.sources import source_of

    facts: dict[str, Any] = {"spec": spec}
    counts = source_of(spec.model).parameters(spec.model)
    return {**facts, "parameters": dict(counts)} if counts else facts


def _show_spec(spec: Spec) -> None:
    from moec.cli.output import table, words

    facts = _spec_facts(spec)
    model = spec.model.model_dump(mode="json", exclude_none=True)
    rows: list[tuple[str, Any]] = [(key, words(value)) for key, value in model.items()]
    rows += [(f"{kind} parameters", f"{count:,}") for kind, count in facts.get("parameters", {}).items()]
    rows.append(("checkpoint", spec.checkpoint or "(give --checkpoint)"))
    rows.append(("quantization", _quantization_text(spec.model_dump(mode="json")["quantization"])))
    for name, options in spec.targets.items():
        rows.append((f"target {name}", words(options.model_dump(mode="json", exclude_none=True))))
    if spec.training is not None:
        rows.append(("training stages", ", ".join(stage.name for stage in spec.training.stages)))
    table(spec.name, ["", ""], rows)
