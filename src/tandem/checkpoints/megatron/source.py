"""Megatron-LM's and MindSpeed-LLM's `torch` checkpoints as a source of global tensors.

    latest_checkpointed_iteration.txt                  a number, or "release"
    iter_0000001/ or release/
        mp_rank_00[_000[_000]]/model_optim_rng.pt      tensor rank, pipeline rank, expert rank; the last two where
                                                       there are several
        hf/                                            config.json and tokenizer files; written by this toolkit only

A file holds `args`, `checkpoint_version` 3.0, `iteration`, and `model`, or `model0`, `model1`... with virtual stages.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from tandem.checkpoints.folders import TRACKER, find_iteration, iteration_of, rank_folder
from tandem.checkpoints.formats.arrays import same_bits
from tandem.checkpoints.formats.rows import Rows, StoredSlice, blocks, joined
from tandem.checkpoints.formats.torch_reader import LazyTensor, load
from tandem.checkpoints.hf.companions import companions_in
from tandem.checkpoints.interface import (
    MEGATRON,
    TensorKind,
    TensorSource,
    check_recorded,
    check_shape,
    dtype_name,
)
from tandem.checkpoints.megatron.args import described_model, number_of_experts, numbers
from tandem.checkpoints.megatron.experts import Stack, stacked
from tandem.checkpoints.megatron.grouped_adapters import have_own_factors, notice_of, target_modules, widened
from tandem.checkpoints.megatron.names import (
    ADAPTER,
    BASE_LAYER,
    CHECKPOINT_VERSION,
    DISTRIBUTED_OPTIMIZER,
    EXTRA_STATE,
    FILE,
    FUSED_NORMS,
    LAYER,
    LORA_A,
    RANK_FOLDER,
    VOCABULARY,
    Chunk,
    model_key,
    renamed,
    shards_of,
)
from tandem.checkpoints.name_lists import check_names
from tandem.errors import UserError
from tandem.models.config import ModelConfig
from tandem.models.lora import Lora
from tandem.models.tensors import EMBEDDING
from tandem.options import in_place
from tandem.parallel.layout import Layout, Shard, rank_files
from tandem.parallel.slices import Part, overlaps


class MegatronSource(TensorSource):
    """Read the weights of one iteration, whatever layout wrote it. Sizes come from folder names, `args` and tensors.

    A trainer's optimizer and its random state are not read.

    Args:
        iteration: its number; None for the one that the tracker file names.
        config: the model, when the checkpoint does not describe it, or not completely: a trainer does not record the
            vocabulary before padding. Needed when there are neither `args` nor `hf/config.json`.
        noop_layers, num_layer_list: as in `Layout`, when `args` do not record them.
        lora_alpha: of adapters, when `args` do not record it.

    Raises:
        UserError: no such checkpoint, a rank folder is missing, a file is damaged, a tensor is missing, left over or of
            a wrong shape, or `args` contradict the config.
    """

    format = MEGATRON
    folder: Path
    layout: Layout

    def __init__(
        self,
        folder: str | Path,
        iteration: int | None = None,
        *,
        config: ModelConfig | None = None,
        noop_layers: tuple[int, ...] | None = None,
        num_layer_list: tuple[int, ...] | None = None,
        lora_alpha: float | None = None,
    ) -> None:
        self.folder = find_iteration(folder, iteration)
        self.iteration = iteration_of(self.folder)
        self.location = str(self.folder)
        self._ranks = _open_ranks(self.folder)
        first = self._ranks[0, 0, 0]
        recorded = numbers(first.args.get("noop_layers"))
        if recorded:
            check_recorded("noop_layers", noop_layers, recorded, self.location)
        noop = noop_layers or recorded
        self.companions = companions_in(self.folder)
        self.config = described_model(first.args, str(first.path), config, self.companions, noop)
        self.layout = self._layout(noop, num_layer_list or numbers(first.args.get("num_layer_list")))
        self.layout.check(self.config, in_place(str(first.path)))
        self._stack_experts()
        factors = self._first_factors()
        own_factors = have_own_factors(factors, self.layout.expert_tensor_size)
        self.config = replace(self.config, lora=self._lora(factors, lora_alpha, own_factors=own_factors))
        if own_factors:
            self.notices = (notice_of(self.location, self.layout.expert_tensor_size),)
        stored = replace(self.config, vocab_size=self._stored_rows())
        self._shards = shards_of(stored, self.layout, own_factors=own_factors)
        names = {name for rank in self._ranks.values() for chunk in rank.chunks for name in chunk}
        self.holds_adapters_only = all(ADAPTER in name for name in names)
        if self.holds_adapters_only:
            self._shards = {name: shards for name, shards in self._shards.items() if shards[0].spec.adapter is not None}
        self._check()

    def kinds(self) -> tuple[TensorKind, ...]:
        return ("model",)

    def kinds_of(self, name: str) -> tuple[TensorKind, ...]:
        return self.kinds() if name in self._shards else ()

    def dtype(self, name: str, kind: TensorKind = "model") -> np.dtype:
        return self._tensor(self._shards[name][0]).dtype

    def read(self, name: str, kind: TensorKind = "model") -> np.ndarray:
        stored = Part.whole(self._shards[name][0].spec.shape)
        tensor = self.read_part(name, stored, kind)
        return tensor[: self.config.vocab_size] if name in VOCABULARY else tensor

    def read_part(self, name: str, part: Part, kind: TensorKind = "model") -> np.ndarray:
        return joined(self.stream(name, part, kind), part.shape, self.dtype(name))

    def stream(self, name: str, part: Part, kind: TensorKind = "model") -> Iterator[np.ndarray]:
        """Only the ranks' slices that overlap `part` are read: whole, to check their CRC, and with their copies.

        Of experts that are tensors of their own, only those that overlap it.
        """
        assert kind == "model", f"no {kind} is read from a Megatron checkpoint"
        needed: dict[Part, list[Shard]] = {}
        for shard in self._shards[name]:
            if overlaps(shard.part, part):
                needed.setdefault(shard.part, []).append(shard)
        slices = [StoredSlice(slice_, self._equal_rows(copies)) for slice_, copies in needed.items()]
        yield from blocks(part, self.dtype(name), slices)

    def trainer_state(self) -> tuple[str, ...]:
        return self._ranks[0, 0, 0].trainer_state

    def unread_optimizer(self) -> tuple[str, ...]:
        in_model_file = (FILE,) if "optimizer" in self.trainer_state() else ()
        sharded = any(self.folder.glob(f"mp_rank_*/{DISTRIBUTED_OPTIMIZER}"))
        return (*in_model_file, DISTRIBUTED_OPTIMIZER) if sharded else in_model_file

    def _equal_rows(self, copies: Sequence[Shard]) -> Rows:
        """The rows of a slice that several ranks may hold, such as norms."""
        rows = [self._tensor(shard).rows(shard.local_name) for shard in copies]
        places = [(self._file(shard), shard.local_name) for shard in copies]
        return rows[0] if len(rows) == 1 else _EqualRows(rows, places)

    def _tensor(self, shard: Shard) -> LazyTensor | Stack:
        return self._rank_of(shard).chunks[shard.chunk][shard.local_name]

    def _rank_of(self, shard: Shard) -> _Rank:
        return self._ranks[shard.tensor_rank, shard.pipeline_rank, shard.expert_rank]

    def _stack_experts(self) -> None:
        if self.config.experts is None:
            return
        held = self.config.experts.num_experts // self.layout.expert_size
        for rank in self._ranks.values():
            for chunk in rank.chunks:
                tensors = stacked(chunk, self.config.hidden_size, held, str(rank.path))
                chunk.clear()
                chunk.update(tensors)

    def _file(self, shard: Shard) -> Path:
        return self._rank_of(shard).path

    def _first_factors(self) -> Chunk:
        """The first factor, A, of every adapter, by its name on any rank."""
        chunks = [chunk for rank in self._ranks.values() for chunk in rank.chunks]
        return {name: tensor for chunk in chunks for name, tensor in chunk.items() if name.endswith(LORA_A)}

    def _lora(self, factors: Chunk, alpha: float | None, *, own_factors: bool) -> Lora | None:
        """The adapters that MindSpeed-LLM trains: one for a whole weight. Their rank is that of the tensors."""
        if not factors:
            return None
        first = self._ranks[0, 0, 0]
        recorded = first.args.get("lora_alpha")
        if alpha is not None and recorded is not None and alpha != recorded:
            raise UserError(
                f"--lora-alpha {alpha:g} contradicts {first.path}, whose adapters have lora_alpha {recorded:g}: leave "
                f"it out"
            )
        if (alpha := recorded if alpha is None else alpha) is None:
            raise UserError(
                f"{first.path} holds adapters, and does not record their lora_alpha: give --lora-alpha, which "
                f"tandem convert takes for every checkpoint"
            )
        ranks = {t.shape[0] // (t.experts if isinstance(t, Stack) else 1) for t in factors.values()}
        if len(ranks) > 1:
            raise UserError(f"{first.path}: adapters of ranks {', '.join(map(str, sorted(ranks)))}; expected one rank")
        paths = [name.removesuffix(LORA_A) for name in factors]
        modules = target_modules(paths, has_dense_layers=bool(self.config.dense_layers))
        lora = Lora(r=ranks.pop(), lora_alpha=float(alpha), target_modules=modules)
        return widened(lora, self.layout.expert_tensor_size) if own_factors else lora

    def _layout(self, noop_layers: tuple[int, ...], num_layer_list: tuple[int, ...]) -> Layout:
        stages = 1 + max(pipeline_rank for _, pipeline_rank, _ in self._ranks)
        args, chunks = self._ranks[0, 0, 0].args, len(self._ranks[0, 0, 0].chunks)
        # in the model's order: the first chunk of every stage, then the second
        counts = tuple(
            _count_layers(self._ranks[0, stage, 0].chunks[chunk]) for chunk in range(chunks) for stage in range(stages)
        )
        total = self.config.num_layers + len(noop_layers)
        if sum(counts) != self.config.num_layers and not noop_layers:
            by_stage = [sum(counts[stage::stages]) for stage in range(stages)]
            raise UserError(
                f"{self.location} holds {sum(counts)} decoder layers (by stage: {by_stage}); the config implies "
                f"{self.config.num_layers}. Layers are missing or left over; give slots without "
                f"a layer with `tandem convert --source-noop-layers`"
            )
        uneven = not noop_layers and len(set(counts)) > 1
        if uneven and not num_layer_list and chunks == 1:
            num_layer_list = counts
        return Layout(
            tensor_model_parallel_size=1 + max(tensor_rank for tensor_rank, _, _ in self._ranks),
            pipeline_model_parallel_size=stages,
            num_layers_per_virtual_pipeline_stage=total // (stages * chunks) if chunks > 1 and not uneven else None,
            num_layer_list=num_layer_list or None,
            noop_layers=noop_layers,
            layers_of_chunks=counts if uneven and chunks > 1 else None,
            **expert_layout(args),
        )

    def _stored_rows(self) -> int:
        """Rows of the embedding over all ranks, with padding."""
        by_tensor_rank = {tensor: rank for (tensor, stage, _), rank in sorted(self._ranks.items()) if stage == 0}
        first_stage = [rank.chunks[0] for rank in by_tensor_rank.values()]
        rows = sum(chunk[EMBEDDING].shape[0] for chunk in first_stage if EMBEDDING in chunk)
        if 0 < rows < self.config.vocab_size:
            raise UserError(
                f"{self.location}: {EMBEDDING} has {rows} rows; the config implies {self.config.vocab_size}"
            )
        return rows or self.config.vocab_size

    def _check(self) -> None:
        expected = list(chain.from_iterable(self._shards.values()))
        names = {
            rank.name_of(chunk, name)
            for rank in self._ranks.values()
            for chunk, tensors in enumerate(rank.chunks)
            for name in tensors
        }
        ranks = {shard: self._rank_of(shard) for shard in expected}
        check_names(self.location, names, {rank.name_of(s.chunk, s.local_name) for s, rank in ranks.items()})
        for shard in expected:
            tensor = self._tensor(shard)
            check_shape(str(self._file(shard)), shard.local_name, tensor.shape, shard.shape)
            if dtype_name(tensor.dtype) != dtype_name(self.dtype(shard.spec.name)):
                raise UserError(
                    f"{self._file(shard)}: {shard.local_name} is {tensor.dtype}; other ranks have another dtype"
                )


@dataclass(frozen=True)
class _Rank:
    """The content of one rank's file."""

    path: Path
    args: dict[str, Any]
    chunks: list[Chunk]
    trainer_state: tuple[str, ...]

    def name_of(self, chunk: int, name: str) -> str:
        return f"{self.path.parent.name}/{model_key(chunk, len(self.chunks))}/{name}"


