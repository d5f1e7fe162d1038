"""Flow2API: your own Google Flow accounts as an OpenAI-compatible API, in one file.

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
    10  Client API        /v1: a job rendered as chat
    11  Admin API         /api, /health, the page
    12  Demo              a small simulated Flow
    13  Main              the application and the command line

Needs Python 3.11+ and aiohttp; aiohttp-socks only where a SOCKS proxy is set.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import collections
import concurrent.futures
import contextlib
import dataclasses
import datetime
import difflib
import functools
import hashlib
import hmac
import ipaddress
import itertools
import json
import logging
import math
import os
import queue
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
import zlib
from collections import namedtuple
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, urljoin, urlsplit

import aiohttp
from aiohttp import web

__version__ = "0.1.0"
log = logging.getLogger("flow2api")


def now() -> float:
    """Unix seconds: the only clock that decisions read, so that tests can drive it."""
    return time.time()


# ---- 1. Settings ----------------------------------------------------------------------------


class SettingError(Exception):
    """A value that can't be used; the text names the key, the value and what is allowed."""


class Setting(NamedTuple):
    """A row of the table. `name` is section.key; the type is that of the default."""

    name: str
    default: bool | int | float | str
    help: str
    low: float | None = None
    high: float = math.inf
    choices: tuple[str, ...] = ()

    def parse(self, raw: Any, origin: str) -> Any:
        """The value of `raw`, a TOML value or the text of another origin. Raises SettingError."""
        kind, value = type(self.default), raw
        with contextlib.suppress(ValueError, KeyError):
            if isinstance(raw, str) and kind is bool:
                value = {"true": True, "1": True, "false": False, "0": False}[raw.strip().lower()]
            elif isinstance(raw, str) or (kind is float and type(raw) is int):
                value = kind(raw)
        good = type(value) is kind and (not self.choices or value in self.choices)
        if good and (self.low is None or self.low <= value <= self.high):
            return value
        kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
        allowed = " | ".join(self.choices) or kinds[kind]
        allowed += "" if self.low is None else f" from {self.low:g} to {self.high:g}"
        shown = "that value" if self.name in SECRETS else repr(raw)
        raise SettingError(f"{origin}: {self.name} can't be {shown}; allowed: {allowed}")


# fmt: off
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
    Setting("admin.error_ban_threshold", 3, "Account failures in a row that disable it.", 1, 1000),
    Setting("cache.enabled", False, "Keep finished files here and serve them under /tmp/."),
    Setting("cache.timeout", 7200, "Seconds a kept file stays (0: for ever).", 0, 31536000),
    Setting("cache.base_url", "", "Public address in media links. Empty: what the client used."),
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
    Setting("limits.body_mb", 64, "Largest request body, MB.", 1, 1024),
    Setting("limits.image_mb", 20, "Largest input picture, MB.", 1, 100),
    Setting("demo.image_seconds", 2.0, "Seconds a picture takes with --demo.", 0, 600),
    Setting("demo.video_seconds", 12.0, "Seconds a clip takes with --demo.", 0, 3600),
)
# fmt: on
SETTING = {setting.name: setting for setting in SETTINGS}
SECRETS = ("global.api_key", "global.admin_password")
PLACEHOLDERS = ("", "your_api_key", "your_password")


class Settings:
    """Layers of values, the strongest first. `settings["server.port"]` is the value in force; it
    is read at each use, so that a change takes effect at once. `models`: section [models]."""

    LAYERS = ("command line", "environment", "admin page", "file", "generated")

    def __init__(self):
        self.layers: dict[str, dict[str, Any]] = {name: {} for name in self.LAYERS}
        self.models: dict[str, str] = {}
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
        value = SETTING[name].parse(raw, origin)
        if name not in SECRETS or value not in PLACEHOLDERS:
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
        self._read_models(path, document.pop("models", {}))
        for section, values in document.items():
            for key, raw in values.items() if isinstance(values, dict) else [("", None)]:
                self.put("file", f"{section}.{key}", raw, path.name)

    def _read_models(self, path: Path, models: Any) -> None:
        for name, key in models.items() if isinstance(models, dict) else [("", models)]:
            try:
                self.models[name] = key
                key.format(P="", O="", U="", D=0)
            except (AttributeError, LookupError, ValueError):
                words = "a text, with at most {P} {O} {U} {D} in it"
                words = f"{path.name}: [models] {name} can't be {key!r}; allowed: {words}"
                raise SettingError(words) from None

    def read_environment(self, environ: dict[str, str]) -> None:
        names = {"FLOW2API_" + name.replace(".", "_").upper(): name for name in SETTING}
        for variable in filter(lambda name: name.startswith("FLOW2API_"), environ):
            self.put("environment", names.get(variable, variable), environ[variable], variable)

    @property
    def data(self) -> Path:
        return Path(self["server.data_dir"] or self.folder / "data").expanduser().resolve()


# ---- 2. Errors ------------------------------------------------------------------------------

# What a failure does. request: told to the caller, no account is blamed. account: this account
# steps back, another may be tried, nothing was spent. banning: the same, and it counts towards the
# automatic ban. session: the account is disabled. again: nothing was spent, the same may be tried
# once more. final: none of these. unknown: credits may have been spent, never sent again.
ERRORS = {  # code: (HTTP status, what it does)
    code: (status, does)
    for status, does, codes in (
        (400, "request", "invalid_request invalid_image unsupported_parameter tier_required"),
        (400, "request", "mode_not_available content_policy_violation"),
        (401, "request", "invalid_api_key"),
        (404, "request", "not_found model_not_found"),
        (405, "request", "method_not_allowed"),
        (409, "request", "conflict cancelled"),
        (413, "request", "request_too_large"),
        (429, "final", "queue_full"),
        (500, "final", "internal_error"),
        (502, "final", "generation_failed upstream_changed model_unavailable proxy_unavailable"),
        (502, "again", "upstream_error upstream_unreachable"),
        (502, "unknown", "submit_unknown"),
        (503, "again", "upstream_busy"),
        (503, "final", "no_accounts no_credits shutting_down"),
        (503, "account", "account_throttled account_busy account_daily_quota account_no_credits"),
        (503, "account", "captcha_required model_not_for_account"),
        (503, "banning", "account_refused"),
        (503, "session", "account_session_ended"),
        (504, "final", "generation_timeout"),
    )
    for code in codes.split()
}
TYPES = {400: "invalid_request_error", 401: "authentication_error", 429: "rate_limit_error"}
TYPES[500] = "server_error"  # by status, or its hundred

# Google's reason -> code, first pause of the account in seconds, words. The first match counts.
# Reasons are the PUBLIC_ERROR_* of error.details[].reason and of failed media, and failureReasons.
# fmt: off
REASONS = (
    ("USER_REGION|USER_MINOR|APP_UNAVAILABLE", "account_refused", 600,
     "Google refuses Flow to this account (region, age or availability)"),
    ("TOO_MUCH_TRAFFIC|THROTTLED", "account_throttled", 300, "Google is slowing this account down"),
    ("UNUSUAL_ACTIVITY|reCAPTCHA", "captcha_required", 300,
     "Google wants a reCAPTCHA token, and no browser is connected that could give one. Use Flow"
     " once by hand in this account's own browser, or connect the companion extension"),
    ("DAILY_QUOTA", "account_daily_quota", 60, "This model's quota of the day is used up"),
    ("QUOTA_REACHED", "account_no_credits", 600, "The account has no credits left"),
    ("MODEL_ACCESS_DENIED", "model_not_for_account", 0, "The account's plan lacks this model"),
    ("CONCURRENT_LIMIT", "account_busy", 20, "The account has too many clips under way"),
    ("TRAFFIC|OVERLOADED|SOMETHING_WENT|TIMED_OUT", "upstream_busy", 0, "Flow is overloaded"),
    ("NON_ENGLISH", "invalid_request", 0, "Flow wants an English prompt for this"),
    ("IN_PROGRESS|CANNOT_BE_CANCELED", "conflict", 0, "Flow is already at it"),
    ("IMAGE_TOO_|FILE_FORMAT", "invalid_image", 0, "Flow can't take this picture's size or format"),
    ("UNSAFE|SEXUAL|VIOLENCE|DANGER|MINOR|PROMINENT|PHOTOREAL|IP_|FILTER|PROHIBITED|REPUTATION"
     "|_EDIT", "content_policy_violation", 0,
     "Google's content policy refused this prompt or picture; change it and try again"),
)
BY_STATUS = (  # where there is no known reason: HTTP statuses (0: a clip failed later), code, words
    ((0,), "generation_failed", "The generation failed at Google"),
    ((401, 403), "account_refused", "Google refused this account"),
    ((404,), "model_unavailable", "Google does not know this model key or medium; the new key of a"
     " renamed model goes into [models] of setting.toml"),
    ((408, 499), "upstream_error", "Google's side took too long"),
    ((429,), "account_throttled", "Google is slowing this account down"),
    (range(400, 500), "upstream_changed", "Google refused the form of our request"),
    (range(1000), "upstream_error", "Google's side failed"),
)
# fmt: on


class GatewayError(Exception):
    """A failure that a caller is told about: a code of ERRORS and words of its own.
    `param` is the request field at fault, `retry_after` seconds for the header of that name,
    `pause` the seconds an account steps back at first, `upstream` Google's HTTP status if any."""

    def __init__(self, code: str, message: str, *, param=None, retry_after=0, pause=60, upstream=0):
        super().__init__(message)
        self.status, self.does = ERRORS[code]
        self.type = TYPES.get(self.status, TYPES[500 if self.status >= 500 else 400])
        self.code, self.param, self.retry_after = code, param, retry_after
        self.pause, self.upstream = pause, upstream

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


def google_error(status: int, reason: str, message: str = "") -> GatewayError:
    """The error for one of Google's refusals. `status` is its HTTP status, 0 for a clip that was
    accepted and failed later; `reason` as in REASONS; `message` is Google's own text."""
    said = f" (Google: {reason or message or status})"[:300]
    for pattern, code, pause, words in REASONS:
        if re.search(pattern, f"{reason} {message}"):
            return GatewayError(code, words + said, pause=pause, upstream=status)
    _, code, words = next(row for row in BY_STATUS if status in row[0])
    return GatewayError(code, words + said, upstream=status)


# ---- 3. Catalogue ---------------------------------------------------------------------------

# Plans that Google sells, lowest first: the word on the wire, and what people call it.
TIERS = {"PAYGATE_TIER_NOT_PAID": "free", "PAYGATE_TIER_ONE": "Pro", "PAYGATE_TIER_TWO": "Ultra"}
RATIOS = {"landscape": 16 / 9, "portrait": 9 / 16, "square": 1.0, "4-3": 4 / 3, "3-4": 3 / 4}

# Upstream keys (Flow's catalogue of 2026-08-27): family, mode, key, key at 4 and 6 s. {P} is
# "_portrait" or "", {O} the orientation, {U} "_ultra" or "" by the account's tier, {D} the seconds.
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
COSTS = {  # credits of one clip on a free, Pro and Ultra account, by its seconds; None: not there
    "veo_3_1": {8: (100, 100, 100), 4: (None, None, 100), 6: (None, None, 100)},
    "veo_3_1_fast": {8: (20, 20, 10), 4: (None, None, 10), 6: (None, None, 10)},
    "veo_3_1_lite": {8: (10, 10, 5), 4: (None, None, 5), 6: (None, None, 5)},
    "veo_3_1_relaxed": {8: (None, None, 0), 4: (None, None, 0), 6: (None, None, 0)},
    "omni_flash": {4: (7, 7, 7), 6: (10, 10, 10), 8: (12, 12, 12), 10: (15, 15, 15)},
}
UPSCALES = {"": (0, 0, 0), "1080p": (None, 0, 0), "4k": (None, None, 50),
            "2K": (0, 0, 0), "4K": (None, None, 0)}
MODES = {"text": "text to video", "start": "start frame", "frames": "start and end frame",
         "references": "reference pictures", "extend": "extension of a clip",
         "edit": "edit of a clip", "image": "picture"}
# Upstream keys by the names that [models] in setting.toml overrides: pictures by family; clips by
# family and mode, with `_short` for 4 and 6 s. The relaxed family is lite at low priority.
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
RETIRED = {  # prefix -> today's of the same price
    "veo_2_1_fast_d_15_": ("veo_3_1_lite_", "Google retired Veo 2 Fast; this is Veo 3.1 Lite."),
    "veo_2_0_":           ("veo_3_1_", "Google retired Veo 2; this is Veo 3.1."),
    "veo_3_0_r2v_":       ("veo_3_1_r2v_", "Google retired Veo 3.0; this is Veo 3.1."),
}
CONFLICTS = (SHAPES, ("lite", "fast"), ("lite", "relaxed"), LENGTHS, ("1080p", "4k"), SIZES)
# fmt: on


@dataclass(frozen=True)
class Plan:
    """What a request comes to, before an account is chosen.
    kind: "image" or "video". mode: a key of MODES. ratio: a key of RATIOS. seconds: length of a
    clip, 0 for pictures. upscale: a key of UPSCALES. template: see KEYS. costs: credits of one
    output per tier, upscaling included, None where the tier is not served. images: how many input
    pictures it takes, from and to. note: what a caller should know about the id."""

    model: str
    kind: str
    family: str
    mode: str
    ratio: str
    seconds: int
    upscale: str
    template: str
    costs: tuple[int | None, ...]
    images: tuple[int, int]
    note: str = ""

    def cost(self, tier: str) -> int | None:
        """Credits of one output on an account of this tier; None: the tier can't do it."""
        return self.costs[list(TIERS).index(tier) if tier in TIERS else 0]

    def key(self, tier: str) -> str:
        """The upstream model key on an account of this tier."""
        portrait = "_portrait" if self.ratio == "portrait" else ""
        ultra = "_ultra" if tier == "PAYGATE_TIER_TWO" else ""
        return self.template.format(P=portrait, O=self.ratio, U=ultra, D=self.seconds)

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


