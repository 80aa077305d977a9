"""BYOT (Zhang et al., ICCV 2019): the deepest classifier teaches the exits."""

import torch
import torch.nn.functional as F
from torch import Tensor

from loss.objective import Term
from models.exits import Outputs


class BYOT(Term):
    """L_SelfKD = sum over i = k..B of
    (1 - alpha) CE(P_i, y_soft) + alpha tau^2 KL(P_B^tau || P_i^tau) + beta ||F_i - F_B||^2
    (paper, eq. 2, with the published script's temperature and direction of the KL).

    P^tau = softmax(logits / tau). CE and KL are means over the batch. The hint ||F_i - F_B||^2 is a sum over batch
    and features where either feature is positive (as in the published script), so its weight grows with the batch.
    The final classifier is the teacher: no gradient reaches it through KL or hint. The i = B term adds only
    (1 - alpha) CE(P_B, y_soft).

    Args:
        alpha: weight of the teacher's prediction against the label.
        temperature: tau.
        beta: weight of the hint.
        from_block: k, the shallowest exit that is taught, from 1.
    """

    uses_exits = True

    def __init__(self, alpha: float, temperature: float, beta: float, from_block: int):
        super().__init__()
        self.alpha, self.tau, self.beta, self.trains_from = alpha, temperature, beta, from_block

    def forward(self, outputs: Outputs, targets: Tensor, index: Tensor, batch_size: int) -> dict[str, Tensor]:
        taught = slice(self.trains_from - 1, None)
        logits = torch.stack([*outputs.exit_logits[taught], outputs.logits])  # (C, N, K), i = k..B
        features = torch.stack([*outputs.exit_features[taught], outputs.feature])  # (C, N, D)

        all_targets = torch.cat([targets] * len(logits))
        ce = F.cross_entropy(logits.flatten(0, 1), all_targets)  # mean over classifiers and batch

        log_p = F.log_softmax(logits / self.tau, dim=2)
        teacher = log_p[-1].detach()
        kl = F.kl_div(log_p[:-1], teacher, reduction="sum", log_target=True) / len(targets)

        teacher_feature = features[-1].detach()
        is_positive = (features > 0) | (teacher_feature > 0)
        distance = (features - teacher_feature) ** 2 * is_positive  # 0 for i = B
        return {
            "byot_ce": (1 - self.alpha) * len(logits) * ce,
            "byot_kl": self.alpha * self.tau**2 * kl,
            "byot_hint": self.beta * batch_size / len(targets) * distance.sum(),
        }
