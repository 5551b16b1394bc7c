"""Encoding and decoding against maskrcnn-benchmark's golden values and scalar loops in float64, on every back-end."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastrcnn_kernels import (
    box_coder_reference,
    decode_boxes,
    decode_proposals,
    encode_boxes,
    set_backend,
)
from tests.kernels.helpers import ForbidSync, Guards, Place

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


def random_deltas(*shape: int, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def assert_box_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Decoded boxes of two implementations: 2 ulp of the side and the rounding of the corner."""
    sides = (expected.unflatten(-1, (-1, 4))[..., 2:] - expected.unflatten(-1, (-1, 4))[..., :2]).abs()  # [..., k, 2]
    limit = 2.0**-23 * (sides.repeat_interleave(2, -1)[..., [0, 2, 1, 3]].flatten(-2) + expected.abs() + 1)
    error = (actual - expected).abs()
    assert bool(((error <= limit) | (actual == expected) | (actual.isnan() & expected.isnan())).all()), error.max()


def test_decode_golden(device: torch.device) -> None:
    decoded = decode_boxes(
        torch.tensor(GOLDEN_DELTAS, device=device), torch.tensor(GOLDEN_BOXES, device=device), box_offset=1
    )
    torch.testing.assert_close(decoded.cpu(), torch.tensor(GOLDEN_DECODED), atol=1e-4, rtol=0)


def test_encode_golden(device: torch.device) -> None:
    """The golden values the other way round: the encoding of the decoded boxes are the deltas."""
    encoded = encode_boxes(
        torch.tensor(GOLDEN_DECODED, device=device), torch.tensor(GOLDEN_BOXES, device=device), box_offset=1
    )
    torch.testing.assert_close(encoded.cpu(), torch.tensor(GOLDEN_DELTAS), atol=1e-5, rtol=0)


def test_by_hand(device: torch.device) -> None:
    """Anchor 10 x 20 at (5, 10), inclusive; ground truth 20 x 20 at (10, 20): half a width, half a height, ln 2, 0."""
    anchor = torch.tensor([[0.0, 0.0, 9.0, 19.0]], device=device)
    box = torch.tensor([[0.0, 10.0, 19.0, 29.0]], device=device)
    encoded = encode_boxes(box, anchor, (10, 10, 5, 5), box_offset=1)
    torch.testing.assert_close(encoded.cpu(), torch.tensor([[5.0, 5.0, 5 * math.log(2), 0.0]]))
    torch.testing.assert_close(decode_boxes(encoded, anchor, (10, 10, 5, 5), box_offset=1), box)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("count", [1, 3, 65])
def test_equals_loops(device: torch.device, weights: Sequence[float], offset: int, count: int) -> None:
    boxes, anchors = random_boxes(count).to(device), random_boxes(count, seed=1).to(device)
    encoded = encode_boxes(boxes, anchors, weights, box_offset=offset)
    assert encoded.dtype == torch.float32
    # Centres near 400 carry an error of 3e-5 pixels, divided by sizes from 1 on and multiplied by weights up to 10.
    expected = encode_loop(boxes, anchors, weights, offset)
    torch.testing.assert_close(encoded.double().cpu(), expected, rtol=1e-5, atol=1e-3)
    exact = encode_boxes(boxes.double(), anchors.double(), weights, box_offset=offset)
    torch.testing.assert_close(exact.cpu(), expected, rtol=1e-11, atol=1e-11)

    deltas = random_deltas(count, 12, scale=4, seed=2).to(device)
    decoded = decode_boxes(deltas.double(), anchors.double(), weights, box_offset=offset)
    torch.testing.assert_close(decoded.cpu(), decode_loop(deltas, anchors, weights, offset), rtol=1e-11, atol=1e-9)
    single = decode_boxes(deltas, anchors, weights, box_offset=offset)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), decoded, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_close_to_the_reference(device: torch.device, weights: Sequence[float], offset: int) -> None:
    """What the docstring promises: translations to the bit, logarithms and exponentials within 2 ulp."""
    boxes, anchors = random_boxes(1000).to(device), random_boxes(1000, seed=1).to(device)
    encoded = encode_boxes(boxes, anchors, weights, box_offset=offset)
    expected = box_coder_reference.encode(boxes, anchors, weights, offset)
    assert torch.equal(encoded[:, :2], expected[:, :2])
    # A product with a weight rounds once more.
    torch.testing.assert_close(encoded[:, 2:], expected[:, 2:], rtol=3 * 2.0**-23, atol=0)
    deltas = random_deltas(1000, 8, scale=2).to(device)
    decoded = decode_boxes(deltas, anchors, weights, box_offset=offset)
    assert_box_close(decoded, box_coder_reference.decode(deltas, anchors, weights, offset, CLIP))


