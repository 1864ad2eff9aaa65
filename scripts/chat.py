"""Talk to a model in the terminal.

    python scripts/chat.py --model runs/quickstart/hf                    a conversation
    python scripts/chat.py --model runs/quickstart --prompt "What is the capital of France?"
    python scripts/chat.py --model DIR --image cat.png --prompt "What is this?"
    python scripts/chat.py --model DIR < questions.txt > answers.txt     a conversation from a file, a message a line

DIR is a Hugging Face folder, a run of Loom or one of its checkpoints, or a Megatron checkpoint. The conversation goes
through the model's chat template and the answer is printed as it is made. Decoding is greedy unless --temperature is
above 0. Ctrl-C stops an answer, Ctrl-D ends. Exit code 0: done; 1: the model or the question cannot be used; 2: a
mistake in the command line.

Commands in a conversation (a message that begins with / needs a space before it; a line that ends with \\ goes on):
  /help                     these lines
  /set KEY=VALUE ...        change settings: /set temperature=0.7 top_p=0.9 max_new_tokens=512
  /image PATH               show a picture with the next question (again for another); <image> in it says where
  /video PATH               show a video: an animation, or a folder of frames; <video> in the question says where
  /system TEXT              set the system prompt; alone, take it away
  /show                     model, settings, and the tokens used
  /retry                    answer the last question anew
  /undo                     take back the last question and its answer
  /reset                    forget the conversation; settings and system prompt stay
"""

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import closing, suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.generation import GeneratorConfig
from models.generation.dialogue import Dialogue
from trainer.failure import told_clearly
from trainer.inference.conversation import Conversation, TooLong, settings_shown
from trainer.inference.loading import DTYPES, generator_of, open_text_model
from trainer.inference.settings import device_of, words_of

COMMANDS = (__doc__ or "").partition("\n\nCommands in")[2].rstrip()


class Terminal:
    """A conversation line by line: answers on stdout, all else on stderr."""

    def __init__(self, talk: Conversation, about: str) -> None:
        self.talk, self.about, self.typed = talk, about, sys.stdin.isatty()
        self.commands = {
            "help": self.help, "set": self.set, "system": self.system, "show": self.show, "retry": self.retry,
            "undo": self.undo, "reset": self.reset, "image": self.image, "video": self.video,
        }  # fmt: skip

    def run(self) -> None:
        """Take lines until the input ends. Without a terminal there is no prompt, and answers stand alone."""
        if self.typed:
            with suppress(ImportError):  # arrow keys in the line; not on every system
                import readline  # noqa: F401
            say(f"{self.about}\nType a message. /help lists the commands, Ctrl-C stops an answer, Ctrl-D ends.")
        while True:
            try:
                line = self.read()
            except EOFError:
                if self.typed:
                    say("")
                return
            except KeyboardInterrupt:
                if not self.typed:
                    raise
                say("\n(Ctrl-D ends)")
                continue
            try:
                self.take(line)
            except ValueError as error:
                say(str(error))

    def read(self) -> str:
        """A message or command; lines that end with a backslash go on in the next."""
        line = input("\nyou> " if self.typed else "")
        while line.endswith("\\"):
            line = line[:-1] + "\n" + input("...> " if self.typed else "")
        return line

    def take(self, line: str) -> None:
        """One line: a message or a command.

        Raises:
            ValueError: it cannot be done.
        """
        try:
            line.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError("this line is not UTF-8 and was passed over") from error
        if not line.startswith("/"):
            if line.strip():
                self.answer(line.strip())
            return
        name, _, rest = line[1:].partition(" ")
        if name not in self.commands:
            raise ValueError(
                f"/{name}: no such command; there are /{', /'.join(self.commands)}. "
                "A message that begins with / needs a space before it"
            )
        self.commands[name](rest.strip())

    def answer(self, question: str) -> None:
        """Print the answer as it comes, and why it ended early."""
        talk = self.talk
        try:
            with closing(talk.answer(question)) as pieces:
                for piece in pieces:
                    print(piece, end="", flush=True)
        except KeyboardInterrupt:
            if not self.typed:
                raise
            print()
            kept = "what came of the answer stays" if talk.last and talk.last.tokens else "the question is forgotten"
            say(f"(stopped; {kept})")
            return
        except TooLong as error:
            way_out = ": /undo takes back the last turn, /reset forgets all" if talk.turns else ""
            raise ValueError(f"{error}{way_out}") from error
        print(flush=True)
        if early := ended_early(talk):
            say(f"({early})")

    def help(self, _: str) -> None:
        say(f"Commands in{COMMANDS}")

    def set(self, words: str) -> None:
        if not words:
            raise ValueError("/set needs settings, such as /set temperature=0.7; /show shows them")
        self.talk.set(words_of(words))
        say(f"({settings_shown(self.talk.sampling)})")

    def image(self, path: str) -> None:
        if not path:
            raise ValueError("/image needs the path of a picture")
        self.talk.show(path)
        say(f"(shown with the next question: {', '.join(self.talk.images)})")

    def video(self, path: str) -> None:
        if not path:
            raise ValueError("/video needs the path of an animation or of a folder of frames")
        self.talk.show(path, video=True)
        say(f"(shown with the next question: {', '.join(self.talk.videos)})")

    def system(self, text: str) -> None:
        self.talk.set_system(text or None)
        say("(the system prompt is set)" if text else "(the system prompt is taken away)")

    def show(self, _: str) -> None:
        talk, last = self.talk, self.talk.last
        say(self.about)
        say(f"settings: {settings_shown(talk.sampling)}")
        say(f"system prompt: {'that of the chat template, if it has one' if talk.system is None else talk.system}")
        say(f"conversation: {len(talk.turns) // 2} turns, {talk.tokens():,} of {talk.context:,} tokens")
        if last is not None and last.tokens:
            rate = f", {(last.tokens - 1) / (last.seconds - last.first_s):.1f} tokens/s" if last.tokens > 1 else ""
            say(f"last answer: {last.tokens} tokens after {last.prompt_tokens:,}, first in {last.first_s:.2f} s{rate}")

    def retry(self, _: str) -> None:
        self.answer(self.talk.undo())

    def undo(self, _: str) -> None:
        say(f"(taken back: {self.talk.undo()})")
        self.talk.images.clear()
        self.talk.videos.clear()

    def reset(self, _: str) -> None:
        self.talk.reset()
        say("(forgotten)")


