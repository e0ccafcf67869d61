"""The rows of a recipe: files by name, templates, and cells that are empty or of another kind."""

import pytest
import tiny
from datasets import Dataset

from hf_reflora.recipes import classify, dpo, sft
from hf_reflora.recipes.rows import apply_templates, check_cells, check_trl_rows, load_rows


CSV = "question,answer,label\nWhat is 1+1?,2,1\nWhat is 2+2?,,0\nWhat is 3+3?,6,\n"
ROWS = '{"question": "a", "answer": "b"}\n{"question": "c", "answer": "d"}\n'


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").write_text(CSV, encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text(ROWS, encoding="utf-8")
    tiny.save(tmp_path / "model")
    return tmp_path


def script(*arguments):
    return sft.make_parser().parse_args_and_config(["--bf16", "false", *arguments])[0]


def test_a_file_is_a_dataset(folder):
    rows = load_rows(script("--dataset_name", "rows.jsonl"), "train[:1]")
    assert rows.to_list() == [{"question": "a", "answer": "b"}]
    assert load_rows(script("--dataset_name", str(folder / "rows.csv")), "train").num_rows == 3
    with pytest.raises(ValueError, match=r"rows\.jsonl: Unknown split .* A single file is the split train"):
        load_rows(script("--dataset_name", "rows.jsonl"), "test")
    with pytest.raises(ValueError, match="dataset_name is missing"):
        load_rows(script(), "train")


def test_the_test_split_of_another_dataset(folder):
    (folder / "other.jsonl").write_text('{"q": "1+1?", "a": "#### 2"}\n', encoding="utf-8")
    options = ["--dataset_name", "rows.jsonl", "--test_dataset_name", "other.jsonl", "--dataset_test_split", "train"]
    options += ["--prompt_template", "{question}", "--completion_template", "{answer}"]
    options += ["--test_prompt_template", "Q: {q}", "--test_completion_template", "{a}", "--score", "final_answer"]
    options += ["--model_name_or_path", "model", "--lora_target_modules", "q_proj", "--score_max_new_tokens", "2"]
    trainer = [
        "--max_steps",
        "1",
        "--output_dir",
        "out",
        "--report_to",
        "none",
        "--use_cpu",
        "true",
        "--bf16",
        "false",
    ]
    sft.main(*sft.make_parser().parse_args_and_config(options + trainer))
    record = (folder / "out" / "run_record.json").read_text(encoding="utf-8")
    assert '"prompt": "Q: 1+1?"' in record
    assert '"reference": "#### 2"' in record


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("{qestion}", r"prompt_template names {qestion}, the dataset has the columns question, answer, label"),
        ('{"q": {question}}', r"Write a literal brace twice"),
        ("{}", "prompt_template names {}"),
        ("{question", "Write a literal brace twice"),
    ],
)
def test_templates_that_do_not_fit(folder, prompt, message):
    rows = load_rows(script("--dataset_name", "rows.csv"), "train[:1]")
    with pytest.raises(ValueError, match=message):
        apply_templates(rows, prompt, "{answer}")


def test_templates_are_format_strings():
    rows = Dataset.from_list([{"x": 0.5, "tags": ["a", "b"]}])
    done = apply_templates(rows, '{{"x": {x:.2f}}}', "{tags[1]}")
    assert done.to_list() == [{"prompt": '{"x": 0.50}', "completion": "b"}]


def test_empty_cells_are_named(folder):
    rows = load_rows(script("--dataset_name", "rows.csv"), "train")
    with pytest.raises(ValueError, match=r"Row 1 of the split train has nothing in column 'answer'"):
        apply_templates(rows, "{question}", "{answer}")
    with pytest.raises(ValueError, match=r"Row 2 of the split train has nothing in column 'label'"):
        classify.classes_of(rows, "label")
    recipe = classify.ClassifyArguments(text_columns=["question", "answer"])
    with pytest.raises(ValueError, match="Column 'answer' must have texts, found float64"):
        classify.tokenize(rows.select([0]), recipe, tiny.tokenizer(), {0: "no", 1: "yes"})
    check_cells(rows, ["question"])
    with pytest.raises(ValueError, match="Row 1"):
        check_cells(Dataset.from_list([{"x": 1.0}, {"x": float("nan")}]), ["x"])


@pytest.mark.parametrize("recipe", [sft, dpo])
def test_empty_cells_of_rows_without_templates(folder, recipe):
    rows = [{"prompt": "a", "completion": "b", "chosen": "b", "rejected": None}]
    rows[0] |= {"completion": None, "rejected": "c"} if recipe is sft else {}
    Dataset.from_list(rows * 2).to_json(folder / "trl.jsonl")
    options = ["--dataset_name", "trl.jsonl", "--model_name_or_path", "model", "--output_dir", "out"]
    options += ["--bf16", "false", "--use_cpu", "true", "--report_to", "none"]
    column = "completion" if recipe is sft else "rejected"
    with pytest.raises(ValueError, match=f"Row 0 of the split train has nothing in column '{column}'"):
        recipe.main(*recipe.make_parser().parse_args_and_config(options))


def test_numbers_are_no_texts():
    with pytest.raises(ValueError, match="Column 'text' must have texts, found int64"):
        check_trl_rows(Dataset.from_list([{"text": 3}]))
    check_trl_rows(Dataset.from_list([{"messages": [{"role": "user", "content": "a"}], "id": None}]))


def test_long_rows_are_left_out():
    rows = Dataset.from_list([{"q": "ab", "r": "cd"}, {"q": "abc", "r": "cd"}, {"q": "a", "r": "b"}])
    kept = apply_templates(rows, "Question: {q}", "{r}", max_characters=5)  # "ab cd" has 5
    assert [row["prompt"] for row in kept] == ["Question: ab", "Question: a"]
    with pytest.raises(ValueError, match="max_characters 2 leaves out all 3 rows"):
        apply_templates(rows, "{q}", "{r}", max_characters=2)
