"""A small GPT over bytes, and the text it learns: what the example scripts share."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 256
"""A token is a byte, so any file is a text and no tokenizer is needed."""


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """Sizes of a GPT. `heads` divides `width`; `context` is in bytes."""

    context: int = 128
    layers: int = 4
    heads: int = 4
    width: int = 128

    def __post_init__(self) -> None:
        """Check the sizes.

        Raises:
            ValueError: A size is below 1, or `heads` does not divide `width`.
        """
        for name, size in dataclasses.asdict(self).items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, found {size}")
        if self.width % self.heads:
            raise ValueError(f"heads must divide width, found {self.heads} and {self.width}")


class Block(nn.Module):
    """Causal self-attention, then a two-layer perceptron, each on a normalised residual."""

    def __init__(self, config: GPTConfig) -> None:
        """Build the layers of one block."""
        super().__init__()
        self.heads = config.heads
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention_in = nn.Linear(config.width, 3 * config.width)
        self.attention_out = nn.Linear(config.width, config.width)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.mlp_in = nn.Linear(config.width, 4 * config.width)
        self.mlp_out = nn.Linear(4 * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """Map float [batch, time, width] to the same shape."""
        heads = self.attention_in(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each [batch, heads, time, width/heads]
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).flatten(2))
        hidden = F.gelu(self.mlp_in(self.mlp_norm(x)), approximate="tanh")
        return x + self.mlp_out(hidden)  # type: ignore[no-any-return]


class GPT(nn.Module):
    """Decoder-only transformer of the GPT-2 shape: pre-norm, learned positions."""

    def __init__(self, config: GPTConfig) -> None:
        """Build the layers and draw the weights from torch's global generator."""
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(VOCABULARY, config.width)
        self.position_embedding = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, VOCABULARY, bias=False)
        for name, param in self.named_parameters():
            if param.ndim == 2:
                # Layers that add to the residual stream start smaller, so that depth does not
                # widen it.
                depth = 2 * config.layers if name.endswith("_out.weight") else 1
                nn.init.normal_(param, std=1 / math.sqrt(depth * config.width))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map int64 [batch, time] to the next byte's logits, float [batch, time, 256]."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token_embedding(tokens) + self.position_embedding(positions)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


def load_text(file: Path | None = None) -> Tensor:
    """Read a text as uint8 [bytes]; without a file, Python's own reference topics, in English."""
    if file is None:
        text = "\n\n".join(topics[name] for name in sorted(topics)).encode()
    else:
        text = file.read_bytes()
    return torch.from_numpy(np.array(bytearray(text), np.uint8))


def split_text(text: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """Split a text into its first 90%, for training, and its last 10%, for validation.

    Raises:
        ValueError: One of the two is too short for a window of `context` bytes and its next byte.
    """
    held_out = len(text) // 10
    if held_out <= context:
        raise ValueError(
            f"the text is too short: it has {len(text)} bytes, "
            f"and a context of {context} needs at least {10 * (context + 1)}"
        )
    return text[:-held_out], text[-held_out:]


def random_windows(
    text: Tensor, count: int, context: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw windows of a text, as inputs and what a model is to predict from them.

    Args:
        text: uint8 [bytes], on any device.
        count: How many windows.
        context: Length of a window in bytes.
        generator: What draws them; on the CPU, so that every device trains on the same.

    Returns:
        The windows, and the same moved on by one byte; each int64 [count, context].
    """
    starts = torch.randint(len(text) - context, (count,), generator=generator)
    return _cut(text, starts, context)


def even_windows(text: Tensor, count: int, context: int) -> tuple[Tensor, Tensor]:
    """Cut windows at even distances from the first byte of a text to its last; else as above."""
    starts = torch.linspace(0, len(text) - context - 1, count).long()
    return _cut(text, starts, context)


def _cut(text: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    positions = starts[:, None] + torch.arange(context + 1)
    windows = text[positions.to(text.device)].long()
    return windows[:, :-1], windows[:, 1:]
