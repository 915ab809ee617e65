"""Whole models: copies, their record as plain data, their masked reference."""

from passes.models.adoption import adopt
from passes.models.comparing import difference, kinds
from passes.models.copying import copy_inputs, copy_model, unhooked_copy
from passes.models.detectors import is_detector
from passes.models.hyperparameters import agree
from passes.models.record import (
    Record,
    check_regroupable,
    cut_from_record,
    describe,
    named_tensors,
    plan_from_record,
    ties,
    transient,
)
from passes.models.reference import as_rows, masked_reference, rows_by_name
from passes.models.values import Plain, comparable, give_plain_outputs, mapped, shapes_of, tensors_in

__all__ = [
    "Plain",
    "Record",
    "adopt",
    "agree",
    "as_rows",
    "check_regroupable",
    "comparable",
    "copy_inputs",
    "copy_model",
    "cut_from_record",
    "describe",
    "difference",
    "give_plain_outputs",
    "is_detector",
    "kinds",
    "mapped",
    "masked_reference",
    "named_tensors",
    "plan_from_record",
    "rows_by_name",
    "shapes_of",
    "tensors_in",
    "ties",
    "transient",
    "unhooked_copy",
]
