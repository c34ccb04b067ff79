r"""The mathematics of the search, which knows nothing of models.

Everything adversarial is about one function, \(\delta \mapsto \ell(f(x + \delta), f(x))\): the `Objective`
(`objective.py`), made of a function that runs f with a perturbation. `settings.py` holds what the user chose, `ball.py`
the geometry of one embedding look-up (units, noise, projection, step), `extent.py` which of its entries one norm is
taken over, `start.py` the balls of a batch and where the search begins in them, and `search.py` goes from there, step
by step, to the perturbation that moves the output most. `rules.py` has the steps, `adversary.py` puts all this together
for one batch, and `looks.py` warns of calls that did nothing. `precision.py` asks whether the dtype in use can carry
such a perturbation at all. `sweep.py` measures what each size of it does, and `verdict.py` which sizes are worth it.
"""
