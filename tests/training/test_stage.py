"""A stage's steps against the same written plainly: whole logits, autograd, torch's own optimizer and clipping."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moec.compiler.errors import RunError
from moec.compiler.spec.training import TrainingStage
from moec.sources.decoder.decoder import Decoder
from moec.training.data.batches import Batch, Batches
from moec.training.data.shards import Corpus
from moec.training.model import TrainingDecoder
from moec.training.optimizer import learning_rate
from moec.training.parallel import World
from moec.training.stage import Trainer
from tests.training.small import PRETRAIN, SFT, config_of, corpus_of, model_of, random_weights


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return corpus_of(tmp_path_factory.mktemp("data") / "corpus")


def stage_of(section: dict[str, Any], **changes: Any) -> TrainingStage:
    return TrainingStage.model_validate(section | {"precision": "fp32"} | changes)


def batches_of(corpus: Corpus, stage: TrainingStage) -> Batches:
    return Batches(corpus, stage.mixture, stage.context, stage.batch_tokens, 3)


def trainer_of(corpus: Corpus, stage: TrainingStage) -> Trainer:
    config = config_of()
    return Trainer(model_of(config, random_weights(config)), stage, batches_of(corpus, stage), World())


class Plain:
    """AdamW on mean cross entropy plus the z-loss, and the biases, one tensor and one formula at a time."""

    def __init__(self, stage: TrainingStage) -> None:
        config = config_of()
        self.stage = stage
        self.model: TrainingDecoder = model_of(config, random_weights(config)).train()
        self.model.set_capacity(stage.dispatch.capacity_factor)
        self.router_logits: list[Tensor] = []
        for block in self.model.blocks:
            block.router.register_forward_hook(lambda _m, _i, logits: self.router_logits.append(logits))
        given = stage.optimizer
        decayed = [p for p in self.model.parameters() if p.dim() > 1]
        others = [p for p in self.model.parameters() if p.dim() == 1]
        self.adamw = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": given.weight_decay}, {"params": others, "weight_decay": 0.0}],
            betas=(given.beta1, given.beta2), eps=given.eps, foreach=False,
        )  # fmt: skip

    def step(self, batch: Batch, number: int) -> tuple[float, float]:
        """(cross entropy, gradient norm) of step `number` from 1."""
        self.router_logits.clear()
        logits_BTV = self.model(batch.tokens_BT, batch.documents_BT)[0]
        counted = batch.loss_mask_BT.bool()
        loss = F.cross_entropy(logits_BTV[counted], batch.targets_BT[counted])
        z = torch.stack([x.exp().sum(-1).log().square().mean() for x in self.router_logits]).mean()
        self.adamw.zero_grad()
        (loss + self.stage.z_loss * z).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.stage.optimizer.clip_norm)
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate(self.stage.learning_rate, number * 256, self.stage.tokens)
        biases = [self._moved_bias(place) for place in range(len(self.model.blocks))]
        self.adamw.step()
        for block, bias in zip(self.model.blocks, biases, strict=True):
            block.expert_bias.copy_(bias)
        return loss.item(), float(norm)

    def _moved_bias(self, place: int) -> Tensor:
        """An expert that more than its share of tokens chose becomes less attractive by the rate, or the reverse."""
        block = self.model.blocks[place]
        bias, rate = block.expert_bias.clone(), self.stage.balancing.update_rate
        chosen = (self.router_logits[place].sigmoid() + bias).topk(block.moe.top_k).indices
        for expert in range(block.moe.experts):
            excess = int((chosen == expert).sum()) - chosen.numel() / block.moe.experts
            bias[expert] += -rate if excess > 0 else rate if excess < 0 else 0.0
        return bias


@pytest.mark.parametrize("factor", [None, 1.0])
def test_steps_are_those_of_the_plain_form(corpus: Corpus, factor: float | None) -> None:
    """With a z-loss, decay and clipping that matter: without any of them the weights are 500 tolerances off."""
    kind = {"kind": "dropless"} if factor is None else {"kind": "drop_and_pad", "capacity_factor": factor}
    stage = stage_of(
        PRETRAIN, dispatch=kind, z_loss=0.1, optimizer={"eps": 1e-3, "weight_decay": 0.5, "clip_norm": 0.5}
    )
    trainer, plain, batches = trainer_of(corpus, stage), Plain(stage), batches_of(corpus, stage)
    for number in (1, 2, 3):
        record = trainer.step()
        loss, norm = plain.step(batches.batch(number - 1), number)
        # fp32 sums over 256 tokens and 64 features in another order
        assert record["lm_loss"] == pytest.approx(loss, rel=1e-5)
        assert record["grad_norm"] == pytest.approx(norm, rel=1e-4)
        assert record["grad_norm"] > stage.optimizer.clip_norm
        assert (record["dropped_fraction"] > 0) == (factor is not None)
    for (name, mine), theirs in zip(trainer.model.named_parameters(), plain.model.parameters(), strict=True):
        # eps keeps AdamW from dividing rounding noise by itself: a gradient's error of 1e-6 moves a weight by lr * 1e-3
        torch.testing.assert_close(mine, theirs, atol=5e-6, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    for mine, theirs in zip(trainer.model.blocks, plain.model.blocks, strict=True):
        assert torch.equal(mine.expert_bias, theirs.expert_bias)


def test_the_loss_of_packed_examples_is_that_of_each_alone(corpus: Corpus) -> None:
    """A step of SFT against the compiler's decoder on one example at a time: responses only, no other example seen."""
    stage = stage_of(SFT)
    trainer, config = trainer_of(corpus, stage), config_of()
    decoder = Decoder(config, "loop")
    for name, value in random_weights(config).items():
        decoder.get_parameter(name).copy_(value)
    shard = corpus.shard("chat")
    assert shard.mask_N is not None
    examples = {}
    for start, end in zip(shard.starts[:-1], shard.starts[1:], strict=True):
        examples[tuple(shard.tokens_N[start:end].tolist())] = shard.mask_N[start:end].tolist()
    batch = batches_of(corpus, stage).batch(0)
    nll, count, packed = 0.0, 0, 0
    for row in range(len(batch.domains_B)):
        for document in batch.documents_BT[row].unique():
            ids = batch.tokens_BT[row, batch.documents_BT[row] == document]
            if tuple(ids.tolist()) not in examples:  # what is left of a row
                assert (ids == corpus.eos_id).all()
                continue
            packed += 1
            decoder.reset()
            with torch.no_grad():
                logits_TV = decoder(ids.unsqueeze(0), torch.zeros(1, dtype=torch.long))[0]
            answers = [t for t, flag in enumerate(examples[tuple(ids.tolist())]) if flag]
            nll += float(F.cross_entropy(logits_TV[[t - 1 for t in answers]], ids[answers], reduction="sum"))
            count += len(answers)
    assert packed > len(batch.domains_B)
    assert trainer.step()["lm_loss"] == pytest.approx(nll / count, rel=1e-5)  # fp32 sums in another order


