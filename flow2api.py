# /// script
# requires-python = ">=3.11"
# dependencies = ["aiohttp>=3.12"]
# ///
"""Flow2API: your own Google Flow accounts as an OpenAI-compatible API, in one file.

    client -> Generation -> Job(queued) -> a lease -> upload -> submit -> Job(running)
    client <- rendered answer <- Job(completed | failed) <- settle <- one poll per token

A chapter uses only what stands above it:
     1  Settings           what can be set, and where a value comes from
     2  Errors             each failure that a caller is told about, and Google's reasons
     3  Catalogue          model ids -> Plan
     4  Records and store  the durable records, and SQLite
     5  Network            outgoing HTTP, proxies, and reading what strangers sent
     6  Upstream           Google's protocol; nothing else in this file knows it
     7  Pool               accounts, leases, step-back
     8  Media              finished files, and the pictures that users send
     9  Jobs               the state machine: submit, poll, settle, resume
    10  Reading requests   a client's body -> Generation
    11  Client API         /v1: admission, then chat, images and videos
    12  Admin API          /api, the page, /metrics
    13  Simulated Flow     a small Google on loopback, for --demo and for the tests
    14  Main               the application and the command line

Words, the same everywhere; a parameter that is called like one of them is one:
    token       one Google account in the pool: its session, credits, tier and counters
    model       a public id that a client may name: veo_3_1-fast, nano_banana_pro-4K
    plan        what a model id and its parameters come to: mode, key, shape, price
    generation  one validated request of a client; nothing has been spent yet
    job         the durable record of a generation, from acceptance to its end
    output      one paid picture or clip of a job: Google's handle of it, and its file
    upstream    an adapter that speaks one of Google's protocols
    lease       the right to use a token for one submit, with its credits reserved

Needs Python 3.11+ and aiohttp; aiohttp-socks only where a SOCKS proxy is set.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":  # Ctrl-C during the imports: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import asyncio
import base64
import binascii
import concurrent.futures
import contextlib
import contextvars
import dataclasses
import datetime
import difflib
import email
import enum
import errno
import functools
import gc
import hashlib
import hmac
import io
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
import socket
import sqlite3
import struct
import sys
import tempfile
import threading
import time
import uuid
import weakref
import zipfile
import zlib
from collections import ChainMap, Counter, defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, get_type_hints
from urllib.parse import parse_qs, parse_qsl, quote, urlsplit

try:  # Python 3.8 reads the file, too, and comes as far as this
    import tomllib

    import aiohttp
    from aiohttp import web
    from aiohttp.http import HttpProcessingError
    from aiohttp.web import AppKey
    from yarl import URL

    if tuple(map(int, aiohttp.__version__.split(".")[:2])) < (3, 12):
        raise ImportError(f"this is {aiohttp.__version__}")
except ImportError as err:
    needs = f"aiohttp 3.12+ ({err}, see README): {sys.executable} -m pip install -U aiohttp"
    if err.name == "tomllib":
        needs = f"Python 3.11 or newer, and {sys.executable} is {sys.version.split()[0]}"
    print(f"flow2api: Flow2API needs {needs}", file=sys.stderr)
    sys.exit(2)

__version__ = "0.2.0"
log = logging.getLogger("flow2api")


def now():
    """Unix seconds: the only clock that decisions read, so that tests can drive it."""
    return time.time()


def today():
    return datetime.date.fromtimestamp(now()).isoformat()


def iso(seconds):
    """RFC 3339 in UTC; None for never."""
    moment = datetime.datetime.fromtimestamp(int(seconds), datetime.UTC)
    return moment.isoformat() if seconds else None


# ---- 1. Settings -----------------------------------------------------------------------


class SettingError(Exception):
    """A value that can't be used; the text names key, value and what is allowed."""


KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
TRUTHS = {"true": True, "1": True, "false": False, "0": False}


@dataclass(frozen=True)
class Setting:
    """A row of the table: section.key, a default that gives the type, and the bounds."""

    name: str
    default: bool | int | float | str
    help: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()

    @classmethod
    def read(cls, row):
        name, default, text, *allowed = row.strip().split(" | ")
        default = json.loads(default)
        limits = allowed[0].split() if allowed else ()
        if isinstance(default, str):
            return cls(name, default, text, choices=tuple(limits))
        return cls(name, default, text, *map(float, limits))

    def parse(self, raw):
        """The value that `raw` (of TOML, or a text) stands for. Raises ValueError."""
        kind = type(self.default)
        if isinstance(raw, str) and kind is bool:
            raw = TRUTHS.get(raw.strip().lower())
        elif isinstance(raw, str) or (kind is float and type(raw) is int):
            raw = kind(raw)
        good = type(raw) is kind and (not self.choices or raw in self.choices)
        if not good or not (self.low is None or self.low <= raw <= self.high):
            raise ValueError
        return raw

    @property
    def allowed(self):
        bounds = "" if self.low is None else f" from {self.low:.10g} to {self.high:.10g}"
        return " | ".join(self.choices) or KINDS[type(self.default)] + bounds


# Name, default, help, and what is allowed: from and to, or the choices.
SETTING_TABLE = """
    global.api_key | "" | Key that API clients send. Empty: made at first start.
    global.admin_username | "admin" | User name of the admin page.
    global.admin_password | "" | Admin password. Empty: made at first start.
    flow.labs_base_url | "https://labs.google/fx/api" | Google's sessions, projects.
    flow.api_base_url | "https://aisandbox-pa.googleapis.com/v1" | Google's media API.
    flow.timeout | 120 | Seconds for one call to Google. | 1 3600
    flow.poll_interval | 3.0 | Seconds between status calls of an account. | 0.05 60
    flow.max_poll_attempts | 500 | Status answers to wait for on a clip. | 1 100000
    server.host | "0.0.0.0" | Address to listen on.
    server.port | 8000 | Port to listen on (0: any free one). | 0 65535
    server.data_dir | "" | Data folder. Empty: data/ beside the configuration.
    server.trusted_proxies | "127.0.0.1, ::1" | Proxies whose X-Forwarded-* count.
    server.allow_private_urls | false | Fetch picture URLs from private networks, too.
    proxy.proxy_enabled | false | Send all traffic to Google through proxy_url.
    proxy.proxy_url | "" | http://, https://, socks5:// or socks4:// address.
    generation.image_timeout | 300 | Seconds until a picture job gives up. | 1 86400
    generation.video_timeout | 1500 | Seconds until a clip job gives up. | 1 86400
    admin.debug | false | Log each call to Google, too.
    admin.error_ban_threshold | 3 | Account failures in a row that disable it. | 1 1000
    cache.enabled | false | Keep finished files here and serve them under /tmp/.
    cache.timeout | 7200 | Seconds a kept file stays (0: for ever). | 0 31536000
    cache.base_url | "" | Public address in media links. Empty: what the client used.
    token_refresh.enabled | true | Check the accounts, and renew access tokens early.
    token_refresh.interval | 3600 | Seconds between checks of an account. | 60 86400
    chat.video_content | "both" | A clip in an answer. | both html link
    chat.answer_side_prompts | true | Answer clients' own prompts at no cost.
    chat.use_system_prompt | false | Put the system message before the prompt.
    chat.continue_pictures | true | An edit request takes the chat's last picture along.
    images.default_model | "nano_banana_pro" | Model where a request names none.
    images.response_format | "b64_json" | Default form. | b64_json url
    videos.default_model | "veo_3_1-fast" | Model where a request names none.
    videos.content | "stream" | How /content answers. | stream redirect
    limits.queue | 200 | Pictures, and clips, that may wait for a turn. | 1 100000
    limits.jobs_days | 180 | Days that an ended job is kept (0: for ever). | 0 36500
    limits.requests | 2000 | Requests at once, open streams included. | 1 100000
    limits.bodies_mb | 512 | Request bodies in memory at once, MB. | 1 65536
    limits.body_mb | 64 | Largest request body, MB. | 1 1024
    limits.image_mb | 20 | Largest input picture, MB. | 1 100
    limits.inputs_mb | 2048 | Input pictures of open jobs together, MB. | 1 1048576
    plugin.connection_token | "" | Key of the companion extension. Empty: it is made.
    plugin.auto_enable_on_update | true | A new session enables its account.
    demo.image_seconds | 2.0 | Seconds a picture takes with --demo. | 0 600
    demo.video_seconds | 12.0 | Seconds a clip takes with --demo. | 0 3600
"""
SETTINGS = map(Setting.read, SETTING_TABLE.strip().splitlines())
SETTINGS = {setting.name: setting for setting in SETTINGS}
SECRETS = ("global.api_key", "global.admin_password", "plugin.connection_token")
# Of this program's and other programs' examples: they count as unset.
PLACEHOLDERS = "your_api_key your_password your-api-key your-password han1234 admin"
PLACEHOLDERS = ("", *PLACEHOLDERS.split())
HIDDEN = (*SECRETS, "proxy.proxy_url")


class Settings:
    """Layers of values. `settings["server.port"]` is the value in force, read anew."""

    def __init__(self):
        # The strongest first. None sets nothing.
        names = ("command line", "environment", "admin page", "file", "generated")
        self.layers = {name: {} for name in names}
        self.layers["default"] = {row.name: row.default for row in SETTINGS.values()}
        self.models = {}  # section [models]: upstream keys by product
        self.warnings = []
        self.folder = Path()
        self.demo = False  # Google is a simulated Flow, and nothing is kept

    def __getitem__(self, name):
        return self.layers[self.source(name)][name]

    def source(self, name):
        """The layer that the value in force comes from; of an unknown name, "default"."""
        for layer, values in self.layers.items():
            if values.get(name) is not None:
                return layer
        return "default"

    def put(self, layer, name, raw, origin):
        """Raises SettingError; an unknown name warns; a placeholder sets nothing."""
        setting = SETTINGS.get(name)
        if not setting:
            self.warnings.append(f"{origin}: unknown setting {name}; ignored")
            return
        try:
            value = setting.parse(raw)
        except ValueError:
            told = "that value" if name in SECRETS else repr(raw)
            message = f"{origin}: {name} can't be {told}; allowed: {setting.allowed}"
            raise SettingError(message) from None
        if name not in SECRETS or value not in PLACEHOLDERS:
            self.layers[layer][name] = value

    def read_file(self, path):
        """Takes those of a TOML file; a missing one is empty. Raises SettingError."""
        self.folder = path.parent
        try:
            document = tomllib.loads(path.read_text("utf-8-sig")) if path.exists() else {}
        except UnicodeError:
            raise SettingError(f"{path} is no text in UTF-8") from None
        except ValueError as err:
            raise SettingError(f"{path}: {err}") from None
        except IsADirectoryError:
            hint = "Docker makes one where the file to mount is missing"
            raise SettingError(f"{path} is a folder, not a file ({hint})") from None
        for section, values in document.items():
            entries = values.items() if isinstance(values, dict) else [("", values)]
            for key, raw in entries:
                if section == "models":
                    self.put_model(key, raw, path.name)
                else:
                    self.put("file", f"{section}.{key}".rstrip("."), raw, path.name)

    def put_model(self, name, key, origin):
        """Raises SettingError."""
        try:
            key.format(P="", O="", U="", D=0)
        except (AttributeError, LookupError, ValueError):
            allowed = "a text, at most with {P} {O} {U} {D}"
            message = f"{origin}: [models] {name} can't be {key!r}; allowed: {allowed}"
            raise SettingError(message) from None
        self.models[name] = key

    def read_environment(self, environ):
        """Takes FLOW2API_<SECTION>_<KEY>. Raises SettingError; an unknown one warns."""
        names = {"FLOW2API_" + name.replace(".", "_").upper(): name for name in SETTINGS}
        for key, raw in environ.items():
            if key.startswith("FLOW2API_"):
                self.put("environment", names.get(key, "of the environment"), raw, key)

    def read_stored(self, rows):
        """Takes those of the database, by "layer:name"."""
        for key, value in rows.items():
            layer, _, name = key.partition(":")
            if name in SETTINGS and layer in self.layers and value is not None:
                self.layers[layer][name] = value

    @property
    def data(self):
        """The data folder."""
        folder = self["server.data_dir"] or self.folder / "data"
        return Path(os.path.expanduser(folder)).resolve()


# ---- 2. Errors -------------------------------------------------------------------------


class Effect(enum.Enum):
    """What a failure does to accounts, and whether the same may be tried again."""

    FINAL = "told to the caller; no account is blamed"
    RETRY = "nothing was spent; one more try"
    ACCOUNT = "nothing was spent; this account steps back, another may be tried"
    BAN = "as ACCOUNT, and it counts towards the automatic ban"
    SESSION = "as ACCOUNT, and if that goes on for minutes the account is disabled"
    UNKNOWN = "perhaps spent: not sent again, but looked for at Google"


def read_rows(table, mark=None):
    """The columns of each line, with `mark` between them, or blanks."""
    return [row.strip().split(mark) for row in table.strip().splitlines()]


def read_pairs(text):
    return dict(pair.split("=") for pair in text.split())


# HTTP status, effect, codes. What was paid for is a 400, too: no client repeats that by
# itself, as many do a 5xx. Waiting cures a 429, as all clients know; a 503 it does not.
ERROR_TABLE = """
    400 FINAL    invalid_request invalid_image unsupported_parameter tier_required
    400 FINAL    mode_not_available task_not_completed content_policy_violation
    400 FINAL    generation_failed generation_timeout interrupted
    400 UNKNOWN  submit_unknown
    401 FINAL    invalid_api_key
    404 FINAL    not_found model_not_found task_not_found content_not_found
    405 FINAL    method_not_allowed
    408 FINAL    request_timeout
    409 FINAL    conflict cancelled idempotency_conflict
    413 FINAL    request_too_large
    415 FINAL    unsupported_encoding
    429 FINAL    queue_full too_many_logins
    429 ACCOUNT  account_throttled account_busy account_daily_quota
    500 FINAL    internal_error
    501 FINAL    not_implemented
    502 RETRY    upstream_error upstream_unreachable
    502 FINAL    upstream_changed model_unavailable proxy_unavailable
    502 SESSION  upstream_retired
    503 RETRY    upstream_busy
    503 FINAL    no_accounts no_credits shutting_down
    503 ACCOUNT  account_no_credits captcha_required model_not_for_account
    503 BAN      account_refused
    503 SESSION  account_session_ended
    507 FINAL    disk_full
"""
ERRORS = {  # code -> HTTP status, effect
    code: (int(status), Effect[effect])
    for status, effect, *codes in read_rows(ERROR_TABLE)
    for code in codes
}
ERROR_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class GatewayError(Exception):
    """A failure that a caller is told about: a code of ERRORS and a message of its own.
    param: the request field at fault. retry_after: seconds for that header. pause: those
    an account steps back at first. upstream: Google's HTTP status, if that is the cause."""

    def __init__(self, code, message, *, param=None, retry_after=0, pause=60, upstream=0):
        super().__init__(message)
        self.code = code
        self.param = param
        self.retry_after = retry_after
        self.pause = pause
        self.upstream = upstream

    status = property(lambda self: ERRORS[self.code][0])
    effect = property(lambda self: ERRORS[self.code][1])

    def record(self):
        """What is stored of it; GatewayError(**record) is the error again."""
        return {"code": self.code, "message": str(self), "retry_after": self.retry_after}

    def body(self):
        """The error object of OpenAI's API."""
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": str(self),
                "type": ERROR_TYPES.get(self.status, default),
                "param": self.param,
                "code": self.code,
            }
        }


def bad(message, param=None, code="invalid_request"):
    """The error for a request that is itself at fault."""
    return GatewayError(code, message, param=param)


# LiteLLM knows a refusal by policy by the first words.
POLICY = (
    "Your request was rejected as a result of the safety system: Google's content policy"
    " refused this prompt or picture; change it and try again"
)
# What Google's refusals mean: code, seconds an account pauses, a pattern of its reason
# (PUBLIC_ERROR_*), text, HTTP status (0: a clip that failed later); message. The first counts.
REASONS = rf"""
    upstream_retired 20 RPCs have been deprecated ; This account has moved to
        flow.google.com, which this version does not speak
    account_refused 600 USER_REGION|USER_MINOR|APP_UNAVAILABLE ; Flow refuses this account
    account_throttled 300 TOO_MUCH_TRAFFIC|THROTTLED ; Google is slowing this account down
    captcha_required 300 UNUSUAL_ACTIVITY|reCAPTCHA ; Google wants a reCAPTCHA token: use
        Flow in this account's own browser
    account_daily_quota 60 DAILY_QUOTA ; This model's quota of the day is used up
    account_no_credits 600 QUOTA_REACHED ; The account has no credits left
    model_not_for_account 0 MODEL_ACCESS_DENIED ; The account's plan lacks this model
    account_busy 20 CONCURRENT_LIMIT ; The account has too many clips under way
    upstream_busy 0 TRAFFIC|OVERLOADED|SOMETHING_WENT|TIMED_OUT ; Flow is overloaded
    invalid_request 0 NON_ENGLISH ; Flow wants an English prompt for this
    conflict 0 IN_PROGRESS|CANNOT_BE_CANCELED ; Flow is already at it
    invalid_image 0 IMAGE_TOO_|FILE_FORMAT ; Flow can't take this picture's size or format
    content_policy_violation 0
        UNSAFE|SEXUAL|VIOLEN|DANGER|MINOR|PROMINENT|PHOTOREAL|IP_|FILTER|PROHIBIT|REPUTATION|_EDIT
        ; {POLICY}
    generation_failed 60 HTTP 0$ ; The generation failed at Google
    account_refused 60 HTTP 40[13]$ ; Google refused this account
    model_unavailable 60 HTTP 404$ ; Google knows no such key or medium; see [models]
    upstream_error 60 HTTP (408|499)$ ; Google's side took too long
    account_throttled 60 HTTP 429$ ; Google is slowing this account down
    upstream_changed 60 HTTP 4..$ ; Google refused the form of our request
    upstream_error 60 HTTP ; Google's side failed
"""
REASONS = REASONS.strip().replace("\n        ", " ").splitlines()
REASONS = [re.match(r" *(\w+) (\d+) (.*) ; (.*)", row).groups() for row in REASONS]


def too_large(limit, param):
    return bad(f"A picture may have {limit >> 20} MB at most", param, "request_too_large")


def changed(message):
    """The error for a reply of Google in a form that is not known here."""
    return GatewayError("upstream_changed", message)


def session_ended(message):
    return GatewayError("account_session_ended", message, pause=20)


def google_error(status, reason, message="", retry_after=0):
    """The error for a refusal of Google, as in REASONS."""
    text = f"{reason[:2000]} {message[:2000]} HTTP {status}"
    code, pause, _, meaning = next(row for row in REASONS if re.search(row[2], text))
    told = f"{meaning} (Google: {str(reason or message or status)[:300]})"
    if ERRORS[code][0] == 429 and not retry_after:  # Google seldom says it
        retry_after = int(pause)
    return GatewayError(code, told, retry_after=retry_after, pause=int(pause), upstream=status)


def failed_output(reason):
    """The error of an output that Google took and then failed: a refusal of its content,
    else generation_failed. Whatever Google says by then, it is not sent again."""
    error = google_error(0, reason)
    if error.effect is Effect.FINAL:
        return error
    return GatewayError("generation_failed", str(error))


# ---- 3. Catalogue ----------------------------------------------------------------------
# Plans that Google sells, lowest first: the word on the wire, and what people call it.
TIERS = {"PAYGATE_TIER_NOT_PAID": "free", "PAYGATE_TIER_ONE": "Pro", "PAYGATE_TIER_TWO": "Ultra"}
RATIOS = {"landscape": 16 / 9, "portrait": 9 / 16, "square": 1, "4-3": 4 / 3, "3-4": 3 / 4}
WIDER = {"landscape": True, "4-3": True, "portrait": False, "3-4": False, "square": None}
MODES = {
    "text": "text to video",
    "start": "start frame",
    "frames": "start and end frame",
    "references": "reference pictures",
    "extend": "extension of a clip",
    "edit": "edit of a clip",
    "image": "picture",
}
# Credits that an upscale adds on a free, Pro and Ultra account; None: not there.
UPSCALES = {
    "": (0, 0, 0),
    "1080p": (None, 0, 0),
    "4k": (None, None, 50),
    "2K": (0, 0, 0),
    "4K": (None, None, 0),
}
EDITOR = "omni_flash"  # the family that edits clips

# What Flow makes (its catalogue of 2026-08-27): family, mode (auto: all of MODE_WORDS),
# lengths in seconds (0: a picture), credits on a free, Pro and Ultra account (-: not
# there), and the upstream key. Product.read fills in {M} the word of the mode, Plan.key
# {P} "_portrait" or nothing, {O} the shape, {U} "_ultra" or nothing, {D} the seconds.
PRODUCT_TABLE = """
    veo_3_1            text       8   100 100 100  veo_3_1_t2v{P}
    veo_3_1            text       4,6   -   - 100  veo_3_1_t2v_quality_{D}s
    veo_3_1            start      8   100 100 100  veo_3_1_i2v_s{P}
    veo_3_1            start      4,6   -   - 100  veo_3_1_i2v_s_quality_{D}s
    veo_3_1            frames     8   100 100 100  veo_3_1_i2v_s{P}_fl
    veo_3_1            frames     4,6   -   - 100  veo_3_1_i2v_s_quality_{D}s_fl
    veo_3_1            extend     8   100 100 100  veo_3_1_extend_{O}
    veo_3_1_fast       text       8    20  20  10  veo_3_1_t2v_fast{P}{U}
    veo_3_1_fast       text       4,6   -   -  10  veo_3_1_t2v_fast_{D}s
    veo_3_1_fast       start      8    20  20  10  veo_3_1_i2v_s_fast{P}{U}
    veo_3_1_fast       start      4,6   -   -  10  veo_3_1_i2v_s_fast_{D}s
    veo_3_1_fast       frames     8    20  20  10  veo_3_1_i2v_s_fast{P}{U}_fl
    veo_3_1_fast       frames     4,6   -   -  10  veo_3_1_i2v_s_fast_{D}s_fl
    veo_3_1_fast       references 8    20  20  10  veo_3_1_r2v_fast_{O}{U}
    veo_3_1_fast       extend     8    20  20  10  veo_3_1_extend_fast_{O}{U}
    veo_3_1_lite       text       8    10  10   5  veo_3_1_t2v_lite
    veo_3_1_lite       text       4,6   -   -   5  veo_3_1_t2v_lite_{D}s
    veo_3_1_lite       start      8    10  10   5  veo_3_1_i2v_lite
    veo_3_1_lite       start      4,6   -   -   5  veo_3_1_i2v_s_lite_{D}s
    veo_3_1_lite       frames     8    10  10   5  veo_3_1_interpolation_lite
    veo_3_1_lite       frames     4,6   -   -   5  veo_3_1_i2v_s_lite_{D}s_fl
    veo_3_1_lite       references 8    10  10   5  veo_3_1_r2v_lite
    veo_3_1_lite       extend     8    10  10   5  veo_3_1_extension_lite
    veo_3_1_relaxed    text       8     -   -   0  veo_3_1_t2v_lite_low_priority
    veo_3_1_relaxed    text       4,6   -   -   0  veo_3_1_t2v_lite_{D}s_low_priority
    veo_3_1_relaxed    start      8     -   -   0  veo_3_1_i2v_lite_low_priority
    veo_3_1_relaxed    start      4,6   -   -   0  veo_3_1_i2v_s_lite_{D}s_low_priority
    veo_3_1_relaxed    frames     8     -   -   0  veo_3_1_interpolation_lite_low_priority
    veo_3_1_relaxed    frames     4,6   -   -   0  veo_3_1_i2v_s_lite_{D}s_fl_low_priority
    veo_3_1_relaxed    references 8     -   -   0  veo_3_1_r2v_lite_low_priority
    veo_3_1_relaxed    extend     8     -   -   0  veo_3_1_extension_lite_low_priority
    omni_flash         auto       4     7   7   7  abra_{M}_{D}s
    omni_flash         auto       6    10  10  10  abra_{M}_{D}s
    omni_flash         auto       8    12  12  12  abra_{M}_{D}s
    omni_flash         auto       10   15  15  15  abra_{M}_{D}s
    omni_flash         edit       8    20  20  20  abra_edit
    nano_banana_pro    image      0     0   0   0  GEM_PIX_2
    nano_banana_2      image      0     0   0   0  BELUGA
    nano_banana_2_lite image      0     0   0   0  HARBOR_SEAL
    imagen_4           image      0     0   0   0  IMAGEN_3_5
"""
MODE_WORDS = {"text": "t2v", "start": "i2v", "frames": "i2v", "references": "r2v"}
FAMILY_NOTES = {"veo_3_1_relaxed": "This is Veo 3.1 Lite at low priority."}


@dataclass(frozen=True)
class Product:
    """A row of PRODUCT_TABLE, in one mode and length."""

    family: str
    mode: str
    seconds: int
    credits: list[int | None]  # on a free, Pro and Ultra account
    key: str

    @classmethod
    def read(cls, table):
        for family, modes, lengths, *credits, key in read_rows(table):
            prices = [None if word == "-" else int(word) for word in credits]
            for mode in MODE_WORDS if modes == "auto" else [modes]:
                template = key.replace("{M}", MODE_WORDS.get(mode, ""))
                for seconds in lengths.split(","):
                    yield cls(family, mode, int(seconds), prices, template)

    def costs(self, upscale, ultra_only):
        """Credits of one output on a free, Pro and Ultra account, upscaled."""
        served = (None, None, 0) if ultra_only else (0, 0, 0)
        parts = zip(self.credits, UPSCALES[upscale], served, strict=True)
        return [None if None in part else sum(part) for part in parts]

    @property
    def name(self):
        """As [models] calls it: the family, of clips _mode and, for 4 and 6 s, _short."""
        short = "_short" if 0 < self.seconds < 8 else ""
        return f"{self.family}_{self.mode}{short}".removesuffix("_image")


PRODUCTS = tuple(Product.read(PRODUCT_TABLE))


@dataclass(frozen=True)
class ModelId:
    """What a model id stands for."""

    family: str
    ratio: str  # the shape, if no parameter tells it
    mode: str
    may: Iterable[str]  # the parameters that it may have
    text: str = ""
    note: str = ""
    params: Iterable[str] = ()

    def first(self, group):
        """The parameter of this group that the id has, or an empty text."""
        return next((param for param in group if param in self.params), "")

    def choose_ratio(self, size):
        """The shape: a parameter, else the nearest to `size`, else the head's own. Raises
        invalid_request where they contradict each other."""
        named = self.first(RATIOS)
        default = named or self.ratio
        if not size or size == "auto":
            return default
        shapes = [default, *(param for param in self.may if param in RATIOS)]
        # At a tie the default: a clip is no square.
        nearest = min(shapes, key=functools.partial(distance, size))
        if named and WIDER[named] != WIDER[nearest]:
            raise bad(f"size {size} contradicts {named!r} in {self.text}", "size")
        return named or nearest

    def choose_mode(self, mode):
        """The mode before pictures are counted."""
        if self.mode == "image":
            return "image"
        counted = self.mode == "auto" and "fl" in self.params
        return mode or ("i2v" if counted else self.mode)


LENGTHS = {"4s": 4, "6s": 6, "8s": 8, "10s": 10}
VARIANTS = ("relaxed", "fast", "lite")
# How ids begin: the beginning, its family, the shape and the mode if nothing tells them,
# and which of PARAMS may follow.
HEAD_TABLE = """
    veo_3_1                      veo_3_1             portrait   auto        veo
    omni_flash                   omni_flash          portrait   auto        omni
    omni                         omni_flash          landscape  references  omni_pictures
    nano_banana                  nano_banana_2       portrait   image       one_size
    nano_banana_2                nano_banana_2       portrait   image       all_sizes
    nano_banana_2_lite           nano_banana_2_lite  portrait   image       one_size
    nano_banana_pro              nano_banana_pro     portrait   image       all_sizes
    imagen_4                     imagen_4            portrait   image       one_size
    veo-3.1                      veo_3_1             landscape  auto        veo
    gemini-omni-flash            omni_flash          landscape  auto        omni
    gemini-2.5-flash-image       nano_banana_2       landscape  image       one_size
    gemini-3.0-pro-image         nano_banana_pro     landscape  image       all_sizes
    gemini-3.1-flash-image       nano_banana_2       landscape  image       all_sizes
    gemini-3.1-flash-lite-image  nano_banana_2_lite  landscape  image       one_size
    imagen-4.0                   imagen_4            landscape  image       one_size
    veo_3_1_t2v                  veo_3_1             landscape  text        wire
    veo_3_1_i2v                  veo_3_1             landscape  i2v         wire
    veo_3_1_interpolation        veo_3_1             landscape  frames      wire
    veo_3_1_r2v                  veo_3_1             landscape  references  wire
    veo_3_1_extend               veo_3_1             landscape  extend      wire
"""
PARAMS = {
    "veo": "portrait landscape relaxed fast lite fl 4s 6s 8s 720p 1080p 4k",
    "wire": "portrait landscape relaxed fast lite fl 4s 6s 8s 720p 1080p 4k ultra",
    "omni": "portrait landscape fl 4s 6s 8s 10s 720p",
    "omni_pictures": "portrait landscape 4s 6s 8s 10s 720p",
    "one_size": "landscape portrait square 4-3 3-4 1K",
    "all_sizes": "landscape portrait square 4-3 3-4 1K 2K 4K",
}
HEADS = {
    head: ModelId(*columns, PARAMS[params].split())
    for head, *columns, params in read_rows(HEAD_TABLE)
}
WIRE_STYLE = "veo_3_1_"  # Google's own ids: veo_3_1_t2v_fast_portrait
# A mode -> the fewest and most pictures, and what it is with none, one, two, … of them.
INPUTS = """
    auto        0  3  text start frames references
    i2v         1  2  start start frames
    frames      2  2  frames
    references  0  3  text references
    image       0 10  image
"""
INPUTS = {mode: (int(least), int(most), modes) for mode, least, most, *modes in read_rows(INPUTS)}
OTHER_MOST = {("veo_3_1", 3): 2, ("omni_flash", 3): 7, ("imagen_4", 10): 3}
# Other ids of today's models of the same price: a pattern (>: what is its end or goes on
# with a hyphen), what it means, and a note.
OTHER_NAMES = r"""
    ^omni_(portrait|landscape)\Z  omni-\1
    ^veo_2_1_fast_d_15_(t2v|i2v)  veo_3_1_\1_lite  Google retired it; this is Veo 3.1 Lite.
    ^veo_2_0_  veo_3_1_  Google retired Veo 2; this is Veo 3.1.
    ^veo_3_0_r2v_  veo_3_1_r2v_  Google retired Veo 3.0; this is Veo 3.1.
    ^((?:veo|imagen|gemini)-.*?)(-generate|-preview|-exp|-00\d|(-\d{4})?-\d\d-\d\d)+>  \1
    ^veo(_3\.|-?3-|3)1>  veo-3.1
    ^veo-?(\d)>  veo-\1.0
    ^veo(?=\d\.)  veo-
    ^imagen-?([34])>  imagen-\1.0
    ^(veo-\d\.\d.*?)-(pro|components)>  \1
    ^(veo-\d\.\d.*?)-frames>  \1-fl
    ^gemini-2\.0-flash-image-generation  gemini-2.5-flash-image
    ^omni-flash>  omni_flash
    ^nano-banana-2-lite>  nano_banana_2_lite
    ^nano-banana-(?=(2|pro)(-|\Z))  nano_banana_
    ^nano-banana  nano_banana
    ^veo-[23]\.0>  veo-3.1  Google retired this Veo; this is Veo 3.1.
    ^imagen-3\.0  imagen-4.0  Google retired Imagen 3; this is Imagen 4.
    ^(imagen-4\.0.*?)-(fast|ultra)>  \1  Flow has one Imagen 4 only.
    ^gemini-3-pro-image>  gemini-3.0-pro-image
    ^gemini-nano-banana-2(\.\d)?>  gemini-3.1-flash-image
    ^gemini-omni-\d\.\d-flash>  gemini-omni-flash
    ^(nano_banana|gemini-2.5-flash-image)>  \1  Google retired it; this is Nano Banana 2.
    ^veo_3_1_i2v_s(?=_|\Z)  veo_3_1_i2v
    -four-three  -4-3
    -three-four  -3-4
"""
OTHER_NAMES = read_rows(OTHER_NAMES.replace(">", r"(?=-|\Z)"), "  ")
# Ids of OpenAI's families: what they make, by the default model of that.
OPENAI_IDS = (("image", "(chat)?gpt.*image|dall-?e|sora.*image"), ("video", "sora"))
EXCLUSIVE = """lite fast, lite relaxed, 720p 1080p 4k, 1K 2K 4K, 4s 6s 8s 10s,
    landscape portrait square 4-3 3-4"""
EXCLUSIVE = [group.split() for group in EXCLUSIVE.split(",")]
# The ids that /v1/models lists, the retired last; the grammar takes many more.
LISTED = """
    veo_3_1{|-portrait|-landscape}{|-fast|-lite|-relaxed}{|-fl}
    veo_3_1{|-fast|-lite|-relaxed}-{4s|6s}
    veo_3_1{|-portrait|-landscape}{|-fast}-{1080p|4k}
    omni_flash{|-portrait|-landscape}{|-4s|-6s|-10s}
    nano_banana_{pro|2|2_lite}{|-portrait|-landscape|-square|-4-3|-3-4}
    nano_banana_2-{2K|4K}
    nano_banana_pro{|-portrait|-landscape|-square|-4-3|-3-4}-{2K|4K}
    imagen_4{|-portrait|-landscape|-square|-4-3|-3-4}
    veo_3_1_{t2v_fast|i2v_s_fast_fl|r2v_fast}_{portrait|landscape}
    gemini-{3.0-pro|3.1-flash}-image-{portrait|landscape}
    imagen-4.0-generate-preview-{portrait|landscape}
    nano_banana{|-portrait|-landscape|-square|-4-3|-3-4}
    gemini-2.5-flash-image-{portrait|landscape}
    veo_{2_1_fast_d_15|2_0}_{t2v|i2v}_{portrait|landscape}
    veo_3_0_r2v_fast_{portrait|landscape}
"""
CHOICES = [[part.split("|") for part in re.split("[{}]", row)] for row in LISTED.split()]
MODELS = tuple("".join(parts) for row in CHOICES for parts in itertools.product(*row))


@dataclass(frozen=True)
class Plan:
    """What a request comes to, before an account is chosen."""

    model: str
    kind: str  # "image" or "video"
    family: str
    mode: str  # a key of MODES
    ratio: str  # a key of RATIOS
    seconds: int  # length of a clip, 0 for pictures
    upscale: str  # a key of UPSCALES
    template: str  # an upstream key, as in PRODUCT_TABLE
    costs: list[int | None]  # credits of one output per tier, upscaled; None: not served
    images: list[int]  # how many input pictures it takes, from and to
    note: str = ""  # what a caller should know about the id

    def cost(self, tier):
        """Credits of one output on an account of this tier; None: it can't make it."""
        return self.costs[list(TIERS).index(tier) if tier in TIERS else 0]

    def key(self, tier):
        """The upstream key for an account of this tier."""
        portrait = "_portrait" if self.ratio == "portrait" else ""
        ultra = "_ultra" if tier == "PAYGATE_TIER_TWO" else ""
        return self.template.format(P=portrait, O=self.ratio, U=ultra, D=self.seconds)

    @property
    def scopes(self):
        """For what an account that can't make it now may pause: all, a kind, a model."""
        return "", self.kind, self.family

    @property
    def pace(self):
        """What jobs that take equally long have in common."""
        return self.family, self.mode, self.seconds, self.upscale

    def prices(self):
        """Credits of one output by what people call the tiers that can make it."""
        costs = zip(TIERS.values(), self.costs, strict=True)
        return {tier: cost for tier, cost in costs if cost is not None}

    def describe(self):
        seconds = f", {self.seconds} s" if self.seconds else ""
        upscale = f", upscaled to {self.upscale}" if self.upscale else ""
        prices = ", ".join(f"{tier} {cost}" for tier, cost in self.prices().items())
        text = f"{self.family} {MODES[self.mode]}, {self.ratio}{seconds}{upscale}"
        return f"{text}; credits: {prices}. {self.note}".strip()


def read_aspect(size):
    """1280x720 or 16:9 -> width by height. Raises invalid_request."""
    match = re.fullmatch(r"\s*0*([1-9]\d{0,5})\s*[xX×*:：/]\s*0*([1-9]\d{0,5})\s*", size)
    if not match:
        raise bad(f"size must be like 1280x720 or 16:9, not {size[:40]!r}", "size")
    return int(match[1]) / int(match[2])


def distance(size, ratio):
    """How far a size is from a key of RATIOS; 0: it is the same shape."""
    return abs(math.log(RATIOS[ratio] / read_aspect(size)))


