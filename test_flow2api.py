"""What Flow2API promises, as tests: first the promises, then chapter by chapter.

Real sockets throughout: the gateway on a free loopback port, a simulated Flow as Google's side,
with faults switched on by a middleware in front of it. Nothing here needs the internet.
"""

import asyncio
import base64
import collections
import contextlib
import functools
import ipaddress
import itertools
import json
import logging
import os
import pathlib
import random
import re
import secrets
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

import admin_flow2api
import demo_flow2api
import flow2api

FREE, PRO, ULTRA = flow2api.TIERS
PNG = demo_flow2api.picture("an input", 64, 64)


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


SIZES = {"LANDSCAPE": (1376, 768), "PORTRAIT": (768, 1376), "SQUARE": (1024, 1024)}
SIZES |= {"LANDSCAPE_FOUR_THREE": (1200, 896), "PORTRAIT_THREE_FOUR": (896, 1200)}
UNSAFE = {"error": {"code": 3, "message": "PUBLIC_ERROR_UNSAFE_GENERATION"}}


class Medium(collections.namedtuple("Medium", "name kind prompt ratio ready project batch scene")):
    """Something that the simulated Flow has made, or is making until `ready`."""

    def state(self):
        refused = "FAILED" if "unsafe" in self.prompt else "SUCCESSFUL"
        return "MEDIA_GENERATION_STATUS_" + ("ACTIVE" if flow2api.now() < self.ready else refused)

    def file(self, scale=1):
        """A picture of its prompt; or the clip, with the prompt in a box that players skip."""
        text = f"{self.name} {self.prompt}"
        if self.kind == "image":
            return demo_flow2api.picture(text, *(side * scale for side in SIZES[self.ratio]))
        note = b"free" + text.encode()[:4000]
        return demo_flow2api.CLIP + (len(note) + 4).to_bytes(4) + note


class Flow:
    """Google's side on loopback: sessions, projects, credits, uploads, pictures, clips, upscaling,
    with keys, plans and prices. Its content policy refuses the word "unsafe". `replies`: "new"
    (2026) or "old" (2025). accounts: by session token. `calls`: what was asked."""

    def __init__(self, image_seconds=0.02, video_seconds=0.3, replies="new"):
        self.image_seconds, self.video_seconds, self.address = image_seconds, video_seconds, ""
        self.accounts, self.media = {}, {}
        self.replies, self.calls = replies, []

    def account(self, email, tier, credits):
        """Makes an account -> its session token."""
        st = secrets.token_urlsafe(150)
        self.accounts[st] = {"email": email, "tier": tier, "credits": credits, "at": ""}
        return st

    def routes(self):
        yield "GET", "/fx/api/auth/session", self.session
        yield "POST", "/fx/api/trpc/project.createProject", self.create_project
        yield "GET", "/fx/api/trpc/media.getMediaUrlRedirect", self.redirect
        yield "GET", "/fx/api/trpc/flow.projectInitialData", self.listing
        yield "GET", "/v1/credits", self.credits
        yield "POST", "/v1/flow/uploadImage", self.upload
        yield "POST", "/v1/projects/{project}/flowMedia:batchGenerateImages", self.images
        yield "POST", "/v1/flow/upsampleImage", self.upscale_image
        yield "POST", "/v1/video:batchCheckAsyncVideoGenerationStatus", self.status
        yield "POST", "/v1/video:batchAsyncGenerateVideo{mode}", self.videos
        yield "GET", "/media/{kind}/{name}", self.file

    async def start(self, *middlewares):
        app = web.Application(client_max_size=1 << 30, middlewares=middlewares)
        for method, path, handler in self.routes():
            app.router.add_route(method, path, functools.partial(self.answer, handler))
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.address = f"http://127.0.0.1:{runner.addresses[0][1]}"
        return runner

    async def answer(self, handler, request):
        """Finds whose call it is, by the cookie or by the access token."""
        body = await request.json() if request.body_exists else {}
        self.calls.append((request.path, body))
        cookie = request.headers.get("Cookie", "")
        at, st = flow2api.bearer(request), flow2api.clean_session_token(cookie)
        owners = [account for account in self.accounts.values() if at and account["at"] == at]
        account = owners[0] if owners else self.accounts.get(st, {})
        if not account and handler not in (self.session, self.file):
            return self.refuse(401, "CREDENTIALS_MISSING")
        reply = await handler(request, body, account)
        return reply if isinstance(reply, web.StreamResponse) else web.json_response(reply)

    def refuse(self, status, reason, message="Refused."):
        error = {"code": status, "message": message, "details": [{"reason": reason}]}
        return web.json_response({"error": error}, status=status)

    async def session(self, request, body, account):
        if not account:
            return {}
        account["at"] = f"ya29.{secrets.token_urlsafe(32)}"
        expires = flow2api.iso(flow2api.now() + 3600).replace("+00:00", ".000Z")
        user = {"name": account["email"].split("@")[0], "email": account["email"]}
        return {"user": user, "expires": expires, "access_token": account["at"]}

    async def create_project(self, request, body, account):
        project = {"projectId": str(uuid.uuid4())}
        return {"result": {"data": {"json": {"result": project, "status": 200}}}}

    async def listing(self, request, body, account):
        project = json.loads(request.query["input"])["json"]["projectId"]
        made = [medium for medium in self.media.values() if medium.project == project]
        ids = ({"primaryMediaId": medium.name, "batchId": medium.batch} for medium in made)
        flows = [{"name": m.scene, "metadata": next(ids)} for m in made]
        contents = {"workflows": flows, "media": list(map(self.medium, made))}
        return {"result": {"data": {"json": {"projectContents": contents, "status": 200}}}}

    async def redirect(self, request, body, account):
        if medium := self.media.get(request.query.get("name", "")):
            thumbnail = request.query.get("mediaUrlType") == "MEDIA_URL_TYPE_THUMBNAIL"
            raise web.HTTPTemporaryRedirect(self.url(medium, "image" if thumbnail else ""))
        return self.refuse(404, "", "NOT_FOUND")

    def url(self, medium, kind=""):
        end = int(flow2api.now()) + 18000
        return f"{self.address}/media/{kind or medium.kind}/{medium.name}?Expires={end}"

    async def credits(self, request, body, account):
        return {"credits": account["credits"], "userPaygateTier": account["tier"]}

    async def upload(self, request, body, account):
        return {"media": {"name": str(uuid.uuid4())}}

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

    def make(self, body, kind, project, name=""):
        made, batch = [], flow2api.dig(body, "mediaGenerationContext", "batchId")
        for wanted in body["requests"]:
            prompt = wanted.get("structuredPrompt") or flow2api.dig(
                wanted, "textInput", "structuredPrompt"
            )
            ratio = (wanted.get("imageAspectRatio") or wanted["aspectRatio"]).split("RATIO_")[1]
            ready = flow2api.now() + (self.video_seconds if kind == "video" else 0)
            new = name or (uuid.uuid4().hex if self.replies == "old" else str(uuid.uuid4()))
            text, scene = flow2api.dig(prompt, "parts", 0, "text"), str(uuid.uuid4())
            self.media[new] = Medium(new, kind, text, ratio, ready, project, batch, scene)
            made.append(self.media[new])
        return made

    async def images(self, request, body, account):
        if refused := self.charge(account, body["requests"]):
            return refused
        if "unsafe" in json.dumps(body):
            return self.refuse(400, "PUBLIC_ERROR_UNSAFE_GENERATION")
        await asyncio.sleep(self.image_seconds)
        made = self.make(body, "image", request.match_info["project"])
        return {"media": list(map(self.medium, made))}

    async def upscale_image(self, request, body, account):
        await asyncio.sleep(self.image_seconds)
        scale = 4 if body["targetResolution"].endswith("4K") else 2
        larger = self.media[body["mediaId"]].file(scale)
        return {"encodedImage": base64.b64encode(larger).decode()}

    async def videos(self, request, body, account):
        source = flow2api.dig(body, "requests", 0, "videoInput", "mediaId")
        if source and source not in self.media:
            return self.refuse(404, "", "Requested entity was not found.")
        if refused := self.charge(account, body["requests"]):
            return refused
        name = f"{source}_upsampled" if request.match_info["mode"] == "UpsampleVideo" else ""
        made = self.make(body, "video", body["clientContext"]["projectId"], name)
        return self.clips(made) | {"remainingCredits": account["credits"]}

    async def status(self, request, body, account):
        items = [*body.get("media", ()), *body.get("operations", ())]
        names = [item.get("name") or item["operation"]["name"] for item in items]
        if any(name not in self.media for name in names):
            return self.refuse(404, "", "Requested entity was not found.")
        return self.clips([self.media[name] for name in names])

    def clips(self, media):
        if self.replies == "old":
            return {"operations": list(map(self.operation, media))}
        return {"media": list(map(self.medium, media))}

    def medium(self, medium):
        status = {"mediaGenerationStatus": medium.state()}
        status |= UNSAFE if medium.state().endswith("FAILED") else {}
        made = {"fifeUrl": self.url(medium)} if medium.kind == "image" else {}
        ids = {"name": medium.name, "projectId": medium.project, "workflowId": medium.scene}
        made = {medium.kind: {f"generated{medium.kind.capitalize()}": made}}
        return ids | made | {"mediaMetadata": {"mediaStatus": status}}

    def operation(self, medium):
        name, state = {"name": medium.name}, medium.state()
        operation = name | (UNSAFE if state.endswith("FAILED") else {})
        if state.endswith("SUCCESSFUL"):
            operation["metadata"] = {**name, "video": {"fifeUrl": self.url(medium)}}
        return {"operation": operation, "sceneId": medium.scene, "status": state}

    async def file(self, request, body, account):
        """A file, whole or a range of it; of a clip under /image/ its thumbnail."""
        medium = self.media[request.match_info["name"]]
        data, kind = medium.file(), request.match_info["kind"]
        data = PNG if kind != medium.kind else data
        part, headers = request.http_range, {"Accept-Ranges": "bytes", "ETag": f'"{medium.name}"'}
        if part.start is None:
            return web.Response(body=data, content_type=flow2api.sniff(data)[0], headers=headers)
        start, end, _ = part.indices(len(data))
        if start >= end:
            return web.Response(status=416, headers={"Content-Range": f"bytes */{len(data)}"})
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        options = {"status": 206, "content_type": flow2api.sniff(data)[0], "headers": headers}
        return web.Response(body=data[start:end], **options)


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
    assert status in (known.status, 424 if known.status > 499 else 0)  # 424: a job was sent
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
    assert job.id in told(w, reply, "shutting_down")["message"] and reply[0] == 424
    assert reply[1]["x-should-retry"] == "false"
    await w.start_gateway()
    assert job.id in w.jobs.open
    again = await end_of(w, job.id)
    assert (again.state, len(again.done()), len(w.asked("AsyncGenerate"))) == ("completed", 1, 1)
    assert (w.data / "tmp" / again.outputs[0].file).read_bytes().startswith(demo_flow2api.CLIP)
    assert again.id in [known.id for known in w.store.jobs(states=["completed"])]


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
    ("task_not_found", None, ("GET", "/v1/videos/video_0123")),
    ("not_implemented", None, ("GET", "/v1/feed")),
    ("method_not_allowed", None, ("DELETE", "/v1/chat/completions")),
    ("request_too_large", None, (*POST, chat_body("veo_3_1", "boat" * 300_000))),
)


@pytest.mark.parametrize(("code", "param", "request_"), REFUSED)
async def test_a_request_at_fault_is_refused_before_anything_is_sent(world, code, param, request_):
    w = await world(**{"limits.body_mb": 1})
    w.demo.calls.clear()
    reply = await w.call(*request_)
    assert told(w, reply, code)["param"] == param
    assert "X-Job-Id" not in reply[1]
    assert ("x-should-retry" in reply[1]) is (code == "not_implemented")
    assert (list(w.demo.calls), w.jobs.open, w.store.jobs()) == ([], {}, [])


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


async def _task_not_completed(w):
    _, _, video = await w.call("POST", "/v1/videos", {"prompt": "a boat"})
    return await w.call("GET", f"/v1/videos/{video['id']}/content")


async def _content_not_found(w):
    w.fault = fault("/media/", refusal(404))
    return await w.call("POST", "/v1/images/generations", {"prompt": "a boat"})


async def _idempotency_conflict(w):
    options = {"headers": {"Idempotency-Key": "a key"}}
    await w.call("POST", "/v1/videos", {"prompt": "a boat"}, **options)
    return await w.call("POST", "/v1/videos", {"prompt": "a lake"}, **options)


async def _internal_error(w):
    async def broken(*arguments, **options):
        raise RuntimeError(f"{w.key} must not be told")

    w.jobs.create = broken
    return await w.chat()


async def _too_many_logins(w):
    for _ in range(admin_flow2api.GUESSES[0]):
        await w.call("POST", "/api/login", {"username": "admin", "password": "wrong"})
    status, headers, body = await w.call("POST", "/api/login", {})
    return status, headers, flow2api.GatewayError("too_many_logins", body["detail"]).body()


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
    "task_not_completed": ({"video_seconds": 600}, _task_not_completed),
    "content_not_found": ({}, _content_not_found),
    "idempotency_conflict": ({}, _idempotency_conflict),
    "internal_error": ({}, _internal_error),
    "too_many_logins": ({}, _too_many_logins),
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
PICTURES = [demo_flow2api.picture(f"input {number}", 16, 16) for number in range(7)]
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
        w.demo.media[name] = Medium(*details)
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
        (read,) = store.jobs(states=flow2api.OPEN, oldest_first=True)
        assert stored(read) == stored(job) == stored(store.job("video_1"))
        assert [stored(output) for output in read.outputs] == [stored(o) for o in outputs[::-1]]


async def test_ended_jobs_are_listed_newest_first_and_not_open(open_db):
    store = open_db()
    states = ["completed", "failed", "cancelled", "queued", "completed"]
    jobs = [flow2api.Job(id=f"j{i}", state=s, created_at=float(i)) for i, s in enumerate(states)]
    await store.put(*jobs)
    assert [job.id for job in store.jobs(states=["completed"])] == ["j4", "j0"]
    assert [job.id for job in store.jobs(states=flow2api.OPEN)] == ["j3"]
    assert store.job("none") is None


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


@pytest.mark.parametrize("version", range(1, len(flow2api.MIGRATIONS)))
async def test_a_database_of_an_earlier_version_is_taken_over(open_db, monkeypatch, version):
    plan = flow2api.resolve("veo_3_1-fast")
    job = flow2api.Job(id="video_1", state="running", plan=plan, prompt="a boat", token_id=1)
    made = flow2api.Output(job_id="video_1", name="a name")
    with monkeypatch.context() as earlier:
        earlier.setattr(flow2api, "MIGRATIONS", flow2api.MIGRATIONS[:version])
        store = open_db()
        await store.put(flow2api.Token(id=1, email="a"), job, made)
        assert store._rows("PRAGMA user_version")[0][0] == version
    store = open_db()
    (known,) = store.jobs(states=("running",))
    assert (known.row(), known.outputs[0].row()) == (job.row(), made.row())
    assert [token.email for token in store.tokens()] == ["a"]
    await store.put_rows(("keys", {"key": "k", "request": "r", "job_id": "x", "created_at": 1.0}))
    assert store.job_of_key("k", 0) == ("r", "x")


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


async def test_a_backup_of_a_running_gateway_is_whole(world, run, tmp_path):
    w = await world()
    job_id = (await w.chat())[1]["X-Job-Id"]
    copy = tmp_path / "elsewhere" / "flow2api.db"
    copy.parent.mkdir()
    command = (sys.executable, REPOSITORY / "flow2api.py", "--data", w.data, "--backup")
    done = await run(*command, copy)
    assert await done.end() == 0, done.log
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    store = flow2api.Store(copy.parent)
    store.open()
    assert store.job(job_id).row() == w.store.job(job_id).row()
    assert [token.row() for token in store.tokens()] == [token.row() for token in tokens_of(w)]
    store.close()
    before = copy.read_bytes()
    await w.stop_gateway()
    assert await (await run(*command, tmp_path / "stopped.db")).end() == 0
    await w.start_gateway()
    for given in (copy, tmp_path / "nowhere" / "copy.db"):  # nothing is overwritten
        done = await run(*command, given)
        assert await done.end() == 2 and "no copy of" in done.log[-1]
    done = await run(*command[:3], tmp_path / "empty", "--backup", tmp_path / "copy.db")
    assert await done.end() == 2 and copy.read_bytes() == before
    assert not (tmp_path / "empty").exists() and not (tmp_path / "copy.db").exists()


# ---- Chat requests ----


def picture_of(number):
    return demo_flow2api.picture(f"picture {number}", 16, 16)


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
    {"image": data_url(demo_flow2api.CLIP, "video/mp4")}, {"image": "http://"}, {"image": "http://[::1"},
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


async def test_a_clip_whose_address_is_none_is_completed_all_the_same(world, impatient):
    w = await world()
    odd = {"status": 307, "headers": {"Location": "http://["}}
    w.fault = fault("UrlRedirect", lambda request: web.Response(**odd))
    job_id = (await w.chat())[1]["X-Job-Id"]
    job = await w.jobs.get(job_id)
    assert job.state == "completed" and "kept at Flow" in job.notes[0]
    w.fault = None
    assert (await w.call("GET", f"/v1/videos/{job_id}/content"))[0] == 200


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


def spelled(path):
    """A request path for a route's pattern; it names no token and no job that there is."""
    path = path.replace(admin_flow2api.TOKEN, "999").replace("{id}", "nothing")
    return re.sub(r"\{\w+:([^}]*)\}", lambda match: re.sub(r"[^\w-].*", "", match[1]), path)


ADMIN_CALLS = sorted(
    (verb.replace("*", "GET"), spelled(path), role)
    for verbs, path, _, role in flow2api.ROUTES + admin_flow2api.ROUTES
    if path.startswith("/api/") or path == "/metrics"
    for verb in verbs.split()
)
CHANGES = [call[:2] for call in ADMIN_CALLS if call[0] in ("POST", "PUT")]


async def asker(w):
    """w.call with a session of the admin API."""
    return functools.partial(w.call, key=await w.admin())


def refused(reply, status=400):
    """An answer that the original's page can show -> its words."""
    found, _, body = reply
    assert (found, body["success"], type(body["detail"])) == (status, False, str), reply
    assert body["detail"] == body["message"] and body["detail"].strip()
    return body["detail"]


async def test_every_admin_route_is_closed_to_all_but_the_admin(world):
    w = await world()
    assert len(ADMIN_CALLS) > 60
    for method, path, role in ADMIN_CALLS:
        if path in ("/api/events", "/api/login"):
            continue  # an endless answer; a door without a lock
        session = await w.admin()
        cookie = {"Cookie": f"flow2api_session={session}", "Authorization": ""}
        foreign = cookie | {"Sec-Fetch-Site": "same-site"}  # another page of this host sent it
        closed = ["", "none", session[:-1], session.upper(), "admin-"] + [w.key] * (role == "admin")
        for key in closed:
            headers = {"Authorization": f"Bearer {key}" * bool(key)}
            status, _, body = await w.call(method, path, headers=headers)
            assert (status, "detail" in body) == (401, path != "/metrics"), (method, path, key)
        assert (await w.call(method, path, headers=foreign))[0] == 401, path
        if role != "public":
            assert (await w.call(method, path, headers=cookie))[0] != 401, path
            session = await w.admin()
            assert (await w.call(method, path, key=session))[0] not in (401, 500), path
    assert (await w.call("GET", "/metrics", key=w.key))[0] == 200


JUNK_BODIES = (b"", b"{", b"[]", b"null", b"5", b'"x"', b"\xff", b"[" * 9999, b'{"a":NaN}')
JUNK_FIELDS = (
    "st session_token tokens username password old_password new_password new_api_key is_active"
    " enabled proxy_enabled proxy_url timeout base_url image_timeout error_ban_threshold remark"
    " image_concurrency project_id connection_token global.api_key server.port plan"
)
JUNK_VALUES = ({}, [[]], "\0", "\ud83d", -1, 10**30, 1.5, True, ["x", 5, None, {}], "…", "x" * 5000)


@pytest.mark.parametrize(("method", "path"), CHANGES)
async def test_junk_in_an_admin_request_is_no_bug_of_ours(world, method, path):
    w = await world()
    path, plugin = path.replace("999", str(only(w).id)), "plugin/update" in path
    w.live.put("file", "plugin.connection_token", "connection token", "test")
    bodies = [json.dumps(dict.fromkeys(JUNK_FIELDS.split(), value)) for value in JUNK_VALUES]
    for body in (*JUNK_BODIES, *(body.encode() for body in bodies)):
        w.gateway.guesses.clear()
        key = w.live["plugin.connection_token"] if plugin else await w.admin()
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        async with w.http.request(method, w.url + path, data=body, headers=headers) as reply:
            answer = await reply.json()
            assert reply.status != 500, (path, body, answer)
            assert answer["success"] or type(answer["detail"]) is str, (path, body)
    for path in ("/api/tokens", "/api/settings", "/api/jobs", "/api/logs", "/api/admin/config"):
        assert (await w.call("GET", path, key=await w.admin()))[0] == 200  # nothing was poisoned


# What the original's page sends and reads (contract.md B.2): types, or a value.
OBJECT = {"success": True, "message": str}
STATS = "total_tokens active_tokens today_images total_images today_videos total_videos"
STATS = dict.fromkeys([*STATS.split(), "today_errors", "total_errors"], int)
TOKEN_BODY = {"st": "ST", "remark": None, "project_id": None, "project_name": None}
TOKEN_BODY |= {"image_enabled": True, "video_enabled": True}
TOKEN_BODY |= {"image_concurrency": -1, "video_concurrency": 2}
PAGE_CALLS = (
    ("GET", "stats", None, STATS),
    ("POST", "tokens/ID/refresh-credits", None, {"success": True, "credits": 1000}),
    ("POST", "tokens/ID/refresh-at", None, {"success": True, "token": dict}),
    ("PUT", "tokens/ID", TOKEN_BODY, OBJECT),
    ("POST", "tokens/st2at", {"st": "ST"}, OBJECT | {"access_token": str, "expires": str}),
    ("POST", "tokens", TOKEN_BODY | {"st": "NEW"}, OBJECT | {"token": dict}),
    ("POST", "tokens/ID/test", None, {"success": True, "status": "success", "email": str}),
    ("POST", "tokens/ID/disable", None, OBJECT),
    ("POST", "tokens/ID/enable", None, OBJECT),
    ("PUT", "tokens/ID/status", {"is_active": True}, OBJECT),
    ("POST", "tokens/import", {"tokens": [{"session_token": "ST"}]}, {"added": 0, "updated": 1}),
    ("POST", "admin/config", {"error_ban_threshold": 5}, OBJECT),
    ("POST", "admin/debug", {"enabled": True}, OBJECT | {"enabled": True}),
    ("GET", "admin/config", None, {"error_ban_threshold": 5, "admin_username": "admin"}),
    ("GET", "admin/config", None, {"api_key": "sk-test-0123456789", "debug_enabled": True}),
    ("POST", "proxy/config", {"proxy_enabled": False, "proxy_url": "http://x:1"}, OBJECT),
    ("GET", "proxy/config", None, {"proxy_enabled": False, "proxy_url": "http://x:1"}),
    ("POST", "cache/enabled", {"enabled": True}, OBJECT),
    ("POST", "cache/config", {"timeout": 600}, OBJECT),
    ("POST", "cache/base-url", {"base_url": "https://me.example"}, OBJECT),
    ("POST", "cache/base-url", {"base_url": ""}, OBJECT),
    ("GET", "cache/config", None, {"success": True, "enabled": True, "timeout": 600}),
    ("GET", "cache/config", None, {"base_url": "", "effective_base_url": str}),
    ("POST", "generation/timeout", {"image_timeout": 61, "video_timeout": 62}, OBJECT),
    ("GET", "generation/timeout", None, {"success": True, "video_timeout": 62, "config": dict}),
    ("POST", "token-refresh/enabled", {"enabled": False}, OBJECT),
    ("GET", "token-refresh/config", None, {"at_auto_refresh_enabled": False, "interval": 3600}),
    ("POST", "admin/apikey", {"new_api_key": "sk-another"}, OBJECT),
    ("GET", "config/proxy", None, {"enabled": False, "proxy_url": "http://x:1"}),
    ("GET", "config/generation", None, {"image_timeout": 61, "video_timeout": 62}),
    ("GET", "system/info", None, {"success": True, "info": dict, "version": str}),
    ("DELETE", "tokens/ID", None, OBJECT),
    (
        "POST",
        "admin/password",
        {"old_password": "a test password", "new_password": "x" * 8},
        OBJECT,
    ),
)


async def test_the_original_page_finds_all_that_it_reads(world):
    w = await world()
    ask, number, st = await asker(w), str(only(w).id), only(w).st
    new = w.demo.account("new@example.com", ULTRA, 7)
    for method, path, body, wanted in PAGE_CALLS:
        text = json.dumps(body).replace('"ST"', f'"{st}"').replace('"NEW"', f'"{new}"')
        status, _, answer = await ask(
            method, f"/api/{path.replace('ID', number)}", json.loads(text)
        )
        assert status == 200, (path, answer)
        for name, value in wanted.items():
            wrapped = answer.get("config", {})
            for found in (answer[name], wrapped.get(name, answer[name])):
                assert value in (found, type(found)), (path, name)
    refused(await ask("GET", "/api/stats"), 401)  # the new password ended the session
    assert (await w.call("GET", "/v1/models"))[0] == 401
    assert (await w.call("GET", "/v1/models", key="sk-another"))[0] == 200


async def test_the_log_is_as_the_original_page_reads_it(world):
    w = await world()
    ask = await asker(w)
    await w.chat("nano_banana_pro", "A" * 300)
    await w.chat("nano_banana_pro", "unsafe")
    status, _, (bad, good) = await ask("GET", "/api/logs?limit=2")
    assert (status, good["status_code"], bad["status_code"]) == (200, 200, 400)
    for row in (bad, good):
        assert row["token_email"] == "user1@example.com" and type(row["duration"]) is float
        assert row["operation"] == "generate_image" and row["task_id"] == row["id"]
        assert time.strptime(row["created_at"], "%Y-%m-%d %H:%M:%S")
        assert (await ask("GET", f"/api/logs/{row['id']}"))[2] == row
    assert ("A" * 200 in str(good), "…" in good["request_body"]) == (False, True)
    assert "/tmp/" in good["response_body"] and "UNSAFE" in bad["response_body"]
    assert len((await ask("GET", "/api/logs?limit=1"))[2]) == 1
    assert (await ask("DELETE", "/api/logs"))[0] == 200
    assert (await ask("GET", "/api/logs"))[2] == [] != w.store.jobs()


