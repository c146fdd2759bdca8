"""Outcomes beside a results file: what identifies a measurement, what is read back, what is refused."""

import pytest
import torch
from safetensors.torch import save_file

from modeling_dclip.evaluation.records import outcomes_path, read_outcomes, record_key, write_outcomes

RECORD = {
    "format_version": 1,
    "model": "m",
    "benchmark": "retrieval=x",
    "revision": "sha256:0",
    "dataset_fingerprint": "sha256:1",
    "seed": 0,
    "versions": {"modeling_dclip": "1", "torch": "2"},
    "created": "today",
}


def test_a_measurement_is_its_weights_data_settings_and_version_not_its_path_or_date():
    key = record_key(RECORD)
    assert record_key({**RECORD, "model": "elsewhere", "created": "tomorrow", "n": 3}) == key
    changes = ({"revision": "sha256:2"}, {"seed": 1}, {"settings": {"alpha": 0.5}}, {"condition": "c"})
    changes += (
        {"versions": {"modeling_dclip": "2", "torch": "2"}},
        {"dataset_fingerprint": "sha256:2"},
        {"benchmark": "x"},
    )
    assert len({key, *(record_key({**RECORD, **change}) for change in changes)}) == 1 + len(changes)


def test_outcomes_come_back_and_none_leave_no_file(tmp_path):
    results = tmp_path / "a.json"
    assert read_outcomes(results) == {}
    values = torch.rand(3, 2, dtype=torch.double)
    write_outcomes(results, {"k1": {"top1": values, "text_to_image_recall@1": values + 1}, "k2": {}})
    found = read_outcomes(results)
    results.write_text("as others are")
    assert outcomes_path(results).stat().st_mode == results.stat().st_mode
    assert list(found) == ["k1"] and torch.equal(found["k1"]["text_to_image_recall@1"], values + 1)
    write_outcomes(results, {})
    assert list(tmp_path.iterdir()) == [results]


def test_a_damaged_or_foreign_file_is_named(tmp_path):
    results = tmp_path / "a.json"
    outcomes_path(results).write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"outcomes in .*a.outcomes.safetensors, got a damaged file"):
        read_outcomes(results)
    save_file({"weight": torch.ones(2)}, outcomes_path(results))
    with pytest.raises(ValueError, match=r"KEY/METRIC of shape .*'weight' of shape \(2,\)"):
        read_outcomes(results)
