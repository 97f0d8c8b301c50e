"""The router machine, message by message."""

from __future__ import annotations

import pytest

from dskv.handle import KvKey
from dsrouter.events import Note, Stopping, Tokenize, Tokenized
from dswire.errors import ErrorInfo, InvalidRequest
from dswire.machine import PeerLost, Send, Tick
from dswire.messages import PROTOCOL, client, worker
from dswire.messages.client import Sampling, Submit
from support.router_desk import CLIENT, FOUR, ROLES, Desk, only


@pytest.fixture
def desk() -> Desk:
    return Desk().join("prefill-0", "decode-0")


# the way of a request


def test_from_submit_to_finish(desk: Desk) -> None:
    desk.submit()
    assert desk.told(CLIENT, client.Accepted) == [client.Accepted("r", 0, 6)]
    work = only(desk.told("prefill-0", worker.PrefillWork))
    assert (work.prompt_ids, work.output_ids) == (tuple(range(6)), ())
    desk.say("prefill-0", worker.PrefillDone(work.key, 7, 0.0, 0.0))
    assert desk.told(CLIENT, client.Output) == [client.Output("r", 1, 0, (7,), "<7>")]
    handle = desk.prefilled(work.key)
    (place,) = desk.told("decode-0", worker.DecodeWork)
    assert (place.handle, place.prompt_ids, place.output_ids) == (handle, tuple(range(6)), (7,))
    for position, token in enumerate((8, 9, 10), start=1):
        reason = "length" if position == 3 else ""
        desk.say("decode-0", worker.StepDone((worker.TokenMade(work.key, position, token, None, reason),)))
    outputs, ends = desk.told(CLIENT, client.Output), desk.told(CLIENT, client.Finished)
    assert [(one.number, one.token_ids, one.finish_reason) for one in outputs] == [(4, (10,), "length")]
    assert [(one.number, one.usage) for one in ends] == [(5, client.Usage(6, 4))]
    # its worker has ended it by itself
    assert desk.told("decode-0", worker.Abort) == []


def test_tokens_of_several_steps_come_at_once(desk: Desk) -> None:
    desk.submit(sampling=Sampling(max_tokens=9, stop=("<10>",)))
    key = only(desk.told("prefill-0", worker.PrefillWork)).key
    desk.prefilled(key)
    desk.say("decode-0", worker.StepDone((worker.TokenMade(key, 1, 8, None, "", None, (9, 11)),)))
    assert desk.told(CLIENT, client.Output) == [client.Output("r", 2, 0, (8, 9, 11), "<8><9><11>")]
    assert desk.state.workers.role("decode")[0].tokens == 6 + 4
    desk.say("decode-0", worker.StepDone((worker.TokenMade(key, 4, 8, None, "", None, (10, 12)),)))
    assert desk.told(CLIENT, client.Output) == [client.Output("r", 3, 0, (8, 10), "<8>", (), "stop")]
    (end,) = desk.told(CLIENT, client.Finished)
    assert end.usage == client.Usage(6, 6)


def test_a_decode_instance_reads_the_prompt_and_goes_on() -> None:
    desk = Desk(mode="colocated").join("decode-0")
    desk.submit()
    key = only(desk.told("decode-0", worker.PrefillWork)).key
    desk.now += 0.5
    desk.say("decode-0", worker.PrefillDone(key, 7, 0.1, 0.3))
    assert desk.told(CLIENT, client.Output) == [client.Output("r", 1, 0, (7,), "<7>")]
    assert desk.told("decode-0", worker.Abort) == []
    assert desk.state.workers.role("decode")[0].tokens == 7
    stages = worker.DecodeStages(0.0, 0.0, 0.0, 0.0)
    for position, token in enumerate((8, 9, 10), start=1):
        reason = "length" if position == 3 else ""
        made = worker.TokenMade(key, position, token, None, reason, stages if position == 1 else None)
        desk.say("decode-0", worker.StepDone((made,)))
    (end,) = desk.told(CLIENT, client.Finished)
    assert (end.ledger.prefill_queue_s, end.ledger.prefill_s, end.ledger.ttft_s) == (0.1, 0.3, 0.5)
    assert desk.state.workers.role("decode")[0].sequences == {}


def test_a_first_token_that_is_the_last_ends_it_where_the_prompt_was_read() -> None:
    desk = Desk(mode="colocated").join("decode-0")
    desk.submit(sampling=Sampling(max_tokens=1))
    key = only(desk.told("decode-0", worker.PrefillWork)).key
    desk.say("decode-0", worker.PrefillDone(key, 7, 0.0, 0.0, None, "length"))
    assert len(desk.told(CLIENT, client.Finished)) == 1
    assert desk.state.workers.role("decode")[0].sequences == {}


