"""`moec inspect`: what a spec, an artifact or a checkpoint holds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moec.compiler.errors import ArtifactError, UserError

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

    manifest = artifact.manifest
    model = manifest.model
    table(
        f"{manifest.name} for {manifest.target}",
        ["", ""],
        [
            ("size", size(artifact.bytes)),
            ("model", f"{model.name}, vocabulary {model.vocab_size}, context {model.context}"),
            ("MoE layers", len(model.moe_layers)),
            ("checkpoint", manifest.checkpoint),
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
    try:
        _show_methods(manifest.details)
        _show_cpu_methods(manifest.details)
        _show_onnx(manifest.details)
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # what a target wrote is known to it alone
        remedy = "compile the artifact again"
        raise ArtifactError(
            f"damaged: details: {error}", place=str(artifact.folder / "manifest.json"), remedy=remedy
        ) from error
    passes = [(p.name, p.changed, len(p.refusals), f"{p.seconds:.2f}", p.digest) for p in manifest.passes]
    table("\nPasses", ["pass", "changed", "refused", "seconds", "graph"], passes, right=[1, 2, 3])


def _show_methods(details: dict[str, Any]) -> None:
    """Entry points with their delegates and instructions, where the target's lowering counted them."""
    from moec.cli.output import size, table

    methods = {n: m for n, m in details.get("methods", {}).items() if isinstance(m.get("instructions"), dict)}
    if not methods:
        return
    rows = [(n, m["delegates"], sum(m["instructions"].values()), size(m["payload_bytes"])) for n, m in methods.items()]
    table("\nMethods", ["method", "delegates", "instructions", "program"], rows, right=[1, 2, 3])
    name, first = next(iter(methods.items()))
    counts = sorted(first["instructions"].items(), key=lambda item: (-item[1], item[0]))
    table(f"\nInstructions of {name}", ["instruction", "count"], counts, right=[1])
    advice = details.get("chunking", {}).get("advice")
    if advice:
        print(f"\nchunks: {advice}")


def _show_cpu_methods(details: dict[str, Any]) -> None:
    """Entry points with what they call and the memory planned for them, and how often each operator is called."""
    from moec.cli.output import size, table

    methods = {n: m for n, m in details.get("methods", {}).items() if isinstance(m.get("instructions"), int)}
    if not methods:
        return
    rows = [
        # memory planning puts activations into the first arena, what methods share (the caches) into those behind it
        (n, m["instructions"], m["delegate_calls"], size(sum(m["arena_bytes"][:1])), size(sum(m["arena_bytes"][1:])))
        for n, m in methods.items()
    ]
    table("\nMethods", ["method", "instructions", "delegate calls", "activations", "caches"], rows, right=[1, 2, 3, 4])
    calls = sorted(details["operators"].items(), key=lambda item: (-item[1], item[0]))
    table("\nOperators of all methods", ["operator", "calls"], calls, right=[1])


def _show_onnx(details: dict[str, Any]) -> None:
    """What an ONNX file holds: interface, nodes by operator set, functions, external data."""
    from moec.cli.output import size, table

    graph = details.get("graph")
    if not isinstance(graph, dict):
        return
    opsets = ", ".join(f"{name} {number}" for name, number in details["opsets"].items())
    rows = [
        ("flavour", details["flavour"]),
        ("KV cache", details["kv_cache"]),
        ("operator sets", f"{opsets}; IR version {details['ir_version']}"),
        ("inputs", _patterns(graph["inputs"])),
        ("outputs", _patterns(graph["outputs"])),
        ("external data", f"{graph['initializers']} tensors, {size(graph['external_bytes'])}"),
    ]
    table("\nONNX", ["", ""], rows)
    bodies = [("graph", graph["nodes"]), *graph["functions"].items()]
    counted = [(name, domain, count) for name, nodes in bodies for domain, count in _by_domain(nodes)]
    table("\nNodes by operator set", ["of", "operator set", "nodes"], counted, right=[2])
    for name, nodes in bodies:
        table(f"\nOperators of {name}", ["operator", "nodes"], nodes.items(), right=[1])


def _patterns(names: list[str]) -> str:
    """Names that differ in a layer's number only, once: `present.0..3.key`."""
    numbers: dict[str, list[int]] = {}
    for name in names:
        found = re.search(r"\.(\d+)\.", name)
        numbers.setdefault(name if found is None else name.replace(found[0], ".{}."), []).append(
            -1 if found is None else int(found[1])
        )
    return ", ".join(pattern.replace("{}", f"{min(ns)}..{max(ns)}") for pattern, ns in numbers.items())


def _by_domain(nodes: dict[str, int]) -> list[tuple[str, int]]:
    domains: dict[str, int] = {}
    for name, count in nodes.items():
        domain = name.rpartition("::")[0] or "ai.onnx"
        domains[domain] = domains.get(domain, 0) + count
    return sorted(domains.items())


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
