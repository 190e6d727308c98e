"""Artifacts that were written before an operator's arguments changed still open, and answer as they did then.

`tests/golden/written_before` holds artifacts of one-layer models with the logits [7, V] that they gave when they were
written: a prompt of five tokens, every row, then two decode steps. `moec::cached_attention_q8.out` stands in `int8`,
`moec::cached_attention.out` in `fp32`, `moec::cached_attention.scales_out` in `scales`.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import moec
from moec.targets.xnnpack.operator_table import OLD

WRITTEN = Path(__file__).parent.parent / "golden" / "written_before"
ARTIFACTS = sorted(folder.name for folder in WRITTEN.iterdir() if folder.is_dir())


@pytest.mark.parametrize("name", ARTIFACTS)
def test_an_old_artifact_answers_as_it_did(name: str) -> None:
    """Integer products are exact and sums of fp32 here have at most 32 terms of order 10: another instruction set may
    order them otherwise, a few units in the last place of 16, which is 1e-6 each. Over INT8 caches queries and weights
    are rounded to 16 bits since, an error of at most 2^-16 of the largest element: 2.5e-4 of logits of 16 (5.4e-5 was
    seen)."""
    with moec.load(WRITTEN / name) as session:
        rows = [session.prefill([5, 63, 17, 2, 40], "all"), session.decode(9)[None], session.decode(33)[None]]
    found = np.concatenate([row.reshape(-1, session.vocab_size) for row in rows])
    np.testing.assert_allclose(found, np.load(WRITTEN / f"{name}.npy"), rtol=0, atol=1e-5 if name == "fp32" else 2.5e-4)


def test_every_old_name_stands_in_an_artifact_that_is_opened() -> None:
    """Else a name could be dropped, or its arguments change, with no test that fails."""
    manifests = [json.loads((WRITTEN / name / "manifest.json").read_text("utf-8")) for name in ARTIFACTS]
    named = {operator for manifest in manifests for operator in manifest["details"]["operators"]}
    assert set(OLD) <= named
