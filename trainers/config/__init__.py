"""The config of a run: its fields, its file, and what contradicts what. Light: pydantic and yaml only."""
