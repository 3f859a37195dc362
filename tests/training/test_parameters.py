"""Every field of the config has an effect, or a note says that it has none.

For each trainer and field, two runs are compared. A snapshot of a run is taken from a trainer that is built
but not started: its arguments, samples, weights, adapter, tokenizer, reference and collator. Fields of the
optimisation are compared by the weights after a few steps.
"""

from __future__ import annotations

import ast
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from inprocess import Built, build
from places import TESTS
from tiny import build_tiny_model

from trainers.config import consistency, requirements
from trainers.config.kinds import KINDS
from trainers.config.schema import TrainConfig, acts_for
from trainers.config.settings import Settings
from trainers.data.sampler import sample_lengths
from trainers.data.templates import CHATML
from trainers.loop import finish, life, record
from trainers.loop.planned_batches import Balanced
from trainers.loop.step_boundary import StepBoundary
from trainers.model import attention


def row(i: int) -> dict[str, Any]:
    return {
        "text": f"The sum of {i} and {i} is {2 * i}. " * (1 + i % 3),
        "other": f"A rank is {i}. " * (1 + i % 2),
        "prompt": f"What is {i} plus {i}?",
        "question": f"How many ranks are {i} ranks?",
        "completion": f"The answer is {2 * i}. " * (1 + i % 2),
        "chosen": f"The answer to the question is {2 * i}. ",
        "rejected": f"Ranks are {i}. " * (1 + i % 3),
        "worse": f"The model is {i}.",
        "label": i % 3 != 0,
        "wanted": i % 3 == 0,
        "talk": [{"role": role, "content": f"{i + n}"} for n, role in enumerate(("user", "assistant") * 2)],
    }


# Files of the data folder: (rows, the columns that are missing).
FILES = {
    "train": (range(6), ()),
    "more": (range(6, 12), ()),
    "pairs": (range(6), ("label",)),
    "valid": (range(20, 23), ()),
    "test": (range(30, 33), ()),
}


@dataclass
class Place:
    """The folder with the data and the runs of this module, and two models of each kind."""

    folder: Path
    models: dict[str, tuple[Path, Path]]

    @property
    def work(self) -> Path:
        return self.folder / "work"

    def model(self, trainer: str, second: bool = False) -> Path:
        return self.models["masked" if trainer == "mlm" else "causal"][second]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_model: Path, tiny_masked_model: Path) -> Place:
    from transformers import AutoConfig, AutoModelForMaskedLM

    folder = tmp_path_factory.mktemp("parameters")
    second = build_tiny_model(folder / "second", seed=1)
    second_masked = folder / "second-masked"
    shutil.copytree(tiny_masked_model, second_masked)
    torch.manual_seed(1)
    config = AutoConfig.from_pretrained(tiny_masked_model)
    AutoModelForMaskedLM.from_config(config).save_pretrained(second_masked)
    (folder / "work").mkdir()
    (folder / "mood.jinja").write_text(CHATML.replace("<|im_end|>", "{{ mood }}<|im_end|>", 1))
    for data in (folder / "data", folder / "other-data"):
        data.mkdir()
        for name, (numbers, without) in FILES.items():
            shift = 0 if data.name == "data" else 40
            rows = [row(i + shift) for i in numbers]
            lines = [json.dumps({k: v for k, v in r.items() if k not in without}) + "\n" for r in rows]
            (data / f"{name}.jsonl").write_text("".join(lines))
    return Place(folder, {"causal": (tiny_model, second), "masked": (tiny_masked_model, second_masked)})


@dataclass(frozen=True)
class Sample:
    """Two runs: `base`, and `base` with the field at `value`. Both may be functions of place and trainer."""

    base: Any
    value: Any

    def runs(self, field: str, place: Place, trainer: str) -> tuple[dict[str, Any], dict[str, Any]]:
        base, value = (part(place, trainer) if callable(part) else part for part in (self.base, self.value))
        return base, {**base, field: value}


LORA = {"peft": True, "quantization": None}
COMPLETIONS = {"text_column": "completion"}
ASKED = {"prompt_text_column": "prompt", "text_column": "completion"}


