"""DTensors as a step sees them: local shards, and where they lie in the whole tensor.

torch.distributed.tensor is imported only where somebody else has: without it there is no DTensor.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

ProcessGroup: TypeAlias = Any  # torch.distributed may be absent


def is_sharded(tensor: object) -> bool:
    """Whether a tensor is a DTensor, of which this rank has a local tensor."""
    if type(tensor) is Tensor or type(tensor) is torch.nn.Parameter:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


@torch.no_grad()
def to_local(tensor: Any) -> Tensor:
    """A DTensor's local tensor, once the collective that makes it is complete."""
    local: Any = tensor.to_local()
    return local.wait() if hasattr(local, "wait") else local  # type: ignore[no-any-return]


def local_of(tensor: Tensor) -> Tensor:
    """What of a tensor is in this rank's memory: it itself, or a DTensor's local tensor."""
    return to_local(tensor) if is_sharded(tensor) else tensor


def wrapped(local: Tensor, like: Any, shape: torch.Size | None = None) -> Tensor:
    """A DTensor of a local tensor, or that itself where ``like`` is no DTensor.

    Args:
        local: this rank's part.
        like: gives mesh and placements.
        shape: of the whole, row-major; by default shape and strides of ``like``.
    """
    if not is_sharded(like):
        return local
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape if shape is None else shape,
        stride=like.stride() if shape is None else row_major(shape),
    )


def sliced(whole: Tensor, like: Any) -> Tensor:
    """A DTensor of values that this rank has all of, without communication.

    Args:
        whole: row-major.
        like: gives mesh and placements.
    """
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements
    found: Tensor = distribute_tensor(whole.detach(), mesh, placements, src_data_rank=None)
    return found


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of dense memory whose last dimension is innermost."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(size, 1))
    return tuple(reversed(strides)) if len(shape) else ()


def same_layout(x: Any, y: Any) -> bool:
    """Whether two DTensors are spread alike over the same mesh."""
    return bool(x.device_mesh == y.device_mesh and tuple(x.placements) == tuple(y.placements))


def placements_name(tensor: Any) -> str:
    """How messages call the placements of a tensor: "(Shard(dim=0),) on a mesh of shape (4,)"."""
    if not is_sharded(tensor):
        return f"none (a plain {type(tensor).__name__})"
    return f"{tuple(tensor.placements)} on a mesh of shape {tuple(tensor.device_mesh.shape)}"


def mismatch(param: Any, grad: Any) -> str | None:
    """How a gradient lies otherwise than its DTensor parameter, as the rest of a sentence."""
    if is_sharded(grad) and same_layout(param, grad):
        return None
    return (
        f"has placements {placements_name(param)}, its gradient {placements_name(grad)}; accepted: "
        "a gradient with the parameter's, as grad.redistribute(mesh, placements) makes it"
    )


def refuse_placements(param: Any) -> None:
    """Refuses a DTensor parameter whose ranks do not hold its elements themselves.

    Raises:
        ValueError: a placement that is neither Shard nor Replicate.
    """
    if is_sharded(param) and any(placement.is_partial() for placement in param.placements):
        raise ValueError(
            f"placements: found {placements_name(param)}, accepted: Shard and Replicate"
        )


def mesh_cuts(param: Any) -> dict[int, list[int] | None]:
    """Of each dimension of a DTensor that is sharded, the sizes of the mesh dimensions that do it.

    None where a rank may have several pieces of the dimension. A strided placement makes as many
    as its factor; a rank has one of them if the placements after it share out as many, as those of
    FSDP2 over tensor parallel do, and if all of them divide the dimension evenly.
    """
    cuts: dict[int, list[int]] = {}
    strided: set[int] = set()
    scattered: set[int] = set()
    for axis, placement in reversed(list(enumerate(param.placements))):
        dim = getattr(placement, "dim", None)
        if dim is None:
            continue
        after, size = cuts.setdefault(dim, []), param.device_mesh.size(axis)
        pieces = getattr(placement, "split_factor", 1)
        if pieces > 1 and size > 1:
            (strided if pieces == math.prod(after) else scattered).add(dim)
        after.append(size)
    scattered |= {dim for dim in strided if param.shape[dim] % math.prod(cuts[dim])}
    return {dim: None if dim in scattered else sizes for dim, sizes in cuts.items()}


