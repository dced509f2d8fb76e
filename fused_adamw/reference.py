"""NumPy reference of a step: the judge of truth in float64, of bits in float32.

Written from the papers and from the arithmetic contract alone, with NumPy as its only import, so
that it shares no code with the engines it is there to check. In float64 a rule gives the truth, in
float32 the very bits that each engine must return, since NumPy rounds each ``+ - * /`` and square
root on its own.

A rule is one function: of `number`, which rounds a coefficient once from binary64 to the computing
dtype, of the param, its gradient and its states, and of the hyperparameters. It returns the new
param and states. The arrays may be anything that has the operators and NumPy's functions: tests
pass numbers that carry a bound of their error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array: TypeAlias = NDArray[Any]
Precision: TypeAlias = type[np.float32] | type[np.float64]
Number: TypeAlias = Callable[[float], Any]

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


# --- What rules share ----------------------------------------------------------------------------


def power(base: float, exponent: int) -> float:
    """``base**exponent`` by repeated squaring in binary64, whose bits no math library decides."""
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


class Decayed(NamedTuple):
    """Decay as factors: of what is added to the gradient, of the parameter, of the step."""

    l2: float
    keep: float
    step: float


def decayed(decay: str, lr: float, schedule_multiplier: float, weight_decay: float) -> Decayed:
    """The four conventions; ``adamw`` says what they are."""
    if decay == "lr":
        return Decayed(0.0, 1.0 - schedule_multiplier * lr * weight_decay, 1.0)
    if decay == "decoupled":
        return Decayed(0.0, 1.0 - schedule_multiplier * weight_decay, 1.0)
    if decay == "l2":
        return Decayed(weight_decay, 1.0, 1.0)
    if decay == "proximal":
        keep = 1.0 / (1.0 + schedule_multiplier * weight_decay)
        return Decayed(0.0, keep, keep)
    raise ValueError(f'decay is {decay!r}; accepted: "lr", "decoupled", "l2", "proximal"')


def _effective(number: Number, grad: Any, param: Any, maximize: bool, l2: float) -> Any:
    """The gradient of the right sign, with decay by L2."""
    g = number(-1.0 if maximize else 1.0) * grad
    # Where there is no decay an infinite parameter must not make a NaN of the gradient.
    return g if number(l2) == number(0.0) else g + number(l2) * param


def _larger(x: Any, y: Any) -> Any:
    """The larger of two, the second of two zeros; a NaN stays visible."""
    if isinstance(x, np.ndarray):
        return np.where((x > y) | np.isnan(x), x, y)
    return np.maximum(x, y)  # which does not say which of two zeros it takes


def _sign(x: Any) -> Any:
    """1, -1 or x itself, which is a zero or a NaN."""
    if isinstance(x, np.ndarray):
        one = x.dtype.type(1)
        return np.where(x > 0, one, np.where(x < 0, -one, x))
    return np.sign(x)


# --- Adam family ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class AdamCoefficients:
    """The scalars of one step of the Adam family, each rounded once to the computing dtype.

    ``param <- d * param - (a * exp_avg + b * grad) / (sqrt(exp_avg_sq) + eps)``

    To maximize, ``l2``, ``c1`` and ``b`` are negative, which is exactly a gradient of the other
    sign.
    """

    l2: Any
    b1: Any
    c1: Any
    b2: Any
    c2: Any
    eps: Any
    d: Any
    a: Any
    b: Any


def adam_coefficients(
    number: Number,
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
) -> AdamCoefficients:
    """Computes the coefficients in binary64 and rounds each once; see `adamw` for the arguments."""
    root = math.sqrt(1.0 - power(beta2, step))
    factors = decayed(decay, lr, schedule_multiplier, weight_decay)
    sign = -1.0 if maximize else 1.0
    with np.errstate(all="ignore"):
        return AdamCoefficients(
            l2=number(sign * factors.l2),
            b1=number(beta1),
            c1=number(sign * (1.0 - beta1)),
            b2=number(beta2),
            c2=number(1.0 - beta2),
            eps=number(eps * root),
            d=number(factors.keep),
            a=number(schedule_multiplier * lr * root / (1.0 - power(beta1, step)) * factors.step),
            b=number(0.0),
        )


def _adam_update(
    k: AdamCoefficients,
    adds_decay: bool,
    nesterov: bool,
    param: Any,
    grad: Any,
    exp_avg: Any,
    exp_avg_sq: Any,
    max_exp_avg_sq: Any = None,
) -> tuple[Any, ...]:
    """Algorithm 2 of arXiv 1711.05101, rearranged; the line numbers are the paper's."""
    p, g, m, v = param, grad, exp_avg, exp_avg_sq
    if adds_decay:
        g = g + k.l2 * p  # line 6
    m = k.b1 * m + k.c1 * g  # line 7
    v = k.b2 * v + (k.c2 * g) * g  # line 8
    w = v if max_exp_avg_sq is None else _larger(v, max_exp_avg_sq)
    step = k.a * m
    if nesterov:
        step = step + k.b * g
    p = k.d * p - step / (np.sqrt(w) + k.eps)  # lines 9 to 12
    return (p, m, v) if max_exp_avg_sq is None else (p, m, v, w)


