"""What describes a run may fail, and weights are saved and training goes on all the same: record, plot and card."""

import logging

import pytest
import tiny
import tiny_trainer
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback
from trl import SFTTrainer

from hf_reflora import LoraSbConfig, LoraSbSFTTrainer, RefLoraCallback, RefLoraSFTTrainer, RefLoraTrainer
from hf_reflora.hub.retry import PushError
from hf_reflora.report.record import RECORD_NAME, RunRecord
from hf_reflora.report.recorder import RunRecordCallback


OURS = [RefLoraSFTTrainer, RefLoraTrainer, LoraSbSFTTrainer]
STOCK = [SFTTrainer, Trainer]


def build(folder, cls, more=None, **changes):
    callbacks = list((more or {}).pop("callbacks", []))
    if cls in STOCK:
        callbacks += [RefLoraCallback(), RunRecordCallback(method="reflora")]
    model = tiny.lora(tiny.llama())
    if cls is LoraSbSFTTrainer:
        model = get_peft_model(tiny.llama(), LoraSbConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    changes = {"save_strategy": "steps", "save_steps": 2, **changes}
    return tiny_trainer.build(folder, cls, model, more={"callbacks": callbacks, **(more or {})}, **changes)


def assert_saved(folder, trainer):
    """The adapter in the folder is the trainer's."""
    tensors = load_file(folder / "adapter_model.safetensors")
    base = tiny.llama()
    again = PeftModel.from_pretrained(base, folder)
    ids = torch.arange(4, 16)[None]
    trainer.model.eval()
    torch.testing.assert_close(again.eval()(ids).logits, trainer.model(ids).logits, rtol=0, atol=0)
    assert tensors


class Logs(TrainerCallback):
    """Logs what a loss should not be."""

    def __init__(self, loss):
        self.loss = loss

    def on_step_end(self, args, state, control, **kwargs):
        state.log_history.append({"loss": self.loss, "step": state.global_step})


def errors(caplog):
    return [r for r in caplog.records if r.levelno >= logging.ERROR and r.name.startswith("hf_reflora")]


@pytest.mark.parametrize("cls", [RefLoraSFTTrainer, SFTTrainer])
@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"], ids=["dtype", "text"])
def test_the_dtype_of_trls_documentation(tmp_path, caplog, cls, dtype):
    trainer = build(tmp_path, cls, model_init_kwargs={"dtype": dtype, "device_map": {"": torch.device("cpu")}})
    trainer.train()
    trainer.save_model()
    assert errors(caplog) == []
    expected = {"dtype": "bfloat16", "device_map": {"": "cpu"}}
    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        assert RunRecord.load(folder / RECORD_NAME).arguments["model_init_kwargs"] == expected
    assert_saved(tmp_path, trainer)


@pytest.mark.parametrize("loss", [None, [1.0, 2.0], "unknown"], ids=str)
@pytest.mark.parametrize("cls", OURS)
def test_a_loss_that_is_no_number_is_no_point_of_the_plot(tmp_path, caplog, cls, loss):
    trainer = build(tmp_path, cls, {"callbacks": [Logs(loss)]})
    trainer.train()
    trainer.save_model()
    assert errors(caplog) == []
    record = RunRecord.load(tmp_path / RECORD_NAME)
    assert [step for step, _ in record.losses] == [1, 2, 3, 4]
    assert loss in [entry.get("loss") for entry in record.log]
    assert (tmp_path / "training.png").is_file()
    assert_saved(tmp_path, trainer)


@pytest.mark.parametrize("cls", OURS)
@pytest.mark.parametrize("name", [RECORD_NAME, "training.png", "README.md"])
def test_a_folder_in_the_place_of_a_file(tmp_path, caplog, cls, name):
    trainer = build(tmp_path, cls)
    if name == "README.md":  # PEFT itself writes one and needs the place when the adapter is saved
        trainer.model.create_or_update_model_card = lambda folder: None
    (tmp_path / name).mkdir()
    trainer.train()
    trainer.save_model()
    assert_saved(tmp_path, trainer)
    assert_saved(tmp_path / "checkpoint-4", trainer)
    what = {RECORD_NAME: "run record", "training.png": "plot", "README.md": "model card"}[name]
    found = errors(caplog)
    assert found
    assert all(what in record.getMessage() and record.exc_info is not None for record in found)
    # What does not depend on it is there.
    if name != RECORD_NAME:
        assert RunRecord.load(tmp_path / RECORD_NAME).step == 4
    if name == "training.png":
        assert "![" not in (tmp_path / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("cls", OURS + STOCK)
def test_a_record_that_cannot_be_written_at_a_checkpoint(tmp_path, caplog, cls):
    class Endless(TrainerCallback):
        """Logs a list that has itself as an entry, which no JSON can have."""

        def on_step_end(self, args, state, control, **kwargs):
            endless = []
            endless.append(endless)
            record.update(endless=endless)

    trainer = build(tmp_path, cls, {"callbacks": [Endless()]})
    [record] = [c for c in trainer.callback_handler.callbacks if isinstance(c, RunRecordCallback)]
    trainer.train()
    trainer.save_model()
    assert_saved(tmp_path, trainer)
    assert_saved(tmp_path / "checkpoint-4", trainer)
    messages = [record.getMessage() for record in errors(caplog)]
    assert sum("checkpoint-2" in message for message in messages) == 1
    assert sum("checkpoint-4" in message for message in messages) == 1


@pytest.mark.parametrize("cls", OURS)
def test_wrong_arguments_of_a_push_are_raised_after_saving(tmp_path, cls):
    trainer = build(tmp_path, cls, save_strategy="no")
    trainer.train()
    with pytest.raises(ValueError, match="license must be an id of the Hub"):
        trainer.push_to_hub(license=3)
    assert_saved(tmp_path, trainer)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(TypeError, match="licence"):
        trainer.push_to_hub(licence="mit")
    assert_saved(tmp_path, trainer)


def test_an_adapter_of_another_name_is_not_pushed_as_the_default_one(tmp_path):
    """The repository would show other weights than those that its card describes."""
    model = tiny.lora(tiny.llama())
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("other")
    trainer = tiny_trainer.build(tmp_path, RefLoraTrainer, model)
    trainer.train()
    with pytest.raises(PushError, match=r"is called 'other', .* hf-reflora push .*/other other"):
        trainer.push_to_hub()
    assert (tmp_path / "other" / "adapter_model.safetensors").is_file()


def test_a_checkpoint_whose_record_is_broken_is_resumed(tmp_path, caplog):
    build(tmp_path, RefLoraSFTTrainer).train()
    (tmp_path / "checkpoint-2" / RECORD_NAME).write_text("{")
    trainer = build(tmp_path, RefLoraSFTTrainer)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    [error] = errors(caplog)
    assert error.getMessage().startswith("The record of the checkpoint could not be continued. Training goes on")
    record = RunRecord.load(tmp_path / RECORD_NAME)
    assert [(run["from_step"], run["to_step"]) for run in record.runs] == [(2, 4)]
