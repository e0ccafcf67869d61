"""What the recipes have in common: loading, the run record, the trainer, evaluations before and after the training."""

import logging
import os
import sys
import time
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Trainer
from trl import get_quantization_config

from ..distributed.parameters import has_sharded_parameters, is_zero3_partitioned
from ..hub.retry import PushError
from ..lora_sb.initialize import LossFunction
from ..reflora.settings import METHODS as REFLORA_METHODS
from ..report.environment import environment, peak_memory_gb, redacted, usable_cores
from ..report.ids import hub_id
from ..report.methods import METHODS
from ..report.recorder import RunRecordCallback, dataset_facts
from ..terminal import replace_unencodable_letters
from . import embedded_model, optimizers, shipped, starts, summary
from .options import BenchmarkArguments, Options
from .rows import load_rows
from .scores import Scorer


if TYPE_CHECKING:
    from .benchmarks import Benchmarks


logger = logging.getLogger(__name__)


class Run:
    """One run of a recipe: its options, the rows it trains on and the record of it.

    A recipe makes a `Run`, prepares its data, asks for the trainer with `make_trainer` and trains with `train`.
    """

    def __init__(self, options: Options):
        self.start = time.monotonic()
        self.options = options
        replace_unencodable_letters()
        if options.model.model_name_or_path is None:
            raise ValueError("model_name_or_path is missing: an id on the Hub or a folder.")
        self.benchmarks = self._make_benchmarks()
        self.train_rows = load_rows(options.script, options.script.dataset_train_split)
        self.record = self._begin_record()
        self._use_cores()

    def load_test_rows(self) -> Dataset:
        recipe, script = self.options.recipe, self.options.script
        return load_rows(
            script, script.dataset_test_split, name=recipe.test_dataset_name, config=recipe.test_dataset_config
        )

    @property
    def evaluates_loss(self) -> bool:
        """Whether the trainer evaluates the test split, and so does the run before and after training."""
        return self.options.training.eval_strategy != "no"

    @cached_property
    def model_path(self) -> str:
        """The model's id or folder; the embedded model is converted when this is first asked for."""
        return embedded_model.resolve(self.options.model.model_name_or_path)

    def load_tokenizer(self, **options: Any) -> PreTrainedTokenizerBase:
        revision = self.options.model.model_revision
        tokenizer = AutoTokenizer.from_pretrained(self.model_path, revision=revision, **options)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def model_init_kwargs(self) -> dict[str, Any]:
        """What `from_pretrained` is given to load the model."""
        model = self.options.model
        return {
            "revision": model.model_revision,
            "attn_implementation": model.attn_implementation,
            "dtype": model.dtype,
        }

    def trl_arguments(self) -> dict[str, Any]:
        """What TRL's trainers are given for the model, its tokenizer and its adapter."""
        training = self.options.training
        training.model_init_kwargs = self.model_init_kwargs() | (training.model_init_kwargs or {})
        return {
            "model": self.model_path,
            "processing_class": self.load_tokenizer(trust_remote_code=training.trust_remote_code),
            "quantization_config": get_quantization_config(self.options.model),
            "peft_config": self.options.peft_config(),
        }

    def make_trainer(
        self, plain: type[Trainer], reflora: type[Trainer], *, forward_fn: LossFunction | None = None, **arguments: Any
    ) -> Trainer:
        """`plain(**arguments)` or, for RefLoRA, `reflora(**arguments)`, with the callbacks of the method and start.

        Args:
            plain: The trainer of LoRA and LoRA-SB, with `AdapterTrainerMixin`.
            reflora: The trainer of RefLoRA.
            forward_fn: See `LoraSbCallback`. Default: the loss that the model computes itself.
            arguments: What both trainers take besides `args` and `callbacks`.

        Raises:
            ValueError: if LoRA-SB's initialization could not work, see `LoraSbCallback`; or PEFT's, or its optimizer,
                see `hf_reflora.recipes.starts` and `hf_reflora.recipes.optimizers`.
        """
        options = self.options
        callbacks = [self.record]
        lora_sb = None
        if options.starts_from_gradient or METHODS[options.recipe.method].native:
            lora_sb = options.lora_sb.callback()
            lora_sb.forward_fn = forward_fn
            callbacks.append(lora_sb)
        arguments |= {"args": options.training, "callbacks": callbacks}
        init = options.recipe.init
        if starts.changes_base(init):
            plain, reflora = starts.converting(plain), starts.converting(reflora)
        if options.recipe.method in REFLORA_METHODS:
            trainer = reflora(reflora=options.reflora.callback(options.recipe.method), **arguments)
        else:
            trainer = plain(**arguments)
        if lora_sb is not None:
            lora_sb.check(trainer.args, trainer.model)
        if starts.is_name(init) and init not in starts.RANDOM:
            starts.apply_start(trainer, init, options.recipe.init_samples)
        if options.recipe.optimizer in optimizers.OF_PEFT:
            # After the start, which may replace A and B. A Trainer makes no other optimizer where it has one.
            trainer.optimizer = optimizers.make_optimizer(trainer.model, trainer.args, options.recipe)
        return trainer

    def train(self, trainer: Trainer, *, test_rows: Dataset | None = None, scorer: Scorer | None = None) -> None:
        """Trains between two evaluations of the held-out rows, then saves, shows and pushes the adapter.

        A resumed run (`resume_from_checkpoint: true` takes the last complete checkpoint) ends with the record that an
        unbroken run has.

        Args:
            trainer: Made by `make_trainer`; its `eval_dataset` is evaluated, if it has one.
            test_rows: The held-out rows, for the record.
            scorer: Computes scores besides the trainer's own.
        """
        seconds = {}

        def evaluate(when: str) -> None:
            begin = time.monotonic()
            # Before training, the base model itself is evaluated. Where a start has been subtracted from its weights,
            # it takes the untrained adapter to compute what the base model does.
            with_adapter = when == "after" or starts.changes_base(self.options.recipe.init)
            with nullcontext() if with_adapter else trainer.model.disable_adapter():
                scores = {"loss": trainer.evaluate()["eval_loss"]} if trainer.eval_dataset is not None else {}
                scores |= scorer.score(trainer.model, trainer.processing_class, when) if scorer is not None else {}
                if self.benchmarks is not None:
                    self.benchmarks.evaluate(trainer.model, trainer.processing_class, when)
            trainer.run_record.update(scores={when: scores})
            seconds[when] = round(time.monotonic() - begin, 1)

        if self.benchmarks is not None and (trainer.is_fsdp_enabled or has_sharded_parameters(trainer.model)):
            raise ValueError(
                "benchmarks needs the complete model in each process, which FSDP and ZeRO-3 shard. Leave it out and "
                f"evaluate the adapter after training: hf-reflora eval {trainer.args.output_dir} --tasks …"
            )
        # Under ZeRO-3 each process has only a part of the base model, which DeepSpeed gathers for a computation only
        # after training has begun. There the base model is evaluated after training, with the adapter disabled.
        late = any(is_zero3_partitioned(parameter) for parameter in trainer.model.parameters())
        if not late:
            evaluate("before")
        optimizers.freeze_unused(trainer.model, self.options.recipe.optimizer)
        try:
            trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
        except PushError as error:
            logger.error(error)  # everything is pushed once more below
        evaluate("after")
        if late:
            evaluate("before")
        if test_rows is not None:
            split = self.options.script.dataset_test_split
            trainer.run_record.update(scores={"rows": len(test_rows), "split": split})
        if self.benchmarks is not None:
            trainer.run_record.update(benchmarks=self.benchmarks.entries())
        trainer.run_record.update(examples=scorer.examples() if scorer is not None else [])
        self._finish(trainer, seconds)

    def _finish(self, trainer: Trainer, seconds: dict[str, float]) -> None:
        """Completes the record; saves, shows and pushes."""
        earlier = sum(run.get("seconds", 0) for run in trainer.run_record.record.runs[:-1])  # if it was resumed
        total = round(earlier + time.monotonic() - self.start, 1)
        trainer.run_record.update(seconds=seconds | {"total": total}, peak_memory_gb=peak_memory_gb())
        trainer.save_model(_internal_call=True)  # transformers' way to save without a push
        if trainer.is_world_process_zero():
            record = trainer.run_record.record
            summary.show(record)
            print(f"Trained in {record.seconds['train']:.0f} s, {record.seconds['total']:.0f} s in all.")
            print(f"Adapter, model card, run record and plot: {trainer.args.output_dir}")
        if trainer.args.push_to_hub:
            commit = trainer.push_to_hub()
            if commit is not None:
                print(f"Pushed: {commit.commit_url}")
        trainer.accelerator.end_training()

    def _make_benchmarks(self) -> "Benchmarks | None":
        """What lm-eval evaluates before and after training, if the options name something."""
        recipe = self.options.recipe
        if not isinstance(recipe, BenchmarkArguments) or not recipe.benchmarks:
            return None
        from .benchmarks import Benchmarks  # lm-eval is an extra of its own

        return Benchmarks(
            recipe.benchmarks,
            limit=recipe.benchmark_limit,
            num_fewshot=recipe.benchmark_num_fewshot,
            batch_size=recipe.benchmark_batch_size,
            seed=self.options.training.seed,
            include_path=recipe.benchmark_include_path,
        )

    def _begin_record(self) -> RunRecordCallback:
        """The run record with what a trainer does not know."""
        options = self.options
        model_name, dataset_name = options.model.model_name_or_path, options.script.dataset_name
        return RunRecordCallback(
            init=options.recipe.init,
            model=model_name,
            base_model=hub_id(model_name),
            arguments=options.given(),
            environment=_environment(),
            **{"dataset": dataset_name, "dataset_id": hub_id(dataset_name), **dataset_facts(self.train_rows)},
        )

    def _use_cores(self) -> None:
        """On a CPU, gives each process its share of the machine's cores."""
        if self.options.training.device.type == "cpu":
            share = max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
            # accelerate launch sets OMP_NUM_THREADS=1, with which one process would use one core of many.
            torch.set_num_threads(self.options.recipe.cpu_threads or share)


def _environment() -> dict[str, Any]:
    """The facts of `environment`, with the commit of the clone that this file is part of."""
    facts = environment(Path(__file__).parent)
    if shipped.IS_INSTALLED:
        # An installed package has no commit. git would report that of a repository in which the virtual environment
        # happens to lie.
        facts = {name: value for name, value in facts.items() if name not in ("commit", "uncommitted_changes")}
    module = getattr(sys.modules["__main__"], "__spec__", None)  # None in a script
    if module is not None and module.name.startswith(f"{__package__}."):
        # Started as `-m hf_reflora.recipes.sft`: sys.argv has the path of the module on this machine.
        facts["command"] = ["-m", module.name, *redacted(sys.argv[1:])]
    return facts
