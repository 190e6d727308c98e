"""A small compiled artifact with structured routing, for all tests of profiles and reports."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import TinyModels, tiny_text

CONTEXT = 512


@pytest.fixture(scope="session")
def line(tiny: TinyModels) -> Path:
    """A folder with spec.yaml, checkpoint and artifact: two layers of 16 experts, context 512."""
    return tiny(tiny_text(context=CONTEXT), router="structured")
