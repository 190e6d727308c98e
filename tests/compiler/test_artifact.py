"""Artifacts: what opening checks, and that a good artifact survives whatever happens to its successor."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field

from moec.compiler import replacing
from moec.compiler.artifact import (
    FORMAT,
    MANIFEST,
    Artifact,
    Digests,
    Manifest,
    ModelRecord,
    new_artifact,
    record_file,
    write_manifest,
)
from moec.compiler.errors import ArtifactError, RunError, UserError
from moec.compiler.spec.targets import TargetOptions, options_class


def write(folder: Path, content: bytes = b"program" * 20_000) -> None:
    (folder / "model.pte").write_bytes(content)
    write_manifest(
        folder,
        Manifest(
            format=FORMAT,
            moec="0",
            name="m",
            target="xnnpack",
            spec={},
            quantization="none",
            model=ModelRecord(
                name="m", vocab_size=8, context=4, max_tokens=2, bos_id=None, eos_ids=(1,), moe_layers=("a",)
            ),
            digests=Digests(spec="s", checkpoint="c", graph="g"),
            passes=(),
            files=(record_file(folder / "model.pte"),),
            sizes_by_role={"expert": 3},
            details={},
            versions={},
        ),
    )


@pytest.fixture
def good(tmp_path: Path) -> Path:
    with new_artifact(tmp_path / "a") as folder:
        write(folder)
    return tmp_path / "a"


def test_what_is_written_is_read(good: Path) -> None:
    opened = Artifact.open(good)
    assert opened.manifest.model.eos_ids == (1,)
    assert opened.path("model.pte") == good / "model.pte"
    assert opened.bytes == 140_000
    opened.check_contents()
    with pytest.raises(ArtifactError, match=r"lists no tokenizer\.json"):
        opened.path("tokenizer.json")


def test_artifacts_of_format_1_open(good: Path) -> None:
    """They held the checkpoint's folder and seconds; an unknown key, or a format of the future, is still refused."""
    raw = json.loads((good / MANIFEST).read_text())
    entry = {"name": "fuse", "changed": 1, "seconds": 0.1, "digest": "d", "refusals": []}
    old = {k: v for k, v in raw.items() if k not in ("codes", "calibration", "states")}
    old |= {"format": 1, "checkpoint": "/elsewhere", "seconds": {"lower": 1.5}, "passes": [entry]}
    (good / MANIFEST).write_text(json.dumps(old))
    assert Artifact.open(good).manifest.passes[0].changed == 1
    for change in ({"unknown": 1}, {"format": FORMAT + 1}):
        (good / MANIFEST).write_text(json.dumps({**old, **change}))
        with pytest.raises(ArtifactError, match=r"damaged|this moec reads format"):
            Artifact.open(good)


def edit(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        raw = json.loads((folder / MANIFEST).read_text())
        change(raw)
        (folder / MANIFEST).write_text(json.dumps(raw))

    return apply


def cut(folder: Path) -> None:
    with (folder / "model.pte").open("r+b") as stream:
        stream.truncate(1000)


def flip(folder: Path, at: int = 100) -> None:
    with (folder / "model.pte").open("r+b") as stream:
        stream.seek(at)
        stream.write(b"\xff")


DAMAGE = {
    "no manifest": (lambda f: (f / MANIFEST).unlink(), "no manifest.json"),
    "not JSON": (lambda f: (f / MANIFEST).write_text("{"), "damaged"),
    "nested too deeply": (lambda f: (f / MANIFEST).write_text("[" * 100_000), "damaged"),
    "not text": (lambda f: (f / MANIFEST).write_bytes(b"\xff\xfe\x00"), "damaged"),
    "not an object": (lambda f: (f / MANIFEST).write_text("[]"), "format None"),
    "a later format": (edit(lambda m: m.update(format=FORMAT + 1)), f"format {FORMAT + 1}"),
    "a missing key": (edit(lambda m: m.pop("target")), "target"),
    "a wrong type": (edit(lambda m: m["model"].update(context="many")), r"model\.context"),
    "a key too many": (edit(lambda m: m.update(extra=1)), "extra"),
    "a file outside": (edit(lambda m: m["files"][0].update(name="../x")), "file name"),
    "a folder as program": (lambda f: ((f / "model.pte").unlink(), (f / "model.pte").mkdir()), "compile it again"),
    "no program": (lambda f: (f / "model.pte").unlink(), "missing"),
    "truncated": (cut, "truncated: 1000 bytes"),
    "too long": (lambda f: (f / "model.pte").open("ab").write(b"x"), "too long"),
    "a damaged head": (flip, "first bytes"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_and_named(good: Path, name: str) -> None:
    damage, message = DAMAGE[name]
    damage(good)
    with pytest.raises(ArtifactError, match=message) as caught:
        Artifact.open(good)
    assert "\n" not in str(caught.value)
    assert str(good) in str(caught.value)


def test_damage_in_a_large_program_is_found_at_opening(good: Path) -> None:
    """ExecuTorch may crash on a damaged program: every byte of it must be checked before it sees the file."""
    flip(good, at=100_000)
    with pytest.raises(ArtifactError, match="model"):
        Artifact.open(good)


def test_damage_far_inside_is_found_by_reading_all(good: Path) -> None:
    write(good, b"program" * 1_000_000)
    flip(good, at=6_000_000)
    opened = Artifact.open(good)
    with pytest.raises(ArtifactError, match="digest"):
        opened.check_contents()


@pytest.mark.parametrize("what", ["nothing there", "a file"])
def test_what_is_not_a_folder(tmp_path: Path, what: str) -> None:
    place = tmp_path / "x"
    if what == "a file":
        place.write_text("")
    with pytest.raises(ArtifactError, match="folder"):
        Artifact.open(place)


def leftovers(place: Path) -> list[str]:
    return [p.name for p in place.parent.iterdir() if p.name != place.name]


def test_a_new_artifact_replaces_the_old(good: Path) -> None:
    with new_artifact(good) as folder:
        write(folder, b"second")
    assert Artifact.open(good).bytes == 6
    assert not leftovers(good)


def test_it_replaces_without_an_atomic_exchange(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replacing, "_exchange", lambda a, b: False)
    with new_artifact(good) as folder:
        write(folder, b"second")
    assert Artifact.open(good).bytes == 6
    assert not leftovers(good)


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), RuntimeError("crash"), OSError(errno.ENOSPC, "no space")])
def test_the_old_artifact_survives(good: Path, failure: BaseException) -> None:
    wanted = UserError if isinstance(failure, OSError) else type(failure)
    with pytest.raises(wanted), new_artifact(good) as folder:  # noqa: PT012 (the failure comes half-way)
        (folder / "model.pte").write_bytes(b"half")
        raise failure
    Artifact.open(good).check_contents()
    assert not leftovers(good)


