"""The report of `evaluate` as text for people."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

Row = Sequence[str]


def table(report: dict[str, Any]) -> str:
    """All figures of a report in a few aligned tables."""
    parts = _head(report)
    parts += [
        _aligned(rows) for rows in (_retrieval(report), _pictures(report), _captions(report), _text(report))
    ]
    parts.append(f"Intervals are 95% bootstrap intervals. {report['seconds']['total']:.0f} seconds.")
    return "\n\n".join(parts)


def distance_table(report: dict[str, Any]) -> str:
    """All figures of a report of `set_distances.evaluate_distances`."""
    parts = _head(report)
    if (other := report.get("compared")) is not None:
        compared = _described(other, report["settings"]["compare"]["generation"])
        parts.append(f"compared with {compared}")
    parts += [_aligned(_distances(name, split)) for name, split in report["distances"].items()]
    parts.append(
        f"Features of {report['features']['network']}; 95% intervals from random halves; Frechet distances "
        f"of sets of different sizes do not compare. {report['seconds']['total']:.0f} seconds."
    )
    return "\n\n".join(parts)


def _distances(name: str, split: dict[str, Any]) -> list[Row]:
    title = f"{name}: {split['count']} painted, {split['references']} real"
    rows: list[Row] = [[title, "Frechet", "1000 x kernel", "nearest is its own", "... or a variant"]]
    for role in ("model", "compared"):
        if (part := split.get(role)) is not None:
            figures = (_distance(part["frechet"]), _distance(part["kernel"], 1000))
            rates = (_rate(part["retrieval"][key]) for key in ("exact", "variant"))
            rows.append([role, *figures, *rates])
    if (ratio := split.get("ratio")) is not None:
        rows.append(["model / compared", _distance(ratio["frechet"]), _distance(ratio["kernel"]), "", ""])
    floor = split["floor"]
    count = f"floor: {floor['count']} {floor['what']}, {floor['references']} real"
    rows.append([count, f"{floor['frechet']:.3f}", f"{1000 * floor['kernel']:.3f}", "", ""])
    return rows


def _distance(figure: dict[str, Any] | None, factor: float = 1.0) -> str:
    if figure is None:
        return "not positive"
    low, high = figure["interval"]
    return f"{factor * figure['value']:.3f} [{factor * low:.3f}, {factor * high:.3f}]"


def _head(report: dict[str, Any]) -> list[str]:
    settings = report["settings"]
    head = f"{_described(report['model'], settings['generation'])}, seed {settings['seed']}"
    return [head, "QUICK: counts too small for the figures to mean much"] if report["quick"] else [head]


def _described(model: dict[str, Any], generation: dict[str, Any]) -> str:
    return (
        f"{model['name']} ({model['fingerprint']}, {model['parameters'] / 1e6:.1f} M parameters); "
        f"{generation['sampler']}, {generation['steps']} steps, guidance {generation['guidance']:g}"
    )


def _retrieval(report: dict[str, Any]) -> list[Row]:
    rows: list[Row] = [["Retrieval", *report["pictures"]]]

    def add(title: str, kind: str, key: str) -> None:
        rows.append([title, *(_rate(part[key]) for part in report[kind].values())])

    sizes = [f"{p['count']} of {p['references']}" for p in report["pictures"].values()]
    rows.append(["captions painted, references", *sizes])
    add("picture nearest to its own reference", "pictures", "exact")
    add("... or to a variant of it", "pictures", "variant")
    for title, key in (("mean cosine with its own", "mean_cosine"), ("mean rank of its own", "mean_rank"),
                       ("median rank of its own", "median_rank")):  # fmt: skip
        rows.append([title, *(_number(p[key]) for p in report["pictures"].values())])
    sizes = [f"{p['count']} of {p['references']}" for p in report["descriptions"].values()]
    rows.append(["pictures described, references", *sizes])
    add("description is its own caption", "descriptions", "match")
    add("nearest caption is its own", "descriptions", "right")
    add("... or a variant's", "descriptions", "variant")
    rows.append(
        ["CIDEr-D of the description", *(_scored(p, "cider_d") for p in report["descriptions"].values())]
    )
    for key, what in (("clip", "painted"), ("clip_of_references", "real")):
        parts = [p[key] for p in report["pictures"].values() if key in p]
        if parts:
            rows.append([f"CLIP score, {what} pictures", *(_scored(p, "clip_score") for p in parts)])
            for title, way in (
                ("caption of the picture", "text_of_picture"),
                ("picture of the caption", "picture_of_text"),
            ):
                rows.append([f"... {title} among the k nearest", *(_recalls(p[way]) for p in parts)])
    return rows


def _scored(part: dict[str, Any], key: str) -> str:
    low, high = part[f"{key}_interval"]
    return f"{part[key]:.3f} [{low:.3f}, {high:.3f}]"


def _recalls(recalls: dict[str, float]) -> str:
    return ", ".join(f"R@{k} {rate:.1%}" for k, rate in recalls.items())


def _pictures(report: dict[str, Any]) -> list[Row]:
    splits = report["losses"]
    keys = [(split, key) for split in splits for key in ("with_caption", "without_caption")]
    head = [f"{s}, {k.split('_')[0]} caption" for s, k in keys]
    if "codes" in next(iter(splits.values())):
        return [
            ["Codes of pictures", *head],
            ["nats per code", *(f"{splits[s]['codes'][k]['nats_per_token']:.4f}" for s, k in keys)],
            ["perplexity per code", *(f"{splits[s]['codes'][k]['perplexity']:.2f}" for s, k in keys)],
        ]
    rows: list[Row] = [["Velocity error by angle (radians)", *head]]
    buckets = next(iter(splits.values()))["denoising"]["angle_buckets"]
    for i, (low, high) in enumerate(buckets):
        name = f"{low:.2f} to {'pi/2' if math.isclose(high, math.pi / 2) else f'{high:.2f}'}"
        rows.append([name, *(f"{splits[s]['denoising'][k]['velocity_error'][i]:.4f}" for s, k in keys)])
    at_noise = (splits[s]["denoising"][k]["picture_error_at_noise"] for s, k in keys)
    rows.append(["of the picture, at pi/2", *(f"{value:.4f}" for value in at_noise)])
    return rows


def _captions(report: dict[str, Any]) -> list[Row]:
    rows: list[Row] = [["Captions", "nats per caption", "perplexity per token"]]
    for split, losses in report["losses"].items():
        for order in ("before", "after"):
            rows.append([f"{split}, {order} the picture", *_perplexity(losses[f"caption_{order}_picture"])])
    return rows


def _text(report: dict[str, Any]) -> list[Row]:
    text = report["text"]
    title = f"Validation texts ({text['model']['texts']})"
    rows: list[Row] = [[title, "nats per text", "perplexity per token", "bits per character"]]
    for name in ("model", "bigram", "unigram"):
        rows.append([name, *_perplexity(text[name]), f"{text[name]['bits_per_character']:.3f}"])
    return rows


def _perplexity(summary: dict[str, Any]) -> list[str]:
    low, high = summary["perplexity_interval"]
    return [f"{summary['nats_per_text']:.2f}", f"{summary['perplexity']:.2f} [{low:.2f}, {high:.2f}]"]


def _rate(figures: dict[str, Any]) -> str:
    low, high = figures["interval"]
    return f"{figures['rate']:.1%} [{low:.1%}, {high:.1%}], chance {figures['chance']:.2%}"


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _aligned(rows: Sequence[Row]) -> str:
    """Columns padded to their widest cell; a line under the first row."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