def talk(place: Place, trainer: str) -> dict[str, Any]:
    """Return the columns of a conversation, for trainers that read one."""
    if KINDS[trainer].preference:
        return {}
    train_on = {"train_on": "completion"} if KINDS[trainer].chooses_tokens else {}
    return {"text_column": "talk", "chat_template": "chatml", "block_size": 200, **train_on}


VALID = {"valid_split": "valid"}
EVERY_STEP = {**VALID, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}

SAMPLES: dict[str, Sample] = {
    "model": Sample({}, lambda place, trainer: str(place.model(trainer, second=True))),
    "seed": Sample({**LORA, "data_seed": 42}, 7),
    "data_seed": Sample({}, 7),
    # data
    "data_path": Sample({}, lambda place, trainer: str(place.folder / "other-data")),
    "mix": Sample({}, lambda place, trainer: [{"path": str(place.folder / "data"), "rows": 5}]),
    "train_split": Sample({}, "more"),
    "valid_split": Sample({}, "valid"),
    "test_split": Sample({}, "test"),
    "valid_fraction": Sample({}, 0.34),
    "test_fraction": Sample({}, 0.34),
    "split_seed": Sample({"valid_fraction": 0.34}, 7),
    "chat_template": Sample(ASKED, "chatml"),
    "chat_template_kwargs": Sample(
        lambda place, trainer: {**ASKED, "chat_template": str(place.folder / "mood.jinja")}, {"mood": "calm"}
    ),
    "history": Sample(talk, "last"),
    "system_prompt": Sample({**ASKED, "chat_template": "chatml", "block_size": 200}, "Be short."),
    "roles_to_train": Sample(talk, ["user"]),
    "prompt_format": Sample(COMPLETIONS, "Q: {question}"),
    "text_column": Sample({}, "other"),
    "prompt_text_column": Sample(COMPLETIONS, "question"),
    "rejected_text_column": Sample({"train_split": "pairs"}, "worse"),
    "label_column": Sample({}, "wanted"),
    "add_eos_token": Sample({}, False),
    "train_on": Sample({**ASKED, "train_on": "all"}, "completion"),
    "packing": Sample({}, "none"),
    "eval_packing": Sample(VALID, False),
    "block_size": Sample({}, 24),
    "model_max_length": Sample({"block_size": -1}, 24),
    "max_prompt_length": Sample({}, 4),
    "max_completion_length": Sample({}, 5),
    "padding": Sample({}, "left"),
    # optimisation
    "lr": Sample({}, 2e-3),
    "epochs": Sample({"max_steps": -1}, 2),
    "max_steps": Sample({}, 3),
    "batch_size": Sample({}, 3),
    "tokens_per_batch": Sample({}, 400),
    "per_device_eval_batch_size": Sample(VALID, 3),
    "gradient_accumulation": Sample({}, 2),
    "optimizer": Sample({}, "sgd"),
    "scheduler": Sample({}, "constant"),
    "warmup_ratio": Sample({}, 0.5),
    "warmup_steps": Sample({}, 1),
    "weight_decay": Sample({}, 0.5),
    "max_grad_norm": Sample({"optimizer": "sgd"}, 1e-3),
    "adam_beta1": Sample({}, 0.5),
    "adam_beta2": Sample({}, 0.5),
    "adam_epsilon": Sample({}, 1e-2),
    "mixed_precision": Sample({}, "bf16"),
    "attention": Sample({}, "eager"),
    "activation_checkpointing": Sample({}, "selective"),
    "torch_compile": Sample({}, True),
    "dataloader_num_workers": Sample({}, 1),
    # logging, evaluation, saving
    "logging_steps": Sample({}, 5),
    "eval_strategy": Sample(VALID, "no"),
    "eval_steps": Sample({**VALID, "eval_strategy": "steps", "eval_steps": 2}, 1),
    "eval_on_start": Sample(VALID, True),
    "save_strategy": Sample({}, "epoch"),
    "save_steps": Sample({"save_strategy": "steps", "save_steps": 2, "save_total_limit": 5}, 1),
    "save_minutes": Sample({}, 1e-9),
    "save_total_limit": Sample({"save_strategy": "steps", "save_steps": 1}, 2),
    "load_best_model_at_end": Sample(EVERY_STEP, False),
    # peft and quantisation
    "peft": Sample({"quantization": None}, True),
    "lora_r": Sample(LORA, 4),
    "lora_alpha": Sample(LORA, 8),
    "lora_dropout": Sample(LORA, 0.5),
    "use_dora": Sample(LORA, True),
    "use_rslora": Sample(LORA, True),
    "target_modules": Sample(LORA, ".*(q_proj|Wqkv)"),
    "quantization": Sample(LORA, "int4"),
    "double_quantization": Sample({"peft": True, "quantization": "int4"}, True),
    # one trainer's own
    "model_ref": Sample({}, lambda place, trainer: str(place.model(trainer, second=True))),
    "precompute_ref_log_probs": Sample({}, True),
    "loss_type": Sample(
        lambda place, trainer: {"model_ref": str(place.model(trainer, second=True))},
        lambda place, trainer: "apo_zero_unpaired" if trainer == "kto" else "hinge",
    ),
    "label_smoothing": Sample(
        lambda place, trainer: {"loss_type": "robust"} if trainer == "dpo" else {}, 0.1
    ),
    "dpo_beta": Sample({}, 0.5),
    "orpo_beta": Sample({}, 0.5),
    "kto_beta": Sample({}, 0.5),
    "desirable_weight": Sample({}, 1.5),
    "undesirable_weight": Sample({}, 1.5),
    "center_rewards_coefficient": Sample({}, 0.1),
    "mlm_probability": Sample({}, 0.5),
    # how it is spread
    "unsloth": Sample({}, True),
}

