"""One rank: its start and end, heartbeats, signals, failures, and the values that all ranks agree on."""