def split_for_blocks(param: Any, block: int) -> int | None:
    """The dimension from which on a DTensor is cut into blocks: `block_split`."""
    if tuple(param.stride()) != row_major(param.shape):
        return None
    return block_split(param.shape, mesh_cuts(param), block)


def block_split(
    shape: Sequence[int], cuts: Mapping[int, Sequence[int] | None], block: int
) -> int | None:
    """The dimension from which on the elements of a tensor are cut into blocks; None: they cannot.

    With the dimensions from it on as one of blocks, the tensor of something that there is one of
    for each block can be sharded as the tensor itself: [note: sharded codes] in precision.py.

    Args:
        shape: of the whole, row-major.
        cuts: of each dimension that is sharded, the sizes of the dimensions of the mesh that do it;
            None: a rank has several pieces of it.
        block: elements in a block, which follow each other.
    """
    if 0 in shape:
        return None
    inner, split = 1, len(shape)
    while split > 0 and (inner % block or split == len(shape)):
        split -= 1
        inner *= shape[split]
    if inner % block or split == len(shape) or any(dim > split for dim in cuts):
        return None
    sizes = cuts.get(split, ())
    if sizes is None:
        return None
    parts = math.prod(sizes)
    if len(sizes) > 1 and (shape[split] % parts or inner // block % parts):
        return None
    chunk, row = -(-shape[split] // parts), inner // shape[split]  # of one rank
    return split if chunk * row == -(-inner // block // parts) * block else None


def block_shape(shape: torch.Size, split: int, block: int) -> torch.Size:
    """The shape of what there is one of for each block; see `block_split`."""
    return torch.Size((*shape[:split], math.prod(shape[split:]) // block))


class Extent(NamedTuple):
    """Where a shard's elements are in the whole tensor: [note: runs] in csrc/core/extent.h.

    Attributes:
        offset: number of its first element, in the order of the whole tensor's memory.
        run: how many follow each other in the whole, before others; 0: all of them.
        stride: from the first of a run to the first of the next, in the whole.
    """

    offset: int
    run: int = 0
    stride: int = 0


WHOLE = Extent(0)


def extent_of(param: Any) -> Extent | None:
    """Where this rank's elements of a parameter are in the whole; None where no `Extent` says it.

    That is so where more than two dimensions are cut, or two of them not from the outermost, where
    a rank has several pieces of a dimension, or where the local tensor is in another order of
    memory than the whole.
    """
    if not is_sharded(param):
        return WHOLE
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, mesh, placements = param.shape, param.device_mesh, param.placements
    local, offsets = compute_local_shape_and_global_offset(shape, mesh, placements)
    if 0 in local or not offsets:
        return WHOLE
    cuts = mesh_cuts(param)
    order = sorted((dim for dim, size in enumerate(shape) if size > 1), key=param.stride)[::-1]
    if any(cuts.get(dim, ()) is None for dim in order):
        return None
    if not all(_is_nested(x, order) for x in (param, local_of(param))):
        return None
    offset = sum(offsets[dim] * param.stride(dim) for dim in order)
    inner = [dim for dim in order[1:] if local[dim] != shape[dim]]
    if not inner:
        return Extent(offset)
    if len(inner) > 1:
        return None
    (dim,) = inner
    return Extent(offset, local[dim] * param.stride(dim), shape[dim] * param.stride(dim))


def _is_nested(tensor: Tensor, order: Sequence[int]) -> bool:
    """Whether memory is dense, with these dimensions from the outermost on; others have size 1."""
    sizes = [tensor.shape[dim] for dim in order]
    strides = [tensor.stride(dim) for dim in order]
    return all(
        size == 1 or own == dense
        for size, own, dense in zip(sizes, strides, row_major(sizes), strict=True)
    )
