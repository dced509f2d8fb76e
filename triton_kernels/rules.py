"""The update rules: float32 blocks in, float32 blocks out; no pointers, no dtypes, no masks.

A rule is called as ``rule(param, grad, states, coefficients, OPTIONS)`` and returns the new param
and the tuple of new states. The coefficients are scalars, uniform in a step. The options are known
when the kernel is compiled, so that one that is off costs nothing and cannot make a NaN of an
infinity through a multiplication by zero.

Every operation is rounded on its own and done in the order written: division and square root are
``div_rn`` and ``sqrt_rn``, and the kernel is compiled without fused multiply-add.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def effective(sign, l2, grad, param):
    """The gradient of the right sign, with decay by L2.

    Where there is none, an infinite parameter must not make a NaN of it.
    """
    g = sign * grad
    return tl.where(l2 != 0, g + l2 * param, g)


@triton.jit
def larger(x, y):
    """The larger of two, the second of two zeros; a NaN stays visible."""
    return tl.where((x > y) | (x != x), x, y)


@triton.jit
def adam(param, grad, states, coefficients, OPTIONS: tl.constexpr):
    """AdamW, Adam with L2, AdamProx, AMSGrad, Nadam.

    Loshchilov & Hutter, arXiv 1711.05101, Algorithm 2, whose line numbers are given; Dozat,
    Incorporating Nesterov Momentum into Adam.

    Args:
        param: the parameter.
        grad: its gradient.
        states: exp_avg, exp_avg_sq and, with AMSGrad, max_exp_avg_sq.
        coefficients: see the first line; d is what decay leaves of the parameter, eps, a and b have
            the bias corrections in them, and to maximize l2, c1 and b are negative.
        OPTIONS: three bool: weight decay is added to the gradient; AMSGrad; Nesterov's term.
    """
    l2, b1, c1, b2, c2, eps, d, a, b = coefficients
    L2: tl.constexpr = OPTIONS[0]
    AMSGRAD: tl.constexpr = OPTIONS[1]
    NESTEROV: tl.constexpr = OPTIONS[2]

    g = grad
    if L2:
        g = g + l2 * param  # line 6

    m = b1 * states[0] + c1 * g  # line 7
    v = b2 * states[1] + (c2 * g) * g  # line 8

    w = v
    updated = (m, v)
    if AMSGRAD:
        w = larger(v, states[2])
        updated = (m, v, w)  # type: ignore[assignment]

    # Lines 9, 10 and 12, with the bias corrections and eta * lr folded into a, b and eps.
    step = a * m
    if NESTEROV:
        step = step + b * g
    return d * param - tl.div_rn(step, tl.sqrt_rn(w) + eps), updated


@triton.jit
def sgd(param, grad, states, coefficients, OPTIONS: tl.constexpr):
    """SGDW, SGD with L2. Loshchilov & Hutter, arXiv 1711.05101, Algorithm 1; torch.optim.SGD.

    Args:
        param: the parameter.
        grad: its gradient.
        states: momentum_buffer, where there is momentum.
        coefficients: see the first line.
        OPTIONS: two bool: momentum; Nesterov's.
    """
    sign, l2, momentum, c, ahead, d, a = coefficients
    MOMENTUM: tl.constexpr = OPTIONS[0]
    NESTEROV: tl.constexpr = OPTIONS[1]

    g = effective(sign, l2, grad, param)  # line 6
    u = g
    updated = ()
    if MOMENTUM:
        m = momentum * states[0] + c * g  # line 8
        u = m
        if NESTEROV:
            u = ahead * g + momentum * m
        updated = (m,)  # type: ignore[assignment]
    return d * param - a * u, updated  # line 9


@triton.jit
def rmsprop(param, grad, states, coefficients, OPTIONS: tl.constexpr):
    """RMSprop. Hinton, lecture 6 (2012); Graves, arXiv 1308.0850.

    Args:
        param: the parameter.
        grad: its gradient.
        states: square_avg; grad_avg where centered; momentum_buffer where there is momentum.
        coefficients: see the first line.
        OPTIONS: two bool: centered; momentum.
    """
    sign, l2, rho, c, eps, momentum, d, a = coefficients
    CENTERED: tl.constexpr = OPTIONS[0]
    MOMENTUM: tl.constexpr = OPTIONS[1]

    g = effective(sign, l2, grad, param)
    n = rho * states[0] + (c * g) * g
    variance = n
    updated = (n,)
    if CENTERED:
        mean = rho * states[1] + c * g
        variance = n - mean * mean
        variance = tl.where(variance < 0, 0.0, variance)  # rounding may take it below
        updated = updated + (mean,)  # type: ignore[assignment]  # noqa: RUF005
    scaled = tl.sqrt_rn(variance) + eps
    if MOMENTUM:
        buffer = momentum * states[len(updated)] + tl.div_rn(g, scaled)
        return d * param - a * buffer, updated + (buffer,)  # noqa: RUF005
    else:  # noqa: RET505 (Triton compiles both returns where it sees no alternative)
        return d * param - tl.div_rn(a * g, scaled), updated


@triton.jit
def adagrad(param, grad, states, coefficients, OPTIONS: tl.constexpr):
    """Adagrad. Duchi, Hazan & Singer (2011).

    Args:
        param: the parameter.
        grad: its gradient.
        states: sum.
        coefficients: see the first line.
        OPTIONS: none.
    """
    sign, l2, eps, d, a = coefficients
    g = effective(sign, l2, grad, param)
    total = states[0] + g * g
    return d * param - tl.div_rn(a * g, tl.sqrt_rn(total) + eps), (total,)


@triton.jit
def adadelta(param, grad, states, coefficients, OPTIONS: tl.constexpr):
    """Adadelta. Zeiler, arXiv 1212.5701, Algorithm 1, whose line numbers are given.

    Args:
        param: the parameter.
        grad: its gradient.
        states: square_avg, acc_delta.
        coefficients: see the first line.
        OPTIONS: none.
    """
    sign, l2, rho, c, eps, d, a = coefficients
    g = effective(sign, l2, grad, param)
    n = rho * states[0] + (c * g) * g  # line 4
    delta = tl.div_rn(tl.sqrt_rn(states[1] + eps), tl.sqrt_rn(n + eps)) * g  # line 5
    acc = rho * states[1] + (c * delta) * delta  # line 6
    return d * param - a * delta, (n, acc)  # line 7


@triton.jit
def adamax(param, grad, states, coefficients, OPTIONS: tl.constexpr):
    """Adamax. Kingma & Ba, arXiv 1412.6980, Algorithm 2.

    Args:
        param: the parameter.
        grad: its gradient.
        states: exp_avg, exp_inf.
        coefficients: see the first line.
        OPTIONS: none.
    """
    sign, l2, b1, c1, b2, eps, d, a = coefficients
    g = effective(sign, l2, grad, param)
    m = b1 * states[0] + c1 * g
    u = larger(tl.abs(g) + eps, b2 * states[1])
    return d * param - tl.div_rn(a * m, u), (m, u)


@triton.jit
def lion(param, grad, states, coefficients, OPTIONS: tl.constexpr):
    """Lion. Chen et al., arXiv 2302.06675, Algorithm 2.

    Args:
        param: the parameter.
        grad: its gradient.
        states: exp_avg.
        coefficients: see the first line.
        OPTIONS: none.
    """
    sign, l2, b1, c1, b2, c2, d, a = coefficients
    g = effective(sign, l2, grad, param)
    u = b1 * states[0] + c1 * g
    direction = tl.where(u > 0, 1.0, tl.where(u < 0, -1.0, u))  # a NaN stays visible
    m = b2 * states[0] + c2 * g
    return d * param - a * direction, (m,)


RULES = {
    "adam": adam,
    "sgd": sgd,
    "rmsprop": rmsprop,
    "adagrad": adagrad,
    "adadelta": adadelta,
    "adamax": adamax,
    "lion": lion,
}
