"""Flow2API under load: `python bench_flow2api.py [name …]`; --help lists the names.

The gateway runs in a process of its own, with a probe in it; the simulated Flow of the tests and
the clients run in this one. A third process idles: as late as its event loop is at some moment,
the machine is to blame. Machines differ and are shared: the figures to compare are the ratios.
Memory is read from /proc, so it needs Linux. `--against FOLDER` names the checkout of another
version, which `compare` runs by turns with this one.
"""

import argparse
import asyncio
import functools
import inspect
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
from contextlib import asynccontextmanager

import aiohttp
from aiohttp import web

import flow2api
import test_flow2api as tests

clock, CLIP = time.perf_counter, {"model": "veo_3_1-fast", "prompt": "a boat"}


def probe():
    """Its source runs by `python -c`: with arguments as the gateway, without them as the process
    that idles. A line on stdin is answered with what has happened since the last one."""
    import asyncio
    import gc
    import json
    import os
    import pathlib
    import sys
    import threading
    import time
    import traceback

    now, slow, lags, pauses = time.monotonic, [], [], [0.0]
    began, seen, run = [0.0], [""], asyncio.Handle._run  # of the callback that runs

    def timed(handle):
        began[0], seen[0], cpu = now(), "", time.thread_time()
        run(handle)
        if (took := now() - began[0]) > 0.02:
            slow.append((took, time.thread_time() - cpu, seen[0] or repr(handle)[:99]))
        began[0] = 0.0

    def watch():  # notes where the threads are while a callback is slow
        while True:
            time.sleep(0.01)
            if began[0] and now() - began[0] > 0.02:
                stacks = [[*traceback.walk_stack(f)] for f in sys._current_frames().values()]
                codes = [[(f.f_code, line) for f, line in stack] for stack in stacks]
                ours = [[at for at in x if at is x[0] or "flow2api" in str(at)] for x in codes]
                words = (" < ".join(f"{at.co_name}:{n}" for at, n in x[:3]) for x in ours if x[1:])
                seen[0] = " | ".join(words)

    def answer():
        for _ in sys.stdin:
            pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
            told = {"mb": pages * os.sysconf("SC_PAGE_SIZE") / 2**20, "cpu": time.process_time()}
            told |= {"lags": lags[:], "gc": max(pauses), "slow": sorted(slow, reverse=True)[:3]}
            lags[:], slow[:], pauses[:] = [], [], [0.0]
            print(json.dumps(told), flush=True)
        os._exit(0)  # whoever asks has gone

    def tick(due):
        lags.append((now(), now() - due))
        asyncio.get_running_loop().call_at(now() + 0.01, tick, now() + 0.01)

    def collecting(phase, about):
        pauses.append(now()) if phase == "start" else pauses.append(now() - pauses.pop())

    async def serve(*arguments):
        tick(now())
        await (serve_gateway(*arguments) if arguments else asyncio.Event().wait())

    threading.Thread(target=answer, daemon=True).start()
    if not sys.argv[1:]:
        asyncio.run(serve())
    import flow2api

    serve_gateway, flow2api.serve, asyncio.Handle._run = flow2api.serve, serve, timed
    gc.callbacks.append(collecting)
    threading.Thread(target=watch, daemon=True).start()
    flow2api.main(sys.argv[1:])


