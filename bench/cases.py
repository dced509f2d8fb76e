"""What is measured: lists of tensors, what is done with them, and what is aimed at."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from bench.clip_norm import NORM
from bench.models import MODELS, Shape, elements
from bench.precision import PRECISION
from bench.tasks import GROUPS, STEP, TELEMETRY, Task
from bench.whole_step import WHOLE, WHOLE_UNSCALE

CPU, CUDA = "cpu", "cuda"
K, M = 10**3, 10**6
F32, BF16 = torch.float32, torch.bfloat16
DTYPES = {"float32": F32, "bfloat16": BF16}

# Kinds of cases.
LIST, MODEL, BY_ELEMENTS, BY_TENSORS = "list", "model", "by elements", "by tensors"
SCALING_KINDS = (BY_ELEMENTS, BY_TENSORS)


@dataclass(frozen=True)
class Aim:
    """What a step of AdamW should reach.

    Attributes:
        times: at least so many times as fast as a peer, by its name.
        of_limit: at least this fraction of the speed that memory allows.
        host_us: at most so many microseconds of host time.
        launches: at most so many launches.
    """

    times: Mapping[str, float] = field(default_factory=dict)
    of_limit: float = 0.0
    host_us: float = math.inf
    launches: float = math.inf


@dataclass(frozen=True)
class Case:
    """A list of tensors, with gradients and states of their dtype where the task has no others.

    Attributes:
        name: what the command line calls it.
        shapes: of the tensors.
        dtype: of parameters, gradients and states.
        kind: a list of equal tensors, a model's, or a point of one of the two scaling plots.
        cold: whether several copies of the list are stepped in turns, so many that no array is
            still in the last-level cache when its turn comes again.
        aims: by type of device.
        devices: the types of device it is for.
        note: how it differs from what its name says.
        task: what is timed.
    """

    name: str
    shapes: tuple[Shape, ...]
    dtype: torch.dtype = F32
    kind: str = LIST
    cold: bool = False
    aims: Mapping[str, Aim] = field(default_factory=dict)
    devices: tuple[str, ...] = (CPU, CUDA)
    note: str = ""
    task: Task = STEP

    @property
    def tensors(self) -> int:
        """How many there are."""
        return len(self.shapes)

    @property
    def elements(self) -> int:
        """Parameters in the sense of a model's size."""
        return elements(list(self.shapes))

    def scaled(self, most: int, why: str) -> Case:
        """Itself, or as many tensors, each smaller by the same factor, of `most` elements in all.

        A tensor keeps at least one element. Nothing is aimed at for a smaller case.
        """
        if self.elements <= most:
            return self
        factor = most / self.elements
        shapes = tuple((max(1, int(math.prod(shape) * factor)),) for shape in self.shapes)
        smaller = replace(self, shapes=shapes, aims={})
        return replace(smaller, note=f"{why}: cut from {self.elements:,} to {smaller.elements:,}")

    def truncated(self, most: int, why: str) -> Case:
        """Itself, or those of its tensors, from the first on, that fit into `most` elements."""
        if self.elements <= most:
            return self
        kept: list[Shape] = []
        left = most
        for shape in self.shapes:
            if math.prod(shape) <= left:
                kept.append(shape)
                left -= math.prod(shape)
        smaller = replace(self, shapes=tuple(kept), aims={})
        note = (
            f"{why}: {smaller.tensors} of {self.tensors} tensors, "
            f"{smaller.elements:,} of {self.elements:,} elements"
        )
        return replace(smaller, note=note)


def _equal(
    name: str,
    tensors: int,
    numel: int,
    dtype: torch.dtype = F32,
    *,
    cold: bool = False,
    cpu: Aim | None = None,
    cuda: Aim | None = None,
) -> Case:
    """Equal tensors; for the devices that an aim is given for, which may be an empty one."""
    aims = {device: aim for device, aim in ((CPU, cpu), (CUDA, cuda)) if aim is not None}
    return Case(name, ((numel,),) * tensors, dtype, cold=cold, aims=aims, devices=tuple(aims))


def _times(torch_fused: float, deepspeed: float | None = None) -> dict[str, float]:
    times = {"torch-fused": torch_fused}
    return times if deepspeed is None else {**times, "deepspeed": deepspeed}


# The most important first: a run that is interrupted has measured those.
LISTS = (
    _equal("64M-float32", 1, 64 * M, cpu=Aim(_times(1.0, 1.0), of_limit=0.95)),
    _equal("64M-bfloat16", 1, 64 * M, BF16, cpu=Aim(_times(1.8, 1.7))),
    _equal("128M-float32", 1, 128 * M, cuda=Aim(_times(1.15), of_limit=0.94)),
    _equal("128M-bfloat16", 1, 128 * M, BF16, cuda=Aim(_times(1.25), of_limit=0.90)),
    _equal(
        "1000x1024-float32",
        1000,
        1024,
        cpu=Aim(_times(15.0, 8.0)),
        cuda=Aim(_times(10.0), launches=4),
    ),
    _equal("1000x1024-bfloat16", 1000, 1024, BF16, cpu=Aim(_times(15.0)), cuda=Aim(launches=4)),
    _equal("10000x64-float32", 10_000, 64, cpu=Aim(_times(30.0)), cuda=Aim(_times(12.0))),
    # So little arithmetic that what is left is the host time of a step.
    _equal("1000x1-float32", 1000, 1, cpu=Aim(host_us=100), cuda=Aim(host_us=100)),
    _equal("1M-float32", 1, M, cpu=Aim(_times(1.9, 1.3))),
    _equal("64K-float32", 1, 64 * K, cpu=Aim(_times(4.0))),
    _equal("1000x64-float32", 1000, 64, cpu=Aim(_times(30.0))),
    _equal("16M-float32", 1, 16 * M, cpu=Aim(of_limit=0.95)),
    _equal("1M-float32-cold", 1, M, cold=True, cpu=Aim(), cuda=Aim()),
    _equal("1000x1024-float32-cold", 1000, 1024, cold=True, cpu=Aim(), cuda=Aim()),
    # Arrays of 2^27 bytes: see "Sizes" in README.md.
    _equal("2^26-bfloat16", 1, 2**26, BF16, cpu=Aim()),
)


