"""Serve rewards over HTTP, so that they can run on another machine or in a separate environment.

On the machine with the spare GPU:

    diffusers-mixgrpo serve-rewards --reward_funcs hpsv2 my_module:my_reward --host 0.0.0.0 --port 8100

On the training machine, for each reward (needs `pip install "diffusers-mixgrpo[remote]"`):

    from diffusers_mixgrpo.rewards.remote import RemoteReward

    reward = RemoteReward("http://gpu-box:8100/hpsv2")

By default the server accepts only local connections; see `--host`. To restrict access, set the environment variable
REWARDS_API_KEY (or the variable named by `--api_key_env`) to the same secret on both machines. The connection is not
encrypted. The JSON format is documented in `diffusers_mixgrpo/rewards/remote.py`.
"""

import argparse
import asyncio
import base64
import binascii
import hmac
import inspect
import io
import json
import logging
import math
import os
import sys
import threading
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from PIL import Image


T = TypeVar("T")

logger = logging.getLogger("serve_rewards")
DEFAULT_KEY = "REWARDS_API_KEY"
MAX_IMAGE_PIXELS = 2**24  # 4096x4096
IMAGES_PER_REQUEST = 8  # of the maximum size: about 400 MB as RGB


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    api_key = os.environ.get(args.api_key_env, "").strip()
    if args.api_key_env != DEFAULT_KEY and not api_key:
        raise ValueError(
            f"`api_key_env` must name an environment variable with a key, got {args.api_key_env!r}, which is not set. "
            "Set it, or omit `--api_key_env`."
        )
    rewards = load_rewards(args.reward_funcs, args.device)
    server = RewardServer((args.host, args.port), rewards, api_key, args.max_request_mb * 2**20, args.max_image_pixels)
    access = "API key required" if api_key else "no API key required"
    host, port = server.server_address[:2]
    logger.info("Serving %s at http://%s:%d, %s", ", ".join(rewards), host, port, access)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Serve rewards over HTTP.")
    parser.add_argument("--reward_funcs", nargs="+", required=True, help="Rewards, by name or as module:function.")
    parser.add_argument("--host", default="127.0.0.1", help="Address to listen on; 0.0.0.0 for all.")
    parser.add_argument("--port", type=int, default=8100, help="Port to listen on; 0 selects a free one.")
    parser.add_argument("--device", help="Device of the rewards. Defaults to the GPU if there is one.")
    parser.add_argument("--api_key_env", default=DEFAULT_KEY, help="Environment variable with the API key.")
    parser.add_argument("--max_request_mb", type=int, default=256, help="Maximum size of a request, in MiB.")
    parser.add_argument(
        "--max_image_pixels",
        type=int,
        default=MAX_IMAGE_PIXELS,
        help=f"Maximum number of pixels of an image; of a request, {IMAGES_PER_REQUEST} times as many.",
    )
    return parser.parse_args(argv)


def load_rewards(names: list[str], device: str | None) -> dict[str, Callable[..., Any]]:
    """Load the rewards onto `device`, by their names in logs."""
    import torch

    from ..rewards import load_reward

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    rewards: dict[str, Callable[..., Any]] = {}
    for name in names:
        reward = load_reward(name)
        served_name = getattr(reward, "__name__", type(reward).__name__)
        if served_name in rewards:
            raise ValueError(
                f"`reward_funcs` must have distinct names, got {served_name!r} twice. Serve them on two ports."
            )
        rewards[served_name] = reward.to(device) if hasattr(reward, "to") else reward
    return rewards