def test_short_prompts_stay_away_from_prefill_until_there_is_enough_to_read() -> None:
    desk = Desk(mode="conditional", threshold_tokens=10).join("prefill-0", "decode-0")
    desk.submit("a", 6)
    first = only(desk.told("decode-0", worker.PrefillWork)).key
    desk.submit("long", 10, first=20)
    assert len(desk.told("prefill-0", worker.PrefillWork)) == 1
    desk.submit("b", 6, first=40)
    assert len(desk.told("decode-0", worker.PrefillWork)) == 1
    # twelve tokens are to be read there already
    desk.submit("c", 6, first=60)
    assert len(desk.told("prefill-0", worker.PrefillWork)) == 1
    desk.say("decode-0", worker.PrefillDone(first, 7, 0.0, 0.0))
    desk.submit("d", 6, first=80)
    assert len(desk.told("decode-0", worker.PrefillWork)) == 1


def test_a_prompt_goes_where_its_beginning_is_kept() -> None:
    desk = Desk().join("prefill-0", "prefill-1")
    desk.submit("a", 12)
    first = only(desk.told("prefill-0", worker.PrefillWork)).key
    desk.say("prefill-0", worker.PrefillDone(first, 7, 0.0, 0.0, None, "length"))
    for name in "bc":
        desk.submit(name, 14)
        assert len(desk.told("prefill-0", worker.PrefillWork)) == 1
    # eight tokens are kept there, and two times two are queued: others have less to do
    desk.say(CLIENT, Submit("d", prompt_ids=(9,) * 4, sampling=FOUR))
    assert len(desk.told("prefill-1", worker.PrefillWork)) == 1


def test_a_long_prompt_is_short_where_most_of_it_is_kept() -> None:
    desk = Desk(mode="conditional", threshold_tokens=10).join("prefill-0", "decode-0", "decode-1")
    desk.submit("a", 8)
    key = only(desk.told("decode-0", worker.PrefillWork)).key
    desk.say("decode-0", worker.PrefillDone(key, 8, 0.0, 0.0))
    for position in (1, 2, 3):
        made = worker.TokenMade(key, position, 8 + position, None, "length" if position == 3 else "")
        desk.say("decode-0", worker.StepDone((made,)))
    # prompt and answer, all but its last token, fill two blocks; the third is begun
    desk.submit("b", 17)
    assert len(desk.told("decode-0", worker.PrefillWork)) == 1
    desk.say(CLIENT, Submit("c", prompt_ids=(9, *range(1, 17)), sampling=FOUR))
    assert len(desk.told("prefill-0", worker.PrefillWork)) == 1


def test_what_gave_way_while_its_prompt_was_read_costs_no_retry() -> None:
    desk = Desk(mode="colocated", retries=0).join("decode-0")
    desk.submit()
    key = only(desk.told("decode-0", worker.PrefillWork)).key
    desk.say("decode-0", worker.Preempted(key))
    again = only(desk.told("decode-0", worker.PrefillWork))
    assert again.key.epoch > key.epoch
    assert desk.told(CLIENT, client.Failed) == []


def test_text_is_tokenised_first(desk: Desk) -> None:
    desk.say(CLIENT, Submit("r", prompt="hello"))
    (tokenize,) = desk.did(Tokenize)
    desk.feed(Tokenized(desk.now, tokenize.submit, (1, 2, 3)))
    assert only(desk.told("prefill-0", worker.PrefillWork)).prompt_ids == (1, 2, 3)


def test_text_that_cannot_be_tokenised_is_refused(desk: Desk) -> None:
    desk.say(CLIENT, Submit("r", prompt="hello"))
    (tokenize,) = desk.did(Tokenize)
    error = InvalidRequest("the chat template does not know the role").info()
    desk.feed(Tokenized(desk.now, tokenize.submit, error=error))
    assert desk.told(CLIENT, client.Failed) == [client.Failed("r", 0, error)]


def test_tokens_of_a_submission_that_is_over_are_dropped(desk: Desk) -> None:
    desk.say(CLIENT, Submit("r", prompt="hello"))
    (tokenize,) = desk.did(Tokenize)
    desk.say(CLIENT, client.Cancel("r"))
    assert desk.feed(Tokenized(desk.now, tokenize.submit, (1, 2, 3))) == []
    desk.say(CLIENT, client.ClientBye())
    desk.say(CLIENT, client.ClientHello(PROTOCOL))
    desk.say(CLIENT, Submit("r", prompt="other"))
    assert desk.feed(Tokenized(desk.now, tokenize.submit, (1, 2, 3))) == []


