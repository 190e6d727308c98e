"""Running out of memory is the machine's limit, not a bug: one line, exit status 2, nothing half-written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moec.cli import main as cli
from tests.conftest import Moec, refused

SPEC = Path(__file__).parents[2] / "specs" / "models" / "mobilemoe-tiny.yaml"
SAID = "out of memory; close other programs, or use a smaller model, context or batch\n"

# Limits the address space to what is taken when everything is imported, and so many MiB more.
LIMITED = """
import re, resource, sys
from pathlib import Path
import torch
from moec.cli import main
from moec.compiler import build
from moec.runtime import kernel_api
taken = int(re.search(r"VmSize:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (taken + (int(sys.argv[1]) << 20), resource.RLIM_INFINITY))
sys.exit(main.run(sys.argv[2:]))
"""


@pytest.mark.slow  # 20 s of a core, most of it the compile
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the address space from /proc")
def test_a_command_that_runs_out_of_memory(tmp_path: Path, moec: Moec) -> None:
    """Angles of 2^21 positions are 256 MiB of the file, its caches as much: no fault of the artifact."""
    spec, checkpoint, out = tmp_path / "long.yaml", tmp_path / "checkpoint", tmp_path / "long"
    text = SPEC.read_text("utf-8").replace("layers: 4", "layers: 1")
    assert "context: 1024" in text
    spec.write_text(text.replace("context: 1024", f"context: {1 << 21}"), "utf-8")
    assert moec("checkpoint", "synthesize", spec, "--out", checkpoint, "--qat", "--quiet")[0] == 0
    status, _, said = moec("compile", spec, "--checkpoint", checkpoint, "--out", out, "--quiet")
    assert status == 0, said
    for mebibytes in (200, 450):  # the file cannot be mapped; the caches have no room beside it
        command = [sys.executable, "-W", "ignore", "-c", LIMITED, str(mebibytes), "run", str(out), "--ids", "1,2,3"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (2, "", SAID)


def no_memory_of_torch() -> None:
    torch.empty(1 << 60, dtype=torch.uint8)


def no_memory_of_python() -> None:
    bytearray(1 << 62)


def no_memory_behind_another() -> None:
    try:
        no_memory_of_torch()
    except RuntimeError as error:
        raise ValueError("while exporting") from error


def no_memory_of_a_library() -> None:
    raise RuntimeError("std::bad_alloc")


def no_bug_of_memory() -> None:
    raise RuntimeError("unsupported memory format option Preserve")


@pytest.mark.parametrize(
    ("fault", "status"),
    [
        (no_memory_of_torch, 2),
        (no_memory_of_python, 2),
        (no_memory_behind_another, 2),
        (no_memory_of_a_library, 2),
        (no_bug_of_memory, 70),
    ],
)
def test_whoever_says_it_is_understood(fault: object, status: int, moec: Moec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_invoke", lambda arguments: fault())  # type: ignore[operator]
    found = moec("targets")
    if status == 2:
        refused(found, SAID)
    else:
        assert found[0] == 70
        assert "this is a bug of moec" in found[2]
