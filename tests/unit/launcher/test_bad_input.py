"""A wrong config fails before a rank starts, with exit code 2, and nothing is written.

A short message says what is wrong, where, and how to fix it. Each case runs the real commands `train` and
`show`.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fakes import fake_checkpoint, fake_model, fake_run, listing, machine, run_command, write_rows

from launcher.plan.topology import Hardware

# The line numbers in the cases count from here.
GOOD = """\
task: llm-sft
base_model: model
project_name: run
log: none
backend: local
data:
  path: data
  train_split: train
  column_mapping:
    text_column: text
params:
  lr: 0.001
  model_max_length: 2048
"""
Refuse = Callable[..., None]


def spoil(old: str, new: str) -> str:
    """Return the good config with one part replaced."""
    assert GOOD.count(old) == 1
    return GOOD.replace(old, new)


def params(*lines: str) -> str:
    """Return the good config with parameters added, from line 14 on."""
    return GOOD + "".join(f"  {line}\n" for line in lines)


def section(name: str, *lines: str) -> str:
    """Return the good config with a section added: its name in line 14, its keys from line 15 on."""
    return f"{GOOD}{name}:\n" + "".join(f"  {line}\n" for line in lines)


@pytest.fixture
def refuse(
    work: Path,
    hardware: object,
    packages: object,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Refuse:
    """Return refuse(text, *words, flags=...): it checks that a config is refused with these words."""

    def check(text: str | None, *words: str, flags: tuple[str, ...] = (), lines: int = 2) -> None:
        if text is not None:
            (work / "c.yaml").write_text(text)
        messages = []
        for command in ("train", "show"):
            before = listing(work.parent)
            code = run_command([command, "c.yaml", *flags], monkeypatch)
            out, err = capsys.readouterr()
            assert (code, out) == (2, ""), err
            assert listing(work.parent) == before, "something was written"
            messages.append(err)
        message = messages[0]
        assert messages[1] == message, "show and train print different messages"
        check_message(message, lines)
        for word in words:
            assert word in message

    return check


def check_message(message: str, lines: int = 2) -> None:
    """Check that a message is one or two lines for a user, without Python's internals."""
    assert 1 <= len(message.splitlines()) <= lines, message
    assert all(line.startswith("error: ") for line in message.splitlines()), message
    assert all(len(line) < 400 for line in message.splitlines()), message
    for ugly in ("Traceback", "pydantic", "Errno", "<class", "NoneType", "None:"):
        assert ugly not in message, message


def test_the_good_config_is_good(work: Path, hardware: object, monkeypatch: pytest.MonkeyPatch) -> None:
    (work / "c.yaml").write_text(GOOD)
    before = listing(work.parent)
    assert run_command(["show", "c.yaml"], monkeypatch) == 0
    assert listing(work.parent) == before


def test_missing_file(refuse: Refuse) -> None:
    refuse(None, "c.yaml", "no such file", "examples/demo.yaml")


def test_a_directory_as_config(refuse: Refuse, work: Path) -> None:
    (work / "c.yaml").mkdir()
    refuse(None, "c.yaml", "is a folder")


def test_not_utf8(refuse: Refuse, work: Path) -> None:
    (work / "c.yaml").write_bytes(GOOD.encode() + b"# caf\xe9\n")
    refuse(None, "c.yaml:14", "not UTF-8")


