"""Train the demo's GPT on several devices with FSDP2, and survive the loss of a process.

Every parameter is sharded over the ranks, and FusedAdamW steps the shards. Every so many steps a
checkpoint is written while training goes on. A run that torchrun restarts, or that is started with
--resume, goes on from the last complete one; without --resume the folder must have none. Batches
follow from the seed and the step's number alone, so that it ends with the bits of a run that was
never interrupted. On GPUs with NCCL, on a CPU with gloo:

    torchrun --standalone --nproc-per-node 2 --max-restarts 3 \
        examples/train_fsdp.py --precision split --checkpoints run --resume

A checkpoint is written to `step-<number>.writing`, and gets its name, `step-<number>`, when all
ranks have written all of it and it is on the disk; so one that was being written when a process
died, or the power failed, is never loaded. It has the weights, the optimizer's states and how many
steps were taken; all hyperparameters are those of the command line.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from gpt import GPT, GPTConfig, even_windows, load_text, random_windows, split_text
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from torch import Tensor, distributed, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from train_gpt import next_byte_loss, param_groups
from warmup import warmup_then

from fused_adamw import FusedAdamW
from fused_adamw.checkpoint import LoadPlanner
from fused_adamw.schedules import (
    Constant,
    CosineAnnealing,
    CosineWarmRestarts,
    Polynomial,
    Schedule,
)

PRECISIONS = ("fp32", "bf16", "master", "split", "kahan", "8bit")
SCHEDULES: dict[str, Callable[[int], Schedule]] = {
    "constant": lambda steps: Constant(),
    "linear": Polynomial,
    "cosine": CosineAnnealing,
    "warm-restarts": lambda steps: CosineWarmRestarts(T_0=-(-steps // 7), T_mult=2),  # 3 cycles
}
"""What follows the warm-up, for so many steps: down to zero but for "constant"."""
OF_COMMAND_LINE = ("lr", "weight_decay", "schedule", "seed")
"""Of a param group what a checkpoint does not decide."""
BEGUN = "training has begun"
"""The key in torchrun's store, which outlives a restart."""


def make_model(args: argparse.Namespace, device: torch.device) -> GPT:
    """The same weights whatever the number of ranks, then sharded: each block by itself."""
    torch.manual_seed(args.seed)
    model = GPT(GPTConfig(args.context, args.layers, args.heads, args.width)).to(device)
    if args.precision != "fp32":
        model.bfloat16()
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    return model


