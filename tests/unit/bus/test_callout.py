"""Who is let in: what the server asks, what the client proves, what is answered."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nacl.signing import SigningKey

from cocoon.bus import permissions
from cocoon.bus.callout import (
    MAX_QUESTION_BYTES,
    Place,
    admit,
    identity_of,
    read_question,
    refuse,
)
from cocoon.bus.keys import ACCOUNT, SERVER, USER, nkey, raw_of_nkey
from cocoon.kernel.errors import Forbidden

SERVER_KEY, CLIENT, ISSUER = (SigningKey(bytes([n] * 32)) for n in (1, 2, 3))
USER_NKEY = nkey(USER, bytes(SigningKey(bytes([4] * 32)).verify_key))
SERVER_NKEY = nkey(SERVER, bytes(SERVER_KEY.verify_key))
CLIENT_NKEY = nkey(USER, bytes(CLIENT.verify_key))
NONCE, NOW_S = "drawn-by-the-server", 1_800_000_000


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def body(**changes: Any) -> dict[str, Any]:
    signature = b64(CLIENT.sign(NONCE.encode()).signature)
    return {
        "type": "authorization_request", "version": 2, "user_nkey": USER_NKEY,
        "server_id": {"id": SERVER_NKEY, "name": "x", "host": "127.0.0.1"},
        "client_info": {"host": "192.0.2.9", "id": 7, "kind": "Client", "type": "nats",
                        "nonce": NONCE},
        "connect_opts": {"nkey": CLIENT_NKEY, "sig": signature, "protocol": 1, "lang": "x"},
        **changes,
    }  # fmt: skip


def token(
    nats: Any, by: SigningKey = SERVER_KEY, head: dict[str, str] | None = None, **changes: Any
) -> bytes:
    claims = {"iss": SERVER_NKEY, "aud": "nats-authorization-request", "exp": NOW_S + 2,
              "sub": "A", "nats": nats, **changes}  # fmt: skip
    head = head or {"typ": "JWT", "alg": "ed25519-nkey"}
    signed = f"{b64(json.dumps(head).encode())}.{b64(json.dumps(claims).encode())}"
    return f"{signed}.{b64(by.sign(signed.encode()).signature)}".encode()


def test_a_key_that_signs_the_nonce_is_proven() -> None:
    question = read_question(token(body()))
    assert identity_of(question) == bytes(CLIENT.verify_key)
    assert (question.host, question.encrypted) == ("192.0.2.9", False)
    encrypted = read_question(token(body(client_tls={"version": "1.3"})))
    assert encrypted.encrypted
    standard = base64.b64encode(CLIENT.sign(NONCE.encode()).signature).decode()
    connect = {"nkey": CLIENT_NKEY, "sig": standard}
    assert identity_of(read_question(token(body(connect_opts=connect))))


@pytest.mark.parametrize(
    "data",
    [
        b"", b"a.b", b"a.b.c", b"a.b.c.d", b"." * 3, b"\xff" * 9, b"x" * (MAX_QUESTION_BYTES + 1),
        token(body(), by=CLIENT),  # another's signature
        token(body(), iss=CLIENT_NKEY, by=CLIENT),  # not a server's key
        token(body(), aud="somebody"),
        token(body(type="authorization_response")),
        token(body(server_id={"id": nkey(SERVER, bytes(32))})),
        token(body(user_nkey=SERVER_NKEY)),
        token(body(user_nkey="U")),
        token(body(), head={"typ": "JWT", "alg": "none"}),
        token({}), token([]), token(None), token(body(client_info=[])),
        token(body(client_info={"host": 7})),
        token(body())[:-2],
        token(body()).replace(b".", b".A", 1),
    ],
)  # fmt: skip
def test_what_no_server_says_is_not_read(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        read_question(data)


@pytest.mark.parametrize(
    ("connect", "nonce", "code"),
    [
        ({}, NONCE, "no_key"),
        ({"nkey": "UABC"}, NONCE, "bad_key"),
        ({"nkey": nkey(23 << 3, bytes(32))}, NONCE, "bad_key"),  # a curve key
        ({"nkey": nkey(ACCOUNT, bytes(CLIENT.verify_key))}, NONCE, "bad_key"),
        ({"nkey": CLIENT_NKEY[:-1] + "A"}, NONCE, "bad_key"),
        ({"nkey": "é" * 56}, NONCE, "bad_key"),
        ({"nkey": CLIENT_NKEY}, NONCE, "bad_signature"),
        ({"nkey": CLIENT_NKEY, "sig": "é"}, NONCE, "bad_signature"),
        ({"nkey": CLIENT_NKEY, "sig": b64(bytes(64))}, NONCE, "bad_signature"),
        ({"nkey": CLIENT_NKEY, "sig": b64(bytes(63))}, NONCE, "bad_signature"),
        ({"nkey": CLIENT_NKEY, "sig": b64(ISSUER.sign(NONCE.encode()).signature)}, NONCE,
         "bad_signature"),
        ({"nkey": CLIENT_NKEY, "sig": b64(CLIENT.sign(NONCE.encode()).signature)}, "another",
         "bad_signature"),
        ({"nkey": CLIENT_NKEY, "sig": b64(CLIENT.sign(b"").signature)}, "", "bad_signature"),
    ],
)  # fmt: skip
def test_who_proves_nothing_is_refused_in_a_sentence(
    connect: dict[str, str], nonce: str, code: str
) -> None:
    info = {"host": "192.0.2.9", "nonce": nonce}
    question = read_question(token(body(connect_opts=connect, client_info=info)))
    with pytest.raises(Forbidden) as error:
        identity_of(question)
    assert error.value.code == code
    assert " " in error.value.message


def claims_of(data: bytes | str) -> dict[str, Any]:
    text = data.decode() if isinstance(data, bytes) else data
    head, claims, signature = text.split(".")
    raw = base64.urlsafe_b64decode(signature + "==")
    ISSUER.verify_key.verify(f"{head}.{claims}".encode(), raw)
    found: dict[str, Any] = json.loads(base64.urlsafe_b64decode(claims + "=="))
    return found


def test_an_answer_is_for_one_connection_of_one_server_and_ends() -> None:
    question = read_question(token(body()))
    allowed = permissions.provider("prov_x", "BERTH_0007")
    answer = claims_of(admit(question, Place("prov_x", allowed, NOW_S + 60), ISSUER, NOW_S))
    assert (answer["sub"], answer["aud"]) == (USER_NKEY, SERVER_NKEY)
    assert answer["iss"] == nkey(ACCOUNT, bytes(ISSUER.verify_key))
    user = claims_of(answer["nats"]["jwt"])
    assert (user["sub"], user["aud"], user["exp"]) == (USER_NKEY, "BERTH_0007", NOW_S + 60)
    assert user["nats"]["pub"]["allow"] == list(allowed.publish)
    assert user["nats"]["sub"]["allow"] == list(allowed.subscribe)
    assert "resp" not in user["nats"]
    told = claims_of(refuse(question, "not today", ISSUER, NOW_S))
    assert told["nats"]["error"] == "not today"
    assert "jwt" not in told["nats"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=60) | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner,
                                                               max_size=4),
    max_leaves=12,
)  # fmt: skip


@given(
    changed=st.dictionaries(
        st.sampled_from(
            ["type", "user_nkey", "server_id", "client_info", "connect_opts", "client_tls"]
        ),
        json_values,
        max_size=3,
    ),
)
def test_whatever_stands_in_a_question_it_is_read_refused_or_not_read(
    changed: dict[str, Any],
) -> None:
    try:
        question = read_question(token(body(**changed)))
    except ValueError:
        return
    try:
        identity = identity_of(question)
    except Forbidden:
        return
    assert identity == bytes(CLIENT.verify_key)


@given(st.binary(min_size=32, max_size=32), st.sampled_from([USER, ACCOUNT, SERVER]))
def test_an_nkey_reads_back_and_any_other_text_does_not(raw: bytes, kind: int) -> None:
    text = nkey(kind, raw)
    assert raw_of_nkey(kind, text) == raw
    for wrong in (text.lower(), text[:-1], text + "A", "=" + text[1:]):
        with pytest.raises(ValueError, match=r"\w"):
            raw_of_nkey(kind, wrong)
