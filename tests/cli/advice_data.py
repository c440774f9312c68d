"""Commands about data that fail, or say what to do next, and what follows: a table of test_advice.py."""

from __future__ import annotations

from advice import PREPROCESS, Case, add, changed, give, give_value, leave_out, without

TEXT = "preprocess --input {corpus} --output-prefix {new} --tokenizer-name-or-path {hf}"
LLAMA_FACTORY = (
    f"{changed(PREPROCESS, '--input', 'alpaca')} --handler-name LlamaFactoryInstructionHandler --dataset-dir {{listed}}"
)

CASES = {
    "bad rows": Case(
        changed(PREPROCESS, "--input", "{bad_rows}"),
        "`tandem preprocess (--on-bad) (skip)` leaves such rows out",
        give,
    ),
    "a flag of another handler": Case(
        f"{PREPROCESS} --mix-strategy interleave_under",
        "works only with --handler-name LlamaFactoryInstructionHandler; leave it out",
        leave_out("--mix-strategy"),
    ),
    "data without a record": Case(
        "inspect data {no_record}", "give --tokenizer-name-or-path, or --show 0", add("--tokenizer-name-or-path {hf}")
    ),
    "data without a record, not shown": Case(
        "inspect data {no_record}", r"give --tokenizer-name-or-path, or (--show) (0)", give
    ),
    "a raw file in place of a prefix": Case(
        "inspect data {corpus} --show 0",
        r"preprocess it first with `tandem (preprocess --input \S+ --output-prefix) PREFIX (\S+) MODEL`",
        lambda _, found: [
            f"{found[1]} {{new}} {found[2]} {{hf}}",
            "inspect data {new}_text_document --show 0",
        ],
    ),
    "conversations in place of questions": Case(
        "evaluate {hf} {alpaca} --seq-length 32 --device cpu",
        r"preprocess it first with `tandem (preprocess --input \S+ --output-prefix) PREFIX (\S+) MODEL`",
        lambda line, found: [
            f"{found[1]} {{new}} {found[2]} {{hf}}",
            line.replace("{alpaca}", "{new}"),
        ],
    ),
    "a run in place of its tokenizer": Case(
        f"{changed(PREPROCESS, '--tokenizer-name-or-path', '{counted}')}",
        r"give (\S+), which has one",
        lambda line, found: changed(line, "--tokenizer-name-or-path", found[1]),
    ),
    "a token for ends that are not added": Case(
        changed(PREPROCESS, "--input", "{corpus}").replace(" --prompt-type qwen3", "") + " --eod-token '<|im_end|>'",
        "needs (--append-eod).*; give both",
        lambda line, found: f"{line} {found[1]}",
    ),
    "rows that are packed with borders, but not packed": Case(
        f"{PREPROCESS} --seq-length 128 --neat-pack", r"needs (--pack); give both", lambda line, _: f"{line} --pack"
    ),
    "rows of no length": Case(
        f"{PREPROCESS} --pack", r"needs (--seq-length), .*; give both", add("--seq-length 128 --over-long drop")
    ),
    "a page with the name of a folder": Case(
        "inspect data {text} --show 0 --html {full}",
        r"give the name of a file, such as (page\.html)",
        lambda line, found: line.replace("{full}", f"{{new}}-{found[1]}"),
    ),
    "fields of plain text": Case(
        "preprocess --input {corpus} --output-prefix {new} --tokenizer-name-or-path {hf} "
        '--handler-name GeneralPretrainHandler --map-keys \'{{"prompt": "text"}}\'',
        "leave it out, or name fields with --json-keys",
        lambda line, _: without(line, "--map-keys") + " --json-keys text",
    ),
    "thoughts without a template": Case(
        changed(PREPROCESS, "--prompt-type", "empty") + " --enable-thinking true",
        "leave --enable-thinking out",
        leave_out("--enable-thinking"),
    ),
    "variables that a template does not take": Case(
        changed(PREPROCESS, "--input", "{variables}"),
        r"Choose (--prompt-type) (chat_template)",
        give,
    ),
    "answers of which nobody knows whose they are": Case(
        changed(PREPROCESS, "--input", "{split_texts}"), r"give (--prompt-type) (empty)", give
    ),
    "an option of conversations": Case(
        "preprocess --input {corpus} --output-prefix {new} --tokenizer-name-or-path {hf} --train-turns last",
        "leave it out",
        leave_out("--train-turns"),
    ),
    "a folder of another handler": Case(
        f"{PREPROCESS} --dataset-dir {{full}}",
        "works only with --handler-name LlamaFactoryInstructionHandler; leave it out",
        leave_out("--dataset-dir"),
    ),
    "conversations that are too long": Case(
        f"{PREPROCESS} --seq-length 24 --over-long stop", r"or choose (--over-long) (trim)", give
    ),
    "no token that ends documents": Case(
        changed(f"{PREPROCESS} --append-eod", "--tokenizer-name-or-path", "{no_end}")
        .replace("{questions}", "{corpus}")
        .replace(" --prompt-type qwen3", ""),
        "give --eod-token",
        add("--eod-token '<|im_end|>'"),
    ),
    "a list of datasets that is nowhere": Case(
        without(LLAMA_FACTORY, "--dataset-dir"),
        "needs (--dataset-dir), the folder of dataset_info.json",
        give_value("{listed}"),
    ),
    "shares of a mix that is none": Case(
        f"{LLAMA_FACTORY} --interleave-probs 1",
        "needs (--mix-strategy) (interleave_under) or",
        give,
    ),
    "field names that are given twice": Case(
        LLAMA_FACTORY + ' --map-keys \'{{"prompt": "instruction"}}\'',
        "leave --map-keys out",
        leave_out("--map-keys"),
    ),
    "a place below a file": Case(
        changed(PREPROCESS, "--output-prefix", "{full}/file/data"),
        "is a file, where a folder is expected: choose another folder",
        lambda line, _: changed(line, "--output-prefix", "{new}"),
    ),
    "files of somebody else": Case(
        changed(PREPROCESS, "--output-prefix", "{occupied}"),
        "holds files that tandem did not write; choose another (--output-prefix)",
        give_value("{new}"),
    ),
    "data in the place of other data": Case(
        changed(PREPROCESS, "--output-prefix", "{text_prefix}"),
        "choose another (--output-prefix)",
        give_value("{new}"),
    ),
    "a file in the place of a record": Case(
        changed(PREPROCESS, "--output-prefix", "{no_data}"),
        "is not a record, .* choose another (--output-prefix)",
        give_value("{new}"),
    ),
    "rejected rows in the place of the input": Case(
        changed(changed(PREPROCESS, "--input", "{taken}.rejects.jsonl"), "--output-prefix", "{taken}"),
        "choose another (--output-prefix)",
        give_value("{new}"),
    ),
    "conversations without a template": Case(
        changed(without(PREPROCESS, "--prompt-type"), "--tokenizer-name-or-path", "{untemplated}"),
        "needs (--prompt-type), a template for conversations, such as (qwen3)",
        give,
    ),
    "a model's template that is missing": Case(
        changed(changed(PREPROCESS, "--prompt-type", "chat_template"), "--tokenizer-name-or-path", "{untemplated}"),
        "choose a named (--prompt-type)",
        give_value("qwen3"),
    ),
    "the template of another model": Case(
        changed(PREPROCESS, "--tokenizer-name-or-path", "{other_end}"),
        "choose the (--prompt-type) of this model",
        give_value("chat_template"),
    ),
    "a way with long rows, and no length": Case(
        f"{PREPROCESS} --over-long drop",
        "needs (--seq-length), .*; give both",
        lambda line, _: f"{line} --seq-length 99",
    ),
    "conversations that are too long, dropped": Case(
        f"{PREPROCESS} --seq-length 40 --over-long stop", r"or choose (--over-long) trim or (drop)", give
    ),
    "answers that begin differently": Case(
        changed(PREPROCESS, "--input", "{asked_pairs}"),
        "name its field with (--map-keys) 'prompt'",
        lambda line, found: line + f" {found[1]} '" + '{{"prompt": "asked"}}' + "'",
    ),
    "fields of nobody's": Case(
        changed(PREPROCESS, "--input", "{own_fields}"),
        "Name fields with --json-keys or (--map-keys)",
        lambda line, found: line + f" {found[1]} '" + '{{"prompt": "q", "response": "a"}}' + "'",
    ),
    "fields of nobody's, as text": Case(
        TEXT.replace("{corpus}", "{own_fields}"),
        "Name fields with (--json-keys)",
        give_value("a"),
    ),
    "another tokenizer than that of the data": Case(
        "inspect data {renamed}_text_document",
        "is not the tokenizer .* give the right one with (--tokenizer-name-or-path)",
        give_value("{hf}"),
    ),
    "nothing to evaluate": Case(
        "evaluate {hf} --seq-length 32 --device cpu", "give PREFIX, or", lambda line, _: f"{line} {{text}}"
    ),
    "nothing to evaluate, by name": Case(
        "evaluate {hf} --seq-length 32 --device cpu", "or NAME=PREFIX", lambda line, _: f"{line} texts={{text}}"
    ),
    "preferences of a model that nobody compares": Case(
        "evaluate {hf} {compared} --seq-length 64 --device cpu",
        "give .* with (--ref-model) FOLDER",
        give_value("{moved}"),
    ),
    "preferences of a model that nobody compares, without a reference": Case(
        "evaluate {hf} {compared} --seq-length 64 --device cpu", r"or choose (--stage) (orpo) or simpo", give
    ),
}
