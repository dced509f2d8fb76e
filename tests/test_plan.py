"""`python -m fused_adamw plan`: what training takes on each GPU, against what training has."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import on_ranks
import pytest
import torch

import fused_adamw
from fused_adamw import FusedAdamW, __main__, plan
from fused_adamw.decoder_shapes import MODELS, shapes_of

# As the model cards and torch's own count of the published weights have them.
PUBLISHED = {
    "gpt2": 124_439_808,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3-405b": 405_853_388_800,
}
QWEN2_7B = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
    "vocab_size": 152064,
}
QWEN3_600M = {
    "model_type": "qwen3",
    "head_dim": 128,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
    "vocab_size": 151936,
}


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert __main__.main(["plan", *arguments]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        __main__.main(["plan", *arguments])
    assert caught.value.code == 2
    return capsys.readouterr().err


def written(folder: Path, config: str) -> str:
    """The path of a configuration's file."""
    path = folder / "config.json"
    path.write_text(config)
    return str(path)


@pytest.mark.parametrize("name", MODELS)
def test_models_have_their_published_size(name: str) -> None:
    assert sum(map(math.prod, shapes_of(MODELS[name]))) == PUBLISHED[name]


@pytest.mark.parametrize(
    ("config", "numel"), [(QWEN2_7B, 7_615_616_512), (QWEN3_600M, 596_049_920)]
)
def test_configurations_of_relatives(config: dict[str, Any], numel: int) -> None:
    assert sum(map(math.prod, shapes_of(config))) == numel


LIKE_LLAMA = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
}
LIKE_GPT2 = {"n_layer": 2, "n_embd": 48, "n_head": 4, "vocab_size": 96, "n_positions": 32}
BUILT: list[tuple[str, dict[str, Any]]] = [
    ("Llama", {}),
    ("Llama", {"tie_word_embeddings": True, "head_dim": 8, "num_key_value_heads": None}),
    ("Llama", {"attention_bias": True}),
    ("Llama", {"mlp_bias": True}),
    ("Mistral", {}),
    ("Mistral", {"attention_bias": True, "mlp_bias": True}),  # it has neither
    ("Qwen2", {}),
    ("Qwen2", {"attention_bias": False, "tie_word_embeddings": True}),  # its biases stay
    ("Qwen3", {}),
    ("Qwen3", {"attention_bias": True, "head_dim": 20}),
    ("GPT2", {}),
    ("GPT2", {"n_inner": 100}),
    ("GPT2", {"tie_word_embeddings": False}),
]


@pytest.mark.parametrize(("name", "options"), BUILT)
def test_shapes_are_those_of_transformers(name: str, options: dict[str, Any]) -> None:
    """In the order in which the model has its parameters."""
    transformers: Any = pytest.importorskip("transformers")
    size = LIKE_GPT2 if name == "GPT2" else LIKE_LLAMA
    end = {"bos_token_id": 0, "eos_token_id": 0}
    config = getattr(transformers, f"{name}Config")(**{**size, **end, **options})
    model = "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    with torch.device("meta"):
        built = getattr(transformers, model)(config)
    wanted = [tuple(param.shape) for param in built.parameters()]
    for written in (config.to_dict(), json.loads(config.to_json_string(use_diff=True))):
        assert shapes_of(written) == wanted


@pytest.mark.parametrize(("rows", "ranks"), [(7, 1), (8, 4), (7, 4), (5, 4), (3, 4), (1, 64)])
def test_a_shard_is_that_of_the_first_rank(rows: int, ranks: int) -> None:
    """Pieces as of torch.chunk, which FSDP2 cuts a parameter into."""
    pieces = torch.empty(rows, 3).chunk(ranks)
    assert plan.shard((rows, 3), ranks) == max(piece.numel() for piece in pieces)


@pytest.mark.parametrize("row", plan.ROWS, ids=lambda row: f"{row.precision} {row.note}".strip())
def test_bytes_are_those_of_the_optimizer(row: plan.Row) -> None:
    """Of every kind, on one GPU, after a step."""
    shapes = [(64, 80), (65, 64), (100,)]
    params = [torch.zeros(shape, dtype=row.dtype).requires_grad_() for shape in shapes]
    optimizer = FusedAdamW(params, precision=row.precision, **row.options)
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    report = plan.planned(shapes, 1, row, states=2)
    assert report == optimizer.memory_report()
    arrays = [x for state in optimizer.state.values() for k, x in state.items() if k != "step"]
    held = sum(
        x.nbytes for x in [*arrays, *params, *(p.grad for p in params if p.grad is not None)]
    )
    assert report.total == held


