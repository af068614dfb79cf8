"""Fonts for text in images: the one that Pillow brings, or one of the system for what it cannot draw."""

import functools
import unicodedata

from PIL import ImageFont


Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

# Files that Pillow finds in the font folders of Linux, macOS and Windows
SYSTEM_FONTS = (
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "NotoSansCJK-Regular.ttc",
    "Arial Unicode.ttf",
    "arial.ttf",
    "msyh.ttc",
    "malgun.ttf",
    "Nirmala.ttf",
)
NO_CHARACTER = "\uffff"  # which no font has
ELLIPSIS = "…"


def font_for(text: str, size: int) -> tuple[Font, bool]:
    """
    The first font that draws all of `text`, or else the one that draws most of it.

    Returns:
        `tuple[ImageFont, bool]`: The font, and whether it draws at least half of the characters.
    """
    characters = [c for c in set(text) if not c.isspace() and unicodedata.category(c) not in ("Mn", "Cf")]
    fonts = _fonts(size)
    missing = []
    for font in fonts:
        absent = _picture(font, NO_CHARACTER)
        missing.append(sum(_picture(font, c) == absent for c in characters))
        if missing[-1] == 0:
            return font, True
    return fonts[missing.index(min(missing))], min(missing) <= len(characters) / 2


def wrap(text: str, font: Font, width: float, max_lines: int) -> list[str]:
    """
    Lines of `text` that are at most `width` pixels wide, broken at spaces, or inside a word that is too long.

    At most `max_lines`, of which the last one ends with an ellipsis if text is left over.
    """
    words = text.split()
    lines: list[str] = []
    while words and len(lines) <= max_lines:
        line, words = _first_line(words, font, width)
        lines.append(line)
    if len(lines) > max_lines:
        del lines[max_lines:]
        lines[-1] = shorten(f"{lines[-1]}{ELLIPSIS}", font, width)
    return lines


def shorten(text: str, font: Font, width: float) -> str:
    """`text` if it is at most `width` pixels wide, or as much of its beginning as is, with an ellipsis."""
    if font.getlength(text) <= width:
        return text
    text = text.removesuffix(ELLIPSIS)
    while text and font.getlength(f"{text}{ELLIPSIS}") > width:
        text = text[:-1]
    return f"{text.rstrip()}{ELLIPSIS}"


def _first_line(words: list[str], font: Font, width: float) -> tuple[str, list[str]]:
    """The words that fit on one line, and those that are left."""
    line = ""
    for i, word in enumerate(words):
        longer = f"{line} {word}".lstrip()
        if font.getlength(longer) <= width:
            line = longer
            continue
        if font.getlength(word) <= width:
            return line, words[i:]
        # A text without spaces, as in Chinese, or a very long word
        start = f"{line} ".lstrip()
        fitting = next((n for n in range(len(word), 0, -1) if font.getlength(start + word[:n]) <= width), 0)
        if fitting == 0 and not line:
            fitting = 1
        return (start + word[:fitting]).rstrip(), [word[fitting:], *words[i + 1 :]]
    return line, []


@functools.cache
def _fonts(size: int) -> list[Font]:
    fonts = [ImageFont.load_default(size)]
    for name in SYSTEM_FONTS:
        try:
            fonts.append(ImageFont.truetype(name, size))
        except OSError:
            continue
    return fonts


@functools.cache
def _picture(font: Font, character: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(character)
    return mask.size, bytes(mask)
