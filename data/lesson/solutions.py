"""Answers to the exercises of the lesson. The tests grade them as they grade yours."""

import torch
from torch.nn.functional import logsigmoid


def ulma_loss(logps, ref_logps, labels, beta, log_z):
    """Exercise 1.

    log(1 − σ(r)) would be −∞ at r = 100, where float32 rounds σ(r) to 1; log σ(−r) is right.
    """
    r = beta * (logps - ref_logps + log_z)
    return torch.where(labels == 1, -logps, -logsigmoid(-r))


def weights_at_beta_2():
    """Exercise 2.

    The rewards are 2 and −4. Point-wise DPO's weights are 2(1 − σ(2)) and −2σ(−4). SFT's
    have no β, and ULMA has SFT's for the demonstration and point-wise DPO's for the thumbs-down.
    """
    return [1, 0, +0.238, -0.036, 1, -0.036]


def first_weights(beta, log_z, mean_label):
    """Exercise 3.

    With log Z = 0 every row is pushed with β/2, up or down. With one demonstration for five
    thumbs-down the mean is β(1/6 − 1/2) = −β/3: on the whole the model is pushed away from all that
    it says, to texts that nobody rated. At β = 0.1 this lasts, for a thumbs-down still has a fifth
    of its first weight when it is 22 nats less likely. So exact match falls from 0.302 to 0.053, in
    texts such as "Rollll every blankets and box it snugly." With the constant of step 2 the mean is
    0, and exact match rises to 0.525.
    """
    sigma = torch.as_tensor(beta * log_z).sigmoid()
    return beta * (1 - sigma), -beta * sigma, beta * (mean_label - sigma)


def ulma_optimum(ref, rated, labels, beta):
    """Exercise 4.

    It is the distribution of the rated responses with label 1; all others have probability 0. That
    is where SFT's loss, the first term, is least. The second term is never below 0, and it is 0
    where all responses of label 0 have probability 0, as there. So both are least at one place.
    Neither β nor π_ref is needed. ULMA and SFT differ on the way there, and at prompts that have no
    response of label 1: all differences in the lesson are of that sort.
    """
    return rated * labels / (rated * labels).sum()


def response_logps(logits, input_ids, response_mask):
    """Exercise 5.

    The broken version removes the first column. nonzero() then numbers the other columns from 0, so
    every position is one too low. The last token of the prompt counts, a colon, and the end of the
    response does not. The base model already knows how to end, so its samples stay as good. But it
    has never learned to predict a prompt. It hardly learns the colon now, for the thumbs-down push
    it down. So the colon stays unlikely, and that is what the perplexity shows.
    """
    logps = logits[:, :-1].log_softmax(-1)
    token_logps = logps.gather(-1, input_ids[:, 1:].unsqueeze(-1)).squeeze(-1)
    return (token_logps * response_mask[:, 1:]).sum(1)


def kto_loss(logps, ref_logps, labels, beta, kl):
    """Exercise 6.

    In place of log σ stands 1 − σ. So the weight is βσ(r)(1 − σ(r)). It is largest at r = 0, where
    it is β/4, and fades at both ends: KTO also gives up on demonstrations that are out of reach.
    """
    r = beta * (logps - ref_logps + kto_log_z(kl))
    return 1 - torch.where(labels == 1, r, -r).sigmoid()


def kto_log_z(kl):
    """Exercise 6: minus the estimated KL."""
    return -kl
