"""Sizes in bytes: of a parameter and its optimiser state, and as text."""

FLOAT32_BYTES = 4  # a weight, or its gradient
ADAM_BYTES = 2 * FLOAT32_BYTES  # the two moments of a trained parameter


def format_bytes(size: int) -> str:
    """Return a number of bytes as text, in GB or MB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
