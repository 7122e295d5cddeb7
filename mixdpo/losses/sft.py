"""The loss of a hard pair."""

from torch import Tensor

from mixdpo.model.fused_head import SequenceLogProbs


def sft(chosen: SequenceLogProbs) -> Tensor:
    """−s_w / L_w: negative log-likelihood of the chosen response, a mean over the response's tokens. (B,)

    The mean is taken per pair, not over the tokens of the batch: long responses do not outweigh short ones. On cleaned
    tokens sum and length are weighted, −Σ w log p / Σ w. A response that keeps no token has loss 0.
    """
    return -chosen.means
