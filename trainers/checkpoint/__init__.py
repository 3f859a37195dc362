"""Write checkpoints, verify them, and resume from them."""