class RequestError(Exception):
    """An invalid request: the status and the message of the answer, and the field that is invalid, if any."""

    def __init__(self, status: HTTPStatus, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.field = field


class RewardServer(ThreadingHTTPServer):
    """
    Answers `POST /<name>` and `GET /health`.

    Args:
        address (`tuple[str, int]`): Host and port.
        rewards (`dict[str, Callable]`): The rewards by name. One batch is scored at a time.
        api_key (`str`): The required API key; an empty string requires none.
        max_bytes (`int`): Maximum size of a request.
        max_pixels (`int`): Maximum number of pixels of an image; of a request, `IMAGES_PER_REQUEST` times as many.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self,
        address: tuple[str, int],
        rewards: dict[str, Callable[..., Any]],
        api_key: str,
        max_bytes: int,
        max_pixels: int = MAX_IMAGE_PIXELS,
    ) -> None:
        super().__init__(address, RewardHandler)
        self.rewards = rewards
        self.api_key = api_key
        self.max_bytes = max_bytes
        self.max_pixels = max_pixels
        self.lock = threading.Lock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        if isinstance(error, ConnectionError):
            logger.info("%s disconnected: %s", client_address[0], error)
        else:
            super().handle_error(request, client_address)


class RewardHandler(BaseHTTPRequestHandler):
    """Handles the requests of one connection, one after the other."""

    server: RewardServer
    protocol_version = "HTTP/1.1"
    server_version = "serve_rewards"
    timeout = 60  # maximum seconds without data from the client
    error_content_type = "application/json"  # of the base class's answers to other methods and malformed requests
    error_message_format = '{"error": {"message": "%(explain)s", "field": null}}'

    def do_GET(self) -> None:
        if urlsplit(self.path).path == "/health":
            self.answer(HTTPStatus.OK, {"status": "ok", "rewards": list(self.server.rewards)})
        else:
            self.refuse(RequestError(HTTPStatus.NOT_FOUND, "the only paths are GET /health and POST /<name>"))

    def do_POST(self) -> None:
        self.unread = 0  # bytes of the request's body that have not been read
        try:
            self.unread = self.content_length()
            self.check_key()
            reward = self.find_reward()
            prompts, images, columns = read_batch(self.read_body(), self.server.max_pixels)
            with self.server.lock:
                scores = score(reward, prompts, images, columns)
            self.answer(HTTPStatus.OK, {"scores": scores})
        except RequestError as error:
            self.discard_body()
            self.refuse(error)

    def content_length(self) -> int:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or len(length) > 18:
            self.close_connection = True
            raise RequestError(HTTPStatus.LENGTH_REQUIRED, "the request has no Content-Length")
        return int(length)

    def read_body(self) -> bytes:
        length = self.unread
        limit = self.server.max_bytes
        if length > limit:
            raise RequestError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"the request must have at most {limit} bytes, got {length}. Send smaller batches, or raise "
                "`--max_request_mb`.",
            )
        content = self.rfile.read(length)
        self.unread = 0
        if len(content) < length:
            raise ConnectionAbortedError(f"{len(content)} of {length} bytes arrived")
        return content

    def discard_body(self) -> None:
        """Read the rest of a refused request, up to a limit: a client that is cut off would not see the answer."""
        self.close_connection |= self.unread > 4 * self.server.max_bytes
        remaining = min(self.unread, 4 * self.server.max_bytes)
        while remaining > 0:
            count = len(self.rfile.read(min(remaining, 2**20)))
            if count == 0:
                break
            remaining -= count

    def check_key(self) -> None:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        key = self.server.api_key
        if key and not hmac.compare_digest(given.encode(), key.encode()):
            raise RequestError(HTTPStatus.UNAUTHORIZED, "the Authorization header must contain the API key")

    def find_reward(self) -> Callable[..., Any]:
        name = unquote(urlsplit(self.path).path.removeprefix("/"))
        if name not in self.server.rewards:
            rewards = ", ".join(self.server.rewards)
            raise RequestError(HTTPStatus.NOT_FOUND, f"there is no reward {name!r}; available: {rewards}")
        return self.server.rewards[name]

    def refuse(self, error: RequestError) -> None:
        self.answer(error.status, {"error": {"message": error.message, "field": error.field}})

    def answer(self, status: HTTPStatus, body: dict[str, Any]) -> None:
        content = json.dumps(body, allow_nan=False).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        if self.close_connection:
            self.send_header("Connection", "close")
        if status == HTTPStatus.UNAUTHORIZED:
            self.send_header("WWW-Authenticate", "Bearer")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        logger.info("%s %r", self.address_string(), format % args)  # %r, because a path can contain any character


def read_batch(
    content: bytes, max_pixels: int = MAX_IMAGE_PIXELS
) -> tuple[list[str], list[Image.Image], dict[str, list[Any]]]:
    """Prompts, images and other columns of a request. A [`RequestError`] names the invalid field."""

    def invalid(message: str, field: str | None = None) -> RequestError:
        return RequestError(HTTPStatus.BAD_REQUEST, f"{field}: {message}" if field else message, field)

    try:
        body = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise invalid(f"the request is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise invalid("the request is not a JSON object")
    prompts = body.get("prompts")
    encoded = body.get("images")
    columns = body.get("columns", {})
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise invalid("must be a list of strings", "prompts")
    if not isinstance(encoded, list) or len(encoded) != len(prompts):
        raise invalid(f"must be a list of {len(prompts)} images, one per prompt", "images")
    if not isinstance(columns, dict):
        raise invalid("must be an object of lists", "columns")
    for name, values in columns.items():
        if name in ("prompts", "images"):
            raise invalid("is a reserved name", f"columns.{name}")
        if not isinstance(values, list) or len(values) != len(prompts):
            raise invalid(f"must be a list of {len(prompts)} values", f"columns.{name}")
    images = []
    pixels_left = IMAGES_PER_REQUEST * max_pixels
    for i, text in enumerate(encoded):
        try:
            image = read_image(text, min(max_pixels, pixels_left))
            pixels_left -= image.width * image.height
            images.append(image)
        except (TooManyPixels, Image.DecompressionBombError) as error:
            limits = (
                f"an image must have at most {max_pixels} pixels, and a request {IMAGES_PER_REQUEST} times as many"
            )
            message = f"images[{i}]: {limits} ({error}). Send smaller batches, or raise `--max_image_pixels`."
            raise RequestError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message, f"images[{i}]") from None
        except (binascii.Error, TypeError, ValueError, OSError, SyntaxError) as error:
            raise invalid(f"must be a PNG, JPEG or WebP image in base64 ({error})", f"images[{i}]") from None
    return prompts, images, columns


class TooManyPixels(Exception):
    """An image is larger than allowed."""


def read_image(text: str, max_pixels: int) -> Image.Image:
    """The RGB image in a base64 string. Its size is known from its header, before it is decoded."""
    if not isinstance(text, str):
        raise TypeError(f"it is a {type(text).__name__}")
    image = Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=("PNG", "JPEG", "WEBP"))
    if image.width * image.height > max_pixels:
        raise TooManyPixels(f"it has {image.width}x{image.height}")
    return image.convert("RGB")


def score(
    reward: Callable[..., Any], prompts: list[str], images: list[Image.Image], columns: dict[str, list[Any]]
) -> list[float | None]:
    """The reward's scores, with `None` for non-finite ones. A reward that does not work raises a [`RequestError`]."""
    try:
        scores = reward(prompts=prompts, images=images, **columns)
        if inspect.isawaitable(scores):
            scores = asyncio.run(wait_for(scores))
        numbers = [math.nan if value is None else float(value) for value in scores]
    except Exception as error:
        logger.exception("The reward raised an exception")
        message = f"the reward raised {type(error).__name__}: {error}"
        raise RequestError(HTTPStatus.INTERNAL_SERVER_ERROR, message) from error
    if len(numbers) != len(images):
        message = f"the reward returned {len(numbers)} scores for {len(images)} images"
        raise RequestError(HTTPStatus.INTERNAL_SERVER_ERROR, message)
    return [number if math.isfinite(number) else None for number in numbers]


async def wait_for(awaitable: Awaitable[T]) -> T:
    """A coroutine for `asyncio.run`, which does not accept every awaitable."""
    return await awaitable
