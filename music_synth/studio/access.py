"""Who may use the studio: this machine's own page, and nobody through another site.

A site that somebody visits can send requests to 127.0.0.1, by its own name (`Origin`) or by a name of its own that
resolves to this machine (`Host`); both are refused. Where the studio listens beyond this machine, a random token is
asked for as well, once in the address and then in a cookie.
"""

from __future__ import annotations

import hmac
import ipaddress
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "studio_token"
HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none';"
    " form-action 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}
OPEN_PATHS = ("/health",)  # without a token


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address to listen on."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def host_name(value: str) -> str:
    """The name in a Host header, without its port."""
    name, colon, port = value.rpartition(":")
    return name if colon and port.isdigit() and (":" not in name or name.endswith("]")) else value


class Guard:
    """ASGI middleware that refuses what `problem` finds, and adds security headers."""

    def __init__(self, app: ASGIApp, token: str | None = None):
        self.app, self.token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        problem = self.problem(scope)
        if problem is not None:
            await refuse(scope, send, problem)
            return
        fresh = self._has_fresh_token(scope)

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", []))
                headers += [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                if fresh:
                    cookie = f"{COOKIE}={quote(self.token or '')}; HttpOnly; SameSite=Strict; Path=/"
                    headers.append((b"set-cookie", cookie.encode()))
                message = {**message, "headers": headers}
            await send(message)

        await self.app(scope, receive, send_guarded)

    def problem(self, scope: Scope) -> str | None:
        """Says why a request is refused; None: it is not."""
        given: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            given.setdefault(name.lower(), []).append(value)
        hosts, origins = given.get(b"host", []), given.get(b"origin", [])
        if len(hosts) != 1 or len(origins) > 1:
            return "one Host, and at most one Origin"
        host = hosts[0].decode("latin-1").lower()
        if self.token is None and not is_loopback(host_name(host).strip("[]")):
            return "this Host is not this machine: open the address that the studio printed"
        if origins and origins[0].decode("latin-1").lower() not in (f"http://{host}", f"https://{host}"):
            return "another site may not use the studio"
        if given.get(b"sec-fetch-site", [b"none"])[0] == b"cross-site" and scope["type"] == "websocket":
            return "another site may not use the studio"
        if self.token is not None and scope["path"] not in OPEN_PATHS and not self._knows_token(scope, given):
            return "open the address with the token that the studio printed"
        return None

    def _knows_token(self, scope: Scope, given: dict[bytes, list[bytes]]) -> bool:
        offered = [self._token_of_address(scope)]
        for value in given.get(b"cookie", []):
            try:
                cookies = SimpleCookie(value.decode("latin-1"))
            except CookieError:
                continue
            offered += [cookies[COOKIE].value] if COOKIE in cookies else []
        wanted = (self.token or "").encode()
        return any(hmac.compare_digest(text.encode(), wanted) for text in offered if text)

    def _has_fresh_token(self, scope: Scope) -> bool:
        return self.token is not None and scope["type"] == "http" and self._token_of_address(scope) == self.token

    @staticmethod
    def _token_of_address(scope: Scope) -> str:
        query = scope.get("query_string", b"")[:2000].decode("latin-1")
        try:
            return parse_qs(query, max_num_fields=20).get("token", [""])[0]
        except ValueError:
            return ""


async def refuse(scope: Scope, send: Send, why: str) -> None:
    """Answers with status 403; a WebSocket is closed before it is accepted."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 4403, "reason": why})
        return
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": 403, "headers": headers})
    await send({"type": "http.response.body", "body": why.encode()})
