"""What users of a converted model will miss: tokenizer, end token, chat template, and files that are left out."""

from __future__ import annotations

from tandem.checkpoints.hf.companions import companion_json, end_ids_of
from tandem.checkpoints.interface import TEMPLATE_FOLDER, Companions
from tandem.data.tokens.tokenizer import CHAT_TEMPLATE_FILE, DEFAULT, Tokenizer, templates_in
from tandem.errors import UserError
from tandem.models.config import ModelConfig

PROCESSORS_TEMPLATE = "chat_template.json"  # that of models which also see or hear
OLDER_TOKENIZERS = {"vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"}


def what_lacks(companions: Companions, config: ModelConfig) -> list[str]:
    """Notices for the user; empty when the model has everything.

    Args:
        companions: those that are written.
        config: the model that is written.
    """
    notices = [f"not copied, as not a model's files: {', '.join(companions.left_out)}"] if companions.left_out else []
    templates = _templates(companions)
    if DEFAULT not in templates and PROCESSORS_TEMPLATE in companions.places:
        notices.append(
            f"{PROCESSORS_TEMPLATE}: processors of transformers read it, and tokenizers do not. To use its "
            f"template, put the text of it into {CHAT_TEMPLATE_FILE}"
        )
    missing = _missing(companions, templates)
    if missing:
        notices.append(
            f"the model has no {' and no '.join(missing)}: --hf-cfg-dir FOLDER takes them from another model"
        )
    folder = companions.tokenizer_folder
    if folder is None:
        return notices
    try:
        Tokenizer(folder).check_fits(config.vocab_size, "the model")
    except UserError as error:
        notices.append(str(error))
    return notices


def _templates(companions: Companions) -> set[str]:
    """The names of the chat templates that a tokenizer finds. It does not look into `chat_template.json`."""
    own = {DEFAULT} if companions.text_of(CHAT_TEMPLATE_FILE) is not None else set()
    files = own | {path.stem for path in companions.files if path.parent.name == TEMPLATE_FOLDER}
    return files or set(templates_in(companion_json(companions, "tokenizer_config.json")))


def _missing(companions: Companions, templates: set[str]) -> list[str]:
    """In words, what the companions do not have."""
    names = {path.name for path in companions.files} | set(companions.texts)
    tokenizer = companion_json(companions, "tokenizer_config.json")
    ends = end_ids_of(companions) or tokenizer.get("eos_token")
    older = sorted(names & OLDER_TOKENIZERS)
    in_words = {
        f"tokenizer.json (only {', '.join(older)})" if older else "tokenizer": "tokenizer.json" in names,
        "end token (eos_token_id)": bool(ends),
        f"chat template (only {', '.join(sorted(templates))})" if templates else "chat template": DEFAULT in templates,
    }
    return [words for words, is_there in in_words.items() if not is_there]
