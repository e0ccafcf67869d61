"""Answers a prompt with a base model and with one of its LoRA adapters, from one model in memory.

Both answers grow together, a token at a time, in one of two ways:

- In turn: for each token the model runs twice, with the adapter disabled and with it enabled. Each answer is
  bit-identical to what its model generates alone.
- Mixed batch: for each token the model runs once, with both sides as rows of one batch (PEFT's `adapter_names`). The
  base's row is bit-identical to a row of the base model in a batch of two, which may be rounded differently than the
  base model alone.

`measure` compares both ways on this device for each adapter, and a mixed batch is used where it is clearly faster.
Without it the first question to an adapter waits for that.
"""

import contextlib
import dataclasses
import enum
import threading
import time
from collections.abc import Generator, Iterator
from typing import Any

import torch
from adapter_check import trained_elsewhere
from chat import CannotAnswer, Chat
from loading import load_adapters, load_base, load_configs
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from transformers import AutoTokenizer, DynamicCache, TopPLogitsWarper


PROMPT_CHUNK = 128  # tokens of a prompt that the model reads at once; between chunks a visitor may stop it
MEASURED_TOKENS = 6  # generated in both ways to compare their speeds
# Of the time in turn. A smaller gain could be noise, which would choose another way at each start.
CLEARLY_FASTER = 0.8


class Side(enum.Enum):
    """Who answers: the base model alone, or the base model with the adapter."""

    BASE = "base"
    ADAPTER = "adapter"


