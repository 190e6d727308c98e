"""What a Metal artifact's manifest records, and the tables that `moec inspect` makes of it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from moec.compiler.target import Facts, Table
from moec.compiler.units import size


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Tap(_Record):
    """Where a traced MoE layer's values lie: ids of tensors, readable behind the instruction `after`."""

    layer: int
    after: int
    x: int
    indices: int
    weights: int
    y: int


class MethodFacts(_Record):
    """One entry point. payload_sha256: of the delegate's instructions; a flatbuffer has no checksum of its own."""

    payload_bytes: int
    instructions: dict[str, int]
    payload_sha256: str | None = None
    delegates: int = 1
    moe_taps: tuple[Tap, ...] = ()


class Chunking(_Record):
    """How an application should cut prompts: at most `max_tokens` a call, and advice for people."""

    max_tokens: int
    advice: str


class MetalFacts(Facts):
    """kv_cache, activations: their types in the program. requantized_sqnr_db: weights whose scales were rounded."""

    kv_cache: str = "float16"
    activations: str = "float16"
    methods: dict[str, MethodFacts] = Field(default_factory=dict)
    requantized_sqnr_db: dict[str, float] = Field(default_factory=dict)
    chunking: Chunking | None = None
    unchecked_without_apple_hardware: tuple[str, ...] = ()


def tables(facts: MetalFacts) -> list[Table]:
    """Entry points with their delegates, instructions of the first, and the advice on chunks."""
    if not facts.methods:
        return []
    rows = [(n, m.delegates, sum(m.instructions.values()), size(m.payload_bytes)) for n, m in facts.methods.items()]
    name, first = next(iter(facts.methods.items()))
    counts = sorted(first.instructions.items(), key=lambda item: (-item[1], item[0]))
    found = [
        Table("Methods", ("method", "delegates", "instructions", "program"), tuple(rows), right=(1, 2, 3)),
        Table(f"Instructions of {name}", ("instruction", "count"), tuple(counts), right=(1,)),
    ]
    if facts.chunking is not None:
        found.append(Table("Chunks", ("most tokens", "advice"), ((facts.chunking.max_tokens, facts.chunking.advice),)))
    return found
