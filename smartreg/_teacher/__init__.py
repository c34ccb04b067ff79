r"""The teacher \(\tilde\theta\) of `MomentumBregman`: a second module whose weights are the average of the model's.

`parameters.py` pairs the parameters of two models by name, whatever wraps them. `sharing.py` makes a copy that shares
the storage of what is frozen. `averaging.py` is one step of the average over many tensors, `momentum.py` how much of it
stays. `modes.py` looks whether eval mode answers as train mode does, `saved.py` whether a state is one of a teacher.
`teacher.py` holds the state and keeps it in step with the model: device, dtype, buffers, what is frozen and what is
trained.
"""
