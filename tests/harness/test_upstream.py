"""`--task`: MindSpeed-LLM's benchmarks over its own file layouts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tandem.__main__ import main
from tandem.data.tokens.tokenizer import Tokenizer
from tandem.errors import UserError
from tandem.harness.library import require_library
from tandem.harness.upstream.benchmarks import KNOWN, Wanted, load_upstream
from tandem.harness.upstream.needles import CHANGES as NEEDLES
from tandem.harness.upstream.programs import program_of, runs
from workspace import Workspace

# Some subjects' questions, and where upstream's documents put them.
FILES: dict[str, Mapping[str, str]] = {
    "mmlu": {
        "test/anatomy_test.csv": 'Which is a bone?,liver,femur,"skin, outer",lung,B\n"How many?",1,2,3,4,D\n',
        "dev/anatomy_dev.csv": "Which beats?,heart,nail,hair,tooth,A\nWhich sees?,ear,nose,eye,hand,C\n",
        "test/virology_test.csv": "What is a virus?,a,b,c,d,A\n",
    },
    "ceval": {
        "val/law_val.csv": "id,question,A,B,C,D,answer\n0,法是什么？,甲,乙,丙,丁,C\n",
        "dev/law_dev.csv": "id,question,A,B,C,D,answer,explanation\n0,谁立法？,甲,乙,丙,丁,B,因为\n",
    },
    "cmmlu": {
        "test/anatomy.csv": ",Question,A,B,C,D,Answer\n0,心脏有几个腔？,一,二,三,四,D\n",
        "dev/anatomy.csv": ",Question,A,B,C,D,Answer\n0,人有几只眼？,一,二,三,四,B\n",
    },
    "gsm8k": {
        "test.jsonl": '{"question": "2 and 3?", "answer": "2+3=5\\n#### 5"}\n',
        "train.jsonl": '{"question": "1 and 1?", "answer": "1+1=2\\n#### 2"}\n' * 6,
    },
    "boolq": {
        "dev.jsonl": '{"question": "is it", "passage": "It is.", "answer": true, "title": "T"}\n'
        '{"question": "was it", "passage": "Not.", "answer": false, "title": "T"}\n',
        "train.jsonl": "not read",
    },
    "bbh": {"navigate.json": '{"examples": [{"input": "Turn. Options:\\n- Yes\\n- No", "target": "No"}]}'},
    "agieval": {
        "lsat-ar.jsonl": '{"passage": "P. ", "question": "Q?", "options": ["(A)x", "(B)y"], "label": "B"}\n',
        "gaokao-physics.jsonl": '{"question": "问", "options": ["(A)一", "(B)二"], "label": ["A", "B"]}\n',
        "math.jsonl": '{"passage": null, "question": "1+1", "options": null, "label": null, "answer": "2"}\n',
    },
    "human_eval": {
        "human-eval.jsonl": json.dumps(
            {
                "task_id": "HumanEval/0",
                "prompt": "def add(a, b):\n",
                "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
                "entry_point": "add",
                "canonical_solution": "    return a + b\n",
            }
        )
    },
    "needlebench": {
        "needles.jsonl": '{"needle": "The key is under the mat.", "retrieval_question": "Where? Please answer in the '
        'format \'X\'.", "arg2": "mat", "language": "English"}\n{"needle": "钥匙在垫子下。", "retrieval_question": '
        '"在哪？请按照格式回答。", "arg2": "垫子", "language": "Chinese"}\n',
        "PaulGrahamEssays.jsonl": '{"text": "One two three. "}\n{"text": "Four five six. "}\n',
        "zh_finance.jsonl": '{"text": "一二三。"}\n',
    },
}
FOLDERS = {"mmlu": "test", "mmlu_ppl": "test", "ceval": "val", "cmmlu": "test"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("lm_eval")
    root = tmp_path_factory.mktemp("data")
    for name, files in FILES.items():
        for path, text in files.items():
            (root / name / path).parent.mkdir(parents=True, exist_ok=True)
            (root / name / path).write_text(text, encoding="utf-8")
    return root


def folder_of(data: Path, name: str) -> str:
    return str(data / name.removesuffix("_ppl") / FOLDERS.get(name, ""))


def wanted(workspace: Workspace, name: str, *folders: str, **values: Any) -> Wanted:
    return Wanted((name,), folders, Tokenizer(workspace.hf), values.pop("positions", 4096), **values)


def asked(loaded: dict[str, Any], task: str) -> tuple[str, Any]:
    """The context of a task's first question, and its right answer."""
    from tandem.harness.benchmark import Benchmark

    Benchmark(loaded, allow_code=True)
    one = loaded["tasks"][task]
    one.build_all_requests(limit=1, rank=0, world_size=1)
    request = one.instances[0]
    return request.args[0], one.doc_to_target(request.doc)


