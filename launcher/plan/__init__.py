"""Decisions before the ranks start: topology, backend, memory and the command. Starts nothing."""
