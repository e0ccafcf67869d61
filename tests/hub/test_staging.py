"""The folder as it goes to the Hub, without a Hub: files, forms, records; and whose card it is."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from trl import SFTConfig

from hf_reflora import LoraSbCallback, LoraSbConfig, LoraSbSFTTrainer, RefLoraSFTTrainer
from hf_reflora.hub.adapter import push_adapter
from hf_reflora.hub.staging import read_config, read_record, stage
from hf_reflora.report.card import render
from hf_reflora.report.record import RunRecord


LAYERS = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
KINDS = {"lora": (RefLoraSFTTrainer, LoraConfig), "lora_sb": (LoraSbSFTTrainer, LoraSbConfig)}
RECORD = {"method": "reflora", "model": "org/base"}
JUNK = {
    *(".env", ".gitattributes", ".gitignore", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"),
    *("trainer_state.json", "training_args.json", "all_results.json", "_private.json", "script.py", "data.jsonl"),
    *("pytorch_model.bin", "weights.tmp", "log", "checkpoint-2/adapter_config.json", "runs/events.json"),
    *(".cache/x.json", "__pycache__/x.json", "_mine/adapter_config.json", "other/notes.md", ".push-x/README.md"),
    # What lies in many trainers' folders and nobody meant to publish.
    *("train.json", "generated_predictions.txt", "notes.md", "recipe.yaml", "photo.jpg", "README.txt", "config.json"),
}
COMPANIONS = {
    *("vocab.txt", "LICENSE", "LICENSE-GEMMA.txt", "NOTICE", "tokenizer.model.v3", "qwen.tiktoken", "source.spm"),
    *("tokenization_qwen.py", "additional_chat_templates/tool_use.jinja", "generation_config.json", "spiece.model"),
}
GOOD = {
    *("adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    *("chat_template.jinja", "run_record.json", "training.png"),
}


def run(folder, kind="lora", **changes):
    """A trained and saved run, with checkpoints at 2 and 4."""
    cls, config = KINDS[kind]
    torch.manual_seed(1)
    model = tiny.llama()
    model.name_or_path = "/data/base"
    more = {"lora_sb": LoraSbCallback()} if kind == "lora_sb" else {}
    trainer = cls(
        model=get_peft_model(model, config(r=4, **LAYERS)),
        args=SFTConfig(**tiny.arguments(folder, save_strategy="steps", save_steps=2, **changes)),
        train_dataset=tiny.token_dataset(16, labels=False),
        processing_class=tiny.tokenizer(),
        **more,
    )
    trainer.train()
    trainer.save_model()
    return trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    return {kind: (run(folder, kind), folder) for kind, folder in folders.items()}


@pytest.fixture
def folder(trained, tmp_path):
    """A copy of a run's folder, all its own."""
    return copied(trained["lora"][1], tmp_path / "run")


def copied(source, target):
    for path in source.rglob("*"):
        if path.is_file():
            (target / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            (target / path.relative_to(source)).write_bytes(path.read_bytes())
    return target


def content(folder) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in Path(folder).rglob("*")
        if path.is_file()
    }


def staged(folder, target, base_model=None, checkpoints=None):
    left_out = stage(folder, target, record=read_record(folder, base_model), checkpoints=checkpoints or {})
    return set(content(target)), left_out


def logits(folder, **where):
    model = PeftModel.from_pretrained(tiny.llama(), folder, **where).eval()
    with torch.no_grad():
        return model(torch.arange(4, 20)[None]).logits


# Which files


def test_what_is_taken_and_what_is_left_out(folder, tmp_path):
    for name in JUNK | COMPANIONS:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    before = content(folder)
    files, left_out = staged(folder, tmp_path / "out")
    assert files == GOOD | COMPANIONS
    assert left_out == sorted({name.split("/")[0] for name in JUNK} | {"checkpoint-4"})
    assert content(folder) == before


