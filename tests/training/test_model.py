"""The trained decoder is the compiler's decoder, document by document; its losses are those of the plain form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from moec.compiler.spec import load_spec
from moec.sources.decoder.config import decoder_of
from moec.sources.decoder.decoder import Decoder
from moec.sources.decoder.layout import weight_layout
from moec.training.loss import Taught, taught_losses, token_losses
from moec.training.model import Forward, TrainingDecoder, document_positions
from tests.training.small import DENSE, MOE, config_of, model_of, random_weights

# the same fp32 products with some sums in another order; logits are of order one
ATOL, RTOL = 2e-5, 1e-5

NO_SHARED = MOE | {"moe": {"experts": 5, "top_k": 1, "expert_width": 33, "normalize": False, "selection_bias": False}}


def packed(seed: int, rows: int, length: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens [B, T] and documents of random lengths."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab, (rows, length), generator=generator)
    documents = (torch.rand(rows, length, generator=generator) < 0.15).int().cumsum(1).int()
    return tokens, documents


@pytest.mark.parametrize("compute", ["grouped", "loop", "padded"])
@pytest.mark.parametrize("model", [MOE, DENSE, NO_SHARED], ids=["moe", "dense", "no shared expert"])
def test_equals_the_compilers_decoder(model: dict[str, Any], compute: Any) -> None:
    config = config_of(model)
    weights = random_weights(config)
    trained = model_of(config, weights, compute=compute)
    decoder = Decoder(config, "loop")
    for name, value in weights.items():
        decoder.get_parameter(name).copy_(value)
    tokens, documents = packed(3, 3, 41, config.vocab_size)
    with torch.no_grad():
        logits = trained(tokens, documents)[0]
        for row in range(3):
            for document in documents[row].unique():
                here = documents[row] == document
                decoder.reset()
                expected = decoder(tokens[row, here].unsqueeze(0), torch.zeros(1, dtype=torch.long))[0]
                torch.testing.assert_close(logits[row, here], expected, atol=ATOL, rtol=RTOL)


def test_nothing_crosses_a_document() -> None:
    config = config_of()
    model = model_of(config, random_weights(config))
    tokens, documents = packed(1, 2, 30, 300)
    documents[:] = (torch.arange(30) >= 11).int()
    other = tokens.clone()
    other[:, :11] = (other[:, :11] + 1) % 300
    with torch.no_grad():
        before, after = model(tokens, documents)[0], model(other, documents)[0]
    torch.testing.assert_close(before[:, 11:], after[:, 11:], atol=0, rtol=0)
    assert not torch.allclose(before[:, :11], after[:, :11], atol=0.1)


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=8))
@settings(max_examples=30, deadline=None)
def test_positions_restart(lengths: list[int]) -> None:
    documents = torch.tensor([[i for i, n in enumerate(lengths) for _ in range(n)]])
    assert document_positions(documents)[0].tolist() == [i for n in lengths for i in range(n)]


def test_the_tied_embedding_is_one_parameter() -> None:
    config = config_of()
    model = model_of(config, random_weights(config)).train()
    assert not [name for name, _ in model.named_parameters() if "lm_head" in name]
    tokens, documents = packed(0, 1, 9, 150)  # ids from 150 on are never an input: their gradient is the head's
    Forward(*model(tokens, documents, tokens, torch.ones(1, 9))).nll.backward()
    grad = model.get_parameter("model.embed_tokens.weight").grad
    assert grad is not None
    assert grad[150:].abs().sum() > 0
    assert grad[tokens.flatten()].abs().sum() > 0


@given(
    tokens=st.integers(1, 1100), vocab=st.integers(2, 70), width=st.integers(1, 20), share=st.floats(0, 1),
    seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_losses_and_their_gradients(tokens: int, vocab: int, width: int, share: float, seed: int) -> None:
    """Against cross_entropy on whole logits: values and both gradients."""
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(tokens, width, generator=generator, dtype=torch.float32).requires_grad_()
    head = torch.randn(vocab, width, generator=generator).requires_grad_()
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    mask = (torch.rand(tokens, generator=generator) < share).float()
    expected = (F.cross_entropy(F.linear(h, head), targets, reduction="none") * mask).sum()
    wanted = torch.autograd.grad(expected * 0.7, (h, head))
    found, _ = token_losses(h, head, targets, mask)
    got = torch.autograd.grad(found * 0.7, (h, head))
    # sums of up to a thousand terms of order one in another order
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4)
    with torch.no_grad():
        still, hits = token_losses(h, head, targets, mask)
    torch.testing.assert_close(still, expected, atol=1e-4, rtol=1e-5)
    assert hits == ((F.linear(h, head).argmax(-1) == targets) * mask).sum()


@pytest.mark.parametrize("taught", [False, True])
def test_a_head_that_is_not_trained_costs_no_product(taught: bool) -> None:
    """The rows' gradient is the same to the bit; the product for the head's is left out."""
    h, head = torch.randn(40, 8, requires_grad=True), torch.randn(30, 8)
    targets, mask = torch.randint(0, 30, (40,)), torch.ones(40)
    teacher = Taught(torch.randn(40, 8), torch.randn(30, 8), 0.5, 1.0, 1.0)
    counted, gradients = [], []
    for trained in (True, False):
        weight = head.clone().requires_grad_(trained)
        with FlopCounterMode(display=False) as flops:
            found = (
                taught_losses(h, weight, targets, mask, teacher) if taught else token_losses(h, weight, targets, mask)
            )[0]
            (gradient,) = torch.autograd.grad(found, h, retain_graph=trained)
        counted.append(flops.get_total_flops())
        gradients.append(gradient)
        if trained:
            assert torch.autograd.grad(found, weight)[0].abs().sum() > 0
    assert torch.equal(*gradients)
    assert counted[0] - counted[1] == 2 * 40 * 8 * 30


def test_only_masked_tokens_have_a_loss() -> None:
    config = config_of()
    model = model_of(config, random_weights(config))
    tokens, documents = packed(2, 2, 20, 300)
    targets, mask = tokens.roll(-1, 1), torch.zeros(2, 20)
    mask[0, 3], mask[1, 7] = 1, 1
    out = Forward(*model(tokens, documents, targets, mask))
    logits = model(tokens, documents)[0]
    wanted = F.cross_entropy(logits[[0, 1], [3, 7]], targets[[0, 1], [3, 7]], reduction="sum")
    torch.testing.assert_close(out.nll, wanted, atol=1e-5, rtol=1e-5)  # the same row of logits, summed twice
    assert out.weight == 2
    assert Forward(*model(tokens, documents, targets, torch.zeros(2, 20))).nll == 0


def test_bfloat16_leaves_the_router_alone() -> None:
    """Under autocast the router's logits are the float32 product of its (bfloat16-rounded) input, bit for bit."""
    config = config_of()
    model = model_of(config, random_weights(config))
    block = model.blocks[0]
    seen: list[torch.Tensor] = []
    block.router.register_forward_hook(lambda module, inputs, output: seen.extend((inputs[0], output)))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(*packed(0, 2, 16, 300))
    assert seen[1].dtype == torch.float32
    torch.testing.assert_close(seen[1], F.linear(seen[0].float(), block.router.weight), atol=0, rtol=0)


