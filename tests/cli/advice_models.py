"""Commands that use a model that fail, or say what to do next, and what follows: a table of test_advice.py."""

from __future__ import annotations

from advice import CONVERT, Case, add, changed, give, give_value, leave_out

GENERATE = "generate --max-new-tokens 1 --device cpu"

CASES = {
    "a target that exists": Case(
        changed(CONVERT, "--save-dir", "{full}"),
        "remove it or choose another place",
        lambda line, _: changed(line, "--save-dir", "{new}"),
    ),
    "adapters into a checkpoint": Case(
        f"{CONVERT} --save-lora-to-hf --lora-load {{adapters}} --save-model-type mg",
        "add --save-model-type hf",
        lambda line, _: changed(line, "--save-model-type", "hf"),
    ),
    "messages in plain text": Case(
        "generate {hf} --prompts-file {messages} --max-new-tokens 1 --device cpu --raw",
        "leave out --raw",
        leave_out("--raw", 0),
    ),
    "nothing to check": Case(
        "generate {hf} hello --max-new-tokens 1 --device cpu --dry-run", "leave it out", leave_out("--dry-run", 0)
    ),
    "a run to verify": Case(
        "verify {counted}", r"tandem (export \S+) NEW_FOLDER", lambda _, found: f"{found[1]} {{new}} --no-verify"
    ),
    "layers that do not divide": Case(
        f"{CONVERT} --ckpt-format torch --target-pipeline-parallel-size 3",
        r"give the layers of each stage with (--num-layer-list) (\S+), or",
        give,
    ),
    "layers that do not divide, filled up": Case(
        f"{CONVERT} --ckpt-format torch --target-pipeline-parallel-size 3", r"with (--noop-layers) (\S+)$", give
    ),
    "fewer layers than stages": Case(
        f"{CONVERT} --ckpt-format torch --target-pipeline-parallel-size 6",
        r"size 6: [^-]*leave slots without a layer with (--noop-layers) (\S+)$",
        give,
    ),
    "two chunks of layers that do not divide": Case(
        f"{CONVERT} --ckpt-format torch --target-pipeline-parallel-size 3 --num-layers-per-virtual-pipeline-stage 1",
        r"with (--noop-layers) (\S+)$",
        give,
    ),
    "tensors that cannot be split so": Case(
        f"{CONVERT} --target-tensor-parallel-size 7", r"(--target-tensor-parallel-size) 7: .* give 1 or (\d)$", give
    ),
    "a format that is only read": Case(f"{CONVERT} --ckpt-format torch_dist", r"write (--ckpt-format) (torch),", give),
    "a template, and none": Case(
        "generate {hf} hello --max-new-tokens 1 --device cpu --raw --prompt-type qwen3",
        "give one of them",
        leave_out("--raw", 0),
    ),
    "another target for adapters": Case(
        f"{CONVERT} --save-lora-to-hf --save-model-type hf",
        "give theirs with --lora-load",
        add("--lora-load {adapters}"),
    ),
    "adapters of a model without any": Case(
        "export {hf} {new} --save-lora-to-hf", "give theirs with --lora-load", add("--lora-load {adapters}")
    ),
    "whole weights as adapters": Case(
        "generate {hf} hello --max-new-tokens 1 --device cpu --lora-load {no_optimizer}",
        "give whole weights with --load",
        lambda line, _: "generate --load {no_optimizer} --prompt hello --max-new-tokens 1 --device cpu",
    ),
    "adapters whose weights have moved": Case(
        "export {lora} {new} --no-verify",
        r"give --load FOLDER (--lora-load \S+)",
        lambda line, found: f"export --load {{moved}} {found[1]} --save-dir {{new}} --no-verify",
    ),
    "no tokenizer to ask": Case(
        "generate {bare} hello --max-new-tokens 1 --device cpu",
        "give its folder with --tokenizer-name-or-path",
        add("--tokenizer-name-or-path {hf}"),
    ),
    "no tokenizer for a GGUF file": Case(
        "export {bare} {new} --gguf f16", "give --hf-cfg-dir", add("--hf-cfg-dir {hf}")
    ),
    "numbers beyond float16": Case(
        "export {large} {new} --gguf f16", "use (--gguf) (bf16)", lambda line, found: line.replace("f16", found[2])
    ),
    "no run to report": Case(
        "report", "is required: The --save folder of each run", lambda line, _: "report {counted}"
    ),
    "an iteration of a Hugging Face folder": Case(
        "export {hf} {new} --no-verify --ckpt-step 3", "leave out --ckpt-step", leave_out("--ckpt-step")
    ),
    "a folder of two models": Case(
        "export {two_models} {new} --no-verify",
        "Give (--ckpt-step) N for the checkpoint's iteration N",
        give_value("1"),
    ),
    "adapters in place of a model": Case(
        f"{GENERATE} {{adapters}} hello",
        r"give the folder of that model, and the adapter with (--lora-load \S+)",
        lambda _, found: f"{GENERATE} {{moved}} hello {found[1]}",
    ),
    "a run of adapters whose weights have moved": Case(
        f"{GENERATE} {{lora}} hello",
        r"give --load FOLDER (--lora-load \S+)",
        lambda _, found: f"{GENERATE} --load {{moved}} --prompt hello {found[1]}",
    ),
    "a run of adapters for another model": Case(
        f"{GENERATE} {{fewer_rows}} hello --lora-load {{lora}}",
        "Give the model that they were trained on with (--load)",
        lambda line, _: line.replace("{fewer_rows}", "{moved}"),
    ),
    "a run of adapters for other weights": Case(
        f"{GENERATE} {{large}} hello --lora-load {{lora}}",
        r"Give those with --load FOLDER (--lora-load \S+)",
        lambda _, found: f"{GENERATE} --load {{moved}} --prompt hello {found[1]}",
    ),
    "adapters for another model": Case(
        f"{GENERATE} {{other}} hello --lora-load {{adapters}}",
        "give theirs with (--load)",
        lambda line, _: line.replace("{other}", "{moved}"),
    ),
    "numbers beyond a dtype": Case(
        "export {large} {new} --no-verify --params-dtype fp16",
        "choose another (--params-dtype)",
        give_value("bf16"),
    ),
    "weights of two dtypes": Case(
        changed(CONVERT, "--load-dir", "{two_dtypes}"),
        "holds bfloat16 and float32: choose one with (--params-dtype)",
        give_value("fp32"),
    ),
    "a run as a Hugging Face folder": Case(
        changed(CONVERT, "--load-dir", "{counted}") + " --save-model-type hf",
        r"give (--load-model-type) (mg)",
        give,
    ),
    "a checkpoint that does not say its model": Case(
        "export {argless} {new} --no-verify",
        "Give its config.json with (--hf-cfg-dir)",
        give_value("{hf}"),
    ),
    "a folder without a certificate": Case(
        "verify {hf}",
        r"(tandem export \S+) NEW_FOLDER",
        lambda line, found: [f"{found[1].removeprefix('tandem ')} {{new}} --no-verify", "verify {new}"],
    ),
    "a way of drawing, where nothing is drawn": Case(
        f"{GENERATE} {{hf}} hello --top-p 0.9",
        "without effect: .* give (--temperature)",
        give_value("1"),
        ends=0,
    ),
    "a conversation without a template": Case(
        "chat {hf} --raw", "`tandem (generate --raw)` continues texts", lambda _, found: f"{found[1]} {{hf}} hello"
    ),
    "devices that share nothing": Case(
        "plan {hf} --devices 2 --seq-length 32 --micro-batch-size 1",
        "needs (--global-batch-size)",
        give_value("4"),
    ),
}
