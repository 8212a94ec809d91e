"""Encoders with random weights in the formats that real ones come in: weights change no rate."""

from pathlib import Path
from typing import Any

import timm
import torch

_NARROW: dict[str, Any] = {
    "hidden_size": 192,
    "num_attention_heads": 3,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
}


def vit(folder: Path, small: bool) -> None:
    """A ViT-B/16, as timm keeps one."""
    name = "vit_tiny_patch16_224" if small else "vit_base_patch16_224"
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0)
    timm.models.save_for_hf(model, folder, safe_serialization=True)


def timesformer(folder: Path, small: bool) -> None:
    """A TimeSformer-B of 8 frames, as Hugging Face keeps one."""
    from transformers import TimesformerConfig, TimesformerModel

    torch.manual_seed(0)
    TimesformerModel(TimesformerConfig(**(_NARROW if small else {}))).save_pretrained(folder)


def ast(folder: Path, small: bool) -> None:
    """An AST-B with its preprocessing, as Hugging Face keeps one."""
    from transformers import ASTConfig, ASTFeatureExtractor, ASTModel

    torch.manual_seed(0)
    ASTModel(ASTConfig(**(_NARROW if small else {}))).save_pretrained(folder)
    ASTFeatureExtractor().save_pretrained(folder)
