"""One process of a run: its start and end, heartbeats, signals, failures, and what all ranks agree on."""
