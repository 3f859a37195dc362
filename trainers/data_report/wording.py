"""The sentences that the text and the page have in common."""

from __future__ import annotations

from collections.abc import Iterator

from trainers.config.mix import sources_of
from trainers.config.schema import TrainConfig
from trainers.config.text import count_of
from trainers.data.files import RowPlaces
from trainers.data.loading import Part
from trainers.data_report.facts import Lengths, Repeats
from trainers.data_report.gather import Counts, Look, Rows

NAMED = 5  # rows that a sentence names
# What decides the tokens of a conversation, and may differ from source to source.
RENDERING = ("chat_template", "chat_template_kwargs", "history", "system_prompt", "prompt_format")
SOURCE_TITLES = (
    "part", "source", "rows", "samples", "in an epoch", "epochs", "tokens", "trained on", "longest",
    "truncated", "dropped",
)  # fmt: skip


def where(look: Look) -> str:
    """Return the part, its rows and its files."""
    return f"{Rows(look.part, look.name)}: {count_of(look.given, 'row')} of {', '.join(look.files)}"


def of_source(look: Look) -> str:
    """Return what is added to a title in a mix: the name of the source."""
    return f" of {look.name}" if look.name else ""


def source_table(counts: Counts) -> list[tuple[str, ...]]:
    """Return the counts of each part of each source of a mix, as the cells of SOURCE_TITLES."""
    return [
        (
            part, name, *map(str, (own.rows, own.kept)), "" if own.taken is None else str(own.taken),
            own.epochs, *map(str, (own.tokens, own.supervised_tokens, own.longest, own.truncated)),
            own.reasons,
        )
        for part, summary in counts.summaries.items()
        for name, own in summary.sources.items()
    ]  # fmt: skip


def count_sentences(counts: Counts) -> Iterator[str]:
    """Yield the counts of each part, and the first rows that were dropped for each reason."""
    for part, summary in counts.summaries.items():
        yield f"{part}: {summary.line}"
        for name, own in (summary.sources or {"": summary}).items():
            rows = Rows(part, name)
            for reason, numbers in sorted(own.first_dropped.items()):
                names = _names([number - 1 for number in numbers], counts.places[rows])
                more = ", ..." if own.dropped[reason] > len(numbers) else ""
                yield f"{rows}: dropped ({reason}): {names}{more}"
            if name:  # the line has those of the part
                yield from (f"{rows}: {note}" for note in own.counted_notes)
    for part in counts.problems:
        yield f"{part}: cannot be prepared; the error says why"


def length_sentence(counts: Counts, lengths: Lengths) -> str:
    """Return the middle and the ends of the lengths."""
    return (
        f"{lengths.shortest} to {lengths.longest} tokens{_counted(counts.config)}; half of the samples have "
        f"at most {lengths.median}, 90 % at most {lengths.most}, 99 % at most {lengths.nearly_all}"
    )


def _counted(config: TrainConfig) -> str:
    """Return what the model computes for a sample, if that is more than one text."""
    if config.kind.pairs:
        return ", with both answers and the prompt of each"
    if config.kind.rows == "labelled":
        return ", with the answer, that of another sample, and the prompt of each"
    return ""


def packing_sentence(counts: Counts) -> str:
    """Return what packing makes of the part."""
    config, packing = counts.config, counts.packing
    if packing is not None:
        packs = config.kind.rows == "text" and config.packed != "none"
        what = (
            f"packing: {config.packed}, {count_of(packing.packs, 'pack')}"
            if packs
            else (f"tokens_per_batch, {packing.packs} groups of samples")
        )
        return f"{what} of at most {packing.capacity} tokens, {packing.share:.1%} full"
    if counts.part != "train" and config.packed != "none" and not config.evaluates_packed:
        return "not packed (eval_packing: false): an evaluation pads its samples"
    if config.packed == "none":
        return "not packed: the samples of a micro-batch are padded to the longest of them"
    return "not planned: the samples of a micro-batch are one sequence of any length, without padding"


def repeat_sentences(counts: Counts) -> Iterator[str]:
    """Yield which rows repeat others: in the part, in two sources, and in two parts."""
    part, mixed = counts.part, counts.config.mix is not None
    verbs = ("is a duplicate of an earlier row", "are duplicates of an earlier row")
    each = [_repeats(found, rows, rows, verbs, counts) for rows, found in counts.repeated.items()]
    none = f"{part}: no row is a duplicate of an earlier row{' of its source' if mixed else ''}"
    yield from _found(each, none)
    pairs: dict[tuple[Part, Part], list[str]] = {}
    for (rows, other), found in counts.shared.items():
        verbs = (f"is in {other.place}, too", f"are in {other.place}, too")
        line = _repeats(found, rows, other, verbs, counts)
        pairs.setdefault((rows.part, other.part), []).append(line)
    for (later, earlier), each in sorted(pairs.items(), key=lambda item: item[0][0] != item[0][1]):
        both = "two sources" if later == earlier else f"{earlier}{' of any source' if mixed else ''}, too"
        yield from _found(each, f"{later}: no row is in {both}")
    if counts.shared and (names := _different(counts.config)):
        yield (
            f"the sources differ in {', '.join(names)}, so the same conversation may have other tokens in "
            "two of them, and is not found then"
        )


def _found(lines: list[str], none: str) -> list[str]:
    """Return the lines that are not empty, or `none` if all are. Nothing if there are no lines."""
    return ([line for line in lines if line] or [none]) if lines else []


def _repeats(found: Repeats, rows: Rows, other: Rows, verbs: tuple[str, str], counts: Counts) -> str:
    """Return which of `rows` repeat one of `other`, or an empty string if none does."""
    if not len(found):
        return ""
    pairs = found.first(NAMED)
    here, there = counts.places[rows], counts.places[other]
    names = ", ".join(f"{_name(row, here)} (as {_name(of, there)})" for row, of in pairs)
    more = ", ..." if len(found) > len(pairs) else ""
    return f"{rows}: {count_of(len(found), 'row')} {verbs[len(found) > 1]}: {names}{more}"


def _different(config: TrainConfig) -> list[str]:
    """Return the fields that decide the tokens of a conversation, and that differ in the sources of a mix."""
    configs = [source.config for source in sources_of(config)]
    return [name for name in RENDERING if any(getattr(c, name) != getattr(configs[0], name) for c in configs)]


def _names(numbers: list[int], places: RowPlaces) -> str:
    return ", ".join(_name(number, places) for number in numbers)


def _name(number: int, places: RowPlaces) -> str:
    path, row = places.find(number)
    return f"row {row}" if path is None or len(places.split.files) == 1 else f"{path}: row {row}"


def wrong_rows(wrong: int, shown: int) -> str:
    """Return why there are no counts, where rows have an error."""
    verb = "has" if wrong == 1 else "have"
    return (
        f"{wrong} of the {count_of(shown, 'row')} shown {verb} an error, so training would stop, and there "
        "are no counts. Fix the rows, or the config."
    )
