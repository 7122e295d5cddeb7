"""The preference losses that YAML names as `mixdpo.losses.NAME`: each class holds its equation, source and defaults."""

from mixdpo.losses.batch_statistics import AMaPO, BetaDPO, KTOPair
from mixdpo.losses.dpo import CDPO, DPO, DPOP, IRPO, LDDPO, MADPO, ODPO, RDPO, DPONorm, HyPO, Robust
from mixdpo.losses.other_shapes import CPO, IPO, ORPO, SPPO, APODown, APOZero, CalDPO, Hinge, SimPO, SLiC
from mixdpo.losses.preference_loss import Sum

__all__ = ["CDPO", "CPO", "DPO", "DPOP", "IPO", "IRPO", "LDDPO", "MADPO", "ODPO", "ORPO"]
__all__ += ["RDPO", "SPPO", "AMaPO", "APODown", "APOZero", "BetaDPO", "CalDPO", "DPONorm"]
__all__ += ["Hinge", "HyPO", "KTOPair", "Robust", "SLiC", "SimPO", "Sum"]
