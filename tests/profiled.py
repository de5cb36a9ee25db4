"""Profiles of a tiny model, as the command makes and saves them."""

from __future__ import annotations

from pathlib import Path

from powerplan.cli import main
from powerplan.profile.result import Profile, load_profile

QUICK = ["--ctx", "64, 256", "--time-limit", "2h"]
"""Short contexts, and a time limit that does not depend on how fast the machine is, or how busy: see little_work."""


def profiled(tiny: Path, *options: str, code: int = 0) -> Profile:
    """Run the command with `options`, and with those of QUICK that are not among them."""
    pairs = zip(QUICK[::2], QUICK[1::2], strict=True)
    quick = [word for option, value in pairs if option not in options for word in (option, value)]
    assert main(["profile", str(tiny), *quick, "--save", "out.json", "--force", *options]) == code
    return load_profile("out.json")
