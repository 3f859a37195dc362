"""Sizes in bytes of a parameter and its optimiser state."""

FLOAT32_BYTES = 4  # a weight, or its gradient
ADAM_BYTES = 2 * FLOAT32_BYTES  # the two moments of a trained parameter
