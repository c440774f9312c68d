"""Benchmarks whose answers are written or judged: GSM8K, BoolQ, BBH, AGIEval."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from tandem.errors import UserError
from tandem.files.text import read_json
from tandem.harness.upstream.files import Row, read_lines, some, with_fields
from tandem.harness.upstream.spec import Spec, Splits

# AGIEval's two tasks without choices, and those that are asked in Chinese
CLOZE = ("math", "gaokao-mathcloze")
CHINESE = ("gaokao", "jec-qa", "logiqa-zh")


def gsm8k(folder: Path, *, chain_of_thought: bool) -> list[Spec]:
    """The solved examples are from a train file there; without one, those of lm-evaluation-harness's `gsm8k_cot`."""
    files = sorted(folder.glob("*.jsonl"))
    test = [path for path in files if not path.name.startswith("train")]
    train = [path for path in (*files, *sorted(folder.parent.glob("train*.jsonl"))) if path.name.startswith("train")]
    if not test:
        return []
    splits: Splits = {"test": lambda: [row for path in test for row in read_lines(path, ("question", "answer"))]}
    if chain_of_thought:
        return [Spec("gsm8k_cot", splits)]
    if not train:
        notice = f"{folder} has no train*.jsonl: solved examples are those of gsm8k_cot"
        return [Spec("gsm8k_cot", splits, notice=notice)]
    return [Spec("gsm8k", {**splits, "train": lambda: read_lines(train[0], ("question", "answer"))})]


def boolq(folder: Path) -> list[Spec]:
    """The files with `dev` in their names."""
    files = sorted(path for path in folder.glob("*.jsonl") if "dev" in path.name)

    def read() -> list[Row]:
        rows = [row for path in files for row in read_lines(path, ("question", "passage", "answer"))]
        return [{**row, "label": int(bool(row["answer"]))} for row in rows]

    splits: Splits = {"validation": read, "train": read}
    return [Spec("boolq", splits, {"training_split": None})] if files else []


def bbh(folder: Path, *, chain_of_thought: bool) -> list[Spec]:
    """A file per task. Three solved examples are lm-evaluation-harness's own."""
    kind = "cot_fewshot" if chain_of_thought else "fewshot"
    return [
        Spec(f"bbh_{kind}_{path.stem}", {"test": partial(_examples, path)}) for path in sorted(folder.glob("*.json"))
    ]


def _examples(path: Path) -> list[Row]:
    content = with_fields(read_json(path), ("examples",), str(path))
    rows = [
        with_fields(row, ("input", "target"), f"{path}: example {number}")
        for number, row in enumerate(content["examples"], start=1)
    ]
    return some(rows, path)


def agieval(folder: Path) -> list[Spec]:
    """A file per task, as AGIEval publishes them. Questions are put as in its paper, without examples."""
    return [
        Spec(f"agieval_{path.stem.replace('-', '_')}", {"test": partial(_exam, path)})
        for path in sorted(folder.glob("*.jsonl"))
    ]


def _exam(path: Path) -> list[Row]:
    is_cloze, chinese = path.stem in CLOZE, path.stem.startswith(CHINESE)
    rows = []
    for number, row in enumerate(read_lines(path, ("question",)), start=1):
        question = f"{row.get('passage') or ''}{row['question']}"
        if is_cloze:
            query = f"问题：{question}\n答案：" if chinese else f"Q: {question}\nA: The answer is"
            rows.append({"query": query, "answer": str(row.get("answer") or row.get("label"))})
        else:
            rows.append(_lettered(row, question, chinese=chinese, where=f"{path}:{number}"))
    return rows


def _lettered(row: Row, question: str, *, chinese: bool, where: str) -> Row:
    row = with_fields(row, ("options", "label"), where)
    options = [str(option) for option in row["options"]]
    letters = "ABCDEFGHIJ"[: len(options)]
    gold = [letters.find(one) for one in row["label"]]
    if not options or not gold or -1 in gold:
        raise UserError(f"{where}: label {row['label']!r}: expected letters of its {len(options)} options")
    last = letters[-1]
    if chinese:
        query = f"问题：{question} 选项：{' '.join(options)}\n答案：从A到{last}, 我们应选择"
    else:
        query = f"Q: {question} Answer Choices: {' '.join(options)}\nA: Among A through {last}, the answer is"
    return {"query": query, "choices": options, "gold": gold}
