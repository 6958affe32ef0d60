"""Find the smallest and the fastest network within a budget of accuracy, and write its files.

    python pipeline/pipeline.py  # within one point of the dense network
    python pipeline/pipeline.py --max-drop 0.005 --for size
    python pipeline/pipeline.py --data-dir ~/cifar10 --finetune-epochs 2

Three answers. ``size`` is the smallest file: channels that hold many weights are removed, and INT8
levels are chosen for their bits. ``speed`` is the fastest network: channels that take many
multiply-adds are removed. ``both`` is small and fast. One half of the test images chooses; the
other half measures what was written, read back by a fresh process.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.command import arguments, cli
from common.command.argument_types import accuracy_loss, list_of, one_of
from pipeline import GOALS
from quantization.settings import ENGINES

NEEDED_FLAGS = {"--finetune-images": "--finetune-epochs"}


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = arguments.make_parser(__doc__)
    asked = parser.add_argument_group("the question")
    asked.add_argument(
        "--max-drop", type=accuracy_loss, metavar="D", default=0.01,
        help="accuracy that may be lost against the given network, as a fraction: 0.01 is a point",
    )  # fmt: skip
    asked.add_argument(
        "--for", dest="goals", type=list_of(one_of(*GOALS)), metavar="GOAL,...",
        default=list(GOALS),
        help="what to find: size, the smallest file; speed, the fastest network; both, one that is "
        "small and fast (its search starts with that for speed, and takes as long in addition)",
    )  # fmt: skip
    arguments.add_finetuning_arguments(
        asked,
        "also train narrower networks for N epochs, without labels, to answer as the given "
        "network does (long)",
    )
    asked.add_argument(
        "--engine", choices=ENGINES, help="INT8 kernels; by default the fastest on this CPU"
    )
    asked.add_argument(
        "--resume", action="store_true",
        help="continue a run that was stopped, if checkpoint, images and settings are the same",
    )  # fmt: skip
    asked.add_argument(
        "--export-onnx", action="store_true",
        help="write each answer as ONNX too, and compare its predictions in ONNX Runtime",
    )  # fmt: skip
    arguments.add_check_argument(asked)
    arguments.add_calibration_argument(
        asked, 1000, "that channels and levels are chosen on, without labels (more take longer)"
    )
    arguments.add_timing_arguments(parser, batch_sizes=[1, 32], seconds=5.0)
    arguments.add_shared_arguments(parser, "pipeline")
    parser.set_defaults(test_images="all")  # half of 2,000 would choose by luck
    return parser


@cli.exit_codes
def main(argv: list[str] | None = None) -> int:
    """Load, search, write, read back, measure, compare."""
    args = arguments.parse_arguments(build_parser(), argv, NEEDED_FLAGS)
    started = cli.start(args.quiet)  # imports torch, so nothing that needs it is imported above
    from common.inputs import load_inputs
    from common.run import common_results, finish_run, start_run
    from common.search.budget import Budget, EvaluationSplit, why_too_few, why_too_strict
    from pipeline import plots, steps, story
    from pipeline.answers import find_answers
    from pipeline.candidates import CandidateBuilder
    from pipeline.store import Store
    from quantization.files.artifact import write_checks
    from quantization.int8 import engines
    from quantization.steps import CalibrationSetup, predict_fp32
    from training.loop.distillation import Training

    with start_run(args) as (workers, folder):
        settings = engines.choose_settings(args.engine or engines.fastest_engine())
        if args.export_onnx:
            engines.require_engine("onnxruntime")
        inputs = load_inputs(args, Path(__file__).parent)
        choosing, confirming = map(inputs.test.rows, inputs.test.halves(args.seed))
        if reason := why_too_strict(len(inputs.test), args.max_drop):
            cli.log.warning("--max-drop: %s: only a network better than FP32 can pass", reason)
        elif reason := why_too_few(len(confirming), args.max_drop):
            cli.log.warning("--max-drop: %s", reason)
        if "both" in args.goals and "speed" not in args.goals:
            cli.log.info("both starts from a fast network, so the search for speed is made too")
        training = Training.read(inputs, args.finetune_epochs, args.finetune_images, workers.device)
        batch_size = inputs.fit_batch_size(args.batch_size)
        identity = steps.identify(inputs, settings, batch_size, training)
        store = Store(folder.keep_unfinished(identity, args.resume), inputs.model)
        setup = CalibrationSetup(inputs.calibration, choosing, batch_size)
        dense = predict_fp32(inputs.model, setup, workers.device)
        budget = Budget(args.max_drop, EvaluationSplit(choosing, dense == choosing.labels))
        builder = CandidateBuilder(inputs, settings, budget, store, batch_size, training)
        found = find_answers(builder, args.goals)
        results = common_results("pipeline", args, workers, inputs.describe())
        results["budget"] = {"max_drop": args.max_drop, "choosing_images": len(choosing)}
        files = steps.write_files(found, folder, inputs.file_stem)
        measured = steps.measure(builder, files, confirming, args.batch_sizes, args.timing_seconds)
        results |= steps.describe(builder, found, files, measured)
        if args.export_onnx:
            confirming_setup = replace(setup, images=confirming)
            steps.export_answers_to_onnx(results["answers"], files, confirming_setup)
        if args.write_check:
            write_checks(files.values(), confirming, folder.file, settings.engine)
        plots.plot_frontier(results, folder.file("frontier.png"))
        results["artifacts"] = {"model": results["answers"][-1]["file"]}
        finish_run(results, folder, started, story.tell, args)
    within = all(answer["within_budget"] for answer in results["answers"])
    return cli.EXIT_DONE if within else cli.EXIT_OVER_BUDGET


if __name__ == "__main__":
    sys.exit(main())
