"""Parameter lists of whatever model transformers knows, where it is installed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from textwrap import shorten
from typing import Any

import torch
import transformers

from fused_adamw.decoder_shapes import Shape

_LONGEST = 400  # characters of a message


def shapes_of(config: Mapping[str, Any]) -> list[Shape]:
    """The shapes of the parameters that training updates, of a model that is built without memory.

    No code is run but that of transformers.

    Args:
        config: as in a config.json of transformers, whose ``architectures`` names the model's
            class; without it the one that predicts the next token.

    Raises:
        ValueError: transformers does not know the model, or refuses the configuration; or nothing
            of the model is trained.
    """
    build = _builder(config.get("architectures"))
    log: Any = transformers.logging
    verbosity = log.get_verbosity()
    log.set_verbosity_error()
    described = None
    try:
        described = transformers.AutoConfig.for_model(**config)
        with torch.device("meta"):
            model = build(described)
    except Exception as error:  # of any of hundreds of models
        text = shorten(f"{type(error).__name__}: {error}", _LONGEST, placeholder=" ...")
        is_unnamed = described is not None and not config.get("architectures")
        hint = "; architectures may name the model's class" * is_unnamed
        raise ValueError(f"transformers refuses it: {text}{hint}") from error
    finally:
        log.set_verbosity(verbosity)
    # A number by itself is a tensor of one element to whoever shards it.
    shapes = [tuple(param.shape) or (1,) for param in model.parameters() if param.requires_grad]
    if not shapes:
        raise ValueError(f"found no parameters in {type(model).__name__}, accepted: a model")
    return shapes


def _builder(architectures: Any) -> Callable[[Any], torch.nn.Module]:
    """What makes a model of its configuration."""
    if not architectures:  # a file may name code of its own for this one
        return partial(transformers.AutoModelForCausalLM.from_config, trust_remote_code=False)
    name = architectures[0] if isinstance(architectures, list) else None
    kind = getattr(transformers, name, None) if isinstance(name, str) else None
    if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
        return kind
    raise ValueError(
        f"architectures: found {architectures!r}, accepted: a list whose first is the name of a "
        "model's class in transformers"
    )
