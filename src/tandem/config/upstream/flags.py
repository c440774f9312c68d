"""Flags of Megatron-LM and MindSpeed-LLM scripts that have no setting here. They are accepted, checked, and listed
once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Ignored:
    """A flag that is accepted without effect.

    Attributes:
        values: how many words follow the flag; None for all words up to the next flag.
        allowed: the values that are accepted; None for any value.
        refusal: why the flag is not accepted at all.
        excludes: another flag of the table that cannot be given together with this one.
    """

    values: int | None = 0
    allowed: tuple[str, ...] | None = None
    refusal: str | None = None
    excludes: str | None = None


ALWAYS_ON = Ignored()
BF16_STATE = Ignored(refusal="gradients and the optimizer's state are fp32; in bf16 training would compute otherwise")
NO_LU_LORA = Ignored(
    refusal="LU-LoRA, which updates the first layers by a rule of its own, is not supported: leave out the --lu-lora "
    "flags, and all adapters are trained by gradients"
)
NO_QLORA = Ignored(
    refusal="QLoRA, with weights in 4 bits, is not supported: leave it out; the weights below adapters keep their dtype"
)
QLORA = dict.fromkeys(("--qlora", "--qlora-nf4", "--qlora-save-dequantize"), NO_QLORA)
# These ask for what happens anyway, or have no effect on results.
IGNORED: dict[str, Ignored] = {
    "--use-mcore-models": ALWAYS_ON,
    "--spec": Ignored(2, ("mindspeed_llm.tasks.models.spec.qwen3_spec", "layer_spec")),
    "--transformer-impl": Ignored(1, ("local",)),
    "--distributed-backend": Ignored(1, ("nccl", "hccl", "gloo")),
    "--group-query-attention": ALWAYS_ON,
    "--qk-layernorm": ALWAYS_ON,
    "--swiglu": ALWAYS_ON,
    "--normalization": Ignored(1, ("RMSNorm",)),
    "--position-embedding-type": Ignored(1, ("rope",)),
    "--use-rotary-position-embeddings": ALWAYS_ON,
    "--disable-bias-linear": ALWAYS_ON,
    "--use-flash-attn": ALWAYS_ON,
    "--use-fused-rotary-pos-emb": ALWAYS_ON,
    "--use-fused-swiglu": ALWAYS_ON,
    "--use-fused-rmsnorm": ALWAYS_ON,
    "--no-masked-softmax-fusion": ALWAYS_ON,
    "--attention-softmax-in-fp32": ALWAYS_ON,
    "--no-gradient-accumulation-fusion": ALWAYS_ON,
    "--profile-ranks": Ignored(None),  # the first rank is profiled
    "--profile-with-cpu": ALWAYS_ON,
    "--log-validation-ppl-to-tensorboard": ALWAYS_ON,
    "--log-memory-to-tensorboard": ALWAYS_ON,
    "--log-world-size-to-tensorboard": ALWAYS_ON,
    "--tensorboard-queue-size": Ignored(1),
    "--tokenizer-not-use-fast": ALWAYS_ON,
    "--enable-hf2mg-convert": ALWAYS_ON,
    "--model-type-hf": Ignored(1, ("qwen3", "qwen3-moe")),
    "--context-parallel-algo": Ignored(1, ("megatron_cp_algo", "ulysses_cp_algo")),
    "--attention-mask-type": Ignored(1, ("causal", "general")),  # two layouts of the same mask
    "--use-ascend-coc": Ignored(excludes="--use-ascend-mc2"),
    "--coc-fused-kernel": ALWAYS_ON,
    "--use-ascend-mc2": ALWAYS_ON,
    "--reuse-fp32-param": ALWAYS_ON,
    "--exit-signal-handler": ALWAYS_ON,
    "--override-opt-param-scheduler": ALWAYS_ON,  # a schedule is always that of the command's settings
    "--log-params-norm": ALWAYS_ON,
    "--log-num-zeros-in-grad": ALWAYS_ON,
    "--no-save-rng": ALWAYS_ON,  # the random state is a function of the seed and the position
    "--manual-gc": ALWAYS_ON,
    "--manual-gc-interval": Ignored(1),
    "--swap-optimizer": ALWAYS_ON,
    "--swap-attention": ALWAYS_ON,
    "--use-cp-send-recv-overlap": ALWAYS_ON,
    "--use-fused-ring-attention-update": ALWAYS_ON,
    "--kv-head-repeat-before-uly-alltoall": ALWAYS_ON,
    "--gemm-gradient-accumulation-fusion": ALWAYS_ON,
    "--disable-gloo-group": ALWAYS_ON,
    "--recompute-activation-function": ALWAYS_ON,
    "--recompute-activation-function-num-layers": Ignored(1),
    "--recompute-norm": ALWAYS_ON,
    "--recompute-norm-num-layers": Ignored(1),
    "--enable-recompute-layers-per-pp-rank": ALWAYS_ON,
    "--moe-permutation-async-comm": ALWAYS_ON,
    "--moe-permute-fusion": ALWAYS_ON,
    "--use-fused-moe-token-permute-and-unpermute": ALWAYS_ON,
    "--moe-alltoall-overlap-comm": ALWAYS_ON,
    "--moe-fb-overlap": ALWAYS_ON,
    "--moe-zero-memory": Ignored(1),
    "--moe-token-dispatcher-type": Ignored(1, ("allgather", "alltoall", "alltoall_seq", "flex")),  # how rows travel
    "--moe-allgather-overlap-comm": ALWAYS_ON,
    "--moe-alltoall-mc2": ALWAYS_ON,
    "--enable-a2avc": Ignored(1),
    "--moe-grouped-gemm": ALWAYS_ON,
    "--moe-router-score-function": Ignored(1, ("softmax",)),
    "--topk-softmax-in-fp32": ALWAYS_ON,
    "--moe-pad-expert-input-to-capacity": ALWAYS_ON,  # with rows whose factor is 0
    "--fix-router": Ignored(refusal="tokens always go where the router sends them"),
    "--moe-router-topk-scaling-factor": Ignored(1, ("1", "1.0")),
    "--max-new-tokens": Ignored(1),  # upstream's tests pass it to pretraining
    "--o2-optimizer": BF16_STATE,
    "--o2-gradient": BF16_STATE,
    "--lora-fusion": ALWAYS_ON,
    "--lora-modules-to-save": Ignored(None),  # MindSpeed-LLM itself does not use this flag
    "--lora-register-forward-hook": Ignored(None),
    **dict.fromkeys(("--lu-lora-final-layer-index", "--lu-lora-lr", "--lu-lora-lr-ratio"), NO_LU_LORA),
    **QLORA,
    "--load-checkpoint-loosely": ALWAYS_ON,
    "--num-workers": Ignored(1),
    "--dataloader-type": Ignored(1, ("single",)),
    "--no-mmap-bin-files": ALWAYS_ON,
    "--no-create-attention-mask-in-dataloader": ALWAYS_ON,
    "--calculate-per-token-loss": ALWAYS_ON,
    "--pad-to-multiple-of": Ignored(1),  # batches never hold padding
    "--join": Ignored(1, ("True",)),  # this flag and the next belong to msrun
    "--cluster-time-out": Ignored(1),
}

# Flags of upstream that are said with another flag and its value here.
SAID_OTHERWISE = {"--router-gating-in-fp32": ("--moe-router-dtype", "fp32")}

LOCAL_FILES = Ignored(refusal="not supported; data are read from the local files of --input")
NO_OBFUSCATION = Ignored(refusal="obfuscated data are not supported")
PREPROCESS_IGNORED: dict[str, Ignored] = {
    "--streaming": ALWAYS_ON,
    "--n-subs": Ignored(1),  # upstream's parts are merged into the same files
    "--tokenizer-not-use-fast": ALWAYS_ON,
    "--overwrite-cache": ALWAYS_ON,
    "--cache-dir": Ignored(1),
    "--make-vocab-size-divisible-by": Ignored(1),
    "--pad-vocab-size-to": Ignored(1),
    "--dataset-impl": Ignored(1),
    "--datasets": Ignored(None),  # MindSpeed-LLM itself does not use this flag and the next
    "--reward-tokens": Ignored(None),
    "--dataset-additional-keys": Ignored(refusal="fields for reinforcement learning are not written"),
    "--tokenizer-model": Ignored(1),
    "--vocab-file": Ignored(1),
    "--merge-file": Ignored(1),
    "--keep-newlines": ALWAYS_ON,
    "--reasoning-effort": Ignored(1),  # this flag and the next are for a prompt type that is not supported
    "--drop-thinking": Ignored(1),
    "--split-sentences": Ignored(refusal="documents are stored whole, not by sentence"),
    "--prompt-type-path": Ignored(
        refusal="not supported; prompt types are built in. --prompt-type chat_template uses the model's own template"
    ),
    "--hf-datasets-params": LOCAL_FILES,
    "--script-data-dir": LOCAL_FILES,
    "--data-obfuscation": NO_OBFUSCATION,
    "--obf-seed-content": NO_OBFUSCATION,
}

NOT_ASKED_SO = Ignored(refusal="questions are put as lm-evaluation-harness puts them; a task file can change that")
# Flags of evaluation.py without a setting here. Questions, answers and batches are lm-evaluation-harness's.
EVALUATE_IGNORED: dict[str, Ignored] = {
    **{flag: rule for flag, rule in IGNORED.items() if flag != "--max-new-tokens"},
    "--evaluation-batch-size": Ignored(1),
    "--eval-language": Ignored(1, ("en", "zh")),
    "--broadcast": ALWAYS_ON,
    "--greedy": ALWAYS_ON,
    "--origin-postprocess": ALWAYS_ON,
    "--alternative-prompt": ALWAYS_ON,
    "--instruction-template": NOT_ASKED_SO,
    "--max-tokens-to-oom": Ignored(1),
    "--use-kv-cache": ALWAYS_ON,
    "--add-eos-token": Ignored(None),
    "--legacy-tokenizer": ALWAYS_ON,
}

# Flags of inference.py that say what happens anyway. The model's own flags are compared with the weights.
GENERATE_IGNORED: dict[str, Ignored] = {
    **{flag: rule for flag, rule in IGNORED.items() if flag != "--max-new-tokens"},
    "--add-eos-token": Ignored(None),
    "--add-qkv-bias": ALWAYS_ON,  # where the weights have it
    "--ckpt-format": Ignored(1),  # it is recognised
    "--exit-on-missing-checkpoint": ALWAYS_ON,
    "--legacy-tokenizer": ALWAYS_ON,
    "--make-vocab-size-divisible-by": Ignored(1),
    "--max-length": Ignored(1),  # --max-new-tokens limits the answer, and the model's positions all of it
    "--max-tokens-to-oom": Ignored(1),
    "--micro-batch-size": Ignored(1),
    "--no-load-optim": ALWAYS_ON,
    "--no-load-rng": ALWAYS_ON,
    "--seq-length": Ignored(1),
    "--sequence-parallel": ALWAYS_ON,
    "--tokenizer-type": Ignored(1, ("PretrainedFromHF",)),
    "--use-kv-cache": ALWAYS_ON,
}

NO_LEGACY = Ignored(refusal="only Megatron-core's names are read and written")
# The other flags of converters ask for what a dense model does not have, or what happens anyway.
CONVERT_IGNORED: dict[str, Ignored] = {
    "--use-mcore-models": ALWAYS_ON,
    "--spec": IGNORED["--spec"],
    "--model-type": Ignored(1, ("GPT",)),
    "--loader": Ignored(1),
    "--saver": Ignored(1),
    "--max-queue-size": Ignored(1),
    "--tokenizer-model": Ignored(1),
    "--vocab-file": Ignored(1),
    "--megatron-path": Ignored(1),
    "--ckpt-cfg-path": Ignored(1),
    "--load-hf-from-config": ALWAYS_ON,
    "--save-layer-by-layer": ALWAYS_ON,
    "--load-checkpoint-loosely": ALWAYS_ON,
    "--no-checking": ALWAYS_ON,
    "--group-query-attention": ALWAYS_ON,
    "--mtp-num-layers": Ignored(1, ("0",)),
    "--first-k-dense-replace": Ignored(1, ("0",)),
    "--w-pack": Ignored(1, ("False", "false")),
    "--mla-mm-split": Ignored(refusal="multi-head latent attention is not supported"),
    "--schedules-method": Ignored(refusal="dualpipev is not supported; only plain and interleaved pipeline stages are"),
    "--add-dense-bias": Ignored(refusal="biases of dense layers are not supported"),
    "--post-norm": Ignored(refusal="norms after attention and MLP are not supported"),
    **QLORA,
    "--load-from-legacy": NO_LEGACY,
    "--save-to-legacy": NO_LEGACY,
}


def with_own_flags(argv: Sequence[str]) -> list[str]:
    """The words of a command line, with the flags of `SAID_OTHERWISE` replaced.

    >>> with_own_flags(["--router-gating-in-fp32", "--lr", "1"])
    ['--moe-router-dtype', 'fp32', '--lr', '1']
    """
    return [own for word in argv for own in SAID_OTHERWISE.get(word.replace("_", "-"), (word,))]


class Split(NamedTuple):
    """A command line without the flags of a table.

    Attributes:
        rest: the remaining words.
        notices: one that lists the flags that were taken out; none when there are none.
        problems: what asks for something that is not supported, for `arguments.parse` to add to what it finds.
    """

    rest: list[str]
    notices: list[str]
    problems: list[str]


def split_ignored(argv: Sequence[str], table: Mapping[str, Ignored] = IGNORED) -> Split:
    """Take the flags of `table` out of a command line.

    >>> split_ignored(["--lr", "1", "--swiglu"])
    Split(rest=['--lr', '1'], notices=['accepted, without effect here: --swiglu'], problems=[])
    """
    rest: list[str] = []
    taken: list[str] = []
    problems: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        flag, equals, inline = word.partition("=")
        rule = table.get(flag.replace("_", "-"))
        if rule is None:
            rest.append(word)
            continue
        if rule.refusal:
            problems.append(f"{flag}: {rule.refusal}")
            continue
        values = [inline] if equals else _take(words, rule.values)
        wrong = [value for value in values if rule.allowed is not None and value not in rule.allowed]
        if wrong or (len(values) < (rule.values or 0) and not equals):
            problems.append(f"{flag} {' '.join(values)}: only {' '.join(rule.allowed or ())} is supported")
        taken.append(flag)
    for flag in taken:
        if (other := table[flag.replace("_", "-")].excludes) in taken:
            problems.append(f"{flag} and {other} exclude each other: give one")
    notices = [f"accepted, without effect here: {' '.join(dict.fromkeys(taken))}"] if taken else []
    return Split(rest, notices, problems)


def _take(words: list[str], count: int | None) -> list[str]:
    """The first `count` words, or those before the next flag, taken off the list."""
    if count is None:
        count = next((number for number, word in enumerate(words) if word.startswith("--")), len(words))
    taken, words[:] = words[:count], words[count:]
    return taken
