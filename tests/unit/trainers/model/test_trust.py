"""Whatever the files of a model name: nothing of it runs, nobody is asked, nothing is fetched."""

from __future__ import annotations

import builtins
import importlib.machinery
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from places import REPO
from saved_run import make_adapter, write_run

from trainers.config.errors import ConfigError
from trainers.config.schema import TrainConfig
from trainers.model.trust import refuse_foreign_code, refuse_kernels_at_imports

CODE = """
from pathlib import Path
from types import ModuleType
Path(__file__).with_name("it-ran").touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

class OwnConfig(LlamaConfig):
    model_type = "of-its-own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""
OWN = {
    "model_type": "of-its-own",
    "architectures": ["OwnModel"],
    "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
}
OWN_TOKENIZER = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
KERNEL = "kernels-community/x"
# What the files say -> what the error says. The first object is for config.json.
HOSTILE: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "code": (OWN, {}, "contains custom code"),
    "no-model": ({"architectures": ["pipeline"]}, {}, "architectures of its config.json is pipeline"),
    "a-module": ({"architectures": ["utils"]}, {}, "architectures of its config.json is utils"),
    "kernel": ({"attn_implementation": KERNEL}, {}, f"attn_implementation of its config.json is {KERNEL}"),
    "kernel-inside": ({"_attn_implementation": {"": "sdpa", "text_config": f"paged|{KERNEL}@1"}}, {}, KERNEL),
    "kernel-of-a-part": ({"text_config": {"attn_implementation": KERNEL}}, {}, "text_config.attn_impl"),
    "kernel-of-experts": ({"parts": [{"experts_implementation": KERNEL}]}, {}, "parts.experts_impl"),
    "no-tokenizer": ({}, {"tokenizer_class": "pipeline"}, "tokenizer_class is pipeline, which is not a tok"),
    "a-model-as-tokenizer": ({}, {"tokenizer_class": "AutoModelForCausalLM"}, "which is not a tokenizer"),
    "tokenizer-of-a-config": ({"tokenizer_class": "Trainer"}, {}, "Trainer, which is not a tokenizer"),
}  # fmt: skip


class Watched:
    """What was asked, and which kernels were fetched."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from transformers import dynamic_module_utils
        from transformers.integrations import hub_kernels

        self.seen: list[str] = []
        monkeypatch.setattr(builtins, "input", lambda prompt="": self.seen.append(prompt) or "y")
        # As if `kernels` were installed. What refuse_foreign_code() replaces is restored by monkeypatch.
        monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda: True)
        monkeypatch.setattr(hub_kernels, "_kernels_enabled", True)
        monkeypatch.setattr(hub_kernels, "get_kernel", lambda name, **_: self.seen.append(name))
        monkeypatch.setattr(dynamic_module_utils, "TIME_OUT_REMOTE_CODE", 15)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


def spoil(folder: Path, config: dict[str, Any], tokenizer: dict[str, Any]) -> Path:
    """Add keys to the files of a model, and a module with code."""
    (folder / "own.py").write_text(CODE)
    for name, values in (("config.json", config), ("tokenizer_config.json", tokenizer)):
        path = folder / name
        path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))
    return folder


@pytest.fixture
def hostile(tmp_path: Path, tiny_model: Path) -> Callable[[str], Path]:
    """`hostile(case)` is a model whose files name what they should not."""

    def make(case: str) -> Path:
        folder = tmp_path / "hostile"
        shutil.copytree(tiny_model, folder)
        if case == "tokenizer-of-a-config":  # its config is asked only if its own file names no class
            path = folder / "tokenizer_config.json"
            values = json.loads(path.read_text())
            del values["tokenizer_class"]
            path.write_text(json.dumps(values))
        return spoil(folder, *HOSTILE[case][:2])

    return make


def load_tokenizer(folder: Path, *_: Any) -> None:
    from trainers.model import tokenizer

    tokenizer.load_tokenizer(TrainConfig(model=str(folder)))


def load_config(folder: Path, *_: Any) -> None:
    from trainers.model.source import model_config

    model_config(str(folder), TrainConfig(model=str(folder)))


def load_model(folder: Path, tokenizer: Any, *_: Any) -> None:
    from trainers.model import load

    load.load_model(TrainConfig(model=str(folder), trainer="sft"), tokenizer)


