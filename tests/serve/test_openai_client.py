"""OpenAI's own Python client against ``oar serve``."""

from __future__ import annotations

import base64
import threading
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from served import SIDE, Served, box_mask, open_png, picture, png, served

from oar_scale.generation.picture_files import read_record
from oar_scale.generation.pretrained import Pretrained


def pictures(response: Any) -> list[np.ndarray[Any, Any]]:
    return [np.asarray(open_png(base64.b64decode(image.b64_json))) for image in response.data]


def test_generated_images_are_those_of_the_model(server: Served, drawer: Pretrained) -> None:
    response = server.openai().images.generate(
        model="small", prompt="a red apple", n=3, size=f"{SIDE}x{SIDE}", extra_body={"seed": 5, "order": "halton", "top_p": 0.9}
    )
    expected = drawer.sample(["a red apple"] * 3, seed=5, order="halton", top_p=0.9)
    for image, drawn in zip(pictures(response), expected, strict=True):
        assert (image == np.asarray(drawn)).all()
    assert [image.number for image in response.data] == [0, 1, 2]
    assert all(image.seed == 5 and image.url is None for image in response.data)


def test_without_a_seed_each_request_gets_its_own(server: Served, drawer: Pretrained) -> None:
    first, second = (server.openai().images.generate(prompt="a blue car").data[0] for _ in range(2))
    assert first.seed != second.seed
    again = drawer.sample(["a blue car"], seed=first.seed)
    assert (pictures(server.openai().images.generate(prompt="a blue car", extra_body={"seed": first.seed}))[0] == again[0]).all()


def test_a_url_leads_to_the_png_with_its_record(server: Served, drawer: Pretrained) -> None:
    response = server.openai().images.generate(prompt="a smiling cat", response_format="url", extra_body={"seed": 3, "score": "sampled"})
    assert response.data[0].b64_json is None
    answer = httpx.get(response.data[0].url, trust_env=False)
    assert answer.headers["content-type"] == "image/png"
    record = read_record(answer.content)
    assert record is not None and (record.prompt, record.seed, record.number, record.size) == ("a smiling cat", 3, 0, (SIDE, SIDE))
    assert record.settings.score == "sampled"
    assert (np.asarray(drawer.again(record)) == np.asarray(open_png(answer.content))).all()


def test_what_is_transparent_in_a_mask_is_drawn(server: Served, drawer: Pretrained) -> None:
    image, box = picture(36, 20), (4, 2, 20, 18)
    response = server.openai().images.edit(
        image=png(image), mask=png(box_mask(box, image.size, openai=True)), prompt="a red apple", n=2, extra_body={"seed": 7, "feather": 2}
    )
    expected = drawer.edit([image], [box], ["a red apple"], variations=2, seed=7, feather=2.0)
    drawn_HW = np.asarray(box_mask(box, image.size)) > 0
    for edited, edit in zip(pictures(response), expected, strict=True):
        assert (edited == np.asarray(edit.picture)).all()
        assert (edited == np.asarray(image))[~drawn_HW].all()


def test_without_a_mask_transparent_pixels_are_drawn(server: Served) -> None:
    image = picture(channels=4)
    hole = np.zeros((SIDE, SIDE), dtype=np.bool_)
    hole[:6] = True
    image.putalpha(box_mask((0, 6, SIDE, SIDE)))
    edited = pictures(server.openai().images.edit(image=png(image), prompt="a blue car"))[0]
    assert (edited[hole][:, 3] == 255).all()
    assert (edited == np.asarray(image))[~hole].all()


def test_several_images_are_edited_with_one_mask(server: Served, drawer: Pretrained) -> None:
    images, box = [picture(seed=seed) for seed in range(2)], (0, 0, 6, 12)
    response = server.openai().images.edit(
        image=[png(each) for each in images], mask=png(box_mask(box, openai=True)), prompt="a red apple", extra_body={"seed": 1}
    )
    expected = drawer.edit(images, [box] * 2, ["a red apple"] * 2, seed=1)
    for edited, edit in zip(pictures(response), expected, strict=True):
        assert (edited == np.asarray(edit.picture)).all()


