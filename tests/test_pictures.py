"""What the pictures show: every label can be read, and every bar and mark is named."""

from __future__ import annotations

import json
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import plots
import pytest
from laws import ROOT

from qlora_native.tool.train.progress import plot_losses

figures = pytest.importorskip("matplotlib.figure")
text_class = pytest.importorskip("matplotlib.text")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The axes of every figure that is saved."""
    found: list[Any] = []
    save = figures.Figure.savefig

    def kept(figure: Any, *args: Any, **options: Any) -> None:
        save(figure, *args, **options)
        found.extend(figure.axes)

    monkeypatch.setattr(figures.Figure, "savefig", kept)
    return found


def names(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_every_picture_of_the_pages_is_drawn_here() -> None:
    assert {file.stem for file in (ROOT / "docs").glob("*.png")} == plots.PICTURES.keys()


@pytest.mark.parametrize("name", plots.PICTURES)
def test_no_two_texts_overlap_and_every_axis_has_a_label(
    name: str, drawn: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: dict[int, tuple[str, Any]] = {}  # what is painted, at the file's resolution: ticks out of sight are not
    sizes = []
    paint = text_class.Text.draw

    def kept(text: Any, renderer: Any, *args: Any, **options: Any) -> None:
        paint(text, renderer, *args, **options)
        if text.get_visible() and text.get_text().strip():
            shown[id(text)] = text.get_text(), text.get_window_extent(renderer)
            sizes.append(renderer.get_canvas_width_height())

    monkeypatch.setattr(text_class.Text, "draw", kept)
    plots.save(name, tmp_path / f"{name}.png")
    boxes, (width, height) = list(shown.values()), sizes[-1]
    assert len(boxes) > 10
    for (one, left), (other, right) in combinations(boxes, 2):
        assert not left.padded(-0.5).overlaps(right.padded(-0.5)), f"{one!r} and {other!r}"
    for text, box in boxes:
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1, text
    for axes in drawn:
        shares_labels = axes.get_shared_y_axes().joined(axes, drawn[0]) and axes is not drawn[0]
        assert axes.get_xlabel() and (axes.get_ylabel() or shares_labels)
        for axis, label in ((axes.xaxis, axes.get_xlabel()), (axes.yaxis, axes.get_ylabel())):
            assert (axis.get_scale() == "log") == ("log scale" in label), label


def test_quality(drawn: list[Any], tmp_path: Path) -> None:
    plots.save("quality", tmp_path / "quality.png")
    for axes in drawn:
        assert all(len(name.split()) > 1 for name in names(axes))
        legend = axes.get_legend().get_window_extent()
        assert len(axes.patches) > 1
        for artist in (*axes.patches, *axes.lines, *axes.collections):  # bars, caps, error bars
            assert not legend.overlaps(artist.get_tightbbox()), artist
    errors = [[one for one in axes.containers if getattr(one, "errorbar", None)] for axes in drawn]
    assert errors[0] and not errors[1]  # of the runs none was measured
    texts = plots.results_for("quality")["texts"].keys() - {"calibration"}
    assert {name.partition(":")[0] for name in names(drawn[0])} == texts


def draw_losses(folder: Path, *lines: dict[str, float]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plot_losses(folder)


def test_losses(drawn: list[Any], tmp_path: Path) -> None:
    lines = [{"step": 0, "eval_loss": 9.0}, {"step": 1, "loss": 8.0}, {"step": 2, "loss": 1.5}]
    lines += [{"step": 2, "eval_loss": 1.25}, {"step": 3, "loss": 1.4}, {"step": 3, "eval_loss": 1.75}]
    draw_losses(tmp_path, *lines)
    (axes,) = drawn
    assert axes.get_yscale() == "log" and names(axes)[-1] == "best: 1.2500 at step 2"
    assert axes.lines[-1].get_xydata().tolist() == [[2.0, 1.25]]


@pytest.mark.parametrize(("lowest", "highest"), [(0.008, 8), (1.5, 1.6), (1.2, 1.9), (0.7, 11), (1e-4, 9), (1e-9, 1e4)])
def test_the_values_of_losses_can_be_read(lowest: float, highest: float, drawn: list[Any], tmp_path: Path) -> None:
    """The labels of the y axis, of major and minor ticks: at least two, none over another."""
    losses = (highest, (lowest * highest) ** 0.5, lowest)
    draw_losses(tmp_path, *({"step": step, "loss": loss} for step, loss in enumerate(losses, 1)))
    (axes,) = drawn
    labels = (label for which in ("major", "minor") for label in axes.get_yticklabels(which=which))
    inside = [label for label in labels if label.get_text() and label.get_visible()]
    boxes = sorted((label.get_window_extent() for label in inside), key=lambda box: box.y0)
    boxes = [box for box in boxes if axes.bbox.y0 <= (box.y0 + box.y1) / 2 <= axes.bbox.y1]
    assert len(boxes) > 1 and all(low.y1 <= high.y0 for low, high in pairwise(boxes))
