"""A real model in ONNX Runtime GenAI, with nothing but the artifact: its tokenizer, chat template and config."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moec.compiler import build
from moec.compiler.spec import Spec

pytestmark = pytest.mark.slow
NEW_TOKENS = 16
CHAT = [{"role": "user", "content": "What is the capital of France?"}]
TEXTS = ["Hello  world", " d\u00e9j\u00e0 vu \u4f60\u597d\n\tx=1;", "<|im_start|>user"]


def test_genai_chats_with_an_artifact(smollm2: Path, tmp_path: Path) -> None:
    """Text of the template and ids are those of transformers, the greedy continuation is that of our own session."""
    genai = pytest.importorskip("onnxruntime_genai", reason="needs the genai extra: pip install 'moec[genai]'")
    transformers = pytest.importorskip("transformers", reason="needs the transformers extra")
    spec = Spec.model_validate(
        {
            "name": "smollm2",
            "model": {"transformers": str(smollm2), "context": 128},
            "quantization": {"weights": "int4", "group_size": 32},
            "targets": {"onnx": {"kv_cache": "fp32"}},
        }
    )
    folder = build.compile(spec, target="onnx", out=tmp_path / "artifact").folder
    model = genai.Model(str(folder))
    tokenizer, oracle = genai.Tokenizer(model), transformers.AutoTokenizer.from_pretrained(smollm2)
    text = tokenizer.apply_chat_template(json.dumps(CHAT), add_generation_prompt=True)
    assert text == oracle.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    for each in (*TEXTS, text):
        assert tokenizer.encode(each).tolist() == oracle(each, add_special_tokens=False)["input_ids"]

    prompt = tokenizer.encode(text)
    settings = genai.GeneratorParams(model)
    settings.set_search_options(max_length=len(prompt) + NEW_TOKENS)
    generator = genai.Generator(model, settings)
    generator.append_tokens(prompt)
    theirs = []
    while not generator.is_done():
        generator.generate_next_token()
        theirs.append(int(generator.get_next_tokens()[0]))
    with build.load(folder) as session:  # type: ignore[attr-defined]
        logits, ours = np.asarray(session.prefill(prompt.tolist()))[-1], []
        while len(ours) < len(theirs):
            ours.append(int(logits.argmax()))
            logits = np.asarray(session.decode(ours[-1]))
    assert theirs == ours
    assert len(theirs) > 4
