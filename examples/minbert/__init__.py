"""minBERT from scratch, and the multitask fine-tuning example built on it.

Read `encoder.py` for the model, `regularized.py` for the five lines that add SMART to a training step, and
`training.py` for the loop around them. `examples/minbert_multitask.py` wires the parts together.
"""
