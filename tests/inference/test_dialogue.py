"""A conversation: each answer is what transformers gives for the whole of it, though little of it is computed again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tandem.backends.interface import Piece
from tandem.errors import UserError
from tandem.inference import chat
from tandem.inference.chat import Model, open_model
from tandem.inference.continuing import Continuing
from tandem.inference.dialogue import Dialogue
from tandem.inference.options import LoadOptions
from tandem.inference.sampling import Sampling
from tandem.launch.world import SingleProcess
from workspace import Workspace

QUESTIONS = ("Which digit of 90 is largest?", "And the smallest?", "Thank you.")


@pytest.fixture
def model(workspace: Workspace) -> Model:
    return open_model(LoadOptions(str(workspace.hf), ai_framework="torch"))


def counted(dialogue: Dialogue, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each step computes."""
    session, counts = dialogue._continuing._session, list[int]()
    step = session.step

    def count(pieces: list[Piece]) -> Any:
        counts.extend(len(piece.tokens) for piece in pieces)
        return step(pieces)

    monkeypatch.setattr(session, "step", count)
    return counts


def answered(dialogue: Dialogue, question: str) -> str:
    dialogue.ask(question)
    return "".join(piece.text for piece in dialogue.answer() if piece is not None)


def test_every_answer_is_transformers_answer_to_the_whole_conversation(
    workspace: Workspace, framework: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(workspace.hf, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(workspace.hf)
    model = open_model(LoadOptions(str(workspace.hf), ai_framework=framework))
    dialogue = Dialogue(model, Sampling(max_new_tokens=6))
    dialogue.system = "Answer briefly."
    counts = counted(dialogue, monkeypatch)
    messages = [{"role": "system", "content": dialogue.system}]
    lengths = []
    for question in QUESTIONS:
        before = len(counts)
        text = answered(dialogue, question)
        messages.append({"role": "user", "content": question})
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        output = theirs.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)[0, len(prompt) :]
        assert text == tokenizer.decode(output, skip_special_tokens=True)
        messages.append({"role": "assistant", "content": text})
        lengths.append((len(prompt), sum(counts[before:]) - 5))  # the sixth token is chosen, and not computed
    assert lengths[0][0] == lengths[0][1]
    assert all(computed < 0.7 * length for length, computed in lengths[1:])
    assert dialogue.to_record() == {"messages": messages}
    assert dialogue.cut == "cut after 6 tokens (/set max_new_tokens)"
    dialogue.close()


def test_an_answer_that_is_given_up_stays_and_one_without_a_word_does_not(model: Model) -> None:
    dialogue = Dialogue(model, Sampling(max_new_tokens=50))
    dialogue.ask(QUESTIONS[0])
    answer = dialogue.answer()
    said = next(piece for piece in answer if piece is not None)
    answer.close()  # type: ignore[attr-defined]
    assert [message.role for message in dialogue.messages] == ["user", "assistant"]
    assert dialogue.messages[1].content == said.text
    assert dialogue.cut == "stopped"
    dialogue.ask(QUESTIONS[1])
    answer = dialogue.answer()
    assert next(answer) is None  # the prompt is read
    answer.close()  # type: ignore[attr-defined]
    assert len(dialogue.messages) == 2
    assert answered(dialogue, QUESTIONS[1])  # the session goes on
    dialogue.close()


def test_another_answer_draws_from_another_seed(model: Model) -> None:
    dialogue = Dialogue(model, Sampling(max_new_tokens=12, temperature=1.5))
    assert not dialogue.ask_again()
    first = answered(dialogue, QUESTIONS[0])
    assert dialogue.ask_again()
    second = "".join(piece.text for piece in dialogue.answer() if piece is not None)
    assert first != second
    assert [message.content for message in dialogue.messages] == [QUESTIONS[0], second]
    dialogue.close()
    again = Dialogue(model, Sampling(max_new_tokens=12, temperature=1.5))
    assert answered(again, QUESTIONS[0]) == first
    again.close()


def test_what_does_not_fit_is_said_and_taken_back(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    dialogue = Dialogue(model, Sampling(max_new_tokens=4))
    dialogue.ask("90 " * 600)
    with pytest.raises(UserError, match=r"the conversation has [\d,]+ tokens; there is room for 512"):
        list(dialogue.answer())
    assert dialogue.messages == []
    assert answered(dialogue, QUESTIONS[0])
    dialogue.close()
    monkeypatch.setattr(model.engine, "free_memory", lambda: 4 * 100 * model.engine.bytes_per_cached_token())
    assert Continuing(model.engine).room == 100
    together = [Continuing(model.engine, 2) for _ in range(2)]
    assert [one.room for one in together] == [50, 50]
    size = 2 * 50 * model.engine.bytes_per_cached_token() / 1e6
    assert together[0].notice == f"keys and values: up to {size:,.0f} MB for 50 tokens, 2 times"


def test_a_model_without_a_template_is_refused(workspace: Workspace, tmp_path: Path) -> None:
    model = open_model(LoadOptions(str(workspace.hf), ai_framework="torch", raw=True))
    with pytest.raises(UserError, match="no chat template"):
        model.prompter.check()


def test_a_model_is_open_when_all_processes_have_it(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before that, nothing is said to be ready."""
    done = list[str]()

    class Everyone(SingleProcess):
        def barrier(self) -> None:
            done.append("all wait")

    create = chat.create_engine

    def engine(*arguments: Any) -> Any:
        made = create(*arguments)
        load = made.load_weights

        def loaded(source: Any) -> None:
            load(source)
            done.append("loaded")

        monkeypatch.setattr(made, "load_weights", loaded)
        return made

    monkeypatch.setattr(chat, "create_engine", engine)
    open_model(LoadOptions(str(workspace.hf), ai_framework="torch"), Everyone())
    assert done == ["loaded", "all wait"]
