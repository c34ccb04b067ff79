"""Reading the course's files: quoting, unusable rows, limits, labels."""

import re
from pathlib import Path

import pytest
from example_tools import ROOT, SAMPLE

from minbert import InputError
from minbert.batching import SentenceTokenizer, tokenize
from minbert.data import read_file, read_split
from minbert.evaluate import read_predictions
from minbert.tasks import TASKS, parse_tasks

REAL = ROOT.parent / "shared" / "data" / "minbert"
SST, PARA, STS = TASKS["sst"], TASKS["para"], TASKS["sts"]
HEAD = "\tid\tsentence\tsentiment\n"
PAIRS = "\tid\tsentence1\tsentence2\tis_duplicate\n"


def write(folder: Path, text: str, name: str = "ids-sst-train.csv") -> Path:
    (folder / name).write_bytes(text.encode())
    return folder / name


def rows(count: int) -> str:
    return "".join(f"{i}\tid{i}\tA film numbered {i} .\t{i % 5}\n" for i in range(count))


def test_quotes_and_odd_separators_come_through(tmp_path: Path) -> None:
    text = HEAD + '7\ta1\t" ""Well , "" she said .\u2028Then she left ."\t3\n9\ta2\tIt \'s `` fine \'\' .\t0\r\n'
    split = read_file(write(tmp_path, text), SST)
    assert [row.sentences for row in split.examples] == [
        ('"Well , " she said .\u2028Then she left .',),
        ("It 's `` fine '' .",),
    ]
    assert [(row.id, row.label) for row in split.examples] == [("a1", 3.0), ("a2", 0.0)]
    assert split.skipped == []


def test_labels_are_numbers_of_their_task(tmp_path: Path) -> None:
    text = "\tid\tsentence1\tsentence2\tsimilarity\n0\ta\tx\ty\t3.75\n1\tb\tx\ty\t5\n"
    assert [row.label for row in read_file(write(tmp_path, text), STS).examples] == [3.75, 5.0]
    text = PAIRS + "0\ta\tx\ty\t1.0\n1\tb\tx\ty\t0\n"
    assert [row.label for row in read_file(write(tmp_path, text), PARA).examples] == [1.0, 0.0]


def test_rows_without_a_label_are_counted_and_located(tmp_path: Path) -> None:
    body = "".join(f"{i}\tid{i}\tIs it {i}?\tIs it {i} now?\t1.0\n" for i in range(150))
    lines = body.splitlines(keepends=True)
    lines[41] = "41\tid41\tWhere is the rest?\t\t\n"
    split = read_file(write(tmp_path, PAIRS + "".join(lines)), PARA)
    assert len(split.examples) == 149
    assert split.skipped == [f"{tmp_path / 'ids-sst-train.csv'}:43: sentence2 is empty"]
    lines[99] = "99\tid99\tToo few fields\n"
    with pytest.raises(InputError, match=r":43: sentence2 is empty; 2 of 150 lines cannot be used, more than 1%"):
        read_file(write(tmp_path, PAIRS + "".join(lines)), PARA)