def resolve(model: str, *, size="", seconds=0, images=0, overrides: dict | None = None) -> Plan:
    """The plan of a model id. `size`: "1280x720", "16:9", "auto" or empty. `seconds`: wanted
    length, 0 for the id's own. `images`: how many input pictures the request brings. `overrides`:
    like KEYS. Raises model_not_found, or invalid_request for what can't be met."""
    head, words = _split(model)
    for group in CONFLICTS:
        if len(both := [word for word in group if word in words]) > 1:
            raise bad(f"{model}: {both[0]} and {both[1]} exclude each other", "model")
    ratio, keys = _ratio(model, head, words, size), KEYS | (overrides or {})
    upscale = next((word for word in UPSCALES if word in words), "")
    if head.family in KEYS:
        costs, limits = UPSCALES[upscale], (0, 3 if head.family == "imagen_4" else 10)
        plan = Plan(model, "image", head.family, "image", ratio, 0, upscale, "", costs, limits)
        return dataclasses.replace(plan, template=keys[head.family], note=head.note)
    variant = next((word for word in ("relaxed", "fast", "lite") if word in words), "")
    family = f"{head.family}_{variant}" if variant else head.family
    mode, limits = _clip_mode("i2v" if "fl" in words else head.mode, family, images)
    length = next((int(word[:-1]) for word in LENGTHS if word in words), seconds or 8)
    if (seconds or length) != length or length not in COSTS[family]:
        can = ", ".join(map(str, COSTS[family]))
        raise bad(f"{model} can't be {seconds or length} s long; {family} can: {can}", "seconds")
    name = f"{family}_{mode}" + ("_short" if length < 8 else "")
    if name not in keys:
        can = ", ".join(MODES[known] for known in MODES if f"{family}_{known}" in KEYS)
        said = f"{model}: {family} has no {MODES[mode]!r} at {length} s; it has {can}"
        raise bad(said, "model", "mode_not_available")
    served = (None, None, 0) if "ultra" in words else (0, 0, 0)
    parts = zip(COSTS[family][length], UPSCALES[upscale], served, strict=True)
    costs = tuple(None if None in part else sum(part) for part in parts)
    plan = Plan(model, "video", family, mode, ratio, length, upscale, keys[name], costs, limits)
    return dataclasses.replace(plan, note=head.note)


def _split(model: str) -> tuple[Head, set[str]]:
    """A model id's head and its parameters, each of which the head takes."""
    name, note = model, ""
    for old, (new, why) in RETIRED.items():
        if model.startswith(old):
            name, note = new + model.removeprefix(old), why
    for start in sorted(HEADS, key=len, reverse=True):
        if name == start or name.startswith(start + "-"):
            tail = re.sub("-four-three|-4-3", "-4:3", name[len(start) :])
            tail = re.sub("-three-four|-3-4", "-3:4", tail)
            return HEADS[start], {_word(model, HEADS[start], word) for word in tail.split("-")[1:]}
    if name in ("omni_portrait", "omni_landscape"):
        return HEADS["omni"], {name.removeprefix("omni_")}
    parts = name.split("_")
    modes = [WIRE_MODES[part] for part in parts[3:] if part in WIRE_MODES]
    if parts[:3] != ["veo", "3", "1"] or len(modes) != 1:
        close = difflib.get_close_matches(model, MODELS, 3, 0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else "GET /v1/models lists them"
        raise bad(f"There is no model {model[:80]!r}; {hint}", "model", "model_not_found")
    if "relaxed" in parts:
        note = "Google retired the relaxed keys; this is Veo 3.1 Lite at low priority."
    head = Head("veo_3_1", (*CLIPS, "s", "ultra"), "landscape", modes[0], note)
    words = {_word(model, head, part) for part in parts[3:] if part not in WIRE_MODES}
    return head, words - {"s", "fl"}


def _word(model: str, head: Head, word: str) -> str:
    """The parameter, in the spelling of the tables."""
    known = {param.lower(): param for param in head.params}
    if param := known.get(word.replace(":", "-").lower()):
        return param
    takes = ", ".join(head.params)
    raise bad(f"{model[:80]}: unknown parameter {word[:40]!r}; it takes {takes}", "model")


def _clip_mode(mode: str, family: str, images: int) -> tuple[str, tuple[int, int]]:
    """The mode for this number of pictures, and how many the id takes."""
    most = 7 if family == "omni_flash" else 3
    if mode == "auto":  # one picture is the start frame, two are start and end, more are references
        return ("text", "start", "frames", "references")[min(images, 3)], (0, most)
    if mode == "i2v":
        return ("frames" if images > 1 else "start"), (1, 2)
    if mode == "references":
        return ("references" if images else "text"), (0, most)
    return mode, (2, 2) if mode == "frames" else (0, 0)


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
    nearest = min(shapes, key=lambda shape: abs(math.log(RATIOS[shape] / wanted)))
    if "square" not in shapes:  # a clip is wide or tall: 1000x999 is wide, 512x512 is neither
        nearest = "landscape" if wanted > 1 else "portrait" if wanted < 1 else named or head.ratio
    elif abs(math.log(RATIOS[nearest] / wanted)) > math.log(1.5):
        raise bad(f"size {size} is far from every shape of {model}: {', '.join(shapes)}", "size")
    own, near = RATIOS[named or nearest], RATIOS[nearest]
    if (own - 1) * (near - 1) < 0 or (own == 1) != (near == 1):
        raise bad(f"size {size} contradicts {named!r} in {model}", "size")
    return named or nearest


# The ids that /v1/models lists; the grammar takes many more.
LISTED = (
    "gemini-{2.5-flash|3.0-pro|3.1-flash}-image-{portrait|landscape}",
    "imagen-4.0-generate-preview-{portrait|landscape}",
    "veo_3_1_t2v_fast_{portrait|landscape}",
    "veo_{2_1_fast_d_15|2_0}_{t2v|i2v}_{portrait|landscape}",
    "veo_3_1_i2v_s_fast_fl_{portrait|landscape}",
    "veo_3_{0|1}_r2v_fast_{portrait|landscape}",
    "veo_3_1{|-portrait|-landscape}{|-fast|-lite|-relaxed}{|-fl}",
    "veo_3_1{|-portrait|-landscape}{|-fast}-{1080p|4k}",
    "omni_flash{|-portrait|-landscape}{|-4s|-6s|-10s}",
    "{nano_banana|nano_banana_2|nano_banana_2_lite|nano_banana_pro|imagen_4}"
    "{|-portrait|-landscape|-square|-4-3|-3-4}",
    "nano_banana_pro{|-portrait|-landscape|-square|-4-3|-3-4}-{2K|4K}",
)


_CHOICES = [[part.split("|") for part in re.split("[{}]", pattern)] for pattern in LISTED]
MODELS = tuple(dict.fromkeys("".join(word) for row in _CHOICES for word in itertools.product(*row)))


# ---- 4. Store -------------------------------------------------------------------------------


class Record:
    """A durable record. FIELDS: names and defaults; COLUMNS are columns of TABLE, the rest is JSON
    in `data`, so that a new field needs no migration. `live` sets what is in memory only."""

    TABLE, COLUMNS = "", ()
    FIELDS: dict[str, Any] = {}

    def __init__(self, **values: Any):
        vars(self).update(json.loads(to_json(self.FIELDS)) | values)
        self.live()

    def row(self) -> dict:
        kept = {name: getattr(self, name) for name in self.FIELDS}
        columns = {name: kept.pop(name) for name in self.COLUMNS}
        return columns | {"data": to_json(kept)}

    @classmethod
    def load(cls, row: sqlite3.Row):
        values = {**json.loads(row["data"]), **{name: row[name] for name in cls.COLUMNS}}
        return cls(**{name: value for name, value in values.items() if name in cls.FIELDS})


def to_json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), default=dataclasses.asdict)


# fmt: off
class Token(Record):
    """One Google account. Times are unix seconds; credits None: not known yet; reason: why it is
    not active, in plain words; failures: account failures in a row; today: counters of `day`."""

    TABLE, COLUMNS = "tokens", ("id", "email")
    FIELDS = {
        "id": 0, "email": "", "name": "", "remark": "", "created_at": 0.0, "proxy_url": "",
        "st": "", "at": "", "at_expires": 0.0, "checked_at": 0.0, "credits": None, "tier": "",
        "project_id": "", "project_name": "", "is_active": True, "reason": "", "failures": 0,
        "image_enabled": True, "image_concurrency": -1, "image_count": 0,
        "video_enabled": True, "video_concurrency": -1, "video_count": 0,
        "last_used_at": 0.0, "use_count": 0, "error_count": 0, "day": "", "today": {},
    }

    def live(self) -> None:
        self.busy, self.reserved, self.lock = collections.Counter(), 0, asyncio.Lock()
        self.paused_until, self.paused_for, self.pause, self.refreshed = 0.0, None, 0.0, 0.0

    def __repr__(self) -> str:  # no secrets in a log line or a traceback
        return f"<token {self.id} {self.email}>"


class Output(Record):
    """One paid output of a job: Google's handle of it (name, project, scene, media), and what
    became of it. state: "pending", "done" or "failed". made: while a clip is upscaled under a new
    name, the handle of the clip it is made from."""

    TABLE, COLUMNS = "outputs", ("job_id", "number", "name")
    FIELDS = {
        "job_id": "", "number": 0, "name": "", "project": "", "scene": "", "media": "",
        "state": "pending", "error": {}, "made": {}, "upscaled": False,
        "url": "", "url_expires": 0.0, "file": "",
    }

    def live(self) -> None:
        self.answers = 0  # status answers so far


class Job(Record):
    """The durable record of one generation. Times are unix seconds, 0: not yet. origin: the API
    that it came through. detached: its client can come back for it. batch: our mark on the
    submit, by which it can be found at Google. inputs: files. error: code and message."""

    TABLE, COLUMNS = "jobs", ("id", "state", "created_at", "token_id")
    FIELDS = {
        "id": "", "state": "queued", "plan": None, "prompt": "", "n": 1, "inputs": [],
        "origin": "", "detached": False, "token_id": None, "project": "", "batch": "",
        "created_at": 0.0, "submitted_at": 0.0, "completed_at": 0.0, "deadline": 0.0,
        "error": {}, "notes": [],
    }

    def live(self) -> None:
        if isinstance(self.plan, dict):  # as JSON keeps it
            lists = {name: tuple(self.plan[name]) for name in ("costs", "images")}
            self.plan = Plan(**self.plan | lists)
        self.outputs: list[Output] = []
        self.shunned: set[int] = set()
        self.stage, self.task, self.changed, self.percent = "", None, asyncio.Event(), 0

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    def done(self) -> list[Output]:
        return [output for output in self.outputs if output.state == "done"]
# fmt: on


ENDED = ("completed", "failed", "cancelled")
MIGRATIONS = (
    """
    CREATE TABLE tokens (id INTEGER PRIMARY KEY, email TEXT NOT NULL UNIQUE, data TEXT NOT NULL);
    CREATE TABLE jobs (id TEXT PRIMARY KEY, state TEXT NOT NULL, created_at REAL NOT NULL,
        token_id INTEGER, data TEXT NOT NULL);
    CREATE INDEX jobs_by_state ON jobs (state);
    CREATE INDEX jobs_by_time ON jobs (created_at);
    CREATE TABLE outputs (job_id TEXT NOT NULL, number INTEGER NOT NULL, name TEXT NOT NULL,
        data TEXT NOT NULL, PRIMARY KEY (job_id, number));
    CREATE TABLE logs (id INTEGER PRIMARY KEY, created_at REAL NOT NULL, job_id TEXT,
        token_id INTEGER, data TEXT NOT NULL);
    CREATE TABLE settings (name TEXT PRIMARY KEY, data TEXT NOT NULL);
    """,
)


class StoreError(Exception):
    """The database can't be used; the text says why."""


class Store:
    """SQLite in WAL mode. One thread writes, in groups: whatever waits while it is busy goes into
    the next transaction. `await put(...)` returns when the records are on the disk."""

    def __init__(self, folder: Path):
        self.path = folder / "flow2api.db"
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._reading = threading.Lock()

    def open(self) -> None:
        """Raises StoreError. Only one process may have a data folder open, since two would run
        the same jobs; a second SQLite file is the lock, which works on every system."""
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = self.path.with_name("lock.db")
        for path in (self.path, lock):
            path.touch(0o600)
        try:
            self._lock = sqlite3.connect(lock, timeout=0, check_same_thread=False)
            self._lock.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as err:
            words = "in use by another Flow2API" if "locked" in str(err) else f"not usable: {err}"
            raise StoreError(f"{self.path.parent} is {words}") from None
        self._reader = self._connect()
        try:
            self._rows("PRAGMA journal_mode=WAL")
            if (found := self._rows("PRAGMA quick_check(1)")[0][0]) != "ok":
                raise sqlite3.DatabaseError(found)
            version = self._rows("PRAGMA user_version")[0][0]
            if version > len(MIGRATIONS):
                raise sqlite3.DatabaseError("made by a newer Flow2API")
            for number, script in enumerate(MIGRATIONS[version:], version + 1):
                self._reader.executescript(f"BEGIN; {script} PRAGMA user_version={number}; COMMIT;")
        except sqlite3.DatabaseError as err:
            self._reader.close()
            self._lock.close()
            raise StoreError(f"{self.path}: {err}; nothing was changed, restore a backup") from None
        self._thread = threading.Thread(target=self._write_forever, name="store", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()
        self._reader.close()
        self._lock.close()

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False, timeout=10)
        db.row_factory = sqlite3.Row
        return db

    def _write_forever(self) -> None:
        db = self._connect()
        db.execute("PRAGMA synchronous=FULL")
        while (batch := self._queue.get()) is not None:
            group = [batch]
            while group[-1] is not None and len(group) < 256 and not self._queue.empty():
                group.append(self._queue.get())
            if group[-1] is None:
                self._queue.put(group.pop())  # the end comes after this group
            error = self._commit(db, [step for steps, _ in group for step in steps])
            for steps, done in group:  # one that is refused takes no other along
                own = self._commit(db, steps) if error and len(group) > 1 else error
                if done.set_running_or_notify_cancel():
                    done.set_exception(own) if own else done.set_result(None)
        db.close()

    def _commit(self, db: sqlite3.Connection, steps: list) -> StoreError | None:
        try:
            db.execute("BEGIN")
            for step in steps:
                db.execute(*step)
            db.execute("COMMIT")
        except (sqlite3.Error, ValueError, OverflowError) as err:
            if db.in_transaction:
                db.execute("ROLLBACK")
            log.error("the database refused a write: %s", err)
            return StoreError(f"the database refused a write: {err}")
        return None

    def _write(self, *steps: tuple[str, tuple]) -> asyncio.Future:
        """Queues the steps; the future is done when they are on disk, and needs no awaiting."""
        done: concurrent.futures.Future = concurrent.futures.Future()
        self._queue.put((steps, done))
        future = asyncio.wrap_future(done)
        future.add_done_callback(lambda f: f.cancelled() or f.exception())
        return future

    def put(self, *records: Record) -> asyncio.Future:
        """Writes the records as they are now, all or none."""
        return self.put_rows(*((record.TABLE, record.row()) for record in records))

    def put_rows(self, *rows: tuple[str, dict]) -> asyncio.Future:
        """Writes (table, row) pairs, all or none."""
        sql = "INSERT OR REPLACE INTO {} ({}) VALUES ({})"
        texts = (sql.format(name, ", ".join(row), ", ".join("?" * len(row))) for name, row in rows)
        return self._write(*zip(texts, (tuple(row.values()) for _, row in rows), strict=True))

    def delete_token(self, token_id: int) -> asyncio.Future:
        return self._write(("DELETE FROM tokens WHERE id = ?", (token_id,)))

    def _rows(self, sql: str, values: tuple = ()) -> list[sqlite3.Row]:
        with self._reading:
            return self._reader.execute(sql, values).fetchall()

    def settings(self) -> dict[str, Any]:
        return {r["name"]: json.loads(r["data"]) for r in self._rows("SELECT * FROM settings")}

    def tokens(self) -> list[Token]:
        return [Token.load(row) for row in self._rows("SELECT * FROM tokens ORDER BY id")]

    def job(self, job_id: str) -> Job | None:
        return next(iter(self._jobs("WHERE id = ?", job_id)), None)

    def open_jobs(self) -> list[Job]:
        return self._jobs("WHERE state NOT IN (?, ?, ?) ORDER BY created_at", *ENDED)

    def completed_jobs(self, limit: int) -> list[Job]:
        """The newest first."""
        return self._jobs("WHERE state = 'completed' ORDER BY created_at DESC LIMIT ?", limit)

    def _jobs(self, where: str, *values: Any) -> list[Job]:
        jobs = [Job.load(row) for row in self._rows(f"SELECT * FROM jobs {where}", values)]
        for job in jobs:
            sql = "SELECT * FROM outputs WHERE job_id = ? ORDER BY number"
            job.outputs = [Output.load(row) for row in self._rows(sql, (job.id,))]
        return jobs


