"""A small LLaVA, and rows of texts and pictures for it, the same for every contender.

Written once as Loom reads them (texts, files of pictures, a Hugging Face folder to start from) and once as ids, for the
peers. Pictures are smooth noise: a JPEG of it is as large as one of a photograph, and as slow to decode.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from scripts.bench import workload

TILE, PATCH, TOWER_WIDTH, TOWER_LAYERS = 112, 14, 256, 4
FEATURES = (TILE // PATCH) ** 2
"""Tokens of a picture."""
DECODER_LAYERS = 6
IMAGE = workload.VOCABULARY - 1
"""Id of the token that stands for a feature; the last word gives way to it."""
PHOTOS = ((640, 480), (480, 640), (800, 600), (512, 512), (1024, 768), (320, 240))
SAME_SAMPLES, SAME_LENGTH = 8, 128
"""Of the batch in which all samples are equally long."""
LONGEST = 1024
"""Tokens of the longest of the mixed samples, and of a packed row."""


@dataclass(frozen=True)
class Sample:
    """Ids as the model sees them, and the files of the pictures among them."""

    ids: list[int]
    prompt: int
    """So many of the ids are not learnt."""
    images: list[str]


def same_samples(folder: Path) -> list[Sample]:
    """A batch without an excuse for padding: one picture each, all equally long."""
    rng = np.random.default_rng(0)
    draw_pictures(folder, rng, SAME_SAMPLES, ((TILE, TILE),), "png")
    words = SAME_LENGTH - FEATURES
    return [_sample(rng, [f"{i}.png"], words // 2, words - words // 2) for i in range(SAME_SAMPLES)]


def mixed_samples(folder: Path, samples: int, pictures: int = 64) -> list[Sample]:
    """Of ten, four are texts with log-normal lengths, four have a picture and a short text (every second of them a
    caption of some words), two have two to six pictures among their text."""
    rng = np.random.default_rng(1)
    draw_pictures(folder, rng, pictures, PHOTOS, "jpg")
    made = []
    for number in range(samples):
        kind = number % 10
        median = (160, 40, 24)[0 if kind < 4 else 1 if kind < 8 else 2]
        words = int(np.exp(rng.normal(np.log(median), 0.9)).clip(8, LONGEST - 8))
        count = 0 if kind < 4 else 1 if kind < 8 else int(rng.integers(2, 7))
        words = min(words, LONGEST - count * FEATURES)
        names = [f"{i}.jpg" for i in rng.integers(pictures, size=count)]
        made.append(_sample(rng, names, words // 3, words - words // 3))
    return [made[i] for i in rng.permutation(samples)]


def write(folder: Path, samples: list[Sample]) -> None:
    """Write model and tokenizer (`start`), the rows (`rows.jsonl`) and the ids (`ids.jsonl`) into ``folder``."""
    write_model(folder / "start")
    write_tokenizer(folder / "start")
    workload.write_lines(folder / "rows.jsonl", map(row_of, samples))
    workload.write_lines(folder / "ids.jsonl", map(asdict, samples))


def read(folder: Path) -> list[Sample]:
    """The samples that ``write`` left."""
    return [Sample(**json.loads(line)) for line in (folder / "ids.jsonl").read_text().splitlines()]


def write_model(folder: Path) -> None:
    """A LLaVA with fresh weights, and its processor's settings."""
    import torch
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    tower = CLIPVisionConfig(
        hidden_size=TOWER_WIDTH,
        intermediate_size=4 * TOWER_WIDTH,
        num_hidden_layers=TOWER_LAYERS,
        num_attention_heads=4,
        image_size=TILE,
        patch_size=PATCH,
    )
    text = workload.llama_config(num_hidden_layers=DECODER_LAYERS)
    # The last layer's features, so that nobody leaves out a layer that the other one runs.
    config = LlavaConfig(vision_config=tower, text_config=text, image_token_index=IMAGE, vision_feature_layer=-1)
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    size = {"height": TILE, "width": TILE}
    CLIPImageProcessorPil(size={"shortest_edge": TILE}, crop_size=size).save_pretrained(folder)


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of whole words, one of them a picture's."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<eos>": workload.EOS, "<pad>": workload.PAD, "<image>": IMAGE}
    vocabulary |= {f"w{i}": i for i in range(workload.FIRST_WORD, IMAGE)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>").save_pretrained(folder)


def draw_pictures(
    folder: Path, rng: np.random.Generator, count: int, sizes: tuple[tuple[int, int], ...], kind: str
) -> None:
    """Write 0.KIND, 1.KIND, ... of these sizes in turn."""
    for number in range(count):
        width, height = sizes[number % len(sizes)]
        colours = rng.integers(256, size=(height // 16, width // 16, 3), dtype=np.uint8)
        smooth = Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC)
        grain = rng.normal(0, 6, (height, width, 3))
        pixels = (np.asarray(smooth) + grain).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.{kind}")


def _sample(rng: np.random.Generator, images: list[str], prompt: int, completion: int) -> Sample:
    """So many words before the answer, the pictures spread among them, and so many after, the end included."""
    words = np.minimum(workload.zipf_words(rng, prompt + completion - 1), IMAGE - 1).tolist()
    asked, ids = words[:prompt], []
    for number in range(len(images) + 1):
        ids += asked[number * prompt // (len(images) + 1) : (number + 1) * prompt // (len(images) + 1)]
        ids += [IMAGE] * FEATURES if number < len(images) else []
    return Sample([*ids, *words[prompt:], workload.EOS], len(ids), images)


def row_of(sample: Sample) -> dict[str, Any]:
    """The sample as Loom reads it."""
    asked, at = [], 0
    while at < sample.prompt:
        picture = sample.ids[at] == IMAGE
        asked.append("<image>" if picture else f"w{sample.ids[at]}")
        at += FEATURES if picture else 1
    answer = " " + workload.as_text(sample.ids[sample.prompt : -1])
    return {"images": sample.images, "prompt": " ".join(asked), "completion": answer}
