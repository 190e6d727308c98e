"""Random checkpoints in the released layout, for CI and for users without access to the gated real ones.

The weights are Gaussian with scales chosen so that signals stay of order one at any depth (RMS norms do most of it):
- the embedding has rows of unit-free standard deviation e = 2.5 / sqrt(d_model), so that logits have a spread of about
  2.5; rows differ in norm (lognormal), as those of frequent and rare tokens do;
- the blocks together add about as much variance to the residual stream as the embedding put there;
- tokens fall into clusters that share a direction, and each expert prefers a few of these directions, so that routing
  has structure: it differs between kinds of tokens, and no expert is idle;
- the last norm has random signs. With a tied head, a stream that still contains its token's embedding would predict
  that same token for ever.

With `router="structured"` the clusters belong to topics. Every token has one (topics.py: code, knowledge, math and
prose by the shipped texts that use it, or common), its cluster is one of that topic's, and the clusters of a topic
share a direction beside their own. The experts of each layer are divided evenly among the topics, and each prefers a
few clusters of its topic, more strongly than by default. A text then reaches the experts of its domain and the common
ones, and few others: what a trained router does, and what the memory that a prompt touches depends on.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from moec.checkpoints.config_json import GROUP_SIZE, config_to_json
from moec.checkpoints.folder import CONFIG
from moec.checkpoints.safetensors_file import SafetensorsWriter
from moec.checkpoints.store import PACKED_ROLES, stored_tensors
from moec.checkpoints.tokenizer import train_tokenizer
from moec.checkpoints.topics import TOPICS, token_topics
from moec.compiler.errors import CheckpointError
from moec.compiler.program import Role
from moec.compiler.progress import Progress
from moec.compiler.quant import quantize_weight
from moec.compiler.replacing import replacing
from moec.compiler.source import TOKENIZER
from moec.sources.decoder.config import DecoderConfig, decoder_of
from moec.sources.decoder.layout import WeightInfo, weight_layout

if TYPE_CHECKING:
    from moec.compiler.spec.model import Spec

_PIECE = 1 << 24  # elements generated at a time
_CLUSTERS = 64
_CLUSTER_SHARE = 0.6  # of an embedding row's norm
_ROW_SPREAD = 0.3  # of the logarithm of the rows' norms
_LOGIT_SPREAD = 2.5
_ROUTER_PREFERENCE, _ROUTER_SPREAD = 1.5, 1.0  # in router logits: for a preferred cluster, and at random
_PREFERRED = 3  # clusters per expert
_BIAS_SPREAD = 0.05
# Structured: an expert's direction is the sum of its clusters', which overlap by half within a topic. A token of a
# preferred cluster then has a logit of 2, another of the topic 1.5, any other token 0; all by 0.3 more or less. Scores
# are sigmoids: larger logits would saturate, and the selection bias would decide.
_STRUCTURED_PREFERENCE, _STRUCTURED_SPREAD = 1.0, 0.3

Router = Literal["clustered", "structured"]


def synthesize(
    spec: Spec,
    out: str | Path,
    *,
    seed: int = 0,
    qat: bool = False,
    router: Router = "clustered",
    progress: Progress | None = None,
) -> Path:
    """Write a random checkpoint for `spec` to the folder `out` and return it. The same seed gives the same bytes.

    router: whether experts prefer random clusters of tokens, or topics of text (see above).
    qat: INT4 codes and float16 scales instead of BF16; equal seeds give the same model in both, up to rounding.
    Holds one piece of one tensor. Errors: SpecError if the spec's model is not ours, CheckpointError if a width cannot
    be packed, UserError if `out` cannot be written or holds something else.
    """
    config = decoder_of(spec, "synthesized")
    layout = list(weight_layout(config).values())
    for info in layout:
        if qat and info.role in PACKED_ROLES and info.shape[-1] % GROUP_SIZE:
            raise CheckpointError(
                f"{info.name} has {info.shape[-1]} columns, packed weights need a multiple of {GROUP_SIZE}",
                place=spec.name,
                remedy="synthesize without --qat",
            )
    progress = progress or Progress(quiet=True)
    out = Path(out)
    with replacing(out, kind="a checkpoint") as folder:
        (folder / CONFIG).write_text(json.dumps(config_to_json(config, packed=qat), indent=2) + "\n", "utf-8")
        tokenizer = train_tokenizer(config.vocab_size, bos_id=config.bos_id, eos_ids=config.eos_ids)
        if tokenizer is not None:
            (folder / TOKENIZER).write_text(tokenizer, "utf-8")
        source = _Weights(config, seed)
        if router == "structured":
            source = _TopicWeights(config, seed, tokenizer)
        _write_weights(folder / "model.safetensors", source, layout, qat=qat, progress=progress)
    return out


def _write_weights(file: Path, source: _Weights, layout: list[WeightInfo], *, qat: bool, progress: Progress) -> None:
    names = [stored for info in layout for stored in stored_tensors(info, packed=qat)]
    with SafetensorsWriter(file, names) as writer, progress.stage("synthesize", len(layout)) as step:
        for info in layout:
            tensors = stored_tensors(info, packed=qat)
            if len(tensors) == 1:
                name, dtype, _ = tensors[0]
                writer.write(name, (piece.to(dtype) for piece in source.pieces(info)))
            else:
                scales: list[torch.Tensor] = []
                writer.write(tensors[0][0], _codes(source.pieces(info), scales))
                writer.write(tensors[1][0], scales)
            step(info.name)


def _codes(pieces: Iterator[torch.Tensor], scales: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The codes of `pieces`; the scales are kept for later, being one value in 32."""
    for piece in pieces:
        quantized = quantize_weight(piece, bits=4, group_size=GROUP_SIZE)
        scales.append(quantized.scales)
        yield quantized.codes


