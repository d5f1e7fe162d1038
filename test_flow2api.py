"""What Flow2API promises, as tests: first the promises, then chapter by chapter.

Real sockets throughout: the gateway on a free loopback port, the Demo chapter as Google's side,
with faults switched on by a middleware in front of it. Nothing here needs the internet.
"""

import asyncio
import base64
import contextlib
import ipaddress
import itertools
import json
import logging
import os
import pathlib
import random
import re
import shlex
import shutil
import signal
import socket
import sqlite3
import stat
import sys
import time
import tomllib
import uuid

import aiohttp
import pytest
from aiohttp import web

import flow2api

FREE, PRO, ULTRA = flow2api.TIERS
PNG = flow2api.picture("an input", 64, 64)


# Upstream key -> credits on a free, Pro and Ultra account; None: not offered there.
# fmt: off
PRICES = (
    (r"_low_priority$", (None, None, 0)), (r"_4k$", (None, None, 50)), (r"_1080p$", (None, 0, 0)),
    (r"lite_[46]s", (None, None, 5)), (r"_lite$", (10, 10, 5)), (r"fast_[46]s", (None, None, 10)),
    (r"fast\w*_ultra", (None, None, 10)), (r"_fast", (20, 20, None)),
    (r"quality_[46]s", (None, None, 100)), (r"^veo_3_1_(t2v|i2v_s|extend)", (100, 100, 100)),
    (r"^abra_edit$", (20, 20, 20)), (r"^abra_(t2v|i2v|r2v)_(4|6|8|10)s$", (12, 12, 12)),
    (r"^(NARWHAL|BELUGA|GEM_PIX_2|HARBOR_SEAL|IMAGEN_3_5)$", (0, 0, 0)),
)
# fmt: on


class Flow(flow2api.Demo):
    """The simulated Flow with what tests want of it: keys, plans and prices; the project's page
    data; both generations of replies ("new": 2026, "old": 2025); and `calls`, what was asked."""

    def __init__(self, image_seconds=0.02, video_seconds=0.3, replies="new"):
        super().__init__(image_seconds, video_seconds)
        self.replies, self.calls = replies, []

    def routes(self):
        yield from super().routes()
        yield "GET", "/fx/api/trpc/flow.projectInitialData", self.listing

    async def answer(self, handler, request):
        body = await request.json() if request.body_exists else {}
        self.calls.append((request.path, body))
        return await super().answer(handler, request)

    async def listing(self, request, body, account):
        project = json.loads(request.query["input"])["json"]["projectId"]
        made = [medium for medium in self.media.values() if medium.project == project]
        ids = ({"primaryMediaId": medium.name, "batchId": medium.batch} for medium in made)
        flows = [{"name": m.scene, "metadata": next(ids)} for m in made]
        contents = {"workflows": flows, "media": list(map(self.medium, made))}
        return {"result": {"data": {"json": {"projectContents": contents, "status": 200}}}}

    def charge(self, account, wanted):
        """Takes the credits, or answers why not."""
        key, n = wanted[0].get("videoModelKey") or wanted[0]["imageModelName"], len(wanted)
        price = next((costs for pattern, costs in PRICES if re.search(pattern, key)), ())
        if not price:
            return self.refuse(404, "", "Requested entity was not found.")
        if (cost := price[list(flow2api.TIERS).index(account["tier"])]) is None:
            return self.refuse(403, "PUBLIC_ERROR_MODEL_ACCESS_DENIED")
        if cost * n > account["credits"]:
            return self.refuse(429, "PUBLIC_ERROR_USER_QUOTA_REACHED")
        account["credits"] -= cost * n
        return None

    def new_name(self):
        return uuid.uuid4().hex if self.replies == "old" else super().new_name()

    def clips(self, media):
        if self.replies == "old":
            return {"operations": list(map(self.operation, media))}
        return {"media": list(map(self.medium, media))}

    def operation(self, medium):
        name, state = {"name": medium.name}, medium.state()
        operation = name | (flow2api.UNSAFE if state.endswith("FAILED") else {})
        if state.endswith("SUCCESSFUL"):
            operation["metadata"] = {**name, "video": {"fifeUrl": self.url(medium)}}
        return {"operation": operation, "sceneId": medium.scene, "status": state}


class World:
    """A gateway and the simulated Flow behind it. `fault`, when set, sees each call to Flow first:
    an async function (request, handler) -> response."""

    def __init__(self, data, replies="new", image_seconds=0.02, video_seconds=0.3, **settings):
        self.demo = Flow(image_seconds, video_seconds, replies)
        self.settings, self.data = settings, data
        self.fault = None
        self.key, self.password = "sk-test-0123456789", "a test password"

    @web.middleware
    async def _faults(self, request, handler):
        return await (self.fault(request, handler) if self.fault else handler(request))

    async def start(self):
        self.demo_runner = await self.demo.start(self._faults)
        self.http = aiohttp.ClientSession()
        await self.start_gateway()
        return self

    async def start_gateway(self):
        settings = flow2api.Settings()
        values = {
            "flow.labs_base_url": f"{self.demo.address}/fx/api",
            "flow.api_base_url": f"{self.demo.address}/v1",
            "flow.poll_interval": 0.1,
            "server.data_dir": str(self.data),
            "server.allow_private_urls": True,
            "global.api_key": self.key,
            "global.admin_password": self.password,
        }
        for name, value in (values | self.settings).items():
            settings.put("file", name, value, "test")
        self.store = flow2api.open_store(settings)
        self.app = flow2api.make_app(settings, self.store)
        options = {"access_log": None, "handler_cancellation": True, "shutdown_timeout": 1}
        self.runner = web.AppRunner(self.app, **options)
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self.runner.addresses[0][1]}"
        self.live = settings
        self.gateway = self.app[flow2api.GATEWAY]
        self.pool, self.jobs = self.gateway.pool, self.gateway.jobs

    async def stop_gateway(self):
        await self.runner.cleanup()

    async def stop(self):
        await self.stop_gateway()
        await self.http.close()
        await self.demo_runner.cleanup()

    async def account(self, tier=PRO, credits=1000, email="", **fields):
        """A new account in the pool -> its Token."""
        email = email or f"user{len(self.demo.accounts) + 1}@example.com"
        st = self.demo.account(email, tier, credits)
        token, _ = await self.pool.add(st, **fields)
        return token

    async def call(self, method, path, body=None, *, key=None, **options):
        """-> (status, headers, body): parsed where it is JSON."""
        headers = {"Authorization": f"Bearer {key or self.key}"} | options.pop("headers", {})
        if body is not None:
            options["json"] = body
        async with self.http.request(method, self.url + path, headers=headers, **options) as reply:
            raw = await reply.read()
            with contextlib.suppress(ValueError):
                raw = json.loads(raw)
            return reply.status, reply.headers, raw

    async def chat(self, model="veo_3_1-fast", text="a paper boat", pictures=(), **body):
        """POST /v1/chat/completions, not streamed -> (status, headers, body)."""
        body = chat_body(model, text, pictures) | body
        return await self.call("POST", "/v1/chat/completions", body)

    async def stream(self, model="veo_3_1-fast", text="a paper boat", pictures=(), **body):
        """The same, streamed -> (headers, the raw lines, the parsed events before [DONE])."""
        body = chat_body(model, text, pictures) | {"stream": True} | body
        headers = {"Authorization": f"Bearer {self.key}"}
        url = self.url + "/v1/chat/completions"
        async with self.http.post(url, json=body, headers=headers) as reply:
            assert reply.status == 200, await reply.text()
            lines = [line.decode().rstrip("\n") async for line in reply.content]
        events = [line.removeprefix("data: ") for line in lines if line]
        assert events[-1] == "[DONE]"
        return reply.headers, lines, [json.loads(event) for event in events[:-1]]

    def asked(self, part):
        """The bodies of the calls to Flow whose path holds `part`."""
        return [body for path, body in list(self.demo.calls) if part in path]

    async def admin(self):
        """A session token of the admin API."""
        words = {"username": "admin", "password": self.password}
        _, _, body = await self.call("POST", "/api/login", words)
        return body["token"]


def data_url(data, kind="image/png"):
    return f"data:{kind};base64,{flow2api.base64.b64encode(data).decode()}"


def chat_body(model, text, pictures=()):
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in pictures]
    content = [{"type": "text", "text": text}, *parts] if parts else text
    return {"model": model, "messages": [{"role": "user", "content": content}]}


def content_of(events):
    """The text of a streamed answer."""
    deltas = [choice["delta"] for event in events for choice in event.get("choices", ())]
    return "".join(delta.get("content", "") for delta in deltas)


@pytest.fixture
async def world(tmp_path):
    """Makes worlds: `await world(**settings)`; dots in the names of settings stand as they are."""
    async with contextlib.AsyncExitStack() as stack:

        async def make(accounts=((PRO, 1000),), **options):
            made = await World(options.pop("data", tmp_path / "data"), **options).start()
            stack.push_async_callback(made.stop)
            for tier, credits in accounts:
                await made.account(tier, credits)
            return made

        yield make


async def until(condition, seconds=10):
    """Waits for a condition to become true."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


# ---- Faults of Flow ----

PAID = r"batch(Async)?Generate(?!VideoUpsample)"  # the calls that spend credits
TIMES = 10**9


def refusal(status, reason="", message="Refused."):
    """What Flow answers when it refuses (upstream-rest.md 11)."""
    details = [{"reason": reason}] if reason else []
    error = {"code": status, "message": message, "details": details}
    return lambda request: web.json_response({"error": error}, status=status)


def dropped(request):
    request.transport.close()
    return web.Response()


def fault(on, answer, through=False, times=TIMES):
    """Answers calls whose path matches `on`; `through`: Flow does what is asked all the same. The
    paths that it answered are in `seen`."""

    async def middleware(request, handler):
        if not re.search(on, request.path) or len(middleware.seen) >= times:
            return await handler(request)
        middleware.seen.append(request.path)
        if through:
            await handler(request)
        return answer(request)

    middleware.seen = []
    return middleware


def hold(on, through=False):
    """Keeps calls waiting until `release` is set; `seen` is set when one has come."""

    async def middleware(request, handler):
        if not re.search(on, request.path):
            return await handler(request)
        answer = await handler(request) if through else None
        middleware.seen.set()
        await middleware.release.wait()
        return answer or await handler(request)

    middleware.seen, middleware.release = asyncio.Event(), asyncio.Event()
    return middleware


@pytest.fixture
def impatient(monkeypatch):
    """Pauses of seconds take hundredths."""
    real = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda s, *result: real(min(s, 0.02), *result))


@pytest.fixture
def clock(monkeypatch):
    """The gateway's clock: `clock.ahead` seconds ahead of the wall's."""

    class Clock:
        ahead = 0

    monkeypatch.setattr(flow2api, "now", lambda: time.time() + Clock.ahead)
    return Clock


@pytest.fixture
def looks(monkeypatch):
    """Lost submits are looked for at once."""
    monkeypatch.setattr(flow2api.Jobs, "LOOKS", (0.01, 0.03, 0.05))


def only(w):
    """The only token of a world, the only open job."""
    (token,) = w.pool.tokens.values()
    return token


async def running(w, count=1):
    """Waits until so many jobs are running -> them."""
    await until(lambda: sum(job.state == "running" for job in w.jobs.open.values()) == count)
    return list(w.jobs.open.values())


async def end_of(w, job_id):
    """Waits for the end of a job -> it, as it is in the store."""
    await until(lambda: job_id not in w.jobs.open)
    return await w.jobs.get(job_id)


def secrets_of(w):
    tokens = [secret for token in w.pool.tokens.values() for secret in (token.st, token.at)]
    return [secret for secret in (w.key, w.password, *tokens) if secret]


def links_in(text):
    return re.findall(r"https?://[^\s\"'<>)]+", text)


def content(reply):
    status, _, body = reply
    assert status == 200, body
    return body["choices"][0]["message"]["content"]


def told(w, reply, code):
    """The reply is this error, whole, in OpenAI's form, and gives no secret away."""
    status, headers, body = reply
    assert body["error"]["code"] == code, body
    known = flow2api.GatewayError(code, "")
    assert status == known.status
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["type"] == known.type
    assert body["error"]["message"].strip()
    assert not [secret for secret in secrets_of(w) if secret in f"{body} {dict(headers)}"]
    return body["error"]


# ---- The promises ----


async def test_sixty_clips_over_two_tokens_need_two_status_calls_a_tick(world):
    """A tick is a row of status calls in which no clip is asked for twice."""
    w = await world(((PRO, 5000), (ULTRA, 5000)), video_seconds=0.8)
    replies = await asyncio.gather(*(w.chat(text=f"boat {i}") for i in range(60)))
    assert [status for status, _, _ in replies] == [200] * 60
    ticks = [[]]
    for body in w.asked("batchCheckAsync"):
        names = {item["name"] for item in body["media"]}
        if any(names & earlier for earlier in ticks[-1]):
            ticks.append([])
        ticks[-1].append(names)
    assert len(ticks) > 2
    assert max(map(len, ticks)) <= 2
    assert max(len(set().union(*tick)) for tick in ticks) == 60


async def test_a_job_survives_the_end_of_the_process(world):
    w = await world(video_seconds=1, **{"cache.enabled": True})
    client = asyncio.create_task(w.chat())
    (job,) = await running(w)
    await w.stop_gateway()
    reply = await client
    assert job.id in told(w, reply, "shutting_down")["message"]
    assert reply[1]["x-should-retry"] == "false"
    await w.start_gateway()
    assert job.id in w.jobs.open
    again = await end_of(w, job.id)
    assert (again.state, len(again.done()), len(w.asked("AsyncGenerate"))) == ("completed", 1, 1)
    assert (w.data / "tmp" / again.outputs[0].file).read_bytes().startswith(flow2api.CLIP)
    assert again.id in [known.id for known in w.store.completed_jobs(10)]


@pytest.mark.parametrize("model", ["veo_3_1-fast", "nano_banana_pro"])
async def test_a_process_that_ends_during_a_submit_looks_for_it_and_never_sends_it_again(
    world, looks, model
):
    w = await world()
    w.fault = hold(PAID, through=True)
    client = asyncio.create_task(w.chat(model))
    await w.fault.seen.wait()
    (job,) = w.jobs.open.values()
    await w.stop_gateway()
    told(w, await client, "shutting_down")
    w.fault.release.set()
    await w.start_gateway()
    assert (await w.jobs.get(job.id)).state in ("unknown", "running", "settling", "completed")
    assert (await end_of(w, job.id)).state == "completed"
    assert len(w.asked("atchAsyncGenerate") + w.asked("batchGenerate")) == 1


LOST = {
    "connection dropped": dropped,
    "500": refusal(500, message="Internal error encountered."),
    "503 in HTML": lambda request: web.Response(text="<html>no</html>", status=503),
    "HTML": lambda request: web.Response(text="<html>hello</html>", content_type="text/html"),
    "empty object": lambda request: web.json_response({}),
    "nothing": lambda request: web.Response(),
    "a list": lambda request: web.json_response([]),
    "odd shape": lambda request: web.json_response({"media": [{"nom": 1}]}),
}


@pytest.mark.parametrize("replies", ["new", "old"])
@pytest.mark.parametrize("answer", LOST.values(), ids=LOST)
async def test_a_submit_whose_answer_is_lost_is_found_and_not_resent(world, looks, answer, replies):
    w = await world(((PRO, 100), (PRO, 100)), replies=replies, video_seconds=0.02)
    w.fault = fault(PAID, answer, through=True)
    status, headers, body = await w.chat(n=2)
    assert status == 200, body
    assert len((await w.jobs.get(headers["X-Job-Id"])).done()) == 2
    assert len(w.fault.seen) == 1
    assert sum(account["credits"] for account in w.demo.accounts.values()) == 200 - 2 * 20


@pytest.mark.parametrize("model", ["veo_3_1-fast", "nano_banana_pro"])
@pytest.mark.parametrize("answer", LOST.values(), ids=LOST)
async def test_a_submit_that_left_nothing_behind_fails_and_says_so(world, looks, answer, model):
    w = await world(((PRO, 100), (PRO, 100)))
    w.fault = fault(PAID, answer)
    reply = await w.chat(model)
    project = told(w, reply, "submit_unknown")["message"]
    assert any(token.project_id in project for token in w.pool.tokens.values())
    assert (reply[1]["x-should-retry"], len(w.fault.seen)) == ("false", 1)
    assert not any(token.error_count for token in w.pool.tokens.values())


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_before_the_submit_spends_nothing(world, stream):
    w = await world()
    await w.pool.update(only(w), video_concurrency=1)
    first = asyncio.create_task(w.chat())
    await running(w)
    second = asyncio.create_task(w.chat(stream=stream))
    await until(lambda: len(w.jobs.open) == 2)
    job = list(w.jobs.open.values())[1]
    second.cancel()
    assert ((await end_of(w, job.id)).state, job.error["code"]) == ("cancelled", "cancelled")
    assert content(await first)
    assert only(w).credits == 980
    assert (len(w.asked("AsyncGenerate")), only(w).busy.total()) == (1, 0)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_after_the_submit_loses_nothing(world, stream):
    w = await world()
    client = asyncio.create_task(w.chat(stream=stream))
    (job,) = await running(w)
    client.cancel()
    assert (await end_of(w, job.id)).state == "completed"


# ---- Every error code ----

FLOW_SAYS = (  # our code, Flow's status and reason, where
    ("invalid_image", 400, "PUBLIC_ERROR_IMAGE_TOO_LARGE", "uploadImage"),
    ("invalid_image", 400, "PUBLIC_ERROR_UNKNOWN_IMAGE_FILE_FORMAT", "uploadImage"),
    ("content_policy_violation", 400, "PUBLIC_ERROR_UNSAFE_IMAGE_UPLOAD", "uploadImage"),
    ("content_policy_violation", 400, "PUBLIC_ERROR_PROMINENT_PEOPLE_FILTER_FAILED", PAID),
    ("content_policy_violation", 400, "PUBLIC_ERROR_MINOR_INPUT_IMAGE", PAID),
    ("content_policy_violation", 400, "PUBLIC_ERROR_IP_INPUT_IMAGE", PAID),
    ("upstream_changed", 400, "", PAID),
    ("captcha_required", 403, "PUBLIC_ERROR_UNUSUAL_ACTIVITY", PAID),
    ("model_not_for_account", 403, "PUBLIC_ERROR_MODEL_ACCESS_DENIED", PAID),
    ("account_refused", 403, "PUBLIC_ERROR_USER_REGION_DISALLOWED", PAID),
    ("account_refused", 403, "PUBLIC_ERROR_USER_MINOR", PAID),
    ("account_refused", 403, "", PAID),
    ("model_unavailable", 404, "", PAID),
    ("conflict", 409, "PUBLIC_ERROR_GENERATION_ALREADY_IN_PROGRESS", PAID),
    ("account_throttled", 429, "PUBLIC_ERROR_USER_REQUESTS_THROTTLED", PAID),
    ("account_throttled", 429, "PUBLIC_ERROR_UNUSUAL_ACTIVITY_TOO_MUCH_TRAFFIC", PAID),
    ("account_throttled", 429, "", PAID),
    ("account_daily_quota", 429, "PUBLIC_ERROR_PER_MODEL_DAILY_QUOTA_REACHED", PAID),
    ("account_no_credits", 429, "PUBLIC_ERROR_USER_QUOTA_REACHED", PAID),
    ("account_busy", 429, "PUBLIC_ERROR_CONCURRENT_LIMIT_REACHED", PAID),
    ("upstream_busy", 429, "PUBLIC_ERROR_MODEL_OVERLOADED", PAID),
    ("upstream_busy", 503, "PUBLIC_ERROR_HIGH_TRAFFIC", PAID),
    ("upstream_error", 500, "", "uploadImage"),
    ("upstream_error", 503, "", "uploadImage"),
)


@pytest.mark.parametrize(("code", "status", "reason", "on"), FLOW_SAYS)
async def test_what_flow_refuses_is_told_and_does_no_more_than_it_must(
    world, impatient, code, status, reason, on
):
    """The error, what it does to the account, and how often it was tried."""
    w = await world()
    w.fault = fault(on, refusal(status, reason, "No, says Flow."))
    reply = await w.chat("nano_banana_pro", pictures=[data_url(PNG)])
    assert (reason or "No, says Flow.") in told(w, reply, code)["message"]
    assert (reply[1]["x-should-retry"], reply[0] != 401) == ("false", True)
    token, does = only(w), flow2api.GatewayError(code, "").does
    assert token.is_active and token.busy.total() == 0 == token.reserved
    assert token.error_count == (does in ("account", "banning"))
    assert token.failures == (does == "banning")
    assert len(w.fault.seen) == (3 if does == "again" else 1)


POST = ("POST", "/v1/chat/completions")
REFUSED = (  # code, param, request: refused before anything is sent
    ("invalid_request", "messages", (*POST, {"model": "veo_3_1"})),
    ("invalid_request", "model", (*POST, chat_body("veo_3_1-fast-lite", "boat"))),
    ("invalid_image", "messages", (*POST, chat_body("nano_banana_pro", "boat", ["data:,x"]))),
    ("tier_required", None, (*POST, chat_body("veo_3_1-4k", "boat"))),
    ("tier_required", None, (*POST, chat_body("veo_3_1-relaxed", "boat"))),
    ("mode_not_available", "model", (*POST, chat_body("veo_3_1", "b", [data_url(PNG)] * 3))),
    ("unsupported_parameter", "style_id", (*POST, chat_body("veo_3_1", "b") | {"style_id": "x"})),
    ("model_not_found", "model", (*POST, chat_body("gpt-4o", "boat"))),
    ("model_not_found", "model", ("GET", "/v1/models/sora-2")),
    ("not_found", None, ("GET", "/v1/nothing")),
    ("not_found", None, ("GET", "/tmp/nothing.mp4")),
    ("method_not_allowed", None, ("DELETE", "/v1/chat/completions")),
    ("request_too_large", None, (*POST, chat_body("veo_3_1", "boat" * 300_000))),
)


@pytest.mark.parametrize(("code", "param", "request_"), REFUSED)
async def test_a_request_at_fault_is_refused_before_anything_is_sent(world, code, param, request_):
    w = await world(**{"limits.body_mb": 1})
    w.demo.calls.clear()
    reply = await w.call(*request_)
    assert told(w, reply, code)["param"] == param
    assert "x-should-retry" not in reply[1] and "X-Job-Id" not in reply[1]
    assert (list(w.demo.calls), w.jobs.open, w.store.completed_jobs(9)) == ([], {}, [])