def load_reference(folder: Path, tokenizer: Any, tiny: Path) -> None:
    from trainers.model import load

    load.load_reference(TrainConfig(model=str(tiny), model_ref=str(folder), trainer="dpo"), tokenizer)


def load_reference_of_a_trusted_model(folder: Path, tokenizer: Any, tiny: Path) -> None:
    """trust_remote_code is for base_model, not for another model."""
    from trainers.model import load

    config = TrainConfig(model=str(tiny), model_ref=str(folder), trainer="dpo", trust_remote_code=True)
    load.load_reference(config, tokenizer)


def merge(folder: Path, tokenizer: Any, *_: Any) -> None:
    from trainers.output.merge import merge_adapter

    adapter = make_adapter(write_run(folder.parent / "run", folder))
    merge_adapter(TrainConfig(model=str(folder), peft=True), adapter, tokenizer, [1, 2, 3])


LOADS = (load_tokenizer, load_config, load_model, load_reference, load_reference_of_a_trusted_model, merge)


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("case", HOSTILE)
def test_every_load_refuses_what_does_not_belong_in_the_files(
    hostile: Callable[[str], Path],
    watched: Watched,
    tokenizer: Any,
    tiny_model: Path,
    load: Callable[..., None],
    case: str,
) -> None:
    folder = hostile(case)
    refuse_foreign_code(use_kernels=False)
    if (case, load) == ("code", load_tokenizer):
        load(folder)  # it has a tokenizer of transformers
    else:
        with pytest.raises(ConfigError) as raised:
            load(folder, tokenizer, tiny_model)
        assert HOSTILE[case][2] in str(raised.value) and "\n" not in str(raised.value)
    assert watched.seen == []
    assert not (folder / "it-ran").exists()


