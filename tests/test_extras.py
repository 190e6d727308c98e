"""Extras: the core installs and works without them, and whoever wants more is told so in one line with the command."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest

from moec.checkpoints import synthesize
from moec.compiler import build
from moec.compiler.errors import MissingExtra
from moec.compiler.extras import Need, install_command, installed, missing, require
from moec.compiler.spec import load_spec

ROOT = Path(__file__).parent.parent
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
# what each extra brings, as it is imported
MODULES = {
    "metal": ("mlx",),
    "onnx": ("onnx", "onnxruntime"),
    "mlir": ("torch_mlir",),
    "iree": ("iree",),
    "transformers": ("transformers",),
    "train": ("tensorboard",),
    "bench": ("matplotlib", "gguf"),
}
SPEC = """
name: small
model:
  architecture: mobilemoe
  layers: 1
  d_model: 32
  heads: 2
  kv_heads: 1
  head_dim: 16
  vocab_size: 300
  context: 48
  rope: {theta: 10000.0, interleaved: true}
  moe: {experts: 4, top_k: 2, expert_width: 32, shared_width: 32}
quantization: {weights: int4, group_size: 32, activations: fp32, kv_cache: fp32}
targets:
  xnnpack:
  metal: {dtype: float32}
  onnx:
  mlir: {max_tokens: 8}
"""


slow = pytest.mark.slow


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A spec and its checkpoint; `artifact` adds what is compiled."""
    for extra, modules in MODULES.items():
        for module in modules:
            pytest.importorskip(module, reason=f"needs the {extra} extra: pip install 'moec[{extra}]'")
    folder = tmp_path_factory.mktemp("extras")
    (folder / "spec.yaml").write_text(SPEC, "utf-8")
    (folder / "iree.yaml").write_text(SPEC.replace("{max_tokens: 8}", "{max_tokens: 8, engine: iree}"), "utf-8")
    synthesize(load_spec(folder / "spec.yaml"), folder / "checkpoint", seed=3)
    return folder


def artifact(home: Path, name: str) -> Path:
    """The artifact of a target, made when it is first wanted; `iree` is MLIR's with the other engine."""
    if not (home / name).exists():
        spec, target = ("iree.yaml", "mlir") if name == "iree" else ("spec.yaml", name)
        build.compile(load_spec(home / spec), target=target, checkpoint=home / "checkpoint", out=home / name)
    return home / name


def without(modules: tuple[str, ...], lines: list[list[str]], path: Path | None = None) -> list[dict[str, Any]]:
    """What command lines give, in one process, where `modules` are not installed; what is in `path` is."""
    environment = {**os.environ, **({"PYTHONPATH": str(path)} if path is not None else {})}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "extras_run.py"), ",".join(modules)],
        input=json.dumps(lines), capture_output=True, text=True, timeout=570, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def told(result: dict[str, Any], extra: str) -> None:
    """Exit status 2 and one line that names the extra and how to install it."""
    assert result["status"] == 2, result
    lines = [line for line in result["err"].splitlines() if " done in " not in line and " stopped in " not in line]
    assert len(lines) == 1, result
    assert f"pip install 'moec[{extra}]'" in lines[0], result


def compiling(home: Path, spec: str, target: str) -> list[str]:
    out = home / f"made-{Path(spec).stem}-{target}"
    given = ["--target", target, "--checkpoint", str(home / "checkpoint"), "--out", str(out), "-q"]
    return ["compile", str(home / spec), *given]


def running(home: Path, name: str) -> list[str]:
    return ["run", str(artifact(home, name)), "--ids", "5,6,7", "--max-new-tokens", "2", "--trust"]


# extra -> (what must be refused, what must still work): of the command lines that come near it
NEAR = {
    "metal": (["run metal"], ["compile metal", "inspect metal"]),
    "onnx": (["compile onnx", "run onnx"], ["run xnnpack", "inspect onnx"]),
    # IREE reads the text that torch-mlir writes, and runs what it has compiled without it
    "mlir": (["compile mlir", "run mlir", "compile iree"], ["inspect mlir"]),
    "iree": (["compile iree", "run iree"], ["run xnnpack", "inspect iree"]),
    "transformers": ([], ["compile xnnpack", "run xnnpack"]),
    "train": ([], ["run xnnpack"]),
    "bench": ([], ["run xnnpack"]),
}


def command(home: Path, words: str) -> list[str]:
    verb, what = words.split()
    if verb == "compile":
        return compiling(home, "iree.yaml" if what == "iree" else "spec.yaml", "mlir" if what == "iree" else what)
    return running(home, what) if verb == "run" else [verb, str(artifact(home, what))]


