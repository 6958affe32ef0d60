"""How to load the files that a run wrote, told on the console and on the page."""

import itertools
from collections.abc import Mapping

from common.command.cli import REPOSITORY, visible
from common.report.story import Facts

# By suffix: the name of the kind, and how its files are loaded.
KINDS = {
    ".safetensors": (
        "INT8",
        "from quantization import load_int8; model = load_int8(path), where Python finds this "
        f"repository: PYTHONPATH={visible(REPOSITORY)}. On a device without torch: "
        "runtime/decode.py (docs/ship_it.md)",
    ),
    ".onnx": ("ONNX", "onnxruntime.InferenceSession(path)"),
    ".check": (
        "check",
        "python decode.py MODEL --check path on the device, with a copy of runtime/decode.py",
    ),
    ".pth": (
        "FP32",
        "--weights of each script, or torch.load(path, weights_only=True), a state dict",
    ),
}


def list_files(artifacts: Mapping[str, str | list[str]]) -> list[str]:
    """Return the names of the files in results.json's ``artifacts``, each once."""
    lists = [[entry] if isinstance(entry, str) else entry for entry in artifacts.values()]
    return list(dict.fromkeys(itertools.chain(*lists)))


def how_to_load(artifacts: Mapping[str, str | list[str]]) -> list[Facts]:
    """Return facts that name the written models and say how to load each, if there are any."""
    files, facts = list_files(artifacts), {}
    for suffix, (kind, how) in KINDS.items():
        if names := [visible(name) for name in files if name.endswith(suffix)]:
            facts[kind] = f"{', '.join(names)}: {how}"
    return [Facts("The models, and how to load them", facts)] if facts else []
