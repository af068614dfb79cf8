"""Offers rewards over HTTP, so that they can live on another machine, or in an environment of their own.

On the machine that has the GPU to spare:

    python examples/serve_rewards.py --reward_funcs hpsv2 my_module:my_reward --host 0.0.0.0 --port 8100

and where the training runs, for each of them:

    from diffusers_mixgrpo.rewards.remote import RemoteReward

    reward = RemoteReward("http://gpu-box:8100/hpsv2")

Only this machine can reach the server unless `--host` says otherwise. Set the environment variable REWARDS_API_KEY (or
the one that `--api_key_env` names) to the same secret on both machines to let nobody else in; the connection itself is
not encrypted. The wire format, JSON over HTTP, is described in `diffusers_mixgrpo/rewards/remote.py`.
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
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from PIL import Image


logger = logging.getLogger("serve_rewards")
DEFAULT_KEY = "REWARDS_API_KEY"


def main():
    args = parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    api_key = os.environ.get(args.api_key_env, "").strip()
    if args.api_key_env != DEFAULT_KEY and not api_key:
        raise ValueError(f"`api_key_env`: the environment variable {args.api_key_env} is not set.")
    rewards = load_rewards(args.reward_funcs, args.device)
    server = RewardServer((args.host, args.port), rewards, api_key, args.max_request_mb * 2**20)
    guard = "for those with the key" if api_key else "for everyone who reaches it"
    logger.info("Serving %s at http://%s:%d, %s", ", ".join(rewards), *server.server_address[:2], guard)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Offers rewards over HTTP.")
    parser.add_argument("--reward_funcs", nargs="+", required=True, help="Rewards, by name or as module:function.")
    parser.add_argument("--host", default="127.0.0.1", help="Address to listen at; 0.0.0.0 for all of the machine's.")
    parser.add_argument("--port", type=int, default=8100, help="Port to listen at; 0 takes a free one.")
    parser.add_argument("--device", help="Device for rewards that have one. The GPU, if there is one, if unset.")
    parser.add_argument("--api_key_env", default=DEFAULT_KEY, help="Environment variable with the key to ask for.")
    parser.add_argument("--max_request_mb", type=int, default=256, help="Largest request, in MiB.")
    return parser.parse_args()


def load_rewards(names: list[str], device: str | None) -> dict[str, Callable[..., Any]]:
    """The rewards by their names, on their device."""
    import torch

    from diffusers_mixgrpo.rewards import load_reward

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    rewards: dict[str, Callable[..., Any]] = {}
    for name in names:
        reward = load_reward(name)
        called = getattr(reward, "__name__", type(reward).__name__)
        if called in rewards:
            raise ValueError(f"`reward_funcs`: two rewards are called {called!r}; serve them at two ports.")
        rewards[called] = reward.to(device) if hasattr(reward, "to") else reward
    return rewards


class RequestError(Exception):
    """What is wrong with a request: the status to answer with, the message, and the field that it is about."""

    def __init__(self, status: HTTPStatus, message: str, field: str | None = None):
        super().__init__(message)
        self.status, self.message, self.field = status, message, field


class RewardServer(ThreadingHTTPServer):
    """
    Answers `POST /<name>` and `GET /health`.

    Args:
        address (`tuple[str, int]`): Host and port.
        rewards (`dict[str, Callable]`): The rewards by name. One batch is scored at a time.
        api_key (`str`): Key to ask for; none if empty.
        max_bytes (`int`): Size of the largest request.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], rewards: dict[str, Callable[..., Any]], api_key: str, max_bytes: int):
        super().__init__(address, RewardHandler)
        self.rewards = rewards
        self.api_key = api_key
        self.max_bytes = max_bytes
        self.lock = threading.Lock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        if isinstance(error, ConnectionError):
            logger.info("%s went away: %s", client_address[0], error)
        else:
            super().handle_error(request, client_address)


