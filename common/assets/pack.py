"""Make the bundled assets again, from image archives sorted by class and an FP32 checkpoint.

    python common/assets/pack.py cifar10_jpeg_train.tar.xz --count 2000
    python common/assets/pack.py resnet18_cifar10.pth

JPEG files are copied byte for byte. Convolution and linear weights are stored as FP16, biases and
batch-norm tensors as FP32: variances can lie below FP16's range, and they weigh next to nothing.
"""

import io
import lzma
import sys
import tarfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common.checkpoints.checkpoint import BUNDLED_WEIGHTS, load_model
from common.command import arguments, cli
from common.command.argument_types import positive_int
from common.files.atomic import replace_file
from common.files.untrusted import serialize
from common.images.cifar import ASSETS, open_archive
from common.images.data import balanced_subset

SUBSET_SEED = 0


def pack_images(archive: Path, count: int) -> Path:
    """Write a class-balanced subset of ``archive``'s images beside this script, as a tar.xz."""
    source, members, labels = open_archive(archive)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for index in sorted(balanced_subset(labels, count, SUBSET_SEED)):
            content = source.extractfile(members[index]).read()
            entry = tarfile.TarInfo(members[index].name)  # no owner, no time: the same bytes again
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    path = ASSETS / archive.name.replace(".tar.xz", f"_{count}.tar.xz")
    compressed = lzma.compress(packed.getvalue(), preset=9 | lzma.PRESET_EXTREME)
    replace_file(path, compressed)
    return path


def pack_weights(checkpoint: Path) -> Path:
    """Write ``checkpoint``'s weights as the bundled ones."""
    state = load_model(checkpoint).state_dict()
    half = {name: value.half() if value.ndim > 1 else value for name, value in state.items()}
    replace_file(BUNDLED_WEIGHTS, serialize(half))
    return BUNDLED_WEIGHTS


@cli.exit_codes
def main(argv: list[str] | None = None) -> int:
    """Pack what is asked for and print where it went."""
    parser = arguments.make_parser(__doc__)
    parser.add_argument("file", type=Path, help="archive (.tar.xz) or checkpoint")
    parser.add_argument("--count", type=positive_int, default=2000, help="images of an archive")
    args = parser.parse_args(argv)
    is_archive = args.file.suffix == ".xz"
    path = pack_images(args.file, args.count) if is_archive else pack_weights(args.file)
    print(f"{path}: {path.stat().st_size:,} bytes")
    return cli.EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