def test_generation_streams_partial_images(server: Served, drawer: Pretrained) -> None:
    events = list(server.openai().images.generate(prompt="a red apple", stream=True, partial_images=2, extra_body={"seed": 4}))
    assert [event.type for event in events] == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    early, late = (np.asarray(open_png(base64.b64decode(event.b64_json))) for event in events[:2])
    assert 0 < (early[..., 3] > 0).sum() < (late[..., 3] > 0).sum() < SIDE**2
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    drawn = np.asarray(open_png(base64.b64decode(events[-1].b64_json)))
    assert (drawn == np.asarray(drawer.sample(["a red apple"], seed=4)[0])).all()


def test_edits_stream_too(server: Served) -> None:
    mask = png(box_mask((0, 0, 8, 8), openai=True))
    events = list(server.openai().images.edit(image=png(picture()), mask=mask, prompt="a red apple", stream=True, partial_images=1))
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]


def test_the_served_model_is_listed(server: Served) -> None:
    assert [model.id for model in server.openai().models.list()] == ["small"]
    assert server.openai().models.retrieve("small").object == "model"
    with pytest.raises(openai.NotFoundError, match="other"):
        server.openai().models.retrieve("other")


@pytest.mark.parametrize(
    ("changes", "param", "says"),
    [
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": "x" * 10_000}, "prompt", "10000 characters, the limit is 4000"),
        ({"size": "1024x1024"}, "size", "12x12"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 11}, "n", "the limit is 10"),
        ({"response_format": "jpeg"}, "response_format", "url"),
        ({"output_format": "webp"}, "output_format", "png"),
        ({"extra_body": {"guidence": 3}}, "guidence", "no such setting"),
        ({"extra_body": {"order": "zigzag"}}, "order", "halton"),
        ({"extra_body": {"temperature": 0}}, "temperature", "greater than 0"),
        ({"extra_body": {"guidance_start": 2}}, "guidance_start", "constant guidance has no start"),
        ({"extra_body": {"score": "gt_logprob"}}, "score", "looks at the code that lies in a cell"),
        ({"extra_body": {"seed": 2**60}}, "seed", "9007199254740992"),
    ],
)
def test_bad_settings_are_bad_requests(server: Served, changes: dict[str, Any], param: str, says: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        server.openai().images.generate(**{"prompt": "a red apple", **changes})
    assert refused.value.param == param and refused.value.type == "invalid_request_error"
    assert says in refused.value.message and param in refused.value.message


def test_another_model_is_not_found(server: Served) -> None:
    with pytest.raises(openai.NotFoundError, match="small") as refused:
        server.openai().images.generate(model="dall-e-3", prompt="a red apple")
    assert refused.value.code == "model_not_found"


def test_a_full_queue_is_a_rate_limit(drawer: Pretrained, gate: threading.Event) -> None:
    with served(drawer, slots=1, queue_jobs=1) as server, server.http() as http:
        for _ in range(2):
            assert http.post("/api/jobs", json={"prompt": "a red apple"}).status_code == 202
            while server.service.worker.busy < 1:
                pass
        with pytest.raises(openai.RateLimitError) as refused:
            server.openai().images.generate(prompt="a red apple")
        assert refused.value.code == "server_busy" and int(refused.value.response.headers["retry-after"]) >= 1
        gate.set()


def test_a_wrong_token_is_an_authentication_error(drawer: Pretrained) -> None:
    with served(drawer, token="a token of the tests") as server:
        server.openai().images.generate(prompt="a red apple")
        with pytest.raises(openai.AuthenticationError) as refused:
            server.openai().with_options(api_key="another one").models.list()
        assert refused.value.code == "invalid_api_key"


def test_a_failure_while_streaming_is_an_api_error(drawer: Pretrained, gate: threading.Event) -> None:
    with served(drawer, job_s=0.05) as server:
        stream = server.openai().images.generate(prompt="a red apple", stream=True)
        with pytest.raises(openai.APIError, match="took longer"):
            list(stream)
        gate.set()
