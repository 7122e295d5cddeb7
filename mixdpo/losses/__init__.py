"""The preference losses that YAML names as `mixdpo.losses.NAME`: each class holds its equation, source and defaults."""

from mixdpo.losses.batch_statistics import BetaDPO, KTOPair
from mixdpo.losses.dpo import CDPO, DPO, DPOP, IRPO, LDDPO, RDPO, DPONorm, Robust
from mixdpo.losses.other_shapes import CPO, IPO, ORPO, SPPO, APODown, APOZero, CalDPO, Hinge, SimPO, SLiC

__all__ = ["CDPO", "CPO", "DPO", "DPOP", "IPO", "IRPO", "LDDPO", "ORPO", "RDPO", "SPPO"]
__all__ += ["APODown", "APOZero", "BetaDPO", "CalDPO", "DPONorm", "Hinge", "KTOPair", "Robust", "SLiC", "SimPO"]
