"""The fixed prompts and answers, as tokens."""

from __future__ import annotations

from collections.abc import Sequence

from tandem.conversion.certificate.content import Probe
from tandem.data.templates.messages import Message, Template
from tandem.data.tokens.tokenizer import Tokenizer
from tandem.errors import UserError

# Conversations, each with its answer last: a question, instructions, and a second question in another script
CONVERSATIONS = (
    (("user", "What is the capital of France?"), ("assistant", "The capital of France is Paris.")),
    (("system", "Answer with one number."), ("user", "2 + 3 = ?"), ("assistant", "5")),
    (
        ("user", "Where does the Danube end?"),
        ("assistant", "In the Black Sea."),
        ("user", "黑海在哪里?"),
        ("assistant", "在欧洲和亚洲之间。"),
    ),
)
TEXTS = (("def add(a, b):\n    return", " a + b\n"),)


def probes_of(tokenizer: Tokenizer, template: Template | None, longest: int) -> tuple[Probe, ...]:
    """The probes of at most `longest` tokens: plain text, and conversations where there is a template for them.

    Args:
        template: that of training; None for the tokenizer's own, if it has one.
    """
    probes = []
    for conversation in CONVERSATIONS:
        try:
            prompt = prompt_ids(tokenizer, template, conversation[:-1])
        except UserError:  # some templates refuse a system message, or take one turn only
            continue
        if prompt is not None:
            messages = tuple({"role": role, "content": content} for role, content in conversation[:-1])
            end = [] if (token := end_of_turn(tokenizer, template)) is None else [token]
            answer = tokenizer.encode(conversation[-1][1]) + end
            probes.append(Probe(messages, "", tuple(prompt), tuple(answer)))
    for text, answer_text in TEXTS:
        probes.append(Probe((), text, tuple(tokenizer.encode_prompt(text)), tuple(tokenizer.encode(answer_text))))
    return tuple(probe for probe in probes if 1 < len(probe.token_ids) <= longest and probe.prompt_ids)


def prompt_ids(
    tokenizer: Tokenizer, template: Template | None, conversation: Sequence[tuple[str, str]]
) -> list[int] | None:
    """The tokens that ask for the next answer; None where there is no template.

    Raises:
        UserError: the template refuses the conversation.
    """
    if template is not None:
        pieces = template.generation_prompt([Message(role, content) for role, content in conversation])
        return [token for piece in pieces for token in tokenizer.encode(piece)]
    if tokenizer.chat_template is None:
        return None
    messages = [{"role": role, "content": content} for role, content in conversation]
    return tokenizer.encode(tokenizer.apply_chat_template(messages, add_generation_prompt=True))


def end_of_turn(tokenizer: Tokenizer, template: Template | None) -> int | None:
    """The token after an answer."""
    return tokenizer.eos_id if template is None else tokenizer.require_id(template.stop_word)
