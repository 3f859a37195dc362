"""The example of a sample shows what is trained on and what is masked."""

from __future__ import annotations

from rows import BAD, END, GOOD, PAIR, Q

from trainers.data.preview import show_example


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
