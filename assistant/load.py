"""An artifact opened by its target's runtime, with its tokenizer and chat template behind `Session.generate`.

Nothing here needs torch, unless the target does.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from moec.compiler.artifact import Artifact
from moec.compiler.session import SessionBase, Writer
from moec.compiler.target import Session, target_of
from moec.compiler.trust import trusting


def load(artifact: Artifact | str | Path, *, trust: bool = False, memory_mb: int | None = None) -> Session:
    """Open an artifact (its folder is checked first) and load it with its target's runtime.

    memory_mb: the most memory of this process, in 10^6 bytes: routed experts are read as tokens choose them (xnnpack).
    An MLIR artifact is code: TrustError unless `trust`. RunError for a budget that is too small, with the least.
    """
    opened = artifact if isinstance(artifact, Artifact) else Artifact.open(artifact)
    opened = opened if memory_mb is None else opened.within(memory_mb)
    with trusting(trust):
        session = target_of(opened).load(opened)
    if isinstance(session, SessionBase):

        @cache
        def writer() -> Writer:
            from moec.assistant.assistant import Assistant

            return Assistant.of(opened)

        session.writer = writer
    return session
