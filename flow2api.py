"""Flow2API: your own Google Flow accounts as an OpenAI-compatible API. The gateway, in one file.

    client -> Generation -> Job(queued) -> a leased token -> upload -> submit -> Job(running)
    client <- rendered answer <- Job(completed | failed) <- settle <- one batched poll per token

A chapter uses only what stands above it:
     1  Settings          what can be set, and where a value comes from
     2  Errors            every failure that a caller is told about, and Google's reasons
     3  Catalogue         model ids -> Plan
     4  Store             the durable records, and SQLite
     5  Upstream          Google's protocol; nothing else in this file knows it
     6  Pool              accounts, leases, refresh, step-back
     7  Media             finished files, and the pictures that users send
     8  Jobs              the state machine: submit, poll, settle, resume
     9  Reading requests  a client's body -> Generation
    10  Client API        /v1: a job rendered as chat, pictures and videos
    11  Main              the application and the command line

Two files build on this one, which serves its clients without them: admin_flow2api.py is its owner's
side (/api, where accounts are added, and the page), demo_flow2api.py the simulated Flow of --demo.

Needs Python 3.11+ and aiohttp; aiohttp-socks only where a SOCKS proxy is set.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import concurrent.futures
import contextlib
import dataclasses
import datetime
import difflib
import functools
import gc
import hashlib
import hmac
import importlib
import ipaddress
import itertools
import json
import logging
import math
import os
import random
import re
import secrets
import shutil
import signal
import socket
import sqlite3
import sys
import tempfile
import threading
import time
import tomllib
import uuid
import weakref
from collections import Counter, defaultdict, deque, namedtuple
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import aiohttp
from aiohttp import web
from aiohttp.http import HttpProcessingError

__version__ = "0.1.0"
log = logging.getLogger("flow2api")
NETWORK_ERRORS = (aiohttp.ClientError, TimeoutError, OSError, ValueError)  # of odd addresses


def now() -> float:
    """Unix seconds: the only clock that decisions read, so that tests can drive it."""
    return time.time()


def today() -> str:
    return datetime.date.fromtimestamp(now()).isoformat()


# ---- 1. Settings ----------------------------------------------------------------------------


class SettingError(Exception):
    """A value that can't be used; the text names the key, the value and what is allowed."""


# A row of the table. name: section.key; the type is that of the default; low, high: of a number.
Setting = namedtuple("Setting", "name default help low high choices", defaults=[None, None, ()])
SETTINGS = (
    Setting("global.api_key", "", "Key that API clients send. Empty: made at first start."),
    Setting("global.admin_username", "admin", "User name of the admin page."),
    Setting("global.admin_password", "", "Admin password. Empty: made at first start."),
    Setting("flow.labs_base_url", "https://labs.google/fx/api", "Google's sessions and projects."),
    Setting("flow.api_base_url", "https://aisandbox-pa.googleapis.com/v1", "Google's media API."),
    Setting("flow.timeout", 120, "Seconds for one call to Google.", 1, 3600),
    Setting("flow.poll_interval", 3.0, "Seconds between status calls (one per account).", 0.05, 60),
    Setting("flow.max_poll_attempts", 500, "Status answers to wait for on one clip.", 1, 100000),
    Setting("server.host", "0.0.0.0", "Address to listen on."),
    Setting("server.port", 8000, "Port to listen on (0: any free one).", 0, 65535),
    Setting("server.data_dir", "", "Data folder. Empty: data/ beside the configuration."),
    Setting("server.allow_private_urls", False, "Fetch picture URLs from private networks, too."),
    Setting("proxy.proxy_enabled", False, "Send all traffic to Google through proxy_url."),
    Setting("proxy.proxy_url", "", "http://, https://, socks5:// or socks4:// address."),
    Setting("generation.image_timeout", 300, "Seconds until a picture job gives up.", 1, 86400),
    Setting("generation.video_timeout", 1500, "Seconds until a clip job gives up.", 1, 86400),
    Setting("admin.debug", False, "Log each call to Google, too."),
    Setting("admin.error_ban_threshold", 3, "Account failures in a row that disable it.", 1, 1000),
    Setting("cache.enabled", False, "Keep finished files here and serve them under /tmp/."),
    Setting("cache.timeout", 7200, "Seconds a kept file stays (0: for ever).", 0, 31536000),
    Setting("cache.base_url", "", "Public address in media links. Empty: what the client used."),
    Setting("token_refresh.enabled", True, "Check the accounts, and renew access tokens early."),
    Setting("token_refresh.interval", 3600, "Seconds between checks of an account.", 60, 86400),
    Setting("chat.video_content", "both", "A clip in an answer.", choices=("both", "html", "link")),
    Setting("chat.answer_side_prompts", True, "Answer title and tag prompts without generating."),
    Setting("chat.use_system_prompt", False, "Put the system message before the prompt."),
    Setting("chat.continue_pictures", True, "An edit request takes the chat's last picture along."),
    Setting("images.default_model", "nano_banana_pro", "Model where a request names none."),
    Setting("images.response_format", "b64_json", "Default form.", choices=("b64_json", "url")),
    Setting("videos.default_model", "veo_3_1-fast", "Model where a request names none."),
    Setting("videos.content", "stream", "How /content answers.", choices=("stream", "redirect")),
    Setting("limits.queue", 200, "Jobs that may wait for a free account.", 1, 100000),
    Setting("limits.requests", 2000, "Requests at once, open streams included.", 1, 100000),
    Setting("limits.bodies_mb", 512, "Request bodies in memory at once, MB.", 1, 65536),
    Setting("limits.body_mb", 64, "Largest request body, MB.", 1, 1024),
    Setting("limits.image_mb", 20, "Largest input picture, MB.", 1, 100),
    Setting("plugin.connection_token", "", "Key of the companion extension. Empty: it may not."),
    Setting("plugin.auto_enable_on_update", True, "A new session enables its account."),
    Setting("demo.image_seconds", 2.0, "Seconds a picture takes with --demo.", 0, 600),
    Setting("demo.video_seconds", 12.0, "Seconds a clip takes with --demo.", 0, 3600),
)
SETTING = {setting.name: setting for setting in SETTINGS}
SECRETS = ("global.api_key", "global.admin_password", "plugin.connection_token")
HIDDEN = (*SECRETS, "proxy.proxy_url")


class Settings:
    """Layers of values. `settings["server.port"]` is the value in force, read anew at each use."""

    LAYERS = ("command line", "environment", "admin page", "file", "generated")  # strongest first

    def __init__(self):
        self.layers: dict[str, dict[str, Any]] = {name: {} for name in self.LAYERS}
        self.models: dict[str, str] = {}  # section [models]
        self.warnings: list[str] = []
        self.folder = Path.cwd()

    def __getitem__(self, name: str) -> Any:
        return self.layers.get(self.source(name), {}).get(name, SETTING[name].default)

    def source(self, name: str) -> str:
        return next((layer for layer in self.LAYERS if name in self.layers[layer]), "default")

    def put(self, layer: str, name: str, raw: Any, origin: str) -> None:
        """Sets a value. Raises SettingError; an unknown name warns; a placeholder sets nothing."""
        if name not in SETTING:
            self.warnings.append(f"{origin}: unknown setting {name}; ignored")
            return
        _, default, _, low, high, choices = SETTING[name]
        kind, value = type(default), raw  # a TOML value, or the text of another origin
        with contextlib.suppress(ValueError, KeyError):
            if isinstance(raw, str) and kind is bool:
                value = {"true": True, "1": True, "false": False, "0": False}[raw.strip().lower()]
            elif isinstance(raw, str) or (kind is float and type(raw) is int):
                value = kind(raw)
        good = type(value) is kind and (not choices or value in choices)
        if not good or not (low is None or low <= value <= high):
            kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
            allowed = " | ".join(choices) or kinds[kind]
            allowed += "" if low is None else f" from {low:g} to {high:g}"
            shown = "that value" if name in SECRETS else repr(raw)
            raise SettingError(f"{origin}: {name} can't be {shown}; allowed: {allowed}")
        if name not in SECRETS or value not in ("", "your_api_key", "your_password"):
            self.layers[layer][name] = value

    def read_file(self, path: Path) -> None:
        """Takes the values of a TOML file; a missing file is an empty one."""
        self.folder = path.parent
        if not self.folder.is_dir():
            raise SettingError(f"{self.folder}: there is no such folder")
        try:
            document = tomllib.loads(path.read_text("utf-8-sig")) if path.exists() else {}
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as err:
            raise SettingError(f"{path}: {err}") from None
        models = document.pop("models", {})
        for name, key in models.items() if isinstance(models, dict) else [("", models)]:
            try:
                self.models[name] = key
                key.format(P="", O="", U="", D=0)
            except (AttributeError, LookupError, ValueError):
                words = f"can't be {key!r}; allowed: a text, at most with {{P}} {{O}} {{U}} {{D}}"
                raise SettingError(f"{path.name}: [models] {name} {words}") from None
        for section, values in document.items():
            for key, raw in values.items() if isinstance(values, dict) else [("", None)]:
                self.put("file", f"{section}.{key}", raw, path.name)

    def read_environment(self, environ: dict[str, str]) -> None:
        names = {"FLOW2API_" + name.replace(".", "_").upper(): name for name in SETTING}
        for variable in filter(lambda name: name.startswith("FLOW2API_"), environ):
            self.put("environment", names.get(variable, variable), environ[variable], variable)

    @property
    def data(self) -> Path:
        return Path(self["server.data_dir"] or self.folder / "data").expanduser().resolve()


# ---- 2. Errors ------------------------------------------------------------------------------
# request: told to the caller, no account is blamed. account: nothing was spent, this one steps back
# and another may be tried. banning: so too, and it counts towards the automatic ban. session: the
# account is disabled. again: nothing was spent, one more try. unknown: maybe spent, not sent again.
ERROR_ROWS = (  # HTTP status, what the failure does (final: none of these), codes
    (400, "request", "invalid_request invalid_image unsupported_parameter tier_required"),
    (400, "request", "mode_not_available content_policy_violation task_not_completed"),
    (401, "request", "invalid_api_key"),
    (404, "request", "not_found model_not_found task_not_found content_not_found"),
    (405, "request", "method_not_allowed"),
    (409, "request", "conflict cancelled idempotency_conflict"),
    (413, "request", "request_too_large"),
    (429, "final", "queue_full too_many_logins"),
    (500, "final", "internal_error"),
    (501, "request", "not_implemented"),
    (424, "final", "generation_failed generation_timeout"),  # clients repeat 5xx by themselves
    (424, "unknown", "submit_unknown"),
    (502, "again", "upstream_error upstream_unreachable"),
    (502, "final", "upstream_changed model_unavailable proxy_unavailable"),
    (503, "again", "upstream_busy"),
    (503, "final", "no_accounts no_credits shutting_down"),
    (503, "account", "account_throttled account_busy account_daily_quota account_no_credits"),
    (503, "account", "captcha_required model_not_for_account"),
    (503, "banning", "account_refused"),
    (503, "session", "account_session_ended"),
)
ERRORS = {code: (status, does) for status, does, codes in ERROR_ROWS for code in codes.split()}
TYPES = {400: "invalid_request_error", 401: "authentication_error", 429: "rate_limit_error"}
TYPES |= {424: "server_error"}

# Google's reason (PUBLIC_ERROR_*, or of failureReasons), text and HTTP status (0: a clip failed
# later) -> code, first pause in seconds, words. The first match counts.
# fmt: off
REASONS = (
    ("USER_REGION|USER_MINOR|APP_UNAVAILABLE", "account_refused", 600, "Flow refuses this account"),
    ("TOO_MUCH_TRAFFIC|THROTTLED", "account_throttled", 300, "Google is slowing this account down"),
    ("UNUSUAL_ACTIVITY|reCAPTCHA", "captcha_required", 300,
     "Google wants a reCAPTCHA token: use Flow in this account's own browser, or the extension"),
    ("DAILY_QUOTA", "account_daily_quota", 60, "This model's quota of the day is used up"),
    ("QUOTA_REACHED", "account_no_credits", 600, "The account has no credits left"),
    ("MODEL_ACCESS_DENIED", "model_not_for_account", 0, "The account's plan lacks this model"),
    ("CONCURRENT_LIMIT", "account_busy", 20, "The account has too many clips under way"),
    ("TRAFFIC|OVERLOADED|SOMETHING_WENT|TIMED_OUT", "upstream_busy", 0, "Flow is overloaded"),
    ("NON_ENGLISH", "invalid_request", 0, "Flow wants an English prompt for this"),
    ("IN_PROGRESS|CANNOT_BE_CANCELED", "conflict", 0, "Flow is already at it"),
    ("IMAGE_TOO_|FILE_FORMAT", "invalid_image", 0, "Flow can't take this picture's size or format"),
    ("UNSAFE|SEXUAL|VIOLEN|DANGER|MINOR|PROMINENT|PHOTOREAL|IP_|FILTER|PROHIBIT|REPUTATION|_EDIT",
     "content_policy_violation", 0,
     "Google's content policy refused this prompt or picture; change it and try again"),
    ("HTTP 0$", "generation_failed", 60, "The generation failed at Google"),
    ("HTTP 40[13]$", "account_refused", 60, "Google refused this account"),
    ("HTTP 404$", "model_unavailable", 60, "Google knows no such key or medium; see [models]"),
    ("HTTP (408|499)$", "upstream_error", 60, "Google's side took too long"),
    ("HTTP 429$", "account_throttled", 60, "Google is slowing this account down"),
    ("HTTP 4..$", "upstream_changed", 60, "Google refused the form of our request"),
    ("", "upstream_error", 60, "Google's side failed"),
)
# fmt: on


class GatewayError(Exception):
    """A failure that a caller is told about: a code of ERRORS and words of its own. `param`: the
    request field at fault. `retry_after`: seconds for that header. `pause`: seconds an account
    steps back at first. `upstream`: Google's HTTP status. `headers`: more for the answer."""

    def __init__(self, code: str, message: str, *, param=None, retry_after=0, pause=60, upstream=0):
        super().__init__(message)
        self.status, self.does = ERRORS[code]
        self.type = TYPES.get(self.status, "server_error" if self.status >= 500 else TYPES[400])
        self.code, self.param, self.retry_after = code, param, retry_after
        self.pause, self.upstream, self.headers = pause, upstream, {}

    def record(self) -> dict:
        """What is stored of it; GatewayError(**record) is the error again."""
        return {"code": self.code, "message": str(self), "retry_after": self.retry_after}

    def body(self) -> dict:
        """The error object of OpenAI's API."""
        words = {"message": str(self), "type": self.type, "param": self.param, "code": self.code}
        return {"error": words}


def bad(message: str, param: str | None = None, code="invalid_request") -> GatewayError:
    """The error for a request that is itself at fault."""
    return GatewayError(code, message, param=param)


def google_error(status: int, reason: str, message="", retry_after=0) -> GatewayError:
    """The error for a refusal of Google: its HTTP status, reason and text, as in REASONS."""
    known = f"{reason} {message} HTTP {status}"
    _, code, pause, words = next(row for row in REASONS if re.search(row[0], known))
    words += f" (Google: {reason or message or status})"[:300]
    return GatewayError(code, words, retry_after=retry_after, pause=pause, upstream=status)


# ---- 3. Catalogue ---------------------------------------------------------------------------
# Plans that Google sells, lowest first: the word on the wire, and what people call it.
TIERS = {"PAYGATE_TIER_NOT_PAID": "free", "PAYGATE_TIER_ONE": "Pro", "PAYGATE_TIER_TWO": "Ultra"}
RATIOS = {"landscape": 16 / 9, "portrait": 9 / 16, "square": 1.0, "4-3": 4 / 3, "3-4": 3 / 4}

# Upstream keys (Flow's catalogue of 2026-08-27): family, mode, key, key at 4 and 6 s; see Plan.key.
# fmt: off
KEY_ROWS = (
    ("veo_3_1", "text", "veo_3_1_t2v{P}", "veo_3_1_t2v_quality_{D}s"),
    ("veo_3_1", "start", "veo_3_1_i2v_s{P}", "veo_3_1_i2v_s_quality_{D}s"),
    ("veo_3_1", "frames", "veo_3_1_i2v_s{P}_fl", "veo_3_1_i2v_s_quality_{D}s_fl"),
    ("veo_3_1", "extend", "veo_3_1_extend_{O}", ""),
    ("veo_3_1_fast", "text", "veo_3_1_t2v_fast{P}{U}", "veo_3_1_t2v_fast_{D}s"),
    ("veo_3_1_fast", "start", "veo_3_1_i2v_s_fast{P}{U}", "veo_3_1_i2v_s_fast_{D}s"),
    ("veo_3_1_fast", "frames", "veo_3_1_i2v_s_fast{P}{U}_fl", "veo_3_1_i2v_s_fast_{D}s_fl"),
    ("veo_3_1_fast", "references", "veo_3_1_r2v_fast_{O}{U}", ""),
    ("veo_3_1_fast", "extend", "veo_3_1_extend_fast_{O}{U}", ""),
    ("veo_3_1_lite", "text", "veo_3_1_t2v_lite", "veo_3_1_t2v_lite_{D}s"),
    ("veo_3_1_lite", "start", "veo_3_1_i2v_lite", "veo_3_1_i2v_s_lite_{D}s"),
    ("veo_3_1_lite", "frames", "veo_3_1_interpolation_lite", "veo_3_1_i2v_s_lite_{D}s_fl"),
    ("veo_3_1_lite", "references", "veo_3_1_r2v_lite", ""),
    ("veo_3_1_lite", "extend", "veo_3_1_extension_lite", ""),
    *(("omni_flash", mode, f"abra_{wire}_{{D}}s", f"abra_{wire}_{{D}}s") for mode, wire in
      (("text", "t2v"), ("start", "i2v"), ("frames", "i2v"), ("references", "r2v"))),
    ("omni_flash", "edit", "abra_edit", ""),
)
EDITOR = "omni_flash"  # the model that edits clips
COSTS = {  # credits of one clip on a free, Pro and Ultra account, by its seconds; None: not there
    "veo_3_1": {8: (100, 100, 100), 4: (None, None, 100), 6: (None, None, 100)},
    "veo_3_1_fast": {8: (20, 20, 10), 4: (None, None, 10), 6: (None, None, 10)},
    "veo_3_1_lite": {8: (10, 10, 5), 4: (None, None, 5), 6: (None, None, 5)},
    "veo_3_1_relaxed": {8: (None, None, 0), 4: (None, None, 0), 6: (None, None, 0)},
    "omni_flash": {4: (7, 7, 7), 6: (10, 10, 10), 8: (12, 12, 12), 10: (15, 15, 15)},
    "omni_flash_edit": {8: (20, 20, 20)},
}
UPSCALES = {"": (0, 0, 0), "1080p": (None, 0, 0), "4k": (None, None, 50),
            "2K": (0, 0, 0), "4K": (None, None, 0)}
MODES = {"text": "text to video", "start": "start frame", "frames": "start and end frame",
         "references": "reference pictures", "extend": "extension of a clip",
         "edit": "edit of a clip", "image": "picture"}
