"""How lists are cut into launches and ranges, also of sizes that no machine could allocate."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import ADAM, BF16, F32, Parameter, Problem, State

from fused_adamw import _C, FusedAdamW

CHUNK = _C.CHUNK
GRID = 2**31 - 1  # most blocks in x that CUDA launches
ALIGNMENT = 64  # elements; inner cuts of ranges fall on multiples

Launch = dict[str, list[int]]

# --- Launches of the CUDA engine -----------------------------------------------------------------


def chunks_of(numel: int, chunk: int) -> int:
    return -(-numel // chunk)


def plan(
    numels: list[int],
    rows: list[int] | None = None,
    tensors: int = 10**6,
    max_rows: int = 10**6,
    chunk: int = CHUNK,
    blocks: int = GRID,
) -> list[Launch]:
    """The plan, checked: every chunk of every tensor once, with its row, within the limits."""
    rows = [0] * len(numels) if rows is None else rows
    launches = _C.plan_launches(numels, rows, tensors, max_rows, chunk, blocks)
    planned = [i for launch in launches for i in launch["tensors"]]
    assert planned == [i for i, numel in enumerate(numels) if numel], "each once, in order"
    for launch in launches:
        members, first = launch["tensors"], launch["first_chunk"]
        assert 1 <= len(members) <= tensors
        assert 1 <= len(launch["rows"]) <= max_rows
        assert len(set(launch["rows"])) == len(launch["rows"])
        assert [launch["rows"][place] for place in launch["row_of"]] == [rows[i] for i in members]
        assert first[0] == 0
        assert first[-1] <= blocks
        counts = [end - begin for begin, end in pairwise(first)]
        assert counts == [chunks_of(numels[i], chunk) for i in members]
    return launches


@st.composite
def lists_and_limits(draw: st.DrawFn) -> dict[str, Any]:
    chunk = draw(st.sampled_from([1, 3, 16, CHUNK]))
    blocks = draw(st.integers(1, 40))
    numel = st.integers(0, min(4, blocks) * chunk) | st.integers(0, blocks * chunk)
    numels = draw(st.lists(numel, max_size=40))
    count = len(numels)
    return {
        "numels": numels,
        "rows": draw(st.lists(st.integers(0, 9), min_size=count, max_size=count)),
        "tensors": draw(st.integers(1, 12)),
        "max_rows": draw(st.integers(1, 6)),
        "chunk": chunk,
        "blocks": blocks,
    }


@settings(deadline=None, max_examples=300)
@given(lists_and_limits())
def test_launches_cover_everything_and_are_full(case: dict[str, Any]) -> None:
    launches = plan(**case)
    for launch, following in pairwise(launches):
        tensor = following["tensors"][0]
        row = case["rows"][tensor]
        blocks = launch["first_chunk"][-1] + chunks_of(case["numels"][tensor], case["chunk"])
        assert (
            len(launch["tensors"]) == case["tensors"]
            or (row not in launch["rows"] and len(launch["rows"]) == case["max_rows"])
            or blocks > case["blocks"]
        ), "the next launch's first tensor would have fitted"


def test_each_limit_closes_a_launch() -> None:
    def sizes(launches: list[Launch]) -> list[int]:
        return [len(launch["tensors"]) for launch in launches]

    assert sizes(plan([1] * 10, tensors=4)) == [4, 4, 2]
    assert sizes(plan([1] * 8, tensors=4)) == [4, 4]
    assert sizes(plan([1] * 6, rows=[0, 1, 1, 2, 0, 1], max_rows=2)) == [3, 2, 1]
    assert sizes(plan([1] * 6, rows=[0, 1, 0, 1, 0, 2], max_rows=2)) == [5, 1]
    assert sizes(plan([10, 10, 1, 19, 20], chunk=10, blocks=3)) == [3, 1, 1]
    assert sizes(plan([10, 10, 11], chunk=10, blocks=4)) == [3]


def test_rows_are_numbered_anew_in_each_launch() -> None:
    first, second = plan([1] * 4, rows=[7, 5, 5, 9], tensors=2)
    assert (first["rows"], first["row_of"]) == ([7, 5], [0, 1])
    assert (second["rows"], second["row_of"]) == ([5, 9], [0, 1])


def test_empty_tensors_are_skipped() -> None:
    assert plan([]) == []
    assert plan([0, 0]) == []
    (launch,) = plan([0, 5, 0, CHUNK + 1, 0], rows=[4, 3, 2, 1, 0])
    assert launch == {
        "tensors": [1, 3],
        "rows": [3, 1],
        "row_of": [0, 1],
        "first_chunk": [0, 1, 3],
    }


@pytest.mark.parametrize(
    "numel", [2**31 - 1, 2**31, 2**31 + 1, 2**32, 2**32 + 1, 10**12, 2**44 + 5]
)
def test_launches_of_huge_tensors(numel: int) -> None:
    (launch,) = plan([7, numel, 7])
    assert launch["first_chunk"] == [
        *(0, 1, 1 + chunks_of(numel, CHUNK), 2 + chunks_of(numel, CHUNK))
    ]


def test_the_largest_tensor_fills_a_grid() -> None:
    largest = GRID * CHUNK
    alone, rest = plan([largest, 1])
    assert (alone["tensors"], rest["tensors"]) == ([0], [1])
    half = GRID // 2 * CHUNK
    assert [launch["tensors"] for launch in plan([half, half, CHUNK, 1])] == [[0, 1, 2], [3]]
    for numel in (largest + 1, 2**62, 2**63 - 1):
        with pytest.raises(ValueError, match="more blocks than a grid has"):
            plan([1, numel])


def count_launches(parameters: list[Parameter], amsgrad: bool) -> int:
    groups = [group for group in ADAM.groups() if group["amsgrad"] == amsgrad]
    state = State(Problem(ADAM, groups, parameters))
    state.gather()
    return sum(_C.count_cuda_launches(bucket) for bucket in state.registered.native.buckets())


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize(("tensors", "most"), [(0, 0), (1, 1), (1000, 2), (10_000, 20)])
def test_launches_of_long_lists(tensors: int, most: int, amsgrad: bool) -> None:
    assert count_launches([Parameter(1)] * tensors, amsgrad) in range(most and 1, most + 1)


def test_launches_of_lists_with_many_steps_or_dtypes() -> None:
    """More step counts take more rows of coefficients; another dtype takes another launch."""
    same = [Parameter(1, step=i % 100) for i in range(500)]
    assert count_launches(same, amsgrad=False) == 1
    assert count_launches([Parameter(1, step=i) for i in range(500)], amsgrad=False) <= 5
    both = [Parameter(1, dtypes) for dtypes in ((F32, F32, F32), (BF16, BF16, BF16))]
    assert count_launches(both * 20, amsgrad=False) == 2
    assert count_launches([Parameter(0)] * 20, amsgrad=False) == 0


def test_launches_of_many_param_groups() -> None:
    """Groups of equal values share a row: 465 cost what one costs."""
    first = ADAM.groups()[0]
    parameters = [Parameter(1, group=group) for group in range(465)]
    for groups, most in (
        ([first] * 465, 1),
        ([{**first, "weight_decay": 0.1 * (group % 2)} for group in range(465)], 1),
        ([{**first, "lr": 0.1 + group} for group in range(465)], 5),
    ):
        state = State(Problem(ADAM, groups, parameters))
        state.gather()
        buckets = state.registered.native.buckets()
        assert sum(_C.count_cuda_launches(bucket) for bucket in buckets) == most


def test_launches_of_a_whole_step() -> None:
    """What a step does beside its rule takes room, but not of 465 parameters."""
    params = [torch.zeros(1, requires_grad=True) for _ in range(465)]
    for param in params:
        param.grad = torch.ones(1)
    optimizer = FusedAdamW(params, ema_decay=0.9, zero_grads=True)
    optimizer.step()
    assert optimizer._registered is not None
    buckets = optimizer._registered.native.buckets()
    assert [_C.count_cuda_launches(bucket) for bucket in buckets] == [1]


# --- Ranges of the CPU engine --------------------------------------------------------------------


def ranges_of(numels: list[int], target: int) -> dict[int, list[tuple[int, int, int]]]:
    """The ranges, checked: every element once, equal parts but for rounding to the alignment."""
    ranges = defaultdict(list)
    covered = [0] * len(numels)
    last = -1
    for index, tensor, begin, end in _C.plan_ranges(numels, target):
        assert index >= last, "in order"
        last = index
        assert begin == covered[tensor], "neither gap nor overlap"
        assert begin < end
        assert begin % ALIGNMENT == 0
        assert end % ALIGNMENT == 0 or end == numels[tensor]
        covered[tensor] = end
        ranges[index].append((tensor, begin, end))
    assert covered == numels
    assert last < chunks_of(sum(numels), max(target, 1))
    for index in range(last + 1):
        tensors = [tensor for tensor, _, _ in ranges.get(index, [])]
        assert tensors == sorted(set(tensors)), "one piece of a tensor in a range"
        share = sum(end - begin for _, begin, end in ranges.get(index, []))
        assert share < max(target, 1) + ALIGNMENT
        assert share > target - ALIGNMENT or index == last
    return ranges


@settings(deadline=None, max_examples=300)
@given(st.lists(st.integers(0, 300), max_size=30), st.integers(-1, 500) | st.just(8192))
def test_ranges_cover_everything(numels: list[int], target: int) -> None:
    ranges_of(numels, target)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 2**45), max_size=6), st.integers(2**40, 2**62))
def test_ranges_of_huge_tensors(numels: list[int], target: int) -> None:
    ranges_of(numels, target)


def test_ranges_cut_where_they_should() -> None:
    assert ranges_of([], 100) == {}
    assert ranges_of([0, 0], 100) == {}
    assert ranges_of([1000], 256) == {
        0: [(0, 0, 256)],
        1: [(0, 256, 512)],
        2: [(0, 512, 768)],
        3: [(0, 768, 1000)],
    }
    # The cuts at 200 and 400 of all fall into tensors 1 and 2 after 100 elements, on 64 of them.
    assert ranges_of([100, 0, 200, 200], 200) == {
        0: [(0, 0, 100), (2, 0, 64)],
        1: [(2, 64, 200), (3, 0, 64)],
        2: [(3, 64, 200)],
    }
    # A tensor that would be cut before its first 64 elements is not.
    assert ranges_of([50, 60], 64) == {0: [(0, 0, 50)], 1: [(1, 0, 60)]}


@pytest.mark.parametrize("numel", [2**31 - 1, 2**31 + 1, 2**33 + 7, 2**45])
def test_ranges_beyond_31_bits(numel: int) -> None:
    quarter = -(-numel // 4)
    ranges = ranges_of([5, numel, 5], quarter)
    assert ranges[0] == [(0, 0, 5), (1, 0, (quarter - 5) // 64 * 64)]
    assert ranges[1] == [(1, (quarter - 5) // 64 * 64, (2 * quarter - 5) // 64 * 64)]
