"""Every engine returns the bits of the float32 reference, on any list and for any values.

Here are the engines that work on host memory: the CPU engine at each SIMD level with 1 and 2
threads, the body of the CUDA kernel played on the host, and Triton's interpreter, which is slow and
gets less to do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import (
    ADAM,
    BF16,
    DRAWS,
    F16,
    F32,
    FORMATS,
    HOST_ENGINES,
    REFERENCE_ENGINE,
    RULES,
    SIMD_LEVELS,
    TRITON_ENGINES,
    UNIFORM_FORMATS,
    Format,
    Group,
    Parameter,
    Problem,
    Rule,
    Schedule,
    State,
    array,
    assert_same_bits,
    differences,
    draw_normal,
    same_bits,
)

import fused_adamw
from fused_adamw import _C, functional, reference

CHUNK = _C.CHUNK
RANGE = 65536  # most elements in a range of the CPU engine, which is also a multiple of CHUNK
TRITON_TILE = 2048

# Around the width of every vector and access, the tile of Triton, the chunk of CUDA, and the least
# and the most that a range of the CPU engine may have.
RAGGED = (
    *(0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129),
    *(edge + i for edge in (TRITON_TILE, 8192, CHUNK, RANGE) for i in (-1, 0, 1)),
    0,
)

ALL_ENGINES = HOST_ENGINES | REFERENCE_ENGINE | TRITON_ENGINES

all_rules = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
all_formats = pytest.mark.parametrize("dtypes", FORMATS, ids="-".join)
uniform_formats = pytest.mark.parametrize("dtypes", UNIFORM_FORMATS, ids="-".join)
needs_triton = pytest.mark.skipif(
    not TRITON_ENGINES, reason="Triton is missing, or does not interpret"
)


def changing(rule: Rule, groups: Sequence[Group]) -> Schedule:
    """A schedule under which each group goes through the rule's changes, out of phase."""
    return lambda step: [
        {**group, **rule.changes[(step + i) % len(rule.changes)]} for i, group in enumerate(groups)
    ]


# --- Steps, options, sizes -----------------------------------------------------------------------


@all_formats
@all_rules
def test_all_variants_over_a_hundred_steps(rule: Rule, dtypes: Format) -> None:
    groups = rule.groups()
    parameters = [Parameter(37, dtypes, group) for group in range(len(groups))]
    problem = Problem(rule, groups, parameters, gradients=3)
    # How a format is loaded and stored has nothing to do with the rule.
    long = rule is ADAM or dtypes in UNIFORM_FORMATS
    assert_same_bits(problem, after=(1, 2, 10, 100) if long else (1, 2, 10))


@uniform_formats
@all_rules
def test_hyperparameters_that_change_between_steps(rule: Rule, dtypes: Format) -> None:
    groups = rule.groups()
    parameters = [Parameter(37, dtypes, group, step=group) for group in range(len(groups))]
    problem = Problem(rule, groups, parameters, gradients=3)
    assert_same_bits(problem, after=(1, 2, 3, 4, 5, 20), schedule=changing(rule, groups))


@all_formats
@all_rules
def test_ragged_sizes(rule: Rule, dtypes: Format) -> None:
    groups = rule.groups(rule.compiled)
    parameters = [Parameter(numel, dtypes) for numel in RAGGED]
    parameters += [
        Parameter(numel, dtypes, group)
        for group in range(1, len(groups))
        for numel in RAGGED
        if numel < RANGE - 1
    ]
    assert_same_bits(Problem(rule, groups, parameters))


@pytest.mark.parametrize("numel", [*range(CHUNK - 1, CHUNK + 2), *range(RANGE - 1, RANGE + 2)])
def test_one_tensor_beside_the_start_of_threads(numel: int) -> None:
    """Alone in its list, a tensor decides whether there are threads and where they are cut."""
    for dtypes in UNIFORM_FORMATS:
        assert_same_bits(Problem(ADAM, [ADAM.groups()[0]], [Parameter(numel, dtypes)]))


@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (BF16, F32, BF16)], ids="-".join)
def test_ranges_of_full_size(dtypes: Format) -> None:
    sizes = (RANGE, 3 * RANGE + 1, 1, 0, 5 * RANGE - 1)
    parameters = [Parameter(numel, dtypes) for numel in sizes]
    assert_same_bits(Problem(ADAM, [ADAM.groups()[0]], parameters))


# --- Memory --------------------------------------------------------------------------------------


