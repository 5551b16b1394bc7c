"""Configuration: the schema against maskrcnn-benchmark's defaults, files, overrides, documentation.

Round trips are in test_config_dump.py; what a wrong configuration says, in test_config_errors.py.
"""

from __future__ import annotations

import json
import typing
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from fastrcnn.config import Config, ConfigError, ConfigWarning, dump_config, load_config, with_overrides
from fastrcnn.config.__main__ import main
from fastrcnn.config.describe import KEYS_WITHOUT_EFFECT, expected, is_own, leaves, markdown
from tests.config_helpers import OWN_KEYS, load_text, lookup, nested, upstream_configs, upstream_defaults

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIGS = sorted((REPOSITORY / "configs").rglob("*.yaml"))
# --- the schema ------------------------------------------------------------------------------------------------------


def test_keys_and_defaults_are_upstreams_and_ours_are_marked() -> None:
    cfg = load_config()
    upstream = upstream_defaults()
    assert len(upstream) == 171
    assert {name for name, field in leaves().items() if not is_own(field)} == set(upstream)
    assert {name for name, field in leaves().items() if is_own(field)} == set(OWN_KEYS)
    for name, default in {**upstream, **OWN_KEYS}.items():
        value = lookup(cfg, name)
        if isinstance(default, list):
            default = tuple(default)
        assert value == default, name
        assert isinstance(value, bool) == isinstance(default, bool), name


def test_keys_of_each_section_keep_upstreams_order() -> None:
    def by_section(names: typing.Iterable[str]) -> dict[str, list[str]]:
        grouped: dict[str, list[str]] = {}
        for name in names:
            grouped.setdefault(name.rpartition(".")[0], []).append(name)
        return grouped

    ours = by_section(name for name, field in leaves().items() if not is_own(field))
    assert ours == by_section(upstream_defaults())


def test_every_key_has_a_description_and_a_type_in_words() -> None:
    for name, field in leaves().items():
        assert field.description, name
        assert len(field.description) >= 10, name
        assert "\n" not in field.description, name
        assert expected(field) != "a value", name


def test_result_is_frozen() -> None:
    cfg = load_config()
    with pytest.raises(ValidationError, match="frozen"):
        cfg.SOLVER.BASE_LR = 1.0
    with pytest.raises(ValidationError, match="frozen"):
        cfg.MODEL = cfg.MODEL
    assert hash(cfg) == hash(load_config())


# --- files -----------------------------------------------------------------------------------------------------------


def test_all_upstream_configs_load(tmp_path: Path) -> None:
    """Their settings as YAML give their values, and the default for every other key."""
    everything = upstream_configs()
    assert len(everything) == 66
    defaults = load_config()
    for file_name, flat in everything.items():
        path = tmp_path / file_name.replace("/", "-")
        path.write_text(yaml.safe_dump(nested({name: _as_list(value) for name, value in flat.items()})))
        cfg = load_config(path)
        for name, value in flat.items():
            assert lookup(cfg, name) == value, (file_name, name)
        assert all(lookup(cfg, name) == lookup(defaults, name) for name in leaves() if name not in flat), file_name
        assert load_text(tmp_path, dump_config(cfg)) == cfg, file_name


@pytest.mark.parametrize("name", list(upstream_configs()))
def test_shipped_configs_equal_upstreams(name: str) -> None:
    assert load_config(REPOSITORY / "configs" / name) == Config.model_validate(nested(upstream_configs()[name]))


def test_the_stored_settings_are_those_of_the_inventory(shared_data: Path) -> None:
    source = shared_data.parent / "reference" / "config_values.json"
    if not source.is_file():
        pytest.skip(f"no {source.name} beside the test data")
    inventory = json.loads(source.read_text())
    assert list(upstream_configs()) == sorted(inventory)
    for name, flat in inventory.items():
        changed = {key: tuple(value) if isinstance(value, list) else value for key, value in flat.items()}
        assert Config.model_validate(nested(changed)) == Config.model_validate(nested(upstream_configs()[name])), name


