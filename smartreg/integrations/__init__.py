"""SMART inside the trainers that people already have: one file a framework, each behind its extra.

Nothing here is imported by `import smartreg`. `_regularizers.py` holds both regularizers of a run: built when they are
first used, anew when the model is another one, with their state and their running means. `_heads.py` tells from a
Hugging Face model what to compare, where, and by which divergence. The other files are the frameworks.
"""