# ---- 5. Upstream ----------------------------------------------------------------------------
# Wire facts: captures of Flow's web client and of public clients, October 2025 ("2025") to August
# 2026 ("2026"). Readers take both generations of replies; builders send today's requests.

SESSION_COOKIE = "__Secure-next-auth.session-token"
# fmt: off
WIRE_RATIOS = {"landscape": "LANDSCAPE", "portrait": "PORTRAIT", "square": "SQUARE",
               "4-3": "LANDSCAPE_FOUR_THREE", "3-4": "PORTRAIT_THREE_FOUR"}
ENDPOINTS = {"text": "Text", "start": "StartImage", "frames": "StartAndEndImage",
             "references": "ReferenceImages", "extend": "ExtendVideo", "edit": "EditVideo"}
# fmt: on


# What Google says of one output. state: "pending", "done" or "failed". media: the name that later
# calls (upscale, download) want. data: the file itself, where the reply carried it.
_UNSAID = ["pending", "", "", "", "", b"", None]
Status = namedtuple("Status", "name state media project scene url data error", defaults=_UNSAID)
# Of a submit or a status call: a list of Status, and the balance (None where it isn't said).
Reply = namedtuple("Reply", "statuses credits", defaults=[None])
# A picture that a client sent: bytes, and the media type by its first bytes.
InputImage = namedtuple("InputImage", "data type")


def clean_session_token(text: str) -> str:
    """The bare token of what people paste: a value, `name=value`, or a whole Cookie header."""
    match = re.search(r"next-auth\.session-token=[\"']?([^;\s\"']+)", text)
    return match[1] if match else text.strip("\"'; \t\r\n")


def client_context(project: str, tier: str = "", captcha: str = "") -> dict:
    context = {"sessionId": f";{int(now() * 1000)}", "projectId": project, "tool": "PINHOLE"}
    context |= {"userPaygateTier": tier} if tier else {}
    given = {"token": captcha, "applicationType": "RECAPTCHA_APPLICATION_TYPE_WEB"}
    return context | ({"recaptchaContext": given} if captcha else {})


def submit_request(job: Job, tier: str, media: list[str], context: dict) -> dict:
    """Body of a submit: an element with a seed of its own for each output."""
    image, prompt = job.plan.kind == "image", {"parts": [{"text": job.prompt}]}
    ratio = f"{job.plan.kind.upper()}_ASPECT_RATIO_{WIRE_RATIOS[job.plan.ratio]}"
    batch: dict[str, Any] = {"batchId": job.batch}
    if image:
        kind, extra = "IMAGE_INPUT_TYPE_REFERENCE", {"useNewMedia": True}
        wanted = {"imageModelName": job.plan.key(tier), "imageAspectRatio": ratio}
        wanted |= {"clientContext": context, "structuredPrompt": prompt}
        wanted["imageInputs"] = [{"name": name, "imageInputType": kind} for name in media]
    else:
        kind, extra = "IMAGE_USAGE_TYPE_ASSET", {"useV2ModelConfig": True}
        wanted = {"videoModelKey": job.plan.key(tier), "aspectRatio": ratio, "metadata": {}}
        wanted["textInput"] = {"structuredPrompt": prompt}
        if job.plan.mode == "references":
            assets = [{"imageUsageType": kind, "mediaId": name} for name in media]
            wanted["referenceImages"] = assets
        else:
            frames = zip(("startImage", "endImage"), media, strict=False)
            wanted |= {name: {"mediaId": medium} for name, medium in frames}
        batch["audioFailurePreference"] = "BLOCK_SILENCED_VIDEOS"
    requests = [wanted | {"seed": seed} for seed in random.sample(range(1, 100_000), job.n)]
    return {"mediaGenerationContext": batch, "clientContext": context, "requests": requests} | extra


def upscale_request(job: Job, output: Output, context: dict) -> dict:
    """Body of flow/upsampleImage, or of video:…UpsampleVideo."""
    size, media = job.plan.upscale, {"mediaId": output.media}
    if job.plan.kind == "image":
        target = f"UPSAMPLE_IMAGE_RESOLUTION_{size}"
        return {**media, "targetResolution": target, "clientContext": context}
    ratio, scene = WIRE_RATIOS[job.plan.ratio], output.scene or str(uuid.uuid4())
    wanted = {"videoModelKey": f"veo_3_1_upsampler_{size}", "videoInput": media}
    wanted |= {"aspectRatio": f"VIDEO_ASPECT_RATIO_{ratio}", "metadata": {"sceneId": scene}}
    wanted |= {"resolution": f"VIDEO_RESOLUTION_{size.upper()}", "seed": random.randrange(99999)}
    return {"clientContext": context, "requests": [wanted], "useV2ModelConfig": True}


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
    for step in path:
        try:
            body = body[step]
        except (KeyError, IndexError, TypeError):
            return default
    return default if body is None else body


def read_state(word: str) -> str:
    word = word.removeprefix("MEDIA_GENERATION_STATUS_")
    if word.startswith(("FAIL", "ERROR", "CANCEL")):
        return "failed"
    return "done" if word.startswith(("SUCCESS", "COMPLETE")) else "pending"


def read_medium(item: dict) -> Status:
    """An element of media[] (2026) in submit, status and listing replies: picture or clip."""
    name, kind = item["name"], "image" if dig(item, "image") else "video"
    status = dig(item, "mediaMetadata", "mediaStatus")
    url = dig(item, kind, f"generated{kind.capitalize()}", "fifeUrl")
    word = dig(status, "mediaGenerationStatus")
    state = read_state(word) if word else "done" if url or kind == "image" else "pending"
    reasons = [dig(status, "error", "message"), *dig(status, "failureReasons", default=[])]
    error = google_error(0, " ".join(reasons).strip()) if state == "failed" else None
    data = base64.b64decode(dig(item, "video", "encodedVideo"))
    return Status(name, state, name, dig(item, "projectId"), "", url, data, error)


def read_operation(item: dict) -> Status:
    """An element of operations[] (2025)."""
    medium, state = dig(item, "operation", "metadata"), read_state(dig(item, "status"))
    media = dig(item, "mediaGenerationId") or dig(medium, "name")
    name = dig(item, "operation", "name") or media or item["operation"]["name"]
    url, data = dig(medium, "video", "fifeUrl"), base64.b64decode(dig(item, "rawBytes"))
    reason = dig(item, "operation", "error", "message")
    error = google_error(0, reason) if state == "failed" else None
    return Status(name, state, media, "", dig(item, "sceneId"), url, data, error)


def read_statuses(body: dict, strict=True) -> Reply:
    """Any reply that lists outputs: media[], operations[], both (mid-2026), or workflows alone. An
    entry of unknown shape raises upstream_changed; if not strict, it is left out."""
    found: dict[str, Status] = {}
    readers = {"media": read_medium, "operations": read_operation}
    readers["workflows"] = lambda f: read_medium(f | {"name": f["metadata"]["primaryMediaId"]})
    for key, read in readers.items():
        items = dig(body, key, default=[]) if key != "workflows" or not found else []
        for item in items if isinstance(items, list) else [items]:
            try:
                status = read(item)
                found.setdefault(status.name, status)
            except (KeyError, TypeError, AttributeError, ValueError) as err:
                if strict:
                    words = f"Google's reply has a shape that is not known here: {err!r}"
                    raise GatewayError("upstream_changed", words) from None
    balance = str(dig(body, "remainingCredits"))
    return Reply(list(found.values()), int(balance) if balance.isdigit() else None)


def read_find(body: dict, batch: str) -> list[Status]:
    """The media in flow.projectInitialData that the submit with this batch id has made."""
    contents = dig(body, "projectContents", default={})
    flows = dig(contents, "workflows", default=[])
    ours = [flow for flow in flows if dig(flow, "metadata", "batchId") == batch]
    names = {dig(flow, "name") for flow in ours}
    media = dig(contents, "media", default=[])
    made = [item for item in media if dig(item, "workflowId") in names]
    return read_statuses({"media": made, "workflows": ours}).statuses


def read_link(url: str) -> tuple[str, float]:
    """A signed URL and the unix second of its end; an hour where it doesn't say (Google: 5 h)."""
    expires = parse_qs(urlsplit(url).query).get("Expires", [""])[0]
    return url, float(expires) if expires.isdigit() else now() + 3600


def why(err: Exception) -> str:
    """What went wrong on the network. Not str(err): that can hold a proxy's password."""
    return str(getattr(err, "os_error", "") or type(err).__name__)


def good_proxy(url: str) -> bool:
    try:
        parts = urlsplit(url)
        schemes = ("http", "https", "socks4", "socks5", "socks5h")
        return parts.scheme in schemes and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


class Wire:
    """Outgoing HTTP: a session per proxy. Submits get a fresh connection each: on a kept one that
    the other side has just closed, it would stay unknown whether the request arrived."""

    def __init__(self, settings: Settings):
        self.settings, self.sessions = settings, {}
        refused = (aiohttp.ClientConnectorError, aiohttp.ClientHttpProxyError, aiohttp.InvalidURL)
        self.not_sent: tuple[type[Exception], ...] = (*refused, aiohttp.ConnectionTimeoutError)

    def request(self, method: str, url: str, *, proxy="", fresh=False, **options):
        """aiohttp's request context manager. proxy: an address, "" for that of the settings."""
        if not proxy and self.settings["proxy.proxy_enabled"]:
            proxy = self.settings["proxy.proxy_url"]
        if proxy and not good_proxy(proxy):
            words = "The proxy address can't be used; it must look like socks5://host:port"
            raise GatewayError("proxy_unavailable", words)
        socks = proxy if proxy.startswith("socks") else ""
        if (socks, fresh) not in self.sessions:
            keep = {"limit": 0, "force_close": fresh}
            connector = self._socks(socks, keep) if socks else aiohttp.TCPConnector(**keep)
            options_once = {"connector": connector, "cookie_jar": aiohttp.DummyCookieJar()}
            self.sessions[socks, fresh] = aiohttp.ClientSession(**options_once)
        options |= {"proxy": proxy} if proxy and not socks else {}
        return self.sessions[socks, fresh].request(method, url, **options)

    def _socks(self, url: str, keep: dict) -> aiohttp.BaseConnector:
        try:
            import aiohttp_socks

            self.not_sent += (aiohttp_socks.ProxyError, aiohttp_socks.ProxyConnectionError)
            return aiohttp_socks.ProxyConnector.from_url(url.replace("socks5h:", "socks5:"), **keep)
        except ImportError:
            words = "A SOCKS proxy is set, and its package is missing: pip install aiohttp-socks"
            raise GatewayError("proxy_unavailable", words) from None

    async def close(self) -> None:
        for session in self.sessions.values():
            await session.close()