# By the names that [models] overrides: family of pictures; family_mode of clips, _short: 4 and 6 s.
KEYS = {"nano_banana_pro": "GEM_PIX_2", "nano_banana_2": "NARWHAL"}
KEYS |= {"nano_banana_2_lite": "HARBOR_SEAL", "imagen_4": "IMAGEN_3_5"}
KEYS |= {f"{family}_{mode}": key for family, mode, key, _ in KEY_ROWS}
KEYS |= {f"{family}_{mode}_short": short for family, mode, _, short in KEY_ROWS if short}
_LITE = {name: key for name, key in KEYS.items() if name.startswith("veo_3_1_lite")}
KEYS |= {name.replace("lite", "relaxed"): f"{key}_low_priority" for name, key in _LITE.items()}
# What the part of a model id before its parameters stands for, and which parameters it takes.
Head = namedtuple("Head", "family params ratio mode note", defaults=["portrait", "auto", ""])
SHAPES, SIZES, SIDES = tuple(RATIOS), ("1K", "2K", "4K"), ("portrait", "landscape")
LENGTHS = ("4s", "6s", "8s", "10s")
CLIPS = (*SIDES, "fast", "lite", "relaxed", "fl", *LENGTHS[:3], "1080p", "4k")
OLD_BANANA = "Google retired the first Nano Banana; this is Nano Banana 2."
HEADS = {
    "veo_3_1":                     Head("veo_3_1", CLIPS),
    "omni_flash":                  Head("omni_flash", (*SIDES, "fl", *LENGTHS)),
    "omni":           Head("omni_flash", (*SIDES, *LENGTHS), "landscape", "references"),
    "nano_banana":                 Head("nano_banana_2", SHAPES, note=OLD_BANANA),
    "nano_banana_2":               Head("nano_banana_2", SHAPES + SIZES),
    "nano_banana_2_lite":          Head("nano_banana_2_lite", SHAPES),
    "nano_banana_pro":             Head("nano_banana_pro", SHAPES + SIZES),
    "imagen_4":                    Head("imagen_4", SHAPES),
    "gemini-2.5-flash-image":      Head("nano_banana_2", SHAPES, "landscape", note=OLD_BANANA),
    "gemini-3.0-pro-image":        Head("nano_banana_pro", SHAPES + SIZES, "landscape"),
    "gemini-3.1-flash-image":      Head("nano_banana_2", SHAPES + SIZES, "landscape"),
    "imagen-4.0-generate-preview": Head("imagen_4", SHAPES, "landscape"),
}
# Ids in Google's own style, veo_3_1_t2v_fast_portrait_4s_1080p: the words that name a mode.
WIRE_MODES = {"t2v": "text", "i2v": "i2v", "interpolation": "frames", "r2v": "references",
              "extend": "extend"}
# A head's mode -> that of a request with no, one, two, … pictures.
MODE_BY_COUNT = {"auto": ("text", "start", "frames", "references"),
                 "i2v": ("start", "start", "frames"), "references": ("text", "references")}
RETIRED = {  # prefix -> today's of the same price
    "veo_2_1_fast_d_15_": ("veo_3_1_lite_", "Google retired Veo 2 Fast; this is Veo 3.1 Lite."),
    "veo_2_0_":           ("veo_3_1_", "Google retired Veo 2; this is Veo 3.1."),
    "veo_3_0_r2v_":       ("veo_3_1_r2v_", "Google retired Veo 3.0; this is Veo 3.1."),
}
CONFLICTS = (SHAPES, ("lite", "fast"), ("lite", "relaxed"), LENGTHS, ("1080p", "4k"), SIZES)
# fmt: on
# The ids that /v1/models lists; the grammar takes many more.
LISTED = (
    "gemini-{2.5-flash|3.0-pro|3.1-flash}-image-{portrait|landscape}",
    "imagen-4.0-generate-preview-{portrait|landscape}",
    "veo_{3_1_t2v_fast|2_1_fast_d_15_t2v|2_1_fast_d_15_i2v|2_0_t2v|2_0_i2v}_{portrait|landscape}",
    "veo_3_{1_i2v_s_fast_fl|0_r2v_fast|1_r2v_fast}_{portrait|landscape}",
    "veo_3_1{|-portrait|-landscape}{|-fast|-lite|-relaxed}{|-fl}",
    "veo_3_1{|-portrait|-landscape}{|-fast}-{1080p|4k}",
    "omni_flash{|-portrait|-landscape}{|-4s|-6s|-10s}",
    "{nano_banana|nano_banana_2|nano_banana_2_lite|nano_banana_pro|imagen_4}"
    "{|-portrait|-landscape|-square|-4-3|-3-4}",
    "nano_banana_pro{|-portrait|-landscape|-square|-4-3|-3-4}-{2K|4K}",
)
_CHOICES = [[part.split("|") for part in re.split("[{}]", pattern)] for pattern in LISTED]
MODELS = tuple(dict.fromkeys("".join(word) for row in _CHOICES for word in itertools.product(*row)))


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a request comes to, before an account is chosen."""

    model: str
    kind: str  # "image" or "video"
    family: str
    mode: str  # a key of MODES
    ratio: str  # a key of RATIOS
    seconds: int  # length of a clip, 0 for pictures
    upscale: str  # a key of UPSCALES
    template: str  # see KEYS
    costs: list[int | None]  # credits of one output per tier, upscaling included; None: not served
    images: list[int]  # how many input pictures it takes, from and to
    note: str = ""  # what a caller should know about the id

    def cost(self, tier: str) -> int | None:
        return self.costs[list(TIERS).index(tier) if tier in TIERS else 0]

    def key(self, tier: str) -> str:
        portrait = "_portrait" if self.ratio == "portrait" else ""
        ultra = "_ultra" if tier == "PAYGATE_TIER_TWO" else ""
        return self.template.format(P=portrait, O=self.ratio, U=ultra, D=self.seconds)

    @property
    def pace(self) -> tuple:
        return self.family, self.mode, self.seconds, self.upscale

    def prices(self) -> dict[str, int]:
        """Credits of one output by what people call the plans that can make it."""
        costs = zip(TIERS.values(), self.costs, strict=True)
        return {name: cost for name, cost in costs if cost is not None}

    def describe(self) -> str:
        what = f"{self.family} {MODES[self.mode]}, {self.ratio}"
        what += f", {self.seconds} s" if self.seconds else ""
        what += f", upscaled to {self.upscale}" if self.upscale else ""
        prices = ", ".join(f"{name} {cost}" for name, cost in self.prices().items())
        return f"{what}; credits: {prices}. {self.note}".rstrip(". ") + "."


def resolve(model: str, *, size="", seconds=0, images=0, mode="", overrides=None) -> Plan:
    """The plan of a model id. `size`: "1280x720", "16:9", "auto" or empty. `seconds`: 0 for the
    id's own. `images`: how many are sent along. `mode`: "edit" or "extend". `overrides`: like
    KEYS. Raises model_not_found, mode_not_available, or invalid_request."""
    head, words = _split(model)
    for group in CONFLICTS:
        if len(both := [word for word in group if word in words]) > 1:
            raise bad(f"{model}: {both[0]} and {both[1]} exclude each other", "model")
    ratio, keys = _ratio(model, head, words, size), KEYS | (overrides or {})
    upscale = next((word for word in UPSCALES if word in words), "")
    if head.family in KEYS:
        given = (head.family, "image", ratio, 0, upscale, keys[head.family], [*UPSCALES[upscale]])
        return Plan(model, "image", *given, [0, 3 if head.family == "imagen_4" else 10], head.note)
    variant = next((word for word in ("relaxed", "fast", "lite") if word in words), "")
    family = f"{head.family}_{variant}" if variant else head.family
    mode = mode or ("i2v" if "fl" in words else head.mode)
    most = 7 if family == "omni_flash" else 3
    limits = {"i2v": [1, 2], "frames": [2, 2], "auto": [0, most], "references": [0, most]}
    limits, mode = limits.get(mode, [0, 0]), MODE_BY_COUNT.get(mode, (mode,))[: images + 1][-1]
    prices = COSTS.get(f"{family}_{mode}", COSTS[family])
    length = next((int(word[:-1]) for word in LENGTHS if word in words), seconds or 8)
    if (seconds or length) != length or length not in prices:
        can = ", ".join(map(str, prices))
        raise bad(f"{model} can't be {seconds or length} s long; {family} can: {can}", "seconds")
    name = f"{family}_{mode}" + ("_short" if length < 8 else "")
    if (key := keys.get(name)) is None:
        can = ", ".join(MODES[known] for known in MODES if f"{family}_{known}" in KEYS)
        said = f"{model}: {family} has no {MODES[mode]!r} at {length} s; it has {can}"
        raise bad(said, "model", "mode_not_available")
    served = (None, None, 0) if "ultra" in words else (0, 0, 0)
    parts = zip(prices[length], UPSCALES[upscale], served, strict=True)
    costs = [None if None in part else sum(part) for part in parts]
    return Plan(model, "video", family, mode, ratio, length, upscale, key, costs, limits, head.note)


def _split(model: str) -> tuple[Head, set[str]]:
    """A model id's head and its parameters, each of which the head takes."""
    old = next(filter(model.startswith, RETIRED), "")
    new, note = RETIRED.get(old, ("", ""))
    name = re.sub(r"^omni_(portrait|landscape)\Z", r"omni-\1", new + model.removeprefix(old))
    if start := next((start for start in HEADS if f"{name}-".startswith(f"{start}-")), ""):
        tail = re.sub("-four-three|-4-3", "-4:3", name[len(start) :])
        head, words = HEADS[start], re.sub("-three-four|-3-4", "-3:4", tail).split("-")[1:]
    else:
        parts = name.split("_")
        modes = [WIRE_MODES[part] for part in parts[3:] if part in WIRE_MODES]
        if parts[:3] != ["veo", "3", "1"] or len(modes) != 1:
            close = difflib.get_close_matches(model, MODELS, 3, 0.5)
            hint = f"did you mean {' or '.join(close)}?" if close else "GET /v1/models lists them"
            raise bad(f"There is no model {model[:80]!r}; {hint}", "model", "model_not_found")
        if "relaxed" in parts:
            note = "Google retired the relaxed keys; this is Veo 3.1 Lite at low priority."
        head = Head("veo_3_1", (*CLIPS, "s", "ultra"), "landscape", modes[0], note)
        words = [w for w in parts[3:] if w not in WIRE_MODES and w.lower() not in ("s", "fl")]
    known = {param.lower().replace("-", ":"): param for param in head.params}
    for word in words:
        if word.lower() not in known:
            takes = ", ".join(head.params)
            raise bad(f"{model[:80]}: unknown parameter {word[:40]!r}; it takes {takes}", "model")
    return head, {known[word.lower()] for word in words}


def _ratio(model: str, head: Head, words: set[str], size: str) -> str:
    """The shape: a parameter, else the nearest to `size`, else the head's own."""
    named = next((shape for shape in SHAPES if shape in words), "")
    if not size or size == "auto":
        return named or head.ratio
    match = re.fullmatch(r"\s*(\d{1,6})\s*[xX×*:]\s*(\d{1,6})\s*", str(size))
    if not match or not int(match[1]) or not int(match[2]):
        raise bad(f"size must look like 1280x720 or 16:9, not {str(size)[:40]!r}", "size")
    wanted = int(match[1]) / int(match[2])
    shapes = [shape for shape in SHAPES if shape in head.params]
    tries = (named or head.ratio, *shapes)  # at a tie the first one wins: a clip can't be 512x512
    nearest = min(tries, key=lambda shape: abs(math.log(RATIOS[shape] / wanted)))
    if "square" in shapes and abs(math.log(RATIOS[nearest] / wanted)) > math.log(1.5):
        raise bad(f"size {size} is far from every shape of {model}: {', '.join(shapes)}", "size")
    own, near = RATIOS[named or nearest], RATIOS[nearest]
    if (own > 1, own < 1) != (near > 1, near < 1):
        raise bad(f"size {size} contradicts {named!r} in {model}", "size")
    return named or nearest


# ---- 4. Store -------------------------------------------------------------------------------
to_json = functools.partial(json.dumps, separators=(",", ":"), default=dataclasses.asdict)
OPEN = ("queued", "submitting", "unknown", "running", "settling")
MIGRATIONS = (
    """CREATE TABLE tokens (id INTEGER PRIMARY KEY, email TEXT NOT NULL UNIQUE, data TEXT NOT NULL);
    CREATE TABLE jobs (id TEXT PRIMARY KEY, state TEXT NOT NULL, created_at REAL NOT NULL,
        token_id INTEGER, data TEXT NOT NULL);
    CREATE INDEX jobs_by_state ON jobs (state);
    CREATE INDEX jobs_by_time ON jobs (created_at);
    CREATE TABLE outputs (job_id TEXT NOT NULL, number INTEGER NOT NULL, name TEXT NOT NULL,
        data TEXT NOT NULL, PRIMARY KEY (job_id, number));
    CREATE TABLE logs (id INTEGER PRIMARY KEY, created_at REAL NOT NULL, job_id TEXT,
        token_id INTEGER, data TEXT NOT NULL);
    CREATE TABLE settings (name TEXT PRIMARY KEY, data TEXT NOT NULL);""",
    """CREATE TABLE keys (key TEXT PRIMARY KEY, request TEXT NOT NULL, job_id TEXT NOT NULL,
        created_at REAL NOT NULL);
    CREATE INDEX keys_by_time ON keys (created_at);
    CREATE TRIGGER drop_old AFTER INSERT ON keys
        BEGIN DELETE FROM keys WHERE created_at < NEW.created_at - 172800; END;""",
)


class Record:
    """A durable record. FIELDS: names and defaults; COLUMNS are columns of TABLE, the rest is JSON
    in `data`, so that a new field needs no migration. `live` sets what is in memory only."""

    def __init__(self, data="{}", **values: Any):
        values = json.loads(to_json(self.FIELDS)) | json.loads(data) | values
        vars(self).update({name: values[name] for name in self.FIELDS})
        self.live()

    def row(self) -> dict:
        kept = {name: getattr(self, name) for name in self.FIELDS if name not in self.COLUMNS}
        return {name: getattr(self, name) for name in self.COLUMNS} | {"data": to_json(kept)}


class Token(Record):
    """One Google account. Times are unix seconds; credits None: not known yet; reason: why it is
    not active, in plain words; failures: account failures in a row; today: counters of `day`."""

    TABLE, COLUMNS = "tokens", ("id", "email")
    FIELDS = dict.fromkeys(["email", "name", "remark", "proxy_url", "st", "at", "tier"], "")
    FIELDS |= {"project_id": "", "project_name": "", "reason": "", "day": "", "today": {}}
    FIELDS |= {"created_at": 0.0, "at_expires": 0.0, "checked_at": 0.0, "last_used_at": 0.0}
    FIELDS |= {"is_active": True, "image_enabled": True, "video_enabled": True, "credits": None}
    FIELDS |= {"image_concurrency": -1, "video_concurrency": -1, "failures": 0, "id": 0}
    FIELDS |= {"image_count": 0, "video_count": 0, "use_count": 0, "error_count": 0}

    def live(self) -> None:
        self.busy, self.reserved, self.lock = Counter(), 0, asyncio.Lock()
        self.paused_until, self.paused_for, self.pause = 0.0, None, 0.0
        self.seen: dict[str, tuple[int, float]] = {}  # kind -> jobs at once that Google took, until


class Output(Record):
    """One paid output of a job: Google's handle (name, project, scene, media), what became of it;
    made: while a clip is upscaled under a new name, the handle of the clip it is made from."""

    TABLE, COLUMNS = "outputs", ("job_id", "number", "name")
    FIELDS = {"job_id": "", "number": 0, "name": "", "project": "", "scene": "", "media": ""}
    FIELDS |= {"state": "pending", "error": {}, "made": {}, "upscaled": False}  # "done", "failed"
    FIELDS |= {"url": "", "url_expires": 0.0, "file": ""}

    def live(self) -> None:
        self.answers = 0  # status answers so far


class Job(Record):
    """One generation. Times are unix seconds, 0: not yet. origin: the API it came through. batch:
    our mark on the submit, to find it by at Google. error: code and message. source: the clip of
    an edit or an extension: job, token_id, project, media, scene. metadata: a client's own."""

    TABLE, COLUMNS = "jobs", ("id", "state", "created_at", "token_id")
    FIELDS = {"id": "", "state": "queued", "plan": None, "prompt": "", "n": 1, "inputs": []}
    FIELDS |= {"origin": "", "detached": False, "token_id": None, "project": "", "batch": ""}
    FIELDS |= {"created_at": 0.0, "submitted_at": 0.0, "completed_at": 0.0, "deadline": 0.0}
    FIELDS |= {"error": {}, "notes": [], "source": {}, "metadata": None, "median": []}

    def live(self) -> None:
        if isinstance(self.plan, dict):  # as JSON keeps it
            self.plan = Plan(**self.plan)
        self.outputs, self.shunned, self.changed = [], set(), asyncio.Event()
        self.stage, self.task, self.percent, self.clients = "", None, 0, 0

    @property
    def ended(self) -> bool:
        return self.state not in OPEN

    def done(self) -> list[Output]:
        return [output for output in self.outputs if output.state == "done"]


class StoreError(Exception):
    """The database can't be used; the text says why."""


