"""Loss points → `loss-curve.png`: figure 7.17 of "Build a Large Language Model (From Scratch)".

Of preference tuning a second panel shows how far apart the model sets the two answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning_sft.common import files


def plot_loss_curve(points: Sequence[Mapping[str, float]], path: str | Path) -> None:
    """Draw training and validation loss over epochs, with tokens seen on a second axis above.

    Args:
        points: Each with `epoch` (fractional), `tokens_seen`, `train_loss` and `val_loss`; of
            preferences also `train_margin` and `val_margin`.
    """
    # Imported here: matplotlib takes half a second, and without a screen it needs no backend.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    epochs = [point["epoch"] for point in points]
    has_margins = bool(points) and "train_margin" in points[0]
    figure = Figure(figsize=(12 if has_margins else 6, 3.8), layout="constrained")
    panels = figure.subplots(1, 2) if has_margins else [figure.subplots()]
    axes = panels[0]
    axes.plot(epochs, [point["train_loss"] for point in points], label="Training loss")
    axes.plot(epochs, [point["val_loss"] for point in points], "-.", label="Validation loss")
    axes.set_xlabel("Epochs")
    axes.set_ylabel("Loss")
    axes.set_ylim(bottom=0)
    if has_margins:
        margins = panels[1]
        for split, line, label in (("train", "-", "Training"), ("val", "-.", "Validation")):
            margins.plot(epochs, [p[f"{split}_margin"] for p in points], line, label=label)
        margins.set_xlabel("Epochs")
        margins.set_ylabel("Reward margin, chosen less rejected")
    for panel in panels:
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(alpha=0.25)
        panel.legend(frameon=False)
    # An invisible curve over the tokens gives the upper axis its scale.
    above = axes.twiny()
    above.plot(
        [point["tokens_seen"] for point in points],
        [point["train_loss"] for point in points],
        alpha=0,
    )
    above.set_xlabel("Tokens seen")
    above.xaxis.set_major_formatter(EngFormatter())
    with files.atomic_write(path, "wb") as file:
        FigureCanvasAgg(figure).print_png(file)