def test_the_router_is_float32_in_bfloat16_training(corpus: Corpus) -> None:
    """Logits, their gradients, the weights, moments and biases; while the experts' products are bfloat16."""
    trainer = trainer_of(corpus, stage_of(PRETRAIN, precision="bf16"))
    block, types = trainer.model.blocks[0], []
    block.router.register_full_backward_hook(lambda _m, _i, out: types.append(out[0].dtype))
    block.router.register_forward_hook(lambda _m, _i, out: types.append(out.dtype))
    rows: list[torch.dtype] = []
    block.experts.register_forward_hook(lambda _m, _i, out: rows.append(out.dtype))
    trainer.step()
    assert types == [torch.float32, torch.float32]
    assert rows == [torch.bfloat16]
    assert {value.dtype for value in trainer.tensors().values()} == {torch.float32}


def test_an_infinite_gradient_changes_nothing(corpus: Corpus) -> None:
    """A finite loss may have an infinite gradient; the last step's would otherwise end in the checkpoint."""
    trainer = trainer_of(corpus, stage_of(PRETRAIN))
    weight = trainer.model.get_parameter("model.norm.weight")
    weight.register_hook(lambda grad: grad * torch.inf)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    with pytest.raises(RunError, match=r"the gradient's norm is (inf|nan) at step 1 of pretrain; lower learning_rate"):
        trainer.step()
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
