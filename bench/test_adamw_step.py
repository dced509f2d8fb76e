"""Steps under pytest-benchmark, a group for each case: ours, torch's, and the memory's limit.

pytest bench --benchmark-only
pytest bench --benchmark-only -k 1000x64 --benchmark-sort=fullname
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.cases import Case, cases_for, make_params
from bench.compare import LEAST_STREAM_BYTES
from bench.contenders import Contender, contenders
from bench.stream import streams

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = cases_for(DEVICE)
STREAMS = list(streams(0, DEVICE))


def run(benchmark: BenchmarkFixture, case: Case, call: Callable[[], object]) -> None:
    """Times a call that moves the bytes of a step of the case, with its work on a GPU done."""

    def finished() -> None:
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(3):
        finished()
    benchmark.group = case.name
    benchmark(finished)
    if benchmark.stats is not None:  # none under --benchmark-disable
        speed = case.step_bytes / benchmark.stats.stats.median / 1e9
        benchmark.extra_info.update(bytes_per_param=case.bytes_per_param, gb_per_s=speed)


@pytest.mark.parametrize("contender", contenders(DEVICE), ids=lambda contender: contender.name)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_step(benchmark: BenchmarkFixture, case: Case, contender: Contender) -> None:
    run(benchmark, case, contender.make(make_params(case, DEVICE)).step)


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.step_bytes >= LEAST_STREAM_BYTES],
    ids=lambda case: case.name,
)
def test_stream_of_as_many_bytes(benchmark: BenchmarkFixture, case: Case, stream: str) -> None:
    run(benchmark, case, streams(case.step_bytes, DEVICE)[stream])
