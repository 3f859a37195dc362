"""Read metrics.jsonl, one logged entry a line. A damaged line never stops a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainers.config.text import count_of
from trainers.rank.say import say
from trainers.storage.run_folder import METRICS
from trainers.storage.state_files import read_lines


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return what a run has logged. Lines that are damaged are left out, and one note names them."""
    path = folder / METRICS
    try:
        found, bad = read_lines(path)
    except FileNotFoundError:
        return []
    except OSError as error:
        say("note", f"{path} cannot be read ({error.strerror}); what was logged before is left out")
        return []
    entries = [entry for entry in found if isinstance(entry.get("step"), int)]
    if bad or len(entries) < len(found):
        which = f", such as line {bad[0]}" if bad else ""
        damaged = count_of(len(bad) + len(found) - len(entries), "line")
        say("note", f"{path}: {damaged} cannot be read{which}, and will be left out")
    return entries
