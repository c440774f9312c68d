"""The initial weights of a run, and whether the model that they are of is the one that its flags describe."""

from __future__ import annotations

import dataclasses

from tandem.checkpoints.hf.companions import companions_of
from tandem.checkpoints.interface import TensorSource
from tandem.checkpoints.random_init import RandomSource
from tandem.config.settings import CheckpointSettings, ModelSettings
from tandem.errors import UserError
from tandem.models.config import ModelConfig
from tandem.models.hf_config import from_hf
from tandem.training.start.resume import open_initial

# Model flags that must equal what the weights' config.json says.
COMPARED = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "norm_epsilon",
    "rotary_base",
)


def open_weights(
    checkpoint: CheckpointSettings, model: ModelSettings, tokenizer_folder: str | None, seed: int
) -> TensorSource:
    """What `--load` names; without it random weights from `seed`, whose config.json lies in `--hf-cfg-dir`, or in the
    tokenizer's folder."""
    if checkpoint.load is not None:
        return open_initial(checkpoint.load, checkpoint.ckpt_step)
    folder = model.hf_cfg_dir or tokenizer_folder
    if folder is None:
        raise UserError("--init random needs the model's config.json: give its folder with --hf-cfg-dir")
    companions = companions_of(folder)
    config = from_hf(companions.hf_config or {}, where=f"{folder}/config.json")
    if model.init_method_std is not None:
        config = dataclasses.replace(config, init_method_std=model.init_method_std)
    return RandomSource(config, seed, companions=companions)


def check_model_flags(model: ModelSettings, seq_length: int, config: ModelConfig) -> None:
    """Raise UserError, with both values, when a model flag, or the length of samples, contradicts the weights'
    config."""
    for name in COMPARED:
        given, actual = getattr(model, name), getattr(config, name)
        if given is not None and given != actual:
            raise UserError(f"--{name.replace('_', '-')} {given} contradicts the weights' config, which has {actual}")
    if model.untie_embeddings_and_output_weights and config.tied:
        raise UserError(
            "--untie-embeddings-and-output-weights contradicts the weights' config: its embeddings are tied"
        )
    if model.padded_vocab_size is not None and model.padded_vocab_size < config.vocab_size:
        raise UserError(f"--padded-vocab-size {model.padded_vocab_size} is below the vocabulary of {config.vocab_size}")
    bound = model.max_position_embeddings or config.max_position_embeddings
    if seq_length > bound:
        given = f"--seq-length {seq_length} is above max_position_embeddings {bound}"
        raise UserError(f"{given}: give --seq-length {bound}, or less")
