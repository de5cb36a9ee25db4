"""Which modules a list of a quantization_config names: plain names, globs, regexes of the kind that such files have.

Lists name modules as checkpoints do (model.layers.0.self_attn.q_proj). Here a part of a layer is asked about under
every spelling of its modules that is in use.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import translate
from itertools import product

from powerplan.errors import shown
from powerplan.mixers import Mixer

MAX_PATTERNS = 1000
"""The most globs and regexes of one list that are asked of one layer; plain names are not limited."""

MAX_ALL_PATTERNS = 20_000
"""The most globs and regexes of one list, in the forms in which they are asked: six seconds to compile."""

_LAYER = re.compile(r"layers\.(\d+)(?:\.|$)")

_OTHER_TOWERS = re.compile(r"vis(?:ion|ual)|audio|projector|\bmtp\b|eagle|draft", re.IGNORECASE)
"""Modules beside the text decoder, which are not counted."""

PREFIXES = ("model", "language_model.model", "model.language_model", "backbone", "transformer", "model.text_model")
"""What stands before the layers in names of modules."""

SPELLINGS: Mapping[str, tuple[str, ...]] = {
    "mixers": (
        *("self_attn", "linear_attn", "attn", "attention", "mixer", "mamba", "conv", "temporal_block", "mlstm_layer"),
    ),
    "mlp": ("mlp", "feed_forward", "mixer"),
    "experts": ("mlp.experts", "block_sparse_moe.experts", "feed_forward.experts", "mixer.experts"),
    "shared_experts": (
        *("mlp.shared_experts", "mlp.shared_expert", "block_sparse_moe.shared_experts"),
        *("feed_forward.shared_experts", "feed_forward.shared_expert", "mixer.shared_experts"),
    ),
}
"""Names of the module that holds the matrices of a part, the usual one first."""

MATRICES: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "mixers": (
        ("q_proj", "k_proj", "v_proj", "o_proj"),
        ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
        ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
        ("qkv_proj", "o_proj"),
        ("in_proj_qkvz", "in_proj_ba", "out_proj"),
        ("in_proj", "out_proj"),
        ("c_attn", "c_proj"),
    ),
    "mlp": (("gate_proj", "up_proj", "down_proj"), ("gate_up_proj", "down_proj"), ("up_proj", "down_proj")),
    "experts": (
        tuple(f"{expert}.{name}" for expert in (0, 1) for name in ("gate_proj", "up_proj", "down_proj")),
        tuple(f"{expert}.{name}" for expert in (0, 1) for name in ("w1", "w2", "w3")),
        tuple(f"{expert}.{name}" for expert in (0, 1) for name in ("up_proj", "down_proj")),
    ),
    "shared_experts": (("gate_proj", "up_proj", "down_proj"), ("up_proj", "down_proj")),
}
"""Names of the matrices of a part, the usual ones first; others where a list has a name of theirs. Of experts, two."""


class NotUnderstoodError(Exception):
    """A setting that changes bytes in a way that is not known; the message says which, for a note."""


class ModuleNames:
    """A list of modules, asked with names as a checkpoint has them.

    plain: names of modules; all within them is named too, and so is what ends in them. A name may begin with "re:" and
    be a regex, or be a glob.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.text: set[str] = set()
        self._plain: set[str] = set()
        patterns: set[str] = set()
        for name in names:
            if _OTHER_TOWERS.search(name):
                continue
            self.text.update(re.findall(r"\w+", name))
            if name.startswith("re:"):
                patterns.update(_globs(name.removeprefix("re:")))
            elif re.fullmatch(r"[\w.-]+", name):
                self._plain.add(name.removesuffix(".weight").strip("."))
            elif re.fullmatch(r"[\w.*?\[\]-]+", name):
                patterns.update(f"{before}{name}{after}" for before in ("", "*.") for after in ("", ".*"))
            else:
                patterns.update(f"{glob}{more}" for glob in _globs(name) for more in ("", ".*"))
        by_layer: dict[str | None, list[str]] = {None: []}
        for glob in sorted(patterns):
            layer = _LAYER.search(glob)
            by_layer.setdefault(layer[1] if layer else None, []).append(glob)
        if len(patterns) > MAX_ALL_PATTERNS or max(map(len, by_layer.values())) > MAX_PATTERNS:
            raise NotUnderstoodError("a list of too many patterns")
        self._patterns = {layer: [re.compile(translate(glob)) for glob in globs] for layer, globs in by_layer.items()}

    def has(self, name: str) -> bool:
        """Whether the list names a module, or one that it is in."""
        words = name.split(".")
        runs = (".".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1))
        if any(run in self._plain for run in runs):
            return True
        layer = _LAYER.search(name)
        patterns = (*self._patterns[None], *(self._patterns.get(layer[1], ()) if layer else ()))
        return any(pattern.match(name) for pattern in patterns)

    def share(self, part: str, layer: int, mixer: Mixer | None = None) -> tuple[int, int]:
        """Return how many matrices of a part in a layer the list names, and how many there are.

        mixer: that of the layer, where the part is "mixers": its kind decides how its modules are called.
        """
        found = [(sum(map(self._has_any, matrices)), len(matrices)) for matrices in self._modules(part, layer, mixer)]
        return max(found, key=lambda pair: pair[0] / pair[1])

    def _has_any(self, names: list[str]) -> bool:
        return any(map(self.has, names))

    def _modules(self, part: str, layer: int, mixer: Mixer | None) -> Iterator[list[list[str]]]:
        """Yield sets of matrices that the part may stand in: for each matrix its names in every spelling."""
        prefixes = [prefix for prefix in PREFIXES if set(prefix.split(".")) - {"model"} <= self.text]
        first, *others = (spelling for spelling in SPELLINGS[part] if spelling not in _never(mixer))
        holders = [first, *(other for other in others if set(other.split(".")) - {"experts"} <= self.text)]
        sets = MATRICES[part]
        usual = sets[1 + ("q_a_proj" not in self.text)] if mixer is not None and mixer.latent_heads else sets[0]
        known = _last_words((*usual, *sets[0]))
        for names in (usual, *(names for names in sets if _last_words(names) & self.text - known)):
            yield [
                [f"{prefix}.layers.{layer}.{holder}.{name}" for prefix, holder in product(prefixes, holders)]
                for name in names
            ]


