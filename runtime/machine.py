"""What tells one machine from another where it matters for speed and for the last bits of an answer."""

import platform
import re
from pathlib import Path

from runtime.cores import physical_cores
from runtime.gpu import compute_capability_here

CPUINFO = Path("/proc/cpuinfo")


def cpu_name() -> str:
    """The processor's own name, or its architecture where the kernel does not say."""
    text = CPUINFO.read_text() if CPUINFO.exists() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def describe() -> dict[str, str]:
    """Processor, usable cores and kind of GPU; where these are equal, one machine's measurements hold for another."""
    capability = compute_capability_here()
    gpu = "none" if capability is None else f"compute capability {capability[0]}.{capability[1]}"
    return {"cpu": cpu_name(), "physical_cores": str(physical_cores()), "gpu": gpu}
