"""Experiment trackers: what arrives there, and the link to the run's page in record and card. Without the network."""

import sqlite3
import sys
from types import SimpleNamespace

import pytest
import tiny
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig
from trl import SFTConfig

from hf_reflora import RefLoraSFTTrainer
from hf_reflora.report.card import render
from hf_reflora.report.record import RECORD_NAME, RunRecord
from hf_reflora.report.trackers import run_pages


trackio = pytest.importorskip("trackio")
PAGE = "https://me-dashboard.hf.space?project=poems&runs=first&sidebar=collapsed"


def train(folder, tracker, **arguments):
    config = SFTConfig(
        output_dir=str(folder / "out"),
        max_steps=2,
        logging_steps=1,
        report_to=tracker,
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        **arguments,
    )
    trainer = RefLoraSFTTrainer(
        model=tiny.llama(),
        args=config,
        train_dataset=Dataset.from_list([{"text": "a b c d"}] * 16),
        processing_class=tiny.tokenizer(),
        peft_config=LoraConfig(r=2, target_modules=["q_proj"]),
    )
    trainer.train()
    trainer.save_model()
    return RunRecord.load(folder / "out" / RECORD_NAME)


@pytest.fixture
def local_trackio(tmp_path, monkeypatch):
    """Trackio's folder, which it reads from the environment when it is imported."""
    from trackio import sqlite_storage, utils

    for module in (sqlite_storage, utils):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    return tmp_path / "trackio"


def test_trackio_gets_the_losses_and_the_diagnostics_under_one_name(tmp_path, local_trackio):
    record = train(tmp_path, "trackio", project="poems", run_name="first")
    with sqlite3.connect(local_trackio / "poems.db") as database:
        [(metrics,), *_] = database.execute("select metrics from metrics").fetchall()
    text = metrics if isinstance(metrics, str) else metrics.decode()
    for name in ("train/loss", "train/reflora/norm_A", "train/reflora/balance_gap"):
        assert f'"{name}":' in text
    assert record.trackers == {}  # it is on this machine only
    assert "All curves" not in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_tensorboard(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(tmp_path, "tensorboard")
    [file] = (tmp_path / "out" / "runs").rglob("events.*")
    events = accumulator.EventAccumulator(str(file))
    events.Reload()
    assert {"train/loss", "train/reflora/norm_A"} <= set(events.Tags()["scalars"])


def test_the_page_of_a_run_is_in_the_card(tmp_path, monkeypatch):
    """The run of a Trackio Space, which cannot be made without the Hub: only what Trackio says of it is set."""
    trackio.context_vars.current_run.set(SimpleNamespace(project="poems", name="first"))
    trackio.context_vars.current_space_id.set("me/dashboard")
    try:
        assert run_pages() == {"Trackio": PAGE}
        record = train(tmp_path, "none")
    finally:
        trackio.context_vars.current_run.set(None)
        trackio.context_vars.current_space_id.set(None)
    assert run_pages() == {}
    assert record.trackers == {"Trackio": PAGE}
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"All curves: [Trackio](<{PAGE}>)." in card
    assert {"trackio", f"trackio:{PAGE}"} <= set(ModelCard(card).data.tags)


def test_pages_of_other_trackers(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=SimpleNamespace(url="https://wandb.ai/me/p/runs/1")))
    experiment = SimpleNamespace(url="https://www.comet.com/me/p/1")
    monkeypatch.setitem(sys.modules, "comet_ml", SimpleNamespace(get_running_experiment=lambda: experiment))
    assert run_pages() == {"Weights & Biases": "https://wandb.ai/me/p/runs/1", "Comet": "https://www.comet.com/me/p/1"}
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=None))
    monkeypatch.setitem(sys.modules, "comet_ml", SimpleNamespace(get_running_experiment=lambda: None))
    assert run_pages() == {}


def test_what_is_no_address_is_no_link():
    pages = {"a": "javascript:x", "b": "https://x.y> [z](q)", "c": "/tmp", "Page": "https://x.y/z"}
    card = render(RunRecord(method="lora", model="b", trackers=pages))
    assert "All curves: [Page](<https://x.y/z>)." in card
    assert not any(url in card for name, url in pages.items() if name != "Page")
