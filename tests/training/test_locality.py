"""The loss of locality by its definition, what it does to a run, and stages that train routers alone."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from moec.checkpoints import open_store
from moec.checkpoints.store import WeightStore
from moec.compiler.errors import SpecError, UserError
from moec.sources.decoder.layout import router_names
from moec.training.checkpoints import write_checkpoint
from moec.training.data.shards import Corpus, write_tokens
from moec.training.locality import TAU, WINDOW, locality, window_ends
from moec.training.metrics import DISTINCT
from moec.training.rounding import Rounding
from moec.training.run import train
from tests.training.parallel_worker import perform
from tests.training.small import DENSE, INT4, MOE, STAGE, config_of, random_weights, spec_of

LOCAL: dict[str, Any] = STAGE | {
    "name": "sft", "tokens": 512 * 6, "context": 64, "batch_tokens": 512, "precision": "fp32", "mixture": {"web": 1},
    "eval_every": None, "learning_rate": {"peak": 3e-3, "shape": "constant"}, "locality": 0.3,
}  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Long documents, each in a part of the vocabulary of its own: there is something for neighbours to share."""
    source = random.Random(2)

    def documents(count: int) -> list[list[int]]:
        found = []
        for _ in range(count):
            first = source.randrange(2, 260)
            found.append([0, *(first + source.randrange(24) for _ in range(source.randint(20, 90))), 1])
        return found

    texts = {"web": {"train": documents(120), "heldout": documents(12)}}
    return write_tokens(tmp_path_factory.mktemp("data") / "corpus", texts, vocab_size=300, eos_id=1, masks={})


