"""A run: the stages of a spec in order, from text to checkpoints that `moec compile` takes.

    OUT/STAGE/          a checkpoint in the released layout after every stage; `qat` holds packed INT4 codes
    OUT/run.json        the resolved spec, digests and versions
    OUT/metrics.jsonl   see `training/metrics.py`;  OUT/tensorboard/ the same as events
    OUT/state/          what --resume continues from

Every stage starts from the checkpoint of the one before it as stored (BF16), so that the result is the same whether
stages run one by one, all at once, or are continued after a kill.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from moec.compiler.errors import SpecError, UserError
from moec.compiler.extras import require
from moec.compiler.progress import Progress
from moec.compiler.spec import Spec, load_spec
from moec.sources.decoder.config import decoder_of
from moec.training.data.shards import Corpus
from moec.training.experts import Compute
from moec.training.parallel import World, joined
from moec.training.precision import with_precisions
from moec.training.stages import RUN, Backend, Plan, Run, RunResult, check

BACKENDS: tuple[Backend, ...] = ("torch", "torchtitan")


def train(
    spec: Spec | str | Path,
    *,
    data: str | Path | Corpus,
    out: str | Path,
    stage: str | None = None,
    resume: bool = False,
    init: str | Path | None = None,
    seed: int | None = None,
    threads: int | None = None,
    device: str | None = None,
    bits: int | None = None,
    compute: Compute = "auto",
    backend: Backend = "torch",
    teacher: str | Path | None = None,
    progress: Progress | None = None,
) -> RunResult:
    """Run the stages of a spec's `training:` section, or only `stage`, on a corpus that `moec data` built.

    stage: start it from the checkpoint of the stage before it in `out`, or from `init`. resume: continue what is in
    `out`; without it `out` may hold no run (or, with `stage`, not that stage). init: a checkpoint folder to start from
    instead of random weights. seed: instead of the spec's. threads: of torch; default as torch decides. device: such
    as "cuda"; default: cuda where there is one. bits: 2 to 8 instead of the spec's widths in QAT, a stress test whose
    checkpoint holds the rounded values in float32. compute: how experts are multiplied. backend: whose loop it is:
    `torch`, or `torchtitan` (MissingExtra without the extra titan). teacher: a dense checkpoint, moec's or a Llama of
    transformers, that stages with `distillation:` learn from.

    UserError for every fault of the input, before anything is written. KeyboardInterrupt after Ctrl-C, with the state
    saved.
    """
    loaded = spec if isinstance(spec, Spec) else load_spec(spec)
    if threads is not None:
        torch.set_num_threads(threads)
    model, training = decoder_of(loaded, "trained"), loaded.training
    if training is None:
        raise SpecError("has no `training:` section", place=loaded.name, remedy="give it stages to train")
    corpus = data if isinstance(data, Corpus) else Corpus.open(data)
    corpus.check()
    plan = Plan(
        loaded, model, training, corpus, Path(out), stage, resume, None if init is None else Path(init),
        training.seed if seed is None else seed, bits, compute, backend, None if teacher is None else Path(teacher),
    )  # fmt: skip
    check(plan)
    runs = _runs(backend)
    experts = model.moe.experts if model.moe else 0
    with joined(training.expert_parallel, experts, device) as world, _owned(plan.out, world):
        decided = with_precisions(plan, world.device)
        return runs(decided, world, progress or Progress(quiet=True)).stages()


def _runs(backend: Backend) -> type[Run]:
    """The class of a backend's runs. MissingExtra if it is not installed."""
    if backend == "torch":
        return Run
    require("torchtitan", "titan", "--backend torchtitan")
    from moec.training.titan.run import TitanRun  # an extra, and seconds

    return TitanRun


@contextmanager
def _owned(out: Path, world: World) -> Iterator[None]:
    """One run at a time writes to `out`."""
    if not world.main:
        yield
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        begun = (".lock", f"{RUN}.new")  # all that a run leaves that was killed in its first moments
        if not (out / RUN).exists() and any(file.name not in begun for file in out.iterdir()):
            raise UserError("holds something that is not a run", place=str(out), remedy="choose another --out")
        lock = (out / ".lock").open("w")
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", place=str(out), remedy="choose another --out") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError("another run is writing there", place=str(out), remedy="wait for it, or stop it") from None
        yield
