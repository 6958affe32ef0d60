"""Compare this project's answers with what other tools make of the same network, untrained.

    python pipeline/pipeline.py --bundled
    python benchmarks/compression_peers.py --bundled

Rows: NNCodec (ISO/IEC 15938-17), Torch-Pruning (magnitude, batch norms estimated again where that
helps, then made INT8 here), ONNX Runtime's own quantizer with zstd, and the answers of pipeline.py.
All of them see the same weights and calibration images; they are evaluated on the images that
pipeline.py did not choose on, and timed in turns. docs/peers.md has runs.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.command import argument_types, arguments, cli


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = arguments.make_parser(__doc__)
    arguments.add_shared_arguments(parser, "compression_peers", with_device=False)
    parser.set_defaults(test_images="all")
    parser.add_argument(
        "--pipeline", type=argument_types.path, metavar="DIR",
        default=cli.WORKSPACE / "results" / "pipeline",
        help="results of pipeline.py for the same network, test images and seed",
    )  # fmt: skip
    arguments.add_calibration_argument(parser, 1000)
    arguments.add_timing_arguments(parser, batch_sizes=[1, 32], seconds=5.0)
    return parser


@cli.exit_codes
def main(argv: list[str] | None = None) -> int:
    """Load, compress by every tool, evaluate, time in turns, write."""
    args = arguments.parse_arguments(build_parser(), argv, {})
    started = cli.start(args.quiet)  # imports torch, so nothing that needs it is imported above
    from benchmarks import peers, peers_report
    from common.inputs import load_inputs
    from common.measure.evaluate import Paired, measure_accuracy
    from common.measure.latency import Contender, time_interleaved
    from common.network.size import saved_size_bytes
    from common.run import common_results, finish_run, start_run
    from quantization.int8 import engines
    from quantization.steps import CalibrationSetup

    with start_run(args) as (workers, folder), tempfile.TemporaryDirectory() as files:
        settings = engines.choose_settings(engines.fastest_engine())
        inputs = load_inputs(args, Path(__file__).parent)
        _, confirming = map(inputs.test.rows, inputs.test.halves(args.seed))
        setup = CalibrationSetup(inputs.calibration, confirming, args.batch_size)
        fp32 = engines.fp32_runner(inputs.traced.network)
        dense = setup.predict(fp32, "dense FP32") == confirming.labels
        rows, contenders = [], []
        for made in peers.compress(inputs, settings, args.batch_size, args.pipeline, Path(files)):
            name = f"{made.method}, {made.setting}"
            correct = setup.predict(made.run, name) == confirming.labels
            row = {"method": made.method, "setting": made.setting, "size_bytes": made.size_bytes}
            rows.append(row | Paired.of(dense, correct).as_dict())
            if made.timed:
                contenders.append(Contender(name, made.run))
        images = confirming.normalize(confirming.images[: max(args.batch_sizes)])
        timings = time_interleaved(contenders, images, args.batch_sizes, args.timing_seconds)
        for row in rows:
            if timed := timings.get(f"{row['method']}, {row['setting']}"):
                row["latency"] = [timing.as_dict() for timing in timed]

        results = common_results("compression_peers", args, workers, inputs.describe())
        results["fp32"] = {
            "size_bytes": saved_size_bytes(inputs.model.state_dict()),
            "accuracy": measure_accuracy(dense).as_dict(),
        }
        results["rows"] = rows
        peers_report.plot(results, folder.file(peers_report.PLOT))
        finish_run(results, folder, started, peers_report.tell, args)
    return cli.EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
