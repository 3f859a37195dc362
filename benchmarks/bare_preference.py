"""The script that the benchmarks compare with for pairs: DPO or a reward model in plain TRL.

accelerate launch --multi_gpu --num_processes 2 benchmarks/bare_preference.py dpo MODEL DATA OUT

Everything that is not a flag is TRL's default, including activation checkpointing.
"""

import argparse

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

KINDS = {
    "dpo": (DPOTrainer, DPOConfig, AutoModelForCausalLM),
    "reward": (RewardTrainer, RewardConfig, AutoModelForSequenceClassification),
}
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("trainer", choices=KINDS)
parser.add_argument("model", help="for reward: with a score head, else TRL initialises a new one")
parser.add_argument("data", help="JSONL: prompt, chosen, rejected")
parser.add_argument("out")
parser.add_argument("--padding-free", action="store_true", help="dpo; an error if TRL pads anyway")
parser.add_argument("--length", type=int, default=256)
parser.add_argument("--batch", type=int, default=1, help="pairs")
parser.add_argument("--accumulation", type=int, default=1)
parser.add_argument("--steps", type=int, default=2)
parser.add_argument("--lr", type=float, default=2e-5)
parser.add_argument("--no-checkpointing", action="store_true")
options = parser.parse_args()

make_trainer, make_config, model_class = KINDS[options.trainer]
trainer = make_trainer(
    model=model_class.from_pretrained(options.model, dtype=torch.float32),
    args=make_config(
        output_dir=options.out,
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        max_length=options.length,
        per_device_train_batch_size=options.batch,
        gradient_accumulation_steps=options.accumulation,
        gradient_checkpointing=not options.no_checkpointing,
        learning_rate=options.lr,
        max_steps=options.steps,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **({"padding_free": True} if options.padding_free else {}),
    ),
    train_dataset=load_dataset("json", data_files=options.data, split="train"),
    processing_class=AutoTokenizer.from_pretrained(options.model),
)
if options.padding_free and not getattr(trainer, "padding_free", False):
    raise SystemExit("error: this release of TRL pads, although padding_free is set")
trainer.train()
