"""The processes of distributed tests: results, failures, ranks that hang."""

from __future__ import annotations

import time

import on_ranks
import pytest
import torch
from torch import distributed

pytestmark = on_ranks.needs_gloo


def total(rank: int, start: int) -> torch.Tensor:
    value = torch.tensor(start + rank)
    distributed.all_reduce(value)
    return value


def fail_on_one(rank: int) -> None:
    print(f"rank {rank} was here")
    if rank == 1:
        raise ValueError("no more")
    distributed.barrier()


def hang_on_one(rank: int) -> None:
    if rank == 0:
        time.sleep(60)


def test_ranks_make_one_process_group() -> None:
    assert on_ranks.run(total, 3, 10) == [torch.tensor(33)] * 3


def test_a_rank_that_fails_is_shown_and_ends_the_others() -> None:
    begin = time.monotonic()
    with pytest.raises(pytest.fail.Exception, match=r"rank 1 of 2: (?s:.*)no more") as caught:
        on_ranks.run(fail_on_one, 2)
    assert "rank 1 was here" in str(caught.value)
    assert time.monotonic() - begin < on_ranks.SECONDS / 2


def test_a_rank_that_hangs_is_killed() -> None:
    with pytest.raises(pytest.fail.Exception, match=r"rank 0 of 2: took over 4 s(?s:.*)hang_on"):
        on_ranks.run(hang_on_one, 2, seconds=4.0)
