"""Methods of quantization: found by file or entry point, and what each kind of fault says."""

from __future__ import annotations

from importlib.metadata import EntryPoint, EntryPoints
from typing import Any

import pytest
import torch
from torch import Tensor

from moec.compiler import quantizer
from moec.compiler.errors import CompileError, UserError
from moec.compiler.quant import QuantizedTensor, quantize_weight
from moec.compiler.quantizer import Inputs, Quantizer, codes_of, find_quantizer
from moec.compiler.spec import methods
from moec.compiler.spec.quantization import Quantization, WeightScheme
from moec.compiler.weights import LazyWeight


class Halved(Quantizer):
    """Scales that are half of rtn's: a method that another distribution brings."""

    def quantize(self, w_RL: Tensor, scheme: WeightScheme, inputs: Inputs | None) -> QuantizedTensor:
        given = quantize_weight(w_RL, bits=scheme.bits, group_size=scheme.group_size)
        return QuantizedTensor(given.codes, given.scales / 2, given.bits, given.group_size)


class NeedsText(Halved):
    observes = Inputs


HALVED, NEEDS_TEXT, NOT_ONE = Halved(), NeedsText(), object()


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = EntryPoints(
        EntryPoint(name, f"{__name__}:{value}", methods.GROUP)
        for name, value in (
            ("halved", "HALVED"),
            ("text", "NEEDS_TEXT"),
            ("wrong", "NOT_ONE"),
            ("gone", "MISSING"),
            ("rtn", "HALVED"),
        )
    )
    for module in (methods, quantizer):
        monkeypatch.setattr(module, "entry_points", lambda group: found)
    for cached in (methods.own_methods, methods.method_names, find_quantizer):
        cached.cache_clear()
    yield
    monkeypatch.undo()
    for cached in (methods.own_methods, methods.method_names, find_quantizer):
        cached.cache_clear()


def lazy(w: Tensor) -> LazyWeight:
    return LazyWeight(tuple(w.shape), w.dtype, lambda: w)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def test_ours_are_files() -> None:
    assert "rtn" in methods.method_names()
    assert all(isinstance(find_quantizer(name), Quantizer) for name in methods.own_methods())


def test_a_spec_may_name_only_those_there_are() -> None:
    assert Quantization.model_validate({"weights": "int4"}).method == "rtn"
    faults = list(Quantization.faults({"weights": "int4", "method": "rnt"}))
    assert len(faults) == 1
    assert "no quantization method 'rnt'; known here: " in faults[0].message


@pytest.mark.usefixtures("installed")
def test_an_entry_point_is_a_method() -> None:
    w = random(4, 64)
    scheme = WeightScheme(4, 32)
    given = codes_of(lazy(w), scheme, method="halved")
    rtn = codes_of(lazy(w), scheme)
    assert torch.equal(given.codes, rtn.codes)
    assert torch.equal(given.scales * 2, rtn.scales)
    assert not list(Quantization.faults({"weights": "int4", "method": "halved"}))


@pytest.mark.usefixtures("installed")
def test_ours_come_before_an_entry_point_of_the_same_name() -> None:
    assert not isinstance(find_quantizer("rtn"), Halved)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wrong", "is object, not a Quantizer"),
        ("gone", "failed: module .* has no attribute"),
        ("other", "there is no quantization method 'other'"),
    ],
)
def test_entry_points_that_cannot_be_used(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_quantizer(name)


@pytest.mark.usefixtures("installed")
def test_a_method_that_observes_is_not_run_without_text() -> None:
    with pytest.raises(CompileError, match=r"^w: the method text needs inputs of this weight, and nothing calibrated"):
        codes_of(lazy(random(4, 64)), WeightScheme(4, 32), name="w", method="text")


@pytest.mark.parametrize("axis", ["in", "out"])
def test_experts_one_by_one_are_the_stack(axis: Any) -> None:
    """A stack is quantized expert by expert, and lies transposed where its groups lie along the other dimension."""
    w_EKN = random(3, 64, 96)
    whole = codes_of(lazy(w_EKN), WeightScheme(4, 32, axis), orientation="in_out")
    for expert, w_KN in enumerate(w_EKN):
        alone = quantize_weight(w_KN if axis == "out" else w_KN.t(), bits=4, group_size=32)
        assert torch.equal(whole.codes[expert], alone.codes)
        assert torch.equal(whole.scales[expert], alone.scales)
