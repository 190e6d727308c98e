"""What the tests of faults under a memory budget run in a process of its own, whose reads can be made to fail.

`python -m tests.targets.memory_faults SCENARIO FILE ARGUMENTS`: prints what happened as JSON. The process was started
with faulty_reads.c preloaded.
"""

from __future__ import annotations

import ctypes
import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from moec.compiler.errors import RunError, UserError
from moec.targets.xnnpack.session import CpuSession

FAILS, FAILS_ON, LATE, SHORT, CUT = range(1, 6)  # a read that was made ahead may fail without harm
PROMPT = np.random.default_rng(7).integers(0, 300, 90).tolist()
TOKENS = np.random.default_rng(8).integers(0, 300, 40).tolist()
MORE_MB = 3  # above the least


def faults(kind: int = 0, after: int = 0, value: int = 0) -> None:
    ctypes.CDLL(None).faulty_reads(kind, ctypes.c_long(after), ctypes.c_long(value))


def reads() -> int:
    """Reads since the last call of `faults` with a kind."""
    seen = ctypes.CDLL(None).faulty_reads_seen
    seen.restype = ctypes.c_long
    return int(seen())


def answers(session: CpuSession) -> np.ndarray:
    """Logits [41, V] of a prompt, then of tokens alone."""
    session.reset()
    return np.concatenate([session.prefill(PROMPT), *(session.prefill([token]) for token in TOKENS)])


def least_mb(model: Path) -> int:
    try:
        CpuSession(model, threads=2, memory_mb=1)
    except RunError as error:
        return int(str(error).split("less than ")[1].split(" MB")[0])
    raise AssertionError("a budget of 1 MB was taken")


def streamed(model: Path) -> CpuSession:
    return CpuSession(model, threads=2, memory_mb=least_mb(model) + MORE_MB)


def fault_of(work: Callable[[], Any]) -> str:
    """The error of `work`; empty if it had none."""
    try:
        work()
    except UserError as error:
        return str(error)
    return ""


def recovers(model: Path, kind: str, while_decoding: str) -> dict[str, Any]:
    """A read fails in a prompt or while decoding: that call is an error, and the same again is as in memory."""
    with CpuSession(model, threads=2) as session:
        wanted = answers(session)
    with streamed(model) as session:
        if int(while_decoding):
            session.prefill(PROMPT)
            expected = wanted[1:]
            parts: list[list[int]] = [[token] for token in TOKENS]
        else:
            expected = wanted
            parts = [PROMPT, *([token] for token in TOKENS)]
        found, said = [], []
        for number, ids in enumerate(parts):
            if number in (0, 5):
                faults(int(kind), 2)
            held = session.position
            fault = fault_of(lambda ids=ids: found.append(session.prefill(ids)))  # type: ignore[misc]
            faults()
            if fault:
                said.append(fault)
                session.rewind(held)
                found.append(session.prefill(ids))
        return {"faults": said, "same": bool(np.array_equal(np.concatenate(found), expected))}


def short(model: Path) -> dict[str, Any]:
    """Every read gives 4096 bytes at most."""
    with CpuSession(model, threads=2) as session:
        wanted = answers(session)
    with streamed(model) as session:
        faults(SHORT, 0, 4096)
        return {"same": bool(np.array_equal(answers(session), wanted)), "reads": reads()}


def cut(model: Path, after: str, bytes_left: str) -> dict[str, Any]:
    """The file is cut while a call reads: that call and every later one is an error."""
    with streamed(model) as session:
        session.prefill(PROMPT[:3])
        faults(CUT, int(after), int(bytes_left))
        first = fault_of(lambda: answers(session))
        faults()
        return {"faults": [first, fault_of(lambda: answers(session))]}


