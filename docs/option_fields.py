"""An extension of griffe: classes of options show their fields alone, each with its plain default."""

from __future__ import annotations

from typing import Any

import griffe


class OptionFields(griffe.Extension):
    """Options are keywords of a function: what else a class of options can do is nothing that a caller needs."""

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        if not cls.name.endswith(("Options", "Settings")):
            return
        for name, member in list(cls.members.items()):
            if not member.is_attribute or "property" in member.labels:
                cls.del_member(name)
            elif isinstance(member.value, griffe.ExprCall) and str(member.value.function) == "field":
                member.value = default_of(member.value)


def default_of(field: griffe.ExprCall) -> griffe.Expr | str | None:
    """What a field of a dataclass is when it is not given; None when it must be given."""
    for argument in field.arguments:
        if isinstance(argument, griffe.ExprKeyword) and argument.name == "default":
            return argument.value
        if isinstance(argument, griffe.ExprKeyword) and argument.name == "default_factory":
            return f"{argument.value}()"
    return None
