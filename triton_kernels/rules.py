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
def adam(param, grad, states, coefficients, OPTIONS: tl.constexpr):
    """AdamW, Adam with L2, AdamProx, AMSGrad. Loshchilov & Hutter, arXiv 1711.05101, Algorithm 2.

    The line numbers are the paper's.

    Args:
        param: the parameter.
        grad: its gradient.
        states: exp_avg, exp_avg_sq and, with AMSGrad, max_exp_avg_sq.
        coefficients: see the first line; d is what decay leaves of the parameter, eps and a have
            the bias corrections in them, and to maximize l2 and c1 are negative.
        OPTIONS: pair of bool: weight decay is added to the gradient; AMSGrad.
    """
    l2, b1, c1, b2, c2, eps, d, a = coefficients
    L2: tl.constexpr = OPTIONS[0]
    AMSGRAD: tl.constexpr = OPTIONS[1]

    g = grad
    if L2:
        g = g + l2 * param  # line 6

    m = b1 * states[0] + c1 * g  # line 7
    v = b2 * states[1] + (c2 * g) * g  # line 8

    w = v
    updated = (m, v)
    if AMSGRAD:
        w = tl.where((v > states[2]) | (v != v), v, states[2])  # a NaN stays visible
        updated = (m, v, w)  # type: ignore[assignment]

    # Lines 9, 10 and 12, with the bias corrections and eta * lr folded into a and eps.
    p = d * param - tl.div_rn(a * m, tl.sqrt_rn(w) + eps)
    return p, updated
