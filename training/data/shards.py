"""The corpus folder: tokens of documents by domain, tokenized once and then memory-mapped.

    DIR/corpus.json                         domains, counts, sources with licences, tokenizer digest, format
    DIR/tokenizer.json                      the tokenizer that made the tokens
    DIR/<domain>/{train,heldout}.tokens     uint16 (vocabulary up to 65,536) or uint32, all documents end to end
    DIR/<domain>/{train,heldout}.docs       int64 [documents + 1]: where each document begins; the last is the length
    DIR/<domain>/{train,heldout}.mask       uint8, one per token, instruction domains only: 1 is a token of a response

corpus.json holds the SHA-256 of every one of these files, which `Corpus.check` compares before a training run.

Numbers are little-endian. Every document begins with the tokenizer's BOS (if it has one) and ends with EOS or with the
token that ends a turn. A split that a domain lacks has files of no documents.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moec.compiler.artifact import file_digest
from moec.compiler.errors import UserError
from moec.compiler.files import read_bytes
from moec.compiler.replacing import replacing
from moec.compiler.tokenizer import MAX_BYTES

FORMAT = 1
INDEX = "corpus.json"
TOKENIZER = "tokenizer.json"
TASKS = "tasks"  # the folder of evaluation tasks
Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")
Kind = Literal["text", "instruction"]
_REMEDY = "build it again with `moec data build`"
_MAX_INDEX = 64 << 20  # bytes of corpus.json


class DataError(UserError):
    """A corpus is missing, damaged or cannot give what was asked of it; a source cannot be read."""


@dataclass(frozen=True)
class Shard:
    """One split of one domain. tokens_N uint16/uint32, starts int64 [documents + 1], mask_N uint8 or None."""

    tokens_N: np.ndarray
    starts: np.ndarray
    mask_N: np.ndarray | None

    @property
    def documents(self) -> int:
        return len(self.starts) - 1

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64 [documents]."""
        return np.diff(self.starts)


def check_ids(tokens_N: np.ndarray, vocab_size: int, place: str) -> None:
    """DataError for an id that the corpus's vocabulary does not have."""
    if tokens_N.size and int(tokens_N.max()) >= vocab_size:
        what = f"damaged: token {int(tokens_N.max())} in a vocabulary of {vocab_size}"
        raise DataError(what, place=place, remedy=_REMEDY)


