"""Storage formats of low-precision training, in torch: which there are, their bits, conversions.

A format says how a parameter and its states lie in memory; a rule sees float32 in any of them. With
x what the rule sees, u its bits and p the 16 bits of the parameter that the model sees::

    fp32, bf16   x = p widened
    master       x = param_master, float32;      p is the upper half of u, ties away, or fp16
    split        u = (p << 16) + param_remainder, int16: exactly a float32 parameter in two parts
    kahan        x = p + param_compensation, bfloat16
    8bit         as split, or with u = (p << 16) + (param_remainder << 8), int8; or float32

States are floats or, with "8bit", codes of 8 bits with one float32 scale for each block of `BLOCK`
elements in memory order. As in G.711 their steps are equal within a binade of |x| plus a bias and
double from one binade to the next, so that small values keep precision. `encode_state` has the
arithmetic.

What engines do in a step is written here once more for checkpoints, on any device and with the same
bits, but for what they round stochastically.

[note: sharded codes] The states of a DTensor are DTensors of its mesh and placements, in whatever
format; blocks are of the local shard. Scales are too, so that they can be saved by one number of
ranks and loaded by another: of a parameter of shape [r, c], with 64 | c, they have shape [r, c/64],
and likewise where only c times the dimensions before it can be divided into blocks. The states of a
DTensor that such blocks do not fit, since a shard would begin within one, are not coded, as those
of small tensors. Functions here take local tensors, with scales of one dimension; `local_state` and
`wrapped_state` go between.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_adamw.shards import (
    block_shape,
    block_split,
    is_sharded,
    local_of,
    sliced,
    split_for_blocks,
    wrapped,
)

BLOCK = 64
"""Elements that share a scale."""
LEAST_CODED = 4096
"""A tensor of fewer elements keeps float32 states under "8bit"."""

MASTER, REMAINDER, COMPENSATION = "param_master", "param_remainder", "param_compensation"
BESIDE_KEYS = (MASTER, REMAINDER, COMPENSATION)
"""Keys in a parameter's state of the array that completes the parameter."""


STATE_KINDS = {
    **dict.fromkeys(("exp_avg", "momentum_buffer", "grad_avg"), "signed"),
    **dict.fromkeys(("exp_avg_sq", "max_exp_avg_sq", "square_avg", "acc_delta", "sum"), "square"),
    "exp_inf": "magnitude",
}
"""What the numbers of each state are, by its key; the extension says the same of its rules."""


def code_key(name: str) -> str:
    """The key of the codes of a coded state, which by its own name nobody can take for numbers."""
    return f"{name}_codes"


def scale_key(name: str) -> str:
    """The key of the scales of a coded state."""
    return f"{name}_scale"


_SCALE_KEYS = frozenset(map(scale_key, STATE_KINDS))


def states_in(state: dict[str, Any], names: Iterable[str]) -> list[str]:
    """Which of these a parameter's state has, coded or not."""
    return [name for name in names if name in state or code_key(name) in state]


def blocks_fit(param: Tensor) -> bool:
    """Whether the states of a parameter may be coded: [note: sharded codes]."""
    return not is_sharded(param) or split_for_blocks(param, BLOCK) is not None


def local_state(state: dict[str, Any]) -> dict[str, Any]:
    """A parameter's state with local tensors in the place of DTensors: [note: sharded codes]."""
    return {
        key: (local_of(value).reshape(-1) if key in _SCALE_KEYS else local_of(value))
        if is_sharded(value)
        else value
        for key, value in state.items()
    }


