"""Upload the final model in one commit. A new repository is private; one that is public already stays so."""

from __future__ import annotations

import glob
import json
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from trainers.config.errors import ConfigError
from trainers.config.schema import TrainConfig
from trainers.data.files import is_hub_id
from trainers.model.hub_access import ask_again
from trainers.output.model_card import last_part, name_of
from trainers.rank.say import say
from trainers.storage import run_files
from trainers.storage.ending import CARD, read_ending
from trainers.storage.run_folder import FINISHED, METRICS
from trainers.storage.saved_model import ADAPTER, read_object

WEIGHTS = (".safetensors", ".safetensors.index.json", ADAPTER)
PAUSES = (1.0, 5.0, 20.0, 60.0)  # seconds before each further attempt of an upload
# Files of the final folder that are not uploaded. trainer_state.json names folders of this machine.
# training_args.bin is a pickle, which nobody should have to trust.
LEFT_OUT = ("trainer_state.json", "training_args.bin")
ADDED = (CARD, METRICS)  # what is uploaded in addition to the model and its tokenizer
BUSY = frozenset({408, 409, 425, 429, 500, 502, 503, 504})  # status codes that another attempt may change
REFUSED = frozenset({401, 403, 404})  # the token, its permissions, or the account


class UploadFailed(RuntimeError):
    """The hub does not accept the upload. The model is complete in the run's folder."""


def push(config: TrainConfig, folder: Path, pauses: Sequence[float] = PAUSES) -> str:
    """Upload the final model to the repository username/<name of the folder>, and return its address.

    The upload is one commit, so that the repository never contains an incomplete model. `pauses` are the
    seconds between attempts.

    Raises:
        ConfigError: the hub refuses the token or the name, or the hub is switched off here; or there is no
            finished model to upload.
        UploadFailed: the hub does not accept the upload, or not within the attempts.
    """
    published(folder)  # before anything is sent
    ask_again()
    repo, token = f"{config.username}/{name_of(folder)}", (config.token or "").strip()
    if not token.isascii() or not token.isprintable() or " " in token:
        # An HTTP library prints a header that it cannot send.
        raise ConfigError(f"token: it contains a character that no token has. {_by_hand(repo, folder)}")
    for attempt, pause in enumerate((*pauses, None), start=1):
        try:
            address, public = _upload(repo, folder, token)
            break
        except Exception as error:
            # The client raises errors of many classes, from several libraries. They are not chained, because
            # a traceback of the request does not help, and may contain the token.
            reason = _reason(error).replace(token, "(hidden)") if token else _reason(error)
            status = _status(error)
            if _is_mistake(error, status):
                raise ConfigError(f"push_to_hub: {repo}: {reason} {_by_hand(repo, folder)}") from None
            if pause is None or (status is not None and status not in BUSY):
                raise UploadFailed(
                    f"push_to_hub: {repo}: {reason} (attempt {attempt}) {_by_hand(repo, folder)}"
                ) from None
        say("push_to_hub", f"{reason} Trying again.")
        time.sleep(pause)
    if public:
        say("note", f"push_to_hub: {repo} existed before, and is public.")
    say("pushed", address)
    return address


def _upload(repo: str, folder: Path, token: str) -> tuple[str, bool]:
    """Make one attempt. Return the address of the repository, and whether it is public. Safe to repeat."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()  # rank 0's output is a file
    api = HfApi(token=token)  # the address is the library's setting HF_ENDPOINT
    api.create_repo(repo, private=True, exist_ok=True)
    info = api.model_info(repo)
    new = {name: folder / name for name in published(folder)}
    # An adapter or shards of an earlier push would be loaded with this model, or instead of it.
    old = [file.rfilename for file in info.siblings or [] if file.rfilename.endswith(WEIGHTS)]
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        *(CommitOperationDelete(name) for name in old if name not in new),
        *(CommitOperationAdd(name, _content(path)) for name, path in new.items()),
    ]
    api.create_commit(repo, operations, commit_message="Model trained with Phalanx")
    public = info.private is False
    return f"{api.endpoint}/{repo}", public


def published(folder: Path) -> list[str]:
    """Return the files to upload: those that the run wrote for it. Links and the user's files are not.

    Raises:
        ConfigError: the folder has no finished run, or not all files of its model.
    """
    ending = read_ending(folder)
    if ending is None:
        raise ConfigError(f"{folder} has no {FINISHED}, so it is not known which files are the run's.")
    listed = [name for name in ending.names(folder) if name not in LEFT_OUT]
    if lost := [name for name in listed if not _is_plain(folder, name)]:
        raise ConfigError(f"{folder / lost[0]} is missing or a link, so the model is not uploaded.")
    if not run_files.has_weights(listed):
        raise ConfigError(f"{folder}: there are no weights to upload.")
    return sorted([*listed, *(name for name in ADDED if _is_plain(folder, name))])


def _is_plain(folder: Path, name: str) -> bool:
    """Return whether this is a file of the folder, and neither it nor a folder above it is a link."""
    path = folder / name
    links = (part.is_symlink() for part in (path, *path.parents[: name.count("/")]))
    return path.is_file() and not any(links)


def _content(path: Path) -> str | bytes:
    """Return what to upload for a file: its path, or the config of an adapter without local folders."""
    if path.name != ADAPTER:
        return str(path)
    values = read_object(path)
    base = values.get("base_model_name_or_path")
    if isinstance(base, str) and not is_hub_id(base):
        values["base_model_name_or_path"] = last_part(base)
    return json.dumps(values, indent=2).encode()


def _status(error: BaseException | None) -> int | None:
    """Return the status code of the hub, which may be in the cause of another error."""
    from huggingface_hub.errors import HfHubHTTPError

    while error is not None:
        if isinstance(error, HfHubHTTPError):
            return int(error.response.status_code)
        error = error.__cause__
    return None


def _is_mistake(error: Exception, status: int | None) -> bool:
    """Return whether the user must fix it: the token, the account, the name, or the offline mode."""
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

    return status in REFUSED or isinstance(error, (HFValidationError, OfflineModeIsEnabled))


def _reason(error: Exception) -> str:
    """Return the reason in one line, because the terminal shows one line of what stopped a rank."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so nothing is uploaded."
    status = _status(error)
    message = error.server_message if isinstance(error, HfHubHTTPError) else str(error)
    message = " ".join((message or "no reason given").split())
    if status in REFUSED:
        return f"the hub refuses the token, or the account ({status}: {message})."
    return f"the hub answered {status} ({message})." if status else f"{type(error).__name__}: {message}."


def _by_hand(repo: str, folder: Path) -> str:
    """Return where the model is, and the command that uploads the same files."""
    return f"The model is safe in {folder}. Upload it by hand: {command(repo, folder)}"


def command(repo: str, folder: Path) -> str:
    """Return the command that uploads the same files without Phalanx."""
    patterns = [word for name in published(folder) for word in ("--include", glob.escape(name))]
    return shlex.join(["hf", "upload", repo, str(folder.resolve()), ".", "--private", *patterns])
