"""Damaged programs: an error of one line and exit status 2, never a crash. The runner is a process of its own."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest
from executorch.exir._serialize._program import deserialize_pte_binary, serialize_pte_binary

from moec.compiler.errors import ArtifactError
from moec.runtime import native
from moec.targets.xnnpack.session import CpuSession
from tests.runtime import runtime_model as m


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("runtime") / "model.pte"
    m.write_pte(path, int8_cache=True)
    return path.read_bytes()


def _run(path: Path) -> subprocess.CompletedProcess[str]:
    command = [str(native.runner_binary()), str(path), "--prompt-length", "20", "--decode", "2", "--threads", "2"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def _refused(path: Path, data: bytes) -> str:
    """The reason, in the runner and in a session alike."""
    path.write_bytes(data)
    done = _run(path)
    assert done.returncode == 2, f"status {done.returncode}: {done.stdout}{done.stderr}"
    assert done.stderr.startswith(f"error: {path}: ")
    assert done.stderr.count("\n") == 1
    with pytest.raises(ArtifactError) as raised:
        CpuSession(path)
    assert str(path) in str(raised.value)
    return done.stderr


def test_the_file_itself_runs(tmp_path: Path, good: bytes) -> None:
    (tmp_path / "model.pte").write_bytes(good)
    assert _run(tmp_path / "model.pte").returncode == 0


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.04, 0.5, 0.99, 0.99999])
def test_truncated(tmp_path: Path, good: bytes, share: float) -> None:
    reason = _refused(tmp_path / "model.pte", good[: int(len(good) * share)])
    assert "truncated" in reason or "not an ExecuTorch program" in reason


@pytest.mark.parametrize("data", [b"x", b"\0" * 5000, b"PK\3\4" + b"a" * 500, b"12345678eh00" + b"\xff" * 500])
def test_other_files(tmp_path: Path, data: bytes) -> None:
    assert "not an ExecuTorch program" in _refused(tmp_path / "model.pte", data)


def test_header_that_announces_the_impossible(tmp_path: Path, good: bytes) -> None:
    for offset in (16, 24, 32):  # sizes and offsets of the extended header, 8 bytes each
        data = bytearray(good)
        data[offset : offset + 8] = b"\xff" * 8
        assert "truncated" in _refused(tmp_path / "model.pte", bytes(data))


def test_a_structure_that_points_nowhere(tmp_path: Path, good: bytes) -> None:
    data = bytearray(good)
    data[0:4] = (len(good) // 2).to_bytes(4, "little")  # the root of the flatbuffer
    assert "damaged" in _refused(tmp_path / "model.pte", bytes(data))


INSTRUCTIONS = {
    "operator": lambda call, plan: setattr(call, "op_index", 8199),
    "operator just outside": lambda call, plan: setattr(call, "op_index", len(plan.operators)),
    "negative operator": lambda call, plan: setattr(call, "op_index", -1),
    "value": lambda call, plan: call.args.__setitem__(0, len(plan.values)),
    "negative value": lambda call, plan: call.args.__setitem__(-1, -(2**31)),
}


@pytest.mark.parametrize("what", INSTRUCTIONS)
@pytest.mark.parametrize("where", [0, -1])
def test_instructions_that_name_what_is_not_there(tmp_path: Path, good: bytes, what: str, where: int) -> None:
    """The flatbuffer is whole, so that ExecuTorch's verifier lets it pass; it would follow the index."""
    file = deserialize_pte_binary(good)
    plan = next(p for p in file.program.execution_plan if p.name == "forward")
    INSTRUCTIONS[what](plan.chains[0].instructions[where].instr_args, plan)
    reason = _refused(tmp_path / "model.pte", bytes(serialize_pte_binary(file)))
    assert "damaged: an instruction names " + what.split()[-1 if "negative" in what else 0] in reason


@pytest.mark.parametrize("seed", range(4))
def test_flipped_bits_of_the_program(tmp_path: Path, good: bytes, seed: int) -> None:
    """Flips may be harmless or found; what may not happen is a signal or silence."""
    rng = random.Random(seed)
    program = int.from_bytes(good[16:24], "little")
    for _ in range(15):
        data = bytearray(good)
        for _ in range(rng.choice([1, 1, 4])):
            data[rng.randrange(program)] ^= 1 << rng.randrange(8)
        (tmp_path / "model.pte").write_bytes(data)
        done = _run(tmp_path / "model.pte")
        assert done.returncode in (0, 2), f"status {done.returncode}: {done.stderr}"
        assert done.returncode == 0 or done.stderr.startswith("error: ")
