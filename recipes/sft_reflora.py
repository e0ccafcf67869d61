"""Supervised fine-tuning with LoRA, RefLoRA or LoRA-SB, with the same rows answered before and after.

    accelerate launch recipes/sft_reflora.py --config recipes/smollm2-135m/reflora.yaml

Any option of TRL's SFT script works, on the command line or in the YAML file, and an unknown one is an error:

    accelerate launch recipes/sft_reflora.py --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \
        --dataset_name trl-lib/Capybara --method reflora --learning_rate 2e-4 --output_dir runs/capybara --push_to_hub
"""

import logging
import os
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import embedded_model
import evaluation
import torch
from datasets import Dataset, load_dataset
from peft import PeftConfig
from transformers import AutoTokenizer
from trl import (
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    SFTTrainer,
    TrlParser,
    get_peft_config,
    get_quantization_config,
)

from hf_reflora import (
    LoraSbArguments,
    LoraSbConfig,
    LoraSbSFTTrainer,
    PublishingMixin,
    PushError,
    RefLoraArguments,
    RefLoraSFTTrainer,
    RunRecordCallback,
    WholeCheckpointsMixin,
)
from hf_reflora.card import NATIVE
from hf_reflora.environment import environment, peak_memory_gb, usable_cores
from hf_reflora.ids import hub_id
from hf_reflora.record import dataset_facts, non_default


logger = logging.getLogger(__name__)

METHODS = ("lora", "reflora", "reflora_s", "lora_sb", "lora_xs")
INITS = ("default", "lora_sb")
EXAMPLES = 5


class LoraSFTTrainer(WholeCheckpointsMixin, PublishingMixin, SFTTrainer):
    """Plain LoRA, to compare with."""

    _tag_names = ["trl", "sft"]


@dataclass
class RecipeArguments:
    """What this recipe adds to TRL's SFT script."""

    method: str = field(default="reflora", metadata={"help": f"One of {', '.join(METHODS)}."})
    init: str = field(
        default="default",
        metadata={"help": "Start of LoRA and RefLoRA: PEFT's 'default' (B = 0), or 'lora_sb', LoRA-SB's subspace."},
    )
    prompt_template: str | None = field(
        default=None,
        metadata={"help": "The prompt made from a row's columns, e.g. '{question}'. Default: rows in a TRL format."},
    )
    completion_template: str | None = field(
        default=None, metadata={"help": "The completion made from a row's columns, e.g. '{answer}'."}
    )
    system_prompt: str | None = field(
        default=None,
        metadata={"help": "With templates: rows become chat messages with this system turn (needs a chat template)."},
    )
    score: str | None = field(
        default=None,
        metadata={
            "help": "Answer the test split before and after training and score it: "
            f"{', '.join(evaluation.SCORES)}. Default: only the loss, if eval_strategy is set."
        },
    )
    score_max_new_tokens: int = field(default=256, metadata={"help": "Longest answer to score, in tokens."})
    score_batch_size: int = field(default=16, metadata={"help": "Prompts answered at a time."})
    cpu_threads: int | None = field(
        default=None,
        metadata={
            "help": "Threads of each process on a CPU, where accelerate would use one. Default: all cores, shared."
        },
    )

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {METHODS}, got {self.method!r}.")
        if self.init not in INITS:
            raise ValueError(f"init must be one of {INITS}, got {self.init!r}.")
        if self.init == "lora_sb" and self.method in NATIVE:
            raise ValueError(f"init is for lora, reflora and reflora_s; {self.method} has its own.")
        if self.score is not None and self.score not in evaluation.SCORES:
            raise ValueError(f"score must be one of {tuple(evaluation.SCORES)}, got {self.score!r}.")
        if (self.prompt_template is None) != (self.completion_template is None):
            raise ValueError("prompt_template and completion_template belong together: give both or none.")
        if self.cpu_threads is not None and self.cpu_threads < 1:
            raise ValueError(f"cpu_threads must be at least 1, got {self.cpu_threads}.")
        if self.system_prompt is not None and self.prompt_template is None:
            raise ValueError("system_prompt needs prompt_template and completion_template.")


