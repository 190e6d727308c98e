"""`tests/forked.py` in a process whose autograd has threads."""

from __future__ import annotations

import subprocess
import sys

THREADS = """
import sys
import torch
from tests.forked import children_train, ended, forked

class Nested(torch.autograd.Function):  # backward inside backward, deeper than one thread may go
    @staticmethod
    def forward(ctx, x, depth):
        ctx.depth = depth
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        if ctx.depth:
            with torch.enable_grad():
                Nested.apply(torch.ones(1, requires_grad=True), ctx.depth - 1).sum().backward()
        return grad, None

assert children_train()
assert ended(forked(["targets"])) == 0
Nested.apply(torch.ones(1, requires_grad=True), 80).sum().backward()
assert not children_train()
assert ended(forked(["targets"])) == 0
assert ended(forked(["inspect", "absent.yaml"])) == 2
"""


def test_a_child_of_a_process_with_threads_of_autograd() -> None:
    command = [sys.executable, "-W", "ignore", "-c", THREADS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
