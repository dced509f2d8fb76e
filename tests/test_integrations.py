"""The optimizers in the trainers people use: Hugging Face's Trainer, Accelerate, Lightning.

A tiny model from a configuration; nothing is downloaded. What a trainer makes of our optimizer must
be what it makes of torch's.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from fused_adamw import FusedAdamW, schedules

OPTIONS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}
VOCABULARY, LENGTH, WINDOWS = 29, 12, 32
# Of parameters below 2 after some ten steps, each of which rounds a few times.
CLOSE: dict[str, Any] = {"rtol": 0, "atol": 2e-6}


class Sequences(Dataset[dict[str, Tensor]]):
    """Windows in which every token follows from the one before."""

    def __len__(self) -> int:
        return WINDOWS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = (index + 3 * torch.arange(LENGTH)) % VOCABULARY
        return {"input_ids": ids, "labels": ids}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.chdir(tmp_path)


def language_model() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def assert_same_model(ours: nn.Module, theirs: nn.Module) -> None:
    torch.testing.assert_close(
        dict(ours.named_parameters()), dict(theirs.named_parameters()), **CLOSE
    )


# --- Hugging Face Trainer ------------------------------------------------------------------------


def hugging_face(tmp_path: Path, model: Any, arguments: dict[str, Any], **options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    settings = {
        "output_dir": str(tmp_path / "out"),
        "per_device_train_batch_size": 4,
        "max_steps": 8,
        "report_to": [],
        "use_cpu": not torch.cuda.is_available(),
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 1,
        "dataloader_pin_memory": False,
        **arguments,
    }
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**settings),
        train_dataset=Sequences(),
        **options,
    )


@pytest.mark.parametrize(
    "arguments",
    [{}, {"max_grad_norm": 0.1}, {"gradient_accumulation_steps": 2}, {"bf16": True}],
    ids=lambda arguments: "-".join(arguments) or "plain",
)
def test_hugging_face_trainer_with_a_class(tmp_path: Path, arguments: dict[str, Any]) -> None:
    models = []
    for cls in (FusedAdamW, torch.optim.AdamW):
        model = language_model()
        trainer = hugging_face(
            tmp_path, model, arguments, optimizer_cls_and_kwargs=(cls, dict(OPTIONS))
        )
        before = copy.deepcopy(model)
        losses = [entry["loss"] for entry in _train(trainer) if "loss" in entry]
        assert isinstance(trainer.optimizer.optimizer, cls)
        assert losses[-1] < losses[0]
        assert not torch.equal(before.lm_head.weight, model.lm_head.weight)
        models.append(model)
    if not arguments.get("bf16"):  # there gradients differ with what autocast rounds
        assert_same_model(*models)


def _train(trainer: Any) -> list[dict[str, Any]]:
    trainer.args.logging_steps = 1
    trainer.train()
    history: list[dict[str, Any]] = trainer.state.log_history
    return history


def test_hugging_face_trainer_with_an_optimizer(tmp_path: Path) -> None:
    """Our schedule beside one of torch's that does nothing; we clip instead of the trainer."""
    ours, theirs = language_model(), language_model()
    cosine = schedules.CosineAnnealing(8)
    optimizer = FusedAdamW(ours.parameters(), schedule=cosine, max_grad_norm=0.1, **OPTIONS)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1.0)
    _train(hugging_face(tmp_path, ours, {"max_grad_norm": 0.0}, optimizers=(optimizer, constant)))
    other = torch.optim.AdamW(theirs.parameters(), **OPTIONS)
    scheduler = torch.optim.lr_scheduler.LambdaLR(other, cosine)
    _train(hugging_face(tmp_path, theirs, {"max_grad_norm": 0.1}, optimizers=(other, scheduler)))
    assert optimizer.param_groups[0]["schedule_step"] == 8
    assert_same_model(ours, theirs)


def test_hugging_face_trainer_resumes(tmp_path: Path) -> None:
    """From its checkpoint, with the same bits as a run that was not interrupted."""
    models = []
    for folder, resumes in (("whole", False), ("resumed", True)):
        model = language_model()
        arguments = {
            "output_dir": str(tmp_path / folder),
            "save_strategy": "steps",
            "save_steps": 4,
        }
        chosen = {"optimizer_cls_and_kwargs": (FusedAdamW, {**OPTIONS, "ema_decay": 0.9})}
        trainer = hugging_face(tmp_path, model, arguments, **chosen)
        trainer.train()
        if resumes:
            model = language_model()
            trainer = hugging_face(tmp_path, model, arguments, **chosen)
            trainer.train(resume_from_checkpoint=str(tmp_path / folder / "checkpoint-4"))
            assert trainer.state.global_step == 8
        models.append((model, trainer.optimizer.state_dict()["state"]))
    (whole, states), (resumed, resumed_states) = models
    for name, param in whole.named_parameters():
        assert torch.equal(param, resumed.get_parameter(name)), name
    for key, state in states.items():
        for entry, value in state.items():
            assert torch.equal(value, resumed_states[key][entry]), (key, entry)


