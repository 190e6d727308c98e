"""An artifact opened by its target's runtime, with its tokenizer and chat template behind `Session.generate`.

Nothing here needs torch, unless the target does.
"""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from moec.compiler.artifact import Artifact, file_digest
from moec.compiler.errors import ArtifactError, RunError, UserError
from moec.compiler.session import SessionBase, Writer
from moec.compiler.source import TOKENIZER
from moec.compiler.target import Session, target_of

if TYPE_CHECKING:
    from moec.assistant.prefixes import PrefixCache
from moec.compiler.trust import trusting


def load(
    artifact: Artifact | str | Path,
    *,
    trust: bool = False,
    memory_mb: int | None = None,
    cache_aware: float | None = None,
    prefix_cache: str | Path | None = None,
) -> Session:
    """Open an artifact (its folder is checked first) and load it with its target's runtime.

    memory_mb: the most memory of this process, in 10^6 bytes: routed experts are read as tokens choose them (xnnpack).
    cache_aware: with such a budget, how much the router of a token that is run alone prefers experts in memory, as a
    share (0 to 1) of the range of what it selects by: results then depend on what was decoded before.
    prefix_cache: a folder in which beginnings of prompts are kept and found (`assistant/prefixes.py`; xnnpack).
    With a budget the tokenizer and chat template are read first, so that it counts them, else when text is first asked
    for. An MLIR artifact is code: TrustError unless `trust`. RunError for a budget that is too small, with the least.
    """
    opened = (artifact if isinstance(artifact, Artifact) else Artifact.open(artifact)).within(memory_mb, cache_aware)

    @cache
    def writer() -> Writer:
        from moec.assistant.assistant import Assistant

        made = Assistant.of(opened)
        made.prefixes = prefixes
        return made

    prefixes = prefixes_of(prefix_cache, opened)
    if getattr(opened.options(), "memory_mb", None) is not None:
        with suppress(ArtifactError):  # ids need none; asking for text raises it again
            writer()
    session = load_session(opened, trust=trust)
    if isinstance(session, SessionBase):
        session.writer = writer
    return session


def prefixes_of(folder: str | Path | None, artifact: Artifact, place: str = "prefix_cache") -> PrefixCache | None:
    """The prefixes of an artifact in a folder; UserError where it cannot be used, or sessions cannot be saved."""
    from moec.assistant.prefixes import PrefixCache

    if folder is None:
        return None
    if not target_of(artifact).saves_sessions:
        what = f"sessions of {artifact.manifest.target} artifacts cannot be saved"
        raise UserError(what, place=place, remedy="leave it out, or compile for xnnpack")
    return PrefixCache(Path(folder), artifact.manifest.contents)


def load_session(artifact: Artifact, *, trust: bool = False) -> Session:
    """As `load`, for one who has a tokenizer or needs none: the session generates no text by itself."""
    with trusting(trust):
        return target_of(artifact).load(artifact)


def load_draft(draft: Artifact | str | Path, of: Artifact, session: Session, *, trust: bool = False) -> Session:
    """Open a small model that guesses for the artifact `of`, whose session is `session` (`assistant/speculate.py`).

    All of it is in memory, whatever budget it brings. RunError where the two have other tokenizers, where a guess could
    change what the model says, and where `of` has a memory budget, which would not count the small model.
    """
    if getattr(of.options(), "memory_mb", None) is not None:
        what = "a memory budget does not count the weights and caches of a draft"
        raise RunError(what, place=str(of.folder), remedy="leave --draft out")
    opened = draft if isinstance(draft, Artifact) else Artifact.open(draft)
    files = [a.folder / TOKENIZER for a in (opened, of)]
    tokenizers = [file_digest(file) if file.is_file() else "" for file in files]
    if tokenizers[0] != tokenizers[1] or opened.manifest.model.vocab_size != session.vocab_size:
        what = f"has another tokenizer than {of.folder}"
        raise RunError(what, place=str(opened.folder), remedy="draft with a model of the same tokenizer")
    if not getattr(session, "exact_calls", False):
        what = "a draft could change its text: a token's last bits depend on the others of a call"
        raise RunError(what, place=str(of.folder), remedy="leave --draft out")
    return load_session(opened.in_memory(), trust=trust)
