"""The help of commands: the panels that their options stand in, and examples."""

from __future__ import annotations

MODEL = "Model"
CONVENTION = "What is counted"
FORMATS = "Number formats"
DEVICES = "Devices and money"
OUTPUT = "Output"
ORDER = (None, MODEL, CONVENTION, FORMATS, DEVICES, OUTPUT)

PANELS = {
    **dict.fromkeys(["like", "mixer", "measured"], MODEL),
    **dict.fromkeys(["form", "causal", "exclude"], CONVENTION),
    **dict.fromkeys(
        ["dtype", "weights_dtype", "cache_dtype", "state_dtype", "gradients_dtype", "moments_dtype"], FORMATS
    ),
    **dict.fromkeys(
        ["gpu", "devices", "mfu", "price", "gpu_hours", "max_days", "node_devices", "link_gbs", "network_gbs"], DEVICES
    ),
    **dict.fromkeys(
        [
            *("top", "pick", "write", "name", "plot", "save", "show", "export", "yaml", "families"),
            *("output", "json_", "output_file", "force", "quiet", "no_color"),
        ],
        OUTPUT,
    ),
}
"""The panel of an option by the name of its parameter; others stand in the first one, beside --help."""
