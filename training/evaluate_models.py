"""The harness's model interface, implemented by the training model and by an artifact's session.

B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows

from moec.assistant.sampling import Sampler, Sampling
from moec.checkpoints import spec_from_config
from moec.checkpoints.config_json import is_packed, read_json
from moec.checkpoints.folder import CONFIG
from moec.compiler.artifact import ModelRecord
from moec.compiler.errors import CheckpointError, RunError
from moec.compiler.program import Role
from moec.compiler.spec.loader import parse_spec
from moec.compiler.target import Session
from moec.compiler.tokenizer import TextTokenizer, encode_prompt
from moec.sources.decoder.config import decoder_of
from moec.training.checkpoints import load_model
from moec.training.model import TrainingDecoder
from moec.training.rounding import Rounding, WeightRounding

DECODERS = ("mobilemoe", "mobilellm")  # the model_type of their config.json
_AT_ONCE = 4096  # tokens of a batch, padding included


class Model(Protocol):
    """A language model over ids. `context` is the most tokens of a row."""

    context: int
    bos_id: int | None
    eos_ids: tuple[int, ...]

    def scores(self, rows: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
        """Logits float32 [T, V] of every position of each row, in order."""
        ...

    def greedy(self, prompts: Sequence[Sequence[int]], new_tokens: int, stop: frozenset[int]) -> Iterator[list[int]]:
        """The likeliest continuation of each prompt, up to `new_tokens` ids, the stop token left out."""
        ...


class SessionModel:
    """An artifact, one row at a time."""

    def __init__(self, session: Session, record: ModelRecord) -> None:
        self._session = session
        self.context, self.bos_id, self.eos_ids = record.context, record.bos_id, record.eos_ids

    def scores(self, rows: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
        for row in rows:
            self._session.reset()
            yield self._session.prefill(list(row), logits="all")

    def greedy(self, prompts: Sequence[Sequence[int]], new_tokens: int, stop: frozenset[int]) -> Iterator[list[int]]:
        likeliest = Sampler(Sampling())
        for prompt in prompts:
            self._session.reset()
            logits = self._session.prefill(list(prompt), logits="last")
            new: list[int] = []
            while len(new) < min(new_tokens, self.context - len(prompt)):
                token = likeliest(logits)
                if token in stop:
                    break
                new.append(token)
                if self._session.position >= self.context:
                    break
                logits = self._session.decode(token)
            yield new


class EagerModel:
    """The training model, several rows at a time: rows are padded on the right, where no earlier token looks."""

    def __init__(self, model: TrainingDecoder) -> None:
        self._model = model
        config = model.config
        self.context, self.bos_id, self.eos_ids = config.context, config.bos_id, tuple(config.eos_ids)

    @torch.no_grad()
    def scores(self, rows: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
        done: dict[int, np.ndarray] = {}
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        for batch in _batches(order, [len(row) for row in rows]):
            logits_BTV = self._logits([rows[i] for i in batch])
            for place, i in enumerate(batch):
                done[i] = logits_BTV[place, : len(rows[i])].numpy()
        yield from (done[i] for i in range(len(rows)))

    @torch.no_grad()
    def greedy(self, prompts: Sequence[Sequence[int]], new_tokens: int, stop: frozenset[int]) -> Iterator[list[int]]:
        """Without a cache: the whole row again for every token, which small models can afford."""
        rows = [list(prompt) for prompt in prompts]
        alive = [i for i, row in enumerate(rows) if len(row) < self.context]
        for _ in range(new_tokens):
            left: list[int] = []
            for batch in _batches(sorted(alive, key=lambda i: len(rows[i])), [len(row) for row in rows]):
                logits_BTV = self._logits([rows[i] for i in batch])
                for place, i in enumerate(batch):
                    token = int(logits_BTV[place, len(rows[i]) - 1].argmax())
                    if token in stop:
                        continue
                    rows[i].append(token)
                    if len(rows[i]) < self.context:
                        left.append(i)
            alive = left
        yield from (row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True))

    def _logits(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        longest = max(len(row) for row in rows)
        tokens_BT = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
        (logits_BTV,) = self._model(tokens_BT)
        return logits_BTV


class TransformersModel:
    """A checkpoint of the transformers library, computed by that library in float32: the reference of its artifact."""

    def __init__(self, folder: Path) -> None:
        """MissingExtra, CheckpointError. No code of the folder runs, and only safetensors are read."""
        from moec.sources.transformers_config import read_config

        config = read_config(folder)
        import transformers

        transformers.logging.disable_progress_bar()
        try:
            self._model = transformers.AutoModelForCausalLM.from_pretrained(
                str(folder),
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=torch.float32,
            ).eval()
        except Exception as error:  # whatever the library says of a folder
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            raise CheckpointError(f"transformers cannot load it: {reason}", place=str(folder)) from error
        text = config.get_text_config()
        self.context = int(getattr(text, "max_position_embeddings", 0) or 2048)
        bos, eos = getattr(text, "bos_token_id", None), getattr(text, "eos_token_id", None)
        self.bos_id = bos if isinstance(bos, int) else None
        self.eos_ids = tuple(i for i in (eos if isinstance(eos, (list, tuple)) else [eos]) if isinstance(i, int))

    @torch.no_grad()
    def scores(self, rows: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
        for row in rows:
            yield self._model(torch.tensor([list(row)])).logits[0].float().numpy()

    @torch.no_grad()
    def greedy(self, prompts: Sequence[Sequence[int]], new_tokens: int, stop: frozenset[int]) -> Iterator[list[int]]:
        for prompt in prompts:
            new: list[int] = []
            found = self._model(torch.tensor([list(prompt)]), use_cache=True)
            while len(new) < min(new_tokens, self.context - len(prompt)):
                token = int(found.logits[0, -1].argmax())
                if token in stop:
                    break
                new.append(token)
                found = self._model(torch.tensor([[token]]), past_key_values=found.past_key_values, use_cache=True)
            yield new


def _batches(order: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
    """Rows in `order` (shortest first), together as long as they stay below `_AT_ONCE` tokens with their padding."""
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) + 1) * lengths[i] > _AT_ONCE:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


class _CarriedWeights(Rounding):
    """Rounds activations and the cache. The weights are values of codes already and must not be rounded again."""

    def weight(self, role: Role) -> WeightRounding | None:
        return None


def checkpoint_model(folder: Path, simulate: bool) -> EagerModel | TransformersModel:
    """`checkpoint_decoder`, as the harness asks it; a model that is not one of moec's decoders by transformers."""
    if read_json(folder / CONFIG).get("model_type") not in DECODERS:
        if simulate:
            what = "only moec's own decoders are simulated"
            raise CheckpointError(what, place=str(folder), remedy="compile it, and evaluate the artifact")
        return TransformersModel(folder)
    return EagerModel(checkpoint_decoder(folder, simulate))


