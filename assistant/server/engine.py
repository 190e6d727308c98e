"""The queue in front of the sessions: requests are answered one after the other and can be cancelled at any time.

The queue is bounded, so that a client learns at once that the server is busy instead of waiting without end. Only the
worker thread uses the sessions; it sends its results to the event loop of each request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from moec.assistant.answer import Answer, Limits, Step
from moec.assistant.assistant import Assistant, Prompt
from moec.assistant.sampling import TokenScore, score
from moec.assistant.server.conversations import Conversations
from moec.assistant.structured import Format
from moec.compiler.errors import LostFileError, RunError
from moec.compiler.target import Session

log = logging.getLogger("moec.server")
_SCORED = 64  # tokens whose logits are held at once while a prompt is scored
_SCORED_BYTES = 1_000_000  # of them within a memory budget, which does not count them; one at least is held


class QueueFull(Exception):
    """The queue is full, or the server is shutting down."""


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of the tokens of a prompt, except the first, which has no context."""

    scores: Sequence[TokenScore]


@dataclass(frozen=True)
class Ended:
    """The end of a job. error: why it failed, else None. answer: None if the job ended before its answer began."""

    answer: Answer | None
    error: Exception | None = None


Event = Scores | Step | Ended


@dataclass(eq=False)
class Job:
    """One request. score_prompt: score the prompt too, with so many likeliest tokens at each position; None: do not."""

    prompt: Prompt
    limits: Limits
    format: Format | None = None
    score_prompt: int | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)
    asked: float = field(default_factory=time.monotonic)
    _loop: asyncio.AbstractEventLoop | None = None
    _events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)

    def tell(self, event: Event) -> None:
        """Send an event to the request; from any thread."""
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody listens
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def event(self) -> Event:
        """The next event; `Ended` is the last."""
        return await self._events.get()


class Engine:
    """Answers jobs. most_waiting: jobs besides the running one. conversations: how many keep their caches."""

    def __init__(self, assistant: Assistant, session: Session, *, most_waiting: int, conversations: int = 1) -> None:
        self.assistant, self.most_waiting, self.context = assistant, most_waiting, session.context
        self._conversations = Conversations(session, conversations)
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._changed = threading.Condition()
        self._stopping = False
        self._warned = False
        self._thread = threading.Thread(target=self._work, name="moec-engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return int(self._running is not None)

    @property
    def alive(self) -> bool:
        """Whether somebody answers."""
        return self._thread.is_alive()

    def submit(self, job: Job) -> None:
        """Queue a job; its events go to the event loop in which this is called. QueueFull."""
        job._loop = asyncio.get_running_loop()
        with self._changed:
            # the next job of an idle worker does not wait, also before the worker has taken it
            if self._stopping or len(self._waiting) >= self.most_waiting + (self._running is None):
                raise QueueFull
            self._waiting.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """End a job, whether it waits or runs."""
        job.cancelled.set()
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
                job.tell(Ended(None))

    def stop(self) -> None:
        """Cancel all jobs and end the thread."""
        with self._changed:
            self._stopping = True
            for job in [*self._waiting, *([self._running] if self._running else [])]:
                job.cancelled.set()
            self._changed.notify()
        self._thread.join(30)
        if not self._thread.is_alive():
            self._conversations.close()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._stopping:
                    self._changed.wait()
                if not self._waiting:
                    return
                job = self._running = self._waiting.popleft()
            try:
                ended = self._answer(job)
            finally:
                with self._changed:
                    self._running = None
            job.tell(ended)  # behind the above: a client that asks again at once finds the worker free

    def _answer(self, job: Job) -> Ended:
        if job.cancelled.is_set():
            return Ended(None)
        answer = None
        try:
            session = self._conversations.take(job.prompt.ids)
            answer = self.assistant.answer(session, job.prompt, job.limits, job.format, job.cancelled)
            if job.score_prompt is not None:
                job.tell(Scores(self._scored(session, job, job.score_prompt)))
            for step in answer.steps():
                job.tell(step)
            return Ended(answer)
        except Exception as error:  # a request that fails must not end the thread, which answers the next
            if isinstance(error, LostFileError):
                log.error("a request failed: %s", error)
            elif not isinstance(error, RunError):
                log.exception("a request failed")
            return Ended(answer, error)

    def _scored(self, session: Session, job: Job, top: int) -> list[TokenScore]:
        """Scores of a prompt's tokens; the session then holds the prompt."""
        ids = job.prompt.ids
        if len(ids) > session.context:
            raise RunError(f"{len(ids)} tokens do not fit: the context holds {session.context}")
        session.reset()
        found: list[TokenScore] = []
        size = _SCORED
        if getattr(session, "memory_mb", None) is not None:
            size = min(max(_SCORED_BYTES // (4 * session.vocab_size), 1), _SCORED)
        begin = 0
        while begin < len(ids) and not job.cancelled.is_set():
            chunk = ids[begin : begin + size]
            try:
                rows = session.prefill(chunk, logits="all" if size > 1 else "last")
            except RunError as error:
                if size == 1 or "last token only" not in error.message:
                    raise
                size = 1  # the artifact returns one row of logits per call
                if not self._warned:
                    log.warning("the artifact returns only the last row of logits: prompts are scored token by token")
                    self._warned = True
                continue
            following = ids[begin + 1 : begin + len(chunk) + 1]
            found += [score(row, token, top) for row, token in zip(np.asarray(rows), following, strict=False)]
            begin += len(chunk)
        return found
