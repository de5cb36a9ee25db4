"""Print the weight-state FLOP ratio (WSFR) and state of a model, as it is and with other mixers.

Usage: python examples/plan_from_config.py [MODEL] [CONTEXT]
MODEL is a config.json, a YAML spec or a catalogue name. Defaults: llama-3-8b 64k
"""

from __future__ import annotations

from script import imports, run

with imports():
    from powerplan import Accounting, load_model
    from powerplan.swap import with_mixer
    from powerplan.units import format_bytes, format_ratio, parse_context

MIXERS = [None, "window:4096", "power:p=2", "linear"]
"""The mixers to compare, as `--mixer` takes them. None is the model as it is."""


def main(model: str = "llama-3-8b", context: str = "64k") -> None:
    spec = load_model(model).spec
    tokens = parse_context(context, "CONTEXT")
    print(f"{spec.name} at {tokens:,} tokens")
    for mixer in MIXERS:
        variant = spec if mixer is None else with_mixer(spec, mixer)[0]
        row = Accounting(variant).row(tokens)
        ratio = "no state" if row.wsfr is None else format_ratio(row.wsfr)
        print(f"  {mixer or 'as it is':12} WSFR {ratio:>8}   state {format_bytes(row.state_bytes):>10} per sequence")


if __name__ == "__main__":
    run(main, __doc__)
