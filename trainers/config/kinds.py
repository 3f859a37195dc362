"""The trainers: one record for each, with everything that other modules need to know about it.

To add a trainer, add its record here and its module to trainers/ (CONTRIBUTING.md has the steps).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

TrainerName = Literal["default", "sft", "reward", "dpo", "orpo", "kto", "mlm"]
# The kind of sample that a row becomes, and the columns of such a sample.
RowKind = Literal["text", "masked", "scored_pair", "prompted_pair", "labelled"]
ROW_COLUMNS: dict[RowKind, tuple[str, ...]] = {
    "text": ("input_ids", "labels"),
    "masked": ("input_ids",),
    "scored_pair": ("chosen_ids", "rejected_ids"),  # each includes the prompt
    "prompted_pair": ("prompt_ids", "chosen_ids", "rejected_ids"),
    "labelled": ("prompt_ids", "completion_ids", "label"),
}


@dataclass(frozen=True, kw_only=True)
class TrainerKind:
    """The properties of one trainer."""

    name: TrainerName
    module: str  # `-m trainers.MODULE`
    summary: str  # for the model card
    rows: RowKind
    default_packing: Literal["bfd", "wrapped", "none"] = "bfd"  # packing: auto; none: it never packs
    wraps: bool = False  # whether packing: wrapped may cut its samples
    planned: bool = True  # whether tokens_per_batch may fill its micro-batches
    chooses_tokens: bool = False  # whether train_on selects the tokens of its loss
    trains_on_all: bool = False  # whether train_on: auto means all
    reference: bool = False  # whether its loss compares with a frozen reference model
    losses: tuple[str, ...] = ()  # values of loss_type, the default first (TRL 1.16); (): one loss
    sums_losses: bool = False  # whether loss_type may be several, which are added
    batch_losses: tuple[str, ...] = ()  # losses that need two samples in a micro-batch
    auto_class: str = "AutoModelForCausalLM"  # its class in transformers
    peft_task: str | None = "CAUSAL_LM"  # its name in peft
    pipeline: str = "text-generation"  # its name on the hub

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of a sample."""
        return ROW_COLUMNS[self.rows]

    @property
    def packs(self) -> bool:
        """Whether samples can share a sequence."""
        return self.default_packing != "none"

    @property
    def pairs(self) -> bool:
        """Whether a row has two answers to one prompt."""
        return self.rows in ("scored_pair", "prompted_pair")

    @property
    def preference(self) -> bool:
        """Whether a row states which answer is better, or whether an answer is wanted."""
        return self.pairs or self.rows == "labelled"

    @property
    def prompted(self) -> bool:
        """Whether a sample has its prompt in a column of its own."""
        return "prompt_ids" in self.columns

    @property
    def scores(self) -> bool:
        """Whether its model has one output, a score, instead of logits."""
        return self.auto_class == "AutoModelForSequenceClassification"

    @property
    def causal(self) -> bool:
        """Whether a token sees only the tokens before it."""
        return self.rows != "masked"

    @property
    def reads_head_weight(self) -> bool:
        """Whether the loss reads the weight of lm_head directly, so an adapter there would never train."""
        return self.reference


_ALL = (
    TrainerKind(
        name="default",
        module="clm",
        summary="next-token prediction on text",
        rows="text",
        default_packing="wrapped",
        wraps=True,
        chooses_tokens=True,
        trains_on_all=True,
    ),
    TrainerKind(
        name="sft",
        module="sft",
        summary="supervised fine-tuning on prompts and answers",
        rows="text",
        wraps=True,
        chooses_tokens=True,
    ),
    TrainerKind(
        name="reward",
        module="reward",
        summary="a reward model: a classifier with one output, which scores an answer",
        rows="scored_pair",
        auto_class="AutoModelForSequenceClassification",
        peft_task="SEQ_CLS",
        pipeline="text-classification",
    ),
    TrainerKind(
        name="dpo",
        module="dpo",
        summary="direct preference optimisation (DPO) on chosen and rejected answers",
        rows="prompted_pair",
        reference=True,
        losses=(
            "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
            "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
        ),
        sums_losses=True,
    ),
    TrainerKind(
        name="orpo",
        module="orpo",
        summary="odds-ratio preference optimisation (ORPO) on chosen and rejected answers",
        rows="prompted_pair",
        chooses_tokens=True,
    ),
    TrainerKind(
        name="kto",
        module="kto",
        summary="Kahneman-Tversky optimisation (KTO) on wanted and unwanted answers",
        rows="labelled",
        planned=False,
        reference=True,
        losses=("kto", "apo_zero_unpaired"),
        batch_losses=("kto",),
    ),
    TrainerKind(
        name="mlm",
        module="mlm",
        summary="masked language modelling",
        rows="masked",
        default_packing="none",
        planned=False,
        auto_class="AutoModelForMaskedLM",
        peft_task=None,
        pipeline="fill-mask",
    ),
)  # fmt: skip
KINDS: dict[str, TrainerKind] = {kind.name: kind for kind in _ALL}


def trainers(which: Callable[[TrainerKind], bool] = lambda kind: True) -> tuple[str, ...]:
    """Return the names of the trainers for which `which` is true, in the order of the documentation."""
    return tuple(kind.name for kind in KINDS.values() if which(kind))
