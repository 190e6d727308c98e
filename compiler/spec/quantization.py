"""The `quantization:` section: which weights are stored how, decided by role and never by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from moec.compiler.spec.methods import method_names
from moec.compiler.spec.strict import Fault, Section

if TYPE_CHECKING:
    from moec.compiler.program import Role

WeightType = Literal["int4", "int8", "fp32"]
Axis = Literal["in", "out"]
_BITS = {"int4": 4, "int8": 8}


@dataclass(frozen=True)
class WeightScheme:
    """How one weight is stored: symmetric codes of `bits`, one scale per `group_size` elements along `axis`.

    axis `in` groups along the reduction dimension of the product, `out` along its output features.
    """

    bits: int
    group_size: int
    axis: Axis = "in"


class RoleQuantization(Section):
    """An override for one role. `int8` alone is short for `{weights: int8}`."""

    weights: WeightType
    group_size: Literal[32, 64, 128, 256] | None = None


def _short(value: Any) -> Any:
    return {"weights": value} if isinstance(value, str) else value


_TYPES = ["int4", "int8", "fp32"]
RoleOverride = Annotated[
    RoleQuantization | None,
    BeforeValidator(_short),
    WithJsonSchema(
        {
            "anyOf": [
                {"enum": _TYPES},
                {
                    "type": "object",
                    "properties": {"weights": {"enum": _TYPES}, "group_size": {"enum": [32, 64, 128, 256]}},
                    "required": ["weights"],
                    "additionalProperties": False,
                },
                {"type": "null"},
            ]
        }
    ),
]


class Quantization(Section):
    """Symmetric integer weights in groups (MobileMoE Eq. 6), dynamic INT8 activations, INT8 KV cache.

    The router and the norms are always fp32. `embedding` is the token table, which is also the output head when
    embeddings are tied; `head` is an output head of its own. `experts`, `shared`, `attention`, `ffn` override `weights`
    for one role. `expert_group_axis: out` is the axis of released MobileMoE INT4 checkpoints, whose codes are carried
    through unchanged; linears are always grouped along their input.
    """

    weights: WeightType = Field(description="type of every weight matrix that no override below names")
    group_size: Literal[32, 64, 128, 256] = Field(default=32, description="elements that share one scale")
    method: str = Field(default="rtn", description="how codes are computed: round to nearest, or another method")
    activations: Literal["int8", "fp32"] = Field(default="int8", description="dynamic, one scale per token")
    kv_cache: Literal["int8", "fp32"] = Field(default="int8", description="one scale per token and KV head")
    router: Literal["fp32"] = Field(default="fp32", description="always fp32; written out for the reader")
    expert_group_axis: Axis = Field(default="out", description="dimension along which experts are grouped")
    embedding: RoleOverride = None
    head: RoleOverride = None
    experts: RoleOverride = None
    shared: RoleOverride = None
    attention: RoleOverride = None
    ffn: RoleOverride = None

    @classmethod
    def faults(cls, raw: Mapping[str, Any]) -> Iterator[Fault]:
        router = raw.get("router", "fp32")
        if router != "fp32":
            yield Fault(("router",), "the router is always fp32: an integer router changes which experts are selected")
        method = raw.get("method", "rtn")
        if isinstance(method, str) and method not in method_names():
            known = ", ".join(method_names())
            yield Fault(("method",), f"there is no quantization method {method!r}; known here: {known}")

    def _override(self, role: str) -> RoleQuantization | None:
        return {
            "embedding": self.embedding,
            "head": self.head or self.embedding,
            "expert": self.experts,
            "shared": self.shared,
            "attention": self.attention,
            "ffn": self.ffn,
        }.get(role)

    def scheme(self, role: Role) -> WeightScheme | None:
        """How weights of `role` are stored; None means fp32 (always so for the router, norms, caches, constants)."""
        return self.scheme_of(role.value)

    def scheme_of(self, role: str) -> WeightScheme | None:
        """`scheme` of a role by its name, for callers that do without the graph's types."""
        if role not in ("embedding", "head", "expert", "shared", "attention", "ffn"):
            return None
        override = self._override(role)
        kind = override.weights if override else self.weights
        if kind == "fp32":
            return None
        group_size = (override.group_size if override else None) or self.group_size
        return WeightScheme(_BITS[kind], group_size, self.expert_group_axis if role == "expert" else "in")