@all_formats
@all_rules
def test_unaligned_views(rule: Rule, dtypes: Format) -> None:
    """One array in turn off its boundary by 1 to 3 elements, all by the same, all by another."""
    groups = rule.groups(rule.compiled)
    arrays = 6  # no rule has more
    offsets = [
        *(
            tuple(off * (k == slot) for k in range(arrays))
            for off in (1, 2, 3)
            for slot in (0, 1, 2)
        ),
        *((off,) for off in (1, 2, 3, 4)),
        *((1, 2, 3, 0), (3, 0, 2, 1, 1, 2)),
    ]
    parameters = [
        Parameter(numel, dtypes, group, offsets=off)
        for group in range(len(groups))
        for off in offsets
        for numel in (5, 67, 300)
    ]
    parameters.append(Parameter(2 * CHUNK + 5, dtypes, offsets=(1,)))
    assert_same_bits(Problem(rule, groups, parameters))


# --- Lists ---------------------------------------------------------------------------------------


@all_rules
def test_many_small_tensors(rule: Rule) -> None:
    """Several launches of CUDA: one list ends them by tensors, one by rows of coefficients."""
    first, *_, last = rule.groups(rule.compiled)  # the fewest and the most states
    groups = [first, last]
    for steps in (3, 300):
        parameters = [Parameter(i * i % 23, group=i % 2, step=i * 7 % steps) for i in range(1300)]
        assert_same_bits(Problem(rule, groups, parameters), after=(2,))


@all_rules
def test_neighbours_that_differ_in_one_thing(rule: Rule) -> None:
    """In their gradient's dtype, say, or only in their group or step count."""
    groups = [rule.groups()[0], {**rule.groups()[0], "lr": 0.03}]
    parameters = [Parameter(9, dtypes, g, t) for g in (0, 1) for t in (0, 1) for dtypes in FORMATS]
    parameters += [Parameter(9, FORMATS[0], g, t) for g in (0, 1) for t in (2, 3, 2)]
    parameters += [Parameter(9, FORMATS[0], g, t) for t in (2, 3, 2) for g in (0, 1)]
    assert_same_bits(Problem(rule, groups, parameters), ALL_ENGINES, after=(1, 2))


@all_rules
def test_a_list_of_everything(rule: Rule) -> None:
    """All formats, groups, different step counts, and parameters without a gradient."""
    groups = rule.groups()
    parameters = [
        Parameter(
            numel=i * 5 % 71,
            dtypes=FORMATS[i % len(FORMATS)],
            group=i % len(groups),
            step=(0, 1, 2, 9, 999, 10**6, 2**24 - 1, 2**24)[i % 8],
            offsets=(0, 0, i % 3),
            has_grad=i % 4 != 1,
        )
        for i in range(300)
    ]
    problem = Problem(rule, groups, parameters, gradients=2)
    engines = HOST_ENGINES | REFERENCE_ENGINE
    assert_same_bits(problem, engines, after=(1, 2, 3), schedule=changing(rule, groups))

    state = State(problem)
    state.step_by_reference()
    for i, parameter in enumerate(parameters):
        if not parameter.has_grad:
            assert state.steps[i] == parameter.step
            for slot in problem.slots[i].values():
                before, after = array(problem.memory, slot), array(state.memory, slot)
                assert before.tobytes() == after.tobytes()


def test_a_list_without_elements() -> None:
    for sizes in ((), (0,), (0, 0, 0)):
        problem = Problem(ADAM, ADAM.groups(), [Parameter(numel) for numel in sizes])
        assert_same_bits(problem, ALL_ENGINES)


# --- Values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", ["special", "bits"])
@all_formats
@all_rules
def test_special_values(rule: Rule, dtypes: Format, values: str) -> None:
    """Zeros, denormals, infinities, NaNs, huge and tiny numbers in all arrays at once."""
    groups = rule.groups()
    if "eps" in rule.loud:
        groups += [{**group, "eps": 0.0} for group in rule.groups(rule.compiled)]
    parameters = [
        Parameter(600, dtypes, group, step=9 * (group % 2)) for group in range(len(groups))
    ]
    assert_same_bits(Problem(rule, groups, parameters, draw=DRAWS[values]), after=(1, 2))


