"""SMART regularization for PyTorch (Jiang et al., ACL 2020)."""

__version__ = "0.1.0"
