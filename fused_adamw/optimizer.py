"""What every optimizer of the library shares: registration, the step, checkpoints."""

from __future__ import annotations

import contextlib
import functools
import itertools
import numbers
import operator
import sys
import warnings
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from inspect import signature
from itertools import chain
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.compiler import is_dynamo_compiling
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from typing_extensions import Self

from fused_adamw import _C, checks, compiled
from fused_adamw.device_step import (
    Amp,
    DeviceInputs,
    DeviceStep,
    GroupPlan,
    is_read_on_host,
    plan_group,
    refuse_capture,
)
from fused_adamw.engines import check_engine, engine_status
from fused_adamw.hyperparameters import hyperparameters, values_of
from fused_adamw.loading import States, loaded_groups, loaded_states, warn_of_other_masters
from fused_adamw.measurements import GroupTelemetry, Measurements
from fused_adamw.memory_report import MemoryReport, PlannedTensor, memory_report
from fused_adamw.param_groups import (
    FLAG,
    OF_ALL_GROUPS,
    PARAM_DTYPES,
    Options,
    Place,
    Precision,
    decay_of_flag,
    label_of,
)
from fused_adamw.precision import (
    BESIDE_KEYS,
    STATE_KINDS,
    Layout,
    beside_of,
    blocks_fit,
    check_precision,
    code_key,
    decoded_states,
    full_value,
    layout_of,
    local_state,
    scale_key,
    states_in,
    stored_state,
    wrapped_state,
)
from fused_adamw.ranks import CLASSES, Ranks, Said
from fused_adamw.registration import Member, RegisteredList
from fused_adamw.schedules import Schedule
from fused_adamw.shards import (
    WHOLE,
    Extent,
    extent_of,
    is_sharded,
    local_of,
    placements_name,
    refuse_placements,
    wrapped,
)
from fused_adamw.whole_step import (
    EMA,
    Outcome,
    StepOptions,
    check_process_groups,
    one_number,
    zero,
)

if TYPE_CHECKING:
    from fused_adamw.step_in_backward import StepInBackward

# Attributes that copies and pickles keep, beside what torch keeps.
_KEPT = (
    *("engine", "precision", "stochastic_rounding", "remainder_bits", "state_dtype"),
    *("max_grad_norm", "skip_nonfinite", "ema_decay", "zero_grads", "collect_telemetry"),
)
_PLAIN = frozenset({float, int, bool, str, type(None)})
_PLAIN_OR_TUPLE = _PLAIN | {tuple}
_OWN_REFERENCES = 2  # the attribute's and the call's
_HOST = torch.device("cpu")
_FRAMES_OF_STEP = 6  # at most between its caller and itself: hooks and wrappers
Loss = TypeVar("Loss")
_NO_RANKS: tuple[Sequence[Tensor], Sequence[Any]] = [], ()
# Options that each rank may have of its own.
_OF_A_RANK = {"engine", "collect_telemetry", "norm_process_groups"}
# Of a group what other ranks need not have: objects of this one, or a list too long for a line.
_NOT_SAID = {"params", "param_names", *OF_ALL_GROUPS}


