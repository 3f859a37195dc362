"""docs/upgrading.md lists every private or patched part of a library, with a test that notices a move.

The first tests hold the page to the code and to the installed libraries. The others fail if a library still
has a part, but the part does something else.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import mmap
import re
import socket
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from places import REPO, TESTS

PAGE = (REPO / "docs" / "upgrading.md").read_text(encoding="utf-8")
# Packages without which `make test` runs too.
OPTIONAL = ("deepspeed", "bitsandbytes", "kernels", "wandb", "lm_eval")
SOURCES = sorted(
    path for package in ("launcher", "trainers") for path in (REPO / package).rglob("*.py") if path.is_file()
)


def rows(first: str) -> Iterator[dict[str, str]]:
    """Yield the rows of all tables whose first column has this title: title -> cell."""
    titles: list[str] = []
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")] if line.startswith("|") else []
        if not cells:
            titles = []
        elif not titles:
            titles = cells
        elif titles[0] == first and not cells[0].startswith("---"):
            assert len(cells) == len(titles), line
            yield dict(zip(titles, cells, strict=True))


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


PARTS = sorted(
    {name for row in rows("part") for name in quoted(row["part"]) if re.fullmatch(r"[\w.]+\.\w+", name)}
)
VARIABLES = [(name, quoted(row["in"])[0]) for row in rows("variable") for name in quoted(row["variable"])]


def test_each_test_on_the_page_exists():
    text = "\n".join(path.read_text(encoding="utf-8") for path in TESTS.rglob("test_*.py"))
    known = set(re.findall(r"^def (test_\w+)", text, re.M))
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    assert named and sorted(named - known) == []
    for first in ("part", "variable", "message", "file"):
        assert all(quoted(row["test"]) for row in rows(first))


def test_each_file_on_the_page_exists():
    for name in re.findall(r"`((?:trainers|launcher)/\S+?\.py)`", PAGE):
        assert (REPO / name).is_file(), name
    for name in re.findall(r"`(\w+\.py)[ `]", PAGE):
        assert (REPO / "benchmarks" / name).is_file(), name


def test_the_page_has_the_tested_versions():
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (REPO / "constraints.txt").read_text(), re.M))
    found = dict(re.findall(r"^## (\w+) (\d\S*)$", PAGE, re.M))
    assert len(found) == 8
    assert found == {name: pins[name] for name in found}


def library(name: str) -> ModuleType:
    """Import a library, or skip the test if it is an optional one and missing."""
    return pytest.importorskip(name) if name in OPTIONAL else importlib.import_module(name)


@pytest.mark.parametrize("part", PARTS)
def test_each_part_on_the_page_exists(part):
    """A module, class or function; or an attribute that the code of its class sets or reads."""
    first, *names = part.split(".")
    owner: Any = library(first)
    for index, name in enumerate(names):
        path = ".".join((first, *names[: index + 1]))
        if isinstance(owner, ModuleType) and is_module(path):
            owner = importlib.import_module(path)
        elif hasattr(owner, name):
            owner = getattr(owner, name)
        else:
            assert inspect.isclass(owner) and name in attributes(owner), (
                f"{part}: the installed version does not have it"
            )


def is_module(path: str) -> bool:
    """Whether a module can be imported. A package may have another thing of the same name."""
    try:
        importlib.import_module(path)
    except ModuleNotFoundError:
        return False
    return True


@functools.cache
def attributes(kind: type) -> set[str]:
    """Return the names of the attributes and fields in the code of a class and its bases in the library."""
    found: set[str] = set()
    package = kind.__module__.split(".")[0]
    for base in inspect.getmro(kind):
        if base.__module__.split(".")[0] == package:
            found |= set(vars(base).get("__annotations__", {}))
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
            found |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return found


@pytest.mark.parametrize(("variable", "module"), VARIABLES)
def test_each_variable_on_the_page_is_in_its_library(variable, module):
    library(module.split(".")[0])
    found = importlib.import_module(module)
    files = [Path(str(found.__file__))]
    if files[0].name == "__init__.py":
        files = sorted(files[0].parent.rglob("*.py"))
    assert any(re.search(rf"\b{variable}\b", file.read_text(encoding="utf-8")) for file in files)


def test_each_replaced_part_is_on_the_page():
    found = set()
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = imported(tree)
        for node in ast.walk(tree):
            called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
            if called in ("replace_in", "replaced") and path.name != "library_patches.py":
                owner, name = (ast.unparse(word) for word in node.args[:2])
                first, dot, rest = owner.partition(".")
                found.add(f"{names.get(first, first)}{dot}{rest}.{ast.literal_eval(name)}")
    assert len(found) == 14
    assert sorted(found - set(PARTS)) == []


_IMPORTED = re.compile(r"importlib\.import_module\('([\w.]+)'\)")


def imported(tree: ast.AST) -> dict[str, str]:
    """Return what the imports of a module bind: name in the module -> full name."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {(alias.asname or alias.name): alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {(alias.asname or alias.name): f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Assign) and (named := _IMPORTED.fullmatch(ast.unparse(node.value))):
            found[ast.unparse(node.targets[0])] = named[1]
    return found