CASES: list[tuple[str, str, list[str], Any]] = [
    (
        "mmlu",
        "mmlu_anatomy",
        ["about anatomy.\n\n", "Which beats?\nA. heart", "Answer: A\n\n", "Which is a bone?\n"],
        1,
    ),
    ("mmlu_ppl", "mmlu_virology", ["about virology.\n\nWhat is a virus?\nA. a\nB. b\nC. c\nD. d\nAnswer:"], 0),
    ("ceval", "ceval-valid_law", ["谁立法？\nA. 甲", "答案： B\n\n", "法是什么？"], 2),
    ("cmmlu", "cmmlu_anatomy", ["人有几只眼？", "答案： B\n\n", "心脏有几个腔？\nA. 一"], 3),
    (
        "gsm8k",
        "gsm8k",
        ["Question: 1 and 1?\nAnswer: 1+1=2\n#### 2\n\n", "Question: 2 and 3?\nAnswer:"],
        "2+3=5\n#### 5",
    ),
    ("boolq", "boolq", ["It is.\nQuestion: is it?\nAnswer:"], 1),
    ("bbh", "bbh_fewshot_navigate", ["A: No\n\n", "Q: Turn. Options:\n- Yes\n- No\nA:"], "No"),
    (
        "agieval",
        "agieval_lsat_ar",
        ["Q: P. Q? Answer Choices: (A)x (B)y\nA: Among A through B, the answer is"],
        [1],
    ),
    ("agieval", "agieval_gaokao_physics", ["问题：问 选项：(A)一 (B)二\n答案：从A到B, 我们应选择"], [0, 1]),
    ("agieval", "agieval_math", ["Q: 1+1\nA: The answer is"], "2"),
    ("human_eval", "human_eval", ["def add(a, b):\n"], "add"),
]
QUICK = ("mmlu", "gsm8k", "human_eval")


@pytest.mark.parametrize(
    ("name", "task", "parts", "target"),
    [pytest.param(*case, marks=() if case[0] in QUICK else pytest.mark.slow("answers")) for case in CASES],
)
def test_questions_are_put_as_lm_eval_puts_them(
    workspace: Workspace, data: Path, name: str, task: str, parts: list[str], target: Any
) -> None:
    loaded, _ = load_upstream(wanted(workspace, name, folder_of(data, name)))
    context, found = asked(loaded, task)
    place = 0
    for part in parts:
        assert part in context[place:], (part, context)
        place = context.index(part, place)
    assert found == target


def test_shots_that_are_not_there_are_said(workspace: Workspace, data: Path) -> None:
    loaded, notices = load_upstream(wanted(workspace, "mmlu", folder_of(data, "mmlu")))
    assert len(notices) == 1
    assert "virology_dev.csv: its questions are asked without solved examples" in notices[0]
    assert {name: task.get_config("num_fewshot") for name, task in loaded["tasks"].items()} == {
        "mmlu_anatomy": 2,
        "mmlu_virology": 0,
    }


def test_thoughts_and_lengths(workspace: Workspace, data: Path) -> None:
    more = {"chain_of_thought": True, "max_new_tokens": 33}
    loaded, _ = load_upstream(wanted(workspace, "bbh", folder_of(data, "bbh"), **more))
    (task,) = loaded["tasks"].values()
    assert task.config.task == "bbh_cot_fewshot_navigate"
    assert task.config.generation_kwargs["max_gen_toks"] == 33
    loaded, _ = load_upstream(wanted(workspace, "gsm8k", folder_of(data, "gsm8k"), chain_of_thought=True))
    assert asked(loaded, "gsm8k_cot")[0].count("Q: ") == 9