# Fields that are compared by the weights after a few steps.
TRAINED = (
    "seed", "data_seed", "lr", "epochs", "max_steps", "batch_size", "gradient_accumulation", "optimizer",
    "scheduler", "warmup_ratio", "warmup_steps", "weight_decay", "max_grad_norm", "adam_beta1", "adam_beta2",
    "adam_epsilon", "mixed_precision", "loss_type", "orpo_beta", "desirable_weight", "undesirable_weight",
    "center_rewards_coefficient", "mlm_probability", "model_ref", "label_smoothing",
)  # fmt: skip
# Fields that are compared by what a few steps log, evaluate and save.
HAPPENED = (
    "logging_steps", "eval_strategy", "eval_steps", "eval_on_start", "save_strategy", "save_steps",
    "save_minutes", "save_total_limit", "activation_checkpointing",
)  # fmt: skip

# Fields whose effect is not in a snapshot -> the test that proves the effect.
RUN, HERE, TRACKERS = (
    "distributed/test_matrix.py",
    "training/test_parameters.py",
    "unit/trainers/output/test_trackers.py",
)
CHAT = "unit/trainers/data/test_chat.py"
ELSEWHERE = {
    "trainer": f"{HERE}::test_trainers_differ",
    "unrendered": f"{CHAT}::test_rows_with_a_field_that_is_not_rendered_can_be_dropped",
    "project_name": f"{HERE}::test_project_name_is_the_folder",
    "revision": f"{HERE}::test_the_arguments_of_from_pretrained",
    "trust_remote_code": f"{HERE}::test_the_arguments_of_from_pretrained",
    "token": f"{HERE}::test_the_arguments_of_from_pretrained",
    "use_flash_attention_2": f"{HERE}::test_the_arguments_of_from_pretrained",
    "use_kernels": f"{HERE}::test_the_arguments_of_from_pretrained",
    "merge_adapter": f"{HERE}::test_merge_adapter_leaves_a_full_model",
    "auto_find_batch_size": "faults/test_batch_search.py::test_it_trains_as_the_smaller_batch_does",
    "log": f"{RUN}::test_two_ranks_and_a_resume_are_one_run_in_the_tracker",
    "resume": f"{RUN}::test_resume_ends_with_the_weights_of_an_uninterrupted_run",
    "overwrite": f"{RUN}::test_overwrite_replaces_the_earlier_run",
    "run_name": f"{TRACKERS}::test_wandb_is_named_by_the_config",
    "wandb_project": f"{TRACKERS}::test_wandb_is_named_by_the_config",
    "wandb_entity": f"{TRACKERS}::test_wandb_is_named_by_the_config",
    "push_to_hub": "distributed/test_hub_run.py::test_two_ranks_push_once_without_leaking_the_token",
    "username": "unit/trainers/output/test_hub.py::test_only_the_model_is_uploaded_to_a_private_repository",
    "distributed_backend": "unit/launcher/plan/test_backend.py::test_what_was_asked_for_is_taken",
}