async def _queue_full(w):
    await w.pool.update(only(w), video_concurrency=1)
    clients = [asyncio.create_task(w.chat()) for _ in range(2)]
    await until(lambda: len(w.pool.waiting) == 1 == only(w).busy["video"])
    reply = await w.chat()
    assert int(reply[1]["Retry-After"]) > 0
    assert [status for status, *_ in await asyncio.gather(*clients)] == [200, 200]
    return reply


async def _generation_failed(w):
    """A clip that was accepted, and failed for a reason that nobody knows."""
    error = {"mediaGenerationStatus": "MEDIA_GENERATION_STATUS_FAILED", "failureReasons": ["ODD"]}

    def failed(request):
        items = [{"name": name, "mediaMetadata": {"mediaStatus": error}} for name in w.demo.media]
        return web.json_response({"media": items})

    w.fault = fault("batchCheckAsync", failed)
    reply = await w.chat()
    assert "ODD" in reply[2]["error"]["message"] and only(w).error_count == 0
    return reply


async def _proxy_unavailable(w):
    await w.pool.update(only(w), proxy_url="socks5://")
    return await w.chat()


async def _session_ended(w):
    w.demo.accounts.clear()
    reply = await w.chat()
    assert not only(w).is_active and "Sign in to Flow again" in only(w).reason
    assert "Sign in to Flow again" in told(w, await w.chat(), "no_accounts")["message"]
    return reply


async def _submit_unknown(w):
    w.fault = fault(PAID, dropped)
    return await w.chat()


async def _shutting_down(w):
    client = asyncio.create_task(w.chat())
    await running(w)
    await w.stop_gateway()
    await w.start_gateway()
    return await client


async def _cancelled(w):
    """Told to nobody but the store: whoever asked has left."""
    only(w).paused_until = flow2api.now() + 30
    client = asyncio.create_task(w.chat())
    await until(lambda: w.jobs.open)
    (job,) = w.jobs.open.values()
    client.cancel()
    err = flow2api.GatewayError(**(await end_of(w, job.id)).error)
    return err.status, {}, err.body()


async def _internal_error(w):
    async def broken(*arguments, **options):
        raise RuntimeError(f"{w.key} must not be told")

    w.jobs.create = broken
    return await w.chat()


SITUATIONS = {  # code: the world's options, what happens there
    "no_accounts": ({"accounts": ()}, World.chat),
    "no_credits": ({"accounts": ((PRO, 19), (FREE, 0))}, World.chat),
    "invalid_api_key": ({}, lambda w: w.call("GET", "/v1/models", key="sk-wrong")),
    "queue_full": ({"limits.queue": 1}, _queue_full),
    "generation_failed": ({}, _generation_failed),
    "generation_timeout": ({"video_seconds": 600, "flow.max_poll_attempts": 2}, World.chat),
    "upstream_unreachable": ({"flow.api_base_url": "http://127.0.0.1:9/v1"}, World.chat),
    "proxy_unavailable": ({}, _proxy_unavailable),
    "account_session_ended": ({}, _session_ended),
    "submit_unknown": ({}, _submit_unknown),
    "shutting_down": ({}, _shutting_down),
    "cancelled": ({}, _cancelled),
    "internal_error": ({}, _internal_error),
}


@pytest.mark.parametrize("code", SITUATIONS)
async def test_a_situation_and_its_error(world, looks, impatient, code):
    options, act = SITUATIONS[code]
    w = await world(**options)
    told(w, await act(w), code)


def test_every_error_code_is_produced_here():
    produced = {row[0] for row in (*FLOW_SAYS, *REFUSED)} | set(SITUATIONS)
    assert produced == set(flow2api.ERRORS)


@pytest.mark.parametrize("model", ["nano_banana_pro", "veo_3_1-fast"])
async def test_refused_content_is_told_and_blames_no_account(world, model):
    """A picture is refused at once, a clip is accepted and fails: the answer is the same."""
    w = await world(((PRO, 100), (PRO, 100)))
    told(w, await w.chat(model, "something unsafe"), "content_policy_violation")
    assert len(w.asked("atchAsyncGenerate") + w.asked("batchGenerate")) == 1
    for token in w.pool.tokens.values():
        assert (token.is_active, token.error_count, token.paused_until) == (True, 0, 0)
    assert content(await w.chat(model, "something else"))


async def test_while_all_accounts_pause_the_error_says_until_when(world):
    w = await world()
    w.fault = fault(PAID, refusal(429, "PUBLIC_ERROR_USER_REQUESTS_THROTTLED"))
    told(w, await w.chat(), "account_throttled")
    reply = await w.chat()
    told(w, reply, "account_throttled")
    assert 200 < int(reply[1]["Retry-After"]) < 400
    assert len(w.fault.seen) == 1


async def test_one_of_several_clips_may_fail_and_the_others_are_given(world):
    w = await world()
    reply = asyncio.create_task(w.chat(n=3))
    await until(lambda: len(w.demo.media) == 3)
    name, medium = next(iter(w.demo.media.items()))
    w.demo.media[name] = medium._replace(prompt="unsafe")
    text = content(await reply)
    assert len(set(links_in(text))) == 2
    assert "One of 3 failed" in text


# ---- Settings ----

SEED_SETTINGS = """
[global]
api_key = "your_api_key" # 外部调用API使用的密钥
admin_username = "admin"
admin_password = "your_password"
[flow]
labs_base_url = "https://labs.google/fx/api"
api_base_url = "https://aisandbox-pa.googleapis.com/v1"
timeout = 120
poll_interval = 3.0
max_poll_attempts = 200
[server]
host = "0.0.0.0"
port = 8000
[proxy]
proxy_enabled = false
proxy_url = "socks5://127.0.0.1:1080"
[generation]
image_timeout = 300
video_timeout = 1500
[admin]
error_ban_threshold = 3
[cache]
enabled = false
timeout = 7200
base_url = ""
[token_refresh]
interval = 3600
"""


def read_toml(folder, text):
    path = folder / "setting.toml"
    path.write_text(text, "utf-8")
    settings = flow2api.Settings()
    settings.read_file(path)
    return settings


def two_values(row):
    """Two values that a row takes."""
    if row.choices or isinstance(row.default, bool):
        return (row.choices or (True, False))[:2]
    if isinstance(row.default, str):
        return ("http://one.test", "http://two.test") if "url" in row.name else ("one", "two")
    return type(row.default)(row.low + 1), type(row.default)(row.low + 2)


@pytest.mark.parametrize("row", flow2api.SETTINGS, ids=lambda row: row.name)
def test_the_stronger_origin_of_a_setting_wins(tmp_path, row):
    """Command line > environment > admin page > file > generated > default; each value typed."""
    section, key = row.name.split(".")
    a, b = two_values(row)
    settings = flow2api.Settings()
    assert (settings[row.name], settings.source(row.name)) == (row.default, "default")
    settings.put("generated", row.name, a, "test")
    assert (settings[row.name], settings.source(row.name)) == (a, "generated")
    path = tmp_path / "setting.toml"
    path.write_text(f"[{section}]\n{key} = {json.dumps(b)}\n")
    settings.read_file(path)
    assert (settings[row.name], settings.source(row.name)) == (b, "file")
    settings.put("admin page", row.name, a, "test")
    assert (settings[row.name], settings.source(row.name)) == (a, "admin page")
    settings.read_environment({f"FLOW2API_{section}_{key}".upper(): str(b)})
    assert (settings[row.name], settings.source(row.name)) == (b, "environment")
    settings.put("command line", row.name, str(a), "test")
    assert (settings[row.name], settings.source(row.name)) == (a, "command line")
    settings.put("admin page", row.name, b, "test")
    assert settings[row.name] == a and type(settings[row.name]) is type(row.default)
    assert not settings.warnings


@pytest.mark.parametrize(
    "name, raw, allowed",
    [
        ("server.port", 70000, "a whole number from 0 to 65535"),
        ("server.port", "eighty", "a whole number"),
        ("server.port", True, "a whole number"),
        ("flow.timeout", 1.5, "a whole number"),
        ("flow.poll_interval", "soon", "a number from 0.05 to 60"),
        ("flow.poll_interval", 0, "a number from 0.05 to 60"),
        ("flow.poll_interval", "nan", "a number from 0.05 to 60"),
        ("cache.enabled", "maybe", "true or false"),
        ("cache.enabled", 1, "true or false"),
        ("server.host", 5, "a text"),
        ("chat.video_content", "gif", "both | html | link"),
        ("server.port", {"http": 80}, "a whole number"),
    ],
)
def test_a_bad_value_is_told_with_key_value_and_what_is_allowed(name, raw, allowed):
    with pytest.raises(flow2api.SettingError) as told:
        flow2api.Settings().put("file", name, raw, "setting.toml")
    for words in ("setting.toml", name, repr(raw), allowed):
        assert words in str(told.value)


@pytest.mark.parametrize("name", flow2api.SECRETS)
def test_a_bad_secret_is_told_without_the_secret(name):
    with pytest.raises(flow2api.SettingError, match=name) as told:
        flow2api.Settings().put("file", name, 192837465, "setting.toml")
    assert "192837465" not in str(told.value)


@pytest.mark.parametrize("value", ["", "your_api_key", "your_password"])
@pytest.mark.parametrize("name", flow2api.SECRETS)
def test_a_placeholder_counts_as_unset(name, value):
    settings = flow2api.Settings()
    settings.put("file", name, value, "test")
    assert settings[name] == "" and settings.source(name) == "default"


def test_unknown_sections_keys_and_variables_warn_and_stop_nothing(tmp_path):
    text = 'loose = 1\n[redis]\nhost = "x"\n[server]\ncolour = "red"\nport = 81\n'
    settings = read_toml(tmp_path, text)
    settings.read_environment({"FLOW2API_SERVER_SHAPE": "round", "PATH": "/bin"})
    assert settings["server.port"] == 81
    warned = "\n".join(settings.warnings)
    assert len(settings.warnings) == 4
    for name in ("loose", "redis.host", "server.colour", "FLOW2API_SERVER_SHAPE"):
        assert name in warned


def test_the_setting_file_of_the_original_loads_whole(tmp_path):
    settings = read_toml(tmp_path, "\ufeff" + SEED_SETTINGS)
    assert settings.warnings == []
    assert settings["flow.max_poll_attempts"] == 200
    assert settings["proxy.proxy_url"] == "socks5://127.0.0.1:1080"
    assert settings["global.api_key"] == settings["global.admin_password"] == ""
    assert settings["global.admin_username"] == "admin"
    assert len(settings.layers["file"]) == 17  # its 19 keys without the two placeholders


def test_a_missing_file_is_an_empty_one_and_a_broken_one_is_named(tmp_path):
    settings = flow2api.Settings()
    settings.read_file(tmp_path / "none.toml")
    assert settings["server.port"] == 8000
    with pytest.raises(flow2api.SettingError, match="setting.toml"):
        read_toml(tmp_path, "[server\nport = 1")


def test_the_models_section_is_read(tmp_path):
    settings = read_toml(tmp_path, '[models]\nnano_banana_2 = "BELUGA"\n')
    assert settings.models == {"nano_banana_2": "BELUGA"} and not settings.warnings


@pytest.mark.parametrize("text", ["models = 3", '[models]\nveo_3_1_text = "veo_{X}"'])
def test_a_bad_models_section_stops_the_start(tmp_path, text):
    with pytest.raises(flow2api.SettingError, match="models"):
        read_toml(tmp_path, text)


# ---- Catalogue ----

# What must reach Flow, written by hand from the captures of its catalogue of 2026-08-27. Columns:
# id; pictures sent along; call; ratio; key on a free or Pro account; key on an Ultra account (=
# the same, - not there); second call. @ stands for the six shapes in which a picture can be asked.
CATALOGUE = """
gemini-2.5-flash-image-landscape      0 Images     LANDSCAPE NARWHAL    =
gemini-2.5-flash-image-portrait       2 Images     PORTRAIT  NARWHAL    =
gemini-3.0-pro-image-landscape        1 Images     LANDSCAPE GEM_PIX_2  =
gemini-3.0-pro-image-portrait         0 Images     PORTRAIT  GEM_PIX_2  =
imagen-4.0-generate-preview-landscape 3 Images     LANDSCAPE IMAGEN_3_5 =
imagen-4.0-generate-preview-portrait  0 Images     PORTRAIT  IMAGEN_3_5 =
veo_3_1_t2v_fast_portrait  0 Text PORTRAIT veo_3_1_t2v_fast_portrait veo_3_1_t2v_fast_portrait_ultra
veo_3_1_t2v_fast_landscape 0 Text LANDSCAPE veo_3_1_t2v_fast veo_3_1_t2v_fast_ultra
veo_2_1_fast_d_15_t2v_portrait  0 Text PORTRAIT  veo_3_1_t2v_lite =
veo_2_1_fast_d_15_t2v_landscape 0 Text LANDSCAPE veo_3_1_t2v_lite =
veo_2_0_t2v_portrait            0 Text PORTRAIT  veo_3_1_t2v_portrait =
veo_2_0_t2v_landscape           0 Text LANDSCAPE veo_3_1_t2v =
veo_3_1_i2v_s_fast_fl_portrait 2 StartAndEndImage PORTRAIT veo_3_1_i2v_s_fast_portrait_fl veo_3_1_i2v_s_fast_portrait_ultra_fl
veo_3_1_i2v_s_fast_fl_portrait 1 StartImage PORTRAIT veo_3_1_i2v_s_fast_portrait veo_3_1_i2v_s_fast_portrait_ultra
veo_3_1_i2v_s_fast_fl_landscape 2 StartAndEndImage LANDSCAPE veo_3_1_i2v_s_fast_fl veo_3_1_i2v_s_fast_ultra_fl
veo_3_1_i2v_s_fast_fl_landscape 1 StartImage LANDSCAPE veo_3_1_i2v_s_fast veo_3_1_i2v_s_fast_ultra
veo_2_1_fast_d_15_i2v_portrait  1 StartImage       PORTRAIT  veo_3_1_i2v_lite =
veo_2_1_fast_d_15_i2v_landscape 2 StartAndEndImage LANDSCAPE veo_3_1_interpolation_lite =
veo_2_0_i2v_portrait            1 StartImage       PORTRAIT  veo_3_1_i2v_s_portrait =
veo_2_0_i2v_landscape           2 StartAndEndImage LANDSCAPE veo_3_1_i2v_s_fl =
veo_3_0_r2v_fast_portrait  3 ReferenceImages PORTRAIT  veo_3_1_r2v_fast_portrait veo_3_1_r2v_fast_portrait_ultra
veo_3_0_r2v_fast_landscape 1 ReferenceImages LANDSCAPE veo_3_1_r2v_fast_landscape veo_3_1_r2v_fast_landscape_ultra
veo_3_0_r2v_fast_landscape 0 Text LANDSCAPE veo_3_1_t2v_fast veo_3_1_t2v_fast_ultra

veo_3_1              0 Text             PORTRAIT  veo_3_1_t2v_portrait      =
veo_3_1              1 StartImage       PORTRAIT  veo_3_1_i2v_s_portrait    =
veo_3_1              2 StartAndEndImage PORTRAIT  veo_3_1_i2v_s_portrait_fl =
veo_3_1-portrait     0 Text             PORTRAIT  veo_3_1_t2v_portrait      =
veo_3_1-landscape    0 Text             LANDSCAPE veo_3_1_t2v               =
veo_3_1-8s           0 Text             PORTRAIT  veo_3_1_t2v_portrait      =
veo_3_1-fl           1 StartImage       PORTRAIT  veo_3_1_i2v_s_portrait    =
veo_3_1-landscape-fl 2 StartAndEndImage LANDSCAPE veo_3_1_i2v_s_fl          =
veo_3_1-fast 0 Text PORTRAIT veo_3_1_t2v_fast_portrait veo_3_1_t2v_fast_portrait_ultra
veo_3_1-fast 1 StartImage PORTRAIT veo_3_1_i2v_s_fast_portrait veo_3_1_i2v_s_fast_portrait_ultra
veo_3_1-fl-fast 2 StartAndEndImage PORTRAIT veo_3_1_i2v_s_fast_portrait_fl veo_3_1_i2v_s_fast_portrait_ultra_fl
veo_3_1-fast 3 ReferenceImages PORTRAIT veo_3_1_r2v_fast_portrait veo_3_1_r2v_fast_portrait_ultra
veo_3_1-landscape-fast 0 Text LANDSCAPE veo_3_1_t2v_fast veo_3_1_t2v_fast_ultra
veo_3_1-fast-landscape 3 ReferenceImages LANDSCAPE veo_3_1_r2v_fast_landscape veo_3_1_r2v_fast_landscape_ultra
veo_3_1-lite           0 Text             PORTRAIT  veo_3_1_t2v_lite           =
veo_3_1-lite           1 StartImage       PORTRAIT  veo_3_1_i2v_lite           =
veo_3_1-fl-lite        2 StartAndEndImage PORTRAIT  veo_3_1_interpolation_lite =
veo_3_1-lite-landscape 3 ReferenceImages  LANDSCAPE veo_3_1_r2v_lite           =
veo_3_1-relaxed            0 Text             PORTRAIT  - veo_3_1_t2v_lite_low_priority
veo_3_1-relaxed            1 StartImage       PORTRAIT  - veo_3_1_i2v_lite_low_priority
veo_3_1-relaxed-fl-fast    2 StartAndEndImage PORTRAIT  - veo_3_1_interpolation_lite_low_priority
veo_3_1-landscape-relaxed  3 ReferenceImages  LANDSCAPE - veo_3_1_r2v_lite_low_priority
veo_3_1-4s              0 Text             PORTRAIT  - veo_3_1_t2v_quality_4s
veo_3_1-6s-landscape    1 StartImage       LANDSCAPE - veo_3_1_i2v_s_quality_6s
veo_3_1-fl-4s           2 StartAndEndImage PORTRAIT  - veo_3_1_i2v_s_quality_4s_fl
veo_3_1-fast-6s         0 Text             PORTRAIT  - veo_3_1_t2v_fast_6s
veo_3_1-4s-fast         1 StartImage       PORTRAIT  - veo_3_1_i2v_s_fast_4s
veo_3_1-fast-6s         2 StartAndEndImage PORTRAIT  - veo_3_1_i2v_s_fast_6s_fl
veo_3_1-lite-4s         0 Text             PORTRAIT  - veo_3_1_t2v_lite_4s
veo_3_1-lite-6s         2 StartAndEndImage PORTRAIT  - veo_3_1_i2v_s_lite_6s_fl
veo_3_1-relaxed-6s      0 Text             PORTRAIT  - veo_3_1_t2v_lite_6s_low_priority
veo_3_1-relaxed-4s      2 StartAndEndImage PORTRAIT  - veo_3_1_i2v_s_lite_4s_fl_low_priority
veo_3_1-1080p           0 Text             PORTRAIT  veo_3_1_t2v_portrait = 1080p
veo_3_1-landscape-fast-1080p 0 Text LANDSCAPE veo_3_1_t2v_fast veo_3_1_t2v_fast_ultra 1080p
veo_3_1-4k-landscape    0 Text             LANDSCAPE - veo_3_1_t2v 4k
veo_3_1-fl-4k-fast      2 StartAndEndImage PORTRAIT  - veo_3_1_i2v_s_fast_portrait_ultra_fl 4k
nano_banana@            0 Images @ NARWHAL     =
nano_banana_2@          1 Images @ NARWHAL     =
nano_banana_2_lite@     0 Images @ HARBOR_SEAL =
nano_banana_pro@        2 Images @ GEM_PIX_2   =
nano_banana_pro@-1K     0 Images @ GEM_PIX_2   =
nano_banana_pro@-2K     0 Images @ GEM_PIX_2   = 2K
nano_banana_pro@-4K     1 Images @ -   GEM_PIX_2 4K
nano_banana_pro-4K-3-4  0 Images PORTRAIT_THREE_FOUR - GEM_PIX_2 4K
nano_banana             7 Images PORTRAIT NARWHAL =
imagen_4@               0 Images @ IMAGEN_3_5  =
imagen_4                3 Images PORTRAIT IMAGEN_3_5 =

gemini-3.0-pro-image-four-three-2k      0 Images LANDSCAPE_FOUR_THREE GEM_PIX_2 = 2K
gemini-3.1-flash-image-square           0 Images SQUARE               NARWHAL   =
gemini-3.1-flash-image-three-four-4k    0 Images PORTRAIT_THREE_FOUR  - NARWHAL 4K
gemini-3.1-flash-image                  0 Images LANDSCAPE            NARWHAL   =
veo_3_1_t2v                             0 Text       LANDSCAPE veo_3_1_t2v      =
veo_3_1_t2v_portrait_8s                 0 Text       PORTRAIT  veo_3_1_t2v_portrait =
veo_3_1_t2v_lite_portrait               0 Text       PORTRAIT  veo_3_1_t2v_lite =
veo_3_1_t2v_lite_4s_landscape           0 Text       LANDSCAPE - veo_3_1_t2v_lite_4s
veo_3_1_t2v_fast_portrait_6s            0 Text       PORTRAIT  - veo_3_1_t2v_fast_6s
veo_3_1_t2v_fast_ultra                  0 Text       LANDSCAPE - veo_3_1_t2v_fast_ultra
veo_3_1_t2v_fast_portrait_ultra_relaxed 0 Text       PORTRAIT  - veo_3_1_t2v_lite_low_priority
veo_3_1_t2v_portrait_4s_4k              0 Text       PORTRAIT  - veo_3_1_t2v_quality_4s 4k
veo_3_1_i2v_s_portrait                  1 StartImage PORTRAIT  veo_3_1_i2v_s_portrait =
veo_3_1_i2v_s_fast_portrait_4s_fl       2 StartAndEndImage PORTRAIT - veo_3_1_i2v_s_fast_4s_fl
veo_3_1_i2v_lite_landscape              1 StartImage LANDSCAPE veo_3_1_i2v_lite =
veo_3_1_i2v_s_6s_1080p                  2 StartAndEndImage LANDSCAPE - veo_3_1_i2v_s_quality_6s_fl 1080p
veo_3_1_i2v_s_fast_ultra_fl_1080p 2 StartAndEndImage LANDSCAPE - veo_3_1_i2v_s_fast_ultra_fl 1080p
veo_3_1_interpolation_lite_portrait     2 StartAndEndImage PORTRAIT veo_3_1_interpolation_lite =
veo_3_1_interpolation_lite_4s_landscape 2 StartAndEndImage LANDSCAPE - veo_3_1_i2v_s_lite_4s_fl
veo_3_1_r2v_fast 2 ReferenceImages LANDSCAPE veo_3_1_r2v_fast_landscape veo_3_1_r2v_fast_landscape_ultra
veo_3_1_r2v_fast_portrait_ultra_4k 1 ReferenceImages PORTRAIT - veo_3_1_r2v_fast_portrait_ultra 4k
omni                     0 Text             LANDSCAPE abra_t2v_8s  =
omni_portrait            3 ReferenceImages  PORTRAIT  abra_r2v_8s  =

omni_flash               0 Text             PORTRAIT  abra_t2v_8s  =
omni_flash-10s-landscape 0 Text             LANDSCAPE abra_t2v_10s =
omni_flash-6s            1 StartImage       PORTRAIT  abra_i2v_6s  =
omni_flash-fl-4s         2 StartAndEndImage PORTRAIT  abra_i2v_4s  =
omni_flash               7 ReferenceImages  PORTRAIT  abra_r2v_8s  =
"""  # noqa: E501
SHAPES = {"": "PORTRAIT", "-portrait": "PORTRAIT", "-landscape": "LANDSCAPE", "-square": "SQUARE"}
SHAPES |= {"-4-3": "LANDSCAPE_FOUR_THREE", "-3-4": "PORTRAIT_THREE_FOUR"}
ROWS = [
    line.replace("@", shape, 1).replace("@", wire, 1).split()
    for line in CATALOGUE.splitlines()
    for shape, wire in (SHAPES.items() if "@" in line else [("", "")])
    if line
]
PICTURES = [flow2api.picture(f"input {number}", 16, 16) for number in range(7)]
ORIGINAL = [row[0] for row in ROWS[:23]]
RETIRED_IDS = [row for row in ORIGINAL if re.match("gemini-2.5|veo_2|veo_3_0", row)]


