"""Use cached files of the hub without asking, if the hub does not answer.

The libraries ask the hub for each file, and again, with retries, for each that a model may have and the cache
has not. If connections hang, this takes many minutes, or for ever behind a proxy. Here the hub is asked once.
"""

from __future__ import annotations

import os
import ssl
import sys
import urllib.request
from pathlib import Path
from threading import Thread
from urllib.error import HTTPError, URLError

from trainers.config.hub_paths import hub_cache
from trainers.config.schema import TrainConfig
from trainers.model.source import source_arguments
from trainers.rank.process import rank
from trainers.rank.say import say

OFFLINE = "HF_HUB_OFFLINE"
_switched: list[bool] = []  # whether offline mode is on because the hub did not answer


def use_cache_if_silent(config: TrainConfig) -> None:
    """Switch the libraries to offline mode if all models are in the cache, and the hub does not answer."""
    from huggingface_hub import constants, is_offline_mode, try_to_load_from_cache

    names = [name for name in (config.model, config.model_ref) if name and not Path(name).exists()]
    if not names or is_offline_mode():
        return
    for name in names:
        revision = source_arguments(name, config)["revision"]
        if not isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
            return
    if why := _why_silent(constants.ENDPOINT, float(constants.HF_HUB_ETAG_TIMEOUT)):
        _set_offline(True)
        if rank() == 0:
            say(
                "warning",
                f"{constants.ENDPOINT} does not answer ({why}); the files in {hub_cache()} are used",
            )


def ask_again() -> None:
    """Leave the offline mode that use_cache_if_silent() has set: the hub may answer later, for an upload."""
    if _switched:
        _set_offline(False)


def _set_offline(on: bool) -> None:
    """Set what the libraries have read from the environment at their import."""
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = on
    if "datasets" in sys.modules:
        import datasets

        datasets.config.HF_HUB_OFFLINE = on
    if on:
        os.environ[OFFLINE] = "1"
        _switched.append(True)
    else:
        os.environ.pop(OFFLINE, None)
        _switched.clear()


def _why_silent(endpoint: str, seconds: float) -> str | None:
    """Return why no answer comes from an endpoint within some seconds, or None if there is one of any kind.

    In a thread: looking up a name has no time limit of its own.
    """
    found: list[str | None] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=seconds):
                found.append(None)
        except HTTPError:
            found.append(None)
        except URLError as error:
            found.append(None if isinstance(error.reason, ssl.SSLError) else str(error.reason))
        except OSError as error:
            found.append(str(error))

    asking = Thread(target=ask, daemon=True)
    asking.start()
    asking.join(seconds)
    return found[0] if found else f"nothing within {seconds:g} s"
