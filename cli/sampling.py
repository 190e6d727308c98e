"""Options of every command that samples; their defaults are what the artifact's generation_config.json recommends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moec.compiler.errors import UserError

if TYPE_CHECKING:
    from moec.assistant.sampling import Sampling

Temperature = Annotated[
    float | None, typer.Option(help="0 always takes the likeliest token. Default: what the model recommends, else 0.")
]
TopK = Annotated[int | None, typer.Option("--top-k", help="Sample from this many of the likeliest tokens; 0: all.")]
TopP = Annotated[
    float | None,
    typer.Option("--top-p", help="Sample from the fewest likeliest tokens whose probabilities sum to this."),
]
MinP = Annotated[
    float | None,
    typer.Option("--min-p", help="Sample from tokens with at least this fraction of the likeliest's probability."),
]
RepeatPenalty = Annotated[
    float | None, typer.Option(help="Divide the logits of tokens that occurred by this; 1: no penalty.")
]
PresencePenalty = Annotated[
    float | None, typer.Option(help="Subtract this from the logits of tokens already generated.")
]
LogitBias = Annotated[
    list[str] | None, typer.Option(metavar="ID=BIAS", help="Add to the logit of a token id; may be repeated.")
]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same text. Default: 0.")]
Stop = Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End before this text; may be repeated.")]


def sampling_of(artifact: Path, *, logit_bias: Sequence[str] | None = None, **given: float | int | None) -> Sampling:
    """The options that were given, and for the others what the artifact's generation_config.json recommends.

    The options are checked before any file is read.
    """
    from moec.assistant.sampling import Sampling, recommended
    from moec.compiler.source import GENERATION

    bias = None if not logit_bias else _biases(logit_bias)
    Sampling().given(logit_bias=bias, **given)
    return recommended(artifact / GENERATION).given(logit_bias=bias, **given)


def _biases(given: Sequence[str]) -> Mapping[int, float]:
    found = {}
    for text in given:
        token, _, bias = text.partition("=")
        try:
            found[int(token)] = float(bias)
        except ValueError:
            raise UserError(f"--logit-bias {text[:40]!r} is not ID=BIAS", remedy="write it as 42=-1.5") from None
    return found
