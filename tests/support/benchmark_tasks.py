"""Tasks of lm-eval over rows that are made with a tiny model, so that their scores can be computed by hand.

`run FOLDER OUT` evaluates the adapter in FOLDER, in as many processes as it is started in.
"""

import json
import sys
from pathlib import Path

import tiny
import torch


CHOICE = """\
task: choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{rows}"}}}}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: label
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 2.0}}
"""
ANSWER = """\
task: answer
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{rows}"}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
generation_kwargs: {{until: ["<never>"], max_gen_toks: 3, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""
SAMPLED = ANSWER.replace("task: answer", "task: sampled").replace(
    "do_sample: false", "do_sample: true, temperature: 1.0"
)
GROUP = """\
group: both
task: [choice, answer]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
metadata: {version: 1.0}
"""


def write(folder: Path, model, rows: int = 9) -> dict[str, tuple[float, float]]:
    """Writes rows and the tasks' files into `folder`; returns each task's right score, before and after.

    The right choice is the base model's most likely one, and the right answer the one that the adapter writes.
    """
    folder.mkdir()
    model.eval()
    written, sides = [], []
    for i in range(rows):
        question, choices = f"What is {i} + {7 * i % 5}?", [f" It is {j * 7 + i}." for j in range(3)]
        with model.disable_adapter():
            base = likeliest(model, question, choices), answer(model, question)
        adapter = likeliest(model, question, choices), answer(model, question)
        sides.append((adapter[0] == base[0], base[1] == adapter[1]))
        written.append({"question": question, "choices": choices, "label": base[0], "answer": adapter[1]})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, written)), encoding="utf-8")
    for name, text in (("choice", CHOICE), ("answer", ANSWER), ("sampled", SAMPLED)):
        (folder / f"{name}.yaml").write_text(text.format(rows=folder / "rows.jsonl"), encoding="utf-8")
    (folder / "both.yaml").write_text(GROUP, encoding="utf-8")
    choice, same = (sum(side[i] for side in sides) / rows for i in range(2))
    return {"choice": (1.0, choice), "answer": (same, 1.0)}


@torch.no_grad()
def likeliest(model, question: str, choices: list[str]) -> int:
    sums = []
    for choice in choices:
        prompt, ids = (torch.tensor([tiny.tokenizer()(text)["input_ids"]]) for text in (question, question + choice))
        logs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        sums.append(logs.gather(1, ids[0, 1:, None])[prompt.shape[1] - 1 :].sum().item())
    return max(range(len(choices)), key=sums.__getitem__)


def answer(model, question: str) -> str:
    inputs = tiny.tokenizer()(question, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return tiny.tokenizer().decode(ids, skip_special_tokens=True)


if __name__ == "__main__":
    from accelerate import PartialState

    from hf_reflora.recipes.benchmarks import Benchmarks, evaluate_adapter

    state = PartialState(cpu=True)
    adapter, out = sys.argv[1:]
    benchmarks = Benchmarks("choice,answer", include_path=str(Path(adapter).parent / "tasks"), num_fewshot=1, seed=3)
    entries = evaluate_adapter(adapter, benchmarks).entries
    assert state.num_processes == 2
    Path(out, f"{state.process_index}.json").write_text(json.dumps(entries), encoding="utf-8")
