"""NeedleBench's single-needle retrieval: a sentence in a long text, and a question about it.

Source: "NeedleBench" (arXiv 2407.11963) and OpenCompass's settings of it. Texts are as long as asked in the model's own
tokens, and answers are compared in their own language.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.data.tokens.tokenizer import Tokenizer
from tandem.errors import UserError
from tandem.harness.upstream.files import Row, read_lines
from tandem.harness.upstream.spec import Spec

NEEDLES = "needles.jsonl"
REPEATS = 10
FAR = [0, 10, 21, 31, 42, 52, 63, 73, 84, 94, 100]  # where the needle stands, in percent
NEAR = [100 * step / 19 for step in range(20)]
# thousands of tokens that the model takes -> lengths of the texts, places of the needle
LENGTHS: dict[int, tuple[Sequence[int], Sequence[float]]] = {
    4: (range(1000, 5000, 1000), NEAR),
    8: (range(5000, 9000, 1000), NEAR),
    32: ((9000, 13000, 17000, 21000, 25000, 29000, 31000, 32000), FAR),
    128: ((16000, 32000, 48000, 64000, 80000, 96000, 112000, 128000), FAR),
    200: ((16000, 48000, 80000, 112000, 128000, 144000, 176000, 200000), FAR),
    256: ((32000, 128000, 256000), FAR),
    512: ((32000, 128000, 256000, 512000), FAR),
    1000: ((20000, 160000, 300000, 440000, 580000, 720000, 860000, 1000000), FAR),
}


@dataclass(frozen=True)
class Haystack:
    """Texts of one language, and how a question about them is put.

    Attributes:
        spare: tokens that are kept for the question and the answer. At 32 thousand, English has more.
    """

    file: str
    language: str
    spare: int
    prompt: str
    before_format: str
    reminder: str

    def spare_at(self, thousands: int) -> int:
        return 3000 if thousands == 32 and self.language == "English" else self.spare

    def question(self, question: str) -> str:
        """The question, with the advice to look for what matters before the wanted format."""
        head, format_, rest = question.partition(self.before_format)
        return f"{head}{self.reminder}{format_}{rest}"


HAYSTACKS = (
    Haystack(
        "PaulGrahamEssays.jsonl",
        "English",
        600,
        "You are an intelligent AI assistant skilled in answering user questions.\nPlease keep your answers concise "
        "and clear. Do not talk about irrelevant topics or repeat your answers.\nThe document given to you by the user "
        "is {text}\n\nNow, the question is: {question}",
        "Please answer in the format",
        "Before answering, please consider what in the document is most relevant to this question. ",
    ),
    Haystack(
        "zh_finance.jsonl",
        "Chinese",
        200,
        "你是一个善于回答用户问题的智能AI助手\n请保持你的回答简洁清楚。不要说和下面文档中的无关的话，或重复你的回答\n"
        "用户现在给你的文档是{text}\n\n现在请问：{question}",
        "请按照",
        "在回答之前，请思考文档中与此问题最相关的内容是什么。",
    ),
)


def needlebench(folder: Path, tokenizer: Tokenizer, positions: int) -> list[Spec]:
    """A task for each language, of texts up to the model's length.

    Raises:
        UserError: the model's length is none of the benchmark's.
    """
    if not (folder / NEEDLES).is_file():
        return []
    thousands = positions // 1024
    if thousands not in LENGTHS:
        lengths = ", ".join(str(1024 * length) for length in LENGTHS)
        raise UserError(f"--max-position-embeddings {positions}: needlebench has texts for {lengths} tokens")

    def spec(haystack: Haystack) -> Spec:
        def read() -> list[Row]:
            return list(_questions(folder, haystack, tokenizer, thousands))

        return Spec(f"needlebench_{haystack.language.lower()}", {"test": read}, CHANGES)

    return [spec(haystack) for haystack in HAYSTACKS]


def _questions(folder: Path, haystack: Haystack, tokenizer: Tokenizer, thousands: int) -> Iterator[Row]:
    texts = [row["text"] for row in read_lines(folder / haystack.file, ("text",))]
    fields = ("needle", "retrieval_question", "arg2", "language")
    needles = [row for row in read_lines(folder / NEEDLES, fields) if row["language"] == haystack.language]
    if not needles:
        raise UserError(f"{folder / NEEDLES}: no needle in {haystack.language}")
    lengths, depths = LENGTHS[thousands]
    for length in lengths:
        for repeat in range(REPEATS):
            order = random.Random(repeat)
            needle = order.choice(needles)
            marked = tokenizer.encode(f"\n{needle['needle']}\n")
            wanted = max(0, length - haystack.spare_at(thousands) - len(marked))
            tokens = _filled(texts, order, tokenizer, wanted)
            for depth in depths:
                place = int(len(tokens) * depth / 100)
                text = tokenizer.decode([*tokens[:place], *marked, *tokens[place:]])
                question = haystack.question(needle["retrieval_question"])
                yield {
                    "prompt": haystack.prompt.format(text=text, question=question),
                    "needle": needle["needle"],
                    "keyword": needle["arg2"],
                    "length": length,
                    "depth": float(depth),
                }


def _filled(texts: Sequence[str], order: random.Random, tokenizer: Tokenizer, wanted: int) -> list[int]:
    """As many tokens of the texts, in any order, as are wanted."""
    tokens: list[int] = []
    while len(tokens) < wanted:
        for text in order.sample(texts, len(texts)):
            tokens += tokenizer.encode(text)
            if len(tokens) >= wanted:
                break
    return tokens[:wanted]


def _score(doc: Row, results: Sequence[str]) -> dict[str, float]:
    """1 with the keyword; otherwise a fifth of the likeness to the needle."""
    return {"score": 1.0 if doc["keyword"] in results[0] else 0.2 * likeness(results[0], doc["needle"])}


def likeness(answer: str, needle: str) -> float:
    """1 minus the edit distance of two texts without their spaces, as a share of the longer one.

    >>> likeness("the cat", "the hat")
    0.8333333333333334
    """
    found, wanted = "".join(answer.split()), "".join(needle.split())
    found = _trimmed(found, wanted)
    longest = max(len(found), len(wanted))
    return 1.0 if not longest else 1.0 - _distance(found, wanted) / longest


def _trimmed(found: str, wanted: str) -> str:
    """An answer about as long as what is wanted, up to its last character where that is near the end."""
    shortest, found = int(0.8 * len(wanted)), found[: int(1.2 * len(wanted))]
    end = found.find(wanted[-1], shortest) if wanted else -1
    return found if end < 0 else found[: end + 1]


def _distance(one: str, other: str) -> int:
    """How many characters must be added, removed or changed (Levenshtein)."""
    row = list(range(len(other) + 1))
    for number, character in enumerate(one, start=1):
        before, row[0] = row[0], number
        for place, against in enumerate(other, start=1):
            before, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, before + (character != against))
    return row[-1]


CHANGES: dict[str, Any] = {
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "prompt",
    "doc_to_target": "needle",
    "process_results": _score,
    "generation_kwargs": {"until": [], "max_gen_toks": 64, "do_sample": False},
    "metric_list": [{"metric": "score", "aggregation": "mean", "higher_is_better": True}],
    "num_fewshot": 0,
    "metadata": {"version": 1.0},
}