class RewardHandler(BaseHTTPRequestHandler):
    """One request after the other of one connection."""

    server: RewardServer
    protocol_version = "HTTP/1.1"
    server_version = "serve_rewards"
    timeout = 60  # seconds that a client may be silent
    error_content_type = "application/json"  # of what the base class refuses: other methods, broken requests
    error_message_format = '{"error": {"message": "%(explain)s", "field": null}}'

    def do_GET(self):
        if urlsplit(self.path).path == "/health":
            self.answer(HTTPStatus.OK, {"status": "ok", "rewards": list(self.server.rewards)})
        else:
            self.refuse(RequestError(HTTPStatus.NOT_FOUND, "there is only GET /health and POST /<name>"))

    def do_POST(self):
        self.unread = 0
        try:
            self.unread = self.content_length()
            self.check_key()
            reward = self.find_reward()
            prompts, images, columns = read_batch(self.read_body())
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
        length, limit = self.unread, self.server.max_bytes
        if length > limit:
            message = (
                f"the request has {length} bytes, more than the limit of {limit}; send smaller batches, or raise "
            )
            raise RequestError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message + "`--max_request_mb`")
        content = self.rfile.read(length)
        self.unread = 0
        if len(content) < length:
            raise ConnectionAbortedError(f"{len(content)} of {length} bytes arrived")
        return content

    def discard_body(self) -> None:
        """Reads what a refused client still sends, unless it is absurdly much: cut off, it would see no answer."""
        self.close_connection |= self.unread > 4 * self.server.max_bytes
        left = min(self.unread, 4 * self.server.max_bytes)
        while left > 0 and (read := len(self.rfile.read(min(left, 2**20)))):
            left -= read

    def check_key(self) -> None:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        key = self.server.api_key
        if key and not hmac.compare_digest(given.encode(), key.encode()):
            raise RequestError(HTTPStatus.UNAUTHORIZED, "the Authorization header has no or another key")

    def find_reward(self) -> Callable[..., Any]:
        name = unquote(urlsplit(self.path).path.removeprefix("/"))
        if name not in self.server.rewards:
            rewards = ", ".join(self.server.rewards)
            raise RequestError(HTTPStatus.NOT_FOUND, f"there is no reward {name!r}; those here are: {rewards}")
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
        logger.info("%s %r", self.address_string(), format % args)  # %r: a path can hold any character


def read_batch(content: bytes) -> tuple[list[str], list[Image.Image], dict[str, list[Any]]]:
    """Prompts, images and other columns of a request; [`RequestError`] names the field that is wrong."""

    def wrong(message: str, field: str | None = None) -> RequestError:
        return RequestError(HTTPStatus.BAD_REQUEST, f"{field}: {message}" if field else message, field)

    try:
        body = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise wrong(f"the request is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise wrong("the request is not a JSON object")
    prompts, encoded, columns = body.get("prompts"), body.get("images"), body.get("columns", {})
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise wrong("must be a list of strings", "prompts")
    if not isinstance(encoded, list) or len(encoded) != len(prompts):
        raise wrong(f"must be a list of {len(prompts)} images, as many as there are prompts", "images")
    if not isinstance(columns, dict):
        raise wrong("must be an object of lists", "columns")
    for name, values in columns.items():
        if name in ("prompts", "images"):
            raise wrong("is a name that rewards use themselves", f"columns.{name}")
        if not isinstance(values, list) or len(values) != len(prompts):
            raise wrong(f"must be a list of {len(prompts)} values", f"columns.{name}")
    images = []
    for i, text in enumerate(encoded):
        try:
            images.append(read_image(text))
        except (binascii.Error, TypeError, ValueError, OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise wrong(f"is not a PNG, JPEG or WebP picture in base64 ({error})", f"images[{i}]") from None
    return prompts, images, columns


def read_image(text: str) -> Image.Image:
    if not isinstance(text, str):
        raise TypeError(f"it is a {type(text).__name__}")
    image = Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=("PNG", "JPEG", "WEBP"))
    return image.convert("RGB")


def score(
    reward: Callable[..., Any], prompts: list[str], images: list[Image.Image], columns: dict[str, list[Any]]
) -> list[float | None]:
    """The reward's scores, `None` for what is not finite; whatever is wrong with them is a [`RequestError`]."""
    try:
        scores = reward(prompts=prompts, images=images, **columns)
        if inspect.isawaitable(scores):
            scores = asyncio.run(wait_for(scores))
        numbers = [math.nan if number is None else float(number) for number in scores]
    except Exception as error:
        logger.exception("The reward raised an exception")
        message = f"the reward raised {type(error).__name__}: {error}"
        raise RequestError(HTTPStatus.INTERNAL_SERVER_ERROR, message) from error
    if len(numbers) != len(images):
        message = f"the reward returned {len(numbers)} scores for {len(images)} images"
        raise RequestError(HTTPStatus.INTERNAL_SERVER_ERROR, message)
    return [number if math.isfinite(number) else None for number in numbers]


async def wait_for(awaitable: Any) -> Any:
    return await awaitable


if __name__ == "__main__":
    main()
