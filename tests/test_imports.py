"""Who may import whom, and what stays light, as tests: a rule is only real when it fails."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "runtime": set[str](),
    "trainer": {"runtime"},  # same preprocessing, text normalisation and scoring
    "export": {"trainer", "runtime"},
    "benchmarks": {"trainer", "export", "runtime"},
    "qforge": {"trainer", "export", "runtime", "benchmarks"},  # lazily; nobody imports it back
}
HEAVY = {"torch", "transformers", "onnx"}


def packages_imported_by(path: Path) -> set[str]:
    """Top-level packages of every import in a file, those inside functions and type-checking blocks included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.relative_to(ROOT)} imports relatively; name the package"
            found.add(str(node.module).partition(".")[0])
    return found


def files_of(package: str) -> list[Path]:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files, f"{package}/ holds no Python file"
    return files


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_one_way(package: str) -> None:
    allowed = MAY_IMPORT[package] | {package}
    for path in files_of(package):
        wrong = packages_imported_by(path) & set(MAY_IMPORT) - allowed
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_no_file_of_the_runtime_names_a_heavy_package() -> None:
    for path in files_of("runtime"):
        wrong = packages_imported_by(path) & HEAVY
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def in_fresh_python(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_runtime_needs_no_torch() -> None:
    modules = [str(path.relative_to(ROOT).with_suffix("")).replace("/", ".") for path in files_of("runtime")]
    modules = [module.removesuffix(".__init__") for module in modules]
    in_fresh_python(
        "import importlib, sys\n"
        f"for name in {sorted(HEAVY)!r}: sys.modules[name] = None\n"  # None makes the import raise
        f"for name in {modules!r}: importlib.import_module(name)\n"
    )


def test_answering_needs_no_torch() -> None:
    in_fresh_python(
        "import sys\n"
        f"for name in {sorted(HEAVY)!r}: sys.modules[name] = None\n"
        "import qforge.verbs_answer, qforge.verbs_bundle, qforge.verbs_cache, qforge.verbs_retrieval, qforge.doctor\n"
        "import qforge.evaluation\n"
    )


def test_the_face_is_free() -> None:
    in_fresh_python(
        "import sys, qforge, qforge.cli\n"
        "heavy = {'torch', 'transformers', 'onnx', 'onnxruntime', 'numpy', 'pydantic', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )


@pytest.mark.parametrize(
    "module",
    [
        "trainer.config",
        "trainer.data_config",
        "trainer.stage_config",
        "export.config",
        "benchmarks.config",
        "qforge.recipe",
    ],
)
def test_reading_a_recipe_loads_nothing_heavy(module: str) -> None:
    in_fresh_python(
        f"import sys, {module}\n"
        "heavy = {'torch', 'transformers', 'onnx', 'onnxruntime', 'numpy', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
