"""One thread: hosts of width 32 only wait for each other on more."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


HERE = Path(__file__).parent

# The methods that all others are compared with meet every core host in the fast part of the suite;
# the others meet one there, and the rest of their cross product is slow by its sheer number.
THOROUGH = ("none", "random", "slice", "tome", "pitome", "evit")
FIRST_HOST = "timm-class"
# What takes long for one method or one backbone, whichever it is.
LONG = (
    *("test_exports_for_any_batch", "test_onnx", "test_compiles_to_one_graph"),
    *("test_checkpointing_changes_no_gradient", "test_bfloat16", "test_features_only"),
    *("test_intermediates_are_maps_of_the_run", "test_an_image_does_not_depend_on_its_batch"),
    *("test_is_registered_with_a_configuration", "test_has_the_published_cost"),
    *("test_classifier_can_be_changed", "test_loads_its_own_state"),
    *("test_groups_hold_every_parameter",),
)


# What takes long for every method and is the exporter's work: one method is enough.
ONCE = ("test_onnx",)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent != HERE or not hasattr(item, "callspec"):
            continue
        params = item.callspec.params
        method, host = params.get("method"), params.get("host", FIRST_HOST)
        name = item.name.partition("[")[0]
        other = isinstance(method, str) and method not in THOROUGH
        again = name in ONCE and method != "tome"
        if (
            again
            or (other and (host != FIRST_HOST or name in LONG))
            or ("backbone" in params and name in LONG)
        ):
            item.add_marker(pytest.mark.slow)