def _as_list(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_load_and_say_what_they_are(path: Path) -> None:
    load_config(path)
    assert path.read_text().startswith("# ")


STYLES = [
    # strings of Python tuples, quoted and not, with and without a comma at the end
    ("INPUT:\n  MIN_SIZE_TRAIN: (800,)\n  MAX_SIZE_TRAIN: 1333\n", {"INPUT.MIN_SIZE_TRAIN": (800,)}),
    (
        'DATASETS:\n  TRAIN: ("voc_2007_train", "voc_2007_val")\n',
        {"DATASETS.TRAIN": ("voc_2007_train", "voc_2007_val")},
    ),
    ("SOLVER:\n  STEPS: (60000, 80000)\n", {"SOLVER.STEPS": (60000, 80000)}),
    ("SOLVER:\n  STEPS: (30000, )\n", {"SOLVER.STEPS": (30000,)}),
    # lists of YAML, also over lines
    ("MODEL:\n  RPN:\n    ANCHOR_SIZES: [32, 64]\n    ANCHOR_STRIDE: [16]\n", {"MODEL.RPN.ANCHOR_SIZES": (32, 64)}),
    ("DATASETS:\n  TEST:\n    - coco_2014_minival\n", {"DATASETS.TEST": ("coco_2014_minival",)}),
    # numbers of another kind, exponents, spellings of truth
    ("SOLVER:\n  BASE_LR: 2e-2\n  BIAS_LR_FACTOR: 1\n", {"SOLVER.BASE_LR": 0.02, "SOLVER.BIAS_LR_FACTOR": 1.0}),
    ("MODEL:\n  MASK_ON: false\n  RPN_ONLY: True\n", {"MODEL.MASK_ON": False, "MODEL.RPN_ONLY": True}),
    # a section whose keys are commented out, a comment after a value, an empty file
    ("MODEL:\n  RESNETS:\n#    NUM_GROUPS: 32\nOUTPUT_DIR: runs  # here\n", {"OUTPUT_DIR": "runs"}),
    ("", {"SOLVER.MAX_ITER": 40000}),
    # keys that only its own code reads
    ('PATHS_CATALOG: ""\nAMP_VERBOSE: False\nDTYPE: "float16"\n', {"DTYPE": "float16"}),
    (
        "TEST:\n  BBOX_AUG:\n    ENABLED: True\n    SCALES: (400, 500)\n",
        {"TEST.BBOX_AUG.ENABLED": True, "TEST.BBOX_AUG.SCALES": (400, 500)},
    ),
    ('MODEL:\n  FBNET:\n    ARCH: "default"\n    DET_HEAD_BLOCKS: []\n', {"MODEL.FBNET.DET_HEAD_BLOCKS": ()}),
]


@pytest.mark.parametrize(("text", "values"), STYLES)
def test_styles_in_which_its_files_are_written(text: str, values: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    cfg = load_config(path)
    for name, value in values.items():
        assert lookup(cfg, name) == value


def test_tuples_in_strings_and_lists(tmp_path: Path) -> None:
    cfg = load_text(
        tmp_path,
        """
        SOLVER:
          STEPS: (480000, 640000)
          BASE_LR: 1e-3
          WEIGHT_DECAY: 0
        INPUT:
          MIN_SIZE_TRAIN: [640, 800]
          PIXEL_MEAN: "[1, 2.5, 1e-2]"
        DATASETS:
          TRAIN: ("coco_2014_train", "coco_2014_valminusminival")
          TEST:
            - a.json@images
        """,
    )
    assert cfg.SOLVER.STEPS == (480000, 640000)
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.WEIGHT_DECAY) == (0.001, 0.0)
    assert isinstance(cfg.SOLVER.WEIGHT_DECAY, float)
    assert cfg.INPUT.MIN_SIZE_TRAIN == (640, 800)
    assert cfg.INPUT.PIXEL_MEAN == (1.0, 2.5, 0.01)
    assert cfg.DATASETS.TRAIN == ("coco_2014_train", "coco_2014_valminusminival")
    assert cfg.DATASETS.TEST == ("a.json@images",)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("OUTPUT_DIR: 010", "010"),
        ("OUTPUT_DIR: 1e3", "1e3"),
        ("OUTPUT_DIR: '~/x y'", "~/x y"),
        ("OUTPUT_DIR: on", "on"),
    ],
)
def test_string_keys_keep_the_characters_as_written(tmp_path: Path, text: str, value: str) -> None:
    assert load_text(tmp_path, text).OUTPUT_DIR == value


