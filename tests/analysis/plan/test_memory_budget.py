"""Plans under a budget of memory, against arithmetic by hand and against the runtime that keeps it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from moec.analysis.plan.devices import load_device
from moec.analysis.plan.memory import memory
from moec.analysis.plan.memory_budget import Streamed, least_experts
from moec.analysis.plan.planner import check_fits, plan_spec
from moec.compiler.errors import CompileError, UserError
from moec.compiler.spec import Spec, load_spec, parse_spec
from moec.compiler.spec.device import Device
from moec.runtime import machine
from tests.conftest import Moec, refused

L = Path(__file__).parents[3] / "specs" / "models" / "mobilemoe-l.yaml"
DENSE = L.with_name("mobilellm-pro.yaml")
TINY = L.with_name("mobilemoe-tiny.yaml")


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
    with pytest.raises(UserError, match=r"mobilemoe-l: a memory budget of 100 MB is less than (\d+)") as caught:
        planned(100)
    least = int(str(caught.value).split("less than ")[1].split(" MB:")[0])
    assert planned(least).held >= 32 * 4
    with pytest.raises(UserError, match="is less than"):
        planned(least - 1)


def test_every_thread_has_an_expert() -> None:
    """As the runtime counts (expert_cache.cpp, least_slots): of a token, or one for each thread, at most all."""
    spec = load_spec(TINY)
    plan = plan_spec(spec, None)
    moe = plan.model.architecture.experts
    assert moe is not None
    of_a_token, everything = moe.layers * moe.top_k, moe.layers * moe.experts

    def least(threads: int) -> int:
        options = plan.model.options.model_copy(update={"threads": threads})
        return least_experts(replace(plan.model, options=options))

    assert [least(n) for n in (1, of_a_token, of_a_token + 1, 256)] == [
        of_a_token,
        of_a_token,
        of_a_token + 1,
        min(256, everything),
    ]
    options = plan.model.options.model_copy(update={"threads": of_a_token + 3})
    threaded = spec.model_copy(update={"targets": {"xnnpack": options}})
    with pytest.raises(UserError, match=rf"the {of_a_token + 3} experts that a token or the threads need"):
        plan_spec(threaded, None, memory_mb=1)


def test_without_a_device_nothing_is_said_of_speed() -> None:
    s = planned(1500, device=None)
    assert (s.reading_s, s.computing_s, s.tokens_per_s, s.bound_per_s) == (None, None, None, None)


def within(memory_mb: int | None, gives: float) -> tuple[Spec, Device]:
    """L with a budget in its options, and a phone whose apps get so many megabytes."""
    text = L.read_text().replace("targets: [xnnpack]", f"targets: {{xnnpack: {{memory_mb: {memory_mb}}}}}")
    phone = load_device("galaxy-s25")
    number = phone.memory_budget_mb.model_copy(update={"number": gives})
    return parse_spec(text if memory_mb else L.read_text()), phone.model_copy(update={"memory_budget_mb": number})


def test_a_budget_is_what_must_fit() -> None:
    spec, phone = within(1200, gives=1300)
    plan = plan_spec(spec, phone)
    assert plan.peak.peak > phone.budget
    assert plan.streamed is not None
    assert (plan.needs, plan.fits, plan.longest, plan.advice) == (1_200_000_000, True, 8192, ())
    check_fits(spec, phone, "xnnpack")
    assert plan_spec(spec, phone, memory_mb=1000).needs == 1_000_000_000
    more = plan_spec(spec, phone, memory_mb=1400)
    assert (more.needs, more.fits) == (1_400_000_000, False)
    with pytest.raises(CompileError, match="needs 1,400 MB at its context of 8192, galaxy-s25 gives an app 1,300 MB"):
        check_fits(within(1400, gives=1300)[0], phone, "xnnpack")
    with pytest.raises(CompileError, match=r"a memory budget of 300 MB is less than \d+ MB: .*; --force compiles it"):
        check_fits(within(300, gives=1300)[0], phone, "xnnpack")


def test_the_longest_context_within_a_budget_is_the_longest_that_one_token_has_room_for() -> None:
    spec, phone = within(None, gives=5000)
    least = planned(2000).least // 10**6 + 1  # of a context of 4096
    longest = plan_spec(spec, phone, context=4096, memory_mb=least).longest
    assert longest is not None
    assert 4096 <= longest < 8192
    plan_spec(spec, phone, context=longest, memory_mb=least)
    with pytest.raises(UserError, match="is less than"):
        plan_spec(spec, phone, context=longest + 1, memory_mb=least)


def test_what_does_not_fit_is_told_of_a_budget() -> None:
    spec, phone = within(None, gives=1300)
    plan = plan_spec(spec, phone)
    assert plan.fits is False
    (found,) = [a for a in plan.advice if "memory_mb" in a.change]
    assert (found.change, found.weights) == ("memory_mb: 1300 in the target's options", "the same")
    assert plan_spec(spec, phone, memory_mb=1300).fits
    spec, phone = within(None, gives=300)  # less than one token needs
    assert not [a for a in plan_spec(spec, phone).advice if "memory_mb" in a.change]


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
    assert (
        "\nfits: the memory budget of 1.50 GB, of the 5.00 GB that galaxy-s25 gives an app"
        in moec(*arguments, "--memory-mb", "1500")[1]
    )
    refused(moec(*arguments, "--hits", "0.6"), "mobilemoe-l: --hits needs a memory budget")
    refused(moec("plan", L, "--target", "metal", "--memory-mb", "900"), "the target metal has no memory budget")
    refused(moec(*arguments, "--target", "none"), "mobilemoe-l: unknown target 'none'")
    refused(moec("plan", L, "--target", "onnx"), "mobilemoe-l: target onnx has no sizes to plan with")
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
