"""The MobileMoE paper's on-device tables, on this machine: S (and M, L where they fit) against dense MobileLLM-Pro.

Weight memory, time to first token, prefill and decode by context, resident memory of real prompts beside dummy ones;
ours beside the published phone figures, which are of other hardware and are labelled so. What is missing is made first:
random weights in the released layout (INT4 codes, `--router structured`), compiled by `moec compile`.

A run that was stopped goes on where it was: every finished measurement is kept in OUT/paper/, with the digests of its
artifact, and is taken again only with --fresh, other settings, or another artifact. Writes OUT/paper-tables.json, .txt
and .png (with matplotlib).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moec.analysis.plan.memory import file_bytes
from moec.analysis.plan.planner import plan_spec
from moec.analysis.profile.measure import measure, report
from moec.analysis.profile.settings import Settings, plan_runs
from moec.cli.output import json_text, table, write_text
from moec.compiler.artifact import Artifact
from moec.compiler.errors import UserError
from moec.compiler.progress import Progress
from moec.compiler.spec import load_spec
from moec.targets.xnnpack import profiling

ROOT = Path(__file__).resolve().parent.parent
SPECS = {"s": "mobilemoe-s", "pro": "mobilellm-pro", "m": "mobilemoe-m", "l": "mobilemoe-l"}
DECODE = 32
FULL = (256, 1024, 4096, 8192 - DECODE)  # the last decoded token is the 8192nd
QUICK = (256, 1024)
SEED = 1

# arXiv 2605.27358: ExecuTorch with XNNPACK, INT4 weights, INT8 dynamic activations, batch 1, real prompts
PUBLISHED_DECODE = {  # tokens/s at 256, 1K, 4K, 8K
    "Galaxy S25, 4 threads": {"s": (138.1, 112.0, 48.9, 25.8), "pro": (61.3, 45.8, 18.6, 10.6)},
    "iPhone 16 Pro, 2 threads": {"s": (204.6, 148.4, 54.2, 32.2), "pro": (61.0, 48.5, 17.9, 10.6)},
}
PUBLISHED_FIRST_TOKEN = {"s": {1024: 2.01, 4096: 16.36}, "pro": {1024: 4.26, 4096: 35.62}}  # seconds, Galaxy S25
PUBLISHED_RSS = {"s": {4096: 1.23, 8192: 1.49}, "pro": {4096: 1.35, 8192: 1.91}, "l": {8192: 4.71}}  # GB, Galaxy S25
PUBLISHED_WEIGHTS = {"s": 0.68, "m": 1.48, "l": 2.75}  # GB
PUBLISHED_RATIO = "1.2 to 2.1 for MoE, about 1.0 dense"
OTHER = "published: phones, other hardware, trained weights"


@dataclass(frozen=True)
class Options:
    out: Path
    contexts: tuple[int, ...]
    repeats: int
    threads: int | None
    fresh: bool
    given: dict[str, Path]

    @property
    def work(self) -> Path:
        return self.out / "paper"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench")
    parser.add_argument("--models", default="s,pro,m,l", help="of s, pro, m, l; default all that fit")
    parser.add_argument("--quick", action="store_true", help="S and Pro at 256 and 1024 tokens, one process each")
    parser.add_argument("--repeats", type=int, help="cold processes of the real prompt; default 2")
    parser.add_argument("--threads", type=int, help="default: one per core")
    parser.add_argument("--fresh", action="store_true", help="measure again what an earlier run has measured")
    parser.add_argument("--artifact", action="append", default=[], metavar="NAME=FOLDER", help="use a compiled one")
    a = parser.parse_args(arguments)
    names = [name.strip() for name in a.models.split(",")]
    given = dict(pair.partition("=")[::2] for pair in a.artifact)
    unknown = [name for name in (*names, *given) if name not in SPECS]
    if unknown:
        parser.error(f"{unknown[0]!r} is none of {', '.join(SPECS)}")
    for option, value in (("--repeats", a.repeats), ("--threads", a.threads)):
        if value is not None and value < 1:
            parser.error(f"{option} {value}: give 1 or more")
    if a.quick:
        names = [name for name in names if name in ("s", "pro")]
    options = Options(
        out=a.out,
        contexts=QUICK if a.quick else FULL,
        repeats=a.repeats or (1 if a.quick else 2),
        threads=a.threads,
        fresh=a.fresh,
        given={name: Path(folder) for name, folder in given.items()},
    )
    try:
        return run(names, options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(names: Sequence[str], options: Options) -> int:
    started = time.perf_counter()
    profiles: dict[str, dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    for name in names:
        reason = _too_large(name, options)
        if reason:
            left_out[name] = reason
            print(f"{SPECS[name]}: left out, {reason}", file=sys.stderr)
            continue
        profiles[name] = _profile(name, options)
    if not profiles:
        raise UserError("no model was measured", remedy="give --models s, which needs 1 GB")
    text = _tables(profiles, left_out)
    print(text)
    result = {
        "machine": next(iter(profiles.values()))["machine"],
        "seconds": round(time.perf_counter() - started, 1),
        "left_out": left_out,
        "profiles": profiles,
        "published": {
            "conditions": OTHER,
            "decode_tokens_per_s": PUBLISHED_DECODE,
            "first_token_s": PUBLISHED_FIRST_TOKEN,
            "peak_rss_gb": PUBLISHED_RSS,
            "weights_gb": PUBLISHED_WEIGHTS,
            "real_over_dummy": PUBLISHED_RATIO,
        },
    }
    write_text(options.out / "paper-tables.json", json_text(result) + "\n")
    write_text(options.out / "paper-tables.txt", text + "\n")
    plotted = _plot(profiles, options.out / "paper-tables.png")
    print(f"\nwritten to {options.out}/paper-tables.json, .txt" + (", .png" if plotted else "; no plot: no matplotlib"))
    return 0


def _too_large(name: str, options: Options) -> str:
    """Why a model cannot be measured here, or nothing. All its pages must stay in memory while others are read."""
    if name in ("s", "pro"):
        return ""
    plan = plan_spec(load_spec(ROOT / f"specs/models/{SPECS[name]}.yaml"), target="xnnpack")
    need = file_bytes(plan.model)
    free = _available_bytes()
    wanted = 1.5 * plan.peak.peak
    if free is not None and free < wanted:
        return f"it needs {wanted / 1e9:.1f} GB of free memory with room to spare, {free / 1e9:.1f} are there"
    options.out.mkdir(parents=True, exist_ok=True)
    disk = shutil.disk_usage(options.out).free
    made = name in options.given or (options.work / f"artifact-{name}").is_dir()
    if not made and disk < 2.5 * need:
        return f"its checkpoint and artifact need {2.5 * need / 1e9:.1f} GB of disk, {disk / 1e9:.1f} are free"
    return ""


def _available_bytes() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _profile(name: str, options: Options) -> dict[str, Any]:
    """The kept measurement if it is of this artifact and these settings, else a new one."""
    artifact = Artifact.open(_artifact(name, options))
    kept = options.work / f"profile-{name}.json"
    key = {
        "sha256": [f.sha256 for f in artifact.manifest.files],
        "contexts": list(options.contexts),
        "repeats": options.repeats,
        "threads": options.threads,
        "runner": profiling.runner_binary().parent.name,
    }
    if not options.fresh and kept.is_file():
        found = json.loads(kept.read_text("utf-8"))
        if found.get("key") == key:
            print(f"{SPECS[name]}: measured before ({kept})", file=sys.stderr)
            return dict(found["profile"])
    found = _measure(artifact, options)
    write_text(kept, json_text({"key": key, "profile": found}) + "\n")
    return found


def _measure(artifact: Artifact, options: Options) -> dict[str, Any]:
    """The mixed real stream, cold and then warm, and the dummy one once, cold: its rates are not asked for."""
    settings = Settings(contexts=options.contexts, decode=DECODE, repeats=1, threads=options.threads, mixed=True)
    (real, real_request), (dummy, dummy_request) = plan_runs(artifact, settings)
    print(f"{artifact.manifest.name}: measuring", file=sys.stderr, flush=True)

    def once(request: Any) -> dict[str, Any]:
        return profiling.run(artifact.path("model.pte"), request)

    progress = Progress()
    measured = measure([(real, real_request)], once, repeats=options.repeats, progress=progress)
    measured += measure([(dummy, replace(dummy_request, warm=0))], once, repeats=1, progress=progress)
    return report(artifact.manifest, measured, artifact=str(artifact.folder), machine=None, repeats=options.repeats)


def _artifact(name: str, options: Options) -> Path:
    """The folder given, or one made before, or a new one. The checkpoint it came from is removed: it is random."""
    if name in options.given:
        return options.given[name]
    folder = options.work / f"artifact-{name}"
    if (folder / "manifest.json").is_file():
        return folder
    spec = str(ROOT / f"specs/models/{SPECS[name]}.yaml")
    checkpoint = options.work / f"checkpoint-{name}"
    router = [] if name == "pro" else ["--router", "structured"]
    _moec("checkpoint", "synthesize", spec, "--out", str(checkpoint), "--seed", str(SEED), "--qat", *router)
    _moec("compile", spec, "--target", "xnnpack", "--checkpoint", str(checkpoint), "--out", str(folder))
    shutil.rmtree(checkpoint)
    return folder


def _moec(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "moec.cli.main", *arguments], check=False, stdout=sys.stderr)
    if done.returncode:
        raise UserError(f"`moec {' '.join(arguments[:2])}` failed with status {done.returncode}; its reason is above")


def _tables(profiles: dict[str, dict[str, Any]], left_out: dict[str, str]) -> str:
    """All tables as text, ours first in each row."""
    import contextlib
    import io

    stream = io.StringIO()
    with contextlib.redirect_stdout(stream):
        _speed_table(profiles)
        print()
        _memory_table(profiles)
        for name, reason in left_out.items():
            print(f"\n{SPECS[name]}: left out, {reason}", end="")
        for profile in profiles.values():
            for note in profile["notes"]:
                print(f"\n{profile['name']}: {note}", end="")
    return stream.getvalue().rstrip()


def _real(profile: dict[str, Any]) -> dict[str, Any]:
    return dict(next(run for run in profile["runs"] if run["kind"] == "real"))


def _dummy(profile: dict[str, Any]) -> dict[str, Any]:
    return dict(next(run for run in profile["runs"] if run["kind"] == "dummy"))


def _row_of(context: int) -> int:
    """256, 1024, 4096 or 8192: the published context that a measured one stands for."""
    return min((256, 1024, 4096, 8192), key=lambda c: abs(c - context))


def _speed_table(profiles: dict[str, dict[str, Any]]) -> None:
    rows = []
    for index, context in enumerate(p["context"] for p in _real(next(iter(profiles.values())))["points"]):
        for name, profile in profiles.items():
            point = _real(profile)["points"][index]
            where = _row_of(context)
            column = (256, 1024, 4096, 8192).index(where)
            phones = [
                _number(models[name][column], 1) if name in models else "" for models in PUBLISHED_DECODE.values()
            ]
            rows.append(
                (
                    context,
                    profile["name"],
                    _number(point["first_token_s"]["median"], 2),
                    _number(point["prefill_tokens_per_s"]["median"], 0),
                    _number(point["decode_tokens_per_s"]["median"], 1),
                    _number(PUBLISHED_FIRST_TOKEN.get(name, {}).get(where), 2),
                    *phones,
                )
            )
        rows += _ratio_row(profiles, index, context)
    first = next(iter(profiles.values()))
    table(
        f"Speed here ({first['machine']}, {first['threads']} threads, {first['isa']}) | {OTHER}",
        (
            "context", "model", "first token, s", "prefill, tok/s", "decode, tok/s",
            "| first token, S25", *[f"decode, {phone}" for phone in PUBLISHED_DECODE],
        ),
        rows,
        right=(0, 2, 3, 4, 5, 6, 7),
    )  # fmt: skip


def _ratio_row(profiles: dict[str, dict[str, Any]], index: int, context: int) -> list[tuple[Any, ...]]:
    if "s" not in profiles or "pro" not in profiles:
        return []
    s, pro = (_real(profiles[name])["points"][index] for name in ("s", "pro"))
    where = _row_of(context)
    column = (256, 1024, 4096, 8192).index(where)
    waited = [PUBLISHED_FIRST_TOKEN[name].get(where) for name in ("pro", "s")]
    return [
        (
            context,
            "S over Pro",
            f"{pro['first_token_s']['median'] / s['first_token_s']['median']:.2f}x",
            f"{s['prefill_tokens_per_s']['median'] / pro['prefill_tokens_per_s']['median']:.2f}x",
            f"{s['decode_tokens_per_s']['median'] / pro['decode_tokens_per_s']['median']:.2f}x",
            f"{waited[0] / waited[1]:.2f}x" if waited[0] and waited[1] else "",
            *[f"{models['s'][column] / models['pro'][column]:.2f}x" for models in PUBLISHED_DECODE.values()],
        )
    ]


def _memory_table(profiles: dict[str, dict[str, Any]]) -> None:
    rows = []
    for name, profile in profiles.items():
        for real, dummy, ratio in zip(
            _real(profile)["points"], _dummy(profile)["points"], profile["ratios"], strict=True
        ):
            rows.append(
                (
                    profile["name"],
                    real["context"],
                    f"{profile['file_bytes'] / 1e9:.3f}",
                    f"{real['weights_bytes']['median'] / 1e9:.3f}",
                    f"{real['memory']['kv_cache'] / 1e6:.1f}",
                    f"{real['resident_bytes']['median'] / 1e9:.3f}",
                    f"{dummy['resident_bytes']['median'] / 1e9:.3f}",
                    f"{ratio['resident']:.2f}",
                    f"{ratio['weights']:.2f}",
                    _number(PUBLISHED_WEIGHTS.get(name), 2),
                    _number(PUBLISHED_RSS.get(name, {}).get(_row_of(real["context"])), 2),
                )
            )
    table(
        f"Memory here, GB (KV cache in MB) | {OTHER}; real over dummy there: {PUBLISHED_RATIO}",
        (
            "model", "context", "file", "weights touched", "KV cache", "RSS real", "RSS dummy", "ratio", "of weights",
            "| weights", "peak RSS, S25",
        ),
        rows,
        right=range(1, 11),
    )  # fmt: skip


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _plot(profiles: dict[str, dict[str, Any]], file: Path) -> bool:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    prefill, decode, memory = figure.subplots(1, 3)
    for name, profile in profiles.items():
        points = _real(profile)["points"]
        contexts = [p["context"] for p in points]
        line = prefill.plot(
            contexts, [p["prefill_tokens_per_s"]["median"] for p in points], "o-", label=profile["name"]
        )
        colour = line[0].get_color()
        decode.plot(contexts, [p["decode_tokens_per_s"]["median"] for p in points], "o-", color=colour)
        published = PUBLISHED_DECODE["Galaxy S25, 4 threads"].get(name)
        if published:
            decode.plot((256, 1024, 4096, 8192), published, ":", color=colour, label=f"{profile['name']}, Galaxy S25")
        memory.plot(contexts, [p["resident_bytes"]["median"] / 1e9 for p in points], "o-", color=colour, label="real")
        below = _dummy(profile)["points"]
        memory.plot(contexts, [p["resident_bytes"]["median"] / 1e9 for p in below], "o--", color=colour, label="dummy")
    for axes, title in (
        (prefill, "prefill here, tokens/s"),
        (decode, "decode, tokens/s (dotted: published, another machine)"),
        (memory, "resident here, GB (dashed: dummy prompts)"),
    ):
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("context, tokens")
        axes.set_title(title, loc="left", fontsize=10)
    prefill.legend(frameon=False)
    decode.legend(frameon=False, fontsize=8)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    figure.savefig(temporary, format="png", dpi=130)
    os.replace(temporary, file)
    return True


if __name__ == "__main__":
    sys.exit(main())
