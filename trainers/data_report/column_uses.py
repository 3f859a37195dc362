"""Say for each column of a split what it is used for, and how it was found."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from trainers.config.schema import TrainConfig
from trainers.data.column_kinds import ROWS_READ
from trainers.data.columns import Columns, prompt_fields

USUAL = "its usual name"


@dataclass(frozen=True)
class Use:
    """A column that is used."""

    column: str
    what: str  # it is for
    found: str  # how it was found
    holds: str = ""  # messages or text, where that was decided


def column_uses(
    names: Iterable[str], columns: Columns, config: TrainConfig, sources: Mapping[str, str], given: int
) -> tuple[list[Use], list[str]]:
    """Return how the columns of a split are used, and which of `names` are not.

    `columns` are complete (column_kinds.py), `sources` says where each value of the config is from, and
    `given` is the number of rows.
    """
    names = list(names)
    uses = [use for use in _uses(columns, config, sources, given) if use.column in names]
    used = {use.column for use in uses}
    return uses, [name for name in names if name not in used]


def _uses(columns: Columns, config: TrainConfig, sources: Mapping[str, str], given: int) -> Iterator[Use]:
    read = "as in most rows" if given <= ROWS_READ else f"as in most of the first {ROWS_READ} rows"

    def found(field: str, column: str | None) -> str:
        named = field in config.model_fields_set and getattr(config, field) == column
        return f"{field} ({sources.get(field, 'config')})" if named else USUAL

    def use(column: str, what: str, field: str) -> Use:
        if column in columns.messages:
            holds = f"messages, {read}"
        elif column in columns.dialogues:
            holds = f"turns of Human and Assistant, {read}"
        else:
            holds = "text"
        return Use(column, what, found(field, column), holds)

    if columns.kind == "tokens":
        yield Use("input_ids", "the tokens", USUAL)
        yield Use("labels", "what the loss sees", USUAL)
        yield Use("attention_mask", "where the padding is", USUAL)
        return
    if config.prompt_format is not None:
        for name in dict.fromkeys(prompt_fields(config)):
            yield Use(name, "part of the prompt", f"prompt_format ({sources.get('prompt_format', 'config')})")
    elif columns.instruction:
        yield Use("instruction", "the prompt", USUAL)
        yield Use("input", "the prompt's end", USUAL)
    elif columns.prompt is not None:
        yield use(columns.prompt, "the prompt", "prompt_text_column")
    what = {"completion": "the completion", "pair": "the better answer", "labelled": "the answer"}
    conversation = columns.text in columns.messages
    yield use(
        columns.text,
        what.get(columns.kind, "the conversation" if conversation else "the text"),
        "text_column",
    )
    if columns.rejected is not None:
        yield use(columns.rejected, "the worse answer", "rejected_text_column")
    if columns.label is not None:
        yield Use(columns.label, "whether the answer is wanted", found("label_column", columns.label))
    if columns.history is not None:
        yield Use(columns.history, "earlier turns", USUAL)
    if config.chat_template is not None:
        if columns.system is not None:
            yield Use(columns.system, "the system turn", USUAL)
        yield Use("tools", "the tools", USUAL)
        yield Use("chat_template_kwargs", "variables of the template", USUAL)