def name_of(picture):
    """The media name that `named_uploads` gives a picture."""
    return str(flow2api.uuid.UUID(bytes=flow2api.hashlib.sha256(picture).digest()[:16]))


async def named_uploads(request, handler):
    """A fault that is none: uploads are named by what is in them."""
    if not request.path.endswith("uploadImage"):
        return await handler(request)
    data = flow2api.base64.b64decode((await request.json())["imageBytes"])
    return web.json_response({"media": {"name": name_of(data)}})


def expected_calls(call, pictures, ratio, key, then=""):
    """The calls to Flow that a row of CATALOGUE stands for, in the form of `made_calls`."""
    kind, names = "IMAGE" if call == "Images" else "VIDEO", list(map(name_of, PICTURES[:pictures]))
    ratio = f"{kind}_ASPECT_RATIO_{ratio}"
    kinds = {"Images": "IMAGE_INPUT_TYPE_REFERENCE", "ReferenceImages": "IMAGE_USAGE_TYPE_ASSET"}
    inputs = zip(("startImage", "endImage"), ({"mediaId": name} for name in names), strict=False)
    inputs = dict(inputs)
    if call == "Images":
        inputs = {"imageInputs": [{"name": n, "imageInputType": kinds[call]} for n in names]}
    if call == "ReferenceImages":
        assets = [{"imageUsageType": kinds[call], "mediaId": name} for name in names]
        inputs = {"referenceImages": assets}
    calls = [(call, key, ratio, inputs)]
    if then in ("2K", "4K"):
        calls.append(("upsampleImage", f"UPSAMPLE_IMAGE_RESOLUTION_{then}"))
    elif then:
        resolution = f"VIDEO_RESOLUTION_{then.upper()}"
        calls.append(("UpsampleVideo", f"veo_3_1_upsampler_{then}", ratio, resolution))
    return calls


def made_calls(w):
    """prompt -> the calls to Flow that its job has made."""
    made = {}
    prompts = {name: medium.prompt for name, medium in w.demo.media.items()}
    for path, body in list(w.demo.calls):
        call = path.partition("batchAsyncGenerateVideo")[2] or path.partition("batchGenerate")[2]
        wanted = (body.get("requests") or [{}])[0]
        prompt = wanted.get("structuredPrompt") or wanted.get("textInput", {}).get(
            "structuredPrompt"
        )
        if path.endswith("upsampleImage"):
            prompt, told = prompts[body["mediaId"]], ("upsampleImage", body["targetResolution"])
        elif call == "UpsampleVideo":
            prompt = prompts[wanted["videoInput"]["mediaId"]]
            told = (call, wanted["videoModelKey"], wanted["aspectRatio"], wanted["resolution"])
        elif call:
            prompt = prompt["parts"][0]["text"]
            key = wanted.get("imageModelName") or wanted["videoModelKey"]
            ratio = wanted.get("imageAspectRatio") or wanted["aspectRatio"]
            fields = ("imageInputs", "startImage", "endImage", "referenceImages")
            told = (call, key, ratio, {name: wanted[name] for name in fields if name in wanted})
        else:
            continue
        made.setdefault(prompt, []).append(told)
    return made


@pytest.mark.parametrize("replies", ["new", "old"])
@pytest.mark.parametrize("tier", flow2api.TIERS)
async def test_each_model_id_reaches_flow_as_the_catalogue_says(world, tier, replies):
    """The call, key, ratio, pictures and second call of each id, on each of Google's plans and in
    both generations of replies; what the plan can't do is refused before anything is sent."""
    fast = {"image_seconds": 0.01, "video_seconds": 0.05, "replies": replies}
    w = await world([(tier, 10**6)], **fast, **{"flow.poll_interval": 0.05})
    w.fault = named_uploads
    urls = list(map(data_url, PICTURES))
    asks = (w.chat(row[0], f"row {i}", urls[: int(row[1])]) for i, row in enumerate(ROWS))
    answers = await asyncio.gather(*asks)
    calls = made_calls(w)
    for i, (row, (status, _, body)) in enumerate(zip(ROWS, answers, strict=True)):
        model, pictures, call, ratio, common, ultra, then = (*row, "")[:7]
        key = common if tier != ULTRA or ultra == "=" else ultra
        if key == "-" or (tier == FREE and then == "1080p"):
            assert (status, body["error"]["code"]) == (400, "tier_required"), (model, body)
            assert f"row {i}" not in calls, model
        else:
            assert status == 200, (model, body)
            expected = expected_calls(call, int(pictures), ratio, key, then)
            assert calls[f"row {i}"] == expected, model


def test_the_twenty_ids_of_the_original_are_listed():
    assert len(set(ORIGINAL)) == 20 and set(ORIGINAL) <= set(flow2api.MODELS)


@pytest.mark.parametrize("model", sorted(set(RETIRED_IDS)))
def test_a_retired_id_says_what_it_is_today(model):
    said = flow2api.resolve(model, images="i2v" in model).describe()
    assert "Google retired" in said and re.search("this is (Veo 3.1|Nano Banana 2)", said)


@pytest.mark.parametrize("images", [1, 2])
def test_omni_takes_pictures_as_references(images):
    """The id of the newest flow2api (upstream-rest 13.2: with images abra_r2v_8s)."""
    assert flow2api.resolve("omni", images=images).key(PRO) == "abra_r2v_8s"


@pytest.mark.parametrize("model", flow2api.MODELS)
def test_a_listed_id_resolves_and_says_what_it_is(model):
    images = 2 if re.search("i2v|-fl", model) else 0
    plan = flow2api.resolve(model, images=images)
    assert plan.model == model and plan.prices() and plan.images[0] <= images <= plan.images[1]
    assert plan.family in plan.describe() and plan.ratio in plan.describe()


async def test_a_text_model_leaves_pictures_out_and_says_so(world):
    w = await world()
    _, _, body = await w.chat("veo_3_1_t2v_fast_landscape", "go", [data_url(PNG)])
    assert "no pictures" in body["choices"][0]["message"]["content"]
    assert made_calls(w)["go"][0][0] == "Text" and not w.asked("uploadImage")


async def test_a_key_set_in_models_reaches_the_wire(world):
    """Keys of a family, of a family and mode, and templates; a key Google doesn't know is told."""
    w = await world([(PRO, 1000)])
    w.live.models = {"nano_banana_2": "BELUGA", "veo_3_1_fast_text": "veo_3_9_t2v_fast{P}{U}"}
    w.live.models |= {"veo_3_1_text": "veo_unknown"}
    answers = await asyncio.gather(
        w.chat("nano_banana", "one"),
        w.chat("gemini-3.1-flash-image-square", "two"),
        w.chat("veo_3_1-fast", "three"),
        w.chat("veo_3_1-fast", "four", [data_url(PNG)]),
        w.chat("veo_3_1", "five"),
    )
    made = {prompt: calls[0][1] for prompt, calls in made_calls(w).items()}
    assert made["one"] == made["two"] == "BELUGA"
    assert made["three"] == "veo_3_9_t2v_fast_portrait"
    assert made["four"] == "veo_3_1_i2v_s_fast_portrait"
    assert [status for status, _, _ in answers] == [200, 200, 200, 200, 502]
    error = answers[-1][2]["error"]
    assert error["code"] == "model_unavailable" and "[models]" in error["message"]


# The keys that Google knows, by the accounts that may use them (upstream-rest 6.6 and 3.4).
FOR_ALL = r"""GEM_PIX_2|NARWHAL|HARBOR_SEAL|IMAGEN_3_5|abra_(t2v|i2v|r2v)_(4|6|8|10)s
|veo_3_1_(t2v|i2v|interpolation|r2v|extension)_lite|veo_3_1_(t2v|i2v_s)(_portrait)?
|veo_3_1_i2v_s(_portrait)?_fl|veo_3_1_extend_(landscape|portrait)"""
FOR_FREE_AND_PRO = r"""|veo_3_1_(t2v|i2v_s)_fast(_portrait)?|veo_3_1_i2v_s_fast(_portrait)?_fl
|veo_3_1_(r2v|extend)_fast_(landscape|portrait)"""
FOR_ULTRA = r"""|veo_3_1_(t2v|i2v_s)_fast(_portrait)?_ultra|veo_3_1_i2v_s_fast(_portrait)?_ultra_fl
|veo_3_1_(r2v|extend)_fast_(landscape|portrait)_ultra
|veo_3_1_(t2v|i2v_s)_(fast|quality|lite)_[46]s|veo_3_1_i2v_s_(fast|quality|lite)_[46]s_fl
|veo_3_1_(t2v|i2v|interpolation|r2v|extension)_lite_low_priority
|veo_3_1_(t2v|i2v_s)_lite_[46]s_low_priority|veo_3_1_i2v_s_lite_[46]s_fl_low_priority"""
KNOWN = {tier: re.compile(FOR_ALL + FOR_FREE_AND_PRO, re.VERBOSE) for tier in (FREE, PRO)}
KNOWN[ULTRA] = re.compile(FOR_ALL + FOR_ULTRA, re.VERBOSE)
HYPHEN_IDS = "veo_3_1 omni_flash nano_banana nano_banana_2 nano_banana_2_lite nano_banana_pro"
HYPHEN_IDS += " imagen_4 gemini-2.5-flash-image gemini-3.0-pro-image imagen-4.0-generate-preview"
HYPHEN_WORDS = "portrait landscape square 4-3 3-4 fast lite relaxed fl 4s 6s 8s 10s 1080p 4k 1K 2K"
WIRE_IDS = "veo_3_1_t2v veo_3_1_i2v_s veo_3_1_i2v veo_3_1_r2v veo_3_1_interpolation veo_3_1_extend"
WIRE_WORDS = "portrait landscape fast lite ultra relaxed fl 4s 6s 8s 1080p 4k"


def outcome(model, images):
    """What an id comes to, without the id itself: the plan, or (code, param, words)."""
    try:
        plan = flow2api.resolve(model, images=images)
        return plan, vars(plan) | {"model": ""}
    except flow2api.GatewayError as err:
        return None, (err.code, err.param, str(err).replace(model[:80], ""))


def test_the_whole_grammar_gives_known_keys_or_names_what_is_wrong():
    """Up to three parameters: every combination; more: a sample. No order matters."""
    dice, seen = flow2api.random.Random(7), {"plan": 0, "error": 0}
    for heads, known, joint in ((HYPHEN_IDS, HYPHEN_WORDS, "-"), (WIRE_IDS, WIRE_WORDS, "_")):
        words = [*known.split(), "30s"]
        few = [list(some) for n in range(4) for some in itertools.combinations(words, n)]
        many = [dice.sample(words, dice.randint(4, 8)) for _ in range(500)]
        for head, some in itertools.product(heads.split(), few + many):
            images, model = dice.randint(0, 4), joint.join([head, *some])
            plan, result = outcome(model, images)
            mixed = joint.join([head, *dice.sample(some, len(some))])
            plan_of_mixed, result_of_mixed = outcome(mixed, images)
            if plan:
                assert result_of_mixed == result, (model, mixed)
                served = [tier for tier in flow2api.TIERS if plan.cost(tier) is not None]
                assert served, model
                for tier in served:
                    assert KNOWN[tier].fullmatch(plan.key(tier)), (model, tier, plan.key(tier))
            else:
                code, param, said = result
                assert plan_of_mixed is None and result_of_mixed[0] == code, (model, mixed)
                fault = said.partition("it takes")[0].replace(":", "-")
                named = any(re.search(rf"\b{word}\b", fault, re.IGNORECASE) for word in some)
                by_mode = code == "mode_not_available" and param == "model"
                assert named and param == "model" or param == "seconds" or by_mode, (model, said)
            seen["plan" if plan else "error"] += 1
    assert min(seen.values()) > 1000


@pytest.mark.parametrize(
    "model, named",
    [
        ("veo_3_1-30s", "30s"),
        ("veo_3_1-portrait-landscape", "landscape and portrait"),
        ("veo_3_1-lite-fast", "fast"),
        ("imagen_4-4K", "4K"),
        ("nano_banana-fast", "fast"),
        ("nano_banana_pro-2K-4K", "2K and 4K"),
        ("omni_flash-1080p", "1080p"),
        ("veo_3_1-", "''"),
        ("veo_3_1_t2v_30s", "30s"),
    ],
)
async def test_a_parameter_that_does_not_fit_is_refused_by_name(world, model, named):
    w = await world()
    status, _, body = await w.chat(model)
    assert status == 400 and body["error"]["param"] == "model"
    assert named in body["error"]["message"].replace(model, "") and not made_calls(w)


@pytest.mark.parametrize("model", ["sora-2", "veo_3_1x", "VEO_3_1", "veo", "gpt-image-1"])
def test_an_unknown_id_is_model_not_found(model):
    with pytest.raises(flow2api.GatewayError) as told:
        flow2api.resolve(model)
    assert (told.value.code, told.value.status, told.value.param) == (
        "model_not_found",
        404,
        "model",
    )


@pytest.mark.parametrize(
    "model, size, ratio",
    [
        ("veo_3_1", "1280x720", "landscape"),
        ("veo_3_1", "720x1280", "portrait"),
        ("veo_3_1", "16:9", "landscape"),
        ("veo_3_1-portrait", " 9 : 16 ", "portrait"),
        ("veo_3_1", "auto", "portrait"),
        ("veo_3_1-landscape", "auto", "landscape"),
        ("veo_3_1_t2v_fast", "", "landscape"),
        ("veo_3_1", "1000x999", "landscape"),
        ("veo_3_1", "1024x1024", "portrait"),
        ("veo_3_1-landscape", "1024x1024", "landscape"),
        ("veo_3_1_t2v_fast", "1024x1024", "landscape"),
        ("nano_banana", "1000x999", "square"),
        ("nano_banana", "1536x1024", "4-3"),
        ("nano_banana", "1024x1536", "3-4"),
        ("nano_banana", "1792×1024", "landscape"),
        ("nano_banana_pro-square-2K", "2048X2048", "square"),
        ("nano_banana-4-3", "1200x896", "4-3"),
        ("nano_banana-square", "1000x999", "square"),
    ],
)
def test_the_nearest_shape_to_a_size_is_taken(model, size, ratio):
    assert flow2api.resolve(model, size=size).ratio == ratio


@pytest.mark.parametrize(
    "model, size",
    [
        ("veo_3_1-portrait", "1280x720"),
        ("veo_3_1_t2v_fast_landscape", "720x1280"),
        ("nano_banana-portrait", "16:9"),
        ("nano_banana-landscape", "1024x1024"),
        ("nano_banana-square", "16:9"),
        ("nano_banana", "3000x100"),
        *(
            ("veo_3_1", size)
            for size in ("wide", "1280", "1280x", "0x720", "-1x2", "1x2x3", "auto1")
        ),
    ],
)
def test_a_size_that_contradicts_or_means_nothing_is_refused(model, size):
    with pytest.raises(flow2api.GatewayError) as told:
        flow2api.resolve(model, size=size)
    assert (told.value.status, told.value.param) == (400, "size") and size in str(told.value)


@pytest.mark.parametrize(
    "model, seconds, result",
    [
        ("veo_3_1", 0, 8),
        ("veo_3_1-fast", 4, 4),
        ("veo_3_1-6s", 6, 6),
        ("omni_flash", 10, 10),
        ("veo_3_1", 10, None),
        ("veo_3_1-4s", 8, None),
        ("omni_flash", 5, None),
    ],
)
def test_seconds_are_the_length_or_refused(model, seconds, result):
    if result:
        assert flow2api.resolve(model, seconds=seconds).seconds == result
    else:
        with pytest.raises(flow2api.GatewayError) as told:
            flow2api.resolve(model, seconds=seconds)
        assert told.value.param == "seconds"


# ---- Upstream ----

# Replies in the shapes that were captured: "old" of October 2025, "new" of 2026.
NEW_NAME, OTHER_NAME = (
    "3a4b5c6d-0001-4000-8000-00000000000a",
    "3a4b5c6d-0002-4000-8000-00000000000b",
)
OLD_NAME, PREFIX = "52a55a4296c947d408fe559ba76c353c", "MEDIA_GENERATION_STATUS_"
LINK = "https://flow-content.google/video/x?Expires=1771256167&KeyName=k&Signature=s"
MP4 = flow2api.base64.b64encode(b"\0\0\0\x18ftypisom").decode()


def new_clip(word="SUCCESSFUL", name=NEW_NAME, generated=None, **status):
    told = {"mediaGenerationStatus": PREFIX + word, **status}
    metadata = {"createTime": "2026-08-27T03:10:11Z", "mediaStatus": told, "visibility": "PRIVATE"}
    video = {"generatedVideo": {"seed": 17071, **(generated or {})}, "operation": {"name": name}}
    ids = {"name": name, "projectId": "p", "workflowId": "w", "workflowStepId": "CAE"}
    return {**ids, "mediaMetadata": metadata, "video": video}


def old_clip(word="SUCCESSFUL", name=OLD_NAME, **operation):
    return {"operation": {"name": name, **operation}, "sceneId": "s", "status": PREFIX + word}


def new_image(name, **more):
    return {"name": name, "image": {"generatedImage": {"seed": 1, "fifeUrl": LINK}}, **more}


WORKFLOW = {"name": "w", "metadata": {"primaryMediaId": NEW_NAME, "batchId": "b"}, "projectId": "p"}
OLD_DONE = {"name": "CAUS", "video": {"fifeUrl": LINK, "servingBaseUri": "https://poster"}}
NEW_SAYS = {"name": NEW_NAME, "media": NEW_NAME, "project": "p"}
OLD_SAYS = {"name": OLD_NAME, "scene": "s"}
REFUSAL = {"code": 3, "message": "PUBLIC_ERROR_UNSAFE_GENERATION"}
IP = {"code": 3, "message": "PUBLIC_ERROR_IP_INPUT_IMAGE"}
FAILED_SAYS = {"state": "failed", "error": "content_policy_violation"}


# fmt: off
@pytest.mark.parametrize("body, expected, credits", [
    ({"operations": [old_clip("PENDING")], "remainingCredits": 900}, [OLD_SAYS], 900),
    ({"media": [new_clip("SCHEDULED")], "workflows": [WORKFLOW], "remainingCredits": 0},
     [NEW_SAYS], 0),
    ({"workflows": [WORKFLOW], "remainingCredits": "880"}, [NEW_SAYS], 880),
    ({"operations": [old_clip("PENDING", NEW_NAME)], "media": [new_clip("ACTIVE")]},
     [NEW_SAYS], None),
    ({"media": [new_clip("ACTIVE"), new_clip("SUCCESSFUL", OTHER_NAME)]},
     [NEW_SAYS, NEW_SAYS | {"name": OTHER_NAME, "media": OTHER_NAME, "state": "done"}], None),
    ({"operations": [old_clip(metadata=OLD_DONE) | {"mediaGenerationId": "CAUS"}]},
     [OLD_SAYS | {"media": "CAUS", "state": "done", "url": LINK}], None),
    ({"media": [new_clip()]}, [NEW_SAYS | {"state": "done"}], None),
    ({"media": [new_clip(generated={"fifeUrl": LINK})]},
     [NEW_SAYS | {"state": "done", "url": LINK}], None),
    ({"operations": [old_clip("FAILED", error=REFUSAL)]}, [OLD_SAYS | FAILED_SAYS], None),
    ({"operations": [old_clip("ERROR_UNKNOWN", error=REFUSAL)]}, [OLD_SAYS | FAILED_SAYS], None),
    ({"media": [new_clip("FAILED", error=IP, failureReasons=["IP_PROHIBITED"])]},
     [NEW_SAYS | FAILED_SAYS], None),
    ({"media": [new_clip("FAILED", failureReasons=["IP_PROHIBITED"])]},
     [NEW_SAYS | FAILED_SAYS], None),
    ({"media": [new_clip("CANCELED")]},
     [NEW_SAYS | {"state": "failed", "error": "generation_failed"}], None),
    ({"media": [new_clip("A_NEW_WORD")]}, [NEW_SAYS], None),
    ({"operations": [{"mediaGenerationId": "CAUS", "rawBytes": MP4,
                      "status": PREFIX + "SUCCESSFUL"}]},
     [{"name": "CAUS", "media": "CAUS", "state": "done", "data": b"\0\0\0\x18ftypisom"}], None),
    ({"media": [new_image("CAMa"), new_image(NEW_NAME, projectId="p")], "workflows": [WORKFLOW]},
     [{"name": "CAMa", "media": "CAMa", "state": "done", "url": LINK},
      NEW_SAYS | {"state": "done", "url": LINK}], None),
    ({}, [], None),
    ({"operations": [], "media": None}, [], None),
])
# fmt: on
def test_replies_of_both_generations_are_read(body, expected, credits):
    reply = flow2api.read_statuses(body)
    said = [status._asdict() for status in reply.statuses]
    said = [row | {"error": row["error"] and row["error"].code} for row in said]
    said = [{name: value for name, value in row.items() if value} for row in said]
    assert said == [{"state": "pending"} | row for row in expected]
    assert reply.credits == credits


