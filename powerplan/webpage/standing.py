"""Where a model stands: the figures at the head of a page, the curves over the context, the candidates' table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

from powerplan.accounting import Accounting, Row
from powerplan.answers.recommend import RecommendAnswer
from powerplan.answers.train import TrainAnswer
from powerplan.answers.wsfr import WsfrAnswer
from powerplan.balance import verdict_of
from powerplan.curves import sampled_contexts, short_context
from powerplan.report.parts import parameters_text, show_bytes, show_flops, show_ratio
from powerplan.report.target import shortfall, verdict
from powerplan.search import Candidate
from powerplan.spec import ModelSpec
from powerplan.units import format_bytes, format_duration, format_items
from powerplan.webpage.asked import Asked, recommended
from powerplan.webpage.charts import CONTEXTS, curves_chart, ratio_mark
from powerplan.webpage.content import (
    AS_IT_IS,
    CANDIDATES,
    DASHES,
    Bar,
    Chart,
    Curve,
    Figure,
    Mark,
    Part,
    Point,
    Table,
    curves_table,
    table_from,
)

DRAWN = 3
"""Candidates that charts draw at first, besides the model as it is; the others wait in the legend."""

WEIGHTS, STATE = "var(--w0)", "var(--s0)"


def facts(asked: Asked) -> str:
    """Return the size of the model in one line."""
    accounting = asked.wsfr.accounting
    spec = accounting.spec
    layers = format_items(spec.layer_count, "layer")
    return f"{parameters_text(accounting)} · {layers} · hidden size {spec.hidden_size:,}"


def side(asked: Asked) -> str:
    """Return which side is too heavy at the context, as one word for a badge."""
    row = asked.wsfr.rows[-1]
    if row.wsfr is None:
        return "no state"
    word = verdict_of(row.wsfr).side
    return word if word == "balanced" else f"{word}-heavy"


def headline(asked: Asked) -> str:
    """Return the verdict without the word that the badge has."""
    word, _, rest = asked.wsfr.verdict.partition(": ")
    return rest if rest and word == side(asked) else asked.wsfr.verdict


def split_bars(asked: Asked) -> list[Bar]:
    """Return how the FLOPs per token split into weights and state: of the model, and of the recommended one."""
    rows, winner = [("as it is", asked.wsfr.rows[-1])], recommended(asked)
    if winner is not None:
        rows.append((f"recommended: {winner.label}", winner.row))
    longest = max(row.flops_per_token for _, row in rows)
    return [_split(title, row, longest) for title, row in rows]


def _split(title: str, row: Row, longest: Fraction) -> Bar:
    amounts = (("weights", row.weight_flops_per_token, WEIGHTS), ("state", row.state_flops_per_token, STATE))
    parts = tuple(
        Part(
            name,
            float(flops / longest),
            f"{show_flops(flops)} ({float(flops / row.flops_per_token):.0%})",
            colour,
        )
        for name, flops, colour in amounts
    )
    return Bar(title, f"{show_ratio(row.wsfr)}, {show_flops(row.flops_per_token)} FLOPs per token", parts)


def figures(asked: Asked) -> list[Figure]:
    """Return the numbers at the head of the page."""
    row = asked.wsfr.rows[-1]
    flops = f"weights {show_flops(row.weight_flops_per_token)}, state {show_flops(row.state_flops_per_token)}"
    found = [
        Figure("WSFR", show_ratio(row.wsfr), f"weight to state FLOPs at {row.context:,} tokens"),
        _balanced(asked.wsfr),
        Figure("FLOPs per token", show_flops(row.flops_per_token), flops),
        Figure("State per sequence", show_bytes(row.state_bytes), f"all layers together at {row.context:,} tokens"),
    ]
    serving = asked.decode.models[0].servings[0]
    if asked.decode.fleet is not None:
        most, fleet = serving.largest_batch, asked.decode.fleet
        found.append(
            Figure(
                "Largest batch",
                "any" if most is None else f"{most:,}",
                f"sequences whose state fits beside the weights on {fleet.name}",
            )
        )
    else:
        found.append(Figure("Weights", format_bytes(serving.stored_bytes), "all of them, as they are stored"))
    winner, run = recommended(asked), asked.train
    if isinstance(run, TrainAnswer) and run.fits:
        hours = f"{run.plan.gpu_hours:,.0f} device hours"
        cost = "" if run.plan.cost is None else f", {run.plan.cost:,.0f} at {float(run.plan.price or 0):,.2f} an hour"
        found.append(Figure("Training", format_duration(run.plan.seconds), f"{hours}{cost}"))
    elif run is not None:
        found.append(Figure("Training", "no plan", "the section on training says why"))
    elif winner is not None:
        found.append(Figure("Recommended", show_ratio(winner.row.wsfr), winner.label))
    return found


def _balanced(answer: WsfrAnswer) -> Figure:
    label, balanced = "Balanced context", answer.balanced_context
    if balanced is not None:
        return Figure(label, f"{balanced:,}", "tokens; from there on the state takes most FLOPs")
    if answer.rows[-1].wsfr is None:
        return Figure(label, "none", "there is no state")
    if not answer.accounting.longest_is_found:
        return Figure(label, "-", "not computed for this model and convention")
    return Figure(label, "none", "state and weight FLOPs are equal at no context")


def advice(answer: RecommendAnswer) -> list[tuple[str, str | Sequence[str]]]:
    """Return what to change under the labels that the command line has: sentences, and commands as a list."""
    winner, missing = answer.recommended, shortfall(answer.recommendation)
    first = f"{winner.label}, {show_ratio(winner.row.wsfr)}, {verdict(answer.recommendation)}"
    return [("Recommended", first), *([("Target", missing)] if missing else []), *answer.report.block]


def candidates_table(answer: RecommendAnswer) -> Table:
    """Return the candidates as the command line shows them, each with the reason why it stands where it does."""
    report = answer.report
    table = table_from("Candidates, the recommended one first", report.columns, report.rows)
    reasons = [answer.why(place) for place in range(len(answer.candidates))]
    return replace(table, colours=tuple(colours(answer)), remarks=tuple(reasons))


def colours(answer: RecommendAnswer) -> list[str]:
    """Return the colour of each candidate in charts, "" for those that are not drawn."""
    found, number = [], 0
    for candidate in answer.candidates:
        number += not candidate.plan.unchanged
        drawn = number <= len(CANDIDATES)
        found.append(AS_IT_IS if candidate.plan.unchanged else CANDIDATES[number - 1] if drawn else "")
    return found


def context_curves(asked: Asked) -> tuple[list[Curve], list[Curve]]:
    """Return the curves of WSFR and of state per sequence over the context: of the candidates, and as it is."""
    contexts = sampled_contexts(asked.contexts)
    balanced = asked.wsfr.balanced_context
    if balanced is not None and contexts[0] <= balanced <= contexts[-1]:
        contexts = sorted({*contexts, balanced})
    named: list[tuple[str, str, ModelSpec, bool]] = []
    answer = asked.recommend
    if isinstance(answer, str):
        named.append(("as it is", AS_IT_IS, asked.wsfr.model, True))
    else:
        for place, (candidate, colour) in enumerate(zip(answer.candidates, colours(answer), strict=True)):
            if colour:
                shown = place < DRAWN or candidate.plan.unchanged
                named.append((_name(candidate, place), colour, candidate.spec, shown))
    ratios, states = [], []
    for number, (name, colour, spec, shown) in enumerate(named):
        accounting, dash = Accounting(spec, asked.wsfr.accounting.convention), DASHES[colour]
        rows = [accounting.row(context, asked.wsfr.dtypes) for context in contexts]
        ratio = [Point(row.context, float(row.wsfr), show_ratio(row.wsfr)) for row in rows if row.wsfr is not None]
        sizes = [(row.context, row.state_bytes) for row in rows if row.state_bytes]
        state = [Point(context, float(size), show_bytes(size)) for context, size in sizes]
        ratios.append(Curve(f"c{number}", name, colour, tuple(ratio), shown, dash))
        states.append(Curve(f"c{number}", name, colour, tuple(state), shown, dash))
    return ratios, states


def _name(candidate: Candidate, place: int) -> str:
    return f"{place + 1}. {candidate.label}"


def context_charts(asked: Asked) -> tuple[list[Curve], list[Chart]]:
    """Return the two charts over the context, and the curves of their legend; no chart where there is no state."""
    ratios, states = context_curves(asked)
    name, marks = asked.wsfr.model.name, _marks(asked)
    target = Fraction(1) if isinstance(asked.recommend, str) else asked.recommend.recommendation.request.target
    charts = []
    if any(curve.points for curve in ratios):
        about = f"Weight-state FLOP ratio of {name} and of candidates over the context, both axes logarithmic"
        charts.append(
            Chart(
                "chart-wsfr",
                "WSFR over context",
                curves_chart(about, ratios, CONTEXTS, ("weight : state FLOPs", "ratio"), [ratio_mark(target)], marks),
                curves_table("Weight-state FLOP ratio", ratios),
            )
        )
    if any(curve.points for curve in states):
        about = f"State per sequence of {name} and of candidates over the context, both axes logarithmic"
        charts.append(
            Chart(
                "chart-state",
                "State per sequence over context",
                curves_chart(about, states, CONTEXTS, ("state per sequence", "bytes"), (), marks),
                curves_table("State per sequence", states),
            )
        )
    return ratios, charts


def _marks(asked: Asked) -> list[Mark]:
    """Return what is marked on the axis of contexts: those asked about, the balanced one, the trained length."""
    most = sampled_contexts(asked.contexts)[-1]
    marks = [Mark(context, f"asked {short_context(context)}", asked=True) for context in asked.contexts[-3:]]
    balanced, trained = asked.wsfr.balanced_context, trained_length(asked.wsfr.model)
    if balanced is not None and balanced <= most:
        marks.append(Mark(balanced, f"balanced {balanced:,}"))
    if trained is not None and trained <= most:
        marks.append(Mark(trained, f"trained up to {short_context(trained)}"))
    return marks


def trained_length(spec: ModelSpec) -> int | None:
    """Return the longest context that the model was trained for; None where that is not known."""
    return spec.trained_context or spec.position_embeddings