def test_pictures_that_the_card_shows_go_along(folder, tmp_path):
    for name in ("loss.png", "img/a.jpg", "other.png", "secret.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    text = "# Mine\n![loss](loss.png) <img src='img/a.jpg' width=3> ![x](../other.png) ![y](https://x.y/secret.png)\n"
    (folder / "README.md").write_text(text)
    files, left_out = staged(folder, tmp_path / "out")
    assert files == GOOD | {"README.md", "loss.png", "img/a.jpg"}
    assert {"other.png", "secret.png"} <= set(left_out)


def test_weights_of_the_older_form_become_safetensors(folder, tmp_path):
    expected = logits(folder)
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    files, left_out = staged(folder, tmp_path / "out")
    assert files == GOOD
    assert "adapter_model.bin" in left_out
    assert torch.equal(logits(tmp_path / "out"), expected)
    (folder / "adapter_model.bin").write_bytes(b"garbage")
    with pytest.raises(ValueError, match=r"cannot be read: .* Save the adapter again"):
        staged(folder, tmp_path / "again")


@pytest.mark.parametrize("name", ["/home/jane/base", r"C:\Users\Jane Doe\base", "~/base", r"\\server\share\base"])
def test_no_path_of_the_machine_is_published(folder, tmp_path, name):
    """Of the adapter's and the tokenizer's configuration and the record, also of a recipe's command line."""
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings |= {"base_model_name_or_path": name, "corda_config": {"cache_file": name, "corda_method": "ipm"}}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text()) | {"name_or_path": name}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    record = RunRecord.load(folder / "run_record.json")
    command = [f"{name}/train.py", "--model_name_or_path", name, f"--dataset_name={name}"]
    record.update(model=name, dataset=name, arguments={"output_dir": name}, environment={"command": command})
    record.replace(base_model=None, dataset_id=None)
    record.save(folder / "run_record.json")
    staged(folder, tmp_path / "out")
    published = [path for path in (tmp_path / "out").iterdir() if path.suffix in (".json", ".md")]
    texts = {path.name: path.read_text(encoding="utf-8") for path in published}
    texts["card"] = render(read_record(folder))
    assert len(texts) == 5
    for place, text in texts.items():
        for word in ("jane", "Jane", "~/base", "share"):
            assert word not in text, place
    assert json.loads(texts["adapter_config.json"])["corda_config"] == {"cache_file": "…/base", "corda_method": "ipm"}
    assert json.loads(texts["run_record.json"])["environment"]["command"][3] == "--dataset_name=…/base"


