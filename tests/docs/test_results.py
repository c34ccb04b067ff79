"""The numbers of the results page are those of the tables that the committed records make."""

import json
import re
from pathlib import Path

import pytest

from minbert.settings import Settings
from minbert.study.matched import REFERENCE
from minbert.study.record import JOINT, RESULTS

DOCS = Path(__file__).parents[2] / "docs"
NUMBER = re.compile(r"[+-]?\d+\.\d+")


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def numbers(cell: str) -> list[float]:
    return [float(number) for number in NUMBER.findall(cell.replace("−", "-"))]


def tables_of(stage: str) -> str:
    return (DOCS / "study" / "tables.md").read_text("utf-8").split(f"\n## {stage}\n")[1].split("\n## ")[0]


def last_epoch(stage: str) -> dict[str, list[list[float]]]:
    """By arm and column of a stage: the mean, and with it the difference and its interval where there is one."""
    part = tables_of(stage).split(", last epoch\n")[1].split("###")[0]
    rows = [cells(line) for line in part.splitlines() if line.startswith("| ")][1:]
    return {arm: [numbers(cell) for cell in rest] for arm, *rest in rows if arm != "untrained"}


def seeds_of(stage: str) -> int:
    return int(re.findall(r"seeds: (\d+)", tables_of(stage))[0])


SECTIONS = {
    "Paraphrase: Quora": "first-para",
    "Sentiment: SST": "first",
    "Weaker weights, a smaller ball": "weaker-sst",
    "Other methods": "others-sst",
    "With settings searched": "tuned-sst",
    "Scores: STS": "first-sts",
    "A third of the default weight": "weaker-sts",
    "Paraphrase, 1,024 pairs": "size-para-1024",
    "The point of accuracy, made again": "again-para-1024",
    "Two plain runs, averaged": "two-para-1024",
    "Sentiment, 1,024 sentences": "size-sst-1024",
    "Larger weights on 1,024 sentences": "weights-sst-1024",
    "Paraphrase, 64 pairs": "size-para-64",
    "Sentiment, 64 sentences": "size-sst-64",
    "Scores, 64 pairs": "size-sts-64",
    "Where the failure came from": "causes",
}
"""The sections of the page that have a table, and the stage that it is of."""
TERMS = "What the terms weighed"
"""The section with a table of the terms, which are those of the section before it."""
PROBES = "Spoilt texts, moved embeddings, film reviews"
"""The section with a table of perturbed inputs, of the stage of the section before it."""
PROBED = ("clean", "typos", "dropped", "swapped", "embeddings 0.3", "embeddings 1", "transfer")
SUMMARY = {
    "paraphrase, 1,024 pairs": "size-para-1024",
    "paraphrase, 256": "first-para",
    "paraphrase, 64": "size-para-64",
    "sentiment, 1,024 sentences": "size-sst-1024",
    "sentiment, 256": "weaker-sst",
    "sentiment, 64": "size-sst-64",
    "scores, 64 pairs": "size-sts-64",
    "scores, 256": "first-sts",
}
"""The rows of the page's first table, which are of the default weight alone."""
DEFAULT = f"smart:{Settings.lambda_s}"
ROWS = []
for section in re.split(r"^#+ ", (DOCS / "results.md").read_text("utf-8"), flags=re.MULTILINE):
    title, _, body = section.partition("\n")
    ROWS += [(title, cells(line)) for line in body.splitlines() if line.startswith("| `")]
WEIGHED = [row for title, row in ROWS if title == TERMS]
SPOILT = [row for title, row in ROWS if title == PROBES]
ROWS = [(title, row) for title, row in ROWS if title not in (TERMS, PROBES)]


def arm_of(row: list[str]) -> str:
    return row[0].split("`")[1]


@pytest.mark.parametrize(("title", "stage"), SECTIONS.items())
def test_no_arm_is_left_out(title: str, stage: str) -> None:
    assert {arm_of(row) for where, row in ROWS if where == title} == last_epoch(stage).keys()


