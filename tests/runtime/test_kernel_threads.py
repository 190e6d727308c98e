"""The kernels' threads: the same bits for any number of them, after a fork, and where the system allows no more."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from moec.runtime import kernel_api
from moec.runtime.moe_config import Kind, WeightFormat
from tests.runtime.kernel_cases import random_block, random_weight

INT4_IN = WeightFormat(Kind.INT4, 32, int8_activations=True)
INT4_OUT = WeightFormat(Kind.INT4, 64, axis_out=True, int8_activations=True)


@pytest.fixture(autouse=True)
def _defaults_afterwards() -> Iterator[None]:
    kernel_api.use_own_pool()
    yield
    kernel_api.set_threads(1)


@pytest.mark.parametrize("fmt", [INT4_IN, INT4_OUT, WeightFormat(Kind.INT8, 128, int8_activations=True)], ids=str)
@pytest.mark.parametrize("tokens", [1, 4, 70])
def test_any_number_of_threads_gives_the_same_bits(fmt: WeightFormat, tokens: int) -> None:
    """Also more threads than cores, and than there is work; few and many tokens take different ways."""
    rng = np.random.default_rng(tokens)
    block = random_block(
        rng, experts=12, d=256, width=128, top_k=3, routed=fmt, shared_width=256, shared=INT4_IN, selection_bias=True
    )
    dense = random_weight(rng, fmt, 384, 256)
    x = rng.standard_normal((tokens, 256), dtype=np.float32)
    results = []
    for threads in (1, 2, 3, 8, 64):
        kernel_api.set_threads(threads)
        results.append((*block.prepared(x), kernel_api.linear(x, dense.packed, 384, fmt)))
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert np.array_equal(a, b)


def _run(program: str) -> str:
    """Output of a Python program with `linear()` and `kernel_api`; it ends with status 0 within a minute."""
    head = """
import os, resource, sys
import numpy as np
from moec.runtime import kernel_api
from moec.runtime.moe_config import Kind, WeightFormat
kernel_api.use_own_pool()
fmt = WeightFormat(Kind.INT4, 32, int8_activations=True)
rng = np.random.default_rng(0)
codes = rng.integers(0, 256, (1, 512, 128), dtype=np.uint8)
w = kernel_api.pack(codes, np.full((1, 512, 8), 0.01, np.float16), 512, 256, fmt)
x = rng.standard_normal((20, 256), dtype=np.float32)
linear = lambda: kernel_api.linear(x, w, 512, fmt)
kernel_api.set_threads(1)
alone = linear()
"""
    done = subprocess.run(
        [sys.executable, "-c", head + program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_forked_child_has_threads_of_its_own() -> None:
    """It once went on with its parent's, of which it has none: one thread did all the work, and a change of their
    number joined threads that do not exist."""
    if not sys.platform.startswith("linux"):
        pytest.skip("threads are counted in Linux's /proc")
    program = """
def same(threads):
    assert kernel_api.library().moec_get_threads() == threads
    return all(np.array_equal(linear(), alone) for _ in range(20))

def child(work):
    pid = os.fork()
    if pid == 0:
        os._exit(0 if work() else 1)
    assert os.waitpid(pid, 0)[1] == 0

kernel_api.set_threads(3)
assert same(3)

def grown():
    kernel_api.set_threads(5)
    return same(5)

def threads_now():
    return len(os.listdir("/proc/self/task"))

child(lambda: same(3) and threads_now() == 3)
child(lambda: grown() and threads_now() == 5)
child(lambda: child(grown) is None and same(3))
assert same(3)
kernel_api.set_threads(2)
assert same(2)
print("done")
"""
    assert _run(program) == "done\n"


def test_a_system_that_allows_no_more_threads() -> None:
    program = """
# 256 stacks of 8 MB do not fit into what is left of the address space
taken = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
resource.setrlimit(resource.RLIMIT_AS, (taken + (400 << 20), resource.RLIM_INFINITY))
try:
    kernel_api.set_threads(256)
except kernel_api.KernelError as error:
    assert "the system does not allow 256 threads" in str(error), error
else:
    sys.exit("256 threads came up")
assert kernel_api.library().moec_get_threads() == 1
assert np.array_equal(linear(), alone)
kernel_api.set_threads(2)
assert np.array_equal(linear(), alone)
print("done")
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("the limit of the address space is Linux's")
    assert _run(program) == "done\n"


def test_many_short_operators_on_more_threads_than_cores() -> None:
    """Nobody waits for a thread that has no core: thousands of jobs of microseconds end."""
    program = """
kernel_api.set_threads(64)
small = np.ascontiguousarray(x[:1])
first = kernel_api.linear(small, w, 512, fmt)
for _ in range(3000):
    assert np.array_equal(kernel_api.linear(small, w, 512, fmt), first)
print("done")
"""
    assert _run(program) == "done\n"


def test_fast_cores_are_some_of_the_usable_ones() -> None:
    assert 1 <= kernel_api.library().moec_fast_cores() <= 256
