"""Checkpoints: writing them, verifying them, and resuming from them."""
