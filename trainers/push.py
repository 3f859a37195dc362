"""Upload the final model of a finished run: `python -m trainers.push RUN`.

A run with push_to_hub does this at its end. This repeats only the upload, with the token of the environment.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainers.config.errors import UNFINISHED, USAGE_ERROR, ConfigError
from trainers.config.settings import resolve
from trainers.config.values import Value
from trainers.output.hub import command, push
from trainers.output.model_card import name_of
from trainers.rank.failures import for_user
from trainers.rank.say import say
from trainers.storage.ending import UPLOAD, Ending, damaged_model, good_copy, read_ending
from trainers.storage.folder_lock import lock_folder, unlock_folder
from trainers.storage.identity import RECORD
from trainers.storage.state_files import damaged, read_object


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns 0, 2 for a mistake of the user, or 10 if the hub did not accept it."""
    parser = argparse.ArgumentParser(prog="trainers.push", description=__doc__.split(":")[0])
    parser.add_argument("folder", type=Path, help="a run's folder")
    parser.add_argument("--username", help="account or organisation on the hub (default: that of the run)")
    options = parser.parse_args(argv)
    try:
        upload(options.folder, options.username)
    except (ConfigError, RuntimeError) as error:
        say("error", str(error))
        return USAGE_ERROR if isinstance(error, ConfigError) else UNFINISHED
    except OSError as error:
        if (found := for_user(error)) is None:
            raise
        say("error", found[0])
        return found[1]
    finally:
        unlock_folder()
    return 0


def upload(folder: Path, username: str | None) -> None:
    """Upload the final model of a run, and record it.

    Raises:
        ConfigError: the run has not finished, there is no username or token, or the hub refuses them.
        RuntimeError: the hub does not accept the upload.
    """
    if not (folder / RECORD).is_file():
        raise ConfigError(f"{folder} is not the folder of a run: it has no {RECORD}.")
    lock_folder(folder)
    ending = read_ending(folder)
    if ending is None:
        raise ConfigError(f"{folder}: the run has not finished. Continue it with phalanx train --resume.")
    if why := ending.why_damaged(folder):
        raise _damaged(folder, ending, why)
    values = {
        "trainer": _recorded(folder, "trainer"),
        "username": username or _recorded(folder, "username"),
        "push_to_hub": True,
    }
    settings = resolve({name: Value(value, str(folder / RECORD), name) for name, value in values.items()})
    push(settings.train, folder)
    if UPLOAD not in ending.done:
        ending.done.append(UPLOAD)
        ending.write(folder)


def _recorded(folder: Path, name: str) -> Any:
    """Return the value that run.json records."""
    path, remedy = (
        folder / RECORD,
        "Restore it from a copy, or start the run again with --resume: it writes it.",
    )
    try:
        return read_object(path, remedy)["config"][name]["value"]
    except (KeyError, TypeError):
        raise damaged(path, f"it has no value of {name}", remedy) from None


def _damaged(folder: Path, ending: Ending, why: str) -> ConfigError:
    """Return the error for files that are not as the run saved them."""
    copy = good_copy(folder, ending)
    if copy is None:
        return damaged_model(folder, ending, why)
    by_hand = ""
    with suppress(ConfigError):  # there are no weights to upload
        by_hand = command(f"ACCOUNT/{name_of(folder)}", folder)
    return ConfigError(
        f"{folder}: the final model is damaged: {why}. It is not uploaded. Start the run again with "
        f"--resume: it saves the model again, from {copy.name}."
        + (f" If you changed the file yourself, upload it by hand: {by_hand}" if by_hand else "")
    )


if __name__ == "__main__":
    sys.exit(main())
