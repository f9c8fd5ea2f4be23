"""What a picture's PNG says about how it was made, and back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mlx_transfusion.errors import UserError
from mlx_transfusion.model_io import Loaded
from mlx_transfusion.objective import CONSISTENCY, DIFFUSION, TOKENS
from mlx_transfusion.settings import DEFAULTS, TOKEN_SETTINGS, GenerationSettings, ResolvedSettings


def image_record(
    loaded: Loaded, prompt: str, seed: int, settings: ResolvedSettings, batch: int = 1, row: int = 0
) -> dict[str, Any]:
    """What a PNG says about how it was made; `settings_from_record` reads it back.

    A consistency model's objective and the angles are there in addition, and how tokens were drawn where a picture
    consists of them.
    """
    from mlx_transfusion import __version__

    height, width = loaded.pictures.picture_size
    record = {
        "version": __version__,
        "model": loaded.name,
        "model_hash": loaded.fingerprint,
        "prompt": prompt,
        "negative_prompt": settings.negative_prompt,
        "seed": seed,
        "steps": settings.steps,
        "sampler": settings.sampler,
        "spacing": settings.spacing,
        "guidance": settings.guidance,
        "guidance_interval": list(settings.guidance_interval),
        "width": width,
        "height": height,
        "batch": {"size": batch, "row": row},
    }
    if "adapters" in loaded.extra:
        record["adapters"] = loaded.extra["adapters"]
    if settings.angles is not None:
        record |= {"angles": list(settings.angles), "objective": loaded.extra["objective"]}
    if settings.sampler == TOKENS:
        record |= {name: getattr(settings, name) for name in TOKEN_SETTINGS}
    return record


def record_objective(record: dict[str, Any]) -> dict[str, Any]:
    """The objective of the model that painted the picture of this record; {} when it does not tell."""
    if "objective" in record or "sampler" not in record:
        table = record.get("objective", {})
        return table if isinstance(table, dict) else {}
    sampler = record["sampler"]
    return {"name": sampler if sampler in (CONSISTENCY, TOKENS) else DIFFUSION}


def completion_record(
    loaded: Loaded, prompt: str, seed: int, settings: ResolvedSettings, picture: int
) -> dict[str, Any]:
    """As `image_record`, for picture `picture` of a completion, which `generate --from` cannot repeat."""
    return image_record(loaded, prompt, seed, settings) | {
        "completion": {
            "picture": picture,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": settings.top_k,
            "repetition_penalty": settings.repetition_penalty,
        }
    }


def settings_from_record(record: dict[str, Any], where: str) -> GenerationSettings:
    """The settings in a picture's record. Raises UserError naming `where` when it is damaged."""
    if "completion" in record:
        raise UserError(
            f"{where}: was painted inside a text: repeat it with `complete`, the same prompt and seed"
        )
    if record.get("edit"):
        raise UserError(f"{where}: was made from another picture: repeat it with `edit`")
    if "pictures" in record:
        raise UserError(f"{where}: is a sheet of {len(record['pictures'])} pictures: give one of them")
    try:
        settings = replace(
            DEFAULTS,
            sampler=str(record["sampler"]),
            steps=int(record["steps"]),
            angles=tuple(float(angle) for angle in record["angles"]) if "angles" in record else None,
            spacing=str(record["spacing"]),
            guidance=float(record["guidance"]),
            guidance_interval=(float(record["guidance_interval"][0]), float(record["guidance_interval"][1])),
            negative_prompt=str(record["negative_prompt"]),
            batch_size=int(record["batch"]["size"]),
            **{
                name: type(getattr(DEFAULTS, name))(record[name]) for name in TOKEN_SETTINGS if name in record
            },
        )
        str(record["prompt"]), int(record["seed"])
        if not 0 <= int(record["batch"]["row"]) < settings.batch_size:
            raise ValueError("row outside the batch")
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(
            f"{where}: its settings are damaged ({error!r}): cannot repeat the picture"
        ) from error
    return settings.check()
