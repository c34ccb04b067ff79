"""Files of others, changed at random: each reader ends in an `InputError` or reads them, soon and in bounded memory.

`FUZZ=100000 pytest tests/examples/test_fuzz.py` tries so many inputs of each kind.
"""

import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from example_tools import SAMPLE, tiny_encoder

from minbert import InputError, checkpoint, run_folder
from minbert.batching import SentenceTokenizer
from minbert.cli import main
from minbert.data import read_file
from minbert.evaluate import read_predictions
from minbert.files import read_tensors
from minbert.model import encoder_config, model_shapes
from minbert.pretrained import load_encoder, read_config
from minbert.settings import Settings
from minbert.study.runs import Run, command, result
from minbert.tasks import TASKS

TIMES = int(os.environ.get("FUZZ", "40"))
SECONDS, MEMORY = 2.0, 1 << 30
WORDS = [b"null", b"-1", b"1e999", b"NaN", b"true", b'"x"', b"[]", b"{}", b"9" * 400, b"[" * 5000, b'"\\ud800"', b"\0"]
WORDS += [b"\t", b"\n", b"\r", b'"', b"\xff", "\u2028".encode(), b"0", b"18446744073709551616", b"../x", b"[/b]"]


def mutate(content: bytes, draw: random.Random) -> bytes:
    """Some bytes are changed, cut out, doubled, or replaced by what readers dislike."""
    data = bytearray(content)
    for _ in range(draw.choice([1, 1, 1, 2, 5])):
        # Most of what a safetensors file can get wrong is in its first bytes.
        at = draw.randrange(min(len(data), draw.choice([16, 600, 1 << 30])) or 1)
        kind = draw.randrange(6)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del data[at : at + draw.randint(1, 40)]
        elif kind == 2:
            data[at:at] = data[at : at + draw.randint(1, 200)]
        elif kind == 3:
            data = data[:at]
        elif kind == 4:
            data[at:at] = draw.choice(WORDS)
        else:  # a value of JSON, or a field of a row, becomes another
            ends = [i for i in range(at, min(len(data), at + 200)) if data[i] in b",}]\t\n"]
            start = max((i + 1 for i in range(at) if data[i] in b":[,\t\n"), default=0)
            data[start : (ends or [at])[0]] = draw.choice(WORDS)
    return bytes(data)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    encoder = tiny_encoder(folder / "encoder", layers=1, size=8)
    flags = ["--encoder", encoder, "--tasks", "sst", "--train-limit", 4, "--dev-limit", 4, "--epochs", 1]
    target = folder / "runs" / Run("finetune", "t-smart", 0).name
    assert main([str(flag) for flag in ["--output-dir", target, *flags]]) == 0
    shutil.copytree(SAMPLE, target / "data")
    shutil.copytree(encoder, target / "source")
    return target


def study_result(run: Path) -> object:
    cell, folder = Run("finetune", "t-smart", 0), run.parents[1]
    return result(cell, folder, command(cell, folder, ["finetune"], {"all": [], "finetune": []}))


def shapes(run: Path) -> dict[str, tuple[int, ...]]:
    return model_shapes(Settings(tasks=("sst",)), encoder_config(run / "encoder", Settings(tasks=("sst",))))


def model_of(run: Path) -> object:
    return checkpoint.load_model(checkpoint.found(run)[0], shapes(run))


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "sentiment": ("data/ids-sst-dev.csv", lambda run: read_file(run / "data/ids-sst-dev.csv", TASKS["sst"])),
    "pairs": ("data/sts-dev.csv", lambda run: read_file(run / "data/sts-dev.csv", TASKS["sts"])),
    "config": ("source/config.json", lambda run: load_encoder(run / "source")),
    "weights": ("source/model.safetensors", lambda run: load_encoder(run / "source")),
    "tokenizer": ("encoder/tokenizer.json", lambda run: SentenceTokenizer(run / "encoder", 9)(["a good film", "…"])),
    "vocabulary": ("source/vocab.txt", lambda run: SentenceTokenizer(run / "source", 9)(["a good film", "…"])),
    "settings": ("settings.json", lambda run: run_folder.saved_settings(run, "--evaluate")),
    "metrics": ("metrics.json", study_result),
    "predictions": ("predictions/sst-dev-output.csv", lambda run: read_predictions(run / READERS["predictions"][0])),
    "manifest": ("checkpoints/*/manifest.json", lambda run: checkpoint.verify(checkpoint.found(run)[0])),
    "checkpoint": ("checkpoints/*/model.safetensors", model_of),
    "state": ("checkpoints/*/state.json", lambda run: checkpoint.load_state(checkpoint.found(run)[0])),
    "tensors": ("checkpoints/*/state.safetensors", lambda run: read_tensors(next(run.glob(READERS["tensors"][0])))),
}


@pytest.mark.parametrize("kind", READERS)
def test_readers_refuse_in_one_line(kind: str, run: Path) -> None:
    pattern, read = READERS[kind]
    (file,) = run.glob(pattern)
    content = file.read_bytes()
    draw, refused = random.Random(kind), 0
    before = psutil.Process().memory_info().rss
    try:
        for i in range(TIMES):
            file.write_bytes(changed := mutate(content, draw))
            started = time.process_time()
            try:
                read(run)
            except InputError:
                refused += 1
            except BaseException as error:
                raise AssertionError(f"input {i}: {type(error).__name__}: {error}: {changed[:2000]!r}") from error
            assert time.process_time() - started < SECONDS, (i, changed[:2000])
    finally:
        file.write_bytes(content)
    assert 0 < refused <= TIMES
    assert psutil.Process().memory_info().rss - before < MEMORY


SIZES = ["vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "max_position_embeddings"]


@pytest.mark.parametrize("name", SIZES)
def test_absurd_sizes_cost_no_memory(name: str, run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run / "source", tmp_path / "encoder"))
    for value in (10**5, 10**9, 10**30, -1, 0, 1.5, "12", True, [], {}):
        (folder / "config.json").write_text(
            json.dumps({**read_config(run / "source/config.json").to_dict(), name: value})
        )
        before, started = psutil.Process().memory_info().rss, time.process_time()
        with pytest.raises(InputError, match=rf"{name}|weights do not fit|expected shape"):
            load_encoder(folder)
        assert time.process_time() - started < SECONDS
        assert psutil.Process().memory_info().rss - before < 1 << 28
