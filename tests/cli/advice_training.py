"""Commands of training that fail, or say what to do next, and what follows: a table of test_advice.py."""

from __future__ import annotations

from advice import DPO, EPOCH, PACKED, PREPROCESS, RUN, TRAIN, Case, add, changed, give, give_value, leave_out, without

MIXTURE = changed(TRAIN, "--load", "{mixture}")
TWO_STAGES = "--pipeline-model-parallel-size 2 --nproc-per-node 2"

CASES = {
    "longer than the model allows": Case(
        changed(TRAIN, "--seq-length", "4096"), r"give (--seq-length) (\d+), or less", give
    ),
    "an iteration of a folder without any": Case(
        f"{TRAIN} --ckpt-step 3", "leave out --ckpt-step", leave_out("--ckpt-step")
    ),
    "a file in place of a prefix": Case(
        changed(TRAIN, "--data-path", "{text}.bin"), r"leave out \.bin", lambda line, _: line.replace(".bin", "")
    ),
    "no data": Case(
        without(TRAIN, "--data-path"),
        "--data-path is required: the prefix that `tandem preprocess` wrote",
        lambda line, _: [
            "preprocess --input {corpus} --output-prefix {new} --tokenizer-name-or-path {hf} --append-eod",
            f"{line} --data-path {{new}}_text_document",
        ],
    ),
    "interleaved stages without stages": Case(
        f"{TRAIN} --num-layers-per-virtual-pipeline-stage 2",
        "leave it out, or give --pipeline-model-parallel-size 2 or more",
        leave_out("--num-layers-per-virtual-pipeline-stage"),
    ),
    "what one framework lacks, left out": Case(
        changed(f"{TRAIN} --use-torch-fsdp2", "--ai-framework", "mindspore"),
        "leave it out, or use --ai-framework torch",
        leave_out("--use-torch-fsdp2", 0),
    ),
    "what one framework lacks, with the other": Case(
        changed(f"{TRAIN} --use-torch-fsdp2", "--ai-framework", "mindspore"), r"use (--ai-framework) (torch)", give
    ),
    "adapters of nothing": Case(f"{TRAIN} --lora-r 4", r"add (--lora-target-modules) (all-linear), or names", give),
    "instructions for pretraining": Case(
        changed(f"{TRAIN} --is-instruction-dataset", "--data-path", "{chat}"),
        "belong to `tandem finetune`",
        lambda line, _: line.replace("pretrain", "finetune", 1),
    ),
    "epochs of weighted data": Case(
        changed(without(TRAIN, "--train-iters"), "--data-path", "1 {text} 2 {other_text}") + " --epochs 1",
        "leave the weights out, or give --train-iters",
        lambda line, _: line.replace("1 {text} 2", "{text}"),
    ),
    "epochs of weighted data, counted": Case(
        changed(without(TRAIN, "--train-iters"), "--data-path", "1 {text} 2 {other_text}") + " --epochs 1",
        "leave the weights out, or give --train-iters",
        lambda line, _: changed(without(line, "--epochs"), "--train-iters", "2"),
    ),
    "a profile without a folder": Case(f"{TRAIN} --profile", "give --save or --profile-save-path", add("--save {new}")),
    "a profile without a folder, with its own": Case(
        f"{TRAIN} --profile", "give --save or --profile-save-path", add("--profile-save-path {new}")
    ),
    "no weights": Case(without(TRAIN, "--load"), "--init random", add("--init random --hf-cfg-dir {hf}")),
    "machines without processes": Case(
        f"{TRAIN} --nnodes 2", "also give --nproc-per-node", lambda line, _: without(line, "--nnodes")
    ),
    "a tokenizer of more tokens than rows": Case(
        changed(TRAIN, "--load", "{fewer_rows}") + " --tokenizer-name-or-path {hf}",
        r"add rows with `(tandem convert --resize-vocab (\d+))`",
        lambda line, found: [
            f"convert --load-dir {{fewer_rows}} --save-dir {{new}} --no-verify --resize-vocab {found[2]}",
            changed(line, "--load", "{new}"),
        ],
    ),
    "no optimizer, a new one": Case(
        f"{without(RUN, '--save')} --save {{no_optimizer}}",
        "add (--no-load-optim) to go on",
        add("--no-load-optim"),
        copies="no_optimizer",
    ),
    "no optimizer, a new run": Case(
        f"{without(RUN, '--save')} --save {{no_optimizer}}",
        r"begin a new run with its weights: (--load \S+ --finetune), another --save",
        lambda line, found: f"{without(without(line, '--load'), '--save')} --save {{new}} {found[1]}",
        copies="no_optimizer",
    ),
    "another run's folder": Case(
        changed(changed(RUN, "--save", "{counted}"), "--data-path", "{chat}").replace("pretrain", "finetune", 1),
        "Choose another folder",
        lambda line, _: changed(line, "--save", "{new}"),
    ),
    "random weights of nothing": Case(
        changed(without(TRAIN, "--load"), "--init", "random"),
        "give its folder with --hf-cfg-dir",
        add("--hf-cfg-dir {hf}"),
    ),
    "smoothing that a loss does not use": Case(
        f"{DPO} --dpo-loss-type ipo --dpo-label-smoothing 0.1",
        "does not use it: leave it out",
        leave_out("--dpo-label-smoothing"),
    ),
    "dropout while answers are compared": Case(
        f"{DPO} --lora-r 4 --lora-target-modules all-linear --lora-dropout 0.1",
        "as in TRL: leave it out",
        leave_out("--lora-dropout"),
    ),
    "dropout with DoRA": Case(
        f"{TRAIN} --lora-r 4 --lora-target-modules all-linear --lora-dropout 0.1 --lora-use-dora",
        "leave one out",
        leave_out("--lora-dropout"),
    ),
    "dropout, and no DoRA": Case(
        f"{TRAIN} --lora-r 4 --lora-target-modules all-linear --lora-dropout 0.1 --lora-use-dora",
        "leave one out",
        leave_out("--lora-use-dora", 0),
    ),
    "epochs with another batch": Case(
        changed(EPOCH, "--global-batch-size", "8"),
        r"keep (\d+), or",
        lambda line, found: changed(line, "--global-batch-size", found[1]),
    ),
    "epochs with another batch, counted": Case(
        changed(EPOCH, "--global-batch-size", "8"),
        r"give (--train-samples) (\d+) instead of --epochs",
        lambda line, found: give(without(line, "--epochs"), found),
    ),
    "an iteration of a run that goes on": Case(
        changed(f"{EPOCH} --ckpt-step 1", "--save", "{counted}"),
        r"give (--load) (\S+) --ckpt-step 1",
        give,
    ),
    "raw conversations for pretraining": Case(
        changed(TRAIN, "--data-path", "{alpaca}") + " --tokenizer-name-or-path {hf} --data-cache-path {new}",
        r"give (--handler-name) (AlpacaPretrainHandler)",
        give,
    ),
    "raw text for fine-tuning": Case(
        changed(TRAIN, "--data-path", "{corpus}").replace("pretrain", "finetune", 1)
        + " --tokenizer-name-or-path {hf} --data-cache-path {new} --prompt-type qwen3",
        "to read them as conversations, give --handler-name or --map-keys",
        add('--map-keys \'{{"prompt": "text", "response": "text"}}\''),
    ),
    "text for fine-tuning": Case(
        TRAIN.replace("pretrain", "finetune", 1),
        "these data are plain text, for `tandem pretrain`",
        lambda line, _: line.replace("finetune", "pretrain", 1),
    ),
    "packed rows of another length": Case(
        changed(PACKED, "--seq-length", "64"),
        r"train with (--seq-length) (\d+)",
        give,
    ),
    "borders that cut prompts from answers": Case(
        f"{PACKED} --reset-position-ids",
        "leave the flags out, or preprocess again with --pack --neat-pack",
        leave_out("--reset-position-ids", 0),
    ),
    "borders that cut prompts from answers, stored": Case(
        f"{PACKED} --reset-position-ids",
        "preprocess again with (--pack --neat-pack)",
        lambda line, found: [
            f"{PREPROCESS} --seq-length 128 --over-long drop {found[1]}",
            changed(line, "--data-path", "{new}"),
        ],
    ),
    "fewer layers than stages, in training": Case(
        f"{TRAIN} --pipeline-model-parallel-size 6 --nproc-per-node 6",
        r"leave slots without a layer with (--noop-layers) (\S+)$",
        give,
    ),
    "tensors that cannot be split so, in training": Case(
        f"{TRAIN} --tensor-model-parallel-size 7 --nproc-per-node 7",
        r"(--tensor-model-parallel-size) 7: .* give 1 or (\d)$",
        lambda line, found: changed(give(line, found), "--nproc-per-node", "2"),
    ),
    "chunks of layers that do not divide": Case(
        f"{TRAIN} --pipeline-model-parallel-size 2 --nproc-per-node 2 --num-layers-per-virtual-pipeline-stage 3",
        r"(--num-layers-per-virtual-pipeline-stage) 3: .* give (\d), or leave it out$",
        give,
    ),
    "adapters of rank 0": Case(
        f"{TRAIN} --lora-target-modules all-linear --lora-r 0",
        "--lora-r 0: expected a whole number, at least 1",
        lambda line, _: changed(line, "--lora-r", "1"),
    ),
    "two precisions": Case(f"{TRAIN} --fp16 --bf16", "exclude each other: give one", leave_out("--fp16", 0)),
    "two warm-ups": Case(
        f"{TRAIN} --lr-warmup-fraction 0.5 --lr-warmup-iters 1",
        "exclude each other: give one",
        leave_out("--lr-warmup-iters"),
    ),
    "fewer samples than a step takes": Case(
        f"{without(TRAIN, '--train-iters')} --train-samples 2",
        r"give more, or a smaller (--global-batch-size)",
        give_value("2"),
    ),
    "a prefix twice": Case(
        changed(TRAIN, "--data-path", "{text} {text}"),
        "is named twice: .* give it one weight",
        lambda line, _: changed(line.replace("{text} {text}", "{text}"), "--data-path", "{text}"),
    ),
    "a pretraining that ended, fine-tuned": Case(
        RUN,
        r"or tandem (finetune --load \S+ --finetune --save) NEW_RUN \.\.\.",
        lambda line, found: changed(without(without(line, "--load"), "--save"), "--data-path", "{chat}").replace(
            "pretrain", f"{found[1]} {{new}}_tuned", 1
        ),
        ends=0,
        says="successfully saved checkpoint from iteration       2 to",
    ),
    "a pretraining that ended, exported": Case(
        RUN, r"next: tandem (export \S+) NEW_FOLDER,", lambda _, found: f"{found[1]} {{new}}_hf --no-verify", ends=0
    ),
    "a fine-tuning that ended": Case(
        changed(RUN, "--data-path", "{chat}").replace("pretrain", "finetune", 1),
        r"next: tandem (generate \S+)",
        lambda _, found: f"{found[1]} hello --max-new-tokens 1 --device cpu",
        ends=0,
    ),
    "a schedule without its end": Case(
        f"{TRAIN} --lr-decay-style WSD",
        "needs (--lr-wsd-decay-iters)",
        give_value("1"),
    ),
    "blocks of layers without their number": Case(
        f"{TRAIN} --recompute-granularity full --recompute-method block",
        "needs (--recompute-num-layers)",
        give_value("1"),
    ),
    "recomputation without a method": Case(
        f"{TRAIN} --recompute-granularity full", "needs (--recompute-method) (uniform) or block", give
    ),
    "pairs without a stage": Case(
        f"{without(DPO, '--stage')} --is-pairwise-dataset", "needs (--stage) (dpo), orpo, simpo", give
    ),
    "weight decay that changes, without a style": Case(
        f"{TRAIN} --start-weight-decay 0 --end-weight-decay 0.1",
        "need (--weight-decay-incr-style)",
        give_value("linear"),
    ),
    "moments in bf16": Case(
        f"{TRAIN} --exp-avg-dtype bf16",
        "needs (--use-precision-aware-optimizer)",
        lambda line, found: f"{line} {found[1]}",
    ),
    "weights, and random ones": Case(
        f"{TRAIN} --init random", "either --load FOLDER with initial weights, or --init random", leave_out("--init")
    ),
    "random ones, and weights": Case(
        f"{TRAIN} --init random --hf-cfg-dir {{hf}}",
        "either --load FOLDER with initial weights, or --init random",
        leave_out("--load"),
    ),
    "a warm-up longer than the run": Case(f"{TRAIN} --lr-warmup-iters 5", "lower (--lr-warmup-iters)", give_value("1")),
    "an evaluation that is never due": Case(
        changed(changed(RUN, "--eval-iters", "1"), "--split", "80,20,0"),
        "give a smaller (--eval-interval)",
        lambda line, found: changed(changed(line, "--save", "{new}_evaluated"), found[1], "1"),
        ends=0,
        says="validation loss at iteration 1",
    ),
    "a run that would replace what it begins with": Case(
        f"{changed(changed(RUN, '--load', '{counted}'), '--save', '{counted}')} --finetune",
        "it would replace them. Choose another folder for --save",
        lambda line, _: changed(line, "--save", "{new}"),
    ),
    "other initial weights": Case(
        changed(changed(RUN, "--load", "{large}"), "--save", "{no_optimizer}"),
        "Choose another folder, or resume that run",
        lambda line, _: changed(line, "--save", "{new}").replace("{large}", "{moved}"),
    ),
    "other initial weights, resumed": Case(
        changed(changed(EPOCH, "--load", "{moved}"), "--save", "{counted}"),
        r"or resume that run with (--load) (\S+)",
        give,
        copies="counted",
    ),
    "raw files without a tokenizer": Case(
        changed(changed(TRAIN, "--load", "{bare}"), "--data-path", "{corpus}") + " --data-cache-path {new}",
        "needs (--tokenizer-name-or-path)",
        give_value("{hf}"),
    ),
    "raw files for a folder that is a file": Case(
        changed(TRAIN, "--data-path", "{corpus}") + " --tokenizer-name-or-path {hf} --data-cache-path {full}/file",
        "is a file, where a folder is expected: choose another folder",
        lambda line, _: changed(line, "--data-cache-path", "{new}"),
    ),
    "data of two templates": Case(
        changed(TRAIN, "--data-path", "{chat} {chat_template}").replace("pretrain", "finetune", 1),
        "preprocess all with the same --prompt-type and --enable-thinking",
        lambda line, _: [PREPROCESS, line.replace("{chat_template}", "{new}")],
    ),
    "packed rows without a record": Case(
        changed(changed(PACKED, "--data-path", "{neat}"), "--seq-length", "64"),
        r"are packed; .* train with (--seq-length) (\d+)",
        give,
    ),
    "ends of documents without a tokenizer": Case(
        changed(changed(TRAIN, "--load", "{bare}"), "--data-path", "{no_record}") + " --reset-position-ids",
        "give (--tokenizer-name-or-path), the folder",
        give_value("{hf}"),
    ),
    "conversations that training cuts": Case(
        changed(changed(TRAIN, "--data-path", "{chat}"), "--seq-length", "40").replace("pretrain", "finetune", 1),
        r"`tandem preprocess (--seq-length \d+ --over-long drop)` leaves them out",
        lambda line, found: [f"{PREPROCESS} {found[1]}", line.replace("{chat}", "{new}")],
        ends=0,
    ),
    "a state that is lost": Case(
        changed(EPOCH, "--save", "{stateless}"),
        "The weights there can begin a new run, with --finetune and another --save",
        lambda line, _: changed(changed(line, "--load", "{stateless}"), "--save", "{new}") + " --finetune",
    ),
    "a state that was cut": Case(
        changed(EPOCH, "--save", "{cut}"),
        "The weights there can begin a new run, with --finetune and another --save",
        lambda line, _: changed(changed(line, "--load", "{cut}"), "--save", "{new}") + " --finetune",
    ),
    "steps whose numbers are too large": Case(
        changed(RUN, "--load", "{beyond}"),
        "skip such steps with (--on-bad-step) (skip)",
        give,
        says="give --on-bad-step stop to see the first bad one",
    ),
    "steps that are all skipped": Case(
        f"{changed(RUN, '--load', '{beyond}')} --on-bad-step skip",
        "give (--on-bad-step) (stop) to see the first bad one",
        lambda line, found: changed(changed(give(line, found), "--load", "{hf}"), "--save", "{new}_again"),
        ends=0,
    ),
    "rules that update some layers": Case(
        f"{TRAIN} --lora-r 4 --lora-alpha 8 --lora-target-modules all-linear --lu-lora-lr 1",
        "leave out the --lu-lora flags",
        leave_out("--lu-lora-lr"),
    ),
    "experts that are sharded twice": Case(
        f"{MIXTURE} --use-torch-fsdp2 --expert-model-parallel-size 2 --nproc-per-node 2",
        "leave out --expert-model-parallel-size",
        leave_out("--expert-model-parallel-size"),
    ),
    "a pooled loss over stages": Case(
        f"{MIXTURE} --moe-router-load-balancing-type pooled_aux_loss --moe-aux-loss-coeff 0.1 {TWO_STAGES}",
        "give (aux_loss), or --pipeline-model-parallel-size 1",
        lambda line, found: changed(line, "--moe-router-load-balancing-type", found[1]),
    ),
    "a pooled loss over stages, on one": Case(
        f"{MIXTURE} --moe-router-load-balancing-type pooled_aux_loss --moe-aux-loss-coeff 0.1 {TWO_STAGES}",
        "give aux_loss, or (--pipeline-model-parallel-size) (1)",
        give,
    ),
    "dropout of experts": Case(
        f"{MIXTURE} --lora-r 4 --lora-target-modules all-linear --lora-dropout 0.1",
        "train with (0), or",
        lambda line, found: changed(line, "--lora-dropout", found[1]),
    ),
    "dropout of experts, of other modules": Case(
        f"{MIXTURE} --lora-r 4 --lora-target-modules all-linear --lora-dropout 0.1",
        "or give other (--lora-target-modules)",
        give_value("q_proj"),
    ),
    "weights of experts that are made equal": Case(
        f"{MIXTURE} --moe-router-pre-softmax",
        "add (--norm-topk-prob)",
        lambda line, found: f"{line} {found[1]}",
    ),
    "YaRN without its type": Case(
        f"{TRAIN} --rope-scaling-factor 2", "needs --rope-scaling-type yarn", leave_out("--rope-scaling-factor")
    ),
}