@torch.no_grad()
def localized_state(saved: dict[str, Any], param: Tensor) -> dict[str, Any]:
    """A saved state with this rank's part of every array, in the order of the local parameter.

    Codes that were not saved as DTensors are decoded where their blocks are not the shard's.

    Args:
        saved: DTensors with the parameter's placements, or whole tensors of its shape; scales of
            codes in any shape.
        param: the parameter.
    """
    found = dict(saved)
    sharded = is_sharded(param)
    split = split_for_blocks(param, BLOCK) if sharded else None
    whole_split = block_split(param.shape, {}, BLOCK)
    for name, kind in STATE_KINDS.items():
        value, scale = saved.get(code_key(name)), saved.get(scale_key(name))
        if not isinstance(value, Tensor) or not isinstance(scale, Tensor) or is_sharded(scale):
            continue
        shapes = [torch.Size((-(-param.numel() // BLOCK),))]
        if whole_split is not None:
            shapes.append(block_shape(param.shape, whole_split, BLOCK))
        if scale.shape not in shapes or value.shape != param.shape:
            continue  # refused by `convert_state`
        if split is not None:
            shape = block_shape(param.shape, split, BLOCK)
            found[scale_key(name)] = sliced(scale.reshape(shape), param)
        elif sharded and not is_sharded(value):
            found[name] = decode_state(value, scale.reshape(-1), kind)
            del found[code_key(name)], found[scale_key(name)]
        else:
            found[scale_key(name)] = scale.reshape(-1)
    if sharded:
        for name, value in found.items():
            if isinstance(value, Tensor) and value.shape == param.shape and value.dim():
                found[name] = value if is_sharded(value) else sliced(value, param)
    return local_state(found)


def wrapped_state(arrays: dict[str, Tensor], param: Tensor) -> dict[str, Tensor]:
    """DTensors, where the parameter is one, of a state's local arrays: [note: sharded codes]."""
    if not is_sharded(param):
        return arrays
    split = split_for_blocks(param, BLOCK)
    found: dict[str, Tensor] = {}
    for key, array in arrays.items():
        if key in _SCALE_KEYS:
            assert split is not None
            local = block_shape(local_of(param).shape, split, BLOCK)
            shape = block_shape(param.shape, split, BLOCK)
            found[key] = wrapped(array.reshape(local), param, shape)
        else:
            found[key] = wrapped(array, param)
    return found


# --- Formats and layouts -------------------------------------------------------------------------


class _Format(NamedTuple):
    """What a precision accepts beside float32 parameters, which all but "8bit" leave plain."""

    params: tuple[torch.dtype, ...]
    states: tuple[torch.dtype, ...]  # the first by default; none: coded
    beside: str = ""
    note: str = ""


_FORMATS = {
    "fp32": _Format((torch.float32,), (torch.float32,)),
    "bf16": _Format(
        (torch.bfloat16,), (torch.bfloat16, torch.float32), note="stochastic_rounding or not"
    ),
    "master": _Format((torch.bfloat16, torch.float16), (torch.float32,), "master"),
    "split": _Format((torch.bfloat16,), (torch.float32, torch.bfloat16), "remainder16"),
    "kahan": _Format((torch.bfloat16,), (torch.bfloat16,), "compensation"),
    "8bit": _Format((torch.bfloat16,), (), note="remainder_bits 8 or 16"),
}
PRECISIONS = tuple(_FORMATS)


class _Plain(NamedTuple):
    """The format of a parameter with nothing beside it."""

    precision: str
    states: tuple[torch.dtype, ...]  # the first by default


_PLAIN = {
    torch.float32: _Plain("fp32", (torch.float32, torch.bfloat16)),
    torch.bfloat16: _Plain("bf16", (torch.bfloat16, torch.float32)),
    torch.float16: _Plain("fp16", (torch.float16, torch.float32)),
}


class _Beside(NamedTuple):
    key: str
    dtype: torch.dtype
    words: str


_BESIDES = {
    "master": _Beside(MASTER, torch.float32, "float32 master"),
    "remainder16": _Beside(REMAINDER, torch.int16, "16-bit remainder"),
    "remainder8": _Beside(REMAINDER, torch.int8, "8-bit remainder"),
    "compensation": _Beside(COMPENSATION, torch.bfloat16, "bfloat16 compensation"),
}


@dataclass(frozen=True)
class Layout:
    """How one parameter and its states lie in memory.

    Attributes:
        precision: the format, one of `PRECISIONS` or "fp16" (plain): that of this parameter, which
            may be another than what was asked for all, as "fp32" for a norm layer beside matrices.
        beside: the array that completes the parameter: "", "master", "remainder16", "remainder8"
            or "compensation".
        state_dtype: dtype of the states; ``None``: coded.
        stochastic: whether the parameter and bfloat16 states are rounded stochastically.
    """

    precision: str
    beside: str
    state_dtype: torch.dtype | None
    stochastic: bool

    @property
    def beside_key(self) -> str | None:
        """The key of the array beside the parameter in its state; ``None`` where there is none."""
        return _BESIDES[self.beside].key if self.beside else None

    def state_keys(self, names: Iterable[str]) -> tuple[str, ...]:
        """The keys of the arrays of these states; of coded ones there are scales too."""
        return tuple(code_key(name) if self.state_dtype is None else name for name in names)

    @property
    def draws(self) -> bool:
        """Whether random bits decide how anything is rounded."""
        return self.stochastic or self.beside == "remainder8"

    @property
    def beside_dtype(self) -> torch.dtype | None:
        """The dtype of that array."""
        return _BESIDES[self.beside].dtype if self.beside else None

    def __str__(self) -> str:
        states = "8-bit" if self.state_dtype is None else _name(self.state_dtype)
        beside = f", {_BESIDES[self.beside].words}" if self.beside else ""
        stochastic = ", stochastic rounding" if self.stochastic else ""
        return f"{self.precision}: {states} states{beside}{stochastic}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(map(_name, dtypes))


def _accepted() -> str:
    """The table of what is accepted, as lines for a message."""
    lines = [
        f"None: {_name(dtype)} parameters, {_names(plain.states)} states"
        + (", stochastic_rounding or not" if dtype == torch.bfloat16 else "")
        for dtype, plain in _PLAIN.items()
    ]
    for name, format in _FORMATS.items():
        states = _names(format.states) if format.states else "8-bit"
        note = f", {format.note}" if format.note else ""
        lines.append(f'"{name}": {_names(format.params)} parameters, {states} states{note}')
    lines.append('any: float32 parameters too, float32 states by default ("8bit": 8-bit)')
    return "".join(f"\n  precision {line}" for line in lines)


def check_precision(
    precision: str | None,
    *,
    stochastic_rounding: bool = False,
    state_dtype: torch.dtype | None = None,
    remainder_bits: int = 8,
) -> None:
    """Checks options against each other, whatever the parameters; see `layout_of`.

    Raises:
        TypeError, ValueError: naming the argument, with the table of what is accepted.
    """
    if precision is not None and precision not in _FORMATS:
        names = ", ".join(f'"{name}"' for name in PRECISIONS)
        raise ValueError(f"precision: found {precision!r}, accepted: None, {names}{_accepted()}")
    if not isinstance(stochastic_rounding, bool):
        raise TypeError(
            f"stochastic_rounding: found {stochastic_rounding!r}, accepted: True or False"
        )
    if stochastic_rounding and precision not in (None, "bf16"):
        raise ValueError(
            f"stochastic_rounding: found True beside precision {precision!r}, accepted: with "
            f'precision None or "bf16"{_accepted()}'
        )
    states = tuple(_PLAIN) if precision is None else _FORMATS[precision].states
    if state_dtype is not None and state_dtype not in states:
        accepted = f"None or {_names(states)}" if states else "None"
        raise TypeError(
            f"state_dtype: found {state_dtype} beside precision {precision!r}, "
            f"accepted: {accepted}{_accepted()}"
        )
    if isinstance(remainder_bits, bool) or remainder_bits not in (8, 16):
        raise ValueError(f"remainder_bits: found {remainder_bits!r}, accepted: 8 or 16")
    if remainder_bits != 8 and precision != "8bit":
        raise ValueError(
            f"remainder_bits: found {remainder_bits} beside precision {precision!r}, "
            f'accepted: with precision "8bit"{_accepted()}'
        )


def layout_of(
    dtype: torch.dtype,
    numel: int,
    precision: str | None,
    *,
    stochastic_rounding: bool = False,
    state_dtype: torch.dtype | None = None,
    remainder_bits: int = 8,
    codable: bool = True,
) -> Layout:
    """The layout of one parameter.

    A float32 parameter is plain under every precision but "8bit", which codes its states. Under
    "8bit" a tensor that is not coded is in the format "fp32" or "split", with float32 states.

    Args:
        dtype: the parameter's: float32, bfloat16 or float16.
        numel: its number of elements.
        precision: one of `PRECISIONS`; ``None``: the dtype's own, with states of that dtype.
        stochastic_rounding: whether bfloat16 parameters and states are rounded stochastically;
            without effect on float32 parameters, which are exact.
        state_dtype: dtype of the states; ``None``: the format's, float32 for float32 parameters.
        remainder_bits: of the array beside a bfloat16 parameter under "8bit".
        codable: whether the states may be coded under "8bit".

    Raises:
        TypeError, ValueError: naming the argument, with the table of what is accepted.
    """
    check_precision(
        precision,
        stochastic_rounding=stochastic_rounding,
        state_dtype=state_dtype,
        remainder_bits=remainder_bits,
    )
    if dtype not in _PLAIN:
        raise TypeError(f"params: found {dtype}, accepted: {_names(list(_PLAIN))}")
    if precision is None or (dtype == torch.float32 and precision != "8bit"):
        return _plain_layout(dtype, stochastic_rounding, state_dtype)
    format = _FORMATS[precision]
    if dtype not in (*format.params, torch.float32):
        raise ValueError(
            f"precision: found {precision!r} for a {_name(dtype)} parameter, accepted:{_accepted()}"
        )
    if precision == "bf16":
        return _plain_layout(dtype, stochastic_rounding, state_dtype)
    if precision != "8bit":
        return Layout(precision, format.beside, state_dtype or format.states[0], False)
    coded = codable and numel >= LEAST_CODED
    if dtype == torch.float32:
        return Layout("8bit" if coded else "fp32", "", None if coded else torch.float32, False)
    if coded:
        return Layout("8bit", f"remainder{remainder_bits}", None, False)
    return Layout("split", "remainder16", torch.float32, False)


def _plain_layout(
    dtype: torch.dtype, stochastic_rounding: bool, state_dtype: torch.dtype | None
) -> Layout:
    plain = _PLAIN[dtype]
    if state_dtype is not None and state_dtype not in plain.states:
        raise TypeError(
            f"state_dtype: found {state_dtype} for a {_name(dtype)} parameter, "
            f"accepted: None or {_names(plain.states)}{_accepted()}"
        )
    if stochastic_rounding and dtype == torch.float16:
        raise ValueError(
            "stochastic_rounding: found True for a float16 parameter, accepted: bfloat16, or "
            f"float32, which is exact{_accepted()}"
        )
    stochastic = stochastic_rounding and dtype == torch.bfloat16
    return Layout(plain.precision, "", state_dtype or plain.states[0], stochastic)


# --- Memory order --------------------------------------------------------------------------------


def in_memory_order(tensor: Tensor) -> Tensor:
    """A dense tensor as a view of one dimension, its elements as they follow in memory.

    Raises:
        ValueError: a tensor with gaps or overlap.
    """
    tensor = tensor.detach()
    expected = 1
    if tensor.numel():
        for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
            if size > 1 and stride != expected:
                raise ValueError(
                    f"found strides {tensor.stride()} for shape {tuple(tensor.shape)}, "
                    "accepted: dense in any order of dimensions"
                )
            expected *= size
    return tensor.as_strided((tensor.numel(),), (1,))


def _is_in_order_of(tensor: Tensor, param: Tensor) -> bool:
    """Whether two tensors of a shape have their elements in the same order in memory."""
    dimensions = zip(tensor.shape, tensor.stride(), param.stride(), strict=True)
    return not tensor.numel() or all(x == y for size, x, y in dimensions if size > 1)


def _like(param: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(param.shape, param.stride(), dtype=dtype, device=param.device)


def _placed(tensor: Tensor, param: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A copy on the parameter's device and in its order."""
    return _like(param, tensor.dtype if dtype is None else dtype).copy_(tensor.detach())


def _unflattened(flat: Tensor, param: Tensor) -> Tensor:
    """What is in memory order, in the parameter's shape."""
    result = _like(param, flat.dtype)
    in_memory_order(result).copy_(flat)
    return result


def _flattened(tensor: Tensor, param: Tensor) -> Tensor:
    """A tensor of the parameter's shape in the order of its memory."""
    return in_memory_order(tensor if _is_in_order_of(tensor, param) else _placed(tensor, param))


# --- Coded states --------------------------------------------------------------------------------


class _Code(NamedTuple):
    """A companding code.

    A magnitude that is the block's largest becomes ``top``; the upper bits of the float32
    ``magnitude + bias``, without those dropped, less those of ``bias`` itself, are the code.
    """

    dtype: torch.dtype
    bias: float
    top: float
    dropped: int  # bits of a float32

    @property
    def base(self) -> int:
        """The upper bits of the bias."""
        bits: int = struct.unpack("<I", struct.pack("<f", self.bias))[0]
        return bits >> self.dropped

    @property
    def reciprocal(self) -> float:
        """One over ``top``, rounded to float32."""
        rounded: float = struct.unpack("<f", struct.pack("<f", 1 / self.top))[0]
        return rounded


_SMALLEST_NORMAL, _TOO_LARGE = 2.0**-126, 2.0**127
_CODES = {
    "signed": _Code(torch.int8, 2**-4, 63 / 64 - 2**-4, 18),
    "square": _Code(torch.uint8, 2**-16, 31 / 32 - 2**-16, 19),
    "magnitude": _Code(torch.uint8, 2**-8, 63 / 64 - 2**-8, 18),
}


def _code_of(kind: str) -> _Code:
    if kind not in _CODES:
        raise ValueError(f"kind: found {kind!r}, accepted: {', '.join(_CODES)}")
    return _CODES[kind]


@torch.no_grad()
def encode_state(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Codes and scales of a state, the nearest in each block of `BLOCK` in memory order.

    With a = |x|, all in float32 with one rounding an operation::

        scale = max a of the block      below 2^-126: 0; not below 2^127: NaN; codes are 0 in both
        t = a (top / scale) + bias
        n = (bits(t) + 2^(dropped - 1) >> dropped) - (bits(bias) >> dropped)

                   bias    top            dropped
        signed     2^-4    63/64 - bias   18        code = -n for x < 0, else n       <= 127
        square     2^-16   31/32 - bias   19        code = n, at least 1 for a > 0    <= 255
        magnitude  2^-8    63/64 - bias   18        code = n, at least 1 for a > 0    <= 255

    Args:
        x: float32, dense in any order of dimensions.
        kind: "signed", "square" (an average of squares) or "magnitude" (>= 0).

    Returns:
        Codes, int8 if signed and otherwise uint8, of x's shape and strides; scales, float32, of
        shape [ceil(numel / BLOCK)].
    """
    code = _code_of(kind)
    if x.dtype != torch.float32:
        raise TypeError(f"x: found {x.dtype}, accepted: float32")
    flat = in_memory_order(x)
    padded = flat.new_zeros(-(-len(flat) // BLOCK) * BLOCK)
    padded[: len(flat)] = flat.abs()
    a = padded.view(-1, BLOCK)
    scale = a.amax(1)
    scale = scale.masked_fill(~(scale < _TOO_LARGE), torch.nan)
    scale = scale.masked_fill(scale < _SMALLEST_NORMAL, 0.0)
    is_coded = scale > 0
    # A quotient of tensors: a number divided by a tensor would be multiplied by its reciprocal.
    inv = torch.full_like(scale, code.top) / scale.masked_fill(~is_coded, 1.0)
    t = (a * inv[:, None]).add_(code.bias)
    n = t.view(torch.int32) + (1 << code.dropped - 1)
    n = n.bitwise_right_shift_(code.dropped).sub_(code.base)
    if kind != "signed":
        n = torch.maximum(n, a > 0)
    n = n.masked_fill_(~is_coded[:, None], 0).view(-1)[: len(flat)]
    if kind == "signed":
        n = torch.where(flat < 0, -n, n)
    return _unflattened(n.to(code.dtype), x), scale


@torch.no_grad()
def decode_state(codes: Tensor, scale: Tensor, kind: str) -> Tensor:
    """The float32 state that codes and scales stand for; see `encode_state`.

    ::

        a = (float(n + (bits(bias) >> dropped) << dropped) - bias) (scale float32(1 / top))

    Args:
        codes: int8 or uint8, by the kind; dense in any order of dimensions.
        scale: float32, [ceil(numel / BLOCK)].
        kind: "signed", "square" or "magnitude".

    Returns:
        New tensor of the codes' shape and strides: a with the code's sign.
        A NaN scale makes NaNs of its block.
    """
    code = _code_of(kind)
    flat = in_memory_order(codes).to(torch.int32)
    t = (flat.abs() + code.base).bitwise_left_shift_(code.dropped).view(torch.float32)
    unit = (scale * code.reciprocal).repeat_interleave(BLOCK)[: len(flat)]
    a = t.sub_(code.bias).mul_(unit)
    if kind == "signed":
        a = torch.where(flat < 0, -a, a)
    return _unflattened(a, codes)


# --- The array beside the parameter --------------------------------------------------------------

_QUIET_NAN = 0x7FC00000


def _bits(x: Tensor) -> Tensor:
    """The bits of float32 numbers as int32, with one NaN for all."""
    return torch.where(x.isnan(), _QUIET_NAN, x.view(torch.int32))


def _ties_away(u: Tensor) -> Tensor:
    """The upper halves of bits that are nearest: of a master and of its two parts."""
    return (u + 0x8000) >> 16


def _ties_to_even(u: Tensor) -> Tensor:
    """The upper halves of bits that are nearest: bfloat16 as usual."""
    return (u + 0x7FFF + (u >> 16 & 1)) >> 16


def _widened(p: Tensor) -> Tensor:
    """Upper halves, sign-extended, as float32."""
    return (p << 16).view(torch.float32)


def _as_bfloat16(p: Tensor) -> Tensor:
    return p.to(torch.int16).view(torch.bfloat16)


def _pattern(param: Tensor) -> Tensor:
    """The bits of a bfloat16 parameter in memory order, sign-extended."""
    return in_memory_order(param).view(torch.int16).to(torch.int32)


def _completing(x: Tensor, p: Tensor, beside: str) -> Tensor:
    """What beside the upper halves p comes nearest to x, both in memory order."""
    if beside == "master":
        return x
    if beside == "compensation":
        missing = x - _widened(p)
        return _as_bfloat16(_ties_to_even(_bits(missing.masked_fill_(~missing.isfinite(), 0.0))))
    u = _bits(x)
    remainder = u - (p << 16)
    if beside == "remainder8":
        remainder = (remainder + 0x80) >> 8
    dtype = _BESIDES[beside].dtype
    info = torch.iinfo(dtype)
    # From a zero of the other sign a remainder would lead to NaN.
    useless = x.isnan() | ((u ^ p) < 0)
    return remainder.clamp_(info.min, info.max).masked_fill_(useless, 0).to(dtype)


def _completed(param: Tensor, beside: str, array: Tensor) -> Tensor:
    """What the rule sees of a parameter, in memory order; inverse of `_completing`."""
    flat = _flattened(array, param)
    if beside == "master":
        return flat
    p = _pattern(param)
    if beside == "compensation":
        return _widened(p) + flat.to(torch.float32)
    remainder = flat.to(torch.int32)
    if beside == "remainder8":
        remainder <<= 8
    return ((p << 16) + remainder).view(torch.float32)


@torch.no_grad()
def full_value(param: Tensor, layout: Layout, state: dict[str, Any]) -> Tensor:
    """The float32 value of a parameter that its rule sees.

    Args:
        param: dense in any order of dimensions.
        layout: the parameter's.
        state: the parameter's state. Where the array beside the parameter is still to be created,
            the value is the parameter's own.

    Returns:
        New tensor of the parameter's shape and strides.
    """
    array = state.get(layout.beside_key) if layout.beside_key else None
    if array is None:
        return _placed(param, param, torch.float32)
    return _unflattened(_completed(param, layout.beside, array), param)


@torch.no_grad()
def beside_of(x: Tensor, layout: Layout, param: Tensor) -> tuple[Tensor, Tensor | None]:
    """What is stored of a parameter's float32 value: the parameter and the array beside it.

    As a step stores them, but that all is rounded to nearest: what a step rounds stochastically
    too, that is an 8-bit remainder (ties away from zero) and with ``layout.stochastic`` the
    parameter (ties to even).

    Args:
        x: float32, of the parameter's shape.
        layout: the parameter's.
        param: gives dtype and strides; its values are not read.

    Returns:
        New tensors of the parameter's shape and strides; ``None`` with nothing beside it.
    """
    if x.dtype != torch.float32:
        raise TypeError(f"x: found {x.dtype}, accepted: float32")
    if x.shape != param.shape:
        raise ValueError(f"x: found shape {tuple(x.shape)}, accepted: {tuple(param.shape)}")
    flat = _flattened(x, param)
    if param.dtype != torch.bfloat16:
        stored = _placed(x, param, param.dtype)
        return stored, _placed(x, param) if layout.beside == "master" else None
    u = _bits(flat)
    if layout.beside == "remainder8":
        u = (u + 0x80) & ~0xFF
        flat = u.view(torch.float32)
    p = (_ties_to_even if layout.beside in ("", "compensation") else _ties_away)(u)
    stored = _unflattened(_as_bfloat16(p), param)
    if not layout.beside:
        return stored, None
    return stored, _unflattened(_completing(flat, p, layout.beside), param)


# --- Checkpoints ---------------------------------------------------------------------------------


def _found(value: Any) -> str:
    if value is None:
        return "nothing"
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"{_name(value.dtype)} of shape {tuple(value.shape)}"


def _refuse(key: str, value: Any, accepted: str) -> ValueError:
    return ValueError(f"'{key}': found {_found(value)}, accepted: {accepted}")


def _is_dense(tensor: Tensor) -> bool:
    try:
        in_memory_order(tensor)
    except ValueError:
        return False
    return True


def _checked(
    saved: dict[str, Any], name: str, kind: str, shape: torch.Size
) -> tuple[Tensor, Tensor | None]:
    """The numbers of a saved state, or its codes and scales; refuses what is in no format."""
    is_coded = code_key(name) in saved
    key = code_key(name) if is_coded else name
    value, scale = saved.get(key), saved.get(scale_key(name))
    dtype = _code_of(kind).dtype
    accepted = f"{_name(dtype) if is_coded else 'floating-point'} of shape {tuple(shape)}"
    if (
        not isinstance(value, Tensor)
        or value.layout != torch.strided
        or value.is_meta
        or not (value.dtype == dtype if is_coded else value.is_floating_point())
        or value.shape != shape
    ):
        raise _refuse(key, value, f"{accepted}, with memory")
    if not is_coded:
        if scale is not None:
            raise _refuse(scale_key(name), scale, f"none beside '{name}'")
        return value, None
    if name in saved:
        raise ValueError(f"'{key}': found beside '{name}', accepted: one of them")
    if not _is_dense(value):
        raise ValueError(f"'{key}': found codes with gaps in memory, accepted: dense codes")
    blocks = -(-value.numel() // BLOCK)
    if (
        not isinstance(scale, Tensor)
        or scale.dtype != torch.float32
        or scale.shape != (blocks,)
        or scale.is_meta
    ):
        accepted = f"float32 of shape ({blocks},), one for {BLOCK} of '{key}'"
        raise _refuse(scale_key(name), scale, accepted)
    if (scale < 0).any():
        raise ValueError(f"'{scale_key(name)}': found {float(scale.min())}, accepted: numbers >= 0")
    return value, scale


@torch.no_grad()
def stored_state(name: str, x: Tensor, kind: str, layout: Layout) -> dict[str, Tensor]:
    """The entries of a state of a parameter: float32 numbers in the layout's states.

    Args:
        name: the state's key.
        x: float32, dense; its shape and strides are the parameter's.
        kind: "signed", "square" or "magnitude".
        layout: the parameter's.

    Returns:
        New tensors, or ``x`` itself where states are float32.
    """
    if layout.state_dtype is None:
        codes, scale = encode_state(x, kind)
        return {code_key(name): codes, scale_key(name): scale}
    return {name: x.to(layout.state_dtype)}


@torch.no_grad()
def convert_state(
    saved: dict[str, Any],
    param: Tensor,
    names: Sequence[str],
    kinds: Sequence[str],
    layout: Layout,
) -> dict[str, Tensor]:
    """The saved state of a parameter, in any format or torch's own, in a layout.

    What is in the layout's format is copied bit for bit; codes too, unless elements follow in
    another order in memory. Anything else is decoded and coded or rounded to nearest.

    The array beside the parameter is converted so that it completes the parameter as it is now: the
    model must have been loaded. Without one in ``saved`` there is none in the result, and a layout
    with nothing beside the parameter drops it.

    Args:
        saved: may have other entries, which are left out.
        param: the parameter, dense.
        names: keys of the states.
        kinds: of each "signed", "square" or "magnitude".
        layout: what to convert to.

    Returns:
        New tensors on the parameter's device, of its shape and strides (scales:
        [ceil(numel / BLOCK)]).

    Raises:
        ValueError: an entry of another shape or of a dtype that is none of the format, codes
            without scales, scales without codes or of another number; it names the key.
    """
    state: dict[str, Tensor] = {}
    for name, kind in zip(names, kinds, strict=True):
        value, scale = _checked(saved, name, kind, param.shape)
        value = value.detach()
        if scale is None and layout.state_dtype is not None:
            state[name] = _placed(value, param, layout.state_dtype)
        elif scale is None:
            state.update(stored_state(name, _placed(value, param, torch.float32), kind, layout))
        else:
            value = value.to(param.device)
            scale = scale.detach().to(param.device, copy=True)
            if layout.state_dtype is None and _is_in_order_of(value, param):
                state[code_key(name)], state[scale_key(name)] = _placed(value, param), scale
            else:
                x = _placed(decode_state(value, scale, kind), param)
                state.update(stored_state(name, x, kind, layout))
    beside, array = _saved_beside(saved, param)
    if array is not None and layout.beside_key is not None:
        state[layout.beside_key] = _converted_beside(array, beside, param, layout.beside)
    return state


def _saved_beside(saved: dict[str, Any], param: Tensor) -> tuple[str, Tensor | None]:
    """What a saved state has beside the parameter, and its name."""
    keys = [key for key in BESIDE_KEYS if saved.get(key) is not None]
    if not keys:
        return "", None
    if len(keys) > 1:
        raise ValueError(f"'{keys[1]}': found beside '{keys[0]}', accepted: one of them")
    value = saved[keys[0]]
    known = {item.dtype: name for name, item in _BESIDES.items() if item.key == keys[0]}
    if (
        not isinstance(value, Tensor)
        or value.layout != torch.strided
        or value.is_meta
        or value.dtype not in known
        or value.shape != param.shape
    ):
        raise _refuse(
            keys[0], value, f"{_names(list(known))} of shape {tuple(param.shape)}, with memory"
        )
    return known[value.dtype], value.detach()


def _converted_beside(array: Tensor, source: str, param: Tensor, target: str) -> Tensor:
    array = _placed(array, param)
    if source == target:
        return array
    if source != "master" and param.dtype != torch.bfloat16:
        raise ValueError(
            f"'{_BESIDES[source].key}': found beside a {_name(param.dtype)} parameter, accepted: "
            "beside a bfloat16 parameter, which it completes"
        )
    return _unflattened(
        _completing(_completed(param, source, array), _pattern(param), target), param
    )


@torch.no_grad()
def is_master_of(master: Tensor, param: Tensor) -> bool:
    """Whether float32 values are those of a 16-bit parameter.

    As near as bfloat16 is, whatever the parameter's dtype: it may have been saved in another one.
    """
    near = torch.isclose(
        master, param.detach().to(torch.float32), rtol=2**-7, atol=2**-24, equal_nan=True
    )
    return bool(near.logical_or_(master.to(param.dtype) == param).all())


@torch.no_grad()
def decoded_states(
    state: dict[str, Any], names: Sequence[str], kinds: Sequence[str]
) -> dict[str, Tensor]:
    """The states of a parameter in float32, as copies, whatever format they are in.

    Raises:
        ValueError: as `convert_state`.
    """
    decoded: dict[str, Tensor] = {}
    for name, kind in zip(names, kinds, strict=True):
        value = state.get(code_key(name), state.get(name))
        shape = value.shape if isinstance(value, Tensor) else torch.Size()
        value, scale = _checked(state, name, kind, shape)
        decoded[name] = (
            value.detach().to(torch.float32, copy=True)
            if scale is None
            else decode_state(value, scale, kind)
        )
    return decoded
