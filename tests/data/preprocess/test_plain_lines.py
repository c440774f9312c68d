"""The quick way through plain JSON lines: it reads what `parse_row` reads, or leaves the block to it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_toys import byte_tokenizer
from tandem.data.handlers.text import GeneralPretrainHandler
from tandem.data.preprocess import chunks as tokenize
from tandem.data.preprocess.options import PreprocessOptions
from tandem.data.preprocess.run import preprocess
from tandem.data.sources.readers import Block, parse_row, plain_texts
from tandem.errors import UserError

KEYS = ("text", "b")


def block_of(content: bytes) -> Block:
    return Block("f.jsonl", 1, content.count(b"\n") + (not content.endswith(b"\n")), content)


def read_by_rows(block: Block, keys: tuple[str, ...]) -> list[list[str]] | None:
    """Texts per row; None where a row is refused."""
    handler = GeneralPretrainHandler(keys)
    try:
        return [handler.texts(parse_row(row)) for row in block.rows()]
    except (UserError, RecursionError):
        return None


def quickly(content: bytes, keys: tuple[str, ...]) -> bool:
    """Whether the block is read the quick way, as it is exactly when no row is refused; both ways give the same."""
    block = block_of(content)
    texts, expected = plain_texts(block, keys), read_by_rows(block, keys)
    if texts is None:
        assert expected is None
        return False
    assert expected is not None
    assert [[text.decode() for text in column] for column in texts] == [list(column) for column in zip(*expected)]
    return True


PLAIN = [
    b'{"text": "a", "b": "c"}\n{"text": "", "b": "\\u4e2d\\ud83d\\ude00\\n\\u0000"}\n',
    '{"b":"中文，\u2028","text":"é"}'.encode(),
    b'{"text":"a","b":"","n":[1,2.5e3,{"m":null}],"t":true,"d":"2020-01-01T00:00:00Z"}\n' * 3,
    b'{"t\\u0065xt" : "NaN, Information: Infinite (NaN)" ,"b":"Inf"}\n',
    b'{"text":"' + b"1234567890" * 12 + b'","b":"' + b"[{" * 900 + b'"}\n',
    b'{"text":"' + b"\\u4e2d" * 5000 + b'","b":"' + b"x" * 100_000 + b'"}\n',
    b'{"text":"a","b":"b","c":' + b"[" * 900 + b"]" * 900 + b"}\n",
]

ODD_VALUES = [
    *("NaN", "-NaN", "Infinity", "-Infinity", "Inf", "- Inf", "[NaN]", "[1, -Infinity ]", "nan", "1e999", "-1e999"),
    *("01", "-", "1.", ".5", "+1", "1e", "0x1", "tru", "null", "1", "[]", "{}", '["a"]', "'a'", '"a', "", "a"),
    *('"\\ud800"', '"\\udc00\\ud800"', '"\\ud800\\u0041"', '"\\x"', '"\\u12"', '"a\tb"', '"a\x01b"', '"\x00"'),
    *("1" * 308, "1" * 309, "-" + "9" * 400, "1" * 400 + ".5", "0." + "1" * 400, "1" * 400 + "e-300"),
    *("[" * depth + "]" * depth for depth in (990, 1022, 1023, 1024, 1025, 5000)),
    '{"k":' * 1030 + "1" + "}" * 1030,
    *('"c","text":"d"', '"c","t\\u0065xt":"d"', '"c","b":"d","b":1', '"c",', '"c" "d"', '"c"}{"text":"d","b":"e"'),
]
PIECES = [
    *('{"text":"x","b":"y"}', '{"text": "x", "b": "y", "n": 1}', '{"b":"y"}', '{"text":null,"b":"y"}', "{}", "[]", ""),
    *("{", "}", '{"text":"x",', '"b":"y"}', " ", "\r", "\t", "\x00", "\x0c", "\ufeff", "null", "\n", "\n", "\n", "\n"),
]

lines = st.one_of(
    st.sampled_from(ODD_VALUES).map(lambda value: f'{{"text":"x","b":"y","c":{value}}}'.encode()),
    st.sampled_from(ODD_VALUES).map(lambda value: f'{{"text":{value},"b":"y"}}'.encode()),
    st.sampled_from(ODD_VALUES).map(lambda value: f'{{"text":"x","b": {value} , "c":0}}'.encode()),
    st.lists(st.sampled_from(PIECES), max_size=6).map(lambda pieces: "".join(pieces).encode()),
    st.text(max_size=9).map(lambda text: json.dumps({"text": text, "b": text}).encode()),
    st.text(max_size=9).map(
        lambda text: json.dumps({"text": text, "b": text}, ensure_ascii=False).encode("utf-8", "replace")
    ),
    st.binary(max_size=6).map(lambda raw: b'{"text":"' + raw + b'","b":""}'),
    st.binary(max_size=6).map(lambda raw: b'{"text":"x","b":"y","c":"' + raw + b'"}'),
    st.binary(max_size=6).map(lambda raw: b'{"text":"x","b":"y"' + raw + b"}"),
    st.binary(max_size=4).map(lambda raw: b'{"text":"x","b":"y"}' + raw),
    st.floats().map(lambda number: json.dumps({"text": "x", "b": "y", "c": [number]}).encode()),
)


@pytest.mark.parametrize("content", PLAIN)
def test_plain_lines_are_read_quickly(content: bytes) -> None:
    assert quickly(content, KEYS)
    assert quickly(content, ("text",))
    assert quickly(content.rstrip(b"\n"), KEYS)


@pytest.mark.parametrize("value", ODD_VALUES)
@pytest.mark.parametrize(
    "line", ['{"text":"x","b":%s}', '{"text":"x","b":"y","c": %s }', '{"c":{"d":[%s]},"text":"x","b":"y"}']
)
def test_odd_values_are_read_alike(line: str, value: str) -> None:
    plain = b'{"text":"x","b":"y"}\n'
    odd = (line % value).encode() + b"\n"
    for content in (odd, plain + odd, odd + plain, plain + odd + plain):
        quickly(content, KEYS)
        quickly(content, ("text",))


@settings(max_examples=400, deadline=None)
@given(rows=st.lists(lines, min_size=1, max_size=4), end=st.sampled_from([b"", b"\n"]))
@example(rows=[b'{"text":"x","b":', b'"y"}', b'{"text":"x","b":"y"}{"text":"x","b":"y"}'], end=b"\n")
@example(rows=[b'{"text":"x","b":"y"}{"text":"x","b":"y"}', b""], end=b"\n")
@example(rows=[b'{"text":"x","b":"y","c":{"d":1}', b'{"e":1}}{"text":"x","b":"y"}'], end=b"\n")
@example(rows=[b'{"text":"x","b":"y","c":"\xed\xa0\x80"}'], end=b"")
def test_every_line_is_read_alike(rows: list[bytes], end: bytes) -> None:
    content = b"\n".join(rows) + end
    if content:
        quickly(content, KEYS)


@pytest.mark.parametrize("between", [b"0", b"17", b"{}"])
def test_lines_that_make_up_for_one_another_are_not_taken_for_whole_ones(between: bytes) -> None:
    """Three values in a line, and one value in two lines."""
    three = b'{"text":"x","b":"y"},%b,{"text":"x","b":"y"}\n' % between
    half = b'{"text":"x","b":"y","c":[0\n0]}\n'
    for content in (three + half, half + three, three, half):
        assert not quickly(content, KEYS)


def test_blocks_of_other_kinds() -> None:
    lines = [b'{"text": "a"}', b'{"text": "b"}']
    content = b"\n".join(lines) + b"\n"
    assert plain_texts(Block("f", 1, 2, content), ["text"]) == [[b"a", b"b"]]
    assert plain_texts(Block("f", 1, 1, content), ["text"]) == [[b"a"]]  # --max-samples ends within
    assert plain_texts(Block("f", 1, 2, lines), ["text"]) == [[b"a", b"b"]]
    assert plain_texts(Block("f", 1, 2, content, is_text=True), ["text"]) is None  # a line is a text itself
    assert plain_texts(Block("f", 1, 1, [{"text": "a"}]), ["text"]) is None


@pytest.mark.parametrize("extra", [{}, {"pad_to_multiple_of": 8}, {"append_eod": True, "json_keys": ("text", "b")}])
def test_the_files_are_the_same_either_way(
    extra: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = byte_tokenizer(tmp_path / "tokenizer")
    texts = ["", "a", "中文 <|im_end|>", "x\n" * 50, "\U0001f468\u200d"]
    rows = [{"text": texts[n % 5], "b": texts[n * n % 5], "n": n / 7} for n in range(97)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summaries = []
    for name in ("quick", "rows"):
        if name == "rows":
            monkeypatch.setattr(tokenize, "plain_texts", lambda block, keys: None)
        prefix = str(tmp_path / name)
        options = PreprocessOptions((str(tmp_path / "in.jsonl"),), prefix, str(tokenizer), **extra)  # type: ignore[arg-type]
        summary = preprocess(options)
        files = [Path(f"{path}.{end}").read_bytes() for path in summary.prefixes.values() for end in ("bin", "idx")]
        summaries.append((files, {**vars(summary), "prefixes": None, "data_paths": None}))
    assert summaries[0] == summaries[1]
