"""Load the tokenizer of a run: its template, padding token, padding side and length."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

from trainers.config.errors import ConfigError
from trainers.config.mix import sources_of
from trainers.config.schema import TrainConfig
from trainers.data.templates import add_tokens_of, set_template, template_of
from trainers.data.tokens import forget_truncation
from trainers.model.source import check_names, source_arguments
from trainers.model.trust import why_not_loaded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokens that vocabularies have for padding, best first.
PAD_TOKENS = ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>")


def load_tokenizer(config: TrainConfig) -> tuple[PreTrainedTokenizerBase, list[int]]:
    """Load the model's tokenizer, with the template, padding side and length from the config.

    Returns it, and the ids of the tokens that were added to its vocabulary.

    Raises:
        ConfigError: there is no tokenizer, or no template or mask token although one is needed.
    """
    tokenizer = tokenizer_of(config.model, config)
    forget_truncation(tokenizer)
    gained = set_template(tokenizer, config.chat_template)
    for source in sources_of(config):
        gained += add_tokens_of(source.config.chat_template, tokenizer)
    if config.kind.rows == "masked" and tokenizer.mask_token is None:
        raise ConfigError(
            f"base_model: {config.model} has no mask token, so it is not a masked LM. Use another model, or "
            "trainer: default."
        )
    _choose_pad(tokenizer)
    if config.padding is not None:
        tokenizer.padding_side = config.padding
    tokenizer.model_max_length = min(tokenizer.model_max_length, config.model_max_length)
    known = tokenizer.get_vocab()
    return tokenizer, [known[token] for token in gained]


def tokenizers_of_sources(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase
) -> dict[str, PreTrainedTokenizerBase]:
    """Return the tokenizer of each source of a mix: that of the run, with the template of the source.

    Vocabulary and EOS are those of the run for all sources.

    Raises:
        ConfigError: a template is missing.
    """
    found: dict[str, PreTrainedTokenizerBase] = {}
    own: Any = None
    for source in sources_of(config):
        name = source.config.chat_template
        found[source.name] = tokenizer
        if name is not None and name != config.chat_template:
            own = own or tokenizer_of(config.model, config).chat_template
            found[source.name] = deepcopy(tokenizer)
            with source.named():
                found[source.name].chat_template = template_of(name, own)
    return found


def tokenizer_of(model: str, config: TrainConfig) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        check_names(model, config)
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            model, **source_arguments(model, config)
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"base_model: no tokenizer can be loaded from {model}: {why_not_loaded(error)}"
        ) from error
    return tokenizer


def _choose_pad(tokenizer: PreTrainedTokenizerBase) -> None:
    """Choose a padding token that is not EOS; EOS only if the vocabulary has no other.

    If padding is EOS, code that masks the padding also masks EOS, and the model never learns to stop. A
    reward model reads the last token that is not padding, which would be the one before EOS.
    """
    if tokenizer.pad_token is not None and tokenizer.pad_token != tokenizer.eos_token:
        return
    known = tokenizer.get_vocab()
    spare = [token for token in PAD_TOKENS if token in known and token != tokenizer.eos_token]
    if tokenizer.unk_token and tokenizer.unk_token != tokenizer.eos_token:
        spare.append(tokenizer.unk_token)
    tokenizer.pad_token = spare[0] if spare else tokenizer.eos_token
