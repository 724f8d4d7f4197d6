"""Plans for GPUs: an ONNX graph of a bundle, built by TensorRT or TensorRT-RTX."""
