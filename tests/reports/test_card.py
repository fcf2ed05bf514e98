"""Model cards: made from the record alone, in Markdown and YAML that names of others cannot break."""

import re

import pytest
import torch
import yaml

import vitarium
from vitarium.catalog.record import CalibrationRecord, DataRecord, Results, training_of
from vitarium.errors import CheckpointError
from vitarium.reports.card import CARD_MARK, card_path, code, escaped, fenced, write_card

HOSTILE = "x\n---\nlicense: mit\n# head | cell <script>alert(1)</script> ![i](http://evil/i.png) `code` \x1b[31m ``` end: \"'{}"


def head_of(text):
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card") / "run"
    changes = ["budget.epochs=0.2", "batch_norm.frozen=false"]
    return vitarium.train("pico", "digits", model="swin_pico", changes=changes, out=folder)


def test_a_training_leaves_a_card_with_its_numbers_data_and_recipe(trained):
    text = (trained.file.parent / "README.md").read_text()
    assert text == vitarium.card(trained.file)
    head = head_of(text)
    assert head["library_name"] == "vitarium"
    assert head["pipeline_tag"] == "image-classification"
    assert head["tags"] == ["vitarium", "classify", "swin_pico"]
    assert "license" not in head
    [result] = head["model-index"][0]["results"]
    assert result["dataset"] == {"type": "digits", "name": "digits"}
    metrics = {row["type"]: row["value"] for row in result["metrics"]}
    assert metrics["accuracy"] == trained.fit.metrics["accuracy"]
    assert "train_loss" not in metrics
    assert f"| accuracy | {100 * metrics['accuracy']:.2f} % |" in text
    assert "On 359 images of the part val:" in text
    assert "| training images | 1,438 |" in text
    assert "The licence of the weights and of the data is not recorded." in text
    recipe = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    assert recipe["budget"] == {"epochs": 0.2}
    assert "model" not in recipe
    assert vitarium.load(trained.file).training_record.run.steps == trained.fit.steps


