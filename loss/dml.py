"""DML (Zhang et al., CVPR 2018) between the exits and the final classifier, the paper's mutual feature learning."""

import torch
import torch.nn.functional as F
from torch import Tensor

from loss.objective import Term
from models.exits import Outputs


class DML(Term):
    """L_DMFL = 1 / (B - 1) sum over i < B of KL(F_i || F_B) + KL(F_B || F_i)   (paper, eq. 3).

    F is the feature, softmaxed over its channels; mean over the batch, gradient both ways.

    Args:
        on_output: compare the classifiers' logits (N, K) in place of the features (N, D).
    """

    uses_exits = True

    def __init__(self, on_output: bool = False):
        super().__init__()
        self.on_output = on_output
        self.trains_from = 1 if on_output else None

    def forward(self, outputs: Outputs, targets: Tensor, index: Tensor, batch_size: int) -> dict[str, Tensor]:
        if self.on_output:
            final, exits = outputs.logits, outputs.exit_logits
        else:
            final, exits = outputs.feature, outputs.exit_features
        log_p = F.log_softmax(torch.stack(exits), dim=2)  # (B - 1, N, D)
        log_q = F.log_softmax(final, dim=1)
        # KL(p || q) + KL(q || p) = sum over channels of (p - q) (log p - log q)
        divergence = ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(dim=2)
        return {"dml": divergence.mean()}


class PublishedDML(Term):
    """The published script's value for `--DML`: 1 / (B - 1) sum over i < B of CE(F_i, F_B) + CE(F_B, F_i), which is
    eq. 3 plus the entropies of both sides, as a number without a gradient."""

    uses_exits = True

    @torch.no_grad()
    def forward(self, outputs: Outputs, targets: Tensor, index: Tensor, batch_size: int) -> dict[str, Tensor]:
        log_p = F.log_softmax(torch.stack(outputs.exit_features), dim=2)  # (B - 1, N, D)
        log_q = F.log_softmax(outputs.feature, dim=1)
        cross_entropies = -(log_p.exp() * log_q + log_q.exp() * log_p).sum(dim=2)
        return {"dml": cross_entropies.mean()}