# A setting by any of its ways: path, a good value, bad ones. What is wrong is not stored.
BAD_SETTINGS = (
    ("proxy/config", "proxy_url", "socks5://u:p@x:1", ("javascript:alert(1)", "http://x:99999", 5)),
    ("proxy/config", "proxy_enabled", True, ("yes", 2, [], {})),
    ("config/proxy", "enabled", True, ("yes", 2)),
    ("config/generation", "image_timeout", 90, (0, -1, "abc", 1.5, True, 10**9)),
    ("generation/timeout", "video_timeout", 90, (0, -1, "abc", [])),
    ("cache/config", "timeout", 90, (-1, "abc", {}, 10**9)),
    ("cache/enabled", "enabled", True, ("yes", 5)),
    ("cache/base-url", "base_url", "https://me.example", ("ftp://x", "javascript:alert(1)", 5)),
    ("token-refresh/enabled", "enabled", False, ("no", 5)),
    ("token-refresh/config", "interval", 120, (1, "x")),
    ("admin/config", "error_ban_threshold", 9, (0, -1, "x")),
    ("admin/apikey", "new_api_key", "sk-0000", ("", "12345", "ключ-ключ", "with a blank", 5)),
    ("admin/debug", "enabled", True, ("x", 5)),
    ("plugin/config", "connection_token", "t" * 16, ("short", "with a blank in it", 5)),
    ("plugin/config", "auto_enable_on_update", False, ("x", 5)),
    ("settings", "flow.poll_interval", 0.5, (0, "x", 1e9, [])),
    ("settings", "chat.video_content", "html", ("x", 5)),
    ("settings", "global.admin_username", "root", (" ", "", 5)),
    ("settings", "flow.api_base_url", "http://127.0.0.1:9", ("", "x", 5)),
    ("settings", "global.admin_password", None, ("a new password",)),
    ("settings", "server.data_dir", None, ("/elsewhere",)),
    ("settings", "no.such", None, (1,)),
)


def in_force(w):
    return {name: w.live[name] for name in flow2api.SETTING}


async def test_settings_are_refused_or_stored_and_survive_a_restart(world):
    w = await world()
    for path, field, good, wrong in BAD_SETTINGS:
        ask, before = await asker(w), in_force(w)
        for value in wrong:
            refused(await ask("POST", f"/api/{path}", {field: value}))
        assert (await ask("POST", f"/api/{path}", {"nothing": 1}))[0] == 400
        assert (in_force(w), w.store.settings().keys()) == (before, {"sessions"}), (path, field)
        if good is None:
            continue
        assert (await ask("POST", f"/api/{path}", {field: good}))[0] == 200
        (name,) = [name for name, value in in_force(w).items() if value != before[name]]
        assert w.live[name] == good
        shown = (await ask("GET", f"/api/{path}"))[2]
        assert path == "settings" or shown[field] == shown["config"][field] == good
        await w.stop_gateway()
        await w.start_gateway()  # with what the file says, as a new process
        assert w.live[name] == good
        assert (await ask("GET", "/api/stats"))[0] == 200  # the session is still good
        assert (await ask("POST", "/api/settings", {name: None}))[0] == 200
        assert in_force(w) == before
        await w.store.delete(("settings", "name", f"admin page:{name}"))
    assert (await ask("POST", "/api/cache/config", {"enabled": None, "timeout": None}))[0] == 200
    w.live.put("environment", "cache.timeout", 99, "test")
    words = refused(await ask("POST", "/api/cache/config", {"timeout": 5, "enabled": True}), 409)
    assert "environment" in words and in_force(w) == before | {"cache.timeout": 99}


async def test_switches_and_limits_take_effect_at_once(world, impatient, caplog):
    w = await world()
    ask = await asker(w)

    async def sets(path, **body):
        assert (await ask("POST", f"/api/{path}", body))[0] == 200

    await sets("cache/config", enabled=True, base_url="https://me.example/x/")
    (link,) = links_in(content(await w.chat("nano_banana_pro")))
    assert link.startswith("https://me.example/x/tmp/")
    assert (await ask("GET", "/api/system/info"))[2]["info"]["cache_bytes"] > 100
    assert (await ask("DELETE", "/api/cache"))[2]["cache_bytes"] == 0
    await sets("generation/timeout", video_timeout=1)
    w.demo.video_seconds = 60
    told(w, await w.chat(), "generation_timeout")
    await sets("admin/config", error_ban_threshold=1)
    w.fault = fault(PAID, refusal(403))
    await w.chat("nano_banana_pro")
    w.fault = None
    assert not only(w).is_active and only(w).failures == 1
    await sets(f"tokens/{only(w).id}/enable")
    assert (only(w).is_active, only(w).failures, only(w).paused_until) == (True, 0, 0)
    await sets("admin/apikey", new_api_key="sk-another")
    told(w, await w.chat(), "invalid_api_key")
    w.key = "sk-another"
    await sets("proxy/config", proxy_enabled=True, proxy_url="http://user:canary@127.0.0.1:9")
    assert (await w.chat("nano_banana_pro"))[0] == 502
    found = await ask("POST", "/api/proxy/test", {})
    assert "canary" not in f"{refused(found, 502)}{caplog.text}"
    await sets("proxy/config", proxy_enabled=False, proxy_url="")
    assert (await ask("POST", "/api/proxy/test", {}))[2]["status_code"] == 404
    refused(await ask("POST", "/api/proxy/test", {"proxy_url": "ftp://x"}))
    caplog.set_level(logging.INFO)
    for enabled in (True, False):
        caplog.clear()
        await sets("admin/debug", enabled=enabled)
        await w.chat("nano_banana_pro")
        assert ("batchGenerateImages" in caplog.text) == enabled
        assert not [secret for secret in secrets_of(w) if secret in caplog.text]
    await sets("token-refresh/enabled", enabled=False)
    only(w).checked_at = 0
    w.demo.calls.clear()
    for _ in range(5):
        await asyncio.sleep(0.02)
    assert not w.demo.calls
    await sets("token-refresh/enabled", enabled=True)
    await until(lambda: w.demo.calls)


async def test_an_edit_of_a_token_asks_google_nothing_and_clears_what_is_empty(world):
    w = await world()
    ask, token = await asker(w), only(w)
    path, before = f"/api/tokens/{token.id}", admin_flow2api.token_object(token)
    w.demo.calls.clear()
    edit = {"remark": "mine", "proxy_url": "http://u:p@x:1", "image_concurrency": 3}
    edit |= {"video_enabled": False, "is_active": False, "project_name": "Boats"}
    masked = {"st": admin_flow2api.mask(token.st), "proxy_url": "http://…@x:1", "remark": None}
    for body, changes in (
        (edit, edit | {"current_project_name": "Boats"}),
        (masked | {"st": ""}, {}),
        (masked, {}),
        (dict.fromkeys(admin_flow2api.TOKEN_FIELDS) | {"st": token.st}, {}),
        ({"remark": "", "proxy_url": "", "project_id": ""}, {"remark": "", "proxy_url": ""}),
    ):
        assert (await ask("PUT", path, body))[0] == 200
        before |= {name: value for name, value in changes.items() if name in before}
        before["current_project_id"] = token.project_id or None
        assert admin_flow2api.token_object(token) == before, body
    assert admin_flow2api.token_object(w.store.tokens()[0]) == before
    for body in BAD_TOKENS[5:] + BAD_PROXIES + ({"image_concurrency": -2}, {"use_count": 10**30}):
        refused(await ask("PUT", path, body))
    assert (list(w.demo.calls), admin_flow2api.token_object(token)) == ([], before)
    other = w.demo.account("other@example.com", PRO, 5)
    assert "other@example.com" in refused(await ask("PUT", path, {"st": other}), 409)
    new = w.demo.account(token.email, PRO, 5)
    assert (await ask("PUT", path, {"st": new}))[0] == 200
    assert (token.st, token.is_active, token.email) == (new, True, "user1@example.com")
    refused(await ask("PUT", path, {"st": "dead"}), 503)
    await w.pool.update(token, is_active=False, failures=2, reason="refused")
    assert (await ask("PUT", path + "/status", {"is_active": True}))[0] == 200
    assert (token.st, token.is_active, token.failures, token.reason) == (new, True, 0, "")


async def test_what_is_exported_is_imported_without_loss(world):
    w = await world(((PRO, 1000), (ULTRA, 500), (FREE, 50)))
    ask = await asker(w)
    edit = {"remark": "ключ", "video_enabled": False, "image_concurrency": 2, "is_active": False}
    await w.chat("nano_banana_pro")
    await ask("PUT", "/api/tokens/1", edit)
    rows = (await ask("GET", "/api/tokens"))[2]
    made_anew = {"id", "at", "token", "at_expires", "created_at"}
    names = {name for kinds in TOKEN_TYPES.values() for name in kinds.split()} - made_anew
    shown = [{name: row[name] for name in names} for row in rows]
    for again in (False, True):
        for token in [] if again else list(w.pool.tokens.values()):
            assert (await ask("DELETE", f"/api/tokens/{token.id}"))[0] == 200
        body = {"tokens": [*reversed(rows), 5, None, {}, {"st": "dead", "email": "d@x"}]}
        status, _, told_ = await ask("POST", "/api/tokens/import", body)
        assert (status, told_["added"], told_["updated"]) == (200, 3 * (not again), 3 * again)
        assert len(told_["errors"]) == told_["failed"] == 4 and "d@x: " in told_["errors"][3]
        found = (await ask("GET", "/api/tokens"))[2]
        assert [{name: row[name] for name in names} for row in found] == shown
    few = [{"session_token": row["st"], "proxy_url": "http://u:p@x:1"} for row in rows]
    await ask("POST", "/api/tokens/import", {"tokens": few})  # what is not named stays
    found = [[row["remark"], row["proxy_url"]] for row in (await ask("GET", "/api/tokens"))[2]]
    assert found == [[remark, "http://u:p@x:1"] for remark in ("", "", "ключ")]
    await ask("POST", "/api/tokens/import", {"tokens": [row | {"proxy_url": ""} for row in few]})
    refused(await ask("POST", "/api/tokens/import", {"tokens": "x"}))
    given = {"tokens": [rows[0]["st"], w.demo.account("new@example.com", PRO, 1)]}
    body = (await ask("POST", "/api/tokens/batch-add", given))[2]
    assert [row["status"] for row in body["details"]] == ["updated", "added"]
    assert body["details"][1]["token_id"] == 7  # an id is never given twice


async def test_all_accounts_at_once(world):
    w = await world(((PRO, 1), (PRO, 1), (PRO, 1)))
    ask, (one, two, _) = await asker(w), w.pool.tokens.values()

    async def batch(what, method="POST"):
        status, _, body = await ask(method, f"/api/tokens/batch-{what}")
        found = {name: body[name] for name in body if type(body[name]) is int and body[name]}
        return status, found, [token.is_active for token in w.pool.tokens.values()]

    await w.pool.update(one, is_active=False)
    del w.demo.accounts[two.st]
    two.at = ""
    found = {"valid": 1, "invalid": 1, "auto_disabled": 1}
    assert await batch("test") == (200, found, [False, False, True])
    found = {"valid": 2, "invalid": 1, "auto_enabled": 1}
    assert await batch("test?only_active=false") == (200, found, [True, False, True])
    assert await batch("test?only_disabled=true") == (200, {"invalid": 1}, [True, False, True])
    refused(await ask("POST", "/api/tokens/batch-test?only_active=x"))
    assert await batch("enable") == (200, {"enabled": 3}, [True] * 3)
    await ask("PUT", "/api/tokens/1/status", {"is_active": False})
    one.busy["video"] = 1  # while its jobs are under way it stays
    assert await batch("delete-disabled", "DELETE") == (200, {}, [False, True, True])
    one.busy.clear()
    assert await batch("delete-disabled", "DELETE") == (200, {"deleted": 1}, [True] * 2)
    assert await batch("disable") == (200, {"disabled": 2}, [False] * 2)
    assert len(w.store.tokens()) == 2


ABSENT = """501 POST tokens/rt2at tokens/batch-activate tokens/batch-activate-username
501 POST tokens/1/sora2/activate?invite_code=ABCDEF tokens/1/activate-username
501 GET watermark-free/config cloudflare/config cloudflare/state characters characters/by-token/1
404 PUT tokens/999 tokens/999/status
404 POST tokens/999/test tokens/999/enable tokens/999/refresh-at tokens/x/test jobs/x/cancel
404 DELETE tokens/999 tokens/99999999999999999999 jobs/video_x
404 GET logs/x jobs/video_x jobs?after=x nothing
400 GET jobs?limit=x&token_id=x jobs?limit=0 jobs?state=x jobs?token_id=x logs?limit=x logs?limit=-1
405 DELETE stats tokens
"""


async def test_what_is_not_there_is_told_in_a_way_that_the_page_shows(world):
    w = await world()
    ask = await asker(w)
    for status, method, *paths in map(str.split, ABSENT.splitlines()):
        for path in paths:
            refused(await ask(method, f"/api/{path}", {}), int(status))


async def test_jobs_are_listed_cancelled_and_deleted(world):
    w = await world()
    ask = await asker(w)
    await w.chat("nano_banana_pro")
    told(w, await w.chat(text="unsafe"), "content_policy_violation")
    only(w).paused_until = flow2api.now() + 30
    _, _, video = await w.call("POST", "/v1/videos", {"prompt": "a boat"})

    async def listed(query=""):
        status, _, body = await ask("GET", f"/api/jobs?{query}")
        return [(job["kind"], job["state"]) for job in body["jobs"]], body["has_more"], body["jobs"]

    rows, more, jobs = await listed()
    queued, failed, made = [("video", "queued")], [("video", "failed")], [("image", "completed")]
    assert (rows, more) == (queued + failed + made, False)
    for query, wanted in (
        ("state=queued", queued), ("model=nano_banana_pro", made), ("token_id=1", failed + made),
        ("limit=1", queued), (f"limit=2&after={jobs[0]['id']}", failed + made), ("model=x", []),
    ):  # fmt: skip
        assert (await listed(query))[:2] == (wanted, query == "limit=1"), query
    assert jobs[2]["account"] == "user1@example.com" and jobs[2]["urls"] and jobs[2]["cost"] == 0
    path = f"/api/jobs/{video['id']}"
    status, _, body = await ask("POST", path + "/cancel")
    assert (status, body["job"]["state"], w.pool.waiting) == (200, "cancelled", {})
    lasted = (await ask("GET", path))[2]["job"]["duration"]
    await asyncio.sleep(0.02)
    assert (await ask("GET", path))[2]["job"]["duration"] == lasted < 5
    refused(await ask("POST", f"/api/jobs/{jobs[1]['id']}/cancel"), 409)
    only(w).paused_until = 0
    client = asyncio.create_task(w.chat())
    (job,) = await running(w)
    for method, end in (("POST", "/cancel"), ("DELETE", "")):
        assert "running" in refused(await ask(method, f"/api/jobs/{job.id}{end}"), 409)
    assert content(await client)
    for job in (await listed())[2]:
        assert (await ask("DELETE", f"/api/jobs/{job['id']}"))[0] == 200
    assert w.store.jobs() == []


async def test_no_masked_answer_holds_a_secret(world):
    w = await world()
    ask = await asker(w)
    await w.pool.update(only(w), proxy_url="http://user:canary@127.0.0.1:9")
    token = "connection-canary"
    await ask("POST", "/api/plugin/config", {"connection_token": token})
    await ask("POST", "/api/proxy/config", {"proxy_url": "http://user:canary@x:1"})
    assert token in str((await ask("GET", "/api/plugin/config"))[2])
    assert only(w).st in str((await ask("GET", "/api/tokens"))[2])
    assert w.key in str((await ask("GET", "/api/admin/config"))[2])
    known = [*secrets_of(w), "canary", w.live["global.admin_password"]]
    for method, path, _ in ADMIN_CALLS:
        if method == "GET" and path != "/api/events":
            status, headers, body = await ask("GET", f"{path}?mask=1")
            assert not [secret for secret in known if secret in f"{headers}{body}"], path
    before = in_force(w)
    for path in ("plugin/config", "proxy/config", "admin/config"):  # as it was shown, sent back
        body = (await ask("GET", f"/api/{path}?mask=1"))[2]["config"]
        assert "…" in str(body)
        assert (await ask("POST", f"/api/{path}", body))[0] == 200
    assert in_force(w) == before
    rows = (await ask("GET", "/api/settings"))[2]["settings"]
    rows = {row["name"]: row for row in rows}
    assert rows["global.api_key"]["value"].count("…") == 1
    assert rows["cache.timeout"] | {"help": ""} == {
        "name": "cache.timeout", "value": 7200, "default": 7200, "low": 0, "high": 31536000,
        "choices": [], "source": "default", "help": "",
    }  # fmt: skip
    stored = b"".join(path.read_bytes() for path in w.data.glob("flow2api.db*"))
    assert ask.keywords["key"].encode() not in stored


async def test_guessing_is_slowed_per_address_and_in_total(world, clock):
    w = await world()
    good = {"username": "admin", "password": w.password}
    for _ in range(9):
        refused(await w.call("POST", "/api/login", good | {"password": "x"}), 401)
    ask = await asker(w)  # a login that succeeds forgets the failures before it
    wrong = {"old_password": "x", "new_password": "12345678"}
    for _ in range(10):
        refused(await ask("POST", "/api/admin/password", wrong))
    for path, body in (("login", good), ("admin/login", good), ("admin/password", wrong)):
        status, headers, body = await ask("POST", f"/api/{path}", body)
        assert (status, headers["Retry-After"]) == (429, "900") and "quarter" in body["detail"]
    assert (await ask("GET", "/api/stats"))[0] == 200
    clock.ahead = 901
    assert (await w.call("POST", "/api/login", good))[0] == 200
    w.gateway.guesses = [(flow2api.now(), f"10.0.0.{n}") for n in range(100)]
    refused(await w.call("POST", "/api/login", good), 429)
    clock.ahead *= 2
    many = [w.call("POST", "/api/login", good | {"password": "x"}) for _ in range(20)]
    assert sorted(reply[0] for reply in await asyncio.gather(*many)) == [401] * 10 + [429] * 10


async def test_a_session_lasts_while_it_is_used_and_ends_with_logout_or_password(world, clock):
    w = await world()
    one, two, three = [await asker(w) for _ in range(3)]
    for days in (6, 12, 18):
        clock.ahead = days * 86400
        assert (await one("GET", "/api/stats"))[0] == 200
    refused(await two("GET", "/api/stats"), 401)  # unused for seven days
    two = await asker(w)
    for end in ("/api/logout", "/api/admin/logout"):
        out = await asker(w)
        assert (await out("POST", end))[2]["success"] is True
        refused(await out("GET", "/api/stats"), 401)
    words = {"old_password": w.password, "new_password": "another one", "username": "root"}
    refused(await two("POST", "/api/admin/password", words | {"old_password": "x"}))
    for new in ("short", "", None, 12345678):
        refused(await two("POST", "/api/admin/password", words | {"new_password": new}))
    assert (await two("POST", "/api/admin/change-password", words))[0] == 200
    for ask in (one, two, three):
        refused(await ask("GET", "/api/stats"), 401)
    await w.stop_gateway()
    await w.start_gateway()
    refused(await w.call("POST", "/api/login", {"username": "root", "password": w.password}), 401)
    words = {"username": "root", "password": "another one"}
    status, headers, _ = await w.call("POST", "/api/login", words)
    assert status == 200 and {"HttpOnly", "SameSite=Strict", "Path=/"} <= set(
        headers["Set-Cookie"].split("; ")
    )
    assert w.live["global.admin_password"].startswith("scrypt$")


async def test_events_tell_changes_until_the_session_ends(world):
    w = await world()
    ask = await asker(w)
    headers = {"Authorization": f"Bearer {ask.keywords['key']}"}
    async with w.http.get(w.url + "/api/events", headers=headers) as reply:
        assert reply.content_type == "text/event-stream"

        async def event(name, wanted):
            async with asyncio.timeout(10):
                async for line in reply.content:
                    if line == f"event: {name}\n".encode():
                        data = json.loads((await reply.content.readline()).removeprefix(b"data: "))
                        assert only(w).st not in str(data)
                        if wanted in json.dumps(data[name]):
                            return

        await event("tokens", '"remark": ""')
        await event("stats", '"total_tokens": 1')
        await ask("PUT", f"/api/tokens/{only(w).id}", {"remark": "a canary"})
        await event("tokens", "a canary")
        w.demo.video_seconds = 2
        client = asyncio.create_task(w.chat(text="a red boat"))
        await event("jobs", "a red boat")
        await event("stats", '"total_videos": 1')
        assert content(await client)
        await ask("POST", "/api/logout")
        async with asyncio.timeout(10):
            await reply.content.read()


async def test_the_extension_brings_sessions_with_its_own_key(world):
    w = await world()
    ask, path = await asker(w), "/api/plugin/update-token"
    st, key = w.demo.account("new@example.com", PRO, 5), "k" * 16
    refused(await w.call("POST", path, {"session_token": st}, key="x"), 401)
    refused(await w.call("POST", path, {"session_token": st}, headers={"Authorization": ""}), 401)
    shown = (await ask("POST", "/api/plugin/config", {"connection_token": key}))[2]
    assert (shown["connection_token"], shown["connection_url"]) == (key, w.url + path)

    async def brings(session_token):
        status, _, body = await w.call("POST", path, {"session_token": session_token}, key=key)
        return status, body.get("action"), body.get("auto_enabled"), w.pool.tokens[2].is_active

    assert await brings(st) == (200, "added", False, True)
    await ask("POST", "/api/tokens/2/disable")
    assert await brings(st) == (200, "updated", True, True)
    await ask("POST", "/api/tokens/2/disable")
    await ask("POST", "/api/plugin/config", {"auto_enable_on_update": False})
    assert await brings(w.demo.account("new@example.com", PRO, 5)) == (200, "updated", False, False)
    assert (await w.call("POST", path, {}, key=key))[0] == 400
    for closed in ("/api/tokens", "/v1/models"):
        assert (await w.call("GET", closed, key=key))[0] == 401
    await ask("POST", "/api/plugin/config", {"connection_token": ""})
    refused(await w.call("POST", path, {"session_token": st}, key=key), 401)


