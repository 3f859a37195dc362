"""The chat templates that `chat_template` can name, and the tokens that they add."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from trainers.config.errors import ConfigError
from trainers.config.field_types import NAMED_TEMPLATES, TEMPLATE_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}"
    "<|{{ message['role'] }}|>\n{{ message['content'] }}{{ eos_token }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
PHI3 = (
    "{% for message in messages %}"
    "<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# Stanford Alpaca's prompt. A system turn replaces its preamble.
ALPACA = (
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}\n\n"
    "{% else %}Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}### Instruction:\n{{ message['content'] }}\n\n"
    "{% elif message['role'] == 'assistant' %}### Response:\n{{ message['content'] }}{{ eos_token }}\n\n"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}"
)
# Template, tokens that must have one id each, and the token that ends a turn if it is not the model's EOS.
TEMPLATES: dict[str, tuple[str, tuple[str, ...], str | None]] = {
    "chatml": (CHATML, ("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    "zephyr": (ZEPHYR, ("<|system|>", "<|user|>", "<|assistant|>"), None),
    "phi3": (PHI3, ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), "<|end|>"),
    "alpaca": (ALPACA, (), None),
}


def read_template(path: str) -> str:
    """Return the template in a file.

    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"chat_template: {path} cannot be read: {error}") from error


def set_template(tokenizer: PreTrainedTokenizerBase, name: str | None) -> list[str]:
    """Set the template that the config names, and return the tokens that it added to the vocabulary.

    Raises:
        ConfigError: the config asks for the template of a tokenizer that has none.
    """
    own = tokenizer.chat_template
    if name == "tokenizer" and not own:
        raise ConfigError(f"chat_template: the tokenizer of this model has none. Use {', '.join(TEMPLATES)}.")
    if name in NAMED_TEMPLATES:
        several = own if isinstance(own, dict) else {"default": own} if own else {}
        if name not in several:
            raise ConfigError(
                f"chat_template: the tokenizer of this model has no template '{name}'. It has: "
                f"{', '.join(several) or 'none'}."
            )
        tokenizer.chat_template = several[name]
    elif name is not None and name.endswith(TEMPLATE_FILE):
        tokenizer.chat_template = read_template(name)
    elif name in TEMPLATES:
        tokenizer.chat_template, tokens, end = TEMPLATES[name]
        gained = _add_tokens(tokenizer, list(tokens))
        if end is not None:
            tokenizer.eos_token = end
        return gained
    return []


def _add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: list[str]) -> list[str]:
    known = tokenizer.get_vocab()
    new = [token for token in tokens if token not in known]
    if new:
        tokenizer.add_special_tokens({"additional_special_tokens": new}, replace_extra_special_tokens=False)
    return new
