"""The sentences that the text and the page have in common."""

from __future__ import annotations

from collections.abc import Iterator

from trainers.config.text import count_of
from trainers.data.files import RowPlaces
from trainers.report.facts import Lengths
from trainers.report.gather import Counts, Look

NAMED = 5  # rows that a sentence names


def where(look: Look) -> str:
    """Return the part, its rows and its files."""
    return f"{look.label}: {count_of(look.given, 'row')} of {', '.join(look.files)}"


def count_sentences(counts: Counts) -> Iterator[str]:
    """Yield the counts of each part, and the first rows that were dropped for each reason."""
    for label, summary in counts.summaries.items():
        yield f"{label}: {summary.line}"
        for reason, rows in sorted(summary.first_dropped.items()):
            names = _names([row - 1 for row in rows], counts.places[label])
            more = ", ..." if summary.dropped[reason] > len(rows) else ""
            yield f"{label}: dropped ({reason}): {names}{more}"
    for label in counts.problems:
        yield f"{label}: cannot be prepared; the error says why"


def length_sentence(counts: Counts, lengths: Lengths) -> str:
    """Return the middle and the ends of the lengths."""
    return (
        f"{lengths.shortest} to {lengths.longest} tokens{_counted(counts)}; half of the samples have "
        f"at most {lengths.median}, 90 % at most {lengths.most}, 99 % at most {lengths.nearly_all}"
    )


def _counted(counts: Counts) -> str:
    """Return what the model computes for a sample, if that is more than one text."""
    config = counts.config
    if config.kind.pairs:
        return ", with both answers and the prompt of each"
    if config.kind.rows == "labelled" and not (counts.label != counts.part == "train"):
        return ", with the answer, that of another sample, and the prompt of each"
    return ""


def packing_sentence(counts: Counts) -> str:
    """Return what packing makes of the part."""
    config, packing = counts.config, counts.packing
    if packing is not None:
        alone = ", if the source were alone" if counts.label != counts.part else ""
        packs = config.kind.rows == "text" and config.packed != "none"
        what = (
            f"packing: {config.packed}, {count_of(packing.packs, 'pack')}"
            if packs
            else (f"tokens_per_batch, {packing.packs} groups of samples")
        )
        return f"{what} of at most {packing.capacity} tokens, {packing.share:.1%} full{alone}"
    if counts.part != "train" and config.packed != "none" and not config.evaluates_packed:
        return "not packed (eval_packing: false): an evaluation pads its samples"
    if config.packed == "none":
        return "not packed: the samples of a micro-batch are padded to the longest of them"
    return "not planned: the samples of a micro-batch are one sequence of any length, without padding"


def repeat_sentences(counts: Counts) -> Iterator[str]:
    """Yield which rows repeat others: in the part, and in two parts."""
    if counts.repeated is not None:
        part = counts.label
        pairs = counts.repeated.first(NAMED)
        yield _repeats(
            len(counts.repeated),
            f"{part}: no row is a duplicate of an earlier row",
            f"{part}: %s of an earlier row",
            ("is a duplicate", "are duplicates"),
            [(_name(row, counts.places[part]), _name(of, counts.places[part])) for row, of in pairs],
        )
    for (held_out, other), found in counts.shared.items():
        pairs = found.first(NAMED)
        yield _repeats(
            len(found),
            f"{held_out}: no row is in {other}, too",
            f"{held_out}: %s in {other}, too",
            ("is", "are"),
            [(_name(row, counts.places[held_out]), _name(of, counts.places[other])) for row, of in pairs],
        )


def _repeats(number: int, none: str, some: str, verbs: tuple[str, str], pairs: list[tuple[str, str]]) -> str:
    if not number:
        return none
    names = ", ".join(f"{row} (as {of})" for row, of in pairs)
    rows, verb = count_of(number, "row"), verbs[0] if number == 1 else verbs[1]
    more = ", ..." if number > len(pairs) else ""
    return f"{some % f'{rows} {verb}'}: {names}{more}"


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
