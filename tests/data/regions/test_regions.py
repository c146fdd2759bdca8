import importlib.util
import io
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value, load_from_disk
from fixtures.processes import run_forked
from PIL import Image as PILImage
from transformers import (
    CLIPTokenizer,
    OwlViTConfig,
    OwlViTForObjectDetection,
    OwlViTImageProcessorPil,
    OwlViTProcessor,
    YolosConfig,
    YolosForObjectDetection,
    YolosImageProcessorPil,
    YolosModel,
)

from modeling_dclip.data.captions import load_captions
from modeling_dclip.data.regions import add_regions, clip_regions
from modeling_dclip.data.regions.__main__ import main
from modeling_dclip.data.regions.detectors import UltralyticsDetector, build_detector, process_left_alone

DATA = Path(__file__).parents[4] / "shared" / "data"
YOLO_WEIGHTS = DATA / "yolov8n" / "yolov8n.pt"
needs_ultralytics = pytest.mark.skipif(
    importlib.util.find_spec("ultralytics") is None, reason="needs the extra [regions]"
)
needs_yolo = pytest.mark.skipif(not YOLO_WEIGHTS.is_file(), reason="needs ../shared/data/yolov8n")


class CountingDetector:
    """One box over the left half, scored by the mean grey; counts what it is asked, and can break down."""

    fingerprint = "counting"

    def __init__(self, breaks_after=None):
        self.batches, self.images, self.breaks_after = [], 0, breaks_after

    def __call__(self, images, rows):
        if self.breaks_after is not None and len(self.batches) == self.breaks_after:
            raise RuntimeError("the machine went down")
        self.batches.append([row["image_id"] for row in rows])
        self.images += len(images)
        return [
            (np.array([[0, 0, image.width / 2, image.height]]), np.array([np.asarray(image).mean() / 255]))
            for image in images
        ]


class FixedDetector:
    """Always the same answer."""

    fingerprint = "fixed"

    def __init__(self, boxes, scores):
        self.answer = np.array(boxes, np.float32).reshape(-1, 4), np.array(scores, np.float32)

    def __call__(self, images, rows):
        return [self.answer] * len(images)


