"""Decisions before anything starts: topology, backend, memory, and the command. Starts nothing."""
