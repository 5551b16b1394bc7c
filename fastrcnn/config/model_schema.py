"""The part of the schema under MODEL: every key of the detector; see :mod:`fastrcnn.config.schema`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from fastrcnn.config.fields import (
    Bool,
    Count,
    Float,
    Fraction,
    Ints,
    Name,
    NonNegative,
    Positive,
    PositiveInt,
    Positives,
    Section,
    Str,
    key,
    own,
)

Blocks = tuple[Any, ...]

C4Body = Literal["R-50-C4", "R-50-C5", "R-101-C4", "R-101-C5"]
FpnBody = Literal["R-18-FPN", "R-34-FPN", "R-50-FPN", "R-101-FPN", "R-152-FPN"]
ConvBody = Literal[C4Body, FpnBody, "R-50-FPN-RETINANET", "R-101-FPN-RETINANET", "FBNet"]
TransFunc = Literal[
    "BottleneckWithFixedBatchNorm", "BottleneckWithGN", "BasicBlockWithFixedBatchNorm", "BasicBlockWithGN"
]
StemFunc = Literal["StemWithFixedBatchNorm", "StemWithGN"]
BoxExtractor = Literal[
    "ResNet50Conv5ROIFeatureExtractor", "FPN2MLPFeatureExtractor", "FPNXconv1fcFeatureExtractor", "FBNet.roi_head"
]
MaskExtractor = Literal["ResNet50Conv5ROIFeatureExtractor", "MaskRCNNFPNFeatureExtractor", "FBNet.roi_head_mask"]
KeypointExtractor = Literal["KeypointRCNNFeatureExtractor", "FBNet.roi_head_keypoints"]


class BackboneConfig(Section):
    """Which backbone."""

    CONV_BODY: ConvBody = key("R-50-C4", "Backbone; R-18-FPN and R-34-FPN are ours and need a BasicBlock TRANS_FUNC")
    FREEZE_CONV_BODY_AT: Annotated[int, Field(strict=True, ge=-1, le=5)] = key(
        2, "Freeze this many parts of the backbone, the stem being the first; 0 trains everything"
    )
    FROZEN_BN_EPSILON: NonNegative = own(
        0.0, "Added to the variance by frozen batch normalisation; torchvision's COCO_V1 weights want 0"
    )


class FpnConfig(Section):
    """Feature pyramid."""

    USE_GN: Bool = key(False, "Group normalisation after each convolution of the pyramid")
    USE_RELU: Bool = key(False, "ReLU after each convolution of the pyramid")


class GroupNormConfig(Section):
    """Group normalisation; exactly one of DIM_PER_GP and NUM_GROUPS is used, the other is -1."""

    DIM_PER_GP: Annotated[int, Field(strict=True, ge=-1)] = key(-1, "Channels per group, or -1 to use NUM_GROUPS")
    NUM_GROUPS: Annotated[int, Field(strict=True, ge=-1)] = key(32, "Number of groups, or -1 to use DIM_PER_GP")
    EPSILON: Positive = key(1e-5, "Added to the variance")


class RpnConfig(Section):
    """Region proposal network."""

    USE_FPN: Bool = key(False, "The backbone gives a feature pyramid: one anchor size a level")
    ANCHOR_SIZES: Ints = key((32, 64, 128, 256, 512), "Side of the anchors in pixels; with USE_FPN one a level")
    ANCHOR_STRIDE: Ints = key((16,), "Stride of each feature level in pixels; with USE_FPN one a level")
    ASPECT_RATIOS: Positives = key((0.5, 1.0, 2.0), "Height / width of the anchors")
    STRADDLE_THRESH: Float = key(
        0, "Anchors that leave the image by more than this many pixels are not trained; -1 trains them all"
    )
    FG_IOU_THRESHOLD: Fraction = key(0.7, "An anchor is positive from this IoU on")
    BG_IOU_THRESHOLD: Fraction = key(0.3, "An anchor is negative below this IoU; between the two it is ignored")
    BATCH_SIZE_PER_IMAGE: PositiveInt = key(256, "Anchors sampled per image for the loss")
    POSITIVE_FRACTION: Fraction = key(0.5, "Largest share of positives among the sampled anchors")
    PRE_NMS_TOP_N_TRAIN: PositiveInt = key(12000, "Best anchors kept before NMS in training; with FPN per level")
    PRE_NMS_TOP_N_TEST: PositiveInt = key(6000, "Best anchors kept before NMS in evaluation; with FPN per level")
    POST_NMS_TOP_N_TRAIN: PositiveInt = key(2000, "Proposals kept after NMS in training; with FPN per level")
    POST_NMS_TOP_N_TEST: PositiveInt = key(1000, "Proposals kept after NMS in evaluation; with FPN per level")
    NMS_THRESH: Fraction = key(0.7, "IoU above which NMS drops the lower-scored proposal")
    MIN_SIZE: NonNegative = key(0, "Proposals with a smaller side (pixels of the network input) are dropped")
    FPN_POST_NMS_TOP_N_TRAIN: PositiveInt = key(2000, "Proposals kept over all levels in training")
    FPN_POST_NMS_TOP_N_TEST: PositiveInt = key(2000, "Proposals kept over all levels of an image in evaluation")
    FPN_POST_NMS_PER_BATCH: Bool = key(
        True, "FPN_POST_NMS_TOP_N_TRAIN counts over the images of one process together, not per image"
    )
    RPN_HEAD: Literal["SingleConvRPNHead", "FBNet.rpn_head"] = key("SingleConvRPNHead", "Head of the network")
    SPARSE_BACKWARD: Bool = own(
        True,
        "Gradient of the losses through SingleConvRPNHead at the sampled anchors alone: exact, a tenth of the work",
    )


class RoiHeadsConfig(Section):
    """Matching, sampling and detections of the second stage."""

    USE_FPN: Bool = key(False, "Proposals are pooled from the pyramid level that fits their size")
    FG_IOU_THRESHOLD: Fraction = key(0.5, "A proposal is positive from this IoU on")
    BG_IOU_THRESHOLD: Fraction = key(0.5, "A proposal is negative below this IoU; between the two it is ignored")
    BBOX_REG_WEIGHTS: tuple[Positive, Positive, Positive, Positive] = key(
        (10.0, 10.0, 5.0, 5.0), "Weights (x, y, w, h) of the box encoding"
    )
    BATCH_SIZE_PER_IMAGE: PositiveInt = key(512, "Proposals sampled per image for the losses")
    POSITIVE_FRACTION: Fraction = key(0.25, "Largest share of positives among the sampled proposals")
    SCORE_THRESH: Fraction = key(0.05, "Detections must score more than this")
    NMS: Fraction = key(0.5, "IoU above which the NMS of each class drops the lower-scored detection")
    DETECTIONS_PER_IMG: Count = key(100, "Most detections an image; 0 = no limit")


class RoiBoxHeadConfig(Section):
    """Box head."""

    FEATURE_EXTRACTOR: BoxExtractor = key("ResNet50Conv5ROIFeatureExtractor", "Layers between pooling and prediction")
    PREDICTOR: Literal["FastRCNNPredictor", "FPNPredictor"] = key("FastRCNNPredictor", "Class and box layers")
    POOLER_RESOLUTION: PositiveInt = key(14, "Side of the pooled feature")
    POOLER_SAMPLING_RATIO: Count = key(0, "Samples per bin and axis of RoIAlign; 0 = as many as the bin has cells")
    POOLER_SCALES: Positives = key((0.0625,), "Scale (1 / stride) of each level that is pooled from")
    NUM_CLASSES: Annotated[int, Field(strict=True, ge=2)] = key(81, "Number of classes, background (0) included")
    MLP_HEAD_DIM: PositiveInt = key(1024, "Width of the fully connected layers")
    USE_GN: Bool = key(False, "Group normalisation in the feature extractor")
    DILATION: PositiveInt = key(1, "Dilation of the convolutions of the feature extractor")
    CONV_HEAD_DIM: PositiveInt = key(256, "Width of the convolutions of FPNXconv1fcFeatureExtractor")
    NUM_STACKED_CONVS: PositiveInt = key(4, "Number of convolutions of FPNXconv1fcFeatureExtractor")


class RoiMaskHeadConfig(Section):
    """Mask head."""

    FEATURE_EXTRACTOR: MaskExtractor = key("ResNet50Conv5ROIFeatureExtractor", "Layers between pooling and prediction")
    PREDICTOR: Literal["MaskRCNNC4Predictor", "MaskRCNNConv1x1Predictor"] = key(
        "MaskRCNNC4Predictor", "Mask layers: the first doubles the resolution, the second keeps it"
    )
    POOLER_RESOLUTION: PositiveInt = key(14, "Side of the pooled feature")
    POOLER_SAMPLING_RATIO: Count = key(0, "Samples per bin and axis of RoIAlign; 0 = as many as the bin has cells")
    POOLER_SCALES: Positives = key((0.0625,), "Scale (1 / stride) of each level that is pooled from")
    MLP_HEAD_DIM: PositiveInt = key(1024, "Nothing reads it, upstream neither")
    CONV_LAYERS: Ints = key((256, 256, 256, 256), "Widths of the convolutions of MaskRCNNFPNFeatureExtractor")
    RESOLUTION: PositiveInt = key(14, "Side of the predicted mask, which is also that of its target")
    SHARE_BOX_FEATURE_EXTRACTOR: Bool = key(True, "Use the features of the box head (C4 models; FPN models: False)")
    POSTPROCESS_MASKS: Bool = key(False, "Paste the masks into the image inside the model")
    POSTPROCESS_MASKS_THRESHOLD: Fraction = key(0.5, "Probability above which a pasted pixel belongs to the mask")
    DILATION: PositiveInt = key(1, "Dilation of the convolutions of the feature extractor")
    USE_GN: Bool = key(False, "Group normalisation in the feature extractor")
    POSITIVES_ONLY: Literal["auto"] | Bool = own(
        "auto", "Run the mask head on the real positives only, not on the padded number; auto = on the CPU"
    )


class RoiKeypointHeadConfig(Section):
    """Keypoint head."""

    FEATURE_EXTRACTOR: KeypointExtractor = key("KeypointRCNNFeatureExtractor", "Layers between pooling and prediction")
    PREDICTOR: Literal["KeypointRCNNPredictor"] = key("KeypointRCNNPredictor", "Heat map layers")
    POOLER_RESOLUTION: PositiveInt = key(14, "Side of the pooled feature")
    POOLER_SAMPLING_RATIO: Count = key(0, "Samples per bin and axis of RoIAlign; 0 = as many as the bin has cells")
    POOLER_SCALES: Positives = key((0.0625,), "Scale (1 / stride) of each level that is pooled from")
    MLP_HEAD_DIM: PositiveInt = key(1024, "Nothing reads it, upstream neither")
    CONV_LAYERS: Ints = key((512,) * 8, "Widths of the convolutions of the feature extractor")
    RESOLUTION: PositiveInt = key(14, "Side of the predicted heat map: 4 times POOLER_RESOLUTION")
    NUM_CLASSES: PositiveInt = key(17, "Number of keypoints of an object")
    SHARE_BOX_FEATURE_EXTRACTOR: Bool = key(True, "Use the features of the box head (FPN models: False)")
    POSITIVES_ONLY: Literal["auto"] | Bool = own(
        "auto", "Run the head on the regions that have keypoints only, not on the padded number; auto = on the CPU"
    )


class ResnetsConfig(Section):
    """ResNet and ResNeXt."""

    NUM_GROUPS: PositiveInt = key(1, "Groups of the 3x3 convolutions: 1 = ResNet, 32 = ResNeXt")
    WIDTH_PER_GROUP: PositiveInt = key(64, "Channels of each group in the first stage")
    STRIDE_IN_1X1: Bool = key(True, "The stride sits in the first 1x1 convolution (MSRA weights), else in the 3x3")
    TRANS_FUNC: TransFunc = key("BottleneckWithFixedBatchNorm", "Residual block; the BasicBlock ones are ours")
    STEM_FUNC: StemFunc = key("StemWithFixedBatchNorm", "First convolution and its normalisation")
    RES5_DILATION: Literal[1, 2] = key(
        1, "Dilation of the fifth stage, in a C4 head or a C5 body; 2 in the place of its stride"
    )
    BACKBONE_OUT_CHANNELS: PositiveInt = key(1024, "Channels that the backbone hands on: 1024 for C4, 256 for FPN")
    RES2_OUT_CHANNELS: PositiveInt = key(
        256, "Output channels of the first stage of bottlenecks; doubles with each stage"
    )
    STEM_OUT_CHANNELS: PositiveInt = key(64, "Channels of the stem")
    STAGE_WITH_DCN: tuple[Bool, Bool, Bool, Bool] = key(
        (False, False, False, False), "Deformable convolutions in stages 2 to 5"
    )
    WITH_MODULATED_DCN: Bool = key(False, "Deformable convolutions have modulation masks (v2)")
    DEFORMABLE_GROUPS: PositiveInt = key(1, "Offset groups of the deformable convolutions")


class RetinanetConfig(Section):
    """RetinaNet."""

    NUM_CLASSES: Annotated[int, Field(strict=True, ge=2)] = key(81, "Number of classes, background included")
    ANCHOR_SIZES: Ints = key((32, 64, 128, 256, 512), "Side of the anchors in pixels, one a level")
    ASPECT_RATIOS: Positives = key((0.5, 1.0, 2.0), "Height / width of the anchors")
    ANCHOR_STRIDES: Ints = key((8, 16, 32, 64, 128), "Stride of each feature level in pixels")
    STRADDLE_THRESH: Float = key(0, "Nothing reads it, upstream neither: every anchor is trained")
    OCTAVE: Positive = key(2.0, "Scale factor from one level to the next")
    SCALES_PER_OCTAVE: PositiveInt = key(3, "Anchor scales a level")
    USE_C5: Bool = key(True, "P6 is made from C5, else from P5")
    NUM_CONVS: Count = key(4, "Convolutions in each tower")
    BBOX_REG_WEIGHT: Positive = key(4.0, "Divides the box loss")
    BBOX_REG_BETA: NonNegative = key(0.11, "Where smooth L1 turns from quadratic to linear")
    PRE_NMS_TOP_N: PositiveInt = key(1000, "Best candidates kept per level before NMS")
    FG_IOU_THRESHOLD: Fraction = key(0.5, "An anchor is positive from this IoU on")
    BG_IOU_THRESHOLD: Fraction = key(0.4, "An anchor is negative below this IoU; between the two it is ignored")
    LOSS_ALPHA: Fraction = key(0.25, "Focal loss: weight of the positives")
    LOSS_GAMMA: NonNegative = key(2.0, "Focal loss: exponent")
    PRIOR_PROB: Annotated[float, Field(strict=True, gt=0, lt=1)] = key(
        0.01, "Probability of an object that the class layer starts from"
    )
    INFERENCE_TH: Fraction = key(0.05, "Candidates must score more than this")
    NMS_TH: Fraction = key(0.4, "IoU above which the NMS of each class drops the lower-scored detection")


class FbnetConfig(Section):
    """FBNet backbones and heads."""

    ARCH: Name = key(
        "default",
        "Architecture: default, xirb16d_dsmask, mobilenet_v2, cham_v1a, cham_v2, or the name of the one in ARCH_DEF",
    )
    ARCH_DEF: Str = key("", "Architecture as JSON; empty = the one that ARCH names")
    BN_TYPE: Name = key("bn", "Normalisation: bn (trained), gn (group) or af (frozen)")
    SCALE_FACTOR: Positive = key(1.0, "Factor on all widths")
    WIDTH_DIVISOR: PositiveInt = key(1, "Widths are multiples of this")
    DW_CONV_SKIP_BN: Bool = key(True, "No normalisation after depthwise convolutions")
    DW_CONV_SKIP_RELU: Bool = key(True, "No ReLU after depthwise convolutions")
    DET_HEAD_LAST_SCALE: Float = key(
        1.0, "Box head: factor on the width of the last layer, or, below 0, on the width before it; 0 leaves it out"
    )
    DET_HEAD_BLOCKS: Blocks = key((), "Box head: indices, in their stage, of the blocks to use; empty = all")
    DET_HEAD_STRIDE: Count = key(0, "Box head: stride of the first block; 0 = that of the architecture")
    KPTS_HEAD_LAST_SCALE: Float = key(
        0.0,
        "Keypoint head: factor on the width of the last layer, or, below 0, on the width before it; 0 leaves it out",
    )
    KPTS_HEAD_BLOCKS: Blocks = key((), "Keypoint head: indices, in their stage, of the blocks to use; empty = all")
    KPTS_HEAD_STRIDE: Count = key(0, "Keypoint head: stride of the first block; 0 = that of the architecture")
    MASK_HEAD_LAST_SCALE: Float = key(
        0.0, "Mask head: factor on the width of the last layer, or, below 0, on the width before it; 0 leaves it out"
    )
    MASK_HEAD_BLOCKS: Blocks = key((), "Mask head: indices, in their stage, of the blocks to use; empty = all")
    MASK_HEAD_STRIDE: Count = key(0, "Mask head: stride of the first block; 0 = that of the architecture")
    RPN_HEAD_BLOCKS: Count = key(0, "RPN head: how many of the last blocks to use; 0 = all")
    RPN_BN_TYPE: Str = key("", "RPN head: normalisation; empty = BN_TYPE")


class ModelConfig(Section):
    """The detector."""

    RPN_ONLY: Bool = key(False, "Train proposals only, without the second stage")
    MASK_ON: Bool = key(False, "Mask R-CNN: add the mask head")
    RETINANET_ON: Bool = key(False, "RetinaNet in the place of RPN and heads")
    KEYPOINT_ON: Bool = key(False, "Keypoint R-CNN: add the keypoint head")
    DEVICE: Annotated[str, Field(strict=True, pattern=r"^(cpu|cuda(:\d+)?)$")] = key(
        "cuda", "cuda, cuda:N or cpu; without a CUDA device the commands stop and ask for MODEL.DEVICE cpu"
    )
    META_ARCHITECTURE: Literal["GeneralizedRCNN"] = key("GeneralizedRCNN", "The only one there is")
    CLS_AGNOSTIC_BBOX_REG: Bool = key(False, "One box regression for all classes")
    WEIGHT: Str = key("", "Weights to start from: a file, a URL or catalog://NAME; empty = random")
    CONVENTION: Literal["maskrcnn_benchmark", "detectron2", "torchvision"] = own(
        "maskrcnn_benchmark",
        "Whose numeric choices the model follows; also gives defaults of other keys (docs/conventions.md)",
    )
    CHANNELS_LAST: Bool = own(True, "Keep feature maps in NHWC memory order")
    FUSED_CONVOLUTIONS: Bool = own(True, "Run convolutions together with frozen norm, bias, residual and ReLU")
    BACKBONE: BackboneConfig = BackboneConfig()
    FPN: FpnConfig = FpnConfig()
    GROUP_NORM: GroupNormConfig = GroupNormConfig()
    RPN: RpnConfig = RpnConfig()
    ROI_HEADS: RoiHeadsConfig = RoiHeadsConfig()
    ROI_BOX_HEAD: RoiBoxHeadConfig = RoiBoxHeadConfig()
    ROI_MASK_HEAD: RoiMaskHeadConfig = RoiMaskHeadConfig()
    ROI_KEYPOINT_HEAD: RoiKeypointHeadConfig = RoiKeypointHeadConfig()
    RESNETS: ResnetsConfig = ResnetsConfig()
    RETINANET: RetinanetConfig = RetinanetConfig()
    FBNET: FbnetConfig = FbnetConfig()
