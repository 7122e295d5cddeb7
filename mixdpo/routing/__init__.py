"""Who is trained how, when and how fast: what configs name."""

from mixdpo.routing.route import Routing
from mixdpo.routing.schedules import Constant, Cosine, Linear, StagedCosine, StagedLinear

__all__ = ["Constant", "Cosine", "Linear", "Routing", "StagedCosine", "StagedLinear"]