_SIZES = {"64M": (1, 64 * M), "1000x1024": (1000, 1024), "16M": (1, 16 * M), "1M": (1, M)}


def _of_task(task: Task, sizes: Iterable[str], dtypes: Iterable[str] = DTYPES) -> list[Case]:
    """A task on equal tensors, on either device; nothing is aimed at."""
    cases = []
    for size in sizes:
        tensors, numel = _SIZES[size]
        cases += [
            Case(f"{size}-{dtype}-{task.name}", ((numel,),) * tensors, DTYPES[dtype], task=task)
            for dtype in dtypes
        ]
    return cases


# What a training loop does around an update, what options of ours cost, and the formats.
TASK_CASES = (
    *_of_task(WHOLE, _SIZES),
    *_of_task(WHOLE_UNSCALE, _SIZES),
    *_of_task(NORM, ("64M", "1000x1024"), ["float32"]),
    *_of_task(TELEMETRY, ("64M", "1000x1024")),
    *_of_task(GROUPS, ["1000x1024"], ["float32"]),
    *_of_task(PRECISION, _SIZES, ["float32"]),
)
TASKS = {case.task.name: case.task for case in TASK_CASES}

MODEL_CASES = tuple(
    Case(f"{name}-{dtype_name}", tuple(model.shapes()), dtype, MODEL)
    for name, model in MODELS.items()
    for dtype_name, dtype in DTYPES.items()
)

# What the scaling plots show: one tensor of more and more elements, and more and more tensors.
SCALING = (
    *(Case(f"1x1e{k}-float32", ((10**k,),), F32, BY_ELEMENTS) for k in range(3, 10)),
    *(Case(f"{n}x1K-float32", ((K,),) * n, F32, BY_TENSORS) for n in (1, 10, 100, K, 10 * K)),
)

CASES = {case.name: case for case in (*LISTS, *TASK_CASES, *MODEL_CASES, *SCALING)}


def select(
    device: torch.device,
    names: Iterable[str] = (),
    models: Iterable[str] | None = None,
    dtypes: Iterable[str] = (),
    tasks: Iterable[str] = (),
) -> list[Case]:
    """The cases to measure.

    Args:
        device: where. A case that is named is taken whatever the device.
        names: keys of `CASES`.
        models: keys of `MODELS`, none for all of them; `None` if none is asked for. They come in
            float32 unless `dtypes` says otherwise.
        dtypes: keys of `DTYPES` to keep; none for every dtype that was chosen otherwise.
        tasks: keys of `TASKS`, for all their cases.

    Returns:
        The union of `names`, `models` and `tasks`; without any the lists for the device, all tasks,
        the models that are not large, and the scaling plots.
    """
    wanted = {DTYPES[name] for name in dtypes} or set(DTYPES.values())
    model_dtypes = list(dtypes) or ["float32"]
    wanted_tasks = set(tasks)
    chosen = [CASES[name] for name in names]
    chosen += [case for case in TASK_CASES if case.task.name in wanted_tasks]
    asked = list(MODELS) if models is not None and not list(models) else list(models or ())
    if not chosen and not asked:
        chosen = [case for case in (*LISTS, *TASK_CASES) if device.type in case.devices]
        asked = [name for name, model in MODELS.items() if not model.large]
        extra = list(SCALING)
    else:
        extra = []
    chosen += [CASES[f"{name}-{dtype}"] for name in asked for dtype in model_dtypes]
    unique = {case.name: case for case in (*chosen, *extra)}
    return [case for case in unique.values() if case.dtype in wanted]


def draw(params: Iterable[Tensor], seed: int) -> None:
    """Fills parameters and their gradients with random numbers, normally distributed."""
    generator = None
    with torch.no_grad():
        for param in params:
            if generator is None:
                generator = torch.Generator(param.device).manual_seed(seed)
            param.normal_(generator=generator)
            if param.grad is not None:
                param.grad.normal_(generator=generator)


def make_params(case: Case, device: torch.device, seed: int = 0) -> list[Tensor]:
    """Parameters with gradients, drawn at random, each tensor an allocation of its own."""
    params = []
    for shape in case.shapes:
        param = torch.empty(shape, dtype=case.dtype, device=device).requires_grad_()
        param.grad = torch.empty_like(param, requires_grad=False)
        params.append(param)
    draw(params, seed)
    return params
