"""`moec report ARTIFACT`: the page, from the manifest, the spec, and the verification and profile found beside it.

Everything is inline: styles, plots (SVG), heat maps (PNG inside SVG). A Content-Security-Policy in the page forbids
any request, so a page that wanted one would show that it is broken.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moec.analysis.plan.devices import load_device
from moec.analysis.report import figures
from moec.analysis.report.evidence import Evidence, find_evidence
from moec.analysis.report.graphs import COLOURS, Pictures, layer_pictures
from moec.compiler.artifact import Artifact
from moec.compiler.build_record import BuildRecord, located, read_build_record
from moec.compiler.errors import MissingExtra, UserError
from moec.compiler.progress import Progress
from moec.compiler.spec import Spec
from moec.compiler.units import size

if TYPE_CHECKING:
    from moec.analysis.plan.planner import Plan
    from moec.compiler.spec.device import Device

#: An artifact up to this size is verified on the spot when no verification is found: seconds.
SMALL_BYTES = 20_000_000
_VERIFY_TOKENS = 128


def artifact_page(
    artifact: Artifact,
    *,
    verify: Path | None = None,
    passes: Path | None = None,
    profile: Path | None = None,
    device: str | None = None,
    progress: Progress | None = None,
) -> str:
    """The HTML page. Files named must be about this artifact (UserError); others are looked for beside it.

    What cannot be shown says why in its place. MissingExtra without matplotlib or jinja2.
    """
    progress = progress or Progress(quiet=True)
    try:
        import jinja2
    except ImportError:
        raise MissingExtra("reports need jinja2, which is not installed", remedy="pip install 'moec[report]'") from None
    figures.new_figure(1, 1)  # a missing matplotlib fails before any work
    manifest = artifact.manifest
    evidence = {
        "verify": find_evidence(artifact, "verify", verify),
        "passes": find_evidence(artifact, "passes", passes),
        "profile": find_evidence(artifact, "profile", profile),
    }
    record = read_build_record(artifact)
    spec = _spec(artifact, record)
    named = device or (spec.device if isinstance(spec, Spec) else None)
    chosen = None if named is None else load_device(named)  # a wrong name fails before any work
    with progress.stage("report", 4) as step:
        evidence["verify"] = _verified(artifact, evidence["verify"], record)
        evidence["passes"] = _checked(artifact, spec, evidence["passes"], record)
        step("verification")
        pictures = _pictures(spec, manifest.target)
        step("graphs")
        planned = _plan(spec, manifest.target, chosen)
        context = {
            "manifest": manifest,
            "record": record,
            "total_bytes": artifact.bytes,
            "tiles": _tiles(artifact, evidence, planned),
            "sizes": figures.sizes(manifest.sizes_by_role) if manifest.sizes_by_role else None,
            "pictures": pictures if isinstance(pictures, Pictures) else None,
            "no_pictures": pictures if isinstance(pictures, str) else "",
            "colours": {r: COLOURS[r] for r in pictures.roles} if isinstance(pictures, Pictures) else {},
            "passes": _passes(manifest.passes, evidence["passes"]),
            "no_passes": evidence["passes"].reason,
            "verify": evidence["verify"],
            **_profile_parts(evidence["profile"]),
            **_plan_parts(planned, evidence["profile"]),
        }
        step("plots")
        environment = jinja2.Environment(
            autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
        )
        environment.filters |= {"size": size, "number": number, "sentence": sentence}
        page = environment.from_string((files("moec") / "analysis" / "report" / "page.html").read_text("utf-8"))
        text = page.render(context)
        step("page")
    return text


def sentence(text: str) -> str:
    """With a capital letter first; the rest as it is."""
    return text[:1].upper() + text[1:]


def number(value: Any) -> str:
    """A measured value; those near 1 keep the digits that matter."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return str(value)
    return f"{value:.7f}" if 0.9 < abs(value) < 1 else f"{value:.6g}"


def _spec(artifact: Artifact, record: BuildRecord | None) -> Spec | str:
    try:
        spec = Spec.model_validate(artifact.manifest.spec)
    except ValueError as error:
        return f"the manifest's spec is not one that this version reads: {str(error).splitlines()[0]}"
    try:
        return located(spec, {} if record is None else {key: Path(path) for key, path in record.model.items()})
    except UserError as error:
        return error.message


def _at_hand(artifact: Artifact, record: BuildRecord | None) -> bool:
    """Whether a small artifact's checkpoint is where it was."""
    return artifact.bytes <= SMALL_BYTES and record is not None and Path(record.checkpoint).is_dir()


def _verified(artifact: Artifact, found: Evidence, record: BuildRecord | None) -> Evidence:
    """The verification that was found, or for a small artifact whose checkpoint is available a new one."""
    if found.data is not None or not _at_hand(artifact, record):
        return found
    from moec.analysis.verify.artifact import verify_artifact

    try:
        report = verify_artifact(artifact.folder, tokens=_VERIFY_TOKENS)
    except UserError as error:
        return Evidence(None, None, f"not verified: {error}")
    return Evidence(report.to_json(), None, f"verified for this page with {_VERIFY_TOKENS} tokens")


def _checked(artifact: Artifact, spec: Spec | str, found: Evidence, record: BuildRecord | None) -> Evidence:
    """The checks of each pass that were found; those of a small artifact are made now if there are none."""
    if found.data is not None or isinstance(spec, str) or record is None or not _at_hand(artifact, record):
        return found
    from moec.analysis.verify.spec import verify_spec

    try:
        report = verify_spec(spec, checkpoint=Path(record.checkpoint), target=artifact.manifest.target)
    except UserError as error:
        return Evidence(None, None, f"not checked: {error}")
    return Evidence(report.to_json(), None, "each was checked against its input for this page")


