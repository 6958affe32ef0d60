"""Record what a redesign must not change: counts, predictions, levels and widths.

    python tests/record_pins.py                # compare with tests/fixtures/pins.json
    python tests/record_pins.py --write        # after a change that is meant, and explained

All of it is of the bundled weights and images. Counts can differ by a few on another processor,
whose kernels add in another order; on the one that the file names they are exact. `make test-all`
compares (tests/test_pins.py).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from check_results import check_results

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.inputs import load_inputs
from common.machine.device import set_up_cpu
from pruning.channels.slimmer import Slimmer
from pruning.pruning import build_parser

REPOSITORY = Path(__file__).resolve().parents[1]
PINS = Path(__file__).with_name("fixtures") / "pins.json"
WEIGHTS = REPOSITORY / "common" / "assets" / "resnet18_cifar10_fp16.pth"
BUNDLED = ("--bundled", "--weights", str(WEIGHTS), "--threads", "2")


def run(script: str, *arguments: str) -> tuple[dict, Path]:
    """Run a script; return its results, which keep their contract, and the folder it wrote."""
    folder = Path(tempfile.mkdtemp(prefix="pins-"))
    command = [sys.executable, f"{script}/{script}.py", *BUNDLED, *arguments]
    command += ["--output-dir", str(folder), "--quiet"]
    subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
    results = json.loads((folder / "results.json").read_text())
    check_results(results, folder)
    return results, folder


def pin_scan() -> dict:
    """Return how many of 500 images are right with each layer pruned alone, and the search.

    Beside them stands how many of the dense network's right answers that costs: the number tells
    layers apart that end at the same accuracy.
    """
    results, _ = run("pruning", "--precision", "fp32", "--test-images", "500")
    search, layers = results["linear_search"], results["sensitivity"]
    return {
        "dense": results["baseline"]["correct"],
        "layers": {
            entry["layer"]: [entry["accuracy"]["correct"], entry["comparison"]["only_a_correct"]]
            for entry in layers
        },
        "linear_kept_weights": search["kept_weights"],
        "linear_steps": [step["accuracy"]["correct"] for step in search["steps"]],
    }


def pin_int8() -> dict:
    """Return how many of 500 images each engine gets right, loses and gains against FP32."""
    results, _ = run(
        "quantization", "--test-images", "500", "--timing-seconds", "0.01", "--batch-sizes", "1",
        "--engines", "fbgemm,x86,onednn,qnnpack",
    )  # fmt: skip
    found = {}
    for model in results["models"]:
        if model["name"] == "int8":
            change = model["comparison"]["accuracy"]
            counts = (model["accuracy"]["correct"], change["only_a_correct"])
            found[model["engine"]] = [*counts, change["only_b_correct"]]
    return found


def pin_channels() -> dict:
    """Return how many outputs each layer has where half of the multiply-adds are removed."""
    args = build_parser().parse_args([*BUNDLED, "--test-images", "200"])
    set_up_cpu(args.threads)
    inputs = load_inputs(args, REPOSITORY)
    images = inputs.load_training(1000)
    slimmer = Slimmer(inputs.model, inputs.traced, images, inputs.seed, torch.float32)
    state = slimmer.slim(0.5).state_dict()
    return {name: len(value) for name, value in state.items() if value.ndim > 1}


def record() -> dict:
    """Return all pins."""
    return {"scan": pin_scan(), "int8": pin_int8(), "channels": pin_channels()}


def main() -> int:
    """Compare, or write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    found = record()
    if args.write:
        PINS.write_text(json.dumps(found, indent=1) + "\n")
        return 0
    known = json.loads(PINS.read_text())
    for name in known:
        print(name, "equal" if found[name] == known[name] else f"\n {known[name]}\n {found[name]}")
    return int(found != known)


if __name__ == "__main__":
    sys.exit(main())
