"""`pytest --no-skips`: a test that is skipped for want of a tool fails, and the end says what is missing. For releases.

A skip for the machine's own sake (another system, a file system without direct reads) stays one: its reason says so in
words of PLATFORM. Any other reason counts as something that could be installed.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from typing import Any

import pytest

PLATFORM = re.compile(
    r"Linux|glibc|/proc|/dev/full|file system|this (system|machine has)|git checkout|plans its own memory"
)
_MISSING = pytest.StashKey[dict[str, int]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-skips", action="store_true", help="tests that want a tool fail instead of being skipped")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_MISSING] = {}


def _failed(report: Any, config: pytest.Config) -> None:
    """Makes a skip a failure, unless it is the platform's."""
    if not config.getoption("--no-skips") or report.outcome != "skipped" or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    reason = reason.removeprefix("Skipped: ")
    if PLATFORM.search(reason):
        return
    report.outcome, report.longrepr = "failed", f"not run: {reason}"
    missing = config.stash[_MISSING]
    missing[reason] = missing.get(reason, 0) + 1


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _failed(report, item.config)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Of a module that is skipped as a whole."""
    report = yield
    _failed(report, collector.config)
    return report


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if missing := config.stash[_MISSING]:
        terminalreporter.section("missing on this machine")
        for reason, count in sorted(missing.items()):
            terminalreporter.line(f"{count:4} x {reason}")
