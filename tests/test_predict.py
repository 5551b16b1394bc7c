"""Prediction: coordinates, files written, and one clear line for whatever is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from pycocotools import mask as coco_mask
from torch import Tensor, nn

from fastrcnn.build import build_model
from fastrcnn.config import Config, dump_config, load_config
from fastrcnn.evaluation import masks_to_rle
from fastrcnn.predict import Predictor, main, name_pictures, read_labels, read_upright
from fastrcnn.structures import BoxList, ImageList

NAMES = ["__background__", "cat", "dog"]
SMALL = """
MODEL.DEVICE cpu MODEL.MASK_ON True MODEL.BACKBONE.CONV_BODY R-18-FPN MODEL.RESNETS.TRANS_FUNC BasicBlockWithGN
MODEL.RESNETS.STEM_FUNC StemWithGN MODEL.GROUP_NORM.NUM_GROUPS 4 MODEL.RESNETS.STEM_OUT_CHANNELS 16
MODEL.RESNETS.WIDTH_PER_GROUP 16 MODEL.RESNETS.BACKBONE_OUT_CHANNELS 16 MODEL.RPN.USE_FPN True
MODEL.RPN.ANCHOR_SIZES (16,32,64,128,256) MODEL.RPN.ANCHOR_STRIDE (4,8,16,32,64) MODEL.ROI_HEADS.USE_FPN True
MODEL.RPN.FPN_POST_NMS_TOP_N_TEST 20 MODEL.ROI_BOX_HEAD.NUM_CLASSES 3 MODEL.ROI_BOX_HEAD.MLP_HEAD_DIM 16
MODEL.ROI_BOX_HEAD.POOLER_SCALES (0.25,0.125,0.0625,0.03125) MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION 7
MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO 2 MODEL.ROI_BOX_HEAD.FEATURE_EXTRACTOR FPN2MLPFeatureExtractor
MODEL.ROI_BOX_HEAD.PREDICTOR FPNPredictor MODEL.ROI_MASK_HEAD.FEATURE_EXTRACTOR MaskRCNNFPNFeatureExtractor
MODEL.ROI_MASK_HEAD.PREDICTOR MaskRCNNC4Predictor MODEL.ROI_MASK_HEAD.POOLER_SCALES (0.25,0.125,0.0625,0.03125)
MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION 14 MODEL.ROI_MASK_HEAD.RESOLUTION 28 MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO 2
MODEL.ROI_MASK_HEAD.SHARE_BOX_FEATURE_EXTRACTOR False MODEL.ROI_MASK_HEAD.CONV_LAYERS (16,)
DATALOADER.SIZE_DIVISIBILITY 32 INPUT.MIN_SIZE_TEST 64 INPUT.MAX_SIZE_TEST 128
"""


class StandIn(nn.Module):
    """Finds three things at fixed places of the resized image; keeps what it was given."""

    def __init__(self, with_masks: bool = True) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))
        self.with_masks = with_masks
        self.seen: ImageList | None = None

    def forward(self, images: ImageList) -> list[BoxList]:
        assert not self.training
        assert not torch.is_grad_enabled()
        self.seen = images
        ((height, width),) = images.image_sizes
        boxes = torch.tensor([[0.0, 0, 0.5, 0.5], [0.25, 0.5, 0.75, 1.0], [0.1, 0.1, 0.2, 0.2]])
        boxes = boxes * torch.tensor([width, height, width, height])
        masks = torch.ones(3, 1, 28, 28) if self.with_masks else None
        scores, labels = torch.tensor([0.6, 0.9, 0.3]), torch.tensor([1, 2, 1])
        return [BoxList(boxes, (width, height), scores=scores, labels=labels, masks=masks)]


@pytest.fixture(scope="module")
def cfg() -> Config:
    return load_config(None, SMALL.split())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, cfg: Config) -> Path:
    """The folder of a run: configuration, class names and a checkpoint (of a model that has learnt nothing)."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    torch.save({"model": build_model(cfg).state_dict(), "iteration": 5}, folder / "model_final.pth")
    (folder / "config.yml").write_text(dump_config(cfg))
    (folder / "labels.json").write_text(json.dumps(dict(enumerate(NAMES))))
    return folder