@pytest.mark.parametrize("extra", [e if e == "onnx" else pytest.param(e, marks=slow) for e in MODULES])
def test_what_needs_an_extra_says_so_and_the_rest_works(home: Path, extra: str) -> None:
    refused, fine = NEAR[extra]
    common = [["targets"], ["schema"], ["explain", str(home / "spec.yaml"), "--target", "xnnpack"]]
    lines = [*(command(home, w) for w in [*refused, *fine]), *common]
    results = without(MODULES[extra], lines)
    for result in results[: len(refused)]:
        told(result, extra)
    for result in results[len(refused) :]:
        assert result["status"] == 0, result
    listed = results[-3]["out"]
    assert (install_command(extra) in listed) == (extra in ("metal", "onnx", "mlir", "iree")), listed


@pytest.mark.slow  # each extra against each command, with verification: two minutes
@pytest.mark.parametrize("extra", MODULES)
def test_every_command_without_each_extra(home: Path, extra: str) -> None:
    every = {
        w: command(home, w)
        for target in ("xnnpack", "metal", "onnx", "mlir", "iree")
        for w in (f"compile {target}", f"run {target}", f"verify {target}", f"inspect {target}")
    }
    for line in every.values():
        if line[0] == "verify":
            line.append("--trust")
            line += ["--tokens", "24", "-q"]
    every["verify --against"] = [
        "verify", str(artifact(home, "xnnpack")), "--against", "metal,onnx,mlir", "--tokens", "24", "-q",
    ]  # fmt: skip
    every["diff"] = ["diff", str(home / "xnnpack"), str(home / "xnnpack"), "--tokens", "8"]
    every["bisect"] = ["bisect", str(home / "spec.yaml"), "--target", "xnnpack", "--tokens", "12", "-q"]
    every["verify spec"] = ["verify", str(home / "spec.yaml"), "--target", "xnnpack", "--tokens", "12", "-q"]
    every["checkpoint"] = ["checkpoint", "inspect", str(home / "checkpoint")]
    every["plan"] = ["plan", str(home / "spec.yaml"), "--target", "xnnpack"]
    every["device"] = ["device", "list"]
    refused = set(NEAR[extra][0]) | {w.replace("run", "verify") for w in NEAR[extra][0] if w.startswith("run")}
    for words, result in zip(every, without(MODULES[extra], list(every.values())), strict=True):
        if words in refused:
            told(result, extra)
        else:
            assert result["status"] == 0, (words, result)
        if words == "verify --against" and extra in ("metal", "onnx", "mlir"):
            assert f"not available: {extra}: " in result["out"], result
            assert install_command(extra) in result["out"], result


def test_a_model_of_transformers_without_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", "utf-8")
    (tmp_path / "spec.yaml").write_text(
        f"name: other\nmodel: {{transformers: {tmp_path}}}\nquantization: none\ntargets: [xnnpack]\n", "utf-8"
    )
    told(without(("transformers",), [["explain", str(tmp_path / "spec.yaml")]])[0], "transformers")


def test_every_extra_that_a_message_names_can_be_installed() -> None:
    named = {
        extra
        for room in ("compiler", "passes", "targets", "training", "bench")
        for file in (ROOT / room).rglob("*.py")
        for group in re.findall(r"moec\[([a-z,]+)\]", file.read_text("utf-8"))
        for extra in group.split(",")
    }
    assert {"metal", "onnx", "mlir", "iree", "transformers", "train", "titan"} <= set(EXTRAS)
    assert named <= set(EXTRAS), named - set(EXTRAS)


def test_the_core_depends_on_no_extra() -> None:
    core = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["dependencies"]
    bare = {re.split(r"[\[<>=; ]", d)[0].lower().replace("_", "-") for d in core}
    brought = {re.split(r"[\[<>=; ]", d)[0].lower() for e in MODULES for d in EXTRAS[e]}
    assert not bare & brought


def test_a_need_is_found_without_importing_it() -> None:
    assert installed("json.tool")
    assert not installed("json.no_such_part")
    assert not installed("no_such_package.part")
    needs = (Need("no_such_package", "a", "run"), Need("no_such_other", "b", "run"), Need("x_y", "c", "run", when="w"))
    assert missing(needs, "compile") is None
    assert missing(needs, "run") == "no_such_package, no_such_other not installed; pip install 'moec[a,b]'"
    with pytest.raises(MissingExtra, match=r"^running needs no_such_package.*; run: pip install 'moec\[a\]'$"):
        require("no_such_package", "a", "running")


# --- targets of other distributions ---------------------------------------------------------------------------------

