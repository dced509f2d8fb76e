"""What the ranks that share an optimizer's parameters decide together.

[note: meetings] A rank knows the gradients of its own shards. Where a step depends on all (their
norm, an overflow that a scaler found), the ranks meet once in it: one all_reduce of a few float64
for each distinct process group, after which all know the same sums and so decide alike. Parameters
whose squares are summed over the same process groups make a class, with a sum for each param group.
Beside the sums go two counts: of ranks that found an overflow, and of ranks that cannot take the
step. The latter come to the meeting with that instead of raising at once, so that nobody waits for
them, and all raise the same. At the first step they also compare what their param groups are.

Sums go over one dimension of a mesh after the other, in the order of the parameters, which is the
same on all ranks once their param groups have been compared. Until then process groups are taken in
the order of the ranks in them, so that none waits for another in a circle.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple, NoReturn, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fused_adamw.shards import ProcessGroup, shard_groups

_Members: TypeAlias = tuple[int, ...]
_FLAGS = 2  # after the sums: overflows and failures
_ERRORS = {error.__name__: error for error in (TypeError, ValueError, RuntimeError)}


class Said(NamedTuple):
    """What a rank says of itself: lines to compare, or the type and message of its error."""

    lines: list[str]
    error: tuple[str, str] | None = None


class Ranks:
    """The ranks that share parameters with this one.

    Args:
        params: of the optimizer, in order.
        norm_process_groups: over which the squares of all gradients are summed, one after the
            other; each rank has other gradients.

    Attributes:
        classes: of each parameter the number of its class.
    """

    def __init__(
        self, params: Sequence[Tensor], norm_process_groups: Sequence[ProcessGroup]
    ) -> None:
        known: dict[frozenset[_Members], int] = {}
        groups: dict[_Members, ProcessGroup] = {}
        self.classes: list[int] = []
        for param in params:
            every, shards = shard_groups(param)
            for group in every:
                key = _members(group)
                groups[key] = min(groups.get(key, group), group, key=_name_order)
            self.classes.append(known.setdefault(frozenset(map(_members, shards)), len(known)))
        self.class_count = max(len(known), 1)
        extra = {_members(group): group for group in norm_process_groups}
        # Of each process group the classes whose squares are summed over it.
        self._classes_of: list[tuple[ProcessGroup, list[int]]] = [
            (group, [n for members, n in known.items() if key in members or key in extra])
            for key, group in {**groups, **extra, **groups}.items()  # in this order
        ]
        self._own = [groups[key] for key in sorted(groups)]
        self._agreed = not groups
        self._due = False
        self._on_device = False
        self._told = False  # whether all ranks know of an error
        self._param_groups = 0
        self._device = torch.device("cpu")
        self._describe: Callable[[], list[str]] = list

    @property
    def share_parameters(self) -> bool:
        """Whether any parameter is spread over ranks."""
        return bool(self._own)

    def begin(
        self,
        due: bool,
        param_groups: int,
        device: torch.device,
        describe: Callable[[], list[str]],
        *,
        on_device: bool = False,
    ) -> None:
        """Before a step.

        Args:
            due: whether it depends on what other ranks have.
            param_groups: how many there are.
            device: of the gradients.
            describe: says what must be the same on all ranks that share parameters.
            on_device: whether the step is decided there.
        """
        self._due = due and bool(self._classes_of)
        self._param_groups = param_groups
        self._device = device
        self._describe = describe
        self._on_device = on_device
        self._told = False

    def meet(
        self, squares: NDArray[np.float64], overflow: bool
    ) -> tuple[NDArray[np.float64], bool]:
        """Sums over the ranks; whether any of them found an overflow.

        Args:
            squares: [classes, param groups].
            overflow: whether this rank found one.

        Raises:
            TypeError, ValueError, RuntimeError: a rank cannot take the step, or other param groups.
        """
        self._agree(Said(self._describe()) if not self._agreed else None)
        if not self._due:
            return squares, overflow
        vector = torch.tensor([*squares.reshape(-1).tolist(), overflow, 0], dtype=torch.float64)
        self._due = False
        self.add_up(vector)
        overflows, failures = vector[-_FLAGS:].tolist()
        if failures:
            self._raise_common(Said([]))
        return vector[:-_FLAGS].numpy().reshape(squares.shape), overflows > 0

    def meet_on_device(self, rows: Tensor, overflow: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """As `meet`, but the host waits at a first step alone; later a failure is an overflow.

        Args:
            rows: the squares, float64 [classes * param groups].
            overflow: float32, one element; above 0 where this rank found one.

        Returns:
            The squares of each param group, and what any rank found.
        """
        self._agree(Said(self._describe()) if not self._agreed else None)
        if self._due:
            found = rows.new_zeros(_FLAGS)
            if overflow is not None:
                found[0] = overflow.reshape(())
            vector = torch.cat((rows, found))
            self._due = False
            self.add_up(vector)
            rows, overflow = vector[:-_FLAGS], vector[-_FLAGS:].sum().to(torch.float32)
        return sum_of_classes(rows.view(self.class_count, -1)), overflow

    def fail(self, error: Exception) -> NoReturn:
        """Takes part in the meetings of a step that this rank cannot take, then raises on all."""
        if self._told or type(error).__name__ not in _ERRORS or not self._classes_of:
            raise error
        message = f"rank {torch.distributed.get_rank()}: {error}"
        said = Said([], (type(error).__name__, message))
        if not self._agreed:
            self._agree(said)
        if self._due:
            self._due = False
            size = self.class_count * self._param_groups + _FLAGS
            home = self._device if self._on_device else torch.device("cpu")
            vector = torch.zeros(size, dtype=torch.float64, device=home)
            vector[-1] = 1
            self.add_up(vector)
            if not self._on_device:
                self._raise_common(said)
        raise type(error)(message) from error

    def add_up(self, vector: Tensor) -> None:
        """Sums squares, [classes * param groups], and the flags after them, over the ranks."""
        rows = vector[:-_FLAGS].view(self.class_count, -1)
        for group, classes in self._classes_of:
            kinds = [kind.type for kind in group._device_types]
            stays = vector.device.type in kinds
            home = vector.device if stays else device_for(group, self._device)
            everything = len(classes) == self.class_count
            part = vector if everything else torch.cat((rows[classes].reshape(-1), vector[-2:]))
            total = part.to(home)
            torch.distributed.all_reduce(total, group=group)
            if everything:
                vector.copy_(total)
            else:
                rows[classes] = total[:-_FLAGS].view(len(classes), rows.shape[1]).to(vector.device)
                vector[-_FLAGS:] = total[-_FLAGS:].to(vector.device)

    def _agree(self, said: Said | None) -> None:
        """Compares what the ranks that share parameters say, if this one has something to say."""
        if said is None:
            return
        number = int.from_bytes(hashlib.sha256(repr(said).encode()).digest()[:7], "little")
        extremes = torch.tensor([number, -number])
        for group in _often(self._own):
            found = extremes.to(device_for(group, self._device))
            torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, group=group)
            extremes = found.cpu()
        if extremes.sum() != 0 or said.error is not None:
            self._due = False
            self._raise_common(said, self._own)
        self._agreed = True

    def _raise_common(self, said: Said, groups: Sequence[ProcessGroup] | None = None) -> NoReturn:
        """Tells all ranks what each says, and raises the same on all."""
        self._told = True
        known = {torch.distributed.get_rank(): said}
        if groups is None:
            groups = [group for group, _ in self._classes_of]
        for group in _often(groups):
            lists: list[Any] = [None] * torch.distributed.get_world_size(group)
            torch.distributed.all_gather_object(lists, known, group=group)
            for other in lists:
                known.update(other)
        ranks = sorted(known)
        for rank in ranks:
            error = known[rank].error
            if error is not None:
                raise _ERRORS[error[0]](error[1])
        for rank in ranks:
            for mine, theirs in zip_longest(known[ranks[0]].lines, known[rank].lines):
                if mine != theirs:
                    raise ValueError(
                        f"rank {rank}: found {theirs or 'nothing more'}; on rank {ranks[0]} "
                        f"{mine or 'nothing more'}; accepted: the same on every rank"
                    )
        raise RuntimeError("the ranks differ in what none of them can name")


def _often(groups: Sequence[ProcessGroup]) -> list[ProcessGroup]:
    """The process groups so often that what one rank has comes to all."""
    return [*groups] * len(groups)


def sum_of_classes(squares: Any) -> Any:
    """The sums of each param group: [classes, param groups] to [param groups], in order."""
    total = squares[0]
    for row in squares[1:]:
        total = total + row
    return total


def _members(group: ProcessGroup) -> _Members:
    """The ranks of a process group, by which it is told from others.

    torch may have several of the same ranks, where a mesh is made twice.
    """
    return tuple(torch.distributed.get_process_group_ranks(group))


def _name_order(group: ProcessGroup) -> tuple[int, str]:
    """By age, as torch numbers its groups."""
    return len(group.group_name), group.group_name


def device_for(process_group: ProcessGroup, device: torch.device) -> torch.device:
    """Where numbers of the host are summed over ranks, which must all choose the same.

    On the host if the group communicates there; else on the gradients' device, and without
    gradients on the current one of a kind that the group has.
    """
    kinds = [kind.type for kind in process_group._device_types]
    if "cpu" in kinds:
        return torch.device("cpu")
    return device if device.type in kinds else torch.device(kinds[0])
