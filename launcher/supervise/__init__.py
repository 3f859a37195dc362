"""Runs the ranks: starts them, watches them, explains a failure, and starts them again."""
