"""A session over a real `.pte`: values, chunks, traces, and every fault of a caller."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moec.compiler.errors import ArtifactError, RunError
from moec.targets.xnnpack.session import CpuSession
from tests.runtime import runtime_model as m

# The artifact and its eager twin run the same operators on fp32, the linears through other GEMMs (sums of at most 192
# products), logits of order 10: 1e-4 is ten units in the last place of the largest sum. Over an INT8 cache the twin
# rounds queries and weights of attention as the kernels do, to 32512 steps; one that another order of sums moves to the
# next step moves a logit of 17, a sum of such weights, by at most 17 / 32512 = 5e-4 (1.5e-4 was seen).
ATOL, ATOL_CODES = 1e-4, 5e-4


@dataclass
class Case:
    path: Path
    eager: m.OneLayer

    @property
    def atol(self) -> float:
        return ATOL_CODES if self.eager.int8_cache else ATOL

    def expected(self, ids: list[int]) -> np.ndarray:
        """float32 [T, V] of one call of the eager model."""
        with torch.no_grad():
            return self.eager(torch.tensor([ids]), torch.zeros(1, dtype=torch.int64))[0].numpy()


@pytest.fixture(scope="module", params=["f32", "int8", "window"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    path = tmp_path_factory.mktemp("runtime") / "model.pte"
    return Case(
        path, m.write_pte(path, int8_cache=request.param == "int8", window=20 if request.param == "window" else 0)
    )


@pytest.fixture
def session(case: Case) -> Iterator[CpuSession]:
    with CpuSession(case.path, threads=2) as opened:
        yield opened


def _ids(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, m.V, count).tolist()


def test_what_the_program_says_of_itself(session: CpuSession) -> None:
    found = session.vocab_size, session.context, session.max_tokens, session.bos_id, session.eos_ids, session.threads
    assert found == (m.V, m.S, m.MAX_TOKENS, 1, m.EOS_IDS, 2)


def test_prefill_in_chunks_is_the_eager_model(case: Case, session: CpuSession) -> None:
    ids = _ids(75)  # five chunks, the last one short
    logits = session.prefill(ids, "all")
    assert logits.shape == (75, m.V)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, case.expected(ids), atol=case.atol, rtol=0)
    assert session.position == 75


def test_last_logits_then_all_then_steps_share_one_cache(case: Case, session: CpuSession) -> None:
    ids = _ids(60)
    expected = case.expected(ids)
    last = session.prefill(ids[:33])
    assert last.shape == (1, m.V)
    np.testing.assert_allclose(last[0], expected[32], atol=case.atol, rtol=0)
    np.testing.assert_allclose(session.prefill(ids[33:40], "all"), expected[33:40], atol=case.atol, rtol=0)
    for i in range(40, 60):
        step = session.decode(ids[i])
        assert step.shape == (m.V,)
        np.testing.assert_allclose(step, expected[i], atol=case.atol, rtol=0)


def test_reset_forgets(case: Case, session: CpuSession) -> None:
    first = session.prefill(_ids(30))
    session.reset()
    session.prefill(_ids(200, seed=5))
    session.reset()
    assert session.position == 0
    np.testing.assert_array_equal(session.prefill(_ids(30)), first)


def test_threads_do_not_change_a_bit(case: Case) -> None:
    results = []
    for threads in (1, 2, 3):
        with CpuSession(case.path, threads=threads) as session:
            results.append(np.concatenate([session.prefill(_ids(40), "all"), session.decode(5)[None]]))
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def test_two_sessions_have_their_own_caches(case: Case, session: CpuSession) -> None:
    ids = _ids(20)
    expected = session.prefill(ids, "all")
    session.reset()
    with CpuSession(case.path, threads=2) as other:
        for i, token in enumerate(ids):
            np.testing.assert_allclose(session.decode(token), expected[i], atol=ATOL, rtol=0)
            other.decode((token + 1) % m.V)


BESIDE_XNNPACK = """
import sys
from pathlib import Path
import numpy as np
from moec.targets.xnnpack.session import CpuSession
plain, delegated = map(Path, sys.argv[1:])
ids = [3, 1, 4, 1, 5, 9, 2, 6]

def logits(session):
    session.reset()
    return session.prefill(ids, "all")

with CpuSession(delegated, threads=2) as first:
    assert first.threads == 2
    wanted = logits(first)
    for threads in (1, 3, 2):  # each asked ExecuTorch for another pool, whose old threads the first one waits for
        with CpuSession(plain, threads=threads) as other, CpuSession(delegated, threads=threads) as third:
            assert (other.threads, third.threads) == (2, 2)
            for session in (first, third, other, first):
                assert np.isfinite(logits(session)).all()
        assert np.array_equal(logits(first), wanted)
with CpuSession(plain, threads=1) as other:
    assert other.threads == 1
    with CpuSession(delegated, threads=3) as session:
        assert session.threads == 3
        assert np.array_equal(logits(session), wanted)
        assert np.isfinite(logits(other)).all()
