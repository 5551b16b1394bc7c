"""The recorded step on the twin of a CUDA graph: what it computes, when it is recorded, and when not."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastrcnn.engine.graph import OperatorRecorder, _KeepAlive
from fastrcnn.engine.solver import WarmupMultiStepLR, make_optimizer
from fastrcnn.engine.step import TrainStep
from fastrcnn.structures import BoxList, ImageList, Targets
from tests.engine.standin import Batch, Rig, assert_same, make_batch, make_rig, weights
from tests.kernels.nosync import forbid_host_sync
from tests.models.inputs import random_batch, small_keypoint_rcnn, small_model, small_retinanet, with_keypoints

NEVER = 1_000_000


@pytest.fixture(autouse=True)
def captured_log(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    logging.getLogger("fastrcnn").propagate = True
    with caplog.at_level(logging.INFO, "fastrcnn"):
        yield


def run(rig: Rig, steps: range, **batch: Any) -> list[dict[str, float]]:
    return [{k: v.item() for k, v in rig.step(make_batch(step, **batch), step).items()} for step in steps]


def recorded(rig: Rig) -> int:
    return rig.step._graphed.recorded if rig.step._graphed else 0


@pytest.mark.parametrize("clip_gradients", [0.0, 0.1], ids=["", "clipped"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_replays_are_the_steps_themselves(tmp_path: Path, dtype: str, clip_gradients: float) -> None:
    """Ten steps with other batches, learning rates and random choices: the same bits."""
    settings: dict[str, Any] = {"dtype": dtype, "clip_gradients": clip_gradients, "fused": True, "graph": True}
    plain, replayed = make_rig(tmp_path, **settings, warm_up=NEVER), make_rig(tmp_path, **settings)
    assert run(plain, range(10)) == run(replayed, range(10))
    assert_same(weights(plain), weights(replayed))
    assert (recorded(plain), recorded(replayed)) == (0, 1)
    rates = [rig.step.optimizer.param_groups[0]["lr"] for rig in (plain, replayed)]
    assert rates[0] == rates[1] == pytest.approx(0.002)


def test_an_overflow_is_skipped_in_replays_too(tmp_path: Path) -> None:
    rigs = [make_rig(tmp_path, dtype="float16", fused=True, graph=True, warm_up=n) for n in (NEVER, 3)]
    for rig in rigs:
        rig.step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    run(rigs[0], range(30))
    run(rigs[1], range(30))
    scales = [rig.step.scaler.get_scale() for rig in rigs]
    assert scales[0] == scales[1] < 2.0**38, "several steps overflowed, also after the recording"
    assert_same(weights(rigs[0]), weights(rigs[1]))


def test_losses_outlive_the_next_step(tmp_path: Path) -> None:
    rig = make_rig(tmp_path, fused=True, graph=True, warm_up=0)
    losses = [rig.step(make_batch(step), step) for step in range(4)]
    assert len({one["loss"].item() for one in losses}) == 4


class Forgetful(nn.Module):
    """A model with a number of the host in its loss, as no recorded step may have it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.step = 0

    def set_sampling(self, seed: int, step: int) -> None:
        self.inner.set_sampling(seed, step)  # type: ignore[operator]
        self.step = step

    def forward(self, images: ImageList, targets: Any) -> dict[str, Tensor]:
        return {name: loss * (1.0 + self.step) for name, loss in self.inner(images, targets).items()}


def test_the_twin_finds_a_number_of_the_host(tmp_path: Path) -> None:
    """What a CUDA graph would freeze shows as wrong losses from the first replay on."""
    rigs = [make_rig(tmp_path, fused=True, graph=True, warm_up=n) for n in (NEVER, 2)]
    for rig in rigs:
        rig.step.model = Forgetful(rig.step.model)
    right, wrong = run(rigs[0], range(5)), run(rigs[1], range(5))
    assert right[:3] == wrong[:3]
    assert right[3] != wrong[3]


def test_image_sizes_of_the_host_are_out_of_reach(tmp_path: Path) -> None:
    rig = make_rig(tmp_path, fused=True, graph=True)
    inner = rig.step.model.forward

    def peeking(images: ImageList, targets: Any) -> dict[str, Tensor]:
        assert images.image_sizes
        return inner(images, targets)

    rig.step.model.forward = peeking
    with pytest.raises(RuntimeError, match="a step has to use sizes"):
        rig.step(make_batch(0), 0)


