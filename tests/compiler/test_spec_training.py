"""The training section: the published recipe parses, and contradictions are faults with places."""

from __future__ import annotations

from pathlib import Path

import pytest

from moec.compiler.errors import SpecError
from moec.compiler.spec import parse_spec

TINY = (Path(__file__).parents[2] / "specs" / "models" / "mobilemoe-tiny.yaml").read_text().split("training:")[0]

# tokens, rates, dispatch and mixtures as published; batch sizes are not, and are made up here
RECIPE = """
training:
  seed: 3
  stages:
    - name: pretrain
      tokens: 6000000000000
      context: 2048
      batch_tokens: 4194304
      learning_rate: {peak: 4e-4, shape: cosine, warmup: 8000000000}
      dispatch: {kind: drop_and_pad, capacity_factor: 1.5}
      balancing: {kind: bias, update_rate: 1e-3}
      z_loss: 1e-4
      mixture: {web: 62, math: 11.6, code: 10, knowledge: 10, science: 6.4}
    - name: midtrain
      tokens: 500000000000
      context: 8192
      batch_tokens: 4194304
      learning_rate: {peak: 4e-5, shape: linear}
      dispatch: {kind: drop_and_pad, capacity_factor: 1.5}
      mixture: {knowledge: 32, code: 22, math: 21, web: 9}
    - name: sft
      tokens: 126000000000
      context: 8192
      batch_tokens: 1048576
      learning_rate: {peak: 4e-6}
      mixture: {math: 30.4, chat: 25.4, code: 22.1, safety: 9.4, science: 7.7, tools: 3.9, reasoning: 1.1}
    - name: qat
      tokens: 21000000000
      context: 8192
      batch_tokens: 1048576
      learning_rate: {peak: 4e-6}
      mixture: {math: 1}
      quantization: from_spec
"""


def test_the_published_recipe() -> None:
    training = parse_spec(TINY + RECIPE).training
    assert training is not None
    assert [stage.name for stage in training.stages] == ["pretrain", "midtrain", "sft", "qat"]
    first, last = training.stages[0], training.stages[3]
    assert first.learning_rate.peak == 4e-4
    assert first.dispatch.capacity_factor == 1.5
    assert first.shares()["web"] == pytest.approx(0.62)
    assert last.dispatch.kind == "dropless"
    assert last.quantization == "from_spec"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("name: sft", "name: pretrain", "training.stages[2].name: pretrain cannot come here"),
        ("name: sft", "name: stf", "training.stages[2].name: expected 'pretrain'"),
        ("kind: drop_and_pad, capacity_factor: 1.5}\n      balancing", "kind: drop_and_pad}\n      balancing",
         "training.stages[0].dispatch.capacity_factor: drop_and_pad needs a capacity factor"),
        ("kind: drop_and_pad, capacity_factor: 1.5}\n      balancing", "capacity_factor: 1.5}\n      balancing",
         "training.stages[0].dispatch.capacity_factor: dropless dispatch has no capacity"),
        ("mixture: {math: 1}", "mixture: {math: 0}", "training.stages[3].mixture: every domain has share 0"),
        ("mixture: {math: 1}", "mixture: {math: -1}", "training.stages[3].mixture.math: must be at least 0"),
        ("mixture: {math: 1}", "mixture: {}", "training.stages[3].mixture: "),
        ("quantization: from_spec", "z_loss: 0", "training.stages[3].quantization: stage qat trains with rounding"),
        ("peak: 4e-5", "peek: 4e-5", "training.stages[1].learning_rate.peek: unknown key; did you mean 'peak'?"),
        ("seed: 3", "seed: -3", "training.seed: must be at least 0, got -3"),
    ],
)  # fmt: skip
def test_contradictions(old: str, new: str, message: str) -> None:
    assert RECIPE.count(old) == 1
    with pytest.raises(SpecError) as caught:
        parse_spec(TINY + RECIPE.replace(old, new))
    assert message in str(caught.value)
