"""Tokenizer: the same ids and the same chats as transformers."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from data_toys import byte_tokenizer
from tandem.data.tokens.tokenizer import Tokenizer
from tandem.errors import UserError
from workspace import Workspace

CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4"},
    ],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nb"},
        {"role": "user", "content": "中文 <b>"},
    ],
]
TOOL = {"type": "function", "function": {"name": "f", "description": "é <tag>", "parameters": {}}}


@pytest.fixture(scope="module")
def qwen3(shared_data: Path) -> Tokenizer:
    return Tokenizer(shared_data / "qwen3-0.6b")


@pytest.fixture(scope="module")
def reference(shared_data: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(shared_data / "qwen3-0.6b")


def test_ids_equal_transformers_on_real_text(qwen3: Tokenizer, reference: Any, shared_data: Path) -> None:
    with (shared_data / "text/free.jsonl").open() as file:
        texts = [json.loads(line)["text"] for line, _ in zip(file, range(400))]
    texts += ["<|im_start|>user\nhi<|im_end|>\n<think>\n\n</think>\n\n", "", " \n\n x", "é e\u0301 🙂"]
    assert qwen3.encode_batch(texts) == [reference.encode(t, add_special_tokens=False) for t in texts]
    assert qwen3.encode(texts[0], add_special_tokens=True) == reference(texts[0])["input_ids"]
    assert qwen3.decode(qwen3.encode(texts[0])) == texts[0]


def test_special_tokens_and_length(qwen3: Tokenizer, reference: Any) -> None:
    assert len(qwen3) == len(reference) == 151_669
    assert (qwen3.eos_id, qwen3.pad_id, qwen3.bos_id) == (151_645, 151_643, None)
    assert qwen3.token_to_id("<think>") == reference.convert_tokens_to_ids("<think>")


def test_every_file_that_names_end_tokens_is_heard(qwen3: Tokenizer, tmp_path: Path) -> None:
    """The tokenizer's own comes first: it ends documents."""
    assert qwen3.end_ids == (151_645, 151_643)
    folder = byte_tokenizer(tmp_path, eos_token=None)
    assert (Tokenizer(folder).end_ids, Tokenizer(folder).eos_id) == ((), None)
    (folder / "config.json").write_text('{"eos_token_id": 256}')
    assert (Tokenizer(folder).end_ids, Tokenizer(folder).eos_id) == ((256,), 256)
    (folder / "generation_config.json").write_text('{"eos_token_id": [258, 256]}')
    assert (Tokenizer(folder).end_ids, Tokenizer(folder).eos_id) == ((258, 256), 258)
    byte_tokenizer(tmp_path, eos_token="<|endoftext|>")
    assert (Tokenizer(folder).end_ids, Tokenizer(folder).eos_id) == ((256, 258), 256)


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("options", [{}, {"enable_thinking": False}, {"tools": [TOOL]}])
def test_chat_template_equals_transformers(
    qwen3: Tokenizer, reference: Any, chat: list[dict[str, Any]], options: dict[str, Any]
) -> None:
    for generation in (True, False):
        ours = qwen3.apply_chat_template(chat, add_generation_prompt=generation, **options)
        theirs = reference.apply_chat_template(chat, tokenize=False, add_generation_prompt=generation, **options)
        assert ours == theirs


def tiny_folder(folder: Path, **config: Any) -> Path:
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "<e>": 2}, unk_token="a"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.add_special_tokens(["<e>"])
    folder.mkdir(exist_ok=True)
    model.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_special_tokens_in_both_forms_and_added_tokens_of_the_config(tmp_path: Path) -> None:
    added = {"2": {"content": "<e>", "special": True}, "3": {"content": "<p>", "special": True, "lstrip": False}}
    config = {"eos_token": {"content": "<e>"}, "pad_token": "<p>", "added_tokens_decoder": added}
    tokenizer = Tokenizer(tiny_folder(tmp_path, **config))
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.bos_id, len(tokenizer)) == (2, 3, None, 4)
    assert tokenizer.encode("a <p> b") == [0, 3, 1]


