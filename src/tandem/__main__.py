"""`tandem COMMAND ...`: the command line."""

from __future__ import annotations

import importlib
import os
import sys
from contextlib import nullcontext
from typing import NoReturn

from tandem.console import drop_output, lasting_console, open_missing_streams
from tandem.errors import RunStopped, UserError, nearest
from tandem.files.text import unreadable
from tandem.launch.member import JOB, Member, exit_with
from tandem.launch.world import is_scheduler
from tandem.logs import printed
from tandem.version import __version__

# command -> its module under tandem.cli, and what it does
COMMANDS = {
    "convert": "Convert weights between Hugging Face and Megatron-core layout, for any TP and PP.",
    "preprocess": "Turn text or instruction data into .bin/.idx files.",
    "pretrain": "Train on text.",
    "finetune": "Train on instruction data.",
    "doctor": "Show versions and devices, what is missing, and how to install it.",
    "export": "Write a trained checkpoint as a Hugging Face folder.",
    "verify": "Compare an exported folder, or a server, with what training computes.",
    "chat": "Talk with a model on the terminal.",
    "generate": "Ask a model.",
    "serve": "Serve a model: a chat page, and OpenAI's protocol.",
    "evaluate": "Measure a model: its loss on data, or benchmarks of lm-evaluation-harness.",
    "inspect": "Show the contents of a checkpoint or of data, and check for damage.",
    "plan": "Estimate memory, traffic and speed of a run; find layouts that fit your devices.",
    "bench": "Check and measure devices, without data or weights.",
    "report": "Write an HTML page about one or several runs.",
    "rerun": "Repeat a recorded training and compare the losses.",
    "quickstart": "Try everything on a toy model, with one framework or both.",
}

# Commands whose result is files: they go on when nobody reads what they print. Others end then, as in `... | head`.
LASTING = {"bench", "convert", "preprocess", "pretrain", "finetune", "export", "rerun", "quickstart"}
HELP = {"-h", "--help", "--help-all"}

STOPPED = 75  # exit code of a run that a signal stopped; the same command continues it
UNREAD = 141  # exit code that a shell reports for a program ended by SIGPIPE
INTERRUPTED = 130  # exit code that a shell reports for a program ended by Ctrl-C


def usage() -> str:
    lines = [f"  {name:<12}{text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            f"tandem {__version__}: train Qwen3 end to end on MindSpore and PyTorch, from the same files.",
            "",
            "usage: tandem COMMAND [OPTIONS]      (tandem COMMAND --help lists the options)",
            "",
            *lines,
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Run one command, alone or as a process of a job.

    Returns:
        The exit code of the command, 2 for bad input or a file that cannot be used, STOPPED, UNREAD or INTERRUPTED.
    """
    open_missing_streams()
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in HELP:
        print(usage())
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        print(__version__)
        return 0
    command = words[0]
    if command not in COMMANDS:
        print(f"tandem: unknown command {command!r}{nearest(command, list(COMMANDS))}\n\n{usage()}", file=sys.stderr)
        return 2
    writes_files = command in LASTING and not HELP & set(words)
    with lasting_console() if writes_files else nullcontext():
        return _run(command, words[1:])


def _run(command: str, words: list[str]) -> int:
    """Run one command, and tell the job, if there is one, how it ended. Returns the exit code."""
    member = Member.join()
    try:
        if is_scheduler() and (JOB in os.environ or not _asks_for_processes(words)):
            importlib.import_module("tandem.backends").serve_as_scheduler()
        module = importlib.import_module(f"tandem.cli.{command}")
        with printed():
            code = module.run(words) or 0
            sys.stdout.flush()
        return member.ended(code)
    except UserError as error:
        return member.ended(2, _error(command, error))
    except BrokenPipeError:  # in `tandem ... | head`, head has ended
        drop_output(sys.stdout)
        return member.ended(UNREAD)
    except RunStopped as stopped:
        return member.ended(STOPPED, f"tandem {command}: {stopped}")
    except KeyboardInterrupt:
        return member.ended(INTERRUPTED, f"tandem {command}: interrupted")
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:  # the user's files, not a fault of the code
            return member.ended(2, f"tandem {command}: error: {unreadable(os.fsdecode(error.filename), error)}")
        member.crashed(error)
        raise


def _asks_for_processes(words: list[str]) -> bool:
    """Whether the command starts its own processes: then a MS_ROLE in the environment is left from another job."""
    return any(word.replace("_", "-").split("=")[0] == "--nproc-per-node" for word in words)


def _error(command: str, error: UserError) -> str:
    """The message of an error, with one line for each problem."""
    problems = error.problems
    if len(problems) == 1:
        return f"tandem {command}: error: {error}"
    return "\n".join([f"tandem {command}: {len(problems)} errors:", *(f"  {problem}" for problem in problems)])


def run() -> NoReturn:
    exit_with(main)


if __name__ == "__main__":
    run()
