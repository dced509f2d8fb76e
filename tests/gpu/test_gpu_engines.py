"""The engines on a GPU: the bits of the CPU engine, and good manners towards torch.

CUDA's kernels as nvcc compiled them, Triton's as it compiles them here.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from problems import (
    ADAM,
    DRAWS,
    FORMATS,
    RULES,
    UNIFORM_FORMATS,
    Format,
    Parameter,
    Problem,
    Rule,
    Schedule,
    State,
    by_name,
    differences,
)
from torch import Tensor

from fused_adamw import _C, FusedAdamW, engine_status

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU"),
]

CHUNK = _C.CHUNK
# Around the width of every access, a block's width in elements, Triton's tile and CUDA's chunk.
EDGES = (4, 8, 16, 32, 256, 1024, 2048, 4096, CHUNK, 3 * CHUNK)
MANY = 2**31
RAGGED = (0, 1, 2, 3, *(edge + i for edge in EDGES for i in (-1, 0, 1)), 5, 0)

all_formats = pytest.mark.parametrize("dtypes", FORMATS, ids="-".join)
uniform_formats = pytest.mark.parametrize("dtypes", UNIFORM_FORMATS, ids="-".join)
all_rules = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)


@pytest.fixture(params=["cuda", "triton"])
def engine(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    reason = engine_status()[name]
    if reason is not None:
        pytest.skip(f"engine {name!r}: {reason}")
    return name


def assert_as_on_cpu(
    problem: Problem, engine: str, after: Sequence[int] = (1,), schedule: Schedule | None = None
) -> None:
    """Steps a GPU engine beside the CPU engine and compares all bits, guard bytes included."""
    expected, found = State(problem), State(problem, "cuda")
    for step in range(1, max(after) + 1):
        groups = None if schedule is None else schedule(step)
        expected.step(by_name("cpu"), groups)
        found.step(by_name(engine), groups)
        if step in after:
            lines = differences(expected, found)
            assert not lines, "\n".join([f"{engine} after {step} steps:", *lines])


# --- The bits of the CPU engine ------------------------------------------------------------------


@all_formats
@all_rules
def test_all_variants(rule: Rule, dtypes: Format, engine: str) -> None:
    """Every decay convention, amsgrad and maximize, in one list."""
    groups = rule.groups()
    parameters = [Parameter(1037, dtypes, group, step=group) for group in range(len(groups))]
    assert_as_on_cpu(Problem(rule, groups, parameters, gradients=3), engine, after=(1, 2, 10))


@uniform_formats
@all_rules
def test_hyperparameters_that_change_between_steps(rule: Rule, dtypes: Format, engine: str) -> None:
    groups = rule.groups()
    parameters = [Parameter(1037, dtypes, group) for group in range(len(groups))]
    assert_as_on_cpu(
        Problem(rule, groups, parameters, gradients=2),
        engine,
        after=(1, 2, 3, 4, 5),
        schedule=lambda step: [
            {**group, **rule.changes[(step + i) % len(rule.changes)]}
            for i, group in enumerate(groups)
        ],
    )


@all_formats
@all_rules
def test_ragged_sizes(rule: Rule, dtypes: Format, engine: str) -> None:
    groups = rule.groups(rule.compiled)
    parameters = [
        Parameter(numel, dtypes, group) for group in range(len(groups)) for numel in RAGGED
    ]
    assert_as_on_cpu(Problem(rule, groups, parameters), engine)


@all_formats
@all_rules
def test_unaligned_views(rule: Rule, dtypes: Format, engine: str) -> None:
    """One array in turn lies off its boundary, then all do."""
    groups = rule.groups(rule.compiled)
    arrays = 6  # no rule has more
    offsets = [tuple(int(k == slot) for k in range(arrays)) for slot in range(arrays)]
    offsets += [(1,), (2,), (3,), (4,), (1, 2, 3, 0, 5, 7)]
    parameters = [
        Parameter(numel, dtypes, group, offsets=off)
        for group in range(len(groups))
        for off in offsets
        for numel in (5, 300, 2 * CHUNK + 5)
    ]
    assert_as_on_cpu(Problem(rule, groups, parameters), engine)


@pytest.mark.parametrize("values", ["special", "bits"])
@all_formats
@all_rules
def test_special_values(rule: Rule, dtypes: Format, values: str, engine: str) -> None:
    """Zeros, denormals, infinities, NaNs, huge and tiny numbers in all arrays at once."""
    groups = [*rule.groups(), *({**group, "eps": 0.0} for group in rule.groups(rule.compiled))]
    parameters = [
        Parameter(20000, dtypes, group, step=9 * (group % 2)) for group in range(len(groups))
    ]
    problem = Problem(rule, groups, parameters, draw=DRAWS[values])
    assert_as_on_cpu(problem, engine, after=(1, 2))


@all_rules
def test_many_small_tensors(rule: Rule, engine: str) -> None:
    """Several launches: one list ends them by tensors, one by rows of coefficients."""
    groups = rule.groups(rule.compiled)
    for steps in (3, 300):
        parameters = [
            Parameter(i * i % 83, group=i % len(groups), step=i * 7 % steps) for i in range(5000)
        ]
        assert_as_on_cpu(Problem(rule, groups, parameters), engine, after=(2,))


@all_rules
def test_a_list_of_everything(rule: Rule, engine: str) -> None:
    """All formats, groups, step counts, offsets, and parameters without a gradient."""
    groups = rule.groups()
    parameters = [
        Parameter(
            numel=i * 5 % 71,
            dtypes=FORMATS[i % len(FORMATS)],
            group=i % len(groups),
            step=(0, 1, 9, 999, 2**24)[i % 5],
            offsets=(0, 0, i % 3),
            has_grad=i % 4 != 1,
        )
        for i in range(300)
    ]
    assert_as_on_cpu(Problem(rule, groups, parameters, gradients=2), engine, after=(1, 2, 3))


@pytest.mark.parametrize("sizes", [(), (0,), (0, 0, 0)], ids=len)
def test_a_list_without_elements(sizes: tuple[int, ...], engine: str) -> None:
    parameters = [Parameter(numel) for numel in sizes]
    assert_as_on_cpu(Problem(ADAM, ADAM.groups(), parameters), engine)


def test_more_than_31_bits_of_elements(engine: str) -> None:
    """Random at the start, in the middle and at the end; all the rest of one value."""
    numel, ends, bytes_needed = MANY + 5, 4096, 5 * 2 * MANY
    if torch.cuda.mem_get_info()[0] < bytes_needed:
        pytest.skip(f"needs {bytes_needed >> 30} GiB of free GPU memory")
    windows = [slice(0, ends), slice(MANY // 2, MANY // 2 + ends), slice(numel - ends, numel)]
    generator = torch.Generator().manual_seed(0)

    param, grad = (torch.full((numel,), x, dtype=torch.bfloat16, device="cuda") for x in (1, 0.5))
    # A tensor on the CPU for each window, and a last one for the value everywhere else.
    small = [torch.ones(n, dtype=torch.bfloat16) for n in (*[ends] * len(windows), 1)]
    for window, twin in zip(windows, small[:-1], strict=True):
        twin.grad = torch.randn(ends, generator=generator).to(torch.bfloat16)
        grad[window] = twin.grad.cuda()
    small[-1].grad = torch.full((1,), 0.5, dtype=torch.bfloat16)
    param.grad = grad
    for optimizer in (FusedAdamW([param], lr=0.1, engine=engine), FusedAdamW(small, lr=0.1)):
        optimizer.step()
        optimizer.step()

    for window, twin in zip(windows, small[:-1], strict=True):
        assert torch.equal(param[window].cpu(), twin)
        param[window] = small[-1].item()
    part = MANY // 8
    for begin in range(0, numel, part):
        assert bool((param[begin : begin + part] == small[-1].item()).all()), begin
    del param, grad
    torch.cuda.empty_cache()


# --- The optimizer -------------------------------------------------------------------------------


def make_params(device: str) -> list[Tensor]:
    """Parameters of several layouts, the same numbers on every device."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((64, 33), (), (17,), (0, 3), (8, 5, 3, 3), (130, 70))
    params = [torch.randn(shape, generator=generator) for shape in shapes]
    params[4] = params[4].contiguous(memory_format=torch.channels_last)
    params[5] = params[5].t()
    return [param.to(device).requires_grad_() for param in params]


