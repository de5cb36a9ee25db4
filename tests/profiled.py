"""Profiles of a tiny model, as the command makes and saves them."""

from __future__ import annotations

from pathlib import Path

from powerplan.cli import main
from powerplan.profile.result import Profile, load_profile

QUICK = ["--ctx", "64, 256", "--time-limit", "2h"]
"""Short contexts, and a time limit that does not depend on how fast the machine is, or how busy: see little_work."""


def profiled(tiny: Path, *options: str, code: int = 0) -> Profile:
    assert main(["profile", str(tiny), *QUICK, "--save", "out.json", "--force", *options]) == code
    return load_profile("out.json")
