"""Make a checkpoint that is hard to quantize, though in FP32 it computes the same.

    python benchmarks/damage_checkpoint.py hard.pth
    python quantization/quantization.py --weights hard.pth --max-drop 0.002 --diagnose

A few channels of one convolution's output are scaled up and the next convolution's weights for them
scaled down. The activation that lies between has a range set by these channels alone, and INT8
leaves the others a few of its 256 steps.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.command import arguments, cli
from common.command.argument_types import positive_float, positive_int


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = arguments.make_parser(__doc__)
    parser.add_argument("output", type=Path, metavar="FILE", help="to write; must not exist")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="to start from")
    parser.add_argument("--block", default="layer2.1", metavar="NAME", help="block to damage")
    parser.add_argument("--channels", type=positive_int, metavar="N", default=4, help="to scale")
    parser.add_argument("--factor", type=positive_float, metavar="F", default=300.0)
    return parser


@cli.exit_codes
def main(argv: list[str] | None = None) -> int:
    """Load, scale, write."""
    args = build_parser().parse_args(argv)
    cli.set_up_messages(quiet=False)

    cli.import_torch()
    import torch

    from common.files.atomic import replace_file
    from common.network import checkpoint
    from common.network.resnet import BasicBlock

    if args.output.exists():
        raise cli.UserError(f"{args.output}: exists already")
    model = checkpoint.load_model(checkpoint.find_weights(args.weights, Path(__file__).parent).path)
    blocks = {name: m for name, m in model.named_modules() if isinstance(m, BasicBlock)}
    if args.block not in blocks:
        raise cli.UserError(f"no block {args.block}; there are {', '.join(blocks)}")
    block, scaled = blocks[args.block], slice(args.channels)
    with torch.no_grad():  # undone in conv2, for ReLU lets it through
        block.bn1.weight[scaled] *= args.factor
        block.bn1.bias[scaled] *= args.factor
        block.conv2.weight[:, scaled] /= args.factor
    replace_file(args.output, lambda file: torch.save(model.state_dict(), file))
    print(
        f"{args.output}: {args.channels} channels of {args.block}.bn1 are {args.factor:g} times up"
    )
    return cli.EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
