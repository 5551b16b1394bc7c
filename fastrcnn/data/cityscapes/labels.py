"""The labels of Cityscapes that matter for instances (``cityscapesscripts.helpers.labels``)."""

from __future__ import annotations

# Those that have instances, with their ids; an instance's id in the images is id * 1000 + number, a group's is the id.
CLASS_IDS = {
    "person": 24,
    "rider": 25,
    "car": 26,
    "truck": 27,
    "bus": 28,
    "caravan": 29,
    "trailer": 30,
    "train": 31,
    "motorcycle": 32,
    "bicycle": 33,
}
CLASSES = tuple(CLASS_IDS)
# The benchmark ignores the other two.
EVALUATED = tuple(name for name in CLASSES if name not in ("caravan", "trailer"))
# unlabeled, ego vehicle, rectification border, out of roi, static, dynamic, ground, parking, rail track, guard rail,
# bridge, tunnel, polegroup, and groups of caravans and trailers: a detection there is neither right nor wrong.
VOID_IDS = (0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30)
FIRST_INSTANCE_ID = 1000