def test_cpp_and_triton_agree_to_the_bit() -> None:
    if Place("cpp", "cpu").why_not() or Place("triton", "cpu").why_not():
        pytest.skip("needs the C++ kernels and Triton's interpreter")
    boxes, anchors = random_boxes(300), random_boxes(300, seed=1)
    boxes[::7] *= torch.tensor([1.0, 1.0, -1.0, 1e-38])
    deltas = torch.cat([random_deltas(300, 2), random_deltas(300, 2, scale=60)], dim=1)
    deltas[0], deltas[1, 2], deltas[2, 3] = 0, math.nan, -math.inf
    results = []
    for backend in ("cpp", "triton"):
        with set_backend(backend):
            wide = decode_boxes(deltas, anchors, clip=math.inf)
            results.append([encode_boxes(boxes, anchors, WEIGHTS[1]), wide, decode_boxes(deltas, anchors, WEIGHTS[2])])
    for cpp, triton in zip(*results, strict=True):
        assert torch.equal(cpp.nan_to_num(nan=-7.0), triton.nan_to_num(nan=-7.0))


sides = st.tuples(st.floats(-500, 500), st.floats(-500, 500), st.floats(1, 400), st.floats(1, 400))


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pair=st.tuples(sides, sides), offset=st.sampled_from([0, 1]), weights=st.sampled_from(WEIGHTS))
def test_decode_inverts_encode(
    device: torch.device, pair: tuple[tuple[float, ...], ...], offset: int, weights: Sequence[float]
) -> None:
    both = torch.tensor(pair, dtype=torch.float64, device=device)
    box, anchor = torch.cat([both[:, :2], both[:, :2] + both[:, 2:]], dim=1)
    deltas = encode_boxes(box, anchor, weights, box_offset=offset)
    decoded = decode_boxes(deltas, anchor, weights, box_offset=offset, clip=10.0)
    torch.testing.assert_close(decoded, box, rtol=1e-9, atol=1e-9)


def test_sizes_are_clamped_from_above_only(device: torch.device) -> None:
    anchor = torch.tensor([[0.0, 0.0, 15.0, 15.0]], device=device)
    deltas = torch.tensor([[0.0, 0.0, 50.0, -50.0]], device=device)
    x1, y1, x2, y2 = decode_boxes(deltas, anchor, box_offset=1)[0].tolist()
    assert x2 - x1 + 1 == pytest.approx(1000, rel=1e-5), "16 pixels grow to 1000 at most"
    assert y2 - y1 + 1 == pytest.approx(0, abs=1e-5), "and shrink without limit"
    weighted = decode_boxes(deltas * 5, anchor, (10, 10, 5, 5), box_offset=1)
    torch.testing.assert_close(weighted, decode_boxes(deltas, anchor, box_offset=1))


