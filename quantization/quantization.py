"""Quantize an image classifier to INT8 and measure what that gains and costs.

    python quantization/quantization.py  # bundled weights or your resnet18_cifar10.pth
    python quantization/quantization.py --weights my.pth --data-dir ~/cifar10

Loads the pretrained network, measures its size and accuracy, calibrates and converts it to INT8
(post-training static quantization, fbgemm by default), measures again on the same images, and
times both. Writes the INT8 model, reloads it in a fresh process, and writes results.json and plots.
"""

import argparse
import itertools
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "quantization":  # imported from its own folder, where it hides the package
    raise ImportError(f"this is the script; for the package set PYTHONPATH={sys.path[0]}")
from common.command import argument_types as types
from common.command import arguments, cli
from quantization.settings import ENGINES, OBSERVERS

NEEDED = {  # flags that do nothing without others
    "--held-out-images": "--max-drop",
    "--coding-images": "--bits-per-weight",
}


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = arguments.make_parser(__doc__)
    quantizing = parser.add_argument_group("quantization")
    quantizing.add_argument(
        "--engines", type=types.list_of(types.one_of(*ENGINES, "auto")), metavar="NAME,...",
        help=f"INT8 kernels to compare: {', '.join(ENGINES)}; the first is the headline. auto: all "
        "that suit this CPU, of which the fastest is the headline (default: fbgemm, or qnnpack "
        "where torch has no fbgemm)",
    )  # fmt: skip
    arguments.add_calibration_argument(quantizing)
    quantizing.add_argument(
        "--observer", choices=OBSERVERS, default="histogram",
        help="how calibration sets the range of each activation",
    )  # fmt: skip
    quantizing.add_argument(
        "--reduce-range", choices=("auto", "on", "off"), default="auto",
        help="use 7 of the 8 bits of activations; auto: where the CPU's sums of 8-bit products "
        "overflow (x86 without VNNI)",
    )  # fmt: skip
    quantizing.add_argument(
        "--export-onnx", action="store_true",
        help="write the INT8 model as ONNX too and measure it in ONNX Runtime; needs onnx and "
        "onnxruntime",
    )  # fmt: skip
    arguments.add_check_argument(quantizing)
    budget = parser.add_argument_group("accuracy")
    budget.add_argument(
        "--max-drop", type=types.accuracy_loss, metavar="F",
        help="accuracy that INT8 may lose, as a fraction: 0.005 is half a point. Tries corrections "
        "that cost no time, then returns layers to FP32, worst first, until the loss and one "
        "standard error are within it; exit code 3 where they cannot be",
    )  # fmt: skip
    budget.add_argument(
        "--held-out-images", type=types.positive_int, metavar="N", default=types.AtMost(1400),
        help="training images, other than the calibration images, on which --max-drop decides",
    )  # fmt: skip
    budget.add_argument(
        "--diagnose", action="store_true",
        help="measure the noise and the loss of accuracy that quantizing each layer causes",
    )  # fmt: skip
    coding = parser.add_argument_group("coding")
    coding.add_argument(
        "--bits-per-weight", type=types.number(0.1, 8.0, "a number of bits from 0.1 to 8"),
        metavar="B",
        help="also write a coded file of about B bits for each weight: the INT8 levels that cost "
        "least in error and bits, compressed",
    )  # fmt: skip
    coding.add_argument(
        "--coding-images", type=types.positive_int, metavar="N", default=types.AtMost(2000),
        help="training images, without labels, that --bits-per-weight uses",
    )  # fmt: skip
    arguments.add_timing_arguments(parser, batch_sizes=[1, 32, types.AtMost(128)], seconds=5.0)
    arguments.add_shared_arguments(parser, "quantization")
    return parser


