"""Opens the datasets of a run, for each kind of data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from tandem.config.settings import DataSettings, TrainingSettings
from tandem.data.datasets.conversations import SFTDataset
from tandem.data.datasets.dataset import Dataset
from tandem.data.datasets.preferences import AnswersDataset, PairDataset, UnpairedDataset
from tandem.data.datasets.text import GPTDataset
from tandem.data.kinds import CONVERSATIONS, PREFERENCES, TEXT, UNPAIRED, Kind
from tandem.data.tokens.tokenizer import Tokenizer
from tandem.training.start.data_checks import end_of_documents, is_packed, names_end, template_of

# Stages that train on other kinds than conversations.
KIND_OF_STAGE: dict[str | None, Kind] = {"dpo": PREFERENCES, "orpo": PREFERENCES, "simpo": PREFERENCES, "kto": UNPAIRED}


def stages_of_kind(kind: Kind | None) -> tuple[str, ...]:
    """The stages that train on a kind of preferences; none for other data."""
    return tuple(stage for stage, its_kind in KIND_OF_STAGE.items() if stage and its_kind is kind)


def kind_to_train(data: DataSettings) -> Kind:
    """The kind of data that a run trains on."""
    return KIND_OF_STAGE.get(data.stage, CONVERSATIONS if data.is_instruction_dataset else TEXT)


@dataclass(frozen=True)
class Datasets:
    """Opens datasets of one kind, with the settings of a run.

    Attributes:
        whole_validation: whether whole validation sets are used, with their last, shorter sample.
        references: of preferences, by prefix: see `AnswersDataset`.
    """

    kind: Kind
    data: DataSettings
    seed: int
    tokenizer: Tokenizer | None
    whole_validation: bool
    references: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(cls, kind: Kind, data: DataSettings, training: TrainingSettings, tokenizer: Tokenizer | None) -> Datasets:
        return cls(kind, data, training.seed, tokenizer, whole_validation=training.eval_iters == "full")

    def split(self, name: str, prefix: str, samples: int | None = None, number: int = 0) -> Dataset:
        """A split of one prefix.

        Args:
            name: "train", "valid" or "test".
            samples: number of samples that are needed; None for one epoch.
            number: added to the seed, so that several datasets of the same split have different orders.

        Raises:
            UserError: the split is empty, files do not belong together, or a flag needs a tokenizer.
        """
        return _OPENERS[self.kind](self, prefix, name, samples, self.seed + number)

    def whole(self, prefix: str) -> Dataset:
        """All samples of a prefix, as a validation set."""
        unsplit = dataclasses.replace(self, data=dataclasses.replace(self.data, split="0,1,0"))
        return unsplit.split("valid", prefix)


def _open_text(datasets: Datasets, prefix: str, name: str, samples: int | None, seed: int) -> Dataset:
    data = datasets.data
    return GPTDataset(
        prefix,
        name,
        data.split,
        samples,
        data.seq_length,
        seed,
        eod_token=end_of_documents(prefix, datasets.tokenizer),
        reset_position_ids=data.reset_position_ids,
        reset_attention_mask=data.reset_attention_mask,
        eod_mask_loss=data.eod_mask_loss,
        drop_last_partial_sequence=not (name == "valid" and datasets.whole_validation),
    )


def _open_conversations(datasets: Datasets, prefix: str, name: str, samples: int | None, seed: int) -> Dataset:
    data = datasets.data
    eod, header = _ends(prefix, datasets.tokenizer)
    packed = is_packed(prefix)
    resets = packed is not False  # conversations that are not packed need no resets
    return SFTDataset(
        prefix,
        name,
        data.split,
        samples,
        data.seq_length,
        seed,
        eod_token=eod,
        reset_position_ids=data.reset_position_ids and resets,
        reset_attention_mask=data.reset_attention_mask and resets,
        header=header,
        shuffle=not data.no_shuffle,
        pack=data.pack and not packed,
    )


def _open_answers(
    of_kind: type[AnswersDataset], datasets: Datasets, prefix: str, name: str, samples: int | None, seed: int
) -> Dataset:
    _, header = _ends(prefix, datasets.tokenizer)
    data = datasets.data
    return of_kind(
        prefix,
        name,
        data.split,
        samples,
        data.seq_length,
        seed,
        shuffle=not data.no_shuffle,
        header=header,
        references=datasets.references,
    )


def _ends(prefix: str, tokenizer: Tokenizer | None) -> tuple[int | None, list[int]]:
    """The token that ends a document, and the token ids at the start of an answer's header."""
    eod = end_of_documents(prefix, tokenizer)
    template = template_of(prefix, tokenizer)
    if template is None or tokenizer is None:
        return eod, [] if eod is None else [eod]  # most templates have this token before an answer
    # The tokenizer's own end token may be another one, in folders of models that were only pretrained.
    stop = tokenizer.require_id(template.stop_word)
    return (eod if names_end(prefix) else stop), tokenizer.encode(template.answer_header) or [stop]


_OPENERS: dict[Kind, Callable[[Datasets, str, str, int | None, int], Dataset]] = {
    TEXT: _open_text,
    CONVERSATIONS: _open_conversations,
    PREFERENCES: partial(_open_answers, PairDataset),
    UNPAIRED: partial(_open_answers, UnpairedDataset),
}
