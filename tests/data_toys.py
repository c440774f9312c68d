"""A small tokenizer and small data, for tests that must not need shared data."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from tandem.data.preprocess.options import PreprocessOptions
from tandem.data.preprocess.run import PreprocessSummary

ALPACA = [{"instruction": f"ask {i}", "input": "x" * (i % 5), "output": "answer " * (i % 7)} for i in range(30)]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_tokenizer(folder: Path, **config: object) -> Path:
    """One token per byte, then Qwen3's special tokens: 256 <|endoftext|> (pad), 257 <|im_start|>, 258 <|im_end|> (eos),
    259 <think>, 260 </think>."""
    folder.mkdir(exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    model.add_tokens([AddedToken(token, normalized=False) for token in ("<think>", "</think>")])
    model.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def write_jsonl(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def options(source: Path | list[Path], prefix: Path, tokenizer: Path, **changes: object) -> PreprocessOptions:
    sources = source if isinstance(source, list) else [source]
    return PreprocessOptions(tuple(map(str, sources)), str(prefix), str(tokenizer), **changes)  # type: ignore[arg-type]


def written(summary: PreprocessSummary) -> dict[str, bytes]:
    return {
        f"{key}.{suffix}": Path(f"{prefix}.{suffix}").read_bytes()
        for key, prefix in summary.prefixes.items()
        for suffix in ("bin", "idx")
    }
