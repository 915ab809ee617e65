"""The interpreter: whoever runs a graph node by node does so by this one, as the graph's code would run."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.fx.immutable_collections import immutable_list


class Interpreter(fx.Interpreter):
    """torch.fx's, which gives a node's lists as it keeps them, but for this: functions may write to a list they get.

    Swin3d's attention does so to its window sizes.
    """

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A node's arguments, lists as plain ones."""
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return tuple(map(_plain, args)), {key: _plain(value) for key, value in kwargs.items()}


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, immutable_list) else value
