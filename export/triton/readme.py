"""README.md of a Triton repository: what it serves, what the server needs, how to ask it."""

from export.triton.config import EngineName, can_be_batched
from runtime.manifest import Manifest


def readme(manifest: Manifest, engine: EngineName, max_batch: int) -> str:
    """Markdown text."""
    lines = ["| model | platform | requests joined |", "|---|---|---|"]
    for name, entry in manifest.graphs.items():
        joined = f"up to {max_batch}" if can_be_batched(entry) else "no: it reads a KV cache"
        lines.append(f"| qforge_{name} | {engine} | {joined} |")
    lines.append(f"| qforge | python | up to {max_batch} |")
    return f"""# qforge on Triton Inference Server

The bundle with digest `{manifest.digest}` ({manifest.precision}, language model {manifest.language_precision}), one
model per graph, and `qforge`, which chains them: image and question in, text out.

{chr(10).join(lines)}

## What the server needs

The Python backend, the {engine} backend, and four packages in the Python that the Python backend runs:

```bash
pip install "numpy>=2.1" "pillow>=11" "pydantic>=2.11" "tokenizers>=0.22"
```

qforge itself is not among them: its `runtime` package, with the encoder and the decode loop, lies beside
`qforge/1/model.py` as it was when this folder was written. A copy cannot drift from the graphs it was verified with,
and a server without network needs no package of ours.

```bash
tritonserver --model-repository .
```

## Ask it

`qforge` takes IMAGE (an encoded file's bytes) or PIXELS (uint8, height x width x 3), QUESTION and PROMPT (both
optional; an empty text counts as none), and gives TEXT. Without a question it captions.

```python
import numpy as np
import tritonclient.http as triton
from pathlib import Path

client = triton.InferenceServerClient("localhost:8000")
inputs = []
for name, value in (("IMAGE", Path("photo.jpg").read_bytes()), ("QUESTION", b"what colour is the circle?")):
    inputs.append(triton.InferInput(name, [1, 1], "BYTES"))
    inputs[-1].set_data_from_numpy(np.array([[value]], dtype=np.object_))
print(client.infer("qforge", inputs).as_numpy("TEXT")[0, 0].decode())
```

Requests that arrive together are answered as one batch; one whose image cannot be read gets an error of its own. The KV
cache of the language model travels between `qforge` and its graph at every token, through shared memory.
"""
