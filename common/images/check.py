"""A check before the work: do the images fit the network?

A checkpoint does not say how its images were normalised, in which order its colours and classes
come, or whether a max pool follows its stem. A wrong guess gives a wrong number and no error. Batch
norms remember what they saw in training: their running statistics are compared with those of
training images. What that cannot tell, the labels of training images can. Test images are not used.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import nn

from common.images.data import ImageSet
from common.images.normalisation import NORMALISATIONS
from common.network.graph import CONVOLUTION
from common.network.resnet import ResNet
from common.network.tracing import Traced

CHECK_IMAGES = 256
CHECK_MACS = 256 * 0.6e9  # bounds the time: what the default network takes for all of them
MIN_IMAGES, AUTO_IMAGES = 64, 2500
CHUNK = 32
# Mean divergences in nats a channel. Right constants give 0.002, or 0.008 if training augmented
# colours; ImageNet's for CIFAR-10's 0.014, a std of 0.25 for 0.20 0.044, others above 0.3. Networks
# trained on original pixels give 0.02 on JPEG images, whatever the constants.
FITS = 0.01
CLEARLY_WORSE = 3.0
FIRST_LOOK = 128  # images
GOOD_ACCURACY = 0.97  # from here on no alternative is tried
# Standard errors by which labels must speak for another order of colours; fewer where the first
# batch norm speaks for that order too.
STANDARD_ERRORS, STANDARD_ERRORS_AGREED = 3.0, 2.0
CONFUSED = 0.7  # of a class's images are called by one other class's name
MIN_OF_CLASS = 5  # images by which a class is judged
MIN_EXCHANGED = 2  # classes; another order moves at least two, a poor network may confuse one


@dataclass(frozen=True)
class Subject:
    """What is checked.

    Attributes:
        model: Network in eval mode, on the CPU.
        traced: The same, traced.
        train: Some training images with their labels.
    """

    model: nn.Module
    traced: Traced
    train: ImageSet

    def first(self, count: int) -> Subject:
        """Return the subject with fewer images."""
        return replace(self, train=self.train.rows(slice(count)))


@torch.inference_mode()
def find_mismatches(subject: Subject) -> list[str]:
    """Return what speaks against the settings, in words that name the flag that would mend it."""
    found = []
    normalisation = _better_normalisation(subject)
    if normalisation is not None:
        flag = f"--normalize {normalisation}"
        found.append(
            f"the first batch norm expects images normalised otherwise: {flag} fits it, the "
            "present mean and std do not"
        )
        mean, std = NORMALISATIONS[normalisation]
        subject = replace(subject, train=replace(subject.train, mean=mean, std=std))
    if pool := _better_max_pool(subject):
        found.append(f"the second batch norm expects other values: --max-pool {pool} fits it")
        return found  # labels would tell of nothing else
    return found + _check_labels(subject)


@torch.inference_mode()
def best_normalisation(subject: Subject) -> str:
    """Return the known constants that fit best.

    Where none fits the first batch norm well, the images differ in kind from those in training, and
    the accuracy on training images decides among the ones that are not far off.
    """
    scores = _score_normalisations(subject)
    lowest = min(scores.values(), default=0.0)
    if scores and lowest <= FITS:
        return min(scores, key=scores.get)
    names = [n for n in NORMALISATIONS if scores.get(n, 0) <= CLEARLY_WORSE * lowest]
    train = subject.train.rows(slice(_affordable(subject, AUTO_IMAGES)))

    def accuracy(name: str) -> float:
        mean, std = NORMALISATIONS[name]
        predictions = _logits(subject, replace(train, mean=mean, std=std)).argmax(1)
        return float((predictions == train.labels).double().mean())

    return max(names, key=accuracy)


# --- running statistics --------------------------------------------------------------------------


def _better_normalisation(subject: Subject) -> str | None:
    """Return the known constants that fit the first batch norm, if the present ones do not."""
    present = _mismatch_after_stem(subject, subject.train)
    if present is None or present <= FITS:
        return None
    scores = _score_normalisations(subject)
    best = min(scores, key=scores.get)
    return best if scores[best] <= present / CLEARLY_WORSE else None


def _score_normalisations(subject: Subject) -> dict[str, float]:
    scores = {}
    for name, (mean, std) in NORMALISATIONS.items():
        score = _mismatch_after_stem(subject, replace(subject.train, mean=mean, std=std))
        if score is not None:
            scores[name] = score
    return scores


def _mismatch_after_stem(subject: Subject, images: ImageSet) -> float | None:
    """Return the mismatch at the batch norm after the first convolution; None without one."""
    graph = subject.traced.network.graph
    for name in graph.layers:
        operation, norm = graph[name], subject.traced.norms.get(name)
        if operation.kind != CONVOLUTION or operation.inputs != (graph.input,):
            continue
        if norm is not None:
            stem, norm = map(subject.model.get_submodule, (name, norm))
            few = images.rows(slice(CHECK_IMAGES))
            return _mismatch(norm, (stem(batch) for batch, _ in few.batches(CHUNK)))
    return None


def _better_max_pool(subject: Subject) -> str | None:
    """Return ``on`` or ``off`` if the max pool after a ResNet's 3×3 stem should be changed."""
    model = subject.model
    if not isinstance(model, ResNet) or model.shape.stem_kernel != 3:
        return None
    images = subject.train.rows(slice(CHECK_IMAGES // 2))
    scores = {
        name: _mismatch(
            model.second_norm(),
            (model.into_second_norm(batch, pool) for batch, _ in images.batches(CHUNK)),
        )
        for name, pool in {"on": nn.MaxPool2d(3, 2, 1), "off": nn.Identity()}.items()
    }
    present = "off" if isinstance(model.maxpool, nn.Identity) else "on"
    if None in scores.values():
        return None
    best = min(scores, key=scores.get)
    is_better = scores[present] > max(FITS, CLEARLY_WORSE * scores[best])
    return best if is_better else None


def _mismatch(norm: nn.Module, outputs: Iterable[torch.Tensor]) -> float | None:
    """Return how far a batch norm's inputs are from its running statistics; None if it has none.

    It is the divergence of two normal distributions, KL(observed || running), mean over channels.

    Args:
        norm: The batch norm.
        outputs: What the layer before it gives for each batch of images, (N, C, H, W).
    """
    mean, variance = norm.running_mean, norm.running_var
    if variance is None or torch.equal(variance, variance[:1].expand_as(variance)):
        return None  # folded into the weights, as in a file of coded weights
    observed_mean, observed = _moments(outputs)
    alive = (variance > 1e-6 * variance.max()) & (observed > 1e-6 * observed.max())
    if not alive.any():
        return None
    ratio = observed[alive] / variance[alive]
    shift = (observed_mean - mean)[alive].square() / variance[alive]
    return float(0.5 * (ratio + shift - 1 - ratio.log()).mean())


def _moments(batches: Iterable[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and variance of each channel (float64) over batches, of which one is kept."""
    count, sums, squares = 0, 0.0, 0.0
    for values in batches:
        variance, mean = (x.double() for x in torch.var_mean(values, (0, 2, 3), correction=0))
        size = values.numel() // len(mean)
        count += size
        sums += size * mean
        squares += size * (variance + mean.square())
    mean = sums / count
    return mean, squares / count - mean.square()


# --- labels --------------------------------------------------------------------------------------


def _affordable(subject: Subject, most: int = CHECK_IMAGES) -> int:
    macs = sum(subject.traced.network.macs.values())
    return max(MIN_IMAGES, min(most, int(CHECK_MACS / macs)))


def _check_labels(subject: Subject) -> list[str]:
    count = _affordable(subject)
    logits = _logits(subject, subject.train.rows(slice(min(FIRST_LOOK, count))))
    correct = logits.argmax(1) == subject.train.labels[: len(logits)]
    if correct.double().mean() >= GOOD_ACCURACY:
        return []
    subject = subject.first(count)
    labels = subject.train.labels
    rest = _logits(subject, subject.train.rows(slice(len(logits), None)))
    predictions = torch.cat([logits, rest]).argmax(1) if len(rest) else logits.argmax(1)
    correct = predictions == labels
    found = []
    if (reordered := _predict_other_order(subject)) is not None:
        predicted, errors, other = reordered
        gained = int(((predicted == labels) & ~correct).sum())
        lost = int((correct & (predicted != labels)).sum())
        if gained - lost > errors * (gained + lost) ** 0.5:
            found.append(
                f"of {len(labels)} training images {int((predicted == labels).sum())} are "
                f"classified correctly with --channel-order {other}, {int(correct.sum())} without"
            )
            predictions = predicted
    return found + _find_exchanged_classes(predictions, labels, subject.train.classes)


def _predict_other_order(subject: Subject) -> tuple[torch.Tensor, float, str] | None:
    """Return predictions for the other order of colours, unless the first batch norm rules it out.

    Beside them stand the standard errors by which labels must speak for it, and its name.
    """
    other = "bgr" if subject.train.channel_order == "rgb" else "rgb"
    reordered = replace(subject.train, channel_order=other)
    present, swapped = (_mismatch_after_stem(subject, i) for i in (subject.train, reordered))
    if None in (present, swapped):
        return _logits(subject, reordered).argmax(1), STANDARD_ERRORS, other
    if swapped >= present:
        return None
    return _logits(subject, reordered).argmax(1), STANDARD_ERRORS_AGREED, other


def _find_exchanged_classes(
    predictions: torch.Tensor, labels: torch.Tensor, classes: tuple[str, ...]
) -> list[str]:
    """Say which classes are nearly always called by the name of one other class, and no more."""
    called: dict[int, int] = {}
    for label in range(len(classes)):
        own = predictions[labels == label]
        if len(own) >= MIN_OF_CLASS:
            names, counts = own.unique(return_counts=True)
            if counts.max() >= CONFUSED * len(own):
                called[label] = int(names[counts.argmax()])
    targets = list(called.values())
    pairs = [
        f"{classes[label]} is called {classes[target]}"
        for label, target in called.items()
        if label != target and targets.count(target) == 1
    ]
    if len(pairs) < MIN_EXCHANGED:
        return []
    shown = ", ".join(pairs[:4]) + (f" and {len(pairs) - 4} more" if len(pairs) > 4 else "")
    return [
        f"the network's classes come in another order: {shown}; name the class folders so that "
        "they sort in the network's order"
    ]


def _logits(subject: Subject, images: ImageSet) -> torch.Tensor:
    network = subject.traced.network
    return torch.cat([network(batch) for batch, _ in images.batches(CHUNK)] or [torch.empty(0)])
