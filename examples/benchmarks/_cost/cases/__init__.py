"""What a process can be told to run.

A case is a module with `build(spec)`, which returns the function to measure, and `WARM_UP`, what the specification is
overridden with for the call that loads kernels and libraries before anything counts.
"""
