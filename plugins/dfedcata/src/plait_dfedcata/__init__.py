"""DFedCata: decentralised federated learning with Catalyst acceleration (Li et al., arXiv 2410.07272)."""

__version__ = "0.1.0"
__plait_api__ = "0.1"
