"""The recipes beside SFT: their YAML files through the real parsers, and each script on a tiny model and data."""

import ast
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import yaml
from datasets import ClassLabel, Dataset
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, EvalPrediction
from trl import DPOConfig, DPOTrainer

from hf_reflora import LoraSbConfig, export_lora
from hf_reflora.recipes import classify, dpo
from hf_reflora.recipes.options import Options
from hf_reflora.recipes.run import load_rows


ROOT = Path(__file__).parents[2]
YAMLS = {"smollm2-135m/dpo_reflora.yaml": dpo, "glue/mrpc_reflora.yaml": classify}
METHODS = {
    "lora": ["--method", "lora"],
    "reflora": ["--method", "reflora"],
    "reflora_s": ["--method", "reflora_s"],
    "lora_sb": ["--method", "lora_sb"],
    "lora_xs": ["--method", "lora_xs"],
    "reflora from the SB start": ["--method", "reflora", "--init", "lora_sb"],
    "reflora from EVA": "--method reflora --init eva --optimizer loraplus --loraplus_lr_ratio 2".split(),
}


def parse(recipe, *arguments):
    return recipe.make_parser().parse_args_and_config([str(a) for a in arguments])


def test_every_yaml_is_tested():
    sft = {"lora.yaml", "reflora.yaml", "reflora_s.yaml", "lora_sb.yaml", "reflora_sb_init.yaml"}  # in test_sft.py
    found = {p for p in (ROOT / "recipes").glob("*/*.yaml") if p.parent.name != "accelerate" and p.name not in sft}
    assert found == {ROOT / "recipes" / name for name in YAMLS}


@pytest.mark.parametrize("name", YAMLS)
def test_yaml_parses(name, tmp_path):
    recipe = YAMLS[name]
    text = (ROOT / "recipes" / name).read_text(encoding="utf-8")
    (tmp_path / "cpu.yaml").write_text(text.replace("bf16: true", "bf16: false"), encoding="utf-8")
    script, training, model, own, reflora, lorasb = parse(recipe, "--config", tmp_path / "cpu.yaml")
    config = yaml.safe_load(text)
    adapter = Options(script, training, model, own, reflora, lorasb).peft_config()
    assert (own.method, adapter.r, adapter.lora_alpha) == (config["method"], config["lora_r"], config["lora_alpha"])
    assert script.dataset_name == config["dataset_name"]
    assert training.learning_rate == config["learning_rate"]
    assert training.eval_strategy == config["eval_strategy"]
    assert reflora.reflora_warmup_steps == config.get("reflora_warmup_steps", 0)
    if recipe is classify:
        classify.check_model(model)
        assert adapter.task_type == "SEQ_CLS"
        assert own.text_columns == config["text_columns"]
        assert own.max_length == config["max_length"]


@pytest.mark.parametrize("recipe", [dpo, classify], ids=["dpo", "classify"])
def test_wrong_options_raise(recipe, tmp_path):
    with pytest.raises(ValueError, match="reflora_warmup_step_s"):
        parse(recipe, "--reflora_warmup_step_s", "3", "--bf16", "false")
    with pytest.raises(ValueError, match="method must be one of"):
        parse(recipe, "--method", "dora", "--bf16", "false")
    options = parse(recipe, "--method", "lora", "--reflora_interval", "2", "--output_dir", tmp_path, "--bf16", "false")
    with pytest.raises(ValueError, match="does not use these settings: reflora_interval"):
        recipe.main(*options)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.save(folder)
    return folder


@pytest.fixture(scope="module")
def preferences(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preferences")
    rows = [{"prompt": f"{i} + {i} = ", "chosen": f"{2 * i}", "rejected": "no idea"} for i in range(32)]
    for split, part in (("train", rows[:24]), ("test", rows[24:])):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, part)), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Two texts and whether they begin alike, by name."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = [{"left": "ab"[i % 2] * 4, "right": "ab"[i // 2 % 2] * 4} for i in range(48)]
    rows = [{**row, "same": "yes" if row["left"] == row["right"] else "no"} for row in rows]
    for split, part in (("train", rows[:32]), ("test", rows[32:])):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, part)), encoding="utf-8")
    return folder


