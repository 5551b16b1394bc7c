"""FBNet architectures as data: the five that maskrcnn-benchmark names, and a reader of definitions in its JSON.

``default``, ``xirb16d_dsmask`` and ``mobilenet_v2`` are variations of MobileNetV2 (Sandler et al., 2018); ``cham_v1a``
and ``cham_v2`` come from ChamNet's search (Dai et al., 2019). The figures are those of ``fbnet_modeldef.py``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Stride = int | tuple[int, int]


@dataclass(frozen=True)
class Block:
    """One block.

    Attributes:
        kind: a name of :data:`fastrcnn.models.fbnet_blocks.BLOCK_KINDS`.
        expansion: the block works on this many times its input channels (unless its kind says how many).
        channels: output channels, before ``SCALE_FACTOR``.
        stride: 1, 2 or 4; negative: the side is multiplied by it instead, (height, width) where they differ.
    """

    kind: str
    expansion: float
    channels: int
    stride: Stride


@dataclass(frozen=True)
class Architecture:
    """The stages of blocks, and which of them each part of a detector is made of.

    Attributes:
        first: (channels, stride, kernel size) of the first convolution.
        stages: the blocks of each stage.
        last: channels of the convolution behind a head, which the five have none of.
        backbone: indices of the stages of the body; None: all but the last stage.
        rpn, bbox, mask, kpts: the same for the heads. None: those of ``head``; None there too: **all** stages. That is
            maskrcnn-benchmark's rule, and what its keypoint heads and the mask heads of ``cham_*`` are made of.
    """

    first: tuple[int, int, int]
    stages: tuple[tuple[Block, ...], ...]
    last: int = 0
    backbone: tuple[int, ...] | None = None
    rpn: tuple[int, ...] | None = None
    bbox: tuple[int, ...] | None = None
    mask: tuple[int, ...] | None = None
    kpts: tuple[int, ...] | None = None
    head: tuple[int, ...] | None = None

    def part(self, name: str) -> list[tuple[int, int, Block]]:
        """(stage, index in the stage, block) of ``backbone``, ``rpn``, ``bbox``, ``mask`` or ``kpts``, in order."""
        chosen: tuple[int, ...] | None = getattr(self, name)
        if chosen is None and name == "backbone":
            chosen = tuple(range(len(self.stages) - 1))
        if chosen is None and name != "rpn":
            chosen = self.head
        return [
            (stage, index, block)
            for stage, blocks in enumerate(self.stages)
            if not chosen or stage in chosen
            for index, block in enumerate(blocks)
        ]


def _rows(kind: str, *rows: tuple[float, int, int, int]) -> tuple[Block, ...]:
    """Blocks of one kind from rows (expansion, channels, how many, stride of the first of them)."""
    return tuple(
        Block(kind, expansion, channels, stride if index == 0 else 1)
        for expansion, channels, count, stride in rows
        for index in range(count)
    )


ARCHITECTURES = {
    "default": Architecture(
        first=(32, 2, 3),
        stages=(
            _rows("ir_k3", (1, 16, 1, 1)),
            _rows("ir_k3", (6, 24, 2, 2)),
            _rows("ir_k3", (6, 32, 3, 2)),
            _rows("ir_k3", (6, 64, 4, 2), (6, 96, 3, 1)),
            _rows("ir_k3", (4, 160, 1, 2), (6, 160, 2, 1), (6, 240, 1, 1)),
            _rows("ir_k3", (6, 96, 3, 1)),
            _rows("ir_k3", (4, 160, 1, 1), (6, 160, 3, 1), (3, 80, 1, -2)),
        ),
        backbone=(0, 1, 2, 3),
        bbox=(4,),
        rpn=(5,),
        mask=(6,),
    ),
    "xirb16d_dsmask": Architecture(
        first=(16, 2, 3),
        stages=(
            _rows("ir_k3", (1, 16, 1, 1)),
            _rows("ir_k3", (6, 32, 2, 2)),
            _rows("ir_k3", (6, 48, 3, 2)),
            _rows("ir_k3", (6, 96, 4, 2), (6, 128, 3, 1)),
            _rows("ir_k3", (4, 128, 1, 2), (6, 128, 2, 1), (6, 160, 1, 1)),
            _rows("ir_k3", (4, 128, 1, 2), (6, 128, 2, 1), (6, 128, 1, -2), (3, 64, 1, -2)),
            _rows("ir_k3", (6, 128, 3, 1)),
        ),
        backbone=(0, 1, 2, 3),
        bbox=(4,),
        mask=(5,),
        rpn=(6,),
    ),
    "mobilenet_v2": Architecture(
        first=(32, 2, 3),
        stages=(
            _rows("ir_k3", (1, 16, 1, 1)),
            _rows("ir_k3", (6, 24, 2, 2)),
            _rows("ir_k3", (6, 32, 3, 2)),
            _rows("ir_k3", (6, 64, 4, 2), (6, 96, 3, 1)),
            _rows("ir_k3", (6, 160, 3, 1), (6, 320, 1, 1)),
        ),
        backbone=(0, 1, 2, 3),
        bbox=(4,),
    ),
    "cham_v1a": Architecture(
        first=(32, 2, 3),
        stages=(
            _rows("ir_k3", (1, 24, 1, 1)),
            _rows("ir_k7", (4, 48, 2, 2)),
            _rows("ir_k3", (7, 64, 5, 2)),
            _rows("ir_k5", (12, 56, 7, 2)) + _rows("ir_k3", (8, 88, 5, 1)),
            _rows("ir_k3", (7, 152, 4, 2), (10, 104, 1, 1)),
            _rows("ir_k3", (8, 88, 3, 1)),
        ),
        backbone=(0, 1, 2, 3),
        bbox=(4,),
        rpn=(5,),
    ),
    "cham_v2": Architecture(
        first=(32, 2, 3),
        stages=(
            _rows("ir_k3", (1, 24, 1, 1)),
            _rows("ir_k5", (8, 32, 4, 2)),
            _rows("ir_k7", (5, 48, 6, 2)),
            _rows("ir_k5", (9, 56, 3, 2)) + _rows("ir_k3", (6, 56, 6, 1)),
            _rows("ir_k3", (2, 160, 6, 2), (6, 112, 1, 1)),
            _rows("ir_k3", (6, 56, 1, 1)),
        ),
        backbone=(0, 1, 2, 3),
        bbox=(4,),
        rpn=(5,),
    ),
}


def architecture_from_json(text: str) -> Architecture:
    """An architecture from maskrcnn-benchmark's JSON (``MODEL.FBNET.ARCH_DEF``).

    ``block_op_type`` lists the kind of every block, one list a stage; ``block_cfg`` has ``first`` [channels, stride] or
    [channels, stride, kernel size], ``stages`` with rows [expansion, channels, how many, stride], ``last`` [channels,
    scale] whose scale the configuration replaces, and the stages of each part.

    Raises:
        ValueError: it is not JSON, or an entry is missing or of the wrong form; the message names it.
    """
    try:
        definition = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error
    entries: dict[str, Any] = {}
    try:
        entries = {**definition, **definition["block_cfg"]}
        kinds, rows = entries["block_op_type"], entries["stages"]
        if [len(stage) for stage in kinds] != [sum(row[2] for row in stage) for stage in rows]:
            raise ValueError("block_op_type and block_cfg.stages have other numbers of blocks")
        first = tuple(int(value) for value in entries["first"])
        return Architecture(
            first=(first[0], first[1], first[2] if len(first) > 2 else 3),
            stages=tuple(
                _with_kinds(stage_kinds, stage_rows) for stage_kinds, stage_rows in zip(kinds, rows, strict=True)
            ),
            last=int(entries["last"][0]),
            **{
                name: None if entries.get(name) is None else tuple(int(stage) for stage in entries[name])
                for name in ("backbone", "rpn", "bbox", "mask", "kpts", "head")
            },
        )
    except KeyError as error:
        raise ValueError(f"no entry {error}") from error
    except (TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"an entry has the wrong form: {error}") from error


def _with_kinds(kinds: Iterable[str], rows: Sequence[Sequence[Any]]) -> tuple[Block, ...]:
    blocks = _rows("", *((row[0], int(row[1]), row[2], _stride(row[3])) for row in rows))  # type: ignore[arg-type]
    return tuple(
        Block(str(kind), block.expansion, block.channels, block.stride)
        for kind, block in zip(kinds, blocks, strict=True)
    )


def _stride(value: Any) -> Stride:
    return (int(value[0]), int(value[1])) if isinstance(value, list) else int(value)