def test_what_a_graph_reads_stays_alive() -> None:
    """The part of CudaRecorder that runs without CUDA: it holds what was there before, and what others cached."""
    group: set[int] = set()
    table, cached = torch.ones(3), torch.ones(5)
    with _KeepAlive(group) as first:
        made = table * 2
    with _KeepAlive(group) as second:
        _ = made + cached[:3].exp()
    assert list(first.storages) == [table.data_ptr()]
    assert list(second.storages) == [cached.data_ptr()], "what the group made is not held"
    with _KeepAlive(set()) as other:
        _ = made + 1
    assert list(other.storages) == [made.data_ptr()]


# --- when it is recorded ---------------------------------------------------------------------------------------------


def test_each_shape_is_warmed_up_and_recorded(tmp_path: Path) -> None:
    rig = make_rig(tmp_path, fused=True, graph=True, warm_up=2)
    counts = []
    for step in range(8):
        rig.step(make_batch(step, size=2 + step % 2), step)
        counts.append(recorded(rig))
    assert counts == [0, 0, 0, 0, 1, 2, 2, 2]


def test_no_more_shapes_than_allowed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain, limited = (make_rig(tmp_path, fused=True, graph=True, max_shapes=n, warm_up=1) for n in (9, 1))
    for rig in (plain, limited):
        for step in range(9):
            rig.step(make_batch(step, size=2 + step % 3), step)
    assert (recorded(plain), recorded(limited)) == (3, 1)
    assert_same(weights(plain), weights(limited))
    assert [r.message for r in caplog.records].count("More than 1 shapes of batches: the others are not recorded") == 1


def test_recorded_anew_after_a_change(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain, rig = (make_rig(tmp_path, fused=True, graph=True, warm_up=n) for n in (NEVER, 1))
    run(plain, range(9))
    run(rig, range(3))
    rig.step.model.eval()
    rig.step.model.train()
    run(rig, range(3, 5))
    assert recorded(rig) == 1, "an evaluation in between changes nothing"
    rig.step.model.norm.bias = nn.Parameter(rig.step.model.norm.bias.detach().clone())
    rig.step.optimizer.param_groups[0]["params"][1] = rig.step.model.norm.bias
    rig.step.model.norm.train(False)
    rig.step(make_batch(5), 5)
    assert recorded(rig) == 0
    assert "the step is recorded anew" in caplog.text


def test_resume_is_exact(tmp_path: Path) -> None:
    """The state of a resumed run goes into the memory that the recordings use."""
    settings: dict[str, Any] = {"fused": True, "graph": True, "warm_up": 1}
    whole, part, resumed = (make_rig(tmp_path, **settings) for _ in range(3))
    expected = run(whole, range(9))
    run(part, range(5))
    part.checkpointer.save(5)
    run(resumed, range(3))  # recorded before the state comes
    resumed.checkpointer.load_for_resume()
    assert recorded(resumed) == 1
    assert run(resumed, range(5, 9)) == expected[5:]
    assert_same(weights(whole), weights(resumed))
    assert recorded(resumed) == 1


@pytest.mark.parametrize("fused", [(True, False), (False, True), (True, True)], ids=str)
def test_resume_with_the_other_optimizer(tmp_path: Path, fused: tuple[bool, bool]) -> None:
    whole = make_rig(tmp_path / "whole")
    part, resumed = (make_rig(tmp_path / "part", fused=one) for one in fused)
    run(whole, range(6))
    run(part, range(4))
    part.checkpointer.save(4)
    resumed.checkpointer.load_for_resume()
    run(resumed, range(4, 6))
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(resumed)[name], value, rtol=1e-5, atol=1e-7)


# --- when it is not --------------------------------------------------------------------------------------------------


def test_what_cannot_be_recorded_runs_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain, unfused = make_rig(tmp_path), make_rig(tmp_path, graph=True)
    assert run(plain, range(3)) == run(unfused, range(3))
    said = [r.message for r in caplog.records if "operator by operator" in r.message]
    assert len(said) == 1
    assert "set STEP.FUSED_OPTIMIZER True" in said[0]


