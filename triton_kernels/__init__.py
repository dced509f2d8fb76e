"""The update rules as Triton functions, and one kernel that applies a rule to a list of tensors.

Knows nothing of the rest of the package: torch and triton are its only imports.
"""

from .rules import RULES
from .storage import INTERPRETED
from .update import launch

__all__ = ["INTERPRETED", "RULES", "launch"]
