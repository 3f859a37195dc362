"""Experiment trackers: one run in wandb or TensorBoard, for any number of ranks and restarts.

The integrations of the libraries rename the metrics and begin a new run at each restart. These do not.
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import socket
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from trainers.config.schema import TrainConfig
from trainers.config.text import first_line
from trainers.rank.say import say
from trainers.storage import run_files
from trainers.storage.run_folder import TRACKER
from trainers.storage.state_files import damaged, read_object

if TYPE_CHECKING:
    import wandb

CONNECT_SECONDS = 5.0
# A lost network must not hold the nodes at the end of a run. What is not uploaded stays on disk.
UPLOAD_SECONDS = 300.0


class Tracker(Protocol):
    """What a run calls on its tracker. Only rank 0 has one."""

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Record the values that metrics.jsonl got at this optimiser step."""

    def finish(self, code: int = 0) -> None:
        """End this start. `code` is the exit code of the run."""


def open_tracker(
    config: TrainConfig, folder: Path, public: dict[str, Any], resumed_step: int = 0
) -> Tracker | None:
    """Open the tracker that config.log names. `public` is the effective config without secrets."""
    if config.log == "wandb":
        return Guarded("wandb", lambda: Wandb(config, folder, public))
    if config.log == "tensorboard":
        return Guarded("tensorboard", lambda: TensorBoard(folder, public, resumed_step))
    return None


class Guarded:
    """A tracker whose failure does not stop the run: the first one prints a line and switches it off."""

    def __init__(self, name: str, start: Callable[[], Tracker]) -> None:
        self.name = name
        self.tracker: Tracker | None = None
        self._attempt(lambda: setattr(self, "tracker", start()))

    def log(self, step: int, values: dict[str, Any]) -> None:
        if tracker := self.tracker:
            self._attempt(lambda: tracker.log(step, values))

    def finish(self, code: int = 0) -> None:
        if tracker := self.tracker:
            self._attempt(lambda: tracker.finish(code))
        self.tracker = None

    def _attempt(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # the training must survive any error of a tracker
            self.tracker = None
            reason = first_line(error)
            say("warning", f"tracker {self.name} failed: {reason}; the run continues without it")


class Wandb:
    """A run of wandb, with `step` as its x axis.

    wandb's own counter only goes up. It would drop the values that are logged again after a resume.
    """

    def __init__(self, config: TrainConfig, folder: Path, public: dict[str, Any]) -> None:
        import wandb

        # These come from the environment and from the files of `wandb init` and `wandb login`.
        site = wandb.setup(settings=wandb.Settings(silent=True)).settings
        obstacle = _obstacle(site)
        if not os.environ.get("WANDB_DIR"):
            run_files.make_folder(folder, run_files.WANDB)  # or refuse a link
        self.run = wandb.init(
            id=_run_id(folder, site.run_id),
            resume="allow",
            project=config.wandb_project or site.project or folder.name,
            entity=config.wandb_entity,  # None: the user's own setting, also for mode
            name=config.run_name or site.run_name or folder.name,
            dir=None if os.environ.get("WANDB_DIR") else str(folder.resolve()),
            mode="offline" if obstacle else None,
            config=public,
            allow_val_change=True,  # a resumed start may have another config
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,
                disable_code=True,
                save_code=False,
                x_disable_meta=True,  # the command line, the account, SLURM's variables
                x_save_requirements=False,
                finish_timeout=UPLOAD_SECONDS,
            ),
        )
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")
        if self.run.offline:
            # Each start has its own folder. The pattern matches all folders of this run.
            place = shlex.quote(os.path.dirname(self.run.settings.sync_dir))
            command = f"wandb sync {place}/offline-run-*-{self.run.id}"
            say("wandb", f"offline ({obstacle or 'as configured'}); upload later: {command}")

    def log(self, step: int, values: dict[str, Any]) -> None:
        self.run.log({"step": step, **values})

    def finish(self, code: int = 0) -> None:
        self.run.finish(exit_code=code)


def _run_id(folder: Path, wanted: str | None) -> str:
    """Return the run id that an earlier start wrote to the folder. Otherwise write a new one there."""
    path = folder / TRACKER
    if path.exists():
        remedy = "Restore it from a copy, or remove it: then the tracker begins a new run."
        found = read_object(path, remedy).get("wandb")
        if not isinstance(found, str):
            raise damaged(path, "it has no id of a run", remedy)
        return found
    run_id = wanted or secrets.token_hex(8)  # not from `random`, whose state the training uses
    run_files.write(folder, TRACKER, json.dumps({"wandb": run_id}) + "\n")
    return run_id


def _obstacle(site: wandb.Settings) -> str | None:
    """Return why the run cannot be online. None: it can, or the user asked for another mode."""
    from wandb.sdk.lib.wbauth.wbnetrc import read_netrc_auth

    if site.mode in ("offline", "dryrun", "disabled"):
        return None
    if not (site.api_key or site.identity_token_file or read_netrc_auth(host=site.base_url)):
        return "no API key"  # wandb would ask for it, and a rank cannot answer
    if not os.environ.get("WANDB_MODE") and not _reachable(site.base_url):
        return f"no connection to {urlsplit(site.base_url).netloc}"
    return None


def _reachable(url: str) -> bool:
    """Return whether the server, or the proxy on the way to it, accepts a connection."""
    address = urlsplit(url)
    proxy = urllib.request.getproxies().get(address.scheme)
    if proxy and not urllib.request.proxy_bypass(address.hostname or ""):
        address = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname or "", port), CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


class TensorBoard:
    """Event files in runs/.

    A start hides what an earlier one logged after the step from which the start resumes.
    """

    def __init__(self, folder: Path, public: dict[str, Any], resumed_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        given = os.environ.get("TENSORBOARD_LOGGING_DIR")
        place = given or str(run_files.make_folder(folder, run_files.TENSORBOARD))
        self.writer = SummaryWriter(place, purge_step=resumed_step + 1 if resumed_step else 0)
        text = json.dumps(public, indent=2)
        self.writer.add_text("config", f"```json\n{text}\n```", resumed_step)

    def log(self, step: int, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self.writer.add_scalar(name, value, step)
        self.writer.flush()  # a killed run keeps what it logged

    def finish(self, code: int = 0) -> None:
        self.writer.close()
