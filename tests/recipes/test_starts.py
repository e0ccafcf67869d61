"""PEFT's own starts in the recipes: what is trained, what is published, and what an interrupted run goes on with."""

import json
import shutil

import pytest
import tiny
import torch
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from two_processes import launch
from versions import needs

from hf_reflora.hub.staging import read_record, stage
from hf_reflora.recipes import classify, dpo, sft, starts
from hf_reflora.recipes.options import Options
from hf_reflora.report.changed_base import doubled, joined


CHANGE_BASE = ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga"]
LORA_GA = pytest.param("lora_ga", marks=needs("peft", "0.21", "LoRA-GA"))
OTHERS = ["gaussian", "orthogonal", "eva"]
PAPERS = {"pissa": "2404.02948", "olora": "2406.01775", "corda": "2406.05223", "lora_ga": "2407.05000"}
PAPERS |= {"eva": "2410.07170"}


@pytest.fixture
def train(data, tmp_path, trainers):
    """Runs a recipe for a few steps in this process; returns its trainer, which still has the trained model."""

    def run(*arguments, recipe=sft, output="out"):
        common = {"model_name_or_path": data / "model", "dataset_name": data / "rows.jsonl", "learning_rate": 1e-2}
        common |= {"dataset_test_split": "train[:8]", "eval_strategy": "epoch", "output_dir": tmp_path / output}
        common |= {"use_cpu": "true", "bf16": "false", "cpu_threads": 1, "max_steps": 4}
        common |= {"lora_r": 4, "lora_target_modules": "all-linear", "per_device_train_batch_size": 4}
        common |= {"save_strategy": "no", "report_to": "none", "logging_steps": 1, "disable_tqdm": "true"}
        line = [str(part) for name, value in common.items() for part in (f"--{name}", value)]
        recipe.main(*recipe.make_parser().parse_args_and_config([*line, *map(str, arguments)]))
        return trainers[-1]

    return run


def logits(model):
    inputs = tiny.tokenizer()("7 + 7 = ", return_tensors="pt")
    with torch.no_grad():
        return model.eval()(input_ids=inputs["input_ids"]).logits


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=0)


def read(folder, name):
    return json.loads((folder / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("init", [*CHANGE_BASE[:-1], LORA_GA, *OTHERS])
def test_the_published_adapter_computes_what_was_trained(train, data, tmp_path, init):
    """By stock PEFT, on the base model as it was; record and card describe that adapter."""
    method = "reflora" if init in ("pissa", "eva", "lora_ga") else "lora"
    trainer = train("--method", method, "--init", init)
    base, out = AutoModelForCausalLM.from_pretrained(data / "model"), tmp_path / "out"
    before, after = logits(base), logits(trainer.model)
    assert (after - before).abs().max() > 1e-2
    record, config = read(out, "run_record.json"), read(out, "adapter_config.json")
    assert (record["method"], record["init"]) == (method, init)
    with torch.no_grad():
        loss = base(**next(iter(trainer.get_eval_dataloader()))).loss.item()
    assert record["scores"]["before"]["loss"] == pytest.approx(loss, abs=1e-5)
    assert record["scores"]["after"]["loss"] < loss
    if init in CHANGE_BASE:
        assert (config["init_lora_weights"], config["r"], config["lora_alpha"]) == (True, 8, 64)
        assert record["diagnostics"]["ranks"] == [8, 8]
        assert "init_lora_weights" not in record["peft"]
    else:
        assert config["init_lora_weights"] == init
    # As it goes to the Hub, which checks that the record describes the weights beside it.
    stage(out, tmp_path / "staged", record=read_record(out), checkpoints={})
    assert_close(logits(PeftModel.from_pretrained(base, tmp_path / "staged")), after)
    card = (out / "README.md").read_text(encoding="utf-8")
    assert PAPERS.get(init.split("_niter")[0], "It started from") in card
    assert ("ordinary LoRA of twice the rank" in card) == (init in CHANGE_BASE)


@pytest.mark.parametrize("init", ["pissa_niter_4", "corda", LORA_GA, "eva", "orthogonal"])
def test_a_resumed_run_ends_as_the_unbroken_one(train, data, tmp_path, init):
    """Bit-identical; its checkpoint is an ordinary LoRA of the unchanged base model, too."""
    options = ["--method", "reflora", "--init", init, "--save_strategy", "steps", "--save_steps", 2]
    unbroken = train(*options)
    shutil.copytree(tmp_path / "out" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    resumed = train(*options, "--resume_from_checkpoint", "true", output="again")
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (unbroken, resumed)]
    assert losses[0] == losses[1]
    assert torch.equal(logits(unbroken.model), logits(resumed.model))
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "again")]
    assert all(torch.equal(tensor, files[1][name]) for name, tensor in files[0].items())
    base = AutoModelForCausalLM.from_pretrained(data / "model")
    adapted = PeftModel.from_pretrained(base, tmp_path / "out" / "checkpoint-4")
    assert_close(logits(adapted), logits(resumed.model))


