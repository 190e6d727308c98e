"""A model as a list of matrices: parameters, products and bytes, without building it and without torch.

Every count of the planner is a sum over `Architecture.weights`. D model width, H query heads, G key/value heads,
d head width, F expert width, S shared width, E experts, K experts a token, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property

from moec.compiler.states import Codes, State, key_value_states


@dataclass(frozen=True)
class Weight:
    """`count` equal matrices of `rows` outputs and `columns` inputs; a vector has one column.

    `used` of them enter the products of one token (None: all): K of the E experts of a layer, none of an embedding
    table. `counted`: parameters, not state; the selection bias is a balancing state and left out of published counts.
    """

    role: str
    name: str
    count: int
    rows: int
    columns: int
    used: int | None = None
    counted: bool = True

    @property
    def numel(self) -> int:
        return self.count * self.rows * self.columns

    @property
    def touched(self) -> int:
        """Matrices that one token's products read."""
        return self.count if self.used is None else self.used

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one token."""
        return 0 if self.columns == 1 else self.touched * self.rows * self.columns


@dataclass(frozen=True)
class Latent:
    """What the keys and values of latent attention are expanded from: `rank` numbers, and `rotated` ones of the key
    itself. absorbed: the cache holds these."""

    rank: int
    rotated: int
    absorbed: bool = False


@dataclass(frozen=True)
class Cache:
    """One layer's keys and values: `kv_heads` rows of both widths per position; `window` 0 means all positions.

    Of an absorbed latent: one row for all heads, the latent and the rotated part of the key.
    """

    kv_heads: int
    key_width: int
    value_width: int
    window: int = 0
    latent: Latent | None = None

    def absorbed(self, multiple: int) -> Cache:
        """The cache of the same layer where latents are cached; itself where they are not: widths that are no multiple
        of `multiple`, or latents that are no smaller than keys and values."""
        latent = self.latent
        if latent is None or latent.rank % multiple or latent.rotated % multiple:
            return self
        if latent.rank + latent.rotated >= self.kv_heads * (self.key_width + self.value_width):
            return self
        return Cache(1, latent.rank, latent.rotated, self.window, replace(latent, absorbed=True))

    def seen(self, position: int) -> int:
        """Positions that a token at `position` (from 0) attends to, itself included."""
        return min(position + 1, self.window) if self.window else position + 1

    def states(self, codes: Codes | None = None, dtype: str = "float32") -> tuple[State, State]:
        """Keys and values as the model declares them. Windowed layers keep every position, as our caches do."""
        widths = (self.kv_heads, self.key_width, self.value_width)
        return key_value_states("", *widths, window=self.window, dtype=dtype, codes=codes)

    def macs(self, heads: int, position: int) -> int:
        """Multiply-accumulates of `heads` query heads of the token at `position`: scores and weighted values."""
        again = self.key_width if self.latent is not None and self.latent.absorbed else 0  # latents are the values, too
        return heads * (self.key_width + self.value_width + again) * self.seen(position)


@dataclass(frozen=True)
class Mixer:
    """A layer's convolution or recurrence, in the place of attention or of the whole layer.

    kind: `short_conv`, `gated_delta` or `selective_scan`. inputs: features that its linears make of the layer's input;
    channels: those of its convolution.
    """

    kind: str
    inputs: int
    channels: int


@dataclass(frozen=True)
class Experts:
    """The routed experts of every MoE layer; `shared_width` 0 means no shared expert."""

    layers: int
    experts: int
    top_k: int
    width: int
    shared_width: int

    def touched(self, tokens: int) -> float:
        """Expected number of experts that `tokens` tokens reach in one layer, were routing uniform and independent.

        An upper estimate: real routers prefer some experts, so real prompts touch fewer.
        """
        return self.experts * (1.0 - (1.0 - self.top_k / self.experts) ** tokens)


@dataclass(frozen=True)
class Architecture:
    """What the planner knows of a model.

    own: the source writes the graph itself, so that targets know its operators exactly (norm, one attention, norm,
    feed-forward in every layer); for other models they estimate from `caches` and `weights`. ffn_width: of the dense
    feed-forward blocks, 0 if there are none. qk_norm: whether queries and keys are normalised. fixed: states of
    convolutions and recurrences, whose size does not depend on the context; every token reads and writes all of them.
    mixers: of the layers that have such states. caches: of the layers with attention.
    """

    name: str
    layers: int
    d_model: int
    heads: int
    vocab_size: int
    context: int
    tied: bool
    weights: tuple[Weight, ...]
    caches: tuple[Cache, ...]
    experts: Experts | None = None
    ffn_width: int = 0
    qk_norm: bool = False
    own: bool = True
    fixed: tuple[State, ...] = ()
    mixers: tuple[Mixer, ...] = ()

    @cached_property
    def alike(self) -> tuple[tuple[Cache, int], ...]:
        """The caches that differ, each with the number of layers that have it."""
        return tuple(Counter(self.caches).items())

    @property
    def total_parameters(self) -> int:
        return sum(w.numel for w in self.weights if w.counted)

    @property
    def active_parameters(self) -> int:
        """Parameters that one token uses, the embedding table in full, as published counts have it."""
        return sum(
            w.numel if w.role == "embedding" else w.touched * w.rows * w.columns for w in self.weights if w.counted
        )

    def attention_macs(self, position: int) -> int:
        """Multiply-accumulates of scores and weighted values of the token at `position` (from 0), all layers."""
        return sum(n * c.macs(self.heads, position) for c, n in self.alike)

    def flops(self, position: int) -> int:
        """Multiplies and adds of a call of the token at `position`: every product of its weights, and attention."""
        head = self.vocab_size * self.d_model if self.tied else 0
        products = sum(w.macs for w in self.weights) + head + self.attention_macs(position)
        return 2 * (products + self.state_macs)

    @property
    def fixed_bytes(self) -> int:
        """Bytes of the states whose size does not depend on the context."""
        return sum(state.bytes(0) for state in self.fixed)

    @property
    def state_macs(self) -> int:
        """Multiply-accumulates of one token in recurrences: each element of a state is recalled, renewed and read."""
        return 3 * self.fixed_bytes // 4

    def prefill_flops(self, tokens: int) -> int:
        """Of a prompt of `tokens` tokens in one call; the head is computed once, for the last."""
        head = self.vocab_size * self.d_model
        body = sum(w.macs for w in self.weights) - (0 if self.tied else head)
        attention = sum(self.attention_macs(p) for p in range(tokens)) + tokens * self.state_macs
        return 2 * (tokens * body + head + attention)