@pytest.mark.parametrize(("title", "row"), ROWS, ids=lambda part: part if isinstance(part, str) else arm_of(part))
def test_a_row_is_that_of_the_tables(title: str, row: list[str]) -> None:
    arm = arm_of(row)
    metric, nll, scaled, *calibration, cost = last_epoch(SECTIONS[title])[arm]
    shown = slice(0, 1) if arm == REFERENCE else slice(1, 4)
    wanted = [metric[shown], nll[shown], *(each[:1] for each in calibration[:1]), scaled[:1], cost]
    found = [numbers(cell) for cell in row[1:]]
    assert [len(cell) for cell in found] == [len(cell) for cell in wanted]
    for own, other in zip(found, wanted, strict=True):
        assert own == pytest.approx(other, abs=0.00056)


def test_the_terms_are_those_of_the_tables() -> None:
    part = tables_of("causes").split("terms of the loss in the last epoch\n")[1].split("\n#")[0]
    made = {arm: rest for arm, *rest in map(cells, part.splitlines()[3:]) if arm}
    assert [arm_of(row) for row in WEIGHED] == list(made)
    for row in WEIGHED:
        task, *terms = made[arm_of(row)]
        assert float(row[1]) == pytest.approx(float(task), abs=0.00056)
        assert [float(cell or 0) for cell in row[2:]] == [float(term or 0) for term in terms]


def test_perturbed_inputs_are_those_of_the_tables() -> None:
    part = tables_of("tuned-sst").split("### perturbed inputs, last epoch\n")[1]
    head, _, *rows = [cells(line) for line in part.splitlines() if line.startswith("|")]
    columns = [title.split(": ")[-1] for title in head]
    made = {row[0]: dict(zip(columns, row, strict=True)) for row in rows}
    assert [arm_of(row) for row in SPOILT] == list(made)
    for row in SPOILT:
        wanted = [numbers(made[arm_of(row)][name]) for name in PROBED]
        found = [numbers(cell) for cell in row[1:]]
        for own, other in zip(found, wanted, strict=True):
            assert own == pytest.approx(other[:1] if arm_of(row) == REFERENCE else other[1:4], abs=0.00056)


def test_the_search_s_losses_are_those_of_the_tables() -> None:
    text = " ".join((DOCS / "results.md").read_text("utf-8").split())
    rows = [cells(line) for line in tables_of("short-search-sst").splitlines() if line.startswith("| ")]
    (arm, *_), plain, smart, other = rows
    assert (arm, plain[0], smart[0], other[0]) == ("arm", REFERENCE, DEFAULT, "r-drop")
    assert {row[1] for row in rows[1:]} == {"0"}  # the defaults came out best
    least, median, largest = ((float(plain[i]), float(smart[i])) for i in (3, 4, 5))
    assert f"with {least[0]:.3f} in plain fine-tuning and {least[1]:.3f} in SMART" in text
    assert f"the median NLL is {median[0]:.3f} plain and {median[1]:.3f} with SMART" in text
    assert f"the largest {largest[0]:.3f} and {largest[1]:.3f}" in text


@pytest.mark.parametrize(("task", "stage"), SUMMARY.items())
def test_the_summary_is_the_default_weight_of_the_tables(task: str, stage: str) -> None:
    page = (DOCS / "results.md").read_text("utf-8")
    (row,) = (cells(line) for line in page.splitlines() if line.startswith(f"| [{task}]"))
    metric, nll, scaled, *_, cost = last_epoch(stage)[DEFAULT]
    seeds = seeds_of(stage)
    found = [numbers(cell) for cell in row[1:-1]]
    for own, other in zip(found, [metric[1:4], nll[1:4], scaled[1:4], cost], strict=True):
        assert own == pytest.approx(other, abs=0.00056)
    assert int(row[-1]) == seeds