def resolve(model, *, size="", seconds=0, resolution="", images=0, mode="", overrides=None):
    """The plan of a model id. `size`: "1280x720", "16:9", "auto" or empty. `seconds`: 0
    for the id's own. `resolution`: "1080p", "2k", … or empty. `images`: how many. `mode`:
    "edit" or "extend". `overrides`: the section [models]. Raises model_not_found,
    mode_not_available, invalid_request."""
    overrides = overrides or {}
    model_id = parse_id(model, resolution)
    ratio = model_id.choose_ratio(size)
    upscale = model_id.first(UPSCALES)
    family = "_".join(filter(None, (model_id.family, model_id.first(VARIANTS))))
    mode = model_id.choose_mode(mode)
    least, most, modes = INPUTS.get(mode, (0, 0, (mode,)))
    mode = modes[min(images, len(modes) - 1)]
    product = find_product(model_id, family, mode, seconds, overrides)
    return Plan(
        model=model,
        kind="video" if product.seconds else "image",
        family=family,
        mode=product.mode,
        ratio=ratio,
        seconds=product.seconds,
        upscale=upscale,
        template=overrides.get(product.name, product.key),
        costs=product.costs(upscale, "ultra" in model_id.params),
        images=[least, OTHER_MOST.get((family, most), most)],
        note=model_id.note or FAMILY_NOTES.get(family, ""),
    )


def foreign_kind(model):
    """What an id of OpenAI's families makes, "image" or "video"; "" for any other id."""
    name = plain_id(model)
    return next((kind for kind, pattern in OPENAI_IDS if re.match(pattern, name)), "")


def plain_id(model):
    """openrouter/google/Veo-3.1:free -> veo-3.1: without what routers put around an id."""
    return re.sub(r"^([\w.-]+/)+|:\w+\Z", "", model).lower()


def parse_id(model, resolution=""):
    """resolution: as if the id ended in it. Raises model_not_found, invalid_request."""
    head, words, note = split_id(model)
    if resolution:
        words.append(resolution)
    may = {param.lower(): param for param in head.may}
    for word in words:
        if word.lower() not in may:
            can = ", ".join(head.may)
            raise bad(f"{model[:80]}: {word[:40]!r} is unknown; it takes {can}", "model")
    params = {may[word.lower()] for word in words}
    for group in EXCLUSIVE:
        both = [param for param in group if param in params]
        if len(both) > 1:
            raise bad(f"{model}: {' and '.join(both)} exclude each other", "model")
    return dataclasses.replace(head, text=model, note=note, params=params)


def split_id(model):
    """-> the head of an id, the words that follow, and a note. Raises model_not_found."""
    name, note = plain_id(model), ""
    for pattern, today, *told in OTHER_NAMES:
        name, times = re.subn(pattern, today, name)
        if times and told:
            note = told[0]
    if name.startswith(WIRE_STYLE):
        name = WIRE_STYLE + name.removeprefix(WIRE_STYLE).replace("_", "-")
    for start, head in HEADS.items():
        if f"{name}-".startswith(f"{start}-"):
            words = re.findall(r"-(4-3|3-4|[^-]*)(?=-|\Z)", name.removeprefix(start))
            return head, words, note
    close = " or ".join(difflib.get_close_matches(model, MODELS, 3, 0.5))
    hint = f"did you mean {close}?" if close else "GET /v1/models lists them"
    raise bad(f"There is no model {model[:80]!r}; {hint}", "model", "model_not_found")


def products_of(family, overrides):
    """The products of a family, and Omni's in the lengths that [models] adds, at the
    price of Omni 1.2: 3 credits a second, and 6 from the eleventh on."""
    own = [product for product in PRODUCTS if product.family == family]
    longer = [product for product in own if "{D}" in product.key]
    for seconds in map(int, re.findall(r"\d+", overrides.get(f"{family}_lengths", ""))):
        prices = [max(3 * seconds, 6 * seconds - 30)] * 3
        own += [dataclasses.replace(p, seconds=seconds, credits=prices) for p in longer]
    return own


def find_product(model_id, family, mode, seconds, overrides):
    """What makes it: as long as the id or the request says, else 8 s."""
    model = model_id.text
    length = LENGTHS.get(model_id.first(LENGTHS), seconds or 8)
    own = products_of(family, overrides)
    lengths = sorted({product.seconds for product in own})
    if mode == "image":
        length = 0
    elif length not in lengths or seconds not in (0, length):
        can = ", ".join(map(str, lengths))
        wish = seconds or length
        raise bad(f"{model} can't be {wish} s long; {family} can: {can}", "seconds")
    for product in own:
        if (product.mode, product.seconds) == (mode, length):
            return product
    has = ", ".join(dict.fromkeys(MODES[product.mode] for product in own))
    message = f"{model} has no {MODES[mode]!r} at {length} s; it has {has}"
    raise bad(message, "model", "mode_not_available")


# ---- 4. Records and store --------------------------------------------------------------
OPEN = ("queued", "submitting", "unknown", "running", "settling")
to_json = functools.partial(json.dumps, separators=(",", ":"), default=vars)
MIGRATIONS = (  # of what a later one drops, the earlier ones make no more than it needs
    """CREATE TABLE tokens (id INTEGER PRIMARY KEY, email TEXT NOT NULL UNIQUE,
        data TEXT NOT NULL);
    CREATE TABLE jobs (id TEXT PRIMARY KEY, state TEXT NOT NULL, created_at REAL NOT NULL,
        token_id INTEGER, data TEXT NOT NULL);
    CREATE INDEX jobs_by_time ON jobs (created_at);
    CREATE TABLE outputs (job_id TEXT NOT NULL, number INTEGER NOT NULL,
        name TEXT NOT NULL, data TEXT NOT NULL, PRIMARY KEY (job_id, number));
    CREATE TABLE settings (name TEXT PRIMARY KEY, data TEXT NOT NULL);
    PRAGMA user_version = 1;""",
    "CREATE TABLE keys (key, request, job_id, created_at); PRAGMA user_version = 2;",
    # Keys that clients gave are told from hashes of requests by a column, no more by a
    # line break; the state of an upscale is a word, no more to be guessed.
    """CREATE TABLE request_keys (explicit INTEGER NOT NULL, value TEXT NOT NULL,
        request TEXT NOT NULL, job_id TEXT NOT NULL, created_at REAL NOT NULL,
        PRIMARY KEY (explicit, value));
    INSERT INTO request_keys SELECT substr(key, 1, 1) <> char(10), ltrim(key, char(10)),
        request, job_id, created_at FROM keys;
    DROP TABLE keys;
    CREATE INDEX keys_by_time ON request_keys (created_at);
    CREATE TRIGGER drop_old_keys AFTER INSERT ON request_keys
        BEGIN DELETE FROM request_keys WHERE created_at < NEW.created_at - 172800; END;
    UPDATE outputs SET data = json_set(data, '$.original', json_extract(data, '$.made'),
        '$.upscale', CASE
            WHEN json_extract(data, '$.upscaled') THEN 'ended'
            WHEN json_extract(data, '$.made.name') IS NULL THEN 'none'
            WHEN json_extract(data, '$.made.name') = name THEN 'asked'
            ELSE 'running' END) WHERE json_valid(data);
    DROP TABLE IF EXISTS logs;
    PRAGMA user_version = 3;""",
    # So that a start reads few of very many jobs.
    """CREATE INDEX jobs_by_state_and_time ON jobs (state, created_at, id);
    DROP INDEX IF EXISTS jobs_by_state;
    CREATE INDEX jobs_by_token ON jobs (token_id, created_at);
    PRAGMA user_version = 4;""",
)


def in_memory(factory):
    """A field of a record that is not stored."""
    return field(default_factory=factory, metadata={"in_memory": True})


class Record:
    """A durable record: COLUMNS are columns of TABLE; the other fields are JSON in
    `data`, and a new one needs no migration."""

    __slots__ = ()

    @classmethod
    @functools.cache
    def stored(cls):
        """Its fields that are stored -> their types; a number's is that of any number."""
        numbers = dict.fromkeys((bool, int, float), int | float)
        kinds = get_type_hints(cls)
        return {
            item.name: numbers.get(kinds[item.name], kinds[item.name])
            for item in dataclasses.fields(cls)
            if "in_memory" not in item.metadata
        }

    @classmethod
    def from_rows(cls, rows):
        """Fields of another version are left out, and so is a row that can't be read: it
        takes no other along."""
        records = []
        for row in rows:
            try:
                values = {**json.loads(row["data"]), **row}
                fields = {name: values[name] for name in cls.stored() if name in values}
                record = cls(**fields)
                for name, kind in cls.stored().items():
                    if not isinstance(getattr(record, name), kind):
                        raise TypeError(f"{name} is of another type")
                records.append(record)
            except (ValueError, TypeError, RecursionError) as err:
                log.error("%s: row %s is left out: %s", cls.TABLE, row[0], err)
        return records

    def pick(self, *names):
        return {name: getattr(self, name) for name in names}

    def row(self):
        values = self.pick(*self.stored())
        columns = {name: values.pop(name) for name in self.COLUMNS}
        return {**columns, "data": to_json(values)}

    def update(self, **changes):
        """Sets fields; a name that is none raises AttributeError."""
        for name, value in changes.items():
            setattr(self, name, value)


@dataclass(frozen=True, order=True)
class Pause:
    """Of an account that steps back: until when, of how many seconds, and why."""

    until: float = 0.0
    seconds: float = 0.0
    error: GatewayError | None = field(default=None, compare=False)


@dataclass(slots=True, eq=False)
class Token(Record):
    """One Google account. Times are unix seconds, 0: never."""

    TABLE = "tokens"
    COLUMNS = ("id", "email")
    id: int = 0
    email: str = ""
    name: str = ""
    remark: str = ""
    adapter: str = "rest"  # the protocol that it speaks: a key of ADAPTERS
    proxy_url: str = ""
    st: str = ""  # session token
    at: str = ""  # access token
    at_expires: float = 0.0
    tier: str = ""  # a key of TIERS
    credits: int | None = None  # None: not known yet
    project_id: str = ""
    project_name: str = ""
    is_active: bool = True
    reason: str = ""  # why it is not active, in plain words
    reason_code: str = ""  # of ERRORS, where a failure has disabled it
    image_enabled: bool = True
    video_enabled: bool = True
    image_concurrency: int = -1  # jobs at once; 0 or less: no limit
    video_concurrency: int = -1
    failures: int = 0  # account failures in a row
    created_at: float = 0.0
    checked_at: float = 0.0
    last_used_at: float = 0.0
    image_count: int = 0
    video_count: int = 0
    error_count: int = 0
    use_count: int = 0
    day: str = ""  # that `today` counts
    today: dict = field(default_factory=dict)
    busy: Counter = in_memory(Counter)  # leases by kind
    reserved: int = in_memory(int)  # credits of leases whose submit has not been answered
    pauses: dict[str, Pause] = in_memory(dict)  # of a kind, a family, or "" of all
    suspicions: tuple[float, ...] = in_memory(tuple)  # when its session looked dead
    wakings: int = in_memory(int)  # in a row, by ourselves, after we have disabled it
    asked_at: float = in_memory(float)  # when Google was asked about it, answered or not
    asking: asyncio.Lock = in_memory(asyncio.Lock)
    removed: bool = in_memory(bool)
    lock: asyncio.Lock = in_memory(asyncio.Lock)

    @property
    def paused_until(self):
        """The end of its longest pause. To set it pauses all that it does; 0 ends all."""
        return self.pause_of(*self.pauses).until

    @paused_until.setter
    def paused_until(self, until):
        self.pauses = {"": Pause(until)} if until else {}

    def pause_of(self, *scopes):
        """The longest of the pauses of these scopes."""
        pauses = [self.pauses[scope] for scope in scopes if scope in self.pauses]
        return max(pauses, default=Pause())

    def is_dead(self):
        """Whether its session has looked so four times, over two minutes at least."""
        return len(self.suspicions) >= 4 and now() - self.suspicions[0] >= 120

    def cause(self):
        """The code of what pauses it now for longest, or has disabled it."""
        pause = self.pause_of(*self.pauses)
        if pause.error and pause.until > now():
            return pause.error.code
        return self.reason_code

    def paused_for(self):
        """Why it pauses now, and what of it."""
        return "; ".join(
            f"{scope or 'all'}: {pause.error or ''}"
            for scope, pause in self.pauses.items()
            if pause.until > now()
        )

    def session(self):
        return self.pick("adapter", "st", "at", "at_expires")

    def enabled(self, kind):
        return getattr(self, f"{kind}_enabled")

    def has_slot(self, kind):
        limit = getattr(self, f"{kind}_concurrency")
        return limit <= 0 or self.busy[kind] < limit

    def count(self, what, number):
        """Adds to a counter (image, video, error), for ever and for today."""
        total = f"{what}_count"
        setattr(self, total, getattr(self, total) + number)
        counts = self.counts_of_today()
        self.today = {**counts, what: counts.get(what, 0) + number}
        self.day = today()

    def counts_of_today(self):
        return self.today if self.day == today() else {}


class Upscale(enum.StrEnum):
    """Where the second step of an output stands."""

    NONE = "none"  # not begun, or not asked for
    ASKED = "asked"  # the request may have left; its answer has not come
    RUNNING = "running"  # Google has it, under the name that the output bears now
    ENDED = "ended"  # well or not


@dataclass(slots=True, eq=False)
class Output(Record):
    """One paid output of a job: Google's handle, and what became of it."""

    TABLE = "outputs"
    COLUMNS = ("job_id", "number", "name")
    job_id: str = ""
    number: int = 0
    name: str = ""  # what a status call asks for
    project: str = ""
    media: str = ""  # the name that later calls (upscale, download) want
    state: str = "pending"  # or "done", "failed"
    error: dict = field(default_factory=dict)
    url: str = ""
    url_expires: float = 0.0
    file: str = ""  # name of the kept file
    upscale: str = Upscale.NONE
    original: dict = field(default_factory=dict)  # once it is upscaled: the handle it had
    alone_at: float = in_memory(float)  # it spoilt a status call: when it is asked alone
    answers: int = in_memory(int)  # status answers so far
    heard_at: float = in_memory(float)  # when the last one came
    missing: int = in_memory(int)  # of them in a row, those that knew no such name

    def is_lost(self):
        """Whether Google, asked twice a minute apart, knows nothing of its upscale."""
        return self.upscale == Upscale.RUNNING and self.missing >= 2

    def handle(self):
        return self.pick("name", "media", "url", "url_expires", "file")


@dataclass(frozen=True)
class Generation:
    """One validated request of a client. Nothing has been spent yet."""

    plan: Plan
    prompt: str
    n: int = 1
    images: Iterable[bytes] = ()
    notes: list[str] = field(default_factory=list)  # what the client should be told
    source: dict = field(default_factory=dict)  # as in Job
    metadata: dict | None = None  # as in Job


@dataclass(slots=True, eq=False)
class Job(Record):
    """One generation, from its acceptance on. Times are unix seconds, 0: not yet."""

    TABLE = "jobs"
    COLUMNS = ("id", "state", "created_at", "token_id")
    id: str = ""
    state: str = "queued"
    created_at: float = 0.0
    token_id: int | None = None
    tier: str = ""  # of that account, when it was sent
    plan: Plan | None = None
    prompt: str = ""
    n: int = 1
    inputs: list = field(default_factory=list)  # names of the saved input pictures
    origin: str = ""  # the API that it came through
    detached: bool = False  # its client can come back for it
    project: str = ""
    batch: str = ""  # our mark on the submit, to find it by at Google
    submitted_at: float = 0.0
    completed_at: float = 0.0
    deadline: float = 0.0
    error: dict = field(default_factory=dict)  # as GatewayError.record
    notes: list = field(default_factory=list)
    source: dict = field(default_factory=dict)  # the clip that it is made from
    metadata: dict | None = None  # a client's own
    median: list = field(default_factory=list)  # seconds of earlier jobs, their number
    outputs: list[Output] = in_memory(list)  # rows of their own
    shunned: set[int] = in_memory(set)  # accounts that others go before
    tried: set[int] = in_memory(set)  # accounts that are not asked again
    turn: asyncio.Future | None = in_memory(lambda: None)  # in the queue: its token
    reserved: int = in_memory(int)  # credits, until its submit is answered
    changed: asyncio.Event = in_memory(asyncio.Event)
    stage: str = in_memory(str)  # what it is at, in words
    task: asyncio.Task | None = in_memory(lambda: None)
    percent: int = in_memory(int)
    look_at: float = in_memory(float)  # once it ran out of time: when to ask for it again
    clients: int = in_memory(int)  # that wait for it

    def __post_init__(self):
        if not isinstance(self.plan, Plan):  # as JSON keeps it
            self.plan = Plan(**self.plan)

    @property
    def kind(self):
        return self.plan.kind

    @property
    def ended(self):
        return self.state not in OPEN

    def done(self):
        return [output for output in self.outputs if output.state == "done"]

    @property
    def place(self):
        """By which jobs are listed."""
        return self.created_at, self.id

    def spent(self, token):
        """Credits that it costs its account."""
        cost = self.plan.cost(self.tier or token.tier) or 0
        return cost * self.n if self.submitted_at else 0


@dataclass(frozen=True)
class RequestKey:
    """What a repeated request is told by: the client's Idempotency-Key (explicit), or the
    hash of its path and body."""

    value: str
    request: str  # that hash
    explicit: bool


# Fails where it is no database of ours, in the newest version, or can't be written.
PROBE = """
    SELECT tokens.id, email, tokens.data, jobs.id, state, jobs.created_at, token_id,
        jobs.data, outputs.job_id, number, outputs.name, outputs.data, settings.name,
        settings.data, explicit, value, request, request_keys.job_id,
        request_keys.created_at
        FROM tokens, jobs, outputs, settings, request_keys LIMIT 0;
    DELETE FROM settings WHERE FALSE;
"""
JOB_FILTERS = {  # of a list of jobs
    "kind": "substr(id, 1, 5) = ?",
    "token_id": "token_id = ?",
    "model": "json_valid(data) AND json_extract(data, '$.plan.model') = ?",
    "q": "json_valid(data) AND instr(lower(json_extract(data, '$.prompt')), lower(?))",
}


class StoreError(Exception):
    """The database can't be used; the text says why."""


class Store:
    """SQLite in WAL mode. One thread writes what waits in one transaction, and
    `await put(…)` ends when the records are on the disk."""

    GROUP = 256  # writes in a transaction

    def __init__(self, folder):
        self.path = folder / "flow2api.db"
        self._waiting = deque()  # (steps, their future)
        self._reading = threading.Lock()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "store")

    def open(self):
        """Raises StoreError: also for what is no database of ours, which is left alone,
        and where another process uses this data folder."""
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._connections = []
        try:
            lock = self._connect(self.path.with_name("lock.db"), timeout=0)
            lock.execute("BEGIN EXCLUSIVE")  # a lock that works on every system
            if not self.path.exists():
                self._create()
            self._reader = self._connect(self.path)
            self._reader.row_factory = sqlite3.Row
            self._reader.text_factory = functools.partial(bytes.decode, errors="replace")
            self._migrate(self._inspect())
            self._writer = self._connect(self.path)
            self._writer.execute("PRAGMA synchronous=FULL")
        except sqlite3.Error as err:
            self.close()
            reason = f": {err}; nothing was changed, restore a backup"
            if re.search("CANTOP|READONLY|IOERR|FULL", getattr(err, "sqlite_errorname", "")):
                reason = f": {err}; can this user write it, and has its disk room?"
            if "locked" in str(err):
                reason = " is used by another Flow2API: stop it, or set another --data"
            raise StoreError(f"{self.path}{reason}") from None

    def _connect(self, path, timeout=10):
        if not path.exists():
            path.touch(0o600)
        connection = sqlite3.connect(path, timeout=timeout, check_same_thread=False)
        self._connections.append(connection)
        return connection

    def _create(self):
        """A new database, whole or not at all: an empty file is one that was lost."""
        draft = self.path.with_suffix(".new")
        draft.unlink(missing_ok=True)
        self._connect(draft).execute("PRAGMA journal_mode=WAL")
        self._connections.pop().close()
        draft.rename(self.path)

    def _inspect(self):
        """-> the version of its schema. Changes nothing. Raises sqlite3.DatabaseError."""
        if not self.path.stat().st_size:
            raise sqlite3.DatabaseError("the file is empty")
        sql = "SELECT * FROM pragma_integrity_check(1), pragma_user_version"
        ((health, version),) = self._rows(sql)
        if health != "ok":
            raise sqlite3.DatabaseError(" ".join(health.split()))
        if version > len(MIGRATIONS):
            raise sqlite3.DatabaseError("made by a newer Flow2API")
        if not version and self._rows("SELECT name FROM sqlite_master"):
            raise sqlite3.DatabaseError("this is another program's database")
        return version

    def _migrate(self, version):
        """To the newest version, all or nothing. Raises sqlite3.Error."""
        steps = " ".join(MIGRATIONS[version:])
        self._reader.executescript(f"BEGIN; {steps} {PROBE} COMMIT;")
        self._rows("PRAGMA journal_mode=WAL")

    def copy(self, target):
        """A consistent copy, also while another process is at work. Raises StoreError, and
        OSError where the target is there or can't be made."""
        target.touch(0o600, exist_ok=False)
        try:
            with self._beside() as source:
                source.execute("VACUUM INTO ?", (str(target),))
        except sqlite3.Error as err:
            target.unlink()
            raise StoreError(f"no copy of {self.path} to {target}: {err}") from None

    def set_beside(self, name, value):
        """Stores a setting beside another process. Raises sqlite3.Error."""
        with self._beside() as writer, writer:
            row = name, to_json(value)
            writer.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", row)

    def _beside(self):
        """A connection for a `with`, also while another process is at work."""
        address = f"{self.path.as_uri()}?mode=rw"  # where there is none, none is made
        return contextlib.closing(sqlite3.connect(address, uri=True))

    def close(self):
        self._thread.shutdown()  # once all is written
        for connection in reversed(self._connections):
            connection.close()

    def put(self, *records):
        """Writes the records as they are now, all or none."""
        return self.put_rows(*((record.TABLE, record.row()) for record in records))

    def put_rows(self, *rows):
        """Writes (table, row) pairs, all or none."""
        sql = "INSERT OR REPLACE INTO {} ({}) VALUES (:{})"
        return self._write([
            (sql.format(table, ", ".join(row), ", :".join(row)), row)
            for table, row in rows
        ])  # fmt: skip

    def put_setting(self, name, value):
        return self.put_rows(("settings", {"name": name, "data": to_json(value)}))

    def delete(self, *rows):
        """Deletes the rows of (table, column, value), all or none."""
        sql = "DELETE FROM {} WHERE {} = ?"
        return self._write([(sql.format(*row[:2]), row[2:]) for row in rows])

    def prune(self, before):
        """Deletes the hundred oldest ended jobs from before then, and their outputs."""
        old = f"""SELECT id FROM jobs WHERE created_at < ? AND state NOT IN {OPEN}
            ORDER BY created_at LIMIT 100"""
        return self._write([
            (f"DELETE FROM outputs WHERE job_id IN ({old})", [before]),
            (f"DELETE FROM jobs WHERE id IN ({old})", [before]),
            ("DELETE FROM request_keys WHERE created_at < ?", [before]),
        ])  # fmt: skip

    def _write(self, steps):
        """Queues (SQL, values) -> a future that ends when all is on disk."""
        written = concurrent.futures.Future()
        self._waiting.append((steps, written))
        self._thread.submit(self._write_group)
        future = asyncio.wrap_future(written)
        future.add_done_callback(lambda future: future.cancelled() or future.exception())
        return future

    def _write_group(self):
        size = min(len(self._waiting), self.GROUP)
        group = [self._waiting.popleft() for _ in range(size)]
        error = self._commit([step for steps, _ in group for step in steps])
        for steps, written in group:  # one that is refused takes no other along
            own_error = self._commit(steps) if error and size > 1 else error
            if not written.set_running_or_notify_cancel():
                continue
            if own_error:
                written.set_exception(own_error)
            else:
                written.set_result(None)

    def _commit(self, steps):
        try:
            with self._writer:  # a transaction: it commits, or rolls back
                for sql, values in steps:
                    self._writer.execute(sql, values)
        except (sqlite3.Error, ValueError, OverflowError) as err:
            error = StoreError(f"the database refused a write: {err}")
            log.error("%s", error)
            return error
        return None

    def _rows(self, sql, values=()):
        with self._reading:
            return self._reader.execute(sql, values).fetchall()

    def settings(self):
        rows = self._rows("SELECT name, data FROM settings WHERE json_valid(data)")
        return {str(name): json.loads(data) for name, data in rows}

    def tokens(self):
        return Token.from_rows(self._rows("SELECT * FROM tokens ORDER BY id"))

    def last_token_id(self):
        """The highest in any row, be it a job's, or one that can't be read; else 0."""
        sql = """SELECT max(id) FROM (SELECT id FROM tokens
            UNION SELECT max(token_id) FROM jobs WHERE token_id < 1e15)"""  # more is broken
        return self._rows(sql)[0][0] or 0

    def job(self, job_id):
        return next(iter(self._jobs("WHERE id = ?", [job_id])), None)

    def jobs(self, *, states=(), after=None, oldest_first=False, limit=-1, **filters):
        """Jobs, the newest first as a rule. `after`: the job that a page starts after;
        filters: of JOB_FILTERS, those that are not empty."""
        order, beyond = ("ASC", ">") if oldest_first else ("DESC", "<")
        tests = {JOB_FILTERS[name]: [value] for name, value in filters.items()}
        tests[f"state IN ({', '.join('?' * len(states))})"] = states
        tests[f"(created_at, id) {beyond} (?, ?)"] = after.place if after else ()
        tests = {sql: values for sql, values in tests.items() if any(values)}
        where = " AND ".join(tests) or "TRUE"
        sql = f"WHERE {where} ORDER BY created_at {order}, id {order} LIMIT ?"
        return self._jobs(sql, [*itertools.chain(*tests.values()), limit])

    def _jobs(self, where, values):
        rows = self._rows(f"SELECT * FROM jobs {where}", values)
        jobs = {job.id: job for job in Job.from_rows(rows)}
        sql = """SELECT * FROM outputs WHERE job_id IN (SELECT value FROM json_each(?))
            ORDER BY job_id, number"""
        for output in Output.from_rows(self._rows(sql, [to_json([*jobs])])):
            jobs[output.job_id].outputs.append(output)
        return list(jobs.values())

    def job_of_key(self, key, since):
        """(hash of the request, job id) of a key that came since then."""
        sql = """SELECT request, job_id FROM request_keys
            WHERE explicit = ? AND value = ? AND created_at > ?"""
        rows = self._rows(sql, (key.explicit, key.value, since))
        return tuple(rows[0]) if rows else None


# ---- 5. Network ------------------------------------------------------------------------
SHORT_TIMEOUT = aiohttp.ClientTimeout(15)
MAX_REPLY = 64 << 20  # bytes of a reply that is read as a whole
PROXY_SCHEMES = ("http://", "https://", "socks4://", "socks5://", "socks5h://")
PROXY_FORM = "must look like http://host:port or socks5://host:port"
MAX_TEXT = 4 << 20  # bytes of JSON beside letters and digits: pictures have hardly any
MAX_ITEMS = 200_000  # commas and brackets in JSON, and % in forms
MAX_DEPTH = 64
STEP = 1 << 20  # bytes that one call works on: meanwhile no other thread runs
HEAVY = concurrent.futures.ThreadPoolExecutor(1, "heavy")
BASE64 = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz+/="
# Beside what ipaddress calls not global. Of IPv6 all but one block is special: IPv4
# addresses stand in some (translated, NAT64, 6to4, Teredo), which could be inner ones.
SPECIAL_NETS = """192.0.0.0/24 192.88.99.0/24 198.18.0.0/15 224.0.0.0/3
    ::/3 4000::/2 8000::/1 2001::/23 2001:db8::/32 2002::/16 3fff::/20"""
SPECIAL_NETS = [ipaddress.ip_network(net) for net in SPECIAL_NETS.split()]


def mended(value, levels=MAX_DEPTH):
    """JSON's value, where half a surrogate pair in a text becomes a question mark. Raises
    RecursionError where lists and objects are nested in more levels."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode(errors="replace").decode()
    if isinstance(value, dict | list) and not levels:
        raise RecursionError
    if isinstance(value, list):
        return [mended(item, levels - 1) for item in value]
    if isinstance(value, dict):
        return {mended(name): mended(item, levels - 1) for name, item in value.items()}
    return value


def expect_light(raw):
    """Raises ValueError for untrusted text that would cost much more than its bytes."""
    text = raw.translate(None, BASE64)
    if len(text) > MAX_TEXT:
        raise ValueError(f"more than {MAX_TEXT >> 20} MB of it are no picture")
    if sum(map(text.count, (b",", b"[", b"{", b"%"))) > MAX_ITEMS:
        raise ValueError("it has too many elements")


def parse_json(raw):
    """The value of untrusted JSON, for little more than its bytes. Raises ValueError."""
    expect_light(raw)
    try:
        return mended(json.loads(raw.decode("utf-8-sig")))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


async def apart(size, call, *arguments):
    """The result of a call that works on so many bytes: if they are many, in a thread.
    It is one for all calls: several would take turns, and few would be the loop's."""
    if size > 1 << 16:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(HEAVY, call, *arguments)
    return call(*arguments)


def decode_base64(text):
    """The bytes of a data URL, or of base64 in either alphabet. Raises ValueError."""
    text = text.partition(",")[2] if text.startswith("data:") else text
    text = "".join(text.split()).replace("-", "+").replace("_", "/").rstrip("=")
    text += "=" * (-len(text) % 4)
    pieces = (text[at : at + STEP] for at in range(0, len(text), STEP))
    return b"".join(binascii.a2b_base64(piece, strict_mode=True) for piece in pieces)


def dig(body, *path, default="", kind=object):
    """body[a][b][c] of untrusted JSON; `default` where nothing, null or no `kind` is."""
    with contextlib.suppress(KeyError, IndexError, TypeError):
        for step in path:
            body = body[step]
        if isinstance(body, kind) and body is not None:
            return body
    return default


def text_at(body, *path):
    """dig() for a text."""
    return dig(body, *path, kind=str)


def list_at(body, name):
    """dig() for a list; a single thing is a list of one."""
    value = dig(body, name)
    return value if isinstance(value, list) else [value] if value else []


def good_proxy(url):
    """Whether it is a proxy's address, or none."""
    try:
        proxy = URL(url)
        host = (proxy.host or "").encode("idna")
    except ValueError:
        return False
    return not url or bool(host and proxy.port and url.startswith(PROXY_SCHEMES))


def read_ip(text):
    """An IP address; of ::ffff:127.0.0.1 the one in it. Raises ValueError."""
    ip = ipaddress.ip_address(text.split("%")[0])
    return getattr(ip, "ipv4_mapped", None) or ip


def is_public(host):
    """Whether an IP address is one of the open internet. Raises ValueError for a name."""
    ip = read_ip(host)
    return ip.is_global and not any(ip in net for net in SPECIAL_NETS)


def is_inner(url):
    """Whether a URL's host is of this machine or network, as far as its text tells."""
    host = urlsplit(url).hostname or ""
    try:
        return not is_public(host)
    except ValueError:
        return "." not in host or host.endswith((".local", ".internal", ".lan"))


def as_it_stands(url):
    """An address, byte by byte where it is a whole one: a signature can be over them."""
    return URL(url, encoded=url.isascii() and " " not in url)


def public_socket(address):
    """aiohttp's socket factory for strangers' URLs, which sees the real address."""
    host = address[4][0]
    if not is_public(host):
        raise OSError(f"{host} is not a public address (see server.allow_private_urls)")
    return socket.socket(*address[:3])


@functools.lru_cache
def read_networks(text):
    """The networks of a list like "127.0.0.1, 10.0.0.0/8". Raises ValueError."""
    items = text.replace(",", " ").split()
    return [ipaddress.ip_network(item, strict=False) for item in items]


@contextlib.contextmanager
def transport_errors(url, sent=None):
    """Whatever a transport raises (aiohttp, TLS, a SOCKS library, …) as a GatewayError.
    sent: an Event that is set where it may have arrived, and is then submit_unknown."""
    try:
        yield
    except GatewayError:
        raise
    except Exception as err:
        code = "submit_unknown" if sent and sent.is_set() else "upstream_unreachable"
        host = url.partition("//")[2].partition("/")[0].rpartition("@")[2]
        # Not str(err): that can hold a proxy's password.
        told = getattr(err, "os_error", "") or type(err).__name__
        told = getattr(told, "strerror", None) or told
        if isinstance(err, aiohttp.ClientHttpProxyError):  # 407: its password is wrong
            told = f"the proxy answers HTTP {err.status}"
        raise GatewayError(code, f"No reply of {host}: {told}") from None


async def chunks(response):
    """A body in pieces. Raises upstream_unreachable where it breaks off."""
    with transport_errors(str(response.url)):
        async for piece in response.content.iter_chunked(1 << 16):
            yield piece


async def read_bounded(response, limit):
    """The whole body; None where it is longer than `limit`."""
    data = bytearray()
    async for chunk in response.content.iter_chunked(1 << 16):
        data += chunk
        if len(data) > limit:
            return None
    return bytes(data)


async def note_sent(session, context, params):
    if sent := context.trace_request_ctx:
        sent.set()


class Wire:
    """Outgoing HTTP: a session per proxy. Submits get fresh connections: on a kept one
    that the other side has just closed, nobody would know whether the request arrived."""

    def __init__(self, settings):
        self.settings = settings
        self.sessions = {}  # (SOCKS proxy, fresh or not, public or not) -> session

    async def call(self, method, url, *, proxy="", spends=False, **options):
        """-> (response, its whole body). proxy: an address, "" for that of the settings.
        Raises proxy_unavailable; upstream_unreachable; where it `spends` and may have
        arrived, submit_unknown; upstream_changed for an endless reply."""
        sent = asyncio.Event() if spends else None
        with transport_errors(url, sent):
            async with await self._open(method, url, proxy, options, sent) as response:
                data = await read_bounded(response, MAX_REPLY)
        if data is None:
            code = "submit_unknown" if spends else "upstream_changed"
            raise GatewayError(code, f"The reply is longer than {MAX_REPLY >> 20} MB")
        return response, data

    @contextlib.asynccontextmanager
    async def stream(self, url, *, proxy="", public=False, **options):
        """A response to GET, unread. public: neither its address nor where that leads to
        is an inner one, unless Flow's is. Raises proxy_unavailable, upstream_unreachable."""
        public = public and not is_inner(self.settings["flow.api_base_url"])
        with transport_errors(url):
            if public and is_inner(url):
                message = "Google's file is not at a public address"
                raise GatewayError("upstream_unreachable", message)
            response = await self._open("GET", url, proxy, options, public=public)
        with contextlib.closing(response):
            yield response

    async def _open(self, method, url, proxy, options, sent=None, public=False):
        """sent: of a submit, an Event to be set as soon as it may have arrived."""
        if not proxy and self.settings["proxy.proxy_enabled"]:
            proxy = self.settings["proxy.proxy_url"] or "none"
        if not good_proxy(proxy):
            raise GatewayError("proxy_unavailable", f"A proxy {PROXY_FORM}")
        socks, plain = (proxy, None) if proxy.startswith("socks") else ("", proxy or None)
        public = public and not proxy  # a proxy may be an inner one
        session = self._session(socks, sent is not None, public)
        options.update(proxy=plain, trace_request_ctx=sent)
        return await session.request(method, as_it_stands(url), **options)

    def _session(self, *key):
        """As new_session; kept for all that want the same."""
        if key not in self.sessions:
            self.sessions[key] = new_session(*key)
        return self.sessions[key]

    async def fetch_public(self, url, limit, param):
        """A user's URL: public addresses only (each redirect too), no proxy, 20 s. Raises
        invalid_image, request_too_large."""
        session = self._session("", True, not self.settings["server.allow_private_urls"])
        try:
            with transport_errors(url):
                async with session.get(
                    as_it_stands(url),
                    timeout=aiohttp.ClientTimeout(20),
                    max_redirects=4,
                    headers={"User-Agent": f"Flow2API/{__version__}"},
                ) as response:
                    data = await read_bounded(response, limit)
        except GatewayError as err:
            told = f"The picture's URL: {err}"
            if self.settings["proxy.proxy_enabled"]:
                told += " (the proxy is for Google alone, not for the URLs of pictures)"
            raise bad(told, param, "invalid_image") from None
        if response.status != 200:
            told = f"The picture's URL: HTTP {response.status}"
            raise bad(told, param, "invalid_image")
        if data is None:
            raise too_large(limit, param)
        return data

    async def close(self):
        for session in self.sessions.values():
            await session.close()


def new_session(socks, fresh, public):
    """fresh: each request by a connection of its own. public: to public addresses only.
    Raises proxy_unavailable."""
    options = {"limit": 0, "force_close": fresh}
    if socks:
        try:
            from aiohttp_socks import ProxyConnector
        except ImportError:
            message = "A SOCKS proxy needs: pip install aiohttp-socks"
            raise GatewayError("proxy_unavailable", message) from None
        address = socks.replace("socks5h:", "socks5:")
        connector = ProxyConnector.from_url(address, **options)
    else:
        factory = public_socket if public else None
        connector = aiohttp.TCPConnector(socket_factory=factory, **options)
    trace = aiohttp.TraceConfig()
    trace.on_request_headers_sent.append(note_sent)
    return aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        requote_redirect_url=False,
        trace_configs=[trace],
    )


