"""Fixtures of the C interface's tests: the artifact that a module's own `folder` names, opened once, and a session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runtime import app


@pytest.fixture(scope="module")
def opened(folder: Path) -> Iterator[int]:
    artifact = app.open_artifact(folder)
    yield artifact
    app.call("close", artifact)


@pytest.fixture
def session(opened: int) -> Iterator[int]:
    made = app.call("session", opened)
    yield made
    app.call("close", made)