def test_every_choice_has_a_seed_of_its_own_and_the_same_one_each_time(desk: Desk) -> None:
    desk.submit("a", sampling=Sampling(seed=41, n=3, max_tokens=4))
    works = desk.told("prefill-0", worker.PrefillWork)
    assert [work.key.sequence for work in works] == ["a/0", "a/1", "a/2"]
    assert [work.sampling.seed for work in works] == [41, 42, 43]
    desk.submit("b", sampling=Sampling(seed=-1, n=1, max_tokens=4))
    assert only(desk.told("prefill-0", worker.PrefillWork)).sampling.seed == 2**63 - 1


def test_requests_without_a_seed_get_different_ones(desk: Desk) -> None:
    seeds = set()
    for name in "abc":
        desk.submit(name)
        seeds.add(only(desk.told("prefill-0", worker.PrefillWork)).sampling.seed)
    assert len(seeds) == 3


def test_output_is_cut_to_what_fits_model_and_pool() -> None:
    desk = Desk(blocks=4).join("prefill-0")
    desk.submit(sampling=Sampling(max_tokens=1000, min_tokens=500))
    sampling = only(desk.told("prefill-0", worker.PrefillWork)).sampling
    assert (sampling.max_tokens, sampling.min_tokens) == (10, 10)


def test_logprobs_are_told_with_their_text(desk: Desk) -> None:
    desk.submit(sampling=Sampling(max_tokens=4, logprobs=2))
    key = only(desk.told("prefill-0", worker.PrefillWork)).key
    desk.say("prefill-0", worker.PrefillDone(key, 7, 0.0, 0.0, worker.Logprobs(-0.5, ((7, -0.5), (8, -1.0)))))
    (output,) = desk.told(CLIENT, client.Output)
    assert output.logprobs == (client.TokenLogprob(7, "<7>", -0.5, ((7, "<7>", -0.5), (8, "<8>", -1.0))),)


# dispatch


def test_work_goes_where_the_queue_is_shortest_in_tokens() -> None:
    desk = Desk().join("prefill-0", "prefill-1")
    went = []
    for name, tokens in (("a", 30), ("b", 10), ("c", 10), ("d", 5)):
        desk.submit(name, tokens)
        went += [peer for peer in ("prefill-0", "prefill-1") if desk.told(peer, worker.PrefillWork)]
    assert went == ["prefill-0", "prefill-1", "prefill-1", "prefill-1"]


@pytest.mark.parametrize(("affinity", "moved"), [(0.0, 4), (2.0, 3), (1e6, 0)], ids=["none", "some", "all"])
def test_kv_leaves_its_node_when_that_has_clearly_more_to_decode(affinity: float, moved: int) -> None:
    desk = Desk(max_prefill_queue=99, node_affinity=affinity).join("prefill-0", "decode-0")
    desk.join("decode-1", node="n1")
    went = []
    for number in range(8):
        desk.submit(str(number), tokens=10)
        desk.prefilled(only(desk.told("prefill-0", worker.PrefillWork)).key)
        went += [name for name in ("decode-0", "decode-1") if desk.told(name, worker.DecodeWork)]
    assert len(went) == 8
    assert went.count("decode-1") == moved


def test_an_instance_gets_no_more_than_its_queue_holds() -> None:
    desk = Desk(max_prefill_queue=1).join("prefill-0", "decode-0")
    desk.submit("a")
    first = only(desk.told("prefill-0", worker.PrefillWork)).key
    desk.submit("b")
    assert desk.told("prefill-0", worker.PrefillWork) == []
    desk.say("prefill-0", worker.PrefillDone(first, 7, 0.0, 0.0))
    assert only(desk.told("prefill-0", worker.PrefillWork)).key.sequence == "b/0"


def test_work_waits_for_an_instance() -> None:
    desk = Desk()
    desk.submit()
    assert desk.did(Send)[-1].peer == CLIENT
    desk.join("prefill-0")
    key = only(desk.told("prefill-0", worker.PrefillWork)).key
    desk.prefilled(key)
    desk.join("decode-0")
    assert [work.handle.key for work in desk.told("decode-0", worker.DecodeWork)] == [key]


# attempts


def test_a_retry_goes_first_with_a_new_key_and_its_output(desk: Desk) -> None:
    desk.submit("a")
    key = only(desk.told("prefill-0", worker.PrefillWork)).key
    desk.prefilled(key)
    desk.say("decode-0", worker.SequenceFailed(key, ErrorInfo("transfer_failed", "no")))
    assert desk.told("prefill-0", worker.Abort) == [worker.Abort(key)]
    again = only(desk.told("prefill-0", worker.PrefillWork))
    assert again.key.sequence == key.sequence
    assert again.key.epoch > key.epoch
    assert again.output_ids == (7,)


