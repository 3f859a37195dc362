"""A text is tokenized as a whole, for every kind of vocabulary, and the loss sees the tokens of its parts."""

from __future__ import annotations

import pytest
from chats import vocabularies
from rows import assistant, user

from trainers.data.chat import Renderer
from trainers.data.messages import Chat
from trainers.data.tokens import OTHER_PROMPT, Tokens

# As Llama 2's: text follows special tokens, with and without a space.
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for m in messages %}{{ '<s>' + m.role + '\\n' + m.content + '</s>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\\n' }}{% endif %}"
)
KINDS = (
    "byte level", "byte level with trimmed offsets", "sentencepiece, prepend",
    "sentencepiece, metaspace first", "sentencepiece, metaspace always", "unigram", "wordpiece",
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizers():
    found = vocabularies()
    assert tuple(found) == KINDS
    return found


@pytest.mark.parametrize(
    "answer",
    [
        "One process.",
        "  indented\n\né 🙂 日本",
        pytest.param("</s> the end", marks=pytest.mark.slow),
        pytest.param("One", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("template", [TEMPLATE, CHATML], ids=["spaces", "newlines"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_ids_are_those_of_apply_chat_template_on_the_whole(tokenizers, kind, template, answer):
    tokenizer = tokenizers[kind]
    tokenizer.chat_template = template
    turns = [user("What is a rank? "), assistant(answer), user("Why?"), assistant("One process of many.")]
    tokens = Tokens(tokenizer)
    (rendered,) = Renderer(tokenizer, tokens).trained(Chat(turns), [1, 3])
    found = tokens.rendered(rendered.text, rendered.spans, rendered.prompts, rendered.exact_end)
    assert found.input_ids == tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
    # Each label is a token of an answer, and each answer is complete.
    offsets = tokens.encode(rendered.text).offsets
    for (first, last), content in zip(rendered.spans, (answer, "One process of many."), strict=True):
        span = rendered.text[first:last]
        assert (
            span.split() == f"{content} {tokenizer.eos_token}".split()
            or span == content + tokenizer.eos_token
        )
        inside = [n for n, (a, b) in enumerate(offsets) if a < last and b > first]
        assert all(found.labels[n] == found.input_ids[n] for n in inside)
    covered = sum(label != -100 for label in found.labels)
    outside = [
        n for n, (a, b) in enumerate(offsets) if a < b and not any(a < y and b > x for x, y in rendered.spans)
    ]
    assert all(found.labels[n] == -100 for n in outside)
    assert 0 < covered < len(found.labels)


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_and_completion_without_a_template_are_one_text(tokenizers, kind):
    tokenizer = tokenizers[kind]
    found = Tokens(tokenizer).joined("What is a rank?", " One process.", eos=True)
    assert found.input_ids == [
        *tokenizer("What is a rank? One process.")["input_ids"],
        tokenizer.eos_token_id,
    ]
    assert found.labels[-1] == tokenizer.eos_token_id
    text = tokenizer.decode([label for label in found.labels if label != -100])
    assert text.replace(" ", "").lower() == "oneprocess.</s>"
    assert not found.notes


def test_a_prompt_that_has_other_tokens_alone_is_counted(tokenizers):
    tokens = Tokens(tokenizers["byte level"])
    assert tokens.joined("What is a ra", "nk?", eos=True).notes == {OTHER_PROMPT}
    long = "What is a rank? " * 40
    assert not tokens.joined(long.strip(), " One process.", eos=True).notes
    assert tokens.joined(long + "ra", "nk?", eos=True).notes == {OTHER_PROMPT}


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_is_compared_as_if_it_were_tokenized_alone(tokenizers, kind):
    tokenizer = tokenizers[kind]
    tokens = Tokens(tokenizer)
    for prompt in (
        "What is",
        "What is ",
        "<s>user\nWhat is</s>\n<s>assistant\n",
        "the ranks " * 50 + "train",
    ):
        for rest in ("a rank", " a rank", "\n\na", "s</s>"):
            text = prompt + rest
            alone = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            expected = tokens.encode(text).ids[: len(alone)] == alone
            assert tokens.begins(tokens.encode(text), text, prompt) == expected, (prompt, rest)


def test_a_character_of_several_tokens_is_trained_completely(tokenizers):
    tokens = Tokens(tokenizers["byte level"])
    found = tokens.joined("What is it? ", "日本🙂", eos=False)
    assert tokens.tokenizer.decode([label for label in found.labels if label != -100]).strip() == "日本🙂"