class Store:
    """SQLite in WAL mode. One thread writes all that waits in one transaction; `await put(...)`
    returns when the records are on the disk."""

    def __init__(self, folder: Path):
        self.path = folder / "flow2api.db"
        self._waiting, self._reading = deque(), threading.Lock()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "store")

    def open(self) -> None:
        """Raises StoreError. Of two processes on a data folder, which would share jobs, too."""
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock, options = self.path.with_name("lock.db"), {"timeout": 10, "check_same_thread": False}
        for path in (self.path, lock):
            path.touch(0o600)
        self._reader, self._writer = (sqlite3.connect(self.path, **options) for _ in range(2))
        self._reader.row_factory = sqlite3.Row
        self._lock = sqlite3.connect(lock, **options | {"timeout": 0})
        try:
            self._lock.execute("BEGIN EXCLUSIVE")  # a lock on every system
            self._rows("PRAGMA journal_mode=WAL")
            if (found := self._rows("PRAGMA quick_check(1)")[0][0]) != "ok":
                raise sqlite3.DatabaseError(found)
            version = self._rows("PRAGMA user_version")[0][0]
            if version > len(MIGRATIONS):
                raise sqlite3.DatabaseError("made by a newer Flow2API")
            for number, script in enumerate(MIGRATIONS[version:], version + 1):
                self._reader.executescript(f"BEGIN; {script} PRAGMA user_version={number}; COMMIT;")
            self._writer.execute("PRAGMA synchronous=FULL")
        except sqlite3.DatabaseError as err:
            self.close()
            words = f": {err}; nothing was changed, restore a backup"
            words = " is in use by another Flow2API" if "locked" in str(err) else words
            raise StoreError(f"{self.path}{words}") from None

    def copy(self, target: Path) -> None:
        """Writes a consistent copy, also while another process is at work. Raises StoreError."""
        try:
            source = sqlite3.connect(f"{self.path.as_uri()}?mode=rw", uri=True)  # none is made
            target.touch(0o600, exist_ok=False)
            with contextlib.closing(source), contextlib.closing(sqlite3.connect(target)) as copy:
                source.backup(copy)
        except (OSError, sqlite3.Error) as err:
            raise StoreError(f"no copy of {self.path} to {target}: {err}") from None

    def close(self) -> None:
        self._thread.shutdown()  # once all is written
        for db in (self._writer, self._reader, self._lock):
            db.close()

    def _write(self, *steps: tuple[str, Any]) -> asyncio.Future:
        """Queues the steps; the future is done when they are on disk, and needs no awaiting."""
        done: concurrent.futures.Future = concurrent.futures.Future()
        self._waiting.append((steps, done))
        self._thread.submit(self._write_group)
        future = asyncio.wrap_future(done)
        future.add_done_callback(lambda f: f.cancelled() or f.exception())
        return future

    def _write_group(self) -> None:
        group = [self._waiting.popleft() for _ in range(min(len(self._waiting), 256))]
        error = self._commit([step for steps, _ in group for step in steps])
        for steps, done in group:  # one that is refused takes no other along
            own = self._commit(steps) if error and len(group) > 1 else error
            if done.set_running_or_notify_cancel():
                done.set_exception(own) if own else done.set_result(None)

    def _commit(self, steps: Iterable) -> StoreError | None:
        try:
            with self._writer:  # a transaction: it commits, or rolls back
                for step in steps:
                    self._writer.execute(*step)
        except (sqlite3.Error, ValueError, OverflowError) as err:
            log.error("the database refused a write: %s", err)
            return StoreError(f"the database refused a write: {err}")
        return None

    def put(self, *records: Record) -> asyncio.Future:
        """Writes the records as they are now, all or none."""
        return self.put_rows(*((record.TABLE, record.row()) for record in records))

    def put_rows(self, *rows: tuple[str, dict]) -> asyncio.Future:
        """Writes (table, row) pairs, all or none."""
        sql = "INSERT OR REPLACE INTO {} ({}) VALUES (:{})"
        return self._write(*((sql.format(t, ", ".join(r), ", :".join(r)), r) for t, r in rows))

    def delete(self, *wanted: tuple[str, str, Any]) -> asyncio.Future:
        """Deletes the rows of (table, column, value), all or none."""
        return self._write(*((f"DELETE FROM {t} WHERE {name} = ?", (x,)) for t, name, x in wanted))

    def _rows(self, sql: str, values: Iterable = ()) -> list[sqlite3.Row]:
        with self._reading:
            return self._reader.execute(sql, values).fetchall()

    def settings(self) -> dict[str, Any]:
        return {r["name"]: json.loads(r["data"]) for r in self._rows("SELECT * FROM settings")}

    def last_owner(self) -> int:
        return self._rows("SELECT max(token_id) FROM jobs")[0][0] or 0

    def tokens(self) -> list[Token]:
        return [Token(**row) for row in self._rows("SELECT * FROM tokens ORDER BY id")]

    def job(self, job_id: str) -> Job | None:
        return next(iter(self._jobs("WHERE id = ?", job_id)), None)

    def jobs(
        self, kind="", states=(), token_id=None, model="", after="", oldest_first=False, limit=-1
    ):
        """Jobs, the newest first as a rule. `after`: the id that a page starts after."""
        order, beyond = ("ASC", ">") if oldest_first else ("DESC", "<")
        page = f"(created_at, id) {beyond} (SELECT created_at, id FROM jobs WHERE id = ?)"
        tests = {"substr(id, 1, 5) = ?": [kind], "token_id = ?": [token_id], page: [after]}
        tests["json_extract(data, '$.plan.model') = ?"] = [model]
        tests[f"state IN ({', '.join('?' * len(states))})"] = states
        tests = {sql: values for sql, values in tests.items() if any(values)}
        where = f"WHERE {' AND '.join(tests) or 'TRUE'} ORDER BY created_at {order}, id {order}"
        return self._jobs(f"{where} LIMIT ?", *itertools.chain(*tests.values()), limit)

    def job_of_key(self, key: str, since: float) -> tuple[str, str] | None:
        """(hash of the request, job id) of an Idempotency-Key that came since then."""
        sql = "SELECT request, job_id FROM keys WHERE key = ? AND created_at > ?"
        return next(map(tuple, self._rows(sql, (key, since))), None)

    def _jobs(self, where: str, *values: Any) -> list[Job]:
        jobs = [Job(**row) for row in self._rows(f"SELECT * FROM jobs {where}", values)]
        for job in jobs:
            sql = "SELECT * FROM outputs WHERE job_id = ? ORDER BY number"
            job.outputs = [Output(**row) for row in self._rows(sql, (job.id,))]
        return jobs


# ---- 5. Upstream ----------------------------------------------------------------------------
# Wire facts: captures of Flow's web client and of public clients, October 2025 ("2025") to August
# 2026 ("2026"). Readers take both generations of replies; builders send today's requests.

SESSION_COOKIE = "__Secure-next-auth.session-token"
WIRE_RATIOS = {"landscape": "LANDSCAPE", "portrait": "PORTRAIT", "square": "SQUARE"}
WIRE_RATIOS |= {"4-3": "LANDSCAPE_FOUR_THREE", "3-4": "PORTRAIT_THREE_FOUR"}
ENDPOINTS = {"text": "Text", "start": "StartImage", "frames": "StartAndEndImage"}
ENDPOINTS |= {"references": "ReferenceImages", "extend": "ExtendVideo", "edit": "EditVideo"}

# What Google says of one output. state: "pending", "done" or "failed". media: the name that later
# calls (upscale, download) want. data: the file itself, where the reply carried it.
_UNSAID = ["pending", "", "", "", "", b"", None]
Status = namedtuple("Status", "name state media project scene url data error", defaults=_UNSAID)
Reply = namedtuple("Reply", "statuses credits", defaults=[None])  # None: the balance isn't said


def clean_session_token(text: str) -> str:
    """The bare token of what people paste: a value, `name=value`, or a whole Cookie header."""
    match = re.search(r"next-auth\.session-token=[\"']?([^;\s\"']+)", text)
    return match[1] if match else text.strip("\"'; \t\r\n")


def client_context(project: str, tier: str = "") -> dict:
    """Google also takes a reCAPTCHA token, of action IMAGE_GENERATION or VIDEO_GENERATION, as
    recaptchaContext: token, and applicationType RECAPTCHA_APPLICATION_TYPE_WEB."""
    context = {"sessionId": f";{int(now() * 1000)}", "projectId": project, "tool": "PINHOLE"}
    return context | ({"userPaygateTier": tier} if tier else {})


def submit_request(job: Job, tier: str, media: list[str], context: dict) -> dict:
    """Body of a submit: an element with a seed of its own for each output."""
    plan, prompt, batch = job.plan, {"parts": [{"text": job.prompt}]}, {"batchId": job.batch}
    ratio = f"{plan.kind.upper()}_ASPECT_RATIO_{WIRE_RATIOS[plan.ratio]}"
    if plan.kind == "image":
        kind, extra = "IMAGE_INPUT_TYPE_REFERENCE", {"useNewMedia": True}
        wanted = {"imageModelName": plan.key(tier), "imageAspectRatio": ratio}
        wanted |= {"clientContext": context, "structuredPrompt": prompt}
        wanted["imageInputs"] = [{"name": name, "imageInputType": kind} for name in media]
    else:
        kind, extra = "IMAGE_USAGE_TYPE_ASSET", {"useV2ModelConfig": True}
        wanted = {"videoModelKey": plan.key(tier), "aspectRatio": ratio, "metadata": {}}
        wanted["textInput"] = {"structuredPrompt": prompt}
        batch["audioFailurePreference"] = "BLOCK_SILENCED_VIDEOS"
        if job.source:
            wanted["videoInput"] = {"mediaId": job.source["media"]}
            wanted["metadata"] = {"workflowId": job.source["scene"] or str(uuid.uuid4())}
        elif plan.mode == "references":
            wanted["referenceImages"] = [{"imageUsageType": kind, "mediaId": m} for m in media]
        else:
            frames = zip(("startImage", "endImage"), media, strict=False)
            wanted |= {name: {"mediaId": medium} for name, medium in frames}
    requests = [wanted | {"seed": seed} for seed in random.sample(range(1, 100_000), job.n)]
    return {"mediaGenerationContext": batch, "clientContext": context, "requests": requests} | extra


def by_media(output: Output) -> bool:
    """Whether its status is asked for as a medium (2026: a UUID) or as an operation (2025)."""
    return bool(re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}(_\w+)?", output.name))


def status_request(outputs: list[Output]) -> dict:
    if by_media(outputs[0]):
        return {"media": [{"name": out.name, "projectId": out.project} for out in outputs]}
    status = {"status": "MEDIA_GENERATION_STATUS_PENDING"}
    scenes = [{"operation": {"name": out.name}, "sceneId": out.scene} for out in outputs]
    return {"operations": [scene | status for scene in scenes]}


def dig(body: Any, *path: str | int, default: Any = "") -> Any:
    """body[a][b][c] of a reply; `default` where the path ends early or the value is null."""
    with contextlib.suppress(KeyError, IndexError, TypeError):
        for step in path:
            body = body[step]
        return default if body is None else body
    return default


def read_state(word: str, *reasons: str) -> tuple[str, GatewayError | None]:
    word = word.removeprefix("MEDIA_GENERATION_STATUS_")
    if word.startswith(("FAIL", "ERROR", "CANCEL")):
        return "failed", google_error(0, " ".join(reasons).strip())
    return "done" if word.startswith(("SUCCESS", "COMPLETE")) else "pending", None


def read_medium(item: dict) -> Status:
    """An element of media[] (2026) in submit, status and listing replies: picture or clip."""
    name, kind = item["name"], "image" if dig(item, "image") else "video"
    status = dig(item, "mediaMetadata", "mediaStatus")
    url = dig(item, kind, f"generated{kind.capitalize()}", "fifeUrl")
    word = dig(status, "mediaGenerationStatus") or ("SUCCESS" if url or kind == "image" else "")
    reasons = dig(status, "failureReasons", default=[])
    state, error = read_state(word, dig(status, "error", "message"), *reasons)
    data = base64.b64decode(dig(item, "video", "encodedVideo"))
    return Status(name, state, name, dig(item, "projectId"), "", url, data, error)


def read_operation(item: dict) -> Status:
    """An element of operations[] (2025)."""
    medium = dig(item, "operation", "metadata")
    media = dig(item, "mediaGenerationId") or dig(medium, "name")
    name = dig(item, "operation", "name") or media or item["operation"]["name"]
    url, data = dig(medium, "video", "fifeUrl"), base64.b64decode(dig(item, "rawBytes"))
    state, error = read_state(dig(item, "status"), str(dig(item, "operation", "error", "message")))
    return Status(name, state, media, "", dig(item, "sceneId"), url, data, error)


def read_statuses(body: dict, code="upstream_changed") -> Reply:
    """Any reply that lists outputs: media[], operations[], both (mid-2026), or workflows alone. An
    entry of unknown shape raises `code`; if that is empty, the entry is left out."""
    found: dict[str, Status] = {}
    readers = {"media": read_medium, "operations": read_operation}
    readers["workflows"] = lambda f: read_medium(f | {"name": f["metadata"]["primaryMediaId"]})
    for key, read in readers.items():
        items = dig(body, key, default=[]) if key != "workflows" or not found else []
        for item in items if isinstance(items, list) else [items]:
            try:
                status = read(item)
                if {type(text) for text in status[:6]} != {str}:
                    raise TypeError("a name or an address that is no text")
                read_link(status.url)  # a ValueError where it is no address
                found.setdefault(status.name, status)
            except (KeyError, TypeError, AttributeError, ValueError) as err:
                if code:
                    raise GatewayError(code, f"Google's reply isn't readable: {err!r}") from None
    balance = str(dig(body, "remainingCredits"))
    return Reply(list(found.values()), int(balance) if balance.isdigit() else None)


def read_link(url: str) -> tuple[str, float]:
    """A signed URL and the unix second of its end; an hour where it doesn't say (Google: 5 h)."""
    expires = parse_qs(urlsplit(url).query).get("Expires", [""])[0]
    return url, float(expires) if expires.isdigit() else now() + 3600


def why(err: Exception) -> str:
    """What went wrong on the network. Not str(err): that can hold a proxy's password."""
    return str(getattr(err, "os_error", "") or type(err).__name__)


def good_proxy(url: str) -> bool:
    """Whether it is a proxy's address, or none."""
    with contextlib.suppress(ValueError):
        parts, schemes = urlsplit(url), ("http", "https", "socks4", "socks5", "socks5h")
        known = url.partition("://")[0] in schemes and (parts.hostname or "").encode("idna")
        return not url or bool(known and (parts.port or (url[0] == "h" and parts.port is None)))
    return False


class Wire:
    """Outgoing HTTP: a session per proxy. Submits get a fresh connection each: on a kept one that
    the other side has just closed, it would stay unknown whether the request arrived."""

    def __init__(self, settings: Settings):
        self.settings, self.sessions = settings, {}
        refused = (aiohttp.ClientConnectorError, aiohttp.ClientHttpProxyError, aiohttp.InvalidURL)
        self.not_sent: tuple[type, ...] = (*refused, aiohttp.ConnectionTimeoutError, UnicodeError)

    def request(self, method: str, url: str, *, proxy="", fresh=False, **options):
        """aiohttp's request context manager. proxy: an address, "" for that of the settings."""
        if not proxy and self.settings["proxy.proxy_enabled"]:
            proxy = self.settings["proxy.proxy_url"]
        if not good_proxy(proxy):
            raise GatewayError("proxy_unavailable", "A proxy must look like socks5://host:port")
        socks, plain = (proxy, None) if proxy.startswith("socks") else ("", proxy or None)
        if (socks, fresh) not in self.sessions:
            jar, keep = aiohttp.DummyCookieJar(), {"limit": 0, "force_close": fresh}
            connector = self._socks(socks, keep) if socks else aiohttp.TCPConnector(**keep)
            self.sessions[socks, fresh] = aiohttp.ClientSession(connector=connector, cookie_jar=jar)
        return self.sessions[socks, fresh].request(method, url, proxy=plain, **options)

    def _socks(self, url: str, keep: dict) -> aiohttp.BaseConnector:
        with contextlib.suppress(ImportError):
            import aiohttp_socks

            self.not_sent += (aiohttp_socks.ProxyError, aiohttp_socks.ProxyConnectionError)
            return aiohttp_socks.ProxyConnector.from_url(url.replace("socks5h:", "socks5:"), **keep)
        raise GatewayError("proxy_unavailable", "A SOCKS proxy needs: pip install aiohttp-socks")

    async def close(self) -> None:
        for session in self.sessions.values():
            await session.close()


