"""A check before the work: do the images fit the network?

A checkpoint does not say how its images were normalised, in which order its colours and classes
come, or whether a max pool follows its stem. Running statistics of batch norms are compared with
those of training images; what that cannot tell, their labels can. Test images are not used.
"""

from collections.abc import Mapping

import torch

from common.images.mismatch import (
    CHECK_IMAGES,
    CHUNK,
    CLEARLY_WORSE,
    FITS,
    Subject,
    better_max_pool,
    mismatch_after_stem,
)
from common.images.normalisation import AUTO, NORMALISATIONS

CHECK_MACS = 256 * 0.6e9  # bounds the time: what the default network takes for all of them
MIN_IMAGES, AUTO_IMAGES = 64, 2500
FIRST_LOOK = 128  # images
GOOD_ACCURACY = 0.97  # from here on no alternative is tried
# Standard errors by which labels must speak for another order of colours; fewer where the first
# batch norm speaks for that order too.
STANDARD_ERRORS, STANDARD_ERRORS_AGREED = 3.0, 2.0
CONFUSED = 0.7  # of a class's images are called by one other class's name
MIN_OF_CLASS = 5  # images by which a class is judged
MIN_EXCHANGED = 2  # classes; another order moves at least two, a poor network may confuse one


@torch.inference_mode()
def find_mismatches(subject: Subject) -> list[str]:
    """Return what speaks against the settings, in words that name the flag that would mend it."""
    found = []
    if better := _better_normalisations(subject):
        subject = subject.normalised(better[0])
        # Among several, the labels of more images decide.
        flag = f"--normalize {better[0] if len(better) == 1 else AUTO}"
        found.append(
            f"the first batch norm expects images normalised otherwise: {flag} fits it, the "
            "present mean and std do not"
        )
    if pool := better_max_pool(subject):
        found.append(f"the second batch norm expects other values: --max-pool {pool} fits it")
        return found  # labels would tell of nothing else
    return found + _check_labels(subject)


@torch.inference_mode()
def best_normalisation(subject: Subject) -> str:
    """Return the known constants that fit best.

    Where none fits the first batch norm well, the images differ in kind from those in training, and
    the accuracy on training images decides among the ones that are not far off.
    """
    names = _nearest(_score_normalisations(subject))
    if len(names) == 1:
        return names[0]
    subject = subject.first(_affordable(subject, AUTO_IMAGES))

    def count_correct(name: str) -> int:
        return int((_predict(subject.normalised(name)) == subject.train.labels).sum())

    return max(names, key=count_correct)


# --- running statistics --------------------------------------------------------------------------


def _better_normalisations(subject: Subject) -> list[str]:
    """Return the known constants that fit the first batch norm, if the present ones do not."""
    present = mismatch_after_stem(subject)
    if present <= FITS:
        return []
    scores = _score_normalisations(subject)
    names = _nearest(scores)
    return names if scores[names[0]] <= present / CLEARLY_WORSE else []


def _nearest(scores: Mapping[str, float]) -> list[str]:
    """Return the constants of least mismatch: several, from the best on, where none fits well."""
    names = sorted(scores, key=scores.get)
    lowest = scores[names[0]]
    if 0 < lowest <= FITS:  # without a batch norm, all are 0 and tell nothing
        return names[:1]
    return [name for name in names if scores[name] <= CLEARLY_WORSE * lowest]


def _score_normalisations(subject: Subject) -> dict[str, float]:
    return {name: mismatch_after_stem(subject.normalised(name)) for name in NORMALISATIONS}


# --- labels --------------------------------------------------------------------------------------


def _affordable(subject: Subject, most: int = CHECK_IMAGES) -> int:
    macs = sum(subject.traced.network.macs.values())
    return max(MIN_IMAGES, min(most, int(CHECK_MACS / macs)))


def _check_labels(subject: Subject) -> list[str]:
    subject = subject.first(_affordable(subject))
    labels, few = subject.train.labels, subject.first(FIRST_LOOK)
    correct = _predict(few) == few.train.labels
    if correct.double().mean() >= GOOD_ACCURACY:
        return []
    predictions, found = _predict(subject), []
    correct = predictions == labels
    other = "bgr" if subject.train.channel_order == "rgb" else "rgb"
    reordered = subject.prepared(channel_order=other)
    present, swapped = map(mismatch_after_stem, (subject, reordered))
    if not present or swapped < present:  # the first batch norm does not rule it out
        predicted = _predict(reordered)
        correct_so = predicted == labels
        gained, lost = int((correct_so & ~correct).sum()), int((correct & ~correct_so).sum())
        errors = STANDARD_ERRORS_AGREED if present else STANDARD_ERRORS
        if gained - lost > errors * (gained + lost) ** 0.5:
            found.append(
                f"of {len(labels)} training images {int(correct_so.sum())} are classified "
                f"correctly with --channel-order {other}, {int(correct.sum())} without"
            )
            predictions = predicted
    return found + _find_exchanged_classes(predictions, labels, subject.train.classes)


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


def _predict(subject: Subject) -> torch.Tensor:
    """Return the predicted classes, int64, (N,)."""
    batches = subject.train.batches(CHUNK)
    return torch.cat([subject.traced.network(batch).argmax(1) for batch, _ in batches])