def make_parser() -> TrlParser:
    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig, RecipeArguments, RefLoraArguments, LoraSbArguments))
    parser.set_defaults(use_peft=True)
    return parser


def to_trl(rows: Dataset, recipe: RecipeArguments) -> Dataset:
    """Rows in TRL's prompt/completion format, by the recipe's templates."""
    if recipe.prompt_template is None:
        return rows

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        prompt, completion = recipe.prompt_template.format(**row), recipe.completion_template.format(**row)
        if recipe.system_prompt is None:
            return {"prompt": prompt, "completion": completion}
        system = {"role": "system", "content": recipe.system_prompt}
        return {
            "prompt": [system, {"role": "user", "content": prompt}],
            "completion": [{"role": "assistant", "content": completion}],
        }

    return rows.map(convert, remove_columns=rows.column_names, desc="Applying the templates")


def score_labelled_positions_only() -> None:
    """Lets TRL's LM head skip the prompt on a CPU, too: the same loss in about half the time.

    Where Triton is absent TRL scores every position, for the sake of compilers that need fixed shapes.
    """
    import trl.trainer.utils

    trl.trainer.utils._use_triton = lambda device: True


def check(
    model_args: ModelConfig, recipe: RecipeArguments, reflora_args: RefLoraArguments, lorasb_args: LoraSbArguments
) -> None:
    """Raises where settings are given that the method would not use."""
    if not model_args.use_peft:
        raise ValueError("This recipe trains LoRA adapters; leave use_peft true.")
    unused = {}
    if recipe.method not in ("reflora", "reflora_s"):
        unused |= non_default(reflora_args)
    if recipe.method != "lora_sb" and recipe.init != "lora_sb":
        unused |= non_default(lorasb_args)
    if recipe.method in NATIVE:
        ordinary = ("lora_alpha", "use_rslora", "use_dora", "lora_target_parameters")
        unused |= {name: value for name, value in non_default(model_args).items() if name in ordinary}
    if unused:
        raise ValueError(
            f"method is {recipe.method}, init {recipe.init}, but settings of others: {', '.join(unused)}."
        )


def peft_config(model_args: ModelConfig, recipe: RecipeArguments) -> PeftConfig:
    """TRL's LoraConfig, or a LoraSbConfig with the same settings."""
    config = get_peft_config(model_args)
    if recipe.method not in NATIVE:
        return config
    return LoraSbConfig(
        r=config.r,
        target_modules=config.target_modules,
        lorasb_dropout=config.lora_dropout,
        modules_to_save=config.modules_to_save,
        task_type=config.task_type,
        init_weights=recipe.method,
    )


