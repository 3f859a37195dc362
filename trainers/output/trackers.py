"""Experiment trackers: one run in wandb or TensorBoard, whatever the number of ranks and restarts.

The libraries' own integrations rename the metrics and begin a new run at each restart; these do neither.
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

from trainers.config.errors import first_line
from trainers.config.schema import TrainConfig
from trainers.rank.say import say
from trainers.storage.run_folder import TRACKER, write_whole

if TYPE_CHECKING:
    import wandb

CONNECT_SECONDS = 5.0
# A network that is lost must not hold the machines at the end of a run; what is left stays on disk.
UPLOAD_SECONDS = 300.0


class Tracker(Protocol):
    """What a run tells a tracker; rank 0 alone holds one."""

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Takes what metrics.jsonl got at this optimiser step."""

    def finish(self, code: int = 0) -> None:
        """Ends this start; code is the exit code of the run."""


def open_tracker(
    config: TrainConfig, folder: Path, public: dict[str, Any], resumed_step: int = 0
) -> Tracker | None:
    """The tracker that config.log names; public is the effective config without secrets."""
    if config.log == "wandb":
        return Guarded("wandb", lambda: Wandb(config, folder, public))
    if config.log == "tensorboard":
        return Guarded("tensorboard", lambda: TensorBoard(folder, public, resumed_step))
    return None


class Guarded:
    """Keeps a tracker's failure from the run: the first one is told in a line, and switches it off."""

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
        except Exception as error:  # whatever a tracker raises, the training is worth more
            self.tracker = None
            reason = first_line(error)
            say("warning", f"tracker {self.name} failed: {reason}; the run goes on without it")


class Wandb:
    """A run of wandb, with `step` as its x axis.

    wandb's own counter only goes up, and would drop what is logged again after a resume.
    """

    def __init__(self, config: TrainConfig, folder: Path, public: dict[str, Any]) -> None:
        import wandb

        # From the environment and the files of `wandb init` and `wandb login`.
        site = wandb.setup(settings=wandb.Settings(silent=True)).settings
        obstacle = _obstacle(site)
        self.run = wandb.init(
            id=_run_id(folder, site.run_id),
            resume="allow",
            project=config.wandb_project or site.project or folder.name,
            entity=config.wandb_entity,  # None: as the site says, as with mode
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
            # Each start lies in a folder of its own; the pattern finds all of this run's.
            place = shlex.quote(os.path.dirname(self.run.settings.sync_dir))
            command = f"wandb sync {place}/offline-run-*-{self.run.id}"
            say("wandb", f"offline ({obstacle or 'as set'}); upload later: {command}")

    def log(self, step: int, values: dict[str, Any]) -> None:
        self.run.log({"step": step, **values})

    def finish(self, code: int = 0) -> None:
        self.run.finish(exit_code=code)


def _run_id(folder: Path, wanted: str | None) -> str:
    """The id that an earlier start left in the folder, else a new one, which it leaves there."""
    path = folder / TRACKER
    if path.exists():
        return str(json.loads(path.read_text(encoding="utf-8"))["wandb"])
    run_id = wanted or secrets.token_hex(8)  # never from `random`, whose state is the training's
    write_whole(path, json.dumps({"wandb": run_id}) + "\n")
    return run_id


def _obstacle(site: wandb.Settings) -> str | None:
    """Why the run cannot be online, where it was not asked to be anything else."""
    from wandb.sdk.lib.wbauth.wbnetrc import read_netrc_auth

    if site.mode in ("offline", "dryrun", "disabled"):
        return None
    if not (site.api_key or site.identity_token_file or read_netrc_auth(host=site.base_url)):
        return "no API key"  # wandb would ask for it, and a rank cannot answer
    if not os.environ.get("WANDB_MODE") and not _reachable(site.base_url):
        return f"no connection to {urlsplit(site.base_url).netloc}"
    return None


def _reachable(url: str) -> bool:
    """Whether the server, or the proxy on the way to it, takes a connection."""
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
    """Event files in runs/; a start hides what an earlier one logged after the step it goes on from."""

    def __init__(self, folder: Path, public: dict[str, Any], resumed_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        place = os.environ.get("TENSORBOARD_LOGGING_DIR") or str(folder / "runs")
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