class RestFlow:
    """The adapter to labs.google (sessions, projects) and the aisandbox REST API. Every method
    raises GatewayError, whose code says what the failure does (see ERRORS)."""

    STATUS_CHUNK = 256

    def __init__(self, settings: Settings, wire: Wire):
        self.settings, self.wire = settings, wire
        self.authorise: Callable[..., Awaitable[str]]  # the pool sets it: a valid access token
        self.odd: dict[str, float] = {}  # operations that Google does not know, until when

    async def captcha(self, token: Token, project: str, action: str) -> str:
        """A reCAPTCHA token from the user's own browser; "" while none is connected."""
        return ""

    async def _send(self, token: Token, method: str, url: str, *, spends=False, **options):
        """One exchange -> (status, reply, body). `spends`: a lost answer is `submit_unknown`,
        since the request may have been accepted."""
        timeout = aiohttp.ClientTimeout(total=self.settings["flow.timeout"], sock_connect=20)
        options = {"timeout": timeout, "fresh": spends, "proxy": token.proxy_url} | options
        host, code = urlsplit(url).hostname, "upstream_unreachable"
        try:
            async with self.wire.request(method, url, **options) as reply:
                return reply.status, reply, await reply.read()
        except self.wire.not_sent as err:
            words = f"No connection to {host}: {why(err)}"
        except (aiohttp.ClientError, TimeoutError, OSError) as err:
            code = "submit_unknown" if spends else code
            words = f"The connection to {host} broke: {why(err)}"
        raise GatewayError(code, words)

    def _read(self, status: int, raw: bytes, spends=False, wait="") -> dict:
        """The JSON object of a reply; a refusal raises what google_error makes of it. An answer
        to a submit that is neither may hide an acceptance."""
        body = None
        with contextlib.suppress(ValueError):
            body = json.loads(raw)
        if isinstance(body, dict) and status < 300:
            return body
        error = dig(body, "error", default={})
        error = dig(error, "json", default=error)  # tRPC wraps it once more
        reasons = (dig(item, "reason") for item in dig(error, "details", default=[]))
        reason = next(filter(None, reasons), "")
        refused = 400 <= status < 500 and status not in (408, 499)
        if spends and not refused and "PUBLIC_ERROR" not in reason:
            words = f"Google's answer to the submit can't be read (HTTP {status})"
            raise GatewayError("submit_unknown", words)
        if status < 300:
            raise GatewayError("upstream_changed", "Google answered with something else than JSON")
        refusal = google_error(status, reason, str(dig(error, "message")))
        refusal.retry_after = int(wait) if wait.isdigit() else 0
        raise refusal

    async def _labs(self, token: Token, method: str, path: str, **options):
        options["headers"] = {"Cookie": f"{SESSION_COOKIE}={token.st}"}
        url = f"{self.settings['flow.labs_base_url'].rstrip('/')}/{path}"
        return await self._send(token, method, url, **options)

    async def _trpc(self, token: Token, method: str, path: str, **options) -> dict:
        """A tRPC call -> its inner object, whose status can be a refusal under HTTP 200."""
        status, _, raw = await self._labs(token, method, f"trpc/{path}", **options)
        if status == 401:
            raise GatewayError("account_session_ended", "Google refused the session token")
        body = dig(self._read(status, raw), "result", "data", "json", default={})
        if (inner := dig(body, "status", default=200)) != 200:
            raise google_error(int(inner), "", str(dig(body, "statusText")))
        return body

    async def _api(self, token: Token, method: str, path: str, *, spends=False, **options) -> dict:
        """A call with the access token. A 401 comes before any billing: the token is refreshed
        and the call made once more; after a second one the account is signed out."""
        url = f"{self.settings['flow.api_base_url'].rstrip('/')}/{path}"
        stale = ""
        for _ in range(2):
            at = await self.authorise(token, stale)
            options["headers"] = {"Authorization": f"Bearer {at}"}
            status, reply, raw = await self._send(token, method, url, spends=spends, **options)
            if status != 401:
                return self._read(status, raw, spends, reply.headers.get("Retry-After", ""))
            stale = at
        raise GatewayError("account_session_ended", "Google refuses even a fresh access token")

    async def session(self, token: Token) -> dict:
        """GET /auth/session -> email, name, at, at_expires and st (rotated or the same). A dead
        session token is answered with HTTP 200 and {}: account_session_ended."""
        status, reply, raw = await self._labs(token, "GET", "auth/session")
        body = self._read(status, raw)
        if not dig(body, "access_token") or dig(body, "error"):
            words = "Google no longer knows this session token. Sign in to Flow again in your own"
            words += " browser and paste the new one (accounts on flow.google.com have none)"
            raise GatewayError("account_session_ended", words)
        expires, cookie = now() + 3600, reply.cookies.get(SESSION_COOKIE)
        with contextlib.suppress(ValueError, TypeError):
            expires = datetime.datetime.fromisoformat(dig(body, "expires")).timestamp()
        rotated = cookie.value if cookie is not None and len(cookie.value) >= 200 else token.st
        who = {
            "email": dig(body, "user", "email") or token.email,
            "name": dig(body, "user", "name"),
        }
        return who | {"at": body["access_token"], "at_expires": expires, "st": rotated}

    async def credits(self, token: Token) -> dict:
        """GET /credits -> credits and tier. Google leaves a balance of zero out."""
        body = await self._api(token, "GET", "credits")
        with contextlib.suppress(TypeError, ValueError):
            credits = int(dig(body, "credits") or 0)
            return {"credits": credits, "tier": dig(body, "userPaygateTier")}
        raise GatewayError("upstream_changed", "Google tells the balance in an unknown form")

    async def create_project(self, token: Token, title: str) -> str:
        wanted = {"json": {"projectTitle": title, "toolName": "PINHOLE"}}
        body = await self._trpc(token, "POST", "project.createProject", json=wanted)
        if project := dig(body, "result", "projectId"):
            return project
        raise GatewayError("upstream_changed", "Google's answer names no new project")

    async def upload(self, token: Token, project: str, image: InputImage) -> str:
        """POST /flow/uploadImage -> media name. An answer without one is a silent refusal."""
        name = f"flow2api_{int(now() * 1000)}.{image.type.removeprefix('image/')}"
        wanted = {"clientContext": client_context(project), "fileName": name, "isHidden": False}
        wanted |= {"isUserUploaded": True, "mimeType": image.type}
        wanted["imageBytes"] = base64.b64encode(image.data).decode()
        body = await self._api(token, "POST", "flow/uploadImage", json=wanted)
        media = dig(body, "media", default={})
        name = dig(media[0] if isinstance(media, list) and media else media, "name")
        if name := name or dig(body, "mediaGenerationId", "mediaGenerationId"):
            return name
        words = "Google took the picture and dropped it without a reason (a logo or a brand?)"
        raise GatewayError("content_policy_violation", words)

    async def _context(self, token: Token, job: Job) -> dict:
        """clientContext, with a reCAPTCHA token if there is a source. Pictures send no tier."""
        captcha = await self.captcha(token, job.project, f"{job.plan.kind.upper()}_GENERATION")
        tier = token.tier if job.plan.kind == "video" or job.outputs else ""
        return client_context(job.project, tier, captcha)

    async def submit(self, token: Token, job: Job, media: list[str]) -> Reply:
        """Sends all n outputs in one call; `media` are uploaded pictures. May be submit_unknown."""
        path = f"projects/{job.project}/flowMedia:batchGenerateImages"
        if job.plan.kind == "video":
            path = "video:batchAsyncGenerateVideo" + ENDPOINTS[job.plan.mode]
        wanted = submit_request(job, token.tier, media, await self._context(token, job))
        body = await self._api(token, "POST", path, spends=True, json=wanted)
        try:
            reply = read_statuses(body)
        except GatewayError as err:
            raise GatewayError("submit_unknown", str(err)) from None
        if not reply.statuses:
            raise GatewayError("submit_unknown", "Google answered the submit with nothing")
        return reply

    async def find(self, token: Token, job: Job) -> list[Status]:
        """What a submit whose answer was lost has made, by its batch id. Costs nothing."""
        query = quote(to_json({"json": {"projectId": job.project}}))
        body = await self._trpc(token, "GET", f"flow.projectInitialData?input={query}")
        return read_find(body, job.batch)

    async def poll(self, token: Token, outputs: list[Output]) -> Reply:
        """Status of many outputs: one call, as a rule (one per 256 and per generation)."""
        found, credits, refusals = [], None, itertools.count()
        for form in (True, False):
            ours = [output for output in outputs if by_media(output) is form]
            for start in range(0, len(ours), self.STATUS_CHUNK):
                chunk = ours[start : start + self.STATUS_CHUNK]
                reply = await self._poll_chunk(token, chunk, refusals)
                found += reply.statuses
                credits = credits if reply.credits is None else reply.credits
        return Reply(found, credits)

    async def _poll_chunk(self, token: Token, outputs: list[Output], refusals) -> Reply:
        """Google refuses a whole call for one bad name: halving finds it, the rest gets through,
        and it is left out for a minute. Not that often in one poll: then all of it is refused."""
        outputs = [output for output in outputs if self.odd.get(output.name, 0) < now()]
        path = "video:batchCheckAsyncVideoGenerationStatus"
        try:
            if not outputs:
                return Reply([])
            body = await self._api(token, "POST", path, json=status_request(outputs))
            return read_statuses(body, strict=False)
        except GatewayError as err:
            if err.upstream not in (400, 404) or next(refusals) > 20:
                raise
        if len(outputs) == 1:
            self.odd[outputs[0].name] = now() + 60
            return Reply([])
        first = await self._poll_chunk(token, outputs[: len(outputs) // 2], refusals)
        second = await self._poll_chunk(token, outputs[len(outputs) // 2 :], refusals)
        return Reply(first.statuses + second.statuses, second.credits)

    async def upscale(self, token: Token, job: Job, output: Output) -> Status:
        """The second step. A larger picture comes at once, as data, and costs nothing. A clip is
        polled under a name that follows from the first: so a lost answer is no loss, nor is
        "already under way"."""
        wanted = upscale_request(job, output, await self._context(token, job))
        if job.plan.kind == "image":
            body = await self._api(token, "POST", "flow/upsampleImage", json=wanted)
            data = await asyncio.to_thread(base64.b64decode, dig(body, "encodedImage"))
            if not data:
                raise GatewayError("upstream_changed", "Google sent no larger picture")
            return Status(output.name, "done", output.media, data=data)
        path = "video:batchAsyncGenerateVideoUpsampleVideo"
        try:
            body = await self._api(token, "POST", path, spends=True, json=wanted)
        except GatewayError as err:
            if err.code not in ("conflict", "submit_unknown"):
                raise
            body = {}
        found = read_statuses(body, strict=False).statuses
        return found[0] if found else self.upscaled(output)

    def upscaled(self, output: Output) -> Status:
        name = output.media + "_upsampled"
        return Status(name, media=name, project=output.project)

    async def resolve(self, token: Token, output: Output) -> tuple[str, float]:
        """A fresh URL of a finished output and its end: media.getMediaUrlRedirect redirects."""
        name = quote(output.media or output.name, safe="")
        path = f"trpc/media.getMediaUrlRedirect?name={name}&mediaUrlType=MEDIA_URL_TYPE_FULL_MEDIA"
        status, reply, raw = await self._labs(token, "GET", path, allow_redirects=False)
        if 300 <= status < 400 and "Location" in reply.headers:
            return read_link(reply.headers["Location"])
        self._read(status, raw)
        raise GatewayError("upstream_changed", "Google gave no download address")

    async def cancel(self, token: Token, output: Output) -> None:
        """Asks Google to stop. Raises conflict where it is too late."""
        wanted = {"mediaId": output.media or output.name}
        await self._api(token, "POST", "flowMedia:cancelGeneration", json=wanted)


# ---- 6. Pool --------------------------------------------------------------------------------


class Pool:
    """The accounts: in memory, written on change. Nothing else changes a token. A lease is the
    right to use a token for one job: a slot of its kind, and credits reserved until it is sent."""

    EARLY = 600.0  # seconds before its end at which an access token is renewed

    def __init__(self, settings: Settings, store: Store, upstream: RestFlow):
        self.settings, self.store, self.upstream = settings, store, upstream
        upstream.authorise = self.access_token
        self.tokens = {token.id: token for token in store.tokens()}
        self.leases: dict[str, tuple[Token, int]] = {}  # job id -> token, credits reserved
        self.waiting: dict[asyncio.Future, tuple[Job, set[int]]] = {}
        self._alarm: asyncio.TimerHandle | None = None

    async def add(self, st: str, **fields: Any) -> tuple[Token, bool]:
        """Adds the account that a session token belongs to, or updates it -> (token, is it new).
        Raises account_session_ended for a dead one."""
        proxy = fields.get("proxy_url", "")
        draft = Token(st=clean_session_token(st), proxy_url=proxy, created_at=now())
        session = await self.upstream.session(draft)
        if not session["email"]:
            raise GatewayError("upstream_changed", "Google's session names no e-mail address")
        known = [token for token in self.tokens.values() if token.email == session["email"]]
        token = known[0] if known else draft
        if not known:
            token.id = max(self.tokens, default=0) + 1
            self.tokens[token.id] = token
        fields |= session | {"is_active": True, "reason": "", "failures": 0, "paused_until": 0.0}
        await self.update(token, **fields)
        try:
            await self.check(token)
            await self.project(token)
        except GatewayError as err:
            log.warning("%s is in the pool, but: %s", token.email, err)
        return token, not known

    async def update(self, token: Token, **fields: Any) -> None:
        for name, value in fields.items():
            setattr(token, name, value)
        if self.tokens.get(token.id) is token:  # else it has been deleted meanwhile
            await self.store.put(token)
        self.wake()

    async def remove(self, token: Token) -> None:
        if token.busy.total():
            words = f"{token.email} has jobs under way: disable it now and delete it afterwards"
            raise bad(words, code="conflict")
        del self.tokens[token.id]
        await self.store.delete_token(token.id)

    async def access_token(self, token: Token, stale: str = "") -> str:
        """A valid access token; `stale` is one that Google refused. One refresh serves all who
        wait for it, and one that fails for the network leaves the token as it was."""
        async with token.lock:
            ends = token.at_expires - now() < self.EARLY / 2 and now() - token.refreshed > 60
            if not token.at or token.at == stale or ends:
                token.refreshed, good = now(), token.at != stale and token.at_expires > now()
                try:
                    await self.update(token, **await self.upstream.session(token))
                except GatewayError as err:
                    if err.does == "session" or not token.at or not good:
                        raise
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
            await asyncio.gather(*map(self._check_if_due, list(self.tokens.values())))
            await asyncio.sleep(30)

    async def _check_if_due(self, token: Token) -> None:
        interval = self.settings["token_refresh.interval"]
        rest = 60 if token.at_expires - now() < self.EARLY else interval
        if not token.is_active or now() - token.checked_at <= rest:
            return
        try:
            await self.check(token)
        except GatewayError as err:
            log.warning("check of %s: %s", token.email, err)
            token.checked_at = now() - interval + 60
            if err.does == "session":
                self.blame(token, err)

    def praise(self, token: Token, kind: str, outputs: int) -> None:
        """A generation went well."""
        token.failures, token.paused_for = 0, None
        setattr(token, f"{kind}_count", getattr(token, f"{kind}_count") + outputs)
        self._count(token, kind, outputs)

    def blame(self, token: Token, err: GatewayError) -> None:
        """What a failure does to the account (see ERRORS): it steps back, each time in a row for
        twice as long, and is disabled when its session is dead or its failures are too many."""
        token.error_count += 1
        if now() >= token.paused_until:  # else it is one burst: several jobs met the same refusal
            again = token.paused_for is not None and token.paused_for.code == err.code
            token.pause = max(token.pause * 2 if again else err.pause, err.retry_after)
            length = min(token.pause, 3600) * random.uniform(0.9, 1.1)
            token.paused_until, token.paused_for = now() + length, err
            token.failures += err.does == "banning"
        if err.code == "account_no_credits":
            token.credits = 0
        if err.does == "session" or token.failures >= self.settings["admin.error_ban_threshold"]:
            token.is_active, token.reason = False, str(err)
            log.warning("%s is disabled: %s", token.email, err)
        self._count(token, "error", 1)
        self.wake()

    def _count(self, token: Token, what: str, number: int) -> None:
        """Counts for today; a new day drops all of yesterday's counters at once."""
        if token.day != (day := datetime.date.today().isoformat()):
            token.day, token.today = day, {}
        token.today[what] = token.today.get(what, 0) + number
        if self.tokens.get(token.id) is token:
            self.store.put(token)

    def able(self, plan: Plan, n: int, tried: Iterable[int] = ()) -> list[Token]:
        """The tokens that can serve a plan, free or not. Raises with the reason when there are
        none, or when all of them have stepped back for more than a minute."""

        def affords(token: Token) -> bool:
            cost = (plan.cost(token.tier) or 0) * n
            return not cost or token.credits is None or cost <= token.credits - token.reserved

        kinds = {"image": "pictures", "video": "clips"}[plan.kind]
        tiers = " or ".join(plan.prices())
        rest = [token for token in self.tokens.values() if token.id not in tried]
        none = "There is no Google account yet: add one on the admin page, or POST /api/tokens"
        enabled, needs = f"{plan.kind}_enabled", f"{plan.model} needs a Google account with {tiers}"
        for code, words, fits in (
            ("no_accounts", none, lambda t: True),
            ("no_accounts", "All accounts are disabled", lambda t: t.is_active),
            ("no_accounts", f"No account makes {kinds}", lambda t: getattr(t, enabled)),
            ("tier_required", needs, lambda t: plan.cost(t.tier) is not None),
            ("no_credits", f"No account has credits left for {n} x {plan.model}", affords),
        ):
            left = [token for token in rest if fits(token)]
            if not left:
                reasons = {token.reason for token in rest if token.reason and not token.is_active}
                raise GatewayError(code, "; ".join([words, *sorted(reasons)]))
            rest = left
        soonest = min(rest, key=lambda token: token.paused_until)
        if (wait := int(soonest.paused_until - now())) > 60 and (err := soonest.paused_for):
            raise GatewayError(err.code, f"{err}; tried again in {wait} s", retry_after=wait)
        return rest

    def _free(self, job: Job, tried: Iterable[int]) -> Token | None:
        """Of those that can take the job now: fewest leases first, then most credits."""
        free, kind = [], job.plan.kind
        for token in self.able(job.plan, job.n, tried):
            limit = getattr(token, f"{kind}_concurrency")
            if token.paused_until <= now() and (limit < 1 or token.busy[kind] < limit):
                credits = token.reserved - (token.credits or 0)
                load = (token.id in job.shunned, token.busy.total(), credits)
                free.append((load, token.last_used_at, token.id, token))
        return min(free)[-1] if free else None

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
        for turn, (job, tried) in list(self.waiting.items()):
            try:
                if not turn.done() and (token := self._free(job, tried)):
                    self.take(token, job)
                    turn.set_result(token)
            except GatewayError as err:
                turn.set_exception(err)
            if turn.done():
                self.waiting.pop(turn, None)
        if self._alarm:
            self._alarm.cancel()
        loop = asyncio.get_running_loop()
        self._alarm = loop.call_later(1, self.wake) if self.waiting else None


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
    """aiohttp's socket factory for users' URLs. It sees the address that is really connected to,
    whatever name, number or redirect led there."""
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

    async def download(self, url: str, proxy: str = "") -> str:
        """Fetches a finished output -> its name here. Raises upstream_error."""
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=20, sock_read=60)
        try:
            async with self.wire.request("GET", url, proxy=proxy, timeout=timeout) as reply:
                reply.raise_for_status()
                return await self.keep(reply.content.iter_chunked(1 << 18))
        except (aiohttp.ClientError, TimeoutError, OSError) as err:
            words = f"The download failed: {getattr(err, 'status', '') or why(err)}"
            raise GatewayError("upstream_error", words) from None

    async def keep(self, chunks: AsyncIterator[bytes]) -> str:
        """Writes a file -> a name that nobody can guess. What bears such a name is whole."""
        part, start = self.kept / f"{secrets.token_urlsafe(24)}.part", b""
        file = await asyncio.to_thread(part.open, "wb")
        try:
            async for chunk in chunks:
                start = start or chunk[:16]
                await asyncio.to_thread(file.write, chunk)
            await asyncio.to_thread(lambda: (file.flush(), os.fsync(file.fileno())))
            return part.rename(part.with_suffix(f".{sniff(start)[1]}")).name
        finally:
            file.close()
            part.unlink(missing_ok=True)

    async def expire_forever(self) -> None:
        """Removes kept files older than `cache.timeout`."""
        while True:
            lifetime = self.settings["cache.timeout"] or math.inf
            for path in await asyncio.to_thread(lambda: list(self.kept.iterdir())):
                longest = min(lifetime, 86400) if path.suffix == ".part" else lifetime
                with contextlib.suppress(FileNotFoundError):  # somebody else has removed it
                    if path.stat().st_mtime < now() - longest:
                        path.unlink()
            await asyncio.sleep(min(60, max(1, lifetime / 4)))

    def save_inputs(self, job_id: str, images: list[InputImage]) -> list[str]:
        names = [f"{job_id}_{number}" for number in range(len(images))]
        for name, image in zip(names, images, strict=True):
            (self.inputs / name).write_bytes(image.data)
        return names

    def drop_inputs(self, names: Iterable[str]) -> None:
        for name in names:
            (self.inputs / name).unlink(missing_ok=True)

    async def input_image(self, value: Any, param: str) -> InputImage:
        """A picture from a URL, a data URL, base64 or bytes. Raises what `bad` makes of it."""
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
        return InputImage(data, sniff(data)[0])

    async def _fetch(self, url: str, limit: int) -> bytes:
        """A user's URL: public addresses only (each redirect too), no proxy, 20 s, `limit`."""
        factory = None if self.settings["server.allow_private_urls"] else public_socket
        connector = aiohttp.TCPConnector(socket_factory=factory, force_close=True)
        options = {"connector": connector, "timeout": aiohttp.ClientTimeout(total=20)}
        words = "it redirects too often"
        try:
            async with aiohttp.ClientSession(**options) as session:
                for _ in range(4):
                    async with session.get(url, allow_redirects=False) as reply:
                        data = bytearray()
                        async for chunk in reply.content.iter_chunked(1 << 16):
                            data += chunk
                            if len(data) > limit:
                                break
                        if reply.status == 200:
                            return bytes(data)
                        words = f"it answered {reply.status}"
                        url = urljoin(url, reply.headers.get("Location", ""))
        except (aiohttp.ClientError, TimeoutError, OSError) as err:
            words = why(err)
        raise bad(f"The picture's URL can't be fetched: {words}", code="invalid_image")


# ---- 8. Jobs --------------------------------------------------------------------------------

STEPS = {  # state -> the states that may follow; anything else is a bug and raises
    "queued": ("submitting", "failed", "cancelled"),
    "submitting": ("queued", "running", "unknown"),
    "unknown": ("running", "failed"),
    "running": ("settling", "failed"),
    "settling": ("completed",),
}


# One validated request of a client: a Plan, the prompt, how many outputs, the input pictures, and
# what the client should be told. Nothing has been spent yet.
Generation = namedtuple("Generation", "plan prompt n images notes", defaults=[1, [], []])


class Jobs:
    """Takes jobs from acceptance to their end, over restarts; the only writer of job state."""

    LOOKS = (1, 4, 10, 20, 40, 60)  # seconds between looks for a submit of unknown outcome
    TRIES = 3  # of what costs nothing

    def __init__(self, store: Store, pool: Pool, media: Media):
        self.settings, self.upstream = pool.settings, pool.upstream
        self.store, self.pool, self.media = store, pool, media
        self.open: dict[str, Job] = {}
        self.durations = collections.defaultdict(lambda: collections.deque(maxlen=25))
        self._poll_after: dict[int, tuple[float, float]] = {}  # token id -> time, back-off
        for job in reversed(store.completed_jobs(500)):
            self._learn(job)

    async def create(self, generation: Generation, origin: str, detached=False) -> Job:
        """Once it returns, the job is on disk and under way. Raises like `able`, or queue_full."""
        plan, n = generation.plan, generation.n
        self.pool.able(plan, n)
        if len(self.pool.waiting) >= (limit := self.settings["limits.queue"]):
            raise GatewayError("queue_full", f"{limit} jobs are waiting already", retry_after=30)
        given = {"prompt": generation.prompt, "notes": [*generation.notes], "created_at": now()}
        job = Job(plan=plan, n=n, origin=origin, detached=detached, **given)
        job.id = f"{plan.kind}_{secrets.token_hex(12)}"
        job.deadline = now() + self.settings[f"generation.{plan.kind}_timeout"]
        job.inputs = await asyncio.to_thread(self.media.save_inputs, job.id, generation.images)
        try:
            await self.store.put(job)
        except asyncio.CancelledError:  # the client left in this very moment
            job.detached = False  # it never learnt the id
            job.task = asyncio.create_task(self.abandon(job))
            raise
        self._start(job)
        return job

    async def get(self, job_id: str) -> Job | None:
        return self.open.get(job_id) or await asyncio.to_thread(self.store.job, job_id)

    async def watch(self, job: Job, every: float) -> AsyncIterator[None]:
        """Yields at once, at each change and each `every` seconds, until the job moves no more."""
        while True:
            changed = job.changed
            yield
            if job.ended or job.task.done():
                return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), every)

    async def abandon(self, job: Job) -> None:
        """Its client is gone: a job that has not been sent is cancelled, any other runs on."""
        if job.state == "queued" and not job.detached:
            if job.id in self.open:
                job.task.cancel()
            gone = GatewayError("cancelled", "The client left before anything was sent or spent")
            await self._step(job, "cancelled", error=gone.record())

    def progress(self, job: Job) -> tuple[int, int] | None:
        """(percent, number of earlier jobs behind it): elapsed time against their median, since
        Flow tells no progress. None without any."""
        known = self.durations[_family(job.plan)]
        if not known or not job.submitted_at:
            return None
        share = (now() - job.submitted_at) / max(sorted(known)[len(known) // 2], 1)
        job.percent = max(job.percent, min(99, int(share * 100)))  # it never goes back
        return job.percent, len(known)

    async def link(self, job: Job, output: Output) -> str:
        """A live URL at Google of a finished output, asked for anew where the old one has ended."""
        token = self.pool.tokens.get(job.token_id)
        if token and output.url_expires < now() + 60:
            output.url, output.url_expires = await self.upstream.resolve(token, output)
            await self.store.put(output)
        return output.url

    async def resume(self) -> None:
        """At start: goes on with what was under way. A submit that may have left is unknown."""
        jobs = self.store.open_jobs()
        known = {name for job in jobs for name in job.inputs}
        self.media.drop_inputs({path.name for path in self.media.inputs.iterdir()} - known)
        for job in jobs:
            if job.state == "queued":
                await self.abandon(job)
            if job.state == "submitting":
                await self._step(job, "unknown")
            if job.state not in ("queued", "cancelled") and job.token_id in self.pool.tokens:
                self.pool.take(self.pool.tokens[job.token_id], job)
                self.pool.spent(job)
            if not job.ended:
                job.deadline = max(job.deadline, now() + 300)  # Google has its say first
                self._start(job)

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
            self.pool.release(job)
        self._tell(job)

    async def _step(self, job: Job, state: str, *records: Record, **changes: Any) -> None:
        """The one place that changes a job's state; returns when that is on disk."""
        if state not in STEPS.get(job.state, ()):
            raise AssertionError(f"{job.id}: {job.state} -> {state}")
        job.state = state
        for name, value in changes.items():
            setattr(job, name, value)
        await self.store.put(job, *records)
        if job.ended:
            self._close(job)
        self._tell(job)

    def _close(self, job: Job) -> None:
        self.open.pop(job.id, None)
        self.pool.release(job)
        self.media.drop_inputs(job.inputs)
        if job.state == "completed":
            self._learn(job)
            if token := self.pool.tokens.get(job.token_id):
                self.pool.praise(token, job.plan.kind, len(job.done()))
        message = job.error.get("message", "")
        log.info("%s %s %s", job.id, job.state, message)
        entry = {"operation": f"generate_{job.plan.kind}", "model": job.plan.model}
        status = GatewayError(**job.error).status if job.error else 200
        duration = round(now() - job.created_at, 3)
        entry |= {"error": message, "status_code": status, "duration": duration}
        row = {"created_at": now(), "job_id": job.id, "token_id": job.token_id}
        self.store.put_rows(("logs", row | {"data": to_json(entry)}))

    def _tell(self, job: Job, stage="") -> None:
        """Wakes whoever watches the job; `stage` says in words what it is at."""
        job.stage = stage
        job.changed.set()
        job.changed = asyncio.Event()

    def _learn(self, job: Job) -> None:
        if job.completed_at and job.submitted_at:
            self.durations[_family(job.plan)].append(job.completed_at - job.submitted_at)

    async def _submit(self, job: Job) -> None:
        """Leases one token after the other until one takes the job. Ends in running or unknown,
        or raises; whatever raises here has spent nothing."""
        tried: set[int] = set()
        last: GatewayError | None = None
        for attempt in itertools.count(1):
            self._tell(job, "Waiting for an account")
            try:
                async with asyncio.timeout(job.deadline - now()):  # wait_for loses a cancel
                    token = await self.pool.lease(job, tried)
            except TimeoutError:
                words = "No account became free in time"
                raise GatewayError("queue_full", words, retry_after=60) from None
            except GatewayError as err:
                raise last or err from None  # what the last account said is the better reason
            try:
                return await self._submit_on(job, token)
            except GatewayError as err:
                last = err
            if last.does == "unknown":
                log.warning("%s: %s; looking for it at Google", job.id, last)
                return await self._step(job, "unknown")
            self.pool.release(job)
            if job.state == "submitting":
                await self._step(job, "queued", submitted_at=0.0)
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
        project = await self.pool.project(token)
        media = []
        for name in job.inputs:
            self._tell(job, f"Uploading picture {len(media) + 1} of {len(job.inputs)}")
            data = await asyncio.to_thread((self.media.inputs / name).read_bytes)
            image = InputImage(data, sniff(data)[0])
            media.append(await self.upstream.upload(token, project, image))
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
        await self._step(job, "running", *job.outputs, deadline=deadline)
        self.media.drop_inputs(job.inputs)

    async def _look_for(self, job: Job) -> None:
        """A submit whose answer was lost is never sent again: Google is asked what it made."""
        token, found, looks = self.pool.tokens.get(job.token_id), [], 0
        pauses = itertools.chain(self.LOOKS, itertools.repeat(self.LOOKS[-1]))
        until = now() + self.settings["generation.video_timeout"]
        for pause in pauses if token else ():
            self._tell(job, "The answer of Flow was lost; looking for what it has made")
            await asyncio.sleep(pause)
            try:
                found, looks = await self.upstream.find(token, job) or found, looks + 1
            except GatewayError as err:
                log.warning("%s: %s", job.id, err)
            if len(found) >= job.n or looks == len(self.LOOKS) or now() > until:
                break
        if not found:
            words = "The answer to the submit was lost, and Flow lists nothing made by it. Credits"
            words += f" may have been spent: look at project {job.project} in Flow first"
            raise GatewayError("submit_unknown", words)
        await self._accepted(job, Reply(found))

    async def poll_forever(self) -> None:
        """One tick each `poll_interval`: one status call per account that has clips under way."""
        polls: dict[int, asyncio.Task] = {}  # a slow account holds up no other
        while True:
            await asyncio.sleep(self.settings["flow.poll_interval"])
            pending: dict[int, list] = {}
            for poll in [poll for poll in polls.values() if poll.done() and poll.exception()]:
                log.error("a status call went wrong here", exc_info=poll.exception())
            polls = {i: poll for i, poll in polls.items() if not poll.done()}
            for job in self.open.values():
                token = self.pool.tokens.get(job.token_id)
                due = token and self._poll_after.get(token.id, (0, 0))[0] <= now()
                if due and token.id not in polls:
                    ours = [(job, output) for output in job.outputs if output.state == "pending"]
                    pending.setdefault(token.id, []).extend(ours)
            for i, ours in pending.items():
                if ours:
                    polls[i] = asyncio.create_task(self._poll(self.pool.tokens[i], ours))

    async def _poll(self, token: Token, pending: list[tuple[Job, Output]]) -> None:
        """A status call that fails says nothing of the clips; it is made again, ever less often."""
        try:
            reply = await self.upstream.poll(token, [output for _, output in pending])
        except GatewayError as err:
            log.warning("status call for %s: %s", token.email, err)
            last = self._poll_after.get(token.id, (0, 0))[1]
            pause = max(self.settings["flow.poll_interval"], last)
            self._poll_after[token.id] = now() + pause, min(60, 2 * pause)
            if err.does == "session" and token.is_active:
                self.pool.blame(token, err)
            return
        self._poll_after.pop(token.id, None)
        if reply.credits is not None:
            await self.pool.update(token, credits=reply.credits)
        statuses = {status.name: status for status in reply.statuses}
        most = self.settings["flow.max_poll_attempts"]
        for job, output in pending:
            if status := statuses.get(output.name):
                output.answers += 1
                await self._take(output, status)
                if output.state != "pending":
                    await self.store.put(output)
                if output.state != "pending" or output.answers >= most:
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
        timeout = f"generation.{job.plan.kind}_timeout"
        most = self.settings["flow.max_poll_attempts"]
        while pending := [output for output in outputs if output.state == "pending"]:
            late = [output for output in pending if now() >= deadline or output.answers >= most]
            for output in late:
                words = f"Flow was not done in {self.settings[timeout]} s ({timeout}) or {most}"
                words += " status calls (flow.max_poll_attempts). It may still appear there, in"
                words += f" project {output.project} as {output.media or output.name}"
                output.error = GatewayError("generation_timeout", words).record()
                output.state = "failed"
            await self.store.put(*late)
            with contextlib.suppress(TimeoutError):
                if not late:
                    await asyncio.wait_for(job.changed.wait(), max(0.01, deadline - now()))

    async def _settle(self, job: Job, output: Output) -> None:
        """Upscales, finds the URL, fills the cache. The output is paid for: what goes wrong here
        is noted on the job and never fails it."""
        token = self.pool.tokens.get(job.token_id)
        if token and job.plan.upscale and not output.upscaled:
            await self._upscale(job, token, output)
        try:
            if not self.media.path(output.file):
                await self._patiently(self._fetch, job, output)
        except GatewayError as err:
            job.notes.append(f"The file can't be fetched now ({err}); it is kept at Flow.")
        await self.store.put(output)

    async def _fetch(self, job: Job, output: Output) -> None:
        """Finds the live URL; with the cache on, brings the file here."""
        url, token = await self.link(job, output), self.pool.tokens.get(job.token_id)
        if url and self.settings["cache.enabled"]:
            self._tell(job, "Fetching the file")
            try:
                output.file = await self.media.download(url, token.proxy_url if token else "")
            except GatewayError:
                output.url_expires = 0.0  # the next try asks for a new URL
                raise

    async def _upscale(self, job: Job, token: Token, output: Output) -> None:
        """The second step: its result takes the place of the output, its failure leaves that as it
        was. What is sent is on disk first, so a restart polls for it and never sends it again."""
        names = ("name", "media", "url", "url_expires")
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
            output.name, output.url, output.url_expires, output.answers = status.name, "", 0.0, 0
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


def _family(plan: Plan) -> str:
    return f"{plan.family} {plan.mode} {plan.seconds} {plan.upscale}"


# ---- 9. Reading requests --------------------------------------------------------------------

# Prompts that chat clients send on their own, to the same model: where, pattern, answer; %s is a
# title. (Open WebUI; NextChat; Chatbox; LobeHub; Cherry Studio.)
# fmt: off
SIDE_PROMPTS = (
    ("user", r"^### Task:[\s\S]*follow[_ -]?ups?[\s\S]*<chat_history>", '{"follow_ups": []}'),
    ("user", r"^### Task:[\s\S]*\btags?\b[\s\S]*<chat_history>", '{"tags": []}'),
    ("user", r"^### Task:[\s\S]*\btitle\b[\s\S]*<chat_history>", '{"title": "%s"}'),
    ("user", r"^### Task:[\s\S]*<chat_history>", "%s"),
    ("user", r"four to five word title|Summarize the discussion briefly in 200 words", "%s"),
    ("user", r"[Bb]ased on the chat history, give this conversation a name", "%s"),
    ("system", r"professional conversation summarizer|user's conversation into a title", "%s"),
)
# fmt: on
EDIT_WORDS = re.compile(
    r"(?i)\b(it|its|this|that|these|same|again|edit|change|make|add|remove|delete|replace|turn|swap"
    r"|keep|without|instead|more|less|bigger|smaller|darker|brighter|colou?r|background|zoom|crop"
    r"|fix)\b|[改换变加减去删除修调把它这再更]|背景|颜色"
)
SORA_ONLY = ("video", "character_options", "remix_target_id", "style_id")


# A chat request: what to generate, or the text that answers a client's own prompt. images: pictures
# go into message.images, as clients with `modalities` want them.
Chat = namedtuple("Chat", "model stream usage images text generation")


async def read_json(request: web.Request) -> dict:
    """The JSON object in a request. Raises invalid_request."""
    try:
        raw = await request.read()
        body = json.loads(raw)
        if re.search(rb"\\u[dD][89a-fA-F]", raw):  # half a surrogate pair is no text
            body = json.loads(json.dumps(body, ensure_ascii=False).encode(errors="replace"))
    except (ValueError, RecursionError) as err:
        raise bad(f"The body is not JSON: {str(err)[:120]}") from None
    if not isinstance(body, dict):
        raise bad("The body must be a JSON object")
    return body


async def read_chat(body: dict, media: Media) -> Chat:
    """POST /v1/chat/completions. The prompt is the text of the user's last turn; system messages
    and earlier turns are not part of it."""
    settings, model, messages = media.settings, body.get("model"), body.get("messages")
    for name in filter(body.get, SORA_ONLY):
        words = f"{name} belongs to Sora, and Flow has nothing like it"
        raise bad(words, name, "unsupported_parameter")
    if not isinstance(model, str) or not 0 < len(model) <= 200:
        raise bad("model is missing, or not one; GET /v1/models lists what there is", "model")
    if not isinstance(messages, list) or not messages:
        raise bad("messages must be a list of at least one message", "messages")
    turns = [_read_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    users = [turn for turn in turns if turn[0] == "user"]
    if not users:
        raise bad("messages holds no message of the user", "messages")
    _, prompt, links = users[-1]
    system = "\n".join(text for role, text, _ in turns if role in ("system", "developer"))
    stream, usage = body.get("stream") is True, bool(dig(body, "stream_options", "include_usage"))
    inline = isinstance(kinds := body.get("modalities"), list) and "image" in kinds
    chat = Chat(model, stream, usage, inline, "", None)
    if settings["chat.answer_side_prompts"] and (text := side_answer(prompt, system)):
        return chat._replace(text=text)
    if not prompt.strip():
        raise bad("The user's last message holds no text: there is no prompt", "messages")
    links = links or ([body["image"]] if body.get("image") else [])
    n, size = read_count(body), body.get("size") or body.get("aspect_ratio") or ""
    plan = resolve(model, size=size, images=len(links), overrides=settings.models)
    notes = check_images(plan, len(links))
    wanted = [media.input_image(link, "messages") for link in links if not notes]
    images = await asyncio.gather(*wanted)
    if plan.kind == "image" and not images and settings["chat.continue_pictures"]:
        images = await _continued(turns, prompt, media)
        notes += ["The chat's last picture went along as a reference."] if images else []
    if settings["chat.use_system_prompt"] and system:
        prompt = f"{system}\n\n{prompt}"
    return chat._replace(generation=Generation(plan, prompt, n, images, notes))


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


async def _continued(turns: list, prompt: str, media: Media) -> list[InputImage]:
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


def read_count(body: dict) -> int:
    n = 1 if body.get("n") in (None, "") else body["n"]
    n = int(n) if n in ("1", "2", "3", "4") else n
    if type(n) is not int or not 1 <= n <= 4:
        raise bad("n must be a whole number from 1 to 4", "n")
    return n


def check_images(plan: Plan, count: int) -> list[str]:
    """Holds the number of pictures against the plan -> a note where they are to be left out."""
    least, most = plan.images
    if plan.mode == "extend":
        raise bad(f"{plan.model} extends a clip, and chat has no way to name one", "model")
    if plan.mode == "text" and most == 0 < count:
        return [f"{plan.model} takes no pictures; they were left out."]
    if not least <= count <= most:
        words = f"{plan.model} takes {least} to {most} pictures; this request brings {count}"
        raise bad(words, "messages", "invalid_image")
    return []


# ---- 10. Client API -------------------------------------------------------------------------

HEARTBEAT = 10.0  # seconds between signs of life in a stream
USAGE = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}


class Gateway:
    """The parts of a running gateway, on an open store."""

    def __init__(self, settings: Settings, store: Store):
        self.settings, self.store, self.wire = settings, store, Wire(settings)
        self.pool = Pool(settings, store, RestFlow(settings, self.wire))
        self.media = Media(settings, self.wire)
        self.jobs = Jobs(store, self.pool, self.media)
        self.sessions: dict[str, float] = {}  # SHA-256 of an admin session -> its end
        self.stopping = False

    async def close(self) -> None:
        await self.jobs.stop()
        await self.wire.close()
        await asyncio.to_thread(self.store.close)


GATEWAY = web.AppKey("gateway", Gateway)


def error_response(err: GatewayError, request: web.Request, headers=None) -> web.Response:
    """The error in the caller's format: {"detail"} under /api, OpenAI's object elsewhere."""
    headers = dict(headers or {})
    headers |= {"Retry-After": str(int(err.retry_after))} if err.retry_after else {}
    detail = {"success": False, "detail": str(err), "message": str(err)}
    body = detail if request.path.startswith("/api/") else err.body()
    reason = err.code.replace("_", " ")  # some clients show nothing else
    return web.json_response(body, status=err.status, reason=reason, headers=headers)


def unexpected(request: web.Request) -> GatewayError:
    """For a bug, in its except clause: logged whole, told without its insides."""
    log.exception("%s %s", request.method, request.path)
    return GatewayError("internal_error", "Something went wrong in the gateway; its log says more")


def job_headers(job: Job | None) -> dict:
    """With a job under way a client's own retry would pay twice."""
    return {"X-Job-Id": job.id, "x-should-retry": "false"} if job else {}


def output_url(request: web.Request, output: Output) -> str:
    """Where a client gets an output without a key: here while it is kept, else at Google."""
    gateway = request.app[GATEWAY]
    if not gateway.media.path(output.file):
        return output.url
    base = gateway.settings["cache.base_url"].rstrip("/") or request.url.origin()
    return f"{base}/tmp/{output.file}"


def model_object(model: str) -> dict:
    frames = "i2v" in model or "interpolation" in model or model.endswith("-fl")
    plan = resolve(model, images=2 if frames else 0)
    endpoint = "image-generation" if plan.kind == "image" else "openai-video"
    head = {"id": model, "object": "model", "created": 1764547200, "owned_by": "flow2api"}
    head["description"] = f"{plan.kind.capitalize()} generation - {plan.describe()}"
    return head | {"supported_endpoint_types": ["openai", endpoint]}


async def list_models(request: web.Request) -> web.Response:
    return web.json_response({"object": "list", "data": list(map(model_object, MODELS))})


async def get_model(request: web.Request) -> web.Response:
    return web.json_response(model_object(request.match_info["model"]))


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """POST /v1/chat/completions, streamed or not."""
    gateway = request.app[GATEWAY]
    chat = await read_chat(await read_json(request), gateway.media)
    answer = ChatAnswer(request, chat)
    if not chat.generation:
        log.info("a client's own prompt was answered without generating")
        return await (answer.stream() if chat.stream else answer.whole())
    job = await gateway.jobs.create(chat.generation, "chat")
    try:
        return await (answer.stream(job) if chat.stream else answer.whole(job))
    finally:
        await asyncio.shield(gateway.jobs.abandon(job))


class ChatAnswer:
    """Renders a job, or a text, in the format of OpenAI's chat completions."""

    def __init__(self, request: web.Request, chat: Chat):
        self.request, self.chat, self.gateway = request, chat, request.app[GATEWAY]
        self.id, self.created = f"chatcmpl-{secrets.token_hex(12)}", int(now())
        self.reply = web.StreamResponse()

    def envelope(self, kind: str, *choices: dict) -> dict:
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.chat.model}
        return head | {"choices": [{"index": 0, **choice} for choice in choices]}

    def message(self, job: Job | None) -> dict:
        """content, and images where the client asked for them there."""
        if not job:
            return {"content": self.chat.text}
        links = [url for output in job.done() if (url := output_url(self.request, output))]
        form = self.gateway.settings["chat.video_content"]
        parts = [clip_text(url, form) for url in links]
        if job.plan.kind == "image":
            parts = [f"![Generated Image]({url})" for url in links]
        images = self.chat.images and job.plan.kind == "image"
        failed = [output.error["message"] for output in job.outputs if output.error]
        failed += ["Flow made none of it"] * (job.n - len(job.outputs))
        notes = [*job.notes, *(f"One of {job.n} failed: {words}" for words in failed)]
        text = "\n\n".join(([] if images else parts) + notes) or f"{len(links)} made."
        if not images:
            return {"content": text}
        rows = [{"type": "image_url", "image_url": {"url": url}} for url in links]
        return {"content": text, "images": [row | {"index": i} for i, row in enumerate(rows)]}

    def error(self, job: Job) -> GatewayError:
        then = "was not sent" if job.state == "queued" else "goes on at its next start"
        words = f"Flow2API is interrupted; job {job.id} {then}"
        return GatewayError(**job.error) if job.error else GatewayError("shutting_down", words)

    async def whole(self, job: Job | None = None) -> web.Response:
        if job:
            async for _ in self.gateway.jobs.watch(job, HEARTBEAT):
                if self.gateway.stopping:
                    break
            if job.state != "completed":
                return error_response(self.error(job), self.request, job_headers(job))
        choice = {"message": {"role": "assistant", **self.message(job)}, "finish_reason": "stop"}
        body = self.envelope("chat.completion", choice) | {"usage": USAGE}
        return web.json_response(body, headers=job_headers(job))

    async def send(self, data: dict | str) -> None:
        text = data if isinstance(data, str) else json.dumps(data)
        await self.reply.write(f"data: {text}\n\n".encode())

    async def delta(self, finish: str | None = None, **delta: Any) -> None:
        choice = {"delta": delta, "finish_reason": finish}
        await self.send(self.envelope("chat.completion.chunk", choice))

    async def stream(self, job: Job | None = None) -> web.StreamResponse:
        """Headers and the role at once; then progress as reasoning_content, or an empty delta
        each HEARTBEAT seconds; at the end the content, or a readable error and an error event."""
        kind = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
        self.reply.headers.update(kind | {"X-Accel-Buffering": "no"} | job_headers(job))
        await self.reply.prepare(self.request)
        try:
            await self.events(job)
        except ConnectionError:  # the client has gone
            raise
        except Exception as bug:
            err = bug if isinstance(bug, GatewayError) else unexpected(self.request)
            await self.delta(content=f"{err}\n")
            await self.send(err.body())
        await self.send("[DONE]")
        await self.reply.write_eof()
        return self.reply

    async def events(self, job: Job | None) -> None:
        said = f"Job {job.id}: {job.plan.describe()}\n" if job else ""
        await self.delta(role="assistant", **({"reasoning_content": said} if job else {}))
        if job:
            async for _ in self.gateway.jobs.watch(job, HEARTBEAT):
                if self.gateway.stopping or job.ended:
                    break
                line = progress_line(self.gateway.jobs, job)
                await self.delta(**({"reasoning_content": line} if line != said else {}))
                said = line
        if job and job.state != "completed":
            raise self.error(job)
        await self.delta(**self.message(job))
        await self.delta("stop")
        if self.chat.usage:
            await self.send(self.envelope("chat.completion.chunk") | {"usage": USAGE})


def clip_text(url: str, form: str) -> str:
    """A clip in a chat answer. No single form plays everywhere (setting chat.video_content)."""
    html = f'<video src="{url}" controls="controls">\n{url}\n</video>'
    link = f"[video.mp4]({url})"
    return {"html": html, "link": link, "both": f"{html}\n\n{link}"}[form]


def progress_line(jobs: Jobs, job: Job) -> str:
    """A line on where the job stands; no number in it is invented."""
    if job.stage or not job.outputs:
        waiting = [waiting for waiting, _ in jobs.pool.waiting.values()]
        before = f" ({waiting.index(job)} before this one)" if job in waiting[1:] else ""
        return (job.stage or "Starting") + before + "\n"
    ready = f"{len(job.done())} of {job.n} done, " if job.n > 1 else ""
    elapsed = f"{ready}generating for {int(now() - job.submitted_at)} s"
    if not (estimate := jobs.progress(job)):
        return elapsed + "\n"
    return f"{elapsed}, about {estimate[0]}% (by the time that {estimate[1]} earlier ones took)\n"


async def serve_media(request: web.Request) -> web.StreamResponse:
    """GET /tmp/{name}: a kept file, with Range and without a key; its name can't be guessed."""
    path = request.app[GATEWAY].media.path(request.match_info["name"])
    if not path:
        raise GatewayError("not_found", "There is no such file, or it has expired")
    headers = {"X-Content-Type-Options": "nosniff", "Cache-Control": "private, max-age=3600"}
    return web.FileResponse(path, headers=headers)


def preflight(request: web.Request) -> web.Response:
    """OPTIONS: CORS for browser clients, who send their key in a header; `expose` adds the rest."""
    asked = request.headers.get("Access-Control-Request-Headers", "authorization, content-type")
    methods = {"Access-Control-Allow-Methods": "GET, POST, DELETE"}
    headers = methods | {"Access-Control-Allow-Headers": asked, "Access-Control-Max-Age": "86400"}
    return web.Response(status=204, headers=headers)


# ---- 11. Admin API --------------------------------------------------------------------------

SESSION_SECONDS = 7 * 86400
PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
PAGE_HEADERS = {"Content-Security-Policy": PAGE_POLICY + "; frame-ancestors 'none'"}
PAGE_HEADERS |= {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


def bearer(request: web.Request) -> str:
    """The key of a request: `Bearer K`, or the bare key that older clients send."""
    return re.sub(r"^Bearer\s+", "", request.headers.get("Authorization", ""), flags=re.I).strip()


def same(given: str, known: str) -> bool:
    return hmac.compare_digest(given.encode(errors="backslashreplace"), known.encode())


def digest(secret: str) -> str:
    return hashlib.sha256(secret.encode(errors="backslashreplace")).hexdigest()


def hash_password(password: str, salt: bytes) -> str:
    key = hashlib.scrypt(password.encode(errors="replace"), salt=salt, n=1 << 14, r=8, p=1)
    return f"scrypt${salt.hex()}${key.hex()}"


def same_password(password: str, known: str) -> bool:
    """`known`: a hash, or the text that stands in setting.toml."""
    hashed = re.match(r"scrypt\$([0-9a-f]+)\$", known)
    given = hash_password(password, bytes.fromhex(hashed[1])) if hashed else password
    return known != "" and same(given, known)


def ok(message: str, **more: Any) -> web.Response:
    return web.json_response({"success": True, "message": message, **more})


async def login(request: web.Request) -> web.Response:
    """POST /api/login -> a session token for /api, good for seven days after its last use."""
    small = request.clone(client_max_size=1 << 16)  # whoever asks has shown no key yet
    body, settings = await read_json(small), request.app[GATEWAY].settings
    name, password = str(body.get("username")), str(body.get("password"))
    good = await asyncio.to_thread(same_password, password, settings["global.admin_password"])
    if not good or not same(name, settings["global.admin_username"]):
        raise GatewayError("invalid_api_key", "Invalid credentials")
    session, sessions = "admin-" + secrets.token_urlsafe(32), request.app[GATEWAY].sessions
    for old in [key for key, end in sessions.items() if end < now()]:
        del sessions[old]
    sessions[digest(session)] = now() + SESSION_SECONDS
    return ok("Login successful", token=session, username=name)


def iso(seconds: float) -> str | None:
    """RFC 3339 in UTC; None for never."""
    at = datetime.datetime.fromtimestamp(int(seconds), datetime.UTC)
    return at.isoformat() if seconds else None


def token_object(token: Token) -> dict:
    """As GET /api/tokens gives it, with session and access token in clear."""
    names = "id st at email name remark is_active use_count image_enabled video_enabled reason"
    names += " image_concurrency video_concurrency image_count video_count error_count"
    shown = {name: getattr(token, name) for name in names.split()}
    times = ("at_expires", "created_at", "last_used_at")
    shown |= {name: iso(getattr(token, name)) for name in times}
    shown |= {"token": token.at, "credits": token.credits or 0}
    shown["user_paygate_tier"] = token.tier or None
    shown["current_project_id"] = token.project_id or None
    return shown | {"current_project_name": token.project_name or None}


async def list_tokens(request: web.Request) -> web.Response:
    tokens = sorted(request.app[GATEWAY].pool.tokens.values(), key=lambda token: -token.id)
    return web.json_response([token_object(token) for token in tokens])


TOKEN_FIELDS = {"project_id": str, "project_name": str, "remark": str, "proxy_url": str}
TOKEN_FIELDS |= {"image_enabled": bool, "video_enabled": bool}
TOKEN_FIELDS |= {"image_concurrency": int, "video_concurrency": int}


def token_fields(body: dict) -> dict:
    """The fields that a request sets; null keeps what is there."""
    fields = {name: body[name] for name in TOKEN_FIELDS if body.get(name) is not None}
    for name, value in fields.items():
        if type(value) is not TOKEN_FIELDS[name]:
            raise bad(f"{name} must be of type {TOKEN_FIELDS[name].__name__}", name)
    if fields.get("proxy_url") and not good_proxy(fields["proxy_url"]):
        raise bad("proxy_url must look like http://host:port or socks5://host:port", "proxy_url")
    return fields


async def add_token(request: web.Request) -> web.Response:
    """POST /api/tokens: a new account, or a new session of a known one."""
    body, pool = await read_json(request), request.app[GATEWAY].pool
    st = clean_session_token(body["st"]) if isinstance(body.get("st"), str) else ""
    if not st or not st.isascii() or not st.isprintable():
        raise bad("st, the session token, is missing or not one", "st")
    fields = token_fields(body)
    if any(token.st == st and token.is_active for token in pool.tokens.values()):
        raise bad("This session token is in the pool already", "st", "conflict")
    token, new = await pool.add(st, **fields)
    names = ("id", "email", "credits", "project_id", "project_name")
    words = "Token added" if new else "This account was known; its session is updated"
    return ok(words, token={name: getattr(token, name) for name in names})


async def delete_token(request: web.Request) -> web.Response:
    pool = request.app[GATEWAY].pool
    token = pool.tokens.get(int(request.match_info["id"]))
    if not token:
        raise GatewayError("not_found", "There is no such token")
    await pool.remove(token)
    return ok("Token deleted")


async def health(request: web.Request) -> web.Response:
    """GET /health: that the process serves, and no details."""
    return web.json_response({"status": "ok"})


async def page(request: web.Request) -> web.StreamResponse:
    path = Path(__file__).with_name("admin.html")
    if not path.exists():
        words = "Flow2API runs; its API is under /v1. Its page, admin.html, is missing."
        return web.Response(text=words)
    return web.FileResponse(path, headers=PAGE_HEADERS)


# ---- 12. Demo -------------------------------------------------------------------------------

# fmt: off
CLIP = zlib.decompress(base64.b85decode(  # 4 s of H.264 in an MP4, 128x72
    "c-muNU{FXasVvAW&d+6FU}6B#Kx~v)mTZ_?U}DI?z^s&;pI^qnz>t$$mXX4M0+?SgFz_#6U}OLx1Ykr}h0b?izzd"
    "jwsIa6cF&oH^Dai)g$&6_l&|U`o_F%QQ0f;@oT$R+6l42k&lbTapg3tjq7p#}@Wo}AlB9Nhwn}Y6l2e6vZBVdkhM"
    "oLZ*Or|U|B^6m^7?7Xuk(if~lL}J9I3+hTFAc~LDa!>LitJ346o{NmN>OSWk~erti*ghoY{rn{lB66UdrxsmaSD="
    "}HK0ht5fmVgdw@Oe0aL-_15~e&lbKXuWM+abA|(F*2a=$q;LPZBfcyVL2FY|Fy-bip|LFl2P^7Sc2mzab6>f|SY#"
    "Aq<7*#d_bqEwB78gL>0Ky_kB}LExW@LexU0ebVe3)A~fME<`ivazEEDpjlK(S;rF%Bqg0+g#lax+NW6o|R;V4xkz"
    "`3UovgMhScX-WwwqD^yC!88acB1bAPArvJR6yzWW5Jx5?<#41GrGjF-D>o$(#5YXsXkyx@EW*Gdo7}+ASW>_sAiD"
    "4O`+dJ(uiJ$ceE@1=cbp}|S|f4*!qj4nXElH@tr1L5hTwxf5N4zUoSE4GXI38YKIj7gafg=9"
))
DEMO_SIZES = {"LANDSCAPE": (1376, 768), "PORTRAIT": (768, 1376), "SQUARE": (1024, 1024),
              "LANDSCAPE_FOUR_THREE": (1200, 896), "PORTRAIT_THREE_FOUR": (896, 1200)}
# fmt: on
UNSAFE = {"error": {"code": 3, "message": "PUBLIC_ERROR_UNSAFE_GENERATION"}}


def picture(text: str, width: int, height: int) -> bytes:
    """A PNG made from a text: eight by eight blocks in two colours of its hash."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)

    code = hashlib.sha256(text.encode()).digest()
    rows = []
    for y in range(8):
        blocks = (bytes([code[y] >> min(x, 7 - x) & 1]) * (width // 8) for x in range(8))
        rows.append(b"\0" + b"".join(blocks).ljust(width, b"\0"))
    pixels = zlib.compress(b"".join(rows[y * 8 // height] for y in range(height)), 6)
    head = chunk(b"IHDR", width.to_bytes(4) + height.to_bytes(4) + bytes([8, 3, 0, 0, 0]))
    colours = chunk(b"PLTE", code[8:14])
    return b"\x89PNG\r\n\x1a\n" + head + colours + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


class DemoMedium(namedtuple("DemoMedium", "name kind prompt ratio ready project batch scene")):
    """Something that the simulated Flow has made, or is making until `ready`."""

    def state(self) -> str:
        refused = "FAILED" if "unsafe" in self.prompt else "SUCCESSFUL"
        return "MEDIA_GENERATION_STATUS_" + ("ACTIVE" if now() < self.ready else refused)

    def file(self, scale=1) -> bytes:
        """A picture of its prompt; or the clip, with the prompt in a box that players skip."""
        text = f"{self.name} {self.prompt}"
        if self.kind == "image":
            return picture(text, *(side * scale for side in DEMO_SIZES[self.ratio]))
        note = b"free" + text.encode()[:4000]
        return CLIP + (len(note) + 4).to_bytes(4) + note


class Demo:
    """A small simulated Flow on loopback, with believable timing: sessions, projects, credits,
    uploads, pictures, clips (20 credits each), upscaling. Its content policy refuses the word
    "unsafe". accounts: by session token."""

    def __init__(self, image_seconds=2.0, video_seconds=12.0):
        self.image_seconds, self.video_seconds, self.address = image_seconds, video_seconds, ""
        self.accounts: dict[str, dict] = {}
        self.media: dict[str, DemoMedium] = {}

    def account(self, email: str, tier: str, credits: int) -> str:
        """Makes an account -> its session token."""
        st = secrets.token_urlsafe(150)
        self.accounts[st] = {"email": email, "tier": tier, "credits": credits, "at": ""}
        return st

    def routes(self) -> Iterable[tuple[str, str, Callable]]:
        yield "GET", "/fx/api/auth/session", self.session
        yield "POST", "/fx/api/trpc/project.createProject", self.create_project
        yield "GET", "/fx/api/trpc/media.getMediaUrlRedirect", self.redirect
        yield "GET", "/v1/credits", self.credits
        yield "POST", "/v1/flow/uploadImage", self.upload
        yield "POST", "/v1/projects/{project}/flowMedia:batchGenerateImages", self.images
        yield "POST", "/v1/flow/upsampleImage", self.upscale_image
        yield "POST", "/v1/video:batchCheckAsyncVideoGenerationStatus", self.status
        yield "POST", "/v1/video:batchAsyncGenerateVideo{mode}", self.videos
        yield "GET", "/media/{kind}/{name}", self.file

    async def start(self, *middlewares) -> web.AppRunner:
        app = web.Application(client_max_size=1 << 30, middlewares=middlewares)
        for method, path, handler in self.routes():
            app.router.add_route(method, path, functools.partial(self.answer, handler))
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.address = f"http://127.0.0.1:{runner.addresses[0][1]}"
        return runner

    async def answer(self, handler: Callable, request: web.Request) -> web.StreamResponse:
        """Finds whose call it is, by the cookie or by the access token."""
        body = await request.json() if request.body_exists else {}
        at, st = bearer(request), clean_session_token(request.headers.get("Cookie", ""))
        owners = [account for account in self.accounts.values() if at and account["at"] == at]
        account = owners[0] if owners else self.accounts.get(st, {})
        if not account and handler not in (self.session, self.file):
            return self.refuse(401, "CREDENTIALS_MISSING")
        reply = await handler(request, body, account)
        return reply if isinstance(reply, web.StreamResponse) else web.json_response(reply)

    def refuse(self, status: int, reason: str, message="Refused.") -> web.Response:
        error = {"code": status, "message": message, "details": [{"reason": reason}]}
        return web.json_response({"error": error}, status=status)

    async def session(self, request, body, account):
        if not account:
            return {}
        account["at"] = f"ya29.{secrets.token_urlsafe(32)}"
        expires = iso(now() + 3600).replace("+00:00", ".000Z")
        user = {"name": account["email"].split("@")[0], "email": account["email"]}
        return {"user": user, "expires": expires, "access_token": account["at"]}

    async def create_project(self, request, body, account):
        project = {"projectId": str(uuid.uuid4())}
        return {"result": {"data": {"json": {"result": project, "status": 200}}}}

    async def redirect(self, request, body, account):
        if medium := self.media.get(request.query.get("name", "")):
            raise web.HTTPTemporaryRedirect(self.url(medium))
        return self.refuse(404, "", "NOT_FOUND")

    def url(self, medium: DemoMedium) -> str:
        return f"{self.address}/media/{medium.kind}/{medium.name}?Expires={int(now()) + 18000}"

    async def credits(self, request, body, account):
        return {"credits": account["credits"], "userPaygateTier": account["tier"]}

    async def upload(self, request, body, account):
        return {"media": {"name": str(uuid.uuid4())}}

    def charge(self, account: dict, wanted: list[dict]) -> web.Response | None:
        """Takes the credits, or answers why not."""
        cost = 20 * len(wanted) if "videoModelKey" in wanted[0] else 0
        if cost > account["credits"]:
            return self.refuse(429, "PUBLIC_ERROR_USER_QUOTA_REACHED")
        account["credits"] -= cost
        return None

    def make(self, body: dict, kind: str, project: str, name="") -> list[DemoMedium]:
        made, batch = [], dig(body, "mediaGenerationContext", "batchId")
        for wanted in body["requests"]:
            prompt = dig(wanted, "structuredPrompt") or dig(wanted, "textInput", "structuredPrompt")
            ratio = (dig(wanted, "imageAspectRatio") or wanted["aspectRatio"]).split("RATIO_")[1]
            ready = now() + (self.video_seconds if kind == "video" else 0)
            new = name or self.new_name()
            text, scene = dig(prompt, "parts", 0, "text"), str(uuid.uuid4())
            self.media[new] = DemoMedium(new, kind, text, ratio, ready, project, batch, scene)
            made.append(self.media[new])
        return made

    def new_name(self) -> str:
        return str(uuid.uuid4())

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
        if refused := self.charge(account, body["requests"]):
            return refused
        source = dig(body, "requests", 0, "videoInput", "mediaId")
        name = f"{source}_upsampled" if request.match_info["mode"] == "UpsampleVideo" else ""
        made = self.make(body, "video", body["clientContext"]["projectId"], name)
        return self.clips(made) | {"remainingCredits": account["credits"]}

    async def status(self, request, body, account):
        items = [*body.get("media", ()), *body.get("operations", ())]
        names = [item.get("name") or item["operation"]["name"] for item in items]
        if any(name not in self.media for name in names):
            return self.refuse(404, "", "Requested entity was not found.")
        return self.clips([self.media[name] for name in names])

    def clips(self, media: list[DemoMedium]) -> dict:
        return {"media": list(map(self.medium, media))}

    def medium(self, medium: DemoMedium) -> dict:
        status = {"mediaGenerationStatus": medium.state()}
        status |= UNSAFE if medium.state().endswith("FAILED") else {}
        made = {"fifeUrl": self.url(medium)} if medium.kind == "image" else {}
        ids = {"name": medium.name, "projectId": medium.project, "workflowId": medium.scene}
        made = {medium.kind: {f"generated{medium.kind.capitalize()}": made}}
        return ids | made | {"mediaMetadata": {"mediaStatus": status}}

    async def file(self, request, body, account):
        data = self.media[request.match_info["name"]].file()
        return web.Response(body=data, content_type=sniff(data)[0])


# ---- 13. Main -------------------------------------------------------------------------------

PUBLIC, KEY, ADMIN = "public", "key", "admin"
ROUTES = (  # method, path, handler, who may call it
    ("GET", "/", page, PUBLIC),
    ("GET", "/health", health, PUBLIC),
    ("GET", "/tmp/{name}", serve_media, PUBLIC),
    ("POST", "/api/login", login, PUBLIC),
    ("POST", "/api/admin/login", login, PUBLIC),
    ("GET", "/api/tokens", list_tokens, ADMIN),
    ("POST", "/api/tokens", add_token, ADMIN),
    ("DELETE", r"/api/tokens/{id:\d{1,18}}", delete_token, ADMIN),
    ("GET", "/v1/models", list_models, KEY),
    ("GET", "/v1/models/{model}", get_model, KEY),
    ("POST", "/v1/chat/completions", chat_completions, KEY),
)
ALIASES = ("/v1", "", "/flow/v1", "/v1/v1")  # of /v1: people get base URLs wrong in these ways


def guard(handler, role: str):
    """The handler, for those who may call it."""

    async def guarded(request: web.Request) -> web.StreamResponse:
        given, sessions = bearer(request), request.app[GATEWAY].sessions
        key = request.app[GATEWAY].settings["global.api_key"]
        if role == KEY and not (key and same(given, key)):
            words = "Invalid API key" if given else "No API key: send Authorization: Bearer <key>"
            raise GatewayError("invalid_api_key", words)
        if role == ADMIN:
            if sessions.get(digest(given), 0) < now():
                raise GatewayError("invalid_api_key", "Invalid or expired admin token")
            sessions[digest(given)] = now() + SESSION_SECONDS
        return await handler(request)

    return guarded


@web.middleware
async def tell_errors(request: web.Request, handler) -> web.StreamResponse:
    """Every failure in the caller's format."""
    if request.method == "OPTIONS":
        return preflight(request)
    try:
        return await handler(request)
    except GatewayError as err:
        return error_response(err, request)
    except web.HTTPException as err:
        if err.status < 400:
            raise
        limit = request.app[GATEWAY].settings["limits.body_mb"]
        code, why = {
            404: ("not_found", "no such route; /v1/models and /v1/chat/completions are here"),
            405: ("method_not_allowed", "this route has other methods"),
            413: ("request_too_large", f"the body is over {limit} MB (limits.body_mb)"),
        }.get(err.status, ("invalid_request", err.reason))
        told = f"{request.method} {request.path[:80]}: {why}"
        return error_response(GatewayError(code, told), request)
    except ConnectionError:  # the client has gone in the middle of an answer
        raise
    except Exception:
        return error_response(unexpected(request), request)


async def expose(request: web.Request, response: web.StreamResponse) -> None:
    if not request.path.startswith("/api/"):
        shown = "openai-poll-after-ms, x-request-id, x-job-id, content-range, retry-after"
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


async def announce_stop(app: web.Application) -> None:
    """The first step of the end: open answers say so, and name their job."""
    app[GATEWAY].stopping = True
    for job in list(app[GATEWAY].jobs.open.values()):
        app[GATEWAY].jobs._tell(job, job.stage)


def make_app(settings: Settings, store: Store) -> web.Application:
    """The application on an open store, which it closes at its end."""
    limit = settings["limits.body_mb"] << 20
    app = web.Application(middlewares=[tell_errors], client_max_size=limit)
    app[GATEWAY] = Gateway(settings, store)
    for method, path, handler, role in ROUTES:
        for prefix in ALIASES if path.startswith("/v1/") else ("",):
            for verb in ("GET", "HEAD") if method == "GET" else (method,):
                route = prefix + path.removeprefix("/v1")
                app.router.add_route(verb, route, guard(handler, role))
    app.on_response_prepare.append(expose)
    app.on_shutdown.append(announce_stop)
    app.cleanup_ctx.append(workings)
    return app


def open_store(settings: Settings) -> Store:
    """Opens the database; it holds what the admin page has set, and the generated secrets."""
    store = Store(settings.data)
    store.open()
    for key, value in store.settings().items():
        layer, _, name = key.partition(":")
        if name in SETTING and layer in Settings.LAYERS:
            settings.layers[layer][name] = value
    return store


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
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    print(f"Flow2API {__version__} on {address}" + ("  (demo: a simulated Flow)" if demo else ""))
    for name, text in made.items():
        print(f"{name.partition('.')[2]}: {text}")
    if made and not demo:
        print("Keep what stands above, it is not shown again; setting.toml can set others.")
    key = settings["global.api_key"] if demo else made.get("global.api_key", "$KEY")
    body = {"model": "veo_3_1-fast", "stream": True}
    body["messages"] = [{"role": "user", "content": "a paper boat in the rain"}]
    curl = f'curl -N {address}/v1/chat/completions -H "Authorization: Bearer {key}"'
    print(f"Try it:\n{curl} -d '{to_json(body)}'", flush=True)


async def serve(settings: Settings, demo: bool) -> None:
    """Serves until SIGTERM or SIGINT; leaves within five seconds of it."""
    store = open_store(settings)
    async with contextlib.AsyncExitStack() as stack:
        simulated = await start_demo(settings, stack) if demo else []
        app = make_app(settings, store)
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=2)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, settings["server.host"], settings["server.port"]).start()
        for st in simulated:
            await app[GATEWAY].pool.add(st)
        greet(settings, runner.addresses[0][1], await make_secrets(settings, store), demo)
        done = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(NotImplementedError):  # Windows: Ctrl-C raises by itself
                asyncio.get_running_loop().add_signal_handler(number, done.set)
        await done.wait()
        log.info("stopping")


async def start_demo(settings: Settings, stack: contextlib.AsyncExitStack) -> list[str]:
    """-> the session tokens of its two accounts."""
    demo = Demo(settings["demo.image_seconds"], settings["demo.video_seconds"])
    runner = await demo.start()
    stack.push_async_callback(runner.cleanup)
    forced = {"flow.poll_interval": 1.0, "proxy.proxy_enabled": False, "cache.enabled": True}
    forced |= {"flow.labs_base_url": f"{demo.address}/fx/api"}
    settings.layers["command line"] |= forced | {"flow.api_base_url": f"{demo.address}/v1"}
    pro = demo.account("pro@demo.example", "PAYGATE_TIER_ONE", 1000)
    return [pro, demo.account("ultra@demo.example", "PAYGATE_TIER_TWO", 25000)]


async def findings(settings: Settings) -> AsyncIterator[tuple[bool, str]]:
    """What --check tells: (is it well, a line with what to do). Spends nothing."""
    for warning in settings.warnings:
        yield False, warning
    try:
        store = open_store(settings)
    except (StoreError, OSError) as err:
        yield False, f"data folder {settings.data}: {err}"
        return
    yield True, f"database {store.path}, schema {len(MIGRATIONS)}"
    free = shutil.disk_usage(settings.data).free >> 20
    yield free > 500, f"{free} MB free on the disk of {settings.data}; it should have 500"
    gateway = Gateway(settings, store)
    wire, pool, timeout = gateway.wire, gateway.pool, aiohttp.ClientTimeout(total=15)
    way = "the proxy" if settings["proxy.proxy_enabled"] else "no proxy"
    for url in (settings["flow.labs_base_url"], settings["flow.api_base_url"]):
        try:
            async with wire.request("GET", url, timeout=timeout) as reply:
                yield reply.status < 500, f"{url} answers {reply.status} through {way}"
        except (GatewayError, *wire.not_sent, aiohttp.ClientError, TimeoutError, OSError):
            yield False, f"{url} can't be reached through {way}; check network and [proxy]"
    if not pool.tokens:
        yield False, "no Google account yet: start Flow2API and add one (README, Session token)"
    for token in pool.tokens.values():
        try:
            await pool.check(token)
            why = "" if token.is_active else f"; disabled: {token.reason or 'by hand'}; enable it"
            words = f"{TIERS.get(token.tier, 'plan unknown')}, {token.credits} credits"
            words += f", access token until {iso(token.at_expires)}"
            yield token.is_active, f"account {token.email}: {words}{why}"
        except GatewayError as err:
            yield False, f"account {token.email}: {err}"
    await gateway.close()


async def check(settings: Settings) -> bool:
    """--check: the settings in force, then the findings -> whether all is well."""
    for name in SETTING:
        secret = settings[name] and name in (*SECRETS, "proxy.proxy_url")
        value = "(set)" if secret else repr(settings[name])
        print(f"      {name} = {value}  ({settings.source(name)})")
    all_well = True
    async for well, text in findings(settings):
        print("ok   " if well else "WRONG", text)
        all_well = all_well and well
    return all_well


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    rows = "\n".join(f"  {s.name:28} {s.help} [{s.default}]" for s in SETTINGS)
    parser = argparse.ArgumentParser(
        description="Your own Google Flow accounts as an OpenAI-compatible API.",
        epilog=f"settings, in setting.toml or as FLOW2API_<SECTION>_<KEY>:\n{rows}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option, beside = parser.add_argument, Path(__file__).with_name("setting.toml")
    option("--config", type=Path, default=beside, help="default: setting.toml beside flow2api.py")
    option("--data", dest="data_dir", help="data folder (default: data/ beside the configuration)")
    option("--host", help="address to listen on")
    option("--port", help="port to listen on")
    instead = parser.add_mutually_exclusive_group().add_argument
    instead("--demo", action="store_true", help="run on a simulated Flow; nothing is kept")
    instead("--check", action="store_true", help="say what is wrong, spend nothing, and exit")
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