class _EqualRows:
    """Rows that several files hold. They must be equal.

    Args:
        places: the file of each copy, and its name there.
    """

    def __init__(self, copies: Sequence[Rows], places: Sequence[tuple[Path, str]]) -> None:
        self._copies, self._places = copies, places

    def read(self, first: int, last: int) -> np.ndarray:
        rows = self._copies[0].read(first, last)
        for copy, (path, name) in zip(self._copies[1:], self._places[1:]):
            if not same_bits(rows, copy.read(first, last)):
                self.close()  # damage is the better answer
                first_path, first_name = self._places[0]
                raise UserError(
                    f"{path}: {name} differs from {first_name} in {first_path}; "
                    f"they are copies of one tensor and must be equal"
                )
        return rows

    def close(self) -> None:
        for copy in self._copies:
            copy.close()


def _count_layers(chunk: Chunk) -> int:
    """Distinct decoder layers in a chunk."""
    return len({match[1] for name in chunk if (match := LAYER.match(name))})


def expert_layout(args: Mapping[str, Any]) -> dict[str, Any]:
    """How `args` say that experts are shared; nothing where there are none."""
    if not number_of_experts(args):
        return {}
    shared, extends = args.get("expert_model_parallel_size") or 1, bool(args.get("moe_tp_extend_ep"))
    cut = None if extends else args.get("expert_tensor_parallel_size")
    if cut == args.get("tensor_model_parallel_size"):
        cut = None  # the default
    return {
        "expert_model_parallel_size": shared,
        "expert_tensor_parallel_size": cut,
        "moe_tp_extend_ep": extends,
    }