SHARED = [(64, 65), (128, 65), (65, 64), (100,)]


def report_over_two_ranks(rank: int) -> Any:
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (2,))
    params = [
        distribute_tensor(torch.zeros(shape), mesh, [Shard(0)]).requires_grad_() for shape in SHARED
    ]
    optimizer = FusedAdamW(params, precision="8bit")
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    return optimizer.memory_report()


@on_ranks.needs_gloo
def test_states_are_coded_where_blocks_fit_the_shards() -> None:
    """(64, 65) is not: each of two ranks would have 32 blocks and a half."""
    row = plan.Row("8bit", "", torch.float32, {})
    assert plan.planned(SHARED, 2, row, states=2) == on_ranks.run(report_over_two_ranks, 2)[0]


@pytest.mark.parametrize("numel", [1, 63, 64, 7_000_000_001])
def test_any_number_of_parameters_is_coded_over_any_number_of_ranks(
    numel: int, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--params", str(numel), "--bandwidth=1000", "--precision=8bit"]
    assert f"{numel:,d} parameter{'s' * (numel > 1)} over 1 GPU:" in run(capsys, *arguments)
    if numel > 64:
        # 2, 2, 2 and 1.125 bytes of each
        assert " 0.79 " in run(capsys, *arguments, "--gpus=10")


def test_formats_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "--model", "llama-3-8b", "--gpus", "8", "--bandwidth", "4800")
    assert "8,030,261,248 parameters over 8 GPUs" in out
    assert all(f"\n{row.precision}" in out for row in plan.ROWS)
    (split,) = (line for line in out.splitlines() if line.startswith("split  "))
    numbers = [float(cell) for cell in split.split()[1:-1]]
    # 2, 2, 8 and 2 bytes of 1,003,782,656 parameters; 26 bytes of each are moved.
    assert numbers == [2.01, 2.01, 8.03, 2.01, 14.05, 26.10, 5.44]
    assert "4,800 GB/s (given)" in out


def test_one_precision_of_any_number_of_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "--params", "7B", "--precision", "fp32", "--bandwidth", "1000")
    assert "7,000,000,000 parameters over 1 GPU:" in out
    assert "split" not in out
    (row,) = (line for line in out.splitlines() if line.startswith("fp32"))
    assert row.split()[1:] == [
        "28.00",
        "28.00",
        "56.00",
        "0.00",
        "112.00",
        "196.00",
        "196.00",
        "ms",
    ]
    assert out == run(capsys, "--params", "7e9", "--precision", "fp32", "--bandwidth", "1000")
    fewer = run(capsys, "--params=7B", "--precision=fp32", "--bandwidth=1000", "--states=1")
    assert " 84.00 " in fewer


def test_columns_stay_apart_and_small_numbers_are_not_zero(
    capsys: pytest.CaptureFixture[str],
) -> None:
    large = run(capsys, "--params", "1.5T", "--precision", "fp32", "--bandwidth", "1")
    (row,) = (line for line in large.splitlines() if line.startswith("fp32"))
    assert row.split()[1:] == [
        *("6,000.00", "6,000.00", "12,000.00", "0.00", "24,000.00", "42,000.00"),
        *("42,000,000.00", "ms"),
    ]
    small = run(capsys, "--params", "1", "--precision", "fp32", "--bandwidth", "1")
    assert "1 parameter over" in small
    assert "4e-09" in small


def test_a_configuration_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, json.dumps(QWEN3_600M))
    out = run(capsys, "--config", path, "--precision", "8bit", "--bandwidth", "1000")
    assert "596,049,920 parameters" in out