def test_no_two_attempts_have_the_same_key(desk: Desk) -> None:
    keys = []
    for _ in range(3):
        desk.submit()
        keys.append(only(desk.told("prefill-0", worker.PrefillWork)).key)
        desk.say("prefill-0", worker.SequenceFailed(keys[-1], ErrorInfo("overloaded", "later")))
        keys.append(only(desk.told("prefill-0", worker.PrefillWork)).key)
        desk.say(CLIENT, client.ClientBye())
        desk.say(CLIENT, client.ClientHello(PROTOCOL))
    assert len(set(keys)) == 6


def test_what_cannot_be_tried_again_fails_at_once(desk: Desk) -> None:
    desk.submit()
    key = only(desk.told("prefill-0", worker.PrefillWork)).key
    error = ErrorInfo("engine_failed", "no such kernel")
    desk.say("prefill-0", worker.SequenceFailed(key, error))
    assert desk.told(CLIENT, client.Failed) == [client.Failed("r", 1, error)]
    about = {"request": "r", "code": "engine_failed", "why": "no such kernel"}
    assert desk.did(Note) == [Note("request failed", about, warning=True)]


def test_ends_that_are_nobodys_fault_are_no_news(desk: Desk) -> None:
    desk.submit(tokens=65)
    assert desk.told(CLIENT, client.Failed)
    assert desk.did(Note) == []
    desk.submit("s")
    desk.say(CLIENT, client.Cancel("s"))
    assert desk.told(CLIENT, client.Failed)
    assert desk.did(Note) == []
    desk.submit("t")
    desk.feed(Stopping(desk.now))
    assert desk.told(CLIENT, client.Failed)
    assert desk.did(Note) == []


def test_preemption_costs_no_attempt() -> None:
    desk = Desk(retries=0).join("prefill-0", "decode-0")
    desk.submit()
    key = only(desk.told("prefill-0", worker.PrefillWork)).key
    for _ in range(3):
        desk.prefilled(key)
        desk.say("decode-0", worker.Preempted(key))
        key = only(desk.told("prefill-0", worker.PrefillWork)).key
    assert desk.state.requests["r"].live


def test_tokens_out_of_turn_are_not_taken(desk: Desk) -> None:
    desk.submit(sampling=Sampling(max_tokens=9))
    key = only(desk.told("prefill-0", worker.PrefillWork)).key
    desk.prefilled(key)
    for position in (0, 2, 5):
        desk.say("decode-0", worker.StepDone((worker.TokenMade(key, position, 9),)))
        assert desk.told(CLIENT, client.Output) == []
    desk.say("decode-0", worker.StepDone((worker.TokenMade(key, 1, 9),)))
    assert len(desk.told(CLIENT, client.Output)) == 1


# messages that got lost


def test_a_client_that_cannot_be_reached_is_sent_nothing_until_it_is_heard(desk: Desk) -> None:
    desk.submit()
    key = only(desk.told("prefill-0", worker.PrefillWork)).key
    desk.feed(PeerLost(desk.now, CLIENT))
    desk.say("prefill-0", worker.PrefillDone(key, 7, 0.0, 0.0))
    assert desk.told(CLIENT, client.Output) == []
    desk.say(CLIENT, client.Attach("r", 1))
    assert len(desk.told(CLIENT, client.Output)) == 1


def test_everything_due_at_once() -> None:
    desk = Desk().join("prefill-0")
    desk.say(CLIENT, Submit("r", prompt_ids=(1,), deadline_s=6.5))
    while desk.now < 7.0:
        assert desk.state.requests["r"].live
        desk.now += 1.0
        desk.feed(Tick(desk.now))
    # the deadline and the client's lease in one tick
    assert dict(desk.state.ended) == {"deadline_exceeded": 1}
    assert desk.state.requests == {}
    assert desk.state.workers.get("prefill-0") is None


def test_a_deadline_that_passed_while_the_router_stood_still_is_over() -> None:
    desk = Desk().join("prefill-0")
    desk.say(CLIENT, Submit("r", prompt_ids=(1,), deadline_s=3.0))
    desk.now = 1000.0
    desk.feed(Tick(desk.now))
    assert dict(desk.state.ended) == {"deadline_exceeded": 1}
    assert desk.told(CLIENT, client.Failed)


