"""What one sequence is given of memory: whole pages of caches, as engines allocate them, beside what it fills.

vLLM's rules are those of its public repository in 2026: v1/kv_cache_interface.py (page_size_bytes and
max_memory_usage_bytes of each spec), v1/core/kv_cache_utils.py (unify_kv_cache_spec_page_size,
_get_kv_cache_groups_uniform_page_size) and platforms/interface.py (_align_hybrid_block_size). SGLang's are those of its
documentation, "Hybrid Model Memory Pools". What they keep for requests to come is not counted, nor memory left unused.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from powerplan.caches.policy import Policy
from powerplan.choices import Engine
from powerplan.dtypes import Dtypes
from powerplan.errors import InputError, parameter
from powerplan.mixers.base import Mixer
from powerplan.spec import ModelSpec

VLLM_BLOCK = 16
"""Tokens of a block in vLLM where nothing else is asked for (CacheConfig.DEFAULT_BLOCK_SIZE)."""

VLLM_STATES = 1
"""Pages of recurrent state of a sequence without prefix caching (MambaSpec.max_memory_usage_bytes, mode "none")."""

VLLM_CACHED_STATES = 2
"""The same with prefix caching: mode "align"."""

SGLANG_STATES = 5
"""State slots of a running request: the default strategy, extra_buffer, with the overlap scheduler."""

FEW_MORE = Fraction(3, 2)
"""Where the largest sort of layers is not this many times the smallest, vLLM makes groups of the largest."""

PAGED_KINDS = ("attention", "chunked_attention", "mla")
"""Kinds with a cache whose pages are known for engines."""

STATE_KINDS = ("mamba1", "mamba2", "gated_deltanet", "kda", "lightning", "short_conv")
"""Kinds with a state of fixed size that vLLM has, as MambaSpec."""


@dataclass(frozen=True)
class Allocation:
    """What a sequence is given, in bytes.

    bytes: in all. page: tokens of a page of the layers that keep most tokens in one; None without a cache. page_bytes:
    bytes of a page of one layer, where all have the same; None where they differ. padding_layers: layers that stand in
    no model, and have pages so that all groups have as many layers.
    """

    bytes: Fraction
    page: int | None
    page_bytes: Fraction | None = None
    padding_layers: int = 0


class _Sort(NamedTuple):
    """Layers whose pages are alike.

    name: "window", "state", or the kind of mixer. bytes: of a token, or of a state. page: tokens of a page. size: bytes
    of a page. reach: tokens that a window or a chunk keeps, None for all.
    """

    name: str
    bytes: Fraction
    page: int
    size: Fraction
    reach: int | None = None

    def pages(self, context: int, states: int) -> int:
        """Return the pages that a sequence of `context` tokens takes in one layer.

        A window may begin within a page: it takes one page more than its tokens fill (SlidingWindowSpec, with one token
        a step).
        """
        if self.name == "state":
            return states
        whole = -(-context // self.page)
        if self.reach is None:
            return whole
        return min(whole, -(-min(self.reach, context) // self.page) + (self.name == "window"))


def allocation(spec: ModelSpec, context: int, dtypes: Dtypes, policy: Policy) -> Allocation:
    """Return what a sequence of `context` tokens is given while it is decoded, without checkpoints.

    Raises:
        InputError: it is not known how the engine pages a cache of the model.
    """
    if policy.engine == "vllm":
        _check_known(spec, policy.engine)
        return _vllm(spec, context, dtypes, policy)
    if policy.engine == "sglang":
        _check_known(spec, policy.engine)
    return _whole_pages(spec, context, dtypes, policy)


def _whole_pages(spec: ModelSpec, context: int, dtypes: Dtypes, policy: Policy) -> Allocation:
    """Return the bytes where every cache takes whole pages of the same number of tokens, and states stand apart.

    A window of w tokens begins within a page at worst: it takes 1 + (w - 1) / page of them, rounded up.
    """
    page, slots = policy.page or 1, SGLANG_STATES if policy.engine else 1
    total = Fraction(0)
    for mixer, count in spec.mixer_counts():
        kept = policy.tokens(mixer, context)
        size = mixer.state_size(kept)
        cache = size.cache
        if cache and mixer.grows:
            # Tokens that wait to be compressed are more between two whole pages than behind one.
            cache = max(cache, mixer.state_size(-(-kept // page) * page).cache)
        elif cache:
            entries = -(-cache // size.entry)
            pages = -(-entries // page) if mixer.kind == "chunked_attention" else 1 - (1 - entries) // page
            cache = max(cache, min(-(-kept // page), pages) * page * size.entry)
        recent = dtypes.activation_bytes if policy.engine else dtypes.cache_bytes
        state = size.recurrent * dtypes.state_bytes + size.recent * recent
        total += count * (cache * dtypes.cache_bytes + slots * state)
    has_cache = any(mixer.state_size(context).cache for mixer in spec.mixers())
    return Allocation(total, page if has_cache else None)


def _vllm(spec: ModelSpec, context: int, dtypes: Dtypes, policy: Policy) -> Allocation:
    """Return what vLLM gives: layers of one sort are a group, layers of several sorts groups of one size and page."""
    layers = _vllm_layers(spec, context, dtypes, policy.page or VLLM_BLOCK)
    alike = len({(sort.name, sort.reach) for sort in layers}) <= 1
    sorts = Counter(layers if alike else _common_pages(layers))
    fewest, most = min(sorts.values(), default=0), max(sorts.values(), default=0)
    group = 1 if alike else most if most < FEW_MORE * fewest else fewest
    states = VLLM_CACHED_STATES if policy.checkpoint_every else VLLM_STATES
    tokens = context if policy.budget is None else min(context, policy.budget)
    given = {sort: -(-count // group) * group for sort, count in sorts.items()}
    sizes = {sort.size for sort in sorts}
    return Allocation(
        bytes=sum((given[sort] * sort.pages(tokens, states) * sort.size for sort in sorts), Fraction(0)),
        page=max((sort.page for sort in sorts if sort.name != "state"), default=None),
        page_bytes=sizes.pop() if len(sizes) == 1 else None,
        padding_layers=sum(given.values()) - len(layers),
    )


def _vllm_layers(spec: ModelSpec, context: int, dtypes: Dtypes, page: int) -> list[_Sort]:
    """Return the pages of every layer, before those of different sorts are made alike.

    Where recurrent states stand beside caches, blocks grow until a page of a cache holds a state, and the pages of
    states are padded to its size (_align_hybrid_block_size).
    """
    tokens = {mixer: mixer.state_size(1).entry * dtypes.cache_bytes for mixer in spec.mixers() if mixer.entry}
    states = {mixer: _state_bytes(mixer, context, dtypes) for mixer in spec.mixers() if not mixer.entry}
    widest, state = max(tokens.values(), default=Fraction(0)), max(states.values(), default=Fraction(0))
    if widest and state:
        page *= max(1, -(-state // (page * widest)))
    sorts = []
    for mixer, count in spec.mixer_counts():
        if mixer in states:
            sort = _Sort("state", states[mixer], page, page * widest or states[mixer])
        else:
            name = "window" if mixer.kind == "attention" and mixer.window_size else mixer.kind
            sort = _Sort(name, tokens[mixer], page, page * tokens[mixer], mixer.window_size)
        sorts += [sort] * (count if sort.bytes else 0)
    return sorts


def _common_pages(sorts: list[_Sort]) -> list[_Sort]:
    """Return the layers with pages of one size: smaller pages get more tokens, where these divide it, or are padded.

    MLA's cannot be padded (unify_kv_cache_spec_page_size).
    """
    largest = max(sort.size for sort in sorts)
    made = []
    for sort in sorts:
        times = largest / sort.size
        if times.denominator == 1:
            made.append(sort._replace(page=sort.page * times.numerator, size=largest))
        elif sort.name == "mla":
            problem = "pages of MLA layers here do not divide those of other layers, and vLLM cannot pad them"
            raise InputError(problem, f"{parameter('engine')} vllm")
        else:
            made.append(sort._replace(size=largest))
    return made


def _state_bytes(mixer: Mixer, context: int, dtypes: Dtypes) -> Fraction:
    """Return the bytes of a recurrent state and of the inputs of convolutions, which engines keep as activations."""
    size = mixer.state_size(context)
    return size.recurrent * dtypes.state_bytes + size.recent * dtypes.activation_bytes


def _check_known(spec: ModelSpec, engine: Engine) -> None:
    unknown = [mixer.kind for mixer in spec.mixers() if mixer.entry and mixer.kind not in PAGED_KINDS]
    if unknown:
        known = f"{', '.join(PAGED_KINDS)} are; {parameter('page', '16')} counts whole pages of any kind"
        problem = f"how it allocates {unknown[0]}, as in {spec.name}, is not known here; {known}"
        raise InputError(problem, f"{parameter('engine')} {engine}")


def engine_notes(spec: ModelSpec, engine: Engine) -> list[str]:
    """Return a note on recurrent kinds that the engine does not have, if there are any."""
    kinds = dict.fromkeys(mixer.kind for mixer in spec.mixers() if not mixer.entry and mixer.kind not in STATE_KINDS)
    if not kinds:
        return []
    return [f"{engine} has no layers of kind {', '.join(kinds)}: their state is counted as it counts that of Mamba"]
