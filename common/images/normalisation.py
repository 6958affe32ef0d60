"""Means and standard deviations that networks are commonly trained with; without torch."""

Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std of the channels

# CIFAR-10's, with which the course's checkpoint was trained.
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
NORMALISATIONS: dict[str, Statistics] = {  # for pixels from 0 to 1
    "cifar10": (MEAN, STD),
    "cifar10-std": (MEAN, (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
AUTO = "auto"
