"""Every chat template that the installed TRL ships, with conversations of every kind.

Ground truth: the text of apply_chat_template, the mask of TRL's training template, and unique words: each of
them must be in the text, and those of the assistant in the loss.
"""

from __future__ import annotations

import copy

import pytest
from chats import CHATS, byte_level, support_table, trl_templates, words_in
from places import REPO

from trainers.data.chat import Renderer
from trainers.data.messages import Chat
from trainers.data.samples import RowError
from trainers.data.tokens import Tokens
from trainers.data.turns import ENDED

TEMPLATES = trl_templates()


@pytest.fixture(scope="session")
def every_token():
    return byte_level(TEMPLATES.values())


@pytest.fixture
def load(every_token):
    """`load(name)`: a tokenizer with this template of TRL."""

    def loaded(name):
        tokenizer = copy.copy(every_token)
        tokenizer.chat_template = TEMPLATES[name]
        return tokenizer

    return loaded


def assistants(messages):
    return [number for number, message in enumerate(messages) if message["role"] == "assistant"]


def trained_text(tokenizer, encoded):
    return tokenizer.decode([label for label in encoded.labels if label != -100])


@pytest.mark.parametrize("name", TEMPLATES)
def test_nothing_is_lost_and_the_loss_sees_each_answer_with_its_end(load, name):
    tokenizer = load(name)
    tokens = Tokens(tokenizer)
    renderer = Renderer(tokenizer, tokens)
    for kind, (messages, tools) in CHATS.items():
        chat = Chat(copy.deepcopy(messages), tools)
        turns = assistants(messages)
        try:
            samples = renderer.trained(chat, turns)
        except RowError as error:
            assert "does not render" in str(error) or "rejects the turns" in str(error), (kind, str(error))
            continue
        assert len(samples) in (1, len(turns)), kind
        texts, seen = "", []
        for sample in samples:
            found = tokens.rendered(sample.text, sample.spans, sample.prompts, sample.exact_end)
            assert found.input_ids == tokenizer(sample.text, add_special_tokens=False)["input_ids"]
            seen.append(trained_text(tokenizer, found))
            texts += sample.text
            ends = [n for n, label in enumerate(found.labels) if label != -100]
            last = [n for n in ends if n + 1 not in ends]
            for end in last:  # where the loss stops, the model has produced a token that ends its turn
                while not tokenizer.decode([found.input_ids[end]]).strip():
                    end -= 1
                assert found.input_ids[end] in tokens.ends, (kind, seen)
            assert len(last) == (len(turns) if len(samples) == 1 else 1), (kind, seen)
        assert words_in(messages, tools) <= words_in(texts), kind
        own = [{**messages[turn], "role": ""} for turn in turns]
        assert words_in(own) == words_in(seen), kind
        if len(samples) > 1:
            assert [words_in(part) for part in own] == [words_in(part) for part in seen], kind


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_and_mask_are_those_of_transformers_and_of_trls_training_template(load, name):
    tokenizer = load(name)
    tokens = Tokens(tokenizer)
    renderer = Renderer(tokenizer, tokens)
    compared = 0
    for kind, (messages, tools) in CHATS.items():
        chat = Chat(copy.deepcopy(messages), tools)
        template = renderer.template(chat)
        turns = assistants(messages)
        try:
            samples = renderer.trained(chat, turns)
        except RowError:
            continue
        for turn, sample in zip(turns if len(samples) > 1 else turns[-1:], samples, strict=True):
            until = chat.until(turn + 1)
            text = tokenizer.apply_chat_template(template.fitted(until).messages, tools=tools, tokenize=False)
            found = tokens.rendered(sample.text, sample.spans, sample.prompts, sample.exact_end)
            extended = sample.text != text
            if extended and name == "glm4moe":  # it ends a turn with the name of the next role
                assert sample.text in (text + "<|user|>", text + "<|observation|>")
            elif extended:  # the template drops what the model must learn
                assert name == "deepseek_r1_distill" and kind in ("think in content",), kind
            if template.training is None:
                continue
            marked = tokenizer.apply_chat_template(
                template.fitted(until, True).messages, tools=tools, chat_template=template.training,
                return_dict=True, return_assistant_tokens_mask=True,
            )  # fmt: skip
            mask = [int(label != -100) for label in found.labels]
            if len(samples) == 1:
                assert found.input_ids == marked["input_ids"], kind
                assert mask == marked["assistant_masks"], kind
            else:  # earlier turns are context here: the last block is the turn
                block = sum(mask)
                assert mask[-block:] == marked["assistant_masks"][-block:] == [1] * block
                assert marked["assistant_masks"][-block - 1] == 0
                assert found.input_ids[-block:] == marked["input_ids"][-block:]
            compared += 1
    assert compared or renderer.template(chat).training is None


