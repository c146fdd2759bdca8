"""The suite: which sets are there, which metric counts, and averages that say what they are over."""

import pytest
from fixtures.webdatasets import sample, serve, write_set

from modeling_dclip.data.labels import load_classification, parse_label_spec
from modeling_dclip.evaluation.benchmarks.suite import (
    AVERAGES,
    SUITE,
    averages_of_records,
    expand_suite,
    suite_averages,
    suite_name,
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("suite")
    for folder in ("wds_vtab-pets", "wds_cifar10_test", "wds_voc2007_multilabel", "wds_other"):
        write_set(root / folder, [sample(0, 1)])
    return root


def test_the_lists_are_the_published_ones():
    assert len(SUITE) == 38 and len(AVERAGES["dmclip_23"].names) == len(set(AVERAGES["dmclip_23"].names)) == 23
    assert all(set(average.names) <= set(SUITE) for average in AVERAGES.values())
    uneven = {"vtab-caltech101", "fgvc_aircraft", "vtab-flowers", "vtab-pets"}
    assert {name for name, metric in SUITE.items() if metric == "mean_per_class"} == uneven
    assert {name for name, metric in SUITE.items() if metric == "map"} == {"voc2007_multilabel"}


def test_sets_that_are_there_become_specs_and_the_others_are_named(root):
    members = expand_suite(f"suite:{root}")
    assert members.specs == {
        "voc2007_multilabel": f"wds:{root}/wds_voc2007_multilabel:test",
        "vtab-cifar10": f"wds:{root}/wds_cifar10_test:test",
        "vtab-pets": f"wds:{root}/wds_vtab-pets:test",
    }
    assert len(members.absent) == 35 and "imagenet1k" in members.absent
    for name, spec in members.specs.items():
        assert len(load_classification(spec).dataset) == 1
        assert suite_name(spec) == name and parse_label_spec(spec).split == "test"
    assert expand_suite(f"suite:{root}/{{}}").specs == members.specs


def test_sets_behind_http_are_found_too(root, tmp_path):
    with serve(root) as (address, handler):
        members = expand_suite(f"suite:{address}:test")
        assert list(members.specs) == ["voc2007_multilabel", "vtab-cifar10", "vtab-pets"]
        assert not any(path.endswith(".tar") for path in handler.requests)
        spec = members.specs["vtab-cifar10"]
        assert spec == f"wds:{address}/wds_cifar10_test:test" and suite_name(spec) == "vtab-cifar10"
        assert load_classification(f"{spec},cache_dir={tmp_path}").dataset["label"][:] == [1]
        handler.status = 401  # the Hub's answer for a dataset that does not exist
        with pytest.raises(FileNotFoundError, match="None of the 38 sets"):
            expand_suite(f"suite:{address}")
        handler.status = 503
        with pytest.raises(ConnectionError, match="503"):
            expand_suite(f"suite:{address}")


def test_names_are_told_from_addresses_too():
    assert suite_name("wds:https://hub.example:80/datasets/clip-benchmark/wds_vtab-svhn/tree/main:test") == "vtab-svhn"
    assert suite_name("wds:data/wds_unknown") is suite_name("scenes:test") is None


def test_a_suite_that_is_not_there_is_refused(root, tmp_path):
    with pytest.raises(FileNotFoundError, match="None of the 38 sets.*split 'train'.*wds_vtab-pets/train/nshards.txt"):
        expand_suite(f"suite:{root}:train")
    with pytest.raises(FileNotFoundError, match="No folder"):
        expand_suite(f"suite:{tmp_path}/none")
    with pytest.raises(ValueError, match=r"the form 'suite:ROOT\[:SPLIT\]', got 'suite:'"):
        expand_suite("suite:")


def test_an_average_is_over_what_was_measured_and_says_so():
    results = {
        "mnist": {"top1": 0.2, "top5": 0.6, "mean_per_class": 0.1},
        "vtab-pets": {"top1": 0.9, "top5": 1.0, "mean_per_class": 0.4},
        "voc2007_multilabel": {"map": 0.6},
        "renderedsst2": {"top1": 0.5, "mean_per_class": 0.5},
    }
    averages = suite_averages(results)
    assert averages["suite_38"].value == pytest.approx((0.2 + 0.4 + 0.6 + 0.5) / 4)
    assert (averages["suite_38"].n_measured, averages["suite_38"].n_defined) == (4, 38)
    assert averages["dmclip_23"].value == pytest.approx((0.6 + 1.0) / 2)
    assert averages["dmclip_23_top1"].value == pytest.approx((0.2 + 0.9) / 2)
    assert len(averages["dmclip_23"].missing) == 21 and "imagenet1k" in averages["dmclip_23"].missing
    assert averages["imagenet_shifts_6"][:3] == (None, 0, 6)
    complete = suite_averages({name: {"top1": 0.5, "top5": 0.75, "mean_per_class": 0.5, "map": 0.5} for name in SUITE})
    assert {title: (average.value, average.missing) for title, average in complete.items()} == {
        title: (0.75 if title == "dmclip_23" else 0.5, []) for title in AVERAGES
    }


def test_records_of_a_model_are_averaged():
    def record(benchmark, **metrics):
        return {"benchmark": benchmark, "metrics": metrics}

    records = [
        record("zero_shot=wds:d/wds_mnist:test", top1=0.25, top5=0.5),
        record("zero_shot=scenes:test", top1=1.0, top5=1.0),
        record("retrieval=scenes:test", rsum=3.0),
    ]
    assert averages_of_records(records)["dmclip_23"][:3] == (0.5, 1, 23)
    with pytest.raises(ValueError, match="one record of 'mnist'"):
        averages_of_records([*records, record("zero_shot=wds:e/wds_mnist:test", top1=0.0)])
    with pytest.raises(ValueError, match="names of the suite, got 'nist'"):
        suite_averages({"nist": {}})