def set_gradients(params: list[Tensor], seed: int) -> None:
    """New gradients, contiguous in some order of dimensions that need not be the parameter's."""
    generator = torch.Generator().manual_seed(seed)
    for i, param in enumerate(params):
        grad = torch.randn(param.shape, generator=generator)
        if (i + seed) % 2 and grad.dim() > 1:
            grad = grad.transpose(0, 1).contiguous().transpose(0, 1)
        param.grad = grad.to(param.device)


def train(optimizer: FusedAdamW, seeds: range) -> list[Tensor]:
    """Steps, and a copy on the CPU of what they leave: parameters, then states."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for seed in seeds:
        set_gradients(params, seed)
        optimizer.step()
    states = [value for param in params for value in optimizer.state[param].values()]
    return [tensor.detach().to("cpu", copy=True) for tensor in (*params, *states)]


def assert_equal(found: list[Tensor], wanted: list[Tensor]) -> None:
    for i, (x, y) in enumerate(zip(found, wanted, strict=True)):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        x, y = (tensor.contiguous().view(-1).view(torch.int32) for tensor in (x, y))
        assert torch.equal(x, y), f"tensor {i}"


def test_layouts_and_strides_of_gradients(engine: str) -> None:
    wanted = train(FusedAdamW(make_params("cpu"), lr=0.1, amsgrad=True), range(4))
    found = train(FusedAdamW(make_params("cuda"), lr=0.1, amsgrad=True, engine=engine), range(4))
    assert_equal(found, wanted)


def test_hundreds_of_param_groups(engine: str) -> None:
    """More groups than a launch has rows of coefficients."""

    def optimizer(device: str, name: str) -> FusedAdamW:
        generator = torch.Generator().manual_seed(2)
        params = [torch.randn(7 + i % 5, generator=generator).to(device) for i in range(400)]
        groups = [
            {"params": [param.requires_grad_()], "lr": 1e-3 * (1 + i), "betas": (i / 500, 0.99)}
            for i, param in enumerate(params)
        ]
        return FusedAdamW(groups, engine=name)

    wanted = train(optimizer("cpu", "cpu"), range(3))
    assert_equal(train(optimizer("cuda", engine), range(3)), wanted)


def test_auto_serves_both_devices_in_one_optimizer() -> None:
    wanted = train(FusedAdamW([*make_params("cpu"), *make_params("cpu")]), range(2))
    found = train(FusedAdamW([*make_params("cpu"), *make_params("cuda")]), range(2))
    assert_equal(found, wanted)


def test_checkpoints_move_between_devices(engine: str) -> None:
    """Trained in turns on the CPU and the GPU, as if on the CPU all along."""
    wanted = train(FusedAdamW(make_params("cpu"), lr=0.1), range(6))

    optimizers = [
        FusedAdamW(make_params("cpu"), lr=0.1),
        FusedAdamW(make_params("cuda"), lr=0.1, engine=engine),
    ]
    found: list[Tensor] = []
    for turn in range(3):
        here, there = optimizers[turn % 2], optimizers[(turn + 1) % 2]
        found = train(here, range(2 * turn, 2 * turn + 2))
        there.load_state_dict(here.state_dict())
        sources, targets = (optimizer.param_groups[0]["params"] for optimizer in (here, there))
        for source, target in zip(sources, targets, strict=True):
            target.data.copy_(source)
            assert there.state[target]["exp_avg"].device == target.device
            assert there.state[target]["step"].device.type == "cpu"
    assert_equal(found, wanted)


# --- Streams, devices, graphs --------------------------------------------------------------------


def test_work_goes_to_the_current_stream(engine: str) -> None:
    """After a pause and a new gradient on a side stream, before a copy; the host does not wait."""
    param = torch.ones(1 << 20, device="cuda", requires_grad=True)
    param.grad = torch.ones_like(param)
    after = torch.zeros_like(param)
    optimizer = FusedAdamW([param], lr=0.1, engine=engine)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        optimizer.step()  # registers the list, compiles the kernel, allocates
        torch.cuda.synchronize()
        torch.cuda._sleep(400_000_000)  # clock cycles: about 0.2 s
        param.grad.fill_(-2.0)
        optimizer.step()
        after.copy_(param.detach())
        finished = side.query()
    torch.cuda.synchronize()

    twin = torch.ones(1, requires_grad=True)
    reference = FusedAdamW([twin], lr=0.1)
    for value in (1.0, -2.0):
        twin.grad = torch.full((1,), value)
        reference.step()
    assert torch.equal(after.cpu(), twin.detach().expand(after.shape))
    assert torch.equal(param, after)
    assert not finished, "the host waited for the GPU"


@pytest.mark.parametrize("index", range(max(torch.cuda.device_count(), 1)))
def test_current_device_is_left_alone(index: int, engine: str) -> None:
    current, other = torch.cuda.current_device(), torch.device("cuda", index)
    param = torch.ones(300, device=other, requires_grad=True)
    param.grad = torch.ones_like(param)
    FusedAdamW([param], engine=engine).step()
    assert torch.cuda.current_device() == current
    assert torch.zeros(1, device="cuda").device.index == current
    assert bool((param < 1).all())


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_a_step_under_graph_capture_is_refused(engine: str) -> None:
    optimizer = FusedAdamW(make_params("cuda"), lr=0.1, engine=engine)
    before = train(optimizer, range(2))
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="graph capture"), torch.cuda.graph(graph):
        optimizer.step()
    assert_equal(train(optimizer, range(0)), before)
    wanted = train(FusedAdamW(make_params("cpu"), lr=0.1), range(3))
    assert_equal(train(optimizer, range(2, 3)), wanted)


def test_states_stay_where_their_parameters_are(engine: str) -> None:
    param = torch.ones(5, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    param.grad = torch.ones_like(param)
    optimizer = FusedAdamW([param], engine=engine, state_dtype=torch.float32)
    optimizer.step()
    state = optimizer.state[param]
    assert state["step"].device.type == "cpu"
    for name in ("exp_avg", "exp_avg_sq"):
        assert (state[name].device, state[name].dtype) == (param.device, torch.float32)
