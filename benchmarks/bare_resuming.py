"""The script that recovery.py compares with: bare_sft.py that saves, and resumes from its last checkpoint.

torchrun --standalone --nproc-per-node 2 --max-restarts 3 benchmarks/bare_resuming.py MODEL DATA OUT

Full training in float32. Each rank writes its process id to OUT/rank-R.pid, and rank 0 prints a line for each
step. Everything that is not set here is TRL's default, including activation checkpointing.
"""

import argparse
import os
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("model")
parser.add_argument("data", help="JSONL: prompt and completion")
parser.add_argument("out", type=Path)
parser.add_argument("--length", type=int, default=128)
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--save-steps", type=int, default=10)
parser.add_argument("--kept", type=int, default=2, help="checkpoints to keep")
parser.add_argument("--lr", type=float, default=2e-5)
options = parser.parse_args()


class Steps(TrainerCallback):
    def on_log(self, args, state, control, logs, **kwargs):
        if state.is_world_process_zero and "loss" in logs:
            print(f"step {state.global_step}/{state.max_steps}  loss {float(logs['loss']):.4f}", flush=True)


options.out.mkdir(parents=True, exist_ok=True)
(options.out / f"rank-{os.environ['RANK']}.pid").write_text(str(os.getpid()))
trainer = SFTTrainer(
    model=AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32),
    args=SFTConfig(
        output_dir=str(options.out),
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        max_length=options.length,
        per_device_train_batch_size=1,
        learning_rate=options.lr,
        max_steps=options.steps,
        logging_steps=1,
        save_steps=options.save_steps,
        save_total_limit=options.kept,
        report_to="none",
        disable_tqdm=True,
    ),
    train_dataset=load_dataset("json", data_files=options.data, split="train"),
    processing_class=AutoTokenizer.from_pretrained(options.model),
    callbacks=[Steps()],
)
trainer.train(resume_from_checkpoint=get_last_checkpoint(options.out))
