"""The table in Markdown, and its picture."""

from __future__ import annotations

import hashlib
import math
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import foveate
from foveate.precision import has_bf16
from foveate.runtime import memory

PACKAGES = ("torch", "timm", "grad-cam", "captum", "torchcam", "quantus")
Outcome = dict[str, Any]
WORDS = {True: "yes", False: "no, so that rows in bf16 are left out", None: "not known"}


def machine(device: torch.device, data: Path | None) -> str:
    """Processor or GPU, threads, the versions of everybody, which weights and images ran, and by which source."""
    names = re.findall(r"model name\s*:\s*(.+)", cpu.read_text()) if (cpu := Path("/proc/cpuinfo")).exists() else []
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else (names[0] if names else platform.processor())
    half = f", bf16 instructions: {WORDS[has_bf16(device)]}"
    kept = ", freed memory is kept by the process" if memory.kept() and device.type == "cpu" else ""
    found = [f"foveate {foveate.__version__}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"no {package}")
    of_data = f"real ones on photographs (data {digest(data)})" if data else "random ones, both on noise"
    weights = f"ResNet-50 with random weights, MobileNet-V2 with {of_data}"
    python = platform.python_version()
    threads = f"{torch.get_num_threads()} threads{half}{kept}"
    return f"{chip}, {threads}; Python {python}, {', '.join(found)}; {weights}; source {source()}"


def source() -> str:
    """A digest of foveate's files and of the benchmark's: rows of another are not to be gone on with."""
    found = hashlib.sha256()
    for folder in (Path(foveate.__file__).parent, Path(__file__).parent):
        for path in sorted(folder.rglob("*.py")):
            found.update(path.read_bytes())
    return found.hexdigest()[:8]


def digest(data: Path) -> str:
    """Of the factories and the list of images, and of the names and lengths of the weights."""
    found = hashlib.sha256((data / "zoo.py").read_bytes() + (data / "imagenet" / "labels.csv").read_bytes())
    for path in sorted((data / "weights").iterdir()):
        found.update(f"{path.name} {path.stat().st_size}\n".encode())
    return found.hexdigest()[:8]


def commit() -> str:
    """Of the source that ran, with a plus where files were changed since; nothing outside of a repository."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def seconds(value: float) -> str:
    if math.isnan(value):
        return "–"
    if value < 1:
        return f"{value * 1000:.2g} ms" if value < 0.0995 else f"{value * 1000:.0f} ms"
    return f"{value:.3g} s" if value < 999 else f"{value:.0f} s"


def ratio(value: float, low: float, high: float) -> str:
    if math.isnan(value):
        return "–"
    digits = 2 if value < 10 else 1 if value < 100 else 0
    if math.isnan(low):
        return f"{value:.{digits}f}, once"
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def line(one: Outcome) -> str:
    """A row as it comes, for the terminal."""
    ours, others = one["contestants"][0], one["contestants"][1:]
    text = f"{one['title']}: {seconds(ours['seconds'])}{_counted(ours)}"
    if not math.isnan(one["over_limit"]):
        text += f"; {ratio(one['over_limit'], one['over_low'], one['over_high'])} of its limit"
    for other in others:
        found = other["error"] or f"x {ratio(other['ratio'], other['low'], other['high'])}{_counted(other)}"
        text += f"\n    {other['name']}: {found}" + (f", {other['agreement']}" if other["agreement"] else "")
    return text


def _counted(who: dict[str, Any]) -> str:
    passes = f", {who['forward']}+{who['backward']} passes" if who["forward"] else ""
    return passes + ("" if math.isnan(who["memory"]) else f", {who['memory']:.0f} MB")


def table(rows: list[Outcome]) -> str:
    """All rows: a line a job, and one for each of the others."""
    head = ["job", "who", "time", "times foveate's", "of the limit", "forward", "backward", "memory", "agreement"]
    lines = ["| " + " | ".join(head) + " |", "|---|---|---:|---:|---:|---:|---:|---:|---|"]
    for one in rows:
        for number, who in enumerate(one["contestants"]):
            ours = number == 0
            cells = [
                one["title"] if ours else "",
                "**foveate**" if ours else who["name"],
                seconds(who["seconds"]),
                "" if ours else who["error"] or ratio(who["ratio"], who["low"], who["high"]),
                ratio(one["over_limit"], one["over_low"], one["over_high"]) if ours else "",
                str(who["forward"] or ""),
                str(who["backward"] or ""),
                "" if math.isnan(who["memory"]) else f"{who['memory']:.0f} MB",
                who["agreement"],
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def limits(rows: list[Outcome]) -> str:
    """What each limit is made of, and what to know of the row."""
    lines = ["| job | limit | that is | to know |", "|---|---:|---|---|"]
    for one in rows:
        if one["fewest"] or one["remark"]:
            lines.append(f"| {one['title']} | {seconds(one['limit'])} | {one['fewest']} | {one['remark']} |")
    return "\n".join(lines)


def picture(rows: list[Outcome], path: Path) -> None:
    """How many times longer the others take, a point each with its interval; left of the line they are faster."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = [one for one in rows if any(not math.isnan(w["ratio"]) for w in one["contestants"][1:])]
    colours = {"pytorch-grad-cam": "#c44e52", "Captum": "#4c72b0", "torch-cam": "#8172b2", "Quantus": "#937860"}
    figure, axes = plt.subplots(figsize=(10, 0.27 * len(shown) + 1.6), layout="constrained")
    for height, one in enumerate(reversed(shown)):
        axes.axhline(height, color="#eeeeee", linewidth=0.7, zorder=0)
        measured = [who for who in one["contestants"][1:] if not math.isnan(who["ratio"])]
        for number, who in enumerate(measured):
            y = height + 0.22 * ((len(measured) - 1) / 2 - number)  # none hides another
            colour = next((c for name, c in colours.items() if who["name"].startswith(name)), "#7f7f7f")
            axes.plot([who["low"], who["high"]], [y, y], color=colour, linewidth=2, alpha=0.5)
            fill = "white" if " in fp32" in who["name"] else colour
            mark = "s" if who["name"].endswith(" at once") else "o"
            axes.plot(who["ratio"], y, mark, color=colour, markerfacecolor=fill, markersize=4.5)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_yticks(range(len(shown)), [one["title"] for one in reversed(shown)], fontsize=7.5)
    axes.set_xlabel("times foveate's time (the median of rounds in turns, and its interval)")
    axes.set_ylim(-0.7, len(shown) - 0.3)
    handles = [plt.Line2D([], [], marker="o", linestyle="", color=c, label=name) for name, c in colours.items()]
    handles.append(plt.Line2D([], [], marker="o", linestyle="", color="#7f7f7f", label="after the paper, or foveate otherwise"))
    names = [who["name"] for one in shown for who in one["contestants"][1:]]
    if any(" in fp32" in name for name in names):
        handles.append(plt.Line2D([], [], marker="o", linestyle="", color="#7f7f7f", markerfacecolor="white", label="in fp32"))
    if any(name.endswith(" at once") for name in names):
        handles.append(plt.Line2D([], [], marker="s", linestyle="", color="#7f7f7f", label="told to run few at once"))
    figure.legend(handles=handles, fontsize=7.5, ncols=4, loc="outside upper center", frameon=False)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def write(rows: list[Outcome], machine: str, out: Path, device: str) -> Path:
    """The page and its picture beside it; the page's path."""
    name = "performance" if device == "cpu" else f"performance_{device}"
    commits = ", ".join(dict.fromkeys(found for one in rows if (found := one.get("commit"))))
    text = f"{machine}{f'; commit {commits}' if commits else ''}\n\n{table(rows)}\n\n{limits(rows)}\n"
    (out / f"{name}.md").write_text(text, encoding="utf-8")
    if any(not math.isnan(who["ratio"]) for one in rows for who in one["contestants"][1:]):
        picture(rows, out / f"{name}.png")
    return out / f"{name}.md"
