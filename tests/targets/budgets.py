"""A small mixture whose experts are read within budgets, and budgets that do not depend on what the test process holds.

The least budget is that of the process as it is: it may grow by megabytes before the next line.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from moec.compiler.errors import RunError
from moec.compiler.spec import Spec
from moec.targets.xnnpack.session import CpuSession

AMPLE_MB = 1_000_000  # more than any process that runs tests: nothing is given up
LAYERS, EXPERTS, TOP_K, VOCAB = 4, 64, 3, 300
EXPERT_BYTES = 3 * 256 * 256 * (0.5 + 2 / 32)  # three matrices of INT4 codes with an FP16 scale for each 32
MODEL: dict[str, Any] = {
    "architecture": "mobilemoe", "layers": LAYERS, "d_model": 256, "heads": 4, "kv_heads": 2, "head_dim": 64,
    "vocab_size": VOCAB, "context": 192, "rope": {"theta": 10000.0, "interleaved": True},
    "moe": {"experts": EXPERTS, "top_k": TOP_K, "expert_width": 256, "shared_width": 64},
}  # fmt: skip


def spec(**options: Any) -> Spec:
    quantization = {"weights": "int4", "group_size": 32}
    targets = {"xnnpack": {"max_tokens": 128, **options}}
    return Spec.model_validate({"name": "many", "model": MODEL, "quantization": quantization, "targets": targets})


def changed(options: dict[str, Any], **model: Any) -> Spec:
    """The spec with other options of the target and other sizes."""
    given = spec(**options).model_dump(mode="json", exclude_none=True)
    return Spec.model_validate({**given, "model": {**MODEL, **model}})


def least_mb(model: Path, threads: int = 1) -> int:
    """The least budget of this process now, as the refusal of a smaller one says it."""
    with pytest.raises(RunError) as caught:
        CpuSession(model, threads=threads, memory_mb=1)
    found = re.search(
        r"a memory budget of 1 MB is less than (\d+) MB: \d+ for all but .* experts of one token", str(caught.value)
    )
    assert found, caught.value
    return int(found[1])


def opened_within(model: Path, more: int, **options: Any) -> CpuSession:
    """A session within the least budget and `more` megabytes. options: of CpuSession."""
    budget = 1
    for _ in range(5):
        try:
            return CpuSession(model, memory_mb=budget, **options)
        except RunError as error:
            found = re.search(r"is less than (\d+) MB", str(error))
            if found is None:
                raise
            budget = int(found[1]) + more
    raise AssertionError(f"the process grows faster than a session is opened: {budget} MB")