# ---- 6. Upstream -----------------------------------------------------------------------
# Wire facts: captures of Flow's web client and of public clients, up to August 2026.
SESSION_COOKIE = "__Secure-next-auth.session-token"  # .0, .1: the parts of a long one
PASTED_COOKIE = re.compile(
    r"next-auth\.session-token(?:\.(\d))?"  # its name, perhaps that of a part
    r"[\"']?(?:[ \t]*[=:][ \t]*|\s+)[\"']?([^;,\s\"']+)"
)
WIRE_RATIOS = {
    "landscape": "LANDSCAPE",
    "portrait": "PORTRAIT",
    "square": "SQUARE",
    "4-3": "LANDSCAPE_FOUR_THREE",
    "3-4": "PORTRAIT_THREE_FOUR",
}
CLIP_PATH = "video:batchAsyncGenerateVideo"  # and then, by mode:
SUBMIT_PATHS = {
    "text": "Text",
    "start": "StartImage",
    "frames": "StartAndEndImage",
    "references": "ReferenceImages",
    "extend": "ExtendVideo",
    "edit": "EditVideo",
}
MEDIUM_NAME = re.compile(r"[A-Za-z0-9][ -~]{0,499}")
# By how Google's words begin (SUCCESSFUL, CANCELLED …); what has another is on its way.
WIRE_STATES = dict(SUCC="done", COMP="done", FAIL="failed", ERRO="failed", CANC="failed")


@dataclass(frozen=True)
class Status:
    """What Google says of one output."""

    name: str
    state: str = "pending"  # or "done", "failed", "missing": Google knows no such name
    media: str = ""  # the name that later calls (upscale, download) want
    project: str = ""
    url: str = ""
    data: bytes = b""  # the file itself, where the reply carried it
    error: GatewayError | None = None


@dataclass(frozen=True)
class Reply:
    """What Google says of many, and the balance where it tells that."""

    statuses: list[Status]
    credits: int | None = None


@dataclass(frozen=True)
class Link:
    """A signed address of a file, and the unix second of its end."""

    url: str
    expires: float


class Upstream(Protocol):
    """An adapter to one of Google's protocols. All calls raise GatewayError. What it
    keeps on a token (session, access token, project) is its own business."""

    def expires_soon(self, token): ...  # -> bool: should the session be renewed?
    async def sign_in(self, token): ...  # renews it -> {email, name}; session_ended
    async def balance(self, token): ...  # -> {credits, tier}; costs nothing
    # -> where outputs go; made where none is, or only one that Flow has no more
    async def project(self, token, gone=""): ...
    async def upload(self, token, project, data, media_type): ...  # -> name of the medium
    async def submit(self, token, job, media): ...  # -> Reply on all n; submit_unknown
    async def find(self, token, job): ...  # -> [Status] of what a lost submit has made
    async def poll(self, token, outputs): ...  # -> Reply; one call for many, as a rule
    async def upscale(self, token, job, output): ...  # -> Status of the larger form
    def upscaled(self, output): ...  # -> Status of that clip, where the answer was lost
    async def resolve(self, token, output, thumbnail=False): ...  # -> a fresh Link


def clean_session_token(text):
    """The bare token of what people paste: a value, `name=value`, `name: value`, a Cookie
    header, an export as JSON or in Netscape's format. Else the text, but stripped."""
    cookies = []
    header = ""

    def collect(item):
        cookies.extend([(item.get("name"), item.get("value")), *item.items()])

    with contextlib.suppress(ValueError, RecursionError):  # it is no JSON
        json.loads(text, object_hook=collect)
        header = "".join(f"{name}={value};" for name, value in cookies)
    parts = dict(PASTED_COOKIE.findall(header or text))
    numbers = [str(number) for number in range(len(parts))]
    if "" in parts:
        return parts[""]
    if len(parts) > 1 and sorted(parts) == numbers:  # a single part is never all
        return "".join(map(parts.get, numbers))
    return text.strip("\"'; \t\r\n")


def client_context(project, tier=""):
    """The part of a request that says who asks."""
    session_id = f";{int(now() * 1000)}"
    context = {"sessionId": session_id, "projectId": project, "tool": "PINHOLE"}
    if tier:
        context["userPaygateTier"] = tier
    return context


def submit_request(job, tier, media):
    """Body of a submit: an element with a seed of its own for each output."""
    build = picture_request if job.kind == "image" else clip_request
    element, body = build(job, tier, media)
    seeds = random.sample(range(1, 100_000), job.n)
    return {**body, "requests": [{**element, "seed": seed} for seed in seeds]}


def picture_request(job, tier, media):
    """-> the element of one picture, and what stands beside the elements."""
    kind = "IMAGE_INPUT_TYPE_REFERENCE"
    context = client_context(job.project)
    element = {
        "clientContext": context,
        "imageModelName": job.plan.key(tier),
        "imageAspectRatio": f"IMAGE_ASPECT_RATIO_{WIRE_RATIOS[job.plan.ratio]}",
        "structuredPrompt": {"parts": [{"text": job.prompt}]},
        "imageInputs": [{"name": name, "imageInputType": kind} for name in media],
    }
    return element, {
        "clientContext": context,
        "mediaGenerationContext": {"batchId": job.batch},
        "useNewMedia": True,
    }


def clip_request(job, tier, media):
    """-> the element of one clip, and what stands beside the elements."""
    element = {
        "videoModelKey": job.plan.key(tier),
        "aspectRatio": f"VIDEO_ASPECT_RATIO_{WIRE_RATIOS[job.plan.ratio]}",
        "textInput": {"structuredPrompt": {"parts": [{"text": job.prompt}]}},
        "metadata": {},
    }
    if job.source:
        element["videoInput"] = {"mediaId": job.source["media"]}
        element["metadata"] = {"workflowId": str(uuid.uuid4())}
    elif job.plan.mode == "references":
        kind = {"imageUsageType": "IMAGE_USAGE_TYPE_ASSET"}
        element["referenceImages"] = [{**kind, "mediaId": name} for name in media]
    else:
        for frame, name in zip(("startImage", "endImage"), media, strict=False):
            element[frame] = {"mediaId": name}
    group = {"batchId": job.batch, "audioFailurePreference": "BLOCK_SILENCED_VIDEOS"}
    return element, {
        "clientContext": client_context(job.project, tier),
        "mediaGenerationContext": group,
        "useV2ModelConfig": True,
    }


def upscale_request(job, tier, output):
    size = job.plan.upscale
    element = {
        "videoInput": {"mediaId": output.media},
        "metadata": {"sceneId": str(uuid.uuid4())},
        "videoModelKey": f"veo_3_1_upsampler_{size}",
        "seed": random.randrange(99999),
        "aspectRatio": f"VIDEO_ASPECT_RATIO_{WIRE_RATIOS[job.plan.ratio]}",
        "resolution": f"VIDEO_RESOLUTION_{size.upper()}",
    }
    context = client_context(job.project, tier)
    return {"clientContext": context, "requests": [element], "useV2ModelConfig": True}


def read_statuses(body, code="upstream_changed"):
    """-> Reply: whatever lists outputs, in media[], or in workflows[] alone. An entry of
    unknown shape raises `code`; if that is empty, it is left out, and an odd address
    alone: the output can be asked for another one."""
    statuses = {}
    flows = list_at(body, "workflows")  # each names its medium
    names = ({"name": dig(flow, "metadata", "primaryMediaId")} for flow in flows)
    for item in list_at(body, "media") or names:
        try:
            status = read_medium(item, strict=code)
            statuses.setdefault(status.name, status)
        except (KeyError, TypeError, AttributeError, ValueError) as err:
            if code:
                raise GatewayError(code, f"Google's reply is odd: {err!r}") from None
    return Reply([*statuses.values()], read_number(dig(body, "remainingCredits")))


def read_number(value):
    """A whole number that Google wrote as one, or as a text; None for anything else."""
    text = str(value) if isinstance(value, int | float | str) else ""
    number = re.fullmatch(r"([0-9]{1,15})(\.[0-9]+)?", text)
    return int(number[1]) if number else None


def read_address(item, strict):
    url = dig(item, "image", "generatedImage", "fifeUrl")
    url = url or dig(item, "video", "generatedVideo", "fifeUrl")
    try:
        read_link(url)  # it is an address, or empty
    except (TypeError, ValueError):
        if strict:
            raise
        return ""
    return url


def read_medium(item, strict):
    """-> Status of an element of media[] in submit, status and listing replies. Raises
    KeyError, TypeError, AttributeError, ValueError where it has another shape."""
    name = item["name"]
    project = dig(item, "projectId")
    url = read_address(item, strict)
    if not MEDIUM_NAME.fullmatch(name) or not isinstance(project, str):
        raise ValueError(f"the name or the project of {name[:40]!r}")
    status = dig(item, "mediaMetadata", "mediaStatus")
    word = dig(status, "mediaGenerationStatus").removeprefix("MEDIA_GENERATION_STATUS_")
    if not word and (url or dig(item, "image")):
        word = "SUCCESSFUL"
    state = WIRE_STATES.get(word[:4], "pending")
    error = None
    if state == "failed":
        reasons = [dig(status, "error", "message"), *list_at(status, "failureReasons")]
        error = failed_output(" ".join(map(str, reasons)))
    data = b""
    with contextlib.suppress(ValueError):  # it is no base64: Google still has the file
        data = base64.b64decode(text_at(item, "video", "encodedVideo"))
    return Status(name, state, name, project, url, data, error)


def read_link(url):
    """-> Link; of an hour where a signed address doesn't tell its end (Google's: 5 h).
    Raises ValueError, TypeError where it is neither an address nor empty."""
    if not re.fullmatch(r"(https?://[^\0- \x7f]+)?", url):
        raise ValueError(f"{url[:40]!r} is no address")
    expires = read_number(dig(parse_qs(urlsplit(url).query), "Expires", 0))
    return Link(url, expires or now() + 3600)


def read_answer(response, body, spends=False):
    """A reply's JSON object. Raises google_error; upstream_changed; where it `spends`,
    submit_unknown for whatever may hide a success."""
    status = response.status
    if isinstance(body, dict) and status < 300:
        return body
    error = dig(body, "error", "json") or dig(body, "error")  # tRPC wraps it once more
    details = list_at(error, "details")
    reason = " ".join(text_at(item, "reason") for item in details).strip()
    refused = 400 <= status < 500 and status not in (408, 499)
    if spends and not refused and "PUBLIC_ERROR" not in reason:
        raise GatewayError("submit_unknown", f"Google's answer is no JSON: HTTP {status}")
    if status < 300:
        raise changed("Google answered with something else than JSON")
    wait = read_number(response.headers.get("Retry-After")) or 0
    raise google_error(status, reason, text_at(error, "message"), min(wait, 86400))


STATUS_CHUNK = 256  # names in a status call
STATUS_ALONE = 20  # of those that are asked for one by one, at a time


class RestFlow:
    """The adapter to labs.google (sessions, projects) and the aisandbox REST API."""

    def __init__(self, settings, wire, store, captcha_source=None):
        """captcha_source: (token, IMAGE_GENERATION or VIDEO_GENERATION) -> awaitable
        token of reCAPTCHA, lent by the owner's own browser; None: requests go without."""
        self.settings, self.wire, self.store = settings, wire, store
        self.captcha_source = captcha_source
        self.refreshes = asyncio.Semaphore(4)  # renewals of sessions at a time

    async def _call(self, token, site, path, headers, **options):
        """-> (response, its JSON or None). site: labs, api. What has `json` is a POST."""
        method = "POST" if "json" in options else "GET"
        url = f"{self.settings[f'flow.{site}_base_url'].rstrip('/')}/{path}"
        timeout = aiohttp.ClientTimeout(self.settings["flow.timeout"], sock_connect=20)
        options.update(headers=headers, timeout=timeout, proxy=token.proxy_url)
        response, data = await self.wire.call(method, url, **options)
        if self.settings["admin.debug"]:
            log.info("%s %s for %s: HTTP %s", method, url, token.email, response.status)
        body = None
        with contextlib.suppress(ValueError):
            body = await apart(len(data), parse_json, data)
        return response, body

    async def _labs(self, token, path, **options):
        """A call to labs.google, which knows the session by its cookie. A session that
        has been replaced meanwhile says nothing of the new one."""
        st = None
        while st != token.st:
            st = token.st
            cookie = {"Cookie": f"{SESSION_COOKIE}={st}"}
            answer = await self._call(token, "labs", path, cookie, **options)
        return answer

    async def _trpc(self, token, path, **options):
        """A tRPC call -> its inner object, which can hold a refusal under HTTP 200."""
        response, body = await self._labs(token, f"trpc/{path}", **options)
        if response.status == 401:
            raise session_ended("Google refused the session token")
        body = dig(read_answer(response, body), "result", "data", "json", default={})
        status = dig(body, "status", kind=int, default=200)
        if status != 200:
            raise google_error(status, "", text_at(body, "statusText"))
        return body

    async def _api(self, token, path, *, spends=False, **options):
        """A call with an access token -> its JSON object. A refused one is renewed once: a
        401 comes before any billing. A redirect of a submit could be paid twice."""
        options.update(spends=spends, allow_redirects=not spends)
        access = ""
        for _ in range(2):
            async with token.lock:  # a renewal serves all who wait
                if not token.at or token.at == access:
                    await self._open_session(token)
                access = token.at
            bearer = {"Authorization": f"Bearer {access}"}
            reply, body = await self._call(token, "api", path, bearer, **options)
            if reply.status != 401:
                return read_answer(reply, body, spends)
        raise session_ended("Google refuses even a fresh access token")

    def expires_soon(self, token):
        return token.at_expires - now() < 600

    async def sign_in(self, token):
        async with token.lock:
            return await self._open_session(token)

    async def _open_session(self, token):
        """GET auth/session. Of a dead session Google says so with HTTP 200 and {}."""
        async with self.refreshes:
            response, body = await self._labs(token, "auth/session")
        body = read_answer(response, body)
        access = text_at(body, "access_token")
        if not access or dig(body, "error"):
            raise session_ended("Session ended. Sign in to Flow again, paste its token")
        if not re.fullmatch("[!-~]{1,4000}", access):
            raise changed("Google gave an odd access token")
        expires = now() + 3600
        with contextlib.suppress(ValueError, OverflowError):
            end = datetime.datetime.fromisoformat(text_at(body, "expires"))
            expires = end.astimezone(datetime.UTC).timestamp()  # of a year that can be shown
        cookie = response.cookies.get(SESSION_COOKIE)
        if cookie and re.fullmatch("[!-~]{200,}", cookie.value):  # Google has renewed it
            token.st = cookie.value
        await self._keep(token, at=access, at_expires=expires)
        return {name: text_at(body, "user", name)[:200] for name in ("email", "name")}

    async def _keep(self, token, **changes):
        token.update(**changes)
        if token.id and not token.removed:
            with contextlib.suppress(StoreError):  # a full disk: what is in memory counts
                await self.store.put(token)

    async def balance(self, token):
        """GET credits. Google leaves a balance of zero out."""
        body = await self._api(token, "credits")
        credits = read_number(dig(body, "credits", default=0))
        if credits is None:
            raise changed("Google tells the balance in an unknown form")
        return {"credits": credits, "tier": text_at(body, "userPaygateTier")}

    async def project(self, token, gone=""):
        """POST project.createProject, once per account, and for one that is gone."""
        async with token.lock:
            if token.project_id not in ("", gone):
                return token.project_id
            title = token.project_name or time.strftime("%b %d - %H:%M")
            request = {"json": {"projectTitle": title, "toolName": "PINHOLE"}}
            body = await self._trpc(token, "project.createProject", json=request)
            project = text_at(body, "result", "projectId")
            if not MEDIUM_NAME.fullmatch(project):
                raise changed("Google's answer names no new project")
            await self._keep(token, project_id=project, project_name=title)
            return project

    async def upload(self, token, project, data, media_type):
        """POST flow/uploadImage. An answer without a name is a silent refusal."""
        request = {
            "clientContext": client_context(project),
            "fileName": f"flow2api_{int(now() * 1000)}.{media_type.partition('/')[2]}",
            "isHidden": False,
            "isUserUploaded": True,
            "mimeType": media_type,
            "imageBytes": (await asyncio.to_thread(base64.b64encode, data)).decode(),
        }
        body = await self._api(token, "flow/uploadImage", json=request)
        if name := text_at(list_at(body, "media"), 0, "name"):
            return name
        raise bad(f"{POLICY} (a logo?)", code="content_policy_violation")

    async def _lend_captcha(self, token, job, request):
        """Adds a reCAPTCHA token, where there is a source of them."""
        if self.captcha_source:
            action = f"{job.kind.upper()}_GENERATION"
            request["clientContext"]["recaptchaContext"] = {
                "token": await self.captcha_source(token, action),
                "applicationType": "RECAPTCHA_APPLICATION_TYPE_WEB",
            }

    async def submit(self, token, job, media):
        if job.kind == "image":
            path = f"projects/{quote(job.project, safe='')}/flowMedia:batchGenerateImages"
        else:
            path = CLIP_PATH + SUBMIT_PATHS[job.plan.mode]
        request = submit_request(job, token.tier, media)
        await self._lend_captcha(token, job, request)
        body = await self._api(token, path, spends=True, json=request)
        reply = read_statuses(body, "submit_unknown")
        if not reply.statuses:
            raise GatewayError("submit_unknown", "Google answered a submit with nothing")
        return reply

    async def find(self, token, job):
        """GET flow.projectInitialData, where the submit's batch id is looked for."""
        query = quote(to_json({"json": {"projectId": job.project}}))
        body = await self._trpc(token, f"flow.projectInitialData?input={query}")
        contents = dig(body, "projectContents", kind=dict, default=None)
        if contents is None:  # no proof that nothing was made
            raise changed("Google lists the project in an unknown form")
        flows = list_at(contents, "workflows")
        own = [flow for flow in flows if dig(flow, "metadata", "batchId") == job.batch]
        names = {text_at(flow, "name") for flow in own} - {""}
        media = list_at(contents, "media")
        media = [item for item in media if text_at(item, "workflowId") in names]
        return read_statuses({"media": media, "workflows": own}).statuses

    async def poll(self, token, outputs):
        """Google refuses a whole status call for one bad name: then its names are asked
        for one by one, and the bad one is left out for a minute."""
        rest = [output for output in outputs if not output.alone_at]
        calls = [rest[at : at + STATUS_CHUNK] for at in range(0, len(rest), STATUS_CHUNK)]
        due = [output for output in outputs if 0 < output.alone_at <= now()]
        calls += [[output] for output in due[:STATUS_ALONE]]
        statuses = []
        balance = None
        for call in calls:
            reply = await self._poll(token, call)
            statuses += reply.statuses
            if reply.credits is not None:
                balance = reply.credits
        return Reply(statuses, balance)

    async def _poll(self, token, outputs):
        path = "video:batchCheckAsyncVideoGenerationStatus"
        media = [{"name": out.name, "projectId": out.project} for out in outputs]
        try:
            body = await self._api(token, path, json={"media": media})
        except GatewayError as err:
            if err.upstream not in (400, 404):
                raise
            pause = 60 if len(outputs) == 1 else 0
            for output in outputs:
                output.alone_at = now() + pause
            if pause and err.upstream == 404:
                return Reply([Status(outputs[0].name, "missing")])
            return Reply([])
        for output in outputs:
            output.alone_at = 0.0
        return read_statuses(body, "")

    async def upscale(self, token, job, output):
        """A larger picture comes at once, as data, and costs nothing. A clip is polled
        under a name that is known before: a lost answer or "under way" is no loss."""
        if job.kind == "image":
            return await self._enlarge(token, job, output)
        path = f"{CLIP_PATH}UpsampleVideo"
        request = upscale_request(job, token.tier, output)
        await self._lend_captcha(token, job, request)
        try:
            body = await self._api(token, path, spends=True, json=request)
        except GatewayError as err:
            if err.code not in ("conflict", "submit_unknown"):
                raise
            body = {}
        statuses = read_statuses(body, "").statuses
        return statuses[0] if statuses else self.upscaled(output)

    async def _enlarge(self, token, job, output):
        request = {
            "mediaId": output.media,
            "targetResolution": f"UPSAMPLE_IMAGE_RESOLUTION_{job.plan.upscale}",
            "clientContext": client_context(job.project, token.tier),
        }
        await self._lend_captcha(token, job, request)
        body = await self._api(token, "flow/upsampleImage", json=request)
        encoded = text_at(body, "encodedImage")
        with contextlib.suppress(ValueError):
            if data := await apart(len(encoded), decode_base64, encoded):
                return Status(output.name, "done", output.media, data=data)
        raise changed("Google sent no larger picture")

    def upscaled(self, output):
        name = output.media + "_upsampled"
        return Status(name, media=name, project=output.project)

    async def resolve(self, token, output, thumbnail=False):
        name = quote(output.media or output.name, safe="")
        form = "MEDIA_URL_TYPE_" + ("THUMBNAIL" if thumbnail else "FULL_MEDIA")
        path = f"trpc/media.getMediaUrlRedirect?name={name}&mediaUrlType={form}"
        response, body = await self._labs(token, path, allow_redirects=False)
        location = response.headers.get("Location")
        if location and response.status < 400:
            with contextlib.suppress(ValueError):
                return read_link(location)
        if response.status == 404:
            raise GatewayError("content_not_found", "Flow has no such file", upstream=404)
        read_answer(response, body)
        raise changed("Google gave no download address")


ADAPTERS = {"rest": RestFlow}  # by Token.adapter
# ---- 7. Pool ---------------------------------------------------------------------------
AWAKE = {
    "is_active": True,
    "reason": "",
    "reason_code": "",
    "failures": 0,
    "paused_until": 0.0,
    "suspicions": (),
}
SUSPECT_PAUSE, LONGEST_PAUSE = 50, 3600  # at most, in seconds
BLAMED = (Effect.ACCOUNT, Effect.BAN, Effect.SESSION)
OF_A_MODEL = ("account_daily_quota", "model_not_for_account")  # not of all its kind


def backoff(first=2.0, times=sys.maxsize):
    """Seconds to pause between tries: each time twice as many, up to 60, and jittered."""
    for _ in range(times):
        yield min(60.0, first) * random.uniform(0.8, 1.2)
        first *= 2


class Pool:
    """The accounts: in memory, written on change. Leases, step-back, who goes next."""

    def __init__(self, settings, store, adapters):
        self.settings = settings
        self.store = store
        self.adapters = adapters
        self.tokens = {}
        for token in store.tokens():
            if token.adapter in adapters:
                self.tokens[token.id] = token
            else:
                log.error("%s is left out: its adapter is unknown", token.email)
        self.last_id = store.last_token_id()  # never given twice
        self.leases = {}  # job id -> the token that has a slot taken for it
        self.queue = []  # of jobs that wait for a token
        self._alarm = None

    def adapter_for(self, token) -> Upstream:
        return self.adapters[token.adapter]

    async def sign_in(self, draft):
        """-> {email, name}. A session that somebody brings when it has ended is a mistake
        in the request, and blames no account."""
        try:
            return await self.adapter_for(draft).sign_in(draft)
        except GatewayError as err:
            if err.effect is not Effect.SESSION:
                raise
            message = (
                "Google says that this session has ended. Sign in to Flow again in your"
                " browser, and paste the new value of its cookie"
            )
            raise bad(message, "st") from err

    async def add(self, st, wakes=lambda token: True, **fields):
        """The account of a session token -> (token, is it new). wakes: whether that
        enables a token. Raises as sign_in."""
        draft = Token(st=clean_session_token(st), created_at=now())
        draft.update(**fields)
        account = await self.sign_in(draft)
        if not account["email"]:
            raise changed("Google's session names no e-mail address")
        tokens = {token.email: token for token in self.tokens.values()}
        token = tokens.get(account["email"], draft)
        if token is draft:
            self.last_id = draft.id = self.last_id + 1
            self.tokens[draft.id] = draft
        awake = AWAKE if wakes(token) else {}
        await self.update(token, **{**account, **draft.session(), **awake, **fields})
        try:
            await self.check(token)
        except GatewayError as err:
            log.warning("%s is in the pool, but: %s", token.email, err)
            if err.code == "upstream_retired":
                self.disable(token, err)
            if err.effect in BLAMED:
                self.blame(token, err)
        return token, token is draft

    async def update(self, token, **changes):
        token.update(**changes)
        if not token.removed:
            await self.store.put(token)
        self.wake()

    def disable(self, token, err):
        """Because of this error; `ask` wakes it once Google answers well again."""
        token.update(is_active=False, reason=f"{err} ({err.code})", reason_code=err.code)
        token.checked_at = now()
        log.warning("%s is disabled: %s", token.email, token.reason)

    async def remove(self, token):
        """Raises conflict."""
        if token.busy.total():
            raise bad(f"Disable {token.email} first: jobs under way", code="conflict")
        token.removed = True
        self.tokens.pop(token.id, None)  # somebody else may have deleted it just now
        try:
            await self.store.delete(("tokens", "id", token.id))
        except StoreError:  # else it would come back at the next start
            self.tokens[token.id] = token
            token.removed = False
            raise

    async def check(self, token):
        """Renews a session that ends soon, asks for credits and tier, and for a project
        where it has none."""
        adapter = self.adapter_for(token)
        if adapter.expires_soon(token):
            await adapter.sign_in(token)
        await self.update(token, **await adapter.balance(token), checked_at=now())
        await adapter.project(token)

    async def examine(self, token, call):
        """A call that the owner asks for: a session that looks dead twice is told on the
        account at once, and one that lives again, too. Raises as the call."""
        for again in (True, False):
            try:
                await call(token)
                break
            except GatewayError as err:
                if again and err.effect is Effect.SESSION:
                    continue
                if err.effect is Effect.SESSION and (token.is_active or token.reason):
                    self.disable(token, err)
                    await self.update(token, wakings=-6)  # if it's a hiccup: in a minute
                raise
        if token.reason_code == "account_session_ended":
            await self.update(token, **AWAKE)

    async def ask(self, token, since):
        """Checks it, once for all who ask, unless that was begun since then; a failure is
        told in the log. One that we have disabled wakes up where all is well again."""
        async with token.asking:
            if token.asked_at >= since:
                return
            token.asked_at = now()
            if token.reason:
                token.update(wakings=token.wakings + 1, checked_at=now())
            try:
                await self.check(token)
                if token.reason:
                    await self.update(token, **AWAKE)
                    log.info("%s serves again", token.email)
                token.suspicions = ()
            except (GatewayError, StoreError) as err:  # a full disk ends no loop
                log.warning("check of %s: %s", token.email, err)
                self.suspect(token, err)

    async def keep_fresh(self):
        """For ever: asks about the accounts that are due, begun one after the other."""
        while True:
            async with asyncio.TaskGroup() as group:
                for token in filter(self.is_due, list(self.tokens.values())):
                    group.create_task(self.ask(token, now()))
                    await asyncio.sleep(1 / 4)
            await asyncio.sleep(30)

    def is_due(self, token):
        """By `token_refresh.interval` and its expiry, where that is on; a suspect after
        each pause; one that we, not its owner, have disabled after 1, 2, 4 … hours, but
        from a minute on where that was by `examine`."""
        age = now() - token.checked_at
        if not token.is_active:
            return token.reason != "" and age > min(3600 * 2.0**token.wakings, 86400)
        if token.suspicions:
            return token.pause_of("").until <= now()
        soon = self.adapter_for(token).expires_soon(token)
        rest = 60 if soon else self.settings["token_refresh.interval"]
        enabled = self.settings["token_refresh.enabled"]
        return enabled and age > rest and now() - token.asked_at > 60

    def trust(self, token, plan):
        """It has served: what counts in a row begins anew; a pause that goes on stays. So
        its session is alive, if we have taken it for dead."""
        token.update(failures=0, suspicions=(), wakings=0)
        if token.reason_code == "account_session_ended":
            token.update(**AWAKE)
        for scope in plan.scopes:
            if token.pause_of(scope).until <= now():
                token.pauses.pop(scope, None)

    def suspect(self, token, err):
        """Blames it for an error of a call of our own, where that is of its session."""
        if getattr(err, "effect", None) is Effect.SESSION and token.is_active:
            self.blame(token, err)

    def blame(self, token, err, plan=None):
        """It steps back for all, or for the kind or the model of the plan; where its
        session is dead for minutes, or its failures are too many, it is disabled."""
        scope = ""
        if plan and err.effect is not Effect.SESSION:
            scope = plan.family if err.code in OF_A_MODEL else plan.kind
        pause = token.pause_of(scope)
        if scope and err.code == "account_no_credits" and plan.cost(token.tier):
            token.credits = 0  # a new balance ends that, and what is free goes on
        elif now() >= pause.until:  # else it is one burst: several jobs were refused
            pause = self._next_pause(token, pause, err)
        until = max(pause.until, now() + err.retry_after)
        token.pauses[scope] = dataclasses.replace(pause, until=until)
        token.count("error", 1)
        if token.is_dead() or token.failures >= self.settings["admin.error_ban_threshold"]:
            self.disable(token, err)
        if not token.removed:
            self.store.put(token)
        self.wake()

    def _next_pause(self, token, pause, err):
        """Counts the failure; each time in a row the pause is twice as long."""
        seconds = err.pause
        if pause.error and pause.error.code == err.code:
            seconds = pause.seconds * 2
        seconds = min(seconds, LONGEST_PAUSE)
        if err.effect is Effect.SESSION:
            seconds = min(seconds, SUSPECT_PAUSE)
            token.suspicions += (now(),)
        if err.effect is Effect.BAN:
            token.failures += 1
        return Pause(now() + seconds * random.uniform(0.9, 1.1), seconds, err)

    def able(self, job):
        """The tokens that can serve a job, free or not. Raises why there is none, or why
        all pause for more than a minute."""
        tokens = [token for token in self.tokens.values() if token.id not in job.tried]
        nobody = "There is no Google account yet: add one on the admin page"
        if job.source:  # no other account can see that clip
            tokens = [token for token in tokens if token.id == job.source["token_id"]]
            nobody = "The account that made this clip is gone, and no other may use it"
        if not tokens:
            raise GatewayError("no_accounts", nobody)
        for code, message, fits in self._conditions(job):
            fitting = list(filter(fits, tokens))
            if not fitting:
                reasons = sorted({token.reason for token in tokens} - {""})
                raise GatewayError(code, "; ".join([message, *reasons]))
            tokens = fitting
        pause = min(token.pause_of(*job.plan.scopes) for token in tokens)
        err = pause.error
        wait = int(pause.until - now())
        if err and wait > 60:
            raise GatewayError(err.code, f"{err}; next try in {wait} s", retry_after=wait)
        return tokens

    async def expect_able(self, job):
        """Raises as `able`; no credits or tier only by what is a minute old at most."""
        try:
            return self.able(job)
        except GatewayError as err:
            if err.code not in ("no_credits", "tier_required"):
                raise
        since = now() - 60
        asks = [
            self.ask(token, since)
            for token in self.tokens.values()
            if token.is_active and token.checked_at < since
        ]
        await asyncio.gather(*asks)
        return self.able(job)

    def expect_room(self, kind):
        """Raises queue_full where as many jobs of this kind wait as may."""
        waiting = [job for job in self.queue if job.kind == kind]
        if len(waiting) >= self.settings["limits.queue"]:
            raise GatewayError("queue_full", "The queue is full", retry_after=30)

    @staticmethod
    def _conditions(job):
        """What a token must be like, step by step, and what it means where none is so."""
        plan = job.plan

        def affords(token):
            cost = plan.cost(token.tier) * job.n
            credits = token.credits
            return not cost or credits is None or cost <= credits - token.reserved

        message = "All accounts are disabled"
        yield "no_accounts", message, lambda token: token.is_active
        message = f"No account makes {'pictures' if plan.kind == 'image' else 'clips'}"
        yield "no_accounts", message, lambda token: token.enabled(plan.kind)
        message = f"{plan.model} needs a Google account with {' or '.join(plan.prices())}"
        yield "tier_required", message, lambda token: plan.cost(token.tier) is not None
        message = f"No account has credits left for {job.n} x {plan.model}"
        yield "no_credits", message, affords

    def _choose(self, job):
        """Of the free ones that with fewest leases, then (where it costs any) with most
        credits, then the least recently used; those that the job shuns come last."""

        def load(token):
            left = (token.credits or 0) - token.reserved if plan.cost(token.tier) else 0
            shunned = token.id in job.shunned
            return shunned, token.busy.total(), -left, token.last_used_at, token.id

        plan = job.plan
        free = [
            token
            for token in self.able(job)
            if token.pause_of(*plan.scopes).until <= now() and token.has_slot(plan.kind)
        ]
        return min(free, key=load, default=None)

    def take(self, token, job):
        """Leases without a question: also for a job that is found running at start."""
        self.leases[job.id] = token
        job.reserved = (job.plan.cost(token.tier) or 0) * job.n
        token.reserved += job.reserved
        token.busy[job.kind] += 1

    def spent(self, job, balance=None):
        """Ends the reservation: the balance that Google tells has the cost in it."""
        if token := self.leases.get(job.id):
            token.reserved -= job.reserved
            job.reserved = 0
            if balance is not None:
                token.credits = balance
                self.wake()

    def release(self, job):
        self.spent(job)
        if token := self.leases.pop(job.id, None):
            token.busy[job.kind] -= 1
            self.wake()

    async def lease(self, job, first=False):
        """Waits in a fair queue for a free token. Raises as `able`; queue_full, where it
        is the first one of this job."""
        await self.expect_able(job)
        if first:
            self.expect_room(job.kind)
        job.turn = asyncio.get_running_loop().create_future()
        self.queue.append(job)
        self.wake()
        try:
            return await job.turn
        except asyncio.CancelledError:
            self.release(job)  # its turn may have come in this very moment
            self.wake()
            raise

    def wake(self):
        """Serves who waits, the first first; one who can't be served holds up nobody who
        can. Called when a slot, credits or a token's state change, and each second."""
        unserved = []  # where one finds no account, others with the same wish find none
        for job in self.queue:
            wish = job.plan, job.n, job.tried, job.source
            if job.turn.done() or wish in unserved:
                continue
            try:
                token = self._choose(job)
            except GatewayError as err:
                job.turn.set_exception(err)
                continue
            if token:
                self.take(token, job)
                job.turn.set_result(token)
            else:
                unserved.append(wish)
        self.queue = [job for job in self.queue if not job.turn.done()]
        if self._alarm:
            self._alarm.cancel()
        loop = asyncio.get_running_loop()
        self._alarm = loop.call_later(1, self.wake) if self.queue else None


# ---- 8. Media --------------------------------------------------------------------------
MAGIC = (  # first bytes, media type, file ending
    (rb"\x89PNG\r\n\x1a\n", "image/png", "png"),
    (rb"\xff\xd8\xff", "image/jpeg", "jpg"),
    (rb"RIFF....WEBP", "image/webp", "webp"),
    (rb"GIF8[79]a", "image/gif", "gif"),
    (rb"....ftyp", "video/mp4", "mp4"),
)
MEDIA_NAME = re.compile(r"[A-Za-z0-9_-]{22,64}\.(png|jpg|webp|gif|mp4|bin)")
PART_SECONDS = 86400  # after which a half-written file is nobody's
FILE_SIZES = {"image": 64 << 20, "video": 2 << 30}  # largest ones that are kept, bytes
SPARE_DISK = 64 << 20  # bytes that files leave to the database


def sniff(data):
    """Media type and file ending, by the first bytes."""
    for pattern, media_type, ending in MAGIC:
        if re.match(pattern, data[:16], re.DOTALL):
            return media_type, ending
    return "application/octet-stream", "bin"


async def one_piece(data):
    yield data


