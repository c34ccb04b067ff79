"""Small encoders and data sets, so that the tests of the example take moments."""

import json
import re
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from minbert.bert import BertConfig, BertEncoder

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "examples" / "minbert_multitask.py"
SAMPLE = ROOT / "examples" / "minbert" / "sample"


def tiny_encoder(folder: Path, *, dropout: float = 0.1, layers: int = 2, size: int = 16) -> Path:
    """A random BERT checkpoint in Hugging Face layout whose vocabulary is that of the sample data."""
    folder.mkdir(parents=True, exist_ok=True)
    words = sorted({word for file in SAMPLE.glob("*.csv") for word in re.findall(r"[a-z]+", file.read_text().lower())})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=size,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * size,
        max_position_embeddings=128,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=0.3,
    )
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    torch.manual_seed(0)
    save_file(BertEncoder(config).state_dict(), folder / "model.safetensors")
    return folder


def script(*arguments: str | Path, processes: int = 1, **options: object) -> subprocess.CompletedProcess[str]:
    """Runs the example as a user would, on one thread a process."""
    return subprocess.run(command(*arguments, processes=processes), **run_options(**options))  # type: ignore[call-overload,no-any-return]


def command(*arguments: str | Path, processes: int = 1, file: Path = SCRIPT) -> list[str]:
    """The command line."""
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*launch, str(file), *map(str, arguments)]


def run_options(**options: object) -> dict[str, object]:
    """Options of `subprocess.run`."""
    import os

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "COLUMNS": "160"}
    return {"capture_output": True, "text": True, "timeout": 280, "env": environment, "check": False, **options}
