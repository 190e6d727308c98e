"""Profiling on an Android device over adb: push the runner and the artifact, run, pull the JSON.

The runner is a folder with `moec_runner` and the libraries it needs, built for the device's ABI with a cross compiler
(docs/android.md says how ExecuTorch is built with the NDK; runtime/runner is the CMake project). What is
already on the device, with the same length, is not pushed again.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moec.compiler.errors import RunError, UserError
from moec.compiler.profile_request import Request
from moec.targets.xnnpack.profiling import arguments
from moec.targets.xnnpack.refusals import reason_in, remedy_for

# Where an app-less process may execute files.
FOLDER = "/data/local/tmp/moec"


class Device:
    """An adb device. `say` receives every command as it is run, or would be with `dry_run`."""

    def __init__(
        self,
        serial: str | None = None,
        *,
        runner: Path | None = None,
        dry_run: bool = False,
        say: Callable[[str], None] | None = None,
        budget: Sequence[str] = (),
    ) -> None:
        """UserError if adb is missing (a dry run needs none), or `runner` holds no `moec_runner`.

        budget: `budget_arguments`.
        """
        self._adb = shutil.which("adb") or ("adb" if dry_run else None)
        if self._adb is None:
            raise UserError(
                "adb is not installed", remedy="install Android's platform tools, or see the commands with --dry-run"
            )
        if runner is not None and not (runner / "moec_runner").is_file():
            raise UserError(
                "holds no moec_runner", place=str(runner), remedy="name the folder of a runner built for the device"
            )
        self._select = ["-s", serial] if serial else []
        self._runner, self._dry_run, self._say = runner, dry_run, say or (lambda text: None)
        self._budget = budget

    def push(self, model: Path, name: str) -> None:
        """Put the runner (if one was given) and the model in place."""
        self._call("get-state")
        remote = self._model(name)
        self._call("shell", f"mkdir -p {FOLDER}/bin {shlex.quote(str(Path(remote).parent))}")
        if self._runner is not None:
            self._call("push", f"{self._runner}/.", f"{FOLDER}/bin/")
            self._call("shell", f"chmod 755 {FOLDER}/bin/moec_runner")
        if self._dry_run or not self._has(remote, model.stat().st_size):
            self._call("push", str(model), remote)

    def run(self, request: Request, name: str) -> dict[str, Any] | None:
        """Run one request on the device; the runner's JSON, None in a dry run."""
        with tempfile.TemporaryDirectory(prefix="moec-adb-") as folder:
            tokens, result = Path(folder) / "tokens.txt", Path(folder) / "result.json"
            tokens.write_text(" ".join(map(str, request.ids)))
            self._call("push", str(tokens), f"{FOLDER}/tokens.txt")
            command = shlex.join(
                [f"{FOLDER}/bin/moec_runner", *arguments(request, self._model(name), "tokens.txt"), *self._budget]
            )
            self._call("shell", f"cd {FOLDER} && LD_LIBRARY_PATH={FOLDER}/bin {command} > result.json")
            self._call("pull", f"{FOLDER}/result.json", str(result))
            if self._dry_run:
                return None
            try:
                return dict(json.loads(result.read_text("utf-8")))
            except (OSError, ValueError):
                raise RunError(
                    "the device's runner wrote no JSON", remedy="is it the runner of this version?"
                ) from None

    def _model(self, name: str) -> str:
        return f"{FOLDER}/{name}/model.pte"

    def _has(self, remote: str, length: int) -> bool:
        done = self._process("shell", f"stat -c %s {shlex.quote(remote)} 2>/dev/null || true")
        return done.stdout.strip() == str(length)

    def _call(self, *parts: str) -> None:
        self._say(shlex.join(["adb", *self._select, *parts]))
        if self._dry_run:
            return
        done = self._process(*parts)
        if done.returncode:
            reason = reason_in(done.stderr) or reason_in(done.stdout) or f"status {done.returncode}"
            other = "see `adb devices`, and what docs/profiling.md needs there"
            raise RunError(f"adb {parts[0]}: {reason}", remedy=remedy_for(reason) or other)

    def _process(self, *parts: str) -> subprocess.CompletedProcess[str]:
        assert self._adb is not None
        command: Sequence[str] = [self._adb, *self._select, *parts]
        return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
