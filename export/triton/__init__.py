"""A bundle as a Triton model repository: one served model per graph, and one that chains them."""
