"""The papers' experiments, run as `make paper` runs them but for seconds, and scale-freeness."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import Optimizer

from fused_adamw import FusedAdam, FusedAdamProx, FusedAdamW, FusedNadamW

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "paper"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "common")


@pytest.mark.parametrize("name", SCRIPTS)
def test_experiment(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for needed in ("sklearn", "matplotlib", "rich"):
        pytest.importorskip(needed)
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(sys, "argv", [name, "--quick", "--output", str(tmp_path)])
    threads = torch.get_num_threads()
    try:
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / f"{name}.json").read_text())
    committed = json.loads((ROOT / "docs" / "figures" / f"{name}.json").read_text())
    assert leaves(found) > 10
    assert found.keys() >= {key for key in committed if "hidden layers" not in key}


def leaves(numbers: Any) -> int:
    """How many values there are."""
    if isinstance(numbers, dict | list):
        items = numbers.values() if isinstance(numbers, dict) else numbers
        return sum(map(leaves, items))
    return 1


@pytest.mark.parametrize("name", SCRIPTS)
def test_experiment_is_shown(name: str) -> None:
    text = (ROOT / "docs" / "experiments.md").read_text()
    for reference in (f"figures/{name}.png", f"figures/{name}.json", f"examples/paper/{name}.py"):
        assert reference in text
    assert (ROOT / "docs" / "figures" / f"{name}.png").is_file()


# --- Scale-freeness: Zhuang et al., arXiv 2202.00089 ---------------------------------------------

STEPS, SIZE = 6, 4
# With factors of 2^-20 to 2^20, squares stay far inside the normal range.
SIZES = st.floats(2**-20, 2**20, width=32)
GRADS = st.lists(
    st.lists(st.tuples(SIZES, st.sampled_from([-1.0, 1.0])), min_size=SIZE, max_size=SIZE),
    min_size=STEPS,
    max_size=STEPS,
).map(lambda rows: torch.tensor([[size * sign for size, sign in row] for row in rows]))
EXPONENTS = st.lists(st.integers(-20, 20), min_size=SIZE, max_size=SIZE).map(torch.tensor)
LOUD: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1, "eps": 0.0}
SCALE_FREE: dict[str, Callable[[list[torch.Tensor]], Optimizer]] = {
    "AdamW": lambda params: FusedAdamW(params, **LOUD),
    "AdamW of the paper": lambda params: FusedAdamW(params, decay="decoupled", **LOUD),
    "AdamW, AMSGrad": lambda params: FusedAdamW(params, amsgrad=True, **LOUD),
    "AdamProx": lambda params: FusedAdamProx(params, **LOUD),
    "NadamW": lambda params: FusedNadamW(params, **LOUD),
}


def iterates(
    make: Callable[[list[torch.Tensor]], Optimizer], grads: torch.Tensor
) -> list[torch.Tensor]:
    """The parameter after every step, from 1, -2, 3, ..."""
    param = torch.arange(1.0, SIZE + 1) * torch.tensor([1.0, -1.0] * (SIZE // 2))
    optimizer = make([param])
    found = []
    for param.grad in grads:
        optimizer.step()
        found.append(param.clone())
    return found


@pytest.mark.parametrize("name", SCALE_FREE)
@given(grads=GRADS, exponents=EXPONENTS)
@settings(max_examples=50, deadline=None)
def test_powers_of_two_leave_the_iterates_bit_for_bit(
    name: str, grads: torch.Tensor, exponents: torch.Tensor
) -> None:
    plain = iterates(SCALE_FREE[name], grads)
    scaled = iterates(SCALE_FREE[name], torch.ldexp(grads, exponents))
    for step, (x, y) in enumerate(zip(plain, scaled, strict=True), 1):
        assert torch.equal(x.view(torch.int32), y.view(torch.int32)), f"step {step}: {x} and {y}"


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda params: FusedAdam(params, **LOUD), id="Adam with L2"),
        pytest.param(
            lambda params: FusedAdamW(params, **{**LOUD, "eps": 0.1}), id="AdamW with eps"
        ),
    ],
)
def test_what_is_not_scale_free(make: Callable[[list[torch.Tensor]], Optimizer]) -> None:
    grads = torch.randn(STEPS, SIZE, generator=torch.Generator().manual_seed(0))
    plain, scaled = iterates(make, grads), iterates(make, grads * 2.0**-4)
    assert all((x != y).all() for x, y in zip(plain[1:], scaled[1:], strict=True))
