"""Which encoder layer's token enters which LM layer (paper, equation 1; conventions 1 to 3)."""

from dataclasses import dataclass

from epalm.config import VariantConfig
from epalm.errors import EpalmError


@dataclass(frozen=True)
class InjectionPlan:
    """Where perceptual tokens are placed.

    Attributes:
        source: for every LM layer, which of the n encoder layers' perceptual tokens are put first
            in its input; None where nothing is put there.
    """

    source: tuple[int | None, ...]

    @property
    def start(self) -> int:
        """First injection layer; below it the sequence has no perceptual token."""
        return next(i for i, s in enumerate(self.source) if s is not None)

    @classmethod
    def spread(cls, lm_layers: int, start: int, end: int, n: int, step: int = 1) -> "InjectionPlan":
        """Spread n tokens over the layers `start <= i < end` with `i % step == 0`, in order.

        Each token serves (end - start) // n layers in a row, at least one; the last token serves
        what is left over (convention 3).
        """
        stride = max((end - start) // n, 1)
        source = tuple(
            min((i - start) // stride, n - 1) if start <= i < end and i % step == 0 else None
            for i in range(lm_layers)
        )
        return cls(source)

    @classmethod
    def explicit(
        cls, levels: dict[int, int], lm_layers: int, encoder_layers: int
    ) -> "InjectionPlan":
        """LM layer to encoder layer, free of any rule (tables 9 and 14).

        Raises:
            EpalmError: layers that do not exist.
        """
        for what, named, count in (
            ("LM", levels.keys(), lm_layers),
            ("encoder", levels.values(), encoder_layers),
        ):
            wrong = sorted(layer for layer in named if not 0 <= layer < count)
            if wrong:
                raise EpalmError(
                    f"variant.levels: {what} layer {wrong[0]} wanted, there are 0 to {count - 1}"
                )
        used = sorted(set(levels.values()))
        return cls(tuple(used.index(levels[i]) if i in levels else None for i in range(lm_layers)))

    @classmethod
    def from_config(
        cls, variant: VariantConfig, lm_layers: int, encoder_layers: int
    ) -> "InjectionPlan":
        """The plan of a recipe for an LM and an encoder with so many layers.

        Raises:
            EpalmError: layers that do not exist, or encoder layers that would never be used.
        """
        n = variant.encoder_layers
        if variant.levels is not None:
            return cls.explicit(variant.levels, lm_layers, encoder_layers)
        start = lm_layers // 2 if variant.inject_start is None else variant.inject_start
        end = lm_layers if variant.inject_end is None else variant.inject_end
        start, end = (i + lm_layers if i < 0 else i for i in (start, end))
        if n > encoder_layers:
            raise EpalmError(
                f"variant.encoder_layers: {n} wanted, the encoder has {encoder_layers}"
            )
        if not 0 <= start < end <= lm_layers:
            raise EpalmError(
                f"variant.inject_start, inject_end: {start} to {end} does not fit an LM of "
                f"{lm_layers} layers; need start < end <= {lm_layers}"
            )
        if start % variant.text_step:
            raise EpalmError(
                f"variant.inject_start: {start} is not divisible by text_step {variant.text_step}"
            )
        plan = cls.spread(lm_layers, start, end, n, variant.text_step)
        unused = sorted(set(range(n)) - set(plan.source))
        if unused:
            raise EpalmError(
                f"variant: with layers {start} to {end} and text_step {variant.text_step}, only "
                f"{n - len(unused)} of the {n} encoder layers would ever be used; lower "
                "variant.encoder_layers or widen the injection"
            )
        return plan