def _never(mixer: Mixer | None) -> frozenset[str]:
    """Return the names of modules that a mixer never has: hybrids name those of their other layers by them."""
    if mixer is None:
        return frozenset()
    if mixer.entry:
        return frozenset({"linear_attn", "mamba", "conv", "mlstm_layer"})
    own_names = ("gated_deltanet", "mamba1", "mamba2", "mlstm", "short_conv")
    return frozenset({"self_attn"}) if mixer.kind in own_names else frozenset()


def _last_words(names: Iterable[str]) -> set[str]:
    return {name.rpartition(".")[2] for name in names}


_TOKEN = re.compile(
    r"(?P<any>(?:\.|\\d|\\w|\[0-9\]|\[\^\\?\.\])[*+])|(?P<escaped>\\[.\-_])|(?P<one>\.|\\d)|(?P<word>[\w-]+)"
    r"|\((?:\?:)?(?P<choice>[\w.|\\-]+)\)"
)


def _globs(regex: str) -> list[str]:
    """Return globs that match what a regex does from the start of a name; NotUnderstoodError for one of another kind.

    Regexes of a file are not run: one that backtracks would take hours.
    """
    body, end = (regex[:-1], "") if regex.endswith("$") else (regex, "*")
    body, globs, place = body.removeprefix("^"), [""], 0
    while place < len(body):
        token = _TOKEN.match(body, place)
        if token is None:
            raise NotUnderstoodError(f"the pattern {shown(regex)}")
        place = token.end()
        if token["choice"]:
            words = token["choice"].replace("\\", "").split("|")
        else:
            words = ["*" if token["any"] else "?" if token["one"] else (token["word"] or token[0][1:])]
        globs = [glob + word for glob in globs for word in words]
        if len(globs) > MAX_PATTERNS:
            raise NotUnderstoodError(f"the pattern {shown(regex)}")
    return [glob + end for glob in globs]
