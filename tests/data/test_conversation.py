"""`Conversation`: what it takes, what it refuses, and what it looks like as an entry."""

from __future__ import annotations

import pytest

from lightning_sft import Conversation, Entry, Message
from lightning_sft.common.errors import InputError
from lightning_sft.data.conversation import as_conversation, as_entry, simplest

USER, ANSWER = Message("user", "Hi"), Message("assistant", "Hello.")


def test_messages_may_be_mappings():
    given = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    assert Conversation(given) == Conversation((USER, ANSWER))


def test_an_entry_is_a_conversation_of_two_turns():
    entry = Entry("Spell it.", "freind", "friend")
    asked, answer = entry.conversation.messages
    assert (asked.role, asked.content, asked.input) == ("user", "Spell it.", "freind")
    assert answer == Message("assistant", "friend")
    assert simplest(entry.conversation) == as_entry(entry.conversation) == entry
    assert as_conversation(entry) == entry.conversation
    assert len(Entry("Hi", "", "").conversation.messages) == 1


@pytest.mark.parametrize(
    "messages",
    [
        [USER, Message("assistant", "Hello.", train=False)],
        [USER, Message("assistant", "Hello.", weight=0.5)],
        [Message("system", "Be brief."), USER, ANSWER],
        [USER, ANSWER, USER, ANSWER],
    ],
)
def test_what_no_entry_says_stays_a_conversation(messages):
    conversation = Conversation(messages)
    assert simplest(conversation) is conversation


def test_it_shows_as_the_entry_that_it_amounts_to():
    conversation = Conversation([Message("system", "Be brief."), USER, ANSWER, USER, ANSWER])
    question = "system: Be brief.\n\nuser: Hi\n\nassistant: Hello.\n\nuser: Hi"
    assert as_entry(conversation) == Entry(question, "", "Hello.")
    assert conversation.answers == [2, 4]
    assert conversation.question.messages == conversation.messages[:-1]
    open_ended = conversation.question
    assert (open_ended.question, open_ended.output) == (open_ended, "")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages: is empty; it must hold at least one message"),
        ("Hi", "messages: is 'Hi'; it must be a list of messages"),
        ([5], "messages[0]: must be a message or a mapping of role, content, train, weight, input; "
              "role and content are needed"),
        ([ANSWER], "messages[0].role: 'assistant' cannot come first; allowed: system or user"),
        ([USER, ANSWER, ANSWER], "messages[2].role: two assistant turns running; join them, or put "
                                 "user or tool between"),
        ([USER, USER], "messages[1].role: two user turns running; join them, or put assistant "
                       "between"),
        ([USER, ANSWER, Message("system", "x")],
         "messages[2].role: 'system' cannot follow 'assistant'; allowed: user or tool"),
        ([Message("critic", "x")],
         "messages[0].role: unknown role 'critic'; allowed: system, user, assistant, tool"),
        ([USER, Message("assistant", " \n")], "messages[1].content: is blank; it must hold text"),
        ([Message("user", 5)], "messages[0].content: must be text"),
        ([USER, Message("assistant", "x", input="y")],
         "messages[1].input: only a user's message has one"),
        ([Message("user", "x", train=1)], "messages[0].train: 1 is not allowed; true or false"),
        ([Message("user", "x", weight=-1)],
         "messages[0].weight: -1 is not allowed; a number of at least 0"),
        ([Message("user", "x", weight=float("nan"))],
         "messages[0].weight: nan is not allowed; a number of at least 0"),
        ([Message("user", "x", weight=True)],
         "messages[0].weight: True is not allowed; a number of at least 0"),
    ],
)  # fmt: skip
def test_what_it_refuses(messages, message):
    with pytest.raises(InputError) as error:
        Conversation(messages)
    assert str(error.value) == message