class RestFlow:
    """labs.google (sessions, projects) and the aisandbox REST API. All raise GatewayError."""

    def __init__(self, settings: Settings, wire: Wire):
        self.settings, self.wire = settings, wire
        self.authorise: Callable[..., Awaitable[str]]  # the pool sets it: a valid access token
        self.odd: dict[str, float] = {}  # operations that Google does not know, until when

    async def _send(self, token: Token, method: str, path: str, *, at="", spends=False, **options):
        """One exchange -> (reply, its bytes); with the API where `at`, an access token, is given,
        else with labs. `spends`: a lost answer is `submit_unknown`: it may have been accepted."""
        base = self.settings["flow.api_base_url" if at else "flow.labs_base_url"].rstrip("/")
        cookie = {"Cookie": f"{SESSION_COOKIE}={token.st}"}
        own = {"Authorization": f"Bearer {at}"} if at else cookie
        timeout = aiohttp.ClientTimeout(total=self.settings["flow.timeout"], sock_connect=20)
        options |= {"headers": own, "timeout": timeout, "fresh": spends, "proxy": token.proxy_url}
        try:
            async with self.wire.request(method, f"{base}/{path}", **options) as reply:
                if self.settings["admin.debug"]:
                    log.info("%s %s for %s: HTTP %s", method, path, token.email, reply.status)
                return reply, await reply.read()
        except (*self.wire.not_sent, *NETWORK_ERRORS) as err:
            lost = spends and not isinstance(err, self.wire.not_sent)
            code = "submit_unknown" if lost else "upstream_unreachable"
            raise GatewayError(code, f"No reply of {base.rpartition('@')[2]}: {why(err)}") from None

    def _read(self, reply: aiohttp.ClientResponse, raw: bytes, spends=False) -> dict:
        """A reply's JSON object, else google_error. Another answer to a submit may hide success."""
        body, status, wait = None, reply.status, reply.headers.get("Retry-After", "")
        with contextlib.suppress(ValueError):
            body = json.loads(raw)
        if isinstance(body, dict) and status < 300:
            return body
        error = dig(body, "error", "json") or dig(body, "error")  # tRPC wraps it once more
        details = dig(error, "details")
        reasons = (dig(item, "reason") for item in (details if isinstance(details, list) else ()))
        reason = str(next(filter(None, reasons), ""))
        refused = 400 <= status < 500 and status not in (408, 499)
        if spends and not refused and "PUBLIC_ERROR" not in reason:
            raise GatewayError("submit_unknown", f"Google's answer can't be read (HTTP {status})")
        if status < 300:
            raise GatewayError("upstream_changed", "Google answered with something else than JSON")
        seconds = int(wait) if wait.isdigit() else 0
        raise google_error(status, reason, str(dig(error, "message")), seconds)

    async def _trpc(self, token: Token, method: str, path: str, **options) -> dict:
        """A tRPC call -> its inner object, whose status can be a refusal under HTTP 200."""
        reply, raw = await self._send(token, method, f"trpc/{path}", **options)
        if reply.status == 401:
            raise GatewayError("account_session_ended", "Google refused the session token")
        body = dig(self._read(reply, raw), "result", "data", "json", default={})
        inner = dig(body, "status", default=200)
        if isinstance(inner, int) and inner != 200:
            raise google_error(inner, "", str(dig(body, "statusText")))
        return body

    async def _api(self, token: Token, method: str, path: str, *, spends=False, **options) -> dict:
        """A call with an access token, which is renewed once: a 401 comes before any billing."""
        at = ""
        for _ in range(2):
            at = await self.authorise(token, at)
            reply, raw = await self._send(token, method, path, at=at, spends=spends, **options)
            if reply.status != 401:
                return self._read(reply, raw, spends)
        raise GatewayError("account_session_ended", "Google refuses even a fresh access token")

    async def session(self, token: Token) -> dict:
        """-> email, name, at, at_expires, st (same or rotated). A dead session: HTTP 200 and {}."""
        reply, raw = await self._send(token, "GET", "auth/session")
        body = self._read(reply, raw)
        if not (at := dig(body, "access_token")) or dig(body, "error"):
            words = "This session token has ended. Sign in to Flow again and paste the new one"
            raise GatewayError("account_session_ended", words)
        expires, cookie = now() + 3600, reply.cookies.get(SESSION_COOKIE)
        with contextlib.suppress(ValueError, TypeError):
            expires = datetime.datetime.fromisoformat(dig(body, "expires")).timestamp()
        rotated = cookie.value if cookie is not None and len(cookie.value) >= 200 else token.st
        found = {"email": dig(body, "user", "email") or token.email, "st": rotated}
        return found | {"name": dig(body, "user", "name"), "at": at, "at_expires": expires}

    async def credits(self, token: Token) -> dict:
        """GET /credits -> credits and tier. Google leaves a balance of zero out."""
        body = await self._api(token, "GET", "credits")
        with contextlib.suppress(TypeError, ValueError):
            return {"credits": int(dig(body, "credits") or 0), "tier": dig(body, "userPaygateTier")}
        raise GatewayError("upstream_changed", "Google tells the balance in an unknown form")

    async def create_project(self, token: Token, title: str) -> str:
        wanted = {"json": {"projectTitle": title, "toolName": "PINHOLE"}}
        body = await self._trpc(token, "POST", "project.createProject", json=wanted)
        if project := dig(body, "result", "projectId"):
            return project
        raise GatewayError("upstream_changed", "Google's answer names no new project")

    async def upload(self, token: Token, project: str, data: bytes, kind: str) -> str:
        """POST /flow/uploadImage -> media name. An answer without one is a silent refusal."""
        name = f"flow2api_{int(now() * 1000)}.{kind.removeprefix('image/')}"
        wanted = {"clientContext": client_context(project), "fileName": name, "isHidden": False}
        wanted |= {"isUserUploaded": True, "mimeType": kind}
        wanted["imageBytes"] = base64.b64encode(data).decode()
        body = await self._api(token, "POST", "flow/uploadImage", json=wanted)
        name = dig(body, "media", 0, "name") or dig(body, "media", "name")
        if name := name or dig(body, "mediaGenerationId", "mediaGenerationId"):
            return name
        raise GatewayError("content_policy_violation", "Google dropped a picture (a brand's logo?)")

    async def submit(self, token: Token, job: Job, media: list[str]) -> Reply:
        """Sends all n outputs in one call; `media` are uploaded pictures. May be submit_unknown."""
        path, tier = f"projects/{job.project}/flowMedia:batchGenerateImages", ""  # none is sent
        if job.plan.kind == "video":
            path, tier = "video:batchAsyncGenerateVideo" + ENDPOINTS[job.plan.mode], token.tier
        wanted = submit_request(job, token.tier, media, client_context(job.project, tier))
        body = await self._api(token, "POST", path, spends=True, json=wanted)
        reply = read_statuses(body, "submit_unknown")
        if not reply.statuses:
            raise GatewayError("submit_unknown", "Google answered the submit with nothing")
        return reply

    async def find(self, token: Token, job: Job) -> list[Status]:
        """What a submit whose answer was lost has made, by its batch id. Costs nothing."""
        query = quote(to_json({"json": {"projectId": job.project}}))
        body = await self._trpc(token, "GET", f"flow.projectInitialData?input={query}")
        if not isinstance(dig(body, "projectContents"), dict):  # no proof that nothing was made
            raise GatewayError("upstream_changed", "Google lists the project in an unknown form")
        flows = dig(body, "projectContents", "workflows", default=[])
        ours = [flow for flow in flows if dig(flow, "metadata", "batchId") == job.batch]
        names = {dig(flow, "name") for flow in ours}
        media = dig(body, "projectContents", "media", default=[])
        made = [item for item in media if dig(item, "workflowId") in names]
        return read_statuses({"media": made, "workflows": ours}).statuses

    async def poll(self, token: Token, outputs: list[Output]) -> Reply:
        """One call, as a rule (per 256 and per generation). Google refuses it for one bad name:
        halving finds that, and it is left out for a minute. The 22nd refusal in a poll raises."""
        found, credits, refusals = [], None, 0
        path = "video:batchCheckAsyncVideoGenerationStatus"
        asked = [output for output in outputs if self.odd.get(output.name, 0) < now()]
        forms = ([out for out in asked if by_media(out) is form] for form in (True, False))
        chunks = [form[at : at + 256] for form in forms for at in range(0, len(form), 256)]
        for chunk in chunks:  # it grows at its end
            try:
                body = await self._api(token, "POST", path, json=status_request(chunk))
                reply = read_statuses(body, "")
                found += reply.statuses
                credits = credits if reply.credits is None else reply.credits
            except GatewayError as err:
                refusals += 1
                if err.upstream not in (400, 404) or refusals > 21:
                    raise
                half = len(chunk) // 2
                chunks += [chunk[:half], chunk[half:]] if half else []
                self.odd |= {} if half else {chunk[0].name: now() + 60}
        return Reply(found, credits)

    async def upscale(self, token: Token, job: Job, output: Output) -> Status:
        """A larger picture comes at once, as data, and costs nothing. A clip is polled under a name
        that follows from the first: so a lost answer, or "already under way", is no loss."""
        size, context = job.plan.upscale, client_context(job.project, token.tier)
        if job.plan.kind == "image":
            wanted = {"mediaId": output.media, "clientContext": context}
            wanted["targetResolution"] = f"UPSAMPLE_IMAGE_RESOLUTION_{size}"
            body = await self._api(token, "POST", "flow/upsampleImage", json=wanted)
            with contextlib.suppress(TypeError, ValueError):
                if data := await asyncio.to_thread(base64.b64decode, dig(body, "encodedImage")):
                    return Status(output.name, "done", output.media, data=data)
            raise GatewayError("upstream_changed", "Google sent no larger picture")
        ratio, scene = WIRE_RATIOS[job.plan.ratio], output.scene or str(uuid.uuid4())
        clip = {"videoInput": {"mediaId": output.media}, "metadata": {"sceneId": scene}}
        clip |= {"videoModelKey": f"veo_3_1_upsampler_{size}", "seed": random.randrange(99999)}
        clip["aspectRatio"] = f"VIDEO_ASPECT_RATIO_{ratio}"
        clip["resolution"] = f"VIDEO_RESOLUTION_{size.upper()}"
        wanted = {"clientContext": context, "requests": [clip], "useV2ModelConfig": True}
        path = "video:batchAsyncGenerateVideoUpsampleVideo"
        try:
            body = await self._api(token, "POST", path, spends=True, json=wanted)
        except GatewayError as err:
            if err.code not in ("conflict", "submit_unknown"):
                raise
            body = {}
        found = read_statuses(body, "").statuses
        return found[0] if found else self.upscaled(output)

    def upscaled(self, output: Output) -> Status:
        name = output.media + "_upsampled"
        return Status(name, media=name, project=output.project)

    async def resolve(self, token: Token, output: Output, form="FULL_MEDIA") -> tuple[str, float]:
        """A fresh URL of a finished output (form: or of its THUMBNAIL) and its end."""
        query = f"name={quote(output.media or output.name, safe='')}"
        path = f"trpc/media.getMediaUrlRedirect?{query}&mediaUrlType=MEDIA_URL_TYPE_{form}"
        reply, raw = await self._send(token, "GET", path, allow_redirects=False)
        if 300 <= reply.status < 400 and "Location" in reply.headers:
            with contextlib.suppress(ValueError):
                return read_link(reply.headers["Location"])
        if reply.status == 404:
            raise GatewayError("content_not_found", "Flow has no such file", upstream=404)
        self._read(reply, raw)
        raise GatewayError("upstream_changed", "Google gave no download address")


# ---- 6. Pool --------------------------------------------------------------------------------
AWAKE = {"is_active": True, "reason": "", "failures": 0, "paused_until": 0.0}


class Pool:
    """The accounts: in memory, written on change. Nothing else changes a token. A lease is the
    right to use a token for one job: a slot of its kind, and credits reserved until it is sent."""

    EARLY = 600.0  # seconds before its end at which an access token is renewed

    def __init__(self, settings: Settings, store: Store, upstream: RestFlow):
        self.settings, self.store, self.upstream = settings, store, upstream
        upstream.authorise = self.access_token
        self.tokens = {token.id: token for token in store.tokens()}
        self.last_id = max([*self.tokens, store.last_owner()])  # old jobs keep their account's
        self.leases: dict[str, tuple[Token, int]] = {}  # job id -> token, credits reserved
        self.waiting: dict[asyncio.Future, tuple[Job, set[int]]] = {}
        self._alarm: asyncio.TimerHandle | None = None

    async def add(self, st: str, **fields: Any) -> tuple[Token, bool]:
        """Adds or updates a session token's account -> (token, is it new). Raises like session."""
        draft = Token(**fields, st=clean_session_token(st), created_at=now())
        session = await self.upstream.session(draft)
        if not session["email"]:
            raise GatewayError("upstream_changed", "Google's session names no e-mail address")
        draft.id = self.last_id + 1
        known = (token for token in self.tokens.values() if token.email == session["email"])
        token = next(known, draft)
        self.tokens[token.id], self.last_id = token, max(self.last_id, token.id)
        await self.update(token, **session | AWAKE | fields)
        try:
            await self.check(token)
            await self.project(token)
        except GatewayError as err:
            log.warning("%s is in the pool, but: %s", token.email, err)
        return token, token is draft

    async def update(self, token: Token, **fields: Any) -> None:
        vars(token).update(fields)
        if self.tokens.get(token.id) is token:  # else it has been deleted meanwhile
            await self.store.put(token)
        self.wake()

    async def remove(self, token: Token) -> None:
        if token.busy.total():
            raise bad(f"{token.email} has jobs under way: disable it first", code="conflict")
        self.tokens.pop(token.id, None)  # somebody else may have deleted it just now
        await self.store.delete(("tokens", "id", token.id))

    async def access_token(self, token: Token, stale: str = "") -> str:
        """An access token, not the `stale` one that Google refused; one refresh serves all."""
        async with token.lock:
            if not token.at or token.at == stale:
                await self.update(token, **await self.upstream.session(token))
            return token.at

    async def project(self, token: Token) -> str:
        """The token's project at Flow; made where it has none."""
        async with token.lock:
            if not token.project_id:
                title = token.project_name or time.strftime("%b %d - %H:%M")
                project = await self.upstream.create_project(token, title)
                await self.update(token, project_id=project, project_name=title)
            return token.project_id

    async def check(self, token: Token) -> None:
        """Renews an access token that ends soon, and asks for credits and tier."""
        ends_soon = token.at_expires - now() < self.EARLY
        await self.access_token(token, token.at if ends_soon else "")
        await self.update(token, **await self.upstream.credits(token), checked_at=now())

    async def keep_fresh(self) -> None:
        """For ever: checks the active accounts, by `token_refresh.interval` and by their expiry."""
        while True:
            if self.settings["token_refresh.enabled"]:
                await asyncio.gather(*map(self._check_if_due, list(self.tokens.values())))
            await asyncio.sleep(30)

    async def _check_if_due(self, token: Token) -> None:
        interval = self.settings["token_refresh.interval"]
        rest = 60 if token.at_expires - now() < self.EARLY else interval
        try:
            if token.is_active and now() - token.checked_at > rest:
                await self.check(token)
        except (GatewayError, StoreError) as err:  # a full disk ends no loop
            log.warning("check of %s: %s", token.email, err)
            token.checked_at = now() - interval + 60
            if isinstance(err, GatewayError) and err.does == "session":
                self.blame(token, err)

    def praise(self, token: Token, kind: str, outputs: int) -> None:
        token.failures, token.paused_for = 0, None
        self._count(token, kind, outputs)

    def blame(self, token: Token, err: GatewayError) -> None:
        """What a failure does to the account (see ERRORS): it steps back, each time in a row for
        twice as long, and is disabled when its session is dead or its failures are too many."""
        if now() >= token.paused_until:  # else it is one burst: several jobs met the same refusal
            again = token.paused_for is not None and token.paused_for.code == err.code
            token.pause = min(token.pause * 2 if again else err.pause, 3600)
            length = token.pause * random.uniform(0.9, 1.1)
            token.paused_until, token.paused_for = now() + length, err
            token.failures += err.does == "banning"
        token.paused_until = max(token.paused_until, now() + min(err.retry_after, 86400))
        if err.code == "account_no_credits":
            token.credits = 0
        if err.does == "session" or token.failures >= self.settings["admin.error_ban_threshold"]:
            token.is_active, token.reason = False, str(err)
            log.warning("%s is disabled: %s", token.email, err)
        self._count(token, "error", 1)
        self.wake()

    def _count(self, token: Token, what: str, number: int) -> None:
        """Counts, for ever and for today; a new day drops all of yesterday's counters at once."""
        vars(token)[f"{what}_count"] += number
        if token.day != (day := today()):
            token.day, token.today = day, {}
        token.today[what] = token.today.get(what, 0) + number
        if self.tokens.get(token.id) is token:
            self.store.put(token)

    def able(self, plan: Plan, n: int, tried: Iterable[int] = (), source=None) -> list[Token]:
        """The tokens that can serve a plan, free or not; of a `source` (see Job) only its own.
        Raises with the reason when there are none, or all pause for more than a minute."""

        def affords(token: Token) -> bool:
            cost = (plan.cost(token.tier) or 0) * n
            return not cost or token.credits is None or cost <= token.credits - token.reserved

        kinds = {"image": "pictures", "video": "clips"}[plan.kind]
        rest = [token for token in self.tokens.values() if token.id not in tried]
        none = "There is no Google account yet: add one on the admin page, or POST /api/tokens"
        if source:
            rest = [token for token in rest if token.id == source["token_id"]]
            none = "The account that made this clip is not here any more, and no other may use it"
        needs = f"{plan.model} needs a Google account with {' or '.join(plan.prices())}"
        for code, words, fits in (
            ("no_accounts", none, lambda t: True),
            ("no_accounts", "All accounts are disabled", lambda t: t.is_active),
            ("no_accounts", f"No account makes {kinds}", lambda t: vars(t)[f"{plan.kind}_enabled"]),
            ("tier_required", needs, lambda t: plan.cost(t.tier) is not None),
            ("no_credits", f"No account has credits left for {n} x {plan.model}", affords),
        ):
            before, rest = rest, [token for token in rest if fits(token)]
            if not rest:
                reasons = {token.reason for token in before if token.reason and not token.is_active}
                raise GatewayError(code, "; ".join([words, *sorted(reasons)]))
        soonest = min(rest, key=lambda token: token.paused_until)
        if (wait := int(soonest.paused_until - now())) > 60 and (err := soonest.paused_for):
            raise GatewayError(err.code, f"{err}; tried again in {wait} s", retry_after=wait)
        return rest

    def _free(self, job: Job, tried: Iterable[int]) -> Token | None:
        """Of those that can take the job now: fewest leases first, then most credits."""
        free, kind = [], job.plan.kind
        for token in self.able(job.plan, job.n, tried, job.source):
            if token.paused_until <= now() and token.busy[kind] < self.limit(token, kind):
                credits = token.reserved - (token.credits or 0)
                load = (token.id in job.shunned, token.busy.total(), credits)
                free.append((load, token.last_used_at, token.id, token))
        return min(free)[-1] if free else None

    def limit(self, token: Token, kind: str) -> float:
        """How many jobs of a kind it takes at once: as is set, or as Google has shown of late."""
        own, (seen, until) = getattr(token, f"{kind}_concurrency"), token.seen.get(kind, (0, 0.0))
        return min(own if own > 0 else math.inf, seen if now() < until else math.inf)

    def narrow(self, token: Token, kind: str) -> bool:
        """Google takes no more than the other ones: so it is for an hour -> are there others?"""
        if others := token.busy[kind] - 1:
            token.seen[kind] = others, now() + 3600
        return others > 0

    def take(self, token: Token, job: Job) -> None:
        """Leases without a question: also for a job that is found running at start."""
        self.leases[job.id] = token, (job.plan.cost(token.tier) or 0) * job.n
        token.reserved += self.leases[job.id][1]
        token.busy[job.plan.kind] += 1

    def spent(self, job: Job) -> None:
        """Ends the reservation: the balance that Google tells has the cost in it."""
        if lease := self.leases.get(job.id):
            lease[0].reserved -= lease[1]
            self.leases[job.id] = lease[0], 0

    def release(self, job: Job) -> None:
        self.spent(job)
        if lease := self.leases.pop(job.id, None):
            lease[0].busy[job.plan.kind] -= 1
            self.wake()

    async def lease(self, job: Job, tried: set[int]) -> Token:
        """Waits in a fair queue for a free token. Raises what `able` raises."""
        turn = asyncio.get_running_loop().create_future()
        self.waiting[turn] = job, tried
        self.wake()
        if not tried and not turn.done() and len(self.waiting) > self.settings["limits.queue"]:
            turn.set_exception(GatewayError("queue_full", "The queue is full", retry_after=30))
        try:
            return await turn
        except asyncio.CancelledError:
            self.release(job)
            raise
        finally:
            self.waiting.pop(turn, None)

    def wake(self) -> None:
        """Serves whoever waits, the first first; one who can't be served yet holds up nobody who
        can. Called when a slot, credits or the state of a token change, and each second."""
        full = []  # what finds no free account: nor do those behind that want the same
        for turn, (job, tried) in list(self.waiting.items()):
            wanted = job.plan, job.n, tried, job.source
            try:
                if not turn.done() and wanted not in full:
                    if token := self._free(job, tried):
                        self.take(token, job)
                        turn.set_result(token)
                    else:
                        full.append(wanted)
            except GatewayError as err:
                turn.set_exception(err)
            if turn.done():
                self.waiting.pop(turn, None)
        if self._alarm:
            self._alarm.cancel()
        self._alarm = asyncio.get_running_loop().call_later(1, self.wake) if self.waiting else None


# ---- 7. Media -------------------------------------------------------------------------------
MAGIC = (  # first bytes, media type, file ending
    (rb"\x89PNG\r\n\x1a\n", "image/png", "png"),
    (rb"\xff\xd8\xff", "image/jpeg", "jpg"),
    (rb"RIFF....WEBP", "image/webp", "webp"),
    (rb"GIF8[79]a", "image/gif", "gif"),
    (rb"....ftyp", "video/mp4", "mp4"),
)
MEDIA_NAME = re.compile(r"[A-Za-z0-9_-]{22,64}\.(png|jpg|webp|gif|mp4|bin)")


def sniff(data: bytes) -> tuple[str, str]:
    """Media type and file ending, by the first bytes."""
    found = (row for row in MAGIC if re.match(row[0], data[:16], re.DOTALL))
    return next(found, (b"", "application/octet-stream", "bin"))[1:]


def public_socket(address: tuple) -> socket.socket:
    """aiohttp's socket factory for users' URLs: it sees the real address, whatever led there."""
    ip = ipaddress.ip_address(address[4][0].split("%")[0])
    ip = getattr(ip, "ipv4_mapped", None) or ip  # ::ffff:127.0.0.1
    if not ip.is_global or ip.is_multicast or ip in ipaddress.ip_network("64:ff9b::/96"):
        raise OSError(f"{ip} is not a public address (see server.allow_private_urls)")
    return socket.socket(*address[:3])