def main(
    script_args: ScriptArguments,
    training_args: SFTConfig,
    model_args: ModelConfig,
    recipe: RecipeArguments,
    reflora_args: RefLoraArguments,
    lorasb_args: LoraSbArguments,
) -> None:
    start = time.monotonic()
    facts = environment(Path(__file__).parent)
    groups = (script_args, training_args, model_args, recipe, reflora_args, lorasb_args)
    given = {name: value for group in groups for name, value in non_default(group).items()}
    check(model_args, recipe, reflora_args, lorasb_args)
    evaluate_loss = training_args.eval_strategy != "no"

    train_rows = load_dataset(
        script_args.dataset_name, script_args.dataset_config, split=script_args.dataset_train_split
    )
    test_rows = None
    if evaluate_loss or recipe.score is not None:
        test_rows = load_dataset(
            script_args.dataset_name, script_args.dataset_config, split=script_args.dataset_test_split
        )
        test_rows = to_trl(test_rows, recipe)
        if recipe.score is not None and not {"prompt", "completion"} <= set(test_rows.column_names):
            raise ValueError(
                f"score needs rows with a prompt and a completion, found the columns {test_rows.column_names}. Give "
                "prompt_template and completion_template."
            )

    path = embedded_model.resolve(model_args.model_name_or_path)
    tokenizer = AutoTokenizer.from_pretrained(
        path, revision=model_args.model_revision, trust_remote_code=training_args.trust_remote_code
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    if training_args.device.type == "cpu":
        score_labelled_positions_only()
        shared = max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        torch.set_num_threads(recipe.cpu_threads or shared)  # accelerate launch sets OMP_NUM_THREADS=1
    lora_sb = lorasb_args.callback()
    model_name, dataset_name = model_args.model_name_or_path, script_args.dataset_name
    record = RunRecordCallback(
        init=recipe.init,
        model=model_name,
        base_model=hub_id(model_name),
        arguments=given,
        environment=facts,
        **{"dataset": dataset_name, "dataset_id": hub_id(dataset_name), **dataset_facts(train_rows)},
    )
    trainer_cls, settings = LoraSFTTrainer, {"callbacks": [record, *([lora_sb] if recipe.init == "lora_sb" else [])]}
    if recipe.method in ("reflora", "reflora_s"):
        trainer_cls, settings = RefLoraSFTTrainer, settings | {"reflora": reflora_args.callback(recipe.method)}
    elif recipe.method in NATIVE:
        trainer_cls, settings = LoraSbSFTTrainer, settings | {"lora_sb": lora_sb}
    trainer = trainer_cls(
        model=path,
        args=training_args,
        train_dataset=to_trl(train_rows, recipe),
        eval_dataset=test_rows if evaluate_loss else None,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args),
        peft_config=peft_config(model_args, recipe),
        **settings,
    )

    seconds = {}

    def evaluate(when: str) -> tuple[dict[str, float], list[str]]:
        """Scores and answers; "before" is the base model itself."""
        begin = time.monotonic()
        with trainer.model.disable_adapter() if when == "before" else nullcontext():
            scores = {"loss": trainer.evaluate()["eval_loss"]} if evaluate_loss else {}
            texts = []
            if recipe.score is not None:
                texts = evaluation.answers(
                    trainer.model,
                    tokenizer,
                    test_rows,
                    max_new_tokens=recipe.score_max_new_tokens,
                    batch_size=recipe.score_batch_size,
                    description=f"Answering held-out rows {when} training",
                )
                scores |= evaluation.SCORES[recipe.score](texts, references)
        seconds[when] = time.monotonic() - begin
        return scores, texts

    references = [evaluation.reference(row) for row in test_rows] if recipe.score is not None else []
    before, answers_before = evaluate("before")
    trainer.run_record.update(scores={"before": before})
    try:
        trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    except PushError as error:
        logger.error(error)  # everything is pushed once more below
    after, answers_after = evaluate("after")
    examples = []
    for i in range(min(EXAMPLES, len(references))):
        prompt = test_rows[i]["prompt"]
        examples.append(
            {
                "prompt": prompt if isinstance(prompt, str) else prompt[-1]["content"],
                "before": answers_before[i],
                "after": answers_after[i],
                "reference": references[i],
            }
        )
    earlier = sum(run.get("seconds", 0) for run in trainer.run_record.record["runs"][:-1])  # of a resumed run
    trainer.run_record.update(
        scores={"after": after}
        | ({"rows": len(test_rows), "split": script_args.dataset_test_split} if test_rows is not None else {}),
        examples=examples,
        seconds={name: round(value, 1) for name, value in seconds.items()}
        | {"total": round(earlier + time.monotonic() - start, 1)},
        peak_memory_gb=peak_memory_gb(),
    )
    trainer.save_model(_internal_call=True)  # without a push, which comes below with everything
    if trainer.is_world_process_zero():
        import report

        saved = trainer.run_record.record
        report.show(saved)
        print(f"Trained in {saved['seconds']['train']:.0f} s, {saved['seconds']['total']:.0f} s in all.")
        print(f"Adapter, model card, run record and plot: {training_args.output_dir}")
    if training_args.push_to_hub:
        commit = trainer.push_to_hub()
        if commit is not None:
            print(f"Pushed: {commit.commit_url}")
    trainer.end()


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
