"""The model: loading, LoRA, attention, sharding, activation checkpointing, and the isolation probe."""
