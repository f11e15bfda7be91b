"""From an ONNX file to a checked graph of workloads and leftover operators."""