def checkpoint_decoder(folder: Path, simulate: bool) -> TrainingDecoder:
    """A checkpoint, computed in float32; with `simulate` as the artifact that `moec compile` makes of it.

    Packed INT4 codes are carried; float weights are rounded as compiling would. CheckpointError for a damaged folder.
    """
    spec = parse_spec(spec_from_config(folder))
    config = decoder_of(spec, "evaluated")
    rounding: Rounding | None = None
    if simulate:
        assert spec.quantization is not None
        file = folder / CONFIG
        rounding = (_CarriedWeights if is_packed(read_json(file), file) else Rounding)(spec.quantization)
    return load_model(folder, config, rounding)


# --- the harness's side -----------------------------------------------------------------------------------------------


class HarnessModel(TemplateLM):
    """A `Model` as lm-evaluation-harness asks for it. Special tokens written in a prompt are read as such."""

    def __init__(self, model: Model, tokenizer: TextTokenizer) -> None:
        super().__init__()
        self._model, self._tokenizer = model, tokenizer

    @property
    def eot_token_id(self) -> int:
        return self._model.eos_ids[0] if self._model.eos_ids else 0

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        return self.eot_token_id if self._model.bos_id is None else self._model.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids, with the special tokens that the tokenizer itself adds unless `add_special_tokens` is False."""
        if add_special_tokens is False:
            return self._tokenizer.encode(string, special_tokens=False)
        return encode_prompt(self._tokenizer, string, "a task's text")

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of a question and of an answer, split where generating would split them.

        The harness moves all white space at the question's end into the answer and then takes the answer to be what is
        behind as many ids as the question alone has. Where `?` and a line end are one id, nothing or too little of the
        answer is left. Here only spaces move, which belong to the word behind them.
        """
        question = context.rstrip(" ")
        answer = context[len(question) :] + continuation
        given, whole = self.tok_encode(question), self.tok_encode(question + answer)
        if whole[: len(given)] == given:
            return given, whole[len(given) :]
        return given, self.tok_encode(answer, add_special_tokens=False)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As the harness has it, without its bar."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
        pairs = [(list(context), list(continuation)) for _, context, continuation in requests]
        rows, counts = [], []
        for context, continuation in pairs:
            row = (context + continuation)[:-1]
            if len(continuation) > self._model.context:
                raise RunError(f"an answer of {len(continuation)} tokens is longer than the model's context")
            rows.append(row[-self._model.context :])  # the harness's own convention: the beginning is cut off
            counts.append(len(continuation))
        scored = self._model.scores(rows)
        return [
            log_probabilities(logits[len(logits) - count :], continuation)
            for logits, count, (_, continuation) in zip(scored, counts, pairs, strict=True)
        ]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each whole text, in windows that do not overlap."""
        found = []
        for request in requests:
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = list(get_rolling_token_windows(ids, self.prefix_token_id, self._model.context, 1))
            scored = self._model.scores([context for context, _ in windows])
            sums = (
                log_probabilities(logits[-len(predicted) :], predicted)[0]
                for logits, (_, predicted) in zip(scored, windows, strict=True)
            )
            found.append(float(sum(sums)))
        return found

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations up to a stop token, a stop text or the length asked for. RunError for sampling."""
        answers: dict[int, str] = {}
        groups: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for place, request in enumerate(requests):
            options = request.args[1]
            if options.get("do_sample"):
                raise RunError("the task samples", remedy="set do_sample: false in its generation_kwargs")
            key = (int(options.get("max_gen_toks", 256)), tuple(options.get("until") or ()))
            groups.setdefault(key, []).append(place)
        for (longest, until), places in groups.items():
            ends = {end for text in until if (end := self._tokenizer.token_to_id(text)) is not None}
            stop = frozenset({*self._model.eos_ids, *ends})
            room = max(1, self._model.context - longest)
            prompts = [self.tok_encode(requests[place].args[0])[-room:] for place in places]
            for place, ids in zip(places, self._model.greedy(prompts, longest, stop), strict=True):
                text = self._tokenizer.decode(ids)
                cuts = [at for piece in until if (at := text.find(piece)) >= 0]
                answers[place] = text[: min(cuts)] if cuts else text
        return [answers[place] for place in range(len(requests))]


def log_probabilities(logits_TV: np.ndarray, ids: Sequence[int]) -> tuple[float, bool]:
    """The sum of log p(ids), float64, and whether each id was the likeliest. Row t of the logits predicts id t."""
    wide_TV = np.asarray(logits_TV, np.float64)
    ids_T = np.asarray(ids, np.int64)  # an empty list is of floats otherwise
    top_T1 = wide_TV.max(axis=1, keepdims=True)
    total_T = np.log(np.exp(wide_TV - top_T1).sum(axis=1)) + top_T1[:, 0]
    chosen_T = wide_TV[np.arange(len(ids_T)), ids_T]
    return float((chosen_T - total_T).sum()), bool((wide_TV.argmax(axis=1) == ids_T).all())
