"""Rewards over HTTP: a base class, and the client of the reward server `diffusers-mixgrpo serve-rewards`.

The reward server has its own JSON format, because an OpenAI-compatible chat API answers with text, not with numbers:

    POST /<name>   {"prompts": [str, ...], "images": [base64 of a PNG, ...], "columns": {str: [...], ...}}
    200            {"scores": [number or null, ...]}                    one per image; null if it has no score
    4xx or 5xx     {"error": {"message": str, "field": str or null}}    the invalid field, if there is one
    GET /health    {"status": "ok", "rewards": [name, ...]}

Requests contain `Authorization: Bearer <token>` if a token is set in the environment.
"""

import abc
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

from PIL import Image


try:
    import httpx2
except ImportError as error:
    raise ImportError(
        f'Rewards over HTTP need httpx2 ({error}). Install it with `pip install "diffusers-mixgrpo[remote]"`.'
    ) from error


logger = logging.getLogger(__name__)

RETRIED = (408, 409, 429)  # in addition to all 5xx
MAX_WAIT = 60.0  # upper limit in seconds of the pause before a retry, even if the server asks for more
_jitter = random.SystemRandom()  # the state of the global generator belongs to the training


class RemoteRewardError(RuntimeError):
    """The reason why a server returned no score. Contains neither the API key nor image data."""


