"""gigatoken is used only where it proves to give the ids of tokenizers."""

from __future__ import annotations

import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from data_toys import byte_tokenizer

from tandem.data.engine import GigatokenEngine, TokenizersEngine, choose_engine
from tandem.data.tokenizer import Tokenizer

TEXTS = ["", "hello world", "中文 e\u0301 <think>\nx</think> <|im_end|>", "x" * 3000]


@pytest.fixture
def tokenizer(shared_data: Path) -> Tokenizer:
    pytest.importorskip("gigatoken")
    return Tokenizer(shared_data / "qwen3-0.6b")


def test_both_engines_agree_on_real_text(tokenizer: Tokenizer, shared_data: Path) -> None:
    with (shared_data / "text/free.jsonl").open() as file:
        texts = [*TEXTS, *(json.loads(line)["text"] for number, line in enumerate(file) if number % 60 == 0)]
    engine = choose_engine(tokenizer, TokenizersEngine(tokenizer, True), texts)
    assert engine.name == "gigatoken"
    again = pickle.loads(pickle.dumps(engine))
    for ours in (engine.encode(texts), again.encode(texts)):
        for array, expected in zip(ours, TokenizersEngine(tokenizer, True).encode(texts)):
            assert array.dtype == expected.dtype
            np.testing.assert_array_equal(array, expected)
    assert [array.tolist() for array in engine.encode([])] == [[], []]


def test_threads_encode_at_once_and_leave_the_environment_alone(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAYON_NUM_THREADS", raising=False)
    engine = GigatokenEngine(tokenizer.folder / "tokenizer.json", threads=3)
    parts = [[f"{text} {number}" for text in TEXTS for _ in range(20)] for number in range(24)]
    with ThreadPoolExecutor(4) as pool:
        encoded = list(pool.map(engine.encode, parts))
    for part, (ids, lengths) in zip(parts, encoded):
        expected = TokenizersEngine(tokenizer, False).encode(part)
        np.testing.assert_array_equal(ids, expected[0])
        np.testing.assert_array_equal(lengths, expected[1])
    assert "RAYON_NUM_THREADS" not in os.environ


def test_the_first_difference_means_tokenizers(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = GigatokenEngine.encode

    def one_id_off(self: GigatokenEngine, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, lengths = encode(self, texts)
        return np.where(np.arange(len(ids)) == len(ids) - 1, 7, ids).astype(np.int32), lengths

    reference = TokenizersEngine(tokenizer, True)
    monkeypatch.setattr(GigatokenEngine, "encode", one_id_off)
    assert choose_engine(tokenizer, reference, ["hello"]) is reference


def test_special_tokens_that_a_tokenizer_adds_mean_tokenizers(tmp_path: Path) -> None:
    folder = byte_tokenizer(tmp_path / "tokenizer")
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [257], "tokens": ["<|im_start|>"]}},
    }
    path.write_text(json.dumps(content))
    reference = TokenizersEngine(Tokenizer(folder), add_special_tokens=True)
    assert reference.encode(["a"])[0][0] == 257
    assert choose_engine(Tokenizer(folder), reference, ["a"]) is reference


def test_without_gigatoken_it_is_tokenizers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer(byte_tokenizer(tmp_path / "tokenizer"))
    reference = TokenizersEngine(tokenizer, False)
    monkeypatch.setitem(__import__("sys").modules, "gigatoken", None)
    assert choose_engine(tokenizer, reference, TEXTS) is reference
