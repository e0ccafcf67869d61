"""`hf-reflora sft` and the names of the shipped files."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from accelerate.commands.launch import launch_command_parser

from hf_reflora import cli
from hf_reflora.recipes import classify, dpo, sft, shipped
from hf_reflora.recipes.launch import split


RECIPES = Path(__file__).parents[2] / "recipes"


def test_the_names_are_the_files():
    for name in shipped.config_names():
        assert shipped.config_file(name) == RECIPES / f"{name}.yaml"
    names = {p.relative_to(RECIPES).with_suffix("").as_posix() for p in RECIPES.glob("*/*.yaml")}
    assert {*shipped.config_names(), *(f"accelerate/{name}" for name in shipped.accelerate_names())} == names
    assert "fsdp2" in shipped.accelerate_names()


def test_a_file_wins_over_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ddp").write_text("num_processes: 3\n", encoding="utf-8")
    assert shipped.accelerate_file("ddp") == Path("ddp")
    assert shipped.accelerate_file("zero2") == RECIPES / "accelerate" / "zero2.yaml"


def test_the_demos_data_without_a_clone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shipped.dataset("recipes/data/tool_calls") == str(RECIPES / "data" / "tool_calls")
    for name in ("org/data", "recipes/data", "recipes/data/other", "recipes/data/..", "other/data/tool_calls"):
        assert shipped.dataset(name) == name
    (tmp_path / "recipes" / "data" / "tool_calls").mkdir(parents=True)
    assert shipped.dataset("recipes/data/tool_calls") == "recipes/data/tool_calls"


@pytest.mark.parametrize(
    ("load", "given", "policy"),
    [(99, None, "PASSIVE"), (99, "ACTIVE", "ACTIVE"), (0, None, None), (0, "PASSIVE", "PASSIVE")],
)
def test_waiting_threads_sleep_on_a_busy_machine(load, given, policy):
    """It is set before torch is loaded, and what the user has set stays."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {} if given is None else {"OMP_WAIT_POLICY": given}
    code = (
        f"import os, sys; os.cpu_count, os.getloadavg = lambda: 2, lambda: ({load}, 0, 0); import hf_reflora.recipes; "
    )
    code += "print(os.environ.get('OMP_WAIT_POLICY'), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(policy), "False"]


def test_options_of_the_launcher_are_told_from_the_recipes():
    options = ["--config", "smollm2-135m/lora", "--num_processes", "2", "--debug", "underflow_overflow", "--multi_gpu"]
    options += [
        "--mixed-precision=no",
        "--lora_target_modules",
        "q_proj",
        "v_proj",
        "--gradient_accumulation_steps",
        "3",
    ]
    own, others = split(options, launch_command_parser())
    assert own == ["--num_processes", "2", "--multi_gpu", "--mixed-precision=no"]
    assert others == [option for option in options if option not in own]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "smollm2/lora"], r"--config smollm2/lora: .* Shipped are: .*smollm2-135m/lora,"),
        (["--config"], "--config is given without a value"),
        (["--accelerate_config", "fsdp"], r"--accelerate_config fsdp: .* Shipped are: ddp, fsdp2,"),
    ],
)
def test_wrong_names_are_errors(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["sft", *arguments])
    assert end.value.code == 1
    assert re.search(message, capsys.readouterr().err)


def test_the_parser_takes_shipped_names(capsys):
    options = ["--config", "smollm2-135m/lora", "--bf16", "false"]
    _, training, *_ = sft.make_parser().parse_args_and_config(options)
    assert training.output_dir == "runs/smollm2-135m-lora"
    for wrong, message in ((["--config", "smollm2/lora"], "Shipped are:"), (["--config"], "expected one argument")):
        with pytest.raises(SystemExit):
            sft.make_parser().parse_args_and_config(wrong)
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("recipe", [sft, dpo, classify], ids=["sft", "dpo", "classify"])
def test_help(recipe, capsys):
    """Every option is listed; a percent sign in a help text would raise."""
    cli.main([recipe.__name__.split(".")[-1], "--help"])
    text = capsys.readouterr().out
    assert f"usage: hf-reflora {recipe.__name__.split('.')[-1]}" in text
    assert {"--method", "--reflora_warmup_steps", "--lorasb_num_samples", "--num_processes"} <= set(text.split())
    assert "smollm2-135m/reflora" in text


@pytest.mark.slow
def test_the_command_in_an_empty_folder(tmp_path):
    """The demo with a tiny model: its YAML and its data by name, without the clone's folder."""
    tiny.save(tmp_path / "model", max_position_embeddings=1024)
    (tmp_path / "empty").mkdir()
    options = [
        "--config",
        "smollm2-135m/reflora",
        "--model_name_or_path",
        str(tmp_path / "model"),
        "--use_cpu",
        "true",
    ]
    options += ["--num_processes", "1", "--dtype", "float32", "--dataset_train_split", "train[:8]", "--max_steps", "1"]
    options += ["--dataset_test_split", "test[:2]", "--score_max_new_tokens", "2", "--cpu_threads", "1"]
    options += ["--max_length", "1024"]
    command = [sys.executable, "-m", "hf_reflora", "sft", *options]
    path = {"PYTHONPATH": str(RECIPES.parent)}
    done = subprocess.run(command, cwd=tmp_path / "empty", env=os.environ | path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    text = (tmp_path / "empty/runs/smollm2-135m-reflora/run_record.json").read_text(encoding="utf-8")
    assert str(RECIPES) not in text
    record = json.loads(text)
    assert record["dataset"] == "recipes/data/tool_calls"
    command = record["environment"]["command"]
    assert command[:4] == ["-m", "hf_reflora.recipes.sft", "--config", "smollm2-135m/reflora"]
    assert "--num_processes" not in command
    wrong = subprocess.run(
        [sys.executable, "-m", "hf_reflora", "sft", "--max_stepz", "2", "--bf16", "false"],
        cwd=tmp_path,
        env=os.environ | path,
        capture_output=True,
        text=True,
    )
    assert wrong.returncode == 1
    assert "--max_stepz" in wrong.stderr
    assert "CalledProcessError" not in wrong.stderr