@dataclasses.dataclass
class Answer:
    """One side's answer so far.

    Attributes:
        text: The text of its tokens.
        tokens: Number of tokens.
        first_token_seconds: Time for reading the prompt and choosing the first token.
        seconds: Time for the tokens after the first one. A mixed batch counts for both sides, here and above.
        ended: Why it has ended, "end of text" or "length"; None while it grows.
    """

    text: str = ""
    tokens: int = 0
    first_token_seconds: float = 0.0
    seconds: float = 0.0
    ended: str | None = None

    @property
    def tokens_per_second(self) -> float | None:
        """The speed of decoding; None until there is a second token."""
        return (self.tokens - 1) / self.seconds if self.tokens > 1 else None


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to answer.

    Attributes:
        max_new_tokens: Length limit of each answer, 1 to 4096.
        temperature: 0 to 5; at 0 the most likely token is taken.
        top_p: Tokens are drawn from the smallest set that has this probability, above 0 and up to 1.
        seed: Seed of the noise, from 0 on. Both sides share the noise, so that they differ only where the models do.

    Raises:
        CannotAnswer: for a value out of range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        # Written so that NaN, which compares as False, is refused.
        if not 1 <= self.max_new_tokens <= 4096:
            raise CannotAnswer(f"The length limit must be between 1 and 4096 tokens, not {self.max_new_tokens}.")
        if not 0 <= self.temperature <= 5:
            raise CannotAnswer(f"The temperature must be between 0 and 5, not {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise CannotAnswer(f"top-p must be above 0 and at most 1, not {self.top_p}.")
        if not 0 <= self.seed < 2**63:
            raise CannotAnswer(f"The seed must be a whole number from 0 on, not {self.seed}.")


class Engine:
    """A base model with its adapters, which answers one visitor at a time.

    Args:
        base: The base model's id on the Hub, or its folder.
        adapters: Id or folder of each adapter, by the name that visitors see. They must be ordinary LoRA adapters of
            this base model that leave its own weights as they are.
        device: Default: the GPU if there is one, otherwise the CPU.
        dtype: Of the base model: "float32", "bfloat16", "float16", or "auto" for that of its weights. Default: "auto"
            on a GPU and "float32" on a CPU, as CPUs are slow in 16 bits.

    Attributes:
        notes: Sentences for the page on each adapter, by its name, such as that it was trained from another model.

    Raises:
        ValueError: if there is no adapter, one is called `__base__`, is of another kind or does not fit the base
            model, or the base model cannot be loaded.
    """

    def __init__(self, base: str, adapters: dict[str, str], device: str | None = None, dtype: str | None = None):
        if not adapters:
            raise ValueError("Give at least one adapter.")
        if "__base__" in adapters:
            raise ValueError("__base__ is PEFT's name for the base model: give the adapter another one.")
        configs = load_configs(adapters)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = load_base(base, dtype or ("auto" if device == "cuda" else "float32"))
        # PEFT gets names of our own: it fails on names with dots and mistakes "lora" for a part of its layers' names.
        self._peft_names = {name: f"adapter{i}" for i, name in enumerate(adapters)}
        loaded = load_adapters(model, adapters, configs, self._peft_names)
        model, self._head = loaded.model, loaded.head
        # They differ only where tokens were added for the training.
        self._vocabulary = {Side.BASE: loaded.vocabulary, Side.ADAPTER: loaded.trained_vocabulary}
        self.model = model.to(device).eval().requires_grad_(False)
        layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
        # The layers that PEFT has put into the model, each with the hooks that belong there: see `_remove_hooks`.
        self._layers = {layer: set(layer._forward_pre_hooks) for layer in layers}
        self._uses_mixed_batch: dict[str, bool] = {}  # by adapter, once it is measured
        tokenizer = AutoTokenizer.from_pretrained(base)
        eos = self.model.generation_config.eos_token_id
        ends = {*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id} - {None}
        self._chats = {
            name: Chat(source, tokenizer, ends, max(self._vocabulary.values())) for name, source in adapters.items()
        }
        self.notes = {name: list(chat.notes) for name, chat in self._chats.items()}
        for name, config in configs.items():
            if (added := loaded.trained_vocabulary - loaded.vocabulary) > 0:
                self.notes[name].append(
                    f"The adapter was trained with {added} tokens that the base model does not have. The base model "
                    "reads them as they were before the training, and cannot write them."
                )
            if trained_from := trained_elsewhere(base, config):
                self.notes[name].append(f"The adapter was trained from {trained_from}, and is shown with {base}.")
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self._context_length = context or tokenizer.model_max_length
        # PEFT keeps the active adapter, and the rows of a mixed batch, in the layers themselves: two visitors at the
        # same time would get each other's adapter.
        self._lock = threading.Lock()

    def compare(
        self, prompt: str, adapter: str, settings: Settings | None = None, system: str = ""
    ) -> Iterator[tuple[Answer, Answer]]:
        """Yields the base's and the adapter's answer after each token, until both have ended.

        Closing the iterator stops the generation and lets the next visitor in.

        Raises:
            CannotAnswer: see `encode_prompt`.
        """
        settings = settings or Settings()
        ids = self.encode_prompt(prompt, adapter, system)
        limit = min(settings.max_new_tokens, self._context_length - len(ids))
        with self._lock:
            yield from self._choose_way(adapter)
            generator = torch.Generator().manual_seed(settings.seed)
            batches = [_Batch(self, [Side.BASE, Side.ADAPTER])] if self._uses_mixed_batch[adapter] else self._in_turn()
            writers = {side: _Writer(self._chats[adapter], settings, limit) for side in Side}
            while len(ids) > PROMPT_CHUNK:
                for batch in batches:
                    batch.read(ids[:PROMPT_CHUNK], writers)
                    yield self._answers(writers)
                ids = ids[PROMPT_CHUNK:]
            for writer in writers.values():
                writer.next_tokens = ids
            for _ in range(limit):
                noise = self._gumbel(generator) if settings.temperature > 0 else None
                for batch in batches:
                    batch.step({side: writers[side] for side in batch.sides if not writers[side].answer.ended}, noise)
                yield self._answers(writers)
                if all(writer.answer.ended for writer in writers.values()):
                    return

    def measure(self) -> None:
        """Measures both ways for each adapter, so that no visitor waits for it. ZeroGPU has no GPU at the start."""
        with self._lock:
            for adapter in self._peft_names:
                for _ in self._choose_way(adapter):
                    pass

    def _choose_way(self, adapter: str) -> Iterator[tuple[Answer, Answer]]:
        """Makes the adapter the active one, and measures both ways with it if that was not done yet."""
        self.model.set_adapter(self._peft_names[adapter], inference_mode=True)
        if adapter not in self._uses_mixed_batch:
            self._uses_mixed_batch[adapter] = yield from self._mixed_batch_is_faster()

    def _answers(self, writers: dict[Side, "_Writer"]) -> tuple[Answer, Answer]:
        """Copies, as the answers go on."""
        return dataclasses.replace(writers[Side.BASE].answer), dataclasses.replace(writers[Side.ADAPTER].answer)

    def _in_turn(self) -> list["_Batch"]:
        return [_Batch(self, [Side.BASE]), _Batch(self, [Side.ADAPTER])]

    def _mixed_batch_is_faster(self) -> Generator[tuple[Answer, Answer], None, bool]:
        """Whether a mixed batch with the active adapter is right and, on this device, saves time; yields no text.

        It is not right if PEFT has no mixed batch for this adapter (DoRA, `target_parameters`), or if the base's row
        is not that of the base model in a batch of two.
        """
        two_base_rows, mixed = _Batch(self, [Side.BASE, Side.BASE]), _Batch(self, [Side.BASE, Side.ADAPTER])
        in_turn = self._in_turn()
        seconds_mixed, seconds_in_turn = [], []
        tokens = [token % min(self._vocabulary.values()) for token in range(MEASURED_TOKENS)]
        for _ in range(MEASURED_TOKENS):
            begin = time.perf_counter()
            [base_row, _] = [batch.logits([tokens])[0] for batch in in_turn]
            seconds_in_turn.append(time.perf_counter() - begin)
            begin = time.perf_counter()
            try:
                mixed_row, _ = mixed.logits([tokens, tokens])
            except Exception:  # a ValueError, TypeError or KeyError, depending on the kind of adapter
                return False
            seconds_mixed.append(time.perf_counter() - begin)
            if not torch.equal(mixed_row, two_base_rows.logits([tokens, tokens])[0]):
                return False
            tokens = [int(base_row.argmax())]
            yield Answer(), Answer()
        # The shortest times, since whatever else runs on the machine only adds to them.
        return min(seconds_mixed) < CLEARLY_FASTER * min(seconds_in_turn)

    def encode_prompt(self, prompt: str, adapter: str, system: str = "") -> list[int]:
        """The tokens after which both sides continue: see `Chat`.

        Raises:
            CannotAnswer: for an unknown adapter, an empty prompt, one that does not fit into the model's context, or a
                system prompt that the model does not take.
        """
        if adapter not in self._peft_names:
            raise CannotAnswer(f"There is no adapter {adapter!r}; there are {', '.join(self._peft_names)}.")
        if not prompt.strip():
            raise CannotAnswer("Type a prompt first.")
        # JSON may have half of a character that takes two (a surrogate), on which tokenizers fail.
        prompt, system = (text.encode("utf-8", "replace").decode() for text in (prompt, system))
        ids = self._chats[adapter].encode(prompt, system)
        if len(ids) >= self._context_length:
            raise CannotAnswer(
                f"The prompt is {len(ids)} tokens long; the model takes {self._context_length - 1}. Shorten it."
            )
        return ids

    def _remove_hooks(self) -> None:
        """Removes the hooks of a mixed batch that failed.

        PEFT removes them only after a success (huggingface/peft issue 3475); the next answer would use them.
        """
        for layer, hooks_before in self._layers.items():
            for hook in set(layer._forward_pre_hooks) - hooks_before:
                del layer._forward_pre_hooks[hook]
                layer._forward_pre_hooks_with_kwargs.pop(hook, None)

    def _gumbel(self, generator: torch.Generator) -> torch.Tensor:
        """Gumbel noise (vocabulary,): argmax(log p + noise) is a draw from p.

        It is drawn on the CPU, so that a seed gives the same noise on every device, and from a generator of its own,
        so that no other visitor changes it.
        """
        return -torch.empty(max(self._vocabulary.values())).exponential_(generator=generator).log()

    @contextlib.contextmanager
    def _rows_of_the_head(self, rows: int):
        """Only as many rows of the last layer are used: the base model's side must be what it is without new tokens.

        To leave out the others afterwards is not enough, as a layer of another size may be rounded differently.
        """
        if rows == max(self._vocabulary.values()):
            yield
            return
        weight = self._head._parameters["weight"]
        self._head._parameters["weight"] = weight.detach()[:rows]
        try:
            yield
        finally:
            self._head._parameters["weight"] = weight


class _Batch:
    """The sides that go through the model together, as rows of one batch with one cache."""

    def __init__(self, engine: Engine, sides: list[Side]):
        self.engine, self.sides = engine, sides
        self._cache = DynamicCache(config=engine.model.config)

    def read(self, tokens: list[int], writers: dict[Side, "_Writer"]) -> None:
        """Reads a piece of the prompt, which is not its end."""
        begin = time.perf_counter()
        self.logits([tokens] * len(self.sides))
        seconds = time.perf_counter() - begin
        for side in self.sides:
            writers[side].answer.first_token_seconds += seconds

    def step(self, writers: dict[Side, "_Writer"], noise: torch.Tensor | None) -> None:
        """Adds the next token to each side's answer. A side that is not in `writers` leaves the batch."""
        if not writers:
            return
        begin = time.perf_counter()
        if len(writers) < len(self.sides):
            rows = [row for row, side in enumerate(self.sides) if side in writers]
            # DynamicCache.batch_select_indices would say it better, but linear attention's caches lack it.
            self._cache.reorder_cache(torch.tensor(rows))
            self.sides = list(writers)
        logits = self.logits([writer.next_tokens for writer in writers.values()])
        are_first = {side: not writer.answer.tokens for side, writer in writers.items()}
        for writer, row in zip(writers.values(), logits, strict=True):
            writer.add_token(row, noise)
        seconds = time.perf_counter() - begin
        for side, writer in writers.items():
            if are_first[side]:
                writer.answer.first_token_seconds += seconds
            elif writer.answer.ended != "end of text":  # which is a token that the answer does not count
                writer.answer.seconds += seconds

    @torch.inference_mode()
    def logits(
        self,
        tokens: list[list[int]],  # the new tokens of each side, equally many
    ) -> list[torch.Tensor]:  # of each side: (vocabulary,), float32, on the CPU
        """The logits of what follows each side's tokens."""
        engine, mixed = self.engine, {}
        if len(set(self.sides)) > 1:
            names = {Side.BASE: "__base__", Side.ADAPTER: engine.model.active_adapter}
            mixed["adapter_names"] = [names[side] for side in self.sides]
        # What disable_adapter() does, which takes longer: it goes through the whole model at each token. In a mixed
        # batch the adapter must be enabled, or PEFT ignores adapter_names.
        for layer in engine._layers:
            layer._disable_adapters = Side.ADAPTER not in self.sides
        ids = torch.tensor(tokens, device=engine.model.device)
        try:
            with engine._rows_of_the_head(max(engine._vocabulary[side] for side in self.sides)):
                output = engine.model(input_ids=ids, past_key_values=self._cache, logits_to_keep=1, **mixed)
        except BaseException:
            engine._remove_hooks()
            raise
        logits = output.logits[:, -1].float().cpu()
        return [row[: engine._vocabulary[side]] for side, row in zip(self.sides, logits, strict=True)]


class _Writer:
    """Chooses the tokens of one side's answer."""

    def __init__(self, chat: Chat, settings: Settings, limit: int):
        self.chat, self.settings, self.limit = chat, settings, limit
        self.answer = Answer()
        self.next_tokens: list[int] = []  # that the model has not read yet
        self._answer_ids: list[int] = []

    def add_token(
        self,
        logits: torch.Tensor,  # (vocabulary,)
        noise: torch.Tensor | None,  # (vocabulary,) or longer; None takes the most likely token
    ) -> None:
        token = self._choose(logits, noise)
        if token in self.chat.end_tokens:
            self.answer.ended = "end of text"
            return
        self._answer_ids.append(token)
        self.next_tokens = [token]
        self.answer.tokens = len(self._answer_ids)
        # All of them each time, as several may make one character.
        self.answer.text = self.chat.decode(self._answer_ids)
        if len(self._answer_ids) == self.limit:
            self.answer.ended = "length"

    def _choose(self, logits: torch.Tensor, noise: torch.Tensor | None) -> int:
        if noise is None:
            return int(logits.argmax())
        scores = logits[None] / self.settings.temperature
        if self.settings.top_p < 1:
            scores = TopPLogitsWarper(self.settings.top_p)(None, scores)
        return int((scores[0].log_softmax(-1) + noise[: len(logits)]).argmax())


def settings_of(**values: Any) -> Settings:
    """Settings from the fields of a page or the variables of an environment: whole numbers may be floats or text.

    Raises:
        CannotAnswer: for a value that is no number or out of range.
    """
    types, numbers = {"max_new_tokens": int, "temperature": float, "top_p": float, "seed": int}, {}
    for name, number_type in types.items():
        try:
            numbers[name] = number_type(values[name])
        except (TypeError, ValueError, OverflowError):
            what = {int: "whole number", float: "number"}[number_type]
            raise CannotAnswer(f"{name} must be a {what}, not {values[name]!r}.") from None
    return Settings(**numbers)
