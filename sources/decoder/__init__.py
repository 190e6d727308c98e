"""The decoder that specs of `architecture: mobilemoe` and `mobilellm` describe."""

from moec.sources.decoder.decoder import Decoder
from moec.sources.decoder.layout import (
    WeightInfo,
    cache_names,
    constant_tensors,
    moe_layers,
    roles,
    weight_layout,
)

__all__ = [
    "Decoder",
    "WeightInfo",
    "cache_names",
    "constant_tensors",
    "moe_layers",
    "roles",
    "weight_layout",
]
