"""What an MLIR artifact's manifest records."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from moec.compiler.target import Facts

_Size = Annotated[int, Field(ge=1, lt=1 << 40)]


class Argument(BaseModel):
    """One argument of the function: a weight or a cache by its tensor, or an input. "T" is the number of tokens."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    kind: Literal["weight", "cache", "tokens", "start_pos"]
    dtype: str
    shape: tuple[_Size | Literal["T"], ...]
    tensor: str | None = None

    @model_validator(mode="after")
    def _named(self) -> Argument:
        if self.kind in ("weight", "cache") and not self.tensor:
            raise ValueError(f"a {self.kind} needs the name of its tensor")
        if self.kind == "cache" and "T" in self.shape:
            raise ValueError("the shape of a cache does not depend on the call")
        return self


class MlirFacts(Facts):
    """engine: what runs the program here (`jit` or `iree`). entry: the function. arguments, results: in order."""

    engine: str = "jit"
    entry: str
    tokens: str = ""
    arguments: tuple[Argument, ...]
    results: tuple[str, ...] = ()
    operators: tuple[str, ...] = ()
    tools: dict[str, str] = Field(default_factory=dict)
    not_checked: tuple[str, ...] = ()