def ended_early(talk: Conversation) -> str:
    """Why the last answer is not whole, and the way out; empty if it is."""
    last = talk.last
    if last is None or last.finish != "length":
        return ""
    if last.prompt_tokens + last.tokens >= talk.context:
        return f"the context of {talk.context:,} tokens is full: /reset forgets the conversation, /undo the last turn"
    return f"cut at max_new_tokens={last.tokens}; more: /set max_new_tokens={4 * last.tokens} and /retry"


def say(text: str) -> None:
    """To the person, not into the answers."""
    sys.stdout.flush()
    print(text, file=sys.stderr, flush=True)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="the checkpoint")
    parser.add_argument("--prompt", help="one question; without it a conversation starts")
    parser.add_argument("--image", action="append", default=[], metavar="PATH", help="shown with the first question")
    parser.add_argument("--video", action="append", default=[], metavar="PATH", help="as --image; see /video")
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="longest answer, in tokens (default: 128)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 = greedy (default), 1 = the model's own")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling with --temperature (default: 0)")
    parser.add_argument("--tokenizer", metavar="DIR", help="its folder, where it does not lie with the model")
    parser.add_argument("--chat-template", metavar="FILE", help="to be used instead of the model's own")
    parser.add_argument("--precision", choices=DTYPES, help="of weights and cache (default: fp32; on a GPU bf16)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    args = parser.parse_args(argv)
    if args.max_new_tokens < 1:
        parser.error(f"--max-new-tokens {args.max_new_tokens}: give at least 1")
    if not args.temperature >= 0:
        parser.error(f"--temperature {args.temperature}: give 0 (greedy) or more")
    for option in ("prompt", "system"):
        if (text := getattr(args, option)) is not None and not text.strip():
            parser.error(f"--{option} is empty; leave it out")
    return args


def open_talk(args: argparse.Namespace) -> tuple[Conversation, str]:
    """The conversation, and a line about its model.

    Raises:
        ValueError: there is no such model, it cannot be used, or it has no chat template.
    """
    device = device_of(args.device)
    precision = args.precision or ("fp32" if device.type == "cpu" else "bf16")
    found = open_text_model(args.model, tokenizer=args.tokenizer, chat_template=args.chat_template)
    if found.render is None:
        raise ValueError(
            f"{found.folder}: the tokenizer has no chat template, so a conversation cannot be written down; "
            "name one with --chat-template FILE"
        )
    config = GeneratorConfig(max_rows=1, max_cached_tokens=found.opened.cfg.max_seq_len)
    generator = generator_of(found, device=device, dtype=precision, config=config)
    given: dict[str, Any] = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "seed": args.seed}
    about = f"{args.model}: {found.opened.cfg.family}, {precision} on {device}"
    talk = Conversation(Dialogue(generator), found.render, given, args.system, eyes=found.eyes)
    for path in args.image:
        talk.show(path)
    for path in args.video:
        talk.show(path, video=True)
    return talk, about


def main() -> int:
    args = arguments()
    try:
        talk, about = open_talk(args)
        if args.prompt is None:
            Terminal(talk, about).run()
            return 0
        for piece in talk.answer(args.prompt):
            print(piece, end="", flush=True)
        print(flush=True)
        if early := ended_early(talk):
            say(f"chat: {early.partition(';')[0]}")
    except ValueError as error:
        print(f"chat: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # whoever read the answers has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


if __name__ == "__main__":
    assert isinstance(sys.stdin, TextIOWrapper) and isinstance(sys.stdout, TextIOWrapper)
    sys.stdin.reconfigure(errors="surrogateescape")  # a line that is not UTF-8 ends nothing
    sys.stdout.reconfigure(errors="replace")
    with told_clearly(0):
        sys.exit(main())
