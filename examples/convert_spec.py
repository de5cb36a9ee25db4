"""Replace a model's attention: by power attention (p=2), or by three windows to one power layer.

Usage: python examples/convert_spec.py [MODEL] [CONTEXT] [OUT.yaml]
Prints FLOPs and state of the three models, and writes the last one as a spec.
Defaults: llama-3-8b 64k converted.yaml
"""

from __future__ import annotations

from script import imports, run

with imports():
    import msgspec

    from powerplan import Accounting, ModelSpec, load_model
    from powerplan.dump import spec_to_yaml
    from powerplan.load import model_file
    from powerplan.output import check_targets, write_whole
    from powerplan.spec import Layer, group_layers
    from powerplan.swap import with_mixer
    from powerplan.units import format_bytes, format_count, format_parameters, format_ratio, parse_context


def alternate(spec: ModelSpec, *mixers: str) -> ModelSpec:
    """Return `spec` with the mixers in turn: the first one in layer 0, the second in layer 1, and so on, repeated."""
    variants = [all_layers(with_mixer(spec, mixer)[0]) for mixer in mixers]
    layers = [variants[position % len(mixers)][position] for position in range(spec.layer_count)]
    return msgspec.structs.replace(
        spec, name=f"{spec.name}-mixed", layers=group_layers(layers), published=None, aliases=()
    )


def all_layers(spec: ModelSpec) -> list[Layer]:
    """Return the layers of a model one by one, in order."""
    return [layer for group in spec.layers for _ in range(group.repeat) for layer in group.period]


def main(model: str = "llama-3-8b", context: str = "64k", out: str = "converted.yaml") -> None:
    check_targets({"OUT": out}, True, {"MODEL": model_file(model)})
    spec, tokens = load_model(model).spec, parse_context(context, "CONTEXT")
    variants = {
        "as it is": spec,
        "power p=2": with_mixer(spec, "power:p=2")[0],
        "3 windows : 1 power": alternate(spec, *["window:4096"] * 3, "power:p=2"),
    }
    print(f"{spec.name} at {tokens:,} tokens: forward FLOPs per token, state per sequence\n")
    print(f"  {'layers':20}{'parameters':>12}{'weight FLOPs':>15}{'state FLOPs':>14}{'WSFR':>9}{'state':>12}")
    for name, variant in variants.items():
        accounting = Accounting(variant)
        row = accounting.row(tokens)
        flops = f"{format_count(row.weight_flops_per_token):>15}{format_count(row.state_flops_per_token):>14}"
        assert row.wsfr is not None, "attention has state"
        parameters = format_parameters(accounting.total_parameters.with_embeddings)
        print(f"  {name:20}{parameters:>12}{flops}{format_ratio(row.wsfr):>9}{format_bytes(row.state_bytes):>12}")
    write_whole(out, spec_to_yaml(variants["3 windows : 1 power"]).encode(), True, "OUT")
    print(f"\nthe last one: powerplan wsfr {out} --ctx {context} --by layer")


if __name__ == "__main__":
    run(main, __doc__)
