"""Writing Megatron's `torch` checkpoints: one pickled file a rank, one tensor at a time."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np

from tandem.checkpoints.folders import COMPANIONS, TRACKER, iteration_folder, rank_folder
from tandem.checkpoints.formats.arrays import transposed
from tandem.checkpoints.formats.torch_writer import PendingTensor, TorchFileWriter
from tandem.checkpoints.hf.companions import original_dtype, write_companions
from tandem.checkpoints.interface import DTYPES, Companions, RowsWritten, TensorKind
from tandem.checkpoints.megatron.args import to_args
from tandem.checkpoints.megatron.experts import Form, names_of, shapes_of
from tandem.checkpoints.megatron.names import CHECKPOINT_VERSION, FILE, FUSED_NORMS, model_key, renamed, shards_of
from tandem.errors import UserError
from tandem.files.large_file import chunk_for
from tandem.files.publish import Publication, check_free_space, write_text_atomically
from tandem.models.config import ModelConfig
from tandem.models.tensors import tensor_table
from tandem.parallel.layout import Layout, Shard, rank_files
from tandem.parallel.slices import cut_rows


def pad_vocab_size(vocab_size: int, make_vocab_size_divisible_by: int, tensor_model_parallel_size: int) -> int:
    """Megatron's padded vocabulary: the next multiple of the product of both numbers.

    >>> pad_vocab_size(151669, 128, 4)
    152064
    """
    multiple = make_vocab_size_divisible_by * tensor_model_parallel_size
    return -(-vocab_size // multiple) * multiple


class MegatronSink:
    """Write one iteration, as Megatron-LM and MindSpeed-LLM load it.

    Args:
        padded_vocab_size: rows of embedding and output head, filled up with zeros; None for the vocabulary itself,
            which tensor_model_parallel_size must then divide. `pad_vocab_size` computes Megatron's value.
        transformer_engine: name the norms as Transformer Engine's fused layers do.
        moe_grouped_gemm: experts are as for grouped products: one tensor for all, or Transformer Engine's.

    Raises:
        UserError: the model cannot be laid out like this, or the disk is too small.
    """

    def __init__(
        self,
        folder: str | Path,
        config: ModelConfig,
        layout: Layout,
        dtype: str,
        iteration: int = 1,
        companions: Companions | None = None,
        padded_vocab_size: int | None = None,
        transformer_engine: bool = False,
        moe_grouped_gemm: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.location = str(folder)
        self.iteration = iteration
        self._config, self._layout, self._dtype = config, layout, dtype
        self._companions = companions or Companions()
        self._fused = {norm: name for name, norm in FUSED_NORMS.items()} if transformer_engine else {}
        self._form: Form = "sequential"
        if moe_grouped_gemm:
            self._form = "transformer_engine" if transformer_engine else "grouped"
        self._held = config.experts.num_experts // layout.expert_size if config.experts else 0
        self._padded = replace(config, vocab_size=padded_vocab_size or config.vocab_size)
        self._check_vocabulary()
        self._shards = shards_of(self._padded, layout)
        self._unwritten, self._rows = set(self._shards), RowsWritten()
        self._check_space()
        self._publication = Publication(iteration_folder(self.folder, iteration), replace=True)
        self._pending: dict[Shard, list[PendingTensor]] = {}
        self._experts: dict[Shard, list[np.ndarray]] = {}  # rows of an expert that is not complete
        self._writers = {rank: self._open_writer(*rank) for rank in self._ranks()}

    def write(self, name: str, rows: np.ndarray, kind: TensorKind = "model") -> None:
        assert kind == "model", f"a Megatron checkpoint written here holds no {kind}"
        shape = tensor_table(self._config)[name].shape
        written = self._rows.add(name, rows, shape)
        self._write(name, written.start, rows)
        if written.stop == shape[0]:
            self._unwritten.discard(name)
            if padding := self._shards[name][0].spec.shape[0] - shape[0]:
                self._write(name, shape[0], np.zeros((padding, *shape[1:]), rows.dtype))

    def _write(self, name: str, first: int, rows: np.ndarray) -> None:
        for shard in self._shards[name]:
            rows_here = cut_rows(rows, first, shard.part)
            if not rows_here.size:
                continue
            if shard.spec.split.experts:
                self._write_experts(shard, rows_here)
            else:
                self._writer_of(shard).write(self._pending[shard][0], rows_here)

    def _write_experts(self, shard: Shard, rows: np.ndarray) -> None:
        """Write each expert when its rows have all come."""
        size = shard.shape[0] // self._held
        waiting = [*self._experts.pop(shard, []), rows]
        while sum(map(len, waiting)) >= size:
            together = waiting[0] if len(waiting) == 1 else np.concatenate(waiting)
            waiting = [together[size:]] if len(together) > size else []
            if self._form == "grouped":
                self._writer_of(shard).write_numbers(self._pending[shard][0], transposed(together[:size]))
            else:
                self._writer_of(shard).write(self._pending[shard].pop(0), together[:size])
        if waiting:
            self._experts[shard] = waiting

    def _writer_of(self, shard: Shard) -> TorchFileWriter:
        return self._writers[shard.tensor_rank, shard.pipeline_rank, shard.expert_rank]

    def close(self) -> None:
        if self._unwritten:
            raise UserError(
                f"{self.folder}: not every tensor was written. Missing: {', '.join(sorted(self._unwritten))}"
            )
        for writer in self._writers.values():
            writer.close()
        dtype = original_dtype(self._companions, self._dtype)
        write_companions(self._publication.work / COMPANIONS, self._companions, self._config, dtype)
        self._publication.commit()
        write_text_atomically(self.folder / TRACKER, str(self.iteration))

    def abort(self) -> None:
        for writer in self._writers.values():
            writer.abort()
        self._publication.abort()

    def _ranks(self) -> list[tuple[int, int, int]]:
        return [
            (file.tensor, pipeline_rank, file.expert)
            for pipeline_rank in range(self._layout.pipeline_model_parallel_size)
            for file in rank_files(self._layout)
        ]

    def _check_vocabulary(self) -> None:
        rows, world = self._padded.vocab_size, self._layout.tensor_model_parallel_size
        if rows < self._config.vocab_size:
            raise UserError(
                f"--padded-vocab-size {rows}: expected at least the {self._config.vocab_size} tokens of the model"
            )
        if rows % world:
            raise UserError(
                f"a vocabulary of {rows} does not divide over {world} tensor ranks: Megatron cannot load it. Pad it "
                f"with --make-vocab-size-divisible-by 1, or --padded-vocab-size {rows + -rows % world}"
            )

    def _check_space(self) -> None:
        numel = sum(int(np.prod(shard.shape)) for shard in chain.from_iterable(self._shards.values()))
        check_free_space(self.folder, numel * DTYPES[self._dtype].itemsize)

    def _open_writer(self, tensor_rank: int, pipeline_rank: int, expert_rank: int) -> TorchFileWriter:
        chunks = len(self._layout.stages(self._config.num_layers)[pipeline_rank])
        models: list[OrderedDict[str, PendingTensor]] = [OrderedDict() for _ in range(chunks)]
        for shard in chain.from_iterable(self._shards.values()):
            if (shard.tensor_rank, shard.pipeline_rank, shard.expert_rank) == (tensor_rank, pipeline_rank, expert_rank):
                names, shapes = self._names_and_shapes(shard)
                self._pending[shard] = [PendingTensor(DTYPES[self._dtype], shape) for shape in shapes]
                models[shard.chunk].update(zip(names, self._pending[shard]))
        content = {
            "args": to_args(
                self._config, self._layout, self._dtype, self._padded.vocab_size, grouped=self._form != "sequential"
            ),
            "checkpoint_version": CHECKPOINT_VERSION,
            "iteration": self.iteration,
            **{model_key(chunk, chunks): model for chunk, model in enumerate(models)},
        }
        folder = self._publication.work / rank_folder(self._layout, tensor_rank, pipeline_rank, expert_rank)
        return TorchFileWriter(folder / FILE, content, chunk_for(len(self._ranks())))

    def _names_and_shapes(self, shard: Shard) -> tuple[list[str], list[tuple[int, ...]]]:
        """What a shard is in its file. Transformer Engine folds the norm before an MLP into it, not that of experts."""
        name, layer = shard.local_name, shard.spec.layer
        if shard.spec.split.experts:
            return names_of(name, self._form, self._held), shapes_of(name, self._form, self._held, shard.shape)
        has_experts = layer is not None and self._config.experts_in(layer) is not None
        fused = {norm: new for norm, new in self._fused.items() if not (has_experts and new.startswith("mlp."))}
        return [renamed(name, fused)], [shard.shape]
