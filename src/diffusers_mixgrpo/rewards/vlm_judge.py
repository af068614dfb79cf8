"""A vision-language model as a judge, on any server with an OpenAI-compatible chat API."""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from .remote import HTTPReward, RemoteRewardError, finite


QUESTION = (
    "This picture was made from the following description:\n\n{prompt}\n\n"
    "Rate from 1 to 10 how well the picture shows the description: everything that it asks for, in the number, with "
    "the colours and in the places that it says, and drawn without faults. 1 means that it shows something else, 10 "
    "that nothing could be better. Fractions are allowed. Give your reasons in at most three sentences, then end with "
    "a line of this form, with your rating for N:\nScore: N"
)

# The label and the colon may be surrounded by quotes and markup, and a scale in brackets may follow the label.
_MARKUP = r"[\s*_`\"']{0,9}"
_LABEL_END = rf"\b{_MARKUP}(?:\([^()]{{0,40}}\))?{_MARKUP}[:=][\s*_`\"'\[(<]{{0,9}}(?=[+-]?\d)"
_NUMBER = re.compile(
    r"([+-]?\d+(?:\.\d+)?)(?:\s*(?:/|out of)\s*(\d+))?(?![\w%]|[.,]\d|\s?[-–]\s?\d|\s*/|\s*out of)", re.IGNORECASE
)


class VLMJudge(HTTPReward):
    """
    Score of an image given by a vision-language model. Call it with `await`, or pass it to the trainer.

    The model runs on a server with an OpenAI-compatible chat API, such as vLLM or SGLang, locally or on another
    machine. Each image is a separate chat with the image followed by the question.

    With the default question the score is in [1, 10], unchanged from the model's answer. Memory and license depend on
    the server's model: the default model has Apache-2.0 weights and needs about 18 GB of GPU memory.

    Args:
        url (`str`, defaults to `"http://localhost:8000/v1"`): Base URL of the server's API.
        model (`str`, defaults to `"Qwen/Qwen2.5-VL-7B-Instruct"`): The model's name on the server.
        question (`str`, *optional*): The question; its `{prompt}` is replaced by the image's prompt.
        parse (`Callable[[str], float | None]`, defaults to [`parse_score`]):
            Extracts the score from the model's answer, or returns `None` if there is none.
        name (`str`, defaults to `"vlm_judge"`): The reward's name in logs.
        api_key_env (`str`, *optional*, defaults to `"OPENAI_API_KEY"`): See [`HTTPReward`].
        max_concurrency (`int`, defaults to 16): Maximum number of concurrent requests.
        timeout (`float`, defaults to 60.0): Time limit of one request in seconds.
        max_retries (`int`, defaults to 3), backoff (`float`, defaults to 1.0): See [`HTTPReward`].
        image_format (`str`, defaults to `"PNG"`): `"PNG"`, or the smaller `"JPEG"`.
        temperature (`float`, *optional*, defaults to 0.0), max_tokens (`int`, *optional*, defaults to 512):
            Sampling parameters of the model's answer. Omitted from the request if `None`.
        extra_body (`dict`, *optional*):
            Additional fields of the request, such as `{"chat_template_kwargs": {"enable_thinking": False}}`.

    Raises:
        `ValueError`: If an argument is out of range or `question` lacks `{prompt}`.
        `TypeError`: If `extra_body` cannot be serialized to JSON.

    Example:

    ```python
    # vllm serve Qwen/Qwen2.5-VL-7B-Instruct
    judge = VLMJudge(question="Is this an image of {prompt}? Answer with Score: 1 for no to Score: 10 for yes.")
    scores = asyncio.run(judge(["a cat"], [image]))
    ```
    """

    def __init__(
        self,
        url: str = "http://localhost:8000/v1",
        model: str = "Qwen/Qwen2.5-VL-7B-Instruct",
        *,
        question: str = QUESTION,
        parse: Callable[[str], float | None] | None = None,
        name: str = "vlm_judge",
        api_key_env: str | None = "OPENAI_API_KEY",
        max_concurrency: int = 16,
        timeout: float = 60.0,
        max_retries: int = 3,
        backoff: float = 1.0,
        image_format: str = "PNG",
        temperature: float | None = 0.0,
        max_tokens: int | None = 512,
        extra_body: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            url.rstrip("/") + "/chat/completions",
            name=name,
            batch_size=1,
            image_format=image_format,
            api_key_env=api_key_env,
            max_concurrency=max_concurrency,
            timeout=timeout,
            max_retries=max_retries,
            backoff=backoff,
        )
        if "{prompt}" not in question:
            raise ValueError(
                f"`question` must contain {{prompt}}, got {question!r}. Insert it where the image's prompt belongs."
            )
        try:
            json.dumps(extra_body)
        except TypeError as error:
            raise TypeError(
                f"`extra_body` must be serializable to JSON, got {extra_body!r} ({error}). Use strings, numbers, "
                "lists and dicts."
            ) from None
        self.model = model
        self.question = question
        self.parse = parse or parse_score
        self.temperature = temperature
        self.max_tokens = max_tokens
        self.extra_body = extra_body

    def _request(self, prompts: Sequence[str], images: list[str], columns: dict[str, list[Any]]) -> dict[str, Any]:
        image_url = f"data:image/{self.image_format.lower()};base64,{images[0]}"
        content = [
            {"type": "image_url", "image_url": {"url": image_url}},
            {"type": "text", "text": self.question.replace("{prompt}", prompts[0])},
        ]
        body: dict[str, Any] = {"model": self.model, "messages": [{"role": "user", "content": content}]}
        if self.temperature is not None:
            body["temperature"] = self.temperature
        if self.max_tokens is not None:
            body["max_tokens"] = self.max_tokens
        return body | (self.extra_body or {})

    def _read(self, answer: Any, count: int) -> list[float | None]:
        try:
            choice = answer["choices"][0]
            text = choice["message"]["content"]
        except (KeyError, IndexError, TypeError):
            raise RemoteRewardError(
                f"the answer has no choices[0].message.content: {self._shorten(answer)!r}"
            ) from None
        if not isinstance(text, str):
            raise RemoteRewardError(f"the answer's choices[0].message.content is no string: {self._shorten(text)!r}")
        score = finite(self.parse(text))
        if score is None:
            truncated = choice.get("finish_reason") == "length"
            note = f", cut off at max_tokens={self.max_tokens}" if truncated else ""
            raise RemoteRewardError(f"no score in the model's answer that ends with {text[-80:]!r}{note}")
        return [score]


def parse_score(text: str, label: str = "Score", low: float = 1, high: float = 10) -> float | None:
    """
    The number after the last `Score:` in an answer, with or without markup: `Score: 8`, `**score:** 7.5/10.`.

    Args:
        text (`str`): The model's answer.
        label (`str`, defaults to `"Score"`): The label before the colon; case is ignored.
        low, high (`float`, default to 1 and 10): The limits of the scale.

    Returns:
        `float`, or `None` if there is no number, or if the number is outside the scale, on another scale (`8/100`) or
        part of another expression (`7-8`, `80%`).
    """
    found = list(re.finditer(rf"\b{re.escape(label)}{_LABEL_END}", text, re.IGNORECASE))
    match = _NUMBER.match(text, found[-1].end()) if found else None
    if match is None or (match[2] is not None and float(match[2]) != high):
        return None
    score = float(match[1])
    return score if low <= score <= high else None
