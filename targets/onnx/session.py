"""An ONNX artifact with its KV cache, executed by ONNX Runtime on the CPU. The `Session` protocol.

T tokens, V vocabulary, D width, K experts of a token. One session runs one sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from moec.compiler.cores import usable_cores
from moec.compiler.errors import ArtifactError, RunError
from moec.compiler.session import SessionBase
from moec.compiler.target import MoeTrace
from moec.targets.onnx.facts import PAST, PRESENT, OnnxFacts

# The oldest ONNX Runtime that each flavour was tested with; QMoE has `accuracy_level` since 1.31.
OLDEST = {"standard": (1, 22), "ort": (1, 31)}
REMEDY = "compile it again with `moec compile`"
# ONNX Runtime may fuse DequantizeLinear with a product, and by default rounds activations to INT8 in the fused one
EXACT = {"session.qdq_matmulnbits_accuracy_level": "0"}
FOLDER = "session.model_external_initializers_file_folder_path"
_TAP_FIELDS = ("x", "indices", "weights", "y")


class OnnxSession(SessionBase):
    """Runs the file unchanged. While it traces, values of the MoE blocks are outputs as well; nothing else differs."""

    rewinds = True  # a call reads no more of a cache than the positions before it

    def __init__(
        self,
        model: Path,
        *,
        vocab_size: int,
        context: int,
        max_tokens: int,
        facts: OnnxFacts,
        threads: int | None = None,
    ) -> None:
        """`facts` are the manifest's: shapes of the caches, and where the values of each MoE layer lie."""
        super().__init__(str(model), vocab_size=vocab_size, context=context, max_tokens=max_tokens)
        self.threads = threads or usable_cores()
        self._path, self._taps = model, facts.moe_taps
        self._oldest = OLDEST.get(facts.flavour, max(OLDEST.values()))
        self._traced = False  # whether the loaded model has the outputs of the taps
        self._session: onnxruntime.InferenceSession | None = self._open(traced=False)
        self._empty = _empty_caches(self._session, self._place)
        self._past = dict(self._empty)

    @property
    def closed(self) -> bool:
        return self._session is None

    def reset(self) -> None:
        """Forget the sequence."""
        super().reset()
        self._past = dict(self._empty)

    def fork(self) -> OnnxSession:
        """Another session with the same tokens; the loaded model is shared, and so are caches, which calls replace."""
        self._check_open()
        fork = copy(self)
        fork._past, fork._ids, fork._traces, fork._tracing = dict(self._past), list(self._ids), [], False
        return fork

    def trace(self, enabled: bool) -> None:
        """Record every MoE layer of the calls that follow; `take_traces` collects them. The first call loads the
        model anew with those values as outputs, and it stays so: a call gives the same bits traced or not."""
        super().trace(enabled)
        if enabled and self._taps and not self._traced and self._session is not None:
            self._session = None  # first: two loaded models would take twice the memory
            self._session, self._traced = self._open(traced=True), True

    def close(self) -> None:
        """Release the model. Calls after this raise RunError; closing twice is fine."""
        self._session = None
        self._past = {}

    def _open(self, *, traced: bool) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        options.log_severity_level = 4  # faults are raised, and told once
        for key, value in {**EXACT, FOLDER: str(self._path.parent.absolute())}.items():
            options.add_session_config_entry(key, value)
        needed = f"install onnxruntime >= {'.'.join(map(str, self._oldest))}"
        if _version(onnxruntime.__version__) < self._oldest:
            raise RunError(
                f"ONNX Runtime {onnxruntime.__version__} is too old for this artifact",
                place=self._place,
                remedy=needed,
            )
        try:
            source = str(self._path) if not traced else self._with_taps()
            return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except ArtifactError:
            raise
        except Exception as error:  # the runtime raises a class of its own for each status
            raise ArtifactError(
                f"ONNX Runtime {onnxruntime.__version__} does not load it: {_first_line(error)}",
                place=self._place,
                remedy=f"{REMEDY}, or {needed}",
            ) from error

    def _with_taps(self) -> bytes:
        """The model with the taps as outputs; its weights stay where they are."""
        model = onnx.load(str(self._path), load_external_data=False)
        known = {name for node in model.graph.node for name in node.output}
        for tap in self._taps:
            for field in _TAP_FIELDS:
                if getattr(tap, field) not in known:
                    raise ArtifactError(
                        "damaged: details.moe_taps", place=str(self._path.parent / "manifest.json"), remedy=REMEDY
                    )
        listed = {o.name for o in model.graph.output}
        for name in dict.fromkeys(getattr(tap, field) for tap in self._taps for field in _TAP_FIELDS):
            integer = any(tap.indices == name for tap in self._taps)
            if name not in listed:
                kind = TensorProto.INT64 if integer else TensorProto.FLOAT
                model.graph.output.append(helper.make_tensor_value_info(name, kind, None))
        return model.SerializeToString()

    def _forward(self, tokens: np.ndarray, start: int, rows: np.ndarray | None, every: bool) -> list[MoeTrace]:
        assert self._session is not None
        feeds = {
            "input_ids": tokens[None],
            "attention_mask": np.ones((1, start + len(tokens)), np.int64),
            # no more than `start` positions: a call that stopped between two chunks has left some behind them
            **{f"{PAST}.{name}": value[:, :, :start] for name, value in self._past.items()},
        }
        names = ["logits", *(f"{PRESENT}.{name}" for name in self._past)]
        taps = [getattr(tap, field) for tap in self._taps for field in _TAP_FIELDS] if self._tracing else []
        wanted = list(dict.fromkeys([*names, *taps]))
        try:
            found = dict(zip(wanted, self._session.run(wanted, feeds), strict=True))
        except Exception as error:
            raise RunError(f"ONNX Runtime stopped: {_first_line(error)}", place=self._place, remedy=REMEDY) from error
        self._past = {name: found[f"{PRESENT}.{name}"] for name in self._past}
        if rows is not None:
            rows[:] = found["logits"][0, -len(rows) :]
        return [self._trace_of(layer, found) for layer in range(len(self._taps))] if taps else []

    def _trace_of(self, layer: int, found: Mapping[str, np.ndarray]) -> MoeTrace:
        tap = self._taps[layer]
        return MoeTrace(
            layer=layer,
            x_TD=found[tap.x],
            indices_TK=found[tap.indices].astype(np.int32),
            weights_TK=found[tap.weights],
            y_TD=found[tap.y],
        )


_TYPES = {"tensor(float)": np.float32, "tensor(int8)": np.int8}


def _empty_caches(session: onnxruntime.InferenceSession, place: str) -> dict[str, np.ndarray]:
    """Caches of no position as the model declares them, by the name that follows `past_key_values.`. ArtifactError for
    a declaration that no model of ours has."""
    found: dict[str, np.ndarray] = {}
    for given in session.get_inputs():
        if not given.name.startswith(f"{PAST}."):
            continue
        try:  # the positions are the extent without a number
            shape = [size if isinstance(size, int) else 0 for size in given.shape]
            if 0 not in shape:
                raise ValueError("no positions")
            found[given.name.removeprefix(f"{PAST}.")] = np.zeros(shape, _TYPES[given.type])
        except (KeyError, ValueError) as error:
            raise ArtifactError(
                f"damaged: {given.name} is {given.type} {given.shape}", place=place, remedy=REMEDY
            ) from error
    return found


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2] if part.isdigit())


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:300]