@pytest.mark.parametrize("values", ["special", "bits"])
def test_extreme_hyperparameters(values: str) -> None:
    """Coefficients that are denormal, infinite, 0 or the last before 1."""
    extremes: list[dict[str, float]] = [
        {"lr": 0.0},
        {"lr": 1e-42},
        {"lr": 1e300, "schedule_multiplier": 1e30},
        {"schedule_multiplier": 0.0},
        {"beta1": 0.0, "beta2": 0.0},
        {"beta1": 1 - 2.0**-53, "beta2": 1 - 2.0**-53},
        {"beta1": 1e-310, "beta2": 5e-324},
        {"eps": 0.0},
        {"eps": 1e-46},
        {"eps": 1e308},
        {"weight_decay": 0.0},
        {"weight_decay": 1e-46},
        {"weight_decay": 1e300},
    ]
    groups = [{**group, **extreme} for extreme in extremes for group in ADAM.groups()]
    parameters = [Parameter(300, group=group) for group in range(len(groups))]
    assert_same_bits(Problem(ADAM, groups, parameters, draw=DRAWS[values]), after=(2,))


@contextmanager
def flushed_denormals() -> Iterator[None]:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("name", HOST_ENGINES)
def test_flushed_denormals_are_kept(name: str) -> None:
    tiny = [np.float32(2.0**-130) * scale for scale in (1, -3, 0.01)]

    def draw(rng: np.random.Generator, numel: int, dtype: str, square: bool) -> Any:
        return reference.store(rng.choice(tiny, numel).astype(np.float32), dtype)

    groups = ADAM.groups()
    parameters = [
        Parameter(3000, dtypes, group) for group in range(len(groups)) for dtypes in FORMATS
    ]
    problem = Problem(ADAM, groups, parameters, draw)
    kept, flushed = State(problem), State(problem)
    kept.step(HOST_ENGINES[name])
    with flushed_denormals():
        flushed.step(HOST_ENGINES[name])
        assert torch.tensor(2.0**-127) / 2 == 0, "the caller's setting is left as it was"
    assert not differences(kept, flushed)


# --- Drawn cases ---------------------------------------------------------------------------------


@st.composite
def problems(draw: st.DrawFn) -> tuple[Problem, list[list[Group]]]:
    """A problem of any kind, and the hyperparameters of its groups at each of some steps."""
    rule = draw(st.sampled_from(RULES))
    variants = draw(st.lists(st.sampled_from(rule.variants()), min_size=1, max_size=3))
    numbers = st.tuples(*[rule.numbers] * len(variants))
    steps: list[list[Group]] = [
        [{**variant, **values} for variant, values in zip(variants, drawn, strict=True)]
        for drawn in draw(st.lists(numbers, min_size=1, max_size=3))
    ]
    sizes = st.integers(0, 100) | st.sampled_from([size for size in RAGGED if size < RANGE - 1])
    parameter = st.builds(
        Parameter,
        numel=sizes,
        dtypes=st.sampled_from(FORMATS),
        group=st.integers(0, len(variants) - 1),
        step=st.integers(0, 20) | st.integers(0, 2**24),
        offsets=st.lists(st.integers(0, 9), min_size=1, max_size=6).map(tuple),
        has_grad=st.sampled_from([True, True, True, False]),
    )
    problem = Problem(
        rule,
        steps[0],
        draw(st.lists(parameter, min_size=1, max_size=8)),
        draw=DRAWS[draw(st.sampled_from(sorted(DRAWS)))],
        seed=draw(st.integers(0, 2**32 - 1)),
        gradients=draw(st.integers(1, 2)),
    )
    return problem, steps


@settings(deadline=None, max_examples=200)
@given(problems())
def test_drawn_cases(drawn: tuple[Problem, list[list[Group]]]) -> None:
    problem, steps = drawn
    after = range(1, len(steps) + 1)
    engines = HOST_ENGINES | REFERENCE_ENGINE
    assert_same_bits(problem, engines, after=after, schedule=lambda step: steps[step - 1])


# --- The public functions ------------------------------------------------------------------------

ENGINE_NAMES = ["reference", "auto", "cpu", "cuda-on-host", *TRITON_ENGINES]


