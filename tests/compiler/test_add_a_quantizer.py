"""docs/add-a-quantizer.md, executed: the page's file is a method that a spec names, and does what the page says."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from moec.compiler import quantizers
from moec.compiler.quantizer import Quantizer, find_quantizer, quantize_matrices
from moec.compiler.spec import methods
from moec.compiler.spec.quantization import Quantization, WeightScheme

PAGE = Path(__file__).parents[2] / "docs" / "add-a-quantizer.md"


def forget() -> None:
    for found in (methods.own_methods, methods.method_names, find_quantizer):
        found.cache_clear()
    sys.modules.pop(f"{methods.PACKAGE}.clipped", None)


@pytest.fixture
def clipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Quantizer]:
    """The page's file where the others are: a second folder of their package."""
    with pytest.raises(ValidationError, match="clipped"):
        Quantization(weights="int4", method="clipped")
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.S)
    (tmp_path / "clipped.py").write_text(code, "utf-8")
    monkeypatch.setattr(quantizers, "__path__", [*quantizers.__path__, str(tmp_path)])
    forget()
    yield find_quantizer("clipped")
    monkeypatch.undo()
    forget()


@pytest.mark.parametrize("bits", [4, 8])
def test_the_page(clipped: Quantizer, bits: int) -> None:
    """Its own test says: outliers are cut, and others are moved by no more than half a step.

    Scales are stored in FP16, so a step is off by 2^-11 of itself, and a code of 127 by 127 times that: 0.07 of a step.
    """
    assert Quantization(weights="int4", method="clipped").method == "clipped"
    w = torch.randn(24, 256, generator=torch.Generator().manual_seed(0))
    w[:, ::128] = 40.0  # one of each group
    found = quantize_matrices(clipped, w, WeightScheme(bits, 128))
    back = found.dequantize(torch.float32)
    steps = found.scales.float().repeat_interleave(128, -1)
    far = w.abs() > (2 ** (bits - 1) - 0.5) * steps
    assert far[:, ::128].all()
    assert ((back - w).abs() <= (0.5 + 0.07) * steps)[~far].all()
    assert (back[far].abs() < 20).all()
