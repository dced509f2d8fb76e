"""Parameter lists of whatever model transformers knows, where it is installed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers

from fused_adamw.decoder_shapes import Shape


def shapes_of(config: Mapping[str, Any]) -> list[Shape]:
    """The shapes of the parameters that training updates, of a model that is built without memory.

    Args:
        config: as in a config.json of transformers, whose ``architectures`` names the model's
            class; without it the one that predicts the next token.

    Raises:
        ValueError: transformers does not know the model, or refuses the configuration.
    """
    name = next(iter(config.get("architectures") or ()), "")
    try:
        kind = getattr(transformers, str(name), None)
        if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
            kind = transformers.AutoModelForCausalLM.from_config
        described = transformers.AutoConfig.for_model(**config)
        with torch.device("meta"):
            model = kind(described)
    except Exception as error:  # of any of hundreds of models
        found = f"{type(error).__name__}: {error}".split()
        raise ValueError(f"transformers refuses it: {' '.join(found)[:300]}") from error
    # A number by itself is a tensor of one element to whoever shards it.
    return [tuple(param.shape) or (1,) for param in model.parameters() if param.requires_grad]
