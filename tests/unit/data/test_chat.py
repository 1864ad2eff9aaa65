"""The loss mask against templates of the kinds in use: the decoded learnt text must be the assistant's, exactly."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from data.chat import ChatTemplate, special_tokens, template_renderer
from data.encode import Encoder, mask_from_spans
from data.formats import Chat, Completion, RowError, Text
from data.tokenizer import describe

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}"
    "{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}"
    "{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') }}"
    "{{ m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{{ m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
THINKING = (  # as Qwen3: reasoning only after the last question, an empty block if the last answer has none
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% set answer = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% if loop.index0 > ns.last %}"
    "{{ '<think>\n' + (thought if '</think>' in m.content else '') + '\n</think>\n\n' }}{% endif %}{{ answer }}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_STOP = (
    "{% for m in messages %}{{ m.role | capitalize + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)
EOS_AT_END = (
    "{% for m in messages %}{{ m.role + ': ' + m.content }}{% if loop.last %}{{ eos_token }}{% else %}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
TOOLS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% for c in m.tool_calls or [] %}"
    "{{ '\n<tool_call>' + c.function.arguments.city + '</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIALS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
TEXTS = ["The quick brown fox jumps over the lazy dog.\n\n", "assistant user system\nWhat is it? It is 42, yes."] * 20
QA = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "It is 42."}]


def byte_level(eos: str, bos: str | None = None) -> PreTrainedTokenizerFast:
    """As GPT-2, SmolLM2, Llama 3 and Qwen."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, pad_token=eos, bos_token=bos)


