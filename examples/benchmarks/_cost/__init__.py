"""How `cost.py` measures.

`sections` has a function for each table. It describes what to compare as plain dictionaries; `measure` starts a
`worker` process for each, which builds the step from `cases` and asks `meter` for its time or memory. `fit` bisects
with such processes. `report` writes what came back, laid out by `tables`, with the `claims` checked and the `machine`
named.
"""
