"""The wheel and the source distribution: what is in them, and that the wheel does the job without a clone."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import tiny

from hf_reflora.hub.space import FILES


pytestmark = pytest.mark.release
ROOT = Path(__file__).parent.parent
LEFT_OUT = {".ci/run", ".gitignore"}  # what only the repository needs


def run(*command: object, **options) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=500, **options)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return done.stdout


@pytest.fixture(scope="module")
def tracked():
    if not (ROOT / ".git").exists():
        pytest.skip("this is no clone")
    return set(run("git", "ls-files", cwd=ROOT).split("\n")) - {""}


@pytest.fixture(scope="module")
def built(tracked, tmp_path_factory):
    """The folder of the wheel and the source distribution, built from the tracked files only."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, source / name)
    run(sys.executable, "-m", "build", "--outdir", output, source)  # the wheel is built from the sdist
    return output


def test_the_wheel_has_the_package_and_the_shipped_files(built, tracked):
    [wheel] = built.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if not name.split("/")[0].endswith(".dist-info")}
    package = {name for name in tracked if name.startswith("hf_reflora/")}
    recipes = {name.removeprefix("recipes/") for name in tracked if name.startswith("recipes/")}
    recipes -= {"README.md", "quickstart.ipynb"}  # to be read in a clone
    assert "data/README.md" in recipes  # the data's licence
    assert names == {
        *package,
        *(f"hf_reflora/recipes/files/{name}" for name in recipes),
        *(f"hf_reflora/before_after/{name}" for name in FILES),
    }


def test_the_source_distribution_has_everything(built, tracked):
    [sdist] = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert tracked - names == LEFT_OUT


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """A folder in which the wheel is installed; it takes what it depends on from this environment."""
    folder = tmp_path_factory.mktemp("installed")
    [wheel] = built.glob("*.whl")
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", folder, wheel)
    return folder


def test_the_demo_runs_without_a_clone(installed, tmp_path):
    tiny.save(tmp_path / "model", max_position_embeddings=1024)
    empty = tmp_path / "empty"
    empty.mkdir()
    environment = os.environ | {"PYTHONPATH": str(installed)}
    command = [sys.executable, installed / "bin" / "hf-reflora"]
    place = run(sys.executable, "-c", "import hf_reflora; print(hf_reflora.__file__)", cwd=empty, env=environment)
    assert place.startswith(str(installed))
    run(
        *(*command, "sft", "--config", "smollm2-135m/lora_sb", "--num_processes", "1", "--use_cpu", "true"),
        *("--model_name_or_path", tmp_path / "model", "--dtype", "float32", "--cpu_threads", "1", "--max_steps", "1"),
        *("--dataset_train_split", "train[:8]", "--dataset_test_split", "test[:2]", "--score_max_new_tokens", "2"),
        *("--max_length", "1024", "--lorasb_num_samples", "2"),
        cwd=empty,
        env=environment,
    )
    output = empty / "runs" / "smollm2-135m-lora_sb"
    text = (output / "run_record.json").read_text(encoding="utf-8")
    assert str(installed) not in text
    assert str(ROOT) not in text
    record = json.loads(text)
    assert record["dataset"] == "recipes/data/tool_calls"
    assert "commit" not in record["environment"]  # even if the wheel lies inside some repository
    assert record["environment"]["command"][:2] == ["-m", "hf_reflora.recipes.sft"]
    assert "Exact" in run(*command, "export", output, tmp_path / "exported", cwd=empty, env=environment)
    run(*command, "card", output / "run_record.json", cwd=empty, env=environment)
    assert "--base" in run(*command, "space", "--help", cwd=empty, env=environment)
