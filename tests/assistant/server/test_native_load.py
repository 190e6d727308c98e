"""Eight clients and a small queue before a compiled model with several conversations: answers are those of one session.

Requests are cancelled at any moment, malformed, or refused since the queue is full; each gets the status that it must.
"""

from __future__ import annotations

import gc
import json
import os
import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the server: pip install 'moec[serve]'")
pytest.importorskip("uvicorn", reason="the server: pip install 'moec[serve]'")
httpx = pytest.importorskip("httpx", reason="a client: pip install 'moec[dev]'")

from moec.assistant.assistant import Assistant  # noqa: E402
from moec.assistant.load import load_session  # noqa: E402
from moec.assistant.server.metrics import resident_bytes  # noqa: E402
from moec.compiler.artifact import Artifact  # noqa: E402
from moec.compiler.session import SessionBase  # noqa: E402
from tests.assistant.conversations import template  # noqa: E402
from tests.assistant.server.running import running  # noqa: E402
from tests.assistant.server.test_server_load import MALFORMED, NO_CERTIFICATES  # noqa: E402
from tests.tiny import TinyModels, tiny_text  # noqa: E402

CLIENTS, CONVERSATIONS, QUEUE, CONTEXT = 8, 4, 2, 512
KINDS = ("chat", "stream", "text", "left", "left stream", "malformed", "metrics")


@dataclass(frozen=True)
class Asked:
    """A request's path and body, and what it is answered: texts of its choices."""

    path: str
    body: dict[str, Any]
    said: tuple[str, ...]


def questions(speaks: Assistant, session: SessionBase) -> list[Asked]:
    """Conversations that go on from each other, share a system prompt or nothing; texts; each with a seed."""
    found: list[Asked] = []
    for number in range(24):
        drawn = random.Random(number)
        messages: list[Any] = [{"role": "system", "content": f"You are {number % 3}. " * 12}] if number % 4 else []
        for turn in range(drawn.randrange(4)):
            messages.append({"role": "user", "content": f"Question {turn} of {number % 5}"})
            messages.append({"role": "assistant", "content": "An answer. " * drawn.randrange(1, 5)})
        messages.append({"role": "user", "content": f"What is {number}?"})
        given = {"seed": number, "temperature": 0.8 if number % 2 else 0.0}
        session.reset()
        # one goes on where the context is full
        most, policy = (400, "drop_oldest") if number == 5 else (drawn.randrange(1, 30), "error")
        said = "".join(speaks.generate(session, messages, max_new_tokens=most, context_full=policy, **given))
        body = {"messages": messages, "max_tokens": most, "context_full": policy, **given}
        found.append(Asked("/v1/chat/completions", body, (said,)))
    for number in range(6):
        prompts, texts = [f"Once upon a time {number}", f"There was {number}"], []
        for prompt in prompts:
            session.reset()
            texts.append("".join(speaks.generate(session, prompt, max_new_tokens=9, seed=3, temperature=0.9)))
        body = {"prompt": prompts, "max_tokens": 9, "seed": 3, "temperature": 0.9}
        found.append(Asked("/v1/completions", body, tuple(texts)))
    return found


def refusal(reply: Any) -> str:
    told = reply.headers.get("Retry-After") == "1" and "wait already" in reply.text
    return "busy" if told else "503 without a reason"


