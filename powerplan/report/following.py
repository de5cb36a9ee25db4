"""The commands that one types after a recommendation."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from powerplan.search import Recommendation
from powerplan.units import context_text

FILE = "new.yaml"
"""Where a command writes the model, unless the user has written it already."""


def next_commands(answer: Recommendation, command: Sequence[str], written: str | None) -> list[str]:
    """Return the commands to type next, first the one that writes the recommended model.

    command: the words of a command line that asks for this recommendation, "powerplan", "recommend", MODEL and options.
    written: the file that has the model already, if any.
    """
    if answer.recommended.plan.unchanged:
        return [shlex.join(_after_no_change(answer, command))]
    lines = [] if written else [[*command, "--write", FILE]]
    file, contexts = written or FILE, ",".join(map(context_text, answer.contexts))
    if any(mixer.degree and mixer.kernel_problem is None for mixer in answer.recommended.spec.mixers()):
        lines.append(["powerplan", "profile", file])
    else:
        lines.append(["powerplan", "wsfr", file, "--ctx", contexts])
    limits, run = answer.request.limits, answer.recommended.run
    if limits.device is not None and (run is None or run.fits):  # Else the command would only say that it does not fit.
        devices = ["--devices", str(limits.devices)] if limits.devices > 1 else []
        longest = context_text(answer.contexts[-1])
        asked = ["--gpu", limits.device.name, *devices, *_options(command, "--tokens", "--price")]
        lines.append(["powerplan", "train", file, "--ctx", longest, *asked])
    return [shlex.join(line) for line in lines]


def _options(command: Sequence[str], *names: str) -> list[str]:
    """Return these options of a command line with their values, so far as it has them."""
    return [word for place, own in enumerate(command[:-1]) if own in names for word in (own, command[place + 1])]


def _after_no_change(answer: Recommendation, command: Sequence[str]) -> list[str]:
    """Return what to type where the model stays: the plan on target, a longer context, or which layers take what."""
    off, ask = answer.off_target, ["powerplan", "wsfr", command[2], "--ctx"]
    if off and off.meets and off.meets.feasible and (place := answer.place(off.meets)):
        return [*command, "--pick", str(place + 1), "--write", FILE]
    longest, balanced = answer.contexts[-1], answer.balanced_context
    if balanced and balanced > longest and not answer.recommended.balanced:
        return [*ask, f"{context_text(longest)},{context_text(balanced)}"]
    return [*ask, context_text(longest), "--by", "layer"]