def adam(
    number: Number,
    *arrays: Any,
    amsgrad: bool = False,
    **hyperparameters: Any,
) -> tuple[Any, ...]:
    """AdamW, Adam with L2, AdamProx, AMSGrad; `adamw` says what the hyperparameters are.

    Args:
        number: see the first lines of this file.
        arrays: param, grad, exp_avg, exp_avg_sq and, with amsgrad, max_exp_avg_sq.
        amsgrad: whether the running maximum of the second moment divides.
        hyperparameters: those of `adam_coefficients`.
    """
    k = adam_coefficients(number, **hyperparameters)
    adds_decay = hyperparameters["decay"] == "l2" and hyperparameters["weight_decay"] != 0.0
    return _adam_update(k, adds_decay, False, *arrays[: 5 if amsgrad else 4])


def power_of_0_96(x: float) -> float:
    """``0.96**x`` for x >= 0 by ``+ - *`` in binary64, within 2 ulp; 0 from x = 17353.

    With L = -log2(0.96) as high + low and x = n + f, n and k integers, it is 2^-k 2^-r where
    k + r = n high + (n low + f L). high has 38 bits: n high is exact, and so is n high - k.
    """
    if not x < 17353.0:  # from where on it is below 2^-1021.98, about to leave the normal numbers
        return 0.0
    high, low = 0.05889368905354786, 2.0708019785826723e-14
    n = math.floor(x)
    k = math.floor(n * high + 0.5)
    r = (n * high - k) + (n * low + (x - n) * (high + low))
    z = r * 0.6931471805599453  # log(2)
    exponential = 0.0  # of -z
    for i in range(14, -1, -1):
        exponential = 1.0 / math.factorial(i) - z * exponential
    return power(0.5, k) * exponential


def momentum_schedule(beta1: float, momentum_decay: float, step: int) -> float:
    """mu_t of Dozat's Nadam: ``beta1 (1 - 0.96^(t psi) / 2)``."""
    return beta1 * (1.0 - 0.5 * power_of_0_96(step * momentum_decay))


def nadam(
    number: Number,
    param: Any,
    grad: Any,
    exp_avg: Any,
    exp_avg_sq: Any,
    *,
    step: int,
    scalar: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    schedule_multiplier: float,
    decay: str,
    momentum_decay: float,
    scheduled_average: bool,
    maximize: bool,
) -> tuple[Any, ...]:
    """Nadam of Dozat, Incorporating Nesterov Momentum into Adam (2016), and NadamW.

    Args beside those of `adamw`:
        scalar: the product of mu_1 to mu_{t-1}.
        momentum_decay: psi in the schedule of mu_t.
        scheduled_average: whether the first moment is averaged with mu_t, as in the paper, or with
            beta1, as in torch.
    """
    mu = momentum_schedule(beta1, momentum_decay, step)
    following = momentum_schedule(beta1, momentum_decay, step + 1)
    product = scalar * mu
    average = mu if scheduled_average else beta1
    root = math.sqrt(1.0 - power(beta2, step))
    factors = decayed(decay, lr, schedule_multiplier, weight_decay)
    rate = schedule_multiplier * lr * root * factors.step
    sign = -1.0 if maximize else 1.0
    k = AdamCoefficients(
        l2=number(sign * factors.l2),
        b1=number(average),
        c1=number(sign * (1.0 - average)),
        b2=number(beta2),
        c2=number(1.0 - beta2),
        eps=number(eps * root),
        d=number(factors.keep),
        a=number(rate * following / (1.0 - product * following)),
        b=number(sign * (rate * (1.0 - mu) / (1.0 - product))),
    )
    adds_decay = decay == "l2" and weight_decay != 0.0
    return _adam_update(k, adds_decay, True, param, grad, exp_avg, exp_avg_sq)


# --- The other rules -----------------------------------------------------------------------------


