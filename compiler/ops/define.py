"""One way to register an operator of the `moec` namespace: schema, eager reference and fake together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "moec"


def define(schema: str, eager: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register `schema` (`name(args) -> result`) and return its OpOverload.

    `eager` is the reference that every kernel is compared with; `fake` computes shapes only and raises ValueError
    for operands that no kernel may be given.
    """
    name, rest = schema.split("(", 1)
    qualified = f"{NAMESPACE}::{name.strip()}"
    torch.library.define(qualified, "(" + rest, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(qualified, "CompositeExplicitAutograd")(eager)
    torch.library.register_fake(qualified)(fake)
    return getattr(torch.ops.moec, name.strip()).default


def require(condition: bool, op: str, message: str) -> None:
    """Raise ValueError naming the operator. Only for conditions on static sizes: a symbolic one would add a guard."""
    if not condition:
        raise ValueError(f"moec::{op}: {message}")
