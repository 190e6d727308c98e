"""The dense teacher of a stage: what it computes for a batch, as the student's lesson (`training/loss.py`).

Every process holds the whole teacher, in the type of the stage's products; it is not trained.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from moec.compiler.errors import SpecError
from moec.compiler.spec.training import Distillation, TrainingStage
from moec.sources.decoder.config import DecoderConfig
from moec.sources.dense_decoder import open_dense_decoder
from moec.training.checkpoints import load_weights
from moec.training.loss import Lesson, Taught
from moec.training.model import TrainingDecoder


def check_teacher(teacher: DecoderConfig, student: DecoderConfig, place: str, stage: TrainingStage) -> None:
    """SpecError for a teacher whose predictions or blocks a stage cannot learn."""
    if teacher.vocab_size != student.vocab_size:
        raise SpecError(
            f"vocab_size is {student.vocab_size}, the teacher's {teacher.vocab_size}",
            place=place,
            remedy="distillation needs one vocabulary",
        )
    assert stage.distillation is not None
    shapes = [(c.layers, c.d_model) for c in (teacher, student)]
    if stage.distillation.blocks and shapes[0] != shapes[1]:
        raise SpecError(
            f"stage {stage.name} learns block by block, but the teacher has {shapes[0][0]} layers of {shapes[0][1]}, "
            f"the model {shapes[1][0]} of {shapes[1][1]}",
            place=place,
            remedy="use `distillation: {logits: 1.0}`",
        )
    if stage.context > teacher.context:
        raise SpecError(
            f"stage {stage.name} has rows of {stage.context} tokens, the teacher's context is {teacher.context}",
            place=place,
            remedy="lower the stage's context",
        )


class Teacher:
    """A dense decoder that answers for batches, under the caller's autocast."""

    def __init__(self, folder: Path, context: int, device: torch.device) -> None:
        dense = open_dense_decoder(folder)
        config = dense.config.model_copy(update={"context": context})
        self._model = TrainingDecoder(config)
        load_weights(self._model, dense.weights())
        self._model = self._model.eval().requires_grad_(False).to(device)
        self._seen: list[tuple[Tensor, Tensor]] = []
        for layer in self._model.model.layers:
            layer.feed_forward.register_forward_hook(self._block)  # type: ignore[union-attr]

    @torch.no_grad()
    def lesson(self, tokens_BT: Tensor, documents_BT: Tensor, wanted: Distillation) -> Lesson:
        """What `wanted` needs of these tokens."""
        self._seen = []
        h_BTD, _ = self._model.hidden(tokens_BT, documents_BT)
        blocks = tuple(self._seen) if wanted.blocks else ()
        self._seen = []
        if not wanted.whole_model:
            return Lesson(blocks, None)
        taught = Taught(h_BTD.flatten(0, 1), self._model.head(), wanted.lm_loss, wanted.logits, wanted.temperature)
        return Lesson(blocks, taught)

    def _block(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._seen.append((inputs[0], output))