class HTTPReward(abc.ABC):
    """
    Base class of rewards that query a server. It handles batching, concurrency, timeouts, retries and the API key.

    A subclass builds the request (`_request`) and parses the answer (`_read`). After any failure (no connection, a
    timeout, an HTTP error, an answer without a score) the images of that request score `None`, the reason is stored
    in `last_error`, and the call logs a single warning.

    A request is retried after a connection error, a timeout, and the statuses 408, 409, 429 and 5xx. The pauses are
    `backoff`, `2 * backoff`, `4 * backoff`... seconds, each reduced at random by up to a half. A longer pause that the
    server requests (`Retry-After`) is respected up to 60 seconds.

    Args:
        url (`str`):
            URL of the requests, `http://` or `https://`, without a password. The proxies of the environment
            (`HTTP_PROXY`, `NO_PROXY`...) are used.
        name (`str`): The reward's name in logs (`__name__`).
        batch_size (`int`): Number of images per request.
        image_format (`str`): `"PNG"` or `"JPEG"` (quality 95).
        api_key_env (`str`, *optional*):
            Environment variable with the API key, which is sent as `Authorization: Bearer ...` if it is set. It is
            read at each call and never stored on the object, logged, or included in an error. `None` sends no key.
        max_concurrency (`int`): Maximum number of concurrent requests of this object in one event loop.
        timeout (`float`): Time limit of one request in seconds, from connecting to the end of the answer.
        max_retries (`int`): Maximum number of retries of a request.
        backoff (`float`): Seconds before the first retry.

    Attributes:
        last_error ([`RemoteRewardError`], *optional*):
            The reason why the most recent unscored image has no score; `None` if all images were scored.

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
    ) -> None:
        _check_url(url)
        if image_format not in ("PNG", "JPEG"):
            raise ValueError(f"`image_format` must be 'PNG' or 'JPEG', got {image_format!r}.")
        for argument, value, minimum in (
            ("batch_size", batch_size, 1),
            ("max_concurrency", max_concurrency, 1),
            ("max_retries", max_retries, 0),
            ("backoff", backoff, 0),
        ):
            if value < minimum:
                raise ValueError(f"`{argument}` must be at least {minimum}, got {value}.")
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
        return self.__dict__ | {"_gates": None}  # semaphores belong to a running event loop

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"_gates": WeakKeyDictionary()})

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.__name__!r} at {self.url!r}, api_key_env={self.api_key_env!r})"

    async def __call__(
        self, prompts: Sequence[str], images: Sequence[Image.Image | None], **columns: Any
    ) -> list[float | None]:
        """
        Score `n` images.

        Args:
            prompts (`Sequence[str]` of length `n`): The prompt of each image.
            images (`Sequence[PIL.Image.Image]` of length `n`): Images of any mode and size.
            columns: Other columns of the dataset, of length `n` each.

        Returns:
            `list[float | None]` of length `n`: the scores, `None` where there is none.

        Raises:
            `ValueError`: If the numbers of prompts and images differ, or the API key is not valid in a header.
        """
        if len(prompts) != len(images):
            raise ValueError(
                f"`prompts` and `images` must have the same length, got {len(prompts)} prompts and {len(images)} "
                "images. Pass one prompt per image."
            )
        gate = self._gates.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(self.max_concurrency))
        # `_try` limits the time of a request as a whole; the client's own timeouts only limit its parts.
        limits = httpx2.Limits(max_connections=None)
        async with httpx2.AsyncClient(headers=self._headers(), timeout=None, limits=limits) as client:
            starts = range(0, len(images), self.batch_size)
            batches = [range(len(images))[start : start + self.batch_size] for start in starts]
            found = await asyncio.gather(
                *(self._score_batch(client, gate, indices, prompts, images, columns) for indices in batches)
            )
        scores = [found[i // self.batch_size].get(i) for i in range(len(images))]
        if failed := scores.count(None):
            logger.warning(
                "%s could not score %d of %d images. The last error: %s",
                self.__name__,
                failed,
                len(scores),
                self.last_error,
            )
        return scores

    @abc.abstractmethod
    def _request(self, prompts: Sequence[str], images: list[str], columns: dict[str, list[Any]]) -> dict[str, Any]:
        """The JSON body of the request for a batch; `images` are base64 strings."""

    @abc.abstractmethod
    def _read(self, answer: Any, count: int) -> list[float | None]:
        """The `count` scores in the server's JSON answer. Raises [`RemoteRewardError`] if there are none."""

    async def _score_batch(
        self,
        client: httpx2.AsyncClient,
        gate: asyncio.Semaphore,
        indices: range,
        prompts: Sequence[str],
        images: Sequence[Image.Image | None],
        columns: dict[str, Any],
    ) -> dict[int, float | None]:
        """Scores of the images at `indices`, by index; images that failed are missing."""
        # A request holds the gate while it waits for a retry. An overloaded server then gets fewer requests, and at
        # most `max_concurrency` batches of encoded images are in memory.
        async with gate:
            try:
                encoded = await asyncio.to_thread(self._encode_all, images, indices)
                if not encoded:
                    return {}
                values = {key: [column[i] for i in encoded] for key, column in columns.items()}
                body = self._request([prompts[i] for i in encoded], list(encoded.values()), values)
                content = await asyncio.to_thread(lambda: json.dumps(body).encode())
                answer = self._json(await self._post(client, content))
                return dict(zip(encoded, self._read(answer, len(encoded)), strict=True))
            except RemoteRewardError as error:
                self._note(str(error))
            except Exception as error:  # a user's parser may raise anything
                self._note(f"{type(error).__name__}: {error}")
        return {}

    def _encode_all(self, images: Sequence[Image.Image | None], indices: range) -> dict[int, str]:
        """Base64 of the readable images, by index."""
        encoded = {}
        for i in indices:
            image = images[i]
            if image is None:
                self._note(f"image {i} cannot be read (it is None)")
                continue
            try:
                encoded[i] = encode_image(image, self.image_format)
            except Exception as error:  # PIL raises many types of errors for broken files
                self._note(f"image {i} cannot be read ({type(error).__name__}: {error})")
        return encoded

    async def _post(self, client: httpx2.AsyncClient, content: bytes) -> httpx2.Response:
        """The server's successful answer, after retries if needed."""
        for attempt in range(self.max_retries + 1):
            outcome = await self._try(client, content)
            requested_pause = 0.0
            if isinstance(outcome, httpx2.Response):
                if outcome.is_success:
                    return outcome
                status = outcome.status_code
                requested_pause = _retry_after(outcome)
                outcome = f"HTTP {status}: {self._shorten(outcome.text)}"
                if status not in RETRIED and status < 500:
                    raise RemoteRewardError(f"{outcome} ({self.url})")
            if attempt < self.max_retries:
                pause = self.backoff * 2**attempt * _jitter.uniform(0.5, 1.0)
                await asyncio.sleep(min(max(pause, requested_pause), MAX_WAIT))
        raise RemoteRewardError(f"{outcome} ({self.url}, tried {self.max_retries + 1} times)")

    async def _try(self, client: httpx2.AsyncClient, content: bytes) -> httpx2.Response | str:
        """One request: the answer with any status, or a message why there is none."""
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
                f"`api_key_env` must name a variable with a key in plain ASCII, got {self.api_key_env!r}, whose value "
                "has other characters. Set the variable to the key alone."
            )
        return {"Authorization": f"Bearer {key}"} if key else {}

    def _clean(self, text: str) -> str:
        """The text without the API key and without image data."""
        key = self._api_key()
        text = text.replace(key, "***") if key else text
        return re.sub(r"[A-Za-z0-9+/]{64,}=*", "...", text)

    def _shorten(self, text: Any) -> str:
        """The beginning of a server's text. The text may contain the key, which must be removed before truncation."""
        return self._clean(str(text))[:200]

    def _note(self, reason: str) -> None:
        # A new exception, because the traceback of the caught one holds the request with the key in its header.
        self.last_error = RemoteRewardError(self._clean(reason))


