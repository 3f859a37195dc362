"""Say which chat template a run uses, how it was chosen, and what the loss sees of a conversation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from trainers.config.field_types import NAMED_TEMPLATES, TEMPLATE_FILE
from trainers.config.schema import TrainConfig
from trainers.data.chat_template import ChatTemplate
from trainers.data.columns import Columns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST = 100  # characters of a value that are shown


def template_facts(
    config: TrainConfig,
    sources: Mapping[str, str],
    tokenizer: PreTrainedTokenizerBase,
    new_tokens: list[int],
    columns: Columns,
) -> list[tuple[str, str]]:
    """Return pairs of a name and what there is to say about it.

    `new_tokens` are the ids that the template added to the vocabulary.
    """

    def chosen(field: str) -> str:
        value = getattr(config, field)
        shown = ", ".join(value) if isinstance(value, list) else "null" if value is None else str(value)
        shown = shown if len(shown) <= LONGEST else f"{shown[:LONGEST]}..."
        return f"{field}: {shown} ({sources.get(field, 'default')})"

    facts = [("tokenizer", f"{config.model} (EOS {tokenizer.eos_token})")]
    if columns.kind == "tokens":
        return [*facts, ("template", "not used: the rows are tokens")]
    facts.append(("template", f"{_which(config, tokenizer)}; {chosen('chat_template')}"))
    if new_tokens:
        words = ", ".join(map(str, tokenizer.convert_ids_to_tokens(new_tokens)))
        facts.append(("new tokens", f"{words}, which the vocabulary lacked"))
    if config.kind.chooses_tokens:
        facts.append(("loss", chosen("train_on") + (", so everything" if config.trains_on_all else "")))
    if config.chat_template is not None and config.kind.rows != "masked":
        if not config.trains_on_all or not config.kind.chooses_tokens:
            facts.append(("turns", _marks(tokenizer)))
        facts.append(("history", chosen("history")))
    for name in ("system_prompt", "chat_template_kwargs"):
        if getattr(config, name):
            facts.append((name, chosen(name)))
    if config.kind.rows == "masked":
        facts.append(("masks", "drawn again in each epoch, so they are not shown"))
    return facts


def _which(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    name = config.chat_template
    if name is None:
        return "none: texts are joined as they are"
    if name == "tokenizer":
        several = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
        return f"the tokenizer's own{' (' + ', '.join(several) + ')' if several else ''}"
    if name in NAMED_TEMPLATES:
        return f"the tokenizer's template {name}"
    return "the file" if name.endswith(TEMPLATE_FILE) else f"{name}, which is part of Phalanx"


def _marks(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return where a turn begins and ends for the loss."""
    several = tokenizer.chat_template
    source = several if isinstance(several, str) else several.get("default") or next(iter(several.values()))
    template = ChatTemplate(tokenizer, source)
    if template.training is None:
        return "found by rendering the conversation up to each turn"
    if template.has_twin:
        return "marked by TRL's training template for this model"
    return "marked by the template ({% generation %})"
