"""A tokenizer as llama.cpp reads it from a GGUF file: texts and types of tokens, merges, and how texts are split."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import pre_tokenizers

from tandem.checkpoints.gguf.library import gguf
from tandem.errors import UserError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _by_pattern(pattern: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


# llama.cpp's names of ways to split a text before BPE, and what they do
SPLITS = {
    "qwen2": _by_pattern(_CONTRACTIONS + _WORDS + r"\p{N}" + _REST),
    "llama-bpe": _by_pattern(_CONTRACTIONS + _WORDS + r"\p{N}{1,3}" + _REST),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
}
USUAL = {"llama": "llama-bpe"}  # the way of a family whose tokenizer splits in another one; for others that of qwen2
PROBE = (
    "It's O'Reilly's l'tableau: I've said we'll see, you're right, 'tis he'd; WE'RE 'Told 'Veiled\n\n  two\t\ttabs \r\n"
    "1 12 123 1234 12345.678 3.14, x=y+z; f(a, b) -> {c: [d]}   \n \n   end 深度学习123模型。 Здравствуй мир "
    "naïve café 🚀🙂 ```python\n    return None\n```  ---===  ١٢٣ ½ ²"
)


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer.

    Attributes:
        types: numbers of `gguf.TokenType`.
        pre: llama.cpp's name of the way to split a text.
        notice: what a user should know; empty when nothing.
    """

    tokens: list[str]
    types: list[int]
    pre: str
    notice: str = ""


def vocabulary_of(path: Path, model_type: str, vocab_size: int) -> Vocabulary:
    """The vocabulary of a `tokenizer.json`, with a name for each row of the embedding.

    Raises:
        UserError: the tokenizer is no byte-level BPE.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
    if content["model"]["type"] != "BPE" or content["model"].get("byte_fallback") or not _is_byte_level(content):
        raise UserError(
            f"--gguf: {path.name} is no byte-level BPE tokenizer, as Qwen's and Llama 3's are. Export a folder without "
            f"--gguf, and give that to llama.cpp's convert_hf_to_gguf.py"
        )
    texts = {token: text for text, token in tokenizer.get_vocab(with_added_tokens=True).items()}
    added = tokenizer.get_added_tokens_decoder()
    kind = gguf().TokenType
    tokens, types = list[str](), list[int]()
    for token in range(vocab_size):
        if token not in texts:
            tokens.append(f"[PAD{token}]")
            types.append(int(kind.UNUSED))
            continue
        tokens.append(texts[token])
        special = token in added and (added[token].special or _looks_special(texts[token]))
        types.append(int(kind.CONTROL if special else kind.USER_DEFINED if token in added else kind.NORMAL))
    pre, notice = _split_of(tokenizer, model_type)
    return Vocabulary(tokens, types, pre, notice)


def set_vocabulary(writer: Any, folder: Path, vocabulary: Vocabulary, ends: Sequence[int]) -> None:
    """Write a vocabulary, and what the files of `folder` say of special tokens, merges and the chat template.

    Args:
        writer: a `gguf.GGUFWriter`.
        ends: tokens that end an answer, the template's first. llama.cpp has room for two, besides those that it knows
            by their names.
    """
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    special = gguf().SpecialVocab(folder, load_merges=True, n_vocab=len(vocabulary.tokens))
    if ends:
        special.special_token_ids["eos"] = ends[0]
    if len(ends) > 1:
        special.special_token_ids["eot"] = ends[1]
    special.add_to_gguf(writer, quiet=True)


def _is_byte_level(content: dict[str, Any]) -> bool:
    """Whether tokens are spelled in the letters that stand for bytes."""
    return "ByteLevel" in json.dumps(content.get("pre_tokenizer")) or "ByteLevel" in json.dumps(content.get("decoder"))


def _looks_special(token: str) -> bool:
    """As llama.cpp's converter decides for tokens that some tokenizers do not mark."""
    return token.startswith("<|") and token.endswith("|>")


def _split_of(tokenizer: tokenizers.Tokenizer, model_type: str) -> tuple[str, str]:
    """llama.cpp's name of the way in which a tokenizer splits texts, and a notice when it has none."""
    usual = USUAL.get(model_type, "qwen2")
    own = tokenizer.pre_tokenizer.pre_tokenize_str(PROBE)
    for name in (usual, *SPLITS):
        if SPLITS[name].pre_tokenize_str(PROBE) == own:
            return name, ""
    return usual, (
        f"llama.cpp has no name for the way in which this tokenizer splits texts. It will split as {usual}: some texts "
        f"get other tokens there than in training"
    )
