"""Which quantization methods there are. No list is kept: a method is a file, or an entry point of a distribution.

A method is a file of `compiler/quantizers/`, or an entry point of the group `moec.quantizers`. Reading their names
imports none of them, since reading a spec does not import torch.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from importlib.metadata import entry_points

AUTO = "auto"  # several methods are computed, and the one of least divergence is taken
GROUP = "moec.quantizers"
PACKAGE = "moec.compiler.quantizers"


@cache
def own_methods() -> tuple[str, ...]:
    """The names of our methods: those of the files."""
    package = importlib.import_module(PACKAGE)
    return tuple(sorted(m.name for m in pkgutil.iter_modules(package.__path__)))


@cache
def method_names() -> tuple[str, ...]:
    """The methods that there are, ours first."""
    ours = own_methods()
    return (*ours, *sorted({p.name for p in entry_points(group=GROUP)} - set(ours)))
