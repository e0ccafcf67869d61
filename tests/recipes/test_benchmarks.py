"""lm-eval on a tiny model: the recipes' --benchmarks and `hf-reflora eval`, with tasks over rows made here.

lm-eval is an extra of its own, which `make test-eval` installs; the names of its public tasks need the network.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import benchmark_tasks
import pytest
import tiny
import torch
import trl.trainer.utils
import two_processes
from peft import get_peft_model

from hf_reflora import LoraSbConfig
from hf_reflora.cli import main
from hf_reflora.recipes import classify, dpo, sft
from hf_reflora.report.front_matter import read_front_matter
from hf_reflora.report.record import RunRecord


lm_eval = pytest.importorskip("lm_eval")

from hf_reflora.recipes.benchmarks import Benchmarks, evaluate_adapter, scores_of  # noqa: E402


ROOT = Path(__file__).parents[2]
KINDS = ("lora", "tied lm_head", "lora_sb")


def adapter(folder, kind):
    """A saved base model and an adapter of it that changes the answers; the model, too."""
    base = tiny.llama(max_position_embeddings=512, tie_word_embeddings=kind == "tied lm_head")
    base.save_pretrained(folder / "base")
    tiny.tokenizer().save_pretrained(folder / "base")
    if kind == "lora_sb":
        torch.manual_seed(3)
        settings = {"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
        model = get_peft_model(base, LoraSbConfig(**settings, init_weights=False))
        factors = [p for n, p in model.named_parameters() if n.endswith("lorasb_R.default")]
    else:
        model = tiny.lora(base, target_modules=["q_proj", "down_proj", *(["lm_head"] if kind != "lora" else [])])
        factors = [p for n, p in model.named_parameters() if "lora_B" in n]
    assert factors
    with torch.no_grad():
        for factor in factors:
            factor.mul_(20)
    model.active_peft_config.base_model_name_or_path = str(folder / "base")
    model.save_pretrained(folder / "adapter")
    return model


@pytest.fixture(scope="module", params=KINDS)
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "_"))
    return folder, benchmark_tasks.write(folder / "tasks", adapter(folder, request.param))


def test_the_scores_are_those_of_both_models(saved, capsys):
    folder, right = saved
    output = folder / "results.json"
    command = ["eval", str(folder / "adapter"), "--tasks", "choice,answer", "--include_path", str(folder / "tasks")]
    main([*command, "--output", str(output)])
    printed = capsys.readouterr().out
    results = json.loads(output.read_text(encoding="utf-8"))
    assert results["base_model"] == str(folder / "base")
    scores = {entry["task"]: (entry["before"], entry["after"]) for entry in results["benchmarks"]}
    assert scores == {task: pytest.approx(both) for task, both in right.items()}
    assert right["choice"][1] < 1
    assert right["answer"][0] < 1
    [choice] = [entry for entry in results["benchmarks"] if entry["task"] == "choice"]
    assert (choice["rows"], choice["total_rows"], choice["fewshot"]) == (9, 9, 0)
    assert (choice["metric"], choice["higher_is_better"], choice["version"]) == ("acc", True, 2.0)
    p = choice["after"]
    assert choice["after_stderr"] == pytest.approx((p * (1 - p) / 8) ** 0.5)  # of a mean of 9 zeros and ones
    assert choice["lm_eval"] == lm_eval.__version__
    assert choice["dataset"] is None
    assert "Benchmarks by lm-eval" in printed
    assert "Added to" not in printed
    assert not (folder / "adapter" / "run_record.json").exists()


def test_results_are_added_to_the_record_and_nothing_else(tmp_path, capsys):
    benchmark_tasks.write(tmp_path / "tasks", adapter(tmp_path, "lora"))
    other = {"task": "other", "metric": "acc", "filter": "none", "before": 0.25, "after": 0.5, "lm_eval": "0.4.13"}
    earlier = [other, {**other, "task": "choice", "metric": "older"}]
    record = {
        **{"schema": 2, "method": "lora", "model": "me/base", "seed": 5, "log": [{"step": 1, "loss": 2.0}]},
        **{"benchmarks": earlier, "mine": [1, 2]},
    }
    path = tmp_path / "adapter" / "run_record.json"
    path.write_text(json.dumps(record), encoding="utf-8")
    options = ["--include_path", str(tmp_path / "tasks"), "--limit", "4", "--num_fewshot", "2", "--seed", "1"]
    main(["eval", str(tmp_path / "adapter"), "--tasks", "choice", *options])
    assert f"Added to {path}" in capsys.readouterr().out
    written = json.loads(path.read_text(encoding="utf-8"))
    entries = written.pop("benchmarks")
    assert written == {name: value for name, value in record.items() if name != "benchmarks"}
    assert entries[0] == other
    [choice] = entries[1:]
    assert (choice["task"], choice["metric"], choice["seed"]) == ("choice", "acc", 1)
    assert (choice["rows"], choice["total_rows"], choice["fewshot"]) == (4, 9, 2)
    main(["card", str(tmp_path / "adapter")])
    card = (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "| choice | acc | 2 | 4 of 9 | " in card
    [model] = read_front_matter(card)["model-index"]
    assert {result["dataset"]["name"] for result in model["results"]} == {"other", "choice"}


def test_two_processes_share_the_rows(tmp_path):
    benchmark_tasks.write(tmp_path / "tasks", adapter(tmp_path, "lora"))
    two_processes.launch("benchmark_tasks.py", str(tmp_path / "adapter"), str(tmp_path), timeout=120)
    found = [json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]
    benchmarks = Benchmarks("choice,answer", include_path=str(tmp_path / "tasks"), num_fewshot=1, seed=3)
    alone = evaluate_adapter(str(tmp_path / "adapter"), benchmarks).entries
    assert found == [alone, alone]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The SFT recipe with and without benchmarks; the training's dropout and a task both draw random numbers."""
    folder = tmp_path_factory.mktemp("recipe")
    benchmark_tasks.write(folder / "tasks", adapter(folder, "lora"))
    rows = [{"prompt": f"{i} + {i} = ", "completion": str(2 * i)} for i in range(8)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    own = "benchmarks: [choice, sampled]\nbenchmark_limit: 5\n"
    for name, lines in (("with", own + f"benchmark_include_path: {folder / 'tasks'}\n"), ("without", "")):
        options = f"method: reflora\nmodel_name_or_path: {folder / 'base'}\ndataset_name: {folder / 'rows.jsonl'}\n"
        options += f"output_dir: {folder / name}\ndtype: float32\nbf16: false\nuse_cpu: true\nmax_steps: 3\n"
        options += "lora_target_modules: [q_proj, v_proj]\nlora_dropout: 0.3\nlearning_rate: 0.05\nlogging_steps: 1\n"
        (folder / f"{name}.yaml").write_text(options + "cpu_threads: 1\nreport_to: none\n" + lines, encoding="utf-8")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trl.trainer.utils, "_use_triton", trl.trainer.utils._use_triton)  # main sets it for good
            sft.main(*sft.make_parser().parse_args_and_config(["--config", str(folder / f"{name}.yaml")]))
    return folder


