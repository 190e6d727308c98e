"""Bytes a second of direct reads from a file.

Each case reads blocks of BLOCK bytes at random multiples of ALIGNMENT for a second, by as many threads as the runtime
has readers. It imports nothing else, so that a process of its own can run in a group with limits.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

READERS = 2
SECONDS = 1.0
_SCRIPT = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import storage_rates; storage_rates.main()"


def rate(file: Path, block: int, alignment: int, readers: int = READERS, seconds: float = SECONDS) -> float:
    """block, alignment: in bytes, multiples of what the device asks for. OSError where reads cannot be direct."""
    places = (file.stat().st_size - block) // alignment + 1
    done, begin = [0] * readers, time.monotonic()
    until = begin + seconds

    def read_on(reader: int) -> None:
        drawn = random.Random(reader)
        handle = os.open(file, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
        try:
            with mmap.mmap(-1, block) as memory:
                while time.monotonic() < until:
                    done[reader] += os.preadv(handle, [memory], drawn.randrange(places) * alignment)
        finally:
            os.close(handle)

    threads = [threading.Thread(target=read_on, args=(i,)) for i in range(readers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(done) / (time.monotonic() - begin)


def rates_in(prefix: list[str], file: Path, cases: list[tuple[int, int]]) -> list[float]:
    """`rate` of each (block, alignment), by a process that `prefix` starts. A RuntimeError says why there are none."""
    given = [f"{block}:{alignment}" for block, alignment in cases]
    done = subprocess.run([*prefix, sys.executable, "-c", _SCRIPT, str(file), *given], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{file} cannot be read directly: {done.stderr.strip().splitlines()[-1:]}")
    return [float(each) for each in json.loads(done.stdout)]


def main() -> None:
    """Of a file and cases BLOCK:ALIGNMENT on the command line, as JSON."""
    wanted = [tuple(map(int, case.split(":"))) for case in sys.argv[2:]]
    print(json.dumps([rate(Path(sys.argv[1]), block, alignment) for block, alignment in wanted]))
