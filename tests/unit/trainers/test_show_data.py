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
from trainers.config.file import load_settings

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


@pytest.fixture
def mix(run, tmp_path):
    """`mix(*arguments)`: two sources, of which the second has columns and a template of its own."""

    def show(*arguments, rows=GOOD):
        Path("other").mkdir(exist_ok=True)
        write_split(Path("other/train.jsonl"), [{"q": Q, "a": "One process."}])
        run(rows, "--rows", "0", "--json")
        config = yaml.safe_load(Path("c.yaml").read_text())
        del config["data"]["path"]
        columns = {"prompt_text_column": "q", "text_column": "a"}
        other = {"path": "other", "chat_template": "zephyr", "column_mapping": columns}
        config["data"]["mix"] = [{"path": "data", "rows": 4}, other]
        Path("c.yaml").write_text(yaml.safe_dump(config))
        return show_data.main(["c.yaml", *arguments])

    return show


def test_the_rows_of_each_source_are_shown_and_its_cache_is_that_of_the_run(mix, capsys, monkeypatch):
    from trainers.data import prepare
    from trainers.data.mixing import prepare_all
    from trainers.model.tokenizer import load_tokenizer, tokenizers_of_sources

    assert mix() == 0
    out = capsys.readouterr().out
    assert (
        out.count("# notes") == 1 and "# rows of train of data" in out and "# rows of train of other" in out
    )
    assert "⟦<|im_start|>user" in out and "⟦<|user|>" in out
    assert (
        "q  the prompt      prompt_text_column (data.mix[1].column_mapping.prompt_text_column)  text" in out
    )
    assert "train  data    3     2        4            2 " in out

    monkeypatch.setattr(prepare, "_tokenize", lambda *_: pytest.fail("the run would encode the rows again"))
    config = load_settings(Path("c.yaml")).train
    tokenizer, _ = load_tokenizer(config)
    prepared = prepare_all(config, tokenizer, tokenizers_of_sources(config, tokenizer))["train"]
    assert mix("--json") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [list(row)[:2] for row in rows] == [["row", "source"]] * 4
    for name, source in prepared.sources.items():
        samples = [sample for row in rows if row["source"] == name for sample in row.get("samples", [])]
        assert [sample["input_ids"] for sample in samples] == source.dataset["input_ids"][:]


def test_only_the_rows_of_one_source_are_shown(mix, run, capsys):
    assert mix("--source", "other", "--json") == 0
    assert [json.loads(line)["source"] for line in capsys.readouterr().out.splitlines()] == ["other"]
    assert mix("--source", "data", "--rows", "1") == 0
    assert "# rows of train of other" not in (out := capsys.readouterr().out) and "train  other " in out
    assert mix("--source", "mine") == USAGE_ERROR
    assert capsys.readouterr().err == (
        "error: --source: there is no source 'mine' in data.mix. Allowed: data, other.\n"
    )
    code, _, err = run(GOOD, "--source", "data")
    assert code == USAGE_ERROR and err.startswith("error: --source: the config has no data.mix")


def test_a_source_with_a_wrong_row_is_named(mix, capsys):
    assert mix("--source", "other", rows=[GOOD[0], BAD]) == USAGE_ERROR
    out, err = capsys.readouterr()
    assert "# rows of train of other" in out and "train: cannot be prepared" in out
    assert err.startswith("error: data.mix[0] (data): data/train.jsonl: row 2: there is no role 'wizard'.")


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


def test_a_path_that_the_system_refuses_is_named_in_one_line(run):
    code, out, err = run(GOOD, "--html", f"{'x' * 300}.html")
    assert code == USAGE_ERROR and out == ""
    assert "error: xxx" in err and "File name too long" in err and "Traceback" not in err