def _open_ranks(folder: Path) -> dict[tuple[int, int, int], _Rank]:
    """(tensor rank, pipeline rank, expert rank) -> its file, for a whole grid of ranks."""
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist: {TRACKER} or the iteration asked for names it")
    any_path = next(iter(sorted(folder.glob(f"mp_rank_*/{FILE}"))), None)
    args = _open_rank(any_path).args if any_path is not None else {}
    paths = _rank_paths(folder, shares_experts=(args.get("expert_model_parallel_size") or 1) > 1)
    ranks = {rank: _open_rank(path) for rank, path in sorted(paths.items())}
    first = next(iter(ranks.values()))
    sizes = [
        max(first.args.get(field) or 1, 1 + max(rank[axis] for rank in ranks))
        for axis, field in enumerate(("tensor_model_parallel_size", "pipeline_model_parallel_size"))
    ]
    layout = Layout(
        tensor_model_parallel_size=sizes[0], pipeline_model_parallel_size=sizes[1], **expert_layout(first.args)
    )
    grid = {(file.tensor, stage, file.expert) for file in rank_files(layout) for stage in range(sizes[1])}
    if missing := sorted(grid - set(ranks)):
        shared = layout.expert_model_parallel_size
        experts = f" x {shared} expert ranks" if shared > 1 else ""
        raise UserError(
            f"{folder}: rank folders are missing: {', '.join(rank_folder(layout, *rank) for rank in missing)}; "
            f"expected {sizes[0]} tensor ranks x {sizes[1]} pipeline ranks{experts}"
        )
    if surplus := sorted(set(ranks) - grid):
        raise UserError(f"{ranks[surplus[0]].path.parent}: args name no such rank: remove it, or the others")
    for rank in ranks.values():
        if len(rank.chunks) != len(first.chunks):
            raise UserError(f"{rank.path} has {len(rank.chunks)} model chunks; {first.path} has {len(first.chunks)}")
    return ranks


