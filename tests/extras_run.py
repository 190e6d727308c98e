"""Runs command lines of moec as if some packages were not installed: `python extras_run.py MODULES < command lines`.

MODULES: names separated by commas; stdin: a JSON list of argument lists; stdout: a JSON list of what each gave.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from typing import Any


class WithoutSome:
    """A finder that does not find the blocked modules, as a finder does that has nothing to find."""

    def __init__(self, finder: Any, blocked: frozenset[str]) -> None:
        self._finder, self._blocked = finder, blocked

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if any(name == b or name.startswith(b + ".") for b in self._blocked):
            return None
        return self._finder.find_spec(name, path, target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)


def main() -> None:
    blocked = frozenset(filter(None, sys.argv[1].split(",")))
    assert not blocked & set(sys.modules), "blocked too late"
    sys.meta_path[:] = [WithoutSome(finder, blocked) for finder in sys.meta_path]
    from moec.cli.main import run

    results = []
    for line in json.load(sys.stdin):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = run(line)
        results.append({"line": line, "status": status, "out": out.getvalue(), "err": err.getvalue()})
    print(json.dumps(results))


if __name__ == "__main__":
    main()