def photo(height: int = 48, width: int = 80) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def arguments(trained: Path, *inputs: Path, output: Path) -> list[str]:
    weights = str(trained / "model_final.pth")
    return ["--weights", weights, "--input", *map(str, inputs), "--output", str(output), "--threshold", "0"]


@pytest.mark.parametrize("convert", [np.asarray, lambda p: torch.from_numpy(np.array(p)), lambda p: p])
def test_predictor_coordinates(cfg: Config, convert: Callable[[Image.Image], Any]) -> None:
    model = StandIn().train()
    found = Predictor(model, cfg, NAMES)(convert(photo(48, 80)))
    assert model.seen is not None
    assert model.seen.image_sizes == [(64, 106)]
    assert tuple(model.seen.tensors.shape) == (1, 3, 64, 128)
    assert found.size == (80, 48)
    assert found.scores.tolist() == pytest.approx([0.9, 0.6, 0.3])
    assert found.labels.tolist() == [2, 1, 1]
    expected = torch.tensor([[20.0, 24, 60, 48], [0, 0, 40, 24], [8, 4.8, 16, 9.6]])
    torch.testing.assert_close(found.boxes, expected)


def test_predictor_is_normalized_as_in_training(cfg: Config) -> None:
    """BGR in 0..255 minus the mean, without resizing where the size fits."""
    model = StandIn()
    image = photo(64, 100)
    Predictor(model, cfg)(image)
    assert model.seen is not None
    expected = torch.from_numpy(np.asarray(image)[:, :, ::-1].copy()).permute(2, 0, 1).float()
    expected = expected - torch.tensor(cfg.INPUT.PIXEL_MEAN)[:, None, None]
    torch.testing.assert_close(model.seen.tensors[0, :, :64, :100], expected, atol=1e-4, rtol=1e-5)
    assert (model.seen.tensors[0, :, :, 100:] == 0).all()


def test_predictor_threshold(cfg: Config) -> None:
    assert Predictor(StandIn(), cfg, threshold=0.6)(photo()).labels.tolist() == [2, 1]
    assert len(Predictor(StandIn(), cfg, threshold=0.95)(photo())) == 0


def test_predictor_frames_and_video(cfg: Config, tmp_path: Path) -> None:
    predictor = Predictor(StandIn(), cfg)
    arrays = [photo(48, 80), photo(60, 60)]
    found = predictor.frames(iter(arrays))
    assert [next(found).size for _ in range(2)] == [Image.fromarray(np.asarray(a)).size for a in arrays]
    assert next(found, None) is None
    still = Image.fromarray(np.asarray(photo(48, 80)))
    still.save(tmp_path / "clip.gif", save_all=True, append_images=[still.rotate(90)])
    clip = list(predictor.video(tmp_path / "clip.gif"))
    assert len(clip) == 2
    assert all(tuple(frame.shape[:2]) == (one.size[1], one.size[0]) for frame, one in clip)


def test_predictor_masks(cfg: Config) -> None:
    predictor = Predictor(StandIn(), cfg, NAMES)
    found = predictor(photo())
    rles, masks = predictor.rles(found), predictor.masks(found)
    assert rles == masks_to_rle(found.masks, found.boxes, (48, 80))
    assert masks is not None
    for mask, (x1, y1, x2, y2) in zip(masks, found.boxes.tolist(), strict=True):
        assert mask.shape == (48, 80)
        rows, columns = np.nonzero(mask)
        assert abs(columns.min() - x1) <= 1.5
        assert abs(rows.min() - y1) <= 1.5
        assert abs(columns.max() - x2) <= 1.5
        assert abs(rows.max() - y2) <= 1.5
    without = Predictor(StandIn(with_masks=False), cfg)
    assert without.masks(without(photo())) is None
    assert without.draw(photo(), without(photo())).size == (80, 48)


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8)]
)
def test_predictor_bad_image(cfg: Config, image: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"the image must be uint8 \[H, W, 3\]"):
        Predictor(StandIn(), cfg)(image)


def test_predictor_proposals_only(cfg: Config) -> None:
    """A region proposal network finds objects of one class; how sure it is, is the score."""

    class Proposes(StandIn):
        def forward(self, images: ImageList) -> list[BoxList]:
            return [BoxList(torch.rand(3, 4), (9, 9), objectness=torch.tensor([0.2, 0.9, 0.6]))]

    found = Predictor(Proposes(), cfg, threshold=0.5)(photo())
    assert found.scores.tolist() == pytest.approx([0.9, 0.6])
    assert found.labels.tolist() == [1, 1]
    assert found.objectness is None


