"""One module for each command of `phalanx`.

Each has HELP (a line), USAGE (what follows its name), add_arguments(parser), and run(...), which takes what
was parsed by name and returns the exit code. At import they load nothing heavy.
"""

# In the order of --help: the most used first.
COMMANDS = (
    "train", "show", "submit", "status", "logs", "cancel", "evaluate", "consolidate", "llm", "schema",
    "completion",
)  # fmt: skip
