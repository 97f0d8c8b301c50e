"""The supervisor's decisions, with time and processes made up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsctl.supervise.events import (
    Action,
    AllReady,
    Begin,
    Event,
    Exited,
    Kill,
    Note,
    Over,
    Reported,
    Spawn,
    Spawned,
    SpawnFailed,
    StopWanted,
    Terminate,
    Told,
)
from dsctl.supervise.state import GRACE_S, STEADY_S, TIER_PATIENCE_S, Machine, Phase
from dswire.errors import ErrorInfo
from dswire.machine import Tick

PROCESSES = (("relay-n0", "relay"), ("prefill-0", "prefill"), ("decode-0", "decode"), ("router-0", "router"))
NAMES = tuple(name for name, _ in PROCESSES)


class World:
    """A machine, the processes it believes in, and a clock that jumps from deadline to deadline."""

    def __init__(self, wait_s: float = 120.0) -> None:
        self.now = 1000.0
        self.machine = Machine(PROCESSES, wait_s, self.now)
        self.alive: set[str] = set()
        self.pids = 100
        self.actions: list[Action] = []

    def feed(self, event: Event | Tick) -> list[Action]:
        actions = self.machine.handle(event)
        for action in actions:
            if isinstance(action, Spawn):
                assert action.name not in self.alive
                self.alive.add(action.name)
                self.pids += 1
                assert self.machine.handle(Spawned(self.now, action.name, self.pids)) == []
        self.machine.validate()
        self.actions += actions
        return actions

    def begin(self) -> list[Action]:
        return self.feed(Begin(self.now))

    def ready(self, *names: str) -> list[Action]:
        return [action for name in names or NAMES for action in self.feed(Reported(self.now, name, "ready"))]

    def exit(self, name: str, status: int) -> list[Action]:
        self.alive.discard(name)
        return self.feed(Exited(self.now, name, status))

    def tick(self) -> list[Action]:
        deadline = self.machine.next_deadline()
        assert deadline is not None
        self.now = max(self.now, deadline)
        return self.feed(Tick(self.now))

    def up(self) -> World:
        self.begin()
        self.ready()
        return self


def of(kind: type[Action], actions: list[Action]) -> list[str]:
    return [action.name for action in actions if isinstance(action, kind) and hasattr(action, "name")]


def over(actions: list[Action]) -> Over | None:
    found = [action for action in actions if isinstance(action, Over)]
    assert len(found) <= 1
    return found[0] if found else None


def test_all_start_at_once_in_order_and_readiness_is_told_once() -> None:
    world = World()
    assert of(Spawn, world.begin()) == list(NAMES)
    world.feed(Reported(world.now, "decode-0", "loading model"))
    assert world.machine.processes["decode-0"].step == "loading model"
    world.now += 7.5
    assert world.ready() == [AllReady(7.5)]
    assert world.machine.next_deadline() is None


def test_restart_backs_off_and_says_why() -> None:
    world = World().up()
    waits = []
    for _ in range(4):
        world.feed(Told(world.now, "decode-0", ErrorInfo("out_of_memory", "no room for weights")))
        (note,) = world.exit("decode-0", 5)
        assert isinstance(note, Note)
        assert "exit status 5: no room for weights" in note.text
        deadline = world.machine.next_deadline()
        assert deadline is not None
        waits.append(deadline - world.now)
        assert of(Spawn, world.tick()) == ["decode-0"]
    assert waits == [0.5, 1.0, 2.0, 4.0]
    assert world.machine.processes["decode-0"].restarts == 4
    assert world.ready("decode-0") == [Note("decode-0", "info", "serves again")]


def test_last_words_are_told_unless_the_process_gave_its_reason() -> None:
    world = World().up()
    (note,) = world.feed(Exited(world.now, "decode-0", 1, "ImportError: no module named x"))
    assert note == Note(
        "decode-0", "warning", "exit status 1: ImportError: no module named x; starts again in 0.5 s"
    )
    world.feed(Told(world.now, "prefill-0", ErrorInfo("engine_failed", "no such layer")))
    (note,) = world.feed(Exited(world.now, "prefill-0", 5, "some warning"))
    assert note == Note("prefill-0", "warning", "exit status 5: no such layer; starts again in 0.5 s")


def test_five_crashes_within_a_minute_give_up_on_that_process_only() -> None:
    world = World().up()
    for _ in range(4):
        world.exit("decode-0", -11)
        world.tick()
    (note,) = world.exit("decode-0", -11)
    assert isinstance(note, Note)
    assert note.level == "error"
    assert "SIGSEGV" in note.text
    assert world.machine.processes["decode-0"].phase is Phase.GIVEN_UP
    assert world.alive == {"relay-n0", "prefill-0", "router-0"}
    world.feed(StopWanted(world.now))
    for name in ("router-0", "prefill-0", "relay-n0"):
        last = world.exit(name, 0)
    end = over(last)
    assert end == Over(5, None)


def test_slow_crashes_are_never_given_up_and_the_wait_is_bounded() -> None:
    world = World().up()
    waits = set()
    for _ in range(20):
        world.now += 15.0
        world.exit("decode-0", 1)
        deadline = world.machine.next_deadline()
        assert deadline is not None
        waits.add(deadline - world.now)
        world.tick()
    assert max(waits) == 10.0


def test_a_steady_process_begins_its_row_anew() -> None:
    world = World().up()
    for _ in range(10):
        world.now += STEADY_S
        world.exit("decode-0", 1)
        deadline = world.machine.next_deadline()
        assert deadline is not None
        assert deadline - world.now == 0.5
        world.tick()
        world.ready("decode-0")


@pytest.mark.parametrize("status", [2, 3])
def test_bad_input_and_refusal_at_the_start_fail_everything_with_their_error(status: int) -> None:
    world = World()
    world.begin()
    error = ErrorInfo("port_in_use", "tcp://127.0.0.1:5555: another process listens there", "stop it")
    world.feed(Told(world.now, "router-0", error))
    stopping = world.exit("router-0", status)
    assert of(Terminate, stopping) == ["prefill-0", "decode-0"]
    world.exit("prefill-0", -15)
    assert of(Terminate, world.exit("decode-0", -15)) == ["relay-n0"]
    assert over(world.exit("relay-n0", 0)) == Over(status, error)


def test_a_refusal_of_a_restarted_process_is_a_crash_like_any_other() -> None:
    world = World().up()
    world.exit("decode-0", -9)
    world.tick()
    (note,) = world.exit("decode-0", 3)
    assert isinstance(note, Note)
    assert "starts again in 1 s" in note.text


def test_crashing_all_through_the_start_fails_it() -> None:
    world = World()
    world.begin()
    for _ in range(4):
        world.exit("prefill-0", 70)
        world.tick()
    world.exit("prefill-0", 70)
    for name in ("router-0", "decode-0", "relay-n0"):
        last = world.exit(name, 0)
    end = over(last)
    assert end is not None
    assert end.error is not None
    assert (end.exit_code, end.error.code) == (5, "start_failed")
    assert "prefill-0: crashed 5 times" in end.error.message


def test_a_start_that_takes_too_long_names_who_is_late_and_where() -> None:
    world = World(wait_s=60.0)
    world.begin()
    world.ready("relay-n0", "router-0", "prefill-0")
    world.feed(Reported(world.now, "decode-0", "loading model"))
    assert of(Terminate, world.tick()) == ["router-0"]
    for name in ("router-0", "prefill-0", "decode-0", "relay-n0"):
        last = world.exit(name, 0)
    end = over(last)
    assert end is not None
    assert end.error is not None
    assert end.error.message == "not ready within 60 s: decode-0 (loading model)"


def test_a_restart_that_hangs_is_killed_and_counts_as_a_crash() -> None:
    world = World(wait_s=60.0).up()
    world.exit("decode-0", -9)
    world.tick()
    started = world.now
    assert of(Kill, world.tick()) == ["decode-0"]
    assert world.now == started + 60.0
    (note,) = world.exit("decode-0", -9)
    assert isinstance(note, Note)
    assert "SIGKILL; starts again" in note.text


def test_stop_goes_tier_by_tier() -> None:
    world = World().up()
    assert of(Terminate, world.feed(StopWanted(world.now))) == ["router-0"]
    assert of(Terminate, world.exit("router-0", 0)) == ["prefill-0", "decode-0"]
    assert of(Terminate, world.exit("decode-0", 0)) == []
    assert of(Terminate, world.exit("prefill-0", 0)) == ["relay-n0"]
    assert over(world.exit("relay-n0", 0)) == Over(0, None)
    assert world.machine.next_deadline() is None


def test_a_tier_that_hangs_does_not_hold_up_the_next_and_is_killed_in_the_end() -> None:
    world = World().up()
    began = world.now
    world.feed(StopWanted(began))
    assert of(Terminate, world.tick()) == ["prefill-0", "decode-0"]
    assert of(Terminate, world.tick()) == ["relay-n0"]
    assert world.now == began + 2 * TIER_PATIENCE_S
    for name in ("prefill-0", "decode-0", "relay-n0"):
        world.exit(name, 0)
    assert of(Kill, world.tick()) == ["router-0"]
    assert world.now == began + GRACE_S
    assert over(world.exit("router-0", -9)) == Over(0, None)


def test_a_second_stop_kills_at_once() -> None:
    world = World().up()
    world.feed(StopWanted(world.now))
    assert set(of(Kill, world.feed(StopWanted(world.now)))) == set(NAMES)
    ends = [over(world.exit(name, -9)) for name in NAMES]
    assert [end for end in ends if end is not None] == [Over(0, None)]


def test_a_process_between_crash_and_restart_is_not_started_by_a_stop() -> None:
    world = World().up()
    world.exit("decode-0", 1)
    world.feed(StopWanted(world.now))
    for name in ("router-0", "prefill-0", "relay-n0"):
        last = world.exit(name, 0)
    assert over(last) == Over(0, None)
    assert of(Spawn, world.actions).count("decode-0") == 1


def test_a_process_that_cannot_be_made_is_tried_again() -> None:
    machine = Machine(PROCESSES, 120.0, 0.0)
    machine.handle(Begin(0.0))
    (note,) = machine.handle(SpawnFailed(0.0, "decode-0", "out of processes"))
    assert isinstance(note, Note)
    assert "out of processes; starts again in 0.5 s" in note.text
    assert of(Spawn, machine.handle(Tick(0.5))) == ["decode-0"]


def test_when_every_process_is_given_up_it_is_over() -> None:
    world = World().up()
    for name in NAMES:
        for _ in range(4):
            world.exit(name, 1)
            while name not in world.alive:
                world.tick()
        last = world.exit(name, 1)
    assert over(last) == Over(5, None)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["ready", "exit", "tick", "late", "stop"]), st.sampled_from(NAMES), st.integers(-15, 6)
    ),
    max_size=60,
)


@given(STEPS)
def test_whatever_happens_it_ends_exactly_once_with_nothing_running(steps: list[tuple[str, str, int]]) -> None:
    world = World()
    world.begin()
    for what, name, status in steps:
        world.now += 0.25
        if what == "ready" and name in world.alive:
            world.ready(name)
        elif what == "exit" and name in world.alive:
            world.exit(name, status)
        elif what == "tick" and world.machine.next_deadline() is not None:
            world.tick()
        elif what == "late":
            world.now += 20.0
        elif what == "stop":
            world.feed(StopWanted(world.now))
    world.feed(StopWanted(world.now))
    world.feed(StopWanted(world.now))
    for name in sorted(world.alive):
        world.exit(name, -9)
    assert world.alive == set()
    assert sum(isinstance(action, Over) for action in world.actions) == 1