def randomly(seed: int, rows: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Documents of all lengths, and targets; the last document of a row is padding, without any."""
    generator = torch.Generator().manual_seed(seed)
    documents = (torch.rand(rows, tokens, generator=generator) < 0.06).long().cumsum(1)
    mask = (torch.rand(rows, tokens, generator=generator) < 0.5).float()
    mask[documents == documents[:, -1:]] = 0
    return documents, mask


def windows_of(documents: torch.Tensor, mask: torch.Tensor) -> list[tuple[int, int]]:
    """(row, first token) of every window, one token at a time."""
    found = []
    for row, (numbers, weights) in enumerate(zip(documents.tolist(), mask.tolist(), strict=True)):
        has_target = {number for number, weight in zip(numbers, weights, strict=True) if weight > 0}
        for first in range(len(numbers) - WINDOW + 1):
            own = set(numbers[first : first + WINDOW])
            if len(own) == 1 and own <= has_target:
                found.append((row, first))
    return found


@pytest.mark.parametrize(("seed", "tokens"), [(0, 90), (1, 16), (2, 15), (3, 200), (4, 1)])
def test_windows_stay_within_documents_and_out_of_padding(seed: int, tokens: int) -> None:
    documents, mask = randomly(seed, 3, tokens)
    if tokens == 16:
        documents[0], mask[0] = 0, 1.0
    ends = window_ends(documents, mask)
    assert [(row, end - WINDOW + 1) for row, end in ends.nonzero().tolist()] == windows_of(documents, mask)
    assert ends.any() == (tokens >= 16)


@pytest.mark.parametrize(("seed", "experts", "top_k"), [(0, 8, 3), (1, 60, 4), (2, 5, 1), (3, 4, 3), (4, 256, 8)])
def test_the_loss_and_its_gradient_by_hand(seed: int, experts: int, top_k: int) -> None:
    """The module's equations, one window and one token at a time, in float64."""
    generator = torch.Generator().manual_seed(seed)
    documents, mask = randomly(seed, 2, 70)
    values = torch.randn(140, experts, generator=generator).cumsum(0).mul(0.02).requires_grad_()
    indices = values.topk(top_k).indices
    usage = torch.rand(experts, generator=generator).add(0.1)
    usage /= usage.sum()
    spread, distinct = locality(values, indices, window_ends(documents, mask), usage, with_loss=True)
    (gradient,) = torch.autograd.grad(spread, values)

    v = values.detach().double().requires_grad_()
    best = v.detach().topk(top_k + 1).values
    border = (best[:, top_k - 1] + best[:, top_k]) / 2
    width = TAU * v.detach().std(-1, keepdim=True)
    q = ((v.detach() - border[:, None]) / width).sigmoid()
    slope = q * (1 - q)
    followed = (slope * v).sum(-1, keepdim=True) / slope.sum(-1, keepdim=True)
    q = q + slope * ((v - followed) - (v - followed).detach()) / width  # the line through q, whose slope is that of q
    chosen = torch.zeros(140, experts, dtype=torch.float64).scatter_(1, indices, 1.0)
    wanted, kinds, stand_in = 0.0, 0, torch.zeros((), dtype=torch.float64)
    for row, first in windows_of(documents, mask):
        part = slice(row * 70 + first, row * 70 + first + WINDOW)
        p = chosen[part].sum(0) / (top_k * WINDOW)
        kinds += int((p > 0).sum())
        floor = 0.5 / (top_k * WINDOW)
        u = usage.double().clamp(min=floor)
        wanted += math.log(experts / top_k) - sum(
            float(x) * math.log(x / y) for x, y in zip(p, u, strict=True) if x > 0
        )
        stand_in = stand_in - (q[part].sum(0) / (top_k * WINDOW) * (p.clamp(min=floor) / u).log()).sum()
    assert int(distinct) == kinds
    # float32 sums of some thousand terms below one
    assert float(spread.detach()) == pytest.approx(wanted, rel=1e-5, abs=1e-4)
    torch.testing.assert_close(gradient.double(), torch.autograd.grad(stand_in, v)[0], rtol=1e-3, atol=1e-4)
    assert float(gradient.sum(-1).abs().max()) < 1e-3 * float(
        gradient.abs().max()
    )  # never the level of a token's scores
    # in steps that do not depend on the scale of the scores
    scaled = (values.detach() * 100).requires_grad_()
    again, _ = locality(scaled, indices, window_ends(documents, mask), usage, with_loss=True)
    (small,) = torch.autograd.grad(again, scaled)
    torch.testing.assert_close(small * 100, gradient, rtol=1e-3, atol=1e-4)


def test_tokens_that_select_alike_have_no_loss_and_no_expert_left_out_has_one() -> None:
    ends = window_ends(torch.zeros(1, 40, dtype=torch.int32), torch.ones(1, 40))
    values = torch.linspace(0, 1, 6).expand(40, 6)
    even, same = torch.full((6,), 1 / 6), torch.tensor([0, 0, 0, 0, 0.5, 0.5])
    spread, distinct = locality(values, values.topk(2).indices, ends, even, with_loss=True)
    assert float(spread) == pytest.approx(0, abs=1e-5)
    assert int(distinct) == 2 * int(ends.sum())
    # where all text uses these two, there is nothing to gain: the routers have collapsed
    spread, _ = locality(values, values.topk(2).indices, ends, same, with_loss=True)
    assert float(spread) == pytest.approx(math.log(3) * int(ends.sum()), rel=1e-5)
    spread, distinct = locality(values, values.topk(6).indices, ends, even, with_loss=True)  # every token uses all
    assert float(spread) == 0
    assert int(distinct) == 6 * int(ends.sum())


def test_nothing_crosses_a_document() -> None:
    documents = torch.tensor([[0] * 20 + [1] * 20])
    values = torch.randn(40, 7, generator=torch.Generator().manual_seed(1)).requires_grad_()
    ends = window_ends(documents, torch.ones(1, 40))
    gradients = []
    for other in (values.detach()[:20], torch.randn(20, 7)):
        whole = torch.cat([other, values[20:]])
        spread, _ = locality(whole, whole.topk(2).indices, ends, torch.full((7,), 1 / 7), with_loss=True)
        gradients.append(torch.autograd.grad(spread, values)[0][20:])
    assert torch.equal(*gradients)


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def initial(folder: Path) -> Path:
    write_checkpoint(folder, config_of(), random_weights(config_of(), seed=1), tokenizer=None)
    return folder


def test_a_run_with_locality_uses_fewer_experts_at_a_time_and_stays_balanced(corpus: Corpus, tmp_path: Path) -> None:
    init = initial(tmp_path / "init")
    stage = LOCAL | {"tokens": 512 * 30, "balancing": {"update_rate": 1e-2}}
    found = {}
    for name, weight in (("control", 0.0), ("local", 0.3)):
        train(spec_of(stage | {"locality": weight}), data=corpus, out=tmp_path / name, init=init, threads=1)
        found[name] = lines(tmp_path / name)
    first, last = ({name: [x for x in own if "heldout" in x][at] for name, own in found.items()} for at in (0, -1))
    assert first["control"] == first["local"]
    assert last["local"][DISTINCT]["web"] < 0.85 * last["control"][DISTINCT]["web"]
    (load,) = last["local"]["expert_load"].values()
    assert all(max(layer) < 2.5 * sum(layer) / len(layer) for layer in load)
    assert min(min(layer) for layer in load) > 0
    step = found["local"][1]
    assert step["loss"] == pytest.approx(step["lm_loss"] + 1e-4 * step["z_loss"] + 0.3 * step["locality"], rel=1e-6)
    assert "locality" not in found["control"][1]
    assert 3 <= step[DISTINCT] <= 8


def test_micro_batches_change_nothing_but_the_order_of_sums(corpus: Corpus, tmp_path: Path) -> None:
    stage = LOCAL | {"tokens": 512 * 2}
    init = initial(tmp_path / "init")
    for name, more in (("whole", {}), ("pieces", {"micro_batch_tokens": 3 * 64})):
        train(spec_of(stage | more), data=corpus, out=tmp_path / name, init=init, threads=1)
    for a, b in zip(lines(tmp_path / "whole"), lines(tmp_path / "pieces"), strict=True):
        if "loss" in a:  # sums of float32 in another order
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
            assert b["locality"] == pytest.approx(a["locality"], rel=1e-5)
            assert b[DISTINCT] == a[DISTINCT]


def test_bfloat16_and_documents_too_short_for_a_window(corpus: Corpus, tmp_path: Path) -> None:
    texts = {"web": {name: [[0, 5, 7, 9, 1]] * 40 for name in ("train", "heldout")}}
    short = write_tokens(tmp_path / "short", texts, vocab_size=300, eos_id=1, masks={})
    init = initial(tmp_path / "init")
    stage = LOCAL | {"tokens": 512 * 2, "precision": "bf16"}
    train(spec_of(stage), data=short, out=tmp_path / "none", init=init, threads=1)
    train(spec_of(stage), data=corpus, out=tmp_path / "some", init=init, threads=1)
    none, some = ([x for x in lines(tmp_path / name) if "loss" in x][-1] for name in ("none", "some"))
    assert none["locality"] == 0
    assert DISTINCT not in none
    assert some["locality"] > 0


# --- routers alone ----------------------------------------------------------------------------------------------------


def raw(store: WeightStore) -> dict[str, tuple[str, bytes]]:
    return {n: (e.dtype, e.tensor().view(torch.uint8).numpy().tobytes()) for n, e in store.entries.items()}


@pytest.mark.parametrize("kind", ["bf16", "float32", "packed"])
def test_nothing_but_routers_changes(kind: str, corpus: Corpus, tmp_path: Path) -> None:
    """Every other tensor is the same to the byte, in its type and layout: INT4 codes and scales among them."""
    spec = spec_of(LOCAL | {"trains": "routers"})
    init = tmp_path / "init"
    rounding = {"bf16": None, "packed": Rounding(spec.quantization), "float32": Rounding(spec.quantization, bits=6)}[
        kind
    ]
    write_checkpoint(init, config_of(), random_weights(config_of(), seed=1), tokenizer=None, rounding=rounding)
    result = train(spec, data=corpus, out=tmp_path / "run", init=init, threads=1)
    before, after = (open_store(folder, config_of()) for folder in (init, result.checkpoint()))
    assert after.packed == before.packed == (kind == "packed")
    a, b = raw(before), raw(after)
    assert a.keys() == b.keys()
    assert {name for name in a if a[name] != b[name]} == set(router_names(config_of()))
    assert {name: dtype for name, (dtype, _) in a.items()} == {name: dtype for name, (dtype, _) in b.items()}
    evaluations = [x for x in lines(tmp_path / "run") if "heldout" in x]
    assert evaluations[-1][DISTINCT]["web"] < evaluations[0][DISTINCT]["web"]


def test_a_stopped_run_of_routers_ends_as_one_without_a_stop(corpus: Corpus, tmp_path: Path) -> None:
    spec = spec_of(LOCAL | {"trains": "routers"}).model_dump(mode="json", exclude_none=True)
    init = str(initial(tmp_path / "init"))

    def job(name: str, **more: Any) -> dict[str, Any]:
        return {"spec": spec, "data": str(corpus.folder), "out": str(tmp_path / name), **more}

    perform(job("whole", options={"init": init}))
    perform(job("stopped", options={"init": init}, stop_at=4))
    state = next((tmp_path / "stopped/state").glob("sft-*"))
    moments = [name for name in _state_names(state) if name.endswith("/first")]
    assert sorted(n.removesuffix("/first") for n in moments) == sorted(
        name for name in router_names(config_of()) if name.endswith(".weight")
    )
    perform(job("stopped", options={"resume": True}))  # which checkpoint it began with is in run.json
    files = [tmp_path / name / "sft/model.safetensors" for name in ("whole", "stopped")]
    assert files[0].read_bytes() == files[1].read_bytes()


def _state_names(folder: Path) -> list[str]:
    import torch.distributed.checkpoint as dcp

    return list(dcp.FileSystemReader(folder).read_metadata().state_dict_metadata)


@pytest.mark.parametrize(
    ("stage", "model", "options", "message"),
    [
        ({}, DENSE, {}, "has `locality`, and the model has no routers; leave it out"),
        ({"locality": 0.0, "trains": "routers"}, DENSE, {}, "has `trains: routers`, and the model has no routers"),
        ({}, MOE | {"moe": MOE["moe"] | {"top_k": 8}}, {}, "every token uses all 8 experts"),
        ({}, MOE, {"backend": "torchtitan"}, "--backend torchtitan has no `locality`; use --backend torch"),
        ({"trains": "routers", "locality": 0.0}, MOE, {"backend": "torchtitan"}, "has no `trains: routers`"),
    ],
)
def test_what_routers_cannot_do_is_refused(
    stage: dict[str, Any], model: dict[str, Any], options: dict[str, Any], message: str, corpus: Corpus, tmp_path: Path
) -> None:
    context = min(64, model["context"])
    vocabulary = {"vocab_size": 300}
    with pytest.raises((SpecError, UserError), match=message):
        train(spec_of(LOCAL | {"context": context} | stage, model=model | vocabulary), data=corpus,
              out=tmp_path / "run", **options)  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_a_spec_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="is measured on 16 tokens, a row has 12"):
        spec_of(LOCAL | {"context": 12})
    with pytest.raises(ValueError, match="weights that are not trained stay as they are stored"):
        spec_of(LOCAL | {"name": "qat", "quantization": "from_spec", "trains": "routers"}, quantization=INT4)
