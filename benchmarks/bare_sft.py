"""The script that the benchmarks compare with: supervised fine-tuning in plain TRL.

accelerate launch --multi_gpu --num_processes 2 benchmarks/bare_sft.py MODEL DATA OUT --packing

Everything that is not a flag is TRL's default, including activation checkpointing.
"""

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("model")
parser.add_argument("data", help="JSONL: prompt and completion, or input_ids and labels")
parser.add_argument("out")
parser.add_argument("--chat", action="store_true", help="prompt and completion are turns for the template")
parser.add_argument("--packing", action="store_true")
parser.add_argument("--length", type=int, default=256)
parser.add_argument("--batch", type=int, default=1)
parser.add_argument("--accumulation", type=int, default=1)
parser.add_argument("--steps", type=int, default=2)
parser.add_argument("--lr", type=float, default=2e-5)
parser.add_argument("--bf16", action="store_true", help="train in bf16. Default: float32")
parser.add_argument("--lora", action="store_true", help="train an adapter (r 16, all linear layers)")
parser.add_argument("--attention", help="attn_implementation. Default: that of transformers")
parser.add_argument("--no-checkpointing", action="store_true")
options = parser.parse_args()


def to_turns(row):
    return {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": row["completion"]}],
    }


rows = load_dataset("json", data_files=options.data, split="train")
trainer = SFTTrainer(
    model=AutoModelForCausalLM.from_pretrained(
        options.model,
        dtype=torch.bfloat16 if options.lora and options.bf16 else torch.float32,
        attn_implementation=options.attention,
    ),
    args=SFTConfig(
        output_dir=options.out,
        use_cpu=not torch.cuda.is_available(),
        bf16=options.bf16,
        packing=options.packing,
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
    ),
    train_dataset=rows.map(to_turns) if options.chat else rows,
    processing_class=AutoTokenizer.from_pretrained(options.model),
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear") if options.lora else None,
)
trainer.train()