def test_stopping_ends_every_request(desk: Desk) -> None:
    for name in "abc":
        desk.submit(name)
    desk.feed(Stopping(desk.now))
    assert [one.error.code for one in desk.told(CLIENT, client.Failed)] == ["router_lost"] * 3
    assert len(desk.told("prefill-0", worker.Abort)) == 3


def test_time_zero_is_a_time_like_any_other(desk: Desk) -> None:
    desk.submit(sampling=Sampling(max_tokens=1))
    key = only(desk.told("prefill-0", worker.PrefillWork)).key
    desk.say("prefill-0", worker.PrefillDone(key, 7, 0.0, 0.0, None, "length"))
    (finished,) = desk.told(CLIENT, client.Finished)
    assert finished.ledger == client.Ledger()


def test_status_without_anybody(desk: Desk) -> None:
    desk = Desk()
    desk.say(CLIENT, client.StatusQuery())
    (report,) = desk.told(CLIENT, client.StatusReport)
    assert {one.name: one.state for one in report.workers} == dict.fromkeys(ROLES, "missing")
    desk.join("decode-0")
    desk.say("decode-0", worker.WorkerBye())
    desk.say(CLIENT, Submit("r", prompt="hi"))
    desk.say(CLIENT, client.StatusQuery())
    (report,) = desk.told(CLIENT, client.StatusReport)
    assert {one.name: one.state for one in report.workers}["decode-0"] == "lost"
    assert report.requests == {"tokenizing": 1}


#: stages of two pairs, each pair on nodes of its own
PAIRS = {"prefill-0": frozenset({"decode-0"}), "prefill-1": frozenset({"decode-1"})}


def test_kv_goes_where_it_can_and_nobody_waits_for_room_of_others() -> None:
    desk = Desk(reach=PAIRS, max_decode_queue=1).join(*ROLES)
    keys: dict[str, list[KvKey]] = {"prefill-0": [], "prefill-1": []}
    for name in "abcd":
        for send in [one for one in desk.submit(name) if isinstance(one, Send)]:
            if isinstance(send.message, worker.PrefillWork):
                keys[send.peer].append(send.message.key)
    first, second = keys["prefill-0"]
    desk.prefilled(first)
    assert [one.handle.key for one in desk.told("decode-0", worker.DecodeWork)] == [first]
    desk.prefilled(second)
    assert not desk.did(Send)
    # new prompts come to the pair that has room, though the other one reads fewer now
    desk.submit("e")
    assert desk.told("prefill-1", worker.PrefillWork)
    # the other pair has room
    desk.prefilled(keys["prefill-1"][0], "prefill-1")
    assert [one.handle.key for one in desk.told("decode-1", worker.DecodeWork)] == [keys["prefill-1"][0]]
    desk.say("decode-0", worker.StepDone((worker.TokenMade(first, 1, 7, finish_reason="length"),)))
    assert [one.handle.key for one in desk.told("decode-0", worker.DecodeWork)] == [second]


def test_kv_whose_decode_instance_is_down_is_read_again_elsewhere() -> None:
    desk = Desk(reach=PAIRS, retries=0).join("prefill-0", "decode-0", "decode-1")
    desk.submit()
    key = only(desk.told("prefill-0", worker.PrefillWork)).key
    desk.feed(PeerLost(desk.now, "decode-0"))
    # there is nothing yet that reads for the other one
    desk.prefilled(key)
    assert not desk.told("prefill-0", worker.Abort)
    desk.join("prefill-1")
    assert desk.told("prefill-0", worker.Abort) == [worker.Abort(key)]
    again = only(desk.told("prefill-1", worker.PrefillWork))
    assert (again.key.sequence, again.output_ids) == (key.sequence, (7,))
    # prompts come to those whose KV has somewhere to go
    desk.submit("s")
    assert desk.told("prefill-1", worker.PrefillWork)
    desk.join("decode-0").submit("t")
    assert desk.told("prefill-0", worker.PrefillWork)


def test_kv_that_can_go_nowhere_does_not_wait_for_ever() -> None:
    desk = Desk(reach=PAIRS).join("prefill-0", "decode-1")
    desk.submit()
    desk.prefilled(only(desk.told("prefill-0", worker.PrefillWork)).key)
    for _ in range(40):
        desk.now += 1.0
        for name in ("prefill-0", "decode-1"):
            desk.say(name, worker.WorkerReport(worker.Load()))
        desk.say(CLIENT, client.ClientPing())
        desk.feed(Tick(desk.now))
        if failed := desk.told(CLIENT, client.Failed):
            break
    assert [one.error.code for one in failed] == ["no_instance"]
    assert 29.0 < desk.now < 35.0
