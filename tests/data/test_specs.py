"""Specs: taken apart once, into a value that knows its text, its split and how to build what it names."""

import re

import pytest

from modeling_dclip.data.captions import (
    CAPTION_SOURCES,
    load_captions,
    load_mix,
    load_uncaptioned,
    parse_caption_spec,
)
from modeling_dclip.data.labels import LABEL_SOURCES, load_classification, parse_label_spec
from modeling_dclip.data.questions import QUESTION_SOURCES, load_fine_grained, parse_question_spec
from modeling_dclip.data.regions.detectors import DETECTORS, build_detector
from modeling_dclip.data.specs import Source, Spec, parse_spec


def test_a_spec_falls_apart_into_fields_options_and_count():
    def build(first, second=None, *, name: str = "", size: float = 1.0):
        raise AssertionError("parsing builds nothing")

    sources = {"one": Source("one:FIRST[:SECOND]", build)}
    text = "one:/a/b.json:c,name=7,size=0.5@12"
    spec = parse_spec(text, sources, counted=True)
    assert spec == Spec(text, sources["one"], ["/a/b.json", "c"], {"name": "7", "size": 0.5}, 12)
    assert parse_spec("one:a", sources) == Spec("one:a", sources["one"], ["a"], {}, None)


def test_a_parsed_spec_comes_back_as_it_is_and_reads_as_its_text():
    spec = parse_spec("grid:2x3", DETECTORS)
    assert parse_spec(spec, {}) is spec and f"{spec}" == "grid:2x3"


def test_a_spec_builds_what_it_names_and_options_of_a_call_come_first():
    sources = {"one": Source("one:FIRST", lambda first, *, size=0, name="": (first, size, name))}
    spec = Spec("one:a,size=1", sources["one"], ["a"], {"size": 1})
    assert spec.build() == ("a", 1, "") and spec.build(size=2, name="b") == ("a", 2, "b")


@pytest.mark.parametrize(
    ("load", "parse", "text"),
    [
        (load_captions, parse_caption_spec, "scenes:train,n=4,image_size=32@2"),
        (lambda spec: load_mix([spec], seed=0), parse_caption_spec, "scenes:train,n=4,image_size=32@2"),
        (lambda spec: load_classification(spec).dataset, parse_label_spec, "scenes:train,n=4,image_size=32@2"),
        (load_fine_grained, parse_question_spec, "scenes:train,n=2,image_size=32"),
    ],
)
def test_what_takes_a_spec_takes_the_text_and_the_parsed_value(load, parse, text):
    from_text, from_spec = load(text), load(parse(text))
    assert len(from_text) == 2 and from_text["image_id"][:] == from_spec["image_id"][:]


def test_a_detector_is_built_from_the_text_and_the_parsed_value():
    detectors = [build_detector(spec) for spec in ("grid:2x3", parse_spec("grid:2x3", DETECTORS))]
    assert detectors[0].fingerprint == detectors[1].fingerprint


def test_a_parsed_spec_is_named_by_its_text_where_it_is_refused():
    spec = parse_caption_spec("scenes:train,n=4,image_size=32@9")
    with pytest.raises(ValueError, match="at least 9 images in 'scenes:train,n=4,image_size=32@9', got 4"):
        load_captions(spec)
    with pytest.raises(ValueError, match=r"the mix of \['scenes:train,n=4,image_size=32'"):
        load_mix([parse_caption_spec("scenes:train,n=4,image_size=32")] * 2, seed=0)


@pytest.mark.parametrize(
    ("spec", "sources", "split"),
    [
        ("scenes:validation,n=3@2", CAPTION_SOURCES, "validation"),
        ("karpathy:a.json:images:test", CAPTION_SOURCES, "test"),
        ("coco:a.json:images", CAPTION_SOURCES, None),
        ("scenes", QUESTION_SOURCES, "test"),
        ("hub:x:train", QUESTION_SOURCES, "train"),
        ("parquet:x.parquet", QUESTION_SOURCES, None),
    ],
)
def test_the_split_is_read_off_the_source(spec, sources, split):
    assert parse_spec(spec, sources, counted=True).split == split


def test_a_spec_with_a_name_that_is_no_utf8_is_refused_by_name():
    with pytest.raises(ValueError, match=r"Expected names in UTF-8 in the spec 'a:caf\\xe9.csv', got other bytes"):
        parse_spec("a:caf\udce9.csv", {"a": Source("a:FILE", len)})


