"""The arithmetic behind `smartreg.divergences`.

`formulas.py` has the divergence of single positions, in the form in which small differences survive rounding.
`positions.py` checks two outputs, leaves masked positions out, and reduces what is left to one number.
`blockwise.py` computes the symmetric Kullback-Leibler divergence of large logits in little memory, with its gradient.
"""