class Bench(tests.World):
    """A world whose gateway is a process of its own, of the checkout in `folder`."""

    folder = pathlib.Path(__file__).parent

    async def start_gateway(self):
        values = self.values() | {"server.data_dir": self.data / "data", "limits.queue": 1000}
        values |= self.settings
        own = {"FLOW2API_" + k.replace(".", "_").upper(): str(v) for k, v in values.items()}
        options = dict.fromkeys(("stdin", "stdout"), asyncio.subprocess.PIPE)
        options |= {"env": os.environ | own, "limit": 1 << 26, "cwd": self.folder}
        options["stderr"] = (self.data / "log").open("wb")
        code = inspect.getsource(probe) + "\nprobe()"
        start = functools.partial(asyncio.create_subprocess_exec, sys.executable, "-c", code)
        (self.data / "setting.toml").touch()  # an empty one
        config = str(self.data / "setting.toml")
        arguments = "--config", config, "--host", "127.0.0.1", "--port", "0"
        self.process, self.idle = await start(*arguments, **options), await start(**options)
        self.url = (await self.process.stdout.readline()).split()[-1].decode()
        await self.http.close()  # that one opens 100 connections at most
        self.http = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        self.operator = {"key": await self.admin()}

    async def stop_gateway(self):
        for process in (self.process, self.idle):
            process.terminate()
            await process.communicate()

    async def add_account(self, **fields):
        email = f"user{len(self.flow.accounts)}@example.com"
        st = self.flow.add_account(email, tests.PRO, 10**9)
        reply = await self.call("POST", "/api/tokens", {"st": st} | fields, **self.operator)
        assert reply.status == 200, reply

    async def told(self):
        """What the probe tells. own: by how much the loop was late, less what the idle one was."""
        both = []
        for process in (self.process, self.idle):
            process.stdin.write(b"\n")
            while not (line := await process.stdout.readline()).startswith(b"{"):
                assert line, (self.data / "log").read_text()
            both.append(json.loads(line))
        found, idle, found["own"] = both[0], both[1]["lags"], [0.0]
        for at, lag in found["lags"]:
            late = idle if lag > 0.005 else ()
            there = (x for end, x in late if end > at - lag - 0.01 and end - x < at)
            found["own"].append(max(0, lag - max(there, default=0)))
        return found

    async def report(self, title):
        found = await self.told()
        own, gc = sorted(1e3 * lag for lag in found["own"]), 1e3 * found["gc"]
        print(f"  {title}: the loop is late by {own[-1]:.0f} ms at most,", end=" ")
        print(f"p99.9 {own[int(len(own) * 0.999)]:.0f} ms; garbage collection {gc:.0f} ms at most")
        for took, cpu, where in found["slow"]:
            print(f"    a callback of {1e3 * took:.0f} ms ({1e3 * cpu:.0f} ms CPU): {where}")
        return found

    def accepted(self):
        return len(self.paid())


@asynccontextmanager
async def bench(accounts=5, interval=1.0, file=b"", limits=None, source=None, **options):
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        b = Bench(pathlib.Path(folder), **{"flow.poll_interval": interval}, **options)
        b.folder = source or b.folder
        if file:
            b.flow.file = functools.partial(send, file)
        await b.start()
        try:
            await asyncio.gather(*(b.add_account(**limits or {}) for _ in range(accounts)))
            await b.told()
            yield b
        finally:
            await b.stop()


async def send(data, request, body, account):
    return web.Response(body=data, content_type=flow2api.sniff(data)[0])


async def timed(awaitable):
    start = clock()
    result = await awaitable
    return clock() - start, result


async def streams(options):
    """500 streamed chats at a time: memory, signs of life, the event loop"""
    silences, mb, rounds = [], [], 3
    async with bench(video_seconds=options.seconds / rounds) as b:

        async def listen(number):
            await asyncio.sleep(number / 100)  # people don't come all at once
            body = tests.chat_body("veo_3_1-fast", "a boat") | {"stream": True}
            options = {"json": body, "headers": {"Authorization": f"Bearer {b.key}"}}
            for _ in range(rounds):
                last, lines = clock(), []
                async with b.http.post(b.url + "/v1/chat/completions", **options) as reply:
                    async for line in reply.content:
                        silences.append(clock() - last)
                        last, lines = clock(), [*lines, line]
                assert b"data: [DONE]\n" in lines, lines

        mb.append((await b.told())["mb"])
        listening = asyncio.gather(*map(listen, range(500)))
        while not listening.done():
            await asyncio.wait([listening], timeout=10)
            mb.append((await b.report(f"{len(mb)}0 s"))["mb"])
        await listening
        print(f"  {500 * rounds} streams ended well, {b.accepted()} submits accepted;", end=" ")
        print(f"longest silence {max(silences):.1f} s (HEARTBEAT: {flow2api.HEARTBEAT:.0f} s)")
        print("  memory before, and each 10 s:", *map(round, mb), "MB")