@pytest.mark.parametrize("k", [1, 2, 3, 15, 16, 17, 81])
def test_class_specific_deltas_and_broadcast(device: torch.device, k: int) -> None:
    anchors, deltas = random_boxes(2, 5).to(device), random_deltas(2, 5, k * 4).to(device)
    decoded = decode_boxes(deltas, anchors, box_offset=1)
    assert decoded.shape == (2, 5, 4 * k)
    for j in {0, k // 2, k - 1}:
        one_class = decode_boxes(deltas[..., 4 * j : 4 * j + 4], anchors, box_offset=1)
        assert torch.equal(decoded[..., 4 * j : 4 * j + 4], one_class)
    common = decode_boxes(deltas, anchors[0], box_offset=1)
    assert torch.equal(common[1], decode_boxes(deltas[1], anchors[0], box_offset=1))
    assert torch.equal(
        decode_boxes(deltas[0], anchors, box_offset=1)[1], decode_boxes(deltas[0], anchors[1], box_offset=1)
    )


SHAPES = [((7, 3, 4), (3, 4)), ((3, 4), (7, 3, 4)), ((7, 1, 4), (3, 4)), ((4,), (5, 4)), ((2, 3, 4), (2, 1, 4))]
SHAPES += [((1, 4), (1, 1, 4)), ((2, 1, 3, 4), (5, 1, 4))]


@pytest.mark.parametrize(("first", "second"), SHAPES)
def test_broadcast_shapes(device: torch.device, first: tuple[int, ...], second: tuple[int, ...]) -> None:
    """Repeated rows give what expanded inputs give, and their gradients add up."""
    a, b = random_boxes(*first[:-1]).to(device), random_boxes(*second[:-1], seed=1).to(device)
    shape = torch.broadcast_shapes(first, second)
    for function, one in ((encode_boxes, a), (decode_boxes, random_deltas(*first).to(device))):
        leaves = [t.clone().requires_grad_() for t in (one, b)]
        result = function(*leaves)
        assert torch.equal(result, function(one.expand(shape).contiguous(), b.expand(shape).contiguous()))
        weight = random_deltas(*shape, seed=3).to(device)
        (result * weight).sum().backward()
        plain = [t.clone().requires_grad_() for t in (one, b)]
        specification = {encode_boxes: box_coder_reference.encode, decode_boxes: box_coder_reference.decode}[function]
        extra = () if function is encode_boxes else (CLIP,)
        (specification(*plain, WEIGHTS[0], 0, *extra) * weight).sum().backward()
        for leaf, twin in zip(leaves, plain, strict=True):
            torch.testing.assert_close(leaf.grad, twin.grad, rtol=1e-4, atol=1e-5)


def test_padding(device: torch.device) -> None:
    """Zero boxes are one pixel where box_offset is 1, and without a size where it is 0 (documented, as torchvision)."""
    zeros, anchors = torch.zeros(4, 4, device=device), random_boxes(4).to(device)
    for boxes, reference in ((zeros, anchors), (anchors, zeros), (zeros, zeros)):
        assert encode_boxes(boxes, reference, box_offset=1).isfinite().all()
    modern = encode_boxes(zeros, anchors)
    assert modern[:, :2].isfinite().all()
    assert (modern[:, 2:] == -math.inf).all()


def test_nan_spoils_only_its_own(device: torch.device) -> None:
    anchors, deltas = random_boxes(6).to(device), random_deltas(6, 8).to(device)
    others = [0, 1, 2, 4, 5]
    spoiled = deltas.clone()
    spoiled[3, 2] = float("nan")
    spoiled[3, 5] = float("inf")
    decoded, clean = decode_boxes(spoiled, anchors), decode_boxes(deltas, anchors)
    assert torch.equal(decoded[others], clean[others])
    assert decoded[3].isnan().tolist() == [True, False, True, False, False, False, False, False]
    assert decoded[3, 5].item() == math.inf
    boxes = anchors.clone()
    boxes[3] = float("nan")
    assert torch.equal(encode_boxes(boxes, anchors)[others], encode_boxes(anchors, anchors)[others])
    assert encode_boxes(boxes, anchors)[3].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_computes_in_float32(device: torch.device, dtype: torch.dtype) -> None:
    anchors, deltas = random_boxes(9).to(device), random_deltas(9, 8).to(device, dtype)
    decoded = decode_boxes(deltas, anchors, (10, 10, 5, 5), box_offset=1)
    assert decoded.dtype == torch.float32
    assert torch.equal(decoded, decode_boxes(deltas.float(), anchors, (10, 10, 5, 5), box_offset=1))
    encoded = encode_boxes(anchors.to(dtype), anchors.flip(0).to(dtype), box_offset=1)
    assert encoded.dtype == torch.float32
    assert torch.equal(
        encoded, encode_boxes(anchors.to(dtype).float(), anchors.flip(0).to(dtype).float(), box_offset=1)
    )
    leaf = deltas.clone().requires_grad_()
    decode_boxes(leaf, anchors).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.dtype == dtype
    integers = encode_boxes(anchors.long(), anchors.flip(0).double())
    assert integers.dtype == torch.float64, "one float64 input is enough"


def test_non_contiguous(device: torch.device, guarded: Guards) -> None:
    anchors, deltas = random_boxes(8).to(device), random_deltas(8, 8).to(device)
    strided_anchors, strided_deltas = anchors.T.contiguous().T, deltas.T.contiguous().T
    assert not strided_anchors.is_contiguous()
    assert torch.equal(decode_boxes(guarded(strided_deltas), guarded(strided_anchors)), decode_boxes(deltas, anchors))
    assert torch.equal(encode_boxes(strided_anchors, anchors.flip(0)), encode_boxes(anchors, anchors.flip(0)))


def test_empty(device: torch.device) -> None:
    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, device=device, requires_grad=True)

    assert encode_boxes(empty(0, 4), empty(0, 4)).shape == (0, 4)
    assert decode_boxes(empty(0, 324), empty(0, 4)).shape == (0, 324)
    assert decode_boxes(empty(0, 5, 8), empty(5, 4)).shape == (0, 5, 8)
    assert decode_boxes(empty(5, 0), empty(5, 4)).shape == (5, 0)
    anchors, none = torch.zeros(5, 4, device=device, requires_grad=True), empty(5, 0)
    decode_boxes(none, anchors).sum().backward()
    assert anchors.grad is not None
    assert anchors.grad.tolist() == [[0.0] * 4] * 5
    for lead in ((0, 3), (2, 0)):
        sizes = torch.ones(lead[0], 2, dtype=torch.int64, device=device)
        boxes, valid = decode_proposals(empty(*lead, 4), empty(*lead, 4), sizes)
        assert (boxes.shape, valid.shape) == ((*lead, 4), lead)


