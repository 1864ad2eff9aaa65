"""preprocessor_config.json: how transformers prepares pictures for a model as they are prepared here."""

from typing import Any

from models.vision.config import VisionConfig

FILE = "preprocessor_config.json"
COPIED = (FILE, "processor_config.json", "video_preprocessor_config.json")
RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}
"""Pillow's numbers."""
STEPS = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True, "rescale_factor": 1 / 255}
CLASSES = {
    "llava": ("CLIPImageProcessor", "LlavaProcessor"),
    "llava_next": ("LlavaNextImageProcessor", "LlavaNextProcessor"),
    "internvl": ("GotOcr2ImageProcessor", "InternVLProcessor"),
    "blip2": ("BlipImageProcessor", "Blip2Processor"),
    "clip": ("CLIPImageProcessor", "CLIPProcessor"),
    "siglip": ("SiglipImageProcessor", "SiglipProcessor"),
    "qwen2_vl": ("Qwen2VLImageProcessor", "Qwen2VLProcessor"),
    "qwen2_5_vl": ("Qwen2VLImageProcessor", "Qwen2_5_VLProcessor"),
}

CROPPED = ("llava", "clip", "siglip")
"""Formats whose pictures are one tile: the middle square, or all of it."""


def preprocessor_config(vision: VisionConfig) -> dict[str, Any] | None:
    """The content of preprocessor_config.json; None for a format that transformers does not know."""
    if vision.format not in CLASSES:
        return None
    images, tower, side = vision.images, vision.tower, vision.tower.image_size
    image_class, whole_class = CLASSES[vision.format]
    square = {"height": side, "width": side}
    own: dict[str, Any] = {"size": square}
    if images.mode == "native":
        own = {"min_pixels": images.min_pixels, "max_pixels": images.max_pixels, "patch_size": tower.patch_size}
        own |= {"size": {"shortest_edge": images.min_pixels, "longest_edge": images.max_pixels}}
        own |= {"temporal_patch_size": tower.frames, "merge_size": vision.connector.block}
    elif images.mode == "tiles":
        own |= {"crop_to_patches": True, "min_patches": images.min_tiles, "max_patches": images.max_tiles}
    elif images.mode == "anyres":
        own = {"size": {"shortest_edge": side}, "crop_size": square, "do_center_crop": True, "do_pad": True}
        own |= {"image_grid_pinpoints": [list(grid) for grid in images.grids]}
    elif vision.format in CROPPED and images.fit == "crop":
        own = {"size": {"shortest_edge": side}, "crop_size": square, "do_center_crop": True}
    elif vision.format in CROPPED:
        image_class, own = "SiglipImageProcessor", {"size": square}
    names = {"image_processor_type": image_class, "processor_class": whole_class}
    colours = {"image_mean": list(images.mean), "image_std": list(images.std), "resample": RESAMPLE[images.resample]}
    return names | STEPS | colours | own
