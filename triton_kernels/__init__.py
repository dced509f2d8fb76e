"""The update rules as Triton functions, and kernels over a list of tensors: step, squared norm.

Knows nothing of the rest of the package: torch and triton are its only imports.
"""

from .formats import Format
from .norm import launch_norm
from .rules import RULES
from .storage import INTERPRETED
from .tables import TensorList
from .update import launch

__all__ = ["INTERPRETED", "RULES", "Format", "TensorList", "launch", "launch_norm"]
