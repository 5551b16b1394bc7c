"""The configuration schema: every key, its type, its default, its bounds and what it does.

The key tree is maskrcnn-benchmark's (names, defaults and order of ``maskrcnn_benchmark/config/defaults.py``); keys
that it does not have are made with :func:`own`. Sections are frozen pydantic models, so a configuration cannot change
under a running training. The keys under MODEL are in :mod:`fastrcnn.config.model_schema`. Reading files and the
command line is the business of :mod:`fastrcnn.config.load`; rules that involve more than one key are in
:mod:`fastrcnn.config.checks`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from fastrcnn.config.checks import check_config
from fastrcnn.config.fields import (
    Bool,
    Count,
    Float,
    Fraction,
    Ints,
    Name,
    Names,
    NonNegative,
    Positive,
    PositiveInt,
    Section,
    Str,
    key,
    own,
)
from fastrcnn.config.model_schema import ModelConfig


class InputConfig(Section):
    """From an image file to the network's input."""

    MIN_SIZE_TRAIN: Ints = key((800,), "Shorter side in training, pixels; drawn from these for each image")
    MAX_SIZE_TRAIN: PositiveInt = key(1333, "Longer side at most, in training")
    MIN_SIZE_TEST: PositiveInt = key(800, "Shorter side in evaluation, pixels")
    MAX_SIZE_TEST: PositiveInt = key(1333, "Longer side at most, in evaluation")
    PIXEL_MEAN: tuple[Float, Float, Float] = key((102.9801, 115.9465, 122.7717), "Subtracted from each channel")
    PIXEL_STD: tuple[Positive, Positive, Positive] = key((1.0, 1.0, 1.0), "Each channel is divided by this")
    TO_BGR255: Bool = key(True, "Channels in the order blue, green, red and values 0 to 255; else RGB and 0 to 1")
    BRIGHTNESS: NonNegative = key(0.0, "Colour jitter: largest relative change of the brightness")
    CONTRAST: NonNegative = key(0.0, "Colour jitter: largest relative change of the contrast")
    SATURATION: NonNegative = key(0.0, "Colour jitter: largest relative change of the saturation")
    HUE: Annotated[float, Field(strict=True, ge=0, le=0.5)] = key(0.0, "Colour jitter: largest turn of the hue")
    HORIZONTAL_FLIP_PROB_TRAIN: Fraction = key(0.5, "Probability of a left-right flip in training")
    VERTICAL_FLIP_PROB_TRAIN: Fraction = key(0.0, "Probability of a top-bottom flip in training")


class DatasetsConfig(Section):
    """What to train on and to test on."""

    TRAIN: Names = key((), "Training sets: names, ANNOTATIONS.json@IMAGE_FOLDER, voc:FOLDER@SPLIT, ...")
    TEST: Names = key((), "Evaluation sets: names, ANNOTATIONS.json@IMAGE_FOLDER, voc:FOLDER@SPLIT, ...")
    OWN: tuple[tuple[Name, Name], ...] = own((), "(name, where it lies) of data sets that TRAIN and TEST then name")
    FILTER_EMPTY: Bool = own(True, "Training drops images without a usable annotation; false trains on them")


class DataloaderConfig(Section):
    """Loading."""

    NUM_WORKERS: Count = key(4, "Loader processes for each training process; 0 loads in the training process")
    SIZE_DIVISIBILITY: Count = key(0, "Batches are padded to a multiple of this; FPN models need 32")
    ASPECT_RATIO_GROUPING: Bool = key(
        True, "Wide and tall images do not share a batch; with SHAPE_BUCKETS nor do images of different buckets"
    )
    SHAPE_BUCKETS: Literal["auto"] | Bool | tuple[tuple[PositiveInt, PositiveInt], ...] = own(
        "auto",
        "Training batches are padded to the smallest that fits of a few sizes, made from MIN_SIZE_TRAIN and "
        "MAX_SIZE_TRAIN, or these (height, width); False = to their largest image; auto = where STEP.GRAPH is on",
    )
    DEVICE_PREPROCESSING: Literal["auto"] | Bool = own(
        "auto", "Training images are resized, flipped and normalised by the device, not by workers; auto = on CUDA"
    )


