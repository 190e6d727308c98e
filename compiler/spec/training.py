"""The `training:` section: the stages that turn a fresh model into the checkpoint that the same spec compiles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from moec.compiler.spec.strict import Fault, Section, shown

StageName = Literal["pretrain", "midtrain", "sft", "qat"]
Rate = Annotated[float, Field(gt=0, lt=10, allow_inf_nan=False)]
ResponseWeight = Literal["token", "response"]
Share = Annotated[float, Field(ge=0, allow_inf_nan=False)]
ORDER: tuple[StageName, ...] = ("pretrain", "midtrain", "sft", "qat")


class Schedule(Section):
    """The learning rate: linear warm-up over `warmup` tokens to `peak`, then `shape` down to `final * peak`."""

    peak: Rate
    shape: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Annotated[int, Field(ge=0)] = 0
    final: Annotated[float, Field(ge=0, le=1)] = 0.1


class Optimizer(Section):
    """AdamW (Loshchilov and Hutter 2019) with decoupled weight decay and clipping of the global gradient norm."""

    name: Literal["adamw"] = "adamw"
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    eps: Rate = 1e-8
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.1
    clip_norm: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0


class Dispatch(Section):
    """`dropless` computes every selected pair; `drop_and_pad` gives each expert capacity_factor * T * k / E rows."""

    kind: Literal["dropless", "drop_and_pad"] = "dropless"
    capacity_factor: Annotated[float, Field(gt=0, le=64)] | None = None

    @classmethod
    def faults(cls, raw: Mapping[str, Any]) -> Iterator[Fault]:
        kind, factor = raw.get("kind", "dropless"), raw.get("capacity_factor")
        if kind == "drop_and_pad" and factor is None:
            yield Fault(("capacity_factor",), "drop_and_pad needs a capacity factor, such as 1.5")
        if kind == "dropless" and factor is not None:
            yield Fault(
                ("capacity_factor",), "dropless dispatch has no capacity; remove it or write kind: drop_and_pad"
            )


class Balancing(Section):
    """Auxiliary-loss-free balancing (Wang et al. 2024): the selection bias moves by `update_rate` per step.

    The rate falls linearly to `final * update_rate` over the stage: short runs need a fast rate to balance at all, and
    biases that keep moving as fast swing about the balance.
    """

    kind: Literal["bias", "none"] = "bias"
    update_rate: Rate = 1e-3
    final: Annotated[float, Field(ge=0, le=1)] = 1.0


class Distillation(Section):
    """A stage learns from a dense teacher (`moec train --teacher`), by the weighted sum of these losses.

    `logits`: KL(teacher || model) of the next token, in nats per token, both at `temperature` and times its square
    (Hinton et al. 2015). `blocks`: each layer's feed-forward block alone, on the teacher's inputs to it: the squared
    error of its output as a part of the output's square, in the mean over layers. `lm_loss`: the cross entropy of the
    text. With `blocks` alone only the blocks are computed and trained.
    """

    logits: Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)] = 0.0
    blocks: Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)] = 0.0
    lm_loss: Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)] = 0.0
    temperature: Annotated[float, Field(ge=0.1, le=100, allow_inf_nan=False)] = 1.0

    @classmethod
    def faults(cls, raw: Mapping[str, Any]) -> Iterator[Fault]:
        if not any(raw.get(key, 0.0) for key in ("logits", "blocks")):
            yield Fault((), "nothing is learnt from the teacher: give logits or blocks a weight above 0")

    @property
    def whole_model(self) -> bool:
        """Whether the model's own predictions are computed."""
        return self.logits > 0 or self.lm_loss > 0


