"""A simulated Flow, for `python flow2api.py --demo`: an adapter that asks nobody."""

import asyncio
import base64
import hashlib
import math
import uuid
import zlib
from typing import Any

from flow2api import (
    RATIOS,
    GatewayError,
    Job,
    Output,
    Reply,
    RestFlow,
    Settings,
    Status,
    Token,
    Wire,
    digest,
    google_error,
    now,
)

# fmt: off
CLIP = zlib.decompress(base64.b85decode(  # 4 s of H.264 in an MP4, 128x72
    "V_;xVNGqu<$Sls!Wnf@p0MS5flvtK*m|I|C2o#%`o1b6Cz`&4`Tb7Z+fC89bFfi~hU|?hbAp~GVRfW!XV89EQfJnBaC@~w"
    "zjw#6o+sTY+8qi(_{PtkAw*iPfz>+(2Q!*2Q429ejbbmR3^@bh+a}+aDa*ALwWtl0d=(ZH(X6B^<86su5V1tmYRY`%!$)p"
    "serXe|tr?e<X0m5c9C@x9L0kUTlmlUTUsp$Yk0uHZ%JmLZNhzCv;=s@ECe;^5pT4zS51Kj@~GDxNa>1Bc(`cDtIfC8BXL<"
    "raftZ-vwV9Pk+#Hg|fq_4Q7q!`H-4q%vp*djppB8!8t3{Wf?O^gFdn*imiklX_jHw9vDJQ!$4az4U5rky~#D>o&v1V|gEb"
    "~G{VQx;)hkxg!3Xe=pU5D?w>`~AM(uh;Fuiar1}u{+L^VXYB40AXq|#<LngnAQlUCqwW-9|$wj0nW^9fHNx(cpvlu00"
), -15)
ACCOUNTS = {"pro": ("PAYGATE_TIER_ONE", 1000), "ultra": ("PAYGATE_TIER_TWO", 25000)}
# fmt: on


def picture(text: str, width: int, height: int) -> bytes:
    """A PNG made from a text: eight by eight blocks in two colours of its hash."""
    code = hashlib.sha256(text.encode()).digest()
    rows = []
    for y in range(8):
        blocks = (bytes([code[y] >> min(x, 7 - x) & 1]) * (width // 8) for x in range(8))
        rows.append(b"\0" + b"".join(blocks).ljust(width, b"\0"))
    pixels = zlib.compress(b"".join(rows[y * 8 // height] for y in range(height)), 6)
    head, png = width.to_bytes(4) + height.to_bytes(4), b"\x89PNG\r\n\x1a\n"
    head += bytes([8, 3, 0, 0, 0])
    chunks = {b"IHDR": head, b"PLTE": code[8:14], b"IDAT": pixels, b"IEND": b""}
    for kind, data in chunks.items():
        png += len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)
    return png


class Demo(RestFlow):
    """A simulated Flow with believable timing, for --demo: nothing leaves the machine. Any session
    token is an account; the content policy refuses the word "unsafe"."""

    def __init__(self, settings: Settings, wire: Wire):
        super().__init__(settings, wire)
        self.clips: dict[str, tuple[float, Status]] = {}  # name -> when it is ready, and then

    async def _send(self, *about: Any, **options: Any):
        raise GatewayError("content_not_found", "The demo keeps its files in its cache only")

    async def session(self, token: Token) -> dict:
        name = token.st if token.st in ACCOUNTS else digest(token.st)[:6]
        who = {"email": f"{name}@demo.example", "name": name, "st": token.st}
        return who | {"at": f"ya29.demo-{name}", "at_expires": now() + 3600}

    async def credits(self, token: Token) -> dict:
        tier, credits = ACCOUNTS.get(token.st, ACCOUNTS["pro"])
        return {"credits": credits if token.credits is None else token.credits, "tier": tier}

    async def create_project(self, *about: Any) -> str:
        return str(uuid.uuid4())

    upload = create_project  # a new name, too

    async def submit(self, token: Token, job: Job, media: list[str]) -> Reply:
        if job.plan.kind == "image":
            await asyncio.sleep(self.settings["demo.image_seconds"])
        cost = (job.plan.cost(token.tier) or 0) * job.n
        left = token.credits - cost if cost else None
        return Reply([self._make(job) for _ in range(job.n)], left)

    def _make(self, job: Job, name="", scale=1) -> Status:
        name, image = name or str(uuid.uuid4()), job.plan.kind == "image"
        if "unsafe" in job.prompt:
            made = Status(name, "failed", error=google_error(400, "PUBLIC_ERROR_UNSAFE_GENERATION"))
        elif image:
            root = math.sqrt(RATIOS[job.plan.ratio])
            size = round(1024 * scale * root), round(1024 * scale / root)
            made = Status(name, "done", name, data=picture(name + job.prompt, *size))
        else:
            note = b"free" + job.prompt.encode(errors="replace")[:4000]  # a box that players skip
            made = Status(name, "done", name, data=CLIP + (len(note) + 4).to_bytes(4) + note)
        if image:
            return made
        self.clips[name] = now() + self.settings["demo.video_seconds"], made
        return Status(name, media=name)

    async def poll(self, token: Token, outputs: list[Output]) -> Reply:
        made = [self.clips[output.name] for output in outputs]
        return Reply([clip if now() >= ready else Status(clip.name) for ready, clip in made])

    async def upscale(self, token: Token, job: Job, output: Output) -> Status:
        await asyncio.sleep(self.settings["demo.image_seconds"])
        scale = {"4K": 4, "2K": 2}.get(job.plan.upscale, 1)
        return self._make(job, output.name if scale > 1 else f"{output.name}_upsampled", scale)
