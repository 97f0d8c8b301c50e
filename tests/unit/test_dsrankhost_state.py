"""The machine of a rank host: whose ranks run, and what is passed on."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from dsengine.rank_orders import RankCopy, RankMeet, RankPages, RankPull, RankStep, RankSum, Report
from dsrankhost.config import HostConfig
from dsrankhost.events import EndRanks, Linked, RankSaid, StartRanks, TellRank, Unlinked
from dsrankhost.state import INSTANCE, HostState
from dswire.errors import ModelMismatch
from dswire.links import End, Ready
from dswire.machine import Received, Send
from dswire.messages import PROTOCOL
from dswire.messages.ranks import (
    HostCopy,
    HostHello,
    HostMeet,
    HostPages,
    HostPing,
    HostPull,
    HostRefused,
    HostStart,
    HostStep,
    HostSum,
    RankReported,
    RankSpan,
)
from dswire.messages.worker import ModelIdentity
from support.handles import make_handle

MODEL = ModelIdentity("tiny", "f1", "float32")
CONFIG = HostConfig(name="decode-0-n1", incarnation="i", model=MODEL, form="form", ranks=frozenset({0, 1}))
SECRET = b"s" * 32
HANDLE = make_handle()


def say(state: HostState, message: msgspec.Struct) -> list[object]:
    return state.handle(Received(0.0, INSTANCE, message))


def started() -> HostState:
    state = HostState(CONFIG)
    state.handle(Linked(0.0))
    say(state, HostStart("i/1", 8, SECRET))
    return state


def test_each_connection_begins_with_a_hello_of_its_own() -> None:
    state = HostState(CONFIG)
    for link in ("i/1", "i/2"):
        assert state.handle(Linked(0.0)) == [
            Send(INSTANCE, HostHello(PROTOCOL, "decode-0-n1", link, MODEL, "form"))
        ]
    assert say(state, HostStart("i/1", 8, SECRET)) == []
    assert say(state, HostStart("i/2", 8, SECRET)) == [StartRanks("i/2", 8, SECRET)]
    assert say(state, HostStart("i/2", 8, SECRET)) == []


def test_what_the_instance_says_goes_to_its_ranks() -> None:
    state = started()
    assert say(state, HostMeet("i/1", 1, "there")) == [TellRank(1, RankMeet("there"))]
    assert say(state, HostMeet("i/1", 2, "there")) == []
    span = RankSpan((1, 2), 0, (0,))
    assert say(state, HostStep("i/1", (span,), (1,))) == [
        TellRank(rank, RankStep((span,), (1,))) for rank in (0, 1)
    ]
    assert say(state, HostStep("i/0", (span,), (1,))) == []
    assert say(state, HostSum("i/1", 1, (3, 4))) == [TellRank(1, RankSum((3, 4)))]
    pull = HostPull("i/1", 0, HANDLE, (5,), summed=True)
    assert say(state, pull) == [TellRank(0, RankPull(HANDLE, (5,), summed=True))]
    pages = HostPages("i/1", 0, HANDLE.key, (5,))
    assert say(state, pages) == [TellRank(0, RankPages(HANDLE.key, (5,)))]
    copied = [TellRank(rank, RankCopy((5,), "out")) for rank in (0, 1)]
    assert say(state, HostCopy("i/1", (5,), "out")) == copied
    for other in (
        HostCopy("i/0", (5,), "in"),
        HostSum("i/0", 1, (3,)),
        HostSum("i/1", 2, (3,)),
        msgspec.structs.replace(pull, rank=2),
    ):
        assert say(state, other) == []
    assert say(state, HostPing()) == []


def test_what_ranks_report_goes_to_the_instance_and_all_loaded_is_ready() -> None:
    state = started()
    reported = RankReported("i/1", 0, "joining", "there")
    assert state.handle(RankSaid(0.0, "i/1", 0, Report("joining", where="there"))) == [Send(INSTANCE, reported)]
    summed = RankReported("i/1", 0, "copied", checksum=7)
    assert state.handle(RankSaid(0.0, "i/1", 0, Report("copied", checksum=7))) == [Send(INSTANCE, summed)]
    assert state.handle(RankSaid(0.0, "i/0", 0, Report("ready"))) == []
    assert state.handle(RankSaid(0.0, "i/1", 0, Report("ready"))) == [
        Send(INSTANCE, RankReported("i/1", 0, "ready"))
    ]
    assert state.handle(RankSaid(0.0, "i/1", 1, Report("ready"))) == [
        Send(INSTANCE, RankReported("i/1", 1, "ready")),
        Ready(),
    ]


def test_ranks_end_with_their_connection() -> None:
    state = started()
    assert state.handle(Unlinked(0.0)) == [EndRanks()]
    assert state.handle(Unlinked(0.0)) == []
    # said by them as they ended, or by an instance that is no more
    assert state.handle(RankSaid(0.0, "i/1", 0, Report("failed"))) == []
    assert say(state, HostStart("i/1", 8, SECRET)) == []
    state = started()
    assert state.handle(Linked(0.0))[0] == EndRanks()


def test_who_is_refused_ends() -> None:
    error = ModelMismatch("another").info()
    assert say(HostState(CONFIG), HostRefused(error)) == [End(error)]


LINKS = st.sampled_from(["i/1", "i/2", "i/3"])
EVENTS = st.one_of(
    st.sampled_from([Linked(0.0), Unlinked(0.0)]),
    st.builds(lambda link: Received(0.0, INSTANCE, HostStart(link, 8, SECRET)), LINKS),
    st.builds(lambda link: Received(0.0, INSTANCE, HostStep(link, (), ())), LINKS),
    st.builds(
        lambda link, rank, state: RankSaid(0.0, link, rank, Report(state)),
        LINKS,
        st.integers(0, 1),
        st.sampled_from(["joining", "ready", "failed"]),
    ),
)


@given(st.lists(EVENTS, max_size=30))
def test_ranks_are_started_ended_and_told_in_turns(events: list[object]) -> None:
    state, running = HostState(CONFIG), False
    for event in events:
        for action in state.handle(event):
            assert running or not isinstance(action, TellRank | EndRanks)
            assert not (running and isinstance(action, StartRanks))
            running = isinstance(action, StartRanks) or (running and not isinstance(action, EndRanks))
        state.validate()
        assert running == state.running
