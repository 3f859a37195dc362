"""Conversations of every kind, and tokenizers of every kind, for the tests of chat data."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rows import assistant, user

from trainers.data.chat import Renderer
from trainers.data.messages import Chat
from trainers.data.samples import RowError
from trainers.data.tokens import Tokens

Q1, A1, Q2, A2, R1, R2 = "Question1", "Answer1", "Question2", "Answer2", "Reason1", "Reason2"
SYSTEM_TURN = {"role": "system", "content": "Instruction0"}


def call(name: str, key: str, value: str, number: str = "c1") -> dict[str, Any]:
    return {"type": "function", "id": number, "function": {"name": name, "arguments": {key: value}}}


def result(content: str, name: str, number: str = "c1") -> dict[str, Any]:
    return {"role": "tool", "name": name, "tool_call_id": number, "content": content}


CALL, OTHER_CALL = call("look", "town", "Paris"), call("find", "word", "rank", "c2")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "description": "Description0",
            "parameters": {
                "type": "object",
                "properties": {"town": {"type": "string", "description": "Description1"}},
                "required": ["town"],
            },
        },
    }
]
CALLED = [user(Q1), {**assistant(""), "tool_calls": [CALL]}, result("Result1", "look"), assistant(A1)]
# Name -> messages and tools.
CHATS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]] | None]] = {
    "single": ([user(Q1), assistant(A1)], None),
    "multi": ([user(Q1), assistant(A1), user(Q2), assistant(A2)], None),
    "system": ([SYSTEM_TURN, user(Q1), assistant(A1)], None),
    "think in content": ([user(Q1), assistant(f"<think>\n{R1}\n</think>\n\n{A1}")], None),
    "reasoning field": ([user(Q1), {**assistant(A1), "reasoning_content": R1}], None),
    "history": (
        [
            user(Q1),
            {**assistant(A1), "reasoning_content": R1},
            user(Q2),
            {**assistant(A2), "reasoning_content": R2},
        ],
        None,
    ),
    "tool call": (CALLED, None),
    "parallel calls": (
        [
            user(Q1),
            {**assistant(""), "tool_calls": [CALL, OTHER_CALL]},
            result("Result1", "look"),
            result("Result2", "find", "c2"),
            assistant(A1),
        ],
        None,
    ),
    "call as last turn": ([user(Q1), {**assistant(""), "tool_calls": [CALL]}], None),
    "tools column": (CALLED, TOOLS),
}
WORDS = (
    Q1, A1, Q2, A2, R1, R2, "Instruction0", "look", "town", "Paris", "find", "word", "rank", "Result1",
    "Result2", "Description0", "Description1",
)  # fmt: skip


def words_in(*values: Any) -> set[str]:
    """Return the words of WORDS that are in any of the values."""
    text = json.dumps(values)
    return {word for word in WORDS if re.search(rf"\b{word}\b", text.replace("\\n", " "))}


def trl_templates() -> dict[str, str]:
    """Return the chat templates that the installed TRL ships, without their training twins."""
    from trl import chat_template_utils

    folder = Path(chat_template_utils.__file__).parent / "chat_templates"
    files = sorted(file for file in folder.glob("*.jinja") if not file.stem.endswith("_training"))
    return {file.stem: file.read_text(encoding="utf-8") for file in files}


def byte_level(templates: Iterable[str] = ()) -> Any:
    """Return a byte-level tokenizer whose vocabulary has the special tokens of the templates."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    train(
        tokenizer,
        BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    fast = wrapped(tokenizer)
    found = {
        name
        for text in templates
        for name in re.findall(r"<[|\uff5c][^\s<>{}'\"]+?[|\uff5c]>|<\|\w+>|<\w+\|>", text)
    }
    found |= {"<end_of_turn>", "<start_of_turn>", "<end_of_utterance>", "[INST]", "[/INST]"}
    fast.add_tokens(["<think>", "</think>"])
    fast.add_tokens(sorted(found), special_tokens=True)
    return fast


SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
SENTENCES = [
    "What is a rank? One process of many that work on the same model.",
    "user assistant system A launcher starts the ranks, and the ranks train the model.",
    " ".join(WORDS),
]


def train(tokenizer: Any, trainer: Any) -> None:
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)


def wrapped(tokenizer: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def vocabularies() -> dict[str, Any]:
    """Return a tokenizer of each kind: byte-level, SentencePiece in three forms, Unigram, WordPiece."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer, UnigramTrainer, WordPieceTrainer

    options = {"vocab_size": 300, "special_tokens": SPECIAL, "show_progress": False}
    found = {"byte level": byte_level()}
    trimmed = byte_level()
    trimmed.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    found["byte level with trimmed offsets"] = trimmed
    for name in ("prepend", "metaspace first", "metaspace always"):
        pieces = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        pieces.pre_tokenizer = pre_tokenizers.Metaspace()
        pieces.decoder = decoders.Metaspace()
        train(pieces, BpeTrainer(**options))
        # As in files of SentencePiece: the vocabulary ends at words, but text is not split there.
        if name == "prepend":
            pieces.pre_tokenizer = None
            pieces.normalizer = normalizers.Sequence(
                [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
            )
        else:
            pieces.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=name.split()[1], split=False)
        found[f"sentencepiece, {name}"] = wrapped(pieces)
    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.decoder = decoders.Metaspace()
    train(unigram, UnigramTrainer(**options, unk_token="<unk>"))
    found["unigram"] = wrapped(unigram)
    wordpiece = Tokenizer(models.WordPiece(unk_token="<unk>"))
    wordpiece.normalizer = normalizers.BertNormalizer(lowercase=True)
    wordpiece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    train(wordpiece, WordPieceTrainer(**options))
    found["wordpiece"] = wrapped(wordpiece)
    return found


def support_table() -> str:
    """Return a table: what becomes of each kind of conversation with each template of TRL."""
    templates = trl_templates()
    tokenizer = byte_level(templates.values())
    rows = [f"| template | marks | {' | '.join(CHATS)} |", "| --- " * (len(CHATS) + 2) + "|"]
    for name, source in templates.items():
        tokenizer.chat_template = source
        renderer = Renderer(tokenizer, Tokens(tokenizer))
        own = renderer.template(Chat([]))
        marks = "TRL's" if own.has_twin else "own" if own.training else "found"
        cells = [_support(renderer, Chat(*chat)) for chat in CHATS.values()]
        rows.append(f"| {name} | {marks} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _support(renderer: Renderer, chat: Chat) -> str:
    turns = [number for number, message in enumerate(chat.messages) if message["role"] == "assistant"]
    try:
        samples = renderer.trained(chat, turns)
    except RowError as error:
        return "refused" if "does not render" in str(error) else "rejected"
    return "yes" if len(samples) == 1 else f"{len(samples)} samples"
