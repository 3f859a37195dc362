"""Tokenize a text as a whole, and find the tokens of its parts by their characters.

text    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n  Hello<|im_end|>  \\n
labels  ...................... -100 ......................... ^^^^^^^^^^^^^^^^^  -100

A text that is tokenized in pieces has other tokens than the text as a whole: SentencePiece puts a space
before each piece, and BPE joins characters across the cut. So the text is encoded once, and the parts that
the loss sees are spans of characters.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from trainers.data.labels import IGNORED

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]  # the first character, and the one after the last
# Notes of a sample, which are counted.
OTHER_PROMPT = "the prompt has other tokens at inference"
NEAR = 160  # characters before the end of a prompt in which the last added token is looked for
KNOWN_TAILS = 4096  # ends of prompts whose tokens are remembered


@dataclass
class Encoded:
    """The token ids and labels of one text, of equal length, and what must be counted about it."""

    input_ids: list[int]
    labels: list[int]
    notes: set[str] = field(default_factory=set)


def forget_truncation(tokenizer: PreTrainedTokenizerBase) -> None:
    """Remove truncation and padding from the settings of the tokenizer.

    A call that truncates or pads leaves these settings in the tokenizer. They would be saved with the model.
    """
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()


@dataclass
class Tokens:
    """The tokens of texts. Each text is encoded once, as a whole."""

    tokenizer: PreTrainedTokenizerBase
    _tails: dict[str, list[int]] = field(default_factory=dict, repr=False)

    def encode(self, text: str, special: bool = False) -> Encoding:
        """Encode a text; with `special`, with the BOS and the like that the tokenizer adds to every text."""
        encoding: Encoding = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=special)
        return encoding

    def rendered(self, text: str, spans: list[Span], prompts: list[str], exact_end: bool = False) -> Encoded:
        """Encode a rendered conversation. The loss sees `spans`.

        `prompts` are what the model is given at inference. With `exact_end`, spans end where the model stops;
        else the token that ends a turn is added where it follows a span.
        """
        encoding = self.encode(text)
        out = Encoded(encoding.ids, [IGNORED] * len(encoding.ids))
        for span in spans:
            first, last = self.covered(encoding, *span)
            if not exact_end:
                last = self._with_end(out.input_ids, first, last)
            out.labels[first:last] = out.input_ids[first:last]
        if not all(self.begins(encoding, text, prompt) for prompt in prompts):
            out.notes.add(OTHER_PROMPT)
        return out

    def joined(self, prompt: str, completion: str, eos: bool, everything: bool = False) -> Encoded:
        """Encode a prompt and its completion as one plain text.

        The loss sees the completion and EOS, or everything. The text has the tokenizer's BOS once, and with
        `eos` EOS once.
        """
        text = prompt + completion
        encoding = self.encode(text, special=True)
        ids = encoding.ids
        first, last = self.covered(encoding, len(prompt), len(text))
        out = Encoded(ids, list(ids))
        if not everything:
            out.labels = [IGNORED] * first + ids[first:last] + [IGNORED] * (len(ids) - last)
            if ids[last:] == [self.tokenizer.eos_token_id]:  # the tokenizer adds EOS by itself
                out.labels[last:] = ids[last:]
        if prompt and not everything and not self.begins(encoding, text, prompt, special=True):
            out.notes.add(OTHER_PROMPT)
        bos = self.tokenizer.bos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            del out.input_ids[0], out.labels[0]
        token = self.tokenizer.eos_token_id
        if eos and token is not None and out.input_ids[-1:] != [token]:
            out.input_ids.append(token)
            out.labels.append(token)
        return out

    def covered(self, encoding: Encoding, start: int, end: int) -> tuple[int, int]:
        """Return the first token that has a character of the span, and the token after the last one."""
        count = len(encoding.ids)
        if start >= end:
            edges = [index for index, (first, _) in enumerate(encoding.offsets) if first >= start]
            return (edges[0], edges[0]) if edges else (count, count)
        first, last = encoding.char_to_token(start), encoding.char_to_token(end - 1)
        if first is None or last is None:
            return self._covered_slowly(encoding, start, end)
        while last + 1 < count and (part := encoding.token_to_chars(last + 1)) and part[0] < end:
            last += 1  # a character of several bytes may be several tokens
        return first, last + 1

    def _covered_slowly(self, encoding: Encoding, start: int, end: int) -> tuple[int, int]:
        """Do the same where a tokenizer leaves spaces out of the offsets of its tokens."""
        chosen, before = [], 0
        special = encoding.special_tokens_mask
        for index, (first, last) in enumerate(encoding.offsets):
            begin = min(before, first) if first == last else first
            if not special[index] and ((begin < end and last > start) or start <= first == last < end):
                chosen.append(index)
            before = max(before, last)
        return (chosen[0], chosen[-1] + 1) if chosen else (len(special), len(special))

    def begins(self, encoding: Encoding, text: str, prompt: str, special: bool = False) -> bool:
        """Return whether the ids of the prompt alone are the first ids of the complete text."""
        if not text.startswith(prompt):
            return False
        if not prompt:
            return True
        cut, _ = self.covered(encoding, len(prompt), len(text))
        for at in self._cuts(prompt):
            tail = self._tail(prompt[at:])
            if encoding.ids[max(0, cut - len(tail)) : cut] == tail:
                return True
        alone = self.encode(prompt, special).ids
        if special and alone[-1:] == [
            self.tokenizer.eos_token_id
        ]:  # an EOS that the tokenizer adds by itself
            alone = alone[:-1]
        return bool(encoding.ids[: len(alone)] == alone)

    def _tail(self, text: str) -> list[int]:
        known = self._tails.get(text)
        if known is None:
            if len(self._tails) >= KNOWN_TAILS:
                self._tails.clear()
            known = self._tails[text] = self.encode(text).ids
        return known

    def _cuts(self, prompt: str) -> list[int]:
        """Return where a prompt can be cut near its end, so that its end alone has the same tokens.

        That is so at an added token, and, for all vocabularies in use, between two words of a long text.
        """
        near = max(0, len(prompt) - NEAR)
        added = [found.start() for found in self.added.finditer(prompt, near)]
        if added:
            return added[-1:]
        space = prompt.find(" ", near) if near > NEAR else -1
        return [space, space + 1] if space > 0 and not prompt[space - 1].isspace() else []

    def _with_end(self, ids: list[int], first: int, last: int) -> int:
        """Return the end of a span, after the token that ends the turn if this token follows directly."""
        if first == last or last == len(ids) or ids[last] not in self.ends:
            return last
        inside = last - 1
        while (
            inside > first
            and ids[inside] not in self.ends
            and not str(self.tokenizer.decode([ids[inside]])).strip()
        ):
            inside -= 1
        return last if ids[inside] in self.ends else last + 1

    @cached_property
    def ends(self) -> frozenset[int]:
        """The ids of tokens that may end a turn: EOS, and what was added to the vocabulary as special."""
        added = self.tokenizer.added_tokens_decoder
        special = {number for number, token in added.items() if token.special}
        return frozenset(special | {self.tokenizer.eos_token_id} - {None})

    @cached_property
    def added(self) -> re.Pattern[str]:
        """A pattern for the tokens that were added to the vocabulary, where text is split first."""
        names = sorted(
            (t.content for t in self.tokenizer.added_tokens_decoder.values()), key=len, reverse=True
        )
        return re.compile("|".join(map(re.escape, names)) or "(?!)")

    def __getstate__(self) -> dict[str, Any]:
        """Leave what can be computed again out of a copy for another process."""
        return {"tokenizer": self.tokenizer, "_tails": {}}
