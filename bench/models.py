"""Parameter lists of real models: the shapes that their published configurations give.

Shapes only, in the order in which the model's modules hold their parameters; no weights. Shared
parameters (an output layer tied to the embedding) stand once, as an optimizer sees them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

from fused_adamw.decoder_shapes import MODELS as DECODERS
from fused_adamw.decoder_shapes import Shape, shapes_of


@dataclass(frozen=True)
class Model:
    """A model by name.

    Attributes:
        shapes: its parameter list.
        source: the configuration that it is written from.
        large: only measured when it is asked for.
    """

    shapes: Callable[[], list[Shape]]
    source: str
    large: bool = False


def _linear(inputs: int, outputs: int) -> list[Shape]:
    """Weight and bias."""
    return [(outputs, inputs), (outputs,)]


def resnet(*, blocks: tuple[int, ...], classes: int) -> list[Shape]:
    """ResNet with bottleneck blocks: convolutions without biases, each with a batch norm."""

    def convolution(inputs: int, outputs: int, kernel: int) -> list[Shape]:
        return [(outputs, inputs, kernel, kernel), (outputs,), (outputs,)]

    shapes = convolution(3, 64, 7)
    inputs = 64
    for stage, count in enumerate(blocks):
        width = 64 << stage
        for block in range(count):
            shapes += convolution(inputs, width, 1)
            shapes += convolution(width, width, 3)
            shapes += convolution(width, 4 * width, 1)
            if block == 0:  # the shortcut changes the number of channels
                shapes += convolution(inputs, 4 * width, 1)
            inputs = 4 * width
    return shapes + _linear(inputs, classes)


def vit(
    *, layers: int, width: int, hidden: int, patch: int, image: int, classes: int
) -> list[Shape]:
    """Vision transformer: class token, learned positions, biases everywhere."""
    norm: list[Shape] = [(width,), (width,)]
    tokens = (image // patch) ** 2 + 1
    shapes: list[Shape] = [(1, 1, width), (width, 3, patch, patch), (width,), (1, tokens, width)]
    for _ in range(layers):
        shapes += norm
        shapes += _linear(width, 3 * width) + _linear(width, width)
        shapes += norm
        shapes += _linear(width, hidden) + _linear(hidden, width)
    return shapes + norm + _linear(width, classes)


def mixture_of_experts(
    *,
    layers: int,
    width: int,
    experts: int,
    hidden: int,
    query_width: int,
    key_value_width: int,
    head: int,
    vocabulary: int,
) -> Iterator[Shape]:
    """Qwen3-MoE: every layer's MLP is a router and many small gated experts; untied output."""
    yield (vocabulary, width)
    for _ in range(layers):
        yield from ((query_width, width), (key_value_width, width), (key_value_width, width))
        yield from ((width, query_width), (head,), (head,))
        yield (experts, width)
        for _ in range(experts):
            yield from ((hidden, width), (hidden, width), (width, hidden))
        yield from ((width,), (width,))
    yield (width,)
    yield (vocabulary, width)


def qwen3_30b_a3b(narrower: int = 1) -> Iterator[Shape]:
    """Qwen3-30B-A3B, with every width but the number of experts divided by `narrower`."""
    return mixture_of_experts(
        layers=48,
        width=2048 // narrower,
        experts=128,
        hidden=768 // narrower,
        query_width=32 * 128 // narrower,
        key_value_width=4 * 128 // narrower,
        head=128 // narrower,
        vocabulary=151936 // narrower,
    )


def _decoder(name: str, large: bool = False) -> Model:
    """One whose configuration the package has."""
    return Model(lambda: shapes_of(DECODERS[name]), "fused_adamw.decoder_shapes", large)


MODELS = {
    "gpt2": _decoder("gpt2"),
    "llama-3.2-1b": _decoder("llama-3.2-1b"),
    "llama-3-8b": _decoder("llama-3-8b", large=True),
    "resnet50": Model(
        lambda: resnet(blocks=(3, 4, 6, 3), classes=1000),
        "He et al., arXiv 1512.03385, table 1, 50 layers, as torchvision's resnet50",
    ),
    "vit-l-16": Model(
        lambda: vit(layers=24, width=1024, hidden=4096, patch=16, image=224, classes=1000),
        "Dosovitskiy et al., arXiv 2010.11929, table 1, ViT-Large, as torchvision's vit_l_16",
    ),
    "moe-10000": Model(
        lambda: list(islice(qwen3_30b_a3b(narrower=16), 10_000)),
        "Qwen/Qwen3-30B-A3B, config.json: num_hidden_layers 48, num_experts 128, hidden_size 2048, "
        "moe_intermediate_size 768; every width divided by 16, and the first 10,000 tensors",
    ),
}


def elements(shapes: list[Shape]) -> int:
    """Parameters in the sense of a model's size."""
    return sum(map(math.prod, shapes))
