"""gigatoken is used only where it proves to give the ids of tokenizers."""

from __future__ import annotations

import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, pre_tokenizers

from data_toys import byte_tokenizer
from tandem.data.tokens.encoder import GigatokenEngine, Separator, TokenizersEngine, choose_engine, find_separator
from tandem.data.tokens.tokenizer import Tokenizer

TEXTS = ["", "hello world", "中文 e\u0301 <think>\nx</think> <|im_end|>", "x" * 3000]
END = Separator("<|endoftext|>", 256)  # of the toy


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
    separator = find_separator(tokenizer, TEXTS)
    assert separator == Separator("<|video_pad|>", 151656)
    engine = GigatokenEngine(tokenizer.folder / "tokenizer.json", threads=3, separator=separator)
    parts = [[f"{text} {number}" for text in [*TEXTS, *FRAGMENTS] for _ in range(5)] for number in range(24)]
    for part in parts[::2]:
        part[7] += separator.text
    with ThreadPoolExecutor(4) as pool:
        encoded = list(pool.map(engine.encode, parts))
    for part, (ids, lengths) in zip(parts, encoded):
        expected = TokenizersEngine(tokenizer, False).encode(part)
        np.testing.assert_array_equal(ids, expected[0])
        np.testing.assert_array_equal(lengths, expected[1])
    assert "RAYON_NUM_THREADS" not in os.environ


FRAGMENTS = [
    *("<|endoftext|>", "<|endoftext|", "|endoftext|>", "<|im_end|>", "<think>", "</think", "<", ">", "|", " ", "  "),
    *("\n", "\r\n", "\t", "a", "It's", "12", "中", "。", "\u0301", "\u0338", "\x00", "\U0001f468\u200d", "_"),
]
texts = st.lists(st.lists(st.sampled_from(FRAGMENTS), max_size=5).map("".join), max_size=6)


@pytest.fixture(scope="module", params=[False, True], ids=["bytes", "words"])
def toy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Cuts text into bytes, or into words first."""
    pytest.importorskip("gigatoken")
    folder = byte_tokenizer(tmp_path_factory.mktemp("toy") / "tokenizer")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["pre_tokenizer"]["use_regex"] = request.param
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return Tokenizer(folder)


@settings(max_examples=200, deadline=None)
@given(texts=texts, end=st.sampled_from([None, 256, 258]), separator=st.sampled_from([END, None]))
def test_texts_encoded_as_one_have_the_ids_that_they_have_alone(
    toy: Tokenizer, texts: list[str], end: int | None, separator: Separator | None
) -> None:
    engine = GigatokenEngine(toy.folder / "tokenizer.json", separator=separator)
    expected = TokenizersEngine(toy, False).encode(texts, end)
    alone = [toy.encode(text) + ([] if end is None else [end]) for text in texts]
    assert expected[0].tolist() == [i for ids in alone for i in ids]
    assert expected[1].tolist() == [len(ids) for ids in alone]
    for batch in (texts, [text.encode() for text in texts]):
        for array, reference in zip(engine.encode(batch, end), expected):
            assert array.dtype == reference.dtype
            np.testing.assert_array_equal(array, reference)


def with_tokens(folder: Path, *tokens: AddedToken) -> Tokenizer:
    """The toy with more tokens, before it looks for a separator."""
    tokenizer = Tokenizer(byte_tokenizer(folder))
    for token in tokens:
        (tokenizer._tokenizer.add_special_tokens if token.special else tokenizer._tokenizer.add_tokens)([token])
    return tokenizer


def test_where_only_the_first_text_is_special_each_is_encoded_alone(tmp_path: Path) -> None:
    """As with SentencePiece's vocabularies, that may put a space before a whole text alone."""
    pytest.importorskip("gigatoken")
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "ab", "▁a"]
    model = models.BPE(
        {word: number for number, word in enumerate(words)},
        [("a", "b"), ("▁", "a")],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.add_special_tokens([AddedToken("</s>", normalized=False)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    folder = Tokenizer(tmp_path)
    engine = choose_engine(folder, TokenizersEngine(folder, False), ["ab a"])
    assert isinstance(engine, GigatokenEngine)
    texts = ["a", "b ab", "", " a"]
    assert engine.encode(texts)[0].tolist() == [i for text in texts for i in folder.encode(text)]
    assert find_separator(folder, texts) is not None


def test_the_separator_is_in_none_of_the_sample(tmp_path: Path) -> None:
    tokenizer = Tokenizer(byte_tokenizer(tmp_path / "tokenizer"))
    assert find_separator(tokenizer, ["hello"]) == Separator("<|im_end|>", 258)
    assert find_separator(tokenizer, ["hello", "a<|im_end|>"]) == Separator("<|im_start|>", 257)
    assert find_separator(tokenizer, ["<|im_end|>", "a<|im_start|>"]) == END
    assert find_separator(tokenizer, ["<|im_start|><|im_end|>", "<|endoftext|>"]) is None  # <think> is not special


@pytest.mark.parametrize(
    "token",
    [
        AddedToken("x<", special=False),  # begins in a text and ends in the separator
        AddedToken(">x<|endoftext|>", special=True),
        AddedToken("word", special=False, single_word=True),
    ],
)
def test_no_separator_that_another_token_could_hide_or_see(token: AddedToken, tmp_path: Path) -> None:
    assert find_separator(with_tokens(tmp_path / "tokenizer", token), []) is None


@pytest.mark.parametrize(
    ("flags", "normalizer", "text"),
    [
        ({"single_word": True}, None, "seafood foo"),
        ({"lstrip": True}, None, "a  foo"),
        ({"normalized": True}, {"type": "NFC"}, "foo\u0301"),
    ],
)
def test_added_tokens_that_look_around_mean_tokenizers(
    flags: dict[str, bool], normalizer: dict[str, str] | None, text: str, tmp_path: Path
) -> None:
    folder = byte_tokenizer(tmp_path / "tokenizer")
    content = json.loads((folder / "tokenizer.json").read_text())
    token = {"id": 261, "content": "foo", "special": False, "single_word": False, "lstrip": False, "rstrip": False}
    content["added_tokens"].append({**token, "normalized": False, **flags})
    content["normalizer"] = normalizer
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = Tokenizer(folder)
    reference = TokenizersEngine(tokenizer, False)
    assert choose_engine(tokenizer, reference, ["hello"]) is reference  # nothing in the sample would show it
    assert find_separator(tokenizer, []) is None
    assert 261 in tokenizer.encode("foo")


def test_the_separator_takes_nothing_from_its_neighbours(tmp_path: Path) -> None:
    longer = AddedToken("<|im_end|>!", special=False, normalized=False)
    assert find_separator(with_tokens(tmp_path / "longer", longer), []) == Separator("<|im_start|>", 257)
    used = ["<|endoftext|><|im_start|><|im_end|>"]
    for flags in ({"lstrip": True}, {"rstrip": True}):
        token = AddedToken("[SEP]", special=True, normalized=False, **flags)
        assert find_separator(with_tokens(tmp_path / str(flags), token), used) is None
    token = AddedToken("[SEP]", special=True, normalized=False)
    assert find_separator(with_tokens(tmp_path / "plain", token), used) == Separator("[SEP]", 261)


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
