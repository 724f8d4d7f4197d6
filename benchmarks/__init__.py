"""Bundle against eager PyTorch: accuracy, latency, memory, size."""
