"""Plans under a budget of memory, against arithmetic by hand and against the runtime that keeps it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moec.analysis.plan.devices import load_device
from moec.analysis.plan.memory import memory
from moec.analysis.plan.memory_budget import Streamed
from moec.analysis.plan.planner import plan_spec
from moec.compiler.errors import UserError
from moec.compiler.spec import load_spec
from moec.runtime import machine
from tests.conftest import Moec, refused

L = Path(__file__).parents[3] / "specs" / "models" / "mobilemoe-l.yaml"
DENSE = L.with_name("mobilellm-pro.yaml")


def planned(memory_mb: int, hits: float | None = None, device: str | None = "galaxy-s25") -> Streamed:
    named = None if device is None else load_device(device)
    found = plan_spec(load_spec(L), named, context=4096, memory_mb=memory_mb, hits=hits).streamed
    assert found is not None
    return found


def test_what_a_budget_holds() -> None:
    """L: 32 layers of 60 experts, 4 a token, each 3 x 1280 x 640 INT4 codes with an FP16 scale for each 32."""
    s = planned(1500)
    plan = plan_spec(load_spec(L), load_device("galaxy-s25"), context=4096)
    moe = plan.model.architecture.experts
    assert moe is not None
    assert s.experts == moe.layers * moe.experts
    stored = sum(r.bytes for r in plan.roles if r.role == "expert")
    assert s.expert_bytes * s.experts == stored
    fixed = memory(plan.model, 4096).peak - stored
    assert s.held == (1_500_000_000 - fixed) // s.expert_bytes
    assert s.hits == s.held / s.experts
    assert s.read == pytest.approx((1 - s.hits) * moe.layers * moe.top_k * s.expert_bytes)
    assert s.reading_s == pytest.approx(s.read / 2.1e9)
    assert s.reading_s is not None
    assert s.computing_s is not None
    assert s.storing_s == pytest.approx(s.read / (load_device("galaxy-s25").dram_gb_per_s.number * 1e9))
    assert s.bound_per_s == pytest.approx(1 / max(s.reading_s, s.computing_s))
    # more reading than computing: a tenth of the computing is not hidden
    assert s.reading_s > s.computing_s + s.storing_s
    assert 1 / (s.tokens_per_s or 0) == pytest.approx(s.reading_s + 0.1 * (s.computing_s + s.storing_s))
    found = planned(1500, hits=0.97)  # and the other way round
    assert found.reading_s is not None
    assert found.computing_s is not None
    assert found.storing_s is not None
    assert found.reading_s < found.computing_s + found.storing_s
    assert 1 / (found.tokens_per_s or 0) == pytest.approx(found.computing_s + found.storing_s + 0.1 * found.reading_s)


def test_more_memory_is_never_slower_and_all_of_it_reads_nothing() -> None:
    rates = [planned(mb).tokens_per_s or 0 for mb in (700, 1000, 1500, 2500, 4000)]
    assert rates == sorted(rates)
    whole = planned(4000)
    assert (whole.held, whole.read, whole.hits) == (whole.experts, 0.0, 1.0)
    assert whole.tokens_per_s == whole.bound_per_s
    assert planned(1500, hits=0.6).read < planned(1500).read


def test_a_budget_below_one_token_is_refused_with_the_least() -> None:
    with pytest.raises(UserError, match=r"mobilemoe-l: --memory-mb 100 is less than (\d+)") as caught:
        planned(100)
    least = int(str(caught.value).split("less than ")[1].split(":")[0])
    assert planned(least).held >= 32 * 4
    with pytest.raises(UserError, match="is less than"):
        planned(least - 1)


def test_without_a_device_nothing_is_said_of_speed() -> None:
    s = planned(1500, device=None)
    assert (s.reading_s, s.computing_s, s.tokens_per_s, s.bound_per_s) == (None, None, None, None)


def test_the_command(moec: Moec) -> None:
    arguments = ("plan", L, "--device", "galaxy-s25", "--context", "4096")
    status, out, err = moec(*arguments, "--memory-mb", "1500", "--hits", "0.6")
    assert status == 0, err
    assert "60% found (measured)" in out
    assert "tokens/s expected, with a core that is free for reading" in out
    assert " read a token\n" in out
    status, out, err = moec(*arguments, "--memory-mb", "1500", "--json")
    assert status == 0, err
    assert json.loads(out)["streamed"]["budget"] == 1_500_000_000
    refused(moec(*arguments, "--hits", "0.6"), "--hits needs a memory budget")
    refused(moec("plan", DENSE, "--memory-mb", "4000"), f"{load_spec(DENSE).name}: ", "the model has none")


def test_a_rate_of_storage_is_measured(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(bytes(8 << 20))
    try:
        rate = machine.storage_rate(file, 1 << 20, readers=2, seconds=0.05)
        in_order = machine.sequential_storage_rate(file, 3 << 20, seconds=0.05)  # the end is no whole block
    except OSError:
        pytest.skip("this file system has no direct reads")
    assert rate > 1e6
    assert in_order > 1e6
