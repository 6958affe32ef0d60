"""Names of what is compared, in results.json, tables and plots."""

ENGINE_PREFIX = "int8-"  # begins the names of our engines' rows
OURS, NNCODEC, TORCH_PRUNING = "ours", "NNCodec", "Torch-Pruning"
ONNX_RUNTIME = "ONNX Runtime + zstd"
