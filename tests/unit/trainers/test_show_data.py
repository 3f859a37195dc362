"""`python -m trainers.show_data`: what it prints, writes and returns. tests/unit/launcher starts it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from inprocess import write_split
from rows import TURNS, Q

from trainers import show_data
from trainers.config.errors import DISK_FAILED, USAGE_ERROR

GOOD = [{"messages": TURNS}, {"messages": TURNS}, {"messages": [*TURNS[:1], {**TURNS[1], "content": " "}]}]
BAD = {"messages": [{"role": "wizard", "content": Q}]}

pytestmark = pytest.mark.usefixtures("own_process")


@pytest.fixture
def run(tmp_path, tiny_model, monkeypatch, capsys):
    """`run(rows, *arguments, **data)`: the exit code, the output and the errors."""
    monkeypatch.setenv("PHALANX_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def show(rows, *arguments, **data):
        Path("data").mkdir(exist_ok=True)
        write_split(Path("data/train.jsonl"), rows)
        config = {
            "task": "llm-sft",
            "base_model": str(tiny_model),
            "project_name": "run",
            "data": {"path": "data", "chat_template": "tokenizer", **data},
            "params": {"block_size": 128},
        }
        Path("c.yaml").write_text(yaml.safe_dump(config))
        code = show_data.main(["c.yaml", *arguments])
        return (code, *capsys.readouterr())

    return show


def test_it_prints_the_report_and_leaves_the_cache_of_the_run(run, tmp_path, monkeypatch):
    code, out, err = run(GOOD)
    assert (code, err) == (0, "")
    titles = [line for line in out.splitlines() if line.startswith("# ")]
    assert [title.split()[1] for title in titles] == [
        "data", "columns", "template", "notes", "rows", "counts", "lengths", "packing", "rows",
    ]  # fmt: skip
    assert "the tokenizer's own; chat_template: tokenizer (c.yaml:3)" in out
    names = sorted(path.name for path in (tmp_path / "cache" / "data").iterdir())
    assert len(names) == 2 and names[1] == f"{names[0]}.lock", "an entry, and nothing that was temporary"

    from trainers.data import prepare

    monkeypatch.setattr(prepare, "_tokenize", lambda *_: pytest.fail("the run would encode the rows again"))
    assert run(GOOD)[0] == 0


def test_json_prints_an_object_a_line_and_nothing_else(run, monkeypatch):
    from trainers.model import tokenizer

    load = tokenizer.load_tokenizer

    def talks(config):
        print("a library says something")
        return load(config)

    monkeypatch.setattr(tokenizer, "load_tokenizer", talks)
    code, out, err = run(GOOD, "--json")
    assert (code, err) == (0, "a library says something\n")
    rows = [json.loads(line) for line in out.splitlines()]
    assert [sorted(row) for row in rows] == [["row", "samples"], ["row", "samples"], ["dropped", "row"]]
    assert out.isascii()


@pytest.mark.parametrize(("asked", "shown"), [("0", 0), ("2", 2), ("-1", 9), ("99", 9)])
def test_as_many_rows_as_are_asked_for(run, asked, shown):
    _, out, _ = run(GOOD * 3, "--json", "--rows", asked)
    assert [json.loads(line)["row"] for line in out.splitlines()] == list(range(1, shown + 1))


def test_a_wrong_row_is_shown_and_is_an_error(run):
    code, out, err = run([GOOD[0], BAD, GOOD[1]])
    assert code == USAGE_ERROR
    assert "row 2: error: there is no role 'wizard'." in out and "row 3: " in out and "# counts" not in out
    assert err == (
        "error: 1 of the 3 rows shown has an error, so training would stop, and there are no counts. Fix the "
        "rows, or the config.\n"
    )
    code, out, err = run([GOOD[0], BAD, GOOD[1]], "--json")
    assert code == USAGE_ERROR and "1 of the 3 rows" in err
    assert [list(json.loads(line))[1] for line in out.splitlines()] == ["samples", "error", "samples"]
    code, out, err = run([GOOD[0], BAD], "--html", "page.html")
    assert code == USAGE_ERROR and "error: 1 of the 2 rows shown" in Path("page.html").read_text()


def test_a_wrong_row_that_is_not_shown_is_named(run):
    code, out, err = run([GOOD[0], BAD], "--rows", "1")
    assert code == USAGE_ERROR
    assert "train: cannot be prepared; the error says why" in out
    assert err == (
        "error: data/train.jsonl: row 2: there is no role 'wizard'. Allowed: system, user, assistant, tool.\n"
    )
    assert run([GOOD[0], BAD], "--rows", "1", "--json")[0] == 0, "no other row is asked for"


def test_a_wrong_row_of_another_part_leaves_the_facts_of_this_one(run):
    Path("data").mkdir()
    write_split(Path("data/dev.jsonl"), [BAD])
    code, out, err = run(GOOD, valid_split="dev")
    assert code == USAGE_ERROR
    assert "# lengths of train" in out and "valid: cannot be prepared" in out
    assert err.startswith("error: data/dev.jsonl: row 1: ")


def test_a_part_that_the_config_does_not_have_is_refused(run):
    code, out, err = run(GOOD, "--split", "valid")
    assert (code, out) == (USAGE_ERROR, "")
    assert err == (
        "error: --split: the config has no valid part. Set data.valid_split or data.valid_fraction, or give "
        "--split train.\n"
    )
    rows = [{"messages": [{**TURNS[0], "content": f"Question {i}?"}, TURNS[1]]} for i in range(10)]
    code, out, _ = run(rows, "--split", "valid", valid_fraction=0.2)
    assert code == 0 and out.startswith("# data\nvalid: 2 rows of data/train.jsonl\n")
    assert "# lengths of valid" in out and "train: no row is a duplicate" not in out


def test_a_page_is_written_and_named(run):
    code, out, err = run(GOOD, "--html", "pages/data.html")
    assert (code, out, err) == (0, "page: pages/data.html\n", "")
    assert "<svg" in Path("pages/data.html").read_text()
    Path("mine.html").write_text("mine")
    code, out, err = run(GOOD, "--html", "mine.html")
    assert code == USAGE_ERROR and "mine.html exists, and is no page of phalanx data" in err
    assert Path("mine.html").read_text() == "mine"


def test_it_ends_when_nobody_reads(run, monkeypatch):
    monkeypatch.setattr(show_data, "is_unread", lambda: True)
    for form in ([], ["--json"]):
        code, out, _ = run(GOOD, *form)
        assert code == 0 and "row 2" not in out and "# counts" not in out
    assert run(GOOD, "--html", "page.html")[0] == 0 and "row 2" in Path("page.html").read_text()


def test_output_that_is_lost_is_an_error(run, monkeypatch):
    monkeypatch.setattr(show_data, "has_lost_output", lambda: True)
    assert run(GOOD)[0] == DISK_FAILED


def test_a_full_disk_of_the_cache_is_named(run, monkeypatch):
    from datasets import builder

    monkeypatch.setattr(builder, "has_sufficient_disk_space", lambda *arguments, **named: False)
    code, _, err = run(GOOD)
    assert code == DISK_FAILED
    assert "error: the prepared data needs about " in err and "PHALANX_CACHE" in err
    assert [path.name for path in Path("cache/data").iterdir()] == []


def test_a_tokenizer_is_enough(run, tiny_model, tmp_path):
    folder = tmp_path / "tokenizer-only"
    folder.mkdir()
    for file in tiny_model.iterdir():
        if file.name not in ("config.json", "generation_config.json", "model.safetensors"):
            (folder / file.name).write_bytes(file.read_bytes())
    run(GOOD)
    config = yaml.safe_load(Path("c.yaml").read_text()) | {"base_model": str(folder)}
    Path("c.yaml").write_text(yaml.safe_dump(config))
    assert show_data.main(["c.yaml"]) == 0


@pytest.fixture
def mixed(run, tmp_path):
    """`mixed(*arguments, **data)` shows a mix of two sources, of which one names its columns."""

    def show(*arguments, **data):
        run(GOOD)
        write_split(Path("data/dev.jsonl"), GOOD[:1])
        answers = [{"q": Q, "a": "One process."}, {"q": Q, "a": "Two."}, {"q": "And?", "a": "Two."}]
        write_split(Path("answers.jsonl"), [*answers, {"messages": None, "q": "No", "a": " "}])
        source = {
            "column_mapping": {"prompt_text_column": "q", "text_column": "a"},
            "chat_template": "alpaca",
        }
        config = yaml.safe_load(Path("c.yaml").read_text())
        mix = [
            {"name": "talks", "path": "data", "valid_split": "dev", "weight": 1},
            {"name": "answers", "path": "answers.jsonl", "weight": 1, **source},
        ]
        config["data"] = {"chat_template": "tokenizer", "mix": mix, **data}
        Path("c.yaml").write_text(yaml.safe_dump(config))
        return show_data.main(["c.yaml", *arguments])

    return show


def test_a_source_of_a_mix_is_shown_with_its_own_columns_and_template(mixed, capsys):
    assert mixed("--source", "answers") == 0
    out = capsys.readouterr().out.rpartition("# data\n")[2]
    assert out.startswith("train, answers: 4 rows of answers.jsonl\n")
    assert "data.mix[1])" in out and "alpaca, which is part of Phalanx" in out
    assert "row 4: dropped: empty completion" in out
    assert "train, answers: dropped (empty completion): row 4\n" in out
    counts = [line.partition(": ")[0] for line in out.partition("# counts\n")[2].splitlines()]
    assert list(dict.fromkeys(counts))[:3] == ["train, talks", "train, answers", "train"]
    assert "if the source were alone" in out


def test_rows_of_a_source_are_compared_with_the_training_rows_of_all(mixed, capsys):
    assert mixed("--source", "talks", "--rows", "0") == 0
    lines = capsys.readouterr().out.rpartition("# rows that repeat others\n")[2].splitlines()
    assert lines == [
        "train, talks: 1 row is a duplicate of an earlier row: row 2 (as row 1)",
        "train, talks: no row is in train, answers, too",
        "valid, talks: 1 row is in train, talks, too: row 1 (as row 1)",
        "valid, talks: no row is in train, answers, too",
    ]


def test_a_source_that_is_only_evaluated_says_so(mixed, capsys):
    mix = [
        {"name": "talks", "path": "data"},
        {"name": "dev", "path": "data", "train_split": "dev", "valid_split": "dev", "rows": 0},
    ]
    said = "data.mix[1].rows: 0, so the run does not train on these rows."
    assert mixed("--source", "dev", mix=mix) == 0
    out = capsys.readouterr().out
    assert said in out and "# lengths" not in out.rpartition(said)[2]
    assert mixed("--source", "dev", "--split", "valid", mix=mix) == 0
    assert said not in capsys.readouterr().out


def test_json_of_a_source_has_its_rows(mixed, capsys):
    assert mixed("--source", "answers", "--json") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [row["row"] for row in rows] == [1, 2, 3, 4]
    assert "### Response:\nOne process.<|im_end|>" in rows[0]["samples"][0]["text"], "its own template"


def test_a_mix_needs_a_source_that_it_has(mixed, run, capsys):
    for arguments, message in (
        ([], "error: --source: is needed. The sources are: talks, answers.\n"),
        (["--source", "b"], "error: --source: there is no source 'b'. The sources are: talks, answers.\n"),
        (["--source", "answers", "--split", "valid"], "error: --split: the config has no valid part."),
    ):
        assert mixed(*arguments) == USAGE_ERROR
        assert message in capsys.readouterr().err
    code, _, err = run(GOOD, "--source", "a")
    assert code == USAGE_ERROR and "the config has no data.mix" in err


def test_a_wrong_row_of_another_source_is_named(mixed, capsys):
    source = {"name": "bad", "path": "bad.jsonl"}
    Path("bad.jsonl").write_text(json.dumps(BAD) + "\n")
    code = mixed("--source", "talks", mix=[{"name": "talks", "path": "data"}, source])
    out, err = capsys.readouterr()
    assert code == USAGE_ERROR
    assert "the mix: cannot be prepared; the error says why" in out
    assert "bad.jsonl: row 1: there is no role 'wizard'" in err
