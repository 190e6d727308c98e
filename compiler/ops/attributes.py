"""The attributes of a fused MoE node: `Routing` and `Experts`, each with one canonical text.

The text lists the fields that differ from their defaults, in declaration order, e.g.
`score=sigmoid,normalize=sum,scale=2.5`; equal attributes print equally. `parse` accepts exactly
what `str` prints and reports anything else.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, TypeVar

A = TypeVar("A", bound="_Attributes")


class _Attributes:
    """Text form of a flat frozen dataclass of bool, int, float and str fields."""

    def __str__(self) -> str:
        parts = []
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if value == f.default:
                continue
            text = (
                str(value).lower()
                if isinstance(value, bool)
                else repr(value)
                if isinstance(value, float)
                else str(value)
            )
            parts.append(f"{f.name}={text}")
        return ",".join(parts)

    @classmethod
    def parse(cls: type[A], text: str) -> A:
        """ValueError for an unknown field, a malformed or an inadmissible value."""
        fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        values: dict[str, Any] = {}
        for part in filter(None, text.split(",")):
            name, sep, raw = part.partition("=")
            if not sep or name not in fields or name in values:
                raise ValueError(f"{cls.__name__}: {part!r} is not one of {', '.join(fields)}")
            default = fields[name].default
            if isinstance(default, bool):
                if raw not in ("true", "false"):
                    raise ValueError(f"{cls.__name__}: {name} must be true or false, not {raw!r}")
                values[name] = raw == "true"
            else:
                kind: Any = type(default)
                values[name] = kind(raw)
        return cls(**values)


def _one_of(owner: str, name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{owner}: {name} must be one of {', '.join(allowed)}, not {value!r}")


SCORES = ("softmax", "sigmoid", "sqrtsoftplus", "sparsemixer")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")


@dataclass(frozen=True)
class Routing(_Attributes):
    """From router logits [N, E] to the selected experts and their combine weights.

    1. scores = score(logits); softmax is over all E. With `after_topk` or sparsemixer there is no score yet:
       scores = logits.
    2. choice = scores + selection_bias (`bias_on=scores`), or score(logits + selection_bias) (`bias_on=logits`).
    3. With `groups` > 0 the experts form that many consecutive groups; the `keep` groups with the best `group_score`
       (max, or sum of the two best choices) survive, the choices of the others become `fill` (zero or ninf).
    4. indices = topk(choice); weights = scores[indices] (never the biased ones).
    5. With `after_topk`: weights = score(weights), softmax over the k selected. With sparsemixer (arXiv 2409.12136, at
       inference), indices best first and best = scores[indices[k]]: weights[k] = exp(best) / sum(exp(scores[e])) over
       the experts e that were not selected before rank k, without those that are far from the best:
       (best - scores[e]) / max(|scores[e]|, best) > `threshold`.
    6. `normalize=sum`: weights /= max(sum(weights) + eps, clamp_min).
    7. weights *= scale. `apply=output` multiplies the expert's output, `apply=input` its input.
    """

    score: str = "softmax"
    after_topk: bool = False
    bias_on: str = "scores"
    groups: int = 0
    keep: int = 0
    group_score: str = "max"
    fill: str = "ninf"
    normalize: str = "none"
    eps: float = 0.0
    clamp_min: float = 0.0
    scale: float = 1.0
    apply: str = "output"
    threshold: float = 0.0

    def __post_init__(self) -> None:
        _one_of("Routing", "score", self.score, SCORES)
        _one_of("Routing", "bias_on", self.bias_on, ("scores", "logits"))
        _one_of("Routing", "group_score", self.group_score, ("max", "top2sum"))
        _one_of("Routing", "fill", self.fill, ("zero", "ninf"))
        _one_of("Routing", "normalize", self.normalize, ("none", "sum"))
        _one_of("Routing", "apply", self.apply, ("output", "input"))
        if self.groups < 0 or not 0 <= self.keep <= self.groups or (self.groups > 0) != (self.keep > 0):
            raise ValueError(f"Routing: keep {self.keep} of {self.groups} groups is not possible")
        if not 0 <= self.threshold < math.inf:
            raise ValueError(f"Routing: threshold must be a finite number from 0 on, not {self.threshold}")
        if self.score != "sparsemixer":
            if self.threshold:
                raise ValueError("Routing: a threshold belongs to sparsemixer")
        elif self.after_topk or self.groups or self.bias_on != "scores":
            raise ValueError("Routing: sparsemixer is for logits as they are: no after_topk, groups or bias_on")

    @property
    def selects_logits(self) -> bool:
        """Top-k sees the logits; what the weights are follows from those of the selected experts."""
        return self.after_topk or self.score == "sparsemixer"


@dataclass(frozen=True)
class Experts(_Attributes):
    """The expert MLP: y = W2 (act(clamp(gate)) * (clamp(up) + up_offset)) + b2, or W2 act(W1 x) when not `gated`.

    `layout=out_in`: w13 [E, 2F, D], w2 [E, D, F] (F.linear convention); `in_out`: w13 [E, D, 2F], w2 [E, F, D].
    Gate and up are the first and second half of the 2F outputs, or its even and odd elements when `interleaved`.
    silu is g * sigmoid(alpha * g). Clamps act before the activation.
    """

    layout: str = "out_in"
    activation: str = "silu"
    gated: bool = True
    interleaved: bool = False
    alpha: float = 1.0
    gate_min: float = -math.inf
    gate_max: float = math.inf
    up_min: float = -math.inf
    up_max: float = math.inf
    up_offset: float = 0.0

    def __post_init__(self) -> None:
        _one_of("Experts", "layout", self.layout, ("out_in", "in_out"))
        _one_of("Experts", "activation", self.activation, ACTIVATIONS)
        if self.interleaved and not self.gated:
            raise ValueError("Experts: only gated experts can be interleaved")
        if self.alpha != 1.0 and self.activation != "silu":
            raise ValueError("Experts: alpha belongs to silu")
