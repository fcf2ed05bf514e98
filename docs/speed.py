"""Page of the backbones' speed, from the measurements of benchmarks/backbones.py."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
MEASURED = Path(__file__).parent / "examples" / "backbones.json"
GOALS = {"swin": 0.85, "tinyvit": 0.80, "maxvit": 0.75}
"""Goals as shares of a plain ViT's rate, by family; for all others GOAL, or the peer's rate plus a tenth."""
GOAL, GAIN = 0.90, 1.10
LINEAR = 1.1
"""Largest exponent of time and memory against image area that still counts as linear."""
JUDGED = ("inference", "float32", 8)
"""Kind, dtype and batch of the judged measurements."""
KINDS, DTYPES, BATCHES = ("inference", "training", "compiled"), ("float32", "bfloat16"), (1, 8)
EQUATIONS = "its equations, written out"
RUNTIMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}


def page(rows: Sequence[Row] | None = None) -> str:
    """Return the page as Markdown; by default of the committed measurements."""
    if rows is None:
        rows = json.loads(MEASURED.read_text(encoding="utf-8")) if MEASURED.exists() else []
    failed = [r for r in rows if "failed" in r]
    deployed = [r for r in rows if r["kind"] in RUNTIMES and "ours_ms" in r]
    timed = sorted((r for r in rows if "ours_ms" in r and r["kind"] not in RUNTIMES), key=_order)
    grown = [r for r in rows if "cost" in r]
    parts = ["# Speed of the backbones", "", INTRODUCTION, "", *_summary(timed, grown), ""]
    devices = dict.fromkeys(r["device"] for r in timed)
    for device in devices:
        parts += [*_goals([r for r in timed if r["device"] == device], device), ""]
    parts += [*_deployed(deployed), "", *_compiled(timed), "", *_growth(grown), "", *(_left_out(timed, failed) if rows else []), ""]
    for model in dict.fromkeys(r["model"] for r in timed):
        parts += [*_details([r for r in timed if r["model"] == model]), ""]
    return "\n".join(parts)


INTRODUCTION = """\
Each model is compared with its best public implementation (timm's, else transformers'), or, if there is none, with the paper's equations
written out as in the tests; those were written for reading, so being faster than them only shows that nothing was lost. Both have the same
weights, and outputs are proven equal first. Our inference is timed after `fuse()`, training without it. The *share* is the rate of
multiply-accumulates over that of a plain ViT (timm's ViT-S/16) which is timed in the same rounds: the machine's rate for a model that is
nearly all matrix products. Multiply-accumulates are those of our model before it is fused, for ours and the peer alike.

Every number is a median of rounds with the least and the most in brackets; *ours / ours* is a second copy of our model, and where the
ratio to the peer lies inside its spread there is no verdict. On a CPU, processor time of one thread is taken.

```
OMP_NUM_THREADS=1 python benchmarks/backbones.py
```"""


DEPLOYED = """\
`vitarium export` against `torch.onnx.export` of the public implementation, in float32 at batch 8: processor time of one thread, each graph
in a process of its own, with its memory in huge pages. Nodes are those that the runtime executes after its own optimization; ours are more
where an MLP takes its tokens in pieces (see `vitarium.efficiency.graphs`).

```
OMP_NUM_THREADS=1 python benchmarks/backbones.py --kinds onnxruntime openvino --batches 8 --rounds 21
```"""


# ---- judging


def judge(row: Row) -> tuple[str, bool, str]:
    """Return the goal of a row's model, whether it is met, and by what: ("85 %", True, "share")."""
    goal = GOALS.get(row["model"].partition("_")[0])
    if goal is not None:
        return f"{100 * goal:.0f} %", row["share"] >= goal, "share"
    if row["share"] >= GOAL or not row["ratio"]:
        return f"{100 * GOAL:.0f} %", row["share"] >= GOAL, "share"
    return f"{100 * GOAL:.0f} %, or {GAIN:.1f} x the peer", row["ratio"] >= GAIN, "ratio"


def close(row: Row) -> bool:
    """Return whether rounds disagree on the verdict of `judge`."""
    _, _, by = judge(row)
    goal = GAIN if by == "ratio" else GOALS.get(row["model"].partition("_")[0], GOAL)
    return row[f"{by}_low"] < goal <= row[f"{by}_high"]


def claims_linear(cost: str) -> bool:
    """Return whether a cost, as documented by the model, is linear in the image."""
    return re.match(r"linear in (image area|tokens)\b", cost) is not None


# ---- writing


def _summary(timed: Sequence[Row], grown: Sequence[Row]) -> list[str]:
    if not timed:
        return ["Nothing has been measured yet."]
    lines = []
    judged = [r for r in timed if _setting(r) == JUDGED and r["device"] == "cpu" and r["share"] is not None]
    if judged:
        met = [r for r in judged if judge(r)[1]]
        by_gain = [r for r in met if judge(r)[2] == "ratio"]
        lines.append(f"- On a CPU, in float32 and at batch 8, {len(met)} of {len(judged)} models reach their goal{_names(met)}.")
        if by_gain:
            lines.append(
                f"- {len(by_gain)} of these by being a tenth faster than the peer, not by their share of the plain ViT's rate"
                f"{_names(by_gain)}; {sum(r['peer'] == EQUATIONS for r in by_gain)} of them against equations only."
            )
        if missed := [r for r in judged if not judge(r)[1]]:
            lines.append(f"- Short of it{_names(missed, '{share:.0%}')}.")
        if unsure := [r for r in judged if close(r)]:
            lines.append(f"- Rounds disagree about{_names(unsure)}.")
    public = [r for r in timed if r["peer"] and r["peer"] != EQUATIONS]
    slower = [r for r in public if "slower" in r["verdict"]]
    faster = [r for r in public if "faster" in r["verdict"]]
    lines.append(
        f"- Of {len(public)} comparisons with a public implementation, ours is faster in {len(faster)}, slower in {len(slower)}, and the "
        f"noise is larger than the difference in {len(public) - len(faster) - len(slower)}."
    )
    if slower:
        lines.append(f"- Slower{_names(slower, '{kind}, {dtype}, batch {batch}: {verdict}')}.")
    if linear := [r for r in grown if claims_linear(r["cost"])]:
        held = [r for r in linear if max(r["time_exponent"], r["memory_exponent"]) < LINEAR]
        over = [r for r in linear if r not in held]
        lines.append(f"- Of the models whose documented cost is linear, {len(held)} of {len(linear)} grow by exponents under {LINEAR}.")
        if over:
            lines.append(f"- Above it{_names(over, 'time {time_exponent:.2f}, memory {memory_exponent:.2f}')}.")
    return lines + [f"- {line}" for line in _where([*timed, *grown])]


def _where(rows: Iterable[Row]) -> list[str]:
    """Return machines and versions, each once."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
        found.setdefault((row["machine"], versions), []).append(row)
    lines = []
    for (machine, versions), same in found.items():
        dates, loads = sorted(r["date"] for r in same), [r["load"] for r in same if "load" in r]
        when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
        load = f", load {min(loads):.1f} to {max(loads):.1f}" if loads else ""
        lines.append(f"{len(same)} measurements: {machine}; {versions}; {same[0]['threads']} thread{load}; {when}.")
    return lines


def _goals(timed: Sequence[Row], device: str) -> list[str]:
    judged = [r for r in timed if _setting(r) == JUDGED and r["share"] is not None]
    if not judged:
        return []
    head = [
        "model",
        "peer",
        "parameters",
        "MACs",
        "ours",
        "share of the ViT's rate",
        "peer's share",
        "goal",
        "reached",
        "peer / ours",
        "verdict",
    ]
    body = []
    for r in sorted(judged, key=lambda r: -r["share"]):
        goal, met, _ = judge(r)
        share = _spread(r["share"], r["share_low"], r["share_high"], percent=True)
        reached = ("yes" if met else "**no**") + (", rounds disagree" if close(r) else "")
        peer_share = f"{100 * r['peer_share']:.0f} %" if r["peer_share"] else "-"
        size = f"{r['params'] / 1e6:.1f} M", f"{r['macs'] / 1e9:.2f} G", f"{r['ours_ms']:.0f} ms"
        ratio = _spread(r["ratio"], r["ratio_low"], r["ratio_high"])
        body.append([f"`{r['model']}`", _peer(r), *size, share, peer_share, goal, reached, ratio, r["verdict"]])
    return [f"## Inference in float32 at batch 8, {device}", "", *_table(head, body)]


def _deployed(rows: Sequence[Row]) -> list[str]:
    """Return the tables of exported graphs, ours beside those of the public implementation."""
    if not rows:
        return []
    lines = ["## Exported graphs", "", DEPLOYED, ""]
    for kind, title in RUNTIMES.items():
        some = sorted((r for r in rows if r["kind"] == kind), key=lambda r: -r["ratio"])
        if not some:
            continue
        middle = statistics.median(r["ratio"] for r in some)
        body = []
        for r in some:
            spreads = (_spread(r[k], r[f"{k}_low"], r[f"{k}_high"]) for k in ("ratio", "aa"))
            ours, peer = r["nodes"]["ours"], r["nodes"]["peer"]
            counts = f"{sum(ours.values())} / {sum(peer.values())}"
            body.append([f"`{r['model']}`", _peer(r), f"{r['ours_ms']:.0f} ms", *spreads, counts, _moves(ours, peer), str(r["rounds"])])
        head = ["model", "peer", "ours", "peer / ours", "ours / ours", "nodes, ours / peer", "of these", "rounds"]
        lines += [f"### {title}", "", f"Median over {len(some)} pairs: {middle:.2f}.", "", *_table(head, body), ""]
        slower = [r for r in some if r["ratio_high"] < 1]
        lines += [f"- Slower: `{r['model']}`; {r.get('reason') or 'the node counts are above'}." for r in slower]
    return lines


def _compiled(timed: Sequence[Row]) -> list[str]:
    """Return the table of torch.compile at batch 8, of the models whose exported graphs are compared."""
    some = [r for r in timed if (r["kind"], r["dtype"], r["batch"], r["device"]) == ("compiled", "float32", 8, "cpu") and r["rounds"] >= 21]
    if not some:
        return []
    body = []
    for r in sorted(some, key=lambda r: -r["ratio"]):
        spreads = (_spread(r[k], r[f"{k}_low"], r[f"{k}_high"]) for k in ("ratio", "aa"))
        body.append([f"`{r['model']}`", _peer(r), f"{r['ours_ms']:.0f} ms", *spreads, str(r["rounds"]), f"{r['load']:.1f}"])
    head = ["model", "peer", "ours", "peer / ours", "ours / ours", "rounds", "load"]
    middle = statistics.median(r["ratio"] for r in some)
    about = (
        f"Both sides compiled, in turns of one process. Median over {len(some)} pairs: {middle:.2f}. The load is that of other programs."
    )
    return ["### torch.compile", "", about, "", *_table(head, body)]


def _moves(ours: dict[str, int], peer: dict[str, int]) -> str:
    """Return the counts of nodes that move or combine values, where there are any."""
    shown = ("Transpose", "Gather", "Reshape", "Slice", "Split", "Concat", "Where", "Expand", "Add", "Mul", "Reorder", "Subgraph")
    return ", ".join(f"{name} {ours.get(name, 0)} / {peer.get(name, 0)}" for name in shown if ours.get(name) or peer.get(name))


def _growth(grown: Sequence[Row]) -> list[str]:
    if not grown:
        return []
    sides = grown[0]["image_sizes"]
    head = ["model", "documented cost", "time", "memory", *(f"{side} px" for side in sides), f"linear (under {LINEAR})"]
    body = []
    for r in sorted(grown, key=lambda r: r["time_exponent"]):
        linear = max(r["time_exponent"], r["memory_exponent"]) < LINEAR
        verdict = "" if not claims_linear(r["cost"]) else "yes" if linear else "**no**"
        each = (f"{ms:.0f} ms, {mb:.0f} MB" for ms, mb in zip(r["ms"], r["mb"], strict=True))
        time = _spread(r["time_exponent"], r["time_exponent_low"], r["time_exponent_high"])
        body.append([f"`{r['model']}`", r["cost"], time, f"{r['memory_exponent']:.2f}", *each, verdict])
    return [
        "## Growth with the image",
        "",
        "Exponent p of time and of memory against image area: the slope, by least squares over three sizes, of the logarithms; float32,",
        "one image, after `fuse()`, the sizes in turns. 1 is linear, 2 quadratic; what weighs only at small sizes pulls an exponent below",
        "what large images would show. Memory is the most bytes of tensors alive at once in the forward pass, without the weights, each",
        "tensor followed as it is made and freed; a kernel's private scratch space is not in it.",
        "",
        *_table(head, body),
    ]


def _left_out(timed: Sequence[Row], failed: Sequence[Row]) -> list[str]:
    """List the missing measurements, setting by setting."""
    models = dict.fromkeys(r["model"] for r in timed)
    lines = ["## Not measured", ""]
    for device in dict.fromkeys(r["device"] for r in timed):
        for kind, dtype, batch in ((k, d, b) for k in KINDS for d in DTYPES for b in BATCHES):
            have = {r["model"] for r in timed if (*_setting(r), r["device"]) == (kind, dtype, batch, device)}
            if len(have) < len(models):
                names = "all" if not have else f"{len(models) - len(have)} models; measured: {', '.join(f'`{m}`' for m in sorted(have))}"
                names = names if len(have) < len(models) / 2 else ", ".join(f"`{m}`" for m in models if m not in have)
                lines.append(f"- {kind}, {dtype}, batch {batch}, {device}: {names}.")
    lines += [f"- `{r['model']}`, {r['kind']}, {r['dtype']}, batch {r['batch']}, {r['device']}: {r['failed']}." for r in failed]
    if all(r["device"] == "cpu" for r in timed):
        lines.append("- On a GPU: nothing; none was at hand. `--device cuda --dtypes bfloat16` measures the same there.")
    return lines if len(lines) > 2 else []


def _details(rows: Sequence[Row]) -> list[str]:
    head = ["", "ours", "peer", "peer / ours", "ours / ours", "share", "verdict", "rounds, load, date"]
    body = []
    for r in rows:
        ratio, aa = (_spread(r[k], r[f"{k}_low"], r[f"{k}_high"]) for k in ("ratio", "aa"))
        peer_ms = f"{r['peer_ms']:.1f} ms" if r["peer_ms"] else "-"
        share = _spread(r["share"], r["share_low"], r["share_high"], percent=True)
        circumstances = f"{r['rounds']}, {r['load']:.1f}, {r['date']}"
        name = f"{r['kind']}, {r['dtype']}, batch {r['batch']}, {r['device']}"
        body.append([name, f"{r['ours_ms']:.1f} ms", peer_ms, ratio, aa, share, r["verdict"] or r.get("remark", ""), circumstances])
    first = rows[0]
    size = f"{first['params'] / 1e6:.1f} M parameters, {first['macs'] / 1e9:.2f} G MACs at {first['image_size']} pixels"
    return [f"## {first['model']}", "", f"{size}. Peer: {_peer(first)}.", "", *_table(head, body)]


def _order(row: Row) -> tuple[Any, ...]:
    return row["model"], row["device"], KINDS.index(row["kind"]), -DTYPES.index(row["dtype"]) if row["dtype"] in DTYPES else 1, row["batch"]


def _setting(row: Row) -> tuple[str, str, int]:
    return row["kind"], row["dtype"], row["batch"]


def _peer(row: Row) -> str:
    return row["peer"].replace("timm/", "timm: ") or "none"


def _names(rows: Iterable[Row], remark: str = "") -> str:
    """ " (`a`, `b`)", or with a remark that is filled from each row ": `a` (the remark), `b` (...)"; "" of none."""
    names = [f"`{r['model']}`" + (f" ({remark.format(**r)})" if remark else "") for r in rows]
    return "" if not names else f": {', '.join(names)}" if remark else f" ({', '.join(names)})"


def _spread(median: float | None, low: float | None, high: float | None, *, percent: bool = False) -> str:
    if median is None or low is None or high is None:
        return "-"
    if percent:
        return f"{100 * median:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"
    return f"{median:.2f} [{low:.2f}, {high:.2f}]"


def _table(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(row)} |" for row in body)]
