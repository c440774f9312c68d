"""A run's datasets, opened: for each kind of data, what makes samples of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from tandem.config.settings import DataSettings, TrainingSettings
from tandem.data.datasets.conversations import SFTDataset
from tandem.data.datasets.dataset import Dataset
from tandem.data.datasets.text import GPTDataset
from tandem.data.kinds import CONVERSATIONS, TEXT, Kind
from tandem.data.tokens.tokenizer import Tokenizer
from tandem.training.start.data_checks import is_packed, template_of


def kind_to_train(data: DataSettings) -> Kind:
    """The kind of data that the settings, in upstream's spelling, say that a run is trained on."""
    return CONVERSATIONS if data.is_instruction_dataset else TEXT


@dataclass(frozen=True)
class Datasets:
    """What opens the datasets of one kind, by the settings of a run.

    Attributes:
        whole_validation: all of a validation set is taken, its last, shorter sample too.
    """

    kind: Kind
    data: DataSettings
    seed: int
    tokenizer: Tokenizer | None
    whole_validation: bool

    @classmethod
    def of(cls, kind: Kind, data: DataSettings, training: TrainingSettings, tokenizer: Tokenizer | None) -> Datasets:
        return cls(kind, data, training.seed, tokenizer, whole_validation=training.eval_iters == "full")

    def split(self, name: str, prefix: str, samples: int | None = None, number: int = 0) -> Dataset:
        """A split of one prefix.

        Args:
            name: "train", "valid" or "test".
            samples: how many are needed; None: those of one epoch.
            number: which of several datasets of the same split this is; each has an order of its own.

        Raises:
            UserError: the split is empty, files do not belong together, or a flag needs a tokenizer.
        """
        return _OPENERS[self.kind](self, prefix, name, samples, self.seed + number)

    def whole(self, prefix: str) -> Dataset:
        """All samples of a prefix once, as a validation set."""
        all_of_it = dataclasses.replace(self, data=dataclasses.replace(self.data, split="0,1,0"))
        return all_of_it.split("valid", prefix)


def _open_text(datasets: Datasets, prefix: str, name: str, samples: int | None, seed: int) -> Dataset:
    data = datasets.data
    return GPTDataset(
        prefix,
        name,
        data.split,
        samples,
        data.seq_length,
        seed,
        eod_token=datasets.tokenizer.eos_id if datasets.tokenizer else None,
        reset_position_ids=data.reset_position_ids,
        reset_attention_mask=data.reset_attention_mask,
        eod_mask_loss=data.eod_mask_loss,
        drop_last_partial_sequence=not (name == "valid" and datasets.whole_validation),
    )


def _open_conversations(datasets: Datasets, prefix: str, name: str, samples: int | None, seed: int) -> Dataset:
    data = datasets.data
    eod, header = _ends(prefix, datasets.tokenizer)
    packed = is_packed(prefix)
    resets = packed is not False  # a conversation that is stored alone is a document of its own
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


def _ends(prefix: str, tokenizer: Tokenizer | None) -> tuple[int | None, list[int]]:
    """The token that ends a message, and the ids with which the header of an answer begins."""
    eod = tokenizer.eos_id if tokenizer else None
    template = template_of(prefix, tokenizer)
    if template is None or tokenizer is None:
        return eod, [] if eod is None else [eod]  # most templates end a message so before they begin an answer
    # Not the tokenizer's own end, which is another token in the folders of models that were only pretrained.
    stop = tokenizer.require_id(template.stop_word)
    return stop, tokenizer.encode(template.answer_header) or [stop]


_OPENERS: dict[Kind, Callable[[Datasets, str, str, int | None, int], Dataset]] = {
    TEXT: _open_text,
    CONVERSATIONS: _open_conversations,
}
