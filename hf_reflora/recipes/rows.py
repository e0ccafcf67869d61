"""The rows that a recipe trains on and answers: loaded by name, checked, and brought into TRL's form by templates."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from string import Formatter
from typing import Any

from datasets import Dataset, Value, load_dataset
from trl import ScriptArguments

from . import shipped


# The columns of TRL's formats whose cells must be texts or lists of messages.
TRL_COLUMNS = ("text", "messages", "prompt", "completion", "chosen", "rejected")


def load_rows(
    script_args: ScriptArguments, split: str, *, name: str | None = None, config: str | None = None
) -> Dataset:
    """A split of the dataset that the options name.

    Args:
        split: As `datasets` takes it, such as "train" or "train[:90%]".
        name, config: Another dataset than that of `script_args`.

    Raises:
        ValueError: if no dataset is named, or it has no such split; the message says which it has.
    """
    name, config = (script_args.dataset_name, script_args.dataset_config) if name is None else (name, config)
    if name is None:
        raise ValueError("dataset_name is missing: an id on the Hub, a folder, or a .jsonl, .csv or .parquet file.")
    path, files = shipped.dataset(name), None  # the demo's data need no clone
    if Path(path).is_file():
        # `datasets` chooses the format by the file's ending, if it is told the folder and the file.
        path, files = str(Path(path).resolve().parent), Path(path).name
    try:
        return load_dataset(path, config, data_files=files, split=split)
    except ValueError as error:
        if "Unknown split" not in str(error):
            raise
        only = f" A single file is the split train; write for example {split}: train[90%:], or name a folder."
        raise ValueError(f"{name}: {error}{only if files else ''}") from error


def columns_of(template: str, name: str, rows: Dataset) -> list[str]:
    """The columns that a template names.

    Raises:
        ValueError: if it is no format string, or `rows` lack a column.
    """
    literal = "Write a literal brace twice, such as {{ and }}."
    try:
        fields = [field for _, field, _, _ in Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise ValueError(f"{name} {template!r}: {error}. {literal}") from error
    # A field such as {answer[0]} or {answer.x} takes a part of the column.
    columns = [field.partition(".")[0].partition("[")[0] for field in fields]
    if missing := [column for column in columns if column not in rows.column_names]:
        raise ValueError(
            f"{name} names {', '.join(f'{{{column}}}' for column in missing)}, the dataset has the columns "
            f"{', '.join(rows.column_names)}. {literal}"
        )
    return columns


def check_cells(rows: Dataset, columns: Iterable[str], *, text: bool = False) -> None:
    """Raises a ValueError if a cell in one of the columns is empty (null), which would be trained on as "None".

    Args:
        text: The columns must hold texts.
    """
    for column in dict.fromkeys(columns):
        kind = rows.features[column]
        if text and isinstance(kind, Value) and kind.dtype not in ("string", "large_string", "null"):
            raise ValueError(f"Column {column!r} must have texts, found {kind.dtype} in the split {rows.split}.")
        if rows.data.column(column).null_count == 0 and "float" not in str(kind):
            continue  # told by the table at once; its rows may be many
        for number, cell in enumerate(rows[column]):
            if cell is None or cell != cell:  # NaN is not equal to itself
                raise ValueError(
                    f"Row {number} of the split {rows.split} has nothing in column {column!r}. Fill it or leave the "
                    "row out."
                )


def check_trl_rows(rows: Dataset) -> None:
    """`check_cells` of the columns that TRL's trainers read."""
    check_cells(rows, [column for column in TRL_COLUMNS if column in rows.column_names], text=True)


def leave_out_long(rows: Dataset, columns: Sequence[str], max_characters: int) -> Dataset:
    """The rows of which these columns, joined by spaces, have at most `max_characters` characters.

    Raises:
        ValueError: if none is left.
    """
    short = rows.filter(
        lambda row: len(" ".join(str(row[column]) for column in columns)) <= max_characters,
        desc=f"Leaving out rows of more than {max_characters} characters",
    )
    if len(short) == 0:
        raise ValueError(f"max_characters {max_characters} leaves out all {len(rows)} rows of the split {rows.split}.")
    return short


def apply_templates(
    rows: Dataset,
    prompt_template: str,
    completion_template: str,
    *,
    system_prompt: str | None = None,
    max_characters: int | None = None,
) -> Dataset:
    """Rows in TRL's prompt/completion format: texts, or with a system prompt chat messages.

    The templates are Python's format strings, so a literal brace is written twice.

    Args:
        max_characters: See `leave_out_long`; the columns are those of the templates.

    Raises:
        ValueError: as `columns_of`, `check_cells` and `leave_out_long`.
    """
    columns = columns_of(prompt_template, "prompt_template", rows)
    columns += columns_of(completion_template, "completion_template", rows)
    columns = list(dict.fromkeys(columns))
    check_cells(rows, columns)
    if max_characters is not None:
        rows = leave_out_long(rows, columns, max_characters)

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        prompt, completion = prompt_template.format(**row), completion_template.format(**row)
        if system_prompt is None:
            return {"prompt": prompt, "completion": completion}
        system = {"role": "system", "content": system_prompt}
        return {
            "prompt": [system, {"role": "user", "content": prompt}],
            "completion": [{"role": "assistant", "content": completion}],
        }

    return rows.map(convert, remove_columns=rows.column_names, desc="Applying the templates")
