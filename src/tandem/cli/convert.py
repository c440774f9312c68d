"""`tandem convert`: convert weights between Hugging Face and Megatron-core layouts."""

from __future__ import annotations

from collections.abc import Sequence

from tandem.cli.arguments import parse
from tandem.cli.progress import byte_progress
from tandem.config.upstream.flags import CONVERT_IGNORED, split_ignored
from tandem.conversion.convert import Converted
from tandem.conversion.options import ConvertOptions
from tandem.conversion.run import run_conversion

DESCRIPTION = (
    "Convert weights from Hugging Face to Megatron-core layout, back, or between layouts, for any TP and PP. "
    "Training can load any layout, so one conversion is enough."
)
FIRST = (
    *("load_dir", "save_dir", "load_model_type", "save_model_type"),
    *("target_tensor_parallel_size", "target_pipeline_parallel_size", "num_layer_list"),
    *("params_dtype", "ckpt_format", "ckpt_step", "verify", "no_verify"),
)


def run(argv: Sequence[str]) -> None:
    rest, notices, problems = split_ignored(argv, CONVERT_IGNORED)
    options = parse(ConvertOptions, "convert", DESCRIPTION, rest, first=FIRST, problems=problems)
    if flags := options.without_effect():
        notices.append(f"accepted, without effect for this target: {' '.join(flags)}")
    for notice in notices:
        print(f"> {notice}")
    with byte_progress("converting") as progress:
        result = run_conversion(options, progress)
    print_result(result)


def print_result(result: Converted) -> None:
    if result.verification:
        print(result.verification)
    for notice in result.notices:
        print(f"> {notice}")
    print(f"{result.tensors} tensors, {result.parameters:,} parameters")
    if result.iteration is None:
        print(f"saved {result.what} to {result.folder}")
    else:
        print(f"  successfully saved checkpoint from iteration {result.iteration:7d} to {result.folder}")
    print("Done!")
    for command in result.serving:
        print(f"serve it: {command}")