def test_the_recipe_of_a_card_trains(trained, tmp_path):
    text = vitarium.card(trained.file)
    (tmp_path / "recipe.yaml").write_text(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    again = vitarium.train(tmp_path / "recipe.yaml", "digits", model="swin_pico", out=tmp_path / "run")
    assert again.fit.metrics == trained.fit.metrics


def test_a_compressed_file_has_its_own_numbers_or_says_whose_they_are(trained, tmp_path):
    small = tmp_path / "small.safetensors"
    made = vitarium.compress(trained.file, ["int8"], small, "digits")
    text = (tmp_path / "small.README.md").read_text()
    [result] = head_of(text)["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "accuracy", "name": "accuracy", "value": made.after["accuracy"]}]
    assert "- `int8`" in text
    assert "before" not in text.partition("## Measured")[2].partition("## Data")[0]
    vitarium.compress(trained.file, ["int8"], tmp_path / "other.safetensors")
    text = (tmp_path / "other.README.md").read_text()
    assert "model-index" not in head_of(text)
    assert "**before** the methods below were applied" in text
    assert "measure again" in text


def test_a_card_names_the_split_that_was_used(trained, tmp_path):
    assert "| held out | 20 % at random (seed 0) |" in vitarium.card(trained.file)
    assert "20 % held out at random, seed 0" in vitarium.info(trained.file).facts()["trained on"]
    model = vitarium.load(trained.file)
    for held_out, card, info in (
        ("test", "the data's own part test", "(held out: the data's own part test)"),
        (None, "unless the data has a held-out part", "if the data has no held-out part"),  # files of earlier versions
    ):
        training_of(model).data.held_out = held_out
        vitarium.save(model, tmp_path / "model.safetensors")
        assert card in vitarium.card(tmp_path / "model.safetensors")
        assert info in vitarium.info(tmp_path / "model.safetensors").facts()["trained on"]


def test_options_are_printed_as_the_command_line_takes_them(trained, tmp_path):
    model = vitarium.load(trained.file)
    vitarium.apply(model, "int8:skip=[head]", quiet=True)
    vitarium.save(model, tmp_path / "some.safetensors")
    assert "\n- `int8:skip=[head]`\n" in vitarium.card(tmp_path / "some.safetensors")
    assert vitarium.info(tmp_path / "some.safetensors").facts()["methods"] == "int8:skip=[head]"
    model = vitarium.load(trained.file)
    vitarium.apply(model, "int8", quiet=True)
    vitarium.save(model, tmp_path / "plain.safetensors")
    text = vitarium.card(tmp_path / "plain.safetensors")
    assert "\n- `int8`\n" in text
    assert "| mean | 0.485, 0.456, 0.406 |" in text
    assert "[" not in vitarium.info(tmp_path / "plain.safetensors").facts()["preprocessing"]


def test_the_calibration_of_a_card_is_whole_sentences(trained, tmp_path):
    model = vitarium.load(trained.file)
    record = training_of(model)
    record.temperature = 0.5
    record.calibration = CalibrationRecord(fitted=1, measured=2000, error_before=0.2, error_after=0.1, loss_before=2, loss_after=1)
    vitarium.save(model, tmp_path / "model.safetensors")
    assert (
        "before the softmax; it was fitted on 1 held-out image. The numbers under Measured were taken without it. "
        "On the other 2,000 held-out images:\n\n| metric | without | with |" in vitarium.card(tmp_path / "model.safetensors")
    )


def test_foreign_texts_cannot_leave_their_place(tmp_path):
    model = vitarium.create_model("swin_pico", num_classes=2)
    model.labels = [HOSTILE, "b"]
    record = training_of(model)
    record.data = DataRecord(source=f"/home/somebody/{HOSTILE}", name=HOSTILE)
    record.results = Results(metrics={HOSTILE: 0.5}, images=3, part=HOSTILE)
    vitarium.save(model, tmp_path / "model.safetensors")
    text = vitarium.card(tmp_path / "model.safetensors", license="mit")
    head = head_of(text)
    assert head["license"] == "mit"
    assert head["model-index"][0]["results"][0]["dataset"]["name"].startswith("x\\n---\\nlicense: mit")
    body = text.split(CARD_MARK)[1]
    assert "<script" not in body.replace("\\<script", "")
    assert not re.search(r"(?<!\\)!\[", body)
    assert "\x1b" not in text
    assert "\n# head" not in text
    assert "/home/somebody" not in text
    rows = [line for line in body.splitlines() if "alert" in line and line.startswith("|")]
    assert rows
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows)  # two cells


def test_what_is_not_known_is_said(tmp_path):
    vitarium.save(vitarium.create_model("swin_pico", num_classes=2), tmp_path / "model.safetensors")
    text = vitarium.card(tmp_path / "model.safetensors")
    for line in ("No measured numbers are recorded", "The training data is not known", "licence of the weights"):
        assert line in text
    assert "## Measured" not in text
    torch.save({}, tmp_path / "w.pth")
    for name in ("w.pth", "missing.safetensors"):
        with pytest.raises(CheckpointError):
            vitarium.card(tmp_path / name)


def test_a_readme_of_the_user_is_never_replaced(tmp_path):
    file = tmp_path / "model.safetensors"
    vitarium.save(vitarium.create_model("swin_pico", num_classes=2), file)
    assert write_card(file) == tmp_path / "README.md"
    assert write_card(file) == tmp_path / "README.md"  # a card of ours is renewed
    (tmp_path / "README.md").write_text("my notes on vitarium")
    assert write_card(file) is None
    assert (tmp_path / "README.md").read_text() == "my notes on vitarium"
    assert card_path("a/small.safetensors").name == "small.README.md"


def test_markdown_helpers():
    assert code("a`b`") == "`` a`b` ``"
    assert escaped("a_b *c*") == "a\\_b \\*c\\*"
    assert fenced("a\n```\nb", "text") == "````text\na\n```\nb\n````"
