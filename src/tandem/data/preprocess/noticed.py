"""What is counted about conversations, because it changes what a model learns and nobody asked for it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence

from tandem.data.templates.messages import Message, Turn, split_thought
from tandem.data.tokens.special import SpecialTokens

_AS_SUCH = "which are encoded as such; --special-tokens-in-text text encodes their letters"
# What is counted -> what the user is told, with the number in front. "row" counts rows, all else messages or calls.
_IN_WORDS = {
    "untrained": "answers are not trained: their weight says so",
    "asked": "messages ask to be trained and are not, because only answers are",
    "empty": "answers are empty; they teach to say nothing",
    "joined": "messages were joined to the one before them, which is of the same role",
    "lost thoughts": "thoughts are not in the text: the template leaves them out",
    "lost calls": "calls are not in the text: the template leaves them out",
    "special": f"messages spell special tokens, {_AS_SUCH}",
    "special tokens": f"special tokens stand in the texts, {_AS_SUCH}",
    "repeated": "conversations stand in the data more than once, and are trained each time",
}
_ONLY_TEXTS = "only texts are trained on, so answers about it are trained without it"
_FALSE_LABELS = "rows with a false label are trained like the others; leave them out of the data"
# What it means that a column is not read, where that is more than its name says.
_COLUMNS = {
    **dict.fromkeys(("images", "image", "videos", "video", "audios", "audio"), _ONLY_TEXTS),
    **dict.fromkeys(("label", "kto_tag"), _FALSE_LABELS),
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
    found: Counter[str] = Counter(joined=len(given) - len(joined))
    text = ""
    for message in joined:
        is_answer = message.role == "assistant"
        found["untrained"] += is_answer and message.trained is False
        found["asked"] += not is_answer and message.trained is True
        found["empty"] += is_answer and not (message.content.strip() or message.tool_calls)
        found["special"] += special is not None and special.count(message.content) > 0
        thought = (message.reasoning or split_thought(message.content)[0]).strip() if is_answer else ""
        if thought or message.tool_calls:
            text = text or "".join(piece for turn in turns for piece in (*turn.source, *turn.target))
            found["lost thoughts"] += thought not in text
            found["lost calls"] += sum(call.name not in text for call in message.tool_calls)
    return +found


def told(unread: Mapping[str, int], readers: Mapping[str, str], noticed: Mapping[str, int]) -> list[str]:
    """Lines for the user about columns that are not read, and about what was noticed.

    Args:
        readers: by column, the key of `map_keys` that would read it.

    >>> told({"system": 9, "id": 9}, {"system": "system"}, {"untrained": 3})
    ['not read: system, id', '--map-keys \'{"system": "system"}\' reads system', \
'3 answers are not trained: their weight says so']
    """
    lines = [f"not read: {', '.join(unread)}"] if unread else []
    for column, key in readers.items():
        lines.append(f"--map-keys '{json.dumps({key: column})}' reads {column}")
    lines += [f"{column}: {words}" for column, words in _COLUMNS.items() if column in unread]
    return lines + [f"{noticed[name]:,} {words}" for name, words in _IN_WORDS.items() if noticed.get(name)]
