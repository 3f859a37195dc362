"""The model: loading, LoRA, attention, sharding, checkpointed activations, and proofs about it."""