def test_every_field_is_compared_once():
    assert sorted([*SAMPLES, *ELSEWHERE]) == sorted(TrainConfig.model_fields)
    assert {*TRAINED, *HAPPENED} <= set(SAMPLES)


def test_the_named_tests_exist():
    for field, named in ELSEWHERE.items():
        path, _, function = named.partition("::")
        tree = ast.parse((TESTS / path).read_text(encoding="utf-8"))
        found = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert function in found, f"{field}: {named}"


NOT_PLAIN = object()
SNAPSHOTS: dict[str, tuple[dict[str, Any], Settings]] = {}


def plain(value: Any) -> Any:
    """Return numbers, strings, and lists and mappings of them; NOT_PLAIN for anything else."""
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, list | tuple):
        items = [plain(item) for item in value]
        return NOT_PLAIN if any(item is NOT_PLAIN for item in items) else items
    if isinstance(value, dict):
        return {str(name): item for name, entry in value.items() if (item := plain(entry)) is not NOT_PLAIN}
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return str(value) if isinstance(value, torch.dtype) else NOT_PLAIN


def weights(model: Any) -> str:
    digest = hashlib.blake2b()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def model_facts(model: Any) -> dict[str, Any]:
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    return {
        "classes": [type(model).__name__, type(inner).__name__],
        "config": json.loads(inner.config.to_json_string(use_diff=False)),
        "trained": {
            name: [str(parameter.dtype), list(parameter.shape)]
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        },
        "adapters": {
            name: plain(config.to_dict()) for name, config in getattr(model, "peft_config", {}).items()
        },
        "compiled": sum(module._compiled_call_impl is not None for module in inner.modules()),
        "weights": weights(model),
    }


def attributes(value: Any) -> Any:
    """Return the plain attributes of an object; for a function, also those of what is in its closure."""
    closed = [cell.cell_contents for cell in getattr(value, "__closure__", None) or ()]
    return [plain(vars(value)), [plain(vars(cell)) for cell in closed if hasattr(cell, "__dict__")]]


def batches(trainer: Any) -> list[Any]:
    """Return the pieces of each micro-batch of an epoch, or nothing if they are not planned."""
    if not isinstance(trainer, Balanced):
        return []
    planned = trainer.plan_batches(sample_lengths(trainer.train_dataset), True)
    return [planned.pieces.start.tolist(), list(planned)]


def facts(built: Built) -> dict[str, Any]:
    """Return a snapshot of a trainer that is built but not started."""
    trainer, tokenizer = built.trainer, built.context.tokenizer
    arguments = json.loads(trainer.args.to_json_string())
    parts = {part: built.context.data.get(part) for part in ("train", "valid", "test")}
    reference = getattr(trainer, "ref_model", None)
    model: Any = trainer.model
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    return {
        "arguments": {k: v for k, v in arguments.items() if k not in ("output_dir", "logging_dir")},
        "rows": {
            name: part and [part.dataset.with_format(None)[:], asdict(part.summary)]
            for name, part in parts.items()
        },
        "batches": batches(trainer),
        "padded": ["forward" not in vars(inner.base_model), trainer.pads_evaluation],
        "attention": trainer.model.config._attn_implementation,
        "evaluated": trainer.eval_dataset is not None,
        "model": model_facts(trainer.model),
        "reference": reference if reference is None else model_facts(reference),
        "tokenizer": {
            name: plain(getattr(tokenizer, name))
            for name in ("padding_side", "pad_token", "eos_token", "chat_template", "model_max_length")
        }
        | {"length": len(tokenizer)},
        # inputs has a hash that also depends on fields without an effect. The samples are compared above.
        "trainer": [type(trainer).__name__, plain(vars(trainer) | {"inputs": None})],
        "collator": [type(trainer.data_collator).__name__, attributes(trainer.data_collator)],
    }


