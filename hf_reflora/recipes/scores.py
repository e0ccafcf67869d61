"""Held-out rows are answered greedily by a model, and the answers are scored."""

import json
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from torch.utils.hooks import RemovableHandle
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from ..distributed.parameters import has_sharded_parameters
from .shared_prefix import after_prefix, common_beginning, read_prefix


EXAMPLES = 5  # rows, the first ones, whose answers the record shows


class Scorer:
    """Answers held-out rows before and after training and scores the answers.

    All rows are answered both times. An answer that can no longer score anything is not written to its end, except for
    the first `EXAMPLES` rows, whose answers are shown: the demo's base model never stops by itself, and no answer of
    it begins like a tool call.

    Args:
        name: The score, one of `SCORES`.
        rows: Rows in TRL's prompt/completion format.
        max_new_tokens: Longest answer, in tokens.
        batch_size: Prompts that are answered at a time.
        share_prefix: Whether the beginning that all prompts have in common is read only once.

    Raises:
        ValueError: at construction, if the rows lack a prompt or a completion, or a completion is no reference that
            the score can compare with; the message names the row.
    """

    def __init__(self, name: str, rows: Dataset, *, max_new_tokens: int, batch_size: int, share_prefix: bool = False):
        if not {"prompt", "completion"} <= set(rows.column_names):
            raise ValueError(
                f"score needs rows with a prompt and a completion, found the columns {rows.column_names}. Give "
                "prompt_template and completion_template."
            )
        self.name, self.rows = name, rows
        self.max_new_tokens, self.batch_size, self.share_prefix = max_new_tokens, batch_size, share_prefix
        self.references = [reference(row) for row in rows]
        CHECKS[name](self.references)
        self.answers: dict[str, list[str]] = {}  # by "before" and "after"

    def score(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, when: str) -> dict[str, float]:
        """The scores of `model`, "before" or "after" training."""
        self.answers[when] = answers(
            model,
            tokenizer,
            self.rows,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            is_hopeless=HOPELESS.get(self.name),
            share_prefix=self.share_prefix,
            description=f"Answering held-out rows {when} training",
        )
        return SCORES[self.name](self.answers[when], self.references)

    def examples(self) -> list[dict[str, str]]:
        """The first rows with their answers before and after, for the record and the card."""
        prompts = [row["prompt"] for row in self.rows.select(range(min(EXAMPLES, len(self.rows))))]
        return [
            {
                "prompt": prompt if isinstance(prompt, str) else prompt[-1]["content"],
                "before": self.answers["before"][i],
                "after": self.answers["after"][i],
                "reference": self.references[i],
            }
            for i, prompt in enumerate(prompts)
        ]


def reference(row: dict[str, Any]) -> str:
    """The completion of a row in TRL's prompt/completion format, conversational or plain."""
    completion = row["completion"]
    return completion if isinstance(completion, str) else completion[0]["content"]


@torch.no_grad()
def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    *,
    max_new_tokens: int,
    batch_size: int,
    description: str,
    is_hopeless: Callable[[str], bool] | None = None,
    share_prefix: bool = False,
) -> list[str]:
    """Greedy answers to the prompts of `rows`, in their order. Each process answers its share of the rows.

    Args:
        is_hopeless: Whether a text scores nothing, however it goes on. Such an answer ends there, except that those of
            the first `EXAMPLES` rows are complete. Default: every answer is complete.
        share_prefix: As in `Scorer`.
    """
    state = PartialState()
    sharded = has_sharded_parameters(model) and state.num_processes > 1
    prompts = [_prompt_ids(tokenizer, row["prompt"]) for row in rows]
    prefix = common_beginning(prompts) if share_prefix else []
    with state.split_between_processes(list(range(len(rows)))) as indices:
        mine = {i: prompts[i][len(prefix) :] for i in indices}
    # Prompts of one length need no padding. The examples come first, so that only one batch has complete answers of a
    # model whose other answers end at their first word.
    batches = _batches(sorted(mine, key=lambda i: (i >= EXAMPLES, len(mine[i]))), batch_size)
    if sharded:
        # The processes compute each token together, so all must have the same number of batches. Those with fewer
        # answer the first row again.
        mine.setdefault(0, prompts[0][len(prefix) :])
        batches += [[0]] * (max(gather_object([len(batches)])) - len(batches))
    was_training = model.training
    model.eval()
    hook = contiguous_head_input(model)
    answered: dict[int, str] = {}
    try:
        cache = read_prefix(model, prefix) if prefix else None
        # None: no bar where stderr is no terminal, such as a log file or a notebook.
        for batch in tqdm(batches, desc=description, unit="batch", disable=not state.is_local_main_process or None):
            inputs = tokenizer.pad({"input_ids": [mine[i] for i in batch]}, padding_side="left", return_tensors="pt")
            inputs = inputs.to(model.device)
            if cache is not None:
                inputs = after_prefix(prefix, cache, **inputs)
            length = inputs["input_ids"].shape[1]
            criteria = StoppingCriteriaList()
            if is_hopeless is not None:
                criteria.append(_StopHopeless(tokenizer, length, [i >= EXAMPLES for i in batch], is_hopeless))
            output = model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
                stopping_criteria=criteria,
                synced_gpus=sharded,
            )
            texts = tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)
            answered.update(zip(batch, texts, strict=True))
    finally:
        hook.remove()
        model.train(was_training)
    everywhere = dict(gather_object(list(answered.items())))
    return [everywhere[i] for i in range(len(rows))]


