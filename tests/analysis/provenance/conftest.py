"""A small artifact for all tests of bills and signatures."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import TinyModels, tiny_text


@pytest.fixture(scope="session")
def artifact(tiny: TinyModels) -> Path:
    return tiny(tiny_text(layers=1)) / "artifact"
