"""Losses of rivals, and of controls, with the arguments and results of ulma.batch_losses.

The flags below go beside those of ulma.py.
"""

import argparse
import random
from collections import defaultdict
from dataclasses import replace
from difflib import SequenceMatcher

import torch
from records import DEVICE

import ulma

LOSSES = {
    "kto": "KTO's",
    "kto-sft": "KTO's, and −log π of rows of label 1",
    "dpo": "pair-wise DPO's, on pairs of a good and a bad row with the same prompt",
    "shuffled": "point-wise DPO's, where a demonstration has the weight of another, drawn one",
    "constant-push": "of --method, where the push on thumbs-down stays what it is at first",
}
LOG_Z = {
    "mean": "minus the mean log-ratio of all rows so far, as in TRL's BCO",
    "midpoint": "minus the midpoint of the mean log-ratios of the two labels, as in BCO's paper",
    "true": "the prompt's own, from the probability of its acceptable answers",
}


def parse_flags(flags):
    """The flags of the studies, and those that are left for ulma.py."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--records", default="data", help="see records.py")
    parser.add_argument("--loss", default="", choices=["", *LOSSES])
    parser.add_argument("--z", default="", choices=["", *LOG_Z])
    parser.add_argument("--up", default=1.0, type=float, help="weight of rows of label 1")
    parser.add_argument("--down", default=1.0, type=float, help="weight of the other rows")
    parser.add_argument("--sft", default=0, type=int, help="epochs of SFT that make π_ref")
    parser.add_argument("--lora", action="store_true", help="train adapters")
    parser.add_argument("--fine-grained", action="store_true", help="see only_edits")
    parser.add_argument("--kinds", action="store_true", help="measure kinds of completion, too")
    parser.add_argument("--rated", action="store_true", help="measure training prompts, too")
    parser.add_argument("--samples", action="store_true", help="measure sampled answers, too")
    parser.add_argument("--draw", default="", help="the name of answers to keep; see store.drawn")
    return parser.parse_known_args(flags.split())


class Losses:
    """The losses of a run. Remembers every row's weight and log-ratio, in the order of training.

    A row's weight is that of ∇ log π in a descent step: positive where log π is pushed up.
    """

    def __init__(self, own, rows):
        self.own = own
        self.seen = []  # (row, weight, log-ratio)
        self.brakes = []  # weights of demonstrations in point-wise DPO, for --loss shuffled
        self.rng = random.Random(0)
        self.rejected_of = pairs_of(rows) if own.loss == "dpo" else {}

    def __call__(self, model, rows, args):
        args = replace(args, log_z=self.log_z(rows, args))
        rated = rows + [self.rejected_of[row] for row in rows if row in self.rejected_of]
        logps = ulma.row_logps(model, rated, args)
        numbers = torch.tensor([(row.ref_logp, row.label, row.weight) for row in rated])
        ref_logps, labels, row_weights = numbers.to(logps.device).unbind(1)
        rewards = ulma.implicit_reward(logps, ref_logps, args.beta, args.log_z)
        losses, weights = self.losses_and_weights(logps, ref_logps, labels, rewards, args)
        ratios = (logps.detach() - ref_logps).tolist()
        self.seen += zip(rated, (row_weights * weights).tolist(), ratios)
        if self.own.loss == "dpo":
            row_weights = row_weights.view(2, -1).mean(0)
        return row_weights * losses, rewards.detach()[: len(rows)]

    def losses_and_weights(self, logps, ref_logps, labels, rewards, args):
        sigma, loss = rewards.detach().sigmoid(), self.own.loss
        if loss == "dpo":
            chosen, rejected = logps.chunk(2)
            losses = ulma.dpo_loss(chosen, rejected, *ref_logps.chunk(2), args.beta)
            better, worse = rewards.detach().chunk(2)
            push = args.beta * (worse - better).sigmoid()
            return losses, torch.cat((push, -push))
        if loss.startswith("kto"):
            return kto(logps, labels, rewards, args.beta, sft=float(loss == "kto-sft"))
        weights = args.beta * (labels - sigma)  # point-wise DPO
        if args.continuous:
            weights = 2 * args.beta * (labels - rewards.detach())
        if loss == "shuffled":
            weights = self.shuffle(weights, labels)
        if loss == "constant-push":
            at_first = -args.beta * torch.tensor(args.beta * args.log_z).sigmoid()
            weights = torch.where(labels == 1, weights, at_first)
        if args.method != "pointwise-dpo":
            weights = torch.where(labels == 1, 1.0, weights)
        if loss:
            return -weights * logps, weights  # its gradient has these weights
        if args.method == "sft":
            return ulma.sft_loss(logps), weights
        function = ulma.ulma_loss if args.method == "ulma" else ulma.pointwise_dpo_loss
        losses = function(logps, ref_logps, labels, args.beta, args.log_z, args.continuous)
        return losses, weights

    def shuffle(self, weights, labels):
        """Each demonstration gets the weight of one of the last 160 demonstrations."""
        weights = weights.clone()
        for i in labels.nonzero().flatten().tolist():
            self.brakes.append(weights[i].item())
            weights[i] = self.rng.choice(self.brakes[-160:])
        return weights

    def log_z(self, rows, args):
        """log Z of a batch."""
        if self.own.loss.startswith("kto"):
            return 0.0
        if self.own.z == "true":
            shares = torch.tensor([row.acceptance for row in rows], device=DEVICE)
            return shares.logit() / args.beta
        if not self.own.z or not self.seen:
            return args.log_z
        ratios = [ratio for _, _, ratio in self.seen]
        if self.own.z == "mean":
            return -ulma.mean(ratios)
        of_label = defaultdict(list)
        for row, _, ratio in self.seen:
            of_label[row.label].append(ratio)
        return -ulma.mean([ulma.mean(some) for some in of_label.values()])


def kto(logps, labels, rewards, beta, sft=0.0):
    """KTO: 1 − σ(r_θ) on label 1, σ(r_θ) on label 0; and sft × −log π of label 1.

    There are no other labels here. In place of log Z stands minus an estimate of the KL, never
    below 0. Here that is always 0, which makes it APO-zero.
    """
    losses = 1 - torch.sigmoid(torch.where(labels == 1, rewards, -rewards))
    losses = losses + sft * torch.where(labels == 1, ulma.sft_loss(logps), 0.0)
    sigma = rewards.detach().sigmoid()
    return losses, beta * sigma * (1 - sigma) * (2 * labels - 1) + sft * labels


def pairs_of(rows):
    """{chosen row: rejected row} for every good and bad row with the same prompt.

    The chosen row of a pair is a copy: a good row that is in two pairs is two keys.
    """
    rejected_of = {}
    for good in rows:
        for bad in rows:
            if good.prompt == bad.prompt and good.label == 1 and bad.label != 1:
                rejected_of[replace(good)] = bad
    return rejected_of


def only_edits(rows):
    """--fine-grained (Xu et al., arXiv 2406.02756): a mask for rejected responses.

    Of each only the tokens count that an edit to the chosen one removes. Where that is none, the
    rejected response is left out. No two pairs have the same prompt.
    """
    chosen_of = {row.prompt: row for row in rows if row.label == 1}
    for row in rows:
        if row.label == 1:
            continue
        chosen = chosen_of[row.prompt]
        after = chosen.input_ids[chosen.response_mask].tolist()
        before = row.input_ids[row.response_mask].tolist()
        counts = row.response_mask[-len(before) :]  # a view: what is set in it, is set there
        matcher = SequenceMatcher(None, before, after, autojunk=False)
        for match in matcher.get_matching_blocks():
            counts[match.a : match.a + match.size] = False
    return [row for row in rows if row.response_mask.any()]