class RemoteReward(HTTPReward):
    """
    A reward on another machine, served by `diffusers-mixgrpo serve-rewards`. Call it with `await`, or pass it to the
    trainer.

    Images are sent as PNG without loss, so the scores equal those of the reward itself.

    Args:
        url (`str`): URL of the server followed by the reward's name, such as `"http://gpu-box:8100/hpsv2"`.
        name (`str`, *optional*): The reward's name in logs. Defaults to the name in `url`.
        columns (`Sequence[str]`, *optional*):
            Columns of the dataset that the reward needs; they must be serializable to JSON. `None` sends all columns.
        batch_size (`int`, defaults to 8): Number of images per request.
        api_key_env (`str`, *optional*, defaults to `"REWARDS_API_KEY"`): See [`HTTPReward`].
        max_concurrency (`int`, defaults to 2):
            Maximum number of concurrent requests. The server scores one at a time; a second one is sent meanwhile.
        timeout (`float`, defaults to 300.0): Time limit of one request in seconds, including the server's queue.
        max_retries (`int`, defaults to 3), backoff (`float`, defaults to 1.0): See [`HTTPReward`].

    Example:

    ```python
    # on the other machine: diffusers-mixgrpo serve-rewards --reward_funcs hpsv2 --host 0.0.0.0
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
    ) -> None:
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
            raise ValueError(
                f"`url` must end with a reward's name, got {url!r}. Append it, as in 'http://gpu-box:8100/hpsv2'."
            )
        self.columns = columns

    async def __call__(
        self, prompts: Sequence[str], images: Sequence[Image.Image | None], **columns: Any
    ) -> list[float | None]:
        """
        Score `n` images; see [`HTTPReward`].

        Raises:
            `TypeError`: If a column cannot be serialized to JSON.
            `ValueError`: If one of the reward's `columns` is missing.
        """
        names = columns if self.columns is None else self.columns
        if missing := [name for name in names if name not in columns]:
            raise ValueError(
                f"`columns` must be among the dataset's columns {list(columns)}, got {missing}. Add them to the "
                "dataset or remove them from `columns`."
            )
        chosen = {name: list(columns[name]) for name in names}
        for name, values in chosen.items():
            try:
                json.dumps(values, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise TypeError(
                    f"`columns` must be serializable to JSON, got {name!r} ({error}). Name the columns that the "
                    f"reward at {self.url} needs: RemoteReward(..., columns=[...])."
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


def encode_image(image: Image.Image, image_format: str = "PNG") -> str:
    """Base64 of an image of any mode, converted to RGB and encoded as `"PNG"` or as `"JPEG"` with quality 95."""
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
        valid = parsed.scheme in ("http", "https") and bool(parsed.host)
    except httpx2.InvalidURL:
        valid = False
    if not valid:
        raise ValueError(f"`url` must be an HTTP URL such as 'http://localhost:8000/v1', got {url!r}.")
    if parsed.userinfo:
        # The value is left out of the message, because it contains the password.
        raise ValueError("`url` must not contain a user and password, which would appear in logs. Use `api_key_env`.")


def _retry_after(response: httpx2.Response) -> float:
    """Seconds that the server asks to wait, given as a number or as a date; 0 if there is no valid value."""
    value = response.headers.get("Retry-After", "")
    try:
        if value.endswith("GMT"):
            seconds = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
        else:
            seconds = float(value)
    except ValueError:
        return 0.0
    return seconds if seconds > 0 else 0.0
