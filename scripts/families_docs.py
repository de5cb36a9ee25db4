"""Write docs/families.md: every model_type of a config.json that is known, made from the readers' tables.

python scripts/families_docs.py
"""

from __future__ import annotations

import textwrap
from pathlib import Path

from powerplan.huggingface.listing import keys_that_matter, listed_families

TARGET = Path(__file__).parent.parent / "docs" / "families.md"

HEAD = """# Families of config.json

Which files are read, by their `model_type`. This page is made by `python scripts/families_docs.py` from the tables of
`powerplan/huggingface/`; `powerplan models --families` prints the same. How keys are treated: [spec.md](spec.md).
"""


def families_page() -> str:
    """Return the page in markdown."""
    rows = listed_families()
    read = [row.model_type for row in rows if row.status == "read"]
    wrapped = [row for row in rows if row.status == "wrapper"]
    refused = [row for row in rows if row.status == "refused"]
    lines = [HEAD, f"## Read ({len(read)})\n", "Each with the keys that its reader looks up in a config of its class's"]
    lines += ["defaults in transformers. Other keys are inert, refused by name or remarked on.\n"]
    for name in read:
        keys = (
            ", ".join(f"`{key}`" for key in keys_that_matter(name)) or "not in transformers: the keys of its own code"
        )
        lines.append(textwrap.fill(f"- **{name}**: {keys}", 120, subsequent_indent="  ", break_on_hyphens=False))
    lines += [
        f"\n## Wrappers ({len(wrapped)})\n",
        "The text decoder is read, of the family in brackets where its config names none; where that is `any`,",
        "the file must name it, or its version does. Its config is `text_config`, or `llm_config`, `language_config`,",
        "`decoder_config` or `thinker_config`, or its keys are at the top. Other towers and projectors are not",
        "counted, and a note says so.\n",
    ]
    text = ", ".join(f"{row.model_type} ({row.detail})" for row in wrapped)
    lines.append(textwrap.fill(text, 120, break_on_hyphens=False))
    lines += [f"\n## Refused ({len(refused)})\n"]
    lines += [textwrap.fill(f"- **{row.model_type}**: {row.detail}", 120, subsequent_indent="  ") for row in refused]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    TARGET.write_text(families_page(), encoding="utf-8")
