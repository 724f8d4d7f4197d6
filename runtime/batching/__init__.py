"""Calls of many threads as one batch of one pipeline.

    with runtime.load("runs/demo/bundle-int8", batch_wait_ms=5.0) as pipeline:
        ...  # share it: what several threads ask for at once runs together

A `Pipeline` runs each call by itself and needs no thread; that is right for one caller. A `BatchedPipeline` is the same
to its users, but a thread of its own runs what all callers ask for: images are encoded together, prompts are read
together, and each further token of all texts is one run of the language model. A text that ends leaves at once, and a
waiting request joins before the next token.
"""