@pytest.mark.parametrize("name", TEMPLATES)
def test_turns_that_no_template_marks_are_found(load, name):
    """A comment makes a template unknown to TRL. The answers that are found are those of TRL's marks."""
    found = {}
    for added in ("", "{# unknown #}"):
        tokenizer = load(name)
        tokenizer.chat_template += added
        tokens = Tokens(tokenizer)
        renderer = Renderer(tokenizer, tokens)
        for kind, (messages, tools) in CHATS.items():
            chat = Chat(copy.deepcopy(messages), tools)
            assert not (added and renderer.template(chat).has_twin)
            try:
                samples = renderer.trained(chat, assistants(messages))
            except RowError as error:
                found.setdefault(kind, []).append(str(error)[:60])
                continue
            encoded = [tokens.rendered(s.text, s.spans, s.prompts, s.exact_end) for s in samples]
            found.setdefault(kind, []).append([trained_text(tokenizer, each).strip() for each in encoded])
    for kind, (marked, unmarked) in found.items():
        if name == "diffusion_gemma" and isinstance(marked, list) and "<|tool_call>" in marked[0]:
            continue  # TRL does not train the token that ends a call, and the start of the turn after it
        if name == "deepseek_r1_distill" and kind == "think in content":
            continue  # only TRL's template has the reasoning
        for one, other in zip(marked, unmarked, strict=True):
            assert plain(one) == plain(other), kind


@pytest.mark.parametrize("unknown", ["", "{# unknown #}"], ids=["known", "unknown"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_call_with_text_is_trained_completely(load, name, unknown):
    """Gemma 4 writes the text of a call after the tool's result, where the model does not write it."""
    tokenizer = load(name)
    tokenizer.chat_template += unknown
    tokens = Tokens(tokenizer)
    messages = copy.deepcopy(CHATS["tool call"][0])
    messages[1]["content"] = "Description0"
    try:
        samples = Renderer(tokenizer, tokens).trained(Chat(messages), [1, 3])
    except RowError:
        return
    encoded = [tokens.rendered(s.text, s.spans, s.prompts, s.exact_end) for s in samples]
    seen = [trained_text(tokenizer, each) for each in encoded]
    assert words_in(seen) == {"Description0", "look", "town", "Paris", "Answer1"}
    if len(seen) > 1:
        assert words_in(seen[0]) == {"Description0", "look", "town", "Paris"}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_tool_without_its_wrapper_is_rendered_completely(load, name):
    tokenizer = load(name)
    renderer = Renderer(tokenizer, Tokens(tokenizer))
    messages, tools = CHATS["tools column"]
    flat = [tool["function"] for tool in tools]
    texts = []
    for given in (tools, flat):
        try:
            texts.append("".join(sample.text for sample in renderer.trained(Chat(messages, given), [1, 3])))
        except RowError:
            texts.append("")
    assert words_in(texts[0]) == words_in(texts[1])


def plain(text):
    """Return a text without spaces, and without what some of TRL's marks have of the prompt."""
    bar, space = "\uff5c", "\u2581"
    names = (f"<{bar}Assistant{bar}>", f"<{bar}tool{space}outputs{space}end{bar}>", "<|start|>assistant")
    for part in (*names, "<think>", "</think>"):
        text = text.replace(part, "")
    return "".join(text.split())


def test_a_template_that_ends_no_turn_gets_eos(every_token):
    tokenizer = copy.copy(every_token)
    tokenizer.chat_template = (
        "{% for m in messages %}### {{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}### assistant: {% endif %}"
    )
    tokens = Tokens(tokenizer)
    messages, _ = CHATS["multi"]
    (sample,) = Renderer(tokenizer, tokens).trained(Chat(messages), [1, 3])
    found = tokens.rendered(sample.text, sample.spans, sample.prompts, sample.exact_end)
    assert trained_text(tokenizer, found).split() == ["Answer1", "Answer2", "</s>"]
    assert sample.notes == {ENDED}


def test_the_table_of_templates_in_the_docs_is_current():
    page = (REPO / "docs" / "data.md").read_text(encoding="utf-8")
    assert support_table() in page, "run make docs"


@pytest.mark.parametrize("name", TEMPLATES)
def test_arguments_as_text_are_rendered_like_the_object(load, name):
    """Where a template writes text as it is, the row's own text stays, and no template escapes it twice."""
    tokenizer = load(name)
    renderer = Renderer(tokenizer, Tokens(tokenizer))
    messages, _ = CHATS["call as last turn"]
    as_object, as_text = copy.deepcopy(messages), copy.deepcopy(messages)
    function = as_text[-1]["tool_calls"][0]["function"]
    function["arguments"] = '{"town": "Paris"}'
    try:
        (expected,) = renderer.trained(Chat(as_object), [1])
    except RowError:
        with pytest.raises(RowError):
            renderer.trained(Chat(as_text), [1])
        return
    (found,) = renderer.trained(Chat(as_text), [1])
    assert found.text == expected.text
    assert '\\"' not in found.text