def test_code_of_a_tokenizer_is_not_run(
    hostile: Callable[[str], Path], watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(HOSTILE, "code", (OWN, OWN_TOKENIZER, ""))
    folder = hostile("code")
    refuse_foreign_code(use_kernels=False)
    with pytest.raises(ConfigError, match=r"custom code.* only with trust_remote_code: true\.$"):
        load_tokenizer(folder)
    assert watched.seen == [] and not (folder / "it-ran").exists()


def test_code_of_the_model_runs_if_the_config_trusts_it(
    hostile: Callable[[str], Path], watched: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the tests above would notice code that runs."""
    from transformers import dynamic_module_utils

    from trainers.model.source import model_config

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder = hostile("code")
    refuse_foreign_code(use_kernels=False)
    loaded = model_config(str(folder), TrainConfig(model=str(folder), trust_remote_code=True))
    assert type(loaded).__name__ == "OwnConfig" and watched.seen == []
    assert list((tmp_path / "modules").rglob("it-ran"))


def test_a_name_that_transformers_does_not_have_is_never_looked_up(
    hostile: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tokenizer: Any
) -> None:
    """Old models have such names, and the class follows from their model_type."""
    monkeypatch.setitem(HOSTILE, "old", ({"architectures": ["LLaMAForCausalLM"]}, {}, ""))
    load_model(hostile("old"), tokenizer)


def test_the_process_asks_nothing_and_fetches_no_kernel_even_where_a_library_forgets_to_pass_it_on(
    hostile: Callable[[str], Path], watched: Watched
) -> None:
    from transformers import AutoConfig
    from transformers.integrations import hub_kernels

    refuse_foreign_code(use_kernels=False)
    with pytest.raises(ValueError):
        AutoConfig.from_pretrained(hostile("code"))
    with pytest.raises(ConfigError, match="use_kernels: true"):
        hub_kernels.get_kernel(KERNEL, version=1)
    assert hub_kernels.lazy_load_kernel("finegrained-fp8", mapping={}) is None
    assert watched.seen == []


def test_with_use_kernels_a_kernel_is_fetched(watched: Watched) -> None:
    from transformers.integrations import hub_kernels

    refuse_foreign_code(use_kernels=True)
    hub_kernels.get_kernel(KERNEL, version=1)
    assert watched.seen == [KERNEL]


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize(
    "case", ["code", "no-model", "a-module", "kernel", "kernel-inside", "kernel-of-a-part"]
)
def test_consolidate_refuses_what_does_not_belong_in_the_files(
    hostile: Callable[[str], Path],
    watched: Watched,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    case: str,
    adapter: bool,
) -> None:
    from trainers.consolidate import main

    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "0")
    folder = hostile(case)
    if adapter:
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    assert main([str(folder), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    if case != "code":
        assert HOSTILE[case][2] in error
    assert watched.seen == []
    assert not (folder / "it-ran").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "architectures", [[], None, "utils", ["LlamaPreTrainedModel"], ["AutoModel"], [3], {"0": "utils"}]
)
def test_consolidate_looks_a_model_up_in_the_models_only(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str], architectures: Any, watched: Watched
) -> None:
    from trainers.consolidate import main

    folder = shutil.copytree(tiny_model, tmp_path / "checkpoint-3")
    spoil(folder, {"architectures": architectures}, {})
    assert main([str(folder), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "no model" in error or "not a model" in error


@pytest.mark.parametrize("case", ["code", "kernel", "kernel-inside"])
def test_the_example_runs_and_fetches_nothing_either(
    hostile: Callable[[str], Path],
    watched: Watched,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    case: str,
) -> None:
    spec = importlib.util.spec_from_file_location("ask", REPO / "examples" / "ask.py")
    assert spec is not None and spec.loader is not None
    ask = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ask)
    monkeypatch.setattr(ask.logging, "disable", lambda level: None)
    monkeypatch.setattr(ask.warnings, "simplefilter", lambda action: None)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    folder = hostile(case)
    code = ask.main([str(folder), "--question", "What is a rank?"])
    assert code == (0 if case.startswith("kernel") else 1)  # it uses an attention of its own
    assert capsys.readouterr().err.startswith("" if code == 0 else "error: ")
    assert watched.seen == [] and not (folder / "it-ran").exists()


# As if `kernels` were installed, on a CPU for which bitsandbytes has a kernel.
FETCHES = """
from pathlib import Path
from types import ModuleType

def get_kernel(name, *arguments, **named):
    with Path(__file__).with_name("fetched").open("a") as file:
        file.write(name)
    raise RuntimeError("no network")
"""
IMPORTS = {
    "a rank": "from trainers.model.trust import refuse_kernels_at_imports as first; first(); first()",
    "a warm parent": "from trainers import warm; warm.warm_up(['peft'])",
    "consolidate": "import sys; from trainers import consolidate as c; c.main(['missing', 'out'])",
}
ASK = """
import kernels, peft.tuners.lora, types
import bitsandbytes.backends.cpu.ops
for name in ("other", "transformers.integrations.hub_kernels"):
    library = types.ModuleType(name)
    try:
        exec("from kernels import get_kernel; get_kernel('a/kernel')", vars(library))
    except Exception as error:
        print(name, type(error).__name__)
"""


def test_a_library_gets_no_kernel_but_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the next one, with a stand-in for the package, and without its imports."""
    kernels = ModuleType("kernels")
    kernels.__spec__ = importlib.machinery.ModuleSpec("kernels", None)
    monkeypatch.setattr(kernels, "get_kernel", lambda name: name, raising=False)
    monkeypatch.setitem(sys.modules, "kernels", kernels)
    refuse_kernels_at_imports()
    fetched = kernels.get_kernel
    refuse_kernels_at_imports()
    assert kernels.get_kernel is fetched, "a forked rank replaces nothing again"
    own, other = {"__name__": "transformers.integrations.hub_kernels"}, {"__name__": "other"}
    assert eval("fetch('a/kernel')", own | {"fetch": fetched}) == "a/kernel"
    with pytest.raises(ConfigError, match="other asks for a/kernel, a kernel of the hub"):
        eval("fetch('a/kernel')", other | {"fetch": fetched})


@pytest.mark.slow
@pytest.mark.parametrize("process", IMPORTS)
def test_only_transformers_may_fetch_a_kernel(tmp_path: Path, process: str) -> None:
    """bitsandbytes asks at its import, if the CPU has avx512_bf16. Other CPUs ask as `other` does."""
    pytest.importorskip("bitsandbytes")
    (tmp_path / "kernels.py").write_text(FETCHES)
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS[process] + ASK],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{REPO}"},
        cwd=tmp_path,
        text=True,
        capture_output=True,
    )
    said = ["other ConfigError", "transformers.integrations.hub_kernels RuntimeError"]
    assert done.stdout.splitlines()[-2:] == said, done.stdout + done.stderr
    assert (tmp_path / "fetched").read_text() == "a/kernel"