# By the config.json and the published size of "mistralai/Mixtral-8x7B-v0.1", "google/gemma-2-2b",
# "google-bert/bert-base-uncased" and "EleutherAI/gpt-neox-20b".
OF_TRANSFORMERS = {
    "mixtral": (
        {
            "architectures": ["MixtralForCausalLM"],
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "tie_word_embeddings": False,
            "vocab_size": 32000,
        },
        46_702_792_704,
    ),
    "gemma2": (
        {
            "architectures": ["Gemma2ForCausalLM"],
            "head_dim": 256,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_attention_heads": 8,
            "num_hidden_layers": 26,
            "num_key_value_heads": 4,
            "vocab_size": 256000,
        },
        2_614_341_888,
    ),
    "bert": ({"architectures": ["BertForMaskedLM"], "vocab_size": 30522}, 109_514_298),
    "gpt_neox": (
        {
            "hidden_size": 6144,
            "intermediate_size": 24576,
            "num_attention_heads": 64,
            "num_hidden_layers": 44,
            "vocab_size": 50432,
        },
        20_554_567_680,
    ),
}


@pytest.mark.parametrize("kind", OF_TRANSFORMERS)
def test_any_configuration_of_transformers(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    config, numel = OF_TRANSFORMERS[kind]
    path = written(tmp_path, json.dumps({"model_type": kind, **config}))
    out = run(capsys, "--config", path, "--precision", "8bit", "--bandwidth", "1000")
    assert f"{numel:,} parameters" in out


def test_frozen_parameters_and_single_numbers_of_transformers() -> None:
    transformers: Any = pytest.importorskip("transformers")
    from fused_adamw import transformers_shapes

    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    size = {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1, **heads}
    whisper = {"model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"]}
    model = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**size))
    frozen = [param for param in model.parameters() if not param.requires_grad]
    assert frozen
    shapes = transformers_shapes.shapes_of({**whisper, **size})
    assert len(shapes) == len(list(model.parameters())) - len(frozen)
    clip = transformers_shapes.shapes_of({"model_type": "clip", "architectures": ["CLIPModel"]})
    assert (1,) in clip  # its temperature


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "bart-8"}, "transformers refuses it: ValueError: Unrecognized model"),
        ({"model_type": "bert", "hidden_size": "wide"}, "refuses it: Strict"),
        ({"model_type": "bert", "architectures": "Bert"}, "architectures: found 'Bert'"),
        ({"model_type": "bert", "architectures": 3}, "architectures: found 3"),
        ({"model_type": "bert", "architectures": [None]}, "architectures: found [None]"),
        ({"model_type": "bert", "architectures": ["logging"]}, "architectures: found ['logging']"),
        ({"model_type": "clip"}, "; architectures may name the model's class"),
        ({"model_type": "bert", "architectures": ["PreTrainedModel"]}, "found no parameters"),
    ],
)
def test_bad_configurations_of_transformers(
    config: dict[str, Any],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("transformers")
    path = written(tmp_path, json.dumps(config))
    assert words in refused(capsys, "--config", path)


def test_a_configuration_runs_no_code_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor asks whether it may."""
    pytest.importorskip("transformers")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    ran = tmp_path / "ran"
    (tmp_path / "modeling.py").write_text(f"open({str(ran)!r}, 'w')\nclass X: pass\n")
    config = {
        "model_type": "vit",
        "auto_map": {"AutoModelForCausalLM": "modeling.X"},
        "_name_or_path": str(tmp_path),
    }
    path = written(tmp_path, json.dumps(config))
    assert "transformers refuses it" in refused(capsys, "--config", path)
    assert not ran.exists()


def test_another_class_of_a_known_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no output layer, but one of two numbers."""
    pytest.importorskip("transformers")
    name = "Qwen3ForSequenceClassification"
    config = {**QWEN3_600M, "architectures": [name], "num_labels": 2}
    path = written(tmp_path, json.dumps(config))
    out = run(capsys, "--config", path, "--bandwidth", "1000")
    assert f"{596_049_920 + 2 * QWEN3_600M['hidden_size']:,d} parameters" in out
    monkeypatch.setattr(plan, "find_spec", lambda name: None)
    message = refused(capsys, "--config", path)
    assert f"architectures: found ['{name}'], accepted: ['Qwen3ForCausalLM']" in message


def test_transformers_that_cannot_be_imported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "fused_adamw.transformers_shapes", raising=False)
    monkeypatch.delattr(fused_adamw, "transformers_shapes", raising=False)
    path = written(tmp_path, json.dumps({"model_type": "bert"}))
    assert "import of transformers halted" in refused(capsys, "--config", path)


