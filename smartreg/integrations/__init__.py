"""SMART inside the trainers that people already have: one file a framework, each behind its extra.

Nothing here is imported by `import smartreg`. `_regularizers.py` holds both regularizers of a run: built when they are
first used, anew when the model is another one, with their state and their running means. `_heads.py` tells from a
Hugging Face model what to compare, where, and by which divergence. `_checkpoint.py` writes the file beside a
framework's checkpoint, `_sharding.py` refuses models that are sharded, and `_stand_in.py` lets a framework's
own loss run with another call in place of the model's. The other files are the frameworks.
"""