def test_empty_file_and_empty_section_change_nothing(tmp_path: Path) -> None:
    for text in ("", "# nothing\n", "SOLVER:\n", "SOLVER: {}\nMODEL:\n  RPN:\n"):
        assert load_text(tmp_path, text) == load_config()


def test_base_file_is_read_first_from_the_folder_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "root.yaml").write_text("SOLVER:\n  MAX_ITER: 10\n  SEED: 1\n  LOG_PERIOD: 2\n")
    (tmp_path / "sub/middle.yaml").write_text("_BASE_: ../root.yaml\nSOLVER:\n  MAX_ITER: 20\n  SEED: 3\n")
    solver = load_text(tmp_path, "SOLVER:\n  MAX_ITER: 30\n_BASE_: sub/middle.yaml\n").SOLVER
    assert (solver.MAX_ITER, solver.SEED, solver.LOG_PERIOD) == (30, 3, 2)


def test_anchors_and_merge_keys(tmp_path: Path) -> None:
    text = """
    MODEL:
      ROI_BOX_HEAD: &pool
        POOLER_SAMPLING_RATIO: 2
        POOLER_SCALES: [0.5]
      ROI_MASK_HEAD:
        <<: *pool
        POOLER_SCALES: [0.125]
    """
    mask = load_text(tmp_path, text).MODEL.ROI_MASK_HEAD
    assert (mask.POOLER_SAMPLING_RATIO, mask.POOLER_SCALES) == (2, (0.125,))


# --- overrides -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "key", "value"),
    [
        (["SOLVER.STEPS", "(480000, 640000)"], "SOLVER.STEPS", (480000, 640000)),
        (["SOLVER.STEPS", "[480000, 640000]"], "SOLVER.STEPS", (480000, 640000)),
        (["SOLVER.STEPS", "()"], "SOLVER.STEPS", ()),
        (["SOLVER.STEPS", [1, 2]], "SOLVER.STEPS", (1, 2)),
        (["SOLVER.BASE_LR=1e-3"], "SOLVER.BASE_LR", 0.001),
        (["SOLVER.BASE_LR", "1"], "SOLVER.BASE_LR", 1.0),
        (["SOLVER.BASE_LR", 1], "SOLVER.BASE_LR", 1.0),
        (["SOLVER.MAX_ITER", "9e4"], "SOLVER.MAX_ITER", 90000),
        (["SOLVER.MAX_ITER", "1", "SOLVER.MAX_ITER=2"], "SOLVER.MAX_ITER", 2),
        (["MODEL.MASK_ON", "true"], "MODEL.MASK_ON", True),
        (["MODEL.MASK_ON", "False"], "MODEL.MASK_ON", False),
        (["MODEL.WEIGHT", ""], "MODEL.WEIGHT", ""),
        (["MODEL.WEIGHT="], "MODEL.WEIGHT", ""),
        (["MODEL.WEIGHT", "'a b.pth'"], "MODEL.WEIGHT", "a b.pth"),
        (["OUTPUT_DIR", "123"], "OUTPUT_DIR", "123"),
        (["OUTPUT_DIR=a=b"], "OUTPUT_DIR", "a=b"),
        (["MODEL.DEVICE", "cuda:1"], "MODEL.DEVICE", "cuda:1"),
        (["DATASETS.TRAIN", "('a.json@b',)"], "DATASETS.TRAIN", ("a.json@b",)),
        (["DATASETS.TRAIN", "[a.json@b, c]"], "DATASETS.TRAIN", ("a.json@b", "c")),
        (["MODEL.ROI_MASK_HEAD.POSITIVES_ONLY", "auto"], "MODEL.ROI_MASK_HEAD.POSITIVES_ONLY", "auto"),
        (["MODEL.ROI_MASK_HEAD.POSITIVES_ONLY", "true"], "MODEL.ROI_MASK_HEAD.POSITIVES_ONLY", True),
        (["MODEL.RESNETS.RES5_DILATION", "2"], "MODEL.RESNETS.RES5_DILATION", 2),
        (["TEST.EXPECTED_RESULTS", "[['bbox', 'AP', 0.3, 1]]"], "TEST.EXPECTED_RESULTS", (("bbox", "AP", 0.3, 1.0),)),
        (["TEST.EXPECTED_RESULTS", "[['bbox', 'AP', (0.3, 1)]]"], "TEST.EXPECTED_RESULTS", (("bbox", "AP", 0.3, 1.0),)),
        (["MODEL.FBNET.DET_HEAD_BLOCKS", "[[1, [2]], 'a']"], "MODEL.FBNET.DET_HEAD_BLOCKS", ((1, (2,)), "a")),
    ],
)
def test_overrides(overrides: list[object], key: str, value: object) -> None:
    found = lookup(load_config(None, overrides), key)
    assert found == value
    assert type(found) is type(value)