def threads(model: Path, kind: str) -> dict[str, Any]:
    """Two sessions in two threads, one model, one budget; with a `kind`, reads fail now and then."""
    with CpuSession(model, threads=2) as session:
        wanted = answers(session)
    with streamed(model) as first, first.fork() as second:
        wrong: list[str] = []
        errors: list[str] = []

        def work(session: CpuSession) -> None:
            for turn in range(3):
                if int(kind) and session is first:
                    faults(int(kind), 5 + turn)
                session.reset()
                for number, ids in enumerate([PROMPT, *([token] for token in TOKENS)]):
                    held = session.position
                    row = None
                    while row is None:
                        try:
                            row = session.prefill(ids)
                        except RunError as error:
                            errors.append(str(error))
                            faults()
                            session.rewind(held)
                    if not np.array_equal(row[0], wanted[number]):
                        wrong.append(f"turn {turn}, call {number}")

        workers = [threading.Thread(target=work, args=(session,)) for session in (first, second)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        stats = first.expert_stats()
        assert stats is not None
        return {"wrong": wrong, "faults": errors, "misses": stats.misses}


def cancelled(model: Path) -> dict[str, Any]:
    """Generation is cancelled by another thread while an expert is read; then the same is generated."""
    from moec.assistant.generate import Generation
    from moec.assistant.sampling import Sampling

    def generation(session: CpuSession) -> Generation:
        return Generation(session, PROMPT, 10, Sampling(temperature=0.0))

    with CpuSession(model, threads=2) as session:
        wanted = list(generation(session))
    found = []
    with streamed(model) as session:
        for after in (1, 40):  # in the prompt, and while decoding perhaps
            session.reset()
            faults(LATE, after, 20_000)
            begun = generation(session)
            saying = threading.Thread(target=lambda begun=begun: list(begun))  # type: ignore[misc]
            saying.start()
            while reads() <= after:
                time.sleep(0.001)
            begun.cancelled.set()
            saying.join()
            faults()
            stopped = begun.stats.stopped
            session.reset()
            found.append((stopped, list(generation(session)) == wanted))
    return {"found": found}


def application(folder: Path) -> dict[str, Any]:
    """The C interface of applications: a failed read, a cancelled generation, a file that is cut."""
    from tests.runtime import app

    def opened(bytes_: int) -> int:
        given = app.OpenOptions(ctypes.sizeof(app.OpenOptions), 1, bytes_)
        return app.call("open", str(folder).encode(), ctypes.byref(given))

    def said(artifact: int, seen: Callable[[str], bool] = lambda _: True) -> tuple[str, str]:
        session = app.call("session", artifact)
        prompt = app.tokenize(artifact, "Once upon a time")
        made = app.begin(session, prompt, app.options(artifact, temperature=0.0, max_new_tokens=12))
        text = "".join(app.pieces(made, seen))
        stopped = app.STOPPED[app.stats(made).stopped]
        for id_ in (made, session):
            app.call("close", id_)
        return text, stopped

    def app_fault(work: Callable[[], Any]) -> str:
        try:
            work()
        except app.AppError as error:
            return str(error)
        return ""

    artifact = opened(0)
    wanted = said(artifact)
    app.call("close", artifact)
    least = app_fault(lambda: opened(1_000_000))
    budget = (int(least.split("less than ")[1].split(" MB")[0]) + 8) * 1_000_000  # the heap grows meanwhile
    artifact = opened(budget)
    faults(FAILS_ON, 2)
    failed = app_fault(lambda: said(artifact))
    faults()
    again = said(artifact)
    app.call("close", artifact)

    artifact = opened(budget)
    session = app.call("session", artifact)
    prompt = app.tokenize(artifact, "Once upon a time")
    made = app.begin(session, prompt, app.options(artifact, temperature=0.0, max_new_tokens=12))
    faults(LATE, 0, 100_000)
    saying = threading.Thread(target=lambda: app.pieces(made))
    saying.start()
    while reads() < 1:
        time.sleep(0.001)
    app.call("cancel", made)
    saying.join()
    faults()
    stopped = app.STOPPED[app.stats(made).stopped]
    after = said(artifact)
    app.call("close", artifact)

    artifact = opened(budget)
    faults(CUT, 1, 4096)
    cut_off = app_fault(lambda: said(artifact))
    return {
        "least": least,
        "failed": failed,
        "again": again == wanted,
        "stopped": stopped,
        "after": after == wanted,
        "cut": cut_off,
    }


if __name__ == "__main__":
    name, file, *arguments = sys.argv[1:]
    print(json.dumps(globals()[name](Path(file), *arguments)))
