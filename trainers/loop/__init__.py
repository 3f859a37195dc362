"""The course of a run in a rank, and the Trainer classes that it uses."""