async def burst(options):
    """200 requests at once by chat, images and videos, against one alone"""
    async with bench(video_seconds=2) as b:
        calls = (
            functools.partial(b.chat, "veo_3_1-fast"),
            functools.partial(b.call, "POST", "/v1/images/generations", {"prompt": "a boat"}),
            functools.partial(b.call, "POST", "/v1/videos", CLIP | {"async_mode": False}),
        )
        alone = max([(await timed(call()))[0] for call in calls])
        seconds, answers = await timed(asyncio.gather(*(calls[i % 3]() for i in range(200))))
        await b.report("200 at once")
        good, accepted = sum(answer.status == 200 for answer in answers), b.accepted() - 3
        print(f"  {good} ended well, {accepted} submits accepted;", end=" ")
        print(f"{seconds:.1f} s, {seconds / alone:.2f} x the slowest one alone")


async def clips(number, **options):
    asked, gate = [], asyncio.Semaphore(20)

    async def note(request, handler):
        asked.extend([clock()] * ("batchCheck" in request.path))
        return await handler(request)

    async with bench(**options) as b:

        async def make():
            async with gate:
                assert (await b.call("POST", "/v1/videos", CLIP)).status == 200

        start, b.fault = (await b.told())["cpu"], note
        for _ in range(500):
            await b.call("GET", "/health")
        ready = (await b.told())["cpu"]
        await asyncio.gather(*(make() for _ in range(number)))
        while (await b.call("GET", "/v1/stats")).json["total_videos"] < number:
            await asyncio.sleep(0.5)
        cpu, unit = (await b.report("clips"))["cpu"] - ready, (ready - start) / 500
        tick = options["interval"] / 2
        most = max(sum(at <= other < at + tick for other in asked) for at in asked)
        print(f"  {b.accepted()} submits accepted; at most {most} status calls a tick;", end=" ")
        print(f"{1e3 * cpu / number:.1f} ms CPU a job, {cpu / number / unit:.0f} x GET /health")


async def jobs(options):
    """1,000 clips on 5 accounts: status calls a tick, CPU for each"""
    await clips(1000, interval=2.0, video_seconds=20)


async def queue(options):
    """700 clips on 500 accounts of one clip at a time: what waiting costs"""
    limits = {"video_concurrency": 1}
    await clips(700, accounts=500, limits=limits, interval=1.0, video_seconds=5)


async def clip(options):
    """200 MB through /v1/videos/{id}/content: memory, speed against a direct download"""
    size, speeds, mb = 200 << 20, [], []
    async with bench(1, file=tests.CLIP.ljust(size, b"\0"), video_seconds=0) as b:
        video = (await b.call("POST", "/v1/videos", CLIP | {"async_mode": False})).json["id"]
        (medium,) = b.flow.media.values()

        async def fetch(url):
            async with b.http.get(url, headers={"Authorization": f"Bearer {b.key}"}) as reply:
                assert sum([len(part) async for part in reply.content.iter_any()]) == size

        for url in [b.flow.url(medium, "video"), f"{b.url}/v1/videos/{video}/content"] * 3:
            mb.append((await b.told())["mb"])
            fetching = asyncio.create_task(timed(fetch(url)))
            while not fetching.done():
                await asyncio.sleep(0.05)
                mb.append((await b.told())["mb"])
            speeds.append(200 / fetching.result()[0])
    direct, through = statistics.median(speeds[::2]), statistics.median(speeds[1::2])
    print(f"  memory grows by {max(mb) - mb[0]:.1f} MB; {through:.0f} MB/s,", end=" ")
    print(f"{through / direct:.2f} x a direct download")


