"""What `moec bench` times: the plan that `Target.bench` takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BenchPlan:
    """Lengths in tokens. `contexts` are the positions where decoding starts; empty: right after the prompt.

    `tokens` are the prompt's ids; None: `prefill` ids spread over the vocabulary, since a prompt of repeated tokens
    touches few experts and flatters speed and memory. Rates are medians over `repeats`.
    """

    prefill: int = 512
    decode: int = 64
    contexts: tuple[int, ...] = ()
    threads: int | None = None
    repeats: int = 3
    tokens: tuple[int, ...] | None = None