"""


def test_sessions_beside_one_of_xnnpack(tmp_path: Path) -> None:
    """XNNPACK keeps a pointer to the thread pool of when it loaded a program. In a process of its own: it may hang."""
    for name, delegate in (("plain.pte", False), ("delegated.pte", True)):
        m.write_pte(tmp_path / name, delegate=delegate)
    command = [sys.executable, "-c", BESIDE_XNNPACK, str(tmp_path / "plain.pte"), str(tmp_path / "delegated.pte")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_sessions_in_two_threads(case: Case) -> None:
    """They share the kernels' threads; each must compute what it computes alone."""
    prompts = [_ids(60, seed) for seed in range(4)]
    with CpuSession(case.path, threads=2) as session:
        expected = []
        for ids in prompts:
            session.reset()
            expected.append(session.prefill(ids, "all"))

    def run(ids: list[int]) -> np.ndarray:
        with CpuSession(case.path, threads=2) as own:
            for _ in range(10):
                own.reset()
                logits = own.prefill(ids, "all")
            return logits

    with ThreadPoolExecutor(4) as pool:
        for found, alone in zip(pool.map(run, prompts), expected, strict=True):
            np.testing.assert_array_equal(found, alone)


def test_traces_are_one_per_layer_and_call(case: Case, session: CpuSession) -> None:
    session.prefill(_ids(3))
    assert session.take_traces() == []
    session.trace(True)
    session.prefill(_ids(40))  # three chunks
    session.decode(1)
    whole, step = session.take_traces()
    assert session.take_traces() == []
    assert (whole.layer, step.layer) == (0, 0)
    assert whole.x_TD.shape == whole.y_TD.shape == (40, m.D)
    assert whole.indices_TK.shape == whole.weights_TK.shape == (40, m.TOP_K)
    assert step.x_TD.shape == (1, m.D)
    with torch.no_grad():  # the router's definition: softmax over all experts, the best two, not normalised
        scores = torch.softmax(torch.from_numpy(whole.x_TD) @ case.eager.router.T, -1)
    best = scores.topk(m.TOP_K)
    np.testing.assert_array_equal(whole.indices_TK, best.indices.numpy())
    np.testing.assert_allclose(whole.weights_TK, best.values.numpy(), rtol=1e-5)  # a softmax of eight fp32 values
    session.trace(False)
    session.decode(1)
    assert session.take_traces() == []


def test_a_session_that_is_collected_while_another_is_traced(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The callback runs under the lock of their model, which closing takes."""
    recorded, closed = CpuSession._on_moe, []

    def collecting(self: CpuSession, *arguments: Any) -> None:
        gc.collect()
        recorded(self, *arguments)

    monkeypatch.setattr(CpuSession, "_on_moe", collecting)
    session = CpuSession(case.path, threads=1)
    session.trace(True)
    handle = session.fork()
    weakref.finalize(handle, closed.append, True)
    handle.itself = handle  # type: ignore[attr-defined]  # so that only the collector finds it
    del handle

    def run() -> None:
        session.prefill(_ids(3))

    call = threading.Thread(target=run, daemon=True)
    gc.disable()
    try:
        call.start()
        call.join(60)
        assert not call.is_alive()
    finally:
        gc.enable()
    assert closed == [True]
    assert len(session.take_traces()) == 1
    session.close()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "the prompt is empty"),
        ([3, -1], "token id -1 is not in the vocabulary"),
        ([m.V], f"token id {m.V} is not in the vocabulary"),
        ([2**40], f"token id {2**40} is not in the vocabulary"),
        ([1.5], "must be a list of integers"),
        ([[1, 2]], "must be a list of integers"),
        ([[1], [1, 2]], "must be a list of integers"),
        (["a"], "must be a list of integers"),
        ([1] * (m.S + 1), f"{m.S + 1} tokens do not fit: the context holds {m.S}"),
    ],
)
def test_a_prompt_that_cannot_be_served(session: CpuSession, ids: list, message: str) -> None:
    with pytest.raises(RunError, match=rf"^\S*\.pte: .*{message}") as raised:
        session.prefill(ids)
    assert raised.value.remedy
    assert session.position == 0


def test_a_full_context(session: CpuSession) -> None:
    session.prefill(_ids(m.S - 1))
    session.decode(1)
    with pytest.raises(RunError, match=f"1 tokens do not fit: the context holds {m.S}, {m.S} of which are used"):
        session.decode(1)
    session.reset()
    session.decode(1)


def test_requests_that_make_no_sense(case: Case, session: CpuSession) -> None:
    with pytest.raises(RunError, match='logits="every"'):
        session.prefill([1], "every")
    for threads in (0, -1, 1000):
        with pytest.raises(RunError, match="threads"):
            CpuSession(case.path, threads=threads)
    session.close()
    session.close()
    with pytest.raises(RunError, match="closed"):
        session.decode(1)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not exist"):
        CpuSession(tmp_path / "none.pte")
    with pytest.raises(ArtifactError, match="does not exist"):
        CpuSession(tmp_path)
