"""Calls that fail while they compute, and calls of what did not open: never other numbers afterwards, never a crash.

T tokens, C channels, K taps, V vocabulary.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
from executorch.exir.passes import MemoryPlanningPass
from torch import Tensor, nn

from moec.compiler.errors import RunError
from moec.compiler.program import ModelInfo
from moec.targets.constant_methods import constant_methods
from moec.targets.xnnpack import cpu_ops  # noqa: F401  (registers moec::*)
from moec.targets.xnnpack.session import CpuSession
from tests.runtime import runtime_model as m

V, C, K, CONTEXT, MAX_TOKENS = 32, 16, 4, 64, 8


class Carried(nn.Module):
    """A convolution that carries its last inputs on; then a table that half the ids fail at."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in (("first", (V, C)), ("taps", (K, C)), ("second", (V // 2, C)), ("head", (C, V))):
            self.register_parameter(name, nn.Parameter(torch.randn(*shape, generator=generator)))
        self.register_buffer("state", torch.zeros(1, K - 1, C))

    def forward(self, tokens: Tensor, start_pos: Tensor) -> Tensor:
        x = nn.functional.embedding(tokens, self.first)
        y = torch.ops.moec.short_conv(x, self.taps, None, self.state, start_pos, False)
        y = y + nn.functional.embedding(tokens, self.second)
        return (y @ self.head)[:, -1]


@pytest.fixture(scope="module")
def carried(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program whose state cannot go back, and whose ids from V / 2 on fail behind it."""
    tokens = ({1: torch.export.Dim("T", min=1, max=MAX_TOKENS)}, {})
    example = (torch.zeros(1, 5, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = torch.export.export(Carried(), example, dynamic_shapes=tokens, strict=False)
            edge = to_edge_transform_and_lower(
                {"forward": exported.run_decompositions({})},
                compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
                constant_methods={
                    **constant_methods(ModelInfo("carried", V, CONTEXT, MAX_TOKENS, 1, (2,)), []),
                    "get_states_appended": 0,
                },
            )
            planning = MemoryPlanningPass(share_mutable_buffers=True)
            config = ExecutorchBackendConfig(memory_planning_pass=planning, emit_mutable_buffer_names=True)
            program = bytes(edge.to_executorch(config).buffer)
    finally:
        logging.disable(logging.NOTSET)
    path = tmp_path_factory.mktemp("carried") / "model.pte"
    path.write_bytes(program)
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
