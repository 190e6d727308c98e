"""Logits of many chunks of text with one layer's weights in memory at a time, so that a model may exceed memory.

T tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from moec.analysis.calibration.streaming import LayerStream
from moec.compiler.program import Program


def stream_logits(program: Program, chunks: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
    """Logits float32 [T, V] of each chunk, read from position 0 by its own empty caches, in order.

    Chunks have at most the program's `max_tokens` tokens. The output head runs chunk by chunk as logits are taken:
    those of all chunks may be larger than the model.
    """
    stream = LayerStream(program, chunks, result=True)
    *inner, last = stream
    for stretch in inner:
        if stream.joint(stretch) is None:
            stream.run(stretch, _unobserved)
        else:
            stream.run_joint(stretch)
    weights: dict[str, torch.Tensor] = {}
    for call in stream.calls:
        stream.run(last, _unobserved, calls=[call], weights=weights)
        (logits_TV,) = stream.results([call])
        call.values.clear()
        yield logits_TV.numpy()


def _unobserved(node: Node, args: tuple[Any, ...]) -> None:
    """What is computed here is not looked at."""
