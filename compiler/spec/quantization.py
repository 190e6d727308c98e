"""The `quantization:` section: which weights are stored how, decided by role and never by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema

from moec.compiler.spec.methods import AUTO, method_names
from moec.compiler.spec.strict import Fault, Section
from moec.compiler.states import PER_TOKEN_AND_HEAD, Codes

if TYPE_CHECKING:
    from moec.compiler.levels import Grid
    from moec.compiler.roles import Role

WeightType = Literal["nl3", "int4", "iq4_nl", "fp4", "int8", "fp32"]
Axis = Literal["in", "out"]
LoosePath = Annotated[Path, Field(strict=False)]
_CODES = {  # bits that tensors hold a code in, and the table of levels
    "nl3": (4, "nl3"),
    "int4": (4, ""),
    "iq4_nl": (4, "iq4_nl"),
    "fp4": (4, "fp4"),
    "int8": (8, ""),
}


@dataclass(frozen=True)
class WeightScheme:
    """How one weight is stored: symmetric codes of `bits`, one scale per `group_size` elements along `axis`.

    axis `in` groups along the reduction dimension of the product, `out` along its output features. levels: the table
    whose values the codes number (`compiler/levels.py`).
    """

    bits: int
    group_size: int
    axis: Axis = "in"
    levels: str = ""

    @property
    def grid(self) -> Grid:
        """What the codes stand for."""
        from moec.compiler.levels import Grid  # which imports torch; specs are read without it

        return Grid(self.bits, self.levels)

    @property
    def weights(self) -> str:
        """The type as a spec names it."""
        return self.levels or f"int{self.bits}"


def scheme_of_type(weights: WeightType, group_size: int, axis: Axis) -> WeightScheme:
    """The scheme of codes of a type that a spec names; ValueError for fp32, which has none."""
    if weights == "fp32":
        raise ValueError("fp32 weights are no codes")
    bits, levels = _CODES[weights]
    return WeightScheme(bits, group_size, axis, levels)


class RoleQuantization(Section):
    """An override for one role. `int8` alone is short for `{weights: int8}`.

    int4 and int8 are whole numbers times a scale; iq4_nl are 16 levels of 4 bits, denser around zero, fp4 those of
    E2M1, as in MXFP4, and nl3 are 8 levels of 3 bits.
    """

    weights: WeightType
    group_size: Literal[32, 64, 128, 256] | None = None


def _short(value: Any) -> Any:
    return {"weights": value} if isinstance(value, str) else value


_TYPES = list(get_args(WeightType))
_OVERRIDE: list[dict[str, Any]] = [
    {"enum": _TYPES},
    {
        "type": "object",
        "properties": {"weights": {"enum": _TYPES}, "group_size": {"enum": [32, 64, 128, 256]}},
        "required": ["weights"],
        "additionalProperties": False,
    },
    {"type": "null"},
]
RoleOverride = Annotated[
    RoleQuantization | None,
    BeforeValidator(_short),
    WithJsonSchema({"anyOf": _OVERRIDE}),
]
TensorOverride = Annotated[
    RoleQuantization,
    BeforeValidator(_short),
    WithJsonSchema({"anyOf": _OVERRIDE[:2]}),
]


_CACHES: dict[str, Codes | None] = {"fp32": None, "int8": PER_TOKEN_AND_HEAD}


class ActivationQuantization(Section):
    """How inputs of products with quantized weights are rounded as the model runs: symmetric, by their own magnitudes.

    bits: 8, or 32 for fp32 arithmetic. group: inputs of a token that share a scale, 32 or `token` for all of them;
    `auto` is 32 for weights grouped along their input and `token` for those grouped along their output, where the
    kernels would be slower with blocks. `int8` is short for `{bits: 8, group: token}`, `fp32` for `{bits: 32}`.
    """

    bits: Literal[8, 32] = 8
    group: Literal[32, "token", "auto"] = "auto"

    @classmethod
    def faults(cls, raw: Mapping[str, Any]) -> Iterator[Fault]:
        if raw.get("bits") == 32 and raw.get("group", "auto") != "auto":
            yield Fault(("group",), "fp32 activations have no scales: leave group out")


FLOAT_ACTIVATIONS = ActivationQuantization(bits=32)
_ACTIVATIONS = {"int8": ActivationQuantization(group="token"), "fp32": FLOAT_ACTIVATIONS}


def _activations(value: Any) -> Any:
    return _ACTIVATIONS.get(value, {"bits": value}) if isinstance(value, str) else value


def _shortest(value: ActivationQuantization) -> str | dict[str, Any]:
    """The name that artifacts have always recorded, where there is one."""
    name = next((name for name, known in _ACTIVATIONS.items() if known == value), None)
    return name or {"bits": value.bits, "group": value.group}


Activations = Annotated[
    ActivationQuantization,
    BeforeValidator(_activations),
    PlainSerializer(_shortest),
    WithJsonSchema(
        {
            "anyOf": [
                {"enum": [*_ACTIVATIONS]},
                {
                    "type": "object",
                    "properties": {"bits": {"enum": [8, 32]}, "group": {"enum": [32, "token", "auto"]}},
                    "additionalProperties": False,
                },
            ]
        }
    ),
]


class Calibration(Section):
    """Text that a method of quantization runs the model on. Without a key, shipped text of all domains.

    text: a file; jsonl: a file with an object a line that has `text` and may have `domain`; domains: of the shipped
    text. Every expert sees `tokens_per_expert` tokens: where the router sends fewer, those it scores highest are added.
    Layers or experts (LAYER.NUMBER) of `uncalibrated` may see fewer.
    """

    text: LoosePath | None = None
    jsonl: LoosePath | None = None
    domains: Annotated[tuple[str, ...], Field(strict=False)] | None = None
    tokens: int = Field(default=32768, ge=1, le=1 << 24, description="at most; fewer if there is less text")
    tokens_per_expert: int = Field(default=128, ge=0, le=1 << 20)
    uncalibrated: Annotated[tuple[str, ...], Field(strict=False)] = ()

    @classmethod
    def faults(cls, raw: Mapping[str, Any]) -> Iterator[Fault]:
        given = [key for key in ("text", "jsonl", "domains") if raw.get(key) is not None]
        if len(given) > 1:
            yield Fault((given[1],), f"only one of text, jsonl and domains can be given, {given[0]} is")


class Quantization(Section):
    """Weights of 3, 4 or 8 bits in groups (MobileMoE Eq. 6; `nl3`, `iq4_nl` and `fp4` by levels), dynamic INT8
    activations, INT8 KV cache.

    The router and the norms are always fp32. `embedding` is the token table, which is also the output head when
    embeddings are tied; `head` is an output head of its own. `experts`, `shared`, `attention`, `ffn` override `weights`
    for one role. `tensors` are exceptions by the names of weights, as `moec quantize` writes them: `*` stands for any
    part of a name, and the last pattern that matches decides. `expert_group_axis: out` is the axis of released
    MobileMoE INT4 checkpoints, whose codes are carried through unchanged; linears are always grouped along their input.
    """

    weights: WeightType = Field(description="type of every weight matrix that no override below names")
    group_size: Literal[32, 64, 128, 256] = Field(default=32, description="elements that share one scale")
    method: str = Field(default="rtn", description="how codes are computed: round to nearest, or another method")
    calibration: Calibration | None = None
    activations: Activations = Field(
        default=ActivationQuantization(), description="dynamic, one scale per token or per 32 of its inputs"
    )
    kv_cache: Literal["int8", "fp32"] = Field(default="int8", description="one scale per token and KV head")
    router: Literal["fp32"] = Field(default="fp32", description="always fp32; written out for the reader")
    expert_group_axis: Axis = Field(default="out", description="dimension along which experts are grouped")
    embedding: RoleOverride = None
    head: RoleOverride = None
    experts: RoleOverride = None
    shared: RoleOverride = None
    attention: RoleOverride = None
    ffn: RoleOverride = None
    tensors: dict[str, TensorOverride] = Field(default_factory=dict, description="exceptions by the names of weights")

    @classmethod
    def faults(cls, raw: Mapping[str, Any]) -> Iterator[Fault]:
        router = raw.get("router", "fp32")
        if router != "fp32":
            yield Fault(("router",), "the router is always fp32: an integer router changes which experts are selected")
        method = raw.get("method", "rtn")
        if isinstance(method, str) and method not in (AUTO, *method_names()):
            known = ", ".join((*method_names(), AUTO))
            yield Fault(("method",), f"there is no quantization method {method!r}; known here: {known}")

    @property
    def cache_codes(self) -> Codes | None:
        """How KV caches are held: None as they are, in fp32."""
        return _CACHES[self.kv_cache]

    def _override(self, role: str) -> RoleQuantization | None:
        return {
            "embedding": self.embedding,
            "head": self.head or self.embedding,
            "expert": self.experts,
            "shared": self.shared,
            "attention": self.attention,
            "ffn": self.ffn,
        }.get(role)

    def scheme(self, role: Role, name: str | None = None) -> WeightScheme | None:
        """How the weight `name` of `role` is stored, or any of `role` that no pattern names; None means fp32 (always so
        for the router, norms, caches, constants)."""
        return self.scheme_of(role.value, name)

    @property
    def int8_activations(self) -> bool:
        """Whether products with quantized weights round what they are multiplied with."""
        return self.activations.bits == 8

    @property
    def rounds(self) -> bool:
        """Whether anything is rounded as the model runs: activations, or keys and values."""
        return self.int8_activations or self.cache_codes is not None

    def activation_block(self, role: Role, name: str | None = None) -> int:
        """Inputs of a token that share a scale when weights of `role` multiply them; 0: all, or they are not rounded.

        Shared experts round as the routed ones, with which they are one operator.
        """
        scheme = self.scheme_of("expert" if role.value == "shared" else role.value, name)
        if scheme is None or not self.int8_activations or self.activations.group == "token":
            return 0
        return 0 if self.activations.group == "auto" and scheme.axis == "out" else 32

    def scheme_of(self, role: str, name: str | None = None) -> WeightScheme | None:
        """`scheme` of a role by its name, for callers that do without the graph's types."""
        if role not in ("embedding", "head", "expert", "shared", "attention", "ffn"):
            return None
        override = self._override(role)
        if name is not None:
            override = next((o for p, o in reversed(self.tensors.items()) if fnmatchcase(name, p)), override)
        kind = override.weights if override else self.weights
        if kind == "fp32":
            return None
        group_size = (override.group_size if override else None) or self.group_size
        return scheme_of_type(kind, group_size, self.expert_group_axis if role == "expert" else "in")
