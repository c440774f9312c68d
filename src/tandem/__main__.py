"""`tandem COMMAND ...`: the command line."""

from __future__ import annotations

import importlib
import os
import sys
from typing import NoReturn

from tandem.errors import RunStopped, UserError, nearest
from tandem.launch.member import Member, exit_with
from tandem.launch.world import is_scheduler
from tandem.logs import printed
from tandem.version import __version__

# command -> its module under tandem.cli, and what it does
COMMANDS = {
    "convert": "Convert weights: Hugging Face <-> Megatron-core layout, at any TP and PP.",
    "preprocess": "Turn text or instruction data into .bin/.idx files.",
    "pretrain": "Train on text.",
    "finetune": "Train on instruction data.",
    "doctor": "Show versions and devices, what is missing and how to install it.",
    "export": "Write a trained checkpoint as a Hugging Face folder.",
    "generate": "Ask a model.",
    "evaluate": "Loss and perplexity of a model on data.",
    "inspect": "Show what a checkpoint holds, and whether it is undamaged.",
    "plan": "Plan memory, traffic and speed of a run; find layouts that fit a number of devices.",
    "report": "Show one or several runs on an HTML page.",
    "rerun": "Run a recorded training again and compare its losses.",
    "quickstart": "Run the whole job on a toy model, on one backend or both.",
}


STOPPED = 75  # exit code of a run that was asked to stop, and can go on
UNREAD = 141  # as a shell tells of a program that SIGPIPE ended


def usage() -> str:
    lines = [f"  {name:<12}{text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            f"tandem {__version__}: train Qwen3 end to end on MindSpore and on PyTorch, from the same bytes.",
            "",
            "usage: tandem COMMAND [OPTIONS]      (tandem COMMAND --help lists the options)",
            "",
            *lines,
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Run one command, alone or as a member of a job. Returns the exit code: the command's own, 2 when the input was at
    fault, or STOPPED."""
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        print(__version__)
        return 0
    command = words[0]
    if command not in COMMANDS:
        print(f"tandem: unknown command {command!r}{nearest(command, list(COMMANDS))}\n\n{usage()}", file=sys.stderr)
        return 2
    member = Member.join()
    if is_scheduler():
        importlib.import_module("tandem.backends").serve_as_scheduler()
    try:
        module = importlib.import_module(f"tandem.cli.{command}")
        with printed():
            code = module.run(words[1:]) or 0
            sys.stdout.flush()
        return member.ended(code)
    except UserError as error:
        return member.ended(2, _error(command, error))
    except BrokenPipeError:  # the reader of `tandem ... | head` has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return member.ended(UNREAD)
    except RunStopped as stopped:
        return member.ended(STOPPED, f"tandem {command}: {stopped}")
    except Exception as error:
        member.crashed(error)
        raise


def _error(command: str, error: UserError) -> str:
    """All that is wrong, a line each."""
    problems = error.problems
    if len(problems) == 1:
        return f"tandem {command}: error: {error}"
    return "\n".join([f"tandem {command}: {len(problems)} errors:", *(f"  {problem}" for problem in problems)])


def run() -> NoReturn:
    exit_with(main)


if __name__ == "__main__":
    run()
