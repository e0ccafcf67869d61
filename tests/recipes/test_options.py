"""Every option of TRL's scripts and of the recipes has an effect or is refused; none is accepted and ignored."""

import dataclasses
import os
import subprocess
import sys

import pytest
import tiny
from datasets import Dataset
from trl import ModelConfig, ScriptArguments, get_quantization_config

from hf_reflora.recipes import options, sft
from hf_reflora.recipes.options import Options
from hf_reflora.recipes.run import Run
from hf_reflora.trainers.arguments import LoraSbArguments, RefLoraArguments


def options_of(*arguments):
    return Options(*sft.make_parser().parse_args_and_config(["--bf16", "false", *map(str, arguments)]))


# An option, its value, and what it becomes: in the PEFT config, in what loads the model, or in what quantizes it.
TAKEN = {
    "model_name_or_path": ("org/model", lambda o: o.model.model_name_or_path),
    "model_revision": ("v2", lambda o: loading(o)["revision"]),
    "dtype": ("float16", lambda o: loading(o)["dtype"]),
    "attn_implementation": ("eager", lambda o: loading(o)["attn_implementation"]),
    "lora_r": (3, lambda o: o.peft_config().r),
    "lora_alpha": (5, lambda o: o.peft_config().lora_alpha),
    "lora_dropout": (0.25, lambda o: o.peft_config().lora_dropout),
    "lora_target_modules": ("q_proj", lambda o: ", ".join(o.peft_config().target_modules)),
    "lora_target_parameters": ("experts.w", lambda o: ", ".join(o.peft_config().target_parameters)),
    "lora_modules_to_save": ("lm_head", lambda o: ", ".join(o.peft_config().modules_to_save)),
    "lora_task_type": ("SEQ_CLS", lambda o: o.peft_config().task_type),
    "use_rslora": (True, lambda o: o.peft_config().use_rslora),
    "use_dora": (True, lambda o: o.peft_config().use_dora),
    "load_in_8bit": (True, lambda o: get_quantization_config(o.model).load_in_8bit),
    "load_in_4bit": (True, lambda o: get_quantization_config(o.model).load_in_4bit),
}
OF_4BIT = {
    "bnb_4bit_quant_type": ("fp4", lambda o: get_quantization_config(o.model).bnb_4bit_quant_type),
    "use_bnb_nested_quant": (True, lambda o: get_quantization_config(o.model).bnb_4bit_use_double_quant),
    "bnb_4bit_quant_storage": ("uint8", lambda o: str(get_quantization_config(o.model).bnb_4bit_quant_storage)[6:]),
}
REFUSED = {
    "use_peft": ("false", "leave use_peft true"),
    "dataset_streaming": ("true", "dataset_streaming is not supported"),
    "ignore_bias_buffers": ("true", "ignore_bias_buffers is not supported"),
    **{name: (value, "need load_in_4bit") for name, (value, _) in OF_4BIT.items()},
}
# In tests/recipes/test_rows.py and test_sft.py.
LOADED = {"dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split"}


def loading(options):
    run = Run.__new__(Run)
    run.options = options
    return run.model_init_kwargs()


def test_every_option_of_trls_scripts_is_tested():
    names = {field.name for group in (ScriptArguments, ModelConfig) for field in dataclasses.fields(group)}
    assert names == set(TAKEN) | set(OF_4BIT) | set(REFUSED) | LOADED


@pytest.mark.parametrize("name", [*TAKEN, *OF_4BIT])
def test_an_option_has_its_effect(name):
    value, effect = {**TAKEN, **OF_4BIT}[name]
    more = ["--load_in_4bit", "true"] if name in OF_4BIT else []
    assert effect(options_of(f"--{name}", value, *more)) == value


@pytest.mark.parametrize("name", REFUSED)
def test_an_option_is_refused(name):
    value, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        options_of(f"--{name}", value)


