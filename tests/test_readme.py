"""What the Markdown pages say is what the repository does: their commands, snippets, links and names of files."""

import ast
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from accelerate.commands.launch import launch_command_parser
from peft import get_peft_model

from hf_reflora import LoraSbConfig, cli
from hf_reflora.recipes import classify, dpo, sft
from hf_reflora.recipes.options import Options
from hf_reflora.sweep import checks, command
from hf_reflora.sweep.plan import read_sweep


ROOT = Path(__file__).parent.parent
URL = "https://github.com/hf-reflora/hf_reflora"
RAW = "https://raw.githubusercontent.com/hf-reflora/hf_reflora/main/"
PAGES = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in (
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "UPSTREAM.md",
        "recipes/README.md",
        "recipes/data/README.md",
        "benchmarks/README.md",
        "model_cards/README.md",
        "spaces/README.md",
        "spaces/before_after/README.md",
    )
}
README = PAGES["README.md"]
RECIPES = {
    **{"recipes/sft_reflora.py": sft, "recipes/dpo_reflora.py": dpo, "recipes/classify_reflora.py": classify},
    **{recipe.__name__: recipe for recipe in (sft, dpo, classify)},
}
TRAINING = ("accelerate launch ", *(f"hf-reflora {name} " for name in cli.RECIPES))
LINES = [
    line.strip()
    for text in (*PAGES.values(), *(recipe.__doc__ for recipe in RECIPES.values()))
    for line in text.replace("\\\n", " ").splitlines()
]
SNIPPETS = {name: re.findall(r"```python\n(.*?)```", PAGES[name], re.S) for name in ("README.md", "recipes/README.md")}
# There is no Hub in the tests: a model of 2 layers and 8 short chats stand in for what the snippets take from it.
STAND_INS = {
    '"Qwen/Qwen3-0.6B"': '"tiny"',
    '"HuggingFaceTB/SmolLM2-135M-Instruct"': '"tiny"',
    'load_dataset("trl-lib/Capybara", split="train")': 'load_dataset("json", data_files="chats.jsonl", split="train")',
}


def with_stand_ins(snippet: str) -> str:
    for written, used in STAND_INS.items():
        snippet = snippet.replace(written, used)
    return snippet


@pytest.fixture
def folder_with_stand_ins(tmp_path, monkeypatch):
    # Wide enough for the rank of 64 that the LoRA-SB snippet asks for.
    tiny.save(tmp_path / "tiny", hidden_size=64, intermediate_size=64, num_key_value_heads=4)
    tiny.chat_dataset().to_json(tmp_path / "chats.jsonl")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_readme_is_one_screen():
    """At most 150 lines; ten that train and four that load and generate."""
    assert len(README.splitlines()) <= 150
    training, generating = SNIPPETS["README.md"]
    assert len([line for line in training.splitlines() if line]) <= 10
    assert len([line for line in generating.splitlines() if line]) <= 4


def test_readme_trains_and_generates(folder_with_stand_ins, capsys):
    training, generating = map(with_stand_ins, SNIPPETS["README.md"])
    names = {}
    exec(training, names)
    assert names["trainer"].state.global_step == names["trainer"].state.max_steps > 0
    record = json.loads(Path("capybara-reflora/run_record.json").read_text(encoding="utf-8"))
    assert record["method"] == "reflora"
    capsys.readouterr()
    exec(generating, names := {})
    assert capsys.readouterr().out == names["answer"][0]["generated_text"][-1]["content"] + "\n"
    assert any("lora_A" in name for name, _ in names["chat"].model.named_parameters())


@pytest.mark.parametrize("snippet", SNIPPETS["recipes/README.md"], ids=lambda s: s.split("import ")[-1].split("\n")[0])
def test_recipes_snippets_run(snippet, folder_with_stand_ins):
    exec(with_stand_ins(snippet), names := {})
    if "trainer" in names:
        assert names["trainer"].state.global_step == names["trainer"].state.max_steps > 0
    else:
        assert isinstance(names["optimizer"], torch.optim.AdamW)
        assert any(B.any() for name, B in names["model"].named_parameters() if "lora_B" in name)


