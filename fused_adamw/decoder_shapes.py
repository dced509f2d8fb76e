"""Parameter lists of decoders (GPT-2, Llama and its relatives) from their configurations.

Shapes only, in the order in which the model's modules hold their parameters; no weights. Shared
parameters (an output layer tied to the embedding) stand once, as an optimizer sees them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

Shape = tuple[int, ...]


def gpt2(
    *,
    layers: int,
    width: int,
    vocabulary: int,
    context: int,
    hidden: int | None = None,
    tied: bool = True,
) -> list[Shape]:
    """GPT-2: learned positions, layer norms with biases.

    Args:
        layers: number of blocks.
        width: of the residual stream.
        vocabulary: number of tokens.
        context: number of positions.
        hidden: width of the MLP; by default four times `width`.
        tied: whether the output layer is the embedding.
    """
    hidden = 4 * width if hidden is None else hidden
    norm: list[Shape] = [(width,), (width,)]
    shapes: list[Shape] = [(vocabulary, width), (context, width)]
    for _ in range(layers):
        shapes += norm
        shapes += [(width, 3 * width), (3 * width,)]  # GPT-2 stores them inputs x outputs
        shapes += [(width, width), (width,)]
        shapes += norm
        shapes += [(width, hidden), (hidden,), (hidden, width), (width,)]
    shapes += norm
    return shapes if tied else [*shapes, (vocabulary, width)]


def llama(
    *,
    layers: int,
    width: int,
    hidden: int,
    key_value_width: int,
    vocabulary: int,
    tied: bool,
    query_width: int | None = None,
    biases: Collection[str] = (),
    head_norms: int = 0,
) -> list[Shape]:
    """Llama: grouped-query attention, gated MLP, RMS norms.

    Args:
        layers: number of blocks.
        width: of the residual stream.
        hidden: width of the MLP.
        key_value_width: of all keys, and of all values.
        vocabulary: number of tokens.
        tied: whether the output layer is the embedding.
        query_width: of all queries; by default `width`.
        biases: what has them: "inputs" and "output" of the attention, "mlp".
        head_norms: width of the norms of queries and keys, as in Qwen3; 0: none.
    """
    query_width = width if query_width is None else query_width

    def linear(kind: str, outputs: int, inputs: int) -> list[Shape]:
        return [(outputs, inputs), (outputs,)] if kind in biases else [(outputs, inputs)]

    shapes: list[Shape] = [(vocabulary, width)]
    for _ in range(layers):
        for outputs in (query_width, key_value_width, key_value_width):
            shapes += linear("inputs", outputs, width)
        shapes += linear("output", width, query_width)
        shapes += [(head_norms,), (head_norms,)] if head_norms else []
        shapes += linear("mlp", hidden, width) * 2 + linear("mlp", width, hidden)
        shapes += [(width,), (width,)]
    shapes.append((width,))
    return shapes if tied else [*shapes, (vocabulary, width)]


# By the published config.json of each: "meta-llama/Llama-3.2-1B", "meta-llama/Meta-Llama-3-8B",
# "meta-llama/Meta-Llama-3-70B", "meta-llama/Llama-3.1-405B", "openai-community/gpt2".
MODELS: Mapping[str, Mapping[str, Any]] = {
    "gpt2": {
        "model_type": "gpt2",
        "n_layer": 12,
        "n_embd": 768,
        "vocab_size": 50257,
        "n_positions": 1024,
    },
    "llama-3.2-1b": {
        "model_type": "llama",
        "num_hidden_layers": 16,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "llama-3-8b": {
        "model_type": "llama",
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
    "llama-3-70b": {
        "model_type": "llama",
        "num_hidden_layers": 80,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
    "llama-3-405b": {
        "model_type": "llama",
        "num_hidden_layers": 126,
        "hidden_size": 16384,
        "intermediate_size": 53248,
        "num_attention_heads": 128,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
}
"""Configurations by name, as far as shapes follow from them."""

MODEL_TYPES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
"""What `shapes_of` knows, as transformers calls it: the types, and the class of each."""


def is_known(config: Mapping[str, Any]) -> bool:
    """Whether a configuration is of a class of `MODEL_TYPES`, or does not say of which."""
    known, names = MODEL_TYPES.get(str(config.get("model_type"))), config.get("architectures")
    return known is not None and (not names or names == [known])


def shapes_of(config: Mapping[str, Any]) -> list[Shape]:
    """The shapes of a decoder's parameters.

    Args:
        config: as in a config.json of transformers.

    Raises:
        ValueError: a model that is not one of `MODEL_TYPES`, a number that is missing or is none,
            or cross-attention; it names the key.
    """

    def number(key: str, default: int | None = None) -> int:
        value = config.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{key}: found {value!r}, accepted: an integer >= 1")
        return value

    def flag(key: str, default: bool = False) -> bool:
        value = config.get(key, default)
        if not isinstance(value, bool):
            raise ValueError(f"{key}: found {value!r}, accepted: True or False")
        return value

    model_type = config.get("model_type")
    if not is_known(config):
        one = MODEL_TYPES.get(str(model_type))
        key, accepted = ("architectures", [one]) if one else ("model_type", ", ".join(MODEL_TYPES))
        raise ValueError(
            f"{key}: found {config.get(key)!r}, accepted: {accepted}; with transformers installed, "
            "all that it knows"
        )
    if model_type == "gpt2":
        if flag("add_cross_attention"):
            raise ValueError("add_cross_attention: found True, accepted: False")
        width = number("n_embd")
        return gpt2(
            layers=number("n_layer"),
            width=width,
            vocabulary=number("vocab_size"),
            context=number("n_positions"),
            hidden=number("n_inner", 4 * width),
            tied=flag("tie_word_embeddings", True),
        )
    width, heads = number("hidden_size"), number("num_attention_heads")
    normed = model_type == "qwen3"
    head = number("head_dim", None if normed else width // heads)
    biases = {"inputs"} if model_type == "qwen2" else set()
    if model_type in ("llama", "qwen3") and flag("attention_bias"):
        biases |= {"inputs", "output"}
    if model_type == "llama" and flag("mlp_bias"):
        biases.add("mlp")
    return llama(
        layers=number("num_hidden_layers"),
        width=width,
        hidden=number("intermediate_size"),
        key_value_width=head * number("num_key_value_heads", heads),
        vocabulary=number("vocab_size"),
        tied=flag("tie_word_embeddings"),
        query_width=head * heads,
        biases=biases,
        head_norms=head if normed else 0,
    )
