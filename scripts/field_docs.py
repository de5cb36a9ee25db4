"""Write docs/field.md: systems of the long-context literature, what powerplan counts of each, and what it computes.

python scripts/field_docs.py
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import NamedTuple

from powerplan.models.mixers import BUILT
from powerplan.reproduce import Comparison, reproduce

TARGET = Path(__file__).resolve().parent.parent / "docs" / "field.md"

HEAD = """# The field

Systems of the long-context literature: what is counted of each, by which kinds of mixers and FFNs ([spec.md](spec.md),
[accounting.md](accounting.md)), a command that shows it, and what is computed beside its claim. This page is made by
`python scripts/field_docs.py`, which reads `powerplan reproduce`; a test runs the commands. Throughput claims are set
beside ratios of bytes and FLOPs: no kernel, no scheduler and no network of theirs is modelled.
"""


class System(NamedTuple):
    """A system of the literature, a row of the page.

    kinds: what counts it, kinds of mixers and FFNs or options of a command. models: entries of the catalogue. figures:
    claims that `reproduce` sets beside computed values, as set and key. open: a claim that it computes nothing for.
    text: what else there is to say.
    """

    name: str
    source: str
    kinds: tuple[str, ...]
    command: str
    models: tuple[str, ...] = ()
    figures: tuple[tuple[str, str], ...] = ()
    open: str | None = None
    text: str = ""


SYSTEMS = (
    System(
        "Power attention",
        "arXiv 2507.04239",
        ("power", "linear"),
        "powerplan wsfr power-coder-3b --ctx 64k",
        ("power-coder-3b", "power-paper-small"),
        (("table4", "batch"), ("power-speed", "d64")),
    ),
    System(
        "Kimi Linear (KDA and MLA, 3:1)",
        "arXiv 2510.26692",
        ("kda", "mla"),
        "powerplan decode kimi-linear-48b-a3b --ctx 1M --twin mla",
        ("kimi-linear-48b-a3b",),
        (("kimi", "cache"), ("kimi", "decode")),
    ),
    System(
        "MiniMax-M1 (lightning and softmax, 7:1)",
        "arXiv 2506.13585",
        ("lightning", "attention"),
        "powerplan wsfr minimax-text-01 --ctx 1M --by layer",
        ("minimax-text-01",),
        (("hybrids", "minimax-text-01-total"),),
        text="M1 has the geometry of MiniMax-Text-01, whose entry has its name too.",
    ),
    System(
        "SSE, SSE-H",
        "arXiv 2507.16577",
        ("sse",),
        "powerplan wsfr llama-3.2-1b --ctx 128k --mixer sse",
        open="SSE-H: 2B",
        text="Read from a re-implementation.",
    ),
    System(
        "Gated attention",
        "arXiv 2505.06708",
        ("attention",),
        "powerplan wsfr qwen3-next-80b-a3b --ctx 128k --by layer",
        ("qwen3-next-80b-a3b",),
        text="`output_gate`, per channel or per head.",
    ),
    System(
        "Apriel-H1",
        "arXiv 2511.02651",
        ("mamba1", "attention"),
        "powerplan decode apriel-h1-15b --ctx 16k --batch 64 --twin attention",
        ("apriel-h1-15b",),
        (("field", "apriel-size"), ("field", "apriel-throughput")),
        text="Its Mamba has `shared_size`; its config.json is read.",
    ),
    System(
        "Hydra",
        "arXiv 2508.15099",
        ("mamba2", "moba", "moe", "memory"),
        "powerplan wsfr llama-3.2-1b --ctx 128k --mixer mamba2",
        open="Hydra: 1.6B",
        text="A blueprint. No formula of its workspace memory was found; routing by chunks changes no count of `moe`",
    ),
    System(
        "Hyena, HyenaDNA",
        "arXiv 2302.10866, 2306.15794",
        ("hyena",),
        "powerplan wsfr hyenadna-large-1m --ctx 1M --form chunked",
        ("hyenadna-large-1m",),
        (("field", "hyena-size"), ("field", "hyena-speed")),
        text="Training runs FFTs (`--form chunked`); decoding reads earlier inputs, or a distilled state (`state_dim`)",
    ),
    System(
        "PowerAttention (exponential receptive field; no power attention)",
        "arXiv 2503.03588",
        ("exponential_sparse",),
        "powerplan wsfr qwen2.5-7b --ctx 128k --mixer exponential_sparse",
        figures=(("field", "sparse-speed"),),
    ),
    System(
        "Superlinear multi-step attention",
        "arXiv 2601.18401",
        ("span_search",),
        "powerplan wsfr llama-3.1-8b --ctx 1M --mixer span_search",
        figures=(("field", "span-exponent"),),
        open="Superlinear: 114 tokens/s at 1M on one B200",
        text="The published N = 2.",
    ),
    System(
        "MSA (memory sparse attention)",
        "arXiv 2603.23516",
        ("memory_sparse",),
        "powerplan decode qwen3-4b --ctx 100M --batch 1 --mixer memory_sparse:document_size=16k",
        figures=(("field", "msa-devices"),),
        text="`--mixer` gives it to all layers, the published model routes in the upper half of them.",
    ),
    System(
        "WERSA",
        "arXiv 2507.08637",
        ("wersa",),
        "powerplan wsfr qwen3-8b --ctx 128k --mixer wersa",
        open="WERSA: 26.2 GFLOP for 98.4",
        text="Read from a re-implementation.",
    ),
    System(
        "STEM",
        "arXiv 2601.10639",
        ("stem",),
        "powerplan decode stem-1b --ctx 8k --batch 1,64",
        ("stem-1b",),
        (("field", "stem-share"), ("field", "stem-total"), ("field", "stem-active")),
        text="`host: true` puts its tables into the memory of the host.",
    ),
    System(
        "UltraMem, UltraMemV2",
        "arXiv 2411.12364, 2508.18756",
        ("memory",),
        "powerplan decode ultramemv2-1.2b --ctx 4k --batch 1,64",
        ("ultramemv2-1.2b",),
        (("field", "ultramem-total"), ("field", "ultramem-active")),
        open="UltraMemV2: 2.5B active of 120B",
        text="`memory` counts PEER (arXiv 2407.04153: `neurons`, `shared_keys`) too, and Memory+ (arXiv 2412.09764: "
        "`gated`, `value_projection`; not a pool that layers share)",
    ),
    System(
        "Locret, and other eviction within a budget",
        "arXiv 2410.01805",
        ("--cache-budget", "--prefill-chunk"),
        "powerplan decode llama-3.1-8b --ctx 128k --batch 1 --cache-budget 16k --prefill-chunk 4k",
        ("llama-3.1-8b",),
        (("field", "locret-phi"), ("field", "locret-llama")),
        text="What eviction costs in quality is not modelled.",
    ),
    System(
        "The Sparse Frontier",
        "arXiv 2504.17768",
        ("nsa", "moba", "dsa", "indexed_blocks"),
        "powerplan recommend llama-3.1-8b --ctx 128k --only moba",
        open="The Sparse Frontier",
    ),
    System(
        "Hybrid ratios of 3:1 to 6:1",
        "arXiv 2507.06457",
        ("gated_deltanet", "linear"),
        "powerplan recommend llama-3.1-8b --ctx 128k --top 1",
        text="A finding on recall, which `recommend` cites with its range where a plan mixes layers.",
    ),
    System(
        "ByteScale",
        "arXiv 2502.21231",
        ("--lengths",),
        "powerplan train llama-3.1-8b --ctx 128k --gpu h100-sxm --devices 64 --tokens 1e9 "
        "--lengths lognormal:mean=4k,p99=64k",
        ("llama-3.1-8b",),
        open="ByteScale on 12,000 GPUs",
    ),
    System(
        "LeanAttention",
        "arXiv 2405.10480",
        ("attention",),
        "powerplan decode llama-3.1-8b --ctx 128k --batch 1 --gpu h100-sxm",
        ("llama-3.1-8b",),
        open="LeanAttention",
    ),
    System(
        "FlashAttention-4",
        "1,613 TFLOP/s on B200",
        ("attention",),
        "powerplan hardware b200-sxm",
        figures=(("field", "fa4-peak"),),
        text="`train --efficiency attention=0.71` takes such a share; defaults are those of published runs on H100s",
    ),
    System(
        "Characterizing SSMs and hybrids on consumer GPUs",
        "SSMs to 220k tokens on 24 GB",
        ("mamba2", "--prefill-chunk"),
        "powerplan decode mamba2-2.7b --ctx 220k --batch 1 --gpu rtx-4090 --prefill-chunk 8k",
        ("mamba2-2.7b",),
        open="SSMs to 220k tokens on 24 GB, 4x faster at 57k",
    ),
    System(
        "Chunked local attention",
        "Llama 4",
        ("chunked_attention",),
        "powerplan wsfr llama-4-scout --ctx 1M --by layer",
        ("llama-4-scout",),
    ),
    System(
        "Caches that layers share (CLA, YOCO)",
        "arXiv 2405.12981, 2405.05254",
        ("attention", "forgetting"),
        "powerplan schema",
        text="`shared_kv`: no keys, values and cache of its own, and the earlier cache read again.",
    ),
    System(
        "Shared and latent experts",
        "arXiv 2401.06066; Kimi K3",
        ("moe",),
        "powerplan decode kimi-k3 --ctx 128k --batch 1,64",
        ("deepseek-v3", "kimi-k3"),
        text="`shared_intermediate_size`, `latent_size`.",
    ),
)
"""Rows of the page, in its order."""


def field_page() -> str:
    """Return the page in markdown."""
    results = {result.figures.name: result for result in reproduce()}
    found = {
        (name, comparison.figure.key): comparison
        for name, result in results.items()
        for comparison in result.comparisons
    }
    reasons = results["field"].figures.not_computed
    heading = "| system | published in | counted as | catalogue | claim, and what is computed |"
    lines = [HEAD, heading, "|---|---|---|---|---|"]
    for system in SYSTEMS:
        said = [_claim(found[figure]) for figure in system.figures]
        if system.open is not None:
            said.append(f"{system.open}: not computed ({reasons[system.open]})")
        swapped = any(word in system.command for word in ("--mixer", "--only"))
        cells = (
            f"**{system.name}**",
            system.source,
            ", ".join(f"`{kind}`" for kind in system.kinds),
            ", ".join(f"`{name}`" for name in system.models) or "any model" * swapped,
            ". ".join(filter(None, [*said, system.text.rstrip(".")])) or "no claim of cost",
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["\n## Commands\n", "```sh"]
    lines += [f"{system.command}  # {system.name}" for system in SYSTEMS]
    built = ", ".join(f"`{kind.__struct_config__.tag}`" for kind in BUILT)
    lines += ["```\n", "## Layers\n"]
    text = f"`powerplan.models` builds {built}; the other kinds are counted ([models.md](models.md))."
    lines.append(textwrap.fill(text, 120, break_on_hyphens=False))
    return "\n".join(lines) + "\n"


def _claim(comparison: Comparison) -> str:
    """Return a claim beside the nearest value that is computed for it."""
    figure, (name, _) = comparison.figure, comparison.nearest
    value = comparison.computed[name]
    digits = 0 if value.denominator == 1 else max(2, figure.decimals)
    return f"{figure.what}: published {figure.printed()}, computed {figure.show(value, digits)} ({name})"


if __name__ == "__main__":
    TARGET.write_text(field_page(), encoding="utf-8")