@pytest.mark.parametrize("url", ["http://example.com/c.yaml", "https://example.com/c.yaml"])
def test_remote_config(
    work: Path, url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["train", url], monkeypatch) == 2
    message = capsys.readouterr().err
    check_message(message)
    assert "remote config is not read" in message
    assert "example.com/c.yaml" in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param("", ["c.yaml", "empty", "task, base_model"], id="empty"),
        pytest.param("# nothing\n", ["c.yaml", "empty"], id="only-a-comment"),
        pytest.param("- task: llm-sft\n", ["c.yaml:1", "mapping of keys", "not a sequence"], id="a-list"),
        pytest.param("llm-sft\n", ["c.yaml:1", "mapping of keys"], id="a-word"),
        pytest.param("task: [llm-sft\nlog: none\n", ["c.yaml:", "not valid YAML"], id="not-yaml"),
        pytest.param("task: llm-sft\n\tlog: none\n", ["c.yaml:2", "not valid YAML"], id="tab"),
        pytest.param("task: llm-sft\n---\ntask: llm-sft\n", ["c.yaml:2", "not valid YAML"],
                     id="two-documents"),
        pytest.param(spoil("0.001", "!!python/object:os.system x"), ["c.yaml:12", "not valid YAML"],
                     id="python-tag"),
        pytest.param(spoil("0.001", "2024-13-45"), ["c.yaml:12", "2024-13-45"], id="impossible-date"),
        pytest.param(spoil("0.001", "2024-01-01"), ["c.yaml:12", "params.lr", "not a number"], id="date"),
        pytest.param(spoil("log: none", "task: llm-sft"),
                     ["c.yaml:4", "'task' is given twice", "line 1"], id="twice"),
        pytest.param(params("lr: 0.1"), ["c.yaml:14", "'lr' is given twice", "line 12", "Keep one"],
                     id="param-twice"),
        pytest.param(spoil("task: llm-sft\n", ""), ["c.yaml", "'task' is missing", "llm-sft"], id="no-task"),
        pytest.param(params("<<: {seed: 1}"), ["c.yaml:14", "merge keys (<<)"], id="merge-key"),
        pytest.param(params("? [a, b]", ": 1"), ["c.yaml:14", "a key must be text"],
                     id="key-that-is-a-list"),
        pytest.param(params("seed: &x [*x]"), ["c.yaml:14", "nested"], id="alias-of-itself"),
        pytest.param("task: llm-sft\ndata: data\n", ["c.yaml:2", "data must be a mapping"],
                     id="section-that-is-a-word"),
        pytest.param(GOOD + "launch: [1]\n", ["c.yaml:14", "launch must be a mapping"],
                     id="section-that-is-a-list"),
    ],
)  # fmt: skip
def test_malformed_file(refuse: Refuse, text: str, words: list[str]) -> None:
    refuse(text, *words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param(GOOD + "lr: 1\n", ["c.yaml:14", "'lr'", "under 'params:'"], id="param-at-the-top"),
        pytest.param(GOOD + "learning_rate: 1\n", ["c.yaml:14", "under 'params:'"], id="alias-at-the-top"),
        pytest.param(spoil("base_model", "base_modle"), ["c.yaml:2", "Did you mean 'base_model'?"], id="top"),
        pytest.param(spoil("params", "parms"), ["c.yaml:11", "'parms'", "Did you mean 'params'?"],
                     id="section"),
        pytest.param(params("bach_size: 2"), ["c.yaml:14", "params.bach_size", "'batch_size'?"], id="param"),
        pytest.param(spoil("train_split", "trian_split"), ["c.yaml:8", "'train_split'?"], id="data"),
        pytest.param(spoil("text_column", "txt_column"), ["c.yaml:10", "'text_column'?"], id="column"),
        pytest.param(section("hub", "user_name: me"), ["c.yaml:15", "hub.user_name", "'username'?"],
                     id="hub"),
        pytest.param(section("launch", "num_procs: 2"),
                     ["c.yaml:15", "launch.num_procs", "'num_processes'?"], id="launch"),
        pytest.param(section("slurm", "partitoin: a"), ["c.yaml:15", "slurm.partitoin", "'partition'?"],
                     id="slurm"),
        pytest.param(section("hub", "zzz: 1"), ["c.yaml:15", "Valid: push_to_hub, token, username"],
                     id="nothing-near"),
        pytest.param(params("zzzzzz: 1"), ["c.yaml:14", "params.zzzzzz", "phalanx train --help"],
                     id="param-nothing-near"),
    ],
)  # fmt: skip
def test_unknown_key(refuse: Refuse, text: str, words: list[str]) -> None:
    refuse(text, "unknown key", *words)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("lr: fast", ["'fast' is not a number", "lr: 3e-05"]),
        ("lr: [1, 2]", ["params.lr", "[1, 2] is not a number"]),
        ("lr: true", ["params.lr", "true or false"]),
        ("lr: -1", ["params.lr", "-1 must be greater than or equal to 0"]),
        ("lr: .inf", ["params.lr", "finite"]),
        ("lr: .nan", ["params.lr"]),
        ("lr: null", ["params.lr", "null is not a number"]),
        ("lr: {a: 1}", ["params.lr", "is not a number"]),
        ("batch_size: two", ["params.batch_size", "'two' is not a whole number", "batch_size: 2"]),
        ("batch_size: 1.5", ["params.batch_size", "1.5 is not a whole number"]),
        ("batch_size: 0", ["params.batch_size", "greater than 0"]),
        ("batch_size: yes", ["params.batch_size", "true or false"]),
        ("seed: -1", ["params.seed", "greater than or equal to 0"]),
        ("seed: 4294967296", ["params.seed", "less than"]),
        ("warmup_ratio: 2", ["params.warmup_ratio", "less than or equal to 1"]),
        ("peft: maybe", ["params.peft", "'maybe' is not true or false"]),
        ("gradient_checkpointing: maybe", ["params.gradient_checkpointing", "true or false", "'maybe'"]),
        ("activation_checkpointing: some", ["'some' does not exist", "'selective' or 'offload'"]),
        ("packing: yes please", ["params.packing", "Allowed: 'auto', 'bfd', 'wrapped' or 'none'"]),
        ("mixed_precision: fp8", ["params.mixed_precision", "'fp8' does not exist", "'fp16' or 'bf16'"]),
        ("run_name: 5", ["params.run_name", "5 is not text", "quotes"]),
        ("distributed_backend: foo", ["params.distributed_backend", "'foo' does not exist", "'deepspeed'"]),
        ("trainer: ppo", ["c.yaml:14", "trainer: ppo contradicts task: sft", "c.yaml:1"]),
        ("block_size: long", ["params.block_size", "'long' is not a whole number"]),
        ("block_size: []", ["params.block_size", "is not a whole number"]),
        ("save_strategy: steps", ["save_strategy", "save_steps: 100"]),
        ("save_minutes: 0", ["params.save_minutes", "greater than 0"]),
    ],
)
def test_value(refuse: Refuse, line: str, words: list[str]) -> None:
    text = spoil("lr: 0.001", line + "\n  seed: 1") if line.startswith("lr") else params(line)
    where = "c.yaml:12" if line.startswith("lr") else "c.yaml:14"
    refuse(text, where, *words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (section("launch", "num_processes: many"), ["launch.num_processes", "not a whole number"]),
        (section("launch", "num_processes: 0"), ["launch.num_processes", "greater than 0"]),
        (section("launch", "zero_stage: 4"), ["launch.zero_stage", "less than or equal to 3"]),
        (section("launch", "sharding: all"), ["launch.sharding", "'all' does not exist", "'hybrid_shard'"]),
        (
            section("launch", "start: cold"),
            ["launch.start", "'cold' does not exist", "'warm' or 'accelerate'"],
        ),
        (section("launch", "max_restarts: -1"), ["launch.max_restarts", "greater than or equal to 0"]),
        (section("launch", "restart_on_nan: maybe"), ["launch.restart_on_nan", "true or false"]),
        (section("launch", "hang_timeout: -1"), ["launch.hang_timeout", "greater than or equal to 0"]),
        (section("launch", "offload: disk"), ["launch.offload", "Allowed: 'none' or 'cpu'"]),
        (section("launch", "main_process_port: 80"), ["launch.main_process_port", "greater than 1023"]),
        (section("launch", "main_process_ip: 'a b'"), ["launch.main_process_ip", "'a b'"]),
        (section("slurm", "time: 12:00:00"), ["slurm.time", "quotes"]),
        (section("slurm", "nodes: two"), ["slurm.nodes", "not a whole number"]),
        (section("slurm", 'partition: "gpu\\nrm"'), ["slurm.partition", "letters, digits"]),
        (section("slurm", 'partition: "gpu\\n"'), ["slurm.partition", "letters, digits"]),
        (section("slurm", "account: a b"), ["slurm.account", "letters, digits"]),
        (section("slurm", "job_name: a'b"), ["slurm.job_name", "letters, digits"]),
        (section("slurm", "qos: 'a;b'"), ["slurm.qos", "letters, digits"]),
    ],
)
def test_value_of_launch_and_slurm(refuse: Refuse, text: str, words: list[str]) -> None:
    refuse(text, "c.yaml:15", *words)