class TrainingStage(Section):
    """One stage; `tokens` in all, sequences of `context` tokens, `batch_tokens` per optimizer step.

    `mixture` gives domains their share of the tokens; it is normalised to sum 1.
    """

    name: StageName
    tokens: Annotated[int, Field(ge=1)]
    context: Annotated[int, Field(ge=1, le=1 << 24)]
    batch_tokens: Annotated[int, Field(ge=1)]
    learning_rate: Schedule
    optimizer: Optimizer = Optimizer()
    dispatch: Dispatch = Dispatch()
    balancing: Balancing = Balancing()
    z_loss: Annotated[float, Field(ge=0, lt=1)] = 1e-4
    locality: Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)] = Field(
        default=0.0,
        description="weight of the loss that lets neighbouring tokens share experts: over all 16 tokens of a document, "
        "how little the experts that they use differ from what all text uses (training/locality.py)",
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="of products; auto: bf16 where the hardware computes it, fp32 where it is emulated"
    )
    mixture: Mapping[str, Share] = Field(min_length=1)
    trains: Literal["all", "routers"] = Field(
        default="all",
        description="routers: only router matrices and selection biases change; every other tensor of the stage's "
        "checkpoint is, bit for bit, that of the checkpoint that it begins with",
    )
    distillation: Distillation | None = Field(
        default=None, description="losses against a dense teacher, which `moec train --teacher` names"
    )
    response_weight: ResponseWeight = Field(
        default="token",
        description="what counts alike in the loss of instruction domains: every token of their responses, or every "
        "response of a row, however long",
    )
    quantization: Literal["none", "from_spec"] = Field(
        default="none", description="from_spec trains with the rounding of the spec's quantization section"
    )
    micro_batch_tokens: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="tokens of one forward and backward in one process; default: batch_tokens"
    )
    log_every: Annotated[int, Field(ge=1)] = Field(default=10, description="steps between lines of metrics.jsonl")
    eval_every: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="steps between evaluations; there is always one before the first and after the last"
    )
    eval_tokens: Annotated[int, Field(ge=1)] = Field(
        default=16384, description="held-out tokens of each domain in one evaluation"
    )
    checkpoint_every: Annotated[int, Field(ge=1)] = Field(
        default=200, description="steps between saved states, from which --resume continues"
    )

    @property
    def rows(self) -> int:
        """Sequences in one optimizer step."""
        return self.batch_tokens // self.context

    @property
    def steps(self) -> int:
        """Optimizer steps: the fewest that see `tokens` tokens."""
        return -(-self.tokens // (self.rows * self.context))

    @classmethod
    def faults(cls, raw: Mapping[str, Any]) -> Iterator[Fault]:
        context, batch, micro = raw.get("context"), raw.get("batch_tokens"), raw.get("micro_batch_tokens")
        if type(context) is int and type(micro) is int and 1 <= micro < context:
            yield Fault(
                ("micro_batch_tokens",),
                f"must hold at least one sequence of {shown(context)} tokens, got {shown(micro)}",
            )
        if type(context) is int and type(batch) is int and 1 <= batch < context:
            yield Fault(
                ("batch_tokens",), f"must hold at least one sequence of {shown(context)} tokens, got {shown(batch)}"
            )
        mixture = raw.get("mixture")
        if isinstance(mixture, Mapping) and mixture and all(value == 0 for value in mixture.values()):
            yield Fault(("mixture",), "every domain has share 0")
        quantization = raw.get("quantization", "none")
        if type(context) is int and context < 16 and raw.get("locality", 0):
            yield Fault(("locality",), f"is measured on 16 tokens, a row has {shown(context)}")
        if quantization != "none" and raw.get("trains", "all") != "all":
            yield Fault(
                ("trains",),
                "weights that are not trained stay as they are stored; write quantization: none, in sft or before",
            )
        if raw.get("name") == "qat" and quantization == "none":
            yield Fault(("quantization",), "stage qat trains with rounding: write quantization: from_spec")

    def shares(self) -> dict[str, float]:
        """The mixture, normalised to sum 1."""
        total = sum(self.mixture.values())
        return {domain: share / total for domain, share in self.mixture.items()}


class Training(Section):
    """The stages in order, each at most once. `seed` decides initial weights and the order of the data."""

    stages: Annotated[tuple[TrainingStage, ...], Field(strict=False, min_length=1)]
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    expert_parallel: Annotated[int, Field(ge=1, le=4096)] | None = Field(
        default=None, description="processes that share the experts of a layer; default: all of a run"
    )

    @classmethod
    def faults(cls, raw: Mapping[str, Any]) -> Iterator[Fault]:
        stages = raw.get("stages")
        if not isinstance(stages, (list, tuple)):
            return
        last = -1
        for index, stage in enumerate(stages):
            name = stage.get("name") if isinstance(stage, Mapping) else getattr(stage, "name", None)
            if name not in ORDER:
                continue
            place = ORDER.index(name)
            if place <= last:
                yield Fault(
                    ("stages", index, "name"), f"{name} cannot come here: the order is {', '.join(ORDER)}, each once"
                )
            last = max(last, place)
