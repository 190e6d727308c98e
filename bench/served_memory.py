"""`bench_assistant.py serve`: the memory of `moec serve` and of all its children while it answers.

Completions, a chat, and a chat in JSON are asked of a server in a process of its own. Pages that several processes
share count once where shares are added up.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from saved_prefix import path_of_moec
from schema_masks import SCHEMAS

from moec.cli.output import table
from moec.compiler.artifact import Artifact

_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tree(process: int) -> list[int]:
    """A process and all below it."""
    found, queue = [], [process]
    while queue:
        found.append(queue.pop())
        for task in Path(f"/proc/{found[-1]}/task").glob("*/children"):
            try:
                queue.extend(int(one) for one in task.read_text().split())
            except OSError:
                continue  # it ended meanwhile
    return found


def memory_of(process: int) -> dict[str, int]:
    """Bytes resident, its share of them where pages are shared, those of it that no file backs, and its own peak."""
    roll = Path(f"/proc/{process}/smaps_rollup").read_text()
    status = Path(f"/proc/{process}/status").read_text()
    values = {name: int(value) * 1024 for name, value in re.findall(r"^(\w+):\s+(\d+) kB", roll + status, re.MULTILINE)}
    found = {"rss": values.get("Rss", 0), "pss": values.get("Pss", 0), "anonymous": values.get("Anonymous", 0)}
    return {**found, "peak": values.get("VmHWM", 0)}


def mapped_of(process: int, file: Path) -> int:
    """Bytes of a file that are resident in a process by its mappings."""
    found, inside = 0, False
    for line in Path(f"/proc/{process}/smaps").read_text().splitlines():
        if re.match(r"^[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(str(file.resolve()))
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found


class Watch(threading.Thread):
    """Adds up the memory of a tree of processes, again and again."""

    def __init__(self, process: int) -> None:
        super().__init__(daemon=True)
        self._process, self._over = process, threading.Event()
        self.most: dict[str, int] = {"rss": 0, "pss": 0}
        self.processes: dict[int, dict[str, Any]] = {}

    def run(self) -> None:
        while not self._over.wait(0.02):
            total = {"rss": 0, "pss": 0}
            for one in tree(self._process):
                try:
                    found = memory_of(one)
                    command = (
                        Path(f"/proc/{one}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                    )
                except (OSError, ValueError):
                    continue  # it ended meanwhile
                kept = self.processes.setdefault(one, {"command": command, **found})
                kept.update({name: max(value, int(kept[name])) for name, value in found.items()})
                for name in total:
                    total[name] += found[name]
            self.most = {name: max(value, self.most[name]) for name, value in total.items()}

    def end(self) -> None:
        self._over.set()
        self.join()


class Refused(Exception):
    """What the server answers to a request that it does not take."""


def ask(url: str, what: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(what).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=600) as reply:
            return json.load(reply)
    except urllib.error.HTTPError as error:
        raise Refused(error.read().decode(errors="replace")[:500]) from None


def bare_python() -> int:
    """Peak of an interpreter that runs nothing."""
    command = [sys.executable, "-c", "print([line for line in open('/proc/self/status') if 'VmHWM' in line][0])"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[1]) * 1024


def measure(artifact: Path, *, threads: int, tokens: int) -> dict[str, Any]:
    """Peak memory of the server and its children while it answers."""
    opened = Artifact.open(artifact)
    with tempfile.TemporaryDirectory() as temporary:
        template = Path(temporary) / "template.jinja"
        template.write_text(_TEMPLATE)
        command = [
            sys.executable,
            "-m",
            "moec",
            "serve",
            str(artifact),
            "--port",
            "0",
            "--chat-template",
            str(template),
        ]
        log = Path(temporary) / "log"
        with log.open("w") as stream:
            own = {**os.environ, **path_of_moec()}
            running = subprocess.Popen([*command, "--threads", str(threads)], stdout=stream, stderr=stream, env=own)
        watch = Watch(running.pid)
        watch.start()
        try:
            url = _address(running, log)
            word = "the story of a city by the sea "
            asked: list[tuple[str, dict[str, Any]]] = [
                ("completions", {"prompt": word * 3}),
                ("completions", {"prompt": word * (tokens // 8)}),
                ("chat/completions", {"messages": [{"role": "user", "content": word * (tokens // 16)}]}),
                ("chat/completions", {"messages": [{"role": "user", "content": word}], "response_format": _format()}),
            ]
            with urllib.request.urlopen(f"{url}/v1/models", timeout=60) as reply:
                model = json.load(reply)["data"][0]["id"]
            answers, refused = [], ""
            for path, what in asked:
                try:
                    reply = ask(f"{url}/v1/{path}", {"model": model, "max_tokens": 64, **what})
                    answers.append(reply["usage"])
                except Refused as error:  # a synthesized checkpoint's tokenizer cannot be constrained
                    if "response_format" not in what:
                        raise SystemExit(f"the server refuses: {error}") from None
                    refused = str(error)
            mapped = mapped_of(running.pid, artifact / "model.pte")
        finally:
            running.terminate()
            running.wait(30)
            watch.end()
    held = sum(answer["total_tokens"] for answer in answers)
    program = sum(record.bytes for record in opened.manifest.files if record.name.startswith("model"))
    cache = sum(state.bytes for state in opened.manifest.states) * held // opened.manifest.model.context
    return {
        "most": watch.most,
        "processes": [{"id": one, **found} for one, found in watch.processes.items()],
        "artifact": program,
        "mapped": mapped,
        "cache": cache,
        "held_tokens": held,
        "python": bare_python(),
        "usage": answers,
        "refused": refused,
    }


def _format() -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMAS[0]}}


def _address(running: subprocess.Popen[bytes], log: Path) -> str:
    end = time.monotonic() + 300
    while time.monotonic() < end and running.poll() is None:
        if found := re.search(r"http://[\w.]+:\d+", log.read_text()):
            return found[0]
        time.sleep(0.05)
    raise SystemExit(f"the server did not begin: {log.read_text()[-2000:]}")


def tell(found: dict[str, Any]) -> None:
    def mb(value: float) -> str:
        return f"{value / 1e6:.0f}"

    rows = [
        [one["command"][-60:], *(mb(one[name]) for name in ("peak", "rss", "pss", "anonymous"))]
        for one in sorted(found["processes"], key=lambda one: -one["rss"])
    ]
    table(
        "processes, each at its most, MB", ["command", "peak", "resident", "share", "no file"], rows, right=(1, 2, 3, 4)
    )
    if found["refused"]:
        print(f"without an answer in JSON: {found['refused']}")
    own = found["most"]["pss"] - found["mapped"] - found["cache"] - found["python"]
    print(
        f"all at once: {mb(found['most']['pss'])} MB where a page counts once, {mb(found['most']['rss'])} MB added up"
    )
    print(
        f"artifact {mb(found['mapped'])} of {mb(found['artifact'])} + "
        f"caches of {found['held_tokens']} tokens {mb(found['cache'])} + "
        f"bare Python {mb(found['python'])}: {mb(own)} MB beyond"
    )