def test_a_second_adapter_in_its_own_folder_goes_along(tmp_path):
    torch.manual_seed(1)
    model = get_peft_model(tiny.llama(), LoraConfig(r=4, **LAYERS))
    model.name_or_path = "/data/base"
    model.add_adapter("second", LoraConfig(r=2, **LAYERS))
    model.save_pretrained(tmp_path / "run")
    (tmp_path / "run" / "second" / "optimizer.pt").touch()
    (tmp_path / "run" / "second" / "deeper").mkdir()
    (tmp_path / "run" / "second" / "deeper" / "x.json").touch()
    files, left_out = staged(tmp_path / "run", tmp_path / "out", base_model="org/base")
    assert files == {
        *("adapter_config.json", "adapter_model.safetensors"),
        *("second/adapter_config.json", "second/adapter_model.safetensors"),
    }
    assert left_out == []
    for name in ("", "second/"):
        settings = json.loads((tmp_path / "out" / f"{name}adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == "org/base"
    assert torch.equal(logits(tmp_path / "out", subfolder="second"), logits(tmp_path / "run" / "second"))


@pytest.mark.parametrize("kind", KINDS)
def test_links_of_the_cache_become_files(trained, tmp_path, kind):
    """As in the cache of the Hub's client, where every file is a link to a blob without a suffix."""
    source, snapshot, blobs = trained[kind][1], tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in source.iterdir():
        if path.is_file():
            blob = blobs / hashlib.sha256(path.read_bytes()).hexdigest()
            blob.write_bytes(path.read_bytes())
            (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    before = content(blobs)
    files, _ = staged(snapshot, tmp_path / "out", base_model="org/base")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    assert content(blobs) == before
    torch.testing.assert_close(logits(tmp_path / "out"), logits(source), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("own_card", [True, False])
def test_originals_stay_bit_for_bit(trained, tmp_path, kind, own_card):
    """Links share their content: nothing may be written through one."""
    source = copied(trained[kind][1], tmp_path / "run")
    if own_card:
        (source / "README.md").write_text("---\nlibrary_name: peft\n---\nmine")
    (source / "training.png").unlink()
    before, times = content(source), {p: p.stat().st_mtime_ns for p in source.rglob("*") if p.is_file()}
    checkpoints = {"last-checkpoint": source / "checkpoint-4", "checkpoint-2": source / "checkpoint-2"}
    files, _ = staged(source, tmp_path / "out", "org/base", checkpoints)
    assert content(source) == before
    assert {p: p.stat().st_mtime_ns for p in times} == times
    assert ("README.md" in files) == own_card
    assert "training.png" in files
    weights = "native/adapter_model.safetensors" if kind == "lora_sb" else "adapter_model.safetensors"
    assert os.path.samefile(source / "adapter_model.safetensors", tmp_path / "out" / weights)


def test_without_hard_links_the_files_are_copied(folder, tmp_path, monkeypatch):
    def crossing(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", crossing)
    files, _ = staged(folder, tmp_path / "out", "org/base", {"last-checkpoint": folder / "checkpoint-4"})
    out = tmp_path / "out"
    assert {"tokenizer.json", "last-checkpoint/optimizer.pt"} <= files
    assert not os.path.samefile(folder / "tokenizer.json", out / "tokenizer.json")
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


# In which form


def test_a_lora_sb_adapter_is_an_ordinary_lora_with_its_own_form_beside_it(trained, tmp_path):
    trainer, source = trained["lora_sb"]
    files, _ = staged(source, tmp_path / "out", base_model="org/base")
    assert {f for f in files if "/" in f} == {"native/adapter_config.json", "native/adapter_model.safetensors"}
    root = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    native = json.loads((tmp_path / "out" / "native" / "adapter_config.json").read_text())
    assert (root["peft_type"], native["peft_type"]) == ("LORA", "LORASB")
    assert root["base_model_name_or_path"] == native["base_model_name_or_path"] == "org/base"
    with torch.no_grad():
        expected = trainer.model.eval()(torch.arange(4, 20)[None]).logits
        plain = tiny.llama().eval()(torch.arange(4, 20)[None]).logits
    assert (expected - plain).abs().max() > 1e-4
    assert torch.equal(logits(tmp_path / "out", subfolder="native"), expected)
    torch.testing.assert_close(logits(tmp_path / "out"), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("base_model", "written"), [("org/base", "org/base"), (None, None)])
def test_a_local_base_becomes_an_id_or_null_everywhere(trained, tmp_path, kind, base_model, written):
    source = trained[kind][1]
    name = trained[kind][0].model.active_peft_config.base_model_name_or_path
    assert name == "/data/base"
    staged(source, tmp_path / "out", base_model, {"last-checkpoint": source / "checkpoint-4"})
    configs = sorted((tmp_path / "out").rglob("adapter_config.json"))
    assert len(configs) == (3 if kind == "lora_sb" else 2)
    for path in configs:
        original = source / "adapter_config.json"
        settings = json.loads(path.read_text())
        assert settings.pop("base_model_name_or_path") == written
        if settings["peft_type"] == json.loads(original.read_text())["peft_type"]:
            expected = json.loads(original.read_text())
            assert expected.pop("base_model_name_or_path") == "/data/base"
            assert settings == expected


def test_a_config_that_is_right_is_not_written_again(folder, tmp_path):
    settings = {**json.loads((folder / "adapter_config.json").read_text()), "base_model_name_or_path": "org/base"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    staged(folder, tmp_path / "out", base_model="org/base")
    assert os.path.samefile(folder / "adapter_config.json", tmp_path / "out" / "adapter_config.json")


def test_checkpoints_go_whole_but_for_arguments_and_card(folder, tmp_path):
    for name in (".env", ".cache/x", "__pycache__/y", "deeper/training_args.bin", "deeper/z.pt"):
        (folder / "checkpoint-4" / name).parent.mkdir(exist_ok=True)
        (folder / "checkpoint-4" / name).touch()
    assert {"training_args.bin", "README.md"} <= {p.name for p in (folder / "checkpoint-4").iterdir()}
    files, _ = staged(folder, tmp_path / "out", checkpoints={"last-checkpoint": folder / "checkpoint-4"})
    checkpoint = {f.removeprefix("last-checkpoint/") for f in files if f.startswith("last-checkpoint/")}
    assert checkpoint == {
        *("adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"),
        *("trainer_state.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "run_record.json"),
        "deeper/z.pt",
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_pushed_checkpoint_can_be_resumed(trained, tmp_path, kind):
    source = trained[kind][1]
    staged(source, tmp_path / "out", checkpoints={"last-checkpoint": source / "checkpoint-2"})
    cls, config = KINDS[kind]
    torch.manual_seed(1)
    resumed = cls(
        model=get_peft_model(tiny.llama(), config(r=4, **LAYERS)),
        args=SFTConfig(**tiny.arguments(tmp_path / "again")),
        train_dataset=tiny.token_dataset(16, labels=False),
        processing_class=tiny.tokenizer(),
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "last-checkpoint"))
    tiny.assert_same(tiny.trainable(resumed.model), tiny.trainable(trained[kind][0].model))
    assert len(resumed.run_record.record.runs) == 2


# The record


def test_the_record_is_read_and_the_base_may_be_given(folder):
    assert read_record(folder, None).base_model is None
    given = {**read_record(folder).to_dict(), "base_model": "org/base"}
    assert read_record(folder, "org/base").to_dict() == given
    assert read_record(folder, None).method == "reflora"


def test_an_older_record_tells_the_base_by_its_name(folder):
    record = json.loads((folder / "run_record.json").read_text())
    del record["base_model"]
    (folder / "run_record.json").write_text(json.dumps({**record, "model": "org/base"}))
    assert read_record(folder, None).base_model == "org/base"


@pytest.mark.parametrize(("kind", "method"), [("lora", "lora"), ("lora_sb", "lora_sb")])
@pytest.mark.parametrize(("name", "base_model"), [("org/base", "org/base"), ("/data/base", None), (None, None)])
def test_without_a_record_the_configuration_tells(trained, tmp_path, kind, method, name, base_model):
    folder = copied(trained[kind][1], tmp_path / "run")
    (folder / "run_record.json").unlink()
    settings = {**json.loads((folder / "adapter_config.json").read_text()), "base_model_name_or_path": name}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    record = read_record(folder, None)
    assert (record.method, record.base_model) == (method, base_model)
    assert record.model == {None: "an unknown base model", "/data/base": "…/base"}.get(name, name)
    files, _ = staged(folder, tmp_path / "out")
    assert not {"run_record.json", "README.md"} & files
    text = render(record)
    assert "trl" not in text
    assert "None" not in text


def test_the_record_of_other_weights_is_refused(folder, tmp_path):
    (folder / "adapter_model.safetensors").write_bytes(
        (folder / "checkpoint-2/adapter_model.safetensors").read_bytes()
    )
    match = r"run_record.json describes other weights than adapter_model.safetensors beside it: norm_A is \d\S*, not "
    with pytest.raises(ValueError, match=match) as refused:
        staged(folder, tmp_path / "out")
    assert "norm_B is" in str(refused.value)
    assert "trainer.save_model" in str(refused.value)
    assert not (tmp_path / "out").exists()
    (folder / "run_record.json").unlink()
    staged(folder, tmp_path / "out")


def test_the_record_of_a_checkpoint_is_that_of_its_weights(folder, tmp_path):
    files, _ = staged(folder / "checkpoint-2", tmp_path / "out")
    assert {"adapter_config.json", "adapter_model.safetensors", "run_record.json"} <= files
    assert not {"optimizer.pt", "trainer_state.json", "training_args.bin"} & files


@pytest.mark.parametrize(
    ("kind", "other"),
    [
        pytest.param(
            *pair,
        )
        for pair in (("lora", "lora_sb"), ("lora_sb", "lora"))
    ],
)
def test_the_record_of_another_method_is_refused(trained, tmp_path, kind, other):
    folder = copied(trained[kind][1], tmp_path / "run")
    (folder / "run_record.json").write_bytes((trained[other][1] / "run_record.json").read_bytes())
    with pytest.raises(ValueError, match="describes other weights"):
        staged(folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("files", "told"),
    [
        (None, "found: no such folder"),
        ([], "found: nothing"),
        (["adapter_config.json", "model.safetensors"], "found: adapter_config.json, model.safetensors"),
        (["adapter_model.safetensors"], "found: adapter_model.safetensors"),
    ],
)
def test_a_folder_without_an_adapter_is_refused(tmp_path, files, told):
    for name in files or []:
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / name).touch()
    if files == []:
        (tmp_path / "run").mkdir()
    match = f"run has no adapter: adapter_config.json and adapter_model.safetensors were looked for, {told}[.] Give a"
    for refuse in (read_config, read_record, lambda folder: push_adapter(folder, "me/x", token="x")):
        with pytest.raises(ValueError, match=match):
            refuse(tmp_path / "run")


@pytest.mark.parametrize("name", ["my base", "/data/base", "a/b/c", ""])
def test_a_base_that_is_no_id_is_refused(folder, name):
    with pytest.raises(ValueError, match="base_model must be an id on the Hub such as org/model, got "):
        push_adapter(folder, "me/x", base_model=name, token="x")


@pytest.mark.parametrize("init", ["corda", "lora_ga"])
def test_a_start_that_cannot_be_repeated_is_refused(folder, tmp_path, init):
    """PEFT would load the adapter onto a base model that still has the start in its weights."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "init_lora_weights": init}), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"init_lora_weights='{init}'.*path_initial_model_for_weight_conversion"):
        stage(folder, tmp_path / "out", record=RunRecord.load(folder / "run_record.json"), checkpoints={})


# Whose card it is


def test_a_card_in_another_encoding_is_named(folder, tmp_path):
    (folder / "README.md").write_bytes("# Düsseldorf".encode("latin-1"))
    with pytest.raises(ValueError, match=r"README.md is no text in UTF-8, which the Hub shows: .* Save it as UTF-8."):
        staged(folder, tmp_path / "out")


def test_a_card_of_ones_own_is_staged_as_it_is(folder, tmp_path):
    own = (folder / "README.md").read_text() + "\nA sentence of mine.\n"
    (folder / "README.md").write_text(own)
    staged(folder, tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text() == own
    assert (folder / "README.md").read_text() == own
