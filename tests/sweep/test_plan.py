"""What a sweep runs: grids, ranges and methods, from YAML and the command line."""

import pytest
import yaml

from hf_reflora import cli
from hf_reflora.sweep import plan
from hf_reflora.sweep.command import read_duration, read_options
from hf_reflora.sweep.plan import Range, Sweep, read_grid, read_sweep


SWEEP = {"recipe": "sft", "options": {"eval_strategy": "epoch"}}
GRID = {"learning_rate": [1e-3, 2e-3], "seed": [0, 1], "method": ["lora", "reflora"]}


def test_grid_of_the_command_line():
    grid = read_grid(["learning_rate=1e-3,2e-3", "method=lora,reflora", "seed=0,1", "weight_decay=1e-3..0.1"])
    assert grid == {**GRID, "weight_decay": {"low": 1e-3, "high": 0.1}}


@pytest.mark.parametrize("argument", ["learning_rate", "=1", "seed="])
def test_grid_of_another_form(argument):
    with pytest.raises(ValueError, match="write NAME=VALUE,VALUE"):
        read_grid([argument])


def test_options_of_the_command_line():
    arguments = ["--max_steps", "4", "--lora-target-modules", "q_proj", "v_proj", "--use_rslora", "--lr=2e-3"]
    expected = {"max_steps": 4, "lora_target_modules": ["q_proj", "v_proj"], "use_rslora": True, "lr": 2e-3}
    assert read_options(arguments) == expected
    with pytest.raises(ValueError, match="Expected an option, found '4'"):
        read_options(["4"])


def test_the_recipes_are_those_of_the_command():
    assert set(plan.RECIPES) == set(cli.RECIPES)


def test_durations():
    assert [read_duration(text) for text in ("2h", "1h30m", "45s")] == [7200, 5400, 45]


def test_the_rows_are_the_methods_and_take_turns():
    sweep = Sweep(**SWEEP, grid=GRID)
    assert [method.name for method in sweep.rows] == ["lora", "reflora"]
    runs = list(sweep.grid_runs())
    assert len(runs) == len({run.id for run in runs}) == 8
    assert [run.method for run in runs[:4]] == ["lora", "reflora"] * 2
    assert runs[0].options["method"] == "lora"
    assert runs[0].choice == {"learning_rate": 1e-3, "seed": 0}


def test_methods_with_options_of_their_own():
    methods = {"LoRA": {"method": "lora"}, "slow": {"method": "reflora", "learning_rate": [1e-4], "lora_r": 4}}
    sweep = Sweep(**SWEEP, grid={"learning_rate": [1e-3, 2e-3]}, methods=methods)
    lora, slow = sweep.rows
    assert lora.grid == {"learning_rate": [1e-3, 2e-3]}
    assert (slow.grid, slow.fixed) == ({"learning_rate": [1e-4]}, {"method": "reflora", "lora_r": 4})
    with pytest.raises(ValueError, match="named twice"):
        Sweep(**SWEEP, grid=GRID, methods=methods)


def test_ranges():
    sweep = Sweep(**SWEEP, grid={**GRID, "learning_rate": {"low": 1e-4, "high": 1e-2}}, trials=3)
    assert sweep.rows[0].ranges == {"learning_rate": Range(1e-4, 1e-2)}
    assert sweep.rows[0].cells() == [{"seed": 0}, {"seed": 1}]
    assert list(sweep.grid_runs()) == []


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"recipe": "train"}, "recipe must be sft, dpo, classify or a script"),
        ({"grid": {"learning_rate": {"low": 1e-2, "high": 1e-3}}, "trials": 2}, "0 < low < high"),
        ({"grid": {"learning_rate": {"low": 1e-3, "high": 1e-2}}}, "give both or none"),
        ({"grid": GRID, "trials": 3}, "give both or none"),
        ({"grid": {"learning_rate": {"low": 1e-3, "high": 1e-2}}, "trials": 0}, "trials must be at least 1"),
        ({"grid": {"seed": []}}, "has no value for seed"),
        ({"options": {}}, "Give --eval_strategy epoch"),
        ({"config": "smollm2-135m/none"}, "Shipped are: "),
    ],
)
def test_wrong_sweeps(entries, message):
    with pytest.raises(ValueError, match=message):
        Sweep(**{**SWEEP, **entries})


def test_the_id_is_of_what_is_learned():
    def id(**options):
        sweep = Sweep("sft", options={**SWEEP["options"], **options}, grid=GRID, output_dir=options.get("at", "runs"))
        return next(sweep.grid_runs()).id

    first = id()
    assert id(cpu_threads=2) == id(report_to="none") == first
    assert id(lora_r=4) != first


def test_a_sweep_pushes_nothing():
    sweep = Sweep(
        "sft", options={"eval_strategy": "epoch", "push_to_hub": True, "hub_token": "hf_x", "hub_model_id": "me/x"}
    )
    (run,) = sweep.grid_runs()
    assert not any("hub" in name for name in run.options)


def test_yaml(tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text(
        "recipe: sft\nconfig: smollm2-135m/lora\noptions: {eval_strategy: epoch, weight_decay: 1e-3}\n"
        "grid: {learning_rate: [1e-3, 2e-3], method: [lora, reflora]}\nfresh_seeds: [1, 2]\n"
    )
    sweep = read_sweep(path, options={"max_steps": 2}, grid={"method": ["lora"]}, output_dir="elsewhere")
    (first, second) = sweep.grid_runs()
    assert (first.options["learning_rate"], second.options["learning_rate"]) == (1e-3, 2e-3)
    assert first.options["weight_decay"] == 1e-3  # YAML 1.1 reads a text
    assert first.options["max_steps"] == 2
    assert first.options["dataset_name"] == "recipes/data/tool_calls"  # of the config
    assert first.options["output_dir"].startswith("elsewhere")
    assert sweep.fresh_seeds == [1, 2]
    for text, message in (
        ("recipe: sft\nlearning_rate: [1]\n", "a sweep has no learning_rate"),
        ("config: x\n", "recipe is missing"),
        ("- recipe\n", "expected options by name, found list"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_sweep(path)


def test_every_sweep_of_the_project_is_read(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    paths = [
        path
        for path in request.config.rootpath.glob("benchmarks/**/*.yaml")
        if "recipe" in yaml.safe_load(path.read_text(encoding="utf-8"))
    ]
    assert paths
    for path in paths:
        sweep = read_sweep(path)
        assert len({run.id for run in sweep.grid_runs()}) == len(list(sweep.grid_runs())), path
