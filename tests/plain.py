"""What other tools ask of an ONNX file: the checker, strict shape inference, and Polygraphy's loader and inspector."""

from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO

import onnx
from polygraphy.backend.onnx import OnnxFromPath, infer_shapes
from polygraphy.tools._main import main as polygraphy

from runtime.bundle import Bundle


def assert_plain(bundle: Bundle, names: Sequence[str] | None = None) -> None:
    """Every graph of the bundle, or the named ones."""
    for name in names or bundle.manifest.graphs:
        path, entry = str(bundle.graph(name)), bundle.manifest.graphs[name]
        onnx.checker.check_model(path, full_check=True)
        model = onnx.shape_inference.infer_shapes(onnx.load(path), check_type=True, strict_mode=True, data_prop=True)
        for stated, values in ((entry.inputs, model.graph.input), (entry.outputs, model.graph.output)):
            for spec, value in zip(stated.values(), values, strict=True):
                found = [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
                assert found == list(spec.shape), (name, value.name)
        assert len(infer_shapes(OnnxFromPath(path)).graph.node) == len(model.graph.node)
        shown = inspected(path)
        assert f"{len(entry.inputs)} Graph Input(s)" in shown and f"{len(entry.outputs)} Graph Output(s)" in shown


def inspected(path: str) -> str:
    """What `polygraphy inspect model` prints; it must end with success."""
    out = StringIO()
    with redirect_stdout(out):
        try:
            code = polygraphy(["inspect", "model", path])
        except SystemExit as ended:
            code = ended.code
    assert not code, out.getvalue()
    return out.getvalue()