class SolverConfig(Section):
    """Optimizer, schedule, and what is written when."""

    MAX_ITER: PositiveInt = key(40000, "Iterations")
    BASE_LR: NonNegative = key(0.001, "Learning rate after warm-up")
    BIAS_LR_FACTOR: NonNegative = key(2, "Factor on the learning rate of biases")
    MOMENTUM: Annotated[float, Field(strict=True, ge=0, lt=1)] = key(0.9, "Momentum of SGD")
    WEIGHT_DECAY: NonNegative = key(0.0005, "Weight decay")
    WEIGHT_DECAY_BIAS: NonNegative = key(0, "Weight decay of biases")
    GAMMA: Positive = key(0.1, "Factor on the learning rate at each of STEPS")
    STEPS: tuple[PositiveInt, ...] = key((30000,), "Iterations at which the learning rate drops")
    WARMUP_FACTOR: Fraction = key(1.0 / 3, "Share of the learning rate that warm-up starts from")
    WARMUP_ITERS: Count = key(500, "Iterations of warm-up")
    WARMUP_METHOD: Literal["linear", "constant"] = key("linear", "Shape of warm-up")
    CHECKPOINT_PERIOD: PositiveInt = key(2500, "Iterations from one checkpoint to the next")
    TEST_PERIOD: Count = key(0, "Iterations from one evaluation to the next; 0 = only at the end")
    IMS_PER_BATCH: PositiveInt = key(16, "Images per iteration over all processes together")
    SEED: Count = own(0, "Seed of the initial weights, the order of the data, augmentation and sampling")
    CLIP_GRADIENTS: NonNegative = own(0.0, "Largest norm of the gradient, over all parameters; 0 = no clipping")
    KEEP_CHECKPOINTS: Count = own(0, "How many of the latest checkpoints to keep; 0 = all")
    LOG_PERIOD: PositiveInt = own(20, "Iterations from one log line to the next")


class StepConfig(Section):
    """How a training step runs; docs/training-step.md. Nothing here changes what it computes."""

    GRAPH: Literal["auto"] | Bool = own(
        "auto", "Record the step for each shape of batches and replay it, as CUDA graphs; auto = on CUDA"
    )
    FUSED_OPTIMIZER: Literal["auto"] | Bool = own(
        "auto", "SGD in one launch over one buffer of all parameters, which GRAPH needs; auto = on CUDA, or with GRAPH"
    )
    MASK_SHARES: Annotated[tuple[Fraction, ...], Field(min_length=1)] = own(
        (0.25, 0.5, 0.75, 1.0),
        "With GRAPH the mask head runs on the smallest of these shares of the most positives that holds them all; "
        "increasing to 1, and 1 alone makes the step one graph",
    )


class BboxAugConfig(Section):
    """Test-time augmentation of boxes and masks."""

    ENABLED: Bool = key(False, "Evaluate each image several times, merge the boxes and average the masks")
    H_FLIP: Bool = key(False, "Add the flipped image")
    SCALES: tuple[PositiveInt, ...] = key((), "Shorter sides to add, pixels")
    MAX_SIZE: PositiveInt = key(4000, "Longer side at most, at SCALES")
    SCALE_H_FLIP: Bool = key(False, "Add the flipped image at each of SCALES")


class TestConfig(Section):
    """Evaluation."""

    EXPECTED_RESULTS: tuple[tuple[Name, Name, Float, NonNegative], ...] = key(
        (), "(task, metric, mean, standard deviation) to compare the results with"
    )
    EXPECTED_RESULTS_SIGMA_TOL: NonNegative = key(4, "Standard deviations that a result may be off")
    IMS_PER_BATCH: PositiveInt = key(8, "Images per batch in evaluation, over all processes together")
    DETECTIONS_PER_IMG: Count = key(100, "RetinaNet: most detections an image; 0 = no limit")
    VIS_IMAGES: Count = own(0, "Pictures with drawn detections to write at each evaluation")
    EVAL_BACKEND: Literal["pycocotools"] = own("pycocotools", "Who computes COCO's numbers")
    BBOX_AUG: BboxAugConfig = BboxAugConfig()

    @field_validator("EXPECTED_RESULTS", mode="before")
    @classmethod
    def _flatten_mean_and_deviation(cls, value: object) -> object:
        """maskrcnn-benchmark's checker unpacks (task, metric, (mean, std)), its documentation shows four in a row."""
        if not isinstance(value, (tuple, list)):
            return value
        return tuple(
            (*row[:2], *row[2])
            if isinstance(row, (tuple, list)) and len(row) == 3 and isinstance(row[2], tuple)
            else row
            for row in value
        )


class Config(Section):
    """The whole configuration. Made by :func:`fastrcnn.config.load_config`."""

    MODEL: ModelConfig = ModelConfig()
    INPUT: InputConfig = InputConfig()
    DATASETS: DatasetsConfig = DatasetsConfig()
    DATALOADER: DataloaderConfig = DataloaderConfig()
    SOLVER: SolverConfig = SolverConfig()
    STEP: StepConfig = StepConfig()
    TEST: TestConfig = TestConfig()
    OUTPUT_DIR: Name = key(".", "Where everything that a run writes goes")
    PATHS_CATALOG: Str = key("", "Upstream imports this Python file; we never run code that a config names")
    DTYPE: Literal["float32", "bfloat16", "float16"] = key("float32", "Precision of convolutions and matrix products")
    AMP_VERBOSE: Bool = key(False, "Verbosity of apex, which is not used")

    @model_validator(mode="after")
    def _keys_fit_together(self) -> Config:
        check_config(self)
        return self
