"""Any dense layout of parameters and any of gradients: an element's bits do not depend on it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from drawn_training import (
    LOUD,
    assert_same_bits,
    make_params,
    set_grads,
    state_tensors,
    train,
)
from torch import Tensor, nn

from fused_adamw import FusedAdamW


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def transposed(x: Tensor) -> Tensor:
    return x.t().contiguous().t()


def permuted(x: Tensor) -> Tensor:
    return x.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2)


def unaligned(x: Tensor) -> Tensor:
    return torch.cat([torch.zeros(1), x.flatten()])[1:].view(x.shape)


def odd_stride_of_one(x: Tensor) -> Tensor:
    """A dimension of size one may have any stride."""
    return x.as_strided(x.shape, (x.stride(0), 77))


def with_gaps(x: Tensor) -> Tensor:
    return torch.stack([x, x + 1], -1)[..., 0]


def expanded(x: Tensor) -> Tensor:
    return x.flatten()[0].expand(x.shape)


def imaginary_part(x: Tensor) -> Tensor:
    return torch.complex(x, -x).conj().imag


def same(x: Tensor) -> Tensor:
    return x.clone()


Layout = Callable[[Tensor], Tensor]
LAYOUTS: list[tuple[tuple[int, ...], Layout, Layout]] = [
    ((2, 3, 4, 5), channels_last, channels_last),
    ((2, 3, 4, 5), channels_last, same),
    ((2, 3, 4, 5), same, channels_last),
    ((2, 3, 4, 5), permuted, channels_last),
    ((6, 9), transposed, transposed),
    ((6, 9), transposed, same),
    ((6, 9), same, transposed),
    ((9, 9), same, transposed),
    ((6, 9), same, with_gaps),
    ((6, 9), transposed, with_gaps),
    ((6, 9), same, expanded),
    ((6, 9), transposed, expanded),
    ((6, 9), unaligned, same),
    ((1031,), same, unaligned),
    ((1031,), unaligned, unaligned),
    ((7, 1), odd_stride_of_one, same),
    ((7, 1), same, odd_stride_of_one),
    ((0, 4), same, same),
    ((3, 0), same, transposed),
    ((), same, same),
    ((), same, expanded),
    ((33,), same, imaginary_part),
]


@pytest.mark.parametrize(
    ("shape", "param_layout", "grad_layout"),
    LAYOUTS,
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_layouts_do_not_matter(
    shape: tuple[int, ...], param_layout: Layout, grad_layout: Layout
) -> None:
    """An element's update depends on that element alone, so the bits are those of plain layouts."""
    plain = make_params([shape, (5,)])
    laid = make_params([shape, (5,)])
    laid[0].data = param_layout(laid[0].detach())
    optimizers = [FusedAdamW(params, **LOUD, amsgrad=True) for params in (plain, laid)]
    addresses = [param.data_ptr() for param in laid]
    for step in range(3):
        for params in (plain, laid):
            set_grads(params, step)
        laid[0].grad = grad_layout(plain[0].grad)
        plain[0].grad = laid[0].grad.resolve_neg().clone(memory_format=torch.contiguous_format)
        for optimizer in optimizers:
            optimizer.step()
    assert_same_bits(laid, plain)
    for x, y in zip(laid, plain, strict=True):
        assert_same_bits(state_tensors(optimizers[1], [x]), state_tensors(optimizers[0], [y]))
    assert [param.data_ptr() for param in laid] == addresses
    strides = torch.zeros_like(laid[0]).stride()  # torch's choice for a state
    assert optimizers[1].state[laid[0]]["exp_avg"].stride() == strides


def test_memory_format_changes_in_training() -> None:
    plain = nn.Conv2d(3, 4, 3)
    changed = copy.deepcopy(plain)
    runs = [(model, FusedAdamW(model.parameters(), **LOUD)) for model in (plain, changed)]
    for model, optimizer in runs:
        train(optimizer, list(model.parameters()), range(2))
    changed.to(memory_format=torch.channels_last)
    for step in range(2, 4):
        for model, optimizer in runs:
            train(optimizer, list(model.parameters()), range(step, step + 1))
    assert changed.weight.is_contiguous(memory_format=torch.channels_last)
    assert_same_bits(list(changed.parameters()), list(plain.parameters()))
