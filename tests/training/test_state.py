"""Files that stay on disk: changed states and shards are found, and a state from an attacker runs no code."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

from moec.compiler.errors import UserError
from moec.training import state
from moec.training.data.shards import Corpus, DataError
from moec.training.run import RunResult, train
from moec.training.stage import Trainer
from tests.training.small import PRETRAIN, corpus_of, spec_of


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return corpus_of(tmp_path_factory.mktemp("data") / "corpus")


@pytest.fixture(scope="module")
def stopped_run(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped behind its fourth step, with the state of that."""
    out, step = tmp_path_factory.mktemp("stopped") / "run", Trainer.step

    def stopped(trainer: Trainer) -> dict[str, Any]:
        if trainer.done == 6:
            raise RuntimeError("stopped")
        return step(trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", stopped)
        with pytest.raises(RuntimeError, match="stopped"):
            train(spec_of(PRETRAIN), data=corpus, out=out, threads=1)
    return out


def resumed(out: Path, corpus: Corpus) -> RunResult:
    return train(spec_of(PRETRAIN), data=corpus, out=out, resume=True, threads=1)


@pytest.mark.parametrize("name", [".metadata", ".distcp"])
@pytest.mark.parametrize("seed", range(4))
def test_one_flipped_bit_of_a_state_is_found(
    name: str, seed: int, stopped_run: Path, corpus: Corpus, tmp_path: Path
) -> None:
    """It resumed to another model with exit status 0."""
    out = tmp_path / "run"
    shutil.copytree(stopped_run, out)
    victim = next(p for p in sorted(out.rglob("*")) if p.name.endswith(name))
    raw = bytearray(victim.read_bytes())
    place = random.Random(seed).randrange(len(raw))
    raw[place] ^= 1 << seed
    victim.write_bytes(raw)
    with pytest.raises(UserError, match="damaged: its files are not those that were written"):
        resumed(out, corpus)


@pytest.mark.parametrize("extra", ["added", "missing"])
def test_a_state_of_other_files_is_refused(extra: str, stopped_run: Path, corpus: Corpus, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(stopped_run, out)
    file = next(out.rglob("*.distcp"))
    if extra == "added":
        file.with_name("more.distcp").touch()
    else:
        file.unlink()
    with pytest.raises(UserError, match="start again in another --out"):
        resumed(out, corpus)


class _Planted:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_a_memo_of_gigabytes_is_refused() -> None:
    """Five bytes of a pickle say how long the table of what it remembers is: 2^32 - 1 entries are 64 GB."""
    for damage in (b"r\xff\xff\xff\xff", b"p4294967295\n"):
        with pytest.raises(ValueError, match="4294967295"):
            state._check_memo(b"\x80\x04]" + damage + b".")
    state._check_memo(pickle.dumps([["a", "b"], {"c": ("d",) * 300}], protocol=2))


@pytest.mark.parametrize("kind", ["code", "elsewhere"])
def test_a_run_folder_from_an_enemy_runs_no_code(kind: str, stopped_run: Path, corpus: Corpus, tmp_path: Path) -> None:
    """The metadata of a state is a pickle, and whoever made it made the digests, too."""
    out, mark = tmp_path / "run", tmp_path / "it-ran"
    shutil.copytree(stopped_run, out)
    file = next(out.rglob(".metadata"))
    if kind == "code":
        file.write_bytes(pickle.dumps(_Planted(mark)))
    else:
        found = pickle.loads(file.read_bytes())
        for info in found.storage_data.values():
            info.relative_path = "../../../secret"
        file.write_bytes(pickle.dumps(found))
    latest = out / "state" / "latest.json"
    raw = json.loads(latest.read_text())
    raw["digests"][".metadata"] = hashlib.sha256(file.read_bytes()).hexdigest()
    latest.write_text(json.dumps(raw))
    with pytest.raises(UserError, match=r"its metadata names|secret") as caught:
        resumed(out, corpus)
    assert "\n" not in str(caught.value)
    assert not mark.exists()


class _Attribute:
    """Pickled as an attribute of something: what Python 3.11 before 3.11.4 writes for a member of an Enum."""

    def __init__(self, of: Any, name: str) -> None:
        self.of, self.name = of, name

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.of, self.name)


def test_members_of_enums_are_read_as_older_pythons_write_them() -> None:
    member = next(iter(_MEM_FORMAT_ENCODING))
    data = pickle.dumps(_Attribute(_MEM_FORMAT_ENCODING, member.name))
    assert state._Unpickler(io.BytesIO(data)).load() is member
    for of, name in ((_MEM_FORMAT_ENCODING, "__members__"), (_MEM_FORMAT_ENCODING, "mro"), (Metadata, "__init__")):
        with pytest.raises(pickle.UnpicklingError, match="takes an attribute"):
            state._Unpickler(io.BytesIO(pickle.dumps(_Attribute(of, name)))).load()


def test_an_untouched_state_resumes(stopped_run: Path, corpus: Corpus, tmp_path: Path) -> None:
    shutil.copytree(stopped_run, tmp_path / "run")
    assert resumed(tmp_path / "run", corpus).stages[0].steps == 12


@pytest.mark.parametrize("damage", ["bit", "half"])
def test_a_damaged_shard_is_not_trained_on(damage: str, tmp_path: Path) -> None:
    damaged = corpus_of(tmp_path / "corpus")
    file = damaged.folder / "web" / "train.tokens"
    raw = bytearray(file.read_bytes())
    if damage == "bit":
        raw[len(raw) // 2 & ~1] ^= 1
    else:  # zeros where a disk lost what it had not written
        raw[len(raw) // 2 :] = bytes(len(raw) - len(raw) // 2)
    file.write_bytes(raw)
    with pytest.raises(DataError, match=r"train\.tokens: damaged: its contents"):
        train(spec_of(PRETRAIN), data=damaged.folder, out=tmp_path / "run", threads=1)
    assert not (tmp_path / "run" / "state").exists()


@pytest.mark.parametrize(
    ("key", "value", "fault"),
    [
        ("step", "four", "step: Input should be a valid integer"),
        ("step", -1, "step -1"),
        ("metrics_bytes", -5, "-5 bytes"),
        ("seconds", None, "seconds: Input should be a valid number"),
        ("random", "zz", "non-hexadecimal"),
        ("random", "00", "damaged"),
        ("folder", "../other", "folder '../other'"),
        ("finished", [{"name": "a"}], "finished.0.checkpoint: Field required"),
        ("unknown", 1, "unknown"),
    ],
)
def test_a_position_that_lies(
    key: str, value: Any, fault: str, stopped_run: Path, corpus: Corpus, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(stopped_run, out)
    file = out / "state" / "latest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(UserError, match=fault):
        resumed(out, corpus)
