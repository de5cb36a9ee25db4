"""Where the FLOPs go: by component, by layer, and the mix of layers as a strip."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from powerplan.accounting import Accounting, Component, positions_text
from powerplan.mixers import Mixer
from powerplan.report.parts import show_flops
from powerplan.spec import ModelSpec
from powerplan.webpage.asked import Asked, recommended
from powerplan.webpage.charts import columns_chart
from powerplan.webpage.content import HUES, Bar, Chart, Key, Part, Strip, Table

MOST_CELLS = 512
"""Most layers that are drawn one by one."""

SHADES = 5
"""Shades of each side in bars: style.css has as many."""

NO_MIXER = "no mixer"


def component_bars(asked: Asked) -> list[tuple[Bar, Table]]:
    """Return the FLOPs per token by component at the longest context, of the model and of the recommended one."""
    models = _models(asked)
    sums = [sum(_flops(part) for part in accounting.components(asked.context)) for _, accounting in models]
    return [_components(title, accounting, asked.context, max(sums)) for title, accounting in models]


def _models(asked: Asked) -> list[tuple[str, Accounting]]:
    """Return the model as it is, and the recommended one where it is another, by their titles."""
    found, winner = [("as it is", asked.wsfr.accounting)], recommended(asked)
    if winner is not None:
        found.append((f"recommended: {winner.label}", Accounting(winner.spec, asked.wsfr.accounting.convention)))
    return found


def _flops(part: Component) -> float:
    return float(part.weight_flops_per_token + part.state_flops_per_token)


def _components(title: str, accounting: Accounting, context: int, longest: float) -> tuple[Bar, Table]:
    row, parts = accounting.row(context), accounting.components(context)
    taken = {"w": 0, "s": 0}
    bar: list[Part] = []
    for part in parts:
        side = "w" if part.weight_flops_per_token else "s"
        colour = f"var(--{side}{taken[side] % SHADES})"
        taken[side] += 1
        flops = part.weight_flops_per_token + part.state_flops_per_token
        share = f"{show_flops(flops)} ({float(flops / row.flops_per_token):.0%})"
        bar.append(Part(part.name, _flops(part) / longest, share, colour))
    table = Table(
        caption=f"FLOPs per token by component at {context:,} tokens, {title}",
        head=("component", "weight FLOPs", "state FLOPs", "share"),
        rows=tuple(
            (
                part.name,
                show_flops(part.weight_flops_per_token),
                show_flops(part.state_flops_per_token),
                f"{float((part.weight_flops_per_token + part.state_flops_per_token) / row.flops_per_token):.1%}",
            )
            for part in parts
        ),
        left=(True, False, False, False),
        colours=tuple(part.colour for part in bar),
    )
    return Bar(title, f"{show_flops(row.flops_per_token)} FLOPs per token", tuple(bar)), table


def strips(asked: Asked) -> tuple[list[Strip], list[Key], list[Table]]:
    """Return the layers of the model and of the recommended one, what their colours mean, and both as tables."""
    models = [(title, accounting.spec) for title, accounting in _models(asked)]
    labels = _labels([spec for _, spec in models])
    names = list(dict.fromkeys(labels.values()))
    with_mixer = [name for name in names if name != NO_MIXER]
    colours = {NO_MIXER: f"var(--m{HUES - 1})"} if NO_MIXER in names else {}
    # The first two are those of weights and state beside the strips.
    colours |= {name: f"var(--m{(number + 2) % (HUES - 1)})" for number, name in enumerate(with_mixer)}
    found = [_strip(title, spec, labels, colours) for title, spec in models if spec.layer_count <= MOST_CELLS]
    tables = [_layers_table(title, accounting, asked.context) for title, accounting in _models(asked)]
    return found, [Key(colour, name) for name, colour in colours.items()], tables


def _labels(specs: Sequence[ModelSpec]) -> dict[Mixer | None, str]:
    """Return a label for each mixer: what it is, with its heads where others of the kind have other ones.

    Where there are more labels than colours, it is the kind alone.
    """
    mixers: list[Mixer | None] = list(dict.fromkeys(use.layer.mixer for spec in specs for use in spec.layer_uses()))
    words = {mixer: NO_MIXER if mixer is None else mixer.describe() for mixer in mixers}
    alike = Counter(words.values())
    labels = {mixer: _with_heads(mixer, word) if alike[word] > 1 else word for mixer, word in words.items()}
    if len(set(labels.values())) > HUES - 1:
        labels = {mixer: NO_MIXER if mixer is None else mixer.kind for mixer in mixers}
    return labels


def _with_heads(mixer: Mixer | None, word: str) -> str:
    heads = None if mixer is None else mixer.own_heads()
    return word if heads is None else f"{word}, {heads.describe()}"


def _strip(title: str, spec: ModelSpec, labels: dict[Mixer | None, str], colours: dict[str, str]) -> Strip:
    cells: dict[int, tuple[str, str]] = {}
    counts: dict[str, int] = {}
    for use in spec.layer_uses():
        label = labels[use.layer.mixer]
        counts[label] = counts.get(label, 0) + use.count
        for place in (place for span in use.positions for place in span):
            cells[place] = (colours[label], f"layer {place}: {use.layer.describe()}")
    text = ", ".join(f"{count:,} of {label}" for label, count in counts.items())
    return Strip(title, f"{spec.layer_count:,} layers: {text}", tuple(cells[place] for place in sorted(cells)))


def _layers_table(title: str, accounting: Accounting, context: int) -> Table:
    row = accounting.row(context)
    rows = []
    for part in accounting.layers(context):
        count = part.use.count if part.use else 1
        flops = part.weight_flops_per_token + part.state_flops_per_token
        rows.append(
            (
                positions_text(part.use.positions) if part.use else "model",
                part.name,
                f"{count:,}" if part.use else "",
                show_flops(part.weight_flops_per_token),
                show_flops(part.state_flops_per_token),
                f"{float(flops / row.flops_per_token):.1%}",
            )
        )
    return Table(
        caption=f"FLOPs per token by kind of layer at {context:,} tokens, {title}",
        head=("layers", "layer", "count", "weight FLOPs", "state FLOPs", "share"),
        rows=tuple(rows),
        left=(True, True, False, False, False, False),
    )


def layer_charts(asked: Asked) -> list[Chart]:
    """Return the FLOPs of each layer in the order of the layers; no chart of a model with more than MOST_CELLS."""
    models = [(title, own) for title, own in _models(asked) if own.spec.layer_count <= MOST_CELLS]
    columns = [_columns(accounting, asked.context) for _, accounting in models]
    top = max((weight + state for own in columns for weight, state, _ in own), default=1.0)
    charts = []
    for number, ((title, accounting), own) in enumerate(zip(models, columns, strict=True)):
        about = f"Weight and state FLOPs per token of each layer of {accounting.spec.name}, {title}"
        spec = columns_chart(about, own, top)
        charts.append(Chart(f"chart-layers-{number}", title, spec, _layers_table(title, accounting, asked.context)))
    return charts


def _columns(accounting: Accounting, context: int) -> list[tuple[float, float, str]]:
    columns: dict[int, tuple[float, float, str]] = {}
    for part in accounting.layers(context):
        if part.use is None:
            continue
        weight, state = part.weight_flops_per_token / part.use.count, part.state_flops_per_token / part.use.count
        text = f"{part.name}: weights {show_flops(round(weight))}, state {show_flops(state)}"
        for place in (place for span in part.use.positions for place in span):
            columns[place] = (weight, float(state), f"layer {place}, {text}")
    return [columns[place] for place in sorted(columns)]