def test_no_host_sync(device: torch.device) -> None:
    anchors, deltas = random_boxes(2, 5).to(device), torch.zeros(2, 5, 8, device=device, requires_grad=True)
    sizes = torch.tensor([[40, 60], [20, 30]], device=device)
    with ForbidSync():
        decode_boxes(deltas, anchors, WEIGHTS[1], box_offset=1).sum().backward()
        encode_boxes(anchors, anchors, WEIGHTS[1], box_offset=1)
        decode_proposals(deltas[..., :4], anchors, sizes, WEIGHTS[1], box_offset=1)


def test_opcheck(device: torch.device) -> None:
    ops = torch.ops.fastrcnn_kernels
    weights = [2.0, 3.0, 5.0, 7.0]
    boxes = random_boxes(2, 5).to(device).requires_grad_()
    anchors = random_boxes(5, seed=1).to(device).requires_grad_()
    deltas = random_deltas(2, 5, 8).to(device).requires_grad_()
    torch.library.opcheck(ops.encode_boxes.default, (boxes, anchors, weights, 1))
    torch.library.opcheck(ops.decode_boxes.default, (deltas, anchors, weights, 1, CLIP))
    plain = [t.detach() for t in (boxes, anchors, deltas)]
    backward = "test_schema", "test_faketensor"
    arguments = (plain[0] * 0.5, plain[0], plain[1], weights, 1, True, True)
    torch.library.opcheck(ops.encode_boxes_backward.default, arguments, test_utils=backward)
    arguments = (plain[2] * 0.5, plain[2], plain[1], weights, 1, CLIP, True, False)
    torch.library.opcheck(ops.decode_boxes_backward.default, arguments, test_utils=backward)
    sizes = torch.tensor([[40, 60], [20, 30]], device=device)
    arguments = (plain[2][..., :4], plain[1], sizes, weights, 1, CLIP, 4.0)
    torch.library.opcheck(ops.decode_proposals.default, arguments)


