"""`moec data build`: sources become a corpus folder.

    fetch -> (a sample, where limited) -> without repetitions -> train | held out, by document -> tokenizer -> shards

Texts pass through a temporary file, so that memory holds digests and not the corpus. The folder gets its name when it
is complete.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from moec.compiler.progress import Progress
from moec.compiler.replacing import replacing
from moec.training.chat_template import TEMPLATE
from moec.training.data.dedup import Deduplicator
from moec.training.data.document import Document
from moec.training.data.shards import SPLITS, Corpus, DataError, Kind, ShardWriter, write_index
from moec.training.data.sources import sources
from moec.training.data.tasks import write_tasks
from moec.training.data.user import user_documents
from moec.training.tokenizer import Coder, train_tokenizer

HELDOUT_SHARE = 0.05
_MOST_HELDOUT = 0.25  # of 20 documents the least hash is above it once in 300 times, of 5 once in 4
_TOKENIZER_BYTES = 20_000_000  # more text does not change a small vocabulary
_BATCH = 512  # documents tokenized at a time


@dataclass
class _Domain:
    """A domain on its way: where its texts wait, and what is known of them."""

    name: str
    file: Path
    kind: Kind | None = None
    sources: list[dict[str, Any]] = field(default_factory=list)
    documents: int = 0
    bytes: int = 0
    repeated_exactly: int = 0
    repeated_nearly: int = 0
    least_hash: float = 1.0


def build(
    out: Path,
    domains: Sequence[str],
    *,
    cache: Path,
    added: Mapping[str, Path] | None = None,
    tokenizer: Path | None = None,
    vocab_size: int = 8192,
    limit_mb: float | None = None,
    heldout_share: float = HELDOUT_SHARE,
    progress: Progress | None = None,
) -> Corpus:
    """Build the corpus of `domains` (see `sources.DOMAINS`) and of the user's `added` ones at `out`.

    tokenizer: a tokenizer.json to use; else one of `vocab_size` ids is trained on the training split. limit_mb: about
    this much text in all, shared evenly by the domains, drawn without regard to order. A source that cannot be had
    (no apt, no network) is left out and named under `left_out` in corpus.json; DataError when a domain has none left,
    or has too few documents to be split.
    """
    progress = progress or Progress(quiet=True)
    added = dict(added or {})
    if not domains and not added:
        raise DataError("no domain was asked for", remedy="name some with --domains or --add")
    twice = sorted(set(domains) & set(added))
    if twice:
        raise DataError(f"{twice[0]!r} is a domain already", remedy="give --add another name")
    for name in domains:
        sources(name)  # an unknown name fails before anything is downloaded
    given = None if tokenizer is None else Coder.from_file(tokenizer)
    if limit_mb is not None and not (0 < limit_mb < math.inf):
        raise DataError(f"a limit of {limit_mb} MB", remedy="use a number above 0")
    quota = None if limit_mb is None else limit_mb * 1e6 / (len(domains) + len(added))
    with replacing(out, kind="a corpus") as folder, TemporaryDirectory(dir=folder) as spool:
        left_out: list[str] = []
        waiting = [_collect(name, Path(spool), cache, quota, left_out, progress) for name in dict.fromkeys(domains)]
        waiting += [_collect_user(name, path, Path(spool), quota, progress) for name, path in added.items()]
        cut = _cut(waiting, heldout_share)
        text = _tokenizer(waiting, cut, tokenizer, vocab_size, progress)
        coder = given or Coder.from_text(text)
        records = {}
        for domain in waiting:
            with progress.stage(f"tokenize {domain.name}"):
                records[domain.name] = _tokenize(domain, folder, coder, cut)
        with progress.stage("tasks"):
            write_tasks(folder, coder, {domain.name: partial(_split, domain, cut, "heldout") for domain in waiting})
        write_index(
            folder,
            tokenizer=text,
            vocab_size=coder.vocab_size,
            eos_id=coder.eos_id,
            bos_id=coder.bos_id,
            chat=coder.form,
            heldout_share=cut,
            left_out=left_out,
            domains=records,
        )
        if coder.template is not None:
            (folder / TEMPLATE).write_text(coder.template.text, "utf-8")
    return Corpus.open(out)


# --- collecting -------------------------------------------------------------------------------------------------------


def _collect(
    name: str, spool: Path, cache: Path, quota: float | None, left_out: list[str], progress: Progress
) -> _Domain:
    domain = _Domain(name, spool / f"{name}.jsonl")
    read: list[tuple[str, Iterable[Document]]] = []
    faults: list[str] = []
    for source in sources(name):
        with progress.stage(f"{name}: {source.name} ({source.client} {source.package})"):
            try:
                read.append((source.name, list(source.read(cache))))
            except (DataError, OSError) as error:
                faults.append(f"{source.name}: {error}")
                continue
        domain.sources.append(source.record())
    for fault in faults:
        progress.write(f"left out: {fault}")
    left_out += faults
    if not read:
        remedy = "leave the domain out with --domains, or get its packages"
        raise DataError(f"no source of domain {name!r} could be had ({'; '.join(faults)})", remedy=remedy)
    with progress.stage(f"{name}: without repetitions"):
        _spool(domain, read, quota)
    return domain


def _collect_user(name: str, path: Path, spool: Path, quota: float | None, progress: Progress) -> _Domain:
    domain = _Domain(name, spool / f"{name}.jsonl")
    domain.sources.append({"name": name, "client": "file", "package": path.name, "licence": "the user's", "url": ""})
    with progress.stage(f"{name}: {path}"):
        _spool(domain, [(name, user_documents(path))], quota)
    if not domain.documents:
        raise DataError("holds no text", place=str(path))
    return domain


def _spool(domain: _Domain, read: Sequence[tuple[str, Iterable[Document]]], quota: float | None) -> None:
    """Write the domain's documents to its temporary file, each once, until `quota` bytes are reached."""
    new = Deduplicator()
    counts = {name: 0 for name, _ in read}
    with domain.file.open("w", encoding="utf-8") as stream:
        for name, document in _drawn(read, quota):
            if quota is not None and domain.bytes >= quota:
                break
            kind: Kind = "instruction" if document.is_example else "text"
            if domain.kind not in (None, kind):
                raise DataError(
                    f"domain {domain.name!r} mixes texts with prompts and responses", remedy="put them into two domains"
                )
            domain.kind = kind
            # two answers to one prompt would be a contradiction, or an answer known from the other split
            known_by = document.prompt if document.is_example else document.text
            if not new.is_new(known_by, near=not document.is_example):
                continue
            stream.write(json.dumps(asdict(document), ensure_ascii=True) + "\n")
            counts[name] += 1
            domain.documents += 1
            domain.bytes += len(document.body.encode("utf-8", "surrogatepass"))
            domain.least_hash = min(domain.least_hash, document.group_hash())
    domain.repeated_exactly, domain.repeated_nearly = new.exact, new.near
    for record in domain.sources:
        record["documents"] = counts.get(record["name"], 0)


