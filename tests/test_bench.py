"""The benchmark measures, checks whom it measures, survives what goes wrong, and says so."""

from __future__ import annotations

import json
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import cli, clip_norm, comparison, contenders, memory, picture, probe, whole_step
from bench.cases import CASES, LISTS, TASK_CASES, TASKS, Case, make_params, select
from bench.contenders import Started, start_ours
from bench.footprint import bytes_per_param, extra_bytes
from bench.launches import count_launches
from bench.models import MODELS, elements, qwen3_30b_a3b
from bench.peers import PEERS, Peer, start_torch
from bench.rules import RULES, Rule
from bench.stream import streams
from bench.timing import in_turns, time_block

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
ADAMW = RULES["adamw"]
SMALL = ("--quick", "--block-ms", "0", "--device", "cpu")


def bench(path: Path, *options: str) -> tuple[int, dict[str, Any]]:
    """Runs the benchmark in this process; its code and its report."""
    code = cli.main([*SMALL, "--json", str(path), *options])
    return code, json.loads(path.read_text())


def by_name(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {contender["name"]: contender for contender in result["contenders"]}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts another optimizer in the place of torch's fused one."""

    def put(start: Callable[[Rule, list[Tensor]], Started], **fields: Any) -> None:
        peer = replace(PEERS["torch-fused"], start=start, **fields)
        monkeypatch.setitem(PEERS, peer.name, peer)

    return put


# --- A run ---------------------------------------------------------------------------------------


def test_a_run_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "folder" / "result.json"
    names = ("64M-bfloat16", "1000x1-float32", "1M-float32-cold", "10x1K-float32", "1x1e9-float32")
    options = ("--peer", "torch-fused", "torch-foreach", "--rounds", "2", "--case", *names)
    code, report = bench(file, *options)
    assert code == 0
    assert report["complete"]
    assert {"commit", "machine", "versions", "threads", "settings", "peers"} <= report.keys()
    cut, lists, cold, point, too_large = report["results"]
    assert [result["case"] for result in report["results"]] == list(names)
    assert (cut["elements"], lists["tensors"], lists["elements"]) == (10**6, 1000, 1000)
    assert "64,000,000" in cut["note"]
    assert "1,000,000" in too_large["skipped"]
    for result, size in ((cut, 14), (lists, 28), (cold, 28), (point, 28)):
        rows = by_name(result)
        assert rows.keys() == {"ours cpu", "torch-fused", "torch-foreach"}
        for row in rows.values():
            assert row["status"] == "timed", row["reason"]
            assert row["bytes_per_param"] == size
            assert row["host_seconds"] > 0
            wall = row["samples"]["wall"]
            assert len(wall) == result["rounds"] > 0
            assert min(wall) > 0
        ours = rows["ours cpu"]
        assert ours["check"] == {"error": 0.0, "tolerance": 0.0}
        assert (ours["launches"], ours["extra_bytes"]) == (1, 0)
    assert by_name(cut)["torch-foreach"]["extra_bytes"] >= 2 * 10**6
    assert cut["limit"] is None
    assert cold["limit"]["bytes_per_second"] > 0
    assert all(len(s["wall"]) == cold["rounds"] for s in cold["streams"].values())
    assert all(0 < row["of_limit"] < 3 for row in cold["contenders"])

    out = capsys.readouterr().out
    assert "ours cpu" in out
    assert "cut from 64,000,000" in out
    assert "Time by number of tensors" in out
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_the_screen_shows_what_is_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = partial(cli.Console, force_terminal=True, height=30)
    monkeypatch.setattr(cli, "Console", lambda **options: terminal(width=160))
    bench(tmp_path / "x.json", "--peer", "torch-fused", "--case", "64K-float32")
    out = capsys.readouterr().out
    assert "64K-float32: starting torch-fused" in out
    assert out.index("starting torch-fused") < out.index("1/1")


def test_a_peer_that_is_not_installed_is_named(
    tmp_path: Path, fake: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    fake(start_torch, package="fused-adamw-no-such-package")
    options = ("--peer", "torch-fused", "--case", "64K-float32")
    code, report = bench(tmp_path / "x.json", *options)
    assert code == 0
    assert report["peers"] == {"torch-fused": None}
    assert by_name(report["results"][0]).keys() == {"ours cpu"}
    assert "Not installed: torch-fused" in capsys.readouterr().out


# --- Whom it measures ----------------------------------------------------------------------------


def swapped_decay(rule: Rule, params: list[Tensor]) -> Started:
    """AdamW that decays after its update."""
    options = {**rule.options, "weight_decay": 0.0}
    optimizer = torch.optim.AdamW(params, fused=True, **options)

    @torch.no_grad()
    def step() -> None:
        optimizer.step()
        torch._foreach_mul_(params, 1 - rule.options["lr"] * rule.options["weight_decay"])

    return Started(optimizer, step)


def no_decay(rule: Rule, params: list[Tensor]) -> Started:
    return start_torch(replace(rule, options={**rule.options, "weight_decay": 0.0}), params)


def all_but_the_last(rule: Rule, params: list[Tensor]) -> Started:
    """AdamW whose loop ends an element early."""
    started = start_torch(rule, params)

    @torch.no_grad()
    def step() -> None:
        last = params[-1][-1].clone()
        started.step()
        params[-1][-1] = last

    return Started(started.optimizer, step)


def nan(rule: Rule, params: list[Tensor]) -> Started:
    started = start_torch(rule, params)

    @torch.no_grad()
    def step() -> None:
        started.step()
        params[0][0] = torch.nan

    return Started(started.optimizer, step)


@pytest.mark.parametrize(
    ("start", "case"),
    [
        (swapped_decay, "1M-float32"),
        (no_decay, "1M-float32"),
        (no_decay, "64M-bfloat16"),
        (all_but_the_last, "1M-float32"),
        (all_but_the_last, "1000x1024-float32"),
        (nan, "64K-float32"),
    ],
)
def test_a_peer_that_computes_something_else_is_not_timed(
    start: Any, case: str, tmp_path: Path, fake: Callable[..., None]
) -> None:
    fake(start)
    file = tmp_path / "x.json"
    peers = ("torch-fused", "torch-foreach")
    code, report = bench(file, "--rounds", "1", "--peer", *peers, "--case", case)
    assert code == 0
    rows = by_name(report["results"][0])
    assert rows["ours cpu"]["status"] == rows["torch-foreach"]["status"] == "timed"
    assert rows["torch-fused"]["status"] == "different"
    assert "computes something else" in rows["torch-fused"]["reason"]
    assert rows["torch-fused"]["samples"] is None


@pytest.mark.parametrize("name", ["torch-fused", "torch-foreach"])
@pytest.mark.parametrize("case", ["1M-float32", "64M-bfloat16"])
def test_the_check_leaves_room_for_rounding_only(name: str, case: str, tmp_path: Path) -> None:
    _, report = bench(tmp_path / "x.json", "--rounds", "1", "--peer", name, "--case", case)
    check = by_name(report["results"][0])[name]["check"]
    assert 0 < check["error"] <= check["tolerance"] < 32 * check["error"]


def test_an_engine_of_ours_with_other_bits_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nearly(rule: Rule, engine: str, params: list[Tensor]) -> Started:
        return start_torch(rule, params, fused=True)

    monkeypatch.setattr(contenders, "start_ours", nearly)
    code, report = bench(tmp_path / "x.json", "--peer", "none", "--case", "1M-float32")
    assert code == 1
    assert by_name(report["results"][0])["ours cpu"]["status"] == "different"


def after(calls: int, happens: Callable[[], object]) -> Any:
    """Starts torch's AdamW, to which something happens once it has made so many steps."""

    def start(rule: Rule, params: list[Tensor]) -> Started:
        started = start_torch(rule, params, fused=True)
        made = 0

        def step() -> None:
            nonlocal made
            made += 1
            if made > calls:
                happens()
            started.step()

        return Started(started.optimizer, step)

    return start


# At once; in the check; in the warm-up; in the second of the rounds, which are of one step each.
@pytest.mark.parametrize("calls", [0, 2, 5, 9])
def test_a_peer_that_raises_is_a_row(
    calls: int, tmp_path: Path, fake: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    raised: list[int] = []

    def explode() -> None:
        raised.append(1)
        raise RuntimeError("out of order\nat line 7")

    fake(after(calls, explode), most_tensors=1)  # which leaves out the steps of the host time
    options = ("--rounds", "4", "--peer", "torch-fused", "--case", "64M-float32", "64K-float32")
    code, report = bench(tmp_path / "x.json", *options)
    assert code == 0
    assert len(report["results"]) == len(raised) == 2  # once in each: it is not tried again
    for result in report["results"]:
        rows = by_name(result)
        assert len(rows["ours cpu"]["samples"]["wall"]) == 4
        assert rows["torch-fused"]["status"] == "failed"
        assert rows["torch-fused"]["reason"] == "RuntimeError: out of order"
        assert rows["torch-fused"]["samples"] is None
    assert "out of order" in capsys.readouterr().out


def test_a_peer_that_ends_its_process_is_a_row(
    tmp_path: Path, fake: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nkill -SEGV $$\n")
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(probe.sys, "executable", str(python))
    monkeypatch.setattr(Peer, "third_party", True)
    monkeypatch.setattr(Peer, "has", lambda peer, rule: True)
    options = ("--peer", "torch-fused", "--case", "64K-float32")
    code, report = bench(tmp_path / "x.json", *options)
    assert code == 0
    row = by_name(report["results"][0])["torch-fused"]
    assert (row["status"], row["reason"]) == ("failed", "crashed: SIGSEGV")


def test_a_probe_that_ends_well() -> None:
    assert probe.crash("torch-fused", "adamw", CPU, "bfloat16") is None


def test_footprint_of_several_formats() -> None:
    params = [param for case in LISTS[:2] for param in make_params(case.scaled(10**4, ""), CPU)]
    started = start_ours(ADAMW, "cpu", params)
    started.step()
    assert bytes_per_param(started, ADAMW, params) == (28 + 14) / 2
    assert count_launches(started, True, CPU) == 2
    assert extra_bytes(started, CPU) == 0
    assert count_launches(start_torch(ADAMW, params), False, CPU) is None


# --- Tasks ---------------------------------------------------------------------------------------

TORCHS = ("--rounds", "1", "--peer", "torch-fused", "torch-foreach", "--case")


@pytest.mark.parametrize(
    ("case", "ours", "folded", "composed"),
    [
        ("1M-float32-whole", 44, 52, 56),
        ("1M-float32-whole-unscale", 44, 52, 64),
        ("1M-bfloat16-whole", 26, 38, 40),
        ("1M-bfloat16-whole-unscale", 26, 38, 44),
    ],
)
def test_whole_steps(case: str, ours: int, folded: int, composed: int, tmp_path: Path) -> None:
    _, report = bench(tmp_path / "x.json", *TORCHS, case)
    rows = by_name(report["results"][0])
    assert {name: row["bytes_per_param"] for name, row in rows.items()} == {
        "ours cpu": ours,
        "torch-fused": composed,
        "torch-fused, folded": folded,
        "torch-foreach": composed,
    }
    for row in rows.values():
        assert row["status"] == "timed", row["reason"]
    assert rows["ours cpu"]["check"] == {"error": 0.0, "tolerance": 0.0}
    assert rows["ours cpu"]["launches"] == 2  # the norm, the update


def without_unscaling(
    clip: Any, optimizer: Any, params: Any, grads: Any, limit: float, scale: Any
) -> Any:
    return clip(optimizer, params, grads, limit, None if scale is None else torch.ones(()))


def without_clipping(
    clip: Any, optimizer: Any, params: Any, grads: Any, limit: float, scale: Any
) -> Any:
    return clip(optimizer, params, grads, float("inf"), scale)


def standing_still(params: Sequence[Tensor]) -> tuple[Callable[[], object], list[Tensor]]:
    """Averages that are begun and then left alone."""
    update, averages = averaging(params)
    calls = iter([update])
    return lambda: next(calls, lambda: None)(), averages


averaging = whole_step._averaging


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("task", "name", "wrong"),
    [
        ("whole-unscale", "_clip", partial(without_unscaling, whole_step._clip)),
        ("whole", "_clip", partial(without_clipping, whole_step._clip)),
        ("whole", "_averaging", standing_still),
        ("whole", "_zeroing", lambda grads: lambda: None),
    ],
    ids=["unscale", "clip", "average", "zero"],
)
def test_a_composition_that_leaves_out_a_stage_is_not_timed(
    task: str, name: str, wrong: Any, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whole_step, name, wrong)
    _, report = bench(tmp_path / "x.json", *TORCHS, f"1M-{dtype}-{task}")
    rows = by_name(report["results"][0])
    assert rows["torch-fused"]["status"] == rows["torch-foreach"]["status"] == "different"
    assert rows["ours cpu"]["status"] == "timed"


def test_every_step_of_a_block_finds_gradients() -> None:
    params = make_params(CASES["64K-float32"], CPU)
    grad = params[0].grad
    assert grad is not None
    found = []

    def step() -> None:
        found.append(bool(grad.any()))
        grad.zero_()

    time_block(step, 3, CPU, TASKS["whole"].before(params))
    assert found[1:] == [True] * 3


def test_what_goes_before_a_call_is_not_in_its_time() -> None:
    calls: list[str] = []
    slow = lambda: (calls.append("before"), time.sleep(0.05))  # noqa: E731
    block = time_block(lambda: calls.append("call"), 2, CPU, slow)
    assert calls == ["call", "before", "call", "before", "call"]
    assert block.wall < 0.05


def test_the_norm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "cache_bytes", lambda device: 1)  # so that it runs from memory
    names = ("64M-float32-norm", "1000x1024-float32-norm")
    _, report = bench(tmp_path / "x.json", *TORCHS, *names)
    for result in report["results"]:
        rows = by_name(result)
        assert rows.keys() == {"ours cpu", "torch get_total_norm"}
        for row in rows.values():
            assert (row["status"], row["bytes_per_param"]) == ("timed", 4), row["reason"]
        assert rows["ours cpu"]["check"]["error"] == 0.0
        assert rows["ours cpu"]["launches"] == 1
        assert result["limit"]["stream"] in streams(64, CPU, only_reads=True)
        assert result["stream_bytes"] == 4 * result["elements"]

    monkeypatch.setattr(clip_norm, "norm", lambda params: 1.02 * len(params) ** 0.5 * 31.6)
    _, report = bench(tmp_path / "x.json", *TORCHS, names[1])
    assert {row["status"] for row in report["results"][0]["contenders"]} == {"different"}


def test_what_only_reads_leaves_memory_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = torch.rand(1000)
    monkeypatch.setattr(torch, "rand", lambda *size, **options: scratch)
    before = scratch.clone()
    for call in streams(4000, CPU, only_reads=True).values():
        call()
    assert torch.equal(scratch, before)


def test_what_an_option_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("64M-float32-telemetry", "1000x1024-float32-groups")
    code, report = bench(tmp_path / "x.json", *TORCHS, *names)
    assert code == 0
    telemetry, groups = map(by_name, report["results"])
    assert telemetry.keys() == {"ours cpu", "ours cpu, telemetry"}
    forms = [f"{count} group{'s' * (count > 1)}" for count in (1, 2, 465)]
    assert set(groups) == {
        f"{name}, {form}" for name in ("ours cpu", "torch-fused") for form in forms
    }
    for rows in (telemetry, groups):
        first, *others = rows.values()
        for row in rows.values():
            assert row["status"] == "timed", row["reason"]
        assert first["overhead"] is None
        for row in others:
            wanted = row["ours_times_as_fast"] - 1 if row["ours"] else None
            assert row["overhead"] == wanted
            assert not row["ours"] or row["launches"] == 1
    assert "overhead" in capsys.readouterr().out


def test_a_divided_list_is_whole() -> None:
    params = make_params(CASES["1000x64-float32"], CPU)
    for contender in TASKS["groups"].contenders(ADAMW, torch.float32, ["cpu"], []):
        optimizer = contender.start(params).optimizer
        assert optimizer is not None
        assert f"{len(optimizer.param_groups)} group" in contender.name
        held = [param for group in optimizer.param_groups for param in group["params"]]
        assert list(map(id, held)) == list(map(id, params))


def test_tasks_are_chosen() -> None:
    names = {case.name for case in TASK_CASES}
    assert names <= {case.name for case in select(CPU)}
    chosen = select(CPU, tasks=["norm", "groups"])
    assert [case.name for case in chosen] == [
        "64M-float32-norm",
        "1000x1024-float32-norm",
        "1000x1024-float32-groups",
    ]
    sizes = {case.name.split("-")[0] for case in select(CPU, tasks=["whole"])}
    assert sizes == {"64M", "16M", "1M", "1000x1024"}


# --- Interruption --------------------------------------------------------------------------------


@pytest.fixture
def interruptible() -> Iterator[None]:
    """As in a terminal: what a shell starts in the background ignores Ctrl-C."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("calls", [2, 10])
def test_an_interruption_leaves_what_was_measured(
    number: signal.Signals,
    calls: int,
    tmp_path: Path,
    fake: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    interrupted = after(calls, lambda: signal.raise_signal(number))
    only_large = lambda rule, params: (  # noqa: E731
        interrupted(rule, params) if params[0].numel() > 10**5 else start_torch(rule, params)
    )
    fake(only_large)
    options = ("--rounds", "50", "--peer", "torch-fused", "--case", "64K-float32", "64M-float32")
    code, report = bench(tmp_path / "x.json", *options, "1000x1-float32")
    assert code == 130
    assert not report["complete"]
    whole, partial_ = report["results"]
    assert {len(row["samples"]["wall"]) for row in whole["contenders"]} == {50}
    rows = by_name(partial_)
    if calls == 2:  # before anything was timed
        assert rows["torch-fused"]["status"] == "unfinished"
    else:
        counts = {len(row["samples"]["wall"]) for row in rows.values()}
        assert len(counts) == 1
        assert 0 < counts.pop() < 50
    assert "Interrupted" in capsys.readouterr().out


# --- The command line ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--case", "64M"), "64M-float32"),
        (("--peer", "apex"), "torch-fused"),
        (("--models", "gpt3"), "llama-3.2-1b"),
        (("--rule", "adam-w"), "adamw"),
        (("--engine", "gpu"), "reference"),
        (("--dtype", "float64"), "bfloat16"),
        (("--task", "clip"), "whole-unscale"),
        (("--engine", "cuda"), "accepted: cpu, reference"),
        (("--rounds", "0"), "--rounds: found 0, accepted: 1 or more"),
        (("--threads", "-1"), "--threads: found -1, accepted: 1 or more"),
        (("--block-ms", "nan"), "--block-ms: found nan, accepted: 0 or more"),
        (("--json", "."), "--json .: is a folder"),
    ],
)
def test_bad_input_is_answered_with_what_is_accepted(
    options: Sequence[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([*SMALL, *options])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert said in error.split("error:")[1]
    assert options[0] in error.split("error:")[1]


def test_cases_are_chosen() -> None:
    names = [case.name for case in select(CPU)]
    assert {"64M-float32", "2^26-bfloat16", "gpt2-float32", "1x1e9-float32"} <= set(names)
    assert not {"128M-float32", "llama-3-8b-float32", "gpt2-bfloat16"} & set(names)
    assert "128M-float32" in [case.name for case in select(torch.device("cuda"))]
    assert {case.dtype for case in select(CPU, dtypes=["bfloat16"])} == {torch.bfloat16}
    assert [case.name for case in select(CPU, models=[])] == [f"{name}-float32" for name in MODELS]
    chosen = select(CPU, ["1M-float32"], ["gpt2"], ["float32", "bfloat16"])
    assert [case.name for case in chosen] == ["1M-float32", "gpt2-float32", "gpt2-bfloat16"]
    assert CASES["64M-bfloat16"].elements == 64_000_000
    assert CASES["2^26-bfloat16"].elements == 2**26


# --- Memory --------------------------------------------------------------------------------------


def fit(monkeypatch: pytest.MonkeyPatch, case: Case, free: int) -> tuple[Case, str]:
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    everyone = [PEERS["torch-fused"].contender(ADAMW)] * 4
    return memory.fitted(case, ADAMW, everyone, CPU)


def test_too_little_memory_shrinks_a_case(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["64M-float32"]
    assert fit(monkeypatch, case, 2**40) == (case, "")
    smaller, why = fit(monkeypatch, case, 2**31)
    assert not why
    assert 0.5 * 0.9 * 2**31 < smaller.elements * 4 * 12 <= 0.9 * 2**31
    assert "cut from 64,000,000" in smaller.note
    assert not smaller.aims


def test_too_little_memory_truncates_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = CASES["gpt2-float32"]
    smaller, why = fit(monkeypatch, model, 2**32)
    assert not why
    assert 0 < smaller.tensors < model.tensors
    rest = iter(model.shapes)
    assert all(shape in rest for shape in smaller.shapes)  # in the order of the model
    room = 0.9 * 2**32 - 0.75 * 2**30  # the streams have their share
    assert smaller.elements * 4 * 12 <= room < (smaller.elements + 768**2) * 4 * 12
    assert f"{smaller.tensors} of 148 tensors" in smaller.note
    without_embedding = model.truncated(20 * 10**6, "")
    assert without_embedding.shapes[0] == (1024, 768)


def test_too_little_memory_skips_a_case(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "are free" in fit(monkeypatch, CASES["64M-float32"], 2**20)[1]
    assert "are free" in fit(monkeypatch, CASES["1x1e9-float32"], 2**33)[1]
    options = ("--peer", "none", "--case", "1M-float32", "64K-float32")
    monkeypatch.setattr(memory, "free_bytes", lambda device: 300_000)
    code, report = bench(tmp_path / "x.json", *options)
    assert code == 0
    large, small = report["results"]
    assert "are free" in large["skipped"]
    assert not large["contenders"]
    assert small["contenders"][0]["status"] == "timed"
    assert "300 kB are free: cut from 64,000" in small["note"]
    assert "skipped: needs" in capsys.readouterr().out


def test_cold_lists_are_stepped_in_turns() -> None:
    made: list[int] = []
    call = in_turns([lambda i=i: made.append(i) for i in range(3)])
    for _ in range(4):
        call()
    assert made == [0, 1, 2, 0]
    case = CASES["1M-float32-cold"]
    arrays = 4 * 4 * case.elements * memory.copies(case, ADAMW, CPU)
    assert arrays >= memory.CACHES * memory.cache_bytes(CPU)


# --- Models --------------------------------------------------------------------------------------


# What the models' cards and torchvision's documentation say.
@pytest.mark.parametrize(
    ("name", "tensors", "parameters"),
    [
        ("gpt2", 148, 124_439_808),
        ("llama-3.2-1b", 146, 1_235_814_400),
        ("llama-3-8b", 291, 8_030_261_248),
        ("resnet50", 161, 25_557_032),
        ("vit-l-16", 296, 304_326_632),
    ],
)
def test_models_have_the_published_number_of_parameters(
    name: str, tensors: int, parameters: int
) -> None:
    shapes = MODELS[name].shapes()
    assert (len(shapes), elements(shapes)) == (tensors, parameters)


def test_the_mixture_of_experts_is_the_published_one_made_narrow() -> None:
    published = list(qwen3_30b_a3b())
    assert (len(published), elements(published)) == (18_867, 30_532_122_624)
    shapes = MODELS["moe-10000"].shapes()
    assert len(shapes) == 10_000
    for wide, narrow in zip(published, shapes, strict=False):
        assert len(wide) == len(narrow)
        assert all(w in (n, 16 * n) for w, n in zip(wide, narrow, strict=True))


# --- Comparing runs ------------------------------------------------------------------------------


def test_two_runs_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    options = ("--peer", "torch-fused", "--case", "64K-float32", "64M-bfloat16", "1000x1-float32")
    _, report = bench(a, *options)
    fast, other, _ = report["results"]
    for row in fast["contenders"]:
        row["samples"]["wall"] = [s / 4 for s in row["samples"]["wall"]]
    other["elements"] = 7
    del report["results"][2]
    report["threads"] += 1
    b.write_text(json.dumps(report))
    capsys.readouterr()

    assert comparison.main([str(a), str(b)]) == 0
    out = capsys.readouterr().out
    assert out.count("4.00x") == 2
    assert "1,000,000 and 7 elements" in out
    assert "1000x1-float32" not in out
    assert "differ in threads" in out

    report["results"] = []
    b.write_text(json.dumps(report))
    assert comparison.main([str(a), str(b)]) == 1
    assert "nothing in common" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "No such file"),
        ("{", "not JSON"),
        ("[]", "accepted: 2"),
        ('{"schema": 1, "results": []}', "found schema 1, accepted: 2"),
    ],
)
def test_a_file_that_is_no_report_is_named(
    text: str | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.json"
    if text is not None:
        file.write_text(text)
    assert comparison.main([str(file), str(file)]) == 2
    error = capsys.readouterr().err
    assert str(file) in error
    assert said in error


def test_compare_is_a_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench", "compare", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "A.json" in done.stdout


def test_no_picture_of_nothing(tmp_path: Path) -> None:
    assert "nothing to draw" in picture.draw(tmp_path / "x.png", [])
    assert not list(tmp_path.iterdir())


# --- The GPU suite -------------------------------------------------------------------------------


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
