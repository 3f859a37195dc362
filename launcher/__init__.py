"""What decides and starts. Never imports torch, transformers, accelerate, trl, peft or datasets."""
