"""What a target tells `moec plan`: the sizes of a model in its format, and how fast its kernels are.

`Target.footprint` gives one; a target without it cannot be planned for. Sizes are bytes. `options` are the target's
options of the spec.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from moec.compiler.architecture import Architecture, Cache, Weight
from moec.compiler.rates import Rates, cpu_peak
from moec.compiler.spec.device import Device
from moec.compiler.spec.quantization import WeightScheme
from moec.compiler.states import Codes


class Footprint(ABC):
    """`checked` says what its sizes were compared with, for people; `mapped`: stored weights are used in the file."""

    target: ClassVar[str]
    checked: ClassVar[str]
    mapped: ClassVar[bool]

    @abstractmethod
    def weight_bytes(self, weight: Weight, scheme: WeightScheme | None, options: Any) -> int:
        """Stored bytes of all `weight.count` matrices; `scheme` None is a float weight."""

    def holds(self, weight: Weight, scheme: WeightScheme, options: Any) -> bool:
        """Whether the target's kernels for this weight read codes of the scheme."""
        return True

    @abstractmethod
    def copied_bytes(self, weight: Weight, scheme: WeightScheme | None, options: Any) -> int:
        """Bytes that the runtime keeps beside the stored weight, such as a repacked copy."""

    def cached(self, cache: Cache) -> Cache:
        """One layer's cache as this target has it, which may cache latents in place of keys and values."""
        return cache

    @abstractmethod
    def cache_bytes(self, cache: Cache, codes: Codes | None, positions: int) -> int:
        """States of `positions` positions of one layer, in `codes` or as floats of the target's own type."""

    @abstractmethod
    def constant_bytes(self, architecture: Architecture, positions: int) -> int:
        """Tables beside the weights, as far as `positions` positions read them."""

    @abstractmethod
    def program_bytes(self, architecture: Architecture) -> int:
        """The graph itself, in the file."""

    @abstractmethod
    def activation_bytes(self, architecture: Architecture, tokens: int, options: Any) -> int:
        """Largest working memory of one call of `tokens` tokens: arena and kernel scratch."""

    @abstractmethod
    def runtime_bytes(self) -> int:
        """Memory of a process before a model is loaded."""

    @abstractmethod
    def instructions(self, architecture: Architecture) -> int:
        """Instructions of one call."""

    @abstractmethod
    def chunk(self, options: Any) -> int:
        """Most tokens of one call."""

    def peak(self, device: Device, *, integer: bool) -> float:
        """Upper bound of operations per second on `device`, multiplies and adds counted apart. `integer`: activations
        are INT8. By default the peak of the CPU threads that the device file assumes."""
        return cpu_peak(device, integer=integer)

    def rates(self, device: Device, reference: Device | None) -> Rates | None:
        """Measured rates of the target's kernels on `device`, for expected speeds; None where none were timed.

        `reference`: the shipped device whose kernel measurements stand in for a device without its own.
        """
        return None
