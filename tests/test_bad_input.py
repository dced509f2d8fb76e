"""Bad input is refused with a clear message, and nothing has been written then.

A message names the argument, the parameter by its index (and its name, where names were given),
what was found and what is accepted. After a refusal every byte of parameters, gradients, states,
steps and param groups is what it was.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from drawn_training import LOUD, make_params, saved, set_grads, train
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_adamw import FusedAdamW, engine_status, functional

NAN, INF = float("nan"), float("inf")
MANY = 20
LAST = rf"parameter {MANY - 1} \('w{MANY - 1}'\)"  # how messages call the last of many


# --- What nothing was written means --------------------------------------------------------------


def content(value: Any) -> Any:
    """A copy that can be compared: of tensors the bytes, in the order of memory."""
    if isinstance(value, Tensor):
        numbers = value.detach()
        if numbers.layout != torch.strided or numbers.device.type == "meta":
            return str(numbers)
        elements = numbers.resolve_conj().contiguous().flatten().view(torch.uint8)
        return value.dtype, value.shape, value.stride(), value.data_ptr(), elements.tolist()
    if isinstance(value, dict):
        return {key: content(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [content(item) for item in value]
    return repr(value)  # NaN is not equal to itself


def content_of_all(subject: FusedAdamW | dict[str, Any]) -> Any:
    """Of an optimizer, or of the arguments of a call."""
    if isinstance(subject, dict):
        return content(subject)
    params = [param for group in subject.param_groups for param in group["params"]]
    grads = [param.grad for param in params]
    states = {id(param): state for param, state in subject.state.items()}
    return content([subject.param_groups, grads, states, subject.defaults])


@contextmanager
def refused(
    subject: FusedAdamW | dict[str, Any],
    kind: type[Exception] | tuple[type[Exception], ...],
    *mentions: str,
) -> Iterator[None]:
    """The block raises one of these kinds, mentions all patterns, and leaves every byte."""
    before = content_of_all(subject)
    with pytest.raises(kind) as caught:
        yield
    assert_clear(caught.value, *mentions)
    assert content_of_all(subject) == before


def assert_clear(error: BaseException, *mentions: str) -> None:
    message = str(error)
    for pattern in mentions:
        assert re.search(pattern, message), f"{pattern!r} is not in {message!r}"
    # No backtraces, and no C++ signatures.
    assert not re.search(r"frame #|\.cpp|incompatible constructor|pybind", message, re.I), message


def many_params() -> list[tuple[str, nn.Parameter]]:
    shapes = [(3, 4), (5,), (), (2, 2)] * (MANY // 4)
    return [(f"w{i}", param) for i, param in enumerate(make_params(shapes))]


@pytest.fixture(params=["first step", "later step"])
def optimizer(request: pytest.FixtureRequest) -> FusedAdamW:
    """An optimizer over many named parameters that all have gradients, before or in training."""
    named = many_params()
    optimizer = FusedAdamW(named, **LOUD, amsgrad=True)
    params = [param for _, param in named]
    if request.param == "later step":
        train(optimizer, params, range(2))
    set_grads(params, 2)
    return optimizer


def last_param(optimizer: FusedAdamW) -> nn.Parameter:
    param: nn.Parameter = optimizer.param_groups[-1]["params"][-1]
    return param


# --- Hyperparameters -----------------------------------------------------------------------------

OUT_OF_RANGE: list[tuple[str, str, Any]] = [
    ("lr", "lr", -0.1),
    ("lr", "lr", NAN),
    ("lr", "lr", INF),
    ("lr", "lr", torch.tensor(-1.0)),
    ("lr", "lr", torch.tensor(NAN)),
    ("eps", "eps", -1e-8),
    ("eps", "eps", NAN),
    ("eps", "eps", INF),
    ("weight_decay", "weight_decay", -0.1),
    ("weight_decay", "weight_decay", NAN),
    ("weight_decay", "weight_decay", INF),
    ("schedule_multiplier", "schedule_multiplier", -0.1),
    ("schedule_multiplier", "schedule_multiplier", NAN),
    ("schedule_multiplier", "schedule_multiplier", INF),
    ("betas", r"betas\[0\]", (-0.1, 0.9)),
    ("betas", r"betas\[0\]", (1.0, 0.9)),
    ("betas", r"betas\[0\]", (NAN, 0.9)),
    ("betas", r"betas\[1\]", (0.9, -0.1)),
    ("betas", r"betas\[1\]", (0.9, 1.0)),
    ("betas", r"betas\[1\]", (0.9, NAN)),
    ("betas", r"betas\[1\]", (0.9, INF)),
    ("decay", "decay", "none"),
]
OF_ANOTHER_TYPE: list[tuple[str, str, Any]] = [
    ("lr", "lr", None),
    ("lr", "lr", "1e-3"),  # what YAML makes of it
    ("lr", "lr", torch.ones(2)),
    ("lr", "lr", torch.tensor(1j)),
    ("eps", "eps", None),
    ("eps", "eps", "1e-8"),
    ("weight_decay", "weight_decay", None),
    ("weight_decay", "weight_decay", "0.1"),
    ("schedule_multiplier", "schedule_multiplier", None),
    ("betas", "betas", None),
    ("betas", "betas", 0.9),
    ("betas", "betas", (0.9,)),
    ("betas", "betas", (0.9, 0.99, 0.999)),
    ("betas", "betas", (0.9, "0.99")),
    ("decay", "decay", None),
    ("decay", "decay", 1),
    ("amsgrad", "amsgrad", "yes"),
]
BAD = [(*case, ValueError) for case in OUT_OF_RANGE] + [
    (*case, (TypeError, ValueError)) for case in OF_ANOTHER_TYPE
]


def in_id(value: Any) -> str:
    """Short names for test ids."""
    if isinstance(value, type):
        return value.__name__
    if isinstance(value, list):  # what a message mentions
        return ""
    if isinstance(value, Tensor) and (value.numel() > 1 or value.is_meta):
        words = (value.dtype, value.layout, value.device.type, tuple(value.shape))
        return "-".join(str(word).removeprefix("torch.") for word in words).replace(" ", "")
    if isinstance(value, tuple) and isinstance(value[0], type):
        return "|".join(kind.__name__ for kind in value)
    return str(value).replace(" ", "")


def found(value: Any) -> str:
    """What a message quotes of a value that is out of range."""
    numbers = value if isinstance(value, tuple) else (value,)
    bad = [x for x in numbers if isinstance(x, str) or not 0 <= float(x) < 1]
    return re.escape(bad[0] if isinstance(bad[0], str) else str(float(bad[0])))


@pytest.mark.parametrize(("name", "named", "value", "kind"), BAD, ids=in_id)
def test_hyperparameter_at_construction(name: str, named: str, value: Any, kind: Any) -> None:
    with pytest.raises(kind) as caught:
        FusedAdamW(make_params(), **{name: value})
    assert_clear(caught.value, rf"\b{named}", "accepted")


@pytest.mark.parametrize(("name", "named", "value", "kind"), BAD, ids=in_id)
def test_hyperparameter_of_a_group(name: str, named: str, value: Any, kind: Any) -> None:
    a, b = make_params([(3,), (4,)])
    with pytest.raises(kind) as caught:
        FusedAdamW([{"params": [a]}, {"params": [b], name: value}])
    assert_clear(caught.value, "group 1", rf"\b{named}", "accepted")


@pytest.mark.parametrize(("name", "named", "value", "kind"), BAD, ids=in_id)
def test_hyperparameter_set_between_steps(name: str, named: str, value: Any, kind: Any) -> None:
    a, b = make_params([(3,), (4,)])
    optimizer = FusedAdamW([{"params": [a]}, {"params": [b]}], **LOUD)
    train(optimizer, [a, b], range(2))
    good = optimizer.param_groups[1][name]
    optimizer.param_groups[1][name] = value
    with refused(optimizer, kind, "group 1", rf"\b{named}", "accepted"):
        optimizer.step()
    optimizer.param_groups[1][name] = good
    optimizer.step()
    assert optimizer.state[b]["step"] == 3


@pytest.mark.parametrize(("name", "named", "value"), OUT_OF_RANGE, ids=in_id)
def test_message_quotes_what_was_found(name: str, named: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{named}: found '?{found(value)}'?, accepted: "):
        FusedAdamW(make_params(), **{name: value})


@pytest.mark.parametrize(("name", "named", "value"), OUT_OF_RANGE, ids=in_id)
def test_hyperparameter_of_an_added_group(name: str, named: str, value: Any) -> None:
    a, b = make_params([(3,), (4,)])
    optimizer = FusedAdamW([a], **LOUD)
    train(optimizer, [a], range(2))
    with refused(optimizer, ValueError, "group 1", named):
        optimizer.add_param_group({"params": [b], name: value})
    optimizer.step()


@pytest.mark.parametrize(("name", "named", "value"), OUT_OF_RANGE, ids=in_id)
def test_hyperparameter_of_a_checkpoint(name: str, named: str, value: Any) -> None:
    optimizer = trained()
    state_dict = copy.deepcopy(optimizer.state_dict())
    state_dict["param_groups"][1][name] = value
    with refused(optimizer, ValueError, "state_dict", "group 1", rf"\b{named}"):
        optimizer.load_state_dict(state_dict)


# --- Other arguments -----------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["gpu", "", None, 3, "AUTO"])
def test_unknown_engine(engine: Any) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        FusedAdamW(make_params(), engine=engine)
    assert_clear(caught.value, "engine", re.escape(repr(engine)), "'auto'.*cpu.*cuda.*triton")


@pytest.mark.parametrize("engine", ["cpu", "cuda", "triton", "reference"])
def test_absent_engine(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = engine_status()[engine]
    if reason is None:
        pytest.skip(f"{engine} is usable here")
    assert reason[0] != " "
    assert len(reason) > 10
    with pytest.raises(RuntimeError, match=re.escape(reason)) as caught:
        FusedAdamW(make_params(), engine=engine)
    assert_clear(caught.value, f"engine '{engine}'")


def test_differentiable() -> None:
    with pytest.raises(RuntimeError, match="differentiable"):
        FusedAdamW(make_params(), differentiable=True)


def test_differentiable_group() -> None:
    with pytest.raises(RuntimeError, match="differentiable"):
        FusedAdamW([{"params": make_params(), "differentiable": True}])


def test_differentiable_checkpoint() -> None:
    optimizer = trained()
    state_dict = copy.deepcopy(optimizer.state_dict())
    state_dict["param_groups"][1]["differentiable"] = True
    with refused(optimizer, RuntimeError, "state_dict", "differentiable"):
        optimizer.load_state_dict(state_dict)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.complex64, "float32"])
def test_state_dtype(dtype: Any) -> None:
    with pytest.raises(TypeError) as caught:
        FusedAdamW(make_params(), state_dtype=dtype)
    assert_clear(caught.value, "state_dtype", str(dtype), "float32", "bfloat16", "float16")


# --- Parameters ----------------------------------------------------------------------------------


def test_no_parameters() -> None:
    for nothing in ([], iter(())):
        with pytest.raises(ValueError, match="empty parameter list"):
            FusedAdamW(nothing)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_parameter_dtype(dtype: torch.dtype) -> None:
    named = [*many_params()[:-1], (f"w{MANY - 1}", nn.Parameter(torch.zeros(3, dtype=dtype)))]
    with pytest.raises(TypeError) as caught:
        FusedAdamW(named)
    assert_clear(caught.value, LAST, str(dtype), "accepted: float32, bfloat16, float16")


def test_complex_parameter() -> None:
    with pytest.raises(TypeError) as caught:
        FusedAdamW([*make_params([(3,)]), torch.zeros(3, dtype=torch.cfloat, requires_grad=True)])
    assert_clear(caught.value, "parameter 1", "complex64")


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_repeated_parameter() -> None:
    named = many_params()
    with pytest.raises(ValueError, match="twice") as caught:
        FusedAdamW([*named[:-1], (f"w{MANY - 1}", named[3][1])])
    assert_clear(caught.value, LAST)


def test_parameter_repeated_in_another_group() -> None:
    named = many_params()
    groups = [{"params": named[:-1]}, {"params": [(f"w{MANY - 1}", named[3][1])]}]
    with pytest.raises(ValueError, match="group") as caught:
        FusedAdamW(groups)
    assert_clear(caught.value, LAST)


def test_refused_group_is_not_added() -> None:
    optimizer = trained()
    train(optimizer, optimizer.param_groups[0]["params"], range(1))
    bad = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    with refused(optimizer, TypeError, r"parameter 5 \('b'\)", "float64"):
        optimizer.add_param_group({"params": [("a", make_params([(3,)])[0]), ("b", bad)]})
    with refused(optimizer, ValueError):
        optimizer.add_param_group({"params": [("c", last_param(optimizer))]})
    optimizer.step()


def replace_last(optimizer: FusedAdamW, data: Tensor) -> None:
    """Gives the last parameter other memory, and a gradient that fits."""
    param = last_param(optimizer)
    param.grad = None
    param.data = data
    param.grad = torch.ones_like(param)


@pytest.mark.parametrize(
    ("data", "strides"),
    [
        (torch.zeros(2, 1).expand(2, 2), r"\(1, 0\)"),
        (torch.zeros(2, 4)[:, ::2], r"\(4, 2\)"),
        (torch.zeros(2, 3)[:, :2], r"\(3, 1\)"),
        (torch.zeros(3).as_strided((2, 2), (1, 1)), r"\(1, 1\)"),
    ],
    ids=["expanded", "every second", "columns", "overlapping itself"],
)
def test_parameter_with_gaps_or_overlap(optimizer: FusedAdamW, data: Tensor, strides: str) -> None:
    replace_last(optimizer, data)
    with refused(optimizer, ValueError, LAST, strides, "accepted: dense"):
        optimizer.step()


@pytest.mark.parametrize("offset", [0, 3], ids=["the same", "overlapping"])
@pytest.mark.parametrize("trained_one", [3, MANY - 1])
def test_parameters_that_share_memory(optimizer: FusedAdamW, offset: int, trained_one: int) -> None:
    """Whether both have gradients or only one."""
    params = optimizer.param_groups[0]["params"]
    storage = torch.zeros(8)
    for param, data in ((params[3], storage[:4]), (params[-1], storage[offset : offset + 4])):
        param.grad = None
        param.data = data.view(2, 2)
    params[trained_one].grad = torch.ones(2, 2)
    named = r"parameter (3 \('w3'\)|19 \('w19'\))"
    with refused(optimizer, ValueError, named + r".*memory.*" + named):
        optimizer.step()


def test_state_that_shares_memory_with_a_parameter(optimizer: FusedAdamW) -> None:
    optimizer.step()
    params = optimizer.param_groups[0]["params"]
    optimizer.state[params[-1]]["exp_avg_sq"] = params[3].detach()
    with refused(optimizer, ValueError, r"parameter (3|19) .*memory.*parameter (3|19)"):
        optimizer.step()


def test_gradient_that_shares_memory_with_its_parameter(optimizer: FusedAdamW) -> None:
    param = last_param(optimizer)
    param.grad = param.detach()
    with refused(optimizer, ValueError, LAST, "memory", "gradient"):
        optimizer.step()


def test_gradient_that_shares_memory_with_another_parameter(optimizer: FusedAdamW) -> None:
    """What it is when it is read would depend on the order in which an engine works."""
    params = optimizer.param_groups[0]["params"]
    params[-1].grad = params[3].detach()
    with refused(optimizer, ValueError, LAST, "memory", "gradient"):
        optimizer.step()


def test_gradient_that_shares_memory_with_anothers_state(optimizer: FusedAdamW) -> None:
    optimizer.step()
    params = optimizer.param_groups[0]["params"]
    params[-1].grad = optimizer.state[params[3]]["exp_avg"]
    with refused(optimizer, ValueError, LAST, "memory", "gradient"):
        optimizer.step()


def test_gradient_that_grows_into_its_parameter() -> None:
    """The same address again, but of wider elements: there the gradient ends elsewhere."""
    memory = torch.ones(48, dtype=torch.bfloat16)
    param = torch.nn.Parameter(memory[16:].view(torch.float32)[:16])
    optimizer = FusedAdamW([param])
    param.grad_dtype = torch.bfloat16
    param.grad = memory[:16]
    optimizer.step()

    param.grad = None
    param.grad_dtype = torch.float32
    param.grad = memory[:32].view(torch.float32)
    before = memory.clone()
    with pytest.raises(ValueError, match="gradient that shares memory"):
        optimizer.step()
    assert torch.equal(memory, before)


def test_parameter_of_another_shape_than_its_state(optimizer: FusedAdamW) -> None:
    optimizer.step()
    replace_last(optimizer, torch.zeros(2, 3))
    with refused(optimizer, ValueError, LAST, r"\(2, 3\)", "exp_avg", r"\(2, 2\)"):
        optimizer.step()


@pytest.mark.parametrize(
    ("name", "value", "kind", "mentions"),
    [
        ("exp_avg", torch.zeros(4), ValueError, [r"\(2, 2\)", r"\(4,\)"]),
        ("exp_avg_sq", torch.zeros(2, 2).double(), TypeError, ["float64"]),
        ("exp_avg_sq", torch.zeros(2, 2).bfloat16(), TypeError, ["bfloat16", "same"]),
        ("exp_avg", torch.zeros(2, 2).to_sparse(), TypeError, []),
        ("exp_avg", torch.zeros(2, 2, device="meta"), (TypeError, RuntimeError), ["meta"]),
        ("max_exp_avg_sq", None, (TypeError, ValueError), []),
        ("step", 3, (TypeError, ValueError), []),
        ("step", torch.tensor(3), TypeError, ["int64", "float32"]),
        ("step", torch.zeros(2), TypeError, [r"\(2,\)"]),
        ("step", torch.tensor(-1.0), ValueError, ["-1"]),
        ("step", torch.tensor(NAN), ValueError, ["nan"]),
    ],
    ids=in_id,
)
def test_state_set_by_hand(
    optimizer: FusedAdamW, name: str, value: Any, kind: Any, mentions: list[str]
) -> None:
    optimizer.step()
    optimizer.state[last_param(optimizer)][name] = value
    with refused(optimizer, kind, LAST, name, *mentions):
        optimizer.step()


def test_missing_state(optimizer: FusedAdamW) -> None:
    optimizer.step()
    del optimizer.state[last_param(optimizer)]["exp_avg"]
    with refused(optimizer, (KeyError, ValueError), LAST, "exp_avg"):
        optimizer.step()


# --- Frozen parameters ---------------------------------------------------------------------------

FROZEN: list[Tensor] = [
    torch.zeros(3, dtype=torch.int64),
    torch.ones(2, dtype=torch.bool),
    torch.ones(2, dtype=torch.float64),
    torch.ones(2, dtype=torch.complex64),
    torch.ones(3, 3).to_sparse(),
    torch.ones(4, 1).expand(4, 4),
    torch.ones(2, device="meta"),
]


@pytest.mark.parametrize("frozen", FROZEN, ids=in_id)
def test_frozen_parameter_may_be_of_any_kind(frozen: Tensor) -> None:
    (param,), (expected,) = make_params([(3,)]), make_params([(3,)])
    before = content(frozen)
    optimizer = FusedAdamW([param, frozen], **LOUD)
    train(optimizer, [param], range(3))
    train(FusedAdamW([expected], **LOUD), [expected], range(3))
    assert torch.equal(param, expected)
    assert content(frozen) == before
    assert frozen not in optimizer.state


def test_frozen_parameter_is_thawed() -> None:
    params, expected = make_params([(3,), (4,)]), make_params([(3,), (4,)])
    params[1].requires_grad_(False)
    optimizer, plain = FusedAdamW(params, **LOUD), FusedAdamW(expected, **LOUD)
    train(optimizer, params[:1], range(2))
    train(plain, expected[:1], range(2))
    params[1].requires_grad_(True)
    train(optimizer, params, range(2, 4))
    train(plain, expected, range(2, 4))
    for x, y in zip(params, expected, strict=True):
        assert torch.equal(x, y)
    assert optimizer.state[params[1]]["step"] == 2


def test_frozen_parameter_that_cannot_be_stepped_is_thawed() -> None:
    """It is refused when there is a gradient to step with."""
    (param,), frozen = make_params([(3,)]), torch.ones(2, dtype=torch.float64)
    optimizer = FusedAdamW([param, frozen], **LOUD)
    train(optimizer, [param], range(2))
    frozen.requires_grad_(True)
    set_grads([param, frozen], 2)
    with refused(optimizer, TypeError, "parameter 1", "float64", "accepted: float32"):
        optimizer.step()


# --- Tensors that are none -----------------------------------------------------------------------


def test_fake_tensors() -> None:
    """They have a shape and no memory."""
    with FakeTensorMode():
        param = nn.Parameter(torch.ones(4))
        param.grad = torch.ones(4)
        optimizer = FusedAdamW([param])
        with pytest.raises(RuntimeError) as caught:
            optimizer.step()
    assert_clear(caught.value, "parameter 0", "FakeTensor", "accepted: a dense tensor with memory")
    assert not optimizer.state


def test_real_tensors_among_fakes() -> None:
    param = nn.Parameter(torch.ones(4))
    param.grad = torch.ones(4)
    optimizer = FusedAdamW([param])
    with FakeTensorMode(), pytest.raises(Exception, match="FakeTensor"):
        optimizer.step()
    assert not optimizer.state
    assert torch.equal(param, torch.ones(4))
    optimizer.step()
    assert optimizer.state[param]["step"] == 1


# --- Gradients -----------------------------------------------------------------------------------


def test_sparse_gradient(optimizer: FusedAdamW) -> None:
    param = last_param(optimizer)
    param.grad = None
    gradient = torch.ones(2, 2).to_sparse()
    param.grad = gradient
    with refused(optimizer, RuntimeError, LAST, "gradient", "sparse_coo", "accepted: "):
        optimizer.step()
    assert param.grad is gradient


def test_sparse_gradient_of_an_embedding() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Embedding(5, 3, sparse=True))
    optimizer = FusedAdamW(model.named_parameters())
    loss = model[0](torch.ones(2)).sum() + model[1](torch.tensor([1, 3])).sum()
    loss.backward()
    with refused(optimizer, RuntimeError, r"parameter 2 \('1.weight'\)", "sparse_coo"):
        optimizer.step()
    assert not optimizer.state


BAD_GRADIENT_DTYPES = [
    torch.float64,
    torch.complex64,
    torch.int64,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
]


@pytest.mark.parametrize("dtype", BAD_GRADIENT_DTYPES)
def test_gradient_dtype(optimizer: FusedAdamW, dtype: torch.dtype) -> None:
    last_param(optimizer).grad.data = torch.ones(2, 2).to(dtype)  # type: ignore[union-attr]
    name = str(dtype).removeprefix("torch.")
    with refused(optimizer, TypeError, LAST, "gradient", name, "accepted: float32, bfloat16"):
        optimizer.step()


def test_combination_of_dtypes() -> None:
    param = nn.Parameter(torch.zeros(3).bfloat16())
    named = [*many_params()[:-1], (f"w{MANY - 1}", param)]
    with pytest.raises(TypeError, match=r"parameter 0 \('w0'\): state_dtype: found torch.float16"):
        FusedAdamW(named, state_dtype=torch.float16)
    optimizer = FusedAdamW(named)
    set_grads([param], 0)
    optimizer.step()
    state = optimizer.state[param]
    state.update({name: state[name].half() for name in ("exp_avg", "exp_avg_sq")})
    with refused(
        optimizer,
        TypeError,
        LAST,
        "bfloat16/bfloat16/float16",
        "accepted: .*bfloat16/bfloat16/float32",
    ):
        optimizer.step()


@pytest.mark.parametrize("shape", [(4,), (2, 3), (2, 2, 1), (), (0, 2)])
def test_gradient_shape(optimizer: FusedAdamW, shape: tuple[int, ...]) -> None:
    last_param(optimizer).grad.data = torch.ones(shape)  # type: ignore[union-attr]
    texts = [re.escape(str(s)) for s in ((2, 2), shape)]
    with refused(optimizer, ValueError, LAST, "gradient", *texts):
        optimizer.step()


def test_refusal_does_not_depend_on_the_order(optimizer: FusedAdamW) -> None:
    """Nor does a refusal of the first parameter leave anything."""
    params = optimizer.param_groups[0]["params"]
    params[0].grad.data = torch.ones(7)
    with refused(optimizer, ValueError, r"parameter 0 \('w0'\)", "gradient"):
        optimizer.step()


def test_training_goes_on_after_a_refusal(optimizer: FusedAdamW) -> None:
    """A caller who mends the input gets what there had been without the refusal."""
    expected = copy.deepcopy(optimizer)
    for param, other in zip(
        optimizer.param_groups[0]["params"], expected.param_groups[0]["params"], strict=True
    ):
        other.grad = param.grad.clone()
    gradient = last_param(optimizer).grad
    assert gradient is not None
    good = gradient.data
    gradient.data = torch.ones(9)
    with refused(optimizer, ValueError, LAST):
        optimizer.step()
    gradient.data = good
    for o in (optimizer, expected):
        o.step()
        o.step()
    for param, other in zip(
        optimizer.param_groups[0]["params"], expected.param_groups[0]["params"], strict=True
    ):
        assert torch.equal(param, other)


# --- Checkpoints ---------------------------------------------------------------------------------


def trained(**options: Any) -> FusedAdamW:
    """An optimizer of two groups with three and one parameters, which have states."""
    params = make_params([(3,), (2, 2), (), (4,)])
    named = [(f"w{i}", param) for i, param in enumerate(params)]
    optimizer = FusedAdamW(
        [{"params": named[:3]}, {"params": named[3:]}], **LOUD, amsgrad=True, **options
    )
    train(optimizer, params, range(2))
    return optimizer


def other_checkpoint(cls: Any, steps: int = 2, **options: Any) -> dict[str, Any]:
    params = make_params([(3,), (2, 2), (), (4,)])
    optimizer = cls([{"params": params[:3]}, {"params": params[3:]}], **options)
    train(optimizer, params, range(10, 10 + steps))
    return saved(optimizer.state_dict())


def test_load_state_dict_is_whole() -> None:
    """The counterpart of all refusals: what is right arrives."""
    optimizer = trained()
    checkpoint = other_checkpoint(FusedAdamW, lr=0.7)
    optimizer.load_state_dict(checkpoint)
    loaded = optimizer.state_dict()
    assert content(loaded["state"]).keys() == content(checkpoint["state"]).keys()
    for index, state in checkpoint["state"].items():
        for name, value in state.items():
            assert torch.equal(loaded["state"][index][name], value)
    assert [group["lr"] for group in optimizer.param_groups] == [0.7, 0.7]


@pytest.mark.parametrize("steps", [0, 2], ids=["fresh", "trained"])
@pytest.mark.parametrize(
    "algorithm",
    ["SGD", "NAdam", "RMSprop", "Adamax", "RAdam", "Adagrad", "Adadelta", "ASGD", "Rprop"],
)
def test_checkpoint_of_another_algorithm(algorithm: str, steps: int) -> None:
    optimizer = trained()
    checkpoint = other_checkpoint(getattr(torch.optim, algorithm), steps)
    with refused(optimizer, ValueError, "state_dict", "group 0", "algorithm", "FusedAdamW"):
        optimizer.load_state_dict(checkpoint)


def test_checkpoint_with_states_of_another_algorithm() -> None:
    optimizer = trained()
    checkpoint = copy.deepcopy(optimizer.state_dict())
    state = checkpoint["state"][3]
    state["momentum_buffer"] = state.pop("exp_avg")
    with refused(optimizer, ValueError, "state_dict", r"parameter 3 \('w3'\)", "momentum_buffer"):
        optimizer.load_state_dict(checkpoint)


@pytest.mark.parametrize("saved_as", ["lr", "decoupled", "l2", "proximal", "Adam", "AdamW"])
@pytest.mark.parametrize("decay", ["lr", "decoupled", "l2", "proximal"])
def test_checkpoint_of_another_decay_convention(decay: str, saved_as: str) -> None:
    optimizer = trained(decay=decay)
    if saved_as in ("Adam", "AdamW"):
        checkpoint = other_checkpoint(getattr(torch.optim, saved_as))
    else:
        checkpoint = other_checkpoint(FusedAdamW, decay=saved_as)
    convention = {"Adam": "l2", "AdamW": "lr"}.get(saved_as, saved_as)
    if convention == decay:
        optimizer.load_state_dict(checkpoint)
        assert {group["decay"] for group in optimizer.param_groups} == {decay}
        return
    with refused(optimizer, ValueError, "state_dict", "group 0", repr(convention), repr(decay)):
        optimizer.load_state_dict(checkpoint)


def test_checkpoint_in_which_the_last_group_has_another_convention() -> None:
    optimizer = trained()
    checkpoint = copy.deepcopy(optimizer.state_dict())
    checkpoint["param_groups"][1]["decay"] = "l2"
    with refused(optimizer, ValueError, "state_dict", "group 1", "'l2'", "'lr'"):
        optimizer.load_state_dict(checkpoint)


Damage = Callable[[dict[str, Any]], object]


def state_of_last(name: str, value: Any) -> Damage:
    def damage(checkpoint: dict[str, Any]) -> None:
        checkpoint["state"][3][name] = value

    return damage


DAMAGES: dict[str, tuple[Damage, Any, list[str]]] = {
    "one group less": (lambda c: c["param_groups"].pop(), ValueError, ["1", "2", "groups"]),
    "one group more": (
        lambda c: c["param_groups"].append(dict(c["param_groups"][0], params=[])),
        ValueError,
        ["3", "2", "groups"],
    ),
    "one parameter less": (
        lambda c: c["param_groups"][1]["params"].pop(),
        ValueError,
        ["group 1", "0", "1", "param"],
    ),
    "one parameter more": (
        lambda c: c["param_groups"][1]["params"].append(9),
        ValueError,
        ["group 1", "2", "1", "param"],
    ),
    "parameters in other groups": (
        lambda c: c["param_groups"].reverse(),
        ValueError,
        ["group 0", "1", "3", "param"],
    ),
    "no groups": (lambda c: c.pop("param_groups"), ValueError, ["param_groups"]),
    "no states": (lambda c: c.pop("state"), ValueError, ["state"]),
    "no list of parameters": (
        lambda c: c["param_groups"][1].pop("params"),
        ValueError,
        ["group 1", "params"],
    ),
    "lost state": (lambda c: c["state"][3].pop("exp_avg_sq"), ValueError, ["3", "exp_avg_sq"]),
    "lost step": (lambda c: c["state"][3].pop("step"), ValueError, ["3", "step"]),
    "lost maximum": (
        lambda c: c["state"][3].pop("max_exp_avg_sq"),
        ValueError,
        ["3", "max_exp_avg_sq"],
    ),
    "other shape": (
        state_of_last("exp_avg", torch.zeros(5)),
        ValueError,
        [r"3 \('w3'\)", "exp_avg", r"\(5,\)", r"\(4,\)"],
    ),
    "other dimensions": (
        state_of_last("exp_avg_sq", torch.zeros(2, 2)),
        ValueError,
        [r"3 \('w3'\)", "exp_avg_sq", r"\(2, 2\)", r"\(4,\)"],
    ),
    "scalar": (
        state_of_last("exp_avg", torch.zeros(())),
        ValueError,
        [r"3 \('w3'\)", r"\(\)", r"\(4,\)"],
    ),
    "not a tensor": (
        state_of_last("exp_avg", [0.0] * 4),
        (TypeError, ValueError),
        [r"3 \('w3'\)", "exp_avg", "list"],
    ),
    "complex state": (
        state_of_last("exp_avg", torch.zeros(4, dtype=torch.complex64)),
        (TypeError, ValueError),
        [r"3 \('w3'\)", "exp_avg", "complex64"],
    ),
    "sparse state": (
        state_of_last("exp_avg", torch.zeros(4).to_sparse()),
        (TypeError, ValueError, RuntimeError),
        [r"3 \('w3'\)", "exp_avg", "sparse"],
    ),
    "state without memory": (
        state_of_last("exp_avg", torch.zeros(4, device="meta")),
        (TypeError, ValueError, RuntimeError),
        [r"3 \('w3'\)", "exp_avg", "meta"],
    ),
    "negative step": (
        state_of_last("step", torch.tensor(-1.0)),
        ValueError,
        [r"3 \('w3'\)", "step", "-1"],
    ),
    "step of NaN": (
        state_of_last("step", torch.tensor(NAN)),
        ValueError,
        [r"3 \('w3'\)", "step", "nan"],
    ),
    "infinite step": (
        state_of_last("step", torch.tensor(INF)),
        ValueError,
        [r"3 \('w3'\)", "step", "inf"],
    ),
    "several steps": (
        state_of_last("step", torch.zeros(2)),
        ValueError,
        [r"3 \('w3'\)", "step", r"\(2,\)"],
    ),
    "step in words": (
        state_of_last("step", "three"),
        (TypeError, ValueError),
        [r"3 \('w3'\)", "step", "three"],
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.filterwarnings("error::UserWarning")
def test_damaged_checkpoint(damage: str) -> None:
    apply, kind, mentions = DAMAGES[damage]
    optimizer = trained()
    checkpoint = other_checkpoint(FusedAdamW, amsgrad=True, lr=0.7)
    apply(checkpoint)
    with refused(optimizer, kind, "state_dict", *mentions):
        optimizer.load_state_dict(checkpoint)
    train(optimizer, [p for g in optimizer.param_groups for p in g["params"]], range(2, 4))


def test_checkpoint_of_a_model() -> None:
    """A mix-up of files."""
    model = nn.Linear(2, 2)
    optimizer = FusedAdamW(model.parameters())
    with refused(optimizer, (TypeError, ValueError), "state_dict", "param_groups"):
        optimizer.load_state_dict(model.state_dict())


def test_refused_checkpoint_is_left_alone() -> None:
    optimizer = trained()
    checkpoint = other_checkpoint(FusedAdamW, amsgrad=True)
    checkpoint["state"][3]["exp_avg"] = torch.zeros(5)
    before = content(checkpoint)
    with refused(optimizer, ValueError):
        optimizer.load_state_dict(checkpoint)
    assert content(checkpoint) == before


# --- The functional form -------------------------------------------------------------------------

LISTS = ("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "state_steps")


def arguments() -> dict[str, Any]:
    """What a call of `functional.adamw` takes, over three tensors."""
    shapes = [(5,), (), (3, 3)]
    lists: dict[str, Any] = {name: [torch.ones(s) for s in shapes] for name in LISTS[:5]}
    return {
        **lists,
        "state_steps": [torch.tensor(2.0) for _ in shapes],
        **{"amsgrad": True, "beta1": 0.9, "beta2": 0.99, "lr": 0.1, "weight_decay": 0.1},
        **{"eps": 1e-3, "maximize": False},
    }


@pytest.mark.parametrize("change", [-1, 1], ids=["shorter", "longer"])
@pytest.mark.parametrize("name", LISTS[1:])
def test_functional_lists_of_different_lengths(name: str, change: int) -> None:
    given = arguments()
    given[name] = given[name][:change] if change < 0 else [*given[name], torch.tensor(1.0)]
    with refused(given, ValueError, name, str(3 + change), "3"):
        functional.adamw(**given)


@pytest.mark.parametrize("name", ["exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"])
def test_functional_state_of_other_strides(name: str) -> None:
    given = arguments()
    given[name][2] = torch.ones(3, 3).t()
    with refused(given, ValueError, "parameter 2", name[:-1], r"\(3, 1\)", r"\(1, 3\)"):
        functional.adamw(**given)


@pytest.mark.parametrize(
    ("name", "value", "kind", "mentions"),
    [
        ("grads", torch.ones(9), ValueError, ["gradient", r"\(9,\)", r"\(3, 3\)"]),
        ("grads", torch.ones(3, 3).long(), TypeError, ["gradient", "int64"]),
        ("grads", torch.ones(3, 3).double(), TypeError, ["gradient", "float64"]),
        ("grads", torch.ones(3, 3).bool(), TypeError, ["gradient", "bool"]),
        ("grads", torch.ones(3, 3) * 1j, TypeError, ["gradient", "complex64"]),
        ("grads", (torch.ones(3, 3) * 1j).conj(), TypeError, ["gradient", "complex64"]),
        ("grads", torch.ones(3, 3).to_sparse(), (TypeError, RuntimeError), ["gradient", "sparse"]),
        ("grads", torch.ones(3, 3, device="meta"), RuntimeError, ["gradient", "meta", "cpu"]),
        ("grads", [1.0], (TypeError, RuntimeError), ["gradient", "list"]),
        ("params", torch.ones(3, 3).double(), TypeError, ["float64"]),
        ("params", torch.ones(3, 6)[:, ::2], ValueError, [r"\(6, 2\)", "dense"]),
        ("params", torch.ones(3, 1).expand(3, 3), ValueError, [r"\(1, 0\)", "dense"]),
        ("params", torch.ones(3, 3, device="meta"), RuntimeError, ["meta"]),
        ("params", [1.0], TypeError, ["list"]),
        ("exp_avgs", torch.ones(9), ValueError, ["exp_avg", r"\(9,\)"]),
        ("exp_avgs", torch.ones(3, 3).bfloat16(), TypeError, ["exp_avg_sq", "same"]),
        ("exp_avg_sqs", torch.ones(3, 3).long(), TypeError, ["exp_avg_sq", "int64"]),
        ("exp_avg_sqs", torch.ones(3, 3, device="meta"), TypeError, ["exp_avg_sq", "meta"]),
        ("state_steps", torch.tensor(2), TypeError, ["step", "int64", "float32"]),
        ("state_steps", torch.tensor(NAN), ValueError, ["step", "nan"]),
        ("state_steps", 2.0, TypeError, ["step", "float"]),
    ],
    ids=in_id,
)
def test_functional_bad_tensor(name: str, value: Any, kind: Any, mentions: list[str]) -> None:
    """The last of three."""
    given = arguments()
    given[name][2] = value
    with refused(given, kind, "parameter 2", *mentions):
        functional.adamw(**given)


def test_functional_tensors_that_share_memory() -> None:
    given = arguments()
    given["exp_avgs"][2] = given["exp_avg_sqs"][2]
    with refused(given, ValueError, "parameter 2", "memory"):
        functional.adamw(**given)
    given = arguments()
    given["params"][2] = given["params"][0]
    given["grads"][2] = given["grads"][0]
    for name in LISTS[2:5]:
        given[name][2] = torch.ones(5)
    with refused(given, ValueError, "parameter 2", "parameter 0", "memory"):
        functional.adamw(**given)


@pytest.mark.parametrize(
    ("name", "named", "value"),
    [
        ("lr", "lr", -1.0),
        ("lr", "lr", torch.tensor(NAN)),
        ("beta1", "beta", 1.0),
        ("beta2", "beta", NAN),
        ("eps", "eps", -1.0),
        ("weight_decay", "weight_decay", INF),
        ("schedule_multiplier", "schedule_multiplier", -1.0),
        ("decay", "decay", "none"),
        ("engine", "engine", "gpu"),
    ],
)
def test_functional_hyperparameter(name: str, named: str, value: Any) -> None:
    given = {**arguments(), name: value}
    with refused(given, ValueError, named, "accepted"):
        functional.adamw(**given)
