"""The owner's side of Flow2API: accounts, settings, jobs, the log, and the page, under /api.

It builds on flow2api.py, which serves its clients without it, too. The paths, fields and types are
those of the programs before it, so that their pages work here.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import itertools
import math
import re
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Iterable
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

import flow2api
from flow2api import (
    ADMIN,
    AWAKE,
    EITHER,
    HIDDEN,
    NETWORK_ERRORS,
    OPEN,
    PUBLIC,
    SETTING,
    SETTINGS,
    TIERS,
    VIDEO_STATES,
    Gateway,
    GatewayError,
    Job,
    SettingError,
    Settings,
    Token,
    __version__,
    bad,
    bearer,
    clean_session_token,
    digest,
    error_event,
    good_proxy,
    hash_password,
    iso,
    one_of,
    read_json,
    same,
    sse,
    stream_answer,
    to_json,
    why,
)

SESSION_SECONDS, GUESSES = 7 * 86400, (10, 100)  # failed logins in 15 minutes: of one, of all
SESSION = "flow2api_session"  # the cookie of our own page; other programs send a Bearer
PAGE_POLICY = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
PAGE_POLICY += "; connect-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:"
PAGE_HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
# What the original's page asks for: path -> settings; a field is called like its setting, or as it
# stands before a colon.
_TIMES = "generation.image_timeout generation.video_timeout"
CONFIGS = {
    "proxy/config": "proxy.proxy_enabled proxy.proxy_url",
    "config/proxy": "enabled:proxy.proxy_enabled proxy.proxy_enabled proxy.proxy_url",
    "config/generation": _TIMES,
    "generation/timeout": _TIMES,
    "cache/config": "cache.enabled cache.timeout cache.base_url",
    "cache/enabled": "cache.enabled",
    "cache/base-url": "cache.base_url",
    "token-refresh/config": "token_refresh.enabled token_refresh.interval"
    " at_auto_refresh_enabled:token_refresh.enabled scheduler_running:token_refresh.enabled",
    "token-refresh/enabled": "token_refresh.enabled",
    "admin/config": "global.admin_username global.api_key admin.error_ban_threshold"
    " debug_enabled:admin.debug",
    "admin/apikey": "new_api_key:global.api_key",
    "admin/debug": "enabled:admin.debug",
    "plugin/config": "plugin.connection_token plugin.auto_enable_on_update",
}
# What a text that is set here must be like, beyond what Settings asks for.
PROXY, _WEB = "must look like http://host:port or socks5://host:port", r"https?://[^\s/]+\S*"
FORMS = {
    "global.admin_username": (r"\S.*", "must be a name"),
    "global.api_key": ("[!-~]{6,}", "must have 6 characters or more, and no blanks"),
    "plugin.connection_token": ("([!-~]{16,})?", "must have 16 characters or more, and no blanks"),
    "cache.base_url": (f"({_WEB})?", "must look like https://host:port"),
}
FORMS |= dict.fromkeys(("flow.labs_base_url", "flow.api_base_url"), (_WEB, "must be an address"))
TOKEN_FIELDS = dict.fromkeys(("project_id", "project_name", "remark", "proxy_url"), str)
TOKEN_FIELDS |= dict.fromkeys(("is_active", "image_enabled", "video_enabled"), bool)
TOKEN_FIELDS |= dict.fromkeys(("image_concurrency", "video_concurrency"), int)
TOKEN_FIELDS |= dict.fromkeys(("image_count", "video_count", "error_count", "use_count"), int)


def now() -> float:
    return flow2api.now()  # the clock that tests drive


def session_of(request: web.Request) -> str:
    """The admin session of a request: a Bearer, or the cookie, which counts for our page alone."""
    given, site = bearer(request), request.headers.get("Sec-Fetch-Site", "")
    own = site in ("none", "same-origin")
    if not site:  # plain http: a page of another port can POST, but not JSON
        own = request.method != "POST" or "Origin" not in request.headers
        own = own or request.content_type == "application/json"
    if given and not given.lower().startswith("basic "):  # that is a proxy's before us
        return given
    return request.cookies.get(SESSION, "") if own else ""


def same_password(password: str, known: str) -> bool:
    """`known`: a hash, or the text that stands in setting.toml."""
    hashed = re.match(r"scrypt\$([0-9a-f]+)\$", known)
    given = hash_password(password, bytes.fromhex(hashed[1])) if hashed else password
    return known != "" and same(given, known)


def ok(message: str, **more: Any) -> web.Response:
    return web.json_response({"success": True, "message": message, **more})


def mask(secret: str) -> str:
    """What may be shown of a secret, and of an address with a password in it."""
    if "://" in secret:
        return re.sub("//.*@", "//…@", secret)
    return f"{secret[:4]}…{secret[-4:]}" if len(secret) > 20 else "…" * bool(secret)


def token_object(token: Token, masked=False) -> dict:
    """As GET /api/tokens gives it, with session and access token in clear, or masked."""
    names = "id email name remark is_active use_count image_enabled video_enabled reason"
    names += " image_concurrency video_concurrency image_count video_count error_count failures"
    shown = {name: getattr(token, name) for name in names.split()}
    times = ("at_expires", "created_at", "last_used_at", "paused_until")
    shown |= {name: iso(getattr(token, name)) for name in times}
    hide = mask if masked else str
    shown |= {name: hide(getattr(token, name)) for name in ("st", "at", "proxy_url")}
    shown |= {"token": shown["at"], "credits": token.credits or 0, "busy": token.busy}
    shown |= {"user_paygate_tier": token.tier or None, "tier": TIERS.get(token.tier, "")}
    shown["paused_for"] = str(token.paused_for) if token.paused_until > now() else ""
    shown["current_project_id"] = token.project_id or None
    return shown | {"current_project_name": token.project_name or None}


def token_fields(body: dict) -> dict:
    """The fields that a request sets; null and a masked proxy keep what is there."""
    given = {name: body.get(name, body.get(f"current_{name}")) for name in TOKEN_FIELDS}
    fields = {name: value for name, value in given.items() if value is not None}
    for name, value in fields.items():
        kind = TOKEN_FIELDS[name]
        if type(value) is not kind or (kind is int and not -1 <= value < 10**9):
            raise bad(f"{name} must be of type {kind.__name__}; a number, -1 or more", name)
    if "…" in fields.get("proxy_url", ""):
        del fields["proxy_url"]
    if not good_proxy(fields.get("proxy_url", "")):
        raise bad(f"proxy_url {PROXY}", "proxy_url")
    return fields | (AWAKE if fields.get("is_active") else {})


def session_token(body: dict) -> str:
    given = body.get("session_token") or body.get("st")
    st = clean_session_token(given) if isinstance(given, str) else ""
    if not st or not st.isascii() or not st.isprintable():
        raise bad("st, the session token, is missing or not one", "st")
    return st


class AdminApi(Gateway):
    """The handlers of /api, of /metrics and of the page."""

    def __init__(self, *parts: Any):
        super().__init__(*parts)
        # Of the admin sessions: session_key -> the end.
        self.sessions: dict[str, float] = self.store.settings().get("sessions", {})
        self.guesses: list[tuple[float, str | None]] = []  # failed logins: when, from where

    async def login(self, request: web.Request) -> web.Response:
        """POST /api/login -> a session token for /api, good for seven days after its last use."""
        small = request.clone(client_max_size=1 << 16)  # whoever asks has shown no key yet
        body, known = await read_json(small), self.settings["global.admin_username"]
        good, name = await self.password_fits(request, body.get("password")), body.get("username")
        if not good or not same(str(name), known):
            raise GatewayError("invalid_api_key", "Invalid credentials")
        session = "admin-" + secrets.token_urlsafe(32)
        end = {self.session_key(session): now() + SESSION_SECONDS}
        await self.keep_sessions(self.sessions | end)
        answer = ok("Login successful", token=session, username=name)
        options = {"httponly": True, "samesite": "Strict", "secure": request.secure}
        answer.set_cookie(SESSION, session, max_age=100 * SESSION_SECONDS, **options)
        return answer

    async def password_fits(self, request: web.Request, password: Any) -> bool:
        """Raises too_many_logins."""
        self.guesses = [guess for guess in self.guesses if guess[0] > now() - 900]
        own = sum(who == request.remote for _, who in self.guesses)
        if own >= GUESSES[0] or len(self.guesses) >= GUESSES[1]:
            words = "Too many failed logins; wait a quarter of an hour"
            raise GatewayError("too_many_logins", words, retry_after=900)
        self.guesses.append((now(), request.remote))  # before the wait: many may come at once
        known = self.settings["global.admin_password"]
        if good := await asyncio.to_thread(same_password, str(password), known):
            self.guesses = [guess for guess in self.guesses if guess[1] != request.remote]
        return good

    def session_key(self, session: str) -> str:
        """A session's hash. It changes with the password, which ends them all."""
        return digest(f"{session} {self.settings['global.admin_password']}")

    def keep_sessions(self, sessions: dict[str, float]) -> Awaitable[None]:
        self.sessions = {key: end for key, end in sessions.items() if end > now()}
        row = {"name": "sessions", "data": to_json(self.sessions)}
        return self.store.put_rows(("settings", row))

    def logged_in(self, request: web.Request) -> bool:
        key = self.session_key(session_of(request))
        end, later = self.sessions.get(key, 0), now() + SESSION_SECONDS
        if now() < end < later - 3600:  # at most once an hour: a restart shall know it, too
            self.keep_sessions(self.sessions | {key: later})
        return end > now()

    async def logout(self, request: web.Request) -> web.Response:
        del self.sessions[self.session_key(session_of(request))]
        await self.keep_sessions(self.sessions)
        return ok("Logged out successfully")

    async def change_password(self, request: web.Request) -> web.Response:
        """POST /api/admin/password {old_password, new_password, username?}; ends all sessions."""
        body = await read_json(request)
        if not await self.password_fits(request, body.get("old_password")):
            raise bad("The old password is wrong", "old_password")
        new = body.get("new_password")
        if not isinstance(new, str) or len(new) < 8:
            raise bad("A new password needs 8 characters or more", "new_password")
        hashed = await asyncio.to_thread(hash_password, new, secrets.token_bytes(16))
        name = {"global.admin_username": body["username"]} if body.get("username") else {}
        await self.change({"global.admin_password": hashed} | name)
        return ok("Password changed; log in again")

    async def change(self, values: dict) -> None:
        """Sets settings, all or none, at once and for good; None goes back to what stands behind,
        a masked secret stays. Raises invalid_request, conflict."""
        masked = {name for name in HIDDEN if values.get(name) == mask(self.settings[name])}
        values = {name: value for name, value in values.items() if name not in masked}
        draft = Settings()
        for name, value in values.items():
            if (source := self.settings.source(name)) in Settings.LAYERS[:2]:
                raise bad(f"{name} is set by the {source}; change it there", name, "conflict")
            if value is None and name in SETTING:
                continue
            try:
                draft.put("admin page", name, value, "the new value")
            except SettingError as err:
                raise bad(str(err), name) from None
            if name in FORMS and not re.fullmatch(FORMS[name][0], value):
                raise bad(f"{name} {FORMS[name][1]}", name)
            if name == "proxy.proxy_url" and (not good_proxy(value) or "…" in value):
                raise bad(f"{name} {PROXY}", name)
        if draft.warnings:
            raise bad(draft.warnings[0])
        new, layers = draft.layers["admin page"], self.settings.layers
        rows = ({"name": f"admin page:{name}", "data": to_json(new.get(name))} for name in values)
        await self.store.put_rows(*(("settings", row) for row in rows))
        known = layers["admin page"] | dict.fromkeys(values) | new
        layers["admin page"] = {name: value for name, value in known.items() if value is not None}

    def shown(self, name: str, masked: bool) -> Any:
        value = self.settings[name]
        return mask(value) if masked and name in HIDDEN else value

    async def config(self, request: web.Request) -> web.Response:
        """GET and POST of a group of settings (see CONFIGS); null keeps what is there. mask=1 hides
        the secrets."""
        path = request.path.removeprefix("/api/")
        pairs = (item.rpartition(":") for item in CONFIGS[path].split())
        fields = {field or name.partition(".")[2]: name for field, _, name in pairs}
        if request.method == "POST":
            body = await read_json(request)
            if not set(body) & set(fields):
                raise bad(f"This sets {', '.join(fields)}; the body names none of them")
            given = ((name, body.get(field)) for field, name in fields.items())
            await self.change({name: value for name, value in given if value is not None})
        masked = request.query.get("mask") == "1"
        shown = {field: self.shown(name, masked) for field, name in fields.items()}
        if "base_url" in fields:
            shown["effective_base_url"] = shown["base_url"] or str(request.url.origin())
        if "connection_token" in fields:
            shown["connection_url"] = f"{request.url.origin()}/api/plugin/update-token"
        return ok("Saved" if request.method == "POST" else "", config=shown, **shown)

    async def all_settings(self, request: web.Request) -> web.Response:
        """/api/settings. GET: each with value, source, help and bounds; POST: {name: value}."""
        elsewhere = ("global.admin_password", "server.data_dir")  # it has a path; it holds these
        if request.method == "POST":
            body = await read_json(request)
            for name in set(elsewhere) & set(body):
                raise bad(f"{name} is not changed here", name)
            given = {name for name, value in body.items() if value is not None}
            for name in given & {"server.host", "server.port"}:  # these can stop the next start
                raise bad(f"{name} is read at the start only: set it in setting.toml", name)
            await self.change(body)
            return ok("Saved")
        rows = [setting._asdict() for setting in SETTINGS if setting.name not in elsewhere]
        for row in rows:
            row["source"] = self.settings.source(row["name"])
            row["value"] = self.shown(row["name"], masked=True)
            row["high"] = None if row["high"] == math.inf else row["high"]
        return web.json_response({"success": True, "settings": rows})

    async def list_tokens(self, request: web.Request) -> web.Response:
        """GET /api/tokens, the newest first; mask=1 hides the secrets."""
        masked = request.query.get("mask") == "1"
        tokens = sorted(self.pool.tokens.values(), key=lambda token: -token.id)
        return web.json_response([token_object(token, masked) for token in tokens])

    async def add_token(self, request: web.Request) -> web.Response:
        """POST /api/tokens: a new account, or a new session of a known one."""
        body = await read_json(request)
        st, fields = session_token(body), token_fields(body)
        if any(token.st == st and token.is_active for token in self.pool.tokens.values()):
            raise bad("This session token is in the pool already", "st", "conflict")
        token, new = await self.pool.add(st, **fields)
        names = ("id", "email", "credits", "project_id", "project_name")
        words = "Token added" if new else "This account was known; its session is updated"
        return ok(words, token={name: getattr(token, name) for name in names}, token_id=token.id)

    async def update_token(self, request: web.Request) -> web.Response:
        """PUT /api/tokens/{id}: sets what is named; Google is asked about a new session only."""
        token, body = self.token(request), await read_json(request)
        fields, given = token_fields(body), body.get("st")
        if "…" in str(proxy := body.get("proxy_url")) and proxy != mask(token.proxy_url):
            raise bad("proxy_url is masked in part: write it out, with its password", "proxy_url")
        masked = isinstance(given, str) and "…" in given
        if given and not masked and (st := session_token(body)) != token.st:
            draft = Token(**{"proxy_url": token.proxy_url} | fields | {"st": st})
            session = await self.pool.upstream.session(draft)
            if session["email"] not in ("", token.email):
                raise bad(f"This session is of {session['email']}", "st", "conflict")
            fields = session | AWAKE | fields | {"email": token.email}
        await self.pool.update(token, **fields)
        return ok("Token updated", token=token_object(token, masked=True))

    async def delete_token(self, request: web.Request) -> web.Response:
        await self.pool.remove(self.token(request))
        return ok("Token deleted")

    async def act_on_token(self, request: web.Request) -> web.Response:
        """POST /api/tokens/{id}/enable, disable, refresh-at, refresh-credits, test."""
        token, action = self.token(request), request.match_info["action"]
        if action in ("enable", "disable"):
            await self.pool.update(token, **(AWAKE if action == "enable" else {"is_active": False}))
        elif action == "refresh-at":
            await self.pool.access_token(token, token.at)
        else:
            await self.pool.check(token)
        shown, credits = token_object(token, masked=True), token.credits or 0
        about = {"status": "success", "email": token.email, "username": token.name}
        return ok("Done", token=shown, credits=credits, **about)

    async def act_on_all(self, request: web.Request) -> web.Response:
        """/api/tokens/batch-enable, -disable, -test and -delete-disabled: all accounts, a test only
        of the active ones, of those too (only_active=false) or the others (only_disabled=true)."""
        action, query, both = request.match_info["action"], request.query, (True, False)
        active = one_of(query, "only_active", both, True)
        disabled = one_of(query, "only_disabled", both, False)
        wanted = (False,) if disabled else (True,) if active else both
        names = "enabled disabled deleted valid invalid auto_enabled auto_disabled"
        done = Counter(dict.fromkeys(names.split(), 0))
        for token in list(self.pool.tokens.values()):
            if action == "test" and token.is_active in wanted:
                done.update(await self.tested(token))
            elif action in ("enable", "disable"):
                await self.pool.update(token, **AWAKE | {"is_active": action == "enable"})
                done[f"{action}d"] += 1
            elif action == "delete-disabled" and not token.is_active and not token.busy.total():
                await self.pool.remove(token)
                done["deleted"] += 1
        return ok("Done", **done)

    async def tested(self, token: Token) -> Iterable[str]:
        """Asks Google about an account, and enables or disables it by the answer."""
        try:
            await self.pool.check(token)
        except GatewayError as err:
            if not token.is_active or err.does != "session":
                return ["invalid"]
            self.pool.blame(token, err)
            return ["invalid", "auto_disabled"]
        if token.is_active:
            return ["valid"]
        await self.pool.update(token, **AWAKE)
        return ["valid", "auto_enabled"]

    async def import_tokens(self, request: web.Request) -> web.Response:
        """POST /api/tokens/import, batch-add: {tokens: [objects as GET gives, or session tokens]}.
        One that is refused stops no other; of a known account, what is not named stays."""
        items, details, errors = (await read_json(request)).get("tokens"), [], []
        if not isinstance(items, list):
            raise bad("tokens must be a list", "tokens")
        known = {token.st: token for token in self.pool.tokens.values()}
        for item in items:
            try:
                item = item if isinstance(item, dict) else {"st": item}
                st, fields = session_token(item), token_fields(item)
                token, new = known.get(st), False
                if token:
                    await self.pool.update(token, **fields)
                else:
                    token, new = await self.pool.add(st, **fields)
                status = "added" if new else "updated"
                details.append({"token_id": token.id, "email": token.email, "status": status})
            except GatewayError as err:
                errors.append(f"{item.get('email') or 'an account'}: {err}")
        added = sum(detail["status"] == "added" for detail in details)
        counts = {"added": added, "updated": len(details) - added, "skipped": 0}
        return ok("Imported", **counts, failed=len(errors), errors=errors, details=details)

    async def convert_session(self, request: web.Request) -> web.Response:
        """POST /api/tokens/st2at: what a session token gives; nothing is stored."""
        st = session_token(await read_json(request))
        session = await self.pool.upstream.session(Token(st=st))
        shown = {"access_token": session["at"], "email": session["email"]}
        return ok("ST converted to AT", **shown, expires=iso(session["at_expires"]))

    async def system_info(self, request: web.Request) -> web.Response:
        credits = (token.credits or 0 for token in self.pool.tokens.values() if token.is_active)
        info = self.counters() | {"total_credits": sum(credits), "version": __version__}
        info["cache_bytes"] = await asyncio.to_thread(self.media.expire, math.inf)
        return web.json_response({"success": True, "info": info, **info})

    async def empty_cache(self, request: web.Request) -> web.Response:
        """DELETE /api/cache: removes the kept files; the clips stay at Flow."""
        return ok("Emptied", cache_bytes=await asyncio.to_thread(self.media.expire, -1))

    async def test_proxy(self, request: web.Request) -> web.Response:
        """POST /api/proxy/test {proxy_url}: whether Google is reached, by the set one or none."""
        proxy, start = token_fields(await read_json(request)).get("proxy_url", ""), now()
        proxy = proxy or self.settings["proxy.proxy_url"]
        url, timeout = self.settings["flow.labs_base_url"], aiohttp.ClientTimeout(15)
        try:
            async with self.wire.request("GET", url, proxy=proxy, timeout=timeout) as reply:
                found = {"status_code": reply.status, "final_url": str(reply.url), "test_url": url}
        except (*self.wire.not_sent, *NETWORK_ERRORS) as err:
            raise GatewayError("upstream_unreachable", f"No way to {url}: {why(err)}") from None
        return ok("Reached", **found, elapsed_ms=int((now() - start) * 1000))

    def job_object(self, request: web.Request, job: Job) -> dict:
        """A job as its owner may see it: the video object, and whose and how it was."""
        token = self.pool.tokens.get(job.token_id) or Token()
        shown = self.video_object(request, job) | {"account": token.email, "username": token.name}
        shown |= {"state": job.state, "stage": job.stage, "n": job.n, "kind": job.plan.kind}
        shown |= {"origin": job.origin, "token_id": job.token_id, "plan": job.plan.describe()}
        shown["cost"] = (job.plan.cost(token.tier) or 0) * job.n * (job.submitted_at > 0)
        shown["duration"] = (job.completed_at or now()) - (job.submitted_at or job.created_at)
        urls = (self.output_url(request, job, output, file=True) for output in job.done())
        return shown | {"urls": list(urls)}

    async def list_jobs(self, request: web.Request) -> web.Response:
        """GET /api/jobs?state&token_id&model&after&limit: the newest first."""
        query, tokens = request.query, list(self.pool.tokens)
        limit = one_of(query, "limit", range(1, 501), 50)
        given = {"model": query.get("model", ""), "after": query.get("after", "")}
        given["states"] = [one_of(query, "state", list(VIDEO_STATES), "")]
        given["token_id"] = one_of(query, "token_id", tokens, None)
        if given["after"]:
            await self.known_job(given["after"])
        jobs = await self.jobs.page(**given, limit=limit + 1)
        shown = [self.job_object(request, job) for job in jobs[:limit]]
        return web.json_response({"success": True, "jobs": shown, "has_more": len(jobs) > limit})

    async def one_job(self, request: web.Request) -> web.Response:
        """GET, DELETE /api/jobs/{id}; POST /api/jobs/{id}/cancel."""
        job = await self.known_job(request.match_info["id"])
        if request.method == "POST":
            await self.jobs.cancel(job)
        if request.method == "DELETE":
            await self.jobs.delete(job)
        return ok("Done", job=self.job_object(request, job))

    def log_object(self, request: web.Request, job: Job) -> dict:
        """A job as a row of the original's log, base64 cut out."""
        known = self.job_object(request, job)
        shown = {name: known[name] for name in ("id", "token_id", "duration", "progress")}
        shown |= {"operation": f"generate_{job.plan.kind}", "task_id": job.id}
        shown |= {"token_email": known["account"], "token_username": known["username"]}
        shown |= {"task_status": job.state, "notes": job.notes}
        shown["status_code"] = GatewayError(**job.error).status if job.error else 200
        shown["created_at"] = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(job.created_at))
        asked = to_json({name: known[name] for name in ("model", "prompt", "n", "origin")})
        shown["request_body"] = re.sub("[0-9A-Za-z+/]{200,}=*", "…", asked)
        return shown | {"response_body": to_json(job.error or {"urls": known["urls"]})}

    async def logs(self, request: web.Request) -> web.Response:
        """GET /api/logs?limit: what became of the jobs, the newest first. DELETE: begins anew; the
        jobs stay, for those who ask for them."""
        if request.method == "DELETE":
            await self.store.put_rows(("settings", {"name": "log", "data": to_json(now())}))
            return ok("Cleared")
        limit = one_of(request.query, "limit", range(1, 1001), 100)
        jobs = await self.jobs.page(limit=limit)
        start = (await asyncio.to_thread(self.store.settings)).get("log", 0)
        new = (job for job in jobs if job.created_at > start)
        return web.json_response([self.log_object(request, job) for job in new])

    async def one_log(self, request: web.Request) -> web.Response:
        """GET /api/logs/{id}"""
        job = await self.known_job(request.match_info["id"])
        return web.json_response(self.log_object(request, job))

    async def events(self, request: web.Request) -> web.StreamResponse:
        """GET /api/events: tokens, jobs and stats as they change; nobody need poll."""
        return await stream_answer(request, {}, self.changes(request), error_event)

    async def changes(self, request: web.Request) -> AsyncIterator[bytes]:
        before: dict[str, bytes] = {}
        for beat in itertools.count():
            if self.jobs.stopping or not self.logged_in(request):
                return
            jobs = [self.job_object(request, job) for job in self.jobs.open.values()]
            for job in jobs:
                del job["duration"]  # else each would be news each second
            tokens = [token_object(token, masked=True) for token in self.pool.tokens.values()]
            for name, value in (("tokens", tokens), ("jobs", jobs), ("stats", self.counters())):
                if (event := sse({name: value}, name)) != before.get(name):
                    before[name] = event
                    yield event
            if beat % 10 == 0:
                yield b": ping\n\n"
            await asyncio.sleep(1)

    async def metrics(self, request: web.Request) -> web.Response:
        """GET /metrics, in the text format of Prometheus."""
        tokens = self.pool.tokens.values()
        rows = {f"flow2api_{name}": value for name, value in self.counters().items()}
        rows["flow2api_credits"] = sum(token.credits or 0 for token in tokens if token.is_active)
        rows["flow2api_waiting_jobs"] = len(self.pool.waiting)
        for state in OPEN:
            count = sum(job.state == state for job in self.jobs.open.values())
            rows[f'flow2api_jobs{{state="{state}"}}'] = count
        text = "".join(f"{name} {value}\n" for name, value in rows.items())
        return web.Response(text=text, headers={"Content-Type": "text/plain; version=0.0.4"})

    async def plugin_update(self, request: web.Request) -> web.Response:
        """POST /api/plugin/update-token {session_token}, with the connection token as Bearer."""
        known = self.settings["plugin.connection_token"]
        if not known or not same(bearer(request), known):
            raise GatewayError("invalid_api_key", "Invalid connection token")
        st = session_token(await read_json(request))
        asleep = {token.id for token in self.pool.tokens.values() if not token.is_active}
        token, new = await self.pool.add(st)
        enabled, action = token.id in asleep, "added" if new else "updated"
        if enabled and not self.settings["plugin.auto_enable_on_update"]:
            await self.pool.update(token, is_active=(enabled := False))
        return ok(f"Token {action}", action=action, token_id=token.id, auto_enabled=enabled)

    async def page(self, request: web.Request) -> web.Response:
        """The page; its one script and its one style may run by their hashes, and nothing else."""
        path = Path(__file__).with_name("admin.html")
        text, policy = await asyncio.to_thread(path.read_text, "utf-8"), PAGE_POLICY
        for tag, inside in re.findall(r"<(script|style)>(.*?)</\1>", text, re.DOTALL):
            code = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
            policy += f"; {tag}-src 'sha256-{code}'"
        headers = PAGE_HEADERS | {"Content-Security-Policy": policy}
        return web.Response(text=text, content_type="text/html", headers=headers)