def test_every_setting_of_a_method_reaches_its_callback():
    reflora = {"form": "precondition", "eps": 0.5, "dtype": "float64", "warmup_steps": 3, "interval": 2}
    reflora |= {"smoothness": 4.0}
    assert {f"reflora_{name}" for name in reflora} == {field.name for field in dataclasses.fields(RefLoraArguments)}
    for name, value in reflora.items():
        method = "reflora_s" if name == "form" else "reflora"
        settings = RefLoraArguments(**{f"reflora_{name}": value}).callback(method).settings
        assert getattr(settings, name) == value, name
    lora_sb = {"num_samples": 3, "eta": 0.5, "update": "sign", "passes": 2, "start_at_base": True}
    assert {f"lorasb_{name}" for name in lora_sb} == {field.name for field in dataclasses.fields(LoraSbArguments)}
    for name, value in lora_sb.items():
        assert getattr(LoraSbArguments(**{f"lorasb_{name}": value}).callback(), name) == value, name


@pytest.mark.parametrize(
    ("given", "layers"),
    [("q_proj", 2), ("self_attn.q_proj", 2), (".*layers.0.*q_proj", 1), ("all-linear", 14)],
)
def test_one_target_module_is_a_name_unless_it_is_a_regular_expression(given, layers):
    from peft import get_peft_model

    model = get_peft_model(tiny.llama(), options_of("--lora_target_modules", given).peft_config())
    assert sum(name.endswith("lora_A.default.weight") for name, _ in model.named_parameters()) == layers


def test_names_that_are_missing():
    with pytest.raises(ValueError, match="model_name_or_path is missing"):
        Run(options_of("--dataset_name", "org/data"))
    with pytest.raises(ValueError, match="dataset_name is missing"):
        Run(options_of("--model_name_or_path", "org/model"))
    with pytest.raises(ValueError, match="test_dataset_config needs test_dataset_name"):
        options_of("--test_dataset_config", "main")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--test_prompt_template", "{x}"], "belong together"),
        (["--max_characters", "5"], "need prompt_template"),
        (["--max_characters", "0", "--prompt_template", "{x}", "--completion_template", "{y}"], "at least 1"),
    ],
)
def test_templates_that_are_not_used(arguments, message):
    with pytest.raises(ValueError, match=message):
        options_of(*arguments)


def test_a_terminal_that_has_not_all_letters(tmp_path):
    """Answers are shown with question marks; the run goes on to its push."""
    tiny.save(tmp_path / "model")
    row = {"prompt": "Wie heißt das auf Tschechisch?", "completion": "Žluťoučký kůň – „úpěl“"}
    Dataset.from_list([row] * 4).to_json(tmp_path / "rows.jsonl", force_ascii=False)
    options = (
        "--model_name_or_path model --dataset_name rows.jsonl --dataset_test_split train --max_steps 1 --bf16 false"
    )
    options += " --use_cpu true --report_to none --eval_strategy epoch --lora_target_modules q_proj --output_dir out"
    done = subprocess.run(
        [sys.executable, "-c", SHOW, *options.split()],
        cwd=tmp_path,
        env=os.environ | {"PYTHONIOENCODING": "latin-1"},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr.decode("latin-1")
    assert b"?lu?ou?k\xfd k??" in done.stdout


# The scores need answers of a length; showing the examples needs the record only.
SHOW = """
import sys
from hf_reflora.recipes import sft, summary
from hf_reflora.recipes.options import Options
from hf_reflora.recipes.run import Run

run = Run(Options(*sft.make_parser().parse_args_and_config(sys.argv[1:])))
example = {"prompt": "?", "before": "x", "after": "y", "reference": run.train_rows[0]["completion"]}
run.record.record.update(scores={"before": {"loss": 1.0}, "after": {"loss": 0.5}, "rows": 4}, examples=[example])
summary.show(run.record.record)
"""


def test_a_tracker_that_is_not_installed_is_named_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(options, "get_available_reporting_integrations", lambda: ["tensorboard"])
    arguments = ["--output_dir", "out", "--report_to"]
    with pytest.raises(ValueError, match="report_to names trackio, which is not installed: pip install trackio, or"):
        options_of(*arguments, "trackio")
    for tracker in ("tensorboard", "none"):
        options_of(*arguments, tracker)
