"""What Flow2API promises, as tests: first the promises, then chapter by chapter.

Real sockets throughout: the gateway on a free loopback port, the Demo chapter as Google's side,
with faults switched on by a middleware in front of it. Nothing here needs the internet.
"""

import asyncio
import contextlib
import json

import aiohttp
import pytest
from aiohttp import web

import flow2api

FREE, PRO, ULTRA = flow2api.TIERS
PNG = flow2api.picture("an input", 64, 64)


class World:
    """A gateway and the simulated Flow behind it. `fault`, when set, sees each call to Flow first:
    an async function (request, handler) -> response."""

    def __init__(self, data, replies="new", image_seconds=0.02, video_seconds=0.3, **settings):
        self.demo = flow2api.Demo(image_seconds, video_seconds, replies)
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


async def test_a_clip_through_chat(world):
    w = await world(**{"cache.enabled": True})
    status, headers, body = await w.chat(n=2)
    assert status == 200, body
    assert headers["X-Job-Id"].startswith("video_")
