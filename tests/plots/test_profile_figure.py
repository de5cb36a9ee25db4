"""The figure of profile: throughput, crossovers, and the split of a layer's time."""

from __future__ import annotations

import msgspec
import pytest
from drawn import below, legend, lines, names, title
from fuzzing import PROFILE

from powerplan.errors import InputError
from powerplan.plots.profile import profile_figure
from powerplan.profile import load_profile


def test_profile() -> None:
    profile = load_profile(str(PROFILE))
    figure = profile_figure(profile)
    passes = list(dict.fromkeys(row.direction for row in profile.part("state")))
    upper, lower = figure.axes[: len(passes)], figure.axes[len(passes) :]
    mixers = list(dict.fromkeys(row.name for row in profile.part("state")))
    assert legend(figure) == [*mixers, "projections, weights", "FFN, weights", "mixer, state"]
    for direction, throughput, split in zip(passes, upper, lower, strict=True):
        assert throughput.get_title(loc="left") == direction
        for row in profile.part("state", direction):
            if row.tokens_per_s:
                assert dict(lines(throughput)[mixers.index(row.name)])[row.context] == row.tokens_per_s
        found = [one for one in profile.crossover if one.direction == direction and one.context is not None]
        assert names(throughput) == [f"{one.name} faster than {one.against}\nfrom {one.context:,}" for one in found]
        rows = sorted((row for row in profile.split if row.direction == direction), key=lambda row: row.context)
        assert len(split.get_yticklabels()) == len(rows)
        state = split.patches[-len(rows) :]
        for row, bar in zip(rows, state, strict=True):
            assert bar.get_width() == pytest.approx(row.state_ms / (row.weight_ms + row.state_ms))  # type: ignore[attr-defined]
    assert any(names(axes) for axes in upper)
    assert title(figure) == f"{profile.layer.model} on {profile.device}"
    assert f"{profile.dtype}, batch {profile.batch}" in below(figure)


def test_a_profile_without_a_split_or_a_crossover() -> None:
    profile = msgspec.structs.replace(load_profile(str(PROFILE)), split=(), crossover=())
    figure = profile_figure(profile)
    assert all(not names(axes) for axes in figure.axes)
    assert "mixer, state" not in legend(figure)


def test_a_profile_without_times_of_mixers() -> None:
    profile = msgspec.structs.replace(load_profile(str(PROFILE)), results=())
    with pytest.raises(InputError, match=r"^plot: the profile holds no times of mixers to draw$"):
        profile_figure(profile)
