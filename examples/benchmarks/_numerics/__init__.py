"""How `numerics.py` measures.

`subject` is the model and its sentences in a chosen precision, with the matrix products of accelerators
(`float32_accumulation`); `facts` has a function for each table, from the subject to rows of numbers; `figures` draws
them.
"""
