"""The model that lm-evaluation-harness asks. Imported only where it is installed, on the first rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from tandem.data.tokens.tokenizer import Tokenizer
from tandem.errors import UserError
from tandem.harness.cache import Answers, key_of
from tandem.harness.chat import Chat, thinks, without_thought
from tandem.harness.team import Team
from tandem.harness.texts import Score, asked_together
from tandem.harness.wishes import Wishes, cut

Pair = tuple[Sequence[int], Sequence[int]]  # context and continuation


@dataclass(frozen=True)
class Asking:
    """What is asked, and how.

    Attributes:
        max_length: the most tokens that the model takes. Longer contexts lose their beginning.
        chat: the template, where questions are put into one.
        answers: those that are there already.
        progress: called with the kind of requests, how many are done, and how many there are.
    """

    team: Team
    tokenizer: Tokenizer
    max_length: int
    seed: int
    chat: Chat | None
    answers: Answers
    progress: Callable[[str, int, int], None] = lambda *_: None


class TandemLM(TemplateLM):
    """An engine as lm-evaluation-harness's model. Answers are those of its `hf` model for the exported folder."""

    def __init__(self, asking: Asking) -> None:
        super().__init__()
        self._asking = asking
        self._tokenizer = asking.tokenizer
        self._prefix = self._tokenizer.decode([self.prefix_token_id])

    # --- tokens and templates

    @property
    def eot_token_id(self) -> int:
        if self._tokenizer.eos_id is None:
            raise UserError(f"{self._tokenizer.folder}: names no end token, which questions without a context need")
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self._tokenizer.bos_id is None else self._tokenizer.bos_id

    @property
    def max_length(self) -> int:
        return self._asking.max_length

    @property
    def tokenizer_name(self) -> str:
        return self._tokenizer.sha256

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a text, with the tokens that the tokenizer puts around texts, unless it begins with them."""
        special = not string.startswith(self._prefix) if add_special_tokens is None else add_special_tokens
        return self._tokenizer.encode(string, add_special_tokens=special)

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        assert self._asking.chat is not None, "the template is asked for only where one is applied"
        return self._asking.chat.text(chat_history, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        chat = self._asking.chat
        return chat.source if chat is not None and chat_template else None

    # --- likelihoods

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        if thinks(self._asking.chat):
            tasks = sorted({request.task_name for request in requests if request.task_name})
            raise UserError(
                f"--enable-thinking true: the tasks {', '.join(tasks)} compare how likely given answers are, and a "
                f"model that thinks does not begin with its answer; give --enable-thinking false"
            )
        scores: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return scores

    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        pairs = [self._kept((context, continuation), texts) for texts, context, continuation in requests]
        return [tuple(score) for score in self._scores("loglikelihood", pairs)]  # type: ignore[misc]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        windows: list[Pair] = []
        counts = []
        for (text,) in (request.args for request in requests):
            tokens = self.tok_encode(text)
            rolling = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            found = [make_disjoint_window(window) for window in rolling]
            windows += found
            counts.append(len(found))
        scores = iter(self._scores("loglikelihood_rolling", windows))
        return [sum(next(scores).log_likelihood for _ in range(count)) for count in counts]

    def _kept(self, pair: Pair, texts: tuple[str, str]) -> Pair:
        """A pair without the beginning of a context that is too long."""
        context, continuation = pair
        if not continuation or len(continuation) > self.max_length:
            raise UserError(
                f"the continuation {texts[1]!r} has {len(continuation)} tokens; expected 1 to {self.max_length}"
            )
        room = self.max_length + 1 - len(continuation)
        return context[-room:], continuation

    def _scores(self, kind: str, pairs: Sequence[Pair]) -> list[Score]:
        answers = self._asking.answers
        keys = [key_of("score", list(context), list(continuation)) for context, continuation in pairs]
        open_ = self._open(keys)
        questions = asked_together([pairs[number] for number in open_])
        done = self._counter(kind, len(pairs), len(open_))
        for (_, numbers), scores in zip(questions, self._asking.team.score([asked for asked, _ in questions])):
            for number, score in zip(numbers, scores, strict=True):
                answers.add(keys[open_[number]], list(score))
            done(len(numbers))
        return [Score(*answers[key]) for key in keys]

    def _open(self, keys: Sequence[str]) -> list[int]:
        """The numbers of the requests without an answer; of equal ones, the first."""
        first = {key: number for number, key in reversed(list(enumerate(keys)))}
        return [first[key] for key in dict.fromkeys(keys) if key not in self._asking.answers]

    def _counter(self, kind: str, total: int, open_: int) -> Callable[[int], None]:
        """A function that is told of new answers, and tells of all that are there."""
        done = total - open_

        def add(count: int) -> None:
            nonlocal done
            done += count
            self._asking.progress(kind, done, total)

        add(0)
        return add

    # --- answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        prompts = []
        repeats: dict[str, int] = {}
        for request in requests:
            context, given = request.args
            asked = key_of(context, given)
            repeats[asked] = repeats.get(asked, -1) + 1  # the same question again: another answer, if it is random
            wishes = Wishes.of(given, self._asking.seed + repeats[asked], request.task_name or "")
            prompts.append((self._prompt(context, wishes), wishes))
        answers, team = self._asking.answers, self._asking.team
        keys = [key_of("answer", tokens, vars(wishes.sampling), wishes.stops) for tokens, wishes in prompts]
        open_ = sorted(self._open(keys), key=lambda number: -len(prompts[number][0]))
        done = self._counter("generate_until", len(prompts), len(open_))
        for number, tokens in team.generate([prompts[n] for n in open_]):
            answers.add(keys[open_[number]], tokens)
            done(1)
        return [self._text(answers[key], wishes) for key, (_, wishes) in zip(keys, prompts)]

    def _prompt(self, context: str, wishes: Wishes) -> list[int]:
        room = self.max_length - wishes.sampling.max_new_tokens
        if room < 1:
            raise UserError(
                f"answers of {wishes.sampling.max_new_tokens} tokens leave no room for a question: the model takes "
                f"{self.max_length} tokens"
            )
        return self.tok_encode(context)[-room:]

    def _text(self, tokens: Sequence[int], wishes: Wishes) -> str:
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return cut(without_thought(text, self._asking.chat), wishes.stops)
