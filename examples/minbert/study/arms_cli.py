"""`examples/minbert_arms.py`: makes the runs of a stage, and the tables and figures of what is there."""

import os
from argparse import Namespace
from pathlib import Path

from .. import InputError
from ..cli import Parser, exit_code
from ..files import write_json, write_text
from . import figures, pair, tables, zero_shot
from .record import RESULTS, ZERO_SHOT, read
from .stages import STAGES
from .workers import complete, remaining


def build_parser() -> Parser:
    """The commands and their flags."""
    parser = Parser(description="Compares SMART with other regularizers; docs/study.md is the protocol.")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="make the runs of stages that are missing")
    run.add_argument("stages", nargs="+", choices=STAGES, metavar="STAGE", help=", ".join(STAGES))
    run.add_argument("--data-dir", required=True, metavar="DIR", help="folder in the CS224N layout")
    run.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default: cores)")
    run.add_argument("--device", default="cpu", choices=("cpu", "cuda", "mps"), help="default: cpu")
    untrained = commands.add_parser("untrained", help="measure what there is before any training")
    untrained.add_argument("--data-dir", required=True, metavar="DIR", help="folder in the CS224N layout")
    status = commands.add_parser("status", help="how many runs of each stage are done")
    report = commands.add_parser("report", help="tables and figures of the records")
    report.add_argument("--output-dir", default="docs/study", metavar="DIR", help="default: docs/study")
    two = commands.add_parser("pair", help="two runs of minbert_multitask.py: the difference on dev, with its interval")
    two.add_argument("run", metavar="RUN_DIR")
    two.add_argument("other", metavar="OTHER_DIR")
    for command in (run, untrained, status, report):
        command.add_argument("--results", default=str(RESULTS), metavar="DIR", help="folder of the records")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns the exit code, as those of a run."""

    def work() -> int:
        obey(build_parser().parse_args(arguments))
        return 0

    return exit_code(work, "the same command goes on")


def obey(options: Namespace) -> None:
    """Does what the command line says."""
    if options.command == "pair":
        print("\n".join(pair.lines(Path(options.run), Path(options.other))))
        return
    results = Path(options.results)
    if options.command == "run":
        if options.workers < 1:
            raise InputError(f"--workers: expected a whole number of at least 1, got {options.workers}")
        for name in options.stages:
            complete(name, results, Path(options.data_dir), workers=options.workers, device=options.device)
    elif options.command == "untrained":
        write_json(results / ZERO_SHOT, zero_shot.measure(Path(options.data_dir)))
    elif options.command == "status":
        show(results)
    else:
        folder = Path(options.output_dir)
        write_text(folder / "tables.md", tables.make(results))
        for file in (folder / "tables.md", *figures.make(results, folder)):
            print(file)


def show(results: Path) -> None:
    """A line a stage: how many runs are there, and how many are not."""
    for name, stage in STAGES.items():
        records = read(results / name)
        searched = read(results / stage.settings_from) if stage.settings_from is not None else []
        try:
            left = str(remaining(stage, records, searched))
        except InputError:
            left = f"{stage.seeds * len(stage.arms)} after {stage.settings_from}"
        print(f"{name}: {len(records)} done, {left} to do")