@pytest.mark.parametrize("task", ["text-classification", "llm-ppo", "sft", "null", "[llm-sft]"])
def test_task_that_does_not_exist(refuse: Refuse, task: str) -> None:
    refuse(spoil("llm-sft", task), "c.yaml:1", "does not exist. ", "Allowed: llm,", "llm-sft")


def test_backend_of_autotrains_cloud(refuse: Refuse) -> None:
    refuse(
        spoil("local", "spaces-a10g"), "c.yaml:5", "backend: spaces-a10g", "Allowed: local", "slurm/train.sh"
    )


def test_trainer_that_does_not_exist(refuse: Refuse) -> None:
    text = spoil("llm-sft", "llm") + "  trainer: ppo\n"
    refuse(text, "c.yaml:14", "params.trainer: 'ppo' does not exist", "'orpo', 'kto' or 'mlm'")


def test_tracker_that_does_not_exist(refuse: Refuse) -> None:
    refuse(
        spoil("log: none", "log: mlflow"), "c.yaml:4", "'mlflow' does not exist", "'tensorboard' or 'wandb'"
    )


@pytest.mark.parametrize(
    ("lines", "name", "bound"),
    [
        (["block_size: 4096"], "block_size", "model_max_length (2048)"),
        (["max_prompt_length: 4096", "block_size: -1"], "max_prompt_length", "model_max_length (2048)"),
        (["max_prompt_length: 600", "block_size: 512"], "max_prompt_length", "block_size (512)"),
        (
            ["max_completion_length: 4096", "block_size: -1"],
            "max_completion_length",
            "model_max_length (2048)",
        ),
        (["max_completion_length: 600", "block_size: 512"], "max_completion_length", "block_size (512)"),
    ],
)
def test_lengths(refuse: Refuse, lines: list[str], name: str, bound: str) -> None:
    refuse(params(*lines), "c.yaml:14", f"{name}: ", f"is above {bound}", f"Lower {name} or raise")


@pytest.mark.parametrize("size", [0, -2])
def test_block_size_that_is_not_a_length(refuse: Refuse, size: int) -> None:
    refuse(
        params(f"block_size: {size}"), "c.yaml:14", f"block_size: {size} is not a length", "Allowed: -1 or"
    )


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["quantization: int4"], ["quantization", "int4", "peft: true", "quantization: null"]),
        (["resume: true", "overwrite: true"], ["resume", "overwrite", "Choose one"]),
        (["push_to_hub: true"], ["push_to_hub", "username and token", "${HF_USERNAME}"]),
    ],
)
def test_pairs_of_parameters(refuse: Refuse, lines: list[str], words: list[str]) -> None:
    refuse(params(*lines), "c.yaml:14", *words)


@pytest.mark.parametrize(
    ("task", "lines", "words"),
    [
        ("sft", ["block_size: [64, 32]"], ["block_size", "for dpo, orpo, kto", "With sft give one number"]),
        ("reward", ["block_size: 64,32"], ["block_size", "With reward give one number"]),
        ("dpo", ["block_size: [64, 32, 16, 8]"],
         ["block_size", "at most three", "[block, max_prompt, max_completion]"]),
        ("dpo", ["block_size: [64, 128]"], ["max_prompt_length: 128 is above block_size (64)"]),
        ("dpo", ["block_size: [64, 32, 128]"], ["max_completion_length: 128 is above block_size (64)"]),
        ("dpo", ["loss_type: hings"], ["loss_type: 'hings' does not exist", "Allowed: sigmoid, hinge"]),
        ("dpo", ["loss_type: [sigmoid, kto]"], ["loss_type: 'kto' does not exist"]),
        ("kto", ["loss_type: sigmoid"], ["'sigmoid' does not exist", "Allowed: kto, apo_zero_unpaired"]),
        ("kto", ["loss_type: kto,apo_zero_unpaired"], ["loss_type: kto takes one loss"]),
        ("dpo", ["loss_type: exo_pair"], ["label_smoothing: exo_pair needs a value above 0", "0.001"]),
        ("kto", ["batch_size: 1"], ["batch_size: kto estimates a divergence", "Raise batch_size"]),
        ("dpo", ["peft: true", "quantization: null", "target_modules: q_proj,lm_head"],
         ["target_modules: lm_head", "never train", "Remove it"]),
        ("kto", ["peft: true", "quantization: null", "target_modules: [lm_head]"],
         ["target_modules: lm_head", "never train"]),
        ("reward", ["peft: true", "quantization: null", "target_modules: [q_proj, lm_head]"],
         ["target_modules: lm_head: a reward model has a score output and no lm_head", "all-linear"]),
        ("mlm", ["packing: bfd"], ["packing", "masked LM", "Use packing: none"]),
        ("mlm", ["packing: wrapped"], ["packing", "Use packing: none"]),
        *((task, ["quantization: int4"], ["quantization: int4 weights", "peft: true"])
          for task in ("generic", "reward", "dpo", "orpo", "kto", "mlm")),
    ],
)  # fmt: skip
def test_settings_that_a_trainer_does_not_support(
    refuse: Refuse, task: str, lines: list[str], words: list[str]
) -> None:
    refuse(params(*lines).replace("llm-sft", f"llm-{task}"), *words)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["valid_split: train", "valid_fraction: 0.1"],
         ["c.yaml:10", "valid_fraction", "valid_split already names"]),
        (["test_split: train", "test_fraction: 0.1"],
         ["c.yaml:10", "test_fraction", "test_split already names"]),
        (["valid_fraction: 0.5", "test_fraction: 0.5"], ["c.yaml:9", "no row to train on", "below 1"]),
        (["valid_fraction: 1"], ["c.yaml:9", "data.valid_fraction", "1 must be less than 1"]),
        (["test_fraction: -0.1"], ["c.yaml:9", "data.test_fraction", "greater than or equal to 0"]),
        (["valid_fraction: a tenth"], ["c.yaml:9", "data.valid_fraction", "not a number"]),
        (["split_seed: -1"], ["c.yaml:9", "data.split_seed", "greater than or equal to 0"]),
        (["prompt_format: 'Question'"], ["c.yaml:9", "prompt_format", "must name columns in braces"]),
        (["prompt_format: '{}'"], ["c.yaml:9", "prompt_format", "must name columns in braces"]),
        (["prompt_format: '{text.__class__}'"], ["c.yaml:9", "prompt_format", "'text.__class__'"]),
        (["prompt_format: '{text:d}'"], ["c.yaml:9", "prompt_format", "{text}"]),
        (["prompt_format: '{text!r}'"], ["c.yaml:9", "prompt_format", "{text}"]),
        (["prompt_format: '{text'"], ["c.yaml:9", "prompt_format", "Write a literal brace twice"]),
        (["prompt_format: '{question}'"],
         ["c.yaml:9", "data.prompt_format", "no column 'question'", "The columns are: text"]),
        (["chat_template: llama"], ["c.yaml:9", "data.chat_template", "'llama' does not exist", "'phi3'"]),
    ],
)  # fmt: skip
def test_data_section(refuse: Refuse, lines: list[str], words: list[str]) -> None:
    more = "".join(f"\n  {line}" for line in lines)
    refuse(spoil("train_split: train", f"train_split: train{more}"), *words)


