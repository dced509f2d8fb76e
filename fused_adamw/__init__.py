"""Optimizers whose whole update is one pass over memory, with the same bits on every engine."""

from importlib.util import find_spec

import torch  # noqa: F401  first: the extension then shares torch's OpenMP threads

if find_spec("fused_adamw._C") is None:
    raise ImportError(
        f"fused_adamw: found no extension for this Python in {__path__[0]}; accepted: a folder in "
        "which it was built (pip install -e .), or another working directory than the checkout, "
        "where Python finds what pip install . has installed"
    )

from fused_adamw import _C, functional, schedules
from fused_adamw.adadelta import FusedAdadelta
from fused_adamw.adagrad import FusedAdagrad
from fused_adamw.adam import FusedAdam, FusedAdamProx, FusedAdamW
from fused_adamw.adamax import FusedAdamax
from fused_adamw.engines import available_engines, engine_status
from fused_adamw.lion import FusedLion
from fused_adamw.measurements import GroupTelemetry
from fused_adamw.memory_report import MemoryReport
from fused_adamw.nadam import FusedNadam, FusedNadamW
from fused_adamw.optimizer import FusedOptimizer, master_parameters
from fused_adamw.rmsprop import FusedRMSprop
from fused_adamw.sgd import FusedSGD, FusedSGDW
from fused_adamw.step_in_backward import step_in_backward
from fused_adamw.weight_decay import convert_weight_decay, normalized_weight_decay

__version__: str = _C.VERSION
# The dtypes (parameter, gradient, states) that may stand together.
FORMATS: tuple[tuple[str, str, str], ...] = _C.FORMATS
__all__ = [
    "FORMATS",
    "FusedAdadelta",
    "FusedAdagrad",
    "FusedAdam",
    "FusedAdamProx",
    "FusedAdamW",
    "FusedAdamax",
    "FusedLion",
    "FusedNadam",
    "FusedNadamW",
    "FusedOptimizer",
    "FusedRMSprop",
    "FusedSGD",
    "FusedSGDW",
    "GroupTelemetry",
    "MemoryReport",
    "available_engines",
    "convert_weight_decay",
    "engine_status",
    "functional",
    "master_parameters",
    "normalized_weight_decay",
    "schedules",
    "step_in_backward",
]
