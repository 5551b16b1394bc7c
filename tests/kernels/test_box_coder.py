"""Encoding and decoding against maskrcnn-benchmark's golden values and scalar loops in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrcnn_kernels import decode_boxes, encode_boxes
from tests.kernels.nosync import forbid_host_sync

CLIP = math.log(1000 / 16)
WEIGHTS = ((1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0), (2.0, 3.0, 5.0, 7.0))
# tests/test_box_coder.py of maskrcnn-benchmark, which took them from Caffe2.
GOLDEN_BOXES = [
    [175.62031555, 20.91103172, 253.352005, 155.0145874],
    [169.24636841, 4.85241556, 228.8605957, 105.02092743],
    [181.77426147, 199.82876587, 192.88427734, 214.0255127],
    [174.36262512, 186.75761414, 296.19091797, 231.27906799],
    [22.73153877, 92.02596283, 135.5695343, 208.80291748],
]
GOLDEN_DELTAS = [
    [0.47861834, 0.13992102, 0.14961673, 0.71495209],
    [0.29915856, -0.35664671, 0.89018666, 0.70815367],
    [-0.03852064, 0.44466892, 0.49492538, 0.71409376],
    [0.28052918, 0.02184832, 0.65289006, 1.05060139],
    [-0.38172557, -0.08533806, -0.60335309, 0.79052375],
]
GOLDEN_DECODED = [
    [206.949539, -30.715202, 297.387665, 244.448486],
    [143.871216, -83.342888, 290.502289, 121.053398],
    [177.430283, 198.666245, 196.295273, 228.703079],
    [152.251892, 145.431564, 387.215454, 274.594238],
    [5.062420, 11.040955, 66.328903, 269.686218],
]


def random_boxes(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    corner = torch.rand(*shape, 2, generator=g, dtype=torch.float64) * 300
    size = torch.rand(*shape, 2, generator=g, dtype=torch.float64) * 200 + 1
    return torch.cat([corner, corner + size], dim=-1).to(dtype)


def centre_size(box: Sequence[float], offset: int) -> tuple[float, float, float, float]:
    width, height = box[2] - box[0] + offset, box[3] - box[1] + offset
    return box[0] + width / 2, box[1] + height / 2, width, height


def encode_loop(boxes: torch.Tensor, anchors: torch.Tensor, weights: Sequence[float], offset: int) -> torch.Tensor:
    rows = []
    for box, anchor in zip(boxes.tolist(), anchors.tolist(), strict=True):
        gx, gy, gw, gh = centre_size(box, offset)
        ax, ay, aw, ah = centre_size(anchor, offset)
        raw = ((gx - ax) / aw, (gy - ay) / ah, math.log(gw) - math.log(aw), math.log(gh) - math.log(ah))
        rows.append([w * t for w, t in zip(weights, raw, strict=True)])
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 4)


def decode_loop(
    deltas: torch.Tensor,
    anchors: torch.Tensor,
    weights: Sequence[float],
    offset: int,
    clamp: Callable[[float], float] = lambda d: min(d, CLIP),
) -> torch.Tensor:
    rows = []
    for delta, anchor in zip(deltas.tolist(), anchors.tolist(), strict=True):
        ax, ay, aw, ah = centre_size(anchor, offset)
        row = []
        for k in range(0, len(delta), 4):
            dx, dy, dw, dh = (d / w for d, w in zip(delta[k : k + 4], weights, strict=True))
            x, y, w, h = ax + dx * aw, ay + dy * ah, aw * math.exp(clamp(dw)), ah * math.exp(clamp(dh))
            row += [x - w / 2, y - h / 2, x + w / 2 - offset, y + h / 2 - offset]
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64).reshape(deltas.shape)


def test_decode_golden() -> None:
    decoded = decode_boxes(torch.tensor(GOLDEN_DELTAS), torch.tensor(GOLDEN_BOXES), box_offset=1)
    torch.testing.assert_close(decoded, torch.tensor(GOLDEN_DECODED), atol=1e-4, rtol=0)


def test_encode_golden() -> None:
    """The golden values the other way round: the encoding of the decoded boxes are the deltas."""
    encoded = encode_boxes(torch.tensor(GOLDEN_DECODED), torch.tensor(GOLDEN_BOXES), box_offset=1)
    torch.testing.assert_close(encoded, torch.tensor(GOLDEN_DELTAS), atol=1e-5, rtol=0)


def test_by_hand() -> None:
    """Anchor 10 x 20 at (5, 10), inclusive; ground truth 20 x 20 at (10, 20): half a width, half a height, ln 2, 0."""
    anchor, box = torch.tensor([[0.0, 0.0, 9.0, 19.0]]), torch.tensor([[0.0, 10.0, 19.0, 29.0]])
    encoded = encode_boxes(box, anchor, (10, 10, 5, 5), box_offset=1)
    torch.testing.assert_close(encoded, torch.tensor([[5.0, 5.0, 5 * math.log(2), 0.0]]))
    torch.testing.assert_close(decode_boxes(encoded, anchor, (10, 10, 5, 5), box_offset=1), box)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("count", [1, 3, 65])
def test_equals_loops(weights: Sequence[float], offset: int, count: int) -> None:
    boxes, anchors = random_boxes(count), random_boxes(count, seed=1)
    encoded = encode_boxes(boxes, anchors, weights, box_offset=offset)
    assert encoded.dtype == torch.float32
    # Centres near 400 carry an error of 3e-5 pixels, divided by sizes from 1 on and multiplied by weights up to 10.
    expected = encode_loop(boxes, anchors, weights, offset)
    torch.testing.assert_close(encoded.double(), expected, rtol=1e-5, atol=1e-3)
    exact = encode_boxes(boxes.double(), anchors.double(), weights, box_offset=offset)
    torch.testing.assert_close(exact, expected, rtol=1e-11, atol=1e-11)

    deltas = torch.randn(count, 12, generator=torch.Generator().manual_seed(2)) * 4
    decoded = decode_boxes(deltas.double(), anchors.double(), weights, box_offset=offset)
    torch.testing.assert_close(decoded, decode_loop(deltas, anchors, weights, offset), rtol=1e-11, atol=1e-9)
    single = decode_boxes(deltas, anchors, weights, box_offset=offset)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), decoded, rtol=1e-5, atol=1e-2)


sides = st.tuples(st.floats(-500, 500), st.floats(-500, 500), st.floats(1, 400), st.floats(1, 400))


@settings(deadline=None, max_examples=60)
@given(pair=st.tuples(sides, sides), offset=st.sampled_from([0, 1]), weights=st.sampled_from(WEIGHTS))
def test_decode_inverts_encode(pair: tuple[tuple[float, ...], ...], offset: int, weights: Sequence[float]) -> None:
    both = torch.tensor(pair, dtype=torch.float64)
    box, anchor = torch.cat([both[:, :2], both[:, :2] + both[:, 2:]], dim=1)
    deltas = encode_boxes(box, anchor, weights, box_offset=offset)
    decoded = decode_boxes(deltas, anchor, weights, box_offset=offset, clip=10.0)
    torch.testing.assert_close(decoded, box, rtol=1e-9, atol=1e-9)


def test_sizes_are_clamped_from_above_only() -> None:
    anchor = torch.tensor([[0.0, 0.0, 15.0, 15.0]])
    deltas = torch.tensor([[0.0, 0.0, 50.0, -50.0]])
    x1, y1, x2, y2 = decode_boxes(deltas, anchor, box_offset=1)[0].tolist()
    assert x2 - x1 + 1 == pytest.approx(1000, rel=1e-5), "16 pixels grow to 1000 at most"
    assert y2 - y1 + 1 == pytest.approx(0, abs=1e-5), "and shrink without limit"
    weighted = decode_boxes(deltas * 5, anchor, (10, 10, 5, 5), box_offset=1)
    torch.testing.assert_close(weighted, decode_boxes(deltas, anchor, box_offset=1))


def test_class_specific_deltas_and_broadcast() -> None:
    anchors, deltas = random_boxes(2, 5), torch.randn(2, 5, 81 * 4, generator=torch.Generator().manual_seed(0))
    decoded = decode_boxes(deltas, anchors, box_offset=1)
    assert decoded.shape == (2, 5, 324)
    for k in (0, 40, 80):
        one_class = decode_boxes(deltas[..., 4 * k : 4 * k + 4], anchors, box_offset=1)
        assert torch.equal(decoded[..., 4 * k : 4 * k + 4], one_class)
    common = decode_boxes(deltas, anchors[0], box_offset=1)
    assert torch.equal(common[1], decode_boxes(deltas[1], anchors[0], box_offset=1))
    targets = encode_boxes(anchors, anchors[0], box_offset=1)
    assert torch.equal(targets[1], encode_boxes(anchors[1], anchors[0], box_offset=1))


def test_padding() -> None:
    """Zero boxes are one pixel where box_offset is 1, and without a size where it is 0 (documented, as torchvision)."""
    zeros, anchors = torch.zeros(4, 4), random_boxes(4)
    for boxes, reference in ((zeros, anchors), (anchors, zeros), (zeros, zeros)):
        assert encode_boxes(boxes, reference, box_offset=1).isfinite().all()
    modern = encode_boxes(zeros, anchors)
    assert modern[:, :2].isfinite().all()
    assert (modern[:, 2:] == -math.inf).all()


def test_nan_spoils_only_its_own() -> None:
    anchors, deltas = random_boxes(6), torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    others = [0, 1, 2, 4, 5]
    spoiled = deltas.clone()
    spoiled[3, 2] = float("nan")
    spoiled[3, 5] = float("inf")
    decoded, clean = decode_boxes(spoiled, anchors), decode_boxes(deltas, anchors)
    assert torch.equal(decoded[others], clean[others])
    assert decoded[3].isnan().tolist() == [True, False, True, False, False, False, False, False]
    boxes = anchors.clone()
    boxes[3] = float("nan")
    assert torch.equal(encode_boxes(boxes, anchors)[others], encode_boxes(anchors, anchors)[others])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_computes_in_float32(dtype: torch.dtype) -> None:
    anchors, deltas = random_boxes(9), torch.randn(9, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    decoded = decode_boxes(deltas, anchors, (10, 10, 5, 5), box_offset=1)
    assert decoded.dtype == torch.float32
    assert torch.equal(decoded, decode_boxes(deltas.float(), anchors, (10, 10, 5, 5), box_offset=1))
    encoded = encode_boxes(anchors.to(dtype), anchors.flip(0).to(dtype), box_offset=1)
    assert encoded.dtype == torch.float32
    assert torch.equal(
        encoded, encode_boxes(anchors.to(dtype).float(), anchors.flip(0).to(dtype).float(), box_offset=1)
    )


def test_non_contiguous() -> None:
    anchors, deltas = random_boxes(8), torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    strided_anchors, strided_deltas = anchors.T.contiguous().T, deltas.T.contiguous().T
    assert not strided_anchors.is_contiguous()
    assert torch.equal(decode_boxes(strided_deltas, strided_anchors), decode_boxes(deltas, anchors))
    assert torch.equal(encode_boxes(strided_anchors, anchors.flip(0)), encode_boxes(anchors, anchors.flip(0)))


def test_empty() -> None:
    assert encode_boxes(torch.empty(0, 4), torch.empty(0, 4)).shape == (0, 4)
    assert decode_boxes(torch.empty(0, 324), torch.empty(0, 4)).shape == (0, 324)
    assert decode_boxes(torch.empty(0, 5, 8), torch.empty(5, 4)).shape == (0, 5, 8)
    assert decode_boxes(torch.empty(5, 0), torch.empty(5, 4)).shape == (5, 0)


@pytest.mark.parametrize("offset", [0, 1])
def test_gradcheck(offset: int) -> None:
    boxes = random_boxes(3, dtype=torch.float64).requires_grad_()
    anchors = random_boxes(3, seed=1, dtype=torch.float64).requires_grad_()
    deltas = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weights = WEIGHTS[2]
    assert torch.autograd.gradcheck(lambda b, a: encode_boxes(b, a, weights, box_offset=offset), (boxes, anchors))
    assert torch.autograd.gradcheck(lambda d, a: decode_boxes(d, a, weights, box_offset=offset), (deltas, anchors))


def test_no_host_sync() -> None:
    anchors, deltas = random_boxes(2, 5), torch.zeros(2, 5, 8)
    with forbid_host_sync(allow_constants=False):
        decode_boxes(deltas, anchors, WEIGHTS[1], box_offset=1)
        encode_boxes(anchors, anchors, WEIGHTS[1], box_offset=1)


@pytest.mark.slow
def test_compile_fullgraph() -> None:
    def both(deltas: torch.Tensor, anchors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        decoded = decode_boxes(deltas, anchors, WEIGHTS[1], box_offset=1)
        return decoded, encode_boxes(decoded[..., :4], anchors, WEIGHTS[1], box_offset=1)

    anchors, deltas = random_boxes(2, 5), torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    for actual, expected in zip(
        torch.compile(both, fullgraph=True)(deltas, anchors), both(deltas, anchors), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: encode_boxes(torch.zeros(1, 4), torch.zeros(1, 5)), r"anchors must .* got \[1, 5\]"),
        (lambda: decode_boxes(torch.zeros(1, 6), torch.zeros(1, 4)), r"\[\.\.\., 4 \* k\], got \[1, 6\]"),
        (lambda: decode_boxes(torch.zeros(1, 4), torch.zeros(1, 4), (1, 1, 1)), r"weights must be four .*\(1, 1, 1\)"),
        (lambda: encode_boxes(torch.zeros(1, 4), torch.zeros(1, 4), (1, 1, 0, 1)), "weights must be four positive"),
        (lambda: decode_boxes(torch.zeros(1, 4), torch.zeros(1, 4), box_offset=3), "box_offset .* got 3"),
    ],
)
def test_bad_arguments(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


MUTATIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "no offset": lambda d, a: decode_boxes(d, a),
    "no final -1": lambda d, a: decode_boxes(d, a, box_offset=1) + torch.tensor([0.0, 0.0, 1.0, 1.0]),
    "weights of the box head": lambda d, a: decode_boxes(d, a, (10, 10, 5, 5), box_offset=1),
    "dx and dy swapped": lambda d, a: decode_boxes(d[:, [1, 0, 2, 3]], a, box_offset=1),
    "clamped on both sides": lambda d, a: decode_boxes(
        torch.cat([d[:, :2], d[:, 2:].clamp(min=-CLIP)], dim=1), a, box_offset=1
    ),
    "not clamped": lambda d, a: decode_boxes(d, a, box_offset=1, clip=math.inf),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_oracle_rejects(name: str) -> None:
    anchors = random_boxes(40)
    deltas = torch.randn(40, 4, generator=torch.Generator().manual_seed(0)) * 4
    expected = decode_loop(deltas, anchors, WEIGHTS[0], 1)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(MUTATIONS[name](deltas, anchors).double(), expected, rtol=1e-5, atol=1e-2)
