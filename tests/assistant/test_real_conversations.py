"""A real model, compiled: it answers, the same on every thread count, in formats, and under lm-evaluation-harness."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from moec.compiler.artifact import Artifact

pytestmark = [pytest.mark.slow, pytest.mark.real_model]

SPEC = """
name: smollm2-135m
model: {{transformers: {folder}, context: 2048}}
quantization: {{weights: int8, group_size: 32, activations: fp32, kv_cache: fp32, expert_group_axis: in}}
targets: [xnnpack]
"""
ASK = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def artifact(smollm2_on_grid: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    import moec

    folder = tmp_path_factory.mktemp("real")
    spec = folder / "spec.yaml"
    spec.write_text(SPEC.format(folder=smollm2_on_grid))
    return moec.compile(spec, out=folder / "artifact")


def test_it_answers_the_same_on_every_thread_count(artifact: Artifact) -> None:
    import moec

    said = set()
    for threads in (1, 2, 3):
        session = moec.load(artifact.with_threads(threads))
        assert "Paris" in "".join(session.generate(ASK, max_new_tokens=20))
        said.add("".join(session.generate("Once upon a time", max_new_tokens=80, temperature=0.9, top_p=0.95, seed=7)))
        session.close()
    assert len(said) == 1, said


def test_it_is_held_to_formats(artifact: Artifact) -> None:
    import moec

    pytest.importorskip("llguidance", reason="structured output: pip install 'moec[structured]'")
    jsonschema = pytest.importorskip("jsonschema", reason="the independent party: pip install 'moec[dev]'")
    person = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 30},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    session = moec.load(artifact)
    for seed in range(10):
        asked = [{"role": "user", "content": "Invent a person."}]
        text = "".join(session.generate(asked, json_schema=person, temperature=1.2, seed=seed, max_new_tokens=120))
        jsonschema.validate(json.loads(text), person)
    session.close()


def test_conversations_are_continued_from_what_is_held(artifact: Artifact) -> None:
    """Going on from the cache gives the text of a session that computes all anew."""
    import moec

    session, fresh = moec.load(artifact), moec.load(artifact)
    messages: list[dict[str, Any]] = [*ASK]
    for question in ("And of Italy?", "Which of them is larger?"):
        answer = session.generate(messages, max_new_tokens=30)
        text = "".join(answer)
        fresh.reset()
        assert "".join(fresh.generate(messages, max_new_tokens=30)) == text
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": question}]
    assert answer.stats.reused_tokens > 30  # type: ignore[attr-defined]
    session.close()
    fresh.close()


def test_lm_evaluation_harness_scores_the_artifact_that_is_served(
    artifact: Artifact, smollm2_on_grid: Path, tmp_path: Path
) -> None:
    """Its local-completions client gets, through HTTP, the numbers that the session gives without it."""
    pytest.importorskip("starlette", reason="the server: pip install 'moec[serve]'")
    pytest.importorskip("lm_eval", reason="the harness: pip install 'moec[eval]'")
    pytest.importorskip("tenacity", reason="the harness's client: pip install 'lm-eval[api]'")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    import moec
    from moec.assistant.assistant import Assistant
    from moec.compiler.session import SessionBase
    from moec.compiler.tokenizer import load_tokenizer
    from moec.training.evaluate_models import HarnessModel, SessionModel
    from tests.assistant.server.running import running

    session, direct = moec.load(artifact), moec.load(artifact)
    assert isinstance(session, SessionBase)
    pairs = [
        ("The capital of France is", " Paris"),
        ("The capital of France is", " a city"),
        ("Two and two is", " four"),
    ]
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    options = {"until": ["."], "max_gen_toks": 12, "do_sample": False}
    open_ended = [Instance("generate_until", {}, ("The capital of France is", options), 0)]
    with running(tmp_path, session, speaks=Assistant.of(artifact)) as at:
        served = LocalCompletionsAPI(
            base_url=f"{at.url}/v1/completions",
            model="small",
            tokenizer=str(smollm2_on_grid),
            tokenizer_backend="huggingface",
            max_retries=1,
        )
        scores = served.loglikelihood(asked, disable_tqdm=True)
        said = served.generate_until(open_ended, disable_tqdm=True)
    here = HarnessModel(SessionModel(direct, artifact.manifest.model), load_tokenizer(artifact.path("tokenizer.json")))
    wanted = here.loglikelihood(asked)
    for (value, greedy), (other, likeliest) in zip(scores, wanted, strict=True):
        # both are float64 sums over logits of the same artifact; chunks of other lengths may differ in a last bit
        assert value == pytest.approx(other, abs=1e-3)
        assert greedy == likeliest
    assert said == here.generate_until(open_ended)
    assert "Paris" in said[0]
    assert threading.active_count() < 20