@pytest.mark.parametrize("line", sorted({line for line in LINES if line.startswith(TRAINING)}))
def test_training_commands_parse(line, monkeypatch):
    """Everything but the training itself: the launcher's options, the files and names, the recipe's options."""
    monkeypatch.chdir(ROOT)
    if line.startswith("hf-reflora"):
        launches = []
        monkeypatch.setattr("accelerate.commands.launch.launch_command", launches.append)
        cli.main(line.split()[1:])
        [launcher] = launches
    else:
        launcher = launch_command_parser().parse_args(line.split()[2:])
    assert launcher.config_file is None or Path(launcher.config_file).is_file()
    recipe = RECIPES[launcher.training_script]
    assert bool(launcher.module) == launcher.training_script.startswith("hf_reflora.")
    arguments = [*launcher.training_script_args, "--bf16", "false"]
    options = Options(*recipe.make_parser().parse_args_and_config(arguments))
    assert options.script.dataset_name


@pytest.mark.parametrize("line", sorted({line for line in LINES if line.startswith("hf-reflora sweep ")}))
def test_sweeps_parse(line, monkeypatch):
    """Everything but the runs themselves."""
    monkeypatch.chdir(ROOT)
    if "FILE.yaml" not in line:
        _, sweep, _ = command.parse(line.split()[2:])
        checks.check_runs(replace(sweep, options={**sweep.options, "bf16": False}))


def test_the_yaml_of_a_sweep(tmp_path):
    [text] = re.findall(r"```yaml\n(.*?)```", PAGES["recipes/README.md"], re.S)
    (tmp_path / "sweep.yaml").write_text(text, encoding="utf-8")
    sweep = read_sweep(tmp_path / "sweep.yaml")
    assert [len(method.cells()) for method in sweep.rows] == [6, 4]
    checks.check_runs(sweep)


