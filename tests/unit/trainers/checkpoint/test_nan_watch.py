"""NaN and infinity: they are found at their step (on a GPU one step later), and the batch is written."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from trainers.checkpoint.nan_watch import FiniteWatch, StepRecord

NAN, INF = float("nan"), float("inf")


def batch(loss: float, first: int = 1) -> tuple[dict[str, Any], torch.Tensor]:
    """Return a micro-batch of two short samples, and its loss."""
    ids = torch.tensor([[first, 2, 3], [4, 5, 6]])
    return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}, torch.tensor(
        loss
    )


def step(watch: FiniteWatch, number: int, *losses: float, norm: Any = None) -> int:
    """Do an optimiser step of these micro-batches, and return the result of end()."""
    watch.begin(number)
    for index, loss in enumerate(losses):
        watch.record_loss(*batch(loss, first=index))
    if norm is not None:
        watch.record_norm(norm)
    return watch.end()


@pytest.mark.parametrize("norm", [None, 0.0, 1.5, torch.tensor(1.5), torch.tensor([1.5])])
def test_finite_values_are_not_reported(norm: Any) -> None:
    watch = FiniteWatch(fp16=False)
    assert [step(watch, number, 1.0, 2.0, norm=norm) for number in (1, 2)] == [0, 0]
    assert watch.wait() == 0
    assert watch.bad is None


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_bad_loss_is_found_in_any_micro_batch(value: float, place: int) -> None:
    losses = [1.0, 2.0, 3.0]
    losses[place] = value
    watch = FiniteWatch(fp16=False)
    assert step(watch, 1, 1.0) == 0
    assert step(watch, 2, *losses, norm=1.0) == 1
    assert watch.bad_step == 2


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("kind", [float, torch.tensor], ids=["float", "tensor"])
def test_a_bad_gradient_norm_is_found(value: float, kind: Any) -> None:
    watch = FiniteWatch(fp16=False)
    assert step(watch, 1, 1.0, norm=kind(value)) == 1


@pytest.mark.parametrize("value", [NAN, INF])
def test_with_fp16_only_the_loss_counts_since_the_scaler_checks_gradients(value: float) -> None:
    watch = FiniteWatch(fp16=True)
    assert step(watch, 1, 1.0, norm=value) == 0
    assert step(watch, 2, NAN, norm=1.0) == 1


def test_the_norm_of_sharded_gradients_is_gathered() -> None:
    class Sharded:
        def full_tensor(self) -> torch.Tensor:
            return torch.tensor(NAN)

    assert step(FiniteWatch(fp16=False), 1, 1.0, norm=Sharded()) == 1


def test_losses_may_have_any_type_and_shape() -> None:
    watch = FiniteWatch(fp16=False)
    watch.begin(1)
    for loss in (torch.tensor(1.0, dtype=torch.bfloat16), torch.tensor([2.0], requires_grad=True)):
        watch.record_loss({}, loss)
    assert watch.end() == 0
    watch.begin(2)
    watch.record_loss({}, torch.tensor(NAN, dtype=torch.float16))
    assert watch.end() == 1


def test_a_step_without_batches_is_finite() -> None:
    assert step(FiniteWatch(fp16=False), 1) == 0


def test_a_bad_step_is_reported_until_the_end() -> None:
    watch = FiniteWatch(fp16=False)
    step(watch, 3, NAN)
    assert (watch.wait(), watch.wait()) == (1, 1)
    assert step(watch, 4, 1.0) == 1
    assert watch.bad_step == 3


def test_a_rank_whose_step_was_finite_names_the_same_step() -> None:
    watch = FiniteWatch(fp16=False)
    step(watch, 5, 1.0)
    assert (watch.bad, watch.bad_step) == (None, 5)


def test_settle_reads_the_pending_result() -> None:
    """As on a GPU: end() leaves the flag of its step, and the next call reads it."""
    waited = []

    class Event:
        def synchronize(self) -> None:
            waited.append(True)

    watch = FiniteWatch(fp16=False)
    for flag, expected in ((False, 0), (True, 1)):
        record = StepRecord(7, [batch(NAN)])
        watch.previous = (record, torch.tensor(flag), Event())
        assert watch.wait() == expected
        assert watch.previous is None
    assert waited == [True, True]
    assert watch.bad_step == 7


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_result_comes_one_step_later() -> None:
    watch = FiniteWatch(fp16=False)
    results = []
    for number, loss in enumerate((1.0, NAN, 1.0), start=1):
        watch.begin(number)
        watch.record_loss({}, torch.tensor(loss, device="cuda"))
        watch.record_norm(torch.tensor(1.0, device="cuda"))
        results.append(watch.end())
    assert results == [0, 0, 1]
    assert watch.bad_step == 2
    watch = FiniteWatch(fp16=False)
    watch.begin(1)
    watch.record_loss({}, torch.tensor(NAN, device="cuda"))
    assert (watch.end(), watch.wait()) == (0, 1)


class Tokenizer:
    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run folder of rank 1, which was started without the launcher."""
    monkeypatch.delenv("PHALANX_LOG_DIR", raising=False)
    monkeypatch.setenv("RANK", "1")
    return tmp_path


