"""The peer of benchmarks/startup.py: the same job as a bare TRL script, as a user would write it by hand.

accelerate launch --multi_gpu --num_processes 2 benchmarks/bare_sft.py MODEL DATA OUT
"""

import sys

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

model_path, data_path, out = sys.argv[1:]


class FirstStep(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero and state.global_step == 1:
            print("FIRST_STEP", flush=True)


def to_messages(row):
    return {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": row["completion"]}],
    }


trainer = SFTTrainer(
    model=AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32),
    args=SFTConfig(
        output_dir=out,
        use_cpu=not torch.cuda.is_available(),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        max_steps=2,
        max_length=256,
        packing=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    ),
    train_dataset=load_dataset("json", data_files=data_path, split="train").map(to_messages),
    processing_class=AutoTokenizer.from_pretrained(model_path),
    callbacks=[FirstStep()],
)
trainer.train()
