"""Calls that fail while they compute, and calls of what did not open: never other numbers afterwards, never a crash."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moec.compiler.errors import RunError
from moec.targets.xnnpack.session import CpuSession
from tests.runtime import runtime_model as m
from tests.runtime.carried_model import carried_program

V, CONTEXT = 32, 64


@pytest.fixture(scope="module")
def carried(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program whose state cannot go back, and whose ids from V / 2 on fail behind it."""
    path = tmp_path_factory.mktemp("carried") / "model.pte"
    path.write_bytes(carried_program(V, CONTEXT, known=V // 2))
    return path


def test_a_state_that_went_on_in_a_failed_call_is_not_gone_on_from(carried: Path) -> None:
    with CpuSession(carried, threads=1) as fresh:
        fresh.prefill([3, 1, 4])
        wanted = fresh.decode(5)
    with CpuSession(carried, threads=1) as session:
        assert not session.rewinds
        session.prefill([3, 1, 4])
        with pytest.raises(RunError, match="forward"):
            session.decode(V - 1)
        assert (session.position, session.tokens) == (0, [])
        session.prefill([3, 1, 4])
        np.testing.assert_array_equal(session.decode(5), wanted)
        with pytest.raises(RunError, match="not in the vocabulary"):  # before anything is computed
            session.decode(V)
        assert session.position == 4


NOT_OPEN = """
import ctypes, sys
from moec.targets.xnnpack.session import _runtime
r, path = _runtime(), sys.argv[1].encode()
model = r.moec_model_open(path, 300)
assert b"at most 256" in r.moec_model_error(model)
session = r.moec_session_open(model)
assert b"the model is not open" in r.moec_session_error(session)
ids, row = (ctypes.c_int64 * 1)(1), (ctypes.c_float * 4096)()
calls = {
    "forward": lambda: r.moec_session_forward(session, ids, 1, 0, 0, row, 4096),
    "rewind": lambda: r.moec_session_rewind(session, 0),
    "save": lambda: r.moec_session_save(session, path + b".session", b"x"),
    "restore": lambda: r.moec_session_restore(session, path + b".session", b"x"),
}
for name, call in calls.items():
    assert call() == -1, name
    assert r.moec_session_error(session) == b"the session is not open", name
fork = r.moec_session_fork(session)
assert b"not open" in r.moec_session_error(fork)
for one in (fork, session):
    r.moec_session_close(one)
r.moec_model_close(model)
"""


def test_a_session_that_did_not_open_is_an_error_and_no_crash(tmp_path: Path) -> None:
    m.write_pte(tmp_path / "model.pte")
    command = [sys.executable, "-c", NOT_OPEN, str(tmp_path / "model.pte")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