def test_a_checkpoint_of_another_start_is_refused(train, tmp_path):
    options = ["--init", "pissa", "--method", "lora", "--save_strategy", "steps", "--save_steps", 2]
    train(*options, "--max_steps", 2)
    path = tmp_path / "out" / "checkpoint-2" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if ".lora_A." in name)
    tensors[name][4:] += 0.1  # the initial half
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"began from another start than this run.*same base model, data"):
        train(*options, "--resume_from_checkpoint", "true")
    with pytest.raises(ValueError, match="is of another adapter than the model's: r is 8 there and 4 here"):
        train("--method", "lora", "--max_steps", 4, "--resume_from_checkpoint", "true")


@pytest.mark.parametrize("init", ["pissa", "eva", LORA_GA])
def test_classification_keeps_its_classifier_and_the_best_checkpoint(train, data, tmp_path, init):
    """PEFT's own conversion leaves the classifier out; the best model is loaded from a checkpoint's trained half."""
    options = ["--text_columns", "prompt", "--label_column", "class", "--method", "lora", "--init", init]
    options += ["--eval_strategy", "steps", "--eval_steps", 1, "--save_strategy", "steps", "--save_steps", 1]
    options += ["--load_best_model_at_end", "true", "--learning_rate", 1e-1]
    trainer = train(*options, recipe=classify)
    best = trainer.state.best_global_step
    assert (trainer.state.best_model_checkpoint or "").endswith(f"checkpoint-{best}")
    expected = logits(trainer.model)
    for folder in ("out", f"out/checkpoint-{best}"):
        model = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / folder)
        model.config.pad_token_id = 0
        assert_close(logits(model), expected)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_conversion_is_pefts(tmp_path, use_rslora):
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], init_lora_weights="pissa", use_rslora=use_rslora)
    model = get_peft_model(tiny.llama(), config)
    model.peft_config["default"].init_lora_weights = True  # as PEFT's documentation tells to save the initial adapter
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter += torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "raw")
    model.save_pretrained(tmp_path / "peft", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    raw, start = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("raw", "start"))
    expected, ours = load_file(tmp_path / "peft" / "adapter_model.safetensors"), joined(raw, start)
    assert expected.keys() == ours.keys()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in expected.items())
    doubled(model.peft_config["default"]).save_pretrained(tmp_path / "ours")
    theirs, ours = (read(tmp_path / name, "adapter_config.json") for name in ("peft", "ours"))
    assert {name for name in theirs if theirs[name] != ours[name]} <= {"inference_mode", "auto_mapping"}


def options_of(*arguments, recipe=sft):
    return Options(*recipe.make_parser().parse_args_and_config(["--bf16", "false", *map(str, arguments)]))


