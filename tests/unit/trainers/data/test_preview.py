"""The example of a sample shows what is trained on and what is masked."""

from __future__ import annotations

from chats import vocabularies
from rows import BAD, END, GOOD, PAIR, Q

from trainers.data.preview import show_example, shown_texts


def test_the_example_marks_what_is_masked(prepare, tokenizer):
    (row,) = prepare([{"prompt": f"{Q}\n", "completion": GOOD}]).dataset
    assert show_example(row, tokenizer, terminal=False) == f"example: ⟦{Q}\\n⟧{GOOD}{END}"
    assert show_example(row, tokenizer, terminal=True) == f"example: \033[2m{Q}\\n\033[0m{GOOD}{END}"


def test_the_example_of_a_pair_shows_both_answers(prepare, tokenizer):
    (row,) = prepare([PAIR], trainer="dpo").dataset
    assert show_example(row, tokenizer, terminal=False) == (
        f"example, chosen: ⟦{Q}⟧{GOOD}{END}\nexample, rejected: ⟦{Q}⟧{BAD}{END}"
    )


def test_the_example_of_kto_shows_whether_it_is_wanted(prepare, tokenizer):
    shown = {show_example(row, tokenizer, terminal=False) for row in prepare([PAIR], trainer="kto").dataset}
    assert shown == {
        f"example, completion (wanted): ⟦{Q}⟧{GOOD}{END}",
        f"example, completion (unwanted): ⟦{Q}⟧{BAD}{END}",
    }


def test_a_long_example_is_cut_and_shows_its_length(prepare, tokenizer):
    (row,) = prepare([{"text": "x" * 3000}], block_size=2048).dataset
    shown = show_example(row, tokenizer, terminal=False)
    assert len(shown) < 1100
    assert shown.endswith(f"... ({len(row['input_ids'])} tokens)")


def test_the_space_before_an_answer_is_shown():
    """SentencePiece decodes a part alone without the space before its first word."""
    own = vocabularies()["sentencepiece, metaspace first"]
    ids = own("What is a rank? One process.", add_special_tokens=False)["input_ids"]
    cut = next(n for n in range(1, len(ids)) if own.decode(ids[:n]).endswith("?"))
    assert own.decode(ids[cut:]).startswith("One"), "or this test shows nothing"
    sample = {"input_ids": ids, "labels": [-100] * cut + ids[cut:]}
    (text,) = shown_texts(sample, own)
    assert text.parts == [("What is a rank?", False), (" One process.", True)]


def test_a_character_in_both_parts_is_not_lost(tokenizer):
    """A character of several bytes may have a token in each part."""
    ids = tokenizer("日")["input_ids"]
    assert len(ids) == 3
    (text,) = shown_texts({"input_ids": ids, "labels": [-100, *ids[1:]]}, tokenizer)
    assert [trained for _, trained in text.parts] == [False, True]
    assert all(part for part, _ in text.parts)


def test_an_example_cannot_control_the_terminal(prepare, tokenizer):
    (row,) = prepare([{"text": "a\x1b[2Jb"}]).dataset
    assert show_example(row, tokenizer, terminal=True) == f"example: a\\x1b[2Jb{END}"