@pytest.mark.parametrize(
    ("text", "fields", "options", "count"),
    [
        ('one:"/a:b/c@2":d', ["/a:b/c@2", "d"], {}, None),
        ('one:"/a,b=c"@7', ["/a,b=c"], {}, 7),
        ('one:a:"d@3",name="x,size=2:y",size=1@7', ["a", "d@3"], {"name": "x,size=2:y", "size": 1}, 7),
        ('one:a"b":"c"', ['a"b"', '"c"'], {}, None),
        ("one:C:", None, {}, None),
    ],
)
def test_a_path_with_the_signs_of_a_spec_stands_between_quotes(text, fields, options, count):
    def build(first, second=None, *, name: str = "", size: float = 1.0):
        raise AssertionError("parsing builds nothing")

    sources = {"one": Source("one:FIRST[:SECOND]", build)}
    if fields is None:
        with pytest.raises(ValueError, match="Expected the form .*stands between double quotes"):
            parse_spec(text, sources, counted=True)
        return
    spec = parse_spec(text, sources, counted=True)
    assert (spec.fields, spec.options, spec.count, spec.text) == (fields, options, count, text)


@pytest.mark.parametrize("name", ["photos@2", "a:b", "a,b=c", "photos,source=coco"])
def test_a_path_that_a_spec_would_cut_is_refused_and_read_between_quotes(tmp_path, draw, name):
    draw(tmp_path / name / "right.jpg", 0)
    draw(tmp_path / "photos" / "wrong.jpg", 1)
    draw(tmp_path / "photos" / "wrong2.jpg", 2)
    with pytest.raises(ValueError, match=f"one meaning, got 'images:.*': '.*{name}' is there.*between double quotes"):
        load_uncaptioned([f"images:{tmp_path / name}"], seed=0)
    found = load_uncaptioned([f'images:"{tmp_path / name}"'], seed=0)
    assert found["image_id"][:] == [f"{name}/right.jpg"]
    assert len(load_uncaptioned([f'images:"{tmp_path / "photos"}"@2'], seed=0)) == 2


def test_a_table_and_a_folder_with_the_signs_of_a_spec_are_read_between_quotes(tmp_path, draw):
    draw(tmp_path / "a:b,c=d" / "x.jpg", 0)
    (tmp_path / "a:b,c=d" / "t.csv").write_text("image,caption\nx.jpg,a dog\n")
    folder = tmp_path / "a:b,c=d"
    with pytest.raises(ValueError, match="a:b,c=d/t.csv' is there"):
        load_captions(f"csv:{folder / 't.csv'}:{folder}")
    assert load_captions(f'csv:"{folder / "t.csv"}":"{folder}"@1')["captions"][:] == [["a dog"]]


@pytest.mark.parametrize(
    ("spec", "meant"),
    [
        ("captions.csv:photos", "csv:captions.csv:photos"),
        ("data/captions.CSV:photos,missing=skip@20", "csv:data/captions.CSV:photos,missing=skip@20"),
        ("captions.csv", "csv:captions.csv:IMAGE_FOLDER"),
        ("captions.csv,sep=;@9", "csv:captions.csv:IMAGE_FOLDER,sep=;@9"),
        ("captions.tsv:photos", "csv:captions.tsv:photos,sep=tab"),
        ("mine/*.parquet,captions=text", "parquet:mine/*.parquet,captions=text"),
        ("a.json:images", "coco:a.json:images"),
        ("a.json:images:test", "karpathy:a.json:images:test"),
        ("cvs:captions.csv:photos", "csv:captions.csv:photos"),
        ("me/data:train", "hub:me/data:train"),
    ],
)
def test_a_spec_without_its_kind_is_answered_with_the_whole_spec(spec, meant):
    with pytest.raises(ValueError, match=re.escape(f". Did you mean {meant!r}? Known kinds: scenes, coco")):
        parse_spec(spec, CAPTION_SOURCES, counted=True)


def test_a_folder_without_a_kind_is_answered_by_what_it_may_be(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(ValueError, match=f"is a folder. With a table of captions, write 'csv:TABLE.csv:{tmp_path}/ph"):
        load_captions(f"{tmp_path}/photos")
    with pytest.raises(ValueError, match=f"Did you mean 'imagefolder:{tmp_path}/photos'"):
        parse_spec(f"{tmp_path}/photos", LABEL_SOURCES)
    (tmp_path / "photos" / "dataset_info.json").touch()
    with pytest.raises(ValueError, match=f"Did you mean 'disk:{tmp_path}/photos'"):
        load_captions(f"{tmp_path}/photos")
    with pytest.raises(ValueError, match="Unknown kind 'what' in the spec 'what'. Known forms"):
        load_captions("what")
