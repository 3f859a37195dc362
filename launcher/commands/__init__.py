"""The commands of `phalanx`, one module for each.

Each module has HELP (one line), USAGE (what follows the command's name), add_arguments(parser) and run(...).
run() takes the parsed arguments by name and returns the exit code. Importing a module loads nothing heavy.
"""

# In the order of --help: the most used commands first.
COMMANDS = (
    "train", "show", "data", "submit", "status", "logs", "cancel", "evaluate", "consolidate", "push", "llm",
    "schema", "completion",
)  # fmt: skip