def test_make_runs_what_the_readme_says(tmp_path):
    """`make demo` is the three lines for people without make, in a virtual environment of its own."""
    made = subprocess.run(
        ["make", "--dry-run", "demo", f"VENV={tmp_path}/venv"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    made = made.replace(f"{tmp_path}/venv/bin/python -m ", "").replace(f"{tmp_path}/venv/bin/", "")
    made = re.sub(r"install --quiet( --no-compile)? +", "install ", made)
    [lines] = [block for block in re.findall(r"```bash\n(.*?)```", README, re.S) if "pip install" in block]
    assert [line for line in lines.splitlines() if line not in made] == []
    assert len(lines.splitlines()) == 3


def test_make_has_every_target_that_is_named():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    named = {name for text in PAGES.values() for name in re.findall(r"(?:^ {4}|`)make ([a-z][a-z-]*)", text, re.M)}
    assert {"demo", "test", "compare", "space", "cards"} <= named
    assert named <= set(targets)


@pytest.mark.parametrize(
    "line",
    sorted(
        line
        for line in set(LINES)
        if line.startswith("hf-reflora ") and not line.startswith((*TRAINING, "hf-reflora sweep "))
    ),
)
def test_other_commands_parse(line):
    options = cli.make_parser().parse_args(line.split()[1:])
    assert options.run is getattr(cli, line.split()[1])


def test_commands_on_files_run(tmp_path, monkeypatch, capsys):
    """`export`, `card` and `inspect` as the pages write them, on folders of the same names."""
    monkeypatch.chdir(tmp_path)
    lines = {line.split()[1]: line.split()[2:] for line in LINES if line.startswith("hf-reflora ")}
    source, target = map(tmp_path.joinpath, lines["export"])
    config = LoraSbConfig(r=4, target_modules=["q_proj"], init_weights=False)
    get_peft_model(tiny.llama(), config).save_pretrained(source)
    folder = tmp_path / lines["card"][0]
    assert folder == tmp_path / lines["inspect"][0]
    tiny.lora(tiny.llama()).save_pretrained(folder)

    def run(command: str) -> str:
        cli.main([command, *lines[command]])
        return capsys.readouterr().out

    assert "LoRA of rank 4 in 2 layers" in run("export")
    assert (target / "adapter_model.safetensors").exists()
    run("card")
    assert "license: apache-2.0" in (folder / "README.md").read_text(encoding="utf-8")
    assert re.search(r"^rank +4$", run("inspect"), re.M)


def anchors(name: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    text = re.sub(r"```.*?```", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.S)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(name: str) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"", PAGES[name])


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_to_files(name):
    for link in map("".join, links(name)):
        path = link
        for prefix in (f"{URL}/blob/main/", f"{URL}/tree/main/", RAW):
            path = path.removeprefix(prefix)
        if path == link and link.startswith("https://"):
            assert not link.startswith((URL, RAW)) or link == URL, link  # another site
            continue
        path, _, anchor = path.partition("#")
        target = ROOT / path if link.startswith("https://") else (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.resolve().relative_to(ROOT)), link


def test_links_in_the_readme_work_on_pypi():
    """There is no repository around it, so that every link and image must be a whole URL."""
    assert len(links("README.md")) > 10
    assert all("".join(link).startswith("https://") for link in links("README.md"))
    assert README.count("![") == README.count(f"]({RAW}") > 0


@pytest.mark.parametrize("name", PAGES)
def test_files_that_are_named_exist(name):
    """Paths in backticks such as `hf_reflora/hub/` or `refactor.py`; in a table row, below its first cell's folder."""
    for line in PAGES[name].splitlines():
        row = re.match(r"\| \[?`(hf_reflora/[\w/]*/)`", line)
        for path in re.findall(r"`((?:hf_reflora|recipes|benchmarks|tests|spaces)/[\w/.*-]*)`", line):
            assert list(ROOT.glob(path.rstrip("/"))), f"{name}: {path}"
        for file in re.findall(r"`([\w*.]+\.(?:py|jinja))`", line) if row else []:
            assert list((ROOT / row[1]).glob(file)), f"{name}: {row[1]}{file}"


def test_oldest_versions_are_those_of_pyproject():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    [sentence] = re.findall(r"The oldest supported versions are ([^§]*?)\.\n", README)
    named = dict(re.findall(r"(torch|transformers|peft|accelerate|huggingface-hub|trl) (\d+\.\d+)", sentence))
    assert len(named) == 6
    assert all(re.search(rf'"{package}>={version}"', text) for package, version in named.items())
    assert re.search(rf'requires-python = ">={re.findall("Python ([0-9.]+[0-9])", sentence)[0]}"', text)


def imported_by(path: Path) -> set[str]:
    """The top-level packages that a file imports, itself or through files of its own folder."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= imported_by(path.parent / f"{node.module}.py") if node.level else {node.module.split(".")[0]}
    return names


def test_the_formulas_that_would_move_to_peft_are_standalone():
    rows = re.findall(r"^\| `(hf_reflora/reflora/\w+\.py)` \| (`.*)\|$", PAGES["UPSTREAM.md"], re.M)
    assert len(rows) == 5
    for name, functions in rows:
        defined = re.findall(r"^def (\w+)", (ROOT / name).read_text(encoding="utf-8"), re.M)
        named = set(re.findall(r"`(\w+)`", functions)) - {"step"}
        assert named <= set(defined)
        assert name.endswith("optimizer.py") or imported_by(ROOT / name) - sys.stdlib_module_names == {"torch"}


def test_every_package_is_in_the_readme():
    packages = {path.parent.name for path in (ROOT / "hf_reflora").glob("*/__init__.py")}
    assert packages == set(re.findall(r"^\| `hf_reflora/(\w+)/` \|", README, re.M))