def test_command_line_wins_over_the_file(tmp_path: Path) -> None:
    cfg = load_text(tmp_path, "SOLVER: {MAX_ITER: 5, SEED: 6}", ["SOLVER.MAX_ITER", "7"])
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.SEED) == (7, 6)


def test_with_overrides_leaves_the_first_alone() -> None:
    first = load_config(REPOSITORY / "configs/e2e_mask_rcnn_R_50_FPN_1x.yaml")
    second = with_overrides(first, ["SOLVER.MAX_ITER", "7"])
    assert (first.SOLVER.MAX_ITER, second.SOLVER.MAX_ITER) == (90000, 7)
    assert with_overrides(second, ["SOLVER.MAX_ITER", 90000]) == first
    with pytest.raises(ConfigError, match="POOLER_SCALES"):
        with_overrides(first, ["MODEL.ROI_BOX_HEAD.POOLER_SCALES", "(0.0625,)"])


# --- documentation and the command -----------------------------------------------------------------------------------


def test_documentation_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--markdown"]) == 0
    printed = capsys.readouterr().out
    assert printed == markdown()
    assert printed == (REPOSITORY / "docs/configuration.md").read_text(encoding="utf-8")
    for name in leaves():
        assert f"| `{name}`" in printed


def test_command_prints_the_effective_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(REPOSITORY / "configs/rpn_R_50_FPN_1x.yaml")
    assert main([path, "SOLVER.MAX_ITER", "7", "MODEL.DEVICE=cpu"]) == 0
    assert load_text(tmp_path, capsys.readouterr().out) == load_config(
        path, ["SOLVER.MAX_ITER", 7, "MODEL.DEVICE", "cpu"]
    )
    assert main(["SOLVER.MAX_ITER", "7"]) == 0
    assert load_text(tmp_path, capsys.readouterr().out) == load_config(None, ["SOLVER.MAX_ITER", 7])
    assert main(["SOLVER.MAX_ITR", "7"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "error: command line: unknown key SOLVER.MAX_ITR; did you mean SOLVER.MAX_ITER?\n"
    assert captured.out == ""


@pytest.mark.parametrize("name", KEYS_WITHOUT_EFFECT)
def test_setting_a_key_without_effect_warns(name: str, recwarn: pytest.WarningsRecorder) -> None:
    default = leaves()[name].default
    load_config(None, [name, default])
    assert not recwarn.list
    changed = "True" if default is False else "17"
    with pytest.warns(ConfigWarning, match=f"command line: {name} has no effect: "):
        load_config(None, [name, changed])
