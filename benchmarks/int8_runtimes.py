"""Compare our INT8 model with other runtimes: same weights, same images, equal threads.

    python benchmarks/int8_runtimes.py --bundled --threads 2
    python benchmarks/int8_runtimes.py --slim results/pruning/resnet18_cifar10_slim.pth

Every runtime gets the same FP32 weights and calibration images, or our calibrated model as an ONNX
file; all of them are timed in turns, in one process, on the CPU. The table shows images a second
and, in brackets, the share of the rate that a large INT8 matrix product reaches on the same cores.
docs/runtimes.md has a run, and what was tried to be faster.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.command import argument_types, arguments, cli

DEFAULT_OUTPUT_DIR = cli.REPOSITORY / "results" / "int8_runtimes"
PLOT = "int8_runtimes.png"


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = arguments.make_parser(__doc__)
    arguments.add_shared_arguments(parser, DEFAULT_OUTPUT_DIR, with_report=False, with_device=False)
    parser.set_defaults(batch_size=128)
    parser.add_argument(
        "--slim",
        type=argument_types.path,
        metavar="FILE",
        help="checkpoint of narrower layers, for a row of its own",
    )
    arguments.add_calibration_argument(parser)
    arguments.add_timing_arguments(parser, batch_sizes=[1, 8, 32, 128], seconds=20.0)
    return parser


@cli.exit_codes
def main(argv: list[str] | None = None) -> int:
    """Load, quantize everywhere, evaluate, time in turns, write."""
    args = build_parser().parse_args(argv)
    cli.set_up_messages(args.quiet)
    started = time.perf_counter()

    cli.import_torch()  # it takes seconds, so nothing that needs it is imported above
    from quantization.bench import Bench

    from benchmarks import runtimes, runtimes_report
    from common.files import output
    from common.images import data
    from common.inputs import load_inputs
    from common.machine import device
    from common.machine.workers import ALONE
    from common.measure import latency
    from common.network import checkpoint, size, tracing
    from common.report import results as report
    from common.run import finish_run, print_results

    device.set_up_cpu(args.threads)
    with output.OutputFolder(args.output_dir, args.overwrite) as folder:
        inputs = load_inputs(args, Path(__file__).parent)
        test, networks = inputs.test, {"dense": inputs.model}
        if args.slim is not None:
            networks["slim"] = checkpoint.load_model(args.slim)
        with tempfile.TemporaryDirectory() as models:
            bench = Bench(inputs.calibration, test, args.batch_size)
            runners = make_runners(networks, bench, Path(models))
            predictions = {name: bench.predict(r.run, name) for name, r in runners.items()}
            contenders = [
                latency.Contender(name, r.run, r.memory_format) for name, r in runners.items()
            ]
            images = data.normalize(test.images[: max(args.batch_sizes)])
            timings = latency.time_interleaved(
                contenders, images, args.batch_sizes, args.timing_seconds
            )
        accuracies = {
            name: float((classes == test.labels).double().mean())
            for name, classes in predictions.items()
        }
        macs = {
            name: size.count_macs(tracing.trace_network(network, test.shape))
            for name, network in networks.items()
        }
        gemm_rate = runtimes.measure_gemm_rate()
        cli.log.info("INT8 GEMM: %.0f GMAC/s", gemm_rate / 1e9)

        results = report.common_results(
            "int8_runtimes", args, ALONE, inputs.describe_images(), inputs.weights
        )
        results |= {"gemm_macs_per_second": gemm_rate, "macs_per_image": macs["dense"]}
        results["rows"] = runtimes_report.describe(runners, accuracies, timings, macs, gemm_rate)
        results["artifacts"] = {"plots": [PLOT]}
        runtimes_report.plot(results, folder.file(PLOT))
        finish_run(results, folder, started)
    print_results(results, runtimes_report.format_results(results), args.json)
    return cli.EXIT_DONE


def make_runners(networks: dict, bench, folder: Path) -> dict:
    """Return a runner by name; those of a missing package are left out, and a line says so."""
    from benchmarks import runtimes
    from quantization import steps
    from quantization.files import onnx_export
    from quantization.int8 import engines

    model, calibration = networks["dense"], bench.calibration
    runners = {"torch-fp32": runtimes.torch_fp32(model)}
    has_onnx = runtimes.has_package("onnx", "all rows of ONNX Runtime and OpenVINO")
    has_onnxruntime = has_onnx and runtimes.has_package(
        "onnxruntime", "onnxruntime-fp32, onnxruntime-int8-ours, onnxruntime-int8"
    )
    if has_onnxruntime:
        runners["onnxruntime-fp32"] = runtimes.onnxruntime_fp32(model, folder)
    if runtimes.has_compiler("torch-bf16"):
        runners["torch-bf16"] = runtimes.torch_bf16(model)
    settings = [engines.choose_settings(engine) for engine in engines.candidate_engines()]
    quantized = steps.quantize(model, bench, settings)
    for candidate in quantized:
        name = f"torch-int8-{candidate.settings.engine}"
        runners[name] = runtimes.torch_plain(candidate, folder)
        runners[f"{name}-deployed"] = runtimes.torch_deployed(candidate, folder)
    if "slim" in networks:
        chosen = settings[-1]  # onednn, where there is more than one
        (slim,) = steps.quantize(networks["slim"], bench, [chosen])
        runners[f"torch-int8-{chosen.engine}-slim"] = runtimes.torch_deployed(slim, folder)
    pt2e = "torch-int8-pt2e"
    if runtimes.has_package("torchao", pt2e) and runtimes.has_compiler(pt2e):
        runners[pt2e] = runtimes.torch_pt2e(model, calibration, folder)
    path = folder / "ours.onnx"
    if has_onnx:
        onnx_export.export_onnx(quantized[0].model, path)
    if has_onnxruntime:
        runners["onnxruntime-int8-ours"] = runtimes.onnxruntime_file(path)
        runners["onnxruntime-int8"] = runtimes.onnxruntime_own(model, calibration, folder)
    if has_onnx and runtimes.has_package("openvino", "openvino-int8-ours, openvino-int8"):
        runners["openvino-int8-ours"] = runtimes.openvino_ours(path)
        if runtimes.has_package("nncf", "openvino-int8"):
            runners["openvino-int8"] = runtimes.openvino_own(model, calibration, folder)
    return runners


if __name__ == "__main__":
    sys.exit(main())