@pytest.mark.parametrize(
    "body",
    [
        {"media": [{"title": "no name"}]},
        {"media": "abc"},
        {"media": ["abc"]},
        {"media": 5},
        {"workflows": [{"name": "w"}]},
        {"operations": [{"status": PREFIX + "ACTIVE"}]},
    ],
)
def test_a_reply_of_unknown_shape_is_upstream_changed(body):
    with pytest.raises(flow2api.GatewayError) as told:
        flow2api.read_statuses(body)
    assert told.value.code == "upstream_changed"


@pytest.mark.parametrize(
    "pasted",
    [
        "eyJhbGciOiJkaXIi..a.b",
        ' "eyJhbGciOiJkaXIi..a.b"\n',
        "__Secure-next-auth.session-token=eyJhbGciOiJkaXIi..a.b",
        "next-auth.session-token=eyJhbGciOiJkaXIi..a.b;",
        "EMAIL=x%40y; __Secure-next-auth.session-token=eyJhbGciOiJkaXIi..a.b; _ga=GA1.1",
        'Cookie: a=b; __Secure-next-auth.session-token="eyJhbGciOiJkaXIi..a.b"',
    ],
)
def test_a_session_token_is_taken_out_of_what_people_paste(pasted):
    assert flow2api.clean_session_token(pasted) == "eyJhbGciOiJkaXIi..a.b"


def test_a_signed_link_says_its_end_or_counts_for_an_hour(monkeypatch):
    monkeypatch.setattr(flow2api, "now", lambda: 1000.0)
    assert flow2api.read_link(LINK) == (LINK, 1771256167.0)
    assert flow2api.read_link("https://x.test/a") == ("https://x.test/a", 4600.0)


async def test_what_a_lost_submit_has_made_is_found_by_its_batch(world):
    """In the project's page data, and nobody else's."""
    w = await world()
    jobs = []
    for replies in ("new", "old"):
        w.demo.replies = replies
        _, headers, _ = await w.chat(n=2)
        await w.chat(text="somebody else's")
        jobs.append(w.store.job(headers["X-Job-Id"]))
    for job in jobs:
        found = await w.pool.upstream.find(w.pool.tokens[1], job)
        assert {status.name for status in found} == {output.name for output in job.outputs}


def test_a_submit_has_the_form_of_2026(monkeypatch):
    """All n outputs in one call, each with a seed of its own."""
    monkeypatch.setattr(flow2api, "now", lambda: 1771234567.89)
    plan = flow2api.resolve("veo_3_1-fast-landscape", images=2)
    job = flow2api.Job(plan=plan, prompt="a cat", n=3, batch="the batch", project="p")
    body = flow2api.submit_request(job, ULTRA, ["m1", "m2"], {"projectId": "p"})
    seeds = [request.pop("seed") for request in body["requests"]]
    assert len(set(seeds)) == 3
    context = {"batchId": "the batch", "audioFailurePreference": "BLOCK_SILENCED_VIDEOS"}
    request = {
        "aspectRatio": "VIDEO_ASPECT_RATIO_LANDSCAPE",
        "textInput": {"structuredPrompt": {"parts": [{"text": "a cat"}]}},
        "videoModelKey": "veo_3_1_i2v_s_fast_ultra_fl",
        "metadata": {},
        "startImage": {"mediaId": "m1"},
        "endImage": {"mediaId": "m2"},
    }
    assert body == {
        "mediaGenerationContext": context,
        "clientContext": {"projectId": "p"},
        "requests": [request] * 3,
        "useV2ModelConfig": True,
    }
    job.plan = flow2api.resolve("nano_banana_pro-square", images=1)
    body = flow2api.submit_request(job, PRO, ["m1"], {"projectId": "p"})
    request = {
        "clientContext": {"projectId": "p"},
        "imageModelName": "GEM_PIX_2",
        "imageAspectRatio": "IMAGE_ASPECT_RATIO_SQUARE",
        "structuredPrompt": {"parts": [{"text": "a cat"}]},
        "imageInputs": [{"name": "m1", "imageInputType": "IMAGE_INPUT_TYPE_REFERENCE"}],
    }
    seeds = [request.pop("seed") for request in body["requests"]]
    assert len(set(seeds)) == 3 and body["requests"] == [request] * 3
    assert body["useNewMedia"] is True
    assert body["mediaGenerationContext"] == {"batchId": "the batch"}


def test_a_status_call_has_the_form_of_the_submit_it_follows():
    new = flow2api.Output(name=NEW_NAME, project="p")
    old = flow2api.Output(name=OLD_NAME, scene="s")
    assert flow2api.status_request([new]) == {"media": [{"name": NEW_NAME, "projectId": "p"}]}
    assert flow2api.status_request([old]) == {"operations": [old_clip("PENDING")]}


async def test_a_rotated_session_cookie_is_kept(world):
    """Only one that can be a session token: an empty or short one is not."""
    w = await world()
    token, rotated = w.pool.tokens[1], "r" * 300
    first, cookies = token.st, ["", "short", rotated]
    w.demo.accounts[rotated] = w.demo.accounts[first]

    async def rotate(request, handler):
        reply = await handler(request)
        if request.path.endswith("/auth/session"):
            reply.headers["Set-Cookie"] = (
                f"__Secure-next-auth.session-token={cookies.pop(0)}; Path=/"
            )
        return reply

    w.fault = rotate
    for kept in (first, first, rotated):
        await w.pool.access_token(token, token.at)
        assert token.st == kept
    assert w.store.tokens()[0].st == rotated


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"user": {"email": "a@b.c"}},
        {"access_token": "ya29.x", "error": "ACCESS_TOKEN_REFRESH_NEEDED"},
    ],
)
async def test_a_dead_session_is_account_session_ended(world, body):
    w = await world()

    async def dead(request, handler):
        ours = request.path.endswith("/auth/session")
        return web.json_response(body) if ours else await handler(request)

    w.fault = dead
    with pytest.raises(flow2api.GatewayError) as told:
        await w.account()
    assert (told.value.code, told.value.does) == ("account_session_ended", "session")


@pytest.mark.parametrize("inner, code", [(500, "upstream_error"), (403, "account_refused")])
async def test_an_error_inside_http_200_of_trpc_counts(world, inner, code):
    w = await world(accounts=())

    async def refuse(request, handler):
        if "createProject" not in request.path:
            return await handler(request)
        result = {"result": {"projectId": "p"}, "status": inner, "statusText": "no"}
        return web.json_response({"result": {"data": {"json": result}}})

    w.fault = refuse
    token = await w.account()
    assert token.project_id == ""
    with pytest.raises(flow2api.GatewayError) as told:
        await w.pool.project(token)
    assert told.value.code == code


@pytest.mark.parametrize(
    "reply, result",
    [
        ({"media": {"name": NEW_NAME}, "workflow": WORKFLOW}, NEW_NAME),
        ({"media": [{"name": NEW_NAME}]}, NEW_NAME),
        ({"mediaGenerationId": {"mediaGenerationId": "CAMa"}, "width": 64}, "CAMa"),
        ({"media": {"projectId": "p"}}, None),
        ({"media": []}, None),
        ({}, None),
    ],
)
async def test_an_upload_gives_a_name_or_was_silently_refused(world, reply, result):
    w = await world()
    sent = []

    async def answer(request, handler):
        if not request.path.endswith("uploadImage"):
            return await handler(request)
        sent.append(await request.json())
        return web.json_response(reply)

    w.fault = answer
    status, _, body = await w.chat("nano_banana", "edit", [data_url(PNG, "image/jpeg")])
    assert sent[0]["mimeType"] == "image/png"  # by its first bytes, whatever the URL says
    assert flow2api.base64.b64decode(sent[0]["imageBytes"]) == PNG
    if result:
        assert status == 200 and made_calls(w)["edit"][0][3]["imageInputs"][0]["name"] == result
    else:
        assert (status, body["error"]["code"]) == (400, "content_policy_violation")
        assert not made_calls(w) and w.pool.tokens[1].error_count == 0


# Google's refusals (upstream-rest 11.2, 11.3): HTTP status (0: a clip that failed later), reasons
# without PUBLIC_ERROR_, or a message; the code, and what it does.
REFUSALS = (
    (400, "UNSAFE_GENERATION PROMINENT_PEOPLE_FILTER_FAILED VIOLENCE_FILTER DANGER_FILTER SEXUAL"
     " MINOR MINOR_UPLOAD MINOR_HARM_UPLOAD MINOR_INPUT_IMAGE SEXUAL_UPLOAD UNSAFE_IMAGE_UPLOAD"
     " PROMINENT_PEOPLE_UPLOAD PROMINENT_PEOPLE_INPUT_IMAGE PHOTOREAL_UPLOAD PHOTOREAL_INPUT_IMAGE"
     " IP_INPUT_IMAGE IMAGE_OUTPUT_IP_FILTER AUDIO_FILTERED REPUTATIONAL VIDEO_EDIT",
     "content_policy_violation", "request"),
    (0, "UNSAFE_GENERATION IP_PROHIBITED AUDIO_GENERATION_FILTERED FINISH_REASON_INPUT_VIDEO_EDIT"
     " FINISH_REASON_INPUT_SPEECH_EDIT FINISH_REASON_OUTPUT_DANGEROUS AUDIO_FILTER_MINOR_PRESENCE",
     "content_policy_violation", "request"),
    (400, "IMAGE_TOO_LARGE IMAGE_TOO_SMALL UNKNOWN_IMAGE_FILE_FORMAT", "invalid_image", "request"),
    (400, "MEDIA_GENERATION_CANNOT_BE_CANCELED", "conflict", "request"),
    (409, "GENERATION_ALREADY_IN_PROGRESS", "conflict", "request"),
    (403, "UNUSUAL_ACTIVITY", "captcha_required", "account"),
    (403, "MODEL_ACCESS_DENIED", "model_not_for_account", "account"),
    (403, "USER_REGION_DISALLOWED USER_MINOR APP_UNAVAILABLE", "account_refused", "banning"),
    (429, "USER_REQUESTS_THROTTLED UNUSUAL_ACTIVITY_TOO_MUCH_TRAFFIC", "account_throttled",
     "account"),
    (429, "PER_MODEL_DAILY_QUOTA_REACHED PER_MODEL_DAILY_QUOTA_REACHED_UPGRADEABLE",
     "account_daily_quota", "account"),
    (429, "USER_QUOTA_REACHED WORKSPACE_ACCOUNT_QUOTA_REACHED", "account_no_credits", "account"),
    (429, "CONCURRENT_LIMIT_REACHED", "account_busy", "account"),
    (429, "HIGH_TRAFFIC MODEL_OVERLOADED MODEL_DISABLED_DUE_TO_TRAFFIC", "upstream_busy", "again"),
    (500, "SOMETHING_WENT_WRONG VIDEO_GENERATION_TIMED_OUT", "upstream_busy", "again"),
)  # fmt: skip
MESSAGES = (
    (400, 'Invalid JSON payload received. Unknown name "x"', "upstream_changed", "final"),
    (403, "reCAPTCHA evaluation failed", "captcha_required", "account"),
    (403, "The caller does not have permission", "account_refused", "banning"),
    (404, "Requested entity was not found.", "model_unavailable", "final"),
    (429, "Resource has been exhausted (e.g. check quota).", "account_throttled", "account"),
    (500, "Internal error encountered.", "upstream_error", "again"),
    (503, "The service is currently unavailable.", "upstream_error", "again"),
    (504, "", "upstream_error", "again"),
    (0, "", "generation_failed", "final"),
)


@pytest.mark.parametrize(
    "status, reason, message, code, does",
    [
        *(
            (s, f"PUBLIC_ERROR_{r}", "Refused.", c, d)
            for s, rs, c, d in REFUSALS
            for r in rs.split()
        ),
        *((s, "", m, c, d) for s, m, c, d in MESSAGES),
        (400, "PUBLIC_ERROR_NON_ENGLISH_PROMPT", "", "invalid_request", "request"),
        (499, "", "The operation was cancelled.", "upstream_error", "again"),
    ],
)
def test_each_of_googles_reasons_has_its_code_and_effect(status, reason, message, code, does):
    err = flow2api.google_error(status, reason, message)
    assert (err.code, err.does, err.upstream) == (code, does, status)
    assert (reason or message or str(status)) in str(err)  # what Google said is told along
    assert err.status == flow2api.ERRORS[code][0]


async def test_a_timeout_on_googles_side_leaves_a_submit_unknown(world):
    w = await world()

    async def late(request, handler):
        status = 499 if "GenerateVideoText" in request.path else 0
        return web.Response(status=status) if status else await handler(request)

    w.fault = late
    task = asyncio.create_task(w.chat())
    await until(lambda: any(job.state == "unknown" for job in w.jobs.open.values()) or task.done())
    assert not task.done(), task.result()
    task.cancel()


def demo_clips(w, count, ready=0.0):
    """That many clips at the Demo, in turn with names of 2026 and of 2025, as Outputs."""
    outputs = []
    for i in range(count):
        new, name = flow2api.uuid.uuid4(), ""
        name = new.hex if i % 2 else str(new)
        details = (name, "video", f"clip {i}", "PORTRAIT", ready, "p", "b", "s")
        w.demo.media[name] = flow2api.DemoMedium(*details)
        outputs.append(flow2api.Output(name=name, project="p", scene="s"))
    return outputs


@pytest.mark.parametrize("refusal", [404, 400])
async def test_one_bad_name_in_a_status_call_hides_no_other(world, refusal):
    """Google refuses a whole call for one name that it doesn't know."""
    w = await world()

    async def refuse(request, handler):
        reply = await handler(request)
        error = {"error": {"code": refusal, "message": "Request contains an invalid argument."}}
        return reply if reply.status != 404 else web.json_response(error, status=refusal)

    w.fault, outputs = refuse, demo_clips(w, 40)
    for lost in (outputs[7], outputs[22]):
        del w.demo.media[lost.name]
    expected = {output.name for output in outputs} & set(w.demo.media)
    reply = await w.pool.upstream.poll(w.pool.tokens[1], outputs)
    assert {status.name for status in reply.statuses} == expected
    assert {status.state for status in reply.statuses} == {"done"}
    before = len(w.asked("Status"))
    again = await w.pool.upstream.poll(w.pool.tokens[1], outputs)
    assert {status.name for status in again.statuses} == expected
    assert len(w.asked("Status")) == before + 2  # the bad ones are left out for a while


async def test_many_clips_are_asked_for_in_chunks(world):
    w = await world()
    outputs = demo_clips(w, 600, ready=flow2api.math.inf)
    reply = await w.pool.upstream.poll(w.pool.tokens[1], outputs)
    assert sorted(status.name for status in reply.statuses) == sorted(w.demo.media)
    sizes = [len(body.get("media", ())) or -len(body["operations"]) for body in w.asked("Status")]
    assert sorted(sizes) == [-256, -44, 44, 256]


async def test_both_generations_of_replies_live_in_one_pool(world):
    w = await world(video_seconds=0.6)
    first = asyncio.create_task(w.chat(n=2))
    await until(lambda: len(w.demo.media) == 2)
    w.demo.replies = "old"
    answers = [await w.chat(), await first]
    assert [status for status, _, _ in answers] == [200, 200]
    forms = {form for body in w.asked("Status") for form in body}
    assert forms == {"media", "operations"}


async def test_a_name_that_google_has_lost_stays_pending_and_holds_nobody_up(world):
    w = await world()
    lost = asyncio.create_task(w.chat(text="lost"))
    await until(lambda: w.demo.media)
    w.demo.media.clear()
    assert (await w.chat(text="kept"))[0] == 200
    (job,) = w.jobs.open.values()
    assert (job.prompt, job.state, job.outputs[0].state) == ("lost", "running", "pending")
    lost.cancel()


# ---- Store ----


@pytest.fixture
async def open_db(tmp_path):
    """Opens the store in the test's folder; called again: closes it and opens it anew."""
    stores = []

    def open_it():
        while stores:
            stores.pop().close()
        store = flow2api.Store(tmp_path)
        store.open()
        stores.append(store)
        return store

    yield open_it
    while stores:
        stores.pop().close()


def stored(record):
    return {name: getattr(record, name) for name in record.FIELDS}


@pytest.mark.parametrize("what", ["token", "job"])
async def test_what_is_put_is_read_back_after_a_restart(open_db, what):
    store = open_db()
    token = flow2api.Token(id=3, email="ü@example.com", st="s" * 900, credits=None, tier=PRO)
    token.today, token.paused_until = {"video": 2}, 99.0
    plan = flow2api.resolve("veo_3_1_t2v_fast_landscape")
    job = flow2api.Job(id="video_1", state="running", plan=plan, prompt="雨\n\0", token_id=3, n=2)
    job.created_at, job.notes, job.inputs = 12.5, ["a"], ["video_1_0"]
    outputs = [flow2api.Output(job_id=job.id, number=i, name=f"n{i}", url=LINK) for i in (1, 0)]
    await store.put(token, job, *outputs)
    store = open_db()
    if what == "token":
        (read,) = store.tokens()
        assert stored(read) == stored(token) and read.paused_until == 0  # a pause is not kept
    else:
        (read,) = store.open_jobs()
        assert stored(read) == stored(job) == stored(store.job("video_1"))
        assert [stored(output) for output in read.outputs] == [stored(o) for o in outputs[::-1]]


async def test_ended_jobs_are_listed_newest_first_and_not_open(open_db):
    store = open_db()
    states = ["completed", "failed", "cancelled", "queued", "completed"]
    jobs = [flow2api.Job(id=f"j{i}", state=s, created_at=float(i)) for i, s in enumerate(states)]
    await store.put(*jobs)
    assert [job.id for job in store.completed_jobs(9)] == ["j4", "j0"]
    assert [job.id for job in store.open_jobs()] == ["j3"] and store.job("none") is None


async def test_writes_end_in_the_order_of_their_asking(open_db):
    """However they are grouped: the last state wins, and nobody overtakes."""
    store, token, ended = open_db(), flow2api.Token(id=1, email="a"), []
    for credits in range(1000):
        token.credits = credits
        store.put(token).add_done_callback(lambda _, n=credits: ended.append(n))
    await store.put(flow2api.Token(id=2, email="b"))
    await until(lambda: len(ended) == 1000)
    assert ended == sorted(ended)
    assert [read.credits for read in open_db().tokens()] == [999, None]


async def test_a_refused_write_is_told_and_leaves_no_half(open_db):
    store, good = open_db(), ("settings", {"name": "a", "data": "1"})
    with pytest.raises(flow2api.StoreError, match="nowhere"):
        await store.put_rows(good, ("nowhere", {"name": "b"}))
    assert store.settings() == {}
    await store.put_rows(good)
    assert store.settings() == {"a": 1}


async def test_a_refused_write_takes_no_other_along(open_db):
    store = open_db()
    rows = [("settings", {"name": f"{i}", "data": "1"}) for i in range(100)]
    rows[50] = ("nowhere", {"name": "b"})
    told = await asyncio.gather(*map(store.put_rows, rows), return_exceptions=True)
    assert [result is None for result in told] == [i != 50 for i in range(100)]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_text_that_is_no_utf_8_does_not_stop_the_store(open_db):
    """JSON can hold half a surrogate pair: \\ud800."""
    store = open_db()
    async with asyncio.timeout(2):
        with contextlib.suppress(flow2api.StoreError):
            await store.put(flow2api.Job(id="a", prompt="\ud800"))
        await store.put(flow2api.Job(id="b", state="completed"))
    assert store.job("b")


async def test_a_second_process_on_the_same_folder_is_refused(open_db, tmp_path):
    first = open_db()
    with pytest.raises(flow2api.StoreError, match="in use by another Flow2API"):
        flow2api.Store(tmp_path).open()
    code = f"import flow2api, pathlib; flow2api.Store(pathlib.Path({str(tmp_path)!r})).open()"
    folder = flow2api.Path(flow2api.__file__).parent
    options = {"stderr": asyncio.subprocess.PIPE, "cwd": folder}
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, **options)
    _, said = await process.communicate()
    assert process.returncode and b"in use by another Flow2API" in said
    await first.put(flow2api.Token(id=1, email="a"))  # and the first goes on
    assert open_db().tokens()


async def test_a_newer_schema_stops_with_a_clear_word(open_db, tmp_path):
    open_db().close()
    with contextlib.closing(sqlite3.connect(tmp_path / "flow2api.db")) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(flow2api.StoreError, match="newer Flow2API"):
        flow2api.Store(tmp_path).open()


async def test_a_migration_keeps_the_data(open_db, monkeypatch):
    await open_db().put(flow2api.Token(id=1, email="a"))
    more = (*flow2api.MIGRATIONS, "CREATE TABLE later (x);")
    monkeypatch.setattr(flow2api, "MIGRATIONS", more)
    store = open_db()
    assert [token.email for token in store.tokens()] == ["a"]
    await store.put_rows(("later", {"x": 1}))


async def test_a_migration_that_fails_changes_nothing_and_lets_go(open_db, tmp_path, monkeypatch):
    await open_db().put(flow2api.Token(id=1, email="a"))
    broken = (*flow2api.MIGRATIONS, "CREATE TABLE later (x); NOT SQL;")
    monkeypatch.setattr(flow2api, "MIGRATIONS", broken)
    with pytest.raises(flow2api.StoreError):
        open_db()
    with contextlib.closing(sqlite3.connect(tmp_path / "flow2api.db", timeout=0)) as db:
        db.execute("BEGIN IMMEDIATE")
        assert db.execute("SELECT email FROM tokens").fetchall() == [("a",)]
        assert not db.execute("SELECT * FROM sqlite_master WHERE name = 'later'").fetchall()


