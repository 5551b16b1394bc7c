"""Batching from an arena: equal to ``preprocess_images`` and flips, which are tested against Pillow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastrcnn_kernels import preprocess_arena, preprocess_images, set_backend
from tests.kernels.helpers import ForbidSync, Place
from tests.kernels.test_preprocess import STYLES, noise, slack

SHAPES = [(7, 30), (17, 12), (1, 1), (9, 3), (40, 21)]
SIZES = [(8, 33), (9, 7), (5, 6), (9, 3), (3, 2)]
FLIPS = [3, 1, 2, 2, 0]


def in_an_arena(images: list[Tensor], sizes: list[tuple[int, int]], flips: list[int]) -> tuple[Tensor, Tensor]:
    """The images with gaps of odd lengths between them, in reverse order."""
    parts: list[Tensor] = []
    rows: list[list[int]] = []
    end = 0
    for image, (h, w), flip in reversed(list(zip(images, sizes, flips, strict=True))):
        gap = torch.full((3,), 255, dtype=torch.uint8)
        rows.insert(0, [end + 3, image.shape[0], image.shape[1], h, w, flip])
        parts += [gap, image.flatten()]
        end += 3 + image.numel()
    return torch.cat(parts), torch.tensor(rows)


def expected(images: list[Tensor], sizes: list[tuple[int, int]], flips: list[int], **style: Any) -> Tensor:
    """Each image resized, flipped afterwards, then batched as it is."""
    with set_backend("reference"):
        batch, _ = preprocess_images(
            images, sizes=sizes, flip=[bool(f & 1) for f in flips], size_divisible=1, pad_to=(12, 40), **style
        )
    for canvas, (h, _), flip in zip(batch, sizes, flips, strict=True):
        if flip & 2:
            canvas[:, :h] = canvas[:, :h].flip(1)
    return batch


@pytest.mark.parametrize("style", STYLES)
def test_preprocess_arena_equals_preprocess_images(place: Place, style: str) -> None:
    images = [noise(h, w, seed) for seed, (h, w) in enumerate(SHAPES)]
    arena, table = in_an_arena(images, SIZES, FLIPS)
    found = preprocess_arena(arena.to(place.device), table.to(place.device), size=(12, 40), **STYLES[style])
    assert found.is_contiguous()
    assert torch.equal(found.cpu(), expected(images, SIZES, FLIPS, **STYLES[style]))


def test_preprocess_arena_over_several_tiles_and_stripes(place: Place) -> None:
    """More rows than a task of the C++ kernel has (64), and an image that ends within one, upside down."""
    images, sizes, flips = [noise(30, 20, 1), noise(50, 21, 2)], [(70, 9), (75, 66)], [2, 3]
    arena, table = in_an_arena(images, sizes, flips)
    found = preprocess_arena(arena.to(place.device), table.to(place.device), size=(76, 70), **STYLES["caffe"])
    with set_backend("reference"):
        assert torch.equal(found.cpu(), preprocess_arena(arena, table, size=(76, 70), **STYLES["caffe"]))
    assert not found[0, :, 70:].any()
    assert not found[0, :, :, 9:].any()


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_preprocess_arena_types_and_layouts(
    place: Place, dtype: torch.dtype, layout: torch.memory_format, channels: int
) -> None:
    images = [noise(h, w, seed) for seed, (h, w) in enumerate(SHAPES)]
    arena, table = in_an_arena(images, SIZES, FLIPS)
    form: dict[str, Any] = {"dtype": dtype, "memory_format": layout, "channels": channels}
    found = preprocess_arena(arena.to(place.device), table.to(place.device), size=(12, 40), **form, **STYLES["unit"])
    wanted = expected(images, SIZES, FLIPS, **STYLES["unit"])
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=layout)
    torch.testing.assert_close(found[:, :3].cpu(), wanted.to(dtype), rtol=slack(place, dtype), atol=0)
    assert not found[:, 3:].any()


def test_preprocess_arena_depends_on_the_tensors_alone(place: Place) -> None:
    """One set of arguments, as in a graph; other pixels and another table come out."""
    first, second = [noise(7, 30, 1), noise(9, 8, 2)], [noise(5, 4, 3), noise(12, 11, 4)]
    arena, table = (t.to(place.device) for t in in_an_arena(first, [(8, 33), (9, 7)], [1, 0]))
    room = torch.zeros(1000, dtype=torch.uint8, device=place.device)
    room[: len(arena)] = arena

    def run() -> Tensor:
        return preprocess_arena(room, table, size=(12, 40), **STYLES["caffe"])

    with ForbidSync():
        before = run()
    assert torch.equal(before.cpu(), expected(first, [(8, 33), (9, 7)], [1, 0], **STYLES["caffe"]))
    arena, changed = in_an_arena(second, [(12, 10), (3, 40)], [2, 3])
    room[: len(arena)] = arena.to(place.device)
    table.copy_(changed)
    assert torch.equal(run().cpu(), expected(second, [(12, 10), (3, 40)], [2, 3], **STYLES["caffe"]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_preprocess_arena_in_a_cuda_graph() -> None:
    images = [noise(70, 90, 1), noise(50, 60, 2)]
    sizes, flips = [(8, 33), (9, 7)], [1, 2]
    arena, table = (t.cuda() for t in in_an_arena(images, sizes, flips))
    preprocess_arena(arena, table, size=(12, 40), **STYLES["caffe"])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = preprocess_arena(arena, table, size=(12, 40), **STYLES["caffe"])
    for changed_sizes, changed_flips in (([(12, 40), (3, 3)], [0, 3]), (sizes, flips)):
        table.copy_(in_an_arena(images, changed_sizes, changed_flips)[1])
        graph.replay()
        assert torch.equal(out.cpu(), expected(images, changed_sizes, changed_flips, **STYLES["caffe"]))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([0, 0, 4, 2, 2, 0], "row 0 of table says an image of 0x4"),
        ([-1, 4, 4, 2, 2, 0], "at byte -1"),
        ([1, 4, 4, 2, 2, 0], "which an arena of 48 bytes does not hold"),
        ([0, 4, 4, 9, 2, 0], "wants 9x2 pixels"),
        ([0, 4, 4, 2, 0, 0], "wants 2x0 pixels"),
        ([0, 4, 4, 2, 2, 4], "flip 4"),
    ],
)
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_preprocess_arena_checks_the_table_on_a_cpu(backend: str, row: list[int], message: str) -> None:
    arena = torch.zeros(48, dtype=torch.uint8)
    with set_backend(backend), pytest.raises(ValueError, match=message):
        preprocess_arena(arena, torch.tensor([row]), size=(8, 8), **STYLES["caffe"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"arena": torch.zeros(48)}, "arena must be contiguous uint8"),
        ({"arena": torch.zeros((4, 4, 3), dtype=torch.uint8)}, "arena must be contiguous uint8"),
        ({"table": torch.zeros((1, 7), dtype=torch.int64)}, r"int64 \[images, 6\], got torch.int64 \(1, 7\)"),
        ({"table": torch.zeros((0, 6), dtype=torch.int64)}, "at least one image"),
        ({"table": torch.zeros((1, 6), dtype=torch.int64, device="meta")}, "table is on meta, arena on cpu"),
        ({"size": (0, 4)}, "size must be at least 1x1"),
        ({"channels": 5}, "preprocess_arena: channels must be 3 or 4"),
        ({"pixel_std": [0.0, 1.0, 1.0]}, "preprocess_arena: pixel_std must not be 0"),
    ],
)
def test_preprocess_arena_names_the_fault(changed: dict[str, Any], message: str) -> None:
    given = {
        "arena": torch.zeros(48, dtype=torch.uint8),
        "table": torch.tensor([[0, 4, 4, 2, 2, 0]]),
        "size": (8, 8),
        **STYLES["caffe"],
    }
    with pytest.raises(ValueError, match=message):
        preprocess_arena(**{**given, **changed})


def test_preprocess_arena_operator_is_well_formed() -> None:
    arena, table = in_an_arena([noise(4, 5)], [(3, 6)], [1])
    op = torch.ops.fastrcnn_kernels.preprocess_arena.default
    for dtype, last in ((torch.float32, False), (torch.bfloat16, True)):
        torch.library.opcheck(op, (arena, table, [1.0] * 3, [2.0] * 3, True, 8, 8, 4, dtype, last))


def test_preprocess_arena_compiles() -> None:
    arena, table = in_an_arena([noise(4, 5), noise(6, 3)], [(3, 6), (5, 5)], [1, 2])

    def run(arena: Tensor, table: Tensor) -> Tensor:
        return preprocess_arena(arena, table, size=(8, 8), **STYLES["caffe"]) * 2

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(arena, table), run(arena, table))
