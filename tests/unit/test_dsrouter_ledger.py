"""Every moment of a choice is booked to one stage."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsrouter.ledger import Account
from dswire.messages.client import Ledger
from dswire.messages.worker import DecodeStages

TOTALS = ("ttft_s", "total_s", "retries")


def booked(ledger: Ledger) -> float:
    stages: list[float] = [value for name, value in msgspec.structs.asdict(ledger).items() if name not in TOTALS]
    return sum(stages)


def test_an_undisturbed_choice() -> None:
    account = Account(10.0)
    account.spend("router_queue_s", 11.0)
    account.prefilled(15.0, queue_s=1.0, prefill_s=2.5)
    account.spend("placement_s", 15.25)
    account.decoding(17.25, DecodeStages(0.25, 0.5, 0.125, 1.0))
    ledger = account.close(20.0)
    assert ledger == Ledger(
        router_queue_s=1.0,
        prefill_queue_s=1.0,
        prefill_s=2.5,
        prefill_wire_s=0.5,
        placement_s=0.25,
        transfer_wait_s=0.25,
        transfer_s=0.5,
        decode_queue_s=0.125,
        first_step_s=1.0,
        decode_wire_s=0.125,
        decode_s=2.75,
        ttft_s=5.0,
        total_s=10.0,
    )
    assert booked(ledger) == ledger.total_s


def test_prefilling_again_after_a_token_is_the_price_of_the_retry() -> None:
    account = Account(0.0)
    account.prefilled(1.0, 0.25, 0.5)
    account.spend("placement_s", 1.5)
    account.retries += 1
    account.spend("retry_s", 4.0)
    account.spend("router_queue_s", 5.0)
    account.prefilled(7.0, 0.5, 0.5)
    ledger = account.close(7.5)
    assert (ledger.retry_s, ledger.ttft_s, ledger.prefill_s, ledger.retries) == (5.5, 1.0, 0.5, 1)
    assert booked(ledger) == ledger.total_s == 7.5


def test_a_pause_is_from_the_last_token_to_the_next() -> None:
    account = Account(0.0)
    account.prefilled(1.0, 0.25, 0.5)
    account.spend("placement_s", 1.5)
    account.decoding(2.0, DecodeStages(0.0, 0.25, 0.0, 0.25))
    account.token_at = 3.5
    account.retries += 1
    account.resume(4.0)
    account.spend("placement_s", 4.5)
    account.decoding(5.0, DecodeStages(0.0, 0.25, 0.0, 0.125))
    ledger = account.close(7.0)
    assert (ledger.resume_s, ledger.decode_s, ledger.retry_s, ledger.transfer_s) == (1.5, 3.5, 0.0, 0.25)
    assert booked(ledger) == ledger.total_s == 7.0


def test_a_pause_whose_kept_kv_is_gone_ends_in_reading_again() -> None:
    account = Account(0.0)
    account.prefilled(1.0, 0.25, 0.5)
    account.resume(2.0)
    account.read_again(2.5)
    account.spend("router_queue_s", 3.0)
    account.prefilled(4.0, 0.5, 0.5)
    ledger = account.close(4.5)
    assert (ledger.resume_s, ledger.retry_s) == (1.5, 1.5)
    assert booked(ledger) == ledger.total_s == 4.5


@pytest.mark.parametrize("arrived", [0.0, 5.0])
def test_a_choice_without_a_token(arrived: float) -> None:
    ledger = Account(arrived).close(arrived + 2.0)
    assert (ledger.ttft_s, ledger.total_s) == (2.0, 2.0)


steps = st.lists(
    st.tuples(
        st.sampled_from(["router_queue_s", "prefilled", "placement_s", "decoding", "retry_s"]), st.integers(0, 8)
    )
)


@given(steps)
def test_whatever_happens_it_adds_up(taken: list[tuple[str, int]]) -> None:
    now = 100.0
    account = Account(now)
    for what, quarters in taken:
        seconds = quarters / 4
        now += seconds
        if what == "prefilled":
            account.prefilled(now, seconds / 4, seconds / 2)
        elif what == "decoding":
            account.decoding(now, DecodeStages(seconds / 8, seconds / 8, seconds / 8, seconds / 8))
        else:
            account.spend(what, now)
    ledger = account.close(now + 1.0)
    assert booked(ledger) == pytest.approx(ledger.total_s)
    assert 0 <= ledger.ttft_s <= ledger.total_s
