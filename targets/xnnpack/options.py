"""Options of the XNNPACK CPU target."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from moec.compiler.spec.strict import Section
from moec.compiler.spec.targets import TargetOptions

Kernel = Literal["auto", "moec", "xnnpack"]


class Kernels(Section):
    """Which kernel serves the dense weights of a role: ours, the XNNPACK delegate, or the target's own choice."""

    attention: Kernel = "auto"
    ffn: Kernel = "auto"
    head: Kernel = "auto"
    embedding: Kernel = "auto"


class Options(TargetOptions):
    """`max_tokens` is the longest chunk of one call; longer prompts are split: each chunk reads the weights again, and
    the activations of one take memory (a tenth faster at 256 than at 128 for MobileMoE-S, and 5 MB more).
    `threads`: the session's default.
    `memory_mb`: the most memory of a process that runs the artifact, in 10^6 bytes, by default: routed experts are read
    from the file as tokens choose them. `eviction`: which of them is given up (moec.targets.xnnpack.memory).
    """

    default: ClassVar[bool] = True
    saves_sessions: ClassVar[bool] = True
    threads: Annotated[int, Field(ge=1, le=256)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=8192)] = 256
    memory_mb: Annotated[int, Field(ge=1, le=1 << 24)] | None = None
    eviction: Literal["lru", "lfu", "lrfu"] = "lrfu"
    kernels: Kernels = Kernels()
