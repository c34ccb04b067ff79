"""The command that measures cost: it runs, its files have every table, and the claims that no noise disturbs hold."""

import contextlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "benchmarks"
STANDARD, EFFICIENT, PEER = "smartreg", "smartreg, memory-efficient", "smart-pytorch"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, str(FOLDER / "cost.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400, check=False)


def test_the_command_runs_and_writes_every_form(tmp_path: Path) -> None:
    done = run("--quick", "--rounds", "1", "--threads", "1", "--sections", "divergences", "--output-dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "cost.json").read_text())
    assert done.stdout.index("agreement") < done.stdout.index("divergences"), "compared before anything is timed"
    differences = {row["compared"]: row["difference"] for row in results["agreement"]}
    assert differences["standard and memory-efficient, float64"] < 1e-12
    assert differences["plain and weight 0, float64"] < 1e-12
    assert results["divergences"][0]["form"] == "two kl_div"
    for row in results["divergences"]:
        assert {"seconds", "times", "bytes", "times_bytes", "speedup"} <= row.keys()
        assert row["seconds"] > 0
    assert results["machine"]["torch"] == importlib.metadata.version("torch")
    markdown = (tmp_path / "cost.md").read_text()
    for heading in ("Symmetric divergence of large outputs", "Machine and settings", "Summary"):
        assert f"### {heading}" in markdown
        assert heading in done.stdout


def test_grid_measures_every_variant_along_every_axis(
    benchmark: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sections, report = benchmark("_cost.sections"), benchmark("_cost.report")
    compared = []

    def compare(specs: list[dict[str, Any]], rounds: int, gauge: str, lead: int) -> list[dict[str, float]]:
        assert [spec["variant"] for spec in specs] == ["plain", STANDARD, EFFICIENT, PEER]
        assert lead == 2
        compared.append((specs[0]["batch"], specs[0]["length"], specs[0]["steps"]))
        return [
            {"seconds": n, "times": n, "times_low": n, "times_high": n + 0.1, "bytes": 1e9 * n, "times_bytes": n}
            for n in (1.0, 2.7, 3.0, 2.8)
        ]

    monkeypatch.setattr(sections, "compare", compare)
    monkeypatch.setattr(sections, "ask_once", lambda spec, _: dict.fromkeys(("plain", STANDARD, EFFICIENT, PEER), 3))
    rows = sections.grid(sections.Run("cpu", 1, 5, lambda text: None, lead=2))
    assert len(compared) == len(set(compared)), "no shape is measured twice"
    assert {(32, 128, 1), (8, 32, 1), (64, 32, 1), (8, 256, 1), (8, 128, 3)} <= set(compared)
    report.write(tmp_path, {"machine": {}, "settings": {}, "grid": rows})
    table = (tmp_path / "cost.md").read_text()
    assert "| 32 | 128 | smartreg, memory-efficient | 3,000 | 3.00× (3.00 to 3.10) | 1.00× | 3,000 | 3.00× |" in table
    for axis in ("batch", "length", "ascent steps"):
        assert f"### Growth with the {axis}" in table
    assert (tmp_path / "cost.png").stat().st_size > 1000


def test_times_are_ratios_within_a_round(
    benchmark: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine slows down in the second round: the ratio of the medians would be 1."""
    measure, asked = benchmark("_cost.measure"), []

    class Fake:
        def __init__(self, name: str, answers: list[float]) -> None:
            self.name, self.answers = name, answers

        def ask(self, command: str) -> float:
            asked.append(f"{self.name} {command}")
            return self.answers.pop(0)

    @contextlib.contextmanager
    def workers(specs: object, environment: object = None) -> Iterator[list[Fake]]:
        yield [Fake("plain", [9.0, 1.0, 2.0, 3.0]), Fake("ours", [9.0, 2.0, 2.0, 9.0])]

    monkeypatch.setattr(measure, "workers", workers)
    plain, ours = measure.compare([{}, {}], 3, warm=1, gauge=None)
    assert plain == {"seconds": 2.0, "times": 1.0, "times_low": 1.0, "times_high": 1.0}
    assert ours == {"seconds": 2.0, "times": 2.0, "times_low": 1.5, "times_high": 2.5}
    assert asked == [f"{name} seconds" for name in ("plain", "ours", "ours", "plain") * 2]


def test_leading_calls_run_right_before_the_timed_one_and_do_not_count(
    benchmark: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, asked = benchmark("_cost.measure"), []

    class Fake:
        def __init__(self, name: str) -> None:
            self.name = name

        def ask(self, command: str) -> float | None:
            asked.append(f"{self.name} {command}")
            return 2.0 if command == "seconds" else None

    @contextlib.contextmanager
    def workers(specs: object, environment: object = None) -> Iterator[list[Fake]]:
        yield [Fake("plain"), Fake("ours")]

    monkeypatch.setattr(measure, "workers", workers)
    rows = measure.compare([{}, {}], 2, lead=2, gauge=None)
    assert [row["seconds"] for row in rows] == [2.0, 2.0]
    turn = ("result", "result", "seconds")
    assert asked == [f"{name} {command}" for name in ("plain", "ours", "ours", "plain") for command in turn]


def test_a_part_measured_anew_leaves_the_others(
    benchmark: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cost = benchmark("cost")
    seconds = 1.0

    def section(name: str) -> Callable[[Any], list[dict[str, Any]]]:
        def rows(run: Any) -> list[dict[str, Any]]:
            axes = run.axes if name == "grid" else [None]
            return [{"axis": axis, "seconds": seconds} if axis else {"seconds": seconds} for axis in axes]

        return rows

    monkeypatch.setattr(cost, "SECTIONS", {name: section(name) for name in ("agreement", "grid", "averages")})
    monkeypatch.setattr(cost, "show", lambda console, results: None)
    monkeypatch.setattr(
        cost, "write", lambda folder, results: (folder / "cost.json").write_text(json.dumps(results)) and []
    )
    folder = ["--output-dir", str(tmp_path), "--sections"]
    cost.main([*folder, "agreement,grid,averages", "--rounds", "5"])
    seconds = 2.0
    cost.main([*folder, "grid", "--axes", "batch", "--rounds", "9"])
    results = json.loads((tmp_path / "cost.json").read_text())
    assert [(row["axis"], row["seconds"]) for row in results["grid"]] == [
        ("main", 1.0),
        ("batch", 2.0),
        ("length", 1.0),
        ("steps", 1.0),
    ]
    assert results["averages"] == [{"seconds": 1.0}]
    assert results["settings"]["untimed steps before each of the grid"] == 3
    assert [(place, row["rounds"]) for place, row in results["conditions"].items()] == [
        ("agreement", 9),
        ("grid, main, length, steps", 5),
        ("averages", 5),
        ("grid, batch", 9),
    ]
    with pytest.raises(SystemExit, match=r"other settings \(threads\); name another one"):
        cost.main([*folder, "averages", "--threads", "77"])
    with pytest.raises(SystemExit, match=r"other settings \(untimed steps before each of the grid\)"):
        cost.main([*folder, "grid", "--lead", "1"])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "required: --output-dir"),
        (("--output-dir", "unused", "--sections", "everything"), "expected any of agreement, grid"),
        (("--output-dir", "unused", "--rounds", "0"), "expected a whole number of at least 1, got 0"),
        (("--output-dir", "unused", "--lead", "-1"), "expected a whole number of at least 0, got -1"),
    ],
)
def test_bad_command_line(
    benchmark: Callable[[str], ModuleType],
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    expected: str,
) -> None:
    with pytest.raises(SystemExit) as ended:
        benchmark("cost").parser().parse_args(arguments)
    assert ended.value.code == 2
    assert expected in " ".join(capsys.readouterr().err.split())


def test_arithmetic_is_at_its_floor(benchmark: Callable[[str], ModuleType]) -> None:
    count = benchmark("_cost.cases.flops").count
    spec = {"size": "tiny", "batch": 2, "length": 8, "steps": 1, "device": "cpu"}
    plain, standard, efficient = (count({**spec, "variant": v}) for v in ("plain", STANDARD, EFFICIENT))
    # Attention's products have two inputs and no weight, which puts the floor slightly above 8/3 and 3.
    assert 8 / 3 - 0.05 < standard / plain < 8 / 3 + 0.05
    assert 3 - 0.05 < efficient / plain < 3 + 0.05
    two = count({**spec, "variant": STANDARD, "steps": 2})
    assert (two - standard) / plain == pytest.approx(2 / 3, abs=0.05)


def test_allocated_memory_of_the_modes(benchmark: Callable[[str], ModuleType]) -> None:
    """In what torch's allocator counts, at a size where activations outweigh weights; no process and no noise."""
    peak, build = benchmark("_cost.meter").allocated_peak_bytes, benchmark("_cost.cases.variants").build
    spec = {"size": "tiny", "batch": 64, "length": 64, "steps": 1, "device": "cpu"}
    peaks = {}
    for variant in ("plain", STANDARD, EFFICIENT, PEER):
        step = build({**spec, "variant": variant})
        step()
        peaks[variant] = peak(step)
    assert peaks[EFFICIENT] <= 1.2 * peaks["plain"]
    assert peaks[STANDARD] > 1.5 * peaks["plain"]
    assert peaks[STANDARD] <= 1.05 * peaks[PEER]


@pytest.mark.parametrize("largest", [0, 1, 5, 8, 37, 64])
def test_bisection_finds_the_largest(benchmark: Callable[[str], ModuleType], largest: int) -> None:
    tried = []

    def fits(n: int) -> bool:
        tried.append(n)
        return n <= largest

    assert benchmark("_cost.fit").bisect(fits, 8) == largest
    assert len(tried) <= 12


def test_out_of_memory_is_told_from_other_failures(
    benchmark: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = benchmark("_cost.fit")

    def fail(message: str) -> Callable[..., None]:
        def ask(*_: object) -> None:
            raise fit.WorkerError(message)

        return ask

    monkeypatch.setattr(fit, "ask_once", fail("DefaultCPUAllocator: can't allocate memory"))
    assert fit.largest_batch({}, 1, start=4) == 0
    monkeypatch.setattr(fit, "ask_once", fail("ImportError: no such module"))
    with pytest.raises(fit.WorkerError, match="no such module"):
        fit.largest_batch({}, 1, start=4)


def test_claims_follow_the_measurements(benchmark: Callable[[str], ModuleType]) -> None:
    claims = benchmark("_cost.claims").claims

    def grid(standard: float, memory: float) -> list[dict[str, Any]]:
        return [
            {"axis": "main", "variant": STANDARD, "seconds": standard, "times": standard, "times_bytes": 2.0},
            {"axis": "main", "variant": EFFICIENT, "seconds": 3.0, "times": 3.0, "times_bytes": memory},
            {"axis": "main", "variant": PEER, "seconds": 2.8, "times": 2.8, "times_bytes": 2.0},
        ]

    assert [row["holds"] for row in claims({"grid": grid(2.7, 1.1)})] == [True, True, True, True]
    assert [row["holds"] for row in claims({"grid": grid(2.9, 1.3)})] == [False, False, False, True]
    assert claims({"grid": grid(2.9, 1.3)})[0]["measured"] == "1.30×"