@pytest.mark.parametrize("sound", [0, 4096])
async def test_a_corrupt_database_is_told_and_left_as_it_was(open_db, tmp_path, sound):
    store, path = open_db(), tmp_path / "flow2api.db"
    await store.put(*(flow2api.Token(id=i, email=f"{i}", st="x" * 500) for i in range(100)))
    store.close()
    raw = path.read_bytes()
    broken = raw[:sound].ljust(len(raw), b"\xff")
    path.write_bytes(broken)
    with pytest.raises(flow2api.StoreError, match=re.escape(str(path))):
        flow2api.Store(tmp_path).open()
    assert path.read_bytes() == broken


async def test_only_its_owner_may_read_the_database(tmp_path, open_db):
    store = open_db()
    await store.put(flow2api.Token(id=1, email="a"))
    for path in tmp_path.glob("flow2api.db*"):
        assert path.stat().st_mode & 0o777 == 0o600, path


# ---- Chat requests ----


def picture_of(number):
    return flow2api.picture(f"picture {number}", 16, 16)


def prompt_of(w):
    """The prompt of the last submit."""
    body = (w.asked("batchGenerateImages") or w.asked("batchAsyncGenerateVideo"))[-1]
    wanted = body["requests"][0]
    return (wanted.get("textInput") or wanted)["structuredPrompt"]["parts"][0]["text"]


def uploads(w):
    return [(body["mimeType"], base64.b64decode(body["imageBytes"])) for body in w.asked("upload")]


def said(*texts):
    return [{"type": "text", "text": text} for text in texts]


def turn(role, content):
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("messages", "prompt"),
    [
        ([turn("user", "a boat, 船, ⛵\n'quoted'")], "a boat, 船, ⛵\n'quoted'"),
        ([turn("user", said("a boat", "at night"))], "a boat\nat night"),
        ([turn("system", "You are helpful"), turn("user", "a boat")], "a boat"),
        ([turn("user", "a car"), turn("assistant", "done"), turn("user", "a boat")], "a boat"),
        ([turn("user", "a boat"), turn("assistant", None)], "a boat"),
        ([turn("user", "a boat"), turn("tool", "x"), turn("developer", said("y"))], "a boat"),
    ],
)
async def test_the_prompt_is_the_text_of_the_last_user_turn(world, messages, prompt):
    w = await world()
    assert content(await w.chat("nano_banana_pro", messages=messages))
    assert prompt_of(w) == prompt


async def test_the_system_message_goes_before_the_prompt_where_that_is_set(world):
    w = await world(**{"chat.use_system_prompt": True})
    messages = [turn("system", "In oil."), turn("user", "a car"), turn("user", "a boat")]
    await w.chat("nano_banana_pro", messages=messages)
    assert prompt_of(w) == "In oil.\n\na boat"


JPEG = b"\xff\xd8\xff\xe0" + b"jpeg" * 10


@pytest.mark.parametrize(
    ("link", "kind", "data"),
    [
        (data_url(PNG), "image/png", PNG),
        (data_url(JPEG, "image/jpeg"), "image/jpeg", JPEG),
        (data_url(JPEG, "image/png"), "image/jpeg", JPEG),  # the first bytes decide
        (base64.b64encode(PNG).decode(), "image/png", PNG),
        (base64.urlsafe_b64encode(PNG).decode().rstrip("="), "image/png", PNG),
        (data_url(b"GIF89a" + b"x" * 9, "image/gif"), "image/gif", b"GIF89a" + b"x" * 9),
    ],
)
async def test_a_picture_is_uploaded_as_it_came_with_its_real_type(world, link, kind, data):
    w = await world()
    assert content(await w.chat("nano_banana_pro", pictures=[link]))
    assert uploads(w) == [(kind, data)]
    assert len(w.asked("batchGenerateImages")[0]["requests"][0]["imageInputs"]) == 1


async def test_a_picture_comes_by_url_by_field_and_as_a_plain_string(world):
    w = await world()
    w.fault = fault("^/(a|old).png$", lambda r: web.Response(body=PNG))
    by_url = f"{w.demo.address}/a.png"
    assert content(await w.chat("nano_banana_pro", pictures=[by_url]))
    assert content(await w.chat("nano_banana_pro", image=by_url))
    assert content(await w.chat("nano_banana_pro", image=base64.b64encode(PNG).decode()))
    parts = [*said("a boat"), {"type": "image_url", "image_url": by_url}]
    assert content(await w.chat("nano_banana_pro", messages=[turn("user", parts)]))
    assert uploads(w) == [("image/png", PNG)] * 4


@pytest.mark.parametrize(
    ("model", "names"),
    [
        ("nano_banana_pro", ["imageInputs"] * 3),
        ("veo_3_1_r2v_fast_landscape", ["referenceImages"] * 3),
        ("veo_3_1-fast", ["referenceImages"] * 3),
        ("veo_3_1-fast-fl", ["startImage", "endImage"]),
        ("veo_3_1_i2v_s_fast_fl_landscape", ["startImage"]),
    ],
)
async def test_pictures_keep_their_order(world, model, names):
    w, order = await world(), []

    async def name_uploads(request, handler):
        if "uploadImage" not in request.path:
            return await handler(request)
        order.append(base64.b64decode((await request.json())["imageBytes"]))
        return web.json_response({"media": {"name": f"medium-{len(order)}"}})

    w.fault = name_uploads
    sent = [picture_of(number) for number in range(len(names))]
    assert content(await w.chat(model, pictures=map(data_url, sent)))
    wanted = (w.asked("batchGenerateImages") or w.asked("AsyncGenerate"))[0]["requests"][0]
    fields = [name for name in ("imageInputs", "referenceImages") if wanted.get(name)]
    media = [item for name in fields for item in wanted[name]]
    media += [wanted[name] for name in ("startImage", "endImage") if name in wanted]
    assert order == sent
    used = [medium.get("name") or medium["mediaId"] for medium in media]
    assert used == [f"medium-{number + 1}" for number in range(len(names))]
    assert set(names) == set(fields) | ({"startImage", "endImage"} & set(wanted))


@pytest.mark.parametrize(
    ("model", "count"),
    [
        ("veo_3_1_i2v_s_fast_fl_landscape", 0),
        ("veo_3_1_i2v_s_fast_fl_landscape", 3),
        ("veo_3_1_r2v_fast_landscape", 4),
        ("veo_3_1-fast", 4),
        ("nano_banana_pro", 11),
    ],
)
async def test_the_wrong_number_of_pictures_is_refused_before_anything_is_sent(world, model, count):
    w = await world()
    w.demo.calls.clear()
    reply = await w.chat(model, pictures=[data_url(PNG)] * count)
    assert model in told(w, reply, "invalid_image")["message"]
    assert not w.demo.calls


async def test_a_model_without_pictures_leaves_them_out_and_says_so(world):
    w = await world()
    text = content(await w.chat("veo_3_1_t2v_fast_landscape", pictures=[data_url(PNG)]))
    assert "takes no pictures" in text and links_in(text)
    assert not uploads(w)


@pytest.mark.parametrize("model", ["nano_banana_pro", "veo_3_1-fast"])
@pytest.mark.parametrize(("n", "count"), [(None, 1), (1, 1), (3, 3), (4, 4), ("2", 2)])
async def test_n_outputs_go_in_one_submit(world, model, n, count):
    w = await world(video_seconds=0.02)
    text = content(await w.chat(model, **({} if n is None else {"n": n})))
    (body,) = w.asked("batchGenerateImages") + w.asked("AsyncGenerate")
    assert len(set(links_in(text))) == count == len(body["requests"])
    assert len({wanted["seed"] for wanted in body["requests"]}) == count


@pytest.mark.parametrize("n", [0, 5, -1, 1.5, "two", True, [], {}, "9" * 5000, 10**30])
async def test_a_bad_n_is_refused(world, n):
    w = await world()
    assert told(w, await w.chat(n=n), "invalid_request")["param"] == "n"


@pytest.mark.parametrize(
    ("model", "fields", "ratio"),
    [
        ("veo_3_1-fast", {"size": "1920x1080"}, "LANDSCAPE"),
        ("veo_3_1-fast", {"size": "720x1280"}, "PORTRAIT"),
        ("veo_3_1-fast", {"size": "1000x999"}, "LANDSCAPE"),
        ("veo_3_1-fast", {"size": "auto"}, "PORTRAIT"),
        ("veo_3_1-fast", {"aspect_ratio": "16:9"}, "LANDSCAPE"),
        ("veo_3_1-landscape-fast", {"size": "1920x1080"}, "LANDSCAPE"),
        ("nano_banana_pro", {"size": "1024x1024"}, "SQUARE"),
        ("veo_3_1-fast", {"size": "huge"}, None),
        ("veo_3_1-fast", {"size": 720}, None),
        ("veo_3_1-portrait-fast", {"size": "1920x1080"}, None),
        ("veo_3_1_t2v_fast_landscape", {"size": "720x1280"}, None),
    ],
)
async def test_size_decides_the_shape_and_may_not_contradict_the_model(world, model, fields, ratio):
    w = await world(video_seconds=0.02)
    reply = await w.chat(model, **fields)
    if not ratio:
        assert told(w, reply, "invalid_request")["param"] == "size"
        return
    (body,) = w.asked("batchGenerateImages") + w.asked("AsyncGenerate")
    wanted = body["requests"][0]
    assert content(reply)
    assert (wanted.get("aspectRatio") or wanted["imageAspectRatio"]).endswith("RATIO_" + ratio)


@pytest.mark.parametrize("name", ["video", "remix_target_id", "style_id", "character_options"])
async def test_what_only_sora_has_is_refused_by_name(world, name):
    w = await world()
    error = told(w, await w.chat(**{name: "x"}), "unsupported_parameter")
    assert error["param"] == name and name in error["message"]


async def test_fields_that_nobody_here_needs_are_ignored(world):
    w = await world()
    extra = {"temperature": 0.7, "max_tokens": None, "tools": [{}], "stop": "x", "seed": {}}
    extra |= {"user": 1, "metadata": {}, "stream_options": None, "quality": "hd", "top_p": "x"}
    assert content(await w.chat("nano_banana_pro", **extra))


TASK = "### Task:\n{}\n### Chat History:\n<chat_history>\nUSER: a paper boat\n</chat_history>"
SIDE = (  # what a client sends on its own; what it wants to read
    ("Open WebUI title", "", TASK.format("Generate a concise, 3-5 word title"), "title"),
    ("Open WebUI tags", "", TASK.format("Generate 1-3 broad tags categorizing"), "tags"),
    ("Open WebUI questions", "", TASK.format("Suggest 3-5 relevant follow-up questions"), "follow"),
    ("NextChat title", "", "Please generate a four to five word title summarizing our talk", ""),
    ("NextChat memory", "", "Summarize the discussion briefly in 200 words or less", ""),
    ("Chatbox", "", "Based on the chat history, give this conversation a name.", ""),
    ("LobeHub", "You are a professional conversation summarizer.", "a paper boat", ""),
    ("Cherry Studio", "summarize the user's conversation into a title", "a paper boat", ""),
)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("system", "prompt", "key"), [row[1:] for row in SIDE], ids=[row[0] for row in SIDE]
)
async def test_a_clients_own_prompt_is_answered_without_generating(
    world, system, prompt, key, stream
):
    w = await world(accounts=())  # not even an account is needed
    messages = [turn("system", system), turn("user", prompt)]
    if stream:
        _, _, events = await w.stream(messages=messages)
        assert events[-1]["choices"][0]["finish_reason"] == "stop"
        text = content_of(events)
    else:
        text = content(await w.chat(messages=messages))
    assert text and (not key or any(name.startswith(key) for name in json.loads(text)))
    assert not w.demo.calls and not w.jobs.open


async def test_a_clients_own_prompt_can_be_told_to_generate(world):
    w = await world(**{"chat.answer_side_prompts": False})
    await w.chat("nano_banana_pro", TASK.format("Generate a title"))
    assert prompt_of(w).startswith("### Task:")


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize(
    ("text", "pictures", "model", "takes"),
    [
        ("make it darker", (), "nano_banana_pro", True),
        ("把背景改成蓝色", (), "nano_banana_pro", True),
        ("a paper boat at sea", (), "nano_banana_pro", False),
        ("make it darker", (data_url(JPEG, "image/jpeg"),), "nano_banana_pro", False),
        ("make it darker", (), "veo_3_1-fast", False),
    ],
)
async def test_an_edit_continues_the_picture_that_we_made(
    world, cache, text, pictures, model, takes
):
    w = await world(**{"cache.enabled": cache})
    first = content(await w.chat("nano_banana_pro", "a cat"))
    (made,) = w.demo.media.values()
    turns = [turn("user", "a cat"), turn("assistant", first)]
    last = chat_body(model, text, pictures)["messages"]
    answer = content(await w.chat(model, messages=turns + last))
    assert (("image/png", made.file()) in uploads(w)) == takes == ("went along" in answer)
    assert len(uploads(w)) == (1 if takes or pictures else 0)
    assert prompt_of(w) == text or model == "veo_3_1-fast"


async def test_a_private_address_in_the_history_is_not_fetched_and_stops_nothing(world):
    w = await world(**{"server.allow_private_urls": False})
    w.fault = fault("private", lambda request: web.Response(body=PNG))
    link = f"![x]({w.demo.address}/private/{'a' * 40}.png)"
    turns = [turn("assistant", link), turn("user", "make it darker")]
    assert content(await w.chat("nano_banana_pro", messages=turns))
    assert (uploads(w), w.fault.seen) == ([], [])


# ---- Chat answers ----


async def test_a_stream_keeps_all_the_rules(world, monkeypatch):
    """clients.md 1.2: what every known client can read."""
    monkeypatch.setattr(flow2api, "HEARTBEAT", 0.05)
    w = await world(video_seconds=0.6)
    headers, lines, events = await w.stream(n=2, stream_options={"include_usage": True})
    assert headers["Content-Type"].split(";")[0] == "text/event-stream"
    assert "no-cache" in headers["Cache-Control"] and headers["X-Accel-Buffering"] == "no"
    assert headers["X-Job-Id"] and headers["Access-Control-Allow-Origin"] == "*"
    assert all(not line or line.startswith("data: ") for line in lines)
    assert [line for line in lines if line][-1] == "data: [DONE]"
    assert all(line == "" for line in lines[1::2])
    assert {event["id"] for event in events} == {events[0]["id"]}
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert {event["model"] for event in events} == {"veo_3_1-fast"}
    assert len({event["created"] for event in events}) == 1
    *chunks, usage = events
    assert usage["choices"] == [] and all(type(n) is int for n in usage["usage"].values())
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0]["role"] == "assistant" and not any("role" in delta for delta in deltas[1:])
    assert all(type(text) is str for delta in deltas for text in delta.values())
    assert sum("reasoning_content" in delta for delta in deltas) > 1
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks].count(None) == len(chunks) - 1
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert len(set(links_in(content_of(events)))) == 2


async def test_usage_comes_only_when_asked_for(world):
    w = await world()
    _, _, events = await w.stream("nano_banana_pro")
    assert all(event["choices"] and "usage" not in event for event in events)


async def test_a_stream_starts_at_once_and_shows_signs_of_life_while_nothing_happens(
    world, monkeypatch
):
    monkeypatch.setattr(flow2api, "HEARTBEAT", 0.02)
    w, beats = await world(), 0
    w.fault = hold(PAID)
    body = chat_body("veo_3_1-fast", "a boat") | {"stream": True}
    options = {"json": body, "headers": {"Authorization": f"Bearer {w.key}"}}
    async with asyncio.timeout(5), w.http.post(w.url + POST[1], **options) as reply:
        assert reply.status == 200
        await w.fault.seen.wait()
        while beats < 5:
            line = await reply.content.readline()
            beats += b'"delta": {}' in line
        w.fault.release.set()
        assert not w.demo.media and b"[DONE]" in await reply.read()


async def test_an_error_after_the_start_is_text_and_event_and_done(world):
    w = await world()
    headers, _, events = await w.stream(text="something unsafe")
    *chunks, error = events
    message = told(w, (400, headers, error), "content_policy_violation")["message"]
    assert message in content_of(chunks)
    assert headers["x-should-retry"] == "false"
    assert "stop" not in [chunk["choices"][0]["finish_reason"] for chunk in chunks]


async def test_a_stream_that_the_end_of_the_process_cuts_names_its_job(world):
    w = await world(video_seconds=60)
    client = asyncio.create_task(w.stream())
    (job,) = await running(w)
    await w.stop_gateway()
    headers, _, events = await client
    assert job.id in told(w, (503, headers, events[-1]), "shutting_down")["message"]
    await w.start_gateway()


async def test_a_bug_in_the_middle_of_a_stream_is_an_error_event_too(world, monkeypatch):
    monkeypatch.setattr(flow2api, "progress_line", None)
    w = await world()
    async with asyncio.timeout(2):
        headers, lines, events = await w.stream("nano_banana_pro")
    assert all(not line or line.startswith("data: ") for line in lines)
    told(w, (500, headers, events[-1]), "internal_error")


async def test_no_line_of_a_stream_is_long(world):
    """64 KiB is where some clients stop."""
    w = await world()
    w.fault = fault(PAID, refusal(400, message="x" * 300_000))
    _, lines, _ = await w.stream(text="boat " * 30_000)
    assert max(map(len, lines)) < 1 << 16


async def test_a_whole_answer_is_a_chat_completion(world):
    w = await world()
    status, headers, body = await w.chat("imagen_4")
    assert status == 200 and headers["Content-Type"].startswith("application/json")
    assert (body["object"], body["model"], type(body["created"])) == (
        "chat.completion",
        "imagen_4",
        int,
    )
    (choice,) = body["choices"]
    assert (choice["index"], choice["finish_reason"]) == (0, "stop")
    assert choice["message"]["role"] == "assistant"
    assert re.fullmatch(r"!\[.+\]\(http\S+\)", choice["message"]["content"])
    assert set(body["usage"]) >= {"prompt_tokens", "completion_tokens", "total_tokens"}
    assert (await w.jobs.get(headers["X-Job-Id"])).state == "completed"


@pytest.mark.parametrize(
    ("form", "html", "link"), [("both", True, True), ("html", True, False), ("link", False, True)]
)
async def test_a_clip_is_given_in_the_form_that_is_set(world, form, html, link):
    w = await world(**{"chat.video_content": form, "cache.enabled": True})
    text = content(await w.chat())
    url = re.escape(links_in(text)[0])
    assert (
        bool(re.search(f'^<video src="{url}" controls="controls">\n{url}\n</video>', text)) == html
    )
    assert bool(re.search(rf"\[video\.mp4\]\({url}\)$", text)) == link
    assert len(set(links_in(text))) == 1 and url.endswith("mp4")


@pytest.mark.parametrize("stream", [False, True])
async def test_clients_that_want_modalities_get_pictures_beside_the_text(world, stream):
    w = await world(**{"cache.enabled": True})
    wanted = {"modalities": ["image", "text"], "n": 2}
    if stream:
        _, _, events = await w.stream("nano_banana_pro", **wanted)
        message = next(delta for e in events if "images" in (delta := e["choices"][0]["delta"]))
    else:
        message = (await w.chat("nano_banana_pro", **wanted))[2]["choices"][0]["message"]
    assert [(image["type"], image["index"]) for image in message["images"]] == [
        ("image_url", 0),
        ("image_url", 1),
    ]
    assert all(image["image_url"]["url"].endswith(".png") for image in message["images"])
    assert message["content"] and "](" not in message["content"]


# ---- Doors ----


async def raw_call(w, method, path, header="X-Nothing: x"):
    """A request exactly as it is written here -> (status, body)."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(w.url.rpartition(":")[2]))
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 0\r\n"
    writer.write(f"{head}{header}\r\n\r\n".encode("utf-8", "surrogateescape"))
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    return int(head.split()[1]), body


@pytest.mark.parametrize("prefix", ["/v1", "", "/flow/v1", "/v1/v1"])
@pytest.mark.parametrize("scheme", ["Bearer ", "bearer ", ""])
async def test_every_spelling_of_address_and_key(world, prefix, scheme):
    w = await world()
    options = {"headers": {"Authorization": scheme + w.key}}
    body = chat_body("nano_banana_pro", "a boat")
    assert content(await w.call("POST", f"{prefix}/chat/completions", body, **options))
    status, _, models = await w.call("GET", f"{prefix}/models", **options)
    assert status == 200 and {"id", "object", "owned_by"} <= set(models["data"][0])


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer ", "Bearer sk-wrong", "Basic x", "Bearer schlüssel", "\udcff"]
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/models", "/flow/v1/models"])
async def test_without_the_key_nothing_is_open(world, header, path):
    w = await world()
    method = "POST" if "chat" in path else "GET"
    status, body = await raw_call(w, method, path, f"Authorization: {header}")
    assert (status, json.loads(body)["error"]["code"]) == (401, "invalid_api_key")


async def test_a_browser_may_ask_first_and_needs_no_key_for_that(world):
    w = await world()
    asked = {"Origin": "https://x.example", "Access-Control-Request-Method": "POST"}
    asked["Access-Control-Request-Headers"] = "authorization, content-type, x-stainless-os"
    async with w.http.options(w.url + POST[1], headers=asked) as reply:
        allowed = reply.headers
        assert (reply.status, allowed["Access-Control-Allow-Origin"]) == (204, "*")
        names = allowed["Access-Control-Allow-Headers"]
        assert names == asked["Access-Control-Request-Headers"]
        assert {"GET", "POST", "DELETE"} <= set(
            re.split(", ?", allowed["Access-Control-Allow-Methods"])
        )
        assert "credentials" not in str(allowed).lower()
    _, headers, _ = await w.call("GET", "/v1/models")
    assert "x-job-id" in headers["Access-Control-Expose-Headers"]
    _, headers, _ = await w.call("GET", "/v1/models", key="wrong")
    assert headers["Access-Control-Allow-Origin"] == "*"  # or a browser can't read the error
    async with w.http.options(w.url + "/api/tokens", headers=asked) as reply:
        assert "Access-Control-Allow-Origin" not in reply.headers


async def test_the_reason_phrase_is_short_and_says_what_is_wrong(world):
    """Open WebUI's picture panel shows nothing else."""
    w = await world()
    async with w.http.get(w.url + "/v1/models") as reply:
        assert reply.reason == "invalid api key"


# ---- Junk ----

# fmt: off
JUNK = (
    b"", b"{", b"[]", b"null", b'"text"', b"\xff\xfe{}", b"[" * 100_000, b"model=veo_3_1&n=1",
    b'{"model": "veo_3_1", "messages": ' + b"9" * 5000 + b"}",
    b'{"model": "veo_3_1", "messages": NaN}',
)
# fmt: on


