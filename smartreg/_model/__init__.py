"""Running a model again, perturbed, and leaving no trace.

`embedding.py` finds the input embedding and keeps one hook on it, which records its output or adds a perturbation.
`replay.py` starts a pass from the random state, buffers and attributes that the clean pass started from, and puts back
what the clean pass left; `held.py` does it for the contents of containers and tensors that modules hold, `sources.py`
knows the generators of random numbers. `ddp.py` watches the way through DDP, and `passes.py` puts it all together:
the clean pass of a call and its replays. `stored_gradients.py` differentiates a pass at once, frees its graph, and
carries the gradients to the user's backward.
"""
