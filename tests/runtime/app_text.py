"""An artifact with another tokenizer, its ids and texts against those of the library `tokenizers`."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tokenizers import Tokenizer

from moec.assistant.native_text import FILE, TEXTS, tables
from moec.compiler.tokenizer import load_tokenizer
from tests.runtime import app

PAGES = Path(__file__).parents[2] / "docs"


@contextmanager
def opened_with(made: Tokenizer, folder: Path, copy: Path) -> Iterator[int]:
    """A copy of the artifact with this tokenizer, opened."""
    shutil.copytree(folder, copy)
    made.save(str(copy / "tokenizer.json"))
    (copy / FILE).write_bytes(tables(copy, load_tokenizer(copy / "tokenizer.json")))
    artifact = app.open_artifact(copy)
    yield artifact
    app.call("close", artifact)


def some_texts() -> list[str]:
    """Pages, texts of many scripts, random bytes and characters, with the texts of added tokens."""
    pages = [page.read_text("utf-8") for page in sorted(PAGES.glob("*.md"))]
    drawn = random.Random(11)
    texts = [
        *TEXTS,
        *(page[:5000] for page in pages[::6]),
        "a<tool>s<tool> <|end|><|end|>s <tool",
        "x" * 3000,
        " " * 3000,
    ]
    for _ in range(150):
        texts.append(bytes(drawn.randrange(256) for _ in range(drawn.randrange(80))).decode("utf-8", "replace"))
        kinds = ((32, 127), (9, 33), (0xA0, 0x600), (0x900, 0xD7A4), (0x10000, 0x1FFFF), (0x300, 0x370))
        texts.append("".join(chr(drawn.randrange(*drawn.choice(kinds))) for _ in range(drawn.randrange(50))))
    return texts


def compare_with(made: Tokenizer, folder: Path, copy: Path, more: Sequence[str] = ()) -> None:
    """An artifact with this tokenizer, on many texts."""
    with opened_with(made, folder, copy) as artifact:
        for text in (*some_texts(), *more):
            found = app.tokenize(artifact, text)
            assert found == made.encode(text).ids, text
            assert app.detokenize(artifact, found) == made.decode(found)