def snapshot(
    place: Place, trainer: str, trained: bool = False, **values: Any
) -> tuple[dict[str, Any], Settings]:
    """Return the snapshot of a run with these values, and its settings. `trained`: with its results."""
    key = json.dumps([trainer, trained, values], sort_keys=True)
    if key not in SNAPSHOTS:
        built = small(place, trainer, **values)
        found = facts(built)
        if trained:
            found |= trained_facts(built)
        SNAPSHOTS[key] = found, built.settings
    return SNAPSHOTS[key]


def trained_facts(built: Built) -> dict[str, Any]:
    folder = built.context.folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)  # as the launcher does when it claims the folder
    built.trainer.add_callback(StepBoundary(built.trainer, None))
    built.trainer.train()
    history = built.trainer.state.log_history
    return {
        "after": weights(built.trainer.model),
        "happened": {
            "logged": [entry["step"] for entry in history if "loss" in entry],
            "evaluated": [[entry["step"], entry["eval_loss"]] for entry in history if "eval_loss" in entry],
            "checkpointing": built.trainer.model.is_gradient_checkpointing,
            "saved": sorted(path.name for path in folder.glob("checkpoint-*")),
        },
    }


def small(place: Place, trainer: str, **values: Any) -> Built:
    """Build a trainer on a few short rows, with the seed set as in a rank."""
    from transformers import set_seed

    defaults = {
        "data_path": str(place.folder / "data"),
        "block_size": 48,
        "batch_size": 2,
        "max_steps": 2,
        "lr": 1e-3,
        "activation_checkpointing": "none",
    }
    if "mix" in values:
        defaults.pop("data_path")
    values = {**defaults, **values}
    set_seed(values.get("seed", 42))
    model = Path(values.pop("model", place.model(trainer)))
    return build(place.work, model, trainer=trainer, **values)


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Return the paths at which two snapshots differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        names = [*one, *(name for name in other if name not in one)]
        return [
            found
            for name in names
            for found in differences(one.get(name, NOT_PLAIN), other.get(name, NOT_PLAIN), f"{path}.{name}")
        ]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [
            found
            for index, pair in enumerate(zip(one, other, strict=True))
            for found in differences(*pair, f"{path}.{index}")
        ]
    return [] if one == other else [path.lstrip(".")]


def idle(settings: Settings, field: str) -> bool:
    return any(note.startswith(f"{field}: has no effect") for note in settings.notes)


def fields_and_trainers() -> Iterator[Any]:
    """Yield each field with each trainer.

    In make test a field has one trainer for which it acts, taken in turn, and one for which it does not.
    """
    for number, field in enumerate(SAMPLES):
        acting, others = acts_for(field), [name for name in KINDS if name not in acts_for(field)]
        chosen = [names[number % len(names)] for names in (acting, others) if names]
        for trainer in KINDS:
            yield pytest.param(field, trainer, marks=[] if trainer in chosen else pytest.mark.slow)


@pytest.mark.parametrize(("field", "trainer"), fields_and_trainers())
def test_a_field_has_an_effect_or_a_note(place, field, trainer):
    sample = SAMPLES[field]
    acts = trainer in acts_for(field)
    compared = "after" if field in TRAINED else "happened" if field in HAPPENED else None
    trained = acts and compared is not None
    given, changed = sample.runs(field, place, trainer)
    before, _ = snapshot(place, trainer, trained, **given)
    after, settings = snapshot(place, trainer, trained, **changed)
    assert idle(settings, field) == (not acts)
    if not acts:
        assert differences(before, after) == []
    elif compared:
        assert before[compared] != after[compared]
    else:
        assert before != after