def one(url: str, kind: str, asked: Asked, drawn: random.Random) -> str:
    """One request: what became of it."""
    wait = httpx.Timeout(60, read=drawn.choice([0.0005, 0.004, 0.02]) if kind == "left" else 60)
    json_only = {"Content-Type": "application/json"}
    with httpx.Client(timeout=wait, verify=NO_CERTIFICATES, headers=json_only, base_url=url) as client:
        try:
            if kind == "metrics":
                return f"{kind} {client.get('/metrics').status_code}"
            if kind == "malformed":
                return f"{kind} {client.post(asked.path, content=drawn.choice(MALFORMED)).status_code}"
            if "stream" not in kind:
                reply = client.post(asked.path, json=asked.body)
                if reply.status_code != 200:
                    return refusal(reply) if reply.status_code == 503 else f"{kind} {reply.status_code}"
                choices = reply.json()["choices"]
                said = tuple(c["text"] if "text" in c else c["message"]["content"] for c in choices)
                return f"{kind} {said == asked.said}"
            with client.stream("POST", asked.path, json={**asked.body, "stream": True}) as reply:
                if reply.status_code != 200:
                    reply.read()
                    return refusal(reply) if reply.status_code == 503 else f"{kind} {reply.status_code}"
                most, texts = drawn.randrange(8) if kind == "left stream" else 10**9, []
                for line in reply.iter_lines():
                    if len(texts) >= most:
                        return "left"
                    if line.startswith("data: {"):
                        texts += [c["delta"].get("content") or "" for c in json.loads(line[6:])["choices"]]
                return f"stream {(''.join(texts),) == asked.said}"
        except httpx.ReadTimeout:
            return "left"


def load(url: str, known: list[Asked], count: int, seed: int) -> Counter[str]:
    """What became of so many requests, by word. A client that is told to come back does so, a few times and soon."""

    def asking(index: int) -> list[str]:
        drawn, said = random.Random(f"{seed} {index}"), ["busy"]
        kind = drawn.choice(KINDS)
        asked = drawn.choice([a for a in known if ("prompt" in a.body) == (kind == "text")])
        while said[-1] == "busy" and len(said) < 8:
            said.append(one(url, kind, asked, drawn))
            time.sleep(drawn.uniform(0.0, 0.1) if said[-1] == "busy" else 0.0)
        return said[1:]

    with ThreadPoolExecutor(CLIENTS) as pool:
        return Counter(word for said in pool.map(asking, range(count)) for word in said)


def used() -> tuple[int, int, int]:
    """Bytes of memory, open files, threads."""
    time.sleep(0.5)  # connections close
    gc.collect()
    return resident_bytes(), len(os.listdir("/proc/self/fd")), threading.active_count()


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_each_is_answered_as_by_one_session_or_refused(tiny: TinyModels, tmp_path: Path, count: int) -> None:
    artifact = Artifact.open(tiny(tiny_text(context=CONTEXT)) / "artifact")
    file = tmp_path / "chatml.jinja"
    file.write_text(template("chatml").text)
    speaks = Assistant.of(artifact, chat_template=file)
    with load_session(artifact) as alone:
        known = questions(speaks, alone)  # type: ignore[arg-type]
    session: Any = load_session(artifact)
    settings = {"most_waiting": QUEUE, "conversations": CONVERSATIONS}
    with running(tmp_path, session, speaks=speaks, **settings) as at:
        load(at.url, known, count // 4, 1)  # what is made once is made
        at.idle()
        before = used()
        found = load(at.url, known, count, 2)
        at.idle()
        after = used()
        assert sum(found.values()) >= count
        wanted = {"chat True", "stream True", "text True", "left True", "malformed 400", "metrics 200", "left", "busy"}
        assert set(found) <= wanted, found
        assert found["chat True"] + found["stream True"] + found["text True"] >= count // 8, found
        assert len(at.server.engine._conversations) == CONVERSATIONS
        assert (at.server.engine.running, at.server.engine.waiting) == (0, 0)
        if count >= 1000:
            assert min(found[kind] for kind in wanted - {"left True"}) > 20, found
            # a conversation's caches of the whole context, and what the clients of this process take
            assert after[0] - before[0] < 16 << 20, (before, after)
            assert after[1] <= before[1] + 2, (before, after)
            assert after[2] <= before[2] + 2, (before, after)
        # and at the end each question as by one session, one after the other
        for asked in known:
            reply = httpx.post(at.url + asked.path, json=asked.body, timeout=60, verify=NO_CERTIFICATES).json()
            said = tuple(c["text"] if "text" in c else c["message"]["content"] for c in reply["choices"])
            assert said == asked.said