def test_an_open_quote_counts_the_lines_it_swallows(tmp_path: Path) -> None:
    lines = rows(150).splitlines(keepends=True)
    lines[10] = '10\tid10\t"Never closed\t3\n'
    lines[20] = '20\tid20\tup to here "\t3\n'
    with pytest.raises(InputError, match=r":12: .* 11 of 150 lines cannot be used") as caught:
        read_file(write(tmp_path, HEAD + "".join(lines)), SST)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "train.csv: the file is empty"),
        (HEAD, "no rows after the header"),
        (rows(3), r":1: expected a tab-separated header with the columns id, sentence, sentiment"),
        (HEAD + rows(3) + "9\tz\tA film .\t5\n", r":5: sentiment: expected a whole number from 0 to 4, got '5'"),
        (HEAD + "9\tz\tA film .\t2.5\n", r":2: sentiment: expected a whole number from 0 to 4, got '2.5'"),
        (HEAD + "9\tz\tA film .\tgood\n", r":2: sentiment: expected a whole number"),
        (HEAD + "9\tz\tA film .\tinf\n", r":2: sentiment: expected a whole number"),
    ],
)
def test_files_that_are_something_else(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        read_file(write(tmp_path, text), SST)


def test_a_score_that_is_no_number(tmp_path: Path) -> None:
    text = "\tid\tsentence1\tsentence2\tsimilarity\n0\ta\tx\ty\tnan\n"
    with pytest.raises(InputError, match=r":2: similarity: expected a number from 0 to 5, got 'nan'"):
        read_file(write(tmp_path, text), STS)


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    file.write_bytes((HEAD + rows(2)).encode() + "3\tid\tcafé\t3\n".encode("latin-1"))
    with pytest.raises(InputError, match=re.escape(f"{file}:4: not valid UTF-8")):
        read_file(file, SST)


def test_a_byte_order_mark_is_not_a_column(tmp_path: Path) -> None:
    text = "\ufeffid\tsentence\tsentiment\na1\tA film .\t3\n"  # here the mark would become part of "id"
    assert len(read_file(write(tmp_path, text), SST).examples) == 1


def test_splits_and_their_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        read_split(tmp_path / "nowhere", SST, "train")
    with pytest.raises(InputError, match=r"ids-sst-train\.csv: no such file"):
        read_split(tmp_path, SST, "train")
    student = "\tid\tsentence\n" + "".join(line.rsplit("\t", 1)[0] + "\n" for line in rows(3).splitlines())
    write(tmp_path, student, "ids-sst-test-student.csv")
    unlabelled = read_split(tmp_path, SST, "test")
    assert not unlabelled.labelled
    assert [row.id for row in unlabelled.examples] == ["id0", "id1", "id2"]
    write(tmp_path, HEAD + rows(4), "ids-sst-test.csv")
    assert len(read_split(tmp_path, SST, "test").examples) == 4  # labels win
    write(tmp_path, student, "ids-sst-train.csv")
    with pytest.raises(InputError, match="the train split needs labels"):
        read_split(tmp_path, SST, "train")


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    text = "\tid\tsentence\tsentiment\tsentiment\n0\ta\tA film .\t3\t1\n"
    with pytest.raises(InputError, match=r":1: expected one column of each name, got 2 named 'sentiment'"):
        read_file(write(tmp_path, text), SST)


@pytest.mark.parametrize("label", ["1_0", "\u0663", "3.", ".5", "0x1", "1e", "1 0"])
def test_numbers_that_only_python_reads(label: str, tmp_path: Path) -> None:
    text = f"\tid\tsentence1\tsentence2\tsimilarity\n0\ta\tx\ty\t{label}\n"
    with pytest.raises(InputError, match=r":2: similarity: expected a number from 0 to 5"):
        read_file(write(tmp_path, text), STS)


def test_a_last_line_that_is_cut_off_is_not_used(tmp_path: Path) -> None:
    text = "\tid\tsentence1\tsentence2\tsimilarity\n0\ta\tx\ty\t3.75\n1\tb\tx\ty\t3.7"  # of 3.75, say
    split = read_file(write(tmp_path, text), STS)
    assert [row.id for row in split.examples] == ["a"]
    (note,) = split.skipped
    assert ":3: the file ends in the middle of this line" in note
    assert "end it with a line break" in note
    assert len(read_file(write(tmp_path, text + "\n"), STS).examples) == 2


def test_blank_lines_at_the_end_are_no_rows(tmp_path: Path) -> None:
    for end in ("\n", "\n\n\n", "   ", "\t\t\t\n"):
        split = read_file(write(tmp_path, HEAD + rows(3) + end), SST)
        assert len(split.examples) == 3
        assert split.skipped == []
    with pytest.raises(InputError, match=r":5: the line is empty; 1 of 5 lines cannot be used"):
        read_file(write(tmp_path, HEAD + rows(3) + "\n" + rows(1)), SST)


def test_ids_with_odd_separators_come_back_from_predictions(tmp_path: Path) -> None:
    ids = ["a\u2028b", "c\x0bd", "e\x1cf", "g\x85h", "i , j"]
    text = HEAD + "".join(f"0\t{name}\tA film .\t3\n" for name in ids)
    assert [row.id for row in read_file(write(tmp_path, text), SST).examples] == ids
    file = write(tmp_path, "id \t Predicted_Sentiment \n" + "".join(f"{name} , 3 \n" for name in ids), "out.csv")
    assert read_predictions(file) == [(name, 3.0) for name in ids]
    text = HEAD + '0\t"a\nb"\tA film .\t3\n' + rows(300)  # such an id would need two lines
    assert read_file(write(tmp_path, text), SST).skipped == [
        f"{tmp_path / 'ids-sst-train.csv'}:2: id holds a line break"
    ]


def test_limits_are_nested_and_in_file_order(tmp_path: Path) -> None:
    write(tmp_path, HEAD + rows(50))
    ids = [[row.id for row in read_split(tmp_path, SST, "train", n).examples] for n in (5, 20, 50, 99)]
    assert [len(i) for i in ids] == [5, 20, 50, 50]
    assert set(ids[0]) < set(ids[1])
    assert ids[1] == sorted(ids[1], key=lambda i: int(i[2:]))
    assert ids[1] != ids[2][:20]


def test_tasks_by_name() -> None:
    assert parse_tasks("sts, sst") == ("sst", "sts")
    for wrong in ("", "sst,qqp"):
        with pytest.raises(InputError, match="--tasks: expected any of sst,para,sts,cfimdb"):
            parse_tasks(wrong)


@pytest.mark.parametrize("name", TASKS)
def test_the_sample_is_read_whole(name: str) -> None:
    for split in ("train", "dev"):
        assert read_split(SAMPLE, TASKS[name], split).skipped == []


@pytest.mark.skipif(not REAL.is_dir(), reason="../shared is missing")
def test_the_real_files() -> None:
    counts, notes = {}, []
    for task in TASKS.values():
        for split in ("train", "dev"):
            content = read_split(REAL, task, split)
            counts[task.name, split] = len(content.examples)
            notes += content.skipped
    assert counts == {
        ("sst", "train"): 8544, ("sst", "dev"): 1101, ("para", "train"): 12999, ("para", "dev"): 1999,
        ("sts", "train"): 6040, ("sts", "dev"): 431, ("cfimdb", "train"): 1707, ("cfimdb", "dev"): 245,
    }  # fmt: skip
    assert [note.removeprefix(f"{REAL}/") for note in notes] == [
        "quora-train.csv:2577: is_duplicate is empty",
        "quora-dev.csv:1222: sentence2 is empty",
    ]


def test_sentences_beyond_the_length_are_counted(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "film"]))
    tokens = tokenize(read_file(write(tmp_path, HEAD + rows(3)), SST), SentenceTokenizer(tmp_path, 4))
    assert tokens.truncated == 3
    assert tokens.lengths == [4, 4, 4]
    longest = max(tokenize(read_file(write(tmp_path, HEAD + rows(3)), SST), SentenceTokenizer(tmp_path, 64)).lengths)
    exact = tokenize(read_file(write(tmp_path, HEAD + rows(3)), SST), SentenceTokenizer(tmp_path, longest))
    assert (max(exact.lengths), exact.truncated) == (longest, 0)  # as long as may be: nothing was cut