def test_the_old_artifact_survives_a_failed_rename(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replacing, "_exchange", lambda a, b: False)
    real, calls = os.rename, []

    def rename(a: Path, b: Path) -> None:
        calls.append(b)
        if len(calls) == 2:
            raise RuntimeError("pulled the plug")
        real(a, b)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(RuntimeError), new_artifact(good) as folder:
        write(folder, b"second")
    assert Artifact.open(good).bytes == 140_000


@pytest.mark.parametrize("stop", ["before", "after"])
def test_the_old_artifact_survives_ctrl_c_between_the_renames(
    good: Path, monkeypatch: pytest.MonkeyPatch, stop: str
) -> None:
    monkeypatch.setattr(replacing, "_exchange", lambda a, b: False)
    real, calls = os.rename, []

    def rename(a: Path, b: Path) -> None:
        calls.append(b)
        if len(calls) == 1 and stop == "before":
            raise KeyboardInterrupt
        real(a, b)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(KeyboardInterrupt), new_artifact(good) as folder:
        write(folder, b"second")
    assert Artifact.open(good).bytes == 140_000
    assert not leftovers(good)


def test_ctrl_c_just_after_the_folder_was_made_leaves_none(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = Path.mkdir

    def interrupted(self: Path, *arguments: object, **options: object) -> None:
        make(self, *arguments, **options)  # type: ignore[arg-type]
        if self.name.startswith(f".{good.name}"):
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "mkdir", interrupted)
    with pytest.raises(KeyboardInterrupt), new_artifact(good):
        pytest.fail("it was not interrupted")
    assert [path.name for path in good.parent.iterdir()] == [good.name]


def test_what_a_killed_compile_put_aside_comes_back(good: Path) -> None:
    """Killed between the two renames: the good artifact bears a temporary name, and the next compile fails."""
    good.rename(good.with_name(f".{good.name}.moec-part-{2**22 + 1}-old"))  # beyond the largest pid
    with pytest.raises(RuntimeError), new_artifact(good):
        raise RuntimeError("fails")
    assert Artifact.open(good).bytes == 140_000
    assert not leftovers(good)


def test_a_full_disk_is_the_users_to_mend(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="free some space"), new_artifact(tmp_path / "a"):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_folder_of_something_else_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    entered = False
    with pytest.raises(UserError, match="another"), new_artifact(tmp_path):
        entered = True
    assert not entered
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    with pytest.raises(UserError, match="not a folder"), new_artifact(tmp_path / "a"):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot write"), new_artifact(tmp_path / "a"):
        pass


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with new_artifact(tmp_path / "a") as folder:
        write(folder)
    assert Artifact.open(tmp_path / "a").manifest.name == "m"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_what_a_killed_compile_left_is_removed(good: Path) -> None:
    stale = good.parent / f".{good.name}.moec-part-{2**22 + 1}"  # above the largest process id of Linux
    stale.mkdir()
    with new_artifact(good) as folder:
        write(folder, b"second")
    assert not leftovers(good)


@pytest.mark.parametrize("options", [{"threads": "two"}, {"threads": 2**31}, 5, [1], {"thread": 1}])
def test_damaged_options_of_the_target_are_named(good: Path, options: object) -> None:
    edit(lambda m: m.update(spec={"targets": {"xnnpack": options}}))(good)
    with pytest.raises(ArtifactError, match=rf"{MANIFEST}: damaged: spec\.targets\.xnnpack.*compile it") as caught:
        Artifact.open(good).options()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spec", [{}, {"targets": []}, {"targets": {"onnx": {}}}, {"targets": {"xnnpack": None}}])
def test_a_target_without_options_has_its_defaults(good: Path, spec: dict) -> None:
    edit(lambda m: m.update(spec=spec))(good)
    assert Artifact.open(good).options() == options_class("xnnpack")()


def test_a_section_of_the_spec_is_a_mapping_whatever_is_there(good: Path) -> None:
    for spec, found in (({"model": {"moe": {"experts": 3}}}, {"experts": 3}), ({"model": "x"}, {}), ({}, {})):
        edit(lambda m, spec=spec: m.update(spec=spec))(good)
        assert Artifact.open(good).manifest.section("model", "moe") == found


def test_an_option_is_checked_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others may be required, which the artifact has."""

    class Options(TargetOptions):
        device: str
        threads: Annotated[int, Field(ge=1)] | None = None

    write(tmp_path)
    opened = Artifact.open(tmp_path)
    monkeypatch.setattr("moec.compiler.artifact.options_class", lambda target: Options)
    assert opened.with_threads(2).overrides == {"threads": 2}
    with pytest.raises(RunError, match=r"--threads 0: .*; give another --threads"):
        opened.with_threads(0)