def share(windows: tuple[Tensor, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """This rank's part of a batch."""
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    inputs, targets = (x[rank::ranks].to(device) for x in windows)
    return inputs, targets


def mean_over_ranks(value: Tensor) -> float:
    """The mean of a number of each rank."""
    total = value.detach().float()
    distributed.all_reduce(total)
    return total.item() / distributed.get_world_size()


def complete(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints in a folder that have all been written, by their steps."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted((int(p.name[5:]), p) for p in found if re.fullmatch(r"step-\d+", p.name))


def put_on_disk(folder: Path) -> None:
    """Waits until the names in a folder are; dcp does so for what is in the files."""
    entries = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(entries)
    finally:
        os.close(entries)


class Checkpoints:
    """The checkpoints in a folder, one of which may be being written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writing: tuple[Future[Any], Path] | None = None
        # Saving goes on while training does: its messages must not get among the training's.
        self._group = distributed.new_group(backend="gloo")
        if distributed.get_rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for path in folder.glob("step-*.writing"):  # of a process that died
                shutil.rmtree(path)
        distributed.barrier()

    def last(self) -> Path | None:
        """The newest complete checkpoint, the same for all ranks."""
        found = [path for _, path in complete(self.folder)[-1:]] or [None]
        distributed.broadcast_object_list(found)
        return found[0]

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Begins to write one, when the one before is complete."""
        self.finish()
        path = self.folder / f"step-{step}"
        writing: Any = dcp.async_save(
            state, checkpoint_id=path.with_suffix(".writing"), process_group=self._group
        )
        self._writing = writing, path

    def look(self) -> None:
        """Completes the one that is being written, if it has been."""
        if self._writing is not None and self._writing[0].done():
            self.finish()

    def finish(self) -> None:
        """Waits for the one that is being written."""
        if self._writing is None:
            return
        writing, path = self._writing
        writing.result()  # of rank 0: all ranks have written
        if distributed.get_rank() == 0:
            put_on_disk(path.with_suffix(".writing"))
            path.with_suffix(".writing").rename(path)
            put_on_disk(self.folder)
        self._writing = None


def state_of(model: nn.Module, optimizer: FusedAdamW, step: int) -> dict[str, Any]:
    """All that a run goes on from."""
    of_model, of_optimizer = get_state_dict(model, optimizer)
    return {"model": of_model, "optim": of_optimizer, "step": torch.tensor(step)}


def load(path: Path, model: nn.Module, optimizer: FusedAdamW) -> int:
    """Goes on from a checkpoint, of any number of ranks and any precision; returns its step."""
    kept = [{name: group[name] for name in OF_COMMAND_LINE} for group in optimizer.param_groups]
    state = state_of(model, optimizer, 0)
    dcp.load(state, checkpoint_id=path, planner=LoadPlanner())
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"]
    )
    for group, options in zip(optimizer.param_groups, kept, strict=True):
        group.update(options)
    return int(state["step"])


def digest(model: nn.Module) -> str:
    """SHA-256 of all parameters' bytes."""
    found = hashlib.sha256()
    for param in model.parameters():
        whole = param.detach()
        whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
        found.update(whole.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@contextmanager
def shown(steps: int, done: int) -> Iterator[Any]:
    """A bar of rank 0; gives advance(step, loss)."""
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    disabled = distributed.get_rank() != 0
    with Progress(*columns, "loss {task.fields[loss]}", disable=disabled) as progress:
        bar = progress.add_task("training", total=steps, completed=done, loss="")
        yield lambda step, loss: progress.update(bar, completed=step, loss=f"{loss:.4f}")


def train(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Trains, and returns what came of it."""
    text = load_text(args.text)
    training, held_out = split_text(text, args.context)
    model = make_model(args, device)
    optimizer = FusedAdamW(
        param_groups(model, args.weight_decay),
        lr=args.lr,
        betas=(0.9, 0.99),
        schedule=warmup_then(SCHEDULES[args.schedule], args.steps),
        precision=args.precision,
        seed=args.seed,
        max_grad_norm=1.0,
    )
    checkpoints = Checkpoints(args.checkpoints) if args.checkpoints is not None else None
    begun = 0
    if checkpoints is not None and args.resume:
        last = checkpoints.last()
        if last is not None:
            begun = load(last, model, optimizer)
            if distributed.get_rank() == 0:
                print(f"Resumed from {last}", flush=True)
    with shown(args.steps, begun) as advance:
        for step in range(begun + 1, args.steps + 1):
            generator = torch.Generator().manual_seed(args.seed * 2**32 + step)
            windows = random_windows(training, args.batch_size, args.context, generator)
            loss = next_byte_loss(model, *share(windows, device), bf16=False)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            if step % 10 == 0:
                advance(step, mean_over_ranks(loss))
            if checkpoints is not None:
                checkpoints.look()
                if step % args.checkpoint_every == 0 or step == args.steps:
                    checkpoints.save(step, state_of(model, optimizer, step))
    if checkpoints is not None:
        checkpoints.finish()
    with torch.no_grad():
        windows = even_windows(held_out, 64, args.context)
        validation = mean_over_ranks(next_byte_loss(model, *share(windows, device), bf16=False))
    return {
        "steps": args.steps,
        "resumed_from": begun,
        "validation_loss": validation,
        "sha256": digest(model),
    }


def meet(backend: str, store: distributed.Store) -> None:
    """Makes up the process group.

    Ranks find each other through torchrun's store. That outlives a restart, and has the addresses
    of processes that have died: what is written anew must have other keys.
    """
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    own = distributed.PrefixStore(f"restart-{restarts}", store)
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    distributed.init_process_group(backend, store=own, rank=rank, world_size=ranks)
    store.set(BEGUN, "")  # all ranks are here


def argument_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        description="Train a small GPT with FSDP2 and FusedAdamW; run it by torchrun.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    option = parser.add_argument
    option("--text", type=Path, metavar="FILE", help="what to learn, if not Python's topics")
    option("--steps", type=int, default=200, help="optimizer steps")
    option("--batch-size", type=int, default=8, help="windows of text a step, over all ranks")
    option("--context", type=int, default=128, help="bytes in a window of text")
    option("--layers", type=int, default=4, help="transformer blocks")
    option("--heads", type=int, default=4, help="attention heads in a block")
    option("--width", type=int, default=128, help="size of the residual stream")
    option("--lr", type=float, default=3e-3, help="peak of the learning rate")
    option("--weight-decay", type=float, default=0.1, help="of matrices, not of embeddings")
    option("--precision", choices=PRECISIONS, default="split", help="how parameters are kept")
    option("--schedule", choices=list(SCHEDULES), default="cosine", help="of the learning rate")
    option("--seed", type=int, default=0, help="of weights, batches and random bits")
    option("--checkpoints", type=Path, metavar="FOLDER", help="where to write checkpoints")
    option("--checkpoint-every", type=int, default=50, metavar="STEPS", help="and the last one")
    option("--resume", action="store_true", help="from the last checkpoint, if there is one")
    option("--output", type=Path, metavar="FILE", help="JSON of what came of it")
    return parser


def check(args: argparse.Namespace) -> None:
    """Refuse now what would fail later.

    Raises:
        ValueError: naming the option.
    """
    for name in ("steps", "batch_size", "checkpoint_every"):
        if getattr(args, name) < 1:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} must be at least 1, found {getattr(args, name)}")
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if args.batch_size % ranks:
        raise ValueError(f"--batch-size must be a multiple of {ranks}, found {args.batch_size}")
    if args.resume and args.checkpoints is None:
        raise ValueError("--resume needs --checkpoints")
    if args.checkpoints is not None:
        found = complete(args.checkpoints)
        if found and not args.resume:
            raise ValueError(
                "--checkpoints must be a folder without any, or be given with --resume; found "
                f"{found[-1][1]}"
            )
        if found and found[-1][0] > args.steps:
            raise ValueError(f"--steps must reach those of {found[-1][1]}, found {args.steps}")
    GPTConfig(args.context, args.layers, args.heads, args.width)
    split_text(load_text(args.text), args.context)


def main() -> None:
    """Train; print the result on rank 0."""
    parser = argument_parser()
    args = parser.parse_args()
    if "LOCAL_RANK" not in os.environ:
        parser.error("start it by torchrun --standalone --nproc-per-node N examples/train_fsdp.py")
    store, _, _ = next(iter(distributed.rendezvous("env://")))
    args.resume |= args.checkpoints is not None and store.check([BEGUN])
    try:
        check(args)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    meet("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store)
    try:
        found = train(args, device)
        if distributed.get_rank() == 0:
            print(f"Validation loss {found['validation_loss']:.4f}, sha256 {found['sha256'][:16]}")
            if args.output is not None:
                args.output.write_text(json.dumps(found, indent=2) + "\n")
        # Python aborts where a thread of gloo lets go of a gathered tensor while the process ends.
        # Each has done so long before all ranks are here.
        distributed.barrier()
    finally:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