def test_needles_stand_where_they_should(workspace: Workspace, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem.harness.upstream.needles.REPEATS", 1)
    loaded, _ = load_upstream(wanted(workspace, "needlebench", folder_of(data, "needlebench")))
    docs = list(loaded["tasks"]["needlebench_english"].test_docs())
    assert len(docs) == 4 * 20
    tokenizer = Tokenizer(workspace.hf)
    for doc in (docs[0], docs[19], docs[-10]):
        assert doc["prompt"].count(doc["needle"]) == 1
        assert abs(len(tokenizer.encode(doc["prompt"])) - doc["length"]) < 600
    places = [doc["prompt"].index("The key") for doc in docs[:20]]
    assert places == sorted(places)
    assert places[-1] - places[0] > 300
    score = NEEDLES["process_results"]
    assert score(docs[0], ["It is under the mat."]) == {"score": 1.0}
    assert 0.15 < score(docs[0], ["The key is under the cat."])["score"] < 0.2


def test_code_runs_apart_and_not_for_ever() -> None:
    doc = json.loads(FILES["human_eval"]["human-eval.jsonl"])
    assert runs(program_of(doc, doc["canonical_solution"]))
    assert runs(program_of(doc, "    return a + b\n```\nThat is it."))
    assert not runs(program_of(doc, "    return a - b\n"))
    assert not runs(program_of(doc, "    import time; time.sleep(9)\n"), seconds=0.5)


def test_the_command(workspace: Workspace, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    words = ["evaluate", str(workspace.hf), "--ai-framework", "torch", "--output", str(tmp_path / "out.json")]
    words += ["--no-chat-template", "--evaluation-batch-size", "1", "--max-new-tokens", "8", "--task"]
    folders = ["--task-data-path", folder_of(data, "mmlu"), folder_of(data, "boolq"), folder_of(data, "human_eval")]
    assert main([*words, "mmlu", "boolq", *folders]) == 0
    printed = capsys.readouterr().out
    assert "virology_dev.csv: its questions" in printed
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["n-samples"]["mmlu_anatomy"]["effective"] == 2
    assert found["groups"]["mmlu"]["sample_count"]["acc,none"] == 3
    assert found["results"]["boolq"]["acc,none"] in (0.0, 0.5, 1.0)
    assert main([*words, "human_eval", *folders]) == 2
    assert "human_eval: runs code that the model writes; --allow-code allows it" in capsys.readouterr().err
    assert main([*words, "human_eval", *folders, "--allow-code"]) == 0
    assert "pass@1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "files", "named"),
    [
        ("mmlu", {"anatomy_test.csv": "Q?,a,b,c,d,E\n"}, r"anatomy_test\.csv: row 1: the answer 'E' is none of A, B"),
        ("mmlu", {"anatomy_test.csv": "Q?,a,b\n"}, r"anatomy_test\.csv: row 1: 3 cells; expected question, A"),
        ("mmlu", {"anatmy_test.csv": "Q?,a,b,c,d,A\n"}, r"has no task mmlu_anatmy: .*did you mean 'mmlu_anatomy'"),
        ("ceval", {"law_val.csv": "id,question,A\n"}, r"law_val\.csv:1: no column B, C, D, answer; its columns are id"),
        ("gsm8k", {"test.jsonl": '{"question": "x"}\n'}, r"test\.jsonl:1: expected an object with question, answer"),
        ("gsm8k", {"test.jsonl": "{\n"}, r"test\.jsonl:1: not valid JSON"),
        ("boolq", {"test.jsonl": "{}\n"}, r"--task boolq needs a folder with \*dev\*\.jsonl"),
        ("bbh", {"navigate.json": "[]"}, r"navigate\.json: expected an object with examples; found list"),
        (
            "agieval",
            {"lsat-ar.jsonl": '{"question": "", "options": ["x"], "label": "C"}'},
            r"label 'C': expected letters",
        ),
        ("needlebench", {"needles.jsonl": ""}, r"--max-position-embeddings 5120: needlebench has texts for 4096, 8192"),
    ],
)
def test_what_is_wrong_with_files_is_named(
    workspace: Workspace, tmp_path: Path, name: str, files: Mapping[str, str], named: str
) -> None:
    require_library()
    for path, text in files.items():
        (tmp_path / path).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=named):
        load_upstream(wanted(workspace, name, str(tmp_path), positions=5120))


def test_names(workspace: Workspace, tmp_path: Path) -> None:
    assert set(KNOWN) == {"mmlu_ppl", *FILES}
    with pytest.raises(UserError, match=r"--task mmul: expected some of cmmlu, .*did you mean 'mmlu'"):
        load_upstream(wanted(workspace, "mmul", str(tmp_path)))
    with pytest.raises(UserError, match="--task-data-path is not given: --task mmlu needs a folder with SUBJECT_test"):
        load_upstream(wanted(workspace, "mmlu"))
    with pytest.raises(UserError, match="--chain-of-thought: only for gsm8k and bbh"):
        load_upstream(wanted(workspace, "mmlu", str(tmp_path), chain_of_thought=True))