def test_a_prompt_that_is_given_twice(refuse: Refuse) -> None:
    text = spoil("text_column: text", "text_column: text\n    prompt_text_column: text")
    refuse(text.replace("train_split: train", "train_split: train\n  prompt_format: '{text}'"),
           "c.yaml:9", "prompt_format", "prompt_text_column already names the prompt")  # fmt: skip


def test_code_from_the_hub_that_is_not_pinned(refuse: Refuse) -> None:
    text = params("trust_remote_code: true").replace("base_model: model", "base_model: org/model")
    refuse(text, "c.yaml:14", "trust_remote_code", "must be pinned", "Set revision")


def test_eval_steps_are_missing(refuse: Refuse, work: Path) -> None:
    write_rows(work / "data" / "valid.jsonl", {"text": "one"})
    text = (
        spoil("train_split: train\n", "train_split: train\n  valid_split: valid\n")
        + "  eval_strategy: steps\n"
    )
    refuse(text, "c.yaml:15", "eval_strategy", "eval_steps: 100")


def test_two_spellings_in_the_file(refuse: Refuse) -> None:
    refuse(
        params("learning_rate: 0.1"), "c.yaml:14", "learning_rate: 0.1 contradicts", "lr: 0.001", "c.yaml:12"
    )


def test_two_spellings_as_flags(refuse: Refuse) -> None:
    refuse(
        GOOD, "flag --learning-rate", "contradicts", "flag --lr", flags=("--lr", "1", "--learning-rate", "2")
    )


def test_a_param_and_its_opposite(refuse: Refuse) -> None:
    text = params("disable_gradient_checkpointing: true", "gradient_checkpointing: true")
    words = ("gradient_checkpointing: true contradicts", "disable_gradient_checkpointing: true")
    refuse(text, "c.yaml:15", *words, "c.yaml:14", "Keep one")


