"""The recipe by `accelerate launch` with each configuration of recipes/accelerate, in two processes on the CPU."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from accelerate.commands.config.config_args import load_config_from_file
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "recipes" / "accelerate"
BACKENDS = {
    "ddp": "MULTI_CPU",
    "multi_node": "MULTI_CPU",
    "fsdp2": "FSDP2",
    "zero2": "DeepSpeed ZeRO-2",
    "zero3": "DeepSpeed ZeRO-3",
}
pytestmark = pytest.mark.slow


def test_every_configuration_is_run_here():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {*BACKENDS, "one_gpu"}


@pytest.mark.parametrize("name", [*BACKENDS, "one_gpu"])
def test_configurations_load(name):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert config.num_processes >= config.num_machines >= 1
    assert config.mixed_precision == "no"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.save(folder, max_position_embeddings=1024)
    return folder


def commands(name: str, model: Path, output: Path) -> list[list]:
    """One command a machine."""
    recipe = [ROOT / "tests" / "support" / "launched.py", "recipes/sft_reflora.py", name]
    recipe += ["--config", "recipes/smollm2-135m/reflora.yaml", "--model_name_or_path", model, "--output_dir", output]
    recipe += ["--dtype", "float32", "--use_cpu", "true", "--cpu_threads", "1", "--dataset_train_split", "train[:16]"]
    recipe += ["--dataset_test_split", "test[:5]", "--score_max_new_tokens", "3", "--score_batch_size", "2"]
    recipe += ["--logging_steps", "1", "--max_length", "1024", "--max_steps", "2", "--max_grad_norm", "0"]
    recipe += ["--reflora_warmup_steps", "0", "--warmup_steps", "0"]
    launch = [Path(sys.executable).parent / "accelerate", "launch", "--config_file", CONFIGS / f"{name}.yaml"]
    if name != "multi_node":
        return [[*launch, "--num_processes", 2, "--main_process_port", 0, *recipe]]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [*launch, "--num_processes", 2, "--main_process_port", port]
    return [[*both, "--machine_rank", machine, *recipe] for machine in range(2)]


@pytest.fixture(scope="module")
def runs(model, tmp_path_factory):
    """Output folder by configuration, run when it is asked for."""
    done = {}

    def run(name):
        if name not in done:
            done[name] = tmp_path_factory.mktemp(name)
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
                for command in commands(name, model, done[name])
            ]
            for machine in machines:
                output, _ = machine.communicate(timeout=300)
                assert machine.returncode == 0, output[-5000:]
        return done[name]

    return run


@pytest.mark.parametrize("name", BACKENDS)
def test_the_recipe_runs_and_is_the_same_everywhere(runs, model, name):
    if name.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed: pip install -e '.[deepspeed]'")
    record = json.loads((runs(name) / "run_record.json").read_text(encoding="utf-8"))
    ddp = json.loads((runs("ddp") / "run_record.json").read_text(encoding="utf-8"))
    assert (record["backend"], record["processes"]) == (BACKENDS[name], 2)
    losses, expected = ([row["loss"] for row in r["log"] if "loss" in row] for r in (record, ddp))
    assert len(losses) == 2
    assert losses == pytest.approx(expected, abs=1e-5)
    assert record["scores"] == ddp["scores"]
    found, expected = ({k: v for k, v in r["diagnostics"].items() if k != "ranks"} for r in (record, ddp))
    assert found == pytest.approx(expected, rel=1e-3)
    assert record["trainable_parameters"] == ddp["trainable_parameters"]
    weights, others = (load_file(runs(n) / "adapter_model.safetensors") for n in (name, "ddp"))
    tiny.assert_same(weights, others, rtol=1e-3, atol=1e-5)
    base = AutoModelForCausalLM.from_pretrained(model)
    assert any(p.any() for n, p in PeftModel.from_pretrained(base, runs(name)).named_parameters() if "lora_B" in n)
