"""The rollouts of a step: texts for prompts, answers of a task between them, and the rule rewards.

Every rank calls alike and gets the same; functions of the user's are called on one rank for each sample, and what they
said is told to all. What a sample draws depends on the run's seed, its prompt, the step and its number alone.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from data.chat import Render
from data.formats import RowError
from data.peers import Peers
from data.prompt import Prompt
from models.generation import Completion
from trainer.rollout.config import TASK, RolloutConfig
from trainer.rollout.crew import Crew, Job
from trainer.rollout.rewards import Rewards, Tell
from trainer.rollout.rounds import ROUND_S, Rounds
from trainer.rollout.tasks import Continuation
from trainer.rollout.types import Answer, Finish, Rollout, Turn, Writer
from trainer.rollout.worker import Call, Outcome

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass
class _Draft:
    """A rollout that grows."""

    prompt: Prompt
    sample: int
    tokens: list[int]
    learn: list[bool]
    log_probs: list[float]
    turns: list[Turn] = field(default_factory=list)
    finish: Finish | None = None
    task_reward: float = 0.0
    errors: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def of(prompt: Prompt, sample: int) -> _Draft:
        """One without a text."""
        count = len(prompt.tokens)
        return _Draft(prompt, sample, list(prompt.tokens), [False] * count, [0.0] * count)

    def add(self, role: str, text: str, tokens: Sequence[int], log_probs: Sequence[float] | None = None) -> None:
        """A turn; of the policy where there are log-probabilities."""
        start = len(self.tokens)
        self.tokens += tokens
        self.learn += [log_probs is not None] * len(tokens)
        self.log_probs += [0.0] * len(tokens) if log_probs is None else log_probs
        self.turns.append(Turn(role, text, start, len(self.tokens)))

    def rollout(self) -> Rollout:
        """As it stands at its end."""
        assert self.finish is not None
        text = next((turn.text for turn in reversed(self.turns) if turn.learnt), "")
        parts = tuple(self.tokens), tuple(self.learn), tuple(self.log_probs)
        turns = tuple(self.turns)
        return Rollout(self.prompt, self.sample, *parts, text, self.finish, turns, errors=self.errors)


class Rollouter:
    """Makes rollouts.

    Args:
        render: the chat template, None where prompts are plain texts.
        seed: the run's.
        peers: all ranks; each calls with the same arguments.
        tell: takes what the user should see (the first error of each function).
        every_s: see `Rounds`; functions may take longer than a rank may wait for another.
    """

    def __init__(
        self,
        cfg: RolloutConfig,
        tokenizer: Any,
        render: Render | None,
        seed: int,
        peers: Peers,
        tell: Tell,
        every_s: float = ROUND_S,
    ) -> None:
        self.cfg, self.tokenizer, self.seed, self.peers, self.tell = cfg, tokenizer, seed, peers, tell
        self.rounds = Rounds(peers, every_s)
        self.crew = Crew(cfg.workers, self.rounds.tick, every_s)
        self.rewards = Rewards(cfg, self.crew, tell)
        self.continuation = Continuation(tokenizer, render, cfg.task_role)
        self._step: tuple[int, bool] | None = None
        self._asked: Counter[int] = Counter()
        self._told: set[str] = set()

    def check(self) -> None:
        """Load the user's functions and try the chat template, on every rank together.

        Raises:
            ValueError: something of that cannot be used; on every rank alike.
        """
        message = ""
        try:
            self.rewards.check()
            if self.cfg.task is not None:
                self.continuation.check()
                (outcome,) = self.crew.load([self._task()])
                if outcome.error:
                    message = f"rollout.task={self.cfg.task} cannot be loaded: {outcome.error}"
        except ValueError as error:
            message = str(error)
        told = [each for each in self.peers.all_gather(message) if each]
        if told:
            raise ValueError(told[0])

    def collect(self, prompts: Sequence[Prompt], writer: Writer, step: int, evaluation: bool = False) -> list[Rollout]:
        """All samples of each prompt, one prompt after another, with the rule rewards.

        Args:
            step: of the run; the same prompt has other texts in another step. A prompt that comes again within a step
                has further samples.
            evaluation: with `eval_samples` and `eval_temperature`; the draws are the same at every step.
        """
        if self._step != (step, evaluation):
            self._step = (step, evaluation)
            self._asked.clear()
        samples = self.cfg.eval_samples if evaluation else self.cfg.samples
        drafts: list[_Draft] = []
        seeds: list[int] = []
        for prompt in prompts:
            again = self._asked[prompt.number]
            self._asked[prompt.number] += 1
            seeds.append(_seed(self.seed, prompt.number, -1 if evaluation else step, again))
            drafts += [_Draft.of(prompt, again * samples + sample) for sample in range(samples)]
        settings = self.cfg.sampling(evaluation)
        made = writer.write([prompt.tokens for prompt in prompts], samples, settings, seeds, prompts)
        for draft, completion in zip(drafts, (each for texts in made for each in texts), strict=True):
            self._take(draft, completion)
        if self.cfg.task is not None:
            self._converse(drafts, writer, step, evaluation)
        rollouts = [self._with_task(draft) for draft in drafts]
        return self.rewards.added(rollouts, self._dealt(rollouts, self.rewards.judged))

    def close(self) -> None:
        """End the processes that run functions."""
        self.crew.close()

    def _take(self, draft: _Draft, completion: Completion) -> None:
        """The policy's next text. What goes beyond its room is cut off: its tokens are drawn one by one, so the text
        is the one that a smaller limit gives."""
        if completion.finish == "error":
            draft.finish = "length" if draft.turns else "error"
            draft.errors["generation"] = completion.error
            return
        room = self._room(draft)
        tokens, text = completion.tokens, completion.text
        log_probs = completion.model_log_probs if completion.log_probs is None else completion.log_probs
        assert log_probs is not None, "the writer was asked for log-probabilities"
        draft.finish = completion.finish
        if len(tokens) > room:
            draft.finish, tokens, text = "length", tokens[:room], None
        if text is None:
            text = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        draft.add("assistant", text, tokens, log_probs[: len(tokens)])

    def _converse(self, drafts: Sequence[_Draft], writer: Writer, step: int, evaluation: bool) -> None:
        """Let the task answer and the policy go on until each conversation has ended."""
        open_drafts = [draft for draft in drafts if draft.finish == "stop"]
        for turn in range(1, self.cfg.max_turns + 1):
            outcomes = self._dealt(open_drafts, self._answers)
            going = [
                draft
                for draft, outcome in zip(open_drafts, outcomes, strict=True)
                if self._goes_on(draft, outcome, turn == self.cfg.max_turns)
            ]
            if not going:
                return
            place = -1 if evaluation else step
            seeds = [_seed(self.seed, each.prompt.number, place, each.sample, turn) for each in going]
            settings = replace(self.cfg.sampling(evaluation), max_new_tokens=max(map(self._room, going)))
            shown = [each.prompt for each in going]
            made = writer.write([tuple(each.tokens) for each in going], 1, settings, seeds, shown)
            for draft, (completion,) in zip(going, made, strict=True):
                self._take(draft, completion)
            open_drafts = [draft for draft in going if draft.finish == "stop"]

    def _answers(self, drafts: Sequence[_Draft]) -> list[Outcome]:
        """What the task says to each."""
        call = self._task()
        return self.crew.run([Job(call, (each.prompt, tuple(each.turns)), self.cfg.task_timeout) for each in drafts])

    def _goes_on(self, draft: _Draft, outcome: Outcome, last: bool) -> bool:
        """Take the task's answer; whether the policy writes again."""
        if outcome.error:
            self._failed(draft, outcome.error, outcome.trace)
            return False
        answer = outcome.value if isinstance(outcome.value, Answer) else None
        text = outcome.value if answer is None else answer.text
        draft.task_reward += 0.0 if answer is None else answer.reward
        if isinstance(text, float):
            self._failed(draft, f"it returned {text}, neither an Answer nor a text nor None")
        if not isinstance(text, str):
            return False
        if last:
            draft.finish = "turns"
            return False
        try:
            tokens = self.continuation.tokens(draft.prompt, draft.turns, draft.tokens[-1], text)
        except RowError as error:
            self._failed(draft, str(error))
            return False
        if len(tokens) >= self._room(draft):
            draft.finish = "length"
            return False
        draft.add(self.cfg.task_role, text, tokens)
        return True

    def _failed(self, draft: _Draft, error: str, trace: str = "") -> None:
        draft.errors[TASK] = error
        shown = f"\n{trace.rstrip()}" if trace else ""
        self._once("error", f"rollout.task={self.cfg.task}: {error}. This sample ends there; more are counted{shown}")

    def _with_task(self, draft: _Draft) -> Rollout:
        """The rollout, with the task's part of the reward."""
        found = draft.rollout()
        if any(each.function == TASK for each in self.cfg.rewards):
            return replace(found, rewards={TASK: draft.task_reward})
        if draft.task_reward:
            self._once(
                "reward", "the task gives rewards, and nobody takes them: add {function: task} to rollout.rewards"
            )
        return found

    def _dealt(self, items: Sequence[Item], work: Callable[[Sequence[Item]], list[Result]]) -> list[Result]:
        """What `work` makes of each item; every rank has its share of them, and gets everything."""
        rank, world = self.peers.rank, self.peers.world
        parts = self.rounds.run(lambda: work(items[rank::world]))
        return [parts[number % world][number // world] for number in range(len(items))]

    def _task(self) -> Call:
        assert self.cfg.task is not None
        return Call.of(self.cfg.task, self.cfg.task_arguments)

    def _room(self, draft: _Draft) -> int:
        """Tokens that may still be added."""
        return len(draft.prompt.tokens) + self.cfg.max_new_tokens - len(draft.tokens)

    def _once(self, what: str, text: str) -> None:
        if what not in self._told:
            self._told.add(what)
            self.tell(text)


def _seed(*numbers: int) -> int:
    """A seed of 63 bits, for these numbers alone."""
    text = ",".join(map(str, numbers))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1
