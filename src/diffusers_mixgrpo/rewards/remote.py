"""Rewards that live behind HTTP: what they all share, and the client of `examples/serve_rewards.py`.

The reward server speaks JSON of its own, since the answers of an OpenAI-compatible chat API are texts, not numbers:

    POST /<name>   {"prompts": [str, ...], "images": [base64 of a PNG, ...], "columns": {str: [...], ...}}
    200            {"scores": [number or null, ...]}                    one per image; null where it has no score
    4xx or 5xx     {"error": {"message": str, "field": str or null}}    the field that is wrong, if it is one
    GET /health    {"status": "ok", "rewards": [name, ...]}

A request carries `Authorization: Bearer <token>` if the environment has a token.
"""

import asyncio
import base64
import io
import json
import logging
import math
import os
import random
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import unquote
from weakref import WeakKeyDictionary

import httpx2


logger = logging.getLogger(__name__)

RETRIED = (408, 409, 429)  # and all of 5xx
MAX_WAIT = 60.0  # seconds before a retry, whatever the server asks for
_jitter = random.SystemRandom()  # the global generator's state belongs to the training


class RemoteRewardError(RuntimeError):
    """Why a server gave no score. Holds no API key and no picture."""


class HTTPReward:
    """
    Base of the rewards that ask a server: batches, a limit on requests under way, time limits, retries, the API key.

    A subclass says what to ask (`_request`) and how to read the answer (`_read`). Whatever fails (no connection, no
    answer in time, an HTTP error, an answer without a score) makes `None` of the images concerned, one warning for
    the whole call, and `last_error`.

    A request is tried again after a connection error, a timeout, and the statuses 408, 409, 429 and 5xx: after
    `backoff`, `2 * backoff`, `4 * backoff`... seconds, each shortened at random by up to a half, or later if the
    server says so (`Retry-After`), but after 60 seconds at most.

    Args:
        url (`str`):
            Where to send the requests, `http://` or `https://`, without a password in it. The environment's proxies
            (`HTTP_PROXY`, `NO_PROXY`...) hold.
        name (`str`): The reward's name in logs (`__name__`).
        batch_size (`int`): Images in one request.
        image_format (`str`): `"PNG"` or `"JPEG"` (quality 95).
        api_key_env (`str`, *optional*):
            Environment variable with the API key, sent as `Authorization: Bearer ...` if it is set. Read at each
            call; never kept on the object, in a log or in an error. `None` sends no key.
        max_concurrency (`int`): Most requests under way at once from this object, in all calls of one event loop.
        timeout (`float`): Seconds that one request may take in all, from connecting to the end of the answer.
        max_retries (`int`): How often a request is tried again.
        backoff (`float`): Seconds before the first retry.

    Attributes:
        last_error ([`RemoteRewardError`], *optional*):
            Why the last image that has no score has none; `None` as long as all have one.

    Raises:
        `ValueError`: If an argument is out of range.
    """

    def __init__(
        self,
        url: str,
        *,
        name: str,
        batch_size: int,
        image_format: str,
        api_key_env: str | None,
        max_concurrency: int,
        timeout: float,
        max_retries: int,
        backoff: float,
    ):
        _check_url(url)
        if image_format not in ("PNG", "JPEG"):
            raise ValueError(f"`image_format` must be 'PNG' or 'JPEG', got {image_format!r}.")
        for argument, value, least in (
            ("batch_size", batch_size, 1),
            ("max_concurrency", max_concurrency, 1),
            ("max_retries", max_retries, 0),
            ("backoff", backoff, 0),
        ):
            if value < least:
                raise ValueError(f"`{argument}` must be at least {least}, got {value}.")
        if not timeout > 0:
            raise ValueError(f"`timeout` must be more than 0 seconds, got {timeout}.")
        self.__name__ = name
        self.url = url
        self.batch_size = batch_size
        self.image_format = image_format
        self.api_key_env = api_key_env
        self.max_concurrency = max_concurrency
        self.timeout = timeout
        self.max_retries = max_retries
        self.backoff = backoff
        self.last_error: RemoteRewardError | None = None
        self._gates: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_gates": None}  # a gate belongs to a running event loop

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"_gates": WeakKeyDictionary()})

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.__name__!r} at {self.url!r}, api_key_env={self.api_key_env!r})"

    async def __call__(self, prompts: Sequence[str], images: Sequence[Any], **columns: Any) -> list[float | None]:
        """
        Score `n` images.

        Args:
            prompts (`Sequence[str]` of length `n`): What each image should show.
            images (`Sequence[PIL.Image.Image]` of length `n`): Of any mode and size.
            columns: Other columns of the data set, of length `n` each.

        Returns:
            `list[float | None]` of length `n`: `None` where there is no score.

        Raises:
            `ValueError`: If there are not as many prompts as images, or the API key cannot stand in a header.
        """
        if len(prompts) != len(images):
            raise ValueError(f"`prompts` and `images` must be as many, got {len(prompts)} and {len(images)}.")
        gate = self._gates.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(self.max_concurrency))
        # The time limit is that of `_try`, on a request as a whole; the client's own are on parts of it.
        limits = httpx2.Limits(max_connections=None)
        async with httpx2.AsyncClient(headers=self._headers(), timeout=None, limits=limits) as client:
            starts = range(0, len(images), self.batch_size)
            batches = [range(len(images))[i : i + self.batch_size] for i in starts]
            found = await asyncio.gather(
                *(self._score_batch(client, gate, places, prompts, images, columns) for places in batches)
            )
        scores = [found[i // self.batch_size].get(i) for i in range(len(images))]
        if failed := scores.count(None):
            logger.warning(
                "%s could not score %d of %d images. The last reason: %s",
                self.__name__,
                failed,
                len(scores),
                self.last_error,
            )
        return scores

    def _request(self, prompts: Sequence[str], images: list[str], columns: dict[str, list[Any]]) -> dict[str, Any]:
        """The JSON to send for a batch; `images` are base64."""
        raise NotImplementedError

    def _read(self, answer: Any, count: int) -> list[float | None]:
        """The `count` scores in the server's JSON; raises [`RemoteRewardError`] if they are not in it."""
        raise NotImplementedError

    async def _score_batch(
        self,
        client: httpx2.AsyncClient,
        gate: asyncio.Semaphore,
        places: range,
        prompts: Sequence[str],
        images: Sequence[Any],
        columns: dict[str, Any],
    ) -> dict[int, float | None]:
        """Scores of the images at some places, by their place; none for those that failed."""
        # A request keeps its place at the gate while it waits to be tried again: a server in trouble gets fewer of
        # them, and no more than `max_concurrency` batches of encoded pictures are in memory.
        async with gate:
            try:
                encoded = await asyncio.to_thread(self._encode_all, images, places)
                if not encoded:
                    return {}
                values = {key: [column[i] for i in encoded] for key, column in columns.items()}
                body = self._request([prompts[i] for i in encoded], list(encoded.values()), values)
                content = await asyncio.to_thread(lambda: json.dumps(body).encode())
                answer = self._json(await self._post(client, content))
                return dict(zip(encoded, self._read(answer, len(encoded)), strict=True))
            except RemoteRewardError as error:
                self._note(str(error))
            except Exception as error:  # a parser of one's own, or what the network may yet think of
                self._note(f"{type(error).__name__}: {error}")
        return {}

    def _encode_all(self, images: Sequence[Any], places: range) -> dict[int, str]:
        """Base64 of the images that can be read, by their place."""
        encoded = {}
        for i in places:
            try:
                encoded[i] = encode_image(images[i], self.image_format)
            except Exception as error:  # PIL raises many kinds for a broken file
                self._note(f"image {i} cannot be read ({type(error).__name__}: {error})")
        return encoded

    async def _post(self, client: httpx2.AsyncClient, content: bytes) -> httpx2.Response:
        """The server's answer, with retries."""
        for attempt in range(self.max_retries + 1):
            outcome = await self._try(client, content)
            asked = 0.0
            if isinstance(outcome, httpx2.Response):
                if outcome.is_success:
                    return outcome
                status, asked = outcome.status_code, _retry_after(outcome)
                outcome = f"HTTP {status}: {self._shorten(outcome.text)}"
                if status not in RETRIED and status < 500:
                    raise RemoteRewardError(f"{outcome} ({self.url})")
            if attempt < self.max_retries:
                pause = self.backoff * 2**attempt * _jitter.uniform(0.5, 1.0)
                await asyncio.sleep(min(max(pause, asked), MAX_WAIT))
        raise RemoteRewardError(f"{outcome} ({self.url}, tried {self.max_retries + 1} times)")

    async def _try(self, client: httpx2.AsyncClient, content: bytes) -> httpx2.Response | str:
        """One request: the answer of whatever status, or in words why there is none."""
        try:
            async with asyncio.timeout(self.timeout):
                return await client.post(self.url, content=content, headers={"Content-Type": "application/json"})
        except TimeoutError:
            return f"no answer within timeout={self.timeout} seconds"
        except httpx2.HTTPError as error:
            return f"{type(error).__name__}: {error}"

    def _json(self, response: httpx2.Response) -> Any:
        try:
            return response.json()
        except ValueError:
            raise RemoteRewardError(
                f"the answer of {self.url} is not JSON: {self._shorten(response.text)!r}"
            ) from None

    def _api_key(self) -> str:
        return os.environ.get(self.api_key_env, "").strip() if self.api_key_env else ""

    def _headers(self) -> dict[str, str]:
        key = self._api_key()
        if any(not "!" <= character <= "~" for character in key):
            raise ValueError(
                f"The API key in the environment variable {self.api_key_env} has characters that cannot stand in a "
                "header; set it to the key alone, in plain ASCII."
            )
        return {"Authorization": f"Bearer {key}"} if key else {}

    def _clean(self, text: str) -> str:
        """Without the API key, and without pictures."""
        key = self._api_key()
        text = text.replace(key, "***") if key else text
        return re.sub(r"[A-Za-z0-9+/]{64,}=*", "...", text)

    def _shorten(self, text: Any) -> str:
        """The beginning of a server's text. It may repeat the key, which must go before anything is cut off."""
        return self._clean(str(text))[:200]

    def _note(self, reason: str) -> None:
        # A new exception: the one that was caught holds, by its traceback, the request with the key in its header.
        self.last_error = RemoteRewardError(self._clean(reason))


class RemoteReward(HTTPReward):
    """
    A reward on another machine, offered there by `examples/serve_rewards.py`. Use it with `await`, or give it to the
    trainer.

    Its scores are those of the reward itself, since pictures travel as PNG, without loss.

    Args:
        url (`str`): The reward's address: the server's, with the reward's name there behind it.
        name (`str`, *optional*): The reward's name in logs. That behind the server's address if unset.
        columns (`Sequence[str]`, *optional*):
            Columns of the data set that the reward needs. All are sent if `None`; they must fit into JSON.
        batch_size (`int`, defaults to 8): Images in one request.
        api_key_env (`str`, *optional*, defaults to `"REWARDS_API_KEY"`): See [`HTTPReward`].
        max_concurrency (`int`, defaults to 2):
            Most requests under way at once. The server scores one at a time; a second one travels meanwhile.
        timeout (`float`, defaults to 300.0): Seconds for one request, those in the server's queue among them.
        max_retries (`int`, defaults to 3), backoff (`float`, defaults to 1.0): See [`HTTPReward`].

    Example:

    ```python
    # on the other machine: python examples/serve_rewards.py --reward_funcs hpsv2 --host 0.0.0.0
    reward = RemoteReward("http://gpu-box:8100/hpsv2")
    scores = asyncio.run(reward(["a cat"], [image]))
    ```
    """

    def __init__(
        self,
        url: str,
        *,
        name: str | None = None,
        columns: Sequence[str] | None = None,
        batch_size: int = 8,
        api_key_env: str | None = "REWARDS_API_KEY",
        max_concurrency: int = 2,
        timeout: float = 300.0,
        max_retries: int = 3,
        backoff: float = 1.0,
    ):
        super().__init__(
            url.rstrip("/"),
            name=name or unquote(url.rstrip("/").rpartition("/")[2]),
            batch_size=batch_size,
            image_format="PNG",
            api_key_env=api_key_env,
            max_concurrency=max_concurrency,
            timeout=timeout,
            max_retries=max_retries,
            backoff=backoff,
        )
        if httpx2.URL(self.url).path == "/":
            raise ValueError(f"`url` must end with a reward's name, like 'http://gpu-box:8100/hpsv2', got {url!r}.")
        self.columns = columns

    async def __call__(self, prompts: Sequence[str], images: Sequence[Any], **columns: Any) -> list[float | None]:
        """
        As [`HTTPReward`].

        Raises:
            `TypeError`: If a column does not fit into JSON.
            `ValueError`: If one of the `columns` asked for is missing.
        """
        names = columns if self.columns is None else self.columns
        if missing := [name for name in names if name not in columns]:
            raise ValueError(f"`columns` asks for {missing}, but the data set's other columns are {list(columns)}.")
        chosen = {name: list(columns[name]) for name in names}
        for name, values in chosen.items():
            try:
                json.dumps(values, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise TypeError(
                    f"The column {name!r} cannot be sent to {self.url} as JSON ({error}). Name the columns that "
                    "the reward needs: RemoteReward(..., columns=[...])."
                ) from error
        return await super().__call__(prompts, images, **chosen)

    def _request(self, prompts: Sequence[str], images: list[str], columns: dict[str, list[Any]]) -> dict[str, Any]:
        return {"prompts": list(prompts), "images": images, "columns": columns}

    def _read(self, answer: Any, count: int) -> list[float | None]:
        scores = answer.get("scores") if isinstance(answer, dict) else None
        if not isinstance(scores, list) or len(scores) != count:
            raise RemoteRewardError(f"{self.url} did not answer with {count} scores: {self._shorten(answer)!r}")
        read = [finite(score) for score in scores]
        if None in read:
            self._note(f"the server's `{self.__name__}` has no score for an image")
        return read


def encode_image(image: Any, image_format: str = "PNG") -> str:
    """Base64 of a `PIL.Image.Image` of any mode, as RGB in a `"PNG"` or a `"JPEG"` of quality 95."""
    buffer = io.BytesIO()
    options: dict[str, Any] = {"quality": 95} if image_format == "JPEG" else {"compress_level": 1}
    image.convert("RGB").save(buffer, format=image_format, **options)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def finite(score: Any) -> float | None:
    """`score` as a `float` if it is a finite number."""
    if isinstance(score, bool) or not isinstance(score, int | float):
        return None
    try:
        return float(score) if math.isfinite(score) else None
    except OverflowError:
        return None


def _check_url(url: str) -> None:
    try:
        parsed = httpx2.URL(url)
        fine = parsed.scheme in ("http", "https") and bool(parsed.host)
    except httpx2.InvalidURL:
        fine = False
    if not fine:
        raise ValueError(f"`url` must be like 'http://localhost:8000/v1', got {url!r}.")
    if parsed.userinfo:
        raise ValueError("`url` must hold no user and password: they would end up in logs. Use `api_key_env`.")


def _retry_after(response: httpx2.Response) -> float:
    """Seconds that the server asks to wait, given as such or as a date; 0 if it does not."""
    value = response.headers.get("Retry-After", "")
    try:
        if value.endswith("GMT"):
            seconds = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
        else:
            seconds = float(value)
    except ValueError:
        return 0.0
    return seconds if seconds > 0 else 0.0
