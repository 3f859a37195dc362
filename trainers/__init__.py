"""The code that runs inside each rank: config, data, model, training, checkpoints and output.

Each module `trainers.NAME` (sft, dpo, ...) is the entry point of one trainer: `accelerate launch -m
trainers.sft config.yaml`. The trainers package never imports launcher. The launcher imports from here only
modules that do not import torch: config, and parts of data, rank and storage.
"""
