"""A topic for every token of a vocabulary, derived from real text, by which synthesized routers prefer experts.

Trained routers decide mostly by the token itself, and send the words of one subject to the same experts (MobileMoE,
appendix D: domains use different expert subsets). A random router has no such preferences: over a few thousand tokens
every expert is hit evenly, whatever the text.
"""

from __future__ import annotations

from collections import Counter

import torch

from moec.compiler.texts import DOMAINS, prompts, shipped_prompts

TOPICS = ("common", *DOMAINS)
# A token belongs to a domain that holds more than this share of its relative frequency; four even ones would have 1/4.
_OWN_SHARE = 0.5


def token_topics(tokenizer: str | None, vocab_size: int, generator: torch.Generator) -> torch.Tensor:
    """int64 [V], an index into TOPICS for every token id. `tokenizer` is the text of a tokenizer.json.

    A token of the shipped texts (all of specs/prompts, those that `moec profile` runs among them: a trained router has
    seen the words of its domains) belongs to the domain that uses it most, if that one has more than half of its
    relative frequency, else it is common. Tokens that these texts do not hold get a random topic.
    """
    topics_V = torch.randint(0, len(TOPICS), (vocab_size,), generator=generator)
    if tokenizer is None:
        return topics_V
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_str(tokenizer)
    counts = {name: Counter(encoder.encode(text).ids) for name, text in prompts().items()}
    for prompt in shipped_prompts():
        counts[prompt.domain].update(encoder.encode(prompt.text).ids)
    totals = {name: sum(count.values()) for name, count in counts.items()}
    for token in set().union(*counts.values()):
        shares = {name: count[token] / totals[name] for name, count in counts.items()}
        best = max(shares, key=lambda name: shares[name])
        own = shares[best] > _OWN_SHARE * sum(shares.values())
        topics_V[token] = TOPICS.index(best) if own else 0
    return topics_V