@pytest.mark.parametrize("raw", JUNK, ids=lambda raw: repr(raw[:24]))
async def test_a_body_that_is_no_request_is_refused(world, raw):
    w = await world()
    w.demo.calls.clear()
    told(w, await w.call(*POST, data=raw), "invalid_request")
    assert not w.demo.calls


# fmt: off
WRONG = (
    {"messages": []}, {"messages": [{}]}, {"messages": ["a"]}, {"messages": [turn("user", "")]},
    {"messages": [turn("user", "   ")]}, {"messages": [turn("user", None)]},
    {"messages": [turn("user", 5)]}, {"messages": [turn("user", [])]},
    {"messages": [turn("user", ["a boat"])]}, {"messages": [turn("user", [{"type": "text"}])]},
    {"messages": [turn("user", [{"type": "text", "text": ["a"]}])]},
    {"messages": [turn("assistant", "a boat")]}, {"messages": [turn(["user"], "a boat")]},
    {"messages": turn("user", "a boat")}, {"model": None}, {"model": ["veo_3_1"]},
    {"model": "x" * 100_000}, {"size": {"a": 1}}, {"image": {"url": 5}}, {"image": 5},
    {"image": "****"}, {"image": "data:image/png;base64,!!!"}, {"image": data_url(b"plain text")},
    {"image": data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml")},
    {"image": data_url(flow2api.CLIP, "video/mp4")}, {"image": "http://"}, {"image": "http://[::1"},
    {"image": "http://x:99999999/"}, {"image": "https://\x00/"}, {"image": "file:///etc/passwd"},
)
# fmt: on


@pytest.mark.parametrize("fields", WRONG, ids=lambda fields: str(fields)[:60])
async def test_wrong_types_are_refused_and_nothing_is_sent(world, fields):
    w = await world()
    w.demo.calls.clear()
    status, _, body = reply = await w.call(*POST, chat_body("nano_banana_pro", "boat") | fields)
    assert status in (400, 404), body
    told(w, reply, body["error"]["code"])
    assert not w.demo.calls and not w.jobs.open


@pytest.mark.parametrize("fields", [{"modalities": 5}, {"modalities": True}, {"modalities": "x"}])
async def test_odd_modalities_are_ignored(world, fields):
    w = await world()
    assert content(await w.chat("nano_banana_pro", **fields))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("text", ["half an emoji \ud83d", TASK.format("title") + "USER: \ud83d"])
async def test_half_a_surrogate_pair_harms_nobody(world, text, stream):
    """Clients that cut a text in the middle of an emoji send such."""
    w = await world()
    body = chat_body("nano_banana_pro", text.replace("a paper boat", "\ud83d")) | {"stream": stream}
    async with asyncio.timeout(5):
        status, _, _ = await w.call(*POST, data=json.dumps(body))
    assert status in (200, 400)
    assert content(await w.chat("nano_banana_pro"))


async def test_a_picture_of_thirty_megabytes_is_too_large(world):
    w = await world()
    w.demo.calls.clear()
    huge = PNG + bytes(30 << 20)
    told(w, await w.chat("nano_banana_pro", pictures=[data_url(huge)]), "request_too_large")
    w.fault = fault("huge", lambda request: web.Response(body=huge))
    by_url = f"{w.demo.address}/huge.png"
    told(w, await w.chat("nano_banana_pro", pictures=[by_url]), "request_too_large")
    assert not w.demo.calls


def mutated(dice):
    """A request for a picture with up to three things wrong or odd in it."""
    odd = [None, True, 0, -1, 1.5, "", "x", "\ud800", [], {}, [None], {"a": {}}, [[]], 10**400]
    odd += ["9" * 6000, {"type": "text"}, {"type": "image_url"}, {"url": "http://["}, "a" * 70_000]
    parts = [
        {"type": "text", "text": "boat"},
        {"type": "image_url", "image_url": {"url": data_url(PNG)}},
    ]
    body = {"model": "nano_banana_pro", "messages": [turn("system", "s"), turn("user", parts)]}
    places = [body, body, body, body["messages"], parts, *parts, parts[1]["image_url"]]
    names = "model messages stream n size image modalities stream_options aspect_ratio type text"
    names = [*names.split(), "image_url", "url", "role", "content"]
    for _ in range(dice.randint(1, 3)):
        place = dice.choice(places)
        if isinstance(place, list):
            place.insert(dice.randint(0, len(place)), dice.choice(odd))
        else:
            place[dice.choice(names)] = dice.choice(odd)
    return body


async def test_whatever_the_shape_of_a_body_the_answer_is_never_a_500(world):
    w, dice = await world(image_seconds=0), random.Random(2)

    async def one(body):
        status, _, answer = await w.call(*POST, data=json.dumps(body))
        return [] if status in (200, 400, 404, 413) else [(status, answer, str(body)[:300])]

    async with asyncio.timeout(30):
        for _ in range(20):
            wrong = await asyncio.gather(*(one(mutated(dice)) for _ in range(20)))
            assert not sum(wrong, [])


# ---- Media ----


async def fetched(w, url, **headers):
    """A media link, as a client without a key gets it -> (status, headers, body)."""
    async with w.http.get(url, headers=headers) as reply:
        return reply.status, reply.headers, await reply.read()


@pytest.mark.parametrize(
    ("model", "kind", "ending"),
    [("nano_banana_pro", "image/png", "png"), ("veo_3_1-fast", "video/mp4", "mp4")],
)
async def test_a_kept_file_is_served_whole_and_in_ranges(world, model, kind, ending):
    w = await world(**{"cache.enabled": True})
    url = links_in(content(await w.chat(model)))[0]
    (medium,) = w.demo.media.values()
    assert re.fullmatch(rf"{w.url}/tmp/[\w-]{{22,}}\.{ending}", url)
    status, headers, data = await fetched(w, url)
    assert (status, headers["Content-Type"], data == medium.file()) == (200, kind, True)
    assert headers["Access-Control-Allow-Origin"] == "*" and headers["Accept-Ranges"] == "bytes"
    status, headers, part = await fetched(w, url, Range="bytes=4-9")
    assert (status, part) == (206, data[4:10])
    assert headers["Content-Range"] == f"bytes 4-9/{len(data)}"


async def test_the_first_bytes_decide_the_type_of_a_kept_file(world):
    w = await world(**{"cache.enabled": True})
    w.fault = fault("^/media/", lambda r: web.Response(body=JPEG, content_type="image/png"))
    url = links_in(content(await w.chat("nano_banana_pro")))[0]
    assert url.endswith(".jpg") and (await fetched(w, url))[1]["Content-Type"] == "image/jpeg"


async def test_without_the_cache_the_link_is_googles_own(world):
    w = await world()
    url = links_in(content(await w.chat()))[0]
    assert url.startswith(w.demo.address) and (await fetched(w, url))[0] == 200
    assert not list((w.data / "tmp").iterdir())


@pytest.mark.parametrize("base", ["https://media.example", "https://media.example/flow/"])
async def test_links_lead_to_the_address_that_is_set(world, base):
    w = await world(**{"cache.enabled": True, "cache.base_url": base})
    url = links_in(content(await w.chat("nano_banana_pro")))[0]
    assert url.startswith(base.rstrip("/") + "/tmp/")


TRAVERSALS = (
    "../flow2api.db ..%2fflow2api.db %2e%2e/flow2api.db %2e%2e%2fflow2api.db ..%5cflow2api.db"
)
TRAVERSALS += " ..%252fflow2api.db .%00./flow2api.db %2fetc%2fpasswd /etc/passwd . %2e %2e%2e"
TRAVERSALS += " other.txt {part}.part {part} {part}.png/../other.txt {part}.png%00.mp4 {part}.PNG"
TRAVERSALS += " ..%2finputs%2fsecret {part}.png%0a %F0%9F {part}.png; ~ {part}.png/"


@pytest.mark.parametrize("name", TRAVERSALS.split())
async def test_no_name_leads_out_of_the_kept_files(world, name):
    w, part = await world(), "a" * 32
    for path in ("tmp/other.txt", f"tmp/{part}.part", "inputs/secret"):
        (w.data / path).write_bytes(b"SQLite canary root:")
    (w.data / f"tmp/{part}.png").write_bytes(PNG)
    status, body = await raw_call(w, "GET", "/tmp/" + name.format(part=part))
    assert status == 404, body
    assert json.loads(body)["error"]["code"] == "not_found"


async def test_kept_files_expire(world, impatient):
    w = await world(**{"cache.enabled": True})
    old, young = [links_in(content(await w.chat("nano_banana_pro")))[0] for _ in range(2)]
    file = w.data / "tmp" / old.rpartition("/")[2]
    os.utime(file, (0, time.time() - 7300))
    await until(lambda: not file.exists())
    assert ((await fetched(w, old))[0], (await fetched(w, young))[0]) == (404, 200)


async def test_a_file_that_vanishes_while_the_old_ones_are_sought_stops_nothing(
    world, impatient, monkeypatch
):
    stopped = []
    monkeypatch.setattr("signal.raise_signal", stopped.append)
    w = await world()
    (w.data / "tmp/vanished.part").symlink_to("nowhere")
    old = w.data / "tmp" / f"{'a' * 32}.png"
    for _ in range(2):
        old.write_bytes(PNG)
        os.utime(old, (0, 0))
        await until(lambda: stopped or not old.exists())
    assert not stopped


async def test_a_download_that_breaks_off_leaves_no_file_and_the_link_to_google(world, impatient):
    async def broken(request, handler):
        if not request.path.startswith("/media/"):
            return await handler(request)
        reply = web.StreamResponse(headers={"Content-Length": "100000"})
        await reply.prepare(request)
        await reply.write(b"half a clip")
        request.transport.close()
        return reply

    w = await world(**{"cache.enabled": True})
    w.fault = broken
    status, headers, body = await w.chat()
    text = content((status, headers, body))
    assert links_in(text)[0].startswith(w.demo.address) and "can't be fetched" in text
    assert not list((w.data / "tmp").iterdir())
    assert (await w.jobs.get(headers["X-Job-Id"])).state == "completed"


async def test_a_clip_without_an_address_is_completed_all_the_same(world, impatient):
    w = await world(**{"cache.enabled": True})
    w.fault = fault("getMediaUrlRedirect", refusal(404, message="NOT_FOUND"))
    status, headers, body = await w.chat()
    assert "kept at Flow" in content((status, headers, body))
    assert (await w.jobs.get(headers["X-Job-Id"])).outputs[0].media in w.demo.media


async def test_an_address_that_has_died_is_asked_for_anew(world, impatient):
    w = await world(replies="old", **{"cache.enabled": True})
    w.fault = fault("^/media/", refusal(403), times=1)
    text = content(await w.chat())
    assert links_in(text)[0].startswith(w.url) and "can't" not in text
    assert len(w.asked("getMediaUrlRedirect")) == 1


PRIVATE = """http://127.0.0.1:{} http://[::1]:{} http://localhost:{} http://127.1:{} http://0:{}
 http://2130706433:{} http://0x7f000001:{} http://0x7f.1:{} http://0177.0.0.1:{} http://0.0.0.0:{}
 http://[::ffff:127.0.0.1]:{} http://[::ffff:7f00:1]:{} http://[::]:{} http://[0:0:0:0:0:0:0:1]:{}
 http://x@127.0.0.1:{} http://127.0.0.1.:{} http://①②⑦.⓪.⓪.①:{} http://127。0。0。1:{}
 http://１２７.0.0.1:{} http://LOCALHOST:{} http://ip6-localhost:{} http://169.254.169.254
 http://10.0.0.1 http://192.168.1.1 http://172.16.0.1 http://100.64.0.1 http://[64:ff9b::7f00:1] http://[fe80::1]
 http://[fc00::1] http://[::ffff:10.0.0.1] http://224.0.0.1
 http://[ff02::1] http://example.com@127.0.0.1:{} http://127.0.0.1:{}\\@example.com
 file:///etc/passwd ftp://127.0.0.1:{} gopher://127.0.0.1:{} //127.0.0.1:{} http:127.0.0.1:{}"""


@pytest.mark.parametrize("url", PRIVATE.split())
async def test_no_picture_is_fetched_from_a_private_address(world, url):
    w = await world(**{"server.allow_private_urls": False})
    w.fault = fault("private", lambda request: web.Response(body=PNG))
    link = url.format(w.demo.address.rpartition(":")[2]) + "/private/a.png"
    told(w, await w.chat("nano_banana_pro", pictures=[link]), "invalid_image")
    assert not w.fault.seen and not w.jobs.open


@pytest.mark.parametrize(
    "target", ["http://[::ffff:127.0.0.1]:{}/private", "http://localhost:{}/private", "file:///x"]
)
async def test_no_redirect_leads_to_a_private_address(world, monkeypatch, target):
    """The first address counts as public here, for once."""
    w = await world(**{"server.allow_private_urls": False})
    answers = iter([True])
    public = property(lambda address: next(answers, False))
    monkeypatch.setattr(ipaddress.IPv4Address, "is_global", public)
    headers = {"Location": target.format(w.demo.address.rpartition(":")[2])}
    w.fault = fault("hop|private", lambda request: web.Response(status=302, headers=headers))
    link = f"{w.demo.address}/hop.png"
    told(w, await w.chat("nano_banana_pro", pictures=[link]), "invalid_image")
    assert w.fault.seen == ["/hop.png"]


# ---- The pool ----


def tokens_of(w):
    return [w.pool.tokens[number] for number in sorted(w.pool.tokens)]


async def test_jobs_are_spread_over_the_accounts(world):
    w = await world(((PRO, 1000),) * 3)
    await asyncio.gather(*(w.chat() for _ in range(9)))
    assert [(token.video_count, token.use_count) for token in tokens_of(w)] == [(3, 3)] * 3


async def test_an_account_serves_only_what_is_switched_on(world):
    w = await world(accounts=())
    clips = await w.account(image_enabled=False)
    pictures = await w.account(video_enabled=False)
    await asyncio.gather(*(w.chat(model) for model in ["veo_3_1-fast", "nano_banana_pro"] * 3))
    assert (clips.video_count, clips.image_count) == (3, 0)
    assert (pictures.video_count, pictures.image_count) == (0, 3)
    await w.pool.update(clips, video_enabled=False)
    assert "clips" in told(w, await w.chat(), "no_accounts")["message"]


async def test_over_its_limit_an_account_lets_jobs_wait(world):
    w, under_way = await world(), []
    await w.pool.update(only(w), video_concurrency=2)

    async def count(request, handler):
        if re.search(PAID, request.path):
            made = w.demo.media.values()
            under_way.append(sum(medium.ready > flow2api.now() for medium in made))
        return await handler(request)

    w.fault = count
    replies = await asyncio.gather(*(w.chat() for _ in range(5)))
    assert [status for status, *_ in replies] == [200] * 5
    assert len(under_way) == 5 and max(under_way) == 1
    assert (only(w).busy.total(), only(w).reserved) == (0, 0)


async def test_the_balance_is_known_from_the_answer(world):
    w = await world()
    await w.chat(n=2)
    assert only(w).credits == 960 == next(iter(w.demo.accounts.values()))["credits"]


async def test_credits_of_jobs_under_way_are_reserved(world):
    """Two clips for 20 with 30 credits: the second is refused and not sent."""
    w = await world(((PRO, 30),))
    first = asyncio.create_task(w.chat())
    await until(lambda: w.jobs.open)
    told(w, await w.chat(), "no_credits")
    assert content(await first) and len(w.asked("AsyncGenerate")) == 1


@pytest.mark.parametrize(
    ("status", "reason", "code"),
    [
        (429, "PUBLIC_ERROR_USER_QUOTA_REACHED", "account_no_credits"),
        (403, "PUBLIC_ERROR_UNUSUAL_ACTIVITY", "captcha_required"),
        (403, "PUBLIC_ERROR_MODEL_ACCESS_DENIED", "model_not_for_account"),
        (429, "PUBLIC_ERROR_PER_MODEL_DAILY_QUOTA_REACHED", "account_daily_quota"),
        (403, "", "account_refused"),
    ],
)
async def test_what_one_account_is_refused_another_one_does(world, status, reason, code):
    """Once each; the last error is told when all have refused, and nobody is disabled."""
    w = await world(((PRO, 1000), (PRO, 1000)))
    w.fault = fault(PAID, refusal(status, reason), times=1)
    assert content(await w.chat())
    assert sorted(token.error_count for token in tokens_of(w)) == [0, 1]
    w = await world(((PRO, 1000), (PRO, 1000)), data=w.data.with_name("second"))
    w.fault = fault(PAID, refusal(status, reason))
    told(w, await w.chat(), code)
    assert len(w.fault.seen) == 2
    assert all(token.is_active and token.error_count == 1 for token in tokens_of(w))


async def test_an_account_without_credits_at_google_is_known_to_have_none(world):
    w = await world(((PRO, 2000), (PRO, 1000)))
    next(iter(w.demo.accounts.values()))["credits"] = 0
    assert content(await w.chat())
    assert [token.credits for token in tokens_of(w)] == [0, 980]


async def test_an_account_that_google_refuses_three_times_in_a_row_is_disabled(world, clock):
    w = await world()
    for failures in (1, 2):
        w.fault = fault(PAID, refusal(403, "", "Not you."))
        told(w, await w.chat("nano_banana_pro"), "account_refused")
        assert (only(w).failures, only(w).is_active) == (failures, True)
        clock.ahead += 4000
    w.fault = None
    assert content(await w.chat("nano_banana_pro")) and only(w).failures == 0
    w.fault = fault(PAID, refusal(403, "", "Not you."))
    for _ in range(3):
        clock.ahead += 4000
        told(w, await w.chat("nano_banana_pro"), "account_refused")
    assert not only(w).is_active and "Not you." in only(w).reason
    assert "Not you." in told(w, await w.chat("nano_banana_pro"), "no_accounts")["message"]
    await w.stop_gateway()
    await w.start_gateway()
    assert (only(w).is_active, "Not you." in only(w).reason) == (False, True)


async def test_a_step_back_grows_is_capped_and_ends(world, clock):
    w, pauses = await world(), []
    w.fault = fault(PAID, refusal(429, "PUBLIC_ERROR_USER_REQUESTS_THROTTLED"))
    for _ in range(7):
        told(w, await w.chat("nano_banana_pro"), "account_throttled")
        pauses.append(only(w).paused_until - flow2api.now())
        clock.ahead += pauses[-1] + 1
    assert all(
        later > 1.5 * earlier for earlier, later in zip(pauses[:3], pauses[1:4], strict=True)
    )
    assert max(pauses) <= 1.1 * 3600 and 200 < pauses[0] < 400
    w.fault = None
    assert content(await w.chat("nano_banana_pro"))
    w.fault = fault(PAID, refusal(429, "PUBLIC_ERROR_USER_REQUESTS_THROTTLED"))
    told(w, await w.chat("nano_banana_pro"), "account_throttled")
    assert only(w).paused_until - flow2api.now() < 400


@pytest.mark.parametrize("on", ["auth/session", "uploadImage", "createProject", "credits"])
async def test_a_fault_of_the_network_blames_and_disables_nobody(world, impatient, clock, on):
    w = await world()
    w.fault = fault(on, dropped)
    await w.pool.update(only(w), project_id="")
    clock.ahead += 7200  # a new access token is due
    await w.chat("nano_banana_pro", pictures=[data_url(PNG)])
    await until(lambda: w.fault.seen)
    token = only(w)
    assert (token.is_active, token.failures, token.error_count, token.paused_until) == (
        True,
        0,
        0,
        0,
    )
    w.fault = None
    assert content(await w.chat("nano_banana_pro"))


async def test_a_hundred_simultaneous_401s_need_one_refresh(world):
    w = await world()
    next(iter(w.demo.accounts.values()))["at"] = "forgotten by Google"
    before = len(w.asked("auth/session"))
    replies = await asyncio.gather(*(w.chat("nano_banana_pro") for _ in range(100)))
    assert [status for status, *_ in replies] == [200] * 100
    assert len(w.asked("auth/session")) - before == 1
    assert len(w.demo.media) == 100 and only(w).error_count == 0


async def test_an_access_token_is_renewed_before_its_end(world, clock, impatient):
    """Without anybody asking for anything."""
    w = await world()
    old = only(w).at
    clock.ahead += 3600 - 300
    await until(lambda: only(w).at != old)
    assert only(w).at_expires > flow2api.now() + 600


# ---- Upscaling ----


@pytest.mark.parametrize(("model", "scale"), [("nano_banana_pro-2K", 2), ("nano_banana_pro-4K", 4)])
async def test_a_picture_is_upscaled_and_kept_even_without_the_cache(world, model, scale):
    w = await world(((ULTRA, 1000),))
    text = content(await w.chat(model))
    (made,) = w.demo.media.values()
    assert (await fetched(w, links_in(text)[0]))[2] == made.file(scale)


@pytest.mark.parametrize(
    ("model", "answer", "tries"),
    [
        ("nano_banana_pro-2K", refusal(500), 3),
        ("nano_banana_pro-2K", refusal(400, "PUBLIC_ERROR_UNSAFE_GENERATION"), 1),
        ("nano_banana_pro-2K", lambda request: web.json_response({}), 1),
        ("veo_3_1-1080p", refusal(400), 1),
        ("veo_3_1-1080p", refusal(403, "PUBLIC_ERROR_UNUSUAL_ACTIVITY"), 3),
    ],
)
async def test_an_upscale_that_fails_leaves_the_original_and_says_so(
    world, impatient, model, answer, tries
):
    w = await world()
    w.fault = fault("psample", answer)
    text = content(await w.chat(model))
    (original,) = w.demo.media.values()
    assert (await fetched(w, links_in(text)[0]))[2] == original.file()
    assert "this is the original" in text
    assert len(w.fault.seen) == tries


async def test_an_upscale_that_fails_later_leaves_the_original_and_says_so(world):
    w = await world()
    client = asyncio.create_task(w.chat("veo_3_1-1080p"))
    await until(lambda: len(w.demo.media) == 2)
    original, larger = w.demo.media.values()
    w.demo.media[larger.name] = larger._replace(prompt="unsafe")
    text = content(await client)
    assert original.name in links_in(text)[0] and larger.name not in text
    assert "this is the original" in text


@pytest.mark.parametrize(
    "answer", [refusal(409, "PUBLIC_ERROR_GENERATION_ALREADY_IN_PROGRESS"), dropped]
)
async def test_an_upscale_under_way_or_lost_is_polled_and_not_sent_again(world, answer):
    w = await world(((PRO, 100),))
    w.fault = fault("UpsampleVideo", answer, through=True)
    text = content(await w.chat("veo_3_1-1080p"))
    assert "_upsampled" in links_in(text)[0] and "original" not in text
    assert len(w.fault.seen) == 1


@pytest.mark.parametrize("answered", [False, True])
async def test_an_upscale_over_a_restart_is_sent_once(world, answered):
    w = await world(video_seconds=0.5)
    w.fault = None if answered else hold("UpsampleVideo", through=True)
    client = asyncio.create_task(w.chat("veo_3_1-1080p"))
    await until(lambda: len(w.demo.media) == 2)
    (job,) = w.jobs.open.values()
    await until(lambda: not answered or job.outputs[0].name.endswith("_upsampled"))
    await w.stop_gateway()
    told(w, await client, "shutting_down")
    if not answered:
        w.fault.release.set()
    await w.start_gateway()
    job = await end_of(w, job.id)
    assert (job.state, job.notes, len(w.asked("UpsampleVideo"))) == ("completed", [], 1)
    assert job.outputs[0].name.endswith("_upsampled")


# ---- Secrets ----

PROXIES = ("http://user:canary@127.0.0.1:9", "socks5://user:canary@127.0.0.1:9")
PROXIES += ("http://user:canary@127.0.0.1:99999", "http://user:canary@[x", "ftp://user:canary@x")
PROXIES += ("socks5://user:canary@", "user:canary@127.0.0.1:9", "canary")


@pytest.mark.parametrize("proxy", PROXIES)
async def test_a_proxy_that_does_not_work_is_told_without_its_password(
    world, impatient, caplog, proxy
):
    caplog.set_level(logging.DEBUG)
    w = await world()
    w.live.put("file", "proxy.proxy_enabled", True, "test")
    w.live.put("file", "proxy.proxy_url", proxy, "test")
    status, _, body = reply = await w.chat("nano_banana_pro")
    assert body["error"]["code"] in ("proxy_unavailable", "upstream_unreachable")
    told(w, reply, body["error"]["code"])
    assert only(w).is_active and only(w).error_count == 0 == only(w).busy.total()
    assert "canary" not in f"{caplog.text}{body}"


async def test_no_log_line_and_no_error_holds_a_secret(world, impatient, looks, clock, caplog):
    caplog.set_level(logging.DEBUG)
    w = await world(((PRO, 100), (ULTRA, 100)), **{"cache.enabled": True})
    known = secrets_of(w)
    replies = [await w.chat("nano_banana_pro"), await w.chat(text="unsafe")]
    for answer in (refusal(403), refusal(500), dropped, lambda request: web.Response(text="<")):
        for on in (PAID, "upload", "session"):
            clock.ahead += 4000
            for token, account in zip(tokens_of(w), w.demo.accounts.values(), strict=True):
                account["at"] = ""
                await w.pool.update(token, is_active=True, failures=0)
            w.fault = fault(on, answer, times=3)
            replies.append(await w.chat("veo_3_1-fast", pictures=[data_url(PNG)]))
            known += secrets_of(w)
    w.demo.accounts.clear()
    replies.append(await w.chat())
    session = await w.admin()
    replies.append(await w.call("POST", "/api/tokens", {"st": known[2]}, key=session))
    words = {"username": "admin", "password": w.password + "x"}
    replies.append(await w.call("POST", "/api/login", words))
    replies.append(await w.call("GET", "/api/tokens", key=w.key))
    errors = [f"{headers}{body}" for status, headers, body in replies if status >= 400]
    assert len(errors) > 10 and caplog.records
    told_all = caplog.text + "".join(errors)
    assert not [secret for secret in {*known, session} if secret in told_all]


# ---- Admin API ----


async def test_login_opens_the_admin_api_and_nothing_else(world):
    w = await world()
    for path in ("/api/login", "/api/admin/login"):
        words = {"username": "admin", "password": w.password}
        status, _, body = await w.call("POST", path, words)
        assert (status, body["success"], body["token"][:6]) == (200, True, "admin-")
    session = body["token"]
    assert (await w.call("GET", "/api/tokens", key=session))[0] == 200
    told(w, await w.call("GET", "/v1/models", key=session), "invalid_api_key")
    for key in (w.key, "admin-", "admin-x", session + "x", session[:-1]):
        status, headers, body = await w.call("GET", "/api/tokens", key=key)
        assert (status, type(body["detail"])) == (401, str)
        assert "Access-Control-Allow-Origin" not in headers


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ({"username": "admin", "password": "wrong"}, 401),
        ({"username": "root", "password": "a test password"}, 401),
        ({"username": "admin", "password": ""}, 401),
        ({"username": "admin"}, 401),
        ({"username": "admin", "password": None}, 401),
        ({"username": ["admin"], "password": {}}, 401),
        ({"username": "admin", "password": "\ud83d"}, 401),
        ([], 400),
    ],
)
async def test_a_wrong_login_is_refused_with_a_detail(world, words, wanted):
    w = await world()
    status, _, body = await w.call("POST", "/api/login", words)
    assert (status, type(body["detail"])) == (wanted, str)
    assert "token" not in body


