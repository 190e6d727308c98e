"""Files from outside: devices, pipes and endless ones are refused, wherever a reader meets them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moec.analysis.plan.fit import read_runs
from moec.analysis.plan.scaling_law import load_law
from moec.analysis.verify.spec import diff_paths
from moec.checkpoints.config_json import read_json
from moec.checkpoints.safetensors_file import read_header
from moec.compiler.artifact import MANIFEST, Artifact
from moec.compiler.errors import ArtifactError, SpecError, UserError
from moec.compiler.files import read_bytes, read_text
from moec.compiler.spec import as_spec
from moec.compiler.units import printable
from moec.sources.transformers_model import read_config
from moec.training.data.shards import Corpus
from moec.training.report import read_run


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """A reader that waits for a pipe or reads on and on fails, and does not hang the suite."""

    def late(*_: object) -> None:
        raise AssertionError("it does not end")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def pipe(file: Path) -> None:
    os.mkfifo(file)


def device(file: Path) -> None:
    file.symlink_to("/dev/zero")


def huge(file: Path) -> None:
    with file.open("wb") as stream:
        stream.truncate(1 << 40)  # sparse: it takes no room


def folder(file: Path) -> None:
    file.mkdir()


def links_to_itself(file: Path) -> None:
    file.symlink_to(file.name)


KINDS = [pipe, device, huge, folder, links_to_itself]


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "config.json": ("config.json", lambda place: read_json(place / "config.json")),
    "transformers": ("config.json", read_config),
    "weights": ("model.safetensors", lambda place: read_header(place / "model.safetensors")),
    "manifest": (MANIFEST, Artifact.open),
    "corpus": ("corpus.json", Corpus.open),
    "training runs": ("runs.csv", lambda place: read_runs(place / "runs.csv")),
    "a law": ("law.json", lambda place: load_law(place / "law.json")),
    "a run": ("run.json", read_run),
    "graph dumps": ("a.txt", lambda place: diff_paths(place / "a.txt", place / "a.txt")),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reader", READERS)
def test_a_reader_refuses_what_is_no_small_regular_file(
    reader: str, kind: Callable[[Path], None], tmp_path: Path
) -> None:
    if reader == "transformers":
        pytest.importorskip("transformers", reason="needs the transformers extra: pip install 'moec[transformers]'")
    name, read = READERS[reader]
    kind(tmp_path / name)
    with pytest.raises(UserError) as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_file_up_to_its_limit_is_read(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(b"x" * 10)
    assert read_bytes(file, limit=10) == b"x" * 10
    with pytest.raises(UserError, match="is 10 bytes long; at most 9 are read"):
        read_bytes(file, limit=9)
    file.write_bytes(b"\xff")
    with pytest.raises(ArtifactError, match="not UTF-8"):
        read_text(file, limit=9, fault=ArtifactError)
    with pytest.raises(UserError, match="null byte"):
        read_bytes(Path("a\0b"), limit=1)


def test_a_mapping_that_contains_itself_is_no_spec() -> None:
    mapping: dict[str, object] = {"name": "x"}
    mapping["model"] = mapping
    with pytest.raises(SpecError, match="contains itself"):
        as_spec(mapping)
    deep: list[object] = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(SpecError, match="nested more than"):
        as_spec({"name": "x", "model": deep})


def test_a_terminal_gets_no_commands() -> None:
    assert printable("a\x1b[2J\x07b\r\x9bc\n\td \u00e9") == "a\ufffd[2J\ufffdb\ufffd\ufffdc\n\td \u00e9"


def test_a_name_is_read_in_the_order_it_has() -> None:
    """U+202E and its like turn the direction of writing: `exe.txt` would be shown for `txt.exe`."""
    turns = [*"\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"]
    assert printable("".join(turns)) == "\ufffd" * len(turns)
    assert printable("\u05d0\u0627 \u200d") == "\u05d0\u0627 \u200d"  # writing itself, and what joins emoji
