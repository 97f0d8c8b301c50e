"""Every message of every socket, there and back; and the bytes of the public ones, which must never change."""

from __future__ import annotations

from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dswire.codec import Decoder, encode
from dswire.errors import DsError, ErrorInfo, Failed, from_info
from dswire.messages import PROTOCOL, client, kv, ranks, worker
from support.any_message import any_message
from support.error_tree import leaves

UNIONS = {
    "FromClient": client.FromClient,
    "ToClient": client.ToClient,
    "FromWorker": worker.FromWorker,
    "ToWorker": worker.ToWorker,
    "FromKvWorker": kv.FromKvWorker,
    "ToKvWorker": kv.ToKvWorker,
    "FromFetcher": kv.FromFetcher,
    "ToFetcher": kv.ToFetcher,
    "FromHost": ranks.FromHost,
    "ToHost": ranks.ToHost,
}
MEMBERS = [(union, struct) for union in UNIONS.values() for struct in get_args(union)]
PUBLIC = [*get_args(client.FromClient), *get_args(client.ToClient)]

#: one example of each public message and its bytes
GOLDEN: list[tuple[msgspec.Struct, str]] = [
    (
        client.ClientHello(1, "x/1"),
        "83a474797065ab436c69656e7448656c6c6fa870726f746f636f6c01a56167656e74a3782f31",
    ),
    (
        client.Submit(
            "r1",
            prompt="Hi",
            sampling=client.Sampling(temperature=0.0, max_tokens=8, stop=("END",)),
            deadline_s=2.5,
        ),
        "85a474797065a65375626d6974aa726571756573745f6964a27231a670726f6d7074a24869a873616d706c696e6783ab"
        "74656d7065726174757265cb0000000000000000a473746f7091a3454e44aa6d61785f746f6b656e7308aa646561646c"
        "696e655f73cb4004000000000000",
    ),
    (
        client.Submit("r2", chat=(client.ChatMessage("user", "Hi"),)),
        "83a474797065a65375626d6974aa726571756573745f6964a27232a4636861749182a4726f6c65a475736572a7636f6e"
        "74656e74a24869",
    ),
    (
        client.Submit("r3", prompt_ids=(1, 300)),
        "83a474797065a65375626d6974aa726571756573745f6964a27233aa70726f6d70745f6964739201cd012c",
    ),
    (
        client.Cancel("r1"),
        "82a474797065a643616e63656caa726571756573745f6964a27231",
    ),
    (
        client.Attach("r1", 3),
        "83a474797065a6417474616368aa726571756573745f6964a27231a46861766503",
    ),
    (
        client.ClientPing(),
        "81a474797065aa436c69656e7450696e67",
    ),
    (
        client.ClientBye(),
        "81a474797065a9436c69656e74427965",
    ),
    (
        client.StatusQuery(),
        "81a474797065ab5374617475735175657279",
    ),
    (
        client.ClientWelcome(1, "router-0", "a1", "toy", 8192, 6.0),
        "87a474797065ad436c69656e7457656c636f6d65a870726f746f636f6c01a6726f75746572a8726f757465722d30ab69"
        "6e6361726e6174696f6ea26131a56d6f64656ca3746f79ad6d61785f6d6f64656c5f6c656ecd2000a76c656173655f73"
        "cb4018000000000000",
    ),
    (
        client.ClientRefused(ErrorInfo("version_mismatch", "no", "update")),
        "82a474797065ad436c69656e7452656675736564a56572726f7283a4636f6465b076657273696f6e5f6d69736d617463"
        "68a76d657373616765a26e6fa672656d656479a6757064617465",
    ),
    (
        client.ClientHelloWanted(),
        "81a474797065b1436c69656e7448656c6c6f57616e746564",
    ),
    (
        client.Accepted("r1", 0, 2),
        "84a474797065a84163636570746564aa726571756573745f6964a27231a66e756d62657200ad70726f6d70745f746f6b656e7302",
    ),
    (
        client.Output("r1", 1, 0, (42,), "a"),
        "86a474797065a64f7574707574aa726571756573745f6964a27231a66e756d62657201a663686f69636500a9746f6b65"
        "6e5f696473912aa474657874a161",
    ),
    (
        client.Output("r1", 2, 0, (43,), "", (client.TokenLogprob(43, "b", -0.5, ((43, "b", -0.5),)),), "stop"),
        "88a474797065a64f7574707574aa726571756573745f6964a27231a66e756d62657202a663686f69636500a9746f6b65"
        "6e5f696473912ba474657874a0a86c6f6770726f62739184a8746f6b656e5f69642ba474657874a162a76c6f6770726f"
        "62cbbfe0000000000000a3746f7091932ba162cbbfe0000000000000ad66696e6973685f726561736f6ea473746f70",
    ),
    (
        client.Finished("r1", 3, client.Usage(2, 2), client.Ledger(prefill_s=0.25, ttft_s=0.25, total_s=0.5)),
        "85a474797065a846696e6973686564aa726571756573745f6964a27231a66e756d62657203a5757361676582ad70726f"
        "6d70745f746f6b656e7302b1636f6d706c6574696f6e5f746f6b656e7302a66c6564676572de0003a970726566696c6c5f73"
        "cb3fd0000000000000a6747466745f73cb3fd0000000000000a7746f74616c5f73cb3fe0000000000000",
    ),
    (
        client.Failed("r1", 1, ErrorInfo("cancelled", "stopped")),
        "84a474797065a64661696c6564aa726571756573745f6964a27231a66e756d62657201a56572726f7282a4636f6465a9"
        "63616e63656c6c6564a76d657373616765a773746f70706564",
    ),
    (
        client.ClientPong("a1"),
        "82a474797065aa436c69656e74506f6e67ab696e6361726e6174696f6ea26131",
    ),
    (
        client.StatusReport(
            "router-0",
            "a1",
            "toy",
            1.5,
            (client.WorkerStatus("decode-0", "decode", "n0", "up", 0, 1, 64, 3, {}, 1.0),),
            {"decoding": 1},
            {"finished": 2},
        ),
        "88a474797065ac5374617475735265706f7274a6726f75746572a8726f757465722d30ab696e6361726e6174696f6ea2"
        "6131a56d6f64656ca3746f79a8757074696d655f73cb3ff8000000000000a7776f726b657273918da46e616d65a86465"
        "636f64652d30a4726f6c65a66465636f6465a46e6f6465a26e30a57374617465a27570a777616974696e6700a772756e"
        "6e696e6701a6626c6f636b7340ab626c6f636b735f68656c6403a768616e646c657380a8757074696d655f73cb3ff000"
        "0000000000ac7265706f72745f6167655f73cb0000000000000000ad70726f6d70745f746f6b656e7300ad6361636865"
        "645f746f6b656e7300a8726571756573747381a86465636f64696e6701a5656e64656481a866696e697368656402",
    ),
]


