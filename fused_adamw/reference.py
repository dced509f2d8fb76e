"""NumPy reference of the update rules: the judge of truth in float64, of bits in float32.

Written from the papers and from the arithmetic contract alone, with NumPy as its only import, so
that it shares no code with the engines it is there to check. Every rule takes a ``dtype``: float64
gives the truth, float32 the very bits that each engine must return, since NumPy rounds each
``+ - * /`` and square root on its own.

A family of rules is a dataclass of coefficients, a function that computes them from the
hyperparameters and the step, and a function that applies them to arrays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array: TypeAlias = NDArray[Any]
Precision: TypeAlias = type[np.float32] | type[np.float64]

# --- Storage: how a number lives in memory -------------------------------------------------------

STORAGE_DTYPES: dict[str, type[np.float32] | type[np.float16] | type[np.uint16]] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": np.uint16,  # NumPy has no bfloat16: its bit pattern, the upper half of a float32
}


def load(stored: Array, dtype: str) -> NDArray[np.float32]:
    """Widens stored numbers to float32, which is exact.

    Args:
        stored: array of ``STORAGE_DTYPES[dtype]``.
        dtype: a key of ``STORAGE_DTYPES``.
    """
    if dtype == "bfloat16":
        return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return stored.astype(np.float32)


def store(values: NDArray[np.float32], dtype: str) -> Array:
    """Rounds float32 values to nearest, ties to even; keeps denormals; stores any NaN as quiet.

    Args:
        values: array of float32; of no other dtype, since that would be rounded twice.
        dtype: a key of ``STORAGE_DTYPES``.

    Returns:
        New array of ``STORAGE_DTYPES[dtype]``.
    """
    if dtype == "bfloat16":
        bits = values.view(np.uint32)
        ties_to_even = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        rounded = ((bits + ties_to_even) >> np.uint32(16)).astype(np.uint16)
        return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)
    with np.errstate(all="ignore"):
        narrowed = values.astype(STORAGE_DTYPES[dtype])
    # A conversion in software may cut a NaN's payload down to a signalling one.
    return np.where(np.isnan(narrowed), narrowed.dtype.type(np.nan), narrowed)


# --- Adam family ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class AdamCoefficients:
    """The scalars of one step of the Adam family, each rounded once to the computing dtype.

    ``param <- d * param - (a * exp_avg) / (sqrt(exp_avg_sq) + eps)``

    To maximize, ``l2`` and ``c1`` are negative, which is exactly a gradient of the other sign.
    """

    l2: np.floating[Any]
    b1: np.floating[Any]
    c1: np.floating[Any]
    b2: np.floating[Any]
    c2: np.floating[Any]
    eps: np.floating[Any]
    d: np.floating[Any]
    a: np.floating[Any]


class AdamArrays(NamedTuple):
    """What a step of the Adam family returns: new arrays in the computing dtype."""

    param: Array
    exp_avg: Array
    exp_avg_sq: Array
    max_exp_avg_sq: Array | None


def power(base: float, exponent: int) -> float:
    """``base**exponent`` by repeated squaring in binary64, whose bits no math library decides."""
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


def adam_coefficients(
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    schedule_multiplier: float = 1.0,
    decay: str = "lr",
    maximize: bool = False,
    dtype: Precision = np.float32,
) -> AdamCoefficients:
    """Computes the coefficients in binary64 and rounds each once; see `adamw` for the arguments."""
    alpha = schedule_multiplier * lr
    root_bias2 = math.sqrt(1.0 - power(beta2, step))
    a = alpha * root_bias2 / (1.0 - power(beta1, step))
    sign = -1.0 if maximize else 1.0
    l2 = 0.0
    if decay == "lr":
        d = 1.0 - alpha * weight_decay
    elif decay == "decoupled":
        d = 1.0 - schedule_multiplier * weight_decay
    elif decay == "l2":
        d = 1.0
        l2 = weight_decay
    elif decay == "proximal":
        d = 1.0 / (1.0 + schedule_multiplier * weight_decay)
        a *= d
    else:
        raise ValueError(f'decay is {decay!r}; accepted: "lr", "decoupled", "l2", "proximal"')
    with np.errstate(all="ignore"):
        return AdamCoefficients(
            l2=dtype(sign * l2),
            b1=dtype(beta1),
            c1=dtype(sign * (1.0 - beta1)),
            b2=dtype(beta2),
            c2=dtype(1.0 - beta2),
            eps=dtype(eps * root_bias2),
            d=dtype(d),
            a=dtype(a),
        )


def adamw(
    param: ArrayLike,
    grad: ArrayLike,
    exp_avg: ArrayLike,
    exp_avg_sq: ArrayLike,
    max_exp_avg_sq: ArrayLike | None = None,
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    schedule_multiplier: float = 1.0,
    decay: str = "lr",
    maximize: bool = False,
    dtype: Precision = np.float32,
) -> AdamArrays:
    """One step of Algorithm 2 of Loshchilov & Hutter, arXiv 1711.05101, rearranged.

    The bias corrections of lines 9 and 10 go into the coefficients ``a`` and ``eps``, which leaves
    one division and one square root an element. `algorithm_2` is the literal form.

    Args:
        param: the parameter, any shape.
        grad: its gradient, of the same shape, as are the states.
        exp_avg: first moment.
        exp_avg_sq: second moment.
        max_exp_avg_sq: running maximum of the second moment; given, it turns AMSGrad on.
        step: number of this step, counted from 1.
        lr: learning rate, alpha in the paper.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: term added outside the square root.
        weight_decay: lambda in the paper, with the meaning that ``decay`` gives it.
        schedule_multiplier: eta in the paper.
        decay: "lr" (torch.optim.AdamW), "decoupled" (the paper), "l2" (Adam with L2) or
            "proximal" (AdamProx, Zhuang et al., arXiv 2202.00089).
        maximize: climb instead of descend: the gradient changes its sign before anything else.
        dtype: what all the arithmetic is done in; the inputs are converted to it first.

    Raises:
        ValueError: ``decay`` is unknown.
    """
    k = adam_coefficients(
        step=step,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        schedule_multiplier=schedule_multiplier,
        decay=decay,
        maximize=maximize,
        dtype=dtype,
    )
    with np.errstate(all="ignore"):
        arrays: list[Array] = [np.asarray(x, dtype) for x in (param, grad, exp_avg, exp_avg_sq)]
        p, g, m, v = arrays
        if decay == "l2" and weight_decay != 0.0:
            g = g + k.l2 * p  # line 6
        m = k.b1 * m + k.c1 * g  # line 7
        v = k.b2 * v + (k.c2 * g) * g  # line 8
        x = None
        if max_exp_avg_sq is not None:
            x = np.asarray(max_exp_avg_sq, dtype)
            x = np.where((v > x) | np.isnan(v), v, x)
        w = v if x is None else x
        p = k.d * p - (k.a * m) / (np.sqrt(w) + k.eps)  # lines 9 to 12
    return AdamArrays(np.asarray(p), np.asarray(m), np.asarray(v), x)


def algorithm_2(
    param: ArrayLike,
    grad: ArrayLike,
    exp_avg: ArrayLike,
    exp_avg_sq: ArrayLike,
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    schedule_multiplier: float = 1.0,
    decay: Literal["l2", "decoupled"] = "decoupled",
) -> AdamArrays:
    """Algorithm 2 of arXiv 1711.05101 in float64, line by line, in the paper's notation.

    It is there to check the rearranged form in `adamw`, whose arguments it shares. The paper's two
    variants are "l2" (Adam, the decay of line 6) and "decoupled" (AdamW, that of line 12).
    """
    theta, g, m, v = (np.asarray(x, np.float64) for x in (param, grad, exp_avg, exp_avg_sq))
    alpha, lambda_, t = lr, weight_decay, step
    if decay == "l2":
        g = g + lambda_ * theta  # line 6
    m = beta1 * m + (1 - beta1) * g  # line 7
    v = beta2 * v + (1 - beta2) * g**2  # line 8
    m_hat = m / (1 - beta1**t)  # line 9
    v_hat = v / (1 - beta2**t)  # line 10
    eta = schedule_multiplier  # line 11
    decayed = lambda_ * theta if decay == "decoupled" else 0.0
    theta = theta - eta * (alpha * m_hat / (np.sqrt(v_hat) + eps) + decayed)  # line 12
    return AdamArrays(theta, m, v, None)