class Corpus:
    """An opened corpus folder: `index` is corpus.json as read; shards are mapped when first asked for."""

    def __init__(self, folder: Path, index: Mapping[str, Any]) -> None:
        self.folder, self.index = folder, index
        self._shards: dict[tuple[str, str], Shard] = {}

    @staticmethod
    def open(folder: str | Path) -> Corpus:
        """DataError when the folder is no corpus, of another format, or its index is damaged."""
        folder = Path(folder)
        file = folder / INDEX
        try:
            if not file.exists():
                raise DataError(f"no corpus here (no {INDEX})", place=str(folder), remedy=_REMEDY)
            index = json.loads(read_bytes(file, limit=_MAX_INDEX, fault=DataError, remedy=_REMEDY))
        except (ValueError, RecursionError) as error:
            raise DataError(f"damaged: {str(error).splitlines()[0]}", place=str(file), remedy=_REMEDY) from None
        version = index.get("format") if isinstance(index, dict) else None
        if version != FORMAT:
            raise DataError(f"format {version!r}, this moec reads {FORMAT}", place=str(file), remedy=_REMEDY)
        wrong = _wrong_index(index)
        if wrong:
            raise DataError(f"damaged: {wrong}", place=str(file), remedy=_REMEDY)
        return Corpus(folder, index)

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(self.index["domains"])

    @property
    def vocab_size(self) -> int:
        """Ids are below it: the tokenizer's, special tokens included."""
        return self.index["vocab_size"]

    @property
    def tokenizer_file(self) -> Path:
        return self.folder / TOKENIZER

    @property
    def eos_id(self) -> int:
        return self.index["eos_id"]

    def kind(self, domain: str) -> Kind:
        self._require(domain)
        return self.index["domains"][domain]["kind"]

    def shard(self, domain: str, split: str = "train") -> Shard:
        """The mapped arrays; DataError for an unknown domain, or files that contradict the index or each other."""
        self._require(domain)
        if split not in SPLITS:
            raise DataError(f"no split {split!r}", place=str(self.folder), remedy=f"splits are {', '.join(SPLITS)}")
        if (domain, split) not in self._shards:
            self._shards[domain, split] = self._map(domain, split)
        return self._shards[domain, split]

    def check(self) -> None:
        """DataError unless every file is as it was written, and every id one of the vocabulary."""
        for name in self.domains:
            for split in SPLITS:
                check_ids(self.shard(name, split).tokens_N, self.vocab_size, f"{self.folder}, {name}/{split}.tokens")
        self._check_digests()
        tokenizer = read_bytes(self.tokenizer_file, limit=MAX_BYTES, fault=DataError, remedy=_REMEDY)
        if hashlib.sha256(tokenizer).hexdigest() != self.index.get("tokenizer_sha256"):
            raise DataError("not the tokenizer of these tokens", place=str(self.tokenizer_file), remedy=_REMEDY)

    def _check_digests(self) -> None:
        recorded = self.index.get("files")
        if not isinstance(recorded, dict):
            raise DataError("damaged: no digests of its files", place=str(self.folder / INDEX), remedy=_REMEDY)
        for domain in self.domains:
            for file in shard_files(self.folder, domain):
                name = file.relative_to(self.folder).as_posix()
                if file_digest(file) != recorded.get(name):
                    what = "damaged: its contents are not those that were written"
                    raise DataError(what, place=str(file), remedy=_REMEDY)

    def _require(self, domain: str) -> None:
        if domain not in self.index["domains"]:
            known = ", ".join(self.domains) or "none"
            raise DataError(f"no domain {domain!r}", place=str(self.folder), remedy=f"the corpus has {known}")

    def _map(self, domain: str, split: str) -> Shard:
        base = self.folder / domain / split
        tokens_N = _mapped(base.with_suffix(".tokens"), token_dtype(self.vocab_size))
        starts = _mapped(base.with_suffix(".docs"), np.dtype("<i8"))
        mask_N = _mapped(base.with_suffix(".mask"), np.dtype("u1")) if self.kind(domain) == "instruction" else None
        counts = self.index["domains"][domain].get(split, {})
        wrong = (
            len(starts) == 0
            or starts[0] != 0
            or starts[-1] != len(tokens_N)
            or bool((np.diff(starts) < 1).any())
            or (mask_N is not None and len(mask_N) != len(tokens_N))
            or counts.get("tokens") != len(tokens_N)
            or counts.get("documents") != len(starts) - 1
        )
        if wrong:
            raise DataError("damaged: its files and corpus.json disagree", place=str(base), remedy=_REMEDY)
        return Shard(tokens_N, starts, mask_N)


_SOURCE_KEYS = ("name", "client", "package", "licence", "url")


def _wrong_index(index: Mapping[str, Any]) -> str:
    """What of corpus.json is not what it should be; empty if nothing."""
    for key, kind in (("domains", dict), ("vocab_size", int), ("eos_id", int), ("tokenizer_sha256", str)):
        if not isinstance(index.get(key), kind):
            return f"no {key}"
    if not isinstance(index.get("left_out", []), list):
        return "left_out"
    faults = ((name, _wrong_record(record)) for name, record in index["domains"].items())
    return next((f"{wrong} of domain {name!r}" for name, wrong in faults if wrong), "")


def _wrong_record(record: Any) -> str:
    """Which part of a domain's record in the index is not what it should be; empty if none."""
    if not isinstance(record, dict):
        return "the record"
    if record.get("kind") not in ("text", "instruction"):
        return "kind"
    if not all(isinstance(record.get(split), dict) for split in SPLITS):
        return "train or heldout"
    if not isinstance(record.get("bytes", 0), int):
        return "bytes"
    sources = record.get("sources")
    if not isinstance(sources, list):
        return "sources"
    for source in sources:
        if not isinstance(source, dict) or not isinstance(source.get("documents"), int):
            return "sources"
        if not all(isinstance(source.get(key), str) for key in _SOURCE_KEYS):
            return "sources"
    return ""


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def _mapped(file: Path, dtype: np.dtype) -> np.ndarray:
    try:
        size = file.stat().st_size
    except FileNotFoundError:
        raise DataError("the file is missing", place=str(file), remedy=_REMEDY) from None
    if size % dtype.itemsize:
        raise DataError(f"truncated: {size} bytes", place=str(file), remedy=_REMEDY)
    if size == 0:  # an empty file cannot be mapped
        return np.zeros(0, dtype)
    return np.memmap(file, dtype, mode="r")


