"""Fixtures of every test: the command line in this process."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import hypothesis
import pytest

from tests import no_skips
from tests.tiny import TinyModels

# how long an example takes says how busy the machine is
hypothesis.settings.register_profile("moec", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("moec")

gc.set_threshold(50_000, 20, 20)  # as the command line does: a test that compiles makes millions of objects that stay

# --no-skips
pytest_addoption, pytest_configure = no_skips.pytest_addoption, no_skips.pytest_configure
pytest_runtest_makereport = no_skips.pytest_runtest_makereport
pytest_make_collect_report = no_skips.pytest_make_collect_report
pytest_terminal_summary = no_skips.pytest_terminal_summary

Moec = Callable[..., tuple[int, str, str]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes minutes begins first, so that no worker is alone with it at the end.

    A name with an address in it is another in each worker, and then none of them runs anything.
    """
    items.sort(key=lambda item: item.get_closest_marker("first") is None)
    named = [item.nodeid for item in items if " at 0x" in item.nodeid]
    if named:
        raise pytest.UsageError(f"the name of a test holds an address: {named[0]}; give its parameters ids")


@pytest.fixture(scope="session", autouse=True)
def _nothing_beside_the_tests() -> Iterator[None]:
    """A path that a test takes for missing must not be one that another test makes: nothing new in the root folder."""
    root = Path("/")
    before = {p.name for p in root.iterdir()}
    yield
    assert {p.name for p in root.iterdir()} <= before, "a test wrote outside its temporary folder"


@pytest.fixture
def moec(capfd: pytest.CaptureFixture[str]) -> Moec:
    """Run a command in this process, native output included: (exit status, stdout, stderr)."""
    from moec.cli import main as cli

    def call(*arguments: object) -> tuple[int, str, str]:
        status = cli.run([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """Compiles variants of the tiny model, each once a session."""
    return TinyModels(tmp_path_factory)


@pytest.fixture(scope="module")
def trusted() -> Iterator[None]:
    """Code of models is trusted, as with `--trust`."""
    from moec.compiler.trust import trusting

    with trusting():
        yield


def refused(result: tuple[int, str, str], *parts: str) -> None:
    """One line on stderr with all of `parts`, exit status 2, nothing on stdout."""
    status, out, err = result
    assert (status, out) == (2, ""), err
    assert err.endswith("\n")
    assert err.count("\n") == 1, err
    assert all(part in err for part in parts), err


@contextmanager
def one_line(error: type[Exception], match: str) -> Iterator[None]:
    """The block must raise `error`, with `match` in its text, which has no second line."""
    with pytest.raises(error, match=match) as caught:
        yield
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a transformers folder, its weights taken off their 4-bit grid (bench/real_model.py)."""
    return _real_model(jitter=True)


@pytest.fixture(scope="session")
def smollm2_on_grid() -> Path:
    """The same with exactly the values that its GGUF file holds."""
    return _real_model(jitter=False)


def _real_model(*, jitter: bool) -> Path:
    for module in ("gguf", "accelerate", "transformers"):
        pytest.importorskip(module, reason=f"reading a GGUF file needs {module}: pip install 'moec[quality]'")
    from bench import real_model

    try:
        return real_model.transformers_folder(jitter=jitter)
    except real_model.NotReached as error:
        pytest.skip(f"the weights of a real model are not here and cannot be fetched: {error}")
