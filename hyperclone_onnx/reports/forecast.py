"""The report of `forecast`: the law, the answers for the target, and the cheapest ways to it."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rich.console import Console

from hyperclone_onnx.forecasting.answers import KEPT, Estimate, Forecast
from hyperclone_onnx.forecasting.numbers import written
from hyperclone_onnx.reports.tables import plain_table, print_line


def print_forecast(console: Console, forecast: Forecast) -> None:
    """Print the law, a table of answers, the cheapest routes, and what was assumed."""
    fit, target = forecast.fit, forecast.target
    print_line(console, law_line(forecast))
    if forecast.held_back is not None:
        size, error = forecast.held_back
        print_line(
            console, f"check: from the smaller sizes alone, the losses of {written(size)} are forecast {error:+.2%} off"
        )
    print_line(console, f"target: {written(target.size)} weights, {written(target.tokens)} tokens")
    grown = forecast.grown
    table = plain_table("", "from random weights", *([] if grown is None else ["grown"]))
    for column in table.columns[1:]:
        column.justify = "right"
    for name, *cells in _rows(forecast):
        table.add_row(name, *cells[: len(table.columns) - 1])
    console.print(table)
    if grown is not None:
        for line in source_lines(forecast):
            print_line(console, line)
    if forecast.routes:
        routes = plain_table("cheapest ways to this loss, all training counted", "FLOPs", "random / this")
        for route, gain in forecast.routes:
            stages = ", then ".join(f"{written(stage.size)} for {written(stage.tokens)}" for stage in route.stages)
            routes.add_row(stages, written(route.flops), f"{gain.value:.2f}x ({gain.low:.2f} to {gain.high:.2f})")
        console.print(routes)
    elif fit.of_size is None:
        print_line(console, "no way through smaller sizes that the curves cover is cheaper than random weights")
    for note in forecast.notes:
        print_line(console, f"note: {note}")


def _rows(forecast: Forecast) -> Iterator[tuple[str, str, str]]:
    """The rows of the table: what, from random weights, grown."""
    grown, reach = forecast.grown, f"to the loss {forecast.goal:.4f}:"
    length = f"loss after {written(forecast.target.tokens)} tokens"
    if grown is None:
        yield length, loss(forecast.loss), ""
        yield f"{reach} tokens", amount(forecast.tokens), ""
        yield f"{reach} FLOPs", amount(forecast.flops), ""
        return
    yield "loss at the start", "", loss(grown.start)
    yield length, loss(forecast.loss), loss(grown.loss)
    yield f"{reach} tokens", amount(forecast.tokens), amount(grown.tokens)
    yield f"{reach} FLOPs", amount(forecast.flops), amount(grown.flops)
    yield "with the source's FLOPs", amount(forecast.flops), amount(grown.total)


def law_line(forecast: Forecast) -> str:
    """The fitted law, and how far it is from the losses."""
    law, fit = forecast.fit.law, forecast.fit
    size = f" + {law.size_factor:.4g} / N^{law.size_exponent:.3f}" if fit.of_size is None else ""
    of_size = "" if fit.of_size is None else f" for {written(fit.of_size)} weights alone"
    return (
        f"law{of_size}: loss = {law.limit:.4f}{size} + {law.token_factor:.4g} / D^{law.token_exponent:.3f}, "
        f"{fit.error:.2%} from {len(fit.observations)} losses on average"
    )


def source_lines(forecast: Forecast) -> list[str]:
    """What the source gives and costs, and when it pays to train one for this."""
    grown = forecast.grown
    assert grown is not None
    source, saved = grown.source, grown.saved
    lines = [
        f"grown from {written(source.size)} weights trained on {written(source.tokens)} tokens: its loss is worth "
        f"{amount(grown.head_start)} tokens of the target's own training"
    ]
    if math.isfinite(saved.value):
        sure = "" if (saved.low > 0.0) == (saved.high > 0.0) else ", but the range has both signs"
        does = "saves" if saved.value > 0.0 else "costs"
        lines.append(
            f"with the source's training counted, growing {does} {written(abs(saved.value))} FLOPs to this loss{sure}"
        )
    longest = grown.longest_source
    if longest is not None and longest.value > 0.0:
        lines.append(
            f"break-even: to train a source of this size for this pays up to {amount(longest)} tokens of its training"
        )
    elif longest is not None:
        lines.append("break-even: to train a source of this size for this never pays; grow one that is there")
    lines.append(
        f"assumed of growth: {KEPT:.0%} of the head start and of the tokens after it count, as measured at factor 2 in "
        "docs/forecast.md"
    )
    return lines


def loss(estimate: Estimate) -> str:
    """A loss with its range."""
    return f"{estimate.value:.4f} ({estimate.low:.4f} to {estimate.high:.4f})"


def amount(estimate: Estimate) -> str:
    """A number of tokens or FLOPs with its range."""
    if math.isinf(estimate.value):
        return "never"
    return f"{written(estimate.value)} ({written(estimate.low)} to {written(estimate.high)})"