class _Weights:
    """The random values of each weight, as consecutive float32 pieces of rows [n, last dimension]."""

    _router_preference, _router_spread = _ROUTER_PREFERENCE, _ROUTER_SPREAD

    def __init__(self, config: DecoderConfig, seed: int) -> None:
        self._config, self._seed = config, seed
        self._embedding_std = _LOGIT_SPREAD / math.sqrt(config.d_model)
        # 2 blocks a layer share, in variance, as much as the embedding has
        self._block_std = self._embedding_std / math.sqrt(2 * config.layers)
        self._centers_CD = self._directions("clusters", _CLUSTERS)

    def _directions(self, name: str, count: int) -> torch.Tensor:
        """`count` random unit vectors, [count, D]."""
        drawn = torch.randn(count, self._config.d_model, generator=self._generator(name))
        return torch.nn.functional.normalize(drawn, dim=-1)

    def _generator(self, name: str) -> torch.Generator:
        # the generator keeps 32 bits of its seed
        digest = hashlib.sha256(f"{self._seed}:{name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))

    def pieces(self, info: WeightInfo) -> Iterator[torch.Tensor]:
        generator = self._generator(info.name)
        if info.role is Role.NORM:
            yield self._norm(info, generator)
        elif info.role is Role.ROUTER:
            yield self._router(info, generator)
        else:
            fill = self._embedding if info.role is Role.EMBEDDING else self._matrix
            width = info.shape[-1]
            rows, step = info.numel // width, max(1, _PIECE // width)
            for first in range(0, rows, step):
                yield fill(info, first, min(step, rows - first), width, generator)

    def _norm(self, info: WeightInfo, generator: torch.Generator) -> torch.Tensor:
        weight = 1 + 0.1 * torch.randn(info.shape, generator=generator)
        if info.layer is None and self._config.tied_embeddings:
            weight *= torch.randint(0, 2, info.shape, generator=generator) * 2 - 1
        return weight

    def _router(self, info: WeightInfo, generator: torch.Generator) -> torch.Tensor:
        if len(info.shape) == 1:
            return _BIAS_SPREAD * torch.randn(info.shape, generator=generator)
        experts, d_model = info.shape
        directions_ED = self._centers_CD[self._preferred(experts, generator)].sum(1)
        # a token's normalised stream has norm sqrt(D), half of its variance from the embedding
        along = _CLUSTER_SHARE * math.sqrt(d_model / 2)
        noise_ED = torch.randn(info.shape, generator=generator) * (self._router_spread / math.sqrt(d_model))
        return directions_ED * (self._router_preference / along) + noise_ED

    def _preferred(self, experts: int, generator: torch.Generator) -> torch.Tensor:
        """The clusters each expert prefers, int64 [E, _PREFERRED]."""
        return torch.rand(experts, _CLUSTERS, generator=generator).topk(_PREFERRED).indices

    def _clusters(self, first: int, rows: int, generator: torch.Generator) -> torch.Tensor:
        """The cluster of each token from `first` on, int64 [rows]."""
        return torch.randint(0, _CLUSTERS, (rows,), generator=generator)

    def _embedding(
        self, info: WeightInfo, first: int, rows: int, width: int, generator: torch.Generator
    ) -> torch.Tensor:
        noise = torch.randn(rows, width, generator=generator)
        noise *= math.sqrt(1 - _CLUSTER_SHARE**2)
        noise += self._centers_CD[self._clusters(first, rows, generator)] * (_CLUSTER_SHARE * math.sqrt(width))
        norm = torch.exp(_ROW_SPREAD * torch.randn(rows, 1, generator=generator))
        return noise.mul_(norm * self._embedding_std)

    def _matrix(self, info: WeightInfo, first: int, rows: int, width: int, generator: torch.Generator) -> torch.Tensor:
        return torch.randn(rows, width, generator=generator).mul_(self._std(info))

    def _std(self, info: WeightInfo) -> float:
        """Standard deviation of a matrix from what its outputs should have; inputs have spread one."""
        width_in = info.shape[-2] if info.role is Role.EXPERT else info.shape[-1]
        target = 1.0
        if info.role is Role.HEAD:
            target = _LOGIT_SPREAD
        elif info.name.endswith(".o_proj.weight"):
            target = self._block_std / 0.3  # attention averages values of spread one over about ten tokens
        elif ".down_proj" in info.name:
            target = self._down_target(info)
        return target / math.sqrt(width_in)

    def _down_target(self, info: WeightInfo) -> float:
        hidden = 0.6  # spread of silu(a) * b for normal a and b
        moe = self._config.moe
        if moe is None or info.role is Role.SHARED:
            return self._block_std * (1.0 if moe is None else 0.6) / hidden
        combine = moe.scale / math.sqrt(moe.top_k)  # top_k independent outputs, each weighted by about scale / top_k
        return self._block_std * (0.8 if moe.shared_width else 1.0) / (hidden * combine)


class _TopicWeights(_Weights):
    """The same with structured routing. Cluster c belongs to topic c % len(TOPICS)."""

    _router_preference, _router_spread = _STRUCTURED_PREFERENCE, _STRUCTURED_SPREAD

    def __init__(self, config: DecoderConfig, seed: int, tokenizer: str | None) -> None:
        super().__init__(config, seed)
        self._topics_V = token_topics(tokenizer, config.vocab_size, self._generator("topics of tokens"))
        shared_CD = self._directions("topics", len(TOPICS))[torch.arange(_CLUSTERS) % len(TOPICS)]
        self._centers_CD = torch.nn.functional.normalize(self._centers_CD + shared_CD, dim=-1)

    def _of_topic(self, topics: torch.Tensor, generator: torch.Generator, count: int) -> torch.Tensor:
        """`count` different clusters of each row's topic, drawn at random, int64 [rows, count]."""
        of_cluster = torch.arange(_CLUSTERS) % len(TOPICS)
        drawn = torch.rand(len(topics), _CLUSTERS, generator=generator)
        return drawn.masked_fill_(of_cluster != topics[:, None], -1.0).topk(count).indices

    def _preferred(self, experts: int, generator: torch.Generator) -> torch.Tensor:
        homes = torch.arange(experts)[torch.randperm(experts, generator=generator)] % len(TOPICS)
        return self._of_topic(homes, generator, _PREFERRED)

    def _clusters(self, first: int, rows: int, generator: torch.Generator) -> torch.Tensor:
        return self._of_topic(self._topics_V[first : first + rows], generator, 1)[:, 0]
