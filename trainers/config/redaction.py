"""Hide secrets in text for terminals, logs and records: every ConfigError and every line of say().

A secret is hidden wherever the user wrote it, since many mistakes are a secret at the wrong place.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import pairwise
from types import TracebackType
from typing import Any, TextIO

HIDDEN = "(hidden)"
SHORTEST = 8  # characters; a shorter value could be an ordinary word of a message
# Tokens with a form that nothing else has.
_FORMS = re.compile(
    r"""
      \b(?:hf|api_org)_[A-Za-z0-9]{16,}              # Hugging Face
    | \bwandb_v\d_\w{16,}
    | \bsk-[A-Za-z0-9_-]{16,}                        # OpenAI, Anthropic
    | \bgh[opsru]_[A-Za-z0-9]{20,} | \bgithub_pat_\w{20,} | \bglpat-[\w-]{16,}
    | \b(?:AKIA|ASIA)[A-Z0-9]{16}\b                  # AWS
    | \bAIza[\w-]{30,} | \bya29\.[\w-]{16,}          # Google
    | \bxox[abeoprs]-[\w-]{10,}                      # Slack
    | \beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]+           # JSON web tokens, such as SLURM_JWT
    | -----BEGIN\ [A-Z ]*PRIVATE\ KEY-----[^-]*(?:-----END\ [A-Z ]*PRIVATE\ KEY-----)?
    """,
    re.VERBOSE,
)
# What stands before a secret, and the secret. pathlib makes one slash of the two in a URL.
_AFTER = (
    # https://user:password@host; the bounds keep long lines fast
    re.compile(r"(?<![\w+.-])([A-Za-z][\w+.-]{0,20}:/{1,2})(?:[^\s/:@]{1,200}:\S{1,500}|[^\s/]{1,500})(?=@)"),
    re.compile(r"([?&;][\w-]{0,40}(?:token|secret|signature|password|key|sig)=)[^\s&;]+", re.IGNORECASE),
    re.compile(r"(\b(?:Bearer|Authorization:\s*Basic)\s+)[\w.~+/=-]{8,}", re.IGNORECASE),
)
# A key of wandb. The same form have commits, which follow the word revision, or are a part of a path.
_KEY_OR_COMMIT = re.compile(r"(?<!revision )(?<!commit )(?<![\w/@.-])(?:local-)?[0-9a-f]{40}(?![\w/.-])")
# Parts of names that mean a secret: `hub_token`, `wandb-api-key`.
_SECRET_WORDS = ("token", "secret", "password", "passwd", "apikey", "credentials")
_SECRET_VARIABLE = re.compile(
    r"(TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|JWT|_PAT|(API|ACCESS|PRIVATE|SECRET)_?KEY)$", re.IGNORECASE
)
_known: set[str] = set()


def remember(*values: Any) -> None:
    """Hide these values in all later text: they are secret whatever their form is. Lists give their items."""
    for value in values:
        if isinstance(value, (list, tuple)):
            remember(*value)
        elif isinstance(value, str) and "${" not in value and _may_be_secret(value):
            _known.add(value)


def remember_flags(words: Sequence[str]) -> None:
    """Remember the values of secret flags in a command line, also of misspelled ones, before it is parsed."""
    for word, following in pairwise([*words, "--"]):
        name, equals, value = word.partition("=")
        if name.startswith("--") and is_secret_name(name):
            remember(value if equals else "" if following.startswith("--") else following)


def remember_tree(tree: Mapping[str, Any]) -> None:
    """Remember the values of secret keys in a config file, at any level, also of misspelled ones."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            remember_tree(value)
        elif is_secret_name(key):
            remember(value)


def is_secret_name(name: str) -> bool:
    """Return whether a key or a flag with this name has a secret: `token`, `--hub-tokn`, `wandb_api_key`."""
    parts = [part for part in re.split(r"[^a-z0-9]+", name.lower()) if part]
    return parts[1:][-1:] == ["key"] or any(
        difflib.get_close_matches(part, _SECRET_WORDS, n=1, cutoff=0.8) for part in parts
    )


def redacted(text: str) -> str:
    """Return a text with `(hidden)` in the place of each secret.

    Secrets are the remembered values, those of secret variables in the environment (HF_TOKEN, WANDB_API_KEY),
    tokens of known forms, and what a URL has before its @ or in a secret parameter.
    """
    return _KEY_OR_COMMIT.sub(HIDDEN, _without_certain(text))


def has_secret(value: Any) -> bool:
    """Return whether a value of a config has a secret in it. A list or a mapping has one if an item does.

    40 hexadecimal digits are none: a run may be named after a commit.
    """
    if isinstance(value, dict):
        return any(map(has_secret, value.values()))
    items: Iterable[Any] = value if isinstance(value, (list, tuple)) else (value,)
    return any(isinstance(item, str) and _without_certain(item) != item for item in items)


def hide_in_tracebacks() -> None:
    """Hide secrets in the traceback of an exception that ends this process."""

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        sys.stderr.write(redacted("".join(traceback.format_exception(kind, error, trace))))

    sys.excepthook = show


class _Hiding:
    """A stream that hides secrets in each text before the stream below gets it."""

    def __init__(self, below: TextIO) -> None:
        self.below = below

    def write(self, text: str) -> int:
        self.below.write(redacted(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.below, name)


def hide_in_output() -> None:
    """Hide secrets in all that libraries print in this process, also in tracebacks."""
    sys.stdout, sys.stderr = _Hiding(sys.stdout), _Hiding(sys.stderr)


def _without_certain(text: str) -> str:
    """Replace all but what may be a commit."""
    found = {form for value in (*_known, *_of_environment()) for form in (value, repr(value)[1:-1])}
    for value in sorted(found, key=len, reverse=True):  # one may contain another
        text = text.replace(value, HIDDEN)
    for pattern in _AFTER:
        text = pattern.sub(rf"\1{HIDDEN}", text)
    return _FORMS.sub(HIDDEN, text)


def _of_environment() -> Iterable[str]:
    """Yield the secrets in the environment: of variables with such a name, and the passwords of proxies."""
    for name, value in os.environ.items():
        secret = value if _is_secret_variable(name) else ""
        if name.lower().endswith("_proxy"):
            secret = value.rpartition("@")[0].rpartition("/")[2]
        if _may_be_secret(secret):
            yield secret


@cache
def _is_secret_variable(name: str) -> bool:
    return _SECRET_VARIABLE.search(name) is not None


def _may_be_secret(value: str) -> bool:
    """Return whether a value is no ordinary word, number or file, which messages need."""
    file = value.startswith("/") and os.path.exists(value)
    return len(value) >= SHORTEST and not value.isdigit() and not file