# A condition of consistency.py -> values for which it is true.
HOLDS = {
    "peft is off": {"peft": False},
    "quantization is not int4": {"quantization": None},
    "log is not wandb": {"log": "tensorboard"},
    "log is none": {"log": "none"},
    "eval_strategy is not steps": {**VALID, "eval_strategy": "epoch"},
    "tokens_per_batch is set": {"tokens_per_batch": 400},
    "there is no valid_split and no valid_fraction": {"valid_split": None},
    "valid_fraction and test_fraction are 0": {"valid_fraction": 0.0},
    "save_strategy is not steps": {"save_strategy": "epoch"},
    "max_steps is set": {"max_steps": 2},
    "warmup_steps is set": {"warmup_steps": 1},
    "no split is evaluated": {"valid_split": None},
    "save_strategy is no": {"save_strategy": "no", "eval_strategy": "no"},
    "optimizer is not a variant of Adam": {"optimizer": "sgd"},
    "scheduler has no warm-up": {"scheduler": "constant"},
    "chat_template is null": {"chat_template": None, "text_column": "text", "train_on": "auto"},
    "the loss is on all tokens": {"train_on": "all"},
    "chat_template decides how a turn ends": {**ASKED, "chat_template": "chatml"},
    "push_to_hub is off": {"push_to_hub": False},
    "model is a folder": {},
    "loss_type is not one of robust, exo_pair, aot, aot_unpaired": {},
    "loss_type is only sft": {},
    next(why for why, fields, _ in consistency.CONDITIONS if "unsloth" in fields): {},
}
UNREAD = [
    *(("sft", field, HOLDS.get(why, {})) for why, fields, _ in consistency.CONDITIONS for field in fields),
    *(("sft", field, {"optimizer": "sgd"}) for field in ("adam_beta1", "adam_beta2", "adam_epsilon")),
    *(("sft", field, {"scheduler": "constant"}) for field in ("warmup_ratio", "warmup_steps")),
    *((name, "add_eos_token", {**ASKED, "chat_template": "chatml"}) for name in KINDS if KINDS[name].packs),
    ("sft", "save_total_limit", {"save_strategy": "no"}),
    ("sft", "eval_strategy", {"eval_strategy": "steps", "valid_split": None}),
    ("sft", "load_best_model_at_end",
     {"load_best_model_at_end": True, "eval_strategy": "no", "save_strategy": "no"}),
    ("sft", "username", {"push_to_hub": False}),
    ("sft", "revision", {}),  # the model is a folder
    ("dpo", "label_smoothing", {"loss_type": "sigmoid"}),
    ("dpo", "dpo_beta", {"loss_type": "sft"}),
]  # fmt: skip


WORDS = {"unrendered": Sample({}, "drop")}  # values of fields that are compared elsewhere


def test_every_condition_is_tested():
    assert {why for why, _, _ in consistency.CONDITIONS} <= set(HOLDS)


@pytest.mark.parametrize(("trainer", "field", "values"), UNREAD)
def test_a_field_that_this_run_does_not_read_has_a_note(place, trainer, field, values):
    given, changed = SAMPLES.get(field, WORDS.get(field, Sample({}, "a-name"))).runs(field, place, trainer)
    without = {name: value for name, value in values.items() if name != field}
    both = {**given, **without}, {**changed, **values}
    runs = [snapshot(place, trainer, **run) for run in both]
    if differences(runs[0][0], runs[1][0]):
        # The arguments have the value. What the run reads, and what it comes to, must not.
        runs = [snapshot(place, trainer, True, **run) for run in both]
        parts = ("rows", "reference", "tokenizer", "after", "happened")
        before, after = ({part: facts[part] for part in parts} for facts, _ in runs)
        assert differences(before, after) == []
    assert idle(runs[1][1], field)


def test_the_test_split_is_evaluated_with_its_own_batch_size(place):
    batches = []
    for size in (1, 3):
        built = small(place, "sft", test_split="test", per_device_eval_batch_size=size)
        batches.append(len(built.trainer.get_eval_dataloader(built.context.rows("test"))))
        assert not idle(built.settings, "per_device_eval_batch_size")
    assert batches == [3, 1]


