"""compile and load: faults are found early and named, and nothing good is lost."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import MappingProxyType

import pytest

from moec.checkpoints import synthesize
from moec.compiler import build
from moec.compiler.artifact import Artifact
from moec.compiler.build_record import read_build_record, record_file_of
from moec.compiler.errors import ArtifactError, CheckpointError, CompileError, SpecError, UserError
from moec.compiler.pipeline import run_passes
from moec.compiler.program import Stage
from moec.compiler.spec import Spec
from moec.sources.decoder_source import DecoderSource

MODEL = {
    "architecture": "mobilemoe", "layers": 1, "d_model": 32, "heads": 2, "kv_heads": 1, "head_dim": 16,
    "vocab_size": 300, "context": 32, "rope": {"theta": 10000.0, "interleaved": True},
    "moe": {"experts": 4, "top_k": 2, "expert_width": 32, "shared_width": 32},
}  # fmt: skip
INT4 = {"weights": "int4", "group_size": 32}


def spec(**changes: object) -> Spec:
    return Spec.model_validate({"name": "one", "model": MODEL, "quantization": INT4, **changes})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesize(spec(), tmp_path_factory.mktemp("ck") / "c", seed=0, qat=True)


@pytest.fixture(scope="module")
def artifact(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return build.compile(spec(), checkpoint=checkpoint, out=tmp_path_factory.mktemp("out") / "deep" / "a")


def test_the_manifest_says_what_was_built(artifact: Artifact, checkpoint: Path) -> None:
    manifest = artifact.manifest
    artifact.check_contents()
    assert (manifest.name, manifest.target) == ("one", "xnnpack")
    assert Spec.model_validate(manifest.spec) == spec()
    assert manifest.digests.kernel
    names = [p.name for p in manifest.passes]
    assert names.index("fuse_moe") < names.index("quantize_weights") < names.index("pack_moe")
    assert {p.name: p.changed for p in manifest.passes}["fuse_moe"] == 1
    assert manifest.model.moe_layers == ("model.layers.0.feed_forward",)
    assert manifest.details["methods"]["forward"]["instructions"] > 0
    assert manifest.details["operators"]["moec::fused_moe_packed.out"] == 2  # one in each method
    assert {f.name for f in manifest.files} >= {"model.pte"}
    assert set(manifest.sizes_by_role) >= {"router", "expert", "shared", "attention", "embedding", "norm"}
    assert sum(manifest.sizes_by_role.values()) <= artifact.path("model.pte").stat().st_size
    record = read_build_record(artifact)
    assert record is not None
    assert record.checkpoint == str(checkpoint)
    assert record.seconds["total"] > 0
    assert [name for name, _ in record.pass_seconds] == names


@pytest.mark.parametrize("text", ["my notes", "{}", '{"contents": "x"}', "[1]", None])
def test_a_file_in_the_place_of_the_record_is_kept(text: str | None, checkpoint: Path, tmp_path: Path) -> None:
    place = record_file_of(tmp_path / "a")
    if text is None:
        (tmp_path / "elsewhere").write_text("theirs")
        place.symlink_to(tmp_path / "elsewhere")
    else:
        place.write_text(text)
    before = sorted((p.name, p.read_bytes()) for p in tmp_path.iterdir())
    with pytest.raises(UserError, match=r"a\.build\.json: .* moec did not write it; move it away"):
        build.compile(spec(checkpoint=str(checkpoint)), out=tmp_path / "a")
    assert sorted((p.name, p.read_bytes()) for p in tmp_path.iterdir()) == before


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_the_same_compile_gives_the_same_folder_byte_for_byte(
    artifact: Artifact, checkpoint: Path, tmp_path: Path
) -> None:
    """From another folder, of another name, into another one: manifest and mark included."""
    shutil.copytree(checkpoint, tmp_path / "elsewhere" / "weights")
    again = build.compile(
        spec(checkpoint=str(tmp_path / "elsewhere" / "weights")), out=tmp_path / "other" / "name of its own"
    )
    assert contents(again.folder) == contents(artifact.folder)


def test_nothing_that_ships_names_the_machine(artifact: Artifact, checkpoint: Path) -> None:
    for name, data in contents(artifact.folder).items():
        for place in (checkpoint, artifact.folder, Path.cwd(), Path.home()):
            assert str(place).encode() not in data, f"{name} names {place}"


def test_a_record_of_another_artifact_is_none(artifact: Artifact, tmp_path: Path) -> None:
    shutil.copytree(artifact.folder, tmp_path / "a")
    record = record_file_of(artifact.folder)
    copied = Artifact.open(tmp_path / "a")
    assert read_build_record(copied) is None
    shutil.copyfile(record, record_file_of(copied.folder))
    assert read_build_record(copied) == read_build_record(artifact)
    for damage in (b"", b"[" * 100_000, b"{}", record.read_bytes().replace(b'"contents": "', b'"contents": "0')):
        record_file_of(copied.folder).write_bytes(damage)
        assert read_build_record(copied) is None


def test_artifacts_load_by_path(artifact: Artifact) -> None:
    session = build.load(str(artifact.folder))
    assert session.prefill([1, 2]).shape == (1, 300)
    session.close()


def test_explain_reads_no_weight() -> None:
    found = build.explain(spec())
    assert "moec.fused_moe_packed" in found.text
    assert found.name == "one"
    assert any(r.name == "fuse_moe" and r.changed == 1 for r in found.records)


PEAK_OF_EXPLAIN = """
import re, sys
from pathlib import Path
from moec.compiler import build
from moec.compiler.spec import Spec
found = build.explain(Spec.model_validate_json(sys.argv[1]))
assert not found.error and any(m[2] == "moec.cached_attention.default" for m in found.matched), found
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
@pytest.mark.parametrize(
    ("context", "windowed"),
    [(1 << 22, False), pytest.param(1 << 24, True, marks=pytest.mark.slow)],
)
def test_explain_holds_no_mask_of_the_whole_context(context: int, windowed: bool) -> None:
    """2^24 positions: a mask of 128 tokens is 2 GB, and masks of all sampled calls were in memory together (19 GB)."""
    window = {"attention_window": {"size": 4096, "every_nth_global": 2}} if windowed else {}
    large = spec(model={**MODEL, **window, "layers": 2, "context": context})
    command = [sys.executable, "-W", "ignore", "-c", PEAK_OF_EXPLAIN, large.model_dump_json()]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    peak = int(done.stdout.split()[-1]) * 1024
    assert 1 << 28 < peak < 3 << 29, "torch and ExecuTorch take 0.4 GB by themselves, a sampled mask 64 MB"


