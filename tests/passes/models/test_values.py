"""Values taken apart: every tensor is found, wherever it stands, and what can't be compared is named."""

from collections import OrderedDict, UserDict, deque
from dataclasses import FrozenInstanceError, dataclass, field
from enum import Enum
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from passes.models.values import comparable, leaves, mapped, plain, tensors_in

A, B, C = (torch.full((2,), float(i)) for i in range(3))


@dataclass(frozen=True)
class Boxes:
    corners: Any
    label: str = "box"


@dataclass
class Late:
    given: Any
    made: Any = field(init=False, default=None)


class Pair(NamedTuple):
    first: Any
    second: Any


@dataclass
class Both(OrderedDict):
    """As the outputs of transformers: a dataclass that is a dict."""

    logits: Any = None
    states: Any = None

    def __post_init__(self):
        self["logits"] = self.logits


class Colour(Enum):
    RED = 1


@pytest.mark.parametrize(
    ("value", "places"),
    [
        (A, ["out"]),
        ((A, [B, C]), ["out[0]", "out[1][0]", "out[1][1]"]),
        ({"a": A, 3: {"b": B}}, ["out['a']", "out[3]['b']"]),
        (Boxes(A), ["out.corners", "out.label"]),
        (Boxes(Pair(A, [B])), ["out.corners.first", "out.corners.second[0]", "out.label"]),
        (Both(A, (B,)), ["out.logits", "out.states[0]"]),
        (UserDict(a=A), ["out['a']"]),
        (deque([A, B]), ["out[0]", "out[1]"]),
        ([], []),
        (None, ["out"]),
    ],
)  # fmt: skip
def test_every_leaf_has_its_place(value, places):
    assert [place for place, _ in leaves(value, "out")] == places


@pytest.mark.parametrize(
    "value", [(A, [B]), {"a": A}, Boxes(A), Boxes(Pair(A, B)), Both(A, B), UserDict(a=A), deque([A]), Late(A)]
)
def test_every_tensor_is_changed_in_a_copy_of_the_same_type(value):
    before = tensors_in(value)
    twin = mapped(value, lambda x: x + 10)
    assert type(twin) is type(value)
    assert [x.tolist() for x in tensors_in(twin)] == [(x + 10).tolist() for x in before]
    assert all(x is y for x, y in zip(tensors_in(value), before, strict=True))


def test_a_copied_dataclass_is_as_frozen_as_it_was_and_has_all_fields():
    with pytest.raises(FrozenInstanceError):
        mapped(Boxes(A), torch.clone).corners = B
    late = Late(A)
    late.made = B
    assert mapped(late, lambda x: x + 1).made.tolist() == [2, 2]
    assert mapped(Both(A, B), lambda x: x + 1)["logits"].tolist() == [1, 1]


def test_numbers_become_tensors_and_the_rest_is_compared_as_it_is():
    found = comparable({"loss": 0.1, "count": 3, "name": "x", "none": None, "kind": Colour.RED, "z": 1j}, "out")
    assert (found["out['loss']"].dtype, found["out['z']"].dtype) == (torch.float64, torch.complex128)
    assert float(found["out['loss']"]) == 0.1
    rest = [found[f"out[{key!r}]"] for key in ("count", "name", "none", "kind")]
    assert rest == [3, "x", None, Colour.RED]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"boxes": SimpleNamespace(a=A)}, r"^out\['boxes'\] is a SimpleNamespace, which can't be taken apart"),
        (Boxes(object()), r"^out\.corners is a object"),
        ([{A}], r"^out\[0\] is a set"),
        (Boxes, r"^out is a type"),
        ([A.to_sparse()], r"^out\[0\] is a sparse tensor"),
        (torch.nested.nested_tensor([A, A[:1]], layout=torch.jagged), "^out is a nested tensor"),
    ],
)
def test_what_cannot_be_compared_is_refused_with_its_place(value, message):
    with pytest.raises(ValueError, match=message):
        comparable(value, "out")


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions")
def test_quantized_tensors_are_refused():
    with pytest.raises(ValueError, match=r"^out is a quantized tensor"):
        comparable(torch.quantize_per_tensor(A, 0.1, 0, torch.quint8), "out")


def test_plain_containers():
    found = plain((Boxes(Pair(A, B)), OrderedDict(x=[Both(C)])))
    assert [type(x) for x in (found, found[0], found[0]["corners"], found[1], found[1]["x"][0])] == [
        tuple, dict, tuple, dict, dict,
    ]  # fmt: skip
    assert found[1]["x"][0].keys() == {"logits"}
