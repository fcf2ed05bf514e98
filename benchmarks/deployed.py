"""Exported graphs of a model and its peer in ONNX Runtime or OpenVINO: times in turns, and the nodes that remain after optimization.

Our graph is that of `vitarium export`; the peer's is what `torch.onnx.export` writes for it. Each arm has a process of its own: two models
in one process disturb each other's memory. Their memory lies in huge pages (glibc's setting): in small ones, two processes of one graph
were measured to differ by up to 19 %, as the pages happened to lie. One thread; processor time.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from vitarium.efficiency.runtimes.sessions import open_session

IDLE = {"Const", "Input", "Output"}
"""Nodes of OpenVINO's that do nothing."""
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
OPENVINO = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1}


class Graphs:
    """Exported graphs of both models of a contest (`vitarium.efficiency.bench.Contest`); the files live as long as this object.

    Raises:
        ValueError: the model has no peer.
    """

    def __init__(self, contest: Any):
        import torch

        from vitarium.efficiency.export import export

        if contest.peer is None:
            raise ValueError(f"{contest.model} has no peer to export")
        self.contest, self.folder = contest, tempfile.TemporaryDirectory()
        self.ours, self.peer = (Path(self.folder.name) / f"{name}.onnx" for name in ("ours", "peer"))
        export(contest.ours, self.ours, image_size=contest.image_size)
        image = torch.randn(2, 3, contest.image_size, contest.image_size)
        variable = ({0: torch.export.Dim("batch")},)
        torch.onnx.export(contest.peer, (image,), self.peer, dynamo=True, dynamic_shapes=variable, external_data=False, verbose=False)

    def measure(self, kind: str, batch: int, rounds: int) -> dict[str, Any]:
        """Return a row of the results: times, ratios and numbers of nodes in a runtime."""
        from vitarium.efficiency.profiler import count_macs, count_params

        trained, size = self.contest.trained, self.contest.image_size
        about = dict(peer=self.contest.peer_name, image_size=size, params=count_params(trained), macs=count_macs(trained, size))
        files = {"ours": self.ours, "again": self.ours, "peer": self.peer}
        return about | dict(threads=1, rounds=rounds) | _times(kind, files, (batch, 3, size, size), rounds)


def _times(kind: str, files: dict[str, Path], shape: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """Time graphs in turns, in an order that rotates, after two calls that are not counted.

    Raises:
        ValueError: the outputs differ.
    """
    with ExitStack() as stack:
        arms = {name: stack.enter_context(_process(kind, file, shape)) for name, file in files.items()}
        first = {name: np.array([float(v) for v in arm().split()]) for name, arm in arms.items()}
        error = float(np.abs(first["ours"] - first["peer"]).max() / first["peer"].std())
        if not error < 1e-3:
            raise ValueError(f"outputs differ from the peer's by {error:.2g} standard deviations: nothing is timed")
        times: dict[str, list[float]] = {name: [] for name in arms}
        names = list(arms)
        for i in range(rounds):
            for name in (*names[i % len(names) :], *names[: i % len(names)]):
                times[name].append(float(arms[name]()))
    row: dict[str, Any] = dict(error=error, load=round(os.getloadavg()[0], 2))
    row |= {f"{name}_ms": 1e3 * statistics.median(times[name]) for name in ("ours", "peer")}
    for label, arm in (("ratio", "peer"), ("aa", "again")):
        ratios = [a / b for a, b in zip(times[arm], times["ours"], strict=True)]
        row |= {label: statistics.median(ratios), f"{label}_low": min(ratios), f"{label}_high": max(ratios)}
    return row | {"nodes": {name: count_nodes(kind, files[name]) for name in ("ours", "peer")}}


@contextmanager
def _process(kind: str, file: Path, shape: tuple[int, ...]) -> Iterator[Callable[[], str]]:
    """Open a graph in a process of its own; a call returns the line that it prints."""
    command = [sys.executable, __file__, kind, str(file), *map(str, shape)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | HUGE_PAGES) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def call() -> str:
            process.stdin.write("\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
            line = process.stdout.readline()  # type: ignore[union-attr]
            if not line:
                raise RuntimeError(f"{kind} ended with status {process.wait()}")
            return line

        try:
            yield call
        finally:
            process.stdin.close()
            process.wait()


def work(kind: str, file: str, shape: tuple[int, ...]) -> None:
    """Answer each line of the standard input: the first with the outputs for the first image, the others with the seconds of a call."""
    image = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    session = open_session(kind, Path(file).read_bytes(), threads=1)

    def run(image: np.ndarray) -> np.ndarray:
        return session(image)[0]

    sys.stdin.readline()
    run(image)
    print(*run(image)[0].ravel().tolist(), flush=True)
    for _ in sys.stdin:
        start = time.process_time()
        run(image)
        print(time.process_time() - start, flush=True)


def count_nodes(kind: str, file: Path) -> dict[str, int]:
    """Return the number of nodes of each type that a runtime executes, the most frequent first."""
    if kind == "openvino":
        import openvino

        compiled = openvino.Core().compile_model(str(file), "CPU", OPENVINO)
        types = [op.get_rt_info()["layerType"].astype(str) for op in compiled.get_runtime_model().get_ops()]
    else:
        import onnx
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        with tempfile.TemporaryDirectory() as folder:
            options.optimized_model_filepath = f"{folder}/optimized.onnx"
            onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
            types = [node.op_type for node in onnx.load(f"{folder}/optimized.onnx", load_external_data=False).graph.node]
    return dict(Counter(name for name in types if name not in IDLE).most_common())


if __name__ == "__main__":
    work(sys.argv[1], sys.argv[2], tuple(map(int, sys.argv[3:])))
