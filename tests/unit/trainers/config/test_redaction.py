"""What is hidden in a text, and what is not although it looks alike."""

from __future__ import annotations

import pickle

import pytest

from trainers.config.errors import ConfigError
from trainers.config.redaction import (
    has_secret,
    is_secret_name,
    redacted,
    remember,
    remember_flags,
    remember_tree,
)
from trainers.rank.say import say

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKENS = {
    "Hugging Face": "hf_" + "aB3" * 11,
    "wandb": "wandb_v1_" + "aB3_" * 10,
    "OpenAI": "sk-proj-" + "aB3-" * 8,
    "Anthropic": "sk-ant-api03-" + "aB3-" * 8,
    "GitHub": "ghp_" + "aB3" * 12,
    "GitHub's new form": "github_pat_" + "aB3_" * 10,
    "GitLab": "glpat-" + "aB3-" * 5,
    "AWS": "AKIA" + "ABCDEFGH12345678",
    "Google": "AIza" + "aB3-" * 9,
    "Slack": "xoxb-" + "123-" * 6,
    "a JSON web token": "eyJhbGciOiJI.eyJzdWIiOiIx.aB3-aB3",
    "a private key": "-----BEGIN RSA PRIVATE KEY-----\naB3\n-----END RSA PRIVATE KEY-----",
}
ADDRESSES = (
    "https://me:horse@host/path",
    "https:/me:horse@host/path",  # as pathlib writes it
    "https://horse@host/path",
    "https://me:ho/r@horse@host/path",
    "s3://key:horse@bucket",
    "socks5h://me:horse@proxy:1080",
    "https://host/path?a=1&access_token=horse&b=2",
    "https://host/path?X-Amz-Signature=horse",
    "Authorization: Bearer horsehorse",
    "authorization: basic horsehorse==",
)
ORDINARY = (
    f"revision {COMMIT} does not exist",
    f"the model is in models--me--x/snapshots/{COMMIT}/config.json",
    f"me/model@{COMMIT}",
    "hf_transfer, hf_xet and hf_hub_download are not installed",
    "https://huggingface.co/me/model and you@example.com",
    "c.yaml:12: tokens_per_batch: 4096 is below block_size (8192)",
    "hf://datasets/me/rows@main/train.jsonl",
    "risk-adjusted-learning-rates, task-specific-heads",
    "the hash of the rows is " + "ab" * 32,
    "token: not set",
)


@pytest.mark.parametrize("token", TOKENS.values(), ids=TOKENS.keys())
@pytest.mark.parametrize("text", ["{}", "lr: '{}' is not a number.", "['{}']", "a={},b"])
def test_a_token_of_a_known_form_is_hidden(token: str, text: str) -> None:
    assert redacted(text.format(token)) == text.format("(hidden)")
    assert has_secret(text.format(token)) and has_secret(["a", token])
    assert has_secret({"a": {"b": token}})


@pytest.mark.parametrize("text", ADDRESSES)
def test_the_secret_of_an_address_is_hidden(text: str) -> None:
    assert "horse" not in redacted(text) and "(hidden)" in redacted(text)
    assert has_secret(text)


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_text_is_not_changed(text: str) -> None:
    assert redacted(text) == text
    assert redacted(redacted(text)) == text


def test_forty_digits_may_be_a_key_of_wandb_or_a_commit() -> None:
    """In a message they are hidden. As the name of a run they are allowed."""
    assert redacted(f"log: '{COMMIT}' does not exist") == "log: '(hidden)' does not exist"
    assert not has_secret(COMMIT)


@pytest.mark.parametrize(
    ("name", "value", "hidden"),
    [
        ("HF_TOKEN", "horse-battery", True),
        ("HUGGING_FACE_HUB_TOKEN", "horse-battery", True),
        ("WANDB_API_KEY", COMMIT, True),
        ("AWS_SECRET_ACCESS_KEY", "/horse+battery", True),
        ("SLURM_JWT", "horse-battery", True),
        ("DB_PASSWORD", "horse\nbattery", True),
        ("https_proxy", "http://me:horse-battery@proxy:3128", True),
        ("ALL_PROXY", "me:horse-battery@proxy", True),
        ("HF_HOME", "horse-battery", False),
        ("HF_TOKEN", "1", False),  # too short: it would be hidden in every number
        ("MAX_TOKEN", "1048576000", False),
        ("TLS_PRIVATE_KEY", __file__, False),
    ],
)
def test_secrets_of_the_environment_are_hidden(
    name: str, value: str, hidden: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    for text in (f"a {value} b", f"a {value!r} b"):
        assert ("(hidden)" in redacted(text)) == hidden
        assert ("battery" in redacted(text)) == ("battery" in value and not hidden)


def test_the_value_of_a_secret_key_is_hidden_in_all_later_text(capsys: pytest.CaptureFixture[str]) -> None:
    remember_tree({"hub": {"token": "horse-battery", "username": "somebody"}, "column": ["other-staple"]})
    say("warning", "horse-battery", "other-staple of somebody")
    assert capsys.readouterr().err == "warning: (hidden)\n       other-staple of somebody\n"
    assert str(ConfigError("it's horse-battery")) == "it's (hidden)"


def test_the_value_of_a_secret_flag_is_hidden_in_all_later_text() -> None:
    remember_flags(
        ["train", "c.yaml", "--tokn", "horse-battery", "--api-key=other-staple", "--token", "--peft"]
    )
    assert (
        redacted("train c.yaml horse-battery other-staple --peft") == "train c.yaml (hidden) (hidden) --peft"
    )


def test_an_error_survives_the_way_between_processes() -> None:
    """Rows are tokenized in several processes, whose errors are pickled."""
    error = ConfigError("not horse: https://me:horse@host", 7)
    assert pickle.loads(pickle.dumps(error)).args == error.args == ("not horse: https://(hidden)@host", 7)


def test_a_longer_secret_is_hidden_as_a_whole() -> None:
    remember("horse-battery", "horse-battery-staple")
    assert redacted("horse-battery-staple") == "(hidden)"


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        *[(name, True) for name in ("token", "hub_token", "--hub-tokn", "toekn", "tokens", "wandb_key")],
        *[(name, True) for name in ("apikey", "api-key", "secret", "passwrd", "aws_secret_access_key")],
        *[
            (name, False)
            for name in ("lr", "path", "text_column", "keep", "key", "tokenizer", "username", "")
        ],
    ],
)
def test_a_name_tells_a_secret_also_if_it_is_misspelled(name: str, secret: bool) -> None:
    assert is_secret_name(name) == secret