class ShardWriter:
    """Writes one split of one domain, a document at a time, without holding it in memory."""

    def __init__(self, folder: Path, domain: str, split: Split, *, vocab_size: int, kind: Kind) -> None:
        check_domain_name(domain)
        base = folder / domain / split
        base.parent.mkdir(parents=True, exist_ok=True)
        self._dtype = token_dtype(vocab_size)
        self._vocab_size = vocab_size
        self._base = base
        self._tokens = base.with_suffix(".tokens").open("wb")
        self._mask = base.with_suffix(".mask").open("wb") if kind == "instruction" else None
        self._starts = [0]

    def add(self, ids: Iterable[int], mask: Iterable[int] | None = None) -> None:
        """One document of at least one token; `mask` (0 or 1 per token) exactly for instruction domains."""
        row = np.asarray(ids, np.int64)
        assert row.ndim == 1
        assert len(row) > 0
        assert row.min() >= 0
        assert row.max() < self._vocab_size
        assert (mask is not None) == (self._mask is not None)
        self._tokens.write(row.astype(self._dtype).tobytes())
        if self._mask is not None:
            flags = np.asarray(mask, np.uint8)
            assert flags.shape == row.shape
            assert flags.max() <= 1
            self._mask.write(flags.tobytes())
        self._starts.append(self._starts[-1] + len(row))

    def close(self) -> dict[str, int]:
        """Finish the files; the counts that corpus.json records."""
        self._tokens.close()
        if self._mask is not None:
            self._mask.close()
        self._base.with_suffix(".docs").write_bytes(np.asarray(self._starts, "<i8").tobytes())
        return {"documents": len(self._starts) - 1, "tokens": self._starts[-1]}


def shard_files(folder: Path, domain: str) -> list[Path]:
    """The files of a domain's shards that there are, in order."""
    bases = [folder / domain / split for split in SPLITS]
    files = (base.with_suffix(suffix) for base in bases for suffix in (".tokens", ".docs", ".mask"))
    return [file for file in files if file.is_file()]


def check_domain_name(name: str) -> None:
    """DataError unless `name` can be a folder and a key of a mixture."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", name):
        remedy = "use up to 64 letters, digits, _ . - and begin with a letter or a digit"
        raise DataError(f"{name!r} cannot name a domain", remedy=remedy)
    if name in (INDEX, TOKENIZER, TASKS):
        raise DataError(f"{name!r} cannot name a domain: the corpus has that", remedy="use another name")


def write_tokens(
    out: Path,
    documents: Mapping[str, Mapping[Split, Sequence[Sequence[int]]]],
    *,
    vocab_size: int,
    eos_id: int,
    tokenizer: str = "{}",
    masks: Mapping[str, Mapping[Split, Sequence[Sequence[int]]]] | None = None,
) -> Corpus:
    """A corpus of documents that are ids already; a domain in `masks` is an instruction domain.

    For programs that bring their own tokens, and for tests. DataError for an id outside the vocabulary.
    """
    domains: dict[str, Any] = {}
    with replacing(out, kind="a corpus") as folder:
        for name, by_split in documents.items():
            flags = (masks or {}).get(name)
            kind: Kind = "text" if flags is None else "instruction"
            domains[name] = {"kind": kind, "sources": []}
            for split in SPLITS:
                writer = ShardWriter(folder, name, split, vocab_size=vocab_size, kind=kind)
                for index, ids in enumerate(by_split.get(split, ())):
                    if not ids or min(ids) < 0 or max(ids) >= vocab_size:
                        raise DataError(
                            f"document {index} is empty or has an id outside 0 to {vocab_size - 1}", place=name
                        )
                    writer.add(ids, None if flags is None else flags[split][index])
                domains[name][split] = writer.close()
        write_index(folder, tokenizer=tokenizer, vocab_size=vocab_size, eos_id=eos_id, domains=domains)
    return Corpus.open(out)


def write_index(
    folder: Path, *, tokenizer: str, vocab_size: int, eos_id: int, domains: Mapping[str, Any], **more: Any
) -> None:
    """Write tokenizer.json and corpus.json, the last step of making a corpus. `more` are further keys of the index."""
    (folder / TOKENIZER).write_text(tokenizer, "utf-8")
    digest = hashlib.sha256(tokenizer.encode()).hexdigest()
    index = {
        "format": FORMAT,
        "vocab_size": vocab_size,
        "eos_id": eos_id,
        "tokenizer_sha256": digest,
        "token_type": token_dtype(vocab_size).name,
        **more,
        "domains": domains,
        "files": {
            file.relative_to(folder).as_posix(): file_digest(file)
            for domain in domains
            for file in shard_files(folder, domain)
        },
    }
    (folder / INDEX).write_text(json.dumps(index, indent=1, ensure_ascii=False) + "\n", "utf-8")