@pytest.mark.skipif(not (RESULTS / JOINT).exists(), reason="the records are in the repository, not in the sdist")
def test_the_five_configurations_are_those_of_the_committed_study() -> None:
    runs = json.loads((RESULTS / JOINT).read_text("utf-8"))["runs"]
    page = (DOCS / "results.md").read_text("utf-8")
    rows = [cells(line) for line in page.splitlines() if line.startswith(("| pretrain |", "| finetune |"))]
    assert sorted((mode, config) for mode, config, *_ in rows) == sorted((run["mode"], run["config"]) for run in runs)
    for mode, config, *found in rows:
        (run,) = [run for run in runs if (run["mode"], run["config"]) == (mode, config)]
        sst, para, sts = (run["dev"][task] for task in ("sst", "para", "sts"))
        wanted = [sst["accuracy"], sst["nll"], run["gap"]["sst"], para["accuracy"], para["nll"], sts["pearson"]]
        assert list(map(float, found)) == pytest.approx(wanted, abs=0.00056)


@pytest.mark.parametrize("title", SECTIONS)
def test_a_section_tells_its_seeds(title: str) -> None:
    page = (DOCS / "results.md").read_text("utf-8")
    body = re.split(r"^#+ ", page.split(f"# {title}\n")[1], flags=re.MULTILINE)[0]
    words = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")
    assert f"{words[seeds_of(SECTIONS[title])]} seeds" in body


README = (DOCS.parent / "README.md").read_text("utf-8")
GAINS = {
    "1,024 Quora pairs": ("size-para-1024", "size-para-1024"),
    "256 Quora pairs": ("first-para", None),
    "1,024 SST sentences": ("size-sst-1024", "size-sst-1024"),
    "256 SST sentences": ("weaker-sst", "others-sst"),
    "256 STS pairs": ("first-sts", None),
}
"""The rows of README's table: the stage of SMART, and that of R-Drop at ten times its weight where it has run."""


@pytest.mark.parametrize(("rows", "stages"), GAINS.items())
def test_readme_s_gains_are_those_of_the_tables(rows: str, stages: tuple[str, str | None]) -> None:
    (found,) = (cells(line)[1:] for line in README.splitlines() if line.startswith(f"| {rows} |"))
    own = last_epoch(stages[0])
    rival = last_epoch(stages[1])["r-drop:5"] if stages[1] else [[], []]
    wanted = [[own[REFERENCE][i][:1], own[DEFAULT][i][1:4], rival[i][1:4]] for i in (0, 1)]
    for cell, numbers_of_tables in zip(found, [*wanted[0], *wanted[1]], strict=True):
        assert numbers(cell) == pytest.approx(numbers_of_tables, abs=0.00056)


def test_readme_has_other_numbers_of_the_tables() -> None:
    text = " ".join(README.replace("−", "-").split())
    assert len([line for line in README.splitlines() if re.match(r"\| [\d,]+ (Quora|SST|STS) ", line)]) == len(GAINS)
    plain, default = (last_epoch("weaker-sst")[arm] for arm in (REFERENCE, DEFAULT))
    assert f"brings plain fine-tuning to {last_epoch('first-para')[REFERENCE][2][0]:.3f} on the 256 Quora pairs" in text
    assert f"sentences ({seeds_of('weaker-sst')} seeds) from {plain[1][0]:.3f} to {plain[2][0]:.3f}" in text
    assert f"the default has {default[1][0]:.3f} without one and {default[2][0]:.3f} with it" in text
    (_, gap, low, high), *_ = last_epoch("again-para-1024")[DEFAULT]
    assert f"with five other seeds: {gap:+.3f} [{low:+.3f}, {high:+.3f}]" in text
    (_, gap, low, high), *_ = last_epoch("first-sts")["smart"]
    assert f"ten times the default costs {-gap:.3f} [{-high:.3f}, {-low:.3f}] of it" in text