def test_two_tokens_are_not_printed(refuse: Refuse, work: Path, capsys: pytest.CaptureFixture[str],
                                    monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    (work / "c.yaml").write_text(params("token: hf_first") + "hub:\n  token: hf_second\n")
    assert run_command(["show", "c.yaml"], monkeypatch) == 2
    message = capsys.readouterr().err
    check_message(message)
    assert "contradicts" in message
    assert "hf_" not in message


def test_a_bad_token_is_not_printed(refuse: Refuse, work: Path, capsys: pytest.CaptureFixture[str],
                                    monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    (work / "c.yaml").write_text(params("token: [hf_secret]"))
    assert run_command(["show", "c.yaml"], monkeypatch) == 2
    message = capsys.readouterr().err
    check_message(message)
    assert "params.token" in message
    assert "hf_" not in message


@pytest.mark.parametrize(
    "text", [spoil("path: data", "path: ${PX_NOT_SET}"), spoil("path: data", "path: a/${PX_NOT_SET}")]
)
def test_variable_that_is_not_set(refuse: Refuse, text: str) -> None:
    refuse(text, "c.yaml:7", "PX_NOT_SET is not set", "Export it")


def test_hub_variable_inside_a_word(refuse: Refuse) -> None:
    refuse(section("hub", "username: me-${PX_NOT_SET}"), "c.yaml:15", "PX_NOT_SET is not set")


@pytest.mark.parametrize(
    "name",
    ["../x", "/tmp/phalanx-outside", ".", "runs/../..", "'a b'", "x;y", '"x\\ny"', "'-x'", "$x", "~/x"],
)
def test_project_name_that_is_not_a_plain_path_inside(refuse: Refuse, name: str) -> None:
    refuse(
        spoil("project_name: run", f"project_name: {name}"),
        "c.yaml:3",
        "project_name",
        "Allowed: letters",
        "my-run",
    )


def test_empty_project_name(refuse: Refuse) -> None:
    refuse(spoil("project_name: run", "project_name: ''"), "c.yaml:3", "project_name", "at least 1 character")


def test_project_name_through_a_link(refuse: Refuse, work: Path) -> None:
    (work.parent / "elsewhere").mkdir()
    (work / "run").symlink_to(work.parent / "elsewhere")
    refuse(GOOD, "c.yaml:3", "not a plain path inside the working folder")


@pytest.mark.parametrize("made", ["run", "run/deeper"])
def test_project_name_that_is_a_file(refuse: Refuse, work: Path, made: str) -> None:
    (work / "run").write_text("a file")
    refuse(spoil("project_name: run", f"project_name: {made}"), "c.yaml:3", "run is a file", "another name")


@pytest.mark.parametrize(
    "left", ["run.json", "launch/attempt-1/command.txt", "checkpoint-5/model.safetensors"]
)
def test_folder_that_holds_another_run(refuse: Refuse, work: Path, left: str) -> None:
    (work / "run" / left).parent.mkdir(parents=True)
    (work / "run" / left).write_text("{}")
    refuse(GOOD, "c.yaml:3", "run already contains a run", "--resume", "--overwrite", "another project_name")


def test_folder_in_which_a_run_is_going(refuse: Refuse, work: Path) -> None:
    (work / "run").mkdir()
    (work / "run" / "run.json").write_text("{}")
    program = "import sys; from pathlib import Path; from trainers.storage.folder_lock import lock_folder\n"
    program += "lock_folder(Path(sys.argv[1])); print('locked', flush=True); sys.stdin.read()"
    argv = [sys.executable, "-c", program, str(work / "run")]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "locked\n"
        refuse(
            GOOD, "c.yaml:3", "run is in use by another run", f"process {other.pid} on", "Wait until it ends"
        )
        other.communicate("")


def test_base_model_that_is_an_adapter(refuse: Refuse, work: Path) -> None:
    adapter = work / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").touch()
    refuse(spoil("base_model: model", "base_model: ./adapter"), "c.yaml:2", "is an adapter", "merge_adapter")


def test_resume_without_the_model_folder_of_the_last_start(refuse: Refuse, work: Path) -> None:
    """A name without a slash at its start may also be an id on the hub, of another model."""
    fake_checkpoint(work / "run", 5)
    (work / "run" / "run.json").write_text('{"config": {}, "model_folders": ["models/base"]}')
    refuse(
        spoil("base_model: model", "base_model: models/base"),
        "c.yaml:2",
        "the folder models/base is gone since the last start",
        flags=("--resume",),
    )


def test_resume_without_a_checkpoint(refuse: Refuse) -> None:
    refuse(GOOD, "flag --resume", "there is no run in run", "Start without --resume", flags=("--resume",))


def test_resume_from_an_unfinished_checkpoint(refuse: Refuse, work: Path) -> None:
    (work / "run" / "checkpoint-5").mkdir(parents=True)
    refuse(
        params("resume: run/checkpoint-5"),
        "c.yaml:14",
        "run/checkpoint-5 cannot be used: it has no manifest.json, so its save did not finish",
        "resume: true uses the newest checkpoint that verifies",
    )


def test_resume_from_a_checkpoint_that_lost_a_file(refuse: Refuse, work: Path) -> None:
    (fake_checkpoint(work / "run", 5) / "model.safetensors").unlink()
    refuse(params("resume: run/checkpoint-5"), "c.yaml:14", "model.safetensors is missing")


def test_resume_from_a_folder_that_is_not_a_checkpoint(refuse: Refuse) -> None:
    refuse(
        params("resume: model"), "c.yaml:14", "model is not a checkpoint", "a folder checkpoint-N of a run"
    )


def test_resume_of_a_run_none_of_whose_checkpoints_verifies(refuse: Refuse) -> None:
    (fake_run("run") / "checkpoint-5").mkdir()
    refuse(
        GOOD,
        "no checkpoint in run can be used",
        "run/checkpoint-5: it has no manifest.json",
        "another project_name",
        "--overwrite",
        flags=("--resume",),
    )


def test_model_path_that_does_not_exist(refuse: Refuse) -> None:
    for path in ("./nowhere", "/nowhere", "a/b/c"):
        refuse(
            spoil("base_model: model", f"base_model: {path}"),
            "c.yaml:2",
            "base_model",
            f"{path} does not exist",
            "hub id",
        )


def test_model_folder_without_config(refuse: Refuse, work: Path) -> None:
    (work / "model" / "config.json").unlink()
    refuse(GOOD, "c.yaml:2", "base_model", "model has no config.json")


def test_model_folder_without_weights(refuse: Refuse, work: Path) -> None:
    (work / "model" / "model.safetensors").unlink()
    refuse(GOOD, "c.yaml:2", "base_model", "model has no weights", "*.safetensors or pytorch_model*.bin")


@pytest.mark.parametrize(
    "content",
    [b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", b"\x05" + b"\0" * 7 + b"hello"],
)
@pytest.mark.parametrize("ranks", ["1", "2"])
def test_weights_that_are_not_safetensors(refuse: Refuse, work: Path, content: bytes, ranks: str) -> None:
    (work / "model" / "model.safetensors").write_bytes(content)
    words = ("c.yaml:2", "base_model", "model.safetensors", "not a safetensors file", "Git LFS")
    refuse(GOOD, *words, flags=("--num-processes", ranks))


def test_no_data_at_all(refuse: Refuse, work: Path) -> None:
    (work / "data").rename(work / "rows")  # `data` is the default
    refuse(GOOD.split("data:")[0], "data.path", "is missing", "--data-path")


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere", "nowhere.jsonl", "a/b/c"])
def test_data_path_that_does_not_exist(refuse: Refuse, path: str) -> None:
    refuse(
        spoil("path: data", f"path: {path}"),
        "c.yaml:7",
        "data.path",
        f"{path} does not exist",
        "dataset id on the hub",
    )


def test_home_of_a_user_that_does_not_exist(refuse: Refuse) -> None:
    refuse(spoil("path: data", "path: ~nobody-here/x"), "c.yaml:7", "data.path", "does not exist")


MIX = """\
  mix:
    - path: data
      column_mapping:
        text_column: text
    - path: more
"""


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("- path: more", "- path: ./missing", ("c.yaml:11", "data.mix[1].path", "./missing does not exist")),
        (
            "- path: more",
            "- path: more\n      valid_split: dev",
            ("c.yaml:12: data.mix[1].valid_split", "'dev'"),
        ),
        (
            "text_column: text",
            "text: words",
            ("c.yaml:10: data.mix[0].column_mapping.text_column", "words"),
        ),
        (
            "- path: more",
            "- path: bad",
            ("c.yaml:11: data.mix[1] (bad): bad/train.jsonl:1", "not valid JSON"),
        ),
        ("- path: more", "- path: run/more", ("data.mix[1].path", "contains", "Give another project_name")),
    ],
)
def test_a_source_of_a_mix(refuse: Refuse, work: Path, old: str, new: str, words: tuple[str, ...]) -> None:
    for folder in ("more", "run/more"):
        write_rows(work / folder / "train.jsonl", {"text": "x"})
    (work / "bad").mkdir()
    (work / "bad" / "train.jsonl").write_text("{")
    text = GOOD.replace("  path: data\n  train_split: train\n  column_mapping:\n    text_column: text\n", MIX)
    assert text.count(old) == 1
    refuse(text.replace(old, new), *words)


def test_data_file_of_another_kind(refuse: Refuse, work: Path) -> None:
    (work / "rows.xlsx").write_text("x")
    refuse(
        spoil("path: data", "path: rows.xlsx"),
        "c.yaml:7",
        "rows.xlsx",
        "Allowed: .csv, .jsonl, .json, .parquet",
    )


def test_folder_without_the_split(refuse: Refuse, work: Path) -> None:
    write_rows(work / "data" / "test.jsonl", {"text": "x"})
    (work / "data" / "notes.txt").write_text("not data")
    text = spoil("train_split: train", "train_split: training")
    refuse(
        text,
        "c.yaml:8",
        "data.train_split",
        "no split 'training'",
        "Found: test.jsonl, train.jsonl",
        "data/training.jsonl",
    )


def test_folder_with_nothing(refuse: Refuse, work: Path) -> None:
    (work / "data" / "train.jsonl").unlink()
    refuse(GOOD, "data.train_split", "Found: nothing")


def test_valid_split_that_does_not_exist(refuse: Refuse) -> None:
    text = spoil("train_split: train", "train_split: train\n  valid_split: valid")
    refuse(text, "c.yaml:9", "data.valid_split", "Found: train.jsonl")


def test_valid_split_of_a_single_file(refuse: Refuse) -> None:
    text = spoil("path: data", "path: data/train.jsonl").replace(
        "train_split: train", "train_split: train\n  valid_split: valid"
    )
    refuse(text, "data.path", "one file", "no split 'valid'", "valid_fraction: 0.1")


def test_test_split_of_a_single_file(refuse: Refuse) -> None:
    text = spoil("path: data", "path: data/train.jsonl").replace(
        "train_split: train", "train_split: train\n  test_split: test"
    )
    refuse(text, "data.path", "one file", "no split 'test'", "test_fraction: 0.1")


@pytest.mark.parametrize("mapping", ["text_column: body", "prompt_text_column: ask"])
def test_column_that_does_not_exist(refuse: Refuse, work: Path, mapping: str) -> None:
    write_rows(work / "data" / "train.jsonl", {"text": "x", "label": 1})
    name = mapping.split(": ")[1]
    refuse(
        spoil("text_column: text", mapping),
        "c.yaml:10",
        "data.column_mapping",
        f"no column '{name}'",
        "text, label",
    )


@pytest.mark.parametrize(
    ("task", "row", "words"),
    [
        ("sft", {"prompt": "p"}, ["text_column", "no column 'text'", "The columns are: prompt"]),
        ("generic", {"completion": "c"}, ["text_column", "no column 'text'"]),
        ("mlm", {"body": "b"}, ["text_column", "no column 'text'"]),
        *((task, {"prompt": "p", "rejected": "r"}, ["text_column", "no column 'chosen'"])
          for task in ("reward", "dpo", "orpo", "kto")),
        *((task, {"prompt": "p", "chosen": "c"}, ["rejected_text_column", "no column 'rejected'"])
          for task in ("reward", "dpo", "orpo", "kto")),
        ("kto", {"prompt": "p", "completion": "c"}, ["label_column", "no column 'label'"]),
        ("kto", {"prompt": "p", "label": True}, ["text_column", "no column 'text'"]),
    ],
)  # fmt: skip
def test_column_that_a_trainer_needs(
    refuse: Refuse, work: Path, task: str, row: dict[str, object], words: list[str]
) -> None:
    write_rows(work / "data" / "train.jsonl", row)
    text = spoil("  column_mapping:\n    text_column: text\n", "").replace("llm-sft", f"llm-{task}")
    refuse(text, "data.column_mapping", *words)


def test_no_text_column(refuse: Refuse, work: Path) -> None:
    write_rows(work / "data" / "train.jsonl", {"body": "x"})
    refuse(
        spoil("  column_mapping:\n    text_column: text\n", ""), "no column 'text'", "The columns are: body"
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train.jsonl", ""),
        ("train.jsonl", "\n\n"),
        ("train.csv", ""),
        ("train.csv", "text,label\n"),
        ("train.json", "[]"),
    ],
)
def test_empty_split(refuse: Refuse, work: Path, name: str, content: str) -> None:
    (work / "data" / "train.jsonl").unlink()
    (work / "data" / name).write_text(content)
    refuse(GOOD, "c.yaml:8", "data.train_split", "'train' is empty", name, "at least one row")


