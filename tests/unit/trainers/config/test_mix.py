"""The sources of data.mix: what they take from data, their names and shares, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from inprocess import settings_of

from trainers.config.errors import ConfigError
from trainers.config.file import effective_text, load_settings
from trainers.config.mix import sources_of
from trainers.config.on_resume import why_refused

# The lines in the cases count from here: the first source begins in line 7, the second one in line 11.
GOOD = """\
task: llm-sft
data:
  valid_fraction: 0.2
  chat_template: chatml
  prompt_format: 'Q: {q}'
  mix:
    - path: rows/code.jsonl
      weight: 3
      column_mapping:
        text: answer
    - path: org/chat
      name: talk
      weight: 1
      valid_split: valid
      chat_template: null
"""


def test_a_source_takes_from_data_what_it_does_not_set(read_config):
    config = read_config(GOOD).train
    code, talk = sources_of(config)
    assert (code.name, code.weight, code.config.data_path) == ("code", 3, "rows/code.jsonl")
    assert (code.config.chat_template, code.config.valid_fraction) == ("chatml", 0.2)
    assert (talk.name, talk.config.chat_template, talk.config.valid_split) == ("talk", None, "valid")
    assert talk.config.prompt_format == "Q: {q}"
    # Keys that say the same thing are taken together.
    assert code.config.prompt_format is None and code.config.text_column == "answer"
    assert "text_column" not in talk.config.model_fields_set
    assert talk.config.valid_fraction == 0
    assert config.validates and not config.tests
    assert code.config.validates and code.config.mix is None


def test_the_ranks_read_the_same_sources(read_config, tmp_path):
    run = read_config(GOOD)
    (tmp_path / "config.json").write_text(effective_text(run.settings))
    again = load_settings(tmp_path / "config.json")
    assert again.train == run.train and again.notes == run.settings.notes
    assert sources_of(again.train) == sources_of(run.train)


def test_a_flag_gives_a_mix_as_json(read_config):
    mix = [{"path": "a/one"}, {"path": "b/one", "train_split": "more", "rows": 5}]
    config = read_config("task: llm-sft\n", mix=json.dumps(mix)).train
    assert [(s.name, s.rows) for s in sources_of(config)] == [("one_train", None), ("one_more", 5)]


def test_variables_are_replaced_in_a_source(read_config, monkeypatch):
    monkeypatch.setenv("PX_DATA", "/rows")
    [source] = sources_of(read_config("task: llm\ndata:\n  mix:\n    - path: ${PX_DATA}/a\n").train)
    assert source.config.data_path == "/rows/a"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("weight: 3", "weigth: 3", r"c.yaml:8: unknown key 'data.mix\[0\].weigth'. Did you mean 'weight'\?"),
        ("weight: 3", "weight: 0", r"c.yaml:8: data.mix\[0\].weight: 0 must be greater than 0"),
        ("weight: 3", "weight: true", r"c.yaml:8: data.mix\[0\].weight: True: a number is needed"),
        ("weight: 1", "rows: -1", r"c.yaml:13: data.mix\[1\].rows: -1 must be greater than or equal to 0"),
        ("weight: 1", "rows: 2\n      weight: 1", r"c.yaml:13: data.mix\[1\].rows: weight already sets"),
        (
            "      weight: 3\n",
            "",
            r"c.yaml:7: data.mix\[0\]: it has no weight and no rows, but data.mix\[1\]",
        ),
        ("weight: 3", "rows: 3", r"c.yaml:13: data.mix\[1\].weight: no other source has a weight"),
        ("text: answer", "texts: answer", r"c.yaml:10: unknown key 'data.mix\[0\].column_mapping.texts'"),
        ("name: talk", "name: a b", r"c.yaml:12: data.mix\[1\].name: 'a b' has a character"),
        ("name: talk", "name: nll", r"c.yaml:12: data.mix\[1\].name: eval_nll_loss is the name of another"),
        ("name: talk", "name: code", r"c.yaml:12: data.mix\[1\].name: data.mix\[0\] is also named 'code'"),
        ("path: org/chat\n      name: talk", "name: talk", r"c.yaml:11: data.mix\[1\].path: it is missing"),
        (
            "chat_template: null",
            "chat_template: chatmal",
            r"c.yaml:15: data.mix\[1\].chat_template: 'chatmal'",
        ),
        (
            "chat_template: chatml",
            "chat_template: x",
            r"^c.yaml:4: data.chat_template: 'x' does not exist[^\n]*$",
        ),
        ("valid_fraction: 0.2", "path: rows", r"c.yaml:3: data.path: data.mix \(c.yaml:6\) has the paths"),
        (
            "valid_split: valid",
            "valid_split: valid\n      valid_fraction: 0.1",
            r"c.yaml:15: data.mix\[1\].valid_fraction: valid_split already names the rows",
        ),
        (
            "weight: 3",
            "weight: 3\n      prompt_format: x",
            r"c.yaml:9: data.mix\[0\].prompt_format: it must name columns",
        ),
        (
            "path: org/chat",
            "path: https://me:hunter2@host/x",
            r"c.yaml:11: data.mix\[1\].path: .* has a secret",
        ),
    ],
)
def test_a_wrong_source_is_named_with_its_line(read_config, old, new, message):
    assert GOOD.count(old) == 1
    with pytest.raises(ConfigError, match=message):
        read_config(GOOD.replace(old, new))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[]", "it must be a list of sources"),
        ("{path: a}", "it must be a list of sources"),
        ("[{path: a, rows: 0}]", r"data.mix\[0\].rows: 0 means that it is only evaluated. It needs a valid"),
        ("[{path: a, rows: 0, valid_split: v}]", "no source is trained on, since all have rows: 0"),
        ("[a]", r"data.mix\[0\]: it must be a mapping of keys"),
        ("[{path: a, column_mapping: b}]", r"data.mix\[0\].column_mapping must be a mapping"),
        ("'[{'", "it must be a list, such as"),
    ],
)
def test_a_mix_that_is_no_list_of_sources_is_refused(read_config, value, message):
    with pytest.raises(ConfigError, match=f"c.yaml:3: .*{message}"):
        read_config(f"task: llm\ndata:\n  mix: {value}\n")


def test_each_mistake_has_a_line_of_its_own(read_config):
    text = GOOD.replace("weight: 3", "weight: x").replace("weight: 1", "weights: 1")
    with pytest.raises(ConfigError) as error:
        read_config(text)
    assert [line.split(" ")[0] for line in str(error.value).splitlines()] == ["c.yaml:8:", "c.yaml:13:"]


def templates(*names: str | None, **data: str | None) -> str | None:
    sources = [{"path": "p", "name": f"n{i}", "chat_template": name} for i, name in enumerate(names)]
    return settings_of(trainer="sft", mix=sources, **data).train.chat_template


def test_the_tokenizer_is_saved_with_the_template_of_the_sources():
    assert templates("chatml", None, "chatml") == "chatml"
    assert templates("chatml", "zephyr", chat_template="tokenizer") == "tokenizer"
    assert templates("chatml", chat_template=None) is None
    with pytest.raises(ConfigError, match=r"data.chat_template: the sources have different .*chatml, zephyr"):
        templates("chatml", None, "zephyr")


def test_a_template_that_is_taken_from_the_sources_is_not_given_to_them(tmp_path):
    settings = settings_of(trainer="sft", mix=[{"path": "a", "chat_template": "chatml"}, {"path": "b"}])
    (tmp_path / "config.json").write_text(effective_text(settings))
    again = load_settings(tmp_path / "config.json").train
    assert [source.config.chat_template for source in sources_of(again)] == ["chatml", None]


def test_a_key_without_effect_has_a_note():
    mix = [{"path": "a", "chat_template": None, "history": "last"}, {"path": "b", "chat_template": "chatml"}]
    notes = settings_of(trainer="sft", mix=mix, split_seed=3, system_prompt="x", text_column="t").notes
    assert "data.mix[0].history: has no effect, since chat_template is null." in notes
    assert "split_seed: has no effect, since valid_fraction and test_fraction are 0." in notes
    assert not any(note.startswith(("system_prompt", "text_column", "data.mix[1]")) for note in notes)
    mix = [{"path": "a", "column_mapping": {"text": "t"}}, {"path": "b", "prompt_format": "{q}"}]
    notes = settings_of(trainer="sft", mix=mix, text_column="u").notes
    assert "text_column: has no effect, since each source has its own." in notes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": 4}, r"mix.a.weight: it is 4.0, but 1.0 in the training of then"),
        ({"column_mapping": {"text": "t"}}, r"mix.a.column_mapping: it is .*, but null"),
        ({"name": "c"}, r"^mix: it is c, b, but a, b in the training of then. A resume cannot change this"),
        ({"path": "moved/a"}, None),
    ],
)
def test_a_resume_keeps_all_of_a_mix_but_the_paths(change, message):
    def config(**values):
        mix = [{"path": "a", "name": "a", "weight": 1, **values}, {"path": "b", "weight": 2}]
        return settings_of(trainer="sft", mix=mix).train

    why = why_refused("then", config().public(), config(**change))
    assert (why is None) == (message is None)
    assert message is None or re.search(message, why)


def test_a_run_without_a_mix_cannot_resume_one_that_has_it():
    with_mix = settings_of(trainer="sft", mix=[{"path": "a"}]).train
    without = settings_of(trainer="sft", data_path="a").train
    assert "mix: it is null, but a in" in str(why_refused("then", with_mix.public(), without))
    assert "mix: it is a, but null in" in str(why_refused("then", without.public(), with_mix))
    earlier = {name: value for name, value in without.public().items() if name != "mix"}
    assert why_refused("then", earlier, without) is None


def test_the_path_of_a_source_is_an_input_of_the_run(work: Path):
    from trainers.storage.run_place import check_place

    (work / "rows").mkdir()
    config = settings_of(
        trainer="sft", project_name="rows/run", mix=[{"path": "data"}, {"path": "rows"}]
    ).train
    with pytest.raises(ConfigError, match=r"rows/run lies inside data.mix\[1\].path"):
        check_place(Path("rows/run"), config)