def contiguous_head_input(model: PreTrainedModel) -> RemovableHandle:
    """Until the handle is removed, or `with` it, the LM head gets a contiguous copy of its input, which is small.

    After the prompt, generate() gives it a strided slice, whose bf16 product takes 100 times as long on a CPU and 1 GB
    of memory.
    """
    return model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))


class _StopHopeless(StoppingCriteria):
    """Ends the answers that `is_hopeless`, of those rows of a batch that may be cut."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt_length: int,  # in tokens, with the padding
        may_cut: list[bool],  # of each row
        is_hopeless: Callable[[str], bool],
    ):
        self.tokenizer, self.prompt_length = tokenizer, prompt_length
        self.may_cut, self.is_hopeless = may_cut, is_hopeless

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.prompt_length :], skip_special_tokens=True)
        ended = [cut and self.is_hopeless(text) for cut, text in zip(self.may_cut, texts, strict=True)]
        return torch.tensor(ended, device=input_ids.device)


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict[str, str]]) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]


def _batches(items: list[int], size: int) -> list[list[int]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def tool_call_scores(answers: list[str], references: list[str]) -> dict[str, float]:
    """Scores of JSON tool calls {"name": ..., "arguments": {...}}.

    - valid_json: share of the answers that are one JSON object
    - right_tool: share that have the reference's name
    - argument_f1: F1 over all pairs of argument and value; a call of the wrong tool has no right argument
    - exact: share that equal the reference, types included
    """
    valid = tool = exact = hits = given = wanted = 0
    for answer, reference in zip(answers, references, strict=True):
        truth, call = json.loads(reference), _json_object(answer)
        right_tool = call is not None and call.get("name") == truth["name"]
        arguments = call.get("arguments") if call is not None else None
        pairs = _pairs(arguments if isinstance(arguments, dict) else {})
        valid += call is not None
        tool += right_tool
        exact += call is not None and _canonical(call) == _canonical(truth)
        hits += len(pairs & _pairs(truth["arguments"])) if right_tool else 0
        given += len(pairs)
        wanted += len(truth["arguments"])
    n = len(references)
    return {
        "exact": exact / n,
        "valid_json": valid / n,
        "right_tool": tool / n,
        # Where nothing was wanted and nothing given, every argument is right.
        "argument_f1": 2 * hits / (given + wanted) if given + wanted else 1.0,
    }


def _json_object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def never_a_json_object(text: str) -> bool:
    """Whether no text that begins with `text` is one JSON object: it begins otherwise, or goes on after its end."""
    text = text.lstrip()
    if not text.startswith("{"):
        return text != ""
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except ValueError:
        return False  # not complete yet, or wrong in a way that shows only at its end
    return text[end:].strip() != ""


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)  # unlike ==, this distinguishes true from 1 and 2 from 2.0


def _pairs(arguments: dict[str, Any]) -> set[tuple[str, str]]:
    return {(name, _canonical(value)) for name, value in arguments.items()}


def check_tool_calls(references: list[str]) -> None:
    """Raises a ValueError for a reference that is no JSON tool call {"name": ..., "arguments": {...}}."""
    for number, text in enumerate(references):
        call = _json_object(text)
        if call is None or not isinstance(call.get("name"), str) or not isinstance(call.get("arguments"), dict):
            raise ValueError(
                'score tool_call compares with completions of the form {"name": ..., "arguments": {...}}. That of '
                f"test row {number} is {text[:80]!r}."
            )


def final_answer_scores(answers: list[str], references: list[str]) -> dict[str, float]:
    """accuracy: share of answers whose last "answer is ..." or "#### ..." names the same as the reference's.

    MetaMathQA and commonsense-170k end their answers in the first way, GSM8K in the second. Numbers are compared as
    numbers, so that 0.5, 1/2 and .50 are the same.
    """
    pairs = zip(answers, references, strict=True)
    return {"accuracy": sum(_final_answer(a) == _final_answer(r) is not None for a, r in pairs) / len(references)}


def check_final_answers(references: list[str]) -> None:
    """Raises a ValueError for a reference that names no final answer."""
    for number, text in enumerate(references):
        if _final_answer(text) is None:
            raise ValueError(
                'score final_answer compares what follows "answer is" or "####" in the completions. That of test row '
                f"{number} has neither: {text[-80:]!r}."
            )


def _final_answer(text: str) -> str | Fraction | None:
    _, separator, answer = text.rpartition("answer is")
    if not separator:
        _, separator, answer = text.rpartition("#### ")
    if not separator:
        return None
    # The first line only: a model that goes on writes something else after it.
    answer = answer.lstrip(":").strip().split("\n")[0].strip(" .!?$%").replace(",", "")
    try:
        return Fraction(answer)
    except (ValueError, ZeroDivisionError):
        return answer or None


SCORES = {"tool_call": tool_call_scores, "final_answer": final_answer_scores}
CHECKS = {"tool_call": check_tool_calls, "final_answer": check_final_answers}
# Where an answer's beginning can tell that it will score nothing. A final answer may always still come.
HOPELESS = {"tool_call": never_a_json_object}