def test_empty_parquet(refuse: Refuse, work: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (work / "data" / "train.jsonl").unlink()
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), work / "data" / "train.parquet")
    refuse(GOOD, "c.yaml:8", "'train' is empty", "train.parquet")


def test_parquet_file_with_other_content(refuse: Refuse, work: Path) -> None:
    (work / "data" / "train.jsonl").rename(work / "data" / "train.parquet")
    refuse(GOOD, "train.parquet", "not a Parquet file")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        pytest.param("train.jsonl", b'{"text": "a"}\n{"text": \n{"text": "c"}\n',
                     [":2", "not valid JSON", "Fix or remove"], id="half-a-row"),
        pytest.param("train.jsonl", b'{"text": "a"}\n\n["b"]\n', [":3", "must be an object", "not list"],
                     id="row-that-is-a-list"),
        pytest.param("train.jsonl", b'{"text": "a"}\n5\n', [":2", "must be an object", "not int"],
                     id="row-that-is-a-number"),
        pytest.param("train.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', [":2", "not UTF-8"],
                     id="jsonl-not-utf8"),
        pytest.param("train.json", b'[{"text": "a"},\n {"text": }]', [":2", "not valid JSON"],
                     id="broken-array"),
        pytest.param("train.json", b'[{"text": "a"}, "b"]', ["row 2", "must be an object", "not str"],
                     id="array-of-words"),
        pytest.param("train.csv", b"text,n\na,1\nb,2,3\n",
                     [":3", "more fields than the header (2)", "Quote"], id="csv-fields"),
        pytest.param("train.csv", b"text\ncaf\xe9\n", ["not UTF-8"], id="csv-not-utf8"),
    ],
)  # fmt: skip
def test_row_that_cannot_be_read(
    refuse: Refuse, work: Path, name: str, content: bytes, words: list[str]
) -> None:
    (work / "data" / "train.jsonl").unlink()
    (work / "data" / name).write_bytes(content)
    refuse(GOOD, f"data/{name}", *words)