class Media:
    """Files: finished outputs kept under data/tmp, and the pictures that requests bring along."""

    def __init__(self, settings: Settings, wire: Wire):
        self.settings, self.wire = settings, wire
        self.kept, self.inputs = settings.data / "tmp", settings.data / "inputs"
        self.kept.mkdir(exist_ok=True, mode=0o700)
        self.inputs.mkdir(exist_ok=True, mode=0o700)

    def path(self, name: str) -> Path | None:
        """The kept file of this name; None where it is none of ours, or gone."""
        path = self.kept / name
        return path if MEDIA_NAME.fullmatch(name) and path.is_file() else None

    async def keep(self, chunks: AsyncIterator[bytes]) -> str:
        """Writes a file -> a name that nobody can guess. What bears such a name is whole."""
        part, start = self.kept / f"{secrets.token_urlsafe(24)}.part", b""
        try:
            with await asyncio.to_thread(part.open, "wb") as file:
                async for chunk in chunks:
                    start = start or chunk[:16]
                    await asyncio.to_thread(file.write, chunk)
                await asyncio.to_thread(lambda: (file.flush(), os.fsync(file.fileno())))
            return part.rename(part.with_suffix(f".{sniff(start)[1]}")).name
        finally:
            part.unlink(missing_ok=True)

    async def expire_forever(self) -> None:
        """Removes kept files older than `cache.timeout`."""
        while True:
            lifetime = self.settings["cache.timeout"] or math.inf
            await asyncio.to_thread(self.expire, lifetime)
            await asyncio.sleep(min(60, max(1, lifetime / 4)))

    def expire(self, lifetime: float) -> int:
        """Removes the kept files that are older -> the bytes that stay."""
        stay = 0
        for path in list(self.kept.glob("*")):
            with contextlib.suppress(OSError):  # somebody else has removed it; it is a folder
                known = path.stat()
                if known.st_mtime < now() - (86400 if path.suffix == ".part" else lifetime):
                    path.unlink()
                else:
                    stay += known.st_size
        return stay

    def save_inputs(self, job_id: str, images: list[bytes]) -> list[str]:
        names = [f"{job_id}_{number}" for number in range(len(images))]
        for name, image in zip(names, images, strict=True):
            (self.inputs / name).write_bytes(image)
        return names

    def drop_inputs(self, names: Iterable[str]) -> None:
        for name in names:
            (self.inputs / name).unlink(missing_ok=True)

    async def input_image(self, value: Any, param: str) -> bytes:
        """A picture from a URL, a data URL, base64 or bytes. Raises what `bad` makes of it."""
        if isinstance(value, bytes) and value[:8].startswith((b"http://", b"https://", b"data:")):
            value = value.decode(errors="replace").strip()  # LiteLLM uploads a URL as a file
        limit, data = self.settings["limits.image_mb"] << 20, value
        try:
            if isinstance(value, str) and value.startswith(("http://", "https://")):
                data = await self._fetch(value, limit)
            elif isinstance(value, str):
                text = value.partition(",")[2] if value.startswith("data:") else value
                text = "".join(text.split()).translate(str.maketrans("-_", "+/")).rstrip("=")
                data = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
        except ValueError:
            raise bad("This picture is neither a URL nor base64", param, "invalid_image") from None
        if not isinstance(data, bytes) or not sniff(data)[0].startswith("image/"):
            raise bad("This is not a PNG, JPEG, WebP or GIF picture", param, "invalid_image")
        if len(data) > limit:
            raise bad(f"A picture may have {limit >> 20} MB at most", param, "request_too_large")
        return data

    async def _fetch(self, url: str, limit: int) -> bytes:
        """A user's URL: public addresses only (each redirect too), no proxy, 20 s, `limit`."""
        factory = None if self.settings["server.allow_private_urls"] else public_socket
        connector = aiohttp.TCPConnector(socket_factory=factory, force_close=True)
        options = {"connector": connector, "timeout": aiohttp.ClientTimeout(20), "max_redirects": 4}
        try:
            async with connector, aiohttp.request("GET", url, **options) as reply:
                data = bytearray()
                async for chunk in reply.content.iter_chunked(1 << 16):
                    data += chunk
                    if len(data) > limit:
                        break
                if reply.status == 200:
                    return bytes(data)
                words = f"it answered {reply.status}"
        except NETWORK_ERRORS as err:
            words = why(err)
        raise bad(f"The picture's URL can't be fetched: {words}", code="invalid_image")


# ---- 8. Jobs --------------------------------------------------------------------------------
HEARTBEAT = 10.0  # seconds between signs of life to whoever watches a job
STEPS = {  # state -> the states that may follow; anything else is a bug and raises
    "queued": ("submitting", "failed", "cancelled"),
    "submitting": ("queued", "running", "unknown"),
    "unknown": ("running", "failed"),
    "running": ("settling", "failed"),
    "settling": ("completed",),
}
# One validated request of a client: a Plan, the prompt, how many outputs, the input pictures, what
# the client should be told; source and metadata as in Job. Nothing has been spent yet.
_NONE = [1, (), (), {}, None]
Generation = namedtuple("Generation", "plan prompt n images notes source metadata", defaults=_NONE)