def test_trainers_differ(place):
    found = [snapshot(place, trainer)[0] for trainer in KINDS]
    for index, one in enumerate(found):
        for other in found[:index]:
            assert any(one[part] != other[part] for part in ("rows", "batches", "trainer"))


def test_project_name_is_the_folder(place):
    built = small(place, "sft", project_name=str(place.work / "named"))
    assert Path(built.trainer.args.output_dir) == built.context.folder == place.work / "named"


@pytest.mark.parametrize("trainer", KINDS)
def test_the_arguments_of_from_pretrained(place, trainer, monkeypatch):
    """What transformers gets of token, revision, trust_remote_code, use_flash_attention_2, use_kernels."""
    import transformers

    from trainers.model import load

    asked: list[tuple[str, str, dict[str, Any]]] = []

    def record(kind: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def from_pretrained(name: str, **kwargs: Any) -> Any:
            asked.append((kind, name, kwargs))
            if kind == "tokenizer":
                return original(name, **kwargs)
            # flash-attn and kernels need CUDA
            return original(name, **{**kwargs, "attn_implementation": "sdpa", "use_kernels": False})

        return from_pretrained

    monkeypatch.setattr(load, "_check_kernels", lambda: None)
    kinds = ("CausalLM", "SequenceClassification", "MaskedLM")
    for name in ("AutoTokenizer", *(f"AutoModelFor{kind}" for kind in kinds)):
        auto = getattr(transformers, name)
        kind = "tokenizer" if name == "AutoTokenizer" else "model"
        monkeypatch.setattr(auto, "from_pretrained", record(kind, auto.from_pretrained))
    other = str(place.model(trainer, second=True))
    own = {"model_ref": other} if KINDS[trainer].reference else {}
    with monkeypatch.context() as machine:
        machine.setattr(requirements, "ATTENTIONS", dict.fromkeys(requirements.ATTENTIONS, ()))
        machine.setattr(life, "check_requirements", lambda *_: None)
        small(place, trainer, **own, token="hf_secret", revision="abc", trust_remote_code=True,
              use_flash_attention_2=True, use_kernels=True)  # fmt: skip
    assert {kind for kind, _, _ in asked} == {"tokenizer", "model"}
    assert (other in {name for _, name, _ in asked}) == bool(own)
    for kind, name, kwargs in asked:
        assert kwargs["token"] == "hf_secret"
        assert kwargs["revision"] == ("main" if name == other else "abc")
        assert kwargs["trust_remote_code"] == (name != other), (
            "remote code is only for base_model, which the user has read"
        )
        assert kind == "tokenizer" or kwargs["attn_implementation"] == "flash_attention_2"
        assert kind == "tokenizer" or kwargs["use_kernels"] is True
    asked.clear()
    small(place, trainer)
    for kind, _, kwargs in asked:
        assert (kwargs["token"], kwargs["revision"], kwargs["trust_remote_code"]) == (None, "main", False)
        plain = "sdpa" if trainer == "mlm" else attention.DOCUMENTS
        assert kind == "tokenizer" or kwargs["attn_implementation"] == plain
        assert "use_kernels" not in kwargs


@pytest.mark.parametrize("trainer", KINDS)
def test_merge_adapter_leaves_a_full_model(place, trainer):
    left = []
    for merge in (False, True):
        folder = place.work / f"merge-{trainer}-{merge}"
        built = small(place, trainer, **LORA, merge_adapter=merge, project_name=str(folder))
        assert not idle(built.settings, "merge_adapter")
        built.trainer.train()
        ending = finish.save_final_model(built.trainer, built.context)
        facts = record.facts_of(built.trainer, built.context)
        assert facts["model_folders"] == [built.context.config.model]
        finish.finish(built.context, facts, ending)
        left.append({name: (folder / name).exists() for name in ("adapter_config.json", "model.safetensors")})
    assert left == [
        {"adapter_config.json": True, "model.safetensors": False},
        {"adapter_config.json": False, "model.safetensors": True},
    ]
