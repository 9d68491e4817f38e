"""A linear probe: multinomial logistic regression on the features of a frozen encoder.

It is fitted as CLIP's authors do it (arXiv 2103.00020, appendix A.3): L-BFGS for at most 1,000 iterations, the strength
of the L2 penalty by a search between 1e-6 and 1e6 on a part of the training images, then a fit on all of them. Strength
is said as in scikit-learn, whose `LogisticRegression` has the same optimum:

    minimise  C * sum of cross-entropies + 1/2 * sum of squared weights        (biases are free)

For two labels scikit-learn fits one vector where there are two here, which is the same with twice the `C` there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm.recognition.splits import stratified_split

ITERATIONS = 1_000
TOLERANCE = 1e-6
"""The largest entry of the gradient, of the mean over images, at which the fit is done."""
HISTORY = 20
COARSE, RANGE, FINE = 2.0, 6.0, 0.125
"""Of the search, in powers of ten: its first step, how far from 1 it goes, and its last step."""
VALIDATION_SHARE = 0.2


@dataclass(frozen=True)
class LinearProbe:
    """Attributes:
    weight: `[labels, D]`, float64.
    bias: `[labels]`.
    c: the `C` that it was fitted with.
    converged: whether the fit was done before its iterations were.
    """

    weight: Tensor
    bias: Tensor
    c: float
    converged: bool

    def scores(self, features: Tensor) -> Tensor:
        """Logits `[N, labels]` of `features [N, D]`."""
        return F.linear(features.to(self.weight), self.weight, self.bias)


def fit(
    features: Tensor,
    targets: Tensor,
    num_labels: int,
    c: float,
    *,
    start: LinearProbe | None = None,
) -> LinearProbe:
    """The probe of `features [N, D]`, whose labels are `targets [N]`, from 0 on. The optimum is one, but for the sum of
    the biases, which changes nothing; `start` is where the way to it begins.

    Raises ValueError if a label has no image: its bias would go down for ever.
    """
    counts = torch.bincount(targets, minlength=num_labels)
    if not counts.all():
        raise ValueError(f"label {int(counts.argmin())} has no image to learn from")
    # Biases are free, so features may be moved, and around zero the fit takes fewer steps.
    centre = features.double().mean(dim=0)
    centred = features.double() - centre
    # With a small C the objective is much steeper in the weights than in the biases; scaled, they are alike.
    scale = min(1.0, c * len(features)) ** 0.5
    weight = (start.weight / scale if start else centred.new_zeros(num_labels, features.shape[1])).requires_grad_()
    bias = (start.bias + start.weight @ centre if start else centred.new_zeros(num_labels)).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=ITERATIONS,
        max_eval=2 * ITERATIONS,
        tolerance_grad=TOLERANCE,
        tolerance_change=0.0,
        history_size=HISTORY,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        scaled = weight * scale
        logits = F.linear(centred, scaled, bias)
        loss = F.cross_entropy(logits, targets) + scaled.square().sum() / (2 * c * len(features))
        loss.backward()
        return loss

    optimizer.step(objective)
    objective()
    converged = all(each.grad is not None and bool((each.grad.abs() <= TOLERANCE).all()) for each in (weight, bias))
    weight, bias = weight.detach() * scale, bias.detach()
    return LinearProbe(weight, bias - weight @ centre, c, converged)


def choose_c(
    features: Tensor, targets: Tensor, validation: Tensor, validation_targets: Tensor, num_labels: int
) -> float:
    """The `C` with which the probe of `features [N, D]` is right most often on `validation [M, D]`; of those that are
    equally often, the one whose cross-entropy there is lowest.

    First each second power of ten is tried; then the step is halved around the best, down to eight steps a decade.
    """
    found: dict[float, tuple[float, float]] = {}
    last: LinearProbe | None = None
    exponents = [-RANGE + COARSE * n for n in range(round(2 * RANGE / COARSE) + 1)]
    step = COARSE
    while True:
        for exponent in exponents:
            last = fit(features, targets, num_labels, 10**exponent, start=last)
            scores = last.scores(validation)
            right = (scores.argmax(dim=-1) == validation_targets).double().mean()
            found[exponent] = float(right), -float(F.cross_entropy(scores, validation_targets))
        best = max(found, key=found.__getitem__)
        if step <= FINE:
            return float(10**best)
        step /= 2
        exponents = [each for each in (best - step, best + step) if abs(each) <= RANGE]


def fit_chosen(features: Tensor, targets: Tensor, num_labels: int, *, seed: int = 0) -> LinearProbe:
    """The probe of `features [N, D]` with the `C` that [is best][`choose_c`] on a fifth of them, drawn by `seed`.

    Raises ValueError as [`fit`], and if no label has two images.
    """
    learn, check = stratified_split(targets.tolist(), VALIDATION_SHARE, seed)
    if not check:
        raise ValueError("no label has an image to choose C by; two of a label are needed")
    chosen = choose_c(features[learn], targets[learn], features[check], targets[check], num_labels)
    return fit(features, targets, num_labels, chosen)