def _rank_paths(folder: Path, *, shares_experts: bool) -> dict[tuple[int, int, int], Path]:
    """The files by their ranks. With `shares_experts`, the last of two or three numbers is that of an expert rank."""
    paths: dict[tuple[int, int, int], Path] = {}
    for path in sorted(folder.glob("mp_rank_*")):
        match = RANK_FOLDER.fullmatch(path.name)
        if match is None or (int(match[3] or 0) and not shares_experts):
            raise UserError(
                f"{path}: not a rank of a model without expert ranks: expected mp_rank_<tensor>[_<pipeline>[_000]]"
            )
        tensor, second, third = (int(number or 0) for number in match.groups())
        rank = (tensor, 0, second) if shares_experts and match[3] is None else (tensor, second, third)
        if rank in paths:
            raise UserError(f"{path} and {paths[rank]} are the same rank: remove the wrong one")
        paths[rank] = path / FILE
    if not paths:
        raise UserError(f"{folder} holds no mp_rank_* folders: not a Megatron torch checkpoint")
    return paths


def _open_rank(path: Path) -> _Rank:
    content = load(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}; expected the dict that Megatron saves")
    if content.get("checkpoint_version") != CHECKPOINT_VERSION:
        raise UserError(
            f"{path}: checkpoint_version is {content.get('checkpoint_version')}; only {CHECKPOINT_VERSION} is read"
        )
    keys = sorted((key for key in content if re.fullmatch(r"model\d*", str(key))), key=lambda key: int(key[5:] or 0))
    if keys != [model_key(chunk, len(keys)) for chunk in range(len(keys))] or not keys:
        raise UserError(f"{path}: expected model, or model0, model1 and so on; found {', '.join(keys) or 'neither'}")
    args = content.get("args", argparse.Namespace())
    if not isinstance(args, argparse.Namespace):
        raise UserError(f"{path}: args is a {type(args).__name__}; expected an argparse.Namespace")
    rest = set(content) - {"args", "checkpoint_version", "iteration", *keys}
    return _Rank(path, vars(args), [_chunk(path, content[key]) for key in keys], tuple(sorted(rest)))


def _chunk(path: Path, tensors: dict[str, Any]) -> Chunk:
    chunk: Chunk = {}
    for name, tensor in tensors.items():
        if name.endswith(EXTRA_STATE):
            continue
        if not isinstance(tensor, LazyTensor):
            raise UserError(f"{path}: {name} is a {type(tensor).__name__}; expected a tensor")
        chunk[renamed(name, FUSED_NORMS).replace(BASE_LAYER, ".weight")] = tensor
    return chunk