def test_without_transformers_others_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "find_spec", lambda name: None)
    path = written(tmp_path, json.dumps({"model_type": "bert"}))
    message = refused(capsys, "--config", path)
    assert "model_type: found 'bert', accepted: llama" in message
    assert "with transformers installed" in message


def test_the_bandwidth_is_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "_MEASURED_BYTES", 2**20)
    assert 1e7 < plan.measured_bandwidth() < 1e14
    assert "GB/s (a copy in the memory of this machine's " in run(capsys, "--params", "1M")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--model --config --params"),
        (["--params", "many"], "--params: found 'many'"),
        (["--params", "0"], "--params: found '0'"),
        (["--params", "nan"], "--params: found 'nan'"),
        (["--params", "7.5"], "--params: found '7.5', accepted: an integer"),
        (["--params", "7B", "--gpus", "0"], "--gpus: found 0"),
        (["--params", "7B", "--states", "-1"], "--states: found -1"),
        (["--params", "7B", "--bandwidth", "0"], "--bandwidth: found '0'"),
        (["--params", "7B", "--bandwidth", "nan"], "--bandwidth: found 'nan'"),
        (["--params", "7B", "--bandwidth", "4TB/s"], "--bandwidth: found '4TB/s', accepted: GB/s"),
        (["--params", "7B", "--bandwidth", "4e12"], "--bandwidth: found '4e12', accepted: GB/s"),
        (["--params", "7B", "--precision", "int4"], "int4"),
        (["--model", "gpt-7"], "gpt-7"),
        (["--config", "missing.json"], "--config: [Errno 2]"),
    ],
)
def test_bad_options_are_named(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refused(capsys, *arguments)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "Expecting"),
        ("[]", "found list"),
        (
            json.dumps({**QWEN3_600M, "model_type": 3}),
            "model_type: found 3, accepted: llama, mistral, qwen2, qwen3, gpt2; with transformers",
        ),
        (json.dumps({**QWEN3_600M, "hidden_size": "wide"}), "hidden_size: found 'wide'"),
        (json.dumps({"model_type": "gpt2", "n_layer": 2}), "n_embd: found None"),
        (
            json.dumps({**LIKE_GPT2, "model_type": "gpt2", "add_cross_attention": True}),
            "add_cross_attention: found True, accepted: False",
        ),
        (
            json.dumps({**QWEN3_600M, "attention_bias": "yes"}),
            "attention_bias: found 'yes', accepted: True or False",
        ),
        (json.dumps({**QWEN3_600M, "head_dim": None}), "head_dim: found None"),
    ],
)
def test_bad_configurations_are_named(
    text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, text)
    message = refused(capsys, "--config", path)
    assert words in message
    assert "--config" in message


@pytest.mark.parametrize(("model", "gpus"), [("8b", 8), ("70b", 64), ("405b", 1024)])
def test_the_docs_have_what_the_plan_says(
    model: str, gpus: int, capsys: pytest.CaptureFixture[str]
) -> None:
    docs = (Path(__file__).parents[1] / "docs" / "scale.md").read_text()
    heading = docs.index(f"{model.upper()} on {gpus} GPUs** (")
    section = docs[heading : docs.find("\n**", heading)]
    rows = {
        line.split("|")[1].replace("`", "").strip(): line
        for line in section.splitlines()[2:]
        if line.startswith("|")
    }
    out = run(capsys, "--model", f"llama-3-{model}", "--gpus", str(gpus), "--bandwidth", "4000")
    assert out.splitlines()[0].split()[0] in section
    shown = 0
    for line in out.splitlines()[2:-1]:
        name, cells = line[:24].strip(), line[24:].split()
        if name in rows:
            found = [cell.strip() for cell in rows[name].split("|")[2:-1]]
            beside = cells[3] if cells[3] != "0.00" else ""
            assert found == [*cells[:3], beside, *cells[4:6], f"{cells[6]} ms"]
            shown += 1
    assert shown == 5
