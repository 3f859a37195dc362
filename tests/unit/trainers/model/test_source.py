"""Where the files of a loaded model are."""

from __future__ import annotations

import pytest
from huggingface_hub import constants

from trainers.config.schema import TrainConfig
from trainers.model.source import model_folder


@pytest.mark.parametrize("revision", [None, "main", "v1", "c0ffee"])
def test_the_files_of_a_hub_model_are_those_of_its_commit(tmp_path, monkeypatch, revision):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    cache = tmp_path / "models--org--name"
    for commit, names in {"beef": ["main"], "c0ffee": ["v1"]}.items():
        (cache / "snapshots" / commit).mkdir(parents=True)
        (cache / "snapshots" / commit / "config.json").write_text("{}")
        (cache / "refs").mkdir(exist_ok=True)
        for name in names:
            (cache / "refs" / name).write_text(commit)
    commit = "beef" if revision in (None, "main") else "c0ffee"
    found = model_folder("org/name", TrainConfig(model="org/name", revision=revision))
    assert found == cache / "snapshots" / commit


def test_the_files_of_a_local_model_are_in_its_folder(tmp_path):
    assert model_folder(str(tmp_path), TrainConfig(model=str(tmp_path))) == tmp_path
