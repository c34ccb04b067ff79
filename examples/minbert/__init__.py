"""minBERT from scratch, and the multitask fine-tuning example built on it.

The five lines that add SMART to a training step are in `objective.py`. Around them, from the outside in:

cli.py          the command line; `run.py` makes the run that it asks for
settings.py     every setting: its flag, its range, the argument of the library that it becomes
train.py        the loop; with `optimizer.py` (AdamW, learning rate) and `progress.py` (losses, memory, SIGTERM)
objective.py    the loss of a batch: task loss, smoothness, Bregman term
model.py        one encoder, one head a task; on `bert.py` (the encoder) and `pretrained.py` (its weights)
tasks.py        the four tasks, their losses and metrics
data.py         reading the files; `batching.py` makes tensors of them
evaluate.py     metrics and predictions of a split
report.py       what a run prints, `metrics.json`, the figure; `words.py` what that means, in sentences
run_folder.py   the folder of a run: who may work in it, what is in it
checkpoint.py   how a run survives being killed
resume.py       what of a run is in a checkpoint, and going on from it
files.py        reading the files of others, writing its own
distributed.py  devices and processes
extras.py       where a method that no setting knows is added to the trainer
study/          configurations compared over seeds; regularizers compared at equal budgets
"""


class InputError(Exception):
    """What the user gave cannot be used; the message is one line that says what, where and how to fix it.

    The command line prints it without a traceback and exits with code 2. Anything else that escapes is a bug.
    """


class OutputError(Exception):
    """A file cannot be written: the disk is full, or may not be written to. One line, exit code 3."""


class Diverged(Exception):
    """The loss is no number any more. One line that says at which step and what to do, exit code 4."""
