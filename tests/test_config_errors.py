"""What a wrong configuration says: one line that names the place, the key, what was expected and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fastrcnn.config import ConfigError, load_config
from fastrcnn.config.describe import leaves

REPOSITORY = Path(__file__).resolve().parent.parent
MASK_RCNN = REPOSITORY / "configs/e2e_mask_rcnn_R_50_FPN_1x.yaml"


def message_of(path: Path | str | None, overrides: list[object]) -> str:
    with pytest.raises(ConfigError) as raised:
        load_config(path, overrides)
    return str(raised.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        # unknown keys
        (["SOLVER.MAX_ITR", "3"], "unknown key SOLVER.MAX_ITR; did you mean SOLVER.MAX_ITER?"),
        (["BASE_LR", "3"], "unknown key BASE_LR; did you mean SOLVER.BASE_LR?"),
        (["solver.base_lr=3"], "unknown key solver.base_lr; did you mean SOLVER.BASE_LR?"),
        (["MODEL.WEIGHTS", "x"], "unknown key MODEL.WEIGHTS; did you mean MODEL.WEIGHT?"),
        (["MODEL.NMS_THRESH", "x"], "unknown key MODEL.NMS_THRESH; did you mean MODEL.RPN.NMS_THRESH?"),
        (["MODEL.FPN.DEPTH", "5"], "unknown key MODEL.FPN.DEPTH; MODEL.FPN has USE_GN, USE_RELU"),
        (["FOO", "x"], "unknown key FOO; `python -m fastrcnn.config` prints all keys"),
        (["MODEL.RPN", "x"], "MODEL.RPN is a section, not a key; set a key in it, as MODEL.RPN.USE_FPN"),
        (["DTYPE.X", "x"], "DTYPE is a key, not a section; it takes one of float32, bfloat16, float16"),
        # the pairs
        (["SOLVER.MAX_ITER"], "SOLVER.MAX_ITER has no value; write SOLVER.MAX_ITER VALUE (overrides come in pairs)"),
        (["SOLVER.MAX_ITER", "SEED=1"], "SOLVER.MAX_ITER: expected a whole number >= 1, got 'SEED=1'"),
        (
            ["SOLVER.MAX_ITER", "SOLVER.SEED", "1"],
            "SOLVER.MAX_ITER has no value; the next word is the key SOLVER.SEED",
        ),
        (["--resume"], "expected a key, got --resume; options stand before the KEY VALUE pairs"),
        (["a b", "c"], "expected a key such as SOLVER.MAX_ITER, got 'a b'"),
        ([3, "c"], "expected a key, got 3; overrides are KEY VALUE pairs"),
        # values
        (["SOLVER.MAX_ITER", "fast"], "SOLVER.MAX_ITER: expected a whole number >= 1, got 'fast'"),
        (["SOLVER.MAX_ITER", "2.5"], "SOLVER.MAX_ITER: expected a whole number >= 1, got 2.5"),
        (["SOLVER.MAX_ITER", "True"], "SOLVER.MAX_ITER: expected a whole number >= 1, got True"),
        (["SOLVER.IMS_PER_BATCH", "0"], "SOLVER.IMS_PER_BATCH: expected a whole number >= 1, got 0"),
        (["SOLVER.BASE_LR", "nan"], "SOLVER.BASE_LR: expected a number >= 0, got 'nan'"),
        (["SOLVER.BASE_LR", "1e999"], "SOLVER.BASE_LR: expected a number >= 0, got 1e999"),
        (["SOLVER.BASE_LR", ""], "SOLVER.BASE_LR: expected a number >= 0, got ''"),
        (["SOLVER.BASE_LR", None], "SOLVER.BASE_LR: expected a number >= 0, got nothing"),
        (["SOLVER.MOMENTUM", "1"], "SOLVER.MOMENTUM: expected a number >= 0 and < 1, got 1"),
        (["MODEL.RPN.NMS_THRESH", "1.5"], "MODEL.RPN.NMS_THRESH: expected a number from 0 to 1, got 1.5"),
        (["MODEL.MASK_ON", "1"], "MODEL.MASK_ON: expected True or False, got 1"),
        (["MODEL.DEVICE", "gpu"], "MODEL.DEVICE: expected cpu, cuda or cuda:N, got 'gpu'"),
        (["OUTPUT_DIR", ""], "OUTPUT_DIR: expected a non-empty string, got ''"),
        (["OUTPUT_DIR", 3], "OUTPUT_DIR: expected a non-empty string, got 3"),
        (
            ["DTYPE", "flaot16"],
            "DTYPE: expected one of float32, bfloat16, float16, got 'flaot16'; did you mean float16?",
        ),
        (
            ["MODEL.ROI_MASK_HEAD.POSITIVES_ONLY", "x"],
            "MODEL.ROI_MASK_HEAD.POSITIVES_ONLY: expected auto or True or False, got 'x'",
        ),
        # lists
        (["SOLVER.STEPS", "9"], 'SOLVER.STEPS: expected a list of whole numbers >= 1, got 9; write "(9,)"'),
        (["SOLVER.STEPS", "(1,2"], "SOLVER.STEPS: expected a list of whole numbers >= 1, got '(1,2'; write \"(1, 2)\""),
        (["SOLVER.STEPS", "(1,2.5)"], "SOLVER.STEPS: expected a list of whole numbers >= 1, got (1,2.5)"),
        (
            ["SOLVER.STEPS", "a"],
            "SOLVER.STEPS: expected a list of whole numbers >= 1, got 'a'; write it like \"(30000,)\"",
        ),
        (
            ["DATASETS.TRAIN", "a.json@b"],
            "DATASETS.TRAIN: expected a list of non-empty strings, got 'a.json@b'; write \"('a.json@b',)\"",
        ),
        (
            ["DATASETS.TRAIN", "(a, b)"],
            "DATASETS.TRAIN: expected a list of non-empty strings, got '(a, b)'; write \"('a', 'b')\"",
        ),
        (["INPUT.PIXEL_MEAN", "(1, 2)"], "INPUT.PIXEL_MEAN: expected a list of 3 numbers, got (1, 2)"),
        (["INPUT.PIXEL_STD", "(1, 2, 0)"], "INPUT.PIXEL_STD: expected a list of 3 numbers > 0, got (1, 2, 0)"),
        (
            ["INPUT.MIN_SIZE_TRAIN", "()"],
            "INPUT.MIN_SIZE_TRAIN: expected a list of one or more whole numbers >= 1, got ()",
        ),
        (
            ["MODEL.RESNETS.STAGE_WITH_DCN", "(0, 1, 1, 1)"],
            "MODEL.RESNETS.STAGE_WITH_DCN: expected a list of 4 values True or False, got (0, 1, 1, 1)",
        ),
    ],
)
def test_command_line(overrides: list[object], message: str) -> None:
    assert message_of(None, overrides) == f"command line: {message}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("SOLVER:\n  SEED: 1\n  MAX_ITR: 3", ":3: unknown key SOLVER.MAX_ITR; did you mean SOLVER.MAX_ITER?"),
        ("MODLE:\n  MASK_ON: true", ":1: unknown key MODLE; did you mean MODEL?"),
        ("MASK_ON: true", ":1: unknown key MASK_ON; did you mean MODEL.MASK_ON?"),
        ("# c\n1: 2", ":2: unknown key 1; `python -m fastrcnn.config` prints all keys"),
        ('"a\\nb": 2', ":1: unknown key a b; `python -m fastrcnn.config` prints all keys"),
        ("SOLVER: 3", ":1: SOLVER is a section, not a key; set a key in it, as SOLVER.MAX_ITER"),
        ("SOLVER:\n  STEPS: {}", ":2: SOLVER.STEPS: expected a list of whole numbers >= 1, got a section"),
        ("SOLVER:\n  BASE_LR: fast", ":2: SOLVER.BASE_LR: expected a number >= 0, got the string 'fast'"),
        (
            'SOLVER:\n  BASE_LR: "0.1"',
            ":2: SOLVER.BASE_LR: expected a number >= 0, got the string '0.1'; remove the quotes",
        ),
        (
            'MODEL:\n  MASK_ON: "yes"',
            ":2: MODEL.MASK_ON: expected True or False, got the string 'yes'; remove the quotes",
        ),
        ("MODEL:\n  MASK_ON: 1", ":2: MODEL.MASK_ON: expected True or False, got 1"),
        ("SOLVER:\n  MAX_ITER: yes", ":2: SOLVER.MAX_ITER: expected a whole number >= 1, got True"),
        ("SOLVER:\n  BASE_LR:", ":2: SOLVER.BASE_LR: expected a number >= 0, got nothing"),
        ("OUTPUT_DIR:", ':1: OUTPUT_DIR: expected a non-empty string, got nothing; write "" for an empty string'),
        ("MODEL:\n  WEIGHT: null", ':2: MODEL.WEIGHT: expected a string, got nothing; write "" for an empty string'),
        (
            "DATASETS:\n  TRAIN: (a, b)",
            ":2: DATASETS.TRAIN: expected a list of non-empty strings, got the string '(a, b)'; write ('a', 'b')",
        ),
        (
            "INPUT:\n  MIN_SIZE_TRAIN: 800",
            ":2: INPUT.MIN_SIZE_TRAIN: expected a list of one or more whole numbers >= 1, got 800; write (800,)",
        ),
        ("SOLVER:\n  GAMMA: .inf", ":2: SOLVER.GAMMA: expected a number > 0, got inf"),
        ("SOLVER:\n  SEED: 1\n  STEPS: [2]\n  SEED: 1", ":4: SOLVER.SEED stands here a second time (first in line 2)"),
        ("SOLVER: {}\nSOLVER: {}", ":2: SOLVER stands here a second time (first in line 1)"),
        ("SOLVER.SEED: 1\nSOLVER:\n  SEED: 2", ":3: SOLVER.SEED stands here a second time (first in line 1)"),
        (
            "SOLVER:\n\tSEED: 3",
            ":2: not valid YAML: found character '\\t' that cannot start any token; indent with spaces, not tabs",
        ),
        ("SOLVER:\n  STEPS: [1,2", ":2: not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ("OUTPUT_DIR: a: b", ":1: not valid YAML: mapping values are not allowed here"),
        ("---\nSOLVER:\n---\nMODEL:", ":3: not valid YAML: but found another document"),
        ("OUTPUT_DIR: a\n#\x01", ":2: not valid YAML: character 1 is not allowed"),
        (
            "SOLVER:\n  STEPS: !!python/tuple [1]",
            ":2: not valid YAML: could not determine a constructor for the tag 'tag:yaml.org,2002:python/tuple'",
        ),
        ("SOLVER:\n  STEPS: 2020-13-45", ":2: SOLVER.STEPS: cannot read the value: month must be in 1..12"),
        ("- a", ":1: expected keys and values (KEY: value)"),
        ("hello", ":1: expected keys and values (KEY: value)"),
        ("? [a]\n: b", ":1: a key must be a name"),
        ("SOLVER: &a {SOLVER: *a}", ": nested too deeply"),
        ("_BASE_: [a]", ":1: _BASE_ takes the name of one file, got ['a']"),
        ("_BASE_: run.yaml", ": _BASE_ leads back to this file"),
    ],
)
def test_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(text)
    assert message_of("run.yaml", []) == f"run.yaml{message}"


def test_missing_and_unreadable_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("_BASE_: bas.yaml")
    Path("base.yaml").write_text("")
    Path("binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert message_of("rum.yaml", []) == "config file rum.yaml does not exist; did you mean run.yaml?"
    assert message_of("none/x.yaml", []) == "config file none/x.yaml does not exist"
    assert message_of(".", []) == "config file . is a folder; name a .yaml file in it"
    assert message_of("binary.yaml", []) == "config file binary.yaml is not a text file (byte 0 is not UTF-8)"
    assert message_of("run.yaml", []) == "run.yaml:1: _BASE_ file bas.yaml does not exist; did you mean base.yaml?"


def test_an_error_in_a_base_file_names_that_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("_BASE_: base.yaml\nSOLVER:\n  SEED: 1\n")
    Path("base.yaml").write_text("SOLVER:\n\n  MAX_ITER: many\n")
    assert message_of("run.yaml", []).startswith("base.yaml:3: SOLVER.MAX_ITER: expected")


def test_a_wrong_value_that_is_overridden_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("SOLVER: {MAX_ITER: many}")
    assert load_config(path, ["SOLVER.MAX_ITER", "5"]).SOLVER.MAX_ITER == 5


def test_the_first_of_several_mistakes_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("TEST: {IMS_PER_BATCH: x}\nMODEL: {MASK_ON: y}\n")
    assert ":1: TEST.IMS_PER_BATCH" in message_of(path, [])


# --- keys that contradict each other ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["SOLVER.STEPS", "(20, 10)"], ["SOLVER.STEPS must increase, got (20, 10)"]),
        (["SOLVER.STEPS", "(10, 10)"], ["SOLVER.STEPS must increase"]),
        (
            ["STEP.MASK_SHARES", "(0.5, 0.75)"],
            ["MASK_SHARES must increase from more than 0 to 1, got (0.5, 0.75)"],
        ),
        (["INPUT.MIN_SIZE_TRAIN", "(1400,)"], ["INPUT.MIN_SIZE_TRAIN 1400", "INPUT.MAX_SIZE_TRAIN 1333"]),
        (["INPUT.MAX_SIZE_TEST", "700"], ["INPUT.MIN_SIZE_TEST 800", "INPUT.MAX_SIZE_TEST 700"]),
        (["DATALOADER.SIZE_DIVISIBILITY", "16"], ["multiple of 32", "set DATALOADER.SIZE_DIVISIBILITY 32"]),
        (
            ["DATALOADER.SHAPE_BUCKETS", "((800, 1000),)"],
            ["DATALOADER.SHAPE_BUCKETS holds (800, 1000), which is not a multiple", "SIZE_DIVISIBILITY 32"],
        ),
        (["MODEL.RPN.BG_IOU_THRESHOLD", "0.8"], ["MODEL.RPN.BG_IOU_THRESHOLD 0.8", "FG_IOU_THRESHOLD 0.7"]),
        (["MODEL.ROI_HEADS.FG_IOU_THRESHOLD", "0.4"], ["MODEL.ROI_HEADS.BG_IOU_THRESHOLD 0.5"]),
        (["MODEL.GROUP_NORM.DIM_PER_GP", "16"], ["MODEL.GROUP_NORM.DIM_PER_GP (16) and NUM_GROUPS (32)"]),
        (["MODEL.GROUP_NORM.NUM_GROUPS", "-1"], ["MODEL.GROUP_NORM.DIM_PER_GP (-1) and NUM_GROUPS (-1)"]),
        (
            ["MODEL.BACKBONE.CONV_BODY", "R-18-FPN"],
            ["has basic blocks", "set MODEL.RESNETS.TRANS_FUNC BasicBlockWithFixedBatchNorm"],
        ),
        (
            ["MODEL.RESNETS.TRANS_FUNC", "BasicBlockWithGN"],
            ["not for R-50-FPN", "set MODEL.RESNETS.TRANS_FUNC BottleneckWithGN"],
        ),
        (
            [
                "MODEL.BACKBONE.CONV_BODY=R-18-FPN",
                "MODEL.RESNETS.TRANS_FUNC=BasicBlockWithGN",
                "MODEL.RESNETS.NUM_GROUPS=32",
            ],
            ["set MODEL.RESNETS.NUM_GROUPS 1"],
        ),
        (
            [
                "MODEL.BACKBONE.CONV_BODY=R-18-FPN",
                "MODEL.RESNETS.TRANS_FUNC=BasicBlockWithGN",
                "MODEL.RESNETS.STAGE_WITH_DCN=(False, True, True, True)",
            ],
            ["no deformable convolutions", 'set MODEL.RESNETS.STAGE_WITH_DCN "(False, False, False, False)"'],
        ),
        (["MODEL.RESNETS.RES5_DILATION", "2"], ["set MODEL.RESNETS.RES5_DILATION 1"]),
        (["MODEL.RPN.USE_FPN", "False"], ["set MODEL.RPN.USE_FPN True"]),
        (["MODEL.BACKBONE.CONV_BODY", "R-50-C4"], ["set MODEL.RPN.USE_FPN False"]),
        (["MODEL.RPN.ANCHOR_STRIDE", "(16,)"], ['set MODEL.RPN.ANCHOR_STRIDE "(4, 8, 16, 32, 64)"', "got 1 and 5"]),
        (["MODEL.RPN.ANCHOR_SIZES", "(32, 64)"], ["got 5 and 2"]),
        (["MODEL.RETINANET_ON", "True"], ["set MODEL.BACKBONE.CONV_BODY R-50-FPN-RETINANET"]),
        (["MODEL.BACKBONE.CONV_BODY=R-50-FPN-RETINANET", "MODEL.RPN.USE_FPN=False"], ["MODEL.RETINANET_ON False"]),
        (["MODEL.RPN_ONLY", "True"], ["MODEL.MASK_ON and MODEL.RPN_ONLY exclude each other"]),
        (["MODEL.ROI_HEADS.USE_FPN", "False"], ["set MODEL.ROI_HEADS.USE_FPN True"]),
        (
            ["MODEL.ROI_BOX_HEAD.FEATURE_EXTRACTOR", "ResNet50Conv5ROIFeatureExtractor"],
            ["set MODEL.ROI_BOX_HEAD.FEATURE_EXTRACTOR FPN2MLPFeatureExtractor"],
        ),
        (["MODEL.ROI_BOX_HEAD.PREDICTOR", "FastRCNNPredictor"], ["set MODEL.ROI_BOX_HEAD.PREDICTOR FPNPredictor"]),
        (
            ["MODEL.ROI_BOX_HEAD.POOLER_SCALES", "(0.0625,)"],
            ['set MODEL.ROI_BOX_HEAD.POOLER_SCALES "(0.25, 0.125, 0.0625, 0.03125)"'],
        ),
        (["MODEL.ROI_MASK_HEAD.POOLER_SCALES", "(0.25, 0.1)"], ["MODEL.ROI_MASK_HEAD.POOLER_SCALES (0.25, 0.1)"]),
        (
            ["MODEL.ROI_MASK_HEAD.SHARE_BOX_FEATURE_EXTRACTOR", "True"],
            ["gives vectors", "set MODEL.ROI_MASK_HEAD.SHARE_BOX_FEATURE_EXTRACTOR False"],
        ),
        (
            ["MODEL.ROI_MASK_HEAD.FEATURE_EXTRACTOR", "ResNet50Conv5ROIFeatureExtractor"],
            ["set MODEL.ROI_MASK_HEAD.FEATURE_EXTRACTOR MaskRCNNFPNFeatureExtractor"],
        ),
        (["MODEL.ROI_MASK_HEAD.RESOLUTION", "14"], ["predict 28 x 28", "set MODEL.ROI_MASK_HEAD.RESOLUTION 28"]),
        (["MODEL.ROI_MASK_HEAD.PREDICTOR", "MaskRCNNConv1x1Predictor"], ["set MODEL.ROI_MASK_HEAD.RESOLUTION 14"]),
        (["MODEL.KEYPOINT_ON", "True"], ["set MODEL.ROI_KEYPOINT_HEAD.SHARE_BOX_FEATURE_EXTRACTOR False"]),
        (
            [
                "MODEL.KEYPOINT_ON=True",
                "MODEL.ROI_KEYPOINT_HEAD.SHARE_BOX_FEATURE_EXTRACTOR=False",
                "MODEL.ROI_KEYPOINT_HEAD.POOLER_SCALES=(0.25, 0.125)",
            ],
            ["set MODEL.ROI_KEYPOINT_HEAD.RESOLUTION 56"],
        ),
    ],
)
def test_keys_that_contradict_each_other(overrides: list[object], parts: list[str]) -> None:
    message = message_of(MASK_RCNN, overrides)
    assert message.startswith("command line: ")
    assert all(part in message for part in parts), message


def test_single_level_models_have_one_stride_and_one_scale() -> None:
    assert 'set MODEL.RPN.ANCHOR_STRIDE "(16,)"' in message_of(None, ["MODEL.RPN.ANCHOR_STRIDE", "(8, 16)"])
    message = message_of(None, ["MODEL.ROI_BOX_HEAD.POOLER_SCALES", "(0.25, 0.125)"])
    assert 'set MODEL.ROI_BOX_HEAD.POOLER_SCALES "(0.0625,)"' in message
    c5 = ["MODEL.BACKBONE.CONV_BODY", "R-50-C5"]
    assert 'set MODEL.RPN.ANCHOR_STRIDE "(32,)"' in message_of(None, c5)
    c5 += ["MODEL.RPN.ANCHOR_STRIDE", "(32,)"]
    assert "fifth stage of a ResNet" in message_of(None, c5)
    c5 += ["MODEL.ROI_BOX_HEAD.FEATURE_EXTRACTOR", "FPN2MLPFeatureExtractor"]
    assert 'set MODEL.ROI_BOX_HEAD.POOLER_SCALES "(0.03125,)"' in message_of(None, c5)
    dilated = ["MODEL.RESNETS.RES5_DILATION", "2"]
    assert 'set MODEL.RPN.ANCHOR_STRIDE "(16,)"' in message_of(None, [*c5, *dilated])


def test_a_contradiction_names_the_line_of_the_key_that_was_set(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("MODEL:\n  BACKBONE:\n    CONV_BODY: R-50-FPN\nDATALOADER:\n  SIZE_DIVISIBILITY: 32\n")
    assert message_of(path, []).startswith(f"{path}:3: MODEL.RPN.USE_FPN False does not fit")


# --- anything at all -------------------------------------------------------------------------------------------------


def check_outcome(path: Path | None, overrides: list[object]) -> None:
    """A configuration or one line; never another exception."""
    try:
        load_config(path, overrides)
    except ConfigError as error:
        message = str(error)
    else:
        return
    assert len(message.splitlines()) == 1


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    key=st.sampled_from(sorted(leaves())),
    text=st.text(max_size=20) | st.from_regex(r"[-+0-9.eE(),\[\]' aTrue]{0,12}", fullmatch=True),
)
@example(key="SOLVER.STEPS", text="(" * 500)
@example(key="SOLVER.STEPS", text="1" * 5000)
@example(key="SOLVER.BASE_LR", text="1" * 400)
@example(key="SOLVER.MAX_ITER", text="1" * 5000)
@example(key="SOLVER.BASE_LR", text="1j")
@example(key="MODEL.RPN.ANCHOR_SIZES", text="[a, : ]")
@pytest.mark.filterwarnings("ignore::fastrcnn.config.ConfigWarning")
@pytest.mark.filterwarnings("ignore::SyntaxWarning")
def test_any_text_on_the_command_line(key: str, text: str) -> None:
    check_outcome(None, [key, text])


@settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    text=st.text(max_size=60) | st.from_regex(r"(SOLVER|STEPS|[-:&*\[\]{}!<>'\"?,#|%@ \n\t1a]){0,16}", fullmatch=True)
)
@example(text="[" * 2000)
@example(text="SOLVER: {STEPS: &a [*a]}")
@example(text="SOLVER: {BASE_LR: 1" + "0" * 400 + "}")
@example(text="SOLVER: {MAX_ITER: 1" + "0" * 5000 + "}")
@example(text="<<: 1")
@example(text="SOLVER: {<<: [1]}")
@example(text="=: 1")
@pytest.mark.filterwarnings("ignore::fastrcnn.config.ConfigWarning")
def test_any_text_in_a_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    check_outcome(path, [])