def sgd(
    number: Number,
    param: Any,
    grad: Any,
    momentum_buffer: Any = None,
    *,
    step: int,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    schedule_multiplier: float,
    decay: str,
    nesterov: bool,
    lr_in_momentum: bool,
    maximize: bool,
) -> tuple[Any, ...]:
    """Algorithm 1 of arXiv 1711.05101 (SGDW, SGD with L2), and torch.optim.SGD.

    Args beside those of `adamw`:
        momentum: mu; beta1 in the paper.
        dampening: of what enters the buffer after the first step.
        nesterov: whether the step looks ahead by mu times the buffer.
        lr_in_momentum: whether eta times lr is inside the buffer, as in the paper's line 8.
    """
    factors = decayed(decay, lr, schedule_multiplier, weight_decay)
    rate = schedule_multiplier * lr
    inside, outside = (rate, 1.0) if lr_in_momentum and momentum != 0.0 else (1.0, rate)
    g = _effective(number, grad, param, maximize, factors.l2)  # line 6
    d, a = number(factors.keep), number(outside * factors.step)
    if momentum == 0.0:
        return (d * param - a * g,)
    mu = number(momentum)
    m = mu * momentum_buffer + number(inside if step == 1 else inside * (1.0 - dampening)) * g
    u = number(inside) * g + mu * m if nesterov else m
    return d * param - a * u, m  # line 9


def rmsprop(
    number: Number,
    param: Any,
    grad: Any,
    square_avg: Any,
    *others: Any,
    step: int,
    lr: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    momentum: float,
    centered: bool,
    schedule_multiplier: float,
    decay: str,
    maximize: bool,
) -> tuple[Any, ...]:
    """RMSprop (Hinton, lecture 6, 2012), centered (Graves, arXiv 1308.0850), with momentum.

    Args beside those of `adamw`:
        others: grad_avg where centered, then momentum_buffer where there is momentum.
        alpha: the smoothing factor.
        momentum: of the buffer of quotients.
        centered: whether the squared mean of the gradient is subtracted from its second moment.
    """
    factors = decayed(decay, lr, schedule_multiplier, weight_decay)
    rho, c = number(alpha), number(1.0 - alpha)
    g = _effective(number, grad, param, maximize, factors.l2)
    n = variance = rho * square_avg + (c * g) * g
    states = [n]
    if centered:
        mean = rho * others[0] + c * g
        variance = _larger(n - mean * mean, number(0.0))  # rounding may take it below
        states.append(mean)
    scaled = np.sqrt(variance) + number(eps)
    d, a = number(factors.keep), number(schedule_multiplier * lr * factors.step)
    if momentum == 0.0:
        return (d * param - (a * g) / scaled, *states)
    buffer = number(momentum) * others[-1] + g / scaled
    return (d * param - a * buffer, *states, buffer)


def adagrad(
    number: Number,
    param: Any,
    grad: Any,
    sum: Any,
    *,
    step: int,
    lr: float,
    lr_decay: float,
    weight_decay: float,
    eps: float,
    schedule_multiplier: float,
    decay: str,
    maximize: bool,
) -> tuple[Any, ...]:
    """Adagrad (Duchi, Hazan & Singer, 2011) with torch's eps, which is outside the root.

    Args beside those of `adamw`:
        lr_decay: the learning rate is divided by 1 + (t - 1) lr_decay.
    """
    lr = lr / (1.0 + (step - 1) * lr_decay)
    factors = decayed(decay, lr, schedule_multiplier, weight_decay)
    g = _effective(number, grad, param, maximize, factors.l2)
    total = sum + g * g
    a = number(schedule_multiplier * lr * factors.step)
    return number(factors.keep) * param - (a * g) / (np.sqrt(total) + number(eps)), total


def adadelta(
    number: Number,
    param: Any,
    grad: Any,
    square_avg: Any,
    acc_delta: Any,
    *,
    step: int,
    lr: float,
    rho: float,
    eps: float,
    weight_decay: float,
    schedule_multiplier: float,
    decay: str,
    maximize: bool,
) -> tuple[Any, ...]:
    """Adadelta (Zeiler, arXiv 1212.5701, Algorithm 1), whose line numbers are given.

    Args beside those of `adamw`:
        rho: decay of both averages.
    """
    factors = decayed(decay, lr, schedule_multiplier, weight_decay)
    r, c, e = number(rho), number(1.0 - rho), number(eps)
    g = _effective(number, grad, param, maximize, factors.l2)
    n = r * square_avg + (c * g) * g  # line 4
    delta = (np.sqrt(acc_delta + e) / np.sqrt(n + e)) * g  # line 5
    acc = r * acc_delta + (c * delta) * delta  # line 6
    a = number(schedule_multiplier * lr * factors.step)
    return number(factors.keep) * param - a * delta, n, acc  # line 7


