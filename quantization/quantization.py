"""Quantize a ResNet18 for CIFAR-10 to INT8 and measure what that gains and costs.

    python quantization.py                      # bundled weights or your resnet18_cifar10.pth
    python quantization.py --weights my.pth --data-dir ~/cifar10 --test-images all

Loads the pretrained network, measures its size and accuracy, calibrates and converts it to INT8
(post-training static quantization, fbgemm by default), measures again on the same images, and
times both. Writes the INT8 model, reloads it in a fresh process, and writes results.json and plots.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import arguments, cli
from common.argument_types import fraction, list_of, one_of, positive_int
from quantization.settings import ENGINES, OBSERVERS

DEFAULT_OUTPUT_DIR = cli.REPOSITORY / "results" / "quantization"


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = arguments.make_parser(
        __doc__,
        epilog="examples:\n"
        "  python quantization.py\n"
        "  python quantization.py --weights my.pth --data-dir ~/cifar10 --test-images all",
    )
    arguments.add_shared_arguments(parser, DEFAULT_OUTPUT_DIR)
    quantizing = parser.add_argument_group("quantization")
    quantizing.add_argument(
        "--engines",
        type=list_of(one_of(*ENGINES, "auto")),
        metavar="NAME,...",
        help=f"INT8 kernels to compare: {', '.join(ENGINES)}; the first makes the headline. auto: "
        "all that suit this CPU, the fastest makes it (default: fbgemm, or qnnpack where torch has "
        "no fbgemm)",
    )
    arguments.add_calibration_argument(quantizing)
    quantizing.add_argument(
        "--observer",
        choices=OBSERVERS,
        default="histogram",
        help="how ranges follow from what calibration sees",
    )
    quantizing.add_argument(
        "--reduce-range",
        choices=("auto", "on", "off"),
        default="auto",
        help="7-bit activations, which x86 CPUs without VNNI need",
    )
    quantizing.add_argument(
        "--export-onnx",
        action="store_true",
        help="write the INT8 model as ONNX too and measure it in ONNX Runtime; needs onnx and "
        "onnxruntime",
    )
    budget = parser.add_argument_group("accuracy")
    budget.add_argument(
        "--max-drop",
        type=fraction,
        metavar="F",
        help="accuracy that INT8 may lose, such as 0.001: corrects what costs no time, then "
        "returns layers to FP32, worst first; exit code 3 where the budget cannot be met",
    )
    budget.add_argument(
        "--held-out-images",
        type=positive_int,
        metavar="N",
        default=1400,
        help="training images that decide for --max-drop; none of the calibration images",
    )
    budget.add_argument(
        "--diagnose",
        action="store_true",
        help="measure what quantizing each layer costs: noise, and accuracy",
    )
    budget.add_argument(
        "--calibration-study",
        action="store_true",
        help="compare observers, numbers of calibration images and seeds",
    )
    arguments.add_timing_arguments(parser, batch_sizes=[1, 32, 128], seconds=5.0)
    return parser


@cli.exit_codes
def main(argv: list[str] | None = None) -> int:
    """Load, measure, quantize, measure again, compare, write."""
    args = arguments.parse_arguments(build_parser(), argv, {"--held-out-images": "--max-drop"})
    cli.set_up_messages(args.quiet)
    started = time.perf_counter()

    # torch takes seconds to import, so nothing that needs it is imported before this line.
    from common import device, report
    from common.inputs import load_inputs
    from common.run import finish_run, print_results, start_run
    from quantization import chapters, engines, experiment, inspection, onnx_export, story, tables

    device.set_threads(args.threads)
    device.keep_freed_memory()
    place = device.choose_device(args.device)
    args.engines = args.engines or engines.default_engines()
    pick_fastest = "auto" in args.engines
    names = engines.candidate_engines() if pick_fastest else args.engines
    settings = [engines.choose_settings(n, args.observer, args.reduce_range) for n in names]
    if args.export_onnx:
        onnx_export.require_packages()
    with start_run(place, args.output_dir, args.overwrite) as (crew, folder):
        inputs = load_inputs(
            **arguments.input_choices(args), script_dir=Path(__file__).parent, workers=crew
        )
        test, calibration = inputs.test, inputs.calibration
        fp32 = experiment.predict_fp32(inputs.model, test, args.batch_size, crew)
        inspection.warn_of_insane_fp32(inputs.model, test, fp32)
        source, plan = inputs.model, None
        if args.max_drop is not None:
            held_out = inputs.load_training(args.held_out_images, skip=args.calibration_images)
            plan = experiment.plan_within_budget(
                source, calibration, held_out, settings[0], args.max_drop, args.batch_size, crew
            )
            source, settings = plan.model, [experiment.apply_plan(plan, s) for s in settings]
        quantized = experiment.quantize(source, calibration, test, settings, args.batch_size, crew)
        if not crew.is_first:  # all that follows is measured, timed and written once
            return cli.EXIT_DONE

        results = report.common_results(
            "quantization", args, crew, inputs.describe_images(), inputs.weights
        )
        account = chapters.Account(results, folder, inputs, fp32, args.batch_size)
        if args.calibration_study:
            chapters.add_study(account, settings[0])
        first = chapters.add_models(
            account, quantized, args.export_onnx, pick_fastest, args.batch_sizes,
            args.timing_seconds,
        )  # fmt: skip
        chapters.add_ranges(account, source, first)
        if plan is not None:
            chapters.add_budget(account, plan, args.max_drop)
        if args.diagnose:
            chapters.add_diagnosis(account, source, first)
        chapters.add_sparsity(account, first)
        chapters.list_artifacts(account, first)
        finish_run(results, folder, started, story.tell if args.report else None)
    text = tables.format_results(results, account.sections, args.output_dir)
    print_results(results, text, args.json)
    return cli.EXIT_DONE if plan is None or results["budget"]["met"] else cli.EXIT_OVER_BUDGET


if __name__ == "__main__":
    sys.exit(main())