def written(watch: FiniteWatch, folder: Path) -> dict[str, Any]:
    path = watch.write(folder, Tokenizer())
    assert path is not None
    assert path.name == f"not-finite-step-{watch.bad_step}-rank-1.json"
    content: dict[str, Any] = json.loads(path.read_text(), parse_constant=pytest.fail)  # NaN is not JSON
    return content


def test_only_the_batches_with_a_bad_loss_are_written(folder: Path) -> None:
    watch = FiniteWatch(fp16=False)
    step(watch, 3, 1.0, NAN, 2.0, -INF, norm=torch.tensor(NAN))
    assert written(watch, folder) == {
        "step": 3,
        "grad_norm": "nan",
        "batches": [
            {"loss": "nan", "text": ["1 2 3", "4 5 6"], "input_ids": [[1, 2, 3], [4, 5, 6]]},
            {"loss": "-inf", "text": ["3 2 3", "4 5 6"], "input_ids": [[3, 2, 3], [4, 5, 6]]},
        ],
    }


def test_if_the_losses_are_finite_all_batches_of_the_step_are_written(folder: Path) -> None:
    watch = FiniteWatch(fp16=False)
    step(watch, 3, 1.0, 2.0, norm=INF)
    content = written(watch, folder)
    assert content["grad_norm"] == "inf"
    assert [(each["loss"], each["text"][0]) for each in content["batches"]] == [
        ("1.0", "0 2 3"),
        ("2.0", "1 2 3"),
    ]


def test_the_ids_of_pairs_are_written_under_their_names(folder: Path) -> None:
    watch = FiniteWatch(fp16=False)
    watch.begin(3)
    ids = torch.tensor([[1, 2]])
    watch.record_loss(
        {"prompt_ids": ids, "chosen_input_ids": ids + 1, "labels": ids, "name": "x"}, torch.tensor(NAN)
    )
    watch.end()
    assert written(watch, folder) == {
        "step": 3,
        "grad_norm": None,
        "batches": [{"loss": "nan", "text": None, "prompt_ids": [[1, 2]], "chosen_input_ids": [[2, 3]]}],
    }


def test_the_batches_of_the_bad_step_are_written_even_if_it_is_the_previous_one(folder: Path) -> None:
    watch = FiniteWatch(fp16=False)
    watch.previous = (StepRecord(7, [batch(NAN, first=9)]), torch.tensor(True), None)
    watch.begin(8)
    watch.record_loss(*batch(1.0))
    watch.wait()
    assert [each["text"][0] for each in written(watch, folder)["batches"]] == ["9 2 3"]


def test_with_the_launcher_the_file_is_next_to_the_logs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs = folder / "launch" / "attempt-1"
    logs.mkdir(parents=True)
    monkeypatch.setenv("PHALANX_LOG_DIR", str(logs))
    watch = FiniteWatch(fp16=False)
    step(watch, 3, NAN)
    assert watch.write(folder, Tokenizer()) == logs / "not-finite-step-3-rank-1.json"


def test_a_rank_without_a_bad_batch_writes_nothing(folder: Path) -> None:
    watch = FiniteWatch(fp16=False)
    step(watch, 3, 1.0)
    assert watch.write(folder, Tokenizer()) is None
    assert list(folder.iterdir()) == []


def test_a_loss_of_shape_1_can_be_written(folder: Path) -> None:
    watch = FiniteWatch(fp16=False)
    watch.begin(3)
    watch.record_loss(batch(0.0)[0], torch.tensor([NAN]))
    watch.end()
    assert math.isnan(float(written(watch, folder)["batches"][0]["loss"]))