OPTIONS = '''
from moec.compiler.spec.targets import TargetOptions


class Options(TargetOptions):
    """Options of a target that only counts."""

    shout: bool = False
'''
TARGET = """
import json

from moec.compiler.errors import RunError
from moec.compiler.pipeline import Pass, PassResult
from moec.compiler.program import Stage
from moec.compiler.target import LoweredFiles, Target, register


class Count(Target):
    name = "count"
    about = "Counts operators."

    def legalize(self, options):
        legal = lambda program: PassResult(program.edit().done(stage=Stage.LEGAL), 0)
        return [Pass("count_legal", legal, needs=Stage.FUSED, gives=Stage.LEGAL)]

    def lower(self, program, out, options, progress):
        calls = [n for n in program.graph.nodes if n.op == "call_function"]
        (out / "count.json").write_text(json.dumps({"calls": len(calls), "shout": options.shout}))
        return LoweredFiles(("count.json",))

    def load(self, artifact):
        raise RunError("a count cannot be run")


register("count", Count)
"""


def distribution(folder: Path, package: str, *, name: str = "count", **files: str) -> Path:
    """A folder as pip leaves it: a package, and the metadata with an entry point."""
    home = folder / package
    home.mkdir(parents=True)
    (home / "__init__.py").write_text("", "utf-8")
    for file, text in files.items():
        (home / f"{file}.py").write_text(text, "utf-8")
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n", "utf-8")
    (info / "entry_points.txt").write_text(f"[moec.targets]\n{name} = {package}\n", "utf-8")
    assert [d.entry_points for d in distributions(path=[str(folder)])]
    return folder


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    """Six distributions, one of which is in order, and what command lines give where they are installed."""
    folder = tmp_path_factory.mktemp("others")
    site = folder / "site"
    distribution(site, "moec_count", options=OPTIONS, target=TARGET)
    distribution(site, "moec_thief", name="xnnpack", options=OPTIONS, target=TARGET)
    distribution(site, "moec_import", name="import", options=OPTIONS, target="import no_such_module")
    distribution(site, "moec_syntax", name="syntax", options=OPTIONS, target="def (")
    distribution(site, "moec_silent", name="silent", options=OPTIONS, target="")
    distribution(site, "moec_bare", name="bare", options="", target=TARGET.replace("count", "bare"))
    known = folder / "known.yaml"  # this process does not know the target
    known.write_text(SPEC, "utf-8")
    synthesize(load_spec(known), folder / "checkpoint", seed=1)
    head = SPEC.split("targets:")[0]
    for name in ("import", "syntax", "silent", "bare"):
        (folder / f"{name}.yaml").write_text(f"{head}targets: [{name}]\n", "utf-8")
    (folder / "count.yaml").write_text(head + "targets: {count: {shout: true}}\n", "utf-8")
    compiling = ["compile", str(folder / "count.yaml"), "--checkpoint", str(folder / "checkpoint")]
    lines = {
        "compile": [*compiling, "--out", str(folder / "out"), "-q"],
        **{name: ["explain", str(folder / f"{name}.yaml")] for name in ("import", "syntax", "silent", "bare")},
        "targets": ["targets"],
        "json": ["targets", "--json"],
    }
    return folder, dict(zip(lines, without((), list(lines.values()), site), strict=True))


def test_a_target_of_another_distribution(others: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    folder, results = others
    assert results["compile"]["status"] == 0, results["compile"]
    found = json.loads((folder / "out" / "count.json").read_text())
    assert found["calls"] > 5
    assert found["shout"] is True
    assert json.loads((folder / "out" / "manifest.json").read_text())["target"] == "count"
    assert re.search(r"count +yes +yes +Counts operators", results["targets"]["out"]), results["targets"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("import", "moec_import cannot be imported: No module named 'no_such_module'"),
        ("syntax", "moec_syntax cannot be imported: "),
        ("silent", "moec_silent does not register it"),
        ("bare", "moec_bare.options cannot be used"),
    ],
)
def test_a_broken_target_of_another_distribution_is_one_line(
    others: tuple[Path, dict[str, dict[str, Any]]], name: str, said: str
) -> None:
    result = others[1][name]
    assert result["status"] == 2, result
    assert len(result["err"].splitlines()) == 1, result
    assert said in result["err"]
    assert others[1]["targets"]["status"] == 0, others[1]["targets"]


def test_no_distribution_takes_the_name_of_a_target_of_ours(others: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    listed = {t["name"]: t for t in json.loads(others[1]["json"]["out"])}
    assert listed["xnnpack"]["package"] == "moec.targets.xnnpack"
    assert listed["xnnpack"]["compiles"] is None
    assert "cannot be imported" in listed["import"]["compiles"]
