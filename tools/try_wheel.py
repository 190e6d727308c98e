"""Installs a wheel of moec into an empty environment and uses it there: no compiler, no cmake, no ninja, no checkout.

    python tools/try_wheel.py dist [--work build/wheel-try]    the newest for this machine in dist; or a file

Dependencies are those of requirements.lock for the extra `serve`. Commands see an environment of three variables: HOME
is an empty folder, and PATH one whose compilers and build tools are programs that write their name down and fail. That
they would be noticed is tried first. At the end nothing was written down, nothing was built in HOME, and what was
loaded is what the wheel brought.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import locked

TOOLS = ("c++", "g++", "clang++", "cc", "gcc", "clang", "cpp", "as", "ld", "make", "cmake", "ninja", "meson", "zig")
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
ASK = {"messages": [{"role": "user", "content": "Name a city."}], "max_tokens": 8, "temperature": 0}
FOLDER = "from moec.runtime import native; print(native.native_files().folder)"


class Failed(Exception):
    """A step that did not do what it should; the text says which and how."""


class Place:
    """A fresh virtual environment in `work`, and the bare environment that commands of it are run in."""

    def __init__(self, work: Path) -> None:
        shutil.rmtree(work, ignore_errors=True)
        self.work = work
        self.home, self.tools, self.venv = work / "home", work / "tools", work / "venv"
        self.called = work / "called.txt"  # by name, the tools that something wanted to run
        for folder in (self.home, self.tools, work / "files"):
            folder.mkdir(parents=True)
        for name in TOOLS:
            (self.tools / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {self.called}\nexit 99\n')
            (self.tools / name).chmod(0o755)
        self.bare = {"PATH": str(self.tools), "HOME": str(self.home), "LANG": "C.UTF-8"}

    def python(self) -> str:
        return str(self.venv / "bin" / "python")

    def moec(self) -> str:
        return str(self.venv / "bin" / "moec")

    def run(
        self, command: Sequence[str | Path], *, says: str = "", stdin: str = "", fails: bool = False, **env: str
    ) -> str:
        """What the command wrote to stdout; Failed unless its status is 0 (`fails`: is not) and it wrote `says`."""
        began = time.perf_counter()
        done = subprocess.run(
            [str(part) for part in command],
            cwd=self.work / "files",
            env={**self.bare, **env},
            input=stdin,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=900,
            check=False,
        )
        shown = " ".join(Path(part).name if Path(part).is_absolute() else str(part) for part in command)
        if (done.returncode != 0) is not fails or says not in done.stdout + done.stderr:
            raise Failed(f"$ {shown}\nstatus {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        print(f"  {time.perf_counter() - began:6.1f} s  {shown[:110]}", flush=True)
        return done.stdout

    def install(self, wheel: Path) -> None:
        """The locked dependencies, then the wheel without any index: what it asks for is all there, or pip fails."""
        subprocess.run([sys.executable, "-P", "-m", "venv", self.venv], check=True)
        lock = locked.read(locked.LOCK.read_text("utf-8"))
        project = tomllib.loads((locked.ROOT / "pyproject.toml").read_text("utf-8"))["project"]
        roots = (locked.required(project, ["serve"]) | {locked.BUILD}) - {"cmake", "ninja"}
        chosen = locked.selected(lock, roots, locked.unneeded_by_torch(lock))
        first = [package for package in chosen if package.name in (locked.BUILD, "torch")]
        self._pip([locked.one(lock, "torch+cpu")], fails=True)  # as make setup: where an index has it
        self._pip(first)
        self._pip(chosen)
        pip = [self.python(), "-m", "pip", "--disable-pip-version-check"]
        self.run([*pip, "install", "-q", "--no-index", f"moec[serve] @ {wheel.resolve().as_uri()}"])
        self.run([*pip, "check"])

    def _pip(self, packages: Sequence[locked.Locked], *, fails: bool = False) -> None:
        file = self.work / "selected.txt"
        file.write_text("".join("\n".join(package.lines) + "\n" for package in packages))
        command = [self.python(), "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps"]
        command += ["--require-hashes", "--no-build-isolation", "-r", str(file)]
        done = subprocess.run(
            command, env={**os.environ, "PATH": str(self.tools)}, capture_output=True, text=True, check=False
        )
        if done.returncode and not fails:
            raise Failed(f"the dependencies cannot be installed\n{done.stderr[-3000:]}")

    def untouched(self) -> None:
        """Failed if one of the tools was called."""
        if self.called.exists():
            raise Failed(f"build tools were called:\n{self.called.read_text()[:2000]}")


def traps_work(place: Place) -> None:
    """A build that is asked for is refused for want of a compiler, and noticed."""
    place.run([place.python(), "-c", FOLDER], fails=True, says="building", MOEC_NATIVE_DIR=str(place.work / "asked"))
    if not place.called.exists():
        raise Failed("a build was asked for, and no tool was called: this test would notice nothing")
    place.called.unlink()


def serve(place: Place, artifact: Path) -> None:
    """One request to `moec serve`."""
    began = time.perf_counter()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [place.moec(), "serve", str(artifact), "--port", str(port)]
    log = place.work / "serve.txt"
    with log.open("w") as out:
        server = subprocess.Popen(command, cwd=place.work / "files", env=place.bare, stdout=out, stderr=out)
        try:
            while True:
                if server.poll() is not None or time.perf_counter() - began > 300:
                    raise Failed(f"moec serve does not answer\n{log.read_text()[-3000:]}")
                try:
                    socket.create_connection(("127.0.0.1", port), timeout=1).close()
                    break
                except OSError:
                    time.sleep(0.3)
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/v1/chat/completions",
                json.dumps(ASK).encode(),
                {"Content-Type": "application/json"},
            )
            direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            answer = json.load(direct.open(request, timeout=300))
            page = direct.open(f"http://127.0.0.1:{port}/", timeout=60).read()
        finally:
            server.terminate()
            server.wait(60)
    if answer["usage"]["completion_tokens"] < 1 or b"<html" not in page.lower():
        raise Failed(f"moec serve answered {answer}")
    print(f"  {time.perf_counter() - began:6.1f} s  moec serve, one request and its page", flush=True)


def use(place: Place) -> None:
    """Compile the tiny model, then all that an artifact is for."""
    moec, python = place.moec(), place.python()
    (site,) = (place.venv / "lib").glob("python*/site-packages")
    spec = site / "moec" / "specs" / "models" / "mobilemoe-tiny.yaml"
    artifact, weights = place.work / "files" / "artifact", place.work / "files" / "weights"
    place.run([python, "-c", FOLDER], says=str(site / "moec" / "runtime" / "shipped"))
    place.run([moec, "targets"], says="xnnpack")
    place.run([moec, "checkpoint", "synthesize", spec, "--out", weights, "--qat"])
    (weights / "chat_template.jinja").write_text(TEMPLATE, "utf-8")
    place.run([moec, "compile", spec, "--checkpoint", weights, "--out", artifact])
    ids = place.run([moec, "run", artifact, "--ids", "5,6,7", "--max-new-tokens", "8"])
    if not any(character.isdigit() for character in ids):
        raise Failed(f"moec run wrote no ids but {ids!r}")
    place.run([moec, "run", artifact, "--chat", "--prompt", "Name a city.", "--max-new-tokens", "8"])
    place.run([moec, "chat", artifact, "--max-new-tokens", "8"], stdin="Name a city.\n")
    place.run([moec, "verify", artifact])
    place.run([moec, "bench", artifact, "--prefill", "32", "--decode", "8", "--repeats", "1"], says="tokens")
    serve(place, artifact)
    built = place.home / ".cache" / "moec" / "native"
    if built.exists():
        raise Failed(f"something was built: {sorted(path.name for path in built.iterdir())}")


def newest(place: Path, machine: str) -> Path:
    """The wheel `place`, or the newest one for `machine` in that folder. Failed if there is none."""
    if place.is_file():
        return place
    found = sorted(place.glob(f"moec-*_{machine}.whl"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise Failed(f"{place}: no wheel for {machine}")
    return found[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, help="a wheel, or a folder of them")
    parser.add_argument("--work", type=Path, default=locked.ROOT / "build" / "wheel-try")
    given = parser.parse_args()
    began = time.perf_counter()
    try:
        wheel = newest(given.wheel, platform.machine())
        place = Place(given.work.resolve())
        print(f"an empty environment for {wheel.name} (torch is large: minutes without a package cache)", flush=True)
        place.install(wheel)
        place.untouched()
        print(f"  {time.perf_counter() - began:6.1f} s  installed", flush=True)
        traps_work(place)
        use(place)
        place.untouched()
    except Failed as failed:
        print(f"error: {failed}", file=sys.stderr)
        return 1
    print(f"{wheel.name} works in an empty environment: {time.perf_counter() - began:.0f} s, no build tool called")
    return 0


if __name__ == "__main__":
    sys.exit(main())
