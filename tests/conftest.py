"""Fixtures: a separate working folder for each test, fake hardware, and one real tiny model."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import fake_model, machine, write_rows
from inprocess import write_split
from places import TESTS
from ranks import Bench, Finished, environment, kept_warm

from launcher.plan import topology
from launcher.plan.topology import Hardware
from trainers.config import packages as installed_packages
from trainers.config import redaction
from trainers.rank.protocol import WARM
from trainers.rank.signals import SIGNALS

# Session fixture -> the tests that share what it makes.
SHARED = {
    "trained": (
        "tests/distributed/test_matrix.py",
        "tests/distributed/test_mistakes.py",
        "tests/distributed/test_run_folder.py",
    ),
    "faults": ("tests/faults/",),
}
# Variables of the site's environment that a run would read.
_SITE = re.compile(r"(SLURM|HF|HUGGING_?FACE|TRANSFORMERS|PHALANX)_.*|CUDA_VISIBLE_DEVICES|XDG_CACHE_HOME")


def pytest_itemcollected(item: pytest.Item) -> None:
    if item.path.parent in (TESTS / "distributed", TESTS / "faults"):
        item.add_marker("distributed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--share", type=int, metavar="N", help="run a fixed N-th of the chosen tests")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --share N, keep the tests whose names have a checksum that N divides: the same ones each time."""
    share = config.getoption("--share")
    if share:
        kept = [item for item in items if zlib.crc32(item.nodeid.encode()) % share == 0]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


def pytest_collection_finish() -> None:
    """Take the tests and the libraries, a million objects, out of the garbage collector's way."""
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep a file in one worker, and all files that use the same runs: the runs are expensive to make."""
    if config.getoption("dist") != "loadscope":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByRuns(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return next((name for name, files in SHARED.items() if file.startswith(files)), file)

    return ByRuns(config, log)


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    """Restore the signal handlers that a rank in this process has replaced, so that Ctrl-C ends pytest."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)


@pytest.fixture(autouse=True)
def own_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the secrets of the tests before: they would be hidden in the messages of this one."""
    monkeypatch.setattr(redaction, "_known", set())


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Let torch use one thread. With models of this size, more threads only wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real two-layer model with its tokenizer. It imports torch, which takes seconds."""
    from tiny import build_tiny_model

    return build_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_masked_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real two-layer masked LM with its tokenizer."""
    from tiny import build_tiny_masked_model

    return build_tiny_masked_model(tmp_path_factory.mktemp("tiny") / "masked")


@pytest.fixture(scope="session")
def bench(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_masked_model: Path
) -> Iterator[Bench]:
    """A bench whose runs share the imports: a start then takes a quarter of the time."""
    root = tmp_path_factory.mktemp("bench")
    data = root / "data"
    data.mkdir()
    for split, count in (("train", 40), ("valid", 4)):
        rows = [
            {
                "prompt": f"What is {i} plus {i}?",
                "completion": f"The answer to the question is {2 * i}. " * (1 + i % 3),
                "label": i % 3 != 0,
                "chosen": f"The answer to the question is {2 * i}. " * (1 + i % 3),
                "rejected": f"Ranks are {i}. " * (1 + i % 4),
            }
            for i in range(count)
        ]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    environ = environment(root / "cache")
    with kept_warm(root, environ) as path:
        yield Bench(root, tiny_model, tiny_masked_model, environ | {WARM: path})


@pytest.fixture(scope="session")
def trained(bench: Bench) -> Callable[..., Finished]:
    """trained(backend, mode, trainer) returns that run, which the first call makes."""
    made: dict[tuple[str, str, str], Finished] = {}

    def run(backend: str, mode: str, trainer: str = "sft") -> Finished:
        key = (backend, mode, trainer)
        if key not in made:
            done = bench.train("-".join((trainer, backend, mode)), *bench.flags(*key))
            assert done.code == 0, done.out + done.err
            made[key] = done
        return made[key]

    return run


@pytest.fixture(scope="session")
def tokenizer(tiny_model: Path) -> Any:
    """The tiny model's tokenizer, as on disk: copy it before you change it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="session")
def masked_tokenizer(tiny_masked_model: Path) -> Any:
    """The tiny masked LM's tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_masked_model)


@pytest.fixture
def prepare(
    tokenizer: Any, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """prepare(rows, suffix="jsonl", part="train", using=None, **config) -> Prepared, from an empty cache.

    rows is a list, or the text or bytes of the file. `using` is another tokenizer than the usual one.
    """
    from trainers.config.schema import TrainConfig
    from trainers.data import prepare

    monkeypatch.setenv("PHALANX_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    folder.mkdir()

    def run(rows: Any, suffix: str = "jsonl", part: Any = "train", using: Any = None, **config: Any) -> Any:
        for left in folder.iterdir():
            left.unlink()
        write_split(folder / f"train.{suffix}", rows)
        values = {"data_path": str(folder), "trainer": "sft", "block_size": 128, "packing": "none", **config}
        usual = request.getfixturevalue("masked_tokenizer") if values["trainer"] == "mlm" else tokenizer
        return prepare.prepare(TrainConfig(**values), using or usual, part)

    return run


@pytest.fixture(autouse=True)
def one_environ() -> Iterator[None]:
    """Restore os.environ: datasets 5.2 replaces it by a copy when it works in several processes."""
    environ = os.environ
    yield
    os.environ = environ  # noqa: B003


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with `model/` and `data/train.jsonl`; no hub cache, no SLURM, no token."""
    for name in list(os.environ):
        if _SITE.fullmatch(name):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    fake_model(folder / "model")
    write_rows(folder / "data" / "train.jsonl", {"text": "one"}, {"text": "two"})
    return folder


@pytest.fixture
def hardware(monkeypatch: pytest.MonkeyPatch) -> Callable[[Hardware], None]:
    """`hardware(machine(gpus=8))` sets the hardware that the launcher finds. Before: no GPU."""

    def found(this: Hardware) -> None:
        monkeypatch.setattr(topology, "detect_hardware", lambda: this)

    found(machine())
    return found


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`packages(without="wandb")`: the launcher finds every optional package except these."""

    def present(without: tuple[str, ...] | str = ()) -> None:
        missing = (without,) if isinstance(without, str) else without
        monkeypatch.setattr(installed_packages, "installed", lambda name: name not in missing)

    present()
    return present
