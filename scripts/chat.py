"""Talk to a Hugging Face folder, such as one written by scripts/export_hf.py.

    python scripts/chat.py --model runs/quickstart/hf --prompt "What is the capital of France?"
    python scripts/chat.py --model runs/quickstart/hf                    a conversation in the terminal

The conversation goes through the tokenizer's chat template and the answer is printed as it is made. Generation is the
one of the `transformers` library: it shows that the exported folder is a plain Hugging Face one. Loom has no generator
of its own yet. Decoding is greedy unless --temperature is above 0.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

Conversation = list[dict[str, str]]


def check_folder(folder: Path) -> None:
    """Says what is wrong with a folder before anything is loaded.

    Raises:
        ValueError: no such folder, a run folder instead of an exported one, or a file that a model needs is missing.
    """
    if not folder.is_dir():
        raise ValueError(f"--model {folder}: no such folder. Give a Hugging Face folder (config.json and safetensors).")
    if (folder / "checkpoints").is_dir():
        raise ValueError(
            f"--model {folder}: this is a run folder. Export it first: python scripts/export_hf.py {folder} {folder}/hf"
        )
    if not (folder / "config.json").is_file():
        raise ValueError(f"--model {folder}: has no config.json, so it is not a Hugging Face model folder.")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"--model {folder}: has no *.safetensors file, so there are no weights to load.")


class Chat:
    """A model, its tokenizer and how to sample; answers are streamed to the terminal."""

    def __init__(self, folder: Path, max_new_tokens: int, temperature: float) -> None:
        """Loads the model: fp32 on a CPU, the stored precision on a GPU.

        Raises:
            ValueError: the folder is not a model, its weights are broken, or its tokenizer has no chat template.
        """
        check_folder(folder)
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            # Any: transformers types these two more narrowly than they behave.
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype="auto" if device == "cuda" else torch.float32, local_files_only=True
            )
            self.model = model.to(device)
        except Exception as error:  # the libraries raise many kinds for a broken folder; all mean the same here
            raise ValueError(f"--model {folder}: cannot be loaded ({type(error).__name__}: {error})") from error
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"--model {folder}: its tokenizer has no chat template, so a conversation cannot be written down. "
                f"Put a chat_template.jinja file into the folder."
            )
        self.streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.max_new_tokens = max_new_tokens
        self.sampling: dict[str, Any] = {"do_sample": temperature > 0}
        if temperature > 0:
            self.sampling["temperature"] = temperature
        if self.model.generation_config.pad_token_id is None:
            self.model.generation_config.pad_token_id = self.tokenizer.eos_token_id

    def answer(self, conversation: Conversation) -> str:
        """Prints the assistant's next turn as it comes and returns it.

        Raises:
            ValueError: the conversation and the answer together do not fit the model's context.
        """
        inputs = self.tokenizer.apply_chat_template(
            conversation, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(self.model.device)
        num_tokens = inputs["input_ids"].shape[1]
        longest = getattr(self.model.config, "max_position_embeddings", num_tokens + self.max_new_tokens)
        if num_tokens + self.max_new_tokens > longest:
            raise ValueError(
                f"{num_tokens} tokens so far and --max-new-tokens {self.max_new_tokens} exceed the model's context of "
                f"{longest}. Use a shorter prompt or a smaller --max-new-tokens; in a conversation, /new starts afresh."
            )
        output = self.model.generate(
            **inputs, max_new_tokens=self.max_new_tokens, streamer=self.streamer, **self.sampling
        )
        return self.tokenizer.decode(output[0, num_tokens:], skip_special_tokens=True)


def converse(chat: Chat) -> None:
    """Questions from the keyboard until the input ends; what was said before stays in the conversation."""
    print("Type a message. /new forgets the conversation, Ctrl-D ends.")
    conversation: Conversation = []
    while True:
        try:
            text = input("\nyou> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text == "/new":
            conversation = []
            print("(forgotten)")
            continue
        if not text:
            continue
        asked = [*conversation, {"role": "user", "content": text}]
        try:
            reply = chat.answer(asked)
        except ValueError as error:
            print(error)
        except KeyboardInterrupt:
            print("\n(stopped; this turn is forgotten)")
        else:
            conversation = [*asked, {"role": "assistant", "content": reply}]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--prompt", help="one question; without it a conversation starts")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="longest answer, in tokens (default: 128)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 = greedy (default), 1 = the model's own")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling with --temperature (default: 0)")
    args = parser.parse_args()
    if args.max_new_tokens < 1:
        parser.error(f"--max-new-tokens {args.max_new_tokens}: give at least 1")
    if args.temperature < 0:
        parser.error(f"--temperature {args.temperature}: give 0 (greedy) or more")
    if args.prompt is not None and not args.prompt.strip():
        parser.error("--prompt is empty; leave it out for a conversation")
    return args


def main() -> int:
    args = arguments()
    try:
        chat = Chat(args.model, args.max_new_tokens, args.temperature)
        import torch

        torch.manual_seed(args.seed)
        if args.prompt is None:
            converse(chat)
        else:
            chat.answer([{"role": "user", "content": args.prompt}])
    except ValueError as error:
        print(f"chat: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
