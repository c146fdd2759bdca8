"""The same picture gives the same embedding through every door, or is refused at every door, by its name."""

import warnings

import pytest
import torch
from fixtures.doors import Doors, plainly
from fixtures.pictures import make_zoo

ALIKE = 0.999
ZOO = {picture.name: picture for picture in make_zoo()}
DOORS = ("processor", "training", "evaluation", "index", "query", "teacher", "regions", "reinforced", "space")
NEEDS = {"index": "faiss", "space": "gradio"}
# Doors through which a picture takes the same pixels, bit for bit.
SAME_PIXELS = ("processor", "training", "evaluation", "query")


@pytest.fixture(scope="module")
def doors(tmp_path_factory):
    return Doors(tmp_path_factory.mktemp("doors"))


@pytest.fixture(scope="module")
def references(doors):
    return {name: doors.reference(picture.plain) for name, picture in ZOO.items() if picture.plain is not None}


@pytest.fixture(scope="module")
def found():
    return {}


def test_the_zoo_is_large_and_its_pictures_differ_from_others(doors, references):
    assert len(ZOO) >= 90 and len(references) >= 80
    assert float(references["png"] @ references["dot"]) < 0.9  # a door that reads another picture does not pass
    white = doors.reference(ZOO["png"].plain.point(lambda value: 255))
    assert float(references["grey"] @ white) < 0.95


@pytest.mark.parametrize("door", DOORS)
def test_a_picture_is_the_same_or_refused_through(door, doors, references, found):
    if door in NEEDS:
        pytest.importorskip(NEEDS[door])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PIL, on damaged metadata
        outcomes = doors.all()[door](list(ZOO.values()))
    expected = references
    if door in doors.RESIZED:
        expected = doors.all()[door](plainly(ZOO.values()))
    assert set(outcomes) == set(ZOO)
    for name, picture in ZOO.items():
        if picture.plain is None:
            assert isinstance(outcomes[name], str), f"{name} ({picture.what}) was read"
            assert door == "processor" or picture.refusal in outcomes[name], name
        else:
            assert not isinstance(outcomes[name], str), f"{name} ({picture.what}): {outcomes[name]}"
            cosine = float(torch.nn.functional.cosine_similarity(outcomes[name], expected[name], dim=0))
            assert cosine >= ALIKE, f"{name} ({picture.what}): {cosine:.4f}"
    found[door] = outcomes


def test_doors_that_resize_alike_give_equal_embeddings(found):
    there = [found[door] for door in SAME_PIXELS if door in found]
    for name, picture in ZOO.items():
        if picture.plain is not None:
            for other in there[1:]:
                torch.testing.assert_close(other[name], there[0][name], rtol=0, atol=1e-6)
