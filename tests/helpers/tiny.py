"""Tiny models with random weights and small tokenizers: real files, built in a second, offline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SENTENCES = [
    "A launcher starts the ranks, and the ranks train the model.",
    "What is a rank? One process of many that work on the same model.",
    "Gradients are averaged over all ranks before the optimiser takes a step.",
    "Sharding splits weights, gradients and optimiser state over the ranks.",
    "0 1 2 3 4 5 6 7 8 9 plus minus equals the answer to the question is",
]


def build_tiny_model(folder: Path, chat_template: bool = True, seed: int = 0) -> Path:
    """Write a two-layer Llama and its tokenizer to `folder`. Each call writes the same bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        SENTENCES * 4,
        trainers.BpeTrainer(
            vocab_size=384, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="<|im_end|>"
    )
    fast.chat_template = TEMPLATE if chat_template else None
    fast.save_pretrained(folder)

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        pad_token_id=fast.pad_token_id,
        bos_token_id=fast.bos_token_id,
        eos_token_id=fast.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "tie_word_embeddings": False,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 28, "patch_size": 14}  # fmt: skip
# Kinds of models whose weights have other names in files than in memory, or several names.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "tied llama": {**SIZES, "tie_word_embeddings": True},
    "qwen3_moe": {**SIZES, **EXPERTS, "num_experts": 4},
    "mixtral": {**SIZES, "num_local_experts": 4},
    "gemma3 with a vision tower": {"text_config": {**SIZES, "sliding_window": 64}, "vision_config": VISION},
}


def build_architecture(name: str, tokenizer: Path, folder: Path) -> Path:
    """Write a model of ARCHITECTURES with random weights, and the tokenizer of another tiny model."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    ids = {f"{name}_token_id": getattr(loaded, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    ids["vocab_size"] = len(loaded)
    values = dict(ARCHITECTURES[name])
    if "text_config" in values:
        values["text_config"] = {**values["text_config"], **ids}
    else:
        values |= ids
    kind = name.split()[-1] if name.startswith("tied") else name.split()[0]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values))
    model.save_pretrained(folder)
    loaded.save_pretrained(folder)
    return folder


def build_tiny_masked_model(folder: Path) -> Path:
    """Write a two-layer ModernBERT and a tokenizer with a mask token."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import ModernBertConfig, ModernBertForMaskedLM, PreTrainedTokenizerFast

    special = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]"]
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        SENTENCES * 4,
        trainers.BpeTrainer(
            vocab_size=384, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        unk_token="[UNK]",
    )
    fast.save_pretrained(folder)

    torch.manual_seed(0)
    config = ModernBertConfig(
        vocab_size=len(fast),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        pad_token_id=fast.pad_token_id,
        bos_token_id=fast.cls_token_id,
        eos_token_id=fast.sep_token_id,
        cls_token_id=fast.cls_token_id,
        sep_token_id=fast.sep_token_id,
    )
    ModernBertForMaskedLM(config).save_pretrained(folder)
    return folder


def write_evaluation(folder: Path) -> Path:
    """Write an lm-eval task, `capitals`, with two rows, to the folder."""
    folder.mkdir()
    rows = [
        {"question": "The capital of France is", "choices": ["Paris", "Rome"], "answer": 0},
        {"question": "The capital of Italy is", "choices": ["Paris", "Rome"], "answer": 1},
    ]
    data = folder.resolve() / "capitals.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "capitals",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    }
    (folder / "capitals.yaml").write_text(json.dumps(task))
    return folder
