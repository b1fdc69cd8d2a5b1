"""Image-text models behind one interface, each saved in the format of the library it comes from."""

from plait_clip.model.callable_model import CallableModel
from plait_clip.model.image_input import ImageInput, ProcessorInput
from plait_clip.model.interface import ImageTextModel, image_text_model, on_device
from plait_clip.model.open_clip_model import OpenClipModel
from plait_clip.model.tokenizer import WordTokenizer
from plait_clip.model.transformers_model import TransformersModel

__all__ = [
    "CallableModel",
    "ImageInput",
    "ImageTextModel",
    "OpenClipModel",
    "ProcessorInput",
    "TransformersModel",
    "WordTokenizer",
    "image_text_model",
    "on_device",
]
