"""Which pictures a row names, and where they stand in its text."""

import base64

import pytest

from data.pictures.rows import Reference, split_row
from data.rows import RowError

USER = {"role": "user", "content": "What is it?"}
ANSWER = {"role": "assistant", "content": "A cat."}


def paths(row: dict) -> list[str | None]:
    return [found.path for found in split_row(row, "/data")[1]]


def test_a_row_without_pictures_comes_back_as_it_is() -> None:
    row = {"messages": [USER, ANSWER], "images": [], "image": None}
    assert split_row(row, "/data") == (row, ())


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"text": "a <image> b", "images": ["x.png"]}, {"text": "a <image> b"}),
        ({"text": "a", "image": "x.png"}, {"text": "<image>\na"}),
        ({"image": "x.png", "caption": "A cat."}, {"prompt": "<image>\n", "completion": "A cat."}),
        ({"image": "x.png", "question": "Q?", "answer": "A"}, {"prompt": "<image>\nQ?", "completion": "A"}),
        ({"image": "x.png", "instruction": "I", "output": "O"}, {"instruction": "<image>\nI", "output": "O"}),
        (
            {"image": "x.png", "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
            {"conversations": [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}]},
        ),
        (
            {"image": "x.png", "chosen": [USER, ANSWER], "rejected": [USER, ANSWER]},
            {name: [{**USER, "content": "<image>\nWhat is it?"}, ANSWER] for name in ("chosen", "rejected")},
        ),
    ],
)
def test_the_text_has_a_place_for_the_picture(row: dict, wanted: dict) -> None:
    assert split_row(row, "/data") == (wanted, (Reference(path="/data/x.png", named="x.png"),))


def test_pictures_within_messages_stand_where_they_are_named() -> None:
    content: list[dict[str, object]] = [{"type": "text", "text": "a"}, {"type": "image", "image": "x.png"}]
    content.append({"type": "text", "text": "b"})
    content.append({"type": "image_url", "image_url": {"url": "file:///y.png"}})
    row, found = split_row({"messages": [{"role": "user", "content": content}, ANSWER]}, "/data")
    assert row["messages"][0]["content"] == "a<image>b<image>"
    assert [each.path for each in found] == ["/data/x.png", "/y.png"]


def test_parts_without_an_address_take_the_rows_pictures() -> None:
    content = [{"type": "image"}, {"type": "text", "text": "a"}]
    assert paths({"messages": [{"role": "user", "content": content}], "images": ["x.png"]}) == ["/data/x.png"]


def test_bytes_are_taken_from_the_row() -> None:
    address = "data:image/png;base64," + base64.b64encode(b"abc").decode()
    rows = ({"text": "t", "image": {"bytes": b"abc", "path": "x"}}, {"text": "t", "image": address})
    assert [split_row(row, "")[1][0].content for row in rows] == [b"abc", b"abc"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "t", "image": 3}, "a picture is an integer, not a path or bytes"),
        ({"text": "t", "image": "http://a/b.png"}, "is on the network; fetch it and give its path"),
        ({"text": "t", "image": "data:image/png;base64,?"}, "is not base64"),
        ({"answer": "t", "image": "x.png"}, "no question that they could stand in; put <image> in its text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "x"}]}], "image": "y"},
            "named both in the messages and in the field images",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "x"}, {"type": "audio"}]}]},
            "a content part of type 'audio'; known are text, image and video",
        ),
    ],
)
def test_what_is_no_picture_is_told(row: dict, reason: str) -> None:
    with pytest.raises(RowError, match=reason.replace("?", r"\?")):
        split_row(row, "/data")