def test_each_private_name_of_a_library_is_on_the_page():
    """A private attribute of anything but self and own classes, or a private name in an import."""
    listed = {part.rpartition(".")[2] for part in PARTS}
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        used = {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "cls")
        } | {
            word
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            and not (node.module or "").startswith(("launcher", "trainers"))
            for word in [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        }
        private = {name for name in used if name.startswith("_") and not name.startswith("__")}
        assert sorted(private - own - listed - {"_exit"}) == [], path  # os._exit is public


def test_each_overridden_method_is_on_the_page():
    """A method of our Trainer classes that a class of a library has too."""
    from trainers.loop import masked_trainer, orpo_trainer, trl_trainers

    listed = {part.rpartition(".")[2] for part in PARTS}
    found = set()
    for kind in {**vars(trl_trainers), **vars(orpo_trainer), **vars(masked_trainer)}.values():
        mro = inspect.getmro(kind) if inspect.isclass(kind) else ()
        own = [base for base in mro if base.__module__.startswith("trainers.")]
        others = [base for base in mro if base not in own and base is not object]
        for name in {name for base in own for name in vars(base) if not name.startswith("__")}:
            if any(name in vars(base) for base in others):
                found.add(name)
    assert len(found) > 20
    assert sorted(found - listed) == []


def test_bitsandbytes_gets_the_capability_of_a_gpu_from_nvml(monkeypatch):
    pytest.importorskip("bitsandbytes")
    import pynvml
    from bitsandbytes.cuda_specs import get_compute_capabilities

    from trainers import warm
    from trainers.rank.library_patches import replaced

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCudaComputeCapability", lambda index: (9, index))
    with replaced(torch.cuda, "get_device_capability", warm._capability):
        assert get_compute_capabilities() == [(9, 0), (9, 1)]


def test_the_operators_of_attention_exist():
    """Their names in the dispatcher. The operator of varlen_attn exists once its module is imported."""
    import torch.nn.attention.flex_attention
    import torch.nn.attention.varlen

    from trainers.model.activation_checkpointing import ATTENTION

    known = {name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    known.add(torch.ops.higher_order.flex_attention.name())
    assert sorted(ATTENTION - known) == []


def test_varlen_attn_takes_the_arguments_of_our_attention(monkeypatch):
    """The call is bound to the signature. The kernel itself needs a GPU."""
    from torch.nn.attention import varlen

    from trainers.model.attention import _varlen

    signature, bound = inspect.signature(varlen.varlen_attn), []

    def called(*arguments: Any, **named: Any) -> torch.Tensor:
        bound.append(signature.bind(*arguments, **named).arguments)
        return arguments[0]

    monkeypatch.setattr(varlen, "varlen_attn", called)
    query, key = torch.zeros(1, 4, 7, 8), torch.zeros(1, 2, 7, 8)
    bounds = torch.tensor([0, 3, 7], dtype=torch.int32)
    out, _ = _varlen(torch.nn.Module(), query, key, key, None, cu_seq_lens_q=bounds, max_length_q=4)
    assert out.shape == (1, 7, 4, 8)
    assert {"query", "key", "value", "scale", "window_size", "enable_gqa"} < set(bound[0])
    assert [tuple(bound[0][name].shape) for name in ("query", "key")] == [(7, 4, 8), (7, 2, 8)]
    assert (bound[0]["max_q"], bound[0]["max_k"]) == (4, 4)
    assert torch.equal(bound[0]["cu_seq_q"], bounds) and torch.equal(bound[0]["cu_seq_k"], bounds)


def test_the_lock_of_torchs_compiler_is_where_we_look(monkeypatch, tmp_path):
    from torch.utils import cpp_extension

    from launcher.supervise.stale_locks import extensions_cache, remove_stale_locks

    class Stop(Exception):
        """Raised instead of taking the lock."""

    def baton(path: str, *_: Any, **__: Any) -> None:
        Path(path).touch()
        raise Stop

    environ = {"TORCH_EXTENSIONS_DIR": str(tmp_path)}
    monkeypatch.setenv(*next(iter(environ.items())))
    monkeypatch.setattr(cpp_extension, "FileBaton", baton)
    with pytest.raises(Stop):
        cpp_extension.load_inline("an_operator", cpp_sources="")
    assert [path.name for path in remove_stale_locks(extensions_cache(environ))] == ["lock"]


def test_torchs_compiler_keeps_its_lock_open_with_its_owner_in_it(monkeypatch, tmp_path):
    from torch.utils import cpp_extension

    from launcher.supervise.stale_locks import remove_stale_locks
    from trainers.model.deepspeed_builds import write_owners
    from trainers.rank.build_lock import owner_has_ended

    lock = tmp_path / "an_operator" / "lock"
    lock.parent.mkdir()
    monkeypatch.setattr(cpp_extension, "FileBaton", cpp_extension.FileBaton)  # restored after the test
    for owned in (False, True):
        baton = cpp_extension.FileBaton(str(lock))
        assert baton.try_acquire() and not cpp_extension.FileBaton(str(lock)).try_acquire()
        assert remove_stale_locks(tmp_path) == []
        assert owner_has_ended(lock) is (False if owned else None)
        baton.release()
        assert not lock.exists()
        write_owners()


def test_cpu_ranks_compile_no_operator_of_inference(monkeypatch):
    pytest.importorskip("deepspeed")
    backend = importlib.import_module("deepspeed.comm.torch")
    from deepspeed.ops.op_builder.builder import OpBuilder

    from trainers.model.deepspeed_builds import skip_inference_operator

    monkeypatch.setattr(OpBuilder, "load", lambda builder: pytest.fail(f"{builder.name} is compiled"))
    monkeypatch.setattr(backend.TorchBackend, "init_process_group", lambda *_: None)
    monkeypatch.setattr(backend, "build_shm_op", backend.build_shm_op)  # restored after the test
    skip_inference_operator()
    assert backend.TorchBackend("gloo", None, None).shm_comm_op is None


def test_a_batch_is_read_in_one_call(monkeypatch):
    from datasets import Dataset

    from trainers.data.collators import PieceDataset
    from trainers.data.packing import whole_samples

    dataset = Dataset.from_dict({"input_ids": [[1, 2], [3], [4, 5, 6]], "labels": [[1, 2], [3], [4, 5, 6]]})
    calls = []
    read = Dataset.__getitems__
    monkeypatch.setattr(Dataset, "__getitems__", lambda self, keys: calls.append(keys) or read(self, keys))
    monkeypatch.setattr(PieceDataset, "__getitem__", lambda *_: pytest.fail("rows are read one by one"))
    pieces = PieceDataset(dataset, whole_samples([2, 1, 3]))
    batches = torch.utils.data.DataLoader(pieces, batch_sampler=[[2, 0], []], collate_fn=list)
    assert [[row["input_ids"].tolist() for row in batch] for batch in batches] == [[[4, 5, 6], [1, 2]], []]
    assert calls == [[2, 0]]


def test_the_frames_of_a_rank_that_waits_exist():
    """The files and functions that launcher/supervise/hangs.py looks for in a stack."""
    from torch.nn.parallel import DistributedDataParallel

    folder = Path(torch.__file__).parent
    assert (folder / "distributed" / "distributed_c10d.py").is_file()
    assert (folder / "autograd" / "graph.py").is_file() and (folder / "_tensor.py").is_file()
    code = Path(str(inspect.getsourcefile(DistributedDataParallel)))
    assert code == folder / "nn" / "parallel" / "distributed.py"
    assert DistributedDataParallel._sync_buffers and DistributedDataParallel._distributed_broadcast_coalesced
    deepspeed = pytest.importorskip("deepspeed")
    assert (Path(deepspeed.__file__).parent / "comm" / "torch.py").is_file()


@pytest.fixture
def documents(tiny_model):
    """The tiny model with our attention."""
    from transformers import AutoModelForCausalLM

    from trainers.model.attention import implementation

    return AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation=implementation("documents"))


def test_the_probe_uses_the_attention_of_transformers(documents, monkeypatch):
    from trainers.model import document_attention
    from trainers.model.isolation_probe import _plain_attention

    calls, attend = [], document_attention._attend
    monkeypatch.setattr(document_attention, "_attend", lambda *a, **k: calls.append(1) or attend(*a, **k))
    ids = torch.arange(8)[None]
    with _plain_attention(documents):
        documents(input_ids=ids)
    assert calls == []
    documents(input_ids=ids)
    assert len(calls) == 2


def test_the_fused_head_scores_only_tokens_in_the_loss(documents, monkeypatch):
    """On a CPU too, and in our function."""
    from trl.trainer.utils import add_fused_lm_head

    from trainers.model.cpu_head import Head, replace_trls_head

    scored, apply = [], Head.apply
    monkeypatch.setattr(Head, "apply", lambda hidden, *a: scored.append(len(hidden)) or apply(hidden, *a))
    replace_trls_head()
    add_fused_lm_head(documents)
    labels = torch.tensor([[-100, -100, -100, 5, 6, -100, -100, 7]])
    documents(input_ids=torch.arange(8)[None], labels=labels, fused_lm_head=True)
    assert scored == [3]


def test_our_head_gives_the_values_of_trls():
    """The same arguments and results, in the same order."""
    from trl.kernels import ChunkedLogProbFunction

    from trainers.model.cpu_head import Head

    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(5, 8), torch.randn(11, 8), torch.randn(11)
    outputs = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    arguments = (hidden, weight, bias, torch.randint(11, (5,)), 0.7, 4, 3.0, 1.3, outputs)
    for ours, theirs in zip(Head.apply(*arguments), ChunkedLogProbFunction.apply(*arguments), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_notice_of_trl_is_silenced(monkeypatch):
    import trl.experimental

    from trainers.rank.library_output import quieten_libraries

    monkeypatch.delenv("TRL_EXPERIMENTAL_SILENCE", raising=False)
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    with pytest.warns(match="experimental"):
        importlib.reload(trl.experimental)
    quieten_libraries()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importlib.reload(trl.experimental)


def test_loading_local_rows_asks_no_server(monkeypatch, prepare):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *words, **_: asked.append(words) or [])
    assert len(prepare([{"text": "one"}, {"text": "two"}]).dataset) == 2
    assert asked == []


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"HF_HOME": "~/other"},
        {"HF_HUB_CACHE": "$HOME/cache"},
        {"HF_TOKEN_PATH": "~/token"},
        {"XDG_CACHE_HOME": "/scratch/me"},
        {"HUGGINGFACE_HUB_CACHE": "/scratch/me"},
    ],
    ids=lambda environ: next(iter(environ), "none"),
)
def test_the_folders_of_the_hub_are_those_of_the_library(tmp_path, environ):
    code = (
        "from huggingface_hub.constants import HF_HUB_CACHE, HF_TOKEN_PATH\n"
        "from trainers.config.hub_paths import hub_cache, token_file\n"
        "assert str(hub_cache()) == HF_HUB_CACHE, (hub_cache(), HF_HUB_CACHE)\n"
        "assert str(token_file()) == HF_TOKEN_PATH, (token_file(), HF_TOKEN_PATH)\n"
    )
    base = {"HOME": str(tmp_path), "PATH": "/usr/bin"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=base | environ, cwd=REPO, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr


def test_a_model_in_the_cache_of_the_hub_is_found(tmp_path, monkeypatch):
    from huggingface_hub import try_to_load_from_cache

    from launcher.plan.memory import model_folder

    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--org--name" / "snapshots" / "0123"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder.parents[1] / "refs").mkdir()
    (folder.parents[1] / "refs" / "main").write_text("0123")
    assert try_to_load_from_cache("org/name", "config.json", cache_dir=tmp_path) == str(
        folder / "config.json"
    )
    assert model_folder("org/name") == folder


def test_the_header_of_a_weight_file_is_read(tmp_path):
    from safetensors.torch import save_file

    from launcher.plan.memory import size_of_model

    tensors = {"a": torch.zeros(3, 5), "b": torch.zeros(2, dtype=torch.bfloat16), "c": torch.zeros(())}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert size_of_model(str(tmp_path)) == 3 * 5 + 2 + 1


def test_wandb_sends_no_command_line_and_no_packages(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    from tracked import forget_wandb, wandb_files, wandb_records

    from trainers.config.schema import TrainConfig
    from trainers.output.trackers import open_tracker

    for name, value in {"HOME": str(tmp_path), "WANDB_MODE": "offline"}.items():
        monkeypatch.setenv(name, value)
    forget_wandb()
    tracker = open_tracker(TrainConfig(project_name="run", log="wandb"), tmp_path, {})
    assert tracker is not None
    tracker.log(1, {"loss": 1.0})
    tracker.finish()
    [file] = wandb_files(tmp_path)
    kinds = {record.WhichOneof("record_type") for record in wandb_records(file)}
    assert {"run", "history"} <= kinds and not {"environment", "files"} & kinds


def test_messages_are_in_torchs_library():
    """The messages of C++ code, which cannot all be provoked here: as bytes of the library."""
    from trainers.rank.failures import _PEER_LOST, _TORCH_WRITER

    expected = {
        "PytorchStreamWriter failed": _TORCH_WRITER,
        "unexpected pos ": None,  # "unexpected pos 704 vs 598"
        "Connection closed by peer": _PEER_LOST,
        "Timed out waiting": _PEER_LOST,
        "Application timeout caused pair closure": _PEER_LOST,
        "Socket Timeout": _PEER_LOST,
        "recvValue failed": _PEER_LOST,
        "failed to connect": _PEER_LOST,
    }
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as code:
        for message, pattern in expected.items():
            assert code.find(message.encode()) >= 0, f"torch no longer says {message!r}"
            assert pattern is None or pattern.search(message), message


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_that_runs_out_on_a_gpu_is_recognised():
    from trainers.rank.failures import ran_out_of_memory

    with pytest.raises(RuntimeError) as error:
        torch.empty(2**50, dtype=torch.uint8, device="cuda")
    assert ran_out_of_memory(error.value)
