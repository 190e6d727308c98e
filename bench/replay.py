"""Whether a change moved a number: compile every shipped spec and family at two revisions, and compare what came out.

    make replay BASE=REV                                   # this checkout against REV
    python bench/replay.py compare --base REV [--full] [--targets xnnpack,onnx] [--only tiny] [--keep]

Compared for every case and target: the graph after each pass that changed it (names of operands aside), and each file
of the artifact byte for byte; of the manifest, what is not a version, a timing, a path or a digest of sources. Weights
and specs are made once, by the base, so that both sides read the same bytes. A release shape is cut to two layers and a
vocabulary of 4,096 unless --full is given.

With --keep, artifacts whose files differ are also run, both by this checkout, and their logits compared bit for bit.

A case is `equal`, `differs as wanted` (every difference is named, with its reason, in bench/replay_wanted.yaml) or
`differs`. Exit status: 0 none differs otherwise than as wanted, 1 one does, 2 a fault of the call. What was compiled is
kept, so that a run that was stopped goes on, and the base is compiled once; --again compiles this checkout anew.

Only the documented interface is used (`moec.compile`, the command line and MOEC_DUMP), so that revisions with other
rooms can be compared.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WANTED = ROOT / "bench" / "replay_wanted.yaml"
TARGETS = ("xnnpack", "metal", "onnx", "mlir")
ROOMS = ("analysis", "checkpoints", "cli", "compiler", "passes", "runtime", "sources", "specs", "src", "targets")
PROGRAMS = ("pte", "onnx", "onnx.data", "mlir")
TOKENS = {"bos_id": 0, "eos_ids": [1]}
SMALL = {"layers": 2, "vocab_size": 4096, "context": 1024}
# What a manifest may say otherwise without a number having moved.
FREE_KEYS = {"moec", "versions", "seconds", "kernel", "checkpoint", "passes", "digest", "graph", "created", "machine"}


@dataclass(frozen=True)
class Case:
    """A spec, its weights (a folder, or none when the spec names them) and the name it is reported under."""

    name: str
    spec: Path
    checkpoint: Path | None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    compare = commands.add_parser("compare", help="compile at both revisions and compare")
    compare.add_argument("--base", required=True, help="a revision of this repository")
    compare.add_argument("--full", action="store_true", help="release shapes as they are (gigabytes, long)")
    compare.add_argument("--targets", default=",".join(TARGETS), help="comma-separated (default: all)")
    compare.add_argument("--only", default="", help="cases whose name contains this text")
    compare.add_argument("--keep", action="store_true", help="keep artifacts, and run those that differ")
    compare.add_argument("--again", action="store_true", help="compile this checkout's side anew")
    compare.add_argument("--work", type=Path, default=ROOT / "build" / "replay", help="folder for everything")
    record = commands.add_parser("record", help="compile the cases of a list with the moec that is imported (internal)")
    record.add_argument("cases", type=Path)
    record.add_argument("out", type=Path)
    record.add_argument("--targets", required=True)
    record.add_argument("--keep", action="store_true")
    answers = commands.add_parser("answers", help="run artifacts of both sides and compare their logits (internal)")
    answers.add_argument("base", type=Path)
    answers.add_argument("head", type=Path)
    answers.add_argument("keys", nargs="+")
    given = parser.parse_args(arguments)
    if given.command == "record":
        return _record(given.cases, given.out, given.targets.split(","), keep=given.keep)
    if given.command == "answers":
        print(json.dumps({key: _answers(given.base / key, given.head / key) for key in given.keys}))
        return 0
    return _compare(given)


def _compare(given: argparse.Namespace) -> int:
    unknown = sorted(set(given.targets.split(",")) - set(TARGETS))
    if unknown:
        print(f"error: no target {', '.join(unknown)}; there are {', '.join(TARGETS)}", file=sys.stderr)
        return 2
    found = subprocess.run(
        ["git", "rev-parse", "--verify", "--quiet", f"{given.base}^{{commit}}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if found.returncode:
        print(f"error: {given.base} is no revision of this repository", file=sys.stderr)
        return 2
    commit = found.stdout.strip()
    work: Path = given.work
    work.mkdir(parents=True, exist_ok=True)
    base_tree = _checkout(commit, work / f"tree-{commit[:12]}")
    cases = list(
        _cases(base_tree, work / f"inputs-{commit[:12]}{'-full' if given.full else ''}", given.only, given.full)
    )
    if not cases:
        print(f"error: no case has {given.only!r} in its name", file=sys.stderr)
        return 2
    listed = work / "cases.json"
    listed.write_text(
        json.dumps(
            [{"name": c.name, "spec": str(c.spec), "checkpoint": c.checkpoint and str(c.checkpoint)} for c in cases]
        )
    )
    results, kind = [], "-full" if given.full else ""
    sides = ((f"base-{commit[:12]}{kind}", base_tree), (f"head-{_sources()}{kind}", ROOT))
    if given.again:
        shutil.rmtree(work / sides[1][0], ignore_errors=True)
    for label, tree in sides:
        out = work / label
        command = [
            sys.executable,
            str(Path(__file__).resolve()),
            "record",
            str(listed),
            str(out),
            "--targets",
            given.targets,
        ]
        subprocess.run([*command, *(["--keep"] if given.keep else [])], env=_environment(tree), check=True, cwd=work)
        results.append(json.loads((out / "results.json").read_text()))
    asked = [f"{case.name}/{target}" for case in cases for target in given.targets.split(",")]
    base, head = ({key: found[key] for key in asked} for found in results)
    folders = [work / label / "artifacts" for label, _ in sides]
    numbers = _numbers(base, head, *folders) if given.keep else {}
    return _report(base, head, Wanted.read(commit), numbers, *(label for label, _ in sides))


def _sources() -> str:
    """A digest of the code of this checkout: what decides which results of an earlier run still hold."""
    digest = hashlib.sha256()
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", *ROOMS], cwd=ROOT, capture_output=True, check=True
    )
    for name in sorted(listed.stdout.decode().splitlines()):
        if (ROOT / name).is_file():
            digest.update(name.encode() + b"\0" + (ROOT / name).read_bytes())
    return digest.hexdigest()[:12]


def _environment(tree: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(tree / "src"), "PYTHONWARNINGS": "ignore"}


def _checkout(commit: str, folder: Path) -> Path:
    """The files of `commit` in `folder`, which is kept for the next run."""
    if (folder / "pyproject.toml").is_file():
        return folder
    with tempfile.TemporaryFile() as packed:
        subprocess.run(["git", "archive", commit], cwd=ROOT, stdout=packed, check=True)
        packed.seek(0)
        with tarfile.open(fileobj=packed) as archive:
            # Pythons before 3.11.4 have no filters
            filtered: dict[str, Any] = {"filter": "tar"} if hasattr(tarfile, "tar_filter") else {}
            archive.extractall(folder, **filtered)
    return folder


def _cases(tree: Path, folder: Path, only: str, full: bool) -> Iterator[Case]:
    """Specs and weights, made by the code of `tree` unless an earlier run left them."""
    import yaml

    for file in sorted((tree / "specs" / "models").glob("*.yaml")):
        content = yaml.safe_load(file.read_text("utf-8"))
        content.pop("training", None)
        if not full and content["model"]["layers"] > 8:
            content["model"].update({k: min(v, content["model"][k]) for k, v in SMALL.items()})
            content["model"].update({k: v for k, v in TOKENS.items() if k in content["model"]})  # a vocabulary of fewer
        variants: dict[str, tuple[dict[str, Any], bool]] = {"": (content, True)}
        if file.stem == "mobilemoe-tiny":
            variants |= {
                f"-{name}": ({**content, "quantization": {**content["quantization"], **changes}}, False)
                for name, changes in {
                    "int4-in": {"expert_group_axis": "in"},
                    "int8": {"weights": "int8", "embedding": "int8", "expert_group_axis": "in"},
                    "fp32-cache": {"kv_cache": "fp32", "expert_group_axis": "in"},
                    "float": {"weights": "fp32", "embedding": "fp32", "activations": "fp32", "kv_cache": "fp32",
                              "expert_group_axis": "in"},
                }.items()
            }  # fmt: skip
        for suffix, (spec, qat) in variants.items():
            name = file.stem + suffix
            if only in name:
                yield _decoder_case(tree, folder / name, name, spec, qat)
    for file in sorted((tree / "specs" / "families").glob("*.yaml")):
        if only in file.stem:
            yield _family_case(tree, folder / file.stem, file, yaml.safe_load(file.read_text("utf-8")))


def _decoder_case(tree: Path, home: Path, name: str, spec: dict[str, Any], qat: bool) -> Case:
    file = home / f"{name}.yaml"
    if not (home / "weights" / "config.json").is_file():
        home.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({**spec, "targets": list(TARGETS)}))
        packed = ["--qat"] if qat and spec["model"].get("moe") else []
        _python(
            tree, "-m", "moec", "checkpoint", "synthesize", str(file), "--out", str(home / "weights"), "-q", *packed
        )
    return Case(name, file, home / "weights")


def _family_case(tree: Path, home: Path, file: Path, spec: dict[str, Any]) -> Case:
    written = home / file.name
    if not written.is_file():
        home.mkdir(parents=True, exist_ok=True)
        model = file.parent / spec["model"]["transformers"]
        room = "sources" if (tree / "sources").is_dir() else "compiler.frontends"
        _python(tree, "-m", f"moec.{room}.random_checkpoint", str(model), "--out", str(home / "weights"), "--seed", "1")
        written.write_text(
            json.dumps({**spec, "model": {"transformers": str(home / "weights")}, "targets": list(TARGETS)})
        )
    return Case(file.stem, written, None)


def _python(tree: Path, *arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], env=_environment(tree), check=True)


def _record(listed: Path, out: Path, targets: list[str], *, keep: bool) -> int:
    """Compile each case for each target in this process; results.json holds digests, and graphs as text beside it."""
    sys.modules["pygraphviz"] = None  # type: ignore[assignment]  # MOEC_DUMP draws no pictures without it: seconds each
    import moec

    kept = out / "results.json"
    results: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {}
    out.mkdir(parents=True, exist_ok=True)
    for case in json.loads(listed.read_text()):
        for target in targets:
            key, begun = f"{case['name']}/{target}", time.monotonic()
            if key in results:
                continue
            dump, artifact = out / "graphs" / key, out / "artifacts" / key
            os.environ["MOEC_DUMP"] = str(dump)
            shutil.rmtree(dump, ignore_errors=True)
            shutil.rmtree(artifact, ignore_errors=True)
            artifact.parent.mkdir(parents=True, exist_ok=True)
            try:
                moec.compile(case["spec"], target=target, checkpoint=case["checkpoint"], out=str(artifact))
            except moec.UserError as error:
                results[key] = {"refused": re.sub(r"/\S+/", "", str(error))}
            else:
                results[key] = {"graphs": _graphs(dump), "files": _files(artifact)}
            if not keep:
                shutil.rmtree(artifact, ignore_errors=True)
            print(f"{key}: {time.monotonic() - begun:.1f} s", file=sys.stderr, flush=True)
            written = kept.with_suffix(".part")
            written.write_text(json.dumps(results, indent=1))
            written.replace(kept)
    return 0


def _graphs(dump: Path) -> list[str]:
    """Digests of the graphs that differ from the one before, in order; leaves each as NN.txt without operand names."""
    digests: list[str] = []
    for file in sorted(dump.glob("*.txt")):
        text = plain(file.read_text("utf-8"))
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        if not digests or digests[-1] != digest:
            digests.append(digest)
            (dump / f"graph-{len(digests):02}").write_text(text)
    for file in dump.iterdir():
        if not file.name.startswith("graph-"):
            file.unlink()
    return digests


def plain(text: str) -> str:
    """A graph's text as every revision wrote it, but for the line that names its stage: `f(x=%1)` is `f(%1)`, operands
    that are absent are left out, and what was one operator and is another reads as it does now."""
    lines = [line for line in text.splitlines() if not line.startswith("program ")]
    return "\n".join(_plain_call(line) if " = " in line else line for line in lines) + "\n"


# attention over a cache of codes was an operator of its own, with the scales before the position
CODED_ATTENTION = re.compile(
    r"moec\.cached_attention_q8\.default\((?P<caches>(?:[^,]+, ){5})(?P<scales>[^,]+, [^,]+), (?P<rest>.*)\)"
)


def _plain_call(line: str) -> str:
    line, named = line.replace("'", ""), ""
    while named != line:  # `routing=score=sigmoid`: an operand's name before a key of its text
        named, line = line, re.sub(r"(?<=[(, ])[a-z_]\w*=(?=\S)", "", line)
    line = re.sub(r", None(?=[,)])", "", line)
    return CODED_ATTENTION.sub(r"moec.cached_attention.default(\g<caches>\g<rest>, \g<scales>)", line)


def _files(artifact: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for file in sorted(p for p in artifact.rglob("*") if p.is_file()):
        name = str(file.relative_to(artifact))
        if name == "manifest.json":
            found[name] = _bound(json.loads(file.read_text("utf-8")))
        else:
            found[name] = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    return found


def _is_digest(key: str) -> bool:
    """Of a file, which is compared itself; payloads inside one are told apart by theirs."""
    return key.endswith("sha256") and key != "payload_sha256"


def _bound(value: Any) -> Any:
    """The manifest without what may differ, and without the digests of files, which are compared themselves."""
    if isinstance(value, dict):
        return {k: _bound(v) for k, v in sorted(value.items()) if k not in FREE_KEYS and not _is_digest(k)}
    if isinstance(value, list):
        return [_bound(v) for v in value]
    return value


@dataclass(frozen=True)
class Entry:
    """A difference that is wanted: `commit` made it, for cases that match one of `cases` ("case/target").

    differs: patterns of the differences as they are reported: `graphs`, `more graphs`, a file's name, `manifest: KEY`.
    """

    name: str
    commit: str
    cases: Sequence[str]
    differs: Sequence[str]
    reason: str


@dataclass(frozen=True)
class Wanted:
    """The entries of bench/replay_wanted.yaml whose commit the base does not have."""

    entries: tuple[Entry, ...]

    @staticmethod
    def read(base: str, file: Path = WANTED) -> Wanted:
        import yaml

        entries = [Entry(**raw) for raw in yaml.safe_load(file.read_text("utf-8")) or ()]
        return Wanted(tuple(entry for entry in entries if not _holds(base, entry.commit)))

    def of(self, key: str, difference: str) -> Entry | None:
        """The entry that wants this difference of this case."""
        for entry in self.entries:
            if _fits(key, entry.cases) and _fits(difference, entry.differs):
                return entry
        return None


def _fits(text: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(text, pattern) for pattern in patterns)


def _holds(revision: str, commit: str) -> bool:
    """Whether `commit` is part of `revision`."""
    found = subprocess.run(["git", "merge-base", "--is-ancestor", commit, revision], cwd=ROOT, capture_output=True)
    return found.returncode == 0


def _numbers(base: dict[str, Any], head: dict[str, Any], before: Path, after: Path) -> dict[str, str]:
    """What the logits of both artifacts say, of cases whose artifacts differ in a program and were kept."""
    keys = [
        key
        for key in base
        if any(what.partition(".")[2] in PROGRAMS for what, _ in _differences(base[key], head[key]))
        and (before / key).is_dir()
        and (after / key).is_dir()
    ]
    if not keys:
        return {}
    command = [sys.executable, str(Path(__file__).resolve()), "answers", str(before), str(after), *keys]
    done = subprocess.run(command, env=_environment(ROOT), stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _answers(before: Path, after: Path) -> str:
    """ "" for the same logits bit for bit, else by how much they differ, or why they were not compared."""
    import numpy as np

    import moec

    logits = []
    for folder in (before, after):
        try:
            with moec.load(folder) as session:
                ids = np.random.default_rng(0).integers(0, session.vocab_size, 40)
                logits.append(
                    np.concatenate(
                        [session.prefill(ids[:37], "all"), *(session.decode(int(i))[None] for i in ids[37:])]
                    )
                )
        except moec.UserError as error:
            return f"not run: {error}".splitlines()[0][:200]
    a, b = logits
    if np.array_equal(a, b):
        return ""
    return f"differ by {np.abs(a - b).max() / np.abs(a).max():.2g} of the largest"


def _report(base: dict[str, Any], head: dict[str, Any], wanted: Wanted, numbers: dict[str, str], *sides: str) -> int:
    width = max(map(len, base))
    counts, used = Counter[str](), dict[str, Entry]()
    for key, before in base.items():
        differences = _differences(before, head[key])
        if numbers.get(key):
            differences.append(("logits", f"logits: {numbers[key]}"))
        found = [(said, wanted.of(key, what)) for what, said in differences]
        refused = " (refused by both)" if "refused" in before else ""
        state = f"equal{refused}" if not found else "differs as wanted" if all(e for _, e in found) else "differs"
        counts[state.partition(" (")[0]] += 1
        print(f"{key:<{width}}  {state}")
        for said, entry in found:
            if entry is not None:
                used[entry.name] = entry
            print(f"{'':<{width}}    {said}" + ("" if entry is None else f"  [{entry.name}]"))
        if numbers.get(key) == "":
            print(f"{'':<{width}}    logits: the same, bit for bit")
    for entry in used.values():
        print(f"[{entry.name}] {entry.commit}: {entry.reason}")
    print(", ".join(f"{counts[state]} {state}" for state in ("equal", "differs as wanted", "differs") if counts[state]))
    print(f"graphs as text in build/replay/{{{','.join(sides)}}}/graphs")
    return 1 if counts["differs"] else 0


def _differences(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, str]]:
    """What differs, as an entry names it (`graphs`, a file, `manifest: KEY`), and in words."""
    if "refused" in before or "refused" in after:
        if "refused" in before and "refused" in after:
            return []
        side = "base" if "refused" in before else "head"
        return [(f"refused by {side}", f"refused by {side}: {before.get('refused') or after.get('refused')}")]
    found = []
    old, new = before["graphs"], after["graphs"]
    if new[: len(old)] == old != new:
        found.append(("more graphs", f"graphs: those of the base and {len(new) - len(old)} more"))
    elif old != new:
        first = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
        found.append(("graphs", f"graphs: {len(old)} and {len(new)}, from graph-{first + 1:02} on"))
    for name in sorted(before["files"].keys() | after["files"].keys()):
        a, b = before["files"].get(name), after["files"].get(name)
        if a == b:
            continue
        if a is None or b is None:
            found.append((name, f"{name}: only in {'head' if a is None else 'base'}"))
        elif name == "manifest.json":
            found += [(f"manifest: {key}", f"manifest: {key}") for key in _keys(a, b)]
        else:
            found.append((name, f"{name}: other bytes"))
    return found


def _keys(a: Any, b: Any, at: str = "") -> list[str]:
    """Where two manifests differ, as dotted keys."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [
            k for key in sorted(a.keys() | b.keys()) for k in _keys(a.get(key), b.get(key), f"{at}.{key}".lstrip("."))
        ]
    return [] if a == b else [at]


if __name__ == "__main__":
    sys.exit(main())
