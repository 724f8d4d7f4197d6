"""A source that cannot be trusted is one sentence with file, key, expected and found; nothing is half-written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.published import edit_json
from tests.trainer.convert.conftest import Case, qforge


class Opens:
    """Would touch a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.path), "w"))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def cut(path: Path, kept: int) -> None:
    path.write_bytes(path.read_bytes()[:kept])


def swap_for_pickle(folder: Path, content: object) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")


def set_config(**changes: Any) -> Callable[[Path], None]:
    def change(tree: dict[str, Any]) -> None:
        for dotted, value in changes.items():
            *sections, key = dotted.split("__")
            node = tree
            for section in sections:
                node = node[section]
            node[key] = value

    return lambda folder: edit_json(folder / "config.json", change)


def set_images(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(
        folder / "processor_config.json", lambda tree: tree["image_processor"].update(changes)
    )


QUERY = "qformer.encoder.layer.0.attention.attention.query.weight"
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda f: cut(f / "model.safetensors", 9000), "model.safetensors is truncated or damaged"),
    "no header": (lambda f: cut(f / "model.safetensors", 3), "model.safetensors is truncated or damaged"),
    "unsafe pickle": (
        lambda f: swap_for_pickle(f, {"a": Opens(f / "touched")}),
        "pytorch_model.bin: expected tensors alone (weights_only), found Python objects",
    ),
    "no pickle": (
        lambda f: (swap_for_pickle(f, {}), (f / "pytorch_model.bin").write_bytes(b"hello")),
        "pytorch_model.bin",
    ),
    "a list": (lambda f: swap_for_pickle(f, [torch.ones(1)]), "expected a dictionary of tensors, found list"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "expected weights (model.safetensors or"),
    "no config": (lambda f: (f / "config.json").unlink(), "expected a Hugging Face folder with config.json"),
    "config no JSON": (lambda f: cut(f / "config.json", 40), "config.json: expected JSON"),
    "wrong architecture": (
        set_config(architectures=["LlavaForConditionalGeneration"]),
        "expected the architecture Blip2ForConditionalGeneration or Blip2ForImageTextRetrieval or "
        "InstructBlipForConditionalGeneration, found LlavaForConditionalGeneration",
    ),
    "no architecture": (set_config(architectures=None), "found none (model_type 'blip-2')"),
    "quantised": (set_config(quantization_config={"bits": 4}), "expected original weights, found quantised ones"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "expected the language model's tokenizer"),
    "no processor": (lambda f: (f / "processor_config.json").unlink(), "expected preprocessor_config.json"),
    "unknown key": (
        lambda f: change_tensors(f, lambda t: t.update(mystery=torch.ones(2))),
        "0 missing, 1 unknown (mystery)",
    ),
    "missing key": (lambda f: change_tensors(f, lambda t: t.pop(QUERY)), f"1 missing ({QUERY}), 0 unknown"),
    "wrong shape": (
        lambda f: change_tensors(f, lambda t: t.update({QUERY: torch.ones(24, 20)})),
        f"{QUERY} expected shape [24, 24] by config.json, found [24, 20]",
    ),
    "integer weights": (
        lambda f: change_tensors(f, lambda t: t.update({QUERY: torch.ones(24, 24, dtype=torch.int8)})),
        "quantised weights cannot be imported",
    ),
    "queries": (
        set_config(num_query_tokens=7),
        "query_tokens expected shape [1, 7, 24] by config.json, found [1, 4, 24]",
    ),
    "Q-Former layers": (
        set_config(qformer_config__num_hidden_layers=5),
        "config.json says 5 layers in qformer.encoder.layer, the weights hold 3",
    ),
    "vision layers": (
        set_config(vision_config__num_hidden_layers=3),
        "config.json says 3 layers in encoder.layers, the weights hold 2",
    ),
    "language layers": (
        set_config(text_config__num_hidden_layers=1),
        "config.json says 1 layers in model.decoder.layers, the weights hold 2",
    ),
    "language width": (set_config(text_config__hidden_size=64, text_config__word_embed_proj_dim=64), "found ["),
    "vocabulary": (set_config(text_config__vocab_size=100), "expected shape [100, 32] by config.json, found ["),
    "bad number": (set_config(vision_config__num_attention_heads="many"), "config.json: transformers"),
    "unknown activation": (set_config(qformer_config__hidden_act="swoosh"), "qformer.activation: expected one of"),
    "crop": (set_images(do_center_crop=True), "expected do_center_crop False, found True"),
    "aspect ratio": (set_images(size={"shortest_edge": 16}), "expected a square size (height and width), found"),
    "rescale": (set_images(rescale_factor=0.5), "expected rescale_factor 1/255, found 0.5"),
    "filter": (set_images(resample=5), "expected resample 0, 1, 2, 3 (PIL), found 5"),
    "two sizes": (
        set_images(size={"height": 20, "width": 20}),
        "say which is meant: --image-size 16 or --image-size 20",
    ),
    "no mean": (
        lambda f: edit_json(f / "processor_config.json", lambda tree: tree["image_processor"].pop("image_mean")),
        "expected image_mean and image_std",
    ),
}


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def told(source: str | Path, *options: str | Path) -> str:
        capsys.readouterr()
        assert qforge("import", source, "--out", tmp_path / "out", *options) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "Traceback" not in captured.err
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".out*")), "something half-written was left"
        return captured.err

    return told


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_is_refused(name: str, case: Callable[[str], Case], refused, tmp_path: Path) -> None:
    damage, sentence = DAMAGES[name]
    shutil.copytree(case("opt").source, tmp_path / "source")
    damage(tmp_path / "source")
    said = refused(tmp_path / "source")
    assert sentence in said
    assert len(said.splitlines()) == 1, said
    assert not (tmp_path / "source/touched").exists(), "a pickle was run"