class Media:
    """Files: finished outputs kept under data/tmp, and the pictures of requests."""

    def __init__(self, settings, wire):
        self.settings, self.wire = settings, wire
        self.kept = settings.data / "tmp"
        self.inputs = settings.data / "inputs"
        for folder in (self.kept, self.inputs):
            folder.mkdir(exist_ok=True, mode=0o700)

    def path(self, name):
        """The kept file of this name; None where it is none of ours, is gone, or would go
        while it is opened."""
        path = self.kept / name
        oldest = now() - 0.99 * self.lifetime
        with contextlib.suppress(OSError):
            if MEDIA_NAME.fullmatch(name) and path.stat().st_mtime > oldest:
                return path
        return None

    @property
    def lifetime(self):
        """Seconds that a kept file stays."""
        return self.settings["cache.timeout"] or math.inf

    async def keep(self, chunks, kind):
        """Writes a file -> a name that nobody can guess; what bears one is whole. Raises
        OSError on a full disk, upstream_changed where it is larger than any `kind`, or is
        no picture or clip (a page that says to log in, nothing)."""
        part = self.kept / f"{secrets.token_urlsafe(24)}.part"
        start = b""
        if self.free_disk() < SPARE_DISK:
            raise OSError(errno.ENOSPC, "the disk is full")
        try:
            with await asyncio.to_thread(part.open, "wb") as file:
                async for chunk in chunks:
                    start += chunk[: 16 - len(start)]
                    await asyncio.to_thread(file.write, chunk)
                    if file.tell() > FILE_SIZES[kind]:
                        raise changed("Google's file is too large to be kept")
                await asyncio.to_thread(file.flush)
                await asyncio.to_thread(os.fsync, file.fileno())
            ending = sniff(start)[1]
            if ending == "bin":
                raise changed("Google's file is no picture or clip")
            return part.rename(part.with_suffix(f".{ending}")).name
        finally:
            part.unlink(missing_ok=True)

    def free_disk(self):
        """Bytes that the disk of the data folder has free."""
        return shutil.disk_usage(self.settings.data).free

    async def expire_forever(self):
        """Removes kept files older than `cache.timeout`."""
        while True:
            await asyncio.to_thread(self.expire, self.lifetime)
            await asyncio.sleep(min(60, max(1, self.lifetime / 4)))

    def expire(self, lifetime):
        """Removes the kept files that are older, in seconds -> the bytes that stay."""
        stay = 0
        for path in self.kept.glob("*"):
            limit = PART_SECONDS if path.suffix == ".part" else lifetime
            with contextlib.suppress(OSError):  # it is gone; it is a folder
                stat = path.stat()
                if stat.st_mtime < now() - limit:
                    path.unlink()
                else:
                    stay += stat.st_size
        return stay

    def save_inputs(self, job_id, images):
        """Writes a job's pictures, all or none -> their names. Raises queue_full."""
        size = sum(map(len, images))
        for entry in os.scandir(self.inputs):
            with contextlib.suppress(FileNotFoundError):  # its job has ended just now
                size += entry.stat().st_size
        if size > self.settings["limits.inputs_mb"] << 20:
            message = "The pictures of open jobs fill limits.inputs_mb"
            raise GatewayError("queue_full", message, retry_after=30)
        files = {f"{job_id}_{number}": image for number, image in enumerate(images)}
        try:
            for name, image in files.items():
                (self.inputs / name).write_bytes(image)
        except OSError:
            self.drop_inputs(files)
            raise
        return [*files]

    def drop_inputs(self, names):
        """What can't be removed now goes at the next start."""
        for name in names:
            with contextlib.suppress(OSError):  # it is gone; it is a folder; a sick disk
                (self.inputs / name).unlink()

    async def input_image(self, value, param):
        """A picture from a URL, a data URL, base64 or bytes. Raises invalid_image and
        request_too_large, of this `param`."""
        limit = self.settings["limits.image_mb"] << 20
        if isinstance(value, bytes) and value.startswith((b"http:", b"https:", b"data:")):
            value = value.decode(errors="replace").strip()  # LiteLLM uploads addresses
        if isinstance(value, str) and re.match("(?i)https?://", value):
            value = await self.wire.fetch_public(value, limit, param)
        elif isinstance(value, str):
            if len(value) > limit * 1.4:  # base64 takes 4/3
                raise too_large(limit, param)
            with contextlib.suppress(ValueError):
                value = await apart(len(value), decode_base64, value)
        if not isinstance(value, bytes) or not sniff(value)[0].startswith("image/"):
            message = "This is not a PNG, JPEG, WebP or GIF picture, its URL, or its base64"
            raise bad(message, param, "invalid_image")
        if len(value) > limit:
            raise too_large(limit, param)
        return value


# ---- 9. Jobs ---------------------------------------------------------------------------
HEARTBEAT = 10.0  # seconds between signs of life to whoever watches a job
STEPS = {  # state -> the states that may follow; anything else is a bug and raises
    "queued": "submitting failed cancelled",
    "submitting": "queued running settling completed unknown",
    "unknown": "running settling completed failed",
    "running": "settling failed unknown",
    "settling": "completed unknown",
    "failed": "settling",  # of generation_timeout alone: Google was late
}
NO_ROOM = "Waiting for room on the disk"
FILE_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=20, sock_read=60)
KEEP_SECONDS = 3600  # in which a file has come; 2 GB need 5 Mbit/s
LATE_SECONDS = 86400  # a clip that is late is asked for so long


def unfinished(outputs):
    return [output for output in outputs if output.state == "pending"]


def sent_lately(job):
    return now() < job.submitted_at + LATE_SECONDS


def timed_out(job):
    """The outputs that a job which has ended could still get."""
    outputs = job.outputs if job.ended else ()
    return [output for output in outputs if output.error.get("code") == "generation_timeout"]


