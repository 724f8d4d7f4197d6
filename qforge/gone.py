"""Options that TensorRT 10 and its tools had and TensorRT 11 has not: who types one is told what to do instead."""

import re

PRECISION = (
    "TensorRT 11 takes no precision from its builder: the numeric type is written in the graphs. Export the bundle "
    "with --precision {type} --target tensorrt, then build it."
)
CALIBRATION = (
    "TensorRT 11 has no calibrators: INT8 ranges are measured at export. Export the bundle with --precision int8 "
    "--calibration FILE --target tensorrt, then build it."
)
WEIGHTS = (
    "Plans are built with their weights: a plan without them needs a GPU at build time, and its graph at load time."
)
GONE = {
    **{f"--{name}": PRECISION.format(type=name) for name in ("fp16", "bf16", "int8", "fp8")},
    "--int4": PRECISION.replace("--precision {type}", "--language-precision int4"),
    **dict.fromkeys(
        ("--best", "--precision", "--half", "--stronglyTyped", "--strongly-typed", "--precisionConstraints"),
        PRECISION.format(type="fp16"),
    ),
    **dict.fromkeys(("--layerPrecisions", "--layerOutputTypes", "--noTF32"), PRECISION.format(type="fp16")),
    **dict.fromkeys(("--calib", "--calibrator", "--calibration", "--calibration-cache"), CALIBRATION),
    **dict.fromkeys(("--refit", "--strip-plan", "--stripWeights"), WEIGHTS),
}
"""Option → what to do instead."""
UNKNOWN_OPTION = re.compile(r"No such option: (--[\w-]+)")


def explained(message: str, command: str) -> str:
    """The message about a wrong option of a command, longer where the option is one that users of TensorRT 10 know."""
    found = UNKNOWN_OPTION.match(message)
    if found is None or not command.endswith(" build") or found[1] not in GONE:
        return message
    return f"No such option: {found[1]}. {GONE[found[1]]}"