def test_damaged_parts_are_refused(case: Callable[[str], Case], refused, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(case("opt-untied-sharded").source, source)
    index = source / "model.safetensors.index.json"
    good, part = index.read_text(), sorted(source.glob("model-*.safetensors"))[0]
    edit_json(index, lambda tree: tree["weight_map"].update(mystery=part.name))
    assert "mystery (only in the index)" in refused(source)
    edit_json(index, lambda tree: tree["weight_map"].update(mystery="../elsewhere.safetensors"))
    assert "expected parts beside it, found '../elsewhere.safetensors'" in refused(source)
    index.write_text(good)
    part.rename(source / "gone")
    assert f"{part.name}: expected weights, found no such file" in refused(source)


def test_a_retrieval_folder_without_a_text_ffn_is_refused(case: Callable[[str], Case], refused, tmp_path: Path) -> None:
    shutil.copytree(case("retrieval").source, tmp_path / "source")
    set_config(qformer_config__use_qformer_text_input=False)(tmp_path / "source")
    assert "needs use_qformer_text_input true" in refused(tmp_path / "source")


def test_an_instructblip_without_its_second_tokenizer_is_refused(case, refused, tmp_path: Path) -> None:
    shutil.copytree(case("instruct-llama").source, tmp_path / "source")
    shutil.rmtree(tmp_path / "source/qformer_tokenizer")
    assert "qformer_tokenizer: expected the Q-Former's tokenizer" in refused(tmp_path / "source")


def test_damaged_side_files_are_refused(case: Callable[[str], Case], refused, tmp_path: Path) -> None:
    source = tmp_path / "source"
    assert qforge("to-hf", case("opt").checkpoint, "--out", source) == 0
    assert "only --text-from fits" in refused(source, "--image-size", 24)
    edit_json(source / "qforge.json", lambda tree: tree.update(architecture="Blip2ForImageTextRetrieval"))
    assert "expected it beside a Blip2ForImageTextRetrieval, found Blip2ForConditionalGeneration" in refused(source)
    (source / "qforge.json").write_text("{}")
    assert "expected what `qforge to-hf` wrote, found another file" in refused(source)


def test_sources_that_are_not_there(case: Callable[[str], Case], refused, tmp_path: Path) -> None:
    assert "expected a Hugging Face folder, a LAVIS .pth or a hub id (owner/name)" in refused(tmp_path / "none")
    said = refused("someone/blip2-something")
    assert "is no folder here; fetching it from the hub" in said.splitlines()[0]
    assert "no such folder here, and the hub did not give it" in said.splitlines()[1]
    for option in ("--vision", "--language", "--text-tokenizer"):
        assert f"{option} is for LAVIS files" in refused(case("opt").source, option, tmp_path)


def test_the_source_is_never_replaced(case: Callable[[str], Case], tmp_path: Path, capsys) -> None:
    source = tmp_path / "checkpoint" / "source"
    shutil.copytree(case("opt").source, source)
    (tmp_path / "checkpoint" / "metrics.json").write_text(json.dumps({}))
    assert qforge("import", source, "--out", tmp_path / "checkpoint") == 2
    assert "--out would replace the source" in capsys.readouterr().err
    assert (source / "model.safetensors").is_file()
