"""How text and pictures stand in one sequence: the ids and lengths that generation needs of any family."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """The structure of a family's sequences; None means that the family has no such token."""

    bos: int | None
    """First token of every document."""
    eos: tuple[int, ...]
    """Tokens that end a text."""
    boi: int | None = None
    """Begin of image: the token after which a picture is painted."""
    eoi: int | None = None
    """End of image: read after a painted picture, before text goes on."""
    pad: int | None = None
    unk: int | None = None
    bos_before_pictures: bool = True
    """Whether BOS also begins a document that begins with a picture, and not only one that begins with text."""
    banned: tuple[int, ...] = ()
    """Tokens that writing never chooses."""
    picture_tokens: int = 0
    """Positions that one picture takes, with the tokens around it."""
    picture_codes: int = 0
    """Of a family that writes a picture as tokens: how many. 0 is a family that denoises pictures."""
    max_position: int = 4096
    """Longest sequence that generation accepts."""
