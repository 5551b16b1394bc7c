"""The order of a cell's anchors, which decides the order of the channels that predict for them.

maskrcnn-benchmark and torchvision go through the ratios and, for each, the sizes; detectron2 the other way round. It
matters where a level has several of both: C4 models and RetinaNet. RetinaNet's deltas are also scaled: by
(10, 10, 5, 5) in maskrcnn-benchmark, by 1 in the others.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastrcnn.weights.content import BOX_DELTAS, CELL_ANCHORS, CLASS_LOGITS

RETINANET_SCALE = (10.0, 10.0, 5.0, 5.0)
DEFAULT_RATIOS = 3


def style_of(tensors: Mapping[str, Tensor]) -> str | None:
    """Whose rule made the cell anchors among ``tensors``; None without them.

    maskrcnn-benchmark's lie around (stride - 1) / 2, the others' around 0; torchvision's are whole numbers.
    """
    cells = [cell.double() for name, cell in tensors.items() if name.startswith(CELL_ANCHORS)]
    if not cells:
        return None
    if any(float((cell[:, :2] + cell[:, 2:]).abs().max()) > 0.5 for cell in cells):
        return "maskrcnn_benchmark"
    whole = all(bool((cell == cell.round()).all()) for cell in cells)
    return "torchvision" if whole else "detectron2"


def num_ratios(tensors: Mapping[str, Tensor]) -> int | None:
    """How many aspect ratios the cell anchors among ``tensors`` have; None without them."""
    cell = tensors.get(f"{CELL_ANCHORS}0")
    if cell is None:
        return None
    offset = 1.0 if style_of(tensors) == "maskrcnn_benchmark" else 0.0
    width, height = (cell.double()[:, 2:] - cell.double()[:, :2] + offset).unbind(1)
    ratio, area = (height / width).log(), (height * width).log()
    if len(cell) < 2:
        return 1
    # Whichever changes less from the first anchor to the second is the outer loop; rounding makes neither exact.
    outer = ratio if abs(float(ratio[1] - ratio[0])) < abs(float(area[1] - area[0])) else area
    inner = int(((outer - outer[0]).abs() < 0.2).to(torch.int64).cumprod(0).sum())
    return len(cell) // inner if outer is ratio else inner


def reorder(tensors: dict[str, Tensor], source: str, target: str, ratios: int | None) -> list[str]:
    """Put the channels of the last layers from the anchors' order in ``source`` into that in ``target``, in place.

    Args:
        source, target: styles.
        ratios: number of aspect ratios; None where it is not known: three then.

    Returns:
        what was changed, one sentence each.
    """
    deltas = tensors.get(f"{BOX_DELTAS}weight")
    if deltas is None:
        return []
    anchors = len(deltas) // 4
    count = ratios or DEFAULT_RATIOS
    done = []
    if (source == "detectron2") != (target == "detectron2") and anchors % count == 0 and anchors > count > 1:
        sizes = anchors // count
        outer, inner = (sizes, count) if source == "detectron2" else (count, sizes)
        for name in [n for n in tensors if n.startswith((CLASS_LOGITS, BOX_DELTAS))]:
            value = tensors[name]
            columns = len(value) // anchors
            swapped = value.reshape(outer, inner, columns, *value.shape[1:]).transpose(0, 1)
            tensors[name] = swapped.reshape(value.shape).contiguous()
        done.append(f"the order of the {anchors} anchors ({sizes} sizes, {count} ratios)")
    if any(name.startswith("rpn.head.cls_tower.") for name in tensors):
        scaled_source, scaled_target = source == "maskrcnn_benchmark", target == "maskrcnn_benchmark"
        if scaled_source != scaled_target:
            factor = torch.tensor(RETINANET_SCALE, dtype=torch.float64)
            for name in [n for n in tensors if n.startswith(BOX_DELTAS)]:
                value = tensors[name]
                rows = factor.repeat(len(value) // 4).reshape(-1, *[1] * (value.dim() - 1))
                scaled = value.double() * rows if scaled_target else value.double() / rows
                tensors[name] = scaled.to(value.dtype)
            done.append("the scale of RetinaNet's deltas ((10, 10, 5, 5) in maskrcnn-benchmark, 1 elsewhere)")
    return done