def png(seed=0, size=(32, 24)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def make_dataset(stored, **columns):
    """Rows of encoded bytes or paths."""
    images = [{"bytes": s, "path": None} if isinstance(s, bytes) else {"bytes": None, "path": str(s)} for s in stored]
    features = Features(image_id=Value("string"), image=Image(), captions=List(Value("string")))
    rows = {"image_id": [f"i{n}" for n in range(len(images))], "image": images, "captions": [["x"]] * len(images)}
    dataset = Dataset.from_dict(rows, features=features)
    for name, values in columns.items():
        dataset = dataset.add_column(name, values)
    return dataset


def write_instances(path, annotations, images=((9, 32, 24),)):
    path.write_text(
        json.dumps(
            {
                "images": [{"id": n, "width": w, "height": h, "file_name": f"{n}.jpg"} for n, w, h in images],
                "annotations": annotations,
            }
        )
    )
    return path


def box_overlaps(first, second):
    """Intersection over union of every pair, by the formula."""
    overlaps = np.zeros((len(first), len(second)))
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
            height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
            areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
            overlaps[i, j] = width * height / (areas - width * height)
    return overlaps


# --- the columns -----------------------------------------------------------------------------------------------------


def test_regions_become_two_columns_of_float32(tmp_path):
    dataset = add_regions(make_dataset([png(1), png(2)]), build_detector("grid:1x2"), cache_dir=tmp_path)
    assert dataset.column_names == ["image_id", "image", "captions", "boxes", "box_scores"]
    assert dataset.features["boxes"] == List(List(Value("float32"), length=4))
    assert dataset.features["box_scores"] == List(Value("float32"))
    assert dataset[1]["boxes"] == [[0, 0, 16, 24], [16, 0, 32, 24]]
    assert dataset[1]["box_scores"] == [1, 1]


def test_regions_replace_older_ones_however_the_dataset_is_stored(tmp_path):
    dataset = make_dataset([png(seed) for seed in range(4)])
    add_regions(dataset, build_detector("grid:2x2"), cache_dir=tmp_path).save_to_disk(tmp_path / "saved")
    for before in (load_from_disk(tmp_path / "saved"), load_from_disk(tmp_path / "saved").select([3, 1])):
        once = add_regions(before, build_detector("grid:1x1"), cache_dir=tmp_path)
        twice = add_regions(once, build_detector("grid:1x3"), cache_dir=tmp_path)
        assert [len(boxes) for boxes in once["boxes"]] == [1] * len(before)
        assert [len(boxes) for boxes in twice["boxes"]] == [3] * len(before)
        assert twice["image_id"][:] == before["image_id"][:]
        assert twice[0]["image"].tobytes() == before[0]["image"].tobytes()


def test_an_image_without_regions_keeps_its_row(tmp_path):
    dataset = add_regions(make_dataset([png()]), FixedDetector([], []), cache_dir=tmp_path)
    assert (dataset[0]["boxes"], dataset[0]["box_scores"]) == ([], [])


def test_the_best_scores_stay_and_the_cache_keeps_all(tmp_path):
    boxes = [[0, 0, n, n] for n in (2, 3, 4, 5)]
    detector = FixedDetector(boxes, [0.2, 0.9, 0.5, 0.9])
    for most, kept in ((3, [1, 3, 2]), (None, [0, 1, 2, 3]), (1, [1])):
        dataset = add_regions(make_dataset([png()]), detector, cache_dir=tmp_path, max_regions=most)
        assert dataset[0]["boxes"] == [boxes[k] for k in kept]


def test_boxes_are_clipped_and_slivers_dropped_and_counted(tmp_path, caplog):
    boxes = [[-5, -5, 8, 8], [30, 20, 90, 90], [40, 0, 50, 10], [5, 5, 5.5, 20], [9, 9, 4, 12]]
    with caplog.at_level(logging.WARNING):
        dataset = add_regions(
            make_dataset([png()]), FixedDetector(boxes, [0.5] * 5), cache_dir=tmp_path, report_file=tmp_path / "r.json"
        )
    assert dataset[0]["boxes"] == [[0, 0, 8, 8], [30, 20, 32, 24]]
    assert json.loads((tmp_path / "r.json").read_text())["dropped_boxes_of_computed_images"] == 3
    assert "inside their image: 3" in caplog.text


@pytest.mark.parametrize(
    ("boxes", "scores", "message"),
    [
        ([[0, 0, np.nan, 4]], [0.5], "'i0'.*not finite"),
        ([[0, 0, 4, 4]], [np.nan], "'i0'.*not finite"),
        ([[0, 0, 4, 4]], [1.5], "'i0': expected scores in .0, 1., got 1.5"),
        ([[0, 0, 4, 4]], [0.5, 0.5], r"'i0': expected boxes \(R, 4\).*got \(1, 4\) and \(2,\)"),
    ],
)
def test_a_broken_detector_is_found_out(tmp_path, boxes, scores, message):
    with pytest.raises(ValueError, match=message):
        add_regions(make_dataset([png()]), FixedDetector(boxes, scores), cache_dir=tmp_path)


def test_clipping_leaves_boxes_inside_as_they_are():
    boxes = np.array([[0, 0, 32, 24], [1.25, 2.5, 7.75, 9]], np.float32)
    regions, dropped = clip_regions((boxes, np.array([1, 0.5], np.float32)), (32, 24), "i0")
    assert (regions[:, :4] == boxes).all() and regions[:, 4].tolist() == [1, 0.5] and dropped == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_bad_image": "ignore"}, "Expected on_bad_image"),
        ({"batch_size": 0}, "batch_size and max_regions of at least 1"),
        ({"max_regions": 0}, "batch_size and max_regions of at least 1"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        add_regions(make_dataset([png()]), build_detector("grid:1x1"), cache_dir=tmp_path, **options)


def test_a_dataset_without_rows_is_refused(tmp_path):
    with pytest.raises(ValueError, match="No row with an image"):
        add_regions(make_dataset([]), build_detector("grid:1x1"), cache_dir=tmp_path)


# --- the cache -------------------------------------------------------------------------------------------------------


def test_a_second_run_asks_nothing_and_answers_the_same(tmp_path):
    dataset = make_dataset([png(seed) for seed in range(5)])
    first, second = CountingDetector(), CountingDetector()
    one = add_regions(dataset, first, cache_dir=tmp_path, batch_size=2)
    two = add_regions(dataset, second, cache_dir=tmp_path, batch_size=3, report_file=tmp_path / "report.json")
    assert [len(batch) for batch in first.batches] == [2, 2, 1]
    assert second.images == 0
    assert one.to_dict() == two.to_dict()
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["images"], report["computed_images"], report["cached_images"]) == (5, 0, 5)


def test_the_cache_knows_pixels_and_not_names(tmp_path, draw):
    files = [draw(tmp_path / f"{n}.png", n) for n in range(3)]
    add_regions(make_dataset(files), CountingDetector(), cache_dir=tmp_path / "cache")
    renamed = files[1].rename(tmp_path / "another_name.png")
    detector = CountingDetector()
    add_regions(make_dataset([files[2], renamed, files[0]]), detector, cache_dir=tmp_path / "cache")
    assert detector.images == 0
    draw(renamed, seed=77)
    changed = add_regions(make_dataset([files[2], renamed, files[0]]), detector, cache_dir=tmp_path / "cache")
    assert detector.batches == [["i1"]]
    expected = np.asarray(PILImage.open(renamed)).mean() / 255
    assert changed[1]["box_scores"][0] == pytest.approx(expected, abs=1e-6)


def test_equal_pictures_of_a_run_are_looked_at_once(tmp_path):
    detector = CountingDetector()
    dataset = add_regions(make_dataset([png(1), png(1), png(2), png(1)]), detector, cache_dir=tmp_path)
    assert detector.images == 2
    assert dataset[0]["box_scores"] == dataset[1]["box_scores"] == dataset[3]["box_scores"] != dataset[2]["box_scores"]


def test_another_fingerprint_is_another_cache(tmp_path):
    add_regions(make_dataset([png()]), CountingDetector(), cache_dir=tmp_path)
    other = CountingDetector()
    other.fingerprint = "counting-with-other-settings"
    add_regions(make_dataset([png()]), other, cache_dir=tmp_path)
    assert other.images == 1


def test_answers_that_depend_on_the_row_are_never_cached(tmp_path):
    boxes = [[[0.0, 0.0, 4.0, 4.0]], [[0.0, 0.0, 9.0, 9.0]]]
    dataset = add_regions(make_dataset([png()] * 2, boxes=boxes), build_detector("annotations"), cache_dir=tmp_path)
    assert dataset["boxes"][:] == boxes
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_broke_down_goes_on_where_it_was(tmp_path):
    dataset = make_dataset([png(seed) for seed in range(10)])
    breaking = CountingDetector(breaks_after=3)
    with pytest.raises(RuntimeError, match="went down"):
        add_regions(dataset, breaking, cache_dir=tmp_path, batch_size=2)
    going_on = CountingDetector()
    finished = add_regions(dataset, going_on, cache_dir=tmp_path, batch_size=2)
    assert [i for batch in going_on.batches for i in batch] == ["i6", "i7", "i8", "i9"]
    at_once = add_regions(dataset, CountingDetector(), cache_dir=tmp_path / "other", batch_size=2)
    assert finished.to_dict() == at_once.to_dict()


KILLED_RUN = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from test_regions import CountingDetector, add_regions, make_dataset, png

class KilledDetector(CountingDetector):
    def __call__(self, images, rows):
        if self.images == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(images, rows)

add_regions(make_dataset([png(seed) for seed in range(40)]), KilledDetector(), cache_dir=sys.argv[2], batch_size=2)
"""


def test_a_killed_process_loses_no_finished_answer(tmp_path):
    (killed,) = run_forked(KILLED_RUN, Path(__file__).parent, tmp_path / "cache")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    finished = len(list(tmp_path.glob("cache/counting/*/*.npy")))
    detector = CountingDetector()
    dataset = add_regions(make_dataset([png(seed) for seed in range(40)]), detector, cache_dir=tmp_path / "cache")
    assert finished == 6 and detector.images == 40 - finished
    assert all(len(boxes) == 1 for boxes in dataset["boxes"])


def test_a_damaged_cache_file_is_named(tmp_path):
    add_regions(make_dataset([png()]), CountingDetector(), cache_dir=tmp_path)
    (entry,) = tmp_path.glob("counting/*/*.npy")
    entry.write_bytes(entry.read_bytes()[:90])
    with pytest.raises(ValueError, match=f"{entry.name}' are damaged .*Delete the file"):
        add_regions(make_dataset([png()]), CountingDetector(), cache_dir=tmp_path, on_bad_image="skip")


# --- images that cannot be read --------------------------------------------------------------------------------------


def bad_images(folder, draw):
    """A truncated JPEG, a missing file, a text and a good picture."""
    truncated = draw(folder / "cut.jpg", size=(64, 64))
    truncated.write_bytes(truncated.read_bytes()[:800])
    (folder / "text.png").write_text("no picture")
    return [truncated, folder / "gone.jpg", folder / "text.png", draw(folder / "good.png")]


@pytest.mark.parametrize(("number", "reason"), [(0, "truncated"), (1, "No such file"), (2, "cannot identify")])
def test_an_unreadable_image_stops_the_run_and_is_named(tmp_path, draw, number, reason):
    file = bad_images(tmp_path, draw)[number]
    for detector in (CountingDetector(), build_detector("grid:1x1")):
        with pytest.raises(
            ValueError, match=rf"Image 'i0' \('{file}'\) cannot be read: .*{reason}.*--on_bad_image skip"
        ):
            add_regions(make_dataset([file]), detector, cache_dir=tmp_path / "cache")


def test_unreadable_images_are_left_out_counted_and_listed(tmp_path, draw, caplog):
    files = bad_images(tmp_path, draw)
    with caplog.at_level(logging.WARNING):
        dataset = add_regions(
            make_dataset(files),
            CountingDetector(),
            cache_dir=tmp_path / "cache",
            on_bad_image="skip",
            report_file=tmp_path / "report.json",
        )
    assert dataset["image_id"][:] == ["i3"]
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["images"], report["skipped_images"], report["computed_images"]) == (4, 3, 1)
    assert [(one["image_id"], one["file"]) for one in report["skipped"]] == [
        (f"i{n}", str(files[n])) for n in range(3)
    ]
    assert "truncated" in report["skipped"][0]["reason"]
    assert "Left out 3 of 4 images that cannot be read, first: i0, i1, i2" in caplog.text
    with pytest.raises(ValueError, match="after leaving out 3 unreadable images"):
        add_regions(make_dataset(files[:3]), CountingDetector(), cache_dir=tmp_path, on_bad_image="skip")


def test_boxes_fit_the_picture_as_later_stages_see_it(tmp_path):
    exif = PILImage.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    buffer = io.BytesIO()
    PILImage.new("RGB", (40, 20)).save(buffer, format="JPEG", exif=exif)
    dataset = add_regions(make_dataset([buffer.getvalue()]), build_detector("grid:1x1"), cache_dir=tmp_path)
    assert dataset[0]["boxes"] == [[0, 0, *dataset[0]["image"].size]] == [[0, 0, 20, 40]]


# --- detectors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("detr:x", "Unknown kind 'detr'.*transformers:MODEL.*grid:ROWSxCOLUMNS"),
        ("transformers", "Expected the form 'transformers:MODEL'"),
        ("grid:2x2,size=3", "Unknown option 'size'.*Known options: none"),
        ("ultralytics:a.pt,config=0.5", "Unknown option 'config'.*Known options: conf, iou, max_det, imgsz, device"),
        ("grid:2", "Expected a grid as ROWSxCOLUMNS, e.g. 2x3, got '2'"),
        ("grid:0x2", "Expected a grid as ROWSxCOLUMNS"),
        ("grid:99999999x2", "got '99999999x2'. Both are from 1 to 999"),
        ("ultralytics:a.pt,imgsz=-4", "The option 'imgsz' in .*: expected an integer from 1 to 16384, got -4"),
        ("annotations,on_bad_box=drop", "Expected on_bad_box to be 'raise' or 'skip'"),
    ],
)
def test_a_wrong_detector_spec_says_what_is_known(spec, message):
    with pytest.raises(ValueError, match=message):
        build_detector(spec)


def test_grid_cells_tile_the_image():
    image = PILImage.new("RGB", (100, 70))
    ((boxes, scores),) = build_detector("grid:3x4")([image], [{}])
    assert boxes.shape == (12, 4) and (scores == 1).all()
    covered = np.zeros((70, 100))
    for x1, y1, x2, y2 in boxes.round().astype(int):
        covered[y1:y2, x1:x2] += 1
    assert (covered == 1).all()
    assert boxes[1].tolist() == pytest.approx([25, 0, 50, 70 / 3])


def test_coco_annotations_become_corners_without_crowds(tmp_path):
    annotations = [
        {"id": 1, "image_id": 9, "bbox": [2, 3, 10, 20], "iscrowd": 0},
        {"id": 2, "image_id": 9, "bbox": [0, 0, 32, 24], "iscrowd": 1},
        {"id": 3, "image_id": 9, "bbox": [30.5, 0, 1.51, 4]},
    ]
    path = write_instances(tmp_path / "i.json", annotations, images=[(9, 32, 24), (10, 32, 24)])
    image = PILImage.new("RGB", (32, 24))
    (boxes, scores), (none, no_scores) = build_detector(f"annotations:{path}")(
        [image, image], [{"image_id": "coco-9"}, {"image_id": "10"}]
    )
    assert boxes.tolist() == [[2, 3, 12, 23], [30.5, 0, pytest.approx(32.01), 4]]
    assert scores.tolist() == [1, 1]
    assert (none.shape, no_scores.shape) == ((0, 4), (0,))
    with_crowds = build_detector(f"annotations:{path},keep_crowd=true")
    assert len(with_crowds([image], [{"image_id": "coco-9"}])[0][0]) == 3


@pytest.mark.parametrize(
    ("box", "fault"),
    [
        ([20, 3, 13.5, 4], "reaches outside the image of 32x24 pixels"),
        ([-2, 3, 10, 4], "reaches outside the image of 32x24 pixels"),
        ([5, 3, 0, 4], "has no area"),
        ([5, 3, 4, -1], "has no area"),
        ([5, float("nan"), 4, 4], "no finite number"),
        ([5, 3, float("inf"), 4], "no finite number"),
    ],
)
def test_a_wrong_annotation_is_named_with_its_image(tmp_path, caplog, box, fault):
    good = {"id": 6, "image_id": 9, "bbox": [1, 1, 5, 5]}
    path = write_instances(tmp_path / "i.json", [{"id": 7, "image_id": 9, "bbox": box}, good])
    dataset = make_dataset([png()])
    dataset = dataset.remove_columns("image_id").add_column("image_id", ["coco-9"])
    with pytest.raises(ValueError, match=f"Image 'coco-9': annotation 7 .*{fault}.*on_bad_box=skip"):
        add_regions(dataset, build_detector(f"annotations:{path}"), cache_dir=tmp_path, on_bad_image="skip")
    with caplog.at_level(logging.WARNING):
        kept = add_regions(dataset, build_detector(f"annotations:{path}", on_bad_box="skip"), cache_dir=tmp_path)
    assert kept[0]["boxes"] == [[1, 1, 6, 6]]
    assert "annotation 7" in caplog.text


def test_annotations_of_another_picture_are_refused(tmp_path):
    path = write_instances(tmp_path / "i.json", [])
    detector = build_detector(f"annotations:{path}")
    with pytest.raises(ValueError, match="Image 'coco-10' is not in '.*i.json'"):
        detector([PILImage.new("RGB", (32, 24))], [{"image_id": "coco-10"}])
    with pytest.raises(ValueError, match="Image 'coco-9' has 24x24 pixels, but its boxes .* are for 32x24"):
        detector([PILImage.new("RGB", (24, 24))], [{"image_id": "coco-9"}])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ('{"images": []}', "no key 'annotations'"),
        ('{"images": [{"id": 1}], "annotations": []}', "Image 1 of .* has no key 'width'"),
        (
            '{"images": [], "annotations": [{"id": 5, "image_id": 1, "bbox": [0, 0, 1, 1]}]}',
            "Annotation 5 .*belongs to image 1, which is not under 'images'",
        ),
        (
            '{"images": [{"id": 1, "width": 2, "height": 2}], "annotations": [{"id": 5, "image_id": 1, "caption": '
            '"x"}]}',
            "Annotation 5 .*has no key 'bbox'; it has .'caption'",
        ),
        (
            '{"images": [{"id": 1, "width": 2, "height": 2}], "annotations": [{"id": 5, "image_id": 1, "bbox": [1, '
            "2]}]}",
            "Annotation 5 .*x, y, width, height",
        ),
        (
            '{"images": [{"id": 1, "width": 2, "height": 2}], "annotations": [{"id": 5, "image_id": "1", "bbox": [1, '
            "null, 3, 4]}]}",
            r"Annotation 5 of .*i.json': expected the numbers x, y, width, height under 'bbox', got \[1, None, 3, 4\]",
        ),
        (
            '{"images": [{"id": 1, "width": 2, "height": 2}], "annotations": [{"image_id": 1, "bbox": [1, 2, 3, 4], '
            '"iscrowd": "no"}]}',
            "Annotation at position 0 .from 0. of .*: expected 0 or 1 under 'iscrowd', got 'no'",
        ),
        ('{"images": [{"id": 1, "width": "2", "height": 2}], "annotations": []}', "a number under 'width', got '2'"),
        (
            '{"images": [{"id": 1, "width": 2, "height": 2}, {"id": 1, "width": 2, "height": 2}], "annotations": []}',
            "Image 1 of .* comes twice under 'images'",
        ),
    ],
)
def test_malformed_instances_files_are_told_apart(tmp_path, content, message):
    (tmp_path / "i.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        build_detector(f"annotations:{tmp_path / 'i.json'}")


def test_a_datasets_own_boxes_are_checked(tmp_path):
    detector = build_detector("annotations")
    boxes = [[[0.0, 0.0, 4.0, 4.0], [1.0, 1.0, 40.0, 9.0]]]
    with pytest.raises(ValueError, match="Image 'i0': box 1 reaches outside"):
        add_regions(make_dataset([png()], boxes=boxes), detector, cache_dir=tmp_path)
    with pytest.raises(ValueError, match="Image 'i0' has 2 boxes but 1 box_scores"):
        add_regions(make_dataset([png()], boxes=boxes, box_scores=[[0.5]]), detector, cache_dir=tmp_path)
    with pytest.raises(ValueError, match="Image 'i0' has no value in a column 'boxes'.*annotations:INSTANCES.json"):
        add_regions(make_dataset([png()]), detector, cache_dir=tmp_path)


def test_drawn_scenes_keep_their_own_boxes(tmp_path):
    scenes = load_captions("scenes:test,n=6")
    again = add_regions(scenes, build_detector("annotations"), cache_dir=tmp_path)
    assert again["boxes"][:] == scenes["boxes"][:]
    assert again["box_scores"][:] == scenes["box_scores"][:]


# --- transformers ----------------------------------------------------------------------------------------------------

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.fixture(scope="module")
def yolos_dir(tmp_path_factory):
    """A random detector of transformers that needs neither timm nor torchvision."""
    folder = tmp_path_factory.mktemp("yolos")
    torch.manual_seed(0)
    config = YolosConfig(**TINY, image_size=(32, 32), patch_size=8, num_detection_tokens=7, num_labels=5)
    YolosForObjectDetection(config).save_pretrained(folder)
    YolosImageProcessorPil(size={"shortest_edge": 32, "longest_edge": 48}).save_pretrained(folder)
    return folder


def noise(size, seed=0):
    return PILImage.open(io.BytesIO(png(seed, size))).convert("RGB")


def test_a_transformers_detector_answers_the_same_alone_and_in_a_batch(yolos_dir):
    detector = build_detector(f"transformers:{yolos_dir},threshold=0.01")
    images = [noise((40, 30), 1), noise((30, 40), 2), noise((40, 30), 3)]
    together = detector(images, [{}] * 3)
    for image, (boxes, scores) in zip(images, together, strict=True):
        assert boxes.dtype == scores.dtype == np.float32
        assert len(boxes) > 0 and boxes.shape == (len(scores), 4)
        assert (boxes[:, 2:] > boxes[:, :2]).all() and (scores > 0.01).all()
        np.testing.assert_allclose(detector([image], [{}])[0][0], boxes, atol=1e-4)


def test_a_transformers_detector_scales_boxes_to_the_picture(yolos_dir):
    detector = build_detector(f"transformers:{yolos_dir},threshold=0.01")
    small = noise((32, 32))
    large = small.resize((64, 64), PILImage.Resampling.NEAREST)  # reduced to 32 again it is the same picture, nearly
    (small_boxes, _), (large_boxes, _) = detector([small, large], [{}] * 2)
    np.testing.assert_allclose(large_boxes, 2 * small_boxes, atol=2.0)


def test_a_transformers_fingerprint_follows_weights_and_settings(yolos_dir, tmp_path):
    model = YolosForObjectDetection.from_pretrained(yolos_dir)
    YolosImageProcessorPil.from_pretrained(yolos_dir).save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    original = build_detector(f"transformers:{yolos_dir}").fingerprint
    assert build_detector(f"transformers:{tmp_path}").fingerprint == original
    assert build_detector(f"transformers:{yolos_dir},threshold=0.4").fingerprint != original
    with torch.no_grad():
        next(model.parameters()).view(-1)[0].add_(1)
    model.save_pretrained(tmp_path)
    assert build_detector(f"transformers:{tmp_path}").fingerprint != original


def test_a_checkpoint_without_detection_weights_is_refused(yolos_dir, tmp_path):
    config = YolosConfig.from_pretrained(yolos_dir)
    YolosModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    YolosImageProcessorPil.from_pretrained(yolos_dir).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lacks .* weights of YolosForObjectDetection"):
        build_detector(f"transformers:{tmp_path}")
    with pytest.raises(OSError, match="nowhere"):
        build_detector(f"transformers:{tmp_path / 'nowhere'}")


def test_an_open_vocabulary_checkpoint_looks_for_labels(tiny_clip_dir, tmp_path):
    tokenizer = CLIPTokenizer.from_pretrained(tiny_clip_dir, model_max_length=16)
    torch.manual_seed(0)
    config = OwlViTConfig(
        text_config={**TINY, "vocab_size": len(tokenizer), "max_position_embeddings": 16, "pad_token_id": 0},
        vision_config={**TINY, "image_size": 32, "patch_size": 16},
        projection_dim=16,
    )
    OwlViTForObjectDetection(config).save_pretrained(tmp_path)
    size = {"height": 32, "width": 32}
    OwlViTProcessor(OwlViTImageProcessorPil(size=size, crop_size=size), tokenizer).save_pretrained(tmp_path)
    detector = build_detector(f"transformers:{tmp_path},labels=a dog|a red circle,threshold=0.0")
    regions = detector([noise((40, 30), 1), noise((30, 40), 2)], [{}] * 2)
    assert [boxes.shape for boxes, _ in regions] == [(4, 4), (4, 4)]  # one box a patch
    other = build_detector(f"transformers:{tmp_path},labels=a dog,threshold=0.0")
    assert other.fingerprint != detector.fingerprint


# --- ultralytics -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def random_yolo(tmp_path_factory):
    """Random weights of the smallest YOLOv8, as ultralytics saves them."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("yolo") / "random.pt"
    with process_left_alone():
        from ultralytics import YOLO

        YOLO("yolov8n.yaml", verbose=False).save(path)
    return path


@needs_ultralytics
def test_yolo_weights_make_a_detector_whose_settings_are_in_its_fingerprint(random_yolo, tmp_path):
    detector = build_detector(f"ultralytics:{random_yolo},imgsz=64,conf=0.0001,max_det=9", trust_checkpoint=True)
    assert detector.settings == {"conf": 0.0001, "iou": 0.7, "max_det": 9, "imgsz": 64}
    boxes, scores = detector([noise((80, 60))], [{}])[0]
    assert boxes.shape == (len(scores), 4) and len(scores) <= 9
    renamed = str(random_yolo.rename(tmp_path / "renamed.pt"))
    same = UltralyticsDetector(renamed, True, imgsz=64, conf=0.0001, max_det=9)
    assert same.fingerprint == detector.fingerprint
    others = [UltralyticsDetector(renamed, True, **one) for one in ({}, {"imgsz": 64}, {"iou": 0.5})]
    assert len({detector.fingerprint, *(other.fingerprint for other in others)}) == 4
    (tmp_path / "renamed.pt").rename(random_yolo)


@needs_ultralytics
def test_yolo_leaves_the_process_as_it_was(random_yolo, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    before = (PILImage.open, torch.save, torch.get_num_threads(), dict(os.environ))
    detector = build_detector(f"ultralytics:{random_yolo},imgsz=64", trust_checkpoint=True)
    dataset = add_regions(
        make_dataset([png(), tmp_path / "text.png"]), detector, cache_dir=tmp_path, on_bad_image="skip"
    )
    assert (PILImage.open, torch.save, torch.get_num_threads(), dict(os.environ)) == before
    assert dataset["image_id"][:] == ["i0"]
    with pytest.raises(ValueError, match="text.png'. cannot be read: cannot identify image"):
        add_regions(make_dataset([tmp_path / "text.png"]), detector, cache_dir=tmp_path)


@needs_ultralytics
def test_missing_yolo_weights_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="No YOLO weights at '.*nowhere.pt'"):
        build_detector(f"ultralytics:{tmp_path / 'nowhere.pt'}")


@needs_ultralytics
def test_a_file_that_is_no_yolo_weights_is_named(tmp_path):
    (tmp_path / "table.csv").write_text("image,caption\n")
    with pytest.raises(ValueError, match="Expected YOLO weights at '.*table.csv', got a file of another kind"):
        build_detector(f"ultralytics:{tmp_path / 'table.csv'}", trust_checkpoint=True)([noise((80, 60))], [{}])
    (tmp_path / "cut.pt").write_bytes(b"\x1b no checkpoint")
    with pytest.raises(ValueError, match="Expected YOLO weights at '.*cut.pt', got a damaged"):
        build_detector(f"ultralytics:{tmp_path / 'cut.pt'}", trust_checkpoint=True)


class Payload:
    """What writes a file when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


@needs_ultralytics
def test_an_unknown_checkpoint_is_not_unpickled_unless_it_is_trusted(tmp_path, monkeypatch):
    written, evil = tmp_path / "written", tmp_path / "evil.pt"
    torch.save({"model": Payload(written)}, evil)
    command = ["--dataset", "scenes:test,n=1", "--detector", f"ultralytics:{evil}", "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="^Failed: Expected YOLO weights whose SHA-256 is known at .*evil.pt.*runs"):
        main(command)
    monkeypatch.chdir(tmp_path)
    for words in (["ultralytics:evil.pt"], ["ultralytics:./evil.pt,imgsz=64"]):
        with pytest.raises(ValueError, match="--trust_checkpoint.*--regions.trust_checkpoint true"):
            build_detector(*words)
    assert not written.exists()
    with pytest.raises(SystemExit, match="^Failed: "):  # trusted, but no detector
        main([*command, "--trust_checkpoint"])
    assert written.exists()


def test_without_ultralytics_the_remedy_and_the_alternative_are_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "ultralytics", None)
    with pytest.raises(ImportError, match=r"modeling_dclip\[regions\].*AGPL-3.0.*transformers:MODEL"):
        build_detector("ultralytics")


def test_importing_regions_imports_neither_ultralytics_nor_opencv():
    code = (
        "import sys, modeling_dclip.data.regions; print([m for m in ('ultralytics', 'cv2', 'timm') if m in "
        "sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


# --- the command line ------------------------------------------------------------------------------------------------


def test_the_command_line_writes_a_folder_that_disk_reads(tmp_path, draw, capsys):
    files = [str(file) for file in bad_images(tmp_path, draw) if file.name != "gone.jpg"]
    Dataset.from_dict({"image": files, "captions": [["x"]] * 3}).to_parquet(tmp_path / "a.parquet")
    output = tmp_path / "out" / "with_regions"
    argv = ["--dataset", f"parquet:{tmp_path / 'a.parquet'}", "--detector", "grid:2x2", "--output", str(output)]
    argv += ["--cache_dir", str(tmp_path / "cache")]
    with pytest.raises(SystemExit, match="^Failed: .*cannot be read"):
        main(argv)
    assert not output.parent.exists() or not list(output.parent.iterdir())
    assert main([*argv, "--on_bad_image", "skip"]) == output
    assert f"Wrote 1 image with 4 regions to {output}" in capsys.readouterr().out
    for file in files:
        Path(file).unlink()
    dataset = load_captions(f"disk:{output}")
    assert dataset[0]["image"].size == (32, 24)  # the pictures went in
    assert dataset[0]["boxes"][3] == [16, 12, 32, 24]
    assert json.loads((output.parent / "with_regions.report.json").read_text())["skipped_images"] == 2
    assert sorted(path.name for path in output.parent.iterdir()) == ["with_regions", "with_regions.report.json"]
    with pytest.raises(SystemExit, match="^Failed: .*with_regions' exists"):
        main([*argv, "--on_bad_image", "skip"])


def test_the_command_line_runs_as_a_module(tmp_path):
    module = "import runpy; runpy.run_module('modeling_dclip.data.regions', run_name='__main__', alter_sys=True)"
    words = ["--dataset", "scenes:test,n=6@3", "--detector", "annotations", "--max_regions", "1"]
    (answer,) = run_forked(module, *words, "--output", tmp_path / "out")
    assert answer.returncode == 0, answer.stderr
    assert "Wrote 3 images with 3 regions" in answer.stdout
    assert len(load_captions(f"disk:{tmp_path / 'out'}")) == 3


# --- real pictures, real YOLO ----------------------------------------------------------------------------------------


@pytest.mark.real_data
@needs_ultralytics
@needs_yolo
def test_yolo_finds_most_large_objects_of_the_coco_sample(tmp_path):
    folder = DATA / "coco_val_sample"
    coco = load_captions(f"coco:{folder / 'annotations/captions_val2017.json'}:{folder / 'val2017'}@48")
    annotated = add_regions(
        coco, build_detector(f"annotations:{folder / 'annotations/instances_val2017.json'}"), cache_dir=tmp_path
    )
    found = add_regions(coco, build_detector(f"ultralytics:{YOLO_WEIGHTS}"), cache_dir=tmp_path)
    hits, right = [], []
    for truth, row in zip(annotated, found, strict=True):
        least_area = 0.01 * np.prod(truth["image"].size)
        large = [box for box in truth["boxes"] if (box[2] - box[0]) * (box[3] - box[1]) >= least_area]
        if large and row["boxes"]:
            hits.extend(box_overlaps(large, row["boxes"]).max(axis=1) >= 0.5)
            right.extend(box_overlaps(row["boxes"], truth["boxes"]).max(axis=1) >= 0.5)
    # Measured on all 128 images: 75.5 % of 526 large objects found, 75.5 % of 699 boxes on an annotated object.
    assert len(hits) > 100 and np.mean(hits) > 0.65
    assert np.mean(right) > 0.65


@pytest.mark.real_data
@needs_ultralytics
@needs_yolo
@pytest.mark.skipif(not (DATA / "flickr8k").is_dir(), reason="needs ../shared/data/flickr8k")
def test_yolo_runs_on_flickr8k_and_resumes_from_the_cache(tmp_path):
    dataset = load_captions(f"parquet:{DATA}/flickr8k/validation.parquet,source=flickr@64")
    detector = build_detector(f"ultralytics:{YOLO_WEIGHTS},imgsz=320")
    once = add_regions(dataset, detector, cache_dir=tmp_path, report_file=tmp_path / "once.json")
    twice = add_regions(dataset, detector, cache_dir=tmp_path, report_file=tmp_path / "twice.json")
    assert json.loads((tmp_path / "once.json").read_text())["computed_images"] == 64
    assert json.loads((tmp_path / "twice.json").read_text())["cached_images"] == 64
    assert once["boxes"][:] == twice["boxes"][:]
    boxes = np.concatenate([np.reshape(row, (-1, 4)) for row in once["boxes"]])
    assert 64 < len(boxes) < 64 * 20  # measured: 2 to 3 an image
    assert boxes.min() >= 0 and boxes.max() <= 224 and (boxes[:, 2:] - boxes[:, :2]).min() >= 1
    assert np.mean([len(row) > 0 for row in once["boxes"]]) > 0.8
