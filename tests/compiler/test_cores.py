"""How OpenMP's threads wait: they sleep where cores are shared, and spin for microseconds elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from moec.compiler import cores
from moec.compiler.cores import cores_are_shared, usable_cores, wait_without_spinning


def test_what_is_set_before_torch_is_imported() -> None:
    shared: dict[str, str] = {}
    wait_without_spinning(shared, shared=True)
    assert shared == {"OMP_WAIT_POLICY": "PASSIVE"}
    alone: dict[str, str] = {}
    wait_without_spinning(alone, shared=False)
    assert alone == {"GOMP_SPINCOUNT": "1000"}
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        given = {name: "of the user"}
        wait_without_spinning(given, shared=True)
        assert given == {name: "of the user"}


@pytest.mark.parametrize(("load", "shared"), [(0.0, False), (0.4, False), (0.6, True), (9.0, True)])
def test_shared_is_what_the_load_says(load: float, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (load * usable_cores(), 0.0, 0.0))
    assert cores_are_shared() == shared


def test_a_system_without_a_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise OSError

    monkeypatch.setattr(cores.os, "getloadavg", none)
    assert not cores_are_shared()


def test_a_command_sets_it_before_torch() -> None:
    code = (
        "import os, sys\n"
        "from moec.cli import main\n"
        "assert 'torch' not in sys.modules\n"
        "main.run(['--version'])\n"
        "print(os.environ.get('OMP_WAIT_POLICY') or os.environ.get('GOMP_SPINCOUNT'))\n"
    )
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    environment = {k: v for k, v in os.environ.items() if k not in names}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines()[-1] in ("PASSIVE", "1000")