def finish(recipe, output, *arguments):
    """Runs a recipe for few steps in this process; returns its record and its card."""
    threads = torch.get_num_threads()
    common = [
        *("--use_cpu", "true", "--bf16", "false", "--cpu_threads", "1", "--disable_tqdm", "true"),
        *("--lora_target_modules", "all-linear", "--lora_r", "4", "--per_device_train_batch_size", "8"),
        *("--save_strategy", "no", "--eval_strategy", "epoch", "--logging_steps", "1", "--report_to", "none"),
        *("--output_dir", output),
    ]
    recipe.main(*parse(recipe, *common, *arguments))
    assert torch.get_num_threads() == threads == 1
    record = json.loads((output / "run_record.json").read_text(encoding="utf-8"))
    return record, (output / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_dpo_end_to_end(tiny_model, preferences, tmp_path, method, capsys):
    data = ["--model_name_or_path", tiny_model, "--dataset_name", preferences, "--learning_rate", "1e-2"]
    options = [*METHODS[method], "--gradient_checkpointing", "false", "--max_steps", "4"]
    record, card = finish(dpo, tmp_path / "out", *data, *options)
    assert record["method"] == METHODS[method][1]
    assert record["init"] == (METHODS[method][3] if "--init" in METHODS[method] else "default")
    assert (record["train_rows"], record["scores"]["rows"], record["scores"]["split"]) == (24, 8, "test")
    assert record["arguments"]["lora_r"] == 4
    before, after = record["scores"]["before"], record["scores"]["after"]
    assert before["loss"] == pytest.approx(math.log(2), abs=1e-6)  # the model is its own reference
    assert after["loss"] < before["loss"]
    assert before["rewards/margins"] == 0
    assert after["rewards/accuracies"] > before["rewards/accuracies"]
    assert not any(name.startswith(("logps", "logits")) for name in after)
    assert any("reflora/norm_A" in entry for entry in record["log"]) == record["method"].startswith("reflora")
    assert {"trl", "dpo"} <= set(yaml.safe_load(card.split("---")[1])["tags"])
    assert "rewards/accuracies" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_classification_end_to_end(tiny_model, pairs, tmp_path, method, capsys):
    data = ["--model_name_or_path", tiny_model, "--dataset_name", pairs, "--learning_rate", "1e-2", "--seed", "1"]
    columns = ["--text_columns", "left", "right", "--label_column", "same", "--max_length", "12"]
    options = [*data, *columns, *METHODS[method], "--num_train_epochs", "8"]
    record, card = finish(classify, tmp_path / "out", *options)
    assert record["method"] == METHODS[method][1]
    assert record["labels"] == ["no", "yes"]
    before, after = record["scores"]["before"], record["scores"]["after"]
    assert set(before) == set(after) == {"loss", "accuracy", "f1", "matthews_correlation"}
    assert after["loss"] < before["loss"]
    assert record["scores"]["rows"] == 16
    front = yaml.safe_load(card.split("---")[1])
    assert front["pipeline_tag"] == "text-classification"
    assert {result["task"]["type"] for result in front["model-index"][0]["results"]} == {"text-classification"}

    # What is saved is the whole classifier, as an ordinary LoRA, too.
    adapter = tmp_path / "out"
    if method in ("lora_sb", "lora_xs"):
        adapter = tmp_path / "exported"
        export_lora(tmp_path / "out", adapter)
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=2)
    base.config.pad_token_id = 0
    model = PeftModel.from_pretrained(base, adapter).eval()
    rows = load_rows(parse(classify, "--dataset_name", pairs)[0], "test")
    inputs = tiny.tokenizer()(list(rows["left"]), list(rows["right"]), return_tensors="pt")
    with torch.no_grad():
        found = model(**inputs).logits.argmax(-1).tolist()
    accuracy = np.mean([record["labels"][i] == label for i, label in zip(found, rows["same"], strict=True)])
    assert accuracy == after["accuracy"]
    [snippet] = re.findall(r"^```python\n(.*?)\n```$", card, re.S | re.M)
    snippet = snippet.replace("path/to/the/base/model", str(tiny_model)).replace("path/to/this/adapter", str(adapter))
    capsys.readouterr()
    exec(snippet)
    assert ast.literal_eval(capsys.readouterr().out).keys() == {"no", "yes"}


