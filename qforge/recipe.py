"""One run is one recipe: YAML in, one frozen object out; whatever the schema does not know is refused.

Each section is defined by the package that uses it, and that model holds the only default of every setting. A
recipe file says only what differs; `Recipe.to_yaml()` writes everything, and what it writes is a recipe again.

    python -m qforge.recipe > recipes/schema.json     # the JSON Schema that editors complete recipes with
"""

import difflib
import json
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, NonNegativeInt, ValidationError, model_validator
from pydantic_core import ErrorDetails

from benchmarks.config import BenchConfig
from export.config import ExportConfig
from runtime.errors import InputError, MissingFile
from runtime.settings import Settings
from trainer.config import (
    STAGES,
    CaptionConfig,
    DataConfig,
    ModelConfig,
    RetrievalConfig,
    Stage1Config,
    Stage2Config,
    StageName,
    VqaConfig,
)


class Recipe(Settings):
    """One whole run: data, model, training stages, export, benchmark."""

    seed: NonNegativeInt = 0
    """Seed of weights, order and dropout; with the same seed a run gives the same weights."""
    model: ModelConfig = ModelConfig()
    """The halves and the bridge between them."""
    data: DataConfig = DataConfig()
    """Image-text pairs."""
    stages: tuple[StageName, ...] = Field(default=("stage1", "stage2", "vqa"), min_length=1)
    """Which stages are trained, in the order stage1, stage2, caption, vqa, retrieval; the last one is what is exported.
    caption and vqa go on from stage2, retrieval from stage1, or from the nearest stage before it that is listed.
    """
    stage1: Stage1Config = Stage1Config()
    """Representation learning with the frozen image encoder."""
    stage2: Stage2Config = Stage2Config()
    """Generative learning with the frozen language model."""
    caption: CaptionConfig = CaptionConfig()
    """Fine-tune on captions."""
    vqa: VqaConfig = VqaConfig()
    """Fine-tune on questions."""
    retrieval: RetrievalConfig = RetrievalConfig()
    """Fine-tune for search."""
    export: ExportConfig = ExportConfig()
    """What becomes a bundle."""
    bench: BenchConfig = BenchConfig()
    """What is measured."""

    @model_validator(mode="after")
    def _stages_in_order(self) -> "Recipe":
        ordered = tuple(stage for stage in STAGES if stage in self.stages)
        if self.stages != ordered:
            raise ValueError(f"stages: expected each once and in order: {', '.join(ordered)}")
        return self

    def to_yaml(self) -> str:
        """Every setting, defaults included; itself a valid recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe and apply `a.b=c` overrides.

    Raises MissingFile when there is no such file, InputError with one sentence per problem otherwise.
    """
    if not path.is_file():
        found = "it is a folder" if path.is_dir() else "there is no such file"
        nearby = ", ".join(sorted(str(other) for other in path.parent.glob("*.yaml"))) or "none"
        raise MissingFile(f"{path}: expected a recipe (YAML), but {found}; recipes beside it: {nearby}.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected a recipe in UTF-8 text, found byte {error.start} that is not.") from error
    return parse_recipe(text, overrides, source=str(path))


def parse_recipe(text: str, overrides: Sequence[str] = (), *, source: str) -> Recipe:
    """`load_recipe` on text; `source` names it in errors."""
    tree = _read_yaml(text, source)
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise InputError(f"{source}: expected sections such as `stage1: {{steps: 300}}`, found {_shown(tree)}.")
    sources = {}
    for override in overrides:
        dotted = _apply(tree, override)
        sources[dotted] = f"--set {override}"
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        problems = [_sentence(problem, sources, source) for problem in error.errors(include_url=False)]
        raise InputError("\n".join(problems)) from error


def recipe_keys(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[str]:
    """Every dotted key that a recipe or `--set` may name, sections included."""
    for name, field in model.model_fields.items():
        yield prefix + name
        section = _section(field.annotation)
        if section is not None:
            yield from recipe_keys(section, f"{prefix}{name}.")


class _OnceLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys without a word; a recipe refuses the second."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is there twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _read_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _OnceLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{source}:{mark.line + 1}" if mark is not None else source
        problem = getattr(error, "problem", None) or str(error)
        raise InputError(f"{place}: expected YAML, but {problem}.") from error


def _apply(tree: dict[str, Any], override: str) -> str:
    """Write one `a.b=c` into the tree; returns `a.b`."""
    dotted, equals, value = override.partition("=")
    dotted = dotted.strip()
    if not equals or not all(dotted.split(".")):
        raise InputError(f"--set {override}: expected KEY=VALUE with a dotted key, such as --set stage1.steps=50.")
    *sections, key = dotted.split(".")
    node = tree
    for depth, section in enumerate(sections):
        child = node.setdefault(section, {})
        if child is None:  # `stage1:` with nothing below it
            child = node[section] = {}
        if not isinstance(child, dict):
            parent = ".".join(sections[: depth + 1])
            raise InputError(f"--set {override}: {parent} is a value ({_shown(child)}), not a section with keys.")
        node = child
    node[key] = _read_yaml(value, f"--set {override}")
    return dotted


def _sentence(problem: ErrorDetails, sources: Mapping[str, str], source: str) -> str:
    """What was wrong with one key, as one sentence that names where it came from."""
    dotted = ".".join(str(part) for part in problem["loc"])
    origin = next(
        (
            said
            for key, said in sources.items()
            if f"{dotted}.".startswith(f"{key}.") or f"{key}.".startswith(f"{dotted}.")
        ),
        source,
    )
    if problem["type"] == "extra_forbidden":
        return f"{origin}: {dotted} is not a recipe key; {_nearest(dotted)}"
    if problem["type"] in {"model_type", "model_attributes_type"}:
        return f"{origin}: {dotted} is a section with keys of its own, found {_shown(problem['input'])}."
    message = problem["msg"].removeprefix("Value error, ").rstrip(".")
    if problem["type"] == "value_error":
        return f"{origin}: {dotted}: {message}."
    return f"{origin}: {dotted}: {message[:1].lower()}{message[1:]}, found {_shown(problem['input'])}."


def _nearest(dotted: str) -> str:
    """Point from an unknown key to the known one that was most likely meant."""
    keys = list(recipe_keys())
    parent, _, name = dotted.rpartition(".")
    siblings = [key.rpartition(".")[2] for key in keys if key.rpartition(".")[0] == parent]
    close = [key for key in siblings if _initials(key) == name] or difflib.get_close_matches(name, siblings, n=1)
    if close:
        return f"did you mean {parent + '.' if parent else ''}{close[0]}?"
    elsewhere = [key for key in keys if key.rpartition(".")[2] == name]
    if not elsewhere and not siblings:
        elsewhere = difflib.get_close_matches(dotted, keys, n=1)
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    return f"known here: {', '.join(siblings)}." if siblings else f"known sections: {', '.join(Recipe.model_fields)}."


def _initials(key: str) -> str:
    """What people call a setting: lr for learning_rate."""
    return "".join(word[:1] for word in key.split("_"))


def _section(annotation: Any) -> type[BaseModel] | None:
    """The pydantic model behind a field's annotation, `Model | None` included, but not the items of a list."""
    if get_origin(annotation) is tuple:
        return None
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


if __name__ == "__main__":
    print(json.dumps(Recipe.model_json_schema(), indent=1))
