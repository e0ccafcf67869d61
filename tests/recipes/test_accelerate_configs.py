"""The configurations of recipes/accelerate: what accelerate makes of them, and the recipe launched with them.

They ask for GPUs; here two processes on the CPU take part.
"""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import trl.trainer.utils
from accelerate.commands import launch
from accelerate.commands.config.config_args import load_config_from_file
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_reflora.recipes import sft


ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "recipes" / "accelerate"
# The backend that the run record names, and what accelerate tells the processes.
BACKENDS = {
    "ddp": ("MULTI_CPU", {}),
    "multi_node": ("MULTI_CPU", {}),
    "fsdp2": ("FSDP2", {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}),
    "zero2": ("DeepSpeed ZeRO-2", {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}),
    "zero3": ("DeepSpeed ZeRO-3", {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}),
}
# Like multi_node, but on one machine, and like zero3, but for the stage.
LIKE_OTHERS = ("ddp", "zero2")


def test_every_configuration_is_run_here():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {*BACKENDS, "one_gpu"}


@pytest.mark.parametrize("name", [*BACKENDS, "one_gpu"])
def test_configurations_load(name):
    path = str(CONFIGS / f"{name}.yaml")
    config = load_config_from_file(path)
    assert config.num_processes >= config.num_machines >= 1
    assert config.mixed_precision == "no"
    arguments = launch.launch_command_parser().parse_args(["--config_file", path, "recipes/sft_reflora.py"])
    arguments, defaults, _ = launch._validate_launch_command(arguments)
    arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)  # as launch_command does
    if name.startswith("zero"):
        _, environment = launch.prepare_deepspeed_cmd_env(arguments)
    else:
        environment = launch.prepare_multi_gpu_env(arguments)
    told = {key: value for key, value in environment.items() if key.startswith(("ACCELERATE_USE_", "FSDP_VERSION"))}
    told |= {key: value for key, value in environment.items() if key == "ACCELERATE_DEEPSPEED_ZERO_STAGE"}
    assert told == (BACKENDS[name][1] if name in BACKENDS else {})


def test_the_configurations_of_one_kind_are_alike():
    def differences(left: str, right: str) -> set[str]:
        left, right = (vars(load_config_from_file(str(CONFIGS / f"{name}.yaml"))) for name in (left, right))
        left, right = (config | config.pop("deepspeed_config") for config in (left, right))
        return {key for key in {*left, *right} if left.get(key) != right.get(key)}

    of_machines = {"num_machines", "num_processes", "main_process_ip", "main_process_port"}
    assert differences("ddp", "multi_node") == of_machines
    assert differences("zero2", "zero3") == {"zero_stage", "zero3_save_16bit_model"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.save(folder, max_position_embeddings=1024, initializer_range=0.1)  # answers that depend on the prompt
    return folder


def recipe(model: Path, output: Path, processes: int) -> list[str]:
    """8 rows for each of 2 steps, however many processes there are."""
    options = ["--config", "recipes/smollm2-135m/reflora.yaml", "--model_name_or_path", model, "--output_dir", output]
    options += ["--dtype", "float32", "--use_cpu", "true", "--cpu_threads", "1", "--dataset_train_split", "train[:16]"]
    options += ["--dataset_test_split", "test[:5]", "--score_max_new_tokens", "6", "--score_batch_size", "2"]
    options += ["--logging_steps", "1", "--max_length", "1024", "--max_steps", "2", "--max_grad_norm", "0"]
    options += ["--reflora_warmup_steps", "0", "--warmup_steps", "0"]
    return [str(option) for option in [*options, "--gradient_accumulation_steps", 2 // processes]]


def commands(name: str, model: Path, output: Path) -> list[list]:
    """One command a machine."""
    script = [ROOT / "tests" / "support" / "launched.py", "recipes/sft_reflora.py", name, *recipe(model, output, 2)]
    script += ["--share_prefix", name != "zero3"]  # it is refused there; the numbers are the same
    start = [Path(sys.executable).parent / "accelerate", "launch", "--config_file", CONFIGS / f"{name}.yaml"]
    if name != "multi_node":
        return [[*start, "--num_processes", 2, "--main_process_port", 0, *script]]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [*start, "--num_processes", 2, "--main_process_port", port]
    return [[*both, "--machine_rank", machine, *script] for machine in range(2)]


def run_launched(name: str, model: Path, output: Path) -> None:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    machines = [
        subprocess.Popen(
            [str(part) for part in command],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command in commands(name, model, output)
    ]
    for machine in machines:
        printed, _ = machine.communicate(timeout=300)
        assert machine.returncode == 0, printed[-5000:]


@pytest.fixture(scope="module")
def alone(model, tmp_path_factory):
    """The same run in one process, this one."""
    output = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(trl.trainer.utils, "_use_triton", trl.trainer.utils._use_triton)  # main sets it for good
        sft.main(*sft.make_parser().parse_args_and_config(recipe(model, output, 1)))
    return output


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.release if name in LIKE_OTHERS else ()) for name in BACKENDS]
)
def test_the_recipe_runs_and_is_the_same_everywhere(alone, model, tmp_path, name):
    if name.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed: pip install -e '.[deepspeed]'")
    run_launched(name, model, tmp_path)
    record, single = (json.loads((at / "run_record.json").read_text(encoding="utf-8")) for at in (tmp_path, alone))
    assert (record["backend"], record["processes"], single["processes"]) == (BACKENDS[name][0], 2, 1)
    losses, expected = ([row["loss"] for row in r["log"] if "loss" in row] for r in (record, single))
    assert len(losses) == 2
    assert losses == pytest.approx(expected, abs=1e-5)
    assert record["scores"] == single["scores"]
    assert record["examples"] == single["examples"]  # in the order of the rows, whoever answered them
    assert len({example["before"] for example in record["examples"]}) > 1
    found, expected = ({k: v for k, v in r["diagnostics"].items() if k != "ranks"} for r in (record, single))
    assert found == pytest.approx(expected, rel=1e-3)
    assert record["trainable_parameters"] == single["trainable_parameters"]
    weights, others = (load_file(at / "adapter_model.safetensors") for at in (tmp_path, alone))
    tiny.assert_same(weights, others, rtol=1e-3, atol=1e-5)
    base = AutoModelForCausalLM.from_pretrained(model)
    assert any(p.any() for n, p in PeftModel.from_pretrained(base, tmp_path).named_parameters() if "lora_B" in n)
