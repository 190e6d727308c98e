"""Specs: what a user asks for, read strictly and with the place of every fault."""

from moec.compiler.spec.loader import as_spec, load_spec, parse_spec
from moec.compiler.spec.model import Quantization, Spec, WeightScheme

__all__ = [
    "Quantization",
    "Spec",
    "WeightScheme",
    "as_spec",
    "load_spec",
    "parse_spec",
]
