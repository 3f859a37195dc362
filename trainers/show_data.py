"""Show the rows of a config as the model sees them: `python -m trainers.show_data config.yaml`.

`phalanx data` runs this. It loads the tokenizer and the data as a run does, and no weights. What it prepares
is in the cache, so a later run of the same config starts at once.
"""

from __future__ import annotations

import argparse
import io
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from trainers.config.errors import DISK_FAILED, USAGE_ERROR, ConfigError
from trainers.config.file import load_settings
from trainers.config.redaction import hide_in_tracebacks
from trainers.model.trust import refuse_foreign_code, refuse_kernels_at_imports
from trainers.rank.failures import for_user
from trainers.rank.library_output import quieten_libraries
from trainers.rank.say import say
from trainers.rank.terminal import has_lost_output, is_unread, outlive_readers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trainers.data_report.shown_rows import ShownRow
    from trainers.data_report.shown_sources import ShownSource
    from trainers.data_report.view import View

ALL = -1  # --rows: all of them


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns 0, 2 for a mistake of the user, or 8 if a disk is full."""
    parser = argparse.ArgumentParser(prog="trainers.show_data", description=__doc__.split(":")[0])
    parser.add_argument("config", type=Path, help="config file (YAML, in AutoTrain's format)")
    parser.add_argument("--rows", type=int, default=5, help=f"how many of the first rows; {ALL}: all")
    parser.add_argument("--split", default="train", choices=("train", "valid", "test"))
    parser.add_argument("--source", help="the source of a mix whose rows are shown (default: all)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--html", type=Path, help="write a page, and print nothing else")
    form.add_argument("--json", action="store_true", help="print a JSON object for each row")
    outlive_readers()
    hide_in_tracebacks()
    refuse_kernels_at_imports()
    options = parser.parse_args(argv)
    stdout = sys.stdout
    if isinstance(stdout, io.TextIOWrapper):
        stdout.reconfigure(errors="backslashreplace")  # rows have any character, and a terminal may not
    try:
        # What libraries print is not a part of the result.
        with redirect_stdout(sys.stderr):
            code = _show(options, stdout)
    except ConfigError as error:
        say("error", str(error))
        return USAGE_ERROR
    except OSError as error:
        if (found := for_user(error)) is None:
            raise
        say("error", found[0])
        return found[1]
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return DISK_FAILED if code == 0 and has_lost_output() else code


def _show(options: argparse.Namespace, stdout: TextIO) -> int:
    quieten_libraries()  # before the other imports: some libraries warn when they are imported
    from trainers.data_report.gather import count
    from trainers.data_report.shown_sources import choose_sources
    from trainers.data_report.wording import wrong_rows
    from trainers.model.tokenizer import load_tokenizer, tokenizers_of_sources

    settings = load_settings(options.config)
    config, part, notes = settings.train, options.split, settings.notes
    sources = choose_sources(settings, part, options.source)
    view = _view(options, stdout)
    refuse_foreign_code(config.use_kernels)
    tokenizer, new_tokens = load_tokenizer(config)
    templates = tokenizers_of_sources(config, tokenizer)
    shown = wrong = 0
    for source in sources:
        own = templates.get(source.name, tokenizer)
        with source.named():
            for row in _rows(view, source, options, own, new_tokens, notes):
                shown, wrong = shown + 1, wrong + bool(row.error)
                if options.html is None and is_unread():
                    return USAGE_ERROR if wrong else 0
        notes = []  # they are shown once
    problems = [wrong_rows(wrong, shown)] if wrong else []
    if view.counts and not problems:
        counts = count(config, tokenizer, templates, part)
        view.tail(counts)
        problems = list(counts.problems.values())
    view.end(problems)
    for problem in problems:
        say("error", problem)
    return USAGE_ERROR if problems else 0


def _rows(
    view: View,
    source: ShownSource,
    options: argparse.Namespace,
    tokenizer: PreTrainedTokenizerBase,
    new_tokens: list[int],
    notes: list[str],
) -> Iterator[ShownRow]:
    """Show the first rows of a source, and yield each."""
    from trainers.data.loading import open_source
    from trainers.data_report.gather import look, open_part
    from trainers.data_report.shown_rows import first_rows
    from trainers.storage.data_cache import scratch

    limit = None if options.rows == ALL else options.rows
    rows = open_source(source.config, options.split)
    with scratch("rows", rows.bytes) as folder:
        opened = open_part(rows, source.config, tokenizer, folder)
        view.head(look(opened, source.config, source.values_from, notes, tokenizer, new_tokens, source.name))
        for row in first_rows(opened.raw, opened.encoder, opened.places, tokenizer, limit):
            view.row(row, tokenizer)
            yield row


def _view(options: argparse.Namespace, stdout: TextIO) -> View:
    from trainers.data_report.as_json import JsonView
    from trainers.data_report.as_page import PageView
    from trainers.data_report.as_text import TextView

    if options.html is not None:
        return PageView(stdout, options.html)
    return JsonView(stdout) if options.json else TextView(stdout)


if __name__ == "__main__":
    sys.exit(main())
