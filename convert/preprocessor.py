"""preprocessor_config.json and its like: how transformers prepares pictures and videos for a model as is done here."""

from typing import Any

from models.vision.config import VisionConfig

FILE = "preprocessor_config.json"
VIDEO_FILE = "video_preprocessor_config.json"
WHOLE_FILE = "processor_config.json"
COPIED = (FILE, WHOLE_FILE, VIDEO_FILE)
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
    images, side = vision.images, vision.tower.image_size
    image_class, whole_class = CLASSES[vision.format]
    square = {"height": side, "width": side}
    own: dict[str, Any] = {"size": square}
    if images.mode == "native":
        own = _native(vision, images.min_pixels, images.max_pixels)
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
    return names | STEPS | _colours(vision) | own


def video_config(vision: VisionConfig) -> dict[str, Any] | None:
    """The content of video_preprocessor_config.json; None for a format whose videos are pictures."""
    if vision.images.mode != "native" or vision.format not in CLASSES:
        return None
    names = {"video_processor_type": "Qwen2VLVideoProcessor", "processor_class": CLASSES[vision.format][1]}
    own = _native(vision, vision.images.video_min_pixels, vision.images.video_max_pixels)
    return names | STEPS | _colours(vision) | own | {"cap_pixels_per_frame": False}


def processor_config(vision: VisionConfig) -> dict[str, Any] | None:
    """The content of processor_config.json: how many tokens stand for a picture; None where nothing has to be said."""
    if vision.format not in CLASSES:
        return None
    tower = vision.tower
    own: dict[str, Any] = {}
    if vision.format in ("llava", "llava_next"):
        own = {"patch_size": tower.patch_size, "num_additional_image_tokens": int(tower.has_class)}
        own["vision_feature_select_strategy"] = "full" if tower.keep_class or not tower.has_class else "default"
        own["image_token"] = vision.images.token
    elif vision.format == "internvl":
        own = {"image_seq_length": (tower.grid // vision.connector.block) ** 2}
    elif vision.format == "blip2":
        own = {"num_query_tokens": vision.features_per_tile}
    return {"processor_class": CLASSES[vision.format][1]} | own if own else None


def _native(vision: VisionConfig, least: int, most: int) -> dict[str, Any]:
    own: dict[str, Any] = {"min_pixels": least, "max_pixels": most, "merge_size": vision.connector.block}
    own |= {"patch_size": vision.tower.patch_size, "temporal_patch_size": vision.tower.frames}
    return own | {"size": {"shortest_edge": least, "longest_edge": most}}


def _colours(vision: VisionConfig) -> dict[str, Any]:
    images = vision.images
    return {"image_mean": list(images.mean), "image_std": list(images.std), "resample": RESAMPLE[images.resample]}
