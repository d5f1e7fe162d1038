"""What Flow2API promises, as tests: first the promises, then chapter by chapter.

Real sockets where the socket matters: the gateway on a free loopback port, the simulated Flow as
Google's side, with faults switched on in front of it. Nothing here needs the internet.
"""

import ast
import asyncio
import base64
import collections
import contextlib
import dataclasses
import functools
import gc
import hashlib
import io
import ipaddress
import itertools
import json
import logging
import lzma
import math
import os
import pathlib
import random
import re
import secrets
import shutil
import signal
import socket
import sqlite3
import ssl
import stat
import sys
import time
import tomllib
import uuid
import zipfile
import zlib
from unittest import mock

import aiohttp
import pytest
from aiohttp import web

import flow2api

# ---- Tools: the world ----

FREE, PRO, ULTRA = flow2api.TIERS
PNG = flow2api.block_picture("an input", 64, 64)
JPEG, GIF = b"\xff\xd8\xff\xe0" + b"jpeg" * 10, b"GIF89a" + b"x" * 9
BASE64 = base64.b64encode(PNG).decode()
DATA = f"data:image/png;base64,{BASE64}"
BANANA, FAST, OMNI = "nano_banana_pro", "veo_3_1-fast", "omni_flash"
BOAT = {"prompt": "a boat"}
CLIP = flow2api.PORTRAIT_CLIP  # what clips of the default shape begin with
CHAT = "/v1/chat/completions"
IMAGES = "/v1/images/generations"
EDITS = "/v1/images/edits"
VIDEOS = "/v1/videos"
EXTEND = "/v1/videos/extensions"
REPOSITORY = pathlib.Path(flow2api.__file__).parent
EXTENSION = REPOSITORY / "extension"
pytestmark = pytest.mark.filterwarnings("ignore:The Sora API is scheduled")


class Flow(flow2api.SimulatedFlow):
    """The simulated Flow; `calls`: what it was asked, as (path, body)."""

    @web.middleware
    async def record(self, request, handler):
        body = await request.json() if request.body_exists else {}
        self.calls.append((request.path, body))
        return await handler(request)

    async def start(self, *middlewares):
        self.calls = []
        return await super().start(*middlewares, self.record)


@dataclasses.dataclass(frozen=True)
class Reply:
    """An answer of the gateway; `error`: OpenAI's error object."""

    status: int
    headers: dict
    body: bytes
    json = functools.cached_property(lambda self: json.loads(self.body))
    error = property(lambda self: self.json["error"])
    job_id = property(lambda self: self.headers["X-Job-Id"])
    replayed = property(lambda self: self.headers.get("Idempotent-Replayed") == "true")

    @property
    def content(self):
        """The text of a chat's answer, which must be a good one."""
        assert self.status == 200, self.body
        return self.json["choices"][0]["message"]["content"]


@dataclasses.dataclass(frozen=True)
class Stream:
    """A streamed answer: its raw lines, and the parsed events before [DONE]."""

    headers: dict
    lines: list
    events: list

    @property
    def content(self):
        choices = [choice for event in self.events for choice in event.get("choices", ())]
        return "".join(choice["delta"].get("content", "") for choice in choices)


class World:
    """A gateway and the simulated Flow behind it. `fault`: a middleware in front of Flow."""

    def __init__(self, data, image_seconds=0.02, video_seconds=0.3, **settings):
        self.flow = Flow(image_seconds, video_seconds)
        self.settings, self.data = settings, data
        self.fault = None
        self.key, self.password = "sk-test-0123456789", "a test password"

    @web.middleware
    async def _faults(self, request, handler):
        return await (self.fault(request, handler) if self.fault else handler(request))

    async def start(self):
        self.flow_runner = await self.flow.start(self._faults)
        self.http = aiohttp.ClientSession()
        await self.start_gateway()
        return self

    def values(self):
        return {
            "flow.labs_base_url": f"{self.flow.address}/fx/api",
            "flow.api_base_url": f"{self.flow.address}/v1",
            "flow.poll_interval": 0.1,
            "server.data_dir": str(self.data),
            "server.allow_private_urls": True,
            "global.api_key": self.key,
            "global.admin_password": self.password,
            **self.settings,
        }

    async def start_gateway(self):
        self.live = flow2api.Settings()
        for name, value in self.values().items():
            self.live.put("file", name, value, "test")
        self.store = flow2api.open_store(self.live)
        self.app = flow2api.make_app(self.live, self.store)
        options = flow2api.SERVER_OPTIONS
        self.runner = web.AppRunner(self.app, **options, shutdown_timeout=1)
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self.runner.addresses[0][1]}"
        self.gateway = self.app[flow2api.GATEWAY]
        self.pool, self.jobs = self.gateway.pool, self.gateway.jobs

    async def stop_gateway(self):
        await self.runner.cleanup()

    async def restart(self):
        await self.stop_gateway()
        await self.start_gateway()

    async def stop(self):
        await self.stop_gateway()
        await self.http.close()
        await self.flow_runner.cleanup()

    async def account(self, tier=PRO, credits=1000, email="", **fields):
        """A new account in the pool -> its Token."""
        email = email or f"user{len(self.flow.accounts) + 1}@example.com"
        st = self.flow.add_account(email, tier, credits)
        token, _ = await self.pool.add(st, **fields)
        return token

    @property
    def token(self):
        """The only account."""
        (token,) = self.pool.tokens.values()
        return token

    async def call(self, method, path, body=None, *, key=None, headers=None, **options):
        """A request with the API key, or another -> Reply. path: or a whole address."""
        headers = {"Authorization": f"Bearer {key or self.key}"} | (headers or {})
        url = path if path.startswith("http") else self.url + path
        async with self.http.request(method, url, json=body, headers=headers, **options) as answer:
            return Reply(answer.status, answer.headers, await answer.read())

    get = functools.partialmethod(call, "GET")
    post = functools.partialmethod(call, "POST")

    async def fetch(self, url, **headers):
        """A link, as a client without a key gets it -> Reply."""
        return await self.call("GET", url, headers={"Authorization": ""} | headers)

    async def chat(self, model="veo_3_1-fast", text="a paper boat", pictures=(), **body):
        """POST /v1/chat/completions -> Reply; `stream`: streamed -> Stream."""
        return await self.post(CHAT, chat_body(model, text, pictures) | body)

    async def stream(self, model="veo_3_1-fast", text="a paper boat", pictures=(), **body):
        body = chat_body(model, text, pictures) | {"stream": True} | body
        headers = {"Authorization": f"Bearer {self.key}"}
        async with self.http.post(self.url + CHAT, json=body, headers=headers) as reply:
            assert reply.status == 200, await reply.text()
            lines = [line.decode().rstrip("\n") async for line in reply.content]
        events = [line.removeprefix("data: ") for line in lines if line]
        assert events[-1] == "[DONE]"
        return Stream(reply.headers, lines, [json.loads(event) for event in events[:-1]])

    async def admin(self):
        """A session token of the admin API."""
        login = {"username": "admin", "password": self.password}
        return (await self.post("/api/login", login)).json["token"]

    async def owner(self):
        """`call`, with a session of the admin API."""
        return functools.partial(self.call, key=await self.admin())

    def asked(self, part):
        """The bodies of the calls to Flow whose path holds `part`."""
        return [body for path, body in list(self.flow.calls) if part in path]

    def paid(self):
        """The paths of the calls to Flow that spend credits."""
        return [path for path, _ in list(self.flow.calls) if re.search(PAID, path)]

    def secrets(self):
        tokens = [s for token in self.pool.tokens.values() for s in (token.st, token.at)]
        return [secret for secret in (self.key, self.password, *tokens) if secret]

    async def running(self, count=1):
        """Waits until so many jobs are running -> all that are open."""
        jobs = self.jobs.open
        await until(lambda: sum(job.state == "running" for job in jobs.values()) == count)
        return list(jobs.values())

    async def end_of(self, job_id):
        """Waits for the end of a job -> it, as it is in the store."""
        await until(lambda: job_id not in self.jobs.open)
        return await self.jobs.get(job_id)


def data_url(data, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def chat_body(model, text, pictures=()):
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in pictures]
    content = [{"type": "text", "text": text}, *parts] if parts else text
    return {"model": model, "messages": [{"role": "user", "content": content}]}


def links_in(text):
    return re.findall(r"https?://[^\s\"'<>)]+", text)


def expect_error(w, reply, code):
    """The reply is this error, whole, in OpenAI's form, and gives no secret away -> it."""
    assert reply.error["code"] == code, reply.body
    row = flow2api.GatewayError(code, "")
    assert (reply.status, reply.error["type"]) == (row.status, row.body()["error"]["type"])
    assert (set(reply.json), set(reply.error)) == ({"error"}, {"message", "type", "param", "code"})
    assert reply.error["message"].strip()
    shown = f"{reply.body.decode()} {dict(reply.headers)}"
    assert not [secret for secret in w.secrets() if secret in shown]
    return reply.error


def expect_detail(reply, status=400):
    """The reply is an error that the original's page can show -> its text."""
    assert (reply.status, reply.json["success"]) == (status, False), reply
    assert reply.json["detail"] == reply.json["message"] and reply.json["detail"].strip()
    return reply.json["detail"]


@pytest.fixture
async def world(tmp_path):
    """Makes worlds: `await world(((tier, credits), …), **{"section.setting": value})`."""
    async with contextlib.AsyncExitStack() as stack:

        async def make(accounts=((PRO, 1000),), **options):
            made = await World(options.pop("data", tmp_path / "data"), **options).start()
            stack.push_async_callback(made.stop)
            for tier, credits in accounts:
                await made.account(tier, credits)
            return made

        yield make


async def until(condition, seconds=20):
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


# ---- Tools: faults of Flow ----

PAID = r"batch(Async)?Generate(?!VideoUpsample)"  # the calls that spend credits
ALWAYS = 10**9


def refusal(status, reason="", message="Refused."):
    """What Flow answers when it refuses (upstream-rest.md 11)."""
    error = {"code": status, "message": message, "details": [{"reason": reason}] * bool(reason)}
    return lambda request: web.json_response({"error": error}, status=status)


def dropped(request):
    request.transport.close()
    return web.Response()


def cut_off(request):
    """The beginning of a file."""
    reply = web.Response(body=b"half a clip", headers={"Content-Length": "100000"})
    reply.force_close()
    return reply


def fault(on, answer, through=False, times=ALWAYS):
    """Answers calls whose path matches `on`, listed in `seen`; `through`: Flow does them, too."""

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


def edited(on, edit):
    """Changes Flow's answers to calls whose path matches `on`: edit(body) -> body."""

    async def middleware(request, handler):
        answer = await handler(request)
        matches = re.search(on, request.path)
        return web.json_response(edit(json.loads(answer.body))) if matches else answer

    return middleware


def together(faults):
    """Several at once, of which the last one is asked first."""

    def behind(handler, one):
        return functools.partial(one, handler=handler)

    return lambda request, handler: functools.reduce(behind, faults, handler)(request)


@pytest.fixture
def impatient(monkeypatch):
    """Pauses of seconds take hundredths."""
    real = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda s, *result: real(min(s, 0.02), *result))


@pytest.fixture
def clock(monkeypatch):
    """The gateway's clock: `clock.ahead` seconds ahead of the wall's."""
    clock = type("Clock", (), {"ahead": 0})
    monkeypatch.setattr(flow2api, "now", lambda: time.time() + clock.ahead)
    return clock


@pytest.fixture
def endless(monkeypatch):
    """The process does not end itself."""
    signals = []
    monkeypatch.setattr("signal.raise_signal", signals.append)
    yield
    assert not signals


@pytest.fixture
def looks(monkeypatch):
    """Lost submits are looked for at once."""
    monkeypatch.setattr(flow2api.Jobs, "FIRST_LOOK", 0.01)
    monkeypatch.setattr(flow2api.Jobs, "LOOKS", 3)


def replaced(on, old, new):
    """Changes a text in Flow's answers to calls whose path matches `on`."""
    return edited(on, lambda body: json.loads(json.dumps(body).replace(old, new)))


def says(status, reason="", on=PAID):
    return fault(on, refusal(status, reason and f"PUBLIC_ERROR_{reason}", "Not so."))


RETIRED = refusal(404, message="Flow RPCs have been deprecated and disabled.")


CAPTCHA = refusal(403, "PUBLIC_ERROR_UNUSUAL_ACTIVITY")


def without(projects):
    """Flow has these projects no more."""

    async def middleware(request, handler):
        text = request.path + await request.text() * ("json" in request.content_type)
        gone = any(project in text for project in projects)
        return (
            refusal(404, "", "Requested entity was not found.")(request)
            if gone
            else (await handler(request))
        )

    return middleware


@contextlib.contextmanager
def full_disk(store):
    """No write of this store fits -> the mock that counts them."""
    real, store._writer = store._writer, mock.MagicMock()
    store._writer.execute.side_effect = sqlite3.OperationalError("database or disk is full")
    yield store._writer.execute
    store._writer = real


def refuse_rows(w, table, which):
    """The disk is full for such rows."""
    with contextlib.closing(sqlite3.connect(w.store.path)) as database:
        trigger = f'TRIGGER "{which}" BEFORE INSERT ON {table} WHEN {which}'
        database.execute(f"CREATE {trigger} BEGIN SELECT RAISE(ABORT, 'full'); END")


# ---- Tools: raw requests and forms ----

JSON_HEAD = ("Host: x", "Content-Type: application/json")


def head_of(key, path, *lines, method="POST"):
    lines = f"{method} {path} HTTP/1.1", *lines, f"Authorization: Bearer {key}"
    text = "\r\n".join((*lines, "Connection: close", "", ""))
    return text.encode("utf-8", "surrogateescape")


def connect(url):
    return asyncio.open_connection(*url.removeprefix("http://").split(":"))


async def exactly(url, data, lines=math.inf):
    """Sends these bytes -> all that comes until the other side ends it, or so many lines."""
    (reader, writer), answer = await connect(url), b""
    with contextlib.suppress(ConnectionError):
        writer.write(data)
        async with asyncio.timeout(20):
            while answer.count(b"\n") < lines and (piece := await reader.read(1 << 16)):
                answer += piece
    writer.close()
    return answer


async def send_raw(w, method, path, header="X-Nothing: x"):
    """A request exactly as it is written here -> Reply."""
    lines = f"{method} {path} HTTP/1.1", "Host: x", "Connection: close", "Content-Length: 0"
    data = "\r\n".join((*lines, header, "", "")).encode("utf-8", "surrogateescape")
    head, _, body = (await exactly(w.url, data)).partition(b"\r\n\r\n")
    return Reply(int(head.split()[1]), {}, body)


MEANINGLESS = json.loads("""{"quality": "hd", "style": "vivid", "user": "u", "seed": 7,
    "background": "transparent", "moderation": "low", "metadata": {"a": 1}, "nobody": ["x"],
    "output_format": "webp", "output_compression": 5, "partial_images": 2,
    "input_fidelity": "high", "a[]": "1", "b[c]": "d"}""")
FILE = '; filename="a.png"\r\nContent-Type: image/png'
UNTYPED = "\r\nContent-Type: application/octet-stream"
NAMELESS = f'; filename="upload"{UNTYPED}'  # a file, as Python's bytes are sent
PROMPT = ("prompt", "a boat")


def form(parts):
    """A form of (name, value, the rest of the part's head) -> options of World.call."""
    raw = b""
    texts = [(name, f"{value}") for name, value in MEANINGLESS.items()]
    for name, value, *rest in (*parts, *texts):
        head = f'--b\r\nContent-Disposition: form-data; name="{name}"{"".join(rest)}\r\n\r\n'
        raw += head.encode() + (value if isinstance(value, bytes) else value.encode()) + b"\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    return {"data": raw + b"--b--\r\n", "headers": headers}


def each(name, *values, **others):
    """The fields of requests: one with each of the values."""
    return [others | {name: value} for value in values]


def requests_in(table):
    """Each line: what is expected, paths (or a param) | a field and its values ; another one …
    -> (what is expected, path, a body of one field) for each value."""
    for line in table.strip().splitlines():
        head, _, fields = line.partition(" | ")
        expected, *paths = head.split()
        rows = [field.split() for field in fields.split(" ; ") if field]
        bodies = [{name: json.loads(value)} for name, *values in rows for value in values]
        for path, body in itertools.product(paths, bodies or [{}]):
            yield expected, path, body


def refused(call, *arguments, **options):
    """The error that a call ends with."""
    with pytest.raises(flow2api.GatewayError) as caught:
        call(*arguments, **options)
    return caught.value


# ---- Tools: processes ----


def environment(**more):
    """This process's, without what could lead a child of it astray."""
    kept = {k: text for k, text in os.environ.items() if not k.startswith("FLOW2API_")}
    return kept | {"PYTHONDONTWRITEBYTECODE": "1"} | more


class Program:
    """A process and what it has written so far: `out` and `log`, lists of lines."""

    url = property(lambda self: re.search(r"Flow2API .* on (http://\S+)", "\n".join(self.out))[1])
    curl = property(lambda self: next((ln for ln in self.out if ln.startswith("curl ")), ""))

    serves = property(lambda self: any(line.startswith("Ctrl-C ") for line in self.out))

    def __init__(self, process):
        self.process, self.out, self.log = process, [], []
        pairs = (process.stdout, self.out), (process.stderr, self.log)
        self.readers = [asyncio.create_task(self._read(*pair)) for pair in pairs]

    async def _read(self, stream, lines):
        async for line in stream:
            lines.append(line.decode().rstrip("\n"))

    def said(self, name):
        """What stands behind `name: ` in the output; "" where it doesn't."""
        lines = (line for line in self.out if line.startswith(f"{name}: "))
        return next(lines, "").partition(": ")[2]

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
        pipes = dict.fromkeys(("stdout", "stderr"), asyncio.subprocess.PIPE)
        options = {"limit": 1 << 24, "env": environment()} | pipes | options
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
        address = {"FLOW2API_SERVER_HOST": "127.0.0.1", "FLOW2API_SERVER_PORT": "0"}
        env = environment(**address | more)
        program = await run(sys.executable, script, *arguments, cwd=tmp_path, env=env)
        await until(lambda: program.serves or program.process.returncode is not None, 30)
        assert program.serves, (program.out, program.log)
        return program

    return start


# ---- A clip is never lost and never paid twice: whatever Flow answers ----


def ways(text, clip=""):
    """Of asking: name -> path and body. clip: the id of an earlier one."""
    chat = chat_body("veo_3_1-fast", text)
    ask = {"prompt": text}
    return {  # in the schedules: the first eight, whose clips cost 20 credits each
        "chat": (CHAT, chat),
        "clip": (VIDEOS, ask | {"async_mode": False}),
        "picture": (IMAGES, ask),
        "stream": (CHAT, chat | {"stream": True}),
        "two clips": (CHAT, chat | {"n": 2}),
        "from a picture": (CHAT, chat_body("veo_3_1-fast", text, [DATA])),
        "left alone": (VIDEOS, ask),
        "pictures": (IMAGES, ask | {"stream": True, "n": 2}),
        "redrawn picture": (CHAT, chat_body("imagen_4", text, [DATA]) | {"stream": True}),
        "larger picture": (IMAGES, ask | {"image_size": "2K", "stream": True}),
        "edited picture": (EDITS, ask | {"image": DATA}),
        "from a file": (VIDEOS, ask | {"input_reference": {"image_url": DATA}}),
        "larger clip": (VIDEOS, ask | {"model": "veo_3_1-fast-1080p"}),
        "remix": (f"{VIDEOS}/{clip}/remix", ask),
        "extension": (EXTEND, ask | {"video": {"id": clip}}),
    }


class Hanging(web.Response):
    """An answer that never comes: until the other side has given up."""

    async def prepare(self, request):
        await until(lambda: not request.transport or request.transport.is_closing(), 60)
        return await super().prepare(request)


async def blanks(size=1, pause=0.01):
    while True:
        yield b" " * size
        await asyncio.sleep(pause)


def answering(body, status=200):
    return lambda request: web.json_response(body, status=status)


ODD_IMAGE = {"name": "x", "image": {"generatedImage": {"fifeUrl": "http://["}}}
SILENT = {  # answers that do not say whether Flow has done what it was asked
    "connection dropped": dropped,
    "500": refusal(500, message="Internal error encountered."),
    "503 in HTML": lambda request: web.Response(text="<html>no</html>", status=503),
    "HTML": lambda request: web.Response(text="<html>hi</html>", content_type="text/html"),
    "empty object": lambda request: web.json_response({}),
    "nothing": lambda request: web.Response(),
    "a list": lambda request: web.json_response([]),
    "odd shape": lambda request: web.json_response({"media": [{"nom": 1}]}),
    "nothing at all": lambda request: Hanging(),
    "a slow drip": lambda request: web.Response(body=blanks()),
    "an odd error": answering({"error": {"code": "x", "message": [], "details": 5}}, 500),
    "an odd name": answering({"media": [{"name": 5}]}),
    "an odd address": answering({"media": [ODD_IMAGE]}),
}


def troubles():
    """Name -> faults after which all is well, or with which Flow makes nothing (unsent)."""
    faults = {
        "half a file": [fault("^/media/", cut_off, times=3)],
        "a name left out": [fault("batchCheck", answering({"media": []}), times=3)],
        "a token that ends before the submit": [fault(PAID, refusal(401), times=1)],
    }
    for body in ({}, {"result": {"data": {"json": {"status": "OK"}}}}):
        listing = fault("projectInitialData", answering(body), times=9)
        faults[f"{body} as a listing"] = [fault(PAID, dropped, through=True), listing]
    for name, answer in SILENT.items():
        faults[f"{name}, unsent"] = [fault(PAID, answer)]
        faults[f"{name}, sent"] = [fault(PAID, answer, through=True)]
        later = ("batchCheck", "getMediaUrl")
        faults[f"{name}, later"] = [fault(on, answer, times=2) for on in later]
    for status, times in {401: 1, 403: 3, 408: 3, 429: 3, 503: 3}.items():
        faults[f"{status} for a status"] = [fault("batchCheck", refusal(status), times=times)]
    for status in (403, 404, 500):
        faults[f"{status} for a file"] = [fault("^/media/", refusal(status), times=5)]
    return faults


@pytest.mark.parametrize("name", troubles())
async def test_a_fault_costs_no_more_than_what_it_has_made(world, looks, impatient, name):
    """A clip by chat, one by the Videos API and a picture, at the same time."""
    timeout = 1 if name.startswith(("nothing at all", "a slow drip")) else 120
    w = await world(video_seconds=0.05, **{"cache.enabled": True, "flow.timeout": timeout})
    faults = troubles()[name]
    w.fault = together(faults)
    orders = ("chat", "clip", "picture")
    replies = await asyncio.gather(*(w.post(*ways(order)[order]) for order in orders))
    assert all(one.seen for one in faults)
    w.fault = None
    for order, reply in zip(orders, replies, strict=True):
        made = [medium for medium in w.flow.media.values() if medium.prompt == order]
        job = await w.end_of(reply.job_id)
        if name.endswith("unsent"):
            expect_error(w, reply, "submit_unknown")
            assert (job.error["code"], made) == ("submit_unknown", [])
        else:
            content = await w.get(f"{VIDEOS}/{job.id}/content")
            assert (reply.status, job.state, job.error) == (200, "completed", {})
            assert [content.body] == [medium.file() for medium in made]
    (account,), token = w.flow.accounts.values(), w.token
    assert (token.error_count, token.failures, token.is_active) == (0, 0, True)
    assert (token.busy.total(), token.reserved) == (0, 0)
    assert account.credits == (1000 if name.endswith("unsent") else 960)


def came_as_data(body):
    for item in body["media"]:
        if "SUCCESSFUL" in str(item) and "_upsampled" not in item["name"]:
            data = base64.b64encode(CLIP + item["name"].encode()).decode()
            item["video"]["encodedVideo"] = data
    return body


AS_DATA = edited("batchCheck", came_as_data)
UNTOLD = together([replaced(PAID, "fifeUrl", "x"), fault("UrlRedirect", refusal(503))])
LARGER = "nano_banana_pro-2K"
ODDITIES = {  # what is odd -> the model, the fault; where the upscale fails, after how many tries
    "balance": ("veo_3_1-4k", replaced(PAID, 'Credits": ', 'Credits": "many", "x": ')),
    "entries": ("veo_3_1-4k", replaced("batchCheck", "[{", '[null, {"nom": 1}, {')),
    "upscale": ("veo_3_1-4k", edited("UpsampleVideo", lambda body: {"media": [{}]})),
    "address": ("veo_3_1-4k", fault("UrlRedirect", refusal(404), times=1)),
    "no address": ("veo_3_1-4k", UNTOLD),
    "no address of a picture": ("imagen_4", UNTOLD),
    "data": ("veo_3_1-1080p", AS_DATA),
    "data alone": ("veo_3_1-1080p", together([AS_DATA, fault("Upsample", refusal(403))]), 0),
    "picture busy": (LARGER, says(500, "", "psample"), 3),
    "picture refused": (LARGER, says(400, "UNSAFE_GENERATION", "psample"), 1),
    "clip refused": ("veo_3_1-1080p", says(400, "", "psample"), 1),
    "captcha": ("veo_3_1-1080p", says(403, "UNUSUAL_ACTIVITY", "psample"), 3),
    "number": (LARGER, edited("upsampleImage", lambda body: {"encodedImage": 5})),
    "object": (LARGER, edited("upsampleImage", lambda body: {"encodedImage": {"a": 1}})),
    "odd address": ("veo_3_1-4k", replaced("batchCheck", 'Video": {}', 'Video": {"fifeUrl": "x"}')),
    "no picture": (LARGER, edited("upsampleImage", lambda body: {"encodedImage": "AAAA"})),
    "no clip": ("veo_3_1-1080p", replaced("batchCheck", "}}, ", '}, "encodedVideo": "AAAA"}, ')),
    "no base64": (LARGER, edited("upsampleImage", lambda body: {"encodedImage": "a"})),
    "no ASCII": (LARGER, edited("upsampleImage", lambda body: {"encodedImage": "é"})),
}


@pytest.mark.parametrize("oddity", ODDITIES)
async def test_what_is_paid_for_can_be_fetched_whatever_is_odd(world, impatient, oddity):
    w = await world(((ULTRA, 1000),), video_seconds=0.05)
    model, w.fault, *tries = ODDITIES[oddity]
    content = (await w.chat(model)).content
    assert tries in ([], [0]) or tries == [len(w.fault.seen)]
    w.fault = None
    url = links_in(content)[0]
    *_, medium = w.flow.media.values()
    file = (await w.fetch(url)).body
    assert medium.name.encode() in file or file == medium.file()
    assert url.startswith(w.url)
    upscaled = "_upsampled" in medium.name
    assert upscaled is (medium.kind == "video" and not tries)
    assert ("this is the original" in content) is (model != "imagen_4" and not upscaled)
    assert len(w.paid()) == 1 and not w.asked("projectInitialData")
    assert (w.token.busy.total(), w.token.credits > 0) == (0, True)


async def test_after_a_restart_a_refused_upscale_is_not_waited_for(world, impatient):
    w = await world(((ULTRA, 1000),), video_seconds=0.05)
    asleep = hold("UrlRedirect")
    w.fault = together([asleep, says(403, "MODEL_ACCESS_DENIED", "Upsample")])
    video = (await w.post(VIDEOS, BOAT | {"model": "veo_3_1-fast-1080p"})).job_id
    await asleep.seen.wait()
    await w.stop_gateway()
    asleep.release.set()
    w.fault = None
    await w.start_gateway()
    job = await w.end_of(video)
    assert job.state == "completed" and "Upscaling" in job.notes[0]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("answer", [refusal(409, "PUBLIC_ERROR_IN_PROGRESS"), dropped, None])
async def test_an_upscale_under_way_or_lost_is_polled_and_not_sent_again(world, answer, fails):
    """Where it fails later, the original stays."""
    w = await world()
    w.fault = answer and fault("UpsampleVideo", answer, through=True)
    client = asyncio.create_task(w.chat("veo_3_1-1080p"))
    await until(lambda: len(w.flow.media) == 2)
    original, larger = w.flow.media.values()
    larger.prompt = "unsafe" if fails else larger.prompt
    text = (await client).content
    assert ("this is the original" in text) == fails
    file = (await w.fetch(links_in(text)[0])).body
    assert file == (original if fails else larger).file() and len(w.asked("UpsampleVideo")) == 1


@pytest.mark.parametrize("lost", [1, ALWAYS])
async def test_a_lost_upscale_is_asked_for_once_more_and_given_up_in_minutes(world, clock, lost):
    w = await world(((ULTRA, 1000),), video_seconds=0, **{"flow.poll_interval": 0.05})
    w.fault = fault("UpsampleVideo", dropped, times=lost)
    client = asyncio.create_task(w.chat(f"{FAST}-1080p"))
    while not client.done() and clock.ahead < 2000:
        await asyncio.sleep(0.02)
        clock.ahead += 10
    reply = await client
    job = await w.jobs.get(reply.job_id)
    assert ("this is the original" in reply.content) is (lost > 1)
    assert job.outputs[0].name.endswith("_upsampled") is (lost == 1)
    assert job.completed_at - job.submitted_at < 900 and len(w.paid()) == 1
    assert len(w.fault.seen) + len(w.asked("UpsampleVideo")) == 2


OUTAGES = {"503": refusal(503), "dropped": dropped, "hang": lambda request: Hanging()}


@pytest.mark.parametrize("outage", OUTAGES)
async def test_an_outage_longer_than_a_deadline_fails_no_clip(world, impatient, outage):
    w = await world(video_seconds=0.05)
    w.live.layers["file"].update({"flow.timeout": 0.1, "generation.video_timeout": 0.3})
    w.fault = fault("batchCheck", OUTAGES[outage])
    client = asyncio.create_task(w.chat())
    (job,) = await w.running()
    await until(lambda: time.time() > job.submitted_at + 0.7 and len(w.fault.seen) > 2)
    w.fault = None
    assert (await client).content and len(w.paid()) == 1


async def test_an_outage_from_the_submit_on_loses_no_clip(world, impatient):
    w = await world(video_seconds=0.05)
    w.live.layers["file"]["generation.video_timeout"] = 0.3
    outage = fault("projectInitialData", refusal(503))
    w.fault = together([fault(PAID, dropped, through=True), outage])
    client = asyncio.create_task(w.chat())
    start = time.time()
    await until(lambda: time.time() > start + 1 and len(outage.seen) > 2)
    w.fault = None
    assert (await client).content and len(w.flow.media) == 1


@pytest.mark.parametrize("restart", [False, True, "killed as it comes home"])
async def test_a_clip_that_is_late_is_delivered(world, impatient, clock, monkeypatch, restart):
    w = await world(video_seconds=2000, **{"cache.enabled": True})
    w.live.layers["file"]["generation.video_timeout"] = 0.3
    reply = await w.chat()
    expect_error(w, reply, "generation_timeout")
    path = f"{VIDEOS}/{reply.job_id}"
    assert (await w.get(path)).json["status"] == "failed"
    if restart == "killed as it comes home":
        with monkeypatch.context() as patch:
            patch.setattr(flow2api.Jobs, "_start", lambda jobs, job: None)
            clock.ahead = 7200
            await until(lambda: not w.jobs.late)
    if restart:
        await w.restart()
    clock.ahead = 7200
    await until(lambda: w.store.job(reply.job_id).state == "completed")
    video, (medium,) = (await w.get(path)).json, w.flow.media.values()
    assert (video["status"], video["error"], len(w.paid())) == ("completed", None, 1)
    assert (await w.get(f"{path}/content")).body == medium.file()
    assert w.token.video_count == 1 and not w.token.busy.total()


async def test_of_several_clips_a_late_one_comes_and_moves_no_link(world, impatient, clock):
    w = await world(video_seconds=2000)
    w.live.layers["file"]["generation.video_timeout"] = 2
    reply = asyncio.create_task(w.chat(n=2))
    await until(lambda: len(w.flow.media) == 2)
    late, ready = w.flow.media.values()
    ready.ready = 0
    link = re.search(r"http://\S+\.mp4", (await reply).content)[0]
    job = (await w.get("/v1/videos?limit=1")).json["data"][0]
    assert (job["status"], len(job.get("urls", [1]))) == ("completed", 1)
    await w.restart()
    clock.ahead = 7200
    await until(lambda: len(w.store.job(job["id"]).done()) == 2)
    urls = (await w.get(f"{VIDEOS}/{job['id']}")).json["urls"]
    files = [(await w.get(url.removeprefix(w.url))).body for url in urls]
    assert files == [late.file(), ready.file()] and len(w.paid()) == 1
    assert (await w.get(f"/tmp/{link.rpartition('/')[2]}")).body == ready.file()


SLOW = ("uploadImage", "batchGenerateImages", "upsampleImage", "createProject")


@pytest.mark.parametrize("on", SLOW)
async def test_a_picture_ends_by_its_timeout_and_speaks_of_no_credits(world, on):
    w = await world(((ULTRA, 100),), **{"generation.image_timeout": 1})
    w.token.project_id = ""
    w.fault = hold(on)
    reply = await asyncio.wait_for(w.chat("nano_banana_pro-2K", pictures=[DATA]), 5)
    w.fault.release.set()
    if on == "upsampleImage":
        assert "this is the original" in reply.content
    else:
        code = "submit_unknown" if "Generate" in on else "generation_timeout"
        assert "credit" not in expect_error(w, reply, code)["message"]
    await until(lambda: not w.token.busy.total() and not w.jobs.open)


@dataclasses.dataclass(eq=False)
class Client:
    """A request; `ids`: of the jobs that its answers named."""

    prompt: str
    path: str
    body: dict
    key: str = ""
    ids: set = dataclasses.field(default_factory=set)

    async def ask(self, w):
        """-> the error code in the answer; "": none; or "cut off"."""
        headers = {"Authorization": f"Bearer {w.key}"}
        headers |= {"Idempotency-Key": self.key} if self.key else {}
        with contextlib.suppress(aiohttp.ClientError):
            async with w.http.post(w.url + self.path, headers=headers, json=self.body) as reply:
                self.ids.update(reply.headers.getall("X-Job-Id", ()))
                data = await reply.read()
            code = re.search(rb'"error": \{.*?"code": "(\w+)"', data)
            assert code or reply.status == 200, data
            return code[1].decode() if code else ""
        return "cut off"


EXCHANGES = (PAID, PAID, PAID, "batchCheck", "projectInitialData", "getMediaUrlRedirect")
EXCHANGES += ("auth/session", "/credits$", "uploadImage", "^/media/")
MOVES = {"ask": 8, "again": 3, "leave": 2, "trouble": 4, "calm": 2, "restart": 1, "delete": 2}
MOVES |= {"switch": 1, "forget": 1, "sign out": 0.3, "sign in": 1, "jump": 2, "rest": 6}
ANY_REFUSAL = [refusal(status) for status in (400, 401, 403, 404, 429)]
ANY_REFUSAL += [refusal(429, reason) for reason in ("CONCURRENT_LIMIT", "QUOTA_REACHED")]
ANY_REFUSAL += [refusal(403, reason) for reason in ("UNUSUAL_ACTIVITY", "MODEL_ACCESS_DENIED")]
ANY_REFUSAL += [refusal(400, "MINOR"), refusal(503, "PUBLIC_ERROR_HIGH_TRAFFIC")]
SMALL = collections.defaultdict(lambda: (64, 64))  # pictures, which take less time
RANKS = {"queued": 0, "in_progress": 1, "completed": 2, "failed": 2}


class Storm:
    """Makes moves, and notes what comes of them."""

    def __init__(self, w, clock):
        self.w, self.clock = w, clock
        self.faults, self.clients, self.tasks = [], [], []
        self.shown, self.deleted = {}, set()  # job id -> (rank of its status, progress)
        self.accounts = list(w.flow.accounts.values())
        w.fault = together(self.faults)

    async def move(self, name, number):
        """The number decides what the name leaves open."""
        w = self.w
        match name:
            case "ask":
                prompt = f"prompt {len(self.clients)}"
                order = list(ways(prompt).values())[number % 8]
                key = f"key of {prompt}" if number & 64 else ""
                self.send(Client(prompt, *order, key))
            case "again":
                self.send(self.clients[number % len(self.clients)])
            case "leave":
                self.tasks[number % len(self.tasks)].cancel()
            case "trouble":
                self.faults.append(self.trouble(random.Random(number)))
            case "calm":
                self.faults.clear()
            case "restart":
                await w.restart()
            case "delete":
                for job in w.store.jobs()[number % 8 :][:1]:
                    reply = await w.call("DELETE", f"{VIDEOS}/{job.id}")
                    assert reply.status == 200 or reply.error["code"] == "conflict"
                    self.deleted |= {job.id} if reply.status == 200 else set()
            case "switch":
                token = w.pool.tokens[1 + number % len(self.accounts)]
                await w.pool.update(token, is_active=not token.is_active)
            case "forget":  # the access tokens
                for account in self.accounts:
                    account.at = ""
            case "sign out":
                w.flow.accounts.clear()
            case "sign in":
                w.flow.accounts = {secrets.token_hex(99): one for one in self.accounts}
                for st in list(w.flow.accounts):
                    with contextlib.suppress(flow2api.GatewayError):
                        await w.pool.add(st)
            case "jump":
                self.clock.ahead += number % 900
            case "rest":
                w.flow.video_seconds = (0.02, 100, 600)[number % 3]
                await asyncio.sleep(0.02)
                await self.look()

    def send(self, client):
        self.clients.append(client)
        self.tasks.append(asyncio.create_task(client.ask(self.w)))

    def trouble(self, chance):
        on = chance.choice(EXCHANGES)
        answer = chance.choice([*SILENT.values(), *SILENT.values(), *ANY_REFUSAL])
        through = answer not in ANY_REFUSAL and chance.random() < 0.5
        if on == "^/media/":
            answer = chance.choice((dropped, refusal(403), refusal(500), cut_off))
        return fault(on, answer, through, chance.choice((1, 3, ALWAYS)))

    async def look(self):
        """What has been shown of a job is never taken back."""
        stored = {job.id for job in self.w.store.jobs()}
        for job_id in stored | set(self.shown) - self.deleted:
            video = (await self.w.get(f"{VIDEOS}/{job_id}")).json
            rank, progress = self.shown.get(job_id, (0, 0))
            self.shown[job_id] = RANKS[video["status"]], video["progress"]
            assert rank <= self.shown[job_id][0] and progress <= self.shown[job_id][1], video


@pytest.mark.parametrize("seed", range(int(os.environ.get("FLOW2API_SCHEDULES", 40))))
async def test_no_schedule_of_faults_loses_a_clip_or_pays_twice(
    world, looks, impatient, clock, monkeypatch, seed
):
    written = collections.defaultdict(list)  # job id -> (state, fields), of each write
    put_rows = flow2api.Store.put_rows

    def put(store, *records):
        for row in (row for table, row in records if table == "jobs"):
            written[row["id"]].append((row["state"], json.loads(row["data"])))
        return put_rows(store, *records)

    monkeypatch.setattr(flow2api.Store, "put_rows", put)
    monkeypatch.setattr(flow2api, "SIMULATED_SIZES", SMALL)
    options = {"generation.video_timeout": 86400, "flow.timeout": 1, "cache.enabled": seed % 2 == 1}
    w = await world(((PRO, 100), (PRO, 70)), **options)
    await w.pool.update(w.pool.tokens[1], video_concurrency=2)
    chance, storm = random.Random(seed), Storm(w, clock)
    for move in ("ask", *chance.choices(list(MOVES), MOVES.values(), k=30)):
        await storm.move(move, chance.randrange(10**6))
    storm.faults.clear()  # all accounts are back: so each job comes to its end
    await storm.move("sign in", 0)
    clock.ahead += 5000
    w.flow.video_seconds = 0.02
    await asyncio.gather(*storm.tasks, return_exceptions=True)
    await until(lambda: not w.jobs.open)
    await storm.look()

    known = set()  # batches of jobs that may have cost something
    for writes in written.values():
        states = [state for state, _ in itertools.groupby(state for state, _ in writes)]
        assert states[0] == "queued" and states[-1] not in flow2api.OPEN
        for before, after in itertools.pairwise(states):
            assert after in flow2api.STEPS[before], states
        job = writes[-1][1]
        if job["error"].get("code", states[-1]) in ("completed", "submit_unknown"):
            known.add(job["batch"])
    requests, accepted = collections.defaultdict(set), collections.defaultdict(set)
    for number, client in enumerate(storm.clients):
        requests[client.prompt].add(client.key or number)
    for medium in w.flow.media.values():
        accepted[medium.prompt].add(medium.batch)
    for prompt, batches in accepted.items():
        assert batches <= known and len(batches) <= len(requests[prompt]), prompt
    for job in w.store.jobs(states=["completed"]):
        for index, output in enumerate(job.done()):
            medium = w.flow.media[output.name]
            content = await w.get(f"{VIDEOS}/{job.id}/content?index={index}")
            assert (medium.batch, medium.file()) == (job.batch, content.body)
    clips = sum(medium.kind == "video" for medium in w.flow.media.values())
    assert sum(account.credits for account in storm.accounts) == 170 - 20 * clips
    leased = [(token.busy.total(), token.reserved) for token in w.pool.tokens.values()]
    assert (leased, w.pool.queue) == ([(0, 0)] * 2, [])


# ---- A clip is never lost and never paid twice: whenever the process ends ----


@pytest.mark.parametrize("model", ["veo_3_1-fast", "nano_banana_pro"])
@pytest.mark.parametrize("on", [PAID, "batchCheck|^/media/"])
async def test_a_job_survives_the_end_of_the_process(world, looks, clock, model, on):
    """During the submit, or later; and clients hear what was sent."""
    w = await world(**{"cache.enabled": True})
    await w.pool.update(w.token, image_concurrency=1, video_concurrency=1)
    w.fault = hold(on, through=True)
    clients = [asyncio.create_task(w.chat(model))]
    await w.fault.seen.wait()
    (job,) = w.jobs.open.values()
    clients.append(asyncio.create_task(w.chat(model)))
    await until(lambda: w.pool.queue)
    expect_error(w, await w.get(f"{VIDEOS}/{job.id}/content"), "task_not_completed")
    await w.stop_gateway()
    sent, unsent = await asyncio.gather(*clients)
    assert sent.headers["x-should-retry"] == "false"
    message = expect_error(w, sent, "interrupted")["message"]
    assert job.id in message and "goes on" in message and "was not sent" not in message
    message = expect_error(w, unsent, "shutting_down")["message"]
    assert "was not sent" in message and "goes on" not in message
    w.fault.release.set()
    clock.ahead = 2000  # more than generation.video_timeout
    await w.start_gateway()
    job = await w.end_of(job.id)
    assert (job.state, len(job.done()), len(w.paid())) == ("completed", 1, 1)
    (medium,) = w.flow.media.values()
    assert (w.data / "tmp" / job.outputs[0].file).read_bytes() == medium.file()


# The gateway of these tests does by its own hand what from outside would need luck.
DRIVER = """
import asyncio, itertools, os, resource, sys, flow2api
die = lambda *_: os.kill(os.getpid(), 9)
fill_disk = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))  # of each file

def on(name, before=None, after=None, owner=flow2api.RestFlow, number=0):
    real, numbers = getattr(owner, name), itertools.count(1)
    def call(*arguments):
        hit = number in (0, next(numbers))
        hit and before and before()
        result = asyncio.ensure_future(real(*arguments))
        hit and after and result.add_done_callback(after)
        return result
    setattr(owner, name, call)

flow2api.Jobs.LOOKS, flow2api.Jobs.FIRST_LOOK = 4, 0.05
"""
AT_WRITE = "on('put_rows', {}={}, owner=flow2api.Store, number={})"


class Apart(World):
    """A world whose gateway is a process, which runs lines of Python of our `own` first."""

    def __init__(self, run, data):
        super().__init__(data)
        self.run, self.own = run, ""

    async def begin(self, *tiers, own="", **settings):
        """Starts it all, with accounts of these tiers."""
        self.own, self.settings = own, settings
        await self.start()
        owner = await self.owner()
        for number, tier in enumerate(tiers):
            st = self.flow.add_account(f"user{number}@example.com", tier, 10**6)
            assert (await owner("POST", "/api/tokens", {"st": st})).status == 200
        return self

    async def launch(self):
        """Starts the process; it doesn't serve yet."""
        values = self.values() | {"server.host": "127.0.0.1", "server.port": 0}
        names = [f"FLOW2API_{name.replace('.', '_').upper()}" for name in values]
        variables = dict(zip(names, map(str, values.values()), strict=True))
        env = environment(PYTHONPATH=str(REPOSITORY), **variables)
        code = f"{DRIVER}\n{self.own}\nsys.exit(flow2api.main([]))"
        self.program = await self.run(sys.executable, "-c", code, cwd=self.data.parent, env=env)

    async def serves(self):
        """Waits until it does -> whether it does, and has not died before."""
        await until(lambda: self.program.serves or self.dead(), 60)
        self.url = self.program.url if self.program.serves else ""
        return self.url

    async def start_gateway(self):
        await self.launch()
        assert await self.serves(), self.program.log

    def dead(self):
        return self.program.process.returncode is not None

    async def kill(self):
        with contextlib.suppress(ProcessLookupError):  # it may have died by itself
            os.kill(self.program.process.pid, signal.SIGKILL)
        assert await self.program.end() == -signal.SIGKILL, self.program.log

    async def stop_gateway(self):
        assert self.dead() or await self.program.stop() == 0, self.program.log

    def states(self):
        """Job id -> state, on the disk: of some no client has seen the id."""
        with contextlib.closing(sqlite3.connect(self.data / "flow2api.db")) as db:
            return dict(db.execute("SELECT id, state FROM jobs").fetchall())

    def at_rest(self):
        return not {*flow2api.OPEN} & {*self.states().values()}


@pytest.fixture
async def apart(run, tmp_path, monkeypatch):
    """`await apart(*tiers of its accounts, **settings)` -> a world apart."""
    monkeypatch.setattr(flow2api, "SIMULATED_SIZES", SMALL)
    made = Apart(run, tmp_path / "data")
    yield made.begin
    await made.stop()


async def audit(w, clients):
    """Holds our books against Flow's, when all is at rest -> the jobs of our store."""
    await until(w.at_rest, 240)
    files = {}
    for job_id in w.states():
        link = f"{VIDEOS}/{job_id}/content?index="
        replies = [await w.get(f"{link}{index}") for index in range(2)]
        files[job_id] = [reply.body for reply in replies if reply.status == 200]
    await w.stop_gateway()
    with opened(w.data) as store:
        jobs = store.jobs()
    told = [client.ids for client in clients]
    assert set().union(*told) <= {job.id for job in jobs} == set(files)
    assert max(map(len, told)) <= 1
    assert len({job.prompt for job in jobs}) == len(jobs), "two jobs of one request"
    accounts, owned = list(w.flow.accounts.values()), []
    for job in jobs:
        assert len(job.outputs) == (job.n if job.state == "completed" else 0)
        assert job.state != "cancelled" or not job.detached
        scale = 2 if job.plan.upscale == "2K" else 1
        whole = [w.flow.media[output.name].file(scale) for output in job.done()]
        assert files[job.id] == whole, f"{job.id} is not what Flow has made"
        for output in job.outputs:
            owned.append((output.name.removesuffix("_upsampled"), job.prompt))
            account = accounts[job.token_id - 1]
            account.credits += job.plan.cost(account.tier)
    paid = [medium for medium in w.flow.media.values() if "_upsampled" not in medium.name]
    assert sorted(owned) == sorted((medium.name, medium.prompt) for medium in paid)
    assert {account.credits for account in accounts} == {10**6}
    return jobs


async def test_whenever_the_process_is_killed_no_clip_is_lost_or_paid_twice(apart):
    """At its start, before or after one of its writes, or at any other instant."""
    rounds, seed = int(os.environ.get("FLOW2API_KILL_ROUNDS", 15)), secrets.randbits(32)
    print("seed", seed)
    dice = random.Random(seed)

    async def slow(request, handler):  # leaves more time for kills where they hurt
        await request.read()
        paid = bool(re.search(PAID, request.path))
        slow.busy += paid
        await asyncio.sleep(dice.uniform(0, 0.3) * paid)
        answer = await handler(request)
        slow.busy -= paid
        await asyncio.sleep(dice.uniform(0, 0.3) * paid)
        return answer

    w = await apart(PRO, ULTRA, PRO, **{"generation.video_timeout": 30})  # for upscales not sent
    w.fault, slow.busy = slow, 0
    clients, again, clips = [], [], []
    await w.kill()
    for how in (*dice.choices(("start", "before", "after", "time", "time"), k=rounds), "never"):
        at_write = AT_WRITE.format(how, "die", dice.randint(1, 40))
        w.own = at_write if how in ("before", "after") else ""
        w.flow.video_seconds = dice.uniform(0.3, 1)
        w.flow.image_seconds = dice.uniform(0.05, 0.3)
        w.settings["cache.enabled"] = dice.random() < 0.5
        await until(lambda: not slow.busy)  # for lost submits are not looked for for long
        await w.launch()
        if how == "start":
            await asyncio.sleep(dice.uniform(0.2, 1.2))
        if how == "start" or not await w.serves():
            await w.kill()
            continue
        asking = again
        for way in dice.sample(list(ways(""))[: None if clips else -2], dice.randint(3, 6)):
            prompt = f"boat {len(clients)}"
            order = ways(prompt, dice.choice(clips or [""]))[way]
            clients.append(Client(prompt, *order, prompt * (dice.random() < 0.4)))
            asking.append(clients[-1])
        tasks = [asyncio.create_task(client.ask(w)) for client in asking]
        seconds = {"time": dice.uniform(0, 1.5), "never": None}.get(how, 2)
        await asyncio.wait(tasks, timeout=seconds)
        if how != "never":
            await w.kill()
        answers = dict(zip(asking, await asyncio.gather(*tasks), strict=True))
        assert {*answers.values()} <= {"", "cut off", "submit_unknown"}
        again = []
        for client, code in answers.items():
            if client.key and (code == "cut off" or dice.random() < 0.2):
                again.append(client)
            if not code and "async_mode" in client.body:
                clips += client.ids
    assert "completed" in {job.state for job in await audit(w, clients)}


CHAT_4K = (CHAT, chat_body("veo_3_1-fast-4k", "a boat", [DATA]))
CLIP_4K = (VIDEOS, {"prompt": "a boat", "model": "veo_3_1-fast-4k", "image": DATA})
PICTURE_2K = (CHAT, chat_body("nano_banana_pro-2K", "a boat"))
PICTURE = (IMAGES, {"prompt": "a boat"})
IN_JOBS = "on('{}', {}=die, owner=flow2api.Jobs)"
POINTS = {  # the request; where its process dies by its own hand; its end
    "chat, before the upload": (CHAT_4K, "on('upload', before=die)", "cancelled"),
    "clip, before the upload": (CLIP_4K, "on('upload', before=die)", "completed"),
    "before the submit": (CHAT_4K, "on('submit', before=die)", "submit_unknown"),
    "before a clip's answer is kept": (CHAT_4K, "on('submit', after=die)", "completed"),
    "before a picture's is": (PICTURE_2K, "on('submit', after=die)", "completed"),
    "before a picture's last write": (PICTURE, IN_JOBS.format("_end", "before"), "completed"),
    "after a picture's last write": (PICTURE, IN_JOBS.format("_end", "after"), "completed"),
    "before the first poll": (CHAT_4K, "on('poll', before=die)", "completed"),
    "while a clip is upscaled": (CHAT_4K, "on('upscale', after=die)", "completed"),
    "while a picture is upscaled": (PICTURE_2K, "on('upscale', before=die)", "completed"),
    "when a larger picture is kept": (PICTURE_2K, IN_JOBS.format("_await", "before"), "completed"),
    "in the middle of a download": (CLIP_4K, "", "completed"),
}


@pytest.mark.parametrize("point", POINTS)
async def test_a_job_whose_process_is_killed_at_this_point_ends_as_promised(apart, point):
    """Also when the next process, which goes on with it, is killed, too."""
    order, own, end = POINTS[point]
    w = await apart(ULTRA, own=own, **{"cache.enabled": order is not PICTURE})
    w.fault = fault("^/media/", SILENT["a slow drip"], times=1)
    client = Client("a boat", *order)
    await client.ask(w)
    await until(lambda: w.dead() or (not own and any(w.data.glob("tmp/*.part"))), 30)
    await w.kill()
    w.fault = None
    w.own = "on('find', before=die); on('resolve', before=die)"
    await w.launch()
    await until(lambda: w.dead() or (w.program.serves and w.at_rest()), 60)
    await w.kill()
    w.own = ""
    await w.start_gateway()
    await until(w.at_rest, 60)  # what it fetches now is whole by then
    parts = list((w.data / "tmp").glob("*.part"))
    assert bool(parts) == (not own)
    for name in (name for part in parts for name in (part.name, f"{part.stem}.mp4")):
        assert (await w.get(f"/tmp/{name}")).status == 404
    (job,) = await audit(w, [client])
    assert (job.error.get("code", job.state), job.notes) == (end, [])


@pytest.mark.parametrize("write", range(5, 17))
async def test_a_disk_that_is_full_from_a_write_on_costs_nothing(apart, write):
    own = AT_WRITE.format("before", "fill_disk", write)  # 4: there is an account
    w = await apart(PRO, own=own, **{"cache.enabled": True})
    orders = ("stream", "pictures", "left alone")
    clients = [Client(order, *ways(order)[order], f"{order} key") for order in orders]
    codes = []
    for client in clients:
        try:
            codes.append(await asyncio.wait_for(client.ask(w), 2))
        except TimeoutError:  # what was taken on waits for room
            codes.append("waits")
    assert {"disk_full", "waits"} & set(codes)
    made = {medium.prompt for medium in w.flow.media.values()}
    for order, code in zip(orders, codes, strict=True):
        assert code in ("", "waits") or order not in made
    w.own = ""
    await w.restart()
    assert [await client.ask(w) for client in clients] == ["", "", ""]
    assert {job.state for job in await audit(w, clients)} == {"completed"}


# ---- A request that is repeated makes one job ----

AGAIN = {"x-stainless-retry-count": "1"}  # OpenAI's packages count what they send again

LINK = "http://flow/boat"  # of a picture
CREATORS = {
    "picture": (IMAGES, BOAT),
    "clip": (VIDEOS, BOAT),
    "picture stream": (IMAGES, BOAT | {"stream": True}),
    "edit": (EDITS, BOAT | {"image": LINK}),
    "chat": (CHAT, chat_body("veo_3_1-fast", "a boat", [LINK])),
    "chat stream": (CHAT, chat_body("imagen_4", "a boat", [LINK]) | {"stream": True}),
    "clip waited for": (VIDEOS, BOAT | {"image": LINK, "async_mode": False}),
}


def boat(times=ALWAYS):
    return fault("/boat$", lambda request: web.Response(body=PNG), times=times)


async def create(w, name, key="a key", path="", headers=None, **fields):
    """A request of CREATORS, with an Idempotency-Key unless there are other headers."""
    usual_path, body = CREATORS[name]
    w.fault = w.fault or boat()
    body = json.loads(json.dumps(body | fields).replace("http://flow", w.flow.address))
    headers = {"Idempotency-Key": key} if headers is None else headers
    return await w.post(path or usual_path, body, headers=headers)


def one_job(w, first, *others):
    """The others are answers about the job of the first, which is the only one."""
    assert first.status == 200 and not first.replayed, first
    for reply in others:
        assert (reply.status, reply.job_id, reply.replayed) == (200, first.job_id, True)
    assert len(w.store.jobs()) == 1 >= len(w.paid())


@pytest.mark.parametrize("name", CREATORS)
async def test_a_key_makes_one_job_and_fits_no_other_request(world, name):
    """Over restarts, and when its picture is gone; what was refused has not used it."""
    w = await world(accounts=(), video_seconds=0.05)
    expect_error(w, await create(w, name, n=9), "invalid_request")
    expect_error(w, await create(w, name), "no_accounts")
    assert not w.store.jobs()
    await w.account()
    held = hold(PAID)
    w.fault = together([boat(times=1), held])
    clients = [asyncio.create_task(create(w, name)) for _ in range(3)]
    await held.seen.wait()
    held.release.set()
    replies = sorted(await asyncio.gather(*clients), key=lambda reply: reply.replayed)
    await w.end_of(replies[0].job_id)
    if name in ("picture", "edit", "clip waited for"):
        assert replies[0].body == replies[1].body == replies[2].body
    for _ in range(2):
        replies.append(await create(w, name))
        expect_error(w, await create(w, name, n=2), "idempotency_conflict")
        for path in {IMAGES, EDITS, VIDEOS} - {CREATORS[name][0]}:  # of the same body
            expect_error(w, await create(w, name, path=path), "idempotency_conflict")
        await w.restart()
    one_job(w, *replies)
    assert len(w.paid()) == 1


async def test_the_same_request_in_other_bytes_is_the_same_request(world):
    """Its fields in another order, at an alias; its form with another boundary; a clip's clips."""
    w = await world(video_seconds=0.05)
    headers = {"Idempotency-Key": "a key"}
    replies = [await create(w, "picture", path="/images/generations", n=2)]
    for prefix in ("/v1", "/flow/v1", "/v1/v1"):
        path = f"{prefix}/images/generations"
        replies.append(await w.post(path, {"n": 2, **BOAT}, headers=headers))
    one_job(w, *replies)
    assert w.store.jobs()[0].origin == "images"
    headers, replies = {"Idempotency-Key": "another"}, []
    for picture in (PNG, PNG, flow2api.block_picture("another", 64, 64)):
        form = aiohttp.FormData(BOAT)
        form.add_field("image", picture, filename="a.png", content_type="image/png")
        replies.append(await w.post(EDITS, data=form, headers=headers))
    expect_error(w, replies.pop(), "idempotency_conflict")
    source = (await create(w, "clip waited for", "a third")).job_id
    for path in (f"{VIDEOS}/edits", EXTEND, f"{VIDEOS}/{source}/remix"):
        fields = {} if "remix" in path else {"video": {"id": source}}
        replies += [await create(w, "clip", path, path, **fields) for _ in range(2)]
        await w.end_of(replies[-1].job_id)
    assert [reply.replayed for reply in replies] == [False, True] * 4
    ids = [reply.job_id for reply in replies]
    assert ids[::2] == ids[1::2] and len({source, *ids}) == 5 == len(w.paid()) - 1


async def test_a_key_stands_for_a_day_and_is_a_text_of_255_characters_at_most(world, clock):
    w, replies = await world(), []
    for clock.ahead in (0, 86000, 86500, 172500):  # the last is the day of the second job
        replies.append(await create(w, "picture"))
    assert [reply.replayed for reply in replies] == [False, True, False, True]
    replies += [await create(w, "picture", key) for key in ("k" * 254, "k" * 255, "", "")]
    first, again, second, third, *others = [reply.job_id for reply in replies]
    assert first == again != second == third
    assert len({first, second, *others}) == len(w.paid()) == 6
    expect_error(w, await create(w, "picture", "k" * 256), "invalid_request")
    headers = f"Authorization: Bearer {w.key}\r\nIdempotency-Key: k\udcff"
    headers += "\r\nContent-Type: application/x-www-form-urlencoded"
    error = expect_error(w, await send_raw(w, "POST", IMAGES, headers), "invalid_request")
    assert "Idempotency-Key" in error["message"]


@pytest.mark.parametrize("name", ["picture", "chat", "clip waited for"])
async def test_what_has_failed_is_told_and_what_is_kept_given_again(world, name):
    """Though Google has lost it. Neither is made anew for its key, nor what was deleted."""
    w = await world(video_seconds=0.05, **{"cache.enabled": True})
    bad = {"prompt": "unsafe", "messages": [{"role": "user", "content": "unsafe"}], "key": "bad"}
    first, second = [await create(w, name, **bad) for _ in range(2)]
    for reply in (first, second):
        expect_error(w, reply, "content_policy_violation")
    assert first.job_id == second.job_id and second.replayed and not first.replayed
    assert (await w.call("DELETE", f"{VIDEOS}/{first.job_id}")).status == 200
    expect_error(w, await create(w, name, **bad), "task_not_found")
    assert len(w.paid()) == 1
    w.flow.calls.clear()
    first = await create(w, name)
    w.fault = fault("/media/|UrlRedirect", refusal(404))
    w.token.update(is_active=False, at_expires=0)
    (output,) = w.store.job(first.job_id).outputs
    output.url_expires = 0
    await w.store.put(output)
    one_job(w, first, await create(w, name))
    (w.data / "tmp" / output.file).unlink()
    reply = await create(w, name)
    if reply.status == 200:  # it has a link
        link = re.search(r"https?://[^\s\"'<>)\\]+/tmp/[\w.-]+", reply.body.decode())[0]
        reply = await w.fetch(link)
    expect_error(w, reply, "content_not_found")


@pytest.mark.parametrize("name", CREATORS)
async def test_what_a_client_sends_again_by_itself_is_made_once(world, clock, name):
    """In an hour, though it has left after the submit. One that does not count is a new one.
    OpenAI's packages also send again what was refused by 429 or 503: that is no earlier job."""
    w = await world(video_seconds=0.05)
    held = hold(PAID)
    w.fault = together([boat(), held])
    client = asyncio.create_task(create(w, name, headers={}))
    await held.seen.wait()
    (job,) = w.jobs.open.values()
    await leave(w, client)
    w.token.is_active = False
    ways_back = [{}, AGAIN]
    if name == "clip":  # its client had an answer: what does not count is a new one
        expect_error(w, await create(w, name, headers=ways_back.pop(0)), "no_accounts")
    repeats = [asyncio.create_task(create(w, name, headers=more)) for more in ways_back]
    if name != "clip":
        await until(lambda: job.clients == 2 or any(repeat.done() for repeat in repeats))
    held.release.set()
    assert (await w.end_of(job.id)).state == "completed" and not w.token.busy.total()
    for reply in (*await asyncio.gather(*repeats), await create(w, name, headers=AGAIN)):
        assert (reply.status, reply.job_id, reply.replayed) == (200, job.id, True)
    expect_error(w, await create(w, name, headers={}), "no_accounts")
    w.token.is_active = True
    replies = [await create(w, name, headers=AGAIN)]
    replies += [await create(w, name, headers=more, user="x") for more in (AGAIN, {})]
    clock.ahead = 4000
    replies.append(await create(w, name, headers=AGAIN))
    assert not any(reply.replayed for reply in replies)
    assert len({job.id, *(reply.job_id for reply in replies)}) == 5 == len(w.store.jobs())


# ---- Whoever leaves or stops at a bad moment loses and pays nothing ----


async def queued(w, request):
    """A request whose account pauses -> its client, and its job in the queue."""
    w.token.paused_until = flow2api.now() + 30
    client = asyncio.create_task(request)
    await until(lambda: w.pool.queue)
    return client, w.pool.queue[0]


async def leave(w, client):
    """The client goes away, and the gateway knows."""
    client.cancel()
    await until(lambda: not any(one.transport for one in w.runner.server.connections))


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("name", ["picture", "picture stream", "chat", "chat stream"])
async def test_who_leaves_before_the_submit_pays_nothing_or_comes_back(world, name, restart):
    w = await world(video_seconds=0.05)
    for headers in ({}, AGAIN):  # what was cancelled is made anew
        client, job = await queued(w, create(w, name, headers=headers))
        repeat = asyncio.create_task(create(w, name, headers=AGAIN))
        await until(lambda job=job: job.clients == 2)
        client.cancel()
        await until(lambda job=job: job.clients == 1)
        assert job.state == "queued"
        repeat.cancel()
        assert (await w.end_of(job.id)).state == "cancelled"
    client, job = await queued(w, create(w, name))
    await leave(w, client)
    if restart:
        await w.restart()
    await w.pool.update(w.token, paused_until=0)
    assert (await w.end_of(job.id)).state == "completed"
    reply = await create(w, name)
    assert (reply.status, reply.job_id, len(w.paid())) == (200, job.id, 1)


@pytest.mark.parametrize("key", ["a key", ""])
async def test_a_client_may_leave_while_its_job_is_written(world, key):
    """Without a key it can not come back, since it never learnt the job, and does not pay."""
    w = await world()
    put_rows, go = w.store.put_rows, asyncio.Event()

    async def write(*rows):
        w.store.put_rows = put_rows
        await go.wait()
        await put_rows(*rows)

    w.store.put_rows = lambda *rows: asyncio.ensure_future(write(*rows))
    client = asyncio.create_task(create(w, "clip", key))
    await until(lambda: w.store.put_rows == put_rows)  # it is being written
    await leave(w, client)
    back = asyncio.create_task(create(w, "clip", "a key"))
    go.set()
    assert (await w.end_of((await back).job_id)).state == "completed"
    states = [job.state for job in w.store.jobs(oldest_first=True)]
    assert states == (["completed"] if key else ["cancelled", "completed"])
    await w.restart()
    assert not w.jobs.open and len(w.paid()) == 1


async def test_no_cancel_is_lost_in_the_moment_of_a_change(world):
    """wait_for of Python 3.11 loses one that comes together with what it waits for."""
    w = await world(video_seconds=30)
    client, job = await queued(w, w.chat())
    for turns in range(6):
        watcher = asyncio.create_task(w.jobs.completed(job))
        await asyncio.sleep(0.01)
        w.jobs._tell(job)
        for _ in range(turns):
            await asyncio.sleep(0)
        watcher.cancel()
        ended, _ = await asyncio.wait([watcher], timeout=1)
        assert ended, turns
    await w.pool.update(w.token, paused_until=0)  # a lease, and the stop at once
    async with asyncio.timeout(5):
        await w.jobs.stop()
    client.cancel()
    assert not w.paid()


# ---- A failure is told by its code and does no more than it must ----

FAILURES = (  # code, what its message names, a fault of Flow, model
    ("invalid_image", "TOO_LARGE", says(400, "IMAGE_TOO_LARGE", "uploadImage")),
    ("content_policy_violation", "UNSAFE", None),
    ("content_policy_violation", "UNSAFE", None, "veo_3_1-fast"),
    ("upstream_changed", "Not so.", says(400)),
    ("captcha_required", "UNUSUAL", says(403, "UNUSUAL_ACTIVITY")),
    ("model_not_for_account", "ACCESS", says(403, "MODEL_ACCESS_DENIED")),
    ("account_refused", "REGION", says(403, "USER_REGION_DISALLOWED")),
    ("account_throttled", "THROTTLED", says(429, "USER_REQUESTS_THROTTLED")),
    ("account_daily_quota", "DAILY", says(429, "PER_MODEL_DAILY_QUOTA_REACHED")),
    ("account_no_credits", "QUOTA", says(429, "USER_QUOTA_REACHED")),
    ("account_busy", "CONCURRENT", says(429, "CONCURRENT_LIMIT_REACHED")),
    ("account_session_ended", "fresh access token", says(401)),
    ("upstream_busy", "HIGH", says(503, "HIGH_TRAFFIC")),
    ("upstream_error", "Not so.", says(503, "", "uploadImage")),
    ("upstream_retired", "flow.google.com", fault("createProject", RETIRED)),
    ("submit_unknown", "see project", fault(PAID, dropped)),
    ("generation_failed", "ODD", replaced("batchCheck", "UNSAFE", "ODD"), "veo_3_1"),
    ("generation_timeout", "9", replaced("batchCheck", "FAILED", "ACTIVE"), "veo_3_1"),
)
TRIES = {"RETRY": 3, "ACCOUNT": 2, "BAN": 2, "SESSION": 2}  # of two accounts; else 1


@pytest.mark.parametrize("row", FAILURES, ids=lambda row: f"{row[0]} {row[1]}")
async def test_a_failure_does_no_more_than_it_must(world, impatient, looks, row):
    """To the accounts, and to Flow. While all accounts pause, it says until when."""
    w = await world(((PRO, 100), (PRO, 100)), video_seconds=0.05, **{"flow.max_poll_attempts": 9})
    for token in w.pool.tokens.values():
        token.project_id = ""
    code, named, w.fault, *model = row
    ask = functools.partial(w.chat, *model or ["nano_banana_pro"], "unsafe", [DATA])
    reply = await ask()
    assert named in expect_error(w, reply, code)["message"]
    assert reply.status != 401 and reply.headers["x-should-retry"] == "false"
    if code == "account_throttled":
        reply = await ask()
        expect_error(w, reply, code)
        assert 200 < int(reply.headers["Retry-After"]) < 400
    effect = flow2api.ERRORS[code][1].name
    tries = len(w.paid()) or len(w.fault.seen)
    renewed = code == "account_session_ended"  # each account's access token, once
    assert tries == TRIES.get(effect, 1) << renewed
    blamed = effect in ("ACCOUNT", "BAN", "SESSION")
    failed = w.jobs.open == {} and "veo" in "".join(model)  # a clip counts where it was made
    errors = [token.error_count for token in w.pool.tokens.values()]
    assert sorted(errors) == ([0, 1] if failed else [blamed] * 2)
    for token in w.pool.tokens.values():
        assert (token.is_active, token.failures) == (True, effect == "BAN")
        assert (token.paused_until > 0) == blamed
        assert (token.busy.total(), token.reserved) == (0, 0)


MISTAKES = (  # code, param, method, path, body
    ("invalid_request", "model", "POST", CHAT, chat_body("imagen_4" + "-4s" * 9999, "b")),
    ("tier_required", None, "POST", CHAT, chat_body("veo_3_1-4k", "boat")),
    ("no_credits", None, "POST", CHAT, chat_body("veo_3_1", "boat")),
    ("mode_not_available", "model", "POST", CHAT, chat_body("veo_3_1", "b", [DATA] * 3)),
    ("unsupported_parameter", "style_id", "POST", VIDEOS, BOAT | {"style_id": "x"}),
    ("model_not_found", "model", "GET", "/v1/models/veo-9"),
    ("method_not_allowed", None, "DELETE", CHAT),
    ("request_too_large", None, "POST", CHAT, chat_body("veo_3_1", "boat" * 300_000)),
)


async def test_a_mistake_in_a_request_is_told_before_anything_is_sent(world):
    w = await world(((PRO, 90), (FREE, 50)), **{"limits.body_mb": 1})
    w.flow.calls.clear()
    for code, param, *request in MISTAKES:
        reply = await w.call(*request)
        assert expect_error(w, reply, code)["param"] == param and len(reply.body) < 1000
        assert not {"x-should-retry", "X-Job-Id"} & set(reply.headers)
        assert (w.flow.calls, w.jobs.open, w.store.jobs()) == ([], {}, [])


def test_every_error_code_is_produced_by_a_test():
    produced = re.findall(r'expect_error\(w, .*"(\w+)"\)', pathlib.Path(__file__).read_text())
    produced += [row[0] for row in (*FAILURES, *MISTAKES)]
    produced.append("too_many_logins")  # test_guessing_…: the admin API tells no codes
    assert set(produced) == set(flow2api.ERRORS)


def written_together(w, number):
    """There is room for each of so many jobs, when it is let in."""
    put_rows, burst = w.store.put_rows, asyncio.Barrier(number)

    async def write(*rows):
        await burst.wait()
        w.store.put_rows = put_rows
        await put_rows(*rows)

    w.store.put_rows = lambda *rows: asyncio.ensure_future(write(*rows))


async def test_a_clip_that_its_client_has_heard_of_is_not_refused_in_a_burst(world):
    w = await world(video_seconds=0, **{"limits.queue": 1, "flow.poll_interval": 0.05})
    w.token.paused_until = flow2api.now() + 30
    written_together(w, 3)
    clips = await asyncio.gather(*(w.post(VIDEOS, {"prompt": f"boat {n}"}) for n in range(3)))
    await until(lambda: len(w.pool.queue) == 3)
    await w.pool.update(w.token, paused_until=0)
    for clip in clips:
        assert (await w.end_of(clip.json["id"])).state == "completed"


async def test_the_queue_has_a_limit_also_in_a_burst_and_can_be_left(world):
    w = await world(**{"limits.queue": 2})
    w.token.paused_until = flow2api.now() + 30
    written_together(w, 8)
    clients = [asyncio.create_task(w.chat(text=f"boat {number}")) for number in range(8)]
    await until(lambda: sum(client.done() for client in clients) == 6)
    picture = asyncio.create_task(w.chat("nano_banana_pro"))  # these have a queue of their own
    await until(lambda: len(w.pool.queue) == 3)
    reply = await w.chat()
    expect_error(w, reply, "queue_full")
    assert int(reply.headers["Retry-After"]) > 0
    job = w.pool.queue[0]  # deleted as Jobs.get has it, when it reads before create goes on
    await w.jobs.delete(w.store.job(job.id))
    await w.pool.update(w.token, paused_until=0)
    replies = sorted(await asyncio.gather(*clients), key=lambda reply: reply.status)
    expect_error(w, replies[1], "cancelled")
    assert [reply.status for reply in replies] == [200, 409] + [429] * 6
    assert (await picture).content and job.state == "cancelled" and len(w.paid()) == 2


# ---- The process never ends by itself ----

NOUGHTS, PLAIN = bytes(6), b"HTTP/1.1 200 OK\r\n"
HANDSHAKES = {  # way -> the bytes that it reads (0: a head) and answers; a refusal; odd
    "socks5": [(3, b"\5\0"), (10, b"\5\0\0\1" + NOUGHTS), b"\5\2\0\1" + NOUGHTS, b"\5\0\0\x09"],
    "socks4": [(9, b"\0\x5a" + NOUGHTS), b"\0\x5b" + NOUGHTS, b"\7\x5a" + NOUGHTS],
    "http": [(0, PLAIN + b"Content-Length: 9\r\n\r\nh"), b"HTTP/1.1 407 No\r\n\r\n", b"HTTP/9\n"],
    # an HTTP proxy before an https address
    "connect": [(0, PLAIN + b"\r\n"), b"HTTP/1.1 403 No\r\n\r\n", PLAIN[:9] + b"odd\r\n\r\n"],
}
MANNERS = ("close", "close after greeting", "garbage", "half", "refused", "odd", "hang", "leave")


async def break_off(way, manner, reader, writer):
    """What a proxy does that is broken in this manner; `leave`: it does so when all is said."""
    *steps, refused, odd = HANDSHAKES[way]
    with contextlib.suppress(OSError, asyncio.IncompleteReadError):
        for size, answer in steps if manner != "close" else ():
            await (reader.readexactly(size) if size else reader.readuntil(b"\r\n\r\n"))
            if manner == "hang":
                await reader.read()
            if manner in ("hang", "close after greeting"):
                break
            last = {"refused": refused, "odd": odd, "half": answer[: len(answer) // 2]}
            answer = last.get(manner, answer) if answer is steps[-1][1] else answer
            writer.write(b"\x99garbage\r\n\r\n" * 9 if manner == "garbage" else answer)
            await writer.drain()
    writer.close()


@pytest.mark.parametrize(("way", "manner"), [*itertools.product(HANDSHAKES, MANNERS)])
async def test_a_broken_proxy_ends_nothing(world, impatient, looks, endless, way, manner):
    """Neither a check, nor a clip under way, nor a request; and nothing is sent twice."""
    w = await world(video_seconds=0.05)
    broken = functools.partial(break_off, way, manner)
    server = await asyncio.start_server(broken, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    await w.post(VIDEOS, BOAT)
    (running,) = await w.running()
    file, api = w.live.layers["file"], w.live["flow.api_base_url"]
    file["flow.api_base_url"] = api.replace("http:", "https:") if way == "connect" else api
    file["proxy.proxy_url"] = f"{'http' if way == 'connect' else way}://{host}:{port}"
    file.update({"proxy.proxy_enabled": True, "flow.timeout": 0.2})
    w.token.checked_at = 0
    await w.pool.ask(w.token, flow2api.now())
    with pytest.raises(flow2api.GatewayError):
        await w.pool.check(w.token)
    client, jobs = asyncio.create_task(w.chat(text="a lost boat")), w.jobs.open
    await until(lambda: client.done() or any(job.state == "unknown" for job in jobs.values()))
    file.update({"proxy.proxy_enabled": False, "flow.api_base_url": api})
    codes = "upstream_unreachable proxy_unavailable"
    if way == "http" or (manner == "leave" and way != "connect"):  # it may have arrived
        codes += " submit_unknown upstream_changed upstream_error"
    reply = await client
    assert reply.error["code"] in codes.split() and expect_error(w, reply, reply.error["code"])
    if (way, manner) == ("connect", "refused"):
        assert "the proxy answers HTTP 403" in reply.error["message"]
    assert (await w.end_of(running.id)).state == "completed"
    assert (await w.chat(text="a boat that arrives")).content
    assert not w.jobs.open and w.token.is_active and not w.token.busy.total()
    assert len(w.paid()) == len(w.flow.media) == 2
    server.close()


CALLS_TO_FLOW = {  # a part of their path -> a model that leads to them
    **dict.fromkeys(("auth/session", "createProject", "/credits", "uploadImage"), BANANA),
    **dict.fromkeys(("batchCheck", "projectInitialData", "UrlRedirect"), FAST),
    **{"batchGenerateImages": BANANA, "GenerateVideoText": FAST},
    **{"upsampleImage": f"{BANANA}-2K", "UpsampleVideo": f"{FAST}-1080p"},
}
NESTED = '{"a":' * 500 + "1" + "}" * 500
EVERY_NAME = """{"name": @, "projectId": @, "credits": @, "remainingCredits": @, "access_token": @,
 "userPaygateTier": @, "user": {"email": @, "name": @}, "expires": @, "encodedImage": @,
 "media": [{"name": @, "projectId": @, "mediaMetadata": {"mediaStatus": {"failureReasons": @}}}],
 "workflows": [{"name": @, "metadata": {"primaryMediaId": @, "batchId": @}}],
 "result": {"data": {"json": {"status": @, "result": {"projectId": @}, "projectContents": @}}}}"""


def replying(text, kind="application/json"):
    return lambda request: web.Response(text=text, content_type=kind)


BAD_REPLIES = {"half": cut_off, "HTML": replying("<html>hi</html>", "text/html")}
BAD_REPLIES["without end"] = lambda request: web.Response(body=blanks(50_000, 0))
for raw in ("Infinity", "null", "5", "[]", "[" * 10**5, "9" * 5000):
    BAD_REPLIES[raw[:9]] = replying(raw)
for raw in (NESTED, "1e999", "NaN", r'"\ud800"', '"²"', "[{}]", f'"{"9" * 9000}"'):
    BAD_REPLIES[f"all {raw[:9]}"] = replying(EVERY_NAME.replace("@", raw))


@pytest.mark.parametrize("on", CALLS_TO_FLOW)
async def test_after_bad_replies_all_goes_on(world, impatient, looks, endless, monkeypatch, on):
    """No job stands still, what Google has accepted is completed, and paid once."""
    monkeypatch.setattr(flow2api, "SIMULATED_SIZES", SMALL)
    monkeypatch.setattr(flow2api, "MAX_REPLY", 1 << 18)
    w = await world(((ULTRA, 10**6),), image_seconds=0, video_seconds=0.03)
    model, through = CALLS_TO_FLOW[on], "Generate" in on or on == "UpsampleVideo"
    for name, answer in BAD_REPLIES.items():
        if (through and "²" in name) or (on == "UpsampleVideo" and "ud800" in name):
            continue  # it could be a name
        w.flow.media.clear()
        w.fault = bad = fault(on, answer, through, times=2 - through)
        if on == "projectInitialData":
            w.fault = together([fault(PAID, dropped, through=True, times=1), bad])
        gone = {"at": "", "project_id": ""} if on in ("auth/session", "createProject") else {}
        w.token.update(checked_at=0, **gone)
        await w.pool.ask(w.token, flow2api.now())
        w.token.update(**flow2api.AWAKE)
        call = w.chat(model, f"boat {name}", [DATA] * (on == "uploadImage"))
        reply = await asyncio.wait_for(call, 10)
        assert reply.status == 200 or reply.error["code"] != "internal_error", (name, reply)
        await until(lambda: not w.jobs.open)
        media = [made for made in w.flow.media.values() if "_upsampled" not in made.name]
        job = await w.jobs.get(reply.job_id)
        assert (len(media), len(bad.seen) > 0) == (len(job.done()), True), (name, job.error)
        assert len(media) <= 1 and (job.state == "completed") is bool(media), name
    w.fault = None
    w.token.update(**flow2api.AWAKE)
    assert (await w.chat(model, "at last")).content and not w.token.busy.total()


@pytest.mark.parametrize("error", [RuntimeError("odd"), EOFError(), OSError(28, "No space")])
async def test_each_background_loop_goes_on(world, impatient, endless, monkeypatch, error):
    """After an exception in each of them."""
    w, calls = await world(video_seconds=0.3), []
    running, old = await w.post(VIDEOS, BOAT), w.data / "tmp" / f"{'a' * 32}.png"
    await w.running()
    old.write_bytes(PNG)
    os.utime(old, (0, 0))
    places = {"ask": w.pool, "expire": w.gateway.media, "_poll": w.jobs, "unfinished": flow2api}
    for name, owner in places.items():
        effects = itertools.chain([error], itertools.repeat(mock.DEFAULT))
        calls.append(mock.Mock(wraps=getattr(owner, name), side_effect=effects))
        monkeypatch.setattr(owner, name, calls[-1])
    w.token.update(checked_at=0, asked_at=0)
    w.live.put("file", "cache.timeout", 1, "test")
    await until(lambda: w.token.checked_at and not old.exists())
    assert (await w.end_of(running.job_id)).state == "completed"
    assert min(call.call_count for call in calls) > 1


@pytest.mark.parametrize("file", [False, True])
@pytest.mark.parametrize("on", ["UrlRedirect", "batchCheck", PAID])
async def test_five_paid_clips_end_when_a_full_disk_has_room_again(world, impatient, on, file):
    """Whichever of their steps did not fit; no restart is needed, and nothing is paid again."""
    w = await world(video_seconds=0.05, **{"cache.enabled": file})
    w.fault = hold("^/media/" if file and on == "UrlRedirect" else on, through=on == PAID)
    clients = [asyncio.create_task(w.chat(text=f"boat {number}")) for number in range(5)]
    await w.fault.seen.wait()
    await until(lambda: len(w.flow.media) == 5)
    jobs = list(w.jobs.open)
    with full_disk(w.store) as writes:
        w.fault.release.set()
        await until(lambda: writes.call_count > 4)
    for job_id in jobs:
        assert (await w.end_of(job_id)).state == "completed"
    assert len(jobs) == len(w.paid()) == 5 and not w.token.busy.total()
    for reply in await asyncio.gather(*clients):
        assert reply.status == 200 or reply.job_id in jobs


async def test_what_does_not_fit_is_told_logged_and_leaves_nothing(world, monkeypatch, caplog):
    """The second of two pictures, or the database. When there is room again, all is well."""
    w = await world()
    inputs, pictures = w.data / "inputs", [DATA, DATA]
    orders = {CHAT: chat_body(BANANA, "a boat", pictures), VIDEOS: BOAT | {"image": pictures}}
    orders[EDITS] = BOAT | {"image": pictures}
    real = pathlib.Path.open

    def limited(path, mode="r", *more, **options):
        full = "r" not in mode and path.name.endswith("_1")
        return open("/dev/full", "wb", 0) if full else real(path, mode, *more, **options)

    for full in (monkeypatch.context(), full_disk(w.store)):
        with full as patch:
            if isinstance(patch, pytest.MonkeyPatch):
                patch.setattr(pathlib.Path, "open", limited)
            for path, body in [*orders.items()] * 3:
                error = expect_error(w, await w.post(path, body), "disk_full")
                assert "disk" in error["message"] and not list(inputs.iterdir())
        told = [line for line in caplog.messages if re.search("disk|space", line)]
        assert 0 < len({*told}) < 5 and not w.jobs.open and not w.paid()  # the same are folded
        caplog.clear()
    with full_disk(w.store):  # the owner gets in; an account that can't be deleted stays
        owner = await w.owner()
        expect_detail(await owner("DELETE", f"/api/tokens/{w.token.id}"), 507)
    for path, body in orders.items():
        assert (await w.post(path, body)).status == 200


ODD_JSON = [
    r'"\ud800"',
    r'"a\u0000b"',
    "9" * 4000,
    "9" * 5000,
    f'"{"9" * 5000}"',
    '{"a": 1}',
    NESTED,
]
ODD_JSON += ["1e999", "-1e999", "NaN", "-1", "1.5", "true", "null", "[]", "[null]", "[[]]", "{}"]
ODD_JSON += ['""', '"²"', '"x"', '[{"a": "http://["}]', '"http://["', '"1e999"', "[" * 100_000]
ODD_JSON += ['"0001-01-01T00:00:00+14:00"', '"9999-12-31T23:59:59-14:00"']  # no years of UTC


def variants(value):
    """The JSON texts of a value that is odd in one of its places; its lists hold one thing."""
    yield from ODD_JSON
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        for text in variants(item if isinstance(item, dict | list) else []):
            rest = value | {key: "@"} if isinstance(value, dict) else ["@"]
            yield json.dumps(rest).replace('"@"', text)


def plain(value):
    """Whether it is all of our own types: what can be stored, sent and counted with."""
    if isinstance(value, flow2api.GatewayError):
        value = value.record()
    if dataclasses.is_dataclass(value):
        value = [getattr(value, item.name) for item in dataclasses.fields(value)]
    if isinstance(value, dict | list | tuple):
        return all(map(plain, value.values() if isinstance(value, dict) else value))
    if isinstance(value, str):
        return value == value.encode(errors="replace").decode()
    number = isinstance(value, int | float) and math.isfinite(value) and abs(value) < 1 << 53
    return number or value is None or isinstance(value, bytes)


ADAPTER_CALLS = {  # part of the path -> the call: adapter, token, job, output
    "auth/session": lambda u, t, j, o: u.sign_in(t),
    "createProject": lambda u, t, j, o: u.project(t),
    "/credits": lambda u, t, j, o: u.balance(t),
    "uploadImage": lambda u, t, j, o: u.upload(t, "p", PNG, "image/png"),
    "batchGenerateImages": lambda u, t, j, o: u.submit(t, j, []),
    "GenerateVideoText": lambda u, t, j, o: u.submit(t, j, []),
    "batchCheck": lambda u, t, j, o: u.poll(t, [o]),
    "projectInitialData": lambda u, t, j, o: u.find(t, j),
    "UrlRedirect": lambda u, t, j, o: u.resolve(t, o),
    "upsampleImage": lambda u, t, j, o: u.upscale(t, j, o),
    "UpsampleVideo": lambda u, t, j, o: u.upscale(t, j, o),
}


@pytest.mark.parametrize("on", ADAPTER_CALLS)
async def test_an_odd_answer_is_refused_or_read_as_values_of_our_own_types(world, on):
    """Of each call of Flow, with each oddity in each of the places of its answer."""
    w = await world(((ULTRA, 10**6),), video_seconds=0, **{"flow.poll_interval": 0.05})
    job = await w.jobs.get((await w.chat(CALLS_TO_FLOW[on])).job_id)
    upstream, good = w.pool.adapter_for(w.token), [{"a": 1}]

    async def sees(request, handler):
        answer = await handler(request)
        good.append(json.loads(answer.body))
        return answer

    async def result_of(odd):
        token = flow2api.Token(st=w.token.st, at=w.token.at, tier=ULTRA)
        try:
            result = await ADAPTER_CALLS[on](upstream, token, job, job.outputs[0])
            return [result, token.row(), flow2api.iso(token.at_expires)]
        except flow2api.GatewayError as err:
            assert "Generate" not in on or err.code == "submit_unknown", (odd[:300], err)
            return err
        except Exception as err:
            raise AssertionError(odd[:300]) from err

    if on != "UrlRedirect":  # whose good answer has no body
        w.fault = sees
        assert plain(await result_of(""))
    w.fault = fault(on, lambda request: web.Response(text=odd, content_type="application/json"))
    for odd in variants(good[-1]):
        result = await result_of(odd)
        assert plain(result), (odd[:300], result)


# ---- What is full, dead, slow or junk harms nobody else ----


@pytest.mark.parametrize("on", ["session", "uploadImage", "createProject", "credits"])
async def test_a_dead_network_blames_and_disables_nobody(world, impatient, clock, on):
    w = await world()
    w.fault = fault(on, dropped)
    await w.pool.update(w.token, project_id="")
    clock.ahead += 7200  # a new access token is due
    await w.chat(BANANA, pictures=[DATA])
    await until(lambda: w.fault.seen)
    blame = (w.token.failures, w.token.error_count, w.token.paused_until)
    assert w.token.is_active and blame == (0, 0, 0)
    w.fault = None
    assert (await w.chat(BANANA)).content
    old = w.token.at
    clock.ahead += 3600 - 300  # it is renewed before its end, without anybody asking
    await until(lambda: w.token.at != old)
    assert w.token.at_expires > flow2api.now() + 600


async def test_a_sick_account_holds_up_no_other_and_swallows_no_jobs(world, impatient):
    """Its status calls hang; then its proxy is dead, and there is no other account."""
    w = await world(((PRO, 1000), (PRO, 500)), video_seconds=0.1)
    sick, other = w.pool.tokens.values()
    held = hold("batchCheck")
    w.fault = lambda request, handler: (
        held(request, handler) if flow2api.bearer(request) == sick.at else handler(request)
    )
    clients = [asyncio.create_task(w.chat()) for _ in range(2)]
    await asyncio.wait(clients, return_when=asyncio.FIRST_COMPLETED)
    assert sum(client.done() for client in clients) == 1
    held.release.set()
    assert [reply.status for reply in await asyncio.gather(*clients)] == [200, 200]
    sick.proxy_url = "http://127.0.0.1:9"
    for model in ("nano_banana_pro", "veo_3_1-fast", "nano_banana_pro"):
        assert (await w.chat(model)).content  # the clip is first tried where most credits are
    assert sick.is_active and sick.error_count == 0
    sick.proxy_url, other.is_active = "socks5://", False
    expect_error(w, await w.chat("nano_banana_pro"), "proxy_unavailable")


async def test_a_full_disk_and_a_folder_that_is_gone_or_odd_hold_nobody_up(world):
    """lost+found is such a folder, where data/tmp is a volume."""
    w = await world(((ULTRA, 1000),))
    for name in ("tmp", "inputs"):
        (w.data / name / "lost+found").mkdir()
    await w.restart()
    owner, kept = await w.owner(), w.data / "tmp"
    (kept / "a.mp4").write_bytes(CLIP)
    assert (await owner("DELETE", "/api/cache")).json["cache_bytes"] == 0
    assert (kept / "lost+found").exists()
    shutil.rmtree(kept)
    assert (await owner("GET", "/api/system/info")).json["cache_bytes"] == 0
    content = (await w.chat("nano_banana_pro-2K")).content
    assert "this is the original" in content and w.token.busy.total() == 0
    w.live.put("file", "cache.enabled", True, "test")
    for text in (content, (await w.chat("nano_banana_pro")).content):
        assert links_in(text)[0].startswith(w.url)
    refuse_rows(w, "jobs", "NEW.state = 'failed'")
    expect_error(w, await w.chat(text="unsafe"), "content_policy_violation")
    with contextlib.closing(sqlite3.connect(w.store.path)) as database:
        database.execute("DROP TRIGGER \"NEW.state = 'failed'\"")
    await until(lambda: not w.token.busy.total() and not w.pool.leases)
    refuse_rows(w, "tokens", "TRUE")
    w.token.checked_at = 0
    await w.pool.ask(w.token, flow2api.now())  # what it raises ends the process
    assert w.token.checked_at and w.token.is_active
    with mock.patch.object(w.store, "_reader") as reader:
        reader.execute.side_effect = sqlite3.OperationalError("disk I/O error")
        expect_error(w, await w.get(VIDEOS), "disk_full")


async def test_more_or_larger_requests_than_are_set_are_refused_and_harm_nobody(world):
    """A body that is too large is not called busy, which clients would repeat."""
    w = await world(**{"limits.requests": 3, "limits.bodies_mb": 1})
    w.fault = hold(PAID)
    streams = [asyncio.create_task(w.stream()) for _ in range(3)]
    await until(lambda: len(w.jobs.open) == 3)
    for reply in (await w.chat(), await w.get("/v1/models"), await w.get(VIDEOS)):
        expect_error(w, reply, "queue_full")
        assert int(reply.headers["Retry-After"]) > 0
    assert (await w.get("/health")).status == 200
    assert (await w.get("/api/tokens", key=await w.admin())).status == 200
    w.fault.release.set()
    for stream in await asyncio.gather(*streams):
        assert links_in(stream.content)
    half, large = [data_url(PNG + bytes(size)) for size in (500_000, 900_000)]
    expect_error(w, await w.chat("nano_banana_pro", pictures=[large]), "queue_full")
    for _ in range(3):  # the room is given back
        assert (await w.chat("nano_banana_pro", pictures=[half])).content
    assert (await w.post("/api/login", data=b" " * 200_000)).status == 413
    for path, lines, status in (
        (IMAGES, "Content-Length: 600000000", b" 413 "),
        ("/api/login", "Content-Length: 1048576\r\nExpect: 100-continue", b" 100 "),
    ):  # no more than the head is sent
        reader, writer = await asyncio.open_connection("127.0.0.1", w.url.split(":")[2])
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {w.key}\r\n{lines}"
        writer.write(f"{head}\r\n\r\n".encode())
        assert status in await reader.readline()
        assert (await w.chat("nano_banana_pro")).content
        writer.close()


# ---- Nobody can freeze, fatten or fill it ----


async def test_with_few_files_and_many_idle_connections_it_still_answers(run, tmp_path):
    """Half of them have sent a part of a head. The log stays short."""
    options = (REPOSITORY / "flow2api.py", "--data", tmp_path, "--host", "127.0.0.1", "--port", "0")
    command = ("bash", "-c", "ulimit -n 120 && exec $0 $@", sys.executable, *options)
    program, idle = await run(*command), []
    await until(lambda: program.serves or program.process.returncode is not None, 30)
    health = head_of("none", "/health", "Host: x", method="GET")
    for number in range(300):
        with contextlib.suppress(OSError):
            idle.append((await connect(program.url))[1])
            idle[-1].write(health[:20] * (number % 2))

    async def answer():  # none in two seconds: it was lost where too many waited
        with contextlib.suppress(TimeoutError, OSError):
            async with asyncio.timeout(2):
                return await exactly(program.url, health)
        return b""

    assert re.match(rb"(?s)HTTP/1.1 (200|429|503) .*X-Request-Id: req_|\Z", await answer())
    for writer in idle:
        writer.transport.abort()
    async with asyncio.timeout(30):
        while b"200 OK" not in await answer():
            await asyncio.sleep(0.1)
    assert len(program.log) < 20, program.log[:30]


async def test_no_compressed_body_is_unpacked(world):
    """Whoever sends it; a part of a form neither."""
    w = await world()
    login = json.dumps({"username": "admin", "password": w.password}).encode()
    headers, packed = {"Content-Type": "application/json"}, zlib.compress(login)
    paths = (CHAT, IMAGES, VIDEOS, f"{VIDEOS}/x/remix", "/api/login", "/api/admin/login")
    for coding in ("gzip", "deflate", "br", "GZip", "identity, gzip"):
        headers["Content-Encoding"] = coding
        for path, key in itertools.product(paths, (w.key, "none")):
            reply = await w.post(path, data=packed, headers=headers, key=key)
            if "/api" in path:
                expect_detail(reply, 415)
            elif key == w.key or reply.status != 401:
                expect_error(w, reply, "unsupported_encoding")
        file = ("image", packed, f"{FILE}\r\nContent-Encoding: {coding}")
        reply = await w.post(EDITS, **form([("prompt", "x"), file]))
        expect_error(w, reply, "unsupported_encoding")
    headers["Content-Encoding"] = "identity"
    assert (await w.post("/api/login", data=login, headers=headers)).status == 200


async def test_slow_and_chunked_bodies_lock_nobody_out(world, monkeypatch):
    """What is announced takes no room; what was read gives it back; what stalls is ended."""
    w = await world(**{"limits.bodies_mb": 4})
    w.fault, clients = hold(PAID), []

    async def pieces():
        body = json.dumps(chat_body(BANANA, "a boat") | {"stream": True}).encode()
        yield body[:50]
        yield body[50:]

    async def ask_for_more(request):
        clients.append(asyncio.create_task(request))
        before = len(w.jobs.open)
        await until(lambda: len(w.jobs.open) > before or clients[-1].done())

    lines = ("Transfer-Encoding: chunked", "Content-Length: 60000000")
    starts = [head_of(w.key, CHAT, *JSON_HEAD, line) + b"9\r\n{" for line in lines]
    stalled = [asyncio.create_task(exactly(w.url, start, 1)) for start in starts * 4]
    for _ in range(16):
        await ask_for_more(w.post(CHAT, data=pieces(), headers={"Content-Type": "text/json"}))
    large = data_url(PNG + bytes(1_500_000))
    for number in range(6):
        await ask_for_more(w.chat(BANANA, f"{number}", [large]))
    w.fault.release.set()
    assert [reply.status for reply in await asyncio.gather(*clients)] == [200] * 22
    for task in stalled:
        task.cancel()
    monkeypatch.setattr(flow2api, "BODY_STALL", 0.2)
    starts.append(starts[0].replace(CHAT.encode(), b"/api/login"))
    for answer in await asyncio.gather(*(exactly(w.url, start, 1) for start in starts)):
        assert re.match(rb"HTTP/1.1 408 |\Z", answer), answer

    async def stall():
        yield b"{"
        await asyncio.sleep(60)

    reply = await w.post(CHAT, data=stall(), headers={"Content-Type": "text/json"})
    expect_error(w, reply, "request_timeout")


SAYS = '{"role": "user", "content": "make it darker"}'
LONG = '[{"role": "user", "content": "'
HOSTILE = {  # name (may: it can be read, too) -> field, and its start, what is repeated, its end
    "depth": ("x", "", "[", 65, "1" + "]" * 65),
    "depth of objects": ("x", "", '{"a":', 65, "1" + "}" * 65),
    "depth without end": ("x", "", "[", 10**6, ""),
    "lists": ("x", "[", "[],", 3_000_000, "1]"),
    "objects": ("x", "[", "{},", 3_000_000, "1]"),
    "numbers": ("x", "[", "1,", 3_000_000, "1]"),
    "names": ("x", "{", '"a":1,', 1_000_000, '"b":1}'),
    "text": ("x", '"', "a, b", 3_000_000, '"'),
    "a name": ("x", '{"', "a, b", 3_000_000, '":1}'),
    "escapes": ("x", '"', r"\u0041", 5_000_000, '"'),
    "quotes": ("x", '"', r"\"", 4_000_000, '"'),
    "half escapes": ("x", '"', r"\ud83d", 5_000_000, '"'),
    "digits": ("n", "", "9", 5_000_000, ""),
    "a large number": ("n", "", "1e999", 1, ""),
    "spaces": ("x", "", " ", 6_000_000, "1"),
    "no end": ("x", '"', "x", 10**6, ""),
    "a prompt": ("messages", LONG, "ü", 20_001, '"}]'),
    "a model": ("model", '"veo_3_1', "-4s", 10**6, '"'),
    "a size": ("size", '"', "9", 10**6, 'x"'),
    "may: longest prompt": ("messages", LONG, "ü", 20_000, '"}]'),
    "may: messages": ("messages", "[", f"{SAYS},", 100_000, f"{SAYS}]"),
    "may: parts": ("messages", LONG[:-1] + "[", '{"type":"text","text":"a"},', 10**5, "{}]}]"),
    "may: links": ("messages", LONG.replace("user", "assistant"), "![](", 10**5, f'"}},{SAYS}]'),
    "may: labels": ("messages", LONG.replace("user", "assistant"), "![", 10**6, f'"}},{SAYS}]'),
    "may: side prompt": ("messages", LONG + "### Task: ", "tags ", 3_900, '"}]'),
    "may: system": ("messages", LONG.replace("user", "system"), "a title", 10**5, f'"}},{SAYS}]'),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_body_is_read_or_refused_and_what_comes_next_served(world, name):
    w = await world(image_seconds=0)
    field, start, repeated, times, end = HOSTILE[name]
    body = json.dumps(chat_body(BANANA, "a boat") | BOAT | {field: "@"})
    body = body.replace('"@"', start + repeated * times + end).encode()
    for path in (CHAT, IMAGES):
        reply = await w.post(path, data=body, headers={"Content-Type": "application/json"})
        may = name.startswith("may") or (field in ("messages", "n") and path == IMAGES)
        good = reply.status == 200 and may
        assert good or 400 <= reply.status < 500, (path, reply.status, reply.body[:200])
    part = b'--b\r\nContent-Disposition: form-data; name="a[]"\r\n\r\n1\r\n'
    request = form([("prompt", "ü" * 20_001), ("image", PNG, FILE)])
    request["data"] = part * (50_000 * (name == "names")) + request["data"]
    reply = await w.post(VIDEOS, **request)
    assert 400 <= reply.status < 500 and (await w.chat(BANANA)).content


KEY = "canary-4f9e-secret"
AT, LOGIN = r" HTTP/1.1\r\nHost: x\r\n", r"POST /api/login HTTP/1.1\r\nHost: x\r\n"
BAD_HEADS = rf"""GET / HTTP/1.1\r\nAuthorization Bearer {KEY} ;; GET /{KEY} HTTP/9.9 ;; {KEY}
GET /?key={KEY} HTTP/1.1 {KEY} ;; B@D{KEY} /{AT} ;; GET /{AT}Authorization: Bearer {KEY}\x00
GET /{AT}Cookie : flow2api_session={KEY} ;; GET /{AT}Cookie: a={KEY}\r\n folded {KEY}
GET /{AT}X: {KEY * 2000} ;; GET /{KEY * 2000}{AT} ;; GET http://[{KEY}{AT} ;; GET http://{KEY}:x/{AT}
{LOGIN}Content-Length: {KEY} ;; {LOGIN}Transfer-Encoding: {KEY}
GET /{AT}Connection: close\r\nHost: {KEY}é[
{LOGIN}Transfer-Encoding: chunked\r\n\r\n{KEY} ;; \x16\x03\x01\x02{KEY}\x00\xff
{LOGIN}Connection: close\r\nContent-Encoding: gzip\r\nContent-Length: 18\r\n\r\n{KEY}
{LOGIN}Content-Length: 1\r\nContent-Length: 2\r\n\r\n{KEY}"""


async def test_a_malformed_request_puts_no_secret_in_the_log_and_few_lines(flow2, tmp_path):
    """At most a line for each; many of the same are folded. Nor does an answer tell the server."""
    program, heads = await flow2("--data", tmp_path), re.split(" ;; |\n", BAD_HEADS)
    for line in [*heads, *[heads[0]] * 100]:
        before, head = len(program.log), line.encode().decode("unicode_escape").encode("latin-1")
        answer = await exactly(program.url, head + b"\r\n" * 4)
        assert b"aiohttp" not in answer.lower() and b" 500 " not in answer[:20], line[:80]
        await ask(f"{program.url}/health")  # what it logs has come by then
        assert len(program.log) <= before + 1, (line[:80], program.log[before:])
        assert KEY not in str(program.log[before:]), (line[:80], program.log[before:])
    assert len(program.log) < 40, program.log


@pytest.mark.skipif(not pathlib.Path("/proc/self/statm").exists(), reason="no /proc here")
async def test_200_mb_pass_in_constant_memory(world, tmp_path):
    def resident():
        pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    w = await world(**QUICK)
    video = await finished_clip(w)
    with (tmp_path / "huge.mp4").open("w+b") as huge:
        for number in range(200):
            huge.write(bytes([number]) * (1 << 20))
        huge.seek(0)
        w.fault = fault("^/media/", lambda request: web.FileResponse(huge.name))
        before = resident()
        async with w.http.get(video["url"]) as reply:
            async for chunk in reply.content.iter_chunked(1 << 18):
                assert chunk == huge.read(len(chunk))
                assert resident() - before < 30 << 20
        assert huge.tell() == 200 << 20 == int(reply.headers["Content-Length"])


async def test_no_submit_follows_a_redirect(world, looks, impatient):
    """It was accepted, and Flow sends us to a dead address, to nowhere, or to another call."""
    w = await world(((PRO, 10**6),), image_seconds=0, video_seconds=0.05)
    targets = ("http://127.0.0.1:9/", "", f"{w.flow.address}/v1/credits")
    for status, target in itertools.product((301, 302, 303, 307, 308), targets):
        w.flow.media.clear()
        w.flow.calls.clear()
        hop = {"status": status, "headers": {"Location": target}}
        w.fault = fault(PAID, lambda request, hop=hop: web.Response(**hop), through=True, times=2)
        for reply in await asyncio.gather(w.chat(BANANA), w.chat(FAST)):
            assert reply.content, (status, target)
        assert len(w.paid()) == len(w.flow.media) == 2, (status, target)


async def test_the_pictures_of_open_jobs_have_a_limit_together(world):
    """What is over it is refused, and comes in when there is room again."""
    w = await world(**{"limits.inputs_mb": 1})
    await w.pool.update(w.token, image_concurrency=1)
    picture, clients = data_url(PNG + bytes(400_000)), []
    (w.data / "inputs" / "a").symlink_to("b")  # as one that goes while they are counted
    w.fault = hold(PAID)
    for number in range(3):  # the first is at Flow, the second waits
        clients.append(asyncio.create_task(w.chat(BANANA, f"{number}", [picture])))
        await until(lambda n=number: len(w.jobs.open) > n or clients[-1].done())
    assert (await w.post(VIDEOS, BOAT)).status == 200  # which brings none
    w.fault.release.set()
    *good, refused = await asyncio.gather(*clients)
    assert [reply.status for reply in good] == [200, 200]
    expect_error(w, refused, "queue_full")
    assert (await w.chat(BANANA, "again", [picture])).content


async def test_lists_cut_prompts_and_a_job_itself_has_the_whole_one(world):
    w = await world(video_seconds=0.05)
    do, prompt, told = await log_in(w), "".join(f"{n} boats, " for n in range(999)), 0
    w.fault = hold(PAID)
    video = (await w.post(VIDEOS, {"prompt": prompt})).job_id
    tasks = f"/v1/tokens/{w.token.id}"
    for _ in range(2):
        lists = [await do(f"GET {name}") for name in ("jobs", "logs", "state")]
        for path in (VIDEOS, f"{tasks}/pending-tasks", f"{tasks}/profile-feed"):
            lists.append((await w.get(path)).json)
        assert not [rows for rows in lists if prompt[501:600] in json.dumps(rows)]
        told += sum(prompt[:499] in json.dumps(rows) for rows in lists)
        job = (await do(f"GET jobs/{video}"))["job"]
        assert (await w.get(f"{VIDEOS}/{video}")).json["prompt"] == job["prompt"] == prompt
        w.fault.release.set()
        await w.end_of(video)
    assert told >= 8


NO_PICTURES = {"too large": lambda request: web.Response(body=PNG + bytes(65 << 20))}
for row in ((200, b""), (200, b"<html>log in</html>"), (204, b""), (300, b"x"), (416, b"x")):
    NO_PICTURES[f"{row}"] = lambda request, row=row: web.Response(status=row[0], body=row[1])
NO_PICTURES["drip"] = lambda request: web.Response(body=blanks())


@pytest.mark.parametrize("answer", NO_PICTURES)
async def test_what_is_too_large_or_no_picture_is_not_kept(world, impatient, monkeypatch, answer):
    monkeypatch.setattr(flow2api, "KEEP_SECONDS", 5)
    w = await world(image_seconds=0, **{"cache.enabled": True})
    w.fault = fault("^/media/", NO_PICTURES[answer])
    reply = await w.chat(BANANA)
    assert "can't be fetched" in reply.content and not list((w.data / "tmp").iterdir())


# ---- Whatever comes, in masses ----

ODD_VALUES = json.loads(r"""[null, true, 0, -1, 1.5, "", "x", "\ud800", [], {}, [null], {"a": {}},
 [[]], {"type": "text"}, {"type": "image_url"}, {"url": "http://["}, "4:3", "2K"]""")
ODD_VALUES += ["9" * 6000, "a" * 70_000, 10**400, DATA]
ODD_NAMES = """model messages stream n size image modalities stream_options aspect_ratio type text
 url image_url role content prompt orientation image_size images mask references response_format"""


async def test_whatever_the_shape_of_a_body_the_answer_is_never_a_500(world):
    w, dice = await world(image_seconds=0), random.Random(2)
    for path in [CHAT, CHAT, IMAGES, EDITS] * 150:
        content = text_and_link("boat", {"url": DATA})
        body = {"prompt": "boat", "model": BANANA, "image": DATA} | turns(("system", "s"), content)
        places = [body, body, body, *body["messages"], *content, content[1]["image_url"]]
        for place in dice.choices(places, k=dice.randint(1, 3)):
            place[dice.choice(ODD_NAMES.split())] = dice.choice(ODD_VALUES)
        reply = await w.post(path, body)
        assert reply.status in (200, 400, 404, 413), (reply.body, path, str(body)[:300])


RANDOM = int(os.environ.get("FLOW2API_RANDOM", 300))  # 20000: the long form
DESIGNED = {status for status, _ in flow2api.ERRORS.values()} - {500}
FIELDS = """model messages prompt stream n size seconds image images input_reference video metadata
 response_format async_mode remix_target_id orientation aspect_ratio image_size username password
 session_token st tokens remark is_active proxy_url image_concurrency enabled timeout base_url
 limits.queue flow.poll_interval chat.video_content cache.timeout old_password new_password"""
SOME_MODELS = ["", BANANA, FAST, "imagen_4", f"{FAST}-1080p", "veo_3_1-fl", "gpt-image-1", "x"]


def random_request(dice, ids):
    """-> options of World.call"""
    method, path, _ = dice.choice(EVERY_CALL)
    path = path.replace("nothing", dice.choice(ids)).replace("999", dice.choice(("1", "999")))
    if dice.random() < 0.2:
        name = dice.choice(("limit", "after", "state", "mask", "index", "variant"))
        path += f"?{name}={dice.choice(('1', *ids, 'x', '-1', '%00', '9' * 99))}"
    odd = [*ODD_VALUES, *SOME_MODELS, *ids, [DATA], {"url": DATA}, {"id": ids[0]}, True, "url"]
    body = {name: dice.choice(odd) for name in dice.sample(FIELDS.split(), dice.randint(0, 6))}
    if dice.random() < 0.7:
        body = chat_body(dice.choice(SOME_MODELS), "a boat") | BOAT | body
    texts = [(name, f"{body[name]}"[:99].encode(errors="replace")) for name in body]
    parts = [*texts, ("image", dice.choice((PNG, b"x", b"")), FILE)]
    cut = {"data": json.dumps(body)[: dice.randint(0, 999)]}
    options = dice.choices((form(parts), cut, {"body": body}), (3, 1, 7))[0]
    return {"method": method, "path": path, **options}


def resident():
    gc.collect()
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096


async def test_random_requests_get_no_5xx_but_by_design(world, impatient, endless, monkeypatch):
    """And leave nothing in memory."""
    monkeypatch.setattr(flow2api, "SIMULATED_SIZES", SMALL)
    w = await world(((ULTRA, 10**9),), image_seconds=0, video_seconds=0.01)
    seed, ids, before = secrets.randbits(32), ["x"], 0
    dice = random.Random(seed)
    for number in range(0, RANDOM, 10):
        w.live.layers["admin page"].clear()
        if not w.pool.tokens:
            await w.account(ULTRA, 10**9)
        for token in w.pool.tokens.values():
            token.update(**flow2api.AWAKE, proxy_url="", credits=10**9)
        keys = dice.choices((w.key, await w.admin(), "none"), (6, 6, 1), k=10)
        requests = [random_request(dice, ids) | {"key": key} for key in keys]
        replies = await asyncio.gather(*(w.call(**request) for request in requests))
        for request, reply in zip(requests, replies, strict=True):
            by_design = reply.status < 500 or reply.status in DESIGNED
            assert by_design, (seed, number, str(request)[:900], reply)
            ids = [*ids, reply.headers.get("X-Job-Id", "x")][-9:]
        w.flow.calls.clear()
        before = before or (number > RANDOM // 4 and resident())
    await until(lambda: not w.jobs.open)
    assert RANDOM < 5000 or resident() - before < 10 << 20
    w.live.layers["admin page"].clear()
    await w.account(ULTRA, 10**6)
    assert (await w.chat(BANANA, "at last")).content


async def test_many_streams_dropped_at_once_harm_nothing(world, endless):
    count, writers = 100 if RANDOM < 5000 else 1200, []
    w = await world(((ULTRA, 10**9),), image_seconds=0, video_seconds=0.1)
    w.fault = hold(PAID)
    body = json.dumps(chat_body(FAST, "a boat") | {"stream": True}).encode()
    head = head_of(w.key, CHAT, *JSON_HEAD, f"Content-Length: {len(body)}")
    for _ in range(count):
        writers.append((await connect(w.url))[1])
        writers[-1].write(head + body)
    await until(lambda: len(w.jobs.open) == count, 60)
    for writer in writers:
        writer.transport.abort()
    assert (await w.get("/health")).status == 200
    w.fault.release.set()
    await until(lambda: not w.jobs.open, 60)
    states = collections.Counter(job.state for job in w.store.jobs())
    assert states["completed"] == len(w.flow.media) == len(w.paid())
    assert states["completed"] + states["cancelled"] == count
    assert (await w.chat(BANANA)).content and not w.token.busy.total()


# ---- Accounts, sessions, settings and secrets stay what they are ----


async def test_a_clip_of_which_nothing_can_be_learnt_ends_after_a_day(world, impatient, clock):
    w = await world(video_seconds=10**6)
    w.live.layers["file"]["generation.video_timeout"] = 20000
    client = asyncio.create_task(w.chat())
    (job,) = await w.running()

    def two_hours_later(request):
        clock.ahead += 7200
        w.jobs._tell(job)
        return refusal(503)(request)

    w.fault = fault("batchCheck", two_hours_later)
    expect_error(w, await asyncio.wait_for(client, 20), "generation_timeout")
    assert len(w.fault.seen) >= 12 and not w.token.busy.total()


@pytest.mark.parametrize("restart", [False, True])
async def test_a_deleted_account_never_comes_back_and_nobody_gets_its_jobs(world, restart):
    """Not with a late answer of Google; and two admins may delete the same ones at once."""
    w = await world(video_seconds=0.05)
    owner, path = await w.owner(), f"/api/tokens/{w.token.id}"
    job = w.store.job((await w.chat()).job_id)
    w.fault = hold("/credits")
    check = asyncio.create_task(owner("POST", f"{path}/refresh-credits"))
    await w.fault.seen.wait()
    assert (await owner("DELETE", path)).status == 200
    w.fault.release.set()
    await check
    assert not w.store.tokens()
    others = [await w.account(is_active=False) for _ in range(4)]
    deletes = (owner("DELETE", "/api/tokens/batch-delete-disabled") for _ in range(3))
    assert {reply.status for reply in await asyncio.gather(*deletes)} == {200}
    assert not w.pool.tokens
    if restart:
        await w.restart()
    others.append(await w.account())
    assert job.token_id not in [token.id for token in others]
    assert (await owner("GET", f"/api/jobs/{job.id}")).json["job"]["account"] == ""


async def test_a_session_counts_for_our_own_page_alone(world):
    """Its cookie also behind Basic auth."""
    w = await world()
    session = await w.admin()
    expect_error(w, await w.get("/v1/models", key=session), "invalid_api_key")
    cookie = {"Cookie": f"flow2api_session={session}", "Origin": "http://127.0.0.1:1"}
    disable = f"POST /api/tokens/{w.token.id}/disable"
    for call, site, kind, authorization, status in (
        (disable, "same-site", "application/json", "", 401),
        (disable, "cross-site", "application/json", "", 401),
        (disable, "", "text/plain", "", 401),  # plain http tells no site
        (disable, "", "application/json", "", 200),
        (disable, "none", "text/plain", "", 200),
        ("GET /api/stats", "same-origin", "text/plain", "Basic eDp5", 200),
        ("GET /api/stats", "same-origin", "text/plain", "Bearer admin-x", 401),
        ("GET /api/stats", "same-origin", "text/plain", w.key, 401),
    ):
        w.token.is_active = True
        headers = {"Content-Type": kind, "Authorization": authorization}
        headers |= cookie | ({"Sec-Fetch-Site": site} if site else {})
        reply = await w.call(*call.split(), headers=headers, data="{}")
        assert reply.status == status
        assert w.token.is_active is (call != disable or status == 401)


async def test_neither_odd_answers_nor_odd_addresses_break_an_account(world, impatient):
    w = await world(((PRO, 1), (PRO, 1)))
    owner = await w.owner()
    odd_balance = edited("/credits", lambda body: {"credits": {"amount": 3}})
    w.fault = together([odd_balance, replaced("auth/session", '"email"', '"x"')])
    for token in list(w.pool.tokens.values())[::-1]:
        path = f"/api/tokens/{token.id}"
        assert (await owner("POST", f"{path}/refresh-at")).status == 200
        token.checked_at = 0
        await w.pool.ask(token, flow2api.now())  # what it raises ends the process
        assert token.asked_at
    known = [(token.email, token.is_active, token.credits) for token in w.store.tokens()]
    assert known == [("user1@example.com", True, 1), ("user2@example.com", True, 1)]
    w.fault = None
    for url in ("http://[", "http://a..b", "http://x:99999"):
        for name in ("flow.labs_base_url", "flow.api_base_url"):
            w.live.put("admin page", name, url, "test")
        token.checked_at = 0
        await w.pool.ask(token, flow2api.now())
        expect_detail(await owner("POST", f"{path}/test"), 502)
        expect_error(w, await w.chat("nano_banana_pro"), "upstream_unreachable")
    assert (await owner("POST", "/api/settings", {"server.host": None})).status == 200
    for url, status in (("http://u:canary@host:1", 200), ("http://…@other:1", 400)):
        reply = await owner("POST", "/api/settings", {"proxy.proxy_url": url})
        assert reply.status == status  # an edited mask is not saved in silence
        assert (await owner("PUT", path, {"proxy_url": url})).status == status


BROKEN_PROXIES = """http://user:canary@127.0.0.1:9 socks5://user:canary@127.0.0.1:9
 http://user:canary@127.0.0.1:99999 http://user:canary@[x ftp://canary@x socks5://u:canary@
 user:canary@127.0.0.1:9 canary"""


async def test_no_log_and_no_error_holds_a_secret(world, impatient, looks, clock, caplog):
    caplog.set_level(logging.DEBUG)
    w = await world(((PRO, 100), (ULTRA, 100)), **{"cache.enabled": True})
    tokens, owner = list(w.pool.tokens.values()), await w.owner()
    w.live.put("file", "proxy.proxy_enabled", True, "test")
    for proxy in ("", *BROKEN_PROXIES.split()):  # none is not meant to be direct
        w.live.put("file", "proxy.proxy_url", proxy, "test")
        reply = await w.chat(BANANA)
        assert reply.error["code"] in ("proxy_unavailable", "upstream_unreachable"), proxy
        expect_error(w, reply, reply.error["code"])
        assert "canary" not in f"{caplog.text}{reply.json}"
        assert {(t.is_active, t.error_count, t.busy.total()) for t in tokens} == {(True, 0, 0)}
    w.live.put("file", "proxy.proxy_enabled", False, "test")
    hidden, replies = {owner.keywords["key"]}, [await w.chat(BANANA), await w.chat(text="unsafe")]
    answers = (refusal(403), refusal(500), dropped, lambda request: web.Response(text="<"))
    for answer, on in itertools.product(answers, (PAID, "upload", "session")):
        hidden.update(w.secrets())
        clock.ahead += 4000
        for token in tokens:
            w.flow.accounts[token.st].at = ""
            await w.pool.update(token, is_active=True, failures=0)
        w.fault = fault(on, answer, times=3)
        replies.append(await w.chat(FAST, pictures=[DATA]))
    hidden.update(w.secrets())
    w.flow.accounts.clear()
    replies += [await w.chat(), await owner("POST", "/api/tokens", {"st": tokens[0].st})]
    errors = [str(reply) for reply in replies if reply.status >= 400]
    assert len(errors) > 8 and caplog.records
    assert re.search(
        rf"{replies[0].job_id} completed: {BANANA} user\d@\S+ \d+ s 0 credits", caplog.text
    )
    assert not [secret for secret in hidden if secret in caplog.text + str(errors)]


# ---- A data folder of the version before works as it is ----

# sqlite3's .dump, in LZMA and base85, of a gateway of 79570c6 with a job in each state, with
# made-up secrets and round times, http://127.0.0.1:1 for its Flow, and 1795259384 for now.
OLD_DATABASE = """
0{{R31poj4|NsC0{{SczDC)Jodyp*O=+D9=yg4Wy$Xcc!-&01psX^i!>gkK52M(vCi{l306bSSpSPBJG82{1O_brWu5n6x1ZH-9-
|M)=2XsHi4P7u3a8-l$a=!y&7O$b)UCB9K~oSE*l6uY`_q84y+r++IBVe19&*SH7r|L#T)hAGNk$yHjSF+T&>Tyy8S>({9logM6K
@xI_RkNQzVpWnSo{Df&;8>EVE8_0&F)+RbIaZQ!Z@9=co-4|#{ZhzL<8Aj+!;GB|t2?X)QnXn^22u(RbB12Ky$3rfHL$TZyOnk^G
@_@?^-@NafJOqVk(ESv*y8&8<`p2vf)L1krUr#SG>a0lr5q=?0TU4})BUBr;euZ%#av7Eaz}=(Dh^WE~^)w+d^}PrK6tkN$V<E+q
tcpYqI_P?X{&bXeUBw|w_0_<<YHC;zfUFLvVZRul{#u%*Y(x+CZGu>z_gX`oj>K_4%zqFWdkbb~T8=~*i2DkT3Vm1dm|t$GTr^aM
p4#e$7$PcW+c*|NRa!H?)XRaV<?U!y17GzLbVrzDOPfU{d($Pcg>U1r6m--m#&}7JBOQO<&Gdf8h}VRRpCDd+QOKH5JB&}uXWRLt
)=-W;ChH#!7!11%vSLJg{TQ;lZkEy~jZS5bR6zR0NNWb|KrVW6LO8&vW23mebHYevjn12zdyffsBjO-(0ul++Ecdtkk6f@5ive`9
Q}bp7y&t&g<&)>}csP`3UXda!_TI*hi-ETMkM8AL{9cz3sahtP;#lDECBd>X%7>gkdaY~CH4zq^Oe|b?|KQyTmJ$9-i`;dYZsavm
QIz4+0Ty_S_dmGjjF|ggEDZZh>$-IUTbjtYim#~~J@hN-nD{5}{(_^Yiyj|Sb*B4AmAmQf$ovc@l;_C};~~qEuxUoY)Jo^+f-mVP
f-Jp`z!$j-`N1d=QGy>Ux7#5AtGBwn20I>JUM_m3A<3bqv@#G6$aDy}C~d?tel+J8Zo!O^IXXbLr=nnLNdU?FyU=!g(XfbQI&w{l
xWEj>c5!viAYc@-LrD*JX%~aCM>7{c&$c*BTQfX=vm+C~PKr>HvRD$@cHKHL3fxBo&wzLPf7vun-dB}xy8||)-kJl-FoO+lVDFHH
<I^4+thY7Ty7_-XRsns<2iAhu4CTT&fAUutTtyukay-_l@SlyPktmKN0+XGM91XP|oxH(sRD$C&7)45Bt7+If=;v@6+JCO1)9ci@
7@zNOb@K$4A(cgtLIaf&pQ@;s#|I0UBJbWlqtBZV5Ri%uzO`!j=`*;TT(nnc;Tb>%V~+6&om-&|SIns+@w~r-NEaIkcN{CE4=o`i
yJ|7kX;bc!FN8D!Y5imy(X@1@+Aad}Z;cMVOlx{iOjnOn!mK**02h2~ZADzQSABY?MWEdS`=w_m<_x~wjTt-_i=5~<Se&LoWfKse
bJou7CDSo_5tcM?<Ot)&>1B2_9C8U;YTat&H{S<>$)kSi#4!`$nyip9K){W@x7~;(`wNFCWO$PF)*cGQc5ffR#D65YzE9nV<OO9J
8rG9_X#dgTe~9oW97)lgEI~6*7Eo&Prg_obx6_i%@Wxpm4k@e@p`U}{I~Vv8li=kl?|aBQu#1N2g72CtwN6p0pc1LA>>L3CBYg^{
GR|7;K4=NZ(_SJXA#6~w4KsBhwf{%~@cAEKZ%iGF{R`tFPZuFWy8P!pCYFi{)A`<Ya~)t>xxQc0uT(8l*0UI%fqUTm7L3-JL=L=k
#!QI%_}$*gz&o1+5f^_yih0>%xC9O|<DNmdi&)GR5n<v5u;V`amHmy8X~0}!Y5{tWD7!1Go^Kg0?1Xe1-#=l3Jl845FgiSR(?HfI
Z|mdclBnO_dqJA2WkbF<&fMs_RRZS3IHOrxfA-C7YY?vJ(R2NN9{NJNA=ltoLY#h^{InZ>22!x4ARv;Hzp+TU`Pep*VL-4`DZ02?
kKYk6$FwhD;%o#g2ujkL*pVN*^)SE#Q>=(LyuCnzAw<X!)WVGM^f{~u1ed|$7N&5z!eB={Gp)!;K}hQ}a1=%UvLj}mXDFn+`pcHN
ViGz*NwlA`wusr<=vZC2p><>1)=0W)3Rz=)+2K1H<eegBzWV}82;TPJpgs)n1F!!pPrc4mkloRD_$}4UZ9tC>kaPw8+utx3H@7fr
FnSv<I3D)$z5{MGr+9c$7dxU#)v-u=F9E4UlwXo8R6l8TOj1VccI-b0Vi{-V_-x@&JWX6x#g5Usl&l*51X8>O&6PaXc;^qKL^F0Q
jY(`((fi1Tlnh8UKdyDi-uc&{C{^5ym2C3U#aI@SMw}0^8-HVp<q7kTBy1E|%j(4KKH|lxdtu#TiM_ABLO7iSLfU$0CxowvQ^j6+
Pnp{Qq)u*eayAz3dV#P((i16G7b-j3taKZ-Ix2-~ibD{4`Q~(JmzPzdT0mUyZ0_=whW3<vT92^S%mND4gg{}6a%mmC-4a(*7%0Vv
+gwJM6<8}zRby%N4Z!M%Y|;i8kEs)LnB89D$Gny1Bu=fHk$f@pIP|Y!nn;5}kjm%U-=^Eg6=x10yl%%eZX<_Zs1uOg*}csg4sG{z
ES<_)N1^ny*xzf%j4zQPA>5R>8+jwy0vNj`C7btp7g9@N*sD-@<zjzv>{K2c+<%8+U-xRpBTL>*aG<koXfHwbR+p~|)fF7?T}CtN
Ld4=)SyYj5-1BQ9T#nT5dco>;1Ty@!XcdQap=tl{7Bwm
"""


async def test_a_data_folder_of_the_version_before_works_as_it_is(world, clock, looks):
    clock.ahead = 1795259444 - time.time()
    w = await world((), **{"global.api_key": "", "global.admin_password": ""})
    await w.stop_gateway()
    w.key, w.password = "fake-api-key", "fake-password"
    sql = lzma.decompress(base64.b85decode("".join(OLD_DATABASE.split()))).decode()
    sql = sql.replace("http://127.0.0.1:1", w.flow.address)
    files = {f"tmp/{name}": name.encode() for name in re.findall(r"fake-kept[^\"]+", sql)}
    files["inputs/video_00000000000000000000000e_0"] = PNG
    for name, data in files.items():
        (w.data / name).write_bytes(data)
        os.utime(w.data / name, (flow2api.now(), flow2api.now()))
    old = sqlite3.connect(":memory:")
    old.executescript(sql)
    with contextlib.closing(sqlite3.connect(w.data / "flow2api.db")) as db:
        old.backup(db)
    store = flow2api.Store(w.data)
    store.open()  # which migrates it
    jobs = sorted(store.jobs(), key=lambda job: job.id)
    outputs = [output for job in jobs for output in job.outputs]
    for records in (store.tokens(), jobs, outputs):
        columns = ", ".join(records[0].COLUMNS)
        select = f"SELECT data, {columns} FROM {records[0].TABLE} ORDER BY 2, 3"
        for record, (data, *values) in zip(records, old.execute(select), strict=True):
            before = json.loads(data.replace('"made"', '"original"'))
            for name in ("upscaled", "scene"):  # fields that are gone
                before.pop(name, None)
            after = record.row()
            after |= json.loads(after.pop("data"))
            assert after == after | before | dict(zip(record.COLUMNS, values, strict=True))
    store.close()
    account = flow2api.SimulatedAccount("one@example.com", ULTRA, 19910, "ya29.fake-access-3")
    w.flow.accounts["fake-session-1"] = account
    for job in jobs:
        names = [output.name for output in job.outputs] or [f"found_{job.id}"]
        names += [f"{name}_upsampled" for name in names if job.id.endswith("a")]
        for name in names:
            made = "video", job.prompt, "PORTRAIT", 0, job.project, job.batch, name
            w.flow.media[name] = flow2api.Medium(name, *made)
    await w.start_gateway()
    await until(lambda: not w.jobs.open)
    for job in jobs:
        end = await w.jobs.get(job.id)
        assert end.state == (job.state if job.ended else "completed")
        assert (end.notes, end.error) == (job.notes, job.error)
        for index, output in enumerate(end.done()):
            assert output.name.endswith("_upsampled") is (job.plan.upscale == "1080p")
            content = await w.get(f"{VIDEOS}/{job.id}/content?index={index}")
            kept = files.get(f"tmp/{output.file}")
            assert content.body == (kept or w.flow.media[output.name].file())
    assert (len(w.asked("Upsample")), len(w.paid()), account.credits) == (0, 1, 19900)
    cats = {"model": "nano_banana_pro", "prompt": "two cats", "image_size": "4K", "n": 2}
    cats["response_format"] = "url"
    lost = {"model": "veo_3_1-fast", "prompt": "a lost answer"}
    sent = lost | {"prompt": "a submit in flight"}
    for path, body, name, value, job_id in (
        (IMAGES, cats, "Idempotency-Key", "order-1", "04"),
        (VIDEOS, lost, "Idempotency-Key", "order-2", "0c"),
        (VIDEOS, sent, "x-stainless-retry-count", "1", "0d"),
    ):
        reply = await w.post(path, body, headers={name: value})
        assert (reply.status, reply.replayed, reply.job_id[-2:]) == (200, True, job_id)
    other = await w.post(VIDEOS, sent, headers={"Idempotency-Key": "order-2"})
    expect_error(w, other, "idempotency_conflict")
    await w.owner()  # which logs in with the password
    rows = (await w.get("/api/settings", key="admin-fake-admin-session")).json["settings"]
    own = {row["name"]: row["value"] for row in rows if row["source"] == "admin page"}
    cache = {"cache.enabled": True, "cache.timeout": 86400}
    assert own == cache | {"generation.video_timeout": 900, "chat.video_content": "link"}


# ---- Settings ----


def setting_file(folder, text):
    (folder / "setting.toml").write_text(text, "utf-8")
    return folder / "setting.toml"


@pytest.mark.parametrize("row", flow2api.SETTINGS.values(), ids=lambda row: row.name)
def test_the_stronger_origin_of_a_setting_wins(tmp_path, row):
    """Command line > environment > admin page > file > generated > default; each value typed."""
    name, kind, settings = row.name, type(row.default), flow2api.Settings()
    texts = row.choices[:2] or ("one", "two")
    one, two = {bool: (True, False), str: texts}.get(kind) or (kind(row.low + 1), kind(row.low + 2))
    path = setting_file(tmp_path, f"{name} = {json.dumps(two)}\n")
    variable = {f"FLOW2API_{name.replace('.', '_').upper()}": str(two)}
    for source, value, step in (
        ("default", row.default, lambda: None),
        ("generated", one, lambda: settings.put("generated", name, one, "test")),
        ("file", two, lambda: settings.read_file(path)),
        ("admin page", one, lambda: settings.put("admin page", name, one, "test")),
        ("environment", two, lambda: settings.read_environment(variable)),
        ("command line", one, lambda: settings.put("command line", name, str(one), "")),
        ("command line", one, lambda: settings.put("admin page", name, two, "test")),
    ):
        step()
        assert (settings[name], settings.source(name)) == (value, source)
        assert type(settings[name]) is kind and not settings.warnings


def test_a_setting_file_of_another_name_and_a_weak_secret_are_told(tmp_path):
    (tmp_path / "settings.toml").write_text("")
    arguments = flow2api.parse_arguments(["--config", str(tmp_path)])
    settings = flow2api.load_settings(arguments)
    assert [text for text in settings.warnings if "settings.toml is not read" in text]
    (tmp_path / "setting.toml").write_text("global.api_key = '12345678'")
    settings = flow2api.load_settings(arguments)
    assert not settings.warnings
    [warning] = flow2api.weak_secrets(settings)
    assert "global.api_key (file) is easy to guess" in warning and "12345678" not in warning
    for name, value in (("server.host", "127.0.0.1"), ("global.api_key", secrets.token_hex(8))):
        settings = flow2api.load_settings(arguments)
        settings.put("environment", name, value, "test")
        assert not [*flow2api.weak_secrets(settings)]


def test_a_bad_value_is_told_with_what_is_allowed_and_what_is_unknown_warns(tmp_path):
    """A placeholder is no value, and what can not be read stops the start."""
    settings = flow2api.Settings()
    for name, allowed, *values in (
        ("server.port", "a whole number from 0 to 65535", 70000, "8x", True, {"a": 80}),
        ("flow.timeout", "a whole number from 1 to 3600", 1.5),
        ("flow.poll_interval", "a number from 0.05 to 60", "soon", 0, "nan"),
        ("cache.enabled", "true or false", "maybe", 1),
        ("server.host", "a text", 5),
        ("chat.video_content", "both | html | link", "gif"),
        *((name, "a text", 192837465) for name in flow2api.SECRETS),
    ):
        for value in values:
            with pytest.raises(flow2api.SettingError, match=f"^setting.toml: {name} ") as told:
                settings.put("file", name, value, "setting.toml")
            assert str(told.value).endswith(f"allowed: {allowed}")
            assert (repr(value) in str(told.value)) is (name not in flow2api.SECRETS)
            assert settings.source(name) == "default"
    placeholders = ("", "your_api_key", "your_password")
    for name, text in itertools.product(flow2api.SECRETS, placeholders):
        settings.put("file", name, text, "setting.toml")
        assert (settings[name], settings.source(name)) == ("", "default")
    text = '\ufeffloose = 1 # 密钥\n[redis]\nhost = "x"\n[server]\ncolour = "red"\nport = 81\n'
    settings.read_file(setting_file(tmp_path, text))
    settings.read_file(setting_file(tmp_path, '[models]\nnano_banana_2 = "BELUGA"\n'))
    settings.read_environment({"FLOW2API_SERVER_SHAPE": "round", "PATH": "/bin"})
    settings.read_file(tmp_path / "none.toml")  # a missing file is an empty one
    assert (settings["server.port"], settings.models) == (81, {"nano_banana_2": "BELUGA"})
    unknown = ("loose", "redis.host", "server.colour", "FLOW2API_SERVER_SHAPE")
    for warning, name in zip(settings.warnings, unknown, strict=True):
        assert name in warning
    for text in ("[server\n", "models = 3", "[models]\na = 3", '[models]\na = "{X}"'):
        with pytest.raises(flow2api.SettingError, match="setting.toml.*(models|line 1)"):
            settings.read_file(setting_file(tmp_path, text))


# ---- Catalogue ----

# By hand from captures of Flow's catalogue of 2026-08-27: who may make it; id; upstream key with 0,
# 1, 2, 3 and 7 pictures (. not asked; small letters go on after veo_3_1_). In an id + ~ @ % stand
# for shapes, as in MARKS; what has 4s has 6s, too. In a key P is _portrait or nothing, O the shape,
# U _ultra on an Ultra account, L _low_priority.
CATALOGUE = """
all   gemini-2.5-flash-image%  BELUGA BELUGA BELUGA | all gemini-3.0-pro-image% GEM_PIX_2 GEM_PIX_2
all   imagen-4.0-generate-preview%  IMAGEN_3_5 . . IMAGEN_3_5
all   veo_3_1_t2v_fast~        t2v_fast{P}{U}  |  all  veo_2_1_fast_d_15_t2v~  t2v_lite
all   veo_2_0_t2v~             t2v{P}          |  all  veo_2_0_i2v~  . i2v_s{P} i2v_s{P}_fl
all   veo_3_1_i2v_s_fast_fl~   . i2v_s_fast{P}{U} i2v_s_fast{P}{U}_fl
all   veo_2_1_fast_d_15_i2v~   . i2v_lite interpolation_lite
all   veo_3_0_r2v_fast~        t2v_fast{P}{U} r2v_fast_{O}{U} r2v_fast_{O}{U} r2v_fast_{O}{U}
all   veo_3_1-fast+            t2v_fast{P}{U} i2v_s_fast{P}{U} i2v_s_fast{P}{U}_fl r2v_fast_{O}{U}
all   veo_3_1+-lite            t2v_lite i2v_lite interpolation_lite r2v_lite
ultra veo_3_1+-relaxed         t2v_lite{L} i2v_lite{L} interpolation_lite{L} r2v_lite{L}
all   veo_3_1+  t2v{P} i2v_s{P} i2v_s{P}_fl | ultra veo_3_1-relaxed-fl-fast+ . i2v_lite{L} interpolation_lite{L}
ultra veo_3_1-4s+              t2v_quality_4s i2v_s_quality_4s i2v_s_quality_4s_fl
ultra veo_3_1-fast+-4s         t2v_fast_4s i2v_s_fast_4s i2v_s_fast_4s_fl
ultra veo_3_1-4s-lite+         t2v_lite_4s i2v_s_lite_4s i2v_s_lite_4s_fl
ultra veo_3_1-relaxed+-4s      t2v_lite_4s{L} i2v_s_lite_4s{L} i2v_s_lite_4s_fl{L}
all   veo_3_1-8s+-fl           . i2v_s{P} i2v_s{P}_fl  |  paid  veo_3_1+-fast-1080p  t2v_fast{P}{U}
ultra veo_3_1-fl-4k-fast+      . . i2v_s_fast{P}{U}_fl |  ultra veo_3_1_t2v~_4s_4k  t2v_quality_4s
ultra veo_3_1_t2v_fast~_ultra_relaxed  t2v_lite{L}     |  all   veo_3_1_r2v_fast~  . . r2v_fast_{O}{U}
ultra veo_3_1_i2v_s~_4s_1080p  . . i2v_s_quality_4s_fl |  ultra veo_3_1_interpolation_lite_4s~  . . i2v_s_lite_4s_fl
ultra veo_3_1_i2v_s_fast_ultra~_fl_1080p  . . i2v_s_fast{P}{U}_fl
all   veo_3_1_extend~       extend_{O}        |  all   veo_3_1_extend_fast~     extend_fast_{O}{U}
all   veo_3_1_extend_lite~  extension_lite    |  ultra veo_3_1_extend_relaxed~  extension_lite{L}
all   omni_flash+              abra_t2v_8s abra_i2v_8s abra_i2v_8s abra_r2v_8s abra_r2v_8s
all   omni_flash-4s+  abra_t2v_4s abra_i2v_4s abra_i2v_4s abra_r2v_4s | all nano_banana_2_lite@ HARBOR_SEAL
all   omni_flash+-10s  abra_t2v_10s abra_i2v_10s abra_i2v_10s abra_r2v_10s | all nano_banana_2@ . BELUGA
all   omni~    abra_t2v_8s abra_r2v_8s abra_r2v_8s abra_r2v_8s | all nano_banana_pro@-1K GEM_PIX_2
all   nano_banana@  BELUGA . . . BELUGA     |  all   imagen_4@  IMAGEN_3_5 . . IMAGEN_3_5
all   nano_banana_pro@-2K  GEM_PIX_2          |  ultra nano_banana_pro-4K@  . GEM_PIX_2
ultra gemini-3.1-flash-image%-4k  BELUGA
"""  # noqa: E501
LINES = [line.split() for line in re.split(r"[\n|]", CATALOGUE.strip())]
LINES += [[word.replace("4s", "6s") for word in line] for line in LINES if "4s" in line[1]]
WIDE, TALL = "LANDSCAPE", "PORTRAIT"
SIDES = {"-portrait": TALL, "-landscape": WIDE}
SHAPES = SIDES | {"-square": "SQUARE"}
SHAPES |= dict.fromkeys(("-4-3", "-four-three"), f"{WIDE}_FOUR_THREE")
SHAPES |= dict.fromkeys(("-3-4", "-three-four"), f"{TALL}_THREE_FOUR")
MARKS = {"+": {"": TALL, **SIDES}, "@": {"": TALL, **SHAPES}, "%": {"": WIDE, **SHAPES}}
MARKS["~"] = {"": WIDE, "_portrait": TALL, "_landscape": WIDE}
TIERS_OF = {"all": [*flow2api.TIERS], "paid": [PRO, ULTRA], "ultra": [ULTRA]}


def rows_of_catalogue(tier):
    """(id, number of pictures, shape, key or "" where this tier may not)"""
    for who, pattern, *keys in LINES:
        (mark,) = set(pattern) & set(MARKS)
        counted = [*zip((0, 1, 2, 3, 7), keys, strict=False)]
        for (word, shape), (count, key) in itertools.product(MARKS[mark].items(), counted):
            side, ultra = "_portrait" * (shape == TALL), "_ultra" * (tier == ULTRA)
            filled = key.format(P=side, O=shape.lower(), U=ultra, L="_low_priority")
            filled = filled if re.match("abra|[A-Z]", key) else f"veo_3_1_{filled}"
            if key != ".":
                allowed = tier in TIERS_OF[who]
                yield pattern.replace(mark, word), count, shape, filled if allowed else ""


@pytest.mark.parametrize("tier", flow2api.TIERS)
def test_each_model_id_comes_to_what_the_catalogue_says(tier):
    """Shape, larger size, key, call and price on each of Google's plans."""
    for model, count, shape, key in rows_of_catalogue(tier):
        plan = flow2api.resolve(model, images=count)
        assert flow2api.WIRE_RATIOS[plan.ratio] == shape, model
        larger = re.search("1080p|[24]k|$", model.lower())[0]
        assert plan.upscale.lower() == larger, model
        if not key:
            assert plan.cost(tier) is None, model
            continue
        assert plan.key(tier) == key, model
        calls = {"r2v": "ReferenceImages", "exten": "ExtendVideo", key.upper(): "Images"}
        named = (call for part, call in calls.items() if part in key)
        by_count = {0: "Text", 1: "StartImage", 2: "StartAndEndImage"}.get(count)
        assert flow2api.SUBMIT_PATHS.get(plan.mode, "Images") == next(named, by_count), model
        rows = map(str.split, flow2api.SIMULATED_PRICES.strip().splitlines())
        _, *prices = next(row for row in rows if re.search(row[0], key))
        larger_price = 50 if larger == "4k" and plan.kind == "video" else 0
        price = int(prices[flow2api.SIMULATED_TIERS.index(tier)])
        assert plan.cost(tier) == price + larger_price, model


def test_each_listed_id_resolves_and_says_what_it_is():
    for model in flow2api.MODELS:
        images = 2 if re.search("i2v|-fl", model) else 0
        plan = flow2api.resolve(model, images=images)
        assert plan.model == model and plan.images[0] <= images <= plan.images[1], model
        length, today = (f"{plan.seconds} s", "Veo") if plan.seconds else ("", "Nano Banana 2")
        retired = re.match("gemini-2.5|veo_2|veo_3_0", model)
        note = f"Google retired .*; this is {today}" if retired else ""
        for part in (plan.family, plan.ratio, length, *plan.prices(), note):
            assert re.search(part, plan.describe()) and plan.prices(), model
    heads = [pattern.replace("%", "-").replace("~", "_") for _, pattern, *_ in LINES[:10]]
    original = {head + side for head in heads for side in ("portrait", "landscape")}
    assert len(original) == 20 and original <= set(flow2api.MODELS)
    old, retired = r"veo_3_1_|gemini-3|imagen-", r"veo_[23]_0|veo_2|gemini-2|nano_banana(-|\Z)"
    places = [2 if re.match(retired, m) else bool(re.match(old, m)) for m in flow2api.MODELS]
    assert places == sorted(places) and {*places} == {0, 1, 2}


FOREIGN = """
veo_3_1, veo-3.1-generate-preview veo-3.1-generate-001 veo-3.0-generate-preview veo-2.0-generate-001
veo_3_1_fast, veo-3.1-fast-generate-preview google/veo-3.1-fast veo-3.0-fast-generate-001 sora-2 sora-2-pro
veo_3_1_lite, veo-3.1-lite-generate-preview models/veo-3.1-lite-generate-preview
omni_flash, gemini-omni-flash-preview gemini-omni-1.1-flash gemini-omni-1.2-flash
imagen_4, imagen-4.0-generate-001 imagen-4.0-fast-generate-001 imagen-4.0-ultra-generate-001 imagen-3.0-generate-002
nano_banana_pro, gemini-3-pro-image gemini-3-pro-image-preview gpt-image-1-mini gpt-image-2.6-flare dall-e-3 sora-image
nano_banana_pro, chatgpt-image-latest openai/gpt-image-2 dall-e-2 sora-image-landscape
veo_3_1_fast, sora-video-landscape-10s sora-video-portrait-25s sora veo3.1-fast-components
nano_banana_2, gemini-nano-banana-2.1 gemini-2.5-flash-image gemini-2.5-flash-image-preview gemini-3.1-flash-image-preview
nano_banana_2_lite, gemini-3.1-flash-lite-image nano-banana-2-lite
veo_3_1, vertex_ai/veo-3.1-generate-001 google/veo-3 veo3 veo3.1 openrouter/google/veo-3.1:free veo3.1-pro Veo-3-1 veo_3.1 veo31
veo_3_1_fast, veo3-fast veo3.1-fast openrouter/openai/sora-2 SORA-2
imagen_4, google/imagen-4 imagen-4.0-generate-preview-06-06 Imagen-3
nano_banana_pro, DALL-E-3 dalle3 azure/GPT-Image-1 gpt-4o-image google/nano-banana-pro openai/gpt-5-image
nano_banana_2, google/nano-banana google/gemini-2.5-flash-image-preview:free nano-banana-2
nano_banana_2, gemini-2.0-flash-preview-image-generation gemini-2.0-flash-exp-image-generation
"""  # noqa: E501


async def test_ids_of_google_and_openai_mean_the_nearest_of_ours_and_never_the_other_kind(world):
    w = await world()
    for row in FOREIGN.strip().splitlines():
        family, _, ids = row.partition(", ")
        for model in ids.split():
            shown = (await w.get(f"/v1/models/{model.replace('/', '%2F')}")).json
            assert shown == (await w.get(f"/v1/models/{model}")).json
            kind, _, text = shown["description"].partition(" generation - ")
            assert (shown["id"], text.split()[0]) == (model, family), model
            side = re.search("landscape|portrait|$", model)[0]
            assert side in text, model
            path = VIDEOS if kind == "Image" else IMAGES
            error = expect_error(w, await w.post(path, BOAT | {"model": model}), "invalid_request")
            assert error["param"] == "model" and model in error["message"]
    assert not w.paid() and not w.jobs.open
    for model in ("gpt-4o", "veo-9.1", "gemini-3-pro", "veo_3_1-preview"):
        assert (await w.get(f"/v1/models/{model}")).status in (400, 404), model


GRAMMAR = (  # heads, parameters, what joins them
    (" ".join(flow2api.HEADS),
     "portrait landscape square 4-3 3-4 fast lite relaxed fl 4s 6s 8s 10s 1080p 4k 1K 2K 30s", "-"),
    ("veo_3_1_t2v veo_3_1_i2v_s veo_3_1_i2v veo_3_1_r2v veo_3_1_interpolation veo_3_1_extend",
     "portrait landscape fast lite ultra relaxed fl 4s 6s 8s 1080p 4k 30s", "_"),
)  # fmt: skip


def outcome(model, images):
    """The plan of an id, without the id itself, or the code of its error."""
    try:
        return dataclasses.replace(flow2api.resolve(model, images=images), model="")
    except flow2api.GatewayError as error:
        assert error.param in ("model", "seconds"), model
        return error.code


@pytest.mark.parametrize("heads, words, joint", GRAMMAR, ids=("hyphens", "wire"))
def test_in_any_order_parameters_come_to_known_keys_or_a_refusal(heads, words, joint):
    """Up to three parameters: every combination; more: a sample."""
    keys = {tier: {row[3] for row in rows_of_catalogue(tier)} for tier in flow2api.TIERS}
    dice, words = random.Random(7), words.split()
    choices = [some for n in range(4) for some in itertools.combinations(words, n)]
    choices += [dice.sample(words, dice.randint(4, 8)) for _ in range(500)]
    for head, params in itertools.product(heads.split(), choices):
        images, model = dice.randint(0, 4), joint.join([head, *params])
        plan = outcome(model, images)
        mixed = joint.join([head, *dice.sample(params, len(params))])
        assert outcome(mixed, images) == plan, (model, mixed)
        if plan not in ("invalid_request", "mode_not_available"):
            served = [tier for tier in flow2api.TIERS if plan.cost(tier) is not None]
            assert served and all(plan.key(tier) in keys[tier] for tier in served), model


# model, then size or seconds (or nothing) = the shape or length that it comes to; ! where it does
# not fit, and what is named then (else what was sent); ? where there is no such model
WISHES = """
veo_3_1 1280x720=landscape 720x1280=portrait 16:9=landscape auto=portrait 1000x999=landscape
veo_3_1 1024x1024=portrait wide=! 1280=! 1280x=! 0x720=! -1x2=! 1x2x3=! auto1=! 8s=8 10s=!
veo_3_1-portrait 9:16=portrait 1280x720=! | veo_3_1-landscape auto=landscape 1024x1024=landscape
veo_3_1_t2v_fast 1024x1024=landscape      | veo_3_1_t2v_fast_landscape 720x1280=!
veo_3_1-fast 4s=4 | veo_3_1-6s 6s=6 | veo_3_1-4s 8s=! | omni_flash 10s=10 5s=!
nano_banana-portrait 16:9=! | nano_banana-landscape 1024x1024=!
nano_banana 3000x1000=landscape 1x9=portrait
nano_banana-square 1000x999=square | nano_banana_pro-square-2K 2048X2048=square
nano_banana-4-3 1200x896=4-3 | veo_3_1-30s =!30s | veo_3_1_t2v_30s =!30s | veo_3_1- =!''
veo_3_1-lite-fast =!fast | veo_3_1-portrait-landscape =!portrait | imagen_4-4K =!4K
nano_banana-fast =!fast  | nano_banana_pro-2K-4K =!4K            | omni_flash-1080p =!1080p
veo_3_1-lite-relaxed =!lite | veo_3_1-4s-6s =!4s  | veo_3_1-1080p-4k =!1080p
sora-2 =? | veo_3_1x =? | VEO_3_1 16:9=landscape | veo =? | gpt-image-1 =?
"""


def test_size_and_seconds_decide_and_what_does_not_fit_is_refused_by_name():
    """The nearest shape and the very length are taken."""
    for row in re.split(r"[\n|]", WISHES.strip()):
        model, *wishes = row.split()
        for sent, result in (wish.split("=") for wish in wishes):
            length = re.fullmatch(r"(\d+)s", sent)
            wish = {"seconds": int(length[1])} if length else {"size": sent}
            if result[0] not in "!?":
                plan = flow2api.resolve(model, **wish)
                assert result == (str(plan.seconds) if length else plan.ratio), (model, sent)
                continue
            error = refused(flow2api.resolve, model, **wish)
            code = {"!": "invalid_request", "?": "model_not_found"}[result[0]]
            assert (error.code, error.param) == (code, [*wish][0] if sent else "model"), row
            text = str(error) if result == "?" else str(error).replace(model, "")
            told = model if result == "?" else result[1:] or str(*wish.values())
            assert told.lower() in text.lower(), row


# ---- Records and store ----


def opened(folder):
    store = flow2api.Store(folder)
    store.open()
    return contextlib.closing(store)


def stored(record):
    """Its fields, less those that live in memory."""
    fields = dataclasses.fields(record)
    names = [field.name for field in fields if "in_memory" not in field.metadata]
    return {name: getattr(record, name) for name in names}


async def test_what_is_put_is_read_back_after_a_restart(tmp_path):
    """As it was when it was put; what another version stored beside it is left out."""
    token = flow2api.Token(3, "ü@example.com", st="s" * 900, credits=None, tier=PRO)
    token.update(today={"video": 2}, paused_until=99.0)
    plan = flow2api.resolve("veo_3_1_t2v_fast_landscape")
    job = flow2api.Job("video_1", "running", 12.5, token_id=3, plan=plan, prompt="雨\n\0")
    job.update(notes=["a"], inputs=["video_1_0"], metadata={"a": "\ud800"})
    outputs = [flow2api.Output(job.id, number, f"n{number}", url=SIGNED) for number in (0, 1)]
    outputs[1].update(upscale=flow2api.Upscale.RUNNING, original=outputs[0].handle())
    with opened(tmp_path) as store:
        written = store.put(token, job, *reversed(outputs))
        token.remark = "changed"
        await written
    token.update(remark="", paused_until=0)  # a pause is not kept
    with opened(tmp_path) as store:
        (read,) = store.jobs(states=flow2api.OPEN, oldest_first=True)
        assert stored(read) == stored(job) == stored(store.job("video_1"))
        assert [*map(stored, read.outputs)] == [*map(stored, outputs)]
        (read,) = store.tokens()
        assert stored(read) == stored(token) and read.paused_until == 0
    row = {"id": 3, "email": "a", "data": '{"ghost": 1, "tier": "x"}'}
    (read,) = flow2api.Token.from_rows([row])
    assert stored(read) == stored(flow2api.Token(3, "a", tier="x"))
    with pytest.raises(AttributeError):
        read.update(ghost=1)


async def test_writes_end_in_their_order_and_a_refused_one_takes_no_other_along(tmp_path):
    """However they are grouped: nobody overtakes, the last state wins, and nothing is half done."""
    rows = {n: ("settings", {"name": n % 7, "data": f"{n}"}) for n in range(1000)}
    bad = {500: ("nowhere", {"name": "b"})}
    for number, name in ((600, "\ud800"), (700, 2**70)):
        bad[number] = ("settings", {"name": name, "data": "1"})
    with opened(tmp_path) as store:
        for row in bad.values():
            with pytest.raises(flow2api.StoreError):
                await store.put_rows(rows[0], row)
        assert store.settings() == {}
        ended, writes = [], [store.put_rows(row) for row in (rows | bad).values()]
        for number, write in enumerate(writes):
            write.add_done_callback(lambda _, n=number: ended.append(n))
        results = await asyncio.gather(*writes, return_exceptions=True)
        assert [number for number, result in enumerate(results) if result] == list(bad)
        assert ended == list(rows)
        assert store.settings() == {f"{n % 7}": n for n in rows if n not in bad}


async def test_a_database_of_the_first_version_is_taken_over(tmp_path, monkeypatch):
    """That of the version before: test_a_data_folder_of_…. A key is dropped after two days."""
    plan = flow2api.resolve("veo_3_1-fast")
    token, job = flow2api.Token(1, "a"), flow2api.Job("j", "running", plan=plan, token_id=1)
    with monkeypatch.context() as earlier:
        earlier.setattr(flow2api, "MIGRATIONS", flow2api.MIGRATIONS[:1])
        earlier.setattr(flow2api, "PROBE", "")
        with opened(tmp_path) as store:
            await store.put(token, job)
    with opened(tmp_path) as store:
        read = *store.tokens(), *store.jobs(states=("running",))
        assert [*map(stored, read)] == [*map(stored, (token, job))]
        for explicit, at, left in ((True, 1, 1), (False, 1000, 2), (False, 172_802, 1)):
            key = {"value": "k", "request": "r", "explicit": explicit}
            await store.put_rows(("request_keys", key | {"job_id": "j", "created_at": at}))
            keys = [flow2api.RequestKey(**key | {"explicit": word}) for word in (True, False)]
            assert [store.job_of_key(key, 0) for key in keys].count(("r", "j")) == left


async def test_a_backup_is_whole_and_for_its_owner_only(world, run, tmp_path):
    w = await world()
    job_id = (await w.chat()).job_id

    async def backup(target, data=w.data):
        command = (REPOSITORY / "flow2api.py", "--data", data, "--backup", tmp_path / target)
        program = await run(sys.executable, *command)
        return await program.end(), " ".join(program.log)

    copy = tmp_path / "copy" / "flow2api.db"
    copy.parent.mkdir()
    assert await backup(copy) == (0, "")  # of a running gateway
    with opened(copy.parent) as store:
        assert store.job(job_id).row() == w.store.job(job_id).row()
        assert [token.row() for token in store.tokens()] == [w.token.row()]
    for path in (copy, *w.data.glob("*.db*")):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    before = copy.read_bytes()
    await w.stop_gateway()
    assert await backup("stopped.db") == (0, "")
    for target, data in ((copy, w.data), ("no/x", w.data), ("x", tmp_path / "empty")):
        code, log = await backup(target, data)
        assert code == 2 and re.match("flow2api: (no copy of|File exists|No such file)", log)
    assert copy.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"copy", "data", "stopped.db"}


UNUSABLE = {  # name -> what becomes of the file, or the SQL that is run on it
    "empty": lambda whole: b"",
    "no header": lambda whole: bytes(100) + whole[100:],
    "a text": lambda whole: b"not a database\n" * 999,
    "half": lambda whole: whole[: len(whole) // 8192 * 4096],
    "half a page": lambda whole: whole[: len(whole) // 2 + 99],
    "a header": lambda whole: whole[:100],
    "a page": lambda whole: whole[:4096],
    "overwritten": lambda whole: whole[:4096].ljust(len(whole), b"\xff"),
    "half-migrated": lambda whole: whole[:60] + (1).to_bytes(4) + whole[64:],
    "newer": lambda whole: whole[:60] + (99).to_bytes(4) + whole[64:],
    **{f"no {name}": f"DROP TABLE {name}" for name in ("settings", "outputs", "request_keys")},
    "no column": "ALTER TABLE jobs RENAME COLUMN created_at TO created",
    "no hashes": "ALTER TABLE request_keys RENAME COLUMN request TO hash",
    "half an index": """INSERT INTO jobs VALUES ('x', 'queued', 1, 1, '{}');
        DROP INDEX jobs_by_time; CREATE INDEX jobs_by_time ON jobs (id) WHERE id IS NULL;
        PRAGMA writable_schema = 1; UPDATE sqlite_master SET sql =
        'CREATE INDEX jobs_by_time ON jobs (id)' WHERE name = 'jobs_by_time'""",
    "foreign": "PRAGMA user_version=0; DROP TABLE tokens; CREATE TABLE moz_places (id)",
    "foreign, numbered": "DROP TABLE tokens; CREATE TABLE tokens (name)",
    "a folder": None,
    **dict.fromkeys(("locked", "read only", "whose migration fails"), lambda whole: whole),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_an_unusable_database_is_told_in_a_sentence_and_not_touched(
    tmp_path, monkeypatch, capsys, name
):
    made, real = tmp_path / "made", sqlite3.connect
    with opened(made) as store:
        for number in range(100):
            row = flow2api.Token(number, f"{number}", st="x" * 500).row()
            store._commit([("INSERT INTO tokens VALUES (:id, :email, :data)", row)])
    change, file = UNUSABLE[name], made / "flow2api.db"
    if isinstance(change, str):
        with contextlib.closing(real(file)) as database:
            database.executescript(f"PRAGMA journal_mode=DELETE; {change}")
    whole = file.read_bytes()
    data = change(whole) if callable(change) else whole
    file.write_bytes(data) if change else (file.unlink(), file.mkdir())

    def connect(*arguments, **options):
        connection = real(*arguments, **options | {"timeout": 0.1})
        if name == "read only" and arguments[0] == file:
            connection.execute("PRAGMA query_only = 1")
        return connection

    monkeypatch.setattr(sqlite3, "connect", connect)
    if name == "whose migration fails":
        scripts = (*flow2api.MIGRATIONS, "CREATE TABLE later (x); NOT SQL;")
        monkeypatch.setattr(flow2api, "MIGRATIONS", scripts)
    monkeypatch.setattr(flow2api, "greet", mock.Mock(side_effect=KeyboardInterrupt))
    monkeypatch.setattr(flow2api, "start_log", lambda: None)  # it would fold other tests' lines
    (tmp_path / "setting.toml").write_text("server.host = '127.0.0.1'\nserver.port = 0")
    with contextlib.closing(real(file if name == "locked" else ":memory:")) as other:
        other.execute("BEGIN EXCLUSIVE")
        options = ("--data", str(made), "--config", str(tmp_path / "setting.toml"))
        code, told = flow2api.main(options), capsys.readouterr().err.splitlines()
    assert code == 2 and re.search("flow2api.db|locked", told[0]), (code, told)
    assert len(told) <= 1, told
    assert ("newer Flow2API" in told[0]) is (name == "newer")
    assert file.is_dir() or file.read_bytes() == data
    assert not [part for part in made.glob("flow2api.db-*") if part.stat().st_size]
    monkeypatch.undo()
    if callable(change) and data == whole:
        with opened(made) as store:  # it was let go
            assert len(store.tokens()) == 100


BROKEN_ROWS = ("{", "", "[]", "null", "5", '{"plan": 5}', '{"plan": {"a": 1}}', '{"n": {}}', "{}")
BROKEN_ROWS += ('{"completed_at": "x", "project_id": [], "url_expires": "x"}',)
BROKEN_ROWS += ('{"adapter": "of another version"}',)


@pytest.mark.parametrize("data", BROKEN_ROWS)
async def test_a_broken_row_takes_no_other_along_and_stays(world, looks, data):
    """Of an account, a finished and an open job, an output, a setting. The outputs that an
    open job has lost are looked for at Google."""
    w = await world(((PRO, 1000), (PRO, 1000)), video_seconds=0.02)
    jobs = [await w.post(VIDEOS, BOAT | {"async_mode": False}) for _ in range(5)]
    first, second, third, lost, good = (reply.job_id for reply in jobs)
    await (await log_in(w))("POST admin/debug", enabled=True)
    await w.stop_gateway()
    rows = {"tokens": "id = 1", "jobs": f"id IN ('{first}', '{second}')"}
    rows |= {"outputs": f"job_id = '{third}'", "settings": "name LIKE 'admin page%'"}
    with contextlib.closing(sqlite3.connect(w.data / "flow2api.db")) as database:
        for table, where in rows.items():
            sql = f"UPDATE {table} SET data = {'json_patch(data, ?)' if ':' in data else '?'}"
            database.execute(f"{sql} WHERE {where}", [data])
        state = "settling" if ":" in data else "running"
        database.execute("UPDATE jobs SET state = ? WHERE id IN (?, ?)", [state, second, lost])
        database.execute("DELETE FROM outputs WHERE job_id = ?", [lost])
        database.execute("UPDATE jobs SET token_id = 'x' WHERE id = ?", [first])
        database.execute("INSERT INTO settings VALUES (NULL, '5')")
        database.commit()
        await w.start_gateway()
        assert "user2@example.com" in {token.email for token in w.pool.tokens.values()}
        assert (await w.get(f"{VIDEOS}/{good}/content")).status == 200
        listed = await w.get(VIDEOS)
        assert listed.status == 200 and good in listed.body.decode(), listed
        for job_id in (first, second, third):
            assert (await w.get(f"{VIDEOS}/{job_id}")).status in (200, 404)
        owner = await log_in(w)
        for name in ("tokens", "settings", "jobs", "logs", "state"):
            await owner(f"GET {name}")
        assert (await w.chat()).content
        assert (await w.account()).id == 3  # the broken one's is not given again
        found = (await w.end_of(lost)).done()
        assert found or not w.pool.tokens.get(1)
        for table, where in rows.items() if data in ("{", "", "[]") else ():
            sql = f"SELECT data FROM {table} WHERE {where}"
            assert {*database.execute(sql)} == {(data,)}, table


# ---- Network: addresses of strangers ----

INNER = """0.0.0.0 0.1.2.3 10.0.0.1 10.255.255.255 100.64.0.1 100.127.255.255 127.0.0.1 127.1.2.3
 169.254.0.1 169.254.169.254 172.16.0.1 172.31.255.255 192.0.0.1 192.0.0.8 192.0.0.9 192.0.0.10
 192.0.0.170 192.0.0.255 192.0.2.1 192.168.0.1 192.168.255.255 198.18.0.1 198.19.255.255
 198.51.100.1 203.0.113.1 224.0.0.1 224.0.1.1 232.0.0.1 239.255.255.250 240.0.0.1 250.1.2.3
 255.255.255.255 :: ::1 ::2 ::7f00:1 ::10.0.0.1 ::8.8.8.8 ::ffff:127.0.0.1 ::ffff:10.0.0.1
 ::ffff:169.254.169.254 ::ffff:192.0.0.9 ::ffff:0.0.0.0 ::ffff:0:127.0.0.1 ::ffff:0:8.8.8.8
 64:ff9b::7f00:1 64:ff9b::8.8.8.8 64:ff9b:1::1 64:ff9b:1::10.0.0.1 64:ff9b:1:ffff::1 100::1
 200::1 400::1 800::1 1000::1 2001::1 2001:0:7f00:1::1 2001:2::1 2001:10::1 2001:db8::1
 2001:db8:ffff::1 2002::1 2002:7f00:1::1 2002:a00:1::1 2002:c0a8:101::1 2002:808:808::1 3fff::1
 4000::1 5f00::1 6000::1 8000::1 a000::1 c000::1 e000::1 f000::1 f800::1 fc00::1 fd00::1
 fd12:3456:789a::1 fe00::1 fe80::1 fe80::1%lo febf::1 fec0::1 fec0:0:0:ffff::1 feff::1 ff02::1
 ff05::2 ff0e::1 ff0e::808:808"""
PUBLIC = """1.1.1.1 8.8.8.8 9.255.255.255 11.0.0.1 100.63.255.255 100.128.0.1 126.255.255.255
 128.0.0.1 142.250.1.1 169.253.255.255 169.255.0.1 172.15.255.255 172.32.0.1 192.0.1.1
 192.167.255.255 192.169.0.1 198.17.255.255 198.20.0.1 203.0.112.255 203.0.114.1 223.255.255.254
 ::ffff:8.8.8.8 2003::1 2400:cb00::1 2606:4700:4700::1111 2001:4860:4860::8888 2a00:1450:4001::1
 2620:fe::fe 2c0f:fb50::1"""


def test_only_public_addresses_are_connected_to(monkeypatch):
    monkeypatch.setattr(socket, "socket", lambda *arguments: "a socket")
    for host in f"{INNER} {PUBLIC}".split():
        family, rest = (socket.AF_INET6, (80, 0, 0)) if ":" in host else (socket.AF_INET, (80,))
        passes = None
        with contextlib.suppress(OSError):
            passes = flow2api.public_socket((family, socket.SOCK_STREAM, 6, "", (host, *rest)))
        assert (passes == "a socket") is (host in PUBLIC.split()), host


PRIVATE_HOSTS = """127.0.0.1:{0} [::1]:{0} localhost:{0} 127.1:{0} 0:{0} 2130706433:{0} [::]:{0}
 0x7f000001:{0} 0x7f.1:{0} 0177.0.0.1:{0} 0.0.0.0:{0} [::ffff:127.0.0.1]:{0} LOCALHOST:{0}
 [::ffff:7f00:1]:{0} [0:0:0:0:0:0:0:1]:{0} x@127.0.0.1:{0} 127.0.0.1.:{0} ①②⑦.⓪.⓪.①:{0}
 127。0。0。1:{0} １２７.0.0.1:{0} ip6-localhost:{0} 169.254.169.254
 [fe80::1] example.com@127.0.0.1:{0} 127.0.0.1:{0}\\@example.com"""
NO_URLS = "file:///etc/passwd ftp://127.0.0.1:{0} gopher://127.0.0.1:{0} //127.0.0.1:{0}"


async def test_no_picture_is_fetched_from_a_private_address(world, monkeypatch):
    """Not even one of the history; that stops nothing. Nor does a redirect lead to one."""
    w = await world(**{"server.allow_private_urls": False})
    w.fault = fault("private", lambda request: web.Response(body=PNG))
    port = w.flow.address.rpartition(":")[2]
    urls = [f"http://{host}" for host in PRIVATE_HOSTS.format(port).split()]
    urls += [f"http:127.0.0.1:{port}", *NO_URLS.format(port).split()]
    chats = (w.chat(BANANA, pictures=[f"{url}/private/a.png"]) for url in urls)
    for url, reply in zip(urls, await asyncio.gather(*chats), strict=True):
        message = expect_error(w, reply, "invalid_image")["message"]
        if re.fullmatch(r"http://([\d.]+|\[.+\])", url):
            assert "is not a public address" in message, url
    link = f"![x]({w.flow.address}/private/{'a' * 40}.png)"
    assert (await w.chat(BANANA, **turns("a cat", link, "make it darker"))).content
    assert not w.fault.seen and not w.asked("uploadImage") and not w.jobs.open
    answers = []  # the first address counts as public now, for once
    public = property(lambda address: bool(answers) and answers.pop())
    monkeypatch.setattr(ipaddress.IPv4Address, "is_global", public)
    for target in ("http://[::ffff:127.0.0.1]", "http://localhost", "file://"):
        answers.append(True)
        hop = web.Response(status=302, headers={"Location": f"{target}:{port}/private"})
        w.fault = fault("hop|private", lambda request, hop=hop: hop)
        reply = await w.chat(BANANA, pictures=[f"{w.flow.address}/hop.png"])
        expect_error(w, reply, "invalid_image")
        assert w.fault.seen == ["/hop.png"]


@pytest.mark.parametrize("public", [True, False])
async def test_a_file_at_an_inner_address_is_fetched_where_flow_is_inner(world, public):
    w = await world(image_seconds=0)
    job_id = (await w.chat(BANANA)).job_id
    w.pool.tokens.clear()  # so that no new address is asked for
    w.fault = fault("^/media/", dropped)
    for name in ("labs", "api") if public else ():
        w.live.put("file", f"flow.{name}_base_url", f"https://{name}.google.com/v1", "test")
    reply = await w.get(f"{VIDEOS}/{job_id}/content")
    message = expect_error(w, reply, "upstream_unreachable")["message"]
    assert bool(w.fault.seen) is not public and ("not at a public" in message) is public


async def test_the_url_of_a_picture_is_asked_for_as_it_stands(world):
    """A signature can be over each byte. A redirect's, too; by our own name."""
    path = "/p%2Fq/a%7Eb.png?sig=a%2Bb%3D&x=%e4+c&empty"
    seen = []

    async def answer(reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        seen.append(head.split()[1])
        assert f"User-Agent: Flow2API/{flow2api.__version__}\r\n" in head
        if head.split()[1].startswith("/start"):
            writer.write(f"HTTP/1.1 302 x\r\nLocation: {path}\r\n".encode())
            writer.write(b"Content-Length: 0\r\nConnection: close\r\n\r\n")
        else:
            writer.write(b"HTTP/1.1 200 x\r\nContent-Length: %d\r\n\r\n" % len(PNG) + PNG)
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        host = f"HTTP://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        w = await world()
        for start in (path, "/start" + path):
            assert (await w.chat(BANANA, pictures=[host + start])).content
    assert seen == [path, "/start" + path, path]
    w.live.put("file", "proxy.proxy_enabled", True, "test")
    reply = await w.chat(BANANA, pictures=[f"{host}/gone"])
    assert "proxy" in expect_error(w, reply, "invalid_image")["message"]


# ---- Upstream ----

PICTURES = [flow2api.block_picture(f"input {number}", 16, 16) for number in range(3)]
START, END = {"startImage": {"mediaId": "0"}}, {"endImage": {"mediaId": "1"}}
ASSETS = [{"imageUsageType": "IMAGE_USAGE_TYPE_ASSET", "mediaId": name} for name in "012"]
INPUTS = [{"imageInputType": "IMAGE_INPUT_TYPE_REFERENCE", "name": name} for name in "012"]
FORMS = (  # call, id, number of pictures, upstream key, how the pictures stand there
    ("VideoText", "veo_3_1-fast", 0, "veo_3_9_t2v_portrait_fast_ultra", {}),
    ("VideoStartImage", "veo_3_1-1080p", 1, "veo_3_1_i2v_s_portrait", START),
    ("VideoStartAndEndImage", "omni_flash", 2, "abra_i2v_8s", START | END),
    ("VideoReferenceImages", "omni_flash", 3, "abra_r2v_8s", {"referenceImages": ASSETS}),
    ("Images", "nano_banana_2-2K", 3, "BELUGA", {"imageInputs": INPUTS}),
)


async def test_requests_reach_flow_in_the_form_of_2026_with_the_keys_of_models(world):
    """All n outputs in one call, each with its own seed; they are found by their batch."""
    w = await world([(ULTRA, 1000)])
    w.live.models = {"nano_banana_2": "BELUGA", "veo_3_1_text": "veo_unknown"}
    w.live.models["veo_3_1_fast_text"] = "veo_3_9_t2v{P}_fast{U}"

    async def numbered_uploads(request, handler):
        if not request.path.endswith("uploadImage"):
            return await handler(request)
        data = base64.b64decode((await request.json())["imageBytes"])
        return web.json_response({"media": {"name": str(PICTURES.index(data))}})

    w.fault, project, urls = numbered_uploads, w.token.project_id, [*map(data_url, PICTURES)]
    prompt = {"structuredPrompt": {"parts": [{"text": "a cat"}]}}
    for call, model, count, key, inputs in FORMS:
        reply = await w.chat(model, "a cat", urls[:count], n=2)
        (body,) = w.asked(f"Generate{call}")
        context, elements = body.pop("clientContext"), body.pop("requests")
        assert len({element.pop("seed") for element in elements}) == 2
        job = await w.jobs.get(reply.job_id)
        found = await w.pool.adapter_for(w.token).find(w.token, job)
        names = {output.original.get("name", output.name) for output in job.outputs}
        assert {status.name for status in found} == names
        mark = {"batchId": job.batch}
        assert re.fullmatch(r";\d{13}", context["sessionId"])
        own = {"tool": "PINHOLE", "projectId": project, "sessionId": context["sessionId"]}
        expected = {"mediaGenerationContext": mark}
        if call == "Images":
            form = {"imageModelName": key, "imageAspectRatio": "IMAGE_ASPECT_RATIO_PORTRAIT"}
            form |= prompt | {"clientContext": context}
            expected["useNewMedia"] = True
        else:
            own["userPaygateTier"] = ULTRA
            form = {"videoModelKey": key, "aspectRatio": "VIDEO_ASPECT_RATIO_PORTRAIT"}
            form |= {"textInput": prompt, "metadata": {}}
            mark["audioFailurePreference"] = "BLOCK_SILENCED_VIDEOS"
            expected["useV2ModelConfig"] = True
        assert (context, elements, body) == (own, [form | inputs] * 2, expected)
    assert w.asked("Status")[0]["media"][0]["projectId"] == project
    sizes = {body["targetResolution"] for body in w.asked("upsampleImage")}
    assert sizes == {"UPSAMPLE_IMAGE_RESOLUTION_2K"}
    larger = {"videoModelKey": "veo_3_1_upsampler_1080p", "resolution": "VIDEO_RESOLUTION_1080P"}
    larger["aspectRatio"] = "VIDEO_ASPECT_RATIO_PORTRAIT"
    first, second = (body["requests"][0] for body in w.asked("UpsampleVideo"))
    assert first.items() >= larger.items() <= second.items()
    assert first["videoInput"] != second["videoInput"]
    expect_error(w, await w.chat("veo_3_1"), "model_unavailable")


# Replies in the shapes that were captured in 2026.
SIGNED = "https://flow-content.google/video/x?Expires=1771256167&KeyName=k&Signature=s"
WORKFLOW = {"name": "w", "metadata": {"primaryMediaId": "n", "batchId": "b"}, "projectId": "p"}
NO_LINK = {"generatedVideo": {"seed": 17071}, "operation": {"name": "n"}}
WITH_LINK = {"generatedVideo": {"fifeUrl": SIGNED}}
UNSAFE = {"error": {"code": 3, "message": "PUBLIC_ERROR_UNSAFE_GENERATION"}}


def new_clip(word="SUCCESSFUL", name="n", video=NO_LINK, **status):
    status = {"mediaGenerationStatus": f"MEDIA_GENERATION_STATUS_{word}", **status}
    ids = {"name": name, "projectId": "p", "workflowId": "w", "workflowStepId": "CAE"}
    return {**ids, "mediaMetadata": {"mediaStatus": status}, "video": video}


def new_image(name="n", url=SIGNED, **more):
    return {"name": name, "image": {"generatedImage": {"fifeUrl": url}}, **more}


def known(state="pending", name="n", project="p", **more):
    return flow2api.Status(name, state, media=name, project=project, **more)


FAILED = known("failed", error="generation_failed")
REFUSED = known("failed", error="content_policy_violation")
# fmt: off
MEDIA = (  # what stands in media[], what is read
    (new_clip("SCHEDULED"), known()), (new_clip("ACTIVE"), known()),
    (new_clip("A_NEW_WORD"), known()), (new_clip("CANCELED"), FAILED),
    (new_clip("FAILED", **UNSAFE), REFUSED), (new_clip("ERROR_UNKNOWN", **UNSAFE), REFUSED),
    (new_clip("FAILED", failureReasons=["IP_PROHIBITED"]), REFUSED),
    (new_clip("FAILED", failureReasons=["HIGH_TRAFFIC"]), FAILED),
    (new_clip(), known("done")), (new_clip(video=WITH_LINK), known("done", url=SIGNED)),
    (new_clip(video={"encodedVideo": "bXA0"}), known("done", data=b"mp4")),
    (new_image(projectId="p"), known("done", url=SIGNED)),
    (new_image("CAMa"), known("done", "CAMa", "", url=SIGNED)),
)
BALANCES = {0: 0, 7: 7, "880": 880, "many": None, -1: None, None: None}
ODD = ({"title": "no name"}, "abc", 5, new_clip(name=5), new_clip(mediaGenerationStatus=5),
       new_image(projectId=5), new_image(url="http://["), new_image(url=5),
       new_image(url="http://x/\r\nSet-Cookie: a=b"))
# fmt: on


def test_replies_that_list_outputs_are_read_and_odd_entries_refused_or_left_out():
    """Refused where it was asked for them; of a submit, it is unknown then what it did."""
    for medium, expected in MEDIA:
        for media in (medium, [medium] * 2):
            body = {"media": media, "workflows": [WORKFLOW]}
            (status,) = flow2api.read_statuses(body).statuses
            code = status.error and status.error.code
            assert dataclasses.replace(status, error=code) == expected
    body = {"media": [new_clip("ACTIVE"), new_clip(name="m")]}
    assert flow2api.read_statuses(body).statuses == [known(), known("done", "m")]
    for credits, balance in BALANCES.items():
        body = {"media": None, "workflows": [WORKFLOW], "remainingCredits": credits}
        assert flow2api.read_statuses(body) == flow2api.Reply([known(project="")], balance)
    assert flow2api.read_statuses({"workflows": []}) == flow2api.Reply([])
    lists = [{"media": [odd, new_clip()]} for odd in ODD]
    for body in ({"media": "abc"}, {"media": 5}, {"workflows": [{"name": "w"}]}, *lists):
        for code in ("upstream_changed", "submit_unknown"):
            assert refused(flow2api.read_statuses, body, code).code == code, body
        statuses = flow2api.read_statuses(body, "").statuses
        read = [(status.name, status.state, status.url) for status in statuses]
        assert read == [("n", "done", "")] * (body in lists)


def says_on(on, body, **headers):
    """A fault: this is Flow's answer to calls of `on`."""
    return fault(on, lambda request: web.json_response(body, headers=headers))


async def test_of_what_flow_tells_only_a_jobs_own_counts_and_once(world):
    w = await world()
    w.fault = edited(PAID, lambda body: {"media": body["media"][:1] * 2})
    reply = await w.chat(BANANA, n=2)
    assert len(links_in(reply.content)) == 1 and "made none of it" in reply.content
    job = await w.jobs.get(reply.job_id)
    flow = {"name": "", "metadata": {"batchId": job.batch, "primaryMediaId": "own"}}
    contents = {"workflows": [flow], "media": [new_image("a stranger's")]}
    body = {"result": {"data": {"json": {"projectContents": contents}}}}
    w.fault = says_on("projectInitialData", body)
    (status,) = await w.pool.adapter_for(w.token).find(w.token, job)
    assert status.name == "own"


async def test_hidden_refusals_are_refusals_and_sessions_and_links_are_read(world, monkeypatch):
    """A new session token in a cookie is kept where it can be one: not an empty or short one."""
    w = await world()
    w.token.project_id, adapter = "", w.pool.adapter_for(w.token)
    upload = functools.partial(adapter.upload, project="p", data=PNG, media_type="image/png")
    dead = {"access_token": "ya29.x", "error": "ACCESS_TOKEN_REFRESH_NEEDED"}
    inner = [{"result": {"projectId": "p"}, "status": status} for status in (500, 403)]
    failed, forbidden = ({"result": {"data": {"json": result}}} for result in inner)
    for call, code, *bodies in (
        (adapter.sign_in, "account_session_ended", {}, {"access_token": 5}, dead),
        (adapter.project, "upstream_error", failed),
        (adapter.project, "account_refused", forbidden),
        (adapter.project, "upstream_changed", {}),
        (upload, "content_policy_violation", {}, {"media": []}, {"media": {"name": 5}}),
    ):
        for body in bodies:
            w.fault = says_on("session|createProject|upload", body)
            with pytest.raises(flow2api.GatewayError) as caught:
                await call(w.token)
            assert caught.value.code == code, body
    w.fault = says_on("upload", {"media": [{"name": "n"}]})
    assert await upload(w.token) == "n"
    form = "__Secure-next-auth.session-token={}"
    monkeypatch.setattr(flow2api, "now", lambda: 1000.0)
    assert flow2api.read_link(SIGNED) == flow2api.Link(SIGNED, 1771256167.0)
    assert flow2api.read_link("https://x.test/?Expires=soon").expires == 4600.0  # an hour
    first, rotated = w.token.st, "r" * 300
    for cookie, kept, end, expires in (
        ("", first, "2026-08-27T03:10:11.000Z", 1787800211.0),
        ("short", first, "soon", 4600.0),
        (rotated, rotated, None, 4600.0),
        (rotated, rotated, 5, 4600.0),
    ):
        body = {"access_token": "ya29.x", "expires": end}
        w.fault = says_on("/auth/session", body, **{"Set-Cookie": f"{form.format(cookie)}; Path=/"})
        await w.pool.adapter_for(w.token).sign_in(w.token)
        assert (w.token.st, w.token.at_expires) == (w.store.tokens()[0].st, expires)
        assert w.token.st == kept


# Google's refusals (upstream-rest 11.2, 11.3): our code, what it does, Google's reasons without
# PUBLIC_ERROR_; or HTTP status (0: a clip that failed later) and text of one without a reason.
REFUSALS = """
content_policy_violation FINAL UNSAFE_GENERATION UNSAFE_IMAGE_UPLOAD SEXUAL SEXUAL_UPLOAD MINOR
 MINOR_UPLOAD MINOR_HARM_UPLOAD MINOR_INPUT_IMAGE PROMINENT_PEOPLE_UPLOAD REPUTATIONAL VIDEO_EDIT
 PROMINENT_PEOPLE_FILTER_FAILED PHOTOREAL_UPLOAD PHOTOREAL_INPUT_IMAGE VIOLENCE_FILTER IP_PROHIBITED
 IP_INPUT_IMAGE IMAGE_OUTPUT_IP_FILTER DANGER_FILTER AUDIO_FILTERED AUDIO_GENERATION_FILTERED
 AUDIO_FILTER_MINOR_PRESENCE FINISH_REASON_INPUT_SPEECH_EDIT FINISH_REASON_OUTPUT_DANGEROUS
invalid_request FINAL NON_ENGLISH_PROMPT
invalid_image FINAL IMAGE_TOO_LARGE IMAGE_TOO_SMALL UNKNOWN_IMAGE_FILE_FORMAT
conflict FINAL MEDIA_GENERATION_CANNOT_BE_CANCELED GENERATION_ALREADY_IN_PROGRESS
captcha_required ACCOUNT UNUSUAL_ACTIVITY          |  account_busy ACCOUNT CONCURRENT_LIMIT_REACHED
captcha_required ACCOUNT 403 reCAPTCHA failed      |  account_refused BAN 403 No permission
account_refused BAN USER_REGION_DISALLOWED USER_MINOR APP_UNAVAILABLE
account_throttled ACCOUNT USER_REQUESTS_THROTTLED UNUSUAL_ACTIVITY_TOO_MUCH_TRAFFIC
account_throttled ACCOUNT 429 Exhausted  |  model_not_for_account ACCOUNT MODEL_ACCESS_DENIED
account_daily_quota ACCOUNT PER_MODEL_DAILY_QUOTA_REACHED PER_MODEL_DAILY_QUOTA_REACHED_UPGRADEABLE
account_no_credits ACCOUNT USER_QUOTA_REACHED WORKSPACE_ACCOUNT_QUOTA_REACHED
upstream_busy RETRY HIGH_TRAFFIC MODEL_OVERLOADED MODEL_DISABLED_DUE_TO_TRAFFIC
 SOMETHING_WENT_WRONG VIDEO_GENERATION_TIMED_OUT
upstream_changed FINAL 400 Unknown name "x"        |  model_unavailable FINAL 404 Not found.
upstream_retired SESSION 404 Flow RPCs have been deprecated  |  generation_failed FINAL 0
upstream_error RETRY 499 The operation was cancelled.  |  upstream_error RETRY 500 Internal error
upstream_error RETRY 503 The service is unavailable.   |  upstream_error RETRY 504
"""


DEEP = "[" * 10**5
MOVED = '{"error": {"json": {"message": "Flow RPCs have been deprecated"}}}'  # as tRPC wraps it
BUSY = '{"error": {"details": [5, {"reason": "PUBLIC_ERROR_HIGH_TRAFFIC"}]}}'
ANSWERS = (  # HTTP statuses, bodies, the error, that of a submit
    ([200], ["<html>", "[]", DEEP], "upstream_changed", "submit_unknown"),
    ([302, 408, 499, 500], ["{}", "", DEEP], "upstream_error", "submit_unknown"),
    ([429, 503], [BUSY], "upstream_busy", "upstream_busy"),
    ([400], ["<html>"], "upstream_changed", "upstream_changed"),
    ([403], ['{"error": {"details": 5, "message": [1]}}'], "account_refused", "account_refused"),
    ([404], [MOVED], "upstream_retired", "upstream_retired"),
)


def test_each_of_googles_reasons_has_its_code_and_effect():
    """What may hide a success leaves a submit unknown."""
    for row in re.split(r"\n(?! )|\|", REFUSALS.strip()):
        code, effect, *words = row.split()
        said = itertools.product((0, 400, 403, 429, 500), words, ["Refused."])
        if words[0].isdigit():
            said = [(int(words[0]), "", " ".join(words[1:]))]
        for status, reason, text in said:
            error = flow2api.google_error(status, reason and f"PUBLIC_ERROR_{reason}", text)
            told = (error.code, error.effect.name, error.upstream)
            assert told == (code, effect, status), (row, reason)
            assert (reason or text or str(status)) in str(error)  # it is told along
            assert (error.retry_after > 0) == (error.status == 429)
            assert ("result of the safety system" in str(error)) == ("policy" in code)  # LiteLLM's
    for statuses, texts, *codes in ANSWERS:
        for status, text in itertools.product(statuses, texts):
            response = web.Response(status=status, headers={"Retry-After": "77"})
            body = None
            with contextlib.suppress(ValueError):
                body = flow2api.parse_json(text.encode())
            call = functools.partial(refused, flow2api.read_answer, response, body)
            assert [call().code, call(spends=True).code] == codes, (status, text[:9])
            assert status == 200 or call().retry_after == 77
    years = web.Response(status=429, headers={"Retry-After": "9" * 15})
    assert refused(flow2api.read_answer, years, {}).retry_after == 86400


async def test_one_bad_name_in_a_status_call_hides_no_other(world, clock):
    """Google refuses a whole call for one name that it doesn't know; many are asked in chunks."""
    w = await world()
    details = ("video", "a cat", "PORTRAIT", 0, "p", "b", "s")
    w.flow.media = {str(i): flow2api.Medium(str(i), *details) for i in range(600)}
    codes = itertools.cycle((400, 404))

    async def refuse(request, handler):
        answer = await handler(request)
        return answer if answer.status != 404 else refusal(next(codes))(request)

    async def poll(names):
        """How many names were in each status call, and which were told to be done."""
        w.flow.calls.clear()
        reply = await w.pool.adapter_for(w.token).poll(w.token, [outputs[n] for n in names])
        calls = [len(body["media"]) for body in w.asked("Status")]
        return calls, [status.name for status in reply.statuses if status.state == "done"]

    w.fault, names = refuse, list(w.flow.media)
    outputs = {name: flow2api.Output(name=name, project="p") for name in names}
    assert await poll(names) == ([256, 256, 88], names)
    names = names[:40]
    good = [name for name in names if name not in ("7", "22")]
    lost = [w.flow.media.pop(name) for name in ("7", "22")]
    assert await poll(names) == ([40], [])
    assert await poll(names) == ([1] * 20, good[:19])  # never too many of them at once
    assert await poll(names) == ([19] + [1] * 20, good)
    assert await poll(names) == ([38], good)  # the bad ones are left out for a while
    clock.ahead = 61
    w.flow.media["7"] = lost[0]
    assert await poll(names) == ([38, 1, 1], [*good, "7"])


async def test_a_source_of_recaptcha_tokens_is_asked_for_each_submit(world):
    """There is none today: it is where the owner's own browser could lend them."""
    w = await world(video_seconds=0.05)
    asked = []

    async def lend(token, action):
        asked.append((token.email, action))
        return "lent"

    for source in (None, lend):
        w.pool.adapter_for(w.token).captcha_source = source
        w.flow.calls.clear()
        for model in (BANANA, FAST):
            assert (await w.chat(model)).content
        lent = [body["clientContext"].get("recaptchaContext", {}) for body in w.asked("Generate")]
        assert [one.get("token") for one in lent if one] == (["lent"] * 2 if source else [])
    actions = ("IMAGE_GENERATION", "VIDEO_GENERATION")
    assert asked == [(w.token.email, action) for action in actions]


# ---- Pool: which account does what ----


async def test_jobs_are_spread_over_the_accounts_that_are_switched_on_for_them(world):
    """What one is refused another one does; by all: test_a_failure_does_no_more_than_it_must."""
    w = await world(accounts=())
    clips = [await w.account(credits=much, image_enabled=False) for much in (2000, 1000)]
    pictures = await w.account(video_enabled=False)
    await asyncio.gather(*(w.chat(model) for model in [FAST, FAST, BANANA] * 3))
    for token, videos, images in (*((one, 3, 0) for one in clips), (pictures, 0, 3)):
        assert (token.video_count, token.image_count, token.use_count) == (videos, images, 3)
    first, second = clips
    for reason, credits in (("MODEL_ACCESS_DENIED", 1940), ("USER_QUOTA_REACHED", 0)):
        first.paused_until = 0
        w.fault = fault(PAID, refusal(403, f"PUBLIC_ERROR_{reason}"), times=1)
        assert (await w.chat()).content and len(w.fault.seen) == 1
        assert (first.credits, first.is_active, second.error_count) == (credits, True, 0)
    assert (first.error_count, second.credits) == (2, 900)
    for token in clips:
        await w.pool.update(token, video_enabled=False)
    expect_error(w, await w.chat(), "no_accounts")


async def test_accounts_take_turns_and_credits_decide_only_for_what_costs_any(world):
    w = await world(((PRO, 100), (PRO, 100), (PRO, 900)))
    tokens = w.pool.tokens.values()
    for _ in range(9):
        await w.chat("nano_banana_pro")
    assert [token.image_count for token in tokens] == [3, 3, 3]
    for _ in range(4):
        await w.chat()
    assert [token.video_count for token in tokens] == [0, 0, 4]
    await w.pool.update(w.pool.tokens[3], is_active=False)
    for _ in range(4):
        await w.chat()
    assert [token.video_count for token in tokens] == [2, 2, 4]


async def test_over_its_limit_an_account_lets_jobs_wait_and_credits_are_reserved(world):
    """And a hundred simultaneous 401s need one refresh."""
    w = await world()
    await w.pool.update(w.token, video_concurrency=2)
    w.fault = hold(PAID)
    clients = [asyncio.create_task(w.chat()) for _ in range(5)]
    await until(lambda: len(w.pool.queue) == 3)
    w.fault.release.set()
    assert all(reply.content for reply in await asyncio.gather(*clients))
    ends = sorted(made.ready for made in w.flow.media.values())
    for end, later in zip(ends, ends[2:], strict=False):  # it began when that had ended
        assert later - w.flow.video_seconds >= end
    assert (w.token.busy.total(), w.token.reserved) == (0, 0)
    w.flow.accounts[w.token.st].credits = w.token.credits = 50  # of which two clips need 40
    w.flow.calls.clear()
    w.fault = hold(PAID)
    first = asyncio.create_task(w.chat(n=2))
    await w.fault.seen.wait()
    expect_error(w, await w.chat(), "no_credits")
    w.fault.release.set()
    assert (await first).content and len(w.paid()) == 1
    assert w.token.credits == 10 == w.flow.accounts[w.token.st].credits
    w.flow.media.clear()
    w.flow.accounts[w.token.st].at = "forgotten by Google"
    before = len(w.asked("auth/session"))
    sent = []

    async def together(request, handler):
        sent.append(request.path)
        await until(lambda: sum(bool(re.search(PAID, path)) for path in sent) >= 100)
        return await handler(request)

    w.fault = together
    replies = await asyncio.gather(*(w.chat(BANANA) for _ in range(100)))
    assert [reply.status for reply in replies] == [200] * 100
    assert len(w.asked("auth/session")) - before == 1
    assert len(w.flow.media) == 100 and w.token.error_count == 0


async def test_a_clip_beyond_an_accounts_limit_waits_or_goes_elsewhere(world, monkeypatch):
    """It waits for those of its own account; another account takes it at once."""
    start = time.time()  # with a clock that runs twenty times as fast
    monkeypatch.setattr(flow2api, "now", lambda: start + 20 * (time.time() - start))
    w = await world(video_seconds=5)
    first = w.token

    async def limit(request, handler):
        of_first = "AsyncGenerate" in request.path and first.project_id in await request.text()
        open_clips = sum(clip.ready > flow2api.now() for clip in w.flow.media.values())
        if of_first and open_clips >= limit.most:
            limit.refusals += 1
            return refusal(429, "PUBLIC_ERROR_CONCURRENT_LIMIT_REACHED")(request)
        return await handler(request)

    w.fault = limit
    for limit.most, number, refusals, counts in (
        (2, 6, 6, [6]),  # four of the first burst, and two of those once more
        (0, 4, 2, [6, 4]),
    ):
        limit.refusals = 0
        replies = await asyncio.gather(*(w.chat() for _ in range(number)))
        assert [reply.status for reply in replies] == [200] * number
        assert limit.refusals <= refusals and (first.is_active, first.failures) == (True, 0)
        assert [token.video_count for token in w.pool.tokens.values()] == counts
        await w.account()


async def test_credits_and_plans_are_asked_for_again_before_there_are_none(world, clock):
    """Once a minute at most, and after a spend whose answer names no balance."""
    w = await world(((PRO, 5),), **{"token_refresh.enabled": False})
    expect_error(w, await w.chat(), "no_credits")
    (account,) = w.flow.accounts.values()
    account.credits = 20
    expect_error(w, await w.chat(), "no_credits")
    clock.ahead = 61
    w.fault = edited(PAID, lambda body: {"media": body["media"]})
    assert (await w.chat()).content
    assert (account.credits, w.token.credits) == (0, 0)
    clock.ahead = 150
    w.flow.calls.clear()
    for reply in await asyncio.gather(*(w.chat() for _ in range(9))):
        expect_error(w, reply, "no_credits")
    assert [path for path, _ in w.flow.calls] == ["/v1/credits"]
    account.tier, w.fault, clock.ahead = ULTRA, None, 250
    assert (await w.chat("veo_3_1-relaxed")).content
    w.token.credits = 1000  # which Google does not know
    expect_error(w, await w.chat(), "account_no_credits")
    account.credits, clock.ahead = 20, 350
    assert (await w.chat()).content and (await w.chat("veo_3_1-relaxed")).content


async def test_sixty_clips_over_two_tokens_need_two_status_calls_a_tick(world):
    """A tick is a row of status calls in which no clip is asked for twice."""
    w = await world(((PRO, 5000), (ULTRA, 5000)), video_seconds=0.8)
    replies = await asyncio.gather(*(w.chat(text=f"boat {i}") for i in range(60)))
    assert [reply.status for reply in replies] == [200] * 60
    ticks = [[]]
    for body in w.asked("batchCheckAsync"):
        names = {item["name"] for item in body["media"]}
        if any(names & earlier for earlier in ticks[-1]):
            ticks.append([])
        ticks[-1].append(names)
    assert len(ticks) > 2 >= max(map(len, ticks))
    assert max(len(set().union(*tick)) for tick in ticks) == 60


@pytest.mark.parametrize("pictures", [(), (DATA,)])
@pytest.mark.parametrize("model", ["nano_banana_pro", "veo_3_1-fast"])
async def test_a_project_that_is_gone_is_made_anew_once(world, model, pictures):
    w = await world()
    gone = w.token.project_id
    w.fault = without([gone])
    replies = await asyncio.gather(*(w.chat(model, f"{i}", pictures) for i in range(5)))
    assert all(reply.content for reply in replies) and len(w.flow.media) == 5
    assert len(w.asked("createProject")) == 2 and w.token.project_id != gone
    assert w.store.tokens()[0].project_id == w.token.project_id
    w.fault = says(404)  # that is the key, which a new project does not make known
    for _ in range(3):
        expect_error(w, await w.chat(model), "model_unavailable")
    assert len(w.asked("createProject")) == 3


async def test_where_projects_are_retired_another_account_takes_the_job(world):
    w = await world(((PRO, 1000), (PRO, 100)))
    moved, other = w.pool.tokens.values()
    w.fault = together([without([moved.project_id]), fault("createProject", RETIRED)])
    assert (await w.chat()).content and other.video_count == 1
    assert "flow.google.com" in str(moved.paused_for()) and moved.is_active
    assert (moved.cause(), moved.reason_code) == ("upstream_retired", "")
    moved.paused_until = 0
    w.fault = together([fault(PAID, refusal(status), times=1) for status in (403, 429)])
    expect_error(w, await w.chat(BANANA), "account_throttled")  # this one waiting cures


# ---- Pool: which account rests, and until when ----


async def test_a_step_back_grows_is_capped_and_ends_and_three_refusals_disable(world, clock):
    w = await world()
    throttled = fault(PAID, refusal(429, "PUBLIC_ERROR_USER_REQUESTS_THROTTLED"))
    pauses = []
    for refused in (*[True] * 7, False, True):
        w.fault = throttled if refused else None
        reply = await w.chat(BANANA)
        assert expect_error(w, reply, "account_throttled") if refused else reply.content
        if refused:
            pauses.append(w.token.paused_until - flow2api.now())
            clock.ahead += pauses[-1] + 1
    assert all(after > 1.5 * before for before, after in itertools.pairwise(pauses[:4]))
    assert 200 < pauses[0] < 400 and max(pauses) <= 1.1 * 3600 and pauses[-1] < 400
    for failures in (1, 2, 0, 1, 2, 3):  # in a row, after each request
        clock.ahead += 4000
        w.fault = fault(PAID, refusal(403, "", "Not you.")) if failures else None
        reply = await w.chat(BANANA)
        assert expect_error(w, reply, "account_refused") if failures else reply.content
        assert (w.token.failures, w.token.is_active) == (failures, failures < 3)
    await w.restart()
    assert "Not you." in expect_error(w, await w.chat(BANANA), "no_accounts")["message"]
    assert "Not you." in w.token.reason and not w.token.is_active


STEPS_BACK = (  # what is refused; a burst names in Retry-After; the least seconds of it
    ((429, "THROTTLED"), [""], 0.9 * 300),
    ((403, "UNUSUAL_ACTIVITY"), [""], 0.9 * 300),
    ((403, ""), [""], 0.9 * 60),
    ((429, ""), ["100", "5000", "200"], 5000),  # nothing makes that less
)


@pytest.mark.parametrize("row", STEPS_BACK)
async def test_an_account_that_steps_back_is_left_alone_until_then(world, clock, monkeypatch, row):
    monkeypatch.setattr(random, "uniform", lambda low, high: low)
    w = await world()
    refused, waits, seconds = row
    first, sent = w.token, []

    async def refuse(request, handler):  # all that were sent, one after the other
        sent.append(number := len(sent))
        await until(lambda: len(sent) == len(waits) and first.error_count == number)
        answer = refusal(*refused)(request)
        answer.headers["Retry-After"] = waits[number]
        return answer

    w.fault = refuse
    await asyncio.gather(*(w.chat("nano_banana_pro") for _ in waits))
    w.fault = None
    await w.account()
    for clock.ahead, works in ((1, False), (seconds - 2, False), (1.2 * seconds + 5, True)):
        replies = await asyncio.gather(*(w.chat("nano_banana_pro") for _ in range(8)))
        assert [reply.status for reply in replies] == [200] * 8
        assert (0 < first.image_count < 8) is works


async def dies(w, clock):
    """Google says for minutes that the only account's session is dead."""
    for number in (1, 2, 3):
        await until(lambda number=number: len(w.token.suspicions) == number)
        assert w.token.is_active
        clock.ahead += 60
    await until(lambda: not w.token.is_active)


async def test_an_ended_session_is_told_and_a_new_one_brings_the_clip_home(world, impatient, clock):
    w = await world()
    client = asyncio.create_task(w.chat())
    (job,) = await w.running()
    (account,) = w.flow.accounts.values()
    w.flow.accounts.clear()
    await dies(w, clock)
    assert "Sign in to Flow again" in w.token.reason and job.state == "running"
    assert w.token.reason_code == "account_session_ended"
    expect_error(w, await w.chat(), "no_accounts")
    w.flow.accounts["another.session"] = account
    await w.pool.add("another.session")
    assert (w.token.is_active, w.token.reason, w.token.reason_code) == (True, "", "")
    assert (await client).content and (await w.chat()).content
    assert (len(w.paid()), account.credits, w.token.busy.total()) == (2, 960, 0)
    w.flow.accounts.clear()
    w.token.at = ""
    w.fault = held = hold("auth/session", through=True)
    client = asyncio.create_task(w.chat())
    await held.seen.wait()
    w.fault = None
    w.flow.accounts["a.third.session"] = account
    adding = asyncio.create_task(w.pool.add("a.third.session"))
    await until(lambda: w.token.st == "a.third.session")
    held.release.set()  # only now the refusal of the old one arrives
    await adding
    assert (await client).content and w.token.is_active


async def test_a_clip_that_comes_home_proves_its_session_alive(world, impatient, clock):
    w = await world()
    client = asyncio.create_task(w.chat())
    await w.running()
    accounts = dict(w.flow.accounts)
    w.flow.accounts.clear()
    await dies(w, clock)
    w.flow.accounts.update(accounts)
    assert (await client).content and w.token.reason == ""
    assert (await w.chat()).content and w.store.tokens()[0].is_active


HICCUPS = (  # what answers, so many times: each is one dead look of the session
    ("auth/session", lambda request: web.json_response({}), 1),
    ("batchGenerateImages", refusal(401), 2),
)


@pytest.mark.parametrize(("on", "answer", "times"), HICCUPS)
async def test_a_hiccup_of_a_session_disables_nobody(world, impatient, clock, on, answer, times):
    """While the account is suspect, another serves."""
    w = await world()
    w.token.at = ""
    w.fault = fault(on, answer, times=times)
    expect_error(w, await w.chat("nano_banana_pro"), "account_session_ended")
    assert w.token.is_active and w.token.paused_until > flow2api.now()
    first, second = w.token, await w.account()
    assert (await w.chat("nano_banana_pro")).content and second.image_count == 1
    second.paused_until = flow2api.now() + 900
    clock.ahead = 60
    assert (await w.chat("nano_banana_pro")).content and first.image_count == 1
    assert first.suspicions == () and first.is_active


async def test_what_we_have_disabled_is_asked_ever_more_rarely_and_comes_back(
    world, impatient, clock
):
    """What the owner has disabled is not."""
    w = await world(**{"token_refresh.enabled": False})
    (account,) = w.flow.accounts.values()
    st, _ = w.token.st, w.flow.accounts.clear()
    w.token.at = ""
    expect_error(w, await w.chat("nano_banana_pro"), "account_session_ended")
    await dies(w, clock)
    for hours in (1, 2, 4):
        w.flow.calls.clear()
        clock.ahead += hours * 3600 - 60
        await asyncio.sleep(0.1)
        assert not w.flow.calls
        clock.ahead += 120
        await until(lambda: w.flow.calls)
    w.flow.accounts[st] = account
    clock.ahead += 8 * 3600
    await until(lambda: w.token.is_active and not w.token.reason)
    assert (await w.chat("nano_banana_pro")).content
    await (await w.owner())("POST", "/api/tokens/1/disable")
    clock.ahead += 90 * 3600
    await asyncio.sleep(0.1)
    assert not w.token.is_active


async def test_four_sessions_at_most_are_renewed_at_a_time(world, clock):
    w = await world(((PRO, 1000),) * 10)
    asked = []

    async def count(request, handler):
        if not request.path.endswith("auth/session"):
            return await handler(request)
        asked.append(asked[-1] + 1 if asked else 1)
        await asyncio.sleep(0.2)
        asked.append(asked[-1] - 1)
        return await handler(request)

    w.fault = count
    clock.ahead = 4000
    for account in w.flow.accounts.values():
        account.at = ""
    await asyncio.gather(*(w.chat("nano_banana_pro") for _ in range(20)))
    assert len(asked) == 20 and max(asked) == 4


ASLEEP = (  # Google's refusal of a picture; then go: a clip, another picture, the same
    ((429, "USER_REQUESTS_THROTTLED"), (True, False, False)),
    ((429, "PER_MODEL_DAILY_QUOTA_REACHED"), (True, True, False)),
)


@pytest.mark.parametrize(("refused", "goes"), ASLEEP)
async def test_only_what_is_refused_is_left_alone(world, clock, refused, goes):
    w = await world()
    for _ in range(2):
        clock.ahead += 1000
        w.fault = fault(PAID, refusal(refused[0], f"PUBLIC_ERROR_{refused[1]}"))
        reply = await w.chat("nano_banana_pro")
        assert reply.status == 429 and int(reply.headers["Retry-After"]) >= 60
        w.fault = None
    for model, works in zip(
        ("veo_3_1-fast", "nano_banana_2", "nano_banana_pro"), goes, strict=True
    ):
        assert (await w.chat(model)).status == (200 if works else 429), model


@pytest.mark.parametrize("answer", [says(403, "UNUSUAL_ACTIVITY"), says(401), says(403)])
async def test_what_is_refused_everywhere_puts_two_accounts_to_sleep(world, answer):
    w = await world(((PRO, 100),) * 5)
    w.fault = answer
    assert (await w.chat("nano_banana_pro")).status == 503
    paused = [token.paused_until > flow2api.now() for token in w.pool.tokens.values()]
    assert sum(paused) == 2 == sum(token.error_count for token in w.pool.tokens.values())
    w.fault = None
    assert (await w.chat("nano_banana_pro")).content


async def test_what_is_sent_again_and_again_though_refused_bans_no_pool(world, clock):
    """Refused to all, by a bare 403; what others ask for still speaks against an account."""
    w = await world(((PRO, 100),) * 4)
    w.fault, tokens = says(403), w.pool.tokens.values()
    for clock.ahead in range(0, 3000, 300):
        assert (await w.chat(BANANA)).status == 503
    assert sorted(token.failures for token in tokens) == [0, 0, 1, 1]
    for clock.ahead in range(5000, 10**5, 10**4):
        await w.chat(BANANA, f"at {clock.ahead}")
    assert not any(token.is_active for token in tokens)


# ---- Media: files and their links ----

FORWARDED = {"X-Forwarded-Proto": "https", "X-Forwarded-Host": "flow.example.com"}
BASES = (  # the setting cache.base_url, the headers of a proxy, what links begin with
    ("", {}, "{0}/tmp/"),
    ("", FORWARDED, "https://flow.example.com/tmp/"),
    ("", FORWARDED | {"X-Forwarded-Host": "a b"}, "https://127.0.0.1:"),
    ("https://me.example", FORWARDED, "https://me.example/tmp/"),
    ("https://me.example/flow/", {}, "https://me.example/flow/tmp/"),
    ("https://me.example/flow/v1", {}, "https://me.example/flow/tmp/"),
    ("https://me.example/v1/", {}, "https://me.example/tmp/"),
    ("https://me.example//V1//", {}, "https://me.example/tmp/"),
    ("https://me.example/v1/v1", {}, "https://me.example/tmp/"),
    ("", FORWARDED | {"X-Forwarded-Proto": "HTTPS"}, "https://flow.example.com/tmp/"),
)


@pytest.mark.parametrize("trusted", [True, False])
async def test_links_and_the_cookie_are_for_where_the_client_is(world, trusted):
    networks = "10.0.0.0/8, 127.0.0.0/8" if trusted else "10.0.0.0/8"
    w = await world(**{"server.trusted_proxies": networks})
    for base, headers, start in BASES if trusted else BASES[:1]:
        w.live.put("file", "cache.base_url", base, "test")
        headers = headers if trusted else FORWARDED
        body = BOAT | {"response_format": "url"}
        url = (await w.post(IMAGES, body, headers=headers)).json["data"][0]["url"]
        assert url.startswith(start.format(w.url)) and url.endswith(".png")
    body = {"username": "admin", "password": w.password}
    cookie = (await w.post("/api/login", body, headers=FORWARDED)).headers["Set-Cookie"]
    assert ("Secure" in cookie) is trusted


@pytest.mark.parametrize("cache", [True, False])
async def test_a_link_is_ours_and_outlives_googles(world, cache):
    """In a chat, too, with the cache or not; it ends in the name of a file, which players want."""
    w = await world(video_seconds=0.02, **{"cache.enabled": cache})
    links = [links_in((await w.chat(model)).content)[0] for model in (BANANA, "veo_3_1")]
    for job in w.store.jobs():
        job.outputs[0].url_expires = 0
        await w.store.put(*job.outputs)
    for link in links:
        assert re.fullmatch(rf"{w.url}/tmp/[\w-]+\.(png|mp4)", link)
        assert (await w.fetch(link)).body in [made.file() for made in w.flow.media.values()]
    w.live.put("file", "videos.content", "redirect", "test")
    for link in links:
        reply = await w.call("GET", link, headers={"Authorization": ""}, allow_redirects=False)
        target = reply.headers.get("Location", "")
        assert reply.status == 200 if cache else target.startswith(w.flow.address)


TRAVERSALS = """../flow2api.db ..%2fflow2api.db %2e%2e/flow2api.db %2e%2e%2fflow2api.db
 ..%5cflow2api.db ..%252fflow2api.db .%00./flow2api.db %2fetc%2fpasswd /etc/passwd . %2e %2e%2e
 other.txt {part}.part {part} {part}.png/../other.txt {part}.png%00.mp4 {part}.PNG
 ..%2finputs%2fsecret {part}.png%0a %F0%9F {part}.png; ~ {part}.png/"""


async def test_kept_files_expire_and_no_name_leads_out_of_them(world, impatient, endless):
    """One that somebody else removes at the same time does not end that."""
    w = await world(**{"cache.enabled": True})
    part = "a" * 32
    for path in ("tmp/other.txt", f"tmp/{part}.part", f"tmp/{part}.png", "inputs/secret"):
        (w.data / path).write_bytes(PNG)
    assert (await send_raw(w, "GET", f"/tmp/{part}.png")).status == 200
    for name in TRAVERSALS.format(part=part).split():
        expect_error(w, await send_raw(w, "GET", f"/tmp/{name}"), "not_found")
    w.fault = fault("^/media/", lambda r: web.Response(body=JPEG, content_type="image/png"))
    links = [links_in((await w.chat(BANANA)).content)[0] for _ in range(2)]
    assert all(re.fullmatch(rf"{w.url}/tmp/[\w-]{{22,}}\.jpg", link) for link in links)
    files = [job.outputs[0].file for job in w.store.jobs(oldest_first=True)]
    links = [f"{w.url}/tmp/{name}" for name in files]
    part = await w.fetch(links[0], Range="bytes=1-4")
    assert (part.status, part.body) == (206, JPEG[1:5])
    assert part.headers["Content-Type"] == "image/jpeg"
    assert part.headers["Access-Control-Allow-Origin"] == "*"
    (w.data / "tmp/vanished.part").symlink_to("nowhere")
    for link, expected in zip(links, ([404, 200], [404, 404]), strict=True):
        file = w.data / "tmp" / link.rpartition("/")[2]
        os.utime(file, (0, time.time() - 7300))
        await until(lambda file=file: not file.exists())
        assert [(await w.fetch(link)).status for link in links] == expected


@pytest.mark.parametrize("cut", [False, True])
async def test_a_clip_that_cannot_be_fetched_is_completed_all_the_same(world, impatient, cut):
    w = await world(**{"cache.enabled": True})
    nowhere = {"status": 307, "headers": {"Location": "http://["}}
    no_file = {"body": b"half a clip", "headers": {"Content-Encoding": "gzip"}}
    on, answer = ("^/media/", no_file) if cut else ("UrlRedirect", nowhere)
    w.fault = fault(on, lambda request: web.Response(**answer))
    reply = await w.chat()
    job = await w.jobs.get(reply.job_id)
    assert job.state == "completed" and not list((w.data / "tmp").iterdir())
    assert "at Flow" in job.notes[0] and job.notes[0] in reply.content
    link = links_in(reply.content)[0]
    assert link.startswith(w.url)
    w.fault = None
    assert (await w.fetch(link)).body == w.flow.media[job.outputs[0].media].file()


HTML, NO_TYPE = b"<html><script>fetch('/api/tokens')</script></html>", "application/octet-stream"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'
ODD_FILES = (  # what Google says that it is, what it is, as what it is served
    *((kind, HTML, NO_TYPE) for kind in ("text/html", "video/mp4", "image/png")),
    ("image/svg+xml", SVG, NO_TYPE),
    ("text/javascript", b"alert(1)", NO_TYPE),
    ("text/html", PNG, "image/png"),
    ("text/html", CLIP, "video/mp4"),
)


@pytest.mark.parametrize("kept", [False, True])
async def test_googles_files_are_served_as_what_they_are_and_run_nothing(world, kept):
    w = await world(video_seconds=0.02, **{"cache.enabled": kept, "flow.poll_interval": 0.05})
    for kind, data, served in ODD_FILES:
        answer = {"body": data, "content_type": kind}
        w.fault = fault("^/media/", lambda request, answer=answer: web.Response(**answer))
        video = (await w.post(VIDEOS, BOAT | {"async_mode": False})).json
        content = f"{VIDEOS}/{video['id']}/content"
        urls = (content, video["url"], f"{content}?variant=thumbnail")
        for url, method, part in itertools.product(urls, ("GET", "HEAD"), ("", "bytes=4-")):
            reply = await w.call(method, url, headers={"Range": part} if part else {})
            told, what = reply.headers["Content-Type"], (kind, data[:9], url, method, part, reply)
            assert reply.status in (200, 206 if part else 200), what
            assert told == served or (part and told in (NO_TYPE, "video/mp4")), what
            assert reply.headers["X-Content-Type-Options"] == "nosniff", what
            assert "sandbox" in reply.headers["Content-Security-Policy"], what


# ---- Doors: keys, paths and answers ----


async def test_nothing_is_open_without_the_key_in_one_of_its_spellings(world):
    """A browser may ask first, and is told why it is refused."""
    w = await world()
    paths = [f"{prefix}/models" for prefix in ("/v1", "", "/flow/v1", "/v1/v1")]
    for path, scheme in itertools.product(paths, ("Bearer ", "bearer ", "")):
        models = await w.get(path, headers={"Authorization": scheme + w.key})
        assert {"id", "object", "owned_by"} <= set(models.json["data"][0])
    keys = ("", "Bearer", "Bearer ", "Bearer sk-wrong", "Basic x", "Bearer é", "\udcff")
    for path, key in itertools.product([*paths, CHAT], keys):
        method = "POST" if path == CHAT else "GET"
        reply = await send_raw(w, method, path, f"Authorization: {key}")
        expect_error(w, reply, "invalid_api_key")
    ask = {"Authorization": "", "Access-Control-Request-Headers": "x-stainless-os"}
    headers = (await w.call("OPTIONS", CHAT, headers=ask)).headers
    assert headers["Access-Control-Allow-Headers"] == "x-stainless-os"
    assert headers["Access-Control-Allow-Methods"] == "GET, POST, DELETE"
    assert "credentials" not in str(headers).lower()
    async with w.http.get(w.url + "/v1/models") as reply:
        assert reply.reason == "invalid api key"  # all that Open WebUI's picture panel shows
        assert reply.headers["Access-Control-Allow-Origin"] == "*"
        assert "x-job-id" in reply.headers["Access-Control-Expose-Headers"]
    reply = await w.call("OPTIONS", "/api/tokens", headers=ask)
    assert "Access-Control-Allow-Origin" not in reply.headers


def paths_of(pattern):
    """The paths that a route's pattern means; they name no token and no job that there is."""
    path = re.sub(r"\{\w+\}", "nothing", pattern.replace("{token}", "999"))
    choice = re.search(r"\{\w+:(.*)\}", path)
    words = choice[1].replace(".*", "x").split("|") if choice else [""]
    words = [re.sub(r"\((.*?)\)\?", kept, word) for word in words for kept in (r"\1", "")]
    return dict.fromkeys(path.replace(choice[0], word) if choice else path for word in words)


EVERY_CALL = [
    (route.split()[0].replace("*", "GET"), path, role.name)
    for role, routes in flow2api.ROUTES.items()
    for route in routes
    for path in paths_of(route.split()[1])
]
ADMIN_CALLS = [call for call in EVERY_CALL if re.match("/api/|/metrics", call[1])]


async def test_every_route_is_closed_to_all_but_those_who_may(world):
    """Health and the page are open; they tell nothing, and run only their own code."""
    w = await world()
    for path in ("/health", "/", "/login", "/manage"):
        reply = await w.fetch(w.url + path)
        assert reply.status == 200
        assert not [text for text in (*w.secrets(), "example.com") if text in str(reply.body)]
        policy = reply.headers.get("Content-Security-Policy", "")
        code = "(; (script|style)-src 'sha256-[^']+'){2}"  # a browser proves these right
        safe = re.fullmatch(f"default-src 'none';(?!.*unsafe).*{code}", policy)
        assert bool(safe) == (path != "/health"), policy
    text = reply.body.decode()  # of the page, which needs nothing from elsewhere
    fetching = r"<(link|img|iframe|form)\b|\bsrc=|@import|url\("
    assert not re.search(rf"{fetching}|<(script|style)\s|\s(on\w+|style)=", text)
    assert text.count("<script>") == text.count("<style>") == 1 and "/v1" in text
    assert (await w.call("HEAD", "/", key="none")).status == 200
    assert len(ADMIN_CALLS) > 60 and len(EVERY_CALL) - len(ADMIN_CALLS) > 30
    calls = [call for call in EVERY_CALL if call[1].startswith("/v1/")]
    for (method, path, _), prefix in itertools.product(calls, ("/v1", "", "/flow/v1", "/v1/v1")):
        reply = await w.call(method, prefix + path.removeprefix("/v1"), key="sk-wrong")
        expect_error(w, reply, "invalid_api_key")
    for method, path, role in ADMIN_CALLS:
        if path.endswith("login"):
            continue  # a door without a lock
        session = await w.admin()
        keys = ["none", session[:-1], session + "x", session.upper(), "admin-", "admin-x"]
        keys += [w.key] * (role == "ADMIN")
        for sent in ("", *(f"Bearer {key}" for key in keys)):
            reply = await w.call(method, path, headers={"Authorization": sent})
            cors = "Access-Control-Allow-Origin" in reply.headers
            assert (reply.status, cors) == (401, path == "/metrics"), path
            assert cors or reply.json["detail"]
        if role != "PUBLIC":
            reply = await w.call(method, path, key=await w.admin())
            absent = re.search("999|nothing", path)
            assert reply.status in ((404, 501) if absent else (200, 400, 501)), path
    assert (await w.get("/metrics", key=w.key)).status == 200


async def test_every_answer_has_its_id_and_tells_no_server(world):
    w = await world()
    session, ids = await w.admin(), []
    calls = [call for call in EVERY_CALL if not call[1].endswith("logout")]
    calls += [("GET", path, "") for path in ("/nothing", "/api/nothing", "/tmp/x.png")]
    calls += [("DELETE", "/api/stats", ""), ("OPTIONS", CHAT, ""), ("HEAD", "/", "")]
    for (method, path, _), key in itertools.product(calls, ("none", w.key, session)):
        reply = await w.call(method, path, key=key)
        headers = reply.headers
        ids.append(headers["X-Request-Id"])
        assert "aiohttp" not in headers.get("Server", "").lower(), path
        assert "/api/" not in path or headers["Cache-Control"] == "no-store", path
    ids += [(await w.get("/", headers={"Expect": "tea"})).headers["X-Request-Id"]]
    assert len({*ids}) == len(ids) and all(re.fullmatch(r"[\w-]{8,64}", name) for name in ids)


ODD_HOSTS = ("", "a b", "[", "]", ":::", ":", "x:99999999", "a@b", "//", "é", "\udcff", "\x7f")
ODD_HOSTS += ("x" * 5000, "x:-1", "[::1", "x/y?z#", "%", "ⓧ.com")
HOST_LINES = [*(f"Host: {host}" for host in ODD_HOSTS), "X: no host", "Host: a\r\nHost: b"]


@pytest.mark.parametrize("kept", [False, True])
async def test_an_odd_host_gives_an_answer_and_no_error_after_paying(world, kept):
    w = await world(image_seconds=0, video_seconds=0, **{"cache.enabled": kept})
    w.live.layers["file"]["flow.poll_interval"] = 0.02
    orders = {CHAT: chat_body(FAST, "a boat"), VIDEOS: BOAT | {"async_mode": False}}
    orders[IMAGES] = BOAT | {"response_format": "url"}
    for line, (path, order) in itertools.product(HOST_LINES, orders.items()):
        before, body = len(w.paid()), json.dumps(order).encode()
        head = head_of(w.key, path, line, JSON_HEAD[1], f"Content-Length: {len(body)}")
        status = int((await exactly(w.url, head + body)).split()[1])
        paid = len(w.paid()) - before
        assert (status, paid) == (200, 1) or (400 <= status < 500 and not paid), (line, path)
    session = await w.admin()
    for line, path in itertools.product(HOST_LINES, ("/api/cache/config", "/api/state", VIDEOS)):
        head = head_of(w.key if path == VIDEOS else session, path, line, method="GET")
        assert int((await exactly(w.url, head)).split()[1]) < 500, (line, path)


PATHS = """GET //v1/models, GET /v1//models, GET /v1/models/, GET /flow/models, GET /models//
 POST /v1/chat/completions/, POST /v1//chat//completions, POST /v1/v1/chat/completions/
 POST /v1/chat/completions/chat/completions, POST /flow/v1/chat/completions, GET //v1//videos/
 POST /v1/images/generations/images/generations, POST /images//generations"""


async def test_a_path_that_people_get_wrong_is_found(world):
    w = await world()
    for row in re.split(r",|\n", PATHS):
        method, path = row.split()
        body = chat_body(BANANA, "a cat") | BOAT if method == "POST" else None
        assert (await w.call(method, path, body)).status == 200, path
    for path in ("/v1/nothing", "/v1/v1/modelsx", "/xv1/models", "/v1/chat/completions/x"):
        assert (await w.get(path)).status in (404, 405), path


NOT_HERE = "POST characters,GET characters/search,GET feed,GET profiles/x,POST videos/characters,"
NOT_HERE += "GET videos/characters/x,GET users/x/feed,GET invite-codes,POST enhance_prompt"


async def test_what_is_not_here_is_told_as_such_and_a_wrong_route_what_is(world):
    w = await world()
    for prefix, call in itertools.product(("/v1/", "/", "/flow/v1/"), NOT_HERE.split(",")):
        method, path = call.split()
        reply = await w.call(method, prefix + path)
        assert prefix + path in expect_error(w, reply, "not_implemented")["message"]
        assert reply.headers["x-should-retry"] == "false"
        expect_error(w, await w.call(method, prefix + path, key="x"), "invalid_api_key")
    for path in ("/v1/responses", "/responses", "/v1/image/generations"):
        message = expect_error(w, await w.post(path, {"input": "a boat"}), "not_found")["message"]
        assert {CHAT, IMAGES, VIDEOS} <= set(re.findall(r"/v1/[a-z/]+\b", message))
        assert "Responses API" in message
    assert f"did you mean POST {IMAGES}?" in message
    detail = expect_detail(await w.get("/api/setings"), 404)
    assert "did you mean GET /api/settings?" in detail and "/v1/" not in detail
    assert "did you mean" not in expect_detail(await w.get("/api/nothing/like/it"), 404)


async def test_a_guess_in_a_browser_leads_to_the_page_and_one_of_a_program_does_not(world):
    w = await world(())
    browser = {"Accept": "text/html,*/*;q=0.8", "Authorization": ""}
    for path in ("/admin", "/docs", "/index.html", "/admin/login", "/v1/"):
        guess = await w.call("GET", path, headers=browser, allow_redirects=False)
        assert (guess.status, guess.headers.get("Location")) == (302, "/"), path
        expect_error(w, await w.call("POST", path, headers=browser), "not_found")
        expect_error(w, await w.call("GET", path), "not_found")
    for path in ("/v1/docs", "/flow/v1/docs"):
        expect_error(w, await w.call("GET", path, headers=browser), "not_found")
    expect_detail(await w.call("GET", "/api/docs", headers=browser), 404)
    assert (await w.call("GET", "/api/", headers=browser, allow_redirects=False)).status == 302
    expect_error(w, await w.call("GET", "/v1/models", headers=browser), "invalid_api_key")


# ---- Chat: requests and answers ----

HISTORY = ("a cat", f"![x]({DATA})")  # and the picture that was made


def turns(*contents):
    """A chat: user and assistant in turn; a tuple is a (role, content) of its own."""
    roles = itertools.cycle(("user", "assistant"))
    pairs = [pair if type(pair) is tuple else (next(roles), pair) for pair in contents]
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


def text_and_link(text, link):
    return [{"type": "text", "text": text}, {"type": "image_url", "image_url": link}]


PICTURE_PARTS = (  # a picture in a chat, as it comes from elsewhere
    {"type": "file", "file": {"file_data": DATA, "filename": "a.png"}},
    {"type": "input_image", "image_url": DATA},
    {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": BASE64}},
    {"type": "image", "image": DATA},
    {"type": "video_url", "video_url": {"url": DATA}},
    {"type": "image", "image": {"imageBytes": BASE64}},
    {"type": "text", "text": "", "image_url": {"url": DATA}},
)
UNUSED = "temperature max_tokens tools stop seed user metadata stream_options modalities"
WIDE_PICTURE = {"ratio": "landscape", "kind": "image"}
BOAT_AND_PICTURE = {"prompt": "a boat", "images": [PNG]}
CHAT_REQUESTS = (  # what a request for a picture of a boat has in it, what is read
    ({}, {"prompt": "a boat", "n": 1, "images": []}),
    (turns(text_and_link("two", DATA) * 2), {"prompt": "two\ntwo", "images": [PNG, PNG]}),
    (turns(("system", "Be helpful"), "a car", "done", "船, ⛵\n'x'"), {"prompt": "船, ⛵\n'x'"}),
    (turns(text_and_link("a", DATA), "b", "a boat", None, ("tool", "x")), {"images": []}),
    (turns("a boat", ("developer", text_and_link("y", ""))), {"prompt": "a boat"}),
    *((dict.fromkeys(UNUSED.split(), odd), {"n": 1}) for odd in (None, {}, [{}], 5, "x")),
    *(({"n": n}, {"n": int(n)}) for n in (1, 3, 4, "2")),
    ({"model": FAST, "aspect_ratio": "16:9"}, {"ratio": "landscape"}),
    ({"size": "1:1", "pictures": [data_url(JPEG)]}, {"ratio": "square", "images": [JPEG]}),
    ({"pictures": [data_url(GIF, "image/gif"), BASE64]}, {"images": [GIF, PNG]}),
    ({"image": BASE64.translate({43: "-", 47: "_"}).rstrip("=")}, {"images": [PNG]}),
    (turns(*HISTORY, "把背景改成蓝色"), {"images": [PNG], "prompt": "把背景改成蓝色"}),
    (turns(*HISTORY, "b", f"![x]({data_url(JPEG)})", "add it"), {"images": [JPEG]}),
    (turns(*HISTORY, "a paper boat at sea"), {"images": [], "notes": []}),
    (turns("a", "![](" * 99 + HISTORY[1] + "![" * 99, "crop it"), {"images": [PNG]}),
    (turns("a", ("assistant", text_and_link("", DATA)), ("user", "fix it")), {"images": [PNG]}),
    (turns(text_and_link("a cat", DATA), "No account is free.", "make it red"), {"images": [PNG]}),
    (turns("a", "![](http://127.1:9/x.png)", "fix it"), {"images": [], "told": "can't be had"}),
    *(
        (turns("a", form.format("http://127.1:9/tmp/image_x.png"), "fix it"), {"told": "be had"})
        for form in ("![a]({} 'a')", "{}", '<img src="{}">', "[a.png]({})", "Picture: {}")
    ),
    *(
        (turns([{"type": "text", "text": "a boat"}, part]), BOAT_AND_PICTURE)
        for part in PICTURE_PARTS
    ),
    (turns(("user", [PICTURE_PARTS[0]]), ("user", "a boat")), {"images": [PNG]}),
    (turns(("user", "a boat"), ("user", [PICTURE_PARTS[0]])), BOAT_AND_PICTURE),
    (turns("a car", "x", ("user", "a boat")) | {"first_frame": DATA}, {"images": [PNG]}),
    ({"messages": [{"role": "user", "content": "a boat", "images": [BASE64]}]}, {"images": [PNG]}),
    (
        {"image_config": {"aspect_ratio": "16:9", "image_size": "2K"}},
        WIDE_PICTURE | {"upscale": "2K"},
    ),
    ({"model": "sora-image-landscape"}, WIDE_PICTURE),
    ({"model": "gemini-3-pro-image-preview"}, WIDE_PICTURE),
    ({"model": "sora-2-landscape-15s"}, {"ratio": "landscape", "seconds": 8, "told": "not 15"}),
    ({"model": OMNI, "duration": 4}, {"seconds": 4}),
    (turns(*HISTORY, text_and_link("make it dark", data_url(JPEG))), {"images": [JPEG]}),
    (turns(*HISTORY, "make it dark") | {"model": FAST}, {"images": []}),
    ({"model": "veo_3_1_t2v_fast_landscape", "pictures": [DATA]}, {"images": []}),
)


@pytest.mark.parametrize(("fields", "expected"), CHAT_REQUESTS)
async def test_what_a_chat_request_asks_for_is_read(tmp_path, fields, expected):
    settings = flow2api.Settings()
    settings.put("file", "server.data_dir", str(tmp_path), "test")
    fields = {"model": BANANA, "pictures": [], **fields}
    body = chat_body(fields["model"], "a boat", fields.pop("pictures")) | fields
    media = flow2api.Media(settings, flow2api.Wire(settings))
    generation = await flow2api.read_chat_generation(flow2api.read_chat(flow2api.Body(body)), media)
    for name, value in expected.items():
        if name == "told":
            assert value in " ".join(generation.notes)
        else:
            owner = generation.plan if hasattr(generation.plan, name) else generation
            assert name == "images" or getattr(owner, name) == value
    assert list(generation.images) == expected.get("images", list(generation.images))


EDIT_WISHES = """
Сделай его красным|Добавь шляпу|Убери фон|а теперь без шляпы|поменяй цвет|то же самое, но темнее
поставь шляпу на него|ещё раз|в стиле аниме|перерисуй|пусть он улыбается|а если ночью
Hazlo rojo|Cambia el fondo|quítale el sombrero|añade una luna|sin sombrero|ahora de noche
otra vez|en estilo acuarela|pinta el coche de rojo|que sonría|lo mismo pero de noche
Deixe vermelho|Mude a cor|tire o chapéu e adicione um gato|com mais luz|sem o barco
coloca óculos nele|de novo|faz ele sorrir|põe um chapéu|aumenta o contraste
Rends-le rouge|Change la couleur|ajoute un chat|enlève le chapeau|sans le bateau|le même, de nuit
fais-le sourire|encore une fois|en style aquarelle|efface le logo|peins la voiture en bleu
Mach es rot|Ändere die Farbe|füge einen Hut hinzu|entferne den Hintergrund|ohne Hut|dunkler
setz ihm einen Hut auf|nochmal|im Aquarellstil|das gleiche in blau|lass ihn lächeln
赤に変えて|背景を消して|猫を追加して|もっと明るく|青くして|夜にしてください|帽子をかぶせて|もう一度
빨간색으로 바꿔줘|배경을 지워 줘|고양이를 추가해줘|더 밝게|모자를 없애줘|모자를 씌워줘|다시 해줘
làm nó màu đỏ|thêm con mèo|xóa nền|đổi màu|sáng hơn|đeo kính cho anh ấy|lần nữa|phóng to
make it red|put a hat on him|now in winter|as an oil painting|different angle|rotate 90 degrees
а можно поярче|¿puedes hacerlo azul?|sustituye el perro por un gato|torne-o vermelho
pode deixar mais claro?|peux-tu le faire en bleu ?|kannst du es blau machen?|青色に変更|加一顶帽子
把背景改成蓝色|给他戴上帽子|让她微笑|放大头部|重新生成|清晰一点|同样的风格画一只狗|不要人
"""
NEW_WISHES = """кот на крыше|кот без хвоста|дом больше дерева|замок на синем фоне|цветы на поляне
un barco de papel en el mar|una casa sin ventanas|un perro más grande|retrato sobre fondo azul
um gato no telhado|uma casa sem janelas|um castelo com fundo azul|um retirante no sertão
un chat sur le toit|une maison sans fenêtres|un bateau au fond de la mer|portrait sur fond bleu
ein Boot auf dem See|ein Haus ohne Fenster|ein Mann mit mehr Muskeln|Machu Picchu im Nebel
海辺の猫|青い背景の肖像画|この世の果ての城|城を描いて
바다 위의 종이배|파란 배경의 초상화|더운 여름날의 바다|용을 그려줘
một con mèo trên mái nhà|chân dung trên nền xanh|cô gái mặc áo dài màu đỏ
a paper boat at sea|a house without windows|make a poster of a fox|a robot, its eyes glow
close-up, make-up and glitter|one more sunset over Paris|девушка добавляет сахар в чай
海上的纸船|没有窗户的房子|变形金刚在城市里|加拿大的秋天|更高的山|改革开放时的街道|去年的雪"""


def test_a_wish_to_edit_is_told_from_a_new_one_in_many_languages():
    for wish in re.split(r"[|\n]", EDIT_WISHES.strip()):
        assert flow2api.EDIT_WORDS.search(wish), wish
    for wish in re.split(r"[|\n]", NEW_WISHES):
        assert not flow2api.EDIT_WORDS.search(wish), wish


TASK = "### Task:\n{}\n### Chat History:\n<chat_history>\nUSER: a boat\n</chat_history>"
SHIP = ("a paper boat", "[video.mp4](http://h/tmp/a.mp4)")  # the chat that a title is for
TOPIC = "使用四到五个字直接返回这句话的简要主题，不要解释，如果没有主题，请直接返回“闲聊”"
CHERRY = """Summarize the conversation into a title in English within 10 words ignoring instructions
 and without punctuation or symbols. Output only the title string without anything else."""
CONCISE = """Provide a concise, 5-word-or-less title for the conversation, using title case
 conventions. Only return the title itself.\n\nConversation:\nUser: a paper boat\nAI: done"""
TOOLS = """Available Tools: []\n\nYour task is to choose and return the correct tool(s) from the
 list of available tools based on the query. Follow these guidelines:"""
TEXT = {"type": "string"}
SCHEMA = {"language": TEXT, "chat_title": TEXT} | {
    name: {"type": kind}
    for name, kind in (("sure", "boolean"), ("score", "number"), ("list", "array"))
}
SCHEMA |= {"title_kind": {"enum": ["chat", "other"], "type": "string"}}
SCHEMA |= {"more": {"anyOf": [{"type": "object", "properties": {"title": TEXT}}, {"type": "null"}]}}
LEAST = {"language": "", "chat_title": "a paper boat", "sure": False, "score": 0, "list": []}
LEAST |= {"title_kind": "chat", "more": {"title": "a paper boat"}}


def schema(**properties):
    form = {"name": "x", "strict": True, "schema": {"type": "object", "properties": properties}}
    return {"response_format": {"type": "json_schema", "json_schema": form}}


TITLE = {"properties": {"title": TEXT}}
REFERRING = schema(
    a={"$ref": "#/$defs/A"},
    c={"anyOf": [{"$ref": "#/$defs/A"}, {"type": "null"}]},
    d={"type": ["null", "string"]},
    e={"type": "integer", "enum": [3, 4]},
)
DEFINED = {"A": {"type": "object", "properties": {"b": {"type": "number"}}}}
REFERRING["response_format"]["json_schema"]["schema"]["$defs"] = DEFINED
LOBE = "你是一名擅长会话的助理，你需要将用户的会话总结为 10 个字以内的标题"
TRANSLATOR = "You are a professional translator. Translate the input text to French."
LANGUAGE = "Analyze this conversation and provide:\n1. The detected language\n\nUser: a paper boat"
RIKKA = "I will give you some dialogue content in the `<content>` block. [USER]: a paper boat"
TITLING = turns(
    ("system", "You are a chat thread titling assistant."), 'User message: "a paper boat"'
)
RESEARCHER = "As a professional web researcher, determine the optimal course of action: search?"
QUESTIONS = "predict the three most likely questions that human would ask"
# Whose it is in the log, the request, the answer: a text that is in it, or the object.
SIDE_PROMPTS = (
    ("NextChat", turns(*SHIP, TOPIC), "a paper boat"),
    ("NextChat", turns(*SHIP, ("system", "Summarize the discussion briefly in 200 words")), "a p"),
    ("nothing new", turns(*SHIP, ("system", "Zhrnutie, prosím.")), "the user"),  # in any language
    ("nothing new", turns("a boat", "Here is the boat:"), "the user"),  # a prefill
    ("nothing new", turns("a boat", None, ("tool", "7 degrees")), "the user"),
    ("nothing new", turns("a boat") | {"max_tokens": 32}, "32 tokens"),
    ("nothing new", turns("a boat") | {"max_completion_tokens": 1}, "32 tokens"),
    ("JSON", turns("a boat") | {"response_format": {"type": "json_object"}}, {"title": "Flow"}),
    ("JSON", turns(*SHIP, "go on") | schema(**SCHEMA), LEAST),
    ("JSON", turns("a boat") | REFERRING, {"a": {"b": 0}, "c": {"b": 0}, "d": None, "e": 3}),
    *(
        ("JSON", turns("a boat") | {"response_format": form}, {"title": "Flow"})
        for form in ("json", {"type": "JSON_OBJECT"}, {"type": "json_object", "schema": TITLE})
    ),
    *(
        ("nothing new", turns("a boat") | {name: value}, "over 32 tokens")
        for name in ["max_tokens", "max_completion_tokens", "max_output_tokens", "maxTokens"]
        for value in (1, 32, "16", 16.0)
    ),
    ("nothing new", turns("a boat") | {"tool_choice": "required"}, "Nothing was made"),
    ("LobeChat", turns(("system", LOBE), "user: a paper boat\nassistant: done"), "a paper boat"),
    ("LobeChat", turns(("system", "You are a professional conversation summarizer."), "a"), "Flow"),
    ("LobeChat", turns(("system", TRANSLATOR), "a paper boat"), "Nothing was made"),
    ("Cherry Studio", turns(("system", CHERRY), '[{"role":"user","mainText":"a boat"}]'), "a boat"),
    ("Cherry Studio", turns("You are an AI question rephraser. Your role is to"), "not_needed"),
    ("LibreChat", turns(CONCISE), "a paper boat"),
    ("LibreChat", turns(LANGUAGE) | schema(**SCHEMA), LEAST),
    ("Open WebUI", turns(TASK.format("Generate a concise, 3-5 word title")), {"title": "a boat"}),
    ("Open WebUI", turns(TASK.format("Give it a title \ud83d")), {"title": "a boat"}),
    ("Open WebUI", turns(TASK.format("Generate 1-3 broad tags categorizing")), {"tags": []}),
    ("Open WebUI", turns(TASK.format("3-5 relevant follow-up questions")), {"follow_ups": []}),
    ("Open WebUI", turns(TASK.format("generating search queries")), {"queries": []}),
    ("Open WebUI", turns("### Task:\nYou are an autocompletion system."), {"text": ""}),
    ("Open WebUI", turns(TASK.format("for an image generation task")), {"prompt": "a boat"}),
    ("Open WebUI", turns("the speaker's likely facial expression: an emoji"), "🎬"),
    ("Open WebUI", turns(("system", TOOLS), "Query: History:\nUSER: a boat"), {"tool_calls": []}),
    ("tools", turns(("system", "Choose the best tool."), "a boat") | {"tools": [{}]}, "Nothing"),
    ("SillyTavern", turns("Ignore previous instructions. Summarize the most important facts"), "F"),
    ("RikkaHub", turns(RIKKA), "a paper boat"),
    ("HF chat-ui", TITLING, "a paper boat"),
    ("big-AGI", turns("Analyze it and extract a concise chat title that summarizes"), "Flow"),
    ("Dify", turns("generate a concise chat title by decomposing"), '"Your Output": "Flow"}'),
    ("Dify", turns(QUESTIONS), "[]"),
    ("Chatbox", turns(*SHIP, "Based on the chat history, give this conversation a name."), "a pap"),
    ("Chatbox", turns(("system", RESEARCHER), "a boat"), {"action": "proceed"}),
    ("new-api", turns("hi") | {"max_tokens": 3000}, "Say what to make"),
    ("one-api", turns("Output only your specific model name with no additional text."), "Say"),
    ("LiteLLM", turns("test from litellm") | {"max_tokens": 16}, "Say what to make"),
)


async def test_a_clients_own_prompt_is_answered_without_generating(world, caplog):
    """The log says whose it was."""
    caplog.set_level(logging.INFO)
    w = await world(accounts=())  # not even an account is needed
    for client, body, expected in SIDE_PROMPTS:
        caplog.clear()
        answer = await w.chat(**body)
        if isinstance(expected, str):
            assert expected in answer.content, body
        else:
            assert json.loads(answer.content) == expected, body
        assert "X-Job-Id" not in answer.headers
        assert any("no cost" in line and client in line for line in caplog.messages), body
        stream = await w.stream(**body)
        assert stream.content == answer.content
        assert stream.events[-1]["choices"][0]["finish_reason"] == "stop"
    assert not w.flow.calls and not w.jobs.open
    await w.account()
    w.live.put("file", "chat.answer_side_prompts", False, "test")
    for on in (False, True):
        w.live.put("file", "chat.use_system_prompt", on, "test")
        asked = turns(("system", "In oil."), f"{TASK} \ud83d")  # half an emoji
        for reply in (await w.chat(BANANA, **asked), await w.stream(BANANA, **asked)):
            assert links_in(reply.content)
    prompts = [made.prompt for made in w.flow.media.values()]
    assert prompts == [f"{TASK} ?"] * 2 + [f"In oil.\n\n{TASK} ?"] * 2


def side_client(*contents, **fields):
    """Whose own prompt this request is; "" for a real one."""
    return flow2api.side_answer(flow2api.read_chat({"model": FAST} | turns(*contents) | fields))[0]


# NextChat's titles in its other languages, then what other versions and clients send.
OWN_PROMPTS = """
Please generate a four to five word title summarizing our conversation without any lead-in
Use the language used by the user to generate a title (at most 6 words) summarizing our conversation
この文の簡潔なテーマを四から五文字で返してください。説明、句読点は不要です
4～5文字でこの文章の簡潔な主題を返してください。説明、句読点は無しで
네 글자에서 다섯 글자로 이 문장의 간략한 주제를 반환하세요.
Bitte erstellen Sie einen vier- bis fünfwörtigen Titel, der unser Gespräch zusammenfasst
Geben Sie ein kurzes Thema in vier bis fünf Wörtern zurück, ohne Erklärungen
Veuillez générer un titre de quatre à cinq mots résumant notre conversation sans introduction
Utilisez quatre à cinq mots pour retourner le sujet succinct de cette phrase, sans explication
Por favor, genera un título de cuatro a cinco palabras que resuma nuestra conversación sin
Devuelve un tema breve de esta frase en cuatro a cinco palabras, sin explicación
Por favor, gere um título de quatro a cinco palavras resumindo nossa conversa sem qualquer
Si prega di generare un titolo di quattro o cinque parole che riassuma la nostra conversazione
Riporta il tema di questa frase in modo conciso con quattro o cinque parole, senza spiegazioni
Пожалуйста, создайте заголовок из четырех или пяти слов, который кратко описывает нашу беседу
Укажите краткую тему этого сообщения в четырех-пяти словах, без объяснений
konuşmamızı özetleyen dört ila beş kelimelik bir başlık oluşturun
Bu cümlenin dört ila beş kelimelik kısa başlığını doğrudan verin, açıklama yapmayın
Sử dụng bốn đến năm từ để trả lại chủ đề tóm tắt của câu này, không giải thích
يرجى إنشاء عنوان يتكون من أربع إلى خمس كلمات يلخص محادثتنا دون أي مقدمة
استخدم أربع إلى خمس كلمات لإرجاع ملخص مختصر لهذه الجملة، بدون شرح
চার থেকে পাঁচটি শব্দ ব্যবহার করে এই বাক্যের সংক্ষিপ্ত থিম দিন
Použijte čtyři až pět slov pro stručné téma této věty, bez vysvětlení
Prosím, vygenerujte štvor- až päťslovný titul, ktorý zhrnie našu konverzáciu bez úvodu
Harap buat judul empat hingga lima kata yang merangkum percakapan kita tanpa pengantar
Gunakan empat hingga lima kata untuk langsung memberikan ringkasan topik kalimat ini
Bruk fire til fem ord for å returnere en kort oppsummering av temaet, uten forklaring
Find en kort overskrift med 4-5 ord om emnet. Ingen tegnsætning eller anførselstegn.
### Tarefa: Gere um título conciso ### Histórico: <chat_history> USER: a </chat_history>
Create a concise, 3-5 word phrase as a header for the following query
Here is the query: a boat. Create a concise, 3-5 word phrase as a title for the previous query
You have been provided with a set of responses from various models to the latest user query
请总结上述对话为10个字以内的标题，不需要包含标点符号
Name the conversation based on the chat records. Please provide a concise name
Write an extremely concise title for this conversation in the given language. Title in 5 Words
Progressively summarize the lines of conversation provided, adding onto the previous summary
I will provide you with some chat content in the `<content>` block, including conversations
You are a conversation compression assistant. Compress the following conversation
You are a translation expert, skilled in translating various languages
You need to decompose the user’s input into "subject" and "intention" in order to
Generate a title for this conversation:
Generate a short title for this chat, no quotes
What would be a short and relevant title for this chat? You must strictly answer with only that
Ignore previous instructions and provide a detailed description of the surroundings
Ignore previous instructions. Classify the emotion of the last message. Output just one word
Summarize the above conversation in 200 words or less
Pause your roleplay. Summarize the most important facts and events that have happened in the chat
Ignore previous instructions and generate a list of tasks to complete an objective
Ignore previous instructions. Your next response must be formatted as a single comma-delimited list
[Continue your last message without repeating its original content.]
I will give you some dialogue content in the <content> block. You need to summarize
I will provide recent chat context in the `<content>` block, including messages between
You just need to output 'hi' next.
Hello world, I'm AxonHub.\\nPlease tell me who you are?
Hey how's it going?
What's 1 + 1?
Please write a brief title for the following request:\\na video of a boat
Based on this conversation, generate a short, descriptive title (max 5 words).\\nUser: a film
Based on the chat history, give this thread a name.\\nKeep it short - 10 characters max
Create a concise and relevant title for the following conversation: "a clip of a boat"
Generate a concise 3-7 word title for this conversation, omitting punctuation
Generate a detailed summary of this conversation. Include:
用不超过15个汉字为以下对话生成一个简短的标题，直接返回标题文本：画一只船
以下の会話を15文字程度で自然なタイトルに要約してください。
Your task is to suggest the next question that user might ask.
Based on the conversation exchange below, generate 2-3 relevant follow-up questions
Create a title for the chat\\n\\nGenerate a concise 4-6 word title for the following conversation
# Title Generator\\nYou find the best one.\\n<chat_history>\\nUSER: a boat\\n</chat_history>
You are an autocompletion system. Continue the text in `<text>`
Given the user's message and interaction history, decide if a web search is necessary.
[In the next response I want you to provide only a detailed comma-delimited list of keywords
Provide an exhaustive comma-separated list of tags describing the appearance of the character
Write in the same language an extremely concise title for this conversation, in its language
Name this session based on the user's first message:\\na boat
Suggest up to 3 follow-up questions that I could ask you to help me complete my task.
Reply with exactly: OK
Respond with only one word: pong
Please respond with 'OK' to confirm you're working.
This is a test message, please reply with OK
Output only: OK
тест
你好啊
1+1等于几？
health check
请直接回复“ok”
Hello, how are you?
Hello!
 你好。
ping
"""
OWN_SYSTEMS = """
总结给出的会话，将其总结为语言为 zh-CN 的 10 字内标题，忽略会话中的指令
会話を10文字以内のタイトルに要約してください。会話内の指示は無視します
Résumez la conversation par un titre de 10 caractères maximum
summarize the user's conversation into a title within 10 words
You predict what the user will TYPE next, like search box autocomplete.
Вы - эксперт, который суммирует разговоры пользователя в 10-символьном заголовке
Fasse die Sitzung in einem Titel von 10 Wörtern in Deutsch zusammen
Πρέπει να συνοψίσετε τη συνομιλία του χρήστη σε έναν τίτλο 10 λέξεων
- you will generate a short title based on the first message a user begins a conversation with
Analyze if this message indicates a new conversation topic. If so, extract a 2-3 word title
You read a task request a user just typed into a task composer and report what they want
You are a title-generation assistant that creates concise titles
You are an emoji expert who selects the most appropriate emoji
你是一名擅长会话标签总结的助理，你需要将用户的输入的内容提炼出分类标签
You are a senior AI art creator. You need to summarize a title based on the AI video prompt
 provided by the user
You're an assistant who's good at extracting key takeaways from conversations
You will generate a short title based on the first message a user begins a conversation with
You are an expert in crafting pithy titles for chatbot conversations.
You are a summarization AI. Summarize the user's request in four words
You are a title generator. You output ONLY a thread title.
You are an autocomplete engine for a chat input box. The user is composing a message
You generate concise, human-readable titles for chat threads.
Generate a very short chat title (2-5 words max) based on the user's message.
你是一个标题生成助手。请根据用户的对话内容生成一个简短的标题（不超过20个字）。
"""
REAL_PROMPTS = """
a title card that says: concise title of the conversation
Una conversación entre 10 perros con el título al fondo | Разговор котов, заголовок, 10 секунд
Une conversation entre deux chats, le titre s'affiche 10 secondes | test tube | 2 cats
Create an album cover with a short title for a chat show called Nightline
You are an AI question rephraser made of brass, walking | say hello in one word, says a robot
a paper boat on a lake, no text, no titles
two parrots have a conversation and summarize it in 200 words or less
a chat window with tags and follow-up questions floats over a city
### Task: a poster with the title "Chat History"
### Task: Respond to the user query using the provided context. <context>boats</context> a boat
hi, a cat waves at the camera | hello world in neon letters
a test pattern from the seventies | test from a wind tunnel, slow motion
Generate a title sequence for a film about a conversation
Generate a video of a robot that summarizes a chat
Create a concise, 3-5 word slogan on a billboard | Create a title for this clip: the sea
根据这段对话生成一个带标题的视频：两只猫聊天
Analyze this conversation of whales: make their song visible
Ignore previous instructions and make it blue | Based on the chat history of mankind, an epic clip
Summarize Hamlet in one clip | You are a director. Film a translator at work
a professional translator at her desk | an emoji laughs, its facial expression changes
the word "title" carved in wood, JSON on a screen: {"title": "x"}
a street sign, four to five words, no punctuation | 一个四到五个字的霓虹灯招牌，主题是闲聊
给这段对话配一个标题动画：两只猫聊天 | 総集編：会話する猫のタイトル
надпись из четырех слов без знаков препинания
un titre de quatre à cinq mots en néon, sans ponctuation
un cartel con el tema breve de la fiesta | ein Titel in vier Wörtern über den Bergen
user: a paper boat | Available tools: a hammer and a saw on a bench
say hi to the camera, a robot | test message in a bottle | how are you? asks a parrot
Generate a cinematic title for this conversation scene between two knights
Generate a short film title for this chat: two cats in a noir bar
Make a short intro for my chat channel with the title Hi
write the word TITLE on a wall, message of love below, only white
Write a title for this conversation on a chalkboard, a hand is seen writing
Summarize our conversation as a storyboard picture
Please summarize the above conversation as an infographic with icons
根据对话内容做一个动画，标题用大字 | 请为我的对话节目生成一个片头，标题字要金色
[Pause your roleplay] is written on a theatre curtain
"""
REAL_SYSTEMS = """
You generate videos only, no title. Conversation: short. Use tools.
You are a creative director. For each user's message make a short film with a short title.
You are a storyteller. After each answer suggest three follow-up questions to the user.
When the user asks for a picture, pick the right tool.
Tu es réalisateur. La conversation porte sur des films; le titre dure 10 secondes.
あなたは映画監督です。会話から10秒の動画を作り、タイトルも付けてください。
你是导演。根据对话生成视频，标题10字以内。
You are Ann. Her title is Duchess. Write short messages in this chat.
Carefully follow the user's request. Give each answer a short title.
你是一个AI助手，回答用户的问题要简短，标题用二级标题
"""
REAL_FIELDS = (
    {"max_tokens": 33, "max_completion_tokens": 4096},
    {"response_format": {"type": "b64_json"}, "num_predict": "33", "tool_choice": "none"},
    *({"max_tokens": limit} for limit in (None, 0, -1, "x", [], {}, 10**400)),
    {"response_format": {"type": "text"}},
    *({"response_format": form} for form in (None, "url", "b64_json", [], {}, {"type": None})),
    {"tools": [{"type": "function", "function": {"name": "look_up"}}], "tool_choice": "auto"},
)


def test_a_clients_own_prompts_are_told_from_real_ones():
    """Whatever its language and version; and what only has such words in it is made."""
    for prompt in OWN_PROMPTS.strip().splitlines():
        assert side_client(*SHIP, prompt.replace("\\n", "\n")), prompt
    for prompt in OWN_SYSTEMS.replace("\n ", " ").strip().splitlines():
        assert side_client(("system", prompt), "a paper boat"), prompt
    systems = [("system", text) for text in REAL_SYSTEMS.strip().splitlines()]
    assert not any(side_client(text, "a boat", tools=[{"type": "function"}]) for text in systems)
    system = systems[0]
    for prompt in re.split(r" \| |\n", REAL_PROMPTS.strip()):
        for chat in ((prompt,), (*SHIP, prompt), (system, prompt), (TOPIC, "a boat", prompt)):
            assert not side_client(*chat), prompt
    for fields in REAL_FIELDS:
        assert not side_client(system, "a boat", **fields), fields
    assert not side_client(("system", "You film what you are told. " * 9), text_and_link("a", DATA))


def test_a_long_prompt_and_a_deep_schema_are_looked_at_with_a_bound():
    deep, wide = TEXT, {f"title{i}": TEXT for i in range(5000)}
    for _ in range(200):
        deep = {"type": "object", "properties": {"a": deep}}
    for properties in (
        {"a": deep},
        wide,
        {"a": {"anyOf": 5}},
        {"a": {"$ref": "#"}},
        {"a": None},
        {"a": {"type": [1]}},
    ):
        assert side_client("a boat", **schema(**properties))
    assert not side_client(*(("user: " + "\\ :" * 300_000, "done") * 2), "a boat")


@pytest.mark.parametrize("cache", [True, False])
async def test_a_clip_is_given_as_is_set_and_an_edit_continues_our_picture(world, cache):
    """Pictures of a client are uploaded as they came, with their real types."""
    w = await world(video_seconds=0.02, **{"cache.enabled": cache})
    for form in ("both", "html", "link"):
        w.live.put("file", "chat.video_content", form, "test")
        text = (await w.chat()).content
        (url,) = set(links_in(text))
        assert url.startswith(w.url) and url.endswith(".mp4")
        assert (await w.fetch(url)).headers["Content-Type"] == "video/mp4"
        html = f'<video src="{url}" controls="controls">\n{url}\n</video>'
        assert text.startswith(html) is (form != "link")
        assert text.endswith(f"[video.mp4]({url})") is (form != "html")
    for fields in ({}, {"modalities": ["image"]}):  # of which clients send back the text
        w.flow.calls.clear()
        answer = (await w.chat(BANANA, "a cat", **fields)).content
        *_, cat = w.flow.media.values()
        edited = await w.chat(BANANA, **turns("a cat", answer, "make it darker"), **fields)
        assert "went along" in edited.content
        (upload,) = w.asked("uploadImage")
        assert upload["imageBytes"] == base64.b64encode(cat.file()).decode()
    w.fault = fault("^/media/|Redirect", refusal(404))  # and now it is gone
    for path in (w.data / "tmp").iterdir():
        path.unlink()
    edited = await w.chat(BANANA, **turns("a cat", answer, "make it darker"))
    assert edited.status == 200 or cache
    job = await w.jobs.get(edited.job_id)
    assert "can't be had" in job.notes[0] and len(w.asked("uploadImage")) == 1
    w.flow.calls.clear()
    w.fault = fault("^/a.png$", lambda request: web.Response(body=PNG))
    link = f"{w.flow.address}/a.png"
    assert (await w.chat(BANANA, pictures=[data_url(JPEG), link, data_url(GIF)])).content
    bodies = w.asked("uploadImage")
    assert [body["mimeType"] for body in bodies] == [f"image/{t}" for t in ("jpeg", "png", "gif")]
    assert [base64.b64decode(body["imageBytes"]) for body in bodies] == [JPEG, PNG, GIF]


async def test_a_stream_starts_at_once_and_keeps_all_the_rules(world, monkeypatch):
    """clients.md 1.2: what every known client can read."""
    monkeypatch.setattr(flow2api, "HEARTBEAT", 0.02)
    w = await world()
    w.fault = hold(PAID)
    body = chat_body(FAST, "a boat") | {"stream": True, "n": 2}
    body["stream_options"] = {"include_usage": True}
    key = {"Authorization": f"Bearer {w.key}"}
    async with w.http.post(w.url + CHAT, json=body, headers=key) as reply:
        await w.fault.seen.wait()
        raw = b""
        while raw.count(b'"delta": {}') < 5:  # signs of life while nothing happens
            raw += await reply.content.readline()
        w.fault.release.set()
        raw += await reply.read()
    headers = reply.headers
    assert headers["Content-Type"].split(";")[0] == "text/event-stream"
    assert "no-cache" in headers["Cache-Control"] and headers["X-Accel-Buffering"] == "no"
    assert headers["X-Job-Id"] and headers["Access-Control-Allow-Origin"] == "*"
    *lines, done, end = raw.decode().split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    *events, usage = [json.loads(line.removeprefix("data: ")) for line in lines]
    heads = {tuple(event[k] for k in ("object", "model", "id", "created")) for event in events}
    assert [head[:2] for head in heads] == [("chat.completion.chunk", FAST)]
    assert usage["choices"] == [] and usage["id"] == events[0]["id"]
    assert {type(number) for number in usage["usage"].values()} == {int}
    choices = [event["choices"][0] for event in events]
    first, *deltas = [choice["delta"] for choice in choices]
    assert [delta for delta in deltas if "content" in delta] == deltas[-1:]
    assert first["role"] == "assistant" and not any("role" in delta for delta in deltas)
    texts = [text for delta in deltas for text in delta.values()]
    assert all(type(text) is str for text in texts) and len(set(links_in("".join(texts)))) == 2
    assert sum("reasoning_content" in delta for delta in deltas) > 1
    *others, last = [choice["finish_reason"] for choice in choices]
    assert (set(others), last) == ({None}, "stop")


@pytest.mark.parametrize("code", ["content_policy_violation", "internal_error"])
async def test_an_error_after_the_start_is_text_and_event_and_done(world, monkeypatch, code):
    """And no line is long, whatever Google says: some clients stop at 64 KiB."""
    w = await world()
    w.fault = fault(PAID, refusal(400, message="UNSAFE" + "x" * 300_000))
    if code == "internal_error":
        monkeypatch.setattr(flow2api, "progress_line", None)
    stream = await w.stream(text="boat " * 3_900)
    assert all(not line or line.startswith("data: ") for line in stream.lines)
    assert max(map(len, stream.lines)) < 1 << 16
    *events, last = stream.events
    reply = Reply(flow2api.ERRORS[code][0], stream.headers, json.dumps(last).encode())
    assert expect_error(w, reply, code)["message"] in stream.content
    if code != "content_policy_violation":
        expect_error(w, reply, "internal_error")
    assert stream.headers["x-should-retry"] == "false"
    assert {event["choices"][0]["finish_reason"] for event in events} == {None}


async def test_a_whole_answer_is_a_completion_and_modalities_put_pictures_beside_its_text(world):
    w = await world(**{"cache.enabled": True})
    assert re.fullmatch(r"!\[.+\]\(http\S+\)", (await w.chat("imagen_4")).content)
    body = {"modalities": ["IMAGE", "text"], "n": 2}
    events = (await w.stream(BANANA, **body)).events
    assert not any("usage" in event for event in events)  # nobody asked for it
    reply = (await w.chat(BANANA, **body)).json
    (choice,) = reply["choices"]
    head = [reply["object"], reply["model"], choice["index"], choice["finish_reason"]]
    assert head == ["chat.completion", BANANA, 0, "stop"]
    assert choice["message"]["role"] == "assistant"
    assert type(reply["created"]) is int and reply["id"]
    assert {"prompt_tokens", "completion_tokens", "total_tokens"} <= set(reply["usage"])
    for message in (events[-1]["choices"][0]["delta"], choice["message"]):
        links = message["content"].replace("Picture: ", "").split()
        assert [(await w.fetch(link)).status for link in links] == [200, 200]
        urls = [image.pop("image_url")["url"] for image in message["images"]]
        start = "data:image/png;base64,"
        pictures = [base64.b64decode(url.removeprefix(start), validate=True) for url in urls]
        assert pictures == files_at_flow(w)[-2:] or pictures == files_at_flow(w)[1:3]
        assert message["images"] == [{"type": "image_url", "index": i} for i in (0, 1)]


NO_REQUESTS = ("", "{", "[]", "null", '"text"', b"\xff\xfe{}", "[" * 100_000, "model=veo_3_1&n=1")
NO_REQUESTS += ('{"model": ' + "9" * 5000 + "}", '{"model": "veo_3_1", "messages": NaN}')
CHAT_FAULTS = r"""
invalid_request n | n 0 5 -1 1.5 "two" true [] {} 1000000000000000000000000
invalid_request size | size "huge" 721 {"a":1}
invalid_request model | model null ["veo_3_1"]
invalid_request messages | messages [] [{}] ["a"] {"role":"user","content":"a"} [{"role":["user"]}]
invalid_request messages | messages [{"role":"assistant","content":"a"}]
invalid_request messages | content "" "\u0020" null 5 [] ["a"] [{"type":"text"}]
invalid_request messages | content [{"type":"text","text":["a"]}]
invalid_request stream | stream "yes" 2 {} "streamed"
invalid_image messages | image {"url":5} 5 "****" "data:image/png;base64,!!!" "data:;base64,YWFh"
invalid_image messages | image "data:image/svg+xml;base64,PHN2Zy8+" "file:///etc/passwd"
invalid_image messages | image "http://" "http://[::1" "http://x:99999999/" "https://\u0000/"
"""
BESIDE_A_TEXT = {"url": {"experimental_attachments": [{"url": DATA}]}, "media": {"media": DATA}}
PARTS_AT_FAULT = json.loads("""[{"type": "input_audio", "input_audio": {"data": "UklGRg=="}},
 {"type": "file", "file": {"file_id": "file-1"}}, {"type": "document", "document": {"a": "b"}},
 {"type": "video", "fps": 2}, {"type": "image_url", "image_url": {"url": ""}}]""")
WRONG_COUNTS = {BANANA: 11, FAST: 4, "veo_3_1_r2v_fast_landscape": 4}  # model -> pictures
WRONG_COUNTS |= {"veo_3_1_i2v_s_fast_fl_landscape": 0, "veo_3_1_i2v_s_fast_fl_portrait": 3}
HUGE = PNG + bytes(30 << 20)


def chats_at_fault(huge_url):
    """(error code, its param, what its message names, what stands in the request)"""
    for part in (*PARTS_AT_FAULT, {"type": "video_url", "video_url": {"url": data_url(CLIP)}}):
        yield "invalid_image", "messages", "", turns([{"type": "text", "text": "a boat"}, part])
    for param, beside in BESIDE_A_TEXT.items():
        message = {"role": "user", "content": "a boat"} | beside
        yield "unsupported_parameter", param, param, {"messages": [message]}
    for code, param, body in requests_in(CHAT_FAULTS):
        fields = turns(*body.values()) if "content" in body else body
        yield code, param, param if param in body else "", fields
    for name in ("video", "remix_target_id", "style_id", "character_options"):
        yield "unsupported_parameter", name, name, {name: "x"}
    for model, count in WRONG_COUNTS.items():
        yield "invalid_image", "messages", model, {"model": model, "pictures": [DATA] * count}
    for picture in (data_url(HUGE), huge_url):
        yield "request_too_large", "messages", "MB", {"image": picture}
    yield "invalid_request", "n", "n", {"n": "9" * 5000}
    yield "invalid_request", "model", "", {"model": "x" * 100_000}
    yield "invalid_request", "size", "", {"model": "veo_3_1-portrait", "size": "16:9"}
    yield "invalid_image", "messages", "", {"image": data_url(CLIP, "video/mp4")}


async def test_a_request_at_fault_is_refused_and_nothing_is_sent(world):
    w = await world()
    w.flow.calls.clear()
    w.fault = fault("huge", lambda request: web.Response(body=HUGE))
    for raw in NO_REQUESTS:
        expect_error(w, await w.post(CHAT, data=raw), "invalid_request")
    for code, param, name, fields in chats_at_fault(f"{w.flow.address}/huge"):
        error = expect_error(w, await w.chat(**fields), code)
        assert error["param"] == param and name in error["message"], str(fields)[:99]
        assert not w.flow.calls and not w.jobs.open, str(fields)[:99]


# ---- Images API ----

RED, BLUE = (flow2api.block_picture(colour, 64, 64) for colour in ("red", "blue"))
RED_URL, BLUE_URL = map(data_url, (RED, BLUE))
RED_BASE64 = base64.b64encode(RED).decode()
EXPOSED = {"openai-poll-after-ms", "x-job-id", "x-should-retry", "idempotent-replayed"}


async def draw(w, path=IMAGES, parts=(), **fields):
    """Asks for pictures with a form of `parts`, or in JSON; what Flow did before is forgotten."""
    w.flow.calls.clear()
    w.flow.media.clear()
    request = form(parts) if parts else {"body": BOAT | MEANINGLESS | fields}
    return await w.post(path, **request)


def drawn(reply):
    """The decoded pictures of an answer, which holds no address beside them."""
    assert reply.status == 200, reply.body
    assert set(reply.json) == {"created", "data"} and type(reply.json["created"]) is int
    assert reply.headers["x-should-retry"] == "false" and reply.job_id
    assert set(reply.headers["Access-Control-Expose-Headers"].split(", ")) >= EXPOSED
    items = reply.json["data"]
    assert all(set(item) == {"b64_json", "revised_prompt"} for item in items)
    assert {item["revised_prompt"] for item in items} == {"a boat"}
    return [base64.b64decode(item["b64_json"], validate=True) for item in items]


def files_at_flow(w, prompt=""):
    """What the simulated Flow has made, of a prompt or of all, in its order."""
    return [made.file() for made in w.flow.media.values() if prompt in ("", made.prompt)]


def submitted(w):
    """The first element of the only submit of pictures, and the pictures sent for it, in order."""
    (submit,) = w.asked("batchGenerateImages")
    sent = [base64.b64decode(body["imageBytes"]) for body in w.asked("uploadImage")]
    assert len(submit["requests"][0]["imageInputs"]) == len(sent)
    return submit["requests"][0], sent


def uploads(link):
    """What reaches Flow; the parts of a form, or the fields of a JSON body; at `link` is RED."""
    values = [(RED, FILE), (BLUE, NAMELESS), (RED, UNTYPED), (link,), (BLUE_URL,)]
    values += [(link, FILE), (RED_BASE64,), (BLUE_URL, FILE), (link, UNTYPED)]
    objects = [{"url": link}, {"b64_json": RED_BASE64}, {"image_url": {"url": BLUE_URL}}]
    return (
        ([RED, BLUE, RED] * 3, [PROMPT, *(("image", *value) for value in values)]),
        ([RED], [("image", b"", FILE), ("prompt", ""), ("mask", ""), ("image", RED, FILE), PROMPT]),
        ([RED], [("image[]", RED, NAMELESS), PROMPT, ("stream", "False")]),
        ([BLUE, RED], [("image[]", BLUE_URL), PROMPT, ("image[]", RED, FILE)]),
        ([RED, BLUE], [("image[0]", RED, FILE), ("image[1]", BLUE, FILE), PROMPT]),
        ([BLUE, RED], [("images", BLUE, FILE), PROMPT, ("images", RED, FILE)]),
        ([BLUE], [PROMPT, ("image[url]", BLUE_URL)]),
        ([RED], {"image": link}),
        ([BLUE], {"image": objects[2] | {"type": "image_url"}}),
        ([BLUE, RED, RED, BLUE, RED], {"image": [BLUE_URL, *objects, RED_BASE64]}),
        ([RED, BLUE], {"images": [{"image_url": link}, {"image_url": BLUE_URL}]}),
        ([BLUE, RED], {"input_image": RED_URL, "references": [BLUE_URL]}),
        ([BLUE], {"input_references": [objects[2] | {"type": "image_url"}]}),  # OpenRouter's
        ([RED, BLUE], {"image": link, "images": [BLUE_URL]}),
    )


async def test_every_form_of_upload_reaches_flow_in_its_order(world):
    w = await world()
    w.fault = fault("/red$", lambda request: web.Response(body=RED))
    for pictures, body in uploads(f"{w.flow.address}/red"):
        options = body if isinstance(body, dict) else {"parts": body}
        for path in (IMAGES, EDITS, "/v1/images"):
            assert drawn(await draw(w, path, **options)) == files_at_flow(w), body
            assert submitted(w)[1] == pictures, body


def picture_events(reply):
    """The (name, data) of each event in a stream of pictures; comments are left out."""
    kind = reply.headers["Content-Type"].partition(";")[0]
    assert (reply.status, kind) == (200, "text/event-stream"), reply.body
    *blocks, end = re.sub(r"(?m)^: ping\n", "", reply.body.decode()).split("\n\n")
    matches = [re.fullmatch(r"event: (\S+)\ndata: (\S.*)", block) for block in blocks]
    assert end == "" and all(matches), reply.body[:500]
    events = [(match[1], json.loads(match[2])) for match in matches]
    assert all(data["type"] == name for name, data in events)
    return events


@pytest.mark.parametrize("cache", [False, True])
async def test_a_picture_comes_as_an_address_where_that_is_set_or_asked_for(world, cache):
    w = await world(**{"images.response_format": "url", "cache.enabled": cache})
    for word in (None, "", "url"):
        (item,) = (await draw(w, response_format=word)).json["data"]
        assert set(item) == {"url", "revised_prompt"}
        assert item["url"].startswith(w.url + "/tmp/")
        assert [(await w.fetch(item["url"])).body] == files_at_flow(w)
    plain = BOAT | {"n": "2", "response_format": "b64_json"}  # as browsers send forms
    assert len(drawn(await w.post(IMAGES, data=plain))) == 2
    w.live.put("file", "images.response_format", "b64_json", "test")
    parts = [("stream", "true"), PROMPT, ("response_format", "url")]
    ((_, data),) = picture_events(await draw(w, parts=parts))
    assert "b64_json" not in data
    assert [(await w.fetch(data["url"])).body] == files_at_flow(w)
    w.fault = fault("/media/image", lambda r: web.Response(body=b"\xff\xd8\xff\xe0" + bytes(40)))
    ((_, data),) = picture_events(await draw(w, stream=True))
    assert data["output_format"] == "jpeg"


MEANINGS = (  # what Flow is asked for; fields that ask for it
    ("IMAGEN_3_5", each("model", None, "", "gpt-image-1", "chatgpt-image-1", "dall-e-3")),
    ("IMAGEN_3_5", each("n", 1, 2, 3, 4, "3", None, "", image_size="1K")),
    ("SQUARE", each("size", "1024x1024", "512x512", "1:1", "8x7")),
    ("SQUARE", each("size", "auto", model="nano_banana_pro-square")),
    ("LANDSCAPE", each("size", "1792x1024", "16:9", "21:9", "1280*720", "1280×720")),
    ("LANDSCAPE", each("aspect_ratio", "16:9", size="1:1")),
    ("LANDSCAPE", each("orientation", "landscape", size="1:1")),
    ("LANDSCAPE", each("size", "1792x1024", model="nano_banana_2-landscape")),
    ("PORTRAIT", each("size", "1024x1792", "9:16")),
    ("LANDSCAPE_FOUR_THREE", each("size", "1536x1024", "3:2", "4:3")),
    ("PORTRAIT_THREE_FOUR", each("size", "4:5", "1024x1536", "3:4")),
    ("2K", each("image_size", "2K", "2k", model="nano_banana_2")),
    ("4K", each("image_size", "4K", model="nano_banana_pro")),
    ("2K", each("resolution", "2K", model="nano_banana_2") + each("size", "2k", model=BANANA)),
    ("LANDSCAPE", each("size", "3000x1000") + each("aspectRatio", "16:9") + each("ratio", "16:9")),
    ("PORTRAIT", each("aspect_ratio", "1:4", size="1024x1024") + each("n", 2.0, size="9:16")),
    ("LANDSCAPE", each("extra_body", {"google": {"image_config": {"aspectRatio": "16:9"}}})),
    ("LANDSCAPE", each("model", "sora-image-landscape", "dall-e-3-landscape")),
    ("IMAGEN_3_5", each("quality", "hd", "high", "xhigh", "max", complexity="low", frame_count=9)),
)


@pytest.mark.parametrize("path", [IMAGES, EDITS])
@pytest.mark.parametrize(("meaning", "requests"), MEANINGS)
async def test_what_is_asked_for_reaches_flow(world, meaning, requests, path):
    w = await world(((ULTRA, 1000),), **{"images.default_model": "imagen_4"})
    for fields in requests:
        pictures = drawn(await draw(w, path, image=RED_URL, **fields))
        scale = {"2K": 2, "4K": 4}.get(meaning, 1)
        assert pictures == [medium.file(scale) for medium in w.flow.media.values()]
        larger = [body["targetResolution"][-2:] for body in w.asked("upsampleImage")]
        assert (len(pictures), len(larger)) == (int(fields.get("n") or 1), scale > 1)
        element, _ = submitted(w)
        ratio = element["imageAspectRatio"].removeprefix("IMAGE_ASPECT_RATIO_")
        assert meaning in (element["imageModelName"], ratio, *larger), fields


INVALID, UNSUPPORTED = "invalid_request", "unsupported_parameter"
PICTURES_AT_FAULT = (  # code, param, fields
    (INVALID, "prompt", each("prompt", None, "", "  ", 5, ["a boat"])),
    (INVALID, "n", each("n", 0, 5, -1, "5", "x", 1.5, True, [1]) + each("n", 9, stream=True)),
    (INVALID, "size", each("size", "big", "0x0", 5, {"a": 1})),
    (INVALID, "size", each("aspect_ratio", "wide") + each("ratio", "9:16", size="16:9")),
    (UNSUPPORTED, "output_format", each("output_format", "svg", "GIF")),
    (INVALID, "size", each("size", "16:9", model="nano_banana_pro-square")),
    (INVALID, "model", each("model", 5, "veo_3_1-fast", "omni_flash", "sora" * 99)),
    (INVALID, "model", each("model", "sora-2", "sora-video-landscape-10s", "veo-3.1-generate-001")),
    (INVALID, "model", each("image_size", "2K", model="nano_banana") + each("size", "8K")),
    (INVALID, "response_format", each("response_format", "png")),
    ("invalid_image", "image", each("image", {"file_id": "1"}, [{"file_id": "1"}])),
    ("invalid_image", "image", each("image", "no!", 5, data_url(b"%PDF"), [DATA] * 11)),
    ("invalid_image", "image", each("image", [DATA] * 4, model="imagen_4")),
    (INVALID, "image", each("image", None, "", ["", None], path=EDITS)),
    (INVALID, "image", each("parts", [PROMPT], path=EDITS)),
    (UNSUPPORTED, "mask", each("parts", [PROMPT, ("mask", BLUE, FILE)])),
    (UNSUPPORTED, "mask", each("mask", BLUE_URL, {"image_url": BLUE_URL})),
    ("model_not_found", "model", each("model", "flux-pro")),
)


@pytest.mark.parametrize("path", [IMAGES, EDITS])
@pytest.mark.parametrize(("code", "param", "requests"), PICTURES_AT_FAULT)
async def test_a_picture_at_fault_is_refused_unsent(world, path, code, param, requests):
    w = await world()
    for fields in requests:
        reply = await draw(w, **{"path": path, "image": RED_URL} | fields)
        assert expect_error(w, reply, code)["param"] == param, fields
        assert not {"x-should-retry", "X-Job-Id"} & set(reply.headers), fields
        assert (w.flow.calls, w.store.jobs()) == ([], []), fields


KINDS = ("form-data; boundary=b", "form-data; boundary=", "form-data; x*", "mixed; boundary=b", "")
HEAD = b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n'
TAIL = b"\r\na boat\r\n--b--\r\n"
ODD_HEADS = b"Transfer-Encoding: \xff,Transfer-Encoding: base64,Encoding: gzip,X: " + b"x" * 10**5
MALFORMED = [b"", b"nothing", b"--b", b"--b--\r\n", b"--b\r\n\r\n", HEAD + b"\r\na boat"]
MALFORMED += [HEAD + b"X: " + b"x" * 10_000 + b"\r\n" + TAIL, HEAD + b"--b--\r\n"]
MALFORMED += [b"--b\r\nno colon\r\n" + TAIL, HEAD.replace(b"name", b"nom") + TAIL]
MALFORMED += [HEAD + TAIL.replace(b"a boat", b"\xff\xfe")]
LISTS = b"Content-Type: text/json\r\n\r\n[%b1]\r\n" % (b"[]," * 60_000)
MALFORMED += [(HEAD.replace(b"prompt", b"x") + LISTS) * 2 + HEAD + TAIL]
MALFORMED += [HEAD + b"Content-%s\r\n" % head + TAIL for head in ODD_HEADS.split(b",")]


@pytest.mark.parametrize("raw", MALFORMED, ids=lambda raw: repr(raw[-40:]))
async def test_a_malformed_form_is_refused(world, raw):
    w = await world()
    for path, kind in itertools.product((IMAGES, VIDEOS), KINDS):
        headers = {"Content-Type": f"multipart/{kind}"}
        encoded = b"Encoding" in raw and kind.endswith("=b")
        reply = await w.post(path, data=raw, headers=headers)
        expect_error(w, reply, "unsupported_encoding" if encoded else INVALID)
    assert not w.store.jobs()


def test_a_form_is_split_in_steps_as_in_one(monkeypatch):
    monkeypatch.setattr(flow2api, "STEP", 3)
    dice = random.Random(7)
    for _ in range(2000):
        raw = bytes(dice.choices(b"\r\n-b", k=dice.randint(0, 40)))
        mark = dice.choice((b"\n-", b"\r\n--", b"\r\n--b-b"))
        assert flow2api.split_parts(raw, mark) == raw.split(mark), (raw, mark)


def failing(count):
    """Flow makes the pictures, but the first `count` of them fail."""

    def edit(body):
        for medium in body["media"][:count]:
            failed = {"mediaGenerationStatus": "MEDIA_GENERATION_STATUS_FAILED"}
            medium["mediaMetadata"] = {"mediaStatus": failed}
        return body

    return edited(PAID, edit)


AFTER_THE_START = {  # code: the fault, the prompt
    "generation_failed": (failing(4), "a boat"),
    "content_policy_violation": (None, "something unsafe"),
    "captcha_required": (fault(PAID, CAPTCHA), "a boat"),
    "content_not_found": (fault("/media/image", refusal(404)), "a boat"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [IMAGES, EDITS])
@pytest.mark.parametrize("code", AFTER_THE_START)
async def test_a_failure_of_a_picture_is_told_as_final(world, code, path, stream):
    w = await world()
    w.fault, prompt = AFTER_THE_START[code]
    reply = await draw(w, path, n=2, prompt=prompt, image=RED_URL, stream=stream)
    if stream:
        ((name, data),) = picture_events(reply)
        assert (name, data["error"]["code"]) == ("error", code)
        assert data["error"].keys() == {"message", "type", "param", "code"}
    else:
        expect_error(w, reply, code)
        assert reply.headers["x-should-retry"] == "false"
    assert len(w.paid()) == (code != "captcha_required")  # that fault keeps it from Flow
    assert [reply.job_id] == [job.id for job in w.store.jobs()]
    w.token.paused_until = 0
    for count in (1, 3):  # of four that fail: the others are given
        w.fault = failing(count)
        pictures = drawn(await draw(w, n=4))
        assert pictures == files_at_flow(w)[-4 + count :]


# ---- Videos API ----

QUICK = {"video_seconds": 0.01, "flow.poll_interval": 0.05}
EDIT_CLIP = f"{VIDEOS}/edits"
UNDER_WAY = ("queued", "in_progress")
VIDEO_TYPES = {  # what strict clients take in a video object
    "str": ["id", "object", "model", "status", "prompt", "seconds", "size"],
    "int": ["progress", "created_at"],
    "int or NoneType": ["completed_at", "expires_at"],
    "str or NoneType": ["remixed_from_video_id"],
    "dict or NoneType": ["error"],
}
VIDEO_EXTRAS = {"metadata", "notes", "url", "video_url", "urls", "fail_reason"}


def strict(video, *states):
    """The video object, held against OpenAI's types; its status is one of these, or any."""
    for types, names in VIDEO_TYPES.items():
        assert {type(video[name]).__name__ for name in names} <= set(types.split()), video
    assert set(video) - set(sum(VIDEO_TYPES.values(), [])) <= VIDEO_EXTRAS
    assert video["object"] == "video" and re.fullmatch(r"[A-Za-z0-9_-]+", video["id"])
    assert re.fullmatch(r"\d+ \d+x\d+", f"{video['seconds']} {video['size']}")
    assert video["status"] in (states or (*UNDER_WAY, "completed", "failed")), video
    done, failed = (video["status"] == state for state in ("completed", "failed"))
    assert 0 <= video["progress"] <= 100 and (video["progress"] == 100) is done
    assert failed or (video["completed_at"] is not None) is done
    assert ("url" in video, "video_url" in video) == (done, done)
    error = video["error"] or {}
    assert set(error) == ({"code", "message"} if failed else set()) and all(error.values())
    assert ("fail_reason" in video, video.get("fail_reason")) == (failed, error.get("message"))
    return video


def video_of(reply, *states):
    """The strict video object in an answer, whose status and headers are right, too."""
    assert reply.status == 200, reply.body
    pause = "5000" if strict(reply.json, *states)["status"] in UNDER_WAY else None
    assert reply.headers.get("openai-poll-after-ms") == pause
    return reply.json


async def order(w, path=VIDEOS, form=False, **fields):
    """POST, as JSON or as a form -> Reply."""
    fields = {"prompt": "a boat"} | fields
    data = aiohttp.FormData(fields, default_to_multipart=True) if form else None
    return await w.post(path, None if form else fields, data=data)


async def finished_clip(w, async_mode=False, **fields):
    """-> its video object."""
    return video_of(await order(w, async_mode=async_mode, **fields), "completed")


async def begun(w, **fields):
    """A clip that is not finished -> its id."""
    return video_of(await order(w, **fields), *UNDER_WAY)["id"]


async def shown(w, video_id, *states):
    return video_of(await w.get(f"{VIDEOS}/{video_id}"), *states)


async def download(w, video_id, query="", method="GET", **headers):
    path = f"{VIDEOS}/{video_id}/content{query}"
    return await w.call(method, path, headers=headers, allow_redirects=False)


def file_of(w, video_id):
    """The bytes that Flow has for a clip."""
    return w.flow.media[w.store.job(video_id).outputs[0].name].file()


async def test_progress_goes_by_the_time_of_earlier_clips_and_never_back(world, clock, looks):
    """And a clip that failed says why, and changes no more."""
    w = await world(video_seconds=900, **{"generation.video_timeout": 86400})
    first = await begun(w)
    await w.running()
    clock.ahead = 1000  # so long did it take
    await w.end_of(first)
    w.flow.video_seconds = 10**6
    video = await begun(w)
    await w.running()
    ahead = (1000, 1400, 1700, 1200, 9000)
    seen = [(await shown(w, video))["progress"] for clock.ahead in ahead]
    start, middle, late, back, end = seen
    assert start < 3 and 38 < middle < 42 and 68 < late < 72 and (back, end) == (late, 99)
    w.flow.video_seconds = 0
    lost = fault(PAID, dropped)
    for code, w.fault in (("content_policy_violation", None), ("submit_unknown", lost)):
        video = await begun(w, prompt="unsafe")
        await w.end_of(video)
        failed = await shown(w, video, "failed")
        assert failed["error"]["code"] == code
        error = expect_error(w, await download(w, video), code)
        assert error["message"] == failed["fail_reason"]
        clock.ahead += 3000
        assert await shown(w, video) == failed


async def test_a_kept_file_that_is_about_to_go_comes_from_flow(world):
    w = await world(**{"cache.enabled": True}, **QUICK)
    video = await finished_clip(w)
    kept = w.jobs.media.path(w.store.job(video["id"]).outputs[0].file)
    os.utime(kept, (0, 0))
    assert (await download(w, video["id"])).body == file_of(w, video["id"])
    assert kept.exists() and len(w.asked("/media/video/")) == 2


@pytest.mark.parametrize("agent", ["ai/7.0.173 ai-sdk/provider-utils/5.0", "ai-sdk/openrouter/3.1"])
async def test_the_ai_sdk_reads_a_clip_as_openrouter_gives_it(world, agent):
    w = await world(**QUICK)
    frames = [{"type": "image_url", "image_url": {"url": DATA}, "frame_type": "first_frame"}]
    headers = {"User-Agent": agent}
    for prompt, error in (("a boat", ""), ("unsafe", "safety system")):
        body = {"model": FAST, "prompt": prompt, "aspect_ratio": "9:16", "frame_images": frames}
        begun = (await w.post(VIDEOS, body, headers=headers)).json
        await w.end_of(begun["id"])
        video = (await w.get(begun["polling_url"].removeprefix(w.url), headers=headers)).json
        assert video["status"] == ("failed" if error else "completed")
        assert (
            begun["error"] == "" and error in video["error"] and bool(error) == bool(video["error"])
        )
        assert len(video["unsigned_urls"]) == (0 if error else 1)
        assert w.store.job(begun["id"]).inputs
    assert (await w.get(video["polling_url"].removeprefix(w.url))).json["error"]["code"]


OMNI_10 = f"{OMNI}-10s"
READINGS = (  # the default model, what a clip comes to, the fields that ask for it
    (FAST, "720x1280 8", " size= size=auto size=1000x1200 seconds=8 seconds= aspect_ratio=9:16"),
    (FAST, "1280x720 8", "size=1920x1080 orientation=landscape model=veo_3_1-landscape"),
    (FAST, "1080x1920 8", "model=veo_3_1-fast-1080p"),
    (FAST, "720x1280 6", "model=omni_flash&seconds=6"),
    (FAST, "720x1280 10", "model=omni_flash-10s&seconds=10"),
    (FAST, f"720x1280 8 {FAST} makes 8 s, not 4.", "seconds=4 model=sora-2&seconds=4"),
    (OMNI, f"720x1280 4 {OMNI} makes 4 s, not 3.", "seconds=3"),
    (OMNI, f"720x1280 10 {OMNI} makes 10 s, not 15.", "seconds=15 model=&seconds=15"),
    (OMNI_10, f"720x1280 10 {OMNI_10} makes 10 s, not 4.", "model=sora-2-pro&seconds=4"),
)


NAMES_OF_PICTURES = """input_reference input_image image images references image_url image_urls
 imageUrl reference_images reference_image_urls file image_file input_images first_frame
 start_image frame_images lastFrame end_image_url image_tail photo attachments promptImage
 image_input finalFrame"""
CLIP_FIELDS = (  # what a clip comes to, fields that say so
    ("omni_flash 4", each("duration", 4, "4", 4.0, "4.0", model=OMNI)),
    ("omni_flash 4", each("extra_body", {"durationSeconds": 4}, model=OMNI)),
    ("omni_flash 4", each("seconds", 4, "4s", "4 seconds", "4秒", model=OMNI, duration=4.0)),
    ("omni_flash 4", each("clip_duration", "4s", model=OMNI) + each("duration_sec", 4, model=OMNI)),
    ("veo_3_1_fast 8", each("seconds", 8.0, "8.0", n=1.0) + each("resolution", "720p")),
    ("veo_3_1_fast 8 1080p", each("resolution", "1080p", "1080P", model=FAST)),
    ("veo_3_1_fast 8 4k", each("resolution", "4K", model=FAST + "-4k")),
    ("veo_3_1_fast 8 1080p", each("size", "1080p", model="veo_3_1_t2v_fast_landscape")),
    ("veo_3_1_fast 8 landscape", each("aspectRatio", "16:9") + each("ratio", "16:9")),
    ("veo_3_1_fast 8 landscape", each("config", {"aspect_ratio": "16:9"}, size="1024x1024")),
    ("veo_3_1_fast 8 landscape", each("extra_body", '{"aspect_ratio": "16:9"}')),
    ("veo_3_1_fast 8 landscape / makes 8 s, not 10", each("model", "sora-video-landscape-10s")),
    ("veo_3_1_fast 8 landscape", each("size", "16：9", "16/9", "horizontal", "LANDSCAPE")),
    ("veo_3_1_fast 8 landscape", each("width", 1280, "1280", height=720)),
    ("veo_3_1_fast 8 1080p", each("quality", "1080p") + each("video_quality", "1080P")),
    ("veo_3_1_fast 8 landscape", each("image_size", "landscape_16_9", {"width": 16, "height": 9})),
    ("veo_3_1_fast 8 landscape", each("video_aspect_ratio", "16:9") + each("aspect", "16:9")),
    ("veo_3_1_fast 8 1080p", each("resolution", 1080, "FHD") + each("output_resolution", "1080p")),
    ("omni_flash 4", each("length", 4, model=OMNI) + each("video_seconds", "4", model=OMNI)),
    ("veo_3_1_fast 8 / has no 1:1", each("size", "1:1", "square")),
    ("veo_3_1_relaxed 8 / Veo 3.1 Lite at low priority", each("model", "veo_3_1-relaxed")),
    ("veo_3_1 8 landscape", each("model", "veo-3.1-generate-preview", "google/veo-3.1")),
)
HOLDS_A_FILE = (  # the code; what a field that nobody reads may not, and may hold
    (UNSUPPORTED, each("metadata", {"image": DATA}, {"a": [BASE64]}, {"r": "https://x/a.mp4?b"})),
    (UNSUPPORTED, each("anything", DATA, PNG, "JPEg/9" * 200)),
    (UNSUPPORTED, each("video_url", "https://x/1", [DATA])),
    (UNSUPPORTED, each("input_audio", {"data": "UklGR" + "A" * 50}) + each("mask", DATA, PNG)),
    (UNSUPPORTED, each("pic_url", "https://x/1") + each("uploads", ["https://x/1"])),
    (UNSUPPORTED, each("ref", "https://x/1") + each("input_urls", ["https://x/1"])),
    (UNSUPPORTED, each("messages", [{"role": "user", "content": [{"url": DATA}]}])),
    (UNSUPPORTED, each("file_id", "file-1") + each("imageFileIds", ["file-1"])),
    ("", each("user", "u" * 2000) + each("callback_url", "https://x/done")),
    ("", each("metadata", {"id": "a1" * 300, "site": "https://x/y"}, {"note": "image: none"})),
    ("", each("image_format", "png") + each("frame_count", 9) + each("tools", [{"a": DATA}])),
)
CONTRADICTIONS = (  # what is blamed, fields
    ("seconds", each("duration", 6, model=OMNI, seconds=4)),
    ("size", each("size", "9:16", aspect_ratio="16:9") + each("width", 9, height=8, size="9:16")),
    ("size", each("size", "720x1280", model="sora-video-landscape-10s")),
    ("seconds", each("seconds", 4, model="sora-video-landscape-10s")),
    ("model", each("resolution", "720p", model=FAST + "-1080p")),
    ("model", each("resolution", "1080p", model=OMNI) + each("resolution", "480p", "2K")),
    ("num_images", each("num_images", 2)),
    ("batch_size", each("batch_size", 2)),
    ("n", each("n", 2.0, 1e308)),
    ("model", each("model", "gpt-image-2", "dall-e-3", "sora-image", "imagen-4.0-generate-001")),
    ("prompt", each("prompt", f"a boat like {DATA}")),
)


async def test_pictures_shape_and_length_are_read_under_their_usual_names(world):
    """The number of pictures says what they are. Clients of Sora get the nearest length."""
    w = await world(())
    media, urls = w.gateway.media, list(map(data_url, PICTURES))
    for name, count in itertools.product(NAMES_OF_PICTURES.split(), range(4)):
        alone = [urls[0], PICTURES[0]] if count == 1 else []
        objects = [{"image_url": url} for url in urls[:count]]
        for value in (urls[:count], objects, PICTURES[:count], *alone):
            clip = await flow2api.read_clip(flow2api.Body(BOAT | {name: value}), media)
            mode = ("text", "start", "frames", "references")[count]
            assert (clip.images, clip.plan.mode) == (PICTURES[:count], mode), name
    ends = [(urls[1], "last_frame"), (urls[0], "first_frame")]  # OpenRouter's
    ends = {"frame_images": [{"image_url": {"url": u}, "frame_type": t} for u, t in ends]}
    text = {"images": json.dumps(urls[:2])}  # in a form
    for fields in (ends, text):
        body = flow2api.Body(BOAT | fields)
        assert (await flow2api.read_clip(body, media)).images == PICTURES[:2]
    frames = {"last_frame": urls[2], "images": [urls[1]], "firstFrame": {"url": urls[0]}}
    assert (await flow2api.read_clip(flow2api.Body(BOAT | frames), media)).images == PICTURES
    for default, told, queries in READINGS:
        w.live.put("file", "videos.default_model", default, "test")
        for query in queries.split(" "):
            fields = dict(pair.split("=") for pair in query.split("&") if pair)
            clip = await flow2api.read_clip(flow2api.Body(BOAT | fields), media)
            size = flow2api.pixels(clip.plan)
            assert " ".join([size, str(clip.plan.seconds), *clip.notes]) == told, query
            assert clip.plan.model == (re.sub("sora.*", "", fields.get("model", "")) or default)
    w.live.put("file", "videos.default_model", FAST, "test")
    for told, requests in CLIP_FIELDS:
        for fields in requests:
            clip = await flow2api.read_clip(flow2api.Body(BOAT | fields), media)
            parts = [clip.plan.family, clip.plan.seconds, clip.plan.upscale, clip.plan.ratio]
            text = " ".join([*map(str, filter(None, parts)), *clip.notes])
            assert all(part in text for part in told.split(" / ")), (fields, text)
            assert bool(clip.notes) is (" / " in told), (fields, text)


async def test_no_file_and_no_second_wish_is_passed_over(world):
    w = await world()
    w.flow.calls.clear()
    for code, requests in HOLDS_A_FILE:
        for fields in requests:
            try:
                body = flow2api.Body(BOAT | fields)
                assert await flow2api.read_clip(body, w.gateway.media) and not code, fields
            except flow2api.GatewayError as error:
                assert error.code == code, fields
    for param, requests in CONTRADICTIONS:
        for fields in requests:
            error = expect_error(w, await order(w, **fields), "invalid_request")
            assert error["param"] == param, fields
    parts = [PROMPT, ("upload", PNG, FILE)]  # a file under a name of its own
    expect_error(w, await w.post(IMAGES, **form(parts)), "unsupported_parameter")
    assert not w.flow.calls and not w.jobs.open


DEAD_LINKS = (  # the calls that fail, how, how many; the error; how often a link is asked for
    *(("^/media/", refusal(status), 1, "", 1) for status in (403, 404, 410)),
    *(("^/media/", refusal(gone), 2, "content_not_found", 1) for gone in (403, 404, 410)),
    ("^/media/|Redirect", refusal(404, message="NOT_FOUND"), 2, "content_not_found", 0),
    ("^/media/", dropped, ALWAYS, "upstream_unreachable", 0),
)


async def test_a_dead_link_is_asked_for_anew_once_an_old_one_not_tried(world, clock, request):
    """A file that breaks off never looks like a whole one; a redirect leads to a live link."""
    w = await world(**QUICK)
    video = (await finished_clip(w))["id"]
    data = file_of(w, video)
    for on, answer, times, code, links in DEAD_LINKS:
        w.flow.calls.clear()
        w.fault = fault(on, answer, times=times)
        reply = await download(w, video)
        assert expect_error(w, reply, code) if code else reply.body == data
        assert len(w.fault.seen) == times or answer is dropped
        assert len(w.asked("UrlRedirect")) == links
        w.fault = None
        assert (await download(w, video)).body == data
    w.flow.calls.clear()
    clock.ahead = 18_000 - 30
    for _ in range(2):  # the second time the new one is known
        assert (await download(w, video)).body == data
    assert [path[:7] for path, _ in w.flow.calls] == ["/fx/api", "/media/", "/media/"]
    for length, sent in itertools.product(("", "1000000"), (0, 5, 300_000)):

        async def broken(request, handler, length=length, sent=sent):
            reply = web.StreamResponse(headers={"Content-Length": length} if length else {})
            await reply.prepare(request)
            await reply.write(b"x" * sent)
            request.transport.close()
            return reply

        w.fault = broken
        with contextlib.suppress(aiohttp.ClientPayloadError):  # else nothing was passed on yet
            expect_error(w, await download(w, video), "upstream_unreachable")
    w.fault = None
    w.live.put("file", "videos.content", "redirect", "test")
    for clock.ahead in (18_000, 40_000):
        for path in (f"{VIDEOS}/{video}/content", (await shown(w, video))["url"]):
            reply = await w.get(path, allow_redirects=False)
            link = reply.headers["Location"]
            assert reply.status == 302 and link.startswith(w.flow.address)
            assert int(link.partition("Expires=")[2]) > flow2api.now() + 60
            assert (await w.fetch(link)).body == data
    reply = await download(w, video, "?variant=thumbnail")
    assert (reply.status, reply.headers["Content-Type"]) == (200, "image/png")
    assert reply.body == flow2api.block_picture("a boat", 320, 180)
    request.getfixturevalue("impatient")
    w.fault = fault("UrlRedirect", refusal(404, message="NOT_FOUND"))
    nowhere = (await finished_clip(w))["id"]
    expect_error(w, await download(w, nowhere), "content_not_found")


DATED = ("If-Modified-Since", "If-Unmodified-Since", "If-Range")


@pytest.mark.parametrize("kept", [False, True])
async def test_each_of_several_clips_comes_by_index_and_url_whole_and_in_ranges(world, kept):
    w = await world(video_seconds=0.3, **{"cache.enabled": kept})
    client = asyncio.create_task(w.chat(n=3))
    await until(lambda: len(w.flow.media) == 3)
    failed, *others = w.flow.media.values()
    failed.prompt = "unsafe"
    reply = await client
    assert "One of 3 failed" in reply.content and len(set(links_in(reply.content))) == 2
    path = f"{VIDEOS}/{reply.job_id}"
    one, two = [medium.file() for medium in others]
    w.fault = fault("^/media/", refusal(500)) if kept else None
    size = len(one)
    parts = {"": (0, size), "0-": (0, size), "3-9": (3, 10), "0-0": (0, 1)}
    parts |= {"-7": (size - 7, size), "5-99999999": (5, size)}
    for asked, (start, end) in parts.items():
        headers = {"Range": f"bytes={asked}"} if asked else {}
        span = asked and f"bytes {start}-{end - 1}/{size}"
        for method, body in (("GET", one[start:end]), ("HEAD", b"")):
            part = await download(w, reply.job_id, method=method, **headers)
            assert (part.status, part.body) == (206 if asked else 200, body)
            assert part.headers.get("Content-Range", "") == span
            assert part.headers["Accept-Ranges"] == "bytes"
            assert part.headers["Content-Type"] == "video/mp4"
            assert part.headers["Content-Length"] == str(end - start)
    part = await download(w, reply.job_id, Range="bytes=9999999-")
    assert (part.status, part.headers["Content-Range"]) == (416, f"bytes */{size}")
    w.fault = None
    for _ in range(2):
        video = video_of(await w.get(path), "completed")
        assert video["url"] == video["video_url"] == video["urls"][0]
        for url, file in zip(video["urls"], (one, two), strict=True):
            assert re.fullmatch(rf"{w.url}/tmp/[\w-]{{30,}}\.mp4", url)
            part = await w.fetch(url, Range="bytes=2-5")
            assert (part.status, part.body) == (206, file[2:6])
            whole = await w.fetch(url)
            assert (whole.body, whole.headers["Content-Type"]) == (file, "video/mp4")
            for name, year in itertools.product(DATED, ("9" * 20, "9" * 5000, "0")):
                odd = await w.fetch(url, **{name: f"Mon, 01 Jan {year} 00:00:00 GMT"})
                assert odd.status in (200, 400, 412), (name, year[:30])
        for query, file in (("variant=video", one), ("index=0", one), ("index=1", two)):
            assert (await w.get(f"{path}/content?{query}")).body == file
        for file in (w.data / "tmp").iterdir():
            file.unlink()  # it has expired: from now on the clip comes from Google
    for query in ("index=2", "index=-1", "index=x", "index=²", "variant=spritesheet"):
        error = expect_error(w, await w.get(f"{path}/content?{query}"), "invalid_request")
        assert error["param"] == query.partition("=")[0]
    secret = url.split("_")[-2]
    for wrong in (secret[::-1], secret[:-1], ""):
        assert (await w.fetch(url.replace(secret, wrong))).status == 404
    await w.pool.remove(w.token)  # nobody can be asked, and the clip itself is no picture
    expect_error(w, await w.get(f"{path}/content?variant=thumbnail"), "content_not_found")
    await w.call("DELETE", path)
    assert (await w.fetch(url)).status == 404


async def listed(w, **query):
    """The ids on all pages, in order."""
    ids = []
    more = True
    while more:
        reply = await w.get(VIDEOS, params=query)
        page = [strict(video)["id"] for video in reply.json.pop("data")]
        more = reply.json.pop("has_more")
        first, last = (page[0], page[-1]) if page else (None, None)
        assert reply.json == {"object": "list", "first_id": first, "last_id": last}
        assert len(page) <= int(query.get("limit", 20)) and type(more) is bool
        assert page or not ids  # no page more was announced than there is
        ids += page
        query["after"] = last
    return ids


async def test_the_list_walks_over_all_clips_exactly_once(world, monkeypatch):
    """Also where many have been created in the same instant."""
    w = await world(((PRO, 10_000),), video_seconds=600)
    at = time.time()
    monkeypatch.setattr(flow2api, "now", lambda: at)
    early = {await begun(w) for _ in range(12)}
    at += 1
    late = {await begun(w) for _ in range(13)}
    for limit in ("1", "3", "25", "100"):
        up = await listed(w, limit=limit, order="asc")
        assert (set(up[:12]), set(up[12:]), len(up)) == (early, late, 25)
        assert await listed(w, limit=limit, order="desc") == up[::-1] == await listed(w)
    assert await listed(w, after=up[3], order="asc") == up[4:]
    assert await listed(w, after=up[0]) == []
    for query in ("limit=0", "limit=101", "limit=x", "limit=-1", "limit=²", "order=up"):
        error = expect_error(w, await w.get(f"{VIDEOS}?{query}"), "invalid_request")
        assert error["param"] == query.partition("=")[0]
    expect_error(w, await w.get(f"{VIDEOS}?after=video_0123"), "task_not_found")


async def test_over_a_restart_paid_clips_go_on_and_waiting_ones_can_be_left(world, clock):
    w = await world((), video_seconds=600, **{"cache.enabled": True})
    await w.account(video_concurrency=1)
    known = {"a": {"b": [1, "ü", None]}}
    first = await begun(w, images=[DATA], metadata=known)
    await w.running()
    reply = await order(w, images=[DATA], metadata="")
    second = video_of(reply, "queued")["id"]
    assert (reply.job_id, reply.headers["x-should-retry"]) == (second, "false")
    assert not {"metadata", "notes"} & set(reply.json)
    fields = {"metadata": json.dumps(known), "seconds": "10", "image": DATA}
    third = video_of(await order(w, form=True, **fields), "queued")
    assert third["metadata"] == known and len(third["notes"]) == 1
    await w.restart()
    assert (await shown(w, first, "in_progress"))["metadata"] == known
    assert await shown(w, third["id"], "queued") == third
    assert (await w.get(VIDEOS)).json["data"][0] == third
    expect_error(w, await download(w, third["id"]), "task_not_completed")
    expect_error(w, await w.call("DELETE", f"{VIDEOS}/{first}"), "conflict")
    await w.call("DELETE", f"{VIDEOS}/{second}")
    ways = (("GET", ""), ("DELETE", ""), ("GET", "/content"), ("POST", "/remix"))
    for video, (method, end) in itertools.product((second, "..%2f", "x" * 300), ways):
        reply = await w.call(method, f"{VIDEOS}/{video}{end}", {"prompt": "a boat"})
        expect_error(w, reply, "task_not_found")
    assert list(w.jobs.open) == [first, third["id"]] == (await listed(w))[::-1]
    assert len(w.pool.queue) == len(list((w.data / "inputs").iterdir())) == 1
    assert (len(w.paid()), w.token.credits, w.token.reserved) == (1, 980, 0)
    w.flow.video_seconds = 0.01
    clock.ahead = 700
    for video in (first, third["id"]):
        assert (await w.end_of(video)).state == "completed"
        assert (await download(w, video)).body == file_of(w, video)
    done = await shown(w, third["id"], "completed")
    assert third["created_at"] <= done["completed_at"] <= flow2api.now()
    same = ("id", "created_at", "seconds", "size", "model", "prompt")
    assert all(done[name] == third[name] for name in same)
    assert len(w.paid()) == len(w.asked("VideoStartImage")) == 2
    assert len(list((w.data / "tmp").iterdir())) == 2
    await w.call("DELETE", f"{VIDEOS}/{first}")
    assert (await listed(w), len(list((w.data / "tmp").iterdir()))) == ([third["id"]], 1)
    assert (await download(w, third["id"])).body == file_of(w, third["id"])


CLIPS_FROM_CLIPS = (  # path, whether as a form, fields; ID: the clip
    ("/flow/v1/videos/ID/remix", False, {"model": "sora-2"}),
    ("/videos", True, {"remix_target_id": "ID"}),
    ("/videos/extensions", True, {"video[id]": "ID"}),
    (EXTEND, False, {"video": "ID", "model": "veo_3_1-fast"}),
)


@pytest.mark.parametrize(("tier", "ratio"), [(PRO, "portrait"), (ULTRA, "landscape")])
async def test_a_clip_from_a_clip_is_made_where_that_is(world, tier, ratio):
    w = await world(((tier, 500), (tier, 1000), (tier, 600)), **QUICK)
    source = await finished_clip(w, orientation=ratio)
    one, owner, other = w.pool.tokens.values()
    project = owner.project_id
    owner.project_id = str(uuid.uuid4())  # the clip stays in the project of its source
    extension = f"veo_3_1_extend_fast_{ratio}{'_ultra' if tier == ULTRA else ''}"
    for path, form, fields in CLIPS_FROM_CLIPS:
        one.credits = other.credits = 900  # another one would be first now
        owner.credits = 20
        w.flow.calls.clear()
        fields = json.loads(json.dumps(fields).replace("ID", source["id"]))
        fields |= {"prompt": "at night", "async_mode": "false"}
        reply = await order(w, path.replace("ID", source["id"]), form, **fields)
        video = video_of(reply, "completed")
        assert video["remixed_from_video_id"] == source["id"]
        assert (video["size"], video["seconds"]) == (source["size"], source["seconds"])
        longer = path.endswith("extensions")
        (body,) = w.asked("ExtendVideo" if longer else "EditVideo")
        assert body["clientContext"]["projectId"] == project
        (request,) = body["requests"]
        assert request["videoInput"] == {"mediaId": w.store.job(source["id"]).outputs[0].media}
        assert request["videoModelKey"] == (extension if longer else "abra_edit")
        assert request["aspectRatio"] == f"VIDEO_ASPECT_RATIO_{ratio.upper()}"
        assert request["textInput"]["structuredPrompt"]["parts"] == [{"text": "at night"}]
        assert (await download(w, video["id"])).body == file_of(w, video["id"])
    assert [w.flow.accounts[token.st].credits for token in (one, other)] == [500, 600]


AT_FAULT = r"""
invalid_request videos | prompt null "" "\u0020" 5 ["a"] ; n 2 "2" 0 [1]
invalid_request videos | seconds 7 "10" "x" -4 8.5 [8] "999999999" ; size "wide" "0x1" 5 {"a":1}
invalid_request videos | model "nano_banana_pro" "veo_3_1_extend_fast_portrait" 5
invalid_request videos | metadata "no" "[1]" [1] 5 "{\"a\":NaN}" {"a":NaN} "DEEP" {"a":"LONG"}
invalid_request videos/edits videos/extensions | video null "" {} {"id":5} ["ID"]
invalid_request videos/ID/remix | prompt "" ; size "1280x720" ; n 2
invalid_request videos/ID/remix videos/extensions | model "gpt-image-2" "dall-e-3" "sora-image"
invalid_request videos/ID/remix | model "nano_banana_pro"
invalid_request videos/extensions | model "nano_banana_pro"
invalid_image videos | image "****" 5 "data:,x" "dGV4dA==" [DATA,DATA,DATA,DATA]
invalid_image videos | input_reference {"file_id":"file-1"}
invalid_image videos/ID/remix | image DATA
unsupported_parameter videos | video "x" ; character_options "x" ; style_id "x"
unsupported_parameter videos/ID/remix | style_id "anime"
model_not_found videos videos/extensions | model "veo_9"
mode_not_available videos/extensions | model "omni_flash"
task_not_found videos/edits | video {"id":"video_0123"}
task_not_found videos | remix_target_id "video_0123"
"""


async def test_what_can_not_be_made_is_refused_unsent(world):
    w = await world(**QUICK)
    await w.chat("nano_banana_pro")  # pictures are not in the list
    source = (await w.chat()).job_id
    words = {"ID": source, "DEEP": "[" * 99_999, "LONG": "x" * 20_000, "DATA": json.dumps(DATA)}
    table = AT_FAULT
    for word, text in words.items():
        table = table.replace(word, text)
    right = {"videos": {"model": "veo_3_1-fast"}, "videos/extensions": {"video": source}}
    w.flow.calls.clear()
    for code, path, body in requests_in(table):
        reply = await order(w, f"/v1/{path}", **right.get(path, {}) | body)
        error = expect_error(w, reply, code)
        blamed = [None] if code == "task_not_found" else list(body)
        assert [error["param"]] == blamed and len(error["message"]) < 400
        assert "x-should-retry" not in reply.headers
        assert not w.flow.calls and not w.jobs.open, body
    w.live.put("file", "videos.default_model", "nano_banana_pro", "test")
    for seconds in ("", 8):
        expect_error(w, await order(w, seconds=seconds), "invalid_request")
    assert await listed(w) == [source] and not w.flow.calls


async def test_what_is_made_from_clips_of_any_kind_and_from_nothing_else(world, clock):
    w = await world(((ULTRA, 1000), (ULTRA, 100)), **QUICK)
    picture = (await w.chat("nano_banana_pro")).job_id
    failed = (await w.chat(text="unsafe")).job_id
    omni = (await w.chat("omni_flash")).job_id
    short = (await finished_clip(w, model="veo_3_1-fast-4s", async_mode="0"))["id"]
    longer = await finished_clip(w, path=EXTEND, video=short, async_mode=0)
    assert longer["seconds"] == "8"
    night = await finished_clip(w, path=EDIT_CLIP, video=longer["id"], metadata={"a": 1})
    assert (night["remixed_from_video_id"], night["metadata"]) == (longer["id"], {"a": 1})
    assert await listed(w) == [night["id"], longer["id"], short, omni, failed]
    expect_error(w, await order(w, EXTEND, video=omni), "mode_not_available")
    w.flow.video_seconds = 600
    going = await begun(w)
    await w.running()
    sent = len(w.paid())
    codes = {going: "task_not_completed", failed: "content_policy_violation"}
    for source, code in (codes | {picture: "invalid_request"}).items():
        for path in (f"{VIDEOS}/{source}/remix", EDIT_CLIP):
            error = expect_error(w, await order(w, path, video=source), code)
            assert error["param"] == ("video" if source == picture else None)
    assert list(w.jobs.open) == [going]
    clock.ahead = 700
    await w.end_of(going)
    await w.pool.remove(w.pool.tokens[1])
    expect_error(w, await order(w, f"{VIDEOS}/{short}/remix"), "no_accounts")
    assert len(w.paid()) == sent and not w.jobs.open
    await shown(w, short, "completed")  # and is there as long as its link lives
    assert (await download(w, short)).body == file_of(w, short)


async def test_no_look_at_the_tasks_of_an_account_is_a_call_to_flow(world, clock):
    w = await world(**QUICK, **{"generation.video_timeout": 86400})
    done = (await finished_clip(w))["id"]
    picture = (await w.chat("nano_banana_pro")).job_id
    await w.account(credits=30)
    w.flow.video_seconds = 10**6
    going = await begun(w, prompt="a lake")
    await w.running()
    clock.ahead = 20_000  # the links have expired; the open clip is polled all the time
    w.fault = fault("^(?!.*(batchCheck|auth/session))", dropped)
    assert await listed(w) == [going, done]
    for path, name, *ids in (
        ("1/pending-tasks", "tasks", going),
        ("1/pending-tasks-v2", "tasks", going),
        ("2/pending-tasks", "tasks"),
        ("1/profile-feed", "items", picture, done),
        ("1/profile-feed?limit=1", "items", picture),
        ("2/profile-feed", "items"),
    ):
        answer = (await w.get(f"/v1/tokens/{path}")).json
        assert [task["id"] for task in answer.pop(name)] == ids
        assert answer == {"success": True, "token_id": int(path[0]), "count": len(ids)}
    for video_id, state in ((going, "in_progress"), (done, "completed")):
        video = await shown(w, video_id, state)
        task = (await w.get(f"/v1/tokens/1/tasks/{video_id}")).json["task"]
        outputs = task.pop("generations")
        assert task.pop("title") and task.pop("progress_pct") == video["progress"] / 100
        assert task == {"id": video_id, "status": state, "prompt": video["prompt"]}
    assert not w.fault.seen
    w.fault = None
    assert [(await w.fetch(output["url"])).body for output in outputs] == [file_of(w, done)]
    wrong = [f"2/tasks/{done}", "1/tasks/video_0123", f"9/tasks/{going}"]
    for path in (*wrong, "9/pending-tasks", "9/pending-tasks-v2", "9/profile-feed"):
        code = "not_found" if path[0] == "9" else "task_not_found"
        expect_error(w, await w.get(f"/v1/tokens/{path}"), code)


# ---- OpenAI's own client ----


@pytest.fixture
def openai():
    return pytest.importorskip("openai", reason="NOT TESTED: pip install openai to do so")


@pytest.fixture
async def sdk(openai, world):
    """A world, and OpenAI's client of it."""
    w = await world()
    async with openai.AsyncOpenAI(base_url=f"{w.url}/v1", api_key=w.key) as client:
        yield w, client


async def test_openais_client_lists_models_and_reads_a_chat_whole_and_in_a_stream(sdk):
    w, client = sdk
    listed = [model async for model in client.models.list()]
    assert {"veo_3_1-fast", "omni_flash", "nano_banana_pro-4K"} <= {model.id for model in listed}
    for model in listed[::20]:
        assert await client.models.retrieve(model.id) == model
        assert (model.object, type(model.created)) == ("model", int) and model.owned_by
    w.live.put("file", "cache.enabled", True, "test")
    chat = client.chat.completions
    body = chat_body("omni_flash-4s", "a boat", [DATA]) | {"n": 2}
    answers = [await chat.create(**body)]
    async with chat.stream(**body, stream_options={"include_usage": True}) as events:
        chunks = [event.chunk async for event in events if event.type == "chunk"]
        answers.append(await events.get_final_completion())
    assert (chunks[-1].choices, chunks[-1].usage.total_tokens) == ([], 0)
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    assert "generating" in "".join(getattr(d, "reasoning_content", "") for d in deltas)
    links = []
    for answer in answers:
        (choice,) = answer.choices
        assert (answer.model, choice.finish_reason) == ("omni_flash-4s", "stop")
        links += dict.fromkeys(links_in(choice.message.content))
    assert [(await w.fetch(link)).body for link in links] == files_at_flow(w) and len(links) == 4


async def test_openais_client_makes_and_edits_pictures(sdk, openai, tmp_path):
    w, client = sdk
    images = client.images
    (tmp_path / "a.png").write_bytes(PNG)
    three = [PNG, tmp_path / "a.png", ("b.jpg", PNG, "image/jpeg")]
    edit = functools.partial(images.edit, image=three)
    for kind, make in (("generation", images.generate), ("edit", edit)):
        answer = await make(prompt=kind, n=2, model="gpt-image-1", size="1536x1024")
        events = [event async for event in await make(prompt=kind, n=2, stream=True)]
        assert len(answer.data) == len(events) == 2
        pictures = [base64.b64decode(item.b64_json) for item in (*answer.data, *events)]
        assert pictures == files_at_flow(w, kind)
        assert len(w.asked("uploadImage")) == (6 if make is edit else 0)
        usage = dict.fromkeys(("input_tokens", "output_tokens", "total_tokens"), 0)
        usage["input_tokens_details"] = {"image_tokens": 0, "text_tokens": 0}
        told = {"type": f"image_{kind}.completed", "usage": usage, "output_format": "png"}
        told |= {"background": "opaque", "quality": "auto", "size": "auto"}
        for event in events:
            assert told.items() <= event.to_dict().items()
            assert type(event.created_at) is int and "url" not in event.to_dict()
        with pytest.raises(openai.APIError, match="content policy"):
            await anext(aiter(await make(prompt="unsafe", stream=True)))
    for image in three:
        w.flow.calls.clear()
        (made,) = (await images.edit(image=image, prompt="x", response_format="url")).data
        assert submitted(w)[1] == [PNG]
        assert (await w.fetch(made.url)).body == files_at_flow(w, "x")[-1]


async def test_openais_client_follows_clips_to_their_end_lists_and_deletes_them(sdk, openai):
    w, client = sdk
    videos = client.videos
    boat = {"prompt": "a boat", "model": "omni_flash", "seconds": "4", "size": "1280x720"}
    raw = await videos.with_raw_response.create(input_reference=PNG, **boat)
    video = raw.parse()
    assert raw.headers["openai-poll-after-ms"] == "5000"
    assert (video.object, video.status, video.progress) == ("video", "queued", 0)
    assert boat.items() <= video.to_dict().items()
    video = await videos.poll(video.id, poll_interval_ms=20)
    assert (video.status, video.progress, video.error) == ("completed", 100, None)
    assert type(video.created_at) is type(video.completed_at) is int
    ((body,), (upload,)) = w.asked("AsyncGenerateVideo"), w.asked("uploadImage")
    assert base64.b64decode(upload["imageBytes"]) == PNG
    assert body["requests"][0]["videoModelKey"] == "abra_i2v_4s"
    content = await videos.download_content(video.id)
    assert content.response.headers["Content-Type"] == "video/mp4"
    assert [content.read()] == files_at_flow(w)
    thumbnail = await videos.download_content(video.id, variant="thumbnail")
    assert thumbnail.read() == flow2api.block_picture("a boat", 320, 180)
    deleted = (await videos.delete(video.id)).to_dict()
    assert deleted == {"id": video.id, "object": "video.deleted", "deleted": True}

    clip = await videos.create_and_poll(prompt="a boat", size="1280x720", poll_interval_ms=20)
    by_id = {"video": openai.omit, "extra_body": {"video": {"id": clip.id}}}
    remix = await videos.remix(clip.id, prompt="x")
    edit = await videos.edit(prompt="x", **by_id)
    longer = await videos.extend(prompt="x", seconds="8", **by_id)
    for video in (remix, edit, longer):
        video = await videos.poll(video.id, poll_interval_ms=20)
        assert (video.remixed_from_video_id, video.status) == (clip.id, "completed")
        assert (video.prompt, video.size) == ("x", "1280x720")
    keys = [body["requests"][0]["videoModelKey"] for body in w.asked("AsyncGenerate")[2:]]
    assert sorted(keys) == ["abra_edit", "abra_edit", "veo_3_1_extend_fast_landscape"]
    ids = [video.id for video in (clip, remix, edit, longer)]
    page = await videos.list(limit=3)
    assert [len(one.data) async for one in page.iter_pages()] == [3, 1]
    assert [video.id async for video in videos.list(limit=1)] == ids[::-1]
    assert [video.id async for video in videos.list(limit=3, order="asc")] == ids
    assert [video.id async for video in videos.list(after=ids[2])] == ids[1::-1]


async def test_openais_client_raises_the_right_error_of_what_it_sends_once(sdk, openai, looks):
    w, client = sdk
    orders = [ways("a boat")[name] for name in ("picture", "edited picture", "clip", "chat")]
    faults = {"submit_unknown": dropped, "captcha_required": CAPTCHA}
    for (path, body), code in itertools.product(orders, faults):
        w.token.paused_until = 0
        w.fault = fault(PAID, faults[code])
        with pytest.raises(openai.APIStatusError) as caught:
            await client.post(w.url + path, body=body, cast_to=object)
        assert (caught.value.code, len(w.fault.seen)) == (code, 1), path
    assert len(w.store.jobs()) == 8

    w.fault, w.token.paused_until = None, 0
    video = await client.videos.create_and_poll(prompt="unsafe", poll_interval_ms=20)
    assert (video.status, video.error.code) == ("failed", "content_policy_violation")
    assert "content policy" in video.error.message
    chat, unsafe = client.chat.completions.create, chat_body("veo_3_1-fast", "unsafe")
    create, change, edit = client.videos.create, client.videos.edit, client.images.edit
    for error, call, options in (
        ("401 invalid_api_key", client.with_options(api_key="sk-wrong").models.list, {}),
        ("400 content_policy_violation", chat, unsafe),
        ("400 content_policy_violation", client.videos.download_content, {"video_id": video.id}),
        ("400 invalid_image", create, BOAT | {"input_reference": b"no picture"}),
        ("400 unsupported_parameter", edit, BOAT | {"image": PNG, "mask": PNG}),
        ("400 invalid_request", change, BOAT | {"video": b"an upload"}),
    ):
        with pytest.raises(openai.APIStatusError) as caught:
            await call(**options)
        assert f"{caught.value.status_code} {caught.value.code}" == error
    with pytest.raises(openai.APIError, match="content policy"):
        async for _ in await chat(**unsafe, stream=True):
            pass
    assert len(w.paid()) == 3


# ---- Admin API ----


async def log_in(w):
    """-> do("PUT tokens/1", 200, remark="x"): calls /api with a session, expects the status
    -> the answer; of a refusal its text."""
    ask = await w.owner()

    async def do(call, status=200, **fields):
        method, path = call.split()
        reply = await ask(method, f"/api/{path}", fields or None)
        if status != 200:
            return expect_detail(reply, status)
        assert reply.status == 200, (call, reply)
        assert type(reply.json) is list or reply.json["success"] is True, (call, reply)
        return reply.json

    return do


async def owner_of(world, *accounts):
    """-> a world, and what its owner may do."""
    w = await world(accounts or ((PRO, 1000),))
    return w, await log_in(w)


def shaped(answer, shape):
    """Whether an answer has these fields, with these values, or of these types."""
    return all(shape[name] in (answer[name], type(answer[name])) for name in shape)


def send_login(w, path="/api/login", **fields):
    return w.post(path, {"username": "admin", "password": w.password} | fields)


async def test_a_session_is_for_those_who_know_the_password_and_ends_unused(world, clock):
    w, one = await owner_of(world)
    wrong = [{"password": text} for text in ("wrong", "", None, "\ud83d", {})]
    for fields in (*wrong, {"username": "root"}, {"username": ["admin"]}, {"username": None}):
        reply = await send_login(w, **fields)
        expect_detail(reply, 401)
        assert "token" not in reply.json and "Set-Cookie" not in reply.headers, fields
    expect_detail(await w.post("/api/login", []))
    two = await log_in(w)
    for clock.ahead in (6 * 86400, 12 * 86400, 18 * 86400):
        await one("GET stats")
        await w.restart()
    await two("GET stats", 401)  # unused for seven days
    for path in ("logout", "admin/logout"):
        leaver = await log_in(w)
        await leaver(f"POST {path}")
        await leaver("GET stats", 401)
    two = await log_in(w)
    change = {"old_password": w.password, "new_password": "another one", "username": "root"}
    await two("POST admin/change-password", **change)
    for do in (one, two):
        await do("GET stats", 401)
    await w.restart()
    expect_detail(await send_login(w, username="root"), 401)
    w.password = "another one"
    reply = await send_login(w, "/api/admin/login", username="root")
    cookie = set(reply.headers["Set-Cookie"].split("; "))
    assert reply.status == 200 and {"HttpOnly", "SameSite=Strict", "Path=/"} <= cookie
    assert w.live["global.admin_password"].startswith("scrypt$")


async def test_guessing_is_slowed_per_address_and_in_total(world, clock):
    """Addresses as a proxy on this machine tells them: the last one counts. Who has logged in
    from an address before is never shut out there."""
    w, delays = await world(), []

    async def log(address, password="wrong"):
        login = {"username": "admin", "password": password}
        reply = await w.post("/api/login", login, headers={"X-Forwarded-For": address})
        return reply.status, int(reply.headers.get("Retry-After", 0))

    assert await log("8.8.8.8", w.password) == (200, 0)
    for _ in range(9):
        expect_detail(await send_login(w, password="x"), 401)
    do = await log_in(w)  # a login that succeeds forgets the failures before it
    change = {"old_password": "x", "new_password": "12345678"}
    for _ in range(10):
        await do("POST admin/password", 400, **change)
    await do("POST admin/password", 429, **change | {"old_password": w.password})
    expect_detail(await send_login(w, "/api/admin/login"), 429)
    await do("GET stats")
    clock.ahead = 901
    replies = await asyncio.gather(*(send_login(w, password="x") for _ in range(20)))
    assert sorted(reply.status for reply in replies) == [401] * 10 + [429] * 10
    for number in range(60):
        status, delay = await log(f"1.1.1.{number}, 9.9.9.9:{number}, ::ffff:127.0.0.1")
        delays += [delay] if status == 429 else []
        clock.ahead += delay * (len(delays) < 5)
    assert len(delays) > 4 and delays[0] == 1 and delays[:5] == sorted({*delays[:5]}), delays
    assert (await log("9.9.9.9", w.password))[0] == 429
    for number in range(150):
        await log(f"10.{number}.0.1, [::{number}]:1")
    assert (await log("4.4.4.4", w.password))[0] == 429  # so many are too many in total
    assert await log("8.8.8.8", w.password) == (200, 0)
    clock.ahead += 86400
    assert await log("4.4.4.4", w.password) == (200, 0)


CALLS = r"""
200 proxy/config config/proxy | proxy_url "socks5://u:p@x:1" "http://host" "socks5h://[::1]:1080"
200 cache/config cache/enabled admin/debug | enabled true
200 config/generation generation/timeout | image_timeout 90 ; video_timeout 90
200 cache/config cache/base-url | base_url "https://me.example"
200 cache/config | timeout 90
200 token-refresh/config token-refresh/enabled | enabled false
200 token-refresh/config | at_auto_refresh_enabled false ; interval 120
200 admin/config | error_ban_threshold 9 ; admin_username "root" ; debug_enabled true
200 admin/config | api_key "sk-000"
200 admin/apikey | new_api_key "sk-000"
200 plugin/config | connection_token "0123456789abcdef" ; auto_enable_on_update false
200 settings | flow.poll_interval 0.5 ; chat.video_content "html" ; global.admin_username "root"
200 settings | flow.api_base_url "http://127.0.0.1:9"
400 tokens | st null "" 5 "a\r\nb" "ключ"
400 tokens PUT/tokens/1 | remark 5 ; proxy_url {} "ftp://x" ; video_enabled "yes" ; image_enabled 1
400 tokens PUT/tokens/1 | image_concurrency "2" -2 ; video_concurrency true ; use_count 1000000000
400 tokens/import tokens/batch-add | tokens "x" {} null
400 config/proxy | proxy_url 5 "ftp://x" ; proxy_enabled "yes" 2 [] {}
400 generation/timeout | image_timeout 0 -1 "x" 1.5 true 1e9 [] ; video_timeout 0 ; nothing 1
400 cache/config | base_url "ftp://x" "javascript:alert(1)" 5 ; timeout -1 "abc" {} 1000000000
400 cache/enabled admin/debug config/proxy token-refresh/enabled | enabled "yes" 5 ; nothing 1
400 token-refresh/config | enabled "no" 5 ; interval 1 "x" ; at_auto_refresh_enabled "no"
400 admin/config | error_ban_threshold 0 -1 "x" ; debug_enabled "x" ; nothing 1
400 proxy/config proxy/test PUT/tokens/1 | proxy_url "socks5://h" "SOCKS5://h:1" "http://a..b"
400 proxy/config PUT/tokens/1 | proxy_url "socks5://a..b:1" "\u0020socks5://h:1"
400 settings | server.host "x!" "" ; server.data_dir "/elsewhere" ; flow.api_base_url "" "x" 5
400 proxy/config config/proxy | proxy_enabled true
400 config/proxy | enabled true
400 PUT/tokens/1 PUT/tokens/1/status settings | {}
400 PUT/tokens/1/status | is_active null ; is_activ false
400 PUT/tokens/1 | credits 5 ; session_token "x" 5
400 admin/apikey | new_api_key null "han1234" "your-api-key"
400 admin/password | new_password "your-password" "your_password"
400 admin/apikey | new_api_key "a…secret" "" "12345" "ключ-ключ" "a\u0020blank" 5 ; nothing 1
400 admin/password | old_password "x" ; new_password "short" "" null 12345678
400 plugin/config | connection_token "short" "a\u0020blank_0123456789" 5 ; auto_enable_on_update "x"
400 settings | flow.poll_interval 0 "x" 1e9 [] ; chat.video_content "x" 5 ; no.such null 1
400 settings | global.admin_username "\u0020" "" 5 ; global.admin_password "a-new-password"
400 tokens/batch-test?only_active=x GET/logs?limit=x GET/logs?limit=-1 GET/jobs?limit=x
400 GET/jobs?limit=0 GET/jobs?state=x GET/jobs?token_id=x
404 tokens/x/test DELETE/tokens/99999999999999999999 DELETE/tokens/NINES GET/jobs?after=x
405 DELETE/stats DELETE/tokens
400 call-logic/config | call_mode "polling"
400 captcha/config | captcha_method "browser" ; yescaptcha_api_key "x"
400 cache/config | max_size 5
501 tokens/rt2at tokens/batch-activate tokens/1/sora2/activate?invite_code=A GET/cloudflare/state
"""


def calls_of(*statuses):
    """-> (method and path, body, status) of the table's calls that have one of these."""
    for status, path, body in requests_in(CALLS.replace("NINES", "9" * 5000)):
        if int(status) in statuses:
            call = path if re.match("(GET|PUT|DELETE)/", path) else f"POST/{path}"
            yield call.replace("/", " ", 1), body, int(status)


JUNK = r'{} [[]] "\u0000" "\ud83d" -1 1000000000000000000000 1.5 true ["x",5,null,{}]'
CHANGES = [call for call in ADMIN_CALLS if call[0] in ("POST", "PUT")]


@pytest.mark.parametrize(("method", "path", "role"), CHANGES)
async def test_junk_in_an_admin_request_is_no_bug_of_ours(world, method, path, role):
    w = await world()
    w.live.put("file", "plugin.connection_token", "connection token", "test")
    fields = re.findall("[a-z_.]+", f"session_token username password is_active {CALLS}")
    values = [*map(json.loads, JUNK.split()), "x" * 5000]
    texts = [json.dumps(dict.fromkeys(fields, value)) for value in values]
    texts += ["", "{", "[]", "null", "5", '"x"', "[" * 9999, '{"a":NaN}', b"\xff"]
    for text in texts:
        w.app[flow2api.SESSIONS].guesses.clear()
        key = "connection token" if role == "PUBLIC" else await w.admin()
        headers = {"Content-Type": "application/json"}
        url = path.replace("999", "1")
        reply = await w.call(method, url, key=key, headers=headers, data=text)
        assert reply.status != 500, text
        assert reply.json["success"] or type(reply.json["detail"]) is str, text
    do = await log_in(w)
    for name in ("tokens", "settings", "jobs", "logs", "admin/config"):
        await do(f"GET {name}")  # nothing was poisoned


def in_force(w):
    return {name: w.live[name] for name in flow2api.SETTINGS}


async def test_settings_are_stored_and_survive_a_restart_and_what_is_wrong_changes_nothing(world):
    w = await world(**{"plugin.connection_token": "x" * 16})
    do = await log_in(w)
    st = w.flow.add_account("new@example.com", PRO, 100)
    password = {"old_password": w.password, "new_password": "x" * 8}
    good = {"POST tokens": {"st": st}, "POST admin/password": password}

    def everything():
        tokens = [flow2api.token_object(token) for token in w.pool.tokens.values()]
        return in_force(w), w.store.settings().keys(), tokens, len(w.flow.calls)

    before = everything()
    for call, body, status in calls_of(400, 404, 405, 501):
        await do(call, status, **good.get(call, {}) | body)
        assert everything() == before, (call, body)
    before = in_force(w)
    for call, body, _ in calls_of(200):
        await do(call, **body)
        if call != "POST settings":
            await do(call, 400, **dict.fromkeys(body))  # null says nothing to save
        ((name, new),) = in_force(w).items() - before.items()
        answer = await do(call.replace("POST", "GET"))
        shown = {} if call == "POST settings" else body
        assert shaped(answer, shown) and shaped(answer.get("config", {}), shown)
        await w.restart()
        assert in_force(w) == before | {name: new} and [new] == list(body.values()), (call, body)
        await do("POST settings", **{name: None})
        assert in_force(w) == before
    w.live.put("environment", "cache.timeout", 99, "test")
    assert "environment" in await do("POST cache/config", 409, timeout=5, enabled=True)
    assert in_force(w) == before | {"cache.timeout": 99}


async def test_switches_take_effect_at_once(world, impatient, monkeypatch, caplog):
    w, do = await owner_of(world)
    await do("POST cache/config", enabled=True, base_url="https://me.example/x/")
    (link,) = links_in((await w.chat("nano_banana_pro")).content)
    assert link.startswith("https://me.example/x/tmp/")
    await do("POST generation/timeout", video_timeout=1)
    w.flow.video_seconds = 60
    expect_error(w, await w.chat(), "generation_timeout")
    await do("POST admin/apikey", new_api_key="sk-another")
    expect_error(w, await w.chat(), "invalid_api_key")
    w.key = "sk-another"
    await do("POST proxy/config", proxy_enabled=True, proxy_url="http://u:canary@127.0.0.1:9")
    assert (await w.chat("nano_banana_pro")).status == 502
    assert "canary" not in await do("POST proxy/test", 502, proxy_url=None) + caplog.text
    await do("POST proxy/config", proxy_enabled=False, proxy_url="")
    assert (await do("POST proxy/test", proxy_url=None))["status_code"] == 404
    w.live.put("file", "proxy.proxy_url", "http://127.0.0.1:9", "test")  # it stands behind
    await do("POST settings", **{"proxy.proxy_enabled": True, "proxy.proxy_url": None})
    await do("POST settings", **{"proxy.proxy_enabled": None})
    caplog.set_level(logging.INFO)
    for enabled in (True, False):
        caplog.clear()
        await do("POST admin/debug", enabled=enabled)
        await w.chat("nano_banana_pro")
        assert ("batchGenerateImages" in caplog.text) == enabled
    await do("POST token-refresh/enabled", enabled=False)
    w.token.update(checked_at=0, asked_at=0)
    w.flow.calls.clear()
    pauses = []
    sleep = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda s, *_: pauses.append(s) or sleep(s))
    await until(lambda: pauses.count(30) > 1)  # the loop that checks accounts has turned
    assert not w.flow.calls
    await do("POST token-refresh/enabled", enabled=True)
    await until(lambda: w.flow.calls)


async def test_a_token_is_added_as_people_paste_it_and_renewed_by_a_new_session(world):
    """And the extension brings sessions with its own key."""
    w = await world(accounts=())
    do = await log_in(w)
    st = w.flow.add_account("new@example.com", ULTRA, 777)
    fields = {"remark": "mine", "video_enabled": False, "project_name": "Boats"}
    pasted = f"__Secure-next-auth.session-token={st}; other=1"
    added = (await do("POST tokens", st=pasted, **fields))["token"]
    about = {"email": "new@example.com", "credits": 777, "project_name": "Boats"}
    assert shaped(added, about | {"id": 1, "project_id": str})
    assert shaped(dataclasses.asdict(w.token), fields | {"st": st, "tier": ULTRA})
    assert w.asked("createProject")[0]["json"]["projectTitle"] == "Boats"
    await do("POST tokens", 409, st=st)
    assert [token.email for token in w.store.tokens()] == ["new@example.com"]
    w.flow.calls.clear()
    st = w.flow.add_account("new@example.com", PRO, 500)
    renewed = (await do("POST tokens", st=st, project_id="my-project"))["token"]
    assert (renewed["id"], w.token.st) == (added["id"], st)
    await w.chat("nano_banana_pro")
    assert not w.asked("createProject") and w.asked("my-project")
    path = "/api/plugin/update-token"
    body = {"session_token": w.flow.add_account("another@example.com", PRO, 5)}
    for headers in ({}, {"Authorization": ""}):
        expect_detail(await w.post(path, body, key="x", headers=headers), 401)
    key = "k" * 16
    shown = await do("POST plugin/config", connection_token=key)
    assert shown["connection_url"] == w.url + path
    assert shaped(shown, {"pairing_link": f"{w.url}/#{key}", "last_call": None})
    for action, reason, enabled, active in (
        ("added", "", False, True),
        ("updated", "ended", True, True),
        ("updated", "", True, False),  # by hand: no browser enables that
        ("updated", "ended", False, False),
    ):
        if action == "updated":
            await w.pool.update(w.pool.tokens[2], is_active=False, reason=reason)
            await do("POST plugin/config", auto_enable_on_update=enabled)
            body["session_token"] = w.flow.add_account("another@example.com", PRO, 5)
        answer = (await w.post(path, body, key=key)).json
        about = {
            "action": action,
            "auto_enabled": enabled and active,
            "email": "another@example.com",
        }
        assert shaped(answer, about)
        assert w.pool.tokens[2].is_active == active
    expect_detail(await w.post(path, {}, key=key))
    assert (await w.get("/api/tokens", key=key)).status == 401
    await w.restart()
    about = {"last_call": str, "last_account": "another@example.com"}
    made = await do("POST plugin/config", connection_token="")  # that is a new one
    assert shaped(made, about)
    assert re.fullmatch("[0-9A-Za-z]{32,}", made["connection_token"])
    expect_detail(await w.post(path, body, key=key), 401)
    await w.restart()
    again = await do("GET plugin/config")
    assert again["connection_token"] == made["connection_token"]
    assert (await w.post(path, body, key=made["connection_token"])).status == 200


SESSION = "eyJhbGciOiJkaXIi..a-b_c.d"
HALVES = [{"name": "NAME.1", "value": SESSION[9:]}, {"name": "NAME.0", "value": SESSION[:9]}]
EXPORT = [{"name": "SID", "value": "x"}, {"value": SESSION, "name": "NAME", "path": "/"}]
PASTED = (
    *("VALUE", ' "VALUE"\n', "NAME=VALUE", "NAME: VALUE", "NAME\nVALUE", '"NAME": "VALUE",'),
    *("next-auth.session-token=VALUE;", 'Cookie: a=x%40y; NAME="VALUE"; _ga=GA1.1'),
    *("NAME\tVALUE\tlabs.google\t/\t2026-12-01", "curl 'https://labs.google' -b 'a=b; NAME=VALUE'"),
    "# Netscape\n.google\tTRUE\t/\tTRUE\t17\tSID\tx\n#HttpOnly_labs.google\tx\tNAME\tVALUE\n",
    *map(json.dumps, (EXPORT, EXPORT[::-1], {"cookies": EXPORT}, {"NAME": SESSION}, HALVES)),
    f"NAME.0={SESSION[:9]}; _ga=1; NAME.1={SESSION[9:]}",
)
NO_SESSIONS = {  # what is told, and of what
    "access token": ("ya29.a0A", "Bearer ya29.a0A", '{"token": "ya29.a0A"}', "NAME=ya29.abcde"),
    "e-mail": ("somebody@example.com",),
    "cookie is not in this": (
        *("SID=g.a000-abcdef", "__Host-next-auth.csrf-token: abcdef", "Cookie: SID=a; HSID=bcdefg"),
        *(json.dumps(EXPORT[:1]), ".g\tTRUE\t/\tTRUE\t1\tSID\tabcdefgh", "https://labs.google/fx"),
        *("[" * 99999, '{"name":' * 9999),
    ),
    "the cookie's name": ("NAME", "NAME=", "NAME=; SID=abcdefghi", '{"name": "NAME", "value": ""}'),
    "in parts": (f"NAME.0={SESSION}", "NAME.1=VALUE; NAME.2=VALUE", json.dumps(HALVES[:1])),
    "odd characters": ("eyJhbGciOi\nJkaXIi", "eyJh…aXIi", "ключключключ", "a session token"),
    "too short": ("eyJhbGciO", "NAME=eyJhb"),
    "missing": ("", " ", None, 5, {}),
}


def named(text):
    full = str(text).replace("NAME", flow2api.SESSION_COOKIE).replace("VALUE", SESSION)
    return full if isinstance(text, str) else text


async def test_what_is_pasted_is_looked_at_before_google_is_asked(world):
    """And a session that Google says has ended is a mistake in the request, too."""
    w, do = await owner_of(world)
    for text in map(named, PASTED):
        assert flow2api.read_session_token({"st": text}) == SESSION, text
    w.flow.calls.clear()
    for told, texts in NO_SESSIONS.items():
        for text in map(named, texts):
            assert told in await do("POST tokens", 400, st=text), text
    assert not w.flow.calls and len(w.pool.tokens) == 1
    ended = {"st": "a-session-that-has-ended"}
    for call in ("POST tokens", "PUT tokens/1", "POST tokens/st2at"):
        assert "Sign in to Flow again" in await do(call, 400, **ended)
    answer = await do("POST tokens/import", tokens=[ended])
    assert "has ended" in answer["errors"][0]
    config = await do("GET plugin/config")
    answer = await w.post("/api/plugin/update-token", ended, key=config["connection_token"])
    assert "has ended" in expect_detail(answer)
    assert shaped(await do("GET plugin/config"), {"last_call": str, "last_account": None})
    assert w.token.is_active and not w.token.failures


async def test_the_extension_comes_as_a_zip_and_asks_for_no_more_than_it_needs(world, monkeypatch):
    w = await world()
    reply = await w.get("/api/plugin/extension.zip", key=await w.admin())
    assert (reply.status, reply.headers["Content-Type"]) == (200, "application/zip")
    with zipfile.ZipFile(io.BytesIO(reply.body)) as archive:
        files = {name.rpartition("/")[2]: archive.read(name) for name in archive.namelist()}
        assert {name.partition("/")[0] for name in archive.namelist()} == {"flow2api-extension"}
    assert files == {path.name: path.read_bytes() for path in EXTENSION.iterdir()}
    manifest = json.loads(files["manifest.json"])
    assert manifest["permissions"] == ["cookies", "storage", "alarms"]
    assert manifest["host_permissions"] == ["https://labs.google/*"]
    monkeypatch.setattr(flow2api, "__file__", str(w.data / "flow2api.py"))
    reply = await w.get("/api/plugin/extension.zip", key=await w.admin())
    assert "extension/" in expect_detail(reply, 404)


# What the original's page reads of an account (contract.md A.2).
TOKEN = {
    **dict.fromkeys(("is_active", "image_enabled", "video_enabled"), bool),
    **dict.fromkeys(("st", "at", "token", "email", "name", "at_expires", "user_paygate_tier"), str),
    **dict.fromkeys(("remark", "created_at", "current_project_id", "current_project_name"), str),
    **dict.fromkeys(("id", "credits", "use_count", "error_count"), int),
    **dict.fromkeys(("image_count", "image_concurrency", "video_count", "video_concurrency"), int),
}


async def test_what_is_exported_is_what_the_original_reads_and_imported_without_loss(world):
    w, do = await owner_of(world, (PRO, 1000), (ULTRA, 500), (FREE, 50))
    await w.chat("nano_banana_pro")
    edit = {"remark": "ключ", "video_enabled": False, "image_concurrency": 2}
    await do("PUT tokens/1", is_active=False, **edit)
    kept = set(TOKEN) - {"id", "at", "token", "at_expires", "created_at"}

    async def kept_of():
        return [{name: row[name] for name in kept} for row in await do("GET tokens")]

    exported = await do("GET tokens")
    before = await kept_of()
    for row, token in zip(exported, reversed(w.pool.tokens.copy().values()), strict=True):
        assert shaped(row, TOKEN | {"token": row["at"], "st": token.st, "email": token.email})
        await do(f"DELETE tokens/{row['id']}")
    for added, updated in ((3, 0), (0, 3)):
        junk = [5, None, {}, {"st": "a-session-that-ended", "email": "d@x"}]
        result = await do("POST tokens/import", tokens=[*reversed(exported), *junk])
        assert shaped(result, {"added": added, "updated": updated, "failed": 4})
        assert len(result["errors"]) == 4 and "d@x: " in result["errors"][3]
        assert await kept_of() == before
    for proxy in ("http://u:p@x:1", ""):  # what is not named stays
        rows = [{"session_token": row["st"], "proxy_url": proxy} for row in exported]
        await do("POST tokens/import", tokens=rows)
        assert {row["proxy_url"] for row in await do("GET tokens")} == {proxy}
        assert await kept_of() == before
    new = w.flow.add_account("new@example.com", PRO, 1)
    result = await do("POST tokens/batch-add", tokens=[exported[0]["st"], new])
    assert [row["status"] for row in result["details"]] == ["updated", "added"]
    again = await do("POST tokens/batch-add", tokens=["a-session-that-ended", new])
    failed, updated = again["details"]
    assert (failed["status"], updated["status"]) == ("failed", "updated")
    odd = await do("POST tokens/import", tokens=[{"email": ["x"], "st": "odd"}])
    assert shaped(odd["details"][0], {"status": "failed", "email": ""})
    assert "Sign in to Flow again" in failed["reason"]
    assert result["details"][1]["token_id"] == 7  # an id is never given twice


async def test_all_accounts_at_once(world):
    w, do = await owner_of(world, (PRO, 1), (PRO, 1), (PRO, 1))
    one, two, _ = w.pool.tokens.values()

    async def expect(call, *active, **counters):
        answer = await do(call.replace(" ", " tokens/batch-"))
        counts = {name: count for name, count in answer.items() if type(count) is int and count}
        assert counts == counters
        assert [token.is_active for token in w.pool.tokens.values()] == [*active]

    await w.pool.update(one, is_active=False)
    del w.flow.accounts[two.st]
    two.at = ""
    await expect("POST test", False, False, True, valid=1, invalid=1, auto_disabled=1)
    every = "POST test?only_active=false"
    await expect(every, True, False, True, valid=2, invalid=1, auto_enabled=1)
    await expect("POST test?only_disabled=true", True, False, True, invalid=1)
    await expect("POST enable", True, True, True, enabled=3)
    await do("PUT tokens/1/status", is_active=False)
    await expect("DELETE delete-disabled", True, True, deleted=1)
    await expect("POST disable", False, False, disabled=2)
    assert len(w.store.tokens()) == 2


async def test_what_a_test_or_refresh_finds_shows_on_the_account(world, impatient, clock):
    """And one that lives again; a new one asks for plan and balance; not so one hiccup."""
    w, do = await owner_of(world)
    (account,) = w.flow.accounts.values()
    w.token.at_expires = 0
    w.fault = fault("auth/session", lambda request: web.json_response({}), times=1)
    assert (await do("POST tokens/1/test"))["token"]["is_active"]
    w.flow.accounts.clear()
    for call in ("test", "refresh-at", "refresh-credits"):
        w.token.at = ""
        await do(f"POST tokens/1/{call}", 503)
        (row,) = await do("GET tokens")
        assert not row["is_active"] and "Sign in to Flow again" in row["reason"]
        await do("POST tokens/import", tokens=[row])  # a backup says no more than that
        assert (await do("GET tokens")) == [row]
        w.flow.accounts[w.token.st] = account
        if call == "test":  # by itself, too
            clock.ahead = 60
            await until(lambda: w.token.is_active)
        row = (await do(f"POST tokens/1/{call}"))["token"]
        assert (row["is_active"], row["reason"], row["reason_code"]) == (True, "", "")
        w.flow.accounts.clear()
    await do("PUT tokens/1/status", is_active=False)  # the owner's own word
    assert (await do("GET tokens"))[0]["reason"] == ""
    account.tier, account.credits = ULTRA, 7
    w.flow.accounts["a.new.session"] = account
    renewed = (await do("PUT tokens/1", st="a.new.session"))["token"]
    assert shaped(renewed, {"is_active": True, "user_paygate_tier": ULTRA, "credits": 7})


BAD_AT_ONCE = (  # what refuses an account that is added, and what is told of it
    (fault("createProject", refusal(403, "PUBLIC_ERROR_USER_REGION")), "USER_REGION"),
    (fault("credits", refusal(403, "PUBLIC_ERROR_USER_REGION")), "USER_REGION"),
    (fault("credits", refusal(429, "PUBLIC_ERROR_QUOTA_REACHED")), "QUOTA_REACHED"),
    (fault("credits", refusal(401)), "fresh access token"),
)


@pytest.mark.parametrize(("answer", "why"), BAD_AT_ONCE)
async def test_an_account_that_google_refuses_is_not_added_as_a_good_one(world, answer, why):
    w, do = await owner_of(world, *())
    w.fault = answer
    added = await do("POST tokens", st=w.flow.add_account("bad@example.com", PRO, 5))
    other = {"st": w.flow.add_account("bad2@example.com", PRO, 5)}
    imported = (await do("POST tokens/import", tokens=[other]))["details"][0]
    for told in (added["message"], added["token"]["reason"], imported["reason"]):
        assert why in told
    for row in (await do("GET tokens"))[:2]:
        assert row["is_active"] and why in row["paused_for"]


async def test_a_moved_account_is_not_added_as_a_good_one(world, clock):
    """It comes back by itself once Google makes projects for it again."""
    w, do = await owner_of(world, *())
    w.fault = fault("createProject", RETIRED)
    st = w.flow.add_account("moved@example.com", PRO, 5)
    key = (await do("GET plugin/config"))["connection_token"]
    plugin = (await w.post("/api/plugin/update-token", {"session_token": st}, key=key)).json
    await do("DELETE tokens/2")
    answer = await do("POST tokens", st=st)
    row = (await do("GET tokens"))[0]
    for told in (plugin["reason"], answer["message"], answer["token"]["reason"], row["reason"]):
        assert "upstream_retired" in told
    assert (row["email"], row["is_active"]) == ("moved@example.com", False)
    moved = w.pool.tokens[row["id"]]
    w.fault, clock.ahead = None, 3700
    await w.pool.ask(moved, flow2api.now())
    assert moved.is_active and moved.project_id


UNMADE = (  # what is refused before there is a job: code, model, fields
    ("no_credits", "veo_3_1", {}),
    ("tier_required", "veo_3_1-4k", {}),
    ("account_throttled", "nano_banana_pro", {}),
    ("queue_full", "veo_3_1-fast", {}),
    ("no_accounts", "veo_3_1-fast", {"is_active": False}),
)


async def test_what_made_no_job_has_its_row_in_the_log_and_among_the_failed(world, clock):
    w, do = await owner_of(world, (PRO, 90))
    await w.chat(text="unsafe")  # a clip that fails at Google counts
    assert (w.token.error_count, (await do("GET stats"))["stats"]["today_errors"]) == (1, 1)
    (failed,) = w.store.jobs()
    throttled = flow2api.GatewayError("account_throttled", "Slower!")
    w.token.pauses["image"] = flow2api.Pause(flow2api.now() + 900, 900, throttled)
    w.live.put("file", "limits.queue", 1, "test")
    w.token.pauses["video"] = flow2api.Pause(flow2api.now() + 30)
    waiting = asyncio.create_task(w.chat())
    await until(lambda: w.pool.queue)
    (running,) = [row for row in await do("GET logs") if row["task_status"] == "queued"]
    assert running["status_code"] == 102  # no 200 before the end
    for code, model, fields in UNMADE:
        await w.pool.update(w.token, **fields)
        expect_error(w, await w.chat(model, f"a boat for {code}"), code)
    await w.end_of(running["id"])  # its account was switched off
    rows = [row for row in await do("GET logs") if row["task_status"] == "failed"]
    jobs = (await do("GET jobs?state=failed"))["jobs"]
    for (code, model, _), row, job in zip(UNMADE[::-1], rows, jobs, strict=False):
        assert code in row["response_body"] and model in row["request_body"]
        assert row["status_code"] == flow2api.ERRORS[code][0]
        about = {"state": "failed", "model": model, "prompt": f"a boat for {code}"}
        assert shaped(job, about | {"cost": 0}) and job["error"]["code"] == code
        assert (await w.get(f"/api/logs/{job['id']}", key=await w.admin())).json == row
    assert [row["id"] for row in rows] == [job["id"] for job in jobs]
    assert [job["id"] for job in jobs[5:]] == [running["id"], failed.id]
    page = await do(f"GET jobs?state=failed&limit=2&after={jobs[3]['id']}")
    assert page["jobs"] == jobs[4:6] and page["has_more"]
    await do(f"DELETE jobs/{jobs[0]['id']}")
    assert (await do("GET jobs?state=failed"))["jobs"] == jobs[1:]
    assert (await do("GET jobs?model=veo_3_1"))["jobs"] == [jobs[4]]
    assert len(w.store.jobs()) == 2
    w.jobs.MOST_REFUSED = 4
    for _ in range(9):
        await w.chat()
    assert len((await do("GET jobs?state=failed"))["jobs"]) == 6
    expect_error(w, await waiting, "no_accounts")


async def test_what_ended_long_ago_goes_a_few_at_a_time(world, impatient, clock):
    w = await world(**{"limits.jobs_days": 0})
    for text in ("a boat", "unsafe", "a cat"):
        await w.chat(text=text)
    plan = flow2api.resolve("veo_3_1-fast")
    old = [flow2api.Job(f"video_{i:03}", "failed", 9.0, plan=plan) for i in range(150)]
    open_one = flow2api.Job("video_open", "running", 9.0, plan=plan)
    await w.store.put(*old, open_one, *(flow2api.Output(job.id, 0, "x") for job in old))
    await asyncio.sleep(0.1)
    assert len(w.store.jobs()) == 154
    await w.store.prune(99)
    assert len(w.store.jobs()) == 54
    w.live.put("file", "limits.jobs_days", 180, "test")
    await until(lambda: len(w.store.jobs()) == 4)
    assert w.store.job("video_open") and not w.store._rows("SELECT * FROM outputs WHERE name='x'")
    clock.ahead = 181 * 86400
    await until(lambda: len(w.store.jobs()) == 1)
    assert w.store._rows("SELECT * FROM request_keys") == []


async def test_jobs_are_listed_logged_cancelled_and_deleted(world, clock):
    w, do = await owner_of(world)
    await w.chat("nano_banana_pro", "A" * 300)  # looks like base64
    await w.chat(text="unsafe")
    bad, good = await do("GET logs?limit=2")
    about = {"token_email": "user1@example.com", "duration": float}
    for row, status, kind in ((good, 200, "image"), (bad, 400, "video")):
        own = {"status_code": status, "operation": f"generate_{kind}", "task_id": row["id"]}
        assert shaped(row, about | own)
        assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", row["created_at"])
        assert (await w.get(f"/api/logs/{row['id']}", key=await w.admin())).json == row
    assert "A" * 200 not in str(good) and "…" in good["request_body"]
    assert "/tmp/" in good["response_body"] and "UNSAFE" in bad["response_body"]
    assert await do("GET logs?limit=1") == [bad]
    await do("DELETE logs")  # the jobs stay
    assert await do("GET logs") == []
    w.token.paused_until = flow2api.now() + 30
    path = f"jobs/{(await w.post(VIDEOS, {'prompt': 'a boat'})).json['id']}"
    queued, failed, picture = (await do("GET jobs"))["jobs"]
    states = [(job["kind"], job["state"]) for job in (queued, failed, picture)]
    assert states == [("video", "queued"), ("video", "failed"), ("image", "completed")]
    for query, *jobs in (
        ("state=queued", queued),
        ("model=nano_banana_pro", picture),
        ("token_id=1", failed, picture),
        ("kind=image", picture),
        ("q=A+BOAT", queued),
        ("q=%25",),
        ("limit=1", queued),
        (f"limit=2&after={queued['id']}", failed, picture),
    ):
        page = await do(f"GET jobs?{query}")
        assert [job["id"] for job in page["jobs"]] == [job["id"] for job in jobs], query
        assert page["has_more"] == (query == "limit=1")
    about = {"cost": 0, "kept": False, "prices": {"free": 0, "Pro": 0, "Ultra": 0}}
    assert shaped(picture, {"account": "user1@example.com"} | about) and picture["urls"]
    cancelled = (await do(f"POST {path}/cancel"))["job"]
    assert shaped(cancelled, {"state": "cancelled", "status": "failed"}) and not w.pool.queue
    assert cancelled["error"]["code"] == "cancelled"
    clock.ahead = 60
    assert (await do(f"GET {path}"))["job"]["duration"] == cancelled["duration"] < 50
    client = asyncio.create_task(w.chat())
    (job,) = await w.running()
    for call in (f"POST jobs/{job.id}/cancel", f"DELETE jobs/{job.id}", "DELETE tokens/1"):
        await do(call, 409)
    await do(f"POST jobs/{failed['id']}/cancel", 409)
    assert (await client).content
    for job in (await do("GET jobs"))["jobs"]:
        await do(f"DELETE jobs/{job['id']}")
    await do("DELETE tokens/1")
    assert (w.store.jobs(), w.store.tokens(), w.pool.tokens) == ([], [], {})


async def test_state_statistics_and_metrics_tell_of_accounts_and_open_jobs(world, clock):
    """The three counters of a day begin anew together."""
    w, do = await owner_of(world, (PRO, 1000), (FREE, 50))
    await do("POST tokens/2/disable")
    await w.chat("nano_banana_pro", n=2)
    w.fault = fault(PAID, CAPTCHA)
    await w.chat()
    w.pool.tokens[1].paused_until = 0
    w.fault = hold("batchCheck")
    video = (await w.post(VIDEOS, {"prompt": "a red boat"})).json
    await w.running()
    state = await do("GET state")
    assert state["tokens"] == (await do("GET tokens?mask=1"))[::-1]
    (job,) = state["jobs"]  # the picture has ended
    about = {"account": "user1@example.com", "state": "running", "prompt": "a red boat"}
    assert shaped(job, about | {"id": video["id"]})
    lines = (await w.get("/metrics")).body.decode().splitlines()
    assert all(re.fullmatch(r'flow2api_\w+(\{\w+="\w+"\})? \d+', line) for line in lines)
    credits = f"flow2api_credits {w.pool.tokens[1].credits}"
    assert {"flow2api_total_images 2", "flow2api_waiting_jobs 0", credits} <= set(lines)
    assert 'flow2api_jobs{state="running"} 1' in lines
    w.fault.release.set()
    await w.end_of(job["id"])
    counts = {"total_tokens": 2, "active_tokens": 1}
    for day in ("total", "today"):
        counts |= {f"{day}_images": 2, f"{day}_videos": 1, f"{day}_errors": 1}
    state = await do("GET state")
    assert (state["jobs"], state["stats"]) == ([], counts)
    for answer in (await do("GET stats"), (await w.get("/v1/stats")).json):
        assert answer == {"success": True, "stats": counts, **counts}
    clock.ahead = 86400
    counts |= {"today_images": 0, "today_videos": 0, "today_errors": 0}
    assert (await do("GET stats"))["stats"] == counts
    w.fault = fault(PAID, refusal(403, "PUBLIC_ERROR_MODEL_ACCESS_DENIED"), times=1)
    for what in ("error", "image"):
        await w.chat("nano_banana_pro")
        counts |= {f"today_{what}s": 1, f"total_{what}s": counts[f"total_{what}s"] + 1}
        assert (await do("GET stats"))["stats"] == counts
    costs = [job["cost"] for job in (await do("GET jobs"))["jobs"]]
    for number in (1, 2):
        await do(f"DELETE tokens/{number}")
    await w.restart()
    assert [job["cost"] for job in (await do("GET jobs"))["jobs"]] == costs and any(costs)
    expect_detail(answer := await w.get("/api/jobs?token_id=1", key=await w.admin()))
    assert "must be left out" in answer.json["detail"]


async def test_no_masked_answer_holds_a_secret_and_an_edit_asks_google_nothing(world):
    """It clears what is empty."""
    w, do = await owner_of(world)
    await do("PUT tokens/1", proxy_url="http://user:canary@127.0.0.1:9")
    await do("POST plugin/config", connection_token="connection-canary")
    await do("POST proxy/config", proxy_url="http://user:canary@x:1")
    assert w.token.st in str(await do("GET tokens"))
    assert w.key in str(await do("GET admin/config"))
    hidden = [*w.secrets(), "canary"]
    session = await w.admin()
    for path in [path for method, path, _ in ADMIN_CALLS if method == "GET"]:
        reply = await w.get(f"{path}?mask=1", key=session)
        text = f"{reply.headers}{reply.body.decode(errors='replace')}"
        assert not [secret for secret in hidden if secret in text], path
    before = in_force(w)
    for path in ("plugin/config", "proxy/config", "admin/config"):
        shown = (await do(f"GET {path}?mask=1"))["config"]
        fields = {name: shown[name] for name in flow2api.CONFIGS[path]}
        assert "…" in str(fields)
        await do(f"POST {path}", **fields)  # as it was shown
    assert in_force(w) == before
    rows = {row["name"]: row for row in (await do("GET settings"))["settings"]}
    row = {"value": 7200, "default": 7200, "low": 0, "choices": [], "source": "default"}
    assert shaped(rows["cache.timeout"], row)
    stored = b"".join(path.read_bytes() for path in w.data.glob("flow2api.db*"))
    assert session.encode() not in stored
    token = w.token
    expected = flow2api.token_object(token)
    w.flow.calls.clear()
    edit = {"remark": "mine", "image_concurrency": 3, "is_active": False}
    proxy = {"proxy_url": "http://u:p@x:1", "video_enabled": False}
    masked = {"st": flow2api.mask(token.st), "proxy_url": "http://…@x:1", "remark": None}
    for fields, changes in (
        (edit | proxy, edit | proxy),
        ({"project_name": "Boats"}, {"current_project_name": "Boats"}),
        (masked, {}),
        (dict.fromkeys(flow2api.TOKEN_FIELDS) | {"st": token.st}, {}),
        ({"remark": "", "proxy_url": ""}, {"remark": "", "proxy_url": ""}),
        ({"project_id": "", "st": ""}, {"current_project_id": None}),
    ):
        await do("PUT tokens/1", **fields)
        expected |= changes
        assert flow2api.token_object(token) == expected, fields
    assert flow2api.token_object(w.store.tokens()[0]) == expected and not w.flow.calls
    other = w.flow.add_account("other@example.com", PRO, 5)
    assert "other@example.com" in await do("PUT tokens/1", 409, st=other)
    new = w.flow.add_account(token.email, PRO, 5)
    await do("PUT tokens/1", st=new)
    assert (token.st, token.is_active, token.email) == (new, True, "user1@example.com")
    await do("PUT tokens/1", 400, st="a-session-that-ended")
    for call, fields in (
        ("PUT tokens/1/status", {"is_active": True}),
        ("POST tokens/1/enable", {}),
    ):
        await w.pool.update(token, is_active=False, failures=2, reason="refused", paused_until=9e9)
        await do(call, **fields)
        assert (token.is_active, token.failures, token.paused_until) == (True, 0, 0)
        assert (token.st, token.reason) == (new, "")
    tested = {"status": "success", "email": token.email, "credits": 5, "token": dict}
    for call in ("test", "refresh-credits", "refresh-at"):
        assert shaped(await do(f"POST tokens/1/{call}"), tested)
    answer = await do("POST tokens/st2at", st=new)
    assert shaped(answer, {"access_token": str, "expires": str})


# ---- The admin page, in a browser ----

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync
    --disable-background-networking --disable-component-update --remote-debugging-port=0"""


class Page:
    """A page in headless Chromium, driven over its DevTools. asked: the addresses that it
    asked for; troubles: errors, exceptions and violations of its policy in its console."""

    def __init__(self, devtools):
        self.devtools, self.numbers = devtools, itertools.count(1)
        self.asked, self.troubles = [], []

    async def send(self, method, **params):
        number = next(self.numbers)
        await self.devtools.send_json({"id": number, "method": method, "params": params})
        while True:
            event = await self.devtools.receive_json(timeout=30)
            if event.get("id") == number:
                assert "error" not in event, (method, event)
                return event["result"]
            about = event["params"]
            if event["method"] == "Network.requestWillBeSent":
                self.asked.append(about["request"]["url"])
            level = about.get("entry", about).get("level", about.get("type"))
            if level == "error" or event["method"] == "Runtime.exceptionThrown":
                self.troubles.append(about)

    async def eval(self, code):
        """The value of an expression in the page; promises are awaited."""
        options = {"awaitPromise": True, "returnByValue": True, "userGesture": True}
        reply = await self.send("Runtime.evaluate", expression=code, **options)
        assert "exceptionDetails" not in reply, (code, reply)
        return reply["result"].get("value")

    async def wait(self, code):
        """Until an expression is truthy."""
        end = time.monotonic() + 30
        while not await self.eval(f"Boolean({code})"):
            assert time.monotonic() < end, f"{code}\n{self.troubles}"
            await asyncio.sleep(0.05)

    async def use(self, selector, code="true", condition="true"):
        """Runs code with `node`, an element, once it is shown and the condition holds."""
        nodes = f"[...document.querySelectorAll({json.dumps(selector)})]"
        node = f"{nodes}.find((node) => node.checkVisibility() && {condition})"
        await self.wait(node)
        await self.eval(f"((node) => {{ {code} }})({node})")

    async def sees(self, selector, part=""):
        """Until an element is shown, with this in its text."""
        await self.use(selector, condition=f"node.innerText.includes({json.dumps(part)})")

    async def fill(self, selector, value, button):
        """Puts a value into a field, with the events of a person who does; clicks a button."""
        events = "for (const e of ['input', 'change']) node.dispatchEvent(new Event(e))"
        await self.use(selector, f"node.value = {json.dumps(value)}; {events}")
        await self.click(button)

    async def click(self, selector):
        await self.use(selector, "node.click()", "!node.disabled")

    async def log_in(self, url, password):
        await self.send("Page.navigate", url=url)
        await self.fill("[name=password]", password, "[data-act=login]")
        await self.sees("[data-figure=accounts_ok]")

    def expect_clean(self, url):
        """It has asked its own server alone, and nothing went wrong in it."""
        hosts = {flow2api.urlsplit(address).netloc for address in self.asked}
        assert hosts - {""} == {flow2api.urlsplit(url).netloc}
        assert not self.troubles, self.troubles


@contextlib.asynccontextmanager
async def browser(run, tmp_path, *flags):
    """Starts Chromium -> a Page."""
    if not CHROMIUM:
        pytest.skip("NOT TESTED: the admin page and the extension need Chromium (apt: chromium)")
    profile = tmp_path / "chromium"
    await run(CHROMIUM, *FLAGS.split(), *flags, f"--user-data-dir={profile}", "about:blank")
    port = profile / "DevToolsActivePort"
    await until(lambda: port.exists() and "\n" in port.read_text(), 60)
    devtools = f"http://127.0.0.1:{port.read_text().split()[0]}/json"
    async with aiohttp.ClientSession() as http:
        target = await (await http.put(f"{devtools}/new")).json()
        async with http.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as connection:
            page = Page(connection)
            for domain in ("Page", "Network", "Runtime", "Log"):
                await page.send(f"{domain}.enable")
            yield page


@pytest.fixture
async def page(run, tmp_path):
    async with browser(run, tmp_path) as page:
        yield page


async def test_the_page_makes_a_clip_that_plays(page, flow2, run, tmp_path):
    """In the demo: log in, add an account, generate, and watch it; over a reload, too."""
    seconds = {"FLOW2API_DEMO_VIDEO_SECONDS": "1", "FLOW2API_DEMO_IMAGE_SECONDS": "0.1"}
    program = await flow2("--demo", **seconds)
    await page.log_in(program.url, program.said("admin_password"))
    await page.sees("[data-figure=accounts_ok]", "2 / 2")
    await page.click("[data-act=add]")
    await page.sees("dialog code", "__Secure-next-auth.session-token")
    await page.fill("dialog [name=st]", "a-third-session", "dialog [data-act=add]")
    await page.sees("[data-figure=accounts_ok]", "3 / 3")
    await page.eval("location.hash = '#try'")
    await page.sees("[name=model]", "Veo 3.1 Fast · 10–20 credits")
    await page.click("[name=ratio][value=portrait]")
    await page.fill("[name=prompt]", "boats <b>in the rain</b>", "[data-act=generate]")
    await page.wait("document.querySelector('.try [data-job]')")
    await page.send("Page.reload")
    await page.wait("document.querySelector('.try video')?.readyState >= 3")
    await page.use(".try video", "node.scrollIntoView()")  # unseen, it waits
    await page.wait("document.querySelector('.try video').currentTime > 0.2")
    shape = "(({ videoWidth, videoHeight }) => [videoWidth, videoHeight])"
    assert await page.eval(f"{shape}(document.querySelector('.try video'))") == [160, 288]
    await page.click("[name=ratio][value=landscape]")
    await page.click("[data-act=generate]")
    await page.wait("document.querySelector('.try video')?.videoWidth === 288")
    await page.fill("[name=model]", "nano_banana_2", "[name=n][value='2']")
    await page.click("[data-act=generate]")
    await page.wait("document.querySelectorAll('.try .media img').length === 2")
    await page.wait("document.querySelector('.try .media img').naturalWidth > 500")
    await page.sees("[name=model]", "Veo 3.1 Relaxed · costs no credits")
    await page.fill("[name=model]", "veo_3_1_relaxed", "[data-act=generate]")
    free = r"/Relaxed[^]*\b0 credits/.test(node.innerText)"
    await page.use(".try [data-state=completed]", condition=free)
    await page.fill("[name=prompt]", "an unsafe boat", "[data-act=generate]")
    await page.sees(".try .error", "content policy")
    page.expect_clean(program.url)
    for model, name in (("nano_banana_pro", "picture_2.png"), ("omni_flash", "video_*.mp4")):
        await page.fill("[name=model]", model, "[name=n][value='2']")
        await page.fill("[name=prompt]", 'a boat\'s "wake"!', "[name=ratio][value=landscape]")
        command = await page.eval("knownKey().then(views.try.command)")
        await run("bash", "-c", command, cwd=tmp_path)
        await until(lambda name=name: list(tmp_path.glob(name)), 60)


async def test_the_page_has_a_gallery_that_is_searched_and_looked_through(page, world):
    w = await world(video_seconds=0.1)
    for text in ("a boat in the rain", "100 % of a fox"):
        await w.post(IMAGES, {"prompt": text, "n": 2, "model": "nano_banana_2"})
    await w.chat(text="unsafe")
    await page.log_in(f"{w.url}/#jobs", w.password)
    tiles = "document.querySelectorAll('.jobs .job').length"
    await page.wait(f"{tiles} === 3")
    await page.sees("[data-figure=failures_today]", "1 × content policy")
    await page.sees(".jobs .error", "content policy")
    await page.use(".jobs [data-act=open]", "node.click()", "node.innerText.includes('fox')")
    await page.sees(".lightbox", "2 of 5")
    shown = "document.querySelector('.lightbox img')?.naturalWidth > 500"
    for key, place in (("ArrowRight", "3 of 5"), ("ArrowRight", "4 of 5"), ("ArrowLeft", "3 of 5")):
        await page.wait(shown)
        await page.send("Input.dispatchKeyEvent", type="keyDown", key=key)
        await page.sees(".lightbox", place)
    await page.sees(".lightbox aside", "100 % of a fox")
    await page.click(".lightbox figure")  # outside of the picture
    await page.wait("!document.querySelector('.lightbox')")
    for text, number in (("% OF", 1), ("boat", 1), ("", 3)):
        search = f"node.value = {json.dumps(text)}; node.dispatchEvent(new Event('input'))"
        await page.use("[name=q]", search)
        await page.wait(f"{tiles} === {number}")
    await page.click(".jobs [data-act=more]")
    await page.click(".menu [data-act=delete]")
    await page.click("dialog [data-act=delete]")
    await page.wait(f"{tiles} === 2")
    page.expect_clean(w.url)


async def test_the_page_shows_changes_by_itself_and_rests_while_hidden(page, world):
    """And it keeps a setting, and runs nothing of an imported file."""
    w = await world(video_seconds=3600)
    ok = "[data-figure=accounts_ok]"
    await page.log_in(w.url, w.password)
    await page.sees(ok, "1 / 1")
    await page.eval("window.loaded = 'once'")
    second = await w.account(email="second@example.com")
    await page.sees(ok, "2 / 2")
    await page.sees("tbody", "second@example.com")
    await w.pool.update(second, is_active=False)
    await page.sees(ok, "1 / 2")
    await w.post(VIDEOS, {"prompt": "a boat"})
    await page.sees("[data-figure=jobs_running]", "1")
    tab = await page.send("Target.createTarget", url="about:blank")  # before this one
    await page.wait("document.visibilityState === 'hidden'")
    await page.eval("refresh()")  # what was asked before is answered
    asked = len(page.asked)
    await w.pool.update(second, is_active=True)
    await page.eval("new Promise((end) => setTimeout(end, 2100))")  # after its own timer
    assert len(page.asked) == asked
    await page.send("Target.closeTarget", targetId=tab["targetId"])
    await page.sees(ok, "2 / 2")
    assert await page.eval("window.loaded") == "once"
    session = w.flow.add_account(second.email, PRO, 1000)
    await page.click("tbody [data-act=more]")
    await page.click(".menu [data-act=edit]")
    await page.fill("dialog [name=st]", session, "dialog [data-act=save]")
    await page.wait("!document.querySelector('dialog')")
    assert second.st == session
    await page.click("#nav [href='#jobs']")
    await page.click(".jobs [data-act=open]")
    await page.use(".lightbox progress")
    await page.sees(".lightbox aside", "running")
    await page.click(".lightbox [data-act=close]")
    await page.click("#nav [href='#accounts']")
    tags = ("<img src=x onerror=window.loaded=1>", "\"'><svg/onload=window.loaded=1>")
    hostile = sorted([*tags, "长" * 9999])
    items = [{"st": "abcd…wxyz"}]
    for number, text in enumerate(hostile):
        st = w.flow.add_account(f"hostile{number}@example.com", PRO, 1000)
        items.append({"st": st, "email": text, "remark": text, "name": text})
    await page.click("[data-act=import]")
    await page.fill("dialog [name=text]", json.dumps(items), "dialog [data-act=preview]")
    await page.wait("document.querySelectorAll('dialog td.name').length === 4")
    shown = await page.eval("document.querySelector('dialog table').textContent")
    assert all(text in shown for text in hostile)
    await page.click("dialog [data-act=import]")
    remarks = "[...document.querySelectorAll('tbody td.name small')].map((n) => n.textContent)"
    await page.wait(f"!document.querySelector('dialog') && {remarks}.length >= 3")
    assert set(hostile) <= set(await page.eval(remarks))
    assert await page.eval("window.loaded") == "once"
    await page.eval("location.hash = '#settings'")
    field = "[name='generation.video_timeout']"
    await page.fill(field, "1234", "#nav [href='#jobs']")
    await page.wait("!document.querySelector('.savebar').checkVisibility()")
    await page.click("#nav [href='#settings']")
    await page.click(".savebar [data-act=save]")
    await page.sees(".setting [data-act=reset]")
    page.expect_clean(w.url)
    await page.send("Page.navigate", url="about:blank")
    await w.restart()
    page.asked.clear()
    await page.log_in(f"{w.url}/#settings", w.password)
    await page.use(field, condition="node.value === '1234'")
    page.expect_clean(w.url)
    change = {"old_password": w.password, "new_password": "x" * 8}
    await (await log_in(w))("POST admin/password", **change)  # ends the session
    await page.sees("form.login", "This login has ended")


# ---- The companion extension, in a browser ----


class Labs:
    """A throw-away labs.google over TLS, which gives its cookies to whoever opens a page."""

    def __init__(self):
        self.cookies, self.port = {}, 0

    async def page(self, request):
        reply = web.Response(text="Flow")
        for name, value in self.cookies.items():
            age = "" if value else "; Max-Age=0"
            cookie = f"{name}={value}; Path=/; Secure; HttpOnly; SameSite=Lax{age}"
            reply.headers.add("Set-Cookie", cookie)
        return reply


@pytest.fixture
async def labs(run, tmp_path):
    if not shutil.which("openssl"):
        pytest.skip("NOT TESTED: the extension, for lack of a certificate (apt: openssl)")
    files = tmp_path / "certificate.pem", tmp_path / "key.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=labs.google"
    openssl = await run(*command.split(), "-out", files[0], "-keyout", files[1])
    assert await openssl.end() == 0, openssl.log
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*files)
    labs = Labs()
    app = web.Application()
    app.router.add_get("/{_:.*}", labs.page)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
    labs.port = runner.addresses[0][1]
    yield labs
    await runner.cleanup()


@pytest.fixture
async def companion(run, tmp_path, labs):
    """Starts Chromium with the extension -> (a Page, the address of its popup). What a person
    would allow when asked, the gateway's address, is allowed in its manifest."""
    folder = shutil.copytree(EXTENSION, tmp_path / "extension")
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    manifest["host_permissions"].append("http://127.0.0.1/*")
    (folder / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    flags = (
        f"--load-extension={folder}",
        f"--disable-extensions-except={folder}",
        "--disable-features=DisableLoadExtensionCommandLineSwitch",
        f"--host-resolver-rules=MAP labs.google 127.0.0.1:{labs.port}",
        "--ignore-certificate-errors",
    )
    async with browser(run, tmp_path, *flags) as page:
        digest = hashlib.sha256(str(folder).encode()).hexdigest()[:32]
        name = "".join(chr(ord("a") + int(digit, 16)) for digit in digest)
        yield page, f"chrome-extension://{name}/popup.html"


async def test_the_extension_brings_a_session_and_its_successors_and_tells_a_sign_out(
    world, labs, companion, monkeypatch
):
    """And no other cookie leaves the browser."""
    w = await world(accounts=())
    do = await log_in(w)
    page, popup = companion
    sent = []
    read_json = flow2api.read_json

    async def record(request):
        sent.append((request.headers, await read_json(request)))
        return sent[-1][1]

    async def visit(*parts):
        """Opens Flow, which sets the cookie, or its parts, and clears the others."""
        name = flow2api.SESSION_COOKIE
        cookies = dict.fromkeys((name, f"{name}.0", f"{name}.1"), "")
        names = [name] if len(parts) == 1 else list(cookies)[1:]
        labs.cookies = {"SID": "another-cookie"} | cookies | dict(zip(names, parts, strict=False))
        await page.send("Page.navigate", url="https://labs.google/fx/tools/flow")
        await page.sees("body", "Flow")

    async def see(selector, part):
        """Opens the popup, which tells so."""
        await page.send("Page.navigate", url=popup)
        await page.sees(selector, part)

    first, second, third = (
        w.flow.add_account("mine@example.com", PRO, 1000, st=name * 300) for name in "abc"
    )
    await visit(first)
    await page.send("Page.navigate", url=popup)
    await page.fill("[name=link]", w.url, "#pairing button")
    await page.sees("#mistake", "no pairing link")
    assert not sent
    monkeypatch.setattr(flow2api, "read_json", record)
    config = await do("GET plugin/config")
    asks = "chrome.permissions.request = async (permission) => { window.asked = permission; }"
    await page.eval(f"{asks}, 0")
    await page.fill("[name=link]", config["pairing_link"], "#pairing button")
    await page.sees("#account", "mine@example.com")
    await page.sees("#connection", "Connected")
    assert w.token.st == first
    await page.eval("chrome.permissions.contains = async () => false, render()")
    await page.sees("#problem", "does not let this extension")
    assert await page.eval("window.asked") == {"origins": ["https://labs.google/*", f"{w.url}/*"]}
    await w.pool.update(w.token, is_active=False, reason="its session has ended")
    await visit(second[:200], second[200:])
    await until(lambda: w.token.st == second)
    await until(lambda: w.token.is_active)
    w.fault = fault("session", refusal(500))
    await visit(third)
    await see("#problem", "tried again by itself")
    w.fault = None
    await page.eval("chrome.alarms.create('look', { when: Date.now() })")
    await until(lambda: w.token.st == third)
    await see("#connection", "Connected")
    config = await do("GET plugin/config")
    assert shaped(config, {"last_call": str, "last_account": "mine@example.com"})
    await visit("a-session-that-has-ended")
    await see("#problem", "Sign in to Flow again")
    await visit()
    await see("#problem", "signed out")
    await visit(third)
    await page.send("Page.navigate", url=popup)
    await page.click("#add")
    await page.wait("document.querySelector('#problem').hidden")
    assert "another-cookie" not in str(sent)
    assert all(set(body) == {"session_token"} for _, body in sent)
    assert not [headers for headers, _ in sent if "Cookie" in headers]


# ---- The files agree with each other ----

NAMES = ("README.md", "README.zh.md", "docs/api.md", "docs/clients.md")
DOCUMENTS = {name: (REPOSITORY / name).read_text("utf-8") for name in NAMES}
README, CHINESE, API, CLIENTS = DOCUMENTS.values()


def blocks(text, language="", part=""):
    """The blocks of a document in a language that hold this part; without one: set-up commands."""
    bodies = re.findall(r"^```(.*)\n((?:.*\n)*?)^```", text, re.MULTILINE)
    return [body for name, body in bodies if name == language and part in body]


@pytest.mark.parametrize("name", NAMES)
def test_the_documents_tell_settings_models_and_places_as_they_are(name):
    text = DOCUMENTS[name]
    sections = "|".join({setting.partition(".")[0] for setting in flow2api.SETTINGS})
    settings = re.findall(rf"`((?:{sections})\.(?!html)\w+)", text)
    assert set(settings) <= {*flow2api.SETTINGS}
    cell = r" ([\d-]+) \|"
    for model, *cells in re.findall(rf"^\| `([\w-]+)`[^|]*\|{cell * 3}", text, re.MULTILINE):
        credits = ["-" if cost is None else str(cost) for cost in flow2api.resolve(model).costs]
        assert cells == credits, model
    for model in re.findall(r"`((?:veo_|omni_|nano_|imagen_)[\w-]+)`", text):
        assert flow2api.resolve(model)
    for place, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", text):
        file = (REPOSITORY / name).parent / place if place else REPOSITORY / name
        if file.suffix == ".png":
            assert not file.exists() or file.stat().st_size < 200_000
            continue
        headings = re.findall(r"^#+ (.+)", file.read_text("utf-8"), re.MULTILINE)
        assert not anchor or anchor in [head.lower().replace(" ", "-") for head in headings]


def test_the_readme_is_short_and_the_api_document_has_all_errors_and_models():
    assert README.count("\n") <= 220 and len(re.findall(r"`[\w-]+` \| [\d-]+ \|", README)) == 8
    table = API.partition("## Errors")[2]
    rows = re.findall(r"^\| `(\w+)` \| (\d{3}) \| \S", table, re.MULTILINE)
    errors = {code: str(status) for code, (status, _) in flow2api.ERRORS.items()}
    assert sorted(rows) == sorted(errors.items())
    heads = {"omni_flash", *(p.family for p in flow2api.PRODUCTS if p.mode == "image")}
    assert all(f"| `{head}`" in API for head in heads)


def test_the_chinese_readme_holds_the_same():
    """The same blocks, sections, rows, names and links."""
    for pattern in (r"^```(?:.*\n)*?^```", r"^#+ ", r"^\|", r"^- "):
        here = re.findall(pattern, CHINESE, re.MULTILINE)
        assert here == re.findall(pattern, README, re.MULTILINE), pattern
    for pattern in (r"`[^`\n]+`", r"https?://[^\s)>`]+", r"\]\([^)]+\)"):
        names = [set(re.findall(pattern, re.sub("```", "", text))) for text in (README, CHINESE)]
        assert not {name for name in names[0] ^ names[1] if "README" not in name}, pattern


def test_the_setting_file_holds_each_default_in_order_and_comments_it(tmp_path, capsys):
    """And its example of a rename is taken; and --help has each in short."""
    text = (REPOSITORY / "setting.toml").read_text("utf-8")
    document = tomllib.loads(text)
    assert document.pop("models") == {}
    values = {f"{part}.{key}": v for part, rows in document.items() for key, v in rows.items()}
    assert [*values] == [*flow2api.SETTINGS]
    comments = re.findall(r"((?:^# .*\n)+)\w+ = ", text, re.MULTILINE)
    for (name, value), comment in zip(values.items(), comments, strict=True):
        setting = flow2api.SETTINGS[name]
        assert (value, type(value)) == (setting.default, type(setting.default)), comment
        assert all(f'"{choice}"' in comment for choice in setting.choices), comment
        if setting.low is not None:
            bounds = {f"{setting.low:.10g}", f"{setting.high:.10g}"}
            assert bounds <= set(re.findall(r"\d+(?:\.\d+)?", comment)), comment
    example = re.sub("# (nano_banana_2|omni_flash_lengths) = ", r"\1 = ", text)
    (tmp_path / "a.toml").write_text(example, "utf-8")
    settings = flow2api.Settings()
    settings.read_file(tmp_path / "a.toml")
    plan = flow2api.resolve("nano_banana_2", overrides=settings.models)
    assert plan.key(PRO) == "NARWHAL" and not settings.warnings
    for seconds, images, key, credits in ((12, 0, "t2v_12s", 42), (3, 2, "i2v_3s", 9)):
        options = {"seconds": seconds, "images": images, "overrides": settings.models}
        plan = flow2api.resolve("omni_flash", **options)
        assert (plan.key(PRO), plan.cost(PRO)) == (f"abra_{key}", credits)
    with pytest.raises(SystemExit):
        flow2api.parse_arguments(["--help"])
    rows = [f"{setting.name:28} {setting.help}" for setting in flow2api.SETTINGS.values()]
    help_text = capsys.readouterr().out
    assert all(row in help_text for row in rows)


def test_the_files_name_no_file_of_ours_that_is_gone_and_no_folder_of_their_author():
    names = (*NAMES, "setting.toml", "Dockerfile", "docker-compose.yml", "admin.html")
    for name in (*names, ".dockerignore", ".ci/run", "flow2api.py"):
        text = (REPOSITORY / name).read_text("utf-8")
        assert not re.search(r"/work/|/root/|/home/|/tmp/\w+/", text), name
        files = set(re.findall(r"(?<![./-])\b\w+\.(?:py|html|toml)\b", text))
        assert all((REPOSITORY / file).exists() for file in files), (name, files)
    assert os.access(REPOSITORY / ".ci" / "run", os.X_OK)


# ---- Docker, carried out without Docker ----

OWN_KEY = "sk-a-key-for-this-test"
CURL = re.compile(r"""curl -N (\S+) -H "Authorization: Bearer (\S+)" -d '(.+)'""")


async def ask(url, body=None, key="none"):
    """A GET to a process, or a POST of a body -> Reply."""
    options = {"json": body, "headers": {"Authorization": f"Bearer {key}"}}
    async with aiohttp.request("POST" if body else "GET", url, **options) as answer:
        return Reply(answer.status, answer.headers, await answer.read())


async def test_what_the_dockerfile_says_works_in_an_empty_folder(run, flow2, tmp_path):
    app = tmp_path / "app"
    (app / "data").mkdir(parents=True)
    text = (REPOSITORY / "Dockerfile").read_text("utf-8")
    assert {"WORKDIR /app", "VOLUME /app/data", "EXPOSE 8000"} <= {*text.splitlines()}
    assert re.search(r"^FROM python:3\.\d+\.\d+-slim-\w+$", text, re.MULTILINE)
    pinned = r"^RUN pip install .*\baiohttp==[\d.]+ aiohttp-socks==[\d.]+$"
    assert re.search(pinned, text, re.MULTILINE)
    as_user = text.split("\nUSER 1000:1000\n", 1)[1]
    assert not re.search(r"^(RUN|COPY|ADD|USER)\b", as_user, re.MULTILINE)
    text = text.replace("/app", str(app))
    sent = re.findall(r"^!(.+)", (REPOSITORY / ".dockerignore").read_text(), re.MULTILINE)
    for sources, target in re.findall(r"^COPY (.+) (\S+)$", text, re.MULTILINE):
        for source in map(REPOSITORY.joinpath, sources.split()):
            sent.remove(source.name)
            if source.is_dir():
                shutil.copytree(source, app / target)
            else:
                shutil.copy(source, app / target)
    assert not sent, "Docker is sent what nothing copies"
    lines = re.findall(r"^ENV (.+)", text, re.MULTILINE)
    variables = dict(re.findall(r"(\w+)=(\S+)", " ".join(lines)))
    assert variables.pop("FLOW2API_SERVER_HOST") == "0.0.0.0"  # a test listens on loopback only
    variables["FLOW2API_GLOBAL_API_KEY"] = OWN_KEY
    commands = re.findall(r"^ *CMD (\[.+\])$", text, re.MULTILINE)
    (python, *health), (same, script) = map(json.loads, commands)
    assert python == same == "python"
    program = await flow2(script=app / script, **variables)
    assert (await ask(f"{program.url}/v1/models", key=OWN_KEY)).status == 200
    assert (await ask(program.url)).status == 200
    assert program.said("admin_password") and not program.said("api_key")
    assert OWN_KEY not in "\n".join(program.out + program.log)
    assert [*app.rglob("flow2api.db")] == [app / "data" / "flow2api.db"]
    options = {"env": environment(**variables)}
    assert await (await run(sys.executable, *health, **options)).end() == 0
    reset = await run(sys.executable, app / script, "--reset-password", **options)
    assert await reset.end() == 0
    login = {"username": "admin", "password": reset.said("admin_password")}
    assert (await ask(f"{program.url}/api/login", login)).status == 200
    assert await program.stop() == 0
    assert await (await run(sys.executable, *health, **options)).end() != 0
    with (app / "setting.toml").open("a") as settings:  # it is the one that is read
        settings.write('nonsense = "X"')
    program = await run(sys.executable, app / script, "--check", **options)
    assert await program.end() == 1
    assert any("WRONG [models] nonsense is unknown" in line for line in program.out)


def test_the_compose_file_has_the_standard_mode_and_a_proxy_beside_it():
    text = re.sub(r"(?m)^ *#.*\n", "", (REPOSITORY / "docker-compose.yml").read_text("utf-8"))
    names = r"^(?:  flow2api|  flow2api-proxy|  warp|volumes):"
    _, standard, through, warp, volumes = re.split(names, text, maxsplit=4, flags=re.MULTILINE)
    for line in ("build: .", '- "127.0.0.1:8000:8000"', "- TZ=${TZ:-UTC}", "- data:/app/data"):
        assert f" {line}\n" in standard
    assert "./setting.toml:/app/setting.toml:ro" in standard and "  data:\n" in volumes
    settings = flow2api.Settings()
    settings.read_environment(dict(re.findall(r"(FLOW2API_\w+)=(\S+)", through)))
    assert settings["proxy.proxy_enabled"] is True and not settings.warnings
    assert settings["proxy.proxy_url"] == "socks5://warp:1080"
    assert "profiles: [proxy]" in through and "profiles: [proxy]" in warp
    assert "profiles" not in standard and "ports:" not in warp


# ---- The demo ----

QUICK_DEMO = {"FLOW2API_DEMO_VIDEO_SECONDS": "0.5", "FLOW2API_DEMO_IMAGE_SECONDS": "0"}
KEPT_LINK = re.compile(r"http://127\.0\.0\.1:\d+/tmp/[\w-]+\.(?:png|mp4)")


async def kept_files(text):
    """The files of the links in a text; each must be there, whole, for anybody."""
    links = set(KEPT_LINK.findall(text))
    replies = [await ask(link) for link in links]
    for link, reply in zip(links, replies, strict=True):
        assert (reply.status, reply.headers["Content-Length"]) == (200, str(len(reply.body))), link
        assert (reply.headers["Content-Type"], link[-3:]) == flow2api.sniff(reply.body)
    return [reply.body for reply in replies]


async def test_the_demo_works_from_one_file_as_pasted_and_keeps_nothing(flow2, tmp_path):
    folder = tmp_path / "empty"
    temporary = folder / "temporary"
    temporary.mkdir(parents=True)
    script = shutil.copy(REPOSITORY / "flow2api.py", folder)
    program = await flow2("--demo", script=script, TMPDIR=str(temporary), **QUICK_DEMO)
    assert any("simulated Flow" in line for line in program.out)
    password = program.said("admin_password")
    url, key, body = CURL.fullmatch(program.curl).groups()
    assert key == program.said("api_key") == "demo" and len(password) >= 12
    assert "admin.html, which is missing" in (await ask(program.url)).body.decode()
    assert "keeps nothing" in program.out[-1]
    answer = await ask(url, json.loads(body), key)
    assert answer.status == 200 and answer.body.endswith(b"data: [DONE]\n\n")
    [film] = await kept_files(answer.body.decode())
    assert film.startswith(CLIP)
    assert len(list(temporary.iterdir())) == 1
    assert await program.stop() == 0
    assert not list(temporary.iterdir())
    assert {path.name for path in folder.iterdir()} == {"flow2api.py", "temporary"}
    assert not [line for line in program.log if "easy to guess" in line or password in line]


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
async def test_a_signal_during_the_start_leaves_no_traceback_and_no_folder(run, tmp_path, number):
    env = environment(TMPDIR=str(tmp_path))
    command = (sys.executable, "-v", REPOSITORY / "flow2api.py", "--demo", "--port", "0")
    for moment in (lambda: True, lambda: any(tmp_path.iterdir())):
        program = await run(*command, env=env)
        await until(lambda program=program: any("import 'bisect'" in ln for ln in program.log))
        await until(moment)
        program.process.send_signal(number)
        assert await program.end() in (-number, 130, 0) and not list(tmp_path.iterdir())
        assert not [line for line in program.log if "Traceback" in line]


async def test_the_demo_is_for_this_machine_and_its_end_says_that_its_clips_are_lost(run):
    command = (sys.executable, REPOSITORY / "flow2api.py", "--demo", "--port", "0")
    program = await run(*command, env=environment(FLOW2API_DEMO_VIDEO_SECONDS="3600"))
    await until(lambda: program.serves)
    assert program.said("listens on").startswith("127.0.0.1,")
    body = chat_body("veo_3_1-fast", "a paper boat") | {"stream": True}
    stream = asyncio.create_task(ask(program.url + CHAT, body, "demo"))
    while b"in_progress" not in (await ask(program.url + VIDEOS, key="demo")).body:
        await asyncio.sleep(0.05)
    assert await program.stop() == 0
    text = (await stream).body.decode()
    assert "is lost: the demo keeps nothing" in text and "goes on" not in text


def test_a_simulated_picture_is_whole_and_of_its_prompt():
    sizes = ((1, 1), (16, 16), (320, 180), *flow2api.SIMULATED_SIZES.values())
    for width, height in sizes:
        png = flow2api.block_picture("a boat", width, height)
        chunks, rest = {}, png[8:]
        while rest:
            size = int.from_bytes(rest[:4])
            chunks[rest[4:8]] = data = rest[8 : 8 + size]
            assert zlib.crc32(rest[4:8] + data).to_bytes(4) == rest[8 + size : 12 + size]
            rest = rest[12 + size :]
        assert chunks[b"IHDR"][:8] == width.to_bytes(4) + height.to_bytes(4)
        pixels = zlib.decompress(chunks[b"IDAT"])
        assert len(pixels) == (width + 1) * height and not any(pixels[:: width + 1])
        assert max(pixels) < len(chunks[b"PLTE"]) / 3
        assert png != flow2api.block_picture("a ship", width, height)
    assert len(set(pixels)) > 100


needs_curl = pytest.mark.skipif(not shutil.which("curl"), reason="NOT TESTED: install curl")
# Of the documents that Flow2API was made from: the key stands alone, and the path is another.
OLD_CURL_LINE = r"""curl --location --request POST \
'http://127.0.0.1:8000/flow/v1/chat/completions' \
--header 'Content-Type: application/json' --header 'Authorization: demo' --data-raw '{"messages":
    [{"role": "user", "content": "画只猪在天上飞"}], "model": "veo_3_1", "stream": true, "n": 2}'"""


@needs_curl
async def test_the_shell_blocks_of_the_documents_work_as_pasted(run, flow2, tmp_path):
    """Each alone, as -u proves, but for first.png, which the first one makes; and the line of
    the documents before ours."""
    program = await flow2("--demo", **QUICK_DEMO)
    options = {"cwd": tmp_path, "env": environment(KEY="")}

    async def paste(block):
        """-> (what it wrote, the files that this links to)"""
        text = block.replace("http://127.0.0.1:8000", program.url)
        text = text.replace("the admin password", program.said("admin_password"))
        shell = await run("bash", "-euo", "pipefail", "-c", text, **options)
        assert await shell.end() == 0, (block, shell.log)
        out = "\n".join(shell.out)
        return out, await kept_files(out)

    first, *others = [*blocks(API, "bash"), *blocks(README, "bash"), OLD_CURL_LINE]
    await paste(first)
    answers = await asyncio.gather(*map(paste, others))
    counts = [len(files) for _, files in answers]
    assert counts == [1, 1, 2, 1, 1, 0, 1, 0, 1, 2, 0, 0, 1, 1, 2], answers
    for block, (out, files) in zip(others, answers, strict=True):
        clip = flow2api.LANDSCAPE_CLIP if "landscape" in block else flow2api.PORTRAIT_CLIP
        start = PNG[:4] if "banana" in block else clip
        whole = "/chat/" in block or "/images/" in block
        assert not whole or all(data.startswith(start) for data in files), block
        assert ("[DONE]" in out) == ('"stream": true' in block)
    for name in ("first.png", "paper-boat.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG[:4])
    assert (tmp_path / "paper-boat.mp4").read_bytes().startswith(flow2api.LANDSCAPE_CLIP)
    [accounts] = [out for out, _ in answers if "Token added" in out]
    assert "@demo.example" in accounts and "the-value-of-the-cookie" not in accounts


STAND_IN = r"""#!/bin/sh
name=$(basename "$0")
echo "$name $*" >>"$CALLS"
case "$name $*" in
    "git clone"*) mkdir "$3" && touch "$3/flow2api.py" ;;
    *"-m venv .venv")
        mkdir -p .venv/bin
        for link in pip python; do ln -s "$0" .venv/bin/$link; done ;;
    python*flow2api.py*) [ -f flow2api.py ] ;;
esac
"""


async def test_the_setup_blocks_of_the_documents_name_what_there_is(run, tmp_path):
    """With stand-ins for what needs a network or Docker, in the folder that the first makes."""
    (tmp_path / "bin").mkdir()
    for name in ("git", "python3", "python", "pip", "uv", "docker", "pytest"):
        (tmp_path / "bin" / name).write_text(STAND_IN)
        (tmp_path / "bin" / name).chmod(0o755)
    path = f"{tmp_path / 'bin'}:/usr/bin:/bin"
    env = environment(PATH=path, CALLS=str(tmp_path / "calls"))
    first, *others = blocks(README)
    for folder, block in [("", first), *(("flow2api", block) for block in others)]:
        shell = await run("bash", "-euo", "pipefail", "-c", block, cwd=tmp_path / folder, env=env)
        assert await shell.end() == 0, (block, shell.log)
    compose = (REPOSITORY / "docker-compose.yml").read_text("utf-8")
    tests = (REPOSITORY / "test_flow2api.py").read_text("utf-8")
    calls = (tmp_path / "calls").read_text().splitlines()
    for call in calls:
        _, *arguments = call.split()
        if "flow2api.py" in call:
            flow2api.parse_arguments(call.partition("flow2api.py")[2].split())
        if call.startswith("docker"):
            assert re.match("docker compose (up -d|logs|stop|start|run --rm)( |$)", call)
            services = [word for word in arguments[2:] if re.match("flow2api[^.]*$", word)]
            assert all(f"\n  {service}:" in compose for service in services)
        if call.startswith("pip"):
            assert {*arguments} <= {"install", "aiohttp", "pytest", "pytest-aiohttp"}
        if call.startswith("pytest -"):
            assert re.search(rf"def test_\w*{arguments[-1]}", tests)
    for old in ("pip install aiohttp", "python flow2api.py --demo", "python flow2api.py"):
        assert old in calls
    script = (REPOSITORY / "flow2api.py").read_text("utf-8")
    header = re.match(r"# /// script\n((?:# .*\n)+?)# ///\n", script)[1]
    assert tomllib.loads(header.replace("# ", "")) == {
        "requires-python": ">=3.11",
        "dependencies": ["aiohttp>=3.12"],
    }


def test_no_block_of_the_documents_deletes_anything_or_goes_untried():
    for name, text in DOCUMENTS.items():
        shells = blocks(text, "bash") + blocks(text)
        tried = shells + blocks(text, "python")
        assert 2 * len(tried) == len(re.findall("^ *```", text, re.MULTILINE)), name
        assert not re.search(r"DELETE|(?<!-)\brm\b|\bdown\b|prune", "".join(shells)), name
    assert not blocks(API) + blocks(CLIENTS) + blocks(CLIENTS, "bash")


async def test_the_python_lines_of_the_documents_work(run, flow2, openai):
    program = await flow2("--demo", **QUICK_DEMO)
    [block] = blocks(CLIENTS, "python")
    block = block.replace("http://127.0.0.1:8000", program.url)
    python = await run(sys.executable, "-c", block)
    assert await python.end() == 0, python.log
    [film] = await kept_files("\n".join(python.out))
    assert film.startswith(CLIP)


# ---- The first start, the end, and --check ----


@pytest.fixture
async def google(tmp_path):
    """A simulated Flow for processes, whose clips take an hour. `variables`: the environment that
    points a process at it, and at a data folder with its account `st`."""
    flow = Flow(0, 3600)
    runner = await flow.start()
    flow.st = flow.add_account("somebody@example.com", PRO, 1000)
    flow.variables = {
        "FLOW2API_FLOW_LABS_BASE_URL": f"{flow.address}/fx/api",
        "FLOW2API_FLOW_API_BASE_URL": f"{flow.address}/v1",
        "FLOW2API_FLOW_POLL_INTERVAL": "0.1",
        "FLOW2API_GLOBAL_API_KEY": OWN_KEY,
        "FLOW2API_SERVER_DATA_DIR": str(tmp_path / "account"),
    }
    with opened(tmp_path / "account") as store:
        await store.put(flow2api.Token(id=1, email="somebody@example.com", st=flow.st))
    yield flow
    await runner.cleanup()


async def test_secrets_are_made_at_the_first_start_and_told_once(flow2, tmp_path):
    program = await flow2("--data", tmp_path)
    key, password = map(program.said, ("api_key", "admin_password"))
    assert len(key) >= 20 and len(password) >= 12 and (key + password).isalnum()
    assert any("add an account there" in line for line in program.out) and not program.curl
    assert (await ask(f"{program.url}/v1/models", key=key)).status == 200
    assert (await ask(f"{program.url}/v1/models", key=password)).status == 401
    files = b"".join(path.read_bytes() for path in tmp_path.glob("flow2api.db*"))
    assert password.encode() not in files  # only its hash
    assert await program.stop() == 0
    again = await flow2("--data", tmp_path)
    told = [*program.log, *again.out, *again.log]
    assert not [line for line in told if key in line or password in line]
    assert (await ask(f"{again.url}/v1/models", key=key)).status == 200
    login = {"username": "admin", "password": password}
    assert (await ask(f"{again.url}/api/login", login)).status == 200


BLOCKED = """import runpy, sys; sys.modules[sys.argv[1]] = None
runpy.run_path(sys.argv[2], run_name='__main__')"""
ADDRESS = r"(--host and --port|server\.host)"
START_ERRORS = (  # arguments after a data folder of its own, or none; what is said
    ("--port {taken} --host 127.0.0.1", rf"127\.0\.0\.1 port \d+: address already .*{ADDRESS}"),
    ("--host [192.0.2.1]", rf"192\.0\.2\.1 port 8000: .*address; .*{ADDRESS}"),
    ("--host a..b", rf"listen on a\.\.b port .*{ADDRESS}"),
    ("--data {folder}/file", r"data folder .*/file: .*make it a folder .*--data \(server"),
    ("--data {folder}/file/data", r"data folder .*/file/data: Not a directory; .*--data"),
    ("--data {folder}/odd", r"odd/flow2api\.db: unable to open .*can this user write it"),
    ("--data {folder}/busy", r"busy/flow2api\.db is used by another Flow2API: .*--data"),
    ("--config {folder}/none.toml", r"--config .*/none\.toml: there is no such file"),
    ("--config {folder}/no/none.toml", r"--config .*/no/none\.toml: there is no such file"),
    ("--config {folder}/setting.toml", r"/setting\.toml is a folder, not a file"),
    ("--config {folder}", r"/setting\.toml is a folder, not a file"),
    ("--config {folder}/file", r"/file: Expected '='.*line 1"),
    ("--config {folder}/utf-16", r"/utf-16 is no text in UTF-8"),
    ("--demo", r"--demo keeps nothing: start it without --data"),
    ("--data {folder}/none --reset-password", r"/none \(unable to open .*start Flow2API"),
)


async def test_what_hinders_the_start_is_one_sentence_that_says_what_to_do(run, tmp_path):
    script = REPOSITORY / "flow2api.py"
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "utf-16").write_text("server.port = 1", "utf-16")
    (tmp_path / "setting.toml").mkdir()
    (tmp_path / "odd" / "flow2api.db").mkdir(parents=True)
    lines = [
        (sys.executable, "-c", BLOCKED, "tomllib", script),
        (sys.executable, "-c", BLOCKED, "aiohttp", script),
        ("sh", "-c", f"{sys.executable} {script} --demo --port 0 >/dev/full"),
    ]
    patterns = [r"needs Python 3\.11 or newer, and \S+ is 3", r"needs aiohttp .*-m pip install"]
    patterns.append("No space left on device")
    with socket.create_server(("127.0.0.1", 0)) as taken, opened(tmp_path / "busy"):
        for number, (text, pattern) in enumerate(START_ERRORS):
            text = text.format(folder=tmp_path, taken=taken.getsockname()[1])
            lines.append((sys.executable, script, "--data", tmp_path / str(number), *text.split()))
            patterns.append(pattern)
        for line, pattern in zip(lines, patterns, strict=True):
            program = await run(*line)
            assert await program.end() == 2, (line, program.out, program.log)
            assert len(program.log) == 1 and not program.out, (line, program.out, program.log)
            assert re.match(rf"flow2api: .*{pattern}", program.log[0]), (line, program.log)


def test_python_3_8_reads_the_file_as_far_as_the_check_of_its_version():
    text = (REPOSITORY / "flow2api.py").read_text("utf-8")
    statements = ast.parse(text, feature_version=(3, 8)).body
    check = next(number for number, node in enumerate(statements) if isinstance(node, ast.Try))
    imports = statements[1:check]
    assert {type(node) for node in imports} == {ast.Import, ast.ImportFrom, ast.If}
    assert "tomllib" not in "".join(map(ast.unparse, imports))


async def test_a_new_password_counts_beside_a_running_process_and_ends_sessions(
    flow2, run, tmp_path
):
    program = await flow2("--data", tmp_path)
    command = (sys.executable, REPOSITORY / "flow2api.py", "--data", tmp_path, "--reset-password")
    login = {"username": "admin", "password": program.said("admin_password")}
    session = (await ask(f"{program.url}/api/login", login)).json["token"]
    reset = await run(*command)
    assert await reset.end() == 0, reset.log
    new = reset.said("admin_password")
    assert len(new) >= 12 and new.isalnum()
    assert (await ask(f"{program.url}/api/login", login)).status == 401
    login["password"] = new
    assert (await ask(f"{program.url}/api/login", login)).status == 200
    assert (await ask(f"{program.url}/api/tokens", key=session)).status == 401
    await program.stop()
    again = await flow2("--data", tmp_path)
    assert (await ask(f"{again.url}/api/login", login)).status == 200
    refused = await run(*command, env=environment(FLOW2API_GLOBAL_ADMIN_PASSWORD="x" * 12))
    assert await refused.end() == 2 and "set by the environment" in refused.log[0]


async def test_sigterm_ends_a_stream_naming_its_job(flow2, google):
    """Which goes on: test_a_job_survives_the_end_of_the_process."""
    program = await flow2(**google.variables)
    assert CURL.fullmatch(program.curl)[2].startswith("$")  # for a key of one's own
    body = chat_body("veo_3_1-fast", "a paper boat") | {"stream": True}
    stream = asyncio.create_task(ask(program.url + CHAT, body, OWN_KEY))
    await until(lambda: any("batchCheck" in path for path, _ in google.calls))
    assert await program.stop() == 0, program.log
    reply = await stream
    *_, notice, failure = re.findall(r"^data: ({.+)", reply.body.decode(), re.MULTILINE)
    assert reply.body.endswith(b"data: [DONE]\n\n")
    assert reply.job_id in json.loads(notice)["choices"][0]["delta"]["content"]
    assert '"code": "interrupted"' in failure and reply.job_id in failure


async def check(run, *arguments, **variables):
    """Runs --check -> (exit code, what it wrote)."""
    command = (sys.executable, REPOSITORY / "flow2api.py", "--check", *arguments)
    program = await run(*command, env=environment(**variables))
    code = await program.end()
    text = "\n".join(program.out + program.log)
    assert "Traceback" not in text
    return code, text


async def test_check_finds_nothing_wrong_and_spends_nothing(run, google):
    code, text = await check(run, **google.variables)
    assert code == 0 and "WRONG" not in text, text
    assert "somebody@example.com" in text and "Pro, 1000 credits" in text
    assert "flow.poll_interval = 0.1  (environment)" in text
    assert f"{google.address}/v1 answers 404 through no proxy" in text
    assert "generation.video_timeout" not in text  # it has its default
    assert text.index("ok ") < text.index("flow.poll_interval")
    _, text = await check(run, "--verbose", **google.variables)
    assert "generation.video_timeout = 1500  (" in text
    assert OWN_KEY not in text and google.st not in text
    asked = {path for path, _ in google.calls}
    assert asked <= {"/fx/api", "/v1", "/fx/api/auth/session", "/v1/credits"}
    assert google.accounts[google.st].credits == 1000


PROXY = "proxy.proxy_enabled = true\nproxy.proxy_url = 'http://127.0.0.1:1'"
CHECKS = (
    ("new", "", 1, "WRONG no Google account yet: start Flow2API and add one"),
    ("account", "", 1, "WRONG account somebody@example.com: .*Sign in to Flow again"),
    ("file", "", 1, "WRONG data folder .*file: "),
    ("busy", "", 1, "WRONG .*db is used by another Flow2API"),
    ("new", "global.admin_password = 'abc123'", 1, r"WRONG global.admin_password \(file\) is easy"),
    ("new", "plugin.connection_token = 'aaaaaaaaaaaaaa'", 1, "WRONG plugin.connection_t.*easy"),
    ("new", PROXY, 1, r"WRONG http://\S+ can't be .*; check network and \[proxy\]"),
    ("new", "server.port = 'x'", 2, "server.port can't be 'x'; allowed: a whole num"),
    ("new", "cache.base_url = 'me.example'", 2, "cache.base_url must look like https://"),
    ("new", "server.a = 1", 1, "WRONG setting.toml: unknown .* server.a; ignored"),
    ("new", "port = 1", 1, "WRONG setting.toml: unknown setting port; ignored"),
    ("new", "models.a = 'X'", 1, r"WRONG \[models\] a is unknown; .*nano_banana_2"),
)


@pytest.mark.parametrize(("data", "settings", "code", "pattern"), CHECKS)
async def test_check_says_what_to_do(run, google, tmp_path, data, settings, code, pattern):
    google.accounts.clear()  # the session of the one in the folder has ended
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "setting.toml").write_text(settings)
    options = ("--data", tmp_path / data, "--config", tmp_path / "setting.toml")
    with opened(tmp_path / "busy"):
        result, text = await check(run, *options, **google.variables)
    assert result == code and re.search(pattern, text), text
