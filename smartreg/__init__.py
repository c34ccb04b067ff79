"""SMART regularization for PyTorch (Jiang et al., ACL 2020)."""

from smartreg._outputs import token_mask
from smartreg._warnings import SmartWarning
from smartreg.bregman import MomentumBregman, paper_beta, suggested_beta
from smartreg.diagnosis import diagnose
from smartreg.divergences import binary_symmetric_kl, hellinger, jensen_shannon, kl, mse, symmetric_kl
from smartreg.functional import smoothness_penalty
from smartreg.results import SmartOutput
from smartreg.schedule import SlantedTriangularLR
from smartreg.smart import SmartLoss

__version__ = "0.1.0"

__all__ = [
    "MomentumBregman",
    "SlantedTriangularLR",
    "SmartLoss",
    "SmartOutput",
    "SmartWarning",
    "binary_symmetric_kl",
    "diagnose",
    "hellinger",
    "jensen_shannon",
    "kl",
    "mse",
    "paper_beta",
    "smoothness_penalty",
    "suggested_beta",
    "symmetric_kl",
    "token_mask",
]