def test_lora_sb_takes_the_gradient_of_the_loss_that_dpo_trains_with(preferences, tmp_path):
    """forward_fn against `compute_loss` of the trainer, whose adapter does nothing yet."""
    trainer = DPOTrainer(
        model=tiny.llama(),
        args=DPOConfig(**tiny.arguments(tmp_path), beta=0.3),
        train_dataset=Dataset.from_json(str(preferences / "train.jsonl")),
        processing_class=tiny.tokenizer(),
        peft_config=LoraSbConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_weights="lora_xs"),
    )
    inputs = next(iter(trainer.get_train_dataloader()))
    base = trainer.model.get_base_model()
    weight = base.model.layers[0].self_attn.q_proj.base_layer.weight.requires_grad_()
    [expected] = torch.autograd.grad(trainer.compute_loss(trainer.model, inputs), weight)
    loss, pairs = dpo.loss_at_the_reference(0.3)(trainer.model, inputs)
    [found] = torch.autograd.grad(loss, weight)
    assert (loss.item(), pairs) == (pytest.approx(math.log(2)), 2)
    assert expected.any()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--method", "lora_sb", "--loss_type", "ipo"], r"got \{'loss_type': \['ipo'\]\}"),
        (["--init", "lora_sb", "--use_weighting", "true"], "use_weighting"),
    ],
)
def test_lora_sb_refuses_other_losses_at_the_start(options, match, tmp_path):
    options = parse(dpo, *options, "--output_dir", tmp_path, "--bf16", "false")
    with pytest.raises(ValueError, match=match):
        dpo.main(*options)
    dpo.check_options(Options(*parse(dpo, "--loss_type", "ipo", "--bf16", "false")))  # RefLoRA takes any loss


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--text_columns", "a", "b", "c"], "one column or two"),
        (["--lora_task_type", "CAUSAL_LM"], "lora_task_type is SEQ_CLS"),
        (["--load_in_4bit", "true"], "does not quantize"),
        (["--label_column", "label"], "label_column is 'label', the dataset has the columns left, right, same"),
        (["--label_column", "same"], "text_columns names text, the dataset has the columns left, right, same"),
    ],
)
def test_wrong_classification_options_raise(options, match, tiny_model, pairs, tmp_path):
    data = ["--model_name_or_path", tiny_model, "--dataset_name", pairs, "--output_dir", tmp_path]
    data += ["--use_cpu", "true", "--cpu_threads", "1"]
    with pytest.raises(ValueError, match=match):
        classify.main(*parse(classify, *data, *options))


def test_classes():
    def rows(labels):
        return Dataset.from_dict({"label": labels})

    named = rows([1, 0, 1]).cast_column("label", ClassLabel(names=["bad", "good", "unseen"]))
    assert classify.classes_of(named, "label") == {0: "bad", 1: "good", 2: "unseen"}
    assert list(classify.classes_of(rows([4, 2, 4]), "label").items()) == [(2, "2"), (4, "4")]
    assert list(classify.classes_of(rows(["b", "a"]), "label").items()) == [("a", "a"), ("b", "b")]
    for labels in ([0.5, 2.5], ["a", "a"]):
        with pytest.raises(ValueError, match="two classes or more"):
            classify.classes_of(rows(labels), "label")
    with pytest.raises(ValueError, match=r"Row 1 .* has nothing in column 'label'"):
        classify.classes_of(rows([1, None]), "label")


def test_labels_that_training_does_not_have():
    rows = Dataset.from_dict({"text": ["x", "y"], "label": [-1, 0]})
    recipe = classify.ClassifyArguments()
    with pytest.raises(ValueError, match=r"has the labels \[-1\], which are no classes of the training data"):
        classify.tokenize(rows, recipe, tiny.tokenizer(), {0: "no", 1: "yes"})
    tokens = classify.tokenize(rows, recipe, tiny.tokenizer(), {0: "no", -1: "unknown"})
    assert tokens["labels"] == [1, 0]


def test_scores_by_hand():
    """tp 2, fp 1, fn 1, tn 4."""
    truth = np.array([1, 1, 1, 0, 0, 0, 0, 0])
    found = np.array([1, 1, 0, 1, 0, 0, 0, 0])
    scores = classify.scores_of(2)(EvalPrediction(np.eye(2)[found], truth))
    assert scores == {
        "accuracy": 6 / 8,
        "f1": pytest.approx(4 / 6),
        "matthews_correlation": pytest.approx((2 * 4 - 1 * 1) / math.sqrt(3 * 3 * 5 * 5)),
    }
    constant = classify.scores_of(2)(EvalPrediction((np.eye(2)[0 * found], None), truth))
    assert constant == {"accuracy": 5 / 8, "f1": 0.0, "matthews_correlation": 0.0}
    assert classify.scores_of(3)(EvalPrediction(np.eye(3)[found], truth)) == {"accuracy": 6 / 8}


@pytest.mark.slow
def test_the_seed_is_also_the_classifiers(tiny_model, pairs, tmp_path):
    data = ["--model_name_or_path", tiny_model, "--dataset_name", pairs, "--max_steps", "1"]
    columns = ["--text_columns", "left", "--label_column", "same"]
    first, again, other = (
        finish(classify, tmp_path / str(i), *data, *columns, "--seed", seed)[0]["scores"]["before"]["loss"]
        for i, seed in enumerate((0, 0, 1))
    )
    assert first == again != other
