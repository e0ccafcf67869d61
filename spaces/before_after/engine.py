"""Answers of a base model and of one of its adapters, side by side, from one model in memory.

Both sides appear together, in one of two ways. In turn: a token each, with the adapter disabled and with it; a side is
computed as it would be alone, to the bit. Mixed batch: both are rows of one batch (PEFT's `adapter_names`); the base's
row is what the base model makes of such a batch, to the bit, and differs from the base model alone by the rounding of
a batch. The first question to an adapter measures both ways on the device at hand; a mixed batch that is clearly
faster is taken.
"""

import dataclasses
import threading
import time
from collections.abc import Generator, Iterator
from typing import Any

import torch
from jinja2 import TemplateError
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, TopPLogitsWarper


PIECE = 128  # tokens of a prompt that are read at once, so that Stop need not wait for a long one
PROBE = 6  # tokens by which the two ways are compared
CLEARLY = 0.8  # of the time in turn: a mixed batch that saves less stays unused, lest noise decide at each start


class CannotAnswer(ValueError):
    """Something that a visitor can change; the message is for them."""


@dataclasses.dataclass
class Side:
    """One answer so far: its text and tokens, the seconds spent on it, and why it ended, if it has."""

    text: str = ""
    tokens: int = 0
    seconds: float = 0.0
    ended: str | None = None  # "end of text", "length"


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to answer.

    Attributes:
        max_new_tokens: Length limit of each answer.
        temperature: 0 takes the most likely token.
        top_p: Tokens are drawn from the smallest set with this probability.
        seed: Of the noise, which both sides share: they differ only where the models do.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if not 1 <= self.max_new_tokens <= 4096:
            raise CannotAnswer(f"The length limit must be between 1 and 4096 tokens, not {self.max_new_tokens}.")
        if not 0 <= self.temperature <= 5:
            raise CannotAnswer(f"The temperature must be between 0 and 5, not {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise CannotAnswer(f"top-p must be above 0 and at most 1, not {self.top_p}.")
        if not 0 <= self.seed < 2**63:
            raise CannotAnswer(f"The seed must be a whole number from 0 on, not {self.seed}.")


class Engine:
    """A base model with adapters by name; one visitor is answered at a time.

    Args:
        base: The base model's id on the Hub or its folder.
        adapters: Id or folder of each adapter, by the name that visitors see. They are ordinary LoRA adapters of this
            base model, which leave its own weights as they are.
        device: Default: the GPU, if there is one.

    Raises:
        ValueError: no adapter, one called `__base__`, or one of another kind.
    """

    def __init__(self, base: str, adapters: dict[str, str], device: str | None = None):
        if not adapters:
            raise ValueError("Give at least one adapter.")
        if "__base__" in adapters:
            raise ValueError("__base__ is PEFT's name for the base model: give the adapter another one.")
        configs = {name: PeftConfig.from_pretrained(source) for name, source in adapters.items()}
        for name, config in configs.items():
            _check(name, adapters[name], config)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = "auto" if device == "cuda" else torch.float32
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        # PEFT's own names: a visitor's may have dots, or be "lora".
        self._names = {name: f"adapter{i}" for i, name in enumerate(adapters)}
        # PEFT loads no adapter without new tokens after one that has them.
        for name in sorted(adapters, key=lambda name: configs[name].trainable_token_indices is not None):
            source, settings = adapters[name], {"adapter_name": self._names[name]}
            settings["torch_device"] = "cpu"  # where ZeroGPU starts, there is no GPU yet to load to
            if isinstance(model, PeftModel):
                model.load_adapter(source, **settings)
            else:
                model = PeftModel.from_pretrained(model, source, **settings)
        self.model = model.to(device).eval().requires_grad_(False)
        layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
        self._layers = {layer: set(layer._forward_pre_hooks) for layer in layers}
        self._mixed: dict[str, bool] = {}  # whether an adapter answers in a mixed batch
        eos = self.model.generation_config.eos_token_id
        self._ends = {*(eos if isinstance(eos, list) else [eos]), self.tokenizer.eos_token_id} - {None}
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self._context = context or self.tokenizer.model_max_length
        self._lock = threading.Lock()

    def compare(
        self, prompt: str, adapter: str, settings: Settings | None = None, system: str = ""
    ) -> Iterator[tuple[Side, Side]]:
        """Yields (base, adapted) after each token of both, until both have ended or the iterator is closed.

        Raises:
            CannotAnswer: see `prompt`.
        """
        settings = settings or Settings()
        ids = self.prompt(prompt, adapter, system)
        limit = min(settings.max_new_tokens, self._context - len(ids))
        with self._lock:
            self.model.set_adapter(self._names[adapter], inference_mode=True)
            if adapter not in self._mixed:
                self._mixed[adapter] = yield from self._mixed_batch_is_faster()
            noise = torch.Generator().manual_seed(settings.seed)
            passes = [_Pass(self, [False, True])] if self._mixed[adapter] else self._in_turn()
            while len(ids) > PIECE:
                for each in passes:
                    each.logits([ids[:PIECE]] * len(each.sides))
                    yield Side(), Side()
                ids = ids[PIECE:]
            runs = {False: _Run(self, ids, settings, limit), True: _Run(self, ids, settings, limit)}
            for _ in range(limit):
                luck = self._gumbel(noise) if settings.temperature > 0 else None
                for each in passes:
                    each.step({side: runs[side] for side in each.sides if runs[side].side.ended is None}, luck)
                yield tuple(dataclasses.replace(run.side) for run in runs.values())
                if all(run.side.ended for run in runs.values()):
                    return

    def _in_turn(self) -> list["_Pass"]:
        return [_Pass(self, [False]), _Pass(self, [True])]

    def _mixed_batch_is_faster(self) -> Generator[tuple[Side, Side], None, bool]:
        """Whether the active adapter may answer in a mixed batch, and saves time by it on this device; yields no text.

        False if PEFT has no mixed batch of it (DoRA, `target_parameters`), or if the base's row is not that of the
        base model alone in such a batch.
        """
        pristine, mixed, in_turn = _Pass(self, [False, False]), _Pass(self, [False, True]), self._in_turn()
        seconds: dict[bool, list[float]] = {False: [], True: []}
        tokens = [token % self._vocabulary for token in range(PROBE)]
        for _ in range(PROBE):
            begin = time.perf_counter()
            [after, _] = [each.logits([tokens])[0] for each in in_turn]
            seconds[False].append(time.perf_counter() - begin)
            begin = time.perf_counter()
            try:
                row, _ = mixed.logits([tokens, tokens])
            except Exception:  # ValueError, TypeError or KeyError, by the kind of adapter
                return False
            seconds[True].append(time.perf_counter() - begin)
            if not torch.equal(row, pristine.logits([tokens, tokens])[0]):
                return False
            tokens = [int(after.argmax())]
            yield Side(), Side()
        return min(seconds[True]) < CLEARLY * min(seconds[False])

    def prompt(self, prompt: str, adapter: str, system: str = "") -> list[int]:
        """The tokens that both sides go on from.

        Raises:
            CannotAnswer: for an unknown adapter, an empty prompt, or one that does not fit.
        """
        if adapter not in self._names:
            raise CannotAnswer(f"There is no adapter {adapter!r}; there are {', '.join(self._names)}.")
        if not prompt.strip():
            raise CannotAnswer("Type a prompt first.")
        # Half of a character that takes two, as JSON may have it, is no text.
        prompt, system = (text.encode("utf-8", "replace").decode() for text in (prompt, system))
        if self.tokenizer.chat_template is None:
            ids = self.tokenizer(f"{system}\n{prompt}" if system else prompt)["input_ids"]
            while ids[-1] in self._ends:  # some tokenizers put it there
                ids.pop()
        else:
            turns = [{"role": "system", "content": system}] if system else []
            turns.append({"role": "user", "content": prompt})
            try:
                template = self.tokenizer.apply_chat_template
                ids = template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
            except TemplateError:
                if not system:
                    raise
                raise CannotAnswer("This model takes no system prompt: leave it empty.") from None
        if len(ids) >= self._context:
            raise CannotAnswer(
                f"The prompt is {len(ids)} tokens long; the model takes {self._context - 1}. Shorten it."
            )
        return ids

    def _remove_hooks(self) -> None:
        """Those that PEFT leaves behind when a mixed batch fails; the next answer would take them for its own."""
        for layer, before in self._layers.items():
            for hook in set(layer._forward_pre_hooks) - before:
                del layer._forward_pre_hooks[hook]
                layer._forward_pre_hooks_with_kwargs.pop(hook, None)

    def _gumbel(self, generator: torch.Generator) -> torch.Tensor:
        """argmax(log p + Gumbel noise) is a draw from p; drawn on the CPU, so that it is the same on every device."""
        return -torch.empty(self._vocabulary).exponential_(generator=generator).log()

    @property
    def _vocabulary(self) -> int:
        return self.model.config.get_text_config().vocab_size


class _Pass:
    """Sides that go through the model together, with one cache: False is the base, True the adapter."""

    def __init__(self, engine: Engine, sides: list[bool]):
        self.engine, self.sides = engine, sides
        self._cache = DynamicCache(config=engine.model.config)

    def step(self, runs: dict[bool, "_Run"], luck: torch.Tensor | None) -> None:
        """The next token of each run; a side whose run is not there leaves the batch."""
        if not runs:
            return
        begin = time.perf_counter()
        if len(runs) < len(self.sides):
            rows = [row for row, side in enumerate(self.sides) if side in runs]
            self._cache.reorder_cache(torch.tensor(rows))  # batch_select_indices is not there for linear attention
            self.sides = list(runs)
        logits = self.logits([run.next for run in runs.values()])
        for run, row in zip(runs.values(), logits, strict=True):
            run.take(row, luck)
        seconds = time.perf_counter() - begin
        for run in runs.values():
            run.side.seconds += seconds

    @torch.inference_mode()
    def logits(self, tokens: list[list[int]]) -> torch.Tensor:
        """Of what follows the tokens of each side, (sides, vocabulary), float32 on the CPU."""
        engine, mixed = self.engine, {}
        if len(set(self.sides)) > 1:
            mixed["adapter_names"] = [engine.model.active_adapter if side else "__base__" for side in self.sides]
        for layer in engine._layers:  # what disable_adapter() does, without its bookkeeping at each token
            layer._disable_adapters = not any(self.sides)
        ids = torch.tensor(tokens, device=engine.model.device)
        try:
            output = engine.model(input_ids=ids, past_key_values=self._cache, logits_to_keep=1, **mixed)
        except BaseException:
            engine._remove_hooks()
            raise
        return output.logits[:, -1].float().cpu()


class _Run:
    """One side's answer as it grows."""

    def __init__(self, engine: Engine, ids: list[int], settings: Settings, limit: int):
        self.engine, self.settings, self.limit = engine, settings, limit
        self.side, self.next, self._made = Side(), ids, []

    def take(self, logits: torch.Tensor, luck: torch.Tensor | None) -> None:
        token = self._choose(logits, luck)
        if token in self.engine._ends:
            self.side.ended = "end of text"
            return
        self._made.append(token)
        self.next = [token]
        self.side.tokens = len(self._made)
        # The tokens of one character may come one by one.
        self.side.text = self.engine.tokenizer.decode(self._made, skip_special_tokens=True).rstrip("\ufffd")
        if len(self._made) == self.limit:
            self.side.ended = "length"

    def _choose(self, logits: torch.Tensor, luck: torch.Tensor | None) -> int:
        if luck is None:
            return int(logits.argmax())
        scores = logits[None] / self.settings.temperature
        if self.settings.top_p < 1:
            scores = TopPLogitsWarper(self.settings.top_p)(None, scores)
        return int((scores[0].log_softmax(-1) + luck).argmax())


def _check(name: str, source: str, config: PeftConfig) -> None:
    """Raises ValueError for an adapter that would change the base model's side, too, or whose own would be wrong."""
    kind = getattr(config.peft_type, "value", None)
    if kind != "LORA":
        raise ValueError(f"{name}: this page shows LoRA adapters, {source} is {kind}. Export it to a LoRA.")
    if config.init_lora_weights not in (True, False, "gaussian", "orthogonal", "eva"):
        raise ValueError(
            f"{name}: {source} changes the base model where it is loaded (init_lora_weights="
            f"{config.init_lora_weights!r}). Save it with path_initial_model_for_weight_conversion, as PEFT's "
            "save_pretrained says, and it is an ordinary LoRA."
        )
    others = {"bias": config.bias != "none", "layer_replication": config.layer_replication}
    others["alora_invocation_tokens"] = config.alora_invocation_tokens
    for setting, there in others.items():
        if there:
            raise ValueError(f"{name}: this page can't show adapters with {setting}, and {source} has it.")


def settings_of(**values: Any) -> Settings:
    """Settings from a page's fields, whose numbers may be floats.

    Raises:
        CannotAnswer: for a value that is no number or out of range.
    """
    kinds, numbers = {"max_new_tokens": int, "temperature": float, "top_p": float, "seed": int}, {}
    for name, kind in kinds.items():
        try:
            numbers[name] = kind(values[name])
        except (TypeError, ValueError, OverflowError):
            what = {int: "whole number", float: "number"}[kind]
            raise CannotAnswer(f"{name} must be a {what}, not {values[name]!r}.") from None
    return Settings(**numbers)
