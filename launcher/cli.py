"""The commands: `phalanx train | show | submit | status ...`. Nothing heavy at import.

Torch is never imported here.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_args

from trainers.config.errors import DISK_FAILED, USAGE_ERROR, ConfigError
from trainers.config.names import ALIASES, SWITCHES
from trainers.config.schema import TrainConfig
from trainers.rank.failures import disk_is_full

if TYPE_CHECKING:
    from pydantic import BaseModel

    from launcher.config import Run
    from launcher.plan.topology import Topology

COMMANDS = {
    "train": "run a config: check it, start the ranks, watch them",
    "show": "dry run: the effective config, the backend and why, the files and the command",
    "submit": "check a config on the login node, then hand it to SLURM",
    "status": "what runs do: state, step, loss, speed, time left",
    "logs": "print the log of a rank",
    "cancel": "end runs; they save first",
    "evaluate": "measure a run's final model with lm-eval; what follows RUN is for lm-eval",
    "llm": "AutoTrain's flag form: phalanx llm --train --model ... --project-name ...",
    "schema": "print the JSON schema of a config file, for editors",
    "consolidate": "make an ordinary Hugging Face folder of a run's newest checkpoint, or of the one named",
}

OPERANDS = {
    **dict.fromkeys(("train", "show", "submit"), " config.yaml"),
    "consolidate": " RUN|CHECKPOINT",
    "status": " [RUN|JOB]",
    "logs": " RUN",
    "cancel": " RUN|JOB",
    "evaluate": " RUN --tasks NAMES",
}


class _Parser(argparse.ArgumentParser):
    """argparse, with the nearest valid flag named."""

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ").split(" ")[0].split("=")[0]
        if unknown != message and unknown.startswith("--"):
            close = difflib.get_close_matches(unknown, self._flags(), n=1)
            message += f" (did you mean {close[0]}?)" if close else ""
        self.exit(USAGE_ERROR, f"error: {message}\n")

    def _flags(self) -> list[str]:
        """Every flag of this parser and its commands; argparse reports an unknown one from the top."""
        found: list[str] = []
        for action in self._actions:
            found += action.option_strings
            if isinstance(action, argparse._SubParsersAction):
                found += [flag for parser in action.choices.values() for flag in parser._flags()]
        return found


def build_parser(command: str | None) -> argparse.ArgumentParser:
    """The parser; only the asked command gets its flags, so that --help stays fast."""
    parser = _Parser(
        prog="phalanx", description="Fine-tune language models on many GPUs: one config, one command."
    )
    from importlib.metadata import version

    parser.add_argument("--version", action="version", version=f"phalanx {version('phalanx')}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)
    for name, text in COMMANDS.items():
        config = OPERANDS.get(name, "")
        sub = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            usage=f"phalanx {name}{config}{'' if name == 'schema' else ' [--flag VALUE ...]'}",
            allow_abbrev=False,
        )
        if name != command:
            continue
        if name in ("train", "show", "submit"):
            count = "?" if name == "submit" else None  # the lines of --array may begin with configs
            sub.add_argument("config", type=Path, nargs=count, help="config file (YAML, AutoTrain's form)")
        if name == "consolidate":
            sub.add_argument("source", type=Path, help="a run's folder, or one of its checkpoints")
            sub.add_argument("--output", type=Path, help="folder to write (default: CHECKPOINT-model)")
        if name == "llm":
            sub.add_argument(
                "--train", action="store_true", help="train; the only thing this command does here"
            )
            sub.add_argument("--backend", default="local", help="AutoTrain's key; only local")
        if name in ("logs", "cancel"):
            sub.add_argument("run", help="a run's folder, or a job's id")
        if name == "evaluate":
            sub.add_argument("run", type=Path, help="a run's folder")
            sub.add_argument(
                "arguments", nargs=argparse.REMAINDER, help="lm-eval's, such as --tasks arc_easy"
            )
        if name == "status":
            sub.add_argument("run", nargs="?", help="a run's folder, or a job's id (default: all below here)")
        if name == "logs":
            sub.add_argument("--rank", type=int, default=0, help="whose (default: 0)")
            sub.add_argument("--follow", action="store_true", help="go on until the run ends")
        if name == "submit":
            sub.add_argument(
                "--array",
                metavar="FILE[%%N]|LIST",
                help="a run for each line of a file (at most N at once), or for each of sbatch's numbers",
            )
            sub.add_argument("--dry-run", action="store_true", help="check, and print the command only")
            sub.add_argument("--parsable", action="store_true", help="print the job's id alone")
        if name in ("show", "status"):
            sub.add_argument("--json", action="store_true", dest="as_json", help="print JSON")
        if name in ("train", "show", "llm", "submit"):
            _add_fields(sub, slurm=name in ("show", "submit"))
    return parser


def _add_fields(parser: argparse.ArgumentParser, slurm: bool) -> None:
    """A flag for each field of the schema, in both spellings, and for the names that other tools use."""
    from launcher.config import LaunchConfig, SlurmConfig

    names: dict[str, list[str]] = {}
    for alias, name in ALIASES.items():
        names.setdefault(name, []).append(alias)
    sections: list[tuple[str, type[BaseModel]]] = [("training", TrainConfig), ("launch", LaunchConfig)]
    if slurm:
        sections.append(("slurm", SlurmConfig))
    for title, schema in sections:
        group = parser.add_argument_group(title)
        for name, field in schema.model_fields.items():
            for index, spelling in enumerate((name, *names.get(name, ()))):
                text = field.description or ""
                if index == 0 and field.default not in (None, ""):
                    text += f" (default: {field.default})"
                shown = text.replace("%", "%%") if index == 0 else argparse.SUPPRESS
                kinds = (field.annotation, *get_args(field.annotation))
                _add_flag(group, spelling, shown, switch=bool in kinds)
    for switch in SWITCHES:
        _add_flag(parser, switch, argparse.SUPPRESS, switch=True)


def _add_flag(group: Any, name: str, text: str, switch: bool) -> None:
    dashed, plain = f"--{name.replace('_', '-')}", f"--{name}"
    spellings = dict.fromkeys((dashed, plain))
    # --peft is --peft true, as in AutoTrain.
    more: dict[str, Any] = {"nargs": "?", "const": "true"} if switch else {}
    group.add_argument(*spellings, dest=name, default=argparse.SUPPRESS, metavar="VALUE", help=text, **more)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code (docs/exit-codes.md)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = next((word for word in arguments if not word.startswith("-")), None)
    options = vars(build_parser(command).parse_args(arguments))
    try:
        return _run(options.pop("command"), options)
    except ConfigError as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return USAGE_ERROR
    except OSError as error:
        if not disk_is_full(error):
            raise
        print(f"error: {error.filename or 'the run folder'}: {error.strerror}. Make room.", file=sys.stderr)
        return DISK_FAILED


def _run(command: str, options: dict[str, Any]) -> int:
    from launcher.config import json_schema, load_run

    if command == "schema":
        print(json.dumps(json_schema(), indent=2))
        return 0
    if command == "consolidate":
        from launcher.commands import consolidate

        return consolidate.run(options["source"], options.get("output"))
    if command == "evaluate":
        from launcher.commands import evaluate

        evaluate.run(options["run"], options["arguments"])
    as_json = options.pop("as_json", False)
    if command in ("status", "logs", "cancel"):
        from launcher.commands import status

        if command == "status":
            return status.show_status(options["run"], as_json)
        if command == "logs":
            return status.show_logs(options["run"], options["rank"], options["follow"])
        return status.cancel(options["run"])
    if command == "submit":
        return _submit(options)
    if command == "llm":
        if not options.pop("train"):
            raise ConfigError(
                "phalanx llm: nothing to do. Add --train (deploying and inference are not offered)."
            )
        if not str(options.pop("backend")).startswith("local"):
            raise ConfigError(
                "--backend: only local is offered. Clusters: sbatch slurm/train.sh config.yaml."
            )
    from launcher.plan import topology
    from launcher.slurm import job as slurm
    from launcher.supervise import machines

    run = load_run(options.pop("config", None), options)
    if command != "show":
        run = slurm.going_on(run)
    try:
        layout = topology.resolve_topology(run.launch, topology.detect_hardware())
        return _show(run, layout, as_json) if command == "show" else _train(run, layout)
    except machines.AnotherRefused:
        raise
    except Exception as error:
        message, (number, count) = _located(run, str(error)), slurm.this_node()
        if command != "show" and count > 1:
            machines.refuse(run.folder, number, slurm.this_start(), message)
        if isinstance(error, ConfigError):
            raise ConfigError(message) from None
        raise


def _located(run: Run, message: str) -> str:
    """Puts the line of the file, or the flag, before a message that begins with its key."""
    source = run.source_of(message.split(": ")[0])
    chosen = source and source != "default" and not source.startswith("derived")
    return f"{source}: {message}" if chosen else message


def _train(run: Run, layout: Topology) -> int:
    from launcher.plan import backend, command, preflight, resume_layout
    from launcher.supervise import supervisor
    from launcher.supervise.signals import Signals
    from trainers.storage.data_cache import cache_root

    with Signals() as signals:  # a warning of the job's end may come at any moment
        chosen = backend.resolve_backend(run, layout)
        preflight.preflight(run)
        cache_root()  # not on a login node: the disk of a node may be another
        run = resume_layout.fitted(run, layout, chosen)
        for note in run.settings.notes:
            print(f"note: {note}")
        where = "GPU" if layout.on_gpu else "CPU"
        print(f"backend: {chosen.name} ({chosen.reason}); {layout.num_processes} {where} rank(s)", flush=True)
        if layout.num_machines > 1:
            for variable, name in command.socket_interfaces(layout, os.environ).items():
                print(f"network: {variable}={name}, between the {layout.num_machines} machines", flush=True)
        code = supervisor.train(run, layout, chosen, signals)
    if code == 0 and layout.machine_rank == 0:
        print(f"done: {run.folder} (model, run.json, metrics.jsonl)")
    return code


def _submit(options: dict[str, Any]) -> int:
    from launcher.commands import submit

    config, array = options.pop("config"), options.pop("array")
    dry, plain = options.pop("dry_run"), options.pop("parsable")
    tasks, argv = submit.plan(config, options, array)
    if dry:
        print(shlex.join(argv))
        return 0
    job = submit.submit(tasks, argv)
    print(job if plain else f"job {job}: {', '.join(str(task.run.folder) for task in tasks)}")
    return 0


def _show(run: Run, layout: Topology, as_json: bool) -> int:
    from launcher.commands import show

    plan = show.plan(run, layout)
    print(json.dumps(plan, indent=2) if as_json else show.render(plan))
    return 0
