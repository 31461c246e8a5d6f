"""Only this machine's own page, and with a token whoever has it, gets in."""

import asyncio

import pytest

from music_synth.studio.access import Guard, host_name, is_loopback


def ask(token=None, path="/", query="", kind="http", **headers):
    """(status, headers) of a request; a WebSocket that gets through has status 101."""
    sent = []

    async def app(scope, receive, send):
        if scope["type"] == "websocket":
            await send({"type": "websocket.accept"})
        else:
            await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message):
        sent.append(message)

    pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": kind, "path": path, "query_string": query.encode(), "headers": pairs}
    asyncio.run(Guard(app, token)(scope, None, send))
    if sent[0]["type"] == "websocket.accept":
        return 101, {}
    if sent[0]["type"] == "websocket.close":
        return 403, {}
    return sent[0]["status"], dict(sent[0]["headers"])


@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_other_sites_are_refused(kind):
    through = 101 if kind == "websocket" else 200
    assert ask(kind=kind, host="127.0.0.1:8765")[0] == through
    assert ask(kind=kind, host="localhost:8765", origin="http://localhost:8765")[0] == through
    assert ask(kind=kind, host="[::1]:8765", origin="http://[::1]:8765")[0] == through
    for origin in ("http://evil.example", "http://localhost:9999", "null", "http://127.0.0.1:8765.evil.example"):
        assert ask(kind=kind, host="127.0.0.1:8765", origin=origin)[0] == 403
    for host in ("evil.example", "evil.example:8765", "127.0.0.1.evil.example", "", "localhost.evil.example"):
        assert ask(kind=kind, host=host)[0] == 403  # a name of theirs that resolves to this machine
    assert ask(kind=kind)[0] == 403


def test_beyond_this_machine_a_token_is_asked_for():
    assert ask("secret", host="10.0.0.5:8765")[0] == 403
    assert ask("secret", host="10.0.0.5:8765", query="token=secre")[0] == 403
    status, headers = ask("secret", host="10.0.0.5:8765", query="token=secret")
    assert status == 200 and headers[b"set-cookie"].startswith(b"studio_token=secret; HttpOnly; SameSite=Strict")
    assert ask("secret", host="10.0.0.5:8765", cookie="a=b; studio_token=secret")[0] == 200
    assert ask("secret", kind="websocket", host="10.0.0.5:8765", cookie="studio_token=secret")[0] == 101
    assert ask("secret", kind="websocket", host="10.0.0.5:8765", cookie="studio_token=x")[0] == 403
    assert ask("secret", host="10.0.0.5", origin="http://evil.example", query="token=secret")[0] == 403
    assert ask("secret", host="10.0.0.5", path="/health")[0] == 200


def test_pages_may_load_nothing_from_elsewhere():
    headers = ask(host="localhost")[1]
    assert headers[b"content-security-policy"].startswith(b"default-src 'self'")
    assert headers[b"x-content-type-options"] == b"nosniff"


def test_addresses():
    assert all(map(is_loopback, ("127.0.0.1", "127.1.2.3", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "example.com", "")))
    assert [host_name(host) for host in ("a:1", "a", "[::1]:80", "[::1]", "::1")] == ["a", "a", "[::1]", "[::1]", "::1"]
