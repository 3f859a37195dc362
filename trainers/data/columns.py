"""Find which columns of a split contain what, and from that the kind of its rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from string import Formatter

from trainers.config.errors import ConfigError
from trainers.config.schema import TrainConfig
from trainers.data.files import Split, column_names, rows

CONVERSATIONS = ("messages", "conversations")  # usual names of a column with messages
CHECK_BYTES = 64 * 2**20  # how much of each file the launcher checks before the ranks start


def check_split(split: Split, config: TrainConfig, key: str) -> None:
    """Check a local split: it has rows, the needed columns, and rows that can be read.

    Reads about CHECK_BYTES of each CSV or JSON Lines file. Does not check a dataset on the hub.

    Raises:
        ConfigError: the split is empty, a column is missing, or a row cannot be read.
    """
    if not split.files:
        return
    columns = column_names(split)
    if not columns:
        raise ConfigError(
            f"data.{key}: the split '{split.name}' is empty ({split.files[0]}). It needs at least one row."
        )
    find_columns(columns, config)
    for _ in rows(split, CHECK_BYTES):
        pass


@dataclass(frozen=True)
class Columns:
    """Which columns contain what, and the kind of the rows.

    `kind` is tokens (token ids), text (plain text or messages), completion (of a prompt), pair (a chosen and
    a rejected answer), or labelled (a completion with a label: wanted or not).
    """

    kind: str
    text: str  # the text, the messages, the completion, or the chosen answer
    prompt: str | None = None
    instruction: bool = False  # the columns instruction and input form the prompt
    rejected: str | None = None
    label: str | None = None
    system: str | None = None  # the system turn of a conversation
    history: str | None = None  # Alpaca's earlier turns: pairs of an instruction and its output
    # What all rows of a column hold (column_kinds.py).
    messages: tuple[str, ...] = ()  # messages
    dialogues: tuple[str, ...] = ()  # text with the turns of Human and Assistant, as in HH-RLHF

    @property
    def named(self) -> list[str]:
        """The columns that may hold messages."""
        return [name for name in (self.prompt, self.text, self.rejected) if name is not None]


def find_columns(columns: list[str], config: TrainConfig) -> Columns:
    """Return which columns contain what, from the names of the columns and from the config.

    Raises:
        ConfigError: a column that the config names, or that the trainer needs, is missing.
    """
    found = _find(columns, config)
    named = {found.text, found.prompt, found.rejected, found.label, *prompt_fields(config)}
    others = {*columns} - named
    return replace(
        found,
        system="system" if "system" in others else None,
        history="history" if found.instruction and "history" in others else None,
    )


def _find(columns: list[str], config: TrainConfig) -> Columns:
    for name in prompt_fields(config):
        _need(columns, name, "data.prompt_format")
    if config.prompt_text_column:
        _need(columns, config.prompt_text_column, _key("prompt_text_column"))
    prompt = config.prompt_text_column or ("prompt" if "prompt" in columns else None)
    instruction = prompt is None and config.prompt_format is None and "instruction" in columns
    if config.kind.preference:
        return _preference_columns(columns, config, prompt, instruction)
    text = completion_name(columns, config)
    asked = config.prompt_text_column is not None or config.prompt_format is not None
    if asked:
        _need(columns, text, _key("text_column"))
        return Columns("completion", text, prompt)
    alpaca = {"instruction", "output"} <= set(columns)  # tatsu-lab/alpaca has both joined in text, too
    if "text_column" in config.model_fields_set or (config.text_column in columns and not alpaca):
        _need(columns, config.text_column, _key("text_column"))
        return Columns("text", config.text_column)
    if {"prompt", "completion"} <= set(columns):
        return Columns("completion", "completion", "prompt")
    if alpaca:
        return Columns("completion", "output", None, instruction=True)
    for name in CONVERSATIONS:
        if name in columns:
            return Columns("text", name)
    if {"user", "assistant"} <= set(columns):
        return Columns("completion", "assistant", "user")
    if "input_ids" in columns:
        return Columns("tokens", "input_ids")
    _need(columns, config.text_column, _key("text_column"))
    raise AssertionError("unreachable")


def _preference_columns(
    columns: list[str], config: TrainConfig, prompt: str | None, instruction: bool
) -> Columns:
    label = config.label_column
    labelled = label in columns or "label_column" in config.model_fields_set
    paired = config.rejected_text_column is not None or bool({"chosen", "rejected"} & set(columns))
    if config.kind.rows == "labelled" and ((labelled and config.rejected_text_column is None) or not paired):
        text = completion_name(columns, config)
        _need(columns, text, _key("text_column"))
        _need(columns, label, _key("label_column"))
        return Columns("labelled", text, prompt, instruction, label=label)
    chosen = config.text_column if "text_column" in config.model_fields_set else "chosen"
    rejected = config.rejected_text_column or "rejected"
    _need(columns, chosen, _key("text_column"))
    _need(columns, rejected, _key("rejected_text_column"))
    return Columns("pair", chosen, prompt, instruction, rejected)


def completion_name(columns: list[str], config: TrainConfig) -> str:
    """Return the name of the column with the completion of a prompt.

    Without text_column in the config, `completion` or `output` is taken if the split has it.
    """
    if "text_column" in config.model_fields_set:
        return config.text_column
    usual = ("completion", "output", config.text_column)
    names = (*usual, *CONVERSATIONS) if config.kind.preference else usual
    return next((name for name in names if name in columns), config.text_column)


def prompt_fields(config: TrainConfig) -> list[str]:
    """Return the names of the columns in prompt_format.

    Raises:
        ConfigError: braces contain more than a name.
    """
    names = []
    for _, name, form, conversion in Formatter().parse(config.prompt_format or ""):
        if form or conversion:
            raise ConfigError(f"data.prompt_format: braces may contain only a column name. Write {{{name}}}.")
        names += [name] if name else []
    return names


def _key(field: str) -> str:
    return f"data.column_mapping.{field}"


def _need(columns: list[str], name: str, key: str) -> None:
    if name not in columns:
        raise ConfigError(f"{key}: there is no column '{name}'. The columns are: {', '.join(columns)}.")
