"""The report as text: every fact in its section, rows with their marks, nothing that a terminal obeys."""

from __future__ import annotations

from rows import BAD, END, GOOD, PAIR, PROMPT, TURNS, Q, assistant, user

SECRET = "hf_canaryCanaryCanaryCanaryCanary"


def section(text, title):
    """Return the lines of a section."""
    return text.partition(f"# {title}")[2].split("\n\n")[0].splitlines()[1:]


def test_each_section_has_its_facts(text_of):
    rows = [{"text": word} for word in ("one", "two", "", "one")]
    rows = [*rows, {"text": "word " * 60}]
    text = text_of(rows, packing="bfd", block_size=64, notes=["block_size: a note"])
    assert section(text, "data")[0].startswith("train: 5 rows of ")
    assert section(text, "columns") == ["text  the text  its usual name  text"]
    assert section(text, "template")[1] == (
        "template   none: texts are joined as they are; chat_template: null (default)"
    )
    assert section(text, "notes") == ["block_size: a note"]
    assert "row 3: dropped: empty text" in section(text, "rows of train")
    assert section(text, "counts")[0].startswith("train: 5 rows in 2 packs, ")
    assert section(text, "counts")[1] == "train: dropped (empty text): row 3"
    assert section(text, "lengths of train")[0].endswith("99 % at most 64")
    assert section(text, "lengths of train")[1].endswith("█ 3")
    assert section(text, "packing of train")[0].startswith("packing: bfd, 2 packs of at most 64 tokens, ")
    assert section(text, "rows that repeat others") == [
        "train: 1 row is a duplicate of an earlier row: row 4 (as row 1)"
    ]


def test_only_the_first_rows_are_named(text_of):
    rows = [{"text": ""}] * 6 + [{"text": "one"}] * 7
    text = text_of(rows)
    named = "row 1, row 2, row 3, row 4, row 5, ..."
    assert section(text, "counts")[1] == f"train: dropped (empty text): {named}"
    assert section(text, "rows that repeat others")[0].endswith("row 12 (as row 7), ...")
    assert "..." not in "".join(section(text_of(rows[:5] + rows[6:12]), "counts"))


def test_rows_of_two_parts_are_named_with_their_numbers_in_the_file(text_of):
    rows = [{"text": f"Row {i % 2}."} for i in range(20)]
    lines = section(text_of(rows, valid_fraction=0.2, test_fraction=0.2), "rows that repeat others")
    assert lines[0].startswith("train: 10 rows are duplicates of an earlier row: row ")
    assert lines[0].endswith(", ...") and lines[0].count("(as row") == 5
    assert [line.partition(":")[0] for line in lines[1:]] == ["valid", "test", "test"]
    assert lines[1].startswith("valid: 4 rows are in train, too: row ")
    text = text_of([{"text": f"Row {i}."} for i in range(20)], valid_fraction=0.2)
    assert section(text, "rows that repeat others") == [
        "train: no row is a duplicate of an earlier row",
        "valid: no row is in train, too",
    ]


def test_what_the_loss_does_not_see_is_marked(text_of):
    rows = [{"messages": TURNS}]
    text = text_of(rows, chat_template="tokenizer")
    assert "text in ⟦ ⟧ is not in the loss" in text
    shown = f"⟦{PROMPT}⟧{GOOD}{END}⟦\n⟧".replace("\n", "\n  ")
    assert f"\n  {shown}\n" in text
    on_terminal = text_of(rows, terminal=True, chat_template="tokenizer")
    assert f"{GOOD}{END}\033[2m" in on_terminal and "⟦" not in on_terminal


def test_both_answers_and_all_samples_of_a_row_are_shown(text_of):
    text = text_of([PAIR], trainer="dpo")
    assert f"⟦{Q}⟧{GOOD}{END}" in text and f"⟦{Q}⟧{BAD}{END}" in text
    assert "row 1, chosen: " in text and "row 1, rejected: " in text
    assert "with both answers and the prompt of each" in text and "without padding" in text
    turns = [user(Q), assistant("One."), user(Q), assistant("Two.")]
    text = text_of([{"messages": turns}], chat_template="tokenizer", history="unroll")
    assert "row 1, sample 1 of 2: " in text and "row 1, sample 2 of 2: " in text


def test_a_row_cannot_control_the_terminal(text_of):
    hostile = "\x1b[2J\x1b]0;owned\x07 \u202eevil\x9b1m\r"
    text = text_of([{"text": hostile, "\x1b[31mred": "1"}])
    assert not {"\x1b", "\x07", "\x9b", "\r", "\u202e"} & set(text)
    assert r"\x1b[2J" in text and r"\u202eevil" in text and r"\x1b[31mred" in text


def test_the_middle_of_a_long_text_is_left_out(text_of):
    text = text_of([{"text": "begin " + "x" * 5000 + " end"}], block_size=8192)
    assert "begin xxx" in text and f"xxx end{END}" in text
    assert "[... 4" in text and len(text) < 3000


def test_facts_have_no_secrets_and_rows_are_as_they_are(text_of):
    text = text_of([{"text": f"My key is {SECRET}.", SECRET: "1"}])
    assert "not used: (hidden)" in text
    assert f"My key is {SECRET}." in text
