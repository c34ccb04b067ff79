"""The arithmetic behind `smartreg.divergences`.

`formulas.py` has the divergence of single positions, in the form in which small differences survive rounding.
`blockwise.py` computes the symmetric Kullback-Leibler divergence of large logits in little memory, with its gradient.
"""
