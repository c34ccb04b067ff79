"""Two comparisons.

`examples/minbert_study.py` compares the configurations over seeds, as the report does: `cli.py` one study of it all,
`runs.py` its runs, `statistics.py` the intervals of their differences, `summary.py` the table and the figures;
`pair.py` makes the differences of two runs.

`examples/minbert_arms.py` asks what a regularizer is worth (the protocol is docs/study.md), from the outside in:

arms_cli.py      its commands
workers.py       makes the runs that are missing, on a few processes
stages.py        which runs there are, and which come next: searches by halving, estimates
trial.py         one run, from arm and seed to record
arms.py          the table of arms; `methods.py` has those that are no setting of the example
split.py         rows to train on, to choose on, to judge on
measure.py       metrics by row, calibration; `perturbed.py` on spoilt inputs; `zero_shot.py` before training
record.py        what a run leaves, and which records may be compared
bootstrap.py     intervals and many comparisons; `tables.py` and `figures.py` show them
"""