async def pictures(options):
    """Pictures of 15 MB in and out: the event loop"""
    big, body = tests.PNG + os.urandom(15 << 20), {"prompt": "a boat"}
    async with bench(1, file=big) as b:
        edit = functools.partial(b.call, "POST", "/v1/images/edits")
        data, link = {"image": tests.data_url(big)}, {"response_format": "url"}
        form = aiohttp.FormData(body | link)
        form.add_field("image", big, filename="a.png", content_type="image/png")
        ways = {
            "out": b.call("POST", "/v1/images/generations", body),
            "in by form": edit(data=form),
            "in by JSON": edit(body | link | data),
            "in by chat": b.chat("nano_banana_pro", pictures=[data["image"]]),
        }
        for title, way in ways.items():
            assert (await way).status == 200
            await b.report(title)


async def tokens(options):
    """GET /api/tokens of 500 accounts against GET /health"""
    async with bench(500) as b:
        ways, taken = ("/api/tokens", "/health"), []
        for path in ways * 50:
            taken.append(1e3 * (await timed(b.call("GET", path, **b.operator)))[0])
    slow, fast = statistics.median(taken[::2]), statistics.median(taken[1::2])
    print(f"  {slow:.1f} ms, {slow / fast:.1f} x GET /health")


async def store(options):
    """Writes a second: committed in groups against one by one"""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        db, records = flow2api.Store(pathlib.Path(folder)), []
        db.open()
        records = [flow2api.Output(job_id="video_1", number=number) for number in range(4000)]
        start = clock()
        await asyncio.gather(*map(db.put, records))
        middle = clock()
        for record in records[:400]:
            await db.put(record)
        grouped, single = 4000 / (middle - start), 400 / (clock() - middle)
        await asyncio.to_thread(db.close)
    print(f"  {grouped:.0f} in groups, {grouped / single:.0f} x the {single:.0f} one by one")