@pytest.mark.parametrize(("union", "struct"), MEMBERS, ids=lambda one: getattr(one, "__name__", "in"))
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_round_trip(union: Any, struct: type[msgspec.Struct], data: st.DataObject) -> None:
    message = data.draw(any_message(struct))
    assert Decoder[msgspec.Struct](union).decode(encode(message)) == message


@pytest.mark.parametrize("union", UNIONS.values(), ids=UNIONS)
def test_the_type_of_a_message_is_its_class_name(union: Any) -> None:
    for struct in get_args(union):
        assert struct.__struct_config__.tag_field == "type"
        assert struct.__struct_config__.tag == struct.__name__
        assert struct.__struct_config__.frozen


def test_both_sides_of_the_public_socket_use_different_names() -> None:
    assert len({struct.__name__ for struct in PUBLIC}) == len(PUBLIC)


@pytest.mark.parametrize(("message", "golden"), GOLDEN, ids=lambda one: type(one).__name__)
def test_golden_bytes(message: msgspec.Struct, golden: str) -> None:
    assert encode(message).hex() == golden.replace(" ", "")


def test_every_public_message_has_golden_bytes() -> None:
    assert {type(message) for message, _ in GOLDEN} == set(PUBLIC)
    assert PROTOCOL == 1, "golden bytes are of protocol 1: look at each of them again"


def test_a_message_for_the_other_side_is_refused() -> None:
    with pytest.raises(DsError, match="does not fit the protocol"):
        Decoder[Any](client.FromClient).decode(encode(client.ClientPong("one")))


@pytest.mark.parametrize("cls", leaves(DsError), ids=lambda cls: cls.code)
def test_an_error_comes_out_as_its_own_class(cls: type[DsError]) -> None:
    error = from_info(cls("what was wrong", remedy="what to do").info())
    assert type(error) is cls
    assert (error.message, error.remedy) == ("what was wrong", "what to do")


def test_error_codes_are_unique() -> None:
    codes = [cls.code for cls in leaves(DsError)]
    assert len(codes) == len(set(codes))


def test_an_error_of_a_newer_release_is_a_failure_that_names_its_code() -> None:
    error = from_info(ErrorInfo("melted", "the rack is on fire"))
    assert type(error) is Failed
    assert "melted" in error.message
