"""Which weights adapters belong to: their folder, and a hash that tells whether they are still the same."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tandem.checkpoints.interface import Format, TensorSource
from tandem.errors import UserError

BLOCK = 1 << 22
# Of a Hugging Face folder, the first of these that it has; of an iteration, all of them.
OF_FOLDER = ("model*.safetensors", "pytorch_model*.bin")
OF_ITERATION = ("mp_rank_*/model*.safetensors", "mp_rank_*/model_optim_rng.pt", "*.distcp")


@dataclass(frozen=True)
class BaseRecord:
    """The weights that adapters were trained on.

    Attributes:
        folder: absolute. For an iteration, the folder that holds its iterations.
        iteration: None for a folder without iterations.
        sha256: of its weights' files (`digest_of`).
    """

    folder: str
    iteration: int | None
    sha256: str

    @classmethod
    def of(cls, base: TensorSource) -> BaseRecord | None:
        """Hash the files of `base`; None for weights that are in no files."""
        if base.folder is None:
            return None
        return cls(*_place_of(base.folder, base), digest_of(base))

    def moved_to(self, base: TensorSource) -> BaseRecord:
        """The same weights in the place of `base`; the record itself where that is in no folder."""
        return self if base.folder is None else BaseRecord(*_place_of(base.folder, base), self.sha256)

    def check(self, base: TensorSource, adapters: str) -> None:
        """Raise UserError unless `base` has the weights of this record. `adapters`: where these are."""
        if base.folder is None or digest_of(base) != self.sha256:
            raise UserError(
                f"{adapters}: its adapters were trained on the weights that were in {self.folder}; the weights in "
                f"{base.location} are others (their sha256 differs). Give those with --load FOLDER --lora-load "
                f"{adapters}"
            )


def _place_of(folder: Path, base: TensorSource) -> tuple[str, int | None]:
    return str((folder if base.iteration is None else folder.parent).resolve()), base.iteration


def digest_of(source: TensorSource) -> str:
    """The sha256 of the sizes and contents of a source's weight files, whatever the folder is called."""
    assert source.folder is not None
    files = weight_files(source.folder, source.format)
    with ThreadPoolExecutor(2) as threads:
        digests = list(threads.map(_sha256, files))
    names = [path.relative_to(source.folder).as_posix() for path in files]
    return hashlib.sha256(repr(list(zip(names, digests))).encode()).hexdigest()


def weight_files(folder: Path, form: Format) -> list[Path]:
    """The files that hold the weights in a folder of a format."""
    if form.has_iterations:
        return sorted(path for pattern in OF_ITERATION for path in folder.glob(pattern))
    return next((paths for pattern in OF_FOLDER if (paths := sorted(folder.glob(pattern)))), [])


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