def test_main_keypoints(tmp_path: Path) -> None:
    """Keypoints in pixels of the photograph, with their scores, names and lines, as COCO writes them."""
    head = "MODEL.ROI_KEYPOINT_HEAD"
    cfg = load_config(
        None,
        [*SMALL.split(), "MODEL.MASK_ON", "False", "MODEL.KEYPOINT_ON", "True",
         f"{head}.SHARE_BOX_FEATURE_EXTRACTOR", "False", f"{head}.POOLER_SCALES", "(0.25, 0.125, 0.0625, 0.03125)",
         f"{head}.RESOLUTION", "56", f"{head}.CONV_LAYERS", "(16,)"],
    )  # fmt: skip
    torch.manual_seed(0)
    torch.save(build_model(cfg).state_dict(), tmp_path / "model_final.pth")
    (tmp_path / "config.yml").write_text(dump_config(cfg))
    photo().save(tmp_path / "a.png")
    assert main(arguments(tmp_path, tmp_path / "a.png", output=tmp_path / "out")) == 0
    content = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert content["categories"][0]["keypoints"][:2] == ["nose", "left_eye"]
    assert [2, 3] in content["categories"][0]["skeleton"]
    assert content["annotations"]
    for annotation in content["annotations"]:
        points = np.array(annotation["keypoints"]).reshape(17, 3)
        x1, y1, x2, y2 = annotation["box_xyxy"]
        assert ((points[:, 0] >= x1) & (points[:, 0] <= max(x2, x1 + 1))).all()
        assert ((points[:, 1] >= y1) & (points[:, 1] <= max(y2, y1 + 1))).all()
        assert (points[:, 2] == 1).all()
        assert annotation["num_keypoints"] == len(annotation["keypoint_scores"]) == 17


def test_main_proposals_only(tmp_path: Path) -> None:
    cfg = load_config(None, [*SMALL.split(), "MODEL.MASK_ON", "False", "MODEL.RPN_ONLY", "True"])
    torch.save(build_model(cfg).state_dict(), tmp_path / "model_final.pth")
    (tmp_path / "config.yml").write_text(dump_config(cfg))
    photo().save(tmp_path / "a.png")
    assert main(arguments(tmp_path, tmp_path / "a.png", output=tmp_path / "out")) == 0
    content = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert content["categories"] == [{"id": 1, "name": "object"}]
    assert len(content["annotations"]) > 5
    assert {a["label_name"] for a in content["annotations"]} == {"object"}


