"""The plugin for axolotl, with the classes of axolotl's wheel, whose many dependencies are not installed."""

import subprocess
import sys

import pytest
import tiny
import yaml
from pydantic import ValidationError
from transformers import Trainer, TrainingArguments, default_data_collator

from hf_reflora import RefLoraCallback


pytestmark = pytest.mark.release
# Of what the wheel depends on, its configuration and its plugins import only addict beside hf_reflora's own libraries.
WHEELS = ("axolotl==0.19.0", "addict")
RUN = """
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
datasets: [{path: trl-lib/Capybara, type: chat_template}]
adapter: lora
micro_batch_size: 2
gradient_accumulation_steps: 1
max_steps: 4
learning_rate: 1e-2
plugins: [hf_reflora.axolotl.RefLoraPlugin]
"""


@pytest.fixture(scope="module", autouse=True)
def _axolotl(tmp_path_factory):
    folder = tmp_path_factory.mktemp("axolotl")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, *WHEELS]
    subprocess.run(command, check=True, timeout=300)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield


def configuration(text: str):
    """The configuration as `axolotl train` makes it of a YAML file (axolotl.cli.config.load_cfg), plugins included."""
    from axolotl.integrations.base import PluginManager
    from axolotl.integrations.config import merge_input_args
    from axolotl.utils.dict import DictDefault

    raw = yaml.safe_load(text)
    for name in raw["plugins"]:
        PluginManager.get_instance().register(name)
    _, keys = merge_input_args()
    return DictDefault(keys(**raw).model_dump(exclude_none=True))


def trainer_of(model, configuration, folder) -> Trainer:
    """A Trainer with the callbacks that axolotl's trainer builders add to theirs."""
    from axolotl.integrations.base import PluginManager

    trainer = Trainer(
        model=model,
        args=TrainingArguments(**tiny.arguments(folder)),
        train_dataset=tiny.token_dataset(),
        data_collator=default_data_collator,
    )
    for callback in PluginManager.get_instance().add_callbacks_post_trainer(configuration, trainer):
        trainer.add_callback(callback)
    return trainer


@pytest.mark.parametrize(
    ("block", "settings"),
    [
        ("", {}),
        ("reflora:", {}),  # a block without entries is null in YAML
        ("reflora: {method: reflora_s, warmup_steps: 1}", {"method": "reflora_s", "warmup_steps": 1}),
        ("reflora: {eps: 1e-3, smoothness: 10}", {"eps": 1e-3, "smoothness": 10.0}),  # YAML reads 1e-3 as a text
    ],
)
def test_it_trains_as_the_callback_does(block, settings, tmp_path):
    trainer = trainer_of(tiny.lora(tiny.llama()), configuration(RUN + block), tmp_path)
    trainer.train()
    expected = Trainer(
        model=tiny.lora(tiny.llama()),
        args=TrainingArguments(**tiny.arguments(tmp_path)),
        train_dataset=tiny.token_dataset(),
        data_collator=default_data_collator,
        callbacks=[RefLoraCallback(**settings)],
    )
    expected.train()
    tiny.assert_same(tiny.trainable(trainer.model), tiny.trainable(expected.model))


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("reflora: {warmupsteps: 100}", "reflora.warmupsteps\n  Unexpected keyword argument"),
        ("reflora: {interval: 0}", "interval must be at least 1, got 0"),
        ("reflora: {method: relora}", "method must be one of"),
    ],
)
def test_wrong_settings_are_refused_with_the_file(block, message):
    with pytest.raises(ValidationError) as error:
        configuration(RUN + block)
    assert message in str(error.value)


def test_a_model_without_lora_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="LlamaForCausalLM has no adapter"):
        trainer_of(tiny.llama(), configuration(RUN), tmp_path)
