"""What is left of a conversation that has become too long: whole turns, the last ones."""

from __future__ import annotations

import pytest

from lightning_sft.data import history
from lightning_sft.data.conversation import Conversation
from lightning_sft.data.encoding import encode_prompt
from lightning_sft.data.history import fit_history, room_for_prompt
from lightning_sft.data.prompts import STYLES, get_style
from lightning_sft.data.tokenizer import gpt2_tokenizer

TOKENIZER = gpt2_tokenizer()


def talk(count: int, system: bool = True, tool: bool = False) -> Conversation:
    messages = [{"role": "system", "content": "Be brief."}] if system else []
    for place in range(count):
        messages.append({"role": "user", "content": f"Question {place} " + "and more " * place})
        messages.append({"role": "assistant", "content": f"Answer {place}"})
        if tool:
            messages.append({"role": "tool", "content": f"Found {place}"})
            messages.append({"role": "assistant", "content": f"So {place}"})
    return Conversation((*messages, {"role": "user", "content": "And now?"}))


@pytest.mark.parametrize("system", [True, False])
@pytest.mark.parametrize("style", STYLES.values(), ids=lambda style: style.name)
def test_as_few_turns_as_possible_are_left_out(style, system):
    whole = talk(6, system)
    head, rest = whole.messages[:system], whole.messages[system:]
    lengths = []
    for cut in range(7):
        left = Conversation(head + rest[2 * cut :])
        ids = encode_prompt(left, style, TOKENIZER)
        lengths.append(len(ids))
        for most in (len(ids), len(ids) + 1):
            assert fit_history(whole, style, TOKENIZER, most) == (left, ids, cut)
    assert lengths == sorted(lengths, reverse=True)
    # The last question stays, whatever there is room for.
    assert fit_history(whole, style, TOKENIZER, 1).cut == 6


def test_what_a_tool_said_goes_with_its_turn():
    fitted = fit_history(talk(4, tool=True), get_style("chatml"), TOKENIZER, 300)
    assert 0 < fitted.cut < 4
    roles = [message.role for message in fitted.conversation.messages]
    assert roles[:2] == ["system", "user"]
    assert roles[1:] == ["user", "assistant", "tool", "assistant"] * (4 - fitted.cut) + ["user"]


def test_a_very_long_history_is_not_encoded_again_and_again(monkeypatch):
    tries = []
    right = history.render_question

    def count(conversation, style):
        tries.append(len(conversation.messages))
        return right(conversation, style)

    monkeypatch.setattr(history, "render_question", count)
    fitted = fit_history(talk(400), get_style("chatml"), TOKENIZER, 3000)
    assert len(fitted.ids) <= 3000
    assert fitted.cut > 390
    assert len(tries) < 12
    short = talk(3)
    tries.clear()
    fit_history(short, get_style("chatml"), TOKENIZER, 3000)
    assert tries == [len(short.messages)]


def test_an_answer_has_room():
    assert room_for_prompt(1024, 100) == 924
    assert room_for_prompt(1024, 1024) == 768
    assert room_for_prompt(2, 9) == 1
