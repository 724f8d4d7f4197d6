"""Every recipe fits the models; what does not fit is refused with one helpful sentence per problem."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from qforge.recipe import Recipe, load_recipe, parse_recipe, recipe_keys
from runtime.errors import InputError, MissingFile

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def refusal(text: str, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        parse_recipe(text, overrides, source="r.yaml")
    return str(caught.value)


def test_the_named_recipes_are_there() -> None:
    assert {"demo", "smoke", "easy-vqa"} <= {path.stem for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_valid_and_survives_its_resolved_copy(path: Path) -> None:
    recipe = load_recipe(path)
    assert parse_recipe(recipe.to_yaml(), source="resolved") == recipe


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_says_only_what_differs_from_the_defaults(path: Path) -> None:
    def repeated(tree: dict[str, object], defaults: dict[str, object], prefix: str = "") -> list[str]:
        found = []
        for key, value in tree.items():
            default = defaults[key]
            if isinstance(value, dict) and isinstance(default, dict):
                found += repeated(value, default, f"{prefix}{key}.")
            elif value == default:
                found.append(prefix + key)
        return found

    assert not repeated(yaml.safe_load(path.read_text()), Recipe().model_dump(mode="json"))


def test_resolved_copy_names_every_key() -> None:
    tree = yaml.safe_load(Recipe().to_yaml())
    for dotted in recipe_keys():
        node = tree
        for key in dotted.split("."):
            assert key in node, dotted
            node = node[key]


def test_schema_for_editors_is_current() -> None:
    stored = json.loads((ROOT / "recipes" / "schema.json").read_text())
    assert stored == Recipe.model_json_schema(), "renew it: python -m qforge.recipe > recipes/schema.json"


def test_every_setting_is_described() -> None:
    def models(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
        yield model
        for field in model.model_fields.values():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                yield from models(field.annotation)

    for model in models(Recipe):
        family = [base for base in model.__mro__ if issubclass(base, BaseModel)]
        for name in model.model_fields:
            described = [base.model_fields[name].description for base in family if name in base.model_fields]
            assert any(described), f"{model.__name__}.{name} has no sentence under it"


def test_override_replaces_one_key() -> None:
    recipe = parse_recipe("stage1: {steps: 3}\n", ["stage1.steps=50", "vqa.learning_rate=1e-4"], source="r.yaml")
    assert (recipe.stage1.steps, recipe.vqa.learning_rate) == (50, 1e-4)
    assert recipe.stage1.batch_size == Recipe().stage1.batch_size


def test_override_reaches_below_an_empty_section() -> None:
    assert parse_recipe("stage1:\n", ["stage1.steps=7"], source="r.yaml").stage1.steps == 7


@pytest.mark.parametrize(
    ("text", "override", "expected"),
    [
        ("stage1: {stepz: 3}", None, "r.yaml: stage1.stepz is not a recipe key; did you mean stage1.steps?"),
        ("stagee1: {steps: 3}", None, "r.yaml: stagee1 is not a recipe key; did you mean stage1?"),
        ("queries: 3", None, "r.yaml: queries is not a recipe key; did you mean model.qformer.queries?"),
        ("", "stage1.stepz=3", "--set stage1.stepz=3: stage1.stepz is not a recipe key; did you mean stage1.steps?"),
        ("", "stage1.lr=1", "--set stage1.lr=1: stage1.lr is not a recipe key; did you mean stage1.learning_rate?"),
        ("", "nothing.like.it=3", "--set nothing.like.it=3: nothing is not a recipe key; known here: seed, model, "),
        ("stage1: 5", None, "r.yaml: stage1 is a section with keys of its own, found 5."),
        ("stage1: 5", "stage1.steps=3", "--set stage1.steps=3: stage1 is a value (5), not a section with keys."),
        ("", "stage1.steps", "--set stage1.steps: expected KEY=VALUE with a dotted key"),
        ("", "=3", "--set =3: expected KEY=VALUE"),
        ("", "stage1..steps=3", "--set stage1..steps=3: expected KEY=VALUE"),
        ("", "stage1.steps=[1", "--set stage1.steps=[1:1: expected YAML, but"),
        ("stage1: {steps: many}", None, "r.yaml: stage1.steps: input should be a valid integer"),
        ("", "stage1.steps=-1", "--set stage1.steps=-1: stage1.steps: input should be greater than 0, found -1."),
        (
            "",
            "export.precisions=[fp32, int4]",
            "export.precisions.1: input should be 'fp32', 'fp16', 'bf16', 'int8' or 'fp8', found 'int4'.",
        ),
        ("a: 1\nb: [\n", None, "r.yaml:3: expected YAML, but"),
        ("seed: 1\nseed: 2\n", None, "r.yaml:2: expected YAML, but the key 'seed' is there twice."),
        ("- 1\n", None, "r.yaml: expected sections such as"),
        (
            "",
            "model.qformer.heads=7",
            "--set model.qformer.heads=7: model.qformer: width 768 is not a multiple of heads 7",
        ),
    ],
)
def test_what_does_not_fit_is_refused(text: str, override: str | None, expected: str) -> None:
    message = refusal(text, *([override] if override else []))
    assert expected in message
    assert len(message.splitlines()) == 1


def test_one_sentence_per_problem() -> None:
    message = refusal("stage1: {stepz: 3, batch_size: none}\nseed: -1\n")
    assert len(message.splitlines()) == 3
    assert all(re.match(r"r\.yaml: [\w.]+", line) for line in message.splitlines())


def test_missing_file_names_the_recipes_beside_it() -> None:
    with pytest.raises(MissingFile, match=r"demoo\.yaml: expected a recipe.*demo\.yaml"):
        load_recipe(ROOT / "recipes" / "demoo.yaml")


def test_a_folder_is_no_recipe() -> None:
    with pytest.raises(MissingFile, match="it is a folder"):
        load_recipe(ROOT / "recipes")
