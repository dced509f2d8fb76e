"""Steps under pytest-benchmark, a group for each case: ours, torch's, and the memory's limit.

pytest bench --benchmark-only
pytest bench --benchmark-only -k 1000x64 --benchmark-sort=fullname
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.cases import LISTS, Case, make_params
from bench.contenders import Contender, our_engines, ours
from bench.memory import copies, stream_bytes
from bench.peers import PEERS
from bench.rules import RULES, Rule
from bench.stream import streams
from bench.timing import in_turns

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = [case for case in LISTS if DEVICE.type in case.devices]
STEPS = [
    pytest.param(rule, contender, id=f"{rule.name}-{contender.name}")
    for rule in RULES.values()
    for contender in (
        *ours(rule, our_engines(DEVICE)),
        *(
            PEERS[name].contender(rule)
            for name in ("torch-fused", "torch-foreach")
            if PEERS[name].has(rule)
        ),
    )
]
LIMITS = [
    pytest.param(case, rule, name, id=f"{case.name}-{rule.name}-{name}")
    for case in CASES
    for rule in RULES.values()
    if stream_bytes(case, rule, DEVICE)
    for name in streams(0, DEVICE)
]


def run(
    benchmark: BenchmarkFixture, group: str, step_bytes: float, call: Callable[[], object]
) -> None:
    """Times a call that moves so many bytes, with its work on a GPU done."""

    def finished() -> None:
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(3):
        finished()
    benchmark.group = group
    benchmark(finished)
    if benchmark.stats is not None:  # none under --benchmark-disable
        benchmark.extra_info["gb_per_s"] = step_bytes / benchmark.stats.stats.median / 1e9


@pytest.mark.parametrize(("rule", "contender"), STEPS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_step(benchmark: BenchmarkFixture, case: Case, rule: Rule, contender: Contender) -> None:
    lists = [make_params(case, DEVICE, seed) for seed in range(copies(case, rule, DEVICE))]
    step = in_turns([contender.start(params).step for params in lists])
    step_bytes = case.elements * rule.bytes_per_param(case.dtype)
    run(benchmark, f"{rule.name} {case.name}", step_bytes, step)


@pytest.mark.parametrize(("case", "rule", "name"), LIMITS)
def test_limit(benchmark: BenchmarkFixture, case: Case, rule: Rule, name: str) -> None:
    moved = stream_bytes(case, rule, DEVICE)
    call = streams(moved, DEVICE, copies(case, rule, DEVICE))[name]
    run(benchmark, f"{rule.name} {case.name}", moved, call)
