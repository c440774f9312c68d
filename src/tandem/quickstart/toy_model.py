"""A toy Qwen3 as a Hugging Face folder: a new byte-level BPE tokenizer, and random weights."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from tandem.checkpoints.copy import copy
from tandem.checkpoints.hf.companions import companion_files
from tandem.checkpoints.hf.sink import HFSink
from tandem.checkpoints.interface import Companions
from tandem.checkpoints.random_init import RandomSource
from tandem.files.lock import publishing
from tandem.models.config import ModelConfig
from tandem.models.hf_config import to_hf

END = "<|im_end|>"
SPECIAL = ("<|endoftext|>", "<|im_start|>", END)
THINK = ("<think>", "</think>")
# How Qwen splits text before BPE: words with their space, single digits, punctuation, line ends.
PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# The same text as `--prompt-type qwen3` for a conversation without thoughts.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}"
)


def write_tokenizer(folder: Path, texts: Iterable[str], vocab_size: int) -> int:
    """Train a byte-level BPE tokenizer, write its Hugging Face files, and return its number of tokens."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.add_tokens(list(THINK))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": "<|endoftext|>",
        "model_max_length": 4096,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return int(tokenizer.get_vocab_size(with_added_tokens=True))


def toy_config(vocab_size: int, num_layers: int = 4) -> ModelConfig:
    """A configuration of a million parameters with all that is special in Qwen3.

    That is: grouped queries, q/k norm, a head_dim other than hidden / heads, and tied embeddings. The embedding has
    more rows than there are tokens.
    """
    return ModelConfig(
        model_type="qwen3",
        num_layers=num_layers,
        hidden_size=128,
        ffn_hidden_size=384,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=48,
        vocab_size=-(-vocab_size // 64) * 64,
        max_position_embeddings=512,
        norm_epsilon=1e-6,
        rotary_base=10000.0,
        untie_embeddings_and_output_weights=False,
        init_method_std=0.04,
    )


def write_toy_model(
    folder: Path, texts: Iterable[str], seed: int, vocab_size: int = 384, num_layers: int = 4
) -> ModelConfig:
    """Write config, tokenizer and random weights into `folder`."""
    with publishing(folder.with_name(f"{folder.name}-tokenizer"), replace=True) as work:
        config = toy_config(write_tokenizer(work, texts, vocab_size), num_layers)
    tokenizer_folder = folder.with_name(f"{folder.name}-tokenizer")
    end = tokenizers.Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json")).token_to_id(END)
    hf_config = {**to_hf(config, dtype="float32"), "eos_token_id": end}
    companions = Companions(hf_config, companion_files(tokenizer_folder))
    copy(RandomSource(config, seed), HFSink(folder, config, "float32", companions))
    return config
