"""Write docs/gallery.md: commands and what they print, and docs/images/gallery/: the figures that they draw.

python scripts/gallery.py
"""

from __future__ import annotations

import shlex
from contextlib import chdir, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import NamedTuple

from powerplan.cli import main

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "gallery.md"
FIGURES = ROOT / "docs" / "images" / "gallery"

HEAD = """# Gallery

One question each, the command that answers it, and what it prints. `python scripts/gallery.py` makes this page by
running the commands; a test holds that it is up to date. The same in Python is in
[a notebook](../examples/plan_in_a_notebook.ipynb); `powerplan report` puts it on one page ([report.md](report.md)).
"""


class Example(NamedTuple):
    """A question, what the answer is worth knowing for, and the command. figure: the file that --plot draws, if any.

    code: the exit code of the command. An error is shown with its message.
    """

    question: str
    text: str
    command: str
    figure: str | None = None
    code: int = 0


EXAMPLES = (
    Example(
        "Where does Llama 3.1 8B stand?",
        "Weight FLOPs do not depend on the context, state FLOPs grow with it. Up to 57,255 tokens weights take most.",
        "wsfr llama-3.1-8b --ctx 8k,64k,128k",
    ),
    Example(
        "What do masks between documents save?",
        "Most texts are short. With masks, attention costs what documents cost. `--lengths` also takes a file.",
        "wsfr llama-3.1-8b --ctx 64k,128k --lengths lognormal:mean=4k,p99=64k",
    ),
    Example(
        "What does another mixer cost in this model?",
        "Hyena beside attention at 1M tokens, in training, where it runs by FFTs. `--form recurrent` counts decoding.",
        "compare gpt2-small --ctx 1M --mixer hyena --form chunked",
    ),
    Example(
        "What takes the FLOPs?",
        "At 128k tokens attention over the cache takes 70 % of the forward pass.",
        "wsfr llama-3.1-8b --ctx 128k --by component",
    ),
    Example(
        "Where does this number come from?",
        "`--explain` prints every formula with the numbers put in, and where the formula was read.",
        "wsfr gpt2-small --ctx 64k --explain",
    ),
    Example(
        "Which of these models suits 128k?",
        "Windows and hybrids beside plain attention, counted under one convention.",
        "compare llama-3.1-8b gemma-2-9b gpt-oss-20b kimi-linear-48b-a3b --ctx 128k",
    ),
    Example(
        "What should be trained instead?",
        "Mixers, heads and layer mixes that bring weights and state to 1:1, best first. `--write` saves the winner.",
        "recommend llama-3.1-8b --ctx 128k --top 3",
    ),
    Example(
        "The same as a figure",
        "`--plot` draws the ratio over the context, for the first candidates and the model as it is.",
        "recommend llama-3.1-8b --ctx 128k --plot ratio.png",
        figure="ratio.png",
    ),
    Example(
        "Which window balances it?",
        "`--solve` finds one quantity: the window, the context or the degree p.",
        "recommend llama-3.1-8b --ctx 128k --solve window",
    ),
    Example(
        "Which window holds as much as power attention with p = 2?",
        "`--equal-state` finds the largest window whose keys and values are no more elements than that state.",
        "recommend llama-3.1-8b --ctx 128k --solve window --equal-state power:p=2",
    ),
    Example(
        "What does a budget buy?",
        "Tokens, steps and days for 1e23 FLOPs, and the same with another mixer in every layer.",
        "budget llama-3.1-8b --ctx 128k --flops 1e23 --gpu h100-sxm --devices 256",
    ),
    Example(
        "Does the training run fit?",
        "Memory by part, the time of a step by part, and how the model is split over the devices.",
        "train llama-3.1-8b --ctx 128k --gpu h100-sxm --devices 64 --tokens 100B",
    ),
    Example(
        "What does serving take?",
        "How many sequences fit, bytes of weights and cache, and the time of a step.",
        "decode llama-3.1-8b --ctx 128k --batch 1,3,8 --gpu h100-sxm",
    ),
    Example(
        "What does a budget of 4k tokens for each cache buy?",
        "More sequences at 1M tokens, whose prompts are then read in chunks. What eviction loses is not modelled.",
        "decode llama-3.1-70b --ctx 1M --batch 1,32 --gpu h200-sxm --devices 8 --cache-budget 4k --prefill-chunk 8k",
    ),
    Example(
        "How large is the state of power attention?",
        "The size of the embedding for each degree p, and the window whose keys and values have as many elements.",
        "dims --head-dim 64,128 --p 2,3",
    ),
    Example(
        "Which degree p suits this model?",
        "The state that the whole model carries with each degree, and what it does to the ratio.",
        "dims --model llama-3.1-8b --ctx 128k",
    ),
    Example(
        "Is the layer faster here?",
        "`powerplan profile gpt2-small --p 2 --save FILE` times the layer on a machine. This file is of two cores.",
        "profile --show benchmarks/results/profile-cpu.json",
    ),
    Example(
        "The times as a figure",
        "Tokens per second of the layer over the context.",
        "profile --show benchmarks/results/profile-cpu.json --plot speed.png",
        figure="speed.png",
    ),
    Example(
        "Can a published number be reproduced?",
        "What papers print beside what powerplan computes, and the convention that explains a difference.",
        "reproduce table3",
    ),
    Example(
        "What is in the catalogue?",
        "Any model in detail. `--yaml` prints a spec to edit.",
        "models kimi-linear-48b-a3b",
    ),
    Example(
        "What does a mistake look like?",
        "One message with the value, what is allowed and the nearest spelling. The exit code is 2.",
        "wsfr llama-3.1-8b --mixer windw:4096",
        code=2,
    ),
)


def printed(example: Example) -> str:
    """Return what a command prints on standard output, or its error.

    Raises RuntimeError where it does not end with the code that the example has.
    """
    out, error = StringIO(), StringIO()
    with chdir(ROOT), redirect_stdout(out), redirect_stderr(error):
        code = main(shlex.split(example.command))
    if code != example.code:
        raise RuntimeError(f"powerplan {example.command} ended with {code}: {error.getvalue()}")
    lines = (out.getvalue() if code == 0 else error.getvalue()).rstrip("\n").split("\n")
    return "\n".join(line.rstrip() for line in lines)


def gallery_page() -> str:
    """Return the page in markdown."""
    parts = [HEAD]
    for example in EXAMPLES:
        parts.append(f"## {example.question}\n\n{example.text}\n")
        command = f"$ powerplan {example.command}"
        if example.figure:
            parts.append(f"```console\n{command}\n```\n\n![{example.text}](images/gallery/{example.figure})\n")
        else:
            parts.append(f"```console\n{command}\n{printed(example)}\n```\n")
    return "\n".join(parts)


def draw(folder: Path) -> None:
    """Draw the figures into a folder, over files of their names; needs matplotlib."""
    folder.mkdir(parents=True, exist_ok=True)
    for example in EXAMPLES:
        if example.figure:
            drawn = shlex.quote(str(folder / example.figure))
            printed(example._replace(command=f"{example.command.replace(example.figure, drawn)} --force"))


if __name__ == "__main__":
    TARGET.write_text(gallery_page(), encoding="utf-8")
    draw(FIGURES)
