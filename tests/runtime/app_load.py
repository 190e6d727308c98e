"""Many short answers at once by the C interface, while sessions are forked, rewound, saved, closed and misused:

    python -m tests.runtime.app_load ARTIFACT SMALL FOLDER COUNT SEED

prints as JSON what was done, what went wrong, and what the process held on to. Every answer must be the one that a
session alone gives, the beginning of it where it was cancelled, or an error that was provoked.
"""

from __future__ import annotations

import json
import math
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.runtime import app

PROMPTS, SEEDS, TOKENS, WORKERS = 6, 4, 24, 5
GONE = ("no open session", "no open generation", "is not open")


class Load:
    def __init__(self, artifact: int, small: int, folder: Path, seed: int) -> None:
        self.artifact, self.small, self.folder, self.seed = artifact, small, folder, seed
        drawn = random.Random(1)
        self.prompts = [[drawn.randrange(300, 4000) for _ in range(drawn.randrange(4, 30))] for _ in range(PROMPTS)]
        for index in range(1, PROMPTS, 2):  # these begin as their neighbours do
            self.prompts[index][:3] = self.prompts[index - 1][:3]
        self.alone = {(p, s): self.told(self.session(), p, s) for p in range(PROMPTS) for s in range(SEEDS)}
        self.done: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.lock = threading.Lock()
        self.running: set[int] = set()  # generations that the meddler may cancel
        self.open: set[int] = set()  # sessions that it may close
        self.draft = app.call("session", small)  # of whichever generation has it just then

    def session(self) -> int:
        return app.call("session", self.artifact)

    def begin(self, session: int, prompt: int, seed: int, **values: Any) -> int:
        values = {"max_new_tokens": TOKENS, "temperature": 1.0, "seed": seed, **values}
        return app.begin(session, self.prompts[prompt], app.options(self.artifact, **values))

    def told(self, session: int, prompt: int, seed: int) -> str:
        """The answer of a session alone, which is closed."""
        generation = self.begin(session, prompt, seed, speculate=0)
        text = "".join(app.pieces(generation))
        for id_ in (generation, session):
            app.call("close", id_)
        return text

    # --- what a thread does with its session; each says what it did ---------------------------------------------------

    def answer(self, draw: random.Random, session: int) -> str:
        prompt, seed = draw.randrange(PROMPTS), draw.randrange(SEEDS)
        values: dict[str, Any] = {"speculate": draw.randrange(2), "top_scores": draw.choice((-1, -1, 3))}
        if values["speculate"] and draw.random() < 0.3:
            values["draft"] = draw.choice((self.draft, self.small))
        if draw.random() < 0.3:
            values |= {"on_full": 1, "keep_first": draw.randrange(8)}
        generation = self.begin(session, prompt, seed, **values)
        meddled = draw.random() < 0.4
        if meddled:
            with self.lock:
                self.running.add(generation)
        most = draw.choice((1, 5, 10**9))
        said: list[str] = []

        def each(piece: str) -> bool:
            said.append(piece)
            return len(said) < most

        try:
            app.pieces(generation, each)
            stopped = app.STOPPED[app.stats(generation).stopped]
        finally:
            with self.lock:
                self.running.discard(generation)
            app.call("close", generation)
        text, wanted = "".join(said), self.alone[prompt, seed]
        # bytes of a character that is not whole are U+FFFD at the end
        good = text == wanted if stopped != "cancelled" else wanted.startswith(text.rstrip("\ufffd"))
        if not good or (stopped == "cancelled" and not meddled and most > len(said)):
            raise AssertionError(f"{stopped}: {text!r} instead of {wanted!r}")
        return "cancelled" if stopped == "cancelled" else "answers"

    def fork(self, draw: random.Random, session: int) -> str:
        tokens = app.many("tokens", session)
        other = app.call("fork", session)
        if app.many("tokens", other) != tokens:
            raise AssertionError("a fork has other tokens")
        prompt, seed = draw.randrange(PROMPTS), draw.randrange(SEEDS)
        if self.told(other, prompt, seed) != self.alone[prompt, seed]:
            raise AssertionError("a fork says something else")
        return "forks"

    def rewind(self, draw: random.Random, session: int) -> str:
        held = len(app.many("tokens", session))
        app.call("rewind", session, draw.randrange(held + 1))
        return "rewinds"

    def save(self, draw: random.Random, session: int) -> str:
        path = self.folder / f"{draw.random()}"
        tokens = app.many("tokens", session)
        app.call("save", session, str(path).encode())
        other = self.session()
        app.call("restore", other, str(path).encode())
        if app.many("tokens", other) != tokens:
            raise AssertionError("a restored session has other tokens")
        path.unlink()
        prompt, seed = draw.randrange(PROMPTS), draw.randrange(SEEDS)
        if self.told(other, prompt, seed) != self.alone[prompt, seed]:
            raise AssertionError("a restored session says something else")
        return "saves"

    def keep(self, draw: random.Random, session: int) -> str:
        try:
            app.call("keep_prefix", session, draw.choice((None, b"a", b"b")))
        except app.AppError as error:
            if "holds no tokens" not in str(error):
                raise
        if draw.random() < 0.2:
            app.call("forget_prefix", self.artifact, b"a")
        return "prefixes"

    def misuse(self, draw: random.Random, session: int) -> str:
        tokens = app.many("tokens", session)
        damaged = self.folder / f"damaged-{draw.random()}"
        damaged.write_bytes(draw.randbytes(draw.randrange(300)))
        faults: list[tuple[str, Callable[[], Any]]] = [
            ("not a session", lambda: app.call("restore", session, str(damaged).encode())),
            ("position", lambda: app.call("rewind", session, len(tokens) + 1)),
            ("exclude all", lambda: self.without_tokens(session)),
            ("do not fit", lambda: app.begin(session, [5] * 5000, None)),
            ("vocabulary", lambda: app.begin(session, [1 << 30], None)),
            ("name: 1 to 64", lambda: app.call("keep_prefix", session, b"../x")),
            ("no open generation", lambda: app.call("next", session, None, None)),
        ]
        words, cause = draw.choice(faults)
        try:
            cause()
        except app.AppError as error:
            if words not in str(error):
                raise
        else:
            raise AssertionError(f"no error: {words}")
        finally:
            damaged.unlink()
        return "errors"

    def without_tokens(self, session: int) -> None:
        generation = self.begin(session, 0, 0, biases=[(token, -math.inf) for token in range(4096)])
        try:
            app.pieces(generation)
        finally:
            app.call("close", generation)

    # --- threads ------------------------------------------------------------------------------------------------------

    def work(self, number: int, count: int) -> None:
        draw = random.Random(self.seed * 1000 + number)
        doing = [self.answer] * 6 + [self.fork, self.rewind, self.save, self.keep, self.misuse]
        session = -1
        for _ in range(count):
            try:
                if session < 0:
                    session = self.session()
                    with self.lock:
                        self.open.add(session)
                did = draw.choice(doing)(draw, session)
            except app.AppError as error:
                if not any(words in str(error) for words in GONE):
                    self.wrong.append(str(error))
                with self.lock:
                    did, session = "closed meanwhile", -1
            except Exception as error:  # whatever it is, it is told
                self.wrong.append(repr(error))
                did = "wrong"
            with self.lock:
                self.done[did] += 1
        with self.lock:
            if session in self.open:
                self.open.discard(session)
                app.call("close", session)

    def meddle(self, over: threading.Event) -> None:
        """Cancel answers of others, and close their sessions under them."""
        draw = random.Random(self.seed)
        while not over.wait(0.002):
            with self.lock:
                if self.running and draw.random() < 0.5:
                    app.call("cancel", draw.choice(sorted(self.running)))
                if self.open and draw.random() < 0.1:
                    session = draw.choice(sorted(self.open))
                    self.open.discard(session)
                    app.call("close", session)

    def run(self, count: int) -> None:
        over = threading.Event()
        meddler = threading.Thread(target=self.meddle, args=(over,), daemon=True)
        workers = [threading.Thread(target=self.work, args=(i, count // WORKERS), daemon=True) for i in range(WORKERS)]
        for thread in (meddler, *workers):
            thread.start()
        for thread in workers:
            thread.join(1200)
        over.set()
        meddler.join(10)
        if any(thread.is_alive() for thread in workers):
            self.wrong.append("a thread does not end")


def held() -> dict[str, int]:
    """What the process has: anonymous memory in bytes, files, mappings."""
    status = Path("/proc/self/status").read_text().split("RssAnon:")[1]
    maps = Path("/proc/self/maps").read_text().count("\n")
    return {"memory": int(status.split()[0]) << 10, "files": len(os.listdir("/proc/self/fd")), "mappings": maps}


def main() -> None:
    folder = Path(sys.argv[3])
    artifact, small = (app.open_artifact(Path(path)) for path in sys.argv[1:3])
    load = Load(artifact, small, folder, int(sys.argv[5]))
    app.call("prefix_folder", artifact, str(folder / "prefixes").encode())
    count, began = int(sys.argv[4]), time.monotonic()
    load.run(count // 3)  # what is made once is made then
    before = held()
    load.run(count)
    after = held()
    told = {"done": load.done, "wrong": load.wrong[:5], "before": before, "after": after}
    print(json.dumps({**told, "left": len(load.open | load.running), "seconds": time.monotonic() - began}))


if __name__ == "__main__":
    main()
