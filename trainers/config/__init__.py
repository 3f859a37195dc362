"""The config of a run: its fields, its file, and the rules between fields. Imports only pydantic and yaml."""
