"""Teacher, counters and generators beside the other files of a Hugging Face checkpoint, as safetensors."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file

from smartreg.integrations._regularizers import Regularizers


def save(regularizers: Regularizers, folder: str | Path, process: int, *, main: bool) -> None:
    """Write the teacher once, and the generator of this process.

    Args:
        regularizers: Those of the run.
        folder: The checkpoint.
        process: The index of this process: generators differ.
        main: Whether this process writes what all share.
    """
    state = {key: value.contiguous() for key, value in regularizers.state_dict().items()}
    for file, prefix, mine in zip(_files(folder, process), ("bregman.", "smart."), (main, True), strict=True):
        part = {key: value for key, value in state.items() if key.startswith(prefix)}
        if part and mine:
            Path(folder).mkdir(parents=True, exist_ok=True)  # the process that saves the model may not be there yet
            save_file(part, file)


def load(regularizers: Regularizers, folder: str | Path, process: int) -> None:
    """Read what `save` wrote, for the next step.

    Raises:
        FileNotFoundError: There is no teacher, but this run has one.
    """
    teacher, own = _files(folder, process)
    if regularizers.strength.bregman_mu and not teacher.exists():
        raise FileNotFoundError(
            f"cannot resume: {teacher} is missing, which holds the teacher; the run that wrote the checkpoint had "
            f"none, or it was saved with save_only_model. To start one from its weights, load the model from there "
            f"and train without resuming"
        )
    files = [file for file in (teacher, own) if file.exists()]
    regularizers.load_state_dict({key: value for file in files for key, value in load_file(file).items()})


def _files(folder: str | Path, process: int) -> tuple[Path, Path]:
    return Path(folder) / "smartreg.safetensors", Path(folder) / f"smartreg-{process}.safetensors"