async def test_metrics_are_in_the_format_of_prometheus(world):
    w = await world()
    await w.chat("nano_banana_pro")
    status, headers, body = await w.call("GET", "/metrics")
    assert (status, headers["Content-Type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    lines = body.decode().splitlines()
    assert all(re.fullmatch(r'flow2api_\w+(\{\w+="\w+"\})? \d+', line) for line in lines)
    assert {"flow2api_total_images 1", "flow2api_credits 1000"} <= set(lines)
    assert 'flow2api_jobs{state="running"} 0' in lines


async def test_of_the_page_only_its_own_code_may_run(world):
    w = await world()
    for path in ("/", "/login", "/manage"):
        _, headers, body = await w.call("GET", path, key="none")
        policy = headers["Content-Security-Policy"]
        found = re.findall(rb"<(script|style)>(.*?)</\1>", body, re.DOTALL)
        for tag, code in found:
            known = base64.b64encode(flow2api.hashlib.sha256(code).digest()).decode()
            assert f"; {tag.decode()}-src 'sha256-{known}'" in policy
        assert found and "unsafe" not in policy and "default-src 'none'" in policy


# ---- The admin page, in a browser ----
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
FLAGS += " --disable-background-networking --disable-component-update --remote-debugging-port=0"
HOSTILE = ("<img src=x onerror=window.hacked=1>", "\"'><svg/onload=window.hacked=1>", "长" * 10_000)


class Page:
    """A page in headless Chromium, driven over its DevTools socket. hosts: whom it has asked;
    troubles: what its console holds of errors, exceptions and violations of its policy."""

    def __init__(self, socket):
        self.socket, self.answers, self.hosts, self.troubles = socket, {}, set(), []
        self.numbers = itertools.count(1)
        self.reader = asyncio.create_task(self._read())

    async def _read(self):
        async for message in self.socket:
            event = message.json()
            about = event.get("params", {})
            if "id" in event:
                self.answers.pop(event["id"]).set_result(event)
            elif event["method"] == "Network.requestWillBeSent":
                self.hosts.add(flow2api.urlsplit(about["request"]["url"]).netloc)
            kinds = event.get("method"), about.get("type"), about.get("entry", {}).get("level")
            if {"Runtime.exceptionThrown", "error"} & set(kinds):
                self.troubles.append(about)

    async def send(self, method, **params):
        number = next(self.numbers)
        answer = self.answers[number] = asyncio.get_running_loop().create_future()
        await self.socket.send_json({"id": number, "method": method, "params": params})
        reply = await asyncio.wait_for(answer, 30)
        assert "error" not in reply, (method, reply)
        return reply["result"]

    async def eval(self, code):
        """The value of an expression in the page; promises are awaited."""
        options = {"awaitPromise": True, "returnByValue": True, "userGesture": True}
        reply = await self.send("Runtime.evaluate", expression=code, **options)
        assert "exceptionDetails" not in reply, (code, reply)
        return reply["result"].get("value")

    async def wait(self, code, seconds=30):
        """Until an expression is truthy."""
        end = time.monotonic() + seconds
        while not await self.eval(f"Boolean({code})"):
            if time.monotonic() > end:
                shown = await self.eval("document.body.innerText")
                raise AssertionError(f"{code}\n{shown[:5000]}\n{self.troubles}")
            await asyncio.sleep(0.05)

    async def sees(self, selector, part=""):
        """Until an element is shown, with this in its text."""
        node = f"document.querySelector({json.dumps(selector)})"
        shown = f"{node}?.checkVisibility() && {node}.innerText"
        await self.wait(f"({shown} || '').includes({json.dumps(part)})")

    async def fill(self, selector, value):
        """Puts a value into a field, with the events of a person who does."""
        node = f"document.querySelector({json.dumps(selector)})"
        await self.wait(node)
        events = f"for (const e of ['input', 'change']) {node}.dispatchEvent(new Event(e))"
        await self.eval(f"{node}.value = {json.dumps(value)}; {events}")

    async def click(self, selector):
        """Clicks a control, once it is there, seen and enabled."""
        found = f"[...document.querySelectorAll({json.dumps(selector)})]"
        found += ".find((node) => node.checkVisibility() && !node.disabled)"
        await self.wait(found)
        await self.eval(f"{found}.click()")

    async def log_in(self, url, password):
        await self.send("Page.navigate", url=url)
        await self.fill("[name=password]", password)
        await self.click("[data-act=login]")
        await self.sees("[data-figure=accounts_ok]")

    def clean(self, program):
        """It has asked its own server alone, and nothing went wrong in it."""
        assert self.hosts - {""} == {flow2api.urlsplit(program.url).netloc}
        assert not self.troubles, self.troubles


@pytest.fixture
async def chromium(tmp_path):
    """Starts Chromium -> a Page."""
    if not CHROMIUM:
        pytest.skip("NOT TESTED: the admin page, since no Chromium is here (apt: chromium)")
    profile, null = tmp_path / "chromium", asyncio.subprocess.DEVNULL
    command = (CHROMIUM, *FLAGS.split(), f"--user-data-dir={profile}", "about:blank")
    options = {"stdout": null, "stderr": null, "start_new_session": True}
    process = await asyncio.create_subprocess_exec(*command, **options)
    port = profile / "DevToolsActivePort"
    try:
        await until(lambda: port.exists() and "\n" in port.read_text(), 60)
        devtools = f"http://127.0.0.1:{port.read_text().split()[0]}/json"
        async with aiohttp.ClientSession() as http:
            targets = await (await http.get(devtools)).json()
            url = next(t["webSocketDebuggerUrl"] for t in targets if t["type"] == "page")
            async with http.ws_connect(url, max_msg_size=0) as socket:
                page = Page(socket)
                for domain in ("Page", "Network", "Runtime", "Log"):
                    await page.send(f"{domain}.enable")
                yield page
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


async def test_the_page_makes_a_clip_that_plays(chromium, flow2):
    """In the demo: log in, add an account, generate, and watch it."""
    seconds = {"FLOW2API_DEMO_VIDEO_SECONDS": "1", "FLOW2API_DEMO_IMAGE_SECONDS": "0.1"}
    program, page = await flow2("--demo", **seconds), chromium
    await page.log_in(program.url, program.said("admin_password"))
    await page.sees("[data-figure=accounts_ok]", "2 / 2")
    await page.click("[data-act=add]")
    await page.fill("dialog [name=st]", "a-third-session")
    await page.click("dialog [data-act=add]")
    await page.sees("[data-figure=accounts_ok]", "3 / 3")
    await page.eval("location.hash = '#try'")
    await page.wait("document.querySelectorAll('[name=model] option').length > 100")
    await page.fill("[name=prompt]", "a paper boat <b>in the rain</b>")
    await page.click("[data-act=generate]")
    await page.wait("document.querySelector('.try progress')")
    await page.wait("document.querySelector('.try video')?.readyState >= 3")
    await page.eval("document.querySelector('.try video').scrollIntoView()")  # unseen, it waits
    await page.wait("document.querySelector('.try video').currentTime > 0.2")
    await page.fill("[name=model]", "nano_banana_2")
    await page.click("[data-act=generate]")
    await page.wait("document.querySelector('.try .media img')?.naturalWidth > 500")
    await page.fill("[name=prompt]", "an unsafe boat")
    await page.click("[data-act=generate]")
    await page.sees(".try .error", "content policy")
    await page.eval("location.hash = '#jobs'")
    await page.wait("document.querySelectorAll('.jobs .job').length === 3")
    await page.sees("[data-figure=failures_today]", "1 × content policy")
    await page.eval("location.hash = '#logs'")
    await page.wait("document.querySelectorAll('td [data-act=details]').length === 3")
    page.clean(program)


async def test_the_page_keeps_settings_and_runs_nothing_of_a_file(chromium, flow2, flow, tmp_path):
    """A setting survives a restart; hostile names in an imported file are shown, and never run."""
    (demo, variables), page = flow, chromium
    data, name = ("--data", tmp_path / "data"), "generation.video_timeout"
    program = await flow2(*data, **variables)
    await page.log_in(program.url, password := program.said("admin_password"))
    await page.sees(".empty ol", "__Secure-next-auth.session-token")
    tokens = [demo.account(f"user{number}@example.com", PRO, 1000) for number in range(3)]
    pairs = zip(tokens, HOSTILE, strict=True)
    items = [{"st": st, "email": text, "remark": text, "name": text} for st, text in pairs]
    await page.eval("window.hacked = 0")
    await page.click("[data-act=import]")
    await page.fill("dialog [name=text]", json.dumps([*items, {"st": "abcd…wxyz"}]))
    await page.click("dialog [data-act=preview]")
    await page.wait("document.querySelectorAll('dialog td.name').length === 4")
    shown = await page.eval("document.querySelector('dialog table').textContent")
    assert all(text in shown for text in HOSTILE)
    await page.click("dialog [data-act=import]")
    remarks = "[...document.querySelectorAll('tbody td.name small')].map((n) => n.textContent)"
    await page.wait(f"!document.querySelector('dialog') && {remarks}.length === 3")
    assert sorted(await page.eval(remarks)) == sorted(HOSTILE)
    await page.eval("location.hash = '#settings'")
    await page.fill(f"[name='{name}']", "1234")
    await page.click(".savebar [data-act=save]")
    await page.sees(".setting [data-act=reset]")
    assert await page.eval("window.hacked") == 0
    page.clean(program)
    await page.send("Page.navigate", url="about:blank")
    await program.stop()
    page.hosts.clear()
    program = await flow2(*data, **variables)
    await page.log_in(f"{program.url}/#settings", password)
    await page.wait(f"document.querySelector(\"[name='{name}']\")?.value === '1234'")
    page.clean(program)


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


# ---- Images API ----

IMAGES, EDITS, VIDEOS = "/v1/images/generations", "/v1/images/edits", "/v1/videos"
RED, BLUE = demo_flow2api.picture("red", 64, 64), demo_flow2api.picture("blue", 64, 64)
RED_URL, BLUE_URL, RED_64 = data_url(RED), data_url(BLUE), base64.b64encode(RED).decode()
FILE = '; filename="a.png"\r\nContent-Type: image/png'
UPLOAD = '; filename="upload"\r\nContent-Type: application/octet-stream'  # Python's bytes
BARE = "\r\nContent-Type: application/octet-stream"
PROMPT, R, B = ("prompt", "a boat"), ("image", RED, FILE), ("image", BLUE, FILE)


def form(*parts, boundary="a-boundary"):
    """A form of (name, value, the rest of the part's head) -> options of World.call."""
    raw = b""
    for name, value, *head in parts:
        head = "".join(['Content-Disposition: form-data; name="', name, '"', *head])
        value = value if isinstance(value, bytes) else value.encode()
        raw += f"--{boundary}\r\n{head}\r\n\r\n".encode() + value + b"\r\n"
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    return {"data": raw + f"--{boundary}--\r\n".encode(), "headers": headers}


async def images(w, path=IMAGES, **body):
    """Asks for pictures with a JSON body -> as World.call."""
    return await w.call("POST", path, {"prompt": "a boat"} | body)


def pictures(reply):
    """The decoded pictures of an answer, which holds no address beside them."""
    status, _, body = reply
    assert status == 200, body
    assert set(body) == {"created", "data"} and type(body["created"]) is int
    assert all(set(item) == {"b64_json", "revised_prompt"} for item in body["data"])
    return [base64.b64decode(item["b64_json"], validate=True) for item in body["data"]]


def uploaded(w):
    """The pictures that reached Flow, in their order; the submit names as many."""
    sent = [base64.b64decode(body["imageBytes"]) for body in w.asked("uploadImage")]
    assert len(wanted(w)["imageInputs"]) == len(sent)
    return sent


def wanted(w):
    """The first element of the only submit."""
    (submit,) = w.asked("batchGenerateImages")
    return submit["requests"][0]


def paid(w):
    return [path for path, _ in list(w.demo.calls) if re.search(PAID, path)]


def files(w):
    """What the simulated Flow has made."""
    return [medium.file() for medium in w.demo.media.values()]


def failing(count):
    """Flow makes the pictures, but the first `count` of them fail."""

    async def middleware(request, handler):
        answer = await handler(request)
        if not re.search(PAID, request.path):
            return answer
        body = json.loads(answer.body)
        for medium in body["media"][:count]:
            status = {"mediaGenerationStatus": "MEDIA_GENERATION_STATUS_FAILED"}
            medium["mediaMetadata"] = {"mediaStatus": status | {"failureReasons": ["ODD"]}}
        return web.json_response(body)

    return middleware


# fmt: off
UPLOADS = (  # what reaches Flow; the parts of a form, or the fields of a JSON body; RED: its URL
    ([RED], [PROMPT, R]), ([RED], [R, PROMPT, ("n", "1")]), ([BLUE, RED], [B, PROMPT, R]),
    ([RED], [("image[]", RED, FILE), PROMPT]),
    ([BLUE, RED], [PROMPT, ("image[]", BLUE, FILE), ("image[]", RED, FILE)]),
    ([RED, BLUE], [("image[0]", RED, FILE), ("image[1]", BLUE, FILE), PROMPT]),
    ([RED, BLUE], [("images", RED, FILE), ("images", BLUE, FILE), PROMPT]),
    ([RED], [PROMPT, ("image", RED, UPLOAD)]), ([RED], [PROMPT, ("image", RED, BARE)]),
    ([RED], [PROMPT, ("image", "RED")]), ([RED], [PROMPT, ("image", RED_URL)]),
    ([RED], [PROMPT, ("image[]", "RED", FILE)]), ([RED], [PROMPT, ("image[]", RED_URL, FILE)]),
    ([RED], [PROMPT, ("image", "RED", BARE)]), ([RED], [PROMPT, ("image", RED_64)]),
    ([RED], [PROMPT, ("image[image_url]", "RED")]), ([RED], [PROMPT, ("image[url]", RED_URL)]),
    ([RED, BLUE], [("image[]", RED, FILE), PROMPT, ("image[]", BLUE_URL)]),
    ([RED], [("image", b"", FILE), R, ("prompt", ""), PROMPT, ("mask", "")]),
    ([RED], {"image": "RED"}), ([RED], {"image": RED_URL}), ([RED], {"image": RED_64}),
    ([RED], {"image": {"url": "RED"}}), ([RED], {"image": {"b64_json": RED_64}}),
    ([RED], {"image": {"type": "image_url", "image_url": {"url": RED_URL}}}),
    ([RED, BLUE], {"images": [{"image_url": "RED"}, {"image_url": BLUE_URL}]}),
    ([BLUE, RED, PNG], {"image": [BLUE_URL, {"url": RED_URL}, data_url(PNG)]}),
    ([RED], {"references": [RED_URL]}), ([RED], {"input_image": RED_URL}),
)
# fmt: on


@pytest.mark.parametrize("path", [IMAGES, EDITS])
@pytest.mark.parametrize(("expected", "body"), UPLOADS)
async def test_every_form_of_upload_reaches_flow_in_its_order(world, path, expected, body):
    w = await world()
    w.fault = fault("/red$", lambda request: web.Response(body=RED))
    link = f"{w.demo.address}/red"
    if isinstance(body, dict):
        reply = await images(w, path, **json.loads(json.dumps(body).replace('"RED"', f'"{link}"')))
    else:
        parts = [(name, link if value == "RED" else value, *head) for name, value, *head in body]
        reply = await w.call("POST", path, **form(*parts))
    assert (pictures(reply), uploaded(w)) == (files(w), expected)


@pytest.mark.parametrize("n", [1, 2, 3, 4, "3", None, ""])
async def test_so_many_pictures_come_as_were_asked_for(world, n):
    w = await world()
    reply = await images(w, n=n)
    assert pictures(reply) == files(w) and len(files(w)) == int(n or 1) and len(paid(w)) == 1
    assert {item["revised_prompt"] for item in reply[2]["data"]} == {"a boat"}
    job = await w.jobs.get(reply[1]["X-Job-Id"])
    assert (job.state, reply[1]["x-should-retry"]) == ("completed", "false")


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize(("setting", "asked"), [("url", None), ("url", ""), ("b64_json", "url")])
async def test_a_picture_comes_as_an_address_where_that_is_wanted(world, setting, asked, cache):
    w = await world(**{"images.response_format": setting, "cache.enabled": cache})
    _, _, body = await images(w, response_format=asked)
    assert set(item := body["data"][0]) == {"url", "revised_prompt"}
    assert item["url"].startswith(w.url + "/tmp/" if cache else w.demo.address)
    assert [(await fetched(w, item["url"]))[2]] == files(w)
    assert len(pictures(await images(w, response_format="b64_json"))) == 1


# fmt: off
OPENAIS = (None, "", "gpt-image-1", "gpt-image-1.5", "chatgpt-image-latest", "dall-e-3", "dall-e-2")
SIZES_ASKED = (  # shape that Flow is asked for, size
    ("square", "1024x1024 512x512 1:1 8x7"), ("landscape", "1792x1024 16:9 21:9 1280*720 1280×720"),
    ("portrait", "1024x1792 9:16"), ("4-3", "1536x1024 3:2 4:3"), ("3-4", "4:5 1024x1536 3:4"),
)
SHAPES_ASKED = [
    *((shape, {"size": size}) for shape, sizes in SIZES_ASKED for size in sizes.split()),
    ("portrait", {"aspect_ratio": "9:16"}), ("landscape", {"aspect_ratio": "16:9", "size": "1:1"}),
    ("landscape", {"orientation": "landscape"}), ("square", {"model": "nano_banana_pro-square"}),
    ("landscape", {"model": "nano_banana_2-landscape", "size": "1792x1024"}),
    ("square", {"model": "nano_banana_pro-square", "size": "auto"}),
]
LARGER = (  # plan, the times that a side grows, fields
    (PRO, 2, {"image_size": "2K"}), (PRO, 2, {"image_size": "2k", "model": "nano_banana_2"}),
    (ULTRA, 4, {"image_size": "4K", "model": "dall-e-3"}), (PRO, 1, {"image_size": "1K"}),
)
# fmt: on


@pytest.mark.parametrize("path", [IMAGES, EDITS])
@pytest.mark.parametrize("model", [{}, *({"model": model} for model in OPENAIS)], ids=str)
async def test_no_model_or_one_of_openais_means_the_default_one(world, model, path):
    w = await world(**{"images.default_model": "imagen_4"})
    assert len(pictures(await images(w, path, image=RED_URL, **model))) == 1
    assert wanted(w)["imageModelName"] == "IMAGEN_3_5"


@pytest.mark.parametrize(("shape", "fields"), SHAPES_ASKED, ids=str)
async def test_a_size_becomes_the_nearest_shape(world, shape, fields):
    w = await world()
    assert len(pictures(await images(w, **fields))) == 1
    ratio = f"IMAGE_ASPECT_RATIO_{flow2api.WIRE_RATIOS[shape]}"
    assert wanted(w)["imageAspectRatio"] == ratio


@pytest.mark.parametrize(("tier", "scale", "fields"), LARGER)
async def test_a_larger_picture_is_upscaled(world, tier, scale, fields):
    w = await world(((tier, 1000),))
    made = pictures(await images(w, **fields))
    assert made == [medium.file(scale) for medium in w.demo.media.values()]
    asked = [body["targetResolution"][-2:] for body in w.asked("upsampleImage")]
    assert asked == ([f"{scale}K"] if scale > 1 else [])


async def test_fields_that_mean_nothing_here_are_ignored(world):
    w = await world()
    odd = {"quality": "hd", "style": "vivid", "background": "transparent", "user": "u", "seed": 7}
    odd |= {"moderation": "low", "output_format": "webp", "partial_images": 2, "nobody": ["x"]}
    odd |= {
        "input_fidelity": "high",
        "metadata": {"a": 1},
        "stream": False,
        "output_compression": 5,
    }
    assert len(pictures(await images(w, **odd))) == 1
    parts = [(name, str(value)) for name, value in odd.items()] + [("a[]", "1"), ("b[c]", "d")]
    assert len(pictures(await w.call("POST", IMAGES, **form(PROMPT, *parts)))) == 1
    plain = {"prompt": "a boat", "user": "u", "n": "2"}  # as a browser's form sends them
    assert len(pictures(await w.call("POST", IMAGES, data=plain))) == 2


# fmt: off
BAD = "invalid_request"
AT_FAULT = (  # code, param, fields
    *((BAD, "prompt", {"prompt": prompt}) for prompt in (None, "", "  ", 5, ["a boat"])),
    *((BAD, "n", {"n": n}) for n in (0, 5, -1, "5", "x", 1.5, True, [1])),
    *((BAD, "size", {"size": size}) for size in ("big", "0x0", "4:1", "1x9", 5, {"a": 1})),
    *((BAD, "size", {"aspect_ratio": ratio}) for ratio in ("1:4", "wide")),
    *((BAD, "model", {"model": model}) for model in (5, "veo_3_1-fast", "omni_flash", "sora" * 99)),
    *(("invalid_image", "image", {"image": image}) for image in (
        {"file_id": "file-1"}, [{"file_id": "file-1"}], "no picture!", 5, data_url(b"%PDF-1.4"),
        [RED_URL] * 11)),
    ("invalid_image", "image", {"image": [RED_URL] * 4, "model": "imagen_4"}),
    ("unsupported_parameter", "mask", {"mask": BLUE_URL}),
    ("unsupported_parameter", "mask", {"mask": {"image_url": BLUE_URL}}),
    ("model_not_found", "model", {"model": "flux-pro"}), (BAD, "image_size", {"image_size": "8K"}),
    (BAD, "size", {"model": "nano_banana_pro-square", "size": "16:9"}),
    (BAD, "model", {"image_size": "2K", "model": "nano_banana"}),
    (BAD, "response_format", {"response_format": "png"}),
    ("tier_required", None, {"image_size": "4K"}),
)
HEAD = b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n'
MALFORMED = (  # the body of a form whose boundary is b
    b"", b"nothing", b"--b", b"--b--\r\n", b"--b\r\n\r\n", b"--b\r\nno colon\r\n\r\nx\r\n--b--\r\n",
    HEAD + b"\r\na boat", HEAD + b"\r\n\xff\xfe\r\n--b--\r\n",
    HEAD.replace(b"; name", b"; nom") + b"\r\na boat\r\n--b--\r\n",
    *(HEAD + head + b"\r\n\r\na boat\r\n--b--\r\n" for head in (
        b"Content-Type: text/plain; charset=x", b"Content-Transfer-Encoding: x",
        b"Content-Transfer-Encoding: base64", b"Content-Type: multipart/mixed",
        b"X: " + b"x" * 70_000)),
)
# fmt: on


@pytest.mark.parametrize("path", [IMAGES, EDITS])
@pytest.mark.parametrize(("code", "param", "fields"), AT_FAULT, ids=lambda v: str(v)[:40])
async def test_a_picture_request_at_fault_is_refused_unsent(world, path, code, param, fields):
    w = await world()
    w.demo.calls.clear()
    reply = await images(w, path, **{"image": RED_URL} | fields)
    assert told(w, reply, code)["param"] == param
    assert "x-should-retry" not in reply[1] and "X-Job-Id" not in reply[1]
    assert (list(w.demo.calls), w.store.jobs()) == ([], [])


async def test_an_edit_without_a_picture_and_a_mask_in_a_form_are_refused(world):
    w = await world()
    for image in ({}, {"image": ""}, {"image": ["", None]}):
        assert told(w, await images(w, EDITS, **image), BAD)["param"] == "image"
    assert told(w, await w.call("POST", EDITS, **form(PROMPT)), BAD)["param"] == "image"
    reply = await w.call("POST", EDITS, **form(PROMPT, R, ("mask", BLUE, FILE)))
    assert "say what to change" in told(w, reply, "unsupported_parameter")["message"]
    assert not paid(w)


@pytest.mark.parametrize("raw", MALFORMED, ids=lambda raw: repr(raw[-40:]))
@pytest.mark.parametrize("path", [IMAGES, VIDEOS])
async def test_a_malformed_form_is_refused(world, raw, path):
    w = await world()
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    told(w, await w.call("POST", path, data=raw, headers=headers), BAD)
    for kind in ("form-data", "form-data; boundary=", "mixed; boundary=b", ""):
        headers = {"Content-Type": f"multipart/{kind}"}
        told(w, await w.call("POST", path, data=raw, headers=headers), BAD)
    assert not paid(w)


async def test_whatever_a_picture_request_holds_the_answer_is_never_a_500(world):
    w, dice = await world(image_seconds=0), random.Random(4)
    odd = [None, True, 0, -1, 1.5, "", "x", "\ud800", [], {}, [None], {"a": {}}, [[]], 10**400]
    odd += ["9" * 6000, {"url": "http://["}, {"image_url": {"url": 5}}, RED_URL, "4:3", "2K"]
    names = "model prompt n size aspect_ratio orientation image_size image images mask stream"
    names = [*names.split(), "references", "response_format", "input_reference", "user"]

    async def one(path):
        fields = {dice.choice(names): dice.choice(odd) for _ in range(dice.randint(1, 3))}
        body = json.dumps({"prompt": "a boat", "image": RED_URL} | fields)
        status, _, answer = await w.call("POST", path, data=body)
        return [] if status in (200, 400, 404) else [(status, answer, body[-300:])]

    async with asyncio.timeout(40):
        for _ in range(20):
            wrong = await asyncio.gather(*(one(dice.choice([IMAGES, EDITS])) for _ in range(20)))
            assert not sum(wrong, [])


@pytest.mark.parametrize("count", [1, 3])
async def test_the_pictures_that_were_made_are_given_though_others_failed(world, count):
    w = await world()
    w.fault = failing(count)
    assert pictures(await images(w, n=4)) == files(w)[count:]


FAILURES = {  # code -> the fault, the prompt
    "generation_failed": (failing(4), "a boat"),
    "content_policy_violation": (None, "something unsafe"),
    "captcha_required": (fault(PAID, refusal(403, "PUBLIC_ERROR_UNUSUAL_ACTIVITY")), "a boat"),
    "content_not_found": (fault("/media/image", refusal(404)), "a boat"),
}


async def test_the_address_of_a_picture_that_has_died_is_asked_for_anew(world):
    w = await world()
    w.fault = fault("/media/image", refusal(403), times=1)
    assert pictures(await images(w)) == files(w)
    assert len(w.fault.seen) == len(w.asked("getMediaUrlRedirect")) == 1


def events_of(reply):
    """The events of a stream of pictures -> [(name, data)]; comments are left out."""
    status, headers, raw = reply
    assert status == 200 and headers["Content-Type"].startswith("text/event-stream")
    *blocks, end = re.sub(r"(?m)^: ping\n", "", raw.decode()).split("\n\n")
    found = [re.fullmatch(r"event: (\S+)\ndata: (\S.*)", block) for block in blocks]
    assert end == "" and all(found), raw[:500]
    assert all(json.loads(match[2])["type"] == match[1] for match in found)
    return [(match[1], json.loads(match[2])) for match in found]


@pytest.mark.parametrize("path", [IMAGES, EDITS])
async def test_a_stream_gives_each_picture_in_an_event(world, path):
    w = await world()
    events = events_of(await images(w, path, image=RED_URL, n=2, stream=True, partial_images=2))
    kind = "image_edit" if path == EDITS else "image_generation"
    assert [name for name, _ in events] == [f"{kind}.completed"] * 2
    assert [base64.b64decode(data["b64_json"]) for _, data in events] == files(w)
    for _, data in events:
        assert type(data["created_at"]) is int and "url" not in data
        assert {"size", "quality", "background"} <= set(data) and data["output_format"] == "png"
        details = data["usage"].pop("input_tokens_details")
        assert set(data["usage"]) == {"input_tokens", "output_tokens", "total_tokens"}
        assert set(details) == {"image_tokens", "text_tokens"}
        assert {type(count) for count in (*data["usage"].values(), *details.values())} == {int}


async def test_a_stream_of_addresses_and_a_stream_of_jpegs(world):
    w = await world()
    parts = (("stream", "true"), PROMPT, ("response_format", "url"))
    ((_, data),) = events_of(await w.call("POST", IMAGES, **form(*parts)))
    assert "b64_json" not in data and [(await fetched(w, data["url"]))[2]] == files(w)
    w.fault = fault("/media/image", lambda r: web.Response(body=b"\xff\xd8\xff\xe0" + bytes(40)))
    ((_, data),) = events_of(await images(w, stream=True))
    assert data["output_format"] == "jpeg"


@pytest.mark.parametrize("path", [IMAGES, EDITS])
@pytest.mark.parametrize("code", FAILURES)
async def test_a_failure_after_the_start_is_told_and_not_to_be_tried_again(world, code, path):
    """A stream tells it in its last event."""
    w = await world()
    w.fault, prompt = FAILURES[code]
    reply = await images(w, path, n=2, prompt=prompt, image=RED_URL)
    told(w, reply, code)
    (job,) = w.store.jobs()
    assert (reply[1]["x-should-retry"], reply[1]["X-Job-Id"]) == ("false", job.id)
    assert len(paid(w)) == (code != "captcha_required")  # which the fault has kept from Flow
    streamed = await world(data=w.data / "another")
    streamed.fault = w.fault
    reply = await images(streamed, path, prompt=prompt, image=RED_URL, stream=True)
    ((name, data),) = events_of(reply)
    assert (name, data["error"]["code"]) == ("error", code) and "X-Job-Id" in reply[1]
    assert set(data["error"]) == {"message", "type", "param", "code"}
    told(w, await images(streamed, stream=True, n=9), BAD)  # before it starts


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_before_its_picture_is_sent_spends_nothing(world, stream):
    w = await world()
    only(w).paused_until = flow2api.now() + 30
    client = asyncio.create_task(images(w, stream=stream))
    await until(lambda: len(w.pool.waiting) == 1)
    (job,) = w.jobs.open.values()
    client.cancel()
    assert (await end_of(w, job.id)).state == "cancelled"
    only(w).paused_until = 0
    assert len(pictures(await images(w))) == len(paid(w)) == 1


# fmt: off
NOT_HERE = (
    ("POST", "characters"), ("GET", "characters/search"), ("POST", "videos/characters"),
    ("GET", "videos/characters/char_1"), ("GET", "invite-codes"), ("GET", "profiles/somebody"),
    ("GET", "users/user_1/feed"), ("GET", "feed"), ("POST", "enhance_prompt"),
)
# fmt: on


@pytest.mark.parametrize("prefix", ["/v1/", "/", "/flow/v1/"])
@pytest.mark.parametrize(("method", "path"), NOT_HERE)
async def test_what_only_sora_has_is_said_to_be_not_here(world, method, path, prefix):
    w = await world()
    reply = await w.call(method, prefix + path)
    assert prefix + path in told(w, reply, "not_implemented")["message"]
    told(w, await w.call(method, prefix + path, key="sk-wrong"), "invalid_api_key")


@pytest.mark.parametrize("path", ["/v1/responses", "/responses", "/v1/image/generations"])
async def test_a_wrong_route_is_told_the_right_ones(world, path):
    w = await world()
    words = told(w, await w.call("POST", path, {"input": "a boat"}), "not_found")["message"]
    assert {POST[1], IMAGES, VIDEOS} <= set(re.findall(r"/v1/[a-z/]+\b", words))
    assert "Responses API" in words


@pytest.mark.parametrize("path", [VIDEOS, IMAGES, EDITS, "/v1/videos/video_1/content"])
async def test_a_browser_may_use_the_media_apis_and_see_what_it_must_know(world, path):
    w = await world()
    asked = {"Access-Control-Request-Headers": "authorization, idempotency-key"}
    async with w.http.options(w.url + path, headers=asked) as reply:
        assert (reply.status, reply.headers["Access-Control-Allow-Origin"]) == (204, "*")
        assert reply.headers["Access-Control-Allow-Headers"] == "authorization, idempotency-key"
    _, headers, _ = await w.call("POST", path, {})
    shown = set(headers["Access-Control-Expose-Headers"].split(", "))
    assert {"openai-poll-after-ms", "x-job-id", "x-should-retry", "idempotent-replayed"} <= shown


# ---- Idempotency ----

# fmt: off
CREATORS = {
    "picture": (IMAGES, {"prompt": "a boat"}), "clip": (VIDEOS, {"prompt": "a boat"}),
    "picture stream": (IMAGES, {"prompt": "a boat", "stream": True}),
    "edit": (EDITS, {"prompt": "a boat", "image": RED_URL}),
    "chat": (POST[1], chat_body("veo_3_1-fast", "a boat", [RED_URL])),
    "chat stream": (POST[1], chat_body("nano_banana_pro", "a boat") | {"stream": True}),
    "clip waited for": (VIDEOS, {"prompt": "a boat", "async_mode": False}),
}
# fmt: on


async def create(w, name, _path="", _key="a key", **fields):
    """A request of CREATORS with an Idempotency-Key -> as World.call."""
    path, body = CREATORS[name]
    headers = {"Idempotency-Key": _key}
    return await w.call("POST", _path or path, body | fields, headers=headers)


def one_job(w, first, *others):
    """The others are answers about the job of the first, which is the only one."""
    assert first[0] == 200 and "Idempotent-Replayed" not in first[1], first
    for other in others:
        assert (other[0], other[1]["X-Job-Id"]) == (200, first[1]["X-Job-Id"]), other
        assert other[1]["Idempotent-Replayed"] == "true"
    assert len(w.store.jobs()) == 1 >= len(paid(w))


@pytest.mark.parametrize("name", CREATORS)
async def test_the_same_key_and_body_give_the_same_job(world, name):
    w = await world(video_seconds=0.05)
    first, second = await create(w, name), await create(w, name)
    one_job(w, first, second)
    await end_of(w, first[1]["X-Job-Id"])
    assert name not in ("picture", "edit", "clip waited for") or first[2] == second[2]
    told(w, await create(w, name, user="another"), "idempotency_conflict")
    for path in {IMAGES, EDITS, VIDEOS} - {CREATORS[name][0]}:  # of the same body
        told(w, await create(w, name, path), "idempotency_conflict")
    assert len(paid(w)) == 1


@pytest.mark.parametrize("what", ["edits", "extensions", "remix"])
async def test_a_clip_from_a_clip_is_made_once_for_a_key(world, what):
    w = await world(video_seconds=0.05)
    _, headers, _ = await create(w, "clip waited for", _key="another key")
    source = headers["X-Job-Id"]
    path, more = f"{VIDEOS}/{what}", {"video": {"id": source}}
    path, more = (path, more) if what != "remix" else (f"{VIDEOS}/{source}/remix", {})
    replies = [await create(w, "clip", path, **more) for _ in range(2)]
    ids = {headers["X-Job-Id"] for _, headers, _ in replies}
    assert len(ids) == 1 and source not in ids
    assert replies[1][1]["Idempotent-Replayed"] == "true"
    await end_of(w, *ids)
    assert len(paid(w)) == 2


async def test_the_same_form_with_another_boundary_is_the_same_request(world):
    async def send(picture, boundary):
        options = form(PROMPT, ("image", picture, FILE), boundary=boundary)
        options["headers"]["Idempotency-Key"] = "a key"
        return await w.call("POST", EDITS, **options)

    w = await world()
    one_job(w, await send(RED, "one"), await send(RED, "two"))
    told(w, await send(BLUE, "one"), "idempotency_conflict")
    assert len(paid(w)) == 1


@pytest.mark.parametrize("prefix", ["", "/flow/v1", "/v1/v1"])
async def test_fields_in_another_order_at_an_alias_are_the_same_request(world, prefix):
    w = await world()
    options = {"headers": {"Idempotency-Key": "a key"}}
    path, body = f"{prefix}/images/generations", {"n": 2, "prompt": "a boat"}
    first = await w.call("POST", path, {"prompt": "a boat", "n": 2}, **options)
    one_job(w, first, await w.call("POST", IMAGES, body, **options))
    assert w.store.jobs()[0].origin == "images"


@pytest.mark.parametrize("name", ["picture", "clip", "chat", "chat stream"])
async def test_three_at_the_same_moment_are_one_job(world, name):
    w = await world(video_seconds=0.05)
    w.fault = hold(PAID)
    calls = [asyncio.create_task(create(w, name)) for _ in range(3)]
    await w.fault.seen.wait()
    w.fault.release.set()
    replies = await asyncio.gather(*calls)
    one_job(w, *sorted(replies, key=lambda reply: "Idempotent-Replayed" in reply[1]))
    await end_of(w, replies[0][1]["X-Job-Id"])
    assert len(paid(w)) == 1


@pytest.mark.parametrize("name", ["picture", "edit", "chat", "clip"])
async def test_a_key_holds_over_a_restart(world, name):
    w = await world(video_seconds=0.05)
    first = await create(w, name)
    await end_of(w, first[1]["X-Job-Id"])
    await w.stop_gateway()
    await w.start_gateway()
    one_job(w, first, await create(w, name))
    told(w, await create(w, name, n=2), "idempotency_conflict")
    assert len(paid(w)) == 1


async def test_a_key_stands_for_a_day(world, clock):
    w = await world()
    first = await create(w, "picture")
    clock.ahead = 86000
    one_job(w, first, await create(w, "picture"))
    clock.ahead = 86500
    second = await create(w, "picture")
    assert len(pictures(second)) == 1 and "Idempotent-Replayed" not in second[1]
    clock.ahead += 86000  # the day of the second job
    third = await create(w, "picture")
    assert third[1]["X-Job-Id"] == second[1]["X-Job-Id"] != first[1]["X-Job-Id"]
    assert len(paid(w)) == 2


async def test_the_key_of_a_deleted_clip_makes_no_second_one(world):
    w = await world(video_seconds=0.05)
    _, headers, _ = await create(w, "clip waited for")
    assert (await w.call("DELETE", f"{VIDEOS}/{headers['X-Job-Id']}"))[0] == 200
    told(w, await create(w, "clip waited for"), "task_not_found")
    assert len(paid(w)) == 1


@pytest.mark.parametrize("name", CREATORS)
async def test_a_request_refused_leaves_its_key_unused(world, name):
    w = await world(accounts=(), video_seconds=0.05)
    told(w, await create(w, name, n=9), BAD)
    told(w, await create(w, name, _key="k" * 256), BAD)
    told(w, await create(w, name), "no_accounts")
    assert not w.store.jobs()
    await w.account()
    one_job(w, await create(w, name), await create(w, name))


@pytest.mark.parametrize("name", ["edit", "clip", "chat", "chat stream"])
async def test_a_key_is_answered_though_the_address_of_its_picture_has_died(world, name):
    w = await world(video_seconds=0.05)
    w.fault = fault("/red$", lambda request: web.Response(body=RED), times=1)
    fields = {"image": (link := f"{w.demo.address}/red")}
    fields = chat_body("nano_banana_pro", "a boat", [link]) if "chat" in name else fields
    one_job(w, await create(w, name, **fields), await create(w, name, **fields))


async def test_a_key_that_is_no_text_is_refused(world):
    w = await world()
    head = f"Authorization: Bearer {w.key}\r\nIdempotency-Key: k\udcff\r\n"
    head += "Content-Type: application/x-www-form-urlencoded"
    status, body = await raw_call(w, "POST", IMAGES, head)
    assert status == 400 and "Idempotency-Key" in json.loads(body)["error"]["message"]


@pytest.mark.parametrize("name", CREATORS)
async def test_what_a_client_sends_again_by_itself_is_made_once(world, name):
    """OpenAI's packages do that after a time-out, and count it; no key is sent."""
    w = await world(video_seconds=0.05)
    path, body = CREATORS[name]
    again = {"headers": {"x-stainless-retry-count": "1"}}
    one_job(w, await w.call("POST", path, body), await w.call("POST", path, body, **again))
    first = (await w.call("POST", path, body | {"user": "x"}, **again))[1]["X-Job-Id"]
    second = (await w.call("POST", path, body | {"user": "x"}))[1]["X-Job-Id"]
    assert len({job.id for job in w.store.jobs()} & {first, second}) == 2


async def test_what_was_cancelled_is_made_when_the_client_sends_it_again(world, clock):
    w = await world()
    only(w).paused_until = flow2api.now() + 30
    client = asyncio.create_task(images(w))
    await until(lambda: len(w.pool.waiting) == 1)
    (job,) = w.jobs.open.values()
    client.cancel()
    await end_of(w, job.id)
    only(w).paused_until, again = 0, {"headers": {"x-stainless-retry-count": "1"}}
    one, other = [await w.call("POST", IMAGES, {"prompt": "a boat"}, **again) for _ in range(2)]
    assert one[1]["X-Job-Id"] == other[1]["X-Job-Id"] != job.id
    clock.ahead = 4000
    assert len(pictures(await w.call("POST", IMAGES, {"prompt": "a boat"}, **again))) == 1
    assert len(paid(w)) == 2


@pytest.mark.parametrize("name", ["picture", "chat", "clip waited for"])
async def test_a_kept_file_is_given_again_though_google_has_lost_it(world, name):
    w = await world(video_seconds=0.05, **{"cache.enabled": True})
    first = await create(w, name)
    w.fault = fault("/media/|UrlRedirect", refusal(404))
    only(w).is_active = False
    for token in w.pool.tokens.values():
        token.at_expires = 0
    for output in w.store.job(first[1]["X-Job-Id"]).outputs:
        output.url_expires = 0
        await w.store.put(output)
    one_job(w, first, await create(w, name))


async def test_different_keys_and_no_key_make_jobs_of_their_own(world):
    w = await world()
    replies = [await create(w, "picture", _key=key) for key in ("", "", "one", "two", "k" * 255)]
    assert len({reply[1]["X-Job-Id"] for reply in replies}) == len(paid(w)) == 5
    assert not [reply for reply in replies if "Idempotent-Replayed" in reply[1]]


@pytest.mark.parametrize("name", ["picture", "chat", "clip waited for"])
async def test_a_job_that_failed_is_not_made_again_for_its_key(world, name):
    w = await world(video_seconds=0.05)
    asked = {"prompt": "unsafe", "messages": [{"role": "user", "content": "unsafe"}]}
    replies = [await create(w, name, **asked) for _ in range(2)]
    for reply in replies:
        told(w, reply, "content_policy_violation")
    assert replies[0][1]["X-Job-Id"] == replies[1][1]["X-Job-Id"] and len(paid(w)) == 1
    assert [reply[1].get("Idempotent-Replayed") for reply in replies] == [None, "true"]


async def leave(w, client):
    """The client goes away, and the gateway knows."""
    client.cancel()
    await until(lambda: not any(known.transport for known in w.runner.server.connections))


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("name", ["picture", "picture stream", "chat", "chat stream"])
async def test_a_client_with_a_key_can_leave_and_come_back_for_its_job(world, name, restart):
    w = await world(video_seconds=0.05)
    await w.pool.update(only(w), paused_until=flow2api.now() + 30)
    client = asyncio.create_task(create(w, name))
    await until(lambda: len(w.pool.waiting) == 1)
    (job,) = w.jobs.open.values()
    await leave(w, client)
    if restart:
        await w.stop_gateway()
        await w.start_gateway()
    only(w).paused_until = 0
    w.pool.wake()
    assert (await end_of(w, job.id)).state == "completed"
    status, headers, _ = await create(w, name)
    assert (status, headers["X-Job-Id"]) == (200, job.id) and len(paid(w)) == 1


async def test_a_client_with_a_key_may_leave_while_its_job_is_written(world):
    w = await world()
    put, writing, go = w.store.put_rows, asyncio.Event(), asyncio.Event()

    async def slow(*rows):
        w.store.put_rows = put
        writing.set()
        await go.wait()
        await put(*rows)

    w.store.put_rows = slow
    client = asyncio.create_task(create(w, "picture"))
    await writing.wait()
    await leave(w, client)
    back = asyncio.create_task(create(w, "picture"))
    go.set()
    assert len(pictures(await back)) == len(paid(w)) == len(w.store.jobs()) == 1


# ---- Videos API ----

QUICK = {"video_seconds": 0.01, "flow.poll_interval": 0.05}
TEXT, WHOLE, NONE = (str,), (int,), (type(None),)
VIDEO = dict.fromkeys(("id", "object", "model", "status", "prompt", "seconds", "size"), TEXT)
VIDEO |= dict.fromkeys(("progress", "created_at"), WHOLE) | {"error": (dict, *NONE)}
VIDEO |= dict.fromkeys(("completed_at", "expires_at"), WHOLE + NONE)
VIDEO |= {"remixed_from_video_id": TEXT + NONE}  # key -> the types that strict clients take
EXTRAS = {"metadata", "notes", "url", "video_url", "urls", "fail_reason"}
BOAT, STATES = {"prompt": "a paper boat"}, ("queued", "in_progress", "completed", "failed")


def strict(video, *states):
    """The video object, with each of its types as OpenAI's API has them."""
    assert {name: type(video[name]) for name in VIDEO if type(video[name]) not in VIDEO[name]} == {}
    assert set(video) - set(VIDEO) <= EXTRAS and video["object"] == "video"
    assert re.fullmatch(r"[A-Za-z0-9_-]+", video["id"])
    assert video["status"] in (states or STATES), video
    assert re.fullmatch(r"\d+ \d+x\d+", f"{video['seconds']} {video['size']}")
    done, failed = (video["status"] == state for state in STATES[2:])
    assert 0 <= video["progress"] <= 100 and (video["progress"] == 100) is done
    assert failed or (video["completed_at"] is not None) is done
    assert ("url" in video, "video_url" in video, "fail_reason" in video) == (done, done, failed)
    assert (video["error"] is not None) is failed
    if failed:
        assert set(video["error"]) == {"code", "message"} and all(video["error"].values())
        assert video["error"]["message"] == video["fail_reason"]
    return video


def video_of(reply, *states):
    """The strict video object in an answer, whose status and headers are right, too."""
    status, headers, body = reply
    assert status == 200, body
    pause = "5000" if strict(body, *states)["status"] in STATES[:2] else None
    assert headers.get("openai-poll-after-ms") == pause
    return body


async def ask(w, path="/v1/videos", **fields):
    return await w.call("POST", path, BOAT | fields)


async def made(w, **fields):
    """A finished clip -> its video object."""
    return video_of(await ask(w, async_mode=False, **fields), "completed")


async def begun(w, **fields):
    """A clip that is not finished -> its id."""
    return video_of(await ask(w, **fields), "queued", "in_progress")["id"]


async def shown(w, video_id, *states):
    return video_of(await w.call("GET", f"/v1/videos/{video_id}"), *states)


async def download(w, video_id, query="", **headers):
    path = f"/v1/videos/{video_id}/content{query}"
    return await w.call("GET", path, headers=headers, allow_redirects=False)


def file_of(w, video_id):
    """The bytes that Flow has for a clip."""
    return w.demo.media[w.store.job(video_id).outputs[0].name].file()


def multipart(*parts, **texts):
    """A multipart form of (name, text) and (name, bytes), the bytes as a file."""
    data = aiohttp.FormData(default_to_multipart=True)
    for name, value in (*parts, *texts.items()):
        file = {"filename": "upload", "content_type": "application/octet-stream"}
        data.add_field(name, value, **(file if isinstance(value, bytes) else {}))
    return data


def submits(w):
    """(the end of the endpoint, the request) of each submit of a clip."""
    calls = [(path.partition("AsyncGenerateVideo")[2], body) for path, body in list(w.demo.calls)]
    return [(mode, body["requests"][0]) for mode, body in calls if mode]


async def test_a_video_object_is_strict_in_each_state_of_its_job(world):
    w = await world(video_seconds=0.3)
    only(w).video_concurrency = 1
    before = await begun(w)
    await running(w)
    status, headers, first = reply = await ask(w, prompt="a lake")
    video_of(reply, "queued")
    for video, state in ((before, "in_progress"), (first["id"], "queued")):
        error = told(w, await download(w, video), "task_not_completed")
        assert f"status: {state}" in error["message"]
    assert (headers["x-should-retry"], headers["X-Job-Id"]) == ("false", first["id"])
    seen = [first]
    while seen[-1]["status"] in STATES[:2]:
        seen.append(await shown(w, first["id"]))
        await asyncio.sleep(0.01)
    states = [state for state, _ in itertools.groupby(video["status"] for video in seen)]
    assert states == ["queued", "in_progress", "completed"]
    assert first["created_at"] <= seen[-1]["completed_at"] <= time.time()
    for name in ("id", "created_at", "seconds", "size", "model", "prompt"):
        assert first[name] == seen[-1][name]


async def test_progress_rises_and_never_goes_back(world, clock):
    w, seen = await world(video_seconds=900, **{"generation.video_timeout": 86400}), []
    first = await begun(w)
    await running(w)
    clock.ahead = 1000  # so long did it take
    await end_of(w, first)
    w.demo.video_seconds = 10**6
    video = await begun(w)
    await running(w)
    for clock.ahead in (1000, 1400, 1700, 1200, 9000):
        seen.append((await shown(w, video, "in_progress"))["progress"])
    assert seen == sorted(seen) and seen[2] == seen[3] and seen[-1] == 99
    assert seen[0] < 3 and 38 < seen[1] < 42 and 68 < seen[2] < 72


@pytest.mark.parametrize("code", ["content_policy_violation", "submit_unknown", "cancelled"])
async def test_a_failed_video_says_why_and_changes_no_more(world, looks, clock, code):
    w = await world(**QUICK)
    await made(w)  # now it is known how long they take
    if code == "cancelled":  # a chat client leaves the queue
        only(w).paused_until = flow2api.now() + 30
        client = asyncio.create_task(w.chat())
        await until(lambda: w.jobs.open)
        (video,) = w.jobs.open
        client.cancel()
    else:
        w.fault = fault(PAID, dropped) if code == "submit_unknown" else None
        video = await begun(w, prompt="unsafe")
    await end_of(w, video)
    failed = await shown(w, video, "failed")
    assert failed["error"]["code"] == code
    assert ("PUBLIC_ERROR_UNSAFE" in failed["error"]["message"]) is ("policy" in code)
    status, _, body = await download(w, video)
    assert (status, body["error"]["code"]) == (400, "generation_failed")
    assert body["error"]["message"] == failed["error"]["message"]
    clock.ahead = 3000
    assert await shown(w, video) == failed


# fmt: off
DATA, BASE64 = data_url(PNG), base64.b64encode(PNG).decode()
TEXTS = {"prompt": "a boat", "model": "sora-2", "seconds": "8", "size": "1280x720", "user": ""}
CREATIONS = (  # JSON, or the parts of a form; with a picture in each form there is, or none
    {}, [], {"unknown": {"a": [1]}, "seconds": 8}, [*TEXTS.items(), ("input_reference", PNG)],
    *({"input_reference": given} for given in (DATA, BASE64, "LINK", [DATA])),
    *({"input_reference": {"image_url": given}} for given in (DATA, "LINK", {"url": DATA})),
    {"input_reference": [{"image_url": DATA}]}, {"input_image": BASE64}, {"image": "LINK"},
    {"image": {"url": DATA}}, {"images": [DATA]}, {"images": [{"image_url": "LINK"}]},
    *([(name, PNG)] for name in ("input_reference", "input_reference[]", "image", "images[]")),
    *([("input_reference", given)] for given in (DATA, "LINK", b"LINK", DATA.encode())),
    *([("input_reference[image_url]", given)] for given in (DATA, "LINK")), [("image", BASE64)],
)
# fmt: on


@pytest.mark.parametrize("given", CREATIONS, ids=lambda given: f"{given}"[:50])
async def test_a_video_is_made_from_json_and_from_forms_with_any_picture(world, given):
    w = await world(video_seconds=600)
    served = fault("/pictures/", lambda request: web.Response(body=PNG))
    w.fault = lambda r, handler: served(r, functools.partial(named_uploads, handler=handler))
    link, picture = f"{w.demo.address}/pictures/a.png", re.search("inp|ima", f"{given}")
    if isinstance(given, list):
        real = {"LINK": link, b"LINK": link.encode()}
        parts = [(name, real.get(value, value)) for name, value in given]
        more = {name: TEXTS[name] for name in TEXTS if name not in dict(given)}
        video = video_of(await w.call("POST", "/v1/videos", data=multipart(*parts, **more)))
    else:
        body = TEXTS | json.loads(json.dumps(given).replace("LINK", link))
        video = video_of(await w.call("POST", "/v1/videos", body))
    assert (video["prompt"], video["size"], video["seconds"]) == ("a boat", "1280x720", "8")
    await running(w)
    ((mode, wanted),) = submits(w)
    assert wanted["aspectRatio"] == "VIDEO_ASPECT_RATIO_LANDSCAPE" and prompt_of(w) == "a boat"
    assert mode == ("StartImage" if picture else "Text")
    assert wanted.get("startImage") == ({"mediaId": name_of(PNG)} if picture else None)


@pytest.mark.parametrize("how", ["JSON", "input_reference", "input_reference[]"])
@pytest.mark.parametrize(("count", "endpoint", "key"), [
    (1, "StartImage", "i2v_s_fast_portrait"), (2, "StartAndEndImage", "i2v_s_fast_portrait_fl"),
    (3, "ReferenceImages", "r2v_fast_portrait"),
])  # fmt: skip
async def test_the_number_of_pictures_decides_what_they_are(world, how, count, endpoint, key):
    w = await world(video_seconds=600)
    w.fault = named_uploads
    given = {"json": {"prompt": "a", "input_reference": list(map(data_url, PICTURES[:count]))}}
    if how != "JSON":
        given = {"data": multipart(*((how, picture) for picture in PICTURES[:count]), prompt="a")}
    video_of(await w.call("POST", "/v1/videos", **given))
    await running(w)
    assert made_calls(w) == {"a": expected_calls(endpoint, count, "PORTRAIT", f"veo_3_1_{key}")}


WIDE, TALL = ("LANDSCAPE", "1280x720", "8"), ("PORTRAIT", "720x1280", "8")
ASKED = (  # what is asked, the ratio at Flow, size and seconds as they are told, the key's length
    *((TALL, fields) for fields in ({}, {"orientation": "portrait"}, {"aspect_ratio": "9:16"})),
    *((TALL, {"size": size}) for size in ("", "auto", "720x1280", "1024x1792", "9:16")),
    *((WIDE, {"size": size}) for size in ("1280x720", "1920x1080", "16:9", "1000x999")),
    *((WIDE, fields) for fields in ({"orientation": "landscape"}, {"aspect_ratio": "16:9"})),
    (WIDE, {"model": "veo_3_1-landscape-fast"}),
    (("PORTRAIT", "1080x1920", "8"), {"model": "veo_3_1-fast-1080p"}),
    *((TALL, {"seconds": seconds}) for seconds in (8, "8", None, "")),
    (("PORTRAIT", "720x1280", "6"), {"model": "omni_flash", "seconds": 6}),
    (("PORTRAIT", "720x1280", "10"), {"model": "omni_flash-10s", "seconds": "10"}),
)


@pytest.mark.parametrize(("expected", "fields"), ASKED, ids=str)
async def test_shape_and_length_reach_flow_and_are_told(world, expected, fields):
    w = await world(video_seconds=600)
    video = video_of(await ask(w, **fields))
    await running(w)
    ((_, wanted),) = submits(w)
    assert (wanted["aspectRatio"][19:], video["size"], video["seconds"]) == expected
    short = "omni" in video["model"]
    assert wanted["videoModelKey"].endswith(f"_{expected[2]}s") is short and "notes" not in video


@pytest.mark.parametrize("model", ["sora-2", "sora-2-pro", "", None])
@pytest.mark.parametrize(
    ("default", "seconds", "near"),
    [("veo_3_1-fast", 10, "8"), ("omni_flash", "15", "10"), ("omni_flash-10s", "4", "10")],
)
async def test_a_client_of_sora_gets_the_nearest_length(world, model, default, seconds, near):
    w = await world(video_seconds=600, **{"videos.default_model": default})
    video = video_of(await ask(w, model=model, seconds=seconds))
    assert (video["model"], video["seconds"]) == (default, near)
    assert re.search(rf"\b{near} s\b.*\b{seconds}\b", *video["notes"])


async def test_metadata_comes_back_as_an_object(world):
    w, known = await world(video_seconds=600), {"a": {"b": [1, "ü", None]}}
    ids = [await begun(w, metadata=given) for given in (known, json.dumps(known))]
    for text in (json.dumps(known), ""):
        reply = await w.call("POST", "/v1/videos", data=multipart(prompt="x", metadata=text))
        ids.append(video_of(reply)["id"])
    await w.stop_gateway()
    await w.start_gateway()
    listed_ = (await w.call("GET", "/v1/videos", params={"order": "asc"}))[2]["data"]
    for videos in (listed_, [await shown(w, video) for video in ids]):
        assert [video.get("metadata") for video in videos] == [known, known, known, None]


@pytest.mark.parametrize("no", [False, 0, "false", "0"])
async def test_without_async_mode_the_call_waits_for_the_end(world, no):
    w = await world(**QUICK)
    for prompt in ("a boat", "unsafe"):
        body = {"prompt": prompt, "async_mode": no}
        given = {"data": multipart(**body)} if isinstance(no, str) else {"json": body}
        status, headers, body = reply = await w.call("POST", "/v1/videos", **given)
        known = await shown(w, headers["X-Job-Id"], "completed", "failed")
        assert headers["x-should-retry"] == "false"
        assert known == body or told(w, reply, "content_policy_violation")
        assert known["status"] == ("failed" if prompt == "unsafe" else "completed")


# ---- Videos API: the files ----

RANGES = (  # the Range header, the status, the part
    ("", 200, slice(None)), ("bytes=0-", 206, slice(None)), ("bytes=3-9", 206, slice(3, 10)),
    ("bytes=0-0", 206, slice(1)), ("bytes=100-", 206, slice(100, None)), ("bytes=9999999-", 416, 0),
    ("bytes=-7", 206, slice(-7, None)), ("bytes=5-99999999", 206, slice(5, None)),
)  # fmt: skip


@pytest.mark.parametrize(("asked", "status", "part"), RANGES)
@pytest.mark.parametrize("kept", [False, True])
async def test_the_content_comes_whole_and_in_ranges(world, kept, asked, status, part):
    w = await world(**QUICK, **{"cache.enabled": kept})
    video, headers = (await made(w))["id"], {"Range": asked} if asked else {}
    data = file_of(w, video)
    w.fault = fault("^/media/", refusal(500)) if kept else None
    given, known, body = await download(w, video, **headers)
    assert given == status
    if status == 416:
        assert known["Content-Range"] == f"bytes */{len(data)}"
        return
    start, end, _ = part.indices(len(data))
    assert body == data[part] and known["Accept-Ranges"] == "bytes"
    assert known.get("Content-Range", "") == (asked and f"bytes {start}-{end - 1}/{len(data)}")
    head = await w.call("HEAD", f"/v1/videos/{video}/content", headers=headers)
    assert (head[0], head[2]) == (status, b"")
    for name, value in (("Content-Type", "video/mp4"), ("Content-Length", str(end - start))):
        assert known[name] == value == head[1][name]


@pytest.mark.parametrize(("on", "answer", "times", "code"), [
    *(("^/media/", refusal(status), 1, "") for status in (403, 404, 410)),
    *(("^/media/", refusal(status), 2, "content_not_found") for status in (403, 404, 410)),
    ("^/media/|UrlRedirect", refusal(404, message="NOT_FOUND"), 2, "content_not_found"),
    ("^/media/", dropped, TIMES, "upstream_unreachable"),
])  # fmt: skip
async def test_a_dead_link_is_asked_for_anew_once(world, on, answer, times, code):
    w = await world(**QUICK)
    video = (await made(w))["id"]
    w.fault = fault(on, answer, times=times)
    reply = await download(w, video)
    assert told(w, reply, code) if code else reply[2] == file_of(w, video)
    assert len(w.fault.seen) == times or answer is dropped
    anew = on == "^/media/" and answer is not dropped
    assert len(w.asked("UrlRedirect")) == (2 if anew else 1)
    w.fault = None
    assert (await download(w, video))[2] == file_of(w, video)


async def test_a_link_that_has_expired_is_not_even_tried(world, clock):
    w = await world(**QUICK)
    video = (await made(w))["id"]
    w.demo.calls.clear()
    clock.ahead = 18_000 - 30
    for _ in range(2):  # the second time the new one is known
        assert (await download(w, video))[2] == file_of(w, video)
    assert [path[:7] for path, _ in w.demo.calls] == ["/fx/api", "/media/", "/media/"]


@pytest.mark.parametrize("sent", [0, 5, 300_000])
@pytest.mark.parametrize("headers", [{}, {"Content-Length": "1000000"}])
async def test_a_file_that_breaks_off_is_a_broken_answer_and_no_second_one(world, sent, headers):
    w = await world(**QUICK)
    video = (await made(w))["id"]

    async def broken(request, handler):
        reply = web.StreamResponse(headers=headers)
        await reply.prepare(request)
        await reply.write(b"x" * sent)
        request.transport.close()
        return reply

    w.fault = broken
    reader, writer = await asyncio.open_connection("127.0.0.1", int(w.url.rpartition(":")[2]))
    head = f"GET /v1/videos/{video}/content HTTP/1.1\r\nHost: x\r\nAuthorization: {w.key}\r\n\r\n"
    writer.write(head.encode())
    async with asyncio.timeout(10):
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")  # until the gateway closes
    writer.close()
    if sent or head.startswith(b"HTTP/1.1 200"):
        assert head.startswith(b"HTTP/1.1 200") and body.count(b"x") == sent
        assert b"HTTP/1.1" not in body and not body.endswith(b"0\r\n\r\n")
        with pytest.raises(aiohttp.ClientPayloadError):
            await download(w, video)
    else:  # nothing had been passed on yet
        assert head.startswith(b"HTTP/1.1 502") and b"upstream_unreachable" in body


async def test_the_setting_redirect_sends_clients_to_a_live_link(world, clock):
    w = await world(**QUICK, **{"videos.content": "redirect"})
    video = await made(w)
    for clock.ahead in (0, 20_000):
        for path in (f"/v1/videos/{video['id']}/content", video["url"].removeprefix(w.url)):
            status, headers, _ = await w.call("GET", path, allow_redirects=False)
            assert status == 302 and headers["Location"].startswith(w.demo.address)
            assert int(headers["Location"].partition("Expires=")[2]) > flow2api.now() + 60
            assert (await fetched(w, headers["Location"]))[2] == file_of(w, video["id"])
    assert (await download(w, video["id"], "?variant=thumbnail"))[::2] == (200, PNG)


async def test_a_redirect_without_an_address_is_an_error_with_words(world, impatient):
    w = await world(**QUICK, **{"videos.content": "redirect"})
    w.fault = fault("UrlRedirect", refusal(404, message="NOT_FOUND"))
    video = (await made(w))["id"]
    told(w, await download(w, video), "content_not_found")
    await w.pool.remove(only(w))
    told(w, await download(w, video), "content_not_found")


@pytest.mark.parametrize("kept", [False, True])
async def test_a_thumbnail_is_a_picture(world, kept):
    w = await world(**QUICK, **{"cache.enabled": kept})
    video = (await made(w))["id"]
    status, headers, body = await download(w, video, "?variant=thumbnail")
    assert (status, headers["Content-Type"], body) == (200, "image/png", PNG)
    assert (await download(w, video, "?variant=video"))[2] == file_of(w, video)
    reply = await download(w, video, "?variant=spritesheet")
    assert told(w, reply, "invalid_request")["param"] == "variant"
    await w.pool.remove(only(w))  # nobody can be asked for it any more, and the clip is no picture
    told(w, await download(w, video, "?variant=thumbnail"), "content_not_found")


@pytest.mark.parametrize("kept", [False, True])
async def test_each_of_several_clips_has_its_index_and_its_url(world, kept):
    """Also where one of them has failed."""
    w = await world(video_seconds=0.3, **{"cache.enabled": kept})
    client = asyncio.create_task(w.chat(n=3))
    await until(lambda: len(w.demo.media) == 3)
    first, *others = w.demo.media
    w.demo.media[first] = w.demo.media[first]._replace(prompt="unsafe")
    video = await shown(w, (await client)[1]["X-Job-Id"], "completed")
    files = [w.demo.media[name].file() for name in others]
    assert [(await fetched(w, url))[2] for url in video["urls"]] == files
    assert video["url"] == video["urls"][0] != video["urls"][1]
    for query, file in (("", files[0]), ("?index=0", files[0]), ("?index=1", files[1])):
        assert (await download(w, video["id"], query))[2] == file
    for index in ("2", "-1", "x", "²", "9" * 99):
        told(w, await download(w, video["id"], f"?index={index}"), "invalid_request")


@pytest.mark.parametrize("kept", [False, True])
async def test_the_url_of_a_video_needs_no_key_and_can_not_be_guessed(world, kept):
    w = await world(**QUICK, **{"cache.enabled": kept})
    video = await made(w)
    url, data = video["url"], file_of(w, video["id"])
    assert re.fullmatch(rf"{w.url}/tmp/[\w-]{{30,}}\.mp4", url) and video["video_url"] == url
    status, headers, body = await fetched(w, url)
    assert (status, headers["Content-Type"], body) == (200, "video/mp4", data)
    assert (await fetched(w, url, Range="bytes=2-5"))[::2] == (206, data[2:6])
    for file in (w.data / "tmp").iterdir():
        file.unlink()  # it has expired: from now on the clip comes from Google
    url = (await shown(w, video["id"]))["url"]
    assert (await fetched(w, url))[2] == data == (await download(w, video["id"]))[2]
    secret = url.split("_")[-2]
    for wrong in (secret[::-1], "0" * len(secret), secret[:-1], ""):
        assert (await fetched(w, url.replace(secret, wrong)))[0] == 404
    await w.call("DELETE", f"/v1/videos/{video['id']}")
    assert (await fetched(w, url))[0] == 404


@pytest.fixture
def huge(tmp_path):
    """A file of 200 MB, most of it zeros."""
    with (tmp_path / "huge.mp4").open("w+b") as file:
        for number in range(200):
            file.seek(number << 20)
            file.write(bytes([number]) * 9)
        file.truncate(200 << 20)
        file.seek(0)
        yield file


@pytest.mark.skipif(not pathlib.Path("/proc/self/statm").exists(), reason="no /proc here")
@pytest.mark.parametrize("keyless", [False, True])
async def test_a_clip_of_200_mb_passes_in_constant_memory(world, huge, keyless):
    def resident():
        pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    w = await world(**QUICK)
    video, w.fault = await made(w), fault("^/media/", lambda r: web.FileResponse(huge.name))
    url = video["url"] if keyless else f"{w.url}/v1/videos/{video['id']}/content"
    peak, before = 0, resident()
    async with w.http.get(url, headers={"Authorization": f"Bearer {w.key}"}) as reply:
        async for chunk in reply.content.iter_chunked(1 << 18):
            assert chunk == huge.read(len(chunk))
            peak = max(peak, resident() - before)
    assert huge.tell() == 200 << 20 == int(reply.headers["Content-Length"]) and peak < 30 << 20


async def test_ranges_at_the_same_time_do_not_mix(world, huge):
    w = await world(**QUICK)
    video, w.fault = await made(w), fault("^/media/", lambda r: web.FileResponse(huge.name))
    spans = ((0, 5), ((1 << 20) - 3, (1 << 20) + 7), (150 << 20, 158 << 20), (9, 3 << 20))
    asks = (download(w, video["id"], Range=f"bytes={a}-{b - 1}") for a, b in spans)
    for (a, b), (status, headers, body) in zip(spans, await asyncio.gather(*asks), strict=True):
        huge.seek(a)
        assert (status, body == huge.read(b - a)) == (206, True)
        assert headers["Content-Range"] == f"bytes {a}-{b - 1}/{200 << 20}"


# ---- Videos API: lists, deletes, clips from clips ----


async def walked(w, **query):
    """The ids on all pages, in order."""
    ids, more = [], True
    while more:
        status, _, page = await w.call("GET", "/v1/videos", params=query)
        assert (status, page.pop("object")) == (200, "list"), page
        found = [strict(video)["id"] for video in page.pop("data")]
        first, last = (found[0], found[-1]) if found else (None, None)
        assert len(found) <= int(query.get("limit", 20))
        more, ids, query["after"] = page.pop("has_more"), ids + found, last
        assert type(more) is bool and page == {"first_id": first, "last_id": last}
    return ids


async def test_the_list_walks_over_all_clips_exactly_once(world, monkeypatch):
    """Also where many have been created in the same instant."""
    w = await world(((PRO, 10_000),), video_seconds=600)
    assert await walked(w) == []
    at = time.time()
    monkeypatch.setattr(flow2api, "now", lambda: at)
    early = {await begun(w) for _ in range(12)}
    at += 1
    late = {await begun(w) for _ in range(13)}
    for limit in ("1", "3", "25", "100"):
        up = await walked(w, limit=limit, order="asc")
        assert (set(up[:12]), set(up[12:]), len(up)) == (early, late, 25)
        assert await walked(w, limit=limit, order="desc") == up[::-1] == await walked(w)
    assert await walked(w, after=up[3], order="asc") == up[4:]
    assert await walked(w, after=up[0]) == []


async def test_a_list_that_can_not_be_given_is_refused(world):
    w, values = await world(()), {"limit": ("0", "101", "x", "-1", "²"), "order": ("up", "1")}
    for name, value in ((key, value) for key in values for value in values[key]):
        reply = await w.call("GET", "/v1/videos", params={name: value})
        assert told(w, reply, "invalid_request")["param"] == name
    told(w, await w.call("GET", "/v1/videos?after=video_0123"), "task_not_found")


@pytest.mark.parametrize("prompt", ["a boat", "unsafe"])
async def test_an_ended_video_is_deleted_with_its_file(world, prompt):
    w = await world(**QUICK, **{"cache.enabled": True})
    other, video = await made(w), await begun(w, prompt=prompt)
    await end_of(w, video)
    assert len(list((w.data / "tmp").iterdir())) == (2 if prompt == "a boat" else 1)
    status, _, body = await w.call("DELETE", f"/v1/videos/{video}")
    assert (status, body) == (200, {"id": video, "object": "video.deleted", "deleted": True})
    for method, part in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
        told(w, await w.call(method, f"/v1/videos/{video}{part}"), "task_not_found")
    await w.stop_gateway()
    await w.start_gateway()
    assert await walked(w) == [other["id"]] and len(list((w.data / "tmp").iterdir())) == 1
    assert (await download(w, other["id"]))[2] == file_of(w, other["id"])


async def test_what_is_paid_for_is_not_deleted_and_what_waits_is_cancelled(world):
    w = await world(video_seconds=600)
    only(w).video_concurrency = 1
    first, second = [await begun(w, images=[DATA]) for _ in range(2)]
    await running(w)
    told(w, await w.call("DELETE", f"/v1/videos/{first}"), "conflict")
    assert (await w.call("DELETE", f"/v1/videos/{second}"))[2]["deleted"] is True
    told(w, await w.call("GET", f"/v1/videos/{second}"), "task_not_found")
    assert list(w.jobs.open) == [first] == await walked(w) and not w.pool.waiting
    assert (len(submits(w)), only(w).credits, only(w).reserved) == (1, 980, 0)
    assert not list((w.data / "inputs").iterdir())
    for method, end in (("GET", ""), ("DELETE", ""), ("GET", "/content"), ("POST", "/remix")):
        for video in ("video_0123", "..%2f", "x" * 300):
            told(w, await w.call(method, f"/v1/videos/{video}{end}", BOAT), "task_not_found")


REMIX, CLIP_EDITS, EXTEND = "/v1/videos/ID/remix", "/v1/videos/edits", "/v1/videos/extensions"
SOURCES = (  # path, then the body, or the parts of a form; ID is the source
    (REMIX, {}), (REMIX, {"model": "sora-2"}), (CLIP_EDITS, {"video": {"id": "ID"}}),
    *((path, given) for path in (CLIP_EDITS, EXTEND) for given in (
        {"video": "ID"}, [("video[id]", "ID")])),
    ("/v1/videos", {"remix_target_id": "ID"}), ("/v1/videos", [("remix_target_id", "ID")]),
    (EXTEND, {"video": {"id": "ID"}, "seconds": "8"}),
    (EXTEND, {"video": "ID", "model": "veo_3_1-fast"}),
)  # fmt: skip


async def derive(w, path, given, source, **more):
    """Asks for a clip from a clip -> the answer."""
    path, more = path.replace("ID", source), {"prompt": "at night"} | more
    if isinstance(given, list):
        parts = [(name, source if value == "ID" else value) for name, value in given]
        return await w.call("POST", path, data=multipart(*parts, **more))
    return await w.call("POST", path, more | json.loads(json.dumps(given).replace("ID", source)))


@pytest.mark.parametrize(("path", "given"), SOURCES)
@pytest.mark.parametrize(("tier", "ratio"), [(PRO, "portrait"), (ULTRA, "landscape")])
async def test_a_clip_from_a_clip_is_made_where_that_is(world, tier, ratio, path, given):
    w = await world(((tier, 500), (tier, 1000), (tier, 600)), **QUICK)
    source, (one, owner, other) = await made(w, orientation=ratio), tokens_of(w)
    one.credits, owner.credits, other.credits = 900, 20, 900  # another would be first now
    project, owner.project_id = owner.project_id, str(uuid.uuid4())
    bearers = []

    async def listen(request, handler):
        bearers.extend([flow2api.bearer(request)] if re.search(PAID, request.path) else [])
        return await handler(request)

    w.fault = listen
    video = video_of(await derive(w, path, given, source["id"], async_mode="false"), "completed")
    assert (video["remixed_from_video_id"], video["prompt"]) == (source["id"], "at night")
    assert (video["size"], video["seconds"]) == (source["size"], source["seconds"])
    mode, key = "EditVideo", "abra_edit"
    if path == EXTEND:
        ultra = "_ultra" if tier == ULTRA else ""
        mode, key = "ExtendVideo", f"veo_3_1_extend_fast_{ratio}{ultra}"
    (body,) = w.asked(mode)
    assert (body["clientContext"]["projectId"], bearers) == (project, [owner.at])
    (wanted,) = body["requests"]
    assert wanted["videoInput"] == {"mediaId": w.store.job(source["id"]).outputs[0].media}
    assert (wanted["videoModelKey"], wanted["aspectRatio"][19:].lower()) == (key, ratio)
    assert prompt_of(w) == "at night"
    assert (await download(w, video["id"]))[2] == file_of(w, video["id"])


async def test_clips_of_chats_and_remixes_stand_in_the_list_and_can_be_remixed(world):
    w = await world(**QUICK)
    asks = ({"model": "nano_banana_pro"}, {"text": "unsafe"}, {})
    _, failed, source = ids = [(await w.chat(**fields))[1]["X-Job-Id"] for fields in asks]
    assert await walked(w) == [source, failed]  # and no pictures
    for _ in range(2):
        video = video_of(await derive(w, REMIX, {"metadata": {"a": 1}}, source), *STATES[:2])
        assert (video["remixed_from_video_id"], video["metadata"]) == (source, {"a": 1})
        await end_of(w, source := video["id"])
        ids.append(source)
    assert await walked(w, order="asc") == ids[1:]
    await shown(w, source, "completed")


async def test_what_can_be_extended(world):
    w = await world(((ULTRA, 1000),), **QUICK)
    short, omni = [(await made(w, model=m))["id"] for m in ("veo_3_1-fast-4s", "omni_flash")]
    assert video_of(await derive(w, EXTEND, {"video": "ID"}, short))["seconds"] == "8"
    error = told(w, await derive(w, EXTEND, {"video": "ID"}, omni), "mode_not_available")
    assert "extension" in error["message"]


# fmt: off
NOT_MADE = (  # code, param, path, body or form: refused before anything is sent
    ("invalid_request", "prompt", REMIX, {"prompt": ""}),
    *(("invalid_request", "video", path, given) for path in (CLIP_EDITS, EXTEND) for given in (
        {}, {"video": ""}, {"video": {}}, {"video": {"id": 5}}, {"video": ["ID"]},
        [("video", demo_flow2api.CLIP)])),
    ("task_not_found", None, REMIX.replace("ID", "video_0123"), {}),
    ("task_not_found", None, CLIP_EDITS, {"video": {"id": "video_0123"}}),
    ("task_not_found", None, "/v1/videos", {"remix_target_id": "video_0123"}),
    ("invalid_request", "size", REMIX, {"size": "1280x720"}),
    ("invalid_request", "seconds", REMIX, {"seconds": "10"}),
    ("invalid_request", "n", REMIX, {"n": 2}), ("invalid_image", "image", REMIX, {"image": DATA}),
    ("unsupported_parameter", "style_id", REMIX, {"style_id": "anime"}),
    ("mode_not_available", "model", EXTEND, {"video": "ID", "model": "omni_flash"}),
    ("invalid_request", "model", EXTEND, {"video": "ID", "model": "nano_banana_pro"}),
    ("model_not_found", "model", EXTEND, {"video": "ID", "model": "veo_9"}),
    *(("invalid_request", "model", "/v1/videos", {"default": "nano_banana_pro", "seconds": seconds})
      for seconds in ("", 8)),
    *(("invalid_request", "seconds", "/v1/videos", {"model": "veo_3_1-fast", "seconds": seconds})
      for seconds in (7, "10")),
    ("mode_not_available", "model", "/v1/videos", {"model": "veo_3_1", "images": [DATA] * 3}),
)
BAD_FIELDS = (  # code, param, field, values: refused before anything is sent
    ("invalid_request", "prompt", "prompt", (None, "", "  ", 5, ["a"])),
    ("invalid_request", "n", "n", (2, "2", 0, [1])),
    ("invalid_request", "seconds", "seconds", ("x", -4, 8.5, [8], "9" * 9)),
    ("invalid_request", "size", "size", ("wide", "0x1", 5, {"a": 1})),
    ("invalid_request", "metadata", "metadata", ("no JSON", "[1]", [1], 5, "[" * 99_999,
     '{"a":' * 99_999, {"a": "x" * 20_000}, '{"a": NaN}', {"a": float("nan")})),
    ("invalid_request", "model", "model", ("nano_banana_pro", "veo_3_1_extend_fast_portrait", 5)),
    ("model_not_found", "model", "model", ("veo_9", "gpt-4o")),
    ("tier_required", None, "model", ("veo_3_1-4k",)),
    *(("unsupported_parameter", name, name, ("x",)) for name in flow2api.SORA_ONLY
      if name != "remix_target_id"),
    ("invalid_image", "image", "image", ("****", 5, data_url(b"text"), [DATA] * 4)),
    ("invalid_image", "input_reference", "input_reference", ({"file_id": "file-1"},)),
)
NOT_MADE += tuple((*r[:2], "/v1/videos", {r[2]: value}) for r in BAD_FIELDS for value in r[3])
# fmt: on


@pytest.mark.parametrize(("code", "param", "path", "given"), NOT_MADE, ids=lambda x: f"{x}"[:40])
async def test_what_can_not_be_made_is_refused_unsent(world, code, param, path, given):
    w = await world(**QUICK)
    source = (await made(w))["id"]
    w.live.layers["file"]["videos.default_model"] = dict(given).get("default", "veo_3_1-fast")
    w.demo.calls.clear()
    reply = await derive(w, path, given, source)
    error = told(w, reply, code)
    assert error["param"] == param and len(error["message"]) < 400
    assert "x-should-retry" not in reply[1]
    assert not w.demo.calls and not w.jobs.open and await walked(w) == [source]


@pytest.mark.parametrize(("path", "given"), [(REMIX, {}), (CLIP_EDITS, {"video": "ID"})])
async def test_a_source_that_is_no_finished_clip_is_refused(world, path, given):
    w = await world(**QUICK)
    picture = (await w.chat("nano_banana_pro"))[1]["X-Job-Id"]
    await end_of(w, failed := await begun(w, prompt="unsafe"))
    w.demo.video_seconds = 600
    going = await begun(w)
    await running(w)
    told(w, await derive(w, path, given, going), "task_not_completed")
    assert told(w, await derive(w, path, given, picture), "invalid_request")["param"] == "video"
    status, _, body = await derive(w, path, given, failed)
    assert (status, body["error"]["code"]) == (400, "generation_failed")
    assert len(submits(w)) == 2 and list(w.jobs.open) == [going]


async def test_without_the_account_of_its_source_a_clip_can_not_be_made(world):
    """Its file is there as long as its link lives."""
    w = await world(((PRO, 1000), (PRO, 100)), **QUICK)
    source, admin = (await made(w))["id"], await w.admin()
    assert (await w.call("DELETE", "/api/tokens/1", key=admin))[0] == 200
    error = told(w, await derive(w, REMIX, {}, source), "no_accounts")
    assert "account that made this clip" in error["message"] and not w.jobs.open
    await shown(w, source, "completed")
    assert (await download(w, source))[2] == file_of(w, source)


# ---- Videos API: what lasts, and what is told of it ----


async def test_asynchronous_jobs_survive_a_restart(world, clock):
    w = await world(video_seconds=600)
    only(w).video_concurrency = 1
    ids = [await begun(w, images=[DATA]) for _ in range(3)]
    await running(w)
    await w.stop_gateway()
    await w.start_gateway()
    assert [(await shown(w, i))["status"] for i in ids] == ["in_progress", "queued", "queued"]
    w.demo.video_seconds, clock.ahead = 0.01, 700
    assert [(await end_of(w, video)).state for video in ids] == ["completed"] * 3
    assert [mode for mode, _ in submits(w)] == ["StartImage"] * 3
    await w.stop_gateway()
    await w.start_gateway()
    for video in ids:
        await shown(w, video, "completed")
        assert (await download(w, video))[2] == file_of(w, video)


async def test_no_look_at_a_video_is_a_call_to_flow(world, clock):
    w = await world(video_seconds=0.01, **{"generation.video_timeout": 86400})
    done, failed = (await made(w))["id"], await begun(w, prompt="unsafe")
    await end_of(w, failed)
    w.demo.video_seconds = 10**6
    going = await begun(w)
    await running(w)
    clock.ahead = 20_000  # the links have expired; the open clip is polled all the time
    w.fault = fault("^(?!.*(batchCheck|auth/session))", dropped)
    for video, state in ((done, "completed"), (failed, "failed"), (going, "in_progress")):
        await shown(w, video, state)
    assert len(await walked(w)) == 3
    for part in ("pending-tasks", "pending-tasks-v2", "profile-feed", f"tasks/{done}"):
        assert (await w.call("GET", f"/v1/tokens/1/{part}"))[0] == 200
    assert not w.fault.seen


async def test_the_statistics_are_eight_counters(world):
    w = await world(((PRO, 1000), (PRO, 0)), **QUICK)
    await w.chat("nano_banana_pro", n=2)
    await made(w)
    w.fault = fault(PAID, refusal(403, "PUBLIC_ERROR_UNUSUAL_ACTIVITY"), times=1)
    await w.chat()
    await w.pool.update(tokens_of(w)[1], is_active=False)
    counts = {"total_tokens": 2, "active_tokens": 1}
    for day in ("total", "today"):
        counts |= {f"{day}_images": 2, f"{day}_videos": 1, f"{day}_errors": 1}
    for path, key in (("/v1/stats", w.key), ("/api/stats", await w.admin())):  # flat and wrapped
        wanted = {"success": True, "stats": counts} | counts
        assert (await w.call("GET", path, key=key))[2] == wanted


async def test_the_tasks_of_an_account(world):
    w = await world(((PRO, 1000), (PRO, 30)), **QUICK)
    done, picture = (await made(w))["id"], (await w.chat("nano_banana_pro"))[1]["X-Job-Id"]
    w.demo.video_seconds = 600
    going = await begun(w, prompt="a lake")
    await running(w)

    async def get(path):
        status, _, body = await w.call("GET", f"/v1/tokens/{path}")
        assert (status, body["success"]) == (200, True), body
        return body

    async def feed(path):
        return [item["id"] for item in (await get(path))["items"]]

    for path in ("pending-tasks", "pending-tasks-v2"):
        answer = await get(f"1/{path}")
        ((task,), told_) = answer["tasks"], (answer["token_id"], answer["count"])
        assert told_ == (1, 1) and 0 <= task["progress_pct"] < 1
        assert (task["id"], task["status"], task["prompt"]) == (going, "in_progress", "a lake")
        assert (await get(f"2/{path}"))["tasks"] == []
    assert await feed("1/profile-feed") == [picture, done] and await feed("2/profile-feed") == []
    assert await feed("1/profile-feed?limit=1") == [picture]
    task = (await get(f"1/tasks/{done}"))["task"]
    assert {"id", "status", "prompt", "title", "progress_pct", "generations"} == set(task)
    assert (task["status"], task["progress_pct"]) == ("completed", 1)
    assert (await fetched(w, task["generations"][0]["url"]))[2] == file_of(w, done)
    for path in (f"2/tasks/{done}", "1/tasks/video_0123"):
        told(w, await w.call("GET", f"/v1/tokens/{path}"), "task_not_found")
    for path in ("pending-tasks", "pending-tasks-v2", "profile-feed", f"tasks/{going}"):
        told(w, await w.call("GET", f"/v1/tokens/9/{path}"), "not_found")


@pytest.mark.parametrize("prefix", ["/v1", "", "/flow/v1", "/v1/v1"])
async def test_the_videos_api_under_each_of_its_addresses(world, prefix):
    w = await world(**QUICK)
    video = video_of(await ask(w, f"{prefix}/videos", async_mode=False), "completed")
    path = f"{prefix}/videos/{video['id']}"
    assert video_of(await w.call("GET", path)) == video
    assert (await w.call("GET", f"{path}/content"))[2] == file_of(w, video["id"])
    for part in (f"{video['id']}/remix", "edits", "extensions"):
        video_of(await ask(w, f"{prefix}/videos/{part}", video=video["id"], async_mode=False))
    assert [mode for mode, _ in submits(w)] == ["Text", "EditVideo", "EditVideo", "ExtendVideo"]
    assert len((await w.call("GET", f"{prefix}/videos"))[2]["data"]) == 4
    assert (await w.call("DELETE", path))[2]["deleted"] is True
    assert (await w.call("GET", f"{prefix}/stats"))[2]["stats"]["total_videos"] == 4
    assert len((await w.call("GET", f"{prefix}/tokens/1/profile-feed"))[2]["items"]) == 3
    for method, end in (("POST", ""), ("GET", ""), ("GET", "/x"), ("GET", "/x/content")):
        reply = await w.call(method, f"{prefix}/videos{end}", key="sk-wrong")
        told(w, reply, "invalid_api_key")


# ---- OpenAI's own client: pictures and videos ----

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API is scheduled:DeprecationWarning")


@pytest.fixture
async def sdk(openai):
    """OpenAI's client of a world: `sdk(w, **options)`."""
    async with contextlib.AsyncExitStack() as stack:

        def client(w, **options):
            made = openai.AsyncOpenAI(base_url=w.url + "/v1", api_key=w.key, **options)
            stack.push_async_callback(made.close)
            return made

        yield client


def files_of(w, prompt):
    """What the simulated Flow has made of a prompt, sorted."""
    return sorted(medium.file() for medium in w.demo.media.values() if medium.prompt == prompt)


def pictures_in(items):
    return sorted(base64.b64decode(item.b64_json) for item in items)


async def finished(client, prompt="a boat", **options):
    """A clip, once it is done."""
    video = await client.videos.create(prompt=prompt, **options)
    return await client.videos.poll(video.id, poll_interval_ms=20)


async def test_openais_client_finds_each_model_of_the_list(world, sdk, openai):
    client = sdk(await world())
    listed = [model async for model in client.models.list()]
    assert {"veo_3_1", "omni_flash", "imagen_4", "nano_banana_pro-4K"} <= {m.id for m in listed}
    for model in listed[::20]:
        assert await client.models.retrieve(model.id) == model
        assert (model.object, type(model.created)) == ("model", int) and model.owned_by
    with pytest.raises(openai.NotFoundError) as caught:
        await client.models.retrieve("veo_9")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


async def test_openais_client_makes_pictures(world, sdk):
    w = await world()
    generate, boat = sdk(w).images.generate, {"prompt": "a boat", "model": "nano_banana_pro"}
    [made] = (await generate(**boat)).data
    assert pictures_in([made]) == files_of(w, "a boat") and made.url is None
    answer = await generate(prompt="two boats", model="gpt-image-1", n=2, size="1536x1024")
    assert pictures_in(answer.data) == files_of(w, "two boats") and len(answer.data) == 2
    [made] = (await generate(**boat, response_format="url")).data
    assert made.b64_json is None
    async with w.http.get(made.url) as reply:
        assert await reply.read() in files_of(w, "a boat")


async def test_openais_client_makes_pictures_in_a_stream(world, sdk, openai):
    w = await world()
    asked, images = {"prompt": "ships", "n": 2, "stream": True}, sdk(w).images
    edit = functools.partial(images.edit, image=PNG)
    for kind, make in ("generation", images.generate), ("edit", edit):
        events = [event async for event in await make(**asked)]
        assert [event.type for event in events] == [f"image_{kind}.completed"] * 2
        assert pictures_in(events) == files_of(w, "ships")
        assert events[0].usage.total_tokens == 0 and type(events[0].created_at) is int
        with pytest.raises(openai.APIError, match="content policy"):
            await anext(aiter(await make(prompt="unsafe", stream=True)))
        w.demo.media.clear()


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("form", ["bytes", "file", "named"])
async def test_openais_client_edits_pictures(world, sdk, tmp_path, form, count):
    w = await world()
    (tmp_path / "a.png").write_bytes(PNG)
    with (tmp_path / "a.png").open("rb") as one, (tmp_path / "a.png").open("rb") as other:
        named = ("b.jpg", PNG, "image/jpeg")
        given = {"bytes": [PNG, PNG], "file": [one, other], "named": [named, named]}[form]
        given = given[0] if count == 1 else given
        answer = await sdk(w).images.edit(image=given, prompt="a boat", model="nano_banana_2")
    assert pictures_in(answer.data) == files_of(w, "a boat") != []
    [asked] = w.asked("batchGenerateImages")
    assert len(asked["requests"][0]["imageInputs"]) == count == len(w.asked("uploadImage"))


async def test_openais_client_follows_a_clip_from_its_order_to_its_file(world, sdk):
    w = await world()
    videos = sdk(w).videos
    raw = await videos.with_raw_response.create(prompt="a boat")
    video = raw.parse()
    assert raw.headers["openai-poll-after-ms"] == "5000"
    assert (video.object, video.status, video.progress) == ("video", "queued", 0)
    assert (video.seconds, video.size, video.prompt) == ("8", "720x1280", "a boat")
    assert (await videos.retrieve(video.id)).status in ("queued", "in_progress")
    video = await videos.poll(video.id, poll_interval_ms=20)
    assert (video.status, video.progress, video.error) == ("completed", 100, None)
    assert type(video.created_at) is type(video.completed_at) is int
    clip = await videos.download_content(video.id)
    assert clip.response.headers["Content-Type"] == "video/mp4"
    assert [clip.read()] == files_of(w, "a boat")
    assert (await videos.download_content(video.id, variant="thumbnail")).read() == PNG


@pytest.mark.parametrize("form", ["bytes", "named", "url"])
async def test_openais_client_makes_a_clip_from_a_picture(world, sdk, form):
    w = await world()
    given = {"input_reference": PNG if form == "bytes" else ("a.png", PNG, "image/png")}
    if form == "url":
        given = {"extra_body": {"input_reference": {"image_url": data_url(PNG)}}}
    wanted = {"model": "omni_flash", "seconds": "4", "size": "1280x720"}
    given |= wanted | {"prompt": "a boat", "poll_interval_ms": 20}
    video = await sdk(w).videos.create_and_poll(**given)
    assert {name: getattr(video, name) for name in wanted} == wanted
    assert video.status == "completed" and len(w.asked("uploadImage")) == 1
    [asked] = w.asked("batchAsyncGenerateVideo")
    assert asked["requests"][0]["videoModelKey"] == "abra_i2v_4s"
    assert asked["requests"][0]["aspectRatio"].endswith("LANDSCAPE")


async def test_openais_client_turns_the_pages_of_the_list(world, sdk):
    videos = sdk(await world()).videos
    made = [(await videos.create(prompt=f"boat {number}")).id for number in range(5)]
    page = await videos.list(limit=2)
    assert [len(one.data) async for one in page.iter_pages()] == [2, 2, 1]
    assert [video.id async for video in videos.list(limit=2)] == made[::-1]
    assert [video.id async for video in videos.list(limit=3, order="asc")] == made
    assert [video.id async for video in videos.list(after=made[2])] == made[1::-1]


async def test_openais_client_makes_clips_from_a_clip(world, sdk, openai):
    w = await world()
    videos = (client := sdk(w)).videos
    clip = await finished(client, size="1280x720")
    by_id = {"video": openai.omit, "extra_body": {"video": {"id": clip.id}}}
    made = [
        await videos.remix(clip.id, prompt="remix"),
        await videos.remix(clip.id, prompt="named", extra_body={"model": "veo_3_1"}),
        await videos.edit(prompt="edit", **by_id),
        await videos.extend(prompt="longer", seconds="8", **by_id),
    ]
    for prompt, video in zip(("remix", "named", "edit", "longer"), made, strict=True):
        assert video.remixed_from_video_id == clip.id
        video = await videos.poll(video.id, poll_interval_ms=20)
        assert (video.status, video.size, video.prompt) == ("completed", "1280x720", prompt)
        assert [(await videos.download_content(video.id)).read()] == files_of(w, prompt)
    keys = {body["requests"][0]["videoModelKey"] for body in w.asked("AsyncGenerateVideo")[1:]}
    assert keys == {"abra_edit", "veo_3_1_extend_fast_landscape"}


async def test_openais_client_deletes_a_clip(world, sdk, openai):
    videos = (client := sdk(await world())).videos
    video = await finished(client)
    deleted = await videos.delete(video.id)
    assert (deleted.id, deleted.deleted, deleted.object) == (video.id, True, "video.deleted")
    for call in (videos.retrieve, videos.download_content, videos.delete):
        with pytest.raises(openai.NotFoundError, match="There is no video") as caught:
            await call(video.id)
        assert caught.value.code == "task_not_found"


async def test_openais_client_tells_why_a_clip_has_failed(world, sdk, openai):
    w = await world()
    video = await finished(client := sdk(w), "unsafe")
    assert (video.status, video.error.code) == ("failed", "content_policy_violation")
    assert "content policy" in video.error.message
    with pytest.raises(openai.BadRequestError, match="content policy") as caught:
        await client.videos.download_content(video.id)
    assert caught.value.code == "generation_failed"
    assert len(w.asked("batchAsyncGenerateVideo")) == 1


async def test_openais_client_raises_the_right_error_for_a_mistake(world, sdk, openai):
    client = sdk(await world(), max_retries=0)
    create, edit = client.videos.create, functools.partial(client.images.edit, image=PNG)
    other, change = client.with_options(api_key="sk-wrong").videos.create, client.videos.edit
    for error, code, call, given in (
        (openai.AuthenticationError, "invalid_api_key", other, {}),
        (openai.NotFoundError, "model_not_found", create, {"model": "veo_9"}),
        (openai.BadRequestError, "invalid_request", create, {"model": "veo_3_1", "seconds": "5"}),
        (openai.BadRequestError, "invalid_image", create, {"input_reference": b"no picture"}),
        (openai.BadRequestError, "unsupported_parameter", edit, {"mask": PNG}),
        (openai.BadRequestError, "invalid_request", change, {"video": b"an upload"}),
    ):
        with pytest.raises(error) as caught:
            await call(prompt="a boat", **given)
        assert caught.value.code == code


async def test_openais_client_hears_of_a_full_queue_and_of_what_is_too_early(world, sdk, openai):
    w = await world(video_seconds=600, **{"limits.queue": 1})
    videos = sdk(w, max_retries=0).videos
    await w.pool.update(only(w), video_concurrency=1)
    video = await videos.create(prompt="a boat")
    await running(w)
    await videos.create(prompt="a boat that waits")
    await until(lambda: w.pool.waiting)
    with pytest.raises(openai.RateLimitError) as caught:
        await videos.create(prompt="a boat too many")
    assert caught.value.code == "queue_full"
    assert int(caught.value.response.headers["Retry-After"]) > 0
    with pytest.raises(openai.BadRequestError, match="not completed"):
        await videos.download_content(video.id)
    with pytest.raises(openai.ConflictError):
        await videos.delete(video.id)


async def test_openais_client_posts_once_what_has_failed_at_flow(world, sdk, openai, looks):
    """A failure after which the account goes on, so that a second POST would pay again."""
    w, posts = await world(), []
    client, waits = sdk(w), {"extra_body": {"async_mode": "false"}}
    w.fault = fault(PAID, dropped)
    for create in (
        lambda: client.images.generate(prompt="a boat"),
        lambda: client.images.edit(prompt="a boat", image=PNG),
        lambda: client.videos.create(prompt="a boat", **waits),
        lambda: client.chat.completions.create(**chat_body("imagen_4", "a boat")),
    ):
        with pytest.raises(openai.APIStatusError) as caught:
            await create()
        assert caught.value.code == "submit_unknown"
        posts.append(len(w.fault.seen))
    assert posts == [1, 2, 3, 4] and len(w.store.jobs()) == 4


async def test_openais_client_puts_a_streamed_chat_together(world, sdk):
    w = await world(**{"cache.enabled": True})
    chat, asked = sdk(w).chat.completions, chat_body("omni_flash-4s", "a boat")
    whole = await chat.create(**asked)
    assert (whole.model, whole.choices[0].finish_reason) == ("omni_flash-4s", "stop")
    async with chat.stream(**asked, stream_options={"include_usage": True}) as events:
        chunks = [event.chunk async for event in events if event.type == "chunk"]
        streamed = await events.get_final_completion()
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    thoughts = "".join(getattr(delta, "reasoning_content", "") for delta in deltas)
    assert "generating" in thoughts and streamed.usage.total_tokens == 0
    for answer in (whole, streamed):
        async with w.http.get(links_in(answer.choices[0].message.content)[0]) as reply:
            assert await reply.read() in files_of(w, "a boat")


# Each curl command of the documents that Flow2API was made from, word for word but for line breaks,
# addresses, keys, ids and pictures; before it the status, and what the answer holds.
OLD_CURL_LINES = r"""
= 200 [DONE] = curl --location --request POST 'HOST/flow/v1/chat/completions' \
--header 'Content-Type: application/json' --header 'Authorization: KEY' --data-raw '{"messages":
    [{"role": "user", "content": "画只猪在天上飞"}], "model": "veo_3_1", "stream": true, "n": 2}'
= 200 [DONE] = curl --location --request POST 'HOST/flow/v1/chat/completions' \
--header 'Content-Type: application/json' --header 'Authorization: KEY' --data-raw '{"messages":
    [{"role": "user", "content": [{"type": "text", "text": "根据两张图片生成一个完全的过渡视频"},
    {"type": "image_url", "image_url": {"url": "DATA"}}, {"type": "image_url", "image_url": {"url":
    "DATA"}}]}], "model": "veo_3_1-fl-fast", "stream": true, "n": 2}'
= 200 "status": "queued" = curl --location --request POST 'HOST/flow/v1/videos' \
--header 'Authorization: KEY' --header 'Content-Type: application/json' --data-raw '{"prompt":
    "画小猫", "model": "veo_3_1"}'
= 200 "status": "completed" = curl --location --request GET 'HOST/flow/v1/videos/ID' \
--header 'Authorization: KEY' \
= 200 "remixed_from_video_id": "video_ = curl --location --request POST \
'HOST/flow/v1/videos/ID/remix' --header 'Authorization: KEY' \
--header 'Content-Type: application/json' --data-raw '{"prompt": "再加一只小狗", "model":
    "veo_3_1"}'
= 200 ftyp = curl --location --request GET 'HOST/flow/v1/videos/ID/content' \
--header 'Authorization: KEY' \
= 200 [DONE] = curl -X POST 'HOST/flow/v1/chat/completions' \
--header 'Content-Type: application/json' --header 'Authorization: Bearer KEY' --data '{"messages":
    [{"role": "user", "content": "画只猪在天上飞"}], "model": "veo_3_1", "stream": true, "n": 2}'
= 200 [DONE] = curl -X POST 'HOST/flow/v1/chat/completions' \
--header 'Content-Type: application/json' --header 'Authorization: Bearer KEY' --data '{"messages":
    [{"role": "user", "content": [{"type": "text", "text": "根据两张图片生成一个完整的过渡视频"},
    {"type": "image_url", "image_url": {"url": "DATA"}}, {"type": "image_url", "image_url": {"url":
    "DATA"}}]}], "model": "veo_3_1-fl-fast", "stream": true, "n": 2}'
= 200 b64_json = curl -X POST 'HOST/flow/v1/images/generations' \
--header 'Authorization: Bearer KEY' --header 'Content-Type: multipart/form-data' \
--form 'prompt="画小猫"' --form 'model="nano_banana"'
= 200 b64_json = curl -X POST 'HOST/flow/v1/images/edits' --header 'Authorization: Bearer KEY' \
--header 'Content-Type: multipart/form-data' --form 'image[]=@"example.jpg"' \
--form 'prompt="换一个风格"' --form 'model="nano_banana"'
= 200 "status": "queued" = curl -X POST 'HOST/flow/v1/videos' --header 'Authorization: Bearer KEY' \
--header 'Content-Type: application/json' --data '{"prompt": "画小猫", "model": "veo_3_1"}'
= 200 "status": "queued" = curl -X POST 'HOST/flow/v1/videos' --header 'Authorization: Bearer KEY' \
--header 'Content-Type: application/json' --data '{"prompt": "画小猫", "model": "veo_3_1",
    "input_reference": ["DATA", "DATA"]}'
= 200 "status": "completed" = curl -X GET 'HOST/flow/v1/videos/ID' \
--header 'Authorization: Bearer KEY'
= 200 ftyp = curl -X GET 'HOST/flow/v1/videos/ID/content' --header 'Authorization: Bearer KEY'
= 200 [DONE] = curl --location --request POST 'HOST/flow/v1/chat/completions' \
--header 'Content-Type: application/json' --header 'Authorization: KEY' --data-raw '{"messages":
    [{"role": "user", "content": [{"type": "text", "text": "根据两张图片生成一个完整的过渡视频"},
    {"type": "image_url", "image_url": {"url": "DATA"}}, {"type": "image_url", "image_url": {"url":
    "DATA"}}]}], "model": "veo_3_1-fl-fast", "stream": true, "n": 2}'
= 200 "data" = curl -X GET "HOST/v1/models" -H "Authorization: Bearer KEY"
= 404 model_not_found = curl -X POST "HOST/v1/chat/completions" -H "Authorization: Bearer KEY" \
-H "Content-Type: application/json" -d '{"model": "sora-video-landscape-10s", "messages": [{"role":
    "user", "content": "A beautiful sunset over the ocean"}], "stream": true}'
= 404 model_not_found = curl -X POST "HOST/v1/chat/completions" -H "Authorization: Bearer KEY" \
-H "Content-Type: application/json" -d '{"model": "sora-video-landscape-10s", "messages": [{"role":
    "user", "content": "Make this image come alive"}], "image": "BASE64", "stream": true}'
= 200 "size": "1280x720" = curl -X POST "HOST/v1/videos" -H "Authorization: Bearer KEY" \
-H "Content-Type: application/json" -d '{"prompt": "A cat playing with a ball", "model": "sora-2",
    "seconds": "10", "size": "1280x720"}'
= 200 "seconds": "8" = curl -X POST "HOST/v1/videos" -H "Authorization: Bearer KEY" \
-F "prompt=A cat playing with a ball" -F "model=sora-2" -F "seconds=10" \
-F "input_reference=@reference.jpg;type=image/jpeg"
= 200 "status": "completed" = curl -X GET "HOST/v1/videos/ID" -H "Authorization: Bearer KEY"
= 200 = curl -X GET "HOST/v1/videos/ID/content" -H "Authorization: Bearer KEY" -L -o video.mp4
= 200 Content-Type: video/mp4 = curl -X GET "HOST/v1/videos/ID/content" \
-H "Authorization: Bearer KEY" -I
= 200 "remixed_from_video_id": "video_ = curl -X POST "HOST/v1/videos/ID/remix" \
-H "Authorization: Bearer KEY" -H "Content-Type: application/json" -d '{"prompt":
    "Make it more colorful and vibrant"}'
= 200 b64_json = curl -X POST "HOST/v1/images/generations" -H "Authorization: Bearer KEY" \
-H "Content-Type: application/json" -d '{"model": "gpt-image-2", "prompt":
    "A 16:9 cinematic cyberpunk city poster", "size": "16:9", "n": 1}'
= 200 b64_json = curl -X POST "HOST/v1/images/generations" -H "Authorization: Bearer KEY" \
-H "Content-Type: application/json" -d '{"model": "gpt-image-2", "prompt":
    "Use this reference and turn it into a vintage movie poster", "size": "3:2", "image": "LINK"}'
= 200 b64_json = curl -X POST "HOST/v1/images/generations" -H "Authorization: Bearer KEY" \
-H "Content-Type: application/json" -d '{"model": "gpt-image-2", "prompt":
    "Blend the subjects and colors from these references into a product key visual", "size": "1:1",
    "image": ["LINK", "data:image/png;base64,BASE64", {"url": "LINK"}]}'
= 200 b64_json = curl -X POST "HOST/v1/images/edits" -H "Authorization: Bearer KEY" \
-H "Content-Type: application/json" -d '{"model": "gpt-image-2", "prompt":
    "Use the first image as the subject and the second image as the color reference", "size": "1:1",
    "image": ["LINK", "data:image/png;base64,BASE64"]}'
= 200 b64_json = curl -X POST "HOST/v1/images/edits" -H "Authorization: Bearer KEY" \
-F "model=gpt-image-2" -F "prompt=Blend these references into one consistent poster style" \
-F "size=3:2" -F "image[]=@./subject.png" -F "image[]=@./style.png"
= 501 not_implemented = curl -X POST "HOST/v1/characters" -H "Authorization: Bearer KEY" \
-F "model=sora-video-10s" -F "video=@character_video.mp4;type=video/mp4" -F "timestamps=0,3" \
-F "username=my_character" -F "display_name=My Character" \
-F "instruction_set=Always speak politely." -F "safety_instruction_set=Avoid unsafe content."
= 501 not_implemented = curl -X POST "HOST/v1/characters" -H "Authorization: Bearer KEY" \
-H "Content-Type: application/json" -d '{"model": "sora-video-10s", "video":
    "base64_encoded_video_data", "timestamps": "0,3", "username": "my_character", "display_name":
    "My Character", "instruction_set": "Always speak politely.", "safety_instruction_set":
    "Avoid unsafe content."}'
= 200 "total_videos" = curl -X GET "HOST/v1/stats" -H "Authorization: Bearer KEY"
= 501 not_implemented = curl -X GET "HOST/v1/invite-codes" -H "Authorization: Bearer KEY"
= 501 not_implemented = curl -X GET "HOST/v1/profiles/john_doe" -H "Authorization: Bearer KEY"
= 501 not_implemented = curl -X GET "HOST/v1/users/user-xxx/feed?limit=10" \
-H "Authorization: Bearer KEY"
= 501 not_implemented = curl -X GET "HOST/v1/characters/search?username=john&intent=cameo&limit=5" \
-H "Authorization: Bearer KEY"
= 501 not_implemented = curl -X GET "HOST/v1/feed?limit=10&cut=nf2_top" \
-H "Authorization: Bearer KEY"
= 501 not_implemented = curl -X POST "HOST/v1/enhance_prompt" -H "Authorization: Bearer KEY" \
-H "Content-Type: application/json" -d '{"prompt": "多镜头多角度拍摄...", "expansion_level": "long",
    "duration_s": 15}'
= 200 "tasks" = curl -X GET "HOST/v1/tokens/1/pending-tasks" -H "Authorization: Bearer KEY"
= 200 "tasks" = curl -X GET "HOST/v1/tokens/1/pending-tasks-v2" -H "Authorization: Bearer KEY"
= 404 task_not_found = curl -X GET "HOST/v1/tokens/1/tasks/task_xxx" \
-H "Authorization: Bearer KEY"
= 200 "items" = curl -X GET "HOST/v1/tokens/1/profile-feed?limit=10" \
-H "Authorization: Bearer KEY"
"""


async def test_old_curl_lines_work_as_they_stand(flow2, tmp_path):
    if not shutil.which("curl"):
        pytest.skip("curl is not installed: the old curl lines were NOT tried")
    quick = {"FLOW2API_DEMO_VIDEO_SECONDS": "0", "FLOW2API_DEMO_IMAGE_SECONDS": "0"}
    program = await flow2("--demo", FLOW2API_SERVER_ALLOW_PRIVATE_URLS="true", **quick)
    real = {"HOST": program.url, "KEY": program.said("api_key"), "DATA": data_url(PNG)}
    real["BASE64"] = base64.b64encode(PNG).decode()
    async with aiohttp.ClientSession(headers={"Authorization": real["KEY"]}) as http:
        body = {"prompt": "a boat", "async_mode": False, "response_format": "url"}
        async with http.post(program.url + "/v1/videos", json=body) as reply:
            real["ID"] = (await reply.json())["id"]
        async with http.post(program.url + "/v1/images/generations", json=body) as reply:
            real["LINK"] = (await reply.json())["data"][0]["url"]
    for name in re.findall(r"@[./\"]*(\w+\.\w+)", OLD_CURL_LINES):
        (tmp_path / name).write_bytes(PNG)
    (tmp_path / ".curlrc").write_text('silent\nwrite-out = "\\n%{http_code}"\n')
    options = {"cwd": tmp_path, "env": environment(CURL_HOME=str(tmp_path))}

    async def tried(line):
        expected, _, text = line.partition(" = ")
        text = re.sub(rf"\b({'|'.join(real)})\b", lambda match: real[match[1]], text) + "\n"
        pipe = asyncio.subprocess.PIPE
        curl = await asyncio.create_subprocess_exec("bash", "-ec", text, stdout=pipe, **options)
        answer, _, status = (await curl.communicate())[0].rpartition(b"\n")
        known, _, part = expected.partition(" ")
        assert (curl.returncode, status.decode()) == (0, known), (text, answer)
        assert part.encode() in answer, (text, answer)

    await asyncio.gather(*map(tried, OLD_CURL_LINES.split("\n= ")[1:]))
    assert b"ftyp" in (tmp_path / "video.mp4").read_bytes()[:12]


# ---- A clip is never lost and never paid twice: faults ----


class Hanging(web.Response):
    """An answer that never comes: until the other side has given up."""

    async def prepare(self, request):
        await until(lambda: not request.transport or request.transport.is_closing(), 60)
        return await super().prepare(request)


class Dripping(web.StreamResponse):
    """An answer that comes blank by blank, without end."""

    async def prepare(self, request):
        await super().prepare(request)
        while True:
            await self.write(b" ")
            await asyncio.sleep(0.01)


class Broken(web.StreamResponse):
    """A file that breaks off."""

    async def prepare(self, request):
        self.content_length = 100_000
        await super().prepare(request)
        await self.write(b"half a file")
        request.transport.close()


ODD = {"error": {"code": "five", "message": ["no"], "details": 5}}
ODD_LISTING = {"result": {"data": {"json": {"status": "OK"}}}}
ODD_LINK = {"generatedImage": {"fifeUrl": "http://["}}
SILENT = LOST | {  # answers that do not say whether Flow has done what it was asked
    "nothing at all": lambda request: Hanging(),
    "a slow drip": lambda request: Dripping(),
    "an odd error": lambda request: web.json_response(ODD, status=500),
    "an odd name": lambda request: web.json_response({"media": [{"name": 5}]}),
    "an odd address": lambda request: web.json_response(
        {"media": [new_image("x", image=ODD_LINK)]}
    ),
}
# fmt: off
ORDERS = {  # prompt -> path and body
    "chat": lambda text: (POST[1], chat_body("veo_3_1-fast", text)),
    "clip": lambda text: (VIDEOS, {"prompt": text, "model": "veo_3_1-fast", "async_mode": False}),
    "picture": lambda text: (IMAGES, {"prompt": text}),
    "stream": lambda text: (POST[1], chat_body("veo_3_1-fast", text) | {"stream": True}),
    "two clips": lambda text: (POST[1], chat_body("veo_3_1-fast", text) | {"n": 2}),
    "from a picture": lambda text: (POST[1], chat_body("veo_3_1-fast", text, [data_url(PNG)])),
    "left alone": lambda text: (VIDEOS, {"prompt": text, "model": "veo_3_1-fast"}),
    "pictures": lambda text: (IMAGES, {"prompt": text, "stream": True, "n": 2}),
}
# fmt: on


def at_flow(on, act, times=TIMES):
    """Something happens at Flow when a call comes whose path matches `on`: act(world)."""

    def fault_of(w):
        async def middleware(request, handler):
            if re.search(on, request.path) and len(middleware.seen) < times:
                middleware.seen.append(request.path)
                act(w)
            return await handler(request)

        middleware.seen = []
        return middleware

    return fault_of


def expire(w):
    """Google forgets the access tokens."""
    for account in w.demo.accounts.values():
        account["at"] = ""


def sign_out(w):
    """Google ends the sessions."""
    expire(w)
    w.demo.accounts.clear()


def unplug(w):
    """Nobody listens where the API was."""
    w.live.put("command line", "flow.api_base_url", "http://127.0.0.1:9/v1", "test")


async def nameless(request, handler):
    """The first status answers leave their first clip out; no answer holds an address."""
    answer = await handler(request)
    if not isinstance(answer, web.Response) or answer.content_type != "application/json":
        return answer
    body = json.loads(answer.text.replace("fifeUrl", "url"))
    if "batchCheck" in request.path and len(nameless.seen) < 3:
        nameless.seen.append(body["media"].pop(0))
    return web.json_response(body, status=answer.status)


def together(faults):
    """The list may change while they are at work."""

    async def middleware(request, handler):
        for one in faults:
            handler = functools.partial(one, handler=handler)
        return await handler(request)

    middleware.seen = faults
    return middleware


def unlisted(answer):
    """A submit whose answer is lost, and a listing of another form at first."""
    lost, listing = fault(PAID, dropped, True), fault("projectInitialData", answer, False, 9)
    return lambda w: together([lost, listing])


def fault_of(on, answer, *options):
    return lambda w: fault(on, answer, *options)


# fmt: off
FAULTS = {  # (what happens) -> the fault, how many are accepted of each, the code of the failure
    **{f"{name}, unsent": (fault_of(PAID, SILENT[name]), 0, "submit_unknown") for name in SILENT},
    **{f"{name}, sent": (fault_of(PAID, SILENT[name], True), 1, "") for name in SILENT},
    **{f"{status} {reason}": (fault_of(on, refusal(status, reason)), 0, code)
       for code, status, reason, on in FLOW_SAYS if on == PAID},
    **{f"{name} to a status call": (fault_of("batchCheck", SILENT[name], False, 2), 1, "")
       for name in SILENT},
    **{f"{status} to a status call": (fault_of("batchCheck", refusal(status), False, 3), 1, "")
       for status in (403, 408, 429, 503)},
    **{f"{name} to the question for an address":
       (fault_of("getMediaUrlRedirect", SILENT[name], False, 2), 1, "") for name in SILENT},
    **{f"{status} for a file": (fault_of("^/media/", refusal(status), False, 5), 1, "")
       for status in (403, 404, 500)},
    "half a file": (fault_of("^/media/", lambda request: Broken(), False, 3), 1, ""),
    "a name and the addresses left out": (lambda w: nameless, 1, ""),
    "no listing": (unlisted(lambda request: web.json_response({})), 1, ""),
    "an odd listing": (unlisted(lambda request: web.json_response(ODD_LISTING)), 1, ""),
    "no connection": (unplug, 0, "upstream_unreachable"),
    "access tokens that end before the submit": (at_flow(PAID, expire, 1), 1, ""),
    "access tokens that end after the submit": (at_flow("batchCheck", expire, 1), 1, ""),
    "sessions that end before the submit": (at_flow(PAID, sign_out), 0, "account_session_ended"),
}
# fmt: on


@pytest.mark.parametrize("name", FAULTS)
async def test_a_fault_costs_no_more_than_what_it_has_made(world, looks, impatient, name):
    """A clip by chat, one by the Videos API and a picture, at the same time."""
    timeout = 1 if name.startswith(("nothing at all", "a slow drip")) else 120
    w = await world(video_seconds=0.05, **{"cache.enabled": True, "flow.timeout": timeout})
    ours, nameless.seen = only(w), []
    (account,) = w.demo.accounts.values()
    make, accepted, code = FAULTS[name]
    w.fault = make(w)
    prompts = ("chat", "clip", "picture")
    asked = [w.call("POST", *ORDERS[prompt](prompt)) for prompt in prompts]
    replies, met, w.fault = await asyncio.gather(*asked), w.fault, None
    for prompt, reply in zip(prompts, replies, strict=True):
        made = [medium for medium in w.demo.media.values() if medium.prompt == prompt]
        assert len(made) == accepted, reply
        job = await end_of(w, reply[1]["X-Job-Id"])
        state = (job.state, job.error.get("code", ""))
        assert state == (("failed", code) if code else ("completed", "")), job.error
        if code:
            told(w, reply, code)
        else:
            assert reply[0] == 200, reply
            assert (await download(w, job.id))[2] == made[0].file()
    assert not met or met.seen
    does = flow2api.ERRORS[code][1] if code else ""
    assert (ours.error_count > 0) is (does in ("account", "banning", "session"))
    assert (ours.failures, ours.is_active) == (does == "banning", does != "session")
    assert (account["credits"], ours.busy.total(), ours.reserved) == (1000 - 40 * accepted, 0, 0)


# ---- A clip is never lost and never paid twice: schedules ----

EXCHANGES = (PAID, PAID, PAID, "batchCheck", "projectInitialData", "getMediaUrlRedirect")
EXCHANGES += ("auth/session", "/credits$", "uploadImage", "^/media/")
MOVES = {"ask": 8, "again": 3, "leave": 2, "trouble": 4, "calm": 2, "restart": 1, "delete": 2}
MOVES |= {"switch": 1, "forget": 1, "sign_out": 0.3, "sign_in": 1, "jump": 2, "rest": 6}
RANKS = ("queued", "in_progress", "completed")


class Storm:
    """Carries out moves, each with a number for its choices, and notes what comes of them."""

    def __init__(self, w, clock):
        self.w, self.clock, self.faults, self.sent, self.clients = w, clock, [], [], []
        self.shown, self.deleted = {}, set()  # job id -> (rank of its status, progress)
        self.accounts = list(w.demo.accounts.values())
        w.fault = together(self.faults)

    async def ask(self, number):
        prompt = f"prompt {len(self.sent)}"
        path, body = list(ORDERS.values())[number % len(ORDERS)](prompt)
        self.send(prompt, path, body, f"key of {prompt}" if number & 64 else "")

    async def again(self, number):
        self.send(*self.sent[number % len(self.sent)])

    def send(self, prompt, path, body, key):
        async def client():
            headers = {"Idempotency-Key": key} if key else {}
            with contextlib.suppress(aiohttp.ClientError):
                await self.w.call("POST", path, body, headers=headers)

        self.sent.append((prompt, path, body, key))
        self.clients.append(asyncio.create_task(client()))

    async def leave(self, number):
        self.clients[number % len(self.clients)].cancel()

    async def trouble(self, number):
        chance = random.Random(number)
        on, kind = (
            chance.choice(EXCHANGES),
            chance.choice([*SILENT, *SILENT, *range(len(FLOW_SAYS))]),
        )
        answer = SILENT.get(kind) or refusal(*FLOW_SAYS[kind][1:3])
        if on == "^/media/":
            answer = chance.choice((dropped, refusal(403), refusal(500), lambda request: Broken()))
        through = kind in SILENT and chance.random() < 0.5
        self.faults.append(fault(on, answer, through, chance.choice((1, 3, TIMES))))

    async def calm(self, number):
        self.faults.clear()

    async def restart(self, number):
        await self.w.stop_gateway()
        await self.w.start_gateway()

    async def delete(self, number):
        for job in self.w.store.jobs()[number % 8 :][:1]:
            status, _, body = await self.w.call("DELETE", f"/v1/videos/{job.id}")
            assert status == 200 or body["error"]["code"] == "conflict", body
            self.deleted |= {job.id} if status == 200 else set()

    async def switch(self, number):
        token = tokens_of(self.w)[number % len(self.accounts)]
        await self.w.pool.update(token, is_active=not token.is_active)

    async def forget(self, number):
        expire(self.w)

    async def sign_out(self, number):
        sign_out(self.w)

    async def sign_in(self, number):
        self.w.demo.accounts = {secrets.token_urlsafe(150): one for one in self.accounts}
        for st in self.w.demo.accounts:
            with contextlib.suppress(flow2api.GatewayError):
                await self.w.pool.add(st)

    async def jump(self, number):
        self.clock.ahead += number % 900

    async def rest(self, number):
        self.w.demo.video_seconds = (0.02, 100, 600)[number % 3]
        await asyncio.sleep(0.02)

    async def look(self):
        """What has been shown of a job is never taken back."""
        for job_id in {job.id for job in self.w.store.jobs()} | set(self.shown) - self.deleted:
            status, _, video = await self.w.call("GET", f"/v1/videos/{job_id}")
            assert status == 200, (job_id, video)
            rank = RANKS.index(video["status"].replace("failed", "completed"))
            before, now = self.shown.get(job_id, (0, 0)), (rank, video["progress"])
            assert before[0] <= now[0] and before[1] <= now[1], (before, video)
            self.shown[job_id] = now

    async def settle(self):
        """All faults end, all accounts are back: so each job comes to its end."""
        self.faults.clear()
        await self.sign_in(0)
        self.clock.ahead, self.w.demo.video_seconds = self.clock.ahead + 5000, 0.02
        await asyncio.gather(*self.clients, return_exceptions=True)
        await until(lambda: not self.w.jobs.open)


@pytest.mark.parametrize("seed", range(int(os.environ.get("FLOW2API_SCHEDULES", 40))))
async def test_no_schedule_of_faults_loses_a_clip_or_pays_twice(
    world, looks, impatient, clock, monkeypatch, seed
):
    rows, put_rows = collections.defaultdict(list), flow2api.Store.put_rows

    def put(store, *records):
        for row in (row for table, row in records if table == "jobs"):
            rows[row["id"]].append((row["state"], row["data"]))
        return put_rows(store, *records)

    monkeypatch.setattr(flow2api.Store, "put_rows", put)
    for ratio in SIZES:
        monkeypatch.setitem(SIZES, ratio, (64, 64))
    options = {"generation.video_timeout": 86400, "cache.enabled": seed % 2 == 1}
    w = await world(((PRO, 100), (PRO, 70)), **options)
    usual = flow2api.SETTING["flow.timeout"]
    monkeypatch.setitem(flow2api.SETTING, "flow.timeout", usual._replace(default=0.3))
    await w.pool.update(w.pool.tokens[1], video_concurrency=2)
    chance, storm = random.Random(seed), Storm(w, clock)
    moves = chance.choices(list(MOVES), MOVES.values(), k=30)
    moves = [("ask", seed), *((move, chance.randrange(10**6)) for move in moves)]
    print("schedule", seed, moves)  # which pytest shows with a failure
    for move, number in moves:
        await getattr(storm, move)(number)
        if move in ("rest", "jump", "restart"):
            await storm.look()
    monkeypatch.setitem(flow2api.SETTING, "flow.timeout", usual)
    await storm.settle()
    await storm.look()

    ends = {}  # prompt -> the (id, state, error code) of its jobs
    for job_id, written in rows.items():
        states = [state for state, _ in itertools.groupby(state for state, _ in written)]
        assert states[0] == "queued" and states[-1] not in flow2api.OPEN
        for before, after in itertools.pairwise(states):
            assert after in flow2api.STEPS[before], states
        job = json.loads(written[-1][1])
        code = job["error"].get("code", "")
        ends.setdefault(job["prompt"], []).append((job_id, states[-1], code))
    made = collections.defaultdict(set)  # prompt -> the batches that Flow has accepted
    for medium in w.demo.media.values():
        made[medium.prompt].add(medium.batch)
    for prompt, batches in made.items():
        requests = {key or i for i, (text, *_, key) in enumerate(storm.sent) if text == prompt}
        assert len(batches) <= len(requests), prompt
        spent = [end for end in ends[prompt] if {*end} & {"completed", "submit_unknown"}]
        assert len(batches) <= len(spent), (prompt, ends[prompt])
    for job in w.store.jobs(states=["completed"]):
        assert job.batch in made[job.prompt]
        for index, output in enumerate(job.done()):
            _, _, data = await download(w, job.id, f"?index={index}")
            assert data == w.demo.media[output.name].file()
    clips = sum(medium.kind == "video" for medium in w.demo.media.values())
    assert sum(account["credits"] for account in storm.accounts) == 170 - 20 * clips
    assert not w.pool.waiting
    assert [(token.busy.total(), token.reserved) for token in tokens_of(w)] == [(0, 0)] * 2


# ---- The pool on the simulated clock ----


def submitted_by(w, token):
    """How often this account's access token came with a submit; counted from now on."""
    old = w.fault

    async def count(request, handler):
        if re.search(PAID, request.path) and flow2api.bearer(request) == token.at:
            count.seen.append(request.path)
        return await (old(request, handler) if old else handler(request))

    w.fault, count.seen = count, []
    return count.seen


@pytest.mark.parametrize(
    ("status", "reason", "seconds"),
    [
        (429, "PUBLIC_ERROR_USER_REQUESTS_THROTTLED", 300),
        (403, "PUBLIC_ERROR_UNUSUAL_ACTIVITY", 300),
        (403, "", 60),
    ],
)
async def test_an_account_that_has_stepped_back_is_left_alone_until_its_time_is_over(
    world, clock, status, reason, seconds
):
    w = await world(((PRO, 1000), (PRO, 1000)))
    first, second = tokens_of(w)
    w.fault = fault(PAID, refusal(status, reason), times=1)
    asked = submitted_by(w, first)
    assert content(await w.chat()) and len(asked) == 1
    for clock.ahead, back in ((1, False), (0.89 * seconds, False), (1.11 * seconds + 5, True)):
        before = len(asked)
        replies = await asyncio.gather(*(w.chat("nano_banana_pro") for _ in range(8)))
        assert [reply[0] for reply in replies] == [200] * 8
        assert (len(asked) > before) is back
    assert first.image_count + second.image_count == 24


async def test_an_account_never_comes_back_before_the_time_that_google_names(
    world, clock, monkeypatch
):
    """Not by the chance in a step back, and not when a shorter time was named in the same burst."""
    monkeypatch.setattr(random, "uniform", lambda low, high: low)
    w, barrier = await world(), asyncio.Barrier(2)
    error = {"error": {"details": [{"reason": "PUBLIC_ERROR_USER_REQUESTS_THROTTLED"}]}}
    waits = iter(["100", "5000"])

    async def throttle(request, handler):
        if not re.search(PAID, request.path):
            return await handler(request)
        async with barrier:
            headers = {"Retry-After": next(waits)}
        return web.json_response(error, status=429, headers=headers)

    w.fault = throttle
    replies = await asyncio.gather(*(w.chat("nano_banana_pro") for _ in range(2)))
    assert [body["error"]["code"] for _, _, body in replies] == ["account_throttled"] * 2
    w.fault = None
    asked = submitted_by(w, only(w))
    clock.ahead = 4900
    told(w, await w.chat("nano_banana_pro"), "account_throttled")
    assert not asked
    clock.ahead = 5010
    assert content(await w.chat("nano_banana_pro")) and len(asked) == 1


async def test_an_account_whose_session_ended_says_so_and_a_new_one_brings_its_clip_home(
    world, impatient
):
    w = await world()
    client = asyncio.create_task(w.chat())
    (job,) = await running(w)
    ((_, account),) = w.demo.accounts.items()
    sign_out(w)
    await until(lambda: not only(w).is_active)
    assert "Sign in to Flow again" in only(w).reason and job.state == "running"
    told(w, await w.chat(), "no_accounts")
    w.demo.accounts["another.session"] = account
    added = await w.call("POST", "/api/tokens", {"st": "another.session"}, key=await w.admin())
    assert added[0] == 200 and (only(w).is_active, only(w).reason) == (True, "")
    assert content(await client) and content(await w.chat())
    assert (len(w.asked("AsyncGenerate")), account["credits"], only(w).busy.total()) == (2, 960, 0)


async def test_the_three_counters_of_a_day_begin_anew_together(world, clock):
    w = await world(video_seconds=0.02)

    async def today():
        _, _, body = await w.call("GET", "/v1/stats")
        return [body["stats"][f"today_{what}s"] for what in ("image", "video", "error")]

    async def refused():
        w.fault = fault(PAID, refusal(403, "PUBLIC_ERROR_MODEL_ACCESS_DENIED"), times=1)
        await w.chat()

    assert content(await w.chat()) and content(await w.chat("nano_banana_pro"))
    await refused()
    assert await today() == [1, 1, 1]
    clock.ahead = 86400
    assert await today() == [0, 0, 0]
    await refused()
    assert await today() == [0, 0, 1]
    clock.ahead = 2 * 86400
    assert content(await w.chat("nano_banana_pro"))
    assert await today() == [1, 0, 0]


async def test_an_account_with_too_many_clips_under_way_takes_fewer_for_a_while(
    world, clock, impatient
):
    """CONCURRENT_LIMIT_REACHED says how many clips an account may have under way: those that it
    had. So it takes so many for a while, the rest waits, and pictures are made meanwhile."""
    w, refused, most = await world(video_seconds=0.3), [], [2]

    async def limit(request, handler):
        clips = [medium for medium in w.demo.media.values() if medium.ready > flow2api.now()]
        if "AsyncGenerate" in request.path and len(clips) >= most[0]:
            refused.append(request.path)
            return refusal(429, "PUBLIC_ERROR_CONCURRENT_LIMIT_REACHED")(request)
        return await handler(request)

    w.fault = limit
    clients = [asyncio.create_task(w.chat()) for _ in range(6)]
    await until(lambda: refused)
    picture = asyncio.create_task(w.chat("nano_banana_pro"))
    await until(picture.done, 3)
    assert [reply[0] for reply in await asyncio.gather(*clients)] == [200] * 6
    assert len(refused) <= 4 and only(w).is_active  # each of the first burst once, and none again
    refused.clear()
    assert [reply[0] for reply in await asyncio.gather(*(w.chat() for _ in range(4)))] == [200] * 4
    assert not refused
    clock.ahead, most[0] = 3600, 6  # later it tries whether more are allowed
    clients = [asyncio.create_task(w.chat()) for _ in range(6)]
    await running(w, 6)
    assert [reply[0] for reply in await asyncio.gather(*clients)] == [200] * 6


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


async def test_more_requests_or_bodies_than_are_set_are_refused_and_harm_nobody(world):
    w = await world(**{"limits.requests": 3, "limits.bodies_mb": 1})
    w.fault = hold(PAID)
    streams = [asyncio.create_task(w.stream()) for _ in range(3)]
    await until(lambda: w.gateway.requests == 3)
    for method, path in (POST, ("GET", "/v1/models"), ("GET", "/v1/videos")):
        reply = await w.call(method, path, {} if method == "POST" else None)
        told(w, reply, "queue_full")
        assert int(reply[1]["Retry-After"]) > 0
    assert (await w.call("GET", "/health"))[0] == 200
    assert (await w.call("GET", "/api/tokens", key=await w.admin()))[0] == 200
    w.fault.release.set()
    for _, _, events in await asyncio.gather(*streams):
        assert links_in(content_of(events))
    large = data_url(PNG + bytes(900_000))
    told(w, await w.chat("nano_banana_pro", pictures=[large]), "queue_full")
    assert content(await w.chat("nano_banana_pro")) and w.gateway.requests == w.gateway.bodies == 0


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


async def test_a_login_that_never_comes_whole_takes_no_room_from_clients(world):
    w = await world()
    _, writer = await asyncio.open_connection("127.0.0.1", w.runner.addresses[0][1])
    writer.write(b"POST /api/login HTTP/1.1\r\nHost: x\r\nContent-Length: 536870912\r\n\r\n{")
    await until(lambda: w.gateway.requests)
    assert (await w.chat("nano_banana_pro"))[0] == 200
    writer.close()


async def test_the_cookie_counts_behind_basic_auth_and_for_no_page_of_another_port(world):
    w = await world()
    cookie = {"Cookie": f"flow2api_session={await w.admin()}"}
    path = f"{w.url}/api/tokens/{only(w).id}/disable"

    async def status(site, kind, method="POST", url=path, **more):
        headers = cookie | {"Content-Type": kind, "Origin": "http://127.0.0.1:1"}
        headers |= {"Sec-Fetch-Site": site} if site else {}
        async with w.http.request(method, url, headers=headers | more, data="{}") as reply:
            return reply.status

    for site in ("same-site", "cross-site"):
        assert await status(site, "application/json") == 401
    assert await status("", "text/plain") == 401  # plain http: no such header, and no preflight
    assert only(w).is_active
    assert await status("", "application/json") == await status("none", "text/plain") == 200
    for given, wanted in (("Basic eDp5", 200), ("Bearer admin-x", 401), (w.key, 401)):
        asked = {"method": "GET", "url": f"{w.url}/api/stats", "Authorization": given}
        assert await status("same-origin", "text/plain", **asked) == wanted


async def test_a_session_in_use_outlives_a_restart_after_seven_days(world, clock):
    w = await world()
    ask = await asker(w)
    for days in (5, 10):
        clock.ahead = days * 86400
        assert (await ask("GET", "/api/stats"))[0] == 200
        await w.stop_gateway()
        await w.start_gateway()
    assert (await ask("GET", "/api/stats"))[0] == 200


async def test_no_address_stops_flow2api_for_good(world, impatient):
    w = await world()
    ask = await asker(w)
    for proxy in (
        "socks5://host",
        "socks5://a..b:1",
        "SOCKS5://h:1",
        " socks5://h:1",
        "http://a..b",
    ):
        refused(await ask("POST", "/api/settings", {"proxy.proxy_url": proxy}))
        refused(await ask("PUT", f"/api/tokens/{only(w).id}", {"proxy_url": proxy}))
        refused(await ask("POST", "/api/proxy/test", {"proxy_url": proxy}))
    for proxy in ("http://host", "socks5://[::1]:1080", "socks5h://u:p@host:1"):
        assert flow2api.good_proxy(proxy)
    for url in ("http://[", "http://a..b", "http://x:99999"):
        w.live.layers["admin page"] |= dict.fromkeys(
            ("flow.labs_base_url", "flow.api_base_url"), url
        )
        only(w).checked_at = 0.0
        await w.pool._check_if_due(only(w))  # what it raises ends the process
        refused(await ask("POST", f"/api/tokens/{only(w).id}/test"), 502)
        told(w, await w.chat("nano_banana_pro"), "upstream_unreachable")
    for value in ({"server.host": "nonsense!"}, {"server.host": ""}, {"server.port": 0}):
        refused(await ask("POST", "/api/settings", value))  # the next start would fail
    assert (await ask("POST", "/api/settings", {"server.host": None}))[0] == 200
    refused(await ask("POST", "/api/settings", {"no.such": None}))


async def test_a_masked_secret_that_was_edited_is_not_saved_in_silence(world):
    w = await world()
    ask, proxy = await asker(w), "http://user:canary@host:1"
    await ask("POST", "/api/settings", {"proxy.proxy_url": proxy})
    await ask("PUT", f"/api/tokens/{only(w).id}", {"proxy_url": proxy})
    masked, path = "http://…@host:1", f"/api/tokens/{only(w).id}"
    assert (await ask("POST", "/api/settings", {"proxy.proxy_url": masked}))[0] == 200
    assert (await ask("PUT", path, {"proxy_url": masked}))[0] == 200
    refused(await ask("POST", "/api/settings", {"proxy.proxy_url": "http://…@other:1"}))
    refused(await ask("PUT", path, {"proxy_url": "http://…@other:1"}))
    refused(await ask("POST", "/api/admin/apikey", {"new_api_key": "a…secret"}))
    assert (w.live["proxy.proxy_url"], only(w).proxy_url) == (proxy, proxy)
    assert w.live["global.api_key"] == w.key


@pytest.mark.parametrize("restart", [False, True])
async def test_the_jobs_of_a_deleted_account_are_never_those_of_the_next_one(world, restart):
    w = await world()
    ask = await asker(w)
    job = (await w.call("POST", "/v1/videos", {"prompt": "x", "async_mode": False}))[2]["id"]
    token = only(w)
    assert (await ask("DELETE", f"/api/tokens/{token.id}"))[0] == 200
    if restart:
        await w.stop_gateway()
        await w.start_gateway()
    assert (await w.account()).id != token.id
    assert (await ask("GET", f"/api/jobs/{job}"))[2]["job"]["account"] == ""


@pytest.mark.parametrize("end", ["cancel", "delete"])
async def test_a_job_read_from_the_disk_just_before_it_starts_can_be_cancelled(world, end):
    w = await world()
    await w.pool.update(only(w), video_concurrency=1)
    clients = [asyncio.create_task(w.chat()) for _ in range(2)]
    await until(lambda: len(w.pool.waiting) == 1 and len(w.jobs.open) == 2)
    ((waiting, _),) = w.pool.waiting.values()
    copy = w.store.job(waiting.id)  # as Jobs.get has it, when it reads before create goes on
    await getattr(w.jobs, end)(copy)
    assert waiting.state == "cancelled"
    assert sorted(reply[0] for reply in await asyncio.gather(*clients)) == [200, 409]


async def test_two_admins_may_delete_the_same_accounts_at_once(world):
    w = await world(((PRO, 1),) * 4)
    ask, tokens = await asker(w), list(w.pool.tokens.values())
    for token in tokens:
        await w.pool.update(token, is_active=False)
    batch = "/api/tokens/batch-delete-disabled"
    replies = await asyncio.gather(*(ask("DELETE", batch) for _ in range(3)))
    assert [reply[0] for reply in replies] == [200] * 3 and not w.pool.tokens


async def test_a_kept_folder_that_is_gone_or_holds_a_folder_stops_nothing(world, impatient):
    w = await world(**{"cache.enabled": True})
    ask, kept = await asker(w), w.gateway.media.kept
    (kept / "lost+found").mkdir()
    assert (await ask("DELETE", "/api/cache"))[0] == 200
    shutil.rmtree(kept)
    assert (await ask("GET", "/api/system/info"))[2]["cache_bytes"] == 0
    assert links_in(content(await w.chat("nano_banana_pro")))  # Google's own


async def test_a_client_in_the_queue_is_told_that_nothing_was_sent(world):
    w = await world()
    await w.pool.update(only(w), video_concurrency=1)
    clients = [asyncio.create_task(w.chat()) for _ in range(2)]
    await until(lambda: len(w.pool.waiting) == 1 and len(w.jobs.open) == 2)
    await running(w)
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


async def test_a_client_that_never_learnt_its_job_does_not_pay_after_a_restart(world):
    """It leaves an asynchronous API while the job is being written."""
    w = await world()
    put, writing = w.store.put_rows, asyncio.Event()

    async def slow(*records):
        writing.set()
        await asyncio.shield(put(*records))
        await asyncio.sleep(0.2)

    w.store.put_rows = slow
    generation = flow2api.Generation(flow2api.resolve("veo_3_1-fast"), "x")
    mark = {"key": "\nx", "request": "x"}
    create = asyncio.create_task(w.jobs.create(generation, "videos", mark, detached=True))
    await writing.wait()
    create.cancel()
    await asyncio.wait([create])
    w.store.put_rows = put
    await until(lambda: not w.store.jobs(states=flow2api.OPEN, oldest_first=True))
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
    elsewhere = r"<(link|img|iframe|form)\b|<(script|style)\s|\bsrc=|@import|url\(|\s(on\w+|style)="
    assert not re.search(elsewhere, text)
    assert text.count("<script>") == text.count("<style>") == 1 and "/v1" in text
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


async def test_the_demo_works_as_pasted_and_keeps_nothing(run, flow2, tmp_path):
    """In an empty folder, with the two files that it needs."""
    folder, temporary = tmp_path / "empty", tmp_path / "temporary"
    folder.mkdir()
    temporary.mkdir()
    script = shutil.copy(REPOSITORY / "flow2api.py", folder)
    alone = await run(sys.executable, script, "--demo", env=environment())
    assert await alone.end() == 2 and "needs demo_flow2api.py beside" in alone.log[-1]
    shutil.copy(REPOSITORY / "demo_flow2api.py", folder)
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
    kept = {path.name for path in folder.iterdir()} - {"__pycache__"}
    assert kept == {"flow2api.py", "demo_flow2api.py"}
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
    shutil.copy(REPOSITORY / "demo_flow2api.py", tmp_path)
    [pictures] = bash_blocks("demo_flow2api.picture")
    await pasted(pictures)
    blocks = bash_blocks("/v1/chat/completions")
    assert len(blocks) >= 10
    for block, out in zip(blocks, await asyncio.gather(*map(pasted, blocks)), strict=True):
        links = set(KEPT_LINK.findall(out))
        assert len(links) == (3 if '"n": 3' in block else 1), (block, out)
        kind = "image/png" if "banana" in block else "video/mp4"
        assert {await downloaded(link) for link in links} == {kind}
        assert ("[DONE]" in out) == ('"stream": true' in block)
    blocks = bash_blocks("/v1/images/") + bash_blocks("/v1/videos")
    outs = await asyncio.gather(*map(pasted, blocks))
    counts = []
    for out in outs:
        links = set(KEPT_LINK.findall(out))
        counts.append(len(links))
        assert {await downloaded(link) for link in links} <= {"image/png", "video/mp4"}, out
    assert counts == [1, 0, 1, 0, 1, 2, 0], outs
    for name, kind in (("boat.png", "image/png"), ("boat.mp4", "video/mp4")):
        assert flow2api.sniff((tmp_path / name).read_bytes())[0] == kind


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


# ---- A clip is never lost and never paid twice: kills ----

# The gateway of these tests: it looks sooner for a lost submit, tells what it finds, and does by
# its own hand what from outside would need luck.
DRIVER = """
import itertools, os, resource, sys, flow2api

def die(*_):
    os.kill(os.getpid(), 9)

def fill_disk():  # no file can grow any more
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

def on(name, before=None, after=None):
    real = getattr(flow2api.RestFlow, name)
    async def call(*arguments):
        before and before()
        found = await real(*arguments)
        after and after(found)
        return found
    setattr(flow2api.RestFlow, name, call)

def on_write(number, before=None, after=None):
    real, numbers = flow2api.Store.put, itertools.count(1)
    def put(*arguments):
        hit = next(numbers) == number
        hit and before and before()
        done = real(*arguments)
        hit and after and done.add_done_callback(after)
        return done
    flow2api.Store.put = put

flow2api.Jobs.LOOKS = (0.05, 0.1, 0.2, 0.4)
on("find", after=lambda found: print("found:", len(found), flush=True))
"""


class Apart(World):
    """A world whose gateway is a process, which runs lines of Python of our `own` first. `seen`:
    the job ids that clients have been shown."""

    def __init__(self, run, data, own="", **options):
        super().__init__(data, **options)
        self.run, self.own, self.programs, self.seen = run, own, [], set()

    async def start_gateway(self):
        """Starts it; it doesn't serve yet."""
        values = {"flow.labs_base_url": f"{self.demo.address}/fx/api", "flow.poll_interval": 0.1}
        values |= {"flow.api_base_url": f"{self.demo.address}/v1", "server.host": "127.0.0.1"}
        values |= {"global.admin_password": self.password, "global.api_key": self.key}
        values |= {"server.port": 0} | self.settings
        more = {f"FLOW2API_{k.replace('.', '_').upper()}": str(v) for k, v in values.items()}
        code = f"{DRIVER}\n{self.own}\nsys.exit(flow2api.main(sys.argv[1:]))"
        env = environment(PYTHONPATH=str(REPOSITORY), **more)
        program = await self.run(sys.executable, "-c", code, "--data", self.data, env=env)
        self.programs.append(program)

    async def restart(self, own=""):
        self.own = own
        await self.start_gateway()
        await self.serves()

    def dead(self):
        return self.programs[-1].process.returncode is not None

    async def serves(self):
        await until(lambda: self.programs[-1].curl or self.dead(), 60)
        assert self.programs[-1].curl, self.programs[-1].log
        self.url = self.programs[-1].url

    async def killed(self):
        with contextlib.suppress(ProcessLookupError):  # it may have died by itself
            os.kill(self.programs[-1].process.pid, signal.SIGKILL)
        await self.died()

    async def died(self):
        await until(self.dead, 30)
        assert await self.programs[-1].end() == -signal.SIGKILL, self.programs[-1].log

    async def stop_gateway(self):
        assert self.dead() or await self.programs[-1].stop() == 0, self.programs[-1].log

    async def account(self, tier=PRO, credits=10**6):
        st = self.demo.account(f"user{len(self.demo.accounts)}@example.com", tier, credits)
        headers = {"Authorization": f"Bearer {await self.admin()}"}
        reply = await self.call("POST", "/api/tokens", {"st": st}, headers=headers)
        assert reply[0] == 200, reply

    def ids(self, *states):
        """The jobs in these states, on the disk: of some no client has seen the id."""
        with contextlib.closing(sqlite3.connect(self.data / "flow2api.db")) as db:
            rows = db.execute("SELECT id, state FROM jobs").fetchall()
            return [job_id for job_id, state in rows if not states or state in states]

    def accepted(self):
        """What Flow has taken credits for."""
        return [m for m in self.demo.media.values() if not m.name.endswith("_upsampled")]


@pytest.fixture
async def apart(run, tmp_path):
    """Makes a world apart that serves: `await apart(*tiers of its accounts, **options)`."""
    async with contextlib.AsyncExitStack() as stack:

        async def make(*tiers, **options):
            made = await Apart(run, tmp_path / "data", **options).start()
            stack.push_async_callback(made.stop)
            await made.serves()
            for tier in tiers:
                await made.account(tier)
            return made

        yield make


CHAT = "/v1/chat/completions"
WAYS = (  # of asking, by a prompt and the id of an earlier clip: path, body; with a file, a form
    lambda prompt, clip: (CHAT, chat_body("veo_3_1-fast", prompt) | {"stream": True}),
    lambda prompt, clip: (CHAT, chat_body("veo_3_1-lite", prompt) | {"n": 2}),
    lambda prompt, clip: (CHAT, chat_body("imagen_4", prompt, [DATA]) | {"stream": True}),
    lambda prompt, clip: (IMAGES, {"prompt": prompt, "n": 2}),
    lambda prompt, clip: (IMAGES, {"prompt": prompt, "image_size": "2K", "stream": True}),
    lambda prompt, clip: (EDITS, {"prompt": prompt, "image": PNG}),
    lambda prompt, clip: (VIDEOS, {"prompt": prompt}),
    lambda prompt, clip: (VIDEOS, {"prompt": prompt, "input_reference": PNG}),
    lambda prompt, clip: (VIDEOS, {"prompt": prompt, "async_mode": False}),
    lambda prompt, clip: (VIDEOS, {"prompt": prompt, "model": "veo_3_1-fast-1080p"}),
    lambda prompt, clip: (f"{VIDEOS}/{clip}/remix", {"prompt": prompt}),
    lambda prompt, clip: (EXTEND, {"prompt": prompt, "video": {"id": clip}}),
)
# A client: its request, and the ids of the jobs that the heads of its answers named.
Client = collections.namedtuple("Client", "path body key ids")


async def ask_as(client, w):
    """Sends a client's request -> the error code in its answer, or "". Raises what cuts it off."""
    headers = {"Authorization": f"Bearer {w.key}"}
    headers |= {"Idempotency-Key": client.key} if client.key else {}
    form = PNG in client.body.values()
    payload = {"data": multipart(**client.body)} if form else {"json": client.body}
    async with w.http.post(w.url + client.path, headers=headers, **payload) as reply:
        client.ids.update(filter(None, [reply.headers.get("X-Job-Id")]))
        w.seen |= client.ids
        data = b""
        async for chunk in reply.content.iter_any():
            data += chunk
            w.seen.update(re.findall(r"(?:image|video)_[0-9a-f]{24}", data[:2000].decode()))
    code = re.search(rb'"error": \{.*?"code": "(\w+)"', data)
    assert code or reply.status == 200, data
    return code[1].decode() if code else ""


async def audit(w, clients):
    """Holds our books against Flow's, when all is at rest -> the jobs of our store."""
    await until(lambda: not w.ids(*flow2api.OPEN), 120)
    files = {}
    for job_id in w.ids():
        status, _, video = await w.call("GET", f"{VIDEOS}/{job_id}")
        assert status == 200 and video["status"] in ("completed", "failed"), video
        made = len(video.get("urls", "1")) if video["status"] == "completed" else 0
        links = [f"{VIDEOS}/{job_id}/content?index={index}" for index in range(made)]
        files[job_id] = [(await w.call("GET", link))[2] for link in links]
    await w.stop_gateway()
    store = flow2api.Store(w.data)
    store.open()
    jobs, tokens = store.jobs(), {token.id: token for token in store.tokens()}
    store.close()
    assert w.seen <= {job.id for job in jobs} == set(files)
    assert all(len(client.ids) <= 1 for client in clients)
    assert len({job.prompt for job in jobs}) == len(jobs), "two jobs of one request"
    credits, owned = {known["email"]: 10**6 for known in w.demo.accounts.values()}, []
    for job in jobs:
        assert (job.state == "completed") == (len(job.outputs) == job.n) != (not job.outputs)
        assert job.state != "cancelled" or not job.detached
        scale = 2 if job.plan.upscale == "2K" else 1
        whole = [w.demo.media[output.name].file(scale) for output in job.done()]
        assert files[job.id] == whole, f"{job.id} is not what Flow has made"
        for output in job.outputs:
            owned.append((output.name.removesuffix("_upsampled"), job.prompt))
            token = tokens[job.token_id]
            credits[token.email] -= job.plan.cost(token.tier)
    assert sorted(owned) == sorted((made.name, made.prompt) for made in w.accepted())
    assert credits == {known["email"]: known["credits"] for known in w.demo.accounts.values()}
    return jobs


ROUNDS = int(os.environ.get("FLOW2API_KILL_ROUNDS", "25"))


async def test_whenever_the_process_is_killed_no_clip_is_lost_or_paid_twice(apart):
    """At its start, before or after one of its writes, or at any other instant."""
    print("seed", seed := secrets.randbits(32))
    dice, counts = random.Random(seed), collections.Counter()

    async def slow(request, handler):  # leaves more time for kills where they hurt
        if not re.search(PAID, request.path):
            return await handler(request)
        await request.read()
        slow.busy += 1
        await asyncio.sleep(dice.uniform(0, 0.3))
        answer = await handler(request)
        slow.busy -= 1
        await asyncio.sleep(dice.uniform(0, 0.3))
        return answer

    w = await apart(PRO, ULTRA, PRO, **{"generation.video_timeout": 30})  # of an upscale not sent
    w.fault, slow.busy, clients, again, clips = slow, 0, [], [], []
    await w.killed()
    for number in range(ROUNDS + 1):
        how = dice.choice(("start", "before", "after", "time", "time"))
        how = how if number < ROUNDS else "never"
        w.own = f"on_write({dice.randint(1, 40)}, {how}=die)" if how in ("before", "after") else ""
        w.demo.video_seconds, w.demo.image_seconds = dice.uniform(0.3, 1), dice.uniform(0.05, 0.3)
        w.settings["cache.enabled"] = dice.random() < 0.5
        await until(lambda: not slow.busy)  # for lost submits are not looked for for long
        await w.start_gateway()
        if how == "start":
            await asyncio.sleep(dice.uniform(0.2, 1.2))
        else:
            await until(lambda: w.programs[-1].curl or w.dead(), 60)
        if how == "start" or w.dead():
            await w.killed()
            continue
        await w.serves()
        fresh = []
        for way in dice.sample(WAYS[: None if clips else -2], dice.randint(3, 6)):
            name, clip = f"boat {len(clients) + len(fresh)}", dice.choice(clips or [""])
            fresh.append(Client(*way(name, clip), name * (dice.random() < 0.4), set()))
        clients += fresh
        counts["keys repeated"] += len(again)
        tasks = {asyncio.create_task(ask_as(client, w)): client for client in again + fresh}
        seconds = {"time": dice.uniform(0, 1.5), "never": None}.get(how, 2)
        await asyncio.wait(tasks, timeout=seconds)
        if how != "never":
            await w.killed()
        codes, again = await asyncio.gather(*tasks, return_exceptions=True), []
        for client, code in zip(tasks.values(), codes, strict=True):
            cut = isinstance(code, aiohttp.ClientError)
            again += [client] * (client.key != "" and (cut or dice.random() < 0.2))
            counts["cut off" if cut else f"told {code}" if code else "answered"] += 1
            assert cut or code in ("", "submit_unknown"), (client, code)
            clips += [] if cut or code or "async_mode" not in client.body else client.ids
    for job in await audit(w, clients):
        counts[job.error.get("code", job.state)] += 1
    told = [line for program in w.programs for line in program.out]
    counts["found again"] = sum(bool(re.fullmatch("found: [1-9]", line)) for line in told)
    counts["accepted"] = len(w.accepted())
    print({"kills": ROUNDS + 1, "requests": len(clients), "ids seen": len(w.seen), **counts})
    assert counts["accepted"] and counts["completed"]


def deadly(w, path, through=True, half=False):
    """A fault that kills the gateway at the first call of such a path: before Flow does anything,
    before its answer leaves, or when the gateway has begun a file of which it got a half."""

    async def middleware(request, handler):
        if w.fault is not middleware or not re.search(path, request.path):
            return await handler(request)
        w.fault = None
        answer = await handler(request) if through else web.Response()
        if half:
            data, answer = answer.body, web.StreamResponse()
            answer.content_length = len(data)
            await answer.prepare(request)
            await answer.write(data[: len(data) // 2])
            await until(lambda: any((w.data / "tmp").glob("*.part")))
        await w.killed()
        return answer

    return middleware


# fmt: off
CHAT_4K = CHAT, chat_body("veo_3_1-fast-4k", "a boat", [DATA])
CLIP_4K = VIDEOS, {"prompt": "a boat", "model": "veo_3_1-fast-4k", "input_reference": PNG}
PICTURE = CHAT, chat_body("nano_banana_pro-2K", "a boat")
POINTS = {  # the request; what kills its process, of its own or as a fault of Flow; its end
    "chat, before the upload": (CHAT_4K, "on('upload', before=die)", "cancelled"),
    "clip, before the upload": (CLIP_4K, "on('upload', before=die)", "completed"),
    "before the submit is sent": (CLIP_4K, "on('submit', before=die)", "submit_unknown"),
    "while the submit arrives": (CHAT_4K, (PAID, False), "submit_unknown"),
    "before a clip's answer leaves": (CHAT_4K, (PAID,), "completed"),
    "before a picture's answer leaves": (PICTURE, (PAID,), "completed"),
    "before a clip's answer is on disk": (CLIP_4K, "on('submit', after=die)", "completed"),
    "before a picture's answer is on disk": (PICTURE, "on('submit', after=die)", "completed"),
    "before the first poll": (CHAT_4K, "on('poll', before=die)", "completed"),
    "while a clip is upscaled": (CHAT_4K, ("UpsampleVideo",), "completed"),
    "while a picture is upscaled": (PICTURE, ("upsampleImage", False), "completed"),
    "in the middle of a download": (CLIP_4K, ("/media/", True, True), "completed"),
}
# fmt: on


@pytest.mark.parametrize("point", POINTS)
async def test_a_job_whose_process_is_killed_at_this_point_ends_as_promised(apart, point):
    """Also when the next process, which goes on with it, is killed, too."""
    asked, killer, end = POINTS[point]
    own = killer if isinstance(killer, str) else ""
    w = await apart(ULTRA, own=own, **{"cache.enabled": True})
    w.fault = None if own else deadly(w, *killer)
    client = Client(*asked, "", set())
    with contextlib.suppress(aiohttp.ClientError):  # the client of a clip has its answer by then
        await ask_as(client, w)
    await w.died()
    w.own = "on('find', before=die); on('resolve', before=die)"
    await w.start_gateway()
    await until(lambda: w.dead() or (w.programs[-1].curl and not w.ids(*flow2api.OPEN)), 60)
    await w.killed()
    await w.restart()
    await until(lambda: not w.ids(*flow2api.OPEN), 60)  # what it fetches now is whole by then
    parts = list((w.data / "tmp").glob("*.part"))
    assert bool(parts) == ("/media/" in killer)
    for name in (name for part in parts for name in (part.name, f"{part.stem}.mp4")):
        assert (await w.call("GET", f"/tmp/{name}"))[0] == 404
    (job,) = await audit(w, [client])
    assert (job.error.get("code", job.state), job.notes) == (end, [])


@pytest.mark.parametrize("write", range(4, 12))
async def test_a_disk_that_is_full_from_a_write_on_is_told_and_loses_nothing(apart, write):
    own = f"on_write({write}, before=fill_disk)"  # by the third the account is in the pool
    w = await apart(PRO, own=own, **{"cache.enabled": True})
    ways = {f"boat {number}": WAYS[number] for number in (0, 3, 6)}
    clients = [Client(*way(name, ""), f"key of {name}", set()) for name, way in ways.items()]
    codes = [await asyncio.wait_for(ask_as(client, w), 20) for client in clients]
    assert {"internal_error"} <= {*codes} <= {"internal_error", "shutting_down", ""}
    await w.stop_gateway()
    await w.restart()
    assert [await ask_as(client, w) for client in clients] == ["", "", ""]
    assert {job.state for job in await audit(w, clients)} == {"completed"}


# ---- What another review found ----


def full_disk(w, monkeypatch, *states):
    """The database refuses jobs of these states; without any, all records."""
    real = w.store.put

    def put(*records):
        if states and not any(getattr(record, "state", "") in states for record in records):
            return real(*records)
        refused = asyncio.get_running_loop().create_future()
        refused.set_exception(flow2api.StoreError("full"))
        refused.exception()
        return refused

    monkeypatch.setattr(w.store, "put", put)


async def test_a_job_whose_failure_cannot_be_written_gives_its_slot_back(world, monkeypatch):
    w = await world()
    full_disk(w, monkeypatch, "failed")
    told(w, await w.chat(text="unsafe"), "content_policy_violation")
    await until(lambda: not only(w).busy.total() and not w.pool.leases)


async def test_a_full_disk_does_not_end_the_checks_of_the_accounts(world, monkeypatch):
    w = await world()
    only(w).checked_at = 0
    full_disk(w, monkeypatch)
    await w.pool._check_if_due(only(w))
    assert only(w).checked_at


async def test_a_client_that_leaves_does_not_cancel_what_its_repeat_waits_for(world):
    w = await world()
    only(w).paused_until = flow2api.now() + 30
    again = {"headers": {"x-stainless-retry-count": "1"}}
    first = asyncio.create_task(images(w))
    await until(lambda: w.pool.waiting)
    (job,) = w.jobs.open.values()
    second = asyncio.create_task(w.call("POST", IMAGES, {"prompt": "a boat"}, **again))
    await until(lambda: job.clients == 2)
    first.cancel()
    await until(lambda: job.clients == 1)
    only(w).paused_until = 0
    assert len(pictures(await second)) == len(paid(w)) == 1


async def test_a_refused_request_that_is_sent_again_does_not_get_an_earlier_one(world):
    """OpenAI's packages send again what was answered by 429 or 503."""
    w = await world()
    old = await images(w)
    only(w).is_active = False
    told(w, await images(w), "no_accounts")
    only(w).is_active = True
    again = {"headers": {"x-stainless-retry-count": "1"}}
    new = await w.call("POST", IMAGES, {"prompt": "a boat"}, **again)
    assert new[1]["X-Job-Id"] != old[1]["X-Job-Id"] and len(paid(w)) == 2


async def test_a_refused_request_does_not_hide_one_like_it_that_is_under_way(world):
    w = await world()
    w.fault = hold(PAID)
    first = asyncio.create_task(images(w))
    await w.fault.seen.wait()
    only(w).is_active = False
    told(w, await images(w), "no_accounts")
    again = {"headers": {"x-stainless-retry-count": "1"}}
    second = asyncio.create_task(w.call("POST", IMAGES, {"prompt": "a boat"}, **again))
    w.fault.release.set()
    one_job(w, await first, await second)


async def test_an_upscaled_clip_takes_the_place_of_one_that_came_as_data(world):
    w = await world([(ULTRA, 1000)], video_seconds=0.05)
    real = w.demo.medium

    def inline(medium):
        item = real(medium)
        if medium.state().endswith("SUCCESSFUL") and not medium.name.endswith("_upsampled"):
            item["video"]["encodedVideo"] = base64.b64encode(medium.file()).decode()
        return item

    w.demo.medium = inline
    job = (await w.chat("veo_3_1-fast-1080p"))[1]["X-Job-Id"]
    assert b"_upsampled" in (await w.call("GET", f"/v1/videos/{job}/content"))[2]


async def test_the_clip_that_came_as_data_stays_where_upscaling_fails(world):
    w = await world([(ULTRA, 1000)], video_seconds=0.05)
    real, w.fault = w.demo.medium, fault("Upsample", refusal(403))

    def inline(medium):
        item = real(medium)
        if medium.state().endswith("SUCCESSFUL"):
            item["video"]["encodedVideo"] = base64.b64encode(medium.file()).decode()
        return item

    w.demo.medium = inline
    job = w.store.job((await w.chat("veo_3_1-fast-1080p"))[1]["X-Job-Id"])
    assert w.gateway.media.path(job.outputs[0].file)


@pytest.mark.parametrize("name", ["picture", "clip"])
async def test_an_output_whose_address_google_does_not_tell_now_has_one_of_ours(
    world, impatient, name
):
    w = await world(video_seconds=0.05)
    real, w.fault = w.demo.medium, fault("UrlRedirect", refusal(503))

    def nameless(medium):
        item = real(medium)
        item.get("image", {}).get("generatedImage", {}).pop("fifeUrl", None)
        return item

    w.demo.medium = nameless
    if name == "clip":
        url = links_in(content(await w.chat()))[0]
    else:
        reply = await w.call("POST", IMAGES, {"prompt": "a boat", "response_format": "url"})
        url = reply[2]["data"][0]["url"]
    w.fault = None
    async with w.http.get(url) as reply:
        assert reply.status == 200 and flow2api.sniff(await reply.read())[1] in ("png", "mp4")


@pytest.mark.parametrize("sent", [5, {"a": 1}, "a", "é"])
async def test_a_larger_picture_that_cannot_be_read_leaves_the_original(world, sent):
    w = await world([(ULTRA, 100)])
    w.fault = fault("upsampleImage", lambda request: web.json_response({"encodedImage": sent}))
    body = {"prompt": "a boat", "model": "nano_banana_pro-2K"}
    assert len(pictures(await w.call("POST", IMAGES, body))) == 1 and not w.jobs.open


async def test_after_a_restart_a_refused_upscale_is_not_waited_for(world):
    w = await world([(ULTRA, 1000)], video_seconds=0.05)
    asleep = hold("UrlRedirect")
    refused = fault("Upsample", refusal(403, "PUBLIC_ERROR_MODEL_ACCESS_DENIED"))

    async def both(request, handler):
        return await refused(request, functools.partial(asleep, handler=handler))

    w.fault = both
    body = {"prompt": "a boat", "model": "veo_3_1-fast-1080p"}
    video = (await w.call("POST", "/v1/videos", body))[2]["id"]
    await asleep.seen.wait()
    await w.stop_gateway()
    asleep.release.set()
    w.fault = None
    await w.start_gateway()
    job = await end_of(w, video)
    assert job.state == "completed" and "Upscaling" in job.notes[0]


async def test_the_id_of_a_deleted_account_is_not_given_away_with_its_clips(world):
    w = await world(video_seconds=0.05)
    job = w.store.job((await w.chat())[1]["X-Job-Id"])
    await w.pool.remove(only(w))
    first = await w.account()
    await w.pool.remove(first)
    await w.stop_gateway()
    await w.start_gateway()
    assert (await w.account()).id != job.token_id != first.id


@pytest.mark.parametrize("turns", range(6))
async def test_whoever_watches_a_job_can_be_cancelled_at_a_change(world, turns):
    """wait_for of Python 3.11 lost it: the job of a client that had left was sent."""
    w = await world()
    only(w).paused_until = flow2api.now() + 30
    client = asyncio.create_task(images(w))
    await until(lambda: w.pool.waiting)
    (job,) = w.jobs.open.values()
    watcher = asyncio.create_task(w.jobs.completed(job))
    await asyncio.sleep(0.02)
    w.jobs._tell(job)
    for _ in range(turns):
        await asyncio.sleep(0)
    watcher.cancel()
    done, _ = await asyncio.wait([watcher], timeout=0.2)
    client.cancel()
    assert done


@pytest.mark.parametrize("opening, end", ["[]", ('{"a":', "}")])
async def test_a_body_that_is_nested_too_deeply_is_refused(world, opening, end):
    w = await world()
    for depth in (300, 600, 700, 900, 5000):
        data = f'{{"prompt": "a boat", "x": {opening * depth}1{end * depth}}}'
        status, _, body = await w.call("POST", IMAGES, data=data.encode())
        assert status in (200, 400), body
    assert status == 400


async def test_a_body_that_is_too_large_for_ever_is_not_called_busy(world):
    w = await world()
    head = f"Authorization: Bearer {w.key}\r\nContent-Length: 600000000"
    reader, writer = await asyncio.open_connection("127.0.0.1", int(w.url.rpartition(":")[2]))
    writer.write(f"POST {IMAGES} HTTP/1.1\r\nHost: x\r\n{head}\r\n\r\n{{".encode())
    line = await asyncio.wait_for(reader.readline(), 5)
    writer.close()
    assert b" 413 " in line


async def test_a_folder_among_the_kept_files_stops_nothing(world):
    """lost+found, where data/tmp is a volume."""
    w = await world()
    folder = w.gateway.media.kept / "lost+found"
    folder.mkdir()
    os.utime(folder, (0, 0))
    w.gateway.media.expire(10)
    assert folder.exists()