def test_chat_template_file_wins_and_has_the_helpers(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, chat_template="old", eos_token="<e>")
    assert Tokenizer(folder).apply_chat_template([]) == "old"
    (folder / "chat_template.jinja").write_text("{{ messages | tojson }}{{ eos_token }}{{ strftime_now('%Y')|length }}")
    assert Tokenizer(folder).apply_chat_template([{"role": "<é>"}]) == '[{"role": "<é>"}]<e>4'
    (folder / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UserError, match="roles must alternate"):
        Tokenizer(folder).apply_chat_template([])
    (folder / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}")
    with pytest.raises(UserError, match="unsafe"):
        Tokenizer(folder).apply_chat_template([])


def test_errors_name_file_and_fix(tmp_path: Path, shared_data: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.json: no such file; expected a Hugging Face folder"):
        Tokenizer(tmp_path)
    with pytest.raises(UserError, match=r"eos_token '<nope>' is not in tokenizer\.json"):
        Tokenizer(tiny_folder(tmp_path / "a", eos_token="<nope>"))
    with pytest.raises(UserError, match="the files belong to different models"):
        Tokenizer(tiny_folder(tmp_path / "b", added_tokens_decoder={"1": {"content": "<e>"}}))
    (tmp_path / "a/tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="not a tokenizer"):
        Tokenizer(tmp_path / "a")
    with pytest.raises(UserError, match="has no chat template"):
        Tokenizer(shared_data / "golden/tok_tiny").apply_chat_template([])
    shutil.copy(shared_data / "qwen3-0.6b/tokenizer.json", tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match=r"tokenizer_config\.json: no such file"):
        Tokenizer(tmp_path)


def test_a_copy_spells_special_tokens_out_too(tmp_path: Path) -> None:
    tokenizer = Tokenizer(byte_tokenizer(tmp_path / "tokenizer"))
    spelled = tokenizer.encode_spelled(["a<|im_end|>"])
    assert len(spelled[0]) == 11
    assert pickle.loads(pickle.dumps(tokenizer)).encode_spelled(["a<|im_end|>"]) == spelled
    assert tokenizer.encode("a<|im_end|>") == [*tokenizer.encode("a"), 258]


def test_named_templates_are_chosen_as_transformers_chooses(workspace: Workspace, tmp_path: Path) -> None:
    """Both in the form of older folders and in that of transformers 5."""
    shutil.copytree(workspace.hf, tmp_path / "old")
    path = tmp_path / "old" / "tokenizer_config.json"
    named = [{"name": "default", "template": "D{{ tools }}"}, {"name": "tool_use", "template": "T{{ tools | length }}"}]
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": named}))
    AutoTokenizer = pytest.importorskip("transformers").AutoTokenizer
    theirs = AutoTokenizer.from_pretrained(tmp_path / "old")
    theirs.save_pretrained(tmp_path / "new")
    messages = [{"role": "user", "content": "x"}]
    for tools in (None, [{"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}]):
        expected = theirs.apply_chat_template(messages, tools=tools, tokenize=False)
        for folder in ("old", "new"):
            assert Tokenizer(tmp_path / folder).apply_chat_template(messages, tools=tools) == expected


def test_without_a_default_only_conversations_with_tools_have_a_template(workspace: Workspace, tmp_path: Path) -> None:
    """As in transformers. Files go before the config, as there."""
    shutil.copytree(workspace.hf, tmp_path / "old")
    path = tmp_path / "old" / "tokenizer_config.json"
    named = [{"name": "rag", "template": "R"}, {"name": "tool_use", "template": "T{{ tools | length }}"}]
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": named}))
    AutoTokenizer = pytest.importorskip("transformers").AutoTokenizer
    AutoTokenizer.from_pretrained(tmp_path / "old").save_pretrained(tmp_path / "new")
    path = tmp_path / "new" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": "not read"}))
    messages = [{"role": "user", "content": "x"}]
    tools = [{"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}]
    for folder in (tmp_path / "old", tmp_path / "new"):
        ours, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
        expected = theirs.apply_chat_template(messages, tools=tools, tokenize=False)
        assert ours.apply_chat_template(messages, tools=tools) == expected == "T1"
        with pytest.raises(ValueError, match="no default specified"):
            theirs.apply_chat_template(messages, tokenize=False)
        with pytest.raises(UserError, match=r"none of its chat templates \(rag, tool_use\) is named default"):
            ours.apply_chat_template(messages)
        assert ours.without_templates().named_templates == ()