class FusedOptimizer(Optimizer):
    """An optimizer whose step is one pass over all its parameters by one of the engines.

    A subclass names its rule and the states that it keeps. States are created, like torch's, when a
    parameter first has a gradient.

    `torch.amp.GradScaler` needs nothing of its user: the step reads ``grad_scale`` and
    ``found_inf``, which the scaler sets, divides gradients by the former as it reads them, and does
    nothing at all after an overflow. Gradients in memory stay scaled (call ``scaler.unscale_``
    first where they are wanted; they are not unscaled twice).

    On a GPU, where the scaler, ``max_grad_norm``, ``skip_nonfinite`` or ``capturable=True`` of a
    group let the GPU decide on a step, all of a step is worked out there by the engine ``"cuda"``,
    and the host waits for nothing: states' ``step`` and the groups' ``schedule_step`` are then
    tensors on the GPU, ``schedule_multiplier`` is not written, and ``lr`` or any other number of a
    group, and ``max_grad_norm``, may be tensors of one element there, which a step reads when it
    runs. With ``capturable=True`` and such an ``lr`` a step can be captured in a CUDA graph, after
    one outside; replays follow what these tensors hold, and the schedule too. Checkpoints are the
    same either way.

    DTensors are stepped on their local shards; their states are DTensors of the same mesh and
    placements. All ranks of a mesh must call a step together: see docs/distributed.md.

    Args:
        params: tensors, (name, tensor) pairs or param groups; float32, bfloat16 or float16, dense
            in any order of dimensions.
        defaults: the rule's values of a param group.
        engine: ``"auto"`` (``"cpu"`` for host memory; ``"cuda"``, else ``"triton"``, on a GPU) or
            one of ``"cpu"``, ``"cuda"``, ``"triton"``, ``"reference"``.
        schedule_multiplier: eta, >= 0; a value of the param group, which may be set at any time.
        schedule: one of `fused_adamw.schedules`, which sets eta before every step by the number of
            steps taken; both are kept in checkpoints. A group may have its own.
        precision: how 16-bit parameters and states are kept: ``"bf16"``, ``"master"``,
            ``"split"``, ``"kahan"`` or ``"8bit"``, which is of float32 parameters too; float32
            parameters beside the others, and all with ``"fp32"``, are kept as they are. None: as
            their dtype says, states too. A function of a parameter's name (None without one) and
            the parameter may choose for each. See docs/precision.md.
        stochastic_rounding: whether bfloat16 parameters and states are rounded up or down with
            the probability that makes the mean exact, with ``precision`` None or ``"bf16"``.
        seed: of the random bits of such rounding and of 8-bit remainders, in [0, 2^53]; a value of
            the param group, kept in checkpoints. Bits follow from it, the parameter's number, the
            group's ``schedule_step`` and the element's index alone.
        remainder_bits: 8 or 16: what ``"8bit"`` keeps beside bfloat16 parameters.
        state_dtype: dtype of the states; by default the format's.
        max_grad_norm: > 0. Gradients, unscaled, are shrunk as by
            `torch.nn.utils.clip_grad_norm_` over all param groups, where they are read: memory
            keeps them as they are. The norm is in `grad_norm`.
        skip_nonfinite: whether a step whose norm is not finite does nothing, as after an overflow.
        norm_process_groups: the squared norm is summed over the ranks of each of these groups, one
            after the other, where each rank has a part of the gradients. DTensors need none: theirs
            is summed over the shards of their meshes. Without ``max_grad_norm`` or
            ``skip_nonfinite`` there is no norm to sum. Copies share them; pickles have none.
        ema_decay: in [0, 1): an exponential moving average of the parameters is kept, with the
            formula of `torch.optim.swa_utils.AveragedModel` and ``get_ema_multi_avg_fn``, but in
            float32 where theirs has the parameter's dtype. It begins as a copy after the first
            step; of a parameter whose first gradient comes later, as a copy before that step. A
            parameter without a gradient keeps its average. See `swap_ema`.
        zero_grads: whether gradients are zeroed once they have been read, after an overflow too.
        telemetry: whether steps are observed; see `telemetry`.

    The options from ``max_grad_norm`` on are attributes too, ``telemetry`` as
    ``collect_telemetry``, and may be changed between steps. They and ``engine`` and ``state_dtype``
    hold for all param groups, which do not take them.
    """

    # How the extension calls the rule.
    _rule: str
    # What a group of a checkpoint must have, and its states may have, to be of this algorithm.
    _group_keys: frozenset[str]
    # Values of a group that torch's checkpoints lack and mean, where that is not the group's own.
    _torch_values: Mapping[str, Any] = MappingProxyType({})
    _known_states: frozenset[str]
    # Whether a parameter's state has the number of steps it has taken, as "step".
    _counts = True
    # What torch.amp.GradScaler looks for, and what it sets around a step.
    _step_supports_amp_scaling = True
    grad_scale: Tensor | None
    found_inf: Tensor
    # What reads the values of a group that make its hyperparameters, as a tuple.
    _values: Callable[[dict[str, Any]], tuple[Any, ...]]
    # Of each group what the device was last told.
    _plans: dict[int, tuple[tuple[Any, ...], GroupPlan]]
    # Of each parameter what only the device counts: steps taken, and whether its average has begun.
    _positions: dict[Tensor, tuple[Tensor, Tensor]]
    # Those that share parameters or their norm, if any; before a step not known.
    _ranks: Ranks | None
    _ranks_known: tuple[Sequence[Tensor], Sequence[Any]]  # of which parameters and process groups
    # Those whose states are only there for checkpoints to have: their first step creates them anew.
    _unbegun: set[Tensor]
    # What captured graphs use, which may be replayed as long as the optimizer lives.
    _captured: list[Any]
    # Whether a step was taken, for torch's schedulers, which warn where none was.
    _opt_called: bool
    _warned_of_float16 = False
    # What steps parameters in the backward pass, if anything does.
    _in_backward: StepInBackward | None = None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if hasattr(cls, "_rule"):
            cls._values = staticmethod(values_of(cls._rule))

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        *,
        engine: str = "auto",
        schedule_multiplier: float = 1.0,
        schedule: Schedule | None = None,
        precision: str | Precision | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
        remainder_bits: int = 8,
        state_dtype: torch.dtype | None = None,
        max_grad_norm: float | Tensor | None = None,
        skip_nonfinite: bool = False,
        norm_process_groups: Sequence[Any] = (),
        ema_decay: float | None = None,
        zero_grads: bool = False,
        telemetry: bool = False,
        **unknown: object,
    ) -> None:
        for name in unknown:
            own = [key for key in signature(type(self)).parameters if key != "options"]
            raise TypeError(
                f"{type(self).__name__}: found an argument {name!r}, accepted: "
                f"{', '.join([*own, *Options.__annotations__])}"
            )
        check_engine(engine)
        check_precision(
            None if callable(precision) else precision,
            stochastic_rounding=stochastic_rounding,
            state_dtype=state_dtype,
            remainder_bits=8 if callable(precision) else remainder_bits,
        )
        self.engine = engine
        self.precision = precision
        self.stochastic_rounding = stochastic_rounding
        self.remainder_bits = remainder_bits
        self.state_dtype = state_dtype
        self._registered: RegisteredList | None = None
        self._registered_alone: dict[Tensor, RegisteredList] = {}
        self._known: dict[int, tuple[tuple[Any, ...], _C.Hyperparameters]] = {}
        self.max_grad_norm = max_grad_norm
        self.skip_nonfinite = skip_nonfinite
        self.norm_process_groups = norm_process_groups
        self.ema_decay = ema_decay
        self.zero_grads = zero_grads
        self.collect_telemetry = telemetry
        self._swapped = False
        self._plans = {}
        self._positions = {}
        self._captured = []
        self._unbegun = set()
        self._ranks, self._ranks_known = None, _NO_RANKS
        self._number = compiled.number_of(self)
        self._measurements = Measurements()
        self._step_options()
        defaults = {
            **defaults,
            "schedule_multiplier": schedule_multiplier,
            "schedule": schedule,
            "schedule_step": 0,
            "seed": seed,
        }
        super().__init__(params, defaults)

    def _hyperparameters(self, group: dict[str, Any]) -> _C.Hyperparameters:
        """The values of a group, checked."""
        decouples = self._decouples(group)
        if group.get(FLAG, decouples) != decouples:
            raise ValueError(
                f"{FLAG}: found {group[FLAG]!r} beside decay {group['decay']!r}, accepted: "
                f"{decouples}, or only one of them"
            )
        schedule = group["schedule"]
        if schedule is not None and not isinstance(schedule, Schedule):
            raise TypeError(
                f"schedule: found {schedule!r}, accepted: None or one of fused_adamw.schedules"
            )
        checks.count("schedule_step", group["schedule_step"], at_least=0)
        checks.count("seed", group["seed"], at_least=0)
        if group["differentiable"]:
            raise RuntimeError(
                "differentiable: found True, accepted: False (a fused update has no derivative)"
            )
        return hyperparameters(self._rule, group)

    @abstractmethod
    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The keys of the arrays that the rule keeps for a parameter, in the order of its slots."""

    def _initial_value(self, name: str, group: dict[str, Any]) -> float:
        """What a state is filled with at first."""
        return 0.0

    @property
    def _scalar(self) -> str | None:
        """The key of the number that the rule carries from step to step, if it carries one."""
        return _C.RULES[self._rule][1]

    # --- State and param groups ------------------------------------------------------------------

    @property
    def state(self) -> States:
        """Per parameter a dict of its state, as in torch.

        Whoever reads this may change it, or move it to free memory, so the registered lists, which
        hold references to every tensor, are given up; the next step registers anew.
        """
        self._give_up_registered()
        return self._state

    @state.setter
    def state(self, state: States) -> None:
        self._give_up_registered()
        self.__dict__["state"] = state

    @property
    def _state(self) -> States:
        state: States = self.__dict__["state"]
        return state

    def _give_up_registered(self) -> None:
        self._registered = None
        self._registered_alone = {}

    def _is_state_held(self) -> bool:
        """Whether someone else has the dict of states, and so can reach every tensor in it."""
        return sys.getrefcount(self.__dict__["state"]) > _OWN_REFERENCES

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a param group, as in torch; refused whole if anything in it cannot be used."""
        if isinstance(param_group, dict) and FLAG in self.defaults:
            if "decay" not in param_group:
                flag = param_group.get(FLAG, self._decouples(param_group))
                if flag != self._decouples(param_group):
                    param_group["decay"] = decay_of_flag(flag)
            param_group.setdefault(FLAG, self._decouples(param_group))
        count = len(self.param_groups)
        if isinstance(param_group, dict):
            for name in sorted(OF_ALL_GROUPS & param_group.keys()):
                attribute = "collect_telemetry" if name == "telemetry" else name
                if param_group[name] is getattr(self, attribute):  # ZeRO repeats them
                    del param_group[name]
                    continue
                raise ValueError(
                    f"param group {count}: {name}: found {param_group[name]!r}; accepted: as an "
                    "option of the optimizer, for all param groups"
                )
        self._refuse_repeated(param_group)
        try:
            super().add_param_group(param_group)
            self._check_group(count)
        except Exception:
            del self.param_groups[count:]
            raise
        self._give_up_registered()

    def _refuse_repeated(self, param_group: dict[str, Any]) -> None:
        """Names the parameter, where torch only warns, or does not say which."""
        if not isinstance(param_group, dict) or not isinstance(param_group["params"], Iterable):
            return  # torch refuses it
        if isinstance(param_group["params"], Tensor | set):
            return
        params = param_group["params"] = list(param_group["params"])
        names = [item[0] if isinstance(item, tuple) else None for item in params]
        seen = {param for group in self.param_groups for param in group["params"]}
        first = self._count_params(len(self.param_groups))
        for i, item in enumerate(params):
            param = item[1] if isinstance(item, tuple) else item
            if not isinstance(param, Tensor):
                continue
            if param in seen:
                label = label_of(first + i, {"param_names": names} if names[i] else {}, i)
                raise ValueError(
                    f"params: {label} is given twice; accepted: each parameter once, in one group"
                )
            seen.add(param)

    def _count_params(self, groups: int) -> int:
        return sum(len(group["params"]) for group in self.param_groups[:groups])

    def _check_group(self, index: int) -> None:
        group = self.param_groups[index]
        for i, param in enumerate(group["params"]):
            if param.requires_grad and param.dtype not in PARAM_DTYPES:
                label = label_of(self._count_params(index) + i, group, i)
                raise TypeError(
                    f"{label} has dtype {param.dtype}; accepted: float32, bfloat16, float16"
                )
            if param.requires_grad:
                try:
                    refuse_placements(param)
                    self._layout(group, i)
                except (TypeError, ValueError) as error:
                    label = label_of(self._count_params(index) + i, group, i)
                    raise type(error)(f"{label}: {error}") from None
        self._checked_hyperparameters(index)

    def _decouples(self, group: dict[str, Any]) -> bool:
        """The convention of decay in torch's terms."""
        return bool(group.get("decay", self.defaults["decay"]) != "l2")

    def _torch_decay(self, group: dict[str, Any]) -> str:
        """The convention of a checkpoint of torch that does not state it."""
        return "l2"

    def _is_codable(self, group: dict[str, Any]) -> bool:
        """Whether the rule works on states in 8-bit codes."""
        return True

    def _layout(self, group: dict[str, Any], place: int) -> Layout:
        """How a parameter and its states lie in memory."""
        param = group["params"][place]
        precision = self.precision
        if callable(precision):
            names = group.get("param_names")
            precision = precision(names[place] if names else None, param)
        stochastic = self.stochastic_rounding and precision in (None, "bf16")
        return layout_of(
            param.dtype,
            param.numel(),
            precision,
            stochastic_rounding=stochastic,
            state_dtype=self.state_dtype,
            remainder_bits=self.remainder_bits if precision == "8bit" else 8,
            codable=self._is_codable(group) and blocks_fit(param),
        )

    def _layouts(self) -> Iterator[tuple[dict[str, Any], Tensor, Layout]]:
        """Of every parameter its group and its layout."""
        for group in self.param_groups:
            for i, param in enumerate(group["params"]):
                if param.dtype in PARAM_DTYPES:
                    yield group, param, self._layout(group, i)

    def _checked_hyperparameters(self, index: int) -> _C.Hyperparameters:
        try:
            return self._hyperparameters(self.param_groups[index])
        except (TypeError, ValueError, RuntimeError) as error:
            raise type(error)(f"param group {index}: {error}") from None

    # --- The step --------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Loss]) -> Loss: ...

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            What the closure returned.

        Raises:
            TypeError, ValueError, RuntimeError: something cannot be used; the message names the
                param group or parameter, and nothing has been written.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._registered is None and _asks_for_states():
            self._create_states()
            return loss
        device = self._device_of_decisions()
        registered = self._registered
        if registered is not None and not registered.native.matches(
            self._param_lists(), self._state
        ):
            registered = None
        ranks = self._ranks_of_step(device, registered)
        try:
            if device is not None:
                self._step_on_device(device, registered)
            else:
                self._step_on_host(ranks, registered)
        except Exception as error:
            if ranks is not None:
                ranks.fail(error)
            raise
        return loss

    def _ranks_of_step(
        self, device: torch.device | None, registered: RegisteredList | None
    ) -> Ranks | None:
        """The ranks that the step has to do with; they meet as said in [note: meetings]."""
        groups = self.norm_process_groups
        if registered is None or self._ranks_known[1] is not groups:
            known, params = self._ranks_known[0], [*chain.from_iterable(self._param_lists())]
            same = len(known) == len(params) and all(map(operator.is_, known, params))
            if not same or self._ranks_known[1] is not groups:
                try:
                    found = Ranks(params, check_process_groups(groups), self._ranks)
                except Exception as error:
                    if self._ranks is not None:
                        self._begin_meeting(self._ranks, device)
                        self._ranks.fail(error)
                    raise
                self._ranks = found if found.are_met else None
                self._ranks_known = params, groups
        if self._ranks is not None:
            self._begin_meeting(self._ranks, device)
        return self._ranks

    def _begin_meeting(self, ranks: Ranks, device: torch.device | None) -> None:
        home = device
        if home is None:
            home = next((p.device for g in self.param_groups for p in g["params"]), _HOST)
        ranks.begin(
            self.max_grad_norm is not None or self.skip_nonfinite,
            "found_inf" in self.__dict__,
            home,
            functools.partial(self._said_to_ranks, device),
            on_device=device is not None,
        )

    def _said_to_ranks(self, device: torch.device | None) -> Said:
        """What must be the same on all ranks."""
        names = [name for name in _KEPT if name not in _OF_A_RANK]
        options: list[tuple[str, ...]] = [
            (type(self).__name__,),
            ("steps are decided by", f"the {'host' if device is None else 'device'}"),
            *((name, _said(getattr(self, name))) for name in names),
        ]
        compares = self._ranks is not None and self._ranks.have_all
        params: list[tuple[str, ...]] = [(f"{len(self.param_groups)} param groups",)]
        lines: list[tuple[str, ...]] = []
        for index, group in enumerate(self.param_groups):
            values = [f"{key} {_said(group[key])}" for key in sorted(group.keys() - _NOT_SAID)]
            lines.append((f"param group {index}:", *values))
        for index, i, number in self._places():
            group = self.param_groups[index]
            param = group["params"][i]
            name = f"{label_of(number, group, i)} of param group {index}"
            shape = f"with shape {tuple(param.shape)}"
            params.append((name, shape, str(param.dtype), f"placements {placements_name(param)}"))
            if compares and is_sharded(param):
                lines.append((name, f"with{'out' * (param.grad is None)} a gradient"))
        return Said(options, params, lines)

    def _step_on_host(self, ranks: Ranks | None, registered: RegisteredList | None) -> None:
        idle = () if self._in_backward is None else self._in_backward.idle_groups()
        options = self._step_options()
        if "found_inf" in self.__dict__ and one_number("found_inf", self.found_inf):
            if not options.measures_norm and (ranks is None or not ranks.await_this_one):
                self._skip_unread(options)
                return
            options = replace(options, overflow=True)
        for group in self.param_groups:
            if isinstance(group["schedule_step"], Tensor):  # of steps on the device
                group["schedule_step"] = int(group["schedule_step"])
        former: list[tuple[dict[str, Any], Any]] = []
        for group in self.param_groups:
            if group["schedule"] is not None:
                former = self._follow_schedules(idle)
                break
        try:
            current = [self._current(index) for index in range(len(self.param_groups))]
            outcome = Outcome.STALE
            if (
                registered is not None
                and registered.device_step is None
                and self._is_current(registered, options)
            ):
                outcome = registered.step(
                    current,
                    is_state_held=self._is_state_held(),
                    steps=self._steps_taken() if registered.draws else (),
                    options=options,
                    measurements=self._measurements,
                )
            if outcome is Outcome.STALE:
                outcome = self._register_and_step(current, options)
        except BaseException:
            _restore(former)
            raise
        if outcome is Outcome.SKIPPED:
            _restore(former)
            return
        for index, group in enumerate(self.param_groups):
            if index not in idle:
                group["schedule_step"] += 1

    def _device_of_decisions(self) -> torch.device | None:
        """Where coefficients and decisions are worked out, if not on the host.

        On a GPU, where something that only the GPU knows decides on a step, so that the host need
        not wait for it.
        """
        if self.engine not in ("auto", "cuda", "cuda-on-host"):
            return None
        param: Tensor | None = next(
            (param for group in self.param_groups for param in group["params"]), None
        )
        capturable = any(group["capturable"] for group in self.param_groups)
        if param is None or not (param.is_cuda or (capturable and self.engine == "cuda-on-host")):
            return None
        if self.engine == "auto" and engine_status()["cuda"] is not None:
            return None
        amp = (self.__dict__.get("grad_scale"), self.__dict__.get("found_inf"))
        decides = self.max_grad_norm is not None or self.skip_nonfinite or capturable
        if not decides and not any(isinstance(value, Tensor) and value.is_cuda for value in amp):
            return None
        registered = self._registered
        if capturable or (registered is not None and registered.device_step is not None):
            return param.device
        params = chain.from_iterable(self._param_lists())
        return param.device if all(other.device == param.device for other in params) else None

    def _step_on_device(self, device: torch.device, registered: RegisteredList | None) -> None:
        options = self._step_options(device)
        plans = [self._planned(index, device) for index in range(len(self.param_groups))]
        amp = Amp(self.__dict__.get("grad_scale"), self.__dict__.get("found_inf"))
        inputs = DeviceInputs(plans, amp)
        current = [plan.hyperparameters for plan in plans]
        if (
            registered is not None
            and registered.device_step is not None
            and self._is_current(registered, options)
        ):
            outcome = registered.step(
                current,
                is_state_held=self._is_state_held(),
                steps=[0] * len(current),  # counted on the device
                options=options,
                measurements=self._measurements,
                inputs=inputs,
            )
            if outcome is not Outcome.STALE:
                return
        self._register_and_step(current, options, inputs)

    def _planned(self, index: int, device: torch.device) -> GroupPlan:
        """What the device is told of a group: as at the last step where nothing has changed."""
        group = self.param_groups[index]
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if capturing and not isinstance(group["lr"], Tensor):
            raise RuntimeError(
                f"param group {index}: lr: found {group['lr']!r} under CUDA graph capture, which "
                f"a replay would repeat; accepted: a tensor on {device}"
            )
        count = group["schedule_step"]
        if not isinstance(count, Tensor) or count.device != device:
            refuse_capture(device, "a first step of a param group")
            count = torch.tensor(int(count), dtype=torch.int64, device=device)
            group["schedule_step"] = count
        values = self._values(group)
        key = (
            *(_identity(value, device) if isinstance(value, Tensor) else value for value in values),
            *(group["differentiable"], group.get(FLAG), group["schedule"], count.data_ptr()),
        )
        known = self._plans.get(index)
        if known is None or known[0] != key:
            try:
                plan = plan_group(self._rule, group, device, self._hyperparameters)
            except (TypeError, ValueError, RuntimeError) as error:
                raise type(error)(f"param group {index}: {error}") from None
            known = self._plans[index] = key, plan
        return known[1]

    def _new_device_step(self, device: torch.device, members: Sequence[Member]) -> DeviceStep:
        def position(is_new: bool, known: Tensor | None) -> Tensor:
            if known is not None and not is_new:
                return known
            return torch.tensor(not is_new, dtype=torch.float32, device=device)

        steps: list[Tensor | None] = []
        averaged: list[Tensor | None] = []
        for member in members:
            step, average = self._positions.get(member.param, (None, None))
            if member.state:
                step = position(member.fresh, step)
                average = position(member.unaveraged, average)
                self._positions[member.param] = step, average
            steps.append(step)
            averaged.append(average)
        sums = len(self.param_groups) if self._ranks is None else CLASSES
        return DeviceStep(device, steps, averaged, sums, self._captured)

    def _begun(self, param: Tensor) -> dict[str, Any]:
        """The state of a parameter without what was created for a step that the device skipped.

        The host waits where the device has counted.
        """
        state = self._state.get(param, {})
        if param not in self._positions:
            return state
        steps, averaged = self._positions[param]
        has_stepped, has_average = bool(state.get("step", steps)), bool(averaged)
        return {
            name: value
            for name, value in state.items()
            if (has_average if name == EMA else has_stepped)
        }

    def _count_on_host(self) -> None:
        """Drops what the device has not begun, and what it counted beside the states."""
        for param in self._positions:
            state = self._state.get(param, {})
            for name in state.keys() - self._begun(param).keys():
                del state[name]
            if not state:
                self._state.pop(param, None)
        self._positions = {}

    def _place_scalars(self, param: Tensor, device: torch.device) -> None:
        """Puts the counts of a parameter where a step reads them."""
        state = self._state.get(param, {})
        for name, value in state.items():
            scalar = name in ("step", self._scalar) and isinstance(value, Tensor)
            if scalar and value.device != device:
                state[name] = value.to(device)

    def _step_options(self, device: torch.device | None = None) -> StepOptions:
        """What this step does beside its rule, checked.

        The host reads the scale, unless a device decides, and the limit, unless it is there.
        """
        self._refuse_swapped("step")
        scale = None if device is not None else self.__dict__.get("grad_scale")
        limit = self.max_grad_norm
        if isinstance(limit, Tensor) and (device is None or is_read_on_host(limit, device)):
            limit = one_number("max_grad_norm", limit)
        values = (
            limit,
            self.skip_nonfinite,
            self.ema_decay,
            self.zero_grads,
            self.collect_telemetry,
            self.norm_process_groups,
            1.0 if scale is None else one_number("grad_scale", scale),
        )
        key = tuple(map(type, values)), values  # the types first: of some, == is no bool
        known: tuple[Any, StepOptions] | None = self.__dict__.get("_known_options")
        if known is None or isinstance(limit, Tensor) or known[0] != key:
            known = self._known_options = key, StepOptions(*values).check()
        return known[1]

    def _skip_unread(self, options: StepOptions) -> None:
        """What is done after an overflow where nothing asks for the gradients."""
        if options.telemetry:
            self._measurements.observe_skip(len(self.param_groups))
        if not options.zero_grads:
            return
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        zero([local_of(grad) for grad in grads if grad is not None])

    @property
    def grad_norm(self) -> Tensor | None:
        """The norm of all gradients, unscaled, of the last step that measured it: float32 [].

        Steps with ``max_grad_norm`` or ``skip_nonfinite`` measure it before they clip, those that
        are skipped after an overflow too; None before. Later steps do not change the tensor.
        """
        norm = self._measurements.grad_norm
        return None if norm is None else norm.clone()

    @property
    def telemetry(self) -> Callable[[], list[GroupTelemetry] | None]:
        """``telemetry()`` is what the last observed step did to each param group; None before.

        The host waits for the step. Steps are observed while ``collect_telemetry`` is True. See
        `GroupTelemetry` for the numbers.
        """
        return self._measurements.telemetry

    @telemetry.setter
    def telemetry(self, value: object) -> None:
        raise AttributeError(
            f"telemetry: found the assignment of {value!r} to a method; accepted: "
            "collect_telemetry = True or False"
        )

    @contextlib.contextmanager
    def swap_ema(self) -> Iterator[None]:
        """Within this scope the parameters have the values of their averages, for an evaluation.

        Float32 parameters change places with their averages; others get them rounded. Parameters
        without an average stay as they are. Steps, checkpoints of the optimizer and copies of it
        are refused meanwhile. Under FSDP2 the model must be resharded where an evaluation ends, or
        what it gathered last is used again: see docs/distributed.md.

        Raises:
            RuntimeError: within another such scope, where there are no averages, or without
                ``ema_decay``, as steps have then left the averages behind.
        """
        self._refuse_swapped("swap_ema")
        averaged = [
            (param, state[EMA])
            for param, state in self._state.items()
            if EMA in state and param not in self._unbegun
        ]
        if not averaged:
            raise RuntimeError("swap_ema: found no averages, accepted: after a step with ema_decay")
        if self.ema_decay is None:
            raise RuntimeError(
                "swap_ema: found ema_decay None, with which steps leave the averages as they are; "
                "accepted: a number in [0, 1)"
            )
        kept: list[Tensor | None] = []
        self._swapped = True
        try:
            for param, ema in averaged:
                kept.append(_exchange(param, ema))
            yield
        finally:
            for (param, ema), values in zip(averaged, kept):  # noqa: B905  as far as it came
                _exchange_back(param, ema, values)
            self._swapped = False

    def _refuse_swapped(self, what: str) -> None:
        if self._swapped:
            raise RuntimeError(
                f"{what}: found the averages in the parameters' place, accepted: outside of "
                "`with swap_ema()`"
            )

    def _follow_schedules(self, idle: Collection[int]) -> list[tuple[dict[str, Any], Any]]:
        """Sets eta in the groups that have a schedule and are not idle; returns what it was."""
        scheduled = [
            (group, self._scheduled_multiplier(index))
            for index, group in enumerate(self.param_groups)
            if group["schedule"] is not None and index not in idle
        ]
        former = [(group, group["schedule_multiplier"]) for group, _ in scheduled]
        for group, multiplier in scheduled:
            group["schedule_multiplier"] = multiplier
        return former

    def _scheduled_multiplier(self, index: int) -> float:
        group = self.param_groups[index]
        schedule, t = group["schedule"], group["schedule_step"]
        if not isinstance(schedule, Schedule) or type(t) is not int or t < 0:
            self._checked_hyperparameters(index)  # has the message
        return float(schedule(t))

    def _current(self, index: int) -> _C.Hyperparameters:
        """The hyperparameters of a group: those of the last step where its values are the same."""
        group = self.param_groups[index]
        values = (*self._values(group), group["differentiable"], group.get(FLAG))
        known = self._known.get(index)
        plain = _PLAIN_OR_TUPLE.issuperset(map(type, values))
        if plain and known is not None and known[0] == values:
            return known[1]
        checked = self._checked_hyperparameters(index)
        self._known.pop(index, None)
        if all(map(_is_plain, values)):
            self._known[index] = values, checked
        return checked

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """Torch's wrapper of a step, with its hooks and its profiler mark, where there are any.

        The mark alone costs as much as a step over a dozen tensors.
        """
        torchs = Optimizer.profile_hook_step(func)

        @functools.wraps(func)
        def step(self: FusedOptimizer, *args: Any, **kwargs: Any) -> Any:
            hooked = (
                self._optimizer_step_pre_hooks
                or self._optimizer_step_post_hooks
                or _global_optimizer_pre_hooks
                or _global_optimizer_post_hooks
            )
            if is_dynamo_compiling():
                plain = not (hooked or args or kwargs) and func is FusedOptimizer.step
                if plain and compiled.graph_must_not_end():
                    return compiled.step(self)
                return uncompiled(self, *args, **kwargs)
            if hooked or torch.autograd._profiler_enabled():  # type: ignore[attr-defined]
                return torchs(self, *args, **kwargs)
            result = func(self, *args, **kwargs)
            self._optimizer_step_code()
            return result

        # The graph of torch.compile ends before a step: [note: graph or no graph] in compiled.py.
        uncompiled = _disable_dynamo(step)
        return step

    def _param_lists(self) -> list[list[Tensor]]:
        return [group["params"] for group in self.param_groups]

    def _places(self) -> list[Place]:
        """Of every parameter, in order."""
        numbers = itertools.count()
        return [
            (index, i, next(numbers))
            for index, group in enumerate(self.param_groups)
            for i in range(len(group["params"]))
        ]

    def _register_and_step(
        self,
        current: list[_C.Hyperparameters],
        options: StepOptions,
        inputs: DeviceInputs | None = None,
    ) -> Outcome:
        """Steps over a new registration, which is kept for the steps that follow."""
        if inputs is None:
            self._count_on_host()
        else:
            refuse_capture(
                inputs.plans[0].schedule_step.device,
                "parameters that are not registered: at their first step, or since "
                "optimizer.state or state_dict() was read",
            )
        self._warn_of_unscaled_float16()
        begins = self._averages_begin()
        taken = self._steps_taken() if inputs is None else [0] * len(current)
        registered, outcome = self._step_anew(
            self._places(), current, taken, options, begins, inputs
        )
        self._give_up_registered()
        if registered is not None:
            registered.native.remember(self._param_lists(), self._state)
            self._registered = registered
        return outcome

    def _warn_of_unscaled_float16(self) -> None:
        """Once: a scaler sets found_inf around every step."""
        if self._warned_of_float16 or "found_inf" in self.__dict__:
            return
        for index, i, number in self._places():
            grad = self.param_groups[index]["params"][i].grad
            if grad is not None and grad.dtype == torch.float16:
                warnings.warn(
                    f"{label_of(number, self.param_groups[index], i)} has a float16 gradient and "
                    "no torch.amp.GradScaler drives the optimizer: below 6e-8 float16 is zero",
                    stacklevel=5,  # whoever called step()
                )
                self._warned_of_float16 = True
                return

    def _averages_begin(self) -> bool:
        """Whether averages that the next step creates begin with its result, not before it."""
        return not any(
            EMA in state and EMA in self._begun(param) and param not in self._unbegun
            for param, state in self._state.items()
        )

    def _step_alone(
        self, place: Place, hyperparameters: _C.Hyperparameters, steps: int, begins: bool
    ) -> None:
        """Steps one parameter, which has a gradient, over a list of its own; likewise kept.

        Args:
            place: of the parameter.
            hyperparameters: of its group.
            steps: that the group has taken before this backward pass.
            begins: as it is of the first one in a backward pass, for them all.
        """
        param = self.param_groups[place[0]]["params"][place[1]]
        current = [hyperparameters] * (place[0] + 1)
        taken = [steps] * len(current)
        options = self._step_options()
        registered = self._registered_alone.get(param)
        if (
            registered is not None
            and self._is_current(registered, options)
            and registered.native.matches([], {param: self._state.get(param, {})})
        ):
            outcome = registered.step(
                current,
                is_state_held=self._is_state_held(),
                steps=taken if registered.draws else (),
                options=options,
                measurements=self._measurements,
            )
            if outcome is not Outcome.STALE:
                return
        self._count_on_host()
        registered, _ = self._step_anew([place], current, taken, options, begins)
        if registered is not None:
            registered.native.remember([], {param: self._state.get(param, {})})
            self._registered_alone[param] = registered

    def _step_anew(
        self,
        places: Iterable[Place],
        current: list[_C.Hyperparameters],
        steps: Sequence[int],
        options: StepOptions,
        begins: bool,
        inputs: DeviceInputs | None = None,
    ) -> tuple[RegisteredList | None, Outcome]:
        """Registers parameters, with the states that they lack, and steps those with a gradient.

        Args:
            places: of the parameters.
            current: the hyperparameters of each group.
            steps: taken by each group; counted on the device where decisions are the device's.
            options: of the step.
            begins: whether an average that is created here begins with this step's result.
            inputs: of a step whose decisions are the device's.
        """
        former: dict[Tensor, frozenset[str] | None] = {}  # keys of the states to which some are new
        registered: RegisteredList | None = None
        averages = options.ema_decay is not None
        ranks = self._ranks
        seeds = self._seeds()

        def undo() -> None:
            for param, keys in former.items():
                if registered is not None and registered.has_stepped(param):
                    continue  # an engine failed later
                state = self._state[param]
                for key in state.keys() - (keys or ()):
                    del state[key]
                if keys is None:
                    del self._state[param]

        try:
            members: list[Member] = []
            for index, i, number in places:
                group = self.param_groups[index]
                param = group["params"][i]
                active = param.requires_grad or param.grad is not None
                names = self._state_names(group if inputs is None else inputs.plans[index].values)
                layout = Layout("", "", param.dtype, False)  # of what cannot be stepped
                if active and param.dtype in PARAM_DTYPES:
                    layout = self._layout(group, i)
                stateless = not (names or self._counts or self._scalar)
                besides = {EMA, layout.beside_key}
                fresh = unaveraged = False
                if param.grad is not None:
                    keys = frozenset(self._state.get(param, ()))
                    if param in self._unbegun:
                        keys = frozenset()
                    fresh = not (stateless or keys - besides)
                    unaveraged = averages and EMA not in keys
                    beside = layout.beside_key
                    joins = beside is not None and beside not in keys
                    if fresh or unaveraged or joins:
                        former[param] = keys if keys or param in self._state else None
                    if fresh:
                        initial = self._initial_state(param, group, names, layout)
                        self._state[param].update(initial)
                    if joins:
                        completed = self._state[param]
                        completed.update(self._initial_beside(param, layout))
                        if EMA in completed:  # it comes last: graphs are compiled for one order
                            completed[EMA] = completed.pop(EMA)
                    if unaveraged:
                        self._state[param][EMA] = self._full_value(param, layout)
                state = self._state.get(param) or {}
                # What is missing is created when its gradient comes, by a new registration.
                complete = (stateless or state.keys() - besides) and averages <= (EMA in state)
                if layout.beside_key is not None:
                    complete = complete and layout.beside_key in state
                if param in self._unbegun and param.grad is None:
                    complete = False
                self._place_scalars(param, _HOST if inputs is None else param.device)
                members.append(
                    Member(
                        param,
                        state if complete else None,
                        layout.state_keys(names),
                        index,
                        label_of(number, group, i),
                        counts=self._counts,
                        scalar=self._scalar,
                        fresh=fresh,
                        beside=(layout.beside, layout.beside_key) if layout.beside_key else None,
                        scales=tuple(map(scale_key, names)) if layout.state_dtype is None else (),
                        stochastic=layout.stochastic,
                        draws=layout.draws,
                        random_key=_C.random_key(seeds[index], number),
                        averaged=averages,
                        unaveraged=unaveraged and begins,
                        active=active,
                        extent=self._extent(param, layout) if active else WHOLE,
                        norm_class=0 if ranks is None else ranks.classes[number],
                    )
                )
            device_step = None
            if inputs is not None:
                device_step = self._new_device_step(inputs.plans[0].schedule_step.device, members)
            registered = RegisteredList(members, self.engine, averages, device_step, ranks, seeds)
            outcome = registered.step(
                current,
                steps=steps,
                options=options,
                measurements=self._measurements,
                inputs=inputs,
            )
            if outcome is Outcome.STALE:
                raise RuntimeError("a tensor was given other memory while the step was under way")
        except BaseException:
            undo()
            raise
        if outcome is Outcome.SKIPPED and former:
            undo()  # its first step is still to come
            return None, outcome
        self._unbegun.difference_update(former)
        return registered, outcome

    def _is_current(self, registered: RegisteredList, options: StepOptions) -> bool:
        """Whether a list is registered for such steps; what its tensors are is not asked."""
        averages = options.ema_decay is not None
        if registered.averages is not averages or registered.ranks is not self._ranks:
            return False
        return not registered.draws or registered.seeds == self._seeds()

    def _seeds(self) -> list[int]:
        seeds = []
        for index, group in enumerate(self.param_groups):
            try:
                seeds.append(checks.count("seed", group["seed"], at_least=0))
            except (TypeError, ValueError) as error:
                raise type(error)(f"param group {index}: {error}") from None
        return seeds

    def _create_states(self) -> None:
        """Creates the states of a first step, which is still to come.

        For `torch.distributed.checkpoint.state_dict`, which would have them by a step with
        gradients of zero and a learning rate of zero: that would count, and decay.
        """
        for group, param, layout in self._layouts():
            if not param.requires_grad or param.grad is None or self._state.get(param):
                continue
            state = self._first_state(param, group, layout)
            if state:
                self._state[param].update(state)
                self._unbegun.add(param)

    def _first_state(self, param: Tensor, group: dict[str, Any], layout: Layout) -> dict[str, Any]:
        """All of a parameter's state as before its first step."""
        state = self._initial_state(param, group, self._state_names(group), layout)
        state.update(self._initial_beside(param, layout))
        if self.ema_decay is not None:
            state[EMA] = wrapped(_widened(param), param)
        return state

    def _initial_beside(self, param: Tensor, layout: Layout) -> dict[str, Tensor]:
        """What completes a parameter that has had nothing beside it; empty where nothing does."""
        if layout.beside_key is None:
            return {}
        _, lower = beside_of(_widened(param), layout, local_of(param))
        assert lower is not None
        return {layout.beside_key: wrapped(lower, param)}

    def _full_value(self, param: Tensor, layout: Layout) -> Tensor:
        """The float32 value of a parameter, with the parameter's placements."""
        state = {} if param in self._unbegun else local_state(self._state.get(param, {}))
        return wrapped(full_value(local_of(param), layout, state), param)

    def _extent(self, param: Tensor, layout: Layout) -> Extent:
        """Where a parameter's elements are in the whole tensor, from which random bits follow.

        Raises:
            ValueError: they are where no rule says, and random bits are drawn.
        """
        extent = extent_of(param) if is_sharded(param) else WHOLE
        if extent is None and layout.draws:
            lists = self._param_lists()
            index, i, number = next(at for at in self._places() if lists[at[0]][at[1]] is param)
            raise ValueError(
                f"{label_of(number, self.param_groups[index], i)}: placements: found "
                f"{placements_name(param)} for shape {tuple(param.shape)} and "
                f"strides {tuple(param.stride())} beside {layout}, which draws random bits by the "
                "number of an element; accepted: one piece of the whole, cut in its outermost "
                "dimension and in one other"
            )
        return extent or WHOLE

    def _steps_taken(self) -> list[int]:
        """By each group, as random bits follow from them."""
        return [int(group["schedule_step"]) for group in self.param_groups]

    def _initial_state(
        self, param: Tensor, group: dict[str, Any], names: tuple[str, ...], layout: Layout
    ) -> dict[str, Any]:
        state: dict[str, Any] = {}
        if self._counts:
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
        if self._scalar is not None:
            state[self._scalar] = torch.ones((), dtype=torch.float64, device="cpu")
        local = local_of(param)
        for name in names:
            values = torch.full_like(
                local,
                self._initial_value(name, group),
                dtype=layout.state_dtype or torch.float32,
                memory_format=torch.preserve_format,
                requires_grad=False,
            )
            if layout.state_dtype is None:
                arrays = stored_state(name, values, STATE_KINDS[name], layout)
            else:
                arrays = {name: values}
            state.update(wrapped_state(arrays, param))
        return state

    # --- Checkpoints -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The state as in torch, with schedules as plain data: `schedules.Schedule.describe`.

        Raises:
            RuntimeError: within `swap_ema`.
        """
        self._refuse_swapped("state_dict")
        found = super().state_dict()
        for group in found["param_groups"]:
            for name in OF_ALL_GROUPS & group.keys():
                del group[name]
            if isinstance(group["schedule"], Schedule):
                group["schedule"] = group["schedule"].describe()
            group["schedule_step"] = int(group["schedule_step"])
        if self._positions:
            keys = chain.from_iterable(group["params"] for group in found["param_groups"])
            for key, param in zip(keys, chain.from_iterable(self._param_lists()), strict=True):
                if key in found["state"]:
                    found["state"][key] = self._begun(param)
            found["state"] = {key: state for key, state in found["state"].items() if state}
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this class or of torch's optimizer of the same rule, whole or not.

        States are copied to their parameter's device and into its storage format, whatever format
        they were saved in; nothing is shared with ``state_dict``. Load the model first: what is
        beside a parameter (`FusedOptimizer`, ``precision``) may be converted by its values. States
        of a step still to come, as `torch.distributed.checkpoint` has them, are created anew by
        that step, from the parameter as it is then. Averages are loaded without ``ema_decay`` too,
        with a warning that steps will leave them as they are; so are masters of other values than
        the parameters', with a warning that steps will go on from them.

        Raises:
            ValueError: another algorithm, decay convention, number or size of groups, shape, or a
                value out of range; the optimizer is then as it was.
            RuntimeError: within `swap_ema`.
        """
        self._refuse_swapped("load_state_dict")
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            if replaced is not None:
                state_dict = replaced
        for key in ("param_groups", "state"):
            if key not in state_dict:
                raise ValueError(
                    f"state_dict: found no {key!r}; accepted: an optimizer's state_dict()"
                )
        groups = loaded_groups(self, state_dict["param_groups"])
        states, unbegun = loaded_states(self, state_dict, groups)
        if self.ema_decay is None and any(
            EMA in states.get(param, ()) for group in groups for param in group["params"]
        ):
            warnings.warn(
                "ema_decay: found None beside a state_dict with averages, which steps will leave "
                "as they are; accepted: the decay with which they are to go on",
                stacklevel=2,
            )
        self.__setstate__({"state": states, "param_groups": groups})
        self._unbegun = unbegun
        warn_of_other_masters(self)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _is_plain_sgd(self, group: dict[str, Any]) -> bool:
        """Whether decay by L2 is a factor of the parameter."""
        return False

    def export_fp32_state(self) -> dict[str, Any]:
        """A `state_dict` as torch's optimizer of the rule has it: float32 states, no codes.

        What is beside the parameters is left out; their float32 values are
        `fused_adamw.master_parameters`.
        """
        found = self.state_dict()
        names = [name for name in STATE_KINDS if name in self._known_states]
        left_out = {*map(code_key, names), *map(scale_key, names), *BESIDE_KEYS}
        for key, state in found["state"].items():  # the optimizer's own dicts
            present = states_in(state, names)
            kinds = [STATE_KINDS[name] for name in present]
            kept = {name: value for name, value in state.items() if name not in left_out}
            decoded = decoded_states(local_state(state), present, kinds)
            wrapped_again = {
                name: wrapped(value, state.get(name, state.get(code_key(name))))
                for name, value in decoded.items()
            }
            found["state"][key] = {**kept, **wrapped_again}
        return found

    def memory_report(self) -> MemoryReport:
        """The memory of parameters, gradients and states, as after the first step; it prints.

        Nothing is allocated, so parameters may be on the meta device.
        """
        return memory_report(
            PlannedTensor(
                local_of(param).numel(),
                param.dtype,
                layout,
                len(self._state_names(group)),
                self.ema_decay is not None,
            )
            for group, param, layout in self._layouts()
            if param.requires_grad
        )

    def __repr__(self) -> str:
        """As in torch, then how the parameters are kept."""
        counts: dict[Layout, int] = {}
        for _, param, layout in self._layouts():
            if param.requires_grad:
                counts[layout] = counts.get(layout, 0) + 1
        lines = [f"    {layout} ({count} parameters)" for layout, count in counts.items()]
        return "\n".join([super().__repr__(), "Precision (", *lines, ")"])

    # --- Pickling and copying --------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_swapped("copying or pickling an optimizer")
        kept = {**super().__getstate__(), **{name: getattr(self, name) for name in _KEPT}}
        if self._positions or self._unbegun:
            begun = {
                param: self._begun(param) for param in self._state if param not in self._unbegun
            }
            states = {param: state for param, state in begun.items() if state}
            kept["state"] = defaultdict(dict, states)
        return kept

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._give_up_registered()
        self._known = {}
        if "_measurements" not in self.__dict__:  # a copy
            self._measurements = Measurements()
            self._swapped = False
            self._captured = []
            self.norm_process_groups = ()
        self._unbegun = set()
        self._ranks, self._ranks_known = self.__dict__.get("_ranks"), _NO_RANKS
        self._plans = {}
        self._positions = {}
        self._number = compiled.number_of(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(deepcopy(self.__getstate__(), memo))
        copied.norm_process_groups = self.norm_process_groups
        return copied


def master_parameters(optimizer: FusedOptimizer) -> Iterator[Tensor]:
    """The float32 values of an optimizer's parameters, in order: what its rule works on.

    Copies, of which changes do not reach the optimizer. Where nothing is beside a parameter, or a
    first step is still to come, it is the parameter's own value.

    Raises:
        TypeError: an optimizer of another library.
        RuntimeError: within `FusedOptimizer.swap_ema`, where the parameters are averages.
    """
    if not isinstance(optimizer, FusedOptimizer):
        raise TypeError(
            f"optimizer: found {type(optimizer).__name__}, accepted: an optimizer of fused_adamw"
        )
    optimizer._refuse_swapped("master_parameters")
    return (optimizer._full_value(param, layout) for _, param, layout in optimizer._layouts())


def _asks_for_states() -> bool:
    """Whether a step is called only for the states that it would create."""
    module = sys.modules.get("torch.distributed.checkpoint.state_dict")
    code = getattr(getattr(module, "_init_optim_state", None), "__code__", None)
    frame = sys._getframe()
    for _ in range(_FRAMES_OF_STEP):
        if code is None or frame.f_back is None:
            return False
        frame = frame.f_back
        if frame.f_code is code:
            return True
    return False


def _restore(former: list[tuple[dict[str, Any], Any]]) -> None:
    for group, multiplier in former:
        group["schedule_multiplier"] = multiplier


def _identity(value: Tensor, device: torch.device) -> Any:
    """What tells a tensor of a group from another, to a step on a device."""
    if is_read_on_host(value, device):
        return value.item()
    return value.data_ptr(), value.dtype


def _said(value: Any) -> str:
    """A value for the comparison with other ranks; of a tensor on a device, which is not read."""
    if isinstance(value, Tensor):
        return repr(value.tolist()) if value.device.type == "cpu" else f"a {value.dtype} tensor"
    if isinstance(value, Schedule):
        return repr(value.describe())
    if not isinstance(value, bool) and isinstance(value, numbers.Real):
        value = float(value)  # of whatever type
    text = "a function" if callable(value) else repr(value)
    return f"a {type(value).__name__}" if " at 0x" in text else text  # which is another's elsewhere


def _widened(param: Tensor) -> Tensor:
    return (
        local_of(param).detach().to(torch.float32, copy=True, memory_format=torch.preserve_format)
    )


@torch.no_grad()
def _exchange(param: Tensor, ema: Tensor) -> Tensor | None:
    """Puts the average in the parameter's place; returns what the average has no room for."""
    param, ema = local_of(param), local_of(ema)
    former = param.clone()
    param.copy_(ema)
    if param.dtype != ema.dtype:
        return former
    ema.copy_(former)
    return None


@torch.no_grad()
def _exchange_back(param: Tensor, ema: Tensor, former: Tensor | None) -> None:
    if former is None:
        _exchange(param, ema)
    else:
        local_of(param).copy_(former)


def _is_plain(value: Any) -> bool:
    """Whether a value cannot change in place, as a tensor can."""
    kind = type(value)
    return kind in _PLAIN or (kind is tuple and all(type(item) in _PLAIN for item in value))