class Jobs:
    """Takes jobs from acceptance to their end, over restarts; alone sets their state."""

    RETRIES = 2  # of what costs nothing
    MOST_REFUSED = 200  # requests without a job that are remembered
    LOOKS, FIRST_LOOK = 6, 2.0  # for a submit of unknown outcome; seconds before
    KEY_SECONDS, REPEAT_SECONDS = 86400.0, 3600.0  # of a given key, of a body alone

    def __init__(self, store, pool, media):
        self.settings = pool.settings
        self.store = store
        self.pool = pool
        self.media = media
        self.open = {}  # job id -> Job
        self.refused = {}  # id -> a request that made no job, as one that has failed
        self.absent = {}  # key -> when Flow had no such in a new project, either
        self.unwanted = deque(maxlen=100)  # prompts that all accounts were refused for
        self.stopping = False
        self.durations = defaultdict(lambda: deque(maxlen=25))  # Plan.pace -> seconds
        # token id -> the pauses after failed status calls
        self._pauses = defaultdict(lambda: backoff(self.settings["flow.poll_interval"]))
        self.late = {}  # as open, of those with an output that was late in the last day
        for job in reversed(store.jobs(states=("completed", "failed"), limit=1000)):
            if job.state == "completed":
                self._learn(job)
            if timed_out(job):
                self.late[job.id] = job

    async def create(self, generation, origin, key, detached):
        """-> a Job on disk and under way. detached: its client can come back for it.
        Raises as Pool.able, or queue_full."""
        fields = vars(generation).copy()
        images = fields.pop("images")
        kind = generation.plan.kind
        job = Job(
            id=f"{kind}_{secrets.token_hex(12)}",
            created_at=now(),
            deadline=self._deadline(kind),
            origin=origin,
            detached=detached,
            **fields,
        )
        try:
            await self.pool.expect_able(job)
            self.pool.expect_room(kind)
        except GatewayError as err:
            self._note_refused(job, err)
            raise
        accepting = asyncio.create_task(self._accept(job, images, key))
        try:
            await asyncio.shield(accepting)
        except asyncio.CancelledError:  # the client left in this very moment
            await accepting
            job.detached = detached and key.explicit  # else it never learnt the id
            await self.abandon(self._start(job))
            raise
        return self._start(job)

    def _note_refused(self, job, err):
        """For the owner: a request that made no job, as one that is not stored."""
        job.update(state="failed", completed_at=now(), error=err.record())
        job.prompt = job.prompt[:1000]
        self.refused[job.id] = job
        if len(self.refused) > self.MOST_REFUSED:
            del self.refused[next(iter(self.refused))]

    async def _accept(self, job, images, key):
        """Its pictures go to disk, then it and its key; all or nothing."""
        if images:
            job.inputs = await asyncio.to_thread(self.media.save_inputs, job.id, images)
        key_row = {**vars(key), "job_id": job.id, "created_at": now()}
        try:
            await self.store.put_rows(("jobs", job.row()), ("request_keys", key_row))
        except StoreError:
            self.media.drop_inputs(job.inputs)
            raise

    async def find(self, key):
        """The job that this key has made. Raises idempotency_conflict, task_not_found."""
        since = now() - (self.KEY_SECONDS if key.explicit else self.REPEAT_SECONDS)
        row = await asyncio.to_thread(self.store.job_of_key, key, since)
        if not row:
            return None
        request, job_id = row
        if request != key.request:
            message = "A new request needs a new Idempotency-Key"
            raise bad(message, code="idempotency_conflict")
        job = await self.get(job_id)
        if job and (key.explicit or job.state != "cancelled"):
            return job
        if key.explicit:
            raise bad("This Idempotency-Key's job was deleted", code="task_not_found")
        return None

    async def get(self, job_id):
        job = self.open.get(job_id) or self.refused.get(job_id)
        return job or await asyncio.to_thread(self.store.job, job_id)

    async def page(self, **filters):
        """As Store.jobs, the open ones as they are in memory."""
        in_memory = self.open.copy()  # first: what ends meanwhile is newer in memory
        jobs = await asyncio.to_thread(self.store.jobs, **filters)
        return [in_memory.get(job.id, job) for job in jobs]

    async def owners_page(self, limit, state="", after=None, **filters):
        """As page, the newest first, and with what was refused before it made a job."""
        jobs = await self.page(states=[state], after=after, limit=limit, **filters)
        text = filters.get("q", "").lower()
        wishes = {filters.get("model"), filters.get("kind")} - {"", None}
        if state in ("", "failed") and not filters.get("token_id"):
            jobs += [
                job
                for job in self.refused.values()
                if wishes <= {job.plan.model, job.kind}
                and text in job.prompt.lower()
                and (not after or job.place < after.place)
            ]
        return sorted(jobs, key=lambda job: job.place, reverse=True)[:limit]

    async def cancel(self, job):
        """Ends a queued job; raises conflict for what is under way, or has ended."""
        job = self.open.get(job.id, job)
        if job.state == "queued" and job.id in self.open:
            job.detached = False
            await self.abandon(job)
        if job.state != "cancelled":
            raise bad(f"{job.id} can't be stopped: it is {job.state}", code="conflict")

    async def delete(self, job):
        """Forgets a job that has ended, or is queued; what is under way: conflict."""
        if not job.ended:
            await self.cancel(job)
        for output in job.outputs:
            if path := self.media.path(output.file):
                await asyncio.to_thread(path.unlink, missing_ok=True)
        self.late.pop(job.id, None)
        await self.store.delete(("jobs", "id", job.id), ("outputs", "job_id", job.id))
        self.refused.pop(job.id, None)

    async def prune_forever(self):
        """What ended `limits.jobs_days` ago goes, a few jobs at a time."""
        while True:
            if days := self.settings["limits.jobs_days"]:
                with contextlib.suppress(StoreError):  # a full disk, which the log tells
                    await self.store.prune(now() - days * 86400)
            await asyncio.sleep(60)

    async def abandon(self, job):
        """Its client is gone: what was not sent is cancelled, any other job runs on."""
        if job.state == "queued" and not job.detached:
            if job.id in self.open:
                job.task.cancel()
            error = GatewayError("cancelled", "Stopped before anything was sent").record()
            await self._step(job, "cancelled", error=error, completed_at=now())

    async def watch(self, job):
        """Yields at once, at each change and each HEARTBEAT seconds until the job is
        completed. Raises why it is not."""
        while job.id in self.open and not (job.task.done() or self.stopping):
            if job.ended and job.stage == NO_ROOM:  # its end is told all the same
                break
            changed = job.changed
            yield
            await self._wait(changed.wait(), HEARTBEAT)
        if job.error:
            raise GatewayError(**job.error)
        if job.state == "queued":
            raise GatewayError("shutting_down", f"Flow2API stops; {job.id} was not sent")
        if job.state != "completed":
            fate = f"goes on at the next start: see /v1/videos/{job.id}"
            if self.settings.demo:
                fate = "is lost: the demo keeps nothing"
            raise GatewayError("interrupted", f"{job.id} was sent and {fate}")

    async def _wait(self, awaitable, seconds):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await awaitable

    async def completed(self, job):
        """Waits for that. Raises what `watch` raises."""
        async for _ in self.watch(job):
            continue

    def progress(self, job):
        """(percent, by the median of earlier jobs; their number); (0, 0): not known."""
        if not job.median:
            return 0, 0
        seconds, number = job.median
        share = ((job.completed_at or now()) - job.submitted_at) / seconds
        job.percent = max(job.percent, min(99, int(share * 100)))  # clocks can go back
        return job.percent, number

    def token_of(self, job):
        return self.pool.tokens.get(job.token_id)

    async def link(self, job, output, anew=False, thumbnail=False):
        """A live URL at Google of an output, asked for anew where it has ended."""
        token = self.token_of(job)
        if not token or not (thumbnail or anew or output.url_expires < now() + 60):
            return "" if thumbnail else output.url
        link = await self.pool.adapter_for(token).resolve(token, output, thumbnail)
        if not thumbnail:
            output.update(url=link.url, url_expires=link.expires)
            with contextlib.suppress(StoreError):  # a full disk: it is asked for again
                await self.store.put(output)
        return link.url

    @contextlib.asynccontextmanager
    async def fetch(self, job, output, thumbnail=False, **headers):
        """A GET of a file. Raises content_not_found, upstream_unreachable, as link."""
        proxy = (self.token_of(job) or Token()).proxy_url
        options = {"proxy": proxy, "timeout": FILE_TIMEOUT, "public": True}
        headers["Accept-Encoding"] = "identity"
        reason = "no address"
        for anew in (False, True):  # an address that has died is asked for anew
            if url := await self.link(job, output, anew, thumbnail):
                stream = self.media.wire.stream(url, headers=headers, **options)
                async with stream as reply:
                    if reply.status < 400 or reply.status == 416:
                        yield reply
                        return
                    reason = f"it answers {reply.status}"
        raise GatewayError("content_not_found", f"Google's file: {reason}", upstream=404)

    async def resume(self):
        """At start: what was under way goes on; what may have been sent is unknown."""
        jobs = self.store.jobs(states=OPEN, oldest_first=True)
        needed = {name for job in jobs for name in job.inputs}
        self.media.drop_inputs(set(os.listdir(self.media.inputs)) - needed)
        for job in jobs:
            await self.abandon(job)
            if job.ended:
                continue
            if job.state != "queued" and (token := self.token_of(job)):
                self.pool.take(token, job)
                self.pool.spent(job)
            job.deadline = max(job.deadline, now() + 300)  # Google has its say first
            self._start(job)

    async def interrupt(self, app):
        """The first step of the end: open answers say so, and name their job."""
        self.stopping = True
        for job in list(self.open.values()):
            self._tell(job, job.stage)

    async def stop(self):
        tasks = [job.task for job in self.open.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _start(self, job):
        self.open[job.id] = job
        job.task = asyncio.create_task(self._run(job), name=job.id)
        return job

    async def _run(self, job):
        """To its end: what fails in an unforeseen way is done again, ever later."""
        try:
            for pause in backoff():
                try:
                    return await self._advance(job)
                except GatewayError as err:
                    return await self._end(job, "failed", error=err.record())
                except Exception:
                    log.exception("%s, %s: again in %d s", job.id, job.state, pause)
                    if job.state == "queued":
                        self.pool.release(job)
                    await asyncio.sleep(pause)
        finally:
            self.pool.release(job)
            self._tell(job)

    async def _advance(self, job):
        """From whatever state it is in to its end. Raises why it failed."""
        accepted = job.state in ("running", "settling")
        rows_lost = accepted and not job.outputs  # they can't be read
        if job.state == "queued":
            await self._submit(job)
        elif job.state == "submitting" or rows_lost:  # cut short: it may have been sent
            await self._step(job, "unknown")
        if job.state == "unknown":
            await self._look_for(job)
        if job.state == "failed":  # Google has finished it after its deadline
            await self._step(job, "settling", error={}, completed_at=0.0)
        if job.state == "running":
            await self._await(job, job.outputs)
            if not job.done():
                raise GatewayError(**job.outputs[0].error)
            await self._step(job, "settling")
        if job.state == "settling":
            try:
                async with self._time_left(job), asyncio.TaskGroup() as group:
                    for output in job.outputs:
                        group.create_task(self._settle(job, output))
            except TimeoutError:
                job.notes.append("generation.image_timeout is over: this is the original")
        await self._end(job, "completed")
        self._learn(job)

    async def _end(self, job, state, **changes):
        """The counters of its account go to disk with it."""
        done = len(job.done())
        if token := self.token_of(job):
            token.count(job.kind, done)
            token.count("error", len(job.outputs) - done)
            if done:
                self.pool.trust(token, job.plan)
        await self._step(job, state, completed_at=now(), **changes)

    async def _step(self, job, state, **changes):
        """The one place that changes a job's state; returns when that is on disk."""
        if state not in STEPS.get(job.state, "").split():
            raise AssertionError(f"{job.id}: {job.state} -> {state}")
        job.update(state=state, **changes)
        await self._save(job)
        if state not in ("queued", "submitting"):  # it is not sent any more
            self.media.drop_inputs(job.inputs)
        if job.ended:
            self.open.pop(job.id, None)
            if timed_out(job):
                self.late[job.id] = job
            token = self.token_of(job) or Token()
            log.info(
                "%s %s: %s %s %d s %d credits %s",
                job.id,
                job.state,
                job.plan.model,
                token.email,
                now() - job.created_at,
                job.spent(token),
                job.error.get("message", ""),
            )
        self._tell(job)

    async def _save(self, job):
        """Returns when it is on the disk, with its outputs and its account; waits until a
        full one has room again."""
        for pause in backoff(0.5):
            records = filter(None, [job, *job.outputs, self.token_of(job)])
            try:
                await self.store.put(*records)
                break
            except StoreError:
                if self.stopping:
                    raise
            self._tell(job, NO_ROOM)
            await asyncio.sleep(min(pause, 10))
        if job.stage == NO_ROOM:
            self._tell(job)

    def _tell(self, job, stage=""):
        """Wakes whoever watches the job; `stage` says in words what it is at."""
        job.stage = stage
        job.changed.set()
        job.changed = asyncio.Event()

    def _learn(self, job):
        self.durations[job.plan.pace].append(job.completed_at - job.submitted_at)

    async def _submit(self, job):
        """Until an account takes it, or may have. What raises has spent nothing. What is
        refused everywhere speaks against the job: two accounts at most step back."""
        job.tried.clear()
        blamed = set()
        told = None  # if no account is left: what waiting cures, else the last refusal
        pauses = backoff(times=self.RETRIES)
        while True:
            token = await self._lease(job, told)
            try:
                return await self._submit_on(job, token)
            except GatewayError as err:
                refusal = err
            if not told or told.status != 429:
                told = refusal
            if refusal.effect is Effect.UNKNOWN:
                log.warning("%s: %s; looking for it at Google", job.id, refusal)
                return await self._step(job, "unknown")
            self.pool.release(job)
            await self._take_back(job)
            if refusal.effect in BLAMED:
                if not self._step_back(job, token, refusal, blamed):
                    job.tried.add(token.id)
            elif refusal.effect is Effect.RETRY and (pause := next(pauses, None)):
                self._tell(job, f"{refusal}; trying again")
                job.shunned.add(token.id)  # others go first
                await asyncio.sleep(pause)
            else:
                raise refusal

    def _step_back(self, job, token, err, blamed):
        """-> whether the job waits for the account, which is just busy with others. For
        what was refused everywhere, and is sent again, none comes nearer to its ban."""
        blamed.add(token.id)
        if len(blamed) > 2 or (err.effect is Effect.BAN and job.prompt in self.unwanted):
            return False
        self.pool.blame(token, err, job.plan)
        return err.code == "account_busy" and token.busy[job.kind] > 0

    async def _take_back(self, job):
        """It was refused: nothing was spent."""
        if job.state == "submitting":
            await self._step(job, "queued", submitted_at=0.0)

    async def _lease(self, job, refusal):
        self._tell(job, "Waiting for an account")
        first = not (refusal or job.detached)  # of what a client has heard none is refused
        try:
            async with asyncio.timeout(job.deadline - now()):
                return await self.pool.lease(job, first)
        except TimeoutError:
            raise GatewayError("queue_full", "No free account", retry_after=60) from None
        except GatewayError as err:
            if len(job.tried) > 1:
                self.unwanted.append(job.prompt)
            raise refusal or err from None  # what an account said says more

    async def _submit_on(self, job, token, gone=""):
        """Where the account's project is gone at Flow, once more in a new one."""
        try:
            reply = await self._send(job, token, gone)
        except GatewayError as err:
            key = job.plan.template
            lately = now() - self.absent.get(key, 0) < 3600
            if err.code != "model_unavailable" or job.source or lately:
                raise
            if gone:  # so it is the key that Flow lacks
                self.absent[key] = now()
                raise
            log.warning("%s: is project %s gone? %s", job.id, job.project, err)
            await self._take_back(job)
            await self._submit_on(job, token, gone=job.project)
            return
        await self._accepted(job, reply)
        if reply.credits is None and job.plan.cost(token.tier):
            await self._wait(self.pool.ask(token, now()), 10)  # Google leaves out a zero

    async def _send(self, job, token, gone):
        """-> Google's Reply. What raises has spent nothing, but for submit_unknown."""
        upstream = self.pool.adapter_for(token)
        try:
            async with self._time_left(job):
                own = job.source.get("project")
                job.project = own or await upstream.project(token, gone)
                media = await self._upload(job, token)
                token.update(last_used_at=now(), use_count=token.use_count + 1)
                job.update(token_id=token.id, tier=token.tier, batch=f"{uuid.uuid4()}")
                await self._step(job, "submitting", submitted_at=now())
                self._tell(job, "Sent to Flow")
                return await upstream.submit(token, job, media)
        except TimeoutError:
            code = "submit_unknown" if job.state == "submitting" else "generation_timeout"
            message = "There was no picture by generation.image_timeout"
            raise GatewayError(code, message) from None

    async def _upload(self, job, token):
        """-> the names that its input pictures have at Google."""
        upstream = self.pool.adapter_for(token)
        media = []
        for name in job.inputs:
            self._tell(job, f"Uploading picture {len(media) + 1} of {len(job.inputs)}")
            data = await asyncio.to_thread((self.media.inputs / name).read_bytes)
            media.append(await upstream.upload(token, job.project, data, sniff(data)[0]))
        return media

    def _time_left(self, job):
        """A picture ends by its deadline, whatever Google does; not so a paid clip."""
        return asyncio.timeout(job.deadline - now() if job.kind == "image" else None)

    async def _accepted(self, job, reply):
        """Google has the job: its operations go to disk before anybody hears of it."""
        await self._add_outputs(job, reply.statuses)
        self.pool.spent(job, reply.credits)
        if durations := sorted(self.durations[job.plan.pace]):
            job.median = [max(durations[len(durations) // 2], 1), len(durations)]
        if len(job.done()) < len(job.outputs):
            if job.kind == "video":  # whose time is counted from the submit
                job.deadline = self._deadline("video")
            await self._step(job, "running")
        elif job.plan.upscale or not all(map(self._at_hand, job.outputs)):
            await self._step(job, "settling")
        # Else it is completed, in one write.

    async def _add_outputs(self, job, statuses):
        job.outputs = []
        for number, status in enumerate(statuses):
            output = Output(job.id, number, status.name, status.project or job.project)
            job.outputs.append(output)
            await self._note(output, status)

    def _at_hand(self, output):
        return output.file or (output.url and not self.settings["cache.enabled"])

    def _deadline(self, kind):
        return now() + self.settings[f"generation.{kind}_timeout"]

    async def _look_for(self, job):
        """A submit whose answer was lost is not sent again: Google is asked for it, some
        times; an outage's time does not count, but a picture ends by its deadline."""
        token = self.token_of(job)
        statuses = []
        looks = self.LOOKS if token else 0
        pauses = backoff(self.FIRST_LOOK)
        until = self._deadline(job.kind)
        self._tell(job, "The answer of Flow was lost; looking for what it has made")
        while looks and len(statuses) < job.n and now() < until:
            try:
                async with self._time_left(job):
                    await asyncio.sleep(next(pauses))
                    upstream = self.pool.adapter_for(token)
                    statuses = await upstream.find(token, job) or statuses
                    looks -= 1
            except TimeoutError:
                break
            except GatewayError as err:
                log.warning("%s: %s", job.id, err)
                if err.effect is Effect.RETRY and sent_lately(job):
                    until = self._deadline(job.kind)
        if not statuses:
            risk = "credits may be spent" if any(job.plan.costs) else "it may have been made"
            message = f"No reply; {risk}: see project {job.project} at Flow"
            raise GatewayError("submit_unknown", message)
        await self._accepted(job, Reply(statuses))

    async def poll_forever(self):
        """Each `poll_interval` one status call per account that has clips under way."""
        polls = {}  # token id -> task: a slow account holds up no other
        while True:
            await asyncio.sleep(self.settings["flow.poll_interval"])
            pending = self._pending()
            for token in self.pool.tokens.values():
                poll = polls.get(token.id)
                outputs = pending[token.id]
                if outputs and (not poll or poll.done()):
                    polls[token.id] = asyncio.create_task(self._poll(token, outputs))

    def _pending(self):
        """token id -> {output to ask for: its job}; what is late ever more rarely."""
        pending = defaultdict(dict)
        jobs = list(self.open.values())
        for job in list(self.late.values()):
            age = now() - job.completed_at
            if age > LATE_SECONDS:
                del self.late[job.id]
            elif now() >= job.look_at:
                job.look_at = now() + min(max(age, 60), 3600)
                jobs.append(job)
        for job in jobs:
            outputs = timed_out(job) or unfinished(job.outputs)
            pending[job.token_id].update(dict.fromkeys(outputs, job))
        return pending

    async def _poll(self, token, outputs):
        """A call that fails says nothing of the clips; it comes again, ever later. That
        time is not theirs: an outage fails none of them."""
        start = now() - self.settings["flow.poll_interval"]
        try:
            reply = await self.pool.adapter_for(token).poll(token, list(outputs))
            if reply.credits is not None:
                token.credits = reply.credits
                self.pool.wake()
            await self._hear(reply.statuses, outputs)
            self._pauses.pop(token.id, None)
        except Exception as err:
            odd = not isinstance(err, GatewayError | StoreError)
            log.warning("status call for %s: %s", token.email, err, exc_info=odd)
            self.pool.suspect(token, err)
            await asyncio.sleep(next(self._pauses[token.id]))
            for job in set(outputs.values()):
                if sent_lately(job):  # an end comes, all the same
                    job.deadline += now() - start

    async def _hear(self, statuses, outputs):
        """Notes an answer; the jobs that it moves hear of it when it is on disk."""
        told = {status.name: status for status in statuses}
        moved = {}  # as outputs
        for output, job in outputs.items():
            status = told.get(output.name)
            if not status or (job.ended and status.state != "done"):
                continue
            if status.state == "missing":
                output.missing += 1
            else:
                output.missing = 0
                await self._note(output, status)
            output.heard_at = now()
            output.answers += 1
            if output.missing or output.state != "pending" or self._is_late(job, output):
                moved[output] = job
        try:  # a failed job is written with its late output: killed before, it stays late
            await self.store.put(*(one for one, job in moved.items() if job.state != "failed"))
        finally:  # on a full disk, too: nobody else would wake the jobs
            for job in set(moved.values()):
                if job.state == "failed" and self.late.pop(job.id, None):
                    self._start(job)
                self._tell(job, job.stage)

    async def _note(self, output, status):
        """Notes what Google says of an output; its state last: then it can be fetched."""
        if status.url:
            link = read_link(status.url)
            output.update(url=link.url, url_expires=link.expires)
        if status.data:
            # A full disk, or it is no file: Google still has it.
            with contextlib.suppress(OSError, GatewayError):
                output.file = await self.media.keep(one_piece(status.data), "image")
        output.media = status.media or output.media
        output.error = status.error.record() if status.error else {}
        output.state = status.state

    async def _await(self, job, outputs):
        """Until Google has said its last word on them, or does not know an upscale, or
        the deadline fails them."""
        while pending := unfinished(outputs):
            if any(output.is_lost() for output in pending):
                return
            late = [output for output in pending if self._is_late(job, output)]
            for output in late:
                message = (
                    f"Flow was not done by generation.{job.kind}_timeout or in"
                    f" {output.answers} answers (flow.max_poll_attempts); it may still"
                    f" appear here, or in project {output.project} at Flow"
                )
                output.error = GatewayError("generation_timeout", message).record()
                output.state = "failed"
            if late:
                await self._save(job)
            else:
                rest = job.deadline - now()
                await self._wait(job.changed.wait(), rest if rest > 0 else HEARTBEAT)

    def _is_late(self, job, output):
        """Only Google's word after the deadline makes a clip late. A picture, or a clip
        that nobody can ask for, is late by the clock, and so is any after a day."""
        asked = job.kind == "video" and self.token_of(job) and sent_lately(job)
        moment = output.heard_at if asked else now()
        limit = self.settings["flow.max_poll_attempts"]
        return moment >= job.deadline or output.answers >= limit

    async def _settle(self, job, output):
        """Upscales, finds the URL, fills the cache; never fails what is paid for."""
        if output.state == "failed" and output.upscale == Upscale.NONE:
            return
        if job.plan.upscale and self.token_of(job) and output.upscale != Upscale.ENDED:
            await self._upscale(job, output)
            await self._save(job)  # what failed is not waited for again
        try:
            if not self.media.path(output.file):
                async with asyncio.timeout(KEEP_SECONDS):
                    await self._patiently(self._keep, job, output)
        except (GatewayError, OSError, StoreError) as err:
            reason = str(err) or "too slow"
            job.notes.append(f"The file can't be fetched now ({reason}); it's kept at Flow.")

    async def _keep(self, job, output):
        if self.settings["cache.enabled"]:
            self._tell(job, "Fetching the file")
            async with self.fetch(job, output) as reply:
                output.file = await self.media.keep(chunks(reply), job.kind)
        else:
            await self.link(job, output)

    async def _upscale(self, job, output):
        """Its result takes the place of the output; its failure leaves that as it was."""
        size = job.plan.upscale
        self._tell(job, f"Upscaling to {size}")
        try:
            await self._upscale_once(job, output)
            if output.state == "pending":  # that request was lost
                output.update(**output.original, state="done", upscale=Upscale.NONE)
                await self._upscale_once(job, output)
            if output.state == "pending":
                raise GatewayError("upstream_error", "Google has never heard of it")
            if output.state == "failed":
                raise GatewayError(**output.error)
        except GatewayError as err:
            output.update(**output.original, state="done", error={})
            job.notes.append(f"Upscaling to {size} failed, this is the original: {err}")
        output.upscale = Upscale.ENDED

    async def _upscale_once(self, job, output):
        """Asks for the larger form, and waits for it; it stays pending where Google knows
        nothing of it."""
        status = await self._ask_to_upscale(job, output)
        output.update(name=status.name, url="", url_expires=0.0, file="")
        output.update(upscale=Upscale.RUNNING, answers=0, missing=0)
        await self._note(output, status)
        if status.data and not output.file:
            raise GatewayError("disk_full", "it is no picture, or the disk is full")
        await self._save(job)
        job.deadline = self._deadline("video")
        await self._await(job, [output])

    async def _ask_to_upscale(self, job, output):
        """What is sent is on disk first: after a restart a clip is only polled."""
        token = self.token_of(job)
        upstream = self.pool.adapter_for(token)
        if job.kind == "video":
            if output.upscale == Upscale.RUNNING:
                return Status(output.name, media=output.media)
            if output.upscale == Upscale.ASKED:
                return upstream.upscaled(output)
        output.update(original=output.handle(), upscale=Upscale.ASKED)
        await self._save(job)
        return await self._patiently(upstream.upscale, token, job, output)

    async def _patiently(self, call, *arguments):
        """A call that spends nothing, made again where that can help."""
        for pause in backoff(times=self.RETRIES):
            try:
                return await call(*arguments)
            except GatewayError as err:
                retry = err.effect in (Effect.RETRY, Effect.ACCOUNT)
                if not retry and err.upstream != 404:  # not there yet
                    raise
                log.warning("%s; trying again", err)
                await asyncio.sleep(pause)
        return await call(*arguments)


# ---- 10. Reading requests --------------------------------------------------------------
NO_TEXT = "Nothing was made: this model makes pictures and clips, no text."
NO_PROMPT = "Nothing was made: end with a message of the user, and allow over 32 tokens."
# new-api, Dify and others test a connection with a greeting, again and again. A person
# who writes no more than that reads what to do: a clip of it would be money for nothing.
GREETING = "This works. Say what to make, for example: a paper boat on a lake."
# What tells a message's meaning: how a wish to change the picture before BEGINs, how one for
# a NEW picture does, what else is in a CHANGE (a PIECE, without spaces) or its END; then what
# prompts of chat clients have in common. * is any letters, _ a space.
WORD_TABLE = """
PLEASE  please bitte por_favor 请
BEGIN   more less no with without as_a as_an bigger smaller darker brighter in_black a_bit
        a_little mehr weniger größer kleiner heller dunkler ohne statt jetzt noch* etwas
        zu das_gleiche dasselbe im_*stil in_schwarz* ein_bisschen plus moins sans l*_même
        maintenant encore en_noir en_style un_peu más menos sin con_un* con_gafas
        con_nieve ahora otra_vez lo_mismo que en_blanco en_estilo un_poco mais sem com
        agora de_novo o_mesmo em_preto em_estilo um_pouco без больше меньше ярче темнее
        чуть ещё теперь а_теперь а_если пусть можно в_стиле в_ч*рно* вместо тоже то_же
        а_можно друг* хочу не_надо làm đổi thay thêm xóa bỏ sửa cho phóng lại lần_nữa đeo
        đội không chuyển giống bây_giờ theo_phong_cách *_hơn *_quá 把* 더
NEW     a an two one_more(?!_time) three some draw* generat* creat* imagine portrait
        this_is photo_of make_an? make_me_an? give_me_an? ein eine* zwei zeichne erstelle
        mal*_ein* mach*_ein* une? des deux dessine crée génère un[ao]s? dos dibuja crea
        genera uma? dois duas desenh* crie gere создай vẽ một 一[只个位座条张幅群朵]* 画一*
        もっとも*
CHANGE  it this again edit change make(?!-) add remove delete erase replace turn swap keep
        fix her colou?r colorize zoom crop him now same another rotate flip enlarge extend
        upscale sharpen blur undo put give move style angle lighten background should
        instead too what_if what_about get_rid mach setz es_*_machen gib zeig lass weg
        ist_zu mal*_das den_hintergrund änder* füg* entfern* ersetz* lösch* tausch* färb*
        vergrößer* verbesser* rends mets fais le_faire peins trop chang* ajout* enl*v*
        supprim* rempla* effac* amélior* agrandi* flout* recommenc* haz hazl* hacerl*
        sustituy* pon ponl* pinta p[ií]ntal* cambia c[aá]mbial* gira aclara agreg* añad*
        quita quítal* elimin* reempla* borra* mejor* coloca* colóca* torn[ae] deixar faz
        faça* põe muda mude deix[ae] tire? tira retir[ae] troc* troqu* adicion* remov*
        coloqu* apag* aument* demais demasiado с?дела* передела* перерису* нарисуй_ему
        измени* поменя* замени* смени* добавь* добавить убер* удали слишком *крась увелич*
        постав* поверн* размо* дорису* раздень надень
PIECE   変更 加一 改成 换成 变成 转成 改为 换个 修改 加上 加点 添加 去掉 擦掉 调 放大 不要 再来
        再试 重新 虚化 抠图 风格 太大 太亮 太暗 给他 给她 给它 让他 让她 让它 もう もっと 同じ
        すぎ 変え 追加 消す 消し 削除 直し 加え 바꾸 바꿔 변경 추가 제거 삭제 지워 없애 고쳐 수정
        교체 다시 너무 씌워 빼줘 게_해 로_해 스타일로 각도
END     点 些 に なしで 度で くして にして かして せて けて えて めて 除いて 게 으로 없이
ASK     please now you your based given from what
MAKE    generat* creat* writ* suggest* provid* find com* mak* give return* craft* repl*
        respond* would summari*
OF      for of that which summari* based about from in us with descri* capt* less max*
PROPOSE generate create suggest predict give
FOLLOW  follow-?up next suggest*
TALK    conversation chat dialogue thread exchange following previous user message 对话 對話
        会话 會話 会話 聊天 用户 チャット メッセージ
BRIEF   words? characters only nothing without no concise short brief pithy best
HELLO   hi hey hello there world hola hallo bonjour ciao olá merhaba привет ping testing
        a_test this_is test message api connection how_are_you are_you_there who_are_you
        wh*_model_are_you today health_?check good_morning are_you_working тест
        can_you_hear_me 你好[呀啊]? 您好 早上好 你是谁 你是什么模型 在吗 测试 嗨 哈喽 テスト
        こんにちは 안녕(하세요)? 테스트
SAY     please just only say reply respond answer output with in to a one single the
        words? exactly confirm_you're_working 你好 请 只 直接 回复 输出 说
OK      hi hello hello_world ok(ay)? pong test 1 (this_is_)?a_test(_message)? 好的? 你好
SCENE   video vídeo vidéo clip film movie image picture photo poster paint draw animat
        cartoon scene card screen camera sequence logo banner neon sky board chalk
        infographic mural storyboard illustrat shot album фильм видео картин
SHOWN   图 圖 画 畫 视频 視頻 影片 片头 动漫 海报 镜头 短片 写真 映像 영상 그림 영화
"""
WORDS = WORD_TABLE.replace("*", r"\w*").replace("_", r"\s")
WORDS = dict(re.findall(r"(\w+) +(\S.*(?:\n .*)*)", WORDS))


def spell(text):
    """Text with a regular expression in place of each name in WORDS."""
    return re.sub("|".join(WORDS), lambda name: f"(?:{'|'.join(WORDS[name[0]].split())})", text)


SCENE = re.compile(spell(r"\bSCENE|SHOWN"))  # who speaks of these wants one
EDIT_WORDS = re.compile(
    spell(r"(?is)^\W*+(PLEASE\W*+)?+(BEGIN\b|(?!NEW\b).*(\bCHANGE\b|PIECE|END(ください)?\W*$))")
)
# Prompts that chat clients send on their own; each would be a paid clip. A block begins
# with whose they are, where they stand (the user's last message, the system message,
# either, as own_prompt has them) and the answer (%s: a title). A prompt, after a |, is known
# by texts that are all in it: lower case, in one line, ^ at the start of the message, $ at
# its end; after ~ a regular expression with WORDS. Nothing that describes a scene may match.
SIDE_PROMPTS = rf"""NextChat; user; %s
| four to five word title & our conversation
| title (at most 6 words) summarizing our conversation | 返回这句话的简要主题
| 返回這句話的簡要主題 | この文の簡潔なテーマ | この文章の簡潔な主題 | 이 문장의 간략한 주제
| fünfwörtigen titel & unser gespräch | kurzes thema in vier bis fünf wörtern
| titre de quatre à cinq mots & notre conversation | le sujet succinct de cette phrase
| título de cuatro a cinco palabras & nuestra conversación | un tema breve de esta frase
| título de quatro a cinco palavras & nossa conversa
| titolo di quattro o cinque parole & nostra conversazione
| il tema di questa frase in modo conciso | заголовок из четырех & пяти слов & наш
| краткую тему этого сообщения | konuşmamızı özetleyen & başlık
| bu cümlenin & kısa başlığını | tiêu đề từ bốn đến năm từ & cuộc trò chuyện
| chủ đề tóm tắt của câu này | أربع إلى خمس كلمات & محادثتنا | ملخص مختصر لهذه الجملة
| এই বাক্যের সংক্ষিপ্ত থিম | stručné téma této věty | titul shrnující naši konverzaci
| päťslovný titul & našu konverzáciu | empat hingga lima kata & percakapan kita
| ringkasan topik kalimat ini | fire til fem ord & oppsummering av temaet
| kort overskrift med 4-5 ord om emnet
NextChat; either; %s
| summarize the discussion briefly in | to summarise the conversation in at most 200 words
| 用作后续的上下文提示 | 用作後續的上下文提示 | 後続のコンテキストプロンプト
| 후속 컨텍스트 프롬프트 | als kontextaufforderung für | fassen sie unsere diskussion kurz in 200
| prompt de contexte ultérieur | comme prompt de contexte futur
| como un prompt de contexto | resuma nuestra discusión & 200 caracteres
| resuma a discussão brevemente em 200 | come prompt di contesto
| последующего контекстного запроса | нашу дискуссию в 200 | sonraki bağlam ipucu
| gợi ý ngữ cảnh cho các lần sau | كإشارة سياقية لاحقة | পরবর্তী কনটেক্সট প্রম্পট
| jako kontextový prompt | zhrňte diskusiu na menej ako 200
| sebagai prompt konteks selanjutnya | som en kontekstuell prompt
| kort resumé (under 200 ord) af vores samtale
Chatbox; either; %s
| ^based on the chat history & conversation a name
| name the conversation based on the chat records
Chatbox; system; {{"action": "proceed"}}
| as a professional web researcher & determine the optimal course of action
LobeChat; either; %s
| professional conversation summarizer | 擅长会话的助理 & 标题 | 请总结上述对话为 & 标题
| 擅长会话标签总结的助理 | 擅长起名的起名大师 | 擅长技能总结的助理 | 从 chunk 中提取摘要的助理
| 你需要根据用户提供的 & 总结出一个标题
| summarize a title based on the ai & prompt provided by the user
| extracting key takeaways from conversations | conversation context compressor
| rephrase the follow up question to be a standalone question
| which can be understood without the chat history
| ^summarize the conversation for future reference
| you read a task request a user just typed into a task composer
LobeChat; system; {NO_TEXT}
| professional translator & translate the input text | 擅长翻译的助理
| what the user will type next | complete the user's partially typed message
| autocomplete engine for a chat input
LobeChat; system; 🎬
| emoji expert who selects | 匹配一个合适的 emoji
LobeChat; system; en-US
| 语言专家 & locale | identify the language & locale
LobeChat; either; []
| quick-reply suggestions from the last assistant message
| follow-up questions that a user might want to ask next
Cherry Studio; either; %s
| conversation into a title & ignoring instructions
| conversation into a title within & words | 总结给出的会话 & 标题
Cherry Studio; briefing; %s
| 會話 & 標題 & 10 | 会話 & タイトル & 10 | 대화 & 제목 & 10 | бесед & заголов & 10
| диалог & заголов & 10 | разговор & заголов & 10 | gespräch & titel & 10
| unterhaltung & titel & 10 | sitzung & titel & 10 | συνομιλία & τίτλο & 10
| conversation & titre & 10 | conversa & título & 10 | conversazione & titolo & 10
Cherry Studio; either; <question>not_needed</question>
| you are an ai question rephraser. your
Cherry Studio; either; {NO_TEXT}
| translate text enclosed with <translate_input> | ^you are a translation expert
Cherry Studio; either; unknown
| identify the language used in the user's input text
LibreChat; either; %s
| 5-word-or-less title for the conversation, using
| ^provide a concise, 5-word-or-less title
| ^analyze this conversation and provide & detected language
| concise title for this conversation & language
| concise title & for a conversation that starts with
| tools you can use to generate the conversation title
| progressively summarize the lines of conversation
| summarize the conversation by integrating new lines
Jan; user; %s
| ^summarize in a & -word title
Open WebUI; user; {{"follow_ups": []}}
| ^### task: & follow-up questions & <chat_history>
| ^### & "follow_ups": & <chat_history>
Open WebUI; user; {{"tags": []}}
| ^### task: & broad tags & <chat_history> | ^### & "tags": & <chat_history>
Open WebUI; user; {{"queries": []}}
| ^### task: & generating search queries & <chat_history>
| ^### & "queries": & <chat_history>
Open WebUI; user; {{"text": ""}}
| ^### task: & autocompletion system | ^you are an autocompletion system. continue
Open WebUI; user; {{"prompt": "%s"}}
| ^### task: & image generation task & <chat_history>
Open WebUI; user; {{"title": "%s"}}
| ^# & title & <chat_history>
Open WebUI; user; %s
| ^# & <chat_history> | ^here is the query: & 3-5 word
| ^create a concise, 3-5 word & query | ^create a concise, 3-5 word & chat history
| ^given the user's message and interaction history, decide if a web search is necessary
| set of responses from various models to the latest user query
Open WebUI; user; 🎬
| the speaker's likely facial expression & emoji
Open WebUI; either; {{"tool_calls": []}}
| available tools: & choose and return the correct tool
| available tools: & if no tools match the query
SillyTavern; either; %s
| ^ignore previous instructions. summarize | pause your roleplay.
| pause your roleplay and
| ^ignore previous instructions and provide a detailed description
| ^ignore previous instructions and provide only the last
| ^ignore previous instructions and generate a list of tasks
| ^ignore previous instructions. determine if | ^ignore previous instructions. your next
| classify the emotion of the last message | comma-separated list of tags describing the
| in the next response i want you to provide only | ^[continue your last message
| ^[write your next reply from the point of view of | ^[write the next reply only as
RikkaHub or Kelivo; either; %s
| ^i will give you some dialogue content in the & <content>
| ^i will give you & messages & summar | conversation compression assistant
RikkaHub or Kelivo; either; {NO_TEXT}
| ^i will provide & chat con & <content> | act as the **user** to reply to the assistant
| ^you are an ocr assistant
HF chat-ui; either; %s
| chat thread titling assistant | ^you are a summarization ai
big-AGI; either; %s
| ai conversation titles assistant | extract a concise chat title
| skilled in creating diagrams & analyze the conversation
| skilled in creating user interfaces & analyze the conversation
Dify; either; {{"Language Type": "", "Your Reasoning": "", "Your Output": "%s"}}
| generate a concise chat title by decomposing
| you need to decompose the user & intention
Dify; either; []
| most likely questions that human would ask
LiteLLM; user; {GREETING}
| ^test from litellm | ^hey how's it going$ | ^hey, how's it going$
one-api, one-hub or AxonHub; user; {GREETING}
| ^output only your specific model name | ^you just need to output 'hi'
| hello world, i'm axonhub
a connection test (new-api, Dify, …); user; {GREETING}
| ~^HELLO(\W+HELLO)*\W*$ | ~^(what('s| is) )?\d ?\+ ?\d ?(=|等于几)?$
| ~^(OK\W+)?(SAY\W*)+OK(\W+SAY)*\W*$
a chat client; opening; %s
| ~^(ASK|MAKE)\b & ~\bMAKE\b[^.]*(?<!no )\b(titles?|a name)\W*(OF\b|\d|\.|$) & ~TALK & ~\bBRIEF\b
| ~^(ASK|MAKE)\b & ~\bMAKE\b[^.]*\btitle & ~(conversation|chat)\W*$
| ~^(ASK|MAKE)\b & ~(chat|thread) title|title generator|into an? (\w+ )*title & ~\bBRIEF\b
| ~^(please )?summari[sz]e|^MAKE [^.]*summary of & ~conversation|chat|discussion
| ~(生成|总结|概括|返回|给出|取|起)[^，。]*(标题|標題|主题)|标题生成 & ~TALK & ~字|短|简洁|只|直接
| ~タイトル[をに][^。]*(要約|生成|作成|返) & ~TALK & ~短い|字
| ~^请?(总结|概括)(这段|上述|以下)?(对话|会话|聊天)
a chat client; either; %s
| short title based on the first message | title-generation assistant
| indicates a new conversation topic & title | title for the following conversation
| ^name this session based on the user's first message
a chat client; opening; []
| ~^suggest up to 3 follow-up questions
| ~^(ASK|PROPOSE)\b[^.]*\bFOLLOW (\w+ )*(questions?|messages|replies)\b & ~TALK|human|text
a choice of tools; tools; {NO_TEXT}
| ~\b(choos|select|pick|decid)[^.]{{0,60}}\b(tool|function)s?\b | which tool
| ~选择[^。]{{0,20}}工具"""
LEAST = {"array": [], "object": {}, "boolean": False, "integer": 0, "number": 0, "null": None}
TITLE_SCHEMA = {"properties": {"title": {"type": "string"}}}
FEW = {*map(str, range(1, 33))}  # tokens: no client wants a clip so
# The user's first words, as such prompts quote them.
QUOTED = re.compile(
    r"(?i)\buser(?: message)?\W{0,3}[:,>]\W{0,4}(?:(?:mainText|content|text)\W{1,5})?"
    r'(\w[^\x00-\x1f<"\\]{0,50})'
)
PICTURE_LINK = re.compile(  # in Markdown; one of ours (see output_url) anywhere
    r"(?:!\[[^\]\[]{0,99}\]\((?=[^\s()]+[\s)])"
    r"|(?=https?://[^\s()\"'<>]{1,300}/tmp/image_))([^\s()\"'<>]+)"
)
LINKS_SEARCHED = 100_000  # characters at the end of an answer
SYSTEM_ROLES = ("system", "developer")
TEXT_PARTS = ("text", "input_text", "output_text")
# What clients call the same; the pictures of `first` come before the others; `inside` are
# the keys of an object that is a picture.
FIELD_TABLE = """
    first    first_frame first_frame_image start_frame start_image init_image image_start
    picture  input_reference image photo picture img reference input_image reference_image
    picture  ref_image source_image image_reference file input_file attachment frame_image
    picture  prompt_image image_input
    last     last_frame last_frame_image end_frame end_image image_end last_image
    last     image_tail tail_image final_frame end_frame_image
    length   seconds duration duration_seconds video_length video_duration clip_duration
    length   duration_sec duration_secs duration_in_seconds n_seconds length_seconds
    length   length video_seconds
    number   n num_images number_of_images sample_count candidate_count num_outputs
    number   batch_size num_samples image_count number_results count
    shape    aspect_ratio ratio orientation size image_size video_size dimensions
    shape    resolution aspect image_aspect_ratio video_aspect_ratio output_size
    shape    target_resolution image_resolution video_resolution output_resolution
    level    quality video_quality definition
    options  extra_body google image_config video_config generation_config config
    options  parameters input options
    text     prompt tools functions response_format
    limit    max_tokens max_completion_tokens max_output_tokens max_new_tokens n_predict
    limit    num_predict
    inside   image_url url data b64_json file_data source image file inline_data
    inside   inlineData base64 bytesBase64Encoded imageBytes uri video_url audio_url
"""
FIELDS = defaultdict(list)
for meaning, *names in read_rows(FIELD_TABLE):
    FIELDS[meaning] += names
PICTURES = FIELDS["first"] + FIELDS["picture"] + FIELDS["last"]
# imageUrls, image_file, images … are image.
PICTURE_ENDING = re.compile(r"(?<=.)(_(url|uri|file|data|base64|b64|json|list)|s){,4}\Z")
# The name of a field and its text, where that is a file or leads to one.
CARRIED_FILE = re.compile(
    r"""\w*\ (?: data:[^\s,]{0,100}, | .*;base64,
        | iVBORw0KGgo | /9j/ | R0lGOD | UklGR | AAAA.GZ0eX | JVBERi0
        | (?=.*[A-Z]) (?=.*[a-z]) (?=.*[0-9]) [A-Za-z0-9+/=_\\r\\n-]{1000}
        | https?://\S+\.(?i:png|jpe?g|webp|gif|heic|avif|mp4|mov|webm|mp3|wav|pdf)
          (?![^?\#]))
    | \w*(?:image|img|picture|photo|frame|video|audio|mask|media|file|reference)
        (?:\w*\ https?:// | _ids?\ .)
    | (?:\w+_)?(?:ref|src|source|input|asset|attachment|pic|upload)s?(?:_ur[il]s?)?
        \ https?://""",
    re.VERBOSE,
)
SORA_ONLY = ("video", "remix_target_id", "character_options", "style_id")
# Sizes and resolutions in words (landscape_16_9 … are fal's).
SIZE_WORDS = read_pairs("""landscape=16:9 portrait=9:16 horizontal=16:9 vertical=9:16 square=1:1
    landscape_16_9=16:9 portrait_16_9=9:16 landscape_4_3=4:3 portrait_4_3=3:4
    square_hd=1:1 720=720p 1080=1080p fhd=1080p 2160p=4k uhd=4k""")
MADE_AT = {
    "video": "clips: POST /v1/videos",
    "image": "pictures: POST /v1/images/generations, or /edits",
}
MAX_PARTS = 1000  # fields of a form
MAX_PROMPT = 20_000
BODY_STALL = 30.0  # seconds without a byte that end a request


class Body(dict):
    """The fields of a request. size: the bytes that it came in."""

    size = 0


class Bodies:
    """Reads request bodies: counted as they come, each alone and all together, and given
    back when they have been read."""

    def __init__(self, settings):
        self.settings = settings
        self.size = 0

    @contextlib.asynccontextmanager
    async def read(self, request, most):
        """The raw body, of at most so many bytes. Raises request_too_large, queue_full,
        request_timeout, invalid_request."""
        data = bytearray()
        try:
            while chunk := await self._next(request):
                data += chunk
                self.size += len(chunk)
                if len(data) > most:
                    raise web.HTTPRequestEntityTooLarge(most, len(data))
                if self.size > self.settings["limits.bodies_mb"] << 20:
                    message = "Too many large requests at once"
                    raise GatewayError("queue_full", message, retry_after=10)
            yield data
        finally:
            self.size -= len(data)

    async def _next(self, request):
        try:
            async with asyncio.timeout(BODY_STALL):
                return await request.content.readany()
        except TimeoutError:
            message = f"No byte of the body came for {BODY_STALL:g} s"
            raise GatewayError("request_timeout", message) from None
        except (aiohttp.ClientPayloadError, HttpProcessingError) as err:
            raise bad(f"The body can't be read: {type(err).__name__}") from None


BODIES = AppKey("bodies", Bodies)


async def read_json(request, most=0, parse=parse_json):
    """The JSON object in a request. Raises invalid_request, and as Bodies.read."""
    async with request.app[BODIES].read(request, most or request.client_max_size) as raw:
        try:
            fields = await apart(len(raw), parse, raw)
        except ValueError as err:
            raise bad(f"The body can't be read: {str(err)[:120]}") from None
        if not isinstance(fields, dict):
            raise bad("The body must be a JSON object")
        body = Body(fields)
        body.size = len(raw)
        return body


async def read_body(request):
    """The fields of a JSON or form body. In a form a repeated name, `name[]` and `name[0]`
    make a list, `name[key]` an object; files are bytes; what is empty is absent."""
    kind = request.headers.get("Content-Type", "")  # aiohttp's content_type can take seconds
    if not kind.lower().startswith(("application/x-www-form-urlencoded", "multipart/")):
        return await read_json(request)
    return await read_json(request, parse=functools.partial(parse_form, kind))


def parse_form(content_type, raw):
    """Raises ValueError; unsupported_encoding."""
    fields = defaultdict(list)
    if content_type.lower().startswith("multipart/"):
        pairs = parse_multipart(content_type, raw)
    elif raw.startswith(b"{"):  # curl -d, no header
        return parse_json(raw)
    else:
        expect_light(raw)
        pairs = parse_qsl(raw.decode(), max_num_fields=MAX_PARTS)
    for name, value in pairs:
        name, key = re.match(r"([^[]*)\[?([^]]*)", name).groups()
        if value:
            fields[name].append({key: value} if key and not key.isdigit() else value)
    return {name: join_values(values) for name, values in fields.items()}


def parse_multipart(content_type, raw):
    """-> the (name, text or bytes) of multipart/form-data (RFC 7578)."""
    boundary = email.message_from_string(f"Content-Type: {content_type}").get_boundary()
    if not boundary:
        raise ValueError("its Content-Type names no boundary")
    parts = split_parts(b"\r\n" + raw, b"\r\n--" + boundary.encode())
    if len(parts) < 2 or not parts[-1].startswith(b"--"):
        raise ValueError("its end is missing, or it has too many parts")
    parts = [*map(read_head, parts[1:-1])]
    expect_light(b"".join(data for _, data, is_file in parts if not is_file))
    return itertools.starmap(read_part, parts)


def split_parts(raw, mark):
    """raw.split(mark, MAX_PARTS + 1)"""
    parts = []
    start = at = 0
    while at < len(raw) and len(parts) <= MAX_PARTS:
        end = raw.find(mark, at, at + STEP + len(mark))
        if end < 0:
            at += STEP
        else:
            parts.append(raw[start:end])
            start = at = end + len(mark)
    return [*parts, raw[start:]]


def read_head(part):
    """-> the headers of a form's part, its bytes, and whether they are a file."""
    end = part.find(b"\r\n\r\n", 0, 9999)
    if end < 0:
        raise ValueError("a part has no head, or a huge one")
    data = part[end + 4 :]
    headers = email.message_from_bytes(part[:end].strip())
    kind = headers.get_content_maintype()
    named = headers.get_filename() is not None
    return headers, data, named or kind in ("image", "video", "audio")


def read_part(headers, data, is_file):
    """-> the name of a form's part, and its text, or its bytes."""
    name = headers.get_param("name", header="Content-Disposition")
    if not isinstance(name, str):
        raise ValueError("a part has no name")
    codings = headers.get_all("Content-Encoding", [])
    codings += headers.get_all("Content-Transfer-Encoding", [])
    if {str(coding).lower() for coding in codings} - {"identity", "7bit", "8bit", "binary"}:
        raise bad(f"{name} is encoded: send it plain", name, "unsupported_encoding")
    if is_file:
        return name, data
    with contextlib.suppress(ValueError):
        data = data.decode()
        if headers.get_content_subtype() == "json":
            value = parse_json(data.encode())
            return name, value if isinstance(value, str | list | dict) else data
    return name, data


def join_values(values):
    """The values of one form field: an object, a list, or the only one."""
    if all(isinstance(value, dict) for value in values):
        return dict(ChainMap(*reversed(values)))
    return values if len(values) > 1 else values[0]


def read_links(value, param):
    """Yields the pictures in a value, in order: each a URL, data URL, base64 or bytes,
    alone, in a list, or in an object like {url} or {image_url: {url}}."""
    if isinstance(value, dict):
        names = {*FIELDS["inside"], str(value.get("type"))}.difference(TEXT_PARTS)
        value = [item for key, item in value.items() if key in names]
        if not value:
            raise bad("A picture is a file, URL or base64", param, "invalid_image")
    if isinstance(value, list):
        for item in sorted(value, key=is_last):
            yield from read_links(item, param)
    elif value not in (None, "", b""):
        yield value


def is_last(picture):
    """Whether an object says that its picture is the last frame."""
    names = "frame_type", "position", "role", "type"
    return any(text_at(picture, name).startswith("last") for name in names)


def plain(value):
    """A text, number or boolean as it is compared: 8, 8.0, "8" and "8s" are the same."""
    if isinstance(value, str | int | float):
        whole = r"^(\d{1,9})(\.0+)?(\s*(s|secs?|seconds?|秒))?\Z"
        return re.sub(whole, r"\1", str(value).strip().lower())
    return f"a {type(value).__name__}"


def one_of(body, name, choices, default):
    """The one of `choices` that is sent, perhaps as text. Raises invalid_request."""
    if body.get(name) in (None, ""):
        return default
    sent = plain(body[name])
    for choice in choices:
        if sent == plain(choice):
            return choice
    allowed = " or ".join(map(str, choices)) or "left out"
    if isinstance(choices, range) and len(choices) > 1:
        allowed = f"a whole number from {choices[0]} to {choices[-1]}"
    raise bad(f"{name} must be {allowed}, not {sent[:40]!r}", name)


def read_flag(body, name, default):
    return bool(one_of(body, name, (True, False, 1, 0), default))


def unsupported(name, message):
    return bad(f"{name}: {message}", name, "unsupported_parameter")


def refuse(body, names):
    for name in filter(body.get, names):
        raise unsupported(name, "it is Sora's, not Flow's")


def field_name(name):
    """aspectRatio -> aspect_ratio, imageUrls -> image: as FIELD_TABLE has it."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name[:80])
    name = re.sub(r"\W+", "_", name).lower()
    stem = PICTURE_ENDING.sub("", name, count=1)
    return stem if stem in PICTURES else name


def read_fields(body):
    """The values of a body's fields, by field_name, as lists. Raises
    unsupported_parameter where one that is not read holds a file: nothing is left out in
    silence."""
    fields = defaultdict(list)
    for name, value in body.items():
        if name not in FIELDS["text"]:
            read_field(name, value, fields)
    return fields


def read_field(name, value, fields, counts=True):
    """Puts a value that counts into `fields`, and looks into it for files."""
    name = field_name(name)
    opens = name in FIELDS["options"] + FIELDS["shape"]
    if (opens or name in PICTURES) and isinstance(value, str):  # in a form
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)
    if counts and value not in (None, ""):
        fields[name].append(value)
    if counts and name in PICTURES:
        return
    text = f"{name} {value[:4000]}" if isinstance(value, str) else ""
    if isinstance(value, dict):
        for key, item in value.items():
            read_field(key, item, fields, counts and opens)
    elif isinstance(value, list):
        for item in value:
            read_field(name, item, fields, False)
    elif isinstance(value, bytes) or CARRIED_FILE.match(text):
        raise unsupported(name, "this file can't be used; send pictures in image")


def read_whole(fields, names, most):
    """The whole number that these fields say; 0: none does. Raises invalid_request."""
    allowed = range(1, most + 1)
    said = {one_of({n: value}, n, allowed, 0) for n in names for value in fields[n]}
    if len(said) > 1:
        told = " and ".join(name for name in names if fields[name])
        raise bad(f"{told} contradict each other", names[0])
    return max(said, default=0)


def size_word(value):
    return SIZE_WORDS.get(plain(value), plain(value))


def read_shape(fields):
    """-> the size, such as "1280x720" or "16:9", and the resolution, such as "2k"."""
    named = [size_word(value) for name in FIELDS["level"] for value in fields[name]]
    texts = [size_word(value) for name in FIELDS["shape"] for value in fields[name]]
    if fields["width"] and fields["height"]:
        texts = [text for text in texts if text != plain({})]  # they stand in it
    texts += [f"{plain(w)}x{plain(h)}" for w in fields["width"] for h in fields["height"]]
    levels = {text for text in texts + named if re.fullmatch(r"\d{1,4}[kp]", text)}
    sizes = [text for text in texts if text not in {*levels, "auto"}]
    wide = {aspect > 1 for aspect in map(read_aspect, sizes) if aspect != 1}
    if len(wide) > 1 or len(levels) > 1:
        raise bad(f"{' and '.join(texts)} contradict each other", "size")
    return next(iter(sizes), ""), next(iter(levels), "")


def check_prompt(prompt, param="prompt"):
    if not isinstance(prompt, str) or not prompt.strip():
        raise bad("There is no prompt: say what to make", param)
    if len(prompt) > MAX_PROMPT:
        raise bad(f"A prompt may have {MAX_PROMPT:,} characters at most", param)
    return prompt


def read_model(body):
    """The model id; "" where the request names none."""
    model = body.get("model") or ""
    if not isinstance(model, str) or len(model) > 200:
        raise bad("model is not one; GET /v1/models lists what there is", "model")
    return model


def expect_kind(model, kind, expected):
    if expected not in ("", kind):
        raise bad(f"{model} makes {MADE_AT[kind]}", "model")


def read_metadata(body):
    """An object, or its JSON text, that the client finds again in the video object."""
    metadata = body.get("metadata") or None
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        if isinstance(metadata, str):
            metadata = json.loads(metadata[:20_000])
        short = len(json.dumps(metadata, allow_nan=False)) < 20_000
        if short and isinstance(metadata, dict | None):
            return metadata
    raise bad("metadata must be a JSON object of less than 20,000 characters", "metadata")


@dataclass(frozen=True)
class Wish:
    """What a request asks for beside its prompt, under whatever names it says so."""

    model: str  # the default one, where the request names none or one of OpenAI's
    ours: bool  # the request names it
    kind: str  # what its API makes; "": either
    size: str
    resolution: str
    seconds: int  # 0: the model's own
    n: int
    links: list

    @classmethod
    def read(cls, body, settings, kind=""):
        """Raises invalid_request, unsupported_parameter, invalid_image."""
        model = read_model(body)
        fields = read_fields(body if kind else body | {"messages": None})
        if foreign := foreign_kind(model):
            expect_kind(model, foreign, kind)
            fields["orientation"] += re.findall("landscape|portrait", model.lower())
            fields["seconds"] += re.findall(r"\d+(?=s\b)", model)
        ours = bool(model) and not foreign
        size, resolution = read_shape(fields)
        return cls(
            model=model if ours else settings[f"{foreign or kind}s.default_model"],
            ours=ours,
            kind=kind,
            size=size,
            resolution=resolution,
            seconds=read_whole(fields, FIELDS["length"], 60),
            n=read_whole(fields, FIELDS["number"], 1 if kind == "video" else 4) or 1,
            links=[link for name in PICTURES for link in read_links(fields[name], name)],
        )

    def plan(self, settings, model="", mode="", source=None):
        """source: the job of the clip that a new one is made from. Raises as resolve;
        invalid_request for another kind or shape."""
        shape = source.plan.ratio if source else ""
        plan_of = functools.partial(
            resolve,
            model or self.model,
            size=self.size or SIZE_WORDS.get(shape, ""),
            resolution=self.resolution,
            images=len(self.links),
            mode=mode,
            overrides=settings.models,
        )
        plan = plan_of(seconds=self.seconds if self.ours and mode != "edit" else 0)
        expect_kind(plan.model, plan.kind, self.kind)
        if source and plan.ratio != shape:
            raise bad(f"What is made from a clip has its shape, {shape}", "size")
        if mode == "edit":
            return dataclasses.replace(plan, seconds=source.plan.seconds)
        if self.ours or not self.seconds:
            return plan
        return plan_of(seconds=self.nearest_length(plan, settings.models))

    def nearest_length(self, plan, overrides):
        """For a client of Sora, which names Sora's models or none, and knows only Sora's
        lengths: the nearest that accounts of each tier make."""
        own = products_of(plan.family, overrides)
        lengths = {product.seconds for product in own if None not in product.credits}
        if parse_id(plan.model).first(LENGTHS) or plan.seconds not in lengths:
            return plan.seconds
        return min(sorted(lengths), key=lambda length: abs(length - self.seconds))

    def notes(self, plan):
        """What the client should know of its plan."""
        if plan.note:
            yield plan.note
        if self.size and distance(self.size, plan.ratio) > math.log(1.5):
            yield f"{plan.model} has no {self.size}; the nearest is {plan.ratio}."
        if plan.kind == "video" and self.seconds not in (0, plan.seconds):
            yield f"{plan.model} makes {plan.seconds} s, not {self.seconds}."

    async def generation(self, media, plan, prompt, param="image", notes=(), **more):
        """Holds the number of pictures against the plan, and reads them."""
        least, most = plan.images
        links = self.links
        notes = [*self.notes(plan), *notes]
        if plan.mode == "extend" and not more.get("source"):
            raise bad(f"{plan.model} extends a clip: POST /v1/videos/extensions", "model")
        if re.search(";base64,[A-Za-z0-9+/]{60}", prompt):
            raise bad("The prompt holds a file as text: send pictures in image", "prompt")
        if plan.mode == "text" and links:
            notes.append(f"{plan.model} takes no pictures; they were left out.")
            links = []
        elif not least <= len(links) <= most:
            count = f"{least} to {most} pictures; here are {len(links)}"
            raise bad(f"{plan.model} takes {count}", param, "invalid_image")
        images = await asyncio.gather(*(media.input_image(link, param) for link in links))
        return Generation(plan, prompt, n=self.n, images=images, notes=notes, **more)


async def read_wish(body, settings, kind=""):
    """As Wish.read; the loop gets its turns while a large body is looked through."""
    return await apart(body.size, Wish.read, body, settings, kind)


async def read_picture(body, media, edit):
    """POST /v1/images/generations and /v1/images/edits."""
    if body.get("mask"):
        raise unsupported("mask", "Flow knows no masks: say what to change")
    if plain(body.get("output_format")) in ("svg", "gif"):
        raise unsupported("output_format", "Flow makes PNG or JPEG pictures")
    prompt = check_prompt(body.get("prompt"))
    wish = await read_wish(body, media.settings, "image")
    if edit and not wish.links:
        raise bad("An edit needs a picture in image", "image")
    return await wish.generation(media, wish.plan(media.settings), prompt)


async def read_clip(body, media, mode="", source=None):
    """POST /v1/videos; or a new clip from the source. Mode "edit" (POST /v1/videos/edits
    and /v1/videos/{id}/remix): as long as that. "extend" (POST /v1/videos/extensions): it
    goes on where that ends."""
    refuse(body, SORA_ONLY[2:] if source else SORA_ONLY)
    handle = source_handle(source) if source else {}
    prompt = check_prompt(body.get("prompt"))
    metadata = await apart(body.size, read_metadata, body)
    wish = await read_wish(body, media.settings, "video")
    model = wish.model
    if source and not wish.ours:
        model = source.plan.family.replace("3_1_", "3_1-")
    if mode == "edit":  # whatever model of clips is named
        expect_kind(model, resolve(model).kind, "video")
        model = EDITOR
    plan = wish.plan(media.settings, model, mode, source)
    if wish.ours and wish.seconds not in (0, plan.seconds):
        raise bad(f"This makes a clip of {plan.seconds} s", "seconds")
    return await wish.generation(media, plan, prompt, source=handle, metadata=metadata)


def source_handle(source):
    """What is kept of the clip that a new one is made from. Raises invalid_request."""
    if source.plan.kind == "image":
        raise bad("Pictures are made and edited at /v1/images", "video")
    clip = source.done()[0]
    return {
        "job": source.id,
        "token_id": source.token_id,
        "project": source.project,
        "media": clip.media or clip.name,
    }


@dataclass(frozen=True)
class Turn:
    """A message of a chat: the text of all its parts, and its pictures."""

    role: str
    text: str
    links: list


@dataclass(frozen=True)
class ChatRequest:
    """POST /v1/chat/completions."""

    body: dict
    model: str
    turns: list[Turn]
    last: Turn  # of the user, whose text is the prompt
    system: str
    stream: bool
    usage: bool  # the client wants token counts at the end of a stream
    inline: bool  # pictures go to message.images, as data URLs


def read_chat(body):
    """Raises invalid_request."""
    refuse(body, SORA_ONLY)
    model = read_model(body)
    if not model:
        raise bad("model is missing; GET /v1/models lists what there is", "model")
    messages = dig(body, "messages", kind=list)
    if not messages:
        raise bad("messages must be a list of at least one message", "messages")
    turns = [read_turn(message, f"messages[{i}]") for i, message in enumerate(messages)]
    last = last_turn(turns)
    if not last:
        raise bad("messages holds no message of the user", "messages")
    return ChatRequest(
        body=body,
        model=model,
        turns=turns,
        last=last,
        system="\n".join(turn.text for turn in turns if turn.role in SYSTEM_ROLES),
        stream=read_flag(body, "stream", False),
        usage=bool(dig(body, "stream_options", "include_usage")),
        inline="image" in str(body.get("modalities")).lower(),
    )


def last_turn(turns):
    """The user's last one; None: there is none. Some clients send pictures and text one
    after the other: what has no text belongs to what stands beside it."""
    last, before = None, ""
    for turn in turns:
        if turn.role == before == "user" and not (last.text and turn.text):
            last.links.extend(turn.links)
            last = Turn("user", last.text or turn.text, last.links)
        elif turn.role == "user":
            last = Turn("user", turn.text, turn.links.copy())
        before = turn.role
    return last


def read_turn(message, where):
    role = dig(message, "role", kind=str)
    if not role:
        raise bad(f"{where} must be an object with a role", "messages")
    content = dig(message, "content", default=None if role == "user" else [])
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise bad(f"{where}.content must be a text or a list of parts", "messages")
    links = pictures_beside(message | {"content": None}, role)
    texts = []
    for part in content:
        kind = dig(part, "type", kind=str)
        text = dig(part, "text")
        if not kind or not isinstance(text, str):
            raise bad(f"{where}.content: a part must be like {{type, text}}", "messages")
        links += pictures_beside(part, role) if kind in TEXT_PARTS else [part]
        texts.append(text)
    return Turn(role, "\n".join(filter(None, texts)), links)


def pictures_beside(holder, role):
    """The pictures beside the text in a message or a part of it."""
    if role == "user":
        read_fields(holder | {"text": None})
    return [item for name, item in holder.items() if item and field_name(name) in PICTURES]


async def read_chat_generation(chat, media, own_picture=None):
    """What the user's last turn asks for; other turns are no part of the prompt.
    own_picture: finds pictures that were made here, as Api.own_picture."""
    settings = media.settings
    prompt = check_prompt(chat.last.text, "messages")
    wish = await read_wish(chat.body, settings)
    pictures = read_links(chat.last.links, "messages")
    links = await apart(chat.body.size, list, pictures)
    if len(links) < len(chat.last.links):
        raise bad("A part of the last message is empty", "messages", "invalid_image")
    wish = dataclasses.replace(wish, links=links + wish.links)
    plan = wish.plan(settings)
    told = ()
    if plan.kind == "image" and not wish.links and settings["chat.continue_pictures"]:
        links, told = await continued_picture(chat, media, own_picture)
        wish = dataclasses.replace(wish, links=links)
    if settings["chat.use_system_prompt"] and chat.system:
        prompt = check_prompt(f"{chat.system}\n\n{prompt}", "messages")
    return await wish.generation(media, plan, prompt, "messages", told)


async def continued_picture(chat, media, own_picture):
    """Where the last turn asks for an edit and brings no picture: the chat's last one, in
    a list, and what to tell of it."""
    if not EDIT_WORDS.search(chat.last.text[:8000]):
        return [], []
    pictures = (
        [*PICTURE_LINK.findall(turn.text[-LINKS_SEARCHED:]), *turn.links]
        for turn in reversed(chat.turns)
        if turn.role in ("assistant", "user")
    )
    last = await apart(chat.body.size, next, filter(None, pictures), [])
    try:
        links = [*read_links(last[-1:], "messages")]
        if not links:
            return [], []
        data = own_picture and await own_picture(links[-1])
        data = data or await media.input_image(links[-1], "messages")
        return [data], ["The chat's last picture went along as a reference."]
    except GatewayError as err:
        return [], [f"The chat's last picture can't be had, so it stayed behind: {err}"]


def side_answer(chat):
    """-> who asks, and the answer, where no picture or clip is wanted: to a client's own
    prompt (title, tags, …), a test, a wish for JSON or a few tokens. Else empty texts."""
    client, answer = own_prompt(chat)
    title = chat_title(chat)
    form = chat.body.get("response_format")
    few = {plain(v) for n, v in chat.body.items() if field_name(n) in FIELDS["limit"]} & FEW
    forced = chat.body.get("tool_choice") not in (None, "", "auto", "none")
    if re.search("(?i)(?<!b64_)json", text_at(form, "type") or str(form)[:99]):
        client = client or "a client that wants JSON"
        schema = dig(form, "json_schema", "schema") or dig(form, "schema")
        if schema or not answer.startswith("{"):
            schema = schema or TITLE_SCHEMA
            answer = json.dumps(json_instance(schema, "", title, schema, iter("." * 200)))
    elif not client and (chat.turns[-1].role != "user" or few or forced):
        return "a client that asks for nothing new", NO_PROMPT
    return client, answer.replace("%s", title)


def own_prompt(chat):
    """-> the client whose own prompt this is and its answer, as in SIDE_PROMPTS."""
    user, system = one_line(chat.last.text), one_line(chat.system)
    texts = {"user": user, "system": system, "either": user + system}
    texts["briefing"] = opening(system)
    texts["opening"] = f"{opening(user)}\n{opening(system)}"
    texts["tools"] = "" if not chat.body.get("tools") or SCENE.search(system) else system
    for client, where, answer, *parts in SIDE_RULES:
        for text in texts[where].splitlines():
            if all(is_in(text, part) for part in parts):
                return client, answer
    return "", ""


def is_in(text, part):
    return re.search(part[1:], text.strip("^$")) if part[0] == "~" else part in text


def opening(text):
    """What a prompt says before it quotes anything; "" where that speaks of a scene."""
    start = re.split(r'[:："“`<{]', text.strip("^$#* ")[:400])[0]
    return "" if SCENE.search(start) else start


def read_side_prompts(table):
    """Yields (client, where, answer, *the parts of a prompt)."""
    for block in table.replace("\n|", " |").splitlines():
        head, *prompts = block.split(" | ")
        for prompt in prompts:
            yield *head.split("; "), *prompt.split(" & ")


SIDE_RULES = tuple(read_side_prompts(spell(SIDE_PROMPTS)))


def one_line(text):
    """A message as SIDE_PROMPTS has it; of a long one the ends, where clients put them."""
    ends = f"{text[:8000]} {text[8000:][-8000:]}"
    return f"^{' '.join(ends.lower().split()).rstrip('.!?。！？')}$"


def chat_title(chat):
    """The user's first words, in the chat or as the prompt quotes them, but for what JSON
    would escape."""
    talk = [f"{turn.role}: {turn.text[:60]}" for turn in chat.turns[:-1]]
    quoted = QUOTED.search("\n".join([*talk, chat.last.text])[:8000])
    return quoted[1].strip() if quoted else "Flow"


def json_instance(part, name, *more):
    """The least that a part of a JSON schema allows. more: the text for each title in it,
    the whole schema, and an iterator that ends where it would be too large."""
    title, root, left = more
    target = text_at(part, "$ref").split("/")[1:]
    other = dig(root, *target) if target else dig(part, "anyOf", 0) or dig(part, "allOf", 0)
    if other := other or dig(part, "oneOf", 0):
        return json_instance(other, name, *more) if next(left, 0) else None
    if members := dig(part, "properties", kind=dict):
        return {key: json_instance(members[key], key, *more) for key in members if next(left, 0)}
    kind = text_at(part, "type") or text_at(part, "type", 0)
    least = title if kind == "string" and "title" in name.lower() else LEAST.get(kind, "")
    return dig(part, "const", default=dig(part, "enum", 0, default=least))


# ---- 11. Client API --------------------------------------------------------------------
EMPTY_USAGE = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
EMPTY_IMAGE_USAGE = {
    "input_tokens": 0,
    "output_tokens": 0,
    "total_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}
# Our states in the words of OpenAI's Videos API; clients know no others.
VIDEO_STATES = read_pairs("""queued=queued submitting=queued unknown=in_progress
    running=in_progress settling=in_progress completed=completed failed=failed
    cancelled=failed""")
MEDIA_TYPES = {"image": "image/png", "video": "video/mp4"}  # of a part of a file
# The sides of a wide clip, by its upscale.
CLIP_PIXELS = {"": (1280, 720), "1080p": (1920, 1080), "4k": (3840, 2160)}
# A clip in a chat answer: no single form plays everywhere (setting chat.video_content).
CLIP_FORMS = {
    "html": '<video src="{0}" controls="controls">\n{0}\n</video>',
    "link": "[video.mp4]({0})",
    "both": '<video src="{0}" controls="controls">\n{0}\n</video>\n\n[video.mp4]({0})',
}
OUTPUT_LINK = re.compile(r"((?:image|video)_[0-9a-f]{24})_([0-9a-f]{24})_(\d)\.\w{3,4}")
PASSED_ON = ("Content-Length", "Content-Range", "Accept-Ranges", "ETag")
FILE_HEADERS = {
    "Cache-Control": "private, max-age=3600",
    "Content-Security-Policy": "sandbox",  # what Google sends runs no script here
    "X-Content-Type-Options": "nosniff",
}
STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}
LEFT_SECONDS = 600  # in which the same request is that of a client that has left
LISTED_PROMPT = 500  # characters of a prompt in a list
STREAM_END = b"data: [DONE]\n\n"
API_PREFIX = re.compile(r"/*((flow|v1)/+)*")
AI_SDK = re.compile("ai(-sdk)?/")  # it makes clips by OpenRouter's API, and no other
HOST = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:\d{1,5})?")
# Headers of the answer to a request. (Before aiohttp 3.14 such a key was a text.)
ANSWER_HEADERS = web.RequestKey("headers", dict) if hasattr(web, "RequestKey") else "headers"


def bearer(request):
    """The key of a request: `Bearer K`, or the bare key that older clients send."""
    return re.sub(r"(?i)^Bearer\s+", "", request.headers.get("Authorization", "")).strip()


def is_proxy(address, settings):
    """Whether it is a trusted proxy's. Raises ValueError for what is no IP address."""
    ip = read_ip(address)
    networks = read_networks(settings["server.trusted_proxies"])
    return any(ip in network for network in networks)


def forwarded(request, settings, name):
    """The values of X-Forwarded-<name>, where a trusted proxy sends them."""
    with contextlib.suppress(ValueError):
        if is_proxy(request.remote or "", settings):
            values = ",".join(request.headers.getall(f"X-Forwarded-{name}", []))
            return [value.strip() for value in values.split(",") if value.strip()]
    return []


def client_address(request, settings):
    """The address that a request comes from, beyond trusted proxies. Some add the port."""
    with contextlib.suppress(ValueError):  # before what is no address, anything can stand
        for address in reversed(forwarded(request, settings, "For")):
            address = re.sub(r"^([\d.]+|\[.+\]):\d+$", r"\1", address).strip("[]")
            if not is_proxy(address, settings):
                return address
    return request.remote


def origin(request, settings):
    """The scheme and host by which the client came here, as far as they can be used."""
    scheme = next(iter(forwarded(request, settings, "Proto")), request.scheme)
    hosts = [*forwarded(request, settings, "Host")[:1], request.headers.get("Host", "")]
    host = next(filter(HOST.fullmatch, hosts), "")
    if not host:
        address, port = request.transport.get_extra_info("sockname")[:2]
        host = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
    return f"{'https' if scheme.lower() == 'https' else 'http'}://{host}"


def same(secret, other):
    return hmac.compare_digest(secret.encode(errors="backslashreplace"), other.encode())


def digest(secret):
    data = secret.encode(errors="backslashreplace") if isinstance(secret, str) else secret
    return hashlib.sha256(data).hexdigest()


def sse(data, event=""):
    head = f"event: {event}\n" if event else ""
    return f"{head}data: {json.dumps(data)}\n\n".encode()


async def stream_answer(request, events, failed):
    """Sends events as they come, the headers at once; `failed` renders a last error."""
    reply = web.StreamResponse(headers=STREAM_HEADERS)
    await reply.prepare(request)
    try:
        async for event in events:
            await reply.write(event)
    except ConnectionError:  # the client has gone
        raise
    except Exception as err:
        await reply.write(failed(told_error(request, err)))
    await reply.write_eof()
    return reply


def told_error(request, err):
    """What its caller is told of an exception, in whose except clause it is called: a bug
    is logged whole, and told without its insides."""
    if isinstance(err, GatewayError):
        return err
    if isinstance(err, StoreError | sqlite3.Error | OSError):
        log.error("%s %s: %s", request.method, request.path, err)
        message = "The data folder can't be used: is its disk full?"
        return GatewayError("disk_full", message, retry_after=60)
    log.exception("%s %s", request.method, request.path)
    return GatewayError("internal_error", "Something went wrong; the log here says more")


def fingerprint(request):
    """The same for the same fields and files of a request, whatever their form."""

    def shorten(value):
        if isinstance(value, dict):
            return {shorten(name): shorten(item) for name, item in value.items()}
        if isinstance(value, list):
            return [shorten(item) for item in value]
        long = isinstance(value, str | bytes) and len(value) > 99
        return digest(value) if long else value

    return digest(json.dumps(shorten(request), sort_keys=True, default=repr))


class Gateway:
    """The parts of a running gateway, on an open store, and what all its APIs need."""

    def __init__(self, settings, store):
        self.settings = settings
        self.store = store
        self.wire = wire = Wire(settings)
        adapters = {name: kind(settings, wire, store) for name, kind in ADAPTERS.items()}
        self.pool = Pool(settings, store, adapters)
        self.media = Media(settings, wire)
        self.jobs = Jobs(store, self.pool, self.media)
        self.locks = weakref.WeakValueDictionary()  # by key, while a request is read
        self.left = {}  # hash of a request -> its job, and when its client left

    async def close(self):
        await self.jobs.stop()
        await self.wire.close()
        await asyncio.to_thread(self.store.close)

    def counters(self):
        tokens = self.pool.tokens.values()
        active = sum(token.is_active for token in tokens)
        counters = {"total_tokens": len(tokens), "active_tokens": active}
        todays = [token.counts_of_today() for token in tokens]
        for what in ("image", "video", "error"):
            totals = (getattr(token, f"{what}_count") for token in tokens)
            counters[f"total_{what}s"] = sum(totals)
            counters[f"today_{what}s"] = sum(counts.get(what, 0) for counts in todays)
        return counters

    @contextlib.asynccontextmanager
    async def admit(self, request, body, read, detached=False):
        """The job of a creating request, while its client waits; abandoned at the end,
        unless the client can come back. A repeated request gets the job that it has made;
        nothing is read then. The job's headers go to the answer."""
        path = re.sub("/+", "/", API_PREFIX.sub("", request.path, count=1)).rstrip("/")
        key = await self._key(request, path, body)
        job, replayed = await self._find_or_create(request, path, key, read, detached)
        body.clear()  # a client can wait long; its pictures are on the disk by now
        headers = {"X-Job-Id": job.id, "x-should-retry": "false"}  # it would pay twice
        request[ANSWER_HEADERS].update(headers, **replayed)
        job.clients += 1
        try:
            yield job
        except GatewayError as err:
            if not job.submitted_at or err.status < 500:
                raise
            raise GatewayError("interrupted", f"{err}; see /v1/videos/{job.id}") from None
        except (asyncio.CancelledError, ConnectionError):  # it has left without an answer
            self.left[key.request] = job.id, now()
            raise
        finally:
            job.clients -= 1
            if not job.clients:
                await asyncio.shield(self.jobs.abandon(job))

    async def _key(self, request, path, body):
        value = request.headers.get("Idempotency-Key", "")
        if len(value) > 255 or not value.isprintable():
            raise bad("An Idempotency-Key may have 255 printable characters at most")
        request_hash = await apart(body.size, fingerprint, [path, body])
        return RequestKey(value or request_hash, request_hash, explicit=bool(value))

    async def _find_or_create(self, request, path, key, read, detached):
        """-> the job, and a header where it is that of an earlier request."""
        async with self.locks.setdefault((key.explicit, key.value), asyncio.Lock()):
            if job := await self._earlier(request, key):
                return job, {"Idempotent-Replayed": "true"}
            detached = detached or key.explicit
            return await self._create(path.split("/")[0], key, read, detached), {}

    async def _earlier(self, request, key):
        """The job of an earlier request that this one repeats, or None. Raises as find."""
        # OpenAI's packages send a request again that took them too long, and count that.
        if key.explicit or request.headers.get("x-stainless-retry-count", "0") != "0":
            return await self.jobs.find(key)
        # Others send it again once they have left. Who is still there wants another one.
        start = now() - LEFT_SECONDS
        self.left = {key: left for key, left in self.left.items() if left[1] > start}
        job_id, _ = self.left.pop(key.request, ("", 0))
        job = await self.jobs.get(job_id) if job_id else None
        return job if job and job.state not in ("failed", "cancelled") else None

    async def _create(self, origin, key, read, detached):
        try:
            return await self.jobs.create(await read(), origin, key, detached)
        except GatewayError:  # sent again, it is not the earlier one that was like it
            earlier = None if key.explicit else await self.jobs.find(key)
            if earlier and earlier.ended:
                await self.store.delete(("request_keys", "job_id", earlier.id))
            raise


class Api:
    """What the handlers of all APIs share."""

    def __init__(self, gateway):
        self.gateway = gateway
        self.settings = gateway.settings
        self.store = gateway.store
        self.pool = gateway.pool
        self.media = gateway.media
        self.jobs = gateway.jobs

    async def find_job(self, job_id):
        """Raises task_not_found."""
        if job := await self.jobs.get(job_id):
            return job
        raise GatewayError("task_not_found", f"There is no video {job_id[:80]!r}")

    async def job_of(self, request):
        return await self.find_job(request.match_info["id"])

    def token_of(self, request):
        """The token that the path names. Raises not_found."""
        if token := self.pool.tokens.get(int(request.match_info["id"])):
            return token
        raise GatewayError("not_found", "There is no such token")

    def expect_done(self, job):
        """Raises task_not_completed, content_not_found, or the job's own error."""
        if not job.ended:
            message = f"Task not completed. Current status: {VIDEO_STATES[job.state]}"
            raise GatewayError("task_not_completed", message)
        if job.error:
            raise GatewayError(**job.error)
        if not job.done():  # a row that could not be read
            raise GatewayError("content_not_found", "What this job made is not known")

    def output_url(self, request, job, output):
        """Where a client gets an output, without a key: an address of ours that ends like
        a file's name, and passes on what is not kept."""
        ending = "mp4" if job.kind == "video" else "png"
        ending = output.file.rpartition(".")[2] or ending
        name = f"{job.id}_{link_secret(job)}_{output.number}.{ending}"
        base = re.sub("(?i)(/+v1)*/*$", "", self.settings["cache.base_url"])
        return f"{base or origin(request, self.settings)}/tmp/{name}"

    async def output_of_link(self, name):
        """The job and the output that the file's name in a link of ours tells. Raises
        not_found."""
        match = OUTPUT_LINK.fullmatch(name)
        job = await self.jobs.get(match[1]) if match else None
        if job and same(match[2], link_secret(job)):
            for output in job.done():
                if output.number == int(match[3]):
                    return job, output
        raise GatewayError("not_found", "There is no such file, or it has expired")

    async def own_picture(self, link):
        """The picture that a link of ours leads to; None: it is none of ours. Raises as
        output_of_link and Jobs.fetch."""
        name = str(link).partition("?")[0].rpartition("/")[2]
        if OUTPUT_LINK.fullmatch(name):
            return await self.output_bytes(*await self.output_of_link(name))
        path = self.media.path(name)  # as links were before
        return await asyncio.to_thread(path.read_bytes) if path else None

    async def data_url(self, job, output):
        """OpenRouter's AI SDK provider takes no other."""
        data = await self.output_bytes(job, output)
        encoded = await asyncio.to_thread(base64.b64encode, data)
        return f"data:{sniff(data)[0]};base64,{encoded.decode()}"

    async def output_bytes(self, job, output):
        if path := self.media.path(output.file):
            return await asyncio.to_thread(path.read_bytes)
        async with self.jobs.fetch(job, output) as source:
            with transport_errors(str(source.url)):
                data = await read_bounded(source, FILE_SIZES["image"])
        if data is None:
            raise changed("Google's picture is too large")
        return data

    def output_urls(self, request, job):
        return [self.output_url(request, job, output) for output in job.done()]

    def video_object(self, request, job, whole=True):
        """A job as OpenAI's video object; clients fail on other types. whole: not as in a
        list, where a prompt is cut to 500 characters."""
        status = VIDEO_STATES[job.state]
        percent = {"completed": 100, "queued": 0}.get(status, self.jobs.progress(job)[0])
        error = {name: job.error[name] for name in ("code", "message") if job.error}
        optional = {
            "metadata": job.metadata,
            "notes": job.notes or None,
            "fail_reason": error.get("message"),
        }
        return {
            "id": job.id,
            "object": "video",
            "model": job.plan.model,
            "status": status,
            "progress": percent,
            "prompt": job.prompt[: None if whole else LISTED_PROMPT],
            "created_at": int(job.created_at),
            "completed_at": int(job.completed_at) or None,
            "expires_at": None,
            "size": pixels(job.plan),
            "seconds": str(job.plan.seconds),
            "remixed_from_video_id": job.source.get("job"),
            "error": error or None,
            **{name: value for name, value in optional.items() if value is not None},
            **self.video_links(request, job),
        }

    def video_links(self, request, job):
        urls = self.output_urls(request, job)
        if job.state != "completed" or not urls:
            return {}
        links = {"url": urls[0], "video_url": urls[0]}
        return {**links, "urls": urls} if len(urls) > 1 else links

    async def send_output(self, request, job, output, thumbnail=False):
        """The file of an output, with ranges: as it is kept here, else passed on from
        Google in constant memory (or by a redirect, where the settings say so)."""
        kept = self.media.path(output.file)
        if kept and not thumbnail:
            return kept_file(request, kept)
        redirect = self.settings["videos.content"] == "redirect" and not thumbnail
        if redirect and (url := await self.jobs.link(job, output)):
            return web.Response(status=302, headers={"Location": url})
        return await self._pass_on(request, job, output, thumbnail)

    async def _pass_on(self, request, job, output, thumbnail):
        reply = web.StreamResponse(headers=FILE_HEADERS)
        ranges = {"Range": request.headers["Range"]} if "Range" in request.headers else {}
        try:
            async with self.jobs.fetch(job, output, thumbnail, **ranges) as source:
                for name in filter(source.headers.__contains__, PASSED_ON):
                    reply.headers[name] = source.headers[name]
                reply.set_status(source.status)
                reply.content_type = "image/png" if thumbnail else MEDIA_TYPES[job.kind]
                async for chunk in chunks(source):
                    if not reply.prepared and source.status == 200:
                        reply.content_type = sniff(chunk)[0]
                    await reply.prepare(request)
                    if request.method == "HEAD":
                        break
                    await reply.write(chunk)
                await reply.prepare(request)  # where there was no byte
        except GatewayError as err:
            if not reply.prepared:
                raise
            log.warning("%s was cut off: %s", request.path, err)
            raise ConnectionResetError from None  # so that the client sees it, too
        return reply


def kept_file(request, path):
    """The answer with a file that is kept here. Raises invalid_request for a date that
    aiohttp, when it sends the file, would fail on."""
    try:
        _ = request.if_modified_since, request.if_unmodified_since, request.if_range
    except Exception:
        raise bad("A date in the headers is none") from None
    return web.FileResponse(path, headers=FILE_HEADERS)


def pixels(plan):
    """The size of an output: "1280x720"; of a picture its shape."""
    if plan.kind == "image":
        return plan.ratio
    wide, high = CLIP_PIXELS[plan.upscale]
    return f"{wide}x{high}" if plan.ratio == "landscape" else f"{high}x{wide}"


def link_secret(job):
    """The part of a key-less link that nobody can guess, whoever knows the job's id."""
    return digest(f"{job.batch} {job.id}")[:24]


class ChatApi(Api):
    """Chat completions."""

    async def complete(self, request):
        body = await read_json(request)
        chat = await apart(body.size, read_chat, body)
        client, text = await apart(body.size, side_answer, chat)
        if client and self.settings["chat.answer_side_prompts"]:
            log.info("Answered at no cost, nothing was made: a prompt of %s", client)
            return await ChatAnswer(self, request, chat, text=text).send()
        read = functools.partial(read_chat_generation, chat, self.media, self.own_picture)
        async with self.gateway.admit(request, body, read) as job:
            for turn in (*chat.turns, chat.last):
                turn.links.clear()  # as the body is
            return await ChatAnswer(self, request, chat, job).send()


@dataclass
class ChatAnswer:
    """Renders a job, or a text, in the format of OpenAI's chat completions."""

    api: ChatApi
    request: web.Request
    chat: ChatRequest
    job: Job | None = None
    text: str = ""

    def __post_init__(self):
        self.id = f"chatcmpl-{random.getrandbits(96):024x}"
        self.created = int(now())

    async def send(self):
        if self.chat.stream:
            return await stream_answer(self.request, self.events(), self.failed)
        if self.job:
            await self.api.jobs.completed(self.job)
        message = {"role": "assistant", **await self.message()}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return {**self.envelope("chat.completion", choice), "usage": EMPTY_USAGE}

    def envelope(self, kind, *choices):
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.chat.model,
            "choices": choices,
        }

    def delta(self, finish=None, **delta):
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return sse(self.envelope("chat.completion.chunk", choice))

    async def message(self):
        job = self.job
        if not job:
            return {"content": self.text}
        urls = self.api.output_urls(self.request, job)
        form = CLIP_FORMS[self.api.settings["chat.video_content"]]
        images = {}
        if job.kind == "image":
            form = "![Generated Image]({0})"
        if job.kind == "image" and self.chat.inline:
            # Many a client sends back the text alone, and an edit needs the picture.
            form = "Picture: {0}"
            data = [await self.api.data_url(job, output) for output in job.done()]
            images["images"] = [
                {"type": "image_url", "image_url": {"url": url}, "index": index}
                for index, url in enumerate(data)
            ]
        notes = [*job.notes, *self.failures()]
        return {"content": "\n\n".join([*map(form.format, urls), *notes]), **images}

    def failures(self):
        job = self.job
        reasons = [output.error["message"] for output in job.outputs if output.error]
        reasons += ["Flow made none of it"] * (job.n - len(job.outputs))
        return [f"One of {job.n} failed: {reason}" for reason in reasons]

    def failed(self, err):
        """Some clients show only the text, some only the event."""
        return self.delta(content=f"{err}\n") + sse(err.body()) + STREAM_END

    async def events(self):
        """The role at once; progress as reasoning_content, or an empty delta as a sign of
        life; at the end the content."""
        if job := self.job:
            line = f"Job {job.id}: {job.plan.describe()}\n"
            yield self.delta(role="assistant", reasoning_content=line)
            async for _ in self.api.jobs.watch(job):
                before = line
                line = progress_line(self.api.jobs, job)
                news = {"reasoning_content": line} if line != before else {}
                yield self.delta(**news)
        else:
            yield self.delta(role="assistant")
        yield self.delta("stop", **await self.message())
        if self.chat.usage:
            yield sse({**self.envelope("chat.completion.chunk"), "usage": EMPTY_USAGE})
        yield STREAM_END


def progress_line(jobs, job):
    """A line on where the job stands; no number in it is invented."""
    if job.stage or not job.outputs:
        queue = jobs.pool.queue
        before = queue.index(job) if job in queue else 0
        place = f" ({before} before this one)" if before else ""
        return f"{job.stage or 'Starting'}{place}\n"
    percent, number = jobs.progress(job)
    ready = f"{len(job.done())} of {job.n} done, " if job.n > 1 else ""
    guess = f", about {percent}% (by the time that {number} earlier ones took)"
    seconds = int(now() - job.submitted_at)
    return f"{ready}generating for {seconds} s{guess if number else ''}\n"


class ImagesApi(Api):
    """Images: each answer has its pictures as base64 or as addresses."""

    async def generate(self, request):
        return await self._make(request, edit=False)

    async def edit(self, request):
        return await self._make(request, edit=True)

    async def _make(self, request, edit):
        body = await read_body(request)
        default = self.settings["images.response_format"]
        form = one_of(body, "response_format", ("b64_json", "url"), default)
        stream = read_flag(body, "stream", False)
        read = functools.partial(read_picture, body, self.media, edit)
        async with self.gateway.admit(request, body, read) as job:
            if stream:
                name = "image_edit" if edit else "image_generation"
                events = self._events(request, job, form, f"{name}.completed")
                return await stream_answer(request, events, self.failed)
            await self.jobs.completed(job)
            data = [await self._picture(request, job, output, form) for output in job.done()]
            answer = {"created": int(job.created_at), "data": data}
            text = await asyncio.to_thread(to_json, answer)  # it can be large
            return web.Response(text=text, content_type="application/json")

    async def _picture(self, request, job, output, form):
        """An element of `data`: with b64_json or url, never both."""
        if form == "url":
            url = self.output_url(request, job, output)
            return {"revised_prompt": job.prompt, "url": url}
        data_url = await self.data_url(job, output)
        return {"revised_prompt": job.prompt, "b64_json": data_url.partition(",")[2]}

    def failed(self, err):
        return sse({"type": "error", **err.body()}, "error")

    async def _events(self, request, job, form, name):
        """The events of OpenAI's Images API: one for each picture that is done."""
        async for _ in self.jobs.watch(job):
            yield b": ping\n"
        for output in job.done():
            picture = await self._picture(request, job, output, form)
            start = base64.b64decode(picture.get("b64_json", "")[:24])
            media_type = sniff(start)[0] if start else "image/png"
            event = {
                "type": name,
                "created_at": int(job.created_at),
                "size": "auto",
                "quality": "auto",
                "background": "opaque",
                "output_format": media_type.removeprefix("image/"),
                "usage": EMPTY_IMAGE_USAGE,
            }
            yield sse({**event, **picture}, name)


class VideosApi(Api):
    """Videos: created at once, asked for until they are completed."""

    async def create(self, request):
        body = await read_body(request)
        if target := body.get("remix_target_id"):
            return await self._derive(request, body, target, "edit")
        read = functools.partial(read_clip, body, self.media)
        return await self._make(request, body, read)

    async def edit(self, request):
        """Of the clip that the path names (remix), or the body."""
        body = await read_body(request)
        video = request.match_info.get("id", body.get("video"))
        return await self._derive(request, body, video, "edit")

    async def extend(self, request):
        body = await read_body(request)
        return await self._derive(request, body, body.get("video"), "extend")

    async def _derive(self, request, body, video, mode):
        """A new clip from a finished one; video: its id, or an object with it."""
        job_id = dig(video, "id", default=video)
        if not job_id or not isinstance(job_id, str):
            raise bad('video must be {"id": …} of a clip made here; no files', "video")
        source = await self.find_job(job_id)
        self.expect_done(source)
        read = functools.partial(read_clip, body, self.media, mode, source)
        return await self._make(request, body, read)

    async def _make(self, request, body, read):
        wait = not read_flag(body, "async_mode", True)
        async with self.gateway.admit(request, body, read, detached=True) as job:
            if wait:
                await self.jobs.completed(job)
            return self._answer(request, job)

    def _answer(self, request, job):
        headers = {} if job.ended else {"openai-poll-after-ms": "5000"}
        video = self.video_object(request, job)
        if AI_SDK.match(request.headers.get("User-Agent", "")):
            video.update(
                polling_url=f"{origin(request, self.settings)}/v1/videos/{job.id}",
                unsigned_urls=self.output_urls(request, job),
                error=video.get("fail_reason", ""),  # a text, there
            )
        return web.json_response(video, headers=headers)

    async def get(self, request):
        return self._answer(request, await self.job_of(request))

    async def list(self, request):
        """?limit&after&order: the clips that any API has asked for."""
        query = request.query
        limit = one_of(query, "limit", range(1, 101), 20)
        oldest_first = one_of(query, "order", ("asc", "desc"), "desc") == "asc"
        after = await self.find_job(query["after"]) if query.get("after") else None
        jobs = await self.jobs.page(
            kind="video", after=after, oldest_first=oldest_first, limit=limit + 1
        )
        videos = [self.video_object(request, job, whole=False) for job in jobs[:limit]]
        return {
            "object": "list",
            "data": videos,
            "has_more": len(jobs) > limit,
            "first_id": videos[0]["id"] if videos else None,
            "last_id": videos[-1]["id"] if videos else None,
        }

    async def delete(self, request):
        job = await self.job_of(request)
        await self.jobs.delete(job)
        return {"id": job.id, "object": "video.deleted", "deleted": True}

    async def content(self, request):
        """?variant=video|thumbnail; index: of several outputs."""
        job = await self.job_of(request)
        query = request.query
        variant = one_of(query, "variant", ("video", "thumbnail"), "video")
        self.expect_done(job)
        output = job.done()[one_of(query, "index", range(len(job.done())), 0)]
        return await self.send_output(request, job, output, variant == "thumbnail")


def plan_fields(plan):
    """What a model or a job makes, for the owner's page."""
    return {
        "kind": plan.kind,
        "family": plan.family,
        "ratio": plan.ratio,
        "upscale": plan.upscale,
        "prices": plan.prices(),
    }


def model_object(model, settings):
    frames = "i2v" in model or "interpolation" in model or model.endswith("-fl")
    request = {"model": model, "images": ["start", "end"] if frames else []}
    plan = Wish.read(request, settings).plan(settings)
    endpoint = "image-generation" if plan.kind == "image" else "openai-video"
    return {
        "id": model,
        "object": "model",
        "created": 1764547200,
        "owned_by": "flow2api",
        "description": f"{plan.kind.capitalize()} generation - {plan.describe()}",
        "supported_endpoint_types": ["openai", endpoint],
        "pictures": plan.images,
        "seconds": plan.seconds,
        "note": plan.note,
        **plan_fields(plan),
    }


class ServiceApi(Api):
    """Models, files, health, and what programs of the seeds ask of an account."""

    async def health(self, request):
        return {"status": "ok"}

    async def models(self, request):
        models = [model_object(model, self.settings) for model in MODELS]
        return {"object": "list", "data": models}

    async def model(self, request):
        return model_object(request.match_info["model"].rstrip("/"), self.settings)

    async def file(self, request):
        """A file without a key, by a name that nobody guesses: one that is kept here, or an
        output of a job (see output_url)."""
        name = request.match_info["name"]
        if path := self.media.path(name):
            return kept_file(request, path)
        job, output = await self.output_of_link(name)
        self.expect_done(job)
        return await self.send_output(request, job, output)

    async def stats(self, request):
        counters = self.gateway.counters()
        return {"success": True, "stats": counters, **counters}

    async def pending_tasks(self, request):
        """The open jobs of a token."""
        return await self._tasks(request, "tasks", states=OPEN, oldest_first=True)

    async def finished_tasks(self, request):
        limit = one_of(request.query, "limit", range(1, 101), 8)
        return await self._tasks(request, "items", states=("completed",), limit=limit)

    async def task(self, request):
        token = self.token_of(request)
        job = await self.find_job(request.match_info["job"])
        if job.token_id != token.id:
            raise GatewayError("task_not_found", f"{token.email} has no task {job.id}")
        return {"success": True, "task": self._task(request, job, whole=True)}

    async def _tasks(self, request, name, **filters):
        token = self.token_of(request)
        jobs = await self.jobs.page(token_id=token.id, **filters)
        tasks = [self._task(request, job) for job in jobs]
        return {"success": True, "token_id": token.id, "count": len(tasks), name: tasks}

    def _task(self, request, job, whole=False):
        video = self.video_object(request, job, whole)
        urls = self.output_urls(request, job)
        return {
            "id": job.id,
            "status": video["status"],
            "prompt": video["prompt"],
            "title": job.plan.describe(),
            "progress_pct": video["progress"] / 100,
            "generations": [{"id": job.id, "url": url} for url in urls],
        }

    async def absent(self, request):
        message = f"{request.path[:80]}: Flow has nothing like it"
        raise GatewayError("not_implemented", message)


# ---- 12. Admin API ---------------------------------------------------------------------
# Paths, fields and types are those of the programs before this one, for their pages.
SESSION = "flow2api_session"  # the cookie of our own page; other programs send a Bearer
SESSION_SECONDS = 7 * 86400
GUESS_SECONDS = 900  # that failed logins are remembered
FREE_GUESSES, GUESSES = 10, 100  # failed logins of an address without a wait; of all
FRIENDS = 1000  # addresses that are remembered
PAGE_POLICY = (
    "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none';"
    " connect-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:"
)
PAGE_HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
# What the original's page asks for: path under /api -> fields and their settings.
PROXY = {"proxy_enabled": "proxy.proxy_enabled", "proxy_url": "proxy.proxy_url"}
TIMEOUTS = {name: f"generation.{name}" for name in ("image_timeout", "video_timeout")}
CACHE = {"enabled": "cache.enabled", "timeout": "cache.timeout", "base_url": "cache.base_url"}
REFRESH = {
    "enabled": "token_refresh.enabled",
    "interval": "token_refresh.interval",
    "at_auto_refresh_enabled": "token_refresh.enabled",
    "scheduler_running": "token_refresh.enabled",
}
CONFIGS = {
    "proxy/config": PROXY,
    "config/proxy": {"enabled": "proxy.proxy_enabled", **PROXY},
    "config/generation": TIMEOUTS,
    "generation/timeout": TIMEOUTS,
    "cache/config": CACHE,
    "cache/enabled": CACHE,
    "cache/base-url": CACHE,
    "token-refresh/config": REFRESH,
    "token-refresh/enabled": REFRESH,
    "admin/config": {
        "admin_username": "global.admin_username",
        "api_key": "global.api_key",
        "error_ban_threshold": "admin.error_ban_threshold",
        "debug_enabled": "admin.debug",
    },
    "admin/apikey": {"new_api_key": "global.api_key"},
    "admin/debug": {"enabled": "admin.debug"},
    "plugin/config": {
        "connection_token": "plugin.connection_token",
        "auto_enable_on_update": "plugin.auto_enable_on_update",
    },
}
# What it asks for beside them, and what can't be set here.
FIXED_CONFIGS = {
    "call-logic/config": {
        "call_mode": "default",
        "note": "The account with the least to do is taken first; this can't be changed",
    },
    "captcha/config": {
        "captcha_method": "none",
        "note": "No captcha is solved here; where Google wants one, requests fail with"
        " captcha_required; this can't be changed",
    },
}
CONFIGS.update(dict.fromkeys(FIXED_CONFIGS, {}))
# What a text that is set here must be like, beyond what Settings asks for.
WEB_ADDRESS = r"(?i:https?)://[^\s/?#]+[^\s?#]*"
TEXT_FORMS = {
    "global.admin_username": (r"\S.*", "must be a name"),
    "global.api_key": ("[!-~]{6,}", "must have 6 characters or more, and no blanks"),
    "plugin.connection_token": ("([!-~]{16,})?", "needs 16+ characters, no blanks"),
    "cache.base_url": (f"({WEB_ADDRESS})?", "must look like https://host:port"),
    "flow.labs_base_url": (WEB_ADDRESS, "must be an address"),
    "flow.api_base_url": (WEB_ADDRESS, "must be an address"),
}
# A wrong one would stop the next start.
READ_AT_START = ("server.host", "server.port", "server.trusted_proxies")
NOT_SET_HERE = ("global.admin_password", "server.data_dir")  # see change_password
TOKEN_FIELDS = {  # what a request may set of an account
    str: "project_id project_name remark proxy_url",
    bool: "is_active image_enabled video_enabled",
    int: """image_concurrency video_concurrency image_count video_count error_count
        use_count""",
}
TOKEN_FIELDS = {name: kind for kind, names in TOKEN_FIELDS.items() for name in names.split()}
# Fields of a token as GET /api/tokens gives them.
TOKEN_SHOWN = """id email name remark is_active reason image_enabled video_enabled
    image_concurrency video_concurrency image_count video_count error_count use_count
    failures busy"""
PASTE_IT = f"paste the value of the cookie {SESSION_COOKIE} of labs.google"
PASTE_MISTAKES = (  # what people paste in its place: a pattern, message; the first counts
    ("^$", "The session token is missing: {}"),
    (r"(^|[\s\"':=])ya29\.", "This is an access token, which ends soon: {}"),
    (r"^\S+@\S+$", "This is an e-mail address: {}"),
    (r"next-auth\.session-token\.\d", "The cookie is in parts, .0 and .1: paste all"),
    (r"next-auth\.session-token", "This is the cookie's name: paste its value, too"),
    (r"=[^=]|[:;\t{\[]", "The right cookie is not in this: {}"),
    (r"[^!#-+\--~]", "This has blanks or odd characters in it: {}, whole"),
    ("^.{1,9}$", "This is too short: {}, whole"),
)
ASLEEP = {"is_active": False, "reason": "", "reason_code": ""}  # by its owner's wish


def hash_password(password, salt=None):
    salt = salt or secrets.token_bytes(16)
    key = hashlib.scrypt(password.encode(errors="replace"), salt=salt, n=16384, r=8, p=1)
    return f"scrypt${salt.hex()}${key.hex()}"


def password_matches(password, stored):
    """`stored`: a hash, or the text that stands in setting.toml."""
    match = re.match(r"scrypt\$([0-9a-f]+)\$", stored)
    hashed = hash_password(password, bytes.fromhex(match[1])) if match else password
    return stored != "" and same(hashed, stored)


def sent_session(request):
    """The session of a request: a Bearer, or the cookie, which only our page may use."""
    sent = bearer(request)
    site = request.headers.get("Sec-Fetch-Site", "")
    if sent and not sent.lower().startswith("basic "):  # that is a proxy's before us
        return sent
    own_page = site in ("none", "same-origin")
    if not site:  # plain http: a page of another port can POST, but not JSON
        foreign = request.method == "POST" and "Origin" in request.headers
        kind = request.headers.get("Content-Type", "").lower()
        own_page = not foreign or kind.startswith("application/json")
    return request.cookies.get(SESSION, "") if own_page else ""


class Sessions:
    """Who is logged in to the admin page, and who has guessed too often."""

    def __init__(self, settings, store):
        self.settings, self.store = settings, store
        stored = store.settings()
        self.ends = stored.get("sessions", {})  # unix time by key_of(session)
        self.friends = set(stored.get("friends", ()))  # logged in here before
        self.guesses = {}  # address -> (failed logins in a row, unix time of the last)

    def key_of(self, session):
        """A session's hash. It changes with the password, which ends them all."""
        return digest(f"{session} {self.settings['global.admin_password']}")

    def keep(self, session, seconds=SESSION_SECONDS):
        """Lets a session last for so long from now on; 0 ends it."""
        ends = {**self.ends, self.key_of(session): now() + seconds}
        self.ends = {key: end for key, end in ends.items() if end > now()}
        return self.store.put_setting("sessions", self.ends)

    def logged_in(self, request):
        session = sent_session(request)
        rest = self.ends.get(self.key_of(session), 0) - now()
        if 0 < rest < SESSION_SECONDS - 3600:  # once an hour, for a restart
            self.keep(session)
        return rest > 0

    def _wait(self, address):
        """The seconds until an address may try again."""
        start = now() - GUESS_SECONDS
        self.guesses = {who: one for who, one in self.guesses.items() if one[1] > start}
        failures, last = self.guesses.get(address, (0, 0))
        total = sum(number for number, _ in self.guesses.values())
        if total >= GUESSES and address not in self.friends:
            return GUESS_SECONDS
        if failures < FREE_GUESSES:
            return 0
        pause = min(2 ** (failures - FREE_GUESSES), GUESS_SECONDS)
        return math.ceil(last + pause - now())

    async def check_password(self, request, password):
        """Raises too_many_logins: after some failures an address waits, ever longer; where
        many fail, so do all that have never logged in."""
        address = client_address(request, self.settings)
        if (wait := self._wait(address)) > 0:
            message = f"Too many failed logins; wait {wait} s"
            raise GatewayError("too_many_logins", message, retry_after=wait)
        failures, _ = self.guesses.get(address, (0, 0))
        self.guesses[address] = failures + 1, now()  # before the check, as many can come
        self.settings.read_stored(self.store.settings())  # by --reset-password, perhaps
        stored = self.settings["global.admin_password"]
        good = await asyncio.to_thread(password_matches, str(password), stored)
        if good:
            self.guesses.pop(address, None)
            self.friends.add(address)
            self.store.put_setting("friends", sorted(self.friends)[-FRIENDS:])
        return good


def ok(message="Done", **more):
    return {"success": True, "message": message, **more}


def mask(secret):
    """What may be shown of a secret, and of an address with a password in it."""
    if "://" in secret:
        return re.sub("//.*@", "//…@", secret)
    if len(secret) > 20:
        return f"{secret[:4]}…{secret[-4:]}"
    return "…" if secret else ""


def token_object(token, masked=False):
    """As GET /api/tokens gives it, session and access token in clear, or masked."""
    hide = mask if masked else str
    return {
        **token.pick(*TOKEN_SHOWN.split()),
        "reason_code": token.cause(),
        "st": hide(token.st),
        "at": hide(token.at),
        "token": hide(token.at),
        "at_expires": iso(token.at_expires),
        "proxy_url": hide(token.proxy_url),
        "credits": token.credits or 0,
        "user_paygate_tier": token.tier or None,
        "tier": TIERS.get(token.tier, ""),
        "current_project_id": token.project_id or None,
        "current_project_name": token.project_name or None,
        "created_at": iso(token.created_at),
        "last_used_at": iso(token.last_used_at),
        "paused_until": iso(token.paused_until),
        "paused_for": token.paused_for(),
    }


def read_token_fields(body):
    """The fields that a request sets; null and a masked proxy keep what is there."""
    fields = {}
    for name, kind in TOKEN_FIELDS.items():
        value = body.get(name, body.get(f"current_{name}"))
        if value is None:
            continue
        if type(value) is not kind or (kind is int and not -1 <= value < 10**9):
            raise bad(f"{name} must be of type {kind.__name__}; numbers, -1 up", name)
        fields[name] = value
    proxy = fields.get("proxy_url", "")
    if "…" in proxy:
        del fields["proxy_url"]
    elif not good_proxy(proxy):
        raise bad(f"proxy_url {PROXY_FORM}", "proxy_url")
    if "is_active" in fields:  # switched by hand: the owner's word, not ours
        fields.update(AWAKE if fields["is_active"] else ASLEEP)
    return fields


def read_session_token(body):
    """Raises invalid_request: Google is asked only about what can be one."""
    text = body.get("session_token") or body.get("st")
    st = clean_session_token(text) if isinstance(text, str) else ""
    for pattern, mistake in PASTE_MISTAKES:
        if re.search(pattern, st):
            raise bad(mistake.format(PASTE_IT), "st")
    return st


def read_setting(name, raw):
    """The value to set; None: the next layer counts. Raises invalid_request."""
    if name not in SETTINGS:
        raise bad(f"There is no setting {name}", name)
    if raw is None:
        return None
    draft = Settings()
    try:
        draft.put("admin page", name, raw, "the new value")
    except SettingError as err:
        raise bad(str(err), name) from None
    if name in SECRETS and raw and raw in PLACEHOLDERS:
        raise bad(f"{name} is a well-known one: take another", name)
    form = TEXT_FORMS.get(name)
    if form and not re.fullmatch(form[0], raw):
        raise bad(f"{name} {form[1]}", name)
    if name == "proxy.proxy_url" and (not good_proxy(raw) or "…" in raw):
        raise bad(f"{name} {PROXY_FORM}", name)
    return draft.layers["admin page"].get(name)


def with_changes(settings, new):
    """The settings as changes of the admin page make them; None takes one back."""
    layer = {**settings.layers["admin page"], **new}
    draft = Settings()
    draft.layers = {**settings.layers, "admin page": layer}
    return draft


def token_action(action):
    """A handler: does something to the token that the path names, and shows it."""

    async def handler(self, request):
        token = self.token_of(request)
        await action(self, token)
        row = token_object(token, masked=True)
        about = {"email": token.email, "username": token.name, "credits": row["credits"]}
        return ok(status="success", token=row, **about)

    return handler


class AdminApi(Api):
    """/api, /metrics and the page."""

    def __init__(self, gateway):
        super().__init__(gateway)
        self.tokens = self.pool.tokens
        self.sessions = Sessions(self.settings, self.store)
        stored = self.store.settings().get("plugin", {})
        self.plugin = {"last_call": None, "last_account": None, **stored}

    async def login(self, request):
        """-> a session token for /api, good for seven days after its last use."""
        body = await read_json(request, 1 << 16)  # no key yet
        good = await self.sessions.check_password(request, body.get("password"))
        name = body.get("username")
        if not good or not same(str(name), self.settings["global.admin_username"]):
            raise GatewayError("invalid_api_key", "Invalid credentials")
        session = "admin-" + secrets.token_urlsafe(32)
        with contextlib.suppress(StoreError):  # a full disk: until the next start, then
            await self.sessions.keep(session)
        answer = web.json_response(ok("Login successful", token=session, username=name))
        answer.set_cookie(
            SESSION,
            session,
            max_age=100 * SESSION_SECONDS,
            httponly=True,
            samesite="Strict",
            secure=origin(request, self.settings).startswith("https:"),
        )
        return answer

    async def logout(self, request):
        await self.sessions.keep(sent_session(request), seconds=0)
        return ok("Logged out successfully")

    async def change_password(self, request):
        body = await read_json(request)
        if not await self.sessions.check_password(request, body.get("old_password")):
            raise bad("The old password is wrong", "old_password")
        password = body.get("new_password")
        if not isinstance(password, str) or len(password) < 8:
            raise bad("A new password needs 8 characters or more", "new_password")
        if password in PLACEHOLDERS:
            raise bad("This password is a well-known one: take another", "new_password")
        hashed = await asyncio.to_thread(hash_password, password)
        changes = {"global.admin_password": hashed}
        if body.get("username"):
            changes["global.admin_username"] = body["username"]
        await self._change(changes)
        return ok("Password changed; log in again")

    async def _change(self, changes):
        """Sets settings, all or none, at once and for good; None goes back to what stands
        behind, a masked secret stays. Raises invalid_request, conflict."""
        settings, new, rows = self.settings, {}, []
        for name, raw in changes.items():
            if name in HIDDEN and raw == mask(settings[name]):
                continue
            source = settings.source(name)
            if source in ("command line", "environment"):
                raise bad(f"{name} is set by the {source}: change that", name, "conflict")
            new[name] = read_setting(name, raw)
            row = {"name": f"admin page:{name}", "data": to_json(new[name])}
            rows.append(("settings", row))
        after = with_changes(settings, new)
        of_proxy = not new.keys().isdisjoint(PROXY.values())
        if of_proxy and after["proxy.proxy_enabled"] and not after["proxy.proxy_url"]:
            raise bad("proxy_enabled needs a proxy_url; switch it off first", "proxy_url")
        await self.store.put_rows(*rows)
        self.settings.layers["admin page"].update(new)

    def _shown(self, name, masked):
        value = self.settings[name]
        return mask(value) if masked and name in HIDDEN else value

    async def set_config(self, request):
        fields = CONFIGS[request.match_info["group"]]
        body = await read_json(request)
        unknown = ", ".join(set(body).difference(fields))[:200]
        changes = {fields.get(field): raw for field, raw in body.items() if raw is not None}
        if unknown or not changes:
            can = ", ".join(fields) or "nothing, for it can't be changed"
            raise bad(f"This sets {can}; the body names {unknown or 'none of them'}")
        await self._change(changes)
        return await self.get_config(request, "Saved")

    async def get_config(self, request, message=""):
        group = request.match_info["group"]
        fields = CONFIGS[group]
        if "connection_token" in fields:
            await self._make_connection_token()
        masked = request.query.get("mask") == "1"
        config = {field: self._shown(name, masked) for field, name in fields.items()}
        config.update(FIXED_CONFIGS.get(group, {}))
        base = origin(request, self.settings)
        if "base_url" in fields:
            config["effective_base_url"] = config["base_url"] or base
        if "connection_token" in fields:
            config["connection_url"] = f"{base}/api/plugin/update-token"
            config["pairing_link"] = f"{base}/#{config['connection_token']}"
            config.update(self.plugin)
        return ok(message, config=config, **config)

    async def _make_connection_token(self):
        """Makes one, as if somebody had set it, where there is none."""
        name = "plugin.connection_token"
        if not self.settings[name]:
            secret = secrets.token_hex(20)  # letters and digits: a double click copies it
            self.settings.layers["admin page"][name] = secret  # before others ask
            await self.store.put_setting(f"admin page:{name}", secret)

    async def extension(self, request):
        """The companion extension, as a zip of the files beside this one."""
        files = sorted(Path(__file__).with_name("extension").glob("[!.]*.*"))
        if not files:
            raise GatewayError("not_found", "No folder extension/ is beside flow2api.py")
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in files:
                archive.writestr(f"flow2api-extension/{file.name}", file.read_bytes())
        headers = {
            **PAGE_HEADERS,
            "Content-Type": "application/zip",
            "Content-Disposition": 'attachment; filename="flow2api-extension.zip"',
        }
        return web.Response(body=buffer.getvalue(), headers=headers)

    async def list_settings(self, request):
        rows = [
            {
                **vars(setting),
                "source": self.settings.source(name),
                "value": self._shown(name, masked=True),
            }
            for name, setting in SETTINGS.items()
            if name not in NOT_SET_HERE
        ]
        return ok(settings=rows)

    async def change_settings(self, request):
        body = await read_json(request)
        if not body:
            raise bad("The body names no setting")
        for name, raw in body.items():
            if name in NOT_SET_HERE or (name in READ_AT_START and raw is not None):
                raise bad(f"{name} is not changed here: set it in setting.toml", name)
        await self._change(body)
        return ok("Saved")

    async def list_tokens(self, request):
        masked = request.query.get("mask") == "1"
        return [token_object(token, masked) for token in reversed(self.tokens.values())]

    async def add_token(self, request):
        body = await read_json(request)
        st = read_session_token(body)
        fields = read_token_fields(body)
        if any(token.st == st and token.is_active for token in self.tokens.values()):
            raise bad("This session token is in the pool already", "st", "conflict")
        token, new = await self.pool.add(st, **fields)
        message = "Token added" if new else "Known account: its session is updated"
        if reason := token.reason or token.paused_for():
            message += f", but it is not used now: {reason}"
        about = token.pick("id", "email", "credits", "project_id", "project_name")
        return ok(message, token={**about, "reason": reason}, token_id=token.id)

    async def update_token(self, request):
        """Sets what is named; Google is asked about a new session only."""
        token = self.token_of(request)
        body = await read_json(request)
        fields = read_token_fields(body)
        proxy = str(body.get("proxy_url"))
        if "…" in proxy and proxy != mask(token.proxy_url):
            raise bad("proxy_url is masked: write it out, with its password", "proxy_url")
        st = str(body.get("session_token") or body.get("st") or "")
        if not (fields or st or "…" in proxy):
            raise bad(f"The body names none of st, {', '.join(TOKEN_FIELDS)}")
        st = read_session_token(body) if st and "…" not in st else token.st
        if st == token.st:
            await self.pool.update(token, **fields)
        else:
            await self._renew_session(token, st, fields)
        return ok("Token updated", token=token_object(token, masked=True))

    async def _renew_session(self, token, st, fields):
        proxy = fields.get("proxy_url", token.proxy_url)
        draft = Token(st=st, adapter=token.adapter, proxy_url=proxy)
        account = await self.pool.sign_in(draft)
        if account["email"] not in ("", token.email):
            raise bad(f"This session is of {account['email']}", "st", "conflict")
        changes = {"name": account["name"], **draft.session(), **AWAKE, **fields}
        await self.pool.update(token, **changes)
        await self.pool.ask(token, now())

    async def delete_token(self, request):
        await self.pool.remove(self.token_of(request))
        return ok("Token deleted")

    enable_token = token_action(lambda self, token: self.pool.update(token, **AWAKE))
    disable_token = token_action(lambda self, token: self.pool.update(token, **ASLEEP))

    @token_action
    async def renew_token(self, token):
        await self.pool.examine(token, self.pool.adapter_for(token).sign_in)

    @token_action
    async def check_token(self, token):
        await self.pool.examine(token, self.pool.check)

    async def enable_all(self, request):
        return ok(enabled=await self._update_all(AWAKE))

    async def disable_all(self, request):
        return ok(disabled=await self._update_all(ASLEEP))

    async def _update_all(self, changes):
        """-> how many they are."""
        tokens = list(self.tokens.values())
        for token in tokens:
            await self.pool.update(token, **changes)
        return len(tokens)

    async def delete_disabled(self, request):
        tokens = self.tokens.values()
        idle = [token for token in tokens if not (token.is_active or token.busy.total())]
        for token in idle:
            await self.pool.remove(token)
        return ok(deleted=len(idle))

    async def test_all(self, request):
        """Asks Google about the active accounts; only_active=false: about all;
        only_disabled=true: about the others. Enables or disables them by the answer."""
        only_active = read_flag(request.query, "only_active", True)
        states = [True] if only_active else [True, False]
        if read_flag(request.query, "only_disabled", False):
            states = [False]
        counts = {"valid": 0, "invalid": 0, "auto_enabled": 0, "auto_disabled": 0}
        for token in [one for one in self.tokens.values() if one.is_active in states]:
            was_active = token.is_active
            try:
                await self.pool.examine(token, self.pool.check)
                counts["valid"] += 1
                if not was_active:
                    await self.pool.update(token, **AWAKE)
                    counts["auto_enabled"] += 1
            except GatewayError:
                counts["invalid"] += 1
                if was_active and not token.is_active:
                    counts["auto_disabled"] += 1
        return ok(**counts)

    async def import_tokens(self, request):
        """{tokens: objects as GET gives, or session tokens}. One that is refused stops
        no other; of an account that is here, what is not named stays."""
        items = (await read_json(request)).get("tokens")
        if not isinstance(items, list):
            raise bad("tokens must be a list", "tokens")
        counts = {"added": 0, "updated": 0, "skipped": 0, "failed": 0}
        errors, details = [], []
        for item in items:
            item = item if isinstance(item, dict) else {"st": item}
            try:
                token, new = await self._import(item)
                about = {"token_id": token.id, "email": token.email}
                about["status"] = "added" if new else "updated"
                about["reason"] = token.reason or token.paused_for()
            except GatewayError as err:
                about = {"token_id": None, "email": text_at(item, "email")}
                about["status"] = "failed"
                about["reason"] = str(err)
                errors.append(f"{about['email'] or 'an account'}: {err}")
            counts[about["status"]] += 1
            details.append(about)
        return ok("Imported", **counts, errors=errors, details=details)

    async def _import(self, item):
        """-> (token, is it new)"""
        st = read_session_token(item)
        fields = read_token_fields(item)
        for token in self.tokens.values():
            if token.st == st:
                if fields.get("is_active") is token.is_active:  # no word of the owner's
                    fields.update(token.pick(*ASLEEP))
                await self.pool.update(token, **fields)
                return token, False
        return await self.pool.add(st, **fields)

    async def convert_session(self, request):
        draft = Token(st=read_session_token(await read_json(request)))
        account = await self.pool.sign_in(draft)
        about = {"access_token": draft.at, "email": account["email"]}
        return ok("ST converted to AT", **about, expires=iso(draft.at_expires))

    async def plugin_update(self, request):
        """{session_token}, with the connection token as Bearer."""
        secret = self.settings["plugin.connection_token"]
        if not secret or not same(bearer(request), secret):
            raise GatewayError("invalid_api_key", "Invalid connection token")
        self._note_call(last_call=iso(now()))
        st = read_session_token(await read_json(request))
        asleep = {token.id for token in self.tokens.values() if not token.is_active}
        enables = self.settings["plugin.auto_enable_on_update"]

        def wakes(token):  # not what its owner has disabled: the browser comes by itself
            return token.is_active or (enables and token.reason)

        token, new = await self.pool.add(st, wakes)
        self._note_call(last_account=token.email)
        action = "added" if new else "updated"
        return ok(
            f"Token {action}",
            action=action,
            token_id=token.id,
            email=token.email,
            auto_enabled=token.is_active and token.id in asleep,
            reason=token.reason or token.paused_for(),
        )

    def _note_call(self, **news):
        self.plugin.update(news)
        self.store.put_setting("plugin", self.plugin)

    def _job_object(self, request, job, whole=False):
        """A job as its owner may see it: the video object, and whose and how it was."""
        token = self.jobs.token_of(job) or Token()
        start = job.submitted_at or job.created_at
        return {
            **self.video_object(request, job, whole),
            **job.pick("state", "stage", "n", "origin", "token_id"),
            **plan_fields(job.plan),
            "plan": job.plan.describe(),
            "account": token.email,
            "username": token.name,
            "cost": job.spent(token),
            "duration": (job.completed_at or now()) - start,
            "urls": self.output_urls(request, job),
            "kept": all(self.media.path(output.file) for output in job.done()),
        }

    async def list_jobs(self, request):
        """?q (a part of the prompt) &kind &state &model &token_id &after &limit."""
        query = request.query
        limit = one_of(query, "limit", range(1, 501), 50)
        jobs = await self.jobs.owners_page(
            limit + 1,
            state=one_of(query, "state", VIDEO_STATES, ""),
            after=await self.find_job(query["after"]) if query.get("after") else None,
            q=query.get("q", ""),
            model=query.get("model", ""),
            kind=one_of(query, "kind", ("image", "video"), ""),
            token_id=one_of(query, "token_id", self.tokens, None),
        )
        rows = [self._job_object(request, job) for job in jobs[:limit]]
        return ok(jobs=rows, has_more=len(jobs) > limit)

    async def get_job(self, request):
        job = await self.job_of(request)
        return ok(job=self._job_object(request, job, whole=True))

    async def delete_job(self, request):
        await self.jobs.delete(await self.job_of(request))
        return ok("Deleted")

    async def cancel_job(self, request):
        await self.jobs.cancel(await self.job_of(request))
        return await self.get_job(request)

    def _log_object(self, request, job):
        """A job as a row of the original's log, base64 cut out."""
        row = self._job_object(request, job)
        status = GatewayError(**job.error).status if job.error else 200
        asked = to_json({name: row[name] for name in ("model", "prompt", "n", "origin")})
        return {
            **{name: row[name] for name in ("id", "token_id", "duration", "progress")},
            "task_id": job.id,
            "task_status": job.state,
            "operation": f"generate_{job.kind}",
            "status_code": status if job.ended else 102,
            "token_email": row["account"],
            "token_username": row["username"],
            "notes": job.notes,
            "created_at": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(job.created_at)),
            "request_body": re.sub("[0-9A-Za-z+/]{200,}=*", "…", asked),
            "response_body": to_json(job.error or {"urls": row["urls"]}),
        }

    async def list_logs(self, request):
        limit = one_of(request.query, "limit", range(1, 1001), 100)
        jobs = await self.jobs.owners_page(limit)
        start = (await asyncio.to_thread(self.store.settings)).get("log", 0)
        return [self._log_object(request, job) for job in jobs if job.created_at > start]

    async def clear_logs(self, request):
        """Begins anew; the jobs stay, for those who ask for them."""
        await self.store.put_setting("log", now())
        return ok("Cleared")

    async def get_log(self, request):
        return self._log_object(request, await self.job_of(request))

    async def state(self, request):
        tokens, jobs = self.tokens.values(), self.jobs.open.values()
        return ok(
            tokens=[token_object(token, masked=True) for token in tokens],
            jobs=[self._job_object(request, job) for job in jobs],
            stats=self.gateway.counters(),
            disk_free_mb=self.media.free_disk() >> 20,
        )

    def _credits(self):
        return sum(token.credits or 0 for token in self.tokens.values() if token.is_active)

    async def system_info(self, request):
        info = {
            **self.gateway.counters(),
            "total_credits": self._credits(),
            "version": __version__,
            "cache_bytes": await asyncio.to_thread(self.media.expire, math.inf),
        }
        return ok(info=info, **info)

    async def empty_cache(self, request):
        return ok("Emptied", cache_bytes=await asyncio.to_thread(self.media.expire, -1))

    async def test_proxy(self, request):
        """{proxy_url}: whether Google is reached, by the set one or none."""
        fields = read_token_fields(await read_json(request))
        proxy = fields.get("proxy_url") or self.settings["proxy.proxy_url"]
        url = self.settings["flow.labs_base_url"]
        start = now()
        wire = self.gateway.wire
        async with wire.stream(url, proxy=proxy, timeout=SHORT_TIMEOUT) as reply:
            return ok(
                "Reached",
                status_code=reply.status,
                test_url=url,
                final_url=str(reply.url),
                elapsed_ms=int((now() - start) * 1000),
            )

    async def metrics(self, request):
        states = Counter(job.state for job in self.jobs.open.values())
        rows = {
            **self.gateway.counters(),
            "credits": self._credits(),
            "waiting_jobs": len(self.pool.queue),
            **{f'jobs{{state="{state}"}}': states[state] for state in OPEN},
        }
        text = "".join(f"flow2api_{name} {value}\n" for name, value in rows.items())
        headers = {"Content-Type": "text/plain; version=0.0.4"}
        return web.Response(text=text, headers=headers)

    async def page(self, request):
        """Its one script and its one style may run by their hashes, and nothing else."""
        path = Path(__file__).with_name("admin.html")
        if not path.exists():
            raise GatewayError("not_found", f"The page is in {path.name}, which is missing")
        text = await asyncio.to_thread(path.read_text, "utf-8")
        policy = PAGE_POLICY
        for tag, inside in re.findall(r"<(script|style)>(.*?)</\1>", text, re.DOTALL):
            code = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
            policy += f"; {tag}-src 'sha256-{code}'"
        headers = {**PAGE_HEADERS, "Content-Security-Policy": policy}
        return web.Response(text=text, content_type="text/html", headers=headers)


# ---- 13. Simulated Flow ----------------------------------------------------------------
# fmt: off
LANDSCAPE_CLIP = zlib.decompress(base64.b85decode(  # 3 s of H.264 in an MP4, 288x160
    "eO3uP)Y}*TF=H9ggr2=@lScM^t2CBU_DmA8&d4^#GDHv2%O3h?i-~yQX_Cm2o%BdyM3yL7vWyCavV`96H>1z"
    "<-uu6IKfiO&x#ygF?mg!_^E*EP0L0u#A-)~~L;?UX0}uyE**VBniQucM1OTv;1R^mA003`7kUI|e%Ye}UU{^"
    "K31VGQ9gXynce_tO1{&O&cPd~}u*$b5INnZ3bVgHN<o(uf<IsflmCNXfzr7ux<94P?gB6#lr(w{rF<I?vsn-"
    "Xvy&Y&Ph!2LaUMUbuoXMU$I<lJ%I{y!{19yt6?Pit^ZG;;RAdE+4;rd5K6j~giL4I<Ek?z|=n$FPau{PAu(("
    "%=mA_ZDNwOw|D-7jIB54Il;JcKGB%p#4iJpu}?lBTz8<H;;b|f$!hJSsje3&x8XwzmEfg7eHQIfq*wLbBaNz"
    "Kog8<A_~g{u(~fW^R$<4uC79R_qve$w~NY)VGtk?K%y7?$LS~lfYW`!Ja+0K5&?Ctf77A1c|K^nw6kVloa-R"
    ">11S}x{UC{gB)l#2gS2ml%m<PtNIz}MeA{;3ZCPlWi*9o$4upmHj`iLh{0BjH0g$8_Ik^)5ygv-Q8^W4^bB1"
    "d2?^Ohi+hqh(!sBDFswq%^uTGF3c)gX%ai(Ydx<_e&vLWx+y;gz8ecUQ4RjJd?t#Qbrbuuo|y5p6xvfK$uPO"
    "5tBVL~F=x5I~P((;gw<FJXPFZ-wj<q9C^O{>v;bTnwzGiF`SDwKL+lk*JLV#`7HRN}RaeFWR7_q}R}e%Br~V"
    "WYLpQ|tXMw!t*f6!ObYy#vD^D-vd@3fD*aGtO}?Q3Op81x3R}jdv)vu(l_Gh;xy+bjg(mrhM1m|Ez7`B6U?h"
    "rMzL0YANqG9C<*lG_`a1n*00*mDSL!TM}D0GSX^7C91~u-!GcRsoC7b!;f9LySd!??QvJXVz{#~d@)_mjH}U"
    "faj4)3jco9<%Cpi@8%Kez`1O|*l{)nYVWnCt)Ty2|>4TMT2D*}7AS-rFJ2;59CY}wlh9N(WQp{##uIcTD&0g"
    "HNpjouREmT^{SKybH10TVu#U+nFyOKs?bJIOK(Vns@m|3(L+C7hnT)QaTF#I^ij#_ob>v_}Cf?Fg<!ds6EPK"
    "ob0D@;bip9Wu(I%E^vY4Ev><Fmbd-thh#SgTsBXhhbYK}q9pR?4z&LOqSu!+nUwj>T0E8$RB+7HO-XD6f8(A"
    "<ypk<Q#L-Zw+W8zH;JR8Nd10@!7&7dLJhFSNd>{pGt2fvA@#yT88&&i~f|YI)*{F?oNL$Htm%eS!6>xG$JqU"
    "@NA0t-n0`J;hbM`*vsXjN~zk{dGWy_(v{c@i;!^^{Z5k<`Hj7;etHI~Rj`SfJHPHJz9IbX0YP^iEq)U#8DjZ"
    "9x!V!WKCr2CQX>YD8h%u}{SnRn{*b>>4q-@PU;?q0*Q@8;!^)@McJYmvOK;h3H|0yNvQ6zGSL@L=5zdbf2j}"
    "5Uf|CrWdi6T@&S8izd7FWjVQoWqTa(}+#ct+D8@IbC&$>&>xH?AKx-`;V=El?Xs3If3%%4io=JK4szC|cy%e"
    "zu8HxQ?8hUJfz();CfH^+3R!5j6bK$QiX_UvN*onoc$ewSD?&$dsUeGoR#jt=uge0$7^U*@OrzY35bno8N|4"
    "!dFlMK9gL%J_unTPP?D)SjrYde5~LmeQVIopzwS_(H~(slCApMb5D0#;yuC`7c_$RTU-;h#T02MCUr02W;hp"
    "UoIA3K?tHoiFr&nSr#-+>}-w3V+u)uFVlEKH0vrGQGyg<YZZxCpNrZ@DSf(#Yt+YDk0vV6TBFSF`CCV%v`?w"
    "3)lYK1tI`cM%nB`Jk>sv=Mh!rIX&cjAM{BaP>R>zl=jZ2aOxPQL^PEVL5GG2+*9zVxB~7ZME-M+IG3e&F%UX"
    "MQ!+R{DYgr9I_<PSShnpRreW(&Mn{Ak4{k)u9_hBY@wyHtf)iOcgwVELFZ$i9|8xD=7*&-|c%dt(8xBn-wqJ"
    "Q8v&B0td0onZVsrZx;($>N!^L?BuRSVTx+q=4c6o+20>@iRBEHtx_Y&f<gzUY+7ZKZx>J^LWgKPBg?6ZbH6M"
    "#6WlAAIEyFj-Qlg2_)kha0e1R{M#K98CV;^wWC6o!=eY7sm!JQ}D^ehz>bihpFm2h1`&bSe5$*etnI3()VcY"
    "F%1P$abM0TEG%_6&9(UJmKpmSFvn(wMfeDR`@(WH@x1A6!=86x-2ruLCG`vMGo7HeiOD)HmXi?>5E81E*~vY"
    "cJ|de^Bc^v*d^gTkG~7$EnElD1jP5~aJE{_S26No2t|A(fI~@_{qr4eT_7i*(vF5}RbUFx*y0%fKvrmT?WzN"
    "#&Zq2LOdb%ji=<G+9rbA{<o_*pM>ZgCLTQ<*49*VMiq7$|7f_3<@Op0#C&-D?2vX><-3Sf#Lmcl3UpbjsD$#"
    "RqQxSTYB=&O#<oKh&$k0zhs@3%zkihy4An5<~fTGl&txWE^t`g|qP`rzRV7PgY|6Om9?!DJPJX8d<~3nm+<#"
    "MHixHU765zY-a7+dxxTQP18bCmy|?%WpY8@MYUalF;Jx-k3EFT8)p@ykNIZ<6$W_QqF@q1cuBCsV|zkO>VTv"
    "HIFIRtZS^2TdN}I5y?`ZQR90CTI6U(5kYiCLtmLaJQ|t(f*z549JFe}HI(Oln-lH{>o`GOoCiaO(nD9<(?%X"
    "Dx*_(&K%rDI<mjE+-WDfh!CIDsZ1Y74WtC^sRf#XOY8=&6X0{~RjY9%E_r)GvZU*;pW5`gxq8c3;<;at?Wv)"
    "!d5p6$|g3`B=j}1jKv`~fuBJ$}jvL%~X9heL~!7SEo?N#Hu;&)lCQcduu_rGd@ZiNJYkD!rfVcLU_t^Is6Jx"
    "Ugo)lUZyy^$0cpRK0oIMj?8nDKlK^vlAU;$y}uQ{{mcABI1a7?VRmt%X#$k&<J)00Twn+Dwi-zQM7@(MZJP{"
    "Xs6j{r4Q%jFlLhpacNFSNmBiT^sIfbvZJyg%SWrz6Jct&R=bAJzeXUrCfqwa$&#(80<kZ4>t}fvJ}V7eGu}k"
    "?4fz&KDmWRPl^vy==wSmP6&G=OevX**8D6~jSA&cvQ-%DOp4w02_6;cJ)hq;N&Sp$uFSqE$CVhBILdAP=yHv"
    "Xhbl(9GSK2R^l8Gt8!!~-8eCUg&lqn0^fpGli3bH^W-E+flo%=wAXCB?NjUHAe_U#ues4PBfUK!_@MwRD)X5"
    "odb8J_!JZRd(fE^Ha49!s%xYsSia4)3mnil!JxDI($z{N&ge9!kV-05}UM!}k^9uVk%h&>EgK^?p$UhjnnJ6"
    "%Ty72sHk9J5PNqwS+#o{lA`yW(t?Q~dCoAiAv9X`vGRMtf4A9{NyXAPcb0owcJKNrUTZ$=H>F`U4DX0XB3#@"
    "}nw|S?KI%p@PJh2qRM61w#wn=B0O*M!|7^00"
), -15)
# fmt: on
# Its frames are square, and hold both clips: sizes, and what its header cuts off. (Left
# and top edges can't be cut: browsers leave them in.)
PORTRAIT_CLIP = LANDSCAPE_CLIP
for wide, tall in (
    ("0120000000a00000", "00a0000001200000"),
    ("012000a0", "00a00120"),
    ("bf020c", "bc083c"),
):
    PORTRAIT_CLIP = PORTRAIT_CLIP.replace(bytes.fromhex(wide), bytes.fromhex(tall))
SIMULATED_SIZES = {
    "LANDSCAPE": (1376, 768),
    "PORTRAIT": (768, 1376),
    "SQUARE": (1024, 1024),
    "LANDSCAPE_FOUR_THREE": (1200, 896),
    "PORTRAIT_THREE_FOUR": (896, 1200),
}
SIMULATED_TIERS = ("PAYGATE_TIER_NOT_PAID", "PAYGATE_TIER_ONE", "PAYGATE_TIER_TWO")
# A pattern of upstream keys, and credits by tier; -: not there. The first match counts.
SIMULATED_PRICES = r"""
    _low_priority$                -   -   0
    _4k$                          -   -  50
    _1080p$                       -   0   0
    lite_[46]s                    -   -   5
    _lite$                       10  10   5
    fast_[46]s                    -   -  10
    fast\w*_ultra                 -   -  10
    _fast                        20  20   -
    quality_[46]s                 -   - 100
    ^veo_3_1_(t2v|i2v_s|extend) 100 100 100
    ^abra_edit$                  20  20  20
    ^abra_..v_4s$                 7   7   7
    ^abra_..v_6s$                10  10  10
    ^abra_..v_8s$                12  12  12
    ^abra_..v_10s$               15  15  15
    ^[A-Z_0-9]+$                  0   0   0
"""
DEMO_ACCOUNTS = {"pro": ("PAYGATE_TIER_ONE", 1000), "ultra": ("PAYGATE_TIER_TWO", 25000)}


def block_picture(text, width, height):
    """A PNG made from a text: waves in two colours of its hash."""
    code = hashlib.sha256(text.encode(errors="replace")).digest()
    silk = bytes(abs(x * (code[0] + 64) * 3 // width % 256 - 128) for x in range(2 * width))
    swing = (1 + math.sin(code[1] + y * code[2] / 40 / height) for y in range(height))
    rows = b"".join(b"\0" + silk[int(width * part / 2) :][:width] for part in swing)
    ends = [*zip(code[3:6], code[6:9], strict=True)]
    colours = bytes(a + (b - a) * shade // 128 for shade in range(129) for a, b in ends)
    return png(width, height, colours, rows)


def png(width, height, colours, rows):
    """colours: three bytes each; rows: a zero, then a byte for the colour of each pixel."""
    chunks = {
        b"IHDR": struct.pack(">2I5B", width, height, 8, 3, 0, 0, 0),
        b"PLTE": colours,
        b"IDAT": zlib.compress(rows, 1),
        b"IEND": b"",
    }
    file = b"\x89PNG\r\n\x1a\n"
    for kind, data in chunks.items():
        file += len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)
    return file


@dataclass
class SimulatedAccount:
    """A Google account; at: its last access token."""

    email: str
    tier: str
    credits: int
    at: str = ""


@dataclass
class Medium:
    """Something that the simulated Flow has made, or is making until `ready`."""

    name: str
    kind: str  # "image" or "video"
    prompt: str
    ratio: str  # a key of SIMULATED_SIZES
    ready: float
    project: str
    batch: str
    scene: str

    def state(self):
        if now() < self.ready:
            return "MEDIA_GENERATION_STATUS_ACTIVE"
        if "unsafe" in self.prompt:
            return "MEDIA_GENERATION_STATUS_FAILED"
        return "MEDIA_GENERATION_STATUS_SUCCESSFUL"

    def file(self, scale=1):
        """A picture of its prompt; or a clip, the prompt in a box that players skip."""
        text = f"{self.name} {self.prompt}"
        if self.kind == "image":
            width, height = SIMULATED_SIZES[self.ratio]
            return block_picture(text, width * scale, height * scale)
        note = b"free" + text.encode(errors="replace")[:4000]
        clip = PORTRAIT_CLIP if self.ratio == "PORTRAIT" else LANDSCAPE_CLIP
        return clip + (len(note) + 4).to_bytes(4) + note


class SimulatedFlow:
    """A small Google over HTTP on loopback: sessions, projects, credits, uploads,
    pictures, clips, upscaling, keys, prices; its content policy refuses "unsafe"."""

    def __init__(self, image_seconds=2.0, video_seconds=12.0, anybody=False):
        """anybody: each session token is an account, of the Pro plan."""
        self.image_seconds = image_seconds
        self.video_seconds = video_seconds
        self.anybody = anybody
        self.address = ""
        self.accounts = {}  # session token -> SimulatedAccount
        self.media = {}  # name -> Medium

    def add_account(self, email, tier, credits, st=""):
        st = st or secrets.token_urlsafe(150)
        self.accounts[st] = SimulatedAccount(email, tier, credits)
        return st

    def routes(self):
        return {
            "GET /fx/api/auth/session": self.session,
            "POST /fx/api/trpc/project.createProject": self.create_project,
            "GET /fx/api/trpc/media.getMediaUrlRedirect": self.redirect,
            "GET /fx/api/trpc/flow.projectInitialData": self.listing,
            "GET /v1/credits": self.credits,
            "POST /v1/flow/uploadImage": self.upload,
            "POST /v1/projects/{project}/flowMedia:batchGenerateImages": self.pictures,
            "POST /v1/flow/upsampleImage": self.upscale_picture,
            "POST /v1/video:batchCheckAsyncVideoGenerationStatus": self.statuses,
            "POST /v1/video:batchAsyncGenerateVideo{mode}": self.clips,
            "GET /media/{kind}/{name}": self.file,
        }

    async def start(self, *middlewares):
        """Serves on a free port of 127.0.0.1, see `address` -> its runner. middlewares:
        see each call first, to switch faults on."""
        app = web.Application(client_max_size=1 << 30, middlewares=middlewares)
        for route, handler in self.routes().items():
            app.router.add_route(*route.split(), functools.partial(self._answer, handler))
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.address = f"http://127.0.0.1:{runner.addresses[0][1]}"
        return runner

    async def _answer(self, handler, request):
        """Finds whose call it is, by the access token or by the cookie."""
        at = request.headers.get("Authorization", "").removeprefix("Bearer ")
        st = request.headers.get("Cookie", "").partition("=")[2]
        if st and self.anybody and st not in self.accounts:
            name = hashlib.sha256(st.encode()).hexdigest()[:6]
            self.add_account(f"{name}@demo.example", SIMULATED_TIERS[1], 1000, st)
        by_access = {account.at: account for account in self.accounts.values()}
        account = by_access.get(at) if at else self.accounts.get(st)
        if not account and handler not in (self.session, self.file):
            return self.refusal(401, "CREDENTIALS_MISSING")
        body = await request.json() if request.body_exists else {}
        answer = await handler(request, body, account)
        return web.json_response(answer) if isinstance(answer, dict) else answer

    def refusal(self, status, reason="", message="Requested entity was not found."):
        error = {"code": status, "message": message, "details": [{"reason": reason}]}
        return web.json_response({"error": error}, status=status)

    def trpc(self, **body):
        return {"result": {"data": {"json": {"status": 200, **body}}}}

    async def session(self, request, body, account):
        if not account:
            return {}
        account.at = f"ya29.{secrets.token_urlsafe(32)}"
        user = {"name": account.email.partition("@")[0], "email": account.email}
        expires = iso(now() + 3600).replace("+00:00", ".000Z")
        return {"user": user, "expires": expires, "access_token": account.at}

    async def create_project(self, request, body, account):
        return self.trpc(result={"projectId": str(uuid.uuid4())})

    async def listing(self, request, body, account):
        project = json.loads(request.query["input"])["json"]["projectId"]
        contents = {"workflows": [], "media": []}
        for medium in self.media.values():
            if medium.project == project:
                ids = {"primaryMediaId": medium.name, "batchId": medium.batch}
                contents["workflows"].append({"name": medium.scene, "metadata": ids})
                contents["media"].append(self.medium_object(medium))
        return self.trpc(projectContents=contents)

    async def redirect(self, request, body, account):
        medium = self.media.get(request.query.get("name", ""))
        if not medium:
            return self.refusal(404)
        thumbnail = request.query.get("mediaUrlType") == "MEDIA_URL_TYPE_THUMBNAIL"
        kind = "image" if thumbnail else medium.kind
        raise web.HTTPTemporaryRedirect(self.url(medium, kind))

    def url(self, medium, kind):
        return f"{self.address}/media/{kind}/{medium.name}?Expires={int(now()) + 18000}"

    async def credits(self, request, body, account):
        return {"credits": account.credits, "userPaygateTier": account.tier}

    async def upload(self, request, body, account):
        return {"media": {"name": str(uuid.uuid4())}}

    def charge(self, account, elements):
        """Takes the credits, or answers why not."""
        key = elements[0].get("videoModelKey") or elements[0]["imageModelName"]
        rows = [row.split() for row in SIMULATED_PRICES.strip().splitlines()]
        matches = [prices for pattern, *prices in rows if re.search(pattern, key)]
        if not matches:
            return self.refusal(404)
        price = matches[0][SIMULATED_TIERS.index(account.tier)]
        if price == "-":
            return self.refusal(403, "PUBLIC_ERROR_MODEL_ACCESS_DENIED")
        total = int(price) * len(elements)
        if total > account.credits:
            return self.refusal(429, "PUBLIC_ERROR_USER_QUOTA_REACHED")
        account.credits -= total
        return None

    def make(self, body, kind, seconds=0, name=""):
        """Makes the outputs of a submit -> what Google says of them."""
        media = []
        for element in body["requests"]:
            prompt = element.get("textInput", element).get("structuredPrompt")
            ratio = element.get("imageAspectRatio") or element["aspectRatio"]
            medium = Medium(
                name=name or str(uuid.uuid4()),
                kind=kind,
                prompt=prompt["parts"][0]["text"] if prompt else "",
                ratio=ratio.partition("RATIO_")[2],
                ready=now() + seconds,
                project=body["clientContext"]["projectId"],
                batch=body.get("mediaGenerationContext", {}).get("batchId", ""),
                scene=str(uuid.uuid4()),
            )
            self.media[medium.name] = medium
            media.append(self.medium_object(medium))
        return media

    async def pictures(self, request, body, account):
        if refused := self.charge(account, body["requests"]):
            return refused
        if "unsafe" in json.dumps(body):
            return self.refusal(400, "PUBLIC_ERROR_UNSAFE_GENERATION", "Refused.")
        await asyncio.sleep(self.image_seconds)
        return {"media": self.make(body, "image")}

    async def upscale_picture(self, request, body, account):
        await asyncio.sleep(self.image_seconds)
        scale = 4 if body["targetResolution"].endswith("4K") else 2
        larger = await asyncio.to_thread(self.media[body["mediaId"]].file, scale)
        return {"encodedImage": base64.b64encode(larger).decode()}

    async def clips(self, request, body, account):
        source = body["requests"][0].get("videoInput", {}).get("mediaId")
        if source and source not in self.media:
            return self.refusal(404)
        if refused := self.charge(account, body["requests"]):
            return refused
        larger = request.match_info["mode"] == "UpsampleVideo"
        name = f"{source}_upsampled" if larger else ""
        media = self.make(body, "video", self.video_seconds, name)
        return {"media": media, "remainingCredits": account.credits}

    async def statuses(self, request, body, account):
        media = [self.media.get(item["name"]) for item in body["media"]]
        if not all(media):
            return self.refusal(404)
        return {"media": [self.medium_object(medium) for medium in media]}

    def medium_object(self, medium):
        status = {"mediaGenerationStatus": medium.state()}
        if medium.state().endswith("FAILED"):
            status["error"] = {"code": 3, "message": "PUBLIC_ERROR_UNSAFE_GENERATION"}
        output = {"video": {"generatedVideo": {}}}
        if medium.kind == "image":
            output = {"image": {"generatedImage": {"fifeUrl": self.url(medium, "image")}}}
        return {
            **output,
            "name": medium.name,
            "projectId": medium.project,
            "workflowId": medium.scene,
            "mediaMetadata": {"mediaStatus": status},
        }

    async def file(self, request, body, account):
        """A file, whole or a range of it; of a clip under /media/image/ its thumbnail."""
        kind = request.match_info["kind"]
        medium = self.media.get(request.match_info["name"])
        if not medium:
            return self.refusal(404)
        data = medium.file()
        if kind != medium.kind:
            data = block_picture(medium.prompt, 320, 180)
        headers = {
            "Content-Type": "image/png" if kind == "image" else "video/mp4",
            "Accept-Ranges": "bytes",
            "ETag": f'"{medium.name}"',
        }
        if "Range" not in request.headers:
            return web.Response(body=data, headers=headers)
        start, end, _ = request.http_range.indices(len(data))
        if start >= end:
            headers = {"Content-Range": f"bytes */{len(data)}"}
            return web.Response(status=416, headers=headers)
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        return web.Response(status=206, body=data[start:end], headers=headers)


# ---- 14. Main --------------------------------------------------------------------------
class Role(enum.Enum):
    """Who may call a route."""

    PUBLIC = "everybody"
    KEY = "who has the API key"
    ADMIN = "who is logged in"
    EITHER = "who has the API key, or is logged in"


GATEWAY = AppKey("gateway", Gateway)
SESSIONS = AppKey("sessions", Sessions)
TOKEN_ID = r"{id:\d{1,18}}"  # stands for {token}
CONFIG = f"/api/{{group:{'|'.join(CONFIGS)}}}"
# Of the programs before this one; Flow has nothing like it.
ABSENT = """characters characters/search videos/characters videos/characters/{name}
    invite-codes profiles/{name} users/{name}/feed feed enhance_prompt"""
ABSENT_ADMIN = r"""tokens/rt2at tokens/batch-activate tokens/batch-activate-username
    tokens/{token}/{_:sora2/activate|activate-username}
    watermark-free/config cloudflare/{_:.*} characters{_:.*}"""
ROUTES = {
    Role.PUBLIC: {
        "GET /{_:(login|manage)?}": AdminApi.page,
        "GET /health": ServiceApi.health,
        "GET /tmp/{name}": ServiceApi.file,
        "POST /api/{_:(admin/)?}login": AdminApi.login,
        "POST /api/plugin/update-token": AdminApi.plugin_update,
    },
    Role.KEY: {
        "GET /v1/models": ServiceApi.models,
        "GET /v1/models/{model:.+}": ServiceApi.model,
        "POST /v1/chat/completions": ChatApi.complete,
        "POST /v1/images/generations": ImagesApi.generate,
        "POST /v1/images": ImagesApi.generate,  # OpenRouter's name
        "POST /v1/images/edits": ImagesApi.edit,
        "POST /v1/videos": VideosApi.create,
        "GET /v1/videos": VideosApi.list,
        "POST /v1/videos/edits": VideosApi.edit,
        "POST /v1/videos/extensions": VideosApi.extend,
        "GET /v1/videos/{id}": VideosApi.get,
        "DELETE /v1/videos/{id}": VideosApi.delete,
        "POST /v1/videos/{id}/remix": VideosApi.edit,
        "GET /v1/videos/{id}/content": VideosApi.content,
        "GET /v1/stats": ServiceApi.stats,
        "GET /v1/tokens/{token}/{_:pending-tasks(-v2)?}": ServiceApi.pending_tasks,
        "GET /v1/tokens/{token}/profile-feed": ServiceApi.finished_tasks,
        "GET /v1/tokens/{token}/tasks/{job}": ServiceApi.task,
        **{f"* /v1/{path}": ServiceApi.absent for path in ABSENT.split()},
    },
    Role.EITHER: {"GET /metrics": AdminApi.metrics},
    Role.ADMIN: {
        "POST /api/{_:(admin/)?}logout": AdminApi.logout,
        "POST /api/admin/{_:(change-)?}password": AdminApi.change_password,
        f"GET {CONFIG}": AdminApi.get_config,
        f"POST {CONFIG}": AdminApi.set_config,
        "GET /api/settings": AdminApi.list_settings,
        "POST /api/settings": AdminApi.change_settings,
        "GET /api/tokens": AdminApi.list_tokens,
        "POST /api/tokens": AdminApi.add_token,
        "POST /api/tokens/{_:import|batch-add}": AdminApi.import_tokens,
        "POST /api/tokens/st2at": AdminApi.convert_session,
        "POST /api/tokens/batch-enable": AdminApi.enable_all,
        "POST /api/tokens/batch-disable": AdminApi.disable_all,
        "POST /api/tokens/batch-test": AdminApi.test_all,
        "DELETE /api/tokens/batch-delete-disabled": AdminApi.delete_disabled,
        "PUT /api/tokens/{token}{_:(/status)?}": AdminApi.update_token,
        "DELETE /api/tokens/{token}": AdminApi.delete_token,
        "POST /api/tokens/{token}/enable": AdminApi.enable_token,
        "POST /api/tokens/{token}/disable": AdminApi.disable_token,
        "POST /api/tokens/{token}/refresh-at": AdminApi.renew_token,
        "POST /api/tokens/{token}/{_:test|refresh-credits}": AdminApi.check_token,
        "GET /api/jobs": AdminApi.list_jobs,
        "GET /api/jobs/{id}": AdminApi.get_job,
        "DELETE /api/jobs/{id}": AdminApi.delete_job,
        "POST /api/jobs/{id}/cancel": AdminApi.cancel_job,
        "GET /api/logs": AdminApi.list_logs,
        "DELETE /api/logs": AdminApi.clear_logs,
        "GET /api/logs/{id}": AdminApi.get_log,
        "GET /api/plugin/extension.zip": AdminApi.extension,
        "GET /api/state": AdminApi.state,
        "GET /api/stats": ServiceApi.stats,
        "GET /api/system/info": AdminApi.system_info,
        "DELETE /api/cache": AdminApi.empty_cache,
        "POST /api/proxy/test": AdminApi.test_proxy,
        **{f"* /api/{path}": ServiceApi.absent for path in ABSENT_ADMIN.split()},
    },
}
NO_ROUTE = (
    "no such route; there are /v1/chat/completions, /v1/images/generations, /v1/videos"
    " (a client that asks for the Responses API: set it to chat completions)"
)
ADDRESSES = itertools.chain(*ROUTES.values())
ADDRESSES = [route for route in ADDRESSES if not re.search(r"[*?+|\\]", route)]
HTTP_ERRORS = {  # of aiohttp -> code, reason
    405: ("method_not_allowed", "it wants another method: POST makes, GET asks"),
    413: ("request_too_large", "the body is larger than limits.body_mb allows"),
}
CONNECTION_OPTIONS = {
    "access_log": None,
    "auto_decompress": False,  # a small body could be huge
    "keepalive_timeout": 60,  # seconds; also those that a request's head may take
}
SERVER_OPTIONS = {**CONNECTION_OPTIONS, "handler_cancellation": True}
EXPOSED_HEADERS = (
    "openai-poll-after-ms, x-request-id, x-job-id, content-range, retry-after,"
    " x-should-retry, idempotent-replayed"
)


class Door:
    """Lets requests in to their handlers: those that may, and not too many at once."""

    def __init__(self, settings, sessions):
        self.settings = settings
        self.sessions = sessions
        self.requests = 0  # under way

    async def admit(self, role, handler, request):
        """Raises invalid_api_key, request_too_large, unsupported_encoding, queue_full."""
        self._authorise(role, request)
        size = request.content_length or 0
        if size > request.client_max_size:
            raise web.HTTPRequestEntityTooLarge(request.client_max_size, size)
        if role is Role.KEY and self.requests >= self.settings["limits.requests"]:
            raise GatewayError("queue_full", "Too many requests at once", retry_after=10)
        self.requests += 1
        try:
            answer = await handler(request)
        finally:
            self.requests -= 1
        if isinstance(answer, web.StreamResponse):
            return answer
        return web.json_response(answer)  # most handlers return just that

    def _authorise(self, role, request):
        owner = role is not Role.KEY and self.sessions.logged_in(request)
        if role is Role.PUBLIC or owner:
            return
        if role is Role.ADMIN:
            raise GatewayError("invalid_api_key", "Invalid or expired admin token")
        key = self.settings["global.api_key"]
        if not key or not same(bearer(request), key):
            message = "The key is missing or wrong. Send Authorization: Bearer KEY"
            raise GatewayError("invalid_api_key", message)


# Names a request in the log and in its answer, as OpenAI's packages expect it.
REQUEST_ID = contextvars.ContextVar("request id", default="")


def new_request_id():
    return f"req_{random.getrandbits(96):024x}"


@web.middleware
async def answer_errors(request, handler):
    """Failures in the caller's format: {"detail"} under /api, else OpenAI's object."""
    REQUEST_ID.set(new_request_id())
    request[ANSWER_HEADERS] = {"X-Request-Id": REQUEST_ID.get()}
    try:
        if request.method == "OPTIONS":
            return preflight(request)
        if request.headers.get("Content-Encoding", "identity").lower() != "identity":
            message = "Send the body as it is, without Content-Encoding"
            raise GatewayError("unsupported_encoding", message)
        return await handler(request)
    except ConnectionError:  # the client has gone in the middle of an answer
        raise
    except web.HTTPException as err:
        code, reason = HTTP_ERRORS.get(err.status, ("invalid_request", err.reason))
        message = f"{request.method} {request.path[:80]}: {reason}"
        return error_response(request, GatewayError(code, message))
    except Exception as err:
        return error_response(request, told_error(request, err))


def error_response(request, error):
    headers = {"Retry-After": str(int(error.retry_after))} if error.retry_after else {}
    if error.status in (409, 501):  # it would not help
        headers["x-should-retry"] = "false"
    body = error.body()
    if request.path.startswith("/api/"):
        message = str(error)
        body = {"success": False, "detail": message, "message": message, "code": error.code}
    reason = error.code.replace("_", " ")  # some clients show nothing else
    return web.json_response(body, status=error.status, reason=reason, headers=headers)


@web.middleware
async def find_route(request, handler):
    """Where there is none, a browser is led to the page, a client told of the nearest."""
    if getattr(request.match_info.http_exception, "status", 0) != 404:
        return await handler(request)
    address = f"{request.method} {request.path[:80]}"
    browser = "text/html" in request.headers.get("Accept", "")
    if browser and re.match("GET /(?!(api|v1|flow)/.)", address):
        return web.Response(status=302, headers={"Location": "/"})
    nearest = difflib.get_close_matches(address, ADDRESSES, 1, 0.75)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    message = "no such route" if "/api/" in address else NO_ROUTE
    raise GatewayError("not_found", f"{address}: {message}{hint}")


def preflight(request):
    """CORS: browser clients send their key in a header."""
    asked = request.headers.get("Access-Control-Request-Headers")
    headers = {
        "Access-Control-Allow-Headers": asked or "authorization, content-type",
        "Access-Control-Allow-Methods": "GET, POST, DELETE",
        "Access-Control-Max-Age": "86400",
    }
    return web.Response(status=204, headers=headers)


async def add_headers(request, response):
    """Puts on every answer whose it is, and what a browser may read of it."""
    by_aiohttp = {"X-Request-Id": new_request_id()}
    response.headers.update(request.get(ANSWER_HEADERS, by_aiohttp))
    response.headers["Server"] = "Flow2API"  # not the versions of what it runs on
    if request.path.startswith("/api/"):
        response.headers["Cache-Control"] = "no-store"
    else:
        response.headers["Access-Control-Allow-Origin"] = "*"
        response.headers["Access-Control-Expose-Headers"] = EXPOSED_HEADERS


async def background(app):
    """Resumes the open jobs, runs the background loops, and closes all at the end."""
    gateway = app[GATEWAY]
    await gateway.jobs.resume()
    loops = (
        gateway.jobs.poll_forever,
        gateway.jobs.prune_forever,
        gateway.pool.keep_fresh,
        gateway.media.expire_forever,
    )
    tasks = [asyncio.create_task(run_forever(loop)) for loop in loops]
    yield
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await gateway.close()


async def run_forever(loop):
    """What ends a background loop is logged, and the loop begins anew, ever later."""
    for pause in backoff():
        try:
            await loop()
        except Exception:
            log.exception("%s has failed; again in %d s", loop.__qualname__, pause)
        await asyncio.sleep(pause)


def make_app(settings, store):
    """The application on an open store, which it closes at its end."""
    limit = settings["limits.body_mb"] << 20
    app = web.Application(middlewares=[answer_errors, find_route], client_max_size=limit)
    app[GATEWAY] = gateway = Gateway(settings, store)
    app[BODIES] = Bodies(settings)
    apis = [api(gateway) for api in (AdminApi, ServiceApi, ChatApi, ImagesApi, VideosApi)]
    app[SESSIONS] = apis[0].sessions
    door = Door(settings, app[SESSIONS])
    for role, routes in ROUTES.items():
        for route, handler in routes.items():
            api = next(api for api in apis if handler in vars(type(api)).values())
            bound = functools.partial(handler, api)
            add_route(app, route, functools.partial(door.admit, role, bound))
    app.on_response_prepare.append(add_headers)
    app.on_shutdown.append(gateway.jobs.interrupt)
    app.cleanup_ctx.append(background)
    return app


def add_route(app, route, handler):
    """A route; one of /v1 also without /v1, with it twice, and with odd slashes."""
    method, path = route.replace("{token}", TOKEN_ID).split(" ", 1)
    if path.startswith("/v1/"):
        end = path.removeprefix("/v1/")
        again = "" if "{" in end else f"(/+{end})?"
        numbers = itertools.count()
        end = re.sub("/", lambda match: f"{{_{next(numbers)}:/+}}", end)
        path = f"/{{_before:{API_PREFIX.pattern}}}{end}{{_after:{again}/*}}"
    app.add_routes([web.route(method, path, handler)])


class Connection(web.RequestHandler):
    """A client's connection. aiohttp would log what is malformed, and send it back: keys
    and all."""

    def handle_error(self, request, status=500, exc=None, message=None):
        log.warning("A malformed request of %s: %s", request.remote, type(exc).__name__)
        body = bad("This is no HTTP request that can be read").body()
        headers = {"Server": "Flow2API", "X-Request-Id": new_request_id()}
        response = web.json_response(body, status=400, headers=headers)
        response.force_close()
        return response


class Refusal(asyncio.Protocol):
    """For a connection that can't be taken: says so, and closes it."""

    def connection_made(self, transport):
        body = to_json(GatewayError("queue_full", "Too many connections at once").body())
        head = (
            "HTTP/1.1 429 queue full\r\nContent-Type: application/json\r\n"
            f"Retry-After: 10\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
            f"Server: Flow2API\r\nX-Request-Id: {new_request_id()}\r\n\r\n"
        )
        transport.write(f"{head}{body}".encode())
        transport.close()


def file_limit():
    """Raises the limit of open files of this process as far as it may -> that limit."""
    try:
        import resource
    except ImportError:  # Windows
        return 8192
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if most > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return max(soft, most)


async def listen(server, settings):
    """Takes as many connections as this process may have files for -> asyncio's server.
    Raises SettingError."""
    most = file_limit() // 2  # a client's, and one to Google
    loop = asyncio.get_running_loop()

    def take():
        if len(server.connections) < most:
            return Connection(server, loop=loop, **CONNECTION_OPTIONS)
        log.warning("more than %d connections at once; the newest are refused", most)
        return Refusal()

    host, port = settings["server.host"], settings["server.port"]
    try:
        listener = await loop.create_server(take, host, port, backlog=min(128, most // 4))
    except (OSError, ValueError) as err:  # ValueError: no name can be like that
        reason = re.split(r"[]:] ", str(err))[-1].rstrip(")")
        if "could not bind on any" in reason:  # Python 3.13 says no more
            reason = "this machine has no such address"
        hint = "set others with --host and --port (server.host, server.port)"
        message = f"can't listen on {host} port {port}: {reason}; {hint}"
        raise SettingError(message) from None
    with contextlib.suppress(OSError):  # for a container's health check alone
        address = map(str, listener.sockets[0].getsockname()[:2])
        (settings.data / "address").write_text(" ".join(address))
    return listener


def open_store(settings):
    """Opens the database, which holds what the admin page has set, and the secrets."""
    store = Store(settings.data)
    try:
        store.open()
    except OSError as err:
        hint = "make it a folder that this user can write, or set another --data (server.data_dir)"
        message = f"data folder {settings.data}: {err.strerror}; {hint}"
        raise StoreError(message) from None
    settings.read_stored(store.settings())
    return store


async def make_secrets(settings, store):
    """Makes the API key and the admin password that nobody has set -> the new ones; each
    of letters and digits only, so that a double click takes it whole."""
    new = {"global.api_key": settings["global.api_key"]} if settings.demo else {}
    makers = {"global.api_key": (16, str), "global.admin_password": (8, hash_password)}
    for name, (size, keep) in makers.items():
        if not settings[name]:
            new[name] = secrets.token_hex(size)
            stored = keep(new[name])
            settings.layers["generated"][name] = stored
            await store.put_setting(f"generated:{name}", stored)
    return new


def weak_secrets(settings):
    """Warns of each secret that other machines could guess."""
    if settings["server.host"] in ("127.0.0.1", "::1", "localhost"):
        return
    for name in SECRETS:
        secret = settings[name]
        if 0 < len(secret) + len(set(secret)) < 20:
            hint = "make it longer, or set server.host to 127.0.0.1"
            yield f"{name} ({settings.source(name)}) is easy to guess for others: {hint}"


TRY_IT = """Try it:
curl -N %s/v1/chat/completions -H "Authorization: Bearer %s" -d '{"model":"veo_3_1-fast",\
"stream":true,"messages":[{"role":"user","content":"a boat"}]}'"""


def greet(settings, port, new, accounts):
    """What a person needs next. Secrets are shown when they are new, and never again."""
    host = settings["server.host"]
    url_host = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)
    url = URL.build(scheme="http", host=url_host, port=port)
    demo = "  (demo: a simulated Flow)" if settings.demo else ""
    print(f"Flow2API {__version__} on {url}{demo}")
    wide = " (every address of this machine)" if host != url_host else ""
    print(f"listens on: {host}{wide}, port {port}")
    print(f"admin_username: {settings['global.admin_username']}")
    for name, secret in new.items():
        print(f"{name.partition('.')[2]}: {secret}")
    if new and not settings.demo:
        print("These are not shown again. For a new password: --reset-password")
    if accounts:
        print(TRY_IT % (url, new.get("global.api_key", "$KEY")))
    else:
        print(f"Next: open {url}, log in, and add an account there.")
    fate = "the demo keeps nothing" if demo else "what was sent goes on at the next start"
    print(f"Ctrl-C stops it; {fate}.", flush=True)


async def start_demo(settings):
    """Starts a simulated Flow, and points the settings to it -> its runner."""
    seconds = settings["demo.image_seconds"], settings["demo.video_seconds"]
    flow = SimulatedFlow(*seconds, anybody=True)
    for name, (tier, credits) in DEMO_ACCOUNTS.items():
        flow.add_account(f"{name}@demo.example", tier, credits, st=name)
    runner = await flow.start()
    demo = {
        "flow.labs_base_url": f"{flow.address}/fx/api",
        "flow.api_base_url": f"{flow.address}/v1",
        "flow.poll_interval": 1.0,
        "proxy.proxy_enabled": False,
        "cache.enabled": True,
        "cache.timeout": 0,
    }
    settings.layers["command line"].update(demo)
    unless_set = {"server.host": "127.0.0.1", "global.api_key": "demo"}
    settings.layers["generated"].update(unless_set)
    return runner


async def serve(settings):
    """Serves until SIGTERM or SIGINT; leaves within five seconds of it."""
    async with contextlib.AsyncExitStack() as stack:
        if settings.demo:
            stack.push_async_callback((await start_demo(settings)).cleanup)
        store = open_store(settings)
        for warning in weak_secrets(settings):
            log.warning(warning)
        app = make_app(settings, store)
        runner = web.AppRunner(app, **SERVER_OPTIONS, shutdown_timeout=2)
        stack.push_async_callback(runner.cleanup)
        await runner.setup()
        listener = await listen(runner.server, settings)
        stack.callback(listener.close)
        pool = app[GATEWAY].pool
        if settings.demo:
            for st in DEMO_ACCOUNTS:
                await pool.add(st)
        new = await make_secrets(settings, store)
        greet(settings, listener.sockets[0].getsockname()[1], new, pool.tokens)
        gc.freeze()  # what is imported stays: no need to look at it again and again
        with contextlib.suppress(asyncio.CancelledError):  # what asyncio makes of SIGINT
            await asyncio.Event().wait()
        log.info("stopping")


async def check(settings, verbose):
    """--check: tells what is wrong, then what is set -> is all well? Spends nothing."""
    all_well = True
    async for well, text in findings(settings):
        print("ok   " if well else "WRONG", text)
        all_well &= well
    print("Settings that differ from their defaults (with --verbose: all):")
    for name, setting in SETTINGS.items():
        value = settings[name]
        if verbose or value != setting.default:
            hidden = "(set)" if value and name in HIDDEN else repr(value)
            print(f"      {name} = {hidden}  ({settings.source(name)})")
    return all_well


async def findings(settings):
    """(is it well, a line with what to do)"""
    for warning in settings.warnings:
        yield False, warning
    try:
        gateway = Gateway(settings, open_store(settings))
    except StoreError as err:
        yield False, str(err)
        return
    yield True, f"database {gateway.store.path}, schema {len(MIGRATIONS)}"
    free = gateway.media.free_disk() >> 20
    yield free > 500, f"{free} MB free on the disk of {settings.data}; it should have 500"
    for warning in weak_secrets(settings):
        yield False, warning
    for name in ("flow.labs_base_url", "flow.api_base_url"):
        yield await check_address(gateway, settings[name])
    if not gateway.pool.tokens:
        yield False, "no Google account yet: start Flow2API and add one (README)"
    for token in gateway.pool.tokens.values():
        well, text = await check_account(gateway.pool, token)
        yield well, f"account {token.email}: {text}"
    await gateway.close()


async def check_address(gateway, url):
    way = "the proxy" if gateway.settings["proxy.proxy_enabled"] else "no proxy"
    try:
        async with gateway.wire.stream(url, timeout=SHORT_TIMEOUT) as reply:
            return reply.status < 500, f"{url} answers {reply.status} through {way}"
    except GatewayError:
        return False, f"{url} can't be reached through {way}; check network and [proxy]"


async def check_account(pool, token):
    try:
        token.update(**await pool.adapter_for(token).balance(token))
    except GatewayError as err:
        return False, str(err)
    text = f"{TIERS.get(token.tier, 'plan unknown')}, {token.credits} credits"
    if not token.is_active:
        text += f"; disabled: {token.reason or 'by hand'}; enable it"
    return token.is_active, text


class LogFilter(logging.Filter):
    """Names the request of a line, and folds warnings that repeat within a minute."""

    def __init__(self):
        super().__init__()
        self.lines = {}  # text -> (when it was printed, how often it was left out since)

    def filter(self, record):
        record.request = f"{REQUEST_ID.get()} ".lstrip()
        if record.levelno < logging.WARNING:
            return True
        text = record.getMessage()
        printed, left_out = self.lines.pop(text, (0, 0))
        if record.created - printed < 60:
            self.lines[text] = printed, left_out + 1
            return False
        if left_out:
            record.msg = f"{text} (and {left_out} times more)"
            record.args = ()
        self.lines[text] = record.created, 0
        if len(self.lines) > 500:
            del self.lines[next(iter(self.lines))]
        return True


def start_log():
    style = "%(asctime)s %(levelname)s %(request)s%(message)s"
    logging.basicConfig(level=logging.INFO, format=style)
    logging.root.handlers[0].addFilter(LogFilter())


def parse_arguments(argv):
    rows = [f"  {row.name:28} {row.help} [{row.default}]" for row in SETTINGS.values()]
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.description = "Your own Google Flow accounts as an OpenAI-compatible API."
    title = "settings, in setting.toml or as FLOW2API_<SECTION>_<KEY>:"
    parser.epilog = "\n".join([title, *rows])
    option = parser.add_argument
    beside = Path(__file__).parent
    option("--config", type=Path, default=beside, help="default: setting.toml beside it")
    option("--data", dest="data_dir", help="data folder; default: data/ beside the config")
    option("--host", type=lambda text: text.strip("[]"), help="address to listen on")
    option("--port", help="port to listen on")
    instead = parser.add_mutually_exclusive_group().add_argument
    instead("--demo", action="store_true", help="run on a simulated Flow, keep nothing")
    instead("--check", action="store_true", help="say what is wrong, spend nothing, exit")
    instead("--backup", type=Path, metavar="FILE", help="copy the database, and exit")
    instead("--reset-password", action="store_true", help="print a new one, and exit")
    option("--verbose", action="store_true", help="with --check: print all settings")
    option("--version", action="version", version=f"Flow2API {__version__}")
    return parser.parse_args(argv)


def load_settings(arguments):
    """Raises SettingError."""
    settings = Settings()
    settings.demo = arguments.demo
    if arguments.demo and arguments.data_dir:
        raise SettingError("--demo keeps nothing: start it without --data")
    path = Path(os.path.expanduser(arguments.config)).resolve()
    if path.is_dir() and path.suffix != ".toml":  # a folder: the file in it, if any
        path /= "setting.toml"
    elif not path.exists():
        raise SettingError(f"--config {path}: there is no such file")
    if not arguments.demo:  # the demo touches nothing of the real one
        settings.read_file(path)
    if not path.exists():
        for other in path.parent.glob("[Ss]ett*"):
            settings.warnings.append(f"{other} is not read: its name is not {path.name}")
    settings.read_environment(os.environ)
    for option in ("data_dir", "host", "port"):
        if (value := getattr(arguments, option)) is not None:
            settings.put("command line", f"server.{option}", value, "command line")
    check_settings(settings)
    return settings


def check_settings(settings):
    """Checks what the table of settings can't. Raises SettingError."""
    try:
        read_networks(settings["server.trusted_proxies"])
    except ValueError as err:
        raise SettingError(f"server.trusted_proxies: {err}") from None
    for name, (form, fault) in TEXT_FORMS.items():
        if name.endswith("base_url") and not re.fullmatch(form, settings[name]):
            raise SettingError(f"{name} {fault}, not {settings[name]!r}")
    names = [*dict.fromkeys(product.name for product in PRODUCTS), "omni_flash_lengths"]
    for name in set(settings.models).difference(names):
        warning = f"[models] {name} is unknown; there are {', '.join(names)}"
        settings.warnings.append(warning)


def reset_password(settings):
    """Also beside a running process, which reads it at the next login."""
    name = "global.admin_password"
    source = settings.source(name)
    if source in ("command line", "environment"):
        raise SettingError(f"{name} is set by the {source}: change it there")
    password = secrets.token_hex(8)
    try:
        Store(settings.data).set_beside(f"admin page:{name}", hash_password(password))
    except sqlite3.Error as err:
        hint = "start Flow2API, or set --data"
        raise StoreError(f"no password is in {settings.data} ({err}): {hint}") from None
    print(f"admin_password: {password}\nIt counts from now on, and ends older logins.")


def main(argv=None):
    arguments = parse_arguments(argv)
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
        settings = load_settings(arguments)
        start_log()
        if arguments.check:
            return 0 if asyncio.run(check(settings, arguments.verbose)) else 1
        if arguments.backup:
            Store(settings.data).copy(arguments.backup)
        elif arguments.reset_password:
            reset_password(settings)
        else:
            for warning in settings.warnings:
                log.warning(warning)
            with tempfile.TemporaryDirectory(prefix="flow2api-") as folder:
                if arguments.demo:
                    settings.layers["command line"]["server.data_dir"] = folder
                asyncio.run(serve(settings))
    except (SettingError, StoreError, OSError) as err:
        print("flow2api:", re.sub(r"\[Errno \d+\] ", "", str(err)), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    finally:  # that nobody reads our output any more is no error
        with contextlib.suppress(AttributeError, OSError):
            sys.stdout.close()
