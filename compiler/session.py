"""What every target's session does alike: checks the ids of a request, joins the traces of consecutive calls.

T tokens, D width, K experts of a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moec.compiler.errors import RunError
from moec.compiler.target import MoeTrace, Session


def checked_ids(session: Session, ids: Sequence[int] | np.ndarray, *, closed: bool, place: str) -> np.ndarray:
    """The ids as int64 [T], contiguous, each in the vocabulary, all within what is left of the context.

    RunError at `place`, the artifact's file: for a closed session, no ids, ids that are no list of integers, an id out
    of the vocabulary, and more tokens than fit.
    """
    if closed:
        raise RunError("the session is closed", place=place, remedy="load the artifact again")
    remedy = "give token ids as a list of integers"
    try:
        given = np.asarray(ids)
    except ValueError:  # rows of different lengths
        raise RunError("token ids must be a list of integers, not lists of lists", place=place, remedy=remedy) from None
    if given.size == 0:
        raise RunError("the prompt is empty", place=place, remedy="give at least one token")
    if given.ndim != 1 or given.dtype.kind not in "iu":
        what = f"token ids must be a list of integers, not {given.dtype} of {given.ndim} dimensions"
        raise RunError(what, place=place, remedy=remedy)
    wrong = given[(given < 0) | (given >= session.vocab_size)]
    if wrong.size:
        raise RunError(
            f"token id {int(wrong[0])} is not in the vocabulary",
            place=place,
            remedy=f"ids are 0 to {session.vocab_size - 1}",
        )
    if given.size > session.context - session.position:
        state = f", {session.position} of which are used" if session.position else ""
        raise RunError(
            f"{given.size} tokens do not fit: the context holds {session.context}{state}",
            place=place,
            remedy="reset() the session or shorten the prompt" if session.position else "shorten the prompt",
        )
    return np.ascontiguousarray(given, np.int64)


def joined_layer(parts: Sequence[MoeTrace]) -> MoeTrace:
    """One layer's traces of consecutive chunks as one, tokens in the order they ran."""
    if len(parts) == 1:
        return parts[0]
    return MoeTrace(
        layer=parts[0].layer,
        x_TD=np.concatenate([p.x_TD for p in parts]),
        indices_TK=np.concatenate([p.indices_TK for p in parts]),
        weights_TK=np.concatenate([p.weights_TK for p in parts]),
        y_TD=np.concatenate([p.y_TD for p in parts]),
    )
