"""What is counted about conversations, because it changes what a model learns and nobody asked for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tandem.data.handlers.entries import WEIGHTS
from tandem.data.handlers.preferences import Answers
from tandem.data.templates.messages import EMPTY, Message, Turn, join_neighbours, split_thought
from tandem.data.tokens.special import SpecialTokens

_AS_SUCH = "which are encoded as such (--special-tokens-in-text text encodes their letters)"
# What is counted -> what the user is told, before the number.
_IN_WORDS = {
    "untrained": "answers that are not trained, because their weight says so",
    "asked": "messages that ask to be trained and are not, because only answers are",
    "empty": "empty answers, which teach to say nothing",
    "joined": "messages that were joined to the one before, which is of the same role",
    "lost thoughts": "thoughts that the template leaves out",
    "lost calls": "calls that the template leaves out",
    "special": f"messages that spell special tokens, {_AS_SUCH}",
    "special tokens": f"special tokens that the texts spell, {_AS_SUCH}",
    "repeated": "conversations that occur again, and are trained again",
    "equal answers": "pairs whose chosen and rejected answers are equal, which teach nothing",
    "one thought": "pairs of an answer with a thought and one without, which teach to think or not to think",
    "texts": f"rows of texts, written as messages of user and assistant (--prompt-type {EMPTY} adds nothing to them)",
    "desirable": "desirable answers",
    "undesirable": "undesirable answers",
}
_ONLY_TEXTS = "only texts are trained on, so answers about it are trained without it"
_FALSE_LABELS = (
    "rows with a false label are trained like the others; leave them out of the data, or train on them as preferences "
    "(a --handler-name of unpaired ones, and --stage kto)"
)
# What it means that a column is not read, where that is more than its name says.
_COLUMNS = {
    **dict.fromkeys(("images", "image", "videos", "video", "audios", "audio"), _ONLY_TEXTS),
    **dict.fromkeys(("label", "kto_tag"), _FALSE_LABELS),
    **dict.fromkeys(WEIGHTS, "a whole row has no weight; give it to messages, or leave rows out"),
}


def of_conversation(
    given: Sequence[Message], joined: Sequence[Message], turns: Sequence[Turn], special: SpecialTokens | None
) -> Counter[str]:
    """What is noticed about a conversation.

    Args:
        given: its messages, as the record has them.
        joined: the same without neighbours of one role.
        turns: what the template made of them.
        special: the tokens to look for; None where they are spelled out.
    """
    found: Counter[str] = Counter()
    if len(given) > len(joined):
        found["joined"] = len(given) - len(joined)
    for message in joined:
        if special is not None and special.count(message.content):
            found["special"] += 1
        if message.role != "assistant":
            found["asked"] += message.trained is True
            continue
        found["untrained"] += message.trained is False
        found["empty"] += not (message.content.strip() or message.tool_calls)
        if message.reasoning or message.tool_calls or "</think>" in message.content:
            text = "".join(piece for turn in turns for piece in (*turn.source, *turn.target))
            thought = message.reasoning or split_thought(message.content)[0]
            found["lost thoughts"] += thought.strip() not in text
            found["lost calls"] += sum(call.name not in text for call in message.tool_calls)
    return found


def of_answers(
    given: Answers, answers: Sequence[Sequence[Turn]], prompt_type: str, special: SpecialTokens | None
) -> Counter[str]:
    """What is noticed about a prompt and its answers. The prompt counts once.

    Args:
        answers: what the template made of each conversation.
        special: as in `of_conversation`.
    """
    found: Counter[str] = Counter()
    for number, (messages, turns) in enumerate(zip(given.answers, answers)):
        conversation = [*given.prompt, *messages] if number == 0 else messages
        found += of_conversation(conversation, join_neighbours(conversation), turns, special)
    trained = [[piece for turn in turns for piece in turn.target] for turns in answers]
    if len(trained) > 1:
        found["equal answers"] += trained[0] == trained[1]
        found["one thought"] += _thinks(trained[0]) != _thinks(trained[1])
    found["texts"] += given.form == "texts" and prompt_type != EMPTY
    if given.desirable is not None:
        found["desirable" if given.desirable else "undesirable"] += 1
    return found


def _thinks(pieces: Sequence[str]) -> bool:
    """Whether a trained answer has a thought that is not empty.

    >>> _thinks(["<think>\\n\\n</think>\\n\\n", "4"])
    False
    """
    thought, end, _ = "".join(pieces).partition("</think>")
    return bool(end) and bool(thought.replace("<think>", "").strip())


def told(unread: Mapping[str, int], readers: Mapping[str, str], noticed: Mapping[str, int]) -> list[str]:
    """Lines for the user about columns that are not read, and about what was noticed.

    Args:
        readers: by column, the option that would read it.

    >>> told({"system": 9, "id": 9}, {"system": "--map-keys ..."}, {"empty": 3})
    ['not read: system, id', '--map-keys ... reads system', 'empty answers, which teach to say nothing: 3']
    """
    lines = [f"not read: {', '.join(unread)}"] if unread else []
    lines += [f"{option} reads {column}" for column, option in readers.items()]
    lines += [f"{column}: {words}" for column, words in _COLUMNS.items() if column in unread]
    return lines + [f"{words}: {noticed[name]:,}" for name, words in _IN_WORDS.items() if noticed.get(name)]


def told_by_record(record: Mapping[str, Any]) -> list[str]:
    """The lines of `told` about data that have this record. An older one may not have these counts."""
    return told(record["counts"].get("unread", {}), {}, record["counts"].get("noticed", {}))