def hostile_bodies(size):
    """Bodies of about this many bytes that cost a careless reader much more: name -> bytes."""
    fill = {
        "lists": b"[],",
        "objects": b"{},",
        "nested": b"[",
        "numbers": b"1,",
        "digits": b"7",
        "escapes": b"\\u0041",
        "texts": b'"a",',
        "half pairs": b"\\ud800",
        "letters": b"a",
        "wide letters": "雨".encode(),
        "links": b"![](",
        "words": b"a b ",
    }
    quoted = {"escapes", "half pairs", "letters", "wide letters", "links", "words"}
    bodies = {}
    for name, piece in fill.items():
        start, end = (b'"', b'"') if name in quoted else (b"[", b"1]")
        value = start + piece * (size // len(piece)) + end
        bodies[name] = b'{"model": "imagen_4", "prompt": "x", "x": ' + value + b"}"
        bodies[f"{name} in a chat"] = (
            b'{"model": "imagen_4", "messages": [{"role": "assistant", "content": '
            + value + b'}, {"role": "user", "content": "make it red"}]}'
        )  # fmt: skip
    chat = b'{"model": "imagen_4", "messages": [%s{"role": "user", "content": "make it red"}]}'
    bodies["turns in a chat"] = chat % (b'{"role":"user","content":[{"type":"a"}]},' * 38_000)
    answer = b'{"role": "assistant", "content": "%s"},' % (b"P" * 10**5)
    bodies["answers in a chat"] = chat % (answer * (size // len(answer)))
    bodies["a picture"] = b'{"prompt": "x", "image": "' + b"iVBO" * (size // 4) + b'"}'
    head = b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n'
    bodies["form"] = (head + b"\r\n") * (size // len(head)) + b"--b--\r\n"
    bodies["form, a file"] = head[:-4] + b'; filename="a"\r\n\r\n' + bytes(size) + b"\r\n--b--\r\n"
    return bodies


async def bodies(options):
    """What a client with a key sends at worst, 64 MB: by how much the loop is late meanwhile"""
    async with bench(accounts=1) as w:
        for name, body in hostile_bodies(63 << 20).items():
            kind = "multipart/form-data; boundary=b" if "form" in name else "application/json"
            path = tests.CHAT if "chat" in name else tests.IMAGES
            headers = {"Content-Type": kind}
            reply = await w.post(path, data=body, headers=headers)
            late = 1000 * max((await w.told())["own"])
            print(f"  {name:24} HTTP {reply.status}, {late:4.0f} ms", flush=True)


async def picture_chats(source):
    """768 picture chats, 32 at once -> seconds"""
    gate = asyncio.Semaphore(32)
    async with bench(source=source, image_seconds=0) as b:

        async def ask():
            async with gate:
                assert (await b.chat("nano_banana_pro")).status == 200

        await asyncio.gather(*(ask() for _ in range(64)))
        return (await timed(asyncio.gather(*(ask() for _ in range(768)))))[0]


async def clips_at_once(source):
    """400 clips at once, from the first request to the last answer -> seconds"""
    async with bench(source=source, video_seconds=1) as b:
        body = CLIP | {"async_mode": False}
        calls = [b.call("POST", "/v1/videos", body) for _ in range(400)]
        seconds, replies = await timed(asyncio.gather(*calls))
        assert {reply.status for reply in replies} == {200}
        return seconds


async def idle_memory(source):
    """With 5 accounts, after their first requests -> MB"""
    async with bench(source=source) as b:
        await asyncio.gather(*(b.chat("nano_banana_pro") for _ in range(20)))
        return (await b.told())["mb"]


async def start(source):
    """From nothing to the first line of the program -> seconds"""
    code = "import flow2api, sys; flow2api.main(sys.argv[1:])"
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        command = sys.executable, "-c", code, "--data", folder, "--port", "0"
        options = {"cwd": source or Bench.folder, "stdout": asyncio.subprocess.PIPE}
        began = clock()
        process = await asyncio.create_subprocess_exec(*command, **options)
        await process.stdout.readline()
        seconds = clock() - began
        process.terminate()
        await process.wait()
    return seconds


async def compare(options):
    """With --against FOLDER: this version and another one by turns, a ratio each"""
    if not options.against:
        print("  left out: it needs --against")
        return
    for measure in (picture_chats, clips_at_once, idle_memory, start):
        here, there = [], []
        for _ in range(options.rounds):
            here.append(await measure(None))
            there.append(await measure(options.against))
        one, other = statistics.median(here), statistics.median(there)
        print(f"  {measure.__doc__}: here {one:.3g}, there {other:.3g}, ", end="")
        print(f"there / here {other / one:.2f}", flush=True)


def main():
    every = (streams, burst, jobs, queue, clip, pictures, tokens, store, bodies, compare)
    benches = {f.__name__: f for f in every}
    rows = "\n".join(f"  {name:9} {bench.__doc__}" for name, bench in benches.items())
    kind, words = argparse.RawDescriptionHelpFormatter, f"Benchmarks, all if none is named:\n{rows}"
    parser = argparse.ArgumentParser(description=words, formatter_class=kind)
    parser.add_argument("name", nargs="*", help="a benchmark")
    parser.add_argument("--seconds", type=float, default=60, help="length of streams")
    parser.add_argument("--against", type=pathlib.Path, help="another checkout, for compare")
    parser.add_argument("--rounds", type=int, default=5, help="turns of compare")
    options = parser.parse_args()
    for name in options.name or benches:
        if name not in benches:
            parser.error(f"there is no benchmark {name}")
        print(f"{name}: {benches[name].__doc__}", flush=True)
        asyncio.run(benches[name](options))


if __name__ == "__main__":
    main()