def test_main(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = tmp_path / "in", tmp_path / "out" / "deep"
    source.mkdir()
    photo(48, 80).save(source / "b.png")
    photo(100, 30).save(source / "a.jpg")
    (source / "notes.txt").write_text("not an image")
    photo().save(source / ".hidden.png")
    assert main(arguments(trained, source, output=output)) == 0
    content = json.loads((output / "predictions.json").read_text())
    assert [Path(i["file_name"]).name for i in content["images"]] == ["a.jpg", "b.png"]
    assert [(i["width"], i["height"]) for i in content["images"]] == [(30, 100), (80, 48)]
    assert content["categories"] == [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    assert content["failed"] == []
    assert {a["image_id"] for a in content["annotations"]} == {1, 2}
    for a in content["annotations"]:
        image = content["images"][a["image_id"] - 1]
        x1, y1, x2, y2 = a["box_xyxy"]
        assert a["bbox"] == pytest.approx([x1, y1, x2 - x1 + 1, y2 - y1 + 1], abs=1e-3)
        assert 0 <= x1 <= x2 < image["width"]
        assert 0 <= y1 <= y2 < image["height"]
        assert a["label_name"] == NAMES[a["category_id"]]
        assert a["file_name"] == image["file_name"]
        assert a["segmentation"]["size"] == [image["height"], image["width"]]
        assert a["area"] == coco_mask.decode(a["segmentation"]).sum()
    for image in content["images"]:
        with Image.open(output / image["picture"]) as picture:
            assert picture.size == (image["width"], image["height"])
    said = capsys.readouterr()
    assert f"{len(content['annotations'])} objects on 2 images" in said.out
    assert said.err == ""


def test_main_any_image(trained: Path, tmp_path: Path) -> None:
    rgb = photo()
    images = {mode: rgb.convert(mode) for mode in ("1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr")}
    images["I;16"] = Image.fromarray(np.asarray(rgb.convert("L")).astype(np.uint16) * 257)
    images["one pixel"], images["a line"] = photo(1, 1), photo(2, 300)
    files = []
    for i, (mode, image) in enumerate(images.items()):
        files.append(tmp_path / f"{i}.{'tif' if mode in ('CMYK', 'YCbCr') else 'png'}")
        image.save(files[-1])
    assert main(arguments(trained, *files, output=tmp_path / "out")) == 0
    content = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [(i["width"], i["height"]) for i in content["images"]] == [i.size for i in images.values()]
    assert len(list((tmp_path / "out" / "images").iterdir())) == len(images)


def test_main_unreadable_images(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo().save(tmp_path / "good.png")
    (tmp_path / "empty.png").touch()
    (tmp_path / "html.jpg").write_text("<html>404</html>")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:300])
    files = [tmp_path / name for name in ("empty.png", "html.jpg", "cut.png", "good.png")]
    assert main(arguments(trained, *files, output=tmp_path / "out")) == 1
    content = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [Path(i["file_name"]).name for i in content["images"]] == ["good.png"]
    assert [Path(f["file_name"]).name for f in content["failed"]] == ["empty.png", "html.jpg", "cut.png"]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert lines[-1] == "error: 3 of 4 images could not be read"
    for line, name in zip(lines, ("empty.png", "html.jpg", "cut.png"), strict=False):
        assert line.startswith("error: image file")
        assert name in line


def test_main_keeps_what_is_done(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "ab":
        photo().save(tmp_path / f"{name}.png")
    original = Predictor.__call__
    calls = []

    def interrupted(self: Predictor, image: Tensor) -> BoxList:
        calls.append(image)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, image)

    monkeypatch.setattr(Predictor, "__call__", interrupted)
    assert main(arguments(trained, tmp_path, output=tmp_path / "out")) == 130
    content = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [Path(i["file_name"]).name for i in content["images"]] == ["a.png"]


def test_main_overwrite(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo().save(tmp_path / "a.png")
    command = arguments(trained, tmp_path / "a.png", output=tmp_path / "out")
    assert main([*command, "--no-images"]) == 0
    assert not (tmp_path / "out" / "images").exists()
    assert json.loads((tmp_path / "out" / "predictions.json").read_text())["images"][0]["picture"] is None
    (tmp_path / "out" / "predictions.json").write_text("mine")
    capsys.readouterr()
    assert main(command) == 2
    message = f"error: --output {tmp_path}/out: {tmp_path}/out/predictions.json exists; choose another folder or add"
    assert capsys.readouterr().err.startswith(message)
    assert (tmp_path / "out" / "predictions.json").read_text() == "mine"
    (tmp_path / "out" / "predictions.json").unlink()
    (tmp_path / "out" / "images").mkdir()
    (tmp_path / "out" / "images" / "a.jpg").write_text("mine")
    assert main(command) == 2
    assert not (tmp_path / "out" / "predictions.json").exists()
    assert main([*command, "--overwrite"]) == 0
    assert (tmp_path / "out" / "images" / "a.jpg").read_bytes()[:2] == b"\xff\xd8"


def test_main_never_writes_over_an_input(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "images").mkdir()
    photo().save(tmp_path / "images" / "a.jpg")
    before = (tmp_path / "images" / "a.jpg").read_bytes()
    assert main([*arguments(trained, tmp_path / "images", output=tmp_path), "--overwrite"]) == 2
    assert "would write over the input" in capsys.readouterr().err
    assert (tmp_path / "images" / "a.jpg").read_bytes() == before


USAGE = {
    "no such input": (["--input", "{tmp}/none.jpg"], "--input {tmp}/none.jpg: no such file or folder"),
    "empty folder": (["--input", "{tmp}/empty"], "--input {tmp}/empty: the folder holds no image"),
    "no weights": (["--weights", "{tmp}/none.pth"], "{tmp}/none.pth"),
    "weights are no weights": (["--weights", "{tmp}/a.png"], "{tmp}/a.png: "),
    "no configuration": (["--config-file", "{tmp}/none.yaml"], "{tmp}/none.yaml"),
    "threshold": (["--threshold", "50"], "--threshold 50.0: must lie in [0, 1]"),
    "unknown key": (["MODEL.DEVISE", "cpu"], "MODEL.DEVISE"),
    "no cuda": (["MODEL.DEVICE", "cuda"], "pass MODEL.DEVICE cpu"),
    "other classes": (["MODEL.ROI_BOX_HEAD.NUM_CLASSES", "7"], "have another shape"),
    "other model": (["MODEL.BACKBONE.CONV_BODY", "R-34-FPN"], "lacks"),
    "output is a file": (["--output", "{tmp}/a.png"], "{tmp}/a.png is a file"),
}


@pytest.mark.parametrize(("change", "message"), USAGE.values(), ids=USAGE)
def test_main_usage(
    trained: Path, tmp_path: Path, change: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "cuda" in change and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    photo().save(tmp_path / "a.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").touch()
    change = [part.format(tmp=tmp_path) for part in change]
    command = ["--config-file", str(trained / "config.yml"), *arguments(trained, tmp_path / "a.png", output=tmp_path)]
    assert main([*command, *change]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message.format(tmp=tmp_path) in error
    assert error.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "empty"], "nothing is written"


def test_main_without_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "the following arguments are required: --input, --output" in capsys.readouterr().err


def run_for_names(trained: Path, folder: Path, tmp_path: Path, *options: str) -> list[str]:
    photo().save(tmp_path / "a.png")
    command = ["--weights", str(folder / "model_final.pth"), "--config-file", str(trained / "config.yml")]
    command += ["--input", str(tmp_path / "a.png"), "--output", str(tmp_path / "out"), "--no-images", *options]
    assert main(command) == 0
    return [c["name"] for c in json.loads((tmp_path / "out" / "predictions.json").read_text())["categories"]]


def test_class_names(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From labels.json beside the weights, else from a data set of the configuration, else numbers."""
    alone = tmp_path / "weights"
    alone.mkdir()
    (alone / "model_final.pth").write_bytes((trained / "model_final.pth").read_bytes())
    assert run_for_names(trained, trained, tmp_path) == ["cat", "dog"]
    assert run_for_names(trained, alone, tmp_path, "--overwrite") == ["class 1", "class 2"]
    categories = [{"id": 9, "name": "owl"}, {"id": 4, "name": "elk"}]
    (tmp_path / "val.json").write_text(json.dumps({"images": [], "annotations": [], "categories": categories}))
    dataset = f"('{tmp_path}/none.json@x', '{tmp_path}/val.json@{tmp_path}')"
    assert run_for_names(trained, alone, tmp_path, "--overwrite", "DATASETS.TEST", dataset) == ["elk", "owl"]
    assert capsys.readouterr().err == ""
    (alone / "labels.json").write_text('["one class only"]')
    assert run_for_names(trained, alone, tmp_path, "--overwrite") == ["class 1", "class 2"]
    assert "names 2 classes" in capsys.readouterr().err


@pytest.mark.parametrize("content", ['{"0": "__background__", "1": "cat", "2": "dog"}', '{"3": "cat", "18": "dog"}'])
def test_read_labels(content: str, tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text(content)
    assert read_labels(tmp_path / "labels.json") == NAMES


@pytest.mark.parametrize("content", ["[]", "[1, 2]", "3", "not json"])
def test_read_labels_bad(content: str, tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text(content)
    with pytest.raises(ValueError, match=r"labels\.json: (holds no class names|cannot be read)"):
        read_labels(tmp_path / "labels.json")


@pytest.mark.parametrize("orientation", range(9))
def test_read_upright(orientation: int, tmp_path: Path) -> None:
    image = photo(5, 7)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as saved:
        expected = np.asarray(ImageOps.exif_transpose(saved))
    assert np.array_equal(read_upright(tmp_path / "a.png").numpy(), expected)


def test_name_pictures() -> None:
    names = name_pictures([Path(p) for p in ("a/x.png", "b/x.jpg", "c/X.gif", "x_2.png", "y.tar.jpg")], Path("o"))
    assert [str(n) for n in names] == ["o/x.jpg", "o/x_2.jpg", "o/X_3.jpg", "o/x_2_2.jpg", "o/y.tar.jpg"]
