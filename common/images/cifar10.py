"""What CIFAR-10 is, and how the network wants to see it."""

CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
IMAGE_SIZE = 32  # side in pixels
# Mean and std of the channels that the course's checkpoint was trained with.
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2023, 0.1994, 0.2010)
