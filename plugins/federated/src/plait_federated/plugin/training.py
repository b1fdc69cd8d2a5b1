"""The baselines: one class each, whose rule is in :mod:`plait_federated.rounds`."""

from __future__ import annotations

import attrs
from plait.fields import field, in_range

from plait_federated import rounds
from plait_federated.methods import Centralised, Decentralised, Proximal, SharpnessAware
from plait_federated.rounds import Gossip, Server


@attrs.frozen(kw_only=True)
class DPSGD(Decentralised):
    """D-PSGD: mix with the neighbours, then one mini-batch step (Lian et al., NeurIPS 2017)."""

    local_steps: int | None = field(1, "mini-batch steps in a round; null does whole epochs", in_range(1))

    def rule(self) -> Gossip:
        return rounds.dfedavg()


@attrs.frozen(kw_only=True)
class DFedAvg(Decentralised):
    """DFedAvg: mix with the neighbours, then local SGD (Sun et al., TPAMI 2022)."""

    def rule(self) -> Gossip:
        return rounds.dfedavg()


@attrs.frozen(kw_only=True)
class DFedAvgM(Decentralised):
    """DFedAvgM: DFedAvg with heavy-ball momentum in local training (Sun et al., TPAMI 2022)."""

    momentum: float = field(0.9, "of the heavy ball, reset every round", in_range(0, 1, high_open=True))

    def rule(self) -> Gossip:
        return rounds.dfedavgm(self.momentum)


@attrs.frozen(kw_only=True)
class DFedSAM(SharpnessAware, Decentralised):
    """DFedSAM: sharpness-aware local steps; DFedSAM-MGS with several gossip steps (Shi et al., ICML 2023)."""

    gossip_steps: int = field(1, "how often a round mixes; more than 1 is DFedSAM-MGS", in_range(1))

    def rule(self) -> Gossip:
        return rounds.dfedsam(self.rho, self.gossip_steps)


@attrs.frozen(kw_only=True)
class DFedProx(Proximal, Decentralised):
    """DFedAvg with a proximal term around the mixed model: the proximal part of DFedCata alone."""

    def rule(self) -> Gossip:
        return rounds.dfedprox(self.prox_lambda)


@attrs.frozen(kw_only=True)
class FedAvg(Centralised):
    """FedAvg: a server averages the active clients' local SGD (McMahan et al., AISTATS 2017)."""

    def rule(self) -> Server:
        return rounds.fedavg(self.active_ratio, self.server_learning_rate, self.weights)


@attrs.frozen(kw_only=True)
class FedProx(Proximal, Centralised):
    """FedProx: FedAvg with a proximal term around the server's model (Li et al., MLSys 2020)."""

    def rule(self) -> Server:
        return rounds.fedprox(self.active_ratio, self.server_learning_rate, self.prox_lambda, self.weights)


@attrs.frozen(kw_only=True)
class FedSAM(SharpnessAware, Centralised):
    """FedSAM: FedAvg with sharpness-aware local steps (Qu et al., ICML 2022)."""

    def rule(self) -> Server:
        return rounds.fedsam(self.active_ratio, self.server_learning_rate, self.rho, self.weights)


@attrs.frozen(kw_only=True)
class Scaffold(Centralised):
    """SCAFFOLD: FedAvg with control variates against client drift (Karimireddy et al., ICML 2020)."""

    def rule(self) -> Server:
        return rounds.scaffold(self.active_ratio, self.server_learning_rate, self.weights)