# --- Accelerate ----------------------------------------------------------------------------------


def accelerated(
    cls: Any, *, mixed_precision: str = "no", accumulate: int = 1, clip: float | None = None
) -> tuple[nn.Module, list[float]]:
    accelerate = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(True)
    accelerator = accelerate.Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision=mixed_precision,
        gradient_accumulation_steps=accumulate,
    )
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(VOCABULARY, 16), nn.Linear(16, VOCABULARY))
    optimizer = cls(model.parameters(), **OPTIONS)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    loader: Any = DataLoader(Sequences(), batch_size=4)  # type: ignore[arg-type]
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    losses = []
    for _ in range(2):
        for batch in loader:
            with accelerator.accumulate(model):
                ids = batch["input_ids"]
                loss = functional.cross_entropy(
                    model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()
                )
                accelerator.backward(loss)
                if clip is not None and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                losses.append(loss.item())
    PartialState._reset_state()
    AcceleratorState._reset_state(True)
    return accelerator.unwrap_model(model), losses


@pytest.mark.parametrize("options", [{}, {"accumulate": 4}, {"clip": 0.1}], ids=str)
def test_accelerate(options: dict[str, Any]) -> None:
    ours, losses = accelerated(FusedAdamW, **options)
    theirs, _ = accelerated(torch.optim.AdamW, **options)
    assert losses[-1] < losses[0]
    assert_same_model(ours, theirs)


def test_accelerate_with_mixed_precision() -> None:
    _, losses = accelerated(FusedAdamW, mixed_precision="bf16")
    assert losses[-1] < losses[0]
    assert all(map(math.isfinite, losses))


def test_accelerate_clips_by_the_optimizer() -> None:
    ours, _ = accelerated(
        lambda params, **options: FusedAdamW(params, max_grad_norm=0.1, **options)
    )
    theirs, _ = accelerated(torch.optim.AdamW, clip=0.1)
    assert_same_model(ours, theirs)


# --- Lightning -----------------------------------------------------------------------------------


def lightning_trained(make: Any, tmp_path: Path, **options: Any) -> tuple[nn.Module, list[float]]:
    lightning = pytest.importorskip("lightning")
    losses: list[float] = []

    class Module(lightning.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.model = nn.Sequential(nn.Embedding(VOCABULARY, 16), nn.Linear(16, VOCABULARY))

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            ids = batch["input_ids"]
            loss = functional.cross_entropy(
                self.model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()
            )
            losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = make(self.parameters())
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
            }

    module = Module()
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="auto" if torch.cuda.is_available() else "cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **options,
    )
    trainer.fit(module, DataLoader(Sequences(), batch_size=4))  # type: ignore[arg-type]
    return module.model, losses


def ours_with(**options: Any) -> Any:
    return lambda params: FusedAdamW(params, **OPTIONS, **options)


def torchs(params: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(params, **OPTIONS)


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_clip_val": 0.1}, {"accumulate_grad_batches": 2}],
    ids=lambda options: "-".join(options) or "plain",
)
def test_lightning(tmp_path: Path, options: dict[str, Any]) -> None:
    ours, losses = lightning_trained(ours_with(), tmp_path, **options)
    theirs, _ = lightning_trained(torchs, tmp_path, **options)
    assert losses[-1] < losses[0]
    assert_same_model(ours, theirs)


def test_lightning_clips_by_the_optimizer(tmp_path: Path) -> None:
    ours, _ = lightning_trained(ours_with(max_grad_norm=0.1), tmp_path)
    theirs, _ = lightning_trained(torchs, tmp_path, gradient_clip_val=0.1)
    assert_same_model(ours, theirs)


def test_lightning_with_mixed_precision(tmp_path: Path) -> None:
    _, losses = lightning_trained(ours_with(), tmp_path, precision="bf16-mixed")
    assert losses[-1] < losses[0]
    _, losses = lightning_trained(ours_with(precision="split"), tmp_path, precision="bf16-true")
    assert losses[-1] < losses[0]
