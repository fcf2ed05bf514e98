"""A real Ray cluster of two nodes on this machine, one of which is removed during the work."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import vitarium
from tests.engine.work import Slow, part, run
from vitarium.engine import Engine, Job, RunEvent, map_images, run_all
from vitarium.engine.cluster import LOCALHOST, on_localhost, runtime_env
from vitarium.errors import TrainingStopped
from vitarium.generation.making import make_images
from vitarium.perception.retrieval.index import Index, model_fingerprint, update
from vitarium.reports.compare import compare
from vitarium.reports.events import Event
from vitarium.training.checkpoint import load_run
from vitarium.verbs.evaluate import evaluate
from vitarium.verbs.predict import predict

pytest.importorskip("ray")
pytestmark = [pytest.mark.timeout(240), pytest.mark.skipif(sys.platform == "win32", reason="Ray's clusters on Windows are experimental")]

ROOT = Path(__file__).parents[2]
NODE = dict(num_cpus=1, num_gpus=0, node_ip_address=LOCALHOST, object_store_memory=80_000_000)
RAY = Engine("ray", gpus=0)
MODELS = ["timm/vit_pico", "convnext_iso_pico"]
RECIPE = """
budget: {steps: 120}
batch_size: 16
optimizer: {lr: 1e-3}
ema: {decay: 0.9}
eval_every: 30 steps
checkpoint_minutes: 0.003
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes, and this process connected; `cluster.lose()` removes the second, and `cluster.heal()` brings one back."""
    import ray
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    with on_localhost():
        made: Any = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
        made.second = None

        def lose() -> None:
            node, made.second = made.second, None
            made.remove_node(node, allow_graceful=False)

        def heal() -> None:
            if made.second is None:
                made.second = made.add_node(**NODE)

        made.lose, made.heal = lose, heal
        environment = runtime_env()
        environment["env_vars"]["PYTHONPATH"] += os.pathsep + str(ROOT)
        ray.init(address=made.address, runtime_env=environment, log_to_driver=False)
        heal()  # not before this process has connected, which it must to the first node
        yield made
        ray.shutdown()
        made.shutdown()


def test_comparison_survives_a_node_and_a_change_of_engine(cluster, tmp_path):
    """Begun on this machine and interrupted, continued by Ray, which loses a node; the result is that of an unbroken local run."""
    recipe, out = tmp_path / "tiny.yaml", tmp_path / "out"
    recipe.write_text(RECIPE)
    given: dict[str, Any] = dict(data="digits", models=MODELS, recipe=recipe)

    def interrupt(event: Event) -> None:
        if event.step >= 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(**given, out=out, progress=interrupt)
    saved = load_run(out / "models/timm-vit_pico/last.ckpt")[0].step
    assert saved > 0

    cluster.heal()
    events: list[Event] = []

    def lose_a_node(event: Event) -> None:
        events.append(event)
        training = {e.model for e in events if e.kind == "step"} - {e.model for e in events if e.kind in ("measuring", "finished")}
        if len(training) == 2 and cluster.second is not None:  # one on each node
            cluster.lose()

    found = compare(**given, out=out, engine=RAY, progress=lose_a_node)
    assert cluster.second is None
    assert [e.kind for e in events].count("retried") >= 1
    assert "lost" in next(e.message for e in events if e.kind == "retried")
    resumed = next(e.step for e in events if e.model == MODELS[0] and e.kind == "step")
    assert resumed >= saved  # from what the local engine left
    assert found.failures == []
    unbroken = compare(**given, out=tmp_path / "unbroken")
    assert found.settings["engine"] == "ray"
    for a, b in zip(found.trials, unbroken.trials, strict=True):
        assert (a.name, a.score, a.metrics, a.steps, a.extras) == (
            b.name,
            b.score,
            b.metrics,
            b.steps,
            b.extras,
        )
        one, two = (vitarium.load(c.folder / t.file).state_dict() for c, t in ((found, a), (unbroken, b)))
        assert all(torch.equal(one[name], two[name]) for name in two)
    events.clear()
    compare(**given, out=out, progress=events.append)
    assert [e.kind for e in events] == ["kept"] * 2


def test_index_survives_a_node(cluster, tmp_path):
    cluster.heal()
    images, marks = tmp_path / "images", tmp_path / "marks"
    images.mkdir()
    marks.mkdir()
    for i in range(80):
        Image.new("RGB", (20, 20), (i, 255 - 2 * i, 60)).save(images / f"{i:03}.png")
    (images / "broken.png").write_bytes(b"no image")
    files = sorted(map(str, images.iterdir()))
    torch.manual_seed(0)
    model = vitarium.create_model("timm/vit_pico", num_classes=3, image_size=16).eval()
    local, found = Index("m", model_fingerprint(model)), Index("m", model_fingerprint(model))
    update(local, model, files, batch_size=1)
    hook = model.blocks[0].register_forward_pre_hook(Slow(marks, nodes=2))

    def lose_a_node(done: int, total: int) -> None:
        if 16 <= done < total and cluster.second is not None:  # both nodes have begun, see Slow
            cluster.lose()

    read = update(found, model, files, batch_size=1, engine=RAY, parts=tmp_path / "parts", progress=lose_a_node)
    hook.remove()
    assert cluster.second is None
    assert len(list(marks.iterdir())) == 2
    assert read == (80, 0)
    assert (found.files, found.stamps, found.broken) == (local.files, local.stamps, local.broken)
    torch.testing.assert_close(found.embeddings, local.embeddings, rtol=0, atol=1e-5)
    assert not (tmp_path / "parts").exists()


def test_images_are_the_same_on_every_engine(cluster):
    torch.manual_seed(0)
    model = vitarium.create_model("sit_flow_pico", num_classes=3, embed_dim=16, depth=1, num_heads=2)
    labels = [0, 1, 2, 2, 1, 0, 1]
    local = make_images(model, labels, batch_size=4, steps=3, seed=5)
    found = make_images(model, labels, batch_size=2, steps=3, seed=5, engine=RAY)
    torch.testing.assert_close(found, local, rtol=0, atol=1e-5)


def test_evaluation_and_answers_are_the_same_on_every_engine(cluster, tmp_path):
    torch.manual_seed(0)
    model = vitarium.create_model("timm/vit_pico", num_classes=10, image_size=16)
    model.labels = [str(i) for i in range(10)]
    vitarium.save(model, tmp_path / "model.safetensors")
    local, found = (evaluate(tmp_path / "model.safetensors", "digits", batch_size=20, engine=e) for e in ("local", RAY))
    assert found.images == local.images
    for name, value in local.metrics.items():
        assert found.metrics[name] == (pytest.approx(value, abs=1e-5) if isinstance(value, float) else value)
    files = []
    for i in range(7):
        files.append(str(tmp_path / f"{i}.png"))
        Image.new("RGB", (20, 20), (30 * i, 90, 200)).save(files[-1])
    Path(files[3]).write_bytes(b"no image")
    local, found = (
        predict(files, tmp_path / "model.safetensors", batch_size=1, output=tmp_path / f"{i}.json", engine=e).rows
        for i, e in enumerate(("local", RAY))
    )
    assert [[*row] for row in found] == [[*row] for row in local]
    for one, other in zip(found, local, strict=True):
        for a, b in zip(one.get("predictions", []), other.get("predictions", []), strict=True):
            assert (a["label"], a["probability"]) == (b["label"], pytest.approx(b["probability"], abs=1e-5))
    assert not list(tmp_path.glob("*.parts"))


def test_runs_are_retried_and_named_as_on_one_machine(cluster, tmp_path):
    settings = ({}, {"fails": 1}, {"fails": 2}, {"fails": 2, "how": "kill"}, {"fails": 1, "how": "usage"})
    jobs = [Job(f"run {i}", run, tmp_path / str(i), {"value": i, **given}) for i, given in enumerate(settings)]
    events: list[RunEvent] = []
    outcomes = run_all(jobs, RAY, progress=events.append)
    assert [o.value and o.value["value"] for o in outcomes] == [0, 1, None, None, None]
    assert str(outcomes[2].error) == "attempt 2 failed"
    assert isinstance(outcomes[3].error, TrainingStopped)
    assert [int((tmp_path / str(i) / "attempts").read_text()) for i in range(5)] == [1, 2, 2, 2, 1]
    assert [e.value for e in events if e.kind == "progress" and e.position == 1] == ["attempt 1", "attempt 2"]
    again = run_all(jobs)  # on this machine: what Ray finished is kept
    assert [o.kept for o in again] == [True, True, False, False, False]


def test_a_failed_part_is_tried_again(cluster, tmp_path):
    want = [[i * i for i in range(j, j + 4)] for j in (0, 4, 8)]
    assert map_images(part, range(12), shared=(tmp_path, 1), part_size=4, engine=RAY, parts=tmp_path / "parts") == want
    assert (tmp_path / "part/attempts").read_text() == "2"
    assert not (tmp_path / "parts").exists()


LISTENING = """
import ray
import psutil  # Ray brings it
from pathlib import Path
from tests.engine.work import run
from vitarium.engine import Job, RunEvent, run_all

ours, found = psutil.Process(), set()

def look(event: RunEvent) -> None:
    for process in [ours, *ours.children(recursive=True)]:
        found.update(c.laddr.ip for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN)

if __name__ == "__main__":
    (outcome,) = run_all([Job("run", run, Path({folder!r}), {{"value": 3}})], "ray", progress=look)
    print("LISTENS", sorted(found), outcome.value["value"], ray.is_initialized(), flush=True)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems do not show the sockets of child processes")
def test_ray_on_one_machine_listens_to_this_machine_only(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    environment.pop("RAY_ADDRESS", None)
    script = tmp_path / "script.py"
    script.write_text(LISTENING.format(folder=str(tmp_path / "run")))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=200, env=environment)
    line = next((line for line in done.stdout.splitlines() if line.startswith("LISTENS")), done.stderr)
    addresses = set(re.findall(r"'([^']+)'", line))
    assert addresses
    assert addresses <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}, line
    assert line.endswith("3 False")  # the run's result; Ray is shut down again
