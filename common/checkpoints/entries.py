"""The entries of a state dict: checked, freed of what tools added to them, fitted to a network."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from common.checkpoints.renaming import BATCH_COUNTER
from common.command.cli import UserError, log
from common.files.inert import Inert, object_refused
from common.images.normalisation import Statistics

StateDict = dict[str, torch.Tensor]

WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
COUNTERS = ("n_averaged", "total_ops", "total_params", "_extra_state")
STDS = {"mean": "std", "means": "stds", "mu": "sigma"}  # ends of names of tensors that go together
MEAN = re.compile(rf"(?<![^._])({'|'.join(STDS)})$")  # as in new_mean
WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
FAKE_QUANTIZERS = re.compile(r"fake_quant|activation_post_process|activation_quantizer")


def check_entries(path: Path, content: Mapping) -> StateDict:
    """Check that a state dict holds dense tensors by name."""
    if any(not isinstance(name, str) for name in content):
        raise UserError(f"{path}: not a state dict: its keys are not names")
    objects = [value for value in content.values() if isinstance(value, Inert)]
    if objects and not any(isinstance(value, torch.Tensor) for value in content.values()):
        raise object_refused(path, objects[0].name)
    if fake := [name for name in content if FAKE_QUANTIZERS.search(name)]:
        raise UserError(
            f"{path}: from quantization-aware training ({shorten(fake)}); save the state_dict() "
            "of the FP32 model, as it was before prepare_qat()"
        )
    if packed := [name for name in content if "_packed_params" in name]:
        raise UserError(
            f"{path}: already quantized ({shorten(packed)}); save the state_dict() of the model "
            "before quantize_dynamic() or convert()"
        )
    for name, value in content.items():
        if not isinstance(value, torch.Tensor):
            if _is_counter(name):
                continue
            if isinstance(value, Inert):
                raise object_refused(path, value.name)
            kind = type(value).__name__
            raise UserError(f"{path}: not a state dict: {shorten([name])} is no tensor ({kind})")
        if value.is_quantized:
            raise UserError(
                f"{path}: already quantized ({shorten([name])}); FP32 weights are needed"
            )
        if value.layout != torch.strided or value.is_nested or value.is_meta:
            raise UserError(f"{path}: {shorten([name])} is no dense tensor with values")
    return dict(content)


def drop_counters(path: Path, entries: Mapping[str, object]) -> StateDict:
    """Drop counters that say nothing about the function, and the names of wrappers."""
    tensors: StateDict = {}
    for name, value in entries.items():
        plain = WRAPPERS.sub("", name)
        if plain in tensors:
            raise UserError(f"{path}: holds {shorten([plain])} twice, under two names")
        if not _is_counter(name):
            tensors[plain] = value.detach()
    if dropped := dict.fromkeys(name.rpartition(".")[2] for name in entries if _is_counter(name)):
        log.info("%s: %s passed over", path, ", ".join(dropped))
    if wrappers := {found[1] for name in entries if (found := WRAPPERS.search(name))}:
        log.info("%s: %s taken out of the names", path, " and ".join(sorted(wrappers)))
    return tensors


def _is_counter(name: str) -> bool:
    return name.rpartition(".")[2] in COUNTERS


def apply_masks(path: Path, tensors: StateDict) -> StateDict:
    """Multiply the ``weight_orig`` and ``weight_mask`` of torch.nn.utils.prune."""
    names = [n.removesuffix("_mask") for n in tensors if n.endswith("_mask")]
    names = [n for n in names if f"{n}_orig" in tensors]
    if not names or any(tensors[f"{n}_orig"].shape != tensors[f"{n}_mask"].shape for n in names):
        return tensors
    log.info("%s: pruning masks are applied", path)
    renamed = {f"{name}_orig": name for name in names} | {f"{name}_mask": None for name in names}
    masked = {renamed.get(name, name): tensor for name, tensor in tensors.items()}
    del masked[None]
    return masked | {name: masked[name] * tensors[f"{name}_mask"] for name in names}


def take_statistics(tensors: StateDict) -> tuple[StateDict, Statistics | None]:
    """Take out the mean and std of a normalising layer: three numbers each."""
    statistics, taken = None, set()
    for name, mean in tensors.items():
        other = MEAN.sub(lambda found: STDS[found[1]], name)
        std = tensors.get(other) if other != name else None
        if std is None or mean.numel() != 3 or std.numel() != 3 or not std.is_floating_point():
            continue
        scale = 255.0 if mean.max() > 2 else 1.0
        means, stds = (tuple(round(float(x) / scale, 6) for x in t.flatten()) for t in (mean, std))
        if all(-1 <= x <= 1 for x in means) and all(0 < x <= 2 for x in stds):
            statistics = statistics or (means, stds)
            taken |= {name, other}
    return {name: t for name, t in tensors.items() if name not in taken}, statistics


def shorten(names: Sequence[str]) -> str:
    """Return the first few of some names."""
    shown = ", ".join(name[:60] for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def fit_tensors(path: Path, tensors: StateDict, expected: StateDict, family: str) -> StateDict:
    """Return the tensors as the expected state dict has them: in its order and its types.

    Raises:
        UserError: A tensor is missing, unexpected, of another shape, or has impossible values.
    """
    tensors = dict(tensors)
    for name, value in expected.items():  # old checkpoints lack this counter, which eval ignores
        if name.endswith(BATCH_COUNTER):
            tensors.setdefault(name, torch.zeros(value.shape, dtype=value.dtype))
    others = [name for name in tensors if name not in expected]
    if others and all(name.endswith(BATCH_COUNTER) for name in others):
        log.info("%s: %s passed over", path, shorten(others))
        tensors = {name: tensors[name] for name in expected if name in tensors}
    _check_names_and_shapes(path, tensors, expected, family)
    _check_values(path, tensors, expected)
    return {name: tensors[name].to(value.dtype).contiguous() for name, value in expected.items()}


def _check_names_and_shapes(
    path: Path, tensors: StateDict, expected: StateDict, family: str
) -> None:
    problems = []
    if missing := [name for name in expected if name not in tensors]:
        problems.append(f"missing {shorten(missing)}")
    if unexpected := [name for name in tensors if name not in expected]:
        problems.append(f"unexpected {shorten(unexpected)}")
    problems += [
        f"{name} has shape {tuple(tensors[name].shape)} instead of {tuple(value.shape)}"
        for name, value in expected.items()
        if name in tensors and tensors[name].shape != value.shape
    ][:1]
    if problems:
        raise UserError(f"{path}: not a {family}: {'; '.join(problems)}")


def _check_values(path: Path, tensors: StateDict, expected: StateDict) -> None:
    for name, value in tensors.items():
        if not expected[name].is_floating_point():
            continue
        if value.dtype not in WEIGHT_DTYPES:
            raise UserError(
                f"{path}: {name} is {value.dtype}; 16-, 32- or 64-bit floating point is needed"
            )
        # In FP32, what will be computed with: an FP64 value may be finite there only.
        if not torch.isfinite(value.float()).all():
            raise UserError(f"{path}: {name} holds NaN or infinite values")
        if name.endswith("running_var") and (value < 0).any():
            raise UserError(f"{path}: {name} holds negative variances")