@pytest.mark.parametrize(
    ("found", "flags", "words"),
    [
        (machine(), ["--num-processes", "3", "--num-machines", "2", "--main-process-ip", "h"],
         ["launch.num_processes", "3 ranks", "2 machines", "a multiple of 2"]),
        (machine(), ["--machine-rank", "1"], ["launch.machine_rank", "1 does not exist", "Allowed: 0 to 0"]),
        (machine(), ["--num-machines", "2"], ["launch.main_process_ip", "--main-process-ip"]),
        (machine(gpus=1), ["--num-processes", "2"],
         ["launch.num_processes", "its 1 visible GPU.", "num_processes up to 1"]),
        (machine(gpus=2), ["--num-processes", "3"],
         ["launch.num_processes", "its 2 visible GPUs.", "up to 2"]),
        (machine(gpus=2), ["--num-processes", "8", "--num-machines", "2", "--main-process-ip", "h"],
         ["launch.num_processes", "its 2 visible GPUs", "up to 4"]),
    ],
)  # fmt: skip
def test_ranks_that_do_not_fit_the_machines(
    refuse: Refuse, hardware: Callable[[Hardware], None], found: Hardware, flags: list[str], words: list[str]
) -> None:
    hardware(found)
    refuse(GOOD, *words, flags=tuple(flags))


TWO = ["--num-processes", "2"]
GPUS = machine(gpus=2)
OLD = machine(gpus=2, capability=(7, 5))
PAIRS = [
    (machine(), [*TWO, "--distributed-backend", "none"],
     ["distributed_backend", "Use ddp, or num_processes: 1"]),
    (machine(), [*TWO, "--distributed-backend", "ddp", "--zero-stage", "2"],
     ["launch.zero_stage", "deepspeed"]),
    (machine(), [*TWO, "--distributed-backend", "ddp", "--sharding", "full_shard"],
     ["launch.sharding", "fsdp"]),
    (machine(), [*TWO, "--distributed-backend", "ddp", "--offload", "cpu"],
     ["launch.offload", "offload: none"]),
    (machine(), ["--offload", "cpu"], ["launch.offload", "only fsdp and deepspeed"]),
    (machine(), [*TWO, "--distributed-backend", "deepspeed", "--zero-stage", "1", "--offload", "cpu"],
     ["launch.offload", "zero_stage: 2"]),
    (machine(), [*TWO, "--distributed-backend", "fsdp", "--sharding", "hybrid_shard"],
     ["launch.sharding", "across machines", "Use full_shard"]),
    (GPUS, [*TWO, "--distributed-backend", "fsdp", "--peft", "--quantization", "int8"],
     ["quantization", "int8", "Use int4, distributed_backend: ddp"]),
    (GPUS, [*TWO, "--distributed-backend", "deepspeed", "--peft", "--quantization", "int8"],
     ["quantization", "int8"]),
    (machine(), [*TWO, "--distributed-backend", "ddp", "--peft", "--quantization", "int8"],
     ["quantization", "int8", "num_processes: 1"]),
    (machine(), ["--mixed-precision", "fp16"], ["mixed_precision", "CPU", "mixed_precision: null"]),
    (machine(cpu_bf16=False), ["--mixed-precision", "bf16"],
     ["mixed_precision", "bf16", "mixed_precision: null"]),
    (OLD, ["--mixed-precision", "bf16"], ["mixed_precision", "8.0", "mixed_precision: fp16"]),
    (machine(), ["--use-flash-attention-2"],
     ["use_flash_attention_2", "no GPU", "use_flash_attention_2: false"]),
    (GPUS, ["--use-flash-attention-2"], ["use_flash_attention_2", "mixed_precision: bf16"]),
    (OLD, ["--use-flash-attention-2", "--mixed-precision", "fp16"], ["use_flash_attention_2", "8.0"]),
    (machine(), ["--attention", "varlen"], ["attention", "there is no GPU", "attention: auto"]),
    (GPUS, ["--attention", "eager", "--use-flash-attention-2", "--mixed-precision", "bf16"],
     ["attention", "use_flash_attention_2", "Keep one of the two"]),
    (machine(), ["--activation-checkpointing", "offload"],
     ["activation_checkpointing", "in host memory already", "Use full"]),
    (GPUS, [*TWO, "--distributed-backend", "deepspeed", "--peft", "--activation-checkpointing", "selective"],
     ["activation_checkpointing", "not reentrant", "trl#2514", "launch.zero_stage: 2"]),
    (machine(), [*TWO, "--distributed-backend", "deepspeed", "--torch-compile"],
     ["torch_compile", "compiles again for every layer", "launch.zero_stage: 2"]),
    (machine(), ["--use-kernels"], ["use_kernels", "GPUs", "Use use_kernels: false"]),
    (machine(), ["--use-liger-kernel"], ["--use-liger-kernel: use_kernels: ", "GPUs"]),
    (machine(), ["--optimizer", "adam"], ["optimizer", "'adam' cannot be used", "adamw_torch"]),
    (machine(), ["--scheduler", "warmup_stable_decay"],
     ["scheduler", "cannot be used", "nearest names", "constant_with_warmup"]),
    (machine(), ["--optimizer", "paged_adamw_8bit"], ["optimizer", "full GPU", "without paged_"]),
    *((machine(), [*TWO, "--distributed-backend", "fsdp", "--optimizer", name],
       ["optimizer", "weights that fsdp has sharded", "another distributed_backend"])
      for name in ("adamw_8bit", "lion_32bit", "adafactor", "adagrad")),
    (machine(), [*TWO, "--distributed-backend", "deepspeed", "--optimizer", "adafactor"],
     ["optimizer", "rows and columns", "distributed_backend: ddp"]),
    (machine(), [*TWO, "--distributed-backend", "deepspeed", "--optimizer", "adagrad"],
     ["optimizer", "before DeepSpeed", "distributed_backend: ddp"]),
    (GPUS, ["--optimizer", "galore_adamw"], ["optimizer", "optim_target_modules", "Use adamw_torch"]),
    (machine(), [*TWO, "--unsloth"], ["unsloth", "several ranks", "unsloth: false"]),
]  # fmt: skip


@pytest.mark.parametrize(("found", "flags", "words"), PAIRS, ids=[" ".join(flags) for _, flags, _ in PAIRS])
def test_combinations_that_are_not_supported(
    refuse: Refuse, hardware: Callable[[Hardware], None], found: Hardware, flags: list[str], words: list[str]
) -> None:
    hardware(found)
    refuse(GOOD, "flag --", *words, flags=tuple(flags))


