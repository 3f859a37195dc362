"""The launcher: decides what to run, starts the ranks and watches them.

It never imports torch, transformers, accelerate, trl, peft or datasets.
"""
