"""What the ranks that share an optimizer's parameters decide together.

[note: meetings] A rank knows the gradients of its own shards. Where a step depends on all (their
norm, an overflow that a scaler found), the ranks meet once in it: one all_reduce of a few float64
over each dimension of a mesh, after which all know the same and so decide alike. They also meet in
the first step, to compare what their param groups are, and in the one after a step with a meeting,
so that a rank that no longer needs one is not waited for.

Every message of the host has the same length, whatever a rank has to say: ``total, overflows,
nonfinite, measuring, absent`` and words of a hash of what must be the same everywhere. A rank that
no longer measures, or cannot take the step, says that it is absent, so that nobody waits for it; if
others measure, all raise the same. A device's messages have no hash.

The mesh is one that has all ranks of the parameters' meshes: its *route*. Squares are counted once:
of what several ranks have a copy of, one of them adds the squares, and the others look for numbers
that are not finite. What the route's ranks know is then summed over ``norm_process_groups``, whose
ranks may have other parameters: there no hash is compared.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple, NoReturn, TypeAlias

import torch
from torch import Tensor

from fused_adamw.shards import ProcessGroup, is_sharded

CLASSES = 2
"""Of parameters: those whose squares this rank adds to the norm, and those that another adds."""
_FLAGS = 5  # total, overflows, nonfinite, measuring, absent
_ABSENT = (0.0, 0.0, 0.0, 1.0, 1.0)  # of a rank that cannot take the step
_WORDS = 3  # of a hash, each of 16 bits so that float64 sums the squares of 2^21 exactly
_ERRORS = (TypeError, ValueError, RuntimeError)


_Line: TypeAlias = tuple[str, ...]  # of what, and its values


class Said(NamedTuple):
    """What a rank says of itself, where ranks differ or one cannot take the step.

    Attributes:
        options: of the optimizer.
        params: its parameters, which the ranks of one route share.
        values: of its param groups, and which parameters have no gradient; likewise. They are
            compared at a first step, and what of them changes the step whenever ranks meet.
        route: the ranks of this one's route.
        error: type and message of what went wrong.
    """

    options: list[_Line]
    params: list[_Line]
    values: list[_Line]
    route: tuple[int, ...] = ()
    error: tuple[str, str] | None = None


class Ranks:
    """The ranks that share parameters, or the norm of their gradients, with this one.

    Args:
        params: of the optimizer, in order.
        norm_process_groups: over which the squares of all gradients are summed, one after the
            other; each rank has other gradients.
        former: those of other parameters of the same optimizer.

    Attributes:
        classes: of each parameter the number of its class.
        have_all: whether all have a part of every DTensor, and so a gradient or not.

    Raises:
        ValueError: a group of ranks that share parameters already.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        norm_process_groups: Sequence[ProcessGroup],
        former: Ranks | None = None,
    ) -> None:
        meshes = list(dict.fromkeys(param.device_mesh for param in params if is_sharded(param)))  # type: ignore[attr-defined]
        mesh = _mesh_of_all(meshes)
        self._route = [] if mesh is None else _groups(mesh)
        self._ranks = () if mesh is None else _ranks_of(mesh)
        is_outside = bool(self._ranks) and torch.distributed.get_rank() not in self._ranks
        if is_outside:
            self._route = []
        self._extra = list(norm_process_groups)
        for group in self._extra:
            shared = {*torch.distributed.get_process_group_ranks(group)}.intersection(self._ranks)
            if len(shared) > 1:
                raise ValueError(
                    f"norm_process_groups: found a group with the ranks {sorted(shared)}, which "
                    "share DTensor parameters, so that the norm is summed over them anyway; "
                    "accepted: groups of ranks that share none"
                )
        self._apart = ""
        if (mesh is None and not self._extra) or (is_outside and not all(map(is_sharded, params))):
            self._apart = _names(meshes)
        self.classes = [_class_of(param, self._ranks) for param in params]
        self.have_all = all(_is_slice(x) or len(_ranks_of(x)) == len(self._ranks) for x in meshes)
        self._has_met, self._was_due, self._measured = not self._route, False, False
        if former is not None:
            self._has_met |= former.share_parameters and former._has_met
            self._was_due, self._measured = former._was_due, former._measured
        self._measures = self._due = self._compares = self._sums = self._told = False
        self._beyond: list[ProcessGroup] = []  # those of `extra` that are met in this step
        self._device = torch.device("cpu")
        self._say: Callable[[], Said] = lambda: Said([], [], [])
        self._digest = b""  # of options and parameters, which no step changes

    @property
    def share_parameters(self) -> bool:
        """Whether any parameter is spread over ranks."""
        return bool(self._route or self._apart)

    @property
    def are_met(self) -> bool:
        """Whether there are any in some step, or ought to be."""
        return bool(self._route or self._extra or self._apart)

    @property
    def await_this_one(self) -> bool:
        """Whether the others come to a meeting that has still to be held in this step."""
        return self._compares or self._sums

    def begin(
        self,
        measures: bool,
        scaled: bool,
        device: torch.device,
        say: Callable[[], Said],
        *,
        on_device: bool = False,
    ) -> None:
        """Before a step.

        Args:
            measures: whether it depends on the norm of all ranks' gradients.
            scaled: whether it depends on what a scaler found.
            device: of the gradients.
            say: says what must be the same on all ranks that share parameters.
            on_device: whether the step is decided there.
        """
        self._measures, self._due = measures, measures or (scaled and self.share_parameters)
        on_route = bool(self._route) and (self._due or self._was_due)
        self._beyond = self._extra if measures or self._measured else []
        comes = on_route or bool(self._beyond) or bool(self._apart and self._due)
        self._compares = not self._has_met or (comes and not on_device)
        self._sums = comes and on_device
        self._device = device
        self._say = say
        self._told = False

    def meet(
        self, squares: Sequence[float], overflow: bool, common: Callable[[], object]
    ) -> tuple[float, bool]:
        """The sum of squares over all ranks, and whether any of them found an overflow.

        Args:
            squares: of each class.
            overflow: whether this rank found one.
            common: what must be the same on all ranks of the route, in this step.

        Raises:
            TypeError, ValueError, RuntimeError: a rank cannot take the step, or ranks differ.
        """
        self._refuse_apart()
        if not self._compares:
            return squares[0], overflow
        nonfinite = not all(map(math.isfinite, squares))
        found = self._exchange([squares[0], overflow, nonfinite, *self._attendance()], common)
        self._was_due, self._measured = self._due, self._measures
        total = math.nan if found[2] and math.isfinite(found[0]) else found[0]
        return total, found[1] > 0

    def meet_on_device(
        self, squares: Tensor, overflow: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """As `meet`, but the host waits at a first step alone; later an absence is an overflow.

        Args:
            squares: of each class, float64.
            overflow: float32, one element; above 0 where this rank found one.

        Returns:
            The sum of squares, and what any rank found.
        """
        self._refuse_apart()
        if self._compares:
            self._exchange([0.0] * _FLAGS)
        if not self._sums:
            return squares[0], overflow
        self._sums = False
        flags = squares.new_tensor([0.0, 0.0, 0.0, *self._attendance()])
        flags[0] = squares[0]
        if overflow is not None:
            flags[1] = overflow.reshape(())
        flags[2] = ~squares.isfinite().all()
        found = self._sum(flags, [*self._route, *self._beyond])
        self._stay()
        differ = (found[3] > 0) & (found[4] > 0)
        total = torch.where((found[2] > 0) & found[0].isfinite(), math.nan, found[0])
        return total, ((found[1] > 0) | differ).to(torch.float32)

    def fail(self, error: Exception) -> NoReturn:
        """Takes part in the meeting of a step that this rank cannot take, then raises on all."""
        if self._compares and not self._told:
            self._exchange(_ABSENT, error=error)
        if self._sums and not self._told:
            self._sums = False
            flags = torch.tensor(_ABSENT, dtype=torch.float64, device=self._device)
            self._sum(flags, [*self._route, *self._beyond])
            self._stay()
        if self._told or type(error) not in _ERRORS or not (self._route or self._extra):
            raise error
        raise type(error)(_blamed(error)) from error

    def _attendance(self) -> tuple[bool, bool]:
        """Whether this rank measures, and whether it no longer does."""
        return self._measures, self._measured and not self._measures

    def _stay(self) -> None:
        """Comes to the next step's meeting, as the host does not know whether others will."""
        self._was_due = True
        self._measured |= self._measures

    def _refuse_apart(self) -> None:
        if self._apart and self._due:
            self._compares = self._sums = False
            raise ValueError(
                f"params: found DTensors of {self._apart}, which have not the ranks of all; "
                "accepted with max_grad_norm, skip_nonfinite or a scaler: a mesh that has, or "
                "norm_process_groups"
            )

    def _exchange(
        self,
        flags: Sequence[float],
        common: Callable[[], object] = lambda: None,
        error: Exception | None = None,
    ) -> list[float]:
        """The flags, summed over all ranks; raises what one of them has to say."""
        words = self._hash(common) if self._route and error is None else (0.0,) * _WORDS
        self._compares = False
        message = torch.tensor([*flags, *words, *(x * x for x in words)], dtype=torch.float64)
        found = self._sum(message, self._route)
        # Numbers are the same if and only if their variance is zero.
        count = math.prod(map(torch.distributed.get_world_size, self._route))
        sums = found[_FLAGS:].tolist()
        same = sums == [*(count * x for x in words), *(count * x * x for x in words)]
        found = found[:_FLAGS]
        found[3:] += 0 if same else 1
        found = self._sum(found, self._beyond)
        if not same or (found[3] > 0 and found[4] > 0):
            self._raise_common(error)
        self._has_met = True
        return found.tolist()

    def _hash(self, common: Callable[[], object]) -> tuple[float, ...]:
        if not self._digest:
            said = self._say()
            self._digest = hashlib.sha256(repr((said.options, said.params)).encode()).digest()
        values = () if self._has_met else self._say().values
        digest = hashlib.sha256(self._digest + repr((values, common())).encode()).digest()
        words = (digest[2 * i : 2 * i + 2] for i in range(_WORDS))
        return tuple(float(int.from_bytes(word, "little")) for word in words)

    def _sum(self, message: Tensor, groups: Iterable[ProcessGroup]) -> Tensor:
        """The message, summed over the ranks of one group after the other."""
        for group in groups:
            kinds = [kind.type for kind in group._device_types]
            stays = message.device.type in kinds
            home = message.device if stays else device_for(group, self._device)
            total = message.to(home, copy=True)
            torch.distributed.all_reduce(total, group=group)
            message = total.to(message.device)
        return message

    def _raise_common(self, error: Exception | None) -> NoReturn:
        """Tells all ranks what each says, and raises the same on all."""
        self._told, self._digest = True, b""
        me = torch.distributed.get_rank()
        try:
            said = self._say()._replace(route=self._ranks)
        except Exception as unspeakable:  # others wait for a word
            error = error or unspeakable
            said = Said([], [], [], self._ranks)
        if error is not None:
            said = said._replace(error=(_kind_of(error).__name__, _blamed(error)))
        known = {me: said}
        for group in [*self._route, *self._beyond]:
            lists: list[Any] = [None] * torch.distributed.get_world_size(group)
            torch.distributed.all_gather_object(lists, known, group=group)
            for other in lists:
                known.update(other)
        ranks = sorted(known)
        for rank in ranks:
            found = known[rank].error
            if found is not None:
                (kind,) = (kind for kind in _ERRORS if kind.__name__ == found[0])
                raise kind(found[1]) from error
        for rank in ranks:
            first = next(r for r in ranks if known[r].route == known[rank].route)
            _compare(ranks[0], known[ranks[0]].options, rank, known[rank].options)
            _compare(first, known[first].params, rank, known[rank].params)
            _compare(first, known[first].values, rank, known[rank].values)
        raise RuntimeError(
            f"ranks {ranks}: found options, param groups or parameters that differ, or a rank that "
            "registered them anew by itself; accepted: the same on every rank"
        )


def _compare(first: int, expected: list[_Line], rank: int, said: list[_Line]) -> None:
    """Refuses the first line in which two ranks differ, and names the values that do."""
    for mine, theirs in zip_longest(expected, said, fillvalue=("nothing more",)):
        if mine != theirs:
            raise ValueError(
                f"rank {rank}: found {_difference(theirs, mine)}; on rank {first} "
                f"{_difference(mine, theirs)}; accepted: the same on every rank"
            )


def _difference(line: _Line, other: _Line) -> str:
    """A line without the values that are the same in another one of the same title."""
    values = line[1:]
    if line[0] == other[0]:
        values = tuple(value for value in values if value not in other)
    return f"{line[0]} {', '.join(values)}".rstrip()


def _kind_of(error: Exception) -> type[Exception]:
    return next((kind for kind in _ERRORS if isinstance(error, kind)), RuntimeError)


def _blamed(error: Exception) -> str:
    """The message, with the rank, and with the type of an error whose message needs it."""
    text = str(error) if isinstance(error, _ERRORS) else f"{type(error).__name__}: {error}"
    return f"rank {torch.distributed.get_rank()}: {text}"


def _ranks_of(mesh: Any) -> tuple[int, ...]:
    return tuple(mesh.mesh.flatten().tolist())


def _groups(mesh: Any) -> list[ProcessGroup]:
    """Of the dimensions that have more than one rank."""
    if mesh.get_coordinate() is None:
        return []
    return [mesh.get_group(axis) for axis in range(mesh.ndim) if mesh.size(axis) > 1]


def _mesh_of_all(meshes: Sequence[Any]) -> Any:
    """A mesh that has the ranks of all, one of the fewest dimensions; None where there is none.

    It is the same on every rank that has the same parameters: of meshes alike the first one's.
    """
    if not meshes:
        return None
    everyone = {rank for mesh in meshes for rank in _ranks_of(mesh)}
    choices = [mesh for mesh in meshes if everyone.issubset(_ranks_of(mesh))]
    if not choices:  # slices of one mesh, where another slice has them all
        root = meshes[0]._get_root_mesh()
        names = {name for mesh in meshes for name in mesh.mesh_dim_names or ("",)}
        known = root.mesh_dim_names or ()
        if any(mesh._get_root_mesh() != root for mesh in meshes) or not names.issubset(known):
            return None
        return root[tuple(name for name in known if name in names)]
    return min(choices, key=_order)


def _order(mesh: Any) -> tuple[Any, ...]:
    return mesh.ndim, tuple(mesh.shape), _ranks_of(mesh), mesh.mesh_dim_names or ()


def _class_of(param: Any, everyone: Sequence[int]) -> int:
    """0 where this rank adds a parameter's squares, 1 where one that has the same does.

    Args:
        param: plain, or a DTensor.
        everyone: the ranks of the route.
    """
    if not everyone:
        return 0
    if not is_sharded(param):  # as one with a copy on each rank
        return int(torch.distributed.get_rank() != everyone[0])
    mesh = param.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return 1
    for place, placement in zip(coordinate, param.placements, strict=True):
        if placement.is_replicate() and place:
            return 1
    ranks = _ranks_of(mesh)
    if len(ranks) == len(everyone) or not _is_slice(mesh):
        return 0
    return int(everyone[0] not in ranks)  # of several slices alike the first


def _is_slice(mesh: Any) -> bool:
    return bool(mesh._get_root_mesh() != mesh)


def _names(meshes: Sequence[Any]) -> str:
    """How messages call meshes."""
    return " and ".join(f"a mesh of ranks {list(_ranks_of(mesh))}" for mesh in meshes)


def device_for(process_group: ProcessGroup, device: torch.device) -> torch.device:
    """Where numbers of the host are summed over ranks, which must all choose the same.

    On the host if the group communicates there; else on the gradients' device, and without
    gradients on the current one of a kind that the group has.
    """
    kinds = [kind.type for kind in process_group._device_types]
    if "cpu" in kinds:
        return torch.device("cpu")
    return device if device.type in kinds else torch.device(kinds[0])