def test_bfloat16_is_near_float32() -> None:
    config = config_of()
    model = model_of(config, random_weights(config))
    tokens, documents = packed(4, 2, 30, 300)
    with torch.no_grad():
        exact = model(tokens, documents)[0]
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(tokens, documents)[0]
    # 8 bits of mantissa in a dozen products; a token whose choice of experts flips is further off, so the median
    cosines = F.cosine_similarity(exact.flatten(0, 1), rough.flatten(0, 1))
    assert cosines.median() > 0.999


def test_a_model_without_weights_is_refused() -> None:
    from moec.training.checkpoints import load_weights

    config = config_of()
    weights = random_weights(config)
    del weights["model.norm.weight"]
    with pytest.raises(AssertionError, match="not given"):
        load_weights(TrainingDecoder(config), weights.items())


@pytest.mark.parametrize("name", ["mobilemoe-tiny", "mobilellm-pro"])
def test_the_weights_are_those_of_the_table(name: str) -> None:
    """Names and shapes of what is trained are the table's, from which checkpoints, plans and counts follow."""
    spec = load_spec(Path(__file__).parents[2] / "specs" / "models" / f"{name}.yaml")
    config = decoder_of(spec, "trained")
    with torch.device("meta"):
        found = {n: tuple(t.shape) for n, t in TrainingDecoder(config).state_dict().items()}
    assert found == {n: info.shape for n, info in weight_layout(config).items()}
