"""The client of the reward server, against the real server and against servers that misbehave."""

import asyncio
import json
import logging
import math
import pickle
import re
import socket
import sys
import threading

import numpy as np
import pytest
from PIL import Image

from diffusers_mixgrpo.commands import serve_rewards
from diffusers_mixgrpo.rewards import load_reward
from diffusers_mixgrpo.rewards.remote import RemoteReward, RemoteRewardError, finite


KEY = "tok-verySecret-0123456789"


def mean_of_bytes(prompts, images, **columns):
    """Exact in integers, so that a change of a single pixel is noticed."""
    return [float(np.asarray(image, dtype=np.int64).sum()) for image in images]


def make_images(count):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (7 + i, 11, 3), dtype=np.uint8)) for i in range(count)]


@pytest.fixture
def serve(monkeypatch):
    """Serve a function and return the reward's URL."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "REWARDS_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    servers = []

    def serve(reward, name="reward", api_key="", max_bytes=2**24):
        server = serve_rewards.RewardServer(("127.0.0.1", 0), {name: reward}, api_key, max_bytes)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}/{name}"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def remote(url, **options):
    return RemoteReward(url, **({"backoff": 0.01, "timeout": 60.0, "max_retries": 0} | options))


def score(reward, prompts, images=None, **columns):
    images = make_images(len(prompts)) if images is None else images
    return asyncio.run(reward(prompts=list(prompts), images=images, **columns))


def test_scores_equal_those_of_a_local_call(serve):
    images = make_images(5)
    reward = remote(serve(mean_of_bytes), batch_size=2)
    assert score(reward, "abcde", images) == mean_of_bytes("abcde", images)
    assert reward.__name__ == "reward" and reward.last_error is None
    modes = [images[0].convert(mode) for mode in ("RGBA", "L", "P", "CMYK")]
    assert score(reward, "abcd", modes) == mean_of_bytes("abcd", [image.convert("RGB") for image in modes])


def test_prompts_and_columns_arrive(serve):
    calls = []

    def reward(prompts, images, answer, **others):
        calls.append((prompts, answer, others))
        return [len(prompt) * value for prompt, value in zip(prompts, answer, strict=True)]

    prompts = ["", '日本語 \n "quotes" 🎨', "x" * 5000]
    columns = {"answer": [1, 2.5, 3], "meta": [{"a": [1, None]}, "b", True]}
    client = remote(serve(reward), batch_size=2, max_concurrency=1)
    assert score(client, prompts, **columns) == [0, len(prompts[1]) * 2.5, 15000]
    assert calls == [
        (prompts[:2], [1, 2.5], {"meta": columns["meta"][:2]}),
        (prompts[2:], [3], {"meta": columns["meta"][2:]}),
    ]
    chosen = remote(client.url, columns=["answer"])
    assert score(chosen, prompts[:1], mask=[object()], **{k: v[:1] for k, v in columns.items()}) == [0]
    assert calls[-1] == ([""], [1], {})


def test_columns_that_cannot_be_sent(serve):
    reward = remote(serve(mean_of_bytes))
    with pytest.raises(TypeError, match=r"`columns` must be serializable to JSON, got 'mask' .*columns=\[\.\.\.\]"):
        score(reward, ["a"], mask=[np.zeros(3)])
    with pytest.raises(TypeError, match="must be serializable to JSON, got 'weight'"):
        score(reward, ["a"], weight=[math.nan])
    with pytest.raises(ValueError, match=r"must be among the dataset's columns \['other'\], got \['answer'\]"):
        score(remote(reward.url, columns=["answer"]), ["a"], other=[1])


def test_no_score_is_none(serve, caplog):
    def reward(prompts, images):
        return [np.float32(0.5), None, math.nan, math.inf]

    client = remote(serve(reward))
    with caplog.at_level(logging.WARNING, logger="diffusers_mixgrpo"):
        assert score(client, "abcd") == [0.5, None, None, None]
    assert "the server's `reward` has no score for an image" in str(client.last_error)
    (record,) = [record for record in caplog.records if record.name.startswith("diffusers_mixgrpo")]
    assert record.getMessage().startswith("reward could not score 3 of 4 images")


def test_an_async_reward(serve):
    async def reward(prompts, images, **columns):
        await asyncio.sleep(0.01)
        return [float(len(prompt)) for prompt in prompts]

    assert score(remote(serve(reward)), ["a", "bb"]) == [1, 2]


def test_a_reward_that_raises(serve):
    def reward(prompts, images):
        if "bad" in prompts:
            raise KeyError("no such model")
        return [1.0] * len(images)

    client = remote(serve(reward), batch_size=2)
    assert score(client, ["good", "good", "bad", "good", "good"]) == [1, 1, None, None, 1]
    assert re.search("HTTP 500: .*the reward raised KeyError: 'no such model'", str(client.last_error))


def test_a_temporary_failure(serve):
    calls = []

    def reward(prompts, images):
        calls.append(len(images))
        if len(calls) < 3:
            raise MemoryError("no room")
        return [1.0]

    client = remote(serve(reward), max_retries=2)
    assert score(client, ["a"]) == [1.0] and len(calls) == 3


def test_one_unreadable_image_in_a_batch(serve):
    images = make_images(3)
    images[1] = None
    client = remote(serve(mean_of_bytes))
    expected = mean_of_bytes("", [images[0], images[2]])
    assert score(client, "abc", images, answer=[1, 2, 3]) == [expected[0], None, expected[1]]
    assert "image 1 cannot be read (it is None)" in str(client.last_error)


def test_late_answers(serve):
    given_up = threading.Event()

    def reward(prompts, images):
        given_up.wait(60)
        return [1.0]

    client = remote(serve(reward), timeout=0.15)
    assert score(client, ["a"]) == [None]
    given_up.set()
    assert "no answer within timeout=0.15 seconds" in str(client.last_error)


def test_the_key(serve, monkeypatch, caplog):
    url = serve(mean_of_bytes, api_key=KEY)
    client = remote(url)
    assert score(client, ["a"]) == [None]
    assert re.search("HTTP 401: .*the Authorization header must contain the API key", str(client.last_error))
    monkeypatch.setenv("REWARDS_API_KEY", KEY[:-1])
    assert score(client, ["a"]) == [None]
    monkeypatch.setenv("REWARDS_API_KEY", KEY)
    with caplog.at_level(logging.DEBUG):
        assert None not in score(client, ["a"])
    for place in (caplog.text, repr(client), repr(vars(client)), pickle.dumps(client).decode("latin-1")):
        assert KEY[:8] not in place


def test_refused_requests(serve):
    client = remote(serve(mean_of_bytes, max_bytes=2000))
    big = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    assert score(client, ["a"], [big]) == [None]
    assert re.search(r"HTTP 413: .*must have at most 2000 bytes", str(client.last_error))
    other = remote(client.url + "2")
    assert score(other, ["a"]) == [None] and "there is no reward 'reward2'" in str(other.last_error)


def answering(content):
    """A socket that answers the request of each connection with `content` and closes it, and the URL of the socket."""
    listener = socket.create_server(("127.0.0.1", 0))

    def run():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                received = b""
                while b'"columns"' not in received:  # the end of the request
                    received += connection.recv(2**16)
                connection.sendall(content)

    threading.Thread(target=run, daemon=True).start()
    return listener, f"http://127.0.0.1:{listener.getsockname()[1]}/reward"


def http(body):
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "RemoteProtocolError"),
        (b"hello", "RemoteProtocolError"),
        (http(b'{"scores": [1.0]}')[:-5], "RemoteProtocolError"),
        (http(b"<html>"), "is not JSON"),
        (http(b"[1.0]"), "did not answer with 1 scores"),
        (http(b'{"scores": 1.0}'), "did not answer with 1 scores"),
        (http(b'{"scores": [1.0, 2.0]}'), "did not answer with 1 scores"),
        (http(b'{"scores": ["1.0"]}'), "has no score for an image"),
        (http(b'{"scores": [1e999]}'), "has no score for an image"),
        (http(b'{"scores": [1%s]}' % (b"0" * 400)), "has no score for an image"),
        (http(json.dumps({"scores": [True]}).encode()), "has no score for an image"),
    ],
)
def test_garbage(serve, content, reason):
    listener, url = answering(content)
    with listener:
        client = remote(url)
        assert score(client, ["a"]) == [None]
    assert isinstance(client.last_error, RemoteRewardError) and reason in str(client.last_error)


def test_names_and_addresses():
    reward = RemoteReward("http://gpu-box:8100/rewards/my%20reward/")
    assert reward.__name__ == "my reward" and reward.url == "http://gpu-box:8100/rewards/my%20reward"
    assert RemoteReward("http://gpu-box:8100/hpsv2", name="theirs").__name__ == "theirs"
    for url in ("http://gpu-box:8100", "http://gpu-box:8100/"):
        with pytest.raises(ValueError, match="`url` must end with a reward's name, got"):
            RemoteReward(url)
    with pytest.raises(ValueError, match="`batch_size` must be at least 1, got 0"):
        RemoteReward("http://gpu-box:8100/hpsv2", batch_size=0)


@pytest.mark.parametrize("name", ["http://gpu-box:8100/hpsv2", "vlm_judge", "unifiedreward"])
def test_without_httpx2_the_extra_is_named(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "httpx2", None)
    for module in ("remote", "vlm_judge", "unifiedreward"):
        monkeypatch.delitem(sys.modules, f"diffusers_mixgrpo.rewards.{module}", raising=False)
    with pytest.raises(ImportError, match=r'need httpx2 .*`pip install "diffusers-mixgrpo\[remote\]"`'):
        load_reward(name)


def test_finite():
    assert finite(1) == 1.0 and isinstance(finite(1), float) and finite(-0.5) == -0.5
    assert [finite(x) for x in (None, True, "1", math.nan, math.inf, 10**400, [1])] == [None] * 7
