"""How a dense block becomes the experts of a spec: by splitting it, or by copying it. The widths decide which."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moec.compiler.errors import SpecError
from moec.sources.decoder.config import MoeConfig

Kind = Literal["split", "copy"]


@dataclass(frozen=True)
class Recipe:
    """kind: `split` shares a block's neurons out, `copy` gives every expert all of them."""

    kind: Kind
    moe: MoeConfig

    @property
    def active(self) -> float:
        """Neurons that a token uses, as a part of the dense block's (above 1 where several copies are used)."""
        moe = self.moe
        whole = moe.shared_width + moe.experts * moe.expert_width if self.kind == "split" else moe.expert_width
        return (moe.shared_width + moe.top_k * moe.expert_width) / whole


def recipe_for(moe: MoeConfig, neurons: int, place: str) -> Recipe:
    """The recipe that makes `moe` of a block of `neurons`. SpecError, with the nearest that works, if none does.

    split: shared_width + experts * expert_width = neurons, chosen experts count once each: scale = top_k.
    copy: expert_width = neurons, no shared expert, the chosen experts' weights sum to 1: scale = 1.
    """
    whole = moe.shared_width + moe.experts * moe.expert_width
    if whole == neurons:
        _require_scale(moe, float(moe.top_k), "each chosen expert is a part of the block and counts once", place)
        return Recipe("split", moe)
    if moe.expert_width == neurons and moe.shared_width == 0:
        _require_scale(moe, 1.0, "chosen experts are copies of the block, whose mean is the block", place)
        return Recipe("copy", moe)
    widths = f"shared_width {moe.shared_width} and {moe.experts} experts of {moe.expert_width}"
    raise SpecError(
        f"model.moe: {widths} are {whole} neurons, the dense block has {neurons}",
        place=place,
        remedy=f"{_nearest(moe, neurons)}, or copy it: `expert_width: {neurons}`, `shared_width: 0`, `scale: 1.0`",
    )


def _nearest(moe: MoeConfig, neurons: int) -> str:
    """The smallest change that makes a split."""
    rest = neurons - moe.experts * moe.expert_width
    if rest >= 0:
        return f"split it: `shared_width: {rest}`"
    if neurons > moe.shared_width and (neurons - moe.shared_width) % moe.experts == 0:
        return f"split it: `expert_width: {(neurons - moe.shared_width) // moe.experts}`"
    width = max(1, neurons // (2 * moe.experts))
    return f"split it: `expert_width: {width}`, `shared_width: {neurons - width * moe.experts}`"


def _require_scale(moe: MoeConfig, scale: float, why: str, place: str) -> None:
    if not moe.normalize or moe.scale != scale:
        raise SpecError(
            f"model.moe: scale is {moe.scale:g} and normalize {str(moe.normalize).lower()}, but {why}",
            place=place,
            remedy=f"write `normalize: true` and `scale: {scale:.1f}`",
        )
    if not moe.selection_bias and moe.top_k < moe.experts:
        raise SpecError(
            "model.moe: without a selection bias the fitted router has no offset for its experts",
            place=place,
            remedy="write `selection_bias: true`",
        )
