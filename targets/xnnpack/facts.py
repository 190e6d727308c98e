"""What an XNNPACK artifact's manifest records, and the tables that `moec inspect` makes of it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from moec.compiler.target import Facts, Table
from moec.compiler.units import size

PRODUCTS = frozenset({"mm", "bmm", "addmm", "linear", "convolution", "_cdist_forward", "_pdist_forward", "cumsum"})


class MethodFacts(BaseModel):
    """One entry point. arena_bytes: planned memory; activations first, then what methods share (the caches)."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    instructions: int
    delegates: int = 0
    delegate_calls: int = 0
    arena_bytes: tuple[int, ...] = ()


class XnnpackFacts(Facts):
    """operators: calls in all methods, by name. delegated_roles: roles of weights that the XNNPACK delegate holds."""

    methods: dict[str, MethodFacts] = Field(default_factory=dict)
    operators: dict[str, int] = Field(default_factory=dict)
    delegate_bytes: int = 0
    delegated_roles: tuple[str, ...] = ()

    @property
    def exact_calls(self) -> bool:
        """Whether a token's numbers are the same bits alone and among others.

        Our kernels keep to it, and operators that work on elements or rows do; of the products of libraries it is not
        known for every size.
        """
        names = {name.removeprefix("aten::").partition(".")[0] for name in self.operators}
        return bool(names) and not names & PRODUCTS and not any(m.delegates for m in self.methods.values())


def tables(facts: XnnpackFacts) -> list[Table]:
    """Entry points with their planned memory, and how often each operator is called."""
    rows = [
        (n, m.instructions, m.delegate_calls, size(sum(m.arena_bytes[:1])), size(sum(m.arena_bytes[1:])))
        for n, m in facts.methods.items()
    ]
    columns = ("method", "instructions", "delegate calls", "activations", "caches")
    calls = sorted(facts.operators.items(), key=lambda item: (-item[1], item[0]))
    return [
        Table("Methods", columns, tuple(rows), right=(1, 2, 3, 4)),
        Table("Operators of all methods", ("operator", "calls"), tuple(calls), right=(1,)),
    ]
