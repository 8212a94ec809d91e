"""What all sections of a recipe share."""

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


def _can_name_a_folder(text: str) -> str:
    if not re.fullmatch(r"\w[\w.-]*", text):
        raise ValueError(
            "a folder is named by it: letters, digits, _, - and . only, the first no - or ."
        )
    return text


Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, AfterValidator(_can_name_a_folder)]


class Section(BaseModel):
    """Base of all sections: unknown keys, non-finite numbers and switches that are none are
    refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _only_switches_are_switched(cls, tree: Any) -> Any:
        """`patience: yes` would be a patience of 1."""
        for name, value in tree.items() if isinstance(tree, dict) else ():
            field = cls.model_fields.get(name)
            if isinstance(value, bool) and field and field.annotation is not bool:
                raise ValueError(f"{name} is no switch; it cannot be {str(value).lower()}")
        return tree

    def changed(self) -> list[str]:
        """Fields that are not at their defaults, in their order."""
        return [
            name
            for name, field in type(self).model_fields.items()
            if getattr(self, name) != field.default
        ]
