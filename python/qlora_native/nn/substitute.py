"""Classes that take another's place in a model: subclasses of it, under its name."""

from __future__ import annotations

from typing import Any

from torch import nn


class Substitute(nn.Module):
    """First base of such a class; the second is the class replaced. Copies and pickles keep the substitution."""

    @classmethod
    def members(cls, base: type[nn.Module]) -> dict[str, Any]:
        """Class attributes that depend on the class replaced."""
        return {}

    def __reduce_ex__(self, protocol: Any) -> Any:
        kind, base = type(self).__bases__
        return _blank, (kind, base), self.__getstate__() if hasattr(self, "__getstate__") else vars(self)


_made: dict[tuple[type[Substitute], type[nn.Module]], type[nn.Module]] = {}


def substitute_class(kind: type[Substitute], base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of ``base`` with ``kind``'s forward; the same one every time."""
    if (kind, base) not in _made:
        told = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
        _made[kind, base] = type(base.__name__, (kind, base), {**told, **kind.members(base)})
    return _made[kind, base]


def _blank(kind: type[Substitute], base: type[nn.Module]) -> nn.Module:
    made = substitute_class(kind, base)
    return made.__new__(made)