@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (BF16, BF16, F32)], ids="-".join)
def test_optimizer_on_every_engine(dtypes: Format) -> None:
    """Two param groups with different values, one of which changes; a late first gradient."""
    param_dtype, grad_dtype, state_dtype = (getattr(torch, dtype) for dtype in dtypes)
    results = []
    for engine in ENGINE_NAMES:
        generator = torch.Generator().manual_seed(0)
        params = [
            torch.randn(shape, generator=generator).to(param_dtype).requires_grad_()
            for shape in ((5, 7), (), (33,), (0, 3), (3, 4, 5))
        ]
        params[4].data = params[4].data.permute(2, 0, 1)
        optimizer = fused_adamw.FusedAdamW(
            [
                {"params": params[:2], "lr": 0.1, "weight_decay": 0.1},
                {"params": params[2:], "betas": (0.8, 0.9), "maximize": True, "amsgrad": True},
            ],
            engine=engine,
            decay="decoupled",
            state_dtype=state_dtype,
        )
        for step in range(5):
            optimizer.param_groups[1]["schedule_multiplier"] = 1 / (1 + step)
            for param in params[min(step, 1) :] if step < 3 else params:
                param.grad_dtype = grad_dtype
                param.grad = torch.randn(param.shape, generator=generator).to(grad_dtype)
            optimizer.step()
        states = [tensor for p in params for tensor in optimizer.state[p].values()]
        results.append([t.detach().clone() for t in (*params, *states)])
    for engine, found in zip(ENGINE_NAMES[1:], results[1:], strict=True):
        for want, got in zip(results[0], found, strict=True):
            assert same_bits(want, got), engine


@pytest.mark.parametrize("engine", ENGINE_NAMES[1:])
def test_function_on_every_engine(engine: str) -> None:
    values = {key: value for key, value in ADAM.loud.items() if key != "lr"}

    def run(name: str) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        lists = [
            [torch.rand(shape, generator=generator) for shape in ((7,), (300, 3))] for _ in range(5)
        ]
        steps = [torch.tensor(0.0), torch.tensor(4.0)]
        for _ in range(2):
            functional.adamw(
                *lists, steps, amsgrad=True, maximize=False, lr=0.1, engine=name, **values
            )
        return [tensor for tensors in (*lists, steps) for tensor in tensors]

    for want, got in zip(run("reference"), run(engine), strict=True):
        assert same_bits(want, got)


# --- Triton --------------------------------------------------------------------------------------


@needs_triton
@all_formats
@all_rules
def test_triton_all_variants(rule: Rule, dtypes: Format) -> None:
    if rule is not ADAM and dtypes not in UNIFORM_FORMATS:
        pytest.skip("how a format is loaded and stored has nothing to do with the rule")
    groups = rule.groups()
    parameters = [Parameter(19, dtypes, group, step=group) for group in range(len(groups))]
    problem = Problem(rule, groups, parameters, gradients=2)
    assert_same_bits(problem, TRITON_ENGINES, after=(1, 2))


@needs_triton
@pytest.mark.parametrize("values", DRAWS)
def test_triton_sizes_views_and_values(values: str) -> None:
    edges = (0, 1, 15, 16, 17, 33, 255, 257, TRITON_TILE - 1, TRITON_TILE, TRITON_TILE + 1)
    parameters = [
        Parameter(numel, dtypes, offsets=(0,) if i % 3 else (1, 0, 2))
        for dtypes in UNIFORM_FORMATS
        for i, numel in enumerate(edges)
    ]
    groups = [ADAM.groups()[0]]
    assert_same_bits(Problem(ADAM, groups, parameters, draw=DRAWS[values]), TRITON_ENGINES)


@needs_triton
def test_triton_over_a_hundred_steps() -> None:
    groups = [ADAM.groups()[0]]
    parameters = [Parameter(19)]
    problem = Problem(ADAM, groups, parameters, gradients=3)
    assert_same_bits(
        problem, TRITON_ENGINES, after=(1, 2, 10, 100), schedule=changing(ADAM, groups)
    )


# --- The comparison itself -----------------------------------------------------------------------


def test_comparison_sees_what_it_should() -> None:
    """A sign of zero, a last bit, a write beside an array and a step show; a NaN's payload not."""
    assert SIMD_LEVELS[0] == "baseline"
    parameters = [Parameter(3, dtypes) for dtypes in ((F32, F32, F32), (BF16, F16, BF16))]
    problem = Problem(ADAM, [ADAM.groups()[0]], parameters, draw_normal)
    for index, dtype, bits in ((0, F32, 32), (1, BF16, 16)):
        slot = problem.slots[index]["param"]
        negative_zero = -(2 ** (bits - 1))
        for old, new, seen in ((0, negative_zero, True), (0, 1, True), (-1, -2, False)):
            states = [State(problem), State(problem)]
            for state, value in zip(states, (old, new), strict=True):
                state.memory[dtype][slot.begin] = value
            assert bool(differences(*states)) == seen
        beside = State(problem)
        beside.memory[dtype][slot.begin + slot.numel] += 1
        assert "outside" in differences(State(problem), beside)[0]
    late = State(problem)
    late.steps[0] += 1
    assert "step" in differences(State(problem), late)[0]