def test_compile_fullgraph(device: torch.device) -> None:
    def both(deltas: torch.Tensor, anchors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        decoded = decode_boxes(deltas, anchors, WEIGHTS[1], box_offset=1)
        return decoded, encode_boxes(decoded[..., :4], anchors, WEIGHTS[1], box_offset=1)

    anchors = random_boxes(2, 5).to(device)
    results = []
    for function in (torch.compile(both, fullgraph=True, backend="aot_eager"), both):
        deltas = random_deltas(2, 5, 8).to(device).requires_grad_()
        outputs = function(deltas, anchors)
        sum(out.sum() for out in outputs).backward()
        results.append((*outputs, deltas.grad))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_compile_inductor() -> None:
    def proposals(
        deltas: torch.Tensor, anchors: torch.Tensor, sizes: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        boxes, valid = decode_proposals(deltas * 2, anchors, sizes, box_offset=1)
        return boxes + 1, valid.logical_not()

    arguments = random_deltas(2, 5, 4), random_boxes(2, 5), torch.tensor([[40, 60], [20, 30]])
    for actual, expected in zip(
        torch.compile(proposals, fullgraph=True)(*arguments), proposals(*arguments), strict=True
    ):
        assert torch.equal(actual, expected)


def test_equals_torchvision() -> None:
    utils = pytest.importorskip("torchvision.models.detection._utils", reason="torchvision is not installed")
    anchors, boxes, deltas = random_boxes(500), random_boxes(500, seed=1), random_deltas(500, 84)
    for weights in WEIGHTS:
        coder = utils.BoxCoder(weights)
        torch.testing.assert_close(
            encode_boxes(boxes, anchors, weights), coder.encode_single(boxes, anchors), rtol=1e-6, atol=1e-6
        )
        assert_box_close(decode_boxes(deltas, anchors, weights), coder.decode_single(deltas, anchors))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: encode_boxes(torch.zeros(1, 4), torch.zeros(1, 5)), r"anchors must .* got \[1, 5\]"),
        (lambda: decode_boxes(torch.zeros(1, 6), torch.zeros(1, 4)), r"\[\.\.\., 4 \* k\], got \[1, 6\]"),
        (lambda: decode_boxes(torch.zeros(1, 4), torch.zeros(1, 4), (1, 1, 1)), r"weights must be four .*\(1, 1, 1\)"),
        (lambda: encode_boxes(torch.zeros(1, 4), torch.zeros(1, 4), (1, 1, 0, 1)), "weights must be four positive"),
        (lambda: decode_boxes(torch.zeros(1, 4), torch.zeros(1, 4), box_offset=3), "box_offset .* got 3"),
        (
            lambda: decode_proposals(torch.zeros(3, 4), torch.zeros(3, 4), torch.ones(1, 2)),
            r"\[N, K, 4\], got \[3, 4\]",
        ),
        (
            lambda: decode_proposals(torch.zeros(2, 3, 4), torch.zeros(2, 4), torch.ones(2, 2)),
            r"anchors must be \[K, 4\] or as deltas \[2, 3, 4\], got \[2, 4\]",
        ),
        (
            lambda: decode_proposals(torch.zeros(2, 3, 4), torch.zeros(3, 4), torch.ones(2, 2)),
            r"image_sizes must be int64 \[2, 2\], got torch.float32 \[2, 2\]",
        ),
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
