"""Configurations compared over seeds: `runs.py` makes the runs, `statistics.py` the intervals of their differences,
`summary.py` the table and the figures, and `cli.py` one study of it all.
"""
