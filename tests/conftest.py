"""Fixtures of every test: the command line in this process."""

from __future__ import annotations

from collections.abc import Callable

import pytest

Moec = Callable[..., tuple[int, str, str]]


@pytest.fixture
def moec(capfd: pytest.CaptureFixture[str]) -> Moec:
    """Run a command in this process, native output included: (exit status, stdout, stderr)."""
    from moec.cli import main as cli

    def call(*arguments: object) -> tuple[int, str, str]:
        status = cli.run([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return status, captured.out, captured.err

    return call


def refused(result: tuple[int, str, str], *parts: str) -> None:
    """One line on stderr with all of `parts`, exit status 2, nothing on stdout."""
    status, out, err = result
    assert (status, out) == (2, ""), err
    assert err.endswith("\n")
    assert err.count("\n") == 1, err
    assert all(part in err for part in parts), err
