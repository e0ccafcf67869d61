"""Answers of a base model and of one of its adapters, side by side, from one model in memory.

Both sides decode in turn, a token each: with the adapter disabled, and with it. So each side is computed as it would
be alone, to the bit, and both appear together. (A mixed batch, PEFT's `adapter_names`, may be faster, but promises no
such equality, is not for DoRA, and leaves hooks in the model when it fails.)
"""

import dataclasses
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, TopPLogitsWarper


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
            base model.
        device: Default: the GPU, if there is one.

    Raises:
        ValueError: no adapter, or one of another kind.
    """

    def __init__(self, base: str, adapters: dict[str, str], device: str | None = None):
        if not adapters:
            raise ValueError("Give at least one adapter.")
        for name, source in adapters.items():
            kind = getattr(PeftConfig.from_pretrained(source).peft_type, "value", None)
            if kind != "LORA":
                raise ValueError(f"{name}: this page shows LoRA adapters, {source} is {kind}. Export it to a LoRA.")
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = "auto" if self.device == "cuda" else torch.float32
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).to(self.device)
        # PEFT's own names: a visitor's may have dots, or be "lora" or "__base__".
        self._names = {name: f"adapter{i}" for i, name in enumerate(adapters)}
        for name, source in adapters.items():
            if isinstance(model, PeftModel):
                model.load_adapter(source, self._names[name])
            else:
                model = PeftModel.from_pretrained(model, source, self._names[name])
        self.model = model.eval().requires_grad_(False)
        self._layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
        eos = self.model.generation_config.eos_token_id
        self._ends = {*(eos if isinstance(eos, list) else [eos]), self.tokenizer.eos_token_id} - {None}
        self._context = self.model.config.get_text_config().max_position_embeddings
        self._lock = threading.Lock()

    def compare(
        self, prompt: str, adapter: str, settings: Settings | None = None, system: str = ""
    ) -> Iterator[tuple[Side, Side]]:
        """Yields (base, adapted) after each token of both, until both have ended or the iterator is closed.

        Raises:
            CannotAnswer: for an unknown adapter, an empty prompt, or one that does not fit.
        """
        settings = settings or Settings()
        if adapter not in self._names:
            raise CannotAnswer(f"There is no adapter {adapter!r}; there are {', '.join(self._names)}.")
        ids = self._prompt(prompt, system)
        room = self._context - len(ids)
        if room < 1:
            raise CannotAnswer(
                f"The prompt is {len(ids)} tokens long; the model takes {self._context - 1}. Shorten it."
            )
        limit = min(settings.max_new_tokens, room)
        with self._lock:
            noise = torch.Generator().manual_seed(settings.seed)
            self.model.set_adapter(self._names[adapter], inference_mode=True)
            runs = [_Run(self, ids, adapted=False), _Run(self, ids, adapted=True)]
            for _ in range(limit):
                luck = self._gumbel(noise) if settings.temperature > 0 else None
                for run in runs:
                    if run.side.ended is None:
                        run.step(luck, settings, limit)
                yield tuple(dataclasses.replace(run.side) for run in runs)
                if all(run.side.ended for run in runs):
                    return

    def _prompt(self, prompt: str, system: str) -> list[int]:
        if not prompt.strip():
            raise CannotAnswer("Type a prompt first.")
        if self.tokenizer.chat_template is None:
            return self.tokenizer(f"{system}\n{prompt}" if system else prompt)["input_ids"]
        turns = [{"role": "system", "content": system}] if system else []
        turns.append({"role": "user", "content": prompt})
        return self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]

    def _gumbel(self, generator: torch.Generator) -> torch.Tensor:
        """argmax(log p + Gumbel noise) is a draw from p; drawn on the CPU, so that it is the same on every device."""
        size = self.model.config.get_text_config().vocab_size
        return -torch.empty(size).exponential_(generator=generator).log()


class _Run:
    """One side of a comparison, with its own cache."""

    def __init__(self, engine: Engine, ids: list[int], adapted: bool):
        self.engine, self.adapted = engine, adapted
        self.side = Side()
        self._next, self._cache, self._made = torch.tensor([ids]), DynamicCache(), []

    @torch.inference_mode()
    def step(self, luck: torch.Tensor | None, settings: Settings, limit: int) -> None:
        begin, engine = time.perf_counter(), self.engine
        token = self._choose(self._logits(), luck, settings)
        self.side.seconds += time.perf_counter() - begin
        if token in engine._ends:
            self.side.ended = "end of text"
            return
        self._made.append(token)
        self._next = torch.tensor([[token]])
        self.side.tokens = len(self._made)
        # The tokens of one character may come one by one.
        self.side.text = engine.tokenizer.decode(self._made, skip_special_tokens=True).rstrip("\ufffd")
        if len(self._made) == limit:
            self.side.ended = "length"

    def _logits(self) -> torch.Tensor:
        model = self.engine.model
        inputs = {"input_ids": self._next.to(self.engine.device), "past_key_values": self._cache, "logits_to_keep": 1}
        for layer in self.engine._layers:  # what disable_adapter() does, without its bookkeeping at each token
            layer._disable_adapters = not self.adapted
        return model(**inputs).logits[0, -1].float().cpu()

    def _choose(self, logits: torch.Tensor, luck: torch.Tensor | None, settings: Settings) -> int:
        if luck is None:
            return int(logits.argmax())
        scores = logits[None] / settings.temperature
        if settings.top_p < 1:
            scores = TopPLogitsWarper(settings.top_p)(None, scores)
        return int((scores[0].log_softmax(-1) + luck).argmax())


def settings_of(**values: Any) -> Settings:
    """Settings from a page's fields, whose numbers may be floats."""
    whole = {name: int(values[name]) for name in ("max_new_tokens", "seed")}
    return Settings(**whole, temperature=float(values["temperature"]), top_p=float(values["top_p"]))
