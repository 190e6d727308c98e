"""What a target makes of a model's weights: the interface that `targets/<name>/footprint.py` fills.

A target without that file cannot be planned for. Sizes are bytes. `options` are the target's options of the spec.
"""

from __future__ import annotations

from typing import Any, Protocol

from moec.compiler.architecture import Architecture, Cache, Weight
from moec.compiler.spec.quantization import WeightScheme
from moec.compiler.states import Codes


class Footprint(Protocol):
    """`checked` says what its sizes were compared with, for people; `mapped`: stored weights are used in the file."""

    target: str
    checked: str
    mapped: bool

    def weight_bytes(self, weight: Weight, scheme: WeightScheme | None, options: Any) -> int:
        """Stored bytes of all `weight.count` matrices; `scheme` None is a float weight."""
        ...

    def copied_bytes(self, weight: Weight, scheme: WeightScheme | None, options: Any) -> int:
        """Bytes that the runtime keeps beside the stored weight, such as a repacked copy."""
        ...

    def cache_bytes(self, cache: Cache, codes: Codes | None, positions: int) -> int:
        """States of `positions` positions of one layer, in `codes` or as floats of the target's own type."""
        ...

    def constant_bytes(self, architecture: Architecture, positions: int) -> int:
        """Tables beside the weights, as far as `positions` positions read them."""
        ...

    def program_bytes(self, architecture: Architecture) -> int:
        """The graph itself, in the file."""
        ...

    def activation_bytes(self, architecture: Architecture, tokens: int, options: Any) -> int:
        """Largest working memory of one call of `tokens` tokens: arena and kernel scratch."""
        ...

    def runtime_bytes(self) -> int:
        """A process that runs models, without one."""
        ...

    def instructions(self, architecture: Architecture) -> int:
        """Instructions of one call."""
        ...

    def chunk(self, options: Any) -> int:
        """Most tokens of one call."""
        ...