def test_passes_reach_legal(checkpoint: Path) -> None:
    program, passes = build.program_and_passes(spec(), None)
    assert program.stage is Stage.EXPORTED
    assert passes[-1].gives is Stage.LEGAL


def test_rounding_to_nearest_is_said(artifact: Artifact, tmp_path: Path) -> None:
    """Of codes that are computed here, not of those that a checkpoint stores, and not of INT8, which loses little."""

    def said(found: Spec, weights: Path) -> list[str]:
        program, passes = build.program_and_passes(found, build.open_checkpoint(found, weights), "xnnpack")
        return build.rounded_to_nearest(run_passes(program, passes))

    assert not any("rounded to nearest" in note for note in artifact.manifest.notes)
    weights = synthesize(spec(), tmp_path / "float", seed=0)
    few = {**INT4, "embedding": "int8"}
    (note,) = said(spec(quantization=few), weights)
    # experts w13 and w2, the shared expert's two, attention's four
    assert note.startswith("rounded to nearest (rtn): 8 weights in INT4"), note
    assert "--method awq_gptq" in note
    assert said(spec(quantization={**few, "weights": "int8"}), weights) == []
    assert said(spec(quantization={**few, "method": "search"}), weights) == []


def test_faults_come_before_the_work(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*arguments: object, **options: object) -> None:
        raise AssertionError("the model was exported before the input was checked")

    monkeypatch.setattr(DecoderSource, "export", unreachable)
    with pytest.raises(UserError, match="unknown target 'toaster'"):
        build.compile(spec(), target="toaster", checkpoint=checkpoint, out=tmp_path / "a")
    with pytest.raises(CheckpointError, match="names no checkpoint"):
        build.compile(spec(), out=tmp_path / "a")
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        build.compile(spec(), checkpoint=tmp_path / "nowhere", out=tmp_path / "a")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="not a folder"):
        build.compile(spec(), checkpoint=checkpoint, out=tmp_path / "file")
    with pytest.raises(UserError, match="names several targets"):
        build.compile(spec(targets=["xnnpack", "metal"]), checkpoint=checkpoint, out=tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_full_disk_keeps_the_old_artifact(
    artifact: Artifact, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match="free some space"):
        build.compile(spec(), checkpoint=checkpoint, out=artifact.folder)
    Artifact.open(artifact.folder).check_contents()
    name = artifact.folder.name
    assert {p.name for p in artifact.folder.parent.iterdir()} == {name, f"{name}.build.json"}


def test_a_scheme_that_xnnpack_cannot_hold_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    wanted = spec(
        quantization={**INT4, "activations": "fp32"}, targets={"xnnpack": {"kernels": {"attention": "xnnpack"}}}
    )
    with pytest.raises(CompileError, match="INT8 activations only"):
        build.compile(wanted, checkpoint=checkpoint, out=tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_missing_artifact_is_the_users_fault(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such artifact"):
        build.load(tmp_path / "a")


def test_a_spec_may_be_a_mapping(checkpoint: Path, artifact: Artifact, tmp_path: Path) -> None:
    """The same keys as in YAML, from a program; faults all at once, a line each, as those of a file."""
    given = {"name": "one", "model": MappingProxyType(MODEL), "quantization": INT4, "checkpoint": str(checkpoint)}
    built = build.compile(MappingProxyType(given), target="xnnpack", out=tmp_path / "a")
    assert built.manifest.files == artifact.manifest.files
    wrong = {**given, "quantisation": "none", "model": {**MODEL, "head_dim": 3}}
    with pytest.raises(SpecError) as raised:
        build.compile(wrong, out=tmp_path / "b")
    lines = str(raised.value).splitlines()
    assert len(lines) == 2
    assert any(line.startswith("one: quantisation: unknown key; did you mean 'quantization'?") for line in lines)
    assert any(line.startswith("one: model.head_dim: must be even") for line in lines)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (b'{\n  "a": [1, 0.1],\n  "\xc3\xa9": "\\u00e9 \\n"\n}', '{"a":[1,0.1],"é":"é \\n"}'.encode()),
        (b'{ "a": 1e400 }', None),
        (b'{ "a": "\\ud800" }', None),
        (b'{ "a": ' + b"9" * 5000 + b" }", None),
        (b" " + b"[" * 10000 + b"]" * 10000, None),
    ],
)
def test_a_tokenizer_is_kept_without_spaces(given: bytes, kept: bytes | None) -> None:
    """Unchanged where Python's JSON would change or not read it."""
    assert build._without_spaces(given) == (given if kept is None else kept)
