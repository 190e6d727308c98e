"""The roles of weights."""

from __future__ import annotations

from enum import StrEnum


class Role(StrEnum):
    """What a weight is for. Decides its quantization; set at export or by the pass that recognised the block."""

    ROUTER = "router"
    EXPERT = "expert"
    SHARED = "shared"
    ATTENTION = "attention"
    FFN = "ffn"
    EMBEDDING = "embedding"
    HEAD = "head"
    NORM = "norm"
    CACHE = "cache"
    CONSTANT = "constant"
    OTHER = "other"
