"""BYOT (Zhang et al., ICCV 2019): the deepest classifier teaches the exits."""

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

    def __init__(self, alpha: float, temperature: float, beta: float, from_block: int):
        super().__init__()
        self.alpha, self.tau, self.beta, self.from_block = alpha, temperature, beta, from_block

    def forward(self, outputs: Outputs, targets: Tensor, index: Tensor, batch_size: int) -> dict[str, Tensor]:
        ce = F.cross_entropy(outputs.logits, targets)
        kl = hint = ce.new_zeros(())
        teacher = F.log_softmax(outputs.logits.detach() / self.tau, dim=1)
        teacher_feature = outputs.feature.detach()
        students = slice(self.from_block - 1, None)
        for logits, feature in zip(outputs.exit_logits[students], outputs.exit_features[students], strict=True):
            ce = ce + F.cross_entropy(logits, targets)
            student = F.log_softmax(logits / self.tau, dim=1)
            kl = kl + F.kl_div(student, teacher, reduction="batchmean", log_target=True)
            mask = (feature > 0) | (teacher_feature > 0)
            hint = hint + ((feature - teacher_feature) ** 2 * mask).sum(dim=1).mean()
        return {
            "byot_ce": (1 - self.alpha) * ce,
            "byot_kl": self.alpha * self.tau**2 * kl,
            "byot_hint": self.beta * batch_size * hint,
        }
