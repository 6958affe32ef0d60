"""How a model is quantized: what a run chooses, and what a file tells; imports no torch."""

from dataclasses import dataclass

# torch's, from the slowest on x86 to the fastest; qnnpack is made for Arm.
TORCH_ENGINES = ("fbgemm", "x86", "onednn", "qnnpack")
ENGINES = (*TORCH_ENGINES, "onnxruntime", "openvino", "reference")
OBSERVERS = ("histogram", "minmax", "moving-average", "percentile")


@dataclass(frozen=True)
class Settings:
    """How a model is quantized; kept in the artefact, for loading needs the same again."""

    engine: str = "fbgemm"  # one of ``ENGINES``
    # Use 7 of the 8 bits of activations. x86 kernels without VNNI need this: the sum of two full
    # products does not fit the 16 bits in which they add it.
    reduce_range: bool = False
    # How activations' ranges follow from what was seen, one of ``OBSERVERS``.
    observer: str = "histogram"
    fp32_layers: tuple[str, ...] = ()  # convolution and linear layers that stay in FP32


def parse_settings(fields: object) -> Settings:
    """Return the settings that a file tells; a ValueError if no model can be made with them."""
    known = {"engine", "observer", "reduce_range", "fp32_layers"}
    if not isinstance(fields, dict) or fields.keys() != known:
        raise ValueError("settings are incomplete or unknown")
    layers = fields["fp32_layers"]
    if not (
        fields["engine"] in ENGINES
        and fields["observer"] in OBSERVERS
        and isinstance(fields["reduce_range"], bool)
        and isinstance(layers, list | tuple)
        and all(isinstance(name, str) for name in layers)
    ):
        raise ValueError("settings that no INT8 model is made with")
    return Settings(**fields | {"fp32_layers": tuple(layers)})
