"""The two shapes that decoding is tested on."""

import numpy as np
import pytest
import torch

from tests.runtime.decoding.family import Family, make_family


@pytest.fixture(scope="session", params=["opt", "t5"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    """A model that ends some of its texts early."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("decoding")
    never = make_family(request.param, folder, [2])
    said = [token for texts in never.ours() for token in set(texts[0][2:9])]
    often = int(np.bincount(said).argmax())  # an end token that many texts really say, and in their middle
    return make_family(request.param, folder, [2, often])