def adamax(
    number: Number,
    param: Any,
    grad: Any,
    exp_avg: Any,
    exp_inf: Any,
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    schedule_multiplier: float,
    decay: str,
    maximize: bool,
) -> tuple[Any, ...]:
    """Adamax (Kingma & Ba, arXiv 1412.6980, Algorithm 2) with torch's eps, added to |g|."""
    factors = decayed(decay, lr, schedule_multiplier, weight_decay)
    g = _effective(number, grad, param, maximize, factors.l2)
    m = number(beta1) * exp_avg + number(1.0 - beta1) * g
    u = _larger(np.abs(g) + number(eps), number(beta2) * exp_inf)
    a = number(schedule_multiplier * lr / (1.0 - power(beta1, step)) * factors.step)
    return number(factors.keep) * param - (a * m) / u, m, u


def lion(
    number: Number,
    param: Any,
    grad: Any,
    exp_avg: Any,
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    schedule_multiplier: float,
    decay: str,
    maximize: bool,
) -> tuple[Any, ...]:
    """Lion (Chen et al., arXiv 2302.06675, Algorithm 2)."""
    factors = decayed(decay, lr, schedule_multiplier, weight_decay)
    g = _effective(number, grad, param, maximize, factors.l2)
    direction = _sign(number(beta1) * exp_avg + number(1.0 - beta1) * g)
    m = number(beta2) * exp_avg + number(1.0 - beta2) * g
    a = number(schedule_multiplier * lr * factors.step)
    return number(factors.keep) * param - a * direction, m


RULES: dict[str, Callable[..., tuple[Any, ...]]] = {
    "adam": adam,
    "nadam": nadam,
    "sgd": sgd,
    "rmsprop": rmsprop,
    "adagrad": adagrad,
    "adadelta": adadelta,
    "adamax": adamax,
    "lion": lion,
}
"""The rules by the name that the extension knows them by."""

CARRIES = frozenset({"nadam"})
"""Those that take a ``scalar``, which they carry from step to step."""


def update(
    rule: str,
    *arrays: ArrayLike,
    dtype: Precision = np.float32,
    grad_factor: float = 1.0,
    **hyperparameters: Any,
) -> tuple[Array, ...]:
    """One step of a rule.

    Args:
        rule: a key of `RULES`.
        arrays: param, grad and the states, of one shape.
        dtype: what all the arithmetic is done in; the arrays are converted to it first.
        grad_factor: what unscales and clips the gradient, which is multiplied by it before the
            rule sees it; see `clip`.
        hyperparameters: those of the rule, and ``step``, the number of this step, from 1.

    Returns:
        The new param and states.
    """
    shape = np.shape(arrays[0])
    with np.errstate(all="ignore"):
        # Of one dimension at least: NumPy makes scalars of what has none.
        param, grad, *states = [np.atleast_1d(np.asarray(array, dtype)) for array in arrays]
        scaled = grad * dtype(grad_factor)
        updated = RULES[rule](dtype, param, scaled, *states, **hyperparameters)
    return tuple(array.reshape(shape) for array in updated)


# --- What else a step does -----------------------------------------------------------------------


def ema(
    average: ArrayLike, param: ArrayLike, weight: float, dtype: Precision = np.float32
) -> Array:
    """The exponential moving average of a parameter after a step: ``torch.lerp``.

    Args:
        average: the average so far, any shape.
        param: the new param as it is stored, of the same shape.
        weight: that of the new param, 1 - decay; rounded to the computing dtype first.
        dtype: what all the arithmetic is done in; the arrays are converted to it first.

    Returns:
        The new average.
    """
    e: Array = np.asarray(average, dtype)
    theta: Array = np.asarray(param, dtype)
    w: Any = dtype(weight)
    with np.errstate(all="ignore"):
        if w == 1:
            return theta.copy()
        if w < 0.5:
            return np.asarray(e + w * (theta - e))
        return np.asarray(theta - (dtype(1) - w) * (theta - e))


# [note: squared norm]
# Sums are cut and folded in a fixed way, so that neither threads nor launches decide a bit. All is
# in float64, where the square of a float32 is exact. A sum of squares is never -0, so that a zero
# stands for an element that is not there: adding it changes nothing.
NORM_CHUNK, NORM_SEGMENT, NORM_LANES = 16384, 2048, 32
GROUP_LANES = 256


def _fold_halves(lanes: NDArray[np.float64]) -> NDArray[np.float64]:
    """The sums over the last axis, a power of two: its upper half is added to its lower half."""
    while (half := lanes.shape[-1] // 2) > 0:
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]