def metaspace() -> PreTrainedTokenizerFast:
    """As Llama 2: a space is part of the word behind it, bytes for what the vocabulary lacks."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tail = [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), *tail])
    in_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>", "<s>", "</s>", *in_bytes], show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def learnt(
    tokenizer: Any, template: str, messages: list[dict[str, Any]], first_target: int = 0
) -> tuple[list[str], int, int]:
    """(each run of learnt tokens decoded, turns, of them with a stop token)."""
    encoder = make_encoder(tokenizer, template)
    (prepared,) = encoder.prepare(Chat(messages, first_target))
    made = encoder.encode([prepared])[0]
    runs: list[list[int]] = []
    for index, (token, learn) in enumerate(zip(made.tokens_L, made.learn_L, strict=True)):
        if learn:
            if index == 0 or not made.learn_L[index - 1]:
                runs.append([])
            runs[-1].append(int(token))
    return [tokenizer.decode(run) for run in runs], prepared.turns, prepared.stops


def make_encoder(tokenizer: Any, template: str, loss_on: str = "assistant") -> Encoder:
    render = template_renderer(tokenizer, template, "template.jinja")
    chat = ChatTemplate(render, special_tokens(tokenizer), tokenizer.eos_token, tokenizer.bos_token)
    return Encoder(tokenizer, describe(tokenizer), lambda: chat, loss_on)


def test_chatml_with_default_system_prompt_and_pad_equal_to_eos() -> None:
    tokenizer = byte_level("<|im_end|>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    more = [{"role": "user", "content": "It is 42.<|im_end|>?"}, {"role": "assistant", "content": "  yes 🙂 \n"}]
    runs, turns, stops = learnt(tokenizer, CHATML, QA + more)
    assert runs == ["It is 42.<|im_end|>", "  yes 🙂 \n<|im_end|>"]
    assert (turns, stops) == (2, 2)


def test_llama2_style_stop_after_a_space_and_stripped_answers() -> None:
    padded = {"role": "assistant", "content": "\n It is 42. "}
    messages = [{"role": "system", "content": "be brief"}, QA[0], padded, *QA]
    runs, turns, stops = learnt(metaspace(), LLAMA2, messages)
    assert [run.strip() for run in runs] == ["It is 42. </s>", "It is 42. </s>"]
    assert (turns, stops) == (2, 2)


def test_llama3_style_stop_is_not_the_eos_token_and_answers_are_trimmed() -> None:
    tokenizer = byte_level("</s>", "<s>")
    messages = [QA[0], {"role": "assistant", "content": "\n\nIt is 42.\n"}, *QA]
    runs, turns, stops = learnt(tokenizer, LLAMA3, messages)
    assert runs == ["It is 42.<|eot_id|>", "It is 42.<|eot_id|>"]
    assert (turns, stops) == (2, 2)


def test_thinking_template_learns_what_the_model_has_to_write() -> None:
    """Earlier turns lose their reasoning in the text, the last one gets a block: both follow the rendering."""
    tokenizer = byte_level("<|im_end|>")
    thought = {"role": "assistant", "content": "<think>\nsix by seven\n</think>\n\nIt is 42."}
    runs, _, stops = learnt(tokenizer, THINKING, [QA[0], thought, QA[0], thought])
    assert runs == ["It is 42.<|im_end|>", "<think>\nsix by seven\n</think>\n\nIt is 42.<|im_end|>"]
    assert stops == 2
    runs, _, _ = learnt(tokenizer, THINKING, [*QA, *QA])
    assert runs == ["It is 42.<|im_end|>", "<think>\n\n</think>\n\nIt is 42.<|im_end|>"]


def test_template_without_stop_token_reports_none() -> None:
    runs, turns, stops = learnt(byte_level("</s>"), NO_STOP, [*QA, *QA])
    assert runs == [" It is 42.", " It is 42."]  # the space before a word is part of its token
    assert (turns, stops) == (2, 0)


def test_stop_only_at_the_end_is_partly() -> None:
    runs, turns, stops = learnt(byte_level("</s>"), EOS_AT_END, [*QA, *QA])
    assert runs == [" It is 42.", " It is 42.</s>"]
    assert (turns, stops) == (2, 1)


def test_next_turns_opening_mark_is_no_stop_token() -> None:
    template = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% endfor %}"
    runs, turns, stops = learnt(byte_level("</s>"), template, [*QA, *QA])
    assert runs == ["It is 42.", "It is 42."]
    assert (turns, stops) == (2, 0)


def test_tool_calls_are_the_assistants() -> None:
    call = {"function": {"name": "weather", "arguments": {"city": "It is"}}}
    asked = {"role": "assistant", "content": "yes", "tool_calls": [call]}
    messages = [QA[0], asked, {"role": "tool", "content": "42"}, QA[1]]
    runs, _, stops = learnt(byte_level("<|im_end|>"), TOOLS, messages)
    assert runs == ["yes\n<tool_call>It is</tool_call><|im_end|>", "It is 42.<|im_end|>"]
    assert stops == 2


def test_only_the_completions_answers_count_from_first_target_on() -> None:
    other = [QA[0], {"role": "assistant", "content": "yes"}]
    runs, turns, _ = learnt(byte_level("<|im_end|>"), CHATML, [*QA, *other], first_target=3)
    assert (runs, turns) == (["yes<|im_end|>"], 1)


def test_answer_that_imitates_the_template_is_learnt_whole() -> None:
    fake = "42<|im_end|>\n<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\nyes"
    runs, _, _ = learnt(byte_level("<|im_end|>"), CHATML, [QA[0], {"role": "assistant", "content": fake}, *QA])
    assert runs == [f"{fake}<|im_end|>", "It is 42.<|im_end|>"]


def test_same_answers_and_questions_many_times() -> None:
    runs, turns, stops = learnt(byte_level("<|im_end|>"), CHATML, QA * 6)
    assert runs == ["It is 42.<|im_end|>"] * 6
    assert (turns, stops) == (6, 6)


@pytest.mark.parametrize("content", ["", " ", "Q7x0x7Q", "{{ m }}", "it\u0307 ﬁ 日本語 👩‍👩‍👧"])
def test_odd_contents(content: str) -> None:
    runs, _, stops = learnt(byte_level("<|im_end|>"), CHATML, [QA[0], {"role": "assistant", "content": content}, *QA])
    assert runs == [f"{content}<|im_end|>", "It is 42.<|im_end|>"]
    assert stops == 2


def test_a_token_across_the_border_is_learnt() -> None:
    """The tokenizer makes one token of the template's new line and the answer's: without it the answer had a hole."""
    runs, _, _ = learnt(byte_level("<|im_end|>"), CHATML, [QA[0], {"role": "assistant", "content": "\n\n."}])
    assert runs == ["\n\n\n.<|im_end|>"]


def test_rows_whose_answers_cannot_be_found_are_refused() -> None:
    tokenizer = byte_level("<|im_end|>")
    twice = "{% for m in messages %}{{ m.role + ': ' + m.content + m.content }}{% endfor %}"
    with pytest.raises(RowError, match="more than once"):
        make_encoder(tokenizer, twice).prepare(Chat(QA))
    shouting = "{% for m in messages %}{{ m.role + ': ' + m.content | replace('It', 'Id') + ' ' }}{% endfor %}"
    with pytest.raises(RowError, match="cannot tell where an answer ends"):
        make_encoder(tokenizer, shouting).prepare(Chat(QA))
    telling = "{% for m in messages %}{{ m.content | length ~ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    with pytest.raises(RowError, match="depending on its content"):
        make_encoder(tokenizer, telling).prepare(Chat(QA))
    with pytest.raises(RowError, match="roles must alternate"):
        make_encoder(metaspace(), LLAMA2).prepare(Chat([QA[0], QA[0]]))


def test_a_turn_the_template_leaves_out_is_not_learnt() -> None:
    last_two = (
        "{% for m in messages[-2:] %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    )
    other = [QA[0], {"role": "assistant", "content": "yes"}]
    runs, turns, stops = learnt(byte_level("<|im_end|>"), last_two, [*QA, *other])
    assert (runs, turns, stops) == (["yes<|im_end|>"], 1, 1)


def test_no_template_and_bad_template_are_the_users_to_mend() -> None:
    tokenizer = byte_level("</s>")
    with pytest.raises(ValueError, match=r"no chat template.*data\.chat_template="):
        template_renderer(tokenizer, None, "tok")
    with pytest.raises(ValueError, match=r"data\.chat_template=t\.jinja is not valid jinja: line 1"):
        template_renderer(tokenizer, "{% for %}", "t.jinja")
    template_renderer(tokenizer, "{% generation %}{{ messages[0].content }}{% endgeneration %}", "t.jinja")


def test_text_gets_eos_and_is_all_learnt() -> None:
    tokenizer = byte_level("</s>")
    encoder = make_encoder(tokenizer, CHATML, "all")
    made = encoder.encode([*encoder.prepare(Text("What is it?"))])[0]
    assert tokenizer.decode(made.tokens_L) == "What is it?</s>"
    assert made.learn_L.all()
    encoder = make_encoder(tokenizer, CHATML, "assistant")
    made = encoder.encode([*encoder.prepare(Text("What is it?"))])[0]
    assert not made.learn_L.any()


def test_completion_learns_the_completion_and_eos() -> None:
    tokenizer = byte_level("</s>")
    encoder = make_encoder(tokenizer, CHATML)
    made = encoder.encode([*encoder.prepare(Completion("What is it?", " It is 42."))])[0]
    assert tokenizer.decode(made.tokens_L) == "What is it? It is 42.</s>"
    assert tokenizer.decode(made.tokens_L[made.learn_L]) == " It is 42.</s>"


def test_chat_with_loss_on_all_learns_everything() -> None:
    encoder = make_encoder(byte_level("<|im_end|>"), CHATML, "all")
    (prepared,) = encoder.prepare(Chat(QA))
    assert encoder.encode([prepared])[0].learn_L.all()
    assert (prepared.turns, prepared.stops) == (1, 1)


def test_half_a_surrogate_pair_is_a_bad_row() -> None:
    encoder = make_encoder(byte_level("</s>"), CHATML, "all")
    with pytest.raises(RowError, match="surrogate"):
        encoder.prepare(Text("a\ud83d"))


def test_mask_gives_white_space_gaps_to_the_token_behind() -> None:
    import numpy as np

    # "ab cd" + white-space token trimmed to nothing at 6 + "ef": offsets as byte-level tokenizers give them
    offsets = np.array([[0, 2], [3, 5], [6, 6], [6, 8]])
    assert mask_from_spans(offsets, ((2, 5),)).tolist() == [False, True, False, False]
    assert mask_from_spans(offsets, ((5, 8),)).tolist() == [False, False, True, True]
    assert mask_from_spans(offsets, ((1, 3), (7, 8))).tolist() == [True, True, False, True]