REFUSED = {
    "loftq": (["--init", "loftq"], "init must be one of .*pissa_niter_.*got 'loftq'. LoftQ changes"),
    "pissa_niter": (["--init", "pissa_niter_"], "init must be one of"),
    "samples": (["--init_samples", "0", "--init", "eva"], "init_samples must be at least 1, got 0"),
    "samples unused": (["--init", "pissa", "--init_samples", "4"], "does not use these settings: init_samples"),
    "lora_sb": (["--method", "lora_sb", "--init", "pissa"], "init is for lora, reflora and reflora_s; lora_sb has"),
    "quantized": (["--init", "pissa", "--load_in_4bit", "true"], "16 or 32 bits.*gaussian, eva or lora_sb"),
    "orthogonal": (["--init", "orthogonal", "--load_in_8bit", "true"], "16 or 32 bits"),
    "dora": (["--init", "olora", "--use_dora", "true"], "a DoRA cannot be converted"),
    "parameters": (["--init", "eva", "--lora_target_parameters", "w"], "leave lora_target_parameters out"),
    "smoothing": (["--init", "lora_ga", "--label_smoothing_factor", "0.1"], "gradient of the model's own loss"),
    "loss": (["--init", "lora_ga", "--loss_type", "dft"], "own loss, which is not that of loss_type 'dft'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_excludes_a_start(name):
    arguments, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        options_of(*arguments)


def test_dpo_needs_its_reference():
    with pytest.raises(ValueError, match="DPO's reference is the model without its adapter, and init corda changes"):
        dpo.check_options(options_of("--init", "corda", recipe=dpo))
    with pytest.raises(ValueError, match="PEFT makes A trainable again at every step of DPO"):
        dpo.check_options(options_of("--method", "lora", "--optimizer", "lora_fa", recipe=dpo))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--init", "eva", "--per_device_train_batch_size", 1, "--lora_r", 16], "batches of at least 32 tokens"),
        (["--init", "lora_ga", "--lora_r", 16], "lora_r 16 takes 32 singular vectors, and .*k_proj is 16 x 32"),
        (["--init", "orthogonal", "--lora_r", 3], "rank to be even"),
        (
            ["--init", "pissa", "--lora_target_modules", "embed_tokens"],
            "embed_tokens is a Embedding, which init pissa cannot",
        ),
    ],
)
def test_what_the_model_and_the_data_do_not_give(train, arguments, message):
    with pytest.raises(ValueError, match=message):
        train("--method", "lora", *arguments)


def test_eva_that_does_not_converge(train, monkeypatch):
    monkeypatch.setattr(starts, "EVA_PASSES", 2)
    with pytest.raises(ValueError, match="not converged after 2 batches"):
        train("--method", "lora", "--init", "eva")


def test_a_backend_that_shards(train, monkeypatch):
    monkeypatch.setattr(starts, "is_replicated", lambda: False)
    with pytest.raises(ValueError, match=r"on one device.*Take one process or DDP"):
        train("--method", "lora", "--init", "pissa")


@pytest.mark.parametrize("init", ["eva", "gaussian"])
def test_a_quantized_base_model(train, tmp_path, init):
    pytest.importorskip("bitsandbytes")
    tiny.save(tmp_path / "model", hidden_size=64, intermediate_size=64)
    model = ["--model_name_or_path", tmp_path / "model", "--load_in_4bit", "true", "--dtype", "float32"]
    trainer = train("--init", init, *model)
    assert trainer.model.peft_config["default"].init_lora_weights == init
    factors = [p for name, p in trainer.model.named_parameters() if ".lora_A." in name or ".lora_B." in name]
    assert {p.dtype for p in factors} == {torch.bfloat16}  # TRL's choice, also where EVA has made new factors
    losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("init", ["eva", "corda"])
def test_two_processes_have_one_start(tmp_path, data, init):
    """Under DDP both train from the same start, and what the first saves computes what both have trained."""
    launch("start_ddp.py", str(tmp_path), str(data), init, timeout=240)
    results = [torch.load(tmp_path / f"{init}-{rank}.pt") for rank in (0, 1)]
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())
    base = AutoModelForCausalLM.from_pretrained(data / "model")
    assert (logits(base) - results[0]["logits"]).abs().max() > 1e-2
    assert_close(logits(PeftModel.from_pretrained(base, tmp_path / init)), results[0]["logits"])