def test_the_recipe_evaluates_before_and_after(run):
    record = RunRecord.load(run / "with" / "run_record.json")
    assert [entry["task"] for entry in record.benchmarks] == ["choice", "sampled"]
    choice = record.benchmarks[0]
    assert choice["before"] == 1.0  # the right choice is the base model's
    assert (choice["rows"], choice["total_rows"], choice["seed"]) == (5, 9, record.seed)
    assert "| choice | acc | 0 | 5 of 9 | 1.000 ± 0.000 | " in (run / "with" / "README.md").read_text(encoding="utf-8")
    again = evaluate_adapter(
        str(run / "with"), Benchmarks("choice", limit=5, seed=42, include_path=str(run / "tasks"))
    )
    assert [again.entries[0]["before"], again.entries[0]["after"]] == [choice["before"], choice["after"]]


def test_the_training_is_the_same_as_without(run):
    logs = [RunRecord.load(run / name / "run_record.json").log for name in ("with", "without")]
    losses = [[entry["loss"] for entry in log if "loss" in entry] for log in logs]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3
    names = ("with", "without")
    assert len({(run / name / "adapter_model.safetensors").read_bytes() for name in names}) == 1


@pytest.mark.slow
def test_the_recipe_refuses_sharded_models_before_it_trains(run):
    """FSDP2 by accelerate's configuration, whose name for the processes `launched.py` changes, as on GPUs."""
    accelerate = [Path(sys.executable).parent / "accelerate", "launch", "--num_processes", "2"]
    accelerate += ["--config_file", ROOT / "recipes/accelerate/fsdp2.yaml", "--main_process_port", "0"]
    script = [ROOT / "tests/support/launched.py", ROOT / "recipes/sft_reflora.py", "fsdp2"]
    script += ["--config", run / "with.yaml", "--output_dir", run / "sharded"]
    command = [str(part) for part in [*accelerate, *script]]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert "ValueError: benchmarks needs the complete model in each process" in done.stderr
    assert f"hf-reflora eval {run / 'sharded'} --tasks" in done.stderr
    assert not (run / "sharded" / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_a_group_with_a_score_is_one_row(run):
    benchmarks = Benchmarks(["both"], limit=2, include_path=str(run / "tasks"))
    entries = evaluate_adapter(str(run / "adapter"), benchmarks).entries
    assert [(entry["task"], entry["metric"], entry["rows"]) for entry in entries] == [("both", "acc", 2)]


def test_data_on_the_hub_are_named():
    """The form of lm-eval's results for one of its own tasks, whose data need the network."""
    [score] = scores_of(
        {
            "results": {
                "gsm8k": {"alias": "gsm8k", "exact_match,strict-match": 0.5, "exact_match_stderr,strict-match": "N/A"}
            },
            "configs": {"gsm8k": {"dataset_path": "openai/gsm8k", "dataset_name": "main"}},
            "n-samples": {"gsm8k": {"original": 1319, "effective": 1}},
            "higher_is_better": {"gsm8k": {"exact_match": True}},
            "n-shot": {"gsm8k": 5},
            "versions": {"gsm8k": 3.0},
            "group_subtasks": {},
        }
    ).items()
    assert score[0] == ("gsm8k", "exact_match", "strict-match")
    assert (score[1]["dataset"], score[1]["dataset_config"]) == ("openai/gsm8k", "main")
    assert score[1]["score_stderr"] is None


@pytest.mark.slow
def test_wrong_names_are_told_before_anything_is_loaded(tmp_path):
    """lm-eval's own index is read here, which takes it some 20 s."""
    with pytest.raises(
        ValueError, match=r"no task of the name arc_eazy \(similar: arc_easy.*; gsm8kk \(similar: .*gsm8k"
    ):
        Benchmarks("gsm8k,arc_eazy,gsm8kk")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "limit must be at least 1, got 0"),
        ({"num_fewshot": -1}, "num_fewshot must be at least 0, got -1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"include_path": "absent"}, "include_path must be a folder"),
        ({"tasks": " , "}, "No task is named"),
    ],
)
def test_wrong_values_raise(options, message):
    with pytest.raises(ValueError, match=message):
        Benchmarks(**{"tasks": "choice", **options})


def test_an_adapter_that_writes_no_text_is_refused(tmp_path):
    model = tiny.lora(tiny.bert(), target_modules=["query"], task_type="SEQ_CLS")
    model.active_peft_config.base_model_name_or_path = "me/base"
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "choice.yaml").write_text(benchmark_tasks.CHOICE.format(rows="rows.jsonl"), encoding="utf-8")
    benchmarks = Benchmarks("choice", include_path=str(tmp_path / "tasks"))
    with pytest.raises(ValueError, match="adapter of task type SEQ_CLS"):
        evaluate_adapter(str(tmp_path / "adapter"), benchmarks)


def test_options_of_the_recipes():
    for recipe in (sft, dpo):
        given = ["--bf16", "false", "--benchmarks", "gsm8k,arc_easy"]
        assert recipe.make_parser().parse_args_and_config(given)[3].benchmarks == ["gsm8k,arc_easy"]
        with pytest.raises(ValueError, match="benchmark_limit needs benchmarks"):
            recipe.make_parser().parse_args_and_config(["--bf16", "false", "--benchmark_limit", "3"])
    with pytest.raises(ValueError, match="benchmarks"):
        classify.make_parser().parse_args_and_config(["--bf16", "false", "--benchmarks", "gsm8k"])