@cli.exit_codes
def main(argv: list[str] | None = None) -> int:
    """Load, measure, quantize, measure again, compare, write."""
    args = arguments.parse_arguments(build_parser(), argv, NEEDED)
    started = cli.start(args.quiet)  # imports torch, so nothing that needs it is imported above
    from common.inputs import load_inputs
    from common.run import common_results, finish_run, start_run
    from common.search.budget import why_too_strict
    from quantization import steps
    from quantization.accuracy.budget import HeldOutEvaluator, meet_budget
    from quantization.accuracy.diagnosis import diagnose
    from quantization.coding import smallest
    from quantization.files import artifact
    from quantization.int8 import engines
    from quantization.report import plots, results, sections, story

    with start_run(args) as (workers, folder):
        args.engines = args.engines or engines.default_engines()
        pick_fastest = "auto" in args.engines
        if pick_fastest:
            engines.fastest_engine()  # ends the run where there is none
        named = [engines.candidate_engines() if e == "auto" else [e] for e in args.engines]
        names = dict.fromkeys(itertools.chain(*named))  # each once
        settings = [engines.choose_settings(n, args.observer, args.reduce_range) for n in names]
        if args.export_onnx:
            engines.require_engine("onnxruntime")
        inputs = load_inputs(args, Path(__file__).parent)
        model, dense, test = inputs.model, inputs.traced.network, inputs.test
        batch_size = inputs.fit_batch_size(args.batch_size)
        setup = steps.CalibrationSetup(inputs.calibration, test, batch_size)
        source, plan = dense, None
        if args.max_drop is not None:
            held_out = inputs.load_training(
                args.held_out_images, args.calibration_images, "--held-out-images"
            )
            if reason := why_too_strict(len(held_out), args.max_drop, held_out=True):
                cli.log.warning("--max-drop: %s: only a model better than FP32 can pass", reason)
        if args.bits_per_weight is not None:
            coding_images = inputs.load_training(args.coding_images, flag="--coding-images")
        fp32 = steps.predict_fp32(model, setup, workers.device)
        if args.max_drop is not None:
            evaluator = HeldOutEvaluator(dense, replace(setup, images=held_out), args.max_drop)
            plan = meet_budget(evaluator, dense, settings[0])
            source, chosen = plan.network, plan.settings
            settings = [
                replace(chosen, engine=s.engine, reduce_range=s.reduce_range) for s in settings
            ]
        quantized, onnx = steps.quantize(source, setup, settings), None
        if args.export_onnx:
            path, plain = folder.file(f"{inputs.file_stem}_int8.onnx"), quantized[0]
            onnx = steps.export_onnx(plain.model.network, plain.predictions, path, setup)
        batch_sizes = inputs.fit_batch_sizes(args.batch_sizes)
        timings = steps.time_models(
            model, dense, quantized, onnx, test, batch_sizes, args.timing_seconds
        )
        if pick_fastest:
            quantized = steps.fastest_first(quantized, timings)
        first = quantized[0]

        files = steps.save_models(quantized, folder.file, inputs.file_stem)
        found = common_results("quantization", args, workers, inputs.describe())
        found |= results.describe_models(inputs, fp32, quantized, files, onnx, timings)
        if plan is not None:
            found["budget"] = results.describe_budget(plan, args.max_drop, found)
        if args.diagnose:
            found |= diagnose(first.observation, first.settings, test, batch_size)
            sections.diagnosis_table(found["diagnosis"]).write_csv(folder.file("diagnosis.csv"))
        found |= results.describe_sparsity(dense, first.model.network)
        if args.bits_per_weight is not None:
            files["coded"] = folder.file(f"{inputs.file_stem}_coded.safetensors")
            found["coding"] = smallest.write_smallest(
                inputs, coding_images, fp32, first.settings, batch_size, args.bits_per_weight,
                files["coded"],
            )  # fmt: skip
        if args.write_check:
            artifact.write_checks(set(files.values()), test, folder.file, first.settings.engine)
        saved = [(files[each.settings.engine], each.model) for each in quantized]
        with artifact.verifying_reloaded(saved, test):
            plots.plot_overview(found["models"], folder.file("overview.png"))
            plots.plot_flips(test, fp32, first.predictions, folder.file("flips.png"))
            if args.diagnose:
                plots.plot_diagnosis(found["diagnosis"], folder.file("diagnosis.png"))
            plots.plot_ranges(
                first.observation, first.settings.reduce_range, folder.file("ranges.png")
            )
        found["artifacts"] = {"model": files[first.settings.engine].name}
        finish_run(found, folder, started, story.tell, args)
    return cli.EXIT_DONE if plan is None or found["budget"]["met"] else cli.EXIT_OVER_BUDGET


if __name__ == "__main__":
    sys.exit(main())
