"""What counts towards a budget of memory: a token's working memory, the logits of all tokens, the caches of
`moec_model_forward`, weights that XNNPACK packs late; and what no budget can be set for."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np

from moec.checkpoints import synthesize
from moec.compiler import build
from moec.targets.xnnpack.session import CpuSession
from tests.targets.budgets import changed, opened_within
from tests.targets.test_memory_budget import limited

LONG_ROWS = 64_000  # tokens of a vocabulary: logits of 256 kB each


def compiled(spec: object, folder: Path) -> Path:
    return build.compile(spec, checkpoint=synthesize(spec, folder / "c", qat=True), out=folder / "a").path("model.pte")  # type: ignore[arg-type]


def alone(code: str, *arguments: object) -> str:
    """What a process of its own prints: nothing else takes its memory."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_a_token_of_wide_layers_has_room_within_the_least_budget(tmp_path: Path) -> None:
    """Each of 16 threads keeps rows of 12 experts, 6 MB in all; one thread computes them as it does many tokens."""
    moe = {"experts": 16, "top_k": 12, "expert_width": 32, "shared_width": 32}
    model = compiled(changed({"max_tokens": 16}, layers=1, d_model=7168, moe=moe), tmp_path)
    for threads in (1, 16):
        with opened_within(model, 1, threads=threads) as session:
            assert np.isfinite(session.prefill([7])).all()


def test_logits_of_all_tokens_come_on_top_where_there_is_no_room(tmp_path: Path) -> None:
    model = compiled(changed({"max_tokens": 512}, layers=2, context=512, vocab_size=LONG_ROWS), tmp_path)
    with opened_within(model, 20, threads=1) as session, CpuSession(model, threads=1) as whole:
        ids = np.random.default_rng(1).integers(0, LONG_ROWS, session.max_tokens).tolist()
        assert len(ids) * LONG_ROWS * 4 > 20e6
        np.testing.assert_array_equal(session.prefill(ids, logits="all"), whole.prefill(ids, logits="all"))


LATE = """
import sys
from moec.targets.xnnpack.session import CpuSession
with CpuSession(sys.argv[1], threads=1, memory_mb=int(sys.argv[2])) as session:
    before = session.expert_stats()
    session.prefill([1], logits="all")
    after = session.expert_stats()
    print((before.slots - after.slots) * before.slot_bytes)
"""


def test_weights_that_xnnpack_packs_for_all_logits_take_slots(tmp_path: Path) -> None:
    """The method that gives them is loaded at its first call, and packs the head again: 64,000 rows of 128 bytes."""
    options = {"max_tokens": 16, "kernels": {"head": "xnnpack"}}
    model = compiled(changed(options, layers=2, vocab_size=LONG_ROWS), tmp_path)
    found = re.search(r"less than (\d+) MB", limited(model, 1, 1)[2])
    assert found
    assert int(alone(LATE, model, int(found[1]) + 12)) > 6e6


OWN = """
import ctypes, sys
from moec.targets.xnnpack.session import _ExpertStats, _runtime
r = _runtime()
model = r.moec_model_open(sys.argv[1].encode(), 1)
r.moec_model_limit_memory(model, int(sys.argv[2]) * 10**6, 0, 1)
sessions = [r.moec_session_open(model) for _ in range(int(sys.argv[3]))]
assert not any(r.moec_session_error(s) for s in sessions)
one = (ctypes.c_int64 * 1)(1)
for _ in range(2):
    assert r.moec_model_forward(model, one, 1, 0, 0, None, 0) == 0, r.moec_model_error(model)
stats = _ExpertStats()
r.moec_session_expert_stats(sessions[0], ctypes.byref(stats))
print(stats.slots, stats.slot_bytes)
"""


def test_the_caches_of_calls_without_a_session_count(tmp_path: Path) -> None:
    model = compiled(changed({"max_tokens": 16}, layers=2, context=2048), tmp_path)
    found = re.search(r"less than (\d+) MB", limited(model, 1, 1)[2])
    assert found
    slots, slot_bytes = map(int, alone(OWN, model, int(found[1]) + 12, 1).split())
    more, _ = map(int, alone(OWN, model, int(found[1]) + 12, 2).split())
    caches = (slots - more) * slot_bytes  # of one more
    assert caches > 0
    status, without, _ = limited(model, (int(found[1]) + 12) * 10**6, 1)  # without such a call
    assert status == 0
    assert abs((without - slots) * slot_bytes - caches) <= 2 * slot_bytes + 2**20