ACTIONS = "enable|disable|test|refresh-at|refresh-credits"
TOKEN = r"{id:\d{1,18}}"
SORA_ADMIN = ("tokens/rt2at", "tokens/batch-activate", "tokens/batch-activate-username")
SORA_ADMIN += (f"tokens/{TOKEN}/sora2/activate", f"tokens/{TOKEN}/activate-username")
SORA_ADMIN += ("watermark-free/config", "cloudflare/{_:.*}", "characters{_:.*}")
ROUTES = (  # methods, path, handler, who may call it
    *(("GET", path, AdminApi.page, PUBLIC) for path in ("/", "/login", "/manage")),
    ("GET", "/metrics", AdminApi.metrics, EITHER),
    ("POST", "/api/{_:(admin/)?}login", AdminApi.login, PUBLIC),
    ("POST", "/api/{_:(admin/)?}logout", AdminApi.logout, ADMIN),
    ("POST", "/api/admin/{_:(change-)?}password", AdminApi.change_password, ADMIN),
    *(("GET POST", f"/api/{path}", AdminApi.config, ADMIN) for path in CONFIGS),
    ("GET POST", "/api/settings", AdminApi.all_settings, ADMIN),
    ("GET", "/api/tokens", AdminApi.list_tokens, ADMIN),
    ("POST", "/api/tokens", AdminApi.add_token, ADMIN),
    ("POST", "/api/tokens/{_:import|batch-add}", AdminApi.import_tokens, ADMIN),
    ("POST", "/api/tokens/st2at", AdminApi.convert_session, ADMIN),
    ("POST", "/api/tokens/batch-{action:enable|disable|test}", AdminApi.act_on_all, ADMIN),
    ("DELETE", "/api/tokens/batch-{action:delete-disabled}", AdminApi.act_on_all, ADMIN),
    ("PUT", f"/api/tokens/{TOKEN}{{_:(/status)?}}", AdminApi.update_token, ADMIN),
    ("DELETE", f"/api/tokens/{TOKEN}", AdminApi.delete_token, ADMIN),
    ("POST", f"/api/tokens/{TOKEN}/{{action:{ACTIONS}}}", AdminApi.act_on_token, ADMIN),
    ("GET", "/api/jobs", AdminApi.list_jobs, ADMIN),
    ("GET DELETE", "/api/jobs/{id}", AdminApi.one_job, ADMIN),
    ("POST", "/api/jobs/{id}/cancel", AdminApi.one_job, ADMIN),
    ("GET DELETE", "/api/logs", AdminApi.logs, ADMIN),
    ("GET", "/api/logs/{id}", AdminApi.one_log, ADMIN),
    ("GET", "/api/stats", AdminApi.stats, ADMIN),
    ("GET", "/api/system/info", AdminApi.system_info, ADMIN),
    ("DELETE", "/api/cache", AdminApi.empty_cache, ADMIN),
    ("POST", "/api/proxy/test", AdminApi.test_proxy, ADMIN),
    ("GET", "/api/events", AdminApi.events, ADMIN),
    ("POST", "/api/plugin/update-token", AdminApi.plugin_update, PUBLIC),
    *(("*", f"/api/{path}", AdminApi.absent, ADMIN) for path in SORA_ADMIN),
)
