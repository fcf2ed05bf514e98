"""Retrieval: metrics against manual counts, the index against brute force, faiss against torch, and vectors of any model."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional as F

import vitarium
from vitarium.errors import CheckpointError, UsageError
from vitarium.perception.retrieval.embedding import embeddings_of
from vitarium.perception.retrieval.index import Index, embed_files, model_fingerprint, update
from vitarium.perception.retrieval.metrics import RetrievalMetric
from vitarium.perception.retrieval.scores import retrieval_scores
from vitarium.perception.retrieval.sheet import Found, sheet


def brute_force(x: torch.Tensor, y: list[int], ranks: tuple[int, ...]) -> dict[str, float]:
    hits: dict[str, list[float]] = {f"recall_at_{k}": [] for k in ranks} | {"map_at_r": []}
    for q in range(len(y)):
        others = sorted((i for i in range(len(y)) if i != q), key=lambda i: -float(x[q] @ x[i]))
        r = sum(y[i] == y[q] for i in others)
        if not r:
            continue
        for k in ranks:
            hits[f"recall_at_{k}"].append(float(any(y[i] == y[q] for i in others[:k])))
        precisions = [sum(y[j] == y[q] for j in others[: i + 1]) / (i + 1) for i in range(r) if y[others[i]] == y[q]]
        hits["map_at_r"].append(sum(precisions) / r)
    return {name: sum(values) / len(values) for name, values in hits.items()}


@pytest.mark.parametrize("classes", [3, 20])
def test_recall_and_map_at_r_are_those_of_counting(classes: int, monkeypatch):
    monkeypatch.setattr("vitarium.perception.retrieval.scores.ROWS", 7)
    generator = torch.Generator().manual_seed(classes)
    x = F.normalize(torch.randn(40, 6, generator=generator, dtype=torch.float64), dim=1)
    y = torch.randint(0, classes, (40,), generator=generator)
    y[0] = 99  # alone in its class: no query
    want = brute_force(x, y.tolist(), (1, 2, 4, 8))
    assert retrieval_scores(x, y) == pytest.approx(want)
    metric = RetrievalMetric()
    for part in (slice(0, 11), slice(11, 40)):
        metric.update(x[part], y[part])
    assert metric.compute() == pytest.approx(want, abs=1e-6)


@pytest.mark.identity
def test_perfect_embeddings_score_one_and_edges_score_something():
    y = torch.arange(12) % 3
    assert set(retrieval_scores(F.one_hot(y).float(), y).values()) == {1.0}
    assert set(retrieval_scores(torch.eye(3), torch.arange(3)).values()) == {0.0}
    assert set(retrieval_scores(torch.ones(1, 2), torch.zeros(1)).values()) == {0.0}
    assert set(retrieval_scores(torch.empty(0, 2), torch.empty(0)).values()) == {0.0}


@pytest.mark.parametrize("engine", ["torch", "faiss"])
def test_search_is_exact_and_ties_come_in_the_order_of_the_index(engine: str):
    if engine == "faiss":
        pytest.importorskip("faiss")
    x = F.normalize(torch.randn(50, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    x[30] = x[20] = x[10]
    index = Index("m", "", [str(i) for i in range(50)], [(0, 0)] * 50, x)
    cosines, places = index.search(x[:12], 6, engine=engine)
    want = (x[:12].double() @ x.double().T).argsort(dim=1, descending=True, stable=True)[:, :6]
    assert torch.equal(places, want)
    assert places[10, :3].tolist() == [10, 20, 30]
    assert cosines[0, 0] == pytest.approx(1)
    assert index.search(x[:1], 500, engine=engine)[0].shape == (1, 50)
    with pytest.raises(UsageError, match="8 numbers, the queries have 3"):
        index.search(torch.ones(1, 3), 1)


@pytest.mark.parametrize("name", ["timm/vit_pico", "timm/deit_pico", "timm/resnet_pico", "swin_pico"])
def test_any_classifier_gives_the_features_that_its_head_reads(name: str):
    model = vitarium.create_model(name, num_classes=3, image_size=16).eval()
    image = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        vectors = embeddings_of(model, image)
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2))
        if name != "timm/deit_pico":
            torch.testing.assert_close(
                vectors, F.normalize(model.forward_head(model.forward_features(image), pre_logits=True).flatten(1), dim=1)
            )


def test_a_model_of_another_kind_is_refused():
    with pytest.raises(UsageError, match="does not give features"):
        embeddings_of(torch.nn.Linear(2, 2), torch.ones(1, 2))


@pytest.fixture
def pictures(tmp_path):
    for i in range(5):
        Image.new("RGB", (20, 16), (50 * i, 100, 255 - 50 * i)).save(tmp_path / f"{i}.png")
    (tmp_path / "broken.jpg").write_bytes(b"x")
    return tmp_path


def test_an_index_is_brought_up_to_date_and_reads_only_what_is_new(pictures):
    model = vitarium.create_model("timm/vit_pico", image_size=16).eval()
    files = sorted(map(str, pictures.glob("*")))
    index = Index("m", model_fingerprint(model))
    index_file = pictures / "x.index"
    assert update(index, model, files, batch_size=2) == (5, 0)
    assert index.broken[0][0].endswith("broken.jpg")
    index.save(index_file)
    again = Index.load(index_file)
    assert (again.files, again.stamps, again.broken) == (index.files, index.stamps, index.broken)
    assert torch.equal(again.embeddings, index.embeddings)
    (pictures / "0.png").unlink()
    Image.new("RGB", (30, 30), "white").save(pictures / "1.png")
    files = sorted(map(str, pictures.glob("*.png")))
    before = dict(zip(again.files, again.embeddings, strict=True))
    assert update(again, model, files) == (1, 1)
    assert again.files == files
    assert torch.equal(again.embeddings[1], before[files[1]])
    assert not torch.equal(again.embeddings[0], before[files[0]])
    whole, _ = embed_files(model, files)
    torch.testing.assert_close(again.embeddings, torch.stack([whole[file] for file in files]))


def test_an_interrupted_index_continues_even_with_another_list(pictures, monkeypatch):
    monkeypatch.setattr("vitarium.perception.retrieval.index.PART_BATCHES", 1)
    model = vitarium.create_model("timm/vit_pico", image_size=16).eval()
    files = sorted(map(str, pictures.glob("*")))
    new = lambda: Index("m", model_fingerprint(model))
    whole = new()
    update(whole, model, files, batch_size=1)

    def stop_at(count):
        def stop(done, total):
            if done == count:
                raise KeyboardInterrupt

        return stop

    parts = pictures.parent / "x.parts"
    for count in (2, 1):  # the second call still has the first one's two images, and reads a third
        with pytest.raises(KeyboardInterrupt):
            update(new(), model, files, batch_size=1, parts=parts, progress=stop_at(count))
    seen, index = [], new()
    assert update(index, model, files[1:], batch_size=1, parts=parts, progress=lambda *numbers: seen.append(numbers)) == (2, 0)
    assert seen[0] == (0, len(files) - 3)
    assert index.files == whole.files[1:]
    torch.testing.assert_close(index.embeddings, whole.embeddings[1:])
    assert not parts.exists()
    other = vitarium.create_model("timm/vit_pico", image_size=16).eval()
    with pytest.raises(KeyboardInterrupt):
        update(new(), model, files, batch_size=1, parts=parts, progress=stop_at(2))
    assert update(Index("m", model_fingerprint(other)), other, files, batch_size=1, parts=parts) == (5, 0)  # nothing of another model


def test_files_that_are_no_index_are_refused(pictures):
    vitarium.save(vitarium.create_model("timm/vit_pico"), pictures / "m.safetensors")
    for file, told in (("0.png", "is not an index"), ("m.safetensors", "is not an index"), ("none.index", "there is no file")):
        with pytest.raises(CheckpointError, match=told):
            Index.load(pictures / file)


@pytest.mark.parametrize(
    "changes",
    [dict(files=3), dict(files=[1]), dict(stamps=[[1]]), dict(stamps=None), dict(model=None), dict(more=1), dict(broken=[1]), None],
)
def test_a_forged_record_of_an_index_is_refused(tmp_path, changes):
    Index("m", "f", ["a.png"], [(1, 1)], torch.ones(1, 4)).save(tmp_path / "i.index")
    with safe_open(tmp_path / "i.index", "pt") as file:
        record = json.loads(file.metadata()["vitarium_index"])
    forged = json.dumps([1] if changes is None else {**record, **changes})
    save_file({"embeddings": torch.ones(1, 4)}, tmp_path / "i.index", {"vitarium_index": forged})
    with pytest.raises(CheckpointError, match="damaged index"):
        Index.load(tmp_path / "i.index")


def test_a_sheet_has_a_row_a_query():
    red = Image.new("RGB", (10, 20), "red")
    drawn = sheet([(red, [Found(red, "1", True), Found(None, "0.5", False)]), (red, [Found(red, "1")])])
    assert drawn.width > 3 * 112
    assert drawn.height > 2 * 112
