"""CURVE: who gets in, who is turned away, and what a client is told."""

from __future__ import annotations

import asyncio
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from zmq.auth.thread import ThreadAuthenticator

from dsclient import AsyncClient
from dsclient.errors import BadInput, RouterLost, Unauthorized
from dswire import keys
from dswire.keys import DOMAIN, CurveKeys
from dswire.messages.client import Submit
from support.scripted_router import ScriptedRouter


@pytest.fixture
def home(tmp_path: Path) -> Path:
    directory = tmp_path / "system"
    keys.write_pair(directory / keys.SYSTEM_SECRET, directory / keys.SYSTEM_PUBLIC)
    return directory


@pytest.fixture
def anna(request: pytest.FixtureRequest, tmp_path: Path) -> CurveKeys:
    """A client's keys, not allowed yet, for the system that the test has."""
    system: Path = request.getfixturevalue("guarded" if "guarded" in request.fixturenames else "home")
    directory = tmp_path / "anna"
    keys.write_pair(directory / keys.CLIENT_SECRET, directory / keys.CLIENT_PUBLIC)
    shutil.copyfile(system / keys.SYSTEM_PUBLIC, directory / keys.SYSTEM_PUBLIC)
    return keys.load_any(directory)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A system's directory that the authenticator of this process guards with.

    One for the module: libzmq gives the authenticator's address back some time after its end.
    """
    directory = tmp_path_factory.mktemp("system")
    keys.write_pair(directory / keys.SYSTEM_SECRET, directory / keys.SYSTEM_PUBLIC)
    authenticator = keys.start_authenticator(directory)
    yield directory
    authenticator.stop()


@pytest.fixture
def guarded(served: Path) -> Iterator[Path]:
    """The same, with an empty allow-list."""
    yield served
    shutil.rmtree(served / keys.ALLOWED, ignore_errors=True)


async def ask(router: ScriptedRouter, own: CurveKeys | None, timeout_s: float = 5.0) -> str:
    """One whole request; returns its text."""
    async with AsyncClient(router.address, keys=own, timeout_s=timeout_s) as client:
        task = asyncio.create_task(client.generate("secret"))
        submit = await router.expect(Submit)
        router.answer(submit.request_id, "whispered")
        return (await task).text


async def test_the_systems_own_key_gets_in(guarded: Path) -> None:
    own = keys.load_system(guarded)
    async with ScriptedRouter(keys=own) as router:
        assert await ask(router, own) == "whispered"


async def test_a_key_gets_in_when_allowed_and_out_when_revoked_without_a_restart(
    guarded: Path, anna: CurveKeys
) -> None:
    async with ScriptedRouter(keys=keys.load_system(guarded)) as router:
        with pytest.raises(Unauthorized, match="turned away"):
            await ask(router, anna)
        keys.allow(guarded, "anna", anna.public)
        assert await ask(router, anna) == "whispered"
        (guarded / keys.ALLOWED / "anna.pub").unlink()
        with pytest.raises(Unauthorized):
            await ask(router, anna)
        assert not router.hellos[1:]


async def test_a_broken_file_on_the_list_keeps_nobody_else_out(guarded: Path, anna: CurveKeys) -> None:
    keys.allow(guarded, "anna", anna.public)
    (guarded / keys.ALLOWED / "broken.pub").write_bytes(b"\xff\xfe not a key")
    async with ScriptedRouter(keys=keys.load_system(guarded)) as router:
        assert await ask(router, anna) == "whispered"


async def test_no_keys_for_an_encrypted_router(guarded: Path) -> None:
    async with ScriptedRouter(keys=keys.load_system(guarded)) as router:
        with pytest.raises(Unauthorized, match="one side encrypts"):
            await ask(router, None)
        assert router.hellos == []


async def test_keys_for_a_router_without(guarded: Path) -> None:
    async with ScriptedRouter() as router:
        with pytest.raises(Unauthorized, match="one side encrypts"):
            await ask(router, keys.load_system(guarded))
        assert router.hellos == []


async def test_a_router_that_is_not_the_one_meant_is_not_talked_to(guarded: Path, anna: CurveKeys) -> None:
    keys.allow(guarded, "anna", anna.public)
    mistaken = CurveKeys(anna.public, anna.secret, server=anna.public)
    async with ScriptedRouter(keys=keys.load_system(guarded)) as router:
        with pytest.raises(RouterLost):
            await ask(router, mistaken, timeout_s=0.5)
        assert router.hellos == []


def test_secrets_are_for_their_owner_only(home: Path) -> None:
    assert stat.S_IMODE((home / keys.SYSTEM_SECRET).stat().st_mode) == 0o600


def test_keys_are_never_overwritten(home: Path) -> None:
    before = (home / keys.SYSTEM_SECRET).read_bytes()
    with pytest.raises(BadInput, match="exists already"):
        keys.write_pair(home / keys.SYSTEM_SECRET, home / keys.SYSTEM_PUBLIC)
    assert (home / keys.SYSTEM_SECRET).read_bytes() == before


def test_missing_keys_tell_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(BadInput) as caught:
        keys.load_system(tmp_path)
    assert "dsctl keys make" in caught.value.remedy


@pytest.mark.parametrize(
    "content",
    [b"", b"short", b"x" * 39, b" " * 40, b"\xff" * 40, b"\\" * 40, b"#" * 40, b"x" * 45],
)
def test_a_file_that_holds_no_key_is_named(home: Path, content: bytes) -> None:
    path = home / keys.SYSTEM_SECRET
    path.write_bytes(content)
    with pytest.raises(BadInput, match=r"system\.key: is no Z85 key"):
        keys.load_system(home)


def test_where_clients_have_no_business_the_systems_key_alone_opens(home: Path, anna: CurveKeys) -> None:
    keys.allow(home, "anna", anna.public)
    system = keys.load_system(home).public
    for directory, wanted in ((home / keys.ALLOWED, [True, True, False]), (None, [True, False, False])):
        guard = keys._AllowList(directory, system)
        assert [guard.callback(DOMAIN, key) for key in (system, anna.public, b"x" * 40)] == wanted


def test_who_knocks_first_is_judged_by_the_list(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # an authenticator that runs and has not been told whom to ask turns away all
    judges: list[bool] = []
    monkeypatch.setattr(
        ThreadAuthenticator, "start", lambda self: judges.append(DOMAIN in self.credentials_providers)
    )
    keys.start_authenticator(home)
    assert judges == [True]


def test_the_allow_list(home: Path, anna: CurveKeys) -> None:
    assert keys.allowed(home) == {}
    keys.allow(home, "anna", anna.public)
    keys.allow(home, "anna", anna.public)
    assert keys.allowed(home) == {"anna": anna.public}
    with pytest.raises(BadInput, match="another key"):
        keys.allow(home, "anna", keys.load_system(home).public)
    (home / keys.ALLOWED / "broken.pub").write_text("nothing")
    with pytest.raises(BadInput, match=r"broken\.pub"):
        keys.start_authenticator(home)