BITSANDBYTES = ("adamw_8bit", "adamw_bnb_8bit", "lion_32bit", "ademamix", "rmsprop_bnb", "paged_lion_8bit")


@pytest.mark.parametrize(
    ("package", "flags", "fix"),
    [
        ("wandb", ["--log", "wandb"], "phalanx[wandb]"),
        ("tensorboard", ["--log", "tensorboard"], "phalanx[tensorboard]"),
        ("deepspeed", [*TWO, "--distributed-backend", "deepspeed"], "phalanx[deepspeed]"),
        ("bitsandbytes", ["--peft", "--quantization", "int4"], "phalanx[quantization]"),
        ("flash-attn", ["--use-flash-attention-2", "--mixed-precision", "bf16"], "phalanx[flash-attn]"),
        ("kernels", ["--use-kernels"], "pip install kernels"),
        *(("bitsandbytes", ["--optim", name], "phalanx[quantization]") for name in BITSANDBYTES),
        ("torchao", ["--optim", "adamw_torch_8bit"], "pip install torchao"),
        ("schedulefree", ["--optim", "schedule_free_adamw"], "pip install schedulefree"),
    ],
)
def test_package_that_is_not_installed(
    refuse: Refuse, hardware: Callable[[Hardware], None], packages: Callable[..., None],
    package: str, flags: list[str], fix: str,
) -> None:  # fmt: skip
    hardware(GPUS)
    packages(without=package)
    refuse(spoil("log: none\n", ""), "not installed", fix, flags=tuple(flags))


def test_compiling_without_a_compiler(refuse: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    refuse(GOOD, "torch_compile", "no compiler", "g++", flags=("--torch-compile",))


def test_a_rule_names_the_line_of_the_file(refuse: Refuse) -> None:
    text = params("distributed_backend: ddp") + "launch:\n  num_processes: 2\n  zero_stage: 2\n"
    refuse(text, "c.yaml:17: launch.zero_stage: ", "Set that, or remove zero_stage")


def test_a_rule_that_a_default_breaks(refuse: Refuse, packages: Callable[..., None]) -> None:
    packages(without="bitsandbytes")
    refuse(params("peft: true"), "error: quantization: bitsandbytes is not installed", "quantization: null")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["train", "c.yaml", "--batch-sise", "3"], ["--batch-sise", "did you mean --batch-size?"]),
        (["train", "c.yaml", "--batch-sise=3"], ["--batch-sise", "did you mean --batch-size?"]),
        (["show", "c.yaml", "--learning_rat", "3"], ["did you mean --learning_rate?"]),
        (["trian", "c.yaml"], ["'trian'", "train"]),
        ([], ["required", "COMMAND"]),
        (["train"], ["required", "config"]),
        (["train", "c.yaml", "--model"], ["--model", "expected one argument"]),
        (["train", "c.yaml", "--lr", "fast"], ["flag --lr", "'fast' is not a number"]),
        (["train", "c.yaml", "--peft", "perhaps"], ["flag --peft", "'perhaps' is not true or false"]),
        (["train", "c.yaml", "--gradient-checkpointing", "perhaps"],
         ["gradient-checkpointing", "true or false"]),
        (["train", "c.yaml", "--project-name", "../x"], ["flag --project-name", "'../x'", "my-run"]),
        (["train", "c.yaml", "--trainer", "ppo"],
         ["flag --trainer", "'ppo' does not exist", "'orpo', 'kto' or 'mlm'"]),
        (["train", "c.yaml", "--num-processes", "x"], ["flag --num-processes", "not a whole number"]),
        (["llm", "--model", "model"], ["--train"]),
        (["llm"], ["--train"]),
        (["llm", "--train", "--trainer", "sft", "--backend", "spaces-a10g"], ["--backend", "only local"]),
        (["schema", "extra"], ["extra"]),
    ],
)  # fmt: skip
def test_flags(
    work: Path, hardware: object, argv: list[str], words: list[str],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (work / "c.yaml").write_text(GOOD)
    before = listing(work.parent)
    assert run_command(argv, monkeypatch) == 2
    out, message = capsys.readouterr()
    assert out == ""
    check_message(message)
    assert listing(work.parent) == before
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["train", "missing.yaml"], "no such file"),
        (["train", "bad.yaml"], "bad.yaml:12"),
        (["llm"], "--train"),
    ],
)
def test_the_installed_command(work: Path, argv: list[str], word: str) -> None:
    (work / "bad.yaml").write_text(spoil("lr: 0.001", "lr: fast"))
    before = listing(work.parent)
    command = str(Path(sys.executable).with_name("phalanx"))
    done = subprocess.run([command, *argv], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    check_message(done.stderr)
    assert word in done.stderr
    assert listing(work.parent) == before


def test_fakes_are_enough_to_start(
    work: Path, hardware: object, packages: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check the tests above: without a mistake the command would start the ranks."""
    (work / "c.yaml").write_text(GOOD)
    fake_model(work / "other")
    with pytest.raises(pytest.fail.Exception, match="would start ranks"):
        run_command(["train", "c.yaml", "--base-model", "other"], monkeypatch)


def test_csv_with_a_byte_order_mark_is_read(
    work: Path, hardware: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Excel writes one. It does not belong to the name of the first column."""
    (work / "data" / "train.jsonl").unlink()
    (work / "data" / "train.csv").write_text("text,n\na,1\n", encoding="utf-8-sig")
    (work / "c.yaml").write_text(GOOD)
    assert run_command(["show", "c.yaml"], monkeypatch) == 0


@pytest.mark.parametrize(
    ("username", "name", "offline", "words"),
    [
        ("me", "run", "1", ["push_to_hub: HF_HUB_OFFLINE is set", "Unset it"]),
        (
            "me you",
            "run",
            "0",
            ["push_to_hub: me you/run is not a valid repository name", "Allowed in username"],
        ),
        ("me", "a--b", "0", ["push_to_hub: me/a--b is not a valid repository name"]),
        ("me", "a" * 97, "0", ["is not a valid repository name", "at most 96"]),
    ],
)
def test_an_upload_that_is_not_possible(refuse: Refuse, monkeypatch, username, name, offline, words) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    text = spoil("project_name: run", f"project_name: {name}")
    refuse(text + f"hub:\n  username: {username}\n  token: secret\n  push_to_hub: true\n", *words)
