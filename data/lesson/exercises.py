"""The six exercises of the lesson, to be filled in. Each is graded by the tests:

    python -m pytest -q -k exercise_1

skips what is not solved yet, and passes or fails what is. (B,) is the shape of a tensor, one number
a response; logps is log π_θ(y|x), ref_logps log π_ref(y|x), and a label z is 0 or 1.
"""

import torch  # noqa: F401
from torch.nn.functional import logsigmoid  # noqa: F401


class NotSolved(NotImplementedError):
    """What the suite skips."""


def ulma_loss(logps, ref_logps, labels, beta, log_z):
    """Exercise 1. ULMA's loss of each response, (B,). It is finite at r_θ = 100, too."""
    raise NotSolved


def weights_at_beta_2():
    """Exercise 2. Six weights at β = 2, a list, to three decimals.

    SFT's, point-wise DPO's and ULMA's: of each first the demonstration's, then the thumbs-down's.
    """
    raise NotSolved


def first_weights(beta, log_z, mean_label):
    """Exercise 3. Point-wise DPO's weights of ∇ log π_θ(y|x) before the first step.

    Three numbers: of a thumbs-up, of a thumbs-down, and the mean over all rows, of which the share
    mean_label is thumbs-up.
    """
    raise NotSolved


def ulma_optimum(ref, rated, labels, beta):
    """Exercise 4. The distribution over three responses to a prompt at which ULMA's loss is least.

    ref is π_ref, (3,). rated is the share of the rows that each response has, (3,), none 0. Each
    response has one label, and not all are 0. Not all arguments may be needed.
    """
    raise NotSolved


def response_logps(logits, input_ids, response_mask):
    """Exercise 5. log π(y|x), (B,), from a model's logits, (B, T, vocabulary).

    input_ids and response_mask are (B, T), padded on the right; the mask is True on response
    tokens. The logits at t predict token t + 1.
    """
    raise NotSolved


def kto_loss(logps, ref_logps, labels, beta, kl):
    """Exercise 6. KTO's loss of each response, (B,): 1 − σ(r) where z = 1, 1 − σ(−r) elsewhere.

    Here r = β (log π_θ/π_ref − kl), and the number kl is an estimate of KL(π_θ‖π_ref).
    """
    raise NotSolved


def kto_log_z(kl):
    """Exercise 6. What KTO uses for log Z(x): r_θ with it is the r of kto_loss."""
    raise NotSolved
