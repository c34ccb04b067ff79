"""`examples/minbert_multitask.py`: its command line, and the exit code of whatever happens."""

import argparse
import io
import sys
import typing
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from typing import Any, NoReturn

import torch
from tqdm import tqdm

from smartreg import SmartWarning

from . import Diverged, InputError, OutputError, distributed, files
from .evaluate import evaluate_run
from .files import one_line
from .run import train_run
from .settings import TABLE, Settings, flag
from .train import Stopped

FIRST = (
    *("config", "option", "tasks", "data_dir", "epochs", "batch_size", "lr", "lambda_s", "mu", "seed"),
    *("output_dir", "resume"),
)
"""The twelve flags that `--help` lists before the others."""

EPILOG = """\
examples:
  python examples/minbert_multitask.py
  python examples/minbert_multitask.py --config vanilla --data-dir DATA --train-limit 512
  python examples/minbert_multitask.py --option pretrain --output-dir runs/first
  python examples/minbert_multitask.py --init-from runs/first --output-dir runs/second
  python examples/minbert_multitask.py --output-dir runs/second --resume
  python examples/minbert_multitask.py --evaluate runs/second --data-dir DATA --split test
  torchrun --nproc-per-node 2 examples/minbert_multitask.py
"""


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints end like those about data: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see --help)")


def build_parser() -> Parser:
    """All flags. None has a default here, so that one can tell what the user gave (see `settings.resolve`)."""
    parser = Parser(
        usage="%(prog)s [flags]",
        description="Fine-tunes a BERT encoder on sentiment, paraphrase and similarity, with or without SMART.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    titles = dict.fromkeys(["used most", *(row.group for row in TABLE.values())])
    groups = {title: parser.add_argument_group(title) for title in titles}
    for field in fields(Settings):
        row = TABLE[field.name]
        shown = ",".join(field.default) if isinstance(field.default, tuple) else field.default
        text = row.text if shown in (None, False) else f"{row.text} (default: {shown})"
        kinds = typing.get_args(field.type) or (field.type,)  # int | None → (int, NoneType)
        options: dict[str, Any] = {"action": "store_true"}
        if bool not in kinds:
            number = next((kind for kind in (int, float) if kind in kinds), None)
            letter = {int: "N", float: "X"}.get(number) if row.choices is None else None
            options = {"type": row.read or number, "choices": row.choices, "metavar": row.metavar or letter}
        group = groups["used most" if field.name in FIRST else row.group]
        group.add_argument(flag(field.name), help=text, **options)

    add = groups["used most"].add_argument
    add("--output-dir", help="folder of the run (default: a new one in runs/)", metavar="DIR")
    add("--resume", help="go on from the last checkpoint in --output-dir", action="store_true")
    add = groups["what to run"].add_argument
    add("--evaluate", help="train nothing; print this run's metrics as one JSON object", metavar="RUN_DIR")
    add("--split", help="what --evaluate evaluates (default: dev)", choices=("dev", "test"))
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code (see `exit_code`)."""

    def work() -> int:
        given = vars(build_parser().parse_args(arguments))
        return evaluate_run(given) if "evaluate" in given else train_run(given)

    return exit_code(work, "--resume goes on from the last checkpoint")


def exit_code(work: Callable[[], int], after_interrupt: str) -> int:
    """Does some work and returns its exit code.

    0: done, even where nobody reads the output any more;
    2: what was given cannot be used; 3: a file cannot be written; 4: the loss is no number any more;
    130: Ctrl-C; 143: SIGTERM, after saving. All but 0 come with one line on stderr.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be no valid Unicode
    try:
        with lines_for_warnings():
            code = work()
            if sys.stdout is not None:  # closed by whoever started this
                sys.stdout.flush()
            return code
    except BrokenPipeError:  # the reader has seen enough, as `head` does; nothing is left to say at exit either
        files.to_nowhere(sys.stdout)
        return 0
    except (InputError, OutputError, Diverged) as error:
        files.tell(f"error: {one_line(error)}")
        return {InputError: 2, OutputError: 3, Diverged: 4}[type(error)]
    except torch.OutOfMemoryError as error:
        files.tell(
            f"error: out of memory on the device ({one_line(error, 200)}); a smaller --batch-size with --grad-accum "
            f"gives the same updates, --memory-efficient and --gradient-checkpointing take less memory for more time"
        )
        return 2
    except OSError as error:  # a name too long, a folder without permission
        files.tell(f"error: {one_line(error)}")
        return 2
    except Stopped:
        return 143
    except KeyboardInterrupt:
        files.tell(f"interrupted; {after_interrupt}")
        return 130
    finally:
        distributed.leave()


@contextmanager
def lines_for_warnings() -> Iterator[None]:
    """Shows each warning of the library as one line.

    That outputs are no numbers is held back until the block ends, and then left to the error of a run that diverged.
    """
    before, held = warnings.showwarning, []

    def show(message: Warning | str, category: type[Warning], *place: Any) -> None:
        if not issubclass(category, SmartWarning):
            before(message, category, *place)
        elif str(message).startswith("the clean output of the model is not finite"):
            held.append(message)
        else:
            _tell(message)

    warnings.showwarning = show
    try:
        yield
    except Diverged:
        held.clear()
        raise
    finally:
        warnings.showwarning = before
        for message in held:
            _tell(message)


def _tell(warning: Warning | str) -> None:
    with suppress(BrokenPipeError):  # nobody reads it
        tqdm.write(f"warning: {one_line(warning)}", file=sys.stderr)  # which takes a bar away for as long as it writes