def _pictures(spec: Spec | str, target: str) -> Pictures | str:
    if isinstance(spec, str):
        return spec
    try:
        return layer_pictures(spec, target)
    except UserError as error:
        return f"the model could not be exported: {error}"


def _fidelity_tile(found: object) -> tuple[str, str, str]:
    """What quantization cost, beside the verification: codes that are computed rightly may still be poor codes."""
    kld, top1 = (found.get(key) if isinstance(found, Mapping) else None for key in ("kld", "top1"))
    if not isinstance(kld, float) or not isinstance(top1, float):
        return "quantization", "not measured", "against the float model"
    return "KL divergence", f"{kld:.3f}", f"from the float model; top-1 {top1:.0%}"


def _tiles(artifact: Artifact, evidence: Mapping[str, Evidence], planned: Plan | str) -> list[tuple[str, str, str]]:
    """The key figures at the top of the page: (label, value, what it is)."""
    manifest = artifact.manifest
    tiles = [("size", size(artifact.bytes), "all files of the artifact")]
    if not isinstance(planned, str):
        a = planned.model.architecture
        tiles.append(("parameters", _count(a.total_parameters), f"{_count(a.active_parameters)} active"))
    moe = manifest.section("model", "moe")
    if manifest.model.moe_layers:
        known = {"experts", "top_k"} <= set(moe)
        detail = f"{moe['experts']} experts, {moe['top_k']} a token" if known else "routed experts"
        tiles.append(("MoE layers", str(len(manifest.model.moe_layers)), detail))
    tiles.append(("context", f"{manifest.model.context:,}", "tokens"))
    verified = evidence["verify"].data
    if verified is not None:
        checks = verified["checks"]
        passed = sum(bool(c.get("passed")) for c in checks)
        tiles.append(
            ("verification", "passed" if verified.get("passed") else "FAILED", f"{passed} of {len(checks)} checks")
        )
        tiles.append(_fidelity_tile(verified.get("fidelity")))
    profile = evidence["profile"].data
    if profile is not None and profile["ratios"]:
        last = profile["ratios"][-1]
        tiles.append(("real / dummy RSS", f"{last['resident']:.2f}", f"at {last['context']} tokens"))
    if not isinstance(planned, str) and planned.device is not None:
        tiles.append(
            (planned.device.name, "fits" if planned.fits else "does not fit", f"budget {size(planned.device.budget)}")
        )
    return tiles


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.4g} M"


def _passes(entries: Any, found: Evidence) -> list[dict[str, Any]]:
    """Each pass with its checks, if a verification of the spec's passes was found."""
    checks = found.data["checks"] if found.data is not None else []
    rows = []
    for entry in entries:
        own = [c for c in checks if str(c.get("name", "")).partition(": ")[0] == entry.name]
        rows.append(
            {
                "entry": entry,
                "verdict": "" if not own else "equal" if all(c.get("passed") for c in own) else "DIFFERS",
                "checks": [
                    f"{str(c['name']).partition(': ')[2]} {number(c.get('value'))} ({c.get('relation')} "
                    f"{number(c.get('limit'))} {c.get('unit')})"
                    for c in own
                ],
            }
        )
    return rows


def _profile_parts(found: Evidence) -> dict[str, Any]:
    if found.data is None:
        return {"profile": None, "no_profile": found.reason, "resident": None, "rates": None, "experts": None}
    profile = found.data
    try:
        return {
            "profile": profile,
            "no_profile": "",
            "resident": figures.resident(profile["runs"]),
            "rates": figures.rates(profile["runs"]),
            "experts": figures.experts(profile["experts"]) if profile.get("experts") else None,
        }
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"the profile is damaged: {type(error).__name__} {error}",
            place=str(found.file),
            remedy="write it again with `moec profile`",
        ) from None


def _plan(spec: Spec | str, target: str, device: Device | None) -> Plan | str:
    """The plan for the device; without one, or where nothing can be planned, the reason."""
    if isinstance(spec, str):
        return spec
    from moec.analysis.plan.planner import plan_spec

    try:
        return plan_spec(spec, device, target=target)
    except UserError as error:
        return str(error)


def _plan_parts(planned: Plan | str, profile: Evidence) -> dict[str, Any]:
    empty = {"plan": None, "budget": None, "latency": None}
    if isinstance(planned, str):
        return {**empty, "no_plan": planned}
    if planned.device is None:
        return {**empty, "no_plan": "no device was named; give one with --device (`moec device list` has them)"}
    memory, decode = _measured(profile.data)
    return {
        "plan": planned,
        "no_plan": "",
        "budget": figures.budget(planned, memory),
        "latency": figures.latency(planned, decode) if planned.decode else None,
    }


def _measured(profile: Mapping[str, Any] | None) -> tuple[dict[int, float], dict[int, float]]:
    """By context: the largest resident memory of real prompts, bytes, and their median decode rate, tokens/s."""
    memory: dict[int, float] = {}
    decode: dict[int, float] = {}
    for run in profile["runs"] if profile is not None else []:
        if run["kind"] != "real":
            continue
        for p in run["points"]:
            memory[p["context"]] = max(memory.get(p["context"], 0.0), p["resident_bytes"]["max"])
            if p["decode_tokens_per_s"]:
                decode[p["context"]] = p["decode_tokens_per_s"]["median"]
    return memory, decode
