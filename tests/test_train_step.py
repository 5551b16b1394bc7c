"""``python -m benchmarks.train_step`` on a small model: calibration, counters, ablation, tables, exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.train_step import ablation, batches, calibrate, measure, tables
from benchmarks.train_step.__main__ import groups, main, run
from benchmarks.train_step.ours import Ours
from benchmarks.train_step.profile import kind_of, measure_profile, table_rows
from benchmarks.train_step.run import Options, add_utilisation, config, make_batches, measure_group
from benchmarks.train_step.sides import known_key
from fastrcnn_kernels import box_iou

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "demo_shapes.yaml"
CPU = torch.device("cpu")


def options(**changes: Any) -> Options:
    small = {"size": (96, 64), "boxes": 3, "positives": 10, "seconds": 0.0, "rounds": 1, "warmup": 1}
    narrow = (
        "MODEL.ROI_BOX_HEAD.MLP_HEAD_DIM", "16", "MODEL.ROI_MASK_HEAD.CONV_LAYERS", "(8,)",
        "MODEL.ROI_MASK_HEAD.USE_GN", "False",
    )  # fmt: skip
    return Options(config_file=CONFIG, **{"overrides": narrow, "torchvision": False, **small, **changes})


@pytest.fixture(scope="module")
def side() -> Ours:
    ours = Ours(config(options(), 2), make_batches(options(), "padded", 2))
    ours.calibrate(10)
    return ours


def test_proposals_lie_around_the_ground_truth_and_survive_each_other():
    truth = torch.tensor([[10.0, 20.0, 110.0, 70.0], [300.0, 300.0, 340.0, 420.0]])
    near = calibrate.proposals_near(truth, 31)
    assert len(near) == 31
    overlaps = box_iou(near, truth)
    assert (overlaps.max(dim=1).values > 0.54).all()
    assert overlaps.argmax(dim=1).bincount().tolist() == [16, 15]
    between = box_iou(near, near).fill_diagonal_(0)
    assert between.max() < 0.66


def test_no_ground_truth_is_near_nothing():
    assert calibrate.proposals_near(torch.zeros(0, 4), 5).shape == (0, 4)
    assert calibrate.place(torch.zeros(0, 4), torch.zeros(7, 4)) == []


def test_two_proposals_take_two_anchors():
    anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0], [2.0, 0.0, 12.0, 10.0], [90.0, 90.0, 99.0, 99.0]])
    assert calibrate.place(anchors[:1].repeat(2, 1), anchors) == [0, 1]


def test_the_calibrated_network_has_the_positives_that_were_asked_for(side):
    """Three ground truths and seven proposals around them; random weights alone give few beyond the ground truth."""
    calibrated = side.positives(0)
    assert 9 <= calibrated <= 13
    raw = Ours(config(options(), 2), make_batches(options(), "padded", 2))
    assert 3 <= raw.positives(0) < calibrated


def test_the_constant_leaves_gradients_as_they_are(side):
    head = side.model.rpn.head
    features = [f.detach() for f in side.model.features(side.batches[0].images)]
    used = side.bias.used
    objectness, deltas = head(features)
    assert side.bias.used == used + 1
    grads = torch.autograd.grad([o.sum() for o in objectness] + [d.sum() for d in deltas], head.bbox_pred.bias)
    cells = sum(d.shape[0] * d.shape[2] * d.shape[3] for d in deltas)
    assert torch.equal(grads[0], torch.full_like(grads[0], cells))
    assert max(o.max() for o in objectness) > calibrate.RAISE / 2


def test_the_counter_sees_operators_flops_and_reads():
    x, weight = torch.ones(1, 3, 8, 8), torch.ones(4, 3, 3, 3, requires_grad=True)
    with measure.Counter() as counter:
        y = torch.nn.functional.conv2d(x, weight)
        y.view(-1).sum().backward()
    forward = 2 * 4 * 6 * 6 * 3 * 9
    assert counter.flops == 2 * forward  # the weight's gradient as much as the forward; none for the image
    assert counter.reads == 0
    operators = counter.operators
    with measure.Counter() as counter:
        y.detach().nonzero()
        y.detach()[y.detach() > 0]
        y.detach().view(-1)
    assert counter.reads == 2
    assert counter.operators == 3  # nonzero, the comparison, the indexing: no view
    assert operators >= 3


def test_our_convolution_has_the_flops_of_torchs():
    x, weight = torch.ones(1, 3, 8, 8), torch.ones(4, 3, 3, 3)
    output = torch.conv2d(x, weight)
    forward = measure.OUR_FLOPS["fastrcnn_kernels::conv2d"]
    backward = measure.OUR_FLOPS["fastrcnn_kernels::conv2d_backward"]
    one = 2 * 4 * 6 * 6 * 3 * 9
    assert forward(x, weight, None, None, None, True, [1, 1], [0, 0], [1, 1], 1, out_val=output) == one
    geometry = ([1, 1], [0, 0], [1, 1], 1)
    for wanted, times in (([True] * 4, 2), ([False, True, True, False], 1), ([False] * 4, 0)):
        assert backward(output, x, weight, None, None, *geometry, wanted, out_val=()) == times * one


def test_the_phases_are_those_of_a_step_and_in_its_order(side):
    found = measure.phases(side.model, side.optimizer, CPU, side.step, [0])
    assert tuple(found) == measure.PHASES
    assert all(value > 0 for value in found.values())


def test_a_step_that_runs_no_module_has_no_phases(side):
    assert measure.phases(side.model, None, CPU, lambda number: None, [0]) == {}


def test_turns_alternate_and_a_failure_stays_with_its_side():
    order = []

    def fail(number: int) -> None:
        raise RuntimeError("out of\nmemory")

    timings = measure.turn_by_turn(
        [lambda n: order.append(("a", n)), fail, lambda n: order.append(("b", n))], CPU, rounds=2, seconds=0, cycle=2
    )
    assert order == [("a", 0), ("a", 1), ("b", 0), ("b", 1), ("a", 2), ("a", 3), ("b", 2), ("b", 3)]
    assert [t.failed for t in timings] == ["", "RuntimeError: out of memory", ""]
    assert [len(t.seconds) for t in timings] == [2, 0, 2]


def test_buckets_come_in_proportion():
    order = batches.bucket_order()
    assert [order.count(index) for index in range(4)] == [5, 3, 1, 1]
    found = batches.bucketed_batches(1, 800, boxes=2, num_classes=3)
    assert [b.images.padded_size for b in found] == [(800, 1088), (800, 1216), (1088, 800), (1216, 800)]
    assert [b.images.image_sizes[0] for b in found] == [(800, 1066), (800, 1199), (1066, 800), (1199, 800)]


def test_torchvision_gets_the_same_batch():
    batch = batches.synthetic_batch(2, (96, 60), boxes=3, num_classes=4)
    images, targets = batches.to_torchvision(batch, CPU)
    assert images[0].shape == (3, 60, 96)
    assert torch.equal(images[1], batch.images.tensors[1, :, :60, :96])
    assert targets[0]["masks"].shape == (3, 60, 96)
    x1, y1, x2, y2 = targets[0]["boxes"][1].round().int().tolist()
    assert targets[0]["masks"][1, y1 + 1 : y2 - 1, x1 + 1 : x2 - 1].all()
    assert targets[0]["masks"][1].sum() <= (x2 - x1 + 1) * (y2 - y1 + 1)
    assert torch.equal(targets[0]["labels"], batch.targets[0].labels)


def test_a_group_gives_every_figure():
    (row,) = measure_group(options(), "padded", 1)
    assert "reason" not in row, row
    assert row["images_per_second"] == pytest.approx(1e3 / row["ms_per_step"])
    assert row["mean_ground_truths"] == 3
    assert row["mean_positives"] >= 9
    assert row["operators"] > 100
    assert row["gflop_per_image"] > 0.01
    assert 0 < row["mfu_percent"] < 150
    assert row["host_syncs"] >= 0
    assert set(row["losses"]) >= {"loss", "loss_mask", "loss_objectness"}


def test_a_step_that_cannot_be_recorded_has_the_reason():
    """The optimizer of PyTorch keeps its learning rate on the host, where no graph reads it."""
    overrides = (*options().overrides, "STEP.FUSED_OPTIMIZER", "False")
    (row,) = measure_group(options(modes=("graph",), overrides=overrides), "padded", 1)
    assert row["reason"].startswith("the step was not recorded: the learning rate of torch.optim.SGD")


def test_a_graph_is_recorded_for_each_bucket_and_a_cpu_does_it_operator_by_operator():
    (row,) = measure_group(options(modes=("graph",)), "bucketed", 1)
    assert "reason" not in row, row
    assert row["mode"] == "graph"
    assert row["images_per_second"] > 0
    assert row["phases_ms"] == {}
    assert row["gflop_per_image"] > 0.01  # counted operator by operator


def test_the_utilisation_is_the_share_of_the_ceiling():
    rows = [
        {"side": "ours", "dtype": "float32", "batch_size": 2, "flops": 4e9, "ms_per_step": 2.0},
        {"side": "ours", "dtype": "float32", "batch_size": 2, "flops": 4e9, "reason": "no"},
    ]
    add_utilisation(rows, options(peak_tflops=8.0))
    assert [row.get("gflop_per_image") for row in rows] == [2, None]
    assert [row.get("mfu_percent") for row in rows] == [pytest.approx(25), None]


def test_every_switch_leaves_the_losses_alone_or_says_why_it_is_not_there():
    rows = ablation.measure_ablation(options(), 1)
    assert [row["side"] for row in rows] == ["all on", *(f"without {s.name}" for s in ablation.SWITCHES)]
    by_name = {row["side"]: row for row in rows}
    for switch in ablation.SWITCHES:
        row = by_name[f"without {switch.name}"]
        if ablation.off_reason(options(), switch, "eager"):
            assert row["reason"]
        else:
            assert row["loss_difference"] < 1e-3, row
            assert row["slower"] > 0
            if switch.name in ("channels last", "fused convolutions"):  # the same multiplications in other operators
                assert row["gflop_per_image"] == pytest.approx(rows[0]["gflop_per_image"], rel=0.01)


def test_a_switch_that_changes_the_losses_is_not_timed():
    wrong = ablation.Switch("a lot of proposals", "MODEL.RPN.POST_NMS_TOP_N_TRAIN", "5")
    rows = ablation.measure_ablation(options(), 1, switches=[wrong])
    assert rows[1]["reason"].startswith("the losses differ by")
    assert "ms_per_step" not in rows[1]
    assert rows[0]["ms_per_step"] > 0


def test_unknown_and_known_keys():
    assert known_key(CONFIG, "MODEL.CHANNELS_LAST", "True")
    assert not known_key(CONFIG, "MODEL.WINGS", "True")
    assert not known_key(CONFIG, "NOTHING.AT_ALL", "True")


def test_detection_finds_as_many_as_were_asked_for():
    rows = ablation.measure_inference(options(), 1, detections=20)
    assert [row.get("detections_per_image") for row in rows] == [20]
    assert rows[0]["images_per_second"] > 0


def test_the_files_and_their_order(tmp_path):
    result = run(options(batch_sizes=(1,), layouts=("padded", "bucketed")), tmp_path)
    stored = json.loads((tmp_path / "train_step.json").read_text())
    assert stored == json.loads(json.dumps(result))
    assert [row["layout"] for row in stored["train"]] == ["padded", "bucketed"]
    text = (tmp_path / "train_step.md").read_text()
    assert "## Training step" in text
    assert text.count("| ours | eager | float32 |") == 2
    wanted = options(batch_sizes=(1, 2), ablation=(1,), inference=(1,), layouts=("padded", "bucketed"))
    assert [group[:3] for group in groups(wanted)] == [
        ("train", "padded", 1), ("train", "padded", 2), ("train", "bucketed", 1), ("train", "bucketed", 2),
        ("ablation", "padded", 1), ("inference", "padded", 1),
    ]  # fmt: skip


def test_no_time_left_is_a_note(tmp_path):
    result = run(options(batch_sizes=(1,)), tmp_path, budget=-1)
    assert result["notes"] == ["train, padded, batch 1: not begun, the time was up"]
    assert result["train"] == []


def test_the_profile_lists_what_a_step_runs():
    (entry,) = measure_profile(options(), 1)
    assert "reason" not in entry, entry
    assert sum(row["percent"] for row in entry["kernels"]) == pytest.approx(100)
    assert sum(row["ms"] for row in entry["kinds"]) == pytest.approx(sum(row["ms"] for row in entry["kernels"]))
    kinds = {row["kind"] for row in entry["kinds"]}
    assert {"ours", "convolution", "matrix product"} <= kinds
    result = {"machine_info": {}, "profile": [entry]}
    assert "## Where the milliseconds go: ours, batch 1, eager, float32" in tables.markdown(result)


def test_kernels_are_sorted_merged_and_named():
    times = [
        ("void at::native::add<float, 4>(x)", 3, 1.0),
        ("void at::native::add<int>(y)", 3, 2.0),
        ("_sweep", 6, 9.0),
    ]
    rows = table_rows(times, steps=3, shown=1)
    assert [(row["name"], row["calls"], row["ms"]) for row in rows] == [("_sweep", 2, 3), ("1 others", 2, 1)]
    assert rows[0]["percent"] == 75
    names = {
        "sm90_xmma_fprop_implicit_gemm_bf16": "convolution",
        "cutlass_80_tensorop_bf16_gemm": "matrix product",
        "_sweep_kernel": "ours",
        "Memcpy HtoD (Pinned -> Device)": "copy",
        "at::native::vectorized_elementwise_kernel": "other",
    }
    assert {name: kind_of(name) for name in names} == names


def row(side: str, speed: float, dtype: str = "float32") -> dict[str, Any]:
    return {
        "layout": "padded",
        "batch_size": 2,
        "side": side,
        "mode": "eager",
        "dtype": dtype,
        "images_per_second": speed,
    }


def test_the_ratios_compare_the_best_and_like_with_like():
    rows = [
        row("ours", 10), row("ours", 30, "bfloat16"), row("torchvision", 5), row("torchvision AMP", 6, "float16"),
        {"layout": "padded", "batch_size": 4, "side": "ours", "reason": "out of memory"},
    ]  # fmt: skip
    (found,) = tables.ratios(rows)
    assert found["over_best"] == 5
    assert found["over_float32"] == 2
    assert found["torchvision_best"] == "torchvision AMP float16"
    text = "\n".join(tables.table(tables.RATIOS, [found]))
    assert "| padded | 2 | eager bfloat16 | 30.00 | torchvision AMP float16 | 5.00 | 2.00 |  |" in text


@pytest.mark.parametrize(
    "arguments",
    [
        ["--batch-sizes", "0"],
        ["--modes", "fast"],
        ["--size", "100x100"],
        ["--dtypes", ""],
    ],
)
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_without_training_nothing_is_trained(tmp_path):
    arguments = ["--config-file", str(CONFIG), "--device", "cpu", "--no-train", "--output", str(tmp_path)]
    assert main([*arguments, "--seconds", "0"]) == 0
    assert json.loads((tmp_path / "train_step.json").read_text())["train"] == []


def test_wrong_images(tmp_path, capsys):
    assert main(["--device", "cpu", "--images", "absent.json@nowhere", "--output", str(tmp_path)]) == 2
    assert "absent.json@nowhere" in capsys.readouterr().err


def test_real_images(tmp_path):
    from fastrcnn.data import shapes

    shapes.main(["--output", str(tmp_path / "s"), "--num-train", "4", "--num-val", "1", "--image-size", "64"])
    source = f"{tmp_path}/s/annotations/instances_train.json@{tmp_path}/s/images"
    rows = measure_group(options(images=source), "real", 2)
    assert [row["side"] for row in rows] == ["ours", "ours, loader running"]
    for found in rows:
        assert "reason" not in found, found
        assert found["mean_ground_truths"] > 0
        assert found["images_per_second"] > 0


def test_torchvision_beside_ours():
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    rows = measure_group(options(torchvision=True, positives=6), "padded", 1)
    assert [row["side"] for row in rows] == ["ours", "torchvision", "torchvision channels last"]
    for found in rows:
        assert "reason" not in found, found
        assert 5 <= found["mean_positives"] <= 16
        assert tuple(found["phases_ms"]) == measure.PHASES
