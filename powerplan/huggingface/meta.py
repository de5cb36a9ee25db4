"""What transformers would build of a config.json, without weights: a check of a file that is read like another family.

transformers and torch are imported inside the function. No code of the model's folder runs.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from powerplan.accounting import Accounting
from powerplan.documents import Document
from powerplan.spec import ModelSpec


def meta_note(document: Document, spec: ModelSpec) -> tuple[str, ...]:
    """Return a remark on whether the model that transformers builds of a config has as many parameters as `spec`."""
    counted = Accounting(spec).total_parameters.with_embeddings
    family = document.data.get("model_type")
    try:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        return ("not checked: with transformers and torch installed, the parameters are compared with its model",)
    try:
        with _unspoken(), torch.device("meta"):
            config = AutoConfig.for_model(**{"model_type": family} | document.data)
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)  # type: ignore[no-untyped-call]
    except Exception as error:  # Whatever its classes raise for a config that they do not know.
        return (f"not checked: transformers does not build a {family} of this file ({type(error).__name__})",)
    built = sum(weight.numel() for weight in model.parameters())
    if built == counted:
        return (f"transformers builds a {family} of as many parameters, {built:,}",)
    return (f"transformers builds a {family} of {built:,} parameters, and {counted:,} are counted here",)


@contextmanager
def _unspoken() -> Iterator[None]:
    """Keep back what transformers logs and warns of: remarks on token ids and the like, not about the count."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