TOKEN_TYPES = {  # contract.md A.2
    int: "id use_count credits image_concurrency video_concurrency image_count video_count"
    " error_count",
    str: "st at token email name remark at_expires created_at user_paygate_tier"
    " current_project_id current_project_name",
    bool: "is_active image_enabled video_enabled",
}


async def test_the_list_of_tokens_has_the_shape_that_the_page_reads(world):
    w = await world(((PRO, 1000), (ULTRA, 500)))
    await w.chat("nano_banana_pro", n=2)
    status, _, rows = await w.call("GET", "/api/tokens", key=await w.admin())
    assert (status, [row["email"] for row in rows]) == (
        200,
        ["user2@example.com", "user1@example.com"],
    )
    for row in rows:
        for kind, names in TOKEN_TYPES.items():
            assert {name for name in names.split() if type(row[name]) is not kind} == set()
        assert row["at"] == row["token"] and row["st"] in w.demo.accounts
    assert "last_used_at" in rows[0] and len({*" ".join(TOKEN_TYPES.values()).split()}) == 22
    assert sorted(row["image_count"] for row in rows) == [0, 2]


async def test_a_token_is_added_as_people_paste_it(world):
    w = await world(accounts=())
    st, session = w.demo.account("new@example.com", ULTRA, 777), await w.admin()
    wanted = {"st": f"__Secure-next-auth.session-token={st}; other=1", "remark": "mine"}
    wanted |= {"project_name": "Boats", "video_enabled": False, "image_concurrency": 2}
    status, _, body = await w.call("POST", "/api/tokens", wanted, key=session)
    assert (status, body["success"]) == (200, True)
    assert set(body["token"]) == {"id", "email", "credits", "project_id", "project_name"}
    assert (body["token"]["email"], body["token"]["credits"]) == ("new@example.com", 777)
    token = only(w)
    assert (token.st, token.tier, token.remark) == (st, ULTRA, "mine")
    assert (token.video_enabled, token.image_concurrency) == (False, 2)
    assert w.asked("createProject")[0]["json"]["projectTitle"] == "Boats"
    status, _, body = await w.call("POST", "/api/tokens", {"st": st}, key=session)
    assert (status, type(body["detail"]), len(w.pool.tokens)) == (409, str, 1)
    assert w.store.tokens()[0].email == "new@example.com"


async def test_a_given_project_is_used_and_none_is_made(world):
    w = await world(accounts=())
    wanted = {"st": w.demo.account("new@example.com", PRO, 100), "project_id": "my-project"}
    await w.call("POST", "/api/tokens", wanted, key=await w.admin())
    await w.chat("nano_banana_pro")
    assert not w.asked("createProject") and w.asked("my-project")


async def test_a_new_session_of_a_known_account_replaces_the_old_one(world):
    w = await world()
    st = w.demo.account("user1@example.com", PRO, 500)
    status, _, body = await w.call("POST", "/api/tokens", {"st": st}, key=await w.admin())
    assert (status, body["token"]["id"], only(w).st) == (200, only(w).id, st)


# fmt: off
BAD_TOKENS = (
    {"st": None}, {"st": ""}, {"st": 5}, {"st": "a\r\nb"}, {"st": "ключ"}, {"remark": 5},
    {"project_id": []}, {"video_enabled": "yes"}, {"image_enabled": 1}, {"image_concurrency": "2"},
    {"video_concurrency": True}, {"video_concurrency": 1.5}, {"proxy_url": {}},
)
# fmt: on
BAD_PROXIES = ({"proxy_url": "http://x:99999"}, {"proxy_url": "javascript:alert(1)"})


@pytest.mark.parametrize("fields", BAD_TOKENS + BAD_PROXIES, ids=str)
async def test_wrong_types_in_a_new_token_are_refused(world, fields):
    w = await world(accounts=())
    wanted = {"st": w.demo.account("new@example.com", PRO, 100)} | fields
    status, _, body = await w.call("POST", "/api/tokens", wanted, key=await w.admin())
    assert (status, type(body["detail"]), w.pool.tokens) == (400, str, {})


async def test_a_dead_session_is_refused_in_plain_words(world):
    w = await world(accounts=())
    status, _, body = await w.call("POST", "/api/tokens", {"st": "dead"}, key=await w.admin())
    assert status in (400, 503) and "Sign in to Flow again" in body["detail"]
    assert not w.pool.tokens


async def test_a_token_with_jobs_under_way_is_not_deleted(world):
    w = await world()
    session, path = await w.admin(), f"/api/tokens/{only(w).id}"
    client = asyncio.create_task(w.chat())
    await running(w)
    status, _, body = await w.call("DELETE", path, key=session)
    assert (status, "jobs under way" in body["detail"]) == (409, True)
    assert content(await client)
    assert (await w.call("DELETE", path, key=session))[0] == 200
    assert (w.pool.tokens, w.store.tokens()) == ({}, [])
    assert (await w.call("DELETE", path, key=session))[0] == 404


async def test_a_token_number_beyond_all_numbers_is_not_found(world):
    w = await world()
    status, _, body = await w.call("DELETE", "/api/tokens/" + "9" * 5000, key=await w.admin())
    assert (status, type(body["detail"])) == (404, str)


async def test_health_and_page_are_public_and_tell_nothing(world):
    w = await world()
    for path, kind in (("/health", "application/json"), ("/", "text/html")):
        status, headers, body = await fetched(w, w.url + path)
        assert (status, headers["Content-Type"].split(";")[0]) == (200, kind)
        assert not [secret for secret in secrets_of(w) if secret in body.decode()]
        assert b"example.com" not in body


# ---- OpenAI's own client ----


@pytest.fixture
def openai():
    return pytest.importorskip("openai", reason="NOT TESTED: pip install openai to test with it")


async def test_openais_client_reads_whole_and_streamed_answers(world, openai):
    w = await world(**{"cache.enabled": True})
    async with openai.AsyncOpenAI(base_url=w.url + "/v1", api_key=w.key) as client:
        assert "veo_3_1-fast" in [model.id async for model in client.models.list()]
        asked = chat_body("nano_banana_pro", "a boat", [data_url(PNG)])
        answer = await client.chat.completions.create(**asked, n=2)
        assert len(links_in(answer.choices[0].message.content)) == 2
        asked |= {"stream": True, "stream_options": {"include_usage": True}}
        chunks = [chunk async for chunk in await client.chat.completions.create(**asked)]
        *deltas, last = chunks
        assert (last.choices, last.usage.total_tokens) == ([], 0)
        assert links_in("".join(chunk.choices[0].delta.content or "" for chunk in deltas))
        assert deltas[-1].choices[0].finish_reason == "stop"


async def test_openais_client_raises_the_right_error_and_does_not_pay_twice(world, openai):
    w = await world()
    async with openai.AsyncOpenAI(base_url=w.url + "/v1", api_key=w.key) as client:
        create = client.chat.completions.create
        with pytest.raises(openai.NotFoundError, match="There is no model"):
            await create(**chat_body("veo_9", "a boat"))
        with pytest.raises(openai.BadRequestError, match="from 1 to 4"):
            await create(**chat_body("veo_3_1-fast", "a boat"), n=7)
        with pytest.raises(openai.BadRequestError) as caught:
            await create(**chat_body("veo_3_1-fast", "unsafe"))
        assert caught.value.code == "content_policy_violation"
        with pytest.raises(openai.APIError, match="content policy"):
            async for _ in await create(**chat_body("veo_3_1-fast", "unsafe"), stream=True):
                pass
        with pytest.raises(openai.AuthenticationError):
            await client.with_options(api_key="wrong").models.list()
        w.fault = fault(PAID, refusal(403, "PUBLIC_ERROR_UNUSUAL_ACTIVITY"))
        with pytest.raises(openai.InternalServerError) as caught:
            await create(**chat_body("veo_3_1-fast", "a boat"))
        assert (caught.value.code, len(w.fault.seen)) == ("captcha_required", 1)


# ---- What a review found ----


async def test_a_clip_that_got_ready_while_we_were_down_is_not_given_up(world, clock):
    w = await world(video_seconds=0.2)
    client = asyncio.create_task(w.chat())
    (job,) = await running(w)
    await w.stop_gateway()
    await client
    clock.ahead = 2000  # longer than generation.video_timeout
    await w.start_gateway()
    assert (await end_of(w, job.id)).state == "completed"


async def test_a_listing_that_fails_is_no_proof_that_nothing_was_made(world, looks):
    w = await world(video_seconds=0.02)
    lost = fault(PAID, dropped, through=True)
    listing = fault("projectInitialData", refusal(503), times=3)

    async def both(request, handler):
        flaky = listing if "projectInitialData" in request.path else lost
        return await flaky(request, handler)

    w.fault = both
    assert content(await w.chat()) and len(listing.seen) == 3


async def test_an_account_whose_status_call_hangs_holds_up_no_other(world):
    w = await world(((PRO, 1000), (PRO, 1000)), video_seconds=0.1)
    first, second = w.pool.tokens.values()
    free = asyncio.Event()

    async def hanging(request, handler):
        if "batchCheck" in request.path and first.at in request.headers["Authorization"]:
            await free.wait()
        return await handler(request)

    w.fault = hanging
    clients = [asyncio.create_task(w.chat()) for _ in range(2)]
    await until(lambda: second.video_count == 1)
    assert first.video_count == 0
    free.set()
    await asyncio.gather(*clients)


async def test_an_account_behind_a_dead_proxy_does_not_swallow_all_jobs(world, impatient):
    w = await world(((PRO, 1000), (PRO, 500)))
    dead, _ = w.pool.tokens.values()
    dead.proxy_url = "http://127.0.0.1:9"
    assert [(await w.chat("nano_banana_pro"))[0] for _ in range(3)] == [200] * 3
    assert dead.is_active and dead.error_count == 0


async def test_a_deleted_account_does_not_come_back_with_a_late_answer(world):
    w = await world()
    token = only(w)
    w.fault = hold("/credits")
    check = asyncio.create_task(w.pool.check(token))
    await w.fault.seen.wait()
    await w.pool.remove(token)
    w.fault.release.set()
    await check
    assert not w.store.tokens()


async def test_an_odd_balance_stops_nothing(world):
    w = await world()
    w.fault = fault("/credits", lambda request: web.json_response({"credits": {"amount": 3}}))
    only(w).checked_at = 0
    await w.pool._check_if_due(only(w))
    assert (only(w).is_active, only(w).credits) == (True, 1000)


async def test_the_limit_of_the_queue_holds_in_a_burst(world):
    w = await world(**{"limits.queue": 2})
    await w.pool.update(only(w), video_concurrency=1)
    statuses = [status for status, *_ in await asyncio.gather(*(w.chat() for _ in range(8)))]
    assert sorted(statuses) == [200] * 3 + [429] * 5


async def test_a_download_address_that_is_not_there_yet_is_asked_for_again(world, impatient):
    w = await world()
    w.fault = fault("getMediaUrlRedirect", refusal(404), times=1)
    assert links_in(content(await w.chat()))


async def test_a_full_disk_releases_the_account(world, monkeypatch):
    async def full(self, chunks):
        raise OSError(28, "No space left on device")

    w = await world()
    monkeypatch.setattr(flow2api.Media, "keep", full)
    assert "this is the original" in content(await w.chat("nano_banana_pro-2K"))
    assert only(w).busy.total() == 0


async def test_a_very_long_model_id_is_refused_unread(world):
    w = await world()
    status, _, body = await w.chat("nano_banana" + "-portrait" * 20_000)
    assert status == 400 and len(json.dumps(body)) < 1000


async def test_a_login_of_many_megabytes_is_refused_unread(world):
    w = await world()
    status, _, _ = await w.call("POST", "/api/login", data=b'{"a":[' + b"0," * 100_000 + b"0]}")
    assert status == 413


async def test_a_client_in_the_queue_is_told_that_nothing_was_sent(world):
    w = await world()
    await w.pool.update(only(w), video_concurrency=1)
    clients = [asyncio.create_task(w.chat()) for _ in range(2)]
    await until(lambda: len(w.pool.waiting) == 1 and len(w.jobs.open) == 2)
    await w.stop_gateway()
    told = [reply[2]["error"]["message"] for reply in await asyncio.gather(*clients)]
    assert sorted(("was not sent" in words, "goes on" in words) for words in told) == [
        (False, True),
        (True, False),
    ]
    await w.start_gateway()


async def test_an_upscale_with_an_odd_answer_is_still_waited_for(world):
    w = await world(((ULTRA, 1000),))
    odd = fault("UpsampleVideo", lambda request: web.json_response({"media": [{}]}), through=True)
    w.fault = odd
    assert "failed" not in content(await w.chat("veo_3_1-fast-4k")) and odd.seen


async def test_a_session_without_an_address_keeps_the_known_one(world):
    w = await world(((PRO, 1), (PRO, 1)))

    async def nameless(request, handler):
        answer = await handler(request)
        if "auth/session" not in request.path:
            return answer
        return web.json_response(json.loads(answer.body) | {"user": None})

    w.fault = nameless
    for token in w.pool.tokens.values():
        await w.pool.access_token(token, token.at)
    assert len({token.email for token in w.store.tokens()}) == 2


async def test_a_stop_in_the_moment_of_a_lease_ends(world):
    """wait_for of Python 3.11 can lose a cancel that comes together with the result."""
    w = await world(video_seconds=30)
    only(w).paused_until = flow2api.now() + 30
    client = asyncio.create_task(w.chat())
    await until(lambda: len(w.pool.waiting) == 1)
    only(w).paused_until = 0
    w.pool.wake()  # the lease is given, and the stop comes before its task runs
    async with asyncio.timeout(5):
        await w.jobs.stop()
    client.cancel()
    assert not w.asked("AsyncGenerate")


async def test_progress_never_goes_back(world):
    w = await world()
    plan = flow2api.resolve("veo_3_1-fast")
    job = flow2api.Job(plan=plan, submitted_at=flow2api.now() - 50)
    known = w.jobs.durations[flow2api._family(plan)]
    known.append(60)
    before, _ = w.jobs.progress(job)
    known.extend([200, 200])
    assert w.jobs.progress(job)[0] >= before > 50


async def test_a_client_that_never_learnt_its_job_does_not_pay_after_a_restart(world):
    """It leaves an asynchronous API while the job is being written."""
    w = await world()
    put, writing = w.store.put, asyncio.Event()

    async def slow(*records):
        writing.set()
        await asyncio.shield(put(*records))
        await asyncio.sleep(0.2)

    w.store.put = slow
    generation = flow2api.Generation(flow2api.resolve("veo_3_1-fast"), "x")
    create = asyncio.create_task(w.jobs.create(generation, "videos", True))
    await writing.wait()
    create.cancel()
    await asyncio.wait([create])
    w.store.put = put
    await until(lambda: not w.store.open_jobs())
    await w.stop_gateway()
    await w.start_gateway()
    assert not w.jobs.open and not w.asked("AsyncGenerate")


async def test_one_odd_entry_of_a_status_reply_does_not_hide_the_others(world):
    w = await world()

    async def odd(request, handler):
        answer = await handler(request)
        if "batchCheck" not in request.path:
            return answer
        body = json.loads(answer.body)
        return web.json_response({"media": [{"nom": 1}, *body["media"], None]})

    w.fault = odd
    assert links_in(content(await w.chat()))


def test_an_odd_balance_does_not_make_an_accepted_submit_unknown():
    reply = flow2api.read_statuses({"media": [new_clip()], "remainingCredits": "many"})
    assert (len(reply.statuses), reply.credits) == (1, None)


async def test_googles_own_retry_after_is_obeyed(world, clock):
    w = await world()
    reason = {"error": {"details": [{"reason": "PUBLIC_ERROR_USER_REQUESTS_THROTTLED"}]}}
    late = {"status": 429, "headers": {"Retry-After": "2400"}}
    w.fault = fault(PAID, lambda request: web.json_response(reason, **late), times=1)
    assert (await w.chat())[0] == 503
    clock.ahead = 2000
    status, headers, _ = await w.chat()
    assert status == 503 and int(headers["Retry-After"]) > 60
    clock.ahead = 2700
    assert content(await w.chat())


# ---- Packaging: what a new user meets first ----

REPOSITORY = pathlib.Path(flow2api.__file__).parent
README = (REPOSITORY / "README.md").read_text("utf-8")
KEPT_LINK = re.compile(r"http://127\.0\.0\.1:\d+/tmp/[\w-]+\.(?:png|mp4)")