def _drawn(read: Sequence[tuple[str, Iterable[Document]]], quota: float | None) -> Iterator[tuple[str, Document]]:
    """All documents in their order; where only some are wanted, in random order, the sources in turn."""
    if quota is None:
        for name, documents in read:
            yield from ((name, document) for document in documents)
        return
    chance = random.Random(0)
    shuffled = []
    for name, documents in read:
        listed = list(documents)
        chance.shuffle(listed)
        shuffled.append((name, iter(listed)))
    while shuffled:
        for pair in list(shuffled):
            document = next(pair[1], None)
            if document is None:
                shuffled.remove(pair)
            else:
                yield pair[0], document


def _cut(waiting: Sequence[_Domain], heldout_share: float) -> float:
    """Groups whose hash is at most this are held out, in all domains or in none, so that every domain holds some out.

    DataError naming a domain of so few documents that its share of all would have to be large, or that none is left.
    """
    cut = max([heldout_share, *(domain.least_hash for domain in waiting)])
    for domain in sorted(waiting, key=lambda domain: -domain.least_hash):  # the one that draws the cut is at fault
        if domain.least_hash > max(heldout_share, _MOST_HELDOUT) or next(_split(domain, cut, "train"), None) is None:
            raise DataError(
                f"domain {domain.name!r} has too few documents ({domain.documents}) to hold some out",
                remedy="cut its text into 20 documents or more: files of a folder, or JSON lines",
            )
    return cut


def _split(domain: _Domain, cut: float, split: str) -> Iterator[Document]:
    with domain.file.open(encoding="utf-8") as stream:
        for line in stream:
            row = json.loads(line)
            document = Document(**row | {"turns": tuple((role, text) for role, text in row["turns"])})
            if (document.group_hash() <= cut) == (split == "heldout"):
                yield document


# --- tokens -----------------------------------------------------------------------------------------------------------


def _tokenizer(waiting: Sequence[_Domain], cut: float, given: Path | None, vocab_size: int, progress: Progress) -> str:
    if given is not None:
        return given.read_text("utf-8")
    with progress.stage("train the tokenizer"):
        return train_tokenizer(_sample(waiting, cut), vocab_size)


def _sample(waiting: Sequence[_Domain], cut: float) -> Iterator[str]:
    """Training text for the tokenizer: the same amount of each domain, as far as there is enough."""
    for domain in waiting:
        left = _TOKENIZER_BYTES / len(waiting)
        every = max(1.0, domain.bytes / left)  # spread over the whole domain
        for number, document in enumerate(_split(domain, cut, "train")):
            if int(number / every) != int((number - 1) / every) or number == 0:
                yield document.body[: int(left) + 1]


def _tokenize(domain: _Domain, folder: Path, coder: Coder, cut: float) -> dict[str, Any]:
    kind: Kind = domain.kind or "text"
    record: dict[str, Any] = {
        "kind": kind,
        "sources": domain.sources,
        "bytes": domain.bytes,
        "repeated_exactly": domain.repeated_exactly,
        "repeated_nearly": domain.repeated_nearly,
    }
    for split in SPLITS:
        writer = ShardWriter(folder, domain.name, split, vocab_size=coder.vocab_size, kind=kind)
        for documents in _batched(_split(domain, cut, split)):
            if kind == "text":
                for ids in coder.encode_documents([document.text for document in documents]):
                    writer.add(ids)
            else:
                for ids, mask in coder.encode_conversations([document.conversation for document in documents]):
                    writer.add(ids, mask)
        record[split] = writer.close()
    return record


def _batched(documents: Iterator[Document]) -> Iterator[list[Document]]:
    while batch := list(islice(documents, _BATCH)):
        yield batch