def squared_norm_partials(grad: Array, dtype: str) -> NDArray[np.float64]:
    """The sums of squares of a gradient's chunks of 16384 elements; see [note: squared norm].

    A chunk has 8 segments of 2048, which are summed in 32 lanes, of every 32nd element each.

    Args:
        grad: stored gradient, of any shape; its elements are cut in C order.
        dtype: how it is stored; a key of ``STORAGE_DTYPES``.

    Returns:
        Array [ceil(elements / 16384)].
    """
    chunks = -(-grad.size // NORM_CHUNK)
    with np.errstate(all="ignore"):
        x = load(grad.reshape(-1), dtype).astype(np.float64)
        x = np.pad(x, (0, chunks * NORM_CHUNK - x.size))
        x = x.reshape(chunks, NORM_CHUNK // NORM_SEGMENT, NORM_SEGMENT // NORM_LANES, NORM_LANES)
        lanes = np.zeros((*x.shape[:2], NORM_LANES))
        for row in range(x.shape[2]):
            lanes = lanes + x[:, :, row] * x[:, :, row]
        segments = _fold_halves(lanes)
        partials = segments[:, 0]
        for segment in range(1, segments.shape[1]):
            partials = partials + segments[:, segment]
    return partials


def squared_norm(partials: NDArray[np.float64]) -> float:
    """The squared norm of a param group's gradients; see [note: squared norm].

    Args:
        partials: those of all its gradients, one after the other in the order of the parameters.
    """
    rows = -(-partials.size // GROUP_LANES)
    padded = np.pad(partials, (0, rows * GROUP_LANES - partials.size))
    lanes = np.zeros(GROUP_LANES)
    with np.errstate(all="ignore"):
        for row in padded.reshape(rows, GROUP_LANES):
            lanes = lanes + row
        return float(_fold_halves(lanes))


def observed(
    grad: NDArray[np.float32], before: NDArray[np.float32], after: NDArray[np.float32]
) -> NDArray[np.float64]:
    """What a step tells of each chunk of a parameter, as it is stored.

    Args:
        grad: its gradient, any shape.
        before: the parameter before the step, of the same shape.
        after: and after it.

    Returns:
        Array [chunks, 5]: the sums of squares of the gradient, of the change and of the parameter
        after the step; the number of gradients that are not finite; the number of elements that
        the step left as they were though their gradient is not zero.
    """
    with np.errstate(all="ignore"):
        change = after - before
    lost = (before == after) & (grad != 0)
    return np.stack(
        [
            squared_norm_partials(array.astype(np.float32), "float32")
            for array in (grad, change, after, ~np.isfinite(grad), lost)
        ],
        axis=1,
    )


class Clipped(NamedTuple):
    """The norm of the unscaled gradients, and what to multiply each by to unscale and clip it."""

    norm: float
    grad_factor: np.float32


def clip(
    squared_norms: Iterable[float], max_grad_norm: float | None = None, grad_scale: float = 1.0
) -> Clipped:
    """``torch.nn.utils.clip_grad_norm_`` of gradients that are divided by ``grad_scale`` first.

    All in float64, the factor rounded once. The norm is reported in float32: one beyond its range
    counts as infinite.

    Args:
        squared_norms: of each param group's gradients as they are stored, in order.
        max_grad_norm: the norm to clip to; None does not clip.
        grad_scale: the factor the loss was multiplied by.
    """
    total = np.float64(0)
    with np.errstate(all="ignore"):
        for squared in squared_norms:
            total = total + np.float64(squared)
        norm = np.sqrt(total) / np.float64(grad_scale)
        if np.isinf(np.float32(norm)):
            norm = np.float64(np.inf)
        coefficient = np.float64(1)
        if max_grad_norm is not None:
            ratio = np.float64(max_grad_norm) / (norm + np.float64(1e-6))
            if ratio < 1 or np.isnan(ratio):
                coefficient = ratio
        return Clipped(float(norm), np.float32(coefficient / np.float64(grad_scale)))


class AdamArrays(NamedTuple):
    """What a step of `adamw` returns: new arrays in the computing dtype."""

    param: Array
    exp_avg: Array
    exp_avg_sq: Array
    max_exp_avg_sq: Array | None


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
    maxima = [] if max_exp_avg_sq is None else [max_exp_avg_sq]
    updated: list[Any] = list(
        update(
            "adam",
            *(param, grad, exp_avg, exp_avg_sq, *maxima),
            dtype=dtype,
            amsgrad=bool(maxima),
            step=step,
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decay=weight_decay,
            schedule_multiplier=schedule_multiplier,
            decay=decay,
            maximize=maximize,
        )
    )
    return AdamArrays(*updated, *([] if maxima else [None]))


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
