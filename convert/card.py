"""README.md of a converted model: licence, source, and how to use it, as the Hugging Face hub reads it."""

from __future__ import annotations

import json

from mlx_transfusion import __version__

from .account import Account


def model_card(account: Account, name: str) -> str:
    """The text: a YAML head for the hub, then for people. name: the new folder's."""
    card = account.plan.card
    head = ["---", "library_name: mlx", "tags:", "- mlx", "- mlx-transfusion"]
    if "/" in card.base_model:
        head += [f"base_model: {_yaml(card.base_model)}"]
    if card.licence != "unknown":
        head += [f"license: {_yaml(card.licence)}"]
    head += [f"pipeline_tag: {card.pipeline}", "---"]
    source = f"[{card.base_model}]({card.url})" if card.url else card.base_model
    body = [
        f"# {name}",
        "",
        f"Converted from {source} by mlx-transfusion {__version__} (`convert`, family `{account.plan.family}`).",
        "",
        f"- Licence: {_licence(card.licence, card.licence_note)}",
        f"- Size: {account.parameters / 1e6:,.1f} million parameters, {account.nbytes / 1e9:.3f} GB of weights, "
        f"{bits_a_weight(account):.2f} bits a weight{_how(account)}.",
        *([f"- {card.notes}"] if card.notes else []),
        "",
        *(_usage(name, card.pipeline) if account.plan.model is None else []),
    ]
    return "\n".join([*head, "", *body, ""])


def bits_a_weight(account: Account) -> float:
    """Average over all parameters, scales counted."""
    return 8 * account.nbytes / account.parameters


def _usage(name: str, pipeline: str) -> list[str]:
    text = 'complete "The capital of France is"'
    verb = text if pipeline == "text-generation" else 'generate "a red heart"'
    return ["```", "pip install mlx-transfusion", f"mlx-transfusion {verb} --model {name}", "```"]


def _licence(licence: str, note: str) -> str:
    said = "not stated by the source" if licence == "unknown" else f"{licence}, as the original's"
    return f"{said}. {note}".strip()


def _how(account: Account) -> str:
    table = account.quantization
    if table is None:
        return ""
    others = sum(isinstance(value, dict) for value in table.values())
    mode = table.get("mode", "affine")
    noun = "matrix with a setting of its own" if others == 1 else "matrices with a setting of their own"
    differing = f"; {others} {noun}" if others else ""
    return f" ({mode}, {table['bits']} bits in groups of {table['group_size']}{differing})"


def _yaml(text: str) -> str:
    """A string that YAML reads as it is."""
    return json.dumps(text)