class Refusing(OperatorRecorder):
    def record(self, function: Callable[[], Any], group: set[int]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")


def test_a_recorder_that_fails(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = make_rig(tmp_path, fused=True)
    failing = make_rig(tmp_path, fused=True, graph=True, recorder=Refusing())
    assert run(plain, range(6)) == run(failing, range(6))
    assert caplog.text.count("cannot be recorded (operation not permitted when stream is capturing)") == 1


# --- the detectors ---------------------------------------------------------------------------------------------------

STATIC = ("MODEL.ROI_MASK_HEAD.POSITIVES_ONLY", "False")
FAMILIES = [
    pytest.param(lambda: small_model(*STATIC), id="mask-rcnn"),
    pytest.param(lambda: small_model(*STATIC, "MODEL.CONVENTION", "torchvision"), id="torchvision"),
    pytest.param(lambda: small_model(config_file="rpn_R_50_FPN_1x.yaml"), id="rpn"),
    pytest.param(small_retinanet, id="retinanet"),
    pytest.param(lambda: small_keypoint_rcnn("MODEL.ROI_KEYPOINT_HEAD.POSITIVES_ONLY", "False"), id="keypoint-rcnn"),
]
COUNTS = [[3, 1], [0, 0], [1, 0], [16, 5], [0, 1], [2, 2], [16, 16], [0, 0]]


def detector_step(model: nn.Module, warm_up: int, dtype: str = "float32", **settings: Any) -> TrainStep:
    optimizer = make_optimizer(model, base_lr=0.002, momentum=0.9, weight_decay=1e-4, fused=True)
    scheduler = WarmupMultiStepLR(optimizer, milestones=(5,), warmup_iters=4)
    arguments = {"device": torch.device("cpu"), "clip_gradients": 10.0, "graph": True, **settings}
    return TrainStep(model, optimizer, scheduler, dtype=dtype, warm_up=warm_up, **arguments)


def detector_batch(step: int, keypoints: bool) -> Batch:
    sizes = [(128 - 8 * (step % 3), 64), (80, 90)]  # of one padded size
    images, targets = random_batch(COUNTS[step % len(COUNTS)], sizes, seed=step)
    filled: list[BoxList] = with_keypoints(targets, seed=step) if keypoints else targets
    return Batch(ImageList(images.tensors, images.image_sizes, torch.tensor([2 * step, 2 * step + 1])), filled)


@pytest.mark.parametrize("make", FAMILIES)
def test_a_detector_is_replayed_exactly(make: Callable[[], nn.Module]) -> None:
    """Ten steps with 0, 1 and many ground truths, other image sizes and learning rates: the same bits."""
    plain, replayed = detector_step(make(), NEVER), detector_step(make(), 1)
    keypoints = "keypoint" in getattr(plain.model, "roi_heads", {})
    for step in range(10):
        batch = detector_batch(step, keypoints)
        expected, actual = plain(batch, step), replayed(batch, step)
        assert {k: v.item() for k, v in actual.items()} == {k: v.item() for k, v in expected.items()}, step
    assert_same(dict(plain.model.state_dict()), dict(replayed.model.state_dict()))
    assert replayed._graphed is not None
    assert replayed._graphed.recorded == 1, "one shape for all"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("make", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cuda_graph_is_the_steps_themselves(make: Callable[[], nn.Module], dtype: str) -> None:
    """As above on the card, with the graphs of the mask head's capacities."""
    plain, replayed = (
        detector_step(make().cuda(), n, dtype, device=torch.device("cuda"), mask_shares=SHARES) for n in (NEVER, 1)
    )
    keypoints = "keypoint" in getattr(plain.model, "roi_heads", {})
    for step in range(10):
        batch = detector_batch(step, keypoints)
        expected, actual = plain(batch, step), replayed(batch, step)
        assert {k: v.item() for k, v in actual.items()} == {k: v.item() for k, v in expected.items()}, step
    assert_same(dict(plain.model.state_dict()), dict(replayed.model.state_dict()))
    assert replayed._graphed is not None
    assert replayed._graphed.broken is None
    assert replayed._graphed.recorded >= 1


@pytest.mark.parametrize("make", FAMILIES)
def test_nothing_is_read_and_nothing_comes_from_the_host(make: Callable[[], nn.Module]) -> None:
    """No CUDA graph can hold a copy from the host, not even of a constant."""
    step = detector_step(make(), NEVER)
    batch = detector_batch(0, "keypoint" in getattr(step.model, "roi_heads", {}))
    step(batch, 0)
    assert step._graphed is not None
    (shape,) = step._graphed.shapes.values()
    with forbid_host_sync(allow_constants=False):
        step.whole(shape.inputs.value)


SHARES = (0.25, 0.5, 0.75, 1.0)


def eager(model: nn.Module) -> None:
    """Make proposals differ, and many fit a ground truth, so that positives are many and of varying number."""
    with torch.no_grad():
        model.rpn.head.bbox_pred.weight.mul_(20)  # type: ignore[union-attr, operator]
        model.rpn.head.cls_logits.weight.mul_(50)  # type: ignore[union-attr, operator]
    model.roi_heads["box"].fg_iou_threshold = 0.2  # type: ignore[index, union-attr]
    model.roi_heads["box"].bg_iou_threshold = 0.2  # type: ignore[index, union-attr]


@pytest.mark.parametrize("counts", [[16, 5], [1, 0], [0, 0]], ids=str)
def test_a_capacity_loses_nothing(counts: list[int]) -> None:
    """float64: loss and gradients on every capacity that holds the positives, down to none to spare."""
    model = small_model(*STATIC).double()
    eager(model)
    images, targets = random_batch(counts, [(128, 64), (80, 90)], seed=3, dtype=torch.float64)
    state = model.begin_train(images, Targets.from_boxlists(targets))
    model.box_train(state)
    number = int((state.sampled.positive_labels >= 0).sum())
    assert (number > 0) == (sum(counts) > 0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    results = []
    for capacity in (None, 32, max(1, number), 31):
        losses = model.finish_train(state, capacity)
        results.append((losses, torch.autograd.grad(sum(losses.values()), parameters, retain_graph=True)))
    for losses, gradients in results[1:]:
        for name, loss in results[0][0].items():
            torch.testing.assert_close(losses[name], loss, rtol=1e-12, atol=1e-12)
        for gradient, expected in zip(gradients, results[0][1], strict=True):
            torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


def test_the_mask_head_runs_on_the_smallest_capacity_that_fits() -> None:
    models = [small_model(*STATIC) for _ in range(2)]
    for model in models:
        eager(model)
    plain = detector_step(models[0], NEVER, mask_shares=SHARES)
    replayed = detector_step(models[1], 1, mask_shares=SHARES)
    slots: list[int] = []
    positives: list[int] = []
    models[0].roi_heads["mask"].feature_extractor.register_forward_pre_hook(lambda _, args: slots.append(len(args[1])))
    sample = models[0].roi_heads["box"].sample

    def counted(*args: Any) -> Any:
        sampled = sample(*args)
        positives.append(int(sampled.num_positive.sum()))
        return sampled

    models[0].roi_heads["box"].sample = counted
    for step in range(16):
        batch = detector_batch(step % 4 if step > 8 else step, keypoints=False)
        expected, actual = plain(batch, step), replayed(batch, step)
        assert {k: v.item() for k, v in actual.items()} == {k: v.item() for k, v in expected.items()}, step
    assert_same(dict(plain.model.state_dict()), dict(replayed.model.state_dict()))
    assert len(positives) == len(slots) == 16
    for number, room in zip(positives, slots, strict=True):
        assert room == next(capacity for capacity in (8, 16, 24, 32) if capacity >= number)
    assert len(set(slots)) >= 3, "several capacities occurred"
    assert replayed._graphed is not None
    (shape,) = replayed._graphed.shapes.values()
    assert shape.recording is not None
    assert list(shape.recording.finish) == [8, 16, 24, 32]


class FailingLate(OperatorRecorder):
    """Refuses the third recording: the first part of the step has run by then."""

    def __init__(self) -> None:
        self.recordings = 0

    def record(self, function: Callable[[], Any], group: set[int]) -> Any:
        self.recordings += 1
        if self.recordings == 3:
            raise RuntimeError("out of memory")
        return super().record(function, group)


def test_a_recording_that_fails_half_way_leaves_the_step_exact() -> None:
    plain = detector_step(small_model(*STATIC), NEVER, mask_shares=SHARES)
    failing = detector_step(small_model(*STATIC), 1, mask_shares=SHARES, recorder=FailingLate())
    for step in range(4):
        batch = detector_batch(step, keypoints=False)
        expected, actual = plain(batch, step), failing(batch, step)
        assert {k: v.item() for k, v in actual.items()} == {k: v.item() for k, v in expected.items()}, step
    assert failing._graphed is not None
    assert failing._graphed.broken == "out of memory"


def test_recording_and_rehearsing_change_nothing() -> None:
    step = detector_step(small_model(*STATIC), 1, mask_shares=SHARES)
    step(detector_batch(0, keypoints=False), 0)
    assert step._graphed is not None
    (shape,) = step._graphed.shapes.values()
    before = {name: value.clone() for name, value in step.model.state_dict().items()}
    state = step.begin(shape.inputs.value)
    step.middle(state)
    for capacity in step.capacities(state):
        step.rehearse(state, capacity)
        OperatorRecorder().record(partial(step.finish, state, capacity, again=True), set())
    assert_same(before, dict(step.model.state_dict()))


@pytest.mark.parametrize("shares", [(), (0.5,), (0.5, 0.5, 1.0), (0.0, 1.0)])
def test_shares_that_would_lose_positives(tmp_path: Path, shares: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="must increase from more than 0 to 1"):
        make_rig(tmp_path, mask_shares=shares)
