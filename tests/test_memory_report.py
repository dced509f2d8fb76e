"""The report of memory: bytes by kind and bytes moved, without allocating any of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fused_adamw.memory_report import KINDS, PlannedTensor, memory_report
from fused_adamw.precision import (
    BLOCK,
    LEAST_CODED,
    PRECISIONS,
    Layout,
    beside_of,
    encode_state,
    layout_of,
)

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
LARGE = 64 * LEAST_CODED  # a whole number of blocks
SCALES = 2 * 4 / BLOCK  # of two states, held; moved twice


@pytest.mark.parametrize(
    ("dtype", "precision", "options", "held", "moved"),
    [
        (F32, "fp32", {}, 4 + 4 + 8, 28),
        (BF16, "bf16", {}, 2 + 2 + 4, 14),
        (BF16, "bf16", {"stochastic_rounding": True}, 2 + 2 + 4, 14),
        (BF16, "bf16", {"state_dtype": F32}, 2 + 2 + 8, 22),
        (F16, None, {}, 2 + 2 + 4, 14),
        (BF16, "master", {}, 2 + 2 + 4 + 8, 28),
        (F16, "master", {}, 2 + 2 + 4 + 8, 28),
        (BF16, "split", {}, 2 + 2 + 2 + 8, 26),
        (BF16, "split", {"state_dtype": BF16}, 2 + 2 + 2 + 4, 18),
        (BF16, "kahan", {}, 2 + 2 + 2 + 4, 18),
        (BF16, "8bit", {}, 2 + 2 + 1 + 2 + SCALES, 12 + 2 * SCALES),
        (BF16, "8bit", {"remainder_bits": 16}, 2 + 2 + 2 + 2 + SCALES, 14 + 2 * SCALES),
        (F32, "8bit", {}, 4 + 4 + 2 + SCALES, 16 + 2 * SCALES),
    ],
)
def test_bytes_a_parameter_of_adamw(
    dtype: torch.dtype, precision: str | None, options: dict, held: float, moved: float
) -> None:
    layout = layout_of(dtype, LARGE, precision, **options)
    report = memory_report([PlannedTensor(LARGE, dtype, layout, states=2)])
    assert report.per_parameter(report.total) == held
    assert report.per_parameter(report.moved) == moved
    averaged = memory_report([PlannedTensor(LARGE, dtype, layout, states=2, averaged=True)])
    assert averaged.per_parameter(averaged.total) == held + 4
    assert averaged.per_parameter(averaged.moved) == moved + 8


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("numel", [0, 1, LEAST_CODED - 1, LEAST_CODED, LEAST_CODED + 1])
def test_bytes_are_those_of_the_arrays(precision: str, numel: int) -> None:
    param = torch.zeros(numel, dtype=F32 if precision == "fp32" else BF16)
    layout = layout_of(param.dtype, numel, precision)
    x = param.float()
    stored, beside = beside_of(x, layout, param)
    state_dtype = layout.state_dtype
    states = [encode_state(x, "signed") if state_dtype is None else (x.to(state_dtype),)] * 2
    expected = {
        "parameters": stored.nbytes,
        "gradients": stored.nbytes,
        "states": sum(state[0].nbytes for state in states),
        "scales": sum(scale.nbytes for state in states for scale in state[1:]),
        "averages": x.nbytes,
    }
    kinds = {"param_master": "masters", "param_remainder": "remainders"}
    if beside is not None:
        expected[kinds.get(layout.beside_key, "compensations")] = beside.nbytes
    report = memory_report([(numel, param.dtype, layout, 2, True)])
    assert {kind: expected.get(kind, 0) for kind in KINDS} == report.held
    assert report.total == sum(expected.values())


def planned(model: nn.Module, precision: str) -> list[PlannedTensor]:
    return [
        PlannedTensor(p.numel(), p.dtype, layout_of(p.dtype, p.numel(), precision), 2)
        for p in model.parameters()
    ]


def test_a_model_without_memory() -> None:
    """64 GiB of parameters, which nobody has to have, and a norm layer in float32."""
    model = nn.Sequential(
        nn.Linear(2**17, 2**18, bias=False, device="meta", dtype=BF16),
        nn.LayerNorm(2**13, device="meta", dtype=F32),
        nn.Linear(32, 32, device="meta", dtype=BF16),
    )
    report = memory_report(planned(model, "8bit"))
    large, small, norm = 2**35, 32 * 32 + 32, 2 * 2**13
    assert report.numel == large + small + norm
    assert report.layouts == {
        Layout("8bit", "remainder8", None, False): (1, large),
        Layout("8bit", "", None, False): (2, norm),
        Layout("split", "remainder16", F32, False): (2, small),
    }
    assert report.held == {
        "parameters": 2 * large + 2 * small + 4 * norm,
        "gradients": 2 * large + 2 * small + 4 * norm,
        "states": 2 * large + 8 * small + 2 * norm,
        "scales": 2 * 4 * (large + norm) // BLOCK,
        "masters": 0,
        "remainders": large + 2 * small,
        "compensations": 0,
        "averages": 0,
    }


def test_table() -> None:
    report = memory_report(
        [
            (3 * 2**20, BF16, layout_of(BF16, 3 * 2**20, "split"), 2, True),
            (100, F32, layout_of(F32, 100, "split"), 2, True),
        ]
    )
    lines = str(report).splitlines()
    assert len({len(line) for line in lines[:-2]}) == 1  # columns
    assert [line.split()[:4] for line in lines[1:-3]] == [
        ["parameters", "6,291,856", "6.0", "MiB"],
        ["gradients", "6,291,856", "6.0", "MiB"],
        ["states", "25,166,624", "24.0", "MiB"],
        ["remainders", "6,291,456", "6.0", "MiB"],
        ["averages", "12,583,312", "12.0", "MiB"],
        ["total", "56,625,104", "54.0", "MiB"],
    ]
    assert lines[-3].startswith("moved by a step")
    assert lines[-2:] == [
        "split: float32 states, 16-bit remainder: 1 tensor, 3,145,728 parameters",
        "fp32: float32 states: 1 tensor, 100 parameters",
    ]


@pytest.mark.parametrize(
    ("numel", "words"),
    [(100, "400 B"), (2**8, "1.0 KiB"), (3 * 2**27, "1.5 GiB"), (2**40, "4.0 TiB")],
)
def test_units(numel: int, words: str) -> None:
    table = str(memory_report([(numel, F32, layout_of(F32, numel, None), 0, False)]))
    assert words in table.splitlines()[1]


def test_nothing() -> None:
    report = memory_report([])
    assert report.total == report.moved == report.per_parameter(0) == 0
    assert "total" in str(report)
