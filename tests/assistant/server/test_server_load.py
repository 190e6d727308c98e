"""Eight clients, a thousand requests: answered, cancelled at any moment, malformed. No crash, no leak."""

from __future__ import annotations

import gc
import os
import random
import ssl
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("starlette", reason="the server: pip install 'moec[serve]'")
pytest.importorskip("uvicorn", reason="the server: pip install 'moec[serve]'")
httpx = pytest.importorskip("httpx", reason="a client: pip install 'moec[dev]'")

from moec.assistant.server.metrics import resident_bytes  # noqa: E402
from tests.assistant.server.running import running  # noqa: E402
from tests.assistant.speaking import VOCABULARY, Speaking  # noqa: E402

REQUESTS, CLIENTS = 1000, 8
# made once: each client would read all certificates of the system into memory that the allocator keeps
NO_CERTIFICATES = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
MALFORMED = [b"{", b"\xff", b"[]", b'{"messages": 5}', b'{"messages": [{"role": "x"}]}', b'{"messages": []}',
             b'{"messages": [{"role": "user", "content": "x"}], "temperature": "hot"}', b"9" * 5000]  # fmt: skip


def likes(position: int) -> np.ndarray:
    """Letters by turns, and an end now and then."""
    row = np.zeros(VOCABULARY, np.float32)
    row[20 + position % 50 if position % 37 else 4] = 9
    return row


def one(url: str, index: int, random_: random.Random) -> str:
    """One request of a random kind: what became of it, as a word with a status."""
    kind = random_.choice(["chat", "stream", "text", "left", "left stream", "malformed", "metrics"])
    body: dict[str, Any] = {"messages": [{"role": "user", "content": f"{index} " * random_.randint(1, 20)}]}
    body |= {"max_tokens": random_.randint(0, 60), "stream": "stream" in kind, "seed": index}
    wait = httpx.Timeout(60, read=random_.choice([0.001, 0.02, 0.1]) if kind == "left" else 60)
    with httpx.Client(timeout=wait, verify=NO_CERTIFICATES, headers={"Content-Type": "application/json"}) as client:
        try:
            if kind == "metrics":
                return f"{kind} {client.get(url + '/metrics').status_code}"
            if kind == "malformed":
                return (
                    f"{kind} {client.post(url + '/v1/chat/completions', content=random_.choice(MALFORMED)).status_code}"
                )
            if kind == "text":
                asked = {"prompt": ["a", "b"], "max_tokens": 5, "logprobs": 1, "echo": True}
                return f"{kind} {client.post(url + '/v1/completions', json=asked).status_code}"
            if body["stream"]:
                with client.stream("POST", url + "/v1/chat/completions", json=body) as reply:
                    lines = 0
                    for line in reply.iter_lines():
                        lines += bool(line)
                        if kind == "left stream" and lines > random_.randint(0, 10):
                            return "left"
                    whole = reply.status_code != 200 or line == "data: [DONE]" or lines > 1
                return f"stream {reply.status_code} {whole}"
            return f"chat {client.post(url + '/v1/chat/completions', json=body).status_code}"
        except httpx.ReadTimeout:
            return "left"


def load(url: str, count: int, seed: int) -> Counter[str]:
    randoms = [random.Random(f"{seed} {index}") for index in range(count)]
    with ThreadPoolExecutor(CLIENTS) as pool:
        return Counter(pool.map(lambda index: one(url, index, randoms[index]), range(count)))


@pytest.mark.slow
def test_a_thousand_requests(tmp_path: Path) -> None:
    with running(tmp_path, Speaking(likes=likes, context=1000), most_waiting=CLIENTS * 2) as at:
        load(at.url, 150, 1)  # what is made once is made
        at.idle()
        gc.collect()
        before = resident_bytes(), len(os.listdir("/proc/self/fd")), threading.active_count()
        found = load(at.url, REQUESTS, 2)
        at.idle()
        time.sleep(0.5)  # connections close
        gc.collect()
        after = resident_bytes(), len(os.listdir("/proc/self/fd")), threading.active_count()
        assert sum(found.values()) == REQUESTS
        assert set(found) <= {"chat 200", "stream 200 True", "text 200", "malformed 400", "metrics 200", "left"}, found
        assert min(found.values()) > 50, found
        assert after[0] - before[0] < 24 << 20, (before, after)  # clients of this process included
        assert after[1] <= before[1] + 2, (before, after)
        assert after[2] <= before[2] + 2, (before, after)
        assert (at.server.engine.running, at.server.engine.waiting) == (0, 0)
        assert httpx.get(at.url + "/health").status_code == 200
