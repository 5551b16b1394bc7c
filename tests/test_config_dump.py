"""Writing a configuration and reading it back."""

from __future__ import annotations

import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic.fields import FieldInfo

from fastrcnn.config import Config, dump_config, load_config
from fastrcnn.config.describe import leaves
from tests.config_helpers import OWN_KEYS, load_text, lookup, nested, upstream_defaults

REPOSITORY = Path(__file__).resolve().parent.parent


def strategy(annotation: Any, metadata: list[Any]) -> st.SearchStrategy[Any]:
    """Values that a key of this type accepts."""
    origin, items = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        extra = [part for item in items[1:] for part in (item.metadata if isinstance(item, FieldInfo) else [item])]
        return strategy(items[0], metadata + extra)
    bound = {name: getattr(item, name) for item in metadata for name in ("ge", "gt", "le", "lt") if hasattr(item, name)}
    least = max((getattr(item, "min_length", 0) for item in metadata), default=0)
    if origin is Literal:
        return st.sampled_from(items)
    if origin in (Union, types.UnionType):
        return st.one_of([strategy(item, []) for item in items])
    if origin is tuple and items[-1] is Ellipsis:
        return st.lists(strategy(items[0], []), min_size=least, max_size=4).map(tuple)
    if origin is tuple:
        return st.tuples(*[strategy(item, []) for item in items])
    if annotation is bool:
        return st.booleans()
    if annotation is int:
        return st.integers(bound.get("ge", -(2**40)), bound.get("le", 2**40))
    if annotation is float:
        low, high = bound.get("ge", bound.get("gt")), bound.get("le", bound.get("lt"))
        return st.floats(
            low, high, exclude_min="gt" in bound, exclude_max="lt" in bound, allow_nan=False, allow_infinity=False
        )
    if annotation is str:
        if any(getattr(item, "pattern", None) for item in metadata):
            return st.sampled_from(["cpu", "cuda", "cuda:0", "cuda:12"])
        return st.text(min_size=least, max_size=12)
    blocks = st.recursive(
        st.integers(-5, 5) | st.booleans() | st.text(max_size=3) | st.floats(0, 1),
        lambda inner: st.lists(inner, max_size=3).map(tuple),
        max_leaves=5,
    )
    return blocks


# Keys bound to each other by config_checks: free values of these would nearly always be refused. The 66 files of the
# peers, which are round-tripped above, vary them together.
COUPLED: tuple[str, ...] = (
    "DATALOADER.SHAPE_BUCKETS",
    "CONV_BODY",
    "TRANS_FUNC",
    "USE_FPN",
    "POOLER",
    "ANCHOR_",
    "_ON",
    "RPN_ONLY",
    "EXTRACTOR",
    "PREDICTOR",
)
COUPLED += ("IOU_THRESHOLD", "SIZE", "STEPS", "RESOLUTION", "GROUP_NORM", "RESNETS.NUM_GROUPS")
# Reading a file or words gives other keys the defaults of the convention, which validating values alone does not.
COUPLED += ("MODEL.CONVENTION", "MASK_SHARES")
FREE = {name: field for name, field in leaves().items() if not any(part in name for part in COUPLED)}


@st.composite
def settings_of_free_keys(draw: st.DrawFn) -> dict[str, Any]:
    names = draw(st.lists(st.sampled_from(sorted(FREE)), min_size=1, max_size=12, unique=True))
    return {name: draw(strategy(FREE[name].annotation, list(FREE[name].metadata))) for name in names}


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flat=settings_of_free_keys())
@pytest.mark.filterwarnings("ignore::fastrcnn.config.ConfigWarning")
def test_dump_reads_back_equal(tmp_path: Path, flat: dict[str, Any]) -> None:
    cfg = Config.model_validate(nested(flat))
    for name, value in flat.items():
        assert lookup(cfg, name) == value
    again = load_text(tmp_path, dump_config(cfg))
    assert again == cfg
    assert dump_config(again) == dump_config(cfg)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(flat=settings_of_free_keys())
@pytest.mark.filterwarnings("ignore::fastrcnn.config.ConfigWarning")
def test_command_line_says_the_same_as_values(flat: dict[str, Any]) -> None:
    words = [word for name, value in flat.items() for word in (name, repr(value))]
    assert load_config(None, words) == Config.model_validate(nested(flat))


def test_dump_is_in_the_order_of_the_schema_and_plain() -> None:
    text = dump_config(load_config(REPOSITORY / "configs/e2e_mask_rcnn_R_50_FPN_1x.yaml"))
    tree = yaml.safe_load(text)

    def flatten(section: dict[str, Any], prefix: str = "") -> list[str]:
        return [
            name
            for key, value in section.items()
            for name in (flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key])
        ]

    assert flatten(tree) == list(leaves())
    assert "  STEPS: [60000, 80000]\n" in text
    assert "&" not in text
    assert "!!" not in text


def test_dump_without_own_keys_is_what_upstreams_reader_accepts() -> None:
    """yacs refuses unknown keys and, but for tuple and list, any value of another type than its default."""
    tree = yaml.safe_load(dump_config(load_config(None, ["SOLVER.BASE_LR", "1"]), own_keys=False))
    for name, default in upstream_defaults().items():
        value = tree
        for part in name.split("."):
            value = value[part]
        wanted = list if isinstance(default, (tuple, list)) else type(default)
        assert type(value) is wanted, name
    assert not any(name.rpartition(".")[2] in yaml.safe_dump(tree) for name in OWN_KEYS)
