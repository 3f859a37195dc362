"""A mix on two ranks: the losses of each source are those of one process, and so are the steps."""

from __future__ import annotations

import json

import pytest
from inprocess import build
from ranks import BACKENDS, CONFIG

FLAGS = ["--packing", "bfd", "--eval-on-start", "--max-steps", "3", "--eval-steps", "3", "--save-steps", "3"]


@pytest.fixture(scope="module")
def config(bench):
    """A config with two sources of different lengths: the rows of the bench, and short ones."""
    short = bench.root / "short"
    short.mkdir()
    for split, count in (("train", 9), ("valid", 5)):
        rows = [{"prompt": f"Add {i}", "completion": f"It is {i}. " * (1 + i % 4)} for i in range(count)]
        (short / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    long = bench.root / "data"
    mix = f"  mix:\n  - {{name: long, path: {long}, rows: 24}}\n  - {{path: {short}, rows: 20}}\n"

    def write(name):
        text = CONFIG.format(model=bench.model, name=name, data=long)
        (bench.root / f"{name}.yaml").write_text(text.replace(f"  path: {long}\n", mix))

    return write


@pytest.fixture(scope="module")
def ran(bench, config):
    """ran(backend) returns that run of the mix, which the first call makes."""
    made = {}

    def run(backend):
        if backend not in made:
            name = f"mix-{backend}"
            command = bench.command(name, *BACKENDS[backend], *FLAGS)  # it writes a config, which is replaced
            config(name)
            made[backend] = bench.finish(name, command)
        assert made[backend].code == 0, made[backend].out + made[backend].err
        return made[backend]

    return run


@pytest.mark.parametrize(
    "backend", ["ddp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fsdp", "zero3"))]
)
def test_ranks_have_the_losses_of_one_process(bench, ran, tmp_path, backend):
    """In training, and in the evaluation of each source."""
    found, one = ran(backend), ran("one")
    assert found.losses == pytest.approx(one.losses, abs=1e-4)
    before, *_ = [entry for entry in found.metrics if "eval_loss" in entry]
    tokens = total = 0.0
    for name, path in (("long", bench.root / "data"), ("short", bench.root / "short")):
        alone = build(
            tmp_path,
            bench.model,
            trainer="sft",
            data_path=str(path),
            valid_split="valid",
            chat_template="tokenizer",
            prompt_text_column="prompt",
            text_column="completion",
            block_size=128,
        ).trainer
        loss = alone.evaluate()["eval_loss"]
        assert before[f"eval_{name}_loss"] == pytest.approx(loss, abs=1e-5)
        total, tokens = total + loss * alone._evaluated[1], tokens + alone._evaluated[1]
    assert before["eval_loss"] == pytest.approx(total / tokens, abs=1e-5)

    assert "train, long: 40 rows, 24 samples, 0.6 epochs, " in found.out
    assert "train, short: 9 rows, 20 samples, 2.22 epochs, " in found.out
    recorded = found.record["data"]["train"]["sources"]
    assert {name: counts["taken"] for name, counts in recorded.items()} == {"long": 24, "short": 20}
    card = (found.folder / "README.md").read_text()
    assert "| train, short |" in card and "| eval_short_loss |" in card