def bash_blocks(*parts):
    """README's bash blocks that hold all these parts."""
    blocks = re.findall(r"^```bash\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    return [block for block in blocks if all(part in block for part in parts)]


def environment(**more):
    """This process's, without what could lead a child of it astray."""
    kept = {name: text for name, text in os.environ.items() if not name.startswith("FLOW2API_")}
    return kept | {"PYTHONDONTWRITEBYTECODE": "1"} | more


class Program:
    """A process and what it has written so far: `out` and `log`, lists of lines."""

    def __init__(self, process):
        self.process, self.out, self.log = process, [], []
        pairs = (process.stdout, self.out), (process.stderr, self.log)
        self.readers = [asyncio.create_task(self._read(*pair)) for pair in pairs]

    async def _read(self, stream, lines):
        async for line in stream:
            lines.append(line.decode().rstrip("\n"))

    def said(self, name):
        """What stands behind `name: ` in the output; "" where it doesn't."""
        found = (line for line in self.out if line.startswith(f"{name}: "))
        return next(found, "").partition(": ")[2]

    @property
    def url(self):
        return re.search(r"Flow2API .* on (http://\S+)", "\n".join(self.out))[1]

    @property
    def curl(self):
        return next((line for line in self.out if line.startswith("curl ")), "")

    async def end(self):
        """Its exit code, once it has ended and all that it wrote is here."""
        async with asyncio.timeout(30):
            await asyncio.gather(*self.readers)
            return await self.process.wait()

    async def stop(self):
        self.process.send_signal(signal.SIGTERM)
        return await self.end()


@pytest.fixture
async def run():
    """Runs commands: `await run(*command, cwd=…, env=…)` -> Program."""
    programs = []

    async def start(*command, **options):
        pipes = {"stdout": asyncio.subprocess.PIPE, "stderr": asyncio.subprocess.PIPE}
        options = pipes | {"limit": 1 << 24, "env": environment()} | options
        process = await asyncio.create_subprocess_exec(*map(str, command), **options)
        programs.append(Program(process))
        return programs[-1]

    yield start
    for program in programs:  # gently, since a killed demo would leave its folder behind
        with contextlib.suppress(ProcessLookupError):
            program.process.terminate()
        await program.end()


@pytest.fixture
async def flow2(run, tmp_path):
    """Starts flow2api.py: `await flow2(*arguments, **environment)` -> Program, once it serves."""

    async def start(*arguments, script=REPOSITORY / "flow2api.py", **more):
        more = {"FLOW2API_SERVER_HOST": "127.0.0.1", "FLOW2API_SERVER_PORT": "0"} | more
        options = {"cwd": tmp_path, "env": environment(**more)}
        program = await run(sys.executable, script, *arguments, **options)
        await until(lambda: program.curl or program.process.returncode is not None, 30)
        assert program.curl, (program.out, program.log)
        return program

    return start


@pytest.fixture
async def flow():
    """The simulated Flow, whose clips take an hour -> (demo, the environment that points a process
    at it)."""
    demo = Flow(0, 3600)
    runner = await demo.start()
    variables = {
        "FLOW2API_FLOW_LABS_BASE_URL": f"{demo.address}/fx/api",
        "FLOW2API_FLOW_API_BASE_URL": f"{demo.address}/v1",
        "FLOW2API_FLOW_POLL_INTERVAL": "0.1",
        "FLOW2API_GLOBAL_API_KEY": "sk-a-key-for-this-test",
    }
    yield demo, variables
    await runner.cleanup()


async def with_account(folder, st):
    """A data folder with one account in it."""
    store = flow2api.Store(folder)
    store.open()
    await store.put(flow2api.Token(id=1, email="somebody@example.com", st=st))
    store.close()
    return folder


async def listed(url, key):
    """The HTTP status of GET /v1/models with this key."""
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {key}"}) as http:
        return (await http.get(url + "/v1/models")).status


async def downloaded(link):
    """The media type of a link's file, which must be there for anybody."""
    async with aiohttp.ClientSession() as http, http.get(link) as reply:
        assert reply.status == 200, link
        assert len(await reply.read()) == reply.content_length > 100
        return reply.content_type


# ---- The files agree with each other ----


def setting_row(setting):
    """README's row of a setting."""
    values = " ".join(f"`{choice}`" for choice in setting.choices) or "text"
    if isinstance(setting.default, bool):
        values = "`true` `false`"
    if setting.low is not None:
        values = f"{setting.low:.10g} to {setting.high:.10g}"
    start = f"| `{setting.name}` | `{json.dumps(setting.default)}` | {values} | "
    return f"{start}{setting.help} |"


def test_the_readme_lists_each_setting_as_it_is():
    table = [line for line in README.splitlines() if re.match(r"\| `\w+\.\w+` \| `", line)]
    assert table == [setting_row(setting) for setting in flow2api.SETTINGS]


def test_the_setting_file_holds_each_default_in_order_and_comments_it():
    text = (REPOSITORY / "setting.toml").read_text("utf-8")
    document = tomllib.loads(text)
    assert document.pop("models") == {}
    held = [(f"{s}.{key}", value) for s, rows in document.items() for key, value in rows.items()]
    wanted = [(setting.name, setting.default) for setting in flow2api.SETTINGS]
    assert [(*row, type(row[1])) for row in held] == [(*row, type(row[1])) for row in wanted]
    comments = re.findall(r"((?:^# .*\n)+)\w+ = ", text, re.MULTILINE)
    for setting, comment in zip(flow2api.SETTINGS, comments, strict=True):
        numbers = re.findall(r"\d+(?:\.\d+)?", comment)
        if setting.low is not None:
            assert {f"{setting.low:.10g}", f"{setting.high:.10g}"} <= set(numbers), comment
        assert all(f'"{choice}"' in comment for choice in setting.choices), comment
    settings = flow2api.Settings()
    settings.read_file(REPOSITORY / "setting.toml")
    assert not settings.warnings


def test_the_example_of_a_rename_in_setting_toml_is_taken(tmp_path):
    text = (REPOSITORY / "setting.toml").read_text("utf-8")
    renamed = re.sub(r"^# (nano_banana_2 = )", r"\1", text, flags=re.MULTILINE)
    assert renamed != text
    (tmp_path / "setting.toml").write_text(renamed, "utf-8")
    settings = flow2api.Settings()
    settings.read_file(tmp_path / "setting.toml")
    plan = flow2api.resolve("nano_banana_2", overrides=settings.models)
    assert plan.key(PRO) == "BELUGA"


def test_the_readme_says_what_to_do_for_each_error():
    table = README[README.index("### Errors") :]
    rows = re.findall(r"^\| `(\w+)` \| (\d{3}) \| \S", table, re.MULTILINE)
    assert dict(rows) == {code: str(row[0]) for code, row in flow2api.ERRORS.items()}


def test_the_models_in_the_readme_resolve():
    table = README[README.index("## Models") : README.index("Ids in Google's own style")]
    rows = re.findall(r"^\| `([\w-]+)`[^|]*\|([^|]*)\|([^|]*)\|([^|]*)\|", table, re.MULTILINE)
    assert len(rows) > 10
    for model, *cells in rows:
        plan = flow2api.resolve(model)
        if plan.kind == "video":
            credits = ["-" if cost is None else str(cost) for cost in plan.costs]
            assert [cell.strip() for cell in cells] == credits, model


def test_the_table_of_contents_is_that_of_the_file():
    source = pathlib.Path(flow2api.__file__).read_text("utf-8")
    banners = re.findall(r"^# ---- (\d+)\. (.+?) -+$", source, re.MULTILINE)
    assert banners == re.findall(r"^ +(\d+)  (\S.*?)  +\S", flow2api.__doc__, re.MULTILINE)
    assert [int(number) for number, _ in banners] == list(range(1, len(banners) + 1))


def test_nothing_names_the_machine_it_was_written_on():
    names = ("README.md", "setting.toml", "Dockerfile", "docker-compose.yml", "admin.html")
    for name in (*names, ".ci/run", "flow2api.py"):
        text = (REPOSITORY / name).read_text("utf-8")
        assert not re.search(r"/work/|/root/|/home/|/tmp/\w+/", text), name
    assert os.access(REPOSITORY / ".ci" / "run", os.X_OK)


async def test_the_page_needs_nothing_from_elsewhere(world):
    w = await world()
    status, headers, body = await w.call("GET", "/", key="none")
    assert status == 200 and headers["Content-Type"].startswith("text/html")
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    text = body.decode()
    assert not re.search(r"<(script|link|img|iframe|form)\b|\bsrc=|@import|url\(|\son\w+=", text)
    assert "/health" in text and "/v1" in text and "/api/tokens" in text
    assert (await w.call("HEAD", "/", key="none"))[0] == 200


# ---- Docker, carried out without Docker ----


def instructions():
    """The Dockerfile's, as (word, rest) pairs."""
    text = (REPOSITORY / "Dockerfile").read_text("utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


async def test_what_the_dockerfile_says_works_in_an_empty_folder(run, flow2, tmp_path):
    steps = instructions()
    words = [word for word, _ in steps]
    said = dict(steps)
    assert said["FROM"] == "python:3.13-slim"
    packages = re.search(r"pip install (.*)", next(rest for word, rest in steps if word == "RUN"))
    assert {"aiohttp", "aiohttp-socks"} <= set(packages[1].split())
    assert said["USER"].split(":")[0] not in ("root", "0")
    assert words.index("USER") > max(i for i, word in enumerate(words) if word in ("RUN", "COPY"))
    assert (said["WORKDIR"], said["VOLUME"], said["EXPOSE"]) == ("/app", "/app/data", "8000")
    passed = (REPOSITORY / ".dockerignore").read_text("utf-8").splitlines()
    app = tmp_path / "app"
    (app / "data").mkdir(parents=True)
    for sources, target in (rest.rsplit(maxsplit=1) for word, rest in steps if word == "COPY"):
        (app / target).mkdir(exist_ok=True)
        for source in sources.split():
            assert f"!{source}" in passed
            shutil.copy(REPOSITORY / source, app / target)

    def mapped(rest):
        command = [part.replace("/app", str(app)) for part in json.loads(rest)]
        return [sys.executable if part == "python" else part for part in command]

    key = {"FLOW2API_GLOBAL_API_KEY": "sk-from-the-environment"}
    command = mapped(said["CMD"])
    command[1] = app / command[1]
    program = await flow2(*command[2:], script=command[1], **key)
    assert await listed(program.url, "sk-from-the-environment") == 200
    assert program.said("admin_password")
    assert (app / "data" / "flow2api.db").exists() and not (app / "config" / "data").exists()
    check = mapped(re.search(r"CMD (\[.*\])", said["HEALTHCHECK"])[1])
    port = {"FLOW2API_SERVER_PORT": program.url.rpartition(":")[2]}
    assert await (await run(*check, env=environment(**port))).end() == 0
    assert await program.stop() == 0
    assert await (await run(*check, env=environment(**port))).end() != 0


def test_the_compose_file_has_the_standard_mode_and_a_proxy_beside_it():
    text = (REPOSITORY / "docker-compose.yml").read_text("utf-8")
    body = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    names = re.findall(r"^  ([\w-]+):", body[: body.index("\nvolumes:")], re.MULTILINE)
    standard, through, warp = re.split(r"^  [\w-]+:", body, flags=re.MULTILINE)[1:4]
    assert names == ["flow2api", "flow2api-proxy", "warp"]
    for part in ("build: .", '"8000:8000"', "./config:/app/config", "./data:/app/data", "TZ="):
        assert part in standard
    assert "restart: unless-stopped" in standard and "profiles" not in standard
    variables = re.findall(r"(FLOW2API_\w+)=(\S+)", through)
    settings = flow2api.Settings()
    settings.read_environment(dict(variables))
    assert settings["proxy.proxy_enabled"] is True
    assert settings["proxy.proxy_url"] == "socks5://warp:1080" and not settings.warnings
    assert "profiles: [proxy]" in through and "profiles: [proxy]" in warp
    assert "ports:" not in warp


# ---- The demo ----


def parsed_curl(line):
    """-> (URL, headers, body) of a curl line."""
    words = iter(shlex.split(line)[1:])
    url, headers, data = "", {}, None
    for word in words:
        if word == "-H":
            name, _, text = next(words).partition(": ")
            headers[name] = text
        elif word == "-d":
            data = next(words)
        elif not word.startswith("-"):
            url = word
    return url, headers, data


async def test_the_demo_works_as_pasted_and_keeps_nothing(flow2, tmp_path):
    """In an empty folder, with flow2api.py alone."""
    folder, temporary = tmp_path / "empty", tmp_path / "temporary"
    folder.mkdir()
    temporary.mkdir()
    script = shutil.copy(REPOSITORY / "flow2api.py", folder)
    quick = {"FLOW2API_DEMO_VIDEO_SECONDS": "0.5", "TMPDIR": str(temporary)}
    program = await flow2("--demo", script=script, **quick)
    assert any("simulated Flow" in line for line in program.out)
    assert len(program.said("api_key")) >= 20 and len(program.said("admin_password")) >= 12
    url, headers, data = parsed_curl(program.curl)
    assert headers["Authorization"] == f"Bearer {program.said('api_key')}"
    async with aiohttp.ClientSession() as http, http.post(url, headers=headers, data=data) as reply:
        assert reply.status == 200
        text = await reply.text()
    assert text.endswith("data: [DONE]\n\n")
    assert await downloaded(KEPT_LINK.search(text)[0]) == "video/mp4"
    assert len(list(temporary.iterdir())) == 1
    assert await program.stop() == 0
    assert not list(temporary.iterdir())
    assert [path.name for path in folder.iterdir()] == ["flow2api.py"]
    kept = "\n".join(program.log)
    assert program.said("api_key") not in kept and program.said("admin_password") not in kept


async def test_the_curl_lines_of_the_readme_work_as_pasted(run, flow2, tmp_path):
    if not shutil.which("curl"):
        pytest.skip("curl is not installed: README's curl lines were NOT tried")
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    quick = {"FLOW2API_DEMO_VIDEO_SECONDS": "0.5", "FLOW2API_DEMO_IMAGE_SECONDS": "0"}
    program = await flow2("--demo", **quick)
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    options = {"cwd": tmp_path, "env": environment(KEY=program.said("api_key"), PATH=path)}

    async def pasted(block):
        text = block.replace("http://127.0.0.1:8000", program.url)
        done = await run("bash", "-euo", "pipefail", "-c", text, **options)
        assert await done.end() == 0, (block, done.log)
        return "\n".join(done.out)

    shutil.copy(REPOSITORY / "flow2api.py", tmp_path)
    [pictures] = bash_blocks("flow2api.picture")
    await pasted(pictures)
    blocks = bash_blocks("/v1/chat/completions")
    assert len(blocks) >= 10
    for block, out in zip(blocks, await asyncio.gather(*map(pasted, blocks)), strict=True):
        links = set(KEPT_LINK.findall(out))
        assert len(links) == (3 if '"n": 3' in block else 1), (block, out)
        kind = "image/png" if "banana" in block else "video/mp4"
        assert {await downloaded(link) for link in links} == {kind}
        assert ("[DONE]" in out) == ('"stream": true' in block)


async def test_the_python_lines_of_the_readme_work(run, flow2):
    pytest.importorskip("openai")
    [block] = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    program = await flow2("--demo", FLOW2API_DEMO_VIDEO_SECONDS="0.5")
    block = block.replace("http://127.0.0.1:8000", program.url)
    block = block.replace("the API key", program.said("api_key"))
    done = await run(sys.executable, "-c", block)
    assert await done.end() == 0, done.log
    assert await downloaded(KEPT_LINK.search("\n".join(done.out))[0]) == "video/mp4"


# ---- The first start, and the end ----


async def test_secrets_are_made_at_the_first_start_and_told_once(flow2, run, flow, tmp_path):
    """And README's lines for an account work with them."""
    demo, variables = flow
    del variables["FLOW2API_GLOBAL_API_KEY"]
    data = tmp_path / "data"
    program = await flow2("--data", data, **variables)
    key, password = program.said("api_key"), program.said("admin_password")
    assert len(key) >= 20 and len(password) >= 12
    assert await listed(program.url, key) == 200
    assert await listed(program.url, password) == 401
    assert password.encode() not in (data / "flow2api.db").read_bytes()
    assert stat.S_IMODE((data / "flow2api.db").stat().st_mode) == 0o600
    assert await program.stop() == 0
    told = "\n".join(program.log)
    program = await flow2("--data", data, **variables)
    told += "\n".join(program.out + program.log)
    assert not program.said("api_key") and not program.said("admin_password")
    assert key not in told and password not in told
    assert await listed(program.url, key) == 200
    if shutil.which("curl"):
        text = "".join(bash_blocks("/api/tokens")).replace("http://127.0.0.1:8000", program.url)
        text = text.replace("the admin password", password)
        text = text.replace("the session token", demo.account("one@example.com", PRO, 777))
        done = await run("bash", "-euo", "pipefail", "-c", text)
        assert await done.end() == 0, done.log
        out = "\n".join(done.out)
        assert "Token added" in out and "one@example.com" in out and "777" in out
        assert "Token deleted" in out
    else:
        words = {"username": "admin", "password": password}
        async with aiohttp.ClientSession() as http:
            assert (await http.post(program.url + "/api/login", json=words)).status == 200


async def test_a_first_start_on_a_taken_port_does_not_lose_the_secrets(flow2, run, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = ("--host", "127.0.0.1", "--port", taken.getsockname()[1])
        command = (sys.executable, REPOSITORY / "flow2api.py", "--data", tmp_path / "data")
        program = await run(*command, *address, env=environment())
        assert await program.end() == 2
        assert any("address already in use" in line for line in program.log)
    key = program.said("api_key")
    program = await flow2("--data", tmp_path / "data")
    assert await listed(program.url, key or program.said("api_key")) == 200


@pytest.mark.parametrize("arguments", [("--demo",), ()])
async def test_the_curl_line_works_with_a_key_of_ones_own(flow2, tmp_path, arguments):
    """Where the key isn't printed, the line takes it from the shell's variable."""
    own = {"FLOW2API_GLOBAL_API_KEY": "sk-of-my-own", "FLOW2API_GLOBAL_ADMIN_PASSWORD": "pw"}
    program = await flow2("--data", tmp_path / "data", *arguments, **own)
    quoted = re.search(r"""-H (["'])Authorization: Bearer (\S+)\1""", program.curl)
    assert quoted[2] == "sk-of-my-own" or (quoted[1] == '"' and quoted[2].startswith("$"))
    assert "sk-of-my-own" not in "\n".join(program.out + program.log) or arguments


async def test_sigterm_ends_a_stream_naming_its_job_which_goes_on(
    flow2, flow, tmp_path, monkeypatch
):
    demo, variables = flow
    st = demo.account("one@example.com", PRO, 1000)
    data = await with_account(tmp_path / "data", st)
    program = await flow2("--data", data, **variables)
    headers = {"Authorization": f"Bearer {variables['FLOW2API_GLOBAL_API_KEY']}"}
    body = chat_body("veo_3_1-fast", "a paper boat") | {"stream": True}
    async with aiohttp.ClientSession() as http:
        url = program.url + "/v1/chat/completions"
        async with http.post(url, headers=headers, json=body) as reply:
            job = reply.headers["X-Job-Id"]
            lines = []
            async for line in reply.content:
                lines.append(line.decode())
                if "generating" in lines[-1] and program.process.returncode is None:
                    program.process.send_signal(signal.SIGTERM)
    events = [line.removeprefix("data: ").strip() for line in lines if line.strip()]
    assert events[-1] == "[DONE]"
    error = json.loads(events[-2])["error"]
    assert error["code"] == "shutting_down" and job in error["message"]
    assert job in json.loads(events[-3])["choices"][0]["delta"]["content"]
    assert await program.end() == 0, program.log
    soon = flow2api.now() + 7200
    monkeypatch.setattr(flow2api, "now", lambda: soon)  # for the simulated Flow: its clips are done
    program = await flow2("--data", data, **variables)
    await until(lambda: any(f"{job} completed" in line for line in program.log), 30)
    assert await program.stop() == 0
    submits = [path for path, _ in demo.calls if "batchAsyncGenerateVideo" in path]
    assert len(submits) == 1


# ---- --check ----


async def checked(run, folder, data, variables, *arguments):
    """Runs --check -> (exit code, what it wrote)."""
    command = (sys.executable, REPOSITORY / "flow2api.py", "--check", "--data", data)
    program = await run(*command, *arguments, cwd=folder, env=environment(**variables))
    code = await program.end()
    return code, "\n".join(program.out + program.log)


async def test_check_finds_nothing_wrong_and_spends_nothing(run, flow, tmp_path):
    demo, variables = flow
    st = demo.account("somebody@example.com", PRO, 1000)
    data = await with_account(tmp_path / "data", st)
    code, text = await checked(run, tmp_path, data, variables)
    assert code == 0 and "WRONG" not in text, text
    assert "somebody@example.com" in text and "Pro, 1000 credits" in text
    assert "flow.poll_interval = 0.1  (environment)" in text
    assert "generation.video_timeout = 1500  (" in text
    assert variables["FLOW2API_GLOBAL_API_KEY"] not in text and st not in text
    paths = {path for path, _ in demo.calls}
    assert paths <= {"/fx/api/auth/session", "/v1/credits"}
    assert demo.accounts[st]["credits"] == 1000


def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(
    ("what", "code", "words"),
    [
        ("no account", 1, "WRONG no Google account yet: start Flow2API and add one"),
        ("dead session", 1, r"WRONG account somebody@example.com: .*Sign in to Flow again"),
        ("unreachable", 1, r"WRONG http://\S+ can't be reached .*check network and \[proxy\]"),
        ("bad setting", 2, r"_SERVER_PORT: server.port can't be 'seventy'; allowed: a whole"),
        ("unknown key", 1, r"WRONG setting.toml: unknown setting server.prot; ignored"),
        ("unknown model", 1, r"WRONG \[models\] bananas is unknown; there are .*nano_banana_2"),
        ("broken file", 2, r"setting.toml: Expected '\]' at the end of a table"),
        ("no folder", 1, r"WRONG data folder .*data: "),
        ("in use", 1, r"WRONG data folder .* is in use by another Flow2API"),
    ],
)
async def test_check_says_what_is_wrong_and_what_to_do(run, flow, tmp_path, what, code, words):
    demo, variables = flow
    data, arguments = tmp_path / "data", ()
    store = flow2api.Store(data)
    if what == "dead session":
        await with_account(data, "a session that ended")
    elif what == "unreachable":
        variables["FLOW2API_FLOW_LABS_BASE_URL"] = f"http://127.0.0.1:{closed_port()}/fx/api"
    elif what == "bad setting":
        variables["FLOW2API_SERVER_PORT"] = "seventy"
    elif what == "no folder":
        data.write_text("not a folder")
    elif what == "in use":
        store.open()
    elif what in ("unknown key", "unknown model", "broken file"):
        texts = {"unknown key": "[server]\nprot = 1", "broken file": "[server"}
        (tmp_path / "setting.toml").write_text(texts.get(what, '[models]\nbananas = "X"'))
        arguments = ("--config", tmp_path / "setting.toml")
    found = await checked(run, tmp_path, data, variables, *arguments)
    if what == "in use":
        store.close()
    assert found[0] == code and re.search(words, found[1]), found[1]
    assert "Traceback" not in found[1]
