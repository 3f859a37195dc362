"""The chat templates that `chat_template` can name, and the tokens that they add."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    tokenizer.chat_template = template_of(name, tokenizer.chat_template)
    if name not in TEMPLATES:
        return []
    _, _, end = TEMPLATES[name]
    gained = add_tokens_of(name, tokenizer)
    if end is not None:
        tokenizer.eos_token = end
    return gained


def template_of(name: str | None, own: Any) -> Any:
    """Return the template that a name stands for. `own`: what the tokenizer has, one or several.

    Raises:
        ConfigError: the tokenizer has none, or none of this name.
    """
    if name == "tokenizer" and not own:
        raise ConfigError(f"chat_template: the tokenizer of this model has none. Use {', '.join(TEMPLATES)}.")
    if name in NAMED_TEMPLATES:
        several = own if isinstance(own, dict) else {"default": own} if own else {}
        if name not in several:
            raise ConfigError(
                f"chat_template: the tokenizer of this model has no template '{name}'. It has: "
                f"{', '.join(several) or 'none'}."
            )
        return several[name]
    if name is not None and name.endswith(TEMPLATE_FILE):
        return read_template(name)
    return TEMPLATES[name][0] if name in TEMPLATES else own


def add_tokens_of(name: str | None, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Add the tokens of a template to the vocabulary, and return those that it lacked."""
    return _add_tokens(tokenizer, list(TEMPLATES[name][1])) if name in TEMPLATES else []


def _add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: list[str]) -> list[str]:
    known = tokenizer.get_vocab()
    new = [token for token in tokens if token not in known]
    if new:
        tokenizer.add_special_tokens({"additional_special_tokens": new}, replace_extra_special_tokens=False)
    return new