class Jobs:
    """Takes jobs from acceptance to their end, over restarts; the only writer of job state."""

    LOOKS = (1, 4, 10, 20, 40, 60)  # seconds between looks for a submit of unknown outcome
    TRIES = 3  # of what costs nothing
    KEY_SECONDS = 86400.0  # how long an Idempotency-Key stands for its job

    def __init__(self, store: Store, pool: Pool, media: Media):
        self.settings, self.upstream = pool.settings, pool.upstream
        self.store, self.pool, self.media = store, pool, media
        self.open: dict[str, Job] = {}
        self.stopping = False
        self.durations = defaultdict(lambda: deque(maxlen=25))
        self._pauses: dict[int, float] = {}  # token id -> seconds after a failed status call
        for job in reversed(store.jobs(states=("completed",), limit=500)):
            self._learn(job)

    async def create(self, generation: Generation, origin: str, mark: dict, detached=False) -> Job:
        """Once it returns, the job is on disk and under way. `mark`: the Idempotency-Key, or what
        stands for one, and the hash of its request. Raises like `able`, or queue_full."""
        plan = generation.plan
        self.pool.able(plan, generation.n, (), generation.source)
        if len(self.pool.waiting) >= (limit := self.settings["limits.queue"]):
            raise GatewayError("queue_full", f"{limit} jobs are waiting already", retry_after=30)
        job = Job(**generation._asdict(), origin=origin, created_at=now())  # images: saved below
        job.notes, job.detached = [*generation.notes], detached
        job.id = f"{plan.kind}_{secrets.token_hex(12)}"
        job.deadline = now() + self.settings[f"generation.{plan.kind}_timeout"]
        job.inputs = await asyncio.to_thread(self.media.save_inputs, job.id, generation.images)
        mark = mark | {"job_id": job.id, "created_at": now()}
        writing = asyncio.ensure_future(self.store.put_rows(("jobs", job.row()), ("keys", mark)))
        try:
            await asyncio.shield(writing)
        except asyncio.CancelledError:  # the client left in this very moment
            await writing
            job.detached &= not mark["key"].startswith("\n")  # else it never learnt the id
            self._start(job)
            await self.abandon(job)
            raise
        self._start(job)
        return job

    async def repeated(self, mark: dict, given: bool) -> Job | None:
        """The job that this key has made, if any; an hour long that of a body without a key, if
        it was sent. Raises idempotency_conflict, task_not_found."""
        since = now() - (self.KEY_SECONDS if given else 3600)
        known = await asyncio.to_thread(self.store.job_of_key, mark["key"], since)
        if known and known[0] != mark["request"]:
            raise GatewayError("idempotency_conflict", "A new request needs a new Idempotency-Key")
        job = await self.get(known[1]) if known else None
        if given and known and not job:
            raise GatewayError("task_not_found", "The job of this Idempotency-Key was deleted")
        return None if not given and job and job.state == "cancelled" else job

    async def cancel(self, job: Job) -> None:
        """Ends a queued job; what is under way is paid for, what has ended stays: conflict."""
        if (job := self.open.get(job.id, job)).state == "queued" and job.id in self.open:
            job.detached = False
            await self.abandon(job)
        if job.state != "cancelled":
            raise bad(f"{job.id} is {job.state}: only a queued job can be stopped", code="conflict")

    async def delete(self, job: Job) -> None:
        """Forgets an ended job, and a queued one; what is under way is paid for: conflict."""
        if not job.ended:
            await self.cancel(job)
        for path in filter(None, [self.media.path(output.file) for output in job.outputs]):
            await asyncio.to_thread(path.unlink, missing_ok=True)
        await self.store.delete(("jobs", "id", job.id), ("outputs", "job_id", job.id))

    async def page(self, *kind: str, **given: Any) -> list[Job]:
        """As Store.jobs, the open ones as they are in memory."""
        known = self.open.copy()  # before the read: what ends meanwhile is newer in memory
        jobs = await asyncio.to_thread(self.store.jobs, *kind, **given)
        return [known.get(job.id, job) for job in jobs]

    async def get(self, job_id: str) -> Job | None:
        return self.open.get(job_id) or await asyncio.to_thread(self.store.job, job_id)

    async def watch(self, job: Job) -> AsyncIterator[None]:
        """Yields at once, at each change and each HEARTBEAT seconds until the job is completed.
        Raises why it is not."""
        while job.id in self.open and not job.task.done() and not self.stopping:
            changed = job.changed
            yield
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HEARTBEAT):  # wait_for of 3.11 can lose a cancel
                    await changed.wait()
        if job.error:
            raise GatewayError(**job.error)
        if job.state != "completed":
            then = "was not sent" if job.state == "queued" else "goes on at its next start"
            raise GatewayError("shutting_down", f"Flow2API is interrupted; job {job.id} {then}")

    async def completed(self, job: Job) -> None:
        """Waits for that. Raises what `watch` raises."""
        async for _ in self.watch(job):
            continue

    async def abandon(self, job: Job) -> None:
        """Its client is gone: a job that has not been sent is cancelled, any other runs on."""
        if job.state == "queued" and not job.detached:
            if job.id in self.open:
                job.task.cancel()
            gone = GatewayError("cancelled", "The client left before anything was sent or spent")
            await self._step(job, "cancelled", error=gone.record(), completed_at=now())

    def progress(self, job: Job) -> tuple[int, int]:
        """(percent, by the median time of earlier jobs; their number); (0, 0): not known."""
        if not job.median:
            return 0, 0
        seconds, known = job.median
        share = ((job.completed_at or now()) - job.submitted_at) / seconds
        job.percent = max(job.percent, min(99, int(share * 100)))  # clocks can go back
        return job.percent, known

    async def link(self, job: Job, output: Output, anew=False, thumbnail=False) -> str:
        """A live URL at Google of a finished output, asked for anew where the old one has ended."""
        token = self.pool.tokens.get(job.token_id)
        if thumbnail:
            return (await self.upstream.resolve(token, output, "THUMBNAIL"))[0] if token else ""
        if token and (anew or output.url_expires < now() + 60):
            output.url, output.url_expires = await self.upstream.resolve(token, output)
            await self.store.put(output)
        return output.url

    @contextlib.asynccontextmanager
    async def fetch(self, job: Job, output: Output, thumbnail=False, **headers: str):
        """A GET of the file, unread. Raises content_not_found, upstream_unreachable, or as link."""
        token, said = self.pool.tokens.get(job.token_id), "no address"
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=20, sock_read=60)
        options = {"proxy": token.proxy_url if token else "", "timeout": timeout}
        options["headers"] = headers | {"Accept-Encoding": "identity"}
        try:
            for anew in (False, True):  # an address that has died is asked for anew
                if url := await self.link(job, output, anew, thumbnail):
                    async with self.media.wire.request("GET", url, **options) as reply:
                        if reply.status < 400 or reply.status == 416:
                            yield reply
                            return
                        said = f"it answers {reply.status}"
        except NETWORK_ERRORS as err:
            raise GatewayError("upstream_unreachable", f"Google's file: {why(err)}") from None
        raise GatewayError("content_not_found", f"Google's file: {said}", upstream=404)

    async def resume(self) -> None:
        """At start: goes on with what was under way. A submit that may have left is unknown."""
        jobs = self.store.jobs(states=OPEN, oldest_first=True)
        known = {name for job in jobs for name in job.inputs}
        self.media.drop_inputs({path.name for path in self.media.inputs.iterdir()} - known)
        for job in jobs:
            await self.abandon(job)
            if job.state == "submitting":
                await self._step(job, "unknown")
            if job.state not in ("queued", "cancelled") and job.token_id in self.pool.tokens:
                self.pool.take(self.pool.tokens[job.token_id], job)
                self.pool.spent(job)
            if not job.ended:
                job.deadline = max(job.deadline, now() + 300)  # Google has its say first
                self._start(job)

    async def interrupt(self, *_: Any) -> None:
        """The first step of the end: open answers say so, and name their job."""
        self.stopping = True
        for job in list(self.open.values()):
            self._tell(job, job.stage)

    async def stop(self) -> None:
        while tasks := [job.task for job in self.open.values() if job.task.cancel()]:
            await asyncio.wait(tasks, timeout=0.5)  # again: wait_for of 3.11 can lose a cancel

    def _start(self, job: Job) -> None:
        self.open[job.id] = job
        job.task = asyncio.create_task(self._run(job), name=job.id)

    async def _run(self, job: Job) -> None:
        try:
            if job.state == "queued":
                await self._submit(job)
            if job.state == "unknown":
                await self._look_for(job)
            if job.state == "running":
                await self._await(job, job.outputs, job.deadline)
                if not job.done():
                    raise GatewayError(**job.outputs[0].error)
                await self._step(job, "settling")
            paid = [output for output in job.outputs if output.state != "failed" or output.made]
            await asyncio.gather(*(self._settle(job, output) for output in paid))
            await self._step(job, "completed", completed_at=now())
        except GatewayError as err:
            await self._step(job, "failed", error=err.record(), completed_at=now())
        except Exception:
            log.critical("%s stands still until the next start", job.id, exc_info=True)
        finally:  # on a full disk, too, which refuses the last step
            self.pool.release(job)
            self._tell(job)

    async def _step(self, job: Job, state: str, *records: Record, **changes: Any) -> None:
        """The one place that changes a job's state; returns when that is on disk."""
        if state not in STEPS.get(job.state, ()):
            raise AssertionError(f"{job.id}: {job.state} -> {state}")
        vars(job).update(changes, state=state)
        await self.store.put(job, *records)
        if job.ended:
            self.open.pop(job.id, None)
            self.pool.release(job)
            self.media.drop_inputs(job.inputs)
            if job.state == "completed":
                self._learn(job)
                if token := self.pool.tokens.get(job.token_id):
                    self.pool.praise(token, job.plan.kind, len(job.done()))
            log.info("%s %s %s", job.id, job.state, job.error.get("message", ""))
        self._tell(job)

    def _tell(self, job: Job, stage="") -> None:
        """Wakes whoever watches the job; `stage` says in words what it is at."""
        job.stage = stage
        job.changed.set()
        job.changed = asyncio.Event()

    def _learn(self, job: Job) -> None:
        self.durations[job.plan.pace].append(job.completed_at - job.submitted_at)

    async def _submit(self, job: Job) -> None:
        """Until an account takes it -> running or unknown; whatever raises has spent nothing."""
        tried, last = set(), None
        for attempt in itertools.count(1):
            self._tell(job, "Waiting for an account")
            try:
                async with asyncio.timeout(job.deadline - now()):  # wait_for loses a cancel
                    token = await self.pool.lease(job, tried)
            except TimeoutError:
                raise GatewayError("queue_full", "No account became free", retry_after=60) from None
            except GatewayError as err:
                raise last or err from None  # what the last account said is the better reason
            try:
                return await self._submit_on(job, token)
            except GatewayError as err:
                last = err
            if last.does == "unknown":
                log.warning("%s: %s; looking for it at Google", job.id, last)
                return await self._step(job, "unknown")
            full = last.code == "account_busy" and self.pool.narrow(token, job.plan.kind)
            self.pool.release(job)
            if job.state == "submitting":
                await self._step(job, "queued", submitted_at=0.0)
            if full:
                continue  # in the queue
            if last.does in ("account", "banning", "session"):
                self.pool.blame(token, last)
                tried.add(token.id)
            elif last.does == "again" and attempt < self.TRIES:
                self._tell(job, f"{last}; trying again")
                job.shunned.add(token.id)  # others go first
                await asyncio.sleep(2**attempt * random.uniform(0.8, 1.2))
            else:
                raise last
        return None

    async def _submit_on(self, job: Job, token: Token) -> None:
        project = job.source.get("project") or await self.pool.project(token)
        media = []
        for name in job.inputs:
            self._tell(job, f"Uploading picture {len(media) + 1} of {len(job.inputs)}")
            data = await asyncio.to_thread((self.media.inputs / name).read_bytes)
            media.append(await self.upstream.upload(token, project, data, sniff(data)[0]))
        await self.pool.update(token, last_used_at=now(), use_count=token.use_count + 1)
        sent = {"token_id": token.id, "project": project, "batch": str(uuid.uuid4())}
        await self._step(job, "submitting", submitted_at=now(), **sent)
        self._tell(job, "Sent to Flow")
        await self._accepted(job, await self.upstream.submit(token, job, media))

    async def _accepted(self, job: Job, reply: Reply) -> None:
        """Google has the job: its operations go to disk before anybody hears of it."""
        for number, status in enumerate(reply.statuses):
            output = Output(job_id=job.id, number=number, name=status.name, scene=status.scene)
            output.project = status.project or job.project
            job.outputs.append(output)
            await self._take(output, status)
        self.pool.spent(job)
        if job.token_id in self.pool.tokens and reply.credits is not None:
            await self.pool.update(self.pool.tokens[job.token_id], credits=reply.credits)
        deadline = now() + self.settings[f"generation.{job.plan.kind}_timeout"]
        if known := sorted(self.durations[job.plan.pace]):
            job.median = [max(known[len(known) // 2], 1), len(known)]
        await self._step(job, "running", *job.outputs, deadline=deadline)
        self.media.drop_inputs(job.inputs)

    async def _look_for(self, job: Job) -> None:
        """A submit whose answer was lost is never sent again: Google is asked what it made."""
        token, found, looks = self.pool.tokens.get(job.token_id), [], 0
        until = now() + self.settings["generation.video_timeout"]
        for pause in itertools.chain(self.LOOKS, itertools.repeat(self.LOOKS[-1])):
            if not token or len(found) >= job.n or looks == len(self.LOOKS) or now() > until:
                break
            self._tell(job, "The answer of Flow was lost; looking for what it has made")
            await asyncio.sleep(pause)
            try:
                found, looks = await self.upstream.find(token, job) or found, looks + 1
            except GatewayError as err:
                log.warning("%s: %s", job.id, err)
        if not found:
            words = f"The answer was lost, credits may be spent: see project {job.project} in Flow"
            raise GatewayError("submit_unknown", words)
        await self._accepted(job, Reply(found))

    async def poll_forever(self) -> None:
        """One tick each `poll_interval`: one status call per account that has clips under way."""
        polls: dict[int, asyncio.Task] = {}  # a slow account holds up no other
        while True:
            await asyncio.sleep(self.settings["flow.poll_interval"])
            pending = defaultdict(list)
            for job in self.open.values():
                pairs = [(job, output) for output in job.outputs if output.state == "pending"]
                pending[job.token_id] += pairs
            for token in self.pool.tokens.values():
                ours, poll = pending[token.id], polls.get(token.id)
                if ours and (not poll or poll.done()):
                    polls[token.id] = asyncio.create_task(self._poll(token, ours))

    async def _poll(self, token: Token, pending: list[tuple[Job, Output]]) -> None:
        """A status call that fails says nothing of the clips; it is made again, ever less often."""
        try:
            reply = await self.upstream.poll(token, [output for _, output in pending])
        except GatewayError as err:
            log.warning("status call for %s: %s", token.email, err)
            if err.does == "session" and token.is_active:
                self.pool.blame(token, err)
            pause = self._pauses.get(token.id, self.settings["flow.poll_interval"])
            self._pauses[token.id] = min(60, 2 * pause)
            await asyncio.sleep(pause)
            return
        self._pauses.pop(token.id, None)
        if reply.credits is not None:
            await self.pool.update(token, credits=reply.credits)
        statuses = {status.name: status for status in reply.statuses}
        most = self.settings["flow.max_poll_attempts"]
        for job, output in pending:
            if status := statuses.get(output.name):
                output.answers += 1
                await self._take(output, status)
                if output.state != "pending" or output.answers >= most:
                    try:
                        await self.store.put(output)
                    finally:  # on a full disk, too: nobody else would wake the job
                        self._tell(job, job.stage)

    async def _take(self, output: Output, status: Status) -> None:
        """Notes what Google says of an output."""
        output.state, output.media = status.state, status.media or output.media
        output.error = status.error.record() if status.error else {}
        if status.url:
            output.url, output.url_expires = read_link(status.url)
        if status.data:
            with contextlib.suppress(OSError):  # a full disk: Google still has it
                output.file = await self.media.keep(_once(status.data))

    async def _await(self, job: Job, outputs: list[Output], deadline: float) -> None:
        """Until Google has said its last word on these outputs, or the deadline fails them."""
        most, name = self.settings["flow.max_poll_attempts"], f"generation.{job.plan.kind}_timeout"
        while pending := [output for output in outputs if output.state == "pending"]:
            late = [output for output in pending if now() >= deadline or output.answers >= most]
            for output in late:
                words = f"Flow was not done in {self.settings[name]} s ({name}) or {most}"
                words += " status calls (flow.max_poll_attempts). It may still appear there, in"
                words += f" project {output.project} as {output.media or output.name}"
                output.error = GatewayError("generation_timeout", words).record()
                output.state = "failed"
            await self.store.put(*late)
            with contextlib.suppress(TimeoutError):
                if not late:
                    await asyncio.wait_for(job.changed.wait(), max(0.01, deadline - now()))

    async def _settle(self, job: Job, output: Output) -> None:
        """Upscales, finds the URL, fills the cache; never fails the job, since it is paid for."""
        token = self.pool.tokens.get(job.token_id)
        if token and job.plan.upscale and not output.upscaled:
            await self._upscale(job, token, output)
            await self.store.put(job, output)  # what failed is not waited for after a restart
        try:
            if not self.media.path(output.file):
                await self._patiently(self._keep, job, output)
        except GatewayError as err:
            job.notes.append(f"The file can't be fetched now ({err}); it is kept at Flow.")
        await self.store.put(output)

    async def _keep(self, job: Job, output: Output) -> None:
        """Finds the live URL; with the cache on, brings the file here."""
        if not self.settings["cache.enabled"]:
            await self.link(job, output)
            return
        self._tell(job, "Fetching the file")
        async with self.fetch(job, output) as reply:
            output.file = await self.media.keep(reply.content.iter_chunked(1 << 18))

    async def _upscale(self, job: Job, token: Token, output: Output) -> None:
        """The second step: its result takes the place of the output, its failure leaves that as it
        was. What is sent is on disk first, so a restart polls for it and never sends it again."""
        names = ("name", "media", "url", "url_expires", "file")
        self._tell(job, f"Upscaling to {job.plan.upscale}")
        try:
            if not output.made or job.plan.kind == "image":
                output.made = {name: getattr(output, name) for name in names}
                await self.store.put(output)
                status = await self._patiently(self.upstream.upscale, token, job, output)
            elif output.name == output.made["name"]:  # a restart came before the answer
                status = self.upstream.upscaled(output)
            else:
                status = Status(output.name, media=output.media)
            output.name, output.url, output.file = status.name, "", ""
            output.url_expires, output.answers = 0.0, 0
            await self._take(output, status)
            if status.data and not output.file:
                raise GatewayError("internal_error", "the disk is full")
            await self.store.put(output)
            await self._await(job, [output], now() + self.settings["generation.video_timeout"])
            if output.state == "failed":
                raise GatewayError(**output.error)
        except GatewayError as err:
            vars(output).update(output.made, state="done", error={})
            job.notes.append(f"Upscaling to {job.plan.upscale} failed, this is the original: {err}")
        output.upscaled = True

    async def _patiently(self, call: Callable, *arguments: Any) -> Any:
        """A call that spends nothing, made again where that can help."""
        for attempt in range(1, self.TRIES):
            try:
                return await call(*arguments)
            except GatewayError as err:
                if err.does not in ("again", "account") and err.upstream != 404:  # not there yet
                    raise
                log.warning("%s; trying again", err)
                await asyncio.sleep(2**attempt)
        return await call(*arguments)


async def _once(data: bytes) -> AsyncIterator[bytes]:
    yield data


# ---- 9. Reading requests --------------------------------------------------------------------
# Prompts that chat clients send on their own: where, pattern, answer; %s is a title.
SIDE_PROMPTS = (
    ("user", r"^### Task:[\s\S]*follow[_ -]?ups?[\s\S]*<chat_history>", '{"follow_ups": []}'),
    ("user", r"^### Task:[\s\S]*\btags?\b[\s\S]*<chat_history>", '{"tags": []}'),
    ("user", r"^### Task:[\s\S]*\btitle\b[\s\S]*<chat_history>", '{"title": "%s"}'),
    ("user", r"^### Task:[\s\S]*<chat_history>", "%s"),
    ("user", r"four to five word title|Summarize the discussion briefly in 200 words", "%s"),
    ("user", r"[Bb]ased on the chat history, give this conversation a name", "%s"),
    ("system", r"professional conversation summarizer|user's conversation into a title", "%s"),
)
EDIT_WORDS = re.compile(
    r"(?i)\b(it|its|this|that|these|same|again|edit|change|make|add|remove|delete|replace|turn|swap"
    r"|keep|without|instead|more|less|bigger|smaller|darker|brighter|colou?r|background|zoom|crop"
    r"|fix)\b|[改换变加减去删除修调把它这再更]|背景|颜色"
)
SORA_ONLY = ("video", "remix_target_id", "character_options", "style_id")
SIDE_SIZES = {"landscape": "16:9", "portrait": "9:16"}
FOREIGN_MODEL = re.compile(r"gpt-image|chatgpt-image|dall-e|sora")  # they mean: the default one
# read: makes its Generation; text: answers a client's own prompt; images: go to message.images.
Chat = namedtuple("Chat", "model stream usage images text read")


async def read_json(request: web.Request) -> dict:
    """The JSON object in a request. Raises invalid_request."""
    try:
        raw = await request.read()
        body = await asyncio.to_thread(json.loads, raw)  # it can be long: the loop gets a turn
        if re.search(rb"\\u[dD][89a-fA-F]", raw):  # half a surrogate pair is no text
            body = json.loads(json.dumps(body, ensure_ascii=False).encode(errors="replace"))
    except (ValueError, RecursionError) as err:
        raise bad(f"The body is not JSON: {str(err)[:120]}") from None
    if not isinstance(body, dict):
        raise bad("The body must be a JSON object")
    return body


async def read_body(request: web.Request) -> dict:
    """The fields of a JSON or form body. In a form a repeated name, `name[]` and `name[0]` make a
    list, `name[key]` an object; files are bytes; what is empty is absent."""
    kind = request.content_type
    curl = kind == "application/x-www-form-urlencoded" and (await request.read())[:1] == b"{"
    if curl or not kind.startswith(("multipart/", "application/x-www-form")):  # -d, no header
        return await read_json(request)
    try:
        form = await request.post()
    except (ValueError, LookupError, AssertionError, RuntimeError, HttpProcessingError) as err:
        raise bad(f"The form can't be read: {str(err)[:120]}") from None
    lists: dict[str, list] = defaultdict(list)
    for name, value in form.items():
        value = await asyncio.to_thread(value.file.read) if hasattr(value, "file") else value
        value = bytes(value) if isinstance(value, bytearray) else value  # data without a file name
        name, key = re.match(r"([^[]*)\[?([^]]*)", name).groups()
        if value:
            lists[name].append({key: value} if key and not key.isdigit() else value)
    for name, values in lists.items():
        if all(isinstance(value, dict) for value in values):
            lists[name] = [functools.reduce(lambda one, other: one | other, values)]
    return {name: values if len(values) > 1 else values[0] for name, values in lists.items()}


def read_links(body: dict, *names: str) -> list:
    """The pictures in these fields, in order: each a URL, data URL, base64 or bytes, alone, in a
    list, or in an object like {url} or {image_url: {url}}."""
    found, waiting = [], [body.get(name) for name in names]
    while waiting:
        value = waiting.pop(0)
        if isinstance(value, list):
            waiting[:0] = value
        elif isinstance(value, dict):
            known = [value[key] for key in ("image_url", "url", "data", "b64_json") if key in value]
            if not known:
                raise bad("A picture is a file, URL or base64", names[0], "invalid_image")
            waiting[:0] = known[:1]
        elif value not in (None, "", b""):
            found.append(value)
    return found


def one_of(body: Mapping, name: str, choices: Sequence, default: Any) -> Any:
    """A parameter: of `choices` the one that is given, perhaps as text."""
    if (given := body.get(name)) in (None, ""):
        return default
    for choice in choices:
        if str(given).lower() == str(choice).lower():
            return choice
    known = " or ".join(map(str, choices))
    if isinstance(choices, range):
        known = f"a whole number from {choices[0]} to {choices[-1]}"
    raise bad(f"{name} must be {known}, not {str(given)[:40]!r}", name)


def refuse(body: dict, names: Iterable[str]) -> None:
    for name in filter(body.get, names):
        raise bad(f"{name} is Sora's; Flow has nothing like it", name, "unsupported_parameter")


def read_size(body: dict) -> str:
    side = SIDE_SIZES.get(one_of(body, "orientation", list(SIDE_SIZES), ""))
    return body.get("aspect_ratio") or side or body.get("size") or ""


def read_common(body: dict, settings: Settings, kind: str) -> tuple[str, str, bool]:
    """-> (prompt, model id, whether that is the default, as the request names none or OpenAI's)."""
    prompt, model = body.get("prompt"), body.get("model") or ""
    if not isinstance(prompt, str) or not prompt.strip():
        raise bad("prompt is missing: say in it what to make", "prompt")
    if not isinstance(model, str) or len(model) > 200:
        raise bad("model is not one; GET /v1/models lists what there is", "model")
    default = not model or bool(FOREIGN_MODEL.match(model))
    return prompt, settings[f"{kind}s.default_model"] if default else model, default


async def make_generation(media, prompt, plan, links, param="image", **more) -> Generation:
    """Holds the number of pictures against the plan, and reads them."""
    (least, most), count = plan.images, len(links)
    if plan.mode == "extend" and not more.get("source"):
        raise bad(f"{plan.model} extends a clip: POST /v1/videos/extensions", "model")
    if plan.mode == "text" and most == 0 < count:
        left_out = f"{plan.model} takes no pictures; they were left out."
        more["notes"], links = [left_out, *more.get("notes", [])], ()
    elif not least <= count <= most:
        words = f"{plan.model} takes {least} to {most} pictures; this request brings {count}"
        raise bad(words, param, "invalid_image")
    images = await asyncio.gather(*(media.input_image(link, param) for link in links))
    return Generation(plan, prompt, images=images, **more)


async def read_picture(body: dict, media: Media, edit: bool) -> Generation:
    """POST /v1/images/generations and /v1/images/edits."""
    if body.get("mask"):
        raise bad("Flow knows no masks: say what to change", "mask", "unsupported_parameter")
    prompt, model, _ = read_common(body, media.settings, "image")
    links = read_links(body, "image", "images", "references", "input_image", "input_reference")
    if edit and not links:
        raise bad("An edit needs a picture in image", "image")
    scale = one_of(body, "image_size", SIZES, "1K")
    model += "" if scale == "1K" else f"-{scale}"
    plan = resolve(model, size=read_size(body), overrides=media.settings.models)
    if plan.kind != "image":
        raise bad(f"{model} makes clips: POST /v1/videos", "model")
    return await make_generation(media, prompt, plan, links, n=one_of(body, "n", range(1, 5), 1))


async def read_clip(body: dict, media: Media, mode="", source: Job | None = None) -> Generation:
    """POST /v1/videos; with a mode ("edit" or "extend") what makes a new clip from that source."""
    refuse(body, SORA_ONLY[2:] if source else SORA_ONLY)
    one_of(body, "n", (1,), 1)
    prompt, model, default = read_common(body, media.settings, "video")
    seconds, size = one_of(body, "seconds", range(1, 61), 0), read_size(body)
    links = read_links(body, "input_reference", "image", "images", "input_image", "references")
    more = {"metadata": read_metadata(body)}
    if source:
        if mode == "edit" or default:
            model = EDITOR if mode == "edit" else source.plan.family.replace("3_1_", "3_1-")
        size = size or SIDE_SIZES.get(source.plan.ratio, "")
        clip = source.done()[0]
        more["source"] = {"job": source.id, "token_id": source.token_id, "project": source.project}
        more["source"] |= {"media": clip.media or clip.name, "scene": clip.scene}
    if default and seconds and mode != "edit":  # a client of Sora knows Sora's lengths only
        plan = resolve(model, images=len(links), mode=mode)
        known = {} if _split(model)[1] & {*LENGTHS} else COSTS.get(plan.family, {})
        can = [length for length, costs in known.items() if None not in costs] or [plan.seconds]
        nearest = min(can, key=lambda length: abs(length - seconds))
        if nearest != seconds:
            more["notes"] = [f"{model} makes {nearest} s, not {seconds}."]
        seconds = nearest
    given = {"size": size, "images": len(links), "mode": mode, "overrides": media.settings.models}
    plan = resolve(model, seconds=0 if mode == "edit" else seconds, **given)
    if "image" in (plan.kind, source and source.plan.kind):
        param = "model" if plan.kind == "image" else "video"
        raise bad("Pictures are made and edited at /v1/images", param)
    if mode == "edit":
        plan = dataclasses.replace(plan, seconds=source.plan.seconds)
    if source and plan.ratio != source.plan.ratio:
        raise bad(f"What is made from a clip has its shape, {source.plan.ratio}", "size")
    if source and seconds not in (0, plan.seconds):
        raise bad(f"This makes a clip of {plan.seconds} s", "seconds")
    return await make_generation(media, prompt, plan, links, **more)


def read_metadata(body: dict) -> dict | None:
    """An object, or its JSON text, that the client finds again in the video object."""
    given = body.get("metadata") or None
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        given = json.loads(given) if isinstance(given, str) else given
        if isinstance(given, dict | None) and len(json.dumps(given, allow_nan=False)) < 20_000:
            return given
    raise bad("metadata must be a JSON object of less than 20,000 characters", "metadata")


def read_chat(body: dict, media: Media) -> Chat:
    """POST /v1/chat/completions. The prompt is the text of the user's last turn; system messages
    and earlier turns are not part of it."""
    model, messages = body.get("model"), body.get("messages")
    refuse(body, SORA_ONLY)
    if not isinstance(model, str) or not 0 < len(model) <= 200:
        raise bad("model is missing, or not one; GET /v1/models lists what there is", "model")
    if not isinstance(messages, list) or not messages:
        raise bad("messages must be a list of at least one message", "messages")
    turns = [_read_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    if not (users := [turn for turn in turns if turn[0] == "user"]):
        raise bad("messages holds no message of the user", "messages")
    _, prompt, links = users[-1]
    system = "\n".join(text for role, text, _ in turns if role in ("system", "developer"))
    stream, usage = body.get("stream") is True, bool(dig(body, "stream_options", "include_usage"))
    inline = isinstance(kinds := body.get("modalities"), list) and "image" in kinds
    chat = Chat(model, stream, usage, inline, "", None)
    if media.settings["chat.answer_side_prompts"] and (text := side_answer(prompt, system)):
        return chat._replace(text=text)
    if not prompt.strip():
        raise bad("The user's last message holds no text: there is no prompt", "messages")
    read = functools.partial(read_turns, body, media, turns, prompt, links, system)
    return chat._replace(read=read)


async def read_turns(body, media, turns: list, prompt: str, links: list, system) -> Generation:
    """What the last turn of a chat asks for."""
    settings, model, links = media.settings, body["model"], links or read_links(body, "image")
    plan = resolve(model, size=read_size(body), images=len(links), overrides=settings.models)
    n = one_of(body, "n", range(1, 5), 1)
    made = await make_generation(media, prompt, plan, links, "messages", n=n)
    if plan.kind == "image" and not made.images and settings["chat.continue_pictures"]:
        images = await _continued(turns, prompt, media)
        notes = ["The chat's last picture went along as a reference."] if images else []
        made = made._replace(images=images, notes=[*made.notes, *notes])
    if settings["chat.use_system_prompt"] and system:
        made = made._replace(prompt=f"{system}\n\n{prompt}")
    return made


def _read_message(message: Any, where: str) -> tuple[str, str, list]:
    """-> (role, the text of all its parts, its picture links)."""
    role, content = dig(message, "role"), dig(message, "content", default=None)
    if not isinstance(role, str) or not role:
        raise bad(f"{where} must be an object with a role", "messages")
    if isinstance(content, str) or (content is None and role != "user"):
        return role, content or "", []
    if not isinstance(content, list):
        raise bad(f"{where}.content must be a text or a list of parts", "messages")
    texts, links = [], []
    for part in content:
        kind, text, link = dig(part, "type"), dig(part, "text"), dig(part, "image_url")
        if not isinstance(kind, str) or not kind or not isinstance(text, str):
            raise bad(f"{where}.content holds a part that is not like {{type, text}}", "messages")
        texts += [text] if text else []
        links += [dig(link, "url") if isinstance(link, dict) else link] if "image" in kind else []
    return role, "\n".join(texts), links


async def _continued(turns: list, prompt: str, media: Media) -> list[bytes]:
    """The chat's last picture, where the last turn asks for an edit and brings none."""
    answers = " ".join(text for role, text, _ in turns if role == "assistant")
    links = re.findall(r"!\[[^\]]{0,99}\]\((\S{1,4000}?)\)", answers)
    if not links or not EDIT_WORDS.search(prompt):
        return []
    kept = media.path(links[-1].rpartition("/")[2])
    with contextlib.suppress(GatewayError):  # it may be gone by now: then without it
        source = await asyncio.to_thread(kept.read_bytes) if kept else links[-1]
        return [await media.input_image(source, "messages")]
    return []


def side_answer(prompt: str, system: str) -> str:
    """The answer to a client's own prompt (title, tags, follow-ups); "" for a real one."""
    prompt = prompt[:8000]  # the patterns would take long on a long one
    said = re.search(r"\buser\W+(\w.{0,50})", prompt, re.IGNORECASE)
    title = re.sub(r'["\\\s]+', " ", said[1]).strip() if said else "Flow"
    for where, pattern, answer in SIDE_PROMPTS:
        if re.search(pattern, prompt if where == "user" else system):
            return answer.replace("%s", title)
    return ""


# ---- 10. Client API -------------------------------------------------------------------------
USAGE = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
IMAGE_USAGE = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
IMAGE_USAGE |= {"input_tokens_details": {"image_tokens": 0, "text_tokens": 0}}
# Our states in the words of OpenAI's Videos API; clients know no others.
VIDEO_STATES = dict.fromkeys(OPEN, "in_progress") | dict.fromkeys(OPEN[:2], "queued")
VIDEO_STATES |= {"completed": "completed", "failed": "failed", "cancelled": "failed"}
PIXELS = {"": (1280, 720), "1080p": (1920, 1080), "4k": (3840, 2160)}  # of a wide clip
DERIVED = {"remix": "edit", "edits": "edit", "extensions": "extend"}  # end of a path -> mode
LINK = re.compile(r"((?:image|video)_[0-9a-f]{24})_([0-9a-f]{24})_(\d)\.(?:mp4|png)")
PASSED_ON = ("Content-Type", "Content-Length", "Content-Range", "Accept-Ranges", "ETag")
FILE_HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "private, max-age=3600"}
STREAM_HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
STREAM_HEADERS |= {"X-Accel-Buffering": "no"}
# A clip in a chat answer: no single form plays everywhere (setting chat.video_content).
_HTML, _LINK = '<video src="{0}" controls="controls">\n{0}\n</video>', "[video.mp4]({0})"
CLIP_FORMS = {"html": _HTML, "link": _LINK, "both": f"{_HTML}\n\n{_LINK}"}
STREAM_END = b"data: [DONE]\n\n"
API_PREFIX = re.compile(r"^(/flow)?(/v1)*/")


def bearer(request: web.Request) -> str:
    """The key of a request: `Bearer K`, or the bare key that older clients send."""
    return re.sub(r"^Bearer\s+", "", request.headers.get("Authorization", ""), flags=re.I).strip()


def same(given: str, known: str) -> bool:
    return hmac.compare_digest(given.encode(errors="backslashreplace"), known.encode())


def digest(secret: str | bytes) -> str:
    data = secret.encode(errors="backslashreplace") if isinstance(secret, str) else secret
    return hashlib.sha256(data).hexdigest()


def sse(data: dict, event="") -> bytes:
    head = f"event: {event}\n" if event else ""
    return f"{head}data: {json.dumps(data)}\n\n".encode()


async def stream_answer(request: web.Request, headers: dict, events: AsyncIterator, failed):
    """Sends events as they come, the headers at once; `failed` makes the last one of an error."""
    reply = web.StreamResponse(headers=STREAM_HEADERS | headers)
    await reply.prepare(request)
    try:
        async for event in events:
            await reply.write(event)
    except ConnectionError:  # the client has gone
        raise
    except Exception as bug:
        await reply.write(failed(bug if isinstance(bug, GatewayError) else unexpected(request)))
    await reply.write_eof()
    return reply


def error_event(err: GatewayError) -> bytes:
    return sse({"type": "error"} | err.body(), "error")


def unexpected(request: web.Request) -> GatewayError:
    """For a bug, in its except clause: logged whole, told without its insides."""
    log.exception("%s %s", request.method, request.path)
    return GatewayError("internal_error", "Something went wrong in the gateway; its log says more")


def model_object(model: str) -> dict:
    frames = "i2v" in model or "interpolation" in model or model.endswith("-fl")
    plan = resolve(model, images=2 if frames else 0)
    endpoint = "image-generation" if plan.kind == "image" else "openai-video"
    head = {"id": model, "object": "model", "created": 1764547200, "owned_by": "flow2api"}
    head["description"] = f"{plan.kind.capitalize()} generation - {plan.describe()}"
    return head | {"supported_endpoint_types": ["openai", endpoint], "pictures": plan.images}


def fingerprint(request: Any) -> str:
    """The same for the same fields and files of a request, whatever their form."""

    def shorter(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: shorter(item) for name, item in value.items()}
        if isinstance(value, list):
            return list(map(shorter, value))
        return digest(value) if isinstance(value, str | bytes) and len(value) > 999 else value

    with contextlib.suppress(RecursionError):
        return digest(json.dumps(shorter(request), sort_keys=True, default=repr))
    raise bad("The body is nested too deeply")


class Gateway:
    """The parts of a running gateway, on an open store, and the handlers of /v1 and /tmp."""

    def __init__(self, settings: Settings, store: Store, adapter=RestFlow):
        self.settings, self.store, self.wire = settings, store, Wire(settings)
        self.pool = Pool(settings, store, adapter(settings, self.wire))
        self.media = Media(settings, self.wire)
        self.jobs = Jobs(store, self.pool, self.media)
        self.requests = self.bodies = 0  # under way: their number, the bytes of their bodies
        self.keyed = weakref.WeakValueDictionary()  # Idempotency-Key -> lock, while one is read

    def logged_in(self, request: web.Request) -> bool:
        """Whether its owner asks: admin_flow2api.py can tell."""
        return False

    async def close(self) -> None:
        await self.jobs.stop()
        await self.wire.close()
        await asyncio.to_thread(self.store.close)

    @contextlib.asynccontextmanager
    async def job_of(self, request: web.Request, body: dict, read: Callable, detached=False):
        """The job of a creating request, and headers for its answer; abandoned at the end, unless
        its client can come back. Under a known Idempotency-Key nothing is read or made."""
        given, path = request.headers.get("Idempotency-Key", ""), API_PREFIX.sub("", request.path)
        if len(given) > 255 or not given.isprintable():
            raise bad("An Idempotency-Key may have 255 printable characters at most")
        hashed = await asyncio.to_thread(fingerprint, [path, body])
        # OpenAI's packages send a request again that took them too long, and count that.
        again = request.headers.get("x-stainless-retry-count", "0") != "0"
        mark = {"key": given or f"\n{hashed}", "request": hashed}  # which no given one can be
        job, headers = None, {}
        async with self.keyed.setdefault(mark["key"], asyncio.Lock()):
            if (given or again) and (job := await self.jobs.repeated(mark, bool(given))):
                headers = {"Idempotent-Replayed": "true"}
            keep = detached or bool(given)
            try:
                job = job or await self.jobs.create(await read(), path.split("/")[0], mark, keep)
            except GatewayError:  # sent again, it is not the earlier request that was like it
                earlier = None if given or again else await self.jobs.repeated(mark, False)
                if earlier and earlier.ended:
                    await self.store.delete(("keys", "key", mark["key"]))
                raise
        headers |= {"X-Job-Id": job.id, "x-should-retry": "false"}  # a retry would pay twice
        job.clients += 1
        try:
            outputs = job.done() if "Idempotent-Replayed" in headers else []
            gone = (output for output in outputs if not self.media.path(output.file))
            await asyncio.gather(*(self.jobs.link(job, output) for output in gone))
            yield job, headers
        except GatewayError as err:
            err.headers = headers
            if job.submitted_at and err.status >= 500:
                err.status = 424  # which no client repeats by itself
            raise
        finally:
            job.clients -= 1
            if not job.clients:
                await asyncio.shield(self.jobs.abandon(job))

    def expect_done(self, job: Job) -> None:
        """Raises task_not_completed, or generation_failed with the job's own reason."""
        if not job.ended:
            state = VIDEO_STATES[job.state]
            raise GatewayError("task_not_completed", f"Task not completed. Current status: {state}")
        if job.error:
            err = GatewayError("generation_failed", job.error["message"])
            err.status, err.type = 400, TYPES[400]  # as the seeds have it here
            raise err

    def output_url(self, request: web.Request, job: Job, output: Output, file=False) -> str:
        """Where a client gets an output without a key: here while it is kept, else at Google.
        `file`, or none known: an address of ours with a file's name, that serves it from there."""
        if self.media.path(output.file):
            name = output.file
        elif file or not output.url:
            ending = "mp4" if job.plan.kind == "video" else "png"
            name = f"{job.id}_{self.link_secret(job)}_{job.done().index(output)}.{ending}"
        else:
            return output.url
        base = self.settings["cache.base_url"].rstrip("/") or request.url.origin()
        return f"{base}/tmp/{name}"

    def link_secret(self, job: Job) -> str:
        """The part of a key-less link that nobody can guess, whoever knows the job's id."""
        return digest(f"{job.batch} {job.id}")[:24]

    async def send_output(self, request, job: Job, query: Mapping, thumbnail=False):
        """The file of an output, with ranges: as it is kept here, else passed on from Google in
        constant memory (or by a redirect, where the settings say so)."""
        self.expect_done(job)
        output = job.done()[one_of(query, "index", range(len(job.done())), 0)]
        kept = self.media.path(output.file)
        if kept and not thumbnail:
            return web.FileResponse(kept, headers=FILE_HEADERS)
        redirect = self.settings["videos.content"] == "redirect" and not thumbnail
        if redirect and (url := await self.jobs.link(job, output)):
            return web.Response(status=302, headers={"Location": url})
        reply = web.StreamResponse(headers=FILE_HEADERS)
        ranges = {"Range": request.headers["Range"]} if "Range" in request.headers else {}
        try:
            async with self.jobs.fetch(job, output, thumbnail, **ranges) as upstream:
                told = upstream.headers
                reply.headers.update({name: told[name] for name in PASSED_ON if name in told})
                reply.set_status(upstream.status)
                await reply.prepare(request)
                async for chunk in upstream.content.iter_chunked(1 << 16):
                    if request.method == "HEAD":
                        break
                    await reply.write(chunk)
        except GatewayError as err:
            if not reply.prepared:
                raise
            log.warning("%s was cut off: %s", request.path, err)
            raise ConnectionResetError from None  # so that the client sees it, too
        return reply

    async def list_models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": list(map(model_object, MODELS))})

    async def get_model(self, request: web.Request) -> web.Response:
        return web.json_response(model_object(request.match_info["model"]))

    async def chat_completions(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/chat/completions, streamed or not."""
        body = await read_json(request)
        chat = read_chat(body, self.media)
        if not chat.read:
            log.info("a client's own prompt was answered without generating")
            return await ChatAnswer(self, request, chat).send({})
        async with self.job_of(request, body, chat.read) as (job, headers):
            return await ChatAnswer(self, request, chat, job).send(headers)

    async def make_pictures(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/images/generations, /v1/images/edits."""
        body, edit = await read_body(request), request.path.endswith("/edits")
        default = self.settings["images.response_format"]
        form = one_of(body, "response_format", ("b64_json", "url"), default)
        stream = one_of(body, "stream", (True, False), False)
        read = functools.partial(read_picture, body, self.media, edit)
        async with self.job_of(request, body, read) as (job, headers):
            if stream:
                name = "image_edit.completed" if edit else "image_generation.completed"
                events = self.picture_events(request, job, form, name)
                return await stream_answer(request, headers, events, error_event)
            await self.jobs.completed(job)
            data = [await self.picture(request, job, output, form) for output in job.done()]
            answer = {"created": int(job.created_at), "data": data}
            return web.json_response(answer, headers=headers)

    async def picture(self, request: web.Request, job: Job, output: Output, form: str) -> dict:
        """An element of `data`: with b64_json or url, never both."""
        about = {"revised_prompt": job.prompt}
        if form == "url":
            return about | {"url": self.output_url(request, job, output)}
        if path := self.media.path(output.file):
            data = await asyncio.to_thread(path.read_bytes)
        else:
            async with self.jobs.fetch(job, output) as reply:
                data = await reply.read()
        return about | {"b64_json": (await asyncio.to_thread(base64.b64encode, data)).decode()}

    async def picture_events(self, request, job: Job, form: str, name: str) -> AsyncIterator[bytes]:
        """The events of OpenAI's Images API: one for each picture that is done."""
        async for _ in self.jobs.watch(job):
            yield b": ping\n"
        about = {"type": name, "created_at": int(job.created_at), "size": "auto", "quality": "auto"}
        about |= {"background": "opaque", "usage": IMAGE_USAGE}
        for output in job.done():
            item = await self.picture(request, job, output, form)
            start = base64.b64decode(item.get("b64_json", "")[:24])
            kind = sniff(start)[0].removeprefix("image/") if start else "png"
            yield sse(about | item | {"output_format": kind}, name)

    def video_object(self, request: web.Request, job: Job) -> dict:
        """A job as OpenAI's video object; its types are strict, clients fail on others."""
        plan, state = job.plan, VIDEO_STATES[job.state]
        percent = {"completed": 100, "queued": 0}.get(state, self.jobs.progress(job)[0])
        sides = sorted(PIXELS.get(plan.upscale, PIXELS[""]), reverse=plan.ratio == "landscape")
        size = "{}x{}".format(*sides) if plan.kind == "video" else plan.ratio
        shown = {"id": job.id, "object": "video", "model": plan.model, "status": state}
        shown |= {"progress": percent, "prompt": job.prompt, "created_at": int(job.created_at)}
        shown |= {"completed_at": int(job.completed_at) or None, "expires_at": None, "size": size}
        shown |= {"seconds": str(plan.seconds), "remixed_from_video_id": job.source.get("job")}
        shown |= {"metadata": job.metadata} if job.metadata is not None else {}
        shown |= {"notes": job.notes} if job.notes else {}
        error = {"code": job.error["code"], "message": job.error["message"]} if job.error else None
        shown |= {"error": error} | ({"fail_reason": error["message"]} if error else {})
        urls = [self.output_url(request, job, output, file=True) for output in job.done()]
        if state == "completed":
            shown |= {"url": urls[0], "video_url": urls[0]} | ({"urls": urls} if urls[1:] else {})
        return shown

    def video_answer(self, request: web.Request, job: Job, headers: dict) -> web.Response:
        headers = headers | ({} if job.ended else {"openai-poll-after-ms": "5000"})
        return web.json_response(self.video_object(request, job), headers=headers)

    async def known_job(self, job_id: str) -> Job:
        if job := await self.jobs.get(job_id):
            return job
        raise GatewayError("task_not_found", f"There is no video {job_id[:80]!r}")

    async def make_video(self, request: web.Request) -> web.Response:
        """POST /v1/videos, and what makes a clip from a clip: {id}/remix, edits, extensions."""
        body, source = await read_body(request), None
        remixed = body.get("remix_target_id")
        if mode := DERIVED.get(request.path.rpartition("/")[2], "edit" if remixed else ""):
            video = request.match_info.get("id") or remixed or body.get("video")
            video = dig(video, "id", default=video)
            if not video or not isinstance(video, str):
                raise bad('video must be {"id": …} of a clip made here; no files', "video")
            source = await self.known_job(video)
            self.expect_done(source)
        read = functools.partial(read_clip, body, self.media, mode, source)
        wait = not one_of(body, "async_mode", (True, False, 1, 0), True)
        async with self.job_of(request, body, read, detached=True) as (job, headers):
            if wait:
                await self.jobs.completed(job)
            return self.video_answer(request, job, headers)

    async def get_video(self, request: web.Request) -> web.Response:
        """GET /v1/videos/{id}: of any job, from what is known here."""
        return self.video_answer(request, await self.known_job(request.match_info["id"]), {})

    async def list_videos(self, request: web.Request) -> web.Response:
        """GET /v1/videos?limit&after&order: the clips that any API has asked for."""
        query = request.query
        limit = one_of(query, "limit", range(1, 101), 20)
        oldest_first = one_of(query, "order", ("asc", "desc"), "desc") == "asc"
        if after := query.get("after", ""):
            await self.known_job(after)
        given = {"after": after, "oldest_first": oldest_first, "limit": limit + 1}
        jobs = await self.jobs.page("video", **given)
        data = [self.video_object(request, job) for job in jobs[:limit]]
        shown = {"object": "list", "data": data, "has_more": len(jobs) > limit}
        ids = [video["id"] for video in data] or [None]
        return web.json_response(shown | {"first_id": ids[0], "last_id": ids[-1]})

    async def delete_video(self, request: web.Request) -> web.Response:
        job = await self.known_job(request.match_info["id"])
        await self.jobs.delete(job)
        return web.json_response({"id": job.id, "object": "video.deleted", "deleted": True})

    async def video_content(self, request: web.Request) -> web.StreamResponse:
        """GET /v1/videos/{id}/content?variant=video|thumbnail; index: of several outputs."""
        job = await self.known_job(request.match_info["id"])
        variant = one_of(request.query, "variant", ("video", "thumbnail"), "video")
        return await self.send_output(request, job, request.query, variant == "thumbnail")

    async def serve_media(self, request: web.Request) -> web.StreamResponse:
        """GET /tmp/{name}: a file without a key, by a name that can't be guessed: one that is kept
        here, or an output of a job (see output_url)."""
        name = request.match_info["name"]
        if path := self.media.path(name):
            return web.FileResponse(path, headers=FILE_HEADERS)
        match = LINK.fullmatch(name)
        job = await self.jobs.get(match[1]) if match else None
        if not job or not same(match[2], self.link_secret(job)):
            raise GatewayError("not_found", "There is no such file, or it has expired")
        return await self.send_output(request, job, {"index": match[3]})

    async def stats(self, request: web.Request) -> web.Response:
        """GET /v1/stats, /api/stats: eight counters."""
        return web.json_response({"success": True, "stats": self.counters()} | self.counters())

    def counters(self) -> dict[str, int]:
        tokens = self.pool.tokens.values()
        shown = {"total_tokens": len(tokens), "active_tokens": sum(t.is_active for t in tokens)}
        day = today()
        for what in ("image", "video", "error"):
            shown[f"total_{what}s"] = sum(getattr(token, f"{what}_count") for token in tokens)
            shown[f"today_{what}s"] = sum(t.today.get(what, 0) for t in tokens if t.day == day)
        return shown

    async def token_tasks(self, request: web.Request) -> web.Response:
        """GET /v1/tokens/{id}/…: open jobs of a token, finished ones (profile-feed), or one job."""
        token = self.token(request)
        if wanted := request.match_info.get("job"):
            job = await self.known_job(wanted)
            if job.token_id != token.id:
                raise GatewayError("task_not_found", f"{token.email} has no task {job.id}")
            return web.json_response({"success": True, "task": self.task_object(request, job)})
        name, jobs = "tasks", [job for job in self.jobs.open.values() if job.token_id == token.id]
        if request.path.endswith("feed"):
            limit = one_of(request.query, "limit", range(1, 101), 8)
            given = {"token_id": token.id, "states": ("completed",), "limit": limit}
            name, jobs = "items", await self.jobs.page(**given)
        shown = {"success": True, "token_id": token.id, "count": len(jobs)}
        return web.json_response(shown | {name: [self.task_object(request, job) for job in jobs]})

    def task_object(self, request: web.Request, job: Job) -> dict:
        shown = self.video_object(request, job)
        shown = {name: shown[name] for name in ("id", "status", "prompt", "progress")}
        urls = (self.output_url(request, job, output, file=True) for output in job.done())
        shown |= {"progress_pct": shown.pop("progress") / 100, "title": job.plan.describe()}
        return shown | {"generations": [{"id": job.id, "url": url} for url in urls]}

    def token(self, request: web.Request) -> Token:
        """The token that the path names. Raises not_found."""
        if token := self.pool.tokens.get(int(request.match_info["id"])):
            return token
        raise GatewayError("not_found", "There is no such token")

    async def health(self, request: web.Request) -> web.Response:
        """GET /health: that the process serves, and no details."""
        return web.json_response({"status": "ok"})

    async def absent(self, request: web.Request) -> web.Response:
        raise GatewayError("not_implemented", f"{request.path[:80]}: Flow has nothing like it")


class ChatAnswer:
    """Renders a job, or a text, in the format of OpenAI's chat completions."""

    def __init__(self, gateway: Gateway, request: web.Request, chat: Chat, job: Job | None = None):
        self.gateway, self.request, self.chat, self.job = gateway, request, chat, job
        self.id, self.created = f"chatcmpl-{secrets.token_hex(12)}", int(now())

    async def send(self, headers: dict) -> web.StreamResponse:
        if self.chat.stream:
            return await stream_answer(self.request, headers, self.events(), self.failed)
        if self.job:
            await self.gateway.jobs.completed(self.job)
        choice = {"message": {"role": "assistant", **self.message()}, "finish_reason": "stop"}
        body = self.envelope(choice, kind="chat.completion") | {"usage": USAGE}
        return web.json_response(body, headers=headers)

    def envelope(self, *choices: dict, kind="chat.completion.chunk") -> dict:
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.chat.model}
        return head | {"choices": [{"index": 0, **choice} for choice in choices]}

    def message(self) -> dict:
        """content, and images where the client asked for them there."""
        if not (job := self.job):
            return {"content": self.chat.text}
        found = (self.gateway.output_url(self.request, job, output) for output in job.done())
        links, form = list(filter(None, found)), self.gateway.settings["chat.video_content"]
        form = CLIP_FORMS[form] if job.plan.kind == "video" else "![Generated Image]({0})"
        parts = [form.format(url) for url in links]
        images = self.chat.images and job.plan.kind == "image"
        failed = [output.error["message"] for output in job.outputs if output.error]
        failed += ["Flow made none of it"] * (job.n - len(job.outputs))
        notes = [*job.notes, *(f"One of {job.n} failed: {words}" for words in failed)]
        text = "\n\n".join(([] if images else parts) + notes) or f"{len(links)} made."
        rows = [{"type": "image_url", "image_url": {"url": url}} for url in links]
        rows = [row | {"index": index} for index, row in enumerate(rows)]
        return {"content": text} | ({"images": rows} if images else {})

    def delta(self, finish: str | None = None, **delta: Any) -> bytes:
        return sse(self.envelope({"delta": delta, "finish_reason": finish}))

    def failed(self, err: GatewayError) -> bytes:
        """Some clients show only the text, some only the event."""
        return self.delta(content=f"{err}\n") + sse(err.body()) + STREAM_END

    async def events(self) -> AsyncIterator[bytes]:
        """The role at once; progress as reasoning_content, or an empty delta each HEARTBEAT
        seconds; at the end the content."""
        job, jobs = self.job, self.gateway.jobs
        said = f"Job {job.id}: {job.plan.describe()}\n" if job else ""
        yield self.delta(role="assistant", **({"reasoning_content": said} if job else {}))
        if job:
            async for _ in jobs.watch(job):
                line = progress_line(jobs, job)
                yield self.delta(**({"reasoning_content": line} if line != said else {}))
                said = line
        yield self.delta(**self.message())
        yield self.delta("stop")
        if self.chat.usage:
            yield sse(self.envelope() | {"usage": USAGE})
        yield STREAM_END


def progress_line(jobs: Jobs, job: Job) -> str:
    """A line on where the job stands; no number in it is invented."""
    if job.stage or not job.outputs:
        waiting = [waiting for waiting, _ in jobs.pool.waiting.values()]
        before = f" ({waiting.index(job)} before this one)" if job in waiting[1:] else ""
        return (job.stage or "Starting") + before + "\n"
    percent, known = jobs.progress(job)
    guess = f", about {percent}% (by the time that {known} earlier ones took)" if known else ""
    ready = f"{len(job.done())} of {job.n} done, " if job.n > 1 else ""
    return f"{ready}generating for {int(now() - job.submitted_at)} s{guess}\n"


# ---- 11. Main -------------------------------------------------------------------------------
GATEWAY = web.AppKey("gateway", Gateway)
PUBLIC, KEY, ADMIN, EITHER = "public", "key", "admin", "either"
SORA_PATHS = ("characters", "characters/search", "videos/characters", "videos/characters/{name}")
SORA_PATHS += ("invite-codes", "profiles/{name}", "users/{name}/feed", "feed", "enhance_prompt")
TOKEN_PATH = r"/v1/tokens/{id:\d{1,18}}"
ROUTES = (  # methods, path, handler, who may call it
    ("GET", "/health", Gateway.health, PUBLIC),
    ("GET", "/tmp/{name}", Gateway.serve_media, PUBLIC),
    ("GET", "/v1/models", Gateway.list_models, KEY),
    ("GET", "/v1/models/{model}", Gateway.get_model, KEY),
    ("POST", "/v1/chat/completions", Gateway.chat_completions, KEY),
    ("POST", "/v1/images/{_:generations|edits}", Gateway.make_pictures, KEY),
    ("POST", "/v1/videos", Gateway.make_video, KEY),
    ("GET", "/v1/videos", Gateway.list_videos, KEY),
    ("POST", "/v1/videos/{_:edits|extensions}", Gateway.make_video, KEY),
    ("GET", "/v1/videos/{id}", Gateway.get_video, KEY),
    ("DELETE", "/v1/videos/{id}", Gateway.delete_video, KEY),
    ("POST", "/v1/videos/{id}/remix", Gateway.make_video, KEY),
    ("GET", "/v1/videos/{id}/content", Gateway.video_content, KEY),
    ("GET", "/v1/stats", Gateway.stats, KEY),
    ("GET", TOKEN_PATH + "/{_:pending-tasks(-v2)?|profile-feed}", Gateway.token_tasks, KEY),
    ("GET", TOKEN_PATH + "/tasks/{job}", Gateway.token_tasks, KEY),
    *(("*", f"/v1/{path}", Gateway.absent, KEY) for path in SORA_PATHS),
)
NO_ROUTE = "no such route; there are /v1/chat/completions, /v1/images/generations, /v1/videos"
NO_ROUTE += " (a client that asks for the Responses API: set it to chat completions)"
HTTP_ERRORS = {404: ("not_found", NO_ROUTE), 405: ("method_not_allowed", "it has other methods")}
HTTP_ERRORS |= {413: ("request_too_large", "the body is larger than limits.body_mb allows")}
ALIASES = ("/v1", "", "/flow/v1", "/v1/v1")  # of /v1: people get base URLs wrong in these ways
PREFLIGHT = {"Access-Control-Allow-Methods": "GET, POST, DELETE", "Access-Control-Max-Age": "86400"}


async def admit(handler: Callable, role: str, request: web.Request) -> web.StreamResponse:
    """Calls the handler, for those who may, as far as there is room."""
    gateway, given = request.app[GATEWAY], bearer(request)
    key, owner = gateway.settings["global.api_key"], role in (ADMIN, EITHER)
    if not (role == PUBLIC or (owner and gateway.logged_in(request))):
        if role == ADMIN:
            raise GatewayError("invalid_api_key", "Invalid or expired admin token")
        if not key or not same(given, key):
            raise GatewayError("invalid_api_key", "Invalid API key: send Authorization: Bearer KEY")
    most, room = gateway.settings["limits.requests"], gateway.settings["limits.bodies_mb"] << 20
    size = (request.content_length or request.client_max_size) if request.can_read_body else 0
    size *= role != PUBLIC  # whoever asks has shown no key: what is announced may never come
    if size > request.client_max_size:  # later would not help
        raise web.HTTPRequestEntityTooLarge(request.client_max_size, size)
    if role == KEY and (gateway.requests >= most or gateway.bodies + size > room):
        raise GatewayError("queue_full", "Too many requests at once", retry_after=10)
    gateway.requests, gateway.bodies = gateway.requests + 1, gateway.bodies + size
    try:
        return await handler(gateway, request)
    finally:
        gateway.requests, gateway.bodies = gateway.requests - 1, gateway.bodies - size


@web.middleware
async def tell_errors(request: web.Request, handler) -> web.StreamResponse:
    """Every failure in the caller's format: {"detail"} under /api, OpenAI's object elsewhere."""
    if request.method == "OPTIONS":  # CORS: browser clients send their key in a header
        asked = request.headers.get("Access-Control-Request-Headers", "authorization, content-type")
        return web.Response(status=204, headers={"Access-Control-Allow-Headers": asked} | PREFLIGHT)
    try:
        return await handler(request)
    except GatewayError as err:
        fault = err
    except web.HTTPException as err:
        code, why = HTTP_ERRORS.get(err.status, ("invalid_request", err.reason))
        fault = GatewayError(code, f"{request.method} {request.path[:80]}: {why}")
    except ConnectionError:  # the client has gone in the middle of an answer
        raise
    except Exception:
        fault = unexpected(request)
    wait = {"Retry-After": str(int(fault.retry_after))} if fault.retry_after else {}
    wait |= {"x-should-retry": "false"} if fault.status in (409, 501) else {}  # it would not help
    detail = {"success": False, "detail": str(fault), "message": str(fault)}
    body = detail if request.path.startswith("/api/") else fault.body()
    reason = fault.code.replace("_", " ")  # some clients show nothing else
    return web.json_response(body, status=fault.status, reason=reason, headers=wait | fault.headers)


async def expose(request: web.Request, response: web.StreamResponse) -> None:
    if not request.path.startswith("/api/"):
        shown = "openai-poll-after-ms, x-request-id, x-job-id, content-range, retry-after"
        shown += ", x-should-retry, idempotent-replayed"
        response.headers["Access-Control-Allow-Origin"] = "*"
        response.headers["Access-Control-Expose-Headers"] = shown


async def workings(app: web.Application) -> AsyncIterator[None]:
    """Goes on with what was under way, runs what runs for ever, and closes it all at the end."""
    gateway = app[GATEWAY]
    await gateway.jobs.resume()
    loops = gateway.pool.keep_fresh, gateway.jobs.poll_forever, gateway.media.expire_forever
    tasks = [asyncio.create_task(for_ever(loop())) for loop in loops]
    yield
    await asyncio.gather(*(task for task in tasks if task.cancel()), return_exceptions=True)
    await gateway.close()


async def for_ever(loop: Awaitable) -> None:
    try:
        await loop
    except Exception:  # without this loop nothing would move any more, and nobody would know
        log.critical("a background loop has died; Flow2API stops", exc_info=True)
        signal.raise_signal(signal.SIGTERM)


def beside(name: str) -> Any:
    """The module of a file of ours that builds on this one; None where it is not there."""
    sys.modules.setdefault("flow2api", sys.modules[__name__])  # one copy, even if it is __main__
    if not Path(__file__).with_name(f"{name}.py").exists():
        return None
    return importlib.import_module(name)


def make_app(settings: Settings, store: Store, adapter=RestFlow) -> web.Application:
    """The application on an open store, which it closes at its end."""
    limit = settings["limits.body_mb"] << 20
    app = web.Application(middlewares=[tell_errors], client_max_size=limit)
    owners = beside("admin_flow2api")
    app[GATEWAY] = (owners.AdminApi if owners else Gateway)(settings, store, adapter)
    for methods, path, handler, role in ROUTES + (owners.ROUTES if owners else ()):
        admitted = functools.partial(admit, handler, role)
        for prefix in ALIASES if path.startswith("/v1/") else ("",):
            for method in methods.split():
                app.add_routes([web.route(method, prefix + path.removeprefix("/v1"), admitted)])
    app.on_response_prepare.append(expose)
    app.on_shutdown.append(app[GATEWAY].jobs.interrupt)
    app.cleanup_ctx.append(workings)
    return app


def open_store(settings: Settings) -> Store:
    """Opens the database; it holds what the admin page has set, and the generated secrets."""
    store = Store(settings.data)
    store.open()
    for key, value in store.settings().items():
        layer, _, name = key.partition(":")
        if name in SETTING and layer in Settings.LAYERS and value is not None:
            settings.layers[layer][name] = value
    return store


def hash_password(password: str, salt: bytes) -> str:
    key = hashlib.scrypt(password.encode(errors="replace"), salt=salt, n=1 << 14, r=8, p=1)
    return f"scrypt${salt.hex()}${key.hex()}"


async def make_secrets(settings: Settings, store: Store) -> dict[str, str]:
    """Makes the API key and the admin password that nobody has set -> those that are new."""
    made = {}
    for name, size in (("global.api_key", 24), ("global.admin_password", 12)):
        if not settings[name]:
            made[name] = kept = secrets.token_urlsafe(size)
            if name == "global.admin_password":
                kept = hash_password(kept, secrets.token_bytes(16))
            settings.layers["generated"][name] = kept
            await store.put_rows(("settings", {"name": f"generated:{name}", "data": to_json(kept)}))
    return made


def greet(settings: Settings, port: int, made: dict[str, str], demo: bool) -> None:
    """What a person needs next. Secrets are shown when they are new, and never again."""
    host = settings["server.host"]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    print(f"Flow2API {__version__} on http://{host}:{port}" + "  (demo: a simulated Flow)" * demo)
    for name, text in made.items():
        print(f"{name.partition('.')[2]}: {text}")
    if made and not demo:
        print("Keep what stands above, it is not shown again; setting.toml can set others.")
    key = settings["global.api_key"] if demo else made.get("global.api_key", "$KEY")
    body = '{"model":"veo_3_1-fast","stream":true,"messages":[{"role":"user","content":"a boat"}]}'
    curl = f'curl -N http://{host}:{port}/v1/chat/completions -H "Authorization: Bearer {key}"'
    print(f"Try it:\n{curl} -d '{body}'", flush=True)


async def serve(settings: Settings, demo: bool) -> None:
    """Serves until SIGTERM or SIGINT; leaves within five seconds of it."""
    store, adapter, accounts = open_store(settings), RestFlow, ()
    if demo:
        if not (simulated := beside("demo_flow2api")):
            raise SettingError("--demo needs demo_flow2api.py beside flow2api.py")
        adapter, accounts = simulated.Demo, simulated.ACCOUNTS
        settings.layers["command line"] |= {"flow.poll_interval": 1.0, "cache.timeout": 0}
    app = make_app(settings, store, adapter)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=2)
    await runner.setup()
    try:
        await web.TCPSite(runner, settings["server.host"], settings["server.port"]).start()
        for st in accounts:
            await app[GATEWAY].pool.add(st)
        greet(settings, runner.addresses[0][1], await make_secrets(settings, store), demo)
        gc.freeze()  # what is imported stays: no need to look at it again and again
        done = asyncio.Event()
        for number in () if sys.platform == "win32" else (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, done.set)
        await done.wait()
        log.info("stopping")
    finally:
        await runner.cleanup()


def iso(seconds: float) -> str | None:
    """RFC 3339 in UTC; None for never."""
    at = datetime.datetime.fromtimestamp(int(seconds), datetime.UTC)
    return at.isoformat() if seconds else None


async def findings(settings: Settings) -> AsyncIterator[tuple[bool, str]]:
    """What --check tells: (is it well, a line with what to do). Spends nothing."""
    for warning in settings.warnings:
        yield False, warning
    try:
        gateway = Gateway(settings, store := open_store(settings))
    except (StoreError, OSError) as err:
        yield False, f"data folder {settings.data}: {err}"
        return
    yield True, f"database {store.path}, schema {len(MIGRATIONS)}"
    free = shutil.disk_usage(settings.data).free >> 20
    yield free > 500, f"{free} MB free on the disk of {settings.data}; it should have 500"
    way = "the proxy" if settings["proxy.proxy_enabled"] else "no proxy"
    for url in (settings["flow.labs_base_url"], settings["flow.api_base_url"]):
        try:
            async with gateway.wire.request("GET", url, timeout=aiohttp.ClientTimeout(15)) as reply:
                yield reply.status < 500, f"{url} answers {reply.status} through {way}"
        except (GatewayError, *gateway.wire.not_sent, *NETWORK_ERRORS):
            yield False, f"{url} can't be reached through {way}; check network and [proxy]"
    if not gateway.pool.tokens:
        yield False, "no Google account yet: start Flow2API and add one (README, Session token)"
    for token in gateway.pool.tokens.values():
        try:
            await gateway.pool.check(token)
            why = "" if token.is_active else f"; disabled: {token.reason or 'by hand'}; enable it"
            words = f"{TIERS.get(token.tier, 'plan unknown')}, {token.credits} credits"
            words += f", access token until {iso(token.at_expires)}{why}"
            yield token.is_active, f"account {token.email}: {words}"
        except GatewayError as err:
            yield False, f"account {token.email}: {err}"
    await gateway.close()


async def check(settings: Settings) -> bool:
    """--check: the settings in force, then the findings -> whether all is well."""
    for name in SETTING:
        secret = settings[name] and name in HIDDEN
        value = "(set)" if secret else repr(settings[name])
        print(f"      {name} = {value}  ({settings.source(name)})")
    found = [found async for found in findings(settings)]
    for well, text in found:
        print("ok   " if well else "WRONG", text)
    return all(well for well, _ in found)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    rows = "\n".join(f"  {s.name:28} {s.help} [{s.default}]" for s in SETTINGS)
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.description = "Your own Google Flow accounts as an OpenAI-compatible API."
    parser.epilog = f"settings, in setting.toml or as FLOW2API_<SECTION>_<KEY>:\n{rows}"
    option, beside = parser.add_argument, Path(__file__).with_name("setting.toml")
    option("--config", type=Path, default=beside, help="default: setting.toml beside flow2api.py")
    option("--data", dest="data_dir", help="data folder (default: data/ beside the configuration)")
    option("--host", help="address to listen on")
    option("--port", help="port to listen on")
    instead = parser.add_mutually_exclusive_group().add_argument
    instead("--demo", action="store_true", help="run on a simulated Flow; nothing is kept")
    instead("--check", action="store_true", help="say what is wrong, spend nothing, and exit")
    instead("--backup", type=Path, metavar="FILE", help="copy the database, even in use, and exit")
    option("--version", action="version", version=f"Flow2API {__version__}")
    return parser.parse_args(argv)


def load_settings(arguments: argparse.Namespace) -> Settings:
    settings = Settings()
    if not arguments.demo:  # the demo touches nothing of the real one
        settings.read_file(arguments.config.expanduser().resolve())
    settings.read_environment(dict(os.environ))
    for option in ("data_dir", "host", "port"):
        if (value := getattr(arguments, option)) is not None:
            settings.put("command line", f"server.{option}", value, "command line")
    for name in set(settings.models) - set(KEYS):
        settings.warnings.append(f"[models] {name} is unknown; there are {', '.join(KEYS)}")
    return settings


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        settings = load_settings(arguments)
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
        if arguments.check:
            return 0 if asyncio.run(check(settings)) else 1
        if arguments.backup:
            Store(settings.data).copy(arguments.backup)
            return 0
        for warning in settings.warnings:
            log.warning(warning)
        with tempfile.TemporaryDirectory(prefix="flow2api-") as folder:
            if arguments.demo:
                settings.layers["command line"]["server.data_dir"] = folder
            asyncio.run(serve(settings, arguments.demo))
    except (SettingError, StoreError, OSError) as err:
        print(f"flow2api: {err}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
