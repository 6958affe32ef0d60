"""Print the five likeliest classes of photos; needs Pillow, and decode.py with its packages.

python classify.py model.safetensors photo.jpg
"""

import argparse
import os
import sys
from pathlib import Path

try:
    import numpy as np
    from PIL import Image, ImageOps, UnidentifiedImageError
except ImportError as error:
    sys.exit(f"error: {error}")

FORMATS = ("JPEG", "PNG", "BMP", "WEBP")  # Pillow would also hand EPS to ghostscript
SHOWN_CLASSES = 5


def fit(image: Image.Image, height: int, width: int, short_side: int | None) -> Image.Image:
    """Return an image scaled and cut, as torchvision's Resize and CenterCrop do it.

    A ``short_side`` of None is as short as the result allows.
    """
    sides = image.size
    if short_side is None:
        short_side = max(
            -(-min(sides) * wanted // side)  # rounded up
            for side, wanted in zip(sides, (width, height), strict=True)
        )
    if min(sides) != short_side:
        longer = int(short_side * max(sides) / min(sides))
        size = (short_side, longer) if sides[0] <= sides[1] else (longer, short_side)
        image = image.resize(size, Image.Resampling.BILINEAR)
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def read_image(path: Path, height: int, width: int, short_side: int | None) -> np.ndarray:
    """Return a photo as uint8 RGB pixels (3, height, width); a ValueError if it is none."""
    try:
        with Image.open(path, formats=FORMATS) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGB")
    except UnidentifiedImageError:
        raise ValueError(f"{path}: no JPEG, PNG, BMP or WebP image") from None
    except Exception as error:  # damaged files make Pillow fail in too many ways to list
        raise ValueError(f"{path}: cannot be read ({error})") from None
    return np.asarray(fit(image, height, width, short_side)).transpose(2, 0, 1)


def print_classes(logits: np.ndarray, classes: list[str]) -> None:
    """Print the likeliest classes of an image and their probabilities; logits (classes,)."""
    shares = np.exp(logits.astype(np.float64) - logits.max())
    shares /= shares.sum()
    for index in np.argsort(-shares, kind="stable")[:SHOWN_CLASSES]:
        print(f"{shares[index]:7.2%}  {classes[index]}")


def main(argv: list[str] | None = None) -> int:
    """Classify photos; one that cannot be read does not keep the others from it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="INT8 file (.safetensors)")
    parser.add_argument(
        "photos", nargs="+", type=Path, metavar="photo", help="JPEG, PNG, BMP or WebP image"
    )
    args = parser.parse_args(argv)
    if not args.model.endswith(".safetensors"):
        parser.error(f"{args.model}: not a .safetensors file; the model comes first")
    code = 0
    try:
        from decode import load  # beside this module, wherever both are copied to

        classify = load(args.model)
        for path in args.photos:
            try:
                pixels = read_image(path, *classify.shape[1:], classify.facts["resize"])
            except ValueError as error:
                print(f"error: {error}", file=sys.stderr)
                code = 1
                continue
            if len(args.photos) > 1:
                print(f"{path}:")
            print_classes(classify(pixels[None])[0], classify.facts["classes"])
        sys.stdout.flush()
    except BrokenPipeError:  # `| head`: nobody reads the output any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return code


if __name__ == "__main__":
    sys.exit(main())
