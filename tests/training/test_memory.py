"""Freed memory stays with a process that trains."""

from __future__ import annotations

import subprocess
import sys

import pytest

LOOP = """
import resource
{}
def touched():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        b"x" * (40 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
touched()
print(touched())
"""


def faults(line: str) -> int:
    done = subprocess.run([sys.executable, "-c", LOOP.format(line)], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="the page faults of glibc's allocator")
def test_what_is_freed_is_not_mapped_again() -> None:
    """Ten strings of 10,240 pages, one after the other: each is mapped, or all are the same pages."""
    if faults("") < 10_000:  # nothing to gain there, so nothing to see: the setting is for systems that map each anew
        pytest.skip("this system maps large blocks in huge pages, or keeps them already")
    assert faults("from moec.training.memory import keep_freed_memory; keep_freed_memory()") < 2_000
