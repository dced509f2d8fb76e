"""``python -m fused_adamw plan`` against optimizers that are really there."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import on_ranks
import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

from fused_adamw import FusedAdamW, FusedLion, plan
from fused_adamw.__main__ import main
from fused_adamw.precision import PRECISIONS

SMALL: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 72,  # 72 in a row: blocks fit some shards only
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 200,
}
NUMBERS = {"llama-3-8b": 8_030_261_248, "llama-3-70b": 70_553_706_496}
GPT2 = {"model_type": "gpt2", "n_layer": 12, "n_embd": 768, "n_positions": 1024}


@pytest.mark.parametrize("name", NUMBERS)
def test_models_have_their_published_numbers_of_parameters(name: str) -> None:
    assert sum(map(math.prod, plan.shapes_of(plan.MODELS[name]))) == NUMBERS[name]


def test_gpt2_from_its_configuration() -> None:
    shapes = plan.shapes_of({**GPT2, "vocab_size": 50257})
    assert sum(map(math.prod, shapes)) == 124_439_808


def held(rank: int, world_size: int) -> list[Any]:
    """Of each precision what FSDP's shards of rank 0 take, in the report and in memory."""
    mesh = init_device_mesh("cpu", (world_size,))
    found = []
    for precision in PRECISIONS:
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        params = [
            nn.Parameter(distribute_tensor(torch.ones(shape, dtype=dtype), mesh, [Shard(0)]))
            for shape in plan.shapes_of(SMALL)
        ]
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer = FusedAdamW(params, precision=precision, ema_decay=0.9)
        optimizer.step()
        report = optimizer.memory_report()
        arrays = [*params, *(param.grad for param in params)]
        arrays += [x for p in params for x in optimizer.state[p].values() if x.dim()]
        size = sum(x.to_local().numel() * x.element_size() for x in arrays)
        found.append((report.held, report.moved, size))
    return found


@on_ranks.needs_gloo
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_plan_is_what_the_first_rank_takes(ranks: int) -> None:
    (first, *_) = on_ranks.run(held, ranks, ranks)
    for precision, (report, moved, size) in zip(PRECISIONS, first, strict=True):
        found = plan.planned(plan.shapes_of(SMALL), ranks, precision, 2, averaged=True)
        assert found.held == report
        assert (found.moved, found.total) == (moved, size)


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(SMALL))
    arguments = ["plan", "--config", str(file), "--gpus", "2", "--bandwidth", "1"]
    assert main([*arguments, "--precision", "fp32", "split"]) == 0
    head, names, *rows = capsys.readouterr().out.splitlines()
    numel = sum(map(math.prod, plan.shapes_of(SMALL)))
    assert head == f"{numel / 1e9:.2f}e9 parameters over 2 GPUs; of each, GB:"
    assert names.split() == ["fp32", "split"]
    split = plan.planned(plan.shapes_of(SMALL), 2, "split", 2)
    assert rows[-1].split()[-1] == f"{split.moved / 1e6:.2f}"  # ms at 1 GB/s


def test_fewer_states_and_a_number_of_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--params", "6.4e9", "--precision", "fp32", "--bandwidth", "1000"]
    assert main([*command, "--optimizer", "lion", "--ema"]) == 0
    rows = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines()[2:])
    param = nn.Parameter(torch.ones(64))
    report = FusedLion([param], ema_decay=0.9).memory_report()
    assert float(rows["total"]) == pytest.approx(6.4 * report.total / 64)
    assert float(rows["moved by a step"]) == pytest.approx(6.4 * report.moved / 64)


def test_bandwidth_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--params", "1e6"]) == 0
    *_, times, note = capsys.readouterr().out.splitlines()
    assert float(times.split()[2]) > 0
    assert note == "The bandwidth is that of a copy on this machine."


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--params", "0"], "--params: found 0.0, accepted: a number >= 1"),
        (["--params", "1e6", "--gpus", "0"], "--gpus: found 0, accepted: a number >= 1"),
        (["--params", "1e6", "--bandwidth", "-1"], "--bandwidth: found -1.0, accepted"),
        (["--config", "{folder}/none.json"], "No such file"),
        (["--config", "{folder}/list.json"], "--config: found list, accepted: an object"),
        (["--config", "{folder}/bert.json"], "--config: found model_type 'bert', accepted: llama"),
        (["--config", "{folder}/short.json"], "--config: found vocab_size None, accepted"),
    ],
)
def test_what_cannot_be_planned(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "bert.json").write_text('{"model_type": "bert"}')
    (tmp_path / "short.json").write_text(json.dumps({**SMALL, "vocab_size": None}))
    command = [item.format(folder=tmp_path) for item in arguments]
    assert main(["plan", *command]) == 2
    assert message in capsys.readouterr().out
