"""Texts of others that are safe to print, and files that cannot be overwritten."""

import pytest
from PIL import Image

from vitarium.errors import UsageError
from vitarium.files import check_output, save_image, written_by_us
from vitarium.texts import encodable, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("Grüße, 日本 🐈", "Grüße, 日本 🐈"),
        ("a\x1b[31mb", "a\\x1b[31mb"),
        ("\x9b2J\x7f\x07", "\\x9b2J\\x7f\\x07"),
        ("caf\udce9.jpg", "caf\\xe9.jpg"),
        ("gpj\u202e.exe", "gpj\\u202e.exe"),
        ("two\nlines\tof\r", "two\nlines\tof\\r"),
    ],
)
def test_what_a_terminal_would_obey_is_shown_as_an_escape(text, shown):
    assert printable(text) == shown
    printable(text).encode()


def test_names_in_lists_stay_on_their_line_and_labels_keep_their_letters():
    assert printable("a\nb\tc", "") == "a\\nb\\tc"
    assert encodable("d\udcf6g \u202b") == "d\\xf6g \u202b"


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_an_image_that_a_command_wrote_is_replaced_and_one_of_others_is_not(tmp_path, format):
    image, path = Image.new("RGB", (8, 8), "red"), tmp_path / f"image.{format}"
    save_image(image, path, format)
    save_image(image, path, format)
    assert written_by_us(path)
    image.save(path)
    before = path.read_bytes()
    with pytest.raises(UsageError, match="not written by vitarium, so it is not replaced"):
        save_image(image, path, format)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "content", "ours"),
    [
        ("labels.csv", "image,label\na.png,1\n", False),
        ("answers.csv", "image,label,error\na.png,cat,\n", True),
        ("settings.json", '{"learning": 1}', False),
        ("answers.json", '[\n  {\n    "image": "a.png"\n  }\n]\n', True),
        ("captions.json", '[{"image": "a.png", "caption": "a cat"}]', False),
        ("notes", "mine", False),
    ],
)
def test_files_of_others_are_recognised(tmp_path, name, content, ours):
    (tmp_path / name).write_text(content)
    assert written_by_us(tmp_path / name) == ours
    check_output(tmp_path, tmp_path / "absent", None)
    if not ours:
        with pytest.raises(UsageError, match="not replaced"):
            check_output(tmp_path / name)
