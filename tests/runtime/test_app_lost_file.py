"""The file of a restored session is overwritten while an application uses it: an error, no answer from nothing."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

from tests.runtime import app
from tests.tiny import TinyModels, tiny_text

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux maps files into sessions")

PROMPT = [random.Random(3).randrange(300, 400) for _ in range(40)] * 60  # it repeats itself, so that drafts are made


@pytest.fixture(scope="module")
def folder(tiny: TinyModels) -> Path:
    return tiny(tiny_text(context=4096)) / "artifact"


def _overwritten(file: Path) -> None:
    data = bytearray(file.read_bytes())
    for at in range(len(data) // 8, len(data), 997):
        data[at] ^= 255
    file.write_bytes(data)


@pytest.mark.parametrize("speculate", [0, 1])
@pytest.mark.parametrize("between", ["", "save", "fork"])
def test_an_answer_ends_with_an_error(opened: int, tmp_path: Path, speculate: int, between: str) -> None:
    session = app.call("session", opened)
    options = app.options(opened, max_new_tokens=200, speculate=speculate)
    app.pieces(app.begin(session, PROMPT, app.options(opened, max_new_tokens=0)))
    app.call("save", session, str(tmp_path / "s").encode())
    app.call("restore", session, str(tmp_path / "s").encode())
    generation = app.begin(session, PROMPT, options)
    for _ in range(3):
        app.call("next", generation, None, None)
    _overwritten(tmp_path / "s")
    if between:
        arguments = [str(tmp_path / "other").encode()] if between == "save" else []
        with pytest.raises(app.AppError, match="and its tokens are lost"):
            app.call(between, session, *arguments)
    with pytest.raises(app.AppError, match=r"its tokens are lost|the session holds 0 tokens"):
        app.pieces(generation)  # tokens that were checked already may come
    assert app.STOPPED[app.stats(generation).stopped] == "failed"
    assert app.many("tokens", session) == []
    assert not (tmp_path / "other").exists()
    app.pieces(app.begin(session, PROMPT, options))  # computed anew
    app.call("close", session)
