"""The life of a run in a rank, and TRL's trainers adapted to it."""
