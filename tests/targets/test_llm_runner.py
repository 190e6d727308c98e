"""ExecuTorch's own LLM runner on our programs: docs/llm-runner.md. Prompts go through in chunks, not token by token."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from executorch.exir._serialize._program import deserialize_pte_binary
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from moec.compiler.program import ModelInfo
from moec.compiler.states import Appended, Positions, Replaced, State
from moec.targets.constant_methods import constant_methods
from moec.targets.xnnpack.session import CpuSession
from tests.runtime import runtime_model as m
from tests.variants import quick

VOCABULARY = 300
COUNT = 5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program over the bytes of a text, and its tokenizer."""
    folder = tmp_path_factory.mktemp("llm")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "<bos>": 1, "<eos>": 2, "<end>": 3} | {c: 4 + i for i, c in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary | {f"x{i}": 260 + i for i in range(VOCABULARY - 260)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "<bos>", "<eos>", "<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(m, "V", VOCABULARY)
        m.write_pte(folder / "model.pte")
    return folder


def _runner(folder: Path, prompt: str) -> dict[str, Any]:
    files = [str(folder / name) for name in ("model.pte", "tokenizer.json")]
    command = [sys.executable, "-m", "tests.targets.llm_runner", *files, str(COUNT), prompt]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


@pytest.mark.parametrize("length", quick([1, m.MAX_TOKENS, m.MAX_TOKENS + 1, 40], ("1", str(m.MAX_TOKENS + 1))))
def test_it_runs_our_program_in_chunks_and_says_what_a_session_says(model: Path, length: int) -> None:
    prompt = "the quick brown fox jumps over the lazy dog"[:length]
    result = _runner(model, prompt)
    session = CpuSession(model / "model.pte", threads=1)
    session.trace(True)
    logits = session.prefill(Tokenizer.from_file(str(model / "tokenizer.json")).encode(prompt).ids)[-1]
    for _ in range(COUNT - 1):
        logits = session.decode(int(logits.argmax()))
    experts = [row for trace in session.take_traces() for row in trace.indices_TK.tolist()]
    calls: list[list[list[int]]] = result["experts"]
    whole, rest = divmod(length, m.MAX_TOKENS)
    assert [len(call) for call in calls] == [m.MAX_TOKENS] * whole + [rest] * (rest > 0) + [1] * (COUNT - 1)
    assert [row for call in calls for row in call] == experts  # the same tokens took the same ways
    assert result["text"]


def test_what_every_program_says_about_its_model() -> None:
    """Names of ExecuTorch's runner; `get_max_seq_len` is the most tokens of a call, on every target."""
    said = constant_methods(ModelInfo("m", vocab_size=9, context=64, max_tokens=16, bos_id=None, eos_ids=(2, 3)), ())
    assert said == {
        "get_vocab_size": 9,
        "get_max_seq_len": 16,
        "get_max_context_len": 64,
        "enable_dynamic_shape": True,
        "use_kv_cache": True,
        "get_bos_id": -1,
        "get_eos_ids": [2, 3],
        "get_states_appended": 1,
    }
    head_first = State("k", (1, 2, Positions(), 16), Appended(2))
    recurrent = State("h", (1, 16, 64), Replaced("delta_rule"))
    info = ModelInfo("m", vocab_size=9, context=64, max_tokens=16)
    for states, appended in (((head_first,), 2), ((head_first, recurrent), 0)):
        assert constant_methods(info, states)["get_states_appended"] == appended


def test_the_program_says_so(model: Path) -> None:
    names = {plan.name for plan in deserialize_pte_binary((model / "model.pte").read_bytes()).program.execution_plan}
    assert {"forward", "forward_all", "enable_dynamic_shape", "get_max_seq_len", "get_max_context_len"} <= names
