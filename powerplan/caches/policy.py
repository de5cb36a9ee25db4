"""What is done with caches beside keeping all of them, as a value; and a cache that eviction holds to a budget."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import SupportsIndex, get_args

from powerplan.accounting import Accounting
from powerplan.choices import Engine
from powerplan.errors import InputError, check_word, parameter
from powerplan.mixers.base import Mixer
from powerplan.mixers.formulas import total
from powerplan.units import context_of


@dataclass(frozen=True)
class Policy:
    """What is done with the caches of sequences that are served; each None where it is not done.

    budget: the most tokens that a cache which grows keeps in a layer, of each sequence.
    prefill_chunk: tokens of a prompt that are worked on at once. checkpoint_every: tokens from one checkpoint of
    recurrent state to the next. engine: whose rules say what is allocated. page: tokens of a page of a cache.
    """

    budget: int | None = None
    prefill_chunk: int | None = None
    checkpoint_every: int | None = None
    engine: Engine | None = None
    page: int | None = None

    @property
    def allocates(self) -> bool:
        """Whether it is asked what is allocated."""
        return self.engine is not None or self.page is not None

    def tokens(self, mixer: Mixer, context: int) -> int:
        """Return how many tokens of a sequence are behind what a layer keeps after `context` tokens.

        A cache that eviction holds to a budget is as large, and takes as many FLOPs and bytes to read, as that of a
        sequence of so many tokens. Windows within the budget and recurrent state stay as they are; longer windows are
        held to the budget too.
        """
        return held(mixer, context, self.budget)

    def position(self, mixer: Mixer, context: int) -> int:
        """Return at which position a token takes as much to decode as the last of `context` tokens does with this.

        That is `tokens`. But where attention in chunks began a chunk, its tokens are all that there is to meet.
        """
        tokens = self.tokens(mixer, context)
        if mixer.restarts_after is None:
            return tokens
        return min(tokens, (context - 1) % mixer.restarts_after + 1)

    def prefill_tokens(self, context: int) -> int:
        """Return how many tokens of a prompt are worked on at once."""
        return min(context, self.prefill_chunk or context)


def held(mixer: Mixer, context: int, tokens: int | None) -> int:
    """Return `context`, or `tokens` where these are fewer than the layer would keep in a cache of keys."""
    if tokens is None or not mixer.entry:
        return context
    within = not mixer.grows and (mixer.direct_reach(context) or 0) <= tokens
    return context if within else min(context, tokens)


def policy_of(
    cache_budget: SupportsIndex | str | None = None,
    prefill_chunk: SupportsIndex | str | None = None,
    checkpoint_every: SupportsIndex | str | None = None,
    engine: Engine | None = None,
    page: SupportsIndex | str | None = None,
) -> Policy:
    """Return the policy that the parameters of `decode` describe; raises InputError, with the parameter's name."""
    if engine is not None:
        check_word(engine, get_args(Engine), parameter("engine"))
    words = {
        "cache_budget": (cache_budget, "a budget"),
        "prefill_chunk": (prefill_chunk, "a chunk"),
        "checkpoint_every": (checkpoint_every, "the distance of checkpoints"),
        "page": (page, "a page"),
    }
    read = {
        name: None if value is None else context_of(value, parameter(name), of) for name, (value, of) in words.items()
    }
    if read["checkpoint_every"] is not None and read["cache_budget"] is not None:
        problem = "a prefix cannot go on from a cache that eviction has changed since"
        raise InputError(f"{problem}; leave {parameter('cache_budget')} out", parameter("checkpoint_every"))
    return Policy(read["cache_budget"], read["prefill_chunk"], read["checkpoint_every"], engine, read["page"])


def prefill_state_flops(accounting: Accounting, context: int, policy: Policy) -> Fraction:
    """Return the state FLOPs of a prompt, all of its tokens together.

    Without chunks eviction comes after the prompt, and saves none of them (H2O, arXiv 2306.14048; SnapKV, arXiv
    2404.14469). With chunks of c tokens and a budget of b, a cache is cut to b tokens behind every chunk (Locret, arXiv
    2410.01805): a query meets b keys and those of its own chunk at most. A chunk that begins with b tokens kept takes
    as much as tokens b + 1 to b + c of a whole prompt. What a budget saves within a window is not counted,
    nor of kinds whose tokens do not all take at least as much as those before them (memory sparse attention).
    """
    return sum(
        (_state_flops(accounting, mixer, context, policy) * count for mixer, count in accounting.spec.mixer_counts()),
        Fraction(0),
    )


def _state_flops(accounting: Accounting, mixer: Mixer, context: int, policy: Policy) -> Fraction:
    def first(tokens: int) -> Fraction:
        """Return the FLOPs of the first `tokens` of a prompt, one or more."""
        return Fraction(tokens * total(mixer.state_flops_terms(tokens, accounting.convention)))

    budget, chunk = policy.budget, policy.prefill_tokens(context)
    if budget is None or chunk == context or not (mixer.entry and mixer.grows and mixer.steady):
        return first(context)
    # Chunks that begin at or before the budget meet all that is before them.
    whole = min(context, (budget // chunk + 1) * chunk)
    chunks, rest = divmod(context - whole, chunk)
    return first(whole) + chunks * (first(budget + chunk) - first(budget)) + first(budget + rest) - first(budget)
