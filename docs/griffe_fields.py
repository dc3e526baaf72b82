"""An extension of mkdocstrings: pydantic's `layers: int = Field(2, ge=1)` is shown as `layers: int = 2`, at least 1."""

from typing import Any

import griffe

_BOUNDS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}


class Fields(griffe.Extension):
    """Replaces the value of a field by its default, and adds the bounds to its description."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Called for every attribute."""
        call = attr.value
        if not isinstance(call, griffe.ExprCall) or str(call.function) not in ("Field", "pydantic.Field"):
            return
        named = {one.name: one.value for one in call.arguments if isinstance(one, griffe.ExprKeyword)}
        positional = [one for one in call.arguments if not isinstance(one, griffe.ExprKeyword)]
        attr.value = (positional or [named.get("default")])[0]
        bounds = [f"{words} {named[name]}" for name, words in _BOUNDS.items() if name in named]
        if bounds and attr.docstring:
            attr.docstring.value += f" {', '.join(bounds).capitalize()}."
